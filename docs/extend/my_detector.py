"""A detection module of your own: `boxwright train --plugin docs/extend/my_detector.py --model my_detector ...`.

The smallest that works: every cell of three levels says what stands on it and where the object's edges are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from boxwright.models.detectors.base import Detector, Found, require_levels
from boxwright.models.detectors.boxes import Truth
from boxwright.models.join import join
from boxwright.models.pyramid import Maps
from boxwright.registry import register
from boxwright.types import Size

LEVELS = (8, 16, 32)


class Cells(Detector):
    """One class and one box a cell."""

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__(backbone)
        width = backbone.channels[LEVELS[0]]
        require_levels(backbone, LEVELS, width, "my detector")
        self.num_classes = num_classes
        self.logits = nn.Conv2d(width, num_classes, 3, padding=1)
        self.edges = nn.Conv2d(width, 4, 3, padding=1)  # distances to left, top, right, bottom in strides, as logs
        nn.init.constant_(self.logits.bias, -4.0)  # at first nearly every cell is empty

    def losses_of(self, maps: Maps, sizes: Sequence[Size], truths: Sequence[Truth]) -> dict[str, Tensor]:
        logits, boxes, centres, strides = self._read(maps)
        wanted = torch.zeros_like(logits)
        regression = 0 * boxes.sum()
        for i, truth in enumerate(truths):
            for box, label in zip(truth.boxes, truth.labels, strict=True):
                middle, side = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]).mean()
                away = (centres - middle).norm(dim=-1) / strides + (side / (4 * strides)).log2().abs()
                cell = away.argmin()  # near to the middle, of a level about as coarse as the object is large
                wanted[i, cell, label] = 1
                regression = regression + F.smooth_l1_loss(boxes[i, cell] / side, box / side)
        count = max(sum(len(truth.boxes) for truth in truths), 1)
        classification = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
        return {"loss_cells": classification / count, "loss_edges": regression / count}

    def detect(self, maps: Maps, sizes: Sequence[Size]) -> Found:
        logits, boxes, _, _ = self._read(maps)
        found = []
        for picture, box, size in zip(logits.sigmoid(), boxes, sizes, strict=True):
            scores, labels = picture.max(dim=-1)
            box = clip_boxes_to_image(box, size)
            kept = torch.where(scores > 0.05)[0]
            kept = kept[batched_nms(box[kept], scores[kept], labels[kept], 0.5)][:100]
            found.append((box[kept], scores[kept], labels[kept]))
        return found

    def work(self, maps: Maps) -> None:
        self._read(maps)

    def _read(self, maps: Maps) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of all T cells: logits (B, T, K), boxes (B, T, 4), and their centres (T, 2) and strides (T,), in pixels."""
        parts = []
        for stride in LEVELS:
            level = maps[stride]
            h, w = level.shape[-2:]
            y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            centres = (torch.stack([x, y], -1).flatten(0, 1).to(level.device) + 0.5) * stride
            logits = self.logits(level).flatten(2).transpose(1, 2).float()
            reach = self.edges(level).flatten(2).transpose(1, 2).float().clamp(max=5).exp() * stride
            boxes = torch.cat([centres - reach[..., :2], centres + reach[..., 2:]], dim=-1)
            parts.append((logits, boxes, centres, torch.full_like(centres[:, 0], stride)))
        logits, boxes, centres, strides = zip(*parts, strict=True)
        return torch.cat(logits, 1), torch.cat(boxes, 1), torch.cat(centres), torch.cat(strides)


@register("my_detector")
def my_detector(*, num_classes: int, backbone: str | nn.Module = "torchvision:resnet18", pyramid: str | None = None):
    """A class and a box for every cell of three levels."""
    return Cells(join(backbone, pyramid, width=64, levels=LEVELS, extra=None), num_classes)
