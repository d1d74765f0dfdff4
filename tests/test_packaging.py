"""What users get: sdist, wheel, requirements and the README, which `make package` runs from the installed wheel."""

import ast
import builtins
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import package
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
NO_NETWORK = r"[Ff]ailed to fetch|dns|sending request|[Cc]onnect|timed out"
OPTIONAL_GROUPS = ("data", "explore", "paper", "bench", "docs", "dev")


@pytest.fixture(scope="module")
def requirements() -> dict[str, list[Requirement]]:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    keys = {"": "requirements"} | {group: f"{group}_requirements" for group in OPTIONAL_GROUPS}
    return {group: [Requirement(text) for text in config["DEFAULT"][key].split()] for group, key in keys.items()}


@pytest.fixture(scope="module")
def blocks() -> list[str]:
    return package.examples((ROOT / "README.md").read_text(encoding="utf-8"), "python")


@pytest.mark.slow
def test_sdist_and_wheel_are_whole(tmp_path: Path) -> None:
    """The wheel is built from the sdist, so the sdist holds all that building takes; `build` checks both contents."""
    try:
        sdist, wheel = package.build(tmp_path)
    except RuntimeError as error:
        if re.search(NO_NETWORK, str(error)):
            pytest.skip("no network")
        raise
    assert sdist.stat().st_size < 20e6 and wheel.stat().st_size < 20e6


def test_types_are_declared_and_survive_an_export(tmp_path: Path) -> None:
    assert (ROOT / "cvi_nb" / "py.typed").is_file()
    for name in ("settings.ini", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("nbs/00_data.ipynb", "cvi_nb/__init__.py", "cvi_nb/py.typed"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    env = {name: value for name, value in os.environ.items() if name != "IN_TEST"}  # nbdev does nothing where it is set
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, env=env, check=True)
    assert (tmp_path / "cvi_nb" / "data.py").is_file() and (tmp_path / "cvi_nb" / "py.typed").is_file()


def test_imports_are_declared(requirements: dict[str, list[Requirement]]) -> None:
    """What a module imports at its top is a requirement; what it imports further in is one of some extra."""
    owners = metadata.packages_distributions()
    brought = {"IPython", "traitlets", "nbformat", "nbclient", "triton"}  # by ipywidgets, nbconvert, papermill, torch

    def undeclared(names: set[str], groups: list[str]) -> set[str]:
        known = {re.sub(r"[-_.]+", "-", r.name).lower() for group in groups for r in requirements[group]}
        foreign = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"cvi_nb", "__future__"}
        found = {name: {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners.get(name, [])} for name in foreign}
        return {name for name, dists in found.items() if dists and not dists & known}

    for path in (ROOT / "cvi_nb").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top: set[str] = set()
        deep: set[str] = set()
        for node in ast.walk(tree):
            where = top if node in tree.body else deep
            if isinstance(node, ast.Import):
                where |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                where.add(node.module)
        assert undeclared(top, [""]) == set(), path.name
        assert undeclared(deep, ["", *OPTIONAL_GROUPS]) <= brought, path.name


def test_requirements_have_lower_bounds(requirements: dict[str, list[Requirement]]) -> None:
    for requirement in requirements[""] + requirements["data"]:
        assert any(part.operator in (">=", "==") for part in requirement.specifier) or requirement.name in (
            "efficientnet-lite-pytorch",
        ), f"{requirement} has no lowest version that could be tested"


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.13"])
def test_lowest_versions_resolve(python: str, tmp_path: Path) -> None:
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    lowest = ["--quiet", "--python-version", python, "--resolution", "lowest-direct", "--extra", "data"]
    try:
        said = package.run(package.uv(), "pip", "compile", *lowest, "setup.py", cwd=tmp_path)
    except RuntimeError as error:
        if re.search(NO_NETWORK, str(error)):
            pytest.skip("no network")
        raise
    assert "torch==2.4.0\n" in said or python != "3.11"


def test_readme_names_where_to_get_things() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "git clone" in text and 'pip install ".[data]"' in text and "cvi_nb[data]" in text


def test_readme_blocks_stand_alone(blocks: list[str]) -> None:
    """Every name that a block uses is made in that block, so that it runs as pasted."""
    assert len(blocks) >= 3
    for block in blocks:
        names = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name)]
        made = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(dir(builtins))
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                made |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        assert {node.id for node in names} <= made, block


def test_readme_imports_what_it_uses(blocks: list[str]) -> None:
    for block in blocks:
        tree = ast.parse(block)
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                module = __import__(node.module or "", fromlist=["_"])
                assert all(hasattr(module, alias.name) and alias.name in used for alias in node.names), block


def test_workflow_covers_what_is_promised() -> None:
    import yaml

    text = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    matrix = jobs["suite"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    assert {name.partition("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}
    package_job = jobs["package"]["strategy"]["matrix"]
    versions = {*package_job["versions"], *(entry["versions"] for entry in package_job["include"])}
    assert versions == {"locked", "highest", "lowest-direct"}
    assert any("bash .ci/run" in str(step) for step in jobs["whole"]["steps"])
    assert "make package" in (ROOT / ".ci" / "run").read_text()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"UV_VERSION := (\S+)", makefile)[1] == re.search(r"UV_VERSION: (\S+)", text)[1]


def test_wheels_and_recipe_are_those_of_the_settings(requirements: dict[str, list[Requirement]]) -> None:
    """The versions that wheels are built for, and conda's names for what the library needs."""
    import tomllib

    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    settings = config["DEFAULT"]
    building = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["cibuildwheel"]
    tested = settings["tested_python"].split()
    assert building["build"].split() == [f"cp{version.replace('.', '')}-*" for version in tested]
    workflow = (ROOT / ".github" / "workflows" / "wheels.yml").read_text(encoding="utf-8")
    assert "cibuildwheel@" in workflow and {"ubuntu-latest", "macos-latest", "windows-latest"} <= set(
        re.findall(r"[\w.]+-[\w.-]+", workflow)
    )
    recipe = (ROOT / ".github" / "conda" / "meta.yaml").read_text(encoding="utf-8")
    conda = {"torch": "pytorch", "matplotlib": "matplotlib-base", "seaborn": "seaborn-base"}
    for requirement in requirements[""]:
        assert f"- {conda.get(requirement.name, requirement.name)} {requirement.specifier}\n" in recipe
    assert (
        f'version = "{settings["version"]}"' in recipe and f"skip: true  # [py<{tested[0].replace('.', '')}]" in recipe
    )
