"""Attacks confined to a map's critical pixels: supports to the pixel, closed forms, invariances, bad input."""

import matplotlib

matplotlib.use("agg")

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import label

from cvi_nb.attack import ddn, pgd
from cvi_nb.faithfulness import (
    ConfinedResult,
    attack_confined,
    compare,
    critical_support,
    moved_shapes,
    patch_map,
    region_map,
)
from cvi_nb.models import Classifier


def linear(weights, offset=1.0):
    def model(x):
        margin = ((x - 0.5) * weights).sum((1, 2, 3)) + offset
        return torch.stack([margin, torch.zeros_like(margin)], 1)
    return model


def scene(n=5, side=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(1, side, side, generator=generator)
    images = 0.45 + 0.1 * torch.rand(n, 1, side, side, generator=generator)
    return weights, images


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.001, 1), st.booleans())
def test_supports_have_the_area_and_grow_with_it(seed, area, clusters):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(0, 5, (3, 7, 9), generator=generator).float()  # many ties
    partition = torch.randint(0, 6, (3, 7, 9), generator=generator) if clusters else None
    support = critical_support(maps, area, partition)
    assert (support.flatten(1).sum(1) == max(1, round(area * 63))).all()
    wider = critical_support(maps, min(1.0, area + 0.1), partition)
    assert not (support & ~wider).any()
    if clusters:
        for chosen, labels in zip(support, partition, strict=True):
            cut = [k for k in range(6) if 0 < int(chosen[labels == k].sum()) < int((labels == k).sum())]
            assert len(cut) <= 1
    else:
        inside, outside = maps.masked_fill(~support, 9), maps.masked_fill(support, -9)
        assert (inside.flatten(1).amin(1) >= outside.flatten(1).amax(1)).all()


def test_clusters_rank_by_their_mean():
    maps = torch.tensor([[[1.0, 1.0, 5.0, 0.0]]])
    partition = torch.tensor([[[0, 0, 1, 1]]])
    assert critical_support(maps, 0.5, partition).tolist() == [[[False, False, True, True]]]  # mean 2.5 before mean 1
    assert critical_support(maps, 0.25, partition).tolist() == [[[False, False, True, False]]]


def components(mask):
    """Connected components of a mask (H, W) by scikit-image, each as the mirrored form that comes first; sorted."""
    numbers, found = label(mask.numpy(), connectivity=1), []
    for k in range(1, numbers.max() + 1):
        rows, columns = np.nonzero(numbers == k)
        cut = (numbers == k)[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        found.append(min((cut.shape, cut[::a, ::b].tobytes()) for a in (1, -1) for b in (1, -1)))
    return sorted(found)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.integers(1, 12), st.integers(1, 12))
def test_moved_shapes_are_congruent(seed, share, rows, columns):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(2, rows, columns, generator=generator) < share
    moved = moved_shapes(masks, seed)
    assert moved.shape == masks.shape and moved.dtype == torch.bool
    for before, after in zip(masks, moved, strict=True):
        assert int(before.sum()) == int(after.sum()) and components(before) == components(after)
    assert torch.equal(moved, moved_shapes(masks, seed)) and torch.equal(moved[1:], moved_shapes(masks[1:], seed))


def test_moved_shapes_go_everywhere():
    mask = torch.zeros(1, 4, 5, dtype=torch.bool)
    mask[0, 0, :2] = mask[0, 1, 0] = True  # an L of three pixels: 4 mirrored forms at 3 × 4 places
    found = {moved_shapes(mask, seed).numpy().tobytes(): 0 for seed in range(600)}
    assert len(found) == 48
    cross = torch.ones(1, 5, 5, dtype=torch.bool)
    cross[0, 1:4:2, 1:4:2] = False
    assert torch.equal(moved_shapes(cross), cross)  # no room elsewhere
    assert moved_shapes(mask[:0]).shape == (0, 4, 5) and not moved_shapes(mask & False).any()
    for wrong, options, error in [(mask[0], {}, ValueError), (mask.float(), {}, TypeError),
                                  (mask.long(), {}, TypeError), (mask, {"tries": 0}, ValueError)]:
        with pytest.raises(error):
            moved_shapes(wrong, **options)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 1))
def test_region_maps_take_whole_regions_and_one_connected_part(seed, area):
    generator = torch.Generator().manual_seed(seed)
    heat = torch.rand(2, 9, 11, generator=generator)
    parts = [label((h > 0.5).numpy().astype(int), background=-1, connectivity=1) for h in heat]
    labels = torch.stack([torch.from_numpy(part).long().unique(return_inverse=True)[1] for part in parts])
    ranked = region_map(labels, heat)
    assert ranked.amax() == 1 and ranked.amin() > 0 and ranked[0].unique().numel() == 99
    for chosen, numbers, values in zip(critical_support(ranked, area), labels, heat, strict=True):
        means = torch.stack([values[numbers == k].mean() for k in range(int(numbers.max()) + 1)])
        shares = [chosen[numbers == k].float().mean() for k in means.argsort(descending=True).tolist()]
        assert shares == sorted(shares, reverse=True) and sum(0 < s < 1 for s in shares) <= 1
        cut = next((k for k in numbers.unique().tolist() if 0 < chosen[numbers == k].float().mean() < 1), None)
        if cut is not None:  # the part in which the area ends hangs together, and begins at the region's hottest pixel
            part = chosen & (numbers == cut)
            assert label(part.numpy(), connectivity=1).max() == 1
            assert bool(part.flatten()[values.where(numbers == cut, torch.tensor(-1.0)).argmax()])
    with pytest.raises(ValueError, match="`labels`"):
        region_map(labels[:, :4], heat)


def test_shapes_elsewhere_are_a_row_of_their_own():
    weights, images = scene(3)
    maps, one = {"w": weights.abs().expand(3, 10, 10)}, {"areas": (0.1, 0.3), "eps": 0.03, "steps": 5, "norm_steps": 10}
    whole = attack_confined(linear(weights), images, None, maps, elsewhere=("w", "random pixels"), **one)
    assert whole.methods == ("w", "random pixels", "random patches", "w, elsewhere", "random pixels, elsewhere")
    few = attack_confined(linear(weights), images, None, maps, elsewhere=["w"], chance=False, **one)
    assert few.methods == ("w", "w, elsewhere") and len(few.plot()) == 2
    kept = whole.frame[whole.frame["method"].isin(few.methods)].reset_index(drop=True)
    pd.testing.assert_frame_equal(few.frame, kept)
    assert (few.frame.groupby("area")["pixels"].nunique() == 1).all()
    assert few.compare("w, elsewhere", area=0.3, n=50)["difference"].iloc[0] < 0  # |w| is the better choice
    for wrong, error in (("w", TypeError), (["v"], ValueError)):
        with pytest.raises(error, match="`elsewhere`"):
            attack_confined(linear(weights), images, None, maps, elsewhere=wrong, **one)


def test_a_linear_network_has_closed_forms():
    weights, images = scene()
    model, maps = linear(weights), {"best": weights.abs().expand(5, 10, 10), "worst": -weights.abs().expand(5, 10, 10)}
    result = attack_confined(model, images, None, maps, areas=(0.2, 0.5), eps=0.04, steps=40, norm_steps=100)
    margin = model(images)[:, 0]
    for name in maps:
        for area in (0.2, 0.5):
            inside = (weights * critical_support(maps[name], area)[:, None]).flatten(1)
            rows = result.frame.query("method == @name and area == @area")
            np.testing.assert_array_equal(rows["success"] == 1, 0.04 * inside.abs().sum(1) > margin)
            exact = margin / inside.norm(dim=1)
            free = (exact * inside.abs().amax(1) / inside.norm(dim=1) < 0.44).numpy()  # meets neither 0 nor 1
            np.testing.assert_allclose(rows["l2"].to_numpy()[free], exact[free], rtol=0.03)
    mean = result.frame.pivot_table("l2", "method", "area")
    chance = mean.loc["random pixels"]
    assert (mean.loc["best"] < chance).all() and (chance < mean.loc["worst"]).all()


def test_frame_is_what_the_attacks_give():
    weights, images = scene(3)
    model = Classifier(linear(weights))
    result = attack_confined(model, images, None, {"w": weights.expand(3, 10, 10)}, areas=(0.3,), eps=0.03, steps=6,
                             norm_steps=20)
    assert result.methods == ("w", "random pixels", "random patches")
    support, label = critical_support(weights.expand(3, 10, 10), 0.3), [0, 0, 0]
    ball = pgd(model, images, torch.tensor(label), eps=0.03, steps=6, support=support)
    near = ddn(model, images, torch.tensor(label), steps=20, gamma=0.12, initial=0.5, support=support)
    rows = result.frame.query("method == 'w'")
    np.testing.assert_array_equal(rows["success"], ball.success)
    assert (rows["l2"] <= near.distance.numpy() + 1e-6).all() and (rows["l2"] > 0).all()  # pulled back, never longer
    np.testing.assert_array_equal(rows["forward"], ball.forward + near.forward + 5)
    np.testing.assert_array_equal(rows["backward"], ball.backward + near.backward)
    assert (rows["pixels"] == 30).all()


def test_failed_attacks_count_as_the_longest_perturbation():
    weights, images = scene(3)
    result = attack_confined(linear(weights, 50.0), images, None, {"w": weights.expand(3, 10, 10)}, areas=(0.3,),
                             eps=0.03, steps=3, norm_steps=8)
    rows = result.frame.query("method == 'w'")
    support = critical_support(weights.expand(3, 10, 10), 0.3)[:, None]
    longest = (torch.maximum(images, 1 - images) * support).flatten(1).norm(dim=1)
    assert (rows["l2_failed"] == 1).all() and (rows["success"] == 0).all()
    np.testing.assert_allclose(rows["l2"], longest, rtol=1e-6)


def test_chance_is_clusters_where_maps_choose_clusters():
    weights, images = scene(4)
    partition = (torch.arange(10)[:, None] // 5 * 2 + torch.arange(10) // 5).expand(4, 10, 10)
    result = attack_confined(linear(weights), images, None, {"w": weights.abs().expand(4, 10, 10)}, areas=(0.25,),
                             eps=0.05, steps=3, norm_steps=8, partition=partition)
    assert result.methods == ("w", "random clusters") and result.settings["unit"] == "cluster"


def test_tables_and_pictures(tmp_path):
    pytest.importorskip("pyarrow")
    weights, images = scene(6)
    result = attack_confined(linear(weights), images, None, {"w": weights.abs().expand(6, 10, 10)}, areas=(0.2, 0.6),
                             eps=0.03, steps=5, norm_steps=10, groups=list("aabbcd"))
    result.to_frame().to_parquet(tmp_path / "rows.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "rows.parquet"), result.frame)
    summary = result.summary(n=200).set_index(["method", "area"])
    rows = result.frame.query("method == 'w' and area == 0.2")
    assert summary.loc[("w", 0.2), "l2"] == pytest.approx(rows["l2"].mean())
    table = result.compare("w", area=0.6, n=200)
    values = {m: result.frame.query("method == @m and area == 0.6")["l2"].to_numpy() for m in result.methods}
    pd.testing.assert_frame_equal(table, compare(values, "w", list("aabbcd"), n=200))
    assert len(result.plot()) == 2 and "random pixels" in result._repr_html_() and "6 images" in repr(result)
    backwards = ConfinedResult(result.frame.sort_values("area", ascending=False, kind="stable"), result.settings)
    for ax in backwards.plot():
        drawn = [list(line.get_xdata()) for line in ax.lines if len(line.get_xdata())]  # the others name methods
        assert len(drawn) == 3 and all(x == [20, 60] for x in drawn)
    bare = attack_confined(linear(weights), images, None, {}, areas=(0.2,), eps=0.03, steps=2, norm_steps=None)
    assert "l2" not in bare.frame and len(bare.plot()) == 1 and "success" in bare.summary(n=50)
    with pytest.raises(ValueError, match="`measure` one of"):
        bare.compare("random pixels")


def test_one_image_does_not_depend_on_its_company():
    weights, images = scene(4)
    maps = weights.abs().expand(4, 10, 10)
    one = {"areas": (0.3,), "eps": 0.03, "steps": 8, "norm_steps": 20}
    whole = attack_confined(linear(weights), images, None, {"w": maps}, batch_size=3, **one).frame
    alone = attack_confined(linear(weights), images[:1], None, {"w": maps[:1]}, **one).frame
    whole, alone = whole.query("method == 'w'"), alone.query("method == 'w'")
    assert whole["l2"].iloc[0] == pytest.approx(alone["l2"].iloc[0], rel=1e-4)
    assert torch.equal(patch_map(images)[:1], patch_map(images[:1]))


def test_bad_input_is_said_clearly():
    weights, images = scene(4)
    model, maps = linear(weights), {"w": weights.abs().expand(4, 10, 10)}
    usual = {"steps": 2, "norm_steps": 4, "areas": (0.3,)}
    for arguments, error, message in [
        ({"maps": {"w": torch.full((4, 10, 10), torch.nan)}}, ValueError, "NaN"),
        ({"maps": {"w": maps["w"][:2]}}, ValueError, r"`maps\['w'\]` must have shape"),
        ({"maps": maps["w"]}, TypeError, "`maps` must be a mapping"),
        ({"images": images[:0]}, ValueError, "at least one image"),
        ({"target": [1] * 4}, ValueError, "all 4 wrong"),
        ({"target": [0, 0]}, ValueError, "`target`"),
        ({"areas": (20,)}, ValueError, r"`areas` must be .* in \(0, 1\], got 20"),
        ({"norm_step": 3}, TypeError, "did you mean `norm_steps`"),
        ({"partition": torch.zeros(4, 9, 10, dtype=torch.int64)}, ValueError, "`partition`"),
        ({"eps": 0}, ValueError, "`eps`"),
        ({"batch_size": 0}, ValueError, "`batch_size`"),
        ({"groups": [1]}, ValueError, "`groups`"),
    ]:
        with pytest.raises(error, match=message):
            attack_confined(**({"model": model, "images": images, "maps": maps} | usual | arguments))
    with pytest.warns(UserWarning, match="2 have another top class"):
        part = attack_confined(model, images, [0, 0, 1, 0], maps, **usual)
    assert sorted(part.frame["image"].unique()) == [0, 1, 3]
    with pytest.warns(UserWarning, match="constant"):
        attack_confined(model, images, None, {"flat": torch.zeros(4, 10, 10)}, **usual)
