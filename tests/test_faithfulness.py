"""Judgements of heat maps against closed forms, slow reference loops, invariances and another library."""

import dataclasses
import math
import warnings

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cvi_nb.data import ImageSet, load_digits
from cvi_nb.faithfulness import (
    CONTROLS,
    centre_map,
    check_maps,
    deletion,
    edge_map,
    evaluate_faithfulness,
    fill,
    insertion,
    paired_bootstrap,
    random_map,
    tile_degradation,
)
from cvi_nb.models import Classifier, Evaluations

CLASSES = 4


def network(channels=3, seed=0):
    """A small random network, smooth and far from linear."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 6, 3, stride=2), nn.Tanh(),
                               nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, CLASSES))
    for p in layers.parameters():
        p.data *= 3
    return layers.eval()


def additive(weights, offset=0.0):
    """p(class 0) = offset + Σ w x, summed over channels; logits are its logarithms."""

    def model(images):
        p = offset + (images.double() * weights).sum((1, 2, 3))
        return torch.stack([p, 1 - p], 1).log()

    return model


def falling(model, images):
    """Per image the class whose probability falls most when everything becomes grey, so that degradation is defined."""
    with torch.no_grad():
        fall = model(images).softmax(1) - model(torch.full_like(images, 0.5)).softmax(1)
    assert (fall.amax(1) > 1e-3).all()
    return fall.argmax(1)


def batch(n=3, channels=3, h=14, w=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, channels, h, w, generator=generator)
    order = torch.stack([torch.randperm(h * w, generator=generator) for _ in range(n)])
    return images, order.view(n, h, w).double() / (h * w), torch.arange(n) % CLASSES


def prob(model, image, target):
    with torch.no_grad():
        return float(model(image[None]).softmax(1)[0, target])


# ---------------------------------------------------------------- deletion and insertion

def slow_causal(model, image, saliency, target, substrate, step, mode):
    """The causal metric of RISE, one picture at a time."""
    pixels = saliency.numel()
    order = sorted(range(pixels), key=lambda i: -float(saliency.flatten()[i]))  # stable, as stated
    start, finish = (image, substrate) if mode == "deletion" else (substrate, image)
    current, scores = start.clone().flatten(1), []
    for k in range(0, pixels + 1, step):
        scores.append(prob(model, current.view_as(image), target))
        current[:, order[k:k + step]] = finish.flatten(1)[:, order[k:k + step]]
    return np.array(scores), (sum(scores) - scores[0] / 2 - scores[-1] / 2) / (len(scores) - 1)


@pytest.mark.parametrize("mode", ["deletion", "insertion"])
@pytest.mark.parametrize("baseline", ["grey", "blur", "mean", 0.0])
def test_against_a_slow_reference(mode, baseline):
    model, (images, maps, target) = network(), batch()
    judge = {"deletion": deletion, "insertion": insertion}[mode]
    found = judge(model, images, target, maps, baseline, steps=24, batch_size=7)  # 168 pixels, 7 a step
    for i in range(3):
        if baseline == "blur":
            delta = np.zeros((11, 11))
            delta[5, 5] = 1
            kernel = scipy.ndimage.gaussian_filter(delta, 5)  # as in RISE's code
            channels = [scipy.ndimage.convolve(c, kernel, mode="nearest") for c in images[i].numpy()]
            fill = torch.tensor(np.stack(channels))
        else:
            value = {"grey": 0.5, "mean": images[i].mean((1, 2))[:, None, None]}.get(baseline, baseline)
            fill = torch.zeros_like(images[i]) + value
        curve, area = slow_causal(model, images[i], maps[i], int(target[i]), fill.float(), 7, mode)
        np.testing.assert_allclose(found.curve[i], curve, atol=2e-6)
        assert abs(float(found.area[i]) - area) < 2e-6
    assert found.metric == mode and found.fraction[0] == 0 and found.fraction[-1] == 1


def test_ties_follow_raster_order():
    model, (images, maps, _) = network(), batch()
    coarse = (maps * 3).round()  # four values
    curve, _ = slow_causal(model, images[0], coarse[0], 0, torch.full_like(images[0], 0.5), 7, "deletion")
    np.testing.assert_allclose(deletion(model, images[:1], [0], coarse[:1], steps=24).curve[0], curve, atol=2e-6)


def test_linear_model_has_closed_forms():
    n = 20 * 10
    for power in (0, 1, 2):
        weights = torch.arange(n, 0, -1, dtype=torch.float64).view(1, 1, 20, 10) ** power
        weights /= weights.sum() / 0.8
        white = torch.ones(1, 1, 20, 10, dtype=torch.float64)
        maps = torch.arange(n, 0, -1).view(1, 20, 10)
        found = deletion(additive(weights, 0.1), white, [0], maps, 0, steps=n)
        # p after removing k pixels is 0.1 + 0.8 (1 − Σ_{i≤k} w_i); the trapezoid rule is exact on it.
        removed = np.concatenate([[0], np.cumsum(weights.numpy().ravel())])
        p = 0.9 - removed
        assert abs(float(found.area) - (p[1:] + p[:-1]).mean() / 2) < 1e-12
        assert abs(float(found.area) - (0.1 + 0.8 / (power + 2))) < 1e-2  # ∫ (1 − f)^(power + 1) df, large n
        shown = insertion(additive(weights, 0.1), white, [0], maps, 0, steps=n)
        assert abs(float(found.area + shown.area) - 1.0) < 1e-12


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 35))
def test_oracle_beats_any_order_on_an_additive_model(seed, steps):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(1, 1, 5, 7, generator=generator, dtype=torch.float64)
    weights /= weights.sum() / 0.8
    image = torch.rand(1, 1, 5, 7, generator=generator, dtype=torch.float64)
    model, oracle = additive(weights, 0.1), (weights * image)[:, 0]
    other = torch.randn(1, 5, 7, generator=generator)
    assert deletion(model, image, [0], oracle, 0.0, steps).area <= \
        deletion(model, image, [0], other, 0.0, steps).area + 1e-12
    assert insertion(model, image, [0], oracle, 0.0, steps).area >= \
        insertion(model, image, [0], other, 0.0, steps).area - 1e-12


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([lambda x: x**3 + x, lambda x: torch.exp(5 * x), lambda x: 7 * x - 100, torch.sqrt]),
       st.integers(0, 1000))
def test_strictly_increasing_transformations_change_nothing(transform, seed):
    model, (images, maps, _) = network(), batch(2, seed=seed)
    target = falling(model, images)
    for judge in (deletion, insertion):
        before, after = (judge(model, images, target, h, steps=9) for h in (maps, transform(maps)))
        assert torch.equal(before.curve, after.curve)
    # Tile degradation ranks by means over tiles, so only maps that are constant within tiles share this invariance.
    blocks = maps[:, ::4, ::4].repeat_interleave(4, 1)[:, :14].repeat_interleave(4, 2)[:, :, :12]
    before, after = (tile_degradation(model, images, target, h, tile=4) for h in (blocks, transform(blocks)))
    torch.testing.assert_close(before.score, after.score)


def test_insertion_mirrors_deletion_of_the_negated_map():
    model, (images, maps, target) = network(), batch()
    forth = insertion(model, images, target, maps, "grey", steps=24)
    back = deletion(model, images, target, -maps, "grey", steps=24)
    torch.testing.assert_close(forth.curve, back.curve.flip(1))
    torch.testing.assert_close(forth.area, back.area)


@pytest.mark.parametrize("ties", ["raster", "random"])
def test_batches_equal_singles_and_chunks_do_not_matter(ties):
    model, (images, maps, _) = network(), batch()
    maps, target = (maps * 5).round(), falling(model, images)
    for judge in (deletion, insertion, tile_degradation):
        extra = {"tile": 4} if judge is tile_degradation else {}
        value = lambda r: getattr(r, "area", getattr(r, "score", None))  # noqa: E731
        whole = value(judge(model, images, target, maps, steps=12, ties=ties, **extra))
        for size in (1, 5, 1000):
            again = value(judge(model, images, target, maps, steps=12, ties=ties, batch_size=size, **extra))
            torch.testing.assert_close(whole, again)
        single = [value(judge(model, images[i:i + 1], target[i:i + 1], maps[i:i + 1], steps=12, ties=ties, **extra))
                  for i in range(3)]
        torch.testing.assert_close(whole, torch.cat(single))


def test_memory_is_bounded_by_the_batch_size():
    seen, inner = [], network()

    def model(x):
        seen.append(len(x))
        return inner(x)

    images, maps, _ = batch()
    target = falling(inner, images)
    deletion(model, images, target, maps, steps=50, batch_size=8)
    tile_degradation(model, images, target, maps, tile=4, batch_size=8)
    assert max(seen) == 8 and sum(seen) == 3 * 51 + 3 * 2 * 12


def test_random_ties_are_seeded_and_break_a_constant_map():
    model, (images, _, target) = network(), batch()
    flat = torch.zeros(3, 14, 12)
    with pytest.warns(UserWarning, match=r"map\(s\) 0, 1, 2 are constant"):
        a, b, c = (deletion(model, images, target, flat, ties="random", seed=s).curve for s in (0, 0, 1))
        raster = deletion(model, images, target, flat).curve
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, raster)
    descending = -torch.arange(14.0 * 12).view(1, 14, 12).expand(3, -1, -1)
    assert torch.equal(raster, deletion(model, images, target, descending).curve)


def test_a_set_of_classes_adds_their_probabilities():
    model, (images, maps, _) = network(), batch()
    mask = torch.tensor([[True, False, True, False]] * 3)
    both = deletion(model, images, mask, maps, steps=6).curve
    parts = [deletion(model, images, [k] * 3, maps, steps=6).curve for k in (0, 2)]
    torch.testing.assert_close(both, sum(parts))


def test_against_quantus():
    quantus = pytest.importorskip("quantus")
    digits = load_digits("development")[:4]
    model, target = network(channels=1), torch.tensor([0, 1, 2, 3])
    maps = torch.rand(4, 28, 28, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = quantus.PixelFlipping(features_in_step=28, perturb_baseline="black", normalise=False, abs=False,
                                       disable_warnings=True, display_progressbar=False)
        theirs = metric(model=model, x_batch=digits.images.numpy(), y_batch=target.numpy(),
                        a_batch=maps[:, None].numpy(), softmax=True, channel_first=True, device="cpu")
    ours = deletion(model, digits.images, target, maps, 0.0, steps=28).curve[:, 1:]  # theirs starts after a step
    np.testing.assert_allclose(ours, np.array(theirs), atol=1e-5)


# ---------------------------------------------------------------- tile degradation

def slow_degradation(model, image, heat, target, tile):
    """MoRF and LeRF by cutting out one tile after the other."""
    corners = [(y, x) for y in range(0, heat.shape[0], tile) for x in range(0, heat.shape[1], tile)]
    means = [float(heat[y:y + tile, x:x + tile].mean()) for y, x in corners]
    order = [corners[i] for i in np.argsort(means)[::-1]]
    areas = []
    for sequence in (order[::-1], order):
        current, p = image.clone(), [prob(model, image, target)]
        for y, x in sequence:
            current[:, y:y + tile, x:x + tile] = 0.5
            p.append(prob(model, current, target))
        p = (np.array(p) - p[-1]) / (p[0] - p[-1])
        areas.append(((p[1:] + p[:-1]) / 2).mean())
    return areas[0] - areas[1]


@pytest.mark.parametrize(("h", "w", "tile"), [(12, 12, 4), (13, 10, 4), (5, 9, 6), (3, 11, 7)])
def test_degradation_against_a_slow_reference(h, w, tile):
    images, maps, _ = batch(6, h=h, w=w)
    model = network()
    target = falling(model, images)
    found = tile_degradation(model, images, target, maps, tile, batch_size=11)
    for i in range(6):
        reference = slow_degradation(model, images[i], maps[i], int(target[i]), tile)
        assert abs(float(found.score[i]) - reference) < 1e-3 * (1 + abs(reference))
    torch.testing.assert_close(found.morf[:, 0], torch.ones(6))
    torch.testing.assert_close(found.lerf[:, -1], torch.zeros(6))
    assert found.evaluations == Evaluations(6 * 2 * (len(found.fraction) - 1), 0)


@pytest.mark.parametrize("steps", [None, 4, 3, 1])
def test_degradation_closed_form_on_an_additive_model(steps):
    white = torch.ones(1, 1, 16, 16, dtype=torch.float64)
    weights = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    weights[..., :4, :4] = 0.8 / 16  # all of the weight in the first of 16 tiles
    found = tile_degradation(additive(weights, 0.1), white, [0], weights[:, 0], 4, 0.0, steps)
    counts = np.arange((steps or 16) + 1) * 16 // (steps or 16)
    first, last = counts[1] / 16, (counts[-1] - counts[-2]) / 16
    expected = (1 - last / 2) - first / 2
    assert abs(float(found.score) - expected) < 1e-12
    reverse = tile_degradation(additive(weights, 0.1), white, [0], -weights[:, 0], 4, 0.0, steps)
    if steps is None:
        torch.testing.assert_close(reverse.score, -found.score)


def test_degradation_is_affine_invariant():
    model, (images, maps, _) = network(), batch()
    target = falling(model, images)
    a, b = (tile_degradation(model, images, target, h, tile=4).score for h in (maps, 3 * maps - 8))
    torch.testing.assert_close(a, b)


def test_degradation_of_an_unmoved_probability_is_named():
    model, (images, maps, _) = network(), batch()
    target = falling(model, images)
    images[1] = 0.5
    with pytest.warns(UserWarning, match=r"undefined \(NaN\) for image\(s\) 1:"):
        found = tile_degradation(model, images, target, maps, tile=4)
    assert found.score.isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="defined degradation"):
        found.plot(1)


# ---------------------------------------------------------------- bad input

def test_bad_input_is_refused_by_name():
    model, (images, maps, target) = network(), batch()
    nan, inf = maps.clone(), maps.clone()
    nan[1, 0, 0], inf[2, 3, 3] = math.nan, math.inf
    cases = [
        ({"maps": nan}, ValueError, r"`maps` must be finite.*map\(s\) 1$"),
        ({"maps": inf}, ValueError, r"map\(s\) 2$"),
        ({"maps": maps[:, None]}, ValueError, r"`maps` must have shape \(3, 14, 12\)"),
        ({"maps": maps[:2]}, ValueError, r"one map per image, got \(2, 14, 12\)"),
        ({"maps": "heat"}, TypeError, "`maps` must be a tensor or array"),
        ({"maps": maps + 1j}, TypeError, "real"),
        ({"images": images[:0]}, ValueError, "at least one image"),
        ({"images": images * 255}, ValueError, r"`images` must lie in \[0, 1\]"),
        ({"target": [0, 1]}, ValueError, r"`target` must be .*3 classes.*got shape \(2,\)"),
        ({"target": [0, 1, 4]}, ValueError, r"`target` must be in 0\.\.3, got \[4\]"),
        ({"target": [0, 1, -1]}, ValueError, "`target`"),
        ({"target": torch.ones(3, 5, dtype=torch.bool)}, ValueError, r"`target` must be .*\(3, 4\).*got .*\(3, 5\)"),
        ({"target": torch.zeros(3, 4, dtype=torch.bool)}, ValueError, "at least one class"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be an integer .*, got 0"),
        ({"batch_size": 2.5}, TypeError, "`batch_size`"),
        ({"batch_size": True}, TypeError, "`batch_size`"),
        ({"baseline": "purple"}, ValueError, "`baseline` must be one of"),
        ({"baseline": 1.5}, ValueError, "`baseline`"),
        ({"baseline": torch.zeros(5)}, ValueError, "broadcasts"),
        ({"ties": "none"}, ValueError, "`ties`"),
        ({"steps": 0}, ValueError, "`steps`"),
    ]
    for judge in (deletion, insertion, tile_degradation):
        extra = {"tile": 4} if judge is tile_degradation else {}
        for change, error, message in cases:
            arguments = {"model": model, "images": images, "maps": maps, "target": target} | extra | change
            if change == {"steps": 0} and judge is tile_degradation:
                continue
            with pytest.raises(error, match=message):
                judge(**arguments)
    with pytest.raises(ValueError, match=r"`steps` must be an integer in \[1, 168\], got 169"):
        deletion(model, images, target, maps, steps=169)
    with pytest.raises(ValueError, match=r"in \[1, 12\], got 13"):
        tile_degradation(model, images, target, maps, 4, steps=13)
    with pytest.raises(ValueError, match="`steps`"):
        tile_degradation(model, images, target, maps, 4, steps=0)
    with pytest.raises(ValueError, match=r"`tile` must be an integer in \[1, 13\], got 14"):
        tile_degradation(model, images, target, maps, 14)
    with pytest.raises(ValueError, match=r"`model` must give finite logits, got NaN for image\(s\) 0"):
        deletion(lambda x: torch.full((len(x), 4), math.nan), images, target, maps)


def test_check_maps_takes_arrays_and_keeps_the_dtype():
    images, maps, _ = batch()
    assert check_maps(maps.numpy(), images).dtype == torch.float64
    assert check_maps((maps > 0.5).numpy(), images).dtype == torch.bool
    whole = (maps * 168).round().long()
    model = network()
    target = falling(model, images)
    assert torch.equal(deletion(model, images, target, whole).curve, deletion(model, images, target, maps).curve)
    torch.testing.assert_close(tile_degradation(model, images, target, whole, 4).score,
                               tile_degradation(model, images, target, whole.double(), 4).score)


def test_baselines_as_tensors():
    model, (images, maps, target) = network(), batch()
    grey = deletion(model, images, target, maps, "grey").curve
    shapes = [(), (3,), (3, 1, 1), (3, 14, 12), (3, 3, 14, 12)]
    for half in [0.5, np.float32(0.5), *(torch.full(shape, 0.5) for shape in shapes)]:
        assert torch.equal(grey, deletion(model, images, target, maps, half).curve)
    colour = fill("mean", images)[1]
    np.testing.assert_allclose(colour[1, :, 0, 0], images[1].numpy().mean((1, 2)), rtol=1e-5)


def test_the_users_network_and_images_stay_as_they_were():
    model, (images, maps, target) = network().train(), batch()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    copy, heat = images.clone(), maps.clone()
    classifier = Classifier(model)
    deletion(classifier, images.requires_grad_(), target, maps, steps=5)
    assert torch.equal(images, copy) and torch.equal(maps, heat) and model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert classifier.evaluations == Evaluations(18, 0)


# ---------------------------------------------------------------- controls

def test_controls_against_scipy():
    images, _, _ = batch(2, h=20, w=20)
    grey = images.mean(1).numpy().astype(float)
    for i in range(2):
        sobel = [scipy.ndimage.sobel(grey[i], axis, mode="nearest") / 8 for axis in (0, 1)]
        smooth = scipy.ndimage.gaussian_filter(np.hypot(*sobel), 2, mode="nearest", truncate=3)
        np.testing.assert_allclose(edge_map(images, 2)[i], smooth, atol=1e-6)
    centre = centre_map(images)
    assert centre.shape == (2, 20, 20) and torch.equal(centre[0], centre[1])
    torch.testing.assert_close(centre[0], centre[0].flip(0).flip(1).T)
    assert abs(float(centre[0, 10, 0] / centre[0, 10, 10]) - math.exp(-(0.475**2 - 0.025**2) / 0.125)) < 1e-5
    assert torch.equal(random_map(images, 3), random_map(images, 3))
    assert torch.equal(random_map(images, 3)[:1], random_map(images[:1], 3))
    assert not torch.equal(random_map(images, 3), random_map(images, 4))
    with pytest.raises(ValueError, match="`sigma`"):
        edge_map(images, 0)


# ---------------------------------------------------------------- intervals

def test_bootstrap_against_a_slow_reference():
    rng = np.random.default_rng(1)
    groups = np.array(list("aabbbcddde"))
    a, b = rng.normal(size=10), rng.normal(size=10)
    means = []
    for _ in range(20_000):
        drawn = rng.choice(list("abcde"), size=5)
        rows = np.concatenate([np.flatnonzero(groups == g) for g in drawn])
        means.append((a - b)[rows].mean())
    difference, low, high = paired_bootstrap(a, b, groups, n=20_000)
    assert difference == pytest.approx((a - b).mean())
    np.testing.assert_allclose((low, high), np.quantile(means, [0.025, 0.975]), atol=0.03)


def test_bootstrap_covers_the_truth():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        photo, truth = rng.normal(size=(50, 1)), 0.3
        a = np.repeat(photo, 3, 1) + truth + np.repeat(rng.normal(size=(50, 1)), 3, 1) + 0.1 * rng.normal(size=(50, 3))
        _, low, high = paired_bootstrap(a.ravel(), np.repeat(photo, 3), np.repeat(np.arange(50), 3), n=500)
        hits += low <= truth <= high
    assert 0.91 < hits / 400 < 0.98


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_bootstrap_symmetries(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 12))
    d, low, high = paired_bootstrap(a, b, n=500)
    np.testing.assert_allclose(paired_bootstrap(b, a, n=500), (-d, -high, -low), atol=1e-12)
    np.testing.assert_allclose(paired_bootstrap(a + 5, b, n=500), (d + 5, low + 5, high + 5), atol=1e-12)
    assert low <= d <= high and paired_bootstrap(a, a, n=500) == (0, 0, 0)
    assert paired_bootstrap(torch.tensor(a), b, n=500) == (d, low, high)


def test_bootstrap_refuses():
    with pytest.raises(ValueError, match="finite"):
        paired_bootstrap([1, math.nan], [1, 2])
    with pytest.raises(ValueError, match="shape"):
        paired_bootstrap([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="`groups`"):
        paired_bootstrap([1, 2], [1, 2], groups=[1])
    with pytest.raises(ValueError, match="`level`"):
        paired_bootstrap([1, 2], [1, 2], level=95)
    with pytest.warns(UserWarning, match="at least two groups"):
        difference, low, high = paired_bootstrap([1, 2], [1, 1], groups=[0, 0])
    assert difference == 0.5 and math.isnan(low) and math.isnan(high)


# ---------------------------------------------------------------- the whole evaluation

def evaluate(model=None, n=4, **changes):
    images, maps, _ = batch(n)
    model = model or network()
    target = falling(model, images)
    usual = {"model": model, "images": images, "target": target, "maps": {"good": maps, "bad": 1 - maps}, "steps": 8,
             "tile": 4, "progress": False}
    arguments = usual | changes
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="degradation")
        return evaluate_faithfulness(**arguments), arguments


def test_evaluation_holds_what_its_parts_say():
    result, given_ = evaluate(seed=5)
    frame = result.to_frame()
    assert result.methods == ("good", "bad", "random", "centre", "edge")
    assert len(frame) == 4 * 5 * (3 * 2 + 1) and list(frame.columns) == [
        "image", "group", "method", "metric", "baseline", "value"]
    images, target = given_["images"], given_["target"]
    controls = {"random": random_map(images, 5), "centre": centre_map(images), "edge": edge_map(images)}
    all_maps, model, cost = given_["maps"] | controls, given_["model"], 0
    for name, heat in all_maps.items():
        for baseline in ("grey", "blur"):
            parts = {"deletion": deletion(model, images, target, heat, baseline, 8).area,
                     "insertion": insertion(model, images, target, heat, baseline, 8).area}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                parts["degradation"] = tile_degradation(model, images, target, heat, 4, baseline).score
            for metric, value in parts.items():
                rows = frame[(frame["method"] == name) & (frame["metric"] == metric) & (frame["baseline"] == baseline)]
                np.testing.assert_allclose(rows["value"], value, rtol=1e-5, atol=1e-6)
            cost += 4 * (9 + 9 + 24)
    assert result.evaluations == Evaluations(cost + 4, 0)  # and once, whether the target leads at all
    pick = lambda metric, baseline: frame.query(  # noqa: E731
        "method == 'good' and metric == @metric and baseline == @baseline")["value"].to_numpy()
    np.testing.assert_array_equal(pick("insertion − deletion", "blur, grey"),
                                  pick("insertion", "blur") - pick("deletion", "grey"))


def test_summary_is_the_paired_bootstrap():
    result, _ = evaluate(n=6, groups=["a", "a", "b", "b", "c", "d"])
    table, frame = result.summary("bad", n=500, seed=2), result.to_frame()
    for row in table.itertuples():
        rows = frame[(frame["metric"] == row.metric) & (frame["baseline"] == row.baseline)]
        mine, theirs = (rows[rows["method"] == m] for m in (row.method, "bad"))
        kept = np.isfinite(mine["value"].to_numpy())
        a, b, groups = (part.to_numpy()[kept] for part in (mine["value"], theirs["value"], mine["group"]))
        expected = paired_bootstrap(a, b, groups, n=500, seed=2)
        np.testing.assert_allclose((row.difference, row.difference_low, row.difference_high), expected)
        assert row.mean == pytest.approx(mine["value"].mean()) and row.images + row.undefined == 6
        assert row.better == ("lower" if row.metric == "deletion" else "higher")
    assert "difference" not in result.summary(n=10).columns
    with pytest.raises(ValueError, match="`reference` must be one of"):
        result.summary("RISE")


def test_undefined_images_are_named_counted_and_left_out():
    images, maps, _ = batch(4)
    target = falling(network(), images)
    images[2] = 0.5
    with pytest.warns(UserWarning, match=r"undefined \(NaN\) for image\(s\) .*2 \(grey\)"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*constant")
        result = evaluate_faithfulness(network(), images, target, {"good": maps}, "degradation", tile=4,
                                       baselines=("grey",))
    table = result.summary(n=100)
    assert (table["undefined"] == 1).all() and (table["images"] == 3).all()
    assert table["mean"].notna().all()


def test_names_groups_plans_and_controls():
    images, _, target = batch(4)
    names, groups = ("p", "q", "r", "s"), ("one", "one", "two", "three")
    photos = ImageSet(images, target, names, ("",) * 4, ("",) * 4, ("development",) * 4, groups=groups)
    mine = torch.rand(4, 14, 12)
    plan = {"deletion": ("grey",), "insertion": ("soft",)}
    baselines = {"grey": 0.5, "soft": "blur"}
    result, given_ = evaluate(images=photos, maps={"random": mine}, metrics=plan, baselines=baselines)
    frame = result.to_frame()
    assert set(frame["image"]) == set(names) and set(frame["group"]) == set(groups)
    assert result.methods == ("random", "centre", "edge") and set(CONTROLS) == set(result.methods)
    assert set(zip(frame["metric"], frame["baseline"], strict=True)) == {("deletion", "grey"), ("insertion", "soft")}
    own = frame.query("method == 'random' and metric == 'deletion'")["value"]
    np.testing.assert_allclose(own, deletion(network(), images, given_["target"], mine, 0.5, 8).area, rtol=1e-5)
    only, _ = evaluate(maps={})  # the controls alone
    assert only.methods == ("random", "centre", "edge")
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.frame = None


def test_evaluation_refuses():
    images, maps, _ = batch(4)
    for change, error, message in [
        ({"maps": maps}, TypeError, "`maps` must be a mapping"),
        ({"maps": {"x": maps[:1]}}, ValueError, r"`maps\['x'\]` must have shape"),
        ({"metrics": ("beauty",)}, ValueError, "`metrics` must be one of"),
        ({"metrics": ()}, ValueError, "`metrics`"),
        ({"metrics": {"deletion": ("mean",)}}, ValueError, "must use baselines among"),
        ({"baselines": "grey"}, TypeError, "`baselines`"),
        ({"baselines": ("purple",)}, ValueError, "`baselines` must be one of"),
        ({"groups": [1, 2]}, ValueError, "`groups`"),
        ({"images": images[:0]}, ValueError, "at least one image"),
        ({"batch_size": -1}, ValueError, "`batch_size`"),
    ]:
        with pytest.raises(error, match=message):
            evaluate(**change)


def test_pictures():
    before = dict(plt.rcParams)
    result, given_ = evaluate()
    fig = result.plot(highlight=("good",))
    assert [ax.get_title() for ax in fig.axes][:2] == ["deletion\ngrey", "deletion\nblur"]
    for metric in ("deletion", "insertion"):
        ax = result.plot_curves(metric, "grey")
        np.testing.assert_allclose(ax.lines[0].get_ydata(), result.curves[metric, "grey"][1]["good"].mean(0), rtol=1e-6)
    with pytest.raises(ValueError, match="must be one of"):
        result.plot_curves("deletion", "mean")
    curve = deletion(given_["model"], given_["images"], given_["target"], given_["maps"]["good"])
    assert len(curve.plot(list("abcd")).lines) == 4
    with pytest.raises(ValueError, match="`names`"):
        curve.plot(["a"])
    assert "good" in result._repr_html_() and "4 images" in repr(result)
    one, _ = evaluate(n=1, metrics=("deletion",))
    with pytest.warns(UserWarning, match="at least two groups"):
        one.summary(n=50)
    ends = [np.nan_to_num(line.get_xdata()) for ax in one.plot().axes for line in ax.lines]
    assert ends and all((end == 0).all() for end in ends)  # the line at zero, and no interval
    plt.close("all")
    assert dict(plt.rcParams) == before
