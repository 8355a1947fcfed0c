"""Faster R-CNN on any pyramid: proposals from every level, then a box head over pooled regions.

Ren et al., 2015 (arXiv:1506.01497), with the anchors, matching, sampling and losses of torchvision, whose state-dict
keys and numbers it keeps: with the same weights and random numbers both give the same boxes and losses. Added to it:
strides that are known rather than guessed from rounded sizes, and ignore regions (objects marked `difficult` neither
attract nor repel). The background class exists in this file only: inside, 0 is background and label k is k + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from boxwright.models.detectors.base import Detector, Found, require_levels
from boxwright.models.detectors.boxes import Anchors, Truth, decode, encode, ignore_inside, match_boxes, sample, take
from boxwright.models.detectors.pooling import align_regions
from boxwright.models.pyramid import Maps
from boxwright.types import Size


class FasterRCNN(Detector):
    """Backbone → region proposals → classified, refined boxes, at most `detections_per_image` of them.

    Losses: loss_classifier, loss_box_reg, loss_objectness, loss_rpn_box_reg.
    """

    def __init__(self, backbone: nn.Module, rpn: RegionProposals, roi_heads: BoxHeads) -> None:
        super().__init__(backbone)
        require_levels(backbone, rpn.anchors.strides, rpn.head.channels, "the region proposal network")
        require_levels(backbone, roi_heads.strides, rpn.head.channels, "the box head")
        self.rpn = rpn
        self.roi_heads = roi_heads
        self.num_classes = roi_heads.num_classes

    def losses_of(self, maps: Maps, sizes: Sequence[Size], truths: Sequence[Truth]) -> dict[str, Tensor]:
        proposals, rpn_losses = self.rpn.losses(maps, sizes, truths)
        return {**self.roi_heads.losses(maps, proposals, truths), **rpn_losses}

    def detect(self, maps: Maps, sizes: Sequence[Size]) -> Found:
        return self.roi_heads.detect(maps, self.rpn.propose(maps, sizes), sizes)

    def work(self, maps: Maps) -> None:
        self.rpn.work(maps)
        self.roi_heads.work(maps, self.rpn.keep_after_nms[1])


class RPNHead(nn.Module):
    """`depth` 3x3 convolutions, then for each anchor one objectness logit and four box deltas."""

    def __init__(self, channels: int, anchors_per_cell: int, depth: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.conv = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()) for _ in range(depth))
        )
        self.cls_logits = nn.Conv2d(channels, anchors_per_cell, kernel_size=1)
        self.bbox_pred = nn.Conv2d(channels, anchors_per_cell * 4, kernel_size=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(cast(Tensor, layer.bias))

    def forward(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) → logits (B, h*w*A) and deltas (B, h*w*A, 4), in float32."""
        x = self.conv(level)
        logits = self.cls_logits(x).permute(0, 2, 3, 1).flatten(1)
        deltas = self.bbox_pred(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4)
        return logits.float(), deltas.float()


class RegionProposals(nn.Module):
    """Scores and refines every anchor and keeps the best as proposals."""

    def __init__(
        self,
        head: RPNHead,
        anchors: Anchors,
        *,
        keep_before_nms: tuple[int, int] = (2000, 1000),  # a level; training, prediction
        keep_after_nms: tuple[int, int] = (2000, 1000),  # an image
        nms_threshold: float = 0.7,
        positive_overlap: float = 0.7,
        negative_overlap: float = 0.3,
        samples: int = 256,
        positive_fraction: float = 0.5,
    ) -> None:
        super().__init__()
        self.head = head
        self.anchors = anchors
        self.keep_before_nms = keep_before_nms
        self.keep_after_nms = keep_after_nms
        self.nms_threshold = nms_threshold
        self.positive_overlap = positive_overlap
        self.negative_overlap = negative_overlap
        self.samples = samples
        self.positive_fraction = positive_fraction

    def propose(self, maps: Maps, sizes: Sequence[Size]) -> list[Tensor]:
        """For each picture its proposals (P, 4), best first."""
        logits, deltas, anchors = self._score(maps)
        return self._select(logits, deltas, anchors, sizes)

    def losses(
        self, maps: Maps, sizes: Sequence[Size], truths: Sequence[Truth]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals, and the losses of the head that made them."""
        logits, deltas, anchors = self._score(maps)
        with torch.no_grad():
            proposals = self._select(logits, deltas, anchors, sizes)
        everywhere = torch.cat(anchors)  # (A, 4)
        matches = [self._match(everywhere, truth) for truth in truths]
        picked = [sample(labels, self.samples, self.positive_fraction) for labels, _ in matches]
        logits, deltas = torch.cat(logits, dim=1), torch.cat(deltas, dim=1)  # (B, A), (B, A, 4)
        of_logits, targets, of_deltas, delta_targets = [], [], [], []
        for i, ((labels, matched), (positive, negative)) in enumerate(zip(matches, picked, strict=True)):
            both = torch.cat([positive, negative])
            of_logits.append(logits[i, both])
            targets.append(labels[both].float())
            of_deltas.append(deltas[i, positive])
            delta_targets.append(encode(matched[positive], everywhere[positive], (1, 1, 1, 1)))
        count = max(sum(len(t) for t in targets), 1)
        objectness = F.binary_cross_entropy_with_logits(torch.cat(of_logits), torch.cat(targets), reduction="sum")
        regression = F.smooth_l1_loss(torch.cat(of_deltas), torch.cat(delta_targets), beta=1 / 9, reduction="sum")
        return proposals, {"loss_objectness": objectness / count, "loss_rpn_box_reg": regression / count}

    def work(self, maps: Maps) -> None:
        """The layers of a proposal, for counting."""
        for stride in self.anchors.strides:
            self.head(maps[stride])

    def _score(self, maps: Maps) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        logits, deltas = zip(*(self.head(maps[stride]) for stride in self.anchors.strides), strict=True)
        return list(logits), list(deltas), self.anchors(maps)

    def _match(self, anchors: Tensor, truth: Truth) -> tuple[Tensor, Tensor]:
        """For each anchor 1 object, 0 background, -1 neither; and the box it is to become, (A, 4)."""
        match = match_boxes(truth.boxes, anchors, self.positive_overlap, self.negative_overlap, keep_best_of_each=True)
        labels = torch.where(match >= 0, 1, match.clamp(min=-2) + 1)  # -1 background → 0, -2 between → -1
        labels = ignore_inside(labels, anchors, truth.ignored, self.negative_overlap)
        return labels, take(truth.boxes, match)

    def _select(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Sequence[Tensor],
        sizes: Sequence[Size],
    ) -> list[Tensor]:
        mode = 0 if self.training else 1
        boxes, scores, levels = [], [], []
        for level, (logit, delta, anchor) in enumerate(zip(logits, deltas, anchors, strict=True)):
            top = logit.topk(min(self.keep_before_nms[mode], logit.shape[1]), dim=1)
            delta = delta.detach().gather(1, top.indices[..., None].expand(-1, -1, 4))
            boxes.append(decode(delta, anchor[top.indices], (1, 1, 1, 1)))  # (B, k, 4)
            scores.append(top.values.detach().sigmoid())
            levels.append(torch.full_like(top.indices, level))
        chosen = []
        for box, score, level, size in zip(
            torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(levels, 1), sizes, strict=True
        ):
            box = clip_boxes_to_image(box, size)
            kept = remove_small_boxes(box, 1e-3)
            box, score, level = box[kept], score[kept], level[kept]
            kept = batched_nms(box, score, level, self.nms_threshold)[: self.keep_after_nms[mode]]
            chosen.append(box[kept])
        return chosen


class TwoLayerHead(nn.Module):
    """Pooled regions (R, C, P, P) → (R, width) through two linear layers."""

    def __init__(self, channels: int, pool: int = 7, width: int = 1024) -> None:
        super().__init__()
        self.width = width
        self.fc6 = nn.Linear(channels * pool * pool, width)
        self.fc7 = nn.Linear(width, width)

    def forward(self, regions: Tensor) -> Tensor:
        return F.relu(self.fc7(F.relu(self.fc6(regions.flatten(1)))))


class ConvHead(nn.Sequential):
    """Four 3x3 convolutions with BatchNorm and one linear layer, as torchvision's `fasterrcnn_resnet50_fpn_v2`."""

    def __init__(self, channels: int, pool: int = 7, width: int = 1024, convs: int = 4) -> None:
        blocks = [
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
            for _ in range(convs)
        ]
        super().__init__(*blocks, nn.Flatten(), nn.Linear(channels * pool * pool, width), nn.ReLU())
        self.width = width
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


class BoxPredictor(nn.Module):
    """(R, width) → class logits (R, K+1) and, for each class, box deltas (R, (K+1)*4)."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, num_classes + 1)
        self.bbox_pred = nn.Linear(width, (num_classes + 1) * 4)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(features).float(), self.bbox_pred(features).float()


class BoxHeads(nn.Module):
    """Pools each proposal from the level of its size, classifies it and refines its box once for each class."""

    def __init__(
        self,
        box_head: TwoLayerHead | ConvHead,
        *,
        num_classes: int,
        strides: Sequence[int],
        pool: int = 7,
        foreground_overlap: float = 0.5,
        samples: int = 512,
        positive_fraction: float = 0.25,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections_per_image: int = 100,
    ) -> None:
        super().__init__()
        self.box_head = box_head
        self.box_predictor = BoxPredictor(box_head.width, num_classes)
        self.num_classes = num_classes
        self.strides = sorted(strides)
        self.pool = pool
        self.foreground_overlap = foreground_overlap
        self.samples = samples
        self.positive_fraction = positive_fraction
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.detections_per_image = detections_per_image

    def losses(self, maps: Maps, proposals: Sequence[Tensor], truths: Sequence[Truth]) -> dict[str, Tensor]:
        chosen, labels, targets = [], [], []
        with torch.no_grad():
            matches = [self._match(p, t) for p, t in zip(proposals, truths, strict=True)]
            for candidates, label, matched in matches:
                # In the candidates' own order, positives and negatives mixed, as torchvision's sampler returns them.
                picked = torch.cat(sample(label, self.samples, self.positive_fraction)).sort().values
                chosen.append(candidates[picked])
                labels.append(label[picked])
                targets.append(encode(matched[picked], candidates[picked], (10, 10, 5, 5)))
        logits, deltas = self._classify(maps, chosen)
        label, target = torch.cat(labels), torch.cat(targets)  # (R,), (R, 4)
        positive = torch.where(label > 0)[0]
        own = deltas.reshape(len(label), -1, 4)[positive, label[positive]]  # (P, 4): the deltas of its own class
        count = max(len(label), 1)
        return {
            "loss_classifier": F.cross_entropy(logits, label, reduction="sum") / count,
            "loss_box_reg": F.smooth_l1_loss(own, target[positive], beta=1 / 9, reduction="sum") / count,
        }

    def detect(self, maps: Maps, proposals: Sequence[Tensor], sizes: Sequence[Size]) -> Found:
        """For each picture boxes (N, 4), scores (N,) and labels (N,) from 0, best first."""
        logits, deltas = self._classify(maps, proposals)
        boxes = decode(deltas.reshape(len(logits), -1, 4), torch.cat(list(proposals))[:, None], (10, 10, 5, 5))
        counts = [len(p) for p in proposals]
        scores = logits.softmax(-1)  # (R, K+1)
        return [
            self._best(box[:, 1:], score[:, 1:], size)
            for box, score, size in zip(boxes.split(counts), scores.split(counts), sizes, strict=True)
        ]

    def work(self, maps: Maps, regions: int) -> None:
        """The layers over so many regions, for counting."""
        level = maps[self.strides[0]]
        self.box_predictor(self.box_head(level.new_zeros(regions, level.shape[1], self.pool, self.pool)))

    def _best(self, boxes: Tensor, scores: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor]:
        labels = torch.arange(self.num_classes, device=scores.device).expand_as(scores)
        boxes = clip_boxes_to_image(boxes, size).reshape(-1, 4)
        scores, labels = scores.flatten(), labels.flatten()
        kept = torch.where(scores > self.score_threshold)[0]
        kept = kept[remove_small_boxes(boxes[kept], 1e-2)]
        kept = kept[batched_nms(boxes[kept], scores[kept], labels[kept], self.nms_threshold)]
        kept = kept[: self.detections_per_image]
        return boxes[kept], scores[kept], labels[kept]

    def _match(self, proposals: Tensor, truth: Truth) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates (R, 4), the objects among them; their labels, -1 for neither; the boxes meant, (R, 4)."""
        candidates = torch.cat([proposals, truth.boxes])
        overlap = self.foreground_overlap
        match = match_boxes(truth.boxes, candidates, overlap, overlap, keep_best_of_each=False)
        labels = torch.where(match >= 0, take(truth.labels, match) + 1, 0)
        return (
            candidates,
            ignore_inside(labels, candidates, truth.ignored, overlap),
            take(truth.boxes, match),
        )

    def _classify(self, maps: Maps, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        regions = pool_regions(maps, boxes, self.strides, self.pool)  # (R, C, P, P)
        return self.box_predictor(self.box_head(regions))


def pool_regions(maps: Maps, boxes: Sequence[Tensor], strides: Sequence[int], pool: int) -> Tensor:
    """Each box's features from the level of its size: (R, C, pool, pool), R boxes of all pictures in order.

    A box of 224 x 224 px is pooled from stride 16, one of half the side from stride 8, and so on (FPN, equation 1).
    """
    image = torch.cat([torch.full((len(b), 1), i, dtype=b.dtype, device=b.device) for i, b in enumerate(boxes)])
    regions = torch.cat([image, torch.cat(list(boxes))], dim=1)  # (R, 5)
    sides = ((regions[:, 3] - regions[:, 1]) * (regions[:, 4] - regions[:, 2])).sqrt()
    lowest, highest = strides[0].bit_length() - 1, strides[-1].bit_length() - 1
    level = (4 + (sides / 224).log2() + 1e-6).floor().clamp(lowest, highest)
    pooled, order = [], []
    for stride in strides:
        here = torch.where(level == stride.bit_length() - 1)[0]
        pooled.append(align_regions(maps[stride], regions[here], pool, stride))
        order.append(here)
    features = torch.cat(pooled)
    return torch.empty_like(features).index_copy(0, torch.cat(order), features)
