"""Judging models: curves against closed forms, checks on networks that hide their gradients and on honest ones."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cvi_nb.attack import fgsm, minimum_norm, pgd
from cvi_nb.data import load_digits
from cvi_nb.defence import load_defended
from cvi_nb.models import Classifier
from cvi_nb.robustness import (
    CHECKS,
    Check,
    Probe,
    RobustnessResult,
    Threat,
    accuracy_curve,
    evaluate_robustness,
    mean_interval,
    transfer_matrix,
    trust_checks,
)
from cvi_nb.robustness import checks as checks_module
from cvi_nb.robustness import evaluate as evaluate_module

torch.set_num_threads(1)
DIGITS = load_digits("development")[range(5, 4000, 200)]
IMAGES, LABELS = DIGITS.images, DIGITS.labels  # 20 digits
SMALL = Threat.quick(
    IMAGES, linf=(0.1, 0.25), l2=(1.0,), steps=24, pgd_steps=8, apgd_steps=8, queries=40, targets=2, targeted_steps=20,
    noise_budget=20, samples=40, check_images=12,
)  # fmt: skip


@pytest.fixture(scope="module")
def networks() -> dict[str, Classifier]:
    """Trained on a quarter of the digits: seconds each."""
    return {name: load_defended(name, quick=True, progress=False) for name in ("plain", "fgsm", "pgd", "distilled")}


@pytest.fixture(scope="module")
def results(networks: dict[str, Classifier]) -> dict[str, RobustnessResult]:
    return {
        name: evaluate_robustness(networks[name], IMAGES, LABELS, SMALL, name=name, batch_size=20)
        for name in ("plain", "distilled")
    }


class Linear(nn.Module):
    """Two classes, one slope; images around grey never meet the box."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(scale * torch.linspace(-1, 1.3, 36))
        self.bias = 0.35 * scale

    def forward(self, x: Tensor) -> Tensor:
        z = (x - 0.5).flatten(1) @ self.weight + self.bias
        return torch.stack([z, torch.zeros_like(z)], 1)


GREY = 0.5 + 0.06 * torch.randn(24, 1, 6, 6, generator=torch.Generator().manual_seed(3))


# Curves


@pytest.mark.parametrize("as_given", [list, np.array, lambda v: torch.tensor(v, dtype=torch.float64), lambda v: v[0]])
def test_a_radius_is_what_it_is_written_as(as_given: Callable) -> None:
    """At 0.7 an image at distance 0.7 has fallen, whatever holds the radius."""
    frame = accuracy_curve([0.7, 0.7], as_given([0.7]))
    assert frame["eps"].item() == 0.7 and frame["accuracy"].item() == 0


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0, 5) | st.just(0.0) | st.just(math.inf), min_size=1, max_size=30),
    st.lists(st.floats(0, 6), min_size=1, max_size=10),
)
def test_the_curve_is_the_share_beyond_each_radius(distances: list[float], radii: list[float]) -> None:
    frame = accuracy_curve(torch.tensor(distances, dtype=torch.float64), torch.tensor(radii, dtype=torch.float64))
    assert frame["accuracy"].tolist() == [sum(d > e for d in distances) / len(distances) for e in radii]
    assert (frame["low"] <= frame["accuracy"]).all() and (frame["accuracy"] <= frame["high"]).all()
    steps = accuracy_curve(torch.tensor(distances, dtype=torch.float64))
    assert steps["accuracy"].is_monotonic_decreasing and steps["eps"].iloc[0] == 0
    assert steps["accuracy"].iloc[0] == sum(d > 0 for d in distances) / len(distances)


@pytest.mark.parametrize("distances", [[], [-0.1], [0.2, math.nan]], ids=["none", "negative", "nan"])
def test_the_curve_needs_distances(distances: list[float]) -> None:
    with pytest.raises(ValueError, match="`distances`"):
        accuracy_curve(torch.tensor(distances))


def test_mean_interval() -> None:
    values = torch.randn(200, generator=torch.Generator().manual_seed(0))
    mean, low, high = mean_interval(values)
    error = 1.96 * float(values.std()) / math.sqrt(200)
    assert mean == pytest.approx(float(values.mean()), abs=1e-6)
    assert low == pytest.approx(mean - error, abs=0.15 * error)
    assert high == pytest.approx(mean + error, abs=0.15 * error)
    assert all(math.isnan(v) for v in mean_interval(torch.zeros(0)))
    assert mean_interval(torch.tensor([2.0]))[0] == 2 and math.isnan(mean_interval(torch.tensor([2.0]))[1])


def test_a_linear_model_in_closed_form() -> None:
    model = Linear()
    margins = model(GREY).diff(dim=1)[:, 0].abs().detach().double()
    labels = model(GREY).argmax(1)
    labels[0] = 1 - labels[0]  # one that is wrong already
    threat = Threat(linf=(0.01, 0.02), l2=(0.05, 0.1), steps=20, targets=1, targeted_steps=30, samples=200, sigma=0.1)
    found = evaluate_robustness(model, GREY, labels, threat)
    weight = model.weight.detach().double()
    for key, dual in (("l2", 2), ("linf", 1)):
        exact = margins / weight.norm(dual)
        exact[0] = 0
        d = torch.tensor(found.examples[f"distance_{key}"].to_numpy())
        torch.testing.assert_close(d, exact, rtol=5e-3, atol=0)
        assert (d >= exact * (1 - 1e-5)).all()  # an attack cannot be nearer than the boundary
        aimed = torch.tensor(found.examples[f"best_{key}"].to_numpy())
        torch.testing.assert_close(aimed, exact, rtol=2e-2, atol=0)  # the only target is the only other class
        curve = found.curves[found.curves["norm"] == key]
        for slack, sign in ((1.005, 1), (1 - 1e-5, -1)):  # an image beyond its boundary by less than the search's error
            brute = [float((slack * exact > e).double().mean()) for e in curve["eps"]]
            assert (sign * (brute - curve["accuracy"]) >= -1e-7).all()
    # Smoothing leaves a linear classifier as it is, so the certificate must stay below the distance.
    certified = found.examples["certified_radius"].to_numpy()
    assert (certified <= found.examples["distance_l2"].to_numpy()).all() and (certified > 0).mean() > 0.5
    assert found.examples["gradient_norm"].to_numpy() == pytest.approx(float(weight.norm()), rel=1e-5)
    assert {c.name for c in found.warnings} <= {"survives 8 bits"}  # distances of a few grey levels


# The evaluation


def test_the_parts_agree(networks: dict[str, Classifier], results: dict[str, RobustnessResult]) -> None:
    for name, found in results.items():
        frame, n = found.to_frame(), len(found)
        top = networks[name].logits(IMAGES).argmax(1)
        assert frame["prediction"].tolist() == top.tolist()
        assert frame["correct"].tolist() == (top == LABELS).tolist()
        for norm, radii in SMALL.radii.items():
            key = "linf" if norm == math.inf else "l2"
            d = torch.tensor(frame[f"distance_{key}"].to_numpy())
            assert ((d == 0) == ~torch.tensor(frame["correct"].to_numpy())).all()
            moved = (found.adversarial[key] - IMAGES).flatten(1).norm(norm, dim=1).double()
            assert torch.allclose(moved[d.isfinite()], d[d.isfinite()], atol=1e-6)
            assert float(found.adversarial[key].min()) >= 0 and float(found.adversarial[key].max()) <= 1
            called = networks[name].logits(found.adversarial[key]).argmax(1)
            assert torch.equal(called, found.fooled_as[key]) and bool((called != LABELS)[d.isfinite()].all())
            curve = found.curves[found.curves["norm"] == key].set_index("eps")
            worst = found.attacks[(found.attacks["attack"] == "worst case") & (found.attacks["norm"] == key)]
            for eps in radii:
                robust = frame[f"robust_{key}_{eps:.4g}"]
                assert robust.tolist() == (d > eps).tolist()
                assert curve.loc[eps, "accuracy"] == pytest.approx(robust.mean())
                fallen = worst.set_index("eps").loc[eps, "success"] * frame["correct"].sum()
                assert round(fallen) == n - robust.sum() - (n - frame["correct"].sum())
                single = found.attacks[(found.attacks["norm"] == key) & (found.attacks["eps"] == eps)]
                single = single[single["n"] == frame["correct"].sum()]  # the cascade sees the rest only
                assert (single["success"] <= worst.set_index("eps").loc[eps, "success"] + 1e-12).all()
        assert (frame["best_l2"] <= frame["average_l2"] + 1e-9).all()
        assert (frame["average_l2"] <= frame["worst_l2"] + 1e-9).all()
        assert (frame["distance_l2"] <= frame["best_l2"] + 1e-9).all()
        assert found.evaluations.total == found.costs[["forward", "backward"]].to_numpy().sum()
        assert (frame["width"] > 0).all() and found.sensitivity is not None and found.sensitivity.shape == (n, 28, 28)


def test_every_evaluation_is_counted(networks: dict[str, Classifier]) -> None:
    model = networks["plain"]
    before = model.evaluations
    few = Threat.quick(IMAGES, linf=(0.2,), l2=(), steps=12, targets=0, noise_budget=0, samples=0, queries=10)
    found = evaluate_robustness(model, IMAGES[:4], LABELS[:4], few)
    spent = model.evaluations - before
    assert (found.evaluations.forward, found.evaluations.backward) == (spent.forward, spent.backward)
    frame = found.to_frame()  # what was left out says so
    assert frame["width"].isna().all() and frame["certified_radius"].isna().all() and frame["best_linf"].isna().all()
    assert found.sensitivity is None and "distance_l2" not in frame and set(found.curves["norm"]) == {"linf"}
    assert next(c for c in found.checks if c.name == "untargeted is nearest").status == "SKIP"
    assert found.least_robust(1) and found.plot() is not None


def test_the_batch_size_changes_nothing(networks: dict[str, Classifier]) -> None:
    threat = Threat.quick(
        IMAGES, linf=(0.15,), l2=(1.0,), steps=12, pgd_steps=4, apgd_steps=5, queries=10, targets=1, targeted_steps=12,
        samples=20, check_images=5,
    )  # fmt: skip
    frames = [
        evaluate_robustness(networks["plain"], IMAGES[:5], LABELS[:5], threat, batch_size=size).to_frame()
        for size in (2, 64)
    ]
    numbers = [frame.select_dtypes("number").to_numpy() for frame in frames]
    np.testing.assert_allclose(*numbers, rtol=2e-3, atol=1e-4)
    assert (frames[0]["prediction"] == frames[1]["prediction"]).all()


def test_fgsm_rows_are_foolbox_and_torchattacks(
    networks: dict[str, Classifier], results: dict[str, RobustnessResult]
) -> None:
    foolbox, torchattacks = pytest.importorskip("foolbox"), pytest.importorskip("torchattacks")
    model = networks["plain"].model
    right = torch.tensor(results["plain"].examples["correct"].to_numpy())
    rows = results["plain"].attacks
    rows = rows[rows["attack"] == "FGSM"].set_index("eps")["success"]
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    theirs = attack(wrapped, IMAGES[right], LABELS[right], epsilons=list(rows.index))[2]
    assert rows.tolist() == pytest.approx(theirs.float().mean(1).tolist())
    for eps, success in rows.items():
        made = torchattacks.FGSM(model, eps=eps)(IMAGES[right], LABELS[right])
        fooled = networks["plain"].logits(made).argmax(1) != LABELS[right]
        assert success == pytest.approx(float(fooled.float().mean()))


def test_corruptions_and_destruction(networks: dict[str, Classifier], results: dict[str, RobustnessResult]) -> None:
    found = results["plain"]
    clean = networks["plain"].accuracy(IMAGES, LABELS)
    assert found.corruptions.loc["none", "accuracy"] == pytest.approx(clean) == pytest.approx(found.accuracy)
    dark = networks["plain"].accuracy((0.5 + 0.7 * (IMAGES - 0.5)).clamp(0, 1), LABELS)
    assert found.corruptions.loc["contrast", "accuracy"] == pytest.approx(dark)
    assert found.destruction["rate"].between(0, 1).all() and (found.destruction["n"] > 0).all()


def test_views(results: dict[str, RobustnessResult]) -> None:
    found = results["distilled"]
    assert found.name in found._repr_html_() and "WARN" in found._repr_html_() and "<script" not in found._repr_html_()
    row = found.summary().loc["distilled"]
    assert row["accuracy"] == found.accuracy and row["warnings"] == len(found.warnings) > 0
    assert found.least_robust(3) == list(reversed(found.most_robust(len(found))))[:3]
    assert len(found.plot(3).axes) == 0 or found.plot(3) is not None
    assert found.checks_frame()["status"].isin(["PASS", "WARN", "SKIP"]).all()
    with pytest.raises(ValueError, match="`norm`"):
        found.plot_curves("l1")
    assert repr(found).startswith("RobustnessResult(distilled: 20 images")


# Checks


def judged(model: Callable[[Tensor], Tensor], eps: float = 0.2, **options: object) -> dict[str, Check]:
    kwargs: dict = {"steps": 12, "queries": 60, "search_steps": 24, "limit": 14} | options
    return {c.name: c for c in trust_checks(model, IMAGES, LABELS, eps=eps, batch_size=20, **kwargs)}


@pytest.mark.parametrize("name", ["plain", "fgsm", "pgd"])
@pytest.mark.parametrize("eps", [0.1, 0.3], ids=["small", "large"])
def test_honest_networks_pass(networks: dict[str, Classifier], name: str, eps: float) -> None:
    assert [c for c in judged(networks[name], eps).values() if c.status == "WARN"] == []


def test_evaluations_warn_of_the_distilled_alone(results: dict[str, RobustnessResult]) -> None:
    assert results["plain"].trustworthy, results["plain"].warnings
    assert not results["distilled"].trustworthy
    assert {"zero gradients", "cross-entropy holds"} <= {c.name for c in results["distilled"].warnings}


class Rounded(torch.autograd.Function):
    """Eight grey levels, and a backward pass that denies it."""

    @staticmethod
    def forward(context: object, x: Tensor) -> Tensor:
        return (7 * x).round() / 7

    @staticmethod
    def backward(context: object, slope: Tensor) -> Tensor:
        return slope


def squeezed(z: Tensor) -> Tensor:
    return 10 * torch.tanh(50 * (z - z.topk(2, 1).values.mean(1, keepdim=True)))


def of_a_file(x: Tensor) -> Tensor:
    """Whether images (B, C, H, W) have 8 bits: (B,) bool."""
    return ((255 * x).round() - 255 * x).abs().flatten(1).amax(1) < 1e-3


def on_the_grid_only(plain: Classifier, x: Tensor) -> Tensor:
    """A model whose softmax is saturated wherever an image is not one of a file."""
    return plain(x) * torch.where(of_a_file(x), 1.0, 1000.0)[:, None]


GENERATOR = torch.Generator().manual_seed(0)
HIDDEN: dict[str, tuple[Callable[[Classifier, Tensor], Tensor], set[str]]] = {
    "tanh": (lambda f, x: squeezed(f(x)), {"zero gradients", "truthful gradients", "a large ball empties"}),
    "cold softmax": (lambda f, x: 10 * (50 * f(x)).softmax(1), {"zero gradients"}),
    "steep logits": (lambda f, x: 100 * f(x), {"zero gradients", "cross-entropy holds"}),
    "softmax": (lambda f, x: f(x).softmax(1), {"logits, not probabilities"}),
    "rounding": (lambda f, x: f((7 * x).round() / 7), {"zero gradients", "white box wins", "a large ball empties"}),
    "straight through": (lambda f, x: f(Rounded.apply(x)), {"truthful gradients"}),
    "noise": (lambda f, x: f(x + 0.1 * torch.randn(x.shape, generator=GENERATOR)), {"deterministic"}),
    "batch": (lambda f, x: f((x - x.mean() + 0.13).clamp(0, 1)), {"independent of the batch"}),
    "off the grid": (on_the_grid_only, {"iterating helps"}),
    "range": (lambda f, x: f(x / 255 + 0.05 * (x > 2)), {"input range"}),
}


@pytest.mark.parametrize("kind", sorted(HIDDEN))
def test_what_hides_is_found(networks: dict[str, Classifier], kind: str) -> None:
    change, expected = HIDDEN[kind]
    found = judged(lambda x: change(networks["plain"], x), 0.25, limit=12)
    assert expected <= {c.name for c in found.values() if c.status == "WARN"}, kind
    assert all(math.isfinite(c.value) or c.status == "SKIP" or c.value == math.inf for c in found.values())


def test_dropout_left_on_in_a_function_is_found_and_in_a_module_does_no_harm() -> None:
    torch.manual_seed(0)
    body = load_defended("plain", quick=True, progress=False).model
    network = nn.Sequential(nn.Dropout(0.3), body).train()
    assert judged(lambda x: network(x))["deterministic"].status == "WARN"
    assert judged(network)["deterministic"].status == "PASS" and network.training


def test_distances_below_a_grey_level_do_not_survive_8_bits() -> None:
    model = Linear(100.0)
    small = 0.5 + 0.001 * torch.sign(model.weight.detach().view(1, 1, 6, 6)) * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    model.bias = 0.0
    found = {c.name: c for c in trust_checks(model, small, model(small).argmax(1), eps=0.01)}
    assert found["survives 8 bits"].status == "WARN" and found["answers vary"].status == "SKIP"


def test_a_weak_search_is_found(networks: dict[str, Classifier]) -> None:
    weak = fgsm(networks["plain"], IMAGES, LABELS, eps=0.4)
    assert judged(networks["plain"], found={math.inf: weak})["search ended"].status == "WARN"
    near, far = torch.tensor([1.0, 2.0, math.inf]), torch.tensor([0.8, 1.5, 1.0])
    for pair, status in (((near, far), "WARN"), ((far, near), "PASS")):
        probe = Probe(networks["plain"], IMAGES, LABELS, targeted={2.0: pair})
        assert CHECKS["untargeted_is_nearest"](probe).status == status


def test_transfer_unmasks(networks: dict[str, Classifier]) -> None:
    plain = networks["plain"]
    found = judged(lambda x: squeezed(plain(x)), surrogate=plain)
    assert found["transfer is weaker"].status == "WARN"
    assert judged(plain, surrogate=networks["fgsm"])["transfer is weaker"].status == "PASS"


# Transfer


@pytest.mark.filterwarnings("ignore::cvi_nb.attack.ZeroGradientWarning")  # the distilled network's
@pytest.mark.parametrize("attack", [fgsm, pgd], ids=["fgsm", "pgd"])
def test_transfer_matrix_is_the_loop(networks: dict[str, Classifier], attack: Callable) -> None:
    models = {name: networks[name] for name in ("plain", "distilled", "pgd")}
    options = {} if attack is fgsm else {"steps": 5, "early_stop": False}
    matrix = transfer_matrix(models, IMAGES, LABELS, 0.2, attack=attack, seed=4, **options)
    right = torch.stack([m.logits(IMAGES).argmax(1) == LABELS for m in models.values()])
    x, y = IMAGES[right.all(0)], LABELS[right.all(0)]
    assert matrix.n == len(x) and matrix.clean.tolist() == pytest.approx(right.double().mean(1).tolist())
    for i, source in enumerate(models.values()):
        moved = attack(source, x, y, eps=0.2, seed=4, **options).attempt
        for j, victim in enumerate(models.values()):
            assert float(matrix.accuracy[i, j]) == pytest.approx(victim.accuracy(moved, y))
            assert matrix.low[i, j] <= matrix.accuracy[i, j] <= matrix.high[i, j]
    assert list(matrix.to_frame().columns) == list(models) and matrix.plot() is not None


def test_transfer_matrix_says_what_is_wrong(networks: dict[str, Classifier]) -> None:
    plain = networks["plain"]
    with pytest.raises(TypeError, match="`models`"):
        transfer_matrix({"one": plain}, IMAGES, LABELS, 0.1)
    with pytest.raises(ValueError, match="same classes"):
        transfer_matrix({"a": plain, "b": lambda x: plain(x)[:, :5]}, IMAGES, LABELS, 0.1)
    with pytest.raises(ValueError, match="none is classified correctly"):
        transfer_matrix({"a": plain, "b": lambda x: plain(x).roll(1, 1)}, IMAGES, LABELS, 0.1)
    with pytest.raises(ValueError, match="`eps`"):
        transfer_matrix({"a": plain, "b": plain}, IMAGES, LABELS, -1.0)


# Bad input


def test_what_is_wrong_is_said(networks: dict[str, Classifier]) -> None:
    plain = networks["plain"]
    run = lambda model=plain, images=IMAGES[:3], labels=LABELS[:3], **kw: evaluate_robustness(  # noqa: E731
        model, images, labels, kw.pop("threat", SMALL), **kw
    )
    expects_bytes = lambda x: plain(x / 255)  # noqa: E731
    lost = expects_bytes(IMAGES).argmax(1) != LABELS
    with pytest.raises(ValueError, match=r"none right.*\[0, 255\]"):
        evaluate_robustness(expects_bytes, IMAGES[lost], LABELS[lost], SMALL)
    with pytest.raises(ValueError, match="none right"):
        run(lambda x: plain(x).roll(1, 1))
    with pytest.raises(ValueError, match=r"at least 2 classes.*torch\.cat"):
        run(lambda x: plain(x)[:, :1], labels=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="`images`"):
        run(images=IMAGES[:0], labels=LABELS[:0])
    with pytest.raises(ValueError, match="`images`"):
        run(images=2 * IMAGES[:3])
    with pytest.raises(ValueError, match="`labels`"):
        run(labels=torch.tensor([0, 1, 10]))
    with pytest.raises(ValueError, match="`labels`"):
        run(labels=torch.tensor([0, -1, 1]))
    with pytest.raises(ValueError, match="`labels`"):
        run(labels=LABELS[:2])
    with pytest.raises(ValueError, match="finite logits"):
        run(lambda x: plain(x) * torch.nan)
    with pytest.raises(ValueError, match="finite logits"):  # only where an attack goes
        run(lambda x: plain(x).where(of_a_file(x)[:, None], torch.nan))
    with pytest.raises(ValueError, match="no gradient"):
        run(lambda x: plain(x).detach())
    with pytest.raises(ValueError, match="`threat`"):
        run(threat="strong")
    with pytest.raises(TypeError, match="`threat`"):
        run(threat=0.3)
    with pytest.raises(ValueError, match="`batch_size`"):
        run(batch_size=0)


@pytest.mark.parametrize(
    "wrong",
    [{"linf": (0.2, 0.1)}, {"l2": (-1.0,)}, {"linf": (), "l2": ()}, {"steps": 3}, {"targets": -1}, {"noise_budget": 7},
     {"sigma": 0.0}, {"queries": 0}, {"samples": -1}],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
def test_a_threat_is_checked(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Threat(**wrong)


@pytest.mark.parametrize("name", ["linf", "l2", "l1", "attacks"])
@pytest.mark.parametrize("wrong", [None, 0.3, "pgd", np.array(0.3), torch.tensor(0.3)], ids=repr)
def test_a_threat_takes_sequences(name: str, wrong: object) -> None:
    with pytest.raises(TypeError, match=f"`{name}` must be a sequence"):
        Threat(**{name: wrong})


def test_an_attack_that_would_never_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`attacks` must know a norm .* 'sigma_zero', which knows L0"):
        Threat(attacks=("pgd", "sigma_zero"))


def test_sets_of_classes_as_targets(networks: dict[str, Classifier]) -> None:
    few = Threat.quick(IMAGES, linf=(0.2,), l2=(), steps=12, noise_budget=0, samples=0, queries=10, check_images=4,
                       targets=[{3, 5}, 8], targeted_steps=30)  # fmt: skip
    assert few.targets == ((3, 5), (8,)) and Threat(targets={3, 5}).targets == ((3, 5),)
    found = evaluate_robustness(networks["plain"], IMAGES, LABELS, few)
    aimed, right = found.aimed["linf"], networks["plain"].predict(IMAGES) == LABELS
    asked = torch.stack([(LABELS != 3) & (LABELS != 5), LABELS != 8], 1)
    assert torch.equal(aimed[right].isnan(), ~asked[right]) and (aimed[right & asked.all(1)].isfinite()).any()
    table = found.distances.set_index("case")
    assert table.loc["best", "n"] == int((asked.any(1) & right).sum())
    assert table.loc["best", "mean"] <= table.loc["worst", "mean"]
    assert (found.nearest["linf"].distance <= aimed.nan_to_num(math.inf).amin(1) + 1e-6).all()
    with pytest.raises(ValueError, match="`targets`"):
        evaluate_robustness(networks["plain"], IMAGES, LABELS, dataclasses.replace(few, targets=({3, 10},)))


def test_one_class_of_labels_is_no_error(networks: dict[str, Classifier]) -> None:
    ones = load_digits("development")[range(400, 800, 100)]
    assert len(ones.labels.unique()) == 1
    few = Threat.quick(IMAGES, linf=(0.2,), l2=(), steps=12, targets=0, noise_budget=0, samples=0, queries=10)
    found = evaluate_robustness(networks["plain"], ones.images, ones.labels, few)
    assert next(c for c in found.checks if c.name == "answers vary").status == "SKIP"


def test_minimum_norm_is_where_the_curve_comes_from(networks: dict[str, Classifier]) -> None:
    """An attack at one radius fools no image that lies beyond it, and the curve is below what that attack leaves."""
    d = minimum_norm(networks["plain"], IMAGES, LABELS, norm=math.inf, steps=40).distance.nan_to_num(math.inf)
    for eps in (0.1, 0.2, 0.3):
        left = float((~pgd(networks["plain"], IMAGES, LABELS, eps=eps, steps=20).success).float().mean())
        assert accuracy_curve(d, torch.tensor([eps]))["accuracy"].item() <= left + 1.01 / len(IMAGES)


# Whoever calls, whatever comes


TINY = Threat.quick(
    IMAGES, linf=(0.2,), l2=(1.0,), steps=10, pgd_steps=4, apgd_steps=4, targets=1, targeted_steps=10, noise_budget=20,
    samples=20, queries=10, check_images=4,
)  # fmt: skip


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_gradients_are_on_whoever_calls(networks: dict[str, Classifier], mode: Callable[[], Any]) -> None:
    model, options = networks["plain"], {"eps": 0.1, "steps": 4, "queries": 5, "search_steps": 10, "limit": 4}
    expected = evaluate_robustness(model, IMAGES[:5], LABELS[:5], TINY).to_frame()
    checks = trust_checks(model, IMAGES[:5], LABELS[:5], **options)
    matrix = transfer_matrix({"a": model, "b": networks["fgsm"]}, IMAGES[:5], LABELS[:5], 0.1)
    with mode():
        images, labels = IMAGES[:5] * 1, LABELS[:5] * 1  # made there, as by a data loader
        found = evaluate_robustness(model, images, labels, TINY)
        assert found.to_frame().equals(expected) and not found.skipped
        assert trust_checks(model, images, labels, **options) == checks
        again = transfer_matrix({"a": model, "b": networks["fgsm"]}, images, labels, 0.1)
    assert torch.equal(again.accuracy, matrix.accuracy)


def test_a_radius_of_zero_is_the_clean_accuracy(networks: dict[str, Classifier]) -> None:
    labels = LABELS.clone()
    labels[0] = (labels[0] + 1) % 10
    threat = Threat.quick(IMAGES, linf=(0, 0.1), l2=(0.0,), steps=10, queries=5, targets=0, noise_budget=0, samples=0)
    found = evaluate_robustness(networks["plain"], IMAGES[:6], labels[:6], threat)
    for key in ("linf", "l2"):
        at = found.curves[(found.curves["norm"] == key) & (found.curves["eps"] == 0)]
        assert at["accuracy"].tolist() == [found.accuracy] == [found.examples[f"robust_{key}_0"].mean()]
    worst = found.attacks[found.attacks["attack"] == "worst case"].set_index(["norm", "eps"])["success"]
    assert worst["linf", 0.0] == worst["l2", 0.0] == 0
    assert (found.attacks[found.attacks["eps"] == 0]["attack"] == "worst case").all()  # nothing is run for it


@pytest.mark.parametrize(
    ("shape", "lost"), [((4, 6, 6), {"JPEG"}), ((1, 1, 40), {"print"})], ids=["4 channels", "1 x 40"]
)
def test_what_cannot_be_done_to_an_image_is_left_out(shape: tuple[int, ...], lost: set[str]) -> None:
    images = torch.rand(8, *shape, generator=torch.Generator().manual_seed(1))
    model = lambda x: torch.stack([x.flatten(1)[:, ::2].sum(1), x.flatten(1)[:, 1::2].sum(1)], 1)  # noqa: E731
    few = Threat.quick(images, linf=(0.1,), l2=(), steps=10, queries=5, targets=0, noise_budget=0, samples=0)
    found = evaluate_robustness(model, images, model(images).argmax(1), few)
    assert lost <= set(found.skipped) and found.corruptions.loc["none", "accuracy"] == 1
    assert found.corruptions.loc[sorted(lost), "accuracy"].isna().all() and found.corruptions.loc["noise", "n"] == 8
    assert all(name in found._repr_html_() for name in lost)


@pytest.mark.parametrize(
    ("what", "stage"),
    [("infer_noise", "noise posterior"), ("certify", "certificate"), ("destruction_rate", "corruptions"),
     ("ask_all", "checks")],
)  # fmt: skip
def test_what_comes_after_the_attacks_cannot_lose_them(
    networks: dict[str, Classifier], monkeypatch: pytest.MonkeyPatch, what: str, stage: str
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(evaluate_module, what, fail)
    with pytest.warns(RuntimeWarning, match=f"{stage} was left out"):
        found = evaluate_robustness(networks["plain"], IMAGES[:4], LABELS[:4], TINY)
    assert found.skipped == {stage: "RuntimeError: no memory"} and len(found.attacks) > 3
    assert np.isfinite(found.examples["distance_l2"]).any() and "no memory" in found._repr_html_()
    assert (stage == "checks") == ("checks" in [check.name for check in found.warnings])


def test_a_check_of_ones_own_is_asked_and_one_that_fails_warns(
    networks: dict[str, Classifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHECKS, "mine", lambda probe: Check.judge("mine", True, "yes", "yes", "Why not.", len(probe)))
    monkeypatch.setitem(CHECKS, "gives_logits", lambda probe: 1 / 0)
    found = judged(networks["plain"])
    assert found["mine"].status == "PASS" and found["gives logits"].status == "WARN"
    assert "ZeroDivisionError" in found["gives logits"].measured and len(found) == 20


def test_networks_of_one_output_are_told_the_remedy(networks: dict[str, Classifier]) -> None:
    one = lambda x: networks["plain"](x)[:, :1]  # noqa: E731
    labels = torch.zeros(len(IMAGES), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"torch\.cat"):
        trust_checks(one, IMAGES, labels, eps=0.1)
    with pytest.raises(ValueError, match=r"torch\.cat"):
        transfer_matrix({"a": one, "b": one}, IMAGES, labels, 0.1)


@pytest.mark.parametrize("name", ["plain", "distilled"])
def test_no_curve_lies_above_a_distance_that_was_found(
    networks: dict[str, Classifier], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever attack found it, in whatever stage, the checks included."""
    found: list[Any] = []

    def recorded(attack: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(attack)
        def run(model: Any, *arguments: Any, **options: Any) -> Any:
            found.append(attack(model, *arguments, **options))
            return found[-1]

        return run

    for module in (evaluate_module, checks_module):
        for attack in ("fgsm", "pgd", "apgd", "apgd_targeted", "square", "minimum_norm", "ensemble"):
            if hasattr(module, attack):
                monkeypatch.setattr(module, attack, recorded(getattr(module, attack)))
    result = evaluate_robustness(networks[name], IMAGES, LABELS, SMALL)
    assert len(found) > 15
    for one in found:
        for i in one.success.nonzero()[:, 0].tolist():
            (row,) = (IMAGES == one.images[i]).flatten(1).all(1).nonzero()[:, 0].tolist()
            for norm, key in ((math.inf, "linf"), (2, "l2")):
                length = float((one.adversarial[i] - one.images[i]).flatten().norm(norm))
                assert result.examples[f"distance_{key}"][row] <= length + 1e-6, (one.name, key)
    for key in ("linf", "l2"):
        curve = result.curves[result.curves["norm"] == key]
        d = result.examples[f"distance_{key}"].to_numpy()
        assert curve["accuracy"].tolist() == [float((d > e).mean()) for e in curve["eps"]]


def test_without_labels_the_decisions_are_attacked(networks: dict[str, Classifier]) -> None:
    network = networks["plain"]
    few = Threat.quick(IMAGES, linf=(0.1,), l2=(), steps=10, targets=0, samples=0, queries=5)
    own = network.logits(IMAGES[:6]).argmax(1)
    wrong = torch.where(torch.arange(6) < 2, (own + 1) % 10, own)
    free, told = (evaluate_robustness(network, IMAGES[:6], given, few) for given in (None, own))
    assert free.accuracy == 1 and torch.equal(free.labels, own) and evaluate_robustness(
        network, IMAGES[:6], wrong, few
    ).accuracy == pytest.approx(4 / 6)
    assert free.examples["distance_linf"].tolist() == told.examples["distance_linf"].tolist()
    assert free.costs["forward"].sum() == told.costs["forward"].sum() + 6  # what asking costs is counted


def test_options_are_named() -> None:
    model = Linear()
    labels = model(GREY).argmax(1)
    with pytest.raises(TypeError, match=r"`epss` must be an option of trust_checks.*`eps`"):
        trust_checks(model, GREY, labels, epss=0.1)
    for wrong in ({"eps": 0}, {"norm": 1}, {"steps": 0}, {"seed": -1}, {"batch_size": 0}, {"limit": math.nan}):
        with pytest.raises((TypeError, ValueError), match=f"`{next(iter(wrong))}` must be"):
            trust_checks(model, GREY, labels, **wrong)
        if next(iter(wrong)) in ("seed", "batch_size"):
            with pytest.raises((TypeError, ValueError), match=f"`{next(iter(wrong))}` must be"):
                evaluate_robustness(model, GREY, labels, TINY, **wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_images_and_networks_of_any_precision(networks: dict[str, Classifier], dtype: torch.dtype) -> None:
    few = Threat.quick(IMAGES, linf=(0.1,), l2=(), steps=20, queries=5, targets=0, noise_budget=0, samples=0)
    expected = evaluate_robustness(networks["plain"], IMAGES[:3], LABELS[:3], few).examples["distance_linf"]
    network = copy.deepcopy(networks["plain"].model).to(dtype)
    for model, images in ((networks["plain"], IMAGES[:3].to(dtype)), (network, IMAGES[:3])):
        found = evaluate_robustness(model, images, LABELS[:3], few)
        assert np.allclose(found.examples["distance_linf"], expected, atol=0.01)
        matrix = transfer_matrix({"a": model, "b": model}, images, LABELS[:3], 0.1)
        assert matrix.accuracy.unique().numel() == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
def test_labels_of_any_integer_type(networks: dict[str, Classifier], dtype: torch.dtype) -> None:
    frames = [
        evaluate_robustness(networks["plain"], IMAGES[:3], labels, TINY).to_frame()
        for labels in (LABELS[:3], LABELS[:3].to(dtype), LABELS[:3].numpy())
    ]
    assert frames[0].equals(frames[1]) and frames[0].equals(frames[2])


def test_l1_is_a_norm_of_the_threat(networks: dict[str, Classifier]) -> None:
    threat = Threat.quick(
        IMAGES,
        linf=(0.1,),
        l2=(),
        l1=(4.0, 12.0),
        steps=10,
        queries=5,
        targets=1,
        targeted_steps=10,
        noise_budget=0,
        samples=0,
    )
    found = evaluate_robustness(networks["plain"], IMAGES[:6], LABELS[:6], threat)
    far = found.examples["distance_l1"].to_numpy()
    right = found.examples["correct"].to_numpy()
    lengths = (found.adversarial["l1"] - IMAGES[:6]).flatten(1).norm(1, dim=1).numpy()
    assert (abs(lengths - far)[right & (far < math.inf)] < 1e-4).all() and (far[right] > 0).all()
    curve = found.curves[found.curves["norm"] == "l1"]
    for eps in (4.0, 12.0):
        told = float(curve.loc[(curve["eps"] - eps).abs() < 1e-9, "accuracy"].iloc[0])
        assert told == pytest.approx((right & (far > eps)).mean())
    assert {"PGD", "worst case"} <= set(found.attacks.loc[found.attacks["norm"] == "l1", "attack"])
    for key, d in found.aimed.items():  # a report's curve never lies above any distance found
        assert (found.nearest[key].distance <= d.amin(1) + 1e-9).all()
