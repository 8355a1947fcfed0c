"""Judged detections → precision by recall, and precision, recall and F1 by threshold, on grids of 101 points."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from boxwright.evaluation.judging import Float64, Judged, best_precisions
from boxwright.evaluation.precision import RECALLS
from boxwright.types import Bool


@dataclass(frozen=True)
class Curve:
    """The curves of one class; their x axes are `Curves.recalls` and `Curves.thresholds`. NaN: nothing to compare."""

    ap: float  # the mean of `best_precision`
    best_precision: tuple[float, ...]  # (101,) best precision at this recall or a higher one; 0 where never reached
    precision: tuple[float, ...]  # (101,) of detections of at least the threshold; NaN where there are none
    recall: tuple[float, ...]  # (101,)
    f1: tuple[float, ...]  # (101,)


@dataclass(frozen=True)
class Curves:
    """The curves of all classes together and of each.

    Together, `ap` and `best_precision` are means over the classes that have objects; `precision`, `recall` and `f1`
    are of all classes' detections in one heap.
    """

    recalls: tuple[float, ...]  # (101,) 0 0.01 .. 1
    thresholds: tuple[float, ...]  # (101,) 0 0.01 .. 1
    overall: Curve
    per_class: dict[str, Curve]  # by class name, in the order of the classes


THRESHOLDS: Float64 = np.round(np.linspace(0, 1, 101), 2)


def curves(judged: Judged) -> Curves:
    """The curves over all classes and of each."""
    flat, counts, to_find = judged.flat, ~judged.ignored, judged.to_find
    best = best_precisions(flat.labels[counts], flat.scores[counts], judged.right[counts], to_find)  # (K, 101)
    over_classes = best[to_find > 0].mean(axis=0) if to_find.any() else np.full(len(RECALLS), math.nan)
    return Curves(
        recalls=_floats(RECALLS),
        thresholds=_floats(THRESHOLDS),
        overall=_curve(over_classes, flat.scores[counts], judged.right[counts], int(to_find.sum())),
        per_class={
            name: _curve(best[k], flat.scores[mine & counts], judged.right[mine & counts], int(to_find[k]))
            for k, (name, mine, _) in enumerate(judged.groups)
        },
    )


def _curve(best_precision: Float64, scores: Float64, right: Bool, to_find: int) -> Curve:
    """scores, right: of the judged detections, (D,)."""
    shown = len(scores) - np.searchsorted(np.sort(scores), THRESHOLDS)  # (101,) of at least each threshold
    true = np.count_nonzero(right) - np.searchsorted(np.sort(scores[right]), THRESHOLDS)  # (101,)
    with np.errstate(invalid="ignore"):  # nothing of nothing is NaN
        precision, recall, f1 = true / shown, true / np.full(len(true), to_find), 2 * true / (shown + to_find)
    ap = float(best_precision.mean())
    return Curve(ap, _floats(best_precision), _floats(precision), _floats(recall), _floats(f1))


def _floats(values: Float64) -> tuple[float, ...]:
    return tuple(values.tolist())
