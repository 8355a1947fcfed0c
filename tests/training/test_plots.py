"""The graphs of a run show what its books say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from boxwright.training import plots


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "plots").mkdir()
    return tmp_path


@pytest.fixture
def drawn_axes(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of every graph that is saved."""
    found: list[Axes] = []
    whole = Figure.savefig

    def savefig(figure: Figure, *values: Any, **options: Any) -> None:
        found.extend(figure.axes)
        whole(figure, *values, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


def write_metrics(folder: Path, **judged: float | None) -> None:
    rows = [{"step": s, "lr": s / 1e4, "loss": 2 / s, "loss_box_reg": 1 / s, "images_per_s": 9.0} for s in (10, 20, 30)]
    rows.insert(2, {"evaluation": True, "step": 20, "loss": 99.0, "map": 0.1, **judged})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]
        for line in axes.get_lines()
    }


@pytest.mark.parametrize("judged", [{"val_loss": 0.5, "val_loss_box_reg": 0.2}, {"val_loss": None}, {}])
def test_losses_of_training_and_validation(
    judged: dict[str, float | None], folder: Path, drawn_axes: list[Axes]
) -> None:
    write_metrics(folder, **judged)
    plots.plot_losses(folder)
    training = {"loss": [(s, 2 / s) for s in (10, 20, 30)], "loss_box_reg": [(s, 1 / s) for s in (10, 20, 30)]}
    assert lines(drawn_axes[0]) == training | ({"loss on validation": [(20, 0.5)]} if judged.get("val_loss") else {})
    with Image.open(folder / "plots" / "loss.png") as image:
        assert image.size == (960, 600)


def test_the_learning_rate_of_every_logged_step(folder: Path, drawn_axes: list[Axes]) -> None:
    write_metrics(folder)
    plots.plot_learning_rate(folder)
    (line,) = lines(drawn_axes[0]).values()
    assert line == [(s, s / 1e4) for s in (10, 20, 30)]
    assert (folder / "plots" / "learning_rate.png").is_file()
    assert not list((folder / "plots").glob("*.tmp*"))
