from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boxwright.evaluation import score
from boxwright.evaluation.coco_ap import FIGURES
from boxwright.types import Detections, Record

CLASSES = ["cat", "dog", "emu"]


def one_picture(difficult: bool) -> tuple[list[Record], list[Detections]]:
    """A cat that is found, a second cat that is missed, and no other animal."""
    boxes = np.array([[0, 0, 10, 10], [20, 20, 30, 30]], np.float32)
    flags = np.array([False, difficult])
    record = Record("a", Path("a.jpg"), (40, 40), boxes, np.zeros(2, np.int64), flags, flags)
    return [record], [Detections(boxes[:1], np.array([0.9], np.float32), np.zeros(1, np.int64))]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_order_of_pictures_changes_no_figure(random_sets: Any, data: st.DataObject) -> None:
    judged = data.draw(random_sets)
    order = data.draw(st.permutations(range(len(judged.records))))
    np.testing.assert_equal(asdict(score(*judged.reordered(order))), asdict(score(*judged)))


def test_tied_scores_are_taken_by_the_pictures_ids() -> None:
    records, detections = one_picture(True)
    empty = replace(records[0].only(records[0].labels < 0), id="b")
    wrong_last = score([empty, *records], [*detections, *detections], CLASSES)
    wrong_first = score([replace(empty, id="A"), *records], [*detections, *detections], CLASSES)
    assert (wrong_last.voc["area@50"], wrong_first.voc["area@50"]) == (1.0, 0.5)
    assert wrong_last.coco["AP"] > wrong_first.coco["AP"]


@pytest.mark.parametrize("difficult", [False, True])
def test_all_figures_and_what_difficult_does(difficult: bool) -> None:
    scores = score(*one_picture(difficult), CLASSES)
    assert (scores.images, scores.objects) == (1, 2)
    assert list(scores.coco) == list(FIGURES)
    assert list(scores.voc) == ["07@50", "area@50", "area@75"]
    assert list(scores.per_class) == CLASSES
    # VOC looks away from the missed cat if it is difficult. COCO never does: 51 of 101 recalls are reached.
    assert scores.voc["area@50"] == scores.voc["area@75"] == (1.0 if difficult else 0.5)
    assert scores.voc["07@50"] == pytest.approx(1.0 if difficult else 6 / 11)
    assert scores.coco["AP"] == scores.per_class["cat"]["AP"] == pytest.approx(51 / 101)
    assert scores.per_class["cat"]["AP50"] == pytest.approx(51 / 101)
    assert scores.per_class["cat"]["area@50"] == scores.voc["area@50"]
    assert all(math.isnan(figure) for name in ("dog", "emu") for figure in scores.per_class[name].values())


def test_nothing_to_find_is_nan() -> None:
    records, detections = one_picture(False)
    flags = np.zeros(0, bool)
    bare = Record("a", Path("a.jpg"), (40, 40), records[0].boxes[:0], np.zeros(0, np.int64), flags, flags)
    for scores in (score([], [], CLASSES), score([bare], detections, CLASSES)):
        figures = [*scores.coco.values(), *scores.voc.values()]
        figures += [figure for of in scores.per_class.values() for figure in of.values()]
        assert len(figures) == 12 + 3 + 3 * len(CLASSES)
        assert all(map(math.isnan, figures))
        assert scores.objects == 0


def test_each_record_has_its_detections() -> None:
    with pytest.raises(AssertionError):
        score(one_picture(False)[0], [], CLASSES)


def test_it_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    score(*one_picture(False), CLASSES)
    assert capfd.readouterr() == ("", "")


def test_importing_it_loads_no_evaluator_and_no_torch() -> None:
    code = "import boxwright.evaluation, sys; print({'torch', 'faster_coco_eval', 'cv2'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"
