"""scikit-learn's own tests of mean shift, run on ours.

Its module is read as it is, and its four names are ours through the adapter below. Nothing is left out. What differs:

- `MeanShift` labels by basins of attraction; with bins or seeds, or ``labels="nearest"``, by the nearest centre.
- `mean_shift` returns one object, of tensors, and `estimate_bandwidth` a Python float; `n_samples` there is a sample of
  points, here (`queries`) a sample of those whose neighbours are looked for, among all points.
- `predict` gives -1 to what ``cluster_all=False`` leaves out; scikit-learn's gives the nearest centre.
- ``max_iter=0`` is refused, and a grid whose cells are no help is left for the points in more cases.
"""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import sklearn.cluster
from sklearn.utils import check_random_state

from cvi_nb import clustering
from cvi_nb.clustering.points import bin_seeds

REAL = pytest.mark
SOURCE = Path(sklearn.cluster.__file__).parent / "tests" / "test_mean_shift.py"


def estimate_bandwidth(X, *, quantile=0.3, n_samples=None, random_state=0, n_jobs=None):
    if n_samples is not None:
        X = X[check_random_state(random_state).permutation(len(X))[:n_samples]]
    return np.float64(clustering.estimate_bandwidth(X, quantile))


def get_bin_seeds(X, bin_size, min_bin_freq=1):
    return bin_seeds(X, bin_size, min_bin_freq)


def mean_shift(X, *, max_iter=300, **options):
    found = clustering.mean_shift(X, labels="nearest", max_iterations=max_iter, **options)
    return found.centres.numpy(), found.labels.numpy()


class Marks:
    """`pytest.mark`, to which those marks that only scikit-learn's configuration knows are nothing."""

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(REAL, name)
        except pytest.fail.Exception:
            return lambda function: function


def theirs() -> ModuleType:
    specification = importlib.util.spec_from_file_location("sklearn_test_mean_shift", SOURCE)
    module = importlib.util.module_from_spec(specification)
    with mock.patch.object(pytest, "mark", Marks()):
        specification.loader.exec_module(module)
    for name, ours in {
        "MeanShift": clustering.MeanShift, "estimate_bandwidth": estimate_bandwidth, "get_bin_seeds": get_bin_seeds,
        "mean_shift": mean_shift,
    }.items():  # fmt: skip
        assert hasattr(module, name)
        setattr(module, name, ours)
    return module


if SOURCE.exists():
    TESTS = {name: test for name, test in vars(theirs()).items() if name.startswith("test_")}
    globals().update(TESTS)
else:
    TESTS = {}


@pytest.fixture(params=[np.float32, np.float64])
def global_dtype(request):
    return request.param


@pytest.fixture(params=[42])
def global_random_seed(request):
    return request.param


@pytest.mark.skipif(not SOURCE.exists(), reason="this scikit-learn comes without its tests")
def test_their_module_has_been_read():
    assert len(TESTS) >= 12
