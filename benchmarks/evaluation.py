"""Seconds that `evaluation.score` takes beside pycocotools, on the same drawn pictures and detections.

    python benchmarks/evaluation.py [--images 1000] [--detections 50] [--classes 20] [--rounds 5]

`score` gives COCO's twelve figures and three of VOC's with each class's own; pycocotools COCO's twelve alone.
Both start from records and detections, so both pay for turning them into COCO's dictionaries.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from boxwright.evaluation import score, voc_ap
from boxwright.types import Detections, Record


def draw_set(images: int, per_image: int, classes: int) -> tuple[list[Record], list[Detections]]:
    """Pictures of up to eight objects; half of the detections lie near an object, half anywhere."""
    rng = np.random.default_rng(0)
    records: list[Record] = []
    detections: list[Detections] = []
    for image in range(images):
        count = int(rng.integers(1, 9))
        boxes, labels = draw_boxes(rng, count), rng.integers(0, classes, count)
        flags = np.zeros(count, bool)
        records.append(Record(f"{image:06d}", Path(), (600, 600), boxes, labels, flags, flags))

        near = rng.integers(0, count, per_image // 2)
        jitter = rng.normal(0, 6, (len(near), 4)).astype(np.float32)  # pixels
        elsewhere = per_image - len(near)
        detections.append(
            Detections(
                np.concatenate([boxes[near] + jitter, draw_boxes(rng, elsewhere)]),
                rng.random(per_image, np.float32),
                np.concatenate([labels[near], rng.integers(0, classes, elsewhere)]),
            )
        )
    return records, detections


def draw_boxes(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    corner = rng.uniform(0, 300, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(30, 300, (count, 2))], axis=1).astype(np.float32)


def pycocotools_figures(records: Sequence[Record], detections: Sequence[Detections], classes: int) -> Any:
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image} for image in range(len(records))],
        "categories": [{"id": label} for label in range(classes)],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": label,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for number, (image, label, box) in enumerate(rows(records), start=1)
        ],
    }
    results = [
        {"image_id": image, "category_id": label, "bbox": box, "score": score}
        for (image, label, box), score in zip(
            rows(detections), np.concatenate([found.scores for found in detections]).tolist(), strict=True
        )
    ]
    with redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def rows(per_image: Sequence[Record | Detections]) -> list[tuple[int, int, list[float]]]:
    """(image, label, COCO's x y width height) of every box."""
    flat: list[tuple[int, int, list[float]]] = []
    for image, of in enumerate(per_image):
        boxes = of.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        flat += zip([image] * len(boxes), of.labels.tolist(), boxes.tolist(), strict=True)
    return flat


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("images", 1000), ("detections", 50), ("classes", 20), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    names = [f"class {label}" for label in range(options.classes)]
    records, detections = draw_set(options.images, options.detections, options.classes)

    contestants: dict[str, Callable[[], Any]] = {
        "score (COCO and VOC)": lambda: score(records, detections, names),
        "  of it one VOC figure": lambda: voc_ap.average_precision(records, detections, names),
        "pycocotools (COCO)": lambda: pycocotools_figures(records, detections, options.classes),
    }
    ours, reference = contestants["score (COCO and VOC)"](), contestants["pycocotools (COCO)"]()  # and warm
    np.testing.assert_allclose(list(ours.coco.values()), np.where(reference == -1, np.nan, reference), atol=1e-9)

    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.rounds):  # interleaved, so that a busy machine slows all alike
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    size = f"{options.images} pictures x {options.detections} detections, {options.classes} classes"
    print(f"{size}, AP {ours.coco['AP']:.3f}, medians of {options.rounds} rounds")
    print(f"{'':24}{'median s':>10}{'times pycocotools':>20}")
    for name, value in median.items():
        print(f"{name:24}{value:10.3f}{value / median['pycocotools (COCO)']:20.2f}")


if __name__ == "__main__":
    main()
