"""Posteriors against enumeration, closed forms on additive models, and slow references."""

import itertools
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
import torchvision
from captum.metrics import sensitivity_max
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cvi_nb.clustering import segment
from cvi_nb.data import load_digits
from cvi_nb.inference import (
    BASELINES,
    CVI,
    FAMILIES,
    bernoulli_kl,
    blurred,
    coarse_masks,
    collect,
    exact_posterior,
    grid_partition,
    infer_noise,
    infer_presence,
    make_baselines,
    mean_shift_partition,
    paint,
    partitions_of,
    refine,
)
from cvi_nb.inference.draws import gates as gates_of
from cvi_nb.inference.draws import schedule
from cvi_nb.models import Classifier, Evaluations, load_classifier, mnist_cnn
from cvi_nb.validation import VanishedGradientWarning

# One pixel per cluster, image 1, baseline 0: the masked image is z itself, and a polynomial in z is any game we like.
WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -0.7])
ONE_EACH = torch.arange(6).view(2, 3)
WHOLE = torch.ones(1, 1, 2, 3)


def take(logits, target):
    """The first output is the evidence itself, in nats."""
    return logits[:, 0]


def linear(images):
    return (images.flatten(1) * WEIGHTS.to(images)).sum(1, keepdim=True)


PAIRS = torch.tensor(
    [
        [0, 1.5, 0, 0, -1, 0],
        [0, 0, 0, 2, 0, 0],
        [0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, -1.5, 0],
        [0, 0, 0, 0, 0, 2],
        [0, 0, 0, 0, 0, 0],
    ]
)


def quadratic(images):
    """Multilinear with interactions."""
    z = images.flatten(1)
    return (z * WEIGHTS.to(z)).sum(1, keepdim=True) + torch.einsum("nr,rs,ns->n", z, PAIRS.to(z), z)[:, None]


def toy(model, **options):
    return CVI(model, **({"partition": ONE_EACH, "baseline": 0.0, "evidence": take, "estimator": "gradient"} | options))


def table(model, clusters=6):
    """All masks and their evidence by one call each, in float64."""
    masks = list(itertools.product([0, 1], repeat=clusters))
    return masks, [float(model(torch.tensor(z, dtype=torch.float64).view(1, 1, 2, 3))) for z in masks]


def derivative(values, theta):
    """∂E_q[ℓ]/∂θ for every cluster by direct summation over all masks."""
    masks, found = values
    out = []
    for r in range(len(theta)):
        total = 0.0
        for z, value in zip(masks, found, strict=True):
            chance = math.prod(t if on else 1 - t for s, (t, on) in enumerate(zip(theta, z, strict=True)) if s != r)
            total += chance * value * (1 if z[r] else -1)
        out.append(total)
    return torch.tensor(out)


def network(channels=3, classes=5, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 6, 3, stride=2),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, classes),
        )
    for p in net.parameters():
        p.data *= 2
    return net.eval()


def photo(n=1, c=3, h=24, w=20, seed=0):
    coarse = torch.rand(n, c, 5, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, (h, w), mode="bilinear")


def quarters(h=24, w=20):
    return (torch.arange(h)[:, None] * 2 // h) * 2 + torch.arange(w) * 2 // w


# ---------------------------------------------------------------- enumeration


@pytest.mark.parametrize("prior", [0.5, 0.2])
@pytest.mark.parametrize("temperature", [1.0, 0.4, 3.0])
@pytest.mark.parametrize("model", [linear, quadratic])
def test_exact_posterior_against_a_loop(model, temperature, prior):
    found = exact_posterior(
        model, WHOLE[0], ONE_EACH, 0, baseline=0.0, evidence=take, temperature=temperature, prior=prior, batch_size=7
    )
    masks, values = table(model)
    joint = [
        math.prod(prior if on else 1 - prior for on in z) * math.exp(v / temperature)
        for z, v in zip(masks, values, strict=True)
    ]
    marginal = [sum(j for j, z in zip(joint, masks, strict=True) if z[r]) / sum(joint) for r in range(6)]
    assert torch.allclose(found.probability, torch.tensor(marginal, dtype=torch.float64), atol=1e-6)
    assert float(found.log_evidence) == pytest.approx(temperature * math.log(sum(joint)), abs=1e-5)
    assert torch.allclose(found.banzhaf.float(), derivative((masks, values), [0.5] * 6), atol=1e-5)
    theta = [0.1, 0.9, 0.5, 0.3, 0.0, 1.0]
    expected = sum(
        math.prod(t if on else 1 - t for t, on in zip(theta, z, strict=True)) * v
        for z, v in zip(masks, values, strict=True)
    )
    assert float(found.expected_evidence(torch.tensor(theta))) == pytest.approx(expected, abs=1e-5)


def test_exact_posterior_of_a_real_digit_against_a_loop():
    digit = load_digits("report")[0:1]
    image = digit.images[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = load_classifier("mnist_cnn", pretrained=False)
    labels = (torch.arange(28)[:, None] // 14) * 3 + torch.arange(28) // 10  # 6 tiles
    found = exact_posterior(model, image, labels, int(digit.labels[0]), baseline="black", temperature=0.1)
    values = []
    private = Classifier(model.model.double())
    for z in itertools.product([0.0, 1.0], repeat=6):
        mask = torch.zeros(28, 28, dtype=torch.float64)
        for r, on in enumerate(z):
            mask[labels == r] = on
        values.append(private((mask * image.double())[None]).log_softmax(1)[0, digit.labels[0]].item())
    values = torch.tensor(values, dtype=torch.float64)
    weight = (values / 0.1).softmax(0)
    bits = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)
    assert torch.allclose(found.probability, weight @ bits, atol=1e-5)
    log_z = 0.1 * ((values / 0.1).logsumexp(0) - 6 * math.log(2))
    assert float(found.log_evidence) == pytest.approx(float(log_z), abs=1e-5)


def test_exact_posterior_refuses_what_it_cannot_enumerate():
    x = photo()
    with pytest.raises(ValueError, match="`partition` must have at most 16 clusters to be enumerated, got 480"):
        exact_posterior(network(), x, torch.arange(480).view(24, 20), 0)
    with pytest.raises(ValueError, match="`baseline` must be a single one"):
        exact_posterior(network(), x, quarters(), 0, baseline="mixed")
    with pytest.raises(ValueError, match="`prior` must be"):
        exact_posterior(network(), x, quarters(), 0, prior=1.0)


# ---------------------------------------------------------------- closed forms of the additive model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weighting": "uniform"},
        {"relaxation": 0.0},
        {"steps": 3},
        {"steps": 4, "learning_rate": 1.0},
        {"prior": 0.2},
        {"temperature": 0.3},
        {"prior": 0.9, "temperature": 4.0},
    ],
)
def test_gradients_find_the_posterior_of_an_additive_model_exactly(options):
    """η = η⁰ + w/β, a product, so that the bound is log Z."""
    posterior = toy(linear, budget=800, **options).infer(WHOLE, 0)
    prior, beta = options.get("prior", 0.5), options.get("temperature", 1.0)
    expected = math.log(prior / (1 - prior)) + WEIGHTS / beta
    assert torch.allclose(posterior.log_odds[0][0], expected, atol=1e-4)
    assert torch.allclose(posterior.probability[0], expected.sigmoid(), atol=1e-4)
    assert posterior.standard_error.max() < 1e-3
    assert torch.allclose(posterior.criticality[0], (WEIGHTS / beta).view(2, 3), atol=1e-4)  # one pixel each
    truth = exact_posterior(linear, WHOLE, ONE_EACH, 0, baseline=0.0, evidence=take, prior=prior, temperature=beta)
    assert torch.allclose(truth.probability.float(), posterior.probability[0], atol=1e-4)
    log_z = beta * sum(math.log(1 - prior + prior * math.exp(float(w) / beta)) for w in WEIGHTS)
    assert float(truth.log_evidence) == pytest.approx(log_z, abs=1e-4)
    assert abs(float(posterior.bound[0]) - log_z) < 4.5 * float(posterior.bound_error[0])


def test_criticality_is_per_pixel_and_signed_information_is_a_divergence():
    labels = torch.tensor([[0, 0, 1], [0, 1, 1]])
    posterior = toy(linear, partition=labels, budget=8).infer(WHOLE, 0)
    for k, w in enumerate([1 - 2 + 3.0, 0.5 + 0 - 0.7]):
        assert torch.allclose(posterior.criticality[0][labels == k], torch.tensor(w / 3))
        p = 1 / (1 + math.exp(-w))
        kl = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
        assert float(posterior.information[0, k]) == pytest.approx(math.copysign(kl, w), abs=1e-5)
    frame = posterior.to_frame()
    assert frame.area.tolist() == [3, 3] and np.allclose(frame.criticality, [2 / 3, -0.2 / 3], atol=1e-5)


@given(st.floats(-8, 8), st.floats(-5, 5))
def test_kl_of_bernoullis(a, b):
    p, q = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert float(bernoulli_kl(torch.tensor(a, dtype=torch.float64), b)) == pytest.approx(kl, abs=1e-9)


# ---------------------------------------------------------------- estimators with interactions


def estimates(seeds, **options):
    """η − η⁰ for many seeds (S, R)."""
    prior = options.get("prior", 0.5)
    return torch.stack(
        [
            toy(quadratic, seed=s, **options).infer(WHOLE, 0).log_odds[0][0] - math.log(prior / (1 - prior))
            for s in range(seeds)
        ]
    )


def assert_unbiased(found, truth):
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - truth).abs() <= 4 * error + 1e-5).all(), (found.mean(0) - truth) / error


@pytest.mark.parametrize(
    "options",
    [
        {"relaxation": 1.0, "prior": 0.5},
        {"relaxation": 0.0, "prior": 0.5},
        {"relaxation": 0.0, "prior": 0.8},
    ],
)
def test_gradient_estimator_is_unbiased(options):
    """Hard gates anywhere; relaxed ones at ½, where they are uniform. ℓ is multilinear."""
    found = estimates(150, weighting="uniform", budget=12, **options)
    assert_unbiased(found, derivative(table(quadratic), [options["prior"]] * 6))


@pytest.mark.parametrize(
    "budget, prior",
    [
        (6, 0.5),
        (18, 0.5),
        (66, 0.7),
    ],
)
def test_forward_estimator_is_unbiased(budget, prior):
    found = estimates(500 if budget < 60 else 250, estimator="forward", budget=budget, prior=prior)
    assert_unbiased(found, derivative(table(quadratic), [prior] * 6))


def test_forward_estimator_is_consistent_and_its_error_falls_as_one_over_root_n():
    truth = derivative(table(quadratic), [0.5] * 6)
    rms = [(estimates(40, estimator="forward", budget=b) - truth).square().mean().sqrt() for b in (32, 128, 512)]
    for coarse, fine in itertools.pairwise(rms):
        assert 1.5 < float(coarse / fine) < 2.8


def test_forward_and_gradient_estimators_agree_on_a_network():
    """No gradients needed, and the Banzhaf value of enumeration is what both of them find."""
    x, labels = photo(h=10, w=10), quarters(10, 10)
    weights = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)) / 5
    model = Classifier(lambda images: images.flatten(1) @ weights)
    common = {"partition": labels, "baseline": "grey", "budget": 3000, "batch_size": 500, "evidence": "logit"}
    truth = exact_posterior(model, x, labels, 1, baseline="grey", evidence="logit").banzhaf.float()
    forward = CVI(model, estimator="forward", **common).infer(x, 1)
    gradient = CVI(model, estimator="gradient", **common).infer(x, 1)
    assert torch.allclose(gradient.log_odds[0][0], truth, atol=1e-4)
    assert torch.allclose(forward.log_odds[0][0], truth, atol=0.1 * truth.abs().sum().item())
    assert forward.evaluations.backward == 0


def coverage(estimator, model, **options):
    truth = derivative(table(model), [0.5] * 6).sigmoid() if estimator == "forward" else None
    inside = []
    for seed in range(100):
        posterior = toy(model, estimator=estimator, budget=66, temperature=1.0, seed=seed, **options).infer(WHOLE, 0)
        low, high = posterior.interval[0].unbind(-1)
        inside.append((low <= truth) & (truth <= high))
    return torch.stack(inside).double().mean().item()


def test_intervals_cover_as_often_as_they_say():
    assert 0.85 <= coverage("forward", linear) <= 0.95


def test_confidence_interval():
    posterior = toy(linear, estimator="forward").infer(WHOLE, 0)
    narrow, wide = posterior.confidence_interval(0.5), posterior.confidence_interval(0.99)
    p = posterior.probability
    assert (wide[..., 0] < narrow[..., 0]).all() and (narrow[..., 1] < wide[..., 1]).all()
    assert (narrow[..., 0] < p).all() and (p < narrow[..., 1]).all() and (wide >= 0).all() and (wide <= 1).all()
    assert torch.equal(posterior.interval, posterior.confidence_interval(0.9))
    z = 1.959964  # of the normal distribution at 97.5 %
    half = z * posterior.standard_error / (p * (1 - p))
    assert torch.allclose(posterior.confidence_interval(0.95)[..., 1], (p.logit() + half).sigmoid(), atol=1e-5)
    for level in (0, 1, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"`level` must be a finite number in \(0, 1\)"):
            posterior.confidence_interval(level)


# ---------------------------------------------------------------- bound and mean field


@pytest.mark.parametrize("model", [linear, quadratic])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_bound_is_below_log_z_and_is_that_of_the_reported_posterior(model, temperature):
    posterior = toy(model, budget=6400, temperature=temperature, batch_size=800).infer(WHOLE, 0)
    truth = exact_posterior(model, WHOLE, ONE_EACH, 0, baseline=0.0, evidence=take, temperature=temperature)
    q = posterior.probability[0].double()
    kl = (q * (2 * q).log() + (1 - q) * (2 * (1 - q)).log()).nan_to_num(math.log(2)).sum()
    exact = float(truth.expected_evidence(q) - temperature * kl)
    assert exact <= float(truth.log_evidence) + 1e-4
    assert abs(float(posterior.bound[0]) - exact) < 4.5 * float(posterior.bound_error[0]) + 1e-3


def test_few_clusters_are_inferred_with_their_interactions():
    """64 of 4,096 masks of a network's game nearly give its exact marginals, and more give them better."""
    x, cells, model = photo(), grid_partition(photo(), 3)[0], network()
    truth = exact_posterior(model, x, cells[0], 1, baseline="blur")
    for budget, near in ((64, 0.03), (400, 0.01)):
        found = CVI(model, partition=cells, budget=budget).infer(x, 1)
        assert found.evaluations.backward == 0 and found.evaluations.forward <= budget
        assert (found.log_odds[0][0].sigmoid() - truth.probability).abs().max() < near
        assert float(found.bound[0]) <= float(truth.log_evidence) + 0.02
        low, high = found.bound_interval[0].tolist()
        assert low <= float(found.bound[0]) <= high
    regions = found.regions(4)
    assert torch.allclose(regions.evidence.sum(), found.map.sum(), atol=1e-4) and (regions.deviation >= 0).all()


@pytest.mark.parametrize("estimator", ["gradient", "forward"])
def test_steps_converge_to_the_mean_field_fixed_point(estimator):
    """The fixed point θ = σ(∂E_q[ℓ]/∂θ / β), by coordinate ascent over the enumerated game."""
    beta, values = 4.0, table(quadratic)
    theta = [0.5] * 6
    for _ in range(100):
        for r in range(6):
            theta[r] = 1 / (1 + math.exp(-float(derivative(values, theta)[r]) / beta))
    common = {"estimator": estimator, "weighting": "uniform", "relaxation": 0.0, "temperature": beta}
    many = toy(quadratic, budget=24000, steps=12, learning_rate=0.6, batch_size=2000, **common).infer(WHOLE, 0)
    one = toy(quadratic, budget=24000, batch_size=2000, **common).infer(WHOLE, 0)
    target = torch.tensor(theta)
    assert (many.probability[0] - target).abs().max() < 0.02
    assert (many.probability[0] - target).abs().max() < 0.5 * (one.probability[0] - target).abs().max()
    assert many.trace.shape == (12, 1) and many.bound[0] >= one.bound[0] - 3 * one.bound_error[0]


# ---------------------------------------------------------------- batches, seeds, cost


@pytest.mark.parametrize(
    "partition", ["mean_shift", "grid", ["mean_shift", "grid"], lambda x: quarters().expand(len(x), -1, -1)]
)
def test_a_batch_is_its_single_images(partition):
    x = torch.cat([photo(2), torch.full((1, 3, 24, 20), 0.3)])  # the last has few clusters
    cvi = CVI(network(), partition=partition, budget=20)
    whole, target = cvi.infer(x, [0, 1, 2]), torch.tensor([0, 1, 2])
    for i in range(3):
        one = cvi.infer(x[i : i + 1], target[i : i + 1])
        count = int(one.clusters[0])
        assert count == int(whole.clusters[i]) and torch.equal(one.partition[0], whole.partition[i])
        assert torch.allclose(one.criticality[0], whole.criticality[i], atol=1e-6)
        assert torch.allclose(one.probability[0], whole.probability[i, :count], atol=1e-6)
        assert torch.allclose(one.bound, whole.bound[i], atol=1e-5)
        assert (whole.probability[i, count:] == 0.5).all() and (whole.standard_error[i, count:] == 0).all()
    assert len(whole) == 3 and len(whole.to_frame()) == int(whole.clusters.sum())


@pytest.mark.parametrize("estimator", ["gradient", "forward"])
def test_batch_size_changes_nothing(estimator):
    found = [CVI(network(), budget=23, batch_size=b, estimator=estimator).infer(photo(2)) for b in (1, 5, 64)]
    for other in found[1:]:
        assert torch.allclose(other.criticality, found[0].criticality, atol=1e-6)
        assert torch.allclose(other.bound, found[0].bound, atol=1e-5)


def test_seeds_and_the_global_generators():
    model, x = network(), photo()
    state, other = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = CVI(model, seed=1).infer(x)
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(other, np.random.get_state()[1])  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert torch.equal(CVI(model, seed=1).infer(x).criticality, first.criticality)
    assert not torch.equal(CVI(model, seed=2).infer(x).criticality, first.criticality)


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 4},
        {"budget": 5},
        {"budget": 65},
        {"budget": 31, "steps": 7},
        {"budget": 33, "estimator": "forward"},
        {"budget": 40, "partition": "mean_shift"},
    ],
)
@pytest.mark.parametrize("target", [None, 1])
def test_evaluations_are_within_the_budget_and_equal_to_the_counter(options, target):
    calls = []

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            calls.append(len(x))
            return self.net(x)

    model, budget = Classifier(Counted()), options["budget"]
    spent = CVI(model, **({"partition": "grid", "batch_size": 8} | options)).infer(photo(2), target).evaluations
    assert sum(calls) == 2 * spent.forward and model.evaluations == Evaluations(2 * spent.forward, 2 * spent.backward)
    assert spent.forward == budget and max(calls) <= 8
    from_draws = "steps" not in options  # which bound log Z themselves
    kept_for_bound = 0 if from_draws else max(2, (budget - (target is None)) // 16)
    expected = 0 if options.get("estimator") else budget - kept_for_bound - (target is None)
    assert spent.backward == expected


# ---------------------------------------------------------------- partitions, paint, blur, baselines


def test_partitions_by_name_callable_labels_and_sequence():
    x = photo(2)
    named = partitions_of("grid", x)
    assert named.shape == (1, 2, 24, 20) and named.dtype == torch.int64
    assert torch.equal(partitions_of(grid_partition, x), named) and torch.equal(partitions_of(named, x), named)
    shifted = quarters() * 7 - 3  # gaps and negative labels
    assert torch.equal(partitions_of(shifted, x)[0, 1], quarters())
    assert torch.equal(partitions_of(quarters().expand(2, -1, -1), x)[0, 0], quarters())
    several = partitions_of(["grid", quarters(), "mean_shift"], x)
    assert len(several) == 5 and torch.equal(several[0], named[0]) and torch.equal(several[1, 0], quarters())
    assert torch.equal(partitions_of("mean_shift", x), several[2:])
    assert int(partitions_of(lambda images: segment(images)[0], x).amax()) >= 0
    model = network()
    assert torch.equal(CVI(model, partition=several, budget=8).infer(x, 0).partitions, several)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 16))
@settings(max_examples=30, deadline=None)
def test_grid_is_made_of_squares(height, width, cells):
    labels = grid_partition(torch.zeros(1, 1, height, width), cells)[0, 0].numpy()
    side = -(-min(height, width) // cells)
    for i, j in ((0, 0), (height - 1, width - 1), (height // 2, width // 3)):
        expected = (np.arange(height)[:, None] // side == i // side) & (np.arange(width) // side == j // side)
        assert np.array_equal(labels == labels[i, j], expected)


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_common_refinement_by_brute_force(count, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = torch.stack(
        [torch.randint(3, (height, width), generator=generator).unique(return_inverse=True)[1] for _ in range(count)]
    )
    values = [torch.rand(int(p.max()) + 1, generator=generator) for p in parts]
    refined, first = refine(parts)
    mean = torch.stack([v[p.flatten()[first]] for v, p in zip(values, parts, strict=True)]).mean(0)
    numbers = {}
    for i, j in itertools.product(range(height), range(width)):
        key = tuple(int(p[i, j]) for p in parts)
        assert int(refined[i, j]) == numbers.setdefault(key, len(numbers))
    for key, number in numbers.items():
        expected = sum(float(v[k]) for v, k in zip(values, key, strict=True)) / count
        assert float(mean[number]) == pytest.approx(expected, abs=1e-6)
    assert len(mean) == len(numbers)


def test_several_partitions_are_averaged():
    x, model = photo(), network()
    parts = [quarters(), (torch.arange(24)[:, None] // 6).expand(24, 20).contiguous()]
    both = CVI(model, partition=parts, budget=40, baseline="grey").infer(x, 0)
    for i, j in ((0, 0), (13, 3), (23, 19)):
        chance = [float(both.log_odds[k][0, parts[k][i, j]].sigmoid()) for k in range(2)]
        nats = [float(both.log_odds[k][0, parts[k][i, j]]) / int((parts[k] == parts[k][i, j]).sum()) for k in range(2)]
        assert float(both.probability[0, both.partition[0, i, j]]) == pytest.approx(sum(chance) / 2, abs=1e-6)
        assert float(both.criticality[0, i, j]) == pytest.approx(sum(nats) / 2, abs=1e-6)


@given(st.integers(1, 5), st.integers(12, 20), st.sampled_from([0.0, 0.6, 1.0]), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_paint_and_collect_are_adjoint_away_from_the_edge(clusters, side, feather, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(clusters, (side, side), generator=generator)
    z = torch.randn(2, clusters, dtype=torch.float64, generator=generator)
    maps = torch.zeros(2, side, side, dtype=torch.float64)
    edge = math.ceil(3 * feather)
    inner = slice(edge, side - edge)
    maps[:, inner, inner] = torch.randn(maps[:, inner, inner].shape, dtype=torch.float64, generator=generator)
    # Maps that end a blur's radius before the edge see no reflection once they are blurred.
    left = (paint(z, labels, feather) * maps).sum((1, 2))
    right = (z * collect(maps, labels, clusters, feather)).sum(1)
    if feather:  # of the images that are painted, the outermost ring of radius pixels is not reflected back
        ring = torch.zeros(side, side, dtype=torch.bool)
        ring[2 * edge : side - 2 * edge, 2 * edge : side - 2 * edge] = True
        maps = maps * ring
        left = (paint(z, labels, feather) * maps).sum((1, 2))
        right = (z * collect(maps, labels, clusters, feather)).sum(1)
    assert torch.allclose(left, right, atol=1e-9)


def test_collect_against_a_loop_and_for_clusters_that_are_missing():
    labels = torch.tensor([[0, 2], [2, 4]])
    maps = torch.tensor([[[1.0, 2], [3, 4]], [[5, 6], [7, 8]]])
    assert collect(maps, labels, 6).tolist() == [[1, 0, 5, 0, 4, 0], [5, 0, 13, 0, 8, 0]]


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5])
def test_blur_against_scipy(sigma):
    x = torch.rand(2, 3, 21, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    radius = math.ceil(3 * sigma)
    for i, c in itertools.product(range(2), range(3)):
        expected = scipy.ndimage.gaussian_filter(x[i, c].numpy(), sigma, mode="mirror", radius=radius)
        assert np.allclose(blurred(x, sigma)[i, c], expected, atol=1e-12)
    if sigma != 0.3:
        expected = scipy.ndimage.gaussian_filter(x[0, 0].numpy(), sigma, mode="mirror", truncate=3)
        assert np.allclose(blurred(x[:, 0], sigma)[0], expected, atol=1e-12)
    assert blurred(x, 0) is x and torch.allclose(blurred(torch.full_like(x, 0.7), 9.0), torch.full_like(x, 0.7))


def test_baselines():
    x = photo(2)
    mixed = make_baselines("mixed", x)
    assert mixed.shape == (2, 2, 3, 24, 20) and (mixed[1] == 0.5).all() and torch.equal(mixed[0], BASELINES["blur"](x))
    assert torch.equal(make_baselines(0.25, x)[0], torch.full_like(x, 0.25))
    assert torch.allclose(make_baselines("mean", x)[0, 1, 2], x[1, 2].mean().expand(24, 20))
    own = torch.rand(3, 1, 1)
    assert torch.equal(make_baselines([own, "black", 1], x)[0], own.expand_as(x))
    noise = make_baselines("noise", x)[0]
    assert torch.equal(noise[0], noise[1]) and noise.min() >= 0 and noise.max() <= 1 and noise.std() > 0.2
    for name in BASELINES:
        found = make_baselines(name, x)
        assert found.shape == (1, *x.shape) and found.min() >= 0 and found.max() <= 1


# ---------------------------------------------------------------- invariances


@pytest.mark.parametrize("options", [{}, {"estimator": "forward"}, {"feather": 1.0}, {"baseline": "mixed", "steps": 2}])
def test_flipped_world_flipped_map(options):
    net, x = network(), photo()
    options = {"partition": quarters(), "budget": 24} | options
    plain = CVI(net, **options).infer(x, 1)
    flipped = CVI(lambda images: net(images.flip(3)), **(options | {"partition": quarters().flip(1)})).infer(
        x.flip(3), 1
    )
    assert torch.allclose(flipped.criticality.flip(2), plain.criticality, atol=1e-6)
    assert torch.allclose(flipped.bound, plain.bound, atol=1e-5)


def test_temperature_divides_the_weight_of_evidence():
    found = [
        CVI(network(), partition=quarters(), weighting="uniform", temperature=t).infer(photo(), 1) for t in (1.0, 4.0)
    ]
    assert torch.allclose(found[0].criticality, 4 * found[1].criticality, atol=1e-6)


def test_a_model_that_does_not_look_has_a_map_of_zeros():
    def blind(images):
        return torch.tensor([[1.0, 2, 3]]).expand(len(images), -1) + 0 * images.sum()

    for options in ({}, {"estimator": "forward"}, {"partition": quarters(), "steps": 2}):
        posterior = CVI(blind, **options).infer(photo(2))
        assert posterior.criticality.abs().max() < 1e-6 and (posterior.probability - 0.5).abs().max() < 1e-6
        assert posterior.standard_error.max() < 1e-6 and posterior.interval.isfinite().all()
        assert (
            torch.allclose(posterior.bound, torch.tensor([1.0, 2, 3]).log_softmax(0)[2])
            and (posterior.target == 2).all()
        )


def test_what_is_not_looked_at_gets_nothing():
    net = network()
    x = photo()

    def left(images):
        return net(images[..., :10])

    posterior = CVI(left, partition=quarters(), budget=16).infer(x, 0)
    assert (posterior.criticality[..., 10:] == 0).all() and (posterior.criticality[..., :10] != 0).all()


# ---------------------------------------------------------------- any model, any image


@pytest.mark.parametrize("c, h, w, classes", [(1, 28, 28, 10), (3, 31, 17, 1000), (4, 12, 40, 2)])
def test_grey_and_colour_of_any_shape(c, h, w, classes):
    net = network(c, classes).train().requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    posterior = CVI(net, budget=12).infer(photo(2, c, h, w))
    assert posterior.criticality.shape == posterior.partition.shape == (2, h, w)
    assert posterior.criticality.isfinite().all() and posterior.criticality.std() > 0
    assert posterior.criticality.dtype == torch.float32 and not posterior.criticality.requires_grad
    assert all(m.training for m in net.modules()) and all(
        torch.equal(before[k], v) for k, v in net.state_dict().items()
    )
    assert str(posterior).startswith("Posterior(images=2, clusters=[")


def test_a_vision_transformer_and_the_digit_network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=7)
        nn.init.normal_(vit.heads.head.weight)
        digits = mnist_cnn()
    assert CVI(vit, budget=8).infer(photo(1, 3, 32, 32)).criticality.std() > 0
    assert CVI(digits, budget=8, baseline="black").infer(load_digits("report").images[:2]).criticality.std() > 0


def test_targets():
    cvi, x = CVI(network(), partition=quarters(), budget=8), photo(2)
    own = cvi.model.logits(x).argmax(1)
    assert torch.equal(cvi.infer(x).target, own)
    assert torch.equal(cvi.infer(x, 3).criticality, cvi.infer(x, [3, 3]).criticality)
    mask = nn.functional.one_hot(torch.tensor([3, 3]), 5).bool()
    assert torch.allclose(cvi.infer(x, mask).criticality, cvi.infer(x, 3).criticality, atol=1e-6)
    everything = cvi.infer(x, torch.ones(2, 5, dtype=torch.bool))
    assert everything.criticality.abs().max() < 1e-6 and everything.bound.abs().max() < 1e-5


def test_attribute_and_captum():
    cvi, x = CVI(network(), partition="grid", budget=12), photo(2)
    found = cvi.attribute(x, target=torch.tensor([1, 2]))
    assert found.shape == x.shape and torch.allclose(found.sum(1), cvi.infer(x, [1, 2]).criticality, atol=1e-7)

    def explained(inputs, target):  # Captum passes tuples of inputs and expects one back
        return (cvi.attribute(inputs if isinstance(inputs, torch.Tensor) else inputs[0], target),)

    with torch.random.fork_rng(devices=[]):
        change = sensitivity_max(explained, 0.1 + 0.8 * x, n_perturb_samples=2, target=torch.tensor([1, 2]))
    assert change.shape == (2,) and change.isfinite().all() and (change > 0).all()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"family": "noises"}, "`family` must be one of"),
        ({"estimator": "x"}, "`estimator` must be one of"),
        ({"weighting": "x"}, "`weighting` must be one of"),
        ({"evidence": "x"}, "`evidence` must be one of"),
        ({"budget": 3}, "`budget` must be an integer of at least 4, got 3"),
        ({"budget": 64.0}, "`budget` must be"),
        ({"budget": 10, "steps": 3}, "`budget` must be an integer of at least 12"),
        ({"steps": 0}, "`steps` must be"),
        ({"batch_size": 0}, "`batch_size` must be"),
        ({"prior": 0}, "`prior` must be"),
        ({"prior": 1.0}, "`prior` must be"),
        ({"prior": math.nan}, "`prior` must be"),
        ({"temperature": 0.0}, "`temperature` must be"),
        ({"temperature": math.inf}, "`temperature` must be"),
        ({"relaxation": 1.1}, "`relaxation` must be"),
        ({"coarse": -0.1}, "`coarse` must be"),
        ({"learning_rate": 2}, "`learning_rate` must be"),
        ({"budget": True}, "`budget` must be an integer"),
        ({"budget": math.nan}, "`budget` must be an integer"),
        ({"smoothing": ()}, "`smoothing` must name a width"),
        ({"smoothing": (2,), "estimator": "forward"}, "`smoothing` must"),
        ({"tolerance": 1}, "`tolerance` must be"),
        ({"progress": 1}, "`progress` must be True or False"),
        ({"seed": -1}, "`seed` must be"),
        ({"prior": "half"}, '`prior` must be a number in .0, 1. or "uniform"'),
        ({"learning_rate": "fast"}, "`learning_rate` must be"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        CVI(network(), **options)


def test_a_model_must_be_callable():
    with pytest.raises(TypeError, match="`model` must be"):
        CVI("resnet")


@pytest.mark.parametrize(
    "partition, message",
    [
        ("slic", "`partition` must be one of"),
        ([], "`partition` must name at least one"),
        (quarters().float(), "`partition` must be integers.*got torch.float32"),
        (quarters().bool(), "`partition` must be integers.*got torch.bool"),
        (quarters()[:-1], r"`partition` must have shape \(2, 24, 20\).*got \(23, 20\)"),
        (lambda x: x, "`partition` must be integers.*got torch.float32"),
        (lambda x: None, "`partition` must.*got NoneType"),
        (quarters().expand(2, 3, -1, -1), r"`partition` must have shape \(2, 24, 20\).*got \(3, 24, 20\)"),
        (["grid", "x"], "`partition`"),
    ],
)
def test_bad_partitions_are_refused_by_name(partition, message):
    with pytest.raises((ValueError, TypeError), match=message):
        CVI(network(), partition=partition).infer(photo(2), 0)


@pytest.mark.parametrize(
    "baseline, message",
    [
        ("pink", "`baseline` must be"),
        (1.5, r"`baseline` must be .* in \[0, 1\], got 1.5"),
        (math.nan, "`baseline` must be"),
        (torch.full((1,), 2.0), r"`baseline` must be in \[0, 1\]"),
        (True, "`baseline` must be"),
        (object(), "`baseline` must be"),
        (torch.zeros(2, 3, 24, 21), "`baseline` must broadcast"),
        ([], "`baseline` must name"),
        (["blur", "x"], "`baseline`"),
    ],
)
def test_bad_baselines_are_refused_by_name(baseline, message):
    with pytest.raises((ValueError, TypeError), match=message):
        CVI(network(), baseline=baseline, partition="grid").infer(photo(2), 0)


@pytest.mark.parametrize(
    "target",
    [
        -1,
        [0, 1, 2],
        [0.0, 1.0],
        True,
        "cat",
        torch.zeros(2, 5, dtype=torch.int64),
        torch.zeros(3, 5, dtype=torch.bool),
    ],
)
def test_bad_targets_are_refused_by_name(target):
    with pytest.raises((ValueError, TypeError), match="`target` must"):
        CVI(network(), partition="grid").infer(photo(2), target)


@pytest.mark.parametrize(
    "images, error",
    [
        (torch.rand(3, 24, 20), ValueError),
        (torch.rand(1, 3, 24, 20) * 255, ValueError),
        (np.zeros((1, 3, 8, 8)), TypeError),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError),
        (torch.full((1, 3, 8, 8), math.nan), ValueError),
        (torch.zeros(0, 3, 8, 8), ValueError),
    ],
)
def test_bad_images_are_refused_by_name(images, error):
    with pytest.raises(error, match="`images` must"):
        CVI(network(), partition="grid").infer(images, 0)


@pytest.mark.parametrize("estimator", ["gradient", "forward"])
def test_a_model_of_nan_is_refused(estimator):
    def broken(images):
        return images.flatten(1)[:, :5] * math.nan

    with pytest.raises(ValueError, match="`model` must give finite logits"):
        CVI(broken, partition="grid", estimator=estimator).infer(photo(), 0)


def test_a_model_without_gradients_is_sent_to_the_forward_estimator():
    net = network()

    @torch.no_grad()
    def closed(images):
        return net(images)

    with pytest.raises(ValueError, match='estimator="forward"'):
        CVI(closed, partition="grid").infer(photo(), 0)
    assert CVI(closed, partition="grid", estimator="forward").infer(photo(), 0).criticality.std() > 0


@pytest.mark.parametrize(
    "options, target, name",
    [
        ({}, 7, "target"),
        ({}, torch.ones(2, 4, dtype=torch.bool), "target"),
        ({}, torch.zeros(2, 5).bool(), "target"),
        ({"prior": "half"}, 0, "prior"),
        ({"seed": "x"}, 0, "seed"),
        ({"feather": -1}, 0, "feather"),
        ({"feather": math.nan}, 0, "feather"),
        ({"partition": 3}, 0, "partition"),
        ({"partition": None}, 0, "partition"),
        ({"partition": quarters().expand(3, -1, -1)}, 0, "partition"),
        ({"evidence": ["margin"]}, 0, "evidence"),
        ({"evidence": lambda z, y: z}, 0, "evidence"),
        ({"evidence": lambda z, y: z.mean()}, 0, "evidence"),
    ],
)
def test_these_too_should_be_refused_by_name(options, target, name):
    with pytest.raises((ValueError, TypeError), match=f"`{name}` must"):
        CVI(network(), **({"partition": "grid"} | options)).infer(photo(2), target)


# ---------------------------------------------------------------- densities, draws, stopping


def shapley(values, clusters=6):
    """Shapley values by the sum over all subsets of the others."""
    masks, found = values
    of = {tuple(z): v for z, v in zip(masks, found, strict=True)}
    out = torch.zeros(clusters)
    for r in range(clusters):
        for z in masks:
            if not z[r]:
                size = sum(z)
                share = math.factorial(size) * math.factorial(clusters - size - 1) / math.factorial(clusters)
                out[r] += share * (of[tuple(1 if s == r else on for s, on in enumerate(z))] - of[tuple(z)])
    return out


@pytest.mark.parametrize("options", [{"relaxation": 0.0}, {"relaxation": 1.0}, {"estimator": "forward"}])
def test_density_averaged_first_step_is_the_shapley_value(options):
    """Of a game whose Banzhaf values differ: three clusters that must all be there."""

    def together(images):
        z = images.flatten(1)
        return 3 * (z[:, 0] * z[:, 1] * z[:, 2])[:, None] + quadratic(images)

    truth = shapley(table(together))
    banzhaf = derivative(table(together), [0.5] * 6)
    assert (truth - banzhaf)[:3].min() > 0.2
    found = toy(together, prior="uniform", weighting="uniform", budget=20_000, batch_size=2000, **options)
    wide = 0.25 if options.get("estimator") else 0.12  # draws near densities 0 and 1 are rare and weigh much
    assert torch.allclose(found.infer(WHOLE, 0).log_odds[0][0], truth, atol=wide)
    fixed = toy(together, weighting="uniform", budget=20_000, batch_size=2000, **options)
    assert torch.allclose(fixed.infer(WHOLE, 0).log_odds[0][0], banzhaf, atol=0.12)


@pytest.mark.parametrize("kind", ["independent", "antithetic", "stratified", "sobol"])
def test_every_kind_of_draws_is_unbiased(kind):
    found = estimates(150, weighting="uniform", budget=20, relaxation=0.0, variance_reduction=kind)
    assert_unbiased(found, derivative(table(quadratic), [0.5] * 6))


def test_variance_reduction_reduces_variance():
    """Antithetic gates remove what is odd about the middle: here all of it, since derivatives are affine."""
    spread = {
        kind: estimates(60, weighting="uniform", budget=20, relaxation=0.0, variance_reduction=kind).std(0).max()
        for kind in ("independent", "antithetic", "stratified", "sobol")
    }
    assert max(spread["antithetic"], spread["stratified"], spread["sobol"]) < 1e-5 < spread["independent"]


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("relaxation", [0.0, 0.4, 1.0])
def test_gates_have_their_mean_and_mirror_at_one_half(chance, relaxation):
    uniform = ((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)[:, None]
    gates = gates_of(uniform, torch.full((1, 1), chance, dtype=torch.float64), relaxation)
    assert float(gates.mean()) == pytest.approx(chance, abs=1e-3) and gates.min() >= 0 and gates.max() <= 1
    assert (gates.diff(dim=0) <= 1e-12).all()
    if relaxation == 0:
        assert set(gates.flatten().tolist()) == {0.0, 1.0}
    if chance == 0.5:
        assert torch.allclose(gates + gates.flip(0), torch.ones_like(gates))
        if relaxation == 1:  # uniform on (0, 1)
            assert torch.allclose(gates.flip(0), uniform)


@pytest.mark.parametrize("relaxation", [0.0, 1.0])
def test_coarse_masks_come_in_complements_and_keep_their_mean(relaxation):
    half = torch.full((40, 30), 0.5)
    masks = coarse_masks(half, 7, 4, torch.Generator().manual_seed(0), relaxation)
    assert masks.shape == (7, 40, 30) and torch.allclose(masks[0:6:2] + masks[1:6:2], torch.ones(3, 40, 30))
    many = coarse_masks(0.6 * half, 6000, 4, torch.Generator().manual_seed(1), relaxation)
    assert float(many.mean()) == pytest.approx(0.3, abs=0.01) and (many.mean(0) - 0.3).abs().max() < 0.04


def test_error_of_the_gradient_estimator_falls_as_one_over_root_n_or_faster():
    """Of a cubic game, whose derivatives antithetic pairs do not make exact."""

    def cubic(images):
        z = images.flatten(1)
        return 3 * (z[:, 0] * z[:, 1] * z[:, 2])[:, None] + quadratic(images)

    truth = derivative(table(cubic), [0.5] * 6)
    common = {"weighting": "uniform", "relaxation": 0.0}
    for kind in ("antithetic", "sobol"):
        rms = [
            torch.stack(
                [
                    toy(cubic, seed=s, budget=b, variance_reduction=kind, batch_size=256, **common)
                    .infer(WHOLE, 0)
                    .log_odds[0][0]
                    for s in range(30)
                ]
            )
            .sub(truth)
            .square()
            .mean()
            .sqrt()
            for b in (16, 64, 256)
        ]
        assert all(float(coarse / fine) > 1.5 for coarse, fine in itertools.pairwise(rms)), (kind, rms)


def test_a_third_of_the_draws_is_fine_and_half_of_the_coarse_ones_hard():
    plan = schedule(24, 2, 0.5, 3)
    assert sum(n for n, which, _ in plan if which >= 0) == 12
    assert [(which, turn) for _, which, turn in plan if which < 0] == [(-1, 0), (-2, 0)] * 3
    assert {turn for _, _, turn in schedule(60, 3, 1.0, 1)} == {0}
    default = schedule(60, 3, 2 / 3, 1)
    assert [sum(n for n, which, _ in default if which == k) for k in (-2, -1)] == [20, 20]


def test_large_images_are_clustered_at_reduced_size():
    x = nn.functional.interpolate(photo(1), (225, 337), mode="bilinear")
    labels = mean_shift_partition(x)
    assert labels.shape == (3, 1, 225, 337)
    even = labels[..., :224, :336].unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    assert torch.equal(even, even[..., :1, :, :1].expand_as(even))  # two by two pixels alike
    small = nn.functional.interpolate(photo(1), (200, 150), mode="bilinear")
    fine = mean_shift_partition(small)
    assert bool((fine[..., 1::2] != fine[..., ::2]).any())


def test_learning_rate_schedule():
    common = {"steps": 3, "budget": 60, "weighting": "uniform"}
    given = toy(quadratic, learning_rate=lambda t: 1 / t, **common).infer(WHOLE, 0)
    assert torch.equal(given.log_odds[0], toy(quadratic, **common).infer(WHOLE, 0).log_odds[0])


def test_tolerance_stops_and_says_what_was_spent():
    common = {"partition": "grid", "budget": 400, "batch_size": 8}
    model, x = Classifier(network()), photo(2)
    posterior = CVI(model, tolerance=0.1, **common).infer(x, 1)
    assert (posterior.agreement >= 0.9).all() and posterior.bound.isfinite().all()
    assert posterior.spent.max() < 400 and int(posterior.spent.sum()) == model.evaluations.forward
    for i, spent in enumerate(posterior.spent):  # a single image stops where it stopped in the batch
        assert CVI(network(), tolerance=0.1, **common).infer(x[i : i + 1], 1).spent == spent
    assert CVI(network(), tolerance=1e-6, **common).infer(x, 1).spent.tolist() == [400, 400]


def test_anytime_results_end_where_infer_does():
    cvi, x = CVI(network(), partition="grid", budget=64, tolerance=1e-9), photo(2)
    found = list(cvi.anytime(x, 1))
    assert len(found) == 4 and [len(f.trace) for f in found] == [1, 2, 3, 4]
    assert found[0].bound.isnan().all() and torch.equal(found[-1].criticality, cvi.infer(x, 1).criticality)
    assert torch.equal(found[-1].bound, cvi.infer(x, 1).bound)


def test_trace_is_the_bound_of_each_step():
    """With hard gates of the clusters: at the first step E[ℓ], later that of the q before the step, by enumeration."""
    options = {"steps": 2, "weighting": "uniform", "relaxation": 0.0, "budget": 4000, "batch_size": 2000}
    posterior = toy(quadratic, temperature=2.0, **options).infer(WHOLE, 0)
    truth = exact_posterior(quadratic, WHOLE, ONE_EACH, 0, baseline=0.0, evidence=take, temperature=2.0)
    first = (derivative(table(quadratic), [0.5] * 6) / 2).sigmoid().double()
    expected = [truth.expected_evidence(q) - 2 * bernoulli_kl(q.logit(), 0.0).sum() for q in (first * 0 + 0.5, first)]
    assert torch.allclose(posterior.trace[:, 0].double(), torch.stack(expected), atol=0.25)
    assert posterior.trace[1] > posterior.trace[0]


def test_noise_family_and_modes_are_those_of_their_chapters():
    model, x = network(), photo(1)
    noise = CVI(model, "noise", partition=quarters(), budget=24, prior_deviation=0.3).infer(x, 1)
    direct = infer_noise(model, x, 1, partition=quarters(), budget=24, prior_deviation=0.3)
    assert torch.equal(noise.sensitivity, direct.sensitivity)
    assert CVI(model, "noise", partition=quarters(), budget=24).attribute(x, 1).shape == x.shape
    modes = CVI(model, partition=quarters(), baseline="grey", budget=16).infer(x, 1).modes(64)
    assert abs(sum(mode.weight for mode in modes.modes(0)) - 1) < 1e-4


# ---------------------------------------------------------------- one object for all families


def test_an_option_that_a_family_does_not_have_is_an_error():
    for option in ("baseline", "estimator", "tolerance", "coarse", "smoothing", "weighting"):
        with pytest.raises(TypeError, match=f"`{option}` must be an option of CVI"):
            CVI(network(), family="noise", **{option: None})
    with pytest.raises(TypeError, match="`update` must be an option of CVI"):
        CVI(network(), update="gauss_newton")
    with pytest.raises(TypeError, match="did you mean `budget`"):
        CVI(network(), budgte=64)
    with pytest.raises(TypeError, match="`target` must be an option of CVI"):
        CVI(network(), target=3)  # belongs to `infer`
    with pytest.raises(TypeError, match="did you mean `seed`"):
        infer_presence(network(), photo(), 0, sed=1)
    assert CVI(network(), family="noise", prior_deviation=1.5, partition=quarters(), budget=24).infer(photo(), 1)


def test_every_family_answers_to_map_and_attribute():
    assert set(FAMILIES) == {"presence", "noise"}
    x = photo(2)
    for family in FAMILIES:
        cvi = CVI(network(), family, partition=quarters(), budget=24)
        maps = cvi.infer(x, 1).map
        assert maps.shape == (2, 24, 20)
        assert torch.allclose(cvi.attribute(x, 1).sum(1), maps, atol=1e-6) and cvi.budget == 24
    with pytest.raises(ValueError, match="`family` must be 'presence' for `anytime`"):
        CVI(network(), "noise").anytime(x)


def test_old_names_warn_and_do_what_they_did():
    posterior = toy(linear, budget=8).infer(WHOLE, 0)
    with pytest.warns(DeprecationWarning, match="`credible_interval` is now `confidence_interval`"):
        assert torch.equal(posterior.credible_interval(0.5), posterior.confidence_interval(0.5))
    options = {"partition": quarters(), "budget": 24}
    with pytest.warns(DeprecationWarning, match="prior_deviation"):
        old = CVI(network(), "noise", prior=0.3, **options)
    new = CVI(network(), "noise", prior_deviation=0.3, **options)
    assert torch.equal(old.infer(photo(), 1).map, new.infer(photo(), 1).map)


# ---------------------------------------------------------------- what a model or a caller may be like


@pytest.mark.parametrize(
    "target",
    [
        np.array([3, 3]),
        np.int32(3),
        torch.tensor([3], dtype=torch.int32),
        torch.tensor([3, 3], dtype=torch.uint8),
        [(3,), (3,)],
        [torch.tensor(3), torch.tensor(3)],
        (3,),
        np.eye(5, dtype=bool)[[3, 3]],
    ],
    ids=str,
)
def test_whatever_names_a_class_is_a_target(target):
    cvi, x = CVI(network(), partition=quarters(), budget=8), photo(2)
    assert torch.allclose(cvi.infer(x, target).criticality, cvi.infer(x, 3).criticality, atol=1e-6)


def test_numbers_of_numpy_and_torch_are_numbers():
    plain = {"partition": quarters(), "budget": 24, "temperature": 2.0, "prior": 0.25, "seed": 3, "batch_size": 8}
    others = {
        "partition": quarters().int().numpy(),
        "budget": np.int64(24),
        "temperature": np.float32(2),
        "prior": torch.tensor(0.25),
        "seed": np.uint8(3),
        "batch_size": torch.tensor(8),
    }
    x = photo(2)
    found = [CVI(network(), **options).infer(x, 1).criticality for options in (plain, others)]
    assert torch.equal(*found)


@pytest.mark.parametrize("evidence", ["log_probability", "probability", "margin"])
@pytest.mark.parametrize("options", [{}, {"estimator": "forward"}])
def test_a_single_output_is_refused_with_the_remedy(evidence, options):
    """log softmax of one logit is 0 whatever it says, and the map was zero with no word."""
    one = network(classes=1)
    with pytest.raises(ValueError, match=r"`model` must give logits of at least 2 classes, got 1.*torch.cat"):
        CVI(one, partition=quarters(), budget=8, evidence=evidence, **options).infer(photo())
    with pytest.raises(ValueError, match="at least 2 classes"):
        infer_noise(one, photo(), partition=quarters(), budget=24)
    two = CVI(lambda x: torch.cat([-one(x), one(x)], 1), partition=quarters(), budget=8, evidence=evidence, **options)
    assert two.infer(photo()).criticality.std() > 0
    logit = CVI(one, partition=quarters(), budget=8, evidence="logit", **options).infer(photo(), 0)
    assert logit.criticality.std() > 0


def test_vanished_gradients_are_said_and_nan_gradients_refused():
    net, x = network(), photo(2)
    with pytest.warns(VanishedGradientWarning, match="image.s. 0, 1"):
        silent = CVI(lambda z: net((z * 255).round() / 255), partition="grid", budget=16).infer(x, 1)
    assert not silent.criticality.any()
    with pytest.warns(VanishedGradientWarning):
        list(CVI(lambda z: net((z * 255).round() / 255), partition="grid", budget=32).anytime(x, 1))

    def broken(images):
        return net(images) + (images[:, :, :1, :1] - images[:, :, :1, :1].detach()).abs().sqrt().sum((1, 2, 3))[:, None]

    with pytest.raises(ValueError, match="`model` must have a finite gradient"):
        CVI(broken, partition="grid", budget=16).infer(x, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CVI(net, partition="grid", budget=16).infer(x, 1)
        CVI(net, partition="grid", baseline="grey", budget=16).infer(torch.full_like(x, 0.5), 1)  # nothing to remove


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", ["presence", "noise"])
def test_gradients_are_taken_in_any_mode(mode, family):
    net, options = network(), {"partition": "grid", "budget": 24}
    expected = CVI(net, family, **options).infer(photo(2), [1, 3]).map
    with mode():
        inside = CVI(net, family, **options).infer(photo(2), torch.tensor([1, 3])).map
        assert not torch.is_grad_enabled()
    assert torch.equal(inside, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_any_precision(dtype):
    x = photo(2).to(dtype)
    near = CVI(network(), partition="grid", budget=24).infer(x.float(), 1).criticality
    model = network().to(dtype) if dtype == torch.float64 else network()
    found = CVI(model, partition="grid", budget=24).infer(x, 1).criticality
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(found.float(), near, atol=1e-2 * float(near.abs().max()))


def test_threads_that_share_a_model_count_their_own_evaluations():
    model, x = Classifier(network()), photo(2)
    cvi = CVI(model, partition="grid", budget=32)
    expected = cvi.infer(x, 1)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: cvi.infer(x, 1), range(8)))
    for one in found:
        assert torch.equal(one.criticality, expected.criticality)
        assert one.evaluations == expected.evaluations == Evaluations(32, 32)


def test_nothing_of_the_caller_is_changed():
    x, labels, baseline = photo(2), quarters().clone(), torch.rand(3, 1, 1)
    before = [t.clone() for t in (x, labels, baseline)]
    target = torch.tensor([1, 2])
    CVI(network(), partition=labels, baseline=baseline, budget=12).infer(x, target).modes(32)
    for now, then in zip((x, labels, baseline, target), (*before, torch.tensor([1, 2])), strict=True):
        assert torch.equal(now, then) and not now.requires_grad


def test_tied_maps_are_ranked_with_ties():
    """Nine values on 480 pixels: ranks by position agree with everything; the agreement is SciPy's."""
    cvi = CVI(network(), partition=grid_partition(photo(), 3)[0], estimator="gradient", budget=64)
    states = list(cvi.anytime(photo(), 1))
    expected = scipy.stats.spearmanr(states[-1].criticality.flatten(), states[-2].criticality.flatten()).statistic
    assert float(states[-1].agreement) == pytest.approx(expected, abs=1e-6)


def test_images_that_require_a_gradient_leave_no_graph() -> None:
    images = photo(1).requires_grad_()
    posterior = CVI(network(), budget=32, partition="grid").infer(images)
    assert not posterior.criticality.requires_grad and len(posterior.to_frame()) and len(posterior.regions().to_frame())


@pytest.mark.parametrize("black", [0.0, np.float32(0), np.int64(0), ["black"], np.zeros(())], ids=repr)
def test_modes_have_the_posterior_s_baseline(black: object) -> None:
    partition = torch.arange(photo(1).shape[-1]).div(8, rounding_mode="floor").expand(1, *photo(1).shape[-2:])
    posterior = CVI(network(), budget=32, partition=partition, baseline=black).infer(photo(1))
    assert not posterior.modes(budget=32).baseline.any()
