from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boxwright.evaluation.calibration import calibration

WHOLE, FAR = (0, 0, 10, 10), (100, 100, 110, 110)


def test_bins_and_error_of_a_scene_known_by_hand(scene: Any, judged_by: Any) -> None:
    objects = {"a": [("cat", WHOLE), ("cat", (200, 0, 210, 10), "difficult")]}
    found = {"a": [("cat", 0.875, WHOLE), ("cat", 0.8125, FAR), ("cat", 0.25, FAR), ("cat", 0.5, (200, 0, 210, 10))]}
    result = calibration(judged_by(scene(objects, found)), threshold=0.5)
    assert [part.count for part in result.bins] == [0, 0, 1, 0, 0, 0, 0, 0, 2, 0]
    assert (result.bins[8].score, result.bins[8].right) == (0.84375, 0.5)
    assert (result.bins[2].score, result.bins[2].right) == (0.25, 0)
    assert math.isnan(result.bins[0].right)
    assert result.error == pytest.approx(2 / 3 * 0.34375 + 1 / 3 * 0.25)
    assert result.error_shown == pytest.approx(0.34375)
    assert result.overconfident == pytest.approx((0.875 + 0.8125 + 0.25) / 3 - 1 / 3)
    assert result.ignored == 1
    assert result.per_class["cat"] == result.error
    assert math.isnan(result.per_class["dog"])


def test_edges_belong_to_the_bin_above_and_one_to_the_last(scene: Any, judged_by: Any) -> None:
    found = [("cat", score, FAR) for score in (0.0, 0.5, 1.0)]
    result = calibration(judged_by(scene({"a": []}, {"a": found})), threshold=0.5)
    assert [index for index, part in enumerate(result.bins) if part.count] == [0, 5, 9]


def test_scores_that_are_shares_of_right_ones_have_no_error(scene: Any, judged_by: Any) -> None:
    """Of four detections with 0.75 three are right."""
    boxes = [(20 * index, 0, 20 * index + 10, 10) for index in range(4)]
    annotated = {"a": [("cat", box) for box in boxes[:3]]}
    result = calibration(judged_by(scene(annotated, {"a": [("cat", 0.75, box) for box in boxes]})), threshold=0.5)
    assert result.error == result.error_shown == result.overconfident == 0


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_judged_detection_is_in_one_bin(random_sets: Any, judged_by: Any, data: st.DataObject) -> None:
    judged = judged_by(data.draw(random_sets))
    result = calibration(judged, threshold=0.5)
    assert sum(part.count for part in result.bins) + result.ignored == len(judged.flat.scores)
    right = np.nansum([part.count * part.right for part in result.bins])
    assert right == pytest.approx(judged.right.sum())
    for part in result.bins:
        assert part.count == 0 or part.low <= part.score <= part.high
