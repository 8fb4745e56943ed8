"""Label pictures of change data sets: colours or class ids, and in which order the ids stand.

SECOND is passed around with its classes in two orders: MambaCD (and Mamba-FCS) number low vegetation, ground, tree,
water, building, playground from 1; Open-CD water, ground, low vegetation, tree, building, playground. Colours tell the
class by themselves; ids do not, so for them the order is taken from the layout and said to be.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as Picture

from medmamba.errors import ConfigError, InputError

UNCHANGED = "unchanged"
IGNORED = 255

Colour = tuple[int, int, int]

# Colours by which a family of data sets is recognised. SECOND's predictions are also dumped with unchanged in black.
PALETTES: dict[str, dict[Colour, str]] = {
    "second": {
        (255, 255, 255): UNCHANGED,
        (0, 0, 0): UNCHANGED,
        (0, 0, 255): "water",
        (128, 128, 128): "ground",
        (0, 128, 0): "low vegetation",
        (0, 255, 0): "tree",
        (128, 0, 0): "building",
        (255, 0, 0): "playground",
    },
    "landsat_scd": {
        (255, 255, 255): UNCHANGED,
        (0, 0, 0): UNCHANGED,
        (0, 155, 0): "farmland",
        (255, 165, 0): "desert",
        (230, 30, 100): "building",
        (0, 170, 240): "water",
    },
}

# Class names by id, 0 first.
ORDERS: dict[str, tuple[str, ...]] = {
    "mambacd": (UNCHANGED, "low vegetation", "ground", "tree", "water", "building", "playground"),
    "open_cd": (UNCHANGED, "water", "ground", "low vegetation", "tree", "building", "playground"),
    "landsat_scd": (UNCHANGED, "farmland", "desert", "building", "water"),
}
FAMILY = {"mambacd": "second", "open_cd": "second", "landsat_scd": "landsat_scd"}


@dataclass(frozen=True, kw_only=True)
class Classes:
    """How labels are written (`encoding` "ids" or "colours") and what the ids given out mean.

    `order` is a name in ORDERS; `order_from` says how it is known: "colours", "layout" (assumed) or "setting".
    """

    encoding: str
    order: str
    order_from: str

    @property
    def names(self) -> tuple[str, ...]:
        return ORDERS[self.order]

    def describe(self) -> str:
        """One line for a report."""
        listed = ", ".join(f"{number} {name}" for number, name in enumerate(self.names))
        return f"labels are {self.encoding}, order {self.order!r} ({self.order_from}): {listed}"

    def read(self, path: Path) -> np.ndarray:
        """Class ids (H, W) uint8 in `order`; 255 stays. Raises InputError for other colours, values, or encoding."""
        pixels = read_pixels(path)
        if (pixels.ndim == 3) != (self.encoding == "colours"):
            raise InputError(
                "bad_header", f"{path}: shape {pixels.shape}, but the labels of this set are {self.encoding}"
            )
        if pixels.ndim == 2:
            unknown = sorted({int(v) for v in np.unique(pixels)} - {IGNORED, *range(len(self.names))})
            if unknown:
                raise InputError("bad_header", f"{path}: values {unknown[:9]} are no class of {self.describe()}")
            return pixels.astype(np.uint8)
        return self._from_colours(path, pixels)

    def _from_colours(self, path: Path, pixels: np.ndarray) -> np.ndarray:
        known = PALETTES[FAMILY[self.order]]
        colours, inverse = unique_colours(pixels)
        unknown = [colour for colour in colours if colour not in known]
        if unknown:
            raise InputError("bad_header", f"{path}: colours {unknown[:5]} are no class of {self.describe()}")
        ids = np.array([self.names.index(known[colour]) for colour in colours], dtype=np.uint8)
        return ids[inverse].reshape(pixels.shape[:2])


def read_pixels(path: Path) -> np.ndarray:
    """A picture as it is: (H, W) of ids, also those of an indexed picture, or (H, W, 3). Raises InputError."""
    try:
        with Picture.open(path) as picture:
            if picture.mode in ("RGBA", "CMYK", "YCbCr", "LA", "PA"):
                return np.asarray(picture.convert("RGB" if picture.mode != "LA" else "L"))
            return np.asarray(picture.convert("L") if picture.mode == "1" else picture)
    except FileNotFoundError:
        raise InputError("missing_file", f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError("corrupt_file", f"{path}: the picture cannot be decoded whole ({error})") from error


def read_change(path: Path) -> np.ndarray:
    """Change (H, W) bool from a mask of 0 and 1 or 0 and 255 (255 is change). Raises InputError for anything else."""
    pixels = read_pixels(path)
    pixels = pixels[..., 0] if pixels.ndim == 3 and not np.ptp(pixels, axis=-1).any() else pixels
    values = set(np.unique(pixels).tolist())
    if pixels.ndim != 2 or not (values <= {0, 1} or values <= {0, 255}):
        raise InputError("bad_header", f"{path}: {sorted(values)[:9]}; a change mask holds 0 and 1, or 0 and 255")
    return pixels > 0


def unique_colours(pixels: np.ndarray) -> tuple[list[Colour], np.ndarray]:
    """The colours of (H, W, 3) and for every pixel the place of its colour in that list."""
    packed = pixels.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
    values, inverse = np.unique(packed, return_inverse=True)
    return [(int(v) >> 16, int(v) >> 8 & 255, int(v) & 255) for v in values], inverse.ravel()


def palette_of(path: Path) -> list[Colour] | None:
    """Colours by index of an indexed picture that uses them; None for any other picture."""
    with Picture.open(path) as picture:
        flat = picture.getpalette() if picture.mode == "P" else None
        used = int(np.asarray(picture).max()) + 1
    return None if flat is None else [(flat[3 * i], flat[3 * i + 1], flat[3 * i + 2]) for i in range(used)]


def detect(paths: Iterable[Path], *, assumed: str, order: str | None = None) -> Classes:
    """How most of the labels at `paths` are written; `assumed` is the order of ids in this layout, `order` the user's.

    Colours that belong to one family only decide the family. An indexed picture whose colours are a known order is of
    that order. Ids beyond the assumed order point to the next that has so many. Raises ConfigError when colours fit no
    family.
    """
    if order is not None and order not in ORDERS:
        raise ConfigError(f"class order {order!r} unknown; known: {', '.join(ORDERS)}")
    colours: set[Colour] = set()
    told_by_palette: str | None = None
    of_ids = of_colours = highest = 0
    for path in paths:
        try:
            pixels = read_pixels(path)
        except InputError:  # `check` names it, training refuses it
            continue
        if pixels.ndim == 3:
            of_colours += 1
            colours |= set(unique_colours(pixels)[0])
            continue
        of_ids += 1
        highest = max(highest, int(np.max(pixels, where=pixels != IGNORED, initial=0)))
        if (palette := palette_of(path)) is not None:
            told_by_palette = told_by_palette or order_of(palette)
    if of_ids >= of_colours:
        by = "setting" if order else "colours" if told_by_palette else "layout"
        likely = next((name for name in (assumed, *ORDERS) if len(ORDERS[name]) > highest), assumed)
        return Classes(encoding="ids", order=order or told_by_palette or likely, order_from=by)
    families = [name for name, palette in PALETTES.items() if colours <= set(palette)]
    if not families:
        fits = {name: sorted(colours - set(palette))[:3] for name, palette in PALETTES.items()}
        raise ConfigError(f"label colours fit no known data set; left over: {fits}")
    found = order or next((o for o in (assumed, *ORDERS) if FAMILY[o] in families), assumed)
    return Classes(encoding="colours", order=found, order_from="setting" if order else "colours")


def order_of(palette: list[Colour]) -> str | None:
    """The order of ids that an indexed picture's colours spell, None when they spell none or leave it open."""
    spelled = []
    for name, classes in ORDERS.items():
        known = PALETTES[FAMILY[name]]
        if len(palette) > 2 and [known.get(c) for c in palette] == list(classes[: len(palette)]):
            spelled.append(name)
    return spelled[0] if len(spelled) == 1 else None
