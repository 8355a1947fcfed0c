"""Flat objects and detections → which class is taken for which."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Confusion:
    """Counts of annotated class (row) by detected class (column); the last row and column are background.

    Detections of at least `threshold`, best first and whatever their class, each take the object they overlap most
    among those not taken, if the IoU is at least `iou` (of equals, one of their own class). counts[a][b]: objects
    of class a taken by a detection of class b; counts[a][K]: objects nobody took; counts[K][b]: detections of b that
    took nothing, second ones of the same object too; counts[K][K] is 0. Difficult objects and crowd regions,
    and detections that fit nothing else than them, are left out.
    """

    names: tuple[str, ...]  # (K + 1,) the classes and "background"
    counts: tuple[tuple[int, ...], ...]  # (K + 1, K + 1)
    threshold: float
    iou: float
