"""Verdicts on detections → average precision by each way of averaging it; shared by COCO's and VOC's rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from boxwright.types import Bool, Int64

Float64 = NDArray[np.float64]
Points = Literal["coco", "11", "area"]  # COCO's 101 recalls, VOC 2007's 11, the whole area under VOC 2010's curve

RECALLS: Float64 = np.linspace(0, 1, 101)  # COCO's, with the rounding that pycocotools gives them


@dataclass(frozen=True, eq=False)
class Verdicts:
    """What a rule says of each detection at T IoUs: those of a class side by side, best first."""

    starts: Int64  # (K + 1,) the detections of class k are starts[k] : starts[k + 1]
    images: Int64  # (D,) index of the picture
    right: Bool  # (T, D)
    ignored: Bool  # (T, D) neither right nor wrong
    object_labels: Int64  # (N,) of the objects to find
    object_images: Int64  # (N,)

    @property
    def to_find(self) -> Int64:
        """How many objects each class has, (K,)."""
        return np.bincount(self.object_labels, minlength=len(self.starts) - 1)


def class_starts(labels: Int64, classes: int) -> Int64:
    """Where each class begins among sorted `labels` (D,), and where the last one ends, (K + 1,)."""
    return np.searchsorted(labels, np.arange(classes + 1))


def average_precision(verdicts: Verdicts, points: Points) -> Float64:
    """AP of each class at each IoU, (K, T), 0 .. 1; NaN where a class has nothing to find."""
    to_find = verdicts.to_find
    figures = np.full((len(to_find), len(verdicts.right)), np.nan)
    for label, total in enumerate(to_find):
        if not total:
            continue
        here = slice(verdicts.starts[label], verdicts.starts[label + 1])
        for t, (right, ignored) in enumerate(zip(verdicts.right[:, here], verdicts.ignored[:, here], strict=True)):
            places = np.flatnonzero(right)  # (R,)
            judged = (places + 1).astype(np.float64)  # (R,) so far
            if ignored.any():
                judged = judged - np.cumsum(ignored)[places].astype(np.float64)
            found = np.arange(1.0, len(places) + 1)  # (R,)
            figures[label, t] = area_under(found, judged, float(total), points)
    return figures


def resampled(verdicts: Verdicts, points: Points, weights: Float64) -> Float64:
    """AP (B, K, T) of B splits in which picture i stands `weights[b, i]` times, (B, I)."""
    draws, classes = len(weights), len(verdicts.starts) - 1
    figures = np.full((draws, classes, len(verdicts.right)), np.nan)
    for label in range(classes):
        objects = verdicts.object_images[verdicts.object_labels == label]
        if not len(objects):
            continue
        total = weights[:, objects].sum(axis=1)  # (B,)
        here = slice(verdicts.starts[label], verdicts.starts[label + 1])
        images = verdicts.images[here]
        seen = weights[:, images].cumsum(axis=1)  # (B, D of this class)
        for t, (right, ignored) in enumerate(zip(verdicts.right[:, here], verdicts.ignored[:, here], strict=True)):
            places = np.flatnonzero(right)
            judged = seen[:, places]  # (B, R)
            if ignored.any():
                skipped = np.zeros((draws, int(ignored.sum()) + 1))
                skipped[:, 1:] = weights[:, images[ignored]].cumsum(axis=1)
                judged = judged - skipped[:, np.searchsorted(np.flatnonzero(ignored), places)]
            found = weights[:, images[places]].cumsum(axis=1)
            figures[:, label, t] = area_under(found, judged, total, points)
    return figures


def area_under(found: Float64, judged: Float64, total: Float64 | float, points: Points) -> Float64:
    """AP from where each right detection stands, best first: its precision holds for the recalls it reaches first.

    found: (..., R) right ones up to and with each.    judged: (..., R) right and wrong ones up to and with each.
    total: (...) objects to find; NaN comes of 0.
    """
    total = np.asarray(total, np.float64)
    precision = found / np.maximum(judged, 1)  # 0 / 0 where a resample has none of the pictures so far
    best_from_here = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]  # at this recall or a higher one
    with np.errstate(invalid="ignore", divide="ignore"):
        reached, of = _REACHED[points](found, total[..., None])
        gained = np.diff(reached, axis=-1, prepend=0)
        figure = (best_from_here * gained).sum(axis=-1) / (total if of is None else of)
    return np.where(total > 0, figure, np.nan)


_Reached = tuple[NDArray[np.float64] | Int64, int | None]


def _coco(found: Float64, total: Float64) -> _Reached:
    return np.searchsorted(RECALLS, found / total, side="right"), len(RECALLS)


def _eleven(found: Float64, total: Float64) -> _Reached:
    # In whole numbers: as floats, recalls of exactly 0.3, 0.6 and 0.7 can be missed. The first is reached by any.
    return 10 * found // total + 1, 11


def _area(found: Float64, total: Float64) -> _Reached:
    return found, None


_REACHED: dict[Points, Callable[[Float64, Float64], _Reached]] = {"coco": _coco, "11": _eleven, "area": _area}


def mean(figures: Float64) -> float:
    """The mean of those that are known, NaN if none is: of the classes that have something to find."""
    known = figures[~np.isnan(figures)]
    return float(known.mean()) if len(known) else float("nan")
