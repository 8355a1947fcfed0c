"""Records and detections → where AP is lost, how to set the threshold, and which annotations look wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from boxwright.evaluation.breakdown import Breakdown
from boxwright.evaluation.calibration import Calibration
from boxwright.evaluation.confusion import Confusion
from boxwright.evaluation.curves import Curves
from boxwright.evaluation.errors import Errors
from boxwright.evaluation.review import Review
from boxwright.evaluation.thresholds import Thresholds


@dataclass(frozen=True)
class Picture:
    """How well one picture was done at the recommended threshold."""

    id: str
    right: int  # detections
    wrong: int  # detections
    missed: int  # objects
    ignored: int  # detections on difficult objects and crowd regions
    f1: float  # 2 right / (2 right + wrong + missed); NaN where all three are 0


@dataclass(frozen=True)
class Analysis:
    """All that is known about detections beside their scores; `as_json` gives fields by their names."""

    iou: float  # from which on a box fits
    classes: tuple[str, ...]
    images: int
    objects: int  # that count: neither difficult nor crowd
    ignored_objects: int  # difficult objects and crowd regions
    detections: int
    errors: Errors
    thresholds: Thresholds
    curves: Curves
    calibration: Calibration
    confusion: Confusion
    breakdown: Breakdown
    review: Review
    pictures: tuple[Picture, ...]  # in the order of their ids

    def as_json(self) -> dict[str, Any]:
        """The same as dicts, lists, strings, ints and finite floats; null for NaN."""
        return _plain(self)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {part.name: _plain(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
