"""The pages: their guides run, their sources are whole, and they build without a warning."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import package
import pytest

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted((ROOT / "nbs" / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "nbs" / "docs" / "build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in GUIDES if "```python" in p.read_text("utf-8")], ids=lambda p: p.stem)
def test_the_code_of_a_guide_runs(page: Path, tmp_path: Path) -> None:
    """All blocks of a page, one after the other, in an empty folder."""
    code = "\n".join(package.examples(page.read_text(encoding="utf-8"), "python"))
    env = os.environ | {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::DeprecationWarning:cvi_nb", "-c", code]
    answer = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]


@pytest.mark.parametrize("page", GUIDES, ids=lambda p: p.stem)
def test_the_commands_of_a_guide_parse(page: Path) -> None:
    import shlex

    from cvi_nb.cli.parser import make_parser

    for line in package.commands(page.read_text(encoding="utf-8")):
        assert make_parser().parse_args(shlex.split(line)[1:]).command, line


def test_every_module_has_a_reference_page_and_every_guide_a_place(build: ModuleType) -> None:
    modules = {
        path.stem for path in (ROOT / "cvi_nb").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert modules - {"__init__", "_modidx"} == set(build.MODULES) & modules
    listed = " ".join(page.read_text(encoding="utf-8") for page in GUIDES)
    for page in GUIDES:
        inside = page.relative_to(ROOT / "nbs" / "docs").with_suffix("").as_posix()
        assert inside == "index" or re.search(rf"^({re.escape(inside)}|{page.stem})$", listed, re.M), inside


def test_the_text_of_the_paper_takes_its_numbers_from_a_build(build: ModuleType, tmp_path: Path) -> None:
    """Each caption leads to a notebook, and no command of LaTeX's text is left."""
    try:
        build.paper_text.pandoc()
    except SystemExit:
        pytest.skip("no pandoc")
    bare = build.paper_text.page(ROOT, tmp_path / "figures")
    assert "## Experiments" in bare and "## References" in bare and r"\tag{2}" in bare
    books = re.findall(r"\[notebook\\\]\]\((\w+\.ipynb)\)", bare)
    assert len(books) > 8 and all((ROOT / "nbs" / "paper" / book).exists() for book in books)
    assert not re.search(r"\\(ref|cite|emph|notebook|tablefile)\b", bare)
    (tmp_path / "numbers.tex").write_text(r"\newcommand{\methodForward}{1{,}234}" + "\n", encoding="utf-8")
    assert build.paper_text.macros(tmp_path) == {"methodForward": "1{,}234"} and build.paper_text.macros(None) == {}


@pytest.mark.slow
def test_the_pages_build_without_a_warning() -> None:
    """Sphinx with -W, and no link within the pages that leads nowhere."""
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_nb")
    command = [sys.executable, str(ROOT / "nbs" / "docs" / "build.py")]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, (answer.stdout + answer.stderr)[-3000:]
