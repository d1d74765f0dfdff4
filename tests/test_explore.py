"""The explorer in a real JupyterLab in a headless browser: Playwright with the Chromium of the system."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CODE = """\
import time
from cvi_nb.data import load_digits
from cvi_nb.explore import explore
from cvi_nb.models import Classifier, load_classifier
network = load_classifier("mnist_cnn")
slow = Classifier(lambda x: (time.sleep(0.1), network(x))[1], classes=network.classes, size=28)
explore(slow, load_digits("report")[[0, 350, 620]])"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a notebook in a JupyterLab of its own."""
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    pytest.importorskip("playwright")
    pytest.importorskip("jupyterlab")
    pytest.importorskip("ipywidgets")
    place = tmp_path_factory.mktemp("lab")
    cell = {"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": [], "source": CODE}
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    book = {"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    (place / "explore.ipynb").write_text(json.dumps(book))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--IdentityProvider.token=t",
        f"--notebook-dir={place}",
    ]
    home = {"JUPYTER_CONFIG_DIR": str(place / ".config"), "JUPYTERLAB_SETTINGS_DIR": str(place / ".settings")}
    home |= {"JUPYTERLAB_WORKSPACES_DIR": str(place / ".workspaces"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "jupyterlab", *options]
    server = subprocess.Popen(command, env=os.environ | home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab/tree/explore.ipynb?token=t&reset"
    finally:
        server.terminate()
        server.wait(30)


def upload(page: Any, place: Path) -> None:
    """Choose a file that is no image, which is told of, then one that is."""
    from cvi_nb.data import load_digits

    seven = (255 * load_digits("report").images[750, 0]).byte().numpy()
    Image.fromarray(seven).resize((90, 90)).save(place / "seven.png")
    (place / "none.png").write_bytes(b"no image")
    for name in ("none.png", "seven.png"):
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name=re.compile("or a file")).click()
        chooser.value.set_files(place / name)
        if name == "none.png":
            page.get_by_text(re.compile(r"^none\.png: ")).wait_for()
    page.locator("option", has_text="seven.png").wait_for(state="attached")


@pytest.mark.slow
def test_a_person_explains_breaks_and_stops(lab: str, tmp_path: Path) -> None:
    from playwright.sync_api import TimeoutError, expect, sync_playwright

    shots = Path(os.environ.get("CVI_SCREENSHOTS", tmp_path))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(180_000)
        page.goto(lab)
        runs = page.locator(".jp-InputPrompt", has_text=re.compile(r"\[(\*|\d+)\]")).first
        for _ in range(20):  # what is typed before a kernel listens is lost
            page.locator(".jp-Notebook .jp-Cell .cm-content").first.click()
            page.keyboard.press("Shift+Enter")
            with contextlib.suppress(TimeoutError):
                runs.wait_for(timeout=5000)
                break
        explain = page.get_by_role("button", name="Explain", exact=True)
        try:
            explain.wait_for()
        finally:
            page.screenshot(path=shots / "opened.png")
        explain.click()
        page.locator("svg .region title").first.wait_for(state="attached")
        told = page.locator("svg .region title").first.text_content() or ""
        assert re.search(r"region 1: [+−][\d.e−]+ nats \[.+\], \d+% of the image", told), told
        expect(page.get_by_role("button", name="Break it")).to_be_enabled(timeout=60_000)
        page.locator("svg .region").first.hover(force=True)
        page.screenshot(path=shots / "explained.png")
        page.get_by_role("button", name="Modes", exact=True).click()
        page.get_by_text(re.compile(r"\d modes?: .*few clusters that speak for 0")).wait_for()
        told = page.locator("figcaption", has_text="weight").first.text_content() or ""
        assert re.search(r"weight [01]\.\d\d: \d+ of \d+ clusters, \d+% of the image; alone, p = [01]\.\d\d", told), (
            told
        )
        page.screenshot(path=shots / "modes.png", full_page=True)
        expect(page.get_by_role("button", name="Break it")).to_be_enabled(timeout=60_000)
        page.get_by_role("button", name="Break it").click()
        page.get_by_text(re.compile(r"at an L2 distance of [\d.]+")).wait_for()
        page.screenshot(path=shots / "broken.png")
        before = page.locator("svg image").first.get_attribute("href")
        page.get_by_label("class").fill("6")
        page.get_by_label("class").press("Enter")
        for _ in range(3):  # 64 → 512
            page.locator(".noUi-handle").first.press("ArrowRight")
        explain.click()
        stop = page.get_by_role("button", name="Stop", exact=True)
        stop.click()
        page.get_by_text("stopped", exact=True).wait_for()
        assert page.locator("svg image").first.get_attribute("href") == before, "what was stopped changes nothing"
        expect(explain).to_be_enabled(timeout=60_000)
        for _ in range(5):
            page.locator(".noUi-handle").first.press("ArrowLeft")
        explain.click()
        page.get_by_text(re.compile(r"^6, p = 0")).wait_for()
        upload(page, tmp_path)
        page.get_by_label("family").select_option("noise")
        page.get_by_label("class").fill("")
        page.get_by_label("class").press("Enter")
        explain.click()
        page.screenshot(path=shots / "asked.png")
        page.get_by_text(re.compile(r"^7, p = 0|^7, p = 1")).wait_for()
        assert "may move by σ = " in (page.locator("svg .region title").first.text_content() or "")
        page.screenshot(path=shots / "uploaded.png")
        page.keyboard.press("Control+b")  # without the list of files
        page.set_viewport_size({"width": 400, "height": 900})
        page.wait_for_timeout(500)
        page.screenshot(path=shots / "narrow.png")
        browser.close()
