"""Who learns best on equal terms: `python benchmarks/learning.py [--steps 200 | --seconds 90] [--only NAME ...]`.

Each network is trained by the production loop (same patches, loss, optimizer and schedule) and scored by the production
`predict` on held-out cases, at the best of three learning rates, which are compared on the validation part with seed 0.
Equal terms: the same number of steps, or with `--seconds` as many steps as fit in that CPU time of one thread.
Dice has its 95 % bootstrap interval over cases and seeds. Every finished run is a line of a file in `--folder`, so a
long table can be made in several sittings. Cohorts: `mni`, one real head deformed, with inverted contrast, bias fields
and noise, and when the shared data stand beside the project `cord` (two images, one to learn from) and `ct` (two parts
of one body).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine

from medmamba.memory import measure
from pipelines.cases import cohort
from pipelines.config import TrainRun
from pipelines.demo import cohort as demo_cohort
from pipelines.learning.losses import dice_ce
from pipelines.learning.train import DivergedError, train
from pipelines.networks import NETWORKS
from pipelines.scoring.evaluate import evaluate_bundle
from pipelines.scoring.metrics import interval

RATES = (1e-3, 3e-3, 1e-2)
PROBES = 24  # steps, to learn how long one takes
WINDOW = (32, 32, 32)
FLAGSHIP = {"widths": [16, 32, 64], "depths": [2, 2, 2]}
SHORT = {**FLAGSHIP, "depths": [1, 1, 1]}
MIXERS = ("none", "s6", "ssd", "vssd", "gla", "hydra")
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"mamba_unet {m}": ("mamba_unet", {**FLAGSHIP, "mixer": m}) for m in MIXERS},
    "mamba_unet s6, short": ("mamba_unet", {**SHORT, "mixer": "s6", "mixer_from": 2}),
    "mamba_unet none, short": ("mamba_unet", {**SHORT, "mixer": "none"}),
    "mamba_unet none, not invertible": ("mamba_unet", {**FLAGSHIP, "mixer": "none", "down": "strided"}),
    "segresnet": ("segresnet", {"init_filters": 8, "blocks_down": [1, 2, 2], "blocks_up": [1, 1]}),
    "dynunet": (
        "dynunet",
        {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [16, 32, 64]},
    ),
    "swinunetr": (  # its five halvings leave one cell of a window, too few for the instance norm it has by default
        "swinunetr",
        {"feature_size": 12, "depths": [1] * 4, "num_heads": [1, 2, 4, 8], "norm_name": ["group", {"num_groups": 4}]},
    ),
    "unet": ("unet", {"channels": [16, 32, 64], "strides": [2, 2], "norm": "instance"}),
    "unet, wide": ("unet", {"channels": [48, 96, 192], "strides": [2, 2], "norm": "instance"}),  # the flagship's memory
}  # fmt: skip
PRE: dict[str, dict[str, Any]] = {
    "mni": {"channels": [{"role": "t1"}], "spacing_mm": [3.0, 3.0, 3.0]},
    "cord": {"channels": [{"role": "t2"}], "spacing_mm": [1.0, 1.0, 1.0]},
    "ct": {"channels": [{"role": "ct", "clip": [-200, 300], "scaling": "fixed", "scale": 100.0}]},
}
BODY = {  # structures that both parts of the body show, by their numbers in TotalSegmentator's map
    "bone": (*range(25, 51), 75, 76, 77, 78, *range(92, 118)),
    "deep back muscle": (86, 87),
    "colon": (20,),
}
LABELS = {
    "mni": demo_cohort.TISSUES,
    "cord": {1: "spinal cord"},
    "ct": dict(enumerate(BODY, 1)),
}
AUGMENT = {
    "mni": {"flip": 0.0, "affine": 0.0, "noise": 0.2, "gamma": 0.2, "scale": 0.2},
    "cord": {},
    "ct": {},
}


def cohorts(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Name -> manifests (train, test), written below `folder` where they are not."""
    mni = folder / "mni"
    if not (mni / "done").exists():
        demo_cohort.build(mni, train=32, test=6, looks=demo_cohort.HARD)
        (mni / "done").touch()
    found = {"mni": (mni / "train/manifest.csv", mni / "test/manifest.csv")}
    shared = Path(os.environ.get("MEDMAMBA_SHARED", Path(__file__).parents[2] / "shared")) / "data"
    if shared.is_dir():
        mr = shared / "mr"
        rows = [("a", mr / "t2.nii.gz", mr / "t2_seg-manual.nii.gz"),
                ("b", mr / "t2_fake_lesion.nii.gz", mr / "t2_fake_lesion_sc_seg.nii.gz")]  # fmt: skip
        found["cord"] = (
            written(folder / "cord/train.csv", "t2", rows[:1]),
            written(folder / "cord/test.csv", "t2", rows[1:]),
        )
        found["ct"] = parts_of_a_body(folder / "ct", shared / "ct_totalseg")
    return found


def written(path: Path, role: str, rows: list[tuple[str, Path, Path]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([f"case,{role},label", *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def parts_of_a_body(folder: Path, data: Path) -> tuple[Path, Path]:
    """The volume below the labelled slab of 30 slices to learn from, the slab to be scored on."""
    import nibabel

    image, theirs = nibabel.load(data / "example_ct.nii.gz"), nibabel.load(data / "example_seg_fast_force_split.nii.gz")
    values = np.asarray(theirs.dataobj)
    ours = np.select([np.isin(values, wanted) for wanted in BODY.values()], list(LABELS["ct"]), 0).astype(np.uint8)
    label = nibabel.Nifti1Image(ours, theirs.affine)
    folder.mkdir(parents=True, exist_ok=True)
    manifests = []
    for name, rows in (("train", slice(0, 78)), ("test", slice(82, 112))):
        nibabel.save(image.slicer[:, :, rows], folder / f"{name}_ct.nii.gz")
        nibabel.save(label.slicer[:, :, rows], folder / f"{name}_label.nii.gz")
        row = (name, folder / f"{name}_ct.nii.gz", folder / f"{name}_label.nii.gz")
        manifests.append(written(folder / f"{name}.csv", "ct", [row]))
    return manifests[0], manifests[1]


def runs(options: argparse.Namespace, record: list[dict[str, Any]]) -> Iterator[tuple[str, str, float, int]]:
    """What is still to be done: the rates with seed 0, then the best rate with the other seeds."""
    done = {(r["cohort"], r["network"], r["rate"], r["seed"]) for r in record}
    names = options.only or list(CONTENDERS)
    first = [(c, n, rate, 0) for c in options.cohorts for n in names for rate in RATES]
    later = [
        (c, n, best_rate(record, c, n), seed)
        for c in options.cohorts
        for n in names
        for seed in range(1, options.seeds)
    ]
    for run in first if any(run not in done for run in first) else later:
        if run not in done:
            yield run


def best_rate(record: list[dict[str, Any]], name: str, network: str) -> float:
    """The rate with the best validation Dice (training loss where nothing is held out) with seed 0."""
    tried = [r for r in record if (r["cohort"], r["network"], r["seed"]) == (name, network, 0)]
    return max(tried, key=lambda r: r["chosen_by"])["rate"] if tried else RATES[1]


def run_of(name: str, network: str, rate: float, seed: int, steps: int, manifest: Path, output: str) -> TrainRun:
    """What every contender is trained by, but for network and rate."""
    architecture, network_settings = CONTENDERS[network]
    settings = {
        "name": "learning", "manifest": str(manifest), "output": output, "seed": seed, "lr": rate, "batch": 2,
        "architecture": architecture, "network": network_settings, "labels": LABELS[name],
        "other_labels": "background", "augment": AUGMENT[name], "foreground_share": 0.7,
        "preprocessing": {**PRE[name], "window": WINDOW, "overlap": [8, 8, 8]},
        "epochs": 1, "steps_per_epoch": steps, "warmup_steps": steps // 20,
        "validation_share": 0.125 if name == "mni" else 0.0,
    }  # fmt: skip
    return TrainRun.check(settings)


def one_run(
    name: str, network: str, rate: float, seed: int, steps: int, manifests: tuple[Path, Path]
) -> dict[str, Any]:
    """Trains and scores; CPU seconds are those of the training alone."""
    with tempfile.TemporaryDirectory() as output:
        run, began = run_of(name, network, rate, seed, steps, manifests[0], output), time.process_time()
        figures: dict[str, float] = {}
        told = {"cohort": name, "network": network, "rate": rate, "seed": seed, "steps": steps}
        try:
            bundle = train(run, log=lambda found, _: figures.update(found))
        except DivergedError:
            return {**told, "seconds": time.process_time() - began, "chosen_by": -np.inf, "dice": {"diverged": 0.0}}
        seconds = time.process_time() - began
        role = PRE[name]["channels"][0]["role"]
        scores = evaluate_bundle(bundle, cohort.read(manifests[1], [role]), device="cpu")
    dice = {
        row.case: [r.score.dice for r in scores.rows if r.case == row.case and r.score.kind != "TN"]
        for row in scores.rows
    }
    return {
        **told, "seconds": seconds,
        "chosen_by": figures.get("validation_dice", -figures["loss"]),
        "dice": {case: float(np.mean(values)) for case, values in dice.items() if values},
    }  # fmt: skip


@cache
def steps_in(seconds: float, name: str, network: str, manifests: tuple[Path, Path]) -> int:
    """How many steps of the production loop, patches and all, fit in CPU seconds of this machine, as it is now."""
    clock: list[float] = []

    def tick(done: int, _: int) -> None:
        clock.append(time.process_time())
        if done == PROBES:
            raise EnoughError

    with tempfile.TemporaryDirectory() as output, suppress(EnoughError):
        train(run_of(name, network, RATES[0], 0, PROBES, manifests[0], output), progress=tick)
    return max(1, round(seconds / float(np.median(np.diff(clock)))))


class EnoughError(Exception):
    """The probe has seen its steps."""


def size_of(network: str, classes: int) -> tuple[int, float]:
    """Parameters, and the peak of live bytes of a training step in MiB."""
    architecture, settings = CONTENDERS[network]
    built = NETWORKS[architecture]({**settings, "in_channels": 1, "out_channels": classes, "spatial_dims": 3}).train()
    labels = torch.zeros(2, 1, *WINDOW, dtype=torch.long)
    cost = measure(built, torch.zeros(2, 1, *WINDOW), labels, dice_ce)
    return sum(p.numel() for p in built.parameters()), cost.peak / 2**20


def table(record: list[dict[str, Any]], name: str) -> list[str]:
    """A line a network, best first."""
    lines: list[tuple[float, str]] = []
    for network in CONTENDERS:
        rate = best_rate(record, name, network)
        mine = [r for r in record if (r["cohort"], r["network"], r["rate"]) == (name, network, rate)]
        if not mine:
            continue
        values = [v for r in mine for v in r["dice"].values()]
        groups = [f"{case}/{r['seed']}" for r in mine for case in r["dice"]]
        bounds = interval(values, groups)
        between = f"[{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "one case"
        parameters, peak = size_of(network, len(LABELS[name]) + 1)
        seeds, seconds, steps = len(mine), np.mean([r["seconds"] for r in mine]), np.mean([r["steps"] for r in mine])
        text = f"{network:<32}{np.mean(values):.3f} {between:<16}{seeds:>3}{rate:>9.0e}"
        lines.append((-float(np.mean(values)), f"{text}{parameters:>12,}{peak:>9.0f}{steps:>7.0f}{seconds:>7.0f}"))
    return [text for _, text in sorted(lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, help="CPU seconds of training a run, instead of --steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(CONTENDERS))
    parser.add_argument("--cohorts", nargs="*", default=["mni"], choices=list(PRE))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "medmamba-learning")
    options = parser.parse_args()
    torch.set_num_threads(1)
    terms = f"{options.seconds:g}s" if options.seconds else f"{options.steps}"
    file = options.folder / f"record-{terms}.jsonl"
    places: Mapping[str, tuple[Path, Path]] = cohorts(options.folder)
    read = lambda: [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []  # noqa: E731
    while todo := next(runs(options, read()), None):
        place = places[todo[0]]
        steps = steps_in(options.seconds, todo[0], todo[1], place) if options.seconds else options.steps
        result = one_run(*todo, steps, place)
        with file.open("a") as out:
            out.write(json.dumps(result) + "\n")
        print(f"{todo}: Dice {np.mean(list(result['dice'].values())):.3f}, {result['seconds']:.0f} s", file=sys.stderr)
    print(machine())
    for name in options.cohorts:
        told = f"as many steps as fit in {options.seconds:g} CPU s" if options.seconds else f"{options.steps} steps"
        print(f"\n{name}, {told}, of 2 x 32^3, one thread")
        print(
            f"{'network':<32}{'Dice':<6}{'95 %':<16}{'seeds':>3}{'lr':>8}{'parameters':>12}{'peak MiB':>9}"
            f"{'steps':>7}{'CPU s':>7}"
        )
        print("\n".join(table(read(), name)))


if __name__ == "__main__":
    main()
