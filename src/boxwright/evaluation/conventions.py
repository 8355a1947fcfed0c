"""Records and detections → the figures that different tools would print for them, side by side, in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boxwright.evaluation import coco_ap, voc_ap
from boxwright.evaluation.intervals import LEVEL, Figure, Range, intervals
from boxwright.evaluation.matching import Flat, flatten
from boxwright.evaluation.precision import Verdicts, average_precision, mean
from boxwright.evaluation.voc_ap import Difficult
from boxwright.types import Detections, Record, Scores, Size

DIFFICULT: tuple[Difficult, ...] = ("ignore", "count", "delete")


@dataclass(frozen=True)
class Printed:
    """What a tool would print: the mean over classes that have something to find."""

    who: str
    rule: str  # what is particular about it
    figures: dict[str, float]  # AP, AP50, AP75: those that it prints


@dataclass(frozen=True)
class Voc:
    """VOC's figures by one treatment of difficult objects and of the last pixel."""

    difficult: Difficult
    plus_one: bool
    figures: dict[str, float]  # 07@50, area@50, ...: of each IoU
    per_class: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Judgement:
    """Everything that any convention says of a split's detections."""

    scores: Scores
    printed: tuple[Printed, ...]
    coco: dict[str, dict[str, float]]  # by what is done with difficult objects: count, ignore, delete
    voc: tuple[Voc, ...]
    per_class: dict[str, dict[str, float]]  # objects, AP, AP50, AP75, 07@50, area@50, ... by the official rules
    intervals: dict[str, Any]  # {"coco": {"AP": (low, high)}, "voc": ..., "per_class": ..., "level", ...}, or {}

    def as_json(self) -> dict[str, Any]:
        """The parts of scores.json that are figures; NaN where there is nothing to find."""
        return {
            "coco": self.scores.coco,
            "voc": self.scores.voc,
            "per_class": self.per_class,
            "images": self.scores.images,
            "objects": self.scores.objects,
            "conventions": [asdict(printed) for printed in self.printed],
            "coco_by_difficult": self.coco,
            "voc_by_rule": [asdict(voc) for voc in self.voc],
            "intervals": self.intervals,
        }


@dataclass(frozen=True)
class Resized:
    """How the article's pipeline resizes pictures before it judges."""

    imgsz: int = 640
    square: bool = False

    def of(self, size: Size) -> Size:
        height, width = size
        if self.square:
            return self.imgsz, self.imgsz
        ratio = self.imgsz / max(height, width)
        return int(height * ratio), int(width * ratio)


def judge_all(
    records: Sequence[Record],
    detections: Sequence[Detections],
    classes: Sequence[str],
    *,
    ious: Sequence[float] = (0.5, 0.75),
    resized: Resized | None = None,
    areas: Sequence[NDArray[np.floating[Any]]] | None = None,
    resamples: int = 0,
    seed: int = 0,
) -> Judgement:
    """Judge `detections`, those of `records` in the same order, by every convention; no order changes a figure.

    ious: for VOC's figures; 0.5 and 0.75 are always among them.
    resized: as the article would; by default the longer side to 640. Its figures are NaN where the size of a picture
        is not known, that is 0.
    areas: of each record's objects, for COCO's sizes; the boxes' own where not given.
    resamples: for 95 % intervals; 0 for none.
    """
    flat = flatten(records, detections, classes, areas=areas)
    sizes = {record.id: record.size for record in records}
    return _Judge(flat, [sizes[name] for name in flat.ids], ious, resized or Resized()).everything(resamples, seed)


class _Judge:
    """Judges once what several conventions share."""

    def __init__(self, flat: Flat, sizes: Sequence[Size], ious: Sequence[float], resized: Resized) -> None:
        self.flat, self.sizes, self.resized = flat, sizes, resized
        self.ious = tuple(sorted({0.5, 0.75, *ious}))
        every = np.unique(np.round([*self.ious, *coco_ap.IOUS], 12))
        self.every = every  # IoUs that VOC's rule is asked for
        self.at = {iou: int(np.argmin(np.abs(every - iou))) for iou in self.ious}
        self.ten = [int(np.argmin(np.abs(every - iou))) for iou in coco_ap.IOUS]

    @cached_property
    def coco(self) -> coco_ap.Coco:
        return coco_ap.judge(self.flat)

    @cached_property
    def official(self) -> Verdicts:
        return voc_ap.judge(self.flat, ious=self.every)

    def everything(self, resamples: int, seed: int) -> Judgement:
        coco, per_class = self.coco.figures()
        by_difficult = {"count": coco}
        by_difficult["ignore"] = self._coco(self.flat.against(crowd=self.flat.crowd | self.flat.difficult))
        by_difficult["delete"] = self._coco(_only(self.flat, ~self.flat.difficult))
        voc = tuple(self._voc(difficult, plus_one) for plus_one in (False, True) for difficult in DIFFICULT)
        official = voc[0]
        to_find = np.bincount(self.flat.object_labels, minlength=len(self.flat.classes))
        table = {
            name: {"objects": int(to_find[k]), **per_class[name], **official.per_class[name]}
            for k, name in enumerate(self.flat.classes)
        }
        scores = Scores(
            coco=coco,
            voc={key: official.figures[key] for key in ("07@50", "area@50", "area@75")},
            per_class={name: {key: row[key] for key in ("AP", "AP50", "area@50")} for name, row in table.items()},
            images=len(self.flat.ids),
            objects=len(self.flat.object_boxes),
        )
        printed = self._printed(coco, by_difficult["delete"])
        followed = self._intervals(resamples, seed) if resamples else {}
        return Judgement(scores, printed, by_difficult, voc, table, followed)

    def _coco(self, flat: Flat) -> dict[str, float]:
        return coco_ap.judge(flat, sizes=False).figures()[0]

    def _voc(self, difficult: Difficult, plus_one: bool) -> Voc:
        ours = difficult == "ignore" and not plus_one
        pixel = 1.0 if plus_one else 0.0
        if ours:
            verdicts, where = self.official, [self.at[iou] for iou in self.ious]
        else:
            verdicts = voc_ap.judge(self.flat, ious=self.ious, difficult=difficult, pixel=pixel)
            where = list(range(len(self.ious)))
        figures: dict[str, float] = {}
        per_class: dict[str, dict[str, float]] = {name: {} for name in self.flat.classes}
        eleven, area = average_precision(verdicts, "11"), average_precision(verdicts, "area")  # (K, T)
        for iou, t in zip(self.ious, where, strict=True):
            for kind, values in (("07", eleven), ("area", area)):
                key = f"{kind}@{percent(iou)}"
                figures[key] = mean(values[:, t])
                for name, value in zip(self.flat.classes, values[:, t], strict=True):
                    per_class[name][key] = float(value)
        return Voc(difficult, plus_one, figures, per_class)

    def _printed(self, coco: dict[str, float], deleted: dict[str, float]) -> tuple[Printed, ...]:
        eleven, area = average_precision(self.official, "11"), average_precision(self.official, "area")

        def over_ten(values: Any) -> dict[str, float]:
            # detectron2 means over classes at each IoU, then over the IoUs
            return {
                "AP": mean(values[:, self.ten]),
                "AP50": mean(values[:, self.at[0.5]]),
                "AP75": mean(values[:, self.at[0.75]]),
            }

        # MMDetection's boxes end in their last pixel, those of the network do not; both get a pixel more.
        shifted = self.flat.against(object_boxes=self.flat.object_boxes - np.array([0.0, 0, 1, 1]))
        mm = voc_ap.judge(shifted, ious=[0.5], pixel=1.0)
        known = all(min(size) > 0 for size in self.sizes)
        article = self._coco(_as_article(self.flat, self.sizes, self.resized)) if known else {}
        three = ("AP", "AP50", "AP75")
        side = f"{self.resized.imgsz} px, {'square' if self.resized.square else 'aspect kept'}"
        return (
            Printed("pycocotools, torchmetrics", "101 points, difficult counted", {key: coco[key] for key in three}),
            Printed("detectron2, MMDetection: COCO", "101 points, difficult counted", {k: coco[k] for k in three}),
            Printed("VOC devkit 2007", "11 points, difficult ignored", {"AP50": mean(eleven[:, self.at[0.5]])}),
            Printed("VOC devkit 2010+", "area, difficult ignored", {"AP50": mean(area[:, self.at[0.5]])}),
            Printed("detectron2: VOC 2007", "11 points, difficult ignored", over_ten(eleven)),
            Printed("detectron2: VOC 2012", "area, difficult ignored", over_ten(area)),
            Printed("MMDetection: VOC 2007", "11 points, difficult ignored, +1 pixel",
                    {"AP50": mean(average_precision(mm, "11")[:, 0])}),
            Printed("MMDetection: VOC 2012", "area, difficult ignored, +1 pixel",
                    {"AP50": mean(average_precision(mm, "area")[:, 0])}),
            Printed("Ultralytics, about", "101 points, difficult deleted", {key: deleted[key] for key in three[:2]}),
            Printed("the article", f"COCO's at {side}, whole pixels",
                    {key: article.get(key, math.nan) for key in three}),
        )  # fmt: skip

    def _intervals(self, resamples: int, seed: int) -> dict[str, Any]:
        coco = self.coco.verdicts[""]
        figures = {
            "AP": Figure(coco, "coco", tuple(range(len(coco_ap.IOUS)))),
            "AP50": Figure(coco, "coco", (0,)),
            "AP75": Figure(coco, "coco", (5,)),
        }
        # Only the IoUs that are asked for: each costs as much as any.
        where = [self.at[iou] for iou in self.ious]
        voc = replace(self.official, right=self.official.right[where], ignored=self.official.ignored[where])
        for t, iou in enumerate(self.ious):
            figures[f"07@{percent(iou)}"] = Figure(voc, "11", (t,))
            figures[f"area@{percent(iou)}"] = Figure(voc, "area", (t,))
        whole, classes = intervals(figures, len(self.flat.ids), len(self.flat.classes), resamples=resamples, seed=seed)
        per_class: dict[str, dict[str, Range]] = {
            name: {key: ranges[k] for key, ranges in classes.items()} for k, name in enumerate(self.flat.classes)
        }
        return {
            "coco": {key: whole[key] for key in ("AP", "AP50", "AP75")},
            "voc": {key: value for key, value in whole.items() if "@" in key},
            "per_class": per_class,
            "level": LEVEL,
            "resamples": resamples,
            "seed": seed,
        }


def percent(iou: float) -> str:
    """0.5 as 50, 0.525 as 52.5."""
    return f"{round(100 * iou, 6):g}"


def _only(flat: Flat, keep: NDArray[np.bool_]) -> Flat:
    """The same detections against the objects at `keep` alone."""
    names = (
        "object_boxes", "object_labels", "object_images", "difficult", "crowd", "object_areas", "object_places",
    )  # fmt: skip
    return flat.against(**{name: getattr(flat, name)[keep] for name in names})


def _as_article(flat: Flat, sizes: Sequence[Size], resized: Resized) -> Flat:
    """Boxes in resized pictures, those of objects cut to whole pixels; without the pictures that have no object."""
    new = np.array([resized.of(size) for size in sizes], np.float64).reshape(-1, 2)
    old = np.array(sizes, np.float64).reshape(-1, 2)
    scale = np.tile(new[:, ::-1] / old[:, ::-1], 2)  # (I, 4) for x1 y1 x2 y2
    boxes = np.trunc(flat.object_boxes * scale[flat.object_images])
    kept = np.isin(flat.images, flat.object_images)
    return replace(
        flat,
        object_boxes=boxes,
        object_areas=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
        boxes=(flat.boxes * scale[flat.images])[kept],
        labels=flat.labels[kept],
        scores=flat.scores[kept],
        images=flat.images[kept],
    )
