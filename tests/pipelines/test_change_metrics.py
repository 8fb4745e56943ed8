"""Change metrics: the figures of published maps, slow definitions, tiles, protocols told apart, intervals."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Picture

from medmamba.errors import ConfigError, ShapeError
from pipelines.scoring.change_metrics import (
    ChangeTally,
    binary_figures,
    confusion,
    from_to_codes,
    kappa,
    paired_difference,
    semantic_figures,
)

TOLD = re.compile(
    r"- (?P<model>\w+) on (?P<pairs>\d+) pairs: TP (?P<tp>\d+) FP (?P<fp>\d+) FN (?P<fn>\d+) TN (?P<tn>\d+), "
    r"precision (?P<precision>[\d.]+) recall (?P<recall>[\d.]+) F1 (?P<f1>[\d.]+) IoU (?P<iou>[\d.]+) "
    r"OA (?P<oa>[\d.]+) kappa (?P<kappa>[\d.]+)"
)


@pytest.mark.parametrize(("name", "models"), [("change_levir", 6), ("change_dsifn", 6)])
def test_published_maps_get_the_figures_told_about_them(shared: Path, name: str, models: int) -> None:
    folder = shared / "data" / name
    rows = [match.groupdict() for match in TOLD.finditer((folder / "README.md").read_text())]
    assert len(rows) == models
    for row in rows:
        tally = ChangeTally("binary")
        for path in sorted((folder / f"predict_{row['model']}").glob("*.png")):
            maps = [np.asarray(Picture.open(where / path.name)) for where in (path.parent, folder / "label")]
            tally.add_binary(path.stem, *maps)
        assert len(tally.images) == int(row["pairs"])
        (tn, fn), (fp, tp) = tally.matrices.sum(0).tolist()
        assert [tp, fp, fn, tn] == [int(row[key]) for key in ("tp", "fp", "fn", "tn")]
        figures = tally.figures()
        for key in ("precision", "recall", "f1", "iou", "oa", "kappa"):
            assert figures[key] == pytest.approx(float(row[key]), abs=5.1e-5), (row["model"], key)  # told to 4 digits


def maps(rng: np.random.Generator, classes: int = 4, shape: tuple[int, int] = (24, 20)) -> tuple[np.ndarray, ...]:
    """Change, and classes that are 0 outside it."""
    change = rng.random(shape) < 0.4
    return change, *(np.where(change, rng.integers(1, classes, shape), 0) for _ in range(2))


def noisy(rng: np.random.Generator, truth: tuple[np.ndarray, ...], classes: int = 4) -> tuple[np.ndarray, ...]:
    wrong = [rng.random(truth[0].shape) < 0.3 for _ in truth]
    drawn = rng.integers(1, classes, truth[0].shape)
    change = truth[0] ^ wrong[0]
    return change, *(np.where(w | (m == 0), drawn, m) for w, m in zip(wrong[1:], truth[1:]))


def test_semantic_figures_by_their_slow_definition(rng: np.random.Generator) -> None:
    truth = maps(rng)
    found = noisy(rng, truth)
    tally = ChangeTally("per_date", 4)
    tally.add_semantic("a", found, truth)
    pairs = [
        (p if c else 0, t)
        for m, true in zip(found[1:], truth[1:])
        for c, p, t in zip(*map(np.ravel, (found[0], m, true)))
    ]
    changed = [(p, t) for p, t in pairs if p or t]
    n = len(changed)
    agreed = sum(p == t for p, t in changed) / n
    chance = sum(sum(p == k for p, _ in changed) * sum(t == k for _, t in changed) for k in range(4)) / n**2
    both = sum(p > 0 and t > 0 for p, t in pairs)
    iou = both / n
    right = sum(p == t for p, t in changed)
    precision, recall = right / sum(p > 0 for p, _ in pairs), right / sum(t > 0 for _, t in pairs)
    still = sum(p == t == 0 for p, t in pairs)
    figures = tally.figures()
    assert figures["sek"] == pytest.approx((agreed - chance) / (1 - chance) * np.exp(iou - 1))
    assert figures["f_scd"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert figures["miou"] == pytest.approx((iou + still / (len(pairs) - both)) / 2)
    assert figures["score"] == pytest.approx(0.3 * figures["miou"] + 0.7 * figures["sek"])
    assert figures["oa"] == pytest.approx(sum(p == t for p, t in pairs) / len(pairs))


def test_kappa_of_a_textbook_table() -> None:
    assert kappa(np.array([[20, 5], [10, 15]])) == pytest.approx(0.4)
    assert kappa(np.zeros((2, 2), int)) == kappa(np.array([[7, 0], [0, 0]])) == 0.0


@given(st.lists(st.integers(0, 10**9), min_size=4, max_size=4))
def test_f1_and_iou_say_the_same(cells: list[int]) -> None:
    figures = binary_figures(np.array(cells).reshape(2, 2))
    if cells[1] + cells[2] + cells[3]:
        assert figures["f1"] == pytest.approx(2 * figures["iou"] / (1 + figures["iou"]))
    else:
        assert np.isnan(figures["f1"])


@pytest.mark.parametrize("protocol", ["binary", "per_date", "from_to"])
def test_perfect_maps_and_tiles(protocol: str, rng: np.random.Generator) -> None:
    truth = maps(rng)
    found = noisy(rng, truth)
    perfect, whole, tiled = (ChangeTally(protocol, 4) for _ in range(3))

    def add(tally: ChangeTally, prediction: tuple[np.ndarray, ...], reference: tuple[np.ndarray, ...]) -> None:
        if protocol == "binary":
            tally.add_binary("a", prediction[0], reference[0])
        else:
            tally.add_semantic("a", prediction, reference)  # type: ignore[arg-type]

    add(perfect, truth, truth)
    best = perfect.figures()
    assert best["protocol"] == protocol
    for key in {"f1", "iou", "kappa", "miou", "sek", "f_scd", "score", "oa"} & set(best):
        assert best[key] == pytest.approx(1.0), key
    add(whole, found, truth)
    for rows in (slice(9, None), slice(0, 9)):
        add(tiled, tuple(m[rows] for m in found), tuple(m[rows] for m in truth))
    assert tiled.figures() == whole.figures()


def test_protocols_disagree_and_say_which_they_are(rng: np.random.Generator) -> None:
    truth = maps(rng)
    found = noisy(rng, truth)
    told = {}
    for protocol in ("per_date", "from_to"):
        tally = ChangeTally(protocol, 4)
        tally.add_semantic("a", found, truth)
        told[protocol] = tally.figures()
        assert told[protocol]["protocol"] == protocol
    assert told["from_to"]["f_scd"] < told["per_date"]["f_scd"]
    with pytest.raises(ConfigError, match="known: binary, per_date, from_to"):
        ChangeTally("joint")


def test_broken_transitions_are_counted_as_unchanged() -> None:
    changed, earlier, later = np.array([1, 1, 1, 0]), np.array([2, 0, 0, 0]), np.array([1, 3, 2, 1])
    codes, broken = from_to_codes(changed, earlier, later, 4)  # codes (2-1)*3+1, -3+3, -3+2
    assert codes.tolist() == [4, 0, 0, 0]
    assert broken == 1


def test_undefined_figures_are_none_and_invalid_pixels_do_not_count() -> None:
    empty = ChangeTally("binary")
    empty.add_binary("a", np.zeros((3, 3)), np.zeros((3, 3)))
    assert empty.figures()["f1"] is None
    assert empty.figures()["oa"] == 1.0
    tally = ChangeTally("binary")
    tally.add_binary("a", np.array([[1, 1]]), np.array([[1, 0]]), valid=np.array([[True, False]]))
    assert tally.figures()["f1"] == 1.0
    assert np.isnan(semantic_figures(np.diag([5, 0, 0]))["iou_changed"])
    with pytest.raises(ShapeError, match="differ in shape"):
        confusion(np.zeros((2, 2)), np.zeros((2, 3)), 2)
    with pytest.raises(ConfigError, match="reference holds 0 to 255, expected 0 to 1"):
        confusion(np.zeros((2, 1)), np.array([[0], [255]]), 2)


def tally_of(seed: int, errors: float, images: int = 12, *, scenes: int | None = None) -> ChangeTally:
    """Binary maps of which each pixel is wrong with a probability that differs from image to image."""
    tally, rng = ChangeTally("binary"), np.random.default_rng(seed)
    for number in range(images):
        shared = np.random.default_rng(number)
        truth, hard = shared.random((32, 32)) < 0.3, shared.random()
        wrong = rng.random((32, 32)) < errors * hard
        tally.add_binary(f"{number:02}", truth ^ wrong, truth, group=scenes and f"scene {number % scenes}")
    return tally


def test_pairing_narrows_the_interval() -> None:
    good, bad = tally_of(1, 0.30), tally_of(2, 0.36)
    apart = paired_difference(good, bad)["iou"]
    low, high = apart["interval"]
    assert low < apart["difference"] < high
    assert low > 0  # seen in every draw, though each model's own interval is wider than the difference
    own = good.intervals()["iou"]
    assert own is not None
    assert own[1] - own[0] > 2 * (high - low)
    assert own[0] < good.figures()["iou"] < own[1]
    same = paired_difference(good, good)["f1"]
    assert same == {"difference": 0.0, "interval": (0.0, 0.0), "protocol": "binary"}


def test_intervals_draw_whole_scenes_and_repeat_with_the_seed() -> None:
    single, scenes, one = tally_of(1, 0.3), tally_of(1, 0.3, scenes=3), tally_of(1, 0.3, scenes=1)
    assert single.figures() == scenes.figures()
    assert single.intervals()["iou"] == single.intervals()["iou"] != single.intervals(seed=1)["iou"]
    assert scenes.intervals()["iou"] != single.intervals()["iou"]
    assert one.intervals()["iou"] is None
    with pytest.raises(ConfigError, match="same images, groups, pixels and protocol"):
        paired_difference(single, scenes)
