"""Faster R-CNN and Cascade R-CNN on any backbone and pyramid."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from boxwright.models.detectors.boxes import Anchors
from boxwright.models.detectors.cascade_rcnn import STAGES, CascadeHeads, CascadeRCNN
from boxwright.models.detectors.faster_rcnn import (
    BoxHeads,
    ConvHead,
    FasterRCNN,
    RegionProposals,
    RPNHead,
    TwoLayerHead,
)
from boxwright.models.join import join
from boxwright.models.pyramid import Joined
from boxwright.registry import nearest, register
from boxwright.types import UserError


@register("fasterrcnn")
def fasterrcnn(
    *,
    num_classes: int,
    backbone: str | nn.Module = "torchvision:resnet50",
    pyramid: str | None = None,
    width: int = 256,
    head: str = "2fc",
) -> FasterRCNN:
    """Faster R-CNN on any backbone and pyramid; `head` is 2fc or 4conv1fc."""
    box_head = _box_head(head, width)
    body = join(backbone, pyramid, width=width)
    return FasterRCNN(
        body,
        _proposals(body, width),
        BoxHeads(box_head(), num_classes=num_classes, strides=_pooled(body), aligned=True),
    )


@register("cascade_rcnn")
def cascade_rcnn(
    *,
    num_classes: int,
    backbone: str | nn.Module = "torchvision:resnet50",
    pyramid: str | None = None,
    width: int = 256,
    head: str = "2fc",
) -> CascadeRCNN:
    """Cascade R-CNN of three stages on any backbone and pyramid; `head` is 2fc or 4conv1fc."""
    box_head = _box_head(head, width)
    body = join(backbone, pyramid, width=width)
    stages = [
        BoxHeads(
            box_head(),
            num_classes=num_classes,
            strides=_pooled(body),
            aligned=True,
            class_agnostic=True,
            small_start=True,
            foreground_overlap=overlap,
            box_weights=box_weights,
            beta=0,
        )
        for overlap, box_weights in STAGES
    ]
    return CascadeRCNN(body, _proposals(body, width), CascadeHeads(stages))


def _proposals(body: Joined, width: int) -> RegionProposals:
    anchors = Anchors({stride: [8.0 * stride] for stride in body.channels})  # 32 px at stride 4 (Lin et al., 2017)
    return RegionProposals(RPNHead(width, anchors.per_cell), anchors)


def _pooled(body: Joined) -> list[int]:
    """The strides that boxes are pooled from: all but the one added above, which only proposes, and none beyond 32."""
    strides = sorted(body.channels)
    return [stride for stride in strides[:-1] if stride <= 32] or strides[:1]


def _box_head(name: str, width: int) -> Callable[[], TwoLayerHead | ConvHead]:
    heads: dict[str, Callable[[], TwoLayerHead | ConvHead]] = {
        "2fc": lambda: TwoLayerHead(width),
        "4conv1fc": lambda: ConvHead(width, norm="layer"),  # of one picture's statistics, whatever the batch is
    }
    if name not in heads:
        raise UserError(f"unknown box head {name!r}: wanted is {' or '.join(heads)}.{nearest(name, heads)}")
    return heads[name]
