"""What detection heads share: objects, anchors, and which box belongs to which object.

The numbers are torchvision's, so that its published weights keep their meaning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from boxwright.models.pyramid import Maps

DELTA_CLAMP = math.log(1000.0 / 16)  # a box may grow at most this much; torchvision's bound against overflow

FPN_ANCHORS = {4: [32.0], 8: [64.0], 16: [128.0], 32: [256.0], 64: [512.0]}  # stride: side, Lin et al., 2017


class Truth:
    """What is in one picture: boxes (N, 4), labels (N,) from 0, and regions (M, 4) that count as nothing.

    `generator` is what is drawn from for this picture, PyTorch's global one if None.
    """

    def __init__(
        self, boxes: Tensor, labels: Tensor, ignored: Tensor, generator: torch.Generator | None = None
    ) -> None:
        self.boxes, self.labels, self.ignored, self.generator = boxes, labels, ignored, generator


class Anchors(nn.Module):
    """The same boxes around every cell of a level, largest side ratio first as in torchvision.

    `sizes` gives each stride its anchor sizes in pixels; every size comes in every `ratio` (height / width). Edges are
    `rounded` to whole pixels around the cell's corner, as torchvision's weights expect; detectron2's are not.
    """

    def __init__(
        self,
        sizes: Mapping[int, Sequence[float]],
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        *,
        rounded: bool = True,
    ) -> None:
        super().__init__()
        self.strides = sorted(sizes)
        counts = {len(sizes[stride]) for stride in self.strides}
        assert len(counts) == 1, "every level needs the same number of anchors"
        self.per_cell = counts.pop() * len(ratios)
        cells = {stride: _cell_anchors(sizes[stride], ratios) for stride in self.strides}
        self.cells = {stride: cell.round() if rounded else cell for stride, cell in cells.items()}

    def forward(self, maps: Maps) -> list[Tensor]:
        """One (h*w*A, 4) tensor a level, finest first, in the order of the head's outputs."""
        return [self._level(stride, maps[stride]) for stride in self.strides]

    def _level(self, stride: int, level: Tensor) -> Tensor:
        h, w = level.shape[-2:]
        y = torch.arange(h, dtype=torch.float32, device=level.device) * stride
        x = torch.arange(w, dtype=torch.float32, device=level.device) * stride
        y, x = torch.meshgrid(y, x, indexing="ij")
        shifts = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
        return (shifts + self.cells[stride].to(level.device)).reshape(-1, 4)


def _cell_anchors(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    h_ratio = torch.tensor(ratios).sqrt()
    w_ratio = 1 / h_ratio
    ws = (w_ratio[:, None] * torch.tensor(sizes)[None, :]).flatten()
    hs = (h_ratio[:, None] * torch.tensor(sizes)[None, :]).flatten()
    return torch.stack([-ws, -hs, ws, hs], dim=1) / 2  # (A, 4)


def match_boxes(truth: Tensor, boxes: Tensor, high: float, low: float, *, keep_best_of_each: bool) -> Tensor:
    """For each box the index of the object it belongs to, -1 for none, -2 for neither yes nor no: (R,).

    At an overlap (IoU) of at least `high` a box belongs to the object it overlaps most, below `low` to none. With
    `keep_best_of_each` the boxes that overlap an object most belong to something, however little it is.
    """
    if len(truth) == 0:
        return torch.full((len(boxes),), -1, dtype=torch.int64, device=boxes.device)
    overlaps = box_iou(truth, boxes)  # (N, R)
    best, match = overlaps.max(dim=0)
    decided = torch.where(best >= high, match, torch.where(best < low, -1, -2))
    if keep_best_of_each:
        champions = torch.where(overlaps == overlaps.amax(dim=1, keepdim=True))[1]
        decided[champions] = match[champions]
    return decided


def ignore_inside(labels: Tensor, boxes: Tensor, regions: Tensor, overlap: float) -> Tensor:
    """Labels with the background boxes that overlap an ignored region turned to -1, which is never sampled."""
    if len(regions) == 0:
        return labels
    touched = box_iou(regions, boxes).amax(dim=0) >= overlap
    return torch.where((labels == 0) & touched, -1, labels)


def sample(
    labels: Tensor, count: int, positive_fraction: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Random indices of at most `count * positive_fraction` positives, and negatives to make up `count`."""
    positive = torch.where(labels >= 1)[0]
    negative = torch.where(labels == 0)[0]
    positives = min(len(positive), int(count * positive_fraction))
    negatives = min(len(negative), count - positives)
    # One draw each, of the whole length, so that the same generator gives the samples that torchvision would take.
    chosen = torch.randperm(len(positive), generator=generator, device=labels.device)[:positives]
    rejected = torch.randperm(len(negative), generator=generator, device=labels.device)[:negatives]
    return positive[chosen], negative[rejected]


def shares(counts: Sequence[int] | Tensor) -> Tensor:
    """What each sample of a picture counts, so that a sum over samples is a mean over pictures of their means: (B,).

    Pictures count the same however many samples they have: the losses of a batch are those of its parts, averaged.
    """
    return 1 / (torch.as_tensor(counts).clamp(min=1) * len(counts))


def encode(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """Boxes (R, 4) as deltas from their anchors (R, 4): shift in anchor sides, log of the scale, times `weights`."""
    x, y, w, h = _centre_and_side(anchors)
    bx, by, bw, bh = _centre_and_side(boxes)
    wx, wy, ww, wh = weights
    return torch.stack([wx * (bx - x) / w, wy * (by - y) / h, ww * torch.log(bw / w), wh * torch.log(bh / h)], dim=-1)


def decode(deltas: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """The inverse of `encode`: deltas (..., 4) on anchors (..., 4) → boxes (..., 4)."""
    x, y, w, h = _centre_and_side(anchors)
    wx, wy, ww, wh = weights
    dx, dy, dw, dh = deltas.unbind(-1)
    cx, cy = dx / wx * w + x, dy / wy * h + y
    half_w = torch.exp((dw / ww).clamp(max=DELTA_CLAMP)) * w / 2
    half_h = torch.exp((dh / wh).clamp(max=DELTA_CLAMP)) * h / 2
    return torch.stack([cx - half_w, cy - half_h, cx + half_w, cy + half_h], dim=-1)


def _centre_and_side(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(-1)
    w, h = x2 - x1, y2 - y1
    return x1 + w / 2, y1 + h / 2, w, h


def take(values: Tensor, match: Tensor) -> Tensor:
    """values[match], with anything for boxes that match nothing; zeros when there are no values."""
    if len(values) == 0:
        return values.new_zeros(len(match), *values.shape[1:])
    return values[match.clamp(min=0)]
