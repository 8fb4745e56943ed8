"""The run file of a training: pydantic models, frozen, unknown keys refused, every fault told at once; TOML on disk."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medmamba.errors import ConfigError, MedMambaError
from medmamba.preprocessing import Channel, Preprocessing
from medmamba.windows import Windowing
from pipelines.cases.case import SAFE
from pipelines.networks import segmentation_settings


class Section(BaseModel):
    """Frozen, strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ChannelSection(Section):
    """One input channel in order: manifest column `role`, clip in file units, scaling "zscore" or "fixed"; the 1 % and
    99 % quantiles of an image lie in `low_between` and `high_between`, else it is refused as `wrong_units`."""

    role: str
    clip: tuple[float, float] | None = None
    scaling: Literal["zscore", "fixed"] = "zscore"
    shift: float = 0.0
    scale: float = 1.0
    foreground_above: float | None = None
    low_between: tuple[float, float] | None = None
    high_between: tuple[float, float] | None = None


class PreprocessingSection(Section):
    """The contract with the data. `window` is also the patch of training; (1, y, x) shows planes to a 2D network.

    `spacing_mm` in array order (z, y, x), none = the file's own; `overlap` in cells, none = half the window.
    `skip_below`: windows without a larger value are background unseen; `mirror`: axes of test-time augmentation.
    `modality_dropout`: chance that a channel is hidden from a patch in training; above 0 a case may lack channels.
    """

    channels: tuple[ChannelSection, ...] = Field(min_length=1)
    window: tuple[int, ...] = Field(min_length=2, max_length=3)
    overlap: tuple[int, ...] | None = None
    spacing_mm: tuple[float, ...] | None = None
    canonical: bool = True
    weights: Literal["gaussian", "ramp"] = "gaussian"
    pad: Literal["edge", "constant"] = "edge"
    skip_below: float | None = None
    mirror: tuple[int, ...] = ()
    modality_dropout: float = Field(default=0.0, ge=0, lt=1)

    def contract(self) -> Preprocessing:
        """The very object that training, validation and the bundle use."""
        overlap = self.overlap or tuple(w // 2 for w in self.window)
        windowing = Windowing(
            size=self.window, overlap=overlap, weights=self.weights, pad=self.pad, skip_below=self.skip_below
        )
        channels = tuple(Channel(**dict(c)) for c in self.channels)
        return Preprocessing(
            channels=channels,
            windowing=windowing,
            canonical=self.canonical,
            spacing=self.spacing_mm,
            mirror=self.mirror,
            modality_dropout=self.modality_dropout,
        )

    @model_validator(mode="after")
    def _possible(self) -> PreprocessingSection:
        roles = [c.role for c in self.channels]
        if len(set(roles)) != len(roles):
            raise ValueError(f"roles {roles}: each may stand once")
        try:
            self.contract()
        except MedMambaError as error:
            raise ValueError(str(error)) from error
        return self


class AugmentSection(Section):
    """Chance of each change per patch, 0 = never; sizes are the largest that are drawn."""

    flip: float = Field(default=0.5, ge=0, le=1)  # per axis
    affine: float = Field(default=0.3, ge=0, le=1)
    rotate_degrees: float = Field(default=15.0, ge=0, le=180)
    zoom: float = Field(default=0.1, ge=0, lt=1)
    noise: float = Field(default=0.2, ge=0, le=1)
    noise_std: float = Field(default=0.1, ge=0)
    gamma: float = Field(default=0.3, ge=0, le=1)
    gamma_range: tuple[float, float] = (0.7, 1.5)
    scale: float = Field(default=0.3, ge=0, le=1)
    scale_factor: float = Field(default=0.2, ge=0, lt=1)


class LabelCode(Section):
    """What a label is in a coding scheme, for DICOM: `type` and, unless it is anatomy, `category`, each as
    (scheme, value, meaning), for example ("SCT", "10200004", "Liver")."""

    type: tuple[str, str, str]
    category: tuple[str, str, str] = ("SCT", "123037004", "Anatomical Structure")


class RunFile(Section):
    """What every bundle has: its name, network and card; and how a file of settings is read.

    `network`: settings of the architecture but in_channels, out_channels and spatial_dims.
    """

    paths: ClassVar[tuple[str, ...]] = ("manifest", "dataset", "output")
    name: str
    architecture: str = "mamba_unet"
    network: Mapping[str, Any] = Field(default_factory=dict)
    card: Mapping[str, Any] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        if not SAFE.fullmatch(name):
            raise ValueError(f"{name!r} becomes part of a folder name; use letters, digits, '.', '_' and '-'")
        return name

    @classmethod
    def load(cls, path: Path, **changes: Any) -> Self:
        """The file (TOML), with `changes` (flags) over it; relative paths count from the file's folder.

        Raises ConfigError listing every fault.
        """
        values = read_toml(path)
        for key in cls.paths:
            if isinstance(values.get(key), str):
                values[key] = str(path.parent / values[key])
        values.update({k: v for k, v in changes.items() if v is not None})
        return cls.check(values, where=str(path))

    @classmethod
    def check(cls, values: Mapping[str, Any], *, where: str = "run") -> Self:
        """From plain values. Raises ConfigError with one line a fault."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(f"{where}: {error.error_count()} faults\n{told(error)}") from None


class Contract(RunFile):
    """What a bundle promises: its name, network, preprocessing and labels. `--contract FILE.toml` of import-weights.

    `labels`: value in the label files -> name; the network's classes follow the values. `codes`: label value -> its
    code, where it has one. `regions`: name -> label values, where the network is to learn labels that overlap; found
    regions are written as the values of `regions_class_order`, one over the other (nnU-Net's region-based training).
    """

    preprocessing: PreprocessingSection
    labels: dict[int, str] = Field(min_length=1)
    codes: dict[int, LabelCode] = Field(default_factory=dict)
    regions: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    regions_class_order: tuple[int, ...] = ()

    @field_validator("labels")
    @classmethod
    def _positive_labels(cls, labels: dict[int, str]) -> dict[int, str]:
        if min(labels) < 1:
            raise ValueError(f"{min(labels)} is not a label value; 0 is background and negative values have no meaning")
        return dict(sorted(labels.items()))

    @model_validator(mode="after")
    def _regions_of_labels(self) -> Self:
        covered = {value for values in self.regions.values() for value in values}
        order = self.regions_class_order
        if self.regions and (covered != set(self.labels) or not all(self.regions.values())):
            raise ValueError(f"regions cover {sorted(covered)}; they must cover the labels {list(self.labels)}")
        if len(order) != len(self.regions) or len(set(order)) != len(order) or not set(order) <= set(self.labels):
            raise ValueError(
                f"regions_class_order {list(order)}: give a label value for each of the regions {list(self.regions)}, "
                "the one that is written where it is found; later ones are written over earlier ones"
            )
        return self

    @model_validator(mode="after")
    def _codes_of_labels(self) -> Self:
        if unknown := sorted(set(self.codes) - set(self.labels)):
            raise ValueError(f"codes of {unknown}, which are no labels; known: {list(self.labels)}")
        return self

    @property
    def network_config(self) -> dict[str, Any]:
        """All settings of the network: those of the file, the channels, the classes and the rank."""
        channels, classes = len(self.preprocessing.channels), len(self.regions) or len(self.labels) + 1
        size = self.preprocessing.contract().windowing.network_size
        return segmentation_settings(
            self.architecture, self.network, in_channels=channels, out_channels=classes, size=size
        )

    @property
    def task(self) -> dict[str, Any]:
        """The bundle's task entry: network class k -> name, and the value written for it."""
        classes = list(enumerate(self.labels.items(), start=1))
        names = {str(k): name for k, (_, name) in classes}
        codes = {str(k): self.codes[value].model_dump(mode="json") for k, (value, _) in classes if value in self.codes}
        entry = {"name": "segmentation", "labels": names, "values": {str(k): value for k, (value, _) in classes}}
        told = zip(self.regions.items(), self.regions_class_order, strict=True)
        regions = [{"name": name, "values": list(values), "written": written} for (name, values), written in told]
        kind = {"name": "regions", "regions": regions, "outputs": "sigmoid"} if regions else {}
        return entry | kind | ({"codes": codes} if codes else {})


class Learning(Section):
    """How a network learns, whatever it learns.

    Length of training: `epochs` of `steps_per_epoch` batches of patches. `validation_share` of the groups is held out,
    unless the data say which. `debug` watches the layers and names the first that meets NaN or infinity. `memory`: what
    a reversible network keeps for the backward pass; "auto" takes the fastest mode whose step fits in `ram` ("4G";
    none: half of the device).
    """

    output: Path
    epochs: int = Field(default=10, ge=1)
    steps_per_epoch: int = Field(default=50, ge=1)
    batch: int = Field(default=2, ge=1)
    lr: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0)
    foreground_share: float = Field(default=0.5, ge=0, le=1)
    validation_share: float = Field(default=0.2, ge=0, lt=1)
    validate_every: int = Field(default=1, ge=1)
    augment: AugmentSection = AugmentSection()
    device: str = "auto"
    amp: bool = True
    memory: Literal["auto", "stored", "stages", "full"] = "auto"
    ram: str | None = None
    debug: bool = False

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


class TrainRun(Contract, Learning):
    """`medmamba train RUN.toml` on a labelled cohort: a manifest, whose `split` column rules where there is one.

    Cells labelled `ignore_label` enter neither loss nor scores. `cleaning`: "auto" keeps for each label the steps
    (largest component, holes filled) that raise its Dice on the held-out cases. `folds`: with more than one, so many
    networks learn, each without one fold of the groups (the manifest's `fold` column, else drawn, each site spread
    evenly); the bundle is their mean. Test cases of the `split` column stay out.
    """

    manifest: Path
    other_labels: Literal["refuse", "background"] = "refuse"
    ignore_label: int | None = None
    cleaning: Literal["auto", "none"] = "auto"
    folds: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _ignored_is_no_label(self) -> Self:
        if self.ignore_label is not None and self.ignore_label in (0, *self.labels):
            raise ValueError(f"ignore_label {self.ignore_label} is background or one of the labels; give its own value")
        return self


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a run file. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None


def told(error: ValidationError) -> str:
    """One line a fault: where, what was found, what is wrong."""
    lines = []
    for fault in error.errors(include_url=False):
        place = ".".join(str(p) for p in fault["loc"]) or "run"
        found = "" if fault["type"] == "missing" else f" (found {fault['input']!r})"
        message = "unknown key; remove or rename it" if fault["type"] == "extra_forbidden" else fault["msg"]
        lines.append(f"  {place}: {message}{found if len(found) < 200 else ''}")
    return "\n".join(lines)
