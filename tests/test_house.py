"""The rules of the house, as far as a program can check them: see CONTRIBUTING.md."""

import ast
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import house
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cvi_nb"
BIN = Path(sys.executable).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("_modidx.py", "__main__.py"))

# Data flows one way: a module imports only from those above it. `plot` needs `files` alone, and anybody may import it.
ORDER = ["lazy", "files", "validation", "statistics", "data", "models", "clustering", "inference", "attack", "defence"]
ORDER += ["faithfulness", "robustness", "report", "paper", "cli", "peers", "explore"]


def settings() -> dict[str, str]:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command in a clean environment; nbdev does nothing at all where IN_TEST is set."""
    env = {name: value for name, value in os.environ.items() if name != "IN_TEST"} | variables
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300
    )


def tracked() -> list[Path]:
    """The text files of the repository; in an unpacked archive, those that are not built."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        answer = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
        if answer.returncode == 0:
            files = [ROOT / name for name in answer.stdout.split("\0") if name and (ROOT / name).is_file()]
            return [path for path in files if b"\0" not in path.read_bytes()]
    built = {"build", "dist", "__pycache__", "cvi_nb.egg-info"}
    files = [path for path in ROOT.rglob("*") if path.is_file() and path.suffix not in (".so", ".pdf")]
    inside = [(path, path.relative_to(ROOT).parts) for path in files]
    files = [path for path, parts in inside if not built & set(parts) and (parts[0][0] != "." or parts[0] == ".ci")]
    return [path for path in files if b"\0" not in path.read_bytes()]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The project without its exported modules, to export them anew."""
    place = tmp_path_factory.mktemp("house") / "cvi_nb"
    place.mkdir()
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "requirements.lock"):
        shutil.copy(ROOT / name, place)
    for name in ("nbs", "cvi_nb"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    yield place


def test_modules_are_those_of_the_notebooks(copy: Path) -> None:
    shutil.rmtree(copy / "cvi_nb")
    (copy / "cvi_nb").mkdir()
    answer = run(BIN / "nbdev_export", cwd=copy)
    assert answer.returncode == 0, answer.stderr
    fresh = {path.relative_to(copy / "cvi_nb"): path.read_bytes() for path in (copy / "cvi_nb").rglob("*.py")}
    here = {path.relative_to(PACKAGE): path.read_bytes() for path in PACKAGE.rglob("*.py")}
    assert set(here) == set(fresh), "run `make export`; a module without a notebook must go"
    assert [str(name) for name in here if here[name] != fresh[name]] == [], "run `make export`"


def test_notebooks_are_clean(copy: Path) -> None:
    before = {path: path.read_bytes() for path in (copy / "nbs").rglob("*.ipynb")}
    answer = run(BIN / "nbdev_clean", cwd=copy)
    assert answer.returncode == 0, answer.stderr
    dirty = [path.relative_to(copy).as_posix() for path, content in before.items() if path.read_bytes() != content]
    assert dirty == [], "run `make export`"


def test_readme_is_that_of_the_index(tmp_path: Path) -> None:
    from cvi_nb.paper import render_readme

    fresh = render_readme(ROOT / "nbs" / "index.ipynb", tmp_path / "README.md")
    assert fresh.read_text(encoding="utf-8") == (ROOT / "README.md").read_text(encoding="utf-8"), "run `make readme`"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    here = path.relative_to(PACKAGE).with_suffix("").parts
    package = ["cvi_nb", *here[:-1]]
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            full = ".".join(filter(None, [base, node.module]))
            imported |= {full} if full != "cvi_nb" else {f"cvi_nb.{alias.name}" for alias in node.names}
    siblings = {name.split(".")[1] for name in imported if name.startswith("cvi_nb.")} - {here[0]}
    if here[0] == "plot":
        assert siblings <= {"files", "lazy", "validation"}, "plot is a leaf"
    elif here[0] != "__init__":
        assert here[0] in ORDER, f"{here[0]} has no place in the order of modules yet"
        assert siblings - {"plot"} <= set(ORDER[: ORDER.index(here[0])]), "reaches down"


def test_the_bare_package_imports_without_extras() -> None:
    """Every module, in a process that cannot see what only the extras bring."""
    config = settings()
    needed: set[str] = set()
    waiting = [Requirement(text).name for text in config["requirements"].split()]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in needed:
            continue
        needed.add(name)
        try:
            requirements = [Requirement(text) for text in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue  # for another platform
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    known = {re.sub(r"[-_.]+", "-", name).lower() for name in ("pip", "uv", "setuptools", config["lib_name"])} | needed
    blocked = sorted(
        module
        for module, owners in metadata.packages_distributions().items()
        if not {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} & known and not module.startswith("_")
    )
    assert {"nbdev", "fastcore", "captum", "papermill", "pyarrow", "skimage", "timm"} <= set(blocked)
    names = [".".join(["cvi_nb", *path.relative_to(PACKAGE).with_suffix("").parts]) for path in MODULES]
    code = f"""
import importlib, importlib.util, sys
blocked = set({blocked!r})
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}} in a bare installation", name=name)
sys.meta_path.insert(0, Blocker())
# A package that only asks whether another is there (torch does) gets the answer of a bare installation.
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.partition(".")[0] in blocked else find_spec(name, package)
)
for name in {[name.removesuffix(".__init__") for name in names]!r}:
    importlib.import_module(name)
"""
    answer = run(sys.executable, "-c", code, cwd=ROOT, MPLBACKEND="agg")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == answer.stderr == "", "importing must be silent"


CHAPTERS = house.notebooks()


@pytest.fixture(scope="module")
def chapters() -> list[house.Chapter]:
    return [house.read(path) for path in CHAPTERS]


def test_cells_are_short(chapters: list[house.Chapter]) -> None:
    """A screen at most, and most of them a fraction of one."""
    assert [c.name for c in chapters if max(c.lines, default=0) > 60] == []
    assert statistics.median(n for c in chapters for n in c.lines) <= 20


def test_a_cell_defines_one_thing(chapters: list[house.Chapter]) -> None:
    assert {c.name: c.shared for c in chapters if c.shared} == {}, "two public definitions in one cell"
    cells = sum(len(c.lines) for c in chapters)
    assert sum(len(c.crowded) for c in chapters) <= 0.15 * cells


def test_every_public_definition_is_shown_at_once(chapters: list[house.Chapter]) -> None:
    """A picture or an assertion that names it stands between its cell and the next public definition."""
    assert {c.name: c.undemonstrated for c in chapters if c.undemonstrated} == {}


def test_no_private_name_crosses_modules_and_no_import_hides(chapters: list[house.Chapter]) -> None:
    assert {c.name: c.private_imports for c in chapters if c.private_imports} == {}
    assert {c.name: c.inner_imports for c in chapters if c.inner_imports} == {}, "only optional packages"


def test_few_functions_have_many_parameters(chapters: list[house.Chapter]) -> None:
    assert max(c.widest for c in chapters) <= 16
    assert sum(len(c.wide) for c in chapters) <= 0.03 * sum(c.functions for c in chapters)


def test_no_module_has_the_name_of_what_its_package_exports() -> None:
    """Or the function would shadow the module, and `import cvi_nb.attack.square` be a function."""
    for init in PACKAGE.rglob("__init__.py"):
        tree = ast.parse(init.read_text(encoding="utf-8"))
        names = {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        assert names & {p.stem for p in init.parent.glob("*.py")} == set(), init.relative_to(PACKAGE)


@pytest.mark.parametrize("folder", ["paper", "benchmarks"])
def test_notebooks_that_are_read_have_the_outputs_of_their_code(folder: str) -> None:
    from cvi_nb.paper import is_current

    stale = [path.name for path in sorted((ROOT / "nbs" / folder).glob("*.ipynb")) if not is_current(path)]
    assert stale == [], "see CONTRIBUTING: make executed"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_public_names_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []
    assert path.name == "__init__.py" or ast.get_docstring(tree), "the summary line of the notebook"


def test_no_trace_of_a_machine() -> None:
    """No path of somebody's machine, no package registry's host: what is committed means the same everywhere."""
    machine = re.compile(r"(?<![\w.:/])/(?:root|home|work|Users|mnt|opt|tmp|private)/\w|/\.venv/lib|[A-Z]:\\Users")
    registry = re.compile("|".join([r"pypi\." + "org", "pythonhosted" + r"\.", "index" + "-url", "find" + "-links"]))
    found = []
    for path in tracked():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if len(line) < 20_000 and (machine.search(line) or registry.search(line)) and path != Path(__file__):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert found == []


def locked() -> dict[str, list[tuple[Version, str]]]:
    """Versions in requirements.lock, by package, each with the marker under which it holds."""
    pins: dict[str, list[tuple[Version, str]]] = {}
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)==([^\s;\\]+)(?:\s*;\s*([^\\]+))?", line):
            pins.setdefault(re.sub(r"[-_.]+", "-", match[1]).lower(), []).append((Version(match[2]), match[3] or ""))
    return pins


def test_lock_has_what_settings_ask_for() -> None:
    config, pins = settings(), locked()
    wanted = [text for key in config if key.endswith("requirements") for text in config[key].split()]
    for requirement in map(Requirement, wanted):
        versions = [version for version, _ in pins.get(re.sub(r"[-_.]+", "-", requirement.name).lower(), [])]
        assert versions and all(version in requirement.specifier for version in versions), f"{requirement}: `make lock`"


@pytest.mark.slow
def test_lock_is_current(copy: Path) -> None:
    """Compiling onto a copy keeps the pins and changes nothing; without a network there is nothing to compare with."""
    command = [BIN / "uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes", "setup.py", "--all-extras"]
    answer = run(*command, "-o", "requirements.lock", cwd=copy)
    if answer.returncode and re.search(
        r"[Ff]ailed to fetch|dns|sending request|[Cc]onnect|timed out", answer.stderr
    ):
        pytest.skip("no network")
    assert answer.returncode == 0, answer.stderr
    old, new = (
        [line for line in (place / "requirements.lock").read_text().splitlines() if not line.lstrip().startswith("#")]
        for place in (ROOT, copy)
    )
    assert old == new, "run `make lock`"


def test_one_version_everywhere() -> None:
    import yaml

    import cvi_nb

    config = settings()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cvi_nb.__version__ == config["version"] == citation["version"] == metadata.version("cvi_nb")
    assert citation["title"] == config["title"] and citation["repository-code"] == config["git_url"].replace(
        "%(user)s/%(repo)s", f"{config['user']}/{config['repo']}"
    )
    assert re.search(
        rf"^## \[(?:Unreleased|{re.escape(config['version'])})\]", (ROOT / "CHANGELOG.md").read_text(), re.M
    )


def test_the_examples_of_contributing_run() -> None:
    """An attack, a metric, an evidence and a family, each in its two places, as CONTRIBUTING shows them."""
    _, text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Add an attack")
    blocks = re.findall(r"(?s)```python\n(.*?)```", text)
    assert len(blocks) == 5
    answer = run(sys.executable, "-W", "error::DeprecationWarning:cvi_nb", "-c", "\n".join(blocks), cwd=ROOT)
    assert answer.returncode == 0, answer.stderr[-2000:]


def test_the_figure_of_contributing_is_drawn(tmp_path: Path) -> None:
    """A figure of the paper in its three places: notebook, entry, text."""
    nbformat, yaml = pytest.importorskip("nbformat"), pytest.importorskip("yaml")
    from cvi_nb.paper import plan, run_notebook

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Add an attack")[0]
    (parameters, code), (entry,), (latex,) = (
        re.findall(rf"(?s)```{kind}\n(.*?)```", text) for kind in ("python", "yaml", "latex")
    )
    cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook = tmp_path / "nbs" / "paper" / "12_ink.ipynb"
    notebook.parent.mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell(code)]), notebook)
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "cvi_nb").symlink_to(PACKAGE)
    (job,) = plan(yaml.safe_load("notebooks:\n" + entry), "quick", tmp_path)
    run_notebook(notebook, tmp_path / "out", {"digits": 30}, writes=job.writes, progress=False)
    for name in re.findall(r"\\includegraphics.*?\{(.*?)\}", latex):
        assert (tmp_path / "out" / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    macros = (tmp_path / "out" / "numbers" / "ink.tex").read_text()
    assert "{\\inkDigits}{30}" in macros
    assert set(re.findall(r"\\ink\w+", latex)) <= set(re.findall(r"\\ink\w+", macros))
