"""The noise posterior against closed forms on linear and quadratic models."""

import inspect
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from cvi_nb.inference import NoisePosterior, infer_noise
from cvi_nb.inference.noise import gaussian_kl
from cvi_nb.models import Evaluations, as_classifier
from cvi_nb.validation import VanishedGradientWarning

HEIGHT, WIDTH = 5, 4
LABELS = torch.tensor([[0, 0, 1, 1]] * 3 + [[2, 2, 2, 3]] * 2)
SLOPES = torch.linspace(-1.0, 2.0, 20).view(1, HEIGHT, WIDTH)


def image(n=1, channels=1, height=HEIGHT, width=WIDTH, seed=0, dtype=torch.float32):
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(images):
    """Margin w·x + 10 of class 0 over class 1."""
    lead = (images * SLOPES.to(images)).sum((1, 2, 3)) + 10
    return torch.stack([lead, torch.zeros_like(lead)], 1)


def value(logits, target):
    return logits[:, 0]


def bowl(images):
    """−½ Σ a_i x_i², whose curvature is a_i everywhere."""
    return -0.5 * (SLOPES.abs().to(images) * images**2).sum((1, 2, 3))[:, None]


def network(channels=3, classes=4):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = [nn.Conv2d(channels, 6, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        net = nn.Sequential(*layers, nn.Linear(24, classes))
    return net.eval()


def cluster_mean(maps, labels):
    return torch.stack([maps[labels == r].mean() for r in range(int(labels.max()) + 1)])


def test_kl_against_pytorch():
    deviation = torch.tensor([1e-3, 0.2, 1.0, 3.0], dtype=torch.float64)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(torch.zeros(4).double(), deviation), normal(0.0, 0.7))
    assert torch.allclose(gaussian_kl(deviation, 0.7), expected)


@pytest.mark.parametrize("evidence", ["margin", "log_probability", "change", value])
def test_one_step_from_a_point_mass_is_the_squared_input_gradient(evidence):
    x = image(channels=3, height=6, width=7).requires_grad_()
    labels = torch.arange(42).view(6, 7) % 5
    model = network()
    logits = model(x)
    top = int(logits.argmax())
    others = [logits[0, k] for k in range(4) if k != top]
    h = {"log_probability": logits.log_softmax(1)[0, top], value: logits[0, 0]}.get(
        evidence, logits[0, top] - torch.stack(others).max()
    )
    (slope,) = torch.autograd.grad(h, x)
    slope = slope / h.detach() if evidence == "change" else slope
    found = infer_noise(
        model, x.detach(), partition=labels, evidence=evidence, steps=1, temperature=0.01, prior_deviation=0.5
    )
    expected = cluster_mean(slope[0].square().mean(0), labels) / 0.01 + 1 / 0.5**2
    assert torch.allclose(found.deviation[0], expected.rsqrt(), rtol=1e-4)
    assert torch.equal(found.standard_error, torch.zeros_like(found.standard_error))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_linear_model_gauss_newton_fixed_point_is_exact(steps):
    x = image(dtype=torch.float64)
    beta, prior = 0.02, 0.6
    found = infer_noise(linear, x, 0, partition=LABELS, temperature=beta, prior_deviation=prior, steps=steps)
    g = SLOPES.double()[0] / linear(x)[0, 0]
    precision = 1 / prior**2 + cluster_mean(g**2, LABELS) / beta
    assert torch.allclose(found.deviation[0], precision.rsqrt(), rtol=1e-6)
    assert float(found.standard_error.max()) < 1e-6


def test_linear_model_expected_evidence_kl_and_log_evidence():
    """F = −½ Σ σ² g² − β KL, and F ≤ β log Z with Z a Gaussian integral."""
    x = image(dtype=torch.float64)
    beta, prior = 0.02, 0.6
    found = infer_noise(linear, x, 0, partition=LABELS, temperature=beta, prior_deviation=prior, budget=4000)
    g2 = (SLOPES.double()[0] / linear(x)[0, 0]) ** 2
    sigma = found.deviation_map[0]
    kl = (0.5 * (sigma**2 / prior**2 - 1 - 2 * (sigma / prior).log())).sum()
    assert torch.allclose(found.kl[0], kl) and torch.allclose(found.sensitivity.sum((1, 2)), found.kl)
    exact = -0.5 * (sigma**2 * g2).sum() - beta * kl
    assert abs(float(found.bound[0] - exact)) < 4 * float(found.bound_error[0])
    log_z = -0.5 * math.log1p(prior**2 * float(g2.sum()) / beta)
    assert float(exact) < beta * log_z


@pytest.mark.parametrize("seed", range(5))
def test_bound_is_below_the_log_evidence_of_a_bowl(seed):
    """With curvature a_i and a pixel per cluster, the posterior is the truth and the bound is tight."""
    x = torch.zeros(1, 1, HEIGHT, WIDTH, dtype=torch.float64)
    a, beta, prior = SLOPES.abs().double().flatten(), 0.1, 0.5
    labels = torch.arange(20).view(HEIGHT, WIDTH)
    options = {"evidence": value, "temperature": beta, "prior_deviation": prior, "update": "reparameterised"}
    log_z = -0.5 * torch.log1p(prior**2 * a / beta).sum()
    loose = infer_noise(bowl, x, 0, partition=LABELS, budget=4000, seed=seed, **options)
    assert float(loose.bound[0]) < beta * log_z + 4 * float(loose.bound_error[0])
    fine = infer_noise(bowl, x, 0, partition=labels, budget=20_000, steps=8, seed=seed, batch_size=500, **options)
    assert torch.allclose(fine.deviation[0], (1 / prior**2 + a / beta).rsqrt(), rtol=0.05)
    assert float(fine.bound[0]) == pytest.approx(float(beta * log_z), abs=4 * float(fine.bound_error[0]) + 2e-3)


def test_both_updates_agree_on_a_linear_model():
    x = image(dtype=torch.float64)
    options = {"partition": LABELS, "temperature": 0.02, "prior_deviation": 0.6, "batch_size": 500}
    exact = infer_noise(linear, x, 0, **options)
    found = infer_noise(linear, x, 0, update="reparameterised", budget=20_000, steps=8, **options)
    assert torch.allclose(found.deviation, exact.deviation, rtol=0.03)
    low, high = found.confidence_interval(0.999)[0].unbind(-1)
    assert bool(((low < exact.deviation[0]) & (exact.deviation[0] < high)).all())


def test_interval_covers():
    """Re-run with 300 times the effort, 90 % intervals hold 80 to 98 % of the values."""
    options = {"partition": LABELS, "temperature": 0.05, "prior_deviation": 0.5, "steps": 2, "evidence": value}
    model = lambda x: -(x**4).sum((1, 2, 3))[:, None]  # noqa: E731
    x = image(dtype=torch.float64)
    truth = infer_noise(model, x, 0, budget=20_000, batch_size=500, **options).deviation[0]
    hits = []
    for seed in range(60):
        low, high = infer_noise(model, x, 0, budget=64, seed=seed, **options).interval[0].unbind(-1)
        hits.append(((low < truth) & (truth < high)).double().mean())
    assert 0.8 < float(torch.stack(hits).mean()) < 0.98


def test_batch_is_the_same_as_one_by_one():
    x, model = image(3, 3, 9, 7), network()
    labels = torch.stack([torch.zeros(9, 7).long(), torch.arange(63).view(9, 7) % 4, torch.arange(63).view(9, 7)])
    together = infer_noise(model, x, partition=labels, seed=3)
    for i in range(3):
        alone = infer_noise(model, x[i : i + 1], partition=labels[i : i + 1], seed=3)
        count = int(alone.clusters[0])
        assert torch.allclose(alone.deviation[0], together.deviation[i, :count], rtol=1e-5)
        assert bool((together.deviation[i, count:] == together.prior_deviation).all())
        assert torch.equal(alone.partition[0], together.partition[i])
        assert torch.allclose(alone.bound[0], together.bound[i], rtol=1e-4)
    assert len(together.to_frame()) == 1 + 4 + 63 and "images=3" in repr(together)
    smaller = infer_noise(model, x, partition=labels, seed=3, batch_size=3)
    assert torch.allclose(smaller.deviation, together.deviation, rtol=1e-4)


def test_partitions_are_averaged_in_precision():
    x = image(dtype=torch.float64)
    other = torch.arange(HEIGHT)[:, None].expand(-1, WIDTH)
    options = {"temperature": 0.02, "prior_deviation": 0.6}
    one, two, both = (infer_noise(linear, x, 0, partition=p, **options) for p in (LABELS, other, [LABELS, other]))
    expected = (one.deviation_map**-2 + two.deviation_map**-2) / 2
    assert torch.allclose(both.deviation_map, expected.rsqrt(), rtol=1e-6)
    assert int(both.clusters[0]) > max(int(one.clusters[0]), int(two.clusters[0]))


def test_scale_of_the_logits_does_not_matter():
    x, model = image(2, 3, 8, 8), network()
    a = infer_noise(model, x, partition=lambda im: torch.zeros(1, 2, 8, 8).long())
    b = infer_noise(lambda im: 100 * model(im), x, partition=lambda im: torch.zeros(1, 2, 8, 8).long())
    assert torch.allclose(a.deviation, b.deviation, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "forward", "backward"), [({}, 60, 53), ({"target": 0}, 60, 53), ({"steps": 1}, 10, 1)]
)
def test_evaluations_are_counted_and_within_the_budget(options, forward, backward):
    found = infer_noise(network(), image(2, 3), partition=LABELS, **options)
    spent = found.evaluations
    assert isinstance(spent, Evaluations) and spent.forward <= 64 and spent.backward <= spent.forward
    assert abs(spent.forward - forward) <= 4 and abs(spent.backward - backward) <= 4


def test_trace_sample_and_dtype():
    x = image(2, 1, dtype=torch.float64)
    found = infer_noise(linear, x, 0, partition=LABELS, steps=3)
    assert found.trace.shape == (4, 2) and bool((found.trace[0] == -math.inf).all())
    assert torch.equal(found.trace[-1], found.bound)
    assert {found.deviation.dtype, found.bound.dtype, found.sensitivity.dtype} == {torch.float64}
    noise = found.sample(4000)
    assert noise.shape == (4000, 2, 1, HEIGHT, WIDTH)
    assert torch.allclose(noise.std(0)[:, 0], found.deviation_map, rtol=0.1)
    assert torch.equal(found.deviation, infer_noise(linear, x, 0, partition=LABELS, steps=3).deviation)
    assert torch.allclose(found.width, found.deviation_map.log().mean((1, 2)).exp())


def test_a_set_of_classes_as_target():
    mask = torch.tensor([[True, True, False, False]]).expand(2, 4)
    found = infer_noise(network(), image(2, 3), mask, partition=LABELS, evidence="log_probability")
    assert isinstance(found, NoisePosterior) and bool(torch.isfinite(found.deviation).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 3}, "`budget` must be"),
        ({"temperature": 0.0}, "`temperature` must be"),
        ({"prior_deviation": -1.0}, "`prior_deviation` must be"),
        ({"evidence": "nonsense"}, "`evidence` must be 'change'"),
        ({"update": "newton"}, "`update` must be"),
        ({"steps": 0}, "`steps` must be"),
        ({"learning_rate": 2.0}, "`learning_rate` must be"),
        ({"batch_size": 0}, "`batch_size` must be"),
        ({"seed": 0.5}, "`seed` must be"),
        ({"target": 9}, "`target` must"),
        ({"target": -1}, "`target` must"),
        ({"target": torch.zeros(3).long()}, "`target` must"),
        ({"evidence": lambda logits, target: logits}, "`evidence` must return"),
        ({"partition": torch.zeros(2, 2).long()}, "`partition` must"),
    ],
)
def test_bad_input_is_refused_by_name(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        infer_noise(network(), image(2, 3), **({"partition": LABELS} | options))


def test_models_without_gradients_or_finite_logits_are_refused():
    with pytest.raises(ValueError, match="`model` must"):
        infer_noise(lambda x: torch.ones(len(x), 2), image(), partition=LABELS)
    with pytest.raises(ValueError, match="finite logits"):
        infer_noise(lambda x: linear(x) * math.nan, image(), 0, partition=LABELS)


def test_gradients_that_are_no_number_are_refused():
    """One NaN pixel in a gradient would spoil a cluster's deviation without a word."""

    def broken(x):
        hole = x.clone()
        hole[..., 0, 0] = (x[..., 0, 0] - x[..., 0, 0].detach()).abs().sqrt()  # 0, with slope NaN
        return linear(hole)

    assert bool(torch.isfinite(broken(image())).all())
    with pytest.raises(ValueError, match=r"`model` must.*gradient"):
        infer_noise(broken, image(), 0, partition=LABELS)


def test_a_network_that_rounds_its_input_is_not_most_robust_without_a_warning():
    """Its slopes are zero, so its posterior is the prior: as wide as can be."""
    x = image(2)
    with pytest.warns(VanishedGradientWarning, match="zero for image"):
        found = infer_noise(lambda images: linear(images.round()), x, 0, partition=LABELS)
    assert torch.allclose(found.width, torch.full((2,), found.prior_deviation))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        infer_noise(linear, x, 0, partition=LABELS)


def test_one_output_is_refused_with_the_remedy():
    for evidence in ("change", "margin", "log_probability", "probability"):
        with pytest.raises(ValueError, match=r"torch\.cat\(\[-z, z\], 1\)"):
            infer_noise(lambda x: linear(x)[:, :1], image(), 0, partition=LABELS, evidence=evidence)
    assert infer_noise(lambda x: linear(x)[:, :1], image(), 0, partition=LABELS, evidence="logit").bound.isfinite()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_whatever_mode_the_caller_is_in(mode):
    x, model = image(2, 3), network()
    expected = infer_noise(model, x, partition=LABELS)
    with mode():
        found = infer_noise(model, x.clone(), partition=LABELS.clone())
    assert torch.equal(found.deviation, expected.deviation) and torch.equal(found.bound, expected.bound)


@pytest.mark.parametrize(
    "target",
    [torch.tensor([1, 1], dtype=torch.int32), torch.tensor(1), torch.tensor([1]), np.array([1, 1]), [(1,), (1,)]],
)
def test_forms_of_a_target(target):
    x, model = image(2, 3), network()
    found = infer_noise(model, x, target, partition=LABELS)
    assert torch.equal(found.deviation, infer_noise(model, x, 1, partition=LABELS).deviation)


def test_a_wide_prior_is_legitimate_and_scalars_of_numpy_are_numbers():
    x = image()
    found = infer_noise(linear, x, 0, partition=LABELS, prior_deviation=np.float32(2.5), budget=np.int64(32))
    assert found.prior_deviation == 2.5 and torch.equal(found.map, found.sensitivity)
    assert bool((found.deviation <= 2.5).all())


def test_options_that_the_family_does_not_have_are_refused():
    for option in ("estimator", "baseline", "prior", "coarse"):
        with pytest.raises(TypeError, match=f"`{option}` must be an option of infer_noise"):
            infer_noise(linear, image(), 0, partition=LABELS, **{option: 0.5})
    with pytest.raises(TypeError, match="did you mean `learning_rate`"):
        infer_noise(linear, image(), 0, partition=LABELS, learningrate=0.5)
    known = inspect.signature(infer_noise).parameters
    assert {"budget", "update", "steps", "learning_rate", "batch_size", "seed", "progress"} <= set(known)


def test_the_old_name_of_the_interval_warns():
    found = infer_noise(linear, image(), 0, partition=LABELS)
    with pytest.warns(DeprecationWarning, match="confidence_interval"):
        assert torch.equal(found.credible_interval(0.9), found.interval)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    x = image(2, 3).to(dtype)
    found = infer_noise(network(), x, partition=LABELS, temperature=1e-6)
    assert found.deviation.dtype == torch.float32 and bool(found.bound.isfinite().all())
    assert torch.equal(found.deviation, infer_noise(network(), x.float(), partition=LABELS, temperature=1e-6).deviation)


def test_threads_that_share_a_classifier():
    """Maps and counts of each call are its own."""
    model, x = as_classifier(network()), image(2, 3)
    alone = infer_noise(model, x, partition=LABELS)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: infer_noise(model, x, partition=LABELS), range(8)))
    assert all(torch.equal(one.deviation, alone.deviation) for one in found)
    assert {one.evaluations for one in found} == {alone.evaluations}


@pytest.mark.parametrize(("weights", "pixels"), [("half", "float"), ("float", "half"), ("float", "double")])
def test_network_and_images_of_different_precision(weights, pixels):
    found = infer_noise(getattr(network(), weights)(), getattr(image(2, 3), pixels)(), partition=LABELS)
    assert torch.allclose(found.width.float(), infer_noise(network(), image(2, 3), partition=LABELS).width, rtol=0.02)


def test_scalars_of_numpy_and_pytorch_are_numbers():
    expected = infer_noise(linear, image(), 0, partition=LABELS, seed=2, batch_size=8)
    odd = {"seed": np.int32(2), "batch_size": np.array(8), "budget": torch.tensor(64), "steps": np.uint8(4)}
    assert torch.equal(infer_noise(linear, image(), 0, partition=LABELS, **odd).deviation, expected.deviation)
