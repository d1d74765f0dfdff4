"""cvi_nb.paper against independent truth: LaTeX itself, Python's own imports, a killed process."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvi_nb.files import atomic_path
from cvi_nb.paper import (
    TEXT_WIDTH,
    NotebookError,
    Outputs,
    build_dir,
    compare_parameters,
    compare_runs,
    estimate,
    latex_escape,
    latex_macro,
    latex_number,
    latex_table,
    load_config,
    modules_of,
    notebook_parameters,
    overview,
    plan,
    project_root,
    read_results,
    render_readme,
    run_name,
    run_notebook,
    seed_of,
    shard_range,
    typeset,
)
from cvi_nb.paper import build as workflow

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ("smoke", "quick", "full")
identifiers = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,12}", fullmatch=True)


def write_notebook(path: Path, *sources: str) -> Path:
    """A notebook with these code cells, the first of them tagged `parameters`."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of its own, with one notebook that measures real digits."""
    shutil.copy(ROOT / "settings.ini", tmp_path)
    write_notebook(
        tmp_path / "nbs" / "paper" / "ink.ipynb",
        "out_dir = ''\nimages = 100\nwait = 0.0",
        "from cvi_nb.paper import Outputs, check_parameters\ncheck_parameters()\nout = Outputs(out_dir, 'ink')",
        "from sklearn.datasets import load_digits\nimport time\nout.numbers(mean=load_digits().images[:images].mean())",
        "time.sleep(wait)\nassert images < 500, 'too many images'",
    )
    return tmp_path


# Numbers, macros, tables


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_a_printed_number_reads_back_to_three_digits(value: float) -> None:
    text = latex_number(value).replace("{,}", "")
    text = re.sub(r"^\\ensuremath\{(.*)\}$", r"\1", text)
    text = re.sub(r"\\times10\^\{(-?\d+)\}", r"e\1", text)
    assert float(text) == pytest.approx(value, rel=5.1e-3, abs=1e-300)


@given(st.integers(-(10**12), 10**12))
def test_a_printed_integer_is_exact(value: int) -> None:
    assert int(re.sub(r"\\ensuremath|[{},]", "", latex_number(value))) == value


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (np.int64(2000), "", "2{,}000"),
        (np.float32(0.25), ".2f", "0.25"),
        (0.5, "+.1%", r"\ensuremath{+50.0\%}"),
        (float("inf"), "", r"\ensuremath{\infty}"),
        (float("nan"), ".2f", "--"),
        (None, "", "--"),
        (False, "", "no"),
        ("a_b", "", r"a\_b"),
    ],
)
def test_number_forms(value: object, spec: str, text: str) -> None:
    assert latex_number(value, spec) == text


@given(identifiers, identifiers)
def test_macros_hold_letters_only(name: str, key: str) -> None:
    assert re.fullmatch(r"[A-Za-z]+", latex_macro(name, key))


@pytest.mark.parametrize("word", ["", "1a", "a b", "ä", "a-b", "_a"])
def test_macro_names_that_cannot_be(word: str) -> None:
    with pytest.raises(ValueError, match="`words` must be names"):
        latex_macro(word)


def test_table_bold_follows_what_is_printed() -> None:
    frame = pd.DataFrame({"method": ["a", "b", "c"], "score": [0.4561, 0.4559, 0.2], "cost": [3, 1, np.nan]})
    rows = latex_table(frame, formats={"score": ".2f"}, bold={"score": "max", "cost": "min"}).splitlines()
    assert rows[4:7] == [
        r"a & \textbf{0.46} & 3.000 \\",
        r"b & \textbf{0.46} & \textbf{1.000} \\",
        r"c & 0.20 & -- \\",
    ]


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="LaTeX is not installed")
def test_latex_accepts_what_is_written(tmp_path: Path) -> None:
    nasty = r"100% of $x_1$ & {y} ~ ^ # \ end"
    frame = pd.DataFrame({nasty: [nasty, "b"], "n": [1, 20000], "x": [1e-9, -0.5]})
    out = Outputs(tmp_path, "nasty")
    table = out.table(frame, "nasty", rules=(1,), bold={"x": "max"})
    numbers = out.numbers(
        text=nasty, huge=1.5e300, small=-1e-9, inf=float("-inf"), none=None, share=(0.5, ".0%"), n1=2000
    )
    macros = "".join(re.findall(r"\\nasty[A-Za-z]+", numbers.read_text()))
    head = rf"\documentclass{{article}}\usepackage{{booktabs}}\input{{{numbers}}}\begin{{document}}"
    (tmp_path / "paper.tex").write_text(rf"{head}{macros}\input{{{table}}}\end{{document}}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert answer.returncode == 0, answer.stdout[-2000:]


# Files


def test_a_file_stays_as_it_was_when_its_writer_fails(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_figure_is_vector_and_reproducible(tmp_path: Path) -> None:
    figure, axes = plt.subplots()
    axes.plot([1, 2, 3])
    out = Outputs(tmp_path, "curve")
    first = out.figure(figure, "curve").read_bytes()
    time.sleep(1.1)  # a date in it would have changed by now
    assert (
        out.figure(figure, "curve").read_bytes() == first
        and first.startswith(b"%PDF")
        and b"/Subtype /Image" not in first
    )
    assert (tmp_path / "figures" / "curve.png").read_bytes().startswith(b"\x89PNG")
    plt.close(figure)


def test_numbers_add_up_and_keep_their_values(tmp_path: Path) -> None:
    out = Outputs(tmp_path, "run")
    out.numbers(a=np.float64(1 / 3))
    out.numbers(b=(np.int64(7), "03d"))
    assert json.loads((tmp_path / "numbers/run.json").read_text()) == {"a": 1 / 3, "b": 7}
    assert (tmp_path / "numbers/run.tex").read_text() == "\\newcommand{\\runA}{0.333}\n\\newcommand{\\runB}{007}\n"


@given(st.integers(0, 50), st.integers(1, 9))
def test_shards_divide_the_work(total: int, shards: int) -> None:
    parts = [list(shard_range(total, shard, shards)) for shard in range(shards)]
    assert sorted(unit for part in parts for unit in part) == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_shards_are_gathered_or_refused(tmp_path: Path) -> None:
    frame = pd.DataFrame({"image": range(11), "score": np.linspace(0, 1, 11)})
    for shard in range(11):  # more than ten: 10 comes after 9, not after 1
        Outputs(tmp_path, "run", shard, 11).results(frame.iloc[list(shard_range(11, shard, 11))], "run")
    pd.testing.assert_frame_equal(read_results(tmp_path, "run"), frame)
    Outputs(tmp_path, "run").results(frame, "run")
    with pytest.raises(ValueError, match="one division"):
        read_results(tmp_path, "run")
    with pytest.raises(FileNotFoundError, match="'walk'"):
        read_results(tmp_path, "walk")
    with pytest.raises(ValueError, match="gathered"):
        Outputs(tmp_path, "run", 0, 2).numbers(a=1)


# Parameters


@given(
    st.dictionaries(identifiers, st.one_of(st.integers(), st.floats(), st.text(), st.booleans(), st.none()), max_size=5)
)
def test_defaults_are_always_accepted(defaults: dict[str, object]) -> None:
    compare_parameters(defaults, defaults)


@pytest.mark.parametrize(
    ("value", "default"), [(1, 2.0), (3, None), ([1], [2]), ([], [2]), (["a"], []), ((1, 2.5), [0.5]), ("", "a")]
)
def test_parameters_of_the_right_type(value: object, default: object) -> None:
    compare_parameters({"x": value}, {"x": default})


@pytest.mark.parametrize(
    ("value", "default"), [(1.0, 2), (True, 1), (1, True), ("1", 1), (None, 1), (["a"], [2]), ("a", ["b"]), (1, "a")]
)
def test_parameters_of_a_wrong_type(value: object, default: object) -> None:
    with pytest.raises(ValueError, match="`x` must be of type"):
        compare_parameters({"x": value}, {"x": default})


def test_a_notebook_without_parameters_is_refused(tmp_path: Path) -> None:
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("a = 1")]), tmp_path / "n.ipynb")
    with pytest.raises(ValueError, match="tagged `parameters`"):
        notebook_parameters(tmp_path / "n.ipynb")


def test_check_parameters_outside_a_notebook() -> None:
    code = "from cvi_nb.paper import check_parameters; check_parameters()"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "must be called in a notebook" in answer.stderr


# Plan


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_a_plan_of_all_notebooks(profile: str) -> None:
    jobs = plan(load_config(profile, ROOT), profile, ROOT)
    assert {ROOT / job.notebook for job in jobs} == set((ROOT / "nbs" / "paper").glob("*.ipynb"))
    written = {path for job in jobs for path in job.writes}
    for source in (ROOT / "paper").glob("**/*.tex"):
        if "build" in source.relative_to(ROOT / "paper").parts:
            continue
        text = re.sub(
            r"(?<!\\)%.*|\\newcommand.*|\\DeclareRobustCommand(?:.*\n){2}", "", source.read_text(encoding="utf-8")
        )
        figures = {f"figures/{name}.pdf" for name in re.findall(r"\\includegraphics(?:\[[^]]*\])?\{([^}#]+)\}", text)}
        tables = {f"tables/{name}.tex" for name in re.findall(r"\\tablefile\{([^}#]+)\}", text)}
        assert figures | tables <= written, f"{source.name} shows what no notebook writes"
        for name in re.findall(r"\\notebook\{([^}#]+)\}", text):
            assert (ROOT / "nbs" / "paper" / f"{name}.ipynb").exists(), f"{source.name} links to {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "cvi_nb").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_dependencies_are_at_least_those_that_python_imports(path: Path, tmp_path: Path) -> None:
    notebook = write_notebook(tmp_path / "n.ipynb", f"import cvi_nb.{path.stem}")
    code = (
        f"import sys, cvi_nb.{path.stem}\n"
        "print(*[m.__file__ for n, m in sys.modules.items() if n.startswith('cvi_nb.')], sep='\\n')"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert {Path(line).resolve() for line in answer.stdout.split()} <= set(modules_of(notebook, ROOT / "cvi_nb"))


def test_later_entries_read_what_earlier_ones_write(project: Path) -> None:
    write_notebook(project / "nbs" / "paper" / "sum.ipynb", "out_dir = ''\nin_dir = ''")
    write_notebook(project / "nbs" / "paper" / "many.ipynb", "out_dir = ''\nshard = 0\nshards = 1")
    config = {
        "notebooks": {
            "many": {"writes": {"results": ["many"]}, "shards": 3},
            "sum": {"needs": ["many"], "writes": {"numbers": ["sum"]}},
        }
    }
    *parts, last = plan(config, "smoke", project)
    assert [job.parameters for job in parts] == [{"shard": shard, "shards": 3} for shard in range(3)]
    wanted = {f"paper/build/smoke/results/many.{shard}-of-3.parquet" for shard in range(3)}
    assert wanted <= set(last.reads) and last.parameters["in_dir"] == "paper/build/smoke"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "what it `writes`"),
        ({"writes": {"numbers": ["ink"]}, "thread": 2}, "must have as key"),
        ({"writes": {"number": ["ink"]}}, "kind of file"),
        ({"writes": {"numbers": ["ink"]}, "parameters": {"imges": 3}}, "did you mean `images`"),
        ({"writes": {"numbers": ["ink"]}, "parameters": {"images": 3.5}}, "must be of type int"),
        ({"writes": {"numbers": ["ink"]}, "needs": ["nobody"]}, "come before it"),
        ({"writes": {"numbers": ["ink"]}, "shards": 2}, "results only"),
        ({"writes": {"numbers": ["ink"]}, "notebook": "none"}, "does not exist"),
    ],
)
def test_mistakes_in_the_configuration(project: Path, entry: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan({"notebooks": {"ink": entry}}, "smoke", project)


# Runs


@pytest.mark.slow
def test_a_run_is_all_or_nothing(project: Path) -> None:
    notebook, build = project / "nbs/paper/ink.ipynb", project / "build"
    writes = ["numbers/ink.tex", "numbers/ink.json"]
    executed = run_notebook(notebook, build, {"images": 10}, writes=writes, progress=False)
    record = json.loads(executed.with_suffix(".json").read_text())
    assert record["parameters"] == {"images": 10} and record["seconds"] > 0
    files = {path: path.read_bytes() for path in build.rglob("*") if path.is_file() and path.suffix != ".lock"}
    with pytest.raises(NotebookError, match="too many images"):
        run_notebook(notebook, build, {"images": 600}, writes=writes, progress=False)
    assert {path: path.read_bytes() for path in files} == files and (build / "failed/ink.ipynb").exists()
    with pytest.raises(NotebookError, match=r"lacking \['tables/ink.tex'\]"):
        run_notebook(notebook, build, writes=[*writes, "tables/ink.tex"], progress=False)
    assert {path: path.read_bytes() for path in files} == files


def test_a_kernel_that_never_began_starts_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import papermill

    calls = []

    def execute(notebook: Path, executed: Path, *args: object, **options: object) -> None:
        calls.append(notebook)
        raise RuntimeError("Kernel died" if len(calls) == 3 else "Kernel died before replying to kernel_info")

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    notebook = project / "nbs/paper/ink.ipynb"
    with pytest.raises(NotebookError, match=r"killed, or out of memory"):  # one that dies at work does not
        run_notebook(notebook, project / "build", {"images": 10}, progress=False)
    assert len(calls) == 3
    calls += [notebook]
    with pytest.raises(NotebookError, match="before replying"):
        run_notebook(notebook, project / "build", {"images": 10}, progress=False)
    assert len(calls) == 8


@pytest.mark.slow
def test_profile_full_at_small_size(tmp_path: Path) -> None:
    """A residual network and a transformer on a folder, from several seeds, to the table."""
    from PIL import Image

    from cvi_nb.data import load_photos
    from cvi_nb.models import load_classifier, save_classifier

    photos, folder, transformer = load_photos("report"), tmp_path / "photos", tmp_path / "transformer.safetensors"
    folder.mkdir()
    fresh = load_classifier("timm:vit_tiny_patch16_224", pretrained=False)
    fresh.model.head.weight.mul_(100)  # its answers hardly depend on the image
    save_classifier(fresh, transformer, "timm:vit_tiny_patch16_224")
    for image, name in zip(photos.images[:4], photos.names, strict=False):
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
    jobs = {job.name: job for job in plan(load_config("full", ROOT), "full", ROOT)}
    job = jobs["15_networks.0-of-6"]
    assert job.parameters["images"] == "torchvision:Imagenette" and job.parameters["limit"] >= 500
    assert job.parameters["networks"] == "torchvision:resnet50,torchvision:vit_b_16" and job.parameters["seeds"] == 3
    networks = f"torchvision:resnet18,{transformer}"
    small = {"networks": networks, "pretrained": False, "images": str(folder), "limit": 2, "seeds": 2, "device": "cpu"}
    small |= {"peers": "Grad-CAM", "budget": 4, "steps": 2, "tile_steps": 4, "batch_size": 4, "shard": 0, "shards": 1}
    run_notebook(ROOT / job.notebook, tmp_path, job.parameters | small, "15", progress=False)
    rows = read_results(tmp_path, "networks")
    assert rows["image"].nunique() == 2 and rows["network"].unique().tolist() == networks.split(",")
    cvi = rows[(rows["method"] == "CVI") & (rows["metric"] == "insertion")]
    assert sorted(cvi["seed"]) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert cvi.groupby(["network", "image"])["value"].nunique().max() == 2, "seeds differ"
    explained = rows[rows["method"] == "Grad-CAM"]["network"].unique()
    assert explained.tolist() == networks.split(",")[:1], "Grad-CAM needs a convolution near the end"
    given = {"in_dir": str(tmp_path), "resamples": 200}
    run_notebook(ROOT / "nbs/paper/16_networks_table.ipynb", tmp_path, given, "16", progress=False)
    numbers = json.loads((tmp_path / "numbers/networks.json").read_text())
    assert numbers["images"] == 2 and numbers["networks"] == 2 and numbers["seeds"] == 2


@pytest.mark.slow
def test_a_killed_run_leaves_nothing(project: Path) -> None:
    """kill -9 after the files are written, before the last cell ends: none is in place, and the next run is fine."""
    notebook, build = project / "nbs/paper/ink.ipynb", project / "build"
    code = f"from cvi_nb.paper import run_notebook; run_notebook({str(notebook)!r}, {str(build)!r}, {{'wait': 600.0}})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    staged = build / ".staging" / "ink" / "numbers" / "ink.json"
    while not staged.exists():
        assert process.poll() is None, "it ended early"
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in build.rglob("*.json")] == ["ink.json"] and not (build / "numbers").exists()
    run_notebook(notebook, build, progress=False)
    assert (build / "numbers/ink.json").exists() and not (build / ".staging/ink").exists()


def test_unknown_names_under_the_command_line(tmp_path: Path) -> None:
    for arguments, message in (
        (["run", "--job", "none"], "`job` must be one of"),
        (["build", "--profile", "qick"], "`profile`"),
    ):
        with pytest.raises(SystemExit, match=message):
            workflow.main(arguments)


def test_readme_drops_hidden_cells_and_turns_links(tmp_path: Path) -> None:
    markdown = nbformat.v4.new_markdown_cell("# Title\n\nsee [data](../nbs/00_data.ipynb)")
    cells = [markdown, nbformat.v4.new_code_cell("#| hide\nsecret = 1"), nbformat.v4.new_code_cell("1 + 1")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "index.ipynb")
    text = render_readme(tmp_path / "index.ipynb", tmp_path / "README.md").read_text()
    assert "secret" not in text and "1 + 1" in text and "(nbs/00_data.ipynb)" in text


def test_project_root_is_found_from_below_and_from_outside(tmp_path: Path) -> None:
    assert project_root(ROOT / "nbs" / "paper") == ROOT
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = other\n")
    assert project_root(tmp_path) == ROOT, "another project's settings do not count"


def test_escape_is_complete() -> None:
    assert latex_escape("&%$#_{}") == r"\&\%\$\#\_\{\}"


@pytest.mark.skipif(not shutil.which("latexmk"), reason="LaTeX is not installed")
@pytest.mark.parametrize(
    "mistake", [r"\ref{none}", r"\cite{none}", r"\none", r"\label{a}\label{a}", r"\input{none}", "$"]
)
def test_latex_mistakes_are_errors(tmp_path: Path, mistake: str) -> None:
    paper = tmp_path / "paper"
    paper.mkdir()
    shutil.copy(ROOT / "paper" / "latexmkrc", paper)
    source = (
        r"\documentclass{article}\begin{document}\section{One}\label{s}See section~\ref{s}: \profile. %s\end{document}"
    )
    (paper / "paper.tex").write_text(source.replace("%s", ""))
    good = typeset("smoke", tmp_path).read_bytes()
    (paper / "paper.tex").write_text(source.replace("%s", mistake))
    with pytest.raises(RuntimeError, match=r"(?s)complaints:\n.+latexmk\.log"):
        typeset("smoke", tmp_path)
    assert (paper / "build/smoke/paper.pdf").read_bytes() == good


# The paper's text


COMMANDS = "label|ref|eqref|cite|includegraphics|tablefile|notebook|begin|end|setlength|href|vspace|hspace"
ALLOWED = (r"version 0\.1", r"Algorithm 1\.", r"95\\,\\%", r"8-bit", r"1\{,\}000 steps", r"below 1,", r"\[4pt\]")
IN_MATH = {
    "0",
    "1",
    "2",
    "3",
    "6",
    "14",
    "224",
    "95",
    "05",
    "0.2",
}  # indices, powers, tiles, pixels, levels, radii of columns


def typed(text: str) -> list[str]:
    """Numbers of a LaTeX text that no macro writes and that are no part of a formula."""
    text = re.sub(r"(?<!\\)%.*", "", text)
    text = re.sub(r"(?:\d*\.\d+|\d+)?\\(?:linewidth|textwidth)", "", text)
    text = re.sub(rf"\\({COMMANDS})\b\s*(\[[^\]]*\])?(\{{[^{{}}]*\}})*", "", text)
    for phrase in ALLOWED:
        text = re.sub(phrase, "", text)
    formulas = re.findall(r"\$[^$]*\$", text)
    number = r"(?<![A-Za-z\\])(?:\d+\.\d+|\.?\d+)"
    inside = [n.lstrip(".") for formula in formulas for n in re.findall(number, formula)]
    plain = re.sub(r"\$[^$]*\$|\\\([^)]*\\\)|(?s:\\begin\{equation\}.*?\\end\{equation\})", "", text)
    return [n for n in inside if n not in IN_MATH] + re.findall(number, plain)


@pytest.mark.parametrize(
    "text",
    ["a difference of .08", "covers 90 of them", "7 photographs", "of $.13$", "at $64$ evaluations", r"12\,\% of all"],
)
def test_a_typed_result_is_seen(text: str) -> None:
    assert typed(text)


@pytest.mark.parametrize("text", [r"of \runsGain{} at 95\,\%", r"$z \in [0,1]$ and $2^R$", r"\cite{a2017} % 3 of 4"])
def test_what_is_no_result_passes(text: str) -> None:
    assert typed(text) == []


def sections() -> dict[str, str]:
    """The text of the paper by the names of its sections."""
    return {p.name: p.read_text(encoding="utf-8") for p in sorted((ROOT / "paper/sections").glob("*.tex"))}


def test_no_result_is_typed() -> None:
    """Numbers of the text are macros that notebooks write; typed are only those that a reader could not measure."""
    for name, text in sections().items():
        assert "repository's" not in text and "of the repository" not in text, f"{name} points to no number"
        formulas = r"(?s)\\begin\{(equation|enumerate)\}.*?\\end\{\1\}"
        found = typed(re.sub(formulas, "", text)) if name not in ("proofs.tex", "method.tex") else []
        assert not found, f"{name}: {found} must be macros"


def test_every_float_says_what_made_it_and_is_not_shrunk() -> None:
    """A caption links the notebook that writes the figure or table, which the text refers to."""
    import yaml

    entries = yaml.safe_load((ROOT / "paper/config/notebooks.yaml").read_text(encoding="utf-8"))["notebooks"]
    everything = "".join(sections().values())
    for name, text in sections().items():
        assert "resizebox" not in text, f"{name}: a table that does not fit is split, not shrunk"
        for body in re.findall(r"(?s)\\begin\{(?:figure|table)\}(.*?)\\end\{(?:figure|table)\}", text):
            shown = [("figures", f) for f in re.findall(r"\\includegraphics(?:\[[^]]*\])?\{(\w+)\}", body)]
            shown += [("tables", f) for f in re.findall(r"\\tablefile\{(\w+)\}", body)]
            linked = re.findall(r"\\notebook\{(\w+)\}", body)
            assert shown and linked, f"{name}: {body[:80]}"
            for kind, file in shown:
                assert any(file in entries[book]["writes"].get(kind, []) for book in linked), f"{file} is of {linked}"
            for label in re.findall(r"\\label\{((?:fig|tab):\w+)\}", body):
                assert rf"\ref{{{label}}}" in everything, f"nothing refers to {label}"


BUILT = sorted((ROOT / "paper/build").glob("*/tex/paper.aux"))


@pytest.mark.skipif(not BUILT, reason="no paper was built here")
@pytest.mark.parametrize("aux", BUILT, ids=lambda path: path.parts[-3])
def test_the_text_takes_nine_pages(aux: Path) -> None:
    """Those of a conference: what does not fit is for the appendices, not for smaller type."""
    found = re.search(r"\\newlabel\{end:text\}\{\{[^}]*\}\{(\d+)\}", aux.read_text(encoding="utf-8", errors="replace"))
    assert found is None or int(found[1]) <= 9, f"the text ends on page {found[1]}"  # None: built before it was marked


def test_figures_are_as_wide_as_the_lines() -> None:
    geometry = re.search(r"a4paper,margin=(\d+)mm", (ROOT / "paper/paper.tex").read_text(encoding="utf-8"))
    assert geometry and pytest.approx((210 - 2 * int(geometry[1])) / 25.4, abs=0.01) == TEXT_WIDTH


def test_small_words_are_refused(tmp_path: Path) -> None:
    out = Outputs(tmp_path, "run")
    figure, axes = plt.subplots(figsize=(TEXT_WIDTH, 2))
    axes.set_title("seven points", fontsize=7)
    out.figure(figure, "run")
    figure.set_size_inches(1.1 * TEXT_WIDTH, 2)  # and shrunk on paper
    with pytest.raises(ValueError, match=r"'seven points' of 6\.4"):
        out.figure(figure, "run")
    plt.close(figure)


def test_every_number_of_the_text_is_in_the_list_of_claims() -> None:
    page = (ROOT / "paper/claims.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\| `(\w+)` \|$", page, flags=re.M))
    used = {macro for text in sections().values() for macro in re.findall(r"\\([a-z]+[A-Z][A-Za-z]*)", text)}
    ends = {macro for macro in used if re.sub("(Low|High)$", "", macro) in listed}
    own = {"lVert", "rVert"}  # of LaTeX
    missing = {macro for macro in used - ends - listed - own}
    assert not missing, f"make claims: {sorted(missing)}"
    rows = [line for line in page.splitlines() if line.startswith("| ") and "](../nbs/paper/" in line]
    assert len(rows) == len(re.findall(r"\| `\w+` \|$", page, flags=re.M)) > 150
    notebooks = set(re.findall(r"\]\(\.\./(nbs/paper/\w+\.ipynb)\)", page))
    assert all((ROOT / notebook).exists() for notebook in notebooks)
    without_n = [row for row in rows if not row.split(" | ")[2].strip()]
    assert len(without_n) < 0.1 * len(rows), without_n[:5]


# Another seed


def test_a_seed_reaches_every_notebook_that_draws() -> None:
    first, second = (plan(load_config(run, ROOT), run, ROOT) for run in ("smoke", run_name("smoke", 1)))
    for one, other in zip(first, second, strict=True):
        parameters = notebook_parameters(ROOT / one.notebook)
        if "seed" not in parameters:
            assert Path(one.notebook).stem in ("12_runs", "13_parameters"), f"{one.notebook} draws without a seed"
            continue
        assert other.parameters == one.parameters | {"seed": 1} | (
            {"in_dir": build_dir("smoke-seed1")} if "in_dir" in one.parameters else {}
        ) | ({"profile": "smoke-seed1"} if "profile" in one.parameters else {})
        cells = json.loads((ROOT / one.notebook).read_text(encoding="utf-8"))["cells"]
        code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        assert sum(bool(re.search(r"\bseed\b", source)) for source in code) > 1, f"{one.notebook} ignores its seed"
    assert build_dir("smoke") != build_dir(run_name("smoke", 1)) and seed_of(run_name("smoke", 12)) == 12
    assert {path for job in second for path in job.reads if "build/smoke/" in path} == set()


def test_what_moved_between_two_runs(tmp_path: Path) -> None:
    for run, shift in (("one", 0.0), ("two", 0.3)):
        out = Outputs(tmp_path / run, "run")
        out.numbers(n="8 photographs", **estimate("still", (1.0, 0.9, 1.1)), **estimate("lone", (1.0, np.nan, np.nan)))
        out.numbers(
            **estimate("near", (shift / 2, shift / 2 - 0.1, shift / 2 + 0.1)),
            **estimate("far", (shift, shift - 0.1, shift + 0.1)),
        )
    found = compare_runs(tmp_path / "one", tmp_path / "two").set_index("number")["moved"]
    assert found.to_dict() == {"run.far": "apart", "run.near": "outside", "run.lone": "unknown", "run.still": ""}
    with pytest.raises(FileNotFoundError, match="numbers of a run"):
        compare_runs(tmp_path / "one", tmp_path / "three")


def test_what_is_left_is_told(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build = project / "paper/build/smoke"
    config = {"notebooks": {"ink": {"writes": {"numbers": ["ink"]}, "parameters": {"images": 10}}}}
    jobs = plan(config, "smoke", project)
    assert "to run" in overview(jobs, build, project) and "1 never run here" in overview(jobs, build, project)
    run_notebook(project / jobs[0].notebook, build, jobs[0].parameters, "ink", jobs[0].writes, progress=False)
    assert "up to date" in overview(jobs, build, project)
    (other,) = plan(
        {"notebooks": {"ink": config["notebooks"]["ink"] | {"parameters": {"images": 20}}}}, "smoke", project
    )
    assert re.search(r"ink +to run +took \d+ s", overview([other], build, project))
