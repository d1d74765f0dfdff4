"""Mean shift on images: against its definition, under symmetries, on odd input, and between backends."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, sparse
from skimage import color, data
from sklearn.datasets import load_sample_image

from cvi_nb.clustering import hierarchy, mean_shift_filter, region_graph, segment
from cvi_nb.clustering.colour import from_rgb, to_rgb
from cvi_nb.clustering.compiled import has_compiled
from cvi_nb.data import load_photos

ROOT = Path(__file__).parent.parent
BACKENDS = ["portable", pytest.param("compiled", marks=pytest.mark.skipif(not has_compiled(), reason="not built"))]


@pytest.fixture(scope="module")
def photos():
    return load_photos().images[:, :, 60:108, 60:116]  # (8, 3, 48, 56)


def truth(image, hs, hr, window="product", kernel="flat", steps=300, mask=None, still=1e-3):
    """The definition, in double precision, one pixel at a time: modes (N, 5) over their bandwidths."""
    coordinates = from_rgb(image[None].double())[0] / hr
    h, w = image.shape[1:]
    row, column = torch.meshgrid(torch.arange(h).double(), torch.arange(w).double(), indexing="ij")
    pixels = torch.cat([torch.stack([row, column]) / hs, coordinates]).flatten(1).T.numpy()
    pixels = pixels if mask is None else pixels[mask.flatten().numpy()]
    reach = 1.0 if kernel == "flat" else 3.0
    ends = []
    for z in pixels:
        for _ in range(steps):
            difference = pixels - z
            ds, dr = (difference[:, :2] ** 2).sum(1), (difference[:, 2:] ** 2).sum(1)
            inside = (ds <= reach**2) & (dr <= reach**2) if window == "product" else ds + dr <= reach**2
            weight = inside * (np.exp(-0.5 * (ds + dr)) if kernel == "normal" else 1.0)
            step = weight @ difference / weight.sum()
            z = z + step
            if step @ step <= still**2:
                break
        ends.append(z)
    return np.array(ends)


def scaled(modes, hs, hr):
    """Modes (2 + C, H, W) as rows (N, 2 + C) over their bandwidths."""
    flat = modes.flatten(1).T.double().numpy().copy()
    flat[:, :2] /= hs
    flat[:, 2:] /= hr
    return flat


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", ["product", "ball"])
@pytest.mark.parametrize("hs, hr", [(4, 7.0), (6.5, 12.0)])
def test_modes_are_those_of_the_definition(photos, backend, window, hs, hr):
    image = photos[4, :, :32, :36]
    modes = mean_shift_filter(image[None], hs, hr, window=window, backend=backend).modes[0]
    error = np.linalg.norm(scaled(modes, hs, hr) - truth(image, hs, hr, window), axis=1)
    assert (error <= 1e-2).mean() >= 0.998
    assert np.median(error) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_normal_kernel_and_mask_follow_the_definition(photos, backend):
    image, mask = photos[4, :, :18, :20], torch.ones(18, 20, dtype=torch.bool)
    mask[5:9, 3:12] = False
    options = {"mask": mask, "max_iterations": 12, "accelerate": False}
    result = mean_shift_filter(image[None], 4, 7, kernel="normal", backend=backend, **options)
    error = scaled(result.modes[0], 4, 7)[mask.flatten()] - truth(image, 4, 7, kernel="normal", steps=12, mask=mask)
    assert np.abs(error).max() < 1e-4
    assert result.modes[0, :, ~mask].isnan().all() and (result.iterations[0, ~mask] == 0).all()
    assert torch.equal(result.images[0, :, ~mask], image[:, ~mask])


@pytest.mark.skipif(not has_compiled(), reason="not built")
@pytest.mark.parametrize("window", ["product", "ball"])
def test_fewer_steps_end_in_the_modes_of_the_normal_kernel(photos, window):
    """Plain steps that stop at a thousandth of a bandwidth end short of them."""
    image = photos[5, :, :26, :26]
    ends = truth(image, 5, 8, window, "normal", steps=5000, still=1e-9)
    errors, means = {}, {}
    for accelerate in (True, False):
        options = {"window": window, "kernel": "normal", "backend": "compiled", "accelerate": accelerate}
        found = mean_shift_filter(image[None], 5, 8, **options)
        assert found.converged.all()
        errors[accelerate] = np.linalg.norm(scaled(found.modes[0], 5, 8) - ends, axis=1)
        means[accelerate] = float(found.iterations.double().mean())
    assert (errors[True] <= 1e-2).mean() >= 0.998
    assert np.median(errors[True]) < 1e-3 and np.median(errors[True]) < np.median(errors[False]) / 5
    assert means[True] < means[False] / 3


@pytest.mark.skipif(not has_compiled(), reason="not built")
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_fewer_steps_end_where_very_many_do(photos, channels):
    features = torch.cat([photos[:1], photos[1:2]], 1)[:, :channels, :40, :40] * 12
    options = {"colour": None, "features": features, "kernel": "normal"}
    plain = {"accelerate": False, "tolerance": 1e-6, "max_iterations": 20000}
    many = mean_shift_filter(photos[:1, :, :40, :40], 6, **plain, **options)
    few = mean_shift_filter(photos[:1, :, :40, :40], 6, **options)
    unit = torch.tensor([6.0, 6.0] + [1.0] * channels)[:, None, None]
    assert (((few.modes - many.modes) / unit).norm(dim=1) <= 1e-2).double().mean() >= 0.998
    assert few.iterations.double().mean() < many.iterations.double().mean() / 5


@pytest.mark.skipif(not has_compiled(), reason="not built")
def test_fewer_steps_are_the_same_whatever_the_threads_and_give_way_to_plain_ones(photos):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(mean_shift_filter(photos[:1], 8, 7, kernel="normal"))
    torch.set_num_threads(1)
    assert torch.equal(found[0].modes, found[1].modes) and torch.equal(found[0].iterations, found[1].iterations)
    deep = torch.cat([photos[1:2, :, :20, :20] * k for k in (30, 20, 10)], 1)  # nine features
    options = {"colour": None, "features": deep, "kernel": "normal"}
    a, b = (mean_shift_filter(photos[1:2, :, :20, :20], 5, accelerate=k, **options) for k in (True, False))
    assert torch.equal(a.modes, b.modes)
    with pytest.raises(TypeError, match="accelerate"):
        mean_shift_filter(photos[:1], accelerate=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_density_never_falls_along_a_climb(photos, backend):
    image, hs, hr = photos[:1, :, :32, :32], 5.0, 9.0
    pixels = torch.from_numpy(scaled(torch.cat([
        torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")), from_rgb(image)[0],
    ]), hs, hr))  # fmt: skip
    previous = None
    for steps in (1, 2, 3, 5, 8, 13):
        modes = mean_shift_filter(image, hs, hr, window="ball", max_iterations=steps, backend=backend).modes[0]
        z = torch.from_numpy(scaled(modes, hs, hr))
        density = (1 - torch.cdist(z, pixels).square()).clamp_min(0).sum(1)
        if previous is not None:
            assert (density >= previous * (1 - 1e-5)).all()
        previous = density


@pytest.mark.skipif(not has_compiled(), reason="not built")
@pytest.mark.parametrize("window", ["product", "ball"])
@pytest.mark.parametrize("colour", ["luv", "grey"])
def test_backends_agree(photos, window, colour):
    a, b = (
        mean_shift_filter(photos[:4], 8, 7, window=window, colour=colour, backend=k) for k in ("portable", "compiled")
    )
    scale = torch.tensor([8.0, 8.0] + [7.0] * (a.modes.shape[1] - 2))[:, None, None]
    error = ((a.modes - b.modes) / scale).norm(dim=1)
    assert (error <= 1e-2).double().mean() >= 0.998
    assert a.converged.all() and b.converged.all()
    assert (a.images - b.images).abs().mean() < 1e-3


def test_fused_kernel_agrees_in_the_interpreter():
    pytest.importorskip("triton")
    script = """
import torch
from cvi_nb.clustering.colour import from_rgb
from cvi_nb.clustering.filtering import climb_portable
from cvi_nb.clustering.fused import climb_fused
from cvi_nb.data import load_photos
f = from_rgb(load_photos().images[:2, :, 100:105, 100:105]) / 7
v = torch.ones(2, 5, 5, dtype=torch.bool)
v[0, 2, 3] = False
for window in ("product", "ball"):
    for kernel, reach, steps in (("flat", 1.0, 6), ("normal", 3.0, 2)):
        o = dict(window=window, kernel=kernel, reach=reach, max_iterations=steps)
        a, b = climb_fused(f, v, 2.2, **o), climb_portable(f, v, 2.2, **o)
        assert (a[0] - b[0]).nan_to_num().abs().max() < 1e-4, (window, kernel)
        assert torch.equal(a[0].isnan(), b[0].isnan()) and torch.equal(a[1], b[1])
g = f[:1, :1]
a, b = climb_fused(g, v[1:], 2.2, max_iterations=3), climb_portable(g, v[1:], 2.2, max_iterations=3)
assert (a[0] - b[0]).abs().max() < 1e-4
"""
    run = [sys.executable, "-c", script]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_is_its_single_images(photos, backend):
    options = dict(spatial_bandwidth=6, range_bandwidth=8, backend=backend)
    together = segment(photos[:4], batch_size=3, **options)
    for i in range(4):
        labels, modes = segment(photos[i : i + 1], **options)
        assert torch.equal(together[0][i], labels[0]) and torch.equal(together[1][i], modes[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_number_of_threads_changes_nothing(photos, backend):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(mean_shift_filter(photos[:1], 6, 8, backend=backend))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0].modes, results[1].modes) and torch.equal(results[0].iterations, results[1].iterations)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000), dy=st.integers(0, 9), dx=st.integers(0, 9), scale=st.sampled_from([0.25, 0.5, 4.0]),
    backend=st.sampled_from(["portable", "auto"]),
)  # fmt: skip
def test_translation_and_scale_equivariance(seed, dy, dx, scale, backend):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randint(0, 64, (1, 2, 12, 13), generator=generator).float() / 8  # exact in any order of sums
    blank = torch.zeros(1, 1, 12, 13)
    options = dict(colour=None, backend=backend, max_iterations=1, spatial_bandwidth=3)
    plain = mean_shift_filter(blank, features=features, feature_bandwidth=2.0, **options)
    mask = torch.zeros(24, 25, dtype=torch.bool)
    mask[dy : dy + 12, dx : dx + 13] = True
    wide = torch.zeros(1, 2, 24, 25)
    wide[:, :, mask] = features.flatten(2)
    moved = mean_shift_filter(torch.zeros(1, 1, 24, 25), features=wide, feature_bandwidth=2.0, mask=mask, **options)
    found = moved.modes[0, :, mask].view(4, 12, 13) - torch.tensor([dy, dx, 0, 0])[:, None, None]
    assert (found - plain.modes[0]).abs().max() < 1e-4
    larger = mean_shift_filter(blank, features=features * scale, feature_bandwidth=2.0 * scale, **options)
    assert (larger.modes[0, 2:] / scale - plain.modes[0, 2:]).abs().max() < 1e-4


@pytest.mark.parametrize("hr", [4, 8, 16])
@pytest.mark.parametrize("min_size", [0, 30, 200])
def test_regions_are_connected_large_and_numbered_by_first_pixel(photos, hr, min_size):
    for labels in segment(photos, 6, hr, min_size)[0]:
        count = int(labels.max()) + 1
        assert torch.equal(labels.unique(), torch.arange(count))
        assert torch.bincount(labels.flatten()).min() >= min_size
        first = [int((labels.flatten() == r).nonzero()[0]) for r in range(count)]
        assert first == sorted(first)
        assert all(ndimage.label(labels.numpy() == r)[1] == 1 for r in range(count))


def reference_regions(modes, merge, min_size):
    """Joining, closing and pruning on a graph of regions: rows instead of products, sums carried along.

    `modes` (C, H, W) over their bandwidths; labels (H, W), and how many regions there were before closing.
    """
    values = modes.double().flatten(1).T.numpy()
    pixel = np.arange(len(values)).reshape(modes.shape[1:])
    steps = [np.stack([pixel[:, :-1].ravel(), pixel[:, 1:].ravel()]), np.stack([pixel[:-1].ravel(), pixel[1:].ravel()])]
    edges, sums, area, labels = np.concatenate(steps, 1), values, np.ones(len(values)), pixel.ravel()

    def join(chosen, edges, sums, area, labels):
        graph = sparse.csr_array((np.ones(chosen.shape[1]), chosen), shape=(len(area),) * 2)
        count, new = sparse.csgraph.connected_components(graph, directed=False)
        onto = sparse.csr_array((np.ones(len(new)), (new, np.arange(len(new)))), shape=(count, len(new)))
        edges = np.sort(new[edges], 0)
        edges = edges[:, edges[0] != edges[1]]
        edges = edges[:, np.lexsort(edges)]
        different = (np.diff(edges, axis=1, prepend=-1) != 0).any(0)
        return edges[:, different], onto @ sums, onto @ area, new[labels]

    def distances(edges, means):
        return np.linalg.norm(means[edges[0]] - means[edges[1]], axis=1)

    edges, sums, area, labels = join(edges[:, distances(edges, values) <= merge], edges, sums, area, labels)
    raw = len(area)
    while True:
        distance = distances(edges, sums / area[:, None])
        chosen = edges[:, distance <= merge]
        if not chosen.size:
            best = {}
            for (a, b), d in zip(edges.T.tolist(), distance.tolist(), strict=True):
                for one, other in ((a, b), (b, a)):
                    if area[one] < min_size:
                        best[one] = min(best.get(one, (d, other)), (d, other))
            chosen = np.array([(one, other) for one, (_, other) in best.items()]).T
            if not chosen.size:
                first = ndimage.minimum(pixel.ravel(), labels, np.arange(len(area)))
                return np.argsort(np.argsort(first))[labels].reshape(pixel.shape), raw
        edges, sums, area, labels = join(chosen, edges, sums, area, labels)


def large_image(name):
    if name == "noise":
        return torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    photo = data.coffee() if name == "coffee" else load_sample_image("china.jpg")
    images = torch.tensor(photo / 255, dtype=torch.float32).permute(2, 0, 1)[None]
    size = {"coffee": (400, 600), "china 810": (810, 1080), "china 1200": (1200, 1600)}[name]
    return torch.nn.functional.interpolate(images, size, mode="bicubic").clamp(0, 1)


LARGEST = pytest.param("china 1200", 8, 7, marks=pytest.mark.slow)


@pytest.mark.skipif(not has_compiled(), reason="the portable path takes minutes")
@pytest.mark.parametrize("name, hs, hr", [("noise", 3, 7), ("coffee", 4, 2), ("china 810", 8, 7), LARGEST])
def test_more_regions_than_the_root_of_the_largest_int32(name, hs, hr):
    """46,341² exceeds an int32; `china 810` has the size and the settings of `cvi segment` on an ordinary photo."""
    labels, modes = segment(large_image(name), hs, hr)
    expected, raw = reference_regions(modes[0, 2:] / hr, 0.5, 30)
    assert raw > 46_340
    assert np.array_equal(labels[0].numpy(), expected)


def test_several_bandwidths_and_nesting(photos):
    labels, modes = segment(photos[:2], 6, (4, 8, 16))
    assert labels.shape == (3, 2, 48, 56) and modes.shape == (3, 2, 5, 48, 56)
    for k, hr in enumerate((4, 8, 16)):
        single = segment(photos[:2], 6, hr)
        assert torch.equal(labels[k], single[0]) and torch.equal(modes[k], single[1])
    levels = hierarchy(photos[:2], 6, (4, 8, 16))
    assert torch.equal(levels.labels[0], labels[0])
    for k in range(2):
        for b in range(2):
            assert torch.equal(levels.parents[k][b][levels.labels[k, b]], levels.labels[k + 1, b])
            assert levels.labels[k + 1, b].max() <= levels.labels[k, b].max()
            assert torch.bincount(levels.labels[k, b].flatten()).min() >= 30
    with pytest.raises(ValueError, match="range_bandwidths"):
        hierarchy(photos[:1], 6, (8, 4))


def test_region_graph_against_a_loop(photos):
    labels = segment(photos[:1], 6, 8)[0][0]
    graph = region_graph(labels, photos[0])
    border = {}
    for a, b in ((labels[:, :-1], labels[:, 1:]), (labels[:-1], labels[1:])):
        for p, q in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
            if p != q:
                border[min(p, q), max(p, q)] = border.get((min(p, q), max(p, q)), 0) + 1
    assert {tuple(e): int(n) for e, n in zip(graph.edges.tolist(), graph.border, strict=True)} == border
    for r in range(len(graph.area)):
        assert graph.area[r] == (labels == r).sum()
        assert torch.allclose(graph.mean[r], photos[0][:, labels == r].double().mean(1), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_simple_images(backend):
    constant = torch.full((1, 3, 40, 50), 0.3)
    assert segment(constant, backend=backend)[0].max() == 0
    assert (mean_shift_filter(constant, backend=backend).images - 0.3).abs().max() < 1e-3
    two = constant.clone()
    two[..., 20:] = 0.8
    labels = segment(two, backend=backend)[0][0]
    assert (labels[:, :20] == 0).all() and (labels[:, 20:] == 1).all()
    assert (mean_shift_filter(two, backend=backend).images - two).abs().max() < 1e-3
    for shape in ((1, 1), (1, 37), (29, 1)):
        strip = torch.linspace(0, 1, shape[0] * shape[1]).view(1, 1, *shape).expand(1, 3, *shape)
        labels, modes = segment(strip, backend=backend)
        assert labels.shape == (1, *shape) and labels.min() == 0 and modes.isfinite().all()
    labels, modes = segment(torch.zeros(0, 3, 8, 9), backend=backend)
    assert labels.shape == (0, 8, 9) and labels.dtype == torch.int64 and modes.shape == (0, 5, 8, 9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_bandwidths_give_the_mean_and_tiny_ones_the_image(photos, backend):
    image = photos[:1, :, :24, :24]
    result = mean_shift_filter(image, 1e9, 1e9, backend=backend)
    assert (result.modes[0, :2] - 11.5).abs().max() < 1e-2
    assert (result.modes[0, 2:] - from_rgb(image)[0].mean((1, 2))[:, None, None]).abs().max() < 1e-2
    assert segment(image, 1e9, 1e9, backend=backend)[0].max() == 0
    assert (mean_shift_filter(image, 0.5, 1e-3, backend=backend).images - image).abs().max() < 1e-3


def test_features_beside_and_instead_of_colour(photos):
    flat = torch.full((1, 3, 30, 30), 0.5)
    features = torch.zeros(1, 2, 30, 30)
    features[:, 1, :, 12:] = 3.0
    for colour in ("luv", None):
        options = dict(colour=colour, features=features)
        assert segment(flat, 5, 7, feature_bandwidth=1.0, **options)[0].max() == 1
        assert segment(flat, 5, 7, feature_bandwidth=(1.0, 9.0), **options)[0].max() == 0
    assert mean_shift_filter(flat, features=features).modes.shape == (1, 7, 30, 30)


def test_masked_pixels_separate_regions():
    image, mask = torch.full((1, 3, 20, 30), 0.5), torch.ones(20, 30, dtype=torch.bool)
    mask[:, 15] = False
    labels = segment(image, mask=mask)[0][0]
    assert (labels[:, :15] == 0).all() and (labels[:, 15] == -1).all() and (labels[:, 16:] == 1).all()
    assert (segment(image, mask=torch.zeros_like(mask))[0] == -1).all()


@pytest.mark.parametrize(
    "change, error, name",
    [
        ({"images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, TypeError, "images"),
        ({"images": np.zeros((1, 3, 8, 8))}, TypeError, "images"),
        ({"images": torch.full((1, 3, 8, 8), torch.nan)}, ValueError, "images"),
        ({"images": torch.full((1, 3, 8, 8), torch.inf)}, ValueError, "images"),
        ({"images": torch.zeros(3, 8, 8)}, ValueError, "images"),
        ({"images": torch.zeros(1, 4, 8, 8)}, ValueError, "images"),
        ({"spatial_bandwidth": -1}, ValueError, "spatial_bandwidth"),
        ({"spatial_bandwidth": 0}, ValueError, "spatial_bandwidth"),
        ({"range_bandwidth": -3}, ValueError, "range_bandwidth"),
        ({"range_bandwidth": ()}, ValueError, "range_bandwidth"),
        ({"range_bandwidth": float("nan")}, ValueError, "range_bandwidth"),
        ({"range_bandwidth": float("inf")}, ValueError, "range_bandwidth"),
        ({"range_bandwidth": True}, TypeError, "range_bandwidth"),
        ({"images": torch.ones(1, 3, 8, 8), "range_bandwidth": 1e-11}, ValueError, "range_bandwidth"),
        ({"features": torch.full((1, 2, 8, 8), 1e15)}, ValueError, "feature_bandwidth"),
        ({"min_size": -1}, ValueError, "min_size"),
        ({"min_size": 2.5}, TypeError, "min_size"),
        ({"merge": -0.1}, ValueError, "merge"),
        ({"nested": 1}, TypeError, "nested"),
        ({"max_iteration": 5}, TypeError, "did you mean `max_iterations`"),
        ({"colour": "hsv"}, ValueError, "colour"),
        ({"colour": None}, ValueError, "features"),
        ({"window": "square"}, ValueError, "window"),
        ({"kernel": "box"}, ValueError, "kernel"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"max_iterations": 0}, ValueError, "max_iterations"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"tolerance": -1.0}, ValueError, "tolerance"),
        ({"mask": torch.ones(8, 8)}, ValueError, "mask"),
        ({"features": torch.zeros(1, 2, 7, 8)}, ValueError, "features"),
        ({"features": torch.full((1, 2, 8, 8), torch.nan)}, ValueError, "features"),
        ({"features": torch.zeros(1, 2, 8, 8), "feature_bandwidth": (1.0,)}, ValueError, "feature_bandwidth"),
        ({"backend": "fused"}, RuntimeError, "fused"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, name):
    with pytest.raises(error, match=name):
        segment(**({"images": torch.zeros(1, 3, 8, 8)} | change))


def test_double_precision_is_kept(photos):
    result = mean_shift_filter(photos[:1, :, :20, :20].double(), 4, 7, backend="portable")
    assert result.modes.dtype == torch.float64
    error = scaled(result.modes[0], 4, 7) - truth(photos[0, :, :20, :20], 4, 7)
    assert np.abs(error).max() < 1e-8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(photos, dtype):
    images = photos[:1, :, :20, :20].to(dtype)
    for result, expected in (
        (mean_shift_filter(images, 4, 7), mean_shift_filter(images.float(), 4, 7)),
        (mean_shift_filter(images, 4, 7, features=images), mean_shift_filter(images.float(), 4, 7, features=images)),
    ):
        assert result.images.dtype == result.modes.dtype == torch.float32
        assert torch.equal(result.images, expected.images) and torch.equal(result.modes, expected.modes)
    assert torch.equal(segment(images, 4, 7)[0], segment(images.float(), 4, 7)[0])


def test_numbers_of_numpy_and_torch_are_numbers(photos):
    expected = segment(photos[:1], 4, (7.0, 9.0), 20)[0]
    scalars = (np.float32(4), (torch.tensor(7), np.int64(9)), np.int32(20))
    assert torch.equal(segment(photos[:1], *scalars)[0], expected)
    assert torch.equal(segment(photos[:1], float("inf"), 7.0)[0], segment(photos[:1], 1e6, 7.0)[0])


@pytest.mark.parametrize("space, peer", [("luv", color.rgb2luv), ("lab", color.rgb2lab)])
def test_colour_spaces(photos, space, peer):
    ours = from_rgb(photos.double(), space).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - peer(photos.permute(0, 2, 3, 1).double().numpy())).max() < 0.02
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0])] * 3).T.reshape(1, 3, 27, 1)
    for images in (photos, corners):
        assert (to_rgb(from_rgb(images, space), space) - images).abs().max() < 2e-3
        grey = images[:, :1]
        assert (to_rgb(from_rgb(grey, space), space) - grey).abs().max() < 1e-3


@pytest.mark.parametrize("images", [torch.zeros(1, 2, 4, 4), torch.zeros(3, 4, 4), torch.zeros(1, 3, 4, 4).int(), None])
def test_colours_of_what_has_none_are_refused_by_name(images):
    for function, name in ((from_rgb, "images"), (to_rgb, "coordinates")):
        with pytest.raises(ValueError, match=f"`{name}` must be a floating point tensor"):
            function(images)
        with pytest.raises(ValueError, match="did you mean 'luv'"):
            function(torch.zeros(1, 3, 4, 4), "luw")


def test_without_the_library_the_portable_path_is_used_and_says_so_once(photos, monkeypatch):
    from cvi_nb.clustering import compiled, filtering

    compiled.say_portable.cache_clear()
    monkeypatch.setattr(filtering, "has_compiled", lambda: False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = segment(photos[:1, :, :16, :16], 4, 7)
        segment(photos[:1, :, :16, :16], 4, 7)
    assert [str(w.message)[:37] for w in caught] == ["the compiled mean shift is not built,"]
    assert torch.equal(first[0], segment(photos[:1, :, :16, :16], 4, 7, backend="portable")[0])
    with pytest.raises(RuntimeError, match="C library"):
        segment(photos[:1, :, :16, :16], 4, 7, backend="compiled")


def test_the_c_source_is_what_its_notebook_writes():
    notebook = json.loads((ROOT / "nbs/02_clustering/02_compiled.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    written = "".join(s.split("\n", 1)[1] + "\n" for s in sources if s.startswith("%%writefile"))
    assert written == (ROOT / "cvi_nb/clustering/_mean_shift.c").read_text(encoding="utf-8")
