"""What once was counted as robustness and was none: each fault with its right value, for every attack of `ATTACKS`."""

import inspect
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from cvi_nb import attack
from cvi_nb.attack import ATTACKS, ZeroGradientWarning
from cvi_nb.models import Classifier

NAMES = list(ATTACKS)
FREE = [name for name, found in ATTACKS.items() if not found.ball]
SMALL = {"square": {"steps": 300}, "fgsm": {}, "targeted_gradient_sign": {}, "jsma": {}, "minimum_norm": {"steps": 60}}
SMALL |= {"carlini_wagner": {"steps": 30, "warm_start": 60}, "bim": {"step_size": 0.05, "steps": 12}}


def linear(classes: int, shape: tuple[int, int, int] = (1, 6, 5), count: int = 40, seed: int = 0):
    """A linear network, images in the middle of the box, and their classes."""
    weight = torch.randn(classes, math.prod(shape), generator=torch.Generator().manual_seed(seed))
    x = 0.3 + 0.4 * torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))
    return (lambda images: images.flatten(1) @ weight.T.to(images.dtype)), x, (x.flatten(1) @ weight.T).argmax(1)


def ask(name: str, model, x: Tensor, y: Tensor, **options):
    radius = {"eps": 0.4} if ATTACKS[name].ball else {}
    steps = {} if name in SMALL else {"steps": 40}
    aim = {"target": (y + 1) % 3} if ATTACKS[name].target is not None else {}  # a class that can be reached
    return ATTACKS[name](model, x, y, **(SMALL.get(name, {}) | steps | radius | aim | options))


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("name", FREE)
def test_every_image_of_a_linear_network_has_a_boundary_in_reach(name, classes) -> None:
    model, x, y = linear(classes, (3, 4, 4))
    result = ask(name, model, x, y)
    least = 40 if name != "jsma" else 20  # pairs that help a class and harm all others together need not exist
    assert int(result.success.sum()) >= least


@pytest.mark.parametrize("norm", [0, 1, 2, math.inf])
def test_fmn_succeeds_in_every_norm_where_pixels_stand_at_the_bounds(norm) -> None:
    model, x, y = linear(3, (1, 8, 8))
    x = (x - 0.5).mul(8).add(0.5).clamp(0, 1)
    y = model(x).argmax(1)
    assert attack.fmn(model, x, y, norm=norm, steps=60).success.all()


@pytest.mark.parametrize("low", [-math.inf, -1e9])
@pytest.mark.parametrize("name", NAMES)
def test_a_masked_class_is_no_robustness(name, low) -> None:
    bare, x, y = linear(4, count=12)
    keep = torch.tensor([True, True, True, False])
    masked = lambda images: bare(images).masked_fill(~keep, low)  # noqa: E731
    y = masked(x).argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ZeroGradientWarning)
        result = ask(name, masked, x, y)
    without = ask(name, lambda images: bare(images)[:, :3], x, y)
    assert result.success.sum() >= without.success.sum() > 0
    if result.target is not None:
        assert (result.target != 3).all()
    if low == -math.inf:
        assert (ask(name, masked, x, y, target="least_likely").target != 3).all()


@pytest.mark.parametrize("scale", [1e-12, 1e9])
@pytest.mark.parametrize("name", ["deepfool", "ddn", "fmn", "minimum_norm", "carlini_wagner", "jsma"])
def test_the_unit_of_logits_is_free(name, scale) -> None:
    model, x, y = linear(3, count=10)
    usual, scaled = ask(name, model, x, y), ask(name, lambda images: scale * model(images), x, y)
    if name == "ddn" and scale > 1:  # follows cross-entropy, whose gradient is zero for a certain network
        return
    assert torch.equal(usual.success, scaled.success)
    assert float(scaled.distance.nanmean()) <= 1.05 * float(usual.distance.nanmean())


BAD = {
    "steps": [0, -1, False, 2.5, "3"],
    "search_steps": [0, True],
    "gamma": [math.nan, 0, 1.5, -0.1],
    "initial": [math.nan, -1.0, math.inf],
    "kappa": [math.inf, math.nan, -1],
    "overshoot": [math.nan, -0.1],
    "sigma": [0, math.nan],
    "threshold": [math.nan, 2],
    "learning_rate": [0, math.nan, math.inf],
    "initial_c": [0, math.nan],
    "warm_start": [-1, 1.5, True],
    "starts": [0, True],
    "rivals": [0, -2],
    "shortlist": [0],
    "max_pixels": [0, -4],
    "step_size": [0, math.nan],
    "decay": [-1, math.nan],
    "rho": [0, math.nan],
    "share": [0, 1.5, math.nan],
    "targets": [0],
    "restarts": [0, 1.5],
    "early_stop": [1, None],
    "random_start": ["no"],
    "loss": ["cross"],
    "norm": [3, "l3", None],
    "eps": [-0.1, math.nan, math.inf, True],
    "batch_size": [0, 2.5, True],
    "seed": [-1, 0.5],
    "progress": [1],
    "trace": ["yes"],
    "eight_bit": [1],
    "compact": [0],
}
CASES = [
    (name, option, value)
    for name, found in ATTACKS.items()
    for option, values in BAD.items()
    for value in values
    if option in inspect.signature(found.function).parameters
    or option in ("batch_size", "seed", "progress", "trace", "eight_bit", "compact")
    or (option == "early_stop" and name in ("bim", "iterative_least_likely", "pgd", "mi_fgsm", "apgd", "apgd_targeted"))
    or (option == "restarts" and name in ("pgd", "apgd", "apgd_targeted"))
]


@pytest.mark.parametrize(("name", "option", "value"), CASES)
def test_bad_numbers_are_refused_by_name(name, option, value) -> None:
    model, x, y = linear(3, count=2)
    with pytest.raises((TypeError, ValueError), match=f"`{option}` must be"):
        ATTACKS[name](model, x, y, **({"eps": 0.1} if ATTACKS[name].ball else {}) | {option: value})


@pytest.mark.parametrize("name", NAMES)
def test_unknown_options_are_named(name) -> None:
    model, x, y = linear(3, count=2)
    with pytest.raises(TypeError, match="batchsize"):
        ATTACKS[name](model, x, y, **({"eps": 0.1} if ATTACKS[name].ball else {}), batchsize=3)


@pytest.mark.parametrize("few", range(1, 9))
def test_small_budgets_are_spent(few) -> None:
    model, x, y = linear(10, count=4)
    for norm in (0, 2, math.inf):
        found = attack.minimum_norm(model, x, y, norm=norm, steps=few)
        assert (found.backward <= few).all() and found.adversarial.isfinite().all()
        assert attack.carlini_wagner(model, x, y, norm=norm, warm_start=few, steps=30).success.all()


@pytest.mark.parametrize("name", NAMES)
def test_a_callers_tensors_stay_as_they_are(name) -> None:
    model, x, y = linear(3, count=4)
    given = {"images": x, "labels": y, "support": torch.ones(6, 5), "target": (y + 1) % 3}
    numbers = {
        option: torch.tensor(p.default)
        for option, p in inspect.signature(ATTACKS[name].function).parameters.items()
        if isinstance(p.default, float) and math.isfinite(p.default) and option != "norm"
    }
    before = {key: value.clone() for key, value in (given | numbers).items()}
    result = ask(name, model, **{"x": given.pop("images"), "y": given.pop("labels")}, **given, **numbers)
    for key, value in ({"images": x, "labels": y} | given | numbers).items():
        assert torch.equal(value, before[key]) and not value.requires_grad, key
    result.adversarial.zero_()
    assert torch.equal(x, before["images"])


@pytest.mark.parametrize("name", [n for n in NAMES if ATTACKS[n].ball] + ["ensemble"])
def test_no_room_leaves_the_clean_predictions(name) -> None:
    model, x, y = linear(3, count=8)
    wrong = y.clone()
    wrong[:3] = (wrong[:3] + 1) % 3
    found = ATTACKS[name].function if name in ATTACKS else attack.ensemble
    options = {} if name == "ensemble" or ATTACKS[name].target is None else {"target": (wrong + 1) % 3}
    result = found(model, x, wrong, eps=0, **options)
    clean = model(x).argmax(1)
    assert torch.equal(result.success, clean != wrong if result.target is None else clean == result.target)
    assert torch.equal(result.adversarial, x) and torch.equal(result.predicted, clean)


@pytest.mark.parametrize("name", [*NAMES, "ensemble"])
def test_one_output_is_refused_with_the_remedy(name) -> None:
    model, x, y = linear(3, count=4)
    found = getattr(attack, name)
    options = {"eps": 0.1} if name == "ensemble" or ATTACKS[name].ball else {}
    with pytest.raises(ValueError, match=r"torch.cat\(\[-z, z\], 1\)"):
        found(lambda images: model(images)[:, :1], x, torch.zeros_like(y), **options)
    wrapped = lambda images: torch.cat([-model(images)[:, :1], model(images)[:, :1]], 1)  # noqa: E731
    assert len(found(wrapped, x, wrapped(x).argmax(1), **options | ({"target": "next"}))) == 4


class Rounding(nn.Module):
    """A linear network behind a scanner: its gradient is zero everywhere."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((8 * x).round() / 8)


class Dividing(Rounding):
    """A linear network whose gradient has NaN in one pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0 * (x[:, :1, :1, :1] * 0).abs().sqrt().flatten(1)


@pytest.mark.parametrize("network", [Rounding, Dividing])
@pytest.mark.parametrize("name", [n for n in NAMES if ATTACKS[n].gradient])
def test_gradients_that_vanish_or_are_not_finite_are_said(name, network) -> None:
    model, x, y = linear(3, count=4)
    model = network(model)
    y = model(x).argmax(1)
    with pytest.warns(ZeroGradientWarning, match="zero or not finite|not finite"):
        result = ask(name, model, x, y)
    assert result.adversarial.isfinite().all() and result.attempt.isfinite().all()


def test_nan_logits_are_no_class() -> None:
    model, x, y = linear(3, count=4)
    breaks = lambda images: torch.where((images - x[: len(images)]).abs().amax((1, 2, 3), keepdim=True)[:, 0, 0] > 0.1,  # noqa: E731
                                        torch.nan, model(images))  # fmt: skip
    result = attack.fgsm(breaks, x, y, eps=0.3)
    assert not result.success.any() and torch.equal(result.adversarial, x)
    with pytest.raises(ValueError, match="`model` must give finite logits, got NaN"):
        attack.fgsm(lambda images: model(images) * torch.nan, x, y, eps=0.3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(name, dtype) -> None:
    model, x, y = linear(3, count=4)
    x = x.to(dtype)
    y = model(x.float()).argmax(1)
    result = ask(name, model, x, y)
    assert result.images.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.success.any() or name == "jsma"


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_in_half_precision(name, dtype) -> None:
    """Their logits move by a thousandth: what succeeds must lead by more than that."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(30, 3)).to(dtype).requires_grad_(False)
    x = linear(3, count=6)[1]
    y = Classifier(network).predict(x)
    for images in (x, x.to(dtype), x.double()):
        result = ask(name, network, images, y)
        assert result.success.float().mean() >= (1 if name != "jsma" else 0.5)
        assert torch.equal(Classifier(network).predict(result.adversarial) != y, result.success)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", NAMES)
def test_callers_without_gradients(name, guard) -> None:
    model, x, y = linear(3, count=6)
    expected = ask(name, model, x, y)
    with guard():
        found = ask(name, model, x + 0, y + 0)
    assert torch.equal(found.adversarial, expected.adversarial) and torch.equal(found.success, expected.success)


def test_registered_attacks_say_what_they_need() -> None:
    for name, found in ATTACKS.items():
        parameters = inspect.signature(found.function).parameters
        assert found.ball == ("eps" in parameters), name
        assert ("norm" in parameters) == (len(found.norms) > 1), name
        assert "norm" not in parameters or parameters["norm"].default == found.norms[0], name
        model, x, y = linear(3, count=3)
        radius = {"eps": 0.3} if found.ball else {}
        for norm in found.norms if len(found.norms) > 1 else ():
            assert found(model, x, y, norm=norm, **radius).norm == norm
        assert (found(model, x, y, **radius).target is None) == (found.target is None)


def test_old_names_still_work_with_a_warning() -> None:
    model, x, y = linear(3, count=3)
    with pytest.warns(DeprecationWarning, match="`momentum` is now `mi_fgsm`"):
        assert attack.momentum(model, x, y, eps=0.2).name == "mi_fgsm"
    steps = [(name, "alpha", "step_size") for name in ("pgd", "bim", "mi_fgsm", "iterative_least_likely")]
    for name, old, new in [*steps, ("sigma_zero", "step_size", "learning_rate")]:
        with pytest.warns(DeprecationWarning, match=f"`{old}` is now `{new}`"):
            found = ATTACKS[name](model, x, y, **({"eps": 0.2} if ATTACKS[name].ball else {}), **{old: 0.07})
        assert found.settings[new] == 0.07


def test_no_module_has_the_name_of_a_public_function() -> None:
    modules = {name for name, value in vars(attack).items() if inspect.ismodule(value)}
    assert modules and not modules & set(attack.__all__)
    assert set(ATTACKS) < set(attack.__all__)
