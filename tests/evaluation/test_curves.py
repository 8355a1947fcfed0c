from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boxwright.evaluation.curves import curves
from boxwright.evaluation.errors import errors

WHOLE, FAR = (0, 0, 10, 10), (100, 100, 110, 110)


def test_curves_of_a_scene_known_by_hand(scene: Any, judged_by: Any) -> None:
    objects = {"a": [("cat", WHOLE), ("cat", FAR)]}
    found = {"a": [("cat", 0.75, WHOLE), ("cat", 0.5, (50, 50, 60, 60)), ("cat", 0.25, FAR)]}
    result = curves(judged_by(scene(objects, found)))
    cat = result.per_class["cat"]
    assert cat.best_precision == pytest.approx([1] * 51 + [2 / 3] * 50)
    at = {threshold: index for index, threshold in enumerate(result.thresholds)}
    for threshold, precision, recall in [(0.0, 2 / 3, 1), (0.25, 2 / 3, 1), (0.26, 1 / 2, 1 / 2), (0.75, 1, 1 / 2)]:
        index = at[threshold]
        assert cat.precision[index] == pytest.approx(precision)
        assert cat.recall[index] == pytest.approx(recall)
        assert cat.f1[index] == pytest.approx(2 * precision * recall / (precision + recall))
    assert math.isnan(cat.precision[at[0.76]])  # nothing is shown
    assert cat.recall[at[0.76]] == cat.f1[at[0.76]] == 0
    assert np.isnan(result.per_class["dog"].best_precision).all()
    assert repr(result.overall) == repr(cat)  # dogs have nothing to add; NaN is not itself


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_area_of_the_curve_is_the_ap_that_the_errors_start_from(
    random_sets: Any, judged_by: Any, data: st.DataObject
) -> None:
    judged = judged_by(data.draw(random_sets))
    result, lost = curves(judged), errors(judged)
    assert result.overall.ap == pytest.approx(lost.ap, nan_ok=True)
    for name, curve in result.per_class.items():
        assert curve.ap == pytest.approx(lost.per_class[name].ap, nan_ok=True)
        assert len(curve.best_precision) == len(curve.precision) == len(curve.recall) == len(curve.f1) == 101
        assert (np.diff(curve.best_precision) <= 0).all() or math.isnan(curve.ap)
        assert (np.diff(curve.recall) <= 0).all() or math.isnan(curve.recall[0])
