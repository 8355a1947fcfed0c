"""Judging detections: records + detections → `Scores`; numpy only, never a model."""

from __future__ import annotations

from collections.abc import Sequence

from boxwright.evaluation import coco_ap, voc_ap
from boxwright.evaluation.matching import flatten
from boxwright.evaluation.precision import average_precision, mean
from boxwright.types import Detections, Record, Scores

__all__ = ["score"]


def score(records: Sequence[Record], detections: Sequence[Detections], classes: Sequence[str]) -> Scores:
    """How good `detections` are, those of `records` in the same order, by COCO's and by VOC's rules.

    VOC's figures ignore objects marked difficult; COCO's count them (see `coco_ap.summarize`). No figure depends on
    the order of the pictures, nor on that of detections or objects in one (see `matching`).
    """
    flat = flatten(records, detections, classes)
    coco, coco_per_class = coco_ap.judge(flat).figures()
    verdicts = voc_ap.judge(flat, ious=(0.5, 0.75))
    eleven, area = average_precision(verdicts, "11"), average_precision(verdicts, "area")  # (K, 2)
    return Scores(
        coco=coco,
        voc={"07@50": mean(eleven[:, 0]), "area@50": mean(area[:, 0]), "area@75": mean(area[:, 1])},
        per_class={
            name: {"AP": coco_per_class[name]["AP"], "AP50": coco_per_class[name]["AP50"], "area@50": float(area[k, 0])}
            for k, name in enumerate(flat.classes)
        },
        images=len(flat.ids),
        objects=len(flat.object_boxes),
    )
