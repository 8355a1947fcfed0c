"""Run folders as a training and an evaluation leave them, written by hand: any length, any names, in milliseconds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from boxwright.config import make_run
from boxwright.evaluation import score
from boxwright.evaluation.analysis import analyse
from boxwright.inference.gallery import write_gallery
from boxwright.types import Detections, Record

CLASSES = ("cat", "dog", "bird")
END = "10:00:00 best mAP 0.500 (mAP50 0.700) in epoch 4, after 1:23; weights, graphs and pictures are in here\n"
FAULTS = (
    "09:00:00 train: 12 pictures, 30 objects, 3 classes\n09:00:00   1 × repaired\n"
    "09:00:00   a.xml:3: xmax beyond the picture (repaired)\n"
)
LOSSES = ("loss_box_reg", "loss_classifier")


def write_run(
    folder: Path,
    *,
    classes: Sequence[str] = CLASSES,
    epochs: int = 4,
    steps: int = 40,
    finished: bool = True,
    best: float = 0.5,
    **options: Any,
) -> Path:
    """A run folder without an evaluation of its own: `steps` lines an epoch, mAP rising to `best`."""
    (folder / "previews").mkdir(parents=True)
    chosen = {"data": "data.yaml", "epochs": epochs, "name": folder.name, **options}
    run = {**make_run(**chosen).model_dump(mode="json"), "classes": list(classes)}
    (folder / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False, allow_unicode=True), encoding="utf-8")
    environment = {"boxwright": "0.1.0", "torch": "2.11", "device": "cpu (any)", "ranks": 1, "job": None,
                   "data": {"train": "aa11", "val": "bb22"}}  # fmt: skip
    (folder / "env.json").write_text(json.dumps(environment), encoding="utf-8")
    (folder / "train.log").write_text(FAULTS + (END if finished else ""), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    for epoch in range(1, epochs + 1):
        add_epoch(folder, epoch, steps=steps, score=best * epoch / epochs)
    for name in ("first_batch", "validation"):
        Image.fromarray(_noise(epochs, 200, 300)).save(folder / "previews" / f"{name}.jpg")
    return folder


def add_epoch(folder: Path, epoch: int, *, steps: int = 40, score: float = 0.5) -> None:
    """What an epoch appends to the books."""
    rows = []
    for line in range(steps):
        step = ((epoch - 1) * steps + line + 1) * 10
        parts = {name: math.exp(-step / 4000) * (i + 1) for i, name in enumerate(LOSSES)}
        rows.append({"step": step, "epoch": epoch, "lr": 1e-3, "loss": sum(parts.values()), **parts,
                     "gradient": 1.5, "images_per_s": 30 + line % 3})  # fmt: skip
    judged = {"epoch": epoch, "step": epoch * steps * 10, "loss": 1.0, "map": score, "map50": score * 1.4,
              "map75": score / 2, "voc07": score * 1.3, "val_loss": 2 - score, "seconds": 20.0 * epoch}  # fmt: skip
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in [*rows, {"evaluation": True, **judged}])
    books = folder / "results.csv"
    head = "" if books.exists() else ",".join(judged) + "\n"
    with books.open("a", encoding="utf-8") as file:
        file.write(head + ",".join(f"{value:.6g}" for value in judged.values()) + "\n")


def write_evaluation(
    folder: Path, pictures: Path, *, classes: Sequence[str] = CLASSES, count: int = 40, ids: Mapping[int, str] = {}
) -> Path:
    """scores.json, analysis.json and pictures/ about drawn detections that are right three times in four."""
    folder.mkdir(parents=True)
    records, detections = judged(pictures, classes=classes, count=count, ids=ids)
    scores = {"weights": "best_model.safetensors", "data": "data.yaml", "split": "val",
              **asdict(score(records, detections, classes))}  # fmt: skip
    (folder / "scores.json").write_text(json.dumps(_finite(scores)), encoding="utf-8")
    analysis = analyse(records, detections, classes)
    (folder / "analysis.json").write_text(json.dumps(analysis.as_json()), encoding="utf-8")
    write_gallery(folder, records, detections, classes, analysis)
    return folder


def judged(
    pictures: Path, *, classes: Sequence[str] = CLASSES, count: int = 40, ids: Mapping[int, str] = {}
) -> tuple[list[Record], list[Detections]]:
    """Records with pictures on the disk, and detections of them."""
    pictures.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    records, detections = [], []
    for index in range(count):
        path = pictures / f"{index:03}.jpg"
        Image.fromarray(_noise(index, 96, 128)).save(path)
        n = int(rng.integers(1, 4))
        corners = rng.uniform((0, 0), (70, 50), (n, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(15, 45, (n, 2))], 1).astype(np.float32)
        labels = rng.integers(0, len(classes), n)
        no = np.zeros(n, np.bool_)
        records.append(Record(ids.get(index, f"{index:03}"), path, (96, 128), boxes, labels, no, no))
        moved = boxes + rng.normal(0, 2, boxes.shape).astype(np.float32)
        wrong = np.where(rng.random(n) < 0.75, labels, rng.integers(0, len(classes), n))
        found = np.sort(rng.uniform(0.3, 0.99, n)).astype(np.float32)[::-1].copy()
        moved = np.clip(moved, 0, (128, 96, 128, 96)).astype(np.float32)
        detections.append(Detections(moved, found, wrong.astype(np.int64)))
    return records, detections


def _noise(seed: int, height: int, width: int) -> Any:
    coarse = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
