"""A small labelled cohort from one real head: the MNI152 template and its tissue maps, carried by the nilearn package.

Every case is that head after a random smooth deformation, with its own contrast, bias field, noise, axis order and
sometimes a tilted scanner grid of its own spacing. Labels: 1 grey matter, 2 white matter (probability above one half).
All cases come from ONE head: a figure on them shows that the programs work and says nothing about patients.
"""

from __future__ import annotations

import csv
import gzip
import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates, zoom

from medmamba.errors import ConfigError
from medmamba.files import write_bytes
from medmamba.formats.nifti import NiftiSource, write_labels
from medmamba.grid import RAS, Grid
from medmamba.source import read_all, turned

TISSUES = {1: "grey matter", 2: "white matter"}
MAPS = tuple(f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz" for name in ("t1", "gm", "wm"))
SPACING_MM, FIELD_MM = 3.0, (192.0, 240.0, 192.0)  # (z, y, x): 64 x 80 x 64 cells
CENTRE_MM = (1.0, -19.0, 4.0)  # world x, y, z of the middle of the head
WARP_MM, BIAS, GAMMA = 5.0, 0.25, (0.8, 1.25)
DAMAGED = "sub-99_t1.nii.gz"


@dataclass(frozen=True, kw_only=True)
class Looks:
    """How hard the images are: range of the noise's standard deviation, share of cases with inverted contrast."""

    noise: tuple[float, float] = (0.01, 0.04)
    inverted: float = 0.0


HARD = Looks(noise=(0.02, 0.10), inverted=0.5)


@dataclass(frozen=True, kw_only=True)
class Head:
    """`maps` (3, z, y, x) in 0..1: T1, grey and white matter; `grid` of the template, 1 mm."""

    maps: np.ndarray
    grid: Grid


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Where things lie: `train` and `test` manifests (CSV with labels), `archive` folder of images without labels."""

    train: Path
    test: Path
    archive: Path


def build(
    folder: Path,
    *,
    train: int = 12,
    test: int = 4,
    looks: Looks | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Cohort:
    """Writes the cohort below `folder`, the same bytes for the same numbers; `progress(done, all)`.

    The archive holds the test images again and one damaged file. Raises ConfigError when nilearn's files are not there.
    """
    head = read_head()
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for number in range(train + test):
        name = f"sub-{number + 1:02d}"
        part = "train" if number < train else "test"
        rng = np.random.default_rng((seed, number))
        grid = scanner_grid(rng, tilted=number % 4 == 3)
        image, labels = make_case(head, grid, looks or Looks(), rng)
        order = tuple(int(a) for a in rng.permutation(3))
        flips = tuple(bool(f) for f in rng.random(3) < 0.5)
        stored = grid.permute(order, flips)
        path = folder / part / f"{name}_t1.nii.gz"
        write_volume(path, turned(image, order, flips), stored)
        label_path = folder / part / f"{name}_dseg.nii.gz"
        write_labels(label_path, turned(labels, order, flips), NiftiSource(path), names={0: "background", **TISSUES})
        rows[part].append({"case": name, "group": name, "t1": path.name, "label": label_path.name})
        if part == "test":
            write_bytes(folder / "archive" / path.name, path.read_bytes())
        if progress:
            progress(number + 1, train + test)
    last = (folder / ("test" if test else "train") / f"sub-{train + test:02d}_t1.nii.gz").read_bytes()
    write_bytes(folder / "archive" / DAMAGED, last[: len(last) * 2 // 3])
    manifests = [write_manifest(folder / part / "manifest.csv", rows[part]) for part in ("train", "test")]
    return Cohort(train=manifests[0], test=manifests[1], archive=folder / "archive")


def read_head() -> Head:
    """The template from the files inside nilearn (which is not imported: that takes seconds)."""
    package = find_spec("nilearn")
    places = package.submodule_search_locations if package else None
    folder = Path(next(iter(places))) / "datasets" / "data" if places else None
    if folder is None or not all((folder / name).is_file() for name in MAPS):
        raise ConfigError(f"the demo needs {', '.join(MAPS)} inside the nilearn package; install nilearn 0.14")
    sources = [NiftiSource(folder / name) for name in MAPS]
    arrays = [read_all(source).array[0].astype(np.float32) for source in sources]
    return Head(maps=np.stack([a / a.max() for a in arrays]), grid=sources[0].grid)


def scanner_grid(rng: np.random.Generator, *, tilted: bool) -> Grid:
    """64 x 80 x 64 cells (z, y, x) of 3 mm around the head; `tilted`: of 2.8-3.2 mm, turned by up to 10 degrees."""
    spacing = SPACING_MM * (rng.uniform(0.94, 1.06, 3) if tilted else np.ones(3))
    shape = np.round(np.array(FIELD_MM) / spacing).astype(int)
    steps = np.fliplr(np.diag(spacing[::-1]))  # columns: z, y, x steps in world x, y, z
    if tilted:
        steps = rotation(rng.uniform(-10, 10, 3)) @ steps
    affine = np.eye(4)
    affine[:3, :3] = steps
    affine[:3, 3] = np.array(CENTRE_MM) + rng.uniform(-4, 4, 3) - steps @ ((shape - 1) / 2)
    affine = affine.astype(np.float32).astype(np.float64)  # what the header will hold
    return Grid(tuple(int(n) for n in shape), affine, RAS)


def make_case(head: Head, grid: Grid, looks: Looks, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image (int16) and its labels (int32), both of `grid.shape`: the head warped, then given its own looks."""
    index = np.indices(grid.shape).reshape(3, -1)
    world = grid.affine[:3, :3] @ index + grid.affine[:3, 3:]
    centre = np.array(CENTRE_MM)[:, None]
    inside = rotation(rng.uniform(-6, 6, 3)) @ ((world - centre) * rng.uniform(0.93, 1.07, (3, 1))) + centre
    inside += np.stack([smooth_field(grid.shape, rng).ravel() for _ in range(3)]) * WARP_MM
    to_index = np.linalg.inv(head.grid.affine)
    places = to_index[:3, :3] @ inside + to_index[:3, 3:]
    t1, gm, wm = (map_coordinates(m, places, order=1, mode="constant").reshape(grid.shape) for m in head.maps)
    labels = np.where(gm > 0.5, 1, np.where(wm > 0.5, 2, 0)).astype(np.int32)
    bright = t1 ** rng.uniform(*GAMMA) * np.exp(BIAS * smooth_field(grid.shape, rng))
    if looks.inverted and rng.random() < looks.inverted:
        bright = np.where(t1 > 0.05, bright.max() - bright, bright)  # air stays dark
    sigma = rng.uniform(*looks.noise)
    noisy = np.hypot(bright + rng.normal(0, sigma, grid.shape), rng.normal(0, sigma, grid.shape))  # Rician, as in MR
    return np.rint(noisy * rng.uniform(400, 1200)).clip(0, 32000).astype(np.int16), labels


def smooth_field(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A smooth random field over `shape`, standard deviation 1 on its knots (about 40 mm apart)."""
    knots = gaussian_filter(rng.normal(size=(6, 7, 6)), 0.8, mode="nearest")
    field = knots / knots.std()
    for axis, (cells, knots_here) in enumerate(zip(shape, field.shape, strict=True)):
        spline = zoom(np.eye(knots_here), (cells / knots_here, 1), order=3, mode="nearest")  # (cells, knots)
        field = np.moveaxis(np.tensordot(spline, field, axes=(1, axis)), 0, axis)
    return field


def rotation(degrees: np.ndarray) -> np.ndarray:
    """Rotation about world x, then y, then z, (3, 3)."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[a, a] = step[b, b] = np.cos(angle)
        step[a, b], step[b, a] = -np.sin(angle), np.sin(angle)
        turn = step @ turn
    return turn


def write_volume(path: Path, array: np.ndarray, grid: Grid) -> None:
    """int16 (z, y, x) as .nii.gz, header packed by hand from the NIfTI-1 standard: the readers are not fed by their own
    library. sform code 1 (scanner), millimetres; the same bytes for the same array."""
    steps = grid.affine[:3, [2, 1, 0, 3]].astype(np.float32)
    head = struct.pack("<i35xB8h", 348, 0, 3, *array.shape[::-1], 1, 1, 1, 1)
    head += struct.pack("<12x4h", 0, 4, 16, 0)  # intent, int16, bits, first slice
    head += struct.pack(
        "<8f3f", 1.0, *grid.spacing[::-1], 0, 0, 0, 0, 352.0, 1.0, 0.0
    )  # pixdim, offset, slope, intercept
    head += struct.pack("<hBB4f8x80s24x", 0, 0, 2, 0, 0, 0, 0, b"medmamba demo cohort")
    head += struct.pack("<2h24x12f16x4s4x", 0, 1, *steps.ravel(), b"n+1\0")
    data = np.ascontiguousarray(array, dtype="<i2").tobytes()
    write_bytes(path, gzip.compress(head + data, compresslevel=1, mtime=0))


def write_manifest(path: Path, rows: list[dict[str, str]]) -> Path:
    """One row a case; file names are relative to the manifest."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["case", "group", "t1", "label"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())
    return path
