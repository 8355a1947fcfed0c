from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxwright.evaluation.voc_ap import average_precision
from boxwright.types import Detections, Record

rules = st.fixed_dictionaries({"iou": st.sampled_from([0.5, 0.7, 0.75]), "eleven_point": st.booleans()})


def same(figures: Any) -> Any:
    return pytest.approx(figures, rel=0, abs=1e-9, nan_ok=True)


# The devkit's rules once more, in straight loops and fractions.


def verdicts(judged: Any, label: int, iou: float, difficult: str, plus_one: bool) -> tuple[list[bool], int]:
    """Right or wrong for each judged detection of a class, best first; and how many objects to find."""
    found = [
        (score, image, box)
        for image, d in enumerate(judged.detections)
        for score, box, its in zip(d.scores, d.boxes, d.labels, strict=True)
        if its == label
    ]
    right, taken = [], set()
    for _, image, box in sorted(found, key=lambda item: -item[0]):
        record, best, chosen = judged.records[image], Fraction(-1), -1
        for index in candidates(record, label, difficult):
            overlap = exact_iou(box, record.boxes[index], int(plus_one))
            if overlap > best:
                best, chosen = overlap, index
        if best >= Fraction(str(iou)) and difficult == "ignore" and record.difficult[chosen]:
            continue
        right.append(best >= Fraction(str(iou)) and (image, chosen) not in taken)
        if right[-1]:
            taken.add((image, chosen))
    left_out = "delete" if difficult == "ignore" else difficult
    return right, sum(len(candidates(record, label, left_out)) for record in judged.records)


def candidates(record: Record, label: int, difficult: str) -> list[int]:
    mine = [index for index, its in enumerate(record.labels) if its == label]
    return [index for index in mine if difficult != "delete" or not record.difficult[index]]


def exact_iou(a: Any, b: Any, one: int) -> Fraction:
    def area(box: list[Fraction]) -> Fraction:
        return max(box[2] - box[0] + one, Fraction(0)) * max(box[3] - box[1] + one, Fraction(0))

    a, b = [Fraction(float(v)) for v in a], [Fraction(float(v)) for v in b]
    shared = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    return shared / (area(a) + area(b) - shared)


def best_precision(right: list[bool], reached: Callable[[int], bool]) -> float:
    counts = [(sum(right[: rank + 1]), rank + 1) for rank in range(len(right))]
    return max((found / rank for found, rank in counts if reached(found)), default=0.0)


def area(right: list[bool], to_find: int) -> float:
    return sum(best_precision(right, lambda found, n=n: found >= n) for n in range(1, to_find + 1)) / to_find


def eleven_points(right: list[bool], to_find: int) -> float:
    tenths = [best_precision(right, lambda found, k=k: 10 * found >= k * to_find) for k in range(11)]
    return sum(tenths) / 11


def eleven_float_points(right: list[bool], to_find: int) -> float:
    """As published code has it: recalls of exactly 0.3, 0.6 and 0.7 miss the float that stands for them."""
    grid = np.linspace(0, 1, 11)
    return sum(best_precision(right, lambda found, r=r: found / to_find >= r) for r in grid) / 11


def oracle(
    judged: Any,
    *,
    iou: float = 0.5,
    eleven_point: bool = False,
    difficult: str = "ignore",
    plus_one: bool = False,
    points: Callable[[list[bool], int], float] = eleven_points,
) -> dict[str, float]:
    figures = {}
    judged = judged.sorted()
    for label, name in enumerate(judged.classes):
        right, to_find = verdicts(judged, label, iou, difficult, plus_one)
        summary = points if eleven_point else area
        figures[name] = summary(right, to_find) if to_find else math.nan
    return figures


@given(
    data=st.data(),
    rule=rules,
    difficult=st.sampled_from(["ignore", "count", "delete"]),
    plus_one=st.booleans(),
)
def test_agrees_with_straight_loops(
    random_sets: Any, data: st.DataObject, rule: Any, difficult: Any, plus_one: bool
) -> None:
    judged = data.draw(random_sets)
    options = {**rule, "difficult": difficult, "plus_one": plus_one}
    assert average_precision(*judged, **options) == same(oracle(judged, **options))


# Laws.


@given(data=st.data(), rule=rules)
def test_inclusive_pixels_are_edges_one_pixel_apart(random_sets: Any, data: st.DataObject, rule: Any) -> None:
    judged = data.draw(random_sets)
    inclusive = average_precision(*judged, plus_one=True, **rule)
    np.testing.assert_equal(average_precision(*judged.edges(), **rule), inclusive)


@given(data=st.data(), rule=rules)
def test_perfect_detections_have_one(perfect_sets: Any, data: st.DataObject, rule: Any) -> None:
    judged = data.draw(perfect_sets)
    for label, (_, figure) in enumerate(average_precision(*judged, **rule).items()):
        to_find = sum(((r.labels == label) & ~r.difficult).sum() for r in judged.records)
        assert figure == pytest.approx(1.0) if to_find else math.isnan(figure)


@given(data=st.data(), rule=rules)
def test_no_detections_have_zero(random_sets: Any, data: st.DataObject, rule: Any) -> None:
    judged = data.draw(random_sets)
    nothing = [Detections() for _ in judged.records]
    figures = average_precision(judged.records, nothing, judged.classes, **rule)
    assert all(figure == 0.0 or math.isnan(figure) for figure in figures.values())


def with_detection(judged: Any, image: int, box: list[int], score: float, label: int) -> Any:
    found = judged.detections[image]
    more = Detections(
        np.append(found.boxes, np.array([box], np.float32), axis=0),
        np.append(found.scores, np.float32(score)),
        np.append(found.labels, label),
    )
    return replace(judged, detections=[*judged.detections[:image], more, *judged.detections[image + 1 :]])


def with_difficult(judged: Any, image: int, box: list[int], label: int) -> Any:
    record = judged.records[image]
    more = replace(
        record,
        boxes=np.append(record.boxes, np.array([box], np.float32), axis=0),
        labels=np.append(record.labels, label),
        difficult=np.append(record.difficult, True),
        truncated=np.append(record.truncated, False),
        crowd=np.append(record.crowd, False),
    )
    return replace(judged, records=[*judged.records[:image], more, *judged.records[image + 1 :]])


FAR = [2000, 2000, 2010, 2010]  # beyond every box drawn


@given(data=st.data(), rule=rules, score=st.integers(0, 10), label=st.integers(0, 1))
def test_a_false_detection_never_raises_it(
    random_sets: Any, data: st.DataObject, rule: Any, score: int, label: int
) -> None:
    judged = data.draw(random_sets.filter(lambda judged: judged.records))
    image = data.draw(st.integers(0, len(judged.records) - 1))
    before = average_precision(*judged, **rule)
    after = average_precision(*with_detection(judged, image, FAR, score / 10, label), **rule)
    for name in judged.classes:
        assert math.isnan(before[name]) or after[name] <= before[name] + 1e-12


@given(data=st.data(), rule=rules, label=st.integers(0, 1), scores=st.lists(st.integers(0, 10), max_size=3))
def test_a_difficult_object_counts_for_nothing(
    random_sets: Any, data: st.DataObject, rule: Any, label: int, scores: list[int]
) -> None:
    """Neither missed, nor found, nor found several times."""
    judged = data.draw(random_sets.filter(lambda judged: judged.records))
    image = data.draw(st.integers(0, len(judged.records) - 1))
    marked = with_difficult(judged, image, FAR, label)
    for score in scores:
        marked = with_detection(marked, image, FAR, score / 10, label)
    np.testing.assert_equal(average_precision(*marked, **rule), average_precision(*judged, **rule))


def cats(boxes: list[list[int]], difficult: list[bool] | None = None) -> Record:
    flags = np.array(difficult or [False] * len(boxes))
    labels = np.zeros(len(boxes), np.int64)
    return Record("a", Path("a.jpg"), (100, 100), np.array(boxes, np.float32), labels, flags, flags)


def found_cats(boxes: list[list[int]]) -> Detections:
    scores = np.ones(len(boxes), np.float32)
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), scores, np.zeros(len(boxes), np.int64))


def test_a_recall_of_exactly_three_tenths_reaches_its_point() -> None:
    boxes = [[10 * n, 0, 10 * n + 5, 5] for n in range(10)]
    for count in range(11):
        figures = average_precision([cats(boxes)], [found_cats(boxes[:count])], ["cat"], eleven_point=True)
        assert figures["cat"] == pytest.approx((count + 1) / 11 if count else 0.0)


@pytest.mark.parametrize("tenths", range(1, 11))
def test_an_iou_of_exactly_the_threshold_is_enough(tenths: int) -> None:
    record, found = cats([[0, 0, 10, 10]]), found_cats([[0, 0, tenths, 10]])
    assert average_precision([record], [found], ["cat"], iou=tenths / 10) == {"cat": 1.0}
    assert average_precision([record], [found], ["cat"], iou=tenths / 10 + 1e-9) == {"cat": 0.0}


def test_of_tied_scores_the_larger_box_is_taken_first() -> None:
    boxes = [[10 * n, 0, 10 * n + 5, 5] for n in range(40)]
    for wrong, figure in (([2000, 2000, 2004, 2005], 1.0), ([2000, 2000, 2006, 2005], 0.5)):
        found = found_cats([*boxes, *([wrong] * 40)])
        for order in (slice(None), slice(None, None, -1)):
            assert average_precision([cats(boxes)], [found[order]], ["cat"])["cat"] == pytest.approx(figure)


@given(data=st.data(), rule=rules, difficult=st.sampled_from(["ignore", "count", "delete"]), seed=st.integers(0, 99))
def test_no_order_changes_a_figure(
    crowded_sets: Any, data: st.DataObject, rule: Any, difficult: Any, seed: int
) -> None:
    judged = data.draw(crowded_sets)
    shuffled = judged.shuffled(np.random.default_rng(seed))
    options = {**rule, "difficult": difficult}
    np.testing.assert_equal(average_precision(*shuffled, **options), average_precision(*judged, **options))


def test_of_objects_overlapped_alike_the_first_is_taken() -> None:
    between = found_cats([[0, 1, 10, 11]])
    sides = [[0, 0, 10, 10], [0, 2, 10, 12]]
    assert average_precision([cats(sides, [False, True])], [between], ["cat"]) == {"cat": 1.0}
    assert average_precision([cats(sides, [True, False])], [between], ["cat"]) == {"cat": 0.0}


# Published figures.


@pytest.mark.real_data
@pytest.mark.parametrize("iou", [0.1, 0.3, 0.5, 0.75])
def test_padilla_case1(padilla_case1: Any, expected: Any, iou: float) -> None:
    published = expected["padilla_case1"]
    assert average_precision(*padilla_case1, iou=iou, plus_one=True)["object"] == same(
        published["every_point"][str(iou)]
    )
    options = {"iou": iou, "plus_one": True, "eleven_point": True}
    ours = average_precision(*padilla_case1, **options)
    assert ours == same(oracle(padilla_case1, **options))
    on_floats = oracle(padilla_case1, **options, points=eleven_float_points)
    assert on_floats["object"] == same(published["eleven_point"][str(iou)])
    assert (ours != same(on_floats)) == (iou == 0.1)  # 9 of its 15 objects found: a recall of exactly 0.6


@pytest.mark.real_data
@pytest.mark.parametrize("iou", [0.5, 0.75])
def test_toyexample(toyexample: Any, expected: Any, iou: float) -> None:
    for rule, eleven_point in (("every_point", False), ("eleven_point", True)):
        figures = average_precision(*toyexample.edges(), iou=iou, eleven_point=eleven_point)
        assert figures["cat"] == same(expected["toyexample"][rule][str(iou)])


def check(figures: dict[str, float], published: dict[str, Any]) -> None:
    assert figures == same(published["per_class"])
    assert np.mean(list(figures.values())) == same(published["mAP"])


@pytest.mark.real_data
@pytest.mark.parametrize("iou", [0.5, 0.75])
def test_voc12_100_official(voc12_100: Any, expected: Any, iou: float) -> None:
    official = expected["voc12_100"]["official_protocol_difficult_ignored"]
    check(average_precision(*voc12_100.edges(), iou=iou), official[f"area@{iou}"])

    exact = expected["voc12_100"]["clean_room_variants"][f"07-11pt@{iou}"]
    eleven = average_precision(*voc12_100.edges(), iou=iou, eleven_point=True)
    check(eleven, exact)
    on_floats = official[f"07-11pt@{iou}"]["per_class"]
    differ = {name for name in eleven if eleven[name] != same(on_floats[name])}
    assert differ == set(exact["classes_that_differ_from_float_grid_code"])


@pytest.mark.real_data
@pytest.mark.parametrize("iou", [0.5, 0.75])
def test_voc12_100_without_the_pixel(voc12_100: Any, expected: Any, iou: float) -> None:
    # That code wants an IoU above the threshold, the devkit "at least"; two persons' is 0.75 exactly.
    above = np.nextafter(iou, 1)
    variants = expected["voc12_100"]["clean_room_variants"]
    check(average_precision(*voc12_100, iou=above), variants[f"area_without_plus_one_pixel@{iou}"])


@pytest.mark.real_data
@pytest.mark.parametrize("iou", [0.5, 0.75])
def test_voc12_100_difficult_counted(voc12_100: Any, expected: Any, iou: float) -> None:
    published = expected["voc12_100"]["difficult_counted_as_normal"]
    figures = average_precision(*voc12_100.edges(), iou=iou, difficult="count")
    check(figures, published[f"EVERY_POINT_INTERPOLATION@{iou}"])

    options = {"iou": iou, "difficult": "count", "eleven_point": True}
    edges = voc12_100.edges()
    assert average_precision(*edges, **options) == same(oracle(edges, **options))
    on_floats = oracle(edges, **options, points=eleven_float_points)
    check(on_floats, published[f"ELEVEN_POINT_INTERPOLATION@{iou}"])


@pytest.mark.real_data
def test_cartucho(cartucho: Any, expected: Any) -> None:
    figures = average_precision(*cartucho.edges())
    known = {name: figure for name, figure in figures.items() if not math.isnan(figure)}
    published = expected["cartucho"]
    assert {name: round(100 * figure, 2) for name, figure in known.items()} == published["AP_percent"]
    assert round(100 * np.mean(list(known.values())), 2) == published["mAP_percent"]
