"""Flat objects and detections → which kinds of mistake cost how much AP, after TIDE (Bolya et al., ECCV 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from boxwright.evaluation.judging import Float64, Judged, best_precisions, nearest, select
from boxwright.evaluation.precision import mean
from boxwright.types import Int64

KINDS = ("class", "place", "both", "duplicate", "background", "missed")
ORACLES = (*KINDS, "false positives", "false negatives")


@dataclass(frozen=True)
class Loss:
    """One kind of mistake: how many there are, and what AP would gain if this kind alone were mended.

    Gains of several kinds do not add up to 1 - AP: mending one makes others matter more or less. `gain` is never
    negative, and NaN where there is nothing to find.
    """

    count: int
    gain: float  # AP after mending minus AP, fraction 0 .. 1


@dataclass(frozen=True)
class ClassErrors:
    """The mistakes of one class: detections of this class, and for missed and false negatives its objects."""

    ap: float  # at the analysis' IoU, COCO's 101 points, 0 .. 1; NaN where there is nothing to find
    objects: int  # that count: neither difficult nor crowd
    found: int  # of them, by a right detection of any score
    detections: int  # right + ignored + class + place + both + duplicate + background
    right: int
    ignored: int  # lie on a difficult object or a crowd region of their class
    losses: dict[str, Loss]  # by kind: class place both duplicate background missed, false positives, false negatives


@dataclass(frozen=True)
class Errors(ClassErrors):
    """Where AP is lost: all classes together (AP and gains are means over classes), and each class.

    `class`: the box fits an object of another class. `place`: right class, but the box fits too badly (IoU between
    `background_iou` and the analysis' IoU). `both`: wrong class and badly placed. `duplicate`: a better detection has
    the object. `background`: no object there. `missed`: an object without right detection that no `class` or
    `place` mistake accounts for. `false positives` are all wrong detections, `false negatives` all objects not found.
    """

    background_iou: float  # below it a detection has nothing to do with an object
    per_class: dict[str, ClassErrors]  # by class name, in the order of the classes


BACKGROUND = 0.1  # TIDE's
WRONG, MISSED = KINDS[:-1], KINDS[-1]


def errors(judged: Judged, *, background: float = BACKGROUND) -> Errors:
    """Each mistake's kind, and what AP would gain without it.

    A wrong detection is of the first kind that fits, in the order of TIDE's published code: place, class, duplicate,
    background, both. Mended means: a `class` or `place` mistake becomes right if nobody has its object, the best one
    if there are several, while the others go; the three other kinds go; missed objects are no longer to be found.
    """
    flat = judged.flat
    kinds, target = _kinds(judged, background)
    missed = judged.counted & ~judged.found
    missed[_usable(judged, kinds, target)] = False
    counts = {kind: judged.per_class(flat.labels[kinds == index]) for index, kind in enumerate(WRONG)}
    counts[MISSED] = judged.per_class(flat.object_labels[missed])
    counts["false positives"] = judged.per_class(flat.labels[judged.wrong])
    counts["false negatives"] = judged.per_class(flat.object_labels[judged.counted & ~judged.found])

    to_find = judged.to_find
    ap = _ap(judged, to_find, judged.right, ~judged.ignored)
    mended = {kind: _mended(judged, kinds == index, target, kind) for index, kind in enumerate(WRONG)}
    mended["false positives"] = _ap(judged, to_find, judged.right, judged.right)
    for kind in (MISSED, "false negatives"):
        mended[kind] = _ap(judged, to_find, judged.right, ~judged.ignored, left=to_find - counts[kind])
    per_class = {
        name: ClassErrors(
            ap=float(ap[k]),
            objects=int(to_find[k]),
            found=int(judged.right[mine].sum()),
            detections=int(mine.sum()),
            right=int(judged.right[mine].sum()),
            ignored=int(judged.ignored[mine].sum()),
            losses={kind: Loss(int(counts[kind][k]), float(mended[kind][k] - ap[k])) for kind in ORACLES},
        )
        for k, (name, mine, _) in enumerate(judged.groups)
    }
    return Errors(
        ap=mean(ap),
        objects=int(to_find.sum()),
        found=int(judged.right.sum()),
        detections=len(flat.scores),
        right=int(judged.right.sum()),
        ignored=int(judged.ignored.sum()),
        losses={kind: Loss(int(counts[kind].sum()), mean(mended[kind] - ap)) for kind in ORACLES},
        background_iou=background,
        per_class=per_class,
    )


def _kinds(judged: Judged, background: float) -> tuple[Int64, Int64]:
    """Each detection's kind as an index into WRONG, -1 if it is not wrong, and the object meant, -1 if none; (D,)."""
    flat, near = judged.flat, select(judged.pairs, judged.counted[judged.pairs.object])
    own = flat.labels[near.detection] == flat.object_labels[near.object]
    own_iou, own_object = nearest(select(near, own), len(flat.scores))
    other_iou, other_object = nearest(select(near, ~own), len(flat.scores))
    fits = [
        (own_iou >= background) & (own_iou < judged.iou),
        other_iou >= judged.iou,
        own_iou >= judged.iou,
        np.maximum(own_iou, other_iou) < background,
    ]
    order = [WRONG.index(kind) for kind in ("place", "class", "duplicate", "background")]
    kinds = np.select(fits, order, WRONG.index("both"))
    kinds[~judged.wrong] = -1
    target = np.full(len(kinds), -1)
    for kind, objects in (("place", own_object), ("class", other_object)):
        mine = kinds == WRONG.index(kind)
        target[mine] = objects[mine]
    return kinds, target


def _usable(judged: Judged, kinds: Int64, target: Int64) -> Int64:
    """The objects that a detection of kind class or place means."""
    return target[np.isin(kinds, [WRONG.index("class"), WRONG.index("place")])]


def _mended(judged: Judged, these: np.ndarray, target: Int64, kind: str) -> Float64:
    """AP of each class, (K,), with the wrong detections at `these` (D,) mended as their kind demands."""
    labels, right = judged.flat.labels, judged.right
    if kind in ("class", "place"):
        free = np.flatnonzero(these)
        free = free[~judged.found[target[free]]]
        best_first = free[np.argsort(judged.rank[free])]
        objects, first = np.unique(target[best_first], return_index=True)
        made_right = best_first[first]
        labels, right = labels.copy(), right.copy()
        labels[made_right], right[made_right] = judged.flat.object_labels[objects], True
    return _ap(judged, judged.to_find, right, ~judged.ignored & (right | ~these), labels=labels)


def _ap(
    judged: Judged,
    to_find: Int64,
    right: np.ndarray,
    keep: np.ndarray,
    *,
    labels: Int64 | None = None,
    left: Int64 | None = None,
) -> Float64:
    """AP of each class, (K,), by the detections at `keep` (D,), of which those at `right` are right.

    left: (K,) how many of the objects `to_find` are to be found still. A class of which none is left is perfect
        without detections and worth nothing with some, which then are all wrong.
    """
    labels = judged.flat.labels if labels is None else labels
    left = to_find if left is None else left
    figures = best_precisions(labels[keep], judged.flat.scores[keep], right[keep], left).mean(axis=1)
    settled = (to_find > 0) & (left == 0)
    figures[settled] = judged.per_class(labels[keep])[settled] == 0
    return figures
