"""The transition matrix: sums are the class areas exactly; swapped dates transpose it; files."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geo.crs import CellArea
from geo.transitions import FromToSource, class_areas, from_to, transitions
from medmamba.errors import GeometryError
from medmamba.source import read_all
from medmamba.windows import Window
from tests.geo.maker import SceneOf, grid

NAMES = {0: "none", 1: "field", 2: "built"}


def maps(seed: int, shape: tuple[int, int]) -> list[SceneOf]:
    draw = np.random.default_rng(seed)
    planes = [
        draw.choice(np.array([0, 1, 2, 254, 255], "uint8"), (1, *shape), p=[0.3, 0.3, 0.3, 0.05, 0.05]) for _ in "ab"
    ]
    return [SceneOf(p, valid=p[0] != 255) for p in planes]


@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 20))
def test_sums_and_transpose(seed: int, rows: int, cols: int) -> None:
    before, after = maps(seed, (rows, cols))
    area = CellArea(before.grid)
    forth, back = transitions(before, after, area, NAMES), transitions(after, before, area, NAMES)
    np.testing.assert_array_equal(forth.counts.T, back.counts)
    cells = area.counts(_whole(before))
    seen = (before.image.array[0] < 254) & (after.image.array[0] < 254)
    for i, code in enumerate(NAMES):
        assert forth.counts[i].sum() == cells[seen & (before.image.array[0] == code)].sum()
        assert forth.counts[:, i].sum() == cells[seen & (after.image.array[0] == code)].sum()
    assert forth.counts.sum() + forth.unobserved == cells.sum()
    codes = read_all(FromToSource(before, after))
    np.testing.assert_array_equal(codes.valid, seen)
    changed = codes.array[0] > 0
    assert cells[changed].sum() == forth.counts.sum() - np.trace(forth.counts)
    assert {from_to(int(c)) for c in np.unique(codes.array[0][changed])} <= {
        (a, b) for a in NAMES for b in NAMES if a != b
    }


def _whole(source: SceneOf) -> Window:
    return Window.whole(source.grid.shape)


def test_files_and_areas(tmp_path: Path) -> None:
    before, after = maps(3, (50, 60))
    area = CellArea(before.grid)
    found = transitions(before, after, area, NAMES)
    table, told = found.save(tmp_path / "transitions")
    rows = list(csv.reader(table.read_text().splitlines()))
    assert rows[0] == ["from \\ to (ha)", "none", "field", "built", "total"]
    np.testing.assert_allclose(np.array([r[1:4] for r in rows[1:4]], dtype=float), found.hectares)
    assert float(rows[1][4]) == pytest.approx(found.hectares[0].sum())
    read = json.loads(told.read_text())
    assert read["unit"] == "ha"
    assert sum(read["from_total"]) + read["not_observed"] == pytest.approx(50 * 60 / 100, rel=1e-3)
    areas = class_areas(before, area, NAMES)
    assert sum(areas.values()) == pytest.approx(50 * 60 / 100, rel=1e-3)
    assert list(areas) == ["none", "field", "built", "not observed"]


def test_refusals() -> None:
    before, after = maps(3, (5, 6))
    area = CellArea(before.grid)
    with pytest.raises(GeometryError, match="have no name"):
        transitions(before, after, area, {0: "none", 1: "field"})
    with pytest.raises(GeometryError):
        transitions(before, maps(3, (5, 7))[0], area, NAMES)
    with pytest.raises(GeometryError):
        FromToSource(before, SceneOf(np.zeros((1, 6, 6), "uint8"), grid((6, 6))))
