from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boxwright.evaluation.errors import KINDS, ORACLES, errors

WHOLE, HALF_OFF, FAR = (0, 0, 10, 10), (0, 5, 10, 15), (100, 100, 110, 110)  # IoU of the first two: 1/3
ELSEWHERE = (200, 200, 210, 210)


def counts(found: Any) -> dict[str, int]:
    return {kind: found.losses[kind].count for kind in KINDS if found.losses[kind].count}


def gains(found: Any) -> dict[str, float]:
    return {kind: round(loss.gain, 6) for kind, loss in found.losses.items() if loss.gain}


# One cat to find, and one detection before or instead of the right one: AP and gains follow by hand.
ALONE = [
    ("class", [("dog", 0.9, WHOLE)], 1.0),  # becomes a cat, which is found then
    ("place", [("cat", 0.9, HALF_OFF)], 1.0),
    ("both", [("dog", 0.9, HALF_OFF)], 0.0),  # goes, but finds nothing
    ("background", [("cat", 0.9, FAR)], 0.0),
]


@pytest.mark.parametrize(("kind", "found", "gain"), ALONE)
def test_a_wrong_detection_alone(scene: Any, judged_by: Any, kind: str, found: Any, gain: float) -> None:
    result = errors(judged_by(scene({"a": [("cat", WHOLE)]}, {"a": found})))
    assert result.ap == 0
    missed = {} if gain else {"missed": 1}  # a class or place mistake accounts for its object
    assert counts(result) == {kind: 1} | missed
    assert result.losses[kind].gain == pytest.approx(gain)
    assert result.per_class["cat"].losses[kind].gain == pytest.approx(gain)
    assert np.isnan(result.per_class["dog"].ap)  # nothing of it to find: its mistakes cost no AP
    assert result.losses["false positives"].count == 1
    assert result.losses["false negatives"].count == 1


BEFORE = {
    "class": ("cat", (50, 50, 60, 60)),  # on a dog that has been found
    "place": ("cat", HALF_OFF),
    "both": ("cat", (50, 55, 60, 65)),
    "background": ("cat", FAR),
}


@pytest.mark.parametrize("kind", BEFORE)
def test_a_wrong_detection_before_the_right_one_costs_half_the_precision(scene: Any, judged_by: Any, kind: str) -> None:
    name, box = BEFORE[kind]
    objects = [("cat", WHOLE), ("dog", (50, 50, 60, 60))]
    found = [(name, 0.9, box), ("cat", 0.5, WHOLE), ("dog", 0.8, (50, 50, 60, 60))]
    result = errors(judged_by(scene({"a": objects}, {"a": found})))
    assert counts(result) == {kind: 1}
    assert result.ap == pytest.approx((0.5 + 1) / 2)  # cats 0.5, dogs 1
    assert gains(result) == {kind: 0.25, "false positives": 0.25}
    assert result.per_class["cat"].losses[kind].gain == pytest.approx(0.5)
    assert result.per_class["dog"].losses[kind].gain == 0


def test_a_duplicate_is_one_whose_object_a_better_one_has(scene: Any, judged_by: Any) -> None:
    objects = {"a": [("cat", WHOLE)], "b": [("cat", WHOLE)]}
    found = {"a": [("cat", 0.9, WHOLE), ("cat", 0.8, (0, 0, 10, 9))], "b": [("cat", 0.7, WHOLE)]}
    result = errors(judged_by(scene(objects, found)))
    assert counts(result) == {"duplicate": 1}
    # Right, wrong, right of two: precision 1 up to recall 0.5 (51 of the 101 points), 2/3 after.
    assert result.ap == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert result.losses["duplicate"].gain == pytest.approx(1 - result.ap)


def test_missed_objects_are_no_longer_to_be_found(scene: Any, judged_by: Any) -> None:
    objects = {"a": [("cat", WHOLE), ("cat", FAR), ("dog", ELSEWHERE)]}
    result = errors(judged_by(scene(objects, {"a": [("cat", 0.9, WHOLE)]})))
    assert counts(result) == {"missed": 2}
    assert result.ap == pytest.approx((51 / 101 + 0) / 2)
    assert result.losses["missed"].gain == pytest.approx(1 - result.ap)  # dogs: none left to find, none invented
    assert result.per_class["dog"].losses["missed"].gain == 1
    assert result.found == result.right == 1


def test_nothing_left_to_find_is_worth_nothing_beside_false_alarms(scene: Any, judged_by: Any) -> None:
    result = errors(judged_by(scene({"a": [("cat", WHOLE)]}, {"a": [("cat", 0.9, FAR)]})))
    assert counts(result) == {"missed": 1, "background": 1}
    assert result.losses["missed"].gain == 0


def test_of_several_that_mean_one_object_the_best_is_mended_and_the_others_go(scene: Any, judged_by: Any) -> None:
    found = [("cat", 0.9, HALF_OFF), ("cat", 0.8, (0, -5, 10, 5)), ("cat", 0.7, FAR)]
    result = errors(judged_by(scene({"a": [("cat", WHOLE)]}, {"a": found})))
    assert counts(result) == {"place": 2, "background": 1}
    assert result.losses["place"].gain == 1  # the best one comes first, before the one in the background


@pytest.mark.parametrize(("kind", "wrong"), [("place", ("cat", 0.5, HALF_OFF)), ("class", ("dog", 0.5, WHOLE))])
def test_an_object_that_has_been_found_is_not_found_again(scene: Any, judged_by: Any, kind: str, wrong: Any) -> None:
    objects = {"a": [("cat", WHOLE), ("cat", FAR), ("dog", ELSEWHERE)]}
    result = errors(judged_by(scene(objects, {"a": [("cat", 0.9, WHOLE), wrong, ("dog", 0.9, ELSEWHERE)]})))
    assert counts(result) == {kind: 1, "missed": 1}
    assert result.losses[kind].gain == 0  # it goes; half of the cats are found as before


def test_a_class_mistake_moves_to_the_class_of_its_object(scene: Any, judged_by: Any) -> None:
    objects = {"a": [("cat", WHOLE), ("dog", FAR)]}
    found = {"a": [("dog", 0.9, WHOLE), ("dog", 0.5, FAR)]}
    result = errors(judged_by(scene(objects, found)))
    assert result.ap == pytest.approx((0 + 0.5) / 2)
    assert result.per_class["cat"].losses["class"].gain == 1  # the cat is found
    assert result.per_class["dog"].losses["class"].gain == pytest.approx(0.5)  # its false alarm is gone
    assert result.per_class["dog"].losses["class"].count == 1
    assert result.per_class["cat"].losses["class"].count == 0


def test_kinds_that_fit_both_are_told_by_the_order(scene: Any, judged_by: Any) -> None:
    """place before class before duplicate, as in TIDE's published code."""
    near_own = {"a": [("cat", WHOLE), ("dog", HALF_OFF)]}
    assert counts(errors(judged_by(scene(near_own, {"a": [("cat", 0.9, HALF_OFF)]}))))["place"] == 1
    both_fit = {"a": [("cat", WHOLE), ("dog", (0, 0, 10, 9))]}
    found = [("cat", 0.9, WHOLE), ("cat", 0.8, (0, 0, 10, 9))]
    assert counts(errors(judged_by(scene(both_fit, {"a": found})))) == {"class": 1}


def test_ignored_detections_are_no_mistakes(scene: Any, judged_by: Any) -> None:
    objects = {"a": [("cat", WHOLE, "difficult"), ("cat", FAR)]}
    found = {"a": [("cat", 0.9, WHOLE), ("cat", 0.8, FAR), ("dog", 0.7, WHOLE)]}
    result = errors(judged_by(scene(objects, found)))
    # A difficult object is nothing that a detection of another class could mean.
    assert counts(result) == {"background": 1}
    assert (result.right, result.ignored, result.objects, result.ap) == (1, 1, 1, 1)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), iou=st.sampled_from([0.3, 0.5, 0.75]))
def test_laws(random_sets: Any, judged_by: Any, data: st.DataObject, iou: float) -> None:
    judged = judged_by(data.draw(random_sets), iou)
    result = errors(judged)
    for part in (result, *result.per_class.values()):
        wrong = sum(part.losses[kind].count for kind in KINDS if kind != "missed")
        assert part.right + part.ignored + wrong == part.detections
        assert part.losses["false positives"].count == wrong
        assert part.found + part.losses["false negatives"].count == part.objects
        assert part.losses["missed"].count <= part.losses["false negatives"].count
        for kind in ORACLES:
            gain = part.losses[kind].gain
            assert np.isnan(part.ap) if np.isnan(gain) else -1e-12 <= gain <= 1 - part.ap + 1e-12
            assert part is result or part.losses[kind].count or kind == "class" or not gain > 0
    for kind in ORACLES:
        assert sum(part.losses[kind].count for part in result.per_class.values()) == result.losses[kind].count
    assert result.detections == len(judged.flat.scores)
    assert result.objects == judged.counted.sum()
