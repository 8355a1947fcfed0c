"""The run that nothing happens to, which all others are compared with."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.faults import rig


@dataclass
class Straight:
    """An uninterrupted run."""

    folder: Path
    result: dict[str, Any]
    seconds: float


@pytest.fixture(scope="session")
def straight(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("straight")
    from boxwright.verbs import train

    # Here, in the parent: what a first step imports lazily is imported once for all children.
    train(
        model="fasterrcnn_vitdet_nano", data=str(drawn), epochs=1, batch=8, imgsz=64, optimizer="adamw", lr=0.002,
        device="cpu", project_dir=place, name="warm", quiet=True,
    )  # fmt: skip
    started = time.monotonic()
    child = rig.begin(rig.train_words(drawn, place), place / "log")
    assert child.wait() == 0, (place / "log").read_text("utf-8")
    return Straight(place / "it", rig.result(place / "it"), time.monotonic() - started)
