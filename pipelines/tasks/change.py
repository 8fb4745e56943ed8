"""Change between two dates from scores: where something changed, how sure that is, and for semantic change from what to
what.

Scores (C, rows, cols): binary C = 2 (unchanged, changed); semantic C = 2 + 2K, then the K classes at the earlier and at
the later date, class 0 standing for unchanged. Settings (in the bundle): `threshold` and `curve`, chosen on held-out
pairs (`change_calibration`), `classes` of semantic change, and `comparison`, what is done to the two scenes before they
are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from medmamba.errors import ConfigError
from pipelines.learning.change_losses import binary_change_loss, semantic_change_loss
from pipelines.scoring.change_calibration import calibrate

CHANGED = 1
DEFAULT_THRESHOLD = 0.5
REGISTER = ("shift", "none")
NORMALISE = ("invariant", "none")
Maps = dict[str, np.ndarray]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What makes two scenes comparable; it changes results, so it belongs to the bundle.

    `reference`: whose grid ("first", "last", "finest", "coarsest"). `register`: "shift" corrects a shift between the
    dates. `normalise`: "invariant" brings the later date to the earlier one over pixels that did not change.
    `least_area`: minimum mapping unit of the polygons in m2 (cells without a CRS).
    """

    reference: str = "first"
    resampling: str = "bilinear"
    register: str = "shift"
    normalise: str = "invariant"
    least_area: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("register", REGISTER), ("normalise", NORMALISE)):
            if getattr(self, name) not in known:
                raise ConfigError(f"comparison: {name} {getattr(self, name)!r} unknown; known: {', '.join(known)}")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Comparison:
        """Raises ConfigError for a key that does not exist."""
        unknown = sorted(set(settings) - set(cls.__dataclass_fields__))
        if unknown:
            raise ConfigError(f"comparison has no settings {unknown}; known: {', '.join(cls.__dataclass_fields__)}")
        return cls(**settings)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class BinaryChange:
    """Changed or not. Change is named from `threshold` of its probability up; `curve` calibrates the confidence."""

    domain: ClassVar[str] = "pairs"
    suffix: ClassVar[str] = "change"
    protocol: ClassVar[str] = "binary"
    written_names: ClassVar[dict[int, str]] = {0: "unchanged", CHANGED: "changed"}
    threshold: float = DEFAULT_THRESHOLD
    curve: tuple[float, ...] = ()
    comparison: Comparison = Comparison()

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> BinaryChange:
        return cls(**common(settings))

    @property
    def loss(self) -> Loss:
        """Of scores (B, 2, H, W) and labels (B, 1, H, W)."""
        return binary_change_loss

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the class rasters that `decode` gives."""
        return ("change",)

    def decode(self, scores: np.ndarray) -> Maps:
        """Scores (2, rows, cols) -> "change" 0 or 1 and "confidence" in percent, (1, rows, cols) uint8 each."""
        found = probability(scores)
        changed = found >= self.threshold
        return {"change": changed[None].astype(np.uint8), "confidence": percent(found, changed, self.curve)[None]}


@dataclass(frozen=True, kw_only=True)
class SemanticChange:
    """From what to what. `classes`: names by id, 0 unchanged. The rest as in `BinaryChange`."""

    domain: ClassVar[str] = "pairs"
    suffix: ClassVar[str] = "change"
    protocol: ClassVar[str] = "per_date"
    classes: tuple[str, ...]
    threshold: float = DEFAULT_THRESHOLD
    curve: tuple[float, ...] = ()
    comparison: Comparison = Comparison()

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> SemanticChange:
        """Raises ConfigError without two classes beside unchanged."""
        classes = tuple(map(str, settings.get("classes", ())))
        if len(classes) < 3:
            raise ConfigError(f"task semantic_change: classes {classes}; give unchanged and at least two others")
        return cls(classes=classes, **common(settings))

    @property
    def written_names(self) -> dict[int, str]:
        """Names by written value."""
        return dict(enumerate(self.classes))

    @property
    def loss(self) -> Loss:
        """Of scores (B, 2 + 2K, H, W) and labels (B, 3, H, W)."""
        return semantic_change_loss

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the class rasters that `decode` gives."""
        return ("change", "from", "to")

    def decode(self, scores: np.ndarray) -> Maps:
        """Scores (2 + 2K, rows, cols) -> "change", "from", "to" and "confidence", (1, rows, cols) uint8 each.

        On changed pixels the best class from 1 on, 0 elsewhere: class 0 of a changed pixel has no meaning.
        """
        count = len(self.classes)
        if len(scores) != 2 + 2 * count:
            raise ConfigError(f"{len(scores)} scores for {count} classes; semantic change has 2 + 2 x classes")
        found = probability(scores)
        changed = found >= self.threshold
        dates = scores[2 : 2 + count], scores[2 + count :]
        earlier, later = (np.where(changed, 1 + date[1:].argmax(0), 0).astype(np.uint8)[None] for date in dates)
        sure = percent(found, changed, self.curve)[None]
        return {"change": changed[None].astype(np.uint8), "from": earlier, "to": later, "confidence": sure}


Change = BinaryChange | SemanticChange


def common(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that both tasks have."""
    threshold = float(settings.get("threshold", DEFAULT_THRESHOLD))
    if not 0 <= threshold <= 1:
        raise ConfigError(f"threshold {threshold} of a change task must lie in 0..1")
    return {
        "threshold": threshold,
        "curve": tuple(map(float, settings.get("curve", ()))),
        "comparison": Comparison.from_settings(settings.get("comparison", {})),
    }


def probability(scores: np.ndarray) -> np.ndarray:
    """Probability of change (rows, cols) float32: the softmax of the first two scores."""
    gap = np.clip(scores[0] - scores[1], -80, 80).astype(np.float32)
    result: np.ndarray = 1 / (1 + np.exp(gap))
    return result


def percent(found: np.ndarray, changed: np.ndarray, curve: tuple[float, ...]) -> np.ndarray:
    """Calibrated probability, in percent, that what is written is right: of change where `changed`, else of none."""
    likely = calibrate(found, np.array(curve, dtype=np.float32)) if curve else found
    return np.rint(100 * np.where(changed, likely, 1 - likely)).astype(np.uint8)
