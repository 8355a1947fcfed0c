"""Faster R-CNN on any pyramid: proposals from every level, then a box head over pooled regions.

Ren et al., 2015 (arXiv:1506.01497), with the anchors, matching, sampling and losses of torchvision, whose state-dict
keys and numbers it keeps: with the same weights and random numbers both give the same boxes and losses. Added to it:
strides that are known rather than guessed from rounded sizes, ignore regions (objects marked `difficult` neither
attract nor repel), and as options what detectron2 does otherwise. The background class exists in this file only:
inside, 0 is background and label k is k + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from boxwright.models.detectors.base import Detector, Found, require_levels
from boxwright.models.detectors.boxes import (
    Anchors,
    Truth,
    decode,
    encode,
    ignore_inside,
    match_boxes,
    sample,
    shares,
    take,
)
from boxwright.models.detectors.pooling import pool_regions
from boxwright.models.pyramid import ChannelNorm, Maps
from boxwright.models.winograd import Conv
from boxwright.types import Size


class RegionHeads(Protocol):
    """What makes detections of proposals."""

    num_classes: int
    strides: list[int]  # of the levels that it looks at

    def losses(
        self, maps: Maps, proposals: Sequence[Tensor], sizes: Sequence[Size], truths: Sequence[Truth]
    ) -> dict[str, Tensor]: ...

    def detect(self, maps: Maps, proposals: Sequence[Tensor], sizes: Sequence[Size]) -> Found: ...

    def work(self, maps: Maps, regions: int) -> None: ...


class FasterRCNN(Detector):
    """Backbone → region proposals → classified, refined boxes, at most `detections_per_image` of them.

    Losses: loss_classifier, loss_box_reg, loss_objectness, loss_rpn_box_reg.
    """

    def __init__(self, backbone: nn.Module, rpn: RegionProposals, roi_heads: RegionHeads) -> None:
        super().__init__(backbone)
        require_levels(backbone, rpn.anchors.strides, rpn.head.channels, "the region proposal network")
        require_levels(backbone, roi_heads.strides, rpn.head.channels, "the box head")
        self.rpn = rpn
        self.roi_heads = roi_heads
        self.num_classes = roi_heads.num_classes

    def losses_of(self, maps: Maps, sizes: Sequence[Size], truths: Sequence[Truth]) -> dict[str, Tensor]:
        proposals, rpn_losses = self.rpn.losses(maps, sizes, truths)
        return {**self.roi_heads.losses(maps, proposals, sizes, truths), **rpn_losses}

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
        self.conv = nn.Sequential(*(nn.Sequential(Conv(channels, channels, 3), nn.ReLU()) for _ in range(depth)))
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
        beta: float = 1 / 9,  # where the regression's loss turns from square to straight; 0 is plain L1
        score_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        self.head = head
        self.score_threshold = score_threshold
        self.anchors = anchors
        self.keep_before_nms = keep_before_nms
        self.keep_after_nms = keep_after_nms
        self.nms_threshold = nms_threshold
        self.positive_overlap = positive_overlap
        self.negative_overlap = negative_overlap
        self.samples = samples
        self.positive_fraction = positive_fraction
        self.beta = beta

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
        picked = [
            sample(labels, self.samples, self.positive_fraction, truth.generator)
            for (labels, _), truth in zip(matches, truths, strict=True)
        ]
        logits, deltas = torch.cat(logits, dim=1), torch.cat(deltas, dim=1)  # (B, A), (B, A, 4)
        of_logits, targets, of_deltas, delta_targets = [], [], [], []
        for i, ((labels, matched), (positive, negative)) in enumerate(zip(matches, picked, strict=True)):
            both = torch.cat([positive, negative])
            of_logits.append(logits[i, both])
            targets.append(labels[both].float())
            of_deltas.append(deltas[i, positive])
            delta_targets.append(encode(matched[positive], everywhere[positive], (1, 1, 1, 1)))
        share = shares([len(t) for t in targets]).to(everywhere)  # (B,)
        of_each = torch.cat([s.expand(len(t)) for s, t in zip(share, targets, strict=True)])  # (S,)
        of_positive = torch.cat([s.expand(len(d)) for s, d in zip(share, of_deltas, strict=True)])  # (P,)
        objectness = F.binary_cross_entropy_with_logits(torch.cat(of_logits), torch.cat(targets), reduction="none")
        regression = F.smooth_l1_loss(torch.cat(of_deltas), torch.cat(delta_targets), beta=self.beta, reduction="none")
        return proposals, {
            "loss_objectness": (objectness * of_each).sum(),
            "loss_rpn_box_reg": (regression.sum(-1) * of_positive).sum(),
        }

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
            kept = kept[score[kept] >= self.score_threshold]
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
    """3x3 convolutions and one linear layer: (R, C, P, P) → (R, width).

    With BatchNorm it is that of torchvision's `fasterrcnn_resnet50_fpn_v2`, with LayerNorm over channels ViTDet's.
    """

    def __init__(
        self,
        channels: int,
        pool: int = 7,
        width: int = 1024,
        convs: int = 4,
        norm: Literal["batch", "layer"] = "batch",
    ) -> None:
        def normed() -> nn.Module:
            return nn.BatchNorm2d(channels) if norm == "batch" else ChannelNorm(channels, eps=1e-6)

        blocks = [
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), normed(), nn.ReLU())
            for _ in range(convs)
        ]
        super().__init__(*blocks, nn.Flatten(), nn.Linear(channels * pool * pool, width), nn.ReLU())
        self.width = width
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


class BoxPredictor(nn.Module):
    """(R, width) → class logits (R, K+1) and box deltas, for each class (R, K+1, 4) or for all (R, 1, 4).

    `small_start` draws weights so small that at first every class is as likely as any other and no box moves
    (Girshick, 2015, arXiv:1504.08083).
    """

    def __init__(
        self, width: int, num_classes: int, *, class_agnostic: bool = False, small_start: bool = False
    ) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, num_classes + 1)
        self.bbox_pred = nn.Linear(width, 4 if class_agnostic else (num_classes + 1) * 4)
        if small_start:
            for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
                nn.init.normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(features).float(), self.bbox_pred(features).float().unflatten(1, (-1, 4))


class Regions(NamedTuple):
    """Boxes to learn from, R in all, and what each should become."""

    boxes: list[Tensor]  # of each picture (N, 4)
    labels: Tensor  # (R,): 0 background, class k + 1, -1 neither
    meant: Tensor  # (R, 4): the object's box, anything where there is none


class BoxHeads(nn.Module):
    """Pools each proposal from the level of its size, classifies it and refines its box once for each class.

    `class_agnostic` refines it once for all. `aligned` and `points` are RoIAlign's (see `align_regions`).
    """

    def __init__(
        self,
        box_head: TwoLayerHead | ConvHead,
        *,
        num_classes: int,
        strides: Sequence[int],
        pool: int = 7,
        points: int = 2,
        aligned: bool = False,
        class_agnostic: bool = False,
        small_start: bool = False,
        box_weights: Sequence[float] = (10, 10, 5, 5),
        beta: float = 1 / 9,  # where the regression's loss turns from square to straight; 0 is plain L1
        foreground_overlap: float = 0.5,
        samples: int = 512,
        positive_fraction: float = 0.25,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections_per_image: int = 100,
    ) -> None:
        super().__init__()
        self.box_head = box_head
        self.box_predictor = BoxPredictor(
            box_head.width, num_classes, class_agnostic=class_agnostic, small_start=small_start
        )
        self.num_classes = num_classes
        self.strides = sorted(strides)
        self.pool = pool
        self.points = points
        self.aligned = aligned
        self.class_agnostic = class_agnostic
        self.box_weights = box_weights
        self.beta = beta
        self.foreground_overlap = foreground_overlap
        self.samples = samples
        self.positive_fraction = positive_fraction
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.detections_per_image = detections_per_image

    def losses(
        self, maps: Maps, proposals: Sequence[Tensor], sizes: Sequence[Size], truths: Sequence[Truth]
    ) -> dict[str, Tensor]:
        regions = self.sample(proposals, truths)
        return self.compare(*self.classify(maps, regions.boxes), regions)

    def detect(self, maps: Maps, proposals: Sequence[Tensor], sizes: Sequence[Size]) -> Found:
        """For each picture boxes (N, 4), scores (N,) and labels (N,) from 0, best first."""
        logits, deltas = self.classify(maps, proposals)
        return self.select(self.refine(deltas, proposals), logits.softmax(-1), sizes)

    def work(self, maps: Maps, regions: int) -> None:
        """The layers over so many regions, for counting."""
        level = maps[self.strides[0]]
        self.box_predictor(self.box_head(level.new_zeros(regions, level.shape[1], self.pool, self.pool)))

    @torch.no_grad()
    def sample(self, proposals: Sequence[Tensor], truths: Sequence[Truth]) -> Regions:
        """A balanced choice of the proposals and the objects themselves."""
        boxes, labels, meant = [], [], []
        for proposal, truth in zip(proposals, truths, strict=True):
            candidates = torch.cat([proposal, truth.boxes])
            label, matched = self._match(candidates, truth)
            # In the candidates' own order, positives and negatives mixed, as torchvision's sampler returns them.
            picked = torch.cat(sample(label, self.samples, self.positive_fraction, truth.generator)).sort().values
            boxes.append(candidates[picked])
            labels.append(label[picked])
            meant.append(matched[picked])
        return Regions(boxes, torch.cat(labels), torch.cat(meant))

    @torch.no_grad()
    def match(self, boxes: Sequence[Tensor], truths: Sequence[Truth]) -> Regions:
        """All of `boxes` and what each should become."""
        labels, meant = zip(*map(self._match, boxes, truths), strict=True)
        return Regions(list(boxes), torch.cat(labels), torch.cat(meant))

    def classify(self, maps: Maps, boxes: Sequence[Tensor], *, gradient: float = 1.0) -> tuple[Tensor, Tensor]:
        """Class logits (R, K+1) and deltas (R, K+1 or 1, 4); `gradient` of the gradient reaches the maps."""
        regions = pool_regions(maps, boxes, self.strides, self.pool, points=self.points, aligned=self.aligned)
        if gradient != 1 and regions.requires_grad:
            regions.register_hook(lambda of_regions: of_regions * gradient)
        return self.box_predictor(self.box_head(regions))

    def compare(self, logits: Tensor, deltas: Tensor, regions: Regions) -> dict[str, Tensor]:
        """The losses of `classify`'s answer: means over the pictures of the means over their regions."""
        label = regions.labels
        positive = torch.where(label > 0)[0]
        own = deltas[positive, 0 if self.class_agnostic else label[positive]]  # (P, 4)
        target = encode(regions.meant[positive], torch.cat(regions.boxes)[positive], self.box_weights)
        of_pictures = label.split([len(boxes) for boxes in regions.boxes])
        share = shares(torch.stack([(labels >= 0).sum() for labels in of_pictures]))  # (B,)
        of_each = torch.cat([s.expand(len(labels)) for s, labels in zip(share, of_pictures, strict=True)])  # (R,)
        classification = F.cross_entropy(logits, label, ignore_index=-1, reduction="none")
        regression = F.smooth_l1_loss(own, target, beta=self.beta, reduction="none").sum(-1)
        return {
            "loss_classifier": (classification * of_each).sum(),
            "loss_box_reg": (regression * of_each[positive]).sum(),
        }

    def refine(self, deltas: Tensor, boxes: Sequence[Tensor]) -> list[Tensor]:
        """For each picture the boxes that its regions become, (N, K+1 or 1, 4)."""
        refined = decode(deltas, torch.cat(list(boxes))[:, None], self.box_weights)
        return list(refined.split([len(b) for b in boxes]))

    def select(self, boxes: Sequence[Tensor], scores: Tensor, sizes: Sequence[Size]) -> Found:
        """The best detections of each picture, of its boxes (N, K+1 or 1, 4) and all pictures' scores (R, K+1)."""
        per_picture = scores.split([len(b) for b in boxes])
        return [self._best(*picture) for picture in zip(boxes, per_picture, sizes, strict=True)]

    def _best(self, boxes: Tensor, scores: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor]:
        K = self.num_classes
        boxes = boxes.expand(-1, K, -1) if self.class_agnostic else boxes[:, 1:]
        boxes = clip_boxes_to_image(boxes, size).reshape(-1, 4)
        labels = torch.arange(K, device=scores.device).expand(len(scores), -1).flatten()
        scores = scores[:, 1:].flatten()
        kept = torch.where(scores > self.score_threshold)[0]
        kept = kept[remove_small_boxes(boxes[kept], 1e-2)]
        kept = kept[batched_nms(boxes[kept], scores[kept], labels[kept], self.nms_threshold)]
        kept = kept[: self.detections_per_image]
        return boxes[kept], scores[kept], labels[kept]

    def _match(self, boxes: Tensor, truth: Truth) -> tuple[Tensor, Tensor]:
        """For each box its label, -1 for neither, and the object's box: (R,) and (R, 4)."""
        overlap = self.foreground_overlap
        match = match_boxes(truth.boxes, boxes, overlap, overlap, keep_best_of_each=False)
        labels = torch.where(match >= 0, take(truth.labels, match) + 1, 0)
        return ignore_inside(labels, boxes, truth.ignored, overlap), take(truth.boxes, match)
