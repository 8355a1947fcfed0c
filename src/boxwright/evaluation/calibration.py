"""Judged detections → whether a score of 0.8 means right eight times in ten."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bin:
    """The judged detections with a score in [low, high), the last bin with its upper edge."""

    low: float
    high: float
    count: int
    score: float  # their mean; NaN where there are none
    right: float  # the share that is right; NaN where there are none


@dataclass(frozen=True)
class Calibration:
    """How far scores are from shares of right detections.

    Right means: class and IoU fit, and no better detection has the object. Detections on difficult objects and crowd
    regions are neither right nor wrong: they are left out, `ignored` says how many.
    """

    bins: tuple[Bin, ...]  # ten of equal width
    error: float  # expected calibration error: mean of |score - right| over bins, weighed by count; NaN without any
    error_shown: float  # the same, of the detections of at least the recommended threshold alone
    overconfident: float  # mean score minus share of right ones, of all judged: above 0 scores promise too much
    ignored: int
    per_class: dict[str, float]  # `error` by class name
