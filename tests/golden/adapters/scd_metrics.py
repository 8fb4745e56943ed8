"""Semantic and binary change metrics; the case's arrays are label maps of four images."""

from typing import Any

import numpy as np
import torch

from pipelines.scoring.change_metrics import ChangeTally
from tests.golden.case import Built, Tensors

ORDER = ("oa_images", "miou", "sek", "f_scd", "kappa")
BINARY = ("recall", "precision", "oa", "f1", "iou", "kappa")


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    return Built(forward=lambda maps: scores({name: value.numpy() for name, value in maps.items()}, hparams))


def scores(maps: dict[str, np.ndarray], hparams: dict[str, Any]) -> Tensors:
    tallies = {name: ChangeTally(name, hparams["num_classes"]) for name in ("per_date", "from_to")}
    binary = ChangeTally("binary")
    for number in range(len(maps["label_cd"])):
        prediction = tuple(maps[name][number] for name in ("pred_cd", "pred_t1_raw", "pred_t2_raw"))
        reference = tuple(maps[name][number] for name in ("label_cd", "label_t1", "label_t2"))
        for tally in tallies.values():
            tally.add_semantic(str(number), prediction, reference)
        binary.add_binary(str(number), prediction[0], reference[0])
    return {
        "per_time": row(tallies["per_date"], ORDER),
        "from_to": row(tallies["from_to"], ORDER),
        "n_negative_from_to": torch.tensor(float(tallies["from_to"].negative_codes), dtype=torch.float64),
        "hist_per_time": torch.from_numpy(tallies["per_date"].matrices.sum(0)).double(),
        "binary": row(binary, BINARY),
    }


def row(tally: ChangeTally, names: tuple[str, ...]) -> torch.Tensor:
    figures = tally.figures()
    return torch.tensor([np.nan if figures[name] is None else figures[name] for name in names], dtype=torch.float64)
