"""Flat objects, detections and their pairs → which detections are right, and AP at one IoU; all parts start here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from boxwright.evaluation.matching import Flat, Pairs, pairs
from boxwright.evaluation.precision import RECALLS
from boxwright.types import Bool, Int64

Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Judged:
    """What became of each detection and each object at one IoU.

    Detections of a class, best first, each take the object of their class that they overlap most among those not
    taken (COCO's rule). Difficult objects and crowd regions are neither found nor missed; a detection that takes
    nothing and lies on one of its class is ignored, any number of them (VOC's rule).
    """

    flat: Flat
    pairs: Pairs  # as given
    iou: float
    rank: Int64  # (D,) place when sorted best first, ties in the order given
    counted: Bool  # (N,) objects to find
    right: Bool  # (D,)
    ignored: Bool  # (D,)
    taken: Int64  # (D,) the object that a right detection has, else -1
    finder: Int64  # (N,) the detection that has the object, else -1

    @property
    def wrong(self) -> Bool:
        return ~(self.right | self.ignored)  # (D,)

    @property
    def found(self) -> Bool:
        return self.finder >= 0  # (N,)

    @property
    def excused(self) -> Bool:
        """Detections on a difficult object or in a crowd region of any class, right ones among them, (D,)."""
        excused = np.zeros(len(self.right), np.bool_)
        excused[self.pairs.detection[~self.counted[self.pairs.object] & (self.pairs.iou >= self.iou)]] = True
        return excused

    @property
    def to_find(self) -> Int64:
        """How many objects of each class count, (K,)."""
        return self.per_class(self.flat.object_labels[self.counted])

    def per_class(self, labels: Int64) -> Int64:
        """How many of `labels` are of each class, (K,)."""
        return np.bincount(labels, minlength=len(self.flat.classes))

    @property
    def groups(self) -> list[tuple[str, Bool, Bool]]:
        """Each class's name, its detections (D,) and its objects (N,)."""
        flat = self.flat
        return [(name, flat.labels == k, flat.object_labels == k) for k, name in enumerate(flat.classes)]


def overlapping(flat: Flat, *, minimum: float = 0.0, same_class: bool = True) -> Pairs:
    """All pairs with an IoU of at least `minimum`; with a crowd region, the share of the detection inside it."""
    return pairs(flat, minimum=math.nextafter(minimum, 0), same_class=same_class, crowd_share=True)


def judge(flat: Flat, near: Pairs, *, iou: float) -> Judged:
    """Who is right, by `near`: all pairs `overlapping` by at least `iou`, those of other classes and lower IoU too."""
    counted = ~(flat.difficult | flat.crowd)
    rank = ranks(flat.scores)
    own = flat.labels[near.detection] == flat.object_labels[near.object]
    fits = own & (near.iou >= iou)
    taken = assign(rank, select(near, fits & counted[near.object]), len(counted))
    right = taken >= 0
    finder = np.full(len(counted), -1)
    finder[taken[right]] = np.flatnonzero(right)
    ignored = np.zeros(len(right), np.bool_)
    ignored[near.detection[fits & ~counted[near.object]]] = True
    return Judged(flat, near, iou, rank, counted, right, ignored & ~right, taken, finder)


def ranks(scores: Float64) -> Int64:
    """The place of each detection when sorted best first, ties in the order given, (D,)."""
    rank = np.empty(len(scores), np.int64)
    rank[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    return rank


def assign(rank: Int64, near: Pairs, objects: int, prefer: Bool | None = None) -> Int64:
    """The object that each detection takes, (D,), -1 for none: in order of `rank`, the free one it overlaps most.

    prefer: (P,) which of several pairs of equal IoU comes first.

    All detections ask at once for the object they like most; an object keeps the best that asked and refuses all
    that are worse, who ask for their next. It ends with what taking turns gives, in a few rounds.
    """
    rest = np.zeros(len(near.iou), np.bool_) if prefer is None else ~prefer
    order = np.lexsort((near.object, rest, -near.iou, rank[near.detection]))
    asker, asked = rank[near.detection][order], near.object[order]
    while True:
        first = np.ones(len(asker), np.bool_)
        first[1:] = asker[1:] != asker[:-1]
        best = np.full(objects, len(rank))
        best[asked[first][::-1]] = asker[first][::-1]  # of several who ask for one, the last written is the best
        keep = asker <= best[asked]
        if keep.all():
            break
        asker, asked = asker[keep], asked[keep]
    by_rank = np.full(len(rank), -1)
    by_rank[asker[first]] = asked[first]
    return by_rank[rank]


def select(near: Pairs, keep: Bool) -> Pairs:
    """The pairs at `keep` alone."""
    return Pairs(near.detection[keep], near.object[keep], near.iou[keep])


def nearest(near: Pairs, detections: int) -> tuple[Float64, Int64]:
    """Each detection's largest IoU and the object it has it with, (D,) both; 0 and -1 where it has no pair."""
    order = np.lexsort((near.object, -near.iou, near.detection))
    detection = near.detection[order]
    first = np.ones(len(detection), np.bool_)
    first[1:] = detection[1:] != detection[:-1]
    iou, which = np.zeros(detections), np.full(detections, -1)
    iou[detection[first]], which[detection[first]] = near.iou[order][first], near.object[order][first]
    return iou, which


def with_objects(flat: Flat, boxes: Float64, labels: Int64, images: Int64) -> Flat:
    """The same detections beside other objects: `boxes` (N, 4) of `labels` (N,) in `images` (N,), ascending."""
    none = np.zeros(len(labels), np.bool_)
    return replace(
        flat,
        object_boxes=boxes,
        object_labels=labels,
        object_images=images,
        object_areas=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
        object_places=np.zeros(len(labels), np.int64),
        difficult=none,
        crowd=none,
    )


def best_precisions(labels: Int64, scores: Float64, right: Bool, to_find: Int64) -> Float64:
    """For each class the best precision at COCO's 101 recalls or a higher one, (K, 101); NaN rows: nothing to find.

    labels, scores, right: of the judged detections, (D,); ties keep the order given.
    to_find: (K,)
    """
    order = np.lexsort((-scores, labels))
    right = right[order]
    ends = np.searchsorted(labels[order], np.arange(len(to_find) + 1))
    figures = np.full((len(to_find), len(RECALLS)), math.nan)
    for label in np.flatnonzero(to_find):
        found = np.cumsum(right[ends[label] : ends[label + 1]])
        precision = found / np.arange(1, len(found) + 1)
        best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
        reached = np.searchsorted(found / to_find[label], RECALLS)
        figures[label] = np.append(best_from_here, 0.0)[reached]  # 0 where a recall is never reached
    return figures


def share(part: float, whole: float) -> float:
    """part / whole; NaN of nothing."""
    return float(part / whole) if whole else math.nan
