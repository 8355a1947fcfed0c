"""Faster R-CNN on any pyramid: proposals from every level, then a box head over pooled regions.

Ren et al., 2015 (arXiv:1506.01497), with the anchors, matching, sampling and losses of torchvision, whose state-dict
keys and numbers it keeps: with the same weights and random numbers both give the same boxes and losses. Added to it:
strides that are known rather than guessed from rounded sizes, and ignore regions (objects marked `difficult` neither
attract nor repel). The background class exists in this file only: inside, 0 is background and label k is k + 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes

from boxwright.models.detectors.pooling import align_regions
from boxwright.models.pyramid import Maps
from boxwright.types import Batch, Detections, Size

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0 .. 1, as all of torchvision's and MAE's weights expect
IMAGENET_STD = (0.229, 0.224, 0.225)
DELTA_CLAMP = math.log(1000.0 / 16)  # a box may grow at most this much; torchvision's bound against overflow


class FasterRCNN(nn.Module):
    """Backbone → region proposals → classified, refined boxes. Boxes are in canvas pixels."""

    def __init__(
        self,
        backbone: nn.Module,
        rpn: RegionProposals,
        roi_heads: BoxHeads,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.rpn = rpn
        self.roi_heads = roi_heads
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1))

    @property
    def num_classes(self) -> int:
        """Foreground classes."""
        return self.roi_heads.num_classes

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Four scalar losses of a batch: loss_classifier, loss_box_reg, loss_objectness, loss_rpn_box_reg."""
        truths = [
            Truth(boxes[~ignored], labels[~ignored] + 1, boxes[ignored])
            for boxes, labels, ignored in zip(batch.boxes, batch.labels, batch.difficult, strict=True)
        ]
        maps = self.backbone(self.normalise(batch))
        proposals, rpn_losses = self.rpn.losses(maps, batch.sizes, truths)
        return {**self.roi_heads.losses(maps, proposals, truths), **rpn_losses}

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Detections]:
        """At most `detections_per_image` boxes for each picture, best first."""
        maps = self.backbone(self.normalise(batch))
        proposals = self.rpn.propose(maps, batch.sizes)
        return [
            Detections(boxes.cpu().numpy(), scores.cpu().numpy(), labels.cpu().numpy())
            for boxes, scores, labels in self.roi_heads.detect(maps, proposals, batch.sizes)
        ]

    def forward(self, batch: Batch) -> dict[str, Tensor] | list[Detections]:
        """`losses` while training, else `predict`; for wrappers that only know `forward`."""
        return self.losses(batch) if self.training else self.predict(batch)

    def normalise(self, batch: Batch) -> Tensor:
        """uint8 pixels → (B, 3, H, W) of about unit variance; padding becomes exactly zero."""
        mean, std = cast(Tensor, self.pixel_mean), cast(Tensor, self.pixel_std)
        images = (batch.images.to(mean.dtype) / 255 - mean) / std
        for image, (height, width) in zip(images, batch.sizes, strict=True):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return images


class Truth:
    """What is in one picture: boxes (N, 4), labels (N,) from 1, and regions (M, 4) that count as nothing."""

    def __init__(self, boxes: Tensor, labels: Tensor, ignored: Tensor) -> None:
        self.boxes, self.labels, self.ignored = boxes, labels, ignored


class Anchors(nn.Module):
    """The same boxes around every cell of a level, largest side ratio first as in torchvision.

    `sizes` gives each stride its anchor sizes in pixels; every size comes in every `ratio` (height / width).
    """

    def __init__(self, sizes: Mapping[int, Sequence[float]], ratios: Sequence[float] = (0.5, 1.0, 2.0)) -> None:
        super().__init__()
        self.strides = sorted(sizes)
        counts = {len(sizes[stride]) for stride in self.strides}
        assert len(counts) == 1, "every level needs the same number of anchors"
        self.per_cell = counts.pop() * len(ratios)
        self.cells = {stride: _cell_anchors(sizes[stride], ratios) for stride in self.strides}

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
    return (torch.stack([-ws, -hs, ws, hs], dim=1) / 2).round()  # (A, 4); whole pixels, as torchvision's weights expect


class RPNHead(nn.Module):
    """`depth` 3x3 convolutions, then for each anchor one objectness logit and four box deltas."""

    def __init__(self, channels: int, anchors_per_cell: int, depth: int = 1) -> None:
        super().__init__()
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

    def _score(self, maps: Maps) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        logits, deltas = zip(*(self.head(maps[stride]) for stride in self.anchors.strides), strict=True)
        return list(logits), list(deltas), self.anchors(maps)

    def _match(self, anchors: Tensor, truth: Truth) -> tuple[Tensor, Tensor]:
        """For each anchor 1 object, 0 background, -1 neither; and the box it is to become, (A, 4)."""
        match = match_boxes(truth.boxes, anchors, self.positive_overlap, self.negative_overlap, keep_best_of_each=True)
        labels = torch.where(match >= 0, 1, match.clamp(min=-2) + 1)  # -1 background → 0, -2 between → -1
        labels = ignore_inside(labels, anchors, truth.ignored, self.negative_overlap)
        return labels, _take(truth.boxes, match)

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

    def detect(
        self, maps: Maps, proposals: Sequence[Tensor], sizes: Sequence[Size]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each picture boxes (N, 4), scores (N,) and labels (N,) from 0, best first."""
        logits, deltas = self._classify(maps, proposals)
        boxes = decode(deltas.reshape(len(logits), -1, 4), torch.cat(list(proposals))[:, None], (10, 10, 5, 5))
        counts = [len(p) for p in proposals]
        scores = logits.softmax(-1)  # (R, K+1)
        return [
            self._best(box[:, 1:], score[:, 1:], size)
            for box, score, size in zip(boxes.split(counts), scores.split(counts), sizes, strict=True)
        ]

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
        labels = torch.where(match >= 0, _take(truth.labels, match), 0)
        return (
            candidates,
            ignore_inside(labels, candidates, truth.ignored, overlap),
            _take(truth.boxes, match),
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


def sample(labels: Tensor, count: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Random indices of at most `count * positive_fraction` positives, and negatives to make up `count`."""
    positive = torch.where(labels >= 1)[0]
    negative = torch.where(labels == 0)[0]
    positives = min(len(positive), int(count * positive_fraction))
    negatives = min(len(negative), count - positives)
    # One draw each, of the whole length, so that the same generator gives the samples that torchvision would take.
    chosen = torch.randperm(len(positive), device=labels.device)[:positives]
    rejected = torch.randperm(len(negative), device=labels.device)[:negatives]
    return positive[chosen], negative[rejected]


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


def _take(values: Tensor, match: Tensor) -> Tensor:
    """values[match], with anything for boxes that match nothing; zeros when there are no values."""
    if len(values) == 0:
        return values.new_zeros(len(match), *values.shape[1:])
    return values[match.clamp(min=0)]
