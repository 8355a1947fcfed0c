"""RetinaNet and FCOS: torchvision's own, and on any backbone and pyramid."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from boxwright.models.backbones import from_torchvision
from boxwright.models.detectors.fcos import FCOS, FCOSHead
from boxwright.models.detectors.retinanet import RetinaNet, RetinaNetHead, anchors_for
from boxwright.models.join import join
from boxwright.models.pyramid import FPN, Extra, Joined, group_norm
from boxwright.registry import register

STRIDES = (8, 16, 32, 64, 128)
LEVELS = STRIDES[:3]  # below the two that are added


@register("retinanet")
def retinanet(
    *,
    num_classes: int,
    backbone: str | nn.Module = "torchvision:resnet50",
    pyramid: str | None = None,
    width: int = 256,
) -> RetinaNet:
    """RetinaNet on any backbone and pyramid."""
    body = join(backbone, pyramid, width=width, levels=LEVELS, extra="p6p7")
    anchors = anchors_for(body.channels)
    return RetinaNet(body, RetinaNetHead(width, anchors.per_cell, num_classes), anchors)


@register("fcos")
def fcos(
    *,
    num_classes: int,
    backbone: str | nn.Module = "torchvision:resnet50",
    pyramid: str | None = None,
    width: int = 256,
) -> FCOS:
    """FCOS, without anchors, on any backbone and pyramid."""
    body = join(backbone, pyramid, width=width, levels=LEVELS, extra="p6p7")
    return FCOS(body, FCOSHead(width, num_classes), strides=body.channels)


@register("retinanet_resnet50_fpn")
def retinanet_resnet50_fpn(*, num_classes: int) -> RetinaNet:
    """ResNet-50 with an FPN and frozen BatchNorm, as torchvision's RetinaNet (arXiv:1708.02002)."""
    norm = partial(FrozenBatchNorm2d, eps=0.0)  # that the published weights were trained with
    anchors = anchors_for(STRIDES)
    return RetinaNet(_resnet50(norm, "p6p7"), RetinaNetHead(256, anchors.per_cell, num_classes), anchors)


@register("retinanet_resnet50_fpn_v2")
def retinanet_resnet50_fpn_v2(*, num_classes: int) -> RetinaNet:
    """ResNet-50 with an FPN, GroupNorm in the head and GIoU loss: torchvision's v2 (after arXiv:1912.02424)."""
    anchors = anchors_for(STRIDES)
    return RetinaNet(
        _resnet50(nn.BatchNorm2d, "p6p7_of_c5"),
        RetinaNetHead(256, anchors.per_cell, num_classes, norm=group_norm),
        anchors,
        box_loss="giou",
    )


@register("fcos_resnet50_fpn")
def fcos_resnet50_fpn(*, num_classes: int) -> FCOS:
    """ResNet-50 with an FPN and frozen BatchNorm, as torchvision's FCOS (arXiv:1904.01355)."""
    return FCOS(_resnet50(FrozenBatchNorm2d, "p6p7"), FCOSHead(256, num_classes), strides=STRIDES)


def _resnet50(norm: Callable[[int], nn.Module], extra: Extra) -> Joined:
    body = from_torchvision.resnet(50, norm)
    return Joined(body, FPN({stride: body.channels[stride] for stride in LEVELS}, width=256, extra=extra))
