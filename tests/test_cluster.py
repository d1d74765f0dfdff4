"""A folder in shares, a killed run that goes on, and the paper through a real Slurm where there is one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from counted import computes
from PIL import Image

from cvi_nb.cli import main
from cvi_nb.data import load_digits
from cvi_nb.paper import load_config, plan

sys.path.insert(0, str(Path(__file__).parent / "cluster"))
import one_node

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ["--model", "mnist_cnn", "--budget", "8", "--no-pictures", "--quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 digits as files in two sub-folders, one of them no image."""
    place = tmp_path_factory.mktemp("folder")
    digits = load_digits("report")
    for i, image in enumerate(digits.images[::6][:150]):
        path = place / "images" / f"{i % 2}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * image[0]).round().byte().numpy()).save(path)
    (place / "images" / "1" / "149.png").write_bytes(b"no image")
    assert main(["explain", str(place / "images"), *OPTIONS, "--out", str(place / "whole")]) == 0
    return place


def tables(out: Path) -> dict[str, bytes]:
    """Every file of a result, without what a run keeps to itself."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_shares_are_what_one_run_writes(folder: Path) -> None:
    for k in (2, 1):
        line = ["explain", str(folder / "images"), *OPTIONS, "--out", str(folder / "shares"), "--shard", f"{k}/2"]
        assert main(line) == 0
    assert tables(folder / "shares") == tables(folder / "whole")
    rows = pd.read_parquet(folder / "whole" / "images")
    assert len(rows) == 150 and rows["name"].is_unique and rows["error"].notna().sum() == 1
    assert set(pd.read_parquet(folder / "whole" / "clusters")["name"]) == set(rows.loc[rows["error"].isna(), "name"])


def test_a_killed_run_goes_on_and_ends_the_same(folder: Path) -> None:
    """kill -9 after the first part; what is left of the second is not taken for it."""
    out = folder / "killed"
    line = ["explain", str(folder / "images"), *OPTIONS, "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    process = subprocess.Popen([sys.executable, "-m", "cvi_nb.cli", *line], env=env, stdout=subprocess.DEVNULL)
    while not (out / "images" / "part-000000.parquet").exists():
        assert process.poll() is None, "it ended early"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(line) == 2  # parts are there: whether to go on is asked
    assert main([*line, "--resume"]) == 0
    assert tables(out) == tables(folder / "whole")


def test_another_question_is_not_mixed_in(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["explain", str(folder / "images"), *OPTIONS, "--out", str(folder / "whole"), "--resume"]
    assert main([*line, "--seed", "1"]) == 2
    assert "seed 0 and now 1" in capsys.readouterr().err
    assert main([*line, "--modes"]) == 2
    assert main(["explain", str(folder / "images" / "1" / "001.png"), *OPTIONS, "--out", str(folder / "one")]) == 2


@pytest.mark.slow
def test_the_rule_makes_every_share(folder: Path) -> None:
    asked = [f"images={folder / 'images'}", "model=mnist_cnn", f"out={folder / 'ruled'}", "shares=2", "device=cpu"]
    asked.append("options=--budget 8 --no-pictures")
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "paper/cluster/explain.smk"), "--cores", "1"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run([*command, "--config", *asked], cwd=folder, env=env, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-2000:]
    found = {name: body for name, body in tables(folder / "ruled").items() if not name.startswith("shares/")}
    assert found == tables(folder / "whole")


@pytest.mark.parametrize("profile", ["smoke", "quick", "full"])
def test_every_job_says_what_it_takes(profile: str) -> None:
    jobs = plan(load_config(profile, ROOT), profile, ROOT)
    assert all(job.minutes >= 15 and job.memory_mb >= 1000 and job.threads >= 1 for job in jobs)
    assert all(job.gpu == (profile == "full" and computes(ROOT / job.notebook)) for job in jobs)
    assert 0 < sum(computes(ROOT / job.notebook) for job in jobs) < len(jobs)


@pytest.mark.slow
@pytest.mark.skipif(bool(one_node.missing()) or os.geteuid() != 0, reason="Slurm is not installed, or no root")
@pytest.mark.skipif(one_node.SYSTEM.exists(), reason="this machine belongs to a cluster")
def test_a_notebook_of_the_paper_through_slurm() -> None:
    """Snakemake hands the smallest job to Slurm, which runs it."""
    target = "paper/build/smoke/numbers/setting.json"
    command = [sys.executable, "-m", "snakemake", "-s", "paper/Snakefile", "--config", "profile=smoke"]
    command += ["--workflow-profile", "paper/cluster/slurm", "--nolock", "--force", "--", target]
    with one_node.cluster(cpus=1) as env:
        answer = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert "has been submitted with SLURM jobid" in answer.stderr + answer.stdout
    assert json.loads((ROOT / target).read_text())["size"] == 256
