"""Judged detections → how well objects are found by their size and by how crowded they stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from boxwright.evaluation.judging import Float64, Judged, best_precisions, nearest, overlapping, select, share
from boxwright.evaluation.precision import mean
from boxwright.types import Int64


@dataclass(frozen=True)
class Group:
    """Objects of one size or crowding, and the detections that belong to them; NaN where there are no objects."""

    name: str  # "small", "2 to 5 %", "1 other", ...
    low: float  # the measure's range, [low, high); high is NaN where there is no limit
    high: float
    objects: int  # that count: neither difficult nor crowd
    detections: int  # judged ones that belong to the group, any score
    ap: float  # mean over classes with objects in the group, at the analysis' IoU, 0 .. 1
    recall: float  # share of objects found by a detection of any score
    recall_shown: float  # share found by a detection of at least the recommended threshold


@dataclass(frozen=True)
class Breakdown:
    """AP and recall in groups of objects.

    A right detection belongs to its object's group. A wrong one belongs, by size, to the group of its own box; by
    crowding, to that of the object of its class that it overlaps most, and to none if it overlaps none by an IoU of
    0.1: so AP by crowding says how well objects are told apart, not how often background is taken for one.
    """

    sizes: tuple[Group, ...]  # small, medium, large by COCO: area below 32², below 96² square pixels, above
    relative_sizes: tuple[Group, ...]  # by square root of box area / picture area
    crowding: tuple[Group, ...]  # by the largest IoU with another object of the same class
    neighbours: tuple[Group, ...]  # by the number of objects of any class that overlap the object at all


COCO_SIZES = {"small": 0.0, "medium": 32.0, "large": 96.0}  # from this square root of the area on, pixels
RELATIVE_SIZES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75)  # square root of box area / picture area
CROWDING = (0.0, 0.1, 0.3, 0.5)  # largest IoU with another object of the class
NEIGHBOURS = {"none": 0.0, "1": 1.0, "2": 2.0, "3 or more": 3.0}
TOUCHES = 0.1  # IoU from which on a wrong detection belongs to an object


def breakdown(judged: Judged, picture_sizes: Int64, *, threshold: float) -> Breakdown:
    """AP and recall by size and crowding; picture_sizes: (I, 2) height and width by index of the flat pictures."""
    flat = judged.flat
    sides, object_sides = _sides(flat.boxes), _sides(flat.object_boxes)
    pictures = np.sqrt(picture_sizes.prod(axis=1).astype(float))  # (I,)
    relative, object_relative = sides / pictures[flat.images], object_sides / pictures[flat.object_images]
    crowding, neighbours = _crowding(judged)

    def groups(
        names: Sequence[str], lows: Sequence[float], of_objects: Float64, of_wrong: Float64
    ) -> tuple[Group, ...]:
        return _groups(judged, threshold, names, lows, of_objects, of_wrong)

    by_object = _lent(judged)
    return Breakdown(
        sizes=groups([*COCO_SIZES], [*COCO_SIZES.values()], np.sqrt(flat.object_areas), sides),
        relative_sizes=groups(_percents(RELATIVE_SIZES), RELATIVE_SIZES, object_relative, relative),
        crowding=groups(_overlaps(CROWDING), CROWDING, crowding, _of_object(crowding, by_object)),
        neighbours=groups([*NEIGHBOURS], [*NEIGHBOURS.values()], neighbours, _of_object(neighbours, by_object)),
    )


def coco_size(areas: Float64) -> Int64:
    """Which of COCO's sizes objects are of, 0 small, 1 medium, 2 large, (N,) as their areas."""
    return np.searchsorted([*COCO_SIZES.values()], np.sqrt(areas), side="right") - 1


def _sides(boxes: Float64) -> Float64:
    return np.sqrt((boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1))


def _percents(lows: Sequence[float]) -> list[str]:
    """Names of ranges of a picture's side."""
    edges = [f"{100 * low:.0f}" for low in lows]
    return [f"{low} to {high} %" for low, high in pairwise(edges)] + [f"{edges[-1]} % and more"]


def _overlaps(lows: Sequence[float]) -> list[str]:
    """Names of ranges of IoU."""
    return [f"IoU {low:g} to {high:g}" for low, high in pairwise(lows)] + [f"IoU {lows[-1]:g} and more"]


def _crowding(judged: Judged) -> tuple[Float64, Float64]:
    """Each object's largest IoU with another of its class, and how many objects of any class overlap it, (N,) both.

    Difficult objects crowd like any other; crowd regions are no objects.
    """
    flat = judged.flat
    count = len(flat.object_labels)
    among = overlapping(
        replace(
            flat,
            boxes=flat.object_boxes,
            labels=flat.object_labels,
            images=flat.object_images,
            scores=np.ones(count),
        ),
        same_class=False,
    )
    among = select(among, (among.detection != among.object) & ~flat.crowd[among.object])
    own = flat.object_labels[among.detection] == flat.object_labels[among.object]
    crowding, _ = nearest(select(among, own), count)
    return crowding, np.bincount(among.detection, minlength=count).astype(float)


def _lent(judged: Judged) -> Int64:
    """For each detection the object of its class whose group a wrong one belongs to, (D,), -1 for none."""
    flat, near = judged.flat, judged.pairs
    own = flat.labels[near.detection] == flat.object_labels[near.object]
    _, objects = nearest(select(near, own & judged.counted[near.object] & (near.iou >= TOUCHES)), len(flat.scores))
    return objects


def _of_object(values: Float64, objects: Int64) -> Float64:
    """`values` (N,) of `objects` (D,); NaN for none, which is of no group."""
    return np.append(values, math.nan)[objects]  # -1 takes the last


def _groups(
    judged: Judged,
    threshold: float,
    names: Sequence[str],
    lows: Sequence[float],
    of_objects: Float64,
    of_wrong: Float64,
) -> tuple[Group, ...]:
    """Groups by a measure of objects (N,) and of wrong detections (D,)."""
    flat = judged.flat
    of_detections = np.where(judged.right, _of_object(of_objects, judged.taken), of_wrong)
    found_shown = np.zeros(len(judged.counted), np.bool_)
    found_shown[judged.taken[judged.right & (flat.scores >= threshold)]] = True
    figures: list[Group] = []
    for name, low, high in zip(names, lows, [*lows[1:], math.inf], strict=True):
        objects = judged.counted & (of_objects >= low) & (of_objects < high)
        mine = ~judged.ignored & (of_detections >= low) & (of_detections < high)
        to_find, count = judged.per_class(flat.object_labels[objects]), int(objects.sum())
        precision = best_precisions(flat.labels[mine], flat.scores[mine], judged.right[mine], to_find)
        figures.append(
            Group(
                name=name,
                low=low,
                high=high if math.isfinite(high) else math.nan,
                objects=count,
                detections=int(mine.sum()),
                ap=mean(precision.mean(axis=1)),
                recall=share(int(judged.found[objects].sum()), count),
                recall_shown=share(int(found_shown[objects].sum()), count),
            )
        )
    return tuple(figures)
