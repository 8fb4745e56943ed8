"""Windowed and streamed inference: `python benchmarks/inference.py [--quick]` prints bars and what was met.

A peak is the memory that a run needs: the high-water mark of a child process of its own, less what was resident after
the imports and the same work on a tiny image (MONAI's and the whole image's too); the mark itself is printed beside it.
Times are process CPU time of one thread, of the middle one of three runs where it says so; ratios are of one run.
MONAI's sliding window gets its input as one float32 array, and large pages from torch as ours does.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from affine import Affine
from machine import machine
from rasterio.windows import Window as RasterWindow
from torch import Tensor, nn

from geo.align import align
from geo.formats.geotiff import CogSink, class_layer
from geo.radiometry import StretchedSource, common_stretch
from geo.raster import RasterSource
from medmamba.bundle import Bundle
from medmamba.formats.nifti import NiftiSource, header_of
from medmamba.grid import RAS, Grid
from medmamba.infer import infer
from medmamba.layers.onednn import one_dnn
from medmamba.nets.mamba_unet import MambaUNet, MambaUNetConfig
from medmamba.preprocessing import Channel, Preprocessing
from medmamba.sample import Image
from medmamba.source import ArraySink, StackedSource
from medmamba.stream import stream
from medmamba.windows import Window, Windowing
from pipelines.cases.case import Case
from pipelines.serving.budget import return_large_blocks
from pipelines.serving.predict_pair import STRIP
from pipelines.serving.products import write_products
from pipelines.serving.uncertainty import DecodeSink
from pipelines.tasks.cleaning import CLEANING
from pipelines.tasks.segmentation import Segmentation

ROOT = Path(__file__).resolve().parent.parent
WINDOW, CLASSES = 96, 5
SCENES = ("before.tif", "after.tif")
Shape = tuple[int, ...]


class Free(nn.Module):
    """One multiply a class: what is left is stitching."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.arange(1.0, CLASSES + 1).view(1, -1, 1, 1, 1)


class Conv(nn.Sequential):
    """3 x 3 x 3 to 8 channels, ReLU, 1 x 1 x 1."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, CLASSES, 1))


NETWORKS: dict[str, type[nn.Module]] = {"free": Free, "conv": Conv}


class Clocked(nn.Module):
    """A network with its own CPU time."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.seconds = network, 0.0

    def forward(self, x: Tensor) -> Tensor:
        start = time.process_time()
        y: Tensor = self.network(x)
        self.seconds += time.process_time() - start
        return y


class RawSource:
    """A volume of float32 in a file without a header."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self.path, self.grid, self.channels, self.dtype = path, Grid(shape, np.eye(4)), ("c",), np.dtype("float32")

    def read(self, window: Window) -> Image:
        array = np.memmap(self.path, np.float32, "r", shape=self.grid.shape)[window.slices].copy()
        return Image(array[None], self.grid.crop(window.start, window.size), self.channels)


class FileSink:
    """Planes of (C, *space), appended to a file; labels (uint8, by running maximum) or the scores themselves."""

    def __init__(self, path: Path, shape: Shape, channels: int) -> None:
        self.path, self.shape = path, (channels, *shape)
        self.dtype = np.dtype("uint8" if channels == 1 else "float32")
        with path.open("wb") as file:
            file.truncate(int(np.prod(self.shape)) * self.dtype.itemsize)

    def write(self, window: Window, array: np.ndarray) -> None:
        made = labels_of(array)[None] if self.shape[0] == 1 else array
        with self.path.open("r+b") as file:
            for channel, planes in enumerate(made):
                file.seek((channel * self.shape[1] + window.start[0]) * planes[0].nbytes)
                planes.tofile(file)

    def close(self) -> None:
        """Nothing is held."""


def labels_of(scores: np.ndarray) -> np.ndarray:
    from pipelines.tasks.segmentation import Segmentation

    task = Segmentation(names={}, values={k: k for k in range(len(scores))})
    return task.decode(scores)[0]


def child_ours(folder: str, shape: Shape, network: str, out: str) -> dict[str, float]:
    return_large_blocks()
    clocked = Clocked(NETWORKS[network]())
    side = min(WINDOW, *shape)
    windowing = Windowing(size=(side,) * 3, overlap=(side // 2,) * 3)
    sink = FileSink(Path(folder) / "ours", shape, 1 if out == "labels" else CLASSES)
    start = time.process_time()
    infer(clocked, RawSource(Path(folder) / "image", shape), sink, classes=CLASSES, windowing=windowing)
    return {"cpu": time.process_time() - start, "network": clocked.seconds}


def child_monai(folder: str, shape: Shape, network: str, out: str) -> dict[str, float]:
    import monai.inferers.utils

    clocked = Clocked(NETWORKS[network]())
    start = time.process_time()
    image = torch.from_numpy(np.fromfile(Path(folder) / "image", np.float32).reshape(1, 1, *shape))
    with torch.inference_mode():
        scores = monai.inferers.utils.sliding_window_inference(
            image, (min(WINDOW, *shape),) * 3, 1, clocked, overlap=0.5, mode="gaussian"
        )
    array = torch.argmax(scores, 1).to(torch.uint8) if out == "labels" else scores  # type: ignore[arg-type]
    array.numpy().tofile(Path(folder) / "monai")  # type: ignore[union-attr]
    return {"cpu": time.process_time() - start, "network": clocked.seconds}


def child_export(classes: int, large: Shape, kind: str) -> dict[str, float]:
    """Scores on the network's grid, plane by plane, to every file of a case on its own grid, twice as fine; of a `kind`
    "cleaned" label by label and with the map of disagreement. `cpu` is that of the way to the labels alone."""
    contract = Preprocessing(
        channels=(Channel(role="ct"),), windowing=Windowing(size=(WINDOW,) * 3, overlap=(0,) * 3), spacing=(2.0,) * 3
    )
    names = {str(k): f"label {k}" for k in range(1, classes)}
    task: dict[str, Any] = {"name": "segmentation", "labels": names}
    if kind == "cleaned":
        task["cleaning"] = {key: list(CLEANING) for key in names}
    known = {"cases": 9, "n": 9, "pieces": 1, "median_ml": 1.0, "spread": 0.1}
    bundle = Bundle(
        name="export", network="", config={"out_channels": classes}, preprocessing=contract, task=task, folder=Path(),
        weights=(), weight_hashes=(), card={"expected": {k: {"name": name, **known} for k, name in names.items()}},
    )  # fmt: skip
    decoder = Segmentation.from_settings(task)
    with tempfile.TemporaryDirectory() as folder:
        source = NiftiSource(write_nothing(Path(folder) / "in.nii", large))
        labels = ArraySink(1, large, "uint8")
        unsure = ArraySink(1, large, "uint8") if kind == "cleaned" else None
        sink = contract.inverse(DecodeSink(decoder, classes, labels, unsure), source.grid)
        shape = contract.shape_for(source.grid)
        low = torch.from_numpy(np.random.default_rng(0).normal(size=(2, classes, 4, 4)).astype(np.float32))
        planes = torch.nn.functional.interpolate(low, size=shape[1:], mode="bilinear")  # blobs, as organs are
        if unsure is not None:
            planes = torch.cat([planes, torch.full_like(planes[:, :1], 0.3)], 1)
        start = time.process_time()
        for row in range(shape[0]):
            window = Window(start=(row, 0, 0), size=(1, *shape[1:]))
            sink.write(window, planes[2 * row // shape[0], :, None].numpy())
        spent = time.process_time() - start
        finished, case = decoder.finish(labels.array[0]), Case(id="a", files={"ct": source.path})
        doubt = None if unsure is None else unsure.array[0]
        write_products(Path(folder), bundle, decoder, case, source, finished, doubt, key="k")
    return {"cpu": spent, "voxels": float(np.prod(large))}


def write_nothing(path: Path, shape: Shape) -> Path:
    """A NIfTI of zeros, 1 mm."""
    header = header_of(Grid(shape, np.eye(4)[:, [2, 1, 0, 3]], RAS))
    header.set_data_dtype(np.int16)
    header["magic"], header["vox_offset"] = header.single_magic, header.single_vox_offset
    with path.open("wb") as file:
        header.write_to(file)
        file.truncate(int(header["vox_offset"]) + 2 * int(np.prod(shape)))
    return path


def child_resize(classes: int, small: Shape, large: Shape) -> dict[str, float]:
    """The same with the whole array at once, by torch."""
    planes = np.random.default_rng(0).normal(size=(2, classes, *small[1:])).astype(np.float32)
    scores = torch.from_numpy(planes[np.arange(small[0]) % 2]).transpose(0, 1).contiguous()
    start = time.process_time()
    whole = torch.nn.functional.interpolate(scores[None], size=large, mode="trilinear")
    torch.max(whole, dim=1).indices.to(torch.uint8)
    return {"cpu": time.process_time() - start}


def flagship() -> nn.Module:
    torch.manual_seed(0)
    return MambaUNet(MambaUNetConfig(in_channels=1, out_channels=CLASSES)).eval()


def child_full(folder: str, shape: Shape) -> dict[str, float]:
    """The whole image shown to the flagship at once."""
    network = flagship()
    image = torch.from_numpy(np.fromfile(Path(folder) / "image", np.float32).reshape(1, 1, *shape))
    start = time.process_time()
    with torch.no_grad(), one_dnn(image):  # as a window of that size is inferred
        scores = network(image)
    spent = time.process_time() - start
    scores.numpy().tofile(Path(folder) / "full")
    return {"cpu": spent, "network": spent}


def child_stream(folder: str, shape: Shape) -> dict[str, float]:
    """The same slab by slab, of as many rows as by default."""
    return_large_blocks()
    network, sink = flagship(), FileSink(Path(folder) / "streamed", shape, CLASSES)
    start = time.process_time()
    stream(network, RawSource(Path(folder) / "image", shape), sink, scratch=Path(folder) / "maps")
    return {"cpu": time.process_time() - start, "network": 0}


class Dates(nn.Sequential):
    """Two dates of three bands, a 3 x 3 convolution to 4 channels, two scores."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))


class Classes:
    """Scores in, the larger one's number out."""

    def __init__(self, sink: CogSink) -> None:
        self.sink = sink

    def write(self, window: Window, array: np.ndarray) -> None:
        self.sink.write(window, (array[1:] > array[:1]).astype(np.uint8))

    def close(self) -> None:
        self.sink.close()


def child_scene(folder: str, shape: Shape) -> dict[str, float]:
    """Two dates, aligned and stretched, to a COG; as a pair of the archive is."""
    return_large_blocks()
    network = Clocked(Dates())
    start = time.process_time()
    dates = align([RasterSource(Path(folder) / name) for name in SCENES]).sources
    stretch = common_stretch(dates)
    pair = StackedSource(*(StretchedSource(date, stretch) for date in dates))
    cog = CogSink(Path(folder) / "change.tif", pair.grid, class_layer({0: "no", 1: "yes"}, {1: (255, 0, 0)}), key="k")
    windowing = Windowing(size=(min(512, *shape),) * 2, overlap=(64 * (min(shape) > 64),) * 2, weights="ramp")
    sink = Classes(cog)
    infer(network, pair, sink, classes=2, windowing=windowing, strip=STRIP, finished=cog.finished)
    sink.close()
    return {"cpu": time.process_time() - start, "network": network.seconds}


def write_scenes(folder: Path, shape: Shape) -> None:
    """Two tiled GeoTIFFs of three bands of 8 bits: one tile of noise again and again, the later date brighter."""
    tile = np.random.default_rng(0).integers(1, 200, (3, *(min(512, n) for n in shape)), dtype=np.uint8)
    place = {"crs": "EPSG:32633", "transform": Affine(10, 0, 400_000, 0, -10, 5_000_000)}
    tiles = {"tiled": True, "blockxsize": 512, "blockysize": 512} if min(shape) >= 512 else {}
    for brighter, name in enumerate(SCENES):
        size = {"count": 3, "height": shape[0], "width": shape[1], "dtype": "uint8"}
        with rasterio.open(folder / name, "w", driver="GTiff", **size, **place, **tiles) as file:
            for row in range(0, shape[0], tile.shape[1]):
                for column in range(0, shape[1], tile.shape[2]):
                    box = RasterWindow(column, row, tile.shape[2], tile.shape[1])
                    file.write(tile + np.uint8(40 * brighter), window=box)


CHILDREN: dict[str, Callable[..., dict[str, float]]] = {
    "scene": child_scene,
    "ours": child_ours,
    "monai": child_monai,
    "export": child_export,
    "resize": child_resize,
    "full": child_full,
    "stream": child_stream,
}


def peak_bytes() -> int:
    """The high-water mark of this program (that of getrusage begins with the parent's)."""
    return told_by_system("VmHWM")


def resident_bytes() -> int:
    """What this program holds now."""
    return told_by_system("VmRSS")


def told_by_system(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def run_child(name: str, arguments: list[Any]) -> None:
    """Warms up, works, prints the figures."""
    torch.set_num_threads(1)
    if name == "monai":
        importlib.import_module("monai.inferers.utils")
    tiny = [tuple(max(1, min(n, 1024) // 16) for n in a) if isinstance(a, list) else a for a in arguments]
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(tiny[0], str):
            tiny[0] = folder
            if name == "scene":
                write_scenes(Path(folder), tiny[1])
            else:
                write_noise(Path(folder) / "image", tiny[1])
        CHILDREN[name](*tiny)
    gc.collect()
    before = resident_bytes()
    found = CHILDREN[name](*(tuple(a) if isinstance(a, list) else a for a in arguments))
    print(json.dumps({"whole": peak_bytes(), "peak": peak_bytes() - before, **found}))


def measure(name: str, *arguments: Any) -> dict[str, float]:
    """A child's own figures and its high-water mark `peak` in bytes."""
    command = [sys.executable, __file__, "--child", json.dumps([name, *arguments])]
    pages = {"THP_MEM_ALLOC_ENABLE": "1"} if name in ("ours", "monai", "scene") else {}  # as `predict` asks for windows
    environment = {**os.environ, **pages, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def middle(names: Sequence[str], *arguments: Any) -> list[dict[str, float]]:
    """The run of the middle CPU time, of three of each child, taken in turn."""
    runs = [[measure(name, *arguments) for name in names] for _ in range(3)]
    return [sorted(own, key=lambda found: found["cpu"])[1] for own in zip(*runs, strict=True)]


def row(title: str, reached: float, must: float, aim: float | None = None, form: str = "{:.3g}") -> None:
    told = form.format(reached)
    verdict = "met" if reached <= must else "NOT MET"
    aimed = "" if aim is None else f"  aim {form.format(aim)}{' met' if reached <= aim else ''}"
    print(f"{title:<66} {told:>9}  must {form.format(must)} {verdict}{aimed}", flush=True)


def windowed(folder: Path, quick: bool) -> None:
    short, long = ((128,) * 3, (384, 128, 128)) if quick else ((256,) * 3, (768, 256, 256))
    ours, other = {}, {}
    for shape in (short, long):
        write_noise(folder / "image", shape)
        ours[shape] = measure("ours", str(folder), shape, "free", "labels")
        other[shape] = measure("monai", str(folder), shape, "free", "labels")
        same = np.memmap(folder / "ours", np.uint8, "r") != np.memmap(folder / "monai", np.uint8, "r")
        print(f"{shape}: ours {told(ours[shape])}; MONAI {told(other[shape])}; {int(same.sum())} labels differ")
        row(
            f"windowed peak / MONAI's, {'x'.join(map(str, shape))} x {CLASSES}, labels out",
            ours[shape]["peak"] / other[shape]["peak"],
            0.45 if shape == short else 0.16,
            0.4 if shape == short else 0.12,
        )
    row("windowed peak when the long axis triples", ours[long]["peak"] / ours[short]["peak"] - 1, 0.05, 0.02, "{:+.1%}")
    write_noise(folder / "image", short)
    for out, network, must, aim in (
        ("labels", "free", 0.5, 0.3),
        ("scores", "free", 1.1, 0.9),
        ("labels", "conv", 0.5, 0.3),
    ):
        mine, theirs = middle(("ours", "monai"), str(folder), short, network, out)
        print(f"{network}, {out}, middle of 3: ours {told(mine)}; MONAI {told(theirs)}")
        row(f"stitching overhead / MONAI's, {network}, {out} out", over(mine) / over(theirs), must, aim)


def write_noise(path: Path, shape: Shape) -> None:
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(shape[0]):
            rng.standard_normal(shape[1:], dtype=np.float32).tofile(file)


def told(found: dict[str, float]) -> str:
    work = f"{found['cpu']:.2f} s, network {found['network']:.2f} s"
    return f"{work}, {found['peak'] / 2**20:.0f} MiB ({found['whole'] / 2**20:.0f} with the libraries)"


def over(found: dict[str, float]) -> float:
    return found["cpu"] - found["network"]


def exported(folder: Path, quick: bool) -> None:
    """All that follows the network, to the last file."""
    large = (80, 260, 260) if quick else (120, 400, 400)
    for classes in (5, 25, 117):
        for kind in ("plain", "cleaned"):
            ours = measure("export", classes, large, kind)
            taken = (ours["peak"] - 64 * 2**20) / ours["voxels"]
            words = {"plain": "", "cleaned": ", cleaned, with a map"}[kind]
            print(f"  {classes} classes{words}: {ours['peak'] / ours['voxels']:.2f} B/voxel in all")
            row(f"export, {classes} classes{words}, B/voxel above 64 MiB", max(taken, 0.0), 8, 6)
            if kind == "plain" and (classes < 100 or quick):
                whole = measure("resize", classes, tuple(n // 2 for n in large), large)
                row(f"  time / whole-array resize and arg-max, {classes} classes", ours["cpu"] / whole["cpu"], 1)


def streamed(folder: Path, quick: bool) -> None:
    short, long = ((96, 48, 48), (288, 48, 48)) if quick else ((192, 96, 96), (576, 96, 96))
    write_noise(folder / "image", short)
    full, slabs = middle(("full", "stream"), str(folder), short)
    same = np.array_equal(np.memmap(folder / "full", np.uint8, "r"), np.memmap(folder / "streamed", np.uint8, "r"))
    print(f"{short}, middle of 3: full {told(full)}; streamed {told(slabs)}; equal bit for bit: {same}")
    row("streamed peak / full", slabs["peak"] / full["peak"], 0.2, 0.1)
    row("streamed time / full", slabs["cpu"] / full["cpu"], 1.5, 1.2)
    write_noise(folder / "image", long)
    tripled = measure("stream", str(folder), long)
    row("streamed peak when z triples", tripled["peak"] / slabs["peak"] - 1, 0.05, 0.02, "{:+.1%}")


def scenes(folder: Path, quick: bool) -> None:
    """20,480 x 20,480 cells against a quarter of the side."""
    side = 1024 if quick else 5120
    found = []
    for shape in ((side, side), (4 * side, 4 * side)):
        write_scenes(folder, shape)
        found.append(measure("scene", str(folder), shape))
        print(f"two dates of {shape}: {told(found[-1])}")
    small, large = found
    row(f"two dates of {4 * side} x {4 * side} to a COG, whole process, GB", large["whole"] / 1e9, 1.5, 1.0)
    row(f"  whole process against {side} x {side}", large["whole"] / small["whole"] - 1, 0.1, form="{:+.1%}")
    row("  what the run needs, against the same", large["peak"] / small["peak"] - 1, 0.1, form="{:+.1%}")


PARTS = {"windows": windowed, "export": exported, "stream": streamed, "scenes": scenes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small volumes")
    parser.add_argument("--only", choices=list(PARTS), help="one part of the table")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        name, *arguments = json.loads(asked.child)
        run_child(name, arguments)
        return
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        for name, part in PARTS.items():
            if asked.only in (None, name):
                part(Path(folder), asked.quick)


if __name__ == "__main__":
    main()
