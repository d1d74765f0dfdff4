"""Attacks in a ball: equal to the peers where they should be, and what they promise on their own."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch

from cvi_nb.attack import (
    Nearby,
    Run,
    ZeroGradientWarning,
    apgd,
    apgd_targeted,
    bim,
    ensemble,
    fgsm,
    iterative_least_likely,
    mi_fgsm,
    minimum_norm,
    norms,
    pgd,
    project,
    square,
    standard_attacks,
    steepest,
    targeted_gradient_sign,
)
from cvi_nb.attack.auto_pgd import checkpoints
from cvi_nb.attack.basic_iterative import kurakin_steps
from cvi_nb.data import load_digits
from cvi_nb.models import Classifier, load_classifier


@pytest.fixture(scope="module")
def model():
    return load_classifier("mnist_cnn")


@pytest.fixture(scope="module")
def digits(model):
    found = load_digits("report")[range(0, 1000, 25)]
    right = model.logits(found.images).argmax(1) == found.labels
    return found.images[right], found.labels[right]


@pytest.mark.parametrize("eps", [0.1, 0.25])
def test_fgsm_and_bim_equal_torchattacks(model, digits, eps):
    torchattacks = pytest.importorskip("torchattacks")
    # It averages the loss: in float32 the sign of the smallest gradients hangs on the order of sums.
    model, images, labels = Classifier(copy.deepcopy(model.model).double().eval()), digits[0].double(), digits[1]
    theirs = torchattacks.FGSM(model.model, eps=eps)(images, labels)
    assert (fgsm(model, images, labels, eps=eps, batch_size=64).attempt - theirs).abs().max() < 1e-6
    theirs = torchattacks.BIM(model.model, eps=eps, alpha=0.02, steps=10)(images, labels)
    ours = bim(model, images, labels, eps=eps, step_size=0.02, steps=10, early_stop=False, batch_size=64)
    assert (ours.attempt - theirs).abs().max() < 1e-6


@pytest.mark.parametrize("eps", [0.1, 0.25])
def test_fgsm_and_bim_equal_foolbox(model, digits, eps):
    foolbox = pytest.importorskip("foolbox")
    images, labels = digits
    wrapped = foolbox.PyTorchModel(model.model.eval(), bounds=(0, 1), device="cpu")
    raw, _, _ = foolbox.attacks.FGSM(random_start=False)(wrapped, images, labels, epsilons=eps)
    ours = fgsm(model, images, labels, eps=eps, batch_size=64)  # all in one batch, as theirs
    assert (ours.attempt - raw).abs().max() < 1e-6
    attack = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=0.02, steps=10, random_start=False)
    _, theirs, _ = attack(wrapped, images, labels, epsilons=eps)
    ours = bim(model, images, labels, eps=eps, step_size=0.02, steps=10, early_stop=False, batch_size=64)
    assert (ours.attempt - theirs).abs().max() < 1e-6


def test_kurakin_steps_and_checkpoints():
    assert [kurakin_steps(k / 255) for k in (0.1, 1, 4, 16, 64)] == [1, 1, 5, 20, 68]
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1) == [1]


def test_confine_is_the_nearest_point_of_ball_and_cube(model, digits):
    images, labels = digits
    run = Run(model, images, labels, norm=2)
    rows = torch.arange(len(images))
    wish = images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    near = run.confine(wish, rows, 1.5)
    assert near.min() >= 0 and near.max() <= 1 and (norms(near - images, 2) <= 1.5 + 1e-5).all()
    # Dykstra's alternating projections end at the nearest point.
    x, p, q = wish - images, torch.zeros_like(wish), torch.zeros_like(wish)
    for _ in range(200):
        y = project(x + p, 1.5, 2)
        p = x + p - y
        x = (images + y + q).clamp(0, 1) - images
        q = y + q - x
    assert (near - images - x).abs().max() < 1e-3


def test_projections_against_closed_forms():
    delta = torch.randn(5, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    flat = delta.flatten(1)
    assert torch.equal(project(delta, 0.3, math.inf), delta.clamp(-0.3, 0.3))
    length = flat.norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(project(delta, 1.5, 2), delta * (1.5 / length).clamp_max(1))
    found = project(delta, 2.0, 1)
    for one, row in zip(found, flat, strict=True):  # soft thresholding, its threshold by bisection
        low, high = 0.0, float(row.abs().max())
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if float((row.abs() - middle).clamp_min(0).sum()) > 2 else (low, middle)
        expected = row.sign() * (row.abs() - low).clamp_min(0)
        torch.testing.assert_close(one.flatten(), expected, rtol=0, atol=1e-5)
    sizes = delta.square().sum(1).flatten(1)
    kept = (project(delta, 3, 0) != 0).any(1).flatten(1)
    assert (kept.sum(1) == 3).all()
    assert (sizes.masked_fill(~kept, math.inf).amin(1) >= sizes.masked_fill(kept, -math.inf).amax(1)).all()


@pytest.mark.parametrize("norm", [0, 1, 2, math.inf])
def test_projecting_twice_or_within_changes_nothing(norm):
    delta = torch.randn(4, 1, 5, 3, generator=torch.Generator().manual_seed(1))
    radius = torch.tensor([0.1 if norm else 1.0, 1.0, 3.0, 100.0])
    once = project(delta, radius, norm)
    assert (norms(once, norm) <= radius + 1e-4).all()
    torch.testing.assert_close(project(once, radius, norm), once)
    torch.testing.assert_close(once[3], delta[3])


def test_steepest_keeps_zero_at_zero():
    assert steepest(torch.zeros(2, 1, 3, 3), 2).isfinite().all()
    assert torch.equal(steepest(torch.tensor([[[[-2.0, 0, 3]]]]), math.inf), torch.tensor([[[[-1.0, 0, 1]]]]))


@pytest.mark.parametrize("attack", [pgd, mi_fgsm, apgd, apgd_targeted])
def test_l2_stays_in_ball_cube_and_support(attack, model, digits):
    images, labels = digits[0][:6], digits[1][:6]
    support = torch.zeros(28, 28)
    support[5:23, 9:19] = 1
    result = attack(model, images, labels, eps=2.0, norm=2, steps=8, support=support)
    assert (norms(result.attempt - images, 2) <= 2 + 1e-5).all()
    assert result.attempt.min() >= 0 and result.attempt.max() <= 1
    assert torch.equal(result.attempt[..., support == 0], images[..., support == 0])


def test_towards_a_target(model, digits):
    images, labels = digits
    aimed = iterative_least_likely(model, images, labels, eps=0.35)
    assert torch.equal(aimed.success, aimed.predicted == aimed.target)
    assert (targeted_gradient_sign(model, images, labels, eps=0.3).target == aimed.target).all()


def test_certain_models_are_said_to_hide_and_dlr_sees_through(model, digits):
    images, labels = digits[0][:12], digits[1][:12]
    certain = lambda x: 1e4 * model(x)  # noqa: E731
    with pytest.warns(ZeroGradientWarning):
        flat = apgd(certain, images, labels, eps=0.25, steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharp = apgd(certain, images, labels, eps=0.25, steps=10, loss="dlr")
    assert sharp.success.sum() > flat.success.sum()


@pytest.mark.parametrize("norm", [2, math.inf])
def test_square_needs_outputs_only(norm, model, digits):
    images, labels = digits[0][:8], digits[1][:8]
    eps = 0.35 if norm == math.inf else 3.5
    result = square(lambda x: model(x).softmax(1).detach(), images, labels, eps=eps, norm=norm, steps=150)
    assert result.success.any() and result.backward.sum() == 0
    assert (result.distance[result.success] <= eps + 1e-5).all()


def test_all_classes_at_once_are_climbed_as_one_after_the_other(model, digits):
    images, labels = digits[0][:16], digits[1][:16]
    apart = apgd_targeted(model, images, labels, eps=0.15, steps=10, targets=4)
    at_once = apgd_targeted(model, images, labels, eps=0.15, steps=10, targets=4, together=True)
    assert (apart.success == at_once.success).sum() >= 15  # the starts are others
    resists = ~at_once.success & ~apart.success
    assert torch.equal(at_once.backward[resists], apart.backward[resists])
    assert torch.equal(model.logits(at_once.adversarial).argmax(1) != labels, at_once.success)
    twice = apgd_targeted(model, images, labels, eps=0.15, steps=10, targets=4, restarts=2, together=True)
    assert (twice.backward[~twice.success] == 2 * 4 * 11).all()
    alone = apgd_targeted(model, images[3:4], labels[3:4], eps=0.15, steps=10, targets=4, together=True, batch_size=1)
    assert alone.success.shape == (1,)


def test_what_is_nearby_is_attacked_and_what_is_unknown(model, digits):
    images, labels = digits[0][:16], digits[1][:16]
    asked = []

    def spy(model, images, labels, **options):
        asked.append(images)
        return pgd(model, images, labels, eps=0.01, steps=1)

    known = partial(minimum_norm, norm=math.inf, steps=30)
    far = known(model, images, labels)
    eps = float(far.distance.nanmedian()) / 1.3
    rest = ~far.success | (far.distance > eps)
    near = rest & (~far.success | (far.distance <= 1.5 * eps))
    assert 0 < near.sum() < rest.sum()
    ensemble(model, images, labels, eps=eps, attacks=(known, Nearby(spy, 1.5)))
    assert torch.equal(asked.pop(), images[near])
    ensemble(model, images, labels, eps=eps, attacks=(partial(fgsm, eps=1e-4), Nearby(spy, 1.5)))
    assert len(asked.pop()) == 16  # nothing is known of them


def test_the_ensemble_is_no_better_than_its_best(model, digits):
    images, labels = digits[0][:16], digits[1][:16]
    attacks = standard_attacks(queries=50)
    result = ensemble(model, images, labels, eps=0.2, attacks=attacks)
    assert (result.success >= pgd(model, images, labels, eps=0.2, steps=10, random_start=False).success).all()
    assert sum(result.wins.values()) == int(result.success.sum())
    assert list(result.to_frame()["winner"].notna()) == result.success.tolist()
