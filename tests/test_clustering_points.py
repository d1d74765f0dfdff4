"""Mean shift on points: against scikit-learn and the definition, and the estimator's contract."""

import pickle

import numpy as np
import pytest
import sklearn.cluster
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.utils.estimator_checks import check_estimator

from cvi_nb.clustering import MeanShift, estimate_bandwidth, mean_shift
from cvi_nb.clustering.compiled import PointCloud, PointTree, has_compiled

BACKENDS = ["portable", pytest.param("compiled", marks=pytest.mark.skipif(not has_compiled(), reason="not built"))]


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


@pytest.mark.parametrize("estimator", [MeanShift(), MeanShift(kernel="normal"), MeanShift(labels="nearest")])
def test_scikit_learns_contract(estimator):
    check_estimator(estimator, on_skip=None)


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
