"""Checks that a part of your own keeps its contract: call them from your tests, or once while you write it.

    from boxwright.testing import assert_is_backbone
    assert_is_backbone(my_backbone())

Each raises AssertionError with what is wrong. They run on the CPU, on small random pictures, in a second or so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from boxwright.models.detectors.base import Detector
from boxwright.types import Batch, Size

CANVAS: Size = (64, 96)  # of `example_batch`


def example_batch(num_classes: int, *, size: Size = CANVAS, seed: int = 0) -> Batch:
    """Two random pictures on one canvas of `size`, the second smaller than it: two objects, and one."""
    height, width = size
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    smaller = (height - height // 5, width - width // 4)
    images[1, :, smaller[0] :] = 0
    images[1, :, :, smaller[1] :] = 0
    scale = torch.tensor([width, height, width, height])
    boxes = (
        torch.tensor([[0.05, 0.1, 0.5, 0.9], [0.3, 0.05, 0.95, 0.65]]) * scale,
        torch.tensor([[0.1, 0.15, 0.6, 0.7]]) * scale,
    )
    labels = (torch.tensor([0, num_classes - 1]), torch.tensor([num_classes // 2]))
    difficult = tuple(torch.zeros(len(b), dtype=torch.bool) for b in boxes)
    return Batch(("first", "second"), images, (size, smaller), boxes, labels, difficult)


def assert_is_backbone(body: nn.Module, sizes: Sequence[Size] = ((64, 64), (96, 160))) -> None:
    """Maps of the strides and channels that it says, at any size of its coarsest stride; all it has can be trained."""
    channels = _channels_of(body, "a backbone")
    coarsest = max(channels)
    for height, width in sizes:
        size = (-(-height // coarsest) * coarsest, -(-width // coarsest) * coarsest)
        maps = body(torch.randn(2, 3, *size))
        assert set(maps) == set(channels), f"its maps have strides {sorted(maps)}, its channels {sorted(channels)}"
        _assert_shapes(maps, channels, size)
        _assert_learns(body, torch.stack([level.float().pow(2).mean() for level in maps.values()]).sum())


def assert_is_pyramid(pyramid: nn.Module, channels: Mapping[int, int]) -> None:
    """Levels of the strides and channels that it says, from a backbone's maps of `channels` {stride: C}."""
    levels = _channels_of(pyramid, "a pyramid")
    coarsest = max(*channels, *levels)
    size = (2 * coarsest, 3 * coarsest)
    maps = {stride: torch.randn(2, c, size[0] // stride, size[1] // stride) for stride, c in channels.items()}
    made = pyramid(maps)
    assert set(made) == set(levels), f"its levels have strides {sorted(made)}, its channels {sorted(levels)}"
    _assert_shapes(made, levels, size)
    _assert_learns(pyramid, torch.stack([level.float().pow(2).mean() for level in made.values()]).sum())


def assert_is_detector(detector: Detector, *, size: Size = CANVAS) -> None:
    """Finite losses, with and without objects, a finite gradient for every parameter, boxes within the pictures."""
    assert isinstance(detector, Detector), "a detector is a subclass of boxwright.models.detectors.base.Detector"
    batch = example_batch(detector.num_classes, size=size)
    losses = detector.train().losses(batch)
    for name, loss in losses.items():
        assert loss.ndim == 0, f"{name} has shape {tuple(loss.shape)}, a scalar is wanted"
        assert torch.isfinite(loss), f"{name} is {loss.item()}"
    _assert_learns(detector, torch.stack(list(losses.values())).sum())
    empty = Batch(
        batch.ids,
        batch.images,
        batch.sizes,
        tuple(boxes[:0] for boxes in batch.boxes),
        tuple(labels[:0] for labels in batch.labels),
        tuple(difficult[:0] for difficult in batch.difficult),
    )
    without = torch.stack(list(detector.losses(empty).values())).sum()
    assert torch.isfinite(without), f"the losses of pictures without objects are {without.item()}"
    without.backward()
    detector.zero_grad()
    for found, (height, width) in zip(detector.eval().predict(batch), batch.sizes, strict=True):
        assert np.isfinite(found.boxes).all(), "boxes that are not finite"
        assert (found.boxes >= 0).all(), "boxes that leave the picture"
        assert (found.boxes <= np.array([width, height, width, height])).all(), "boxes that leave the picture"
        assert (np.diff(found.scores) <= 0).all(), "detections that do not come best first"
        assert ((found.labels >= 0) & (found.labels < detector.num_classes)).all(), "labels that are no class"


def _channels_of(module: nn.Module, what: str) -> Mapping[int, int]:
    channels = getattr(module, "channels", None)
    assert isinstance(channels, Mapping), f"{what} needs `channels`, {{stride: channels}}"
    assert channels, f"{what} needs at least one stride in `channels`"
    return cast(Mapping[int, int], channels)


def _assert_shapes(maps: Mapping[int, Tensor], channels: Mapping[int, int], size: Size) -> None:
    for stride, level in maps.items():
        wanted = (2, channels[stride], -(-size[0] // stride), -(-size[1] // stride))
        assert tuple(level.shape) == wanted, f"the map of stride {stride} has shape {tuple(level.shape)}, not {wanted}"


def _assert_learns(module: nn.Module, loss: Tensor) -> None:
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        return
    loss.backward()
    without = [name for name, p in trainable.items() if p.grad is None]
    assert not without, f"{len(without)} parameters get no gradient: {', '.join(without[:3])}"
    wrong = [name for name, p in trainable.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
    assert not wrong, f"{len(wrong)} parameters get a gradient that is not finite: {', '.join(wrong[:3])}"
    module.zero_grad()
