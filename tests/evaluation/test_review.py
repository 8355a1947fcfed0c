from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from boxwright.evaluation.review import KINDS, review
from boxwright.types import Detections, Record

WHOLE, FAR, OFF = (0, 0, 100, 100), (300, 300, 400, 400), (0, 50, 100, 150)  # IoU of the first and last: 1/3
SURE = [("cat", 0.5, FAR)]  # a right detection, so that those of at least its score may speak


def listed(judged: Any, **options: Any) -> Any:
    return review(judged, threshold=0.3, **options)


@pytest.mark.parametrize(
    ("kind", "objects", "found", "suspicion"),
    [
        ("missing label", [], [("cat", 0.9, WHOLE)], 0.9),
        ("wrong class", [("dog", WHOLE)], [("cat", 0.9, WHOLE)], 0.9),
        ("wrong box", [("cat", WHOLE)], [("cat", 0.9, OFF)], 0.9 * 2 / 3),
        ("nothing there", [("cat", WHOLE)], [], 0.5),  # of two large cats one is found
    ],
)
def test_each_kind(scene: Any, judged_by: Any, kind: str, objects: Any, found: Any, suspicion: float) -> None:
    drawn = scene({"a": [("cat", FAR), *objects]}, {"a": [*SURE, *found]})
    result = listed(judged_by(drawn))
    assert result.counts == dict.fromkeys(KINDS, 0) | {kind: 1}
    suspect = result.suspects[0]
    assert (suspect.kind, suspect.image, suspect.persistence) == (kind, "a", None)
    assert suspect.suspicion == pytest.approx(suspicion, abs=1e-6)
    if objects:
        assert suspect.object == 1
        assert suspect.annotated_box == WHOLE
        assert suspect.annotated_label == objects[0][0]
        assert suspect.annotated_label in suspect.reason
    else:
        assert suspect.object is suspect.annotated_box is suspect.annotated_label is suspect.iou is None
    if found:
        assert (suspect.found_label, suspect.found_box) == ("cat", found[0][2])
        assert suspect.score == pytest.approx(0.9)
        assert "0.90" in suspect.reason
    else:
        assert suspect.score is suspect.found_label is suspect.found_box is suspect.iou is None


def test_a_badly_placed_detection_of_an_unfound_object_is_about_its_box_alone(scene: Any, judged_by: Any) -> None:
    """An IoU of 0.2 would be far enough for a missing label."""
    far_off = (0, 200 / 3, 100, 500 / 3)
    drawn = scene({"a": [("cat", FAR), ("cat", WHOLE)]}, {"a": [*SURE, ("cat", 0.9, far_off)]})
    assert [(s.kind, round(s.iou, 3)) for s in listed(judged_by(drawn)).suspects] == [("wrong box", 0.2)]
    # For another class it is one: nothing says that the two belong together.
    drawn = scene({"a": [("cat", FAR), ("cat", WHOLE)]}, {"a": [*SURE, ("dog", 0.9, far_off)]})
    assert [s.kind for s in listed(judged_by(drawn)).suspects] == ["missing label"]


def test_an_object_is_named_by_its_place_in_the_record(scene: Any, judged_by: Any) -> None:
    """Flat arrays have an order of their own."""
    objects = {"b": [("dog", FAR), ("cat", WHOLE), ("cat", FAR)], "a": [("cat", FAR)]}
    drawn = scene(objects, {"b": [*SURE, ("dog", 0.5, FAR)], "a": SURE})
    suspects = listed(judged_by(drawn)).suspects
    assert [(s.kind, s.image, s.object) for s in suspects] == [("nothing there", "b", 1)]
    assert tuple(drawn.records[0].boxes[1]) == suspects[0].annotated_box


@pytest.mark.parametrize(
    ("objects", "found"),
    [
        ([("cat", WHOLE, "difficult")], []),
        ([("cat", WHOLE, "difficult")], [("dog", 0.9, WHOLE)]),
        ([("cat", WHOLE, "crowd")], [("dog", 0.9, (0, 0, 10, 10))]),
        ([("cat", WHOLE), ("cat", WHOLE, "difficult")], [("cat", 0.9, WHOLE), ("dog", 0.9, WHOLE)]),
        ([("cat", WHOLE)], [("cat", 0.9, WHOLE)]),
        ([("cat", WHOLE)], [("cat", 0.9, WHOLE), ("cat", 0.9, (0, 0, 100, 90))]),  # a duplicate is the detector's
        ([("cat", WHOLE)], [("cat", 0.9, WHOLE), ("cat", 0.9, OFF)]),  # so is a bad box of what has been found
        ([], [("dog", 0.4, WHOLE)]),  # not sure enough
    ],
)
def test_what_speaks_against_no_annotation(scene: Any, judged_by: Any, objects: Any, found: Any) -> None:
    result = listed(judged_by(scene({"a": [("cat", FAR), *objects]}, {"a": [*SURE, *found]})))
    assert [s.reason for s in result.suspects] == []


def test_a_right_detection_beside_it_makes_a_wrong_class_less_suspicious(scene: Any, judged_by: Any) -> None:
    drawn = scene({"a": [("cat", FAR)]}, {"a": [("cat", 0.75, FAR), ("dog", 0.75, FAR)]})
    suspect = listed(judged_by(drawn)).suspects[0]
    assert (suspect.kind, suspect.suspicion) == ("wrong class", 0.75 * 0.25)


def test_one_place_is_suspected_once_of_a_missing_label(scene: Any, judged_by: Any) -> None:
    found = [("cat", 0.9, WHOLE), ("dog", 0.8, WHOLE), ("cat", 0.7, (0, 0, 100, 90)), ("cat", 0.6, (150, 0, 250, 100))]
    result = listed(judged_by(scene({"a": [("cat", FAR)]}, {"a": [*SURE, *found]})))
    assert result.counts["missing label"] == 2
    assert [round(s.score, 2) for s in result.suspects] == [0.9, 0.6]


def test_what_persists_ranks_first(scene: Any, judged_by: Any) -> None:
    place, other = (0, 200, 100, 300), (200, 0, 300, 100)
    annotated = {"a": [("cat", FAR), ("dog", WHOLE)], "b": [], "c": [("dog", FAR)]}
    dog = {"c": [("dog", 0.5, FAR)]}  # found by all
    found = {"a": [*SURE, ("cat", 0.9, place)], "b": [("cat", 0.8, other)], **dog}
    drawn = scene(annotated, found)
    early = scene(annotated, {"a": [("cat", 0.2, FAR), ("dog", 0.3, WHOLE)], "b": [("cat", 0.25, other)], **dog})
    late = scene(annotated, {"a": SURE, "b": [("cat", 0.6, other), ("dog", 0.9, other)], **dog})
    earlier = [early.detections, late.detections, late.detections]
    result = review(judged_by(drawn), threshold=0.3, records=drawn.records, earlier=earlier)
    assert result.epochs == 3
    # In each epoch what counts is what was sure then: 0.25 was, early on.
    got = [(s.kind, s.image, round(s.persistence, 3), round(s.suspicion, 3)) for s in result.suspects]
    assert got == [
        ("missing label", "b", 1.0, 0.8),
        ("nothing there", "a", 0.667, 0.375),  # of two large dogs one is found
        ("missing label", "a", 0.0, 0.225),
    ]


def test_the_list_is_cut_but_all_are_counted(scene: Any, judged_by: Any) -> None:
    boxes = [(x, 0, x + 20, 20) for x in range(0, 200, 40)]
    found = [("cat", 0.6 + index / 100, box) for index, box in enumerate(boxes)]
    result = listed(judged_by(scene({"a": [("cat", FAR)]}, {"a": [*SURE, *found]})), limit=2)
    assert [round(s.score, 2) for s in result.suspects] == [0.64, 0.63]
    assert result.counts["missing label"] == 5


def test_without_right_detections_the_threshold_is_the_bar(scene: Any, judged_by: Any) -> None:
    result = listed(judged_by(scene({"a": []}, {"a": [("cat", 0.4, WHOLE), ("cat", 0.2, FAR)]})))
    assert (result.least_score, result.counts["missing label"]) == (0.3, 1)


# Planted mistakes: a detector that is nearly perfect, and annotations of which some are spoilt.

PICTURES, OBJECTS, CLASSES = 300, 4, ("cat", "dog", "cow")


def nearly_perfect(rng: np.random.Generator) -> tuple[list[Record], list[Detections]]:
    """Objects on a grid, each found with a high score and a box a little off, and three faint detections a picture."""
    records, found = [], []
    for index in range(PICTURES):
        corner = np.array([[0, 0], [200, 0], [0, 200], [200, 200]]) + rng.integers(0, 60, (OBJECTS, 2))
        boxes = np.concatenate([corner, corner + rng.integers(40, 120, (OBJECTS, 2))], axis=1).astype(np.float32)
        labels = rng.integers(0, len(CLASSES), OBJECTS)
        none = np.zeros(OBJECTS, bool)
        records.append(Record(f"{index:04d}", Any, (400, 400), boxes, labels, none, none))  # type: ignore[arg-type]
        corner = rng.integers(0, 300, (3, 2))
        faint = np.concatenate([corner, corner + 60], axis=1)
        near = boxes + rng.normal(0, 2, boxes.shape)
        found.append(
            Detections(
                np.concatenate([near, faint]).astype(np.float32),
                np.concatenate([rng.uniform(0.7, 1, OBJECTS), rng.uniform(0.05, 0.4, 3)]).astype(np.float32),
                np.concatenate([labels, rng.integers(0, len(CLASSES), 3)]),
            )
        )
    return records, found


def spoil(record: Record, kind: str) -> Record:
    """The same record with its object 1 spoilt."""
    if kind == "missing label":
        return record.only(np.arange(OBJECTS) != 1)
    boxes, labels = record.boxes.copy(), record.labels.copy()
    if kind == "wrong class":
        labels[1] = (labels[1] + 1) % len(CLASSES)
    else:
        boxes[1, [0, 2]] += (boxes[1, 2] - boxes[1, 0]) * 0.5  # IoU 1/3
    return replace(record, boxes=boxes, labels=labels)


def invent(record: Record) -> Record:
    """The same record with one more object, in the corner at the bottom right."""
    boxes = np.append(record.boxes, np.array([[330, 330, 395, 395]], np.float32), axis=0)
    none = np.zeros(OBJECTS + 1, bool)
    labels = np.append(record.labels, 0)
    return Record(record.id, record.image, record.size, boxes, labels, difficult=none, truncated=none)


@pytest.mark.parametrize("kind", ["missing label", "wrong class", "wrong box"])
def test_planted_mistakes_are_found(judged_by: Any, kind: str) -> None:
    records, found = nearly_perfect(np.random.default_rng(0))
    planted = {record.id for record in records[::10]}
    spoilt = [spoil(record, kind) if record.id in planted else record for record in records]
    suspects = review(judged_by((spoilt, found, CLASSES)), threshold=0.5).suspects
    first = suspects[: len(planted)]
    hits = {s.image for s in first if s.kind == kind and s.image in planted}
    assert len(hits) >= 0.75 * len(planted)  # as sure as three in four right detections: so many are asked at least
    assert sum(s.image in planted for s in suspects) >= 0.95 * len(suspects)  # and hardly anything else is listed
    assert all(s.object in (1, None) for s in first if s.image in planted)


def test_invented_objects_are_found(judged_by: Any) -> None:
    records, found = nearly_perfect(np.random.default_rng(1))
    # A detection that happens to reach into that corner would be near the invented object.
    corner = [record.id for record, some in zip(records, found, strict=True) if (some.boxes[:, 2:] < 330).any(1).all()]
    planted = set(corner[:30])
    spoilt = [invent(record) if record.id in planted else record for record in records]
    result = review(judged_by((spoilt, found, CLASSES)), threshold=0.5)
    nothing = [s for s in result.suspects if s.kind == "nothing there"]
    assert {s.image for s in nothing} == planted
    assert all(s.object == OBJECTS and s.suspicion > 0.8 for s in nothing)


def test_right_annotations_make_a_short_list(judged_by: Any) -> None:
    records, found = nearly_perfect(np.random.default_rng(2))
    assert len(review(judged_by((records, found, CLASSES)), threshold=0.5).suspects) <= 0.01 * PICTURES * OBJECTS


def test_what_nothing_speaks_against_is_no_suspect(scene: Any, judged_by: Any) -> None:
    """No dog is ever found: that this one is not says nothing about its annotation."""
    result = listed(judged_by(scene({"a": [("cat", FAR), ("dog", WHOLE)]}, {"a": SURE})))
    assert result.suspects == ()
    assert result.counts == dict.fromkeys(KINDS, 0)
