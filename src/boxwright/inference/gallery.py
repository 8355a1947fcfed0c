"""Records, detections and their analysis → pictures with ground truth beside predictions, for the report.

<folder>/pictures/
├── best_01.jpg  worst_01.jpg  random_01.jpg  review_01.jpg ...
└── gallery.json             what each shows, and which pictures could not be read
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from boxwright.data.images import decode
from boxwright.inference.draw import contact_sheet, draw, draw_truth
from boxwright.inference.output import write_image, write_text
from boxwright.types import Detections, Record, Size, UInt8, UserError

if TYPE_CHECKING:
    from boxwright.evaluation.analysis import Analysis, Picture
    from boxwright.evaluation.review import Suspect

Group = Literal["best", "worst", "random", "review"]

EACH = 6  # of the best, the worst and the random pictures
SUSPECTS = 24  # of the review list
SMALLEST, LARGEST = 320, 640  # pixels of a picture's longer side, as drawn: names stay readable, files small
MOST_BOXES = 100  # drawn in a picture, the best ones


@dataclass(frozen=True)
class _Wanted:
    """One picture to be drawn."""

    group: Group
    number: int  # 1-based, within its group
    record: int  # index among the records
    caption: str
    suspect: Suspect | None = None

    @property
    def file(self) -> str:
        return f"{self.group}_{self.number:02}.jpg"


def write_gallery(
    folder: Path,
    records: Sequence[Record],
    detections: Sequence[Detections],
    classes: Sequence[str],
    analysis: Analysis,
    *,
    threshold: float | None = None,
    seed: int = 0,
) -> Path:
    """Draw the best, the worst, some random pictures and the first of the review list; gives the folder of pictures.

    Each picture is decoded once. One that cannot be read is left out, and gallery.json says so. Without a `threshold`
    boxes are shown from the analysis' own.

    Raises `UserError` where nothing can be written.
    """
    assert len(records) == len(detections), "one Detections for each Record, in the same order"
    if threshold is None:
        threshold = analysis.thresholds.overall.threshold
    target = folder / "pictures"
    try:
        target.mkdir(parents=True, exist_ok=True)
        for old in (path for group in ("best", "worst", "random", "review") for path in target.glob(f"{group}_*.jpg")):
            old.unlink()
    except OSError as error:
        raise UserError(f"cannot write into {target}: {error.strerror}") from None
    wanted = _chosen(records, analysis, seed)
    skipped: list[str] = []
    written: dict[str, Size] = {}
    for index in dict.fromkeys(one.record for one in wanted):
        record, found = records[index], detections[index].above(threshold)[:MOST_BOXES]
        try:
            image = decode(record.image)
        except UserError as error:
            skipped.append(str(error))
            continue
        picture, factor = _fitted(image)
        for one in (one for one in wanted if one.record == index):
            write_image(target / one.file, _drawn(picture, factor, record, found, classes, one.suspect))
            written[one.file] = record.size
    listed = [_described(one, records[one.record], analysis, written) for one in wanted if one.file in written]
    described = {"classes": list(classes), "threshold": threshold, "pictures": listed, "skipped": skipped}
    write_text(target / "gallery.json", json.dumps(described, ensure_ascii=False, indent=1) + "\n")
    return target


def _chosen(records: Sequence[Record], analysis: Analysis, seed: int) -> list[_Wanted]:
    index = {record.id: i for i, record in enumerate(records)}
    known = [one for one in analysis.pictures if one.id in index]
    judged = [one for one in known if math.isfinite(one.f1)]
    best = sorted((one for one in judged if one.right), key=lambda one: (-one.f1, -one.right, one.id))[:EACH]
    taken = {one.id for one in best}
    rest = [one for one in judged if one.id not in taken and one.wrong + one.missed]
    worst = sorted(rest, key=lambda one: (one.f1, -(one.wrong + one.missed), one.id))[:EACH]
    taken |= {one.id for one in worst}
    others = [one for one in known if one.id not in taken]
    drawn = Random(seed).sample(others, min(EACH, len(others)))
    groups: list[tuple[Group, list[Picture]]] = [("best", best), ("worst", worst), ("random", drawn)]
    wanted = [
        _Wanted(group, number, index[one.id], _counts(one))
        for group, pictures in groups
        for number, one in enumerate(pictures, 1)
    ]
    suspects = [one for one in analysis.review.suspects if one.image in index][:SUSPECTS]
    return wanted + [
        _Wanted("review", number, index[one.image], one.reason, one) for number, one in enumerate(suspects, 1)
    ]


def _counts(one: Picture) -> str:
    """What a picture came to, in words."""
    if not math.isfinite(one.f1):
        return "nothing annotated, nothing found"
    return f"{one.right} right, {one.wrong} wrong, {one.missed} missed; F1 {one.f1:.3f}"


def _described(one: _Wanted, record: Record, analysis: Analysis, written: dict[str, Size]) -> dict[str, Any]:
    rank = analysis.review.suspects.index(one.suspect) if one.suspect else None
    return {
        "file": one.file,
        "group": one.group,
        "image": record.id,
        "path": str(record.image),
        "size": list(written[one.file]),
        "caption": one.caption,
        "suspect": rank,
    }


def _fitted(image: UInt8) -> tuple[UInt8, float]:
    """The picture in a size to be looked at, and its factor."""
    longer = max(image.shape[:2])
    factor = min(max(longer, SMALLEST), LARGEST) / longer
    if factor == 1.0:
        return image, factor
    width, height = (max(1, round(side * factor)) for side in (image.shape[1], image.shape[0]))
    method = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.BICUBIC
    return np.array(Image.fromarray(image).resize((width, height), method)), factor


def _drawn(
    picture: UInt8,
    factor: float,
    record: Record,
    found: Detections,
    classes: Sequence[str],
    suspect: Suspect | None,
) -> UInt8:
    """Annotations on the left, predictions on the right; of a suspect only what it is about."""
    boxes, labels = record.boxes, record.labels
    if suspect and suspect.object is not None:
        boxes, labels = boxes[[suspect.object]], labels[[suspect.object]]
    if suspect and suspect.found_box is not None:
        found = Detections(
            np.array([suspect.found_box], np.float32),
            np.array([suspect.score or 0.0], np.float32),
            np.array([list(classes).index(suspect.found_label or "")], np.int64),
        )
    left = draw_truth(picture, boxes * np.float32(factor), labels, classes)
    right = draw(picture, Detections(found.boxes * np.float32(factor), found.scores, found.labels), classes)
    return contact_sheet([left, right], 2, (picture.shape[0], picture.shape[1]))
