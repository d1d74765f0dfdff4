"""Certificates against smoothed classifiers that are known in closed form."""

import math

import pytest
import torch
from scipy.stats import binomtest, norm

from cvi_nb.inference import certify, infer_noise, smoothed_votes
from cvi_nb.statistics import clopper_pearson

SLOPES = torch.linspace(-1.0, 2.0, 20).view(1, 5, 4)
SIGMA = torch.linspace(0.1, 0.8, 20).view(1, 5, 4)


def image(n=1, channels=1, seed=0):
    return torch.rand(n, channels, 5, 4, generator=torch.Generator().manual_seed(seed))


def linear(images):
    """Class 0 where w·x > 4."""
    lead = (images * SLOPES.to(images)).sum((1, 2, 3)) - 4
    return torch.stack([lead, torch.zeros_like(lead)], 1)


def lead_probability(x, sigma):
    """P(class 0) of `linear` under noise of deviation `sigma`, exactly: Φ(lead / √(wᵀΣw))."""
    spread = (SLOPES * sigma).double().square().flatten(-3).sum(-1).sqrt()
    return torch.special.ndtr(linear(x.double())[:, 0] / spread)


@pytest.mark.parametrize("confidence", [0.9, 0.999])
def test_clopper_pearson_against_scipy(confidence):
    hits = torch.tensor([0, 1, 37, 99, 100])
    ours, _ = clopper_pearson(hits, 100, confidence, side="lower")
    for k, bound in zip(hits.tolist(), ours.tolist(), strict=True):
        exact = binomtest(k, 100, alternative="greater").proportion_ci(confidence, method="exact").low
        assert bound == pytest.approx(exact, abs=1e-9)


def test_votes_follow_the_closed_form():
    x = image(4)
    votes = smoothed_votes(linear, x, SIGMA.expand(4, -1, -1), samples=20_000, batch_size=1000)
    assert votes.shape == (4, 2) and votes.dtype == torch.int64 and bool((votes.sum(1) == 20_000).all())
    expected = lead_probability(x, SIGMA)
    error = (expected * (1 - expected) / 20_000).sqrt()
    assert bool(((votes[:, 0] / 20_000 - expected).abs() < 4 * error + 1e-4).all())


def test_bound_holds_as_often_as_it_says():
    """At confidence .9, at most 10 % of bounds exceed the true probability, over 300 seeds."""
    x, truth = image(), None
    above = 0
    for seed in range(300):
        found = certify(linear, x, SIGMA, samples=100, selection_samples=20, confidence=0.9, seed=seed)
        chance = float(lead_probability(x, SIGMA))
        truth = chance if int(found.predicted) == 0 else 1 - chance
        above += float(found.probability) > truth
    assert above <= 300 * 0.1 + 3 * math.sqrt(300 * 0.1 * 0.9)


def test_no_violation_in_ten_thousand_attacks():
    """Inside the certified ellipsoid the smoothed class, known exactly, never changes; random and worst directions."""
    x = image(10)
    sigma = SIGMA * torch.linspace(0.5, 1.5, 10).view(-1, 1, 1, 1)
    found = certify(linear, x, sigma, samples=2000)
    assert 1500 * int((~found.abstained).sum()) >= 10_000
    directions = torch.randn(1500, 10, 1, 5, 4, generator=torch.Generator().manual_seed(1))
    toward = torch.where(found.predicted == 0, -1.0, 1.0).view(-1, 1, 1, 1)
    directions[:750] = toward * SLOPES * sigma + 0.02 * directions[:750]  # the worst, and near it
    unit = directions / directions.flatten(2).norm(dim=2).view(1500, 10, 1, 1, 1)
    delta = 0.99 * found.radius.float().view(-1, 1, 1, 1) * sigma * unit
    assert torch.equal(found.inside(delta), (~found.abstained).expand(1500, -1))
    violations = 0
    for i in torch.nonzero(~found.abstained)[:, 0].tolist():
        chance = lead_probability(x[i] + delta[:, i], sigma[i])
        chance = chance if int(found.predicted[i]) == 0 else 1 - chance
        violations += int((chance <= 0.5).sum())
    assert violations == 0


def test_radius_is_tight_for_a_linear_model():
    """For a half-space Cohen's radius is the exact distance: with many samples nearly reached, and never passed."""
    x = image(1, seed=3)
    found = certify(linear, x, SIGMA, samples=100_000, batch_size=5000)
    chance = float(lead_probability(x, SIGMA))
    exact = float(norm.ppf(max(chance, 1 - chance)))
    assert 0.95 * exact < float(found.radius) <= exact


def test_isotropic_is_the_special_case():
    x = image(2)
    ball, map_ = certify(linear, x, 0.3), certify(linear, x, torch.full((2, 5, 4), 0.3))
    assert torch.equal(ball.probability, map_.probability)
    assert torch.allclose(ball.l2_radius, 0.3 * ball.radius) and torch.allclose(ball.proxy_radius, ball.l2_radius)
    sure = ~ball.abstained
    expected = 20 * ball.l2_radius.log() + 10 * math.log(math.pi) - math.lgamma(11)
    assert torch.allclose(ball.log_volume[sure], expected[sure])


def test_geometry():
    x = image(1, seed=3)
    found = certify(linear, x, SIGMA)
    along = torch.zeros(1, 1, 5, 4)
    along[..., 4, 3] = float(found.radius) * 0.8
    assert bool(found.inside(0.999 * along)) and not bool(found.inside(1.001 * along))
    assert float(found.l2_radius) == pytest.approx(0.1 * float(found.radius), rel=1e-6)
    assert float(found.log_axis) == pytest.approx(float(found.radius.log() + SIGMA.log().mean()), rel=1e-5)
    assert len(found.to_frame()) == 1 and "images=1" in repr(found)


def test_abstains_at_the_boundary():
    x = image()
    x = x - ((x * SLOPES).sum() - 4) * SLOPES / SLOPES.square().sum()
    found = certify(linear, x.clamp(0, 1), 10.0)
    assert bool(found.abstained) and float(found.radius) == 0 == float(found.proxy_radius)
    assert not bool(found.inside(torch.zeros_like(x)))


def test_batch_is_the_same_as_one_by_one_and_colour_shares_its_deviation():
    x = image(3, 3)
    model = lambda images: linear(images.mean(1, keepdim=True))  # noqa: E731
    together = certify(model, x, SIGMA.expand(3, -1, -1), seed=5)
    for i in range(3):
        alone = certify(model, x[i : i + 1], SIGMA, seed=5, batch_size=7)
        assert torch.equal(alone.probability[0], together.probability[i])
    assert together.log_axis.shape == (3,) and bool(together.log_volume.isfinite().any())


def test_takes_a_posterior_and_float64():
    x = image(2).double()
    posterior = infer_noise(linear, x, partition=torch.arange(20).view(5, 4) % 3)
    found = certify(linear, x, posterior)
    assert found.deviation.dtype == torch.float64 and torch.equal(found.deviation[:, 0], posterior.deviation_map)


@pytest.mark.parametrize(
    ("deviation", "options", "message"),
    [
        (0.0, {}, "`deviation` must be positive"),
        (torch.ones(3, 3), {}, "`deviation` must be a number"),
        ("linf", {}, "`deviation` must be a number"),
        (0.1, {"samples": 0}, "`samples` must be"),
        (0.1, {"selection_samples": 1.5}, "`selection_samples` must be"),
        (0.1, {"confidence": 1.0}, "`confidence` must be"),
        (0.1, {"batch_size": 0}, "`batch_size` must be"),
    ],
)
def test_bad_input_is_refused_by_name(deviation, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        certify(linear, image(), deviation, **options)


@pytest.mark.parametrize("evaluate", [smoothed_votes, certify])
def test_one_output_is_refused_with_the_remedy(evaluate):
    """Its only class would win every vote: a certificate of nothing."""
    with pytest.raises(ValueError, match=r"torch\.cat\(\[-z, z\], 1\)"):
        evaluate(lambda x: linear(x)[:, :1], image(), 0.3)
    two = evaluate(lambda x: torch.cat([-linear(x)[:, :1], linear(x)[:, :1]], 1), image(), 0.3)
    assert two is not None


def test_logits_that_are_no_number_are_refused_and_a_masked_class_is_not():
    with pytest.raises(ValueError, match="NaN"):
        certify(lambda x: linear(x) * math.nan, image(), 0.3)
    masked = lambda x: torch.cat([linear(x), torch.full((len(x), 1), -math.inf)], 1)  # noqa: E731
    assert torch.equal(certify(masked, image(), 0.3).probability, certify(linear, image(), 0.3).probability)
