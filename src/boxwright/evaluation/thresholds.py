"""Judged detections → the score from which on a detection is worth showing: the one that maximises F1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from boxwright.evaluation.judging import Float64, Judged, judge, overlapping, share
from boxwright.evaluation.matching import flatten
from boxwright.types import Bool, Detections, Int64, Record

NONE_KNOWN = 0.5  # where nothing can be maximised


@dataclass(frozen=True)
class Threshold:
    """A score and what detections of at least that score are worth; NaN where there is nothing to compare."""

    threshold: float  # 0 .. 1, in the middle of the gap between two neighbouring scores
    f1: float
    precision: float
    recall: float
    shown: int  # judged detections of at least that score
    note: str  # why this is not a maximum ("no objects to find"), or ""


@dataclass(frozen=True)
class Thresholds:
    """The threshold that maximises F1 over all detections of all classes, and that of each class alone."""

    overall: Threshold
    per_class: dict[str, Threshold]  # by class name, in the order of the classes


def best_threshold(
    records: Sequence[Record], detections: Sequence[Detections], classes: Sequence[str], *, iou: float = 0.5
) -> float:
    """The threshold that maximises F1 over all classes; 0.5 where nothing is right or there is nothing to find."""
    flat = flatten(records, detections, classes)
    judged = judge(flat, overlapping(flat, minimum=iou), iou=iou)
    return best_of(judged).threshold


def best_of(judged: Judged) -> Threshold:
    """The threshold over all classes."""
    return _maximise(judged.flat.scores, judged.right, ~judged.ignored, int(judged.counted.sum()))


def thresholds(judged: Judged) -> Thresholds:
    """The thresholds over all classes and of each."""
    scores, right, counts = judged.flat.scores, judged.right, ~judged.ignored
    return Thresholds(
        overall=best_of(judged),
        per_class={
            name: _maximise(scores[mine], right[mine], counts[mine], int(judged.counted[objects].sum()))
            for name, mine, objects in judged.groups
        },
    )


def _maximise(scores: Float64, right: Bool, counts: Bool, to_find: int) -> Threshold:
    """The threshold of detections (D,), of which those at `counts` are judged.

    Any score in the gap between two neighbouring scores shows the same detections: its middle is taken, because it
    holds best for other pictures. Of several gaps with the same F1 the widest, of equally wide ones the highest.
    """
    scores, right = scores[counts], right[counts]
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], np.cumsum(right[order], dtype=np.int64)
    if not to_find or not len(scores) or not found[-1]:
        note = "no objects to find" if not to_find else "no right detection" if len(scores) else "no detections"
        return _at(NONE_KNOWN, scores, found, to_find, note)
    cuts = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # the last of each score
    upper, lower = scores[cuts], np.append(scores[cuts][1:], 0.0)
    f1 = 2 * found[cuts] / (cuts + 1 + to_find)
    best = np.flatnonzero(f1 == f1.max())
    best = best[(upper - lower)[best].argmax()]
    # As float32, like the scores it is compared with; between two that are next to each other lies nothing.
    middle = float(np.float32((upper[best] + lower[best]) / 2))
    return _at(middle if lower[best] < middle <= upper[best] else float(upper[best]), scores, found, to_find)


def _at(threshold: float, scores: Float64, found: Int64, to_find: int, note: str = "") -> Threshold:
    """The figures at `threshold`; scores and found (D,) best first."""
    shown = int(np.searchsorted(-scores, -threshold, side="right"))
    right = int(found[shown - 1]) if shown else 0
    f1 = share(2 * right, shown + to_find)
    return Threshold(threshold, f1, share(right, shown), share(right, to_find), shown, note)
