"""Judged detections → precision by recall, and precision, recall and F1 by threshold, on grids of 101 points."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """The curves of one class; their x axes are `Curves.recalls` and `Curves.thresholds`. NaN: nothing to compare."""

    ap: float  # the mean of `best_precision`
    best_precision: tuple[float, ...]  # (101,) best precision at this recall or a higher one; 0 where never reached
    precision: tuple[float, ...]  # (101,) of detections of at least the threshold; NaN where there are none
    recall: tuple[float, ...]  # (101,)
    f1: tuple[float, ...]  # (101,)


@dataclass(frozen=True)
class Curves:
    """The curves of all classes together and of each.

    Together, `ap` and `best_precision` are means over the classes that have objects; `precision`, `recall` and `f1`
    are of all classes' detections in one heap.
    """

    recalls: tuple[float, ...]  # (101,) 0 0.01 .. 1
    thresholds: tuple[float, ...]  # (101,) 0 0.01 .. 1
    overall: Curve
    per_class: dict[str, Curve]  # by class name, in the order of the classes
