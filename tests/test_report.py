"""The report card: what is written is what was measured, in files that any reader can open, whoever chose the names."""

import json
import re
import shutil
import subprocess
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cvi_nb.data import load_digits
from cvi_nb.models import Classifier
from cvi_nb.report import (
    Checks,
    Code,
    Picture,
    Prose,
    Report,
    Section,
    Table,
    blocks,
    compare,
    critical_region,
    images,
    make,
    make_report,
    numbers,
)
from cvi_nb.robustness import Check, Threat

HOSTILE = (
    "<script>alert(1)</script>",
    "a\"b'c",
    "x|y",
    "*bold*",
    "[l](javascript:1)",
    "`code`",
    "&lt;",
    "$x$",
    "#h",
    "~~s~~",
)


class Page(HTMLParser):
    """A page read strictly: each tag closed in order, no attribute twice, each identity once."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.alts: list[str | None] = []
        self.handlers: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs), (tag, attrs)
        self.tags.append(tag)
        self.ids += [str(given["id"])] if "id" in given else []
        self.loads += [str(given[key]) for key in ("src", "href", "srcset", "data", "action") if key in given]
        self.loads += re.findall(r"url\(([^)]*)\)", given.get("style") or "")
        self.handlers += [key for key in given if key.startswith("on")]
        self.alts += [given.get("alt")] if tag == "img" else []
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


class Linear(nn.Module):
    """Digits by their nearest class mean: fast, and right for most."""

    def __init__(self, sharpness: float = 1.0):
        super().__init__()
        digits = load_digits("development")[::4]
        means = torch.stack([digits.images[digits.labels == k].mean(0).flatten() for k in range(10)])
        self.weight = nn.Parameter(2 * sharpness * means)
        self.bias = nn.Parameter(-sharpness * means.square().sum(1))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


def tiny(images: Tensor) -> Threat:
    return Threat.quick(
        images, linf=(0.1, 0.2), l2=(1.0,), steps=10, pgd_steps=3, apgd_steps=3, queries=8, targets=2,
        targeted_steps=10, samples=20, check_images=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made() -> Report:
    """Two models on eight digits, all names hostile."""
    torch.set_num_threads(1)
    digits = load_digits("report")[::125]
    models = {name: Classifier(Linear(k), name=name) for k, name in ((1.0, HOSTILE[0]), (2.0, HOSTILE[1]))}
    names = [f"{HOSTILE[i % len(HOSTILE)]} {i}" for i in range(len(digits))]
    return make_report(
        models, digits.images, digits.labels, names=names, classes=HOSTILE, threat=tiny(digits.images), shown=1,
        budget=8, title=f"A title {HOSTILE[0]}", command="cvi report --model '<b>'",
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(made: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.save(tmp_path_factory.mktemp("report") / "card.html")


def test_page_parses_and_loads_nothing(saved: Path) -> None:
    text = saved.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert page.handlers == [] and "javascript:" not in "".join(page.loads)
    inside = {f"#{one}" for one in page.ids}
    assert page.loads and all(load.startswith("data:image/") or load in inside for load in page.loads)
    assert not re.search(r"(?i)(?:src|href|@import|url\()\s*=?\s*[\"'(]?\s*https?:", text)
    assert "default-src 'none'" in text
    assert len(page.ids) == len(set(page.ids))
    assert len(page.alts) > 8 and all(alt and alt.strip() for alt in page.alts)
    assert saved.stat().st_size < 1_000_000


def test_hostile_names_come_out_as_text(made: Report, saved: Path) -> None:
    shown = " ".join(Page(saved.read_text(encoding="utf-8")).text)
    assert all(name in shown for name in HOSTILE[:2])
    assert "A title <script>alert(1)</script>" in shown


def test_pictures_are_whole(saved: Path) -> None:
    """SVG parses as XML and refers to nothing outside itself; PNG and JPEG decode."""
    import base64
    import io
    import xml.etree.ElementTree as ET

    from PIL import Image

    kinds = set()
    for load in Page(saved.read_text(encoding="utf-8")).loads:
        if not load.startswith("data:"):
            continue
        head, _, data = load.partition(";base64,")
        content = base64.b64decode(data, validate=True)
        kinds.add(head)
        if head.endswith("svg+xml"):
            hrefs = [v for node in ET.fromstring(content).iter() for k, v in node.attrib.items() if k.endswith("href")]
            assert all(href.startswith("#") for href in hrefs)
        else:
            Image.open(io.BytesIO(content)).load()
    assert {"data:image/svg+xml", "data:image/png"} <= kinds


def test_numbers_on_the_page_are_those_measured(made: Report, saved: Path) -> None:
    text, frame = saved.read_text(encoding="utf-8"), made.to_frame()
    for name, result in made.results.items():
        own = frame[frame["model"] == name]
        assert len(own) == len(result.images)
        expected = numbers.percent(own["correct"].mean())
        assert expected in text and np.isclose(own["correct"].mean(), result.accuracy)
    right = next(iter(made.results.values())).examples.query("correct")["distance_l2"]
    assert numbers.number(float(right.median())) in text


def test_json_is_strict_and_complete(made: Report, saved: Path) -> None:
    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    data = json.loads(saved.with_suffix(".json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert list(data["models"]) == list(made.results)
    for name, result in made.results.items():
        told = data["models"][name]
        assert [row["label"] for row in told["examples"]] == result.examples["label"].tolist()
        got = [np.inf if row["distance_l2"] == "inf" else row["distance_l2"] for row in told["examples"]]
        assert np.allclose(got, result.examples["distance_l2"])
        assert {c["name"] for c in told["checks"]} == {c.name for c in result.checks}
    assert data["threat"] == next(iter(made.results.values())).threat.settings
    assert data["command"] == "cvi report --model '<b>'" and data["environment"]["torch"].startswith(
        torch.__version__.split("+")[0]
    )


def test_markdown_tables_have_their_columns(saved: Path) -> None:
    text = saved.with_suffix(".md").read_text(encoding="utf-8")
    bare = re.sub(r"```.*?```", "", text, flags=re.S)
    assert not re.search(r"(?<!\\)<\w", bare), "markup got through"
    width = 0
    for line in bare.splitlines():
        if line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line))
            assert width in (0, cells), line
            width = cells
        else:
            width = 0
    assert "data:image" not in text


def test_each_image_is_shown_once_with_what_happened(made: Report) -> None:
    for name, result in made.results.items():
        own = next(section for section in made.sections if section.title == name)
        cards = [block for part in own.parts for block in part.blocks if type(block).__name__ == "Card"]
        least, most = images.extremes(result, 1)
        assert len(cards) == len(least + most) == len(set(least + most))
        assert f"{numbers.number(float(result.examples['distance_l2'][least[0]]))}" in " ".join(cards[0].lines)
        assert len(cards[0].pictures) >= 4


def test_same_seed_same_content() -> None:
    """All but effort, machine and day is the same again; and the same to printed digits in batches of three."""
    digits = load_digits("report")[::125]
    again = [
        make_report(
            Classifier(Linear(), name="m"), digits, threat=tiny(digits.images), shown=1, budget=8, batch_size=size
        )
        for size in (64, 64, 3)
    ]
    pages = [[section.html(anchor="s") for section in one.sections[:-4]] for one in again]
    assert pages[0] == pages[1]
    assert pages[0][0].partition("<figure")[0] == pages[2][0].partition("<figure")[0]


def test_saving_is_all_or_nothing(made: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = made.save(tmp_path / "card.html")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"card.html", "card.md", "card.json"}
    monkeypatch.setattr(Report, "markdown", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.save(page)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_missing_labels_are_said(made: Report) -> None:
    digits = load_digits("report")[::125]
    model = Classifier(Linear(), name="m")
    results = {"m": next(iter(made.results.values()))}
    labelled = make_report(model, digits.images, digits.labels, results=results, shown=1, budget=8)
    assert "have no label" not in labelled.html()
    material = make._material({"m": model}, digits.images, None, None, None, 64)
    assert (
        torch.equal(material[1], model.logits(digits.images).argmax(1))
        and "8 of 8 images have no label" in material[4][1]
    )
    partly = torch.where(torch.arange(8) < 2, -1, digits.labels)
    assert "2 of 8 images have no label" in make._material({"m": model}, digits.images, partly, None, None, 64)[4][1]


def test_bad_input_is_named(made: Report, tmp_path: Path) -> None:
    digits = load_digits("report")[::125]
    model = Classifier(Linear(), name="m")
    one = next(iter(made.results.values()))
    with pytest.raises(ValueError, match="`shown` must be an integer"):
        make_report(model, digits, shown=0)
    with pytest.raises(ValueError, match="`names` must have one entry per image"):
        make_report(model, digits.images, digits.labels, names=["a"])
    with pytest.raises(ValueError, match="`results` must be of the models"):
        make_report(model, digits, results={"other": one})
    with pytest.raises(ValueError, match="`results` must be of the same images"):
        make_report(model, digits.images.flip(0), digits.labels, results={"m": one})
    with pytest.raises(ValueError, match="`models` must be"):
        make_report({}, digits)
    with pytest.raises(ValueError, match=r"`path` must end in \.html"):
        made.save(tmp_path / "card.pdf")
    with pytest.raises(ValueError, match="`norm` must be"):
        made.plot("l1")
    with pytest.raises((ValueError, TypeError), match="images"):
        make_report(model, digits.images[:0])


def test_mistakes_are_told_before_the_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def attacked(*arguments: object, **options: object) -> None:
        raise AssertionError("the attacks have run")

    monkeypatch.setattr(make, "evaluate_robustness", attacked)
    digits, model = load_digits("report")[::125], Classifier(Linear(), name="m")
    wrongs = ({"budget": 0}, {"budget": "64"}, {"shown": True}, {"seed": -1}, {"batch_size": 0}, {"progress": 3})
    for wrong in (*wrongs, {"batchsize": 3}):
        with pytest.raises((TypeError, ValueError), match=f"`{next(iter(wrong))}` must be"):
            make_report(model, digits, **wrong)


@pytest.mark.parametrize(
    ("where", "what", "told"),
    [(make, "see", "could not be explained"), (make, "curve_row", "The curves could not be made"),
     (make, "_model_data", "could not be made"), (compare, "transfer_matrix", "No transfer matrix"),
     (compare, "paired_bootstrap", "The differences could not be made")],
    ids=lambda value: value if isinstance(value, str) and " " not in value else None,
)  # fmt: skip
def test_what_fails_after_the_attacks_is_a_line_on_the_page(
    made: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: Any, what: str, told: str
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("out of <luck>")

    monkeypatch.setattr(where, what, fail)
    digits = load_digits("report")[::125]
    models = {name: Classifier(Linear(k), name=name) for k, name in ((1.0, HOSTILE[0]), (2.0, HOSTILE[1]))}
    report = make_report(models, digits.images, digits.labels, results=made.results, shown=1, budget=8)
    page = report.save(tmp_path / "card.html")
    text = " ".join(Page(page.read_text(encoding="utf-8")).text) + page.with_suffix(".json").read_text("utf-8")
    assert told in text and "out of <luck>" in text.replace("\\u003c", "<")
    assert numbers.percent(next(iter(made.results.values())).accuracy) in text


def test_four_channels_and_a_single_row_have_a_page(tmp_path: Path) -> None:
    """JPEG has no four channels, and a row of pixels no perspective: the page says so, and has all else."""
    for shape, name in (((4, 8, 8), "JPEG"), ((1, 1, 40), "print")):
        images = torch.rand(6, *shape, generator=torch.Generator().manual_seed(1))
        model = Classifier(lambda x: torch.stack([x.flatten(1)[:, k::3].sum(1) for k in range(3)], 1), name="m")
        few = Threat.quick(images, linf=(0.1,), l2=(), steps=10, queries=5, targets=0, noise_budget=0, samples=0)
        report = make_report(model, images, threat=few, shown=1, budget=8)
        assert f"Left out: {name}" in report.markdown() and "worst case" in report.markdown()
        assert name in report.data["models"]["m"]["skipped"]
        assert report.save(tmp_path / "card.html").stat().st_size > 10_000


def test_names_that_no_encoding_knows(made: Report, tmp_path: Path) -> None:
    """A file name that is not Unicode comes as lone surrogates, which must not lose a report as it is written."""
    report = Report("\udcff", "x", (Section("\udc80", (Prose("\udcfe"),)),), {}, {"name": "\udcff"})
    page = report.save(tmp_path / "card.html")
    assert json.loads(page.with_suffix(".json").read_text("utf-8")) == {"name": "\udcff"}
    assert "udcff" in page.read_text("utf-8") and made.results


def test_every_block_has_a_macro_in_both_templates() -> None:
    kinds = [kind.__name__.lower() for kind in blocks.Block.__subclasses__() if kind.__module__.startswith("cvi_nb")]
    for form in ("html", "md"):
        macros = set(vars(blocks._templates(form).module))
        assert set(kinds) <= macros and len(kinds) == 10


def test_plot_has_a_curve_per_model(made: Report) -> None:
    for norm in ("linf", "l2"):
        figure = made.plot(norm)
        assert len(figure.axes[0].lines) == len(made.results)
        ends = [line.get_ydata()[0] for line in figure.axes[0].lines]
        assert np.allclose(ends, [100 * result.accuracy for result in made.results.values()])
        plt.close(figure)


def test_warnings_come_first_and_withhold_bold(made: Report) -> None:
    checks = (Check("a", "PASS", "0", "0", "Fine.", 0.0), Check("b", "WARN", "9", "0", "Not fine.", 9.0))
    text = Checks(checks).html()
    assert text.index("WARN") < text.index("PASS") and "▲" in text and "✓" in text
    table = compare.comparison(made.results)
    doubted = {j for j, result in enumerate(made.results.values(), 1) if result.warnings}
    assert all(i == 0 or j not in doubted for i, j in table.strong)


@given(st.text(max_size=40))
def test_any_text_survives(text: str) -> None:
    """Read back by a parser, HTML is the text that went in, and no tag of it."""
    block = Table(("a", "b"), ((text, text),), caption=text)
    page = Page(Section(text, (Prose(text, "note"), Code(text), block)).html(anchor="s"))
    assert page.open == [] and set(page.tags) <= {
        "section", "h2", "p", "pre", "code", "div", "table", "thead", "tbody", "tr", "th", "td", "small",
    }  # fmt: skip
    alt = Page(Picture("data:image/png;base64,", text).html())
    assert alt.alts == [text.replace("\r\n", "\n")] or alt.alts == [text]
    cells = [line for line in block.markdown().splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in cells} == {3}


@given(st.integers(1, 6), st.integers(0, 2**31 - 1), st.floats(0.05, 0.9))
def test_critical_region_is_of_whole_clusters(clusters: int, seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(clusters, (1, 6, 7), generator=generator)
    heat = torch.randn(1, 6, 7, generator=generator)
    region = critical_region(heat, labels, share)[0]
    inside, outside = set(labels[0][region].tolist()), set(labels[0][~region].tolist())
    assert inside and not inside & outside
    assert len(inside) == 1 or float(region.float().mean()) <= share + 1e-6
    density = {k: float(heat[labels == k].mean()) for k in inside | outside}
    assert max(density, key=lambda k: density[k]) in inside


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("width", [400, 1200])
def test_in_a_real_browser(saved: Path, tmp_path: Path, width: int) -> None:
    """Laid out by Chromium, the page is no wider than its window, and every picture is decoded."""
    harness = tmp_path / "harness.html"
    harness.write_text(
        f'<iframe id="f" src="{saved.as_uri()}" style="width:{width}px;height:900px;border:0"></iframe>'
        '<pre id="out"></pre>'
        "<script>onload=()=>{const d=document.getElementById('f').contentDocument;const i=[...d.images];"
        "document.getElementById('out').textContent='RESULT '+JSON.stringify({wide:d.documentElement.scrollWidth,"
        "pictures:i.length,shown:i.filter(x=>x.complete&&x.naturalWidth>0).length,"
        "height:d.documentElement.scrollHeight})+' END'}</script>",
        encoding="utf-8",
    )
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [
        "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=4000",
    ]
    command += ["--window-size=1400,1000", "--dump-dom", harness.as_uri()]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    match = re.search(r"RESULT (\{.*?\}) END", answer.stdout)
    assert match, answer.stderr[-500:]
    laid_out = json.loads(match[1])
    assert laid_out["wide"] <= width and laid_out["height"] > 2000
    assert laid_out["shown"] == laid_out["pictures"] > 8


def test_a_passed_check_says_what_was_asked_and_a_warning_what_to_do() -> None:
    from cvi_nb.report import Checks
    from cvi_nb.robustness import Check

    fine = Check("a", "PASS", "0", "0", "Use another attack.", asked="Whether it holds.")
    bad = Check("b", "WARN", "9", "0", "Use another attack.", asked="Whether it holds.")
    for text in (Checks((fine,)).html(), Checks((fine,)).markdown()):
        assert "Whether it holds." in text and "Use another" not in text
    for text in (Checks((bad,)).html(), Checks((bad,)).markdown()):
        assert "Use another attack." in text


def test_a_network_with_folded_norms_keeps_its_name() -> None:
    from torch import nn

    from cvi_nb.models import Classifier, fold_batch_norm
    from cvi_nb.report.method import model_facts

    class Mine(nn.Sequential):
        pass

    network = Mine(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 6 * 6, 2)).eval()
    folded = fold_batch_norm(network, 8)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    assert model_facts(Classifier(folded, size=8))["network"] == "Mine"


def test_a_network_that_others_have_measured_says_so() -> None:
    from cvi_nb.report.method import model_facts, published

    known = json.loads(Path(make.__file__).with_name("published.json").read_text(encoding="utf-8"))
    assert len(known["rows"]) > 100 and known["licence"].startswith("MIT") and len(known["commit"]) == 40
    for model, data, norm, eps, clean, robust in known["rows"]:
        assert norm in ("Linf", "L2") and 0 <= robust <= clean <= 100, model
        assert float(Fraction(eps)) <= 0.5 and f"{robust:.1f} %" in published(model) and data in published(model)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    assert "published" not in model_facts(Classifier(network, size=8))
    facts = model_facts(Classifier(network, size=8, name="Engstrom2019Robustness"))
    assert "69.2 % within L2 0.5 on cifar10" in facts["published"] and "within L∞ 4/255" in facts["published"]
