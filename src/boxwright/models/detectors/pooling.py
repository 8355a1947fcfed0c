"""RoIAlign (He et al., 2017, arXiv:1703.06870): features of regions from the level of their size, on CPU and GPU.

torchvision's kernel is fast on a GPU. On a CPU the same numbers come faster from a weighted gather: with the map's
channels last, every bin is a weighted sum of rows (benchmarks/roi_align.py compares the two).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from boxwright.models.pyramid import Maps

MOST_POINTS = 8  # points a bin and axis; beyond it the gather's indices would take more memory than the features


def pool_regions(
    maps: Maps, boxes: Sequence[Tensor], strides: Sequence[int], pool: int, *, points: int = 2, aligned: bool = False
) -> Tensor:
    """Each box's features from the level of its size: (R, C, pool, pool), R boxes of all pictures in order.

    A box of 224 x 224 px is pooled from stride 16, one of half the side from stride 8, and so on (FPN, equation 1);
    where there is no such level from the next finer one, or the finest. `points` and `aligned` as in `align_regions`.
    """
    image = torch.cat([torch.full((len(b), 1), i, dtype=b.dtype, device=b.device) for i, b in enumerate(boxes)])
    regions = torch.cat([image, torch.cat(list(boxes))], dim=1)  # (R, 5)
    sides = ((regions[:, 3] - regions[:, 1]) * (regions[:, 4] - regions[:, 2])).sqrt()
    octave = (4 + (sides / 224).log2() + 1e-6).floor()  # log2 of the stride
    octaves = torch.tensor([stride.bit_length() - 1 for stride in strides], device=octave.device)
    level = (octave[:, None] >= octaves).sum(dim=1).clamp(min=1) - 1  # (R,) index into strides
    pooled, order = [], []
    for i, stride in enumerate(strides):
        here = torch.where(level == i)[0]
        pooled.append(align_regions(maps[stride], regions[here], pool, stride, points=points, aligned=aligned))
        order.append(here)
    features = torch.cat(pooled)
    return torch.empty_like(features).index_copy(0, torch.cat(order), features)


def align_regions(
    level: Tensor, regions: Tensor, pool: int, stride: int, *, points: int = 2, aligned: bool = False
) -> Tensor:
    """(B, C, H, W) and regions (R, 5) of picture index and x1 y1 x2 y2 in pixels → (R, C, pool, pool).

    Equal to torchvision's roi_align: `points` a bin and axis, 0 for as many as a bin is cells long (at least one, where
    torchvision has none over a region without area). `aligned` takes a cell's value to stand in its middle, as
    continuous edges have it; otherwise it stands in the cell's first corner, and a region is at least a cell wide
    (torchvision's detectors).
    """
    if level.device.type != "cpu" or not len(regions):
        return roi_align(level, regions.to(level.dtype), pool, 1 / stride, points, aligned)
    edges = regions[:, 1:] / stride - (0.5 if aligned else 0.0)
    start, sides = edges[:, :2], edges[:, 2:] - edges[:, :2]  # (R, 2) across and down, cells
    sides = sides if aligned else sides.clamp(min=1)
    counts = torch.full_like(sides, points) if points else (sides / pool).ceil().clamp(min=1)  # (R, 2)
    if counts.max() > MOST_POINTS:
        return roi_align(level, regions.to(level.dtype), pool, 1 / stride, points, aligned)
    indices, shares, order = [], [], []
    groups, group = counts.long().unique(dim=0, return_inverse=True)
    for i, (across, down) in enumerate(groups.tolist()):
        here = torch.where(group == i)[0]
        columns = _axis(start[here, 0], sides[here, 0], level.shape[3], pool, across)
        rows = _axis(start[here, 1], sides[here, 1], level.shape[2], pool, down)
        index, share = _bins(regions[here, 0].long(), rows, columns, level.shape[2:])
        indices.append(index)
        shares.append(share)
        order.append(here)
    table = level.permute(0, 2, 3, 1).flatten(0, 2)  # (B*H*W, C), free where channels are last in memory
    lengths = torch.cat([torch.full((len(index),), index.shape[1]) for index in indices])
    bins = F.embedding_bag(
        torch.cat([index.flatten() for index in indices]),
        table,
        lengths.cumsum(0) - lengths,
        mode="sum",
        per_sample_weights=torch.cat([share.flatten() for share in shares]).to(table.dtype),
    )
    bins = bins.reshape(len(regions), pool, pool, -1)
    if len(groups) > 1:
        bins = torch.empty_like(bins).index_copy(0, torch.cat(order), bins)
    return bins.permute(0, 3, 1, 2)


Axis = tuple[Tensor, Tensor]  # the cells that each bin looks at, and their shares of it: both (R, pool, 2*points)


def _axis(start: Tensor, side: Tensor, length: int, pool: int, points: int) -> Axis:
    """Of regions along one axis of a map, `start` and `side` (R,) in cells.

    A point takes linearly from the two cells beside it; points over a cell outside the map count as zero.
    """
    steps = (torch.arange(pool * points) + 0.5) / (pool * points)
    at = start[:, None] + steps * side[:, None]  # (R, pool*points)
    inside = (at >= -1) & (at <= length)
    at = at.clamp(0, length - 1)
    low = at.floor()
    high_share = at - low
    cells = torch.stack([low, (low + 1).clamp(max=length - 1)], dim=-1).long()  # (R, pool*points, 2)
    shares = torch.stack([1 - high_share, high_share], dim=-1) * inside[..., None] / points
    return cells.reshape(len(start), pool, -1), shares.reshape(len(start), pool, -1)


def _bins(image: Tensor, rows: Axis, columns: Axis, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """For each bin the rows of the flattened maps that it adds up, and their shares: both (R*pool*pool, cells)."""
    H, W = size
    first = (image * (H * W)).reshape(-1, 1, 1, 1, 1)
    index = first + rows[0][:, :, None, :, None] * W + columns[0][:, None, :, None, :]  # (R, P, P, 2*down, 2*across)
    share = rows[1][:, :, None, :, None] * columns[1][:, None, :, None, :]
    return index.flatten(3).flatten(0, 2), share.flatten(3).flatten(0, 2)
