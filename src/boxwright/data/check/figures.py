"""Records → counts and sizes, by class and by split: the figures that a person looks at before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from boxwright.types import Record

SMALL, MEDIUM = 32**2, 96**2  # COCO's limits of area, in pixels
LEARNABLE = 8  # pixels of a side at the size of training, below which little is left on a map of stride 8 or 16
QUANTILES = (0, 25, 50, 75, 100)


@dataclass(frozen=True)
class Spread:
    """Least, quartiles and most of some numbers, and a histogram of them in equal steps of their logarithm."""

    quantiles: tuple[float, ...]  # at QUANTILES
    bars: tuple[int, ...]
    low: float
    high: float


@dataclass(frozen=True)
class ClassRow:
    """How often a class occurs in a split."""

    objects: int = 0
    pictures: int = 0
    difficult: int = 0
    crowd: int = 0


@dataclass(frozen=True)
class Figures:
    """A split in numbers."""

    pictures: int  # that there are
    used: int  # that training would use
    objects: int
    difficult: int
    crowd: int
    truncated: int
    occluded: int
    parts: int  # boxes of <part>s, not objects
    fractional: int  # VOC boxes with corners between pixels
    empty: int  # pictures without an object
    all_difficult: int  # pictures all of whose objects are difficult or a crowd
    small: int  # by COCO's areas
    medium: int
    large: int
    under: int | None  # boxes with a side under LEARNABLE at `imgsz`
    classes: dict[str, ClassRow]
    spreads: dict[str, Spread] = field(default_factory=dict[str, Spread])


def figures(
    records: Sequence[Record], classes: Sequence[str], *, pictures: int, parts: int, fractional: int, imgsz: int | None
) -> Figures:
    """The numbers of one split."""
    counts = np.array([len(record.labels) for record in records], np.int64)
    sizes = np.array([record.size for record in records], np.float64).reshape(-1, 2)  # (P, 2) height, width
    owner = np.repeat(np.arange(len(records)), counts)  # (N,)
    boxes = _joined([record.boxes for record in records], (0, 4)).astype(np.float64)
    labels = _joined([record.labels for record in records], (0,)).astype(np.int64)
    marks = {
        name: _joined([getattr(record, name) for record in records], (0,)).astype(bool)
        for name in ("difficult", "crowd", "truncated", "occluded")
    }
    sides = boxes[:, 2:] - boxes[:, :2]  # (N, 2) width, height
    areas = sides.prod(1)
    ignored = marks["difficult"] | marks["crowd"]
    learnt = np.bincount(owner[~ignored], minlength=len(records))
    under = None
    if imgsz is not None and len(boxes):
        scale = imgsz / sizes.max(1)[owner]
        under = int((sides.min(1) * scale < LEARNABLE).sum())
    spreads = {
        "picture width": _spread(sizes[:, 1]),
        "picture height": _spread(sizes[:, 0]),
        "objects in a picture": _spread(counts.astype(np.float64), steps=True),
        "box width": _spread(sides[:, 0]),
        "box height": _spread(sides[:, 1]),
        "box width / height": _spread(sides[:, 0] / sides[:, 1]) if len(sides) else None,
        "box side / picture side": _spread(np.sqrt(areas / sizes.prod(1)[owner])) if len(sides) else None,
    }
    return Figures(
        pictures=pictures,
        used=len(records),
        objects=len(boxes),
        difficult=int(marks["difficult"].sum()),
        crowd=int(marks["crowd"].sum()),
        truncated=int(marks["truncated"].sum()),
        occluded=int(marks["occluded"].sum()),
        parts=parts,
        fractional=fractional,
        empty=int((counts == 0).sum()),
        all_difficult=int(((counts > 0) & (learnt == 0)).sum()),
        small=int((areas < SMALL).sum()),
        medium=int(((areas >= SMALL) & (areas < MEDIUM)).sum()),
        large=int((areas >= MEDIUM).sum()),
        under=under,
        classes={
            name: ClassRow(
                objects=int((labels == label).sum()),
                pictures=len(np.unique(owner[labels == label])),
                difficult=int(marks["difficult"][labels == label].sum()),
                crowd=int(marks["crowd"][labels == label].sum()),
            )
            for label, name in enumerate(classes)
        },
        spreads={name: spread for name, spread in spreads.items() if spread is not None},
    )


def _joined(parts: Sequence[NDArray[np.generic]], empty: tuple[int, ...]) -> NDArray[np.generic]:
    return np.concatenate(parts) if parts else np.zeros(empty)


def _spread(values: NDArray[np.float64], *, steps: bool = False) -> Spread | None:
    """None where there are no numbers; `steps` for counts, whose histogram has equal steps."""
    if not len(values):
        return None
    quantiles = tuple(float(value) for value in np.percentile(values, QUANTILES))
    low, high = quantiles[0], quantiles[-1]
    if steps:
        edges = np.linspace(low - 0.5, high + 0.5, int(min(high - low + 1, 24)) + 1)
    elif low == high:
        return Spread(quantiles, (len(values),), low, high)
    else:
        edges = np.geomspace(low, high, 25)
        edges[0], edges[-1] = low, high
    bars, _ = np.histogram(values, edges)
    return Spread(quantiles, tuple(int(bar) for bar in bars), low, high)
