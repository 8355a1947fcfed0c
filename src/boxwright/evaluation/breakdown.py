"""Judged detections → how well objects are found by their size and by how crowded they stand."""

from __future__ import annotations

from dataclasses import dataclass


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
