"""What every attack promises, whoever wrote it: verified success, exact supports, honest counts, clear errors."""

import math
import warnings

import pytest
import torch
from torch import nn

from cvi_nb import attack
from cvi_nb.attack import ATTACKS, ZeroGradientWarning, norms
from cvi_nb.data import load_digits
from cvi_nb.models import Classifier, load_classifier

SMALL = {  # few steps: these tests are about promises, not about strength
    "fgsm": {"eps": 0.25},
    "targeted_gradient_sign": {"eps": 0.3},
    "bim": {"eps": 0.25, "step_size": 0.05, "steps": 8},
    "iterative_least_likely": {"eps": 0.35, "step_size": 0.05, "steps": 15},
    "pgd": {"eps": 0.25, "steps": 8},
    "mi_fgsm": {"eps": 0.25, "steps": 8},
    "apgd": {"eps": 0.25, "steps": 10},
    "apgd_targeted": {"eps": 0.25, "steps": 8},
    "square": {"eps": 0.3, "steps": 150},
    "ensemble": {"eps": 0.25, "attacks": attack.standard_attacks(queries=100)},
    "deepfool": {},
    "ddn": {"steps": 25},
    "fmn": {"steps": 25},
    "sigma_zero": {"steps": 40},
    "jsma": {},
    "minimum_norm": {"steps": 30},
    "carlini_wagner": {"steps": 30, "search_steps": 3},
}
TARGETED_ONLY = {name for name, found in ATTACKS.items() if found.target is not None}
IN_A_BALL = [*(name for name, found in ATTACKS.items() if found.ball), "ensemble"]
NO_GRADIENT = {name for name, found in ATTACKS.items() if not found.gradient}
ALL = sorted({*ATTACKS, "ensemble"})


def run(name, model, images, labels, **options):
    return getattr(attack, name)(model, images, labels, **(SMALL[name] | options))


@pytest.fixture(scope="module")
def model():
    return load_classifier("mnist_cnn")


@pytest.fixture(scope="module")
def digits(model):
    found = load_digits("report")
    right = (model.logits(found.images).argmax(1) == found.labels).nonzero()[:, 0]
    chosen = right[:: len(right) // 6][:6]
    return found.images[chosen], found.labels[chosen]


@pytest.fixture(scope="module")
def results(model, digits):
    return {name: run(name, model, *digits) for name in ALL}


@pytest.mark.parametrize("name", ALL)
def test_success_is_what_a_prediction_says(name, model, digits, results):
    labels = digits[1]
    result = results[name]
    predicted = model.logits(result.adversarial).argmax(1)
    reached = predicted != labels if result.target is None else predicted == result.target
    assert torch.equal(result.success, reached)
    assert torch.equal(result.predicted, predicted)
    if name != "targeted_gradient_sign":  # one step seldom reaches the least likely class
        assert result.success.any(), "fooled nobody: these options are meant to fool some"
    assert result.adversarial.min() >= 0 and result.adversarial.max() <= 1


@pytest.mark.parametrize("name", ALL)
def test_failures_are_originals_without_a_distance(name, digits, results):
    result = results[name]
    failed = ~result.success
    assert torch.equal(result.adversarial[failed], digits[0][failed])
    assert result.distance[failed].isnan().all() and result.l2[failed].isnan().all()
    assert not result.distance[result.success].isnan().any()
    assert (result.distance[result.success] > 0).all()


@pytest.mark.parametrize("name", ALL)
def test_evaluations_are_those_of_the_model(name, digits):
    counted = Classifier(load_classifier("mnist_cnn").model)
    result = run(name, counted, *digits)
    assert result.evaluations == counted.evaluations
    assert (result.forward > 0).all()
    if name in NO_GRADIENT:
        assert result.backward.sum() == 0


@pytest.mark.parametrize("name", IN_A_BALL)
def test_stays_in_the_ball(name, digits, results):
    distance = results[name].linf[results[name].success]
    assert (distance <= SMALL[name]["eps"] + 1e-6).all()
    assert ((results[name].attempt - digits[0]).abs() <= SMALL[name]["eps"] + 1e-6).all()


@pytest.mark.parametrize("name", ALL)
def test_same_seed_same_images_whatever_the_batch(name, model, digits, results):
    again = run(name, model, *digits, batch_size=2)
    assert torch.equal(again.success, results[name].success)
    if name not in ("square",):  # a coin on a rounding difference: one accepted square may differ
        assert (again.adversarial - results[name].adversarial).abs().max() < 2e-2


@pytest.mark.parametrize("name", ALL)
def test_support_is_never_left(name, model, digits):
    images, labels = digits
    support = torch.zeros(len(images), 28, 28, dtype=torch.bool)
    support[:, 6:22, 8:20] = True
    result = run(name, model, images, labels, support=support)
    outside = ~support[:, None]
    assert torch.equal(result.adversarial[outside], images[outside])
    assert torch.equal(result.attempt[outside], images[outside])


@pytest.mark.parametrize("name", [n for n in ALL if n != "ensemble"])
@pytest.mark.parametrize("target", ["next", "least_likely"])
def test_targets(name, target, model, digits):
    images, labels = digits
    result = run(name, model, images, labels, target=target)
    assert result.target is not None and (result.target != labels).all()
    if target == "next":
        assert torch.equal(result.target, (labels + 1) % 10)
    assert torch.equal(model.logits(result.adversarial).argmax(1) == result.target, result.success)


@pytest.mark.parametrize("name", ALL)
def test_sets_of_classes_are_left_and_reached(name, model, digits):
    images, labels = digits
    kin = [{int(y), (int(y) + 1) % 10, (int(y) + 5) % 10} for y in labels]
    inside = torch.zeros(len(labels), 10, dtype=torch.bool)
    for row, right in zip(inside, kin, strict=True):
        row[list(right)] = True
    left = run(name, model, images, kin)  # any class of the set is right
    top = model.logits(left.adversarial).argmax(1, keepdim=True)
    if name not in TARGETED_ONLY:
        assert torch.equal(left.target, ~inside)
        assert torch.equal(left.success, ~inside.gather(1, top)[:, 0])
        mask = run(name, model, images, inside)  # the same sets as a mask
        assert torch.equal(left.adversarial, mask.adversarial)
    reached = run(name, model, images, labels, target=[{(int(y) + 1) % 10, (int(y) + 2) % 10} for y in labels])
    top = model.logits(reached.adversarial).argmax(1)
    assert torch.equal(reached.success, ((top - labels) % 10 == 1) | ((top - labels) % 10 == 2))


def test_sets_that_make_no_goal_are_refused(model, digits):
    images, labels = digits[0][:2], digits[1][:2]
    for given, target, message in (
        (set(range(10)), None, "leave a class out"),
        ([{3}, set()], None, "at least one class"),
        ([{3}, {10}], None, "labels"),
        ([{3}], None, "labels"),
        ({3, 5}, 5, "target"),
        (labels, [{int(y)} for y in labels], "target"),
        (labels, [{0, 10}, {1}], "target"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            attack.pgd(model, images, given, eps=0.1, steps=2, target=target)


@pytest.mark.parametrize("name", ALL)
def test_eight_bit_images_are_on_the_grid_and_fool_there(name, model, digits):
    images, labels = (255 * digits[0]).round() / 255, digits[1]
    result = run(name, model, images, labels, eight_bit=True)
    steps = 255 * result.adversarial
    assert (steps - steps.round()).abs().max() < 1e-3
    if name != "targeted_gradient_sign":
        assert result.success.any()
    predicted = model.logits(steps.round() / 255).argmax(1)
    reached = predicted != labels if result.target is None else predicted == result.target
    assert torch.equal(result.success, reached)
    if name in IN_A_BALL:
        assert (result.linf[result.success] <= SMALL[name]["eps"] + 1e-6).all()


@pytest.mark.parametrize(("name", "norm"), [(n, norm) for n, one in ATTACKS.items() if one.ball for norm in one.norms])
@pytest.mark.parametrize("on_grid", [True, False])
def test_eight_bit_stays_in_the_ball(name, norm, on_grid, model, digits):
    """In every norm, rounded or not, and where no grid point lies in the ball."""
    images, labels = digits[0][:6], model.logits(digits[0][:6]).argmax(1)
    images = (255 * images).round() / 255 if on_grid else (0.98 * images + 0.0077).clamp(0, 1)
    found = 0
    for eps in {1: (1.0, 8.0), 2: (0.3, 1.5), math.inf: (0.001, 0.1)}[norm]:
        given = {"norm": norm} if len(ATTACKS[name].norms) > 1 else {}
        result = run(name, model, images, labels, eps=eps, eight_bit=True, **given)
        won = result.success
        distance = norms(result.adversarial - images, norm)[won]
        assert (distance <= eps * (1 + 1e-5) + 1e-6).all()
        found += int(won.sum())
    assert found or name not in ("pgd", "apgd", "apgd_targeted", "bim")


@pytest.mark.parametrize("name", [n for n in ALL if n not in TARGETED_ONLY])
def test_already_wrong_is_a_success_at_distance_zero(name, model, digits):
    images, labels = digits[0][:3], digits[1][:3].clone()
    labels[1] = (labels[1] + 1) % 10
    result = run(name, model, images, labels)
    assert result.success[1] and result.distance[1] == 0 and torch.equal(result.adversarial[1], images[1])
    assert result.backward[1] == 0


class Constant(nn.Module):
    """Zero gradient everywhere, and class 2 always."""

    def forward(self, x):
        return torch.tensor([0.0, 1.0, 2.0]).expand(len(x), 3) + 0 * x.sum((1, 2, 3))[:, None]


@pytest.mark.parametrize("name", ALL)
def test_a_constant_model_is_said_to_give_no_gradient(name):
    images, labels = torch.rand(3, 1, 6, 5, generator=torch.Generator().manual_seed(0)), torch.full((3,), 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(name, Constant(), images, labels)
    assert not result.success.any() and result.distance.isnan().all()
    assert torch.equal(result.adversarial, images)
    assert result.attempt.isfinite().all()
    if name not in NO_GRADIENT:
        assert any(issubclass(w.category, ZeroGradientWarning) for w in caught)


@pytest.mark.parametrize("name", ALL)
def test_one_sample_none_and_other_shapes(name):
    generator = torch.Generator().manual_seed(1)
    for channels, height, width in ((1, 7, 4), (4, 5, 8)):
        network = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, 5)).requires_grad_(False)
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        images = torch.rand(1, channels, height, width, generator=generator)
        labels = network(images).argmax(1)
        result = run(name, network, images, labels)
        assert result.adversarial.shape == images.shape and result.adversarial.isfinite().all()
        none = run(name, network, images[:0], labels[:0])
        assert len(none) == 0 and none.adversarial.shape == images[:0].shape and len(none.to_frame()) == 0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(2, 1, 28, 28) * 255}, "images"),
        ({"images": torch.rand(2, 28, 28)}, "images"),
        ({"images": torch.rand(2, 1, 28, 28).double()}, "images"),
        ({"images": torch.full((2, 1, 28, 28), torch.nan)}, "images"),
        ({"labels": torch.tensor([3, 10])}, "labels"),
        ({"labels": torch.tensor([-1, 3])}, "labels"),
        ({"labels": torch.tensor([1, 2, 3])}, "labels"),
        ({"labels": torch.tensor([0.5, 2.0])}, "labels"),
        ({"batch_size": 0}, "batch_size"),
        ({"target": "worst"}, "target"),
        ({"target": torch.tensor([3, 10])}, "target"),
        ({"support": torch.ones(5, 5)}, "support"),
        ({"support": torch.full((28, 28), 0.5)}, "support"),
    ],
)
def test_bad_arguments_are_named(name, change, message, model):
    arguments = {"images": torch.rand(2, 1, 28, 28), "labels": torch.tensor([3, 4])} | change
    with pytest.raises((TypeError, ValueError), match=message):
        run(name, model, arguments.pop("images"), arguments.pop("labels"), **arguments)


@pytest.mark.parametrize("name", ALL)
def test_another_device_is_named(name):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).to("meta")
    with pytest.raises(ValueError, match="`images` must be on the model's device, meta, got cpu"):
        run(name, network, torch.rand(1, 1, 3, 4), torch.tensor([0]))


@pytest.mark.parametrize("name", IN_A_BALL)
@pytest.mark.parametrize("eps", [-0.1, math.nan])
def test_bad_radius(name, eps, model, digits):
    with pytest.raises(ValueError, match="eps"):
        run(name, model, *digits, eps=eps)


@pytest.mark.parametrize("name", ["pgd", "bim", "apgd", "ensemble"])
def test_more_room_never_helps_the_model(name, model):
    digits = load_digits("report")[range(0, 1000, 25)]
    shares = [
        float(run(name, model, digits.images, digits.labels, eps=e).success.float().mean()) for e in (0.05, 0.15, 0.3)
    ]
    assert shares == sorted(shares) and shares[-1] > shares[0]


def test_the_trace_ends_where_a_sample_does(model, digits):
    result = run("pgd", model, *digits, trace=True)
    assert result.trace.shape[1] == len(digits[0]) and len(result.trace) > 0
    assert not result.trace[0][result.backward > 0].isnan().any()


@pytest.mark.parametrize("name", ["deepfool", "ddn", "carlini_wagner", "bim"])
def test_dropping_finished_samples_changes_nothing_but_the_count(name, model, digits, results):
    kept = run(name, model, *digits, compact=False)
    assert torch.equal(kept.success, results[name].success)
    assert (kept.adversarial - results[name].adversarial).abs().max() < 2e-2


@pytest.mark.parametrize("name", ["pgd", "carlini_wagner", "square"])
def test_an_attack_on_clusters_touches_no_other_pixel(name, model, digits):
    images, labels = digits
    partition = (torch.arange(28)[:, None] // 7 * 4 + torch.arange(28) // 7).expand(len(images), -1, -1)
    clusters = [[5, 6], [9], [5, 6, 9, 10], [0], [10], [1, 2, 13, 14]]
    support = attack.cluster_support(partition, clusters)
    for i, chosen in enumerate(clusters):
        assert support[i].sum() == 49 * len(chosen) and set(partition[i][support[i]].tolist()) == set(chosen)
    result = run(name, model, images, labels, support=support)
    changed = (result.attempt != images) | (result.adversarial != images)
    assert changed.any() and not changed[~support[:, None]].any()
    with pytest.raises(ValueError, match="`clusters` must have one entry per partition"):
        attack.cluster_support(partition, clusters[:2])


def test_destruction_rate_counts_what_is_undone(model, digits):
    images, labels = digits
    wrong = labels.clone()
    wrong[0] = (wrong[0] + 1) % 10  # misclassified before: does not count
    result = attack.ddn(model, images, wrong, steps=25)
    undone = attack.destruction_rate(model, result, lambda x: images[1:])
    assert undone.n == len(images) - 1 and undone.rate == 1 and undone.clean == 1
    kept = attack.destruction_rate(model, result, lambda x: x)
    assert kept.rate == 0 and kept.low == 0 < kept.high < 1
    assert list(attack.destruction_rates(model, result).index) == list(attack.TRANSFORMATIONS)
    with pytest.raises(ValueError, match="transformation"):
        attack.destruction_rate(model, result, "melt")


@pytest.mark.parametrize("norm", [0, 2, math.inf])
def test_minimum_norms_are_smaller_in_their_own_norm(norm, model, digits):
    own = attack.minimum_norm(model, *digits, norm=norm, steps=60)
    assert own.success.all()
    for other in {0, 2, math.inf} - {norm}:
        rival = attack.minimum_norm(model, *digits, norm=other, steps=60)
        assert float(own.distance.mean()) <= float(norms(rival.adversarial - digits[0], norm).mean()) * 1.02


@pytest.mark.parametrize("target", [3.7, 3.0, True, torch.tensor(1.5)], ids=repr)
def test_a_target_is_a_class_and_no_part_of_one(target, model, digits):
    with pytest.raises(TypeError, match=r"`target` must be (an integer|integers)"):
        attack.pgd(model, *digits, eps=0.1, steps=1, target=target)


def test_watching_a_search_leaves_the_network_as_it_was():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    image = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    attack.show_search(attack.pgd, network, image, 0, eps=0.1, steps=2, cells=8)
    assert network.training and all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
