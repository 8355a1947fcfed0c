"""The same effective batch trains the same, however many of its pictures are on the device at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from boxwright.models import checkpoint
from boxwright.types import Batch
from boxwright.verbs import train


def run(data: Path, place: Path, **options: Any) -> dict[str, Tensor]:
    defaults: dict[str, Any] = {
        "model": "fasterrcnn_vitdet_nano", "data": str(data), "epochs": 10, "batch": 8, "imgsz": 64, "optimizer": "sgd",
        "lr": 0.001, "warmup_steps": 1, "device": "cpu", "project_dir": place, "eval_every": 10, "flip": 0.5,
    }  # fmt: skip
    return checkpoint.read_tensors(train(**{**defaults, **options}, quiet=True).folder / "last_model.safetensors")


@pytest.mark.parametrize(
    "options",
    [{}, {"option": ("drop_path=0.2",)}, {"optimizer": "adamw", "lr": 0.0001, "layer_decay": 0.8}],
    ids=["sgd", "drop path", "adamw"],
)
def test_ten_steps_of_eight_are_ten_of_two_by_four_and_eight_by_one(
    options: dict[str, Any], drawn: Path, tmp_path: Path
) -> None:
    whole = run(drawn, tmp_path, **options)
    for size in (3, 1):  # three does not divide eight
        parts = run(drawn, tmp_path, micro_batch=size, **options)
        for name, tensor in whole.items():
            torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_parts_are_the_batch_again() -> None:
    images = torch.randint(0, 255, (5, 3, 4, 6), dtype=torch.uint8)
    ids = tuple("abcde")
    boxes = tuple(torch.rand(i, 4) for i in range(5))
    labels = tuple(torch.zeros(i, dtype=torch.int64) for i in range(5))
    difficult = tuple(torch.zeros(i, dtype=torch.bool) for i in range(5))
    for seeds in ((), (1, 2, 3, 4, 5)):
        batch = Batch(ids, images, ((4, 6),) * 5, boxes, labels, difficult, seeds)
        parts = list(batch.parts(2))
        assert [len(part) for part in parts] == [2, 2, 1]
        assert torch.equal(torch.cat([part.images for part in parts]), images)
        assert sum((part.ids for part in parts), ()) == ids
        assert sum((part.seeds for part in parts), ()) == seeds
        assert [len(b) for part in parts for b in part.boxes] == [0, 1, 2, 3, 4]
