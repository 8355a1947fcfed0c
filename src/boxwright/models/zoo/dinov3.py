"""Faster R-CNN on backbones from timm: DINOv3's (arXiv:2508.10104; Meta's own licence for the weights), MobileViT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from boxwright.models.detectors.boxes import FPN_ANCHORS, Anchors
from boxwright.models.detectors.faster_rcnn import BoxHeads, FasterRCNN, RegionProposals, RPNHead, TwoLayerHead
from boxwright.models.join import LEVELS, join
from boxwright.registry import register

# Without a level of stride 4 the finest one also looks for what that would have found.
COARSE_LEVELS = (8, 16, 32)
COARSE_ANCHORS = {8: [32.0, 64.0], 16: [96.0, 128.0], 32: [192.0, 256.0], 64: [384.0, 512.0]}  # stride: sides, px


@register("fasterrcnn_dinov3_vits16")
def fasterrcnn_dinov3_vits16(*, num_classes: int, frozen: bool = False) -> FasterRCNN:
    """DINOv3's ViT-S/16 in ViTDet's form, simple feature pyramid."""
    return _faster_rcnn("timm:vit_small_patch16_dinov3.lvd1689m", num_classes, frozen)


@register("fasterrcnn_dinov3_vits16plus")
def fasterrcnn_dinov3_vits16plus(*, num_classes: int, frozen: bool = False) -> FasterRCNN:
    """DINOv3's ViT-S+/16 (gated MLPs) in ViTDet's form, simple feature pyramid."""
    return _faster_rcnn("timm:vit_small_plus_patch16_dinov3.lvd1689m", num_classes, frozen)


@register("fasterrcnn_dinov3_vitb16")
def fasterrcnn_dinov3_vitb16(*, num_classes: int, frozen: bool = False) -> FasterRCNN:
    """DINOv3's ViT-B/16 in ViTDet's form, simple feature pyramid."""
    return _faster_rcnn("timm:vit_base_patch16_dinov3.lvd1689m", num_classes, frozen)


@register("fasterrcnn_dinov3_vitl16")
def fasterrcnn_dinov3_vitl16(*, num_classes: int, frozen: bool = False) -> FasterRCNN:
    """DINOv3's ViT-L/16 in ViTDet's form, simple feature pyramid."""
    return _faster_rcnn("timm:vit_large_patch16_dinov3.lvd1689m", num_classes, frozen)


@register("fasterrcnn_dinov3_vith16plus")
def fasterrcnn_dinov3_vith16plus(*, num_classes: int, frozen: bool = False) -> FasterRCNN:
    """DINOv3's ViT-H+/16 (gated MLPs) in ViTDet's form, simple feature pyramid."""
    return _faster_rcnn("timm:vit_huge_plus_patch16_dinov3.lvd1689m", num_classes, frozen)


@register("fasterrcnn_dinov3_convnext_tiny")
def fasterrcnn_dinov3_convnext_tiny(*, num_classes: int, frozen: bool = False) -> FasterRCNN:
    """DINOv3's ConvNeXt-T with an FPN."""
    return _faster_rcnn("timm:convnext_tiny.dinov3_lvd1689m", num_classes, frozen)


@register("fasterrcnn_dinov3_convnext_tiny_multifeat")
def fasterrcnn_dinov3_convnext_tiny_multifeat(*, num_classes: int, frozen: bool = False) -> FasterRCNN:
    """DINOv3's ConvNeXt-T with an FPN of its strides 8, 16 and 32 only: less memory, fewer small objects."""
    return _faster_rcnn(
        "timm:convnext_tiny.dinov3_lvd1689m", num_classes, frozen, levels=COARSE_LEVELS, anchors=COARSE_ANCHORS
    )


@register("fasterrcnn_dinov3_convnext_small")
def fasterrcnn_dinov3_convnext_small(*, num_classes: int, frozen: bool = False) -> FasterRCNN:
    """DINOv3's ConvNeXt-S with an FPN."""
    return _faster_rcnn("timm:convnext_small.dinov3_lvd1689m", num_classes, frozen)


@register("fasterrcnn_dinov3_convnext_base")
def fasterrcnn_dinov3_convnext_base(*, num_classes: int, frozen: bool = False) -> FasterRCNN:
    """DINOv3's ConvNeXt-B with an FPN."""
    return _faster_rcnn("timm:convnext_base.dinov3_lvd1689m", num_classes, frozen)


@register("fasterrcnn_dinov3_convnext_large")
def fasterrcnn_dinov3_convnext_large(*, num_classes: int, frozen: bool = False) -> FasterRCNN:
    """DINOv3's ConvNeXt-L with an FPN."""
    return _faster_rcnn("timm:convnext_large.dinov3_lvd1689m", num_classes, frozen)


@register("fasterrcnn_mobilevit_xxs")
def fasterrcnn_mobilevit_xxs(*, num_classes: int, frozen: bool = False) -> FasterRCNN:
    """MobileViT-XXS (arXiv:2110.02178) with an FPN of 128 channels: a backbone of a million parameters."""
    return _faster_rcnn("timm:mobilevit_xxs", num_classes, frozen, width=128)


def _faster_rcnn(
    backbone: str,
    num_classes: int,
    frozen: bool,
    *,
    width: int = 256,
    levels: Sequence[int] = LEVELS,
    anchors: Mapping[int, Sequence[float]] = FPN_ANCHORS,
) -> FasterRCNN:
    cells = Anchors(anchors)
    return FasterRCNN(
        join(backbone, width=width, levels=levels, backbone_options={"frozen": frozen}),
        RegionProposals(RPNHead(width, anchors_per_cell=cells.per_cell), cells),
        BoxHeads(TwoLayerHead(width), num_classes=num_classes, strides=levels),
    )
