"""Minimum-norm attacks and Carlini & Wagner against a linear model, whose distances are known exactly."""

import importlib.util
import itertools
import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cvi_nb.attack import (
    AttackResult,
    ZeroGradientWarning,
    boundary_step,
    carlini_wagner,
    ddn,
    deepfool,
    fmn,
    jsma,
    minimum_norm,
    norms,
    sigma_zero,
    targeted_cases,
)
from cvi_nb.data import load_digits

ATTACKS = {
    "deepfool": deepfool,
    "ddn": ddn,
    "fmn": fmn,
    "sigma_zero": sigma_zero,
    "jsma": jsma,
    "minimum_norm": minimum_norm,
    "carlini_wagner": lambda *a, **k: carlini_wagner(*a, steps=20, search_steps=2, warm_start=20, **k),
}
everything = pytest.mark.parametrize("name", ATTACKS)


class Linear(nn.Module):
    def __init__(self, shape: tuple[int, int, int], classes: int = 3, seed: int = 0):
        super().__init__()
        self.weight = torch.randn(classes, math.prod(shape), generator=torch.Generator().manual_seed(seed))
        self.bias = torch.zeros(classes)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


def problem(
    shape: tuple[int, int, int] = (1, 6, 5), count: int = 6, edge: bool = False
) -> tuple[Linear, Tensor, Tensor]:
    model = Linear(shape)
    x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))
    x = x.round() if edge else 0.4 + 0.2 * x
    return model, x, model(x).argmax(1)


def exact(model: Linear, x: Tensor, y: Tensor, norm: float) -> Tensor:
    """The distance to the nearest class in the box, by the closed form."""
    z, found = model(x), torch.full((len(x), 3), math.inf)
    for k in range(3):
        w = (model.weight[k] - model.weight[y]).view_as(x)
        need = z.gather(1, y[:, None])[:, 0] - z[:, k]
        step = boundary_step(w, need, -x, 1 - x, norm)
        feasible = (w * step).flatten(1).sum(1) >= need - 1e-4
        found[:, k] = torch.where(feasible & (y != k), norms(step, norm), math.inf)
    return found.amin(1)


def test_closed_form_without_box() -> None:
    model, x, y = problem()
    z = model(x)
    w = model.weight[(y + 1) % 3] - model.weight[y]
    need = z.gather(1, y[:, None])[:, 0] - z.gather(1, (y + 1)[:, None] % 3)[:, 0]
    far = torch.full_like(x, 1e3)
    for norm, dual in ((2, 2), (math.inf, 1)):
        step = boundary_step(w.view_as(x), need, -far, far, norm)
        torch.testing.assert_close(norms(step, norm), need / torch.linalg.vector_norm(w, dual, dim=1))


@pytest.mark.parametrize("edge", [False, True])
@pytest.mark.parametrize(
    ("attack", "norm", "excess"),
    [
        (deepfool, 2, 1.03),
        (deepfool, math.inf, 1.03),
        (minimum_norm, 2, 1.005),
        (minimum_norm, math.inf, 1.005),
        (carlini_wagner, 2, 1.005),
        (carlini_wagner, math.inf, 1.005),
        (ddn, 2, 1.05),
    ],
)
def test_linear(attack, norm, excess, edge) -> None:
    model, x, y = problem(edge=edge)
    result: AttackResult = attack(model, x, y) if attack is ddn else attack(model, x, y, norm=norm)
    truth = exact(model, x, y, norm)
    assert result.success.all()
    assert (result.distance >= truth - 1e-4).all()
    assert result.distance.mean() <= excess * truth.mean()


@pytest.mark.parametrize("edge", [False, True])
@pytest.mark.parametrize("attack", [carlini_wagner, minimum_norm])
def test_fewest_pixels_against_every_subset(attack, edge) -> None:
    model, x, y = problem((1, 3, 4), 4, edge)
    result = attack(model, x, y, norm=0)
    for one, label, found in zip(x, y, result.distance, strict=True):
        fewest = math.inf
        for k in range(3):
            if k != label:
                w = (model.weight[k] - model.weight[label]).view_as(one)
                gain = (torch.where(w > 0, 1 - one, -one) * w).flatten()
                lead = float(model(one[None])[0, label] - model(one[None])[0, k])
                for size in range(1, 13):  # every subset of pixels, each moved all the way
                    if any(float(gain[list(s)].sum()) > lead + 1e-5 for s in itertools.combinations(range(12), size)):
                        fewest = min(fewest, size)
                        break
        assert found == fewest
    assert result.success.all()


def test_starts_beat_the_first_linearisation() -> None:
    """A class that looks far at the image and is near: a bowl around a corner, beside a plane."""

    class Bowl(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            near = 4 - 40 * (x - 0.7).flatten(1).square().sum(1)  # zero gradient nowhere, reached at its middle
            return torch.stack([torch.ones(len(x)), near, 3 * (x.flatten(1)[:, 0] - 0.4) - 0.2], 1)

    x = torch.full((1, 1, 2, 2), 0.4)
    labels = torch.zeros(1, dtype=torch.int64)
    grid = torch.linspace(0, 1, 31)
    points = torch.cartesian_prod(*[grid] * 4).view(-1, 1, 2, 2)
    fooled = points[Bowl()(points).argmax(1) != 0]
    nearest = float((fooled - x).flatten(1).norm(dim=1).min())
    result = minimum_norm(Bowl(), x, labels)
    assert result.success.all() and float(result.distance) <= nearest + 1e-3


@everything
def test_support_target_and_bounds(name) -> None:
    model, x, y = problem()
    support = torch.zeros(6, 5)
    support[:, :4] = 1
    result = ATTACKS[name](model, x, y, target="next", support=support)
    changed = result.adversarial != x
    assert not changed[..., 4:].any()
    assert (model(result.adversarial).argmax(1) == (y + 1) % 3)[result.success].all()
    assert result.adversarial.min() >= 0 and result.adversarial.max() <= 1


@everything
def test_eight_bit_is_verified_rounded(name) -> None:
    model, x, y = problem()
    x = (255 * x).round() / 255
    y = model(x).argmax(1)
    result = ATTACKS[name](model, x, y, eight_bit=True)
    assert torch.allclose(255 * result.adversarial, (255 * result.adversarial).round(), atol=1e-3)
    assert (model(result.adversarial).argmax(1) != y)[result.success].all() and result.success.any()


@everything
@pytest.mark.parametrize("shape", [(1, 4, 7), (4, 5, 3)])
@pytest.mark.parametrize("count", [0, 1])
def test_shapes(name, shape, count) -> None:
    model, x, y = problem(shape, 1)
    result = ATTACKS[name](model, x[:count], y[:count])
    assert result.adversarial.shape == (count, *shape)


@everything
def test_misclassified_is_at_distance_zero(name) -> None:
    model, x, y = problem()
    result = ATTACKS[name](model, x, (y + 1) % 3)
    assert result.success.all() and (result.distance == 0).all()


@everything
def test_constant_model(name) -> None:
    model, x, y = problem()
    model.weight.zero_()
    model.bias = torch.tensor([1.0, 0, 0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = ATTACKS[name](model, x, torch.zeros_like(y))
    assert any(w.category is ZeroGradientWarning for w in caught)
    assert not result.success.any() and result.distance.isnan().all() and torch.equal(result.adversarial, x)


@pytest.mark.parametrize("norm", [2, math.inf])
def test_carlini_wagner_as_in_the_paper_searches_all_c(norm) -> None:
    model, x, y = problem()
    options = {"norm": norm, "warm_start": 0, "initial_c": 1e-2, "steps": 60, "search_steps": 9, "learning_rate": 0.01}
    result = carlini_wagner(model, x, y, **options)
    truth = exact(model, x, y, norm)
    assert result.success.all() and result.distance.mean() <= 1.1 * truth.mean()
    assert (result.distance >= truth - 1e-4).all()


@pytest.mark.parametrize("norm", [0, 2, math.inf])
def test_kappa(norm) -> None:
    model, x, y = problem()
    result = carlini_wagner(model, x, y, norm=norm, kappa=0.5)
    z = model(result.adversarial)
    lead = z.scatter(1, y[:, None], -math.inf).amax(1) - z.gather(1, y[:, None])[:, 0]
    assert result.success.any() and (lead >= 0.5 - 1e-4)[result.success].all()


def test_cases_are_ordered() -> None:
    model, x, y = problem()
    table = targeted_cases(model, x, y, deepfool, classes=3).to_frame()
    assert table.distance["best"] <= table.distance["average"] <= table.distance["worst"]


def kept_network(name: str) -> nn.Module:
    """A network of the attacks' benchmark, which none of the attacks' defaults were chosen on."""
    path = Path(__file__).parent.parent / "nbs" / "benchmarks" / "networks.py"
    spec = importlib.util.spec_from_file_location("benchmark_networks", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(name)


@pytest.mark.parametrize("name", ["tanh", "residual"])
@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_more_steps_never_hurt(name, norm) -> None:
    """But for a last step's worth: 2.4 % of one digit in L1, .2 % else; one target of eight may be missed on tanh."""
    slack = 0.03 if norm == 1 else 2e-3
    network, digits = kept_network(name), load_digits("development")[range(0, 4000, 500)]
    labels = network(digits.images).argmax(1)
    for target in (None, "next"):
        far = torch.full((len(labels),), math.inf)
        for steps in (100, 150, 200, 300):
            result = minimum_norm(network, digits.images, labels, norm=norm, steps=steps, target=target)
            assert (result.backward <= steps).all()
            now = result.distance.nan_to_num(nan=math.inf)
            assert (now <= far * (1 + slack)).all()  # the last bisection is not a step of the longer search
            far = torch.minimum(far, now)
        assert far.isfinite().sum() >= len(far) - (target is not None and name == "tanh")


@pytest.mark.parametrize("name", ["relu6", "residual", "transformer"])
def test_thirty_steps_find_something_in_linf(name) -> None:
    """Where nothing was found, the last few steps are long: short ones left 12 of 20 digits on ReLU6."""
    network, digits = kept_network(name), load_digits("development")[range(0, 4000, 200)]
    result = minimum_norm(network, digits.images, network(digits.images).argmax(1), norm=math.inf, steps=30)
    assert result.success.sum() >= 19 and (result.backward <= 30).all()


def test_the_walk_returns_to_its_best() -> None:
    """A boundary bent so strongly that full linearised steps leave it."""

    class Ring(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            away = (x - 0.5).flatten(1)
            wave = 0.3 * torch.sin(25 * away[:, 0]) + away[:, 1]
            return torch.stack([torch.full_like(wave, 0.2), wave], 1)

    x = torch.full((1, 1, 2, 2), 0.5)
    x[0, 0, 1] = 0.0
    lines = torch.linspace(0, 1, 2001)
    away = torch.stack([lines, 0.7 - 0.3 * torch.sin(25 * (lines - 0.5))], 1) - 0.5
    nearest = float(away[(away.abs() <= 0.5).all(1)].norm(dim=1).min())
    result = minimum_norm(Ring(), x, torch.zeros(1, dtype=torch.int64), steps=200)
    assert result.success.all() and float(result.distance) <= 1.002 * nearest
