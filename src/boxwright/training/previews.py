"""Pictures in the run folder: what the network saw first, and what it finds now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from boxwright.data.images import decode
from boxwright.inference.draw import contact_sheet, draw, draw_truth, truth_tile
from boxwright.inference.output import write_image
from boxwright.inference.predictor import Predictor
from boxwright.types import Batch, Record

SHOWN = 8  # pictures on a sheet
CELL = (300, 400)  # pixels of each: height, width
THRESHOLD = 0.5  # of the detections drawn where no score is best: nothing right is found yet


def first_batch(folder: Path, batch: Batch, classes: Sequence[str]) -> None:
    """previews/first_batch.jpg: the first pictures after augmentation, with the boxes trained on."""
    images = batch.images.permute(0, 2, 3, 1).cpu().numpy()[:SHOWN]
    drawn = [
        truth_tile(np.ascontiguousarray(image[:h, :w]), boxes.cpu().numpy(), labels.cpu().numpy(), classes, CELL)
        for image, (h, w), boxes, labels in zip(images, batch.sizes, batch.boxes, batch.labels, strict=False)
    ]
    write_image(folder / "previews" / "first_batch.jpg", contact_sheet(drawn, min(4, len(drawn)), CELL))


def validation(folder: Path, predictor: Predictor, records: Sequence[Record], *, threshold: float) -> None:
    """previews/validation.jpg: ground truth beside predictions from `threshold` on, the same pictures every time."""
    least = threshold if math.isfinite(threshold) else THRESHOLD
    step = max(len(records) // (SHOWN // 2), 1)
    drawn = []
    for record in records[::step][: SHOWN // 2]:
        image = decode(record.image)
        drawn.append(draw_truth(image, record.boxes, record.labels, predictor.classes))
        drawn.append(draw(image, predictor.predict(record.image, threshold=least), predictor.classes))
    write_image(folder / "previews" / "validation.jpg", contact_sheet(drawn, 4, CELL))
