from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boxwright.evaluation.thresholds import best_of, best_threshold, thresholds
from boxwright.types import Detections

WHOLE, FAR = (0, 0, 10, 10), (100, 100, 110, 110)


def in_a_row(count: int) -> list[tuple[int, ...]]:
    return [(20 * index, 0, 20 * index + 10, 10) for index in range(count)]


def test_the_threshold_lies_in_the_middle_of_the_gap(scene: Any) -> None:
    boxes = in_a_row(3)
    found = [("cat", 0.75, boxes[0]), ("cat", 0.5, boxes[1]), ("cat", 0.25, FAR), ("cat", 0.125, FAR)]
    judged = scene({"a": [("cat", box) for box in boxes[:2]]}, {"a": found})
    assert best_threshold(*judged) == 0.375


def test_where_all_are_right_the_gap_reaches_down_to_zero(scene: Any) -> None:
    assert best_threshold(*scene({"a": [("cat", WHOLE)]}, {"a": [("cat", 0.75, WHOLE)]})) == 0.375


def test_of_equal_f1_the_widest_gap_is_taken(scene: Any, judged_by: Any) -> None:
    # 1 of 1 right with 3 to find, then 2 of 5: F1 is 1/2 both times. 0.9 | 0.8 is narrow, 0.5 | 0 wide.
    boxes = in_a_row(3)
    found = [("cat", 0.9, boxes[0]), *(("cat", score, FAR) for score in (0.8, 0.7, 0.6)), ("cat", 0.5, boxes[1])]
    best = best_of(judged_by(scene({"a": [("cat", box) for box in boxes]}, {"a": found})))
    assert best.f1 == 0.5
    assert best.threshold == 0.25
    assert (best.shown, best.precision, best.recall) == (5, 0.4, pytest.approx(2 / 3))


def test_equal_scores_are_shown_together(scene: Any) -> None:
    # With the right one of the two alone F1 would be 1; no threshold shows it without the wrong ones.
    boxes = in_a_row(2)
    found = [("cat", 0.75, boxes[0]), ("cat", 0.5, boxes[1]), *(("cat", 0.5, FAR) for _ in range(3))]
    assert best_threshold(*scene({"a": [("cat", box) for box in boxes]}, {"a": found})) == 0.625


def test_scores_next_to_each_other_are_told_apart_as_float32(scene: Any) -> None:
    low = np.float32(0.5)
    high = np.nextafter(low, np.float32(1))
    judged = scene({"a": [("cat", WHOLE)]}, {"a": [("cat", high, WHOLE), ("cat", low, FAR)]})
    threshold = best_threshold(*judged)
    assert [len(found.above(threshold)) for found in judged.detections] == [1]


@pytest.mark.parametrize(
    ("objects", "found", "note"),
    [
        ([], [("cat", 0.9, WHOLE)], "no objects to find"),
        ([("cat", WHOLE, "difficult")], [("cat", 0.9, WHOLE)], "no objects to find"),
        ([("cat", WHOLE)], [], "no detections"),
        ([("cat", WHOLE)], [("cat", 0.9, FAR)], "no right detection"),
    ],
)
def test_where_nothing_can_be_maximised_it_is_half_and_says_why(
    scene: Any, judged_by: Any, objects: Any, found: Any, note: str
) -> None:
    judged = scene({"a": objects}, {"a": found})
    best = thresholds(judged_by(judged))
    assert (best.overall.threshold, best.overall.note) == (0.5, note)
    assert best.per_class["cat"] == best.overall or np.isnan(best.overall.f1)
    assert best.per_class["dog"].threshold == best_threshold(*judged) == 0.5


def test_each_class_has_its_own(scene: Any, judged_by: Any) -> None:
    objects = {"a": [("cat", WHOLE), ("dog", FAR)]}
    found = {"a": [("cat", 0.75, WHOLE), ("cat", 0.5, FAR), ("dog", 0.25, FAR), ("dog", 0.125, WHOLE)]}
    best = thresholds(judged_by(scene(objects, found)))
    assert (best.per_class["cat"].threshold, best.per_class["dog"].threshold) == (0.625, 0.1875)
    assert best.per_class["cat"].f1 == best.per_class["dog"].f1 == 1
    assert best.overall.f1 == pytest.approx(4 / 5)  # with the cat's false alarm between the right ones


def f1_at(judged: Any, threshold: float) -> float:
    """By hand: of all detections that are not ignored."""
    shown = (judged.flat.scores >= threshold) & ~judged.ignored
    whole = shown.sum() + judged.counted.sum()
    return 2 * (judged.right & shown).sum() / whole if whole else float("nan")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_other_threshold_is_better(random_sets: Any, judged_by: Any, data: st.DataObject) -> None:
    drawn = data.draw(random_sets)
    judged = judged_by(drawn)
    best = best_of(judged)
    assert best.threshold == best_threshold(*drawn)
    assert best.f1 == pytest.approx(f1_at(judged, best.threshold), nan_ok=True)
    if not best.note:
        assert best.f1 >= max(f1_at(judged, threshold) for threshold in np.arange(0, 1, 0.05))
        recomputed = 2 * best.precision * best.recall / (best.precision + best.recall)
        assert best.f1 == pytest.approx(recomputed)


def test_five_thousand_pictures_take_seconds_at_most(scene: Any) -> None:
    """Training asks after each epoch: 0.7 s on one core; the bound catches a loop over pictures in Python."""
    one = scene({"a": [("cat", box) for box in in_a_row(7)]}, {})
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 130, (5000, 100, 2))
    boxes = np.concatenate([corner, corner + 10], axis=2).astype(np.float32)
    scores = rng.random((5000, 100)).astype(np.float32)
    labels = rng.integers(0, 2, (5000, 100))
    found = [Detections(*parts) for parts in zip(boxes, scores, labels, strict=True)]
    start = time.perf_counter()
    best_threshold(list(one.records) * 5000, found, one.classes)
    assert time.perf_counter() - start < 5
