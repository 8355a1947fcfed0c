"""Detectors on our own plain Vision Transformer."""

from __future__ import annotations

from typing import NamedTuple

from boxwright.models.detectors.boxes import FPN_ANCHORS, Anchors
from boxwright.models.detectors.cascade_rcnn import STAGES, CascadeHeads, CascadeRCNN
from boxwright.models.detectors.faster_rcnn import (
    BoxHeads,
    ConvHead,
    FasterRCNN,
    RegionProposals,
    RPNHead,
    TwoLayerHead,
)
from boxwright.models.pyramid import Joined, SimpleFeaturePyramid
from boxwright.models.vit import ViT
from boxwright.registry import register


class Size(NamedTuple):
    """Of a ViT of 16-px patches whose blocks attend within windows of 14 x 14, but for the global ones."""

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    weights: str | None = None  # that `--weights pretrained` means


TINY = Size(192, 12, 3, global_blocks=(2, 5, 8, 11))
BASE = Size(768, 12, 12, global_blocks=(2, 5, 8, 11), weights="mae_vit_base")
LARGE = Size(1024, 24, 16, global_blocks=(5, 11, 17, 23), weights="mae_vit_large")
HUGE = Size(1280, 32, 16, global_blocks=(7, 15, 23, 31), weights="mae_vit_huge")


@register("fasterrcnn_vitdet")
def fasterrcnn_vitdet(*, num_classes: int, drop_path: float = 0.1, checkpoint_blocks: bool = False) -> FasterRCNN:
    """ViT-B/16, window 14, global blocks 2 5 8 11, simple feature pyramid (the article's model)."""
    return _with_torchvision_s_heads(_backbone(BASE, drop_path, checkpoint_blocks), num_classes)


@register("fasterrcnn_vitdet_tiny")
def fasterrcnn_vitdet_tiny(*, num_classes: int, drop_path: float = 0.1, checkpoint_blocks: bool = False) -> FasterRCNN:
    """ViT-Tiny/16 (192 wide, 3 heads) in the same form as `fasterrcnn_vitdet`."""
    return _with_torchvision_s_heads(_backbone(TINY, drop_path, checkpoint_blocks), num_classes)


@register("vitdet_b")
def vitdet_b(*, num_classes: int, drop_path: float = 0.1, checkpoint_blocks: bool = False) -> FasterRCNN:
    """ViT-B/16 with ViTDet's own heads (arXiv:2203.16527); loads detectron2's mask_rcnn_vitdet_b."""
    return _with_vitdet_s_heads(_backbone(BASE, drop_path, checkpoint_blocks), num_classes)


@register("vitdet_l")
def vitdet_l(*, num_classes: int, drop_path: float = 0.4, checkpoint_blocks: bool = False) -> FasterRCNN:
    """ViT-L/16 with ViTDet's own heads (arXiv:2203.16527); loads detectron2's mask_rcnn_vitdet_l."""
    return _with_vitdet_s_heads(_backbone(LARGE, drop_path, checkpoint_blocks), num_classes)


@register("vitdet_h")
def vitdet_h(*, num_classes: int, drop_path: float = 0.5, checkpoint_blocks: bool = False) -> FasterRCNN:
    """ViT-H/16 with ViTDet's own heads (arXiv:2203.16527); loads detectron2's mask_rcnn_vitdet_h."""
    return _with_vitdet_s_heads(_backbone(HUGE, drop_path, checkpoint_blocks), num_classes)


@register("cascade_vitdet_b")
def cascade_vitdet_b(*, num_classes: int, drop_path: float = 0.1, checkpoint_blocks: bool = False) -> CascadeRCNN:
    """ViT-B/16 with ViTDet's heads in a cascade of three; loads detectron2's cascade_mask_rcnn_vitdet_b."""
    return _with_vitdet_s_cascade(_backbone(BASE, drop_path, checkpoint_blocks), num_classes)


@register("cascade_vitdet_l")
def cascade_vitdet_l(*, num_classes: int, drop_path: float = 0.4, checkpoint_blocks: bool = False) -> CascadeRCNN:
    """ViT-L/16 with ViTDet's heads in a cascade of three; loads detectron2's cascade_mask_rcnn_vitdet_l."""
    return _with_vitdet_s_cascade(_backbone(LARGE, drop_path, checkpoint_blocks), num_classes)


@register("cascade_vitdet_h")
def cascade_vitdet_h(*, num_classes: int, drop_path: float = 0.5, checkpoint_blocks: bool = False) -> CascadeRCNN:
    """ViT-H/16 with ViTDet's heads in a cascade of three; loads detectron2's cascade_mask_rcnn_vitdet_h."""
    return _with_vitdet_s_cascade(_backbone(HUGE, drop_path, checkpoint_blocks), num_classes)


def _backbone(size: Size, drop_path: float, checkpoint_blocks: bool) -> Joined:
    body = ViT(
        width=size.width,
        depth=size.depth,
        heads=size.heads,
        patch=16,
        window=14,
        global_blocks=size.global_blocks,
        drop_path=drop_path,
        checkpoint_blocks=checkpoint_blocks,
    )
    body.weights_name = size.weights
    return Joined(body, SimpleFeaturePyramid(stride=16, channels=size.width, width=256))


def _with_torchvision_s_heads(backbone: Joined, num_classes: int) -> FasterRCNN:
    return FasterRCNN(
        backbone,
        RegionProposals(RPNHead(256, anchors_per_cell=3), Anchors(FPN_ANCHORS)),
        BoxHeads(TwoLayerHead(256), num_classes=num_classes, strides=(4, 8, 16, 32, 64)),
    )


def _with_vitdet_s_heads(backbone: Joined, num_classes: int) -> FasterRCNN:
    return FasterRCNN(
        backbone,
        _vitdet_s_proposals(),
        BoxHeads(
            ConvHead(256, norm="layer"),
            num_classes=num_classes,
            strides=(4, 8, 16, 32),
            points=0,
            aligned=True,
            small_start=True,
            beta=0,
        ),
    )


def _with_vitdet_s_cascade(backbone: Joined, num_classes: int) -> CascadeRCNN:
    stages = [
        BoxHeads(
            ConvHead(256, norm="layer"),
            num_classes=num_classes,
            strides=(4, 8, 16, 32),
            points=0,
            aligned=True,
            class_agnostic=True,
            small_start=True,
            foreground_overlap=overlap,
            box_weights=box_weights,
            beta=0,
        )
        for overlap, box_weights in STAGES
    ]
    return CascadeRCNN(backbone, _vitdet_s_proposals(), CascadeHeads(stages))


def _vitdet_s_proposals() -> RegionProposals:
    return RegionProposals(
        RPNHead(256, anchors_per_cell=3, depth=2),
        Anchors(FPN_ANCHORS, rounded=False),
        keep_after_nms=(1000, 1000),
        beta=0,
    )


@register("fasterrcnn_vitdet_nano")
def fasterrcnn_vitdet_nano(*, num_classes: int, drop_path: float = 0.0) -> FasterRCNN:
    """A ViTDet of 8-px patches and few blocks that learns drawn shapes on a CPU in a minute (the demo's model)."""
    return FasterRCNN(
        Joined(
            ViT(
                width=96,
                depth=4,
                heads=3,
                patch=8,
                window=6,
                global_blocks=(1, 3),
                drop_path=drop_path,
                pretrain_grid=24,
                relative_grid=24,
                conv_stem=True,
            ),
            SimpleFeaturePyramid(stride=8, channels=96, width=64, scales=(1.0, 0.5)),
        ),
        RegionProposals(
            RPNHead(64, anchors_per_cell=3),
            Anchors({8: [32.0], 16: [56.0], 32: [96.0]}),
            keep_before_nms=(200, 200),
            keep_after_nms=(100, 100),
            samples=64,
        ),
        BoxHeads(TwoLayerHead(64, width=256), num_classes=num_classes, strides=(8, 16), samples=48),
    )
