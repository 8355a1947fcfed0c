"""Judged detections → the score from which on a detection is worth showing: the one that maximises F1."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Threshold:
    """A score and what detections of at least that score are worth; NaN where there is nothing to compare."""

    threshold: float  # 0 .. 1, in the middle of the gap between two neighbouring scores
    f1: float
    precision: float
    recall: float
    shown: int  # detections of at least that score that are judged
    note: str  # why this is not a maximum ("no objects to find"), or ""


@dataclass(frozen=True)
class Thresholds:
    """The threshold that maximises F1 over all detections of all classes, and that of each class alone."""

    overall: Threshold
    per_class: dict[str, Threshold]  # by class name, in the order of the classes
