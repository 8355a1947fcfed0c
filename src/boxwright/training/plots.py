"""The graphs of a run: mAP after each evaluation (the article's figure 4) and losses over the steps."""

from __future__ import annotations

import json
from pathlib import Path

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
    """plots/loss.png from metrics.jsonl."""
    with (folder / "metrics.jsonl").open(encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if "loss" in row]
    figure, axes = _figure("step", "loss")
    steps = [row["step"] for row in rows]
    for key in sorted({key for row in rows for key in row if key.startswith("loss")}):
        values = [row.get(key) for row in rows]
        axes.plot(steps, values, label=key, linewidth=2 if key == "loss" else 1)
    axes.set_ylim(bottom=0)
    axes.legend()
    _save(figure, folder / "plots" / "loss.png")


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
