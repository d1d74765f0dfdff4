"""Memory, time and sameness of `cvi explain FOLDER` over many crops of real photos.

    python tests/folder.py [--counts 500 5000] [--model mnist_cnn] [--partition grid] [--budget 8]

The crops (PNG, random places in the photos that come with packages, by a seed) are explained as parts of 64 without
pictures, by the command in a process of its own: its peak of resident memory and its CPU time are those that the kernel
counts. Then the smallest folder again: killed with -9 three times, resumed, and in two shares; all must write what the
undisturbed run wrote, byte by byte. POSIX only. Prints a line of JSON for each run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from cvi_nb.data import load_photos

CVI = [sys.executable, "-m", "cvi_nb.cli", "explain"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
KILLS = 3


def write_crops(place: Path, count: int, crop: int, seed: int = 0) -> Path:
    """`count` crops of `crop` pixels squared; those of a larger count begin with those of a smaller one."""
    photos, draw = load_photos(collection="all").images, random.Random(seed)
    place.mkdir()
    for k in range(count):
        image = photos[draw.randrange(len(photos))]
        y, x = (draw.randrange(side - crop + 1) for side in image.shape[1:])
        values = (255 * image[:, y : y + crop, x : x + crop]).round().to(torch.uint8).permute(1, 2, 0)
        Image.fromarray(values.numpy()).save(place / f"{k:06d}.png")
    return place


def measure(command: list[str]) -> dict[str, float]:
    """Run it to its end: peak resident MiB, CPU seconds and seconds of the clock."""
    begun = time.monotonic()
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    clock = round(time.monotonic() - begun, 1)
    return {"peak_mib": round(used.ru_maxrss / unit), "cpu_s": round(used.ru_utime + used.ru_stime, 1), "s": clock}


def kill_and_resume(command: list[str], out: Path, parts: int) -> int:
    """Start, kill -9 when some parts are there, and again; then to the end. Returns how often it was killed."""
    kills = 0
    for k in range(1, KILLS + 1):
        process = subprocess.Popen([*command, "--resume"], env=ENV, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("images/*.parquet"))) < k * parts // (KILLS + 1):
            time.sleep(0.01)
        time.sleep(0.3 * k)  # in the middle of a part
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    measure([*command, "--resume"])
    return kills


def contents(out: Path) -> dict[str, bytes]:
    """All files of a result."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[500, 5000], help="crops")
    parser.add_argument("--model", default="mnist_cnn")
    parser.add_argument("--partition", default="grid", help="grid, the cheapest, or mean_shift")
    parser.add_argument("--budget", type=int, default=8)
    parser.add_argument("--crop", type=int, default=64, help="pixels")
    parser.add_argument("--memory-only", action="store_true", help="no kills, no shares")
    given = parser.parse_args()
    options = ["--model", given.model, "--partition", given.partition, "--budget", str(given.budget)]
    options += ["--no-pictures", "--quiet"]
    with tempfile.TemporaryDirectory(prefix="cvi-folder-") as name:
        place = Path(name)
        for count in given.counts:
            crops = write_crops(place / f"crops-{count}", count, given.crop)
            used = measure([*CVI, str(crops), *options, "--out", str(place / f"whole-{count}")])
            print(json.dumps({"crops": count} | used), flush=True)
        if given.memory_only:
            return 0
        count = min(given.counts)
        whole = contents(place / f"whole-{count}")
        command = [*CVI, str(place / f"crops-{count}"), *options, "--out"]
        kills = kill_and_resume([*command, str(place / "killed")], place / "killed", -(-count // 64))
        for k in (2, 1):
            measure([*command, str(place / "shares"), "--shard", f"{k}/2"])
        same = {way: contents(place / way) == whole for way in ("killed", "shares")}
        print(json.dumps({"crops": count, "files": len(whole), "kills": kills} | same), flush=True)
        return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
