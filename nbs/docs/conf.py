"""How Sphinx reads the pages that `build.py` collects. Metadata come from settings.ini, as everywhere."""

import os
import re
from configparser import ConfigParser
from pathlib import Path

_config = ConfigParser(delimiters=["="])
_config.read(Path(os.environ["CVI_ROOT"]) / "settings.ini", encoding="utf-8")
_settings = _config["DEFAULT"]

project, author, release = _settings["title"], _settings["author"], _settings["version"]
project_copyright = _settings["copyright"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
root_doc = "index"

# Outputs are those that the notebooks were committed with.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
# A chapter may jump from its title to a third level; the type `evaluations` of a field is the name of several.
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "ref.python"]

html_theme = "pydata_sphinx_theme"
html_title = "CVI"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_sourcelink = False
html_sidebars = {page: [] for page in ("tutorial", "front", "gallery", "contributing", "changelog")}
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 7,
    "navbar_persistent": ["search-button"],
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "icon_links": [{"name": "Source", "url": _settings["git_url"], "icon": "fa-brands fa-github"}],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "tango",
}

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False


def _literal(line):
    """A line of a docstring, in which `names` in backticks are code and nothing else marks up."""
    parts = re.split(r"(``.+?``|`[^`]+`)", line)
    for j, part in enumerate(parts):
        outside = re.sub(r"([*|\\])", r"\\\1", re.sub(r"(?<=\w)_(?=\W|$)", r"\\_", part))
        parts[j] = f"``{part.strip('`')}``" if j % 2 else outside
    return "".join(parts)


def _plain(app, what, name, obj, options, lines):
    """Docstrings are plain text; `name : meaning` outside a section is an item of a list."""
    made, section, item = [], False, False
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        section = section or re.fullmatch(r"-{3,}", below.strip()) is not None
        entry = None if section else re.fullmatch(r"(\w[\w, *]*) : (.*)", line)
        if entry:
            made += [] if item else [""]
            made.append(f"- ``{entry[1]}``: {_literal(entry[2])}")
            item = True
        elif item and line.startswith(" "):
            made.append("  " + _literal(line.strip()))
        else:
            made += [""] if item and line else []
            made.append(_literal(line))
            item = False
    lines[:] = made


def _signed(app, what, name, obj, options, signature, returned):
    """A default that is a function by its name, and what has no short text by an ellipsis."""
    if signature:
        signature = re.sub(r"<function (\w+)[^>]*>", r"\1", signature)
        signature = re.sub(r"<[^<>]*>", "...", signature)
    return signature, returned


def setup(app):
    app.connect("autodoc-process-signature", _signed)
    app.connect("autodoc-process-docstring", _plain, priority=100)  # before napoleon
