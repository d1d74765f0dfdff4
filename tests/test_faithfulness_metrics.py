"""ROAD, sampled removals, form, localisation, sanity and statistics against other packages, closed forms and loops."""

import math
import warnings

import matplotlib

matplotlib.use("agg")

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cvi_nb.data import load_digits
from cvi_nb.faithfulness import (
    cascade,
    compare,
    complexity,
    evaluate_faithfulness,
    grid_pointing_game,
    holm,
    impute,
    infidelity,
    label_randomisation,
    layer_names,
    max_sensitivity,
    model_randomisation,
    mosaics,
    necessity,
    overwritten,
    paired_bootstrap,
    pointing_game,
    quality_against_budget,
    rank_correlation,
    relevance_mass,
    relevance_rank,
    removal_shares,
    road,
    seed_agreement,
    sensitivity_n,
    signed_rank,
    sparseness,
    sufficiency,
    target_randomisation,
)
from cvi_nb.models import Classifier, fold_batch_norm


def network(channels=1, classes=4, seed=0, norm=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.Tanh(),
            nn.Conv2d(6, 6, 3, stride=2), nn.Tanh(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, classes))
        if norm:
            nn.init.normal_(layers[1].weight)
            nn.init.normal_(layers[1].bias)
    for p in layers.parameters():
        p.data *= 3
    return layers.eval()


def batch(n=4, channels=1, h=14, w=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, channels, h, w, generator=generator)
    return images, torch.randn(n, h, w, generator=generator), torch.arange(n) % 4


def gradient(model, x, y):
    return Classifier.value_and_gradient(model, x, y, "margin")[1].sum(1)


# ---------------------------------------------------------------- agreement with other packages

@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_infidelity_is_captums(normalise, channels):
    captum = pytest.importorskip("captum.metrics")
    model, (images, _, target) = network(channels), batch(3, channels)
    attribution = torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
    draws = 16

    def perturbation(x, generator):
        change = 0.3 * torch.rand(x.shape, generator=generator) * (torch.rand(x.shape, generator=generator) < 0.5)
        return change, x - change

    def theirs_perturbs(x):
        parts = [perturbation(chunk, torch.Generator().manual_seed(7)) for chunk in x.split(draws)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    ours = infidelity(model, images, target, attribution, perturbation, draws, normalise=normalise, seed=7)
    theirs = captum.infidelity(lambda x: model(x).softmax(1), theirs_perturbs, images, attribution, target=target,
                               n_perturb_samples=draws, normalize=normalise)
    torch.testing.assert_close(ours.value, theirs.detach(), rtol=1e-4, atol=1e-6)


def test_max_sensitivity_is_captums():
    captum = pytest.importorskip("captum.metrics")
    model, (images, _, target) = Classifier(network()), batch(3)
    noise = 0.05 * (2 * torch.rand(6, *images.shape[1:], generator=torch.Generator().manual_seed(0)) - 1)
    turn = iter(noise)
    ours = max_sensitivity(model, images, target, gradient, draws=6, perturb=lambda x, _: x + next(turn))

    def first(x):
        return x[0] if isinstance(x, tuple) else x

    theirs = captum.sensitivity_max(
        lambda x, target: (gradient(model, first(x), target)[:, None],), images, target=target, n_perturb_samples=6,
        perturb_func=lambda x: first(x) + noise.repeat(3, 1, 1, 1))
    torch.testing.assert_close(ours.value, theirs, rtol=1e-4, atol=1e-6)


def test_form_and_localisation_are_quantus():
    quantus = pytest.importorskip("quantus")
    images, maps, target = batch()
    masks = torch.zeros(4, 14, 12, dtype=torch.bool)
    masks[:, 3:9, 2:7] = True
    common = {"model": None, "x_batch": images.numpy(), "y_batch": target.numpy()}
    quiet = {"disable_warnings": True, "display_progressbar": False, "normalise": False}

    def theirs(metric, heat, **options):
        return np.array(metric(**common, a_batch=heat[:, None].numpy().copy(), **options), dtype=float)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for metric, ours in [(quantus.Sparseness, sparseness), (quantus.Complexity, complexity)]:
            np.testing.assert_allclose(ours(maps), theirs(metric(abs=True, **quiet), maps), atol=1e-4)
        for metric, ours in [(quantus.PointingGame, pointing_game), (quantus.RelevanceMassAccuracy, relevance_mass),
                             (quantus.RelevanceRankAccuracy, relevance_rank)]:
            heat = maps.abs()
            found = theirs(metric(abs=True, **quiet), heat, s_batch=masks[:, None].numpy())
            np.testing.assert_allclose(ours(heat, masks), found, atol=1e-4)


def test_road_is_quantus_on_grey():
    quantus = pytest.importorskip("quantus")
    from quantus.functions.perturb_func import noisy_linear_imputation

    images, maps, _ = batch(6, h=20, w=20)
    model = network()
    target = model(images).argmax(1)
    gone = torch.rand(6, 20, 20, generator=torch.Generator().manual_seed(1)) < 0.4
    for x, mask, mine in zip(images, gone, impute(images, gone, noise=0), strict=True):
        theirs = noisy_linear_imputation(x.double().numpy(), np.flatnonzero(mask), noise=0.0)
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = quantus.ROAD(percentages=[10, 30, 50], noise=0.0, normalise=False, abs=False, disable_warnings=True,
                              display_progressbar=False)
        theirs = metric(model=model, x_batch=images.numpy(), y_batch=target.numpy(), a_batch=maps[:, None].numpy(),
                        channel_first=True, device="cpu")
    ours = road(model, images, target, maps, (0.1, 0.3, 0.5), noise=0.0)
    np.testing.assert_allclose(ours.morf_correct.float().mean(0), list(theirs.values()), atol=1e-6)


# ---------------------------------------------------------------- ROAD

def test_imputation_against_a_dense_solve():
    image = torch.rand(1, 3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gone = torch.rand(1, 6, 5, generator=torch.Generator().manual_seed(3)) < 0.6
    places = [tuple(p) for p in gone[0].nonzero().tolist()]
    matrix, right = np.zeros((len(places),) * 2), np.zeros((len(places), 3))
    for k, (y, x) in enumerate(places):
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                if (dy, dx) == (0, 0) or not (0 <= y + dy < 6 and 0 <= x + dx < 5):
                    continue
                weight = 1 / 6 if 0 in (dy, dx) else 1 / 12
                matrix[k, k] += weight
                if (y + dy, x + dx) in places:
                    matrix[k, places.index((y + dy, x + dx))] -= weight
                else:
                    right[k] += weight * image[0, :, y + dy, x + dx].numpy()
    filled = impute(image, gone, noise=0)
    np.testing.assert_allclose(filled[0][:, gone[0]].T, np.linalg.solve(matrix, right), atol=1e-9)
    assert torch.equal(filled[0][:, ~gone[0]], image[0][:, ~gone[0]])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_imputation_commutes_with_reflection_and_brightness(seed):
    generator = torch.Generator().manual_seed(seed)
    images, gone = 0.5 * torch.rand(2, 2, 7, 9, generator=generator), torch.rand(2, 7, 9, generator=generator) < 0.5
    plain = impute(images, gone, noise=0)
    torch.testing.assert_close(impute(images.flip(2, 3), gone.flip(1, 2), noise=0), plain.flip(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(impute(images + 0.3, gone, noise=0), plain + 0.3, atol=1e-5, rtol=0)


def test_road_does_not_depend_on_its_batch():
    model, (images, maps, target) = network(3), batch(4, 3)
    whole = road(model, images, target, maps, (0.2, 0.6), batch_size=3, seed=4)
    single = road(model, images[2:3], target[2:3], maps[2:3], (0.2, 0.6), seed=4)
    torch.testing.assert_close(whole.score[2:3], single.score)
    assert whole.evaluations.forward == 4 * 2 * 2


# ---------------------------------------------------------------- sampled removals

def linear(weights):
    def model(x):
        p = (x * weights).sum((1, 2, 3))
        return torch.stack([p, 1 - p], 1).clamp_min(1e-9).log()
    return model


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.floats(-5, 5).filter(lambda v: abs(v) > 0.01))
def test_an_additive_network_is_accounted_for_exactly(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(1, 8, 8, generator=generator)
    weights = weights / weights.sum()
    images = torch.rand(2, 1, 8, 8, generator=generator)
    exact = (weights * (images - 0.5))[:, 0]
    assert infidelity(linear(weights), images, [0, 0], scale * exact, draws=20, seed=seed).value.max() < 1e-9
    found = sensitivity_n(linear(weights), images, [0, 0], scale * exact, draws=8, tile=1, seed=seed).correlation
    torch.testing.assert_close(found, torch.full_like(found, math.copysign(1, scale)), atol=1e-3, rtol=0)


def test_sampled_metrics_do_not_depend_on_the_batch():
    model, (images, maps, target) = network(3), batch(4, 3)
    for judge in (lambda *a, **k: infidelity(*a, draws=9, **k).value,
                  lambda *a, **k: sensitivity_n(*a, draws=9, tile=2, **k).correlation):
        whole = judge(model, images, target, maps, batch_size=5)
        torch.testing.assert_close(whole[1:2], judge(model, images[1:2], target[1:2], maps[1:2]), rtol=1e-3, atol=1e-4)


def test_regions_against_a_loop():
    model, (images, maps, _) = network(3), batch(4, 3)
    target = model(images).argmax(1)
    for judge, shown in ((sufficiency, True), (necessity, False)):
        found = judge(model, images, target, maps, (0.1, 0.5), baseline=0.0)
        for i in range(4):
            order = maps[i].flatten().argsort(descending=True, stable=True)
            for s, area in enumerate((0.1, 0.5)):
                mask = torch.full((168,), not shown)
                mask[order[: round(area * 168)]] = shown
                logits = model((images[i] * mask.view(14, 12))[None])
                assert found.decided[i, s] == float((logits.argmax() == target[i]) == shown)
                assert found.probability[i, s] == pytest.approx(float(logits.softmax(1)[0, target[i]]), abs=1e-5)
    table = found.to_frame()
    assert len(table) == 8 and table["decided"].isin([0, 1]).all()


def test_removal_shares_are_shares():
    for kind in ("squares", "pixels"):
        shares = removal_shares((9, 13), 50, kind)
        assert shares.shape == (50, 9, 13) and ((shares == 0) | (shares == 1)).all()
        assert shares.flatten(1).any(1).float().mean() > 0.9 and torch.equal(shares, removal_shares((9, 13), 50, kind))


# ---------------------------------------------------------------- form and localisation

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_form_ignores_scale_sign_and_place(seed, scale):
    maps = torch.randn(1, 6, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moved = -scale * maps.flatten()[torch.randperm(42, generator=torch.Generator().manual_seed(seed))].view(1, 6, 7)
    for score in (sparseness, complexity):
        torch.testing.assert_close(score(maps), score(moved))
    assert 0 <= sparseness(maps) <= 1 - 1 / 42 and 0 <= complexity(maps) <= math.log(42)


def test_mosaics_hold_different_classes_and_ask_about_one():
    digits = load_digits("development")[::200]
    for cells, full in ((2, True), (2, False), (3, True)):
        grids = mosaics(digits, count=9, cells=cells, full_size=full, seed=2)
        side = 28 * cells if full else 28
        assert grids.images.shape == (9, 1, side, side) and grids.images.min() >= 0 and grids.images.max() <= 1
        for k, row in enumerate(grids.to_frame().itertuples()):
            assert len({int(digits.labels[i]) for i in grids.parts[k]}) == cells**2
            assert digits.labels[row.photo] == row.target and grids.parts[k, row.cell] == row.photo
            if full:
                assert torch.equal(grids.images[k][:, grids.truth[k]].view(1, 28, 28), digits.images[row.photo])
    assert torch.equal(grids.images, mosaics(digits, count=9, cells=3, full_size=True, seed=2).images)
    assert (grid_pointing_game(grids.truth.float(), grids.truth) == 1).all()


def test_pointing_with_tolerance_and_ties():
    mask = torch.zeros(1, 9, 9, dtype=torch.bool)
    mask[0, 4, 4] = True
    heat = torch.zeros(1, 9, 9)
    heat[0, 4, 7] = 1
    assert [pointing_game(heat, mask, t).item() for t in (0, 2, 3)] == [0, 0, 1]
    heat[0, 4, 4] = 1
    assert pointing_game(heat, mask).item() == 0.5  # two maxima, one inside


# ---------------------------------------------------------------- sanity

@pytest.mark.parametrize("kind", ["plain", "folded", "unfolded"])
def test_cascade_changes_one_layer_more_each_time(kind):
    model = Classifier(network(3, norm=kind != "plain"))
    if kind == "folded":
        model = Classifier(fold_batch_norm(model.model, 14))
        assert isinstance(model.model, torch.fx.GraphModule)
    images, before = batch(2, 3)[0], {k: v.clone() for k, v in model.state_dict().items()}
    names = layer_names(model, images[:1])
    assert len(names) == (4 if kind == "unfolded" else 3)
    previous = model
    for k, (name, depth, changed) in enumerate(cascade(model, images[:1])):
        assert name == names[-1 - k] and depth == pytest.approx((k + 1) / len(names))
        differ = [key for key, v in changed.state_dict().items() if not torch.equal(v, previous.state_dict()[key])]
        assert differ and all(key.startswith(f"model.{name}.") for key in differ)
        previous = changed
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the original is left alone"
    again = overwritten(model, names).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in previous.state_dict().items())


def test_randomisations():
    model, digits = Classifier(network()), load_digits("development")[::400]
    target = model.logits(digits.images).argmax(1)
    result = model_randomisation(model, digits, target, {"gradient": gradient}, stages=2)
    frame = result.to_frame()
    assert set(frame["method"]) == {"gradient", "edge"} and sorted(set(frame["depth"])) == [2 / 3, 1.0]
    assert (frame.loc[frame["method"] == "edge", "similarity"] > 1 - 1e-9).all()
    assert frame.loc[frame["method"] == "gradient", "similarity"].abs().mean() < 0.5
    same = label_randomisation(model, digits, target, {"gradient": gradient}, model).frame
    assert (same["similarity"] > 0.999).all()
    other = target_randomisation(model, digits, target, {"gradient": gradient}).frame
    assert other.loc[other["method"] == "gradient", "similarity"].mean() < 0.9
    result.plot()
    assert "gradient" in result._repr_html_() and "10 images" in repr(result)


def test_rank_correlation_is_scipys():
    from scipy.stats import spearmanr

    a, b = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    expected = [spearmanr(x.flatten(), y.flatten())[0] for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(rank_correlation(a, b), expected, atol=1e-12)
    assert rank_correlation(a, 0 * b).isnan().all()


def test_seeds():
    model, (images, _, target) = network(), batch()

    def noisy(m, x, y, seed=0):
        return torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(seed)) + 0 * x[:, 0]

    assert seed_agreement(model, images, target, lambda m, x, y, seed: x[:, 0]).value.min() > 0.999
    assert seed_agreement(model, images, target, noisy).value.abs().max() < 0.5
    with pytest.raises(ValueError, match="`seeds`"):
        seed_agreement(model, images, target, noisy, seeds=(1, 1))


# ---------------------------------------------------------------- statistics

@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_against_its_definition(p):
    adjusted, m = holm(p), len(p)
    order = np.argsort(p, kind="stable")
    worst = 0.0
    for i, k in enumerate(order):  # step down, one at a time
        worst = max(worst, min(1, (m - i) * p[k]))
        assert adjusted[k] == pytest.approx(worst)
    assert (adjusted >= np.array(p) - 1e-12).all() and (adjusted <= 1).all()


def test_compare_is_bootstrap_and_wilcoxon():
    from scipy.stats import wilcoxon

    rng = np.random.default_rng(0)
    values = {name: rng.normal(shift, 1, 24) for name, shift in (("a", 0), ("b", 1), ("c", 0))}
    groups = np.repeat(np.arange(12), 2)
    table = compare(values, "a", groups, n=500).set_index("method")
    for name in ("b", "c"):
        difference = values[name] - values["a"]
        expected = paired_bootstrap(values[name], values["a"], groups, n=500)
        np.testing.assert_allclose(table.loc[name, ["difference", "low", "high"]].astype(float), expected)
        assert table.loc[name, "p"] == pytest.approx(wilcoxon(difference.reshape(12, 2).mean(1)).pvalue)
        assert table.loc[name, "groups"] == 12
    assert signed_rank(np.zeros(5)) == 1
    values["d"] = np.where(np.arange(24) < 3, np.nan, values["b"])
    with pytest.warns(UserWarning, match="3 of 24 images have no value"):
        assert compare(values, "a", groups, n=100).set_index("method").loc["d", "left_out"] == 3
    for bad, message in [({"a": [1.0], "b": [np.nan]}, "share an image"), ({"a": [1.0]}, "two methods"),
                         ({"a": [1.0, 2.0], "b": [1.0]}, "shape"), ({"a": [1.0], "b": [np.inf]}, "finite")]:
        with pytest.raises(ValueError, match=message):
            compare(bad, "a")


# ---------------------------------------------------------------- together

def test_all_metrics_in_one_table_and_to_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    model, (images, maps, _) = network(3), batch(5, 3)
    target = model(images).argmax(1)
    metrics = ("sufficiency", "necessity", "infidelity", "sensitivity-n", "road", "sparseness", "complexity")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = evaluate_faithfulness(model, images, target, {"mine": maps}, metrics, baselines=("grey",))
    frame = result.to_frame()
    assert set(frame["metric"]) == set(metrics) and result.methods == ("mine", "random", "centre", "edge")
    pick = lambda metric: frame.query("metric == @metric and method == 'mine'")["value"].to_numpy()  # noqa: E731
    np.testing.assert_allclose(pick("sparseness"), sparseness(maps))
    np.testing.assert_allclose(pick("infidelity"), infidelity(model, images, target, maps).value, rtol=1e-4, atol=1e-7)
    frame.to_parquet(tmp_path / "rows.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "rows.parquet"), frame)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = result.compare("random", n=200)
    assert len(table) == 7 * 3 and (table["p_holm"] >= table["p"]).all() and set(table["favours"]) == {"neither"}


def test_quality_against_budget_counts_what_was_spent():
    images, _, target = batch(3)

    def explain(model, x, y, budget):
        steps = [gradient(model, (x + 0.01 * k).clamp(0, 1), y) for k in range(budget // 2)]
        return torch.stack(steps).mean(0)

    frame = quality_against_budget(network(), images, target, {"steps": explain}, (2, 6), steps=6, progress=False,
                                   metrics={"deletion": ("grey",)})
    mine = frame[frame["method"] == "steps"]
    assert (mine["forward"] == mine["budget"] / 2).all() and (mine["backward"] == mine["budget"] / 2).all()
    assert set(frame.loc[frame["budget"] == 0, "method"]) == {"random", "centre", "edge"}
    with pytest.raises(ValueError, match="`budgets`"):
        quality_against_budget(network(), images, target, {"steps": explain}, ())


def test_bad_input_is_said_clearly():
    model, (images, maps, target) = network(), batch()
    nan = maps.clone()
    nan[1, 2, 3] = math.nan
    wrong = (model(images).argmax(1) + 1) % 4
    one_class = nn.Sequential(nn.Flatten(), nn.Linear(168, 1))
    for call, error, message in [
        (lambda: road(model, images, target, nan), ValueError, r"NaN or infinite values in map\(s\) 1"),
        (lambda: infidelity(model, images, target, nan), ValueError, "NaN"),
        (lambda: sensitivity_n(model, images, target, nan), ValueError, "NaN"),
        (lambda: sparseness(nan), ValueError, r"map\(s\) 1"),
        (lambda: complexity(maps[0]), ValueError, "shape"),
        (lambda: relevance_mass(nan, maps > 0), ValueError, "NaN"),
        (lambda: rank_correlation(nan, maps), ValueError, "finite"),
        (lambda: road(model, images[:0], [], maps[:0]), ValueError, "at least one image"),
        (lambda: sufficiency(model, images, wrong, maps), ValueError, "none of 4"),
        (lambda: sufficiency(model, images, target, maps, areas=(0.5, 0.1)), ValueError, "ascend"),
        (lambda: target_randomisation(one_class, images, 0, {"x": gradient}), ValueError, r"2 classes.*torch\.cat"),
        (lambda: model_randomisation(model, images, target, {}), TypeError, "`methods`"),
        (lambda: model_randomisation(model, images, target, {"x": lambda m, x, y: nan}), ValueError, "NaN"),
        (lambda: model_randomisation(model, images, target, {"x": lambda m, x, y: x}), ValueError, "shape"),
        (lambda: overwritten(model, ["nothing"]), ValueError, "`layers`"),
        (lambda: max_sensitivity(model, images, target, gradient, radius=2), ValueError, "`radius`"),
        (lambda: mosaics(images, [1, 1, 2, 2]), ValueError, "cells² = 4"),
        (lambda: mosaics(images[:0], []), ValueError, "at least one image"),
        (lambda: impute(images, torch.zeros(4, 14, 11, dtype=torch.bool)), ValueError, "`removed`"),
        (lambda: holm([0.1, math.nan]), ValueError, "`p`"),
    ]:
        with pytest.raises(error, match=message):
            call()
    with pytest.warns(UserWarning, match="constant"):
        road(model, images, target, 0 * maps)
    with pytest.warns(UserWarning, match="top class of none of the 4 images"):
        evaluate_faithfulness(model, images, wrong, {"mine": maps}, "deletion", steps=3, baselines=("grey",))
    with pytest.warns(UserWarning, match="zero throughout"):
        assert max_sensitivity(model, images, target, lambda m, x, y: 0 * x[:, 0], draws=1).value.isnan().all()
