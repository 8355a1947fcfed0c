"""A step that runs out of memory goes on in smaller parts and learns the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from boxwright.models import checkpoint
from boxwright.models.detectors.faster_rcnn import FasterRCNN
from boxwright.training.step import OutOfMemory, is_out_of_memory
from boxwright.types import Batch
from boxwright.verbs import train

Start = Callable[..., Path]


@pytest.fixture
def start(drawn: Path, tmp_path: Path) -> Start:
    def start(name: str, **options: Any) -> Path:
        return train(
            model="fasterrcnn_vitdet_nano", data=str(drawn), epochs=1, batch=4, imgsz=64, lr=0.01, warmup_steps=0,
            device="cpu", project_dir=tmp_path, name=name, quiet=True, **options,
        ).folder  # fmt: skip

    return start


def short_of_memory(patch: pytest.MonkeyPatch, most: int, error: Exception) -> list[int]:
    """More than `most` pictures at once do not fit; what was tried is kept."""
    whole, tried = FasterRCNN.losses, []

    def losses(self: FasterRCNN, batch: Batch) -> Any:
        tried.append(len(batch))
        if len(batch) > most:
            raise error
        return whole(self, batch)

    patch.setattr(FasterRCNN, "losses", losses)
    return tried


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("most", [1, 2, 3])
def test_smaller_parts_train_the_same(
    start: Start, monkeypatch: pytest.MonkeyPatch, most: int, error: Exception
) -> None:
    roomy = start("roomy")
    with monkeypatch.context() as patch:
        tried = short_of_memory(patch, most, error)
        tight = start("tight")
    assert tried[0] == 4
    assert max(tried[3:]) <= most
    log = (tight / "train.log").read_text("utf-8")
    assert "out of memory with 4 pictures at once: going on with 2 at once, still 4 a step" in log
    one, two = (checkpoint.read_tensors(folder / "last_model.safetensors") for folder in (roomy, tight))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5


def test_when_not_even_one_fits_it_says_what_to_turn(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_memory(monkeypatch, 0, ERRORS[0])
    with pytest.raises(OutOfMemory, match="1 pictures at once") as caught:
        start("none")
    assert caught.value.exit_code == 70
    assert "--imgsz" in str(caught.value)
    assert "checkpoint_blocks" in str(caught.value)


def test_other_errors_stay_what_they_are(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    short_of_memory(monkeypatch, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        start("other")
