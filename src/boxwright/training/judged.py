"""The end of a run: what its best weights found on the validation pictures → <run>/evaluation and report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from boxwright.config import Run
from boxwright.evaluating import About, write_evaluation
from boxwright.evaluation.conventions import Resized
from boxwright.report import write_report
from boxwright.training import found
from boxwright.types import Record


def write_judged(
    folder: Path, run: Run, records: Sequence[Record], classes: Sequence[str], best_step: int
) -> Path | None:
    """Write the evaluation of the best weights, from what they found when they were judged, and the run's report.

    Gives the report's path; None where what they found is no longer there. A run that has its evaluation keeps it.
    """
    detections, others = found.read(folder, best_step, len(records))
    if detections is None:
        return write_report(folder) if (folder / "evaluation" / "scores.json").is_file() else None
    write_evaluation(
        folder / "evaluation",
        records,
        detections,
        classes,
        origin={"weights": str(folder / "best_model.safetensors"), "data": run.data, "split": "val"},
        about=About(resized=Resized(run.imgsz, run.square_training), seed=run.seed),
        earlier=others,
        reported=folder,
    )
    found.forget(folder)
    return folder / "report.html"
