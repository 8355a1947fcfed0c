"""Records and detections → flat arrays in an order of their own, and all pairs that overlap; every figure starts here.

The order decides which of several equals comes first, so that no figure depends on how anything was listed: pictures
by their ids; in a picture, objects by class and box; detections best first, of tied ones the larger, then by class and
box.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boxwright.types import Bool, Detections, Int64, Record

Float64 = NDArray[np.float64]

_CHUNK = 1_000_000  # pairs looked at together: some 100 MB


@dataclass(frozen=True, eq=False)
class Flat:
    """All objects and detections of a split."""

    classes: tuple[str, ...]
    ids: tuple[str, ...]  # of the pictures, sorted
    object_boxes: Float64  # (N, 4) pixels
    object_labels: Int64  # (N,)
    object_images: Int64  # (N,) index into `ids`, ascending
    difficult: Bool  # (N,)
    crowd: Bool  # (N,) regions of many objects
    object_areas: Float64  # (N,) square pixels, by which COCO tells small from large
    object_places: Int64  # (N,) index within the object's record
    boxes: Float64  # (D, 4) pixels
    labels: Int64  # (D,)
    scores: Float64  # (D,)
    images: Int64  # (D,) index into `ids`, ascending

    @cached_property
    def by_class(self) -> Int64:
        """The order of all detections by class, in a class best first, tied ones as they stand here, (D,)."""
        best_first = np.argsort(-self.scores, kind="stable")
        labels = self.labels[best_first]
        few = (
            labels.astype(np.uint16) if len(self.classes) < 1 << 16 else labels
        )  # sorted by digits: three times as fast
        return best_first[np.argsort(few, kind="stable")]

    @cached_property
    def places(self) -> Int64:
        """The place of each detection among those of its class and picture, best first, from 0, (D,)."""
        group = self.images * len(self.classes) + self.labels
        order = np.argsort(group, kind="stable")
        first = np.ones(len(order), np.bool_)
        first[1:] = group[order][1:] != group[order][:-1]
        begun = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order)) - begun
        return place

    def against(self, **objects: NDArray[Any]) -> Flat:
        """The same detections against other objects; what is known of their order is kept."""
        assert all(name.startswith("object_") or name in ("difficult", "crowd") for name in objects)
        other = replace(self, **objects)
        other.__dict__.update(by_class=self.by_class, places=self.places)
        return other


@dataclass(frozen=True, eq=False)
class Pairs:
    """Detections and objects of the same picture that overlap, in the order of the detections, then of the objects."""

    detection: Int64  # (P,)
    object: Int64  # (P,)
    iou: Float64  # (P,)


def flatten(
    records: Sequence[Record],
    detections: Sequence[Detections],
    classes: Sequence[str],
    *,
    areas: Sequence[NDArray[np.floating[Any]]] | None = None,
) -> Flat:
    """Put `detections`, those of `records` in the same order, into flat arrays.

    areas: of each record's objects, (N,) square pixels; the boxes' own where not given.
    """
    assert len(records) == len(detections), "one Detections for each Record, in the same order"
    order = sorted(range(len(records)), key=lambda index: records[index].id)
    records, detections = [records[index] for index in order], [detections[index] for index in order]

    object_boxes = _joined([record.boxes for record in records], np.float64, 4)
    object_labels = _joined([record.labels for record in records], np.int64)
    object_images = np.repeat(np.arange(len(records)), [len(record.labels) for record in records])
    difficult = _joined([record.difficult for record in records], np.bool_)
    crowd = _joined([record.crowd for record in records], np.bool_)
    if areas is None:
        object_areas = (object_boxes[:, 2:] - object_boxes[:, :2]).prod(axis=1)
    else:
        object_areas = _joined([areas[index] for index in order], np.float64)
    places = _joined([np.arange(len(record.labels)) for record in records], np.int64)
    # Objects of equal box and class may still differ in what is said of them: that decides last.
    objects = np.lexsort((object_areas, crowd, difficult, *object_boxes.T[::-1], object_labels, object_images))

    boxes = _joined([found.boxes for found in detections], np.float64, 4)
    labels = _joined([found.labels for found in detections], np.int64)
    scores = _joined([found.scores for found in detections], np.float64)
    images = np.repeat(np.arange(len(records)), [len(found.labels) for found in detections])
    best_first = _sorted((-scores, images), (*boxes.T[::-1], labels, -_area(boxes, 0)))
    return Flat(
        classes=tuple(classes),
        ids=tuple(record.id for record in records),
        object_boxes=object_boxes[objects],
        object_labels=object_labels[objects],
        object_images=object_images[objects],
        difficult=difficult[objects],
        crowd=crowd[objects],
        object_areas=object_areas[objects],
        object_places=places[objects],
        boxes=boxes[best_first],
        labels=labels[best_first],
        scores=scores[best_first],
        images=images[best_first],
    )


def pairs(
    flat: Flat, *, minimum: float = 0.0, pixel: float = 0.0, same_class: bool = True, crowd_share: bool = False
) -> Pairs:
    """All pairs of a detection and an object of its picture with an IoU above `minimum`.

    pixel: added to each side before anything is multiplied: 1 for boxes that hold their first and last pixel.
    same_class: only pairs of one class.
    crowd_share: with a crowd region, what counts is the share of the detection inside it, COCO's rule, not the IoU.
    """
    found = list(_chunks(flat, minimum, pixel, same_class, crowd_share))
    if not found:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    return Pairs(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _chunks(
    flat: Flat, minimum: float, pixel: float, same_class: bool, crowd_share: bool
) -> Iterator[tuple[Int64, Int64, Float64]]:
    kinds = len(flat.classes) if same_class else 1
    object_group = flat.object_images * kinds + (flat.object_labels if same_class else 0)  # (N,)
    group = flat.images * kinds + (flat.labels if same_class else 0)  # (D,)
    # Objects are sorted by picture and class, so a group's stand side by side.
    start = np.searchsorted(object_group, group, side="left")  # (D,)
    count = np.searchsorted(object_group, group, side="right") - start  # (D,)
    some = np.flatnonzero(count)  # detections that have any object in their group
    total = np.cumsum(count[some])
    area = _area(flat.boxes, pixel)  # (D,)
    object_area = _area(flat.object_boxes, pixel)  # (N,)
    left, top, right, bottom = (np.ascontiguousarray(edge) for edge in flat.boxes.T)
    object_left, object_top, object_right, object_bottom = (np.ascontiguousarray(e) for e in flat.object_boxes.T)
    done = 0
    while done < len(some):
        before = int(total[done - 1]) if done else 0
        end = max(done + 1, int(np.searchsorted(total, before + _CHUNK, side="right")))
        here = some[done:end]
        detection = np.repeat(here, count[here])  # (P,)
        first = np.repeat(start[here] - (total[done:end] - count[here] - before), count[here])
        thing = first + np.arange(len(detection))  # (P,)
        width = np.minimum(right[detection], object_right[thing]) - np.maximum(left[detection], object_left[thing])
        height = np.minimum(bottom[detection], object_bottom[thing]) - np.maximum(top[detection], object_top[thing])
        near = np.flatnonzero((width > -pixel) & (height > -pixel))
        detection, thing = detection[near], thing[near]
        shared = (width[near] + pixel) * (height[near] + pixel)
        whole = area[detection] + object_area[thing] - shared
        if crowd_share:
            whole = np.where(flat.crowd[thing], area[detection], whole)
        iou = np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)  # sides of 1e-300 have no area
        kept = iou > minimum
        yield detection[kept], thing[kept], iou[kept]
        done = end


def _sorted(keys: tuple[NDArray[Any], ...], among_equals: tuple[NDArray[Any], ...]) -> Int64:
    """The order by `keys`, the last of them first, as lexsort has it; `among_equals` decide among equals."""
    order = np.lexsort(keys)
    equal = np.ones(max(len(order) - 1, 0), np.bool_)
    for key in keys:
        values = key[order]
        equal &= values[1:] == values[:-1]
    tied = np.zeros(len(order), np.bool_)
    tied[1:] |= equal
    tied[:-1] |= equal
    members = order[tied]
    order[tied] = members[np.lexsort(tuple(key[members] for key in (*among_equals, *keys)))]
    return order


def _area(boxes: Float64, pixel: float) -> Float64:
    return (boxes[:, 2:] - boxes[:, :2] + pixel).prod(axis=1)


def _joined(parts: Sequence[NDArray[Any]], kind: Any, width: int | None = None) -> NDArray[Any]:
    """(N,) or (N, width) of the parts of all pictures."""
    empty = np.zeros(0 if width is None else (0, width), kind)
    return np.concatenate([empty, *parts]).astype(kind, copy=False)


def assign(asker: Int64, asked: Int64, objects: int) -> Int64:
    """Which of the askings (P,) are granted when all ask in turn, each for the first that is still free; sorted.

    asker, asked: (P,) an asker's wishes stand side by side, the best first; whoever comes first chooses first.

    All ask at once for what they like most; each object keeps the first of those who asked and refuses all who come
    after, who ask for their next. That ends in a few rounds with what taking turns gives.
    """
    rest = np.arange(len(asker))
    while True:
        who, what = asker[rest], asked[rest]
        first = np.ones(len(rest), np.bool_)
        first[1:] = who[1:] != who[:-1]
        best = np.full(objects, np.iinfo(np.int64).max)
        best[what[first][::-1]] = who[first][::-1]  # of several who ask for one, the last written is the first
        keep = who <= best[what]
        if keep.all():
            return rest[first]
        rest = rest[keep]
