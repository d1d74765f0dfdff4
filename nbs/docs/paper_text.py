"""The paper's LaTeX text as a page: with numbers and figures where `make paper` has left them, else with links."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from cvi_nb.paper.parameters import settings_of

SECTIONS = re.compile(r"\\input\{(sections/\w+)\}")
HEADED = re.compile(r"\\section\*?\{([^}]+)\}\s*\\label\{([^}]+)\}")
STATED = re.compile(r"\\begin\{proposition\}(?:\[[^]]*\])?\s*\\label\{([^}]+)\}")
MATH = r"\newcommand{\E}{\mathbb{E}}\newcommand{\KL}{\operatorname{KL}}\newcommand{\Bern}{\operatorname{Bern}}"


def pandoc() -> str:
    """The converter: that of the package pypandoc_binary, else the system's; `SystemExit` where there is none."""
    try:
        import pypandoc

        return str(pypandoc.get_pandoc_path())
    except (ImportError, OSError):
        found = shutil.which("pandoc")
    if found is None:
        raise SystemExit('the pages need pandoc: pip install "cvi_nb[docs]"')
    return found


def built(paper: Path) -> Path | None:
    """The folder of the largest profile that was built here, None without one."""
    folders = (paper / "build" / profile for profile in ("full", "quick", "smoke"))
    return next((folder for folder in folders if (folder / "numbers.tex").exists()), None)


def braced(text: str, start: int) -> tuple[str, int]:
    """What the brace at `start` encloses, and where that ends."""
    depth = 0
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start + 1 : end], end + 1
    raise ValueError(f"a brace is not closed: {text[start : start + 60]}")


def macros(place: Path | None) -> dict[str, str]:
    """Every number by its name."""
    text = "" if place is None else (place / "numbers.tex").read_text(encoding="utf-8")
    starts = re.finditer(r"\\newcommand\{\\(\w+)\}(?=\{)", text)
    return {found[1]: braced(text, found.end())[0] for found in starts}


def floats(text: str, place: Path | None, pictures: Path) -> str:
    """Figures and tables as paragraphs with their captions; references as numbers, to sections by their titles."""
    counts, labels = {"figure": 0, "table": 0}, dict[str, str]()

    def one(found: re.Match[str]) -> str:
        kind, body = found[1], found[2]
        counts[kind] += 1
        labels.update({label: str(counts[kind]) for label in re.findall(r"\\label\{([^}]+)\}", body)})
        caption, _ = braced(body, body.index("{", body.index(r"\caption")))
        shown = ""
        for name in re.findall(r"\\includegraphics(?:\[[^]]*\])?\{(\w+)\}", body) if place else ():
            shutil.copy(place / "figures" / f"{name}.png", pictures / f"{name}.png")
            shown += f"\\includegraphics{{{pictures.name}/{name}.png}}\n\n"
        for name in re.findall(r"\\tablefile\{(\w+)\}", body) if place else ():
            shown += (place / "tables" / f"{name}.tex").read_text(encoding="utf-8") + "\n\n"
        return f"\n\n{shown}\\textbf{{{kind.title()} {counts[kind]}.}} {caption}\n\n"

    text = re.sub(r"\\begin\{(figure|table)\*?\}(.*?)\\end\{\1\*?\}", one, text, flags=re.S)
    labels.update({label: f"“{title}”" for title, label in HEADED.findall(text)})
    labels.update({label: str(k) for k, label in enumerate(STATED.findall(text), start=1)})
    equations = re.findall(r"\\label\{(eq:[^}]+)\}", text)
    labels.update({label: str(k) for k, label in enumerate(equations, start=1)})
    text = re.sub(r"\\label\{(eq:[^}]+)\}", lambda found: f"\\tag{{{labels[found[1]]}}}", text)
    text = re.sub(r"\\eqref\{([^}]+)\}", lambda found: f"({labels[found[1]]})", text)
    return re.sub(r"\\ref\{([^}]+)\}", lambda found: labels[found[1]], text)


def page(root: Path, pictures: Path) -> str:
    """The text as Markdown with mathematics; `pictures` is the folder beside the page that takes the figures."""
    paper = root / "paper"
    place, whole = built(paper), (paper / "paper.tex").read_text(encoding="utf-8")
    text = "\n\n".join((paper / f"{name}.tex").read_text(encoding="utf-8") for name in SECTIONS.findall(whole))
    pictures.mkdir(exist_ok=True)
    text = floats(text, place, pictures)
    numbers = macros(place)
    own = r"\\([a-z]+[A-Z]\w*|packageversion)(?:\{\})?"
    text = re.sub(own, lambda found: numbers.get(found[1], r"\texttt{" + found[1] + "}"), text)
    text = re.sub(r"\\notebook\{(\w+)\}", r"\\href{\1.ipynb}{[notebook]}", text)
    known = settings_of(root)
    text = text.replace(r"\giturl", known["git_url"]).replace(r"\gitbranch", known["branch"])
    text = re.sub(r"\\begin\{abstract\}|\\end\{abstract\}", "", text)
    text = re.sub(r"\\resizebox\{[^}]*\}\{[^}]*\}", "", text)
    command = [
        pandoc(),
        "--from",
        "latex",
        "--to",
        "commonmark+tex_math_dollars+pipe_tables-raw_html",
        "--wrap",
        "none",
        "--citeproc",
        "--shift-heading-level-by",
        "1",
    ]
    command += ["--bibliography", str(paper / "references.bib")]
    text = MATH + text + "\n\n\\section*{References}\n"  # which citations are appended to
    answer = subprocess.run(command, input=text, capture_output=True, text=True, encoding="utf-8", check=True)
    told = (
        f"Numbers, tables and figures are those of the profile *{place.name}*, as it was built beside these pages."
        if place
        else "These pages were made without a build of the paper: a number is shown by its name, pictures and tables "
        "are in the notebooks. `make paper && make docs` puts them in."
    )
    body = re.sub(r"\$\$(.+?)\$\$", r"\n\n$$\n\1\n$$\n\n", answer.stdout, flags=re.S)
    body = re.sub(r"^#{5} (.+)$", r"**\1**", body, flags=re.M)  # paragraphs with a heading of their own
    return f"# The text of the paper\n\n{told}\n\n{body}"
