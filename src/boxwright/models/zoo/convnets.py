"""Faster R-CNN on convolutional networks."""

from __future__ import annotations

from torch import nn

from boxwright.models.backbones import from_torchvision
from boxwright.models.detectors.boxes import FPN_ANCHORS, Anchors
from boxwright.models.detectors.faster_rcnn import (
    BoxHeads,
    ConvHead,
    FasterRCNN,
    RegionProposals,
    RPNHead,
    TwoLayerHead,
)
from boxwright.models.pyramid import FPN, Joined
from boxwright.registry import register


@register("fasterrcnn_resnet50_fpn_v2")
def fasterrcnn_resnet50_fpn_v2(*, num_classes: int) -> FasterRCNN:
    """ResNet-50 with an FPN, BatchNorm throughout and a convolutional box head (torchvision's v2, arXiv:2111.11429)."""
    body = from_torchvision.resnet(50)
    return FasterRCNN(
        Joined(body, FPN(body.channels, width=256, norm=nn.BatchNorm2d)),
        RegionProposals(RPNHead(256, anchors_per_cell=3, depth=2), Anchors(FPN_ANCHORS)),
        BoxHeads(ConvHead(256), num_classes=num_classes, strides=(4, 8, 16, 32)),
    )


@register("fasterrcnn_squeezenet1_1")
def fasterrcnn_squeezenet1_1(*, num_classes: int) -> FasterRCNN:
    """SqueezeNet 1.1 with an FPN of 128 channels: small enough to train for real on a CPU."""
    body = from_torchvision.squeezenet1_1()
    return FasterRCNN(
        Joined(body, FPN(body.channels, width=128)),
        RegionProposals(
            RPNHead(128, anchors_per_cell=6),
            Anchors({8: [32.0, 52.0], 16: [84.0, 136.0], 32: [220.0, 356.0]}),
            keep_after_nms=(1000, 300),
        ),
        BoxHeads(TwoLayerHead(128), num_classes=num_classes, strides=(8, 16, 32), samples=128),
    )


@register("fasterrcnn_mobilenet_v2")
def fasterrcnn_mobilenet_v2(*, num_classes: int) -> FasterRCNN:
    """MobileNetV2 with an FPN of 128 channels: small enough to train for real on a CPU."""
    body = from_torchvision.mobilenet_v2()
    return FasterRCNN(
        Joined(body, FPN(body.channels, width=128)),
        RegionProposals(RPNHead(128, anchors_per_cell=3), Anchors(FPN_ANCHORS), keep_after_nms=(1000, 300)),
        BoxHeads(TwoLayerHead(128), num_classes=num_classes, strides=(4, 8, 16, 32), samples=128),
    )
