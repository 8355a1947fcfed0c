"""Records and detections → the twelve COCO figures, by the rules of pycocotools, all pictures at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boxwright.evaluation.matching import Flat, assign, flatten, pairs
from boxwright.evaluation.precision import Verdicts, average_precision, class_starts, mean
from boxwright.types import Bool, Detections, Int64, Record

Float64 = NDArray[np.float64]

# fmt: off
FIGURES = (  # in the order in which COCO prints them
    "AP", "AP50", "AP75", "APsmall", "APmedium", "APlarge",
    "AR1", "AR10", "AR100", "ARsmall", "ARmedium", "ARlarge",
)
# fmt: on

IOUS: Float64 = np.linspace(0.5, 0.95, 10)  # with the rounding that pycocotools gives them
AREAS = {"": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
MOST = 100  # detections of a class in a picture that count


@dataclass(frozen=True, eq=False)
class Coco:
    """COCO's verdicts for each range of sizes, and what they come to."""

    classes: tuple[str, ...]
    verdicts: dict[str, Verdicts]  # by the names of AREAS
    place: Int64  # (D,) of each detection among those of its class and picture, from 0

    def figures(self) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Those of `FIGURES` whose sizes were judged, and AP, AP50 and AP75 of each class; NaN for nothing to find."""
        precision = {name: average_precision(verdicts, "coco") for name, verdicts in self.verdicts.items()}  # (K, T)
        whole = precision[""]
        half, three_quarters = whole[:, 0], whole[:, 5]
        values = {"AP": mean(whole), "AP50": mean(half), "AP75": mean(three_quarters)}
        values |= {f"AP{name}": mean(precision[name]) for name in self.verdicts if name}
        values |= {f"AR{most}": self._recall("", most) for most in (1, 10, MOST)}
        values |= {f"AR{name}": self._recall(name, MOST) for name in self.verdicts if name}
        per_class = {
            name: {"AP": mean(whole[k]), "AP50": float(half[k]), "AP75": float(three_quarters[k])}
            for k, name in enumerate(self.classes)
        }
        return values, per_class

    def _recall(self, area: str, most: int) -> float:
        """The share of objects found with the `most` best detections of a class and picture, over classes and IoUs."""
        verdicts = self.verdicts[area]
        to_find = verdicts.to_find.astype(np.float64)
        labels = np.repeat(np.arange(len(to_find)), np.diff(verdicts.starts))  # (D,)
        within = self.place < most
        found = np.stack([np.bincount(labels[right & within], minlength=len(to_find)) for right in verdicts.right])
        with np.errstate(invalid="ignore"):
            return mean(found / np.where(to_find > 0, to_find, np.nan))


def summarize(
    records: Sequence[Record],
    detections: Sequence[Detections],
    classes: Sequence[str],
    *,
    areas: Sequence[NDArray[np.floating[Any]]] | None = None,
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The twelve COCO figures, and AP, AP50 and AP75 of each class, 0 .. 1; NaN where there is nothing to find.

    Objects marked difficult count like any other, because COCO has no such mark: its `ignore` is overwritten
    from `iscrowd`, and that excuses every detection inside the object, which VOC's rule does not.

    areas: of each record's objects, (N,) square pixels, to tell small, medium and large (a segment's, say);
        the boxes' own where not given.
    """
    return judge(flatten(records, detections, classes, areas=areas)).figures()


def judge(flat: Flat, *, sizes: bool = True) -> Coco:
    """COCO's verdicts: in each picture the detections of a class, best first, each take the object that they overlap
    most among those still free, of equals the last; one that finds none, but overlaps a crowd region or an object of
    another size enough, is ignored, as is one of another size that finds nothing.

    sizes: also for small, medium and large objects alone.
    """
    areas = AREAS if sizes else {"": AREAS[""]}
    order = flat.by_class
    place = flat.places
    order = order[place[order] < MOST]  # (D,) all that count
    near = pairs(flat, minimum=math.nextafter(IOUS[0], 0), crowd_share=True)
    near_order = np.lexsort((-near.object, -near.iou, near.detection))
    asker, asked, iou = near.detection[near_order], near.object[near_order], near.iou[near_order]  # (P,)
    kept = place[asker] < MOST
    asker, asked, iou = asker[kept], asked[kept], iou[kept]

    sides = (flat.boxes[:, 2:] - flat.boxes[:, :2]).prod(axis=1)  # (D of flat,)
    count, found = len(flat.crowd), len(flat.boxes)
    others = {name: _outside(flat.object_areas, *area) | flat.crowd for name, area in areas.items()}  # (N,)
    right = {name: np.zeros((len(IOUS), len(order)), np.bool_) for name in areas}
    ignored = {name: np.zeros((len(IOUS), len(order)), np.bool_) for name in areas}
    for t, least in enumerate(IOUS):
        kept = iou >= min(least, 1 - 1e-10)  # as pycocotools has it
        asker, asked, iou = asker[kept], asked[kept], iou[kept]
        # A crowd region serves any number, as if there were one for each who asks.
        served = np.where(flat.crowd[asked], count + np.arange(len(asked)), asked)
        for name, area in areas.items():
            other = others[name][asked]
            own, rest = np.flatnonzero(~other), np.flatnonzero(other)
            taken = np.zeros(found, np.bool_)
            taken[asker[own[assign(asker[own], asked[own], count)]]] = True
            excused = _outside(sides, *area) & ~taken
            rest = rest[~taken[asker[rest]]]
            excused[asker[rest[assign(asker[rest], served[rest], count + len(asked))]]] = True
            right[name][t], ignored[name][t] = taken[order], excused[order]

    starts = class_starts(flat.labels[order], len(flat.classes))
    verdicts = {
        name: Verdicts(
            starts,
            flat.images[order],
            right[name],
            ignored[name],
            flat.object_labels[~others[name]],
            flat.object_images[~others[name]],
        )
        for name in areas
    }
    return Coco(flat.classes, verdicts, place[order])


def _outside(areas: Float64, least: float, most: float) -> Bool:
    return (areas < least) | (areas > most)
