"""RetinaNet on any pyramid: every anchor of every level classified and refined, trained with the focal loss.

Lin et al., 2017 (arXiv:1708.02002), with the anchors, matching, losses and state-dict keys of torchvision: with the
same weights both give the same boxes and losses. Added to it: strides that are known rather than guessed from rounded
sizes, and ignore regions (objects marked `difficult` neither attract nor repel). The class logits have a row for each
foreground class and none besides, where torchvision's have an unused one for its class 0: `published_tensors` takes
it out of files that torchvision published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from boxwright.models.detectors.boxes import Anchors, Truth, decode, encode, ignore_inside, match_boxes, take
from boxwright.models.detectors.dense import Branch, DenseDetector, Level, classification_branch
from boxwright.models.pyramid import Maps
from boxwright.models.winograd import Conv
from boxwright.types import Size

WEIGHTS = (1, 1, 1, 1)  # of box deltas


class RetinaNet(DenseDetector):
    """Backbone → class scores and box deltas of every anchor.

    Losses: loss_classifier (focal), loss_box_reg (L1 of the deltas, or GIoU of the boxes), each the mean over pictures
    of its sum by the number of anchors that belong to an object.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: RetinaNetHead,
        anchors: Anchors,
        *,
        box_loss: Literal["l1", "giou"] = "l1",
        positive_overlap: float = 0.5,
        negative_overlap: float = 0.4,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections_per_image: int = 300,
    ) -> None:
        super().__init__(
            backbone,
            head,
            strides=anchors.strides,
            num_classes=head.num_classes,
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            detections_per_image=detections_per_image,
        )
        self.anchors = anchors
        self.box_loss = box_loss
        self.positive_overlap = positive_overlap
        self.negative_overlap = negative_overlap

    def losses_of(self, maps: Maps, sizes: Sequence[Size], truths: Sequence[Truth]) -> dict[str, Tensor]:
        logits, deltas = (torch.cat(levels, dim=1) for levels in zip(*self._look(maps), strict=True))
        anchors = torch.cat(self.anchors(maps))  # (N, 4)
        each = [
            self._losses_of_one(logit, delta, anchors, truth)
            for logit, delta, truth in zip(logits, deltas, truths, strict=True)
        ]
        classification, regression = (torch.stack(losses).mean() for losses in zip(*each, strict=True))
        return {"loss_classifier": classification, "loss_box_reg": regression}

    def score(self, maps: Maps) -> list[Level]:
        looks = zip(self._look(maps), self.anchors(maps), strict=True)
        return [(logits.sigmoid(), deltas, anchors) for (logits, deltas), anchors in looks]

    def decode(self, codes: Tensor, places: Tensor) -> Tensor:
        return decode(codes, places, WEIGHTS)

    def _look(self, maps: Maps) -> list[tuple[Tensor, Tensor]]:
        """Logits (B, N, K) and deltas (B, N, 4) of each level."""
        return [self.head(maps[stride]) for stride in self.strides]

    def _losses_of_one(self, logits: Tensor, deltas: Tensor, anchors: Tensor, truth: Truth) -> tuple[Tensor, Tensor]:
        """Of one picture: logits (N, K), deltas (N, 4) and anchors (N, 4) → the two losses."""
        labels, matched = self._match(anchors, truth)
        positive, counted = torch.where(labels > 0)[0], labels >= 0
        wanted = torch.zeros_like(logits)
        wanted[positive, labels[positive] - 1] = 1
        classification = sigmoid_focal_loss(logits[counted], wanted[counted], reduction="sum")
        regression = self._box_loss(deltas[positive], anchors[positive], matched[positive])
        count = max(len(positive), 1)
        return classification / count, regression / count

    def _box_loss(self, deltas: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        if self.box_loss == "giou":
            return generalized_box_iou_loss(decode(deltas, anchors, WEIGHTS), boxes, reduction="sum")
        return F.l1_loss(deltas, encode(boxes, anchors, WEIGHTS), reduction="sum")

    def _match(self, anchors: Tensor, truth: Truth) -> tuple[Tensor, Tensor]:
        """For each anchor its label + 1, 0 for background, -1 for neither; and the box it is to become, (N, 4)."""
        match = match_boxes(truth.boxes, anchors, self.positive_overlap, self.negative_overlap, keep_best_of_each=True)
        labels = torch.where(match >= 0, take(truth.labels, match) + 1, match.clamp(min=-2) + 1)  # -1 → 0, -2 → -1
        return ignore_inside(labels, anchors, truth.ignored, self.negative_overlap), take(truth.boxes, match)


class RetinaNetHead(nn.Module):
    """Two towers of four 3x3 convolutions over each level: one for the classes, one for the boxes."""

    def __init__(
        self, channels: int, anchors_per_cell: int, num_classes: int, norm: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.channels = channels
        self.num_classes = num_classes
        self.classification_head = classification_branch(
            channels, _tower(channels, norm), anchors_per_cell * num_classes
        )
        self.regression_head = Branch(channels, _tower(channels, norm), bbox_reg=anchors_per_cell * 4)

    def forward(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) → class logits (B, h*w*A, K) and box deltas (B, h*w*A, 4), in float32."""
        (logits,), (deltas,) = self.classification_head(level), self.regression_head(level)
        B = len(level)
        return logits.reshape(B, -1, self.num_classes), deltas.reshape(B, -1, 4)


def _tower(channels: int, norm: Callable[[int], nn.Module] | None) -> nn.Sequential:
    def block() -> nn.Sequential:
        convolution = Conv(channels, channels, 3, bias=norm is None)
        return nn.Sequential(convolution, *([norm(channels)] if norm else []), nn.ReLU(inplace=True))

    return nn.Sequential(*(block() for _ in range(4)))


def anchors_for(strides: Iterable[int]) -> Anchors:
    """Nine anchors a cell: sides of 4 strides times 1, 2^(1/3) and 2^(2/3), whole pixels as torchvision has them."""
    return Anchors({stride: [float(int(4 * stride * 2 ** (i / 3))) for i in range(3)] for stride in strides})
