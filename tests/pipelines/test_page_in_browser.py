"""The page of a run in a real browser: the 3D view is drawn, a review comes out as it was clicked, nothing is fetched,
nothing complains."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image as Picture

from medmamba.formats.nifti import label_bytes
from medmamba.grid import RAS, Grid
from pipelines.pages.preview import colour
from pipelines.pages.report import write_report
from pipelines.pages.view3d import niivue_script
from tests.pipelines.test_pages import case

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page of one case with two blocks of labels."""
    labels = np.zeros((40, 50, 60), np.uint8)
    labels[5:35, 5:25, 5:55], labels[5:35, 25:45, 5:55] = 1, 2
    affine = np.eye(4)
    affine[:3, :3] = np.fliplr(np.diag([3.0, 3.0, 3.0]))
    (tmp_path / "sub-1_dseg.nii.gz").write_bytes(label_bytes(labels, Grid(labels.shape, affine, RAS)))
    return write_report(tmp_path, [case("sub-1")], [], "one case")


def test_without_the_package_the_page_says_how_to_get_the_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.pages.view3d.find_spec", lambda name: None)
    text = write_report(tmp_path, [case("sub-1")], [], "one case").read_text()
    assert "medmamba[niivue]" in text
    assert len(text) < 50_000


@pytest.mark.skipif(BROWSER is None, reason="no chromium here; Debian's package chromium brings it")
@pytest.mark.skipif(niivue_script() is None, reason="ipyniivue is not installed")
def test_the_3d_view_is_drawn_and_nothing_is_fetched(page: Path, tmp_path: Path) -> None:
    options = [
        "--headless=new",
        "--no-sandbox",
        "--use-angle=swiftshader",
        "--enable-unsafe-swiftshader",
    ]
    options += ["--window-size=1000,1900", "--virtual-time-budget=20000", "--enable-logging=stderr"]
    options += [
        f"--screenshot={tmp_path}/shot.png",
        f"--user-data-dir={tmp_path}/u",
    ]
    done = subprocess.run(
        [str(BROWSER), *options, f"file://{page}#3d-case1"], capture_output=True, text=True, timeout=180, check=False
    )
    assert "default-src 'none'" in page.read_text()  # so whatever the page asked for would be refused, and told here
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not [line for line in said if re.search(r"error|refused|violat", line, re.IGNORECASE)], said
    with Picture.open(tmp_path / "shot.png") as shot:
        pixels = np.asarray(shot.convert("RGB")).reshape(-1, 3).astype(float)
    hues = pixels / np.linalg.norm(pixels, axis=1, keepdims=True).clip(min=1)
    bright = pixels.max(axis=1) > 60
    for value in (1, 2):  # shading changes how bright a label is, not its hue
        wanted = np.array(colour(value)) / np.linalg.norm(colour(value))
        assert (bright & (hues @ wanted > 0.99)).sum() > 2000


class Tab:
    """A tab of a headless browser, spoken to by its debugging protocol; `events` are what it told meanwhile."""

    def __init__(self, folder: Path) -> None:
        from websockets.sync.client import connect

        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        self.process = subprocess.Popen(
            [str(BROWSER), *options, f"--user-data-dir={folder}", "about:blank"], stderr=subprocess.DEVNULL
        )
        self.events: list[dict[str, Any]] = []
        try:
            port = waited(lambda: (folder / "DevToolsActivePort").read_text().split()[0])
            with urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                (address,) = [tab["webSocketDebuggerUrl"] for tab in json.load(answer) if tab["type"] == "page"]
            self.line = connect(address, max_size=None, open_timeout=60)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def ask(self, method: str, **values: Any) -> dict[str, Any]:
        """The answer to a command."""
        self.line.send(json.dumps({"id": 1, "method": method, "params": values}))
        while "id" not in (told := json.loads(self.line.recv(timeout=60))):
            self.events.append(told)
        assert "error" not in told, told
        return dict(told["result"])

    def run(self, script: str) -> Any:
        """The value of a script in the page."""
        done = self.ask("Runtime.evaluate", expression=script, userGesture=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def close(self) -> None:
        """Ends the browser."""
        self.line.close()
        self.process.terminate()
        self.process.wait(30)


def waited(look: Callable[[], Any]) -> Any:
    """What `look` gives as soon as it gives something; a file that is not there yet is waited for."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        try:
            if found := look():
                return found
        except (OSError, IndexError):
            pass
        time.sleep(0.1)
    raise TimeoutError("the browser did not answer in 90 s")


@pytest.mark.skipif(BROWSER is None, reason="no chromium here; Debian's package chromium brings it")
def test_a_review_is_downloaded_as_it_was_clicked(tmp_path: Path) -> None:
    pytest.importorskip("websockets.sync.client")
    page = write_report(tmp_path, [case("sub-1"), case("sub-2"), case("sub-3")], [], "three cases")
    tab = Tab(tmp_path / "profile")
    try:
        for domain in ("Network", "Runtime", "Log", "Page"):
            tab.ask(f"{domain}.enable")
        tab.ask("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "out"))
        tab.ask("Page.navigate", url=f"file://{page}")
        waited(lambda: tab.run("document.readyState === 'complete' && !!document.querySelector('#save-review')"))
        row = "document.querySelector('[data-case=\"{}\"] {}')"
        tab.run(row.format("sub-1", "[data-verdict=accept]") + ".click()")
        tab.run(row.format("sub-2", "[data-verdict=accept]") + ".click()")
        tab.run(row.format("sub-2", "[data-verdict=reject]") + ".click()")  # a change of mind
        tab.run(
            f"{{const i = {row.format('sub-2', 'input')}; i.value = '=cut\\toff'; i.dispatchEvent(new Event('input'))}}"
        )
        assert tab.run("document.getElementById('reviewed').textContent") == "2"
        tab.run("document.getElementById('save-review').click()")
        text = waited(lambda: (tmp_path / "out" / "review.tsv").read_text())
    finally:
        tab.close()
    assert text == "case\tverdict\tcomment\nsub-1\taccept\t\nsub-2\treject\t'=cut off\n"  # no formula, one line a case
    asked = [e["params"]["request"]["url"] for e in tab.events if e["method"] == "Network.requestWillBeSent"]
    assert asked
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    assert not [e for e in tab.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
