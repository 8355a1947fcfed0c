"""Records and detections → average precision by the rules of the Pascal VOC devkit (its `VOCevaldet.m`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from boxwright.evaluation import precision
from boxwright.evaluation.matching import Flat, flatten, pairs
from boxwright.evaluation.precision import Verdicts, class_starts
from boxwright.types import Detections, Record

Difficult = Literal["ignore", "count", "delete"]


def average_precision(
    records: Sequence[Record],
    detections: Sequence[Detections],
    classes: Sequence[str],
    *,
    iou: float = 0.5,
    eleven_point: bool = False,
    difficult: Difficult = "ignore",
    plus_one: bool = False,
) -> dict[str, float]:
    """Average precision of each class, 0 .. 1; NaN where a class has no object to find.

    The detections of a class are taken best first, tied scores by picture and box (see `matching`). Each is held
    against the object of its class and picture that it overlaps most; it is right if their IoU is at least `iou`
    and no better detection has taken that object. A crowd region is a difficult object.

    eleven_point: the mean of the best precision at recall 0, 0.1 .. 1 (VOC 2007), not the curve's area.
    difficult: a detection of such an object is neither right nor wrong ("ignore", the official rule), is
        judged like any other ("count"), or is wrong, as if nobody had annotated the object ("delete").
    plus_one: for boxes that hold the first and last pixel, as VOC's own files do: a side is last - first + 1
        long. With continuous edges, x1 = xmin - 1, a side has that length already, so their plain IoU is the
        devkit's; detections written as inclusive pixels need the same shift.
    """
    flat = flatten(records, detections, classes)
    verdicts = judge(flat, ious=[iou], difficult=difficult, pixel=1.0 if plus_one else 0.0)
    figures = precision.average_precision(verdicts, "11" if eleven_point else "area")
    return {name: float(figure) for name, figure in zip(classes, figures[:, 0], strict=True)}


def judge(
    flat: Flat,
    *,
    ious: Sequence[float] | NDArray[np.float64],
    difficult: Difficult = "ignore",
    pixel: float = 0.0,
) -> Verdicts:
    """VOC's verdicts at each of `ious`; see `average_precision`. pixel: added to each side."""
    uncounted = flat.difficult | flat.crowd
    near = pairs(flat, minimum=math.nextafter(min(ious, default=1.0), 0), pixel=pixel)
    if difficult == "delete":
        kept = ~uncounted[near.object]
        thing, detection, iou = near.object[kept], near.detection[kept], near.iou[kept]
    else:
        thing, detection, iou = near.object, near.detection, near.iou
    closest_first = np.lexsort((thing, -iou, detection))  # of equals the first, as in the devkit
    _, first = np.unique(detection[closest_first], return_index=True)
    overlap = np.full(len(flat.boxes), -1.0)
    nearest = np.zeros(len(flat.boxes), np.int64)
    which = closest_first[first]
    overlap[detection[which]], nearest[detection[which]] = iou[which], thing[which]

    order = flat.by_class
    overlap, nearest = overlap[order], nearest[order]  # (D,) all that follows is by class and best first
    excused = uncounted & (difficult == "ignore")  # (N,)
    right = np.zeros((len(ious), len(order)), np.bool_)
    ignored = np.zeros_like(right)
    for t, least in enumerate(ious):
        near_enough = np.flatnonzero(overlap >= least)
        ignores = excused[nearest[near_enough]]
        ignored[t, near_enough[ignores]] = True
        candidates = near_enough[~ignores]
        _, best = np.unique(nearest[candidates], return_index=True)  # the best detection takes the object
        right[t, candidates[best]] = True
    counted = np.ones(len(uncounted), np.bool_) if difficult == "count" else ~uncounted
    return Verdicts(
        class_starts(flat.labels[order], len(flat.classes)),
        flat.images[order],
        right,
        ignored,
        flat.object_labels[counted],
        flat.object_images[counted],
    )
