"""The `cvi` command: files that are what they are said to be, and mistakes told in one line."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cvi_nb import cli
from cvi_nb.cli import main
from cvi_nb.data import load_digits, load_image, load_photos
from cvi_nb.models import Classifier, load_classifier, mnist_cnn, save_classifier

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
        ("", "COMMAND"),
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
        ("attack zero.png --model mnist_cnn --attack pgd --eps 0.1 --norm 3 --out o", "0, 2 or inf"),
        ("attack zero.png --model mnist_cnn --attack ddn --eps 0.1 --out o", "takes no --eps"),
        ("attack zero.png --model mnist_cnn --attack magic --out o", "invalid choice"),
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


def test_examples_of_the_help_parse() -> None:
    parser = cli._parser()
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


@pytest.mark.slow
def test_report_of_a_folder(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"report --model best=mnist_cnn --images {place}/classes --threat quick --shown 1 --budget 8 --quiet"
    code, out, err = run(f"{line} --out {tmp_path}/card.html --title Digits", capsys)
    assert code == 0, err
    assert [Path(path).name for path in out] == ["card.html", "card.md", "card.json"]
    data = json.loads((tmp_path / "card.json").read_text())
    assert list(data["models"]) == ["best"] and data["images"]["labels"] == [1, 1, 2]
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
