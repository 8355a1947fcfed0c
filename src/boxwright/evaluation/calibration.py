"""Judged detections → whether a score of 0.8 means right eight times in ten."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from boxwright.evaluation.judging import Float64, Judged, share
from boxwright.types import Bool, Int64


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


BINS = 10
EDGES: Float64 = np.arange(BINS + 1) / BINS


def calibration(judged: Judged, *, threshold: float) -> Calibration:
    """How well scores are calibrated; `threshold` is the recommended one."""
    scores, right, counts = judged.flat.scores, judged.right, ~judged.ignored
    number, score, true = _bins(scores[counts], right[counts])
    shown = counts & (scores >= threshold)
    return Calibration(
        bins=tuple(
            Bin(low, high, int(n), share(s, n), share(r, n))
            for low, high, n, s, r in zip(EDGES[:-1].tolist(), EDGES[1:].tolist(), number, score, true, strict=True)
        ),
        error=_error(scores[counts], right[counts]),
        error_shown=_error(scores[shown], right[shown]),
        overconfident=share(float(score.sum() - true.sum()), int(number.sum())),
        ignored=int(judged.ignored.sum()),
        per_class={name: _error(scores[mine & counts], right[mine & counts]) for name, mine, _ in judged.groups},
    )


def _bins(scores: Float64, right: Bool) -> tuple[Int64, Float64, Float64]:
    """Count, sum of scores and right ones in each bin, (10,)."""
    which = np.searchsorted(EDGES[1:-1], scores, side="right")  # a score of 1 or more falls into the last
    number = np.bincount(which, minlength=BINS)
    sums = [np.bincount(which, weights, BINS).astype(np.float64) for weights in (scores, right)]
    return number, sums[0], sums[1]


def _error(scores: Float64, right: Bool) -> float:
    """Sum over bins of their share of detections times |mean score - share of right ones|."""
    _, score, true = _bins(scores, right)
    return float(np.abs(score - true).sum() / len(scores)) if len(scores) else math.nan
