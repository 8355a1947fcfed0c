"""Records and detections → where AP is lost, how to set the threshold, and which annotations look wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from boxwright.evaluation.breakdown import Breakdown, breakdown
from boxwright.evaluation.calibration import Calibration, calibration
from boxwright.evaluation.confusion import Confusion, confusion
from boxwright.evaluation.curves import Curves, curves
from boxwright.evaluation.errors import Errors, errors
from boxwright.evaluation.judging import Judged, judge, overlapping, share
from boxwright.evaluation.matching import flatten
from boxwright.evaluation.review import Review, review
from boxwright.evaluation.thresholds import Thresholds, thresholds
from boxwright.types import Detections, Int64, Record


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


def analyse(
    records: Sequence[Record],
    detections: Sequence[Detections],
    classes: Sequence[str],
    *,
    iou: float = 0.5,
    earlier: Sequence[Sequence[Detections]] = (),
) -> Analysis:
    """What there is to know about `detections`, those of `records` in the same order.

    AP here is at one IoU, by COCO's 101 points, of all detections (COCO's own takes 100 a class and picture), and
    objects marked difficult are ignored as VOC does. The order of the records makes no difference.

    iou: from which on a box fits, above 0.1.
    earlier: detections of the same records by earlier epochs, to tell what persists in the review list.
    """
    assert len(records) == len(detections), "one Detections for each Record, in the same order"
    assert all(len(found) == len(records) for found in earlier), "one Detections for each Record in each epoch"
    flat = flatten(records, detections, classes)
    judged = judge(flat, overlapping(flat, same_class=False), iou=iou)
    recommended = thresholds(judged)
    threshold = recommended.overall.threshold
    return Analysis(
        iou=iou,
        classes=tuple(classes),
        images=len(records),
        objects=int(judged.counted.sum()),
        ignored_objects=int((~judged.counted).sum()),
        detections=len(flat.scores),
        errors=errors(judged),
        thresholds=recommended,
        curves=curves(judged),
        calibration=calibration(judged, threshold=threshold),
        confusion=confusion(judged, threshold=threshold),
        breakdown=breakdown(judged, _picture_sizes(records), threshold=threshold),
        review=review(judged, threshold=threshold, records=records, earlier=earlier),
        pictures=_pictures(judged, threshold),
    )


def _picture_sizes(records: Sequence[Record]) -> Int64:
    """Height and width of each picture in the order of their ids, (I, 2)."""
    sizes = [record.size for record in sorted(records, key=lambda record: record.id)]
    return np.array(sizes, np.int64).reshape(-1, 2)


def _pictures(judged: Judged, threshold: float) -> tuple[Picture, ...]:
    flat, shown = judged.flat, judged.flat.scores >= threshold

    def by_picture(images: Int64) -> list[int]:
        return np.bincount(images, minlength=len(flat.ids)).tolist()

    taken = judged.taken[judged.right & shown]
    missed = judged.counted.copy()
    missed[taken] = False
    columns = (
        flat.ids,
        by_picture(flat.images[judged.right & shown]),
        by_picture(flat.images[judged.wrong & shown]),
        by_picture(flat.object_images[missed]),
        by_picture(flat.images[judged.ignored & shown]),
    )
    return tuple(
        Picture(name, right, wrong, lost, ignored, share(2 * right, 2 * right + wrong + lost))
        for name, right, wrong, lost, ignored in zip(*columns, strict=True)
    )


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
