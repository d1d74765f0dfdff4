"""Build sdist and wheel, install the wheel in a clean environment, run the README's examples there: `make package`.

    python tests/package.py [--python 3.12] [--resolution locked|highest|lowest-direct] [--build-only] [--keep FOLDER]

It needs uv and the package registry (or uv's cache), nothing else; nothing is written into the project.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILT = {"build", "dist", "__pycache__", ".venv", ".ipynb_checkpoints", ".snakemake", "cvi_nb.egg-info"}
# What an sdist must hold to be built, tested and read, and what a wheel must and must not hold.
SOURCES = """PKG-INFO LICENSE README.md CHANGELOG.md CITATION.cff CONTRIBUTING.md MANIFEST.in Makefile pyproject.toml
requirements.lock settings.ini setup.py .ci/run .github/workflows/test.yml cvi_nb/__init__.py cvi_nb/py.typed
cvi_nb/clustering/_mean_shift.c nbs/index.ipynb nbs/00_data.ipynb nbs/paper/00_setting.ipynb nbs/paper/.notest
paper/Snakefile paper/paper.tex paper/config/smoke.yaml tests/package.py tests/test_data.py""".split()
MODULES = "cvi_nb/__init__.py cvi_nb/data.py cvi_nb/py.typed cvi_nb/inference/__init__.py".split()
UNWANTED = re.compile(r"_modidx|\.ipynb|__pycache__|^(tests|nbs|paper|build)/|\.c$|\.part$")


def uv() -> str:
    """The installer: beside this Python, or on the path."""
    beside = shutil.which("uv", path=str(Path(sys.executable).parent))
    if found := beside or shutil.which("uv"):
        return found
    raise SystemExit("uv is needed: python -m pip install uv")


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command and return what it printed; if it fails, stop with all of it."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "IN_TEST")}
    answer = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=env | variables,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if answer.returncode:
        words = " ".join(map(str, command))
        raise RuntimeError(f"{words} ended with {answer.returncode}\n{answer.stdout[-4000:]}\n{answer.stderr[-8000:]}")
    return answer.stdout + answer.stderr


def copy_sources(place: Path) -> Path:
    """The project as a clone would hold it, with what is not committed yet; build leavings stay behind."""
    names = None
    if (ROOT / ".git").exists() and shutil.which("git"):
        listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        answer = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
        names = answer.stdout.split("\0") if answer.returncode == 0 else None
    if names is None:
        inside = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
        names = [str(p) for p in inside if not BUILT & set(p.parts) and p.suffix not in (".so", ".pyd")]
    for name in names:
        if name and (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)
    return place


def build(place: Path, python: str = sys.executable) -> tuple[Path, Path]:
    """sdist, and a wheel built from the sdist alone, in `place`/dist; their contents checked."""
    sources = copy_sources(place / "sources")
    run(uv(), "build", "--quiet", "--python", python, "--out-dir", place / "dist", sources, cwd=place)
    (sdist,), (wheel,) = place.glob("dist/*.tar.gz"), place.glob("dist/*.whl")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        modules = set(archive.namelist())
    pattern = re.compile(r"cvi_nb/.*\.(py|typed|safetensors|json|css|j2|mplstyle)")
    ours = {p.relative_to(sources).as_posix() for p in sources.rglob("*") if p.is_file()}
    ours = {name for name in ours if pattern.fullmatch(name) and not UNWANTED.search(name)}
    for title, lacking in (("sdist", set(SOURCES) - inside), ("wheel", (set(MODULES) | ours) - modules)):
        if lacking:
            raise RuntimeError(f"the {title} lacks {sorted(lacking)}")
    if extra := sorted(name for name in modules if UNWANTED.search(name)):
        raise RuntimeError(f"the wheel must not hold {extra}")
    return sdist, wheel


def install(wheel: Path, place: Path, python: str, resolution: str) -> Path:
    """A new environment with the wheel and its `data` extra; returns the folder of its programs."""
    run(uv(), "venv", "--quiet", "--python", python, place / "env", cwd=place)
    programs = place / "env" / ("Scripts" if os.name == "nt" else "bin")
    how = ["--constraints", str(ROOT / "requirements.lock")] if resolution == "locked" else ["--resolution", resolution]
    run(uv(), "pip", "install", "--quiet", "--python", programs / "python", *how, f"{wheel}[data]", cwd=place)
    return programs


def examples(text: str, language: str) -> list[str]:
    """The fenced blocks of a Markdown text in one language."""
    return [body for name, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M) if name == language]


def commands(text: str) -> list[str]:
    """The lines of plain blocks that call `cvi`."""
    return [line for block in examples(text, "") for line in block.splitlines() if line.startswith("cvi ")]


def try_readme(programs: Path, place: Path) -> None:
    """Each Python block alone, as a user pastes it, and each command, in an empty folder with an empty home."""
    home = place / "home"
    home.mkdir()
    variables = {"HOME": str(home), "USERPROFILE": str(home), "MPLBACKEND": "agg", "PYTHONNOUSERSITE": "1"}
    variables |= {"XDG_CACHE_HOME": "", "CVI_HOME": "", "PYTHONUTF8": "1"}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    photo = "from skimage import data, io; io.imsave('photo.jpg', data.coffee())"
    tries = [(block.splitlines()[0], [programs / "python", "-c", block]) for block in examples(text, "python")]
    tries += [
        (line, [programs / "cvi", *shlex.split(line.replace("--count 100", "--count 4"))[1:]])
        for line in commands(text)
    ]
    for number, (title, command) in enumerate(tries):
        folder, start = place / f"try{number}", time.time()
        folder.mkdir()
        if "photo.jpg" in title:
            run(programs / "python", "-c", photo, cwd=folder, **variables)
        said = run(*command, cwd=folder, **variables)
        if "DeprecationWarning" in said:
            raise RuntimeError(f"{title}: {said}")
        print(f"  {time.time() - start:5.1f} s  {title}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", default=sys.executable, help="a version or a path; by default this one")
    parser.add_argument("--resolution", default="locked", choices=["locked", "highest", "lowest-direct"])
    parser.add_argument("--build-only", action="store_true", help="no installation, no examples")
    parser.add_argument("--keep", type=Path, help="folder that does not exist yet, to work in and leave behind")
    given = parser.parse_args()
    if Path(given.python).exists():  # commands run in other folders
        given.python = str(Path(given.python).absolute())
    with tempfile.TemporaryDirectory(prefix="cvi-package-") as folder:
        place = (given.keep or Path(folder)).absolute()
        place.mkdir(parents=True, exist_ok=given.keep is None)
        sdist, wheel = build(place, given.python)
        print("built", *(f"{path.name} ({path.stat().st_size / 1e6:.1f} MB)" for path in (sdist, wheel)), flush=True)
        if given.build_only:
            return
        programs = install(wheel, place, given.python, given.resolution)
        print(f"installed with [data], {given.resolution} versions; the README's examples:", flush=True)
        try_readme(programs, place)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
