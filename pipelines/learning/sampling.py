"""Patches to learn from: cases through the contract of the bundle, kept in memory; draws by (seed, step), so that a
resumed run sees what the unbroken one would have seen; MONAI's augmentations.

Letters in this file: B batch, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from medmamba.errors import MedMambaError
from medmamba.preprocessing import Preprocessing
from medmamba.source import PaddedSource, Source, read_all
from medmamba.windows import network_size
from pipelines.cases.cohort import LabelledCase
from pipelines.cases.formats import open_source
from pipelines.config import AugmentSection
from pipelines.learning.losses import IGNORED

Vary = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]

PLACES = 20_000  # foreground cells remembered per class and case


class Example(Protocol):
    """A case to draw patches from: `shape` of its space, flat indices of cells by class (`places`), and `patch`: image
    (C, *window) float32 and labels (L, *window) of a box."""

    @property
    def id(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def places(self) -> Mapping[int, np.ndarray]: ...
    def patch(self, box: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One case as the network sees it: `image` (C, *space) float32, `labels` (*space) network classes, and up to PLACES
    flat indices of each class that occurs."""

    id: str
    image: np.ndarray
    labels: np.ndarray
    places: Mapping[int, np.ndarray]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.labels.shape

    def patch(self, box: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray]:
        return self.image[(slice(None), *box)], self.labels[box][None]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """`image` (B, C, *window), `labels` (B, L, *window) int64, and the ids of the cases."""

    image: Tensor
    labels: Tensor
    cases: tuple[str, ...]


def as_drawn(image: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A patch as it is: nothing is varied but by the augmentations that all tasks share."""
    return image, labels


def prepare(
    labelled: LabelledCase, preprocessing: Preprocessing, values: Sequence[int], ignore: int | None = None
) -> Prepared:
    """Reads a case through `preprocessing`; class k + 1 is label value `values[k]`, IGNORED the value `ignore`, and all
    others are background 0."""
    sources: dict[str, Source] = {role: open_source(path) for role, path in labelled.case.files.items()}
    image = read_all(fitted(preprocessing.forward(sources), preprocessing)).array
    stored = read_all(fitted(preprocessing.labels_forward(open_source(labelled.label)), preprocessing)).array[0]
    labels = np.zeros(stored.shape, dtype=np.int8 if len(values) < 128 else np.int32)
    for k, value in enumerate(values, start=1):
        labels[stored == value] = k
    if ignore is not None:
        labels[stored == ignore] = IGNORED
    if labels.shape != image.shape[1:]:
        raise MedMambaError(f"case {labelled.case.id!r}: labels {labels.shape} against image {image.shape[1:]}")
    return Prepared(id=labelled.case.id, image=image, labels=labels, places=find_places(labels))


def fitted(source: Source, preprocessing: Preprocessing) -> Source:
    """The source padded to at least one window, as inference pads it."""
    lacking = [max(w - n, 0) for w, n in zip(preprocessing.windowing.size, source.grid.shape, strict=True)]
    before = [m // 2 for m in lacking]
    after = [m - b for m, b in zip(lacking, before, strict=True)]
    return PaddedSource(source, before, after, preprocessing.windowing.pad) if any(lacking) else source


def find_places(labels: np.ndarray) -> dict[int, np.ndarray]:
    """Flat indices of every class above 0, thinned evenly to PLACES."""
    flat = labels.ravel()
    places = {}
    for k in np.unique(flat[flat > 0]).tolist():
        index = np.flatnonzero(flat == k)
        places[int(k)] = index[np.linspace(0, index.size - 1, min(PLACES, index.size)).astype(np.int64)]
    return places


class Sampler:
    """Batches by step: the same (seed, step) gives the same batch, whatever was drawn before.

    `share` = (i, n): part i of n of a batch of n * `batch` patches, for n processes that learn as one.
    `modality_dropout`: chance of each channel of a patch to be hidden. `vary`: what the task does to a patch first.
    """

    def __init__(
        self,
        cases: Sequence[Example],
        window: Sequence[int],
        *,
        batch: int,
        foreground_share: float,
        augment: AugmentSection,
        seed: int,
        share: tuple[int, int] = (0, 1),
        modality_dropout: float = 0.0,
        vary: Vary = as_drawn,
    ) -> None:
        self.cases, self.window, self.batch = tuple(cases), tuple(window), batch
        self.foreground_share, self.seed, self.share = foreground_share, seed, share
        self.modality_dropout, self.vary = modality_dropout, vary
        rank = len(network_size(self.window))
        self.planes, self.change = rank < len(self.window), augmentations(augment, rank)

    def draw(self, step: int) -> Batch:
        rng = np.random.default_rng((self.seed, step))
        images, labels, names = [], [], []
        part, parts = self.share
        for i in range(self.batch * parts):
            case = self.cases[int(rng.integers(len(self.cases)))]
            box = tuple(slice(s, s + w) for s, w in zip(self._start(case, rng), self.window, strict=True))
            seed = int(rng.integers(2**32))
            if i // self.batch != part:
                continue
            self.change.set_random_state(seed=seed)
            changed = self._changed(*self.vary(*case.patch(box), np.random.default_rng((seed, 1))))
            images.append(self._hidden(changed["image"].float(), seed))
            labels.append(changed["labels"].round().long())
            names.append(case.id)
        return Batch(image=torch.stack(images), labels=torch.stack(labels), cases=tuple(names))

    def _hidden(self, image: Tensor, seed: int) -> Tensor:
        """The patch (C, *window) with channels at 0 by the chance of modality dropout, never all of them."""
        if self.modality_dropout == 0:
            return image
        rng = np.random.default_rng(seed)
        hidden = rng.random(len(image)) < self.modality_dropout
        hidden[rng.integers(len(image))] &= not hidden.all()
        image[torch.from_numpy(hidden)] = 0
        return image

    def _changed(self, image: np.ndarray, labels: np.ndarray) -> dict[str, Tensor]:
        """An augmented patch; one plane is turned and scaled in itself. No MONAI tensor leaves this room."""
        patch = {"image": torch.from_numpy(image.copy()), "labels": torch.from_numpy(labels.astype(np.float32))}
        if self.planes:
            patch = {name: value[:, 0] for name, value in patch.items()}
        changed = {name: value.as_subclass(Tensor) for name, value in self.change(patch).items()}
        return {name: value[:, None] for name, value in changed.items()} if self.planes else changed

    def _start(self, case: Example, rng: np.random.Generator) -> tuple[int, ...]:
        """First cell of a patch: anywhere, or such that it holds a cell of an evenly drawn class of the case."""
        room = [n - w for n, w in zip(case.shape, self.window, strict=True)]
        if not case.places or rng.random() >= self.foreground_share:
            return tuple(int(rng.integers(r + 1)) for r in room)
        index = case.places[sorted(case.places)[int(rng.integers(len(case.places)))]]
        cell = np.unravel_index(int(index[int(rng.integers(index.size))]), case.shape)
        return tuple(int(np.clip(c - rng.integers(w), 0, r)) for c, w, r in zip(cell, self.window, room, strict=True))


def augmentations(settings: AugmentSection, rank: int) -> Any:
    """MONAI's chain on {"image", "labels"}; geometry moves both, intensities only the image."""
    from monai.transforms import (
        Compose,
        RandAdjustContrastd,
        RandAffined,
        RandFlipd,
        RandGaussianNoised,
        RandScaleIntensityd,
    )

    both, image = ["image", "labels"], ["image"]
    chain: list[Any] = [RandFlipd(both, prob=settings.flip, spatial_axis=a) for a in range(rank) if settings.flip > 0]
    if settings.affine > 0:
        turn = np.deg2rad(settings.rotate_degrees)
        chain.append(
            RandAffined(
                both,
                prob=settings.affine,
                rotate_range=[turn] * (rank if rank == 3 else 1),
                scale_range=[settings.zoom] * rank,
                mode=["bilinear", "nearest"],
                padding_mode="border",
            )
        )
    if settings.gamma > 0:
        chain.append(RandAdjustContrastd(image, prob=settings.gamma, gamma=settings.gamma_range))
    if settings.scale > 0:
        chain.append(RandScaleIntensityd(image, prob=settings.scale, factors=settings.scale_factor))
    if settings.noise > 0:
        chain.append(RandGaussianNoised(image, prob=settings.noise, std=settings.noise_std))
    return Compose(chain)
