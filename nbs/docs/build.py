"""The pages: notebooks, guides and docstrings, collected in build/docs/source; Sphinx makes build/docs/html of them.

    python nbs/docs/build.py [--keep-going]

Nothing is executed: the notebooks have the outputs of their code. A warning or a link that leads nowhere is an error.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent))
import paper_text

ROOT = Path(__file__).resolve().parents[2]
SOURCE, HTML = ROOT / "build" / "docs" / "source", ROOT / "build" / "docs" / "html"
GUIDES = ROOT / "nbs" / "docs"
REPOSITORY = "https://github.com/cvi-nb/cvi_nb/blob/main"
# What each reference page documents; the order is that of the modules.
MODULES = """data models clustering inference attack defence faithfulness robustness plot report explore cli peers
statistics validation files lazy paper""".split()


MADE = ("gallery.md", "reference/index.md", "paper/text.md")  # pages that are collected, not written


def notebooks() -> list[Path]:
    """All chapters, and the notebooks of paper and benchmarks."""
    found = sorted((ROOT / "nbs").rglob("*.ipynb"))
    return [p for p in found if ".ipynb_checkpoints" not in p.parts and p != ROOT / "nbs" / "index.ipynb"]


def place(path: Path) -> Path:
    """Where a notebook goes in the pages."""
    inside = path.relative_to(ROOT / "nbs")
    if inside.parts[0] == "docs":
        return SOURCE / Path(*inside.parts[1:])
    return SOURCE / (inside if inside.parts[0] in ("paper", "benchmarks") else Path("chapters") / inside)


def relinked(text: str, here: Path) -> str:
    """Links of a page of the repository, as links between the pages; what is no page is linked in the repository."""

    def one(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        if re.match(r"[a-z]+:|#|/", target):
            return found[0]
        there = (here.parent / unquote(target)).resolve()
        if there.suffix == ".ipynb" and there.is_file() and there != ROOT / "nbs" / "index.ipynb":
            to = place(there)
        elif there in (ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
            to = SOURCE / f"{there.stem.lower()}.md"
        elif there.is_relative_to(GUIDES) and (there.is_file() or there.relative_to(GUIDES).as_posix() in MADE):
            to = SOURCE / there.relative_to(GUIDES)
        elif there.exists() and there.is_relative_to(ROOT):
            return f"]({REPOSITORY}/{there.relative_to(ROOT).as_posix()}{anchor})"
        else:
            raise SystemExit(f"{here.relative_to(ROOT)}: a link leads nowhere: {target}")
        own = SOURCE / f"{here.stem.lower()}.md" if here.parent == ROOT else place(here)
        return f"]({os.path.relpath(to, own.parent)}{anchor})"

    return re.sub(r"\]\(([^)\s#]+)(#[^)\s]*)?\)", one, text)


def titled(cells: list[dict]) -> str:
    """The first heading of a notebook."""
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    heading = re.search(r"^# (.+)$", text, re.M)
    return heading[1].strip() if heading else ""


def collect_notebook(path: Path) -> list[tuple[str, bytes, str]]:
    """Copy a notebook without what is for machines; returns its pictures: title, PNG or JPEG, code."""
    book = json.loads(path.read_text(encoding="utf-8"))
    cells, pictures = [], []
    title = titled(book["cells"])
    for cell in book["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cells.append(cell | {"source": relinked(text, path)})
            continue
        if re.match(r"\s*#\s*\|\s*(hide|default_exp)", text) or cell["cell_type"] == "raw":
            continue
        if text.startswith("%%writefile"):  # C, which the chapter explains
            shown = f"```c\n{text.partition(chr(10))[2].strip()}\n```"
            cells.append({"cell_type": "markdown", "id": cell["id"], "metadata": {}, "source": shown})
            continue
        cell["source"] = re.sub(r"\A\s*#\s*\|\s*export\w*\s*\n", "", text)
        cell["outputs"] = [out for out in cell["outputs"] if out.get("name") != "stderr"]
        for out in cell["outputs"]:
            for kind in ("image/png", "image/jpeg"):
                if kind in out.get("data", {}):
                    data = base64.b64decode("".join(out["data"][kind]))
                    pictures.append((title, data, cell["source"]))
        cells.append(cell)
    first = next((i for i, cell in enumerate(cells) if cell["cell_type"] == "markdown"), 0)
    book["cells"] = cells[first:]  # a page begins with its title
    to = place(path)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(book), encoding="utf-8")
    return pictures


def contents(title: str, intro: str, names: list[str], depth: int = 1) -> str:
    """A page that lists others."""
    listed = "\n".join(names)
    return f"# {title}\n\n{intro}\n\n```{{toctree}}\n:maxdepth: {depth}\n\n{listed}\n```\n"


def collect_chapters() -> None:
    """The chapters of each package under that package's front page."""
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        inside = sorted((ROOT / "nbs" / path.stem).glob("*.ipynb"))
        if inside:
            to = place(path)
            book = json.loads(to.read_text(encoding="utf-8"))
            tree = "```{toctree}\n:hidden:\n\n" + "\n".join(f"{path.stem}/{p.stem}" for p in inside) + "\n```"
            book["cells"].append({"cell_type": "markdown", "id": "contents", "metadata": {}, "source": tree})
            to.write_text(json.dumps(book), encoding="utf-8")
    names = [path.stem for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))]
    intro = (
        "Each module is a chapter, or a part of several: why, then the formula, then the code that is exported to the "
        "package, then a picture or an assertion on real data. The outputs are those of the code that you read."
    )
    (SOURCE / "chapters" / "index.md").write_text(contents("Chapters", intro, names, 2), encoding="utf-8")


def collect_gallery(pictures: list[tuple[str, bytes, str, str]]) -> None:
    """Pictures of all chapters, each with the code that made it."""
    (SOURCE / "_gallery").mkdir(exist_ok=True)
    page = [
        "# Gallery",
        "",
        "Pictures from the chapters, each with the code that drew it. What that code builds on is in its chapter.",
        "",
        '<div class="gallery">',
        "",
    ]
    for number, (title, data, code, link) in enumerate(pictures):
        name = f"{number:03d}.{'png' if data[:4] == bytes([137]) + b'PNG' else 'jpg'}"
        (SOURCE / "_gallery" / name).write_bytes(data)
        page += ['<div class="picture">', "", f"![{title}](_gallery/{name})", "", f"[{title}]({link})", ""]
        page += [
            "<details><summary>code</summary>",
            "",
            f"```python\n{code.strip()}\n```",
            "",
            "</details>",
            "</div>",
            "",
        ]
    (SOURCE / "gallery.md").write_text("\n".join([*page, "</div>", ""]), encoding="utf-8")


def collect_reference() -> None:
    """One page a module, from its docstrings."""
    folder = SOURCE / "reference"
    folder.mkdir()
    names = []
    for name in MODULES:
        if not ((ROOT / "cvi_nb" / f"{name}.py").exists() or (ROOT / "cvi_nb" / name / "__init__.py").exists()):
            continue
        names.append(name)
        body = f".. automodule:: cvi_nb.{name}\n   :members:\n   :imported-members:\n"
        (folder / f"{name}.md").write_text(f"# cvi_nb.{name}\n\n```{{eval-rst}}\n{body}```\n", encoding="utf-8")
    intro = "What each module offers, from the docstrings of its public names."
    (folder / "index.md").write_text(contents("Reference", intro, names), encoding="utf-8")


def collect() -> None:
    """Everything that Sphinx reads."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(
        GUIDES, SOURCE, ignore=shutil.ignore_patterns("*.ipynb", "build.py", "paper_text.py", "__pycache__", ".*")
    )
    for page in SOURCE.rglob("*.md"):
        there = GUIDES / page.relative_to(SOURCE)
        page.write_text(relinked(page.read_text(encoding="utf-8"), there), encoding="utf-8")
    gallery = []
    for path in notebooks():
        link = os.path.relpath(place(path), SOURCE)
        for title, data, code in collect_notebook(path):
            if 15_000 < len(data) and path.parts[-2] not in ("benchmarks",):
                gallery.append((title, data, code, link))
    collect_chapters()
    collect_gallery(gallery)
    collect_reference()
    for name in ("CONTRIBUTING", "CHANGELOG"):
        text = (ROOT / f"{name}.md").read_text(encoding="utf-8")
        (SOURCE / f"{name.lower()}.md").write_text(relinked(text, ROOT / f"{name}.md"), encoding="utf-8")
    for folder, title, intro in (
        (
            "paper",
            "The paper",
            "Its text, and one notebook a figure or table: its question, how it is answered, what to see, and what "
            "it does not show. "
            "`make paper` runs them and typesets the text around them.",
        ),
        (
            "benchmarks",
            "Benchmarks",
            "Side by side with other libraries, losses included. Each notebook wrote the numbers that the text reads.",
        ),
    ):
        names = [p.stem for p in sorted((ROOT / "nbs" / folder).glob("*.ipynb"))]
        if folder == "paper":
            names.insert(0, "text")
            page = paper_text.page(ROOT, SOURCE / folder / "figures")
            (SOURCE / folder / "text.md").write_text(page, encoding="utf-8")
        (SOURCE / folder / "index.md").write_text(contents(title, intro, names), encoding="utf-8")


class _Links(HTMLParser):
    """Where a page points, and what can be pointed at in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect href, src and id."""
        for name, value in attrs:
            if value and (name == "src" or (name == "href" and tag == "a")):
                self.targets.append(value)
            if value and name in ("id", "name"):
                self.anchors.add(value)


def broken_links(html: Path = HTML) -> list[str]:
    """Links within the pages that lead to no page, no file, or no anchor of a page."""
    paths = [path for path in html.rglob("*.html") if "_static" not in path.relative_to(html).parts]
    pages = {path: _Links(path.read_text(encoding="utf-8")) for path in paths}
    broken = []
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or target.startswith(("data:", "#")):
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not there.exists() or (anchor and there in pages and anchor not in pages[there].anchors):
                broken.append(f"{path.relative_to(html)}: {target}")
    return sorted(set(broken))


def main() -> int:
    try:
        from sphinx.cmd.build import build_main
    except ImportError:
        raise SystemExit('the pages need Sphinx: pip install "cvi_nb[docs]"') from None
    collect()
    os.environ["CVI_ROOT"] = str(ROOT)
    shutil.rmtree(HTML, ignore_errors=True)
    strict = ["--keep-going"] if "--keep-going" in sys.argv else []
    options = ["-b", "html", "-W", *strict, "-q", "-d", str(HTML.parent / "doctrees")]
    code = build_main([*options, str(SOURCE), str(HTML)])
    if code == 0 and (broken := broken_links()):
        print(*broken, sep="\n", file=sys.stderr)
        code = 1
    print(f"{len(list(HTML.rglob('*.html')))} pages: {HTML.relative_to(ROOT)}/index.html" if code == 0 else "not built")
    return code


if __name__ == "__main__":
    sys.exit(main())
