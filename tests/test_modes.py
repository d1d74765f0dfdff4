"""Posteriors with shared beliefs, against enumeration of small games."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvi_nb.data import load_digits
from cvi_nb.inference import all_masks, exact_posterior, infer_modes, stroke_partition
from cvi_nb.inference.densities import Products, fit_chain
from cvi_nb.inference.surrogate import doubt, draw_functions, fit_surrogate, informative_masks, spread

LABELS = torch.arange(6).view(2, 3)
WHITE = torch.ones(1, 1, 2, 3)


def take(logits, target):
    return logits[:, 0]


def either(images):
    z = images.flatten(1)
    return (-8 * (1 - z[:, 0]) * (1 - z[:, 4]))[:, None]


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), temperature=st.sampled_from([1.0, 0.3]), shared=st.sampled_from(["all", "none"]))
def test_the_bound_is_below_log_z(seed, temperature, shared):
    values = torch.randn(64, generator=torch.Generator().manual_seed(seed)).double()

    def game(images):
        return values[(images.flatten(1).long() << torch.arange(6)).sum(1)][:, None]

    found = infer_modes(
        game, WHITE, 0, partition=LABELS, baseline=0.0, evidence=take, budget=40, temperature=temperature, shared=shared
    )
    log_q, log_prior = found.densities[0].log_density(all_masks(6)), -6 * math.log(2)
    free = float((log_q.exp() * (values - temperature * (log_q - log_prior))).sum())
    log_z = float(temperature * (log_prior + values / temperature).logsumexp(0))
    assert float(log_q.exp().sum()) == pytest.approx(1, abs=1e-6)
    assert free <= log_z + 1e-6


def test_the_bound_is_unbiased():
    values = torch.randn(64, generator=torch.Generator().manual_seed(0)).double()

    def game(images):
        return values[(images.flatten(1).long() << torch.arange(6)).sum(1)][:, None]

    errors = []
    for seed in range(40):
        found = infer_modes(
            game, WHITE, 0, partition=LABELS, baseline=0.0, evidence=take, budget=40, temperature=0.5, seed=seed
        )
        log_q = found.densities[0].log_density(all_masks(6))
        free = (log_q.exp() * (values - 0.5 * (log_q + 6 * math.log(2)))).sum()
        errors.append(float(found.bound) - float(free))
    spread = torch.tensor(errors)
    assert abs(float(spread.mean())) <= 4 * float(spread.std()) / 40**0.5


def test_two_answers_are_two_modes():
    found = infer_modes(either, WHITE, 0, partition=LABELS, baseline=0.0, evidence=take, prior=0.1, budget=96)
    modes = found.modes()
    assert {tuple(m.present.nonzero().flatten().tolist()) for m in modes} == {(0,), (4,)}
    assert all(abs(m.weight - 0.5) < 0.1 for m in modes)


def test_a_mixture_of_one_is_a_product():
    log_odds = torch.tensor([[0.3, -1.0, 2.0]]).double()
    masks, chance = all_masks(3), log_odds.sigmoid()
    found = Products(torch.ones(1).double(), log_odds).log_density(masks)
    assert torch.allclose(found.exp(), torch.where(masks > 0, chance, 1 - chance).prod(1))


def test_the_chain_is_a_density():
    masks = (torch.rand(200, 5, generator=torch.Generator().manual_seed(0)) < 0.4).double()
    chain = fit_chain(masks, torch.tensor([[0, 1], [1, 2], [3, 4]]))
    assert float(chain.log_density(all_masks(5)).exp().sum()) == pytest.approx(1)


def test_flips_are_differences():
    masks = all_masks(5)
    process = fit_surrogate(masks[::2], -masks[::2].sum(1) - masks[::2, 1] * masks[::2, 3], steps=5)
    on, off = masks.clone(), masks.clone()
    on[:, 3], off[:, 3] = 1, 0
    assert torch.allclose(process.flips(masks)[:, 3], process(on) - process(off), atol=1e-8)


def test_the_next_mask_is_the_most_informative_one():
    """Against a dense Gaussian process: each choice leaves the least summed variance of the marginals."""
    cube = all_masks(5)
    seen = cube[torch.randperm(32, generator=torch.Generator().manual_seed(3))[:12]]
    process = fit_surrogate(seen, -seen.sum(1) + 2 * seen[:, 1] * seen[:, 2] - seen[:, 4] * seen[:, 0], steps=3)
    mass = torch.rand(32, generator=torch.Generator().manual_seed(4)).double()
    mass /= mass.sum()
    lever = mass[:, None] * (cube - mass @ cube)

    def left(masks):
        gram, cross = (torch.exp(-((a[:, None] - masks).abs() @ process.rates)) for a in (masks, cube))
        gram = gram + process.nugget * torch.eye(len(masks))
        prior = torch.exp(-((cube[:, None] - cube).abs() @ process.rates))
        covariance = prior - cross @ torch.linalg.solve(gram, cross.T)
        return float((lever * (covariance @ lever)).sum())

    found = informative_masks(process, mass, 3, torch.Generator())
    known = seen
    for mask in found:
        rest = [z for z in cube if not bool((z == known).all(1).any())]
        best = min(left(torch.cat([known, z[None]])) for z in rest)
        known = torch.cat([known, mask[None]])
        assert left(known) == pytest.approx(best, rel=1e-6)
    assert len(informative_masks(process, mass, 99, torch.Generator())) == 20
    expected = spread(process, cube).diagonal() + process.scale**2 * process.nugget
    assert torch.allclose(doubt(process, cube), expected, atol=1e-8)


def test_intervals_at_other_levels():
    found = infer_modes(either, WHITE, 0, partition=LABELS, baseline=0.0, evidence=take, budget=40)
    assert torch.allclose(found.confidence_interval(0.9), found.interval, atol=1e-5)
    narrow, wide = found.confidence_interval(0.5), found.confidence_interval(0.99)
    assert (wide[..., 0] <= narrow[..., 0] + 1e-6).all() and (wide[..., 1] >= narrow[..., 1] - 1e-6).all()
    with pytest.raises(ValueError, match="`level` must be"):
        found.confidence_interval(1)
    with pytest.warns(DeprecationWarning, match="confidence_interval"):
        assert torch.equal(found.credible_interval(0.5), narrow)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_its_single_images(channels):
    """Grey and colour, a thousand classes, 4 and 20 clusters (enumerated, and fitted with a chain) in one batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * 80, 1000)).eval()
        x = torch.rand(2, channels, 8, 10)
    few = torch.arange(8)[:, None] // 4 * 2 + torch.arange(10) // 5
    many = torch.arange(8)[:, None] // 2 * 5 + torch.arange(10) // 2
    labels, options = torch.stack([few, many]), {"budget": 64, "particles": 4, "temperature": 0.5}
    both = infer_modes(network, x, partition=labels, **options)
    assert both.clusters.tolist() == [4, 20] and (both.probability[0, 4:] == 0.5).all()
    for i, count in enumerate((4, 20)):
        one = infer_modes(network, x[i : i + 1], partition=labels[i : i + 1], batch_size=7, **options)
        assert torch.allclose(one.probability[0], both.probability[i, :count], atol=1e-5)
        assert torch.allclose(one.interval[0], both.interval[i, :count], atol=1e-5)
        assert torch.allclose(one.bound, both.bound[i], atol=1e-4)


def test_strokes_are_twelve():
    assert [len(p.unique()) for p in stroke_partition(load_digits("development").images[3::1000])] == [12] * 4


@pytest.mark.parametrize(
    ("name", "value"), [("budget", 8), ("particles", 0), ("temperature", 0.0), ("prior", 1.0), ("shared", "some")]
)
def test_errors_name_the_argument(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        infer_modes(either, WHITE, 0, partition=LABELS, baseline=0.0, evidence=take, **{name: value})


def test_the_process_is_drawn_as_it_is():
    """Functions drawn on all masks have the mean and the covariance of the conditioned process."""
    cube = all_masks(4)
    process = fit_surrogate(cube[::3], -cube[::3].sum(1) + cube[::3, 0] * cube[::3, 1], steps=3)
    functions = draw_functions(process, 20_000, torch.Generator().manual_seed(0))
    assert torch.allclose(functions.mean(0), process(cube), atol=0.02)
    assert torch.allclose(functions.T.cov(), spread(process, cube), atol=0.02)


def test_options_that_nobody_has_are_refused():
    with pytest.raises(TypeError, match=r"`particle` must be an option of infer_modes.*did you mean `particles`"):
        infer_modes(either, WHITE, 0, partition=LABELS, particle=3)
    known = inspect.signature(infer_modes).parameters
    assert {"budget", "particles", "shared", "bandwidth", "batch_size", "seed", "progress"} <= set(known)


def test_one_output_is_refused_with_the_remedy_but_for_its_own_evidence():
    network = lambda x: x.mean((1, 2, 3))[:, None]  # noqa: E731
    for found in (infer_modes, lambda m, x, t, **o: exact_posterior(m, x, o["partition"], t)):
        with pytest.raises(ValueError, match=r"torch\.cat\(\[-z, z\], 1\)"):
            found(network, WHITE, 0, partition=LABELS)
    assert infer_modes(network, WHITE, 0, partition=LABELS, evidence="logit").bound.isfinite()
    assert exact_posterior(network, WHITE, LABELS, 0, evidence="logit").banzhaf.sum() == pytest.approx(0.5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode):
    options = {"partition": LABELS, "baseline": 0.0, "evidence": take, "budget": 40}
    expected = infer_modes(either, WHITE, 0, **options)
    with mode():
        found = infer_modes(either, WHITE.clone(), 0, **options)
    assert torch.equal(found.probability, expected.probability)


@pytest.mark.parametrize("target", [0, torch.tensor([0], dtype=torch.int32), torch.tensor(0), [0], [(0,)]])
def test_forms_of_a_target(target):
    options = {"partition": LABELS, "baseline": 0.0, "budget": 40}
    network = lambda x: x.flatten(1)  # noqa: E731
    found = infer_modes(network, WHITE, target, **options)
    assert torch.equal(found.probability, infer_modes(network, WHITE, 0, **options).probability)
