"""Mean shift on points: against scikit-learn and the definition, and the estimator's contract."""

import pickle
import warnings

import numpy as np
import pytest
import sklearn.cluster
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from cvi_nb.clustering import MeanShift, estimate_bandwidth, mean_shift
from cvi_nb.clustering.compiled import PointCloud, PointTree, has_compiled

BACKENDS = ["portable", pytest.param("compiled", marks=pytest.mark.skipif(not has_compiled(), reason="not built"))]

BINS = {"bin_seeding": True}
OPTIONS = [{}, BINS, BINS | {"labels": "basin"}, BINS | {"cluster_all": False}]


def blobs(dimensions, count, spread, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(6, dimensions)) * spread * np.sqrt(2 / dimensions)
    return centres[rng.integers(6, size=count)] + rng.normal(size=(count, dimensions))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dimensions", [2, 8, 32])
@pytest.mark.parametrize("spread", [10.0, 2.5])
def test_equals_scikit_learn(backend, dimensions, spread):
    X, h = blobs(dimensions, 250, spread), 0.85 * np.sqrt(2 * dimensions)
    peer = sklearn.cluster.MeanShift(bandwidth=h).fit(X)
    ours = mean_shift(torch.from_numpy(X), h, labels="nearest", backend=backend)
    assert ours.centres.shape == peer.cluster_centers_.shape
    assert np.abs(ours.centres.numpy() - peer.cluster_centers_).max() < 1e-4 * h
    assert np.array_equal(ours.labels.numpy(), peer.labels_)
    some = mean_shift(torch.from_numpy(X), h, labels="nearest", cluster_all=False, backend=backend).labels.numpy()
    assert np.array_equal(some, sklearn.cluster.MeanShift(bandwidth=h, cluster_all=False).fit(X).labels_)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_definition(backend, dtype):
    X = torch.from_numpy(blobs(5, 300, 4.0)).to(dtype)
    h, D = 2.5, X.double()
    ends = []
    for z in D:
        while True:
            mean = D[(D - z).norm(dim=1) <= h].mean(0)
            step, z = (mean - z).norm(), mean
            if step <= 1e-3 * h:
                break
        ends.append(z)
    found = mean_shift(X, h, backend=backend)
    assert found.ends.dtype == dtype and found.converged.all()
    assert (found.ends.double() - torch.stack(ends)).norm(dim=1).quantile(0.99) <= 1e-5 * h


@pytest.mark.skipif(not has_compiled(), reason="not built")
@pytest.mark.parametrize("kind", [PointTree, PointCloud])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9999), count=st.integers(1, 90), dimensions=st.integers(1, 11), h=st.floats(0.05, 6))
def test_windows_of_the_library_are_exact(kind, seed, count, dimensions, h):
    rng = np.random.default_rng(seed)
    X = np.round(rng.normal(size=(count, dimensions)) * 2, 1) + 100 * rng.normal()
    w = rng.integers(1, 4, count).astype(float)
    ends, mass, _, _ = kind(X, w).climb(X + 0.03, h, 0.0, 1)
    near = ((X[None] - X[:, None] - 0.03) ** 2).sum(-1) <= h**2
    decided = (np.abs(((X[None] - X[:, None] - 0.03) ** 2).sum(-1) - h**2) > 1e-9 * (1 + h**2)).all(1)
    assert np.array_equal(mass[decided], (near @ w)[decided])
    full = decided & (mass > 0)
    assert np.abs(ends[full] - ((near * w) @ X / np.maximum(near @ w, 1)[:, None])[full]).max(initial=0) < 1e-9


@pytest.mark.parametrize("kernel", ["flat", "normal"])
def test_density_never_falls_along_a_climb(kernel):
    X, h = torch.from_numpy(load_iris().data), 1.0
    z, previous = X.clone(), None
    for _ in range(15):
        z = mean_shift(X, h, kernel, seeds=z, max_iterations=1).ends
        d2 = torch.cdist(z, X).square() / h**2
        density = ((1 - d2).clamp_min(0) if kernel == "flat" else torch.exp(-d2 / 2)).sum(1)
        assert previous is None or (density >= previous * (1 - 1e-12)).all()
        previous = density


def test_normal_kernel_is_a_weighted_mean_whatever_the_weights():
    X = torch.from_numpy(blobs(3, 200, 3.0))
    w = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w[:5] = 0
    found = mean_shift(X, 1.2, "normal", weights=w, max_iterations=1).ends
    kernel = w * torch.exp(-torch.cdist(X, X).square() / (2 * 1.2**2))
    assert (found - kernel @ X / kernel.sum(1, keepdim=True)).abs().max() < 1e-10


@pytest.mark.parametrize("kernel", ["flat", "normal"])
@settings(max_examples=10, deadline=None)
@given(shift=st.floats(-50, 50), scale=st.sampled_from([0.1, 3.0, 40.0]), seed=st.integers(0, 999))
def test_translation_and_scale_equivariance(kernel, shift, scale, seed):
    X = torch.from_numpy(blobs(2, 80, 6.0, seed))
    plain, moved = mean_shift(X, 1.7, kernel), mean_shift(X * scale + shift, 1.7 * scale, kernel)
    assert plain.centres.shape == moved.centres.shape
    assert torch.equal(plain.labels, moved.labels)
    assert (moved.centres - plain.centres * scale - shift).abs().max() < 1e-6 * scale + 1e-9 * abs(shift)


@pytest.mark.parametrize("kernel", ["flat", "normal"])
def test_integer_weights_count_points(kernel):
    X = torch.from_numpy(blobs(3, 120, 3.0))
    w = torch.randint(0, 4, (120,), generator=torch.Generator().manual_seed(1))
    weighted, repeated = (
        mean_shift(X, 1.5, kernel, weights=w.double()),
        mean_shift(X.repeat_interleave(w, 0), 1.5, kernel),
    )
    assert (weighted.centres - repeated.centres).abs().max() < 1e-8
    assert torch.equal(weighted.labels.repeat_interleave(w), repeated.labels)


def test_bandwidth_is_scikit_learns():
    X = load_iris().data
    for quantile in (0.05, 0.3, 1.0):
        peer = sklearn.cluster.estimate_bandwidth(X, quantile=quantile)
        assert estimate_bandwidth(torch.from_numpy(X), quantile) == pytest.approx(peer, rel=1e-10)
    many = blobs(3, 6000, 3.0)
    peer = sklearn.cluster.estimate_bandwidth(many, quantile=0.1)
    assert estimate_bandwidth(torch.from_numpy(many), 0.1) == pytest.approx(peer, rel=0.02)


def test_basins_and_prediction():
    X = blobs(2, 300, 3.0)
    fitted = MeanShift(bandwidth=1.5).fit(X)
    assert np.array_equal(fitted.predict(X), fitted.labels_)
    nearest = MeanShift(bandwidth=1.5, labels="nearest").fit(X)
    assert np.array_equal(nearest.predict(X), nearest.labels_)
    for model in (fitted, nearest, MeanShift(kernel="normal").fit(X)):
        again = pickle.loads(pickle.dumps(model))
        assert np.array_equal(again.predict(X[::3]), model.predict(X[::3]))
        assert clone(model).get_params() == model.get_params()


def test_bin_seeding_finds_the_centres():
    X = blobs(2, 500, 10.0)
    peer = sklearn.cluster.MeanShift(bandwidth=2.0, bin_seeding=True).fit(X)
    ours = MeanShift(bandwidth=2.0, bin_seeding=True, labels="nearest").fit(X)
    assert np.allclose(ours.cluster_centers_, peer.cluster_centers_)
    assert np.array_equal(ours.labels_, peer.labels_)


@parametrize_with_checks([
    MeanShift(), MeanShift(kernel="normal"), MeanShift(labels="nearest"), MeanShift(bin_seeding=True),
    MeanShift(bin_seeding=True, labels="basin"), MeanShift(bin_seeding=True, min_bin_freq=2),
    MeanShift(cluster_all=False),
])  # fmt: skip
def test_scikit_learns_contract(estimator, check):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "cells of bandwidth")
        check(estimator)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), apart=st.floats(5, 9), h=st.floats(2.0, 3.0), options=st.sampled_from(OPTIONS))
def test_two_blobs_are_two_and_predicted_as_labelled(seed, apart, h, options):
    X = np.random.default_rng(seed).normal(size=(100, 2)) + np.repeat([[0, 0], [apart, 0]], 50, axis=0)
    fitted = MeanShift(bandwidth=h, **options).fit(X)
    assert np.array_equal(fitted.predict(X), fitted.labels_)
    distance = np.linalg.norm(X[:, None] - fitted.cluster_centers_, axis=2)
    if fitted.labels_.min() >= 0 and options.get("labels") != "basin" and options:
        assert np.array_equal(fitted.labels_, distance.argmin(1))
    elif fitted.labels_.min() >= 0:  # by basins: as without bins
        plain = MeanShift(bandwidth=h).fit(X)
        assert fitted.cluster_centers_.shape != plain.cluster_centers_.shape or np.array_equal(
            fitted.labels_, plain.labels_
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", [{"kernel": "normal"}, {"bandwidth": 1.1}, {"bandwidth": 1, "cluster_all": False}])
def test_predictions_are_labels_in_either_precision(dtype, options):
    X = blobs(3, 400, 2.5).astype(dtype)
    fitted = MeanShift(**options).fit(X)
    assert np.array_equal(fitted.predict(X), fitted.labels_)
    assert fitted.cluster_centers_.dtype == dtype


def test_bins_of_two_blobs():
    X = np.random.default_rng(3).normal(size=(100, 2)) + np.repeat([[0, 0], [7, 0]], 50, axis=0)
    for labels in (None, "basin", "nearest"):
        found = MeanShift(bandwidth=2.5, bin_seeding=True, labels=labels).fit(X).labels_
        assert sorted(np.bincount(found)) == [50, 50]


@pytest.mark.parametrize("dimensions", [8, 14, 20])
def test_useless_bins_give_way_to_the_points(dimensions):
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(size=(50, dimensions)), rng.normal(size=(50, dimensions)) + 1])
    with pytest.warns(UserWarning, match="cells of bandwidth=0.65"):
        ours = MeanShift(bandwidth=0.65, bin_seeding=True).fit(X)
    with pytest.warns(UserWarning, match="Binning data failed"):
        peer = sklearn.cluster.MeanShift(bandwidth=0.65, bin_seeding=True).fit(X)
    assert len(ours.cluster_centers_) == len(peer.cluster_centers_) == 100
    assert np.array_equal(ours.labels_, peer.labels_)


def test_useless_bins_of_real_data():
    X = StandardScaler().fit_transform(load_breast_cancer().data)[:150]
    with pytest.warns(UserWarning, match="cells of bandwidth=1 "):
        assert len(MeanShift(bandwidth=1, bin_seeding=True).fit(X).cluster_centers_) == 150
    with pytest.warns(UserWarning, match="cells of bandwidth=2 "):  # no cell holds a thousand points
        assert len(MeanShift(bandwidth=2, bin_seeding=True, min_bin_freq=1000).fit(X).cluster_centers_) > 100


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("values", [[1, 1, 1, 2, 2, 2, 3, 3], [0] * 6 + [1e-12] * 5, [1e9] * 5 + [1e9 + 512] * 4])
@pytest.mark.parametrize("options", [{}, {"bin_seeding": True}, {"kernel": "normal"}, {"labels": "nearest"}])
def test_an_estimate_of_zero_makes_each_distinct_point_a_cluster(dtype, values, options):
    X = np.array(values, dtype=dtype)[:, None]
    fitted = MeanShift(**options).fit(X)
    assert fitted.bandwidth_ == 0 == estimate_bandwidth(X)
    assert np.array_equal(fitted.cluster_centers_[fitted.labels_], X)
    assert len(fitted.cluster_centers_) == len(np.unique(X))
    assert np.array_equal(fitted.predict(X), fitted.labels_)
    kernel = options.get("kernel", "flat")
    assert np.array_equal(mean_shift(X, kernel=kernel).labels.numpy(), fitted.labels_)


def test_arrays_lists_and_jobs_as_in_scikit_learn():
    X = load_iris().data
    a, b = (
        mean_shift(X, 1.0, weights=np.ones(150), seeds=X[::3]),
        mean_shift(torch.from_numpy(X), 1.0, weights=torch.ones(150), seeds=torch.from_numpy(X[::3])),
    )
    assert torch.equal(a.centres, b.centres) and torch.equal(a.labels, b.labels)
    assert torch.equal(mean_shift(X.tolist(), 1.0).labels, mean_shift(X, 1.0).labels)
    assert mean_shift([[1, 1], [2, 1], [1, 0], [4, 7], [3, 5], [3, 6]], 2).labels.tolist() == [1, 1, 1, 0, 0, 0]
    assert estimate_bandwidth(X) == estimate_bandwidth(torch.from_numpy(X))
    assert np.array_equal(MeanShift(n_jobs=2).fit(X).labels_, MeanShift().fit(X).labels_)
    read_only = X.copy()
    read_only.flags.writeable = False
    assert torch.equal(mean_shift(read_only, 1.0).labels, a.labels) and np.array_equal(read_only, X)


def test_half_precision_is_computed_in_single():
    X = torch.from_numpy(blobs(2, 200, 6.0)).half()
    for dtype in (torch.float16, torch.bfloat16):
        found, expected = mean_shift(X.to(dtype), 2.0), mean_shift(X.to(dtype).float(), 2.0)
        assert found.centres.dtype == torch.float32
        assert torch.equal(found.centres, expected.centres) and torch.equal(found.labels, expected.labels)
    found = MeanShift(bandwidth=2.0).fit(X.numpy())
    assert np.array_equal(found.predict(X.numpy()), found.labels_)


@pytest.mark.skipif(not has_compiled(), reason="not built")
@pytest.mark.parametrize("count", [8, 9, 13, 65])
@pytest.mark.parametrize("unit", [1.0, 1e25, 1e-25, 1e140, 1e299])
def test_no_window_holds_what_fills_up_the_last_block(count, unit):
    """Squares overflow in single precision beyond 1e19, coordinates beyond 1e38, squares in double beyond 1e154."""
    X = np.random.default_rng(0).normal(size=(count, 20))
    expected, mass, _, _ = PointCloud(X, np.ones(count)).climb(X, 5.5, 5e-3, 300)
    got, weight, _, _ = PointCloud(X * unit, np.ones(count)).climb(X * unit, 5.5 * unit, 5e-3 * unit, 300)
    assert (mass == weight).all() and (weight <= count).all()
    assert np.abs(got / unit - expected).max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, unit", [(torch.float32, 1e16), (torch.float64, 1e149)])
def test_large_numbers_are_right_or_refused(backend, dtype, unit):
    X = torch.from_numpy(blobs(20, 90, 4.0)).to(dtype)
    small, large = (mean_shift(X * scale, 5.5 * scale, backend=backend) for scale in (1.0, unit))
    assert torch.equal(small.labels, large.labels)
    assert estimate_bandwidth(X * unit) == pytest.approx(estimate_bandwidth(X) * unit, rel=1e-5)
    for function in (mean_shift, estimate_bandwidth):
        with pytest.raises(ValueError, match="`points` must be within"):
            function(X * unit * 1e4)
    with pytest.raises(ValueError, match="`bandwidth`"):
        mean_shift(X, unit * 1e4)
    with pytest.raises(ValueError, match="`X` must be within"):
        MeanShift().fit((X * unit * 1e4).numpy())


@pytest.mark.parametrize("change, error, name", [
    ({"bandwidth": 0}, ValueError, "bandwidth"), ({"bandwidth": "wide"}, TypeError, "bandwidth"),
    ({"bin_seeding": 1}, TypeError, "bin_seeding"), ({"min_bin_freq": 0}, ValueError, "min_bin_freq"),
    ({"n_jobs": 1.5}, TypeError, "n_jobs"), ({"labels": "far"}, ValueError, "labels"),
    ({"max_iter": 0}, ValueError, "max_iter"), ({"kernel": "box"}, ValueError, "kernel"),
    ({"cluster_all": None}, TypeError, "cluster_all"), ({"seeds": [[0.0]]}, ValueError, "seeds"),
    ({"seeds": [[99.0] * 4], "bandwidth": 1}, ValueError, "No point was within bandwidth=1"),
])  # fmt: skip
def test_bad_parameters_of_the_estimator_are_refused_by_name(change, error, name):
    with pytest.raises(error, match=name):
        MeanShift(**change).fit(load_iris().data)


def test_odd_points():
    assert mean_shift(torch.zeros(5, 2)).labels.tolist() == [0] * 5
    assert mean_shift(torch.zeros(5, 2), kernel="normal").labels.tolist() == [0] * 5
    assert mean_shift(torch.ones(1, 3), 1.0).centres.tolist() == [[1, 1, 1]]
    spread = mean_shift(torch.arange(4.0)[:, None] * 10, 1.0)
    assert len(spread.centres) == 4
    assert len(mean_shift(torch.arange(4.0)[:, None], 1e6).centres) == 1


@pytest.mark.parametrize(
    "change, error, name",
    [
        ({"points": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "points"),
        ({"points": torch.zeros(0, 2)}, ValueError, "points"),
        ({"points": torch.zeros(4)}, ValueError, "points"),
        ({"points": torch.full((3, 2), torch.nan)}, ValueError, "points"),
        ({"points": torch.full((3, 2), torch.inf)}, ValueError, "points"),
        ({"bandwidth": -1.0}, ValueError, "bandwidth"),
        ({"bandwidth": 0.0}, ValueError, "bandwidth"),
        ({"kernel": "box"}, ValueError, "kernel"),
        ({"labels": "hard"}, ValueError, "labels"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"points": [["a"]]}, TypeError, "points"),
        ({"points": "abc"}, TypeError, "points"),
        ({"points": np.zeros((3, 2), dtype=bool)}, TypeError, "points"),
        ({"bandwidth": float("nan")}, ValueError, "bandwidth"),
        ({"bandwidth": True}, TypeError, "bandwidth"),
        ({"tolerance": -1}, ValueError, "tolerance"),
        ({"max_iteration": 3}, TypeError, "did you mean `max_iterations`"),
        ({"weights": "abc"}, TypeError, "weights"),
        ({"weights": torch.ones(2)}, ValueError, "weights"),
        ({"weights": -torch.ones(3)}, ValueError, "weights"),
        ({"weights": torch.zeros(3)}, ValueError, "weights"),
        ({"seeds": torch.zeros(1, 3)}, ValueError, "seeds"),
        ({"seeds": torch.full((1, 2), 99.0)}, ValueError, "seeds"),
        ({"max_iterations": 0}, ValueError, "max_iterations"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, name):
    with pytest.raises(error, match=name):
        mean_shift(**({"points": torch.zeros(3, 2), "bandwidth": 1.0} | change))


@pytest.mark.parametrize("backend", ["compiled", "portable"])
@pytest.mark.parametrize("steps", [1, 2, 300])
def test_many_dimensions_against_a_plain_loop(backend, steps):
    """Windows shared between climbs change neither an end nor what is told about the way there."""
    if backend == "compiled" and not has_compiled():
        pytest.skip("the C library is not built")
    rng = np.random.default_rng(1)
    points = rng.normal(size=(301, 33)) + 10  # no multiple of a block, a word or a vector
    weights, h = rng.integers(1, 4, 301) / 2, 7.5
    ends, mass, shift, iterations = points.copy(), np.zeros(301), np.zeros(301), np.zeros(301, dtype=int)
    for i in range(301):
        while iterations[i] == 0 or (iterations[i] < steps and shift[i] > 1e-3 * h):
            near = ((points - ends[i]) ** 2).sum(1) <= h**2
            mean = weights[near] @ points[near] / weights[near].sum()
            shift[i], mass[i], ends[i] = np.linalg.norm(mean - ends[i]), weights[near].sum(), mean
            iterations[i] += 1
    got = mean_shift(
        torch.from_numpy(points), h, weights=torch.from_numpy(weights), backend=backend, max_iterations=steps
    )
    assert np.abs(got.ends.numpy() - ends).max() < 1e-12 * h
    assert np.abs(got.shift.numpy() - shift / h).max() < 1e-12
    assert (got.mass.numpy() == mass).all() and (got.iterations.numpy() == iterations).all()
