"""Flat objects and detections → which class is taken for which."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from boxwright.evaluation.judging import Judged, assign, select


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


BACKGROUND = "background"


def confusion(judged: Judged, *, threshold: float) -> Confusion:
    """Who is taken for whom among detections of at least `threshold`."""
    flat, near, iou = judged.flat, judged.pairs, judged.iou
    count = len(flat.classes)
    shown = flat.scores >= threshold
    fits = select(near, (near.iou >= iou) & shown[near.detection] & judged.counted[near.object])
    own = flat.labels[fits.detection] == flat.object_labels[fits.object]
    taken = assign(judged.rank, fits, len(judged.counted), prefer=own)

    counts = np.zeros((count + 1, count + 1), np.int64)
    took = taken >= 0
    np.add.at(counts, (flat.object_labels[taken[took]], flat.labels[took]), 1)
    free = judged.counted.copy()
    free[taken[took]] = False
    counts[:count, count] = judged.per_class(flat.object_labels[free])
    counts[count, :count] = judged.per_class(flat.labels[shown & ~took & ~judged.excused])
    names = (*flat.classes, BACKGROUND)
    return Confusion(names, tuple(tuple(row) for row in counts.tolist()), threshold, iou)
