from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boxwright.evaluation import judging, score
from boxwright.evaluation.matching import Flat, Pairs


def iou_of(a: Any, b: Any) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def taking_turns(flat: Flat, iou: float) -> list[int]:
    """Each detection's object, one detection after the other as one would do it by hand."""
    taken = [-1] * len(flat.scores)
    for detection in sorted(range(len(flat.scores)), key=lambda index: -flat.scores[index]):
        best = iou
        for thing in range(len(flat.object_labels)):
            same = flat.images[detection] == flat.object_images[thing]
            same &= flat.labels[detection] == flat.object_labels[thing]
            if not same or flat.difficult[thing] or flat.crowd[thing] or thing in taken:
                continue
            overlap = iou_of(flat.boxes[detection], flat.object_boxes[thing])
            if overlap > best or (overlap == best and taken[detection] < 0):
                best, taken[detection] = overlap, thing
    return taken


@settings(max_examples=150, deadline=None)
@given(data=st.data(), iou=st.sampled_from([0.1, 0.3, 0.5, 0.75]))
def test_all_at_once_is_taking_turns(random_sets: Any, judged_by: Any, data: st.DataObject, iou: float) -> None:
    judged = judged_by(data.draw(random_sets), iou)
    assert judged.taken.tolist() == taking_turns(judged.flat, iou)
    for detection, thing in enumerate(judged.taken):
        assert (thing >= 0) == judged.right[detection]
        assert thing < 0 or judged.finder[thing] == detection
    assert judged.found.sum() == judged.right.sum()
    assert not (judged.right & judged.ignored).any()
    assert (judged.right | judged.ignored | judged.wrong).all()


def test_a_long_chain_of_refusals_ends_in_turns() -> None:
    # Detection k likes object k most and k + 1 next, but all like object 0 best: each is pushed on by one.
    count = 50
    detection = np.repeat(np.arange(count), count)
    thing = np.tile(np.arange(count), count)
    near = Pairs(detection, thing, 1 - thing / 100)
    rank = np.arange(count)[::-1].copy()
    assert judging.assign(rank, near, count).tolist() == list(range(count))[::-1]


def test_a_detection_that_a_better_one_pushed_out_takes_its_next_best(scene: Any, judged_by: Any) -> None:
    # Both detections like the first object more; the worse one still fits the second.
    objects = [("cat", (0, 0, 10, 10)), ("cat", (0, 0, 10, 7))]
    found = [("cat", 0.9, (0, 0, 10, 10)), ("cat", 0.8, (0, 0, 10, 9))]
    assert judged_by(scene({"a": objects}, {"a": found})).right.tolist() == [True, True]


@pytest.mark.parametrize("mark", ["difficult", "crowd"])
def test_difficult_objects_and_crowds_are_neither_found_nor_missed(scene: Any, judged_by: Any, mark: str) -> None:
    found = [
        ("cat", 0.9, (0, 0, 100, 90)),
        ("cat", 0.8, (0, 0, 100, 80)),
        ("cat", 0.7, (0, 0, 10, 10)),
        ("dog", 0.6, (0, 0, 100, 90)),
    ]
    judged = judged_by(scene({"a": [("cat", (0, 0, 100, 100), mark)]}, {"a": found}))
    assert judged.to_find.tolist() == [0, 0]
    # The small one lies wholly in the region, which excuses it from a crowd, not from a difficult object.
    assert judged.ignored.tolist() == [True, True, mark == "crowd", False]
    assert judged.wrong.tolist() == [False, False, mark == "difficult", True]
    assert judged.excused.tolist() == [True, True, mark == "crowd", True]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_ap_is_coco_ap50_where_nothing_is_difficult(random_sets: Any, judged_by: Any, data: st.DataObject) -> None:
    scene = data.draw(random_sets)
    records = [record.only(~record.difficult) for record in scene.records]
    judged = judged_by((records, scene.detections, scene.classes))
    flat = judged.flat
    ours = judging.best_precisions(flat.labels, flat.scores, judged.right, judged.to_find).mean(axis=1)
    theirs = score(records, scene.detections, scene.classes).per_class
    assert ours == pytest.approx([theirs[name]["AP50"] for name in scene.classes], abs=1e-9, nan_ok=True)


@pytest.mark.real_data
def test_ap_is_coco_ap50_on_a_sample_of_coco(coco_sample100: Any, judged_by: Any) -> None:
    judged = judged_by(coco_sample100)
    flat = judged.flat
    ours = judging.best_precisions(flat.labels, flat.scores, judged.right, judged.to_find).mean(axis=1)
    theirs = score(*coco_sample100).per_class
    expected = [theirs[name]["AP50"] for name in coco_sample100.classes]
    assert ours == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert np.nanmean(ours) > 0.3


def test_a_share_of_nothing_is_unknown() -> None:
    assert judging.share(1, 4) == 0.25
    assert np.isnan(judging.share(0, 0))
