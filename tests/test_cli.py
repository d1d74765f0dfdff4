"""The `cvi` command: files that are what they are said to be, and mistakes told in one line."""

import inspect
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cvi_nb.attack import ATTACKS
from cvi_nb.cli import commands as cli
from cvi_nb.cli import main
from cvi_nb.cli.parser import CHOICES, make_parser
from cvi_nb.data import load_digits, load_image, load_photos
from cvi_nb.models import Classifier, load_classifier, mnist_cnn, save_classifier
from cvi_nb.report import critical_region

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two digits as files, a folder of classes, and a network with fresh weights in a file."""
    folder = tmp_path_factory.mktemp("cli")
    digits = load_digits("report")
    for i, name in ((0, "zero.png"), (350, "seven.png")):
        cli._write_image(digits.images[i], folder / name)
    for i in (120, 130, 250):
        cli._write_image(digits.images[i], folder / "classes" / str(int(digits.labels[i])) / f"{i}.png")
    facts = {"size": 28, "classes": [str(k) for k in range(10)], "name": "fresh"}
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    save_classifier(Classifier(mnist_cnn(), **facts), folder / "fresh.safetensors", "mnist_cnn")
    torch.set_rng_state(generator_state)
    return folder


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str], str]:
    """Exit code, the files that were named on standard output, and standard error."""
    capsys.readouterr()
    try:
        code = main(shlex.split(line))
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("explian x", "invalid choice"),
        ("explain zero.png --out o", "--model"),
        ("explain zero.png --model nothing --out o", "--model must be"),
        ("explain missing.png --model mnist_cnn --out o", "missing.png"),
        ("explain classes zero.png --model mnist_cnn --out o", "one folder or collection"),
        ("explain zero.png --model mnist_cnn --target 10 --out o", "10"),
        ("explain zero.png --model mnist_cnn --target ten --out o", "a number or a name"),
        ("explain zero.png --model mnist_cnn --budget 0 --out o", "positive integer"),
        ("explain zero.png --model mnist_cnn --budget 2 --out o", "`budget` must be"),
        ("explain zero.png --model mnist_cnn --partition none --out o", "invalid choice"),
        ("explain zero.png --model mnist_cnn --baseline pink --out o", "`baseline` must be"),
        ("explain zero.png --model mnist_cnn --device tpu9 --out o", "--device"),
        ("explain photos --model mnist_cnn --out o", "channel"),
        ("attack zero.png --model mnist_cnn --attack pgd --out o", "--eps"),
        ("attack zero.png --model mnist_cnn --attack pgd --eps 0/1 --out o", "positive number"),
        ("attack zero.png --model mnist_cnn --attack pgd --eps 0.1 --norm 3 --out o", "0, 1, 2 or inf"),
        ("attack zero.png --model mnist_cnn --attack ddn --eps 0.1 --out o", "takes no --eps"),
        ("attack zero.png --model mnist_cnn --attack magic --out o", "invalid choice"),
        ("attack zero.png --model mnist_cnn --attack sigma-zero --norm 2 --out o", "takes no --norm"),
        ("attack zero.png --model mnist_cnn --attack apgd --norm 0 --eps 3 --out o", "--norm must be one of inf, 2"),
        ("attack zero.png --model mnist_cnn --attack fgsm --eps 0.1 --steps 3 --out o", "takes no --steps"),
        ("attack zero.png --model mnist_cnn --steps 0 --out o", "positive integer"),
        ("attack zero.png --model mnist_cnn --target 99 --out o", "99"),
        ("attack zero.png --model mnist_cnn --eps nan --out o", "positive number"),
        ("attack zero.png --model mnist_cnn --labels twice.csv --out o", "one label for each image"),
        ("attack zero.png --model mnist_cnn --labels blank.csv --out o", "a label for every image"),
        ("attack zero.png --model mnist_cnn --labels . --out o", "."),
        ("attack digits --model mnist_cnn --count 0 --out o", "positive integer"),
        ("explain zero.png --model mnist_cnn --device meta --out o", "--device must be"),
        ("explain zero.png --model mnist_cnn --scale big --out o", "picture, run, or"),
        ("explain zero.png --model mnist_cnn --seed -1 --out o", "--seed"),
        ("explain zero.png --model mnist_cnn --seed 1e3 --out o", "at least 0"),
        ("explain zero.png --model mnist_cnn --seed 99999999999999999999 --out o", "below 2**63"),
        ("explain zero.png --model mnist_cnn --temperature nan --out o", "positive number"),
        ("explain zero.png --model mnist_cnn --temperature 0 --out o", "positive number"),
        ("explain zero.png --model mnist_cnn --batch-size 1.5 --out o", "positive integer"),
        ("explain zero.png --model mnist_cnn --baseline nan --out o", "baseline"),
        ("explain zero.png --model mnist_cnn --architecture resnet18 --out o", "architecture"),
        ("explain zero.png --model mnist_cnn --out zero.png", "--out must be a folder"),
        ("explain zero.png --model mnist_cnn --out zero.png/deep", "--out must be where"),
        ("report --model mnist_cnn --images digits --out zero.png/card.html", "--out must be where"),
        ("report --model mnist_cnn --images digits --shown 0 --out card.html", "positive integer"),
        ("report --model mnist_cnn --images digits --budget 1 --out card.html", "`budget` must be"),
        ("report --model mnist_cnn --images digits --threat hard --out card.html", "invalid choice"),
        ("segment zero.png --spatial 0 --out o", "positive number"),
        ("segment zero.png --size 0 --out o", "positive integer"),
        ("attack zero.png --model mnist_cnn --labels bad.csv --out o", "columns image and label"),
        ("attack zero.png --model mnist_cnn --labels few.csv --out o", "a label for every image"),
        ("segment zero.png --range -3 --out o", "positive number"),
        ("segment broken.png --out o", "broken.png"),
        ("report --model mnist_cnn --images digits --out card.pdf", ".html"),
        ("report --model mnist_cnn --model mnist_cnn --images digits --out card.html", "once"),
        ("report --model mnist_cnn --images nowhere --out card.html", "nowhere"),
        ("report --model fresh.pt --images digits --out card.html", "fresh.pt"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 90 else None,
)
def test_mistakes_are_one_line_and_code_2(
    line: str, told: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    (place / "broken.png").write_bytes(b"not a picture")
    (place / "bad.csv").write_text("a,b\n1,2\n")
    (place / "few.csv").write_text("image,label\nother.png,2\n")
    (place / "twice.csv").write_text("image,label\nzero.png,2\nzero.png,3\n")
    (place / "blank.csv").write_text("image,label\nzero.png,\n")
    code, out, err = run(line, capsys)
    assert code == 2 and out == []
    assert err.count("\n") == 1 and err.startswith("cvi") and "Traceback" not in err, err
    assert told in err
    assert not (place / "o").exists() or not any((place / "o").iterdir())


def test_traceback_on_demand(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError):
        main(["explain", str(place / "missing.png"), "--model", "mnist_cnn", "--out", str(place / "o"), "--traceback"])


@pytest.mark.parametrize("command", ["", "explain", "attack", "segment", "report"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(f"{command} --help", capsys)
    text = "\n".join(out)
    assert code == 0 and "cvi" in text
    assert not command or ("examples:" in text and f"cvi {command}" in text and "--seed" in text)
    assert all(len(line) < 140 for line in out)


@pytest.mark.parametrize("typed", ["", "--help", "--version", "explain --help", "attack --help", "segment --help"])
def test_help_loads_no_library(typed: str) -> None:
    """So it answers at once: seconds of PyTorch are for those who compute. And `cvi` alone is help."""
    code = (
        "import sys\nfrom cvi_nb.cli import main\n"
        "try: code = main(sys.argv[1:])\nexcept SystemExit as stop: code = stop.code\n"
        "print(sorted({'torch', 'numpy', 'pandas', 'scipy', 'sklearn', 'matplotlib', 'PIL'} & set(sys.modules)), code)"
    )
    answer = subprocess.run([sys.executable, "-c", code, *typed.split()], capture_output=True, text=True, check=True)
    assert answer.stdout.endswith("[] 0\n") and ("usage: cvi" in answer.stdout or typed == "--version"), answer.stdout


def test_help_names_what_the_registries_hold() -> None:
    from cvi_nb.defence import DEFENDED
    from cvi_nb.inference import BASELINES, PARTITIONS

    assert CHOICES["attack"] == [name.replace("_", "-") for name in ATTACKS] and CHOICES["defended"] == [*DEFENDED]
    assert CHOICES["baseline"] == sorted(BASELINES) and CHOICES["partition"] == sorted(PARTITIONS)


def test_segment_takes_a_folder_of_any_sizes_and_a_collection(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = load_photos("report", "embedded", size=64).images
    cli._write_image(photos[0], tmp_path / "in" / "a.png")
    cli._write_image(photos[1][:, :40], tmp_path / "in" / "deep" / "b.png")
    code, out, err = run(f"segment {tmp_path}/in --out {tmp_path}/out", capsys)
    assert code == 0, err
    assert {Path(path).name for path in out} >= {"a.png", "a.labels.png", "deep_b.png", "regions.csv"}
    areas = pd.read_csv(tmp_path / "out" / "regions.csv").groupby("name")["area"].sum()
    assert areas.to_dict() == {"a.png": 64 * 64, "deep/b.png": 40 * 64}
    code, out, err = run(f"segment digits --count 2 --out {tmp_path}/digits", capsys)
    assert code == 0 and len(out) == 5, err
    code, out, err = run(f"segment {tmp_path}/in digits --out {tmp_path}/none", capsys)
    assert code == 2 and "one folder or collection" in err


def test_examples_of_the_help_parse() -> None:
    parser = make_parser()
    commands = next(a for a in parser._actions if isinstance(a.choices, dict)).choices
    assert isinstance(commands, dict)
    for name, sub in commands.items():
        for line in str(sub.epilog).splitlines()[1:]:
            given = parser.parse_args(shlex.split(line)[1:])
            assert given.command == name, line


def test_explain_writes_what_python_finds(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cvi_nb.inference import CVI

    line = f"explain {place}/zero.png {place}/seven.png --model mnist_cnn --budget 16 --target 3 --modes"
    code, out, err = run(f"{line} --out {tmp_path} --quiet", capsys)
    assert code == 0 and err == ""
    assert sorted(out) == sorted(str(path) for path in tmp_path.iterdir())
    assert {Path(path).name for path in out} == {"zero.png", "seven.png", "modes.png", "clusters.csv", "explain.json"}
    facts = json.loads((tmp_path / "explain.json").read_text())
    model = load_classifier("mnist_cnn")
    images = torch.cat([load_image(place / name, 28, 1) for name in ("zero.png", "seven.png")])
    posterior = CVI(model, budget=16, batch_size=64).infer(images, 3)
    assert np.allclose([one["bound_nats"] for one in facts["images"]], posterior.bound, atol=1e-4)
    clusters = pd.read_csv(tmp_path / "clusters.csv")
    assert np.allclose(clusters["probability"], posterior.to_frame()["probability"], atol=1e-4)
    assert clusters.groupby("name")["area"].sum().tolist() == [784, 784]


def test_explain_why_this_and_not_that(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two classes of one run: two maps in the array, a file and class each in the table, the cost of both."""
    line = f"explain {place}/zero.png --model mnist_cnn --budget 16 --target 0 --target 6 --scale run --npy --quiet"
    code, out, err = run(f"{line} --out {tmp_path}", capsys)
    assert code == 0, err
    arrays = {"zero.npy", "zero.regions.npy"}
    assert {Path(path).name for path in out} == {"zero.png", "clusters.csv", "explain.json"} | arrays
    maps = np.load(tmp_path / "zero.npy")
    facts = json.loads((tmp_path / "explain.json").read_text())
    labels = np.load(tmp_path / "zero.regions.npy")
    for k, one in enumerate(facts["images"]):
        assert [region["region"] for region in one["regions"]] == np.unique(labels[k]).tolist()
        for region in one["regions"]:
            assert region["low"] <= region["nats"] <= region["high"]
            assert region["area"] == pytest.approx((labels[k] == region["region"]).mean())
    assert maps.shape == (2, 28, 28) and [one["class"] for one in facts["images"]] == ["0", "6"]
    clusters = pd.read_csv(tmp_path / "clusters.csv", dtype={"class": str})
    assert clusters.groupby("class")["area"].sum().to_dict() == {"0": 784, "6": 784}
    spent = facts["evaluations_per_image"]
    assert 16 < spent["forward"] + spent["backward"] <= 4 * 16
    code, _, err = run(f"{line} --target 0 --out {tmp_path}", capsys)
    assert code == 2 and "each class once" in err


def test_explain_draws_the_photo_as_it_was_taken(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digit = load_digits("report").images[0, 0]
    wide = torch.cat([digit, digit * 0 + 0.5], 1)  # 28 × 56, of which the network sees the middle half
    cli._write_image(wide[None], tmp_path / "wide.png")
    code, _, err = run(f"explain {tmp_path}/wide.png --model mnist_cnn --budget 8 --quiet --out {tmp_path}/o", capsys)
    assert code == 0, err
    (facts,) = json.loads((tmp_path / "o" / "explain.json").read_text())["images"]
    assert facts["box_in_file"] == [0, 14, 28, 28] and facts["size_of_file"] == [28, 56]
    width, height = Image.open(tmp_path / "o" / "wide.png").size
    assert width > 3 * height  # two panels of twice the width


def test_attacked_files_fool_the_model(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels.csv").write_text("image,label\nzero.png,0\nseven.png,7\n")
    line = f"attack {place}/zero.png {place}/seven.png --model mnist_cnn --attack pgd --eps 64/255"
    code, out, _ = run(f"{line} --labels {tmp_path}/labels.csv --out {tmp_path}/a --quiet", capsys)
    assert code == 0 and all(Path(path).is_file() for path in out)
    table = pd.read_csv(tmp_path / "a" / "attack.csv", dtype={"label": str, "predicted": str})
    model = load_classifier("mnist_cnn")
    for row in table.itertuples():
        image = load_image(tmp_path / "a" / f"{Path(row.image).stem}.pgd.png", None, 1)
        original = load_image(place / row.image, None, 1)
        assert float((image - original).abs().max()) <= 64 / 255 + 1e-6
        assert str(int(model(image).argmax())) == row.predicted and row.verified == row.success
        assert row.success == (row.predicted != row.label)
    assert table["success"].any()


def test_same_seed_same_files(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = f"attack {place}/seven.png --model mnist_cnn --attack square --eps 0.2 --steps 30 --quiet"
    for name in ("a", "b"):
        assert run(f"{base} --seed 3 --out {tmp_path}/{name}", capsys)[0] == 0
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b"))
    assert first == second


def test_regions_of_millions_of_pixels_are_measured_exactly() -> None:
    """Sums in single precision were off by 4 % on an image of 2,000 × 2,000."""
    image = torch.full((3, 1500, 2000), 0.8)
    frame = cli._regions("even", image, torch.zeros(1500, 2000, dtype=torch.int64))
    assert frame.loc[0, ["row", "column", "red"]].tolist() == [749.5, 999.5, 204.0]
    half = torch.arange(2000).expand(1500, 2000) // 1000
    heat = torch.where(half == 1, 0.80001, 0.8)[None]
    assert torch.equal(critical_region(heat, half[None], share=0.5)[0], half == 1)


def test_segment_labels_are_the_regions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cvi_nb.clustering import segment

    photo = load_photos("report", "embedded", size=96).images[:1]
    cli._write_image(photo[0], tmp_path / "cat.png")
    code, _, _ = run(f"segment {tmp_path}/cat.png --range 9 --min-size 40 --out {tmp_path}/out", capsys)
    assert code == 0
    labels = np.array(Image.open(tmp_path / "out" / "cat.labels.png")).astype(int)
    expected = segment(load_image(tmp_path / "cat.png"), 8.0, 9.0, 40)[0][0].numpy()
    assert np.array_equal(labels, expected)
    regions = pd.read_csv(tmp_path / "out" / "regions.csv")
    assert np.array_equal(regions["area"], np.bincount(labels.ravel()))
    red = 255 * load_image(tmp_path / "cat.png")[0, 0].numpy()
    assert np.allclose(regions["red"], [red[labels == k].mean() for k in regions["region"]], atol=0.02)


def test_no_picture_overwrites_another(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two suffixes, two spellings, two cases, and images that are called like the command's own files."""
    names = ["x.png", "x.bmp", "a b.png", "a_b.png", "A_B.bmp", "modes.png", "attack.png", "x.labels.png", "=1+1.png"]
    digits = load_digits("report").images[::100, 0]
    for name, image in zip(names, digits, strict=False):
        Image.fromarray((255 * image).byte().numpy()).save(tmp_path / name)
    sources = " ".join(shlex.quote(str(tmp_path / name)) for name in names)
    lines = {
        "explain": (f"--model {place}/fresh.safetensors --budget 8 --modes", 2 + 1),
        "attack": (f"--model {place}/fresh.safetensors --attack fgsm --eps 0.1", 3),
        "segment": ("", 1 + len(names)),
    }
    for command, (options, more) in lines.items():
        code, out, err = run(f"{command} {sources} {options} --quiet --out {tmp_path}/{command}", capsys)
        assert code == 0, err
        assert len({path.casefold() for path in out}) == len(out) == len(names) + more
        assert sorted(out) == sorted(str(path) for path in (tmp_path / command).iterdir())
    table = pd.read_csv(tmp_path / "attack" / "attack.csv")
    assert table["image"].tolist() == [*names[:-1], "'=1+1.png"]  # which no spreadsheet runs
    for i, name in enumerate(table["file"]):  # each file is the image that the table says
        difference = (
            load_image(tmp_path / "attack" / name, None, 1)[0, 0] - load_image(tmp_path / names[i], None, 1)[0, 0]
        )
        assert float(difference.abs().max()) <= 0.1 + 1e-6
    for name in ("explain/clusters.csv", "segment/regions.csv"):
        assert set(pd.read_csv(tmp_path / name)["name"]) == {*names[:-1], "'=1+1.png"}
    code, _, err = run(  # the table that a command wrote is one that it reads
        f"attack {sources} --model {place}/fresh.safetensors --attack fgsm --eps 0.1 --quiet "
        f"--labels {tmp_path}/attack/attack.csv --out {tmp_path}/again", capsys
    )  # fmt: skip
    assert code == 0, err


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_every_attack_of_the_library_is_a_choice(
    name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attack, option = ATTACKS[name], name.replace("_", "-")
    line = f"attack {place}/seven.png --model {place}/fresh.safetensors --attack {option} --quiet --out {tmp_path}"
    line += " --eps 0.2" if attack.ball else ""
    line += " --steps 10" if "steps" in inspect.signature(attack.function).parameters else ""
    code, out, err = run(line, capsys)
    assert code == 0, err
    assert f"seven.{option}.png" in {Path(path).name for path in out}
    facts = json.loads((tmp_path / "attack.json").read_text())
    assert facts["images"] == 1


def test_attack_reaches_a_set_of_classes(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"attack {place}/seven.png --model mnist_cnn --attack minimum-norm --steps 30 --target 0,6 --quiet"
    code, _, err = run(f"{line} --out {tmp_path}", capsys)
    assert code == 0, err
    (row,) = pd.read_csv(tmp_path / "attack.csv").to_dict("records")
    assert row["target"] == "0 6" and row["success"] and row["predicted"] in (0, 6)
    code, _, err = run(f"{line.replace('0,6', '0,cat')} --out {tmp_path}", capsys)
    assert code == 2 and "'cat'" in err


def test_what_nobody_foresaw_is_one_line_and_code_1(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("of a kind\nthat nobody knew")

    monkeypatch.setattr(cli, "segment", fail)
    code, out, err = run(f"segment {place}/zero.png --out {tmp_path}/o", capsys)
    assert code == 1 and out == [] and err.count("\n") == 1 and "RuntimeError: of a kind that nobody knew" in err
    assert "--traceback" in err


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_killed_at_any_moment_and_two_at_once(place: Path, tmp_path: Path) -> None:
    """After kill -9 the same command gives the same files, with nothing left over; so do two that run side by side."""
    digits = load_digits("report").images
    (tmp_path / "in").mkdir()
    for i in range(6):
        cli._write_image(digits[170 * i], tmp_path / "in" / f"{i}.png")
    env = os.environ | {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}

    def start(out: str) -> subprocess.Popen[bytes]:
        line = f"explain {tmp_path}/in --model {place}/fresh.safetensors --budget 8 --quiet --out {tmp_path}/{out}"
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([sys.executable, "-m", "cvi_nb.cli", *shlex.split(line)], env=env, **silent)  # type: ignore[call-overload]

    first = start("whole")
    assert first.wait() == 0
    whole = contents(tmp_path / "whole")
    for k in range(4):  # killed as soon as its k-th file, or a part of one, is there
        killed = start("killed")
        while killed.poll() is None and len(list((tmp_path / "killed").glob("*"))) <= k:
            time.sleep(0.002)
        killed.kill()
        killed.wait()
    assert start("killed").wait() == 0 and contents(tmp_path / "killed") == whole
    both = [start("both"), start("both")]
    assert [one.wait() for one in both] == [0, 0] and contents(tmp_path / "both") == whole


@pytest.mark.slow
def test_report_of_a_folder(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"report --model best=mnist_cnn --images {place}/classes --threat quick --shown 1 --budget 8 --quiet"
    code, out, err = run(f"{line} --out {tmp_path}/card.html --title Digits --target 3,5 --target 8", capsys)
    assert code == 0, err
    assert [Path(path).name for path in out] == ["card.html", "card.md", "card.json"]
    data = json.loads((tmp_path / "card.json").read_text())
    assert list(data["models"]) == ["best"] and data["images"]["labels"] == [1, 1, 2]
    assert data["threat"]["targets"] == [[3, 5], [8]] and "3 or 5" in (tmp_path / "card.md").read_text()
    assert data["title"] == "Digits" and data["command"].startswith("cvi report --model best=mnist_cnn")


def test_draw_is_fair_and_whatever_the_count() -> None:
    digits = load_digits("report")
    few, many = cli._draw(digits, 20, 5), cli._draw(digits, 50, 5)
    assert set(few) <= set(many) and few == sorted(few)
    assert torch.bincount(digits.labels[few], minlength=10).tolist() == [2] * 10


def test_classes_by_name_or_number() -> None:
    model = Classifier(lambda x: x.flatten(1), classes=["tench, Tinca tinca", "red_fox", "a"])
    assert cli._class("1", model) == 1 and cli._class("Tinca tinca", model) == 0 and cli._class("tench", model) == 0
    with pytest.raises(ValueError, match=r"near it: tench, Tinca tinca"):
        cli._class("tinc", model)


def test_labels_follow_the_model() -> None:
    """By name where the classes differ, by number where both are ImageNet's 1,000."""
    photos = load_photos("report", "embedded", size=32)[:2]
    other = Classifier(lambda x: x.flatten(1), classes=[f"class {k}" for k in range(1000)])
    assert torch.equal(cli._labels(photos, other, None), photos.labels)
    reverse = Classifier(lambda x: x.flatten(1), classes=["nine", "1", "0"])
    assert cli._labels(load_digits("report")[[0, 150]], reverse, None).tolist() == [2, 1]
    with pytest.raises(ValueError, match="must be below 3"):
        cli._labels(load_digits("report")[[900]], reverse, None)


@pytest.mark.slow
def test_as_a_program(tmp_path: Path) -> None:
    """Started as users start it: quick help, exit code 2 without a traceback."""
    env = os.environ | {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cvi_nb.cli"]
    answer = subprocess.run([*command, "--version"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert answer.returncode == 0 and answer.stdout.startswith("cvi ") and answer.stderr == ""
    answer = subprocess.run(
        [*command, "segment", "none.png", "--out", "o"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1


def test_the_entry_point_is_declared() -> None:
    from configparser import ConfigParser

    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    assert "cvi=cvi_nb.cli:main" in config["DEFAULT"]["console_scripts"].split()
