"""RoIAlign (He et al., 2017, arXiv:1703.06870): features of regions from one map, on CPU and GPU.

torchvision's kernel is fast on a GPU. On a CPU the same numbers come faster from a weighted gather: with the map's
channels last, every bin is a weighted sum of rows (benchmarks/roi_align.py compares the two).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

SAMPLES = 2  # points a bin and axis, as in torchvision's detectors


def align_regions(level: Tensor, regions: Tensor, pool: int, stride: int) -> Tensor:
    """(B, C, H, W) and regions (R, 5) of picture index and x1 y1 x2 y2 in pixels → (R, C, pool, pool).

    Equal to torchvision's roi_align with `aligned=False`.
    """
    if level.device.type != "cpu" or not len(regions):
        return roi_align(level, regions.to(level.dtype), pool, 1 / stride, SAMPLES)
    _, C, H, W = level.shape
    rows, row_weights = _axis(regions[:, 2] / stride, regions[:, 4] / stride, H, pool)
    columns, column_weights = _axis(regions[:, 1] / stride, regions[:, 3] / stride, W, pool)
    first = (regions[:, 0].long() * (H * W)).reshape(-1, 1, 1, 1, 1)
    index = first + rows[:, :, None, :, None] * W + columns[:, None, :, None, :]  # (R, P, P, 4, 4)
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    table = level.permute(0, 2, 3, 1).reshape(-1, C)  # free where channels are last in memory
    cells = (2 * SAMPLES) ** 2
    bins = F.embedding_bag(
        index.reshape(-1, cells),
        table,
        mode="sum",
        per_sample_weights=weights.reshape(-1, cells).to(table.dtype),
    )
    return bins.reshape(len(regions), pool, pool, C).permute(0, 3, 1, 2)


def _axis(start: Tensor, end: Tensor, length: int, pool: int) -> tuple[Tensor, Tensor]:
    """Along one axis the cells that each bin looks at, and their share of it: both (R, pool, 2*SAMPLES).

    A point takes linearly from the two cells beside it; points over a cell outside the map count as zero.
    """
    side = (end - start).clamp(min=1)  # a region is at least a cell wide
    steps = (torch.arange(pool * SAMPLES, device=start.device) + 0.5) / (pool * SAMPLES)
    points = start[:, None] + steps * side[:, None]  # (R, P*S) in cells
    inside = (points >= -1) & (points <= length)
    points = points.clamp(0, length - 1)
    low = points.floor()
    high_share = points - low
    cells = torch.stack([low, (low + 1).clamp(max=length - 1)], dim=-1).long()  # (R, P*S, 2)
    shares = torch.stack([1 - high_share, high_share], dim=-1) * inside[..., None] / SAMPLES
    return cells.reshape(len(start), pool, -1), shares.reshape(len(start), pool, -1)
