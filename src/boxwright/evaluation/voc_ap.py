"""Records and detections → average precision by the rules of the Pascal VOC devkit (its `VOCevaldet.m`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from boxwright.types import Bool, Detections, Float32, Int64, Record

Float64 = NDArray[np.float64]


def average_precision(
    records: Sequence[Record],
    detections: Sequence[Detections],
    classes: Sequence[str],
    *,
    iou: float = 0.5,
    eleven_point: bool = False,
    difficult: Literal["ignore", "count", "delete"] = "ignore",
    plus_one: bool = False,
) -> dict[str, float]:
    """Average precision of each class, 0 .. 1; NaN where a class has no object to find.

    The detections of a class are taken best first, tied scores in the order given. Each is held against the
    object of its class and picture that it overlaps most; it is right if their IoU is at least `iou` and no
    better detection has taken that object.

    eleven_point: the mean of the best precision at recall 0, 0.1 .. 1 (VOC 2007), not the curve's area.
    difficult: a detection of such an object is neither right nor wrong ("ignore", the official rule), is
        judged like any other ("count"), or is wrong, as if nobody had annotated the object ("delete").
    plus_one: for boxes that hold the first and last pixel, as VOC's own files do: a side is last - first + 1
        long. With continuous edges, x1 = xmin - 1, a side has that length already, so their plain IoU is the
        devkit's; detections written as inclusive pixels need the same shift.
    """
    assert len(records) == len(detections), "one Detections for each Record, in the same order"
    if not records:
        return dict.fromkeys(classes, math.nan)
    if difficult == "delete":
        records = [_without_difficult(record) for record in records]
    object_labels = np.concatenate([record.labels for record in records])  # (N,) over all pictures
    ignored = np.concatenate([record.difficult for record in records]) & (difficult == "ignore")  # (N,)

    overlap, nearest = _nearest_objects(records, detections, pixel=1.0 if plus_one else 0.0)  # (D,) both
    scores = np.concatenate([found.scores for found in detections])  # (D,)
    order = np.argsort(-scores, kind="stable")  # all that follows is best first
    labels = np.concatenate([found.labels for found in detections])[order]  # (D,)
    right, judged = _judge(overlap[order] >= iou, nearest[order], ignored)

    figures: dict[str, float] = {}
    for label, name in enumerate(classes):
        to_find = int(np.count_nonzero((object_labels == label) & ~ignored))
        figures[name] = _summary(right[judged & (labels == label)], to_find, eleven_point)
    return figures


def _without_difficult(record: Record) -> Record:
    return record.only(~record.difficult)


def _nearest_objects(
    records: Sequence[Record], detections: Sequence[Detections], pixel: float
) -> tuple[Float64, Int64]:
    """For each of all detections, the IoU with the object it overlaps most and that object's index among all.

    Only objects of the same picture and class are looked at; where there is none the IoU is -1.
    """
    overlaps: list[Float64] = []
    nearests: list[Int64] = []
    objects_before = 0
    for record, found in zip(records, detections, strict=True):
        overlap, nearest = np.full(len(found), -1.0), np.zeros(len(found), np.int64)
        if len(record.boxes):
            same_class = found.labels[:, None] == record.labels  # (D, N) of this picture
            iou = np.where(same_class, _iou(found.boxes, record.boxes, pixel), -1.0)  # (D, N)
            nearest = iou.argmax(axis=1)  # the first of equals, as in the devkit
            overlap = iou[np.arange(len(found)), nearest]
        overlaps.append(overlap)
        nearests.append(nearest + objects_before)
        objects_before += len(record.boxes)
    return np.concatenate(overlaps), np.concatenate(nearests)


def _iou(a: Float32, b: Float32, pixel: float) -> Float64:
    """(A, B) of boxes (A, 4) and (B, 4) with sides of last - first + `pixel`."""
    first_a, last_a = np.split(a.astype(np.float64)[:, None], 2, axis=2)  # (A, 1, 2)
    first_b, last_b = np.split(b.astype(np.float64), 2, axis=1)  # (B, 2)
    sides = np.minimum(last_a, last_b) - np.maximum(first_a, first_b) + pixel  # (A, B, 2)
    shared = sides.clip(min=0).prod(axis=2)  # (A, B)
    area_a = (last_a - first_a + pixel).prod(axis=2)  # (A, 1)
    area_b = (last_b - first_b + pixel).prod(axis=1)  # (B,)
    return shared / (area_a + area_b - shared)


def _judge(overlaps: Bool, nearest: Int64, ignored: Bool) -> tuple[Bool, Bool]:
    """Which detections (best first) are right, and which are judged at all; (D,) both.

    overlaps: (D,) whether the detection overlaps its nearest object enough.
    nearest: (D,) the index of that object in `ignored` (N,).
    """
    right, judged = np.zeros(len(nearest), np.bool_), np.ones(len(nearest), np.bool_)
    candidates = np.flatnonzero(overlaps)
    _, first = np.unique(nearest[candidates], return_index=True)  # the best detection takes the object
    right[candidates[first]] = True
    judged[candidates] = ~ignored[nearest[candidates]]
    return right, judged


def _summary(right: Bool, to_find: int, eleven_point: bool) -> float:
    """Average precision of one class's judged detections, best first (D,), of `to_find` objects."""
    if not to_find:
        return math.nan
    found = np.cumsum(right)  # (D,)
    precision = found / np.arange(1, len(right) + 1)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a higher one
    if not eleven_point:
        return float(best_from_here[right].sum() / to_find)  # each right one adds 1 / to_find to recall
    # found / to_find >= k / 10 in integers: as floats, recalls of exactly 0.3, 0.6 and 0.7 can be missed.
    reached = np.searchsorted(10 * found, to_find * np.arange(11))
    return float(np.append(best_from_here, 0.0)[reached].mean())  # 0 where a recall is never reached
