from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boxwright.evaluation import confusion as module
from boxwright.evaluation.confusion import confusion

WHOLE, FAR = (0, 0, 10, 10), (100, 100, 110, 110)


def test_a_scene_known_by_hand(scene: Any, judged_by: Any) -> None:
    objects = {
        "a": [("cat", WHOLE), ("dog", FAR), ("dog", (200, 0, 210, 10)), ("cat", (300, 0, 310, 10), "difficult")],
        "b": [("cat", WHOLE)],
    }
    found = {
        "a": [
            ("cat", 0.9, WHOLE),
            ("cat", 0.8, WHOLE),  # second one of the same object
            ("cat", 0.7, FAR),  # a dog taken for a cat
            ("dog", 0.6, (300, 0, 310, 10)),  # on a difficult object: left out
            ("dog", 0.4, (200, 0, 210, 10)),  # below the threshold: the dog is missed
        ],
        "b": [("dog", 0.9, (400, 0, 410, 10)), ("cat", 0.5, WHOLE)],
    }
    result = confusion(judged_by(scene(objects, found)), threshold=0.5)
    assert result.names == ("cat", "dog", "background")
    assert result.counts == ((2, 0, 0), (1, 0, 1), (1, 1, 0))


def test_the_better_detection_takes_the_object_whatever_its_class(scene: Any, judged_by: Any) -> None:
    found = {"a": [("dog", 0.9, WHOLE), ("cat", 0.8, WHOLE)]}
    result = confusion(judged_by(scene({"a": [("cat", WHOLE)]}, found)), threshold=0.5)
    assert result.counts == ((0, 1, 0), (0, 0, 0), (1, 0, 0))


def test_of_two_objects_in_one_box_each_is_taken_by_its_class(scene: Any, judged_by: Any) -> None:
    both = {"a": [("cat", WHOLE), ("dog", WHOLE)]}
    found = {"a": [("dog", 0.9, WHOLE), ("cat", 0.8, WHOLE)]}
    assert confusion(judged_by(scene(both, found)), threshold=0.5).counts == ((1, 0, 0), (0, 1, 0), (0, 0, 0))


def test_of_many_classes_those_with_most_confusion_have_a_place(
    scene: Any, judged_by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST", 2)
    objects = {"a": [("cat", WHOLE), ("dog", FAR), ("emu", (200, 0, 210, 10)), ("emu", (300, 0, 310, 10))]}
    found = {"a": [("emu", 0.9, WHOLE), ("dog", 0.9, FAR), ("emu", 0.8, (200, 0, 210, 10))]}
    judged = judged_by(scene(objects, found, classes=("cat", "dog", "emu")))
    result = confusion(judged, threshold=0.5)
    assert result.names == ("cat", "emu", "background")
    assert result.counts == ((0, 1, 0), (0, 1, 1), (0, 0, 0))
    assert (result.left_out, result.left_out_pairs) == (1, 1)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), threshold=st.sampled_from([0.0, 0.4, 0.6, 1.0]))
def test_rows_are_objects_and_columns_detections(
    random_sets: Any, judged_by: Any, data: st.DataObject, threshold: float
) -> None:
    judged = judged_by(data.draw(random_sets))
    counts = np.array(confusion(judged, threshold=threshold).counts)
    assert counts[-1, -1] == 0
    assert counts[:-1].sum(axis=1).tolist() == judged.to_find.tolist()
    shown = judged.flat.scores >= threshold
    detected = judged.per_class(judged.flat.labels[shown])
    assert (counts[:, :-1].sum(axis=0) <= detected).all()
    left_out = judged.per_class(judged.flat.labels[shown & judged.excused])
    assert (counts[:, :-1].sum(axis=0) >= detected - left_out).all()
