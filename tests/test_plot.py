"""Pictures say what the numbers say: colours, limits, outlines and files against independent truth."""

import os
import re
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvi_nb import plot
from cvi_nb.plot import (
    COLOURS,
    bars_with_intervals,
    curves,
    heat_grid,
    heat_limit,
    outlines,
    overlay,
    save_figure,
    show_images,
    style,
)
from cvi_nb.plot.intervals import _spread


@pytest.fixture(autouse=True)
def nothing_leaks():
    """matplotlib's settings are the same after every test."""
    before = dict(plt.rcParams)
    yield
    plt.close("all")
    assert dict(plt.rcParams) == before


IMAGES = torch.rand(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))
MAPS = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))


def texts(figure):
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


# Style ----------------------------------------------------------------------------------------------------------------


def test_style_is_independent_of_the_users_settings():
    with plt.rc_context({"font.size": 30, "axes.grid": False, "image.cmap": "jet"}), style():
        assert plt.rcParams["font.size"] == 7.5 and plt.rcParams["image.cmap"] == "viridis"
    with style(font_size=11, pdf_fonttype=3):
        assert plt.rcParams["font.size"] == 11 and plt.rcParams["pdf.fonttype"] == 3
    with pytest.raises(ValueError, match="font_sise"):
        style(font_sise=3)


def test_colours_are_distinct_for_the_colour_blind():
    """Pairs stay apart under Machado's (2009) simulation of complete deuteranopia and protanopia."""
    deuteranopia = np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    )
    protanopia = np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    )
    srgb = np.array([matplotlib.colors.to_rgb(c) for c in COLOURS.values()])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    for matrix in (np.eye(3), deuteranopia, protanopia):
        seen = np.clip(linear @ matrix.T, 0, 1) ** (1 / 2.2)
        distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
        assert distance[~np.eye(len(seen), dtype=bool)].min() > 0.15


# Scales ---------------------------------------------------------------------------------------------------------------


@given(st.floats(1e-12, 1e12), st.booleans())
@settings(deadline=None)
def test_limit_is_just_above_the_quantile(size, negative):
    maps = np.full((3, 4), -size if negative else size)
    limit = heat_limit(maps)
    assert size * (1 - 1e-8) <= limit <= size * 1.2501
    assert len(f"{limit / 10.0 ** np.floor(np.log10(limit) + 1e-9) / 2:.10g}") <= 4  # its half is short, too


def test_limit_resists_outliers_and_zeros():
    maps = np.full((100, 100), 0.5)
    maps[0, :10] = 1e6
    assert heat_limit(maps) == 0.5
    sparse = np.zeros((100, 100))
    sparse[0, 0] = -3.0
    assert heat_limit(sparse) == 3.2 and heat_limit(np.zeros((2, 2))) == 1
    assert heat_limit(maps, maps * 0.9) == 0.5


@given(st.floats(-3, 3), st.floats(0, 1))
@settings(deadline=None)
def test_colours_show_sign_and_size(value, grey):
    red, _, blue = plot.blend(np.array([value]), 1.0, grey)[0]
    if value == 0:
        assert red == blue == pytest.approx(grey)
    elif abs(value) > 0.05:
        assert (red > blue) == (value > 0)
    mirrored = plot.blend(np.array([[value, 2 * value]]), 1.0, grey)
    assert mirrored.shape == (1, 2, 3) and mirrored.min() >= 0 and mirrored.max() <= 1
    beyond = plot.blend(np.array([np.sign(value) * 1.0, np.sign(value) * 7]), 1.0, grey)
    assert np.array_equal(beyond[0], beyond[1])


@pytest.mark.parametrize("limit, exponent", [(1, 0), (0.02, 0), (0.009, -3), (0.00031, -6), (5000, 0), (20000, 3)])
def test_long_numbers_get_a_power_of_ten(limit, exponent):
    figure, ax = plt.subplots()
    overlay(IMAGES[0], MAPS[0] * limit, ax, limit=limit, unit="nats per pixel")
    label = next(t for t in texts(figure) if "nats" in t)
    assert label == (f"$10^{{{exponent}}}$ nats per pixel" if exponent else "nats per pixel")
    figure.canvas.draw()
    bar = next(a for a in ax.child_axes)
    values = [float(t.get_text().replace("−", "-")) * 10.0**exponent for t in bar.get_yticklabels()]
    assert np.allclose(values, np.linspace(-limit, limit, 5), rtol=1e-2)


# Heat maps ------------------------------------------------------------------------------------------------------------


def test_overlay_paints_the_map():
    heat = torch.zeros(12, 16)
    heat[2, 3], heat[5, 7] = 1.0, -1.0
    ax = overlay(IMAGES[0], heat, limit=1.0, unit="nats", title="a photo")
    pixels = ax.images[0].get_array()
    assert pixels[2, 3, 0] > pixels[2, 3, 2] and pixels[5, 7, 0] < pixels[5, 7, 2]
    zero = pixels[np.asarray(heat) == 0]
    assert np.ptp(zero, axis=1).max() < 1e-12  # grey where the map is zero
    assert ax.get_title() == "a photo" and "nats" in texts(ax.figure)


def test_overlay_into_given_axes_makes_no_figure():
    _, ax = plt.subplots()
    count = len(plt.get_fignums())
    assert overlay(IMAGES[0, :1], MAPS[0].numpy(), ax, colour_bar=False, partition=np.zeros((12, 16), int)) is ax
    assert len(plt.get_fignums()) == count and not ax.child_axes


def test_grid_shares_one_scale():
    maps = {"a": MAPS, "b": MAPS * 3}
    figure = heat_grid(IMAGES, maps, unit="nats per pixel", row_labels=["one", "two"])
    assert len(figure.axes) == 2 * 3 + 1
    limit = heat_limit(MAPS, MAPS * 3)
    ground = plot.luminance(plot.as_pictures(IMAGES)[1])
    assert np.allclose(figure.axes[4].images[0].get_array(), plot.blend(MAPS[1].numpy(), limit, ground))
    assert figure.axes[-1].get_ylim() == (-limit, limit)
    assert {"photo", "a", "b", "one", "two", "nats per pixel"} <= set(texts(figure))


def test_grid_scale_per_row_per_map_and_given():
    maps = {"a": MAPS * torch.tensor([1.0, 100.0])[:, None, None], "b": MAPS}
    rows = heat_grid(IMAGES, maps, shared="row")
    assert len(rows.axes) == 6 + 2
    assert [ax.get_ylim()[1] for ax in rows.axes[6:]] == [heat_limit(MAPS[:1]), heat_limit(MAPS[1:] * 100)]
    own = heat_grid(IMAGES, maps, shared=False, unit="nats")
    limits = [t for t in texts(own) if t.startswith("ℓ = ")]
    assert len(limits) == 4 and any("ℓ is below each map" in t for t in (re.sub(r"\s", " ", t) for t in texts(own)))
    assert limits[2] == f"ℓ = {heat_limit(MAPS[1] * 100):.0f}"
    given_limit = heat_grid(IMAGES, maps, limit=2.5)
    assert given_limit.axes[-1].get_ylim() == (-2.5, 2.5)


def test_grid_of_one_sign_starts_at_zero_and_marks_what_is_beyond():
    figure = heat_grid(IMAGES, {"a": MAPS.abs()}, limit=10.0)
    assert figure.axes[-1].get_ylim() == (0, 10) and not figure.axes[-1].lines
    signed = heat_grid(IMAGES, {"a": MAPS}, limit=0.5)
    assert len(signed.axes[-1].lines) == 2  # both arrowheads


@given(st.floats(1e-6, 1e6))
@settings(max_examples=10, deadline=None)
def test_normalised_maps_do_not_depend_on_their_unit(scale):
    first = heat_grid(IMAGES, {"a": MAPS, "b": MAPS * scale}, normalise=True)
    a, b = (first.axes[i].images[0].get_array() for i in (1, 2))
    assert np.allclose(a, b, atol=1e-6)
    assert any("99.5" in t for t in texts(first)) and first.axes[-1].get_ylim() == (-1, 1)
    plt.close(first)


def test_vanishing_maps_are_drawn():
    for options in ({}, {"normalise": True}, {"shared": False}, {"shared": "row"}):
        figure = heat_grid(IMAGES, {"zero": MAPS * 0}, **options)
        assert np.isfinite(figure.axes[1].images[0].get_array()).all()


def test_nothing_is_cut_off(tmp_path):
    """All text of a heat grid lies within the figure, however long the names."""
    for width, n, shared in ((6.9, 2, True), (3.3, 2, True), (6.9, 2, "row"), (5.0, 2, False)):
        names = ["CVI", "integrated gradients", "Grad-CAM", "SuperLongMethodName"]
        figure = heat_grid(
            IMAGES[:n, :, :, :12], {name: MAPS[:n, :, :12] * 1e-5 for name in names}, "nats per pixel", shared,
            row_labels=["coffee", "rocket"], width=width,
        )  # fmt: skip
        figure.canvas.draw()
        box = figure.bbox
        for text in figure.findobj(matplotlib.text.Text):
            if text.get_text() and text.get_visible():
                extent = text.get_window_extent()
                assert extent.x0 >= box.x0 - 1 and extent.x1 <= box.x1 + 1, (text.get_text(), width, shared)
                assert extent.y0 >= box.y0 - 1 and extent.y1 <= box.y1 + 1, (text.get_text(), width, shared)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"images": IMAGES * 2}, ValueError, r"`images` must lie in \[0, 1\]"),
        ({"images": IMAGES[0]}, ValueError, "`images` must have shape"),
        ({"images": IMAGES[:, :2]}, ValueError, "1 or 3"),
        ({"images": "photo"}, TypeError, "`images` must be numbers"),
        ({"maps": MAPS}, TypeError, "mapping"),
        ({"maps": {}}, TypeError, "mapping"),
        ({"maps": {"a": MAPS[:1]}}, ValueError, r"maps\['a'\]"),
        ({"maps": {"a": MAPS * torch.nan}}, ValueError, "384 NaN"),
        ({"shared": "column"}, ValueError, "shared"),
        ({"limit": 0}, ValueError, "limit"),
        ({"limit": 1.0, "shared": "row"}, ValueError, "one scale"),
        ({"row_labels": ["a"]}, ValueError, "row_labels"),
        ({"partition": np.zeros((2, 3, 3))}, ValueError, "partition"),
    ],
)
def test_grid_refuses(change, error, words):
    with pytest.raises(error, match=words):
        heat_grid(**{"images": IMAGES, "maps": {"a": MAPS}, **change})


def test_overlay_refuses():
    for arguments in ((IMAGES, MAPS[0]), (IMAGES[0], MAPS), (IMAGES[0], MAPS[0, :5]), (IMAGES[0], MAPS[0] / 0)):
        with pytest.raises(ValueError):
            overlay(*arguments)
    with pytest.raises(ValueError, match="limit"):
        overlay(IMAGES[0], MAPS[0], limit=-1)
    with pytest.raises(ValueError, match="`partition` must have shape"):
        overlay(IMAGES[0], MAPS[0], partition=np.zeros((3, 3), int))
    with pytest.raises(ValueError, match="integer"):
        overlay(IMAGES[0], MAPS[0], partition=MAPS[0])
    assert not plt.get_fignums()  # nothing was drawn before the refusal


# Outlines -------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_outlines_cover_exactly_the_borders(seed, height, width, regions):
    labels = np.random.default_rng(seed).integers(0, regions, (height, width))
    _, ax = plt.subplots()
    drawn = set()
    for (x0, y0), (x1, y1) in outlines(labels, ax).get_segments():
        assert (x0 == x1) != (y0 == y1)  # straight, and of some length
        steps = int(abs(x1 - x0) + abs(y1 - y0))
        for k in range(steps):
            unit = (x0, min(y0, y1) + k, "|") if x0 == x1 else (min(x0, x1) + k, y0, "-")
            assert unit not in drawn
            drawn.add(unit)
    down = {(x + 0.5, y - 0.5, "|") for y, x in np.argwhere(labels[:, 1:] != labels[:, :-1])}
    across = {(x - 0.5, y + 0.5, "-") for y, x in np.argwhere(labels[1:] != labels[:-1])}
    assert drawn == down | across
    plt.close("all")


# Images, curves, bars -------------------------------------------------------------------------------------------------


def test_show_images():
    figure = show_images(IMAGES, ["a\nb", "c"], columns=1)
    assert len(figure.axes) == 2 and set(texts(figure)) == {"a", "b", "c"}
    assert np.allclose(figure.axes[1].images[0].get_array(), IMAGES[1].permute(1, 2, 0))
    assert len(show_images(IMAGES[:, :1]).axes) == 2
    for arguments in ((IMAGES, ["a"]), (IMAGES * 2,), (IMAGES[0],), (IMAGES[:0],)):
        with pytest.raises(ValueError):
            show_images(*arguments)
    with pytest.raises(ValueError, match="columns"):
        show_images(IMAGES, columns=0)


def test_curves_draw_what_they_are_given():
    x = np.linspace(0, 1, 5)
    ax = curves(x, {"a": (x, x - 0.1, x + 0.1), "b": 1 - x}, "x (units)", "y", labels="direct")
    assert len(ax.lines) == 2 and len(ax.collections) == 1  # only one has an interval
    assert np.array_equal(ax.lines[1].get_ydata(), 1 - x)
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(-0.1) and band[:, 1].max() == pytest.approx(1.1)
    assert {"a", "b"} <= set(texts(ax.figure)) and ax.get_legend() is None
    assert ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle()  # survives a grey printer
    assert curves({"a": x, "b": x[:3]}, {"a": x, "b": x[:3]}, "x", "y", labels="legend").get_legend() is not None


def test_curves_that_meet_get_a_legend():
    x = np.linspace(0, 1, 5)
    assert curves(x, {"a": x, "b": x**2, "c": x**3}, "x", "y").get_legend() is not None
    assert curves(x, {"a": x, "b": x / 2, "c": x / 9}, "x", "y").get_legend() is None


def test_curves_refuse():
    x = np.arange(3.0)
    for series, error, words in (
        ([x], TypeError, "mapping"), ({"a": x[:2]}, ValueError, r"series\['a'\]"),
        ({"a": x * np.nan}, ValueError, "NaN"), ({"a": (x, x)}, ValueError, "tuple of 2"),
        ({"a": (x, x + 1, x + 2)}, ValueError, "low ≤ mean ≤ high"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            curves(x, series, "x", "y")
    with pytest.raises(ValueError, match="lacks"):
        curves({"b": x}, {"a": x}, "x", "y")
    with pytest.raises(ValueError, match="labels"):
        curves(x, {"a": x}, "x", "y", labels="side")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.3))
def test_labels_are_spread_as_little_as_possible(heights, step):
    heights = sorted(heights)
    spread = np.array(_spread(heights, step))
    assert (np.diff(spread) >= step - 1e-9).all()
    assert spread.mean() == pytest.approx(np.mean(heights), abs=1e-9)
    if (np.diff(heights) >= step).all():
        assert np.allclose(spread, heights)


def test_bars():
    values = {"a": (0.2, 0.1, 0.4), "b": 0.5, "c": (-0.1, -0.2, 0.0)}
    ax = bars_with_intervals(values, "score", highlight=["b"], reference=0.3, sort=True)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b", "a", "c"]
    assert [bar.get_width() for bar in ax.patches] == [0.5, 0.2, -0.1]
    assert {"0.50", "0.20", "−0.10"} <= set(texts(ax.figure))
    one_photo = bars_with_intervals({"a": (0.2, np.nan, np.nan)}, "score")  # what bootstrap_mean returns for one group
    assert one_photo.patches[0].get_width() == 0.2
    with pytest.raises(TypeError, match="mapping"):
        bars_with_intervals([1], "score")
    for bad in (np.nan, (1, 2, 3), [1], "high"):
        with pytest.raises((TypeError, ValueError), match=r"values\['a'\]"):
            bars_with_intervals({"a": bad}, "score")
    with pytest.raises(ValueError, match="highlight"):
        bars_with_intervals(values, "score", highlight=["d"])


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pdf", "svg", "png"])
def test_reruns_are_byte_identical(tmp_path, suffix):
    contents, before = [], plt.get_fignums()
    for i in range(2):
        figure = heat_grid(IMAGES, {"a": MAPS}, partition=torch.arange(192).reshape(1, 12, 16).expand(2, -1, -1) // 7)
        path = save_figure(figure, tmp_path / f"{i}" / f"figure.{suffix}", dpi=100, close=True)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1] and os.listdir(tmp_path / "0") == [f"figure.{suffix}"]
    assert b"CreationDate" not in contents[0] and b"/Type3" not in contents[0]
    assert plt.get_fignums() == before


def test_a_failing_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    figure, ax = plt.subplots()
    ax.set_title(r"$\notacommand$")  # fails while drawing
    with pytest.raises(ValueError):
        save_figure(figure, path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.png"]


def test_save_refuses(tmp_path):
    with pytest.raises(ValueError, match="must end in"):
        save_figure(plt.figure(), tmp_path / "a.jpg")
    with pytest.raises(TypeError, match="Figure"):
        save_figure(plt.figure().add_subplot(), tmp_path / "a.png")


def test_the_package_is_a_leaf():
    """Its modules import each other, and nothing else of the package."""
    for path in Path(plot.__file__).parent.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        outside = r"^\s*(from|import) +(cvi_nb(?!\.(plot|validation|files|lazy)\b)|\.\.(?!validation|files|lazy))"
        assert not re.search(outside, source, re.M), path.name
