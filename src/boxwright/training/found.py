"""What a run's evaluations found on the validation pictures, kept until the run is over and its best weights are
analysed.

<run>/evaluation/found/
└── step_000001200.npz      flat arrays, no pickle; that of the best weights and the newest few
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from boxwright.folders import commit
from boxwright.types import Detections

NEWEST = 3  # kept beside the best: what a detector finds in all of them persists


def keep(folder: Path, step: int, detections: Sequence[Detections], *, best: int) -> None:
    """Keep what was found after `step` in a run's folder, and forget what is neither new nor of the step `best`."""
    place = _place(folder)
    place.mkdir(parents=True, exist_ok=True)
    temporary = place / "step.npz.tmp"
    with temporary.open("wb") as file:
        np.savez(
            file,
            counts=np.array([len(found) for found in detections], np.int64),
            boxes=_joined([found.boxes for found in detections], np.float32, 4),
            scores=_joined([found.scores for found in detections], np.float32),
            labels=_joined([found.labels for found in detections], np.int64),
        )
    commit(temporary, _file(folder, step))
    newest = _kept(folder)[-NEWEST:]
    for path in _kept(folder):
        if path not in (*newest, _file(folder, best)):
            path.unlink()


def read(folder: Path, best: int, pictures: int) -> tuple[list[Detections] | None, list[list[Detections]]]:
    """What the weights of the step `best` found in so many pictures, None if it is gone; and what others did."""
    others = [found for path in _kept(folder) if path != _file(folder, best) and (found := _read(path, pictures))]
    return _read(_file(folder, best), pictures), others


def forget(folder: Path) -> None:
    """Remove all that is kept."""
    for path in _kept(folder):
        path.unlink()
    with suppress(OSError):
        _place(folder).rmdir()


def _place(folder: Path) -> Path:
    return folder / "evaluation" / "found"


def _file(folder: Path, step: int) -> Path:
    return _place(folder) / f"step_{step:09}.npz"


def _kept(folder: Path) -> list[Path]:
    return sorted(_place(folder).glob("step_*.npz"))


def _read(path: Path, pictures: int) -> list[Detections] | None:
    """None where a file is not there, damaged or of other pictures: figures can do without."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            counts, boxes, scores, labels = (arrays[name] for name in ("counts", "boxes", "scores", "labels"))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    if len(counts) != pictures or not counts.sum() == len(boxes) == len(scores) == len(labels):
        return None
    edges = np.cumsum(counts)[:-1]
    parts = (np.split(values, edges) for values in (boxes, scores, labels))
    return [Detections(*part) for part in zip(*parts, strict=True)]


def _joined(parts: Sequence[np.ndarray], kind: type[np.generic], width: int | None = None) -> np.ndarray:
    empty = np.zeros(0 if width is None else (0, width), kind)
    return np.concatenate([empty, *parts]).astype(kind)
