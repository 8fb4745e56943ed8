"""The run file of a change training: a data set of the field as it was downloaded, and one stretch for both dates."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from medmamba.errors import ConfigError, MedMambaError
from medmamba.preprocessing import Channel, Preprocessing
from medmamba.windows import Windowing
from pipelines.config import AugmentSection, Learning, RunFile, Section, TrainRun, read_toml
from pipelines.layouts.change import ChangeSet, read_layout
from pipelines.networks import segmentation_settings
from pipelines.tasks.change import Comparison

ROLES = ("before", "after")
SPLITS = ("train", "validation")


class BandSection(Section):
    """One band: clip in file units, then (x - shift) / scale; the 1 % and 99 % quantiles of a scene in the right units
    lie in `low_between` and `high_between`."""

    name: str
    clip: tuple[float, float] | None = None
    shift: float = 127.5
    scale: float = 127.5
    low_between: tuple[float, float] | None = None
    high_between: tuple[float, float] | None = None


EIGHT_BITS = tuple(BandSection(name=name) for name in ("red", "green", "blue"))


class PairSection(Section):
    """The contract with a pair: every band is scaled alike on both dates. `window` is also the patch of training."""

    window: tuple[int, int] = (256, 256)
    overlap: tuple[int, int] | None = None
    bands: tuple[BandSection, ...] = Field(default=EIGHT_BITS, min_length=1)
    weights: Literal["gaussian", "ramp"] = "gaussian"

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The bands of the earlier date, then those of the later one."""
        return tuple(
            Channel(role=role, volume=number, scaling="fixed", **band.model_dump(exclude={"name"}))
            for role in ROLES
            for number, band in enumerate(self.bands)
        )

    def contract(self) -> Preprocessing:
        """The very object that training, validation and the bundle use."""
        overlap = self.overlap or (self.window[0] // 2, self.window[1] // 2)
        windowing = Windowing(size=self.window, overlap=overlap, weights=self.weights)
        return Preprocessing(channels=self.channels, windowing=windowing, canonical=False)

    @model_validator(mode="after")
    def _possible(self) -> PairSection:
        try:
            self.contract()
        except MedMambaError as error:
            raise ValueError(str(error)) from error
        return self


class PairAugmentSection(AugmentSection):
    """`swap`: the dates exchanged; `same`: one date twice, nothing changed; `light`: gain and offset of each band drawn
    for each date apart (offset in scaled values); `turn`: a quarter turn. The rest is done to both dates alike."""

    swap: float = Field(default=0.5, ge=0, le=1)
    same: float = Field(default=0.15, ge=0, le=1)
    light: float = Field(default=0.5, ge=0, le=1)
    light_gain: float = Field(default=0.2, ge=0, lt=1)
    light_offset: float = Field(default=0.1, ge=0)
    turn: float = Field(default=0.5, ge=0, le=1)


class ChangeRun(RunFile, Learning):
    """`medmamba train RUN.toml` with `dataset` = the folder of a change data set (LEVIR-CD, SECOND, Landsat-SCD, ...).

    `change`: "binary" learns where, "semantic" also from what to what. `layout` and `order` (of class ids) are
    recognised unless given. `comparison`: what production does to two scenes before they are compared; training does
    the same, but for the registration: the pairs of a data set lie on each other.
    """

    dataset: Path
    change: Literal["binary", "semantic"] = "binary"
    layout: str | None = None
    order: str | None = None
    preprocessing: PairSection = PairSection()
    augment: PairAugmentSection = PairAugmentSection()
    comparison: Mapping[str, Any] = Field(default_factory=dict)

    @field_validator("comparison")
    @classmethod
    def _known_comparison(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return Comparison.from_settings(values).to_json()
        except (ConfigError, TypeError) as error:
            raise ValueError(str(error)) from error

    @cached_property
    def found(self) -> ChangeSet:
        """The data set. Raises ConfigError."""
        return read_layout(self.dataset, layout=self.layout, order=self.order)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, 0 unchanged; none for binary change. Raises ConfigError without classes to learn."""
        if self.change == "binary":
            return ()
        if self.found.classes is None:
            raise ConfigError(f'{self.found.describe()}; change = "semantic" wants classes at both dates')
        return self.found.classes.names

    @property
    def network_config(self) -> dict[str, Any]:
        """All settings of the network: those of the file, the bands of both dates and the scores."""
        channels, scores = len(self.preprocessing.channels), 2 + 2 * len(self.classes)
        return segmentation_settings(
            self.architecture, self.network, in_channels=channels, out_channels=scores, size=self.preprocessing.window
        )

    @property
    def task(self) -> dict[str, Any]:
        """The bundle's task entry; threshold and calibration come from the held-out pairs."""
        entry: dict[str, Any] = {"name": f"{self.change}_change", "comparison": dict(self.comparison)}
        return {**entry, "classes": list(self.classes)} if self.classes else entry


Run = TrainRun | ChangeRun


def load_run(path: Path, **changes: Any) -> Run:
    """The run file of a training: a `dataset` of change, else a manifest. Raises ConfigError listing every fault."""
    kind = ChangeRun if "dataset" in read_toml(path) else TrainRun
    return kind.load(path, **changes)
