"""The change demo's data: a landscape of fields and houses, seen twice, of which we know what changed.

Tiles to learn from as a LEVIR-CD folder (A, B, label, list), and one larger pair of GeoTIFFs with georeference to
predict: another season (gain and offset a band), sensor noise, and the later scene on a grid shifted by a part of a
cell. New houses and houses that are gone are change; the season, the noise and other crops are none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as Picture
from scipy.ndimage import gaussian_filter, shift, zoom

from geo.crs import crs_of, grid_of, transform_of
from geo.formats.geotiff import UNOBSERVABLE, CogSink, Layer
from geo.raster import RasterSource
from medmamba.files import atomic_write, write_bytes
from medmamba.grid import Grid
from medmamba.source import read_all
from medmamba.windows import Window
from pipelines.layouts.change_labels import read_change
from pipelines.scoring.change_metrics import ChangeTally

FRAME = "EPSG:32633"
CELL_M = 0.5
ORIGIN = (500_000.0, 5_320_000.0)
SHIFT_PX = (2.4, -1.3)  # of the later scene against its own grid: what registration has to find
TILE, SCENE = 128, (512, 640)  # cells a side
TILES = {"train": 24, "val": 8}
SEASONS = ((1.0, 0.0), (0.82, 14.0))  # gain and offset of the earlier and the later scene, in DN
NOISE = 3.0  # DN
NEW, GONE, STAYING = 0.6, 0.4, 1.4  # houses per 1,000 square metres


@dataclass(frozen=True, kw_only=True)
class Made:
    """Where the demo's data lie: the `tiles` folder; the scenes; the `truth` of the scenes, change 0 and 255."""

    tiles: Path
    before: Path
    after: Path
    truth: Path


def build(folder: Path, *, seed: int = 0, progress: Callable[[int, int], None] | None = None) -> Made:
    """Writes everything below `folder`; the same every time."""
    made = places(folder)
    done, everything = 0, sum(TILES.values()) + 1
    for part, count in TILES.items():
        names = [f"{part}_{number:02d}.png" for number in range(count)]
        for number, name in enumerate(names):
            draw = np.random.default_rng((seed, part == "val", number))
            pair = scenes((TILE, TILE), draw)
            for place, pixels in zip(("A", "B", "label"), pair, strict=True):
                write_picture(made.tiles / place / name, pixels)
            done += 1
            if progress:
                progress(done, everything)
        write_bytes(made.tiles / "list" / f"{part}.txt", "\n".join(names).encode())
    before, after, truth = scenes(SCENE, np.random.default_rng((seed, 2)), moved_px=SHIFT_PX)
    grid = grid_of(transform_of(Grid(SCENE, affine(), FRAME)), SCENE, crs_of(FRAME))
    for path, pixels in ((made.before, before), (made.after, after)):
        write_scene(path, pixels, grid)
    write_picture(made.truth, truth)
    if progress:
        progress(everything, everything)
    return made


def places(folder: Path) -> Made:
    """Where `build` writes."""
    return Made(
        tiles=folder / "tiles", before=folder / "before.tif", after=folder / "after.tif", truth=folder / "truth.png"
    )


def score(change: Path, truth: Path) -> dict[str, float]:
    """F1 and IoU of a change raster where it says anything, and the hectares that truly changed."""
    raster = RasterSource(change)
    image = read_all(raster)
    raster.close()
    real = read_change(truth)
    tally = ChangeTally("binary")
    tally.add_binary("scene", image.array[0] == 1, real, valid=(image.array[0] < UNOBSERVABLE))
    figures = tally.figures()
    return {"f1": figures["f1"], "iou": figures["iou"], "true_hectares": float(real.sum()) * CELL_M**2 / 1e4}


def affine() -> np.ndarray:
    """(row, col) of a cell's centre to (x, y)."""
    return np.array([[0, CELL_M, ORIGIN[0]], [-CELL_M, 0, ORIGIN[1]], [0, 0, 1]], dtype=np.float64)


def scenes(
    size: tuple[int, int], draw: np.random.Generator, moved_px: tuple[float, float] = (0.0, 0.0)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A place at two dates, (rows, cols, 3) uint8 each, and what changed, (rows, cols) 0 or 255.

    The later date shows at cell i what lies at i - `moved_px`.
    """
    land, crops = fields(size, draw), fields(size, draw)
    kinds = [houses(size, draw, number) for number in (STAYING, NEW, GONE)]
    (roofs, staying), (fresh, new), (lost, gone) = kinds
    new, gone = new & ~staying, gone & ~staying & ~new
    earlier = np.where(staying[..., None], roofs, np.where(gone[..., None], lost, land))
    later = np.where(staying[..., None], roofs, np.where(new[..., None], fresh, 0.8 * land + 0.2 * crops))
    if any(moved_px):
        later = np.stack(
            [shift(band, moved_px, order=1, mode="nearest") for band in np.moveaxis(later, -1, 0)], axis=-1
        )
    seen = []
    for ground, (gain, offset) in zip((earlier, later), SEASONS, strict=True):
        noisy = gain * ground + offset + draw.normal(scale=NOISE, size=ground.shape)
        seen.append(np.clip(np.rint(noisy), 1, 255).astype(np.uint8))
    return seen[0], seen[1], np.where(new | gone, 255, 0).astype(np.uint8)


def fields(size: tuple[int, int], draw: np.random.Generator) -> np.ndarray:
    """Fields of a few dozen cells with soil between dark and light, (rows, cols, 3) in DN."""
    coarse = draw.uniform(size=(-(-size[0] // 32) + 1, -(-size[1] // 32) + 1))
    patches = zoom(coarse, 32, order=0)[: size[0], : size[1]]
    grain = gaussian_filter(draw.normal(size=size), 1.5)
    tone = 60 + 80 * patches + 30 * grain / grain.std() * 0.4
    return np.stack([0.9 * tone, tone + 15, 0.7 * tone], axis=-1)


def houses(size: tuple[int, int], draw: np.random.Generator, per_1000_m2: float) -> tuple[np.ndarray, np.ndarray]:
    """Roofs (rows, cols, 3) in DN and where they stand (rows, cols) bool."""
    roofs, standing = np.zeros((*size, 3)), np.zeros(size, dtype=bool)
    for _ in range(draw.poisson(per_1000_m2 * size[0] * size[1] * CELL_M**2 / 1000)):
        tall, wide = draw.integers(8, 22, 2)
        top, left = draw.integers(0, size[0] - tall), draw.integers(0, size[1] - wide)
        place = (slice(top, top + tall), slice(left, left + wide))
        roofs[place] = draw.uniform(170, 235) * np.array(((1.0, 0.95, 0.9), (1.0, 0.55, 0.45))[int(draw.integers(2))])
        standing[place] = True
    return roofs, standing


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """A PNG, atomically."""
    with atomic_write(path) as file:
        Picture.fromarray(pixels).save(file, format="PNG")


def write_scene(path: Path, pixels: np.ndarray, grid: Grid) -> None:
    """(rows, cols, 3) uint8 as a COG."""
    layer = Layer(kind="continuous", dtype="uint8", bands=("red", "green", "blue"), nodata=0)
    sink = CogSink(path, grid, layer, key="demo")
    sink.write(Window.whole(grid.shape), np.moveaxis(pixels, -1, 0))
    sink.close()
    RasterSource(path).close()
