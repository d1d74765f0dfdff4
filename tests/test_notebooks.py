"""Every module notebook runs from top to bottom; its assertions on real data are the first tests of its module.

The notebooks of nbs/paper and nbs/benchmarks (folders with a `.notest` file) take minutes and are left out;
`make paper PROFILE=smoke` runs those of the paper.
"""

import json
from pathlib import Path

import pytest
from nbdev.test import test_nb as run_nb  # under its own name pytest would take it for a test

NBS = Path(__file__).resolve().parents[1] / "nbs"
NOTEBOOKS = sorted(
    path
    for path in NBS.rglob("*.ipynb")
    if not any(part.startswith(".") for part in path.parts) and not (path.parent / ".notest").exists()
)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.relative_to(NBS).with_suffix("").as_posix())
def test_runs(notebook: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IN_TEST", "1")  # nbdev sets it; so it is unset again afterwards
    monkeypatch.setenv("MPLBACKEND", "agg")
    passed, _ = run_nb(notebook)
    assert passed, f"{notebook.name} stopped with an error, shown above"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.relative_to(NBS).with_suffix("").as_posix())
def test_is_committed_with_outputs(notebook: Path) -> None:
    """Readers see real outputs, without an error among them, in a file that a browser opens at once."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert not [output["evalue"] for output in outputs if output["output_type"] == "error"]
    assert outputs or notebook.stem == "index", "was never run"
    assert notebook.stat().st_size < 1_000_000, "pictures too many or too large"
