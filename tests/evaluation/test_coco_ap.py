from __future__ import annotations

import io
import math
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boxwright.evaluation.coco_ap import FIGURES, summarize
from boxwright.types import Detections


def same(figures: Any, tolerance: float = 1e-9) -> Any:
    return pytest.approx(figures, rel=0, abs=tolerance, nan_ok=True)


def pycocotools_figures(judged: Any, areas: Any = None) -> tuple[dict[str, float], np.ndarray]:
    """The twelve figures, and precision (10 IoUs, 101 recalls, K classes)."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def index(per_image: list[tuple[Any, ...]]) -> COCO:
        annotations = [
            {
                "image_id": image,
                "category_id": int(label),
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "area": float(area),
                "score": float(score),
                "iscrowd": int(crowd),
            }
            for image, columns in enumerate(per_image)
            for box, label, score, area, crowd in zip(*columns, strict=True)
        ]
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image} for image in range(len(per_image))],
            "categories": [{"id": label} for label in range(len(judged.classes))],
            "annotations": [a | {"id": number} for number, a in enumerate(annotations, start=1)],
        }
        coco.createIndex()
        return coco

    def box_areas(boxes: np.ndarray) -> np.ndarray:
        return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])

    with redirect_stdout(io.StringIO()):
        truth = index(
            [
                (r.boxes.astype(float), r.labels, r.labels, areas[i] if areas else box_areas(r.boxes), r.crowd)
                for i, r in enumerate(judged.records)
            ]
        )
        found = index(
            [(d.boxes.astype(float), d.labels, d.scores, box_areas(d.boxes), d.labels * 0) for d in judged.detections]
        )
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = {name: or_nan(value) for name, value in zip(FIGURES, evaluation.stats, strict=True)}
    return figures, evaluation.eval["precision"][:, :, :, 0, 2]


def or_nan(figure: float) -> float:
    return math.nan if figure == -1 else float(figure)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), own_areas=st.booleans())
def test_agrees_with_pycocotools(crowded_sets: Any, data: st.DataObject, own_areas: bool) -> None:
    """Crowds, ties, pictures and classes without objects; pycocotools takes equals in the order of the files."""
    judged = data.draw(crowded_sets.filter(lambda judged: judged.records)).sorted()
    areas = None
    if own_areas:
        size = st.sampled_from([10.0, 32.0**2, 5000.0, 96.0**2, 1e5])
        areas = [np.array(data.draw(st.lists(size, min_size=n, max_size=n))) for n in map(objects, judged.records)]
        # Where two objects differ in nothing else, pycocotools takes the last: ours is the larger.
        areas = [areas_by_box(record, sizes) for record, sizes in zip(judged.records, areas, strict=True)]
    check_against_pycocotools(judged, areas)


def areas_by_box(record: Any, areas: np.ndarray) -> np.ndarray:
    keys = list(zip(record.labels.tolist(), record.boxes.tolist(), strict=True))
    return np.array([max(a for k, a in zip(keys, areas, strict=True) if k == key) for key in keys])


def check_against_pycocotools(judged: Any, areas: Any = None) -> None:
    reference, precision = pycocotools_figures(judged, areas)
    figures, per_class = summarize(*judged, areas=areas)
    assert figures == same(reference)
    assert list(figures) == list(FIGURES)
    for label, name in enumerate(judged.classes):
        assert per_class[name]["AP"] == same(or_nan(precision[:, :, label].mean()))
        assert per_class[name]["AP50"] == same(or_nan(precision[0, :, label].mean()))
        assert per_class[name]["AP75"] == same(or_nan(precision[5, :, label].mean()))


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_pycocotools_on_many_detections(random_split: Any, seed: int) -> None:
    """More than 100 of a class in a picture, some pictures empty, some scores equal, crowds."""
    judged = random_split(pictures=12, classes=3, objects=15, detections=500, seed=seed).sorted()
    assert max(np.bincount(found.labels).max() for found in judged.detections if len(found)) > 100
    check_against_pycocotools(judged)


@settings(deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_no_order_changes_a_figure(crowded_sets: Any, data: st.DataObject, seed: int) -> None:
    judged = data.draw(crowded_sets)
    np.testing.assert_equal(summarize(*judged.shuffled(np.random.default_rng(seed))), summarize(*judged))


def objects(record: Any) -> int:
    return len(record.boxes)


@settings(deadline=None)
@given(data=st.data())
def test_perfect_detections_have_one(perfect_sets: Any, data: st.DataObject) -> None:
    judged = data.draw(perfect_sets)
    figures, per_class = summarize(*judged)
    precisions = [figures[name] for name in FIGURES if name.startswith("AP")]
    for figure in [*precisions, *(figure for of in per_class.values() for figure in of.values())]:
        assert math.isnan(figure) or figure == pytest.approx(1.0)
    assert math.isnan(figures["AP"]) == (sum(map(objects, judged.records)) == 0)


@settings(deadline=None)
@given(data=st.data())
def test_no_detections_have_zero(random_sets: Any, data: st.DataObject) -> None:
    judged = data.draw(random_sets)
    figures, _ = summarize(judged.records, [Detections() for _ in judged.records], judged.classes)
    assert all(figure == 0.0 or math.isnan(figure) for figure in figures.values())
    assert math.isnan(figures["AP"]) == (sum(map(objects, judged.records)) == 0)


@pytest.mark.real_data
def test_coco_sample100(coco_sample100: Any, expected: Any) -> None:
    figures, _ = summarize(*coco_sample100)
    published = expected["coco_sample100"]
    assert figures == same({name: published[name] for name in FIGURES}, 1e-6)


@pytest.mark.real_data
def test_voc12_100_difficult_counted(voc12_100: Any, expected: Any) -> None:
    figures, _ = summarize(*voc12_100)  # that tool takes the files' numbers as they stand
    assert figures == same(expected["voc12_100"]["coco_summary_of_padilla_tool_difficult_counted"])
