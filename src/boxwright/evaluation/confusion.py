"""Flat objects and detections → which class is taken for which."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from boxwright.evaluation.judging import Judged, assign, select
from boxwright.types import Int64


@dataclass(frozen=True)
class Confusion:
    """Counts of annotated class (row) by detected class (column); the last row and column are background.

    Detections of at least `threshold`, best first and whatever their class, each take the object they overlap most
    among those not taken, if the IoU is at least `iou` (of equals, one of their own class). counts[a][b]: objects
    of class a taken by a detection of class b; counts[a][K]: objects nobody took; counts[K][b]: detections of b that
    took nothing, second ones of the same object too; counts[K][K] is 0. Difficult objects and crowd regions,
    and detections that fit nothing else than them, are left out.
    """

    names: tuple[str, ...]  # (K + 1,) the classes, or those of `MOST` with most confusion, and "background"
    counts: tuple[tuple[int, ...], ...]  # (K + 1, K + 1)
    threshold: float
    iou: float
    left_out: int = 0  # classes without a row and a column, because there are more than `MOST`
    left_out_pairs: int = 0  # objects and detections that were counted in a cell of such a class


MOST = 500  # classes: a table of all pairs of thousands of them would fill the memory with zeros
BACKGROUND = "background"


def confusion(judged: Judged, *, threshold: float) -> Confusion:
    """Who is taken for whom among detections of at least `threshold`."""
    flat, near, iou = judged.flat, judged.pairs, judged.iou
    count = len(flat.classes)
    shown = flat.scores >= threshold
    fits = select(near, (near.iou >= iou) & shown[near.detection] & judged.counted[near.object])
    own = flat.labels[fits.detection] == flat.object_labels[fits.object]
    taken = assign(judged.rank, fits, len(judged.counted), prefer=own)

    took = taken >= 0
    free = judged.counted.copy()
    free[taken[took]] = False
    invented = flat.labels[shown & ~took & ~judged.excused]
    missed = flat.object_labels[free]
    rows = np.concatenate([flat.object_labels[taken[took]], missed, np.full(len(invented), count)])
    columns = np.concatenate([flat.labels[took], np.full(len(missed), count), invented])

    kept = _most_confused(rows, columns, count)
    place = np.full(count + 1, -1)
    place[kept] = np.arange(len(kept))
    here = (place[rows] >= 0) & (place[columns] >= 0)
    counts = np.zeros((len(kept), len(kept)), np.int64)
    np.add.at(counts, (place[rows[here]], place[columns[here]]), 1)
    every = (*flat.classes, BACKGROUND)
    return Confusion(
        tuple(every[index] for index in kept.tolist()),
        tuple(tuple(row) for row in counts.tolist()),
        threshold,
        iou,
        left_out=count + 1 - len(kept),
        left_out_pairs=int((~here).sum()),
    )


def _most_confused(rows: Int64, columns: Int64, count: int) -> Int64:
    """The classes that have a place, and background, ascending: those in most cells' counts off the diagonal,
    mistakes between classes before those with background."""
    if count <= MOST:
        return np.arange(count + 1)
    wrong = rows != columns
    between = wrong & (rows < count) & (columns < count)
    mixed, any_ = (
        np.bincount(rows[which], minlength=count + 1) + np.bincount(columns[which], minlength=count + 1)
        for which in (between, wrong)
    )
    best_first = np.lexsort((-any_[:count], -mixed[:count]))
    return np.append(np.sort(best_first[:MOST]), count)
