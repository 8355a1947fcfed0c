"""Times all conventions beside pycocotools' and faster-coco-eval's twelve figures, on one split drawn at random.

    python benchmarks/evaluation.py                       4,952 pictures of 100 detections, 20 classes
    python benchmarks/evaluation.py --detections 20 --rounds 5

The evaluators take turns, so that a machine that slows down slows all; figures are medians of the rounds. Each is given
what its own loader takes, in memory, and timed from there to its figures. pycocotools comes with the extra `dev`,
faster-coco-eval with `pip install faster-coco-eval`; what is not installed is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from boxwright.evaluation import score
from boxwright.evaluation.conventions import judge_all
from boxwright.types import Detections, Record

Figures = dict[str, float]


def draw(pictures: int, detections: int, classes: int, seed: int) -> tuple[list[Record], list[Detections]]:
    """VOC-like pictures of 2.4 objects on average; two detections an object lie near it, the others anywhere."""
    random = np.random.default_rng(seed)
    records, found = [], []
    for number in range(pictures):
        count = 1 + int(random.poisson(1.4))
        corner = random.uniform(0, 300, (count, 2))
        side = random.lognormal(4.6, 0.7, (count, 2)) + 4
        boxes = np.concatenate([corner, corner + side], axis=1).astype(np.float32)
        labels = random.integers(0, classes, count)
        none = np.zeros(count, np.bool_)
        records.append(
            Record(f"{number:06d}", Path(), (500, 500), boxes, labels, random.random(count) < 0.1, truncated=none)
        )
        near = np.repeat(np.arange(count), 2)[:detections]
        moved = boxes[near] + random.normal(0, 0.08, (len(near), 4)) * np.tile(side[near], 2)
        rest = detections - len(near)
        corner, side = random.uniform(0, 400, (rest, 2)), random.lognormal(4.2, 0.8, (rest, 2)) + 4
        all_boxes = np.concatenate([moved, np.concatenate([corner, corner + side], axis=1)]).astype(np.float32)
        all_boxes[:, 2:] = np.maximum(all_boxes[:, 2:], all_boxes[:, :2] + 1)
        guess = np.concatenate([labels[near], random.integers(0, classes, rest)])
        scores = np.concatenate([random.beta(3, 2, len(near)), random.beta(1, 6, rest)]).astype(np.float32)
        best = np.argsort(-scores)
        found.append(Detections(all_boxes[best], scores[best], guess[best]))
    return records, found


def as_coco(
    records: list[Record], detections: list[Detections], classes: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same as COCO's two files hold it."""

    def sizes(boxes: Any) -> list[list[float]]:
        corners = boxes.astype(np.float64)
        return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()

    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image, (record, found) in enumerate(zip(records, detections, strict=True)):
        for box, label in zip(sizes(record.boxes), record.labels.tolist(), strict=True):
            said = {"image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            annotations.append(said | {"id": len(annotations) + 1})
        for box, label, value in zip(sizes(found.boxes), found.labels.tolist(), found.scores.tolist(), strict=True):
            results.append({"image_id": image, "category_id": label, "bbox": box, "score": value})
    truth = {
        "images": [{"id": image} for image in range(len(records))],
        "categories": [{"id": label, "name": str(label)} for label in range(classes)],
        "annotations": annotations,
    }
    return truth, results


def pycocotools(truth: dict[str, Any], results: list[dict[str, Any]]) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def faster_coco_eval(truth: dict[str, Any], results: list[dict[str, Any]]) -> Any:
    from faster_coco_eval import COCO, COCOeval_faster

    coco = COCO(truth)
    evaluation = COCOeval_faster(coco, coco.loadRes(results), iouType="bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=4952)
    parser.add_argument("--detections", type=int, default=100, help="in each picture")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ours-only", action="store_true")
    args = parser.parse_args()

    records, detections = draw(args.pictures, args.detections, args.classes, args.seed)
    classes = [str(label) for label in range(args.classes)]
    rivals: dict[str, Callable[..., Any]] = {"pycocotools": pycocotools, "faster-coco-eval": faster_coco_eval}
    rivals = {name: run for name, run in rivals.items() if find_spec(name.replace("-", "_")) and not args.ours_only}
    runs: dict[str, Callable[[], Any]] = {
        "ours, all conventions": lambda: judge_all(records, detections, classes),
        "ours, score() of an epoch": lambda: score(records, detections, classes),
    }
    runs |= rivals
    times: dict[str, list[float]] = {name: [] for name in runs}
    figures: dict[str, Any] = {}
    for _ in range(args.rounds):
        for name, run in runs.items():
            # Their loaders change what they are given, so each round gets a copy of its own, made outside the clock.
            given = as_coco(records, detections, args.classes) if name in rivals else ()
            started = time.perf_counter()
            figures[name] = run(*given)
            times[name].append(time.perf_counter() - started)
    ours = np.array(list(figures["ours, score() of an epoch"].coco.values()))
    for name in rivals:
        apart = np.nanmax(np.abs(np.array(figures[name][:12]) - ours))
        print(f"{name}: the twelve figures differ by at most {apart:.1e}")
    best = statistics.median(times["ours, all conventions"])
    print(f"{args.pictures} pictures x {args.detections} detections, {args.classes} classes; median of {args.rounds}")
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(f"  {name:28} {middle:7.2f} s   {middle / best:6.1f}x   ({min(taken):.2f} .. {max(taken):.2f})")


if __name__ == "__main__":
    main()
