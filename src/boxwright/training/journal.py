"""What a run tells: a progress line for the person, metrics.jsonl and results.csv for later, graphs."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import nn

from boxwright.config import Run
from boxwright.data.dataset import Dataset, Split
from boxwright.progress import clock
from boxwright.training import plots
from boxwright.training.run_folder import append_json, append_row
from boxwright.training.sinks import Sinks

BOOKS = ("metrics.jsonl", "results.csv")
WORTH_SAYING = ("recipe", "flip", "scale_jitter", "mosaic", "mixup", "copy_paste", "augment", "article_faults", "ema")
LOG_EVERY = 10  # steps
LINE_EVERY = 30.0  # seconds, where standard error is no terminal


class Journal:
    """Keeps the books of one run. Everything said goes to standard error and to train.log."""

    def __init__(
        self,
        folder: Path,
        run: Run,
        total: int,
        steps_per_epoch: int,
        device: torch.device,
        *,
        batch: int,
        ranks: int = 1,
        quiet: bool = False,
    ) -> None:
        self.folder = folder
        self.run = run
        self.total = total
        self.steps_per_epoch = steps_per_epoch
        self.device = device
        self.batch = batch
        self.ranks = ranks
        self.sinks: Sinks | None = None
        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False)
        self._file = (folder / "train.log").open("a", encoding="utf-8")
        self._bar = self._make_bar() if self._console.is_terminal and not quiet else None
        self._task = self._bar.add_task("", total=total, text="") if self._bar else None
        self._text = ""
        self._handler = _Warnings(self)
        self._window: list[dict[str, float]] = []  # losses of the steps since the last line of metrics.jsonl
        self._epoch: list[float] = []  # losses since the last evaluation
        self._started = self._shown = self._window_started = time.monotonic()

    def __enter__(self) -> Self:
        logging.getLogger("boxwright").addHandler(self._handler)
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger("boxwright").removeHandler(self._handler)
        if self._bar:
            self._bar.stop()
        self._file.close()

    def place(self) -> dict[str, Any]:
        """Where the books stand, for a state: their lengths, and what is not written yet."""
        sizes = {name: _size(self.folder / name) for name in BOOKS}
        return {"sizes": sizes, "window": self._window, "epoch": self._epoch, "seconds": self.seconds()}

    def take_back(self, since: Mapping[str, Any]) -> None:
        """Make the books again what they were at `place`: what came after is going to come again."""
        for name, size in since["sizes"].items():
            if _size(self.folder / name) > size:
                os.truncate(self.folder / name, size)
        self._window, self._epoch = list(since["window"]), list(since["epoch"])
        self._started = min(self._started, time.monotonic() - since["seconds"])  # time that was lost has gone, too

    def say(self, message: str) -> None:
        """A line that stays."""
        self._file.write(f"{time.strftime('%H:%M:%S')} {message}\n")
        self._file.flush()
        if self._bar:
            self._bar.console.print(message, markup=False)
        elif not self._quiet:
            sys.stderr.write(message + "\n")

    def introduce(self, dataset: Dataset, splits: Sequence[Split], detector: nn.Module, origin: str) -> None:
        """What is about to be trained, on what, from what."""
        run = self.run
        for note in dataset.notes:
            self.say(note)
        parameters = sum(p.numel() for p in detector.parameters())
        for split in splits:
            objects = sum(len(record.boxes) for record in split.records)
            self.say(f"{split.name}: {len(split.records)} pictures, {objects} objects, {len(dataset.classes)} classes")
            for line in fault_lines(split):
                self.say(f"  {line}")
        parts = [run.backbone, run.pyramid and f"pyramid {run.pyramid}"]
        beneath = "".join(f" on {part}" for part in parts if part)
        self.say(f"{run.model}{beneath}: {parameters:,} parameters, {origin}")
        if used := [f"{name} {getattr(run, name)}" for name in WORTH_SAYING if getattr(run, name)]:
            self.say(", ".join(used))
        many = f"{self.total} steps" if not run.time_budget else f"{run.time_budget} of steps"
        on = f"{self.ranks} × {self.device.type}" if self.ranks > 1 else str(self.device)
        self.say(
            f"{many} of {self.batch}, {run.optimizer} at {run.learning_rate:g}, pictures at {run.imgsz}"
            f"{' square' if run.square_training else ''}, on {on}; "
            f"writing {self.folder}"
        )

    def step(self, step: int, losses: Mapping[str, float], rate: float, norm: float) -> None:
        """Step number `step` (0-based) is done; `rate` is its learning rate, `norm` that of its gradient."""
        self._window.append({"loss": sum(losses.values()), **losses})
        self._epoch.append(self._window[-1]["loss"])
        if (step + 1) % LOG_EVERY and step + 1 < self.total:
            self._show(step)
            return
        seconds = max(time.monotonic() - self._window_started, 1e-9)
        mean = {name: sum(row[name] for row in self._window) / len(self._window) for name in self._window[0]}
        images = len(self._window) * self.batch / seconds
        row = {"step": step + 1, "epoch": step // self.steps_per_epoch + 1, "lr": rate, **mean}
        row |= {"gradient": norm, "images_per_s": images}
        append_json(self.folder / "metrics.jsonl", row)
        if self.sinks:
            self.sinks.write(step + 1, {f"train/{k}": v for k, v in row.items() if k != "step"})
        self._show(step, f"loss {mean['loss']:.3f}  {images:.1f} images/s{self._memory()}")
        self._window, self._window_started = [], time.monotonic()

    def evaluating(self, done: int, pictures: int) -> None:
        """So many validation pictures are done."""
        if self._bar and self._task is not None:
            self._bar.update(self._task, text=f"evaluating {done}/{pictures}")

    def evaluation(self, step: int, scores: Mapping[str, float], *, best: bool) -> None:
        """The scores after `step`."""
        epoch = -(-(step + 1) // self.steps_per_epoch)
        loss = sum(self._epoch) / len(self._epoch) if self._epoch else math.nan
        row = {"epoch": epoch, "step": step + 1, "loss": loss, **scores, "seconds": self.seconds()}
        append_row(self.folder / "results.csv", row)
        append_json(self.folder / "metrics.jsonl", {"evaluation": True, **row})
        if self.sinks:
            self.sinks.write(step + 1, {f"val/{k.removeprefix('val_')}": v for k, v in scores.items()})
        self.picture(step + 1, "validation")
        plots.plot_map(self.folder)
        plots.plot_losses(self.folder)
        plots.plot_learning_rate(self.folder)
        epochs = f"/{self.run.epochs}" if not self.run.budget else ""
        self.say(
            f"epoch {epoch}{epochs}  loss {loss:.3f}  mAP {scores['map']:.3f}  mAP50 {scores['map50']:.3f}"
            f"  {'best so far' if best else '':11}  {clock(self.seconds())} gone, {self._left(step)} left"
        )
        self._epoch, self._window_started = [], time.monotonic()

    def picture(self, steps: int, name: str) -> None:
        """A picture of previews/ is there, after so many steps."""
        path = self.folder / "previews" / f"{name}.jpg"
        if self.sinks and path.exists():
            self.sinks.picture(steps, name, path)

    def conclude(self, best: Mapping[str, float], epoch: int) -> None:
        self.say(
            f"best mAP {best['map']:.3f} (mAP50 {best['map50']:.3f}) in epoch {epoch}, after {clock(self.seconds())}; "
            f"weights, graphs and pictures are in {self.folder}"
        )

    def _show(self, step: int, text: str = "") -> None:
        if self._bar and self._task is not None:
            self._text = f"{text}  {self._left(step)} left" if text else self._text
            self._bar.update(self._task, completed=step + 1, text=self._text)
        elif text and time.monotonic() - self._shown >= LINE_EVERY:
            self._shown = time.monotonic()
            self.say(f"step {step + 1}/{self.total}  {text}  {self._left(step)} left")

    def seconds(self) -> float:
        """How long the run has taken, over all its parts."""
        return time.monotonic() - self._started

    def _left(self, step: int) -> str:
        if self.run.budget:
            return clock(max(self.run.budget - self.seconds(), 0))
        return clock(self.seconds() / (step + 1) * (self.total - step - 1))

    def _memory(self) -> str:
        if self.device.type != "cuda":
            return ""
        return f"  {torch.cuda.max_memory_allocated(self.device) / 2**30:.1f} GiB"

    def _make_bar(self) -> Progress:
        columns = (
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[text]}"),
        )
        return Progress(*columns, console=self._console, transient=True)


class Unwritten(Journal):
    """What the ranks that do not write have for a journal."""

    def __init__(self) -> None:
        self.total = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def place(self) -> dict[str, Any]:
        return {}

    def take_back(self, since: Mapping[str, Any]) -> None:
        pass

    def say(self, message: str) -> None:
        pass

    def introduce(self, dataset: Dataset, splits: Sequence[Split], detector: nn.Module, origin: str) -> None:
        pass

    def step(self, step: int, losses: Mapping[str, float], rate: float, norm: float) -> None:
        pass

    def evaluating(self, done: int, pictures: int) -> None:
        pass

    def evaluation(self, step: int, scores: Mapping[str, float], *, best: bool) -> None:
        pass

    def conclude(self, best: Mapping[str, float], epoch: int) -> None:
        pass

    def picture(self, steps: int, name: str) -> None:
        pass

    def seconds(self) -> float:
        return 0.0


class _Warnings(logging.Handler):
    """The library's warnings, said without tearing the progress line."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(logging.WARNING)
        self.journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        self.journal.say(f"{record.levelname.lower()}: {record.getMessage()}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def fault_lines(split: Split, most: int = 5) -> list[str]:
    """What was found wrong in a split: a count of each action, and the first few."""
    counts: dict[str, int] = {}
    for fault in split.faults:
        counts[fault.action] = counts.get(fault.action, 0) + 1
    lines = [f"{number} × {action}" for action, number in sorted(counts.items())]
    lines += [str(fault) for fault in split.faults[:most]]
    if len(split.faults) > most:
        lines.append(f"... and {len(split.faults) - most} more")
    return lines
