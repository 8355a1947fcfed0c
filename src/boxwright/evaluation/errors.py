"""Flat objects and detections → which kinds of mistake cost how much AP, after TIDE (Bolya et al., ECCV 2020)."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("class", "place", "both", "duplicate", "background", "missed")
ORACLES = (*KINDS, "false positives", "false negatives")


@dataclass(frozen=True)
class Loss:
    """One kind of mistake: how many there are, and what AP would gain if this kind alone were mended.

    Gains of several kinds do not add up to 1 - AP: mending one makes others matter more or less. `gain` can be
    slightly negative and is NaN where there is nothing to find.
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
