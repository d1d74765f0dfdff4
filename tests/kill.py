"""kill -9 at random moments, then again to the end: the results must be those of an undisturbed run.

    python tests/kill.py [--seconds 120] [--seed 0] [--only explain report train cache notebook]

Each piece of work runs in a child of this process, which is killed at a random moment, its whole process group with it,
several times in one place; then it runs to its end, once alone and once with a second one beside it. What lies there
afterwards must equal the reference, and no temporary file may be left. POSIX only. Prints the number of kills.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
os.environ.pop("IN_TEST", None)

import torch
from PIL import Image

from cvi_nb import cli
from cvi_nb.data import load_digits
from cvi_nb.defence import plain, train
from cvi_nb.models import load_classifier, mnist_cnn, save_classifier
from cvi_nb.paper import run_notebook

ROOT = Path(__file__).resolve().parents[1]
KILLS = 4  # in one place, before the work may end
Work = Callable[[Path], object]


def explain(place: Path) -> None:
    """`cvi explain` over a folder of digits."""
    source = place.parent / "digits"
    options = ["--model", "mnist_cnn", "--budget", "16", "--quiet", "--out", str(place / "maps")]
    cli.main(["explain", str(source), *options])


def report(place: Path) -> None:
    """`cvi report` of a digit network on two digits."""
    os.chdir(place)  # a report says by which command it was made
    options = ["--images", "digits", "--count", "2", "--quiet", "--out", "report.html"]
    cli.main(["report", "--model", "plain", *options])


def training(place: Path) -> None:
    """A training that continues from its checkpoint, and the weights that come of it."""
    digits = load_digits("development")[::25]
    checkpoint = place / "training.pt"
    result = train(mnist_cnn, digits.images, digits.labels, plain(), epochs=3, checkpoint=checkpoint, progress=False)
    save_classifier(result.classifier, place / "trained.safetensors", architecture="mnist_cnn")


def cache(place: Path) -> None:
    """A network that is trained into an empty cache when somebody first asks for it."""
    os.environ["CVI_HOME"] = str(place / "cache")
    model = load_classifier("mnist_cnn", seed=1)
    digits = load_digits("report")[:4]
    torch.save(model.logits(digits.images), place / "logits.pt")


def notebook(place: Path) -> None:
    """One job of `make figures`: a notebook of the paper, its table and its numbers."""
    small = {"size": 64, "repeats": 1}
    run_notebook(ROOT / "nbs" / "paper" / "00_setting.ipynb", place / "paper", small, progress=False)


WORKS: dict[str, Work] = {"explain": explain, "report": report, "train": training, "cache": cache, "notebook": notebook}
# What differs between two undisturbed runs: times, and with them the executed notebook and its record.
VOLATILE = re.compile(r"notebooks/|\.lock$|/failed/|training\.pt$|numbers/|tables/")
SECONDS = re.compile(
    rb'[\d.,]+ (?:s|ms|min|seconds)\b|"[a-z_]*(?:seconds|time|date|started)[a-z_]*": [^,\n}]*|\d{4}-\d\d-\d\d[T ][\d:]+'
    rb"|\| [\d.]+ \|(?=\n)|<td[^>]*>[\d.]+</td></tr>"  # the last column of the report's table of costs
)


def prepare(place: Path) -> None:
    """Images for `explain`, beside the places where the work is done."""
    digits = load_digits("report")[::201]
    (place / "digits").mkdir()
    for i, image in enumerate(digits.images):
        Image.fromarray((255 * image[0]).round().byte().numpy()).save(place / "digits" / f"{i}.png")


def contents(place: Path) -> dict[str, str]:
    """A digest of each file, without what is allowed to differ; a volatile file counts by its name alone."""
    found = {}
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        name = path.relative_to(place).as_posix()
        body = b"" if VOLATILE.search(f"/{name}") else SECONDS.sub(b"", path.read_bytes())
        found[name] = hashlib.sha256(body).hexdigest()[:16]
    return found


def start(work: Work, place: Path) -> int:
    """A child with its own process group that does the work; its output goes to a file beside `place`."""
    place.mkdir(exist_ok=True)
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        out = os.open(f"{place}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        work(place)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def finish(child: int, place: Path) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise AssertionError(f"ended with {status}:\n{Path(f'{place}.log').read_text(errors='replace')[-3000:]}")


def kill(child: int, after: float) -> bool:
    """Kill the child's group after a time; False if it had ended by itself."""
    until = time.monotonic() + after
    while time.monotonic() < until:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(min(0.01, after))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # it may not lead its group yet
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@dataclass
class Tally:
    kills: int = 0
    rounds: int = 0
    pairs: int = 0
    faults: list[str] = field(default_factory=list)


def compare(name: str, expected: dict[str, str], place: Path, tally: Tally) -> None:
    found = contents(place)
    differing = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if differing:
        tally.faults.append(f"{name}: {', '.join(differing[:5])} differ in {place.name}")


def trial(name: str, folder: Path, seconds: float, uniform: Callable[[], float]) -> Tally:
    """Rounds of kills for one piece of work, as long as there is time; at least one, and one of two at once."""
    work, tally, begun = WORKS[name], Tally(), time.monotonic()
    finish(start(work, folder / f"{name}-reference"), folder / f"{name}-reference")
    lasts, expected = time.monotonic() - begun, contents(folder / f"{name}-reference")
    while True:
        place = folder / f"{name}-{tally.rounds}"
        for _ in range(KILLS):
            tally.kills += kill(start(work, place), lasts * uniform())
        pair = [start(work, place) for _ in range(1 + tally.rounds % 2)]  # alone, two at once, alone, …
        try:
            for child in pair:
                finish(child, place)
        except AssertionError as error:
            tally.faults.append(f"{name}: {error}")
        compare(name, expected, place, tally)
        tally.rounds, tally.pairs = tally.rounds + 1, tally.pairs + len(pair) - 1
        round_lasts = (time.monotonic() - begun - lasts) / tally.rounds
        if tally.faults:
            return tally
        shutil.rmtree(place)
        if tally.rounds >= 2 and time.monotonic() - begun + round_lasts > seconds:
            return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=120, help="about how long; each piece takes two rounds at least"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    uniform, kills, faults = random.Random(given.seed).random, 0, []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cvi-kill-") as name:
        folder = Path(name)
        prepare(folder)
        for position, work in enumerate(given.only):
            left = max(0.0, given.seconds - (time.monotonic() - begun))
            tally = trial(work, folder, left / (len(given.only) - position), uniform)
            kills, faults = kills + tally.kills, faults + tally.faults
            print(
                f"{work:9} {tally.kills:3} kills in {tally.rounds} rounds, {tally.pairs} with two at once", flush=True
            )
            for fault in tally.faults:
                print(f"  {fault}", flush=True)
    print(json.dumps({"kills": kills, "faults": len(faults), "seconds": round(time.monotonic() - begun)}))
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
