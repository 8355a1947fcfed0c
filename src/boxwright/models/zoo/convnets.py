"""Faster R-CNN on convolutional networks, each with an FPN over the maps that it has.

`norm` is "train" where BatchNorms learn from each batch; "frozen" keeps what published weights make of them, which is
better for batches of a few pictures and worse without such weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from boxwright.models.backbones import classic, from_torchvision
from boxwright.models.backbones.from_torchvision import Norm, Staged
from boxwright.models.detectors.boxes import FPN_ANCHORS, Anchors
from boxwright.models.detectors.faster_rcnn import (
    BoxHeads,
    ConvHead,
    FasterRCNN,
    RegionProposals,
    RPNHead,
    TwoLayerHead,
)
from boxwright.models.pyramid import FPN, Joined, Maps
from boxwright.registry import register

FROM_STRIDE_8 = {8: [32.0, 52.0], 16: [84.0, 136.0], 32: [220.0, 356.0]}  # stride: sides, where no map is finer
TO_STRIDE_16 = {4: [32.0, 48.0], 8: [64.0, 128.0], 16: [256.0, 512.0]}  # where none is coarser


def _on_fpn(
    body: nn.Module,
    *,
    num_classes: int,
    width: int = 256,
    head_width: int = 1024,
    anchors: Mapping[int, Sequence[float]] = FPN_ANCHORS,
    keep_after_nms: tuple[int, int] = (2000, 1000),
    samples: int = 512,
) -> FasterRCNN:
    """A pyramid of `width` channels over those maps that have anchors, pooled up to stride 32."""
    channels = {stride: c for stride, c in cast(Mapping[int, int], body.channels).items() if stride in anchors}
    pyramid = FPN(channels, width=width, extra=None if max(anchors) in channels else "pool")
    cells = Anchors(anchors)
    return FasterRCNN(
        Joined(body, pyramid),
        RegionProposals(RPNHead(width, cells.per_cell), cells, keep_after_nms=keep_after_nms),
        BoxHeads(
            TwoLayerHead(width, width=head_width),
            num_classes=num_classes,
            strides=[stride for stride in pyramid.channels if stride <= 32],
            samples=samples,
        ),
    )


_on_small_fpn = partial(_on_fpn, width=128, keep_after_nms=(1000, 300), samples=128)  # to train for real on a CPU


# ------ ResNets


@register("fasterrcnn_resnet50_fpn")
def fasterrcnn_resnet50_fpn(*, num_classes: int, norm_eps: float = 0.0) -> FasterRCNN:
    """ResNet-50 with an FPN and frozen BatchNorm, as torchvision's (arXiv:1506.01497).

    `norm_eps` is added to the BatchNorms' variance. The COCO weights were trained with none, and torchvision loads
    them so; 1e-5 is what every ResNet was trained with to classify, and keeps channels without variance finite.
    """
    return _on_fpn(from_torchvision.resnet(50, norm=partial(FrozenBatchNorm2d, eps=norm_eps)), num_classes=num_classes)


@register("fasterrcnn_resnet50_fpn_v2")
def fasterrcnn_resnet50_fpn_v2(*, num_classes: int) -> FasterRCNN:
    """ResNet-50 with an FPN, BatchNorm throughout and a convolutional box head (torchvision's v2, arXiv:2111.11429)."""
    body = from_torchvision.resnet(50)
    return FasterRCNN(
        Joined(body, FPN(body.channels, width=256, norm=nn.BatchNorm2d)),
        RegionProposals(RPNHead(256, anchors_per_cell=3, depth=2), Anchors(FPN_ANCHORS)),
        BoxHeads(ConvHead(256), num_classes=num_classes, strides=(4, 8, 16, 32)),
    )


@register("fasterrcnn_resnet18")
def fasterrcnn_resnet18(*, num_classes: int, norm: Norm = "train") -> FasterRCNN:
    """ResNet-18 with an FPN."""
    return _on_fpn(from_torchvision.build("resnet18", norm=norm), num_classes=num_classes)


@register("fasterrcnn_resnet101")
def fasterrcnn_resnet101(*, num_classes: int, norm: Norm = "train") -> FasterRCNN:
    """ResNet-101 with an FPN."""
    return _on_fpn(from_torchvision.build("resnet101", norm=norm), num_classes=num_classes)


@register("fasterrcnn_resnet152")
def fasterrcnn_resnet152(*, num_classes: int, norm: Norm = "train") -> FasterRCNN:
    """ResNet-152 with an FPN."""
    return _on_fpn(from_torchvision.build("resnet152", norm=norm), num_classes=num_classes)


@register("fasterrcnn_custom_resnet")
def fasterrcnn_custom_resnet(*, num_classes: int) -> FasterRCNN:
    """A ResNet of 9 blocks with an FPN of 128 channels, without published weights."""
    return _on_small_fpn(classic.custom_resnet(), num_classes=num_classes)


# ------ Darknets, VGG


@register("fasterrcnn_darknet")
def fasterrcnn_darknet(*, num_classes: int) -> FasterRCNN:
    """Darknet (YOLO's first backbone) with an FPN, without published weights."""
    return _on_fpn(classic.darknet(), num_classes=num_classes)


@register("fasterrcnn_mini_darknet")
def fasterrcnn_mini_darknet(*, num_classes: int) -> FasterRCNN:
    """A narrow Darknet with an FPN of 128 channels, without published weights."""
    return _on_small_fpn(classic.mini_darknet(), num_classes=num_classes)


@register("fasterrcnn_mini_darknet_nano_head")
def fasterrcnn_mini_darknet_nano_head(*, num_classes: int) -> FasterRCNN:
    """A narrow Darknet with an FPN of 128 channels and a box head 128 wide, without published weights."""
    return _on_small_fpn(classic.mini_darknet(), num_classes=num_classes, head_width=128)


@register("fasterrcnn_nano")
def fasterrcnn_nano(*, num_classes: int) -> FasterRCNN:
    """Five convolutions with an FPN of 128 channels and a box head 128 wide, without published weights."""
    return _on_small_fpn(classic.nano(), num_classes=num_classes, head_width=128, anchors=TO_STRIDE_16)


@register("fasterrcnn_vgg16")
def fasterrcnn_vgg16(*, num_classes: int, norm: Norm = "train") -> FasterRCNN:
    """VGG-16 with BatchNorm and an FPN."""
    return _on_fpn(from_torchvision.build("vgg16_bn", norm=norm), num_classes=num_classes)


# ------ SqueezeNets


@register("fasterrcnn_squeezenet1_0")
def fasterrcnn_squeezenet1_0(*, num_classes: int) -> FasterRCNN:
    """SqueezeNet 1.0 with an FPN of 128 channels."""
    return _on_small_fpn(classic.squeezenet1_0(), num_classes=num_classes, anchors=FROM_STRIDE_8)


@register("fasterrcnn_squeezenet1_1")
def fasterrcnn_squeezenet1_1(*, num_classes: int) -> FasterRCNN:
    """SqueezeNet 1.1 with an FPN of 128 channels: small enough to train for real on a CPU."""
    return _on_small_fpn(classic.squeezenet1_1(), num_classes=num_classes, anchors=FROM_STRIDE_8)


@register("fasterrcnn_squeezenet1_1_small_head")
def fasterrcnn_squeezenet1_1_small_head(*, num_classes: int) -> FasterRCNN:
    """SqueezeNet 1.1 with an FPN of 128 channels and a box head 512 wide."""
    return _on_small_fpn(classic.squeezenet1_1(), num_classes=num_classes, head_width=512, anchors=FROM_STRIDE_8)


@register("fasterrcnn_mini_squeezenet1_1_small_head")
def fasterrcnn_mini_squeezenet1_1_small_head(*, num_classes: int) -> FasterRCNN:
    """SqueezeNet 1.1 with a narrow end, an FPN of 128 channels and a box head 512 wide."""
    return _on_small_fpn(classic.mini_squeezenet1_1(), num_classes=num_classes, head_width=512, anchors=FROM_STRIDE_8)


@register("fasterrcnn_mini_squeezenet1_1_tiny_head")
def fasterrcnn_mini_squeezenet1_1_tiny_head(*, num_classes: int) -> FasterRCNN:
    """SqueezeNet 1.1 with a narrow end, an FPN of 128 channels and a box head 256 wide."""
    return _on_small_fpn(classic.mini_squeezenet1_1(), num_classes=num_classes, head_width=256, anchors=FROM_STRIDE_8)


# ------ MobileNets


@register("fasterrcnn_mobilenet_v2")
def fasterrcnn_mobilenet_v2(*, num_classes: int) -> FasterRCNN:
    """MobileNetV2 with an FPN of 128 channels: small enough to train for real on a CPU."""
    return _on_small_fpn(from_torchvision.mobilenet_v2(), num_classes=num_classes)


@register("fasterrcnn_mbv3_large")
def fasterrcnn_mbv3_large(*, num_classes: int, norm: Norm = "train") -> FasterRCNN:
    """MobileNetV3-Large with an FPN of 128 channels from stride 4 on."""
    return _on_small_fpn(from_torchvision.build("mobilenet_v3_large", norm=norm), num_classes=num_classes)


@register("fasterrcnn_mbv3_small_nano_head")
def fasterrcnn_mbv3_small_nano_head(*, num_classes: int, norm: Norm = "train") -> FasterRCNN:
    """MobileNetV3-Small with an FPN of 128 channels and a box head 128 wide."""
    body = from_torchvision.build("mobilenet_v3_small", norm=norm)
    return _on_small_fpn(body, num_classes=num_classes, head_width=128)


@register("fasterrcnn_mobilenetv3_large_fpn")
def fasterrcnn_mobilenetv3_large_fpn(*, num_classes: int) -> FasterRCNN:
    """MobileNetV3-Large with an FPN from stride 32 on and frozen BatchNorm, as torchvision's (arXiv:1905.02244)."""
    return _on_twins(num_classes=num_classes)


@register("fasterrcnn_mobilenetv3_large_320_fpn")
def fasterrcnn_mobilenetv3_large_320_fpn(*, num_classes: int) -> FasterRCNN:
    """`fasterrcnn_mobilenetv3_large_fpn` with few proposals, for pictures of 320 pixels, as torchvision's."""
    return _on_twins(num_classes=num_classes, keep_before_nms=(2000, 150), keep_after_nms=(2000, 150))


def _on_twins(
    *,
    num_classes: int,
    keep_before_nms: tuple[int, int] = (2000, 1000),
    keep_after_nms: tuple[int, int] = (2000, 1000),
) -> FasterRCNN:
    net = torchvision.models.mobilenet_v3_large(weights=None, norm_layer=FrozenBatchNorm2d)
    body = Staged(dict(net.features.named_children()), {"13": (32, 160), "16": (TWIN, 960)})
    body.weights_name = "torchvision:mobilenet_v3_large"
    anchors = TwinAnchors([32.0, 64.0, 128.0, 256.0, 512.0])
    return FasterRCNN(
        Joined(body, TwinFPN(body.channels, width=256)),
        RegionProposals(
            RPNHead(256, anchors.per_cell),
            anchors,
            keep_before_nms=keep_before_nms,
            keep_after_nms=keep_after_nms,
            score_threshold=0.05,
        ),
        BoxHeads(TwoLayerHead(256), num_classes=num_classes, strides=(32,)),
    )


TWIN = 33  # in the place of a stride: a second map of stride 32. torchvision's MobileNetV3 is the only one with twins


class TwinFPN(FPN):
    """An FPN over two maps of stride 32, with a level of stride 64 above them."""

    def __init__(self, channels: Mapping[int, int], width: int) -> None:
        super().__init__(channels, width=width, extra=None)
        self.channels = {**self.channels, 64: width}

    def forward(self, maps: Mapping[int, Tensor]) -> Maps:
        levels = super().forward(maps)
        return {**levels, 64: F.max_pool2d(levels[TWIN], kernel_size=1, stride=2)}


class TwinAnchors(Anchors):
    """The same anchors for all levels of a `TwinFPN`."""

    def __init__(self, sizes: Sequence[float]) -> None:
        super().__init__({32: sizes, TWIN: sizes, 64: sizes})
        self.apart = Anchors({32: sizes, 64: sizes})

    def forward(self, maps: Maps) -> list[Tensor]:
        at_32, at_64 = self.apart(maps)
        return [at_32, at_32, at_64]


# ------ EfficientNets, ConvNeXts, RegNet


@register("fasterrcnn_efficientnet_b0")
def fasterrcnn_efficientnet_b0(*, num_classes: int, norm: Norm = "train") -> FasterRCNN:
    """EfficientNet-B0 with an FPN of 128 channels."""
    return _on_small_fpn(from_torchvision.build("efficientnet_b0", norm=norm), num_classes=num_classes)


@register("fasterrcnn_efficientnet_b4")
def fasterrcnn_efficientnet_b4(*, num_classes: int, norm: Norm = "train") -> FasterRCNN:
    """EfficientNet-B4 with an FPN."""
    return _on_fpn(from_torchvision.build("efficientnet_b4", norm=norm), num_classes=num_classes)


@register("fasterrcnn_convnext_tiny")
def fasterrcnn_convnext_tiny(*, num_classes: int) -> FasterRCNN:
    """ConvNeXt-Tiny with an FPN."""
    return _on_fpn(from_torchvision.build("convnext_tiny"), num_classes=num_classes)


@register("fasterrcnn_convnext_small")
def fasterrcnn_convnext_small(*, num_classes: int) -> FasterRCNN:
    """ConvNeXt-Small with an FPN."""
    return _on_fpn(from_torchvision.build("convnext_small"), num_classes=num_classes)


@register("fasterrcnn_regnet_y_400mf")
def fasterrcnn_regnet_y_400mf(*, num_classes: int, norm: Norm = "train") -> FasterRCNN:
    """RegNetY-400MF with an FPN of 128 channels."""
    return _on_small_fpn(from_torchvision.build("regnet_y_400mf", norm=norm), num_classes=num_classes)
