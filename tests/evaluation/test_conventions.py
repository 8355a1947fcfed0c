from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boxwright.evaluation import coco_ap, score, voc_ap
from boxwright.evaluation.conventions import Judgement, Resized, judge_all
from boxwright.evaluation.matching import flatten
from boxwright.evaluation.precision import average_precision, resampled
from boxwright.evaluation.printed import tables
from boxwright.types import Detections, Record


def printed(judgement: Judgement) -> dict[str, dict[str, float]]:
    return {one.who: one.figures for one in judgement.printed}


@settings(max_examples=30, deadline=None)
@given(data=st.data(), seed=st.integers(0, 9))
def test_no_order_changes_a_figure(crowded_sets: Any, data: st.DataObject, seed: int) -> None:
    judged = data.draw(crowded_sets)
    shuffled = judged.shuffled(np.random.default_rng(seed))
    np.testing.assert_equal(judge_all(*shuffled, resamples=3).as_json(), judge_all(*judged, resamples=3).as_json())


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_each_figure_is_that_of_the_function_that_owns_it(crowded_sets: Any, data: st.DataObject) -> None:
    judged = data.draw(crowded_sets)
    everything = judge_all(*judged, ious=[0.3])
    np.testing.assert_equal(asdict(everything.scores), asdict(score(*judged)))
    np.testing.assert_equal(everything.coco["count"], coco_ap.summarize(*judged)[0])
    for voc in everything.voc:
        for key, figure in voc.figures.items():
            kind, iou = key.split("@")
            per_class = voc_ap.average_precision(
                *judged, iou=int(iou) / 100, eleven_point=kind == "07", difficult=voc.difficult, plus_one=voc.plus_one
            )
            known = [value for value in per_class.values() if not math.isnan(value)]
            assert figure == pytest.approx(np.mean(known) if known else math.nan, nan_ok=True)
            for name, value in per_class.items():
                np.testing.assert_equal(voc.per_class[name][key], value)


@pytest.mark.real_data
def test_voc12_100_as_the_tools_print_it(voc12_100: Any, expected: Any) -> None:
    published = expected["voc12_100"]
    judgement = judge_all(*voc12_100.edges())
    figures = {(v.difficult, v.plus_one): v.figures for v in judgement.voc}
    for iou in ("0.5", "0.75"):
        key = f"area@{int(float(iou) * 100)}"
        official = published["official_protocol_difficult_ignored"][f"area@{iou}"]["mAP"]
        assert figures["ignore", False][key] == pytest.approx(official, abs=1e-9)
        counted = published["difficult_counted_as_normal"][f"EVERY_POINT_INTERPOLATION@{iou}"]["mAP"]
        assert figures["count", False][key] == pytest.approx(counted, abs=1e-9)
        eleven = published["clean_room_variants"][f"07-11pt@{iou}"]["mAP"]
        assert figures["ignore", False][key.replace("area", "07")] == pytest.approx(eleven, abs=1e-9)
    assert printed(judgement)["detectron2: VOC 2012"]["AP50"] == figures["ignore", False]["area@50"]


def test_difficult_objects_in_coco_s_rule(one_picture: Any) -> None:
    """One cat found, one difficult cat found: counted both are right, deleted one is wrong, ignored neither matters."""
    judged = one_picture([[0, 0, 10, 10], [50, 50, 60, 60]], [False, True], [[50, 50, 60, 60], [0, 0, 10, 10]])
    by = {difficult: row["AP"] for difficult, row in judge_all(*judged).coco.items()}
    assert by == {"count": pytest.approx(1), "ignore": pytest.approx(1), "delete": pytest.approx(0.5)}


def test_mmdetection_gives_detections_a_pixel_more(one_picture: Any) -> None:
    """An object of 10 x 10 pixels, found as 10 x 20 edges: there 10 x 10 in 11 x 21, an IoU below a half."""
    judged = one_picture([[0, 0, 10, 10]], [False], [[0, 0, 10, 20]])
    figures = printed(judge_all(*judged))
    assert figures["detectron2: VOC 2012"]["AP50"] == 1.0
    assert figures["MMDetection: VOC 2012"]["AP50"] == 0.0


def test_the_article_cuts_boxes_in_the_resized_picture(one_picture: Any) -> None:
    """500 px to 250: an object from 1 to 10 is cut from 0.5 .. 5 to 0 .. 5; found exactly, its IoU is 0.81."""
    judged = one_picture([[1, 1, 10, 10]], [False], [[1, 1, 10, 10]])
    assert printed(judge_all(*judged, resized=Resized(250)))["the article"]["AP"] == pytest.approx(0.7)
    assert printed(judge_all(*judged, resized=Resized(500)))["the article"]["AP"] == pytest.approx(1.0)


def test_the_article_keeps_the_aspect_or_not() -> None:
    assert Resized(640).of((375, 500)) == (480, 640)
    assert Resized(640, square=True).of((375, 500)) == (640, 640)


@pytest.mark.parametrize("points", ["coco", "11", "area"])
def test_a_picture_that_stands_twice_counts_as_two(random_split: Any, points: Any) -> None:
    """Weights say what copies of the pictures would: the same figure as judging the copies."""
    judged = random_split(pictures=8, classes=3, objects=4, detections=30, seed=4)
    times = [2, 0, 1, 1, 3, 0, 1, 2]
    flat = flatten(*judged)
    found = resampled(voc_ap.judge(flat, ious=[0.3, 0.5]), points, np.array([times, [1] * 8], np.float64))
    copies = [index for index, count in enumerate(times) for _ in range(count)]
    copied = judged.reordered(copies)
    # A copy's name keeps its place among the others, so that ties are broken alike.
    records = [replace(r, id=f"{r.id}_{n}") for n, r in enumerate(copied.records)]
    expected = voc_ap.judge(flatten(records, copied.detections, copied.classes), ious=[0.3, 0.5])
    np.testing.assert_allclose(found[1], average_precision(voc_ap.judge(flat, ious=[0.3, 0.5]), points))
    # Copies of one picture interleave where scores tie; the random split's are coarse, hence the tolerance.
    np.testing.assert_allclose(found[0], average_precision(expected, points), atol=0.03)


def test_intervals_surround_the_figure_and_depend_on_the_seed_alone(random_split: Any) -> None:
    judged = random_split(pictures=60, classes=3, objects=5, detections=20, seed=1)
    first, again, other = (judge_all(*judged, resamples=60, seed=seed) for seed in (0, 0, 1))
    assert first.intervals == again.intervals
    assert first.intervals["coco"] != other.intervals["coco"]
    assert first.intervals["resamples"] == 60
    low, high = first.intervals["coco"]["AP50"]
    assert 0 < low < first.scores.coco["AP50"] < high < 1
    assert set(first.intervals["per_class"]) == set(judged.classes)
    assert judge_all(*judged).intervals == {}


def test_one_picture_alone_has_an_interval_of_no_width(one_picture: Any) -> None:
    judged = one_picture([[0, 0, 10, 10], [20, 20, 30, 30]], [False, False], [[0, 0, 10, 10]])
    low, high = judge_all(*judged, resamples=5).intervals["voc"]["area@50"]
    assert low == high == 0.5


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_tables_fit_a_terminal(crowded_sets: Any, data: st.DataObject) -> None:
    text = tables(judge_all(*data.draw(crowded_sets), resamples=2), images_per_second=12.3, threshold=0.5)
    assert max(map(len, text.splitlines())) <= 100
    assert text.isascii()
    assert "speed 12.3 images/s" in text


def test_tables_begin_with_ap_and_say_where_difficult_objects_change_nothing(one_picture: Any) -> None:
    boxes, found = [[0, 0, 10, 10], [20, 20, 30, 30]], [[0, 0, 10, 10], [20, 20, 30, 30]]
    plain = tables(judge_all(*one_picture(boxes, [False, False], found))).splitlines()
    assert plain[:2] == ["AP 1.000  AP50 1.000  (COCO)", "1 picture, 2 objects"]
    assert "no figure depends on difficult objects: there are none, or they change nothing" in plain
    assert not any("ignored" in line or "deleted" in line for line in plain if line[:4] in ("    ", "igno", "dele"))
    odd = tables(judge_all(*one_picture(boxes, [False, True], found[:1]), resamples=5))
    assert odd.startswith("AP 1.000 [1.000 - 1.000]  AP50 1.000 [1.000 - 1.000]  (COCO)\n") or odd.startswith("AP 0.5")
    assert "no figure depends" not in odd
    for word in ("ignored", "counted", "deleted"):
        assert any(line.startswith(word) for line in odd.splitlines())


def test_names_reach_the_terminal_as_printable_text(one_class: Judgement) -> None:
    assert "best F1" not in tables(one_class, threshold=0.5, note="no right detection")
    assert tables(one_class, threshold=0.5, note="no right detection").endswith("no best threshold: no right detection")
    assert tables(one_class, threshold=0.5).endswith("best F1 from a score of 0.500")
    text = tables(one_class)
    assert all(line.isprintable() for line in text.split("\n"))
    row = next(line for line in text.split("\n") if line.startswith("\\x1b[31mred\\x0a\\x09t"))
    assert row.split()[-1] == "-"  # no object has it, so it has no interval


@pytest.fixture
def one_class() -> Judgement:
    flags = np.zeros(1, np.bool_)
    box = np.array([[0, 0, 9, 9]], np.float32)
    record = Record("a", Path("a.jpg"), (40, 40), box, np.zeros(1, np.int64), flags, flags)
    found = Detections(box + 20, np.array([0.9], np.float32), np.zeros(1, np.int64))
    return judge_all([record], [found], ["cat", "\x1b[31mred\n\ttwo"], resamples=2)
