"""What detectors share that speak about every cell of every level: branches of the head, and which boxes are kept.

RetinaNet and FCOS are made of it. Classes are told apart by a sigmoid each, so there is no background class.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from boxwright.models.detectors.base import Detector, Found, require_levels
from boxwright.models.pyramid import Maps
from boxwright.types import Size

UNLIKELY = -math.log((1 - 0.01) / 0.01)  # logit of 0.01, of each class before training (RetinaNet, section 4.1)

Level = tuple[Tensor, Tensor, Tensor]  # scores (B, N, K), box codes (B, N, 4), and where they stand (N, ...)


class DenseDetector(Detector):
    """A detector whose head scores every class and codes a box for each of the N places of a level.

    Of each level the best `candidates_per_level` scores above `score_threshold` become boxes; what is left of them
    after non-maximum suppression in each class is found, at most `detections_per_image`. A kind of it gives `score`
    and `decode`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        *,
        strides: Sequence[int],
        num_classes: int,
        score_threshold: float,
        nms_threshold: float,
        detections_per_image: int,
        candidates_per_level: int = 1000,
    ) -> None:
        super().__init__(backbone)
        require_levels(backbone, strides, cast(int, head.channels), type(self).__name__)
        self.head = head
        self.strides = sorted(strides)
        self.num_classes = num_classes
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.detections_per_image = detections_per_image
        self.candidates_per_level = candidates_per_level

    def score(self, maps: Maps) -> list[Level]:
        """Scores (0 .. 1), box codes and places of each level, finest first."""
        raise NotImplementedError

    def decode(self, codes: Tensor, places: Tensor) -> Tensor:
        """Boxes (N, 4) in pixels of codes (N, 4) at places (N, ...)."""
        raise NotImplementedError

    def detect(self, maps: Maps, sizes: Sequence[Size]) -> Found:
        levels = self.score(maps)
        return [self._best([(s[i], c[i], places) for s, c, places in levels], size) for i, size in enumerate(sizes)]

    def work(self, maps: Maps) -> None:
        for stride in self.strides:
            self.head(maps[stride])

    def _best(self, levels: Sequence[Level], size: Size) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (N, 4), scores (N,) and labels (N,) of one picture, best first."""
        candidates = [self._candidates(*level) for level in levels]
        boxes, scores, labels = (torch.cat(values) for values in zip(*candidates, strict=True))
        boxes = clip_boxes_to_image(boxes, size)
        kept = remove_small_boxes(boxes, 1e-2)
        kept = kept[batched_nms(boxes[kept], scores[kept], labels[kept], self.nms_threshold)]
        kept = kept[: self.detections_per_image]
        return boxes[kept], scores[kept], labels[kept]

    def _candidates(self, scores: Tensor, codes: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = scores.flatten()  # (N*K,)
        likely = torch.where(flat > self.score_threshold)[0]
        best = flat[likely].topk(min(self.candidates_per_level, len(likely)))
        place, label = likely[best.indices] // self.num_classes, likely[best.indices] % self.num_classes
        return self.decode(codes[place], places[place]), best.values, label


class Branch(nn.Module):
    """A tower over a level, then one 3x3 convolution for each thing to be said about its cells.

    `outputs` gives the name of each such thing and its numbers a cell.
    """

    def __init__(self, channels: int, tower: nn.Sequential, **outputs: int) -> None:
        super().__init__()
        self.outputs = list(outputs)
        self.conv = tower
        for name, count in outputs.items():
            self.add_module(name, nn.Conv2d(channels, count, kernel_size=3, padding=1))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, level: Tensor) -> list[Tensor]:
        """(B, C, h, w) → for each output (B, h*w, numbers), in float32."""
        x = self.conv(level)
        outputs = [self.get_submodule(name)(x) for name in self.outputs]
        return [output.permute(0, 2, 3, 1).flatten(1, 2).float() for output in outputs]


def classification_branch(channels: int, tower: nn.Sequential, logits: int) -> Branch:
    """A branch of so many class logits a cell, all of them unlikely before training."""
    branch = Branch(channels, tower, cls_logits=logits)
    nn.init.constant_(branch.get_parameter("cls_logits.bias"), UNLIKELY)
    return branch


def published_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of torchvision's RetinaNet or FCOS under our names, without the rows of its class 0.

    torchvision numbers classes from 1 and gives class 0 logits that mean nothing: a file for its `num_classes` becomes
    one for `num_classes - 1` foreground classes. Older files lack a level of names, which torchvision also adds.
    """
    flat_towers = "head.classification_head.conv.2.weight" in tensors  # in today's RetinaNet a block, in FCOS a ReLU
    renamed = {_present_name(name, flat_towers): value for name, value in tensors.items()}
    per_cell = len(renamed["head.regression_head.bbox_reg.bias"]) // 4
    for name in ("head.classification_head.cls_logits.weight", "head.classification_head.cls_logits.bias"):
        rows = renamed[name].unflatten(0, (per_cell, -1))  # (A, K+1, ...)
        renamed[name] = rows[:, 1:].flatten(0, 1)
    return renamed


def _present_name(name: str, flat_towers: bool) -> str:
    name = re.sub(r"(\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2", name)
    if flat_towers:
        name = re.sub(r"(_head\.conv)\.(\d+)\.", lambda found: f"{found[1]}.{int(found[2]) // 2}.0.", name)
    return name
