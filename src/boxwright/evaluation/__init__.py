"""Judging detections: records + detections → `Scores`; numpy only, never a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from boxwright.evaluation import coco_ap, voc_ap
from boxwright.types import Detections, Record, Scores

__all__ = ["score"]


def score(records: Sequence[Record], detections: Sequence[Detections], classes: Sequence[str]) -> Scores:
    """How good `detections` are, those of `records` in the same order, by COCO's and by VOC's rules.

    VOC's figures ignore objects marked difficult; COCO's count them (see `coco_ap.summarize`).
    """
    assert len(records) == len(detections), "one Detections for each Record, in the same order"
    # Both rules take tied scores in the order of the pictures: by id, so no figure depends on a file listing.
    order = sorted(range(len(records)), key=lambda index: records[index].id)
    records, detections = [records[index] for index in order], [detections[index] for index in order]

    coco, coco_per_class = coco_ap.summarize(records, detections, classes)
    voc = {
        "07@50": voc_ap.average_precision(records, detections, classes, eleven_point=True),
        "area@50": voc_ap.average_precision(records, detections, classes),
        "area@75": voc_ap.average_precision(records, detections, classes, iou=0.75),
    }
    return Scores(
        coco=coco,
        voc={rule: _mean(figures.values()) for rule, figures in voc.items()},
        per_class={name: coco_per_class[name] | {"area@50": voc["area@50"][name]} for name in classes},
        images=len(records),
        objects=sum(len(record.boxes) for record in records),
    )


def _mean(figures: Iterable[float]) -> float:
    """The mean over classes that have something to find; NaN if none has."""
    known = [figure for figure in figures if not math.isnan(figure)]
    return sum(known) / len(known) if known else math.nan
