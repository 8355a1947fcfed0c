"""What evaluations found is kept exactly, the best and the newest of it, and damage is no error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from boxwright.training import found
from boxwright.types import Detections


def some(seed: int, pictures: int = 4) -> list[Detections]:
    rng = np.random.default_rng(seed)
    counts = [0, *rng.integers(1, 5, pictures - 2), 0]
    return [
        Detections(rng.random((n, 4), np.float32), rng.random(n, np.float32), rng.integers(0, 9, n)) for n in counts
    ]


def assert_same(ours: Sequence[Detections] | None, theirs: Sequence[Detections]) -> None:
    assert ours is not None
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a.boxes, b.boxes)
        assert np.array_equal(a.scores, b.scores)
        assert np.array_equal(a.labels, b.labels)
        assert (a.boxes.dtype, a.labels.dtype) == (np.float32, np.int64)


def test_the_best_and_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(10, 70, 10):
        found.keep(tmp_path, step, some(step), best=20 if step >= 20 else 10)
    best, others = found.read(tmp_path, 20, 4)
    assert_same(best, some(20))
    assert len(others) == found.NEWEST
    for ours, step in zip(others, (40, 50, 60), strict=True):
        assert_same(ours, some(step))
    found.forget(tmp_path)
    assert found.read(tmp_path, 20, 4) == (None, [])


def test_no_detections_at_all(tmp_path: Path) -> None:
    found.keep(tmp_path, 1, [Detections(), Detections()], best=1)
    best, _ = found.read(tmp_path, 1, 2)
    assert_same(best, [Detections(), Detections()])


def test_what_is_damaged_or_of_other_pictures_is_not_there(tmp_path: Path) -> None:
    found.keep(tmp_path, 1, some(1), best=1)
    assert found.read(tmp_path, 1, 5) == (None, [])
    path = next((tmp_path / "evaluation" / "found").iterdir())
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-200], bytes(len(whole))):
        path.write_bytes(damaged)
        assert found.read(tmp_path, 1, 4)[0] is None
