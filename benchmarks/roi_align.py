"""Our RoIAlign on the CPU beside torchvision's kernel, forward and backward, interleaved; medians and their ratio.

Regions and maps are those of a training step on 640 x 640 px: 512 regions, 256 channels, channels last.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import roi_align

from boxwright.models.detectors.pooling import align_regions

ROUNDS = 7
Pool = Callable[[Tensor, Tensor, int], Tensor]


def regions(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=generator) * 480
    side = torch.rand(count, 2, generator=generator) * 130 + 30
    return torch.cat([torch.zeros(count, 1), corner, corner + side], dim=1)


def torchvision_pool(level: Tensor, boxes: Tensor, stride: int) -> Tensor:
    return roi_align(level, boxes, 7, 1 / stride, 2)


def our_pool(level: Tensor, boxes: Tensor, stride: int) -> Tensor:
    return align_regions(level, boxes, 7, stride)


def seconds(pool: Pool, level: Tensor, boxes: Tensor, stride: int, *, backward: bool) -> float:
    x = level.clone(memory_format=torch.preserve_format).requires_grad_(backward)
    started = time.perf_counter()
    out = pool(x, boxes, stride)
    if backward:
        out.sum().backward()
    return time.perf_counter() - started


def main() -> None:
    torch.set_num_threads(1)
    boxes = regions(512)
    print("512 regions, 256 channels, one thread; seconds, median of", ROUNDS)
    print(f"{'stride':>6} {'':9} {'torchvision':>12} {'ours':>8} {'ratio':>6}")
    for stride in (4, 8, 16):
        level = torch.randn(1, 256, 640 // stride, 640 // stride).contiguous(memory_format=torch.channels_last)
        for backward in (False, True):
            theirs, ours = [], []
            for _ in range(ROUNDS):
                theirs.append(seconds(torchvision_pool, level, boxes, stride, backward=backward))
                ours.append(seconds(our_pool, level, boxes, stride, backward=backward))
            a, b = statistics.median(theirs), statistics.median(ours)
            print(f"{stride:6} {'+backward' if backward else 'forward':9} {a:12.3f} {b:8.3f} {a / b:6.2f}")


if __name__ == "__main__":
    main()
