"""Labels that overlap: their loss against MONAI's, written in class order, learned and scored region by region."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medmamba.ensemble import OUTPUTS, MeanOfFolds
from medmamba.errors import ConfigError
from pipelines.cases import cohort
from pipelines.config import TrainRun
from pipelines.learning.losses import IGNORED, dice_bce
from pipelines.learning.sampling import open_source
from pipelines.learning.train import train
from pipelines.serving.predict import Predictor, predict_labels
from pipelines.tasks import build_task
from tests.pipelines.cohort_maker import run_values, write_cohort

TUMOUR = {"whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}
MEMBERS = torch.tensor([[v in values for v in range(4)] for values in TUMOUR.values()])
SETTINGS = {
    "name": "regions",
    "labels": {"1": "oedema", "2": "necrosis", "3": "enhancing"},
    "regions": [{"name": n, "values": v, "written": w} for (n, v), w in zip(TUMOUR.items(), (1, 2, 3), strict=True)],
}


@pytest.mark.parametrize("space", [(5, 4), (3, 4, 5)])
def test_the_loss_equals_monai_on_region_masks(space: tuple[int, ...]) -> None:
    from monai.losses import DiceLoss

    torch.manual_seed(0)
    scores = torch.randn(2, 3, *space, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (2, 1, *space))
    masks = torch.cat([torch.isin(labels, torch.tensor(values)) for values in TUMOUR.values()], 1).double()
    theirs = DiceLoss(sigmoid=True, batch=True)(scores, masks) + nn.BCEWithLogitsLoss()(scores, masks)
    (wanted,) = torch.autograd.grad(theirs, scores)
    ours = dice_bce(scores, labels, members=MEMBERS)
    (gradient,) = torch.autograd.grad(ours, scores)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, wanted)


def test_ignored_cells_enter_no_sum() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 8, 6)
    labels = torch.randint(0, 4, (2, 1, 8, 6))
    labels[:, :, 5:] = IGNORED
    whole = dice_bce(scores[:, :, :5], labels[:, :, :5], members=MEMBERS)
    torch.testing.assert_close(dice_bce(scores, labels, members=MEMBERS), whole)


def test_regions_are_written_in_class_order() -> None:
    """Cells: nothing, whole, whole and core, all three, enhancing alone (the network does not know they are nested)."""
    found = np.array([[0, 1, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]])
    scores = np.where(found, 0.1, -0.1).astype(np.float32)
    labels = build_task(SETTINGS).decode(scores)
    assert labels.tolist() == [[0, 1, 2, 3, 3]]
    assert labels.dtype == np.uint8
    skipped = build_task(SETTINGS).decode(np.zeros((3, 2), np.float32))  # a window that was not shown to the network
    assert not skipped.any()


def test_the_mean_of_folds_is_that_of_their_probabilities() -> None:
    torch.manual_seed(0)
    folds: list[nn.Module] = [nn.Conv2d(1, 3, 1) for _ in range(4)]
    x = 20 * torch.randn(2, 1, 5, 5)
    wanted = torch.stack([f(x).double().sigmoid() for f in folds]).mean(0)
    torch.testing.assert_close(
        MeanOfFolds(folds, OUTPUTS["sigmoid"])(x).double().sigmoid(), wanted, atol=1e-6, rtol=1e-5
    )


def test_regions_are_learned_and_scored(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "data", cases=4, size=12)
    values = run_values(manifest, tmp_path / "run", epochs=2, steps_per_epoch=12, validation_share=0.5, lr=2e-2)
    regions = {"regions": {"both": [3, 7], "bright": [3]}, "regions_class_order": [7, 3], "cleaning": "none"}
    bundle = train(TrainRun.check(values | regions))
    assert bundle.classes == 2
    told = json.loads((tmp_path / "run/validation/evaluation.json").read_text())
    assert [(row["label"], row["name"]) for row in told["labels"]] == [(3, "bright"), (7, "both")]
    history = json.loads((tmp_path / "run/checkpoint/checkpoint.json").read_text())["history"]
    losses = [loss for epoch in history for loss in epoch["losses"]]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])
    case = cohort.read(manifest, ["t1"])[0].case
    labels, _ = predict_labels(Predictor.load(bundle, device="cpu"), {"t1": open_source(case.files["t1"])})
    assert set(np.unique(labels)) <= {0, 3, 7}


def test_faults_of_regions_are_told(tmp_path: Path) -> None:
    values = run_values(tmp_path / "m.csv", tmp_path)
    for wrong, words in (
        ({"regions": {"both": [3, 7]}}, r"regions_class_order \[\]: give a label value for each"),
        ({"regions": {"both": [3, 7], "b": [3]}, "regions_class_order": [7, 7]}, "give a label value for each"),
        ({"regions": {"bright": [3]}, "regions_class_order": [3]}, r"regions cover \[3\]; they must cover .*\[3, 7\]"),
    ):
        with pytest.raises(ConfigError, match=words):
            TrainRun.check(values | wrong)
    with pytest.raises(ConfigError, match="task regions needs regions"):
        build_task({**SETTINGS, "regions": []})
