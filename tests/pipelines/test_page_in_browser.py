"""The page of a run in a real browser: the 3D view is drawn, nothing is fetched, nothing complains."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

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
