"""The page of a pair in a real browser: both dates and the change are drawn, the swipe moves, nothing is fetched."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from pipelines.pages.change import Pictures, write_page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
BLUE, RED, GREEN = (20, 40, 200), (200, 40, 20), (0, 255, 0)  # the earlier date, the later one, change
SIDE = 400


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page of two plain dates with a square of change in the middle."""
    dates = [np.full((SIDE, SIDE, 4), (*colour, 255), np.uint8) for colour in (BLUE, RED)]
    change = np.zeros((SIDE, SIDE, 4), np.uint8)
    change[150:250, 150:250] = (*GREEN, 255)
    block = {"row": 200, "col": 200, "rows_px": 1.0, "cols_px": -0.5}
    write_page(
        tmp_path / "page.html",
        Pictures(before=dates[0], after=dates[1], change=change),
        title="Change: <script>alert(1)</script>",
        subtitle="made",
        names=["2020", "2024"],
        legend=[("changed", GREEN)],
        tables=[{"title": "Areas", "note": "", "head": ["", "ha"], "rows": [["changed", "1"]]}],
        confidence=np.arange(10),
        record={
            "alignment": {"shape": [SIDE, SIDE]},
            "registration": {"blocks": [block], "verdict": "applied", "reason": "one pixel"},
        },
        provenance=[("before", "/somewhere/a.tif")],
        warnings=["a warning"],
    )
    return tmp_path / "page.html"


def drawn(page: Path, folder: Path) -> np.ndarray:
    """The columns of the stage in a screenshot (rows, SIDE, 3): the page is made as wide as leaves it SIDE points."""
    shot = folder / "shot.png"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=440,1200"]
    options += ["--virtual-time-budget=3000", "--enable-logging=stderr", f"--screenshot={shot}"]
    done = subprocess.run(
        [str(BROWSER), *options, f"--user-data-dir={folder}/profile", f"file://{page}"],
        **{"capture_output": True, "text": True, "timeout": 180, "check": False},
    )
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert said == []  # a request that the page's policy refuses would be told here as well
    with Picture.open(shot) as picture:
        return np.asarray(picture.convert("RGB"))[:, 20 : 20 + SIDE].astype(int)


def columns_of(shot: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Which columns hold at least 100 points of a colour (the pictures of the dates are JPEG)."""
    return np.flatnonzero((np.abs(shot - colour).max(-1) < 24).sum(0) >= 100)


@pytest.mark.skipif(BROWSER is None, reason="no chromium here; Debian's package chromium brings it")
def test_swipe_and_change_are_drawn_and_nothing_is_fetched(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"https?://", text)
    assert "<script>alert" not in text
    covered = tuple(round(0.65 * new + 0.35 * old) for new, old in zip(GREEN, RED, strict=True))
    for value, checked in ((25, True), (50, False)):
        turned = text.replace('value="50"', f'value="{value}"')
        page.write_text(turned if checked else turned.replace(" checked", ""))
        shot, edge = drawn(page, tmp_path), SIDE * value // 100
        assert columns_of(shot, BLUE).max() == pytest.approx(edge, abs=4)
        assert columns_of(shot, RED).min() == pytest.approx(edge, abs=4)
        changed = columns_of(shot, covered)  # over the later date
        expected = [150, 249] if checked else []
        assert list(changed[[0, -1]] if changed.size else changed) == pytest.approx(expected, abs=4)
