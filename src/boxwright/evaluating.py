"""Records and detections → the folder of an evaluation. Above the model, the judge, the pictures and the report.

outputs/evaluation/<name>/
├── scores.json              every convention's figures, each class's, intervals, speed
├── analysis.json            where AP is lost, thresholds, calibration, annotations to look at again
├── detections.json          all detections: any figure can be made again from them, without the model
├── pictures/                ground truth beside detections: best, worst, random, to look at again
└── report.html              all of it as one page
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boxwright.evaluation.analysis import analyse
from boxwright.evaluation.conventions import Judgement, Resized, judge_all
from boxwright.folders import commit
from boxwright.types import Detections, DiskFailed, Member, Record, Scores


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation came to."""

    folder: Path
    scores: Scores
    images_per_second: float  # of the detector's pass; NaN where there was none
    threshold: float  # of the score, with the best F1
    judgement: Judgement
    note: str = ""  # why `threshold` is no best one ("no right detection"), or ""


@dataclass(frozen=True)
class About:
    """How figures are to be made."""

    ious: Sequence[float] = (0.5, 0.75)
    resized: Resized | None = None
    resamples: int = 200
    seed: int = 0
    areas: Sequence[NDArray[np.float64]] | None = None


def write_evaluation(
    folder: Path,
    records: Sequence[Record],
    detections: Sequence[Detections],
    classes: Sequence[str],
    *,
    origin: Mapping[str, Any],
    about: About | None = None,
    images_per_second: float = math.nan,
    earlier: Sequence[Sequence[Detections]] = (),
    reported: Path | None = None,
) -> Evaluated:
    """Judge `detections`, those of `records` in the same order, and write everything into the existing `folder`.

    origin: what was judged, for scores.json: weights or detections, data, split.
    earlier: detections of the same records by other epochs, to tell what persists.
    reported: the folder that the report is of, where this one is inside a run's.
    """
    about = about or About()
    judgement = judge_all(
        records, detections, classes, ious=about.ious, resized=about.resized, areas=about.areas,
        resamples=about.resamples, seed=about.seed,
    )  # fmt: skip
    analysis = analyse(_sized(records, detections), detections, classes, earlier=earlier)
    best = analysis.thresholds.overall
    content = {
        **origin,
        "classes": list(classes),
        **judgement.as_json(),
        "speed": {"images_per_second": images_per_second},
        "threshold": float(best.threshold),
        "threshold_note": best.note,
    }
    _write(folder / "scores.json", finite(content), indent=1)
    _write(folder / "analysis.json", analysis.as_json())
    _write(folder / "detections.json", detections_as_json(records, detections, classes))
    from boxwright.report import write_report

    if records and (isinstance(image := records[0].image, Member) or image.is_file()):
        from boxwright.inference.gallery import write_gallery

        write_gallery(folder, records, detections, classes, analysis)
    write_report(reported or folder)
    return Evaluated(folder, judgement.scores, images_per_second, float(best.threshold), judgement, best.note)


def _sized(records: Sequence[Record], detections: Sequence[Detections]) -> list[Record]:
    """The same records, where nobody told a picture's size with the smallest that holds all its boxes."""
    sized: list[Record] = []
    for record, found in zip(records, detections, strict=True):
        if min(record.size) == 0:
            corners = np.concatenate([record.boxes[:, 2:], found.boxes[:, 2:], [[1, 1]]]).max(axis=0)
            record = replace(record, size=(math.ceil(corners[1]), math.ceil(corners[0])))
        sized.append(record)
    return sized


def detections_as_json(
    records: Sequence[Record], detections: Sequence[Detections], classes: Sequence[str]
) -> dict[str, Any]:
    """Classes, pictures and every detection; scores and boxes to the last bit."""
    return {
        "classes": list(classes),
        "images": [{"id": r.id, "file": str(r.image), "size": list(r.size)} for r in records],
        "detections": [
            {"image": image, "class": label, "score": score, "box": box}
            for image, found in enumerate(detections)
            for label, score, box in zip(
                found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True
            )
        ],
    }


def finite(value: Any) -> Any:
    """NaN as None: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, content: Any, indent: int | None = None) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
        commit(part, path)
    except OSError as error:
        raise DiskFailed(f"cannot write {path}: {error.strerror}") from None
