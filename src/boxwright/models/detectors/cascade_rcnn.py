"""Cascade R-CNN: box heads in a row, each made for better boxes than the one before it.

Cai & Vasconcelos, 2018 (arXiv:1712.00726), as detectron2 has it, so that its published weights keep their meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image, remove_small_boxes

from boxwright.models.detectors.base import Found
from boxwright.models.detectors.boxes import Truth
from boxwright.models.detectors.faster_rcnn import BoxHeads, FasterRCNN, RegionProposals
from boxwright.models.pyramid import Maps
from boxwright.types import Size

# Of each stage: the overlap from which on a box belongs to an object, and what its box deltas are multiplied by.
STAGES = ((0.5, (10, 10, 5, 5)), (0.6, (20, 20, 10, 10)), (0.7, (30, 30, 15, 15)))


class CascadeRCNN(FasterRCNN):
    """Backbone → region proposals → stages of box heads; what is found has the last boxes and the average scores.

    Losses: loss_classifier_0, loss_box_reg_0, ... of each stage, loss_objectness, loss_rpn_box_reg.
    """

    def __init__(self, backbone: nn.Module, rpn: RegionProposals, roi_heads: CascadeHeads) -> None:
        super().__init__(backbone, rpn, roi_heads)


class CascadeHeads(nn.Module):
    """Box heads of which each refines the boxes of the one before.

    While training the first learns from a sample of the proposals and the objects themselves, each later one from all
    boxes that it is given, matched anew at its own overlap. What is found obeys the last one's thresholds.
    """

    def __init__(self, stages: Sequence[BoxHeads]) -> None:
        super().__init__()
        assert all(stage.class_agnostic for stage in stages), "a stage hands on one box for a region, not one a class"
        self.stages = nn.ModuleList(stages)
        self.num_classes = stages[0].num_classes
        self.strides = stages[0].strides

    def losses(
        self, maps: Maps, proposals: Sequence[Tensor], sizes: Sequence[Size], truths: Sequence[Truth]
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        boxes = proposals
        for i, stage in enumerate(self._stages()):
            regions = stage.match(boxes, truths) if i else stage.sample(boxes, truths)
            # Losses are added up where the article averages them: the maps, which all stages share, get the average.
            logits, deltas = stage.classify(maps, regions.boxes, gradient=1 / len(self.stages))
            losses |= {f"{name}_{i}": loss for name, loss in stage.compare(logits, deltas, regions).items()}
            boxes = _hand_on(stage.refine(deltas.detach(), regions.boxes), sizes)
            boxes = [box[remove_small_boxes(box, 1e-3)] for box in boxes]  # without an area there is nothing to learn
        return losses

    def detect(self, maps: Maps, proposals: Sequence[Tensor], sizes: Sequence[Size]) -> Found:
        """For each picture boxes (N, 4), scores (N,) and labels (N,) from 0, best first."""
        boxes, refined, scores = proposals, [], []
        for stage in self._stages():
            logits, deltas = stage.classify(maps, boxes)
            scores.append(logits.softmax(-1))  # (R, K+1)
            refined = stage.refine(deltas, boxes)
            boxes = _hand_on(refined, sizes)
        return self._stages()[-1].select(refined, torch.stack(scores).mean(dim=0), sizes)

    def work(self, maps: Maps, regions: int) -> None:
        """The layers over so many regions, for counting."""
        for stage in self._stages():
            stage.work(maps, regions)

    def _stages(self) -> list[BoxHeads]:
        return cast(list[BoxHeads], list(self.stages))


def _hand_on(refined: Sequence[Tensor], sizes: Sequence[Size]) -> list[Tensor]:
    """For each picture what a stage made of its regions (N, 1, 4) as the next one's, inside the picture: (N, 4)."""
    return [clip_boxes_to_image(boxes[:, 0], size) for boxes, size in zip(refined, sizes, strict=True)]
