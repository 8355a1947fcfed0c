"""Verdicts → how far a figure would move with other pictures of the same kind: a bootstrap over pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from boxwright.evaluation.precision import Points, Verdicts, resampled

Float64 = NDArray[np.float64]
Range = tuple[float, float]

LEVEL = 0.95
_TOGETHER = 32  # resamples at a time: few enough for the memory, enough for numpy


@dataclass(frozen=True)
class Figure:
    """A figure to be followed through the resamples: the mean over some IoUs of a verdict's AP."""

    verdicts: Verdicts
    points: Points
    ious: tuple[int, ...]  # indices


def intervals(
    figures: Mapping[str, Figure], pictures: int, classes: int, *, resamples: int, seed: int
) -> tuple[dict[str, Range], dict[str, list[Range]]]:
    """The middle `LEVEL` of each figure, and of it for each class (K), over splits of as many pictures, drawn with
    replacement from the ones there are; NaN where no resample knows the figure.

    The same pictures are drawn for all figures. `seed` decides them, for pictures in the order of their ids.
    """
    assert resamples > 0
    draw = np.random.default_rng(seed)
    groups: dict[tuple[int, Points], list[str]] = {}
    for name, figure in figures.items():
        groups.setdefault((id(figure.verdicts), figure.points), []).append(name)
    drawn = {name: np.full((resamples, classes), np.nan) for name in figures}
    whole = {name: np.full(resamples, np.nan) for name in figures}
    for start in range(0, resamples, _TOGETHER) if pictures else ():
        here = slice(start, min(start + _TOGETHER, resamples))
        weights = draw.multinomial(pictures, np.full(pictures, 1 / pictures), size=here.stop - start).astype(np.float64)
        for (_, points), names in groups.items():
            values = resampled(figures[names[0]].verdicts, points, weights)  # (B, K, T)
            for name in names:
                mine = values[:, :, figures[name].ious]
                drawn[name][here] = mine.mean(axis=2)
                whole[name][here] = _known_mean(mine.reshape(len(mine), -1))
    return (
        {name: _middle(values) for name, values in whole.items()},
        {name: [_middle(column) for column in values.T] for name, values in drawn.items()},
    )


def _known_mean(values: Float64) -> Float64:
    """The mean of the known of each row, (B,)."""
    known = ~np.isnan(values)
    count = known.sum(axis=1)
    return np.where(count > 0, np.where(known, values, 0).sum(axis=1) / np.maximum(count, 1), np.nan)


def _middle(values: Float64) -> Range:
    known = values[~np.isnan(values)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
