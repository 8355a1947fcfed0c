"""Records and detections → the twelve COCO figures, by faster-coco-eval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boxwright.types import Detections, Float32, Record

# fmt: off
FIGURES = (  # in the order in which COCO prints them
    "AP", "AP50", "AP75", "APsmall", "APmedium", "APlarge",
    "AR1", "AR10", "AR100", "ARsmall", "ARmedium", "ARlarge",
)
# fmt: on


def summarize(
    records: Sequence[Record],
    detections: Sequence[Detections],
    classes: Sequence[str],
    *,
    areas: Sequence[NDArray[np.floating[Any]]] | None = None,
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The twelve COCO figures, and AP and AP50 of each class, 0 .. 1; NaN where there is nothing to find.

    Objects marked difficult count like any other, because COCO has no such mark: its `ignore` is overwritten
    from `iscrowd`, and that excuses every detection inside the object, which VOC's rule does not.

    areas: of each record's objects, (N,) square pixels, to tell small, medium and large (a segment's, say);
        the boxes' own where not given.
    """
    assert len(records) == len(detections), "one Detections for each Record, in the same order"
    if not records:
        unknown = {"AP": math.nan, "AP50": math.nan}
        return dict.fromkeys(FIGURES, math.nan), {name: dict(unknown) for name in classes}
    # Not at the top: whoever asks for VOC's figures alone need not load it.
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(_dataset(records, classes, areas))
    evaluation = COCOeval_faster(truth, truth.loadRes(_results(detections)), iouType="bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    figures = {name: _or_nan(value) for name, value in zip(FIGURES, evaluation.stats, strict=True)}
    # (10 IoUs, 101 recalls, K) at any area and 100 detections a class and picture
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    per_class = {
        name: {"AP": _or_nan(precision[:, :, label].mean()), "AP50": _or_nan(precision[0, :, label].mean())}
        for label, name in enumerate(classes)
    }
    return figures, per_class


def _or_nan(figure: float) -> float:
    return math.nan if figure == -1 else float(figure)  # COCO's mark of nothing to find


def _dataset(
    records: Sequence[Record], classes: Sequence[str], areas: Sequence[NDArray[np.floating[Any]]] | None
) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for image, record in enumerate(records):
        boxes = _corner_and_size(record.boxes)  # (N, 4)
        sizes = boxes[:, 2] * boxes[:, 3] if areas is None else areas[image]  # (N,)
        crowds = record.crowd.astype(int).tolist()
        for box, label, area, crowd in zip(boxes.tolist(), record.labels.tolist(), sizes.tolist(), crowds, strict=True):
            annotation = {"image_id": image, "category_id": label, "bbox": box, "area": area, "iscrowd": crowd}
            annotations.append(annotation | {"id": len(annotations) + 1})  # an id of 0 would mean "unmatched"
    return {
        "images": [{"id": image} for image in range(len(records))],
        "categories": [{"id": label, "name": name} for label, name in enumerate(classes)],
        "annotations": annotations,
    }


def _results(detections: Sequence[Detections]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for image, found in enumerate(detections):
        boxes = _corner_and_size(found.boxes).tolist()
        for box, score, label in zip(boxes, found.scores.tolist(), found.labels.tolist(), strict=True):
            results.append({"image_id": image, "category_id": label, "bbox": box, "score": score})
    return results


def _corner_and_size(boxes: Float32) -> NDArray[np.float64]:
    """COCO's x, y, width, height (N, 4) from the corners (N, 4)."""
    corners = boxes.astype(np.float64)
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
