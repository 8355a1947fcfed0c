"""Objects and detections → annotations that look wrong, the most suspicious first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Box = tuple[float, float, float, float]  # x1 y1 x2 y2, pixels
Suspicion = Literal["missing label", "wrong class", "wrong box", "nothing there"]


@dataclass(frozen=True)
class Suspect:
    """One annotation, or the lack of one, that a confident detection speaks against.

    `missing label`: a detection where no object is annotated (annotated_box and annotated_label are None).
    `wrong class`: the box fits an object that is annotated as another class. `wrong box`: the class agrees, the box
    does not. `nothing there`: an object that no detection of any class comes near (found_* and score are None).
    """

    kind: Suspicion
    image: str  # the record's id
    object: int | None  # index among the record's objects
    annotated_box: Box | None
    annotated_label: str | None  # class name
    found_box: Box | None
    found_label: str | None  # class name
    score: float | None  # of the detection
    iou: float | None  # of the two boxes; None where there is but one
    persistence: float | None  # share of the earlier epochs that say the same; None where none were given
    suspicion: float  # 0 .. 1, what the list is sorted by
    reason: str  # one sentence for people


@dataclass(frozen=True)
class Review:
    """The review list and how many suspects of each kind there were before it was cut to its length."""

    suspects: tuple[Suspect, ...]  # the most suspicious first
    counts: dict[str, int]  # by kind
    least_score: float  # of a detection that may speak against an annotation
    epochs: int  # how many earlier epochs' detections were looked at
