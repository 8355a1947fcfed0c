"""FCOS on any pyramid: every cell of every level says what stands on it, and how far its edges are.

Tian et al., 2019 (arXiv:1904.01355) with centre sampling, GIoU loss and normalised distances, and the losses and
state-dict keys of torchvision: with the same weights both give the same boxes and losses. Added to it: strides that are
known rather than guessed from rounded sizes, and ignore regions (objects marked `difficult` neither attract nor repel).
The class logits have a row for each foreground class and none besides, where torchvision's have an unused one for its
class 0: `published_tensors` takes it out of files that torchvision published.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from boxwright.models.detectors.boxes import Truth, shares, take
from boxwright.models.detectors.dense import Branch, DenseDetector, Level, classification_branch
from boxwright.models.pyramid import Maps, group_norm
from boxwright.models.winograd import Conv
from boxwright.types import Size

REACH = (4, 8)  # strides from a cell to the farthest edge of its object; the first and last level have no such bound


class FCOS(DenseDetector):
    """Backbone → class scores, edges and centre-ness of every cell.

    Losses: loss_classifier (focal), loss_box_reg (GIoU), loss_centerness (cross-entropy), each its sum by
    the number of cells that belong to an object, picture by picture as in RetinaNet.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: FCOSHead,
        *,
        strides: Iterable[int],
        centre_radius: float = 1.5,  # strides from the middle of its object that a cell may lie
        score_threshold: float = 0.2,
        nms_threshold: float = 0.6,
        detections_per_image: int = 100,
    ) -> None:
        super().__init__(
            backbone,
            head,
            strides=list(strides),
            num_classes=head.num_classes,
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            detections_per_image=detections_per_image,
        )
        self.centre_radius = centre_radius

    def losses_of(self, maps: Maps, sizes: Sequence[Size], truths: Sequence[Truth]) -> dict[str, Tensor]:
        looks = zip(*(self.head(maps[stride]) for stride in self.strides), strict=True)
        logits, edges, centerness = (torch.cat(levels, dim=1) for levels in looks)  # (B, N, K), (B, N, 4), (B, N)
        cells = torch.cat(self._cells(maps))  # (N, 3)
        labels, boxes = (torch.stack(v) for v in zip(*(self._match(cells, t) for t in truths), strict=True))
        positive, counted = labels > 0, labels >= 0  # (B, N)
        wanted = torch.zeros_like(logits)
        wanted[positive, labels[positive] - 1] = 1
        cells = cells.expand(len(truths), -1, -1)[positive]  # (P, 3)
        boxes = boxes[positive]
        share = shares(positive.sum(dim=1))[:, None].expand_as(labels)  # (B, N): of its picture
        classification = sigmoid_focal_loss(logits[counted], wanted[counted]).sum(-1)
        regression = generalized_box_iou_loss(self.decode(edges[positive], cells), boxes)
        centre = F.binary_cross_entropy_with_logits(centerness[positive], _centerness(cells, boxes), reduction="none")
        return {
            "loss_classifier": (classification * share[counted]).sum(),
            "loss_box_reg": (regression * share[positive]).sum(),
            "loss_centerness": (centre * share[positive]).sum(),
        }

    def score(self, maps: Maps) -> list[Level]:
        levels: list[Level] = []
        for stride, cells in zip(self.strides, self._cells(maps), strict=True):
            logits, edges, centerness = self.head(maps[stride])
            levels.append(((logits.sigmoid() * centerness.sigmoid()[..., None]).sqrt(), edges, cells))
        return levels

    def decode(self, codes: Tensor, places: Tensor) -> Tensor:
        """Distances (N, 4) in strides from cells (N, 3) of x, y and stride → boxes (N, 4)."""
        points, strides = places[:, :2], places[:, 2:]
        return torch.cat([points - codes[:, :2] * strides, points + codes[:, 2:] * strides], dim=1)

    def _cells(self, maps: Maps) -> list[Tensor]:
        """For each level x, y and stride of its cells in pixels, (h*w, 3)."""
        cells = []
        for stride in self.strides:
            h, w = maps[stride].shape[-2:]
            y, x = (torch.arange(n, dtype=torch.float32, device=maps[stride].device) * stride for n in (h, w))
            y, x = torch.meshgrid(y, x, indexing="ij")
            cells.append(torch.stack([x, y, torch.full_like(x, stride)], dim=-1).flatten(0, 1))
        return cells

    def _match(self, cells: Tensor, truth: Truth) -> tuple[Tensor, Tensor]:
        """For each cell its label + 1, 0 for background, -1 for neither; and the box it is to become, (N, 4).

        Of the objects that a cell may belong to it takes the smallest. Background inside an ignored region is neither.
        """
        match = self._smallest_object(cells, truth.boxes)
        ignored = (_to_edges(cells, truth.ignored).amin(dim=-1) > 0).any(dim=1)  # (N,)
        labels = torch.where(match >= 0, take(truth.labels, match) + 1, -ignored.long())
        return labels, take(truth.boxes, match)

    def _smallest_object(self, cells: Tensor, boxes: Tensor) -> Tensor:
        """For each cell the index of its object, -1 for none: (N,)."""
        if len(boxes) == 0:
            return torch.full((len(cells),), -1, device=cells.device)
        edges = _to_edges(cells, boxes)  # (N, M, 4)
        strides = cells[:, 2:]  # (N, 1)
        off_centre = (edges[..., :2] - edges[..., 2:]).abs().amax(dim=-1) / 2  # (N, M), of the farther axis
        farthest = edges.amax(dim=-1)
        nearest, coarsest = REACH[0] * strides, REACH[1] * strides
        nearest = nearest.masked_fill(strides == self.strides[0], 0)
        coarsest = coarsest.masked_fill(strides == self.strides[-1], torch.inf)
        fits = (edges.amin(dim=-1) > 0) & (off_centre < self.centre_radius * strides)
        fits &= (farthest > nearest) & (farthest < coarsest)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        smallest = areas.expand_as(fits).masked_fill(~fits, torch.inf).min(dim=1)
        return torch.where(smallest.values.isinf(), -1, smallest.indices)


class FCOSHead(nn.Module):
    """Two towers of four 3x3 convolutions with GroupNorm over each level: for the classes, and for edges and centre."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.channels = channels
        self.num_classes = num_classes
        self.classification_head = classification_branch(channels, _tower(channels), num_classes)
        self.regression_head = Branch(channels, _tower(channels), bbox_reg=4, bbox_ctrness=1)

    def forward(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, h, w) → logits (B, h*w, K), edges (B, h*w, 4) in strides and centre-ness (B, h*w), in float32."""
        (logits,) = self.classification_head(level)
        edges, centerness = self.regression_head(level)
        return logits, F.relu(edges), centerness.squeeze(-1)


def _tower(channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [Conv(channels, channels, 3), group_norm(channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _to_edges(cells: Tensor, boxes: Tensor) -> Tensor:
    """From each cell (N, 3) to the left, top, right and bottom edge of each box (M, 4), pixels: (N, M, 4)."""
    points = cells[:, None, :2]
    return torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], dim=-1)


def _centerness(cells: Tensor, boxes: Tensor) -> Tensor:
    """1 in the middle of its box, 0 on an edge (FCOS, equation 3): cells (P, 3) and their boxes (P, 4) → (P,)."""
    edges = torch.cat([cells[:, :2] - boxes[:, :2], boxes[:, 2:] - cells[:, :2]], dim=1)
    pairs = edges.unflatten(1, (2, 2))  # (P, 2, 2): left top, right bottom
    return (pairs.amin(dim=1) / pairs.amax(dim=1)).prod(dim=1).sqrt()
