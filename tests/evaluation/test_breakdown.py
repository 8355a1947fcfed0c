from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boxwright.evaluation.breakdown import breakdown

SIZES = np.array([[100, 400]])  # one picture, its side by area: 200 pixels


def by_name(groups: Any) -> dict[str, Any]:
    return {group.name: group for group in groups}


def test_sizes_of_a_scene_known_by_hand(scene: Any, judged_by: Any) -> None:
    small, medium, large = (0, 0, 8, 8), (0, 0, 50, 50), (100, 0, 200, 100)
    objects = {"a": [("cat", small), ("cat", medium), ("dog", large), ("dog", (0, 0, 9, 9), "difficult")]}
    found = {
        "a": [
            ("cat", 0.9, (0, 50, 8, 58)),  # small and wrong
            ("cat", 0.8, small),
            ("dog", 0.3, large),
            ("dog", 0.2, (0, 0, 9, 9)),  # on the difficult one: in no group
        ]
    }
    result = breakdown(judged_by(scene(objects, found)), SIZES, threshold=0.5)
    sizes = by_name(result.sizes)
    figures = {name: (g.objects, g.detections, g.ap, g.recall, g.recall_shown) for name, g in sizes.items()}
    assert figures == {"small": (1, 2, 0.5, 1, 1), "medium": (1, 0, 0, 0, 0), "large": (1, 1, 1, 1, 0)}
    assert math.isnan(sizes["large"].high)
    assert {g.name: g.objects for g in result.relative_sizes if g.objects} == {
        "2 to 5 %": 1,  # 8 of 200
        "20 to 35 %": 1,  # 50 of 200
        "50 to 75 %": 1,  # 100 of 200
    }


@pytest.mark.parametrize(("side", "name"), [(31.9, "small"), (32, "medium"), (95.9, "medium"), (96, "large")])
def test_cocos_sizes_begin_with_their_edge(scene: Any, judged_by: Any, side: float, name: str) -> None:
    result = breakdown(judged_by(scene({"a": [("cat", (0, 0, side, side))]}, {})), SIZES, threshold=0.5)
    assert [group.name for group in result.sizes if group.objects] == [name]


def test_crowding_is_by_class_and_neighbours_are_of_any(scene: Any, judged_by: Any) -> None:
    one, half, apart = (0, 0, 10, 10), (0, 5, 10, 15), (50, 0, 60, 10)  # IoU of the first two: 1/3
    objects = {"a": [("cat", one), ("cat", half), ("dog", (9, 0, 19, 10)), ("dog", apart)]}
    found = {
        "a": [
            ("cat", 0.9, one),
            ("cat", 0.8, (0, 1, 10, 11)),  # a wrong one on a crowded object
            ("dog", 0.7, apart),
            ("dog", 0.6, (90, 90, 99, 99)),  # in the background: in no group
        ]
    }
    result = breakdown(judged_by(scene(objects, found)), SIZES, threshold=0.5)
    crowding, neighbours = by_name(result.crowding), by_name(result.neighbours)
    assert {name: (g.objects, g.detections) for name, g in crowding.items() if g.objects} == {
        "IoU 0 to 0.1": (2, 1),
        "IoU 0.3 to 0.5": (2, 2),
    }
    assert crowding["IoU 0.3 to 0.5"].recall == 0.5
    # The first cat overlaps a cat and a dog, the second both of them too; the lone dog nobody.
    assert {name: g.objects for name, g in neighbours.items()} == {"none": 1, "1": 0, "2": 3, "3 or more": 0}
    assert neighbours["none"].ap == 1


def test_a_right_detection_is_of_its_objects_size_and_a_wrong_one_of_its_own(scene: Any, judged_by: Any) -> None:
    found = {"a": [("cat", 0.9, (0, 0, 30, 30)), ("cat", 0.8, (60, 60, 90, 90))]}
    result = breakdown(judged_by(scene({"a": [("cat", (0, 0, 34, 34))]}, found)), SIZES, threshold=0.5)
    assert {group.name: group.detections for group in result.sizes} == {"small": 1, "medium": 1, "large": 0}
    assert by_name(result.sizes)["medium"].ap == 1


def test_difficult_objects_crowd_others_and_crowd_regions_do_not(scene: Any, judged_by: Any) -> None:
    one, half, region = (0, 0, 10, 10), (0, 5, 10, 15), (0, 0, 10, 12)
    objects = {"a": [("cat", one), ("cat", half, "difficult"), ("cat", region, "crowd")]}
    result = breakdown(judged_by(scene(objects, {})), SIZES, threshold=0.5)
    assert [group.name for group in result.crowding if group.objects] == ["IoU 0.3 to 0.5"]
    assert [group.name for group in result.neighbours if group.objects] == ["1"]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_groups_share_out_all_objects(random_sets: Any, judged_by: Any, data: st.DataObject) -> None:
    drawn = data.draw(random_sets)
    judged = judged_by(drawn)
    sizes = np.full((len(drawn.records), 2), 500)
    result = breakdown(judged, sizes, threshold=0.5)
    judged_detections = int((~judged.ignored).sum())
    for groups in (result.sizes, result.relative_sizes, result.crowding, result.neighbours):
        assert sum(group.objects for group in groups) == judged.counted.sum()
        found = np.nansum([group.objects * group.recall for group in groups])
        assert found == pytest.approx(judged.found.sum())
        assert sum(group.detections for group in groups) <= judged_detections
        for group in groups:
            assert math.isnan(group.ap) == (group.objects == 0)
            assert group.objects == 0 or group.recall_shown <= group.recall
    for groups in (result.sizes, result.relative_sizes):
        assert sum(group.detections for group in groups) == judged_detections
