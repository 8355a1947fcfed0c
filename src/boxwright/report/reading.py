"""A run folder or an evaluation folder → what a report tells of it; whatever is missing or damaged becomes a note.

Only files are read, also while a training is writing them: a half last line is left for the next time.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from boxwright.errors import UserError
from boxwright.evaluation.analysis import Analysis
from boxwright.registry import nearest
from boxwright.report import bounded
from boxwright.report.revive import revive

LARGEST = 512 << 20  # bytes of a file that is read: books of a million steps are smaller
RUN_FILES = ("run.yaml", "metrics.jsonl", "results.csv", "train.log")
JUDGED_FILES = ("scores.json", "analysis.json")
PREVIEWS = {
    "first_batch": "The first pictures the network saw, after augmentation, with the boxes it learned from.",
    "validation": "Validation pictures with their annotations (dashed), each beside what the network found in it.",
}
FRESH = 120.0  # seconds since the last line, within which a training counts as going on
END = re.compile(r"^\d\d:\d\d:\d\d best mAP .* in epoch \d+, after ")  # the journal's last words of a finished run
EARLY = re.compile(r"evaluations in a row|: stopped early")
SPLIT = re.compile(r"^\d\d:\d\d:\d\d (\w+): \d+ pictures, ")
FAULT = re.compile(r"^\d\d:\d\d:\d\d   (?=\S)")  # a line under a split's, see training/journal.py

State = Literal["finished", "running", "not finished", "not begun", "no training"]


@dataclass(frozen=True)
class Shown:
    """A picture of the gallery: its file and what is to be said of it."""

    file: Path
    group: str  # best, worst, random, review
    image: str  # the record's id
    caption: str
    suspect: int | None = None  # place in the review list, 0-based


@dataclass(frozen=True)
class Judged:
    """What an evaluation left in its folder."""

    folder: Path
    scores: Mapping[str, Any]  # scores.json as it is; {} where there is none
    analysis: Analysis | None = None
    gallery: tuple[Shown, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """All that a report is made of."""

    folder: Path
    name: str
    state: State
    options: Mapping[str, Any]  # run.yaml
    environment: Mapping[str, Any]  # env.json
    steps: tuple[Mapping[str, float], ...]  # metrics.jsonl, without evaluations
    evaluations: tuple[Mapping[str, float], ...]  # results.csv, or what metrics.jsonl has of it
    log: tuple[str, ...]  # train.log
    previews: Mapping[str, Path]
    judged: Judged | None
    notes: tuple[str, ...] = field(default=())  # what is absent or could not be read, as sentences

    @property
    def faults(self) -> tuple[str, ...]:
        """What was found wrong in the data, and warnings, as the log has them."""
        found: list[str] = []
        split = ""
        for line in self.log:
            if begun := SPLIT.match(line):
                split = begun[1]
            elif FAULT.match(line):
                found.append(f"{split}: {FAULT.sub('', line)}")
            elif " warning: " in line:
                found.append(line)
        return tuple(found)

    @property
    def best(self) -> Mapping[str, float]:
        """The evaluation with the highest mAP; {} before the first."""
        known = [row for row in self.evaluations if math.isfinite(row.get("map", math.nan))]
        return max(known, key=lambda row: row["map"], default={})


def read(folder: Path) -> Found:
    """What is in a run folder, or in the folder of an evaluation alone.

    Raises `UserError` where there is no such folder or it is neither.
    """
    folder = existing(folder)
    notes: list[str] = []
    options = _read(folder / "run.yaml", bounded.options, notes)
    environment = _read(folder / "env.json", bounded.mapping, notes)
    books = _lines(folder / "metrics.jsonl", notes)
    steps = tuple(row for row in books if not row.get("evaluation") and "step" in row)
    evaluations = _table(folder / "results.csv", notes) or tuple(row for row in books if row.get("evaluation"))
    log = tuple((_text(folder / "train.log", notes) or "").splitlines())
    trained = any((folder / name).exists() for name in RUN_FILES)
    inside = folder / "evaluation" if trained else folder
    judged = _judged(inside) if any((inside / name).exists() for name in JUDGED_FILES) else None
    state = _state(folder, log, bool(steps or evaluations)) if trained else "no training"
    if trained:
        notes += _absent(folder, state, steps, evaluations, judged)
    previews = {
        name: path for name in PREVIEWS if _inside((path := folder / "previews" / f"{name}.jpg").parent, path.name)
    }
    return Found(
        folder,
        folder.resolve().name or str(folder),
        state,
        options,
        environment,
        steps,
        evaluations,
        log,
        previews,
        judged,
        tuple(notes),
    )


def existing(folder: Path) -> Path:
    """The folder of a run or an evaluation; a mistake is a `UserError` with the nearest right name."""
    folder = folder.expanduser()
    try:
        if folder.is_dir():
            if any((folder / name).exists() for name in (*RUN_FILES, *JUDGED_FILES)):
                return folder
            inside = sorted(
                path.parent.name for name in ("run.yaml", "scores.json") for path in folder.glob(f"*/{name}")
            )
            hint = f" Inside are: {', '.join(inside[:5])}" if inside else ""
            raise UserError(
                f"{folder} is neither the folder of a training nor of an evaluation: it has none of run.yaml, "
                f"metrics.jsonl, scores.json, analysis.json.{hint}"
            )
        if folder.exists():
            raise UserError(f"{folder} is a file; wanted is the folder that a training or an evaluation wrote")
        near = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    except OSError as error:
        raise UserError(f"cannot read {str(folder)[:200]}: {error.strerror}") from None
    raise UserError(f"no run at {folder} (looked from {Path.cwd()}).{nearest(folder.name, near)}")


def _state(folder: Path, log: tuple[str, ...], begun: bool) -> State:
    if any(END.match(line) for line in log[-3:]):
        return "finished"
    written = [path.stat().st_mtime for name in ("metrics.jsonl", "train.log") if (path := folder / name).is_file()]
    if written and time.time() - max(written) < FRESH:
        return "running"
    return "not finished" if begun else "not begun"


def _absent(
    folder: Path,
    state: State,
    steps: tuple[Mapping[str, float], ...],
    evaluations: tuple[Mapping[str, float], ...],
    judged: Judged | None,
) -> list[str]:
    """What a reader would look for in vain."""
    notes: list[str] = []
    missing = [name for name in (*RUN_FILES, "env.json") if not (folder / name).exists()]
    if missing and state != "running":
        notes.append(f"The folder has no {', '.join(missing)}: what would come from there is left out.")
    if state == "running":
        notes.append("The training was going on when this page was made: the figures are not final.")
    if state == "not finished":
        notes.append(f"The training has not come to its end. It goes on with: boxwright train --resume {folder}")
    if not steps:
        notes.append("No step is logged yet, so there are no losses.")
    if not evaluations:
        notes.append("No evaluation yet, so there is no mAP: the first comes after the first epoch.")
    elif not any(math.isfinite(row.get("val_loss", math.nan)) for row in evaluations):
        notes.append("No loss on the validation pictures was measured in this run.")
    if judged is None:
        notes.append("No analysis of the mistakes yet: it is made at the end of a training, or by boxwright evaluate.")
    return notes


def _judged(folder: Path) -> Judged:
    notes: list[str] = []
    scores = _read(folder / "scores.json", bounded.mapping, notes)
    if not scores and not (folder / "scores.json").exists():
        notes.append("There is no scores.json, so the scores by COCO's and VOC's rules are missing.")
    analysis = None
    if (folder / "analysis.json").exists():
        described = _read(folder / "analysis.json", bounded.mapping, notes)
        try:
            analysis = revive(Analysis, described) if described else None
        except ValueError as error:
            notes.append(f"analysis.json is not what this version writes ({error}): evaluate again to have it here.")
    else:
        notes.append("There is no analysis.json: evaluate again to see where AP is lost.")
    return Judged(folder, scores, analysis, _gallery(folder / "pictures", notes), tuple(notes))


def _gallery(folder: Path, notes: list[str]) -> tuple[Shown, ...]:
    described = _read(folder / "gallery.json", bounded.mapping, notes)
    shown: list[Shown] = []
    listed = described.get("pictures", [])
    for entry in listed if isinstance(listed, list) else []:
        if not isinstance(entry, dict):
            continue
        file = str(entry.get("file", ""))
        if not _inside(folder, file):
            notes.append(f"gallery.json names a picture that is not there: {file[:80]!r}")
            continue
        rank = entry.get("suspect")
        shown.append(
            Shown(
                folder / file,
                str(entry.get("group", "")),
                str(entry.get("image", "")),
                str(entry.get("caption", "")),
                rank if isinstance(rank, int) else None,
            )
        )
    skipped = described.get("skipped", [])
    if isinstance(skipped, list) and skipped:
        notes.append(
            f"{len(skipped)} picture{'' if len(skipped) == 1 else 's'} could not be shown; the first: {skipped[0]}"
        )
    return tuple(shown)


def _inside(folder: Path, file: str) -> bool:
    """Whether a list's entry is a file of its own folder: it leads nowhere else, by no name and no link."""
    try:
        path = folder / file
        return Path(file).name == file and path.is_file() and not bounded.leads_away(path, folder.parent)
    except (OSError, ValueError):  # a name too long, or one that no file can have
        return False


def _read(path: Path, parse: Callable[[str], dict[str, Any]], notes: list[str]) -> dict[str, Any]:
    """A file's mapping, {} where it is not there; what cannot be read is noted."""
    text = _text(path, notes)
    if text is None:
        return {}
    try:
        return parse(text)
    except (ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read: {' '.join(str(error).split())[:200]}")
        return {}


def _text(path: Path, notes: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if _readable(path, notes) else None
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return None


def _readable(path: Path, notes: list[str]) -> bool:
    """Whether it is a file of a size that is read, inside its folder; what it is instead is noted."""
    try:
        if not path.is_file():
            return False
        if bounded.leads_away(path, path.parent):
            notes.append(f"{path.name} is a link that leads out of the folder and is not followed.")
            return False
        if path.stat().st_size > LARGEST:
            notes.append(f"{path.name} is larger than {LARGEST >> 20} MiB and left out.")
            return False
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return False
    return True


def _whole(text: str) -> list[str]:
    """The lines that are complete: the last one may still be growing."""
    return text[: text.rfind("\n") + 1].splitlines()


def _lines(path: Path, notes: list[str]) -> list[dict[str, float]]:
    """The lines of metrics.jsonl as numbers, NaN for null."""
    if not _readable(path, notes):
        return []
    rows: list[dict[str, float]] = []
    bad = 0
    try:
        lines, count = bounded.thinned(path)
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            bad += 1
            continue
        values = {str(key): bounded.number(value) for key, value in row.items()} if isinstance(row, dict) else {}
        if values and math.isfinite(values.get("step", 0.0)):
            rows.append(values)
        else:
            bad += 1
    _spaced(path, len(lines), count, notes)
    if bad:
        notes.append(f"{bad} lines of {path.name} are damaged and left out.")
    return rows


def _spaced(path: Path, kept: int, count: int, notes: list[str]) -> None:
    if kept < count:
        notes.append(f"{path.name} has {count:,} lines; {kept:,} of them, evenly spaced, are shown.")


def _table(path: Path, notes: list[str]) -> tuple[dict[str, float], ...]:
    head, *lines = _whole(_text(path, notes) or "") or [""]
    every = -(-len(lines) // bounded.KEPT) or 1
    kept = lines[::-1][::every][::-1]  # the last is among them
    _spaced(path, len(kept), len(lines), notes)
    text = "\n".join([head, *kept])
    rows: list[dict[str, float]] = []
    bad = 0
    try:
        for row in csv.DictReader(io.StringIO(text)):
            values = {key: bounded.number(value) for key, value in row.items() if key}
            if None in cast(dict[Any, Any], row) or not values.get("epoch", math.nan) >= 0:
                bad += 1
            else:
                rows.append(values)
    except csv.Error:
        bad += 1
    if bad:
        notes.append(f"{bad} rows of {path.name} are damaged and left out.")
    return tuple(rows)
