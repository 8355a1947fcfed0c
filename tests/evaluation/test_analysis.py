from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boxwright.evaluation import score
from boxwright.evaluation.analysis import analyse
from boxwright.evaluation.thresholds import best_threshold
from boxwright.types import Detections

WHOLE, FAR = (0, 0, 10, 10), (100, 100, 110, 110)


def as_text(analysis: Any) -> str:
    return json.dumps(analysis.as_json(), allow_nan=False)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_the_order_of_pictures_objects_and_detections_makes_no_difference(
    random_sets: Any, data: st.DataObject, seed: int
) -> None:
    drawn = data.draw(random_sets)
    shuffled, draws = list(range(len(drawn.records))), random.Random(seed)
    draws.shuffle(shuffled)
    other = drawn.reordered(shuffled)
    within = [found[np.array(draws.sample(range(len(found)), len(found)), int)] for found in other.detections]
    first = analyse(*drawn, earlier=[drawn.detections])
    second = analyse(other.records, within, other.classes, earlier=[within])
    assert as_text(first) == as_text(second)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_parts_agree_with_each_other(random_sets: Any, data: st.DataObject) -> None:
    drawn = data.draw(random_sets)
    found = analyse(*drawn)
    plain = json.loads(as_text(found))
    assert plain["detections"] == found.errors.detections
    assert found.objects == found.errors.objects
    assert found.objects + found.ignored_objects == sum(len(record.boxes) for record in drawn.records)
    best = found.thresholds.overall
    assert best.threshold == found.confusion.threshold == best_threshold(*drawn)
    right, wrong, missed = (sum(getattr(p, name) for p in found.pictures) for name in ("right", "wrong", "missed"))
    assert right + wrong == best.shown
    assert right + missed == found.objects
    assert math.isnan(best.f1) or best.f1 == pytest.approx(2 * right / (2 * right + wrong + missed))
    assert [p.id for p in found.pictures] == sorted(record.id for record in drawn.records)


@pytest.mark.parametrize("classes", [[], ["cat"], ["cat", "dog"]])
def test_nothing_at_all(classes: list[str]) -> None:
    found = json.loads(as_text(analyse([], [], classes)))
    assert found["errors"]["ap"] is None
    assert found["thresholds"]["overall"]["threshold"] == 0.5
    assert found["review"]["suspects"] == found["pictures"] == []
    assert len(found["confusion"]["counts"]) == len(classes) + 1


@pytest.mark.parametrize(
    ("objects", "detections", "ap"),
    [
        ([], [], None),
        ([("cat", WHOLE)], [], 0),
        ([], [("cat", 0.9, WHOLE)], None),
        ([("cat", WHOLE)], [("cat", 0.9, WHOLE)], 1),
    ],
)
def test_one_class_with_or_without_objects_and_detections(scene: Any, objects: Any, detections: Any, ap: Any) -> None:
    drawn = scene({"a": objects, "b": []}, {"a": detections}, classes=["cat"])
    found = json.loads(as_text(analyse(*drawn, earlier=[drawn.detections])))
    assert found["errors"]["ap"] == found["curves"]["overall"]["ap"] == ap
    assert found["images"] == len(found["pictures"]) == 2


def test_what_is_perfect_has_no_mistakes(scene: Any) -> None:
    drawn = scene({"a": [("cat", WHOLE), ("dog", FAR)]}, {"a": [("cat", 0.9, WHOLE), ("dog", 0.8, FAR)]})
    found = analyse(*drawn)
    assert found.errors.ap == found.thresholds.overall.f1 == found.pictures[0].f1 == 1
    assert all(loss.count == loss.gain == 0 for loss in found.errors.losses.values())
    assert found.confusion.counts == ((1, 0, 0), (0, 1, 0), (0, 0, 0))
    assert found.review.suspects == ()


def test_pictures_tell_right_wrong_missed_and_ignored(scene: Any) -> None:
    annotated = {
        "a": [("cat", WHOLE), ("cat", FAR), ("dog", (200, 0, 210, 10), "difficult")],
        "b": [("cat", WHOLE)],
        "c": [],
    }
    detections = {
        "a": [("cat", 0.9, WHOLE), ("dog", 0.9, FAR), ("dog", 0.9, (200, 0, 210, 10))],
        "b": [("cat", 0.9, WHOLE)],
    }
    found = {p.id: (p.right, p.wrong, p.missed, p.ignored) for p in analyse(*scene(annotated, detections)).pictures}
    assert found == {"a": (1, 1, 1, 1), "b": (1, 0, 0, 0), "c": (0, 0, 0, 0)}


def test_lists_of_different_lengths_are_a_mistake_of_ours(scene: Any) -> None:
    drawn = scene({"a": []}, {})
    with pytest.raises(AssertionError):
        analyse(drawn.records, [], drawn.classes)
    with pytest.raises(AssertionError):
        analyse(*drawn, earlier=[[Detections(), Detections()]])


@pytest.mark.real_data
def test_voc_2012_as_published_detections_see_it(voc12_100: Any) -> None:
    judged = voc12_100.edges()
    found = analyse(*judged, earlier=[judged.detections])
    scores = score(*judged)
    # VOC's area under the curve also ignores difficult objects; COCO's 101 points differ by the sampling.
    assert found.errors.ap == pytest.approx(scores.voc["area@50"], abs=0.01)
    assert found.objects == 235
    assert found.ignored_objects == 38
    # The detector's scores start at 0.4 and say little; what it finds beside the annotated is most of its loss.
    losses = found.errors.losses
    assert (
        max(("class", "place", "both", "duplicate", "background"), key=lambda kind: losses[kind].count) == "background"
    )
    assert found.calibration.error > 0.2
    assert {g.name: g.objects for g in found.breakdown.sizes} == {"small": 7, "medium": 62, "large": 166}
    # The same detections as an earlier epoch persist, all of them.
    assert {suspect.persistence for suspect in found.review.suspects} == {1.0}
    json.loads(as_text(found))


@pytest.mark.real_data
def test_ap_is_coco_ap50_of_a_sample_of_coco(coco_sample100: Any) -> None:
    assert analyse(*coco_sample100).errors.ap == pytest.approx(score(*coco_sample100).coco["AP50"], abs=1e-6)
