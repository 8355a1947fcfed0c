"""The graphs of a run: mAP after each evaluation (the article's figure 4), losses and learning rate over the steps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from boxwright.training.run_folder import read_rows


def plot_map(folder: Path) -> None:
    """plots/map.png from results.csv."""
    rows = read_rows(folder / "results.csv")
    epochs = [row["epoch"] for row in rows]
    figure, axes = _figure("epoch", "mAP on the validation pictures")
    for key, label in (("map50", "mAP at IoU 0.50"), ("map", "mAP at IoU 0.50 to 0.95")):
        values = [row[key] for row in rows]
        axes.plot(epochs, values, marker="o", markersize=3, label=label)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper left")
    _save(figure, folder / "plots" / "map.png")


def plot_losses(folder: Path) -> None:
    """plots/loss.png from metrics.jsonl: of training, and of the validation pictures where it is known."""
    rows = _metrics(folder)
    training = [row for row in rows if "evaluation" not in row]
    figure, axes = _figure("step", "loss")
    for key in sorted({key for row in training for key in row if key.startswith("loss")}):
        axes.plot(*_line(training, key), label=key, linewidth=2 if key == "loss" else 1)
    judged = [row for row in rows if row.get("val_loss") is not None]
    if judged:
        axes.plot(*_line(judged, "val_loss"), label="loss on validation", color="black", marker="o", markersize=3)
    axes.set_ylim(bottom=0)
    if axes.lines:  # a run that was judged before its first line of losses has none
        axes.legend()
    _save(figure, folder / "plots" / "loss.png")


def plot_learning_rate(folder: Path) -> None:
    """plots/learning_rate.png from metrics.jsonl."""
    figure, axes = _figure("step", "learning rate")
    axes.plot(*_line([row for row in _metrics(folder) if "lr" in row], "lr"))
    axes.set_ylim(bottom=0)
    _save(figure, folder / "plots" / "learning_rate.png")


def _metrics(folder: Path) -> list[dict[str, Any]]:
    with (folder / "metrics.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _line(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and what `key` was after them, NaN where it was not."""
    return [row["step"] for row in rows], [row.get(key, math.nan) for row in rows]


def _figure(x: str, y: str):
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no window system
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(path.stem + ".tmp.png")
    figure.savefig(temporary)
    temporary.replace(path)
