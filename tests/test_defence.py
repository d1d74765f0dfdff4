"""Objectives against closed forms and finite differences, training against its interrupted twin, and bad input."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cvi_nb.defence as defence
from cvi_nb.data import load_digits
from cvi_nb.defence import (
    Objective,
    distill,
    doubleback,
    fgsm_adversarial,
    gaussian_noise,
    insensitive,
    load_defended,
    per_sample_lambda,
    pgd_adversarial,
    plain,
    recipe,
    squared_slope,
    train,
    worst_in_ball,
)
from cvi_nb.models import Classifier, Evaluations, _fit_digits, load_classifier, read_header, shipped_weights

OBJECTIVES = [
    plain(),
    plain(temperature=20),
    gaussian_noise(0.1),
    fgsm_adversarial(0.1),
    pgd_adversarial(0.1, steps=2),
    pgd_adversarial(0.1, steps=2, clean=0.3),
    doubleback(2.0),
    insensitive(0.5),
]


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def small(classes=3):
    """Convolution, ReLU, pooling, batch norm and dropout: what a second derivative has to pass."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(36, classes),
    )


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(40) % 3
    images = torch.rand(40, 1, 8, 8, generator=g) * 0.5
    images[:, 0, 2:5, 2:5] += labels[:, None, None] / 4
    return images.clamp(0, 1), labels


QUICK = {"epochs": 3, "batch_size": 16, "progress": False}


def same(one, other):
    found, wanted = one.classifier.state_dict(), other.classifier.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


class Killed(Exception):
    pass


def mortal(objective, lives):
    left = [lives]

    def loss(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return objective.loss(*arguments)

    return dataclasses.replace(objective, loss=loss)


# Objectives


def test_published_lambda_is_the_same_loss():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()
    images, labels = torch.rand(32, 1, 8, 8).double(), torch.arange(32) % 3
    x = images.clone().requires_grad_()
    for summary, objective in (
        (lambda z: F.cross_entropy(z, labels), doubleback),
        (lambda z: F.cross_entropy(z, torch.full_like(z, 1 / 3)), insensitive),
    ):
        (slope,) = torch.autograd.grad(summary(network(x)), x)
        published = F.cross_entropy(network(images), labels) + 56234 * slope.square().sum() / 2
        ours = objective(per_sample_lambda(56234, 32))(network, images, labels)
        assert torch.allclose(ours, published, rtol=1e-12)
    assert per_sample_lambda(56234, 256) == pytest.approx(109.832, abs=1e-3)


@pytest.mark.parametrize("objective", [doubleback, insensitive])
def test_penalty_on_a_linear_model(objective):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).double()
    images, labels = torch.rand(7, 1, 8, 8).double(), torch.arange(7) % 5
    W, p = network[1].weight.detach(), network(images).softmax(1).detach()
    residual = p - F.one_hot(labels, 5) if objective is doubleback else 1 / 5 - p
    expected = F.cross_entropy(network(images), labels) + 4 * (residual @ W).square().sum(1).mean()
    assert torch.allclose(objective(4)(network, images, labels), expected, rtol=1e-12)


def test_slope_of_each_image_is_its_own():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)).double()
    images, labels = torch.rand(5, 1, 8, 8).double(), torch.arange(5) % 3
    x = images.clone().requires_grad_()
    together = squared_slope(F.cross_entropy(network(x), labels, reduction="none"), x)
    for i in range(5):
        one = images[i : i + 1].clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(network(one), labels[i : i + 1]), one)
        assert torch.allclose(together[i], slope.square().sum(), rtol=1e-10)


@pytest.mark.parametrize("objective", [doubleback(3.0), insensitive(3.0)], ids=str)
def test_weight_gradient_against_finite_differences(objective):
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()
    images, labels = torch.rand(6, 1, 8, 8).double(), torch.arange(6) % 3
    objective(network, images, labels).backward()
    for weight in network.parameters():
        flat = weight.data.view(-1)
        for i in range(0, len(flat), max(1, len(flat) // 7)):
            kept, step = float(flat[i]), 1e-6
            flat[i] = kept + step
            up = float(objective(network, images, labels).detach())
            flat[i] = kept - step
            down = float(objective(network, images, labels).detach())
            flat[i] = kept
            expected = (up - down) / (2 * step)
            assert float(weight.grad.view(-1)[i]) == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("objective", [doubleback(0), insensitive(0)], ids=str)
def test_nothing_added_is_plain(objective, data):
    assert same(train(small, *data, objective, **QUICK), train(small, *data, plain(), **QUICK))


def test_worst_image_stays_in_ball_and_box(data):
    images, labels = data
    network = small().train()
    before = copy.deepcopy(network.state_dict())
    for steps, size, start in ((1, 0.2, False), (5, 0.1, True)):
        worst = worst_in_ball(network, images, labels, 0.2, steps, size, start)
        assert worst.min() >= 0 and worst.max() <= 1 and (worst - images).abs().max() <= 0.2 + 1e-6
        assert not worst.requires_grad
        network.eval()
        assert F.cross_entropy(network(worst), labels) > F.cross_entropy(network(images), labels)
        network.train()
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())  # batch norms too
    assert all(m.training for m in network.modules()) and all(p.grad is None for p in network.parameters())


def test_worst_image_does_not_depend_on_the_batch(data):
    images, labels = data
    network = small().eval()
    together = worst_in_ball(network, images, labels, 0.1, 3, 0.05, False)
    alone = torch.cat(
        [
            worst_in_ball(network, x, y, 0.1, 3, 0.05, False)
            for x, y in zip(images.split(1), labels.split(1), strict=True)
        ]
    )
    assert torch.allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_forward_cost_is_what_the_network_sees(objective, data):
    images, labels = data
    seen = [0]

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small()

        def forward(self, x):
            seen[0] += len(x)
            return self.inner(x)

    objective(Counting(), images, labels).backward()
    assert seen[0] == objective.cost.forward * len(images)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_every_objective_trains_and_takes_probabilities(objective, data):
    images, labels = data
    result = train(small, images, labels, objective, **QUICK | {"epochs": 8, "learning_rate": 1e-2})
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    soft = 0.9 * F.one_hot(labels, 3).float() + 0.1 / 3
    assert math.isfinite(train(small, images, soft, objective, **QUICK).history[-1]["loss"])
    cost = objective.cost
    assert result.evaluations == Evaluations(cost.forward * 320, cost.backward * 320)


# Training


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_resumed_is_uninterrupted(objective, data, tmp_path):
    options = QUICK | {"epochs": 4, "validation": data}
    whole = train(small, *data, objective, **options)
    for lives in (3, 7, 11):  # three batches an epoch: between epochs, and within
        path = tmp_path / f"{lives}.pt"
        with pytest.raises(Killed):
            train(small, *data, mortal(objective, lives), checkpoint=path, **options)
        torch.rand(3)  # the caller's generator moves on
        resumed = train(small, *data, objective, checkpoint=path, **options)
        assert same(whole, resumed) and whole.history == resumed.history
        assert resumed.evaluations == whole.evaluations
        assert same(whole, train(small, *data, objective, checkpoint=path, **options))  # finished: nothing to do
    assert sorted(p.name for p in tmp_path.iterdir()) == ["11.pt", "3.pt", "7.pt"]


@pytest.mark.parametrize("options", [{"optimiser": "sgd", "schedule": "constant"}, {"optimiser": torch.optim.AdamW}])
def test_resumed_with_other_optimisers(options, data, tmp_path):
    options = QUICK | options
    whole = train(small, *data, plain(), **options)
    with pytest.raises(Killed):
        train(small, *data, mortal(plain(), 4), checkpoint=tmp_path / "x.pt", **options)
    assert same(whole, train(small, *data, plain(), checkpoint=tmp_path / "x.pt", **options))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"epochs": 5}, "epochs: 3 there, 5 here"),
        ({"batch_size": 8}, "batch_size"),
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"objective": doubleback(1.0)}, "doubleback"),
        ({"objective": plain(temperature=1.0000001)}, "objective"),
        ({"images": "dark"}, "data"),
        ({"network": lambda: small(4)}, "network"),
        ({"validation": "some"}, "validation"),
    ],
    ids=["seed", "epochs", "batch_size", "learning_rate", "objective", "temperature", "data", "network", "validation"],
)
def test_checkpoint_of_another_run(change, named, data, tmp_path):
    images, labels = data
    path = tmp_path / "run.pt"
    train(small, images, labels, plain(), checkpoint=path, **QUICK)
    written = path.read_bytes()
    options = {"network": small, "images": images, "labels": labels, "objective": plain()} | QUICK | change
    if change.get("images"):
        options["images"] = images / 2
    if change.get("validation"):
        options["validation"] = data
    with pytest.raises(ValueError, match=f"`checkpoint` must belong to this run.*{named}"):
        train(checkpoint=path, **options)
    assert path.read_bytes() == written


def test_checkpoint_is_tensors_and_numbers(data, tmp_path):
    path = tmp_path / "run.pt"
    train(small, *data, checkpoint=path, **QUICK)
    assert len(torch.load(path, weights_only=True)["history"]) == 3
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="`checkpoint` must be a file that `train` wrote"):
        train(small, *data, checkpoint=path, **QUICK)
    torch.save({"code": nn.Linear(1, 1)}, path)
    with pytest.raises(ValueError, match="`checkpoint` must be a file that `train` wrote"):
        train(small, *data, checkpoint=path, **QUICK)


def test_damaged_checkpoints_are_said_whatever_is_damaged(data, tmp_path):
    path = tmp_path / "run.pt"
    train(small, *data, checkpoint=path, **QUICK)
    content, whole = torch.load(path, weights_only=True), path.read_bytes()

    def refused():
        with pytest.raises(ValueError, match=r"`checkpoint` must be a file that `train` wrote, got .*run\.pt"):
            train(small, *data, checkpoint=path, **QUICK)

    for key in content:
        torch.save({k: v for k, v in content.items() if k != key}, path)
        refused()
        torch.save(content | {key: "?"}, path)
        refused()
    weights = content["network"]
    for odd in ({0: torch.ones(1)}, weights | {"0.weight": torch.ones(2)}, dict(list(weights.items())[1:])):
        torch.save(content | {"network": odd}, path)
        refused()
    for broken in (b"", b"junk" * 100, whole[: len(whole) // 2], whole[:-1000]):
        path.write_bytes(broken)
        refused()


def test_options_are_checked_by_name(data):
    with pytest.raises(TypeError, match=r"`epoch` must be an option of train.*did you mean `epochs`"):
        train(small, *data, epoch=3)
    with pytest.raises(ValueError, match="`seed` must"):
        train(small, *data, seed=-1)
    with pytest.raises(TypeError, match="`progress` must be True or False"):
        train(small, *data, **QUICK | {"progress": 1})
    result = train(small, *data, epochs=np.int64(1), learning_rate=np.float32(1e-3), batch_size=torch.tensor(16))
    assert result.settings["epochs"] == 1 and type(result.settings["learning_rate"]) is float


def test_training_works_for_callers_without_gradients(data):
    whole = train(small, *data, doubleback(0.1), **QUICK)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            made = [part.clone() for part in data]
            assert same(train(small, *made, doubleback(0.1), **QUICK), whole)


def test_seeds_and_the_global_generator(data):
    before = torch.get_rng_state()
    first, second = (train(small, *data, pgd_adversarial(0.1, 2), **QUICK) for _ in range(2))
    third = train(small, *data, pgd_adversarial(0.1, 2), seed=1, **QUICK)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, second) and not same(first, third)
    with pytest.raises(Killed):
        train(small, *data, mortal(gaussian_noise(0.1), 2), **QUICK)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_callers_network_is_left_alone(data):
    network = small()
    network[1].eval()
    network[0].weight.requires_grad_(False)
    kept = copy.deepcopy(network.state_dict())
    result = train(network, *data, **QUICK)
    assert all(torch.equal(v, kept[k]) for k, v in network.state_dict().items())
    assert network.training and not network[1].training
    assert not network[0].weight.requires_grad and network[6].weight.requires_grad
    assert all(p.grad is None for p in network.parameters())
    trained = result.classifier.model
    assert not any(m.training for m in trained.modules())
    assert torch.equal(trained[0].weight, network[0].weight)  # frozen stays frozen
    assert not torch.equal(trained[6].weight, network[6].weight)


def test_a_classifier_keeps_its_normalisation(data):
    images, labels = data
    wrapped = Classifier(small().requires_grad_(False), mean=[0.3], std=[0.2], classes=["a", "b", "c"], name="mine")
    result = train(wrapped, images, labels, doubleback(0.1), **QUICK)
    assert result.classifier.classes == ("a", "b", "c") and result.classifier.name == "mine"
    assert not any(p.requires_grad for p in result.classifier.parameters())
    assert not torch.equal(result.classifier.model[6].weight, wrapped.model[6].weight)  # all frozen: trained whole
    assert result.classifier.evaluations == wrapped.evaluations == Evaluations()
    by_hand = train(wrapped.model, (images - 0.3).clamp(0, 1), labels, **QUICK)  # not the same input
    assert not torch.equal(by_hand.classifier.model[6].weight, result.classifier.model[6].weight)


def test_history_and_plot(data):
    result = train(small, *data, validation=data, **QUICK)
    frame = result.to_frame()
    assert list(frame["epoch"]) == [1, 2, 3]
    assert frame["validation_accuracy"].iloc[-1] == pytest.approx(result.classifier.accuracy(*data))
    assert result.plot() is not None and "3 epochs" in repr(result)


@pytest.mark.slow
def test_plain_training_is_that_of_the_digit_network():
    digits = load_digits("development")
    from cvi_nb.models import mnist_cnn

    ours = train(mnist_cnn, digits.images, digits.labels, epochs=1, progress=False).classifier.model
    wanted = _fit_digits(0, epochs=1, progress=False).state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in ours.state_dict().items())


# Distillation


def test_distillation_uses_soft_labels_at_the_temperature(data, monkeypatch):
    images, labels = data
    teacher = train(small, images, labels, plain(temperature=7), **QUICK).classifier
    seen = {}

    def watched(network, x, y, objective, **options):
        seen.update(labels=y, objective=objective)
        return train(network, x, y, objective, **options)

    monkeypatch.setattr(defence, "train", watched)
    result = distill(teacher, small, images, temperature=7, validation=data, **QUICK)
    logits = teacher.logits(images)
    assert torch.allclose(seen["labels"], (logits / 7).softmax(1))
    network = small().eval()
    expected = F.cross_entropy(network(images) / 7, seen["labels"])
    assert torch.equal(seen["objective"](network, images, seen["labels"]), expected)
    at_one = F.cross_entropy(result.classifier.logits(images), labels)
    assert result.history[-1]["validation_loss"] == pytest.approx(float(at_one), rel=1e-5)
    assert result.objective.name == "distilled" and result.evaluations.forward == 40 * 3 + 40 * 3 + 40


def test_distillation_hides_the_gradient_and_nothing_else():
    """Large logits: the cross-entropy's gradient is exactly zero in float32, that of the margin is not."""
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    with torch.no_grad():
        model.model[1].weight.mul_(2000)
    images = torch.rand(20, 1, 8, 8)
    labels = model.logits(images).argmax(1)
    zero = model.value_and_gradient(images, labels)[1].abs().flatten(1).amax(1) == 0
    assert zero.float().mean() > 0.5
    assert (model.value_and_gradient(images, labels, "margin")[1].abs().flatten(1).amax(1) > 0).all()


# Networks by name


def test_defended_networks_are_trained_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CVI_HOME", str(tmp_path))
    digits = load_digits("development")[::100]
    monkeypatch.setattr(defence, "load_digits", lambda split: digits)
    for name, (objective, options) in list(defence.RECIPES.items()):
        monkeypatch.setitem(defence.RECIPES, name, (objective, options | {"epochs": 1}))
        first = load_defended(name, quick=True, progress=False, retrain=True)
        assert first.classes[3] == "3" and first.size == 28 and first.name == name
        with monkeypatch.context() as patch:
            patch.setattr(defence, "train", None)
            again = load_defended(name, quick=True, retrain=True)
        assert torch.equal(first.logits(digits.images), again.logits(digits.images))
    assert len(list(tmp_path.iterdir())) == len(defence.RECIPES)  # no checkpoints left
    assert all(p.suffix == ".safetensors" for p in tmp_path.iterdir())


@pytest.mark.parametrize("name", defence.DEFENDED)
def test_shipped_networks_are_those_of_the_recipes(name, tmp_path, monkeypatch):
    """From the package alone: no cache, no training; recipe, seed and accuracy as the header says."""
    monkeypatch.setenv("CVI_HOME", str(tmp_path / "none"))
    monkeypatch.setattr(defence, "train", None)
    model = load_defended(name)
    written = read_header(shipped_weights(name))["provenance"]
    assert {key: written[key] for key in ("objective", "settings", "options")} == recipe(name)
    assert all(torch.equal(w, w.half().float()) for w in model.parameters())
    assert torch.equal(next(load_defended(name, quick=True).parameters()), next(model.parameters()))
    digits = load_digits("report")
    assert model.accuracy(digits.images, digits.labels) == pytest.approx(written["measured"]["accuracy"], abs=0.0015)
    assert model.classes[3] == "3" and model.size == 28 and not (tmp_path / "none").exists()


def test_a_changed_recipe_is_not_answered_from_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("CVI_HOME", str(tmp_path))
    monkeypatch.setitem(defence.RECIPES, "fgsm", (fgsm_adversarial(0.1), {"epochs": 1}))
    digits = load_digits("development")[::100]
    monkeypatch.setattr(defence, "load_digits", lambda split: digits)
    assert load_defended("fgsm", progress=False).name == "fgsm" and len(list(tmp_path.iterdir())) == 1


def test_plain_is_the_digit_network():
    digits = load_digits("report")[:20]
    wanted = load_classifier("mnist_cnn").logits(digits.images)
    assert torch.equal(load_defended("plain").logits(digits.images), wanted)
    with pytest.raises(ValueError, match="`name` must be one of"):
        load_defended("mnist")


# Bad input


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: doubleback(-1), "lam"),
        (lambda: insensitive(math.nan), "lam"),
        (lambda: insensitive(math.inf), "lam"),
        (lambda: doubleback("1"), "lam"),
        (lambda: plain(temperature=0), "temperature"),
        (lambda: gaussian_noise(-0.1), "sigma"),
        (lambda: fgsm_adversarial(0), "eps"),
        (lambda: fgsm_adversarial(0.1, clean=1.5), "clean"),
        (lambda: pgd_adversarial(0.1, steps=0), "steps"),
        (lambda: pgd_adversarial(0.1, step_size=-1), "step_size"),
        (lambda: per_sample_lambda(1.0, 0), "batch_size"),
    ],
)
def test_bad_objectives(make, named):
    with pytest.raises((TypeError, ValueError), match=f"`{named}`"):
        make()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"labels": torch.full((40,), 3)}, "labels"),
        ({"labels": torch.full((40,), -1)}, "labels"),
        ({"labels": torch.zeros(39, dtype=torch.int64)}, "labels"),
        ({"labels": torch.zeros(40)}, "labels"),
        ({"labels": torch.full((40, 4), 0.25)}, "labels"),
        ({"labels": torch.full((40, 3), 0.5)}, "labels"),
        ({"images": torch.full((40, 1, 8, 8), 1.1)}, "images"),
        ({"images": torch.full((40, 1, 8, 8), math.nan)}, "images"),
        ({"images": torch.rand(40, 8, 8)}, "images"),
        ({"images": torch.rand(0, 1, 8, 8)}, "images"),
        ({"images": torch.rand(40, 1, 8, 8).double()}, "images"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 1.5}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": -1e-3}, "learning_rate"),
        ({"optimiser": "lbfgs"}, "optimiser"),
        ({"schedule": 3}, "schedule"),
        ({"objective": "plain"}, "objective"),
        ({"network": 3}, "network"),
        ({"network": nn.Flatten()}, "network"),
        ({"network": lambda: 3}, "network"),
        ({"validation": 3}, "validation"),
        ({"validation": (torch.full((2, 1, 8, 8), 2.0), torch.zeros(2, dtype=torch.int64))}, "validation images"),
        ({"validation": (torch.rand(2, 1, 8, 8), torch.tensor([0, 7]))}, "validation labels"),
    ],
)
def test_bad_arguments(change, named, data):
    arguments = {"network": small, "images": data[0], "labels": data[1]} | QUICK | change
    with pytest.raises((TypeError, ValueError), match=f"`{named}`"):
        train(**arguments)


def test_divergence_is_said(data):
    broken = Objective("broken", {}, lambda network, x, y: network(x).sum() * math.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 1"):
        train(small, *data, broken, **QUICK)


def test_one_image_and_other_shapes():
    network = lambda: nn.Sequential(nn.Conv2d(4, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))  # noqa: E731
    images = torch.rand(1, 4, 5, 9)
    for objective in OBJECTIVES:
        assert math.isfinite(train(network, images, [1], objective, **QUICK).history[-1]["loss"])


def test_retrainings_are_stored_beside_the_shipped_networks():
    """What the benchmark keeps: the shipped network as its header says, inside the interval of its retrainings."""
    folder = Path(__file__).parents[1] / "nbs" / "benchmarks" / "results"
    if not (folder / "retraining.csv").exists():
        pytest.skip("no repository")
    rows = pd.read_csv(folder / "retraining.csv").set_index(["network", "seed"])
    for name in defence.DEFENDED:
        measured = read_header(shipped_weights(name))["provenance"]["measured"]
        assert rows.accuracy[name, 0] == pytest.approx(measured["accuracy"])
        assert rows["FGSM error, ε = .25"][name, 0] == pytest.approx(measured["FGSM error 0.25"])
    summary = json.loads((folder / "retraining.json").read_text(encoding="utf-8"))
    assert summary["retrainings"]["plain"] >= 5
    for values in summary["networks"]["plain"].values():
        assert values["low"] <= values["shipped"] <= values["high"]
