"""TensorBoard as a place that a run also logs to: event files in RUN/tensorboard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes event files; what was logged after the step that a run goes on from is hidden, and logged again."""

    def __init__(self, resume_step: int | None) -> None:
        self._resume_step = resume_step
        self._writer: SummaryWriter | None = None

    def start(self, run_folder: Path, run: Mapping[str, Any], total_steps: int) -> str:
        place = run_folder / "tensorboard"
        # An event file that could not be written is left as it is; another one beside it goes on.
        purge_step = None if self._writer else 0 if self._resume_step is None else self._resume_step + 1
        self._writer = SummaryWriter(str(place), purge_step=purge_step)
        if purge_step == 0:
            described = json.dumps({**run, "total_steps": total_steps}, indent=1, default=str)
            self._writer.add_text("run", "\n".join("    " + line for line in described.splitlines()), 0)
        self._writer.flush()
        return f"tensorboard --logdir {place}"

    def has(self, handed: Mapping[str, int]) -> Mapping[str, int]:
        return {name: min(step, self._resume_step or 0) for name, step in handed.items()}  # the rest is hidden

    def write(self, step: int, values: Mapping[str, float]) -> None:
        assert self._writer
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed process leaves nothing behind in its memory; what went wrong is raised here

    def picture(self, step: int, name: str, path: Path) -> None:
        assert self._writer
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))  # (H, W, 3)
        self._writer.add_image(name, pixels, step, dataformats="HWC")
        self._writer.flush()

    def finish(self, exit_code: int) -> None:
        assert self._writer
        self._writer.close()
