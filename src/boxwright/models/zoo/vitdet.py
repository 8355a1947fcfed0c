"""Detectors on our own plain Vision Transformer."""

from __future__ import annotations

from boxwright.models.detectors.boxes import FPN_ANCHORS, Anchors
from boxwright.models.detectors.faster_rcnn import BoxHeads, FasterRCNN, RegionProposals, RPNHead, TwoLayerHead
from boxwright.models.pyramid import Joined, SimpleFeaturePyramid
from boxwright.models.vit import ViT
from boxwright.registry import register


@register("fasterrcnn_vitdet")
def fasterrcnn_vitdet(*, num_classes: int, drop_path: float = 0.1, checkpoint_blocks: bool = False) -> FasterRCNN:
    """ViT-B/16, window 14, global blocks 2 5 8 11, simple feature pyramid (the article's model)."""
    return FasterRCNN(
        Joined(
            ViT(
                width=768,
                depth=12,
                heads=12,
                patch=16,
                window=14,
                global_blocks=(2, 5, 8, 11),
                drop_path=drop_path,
                checkpoint_blocks=checkpoint_blocks,
            ),
            SimpleFeaturePyramid(stride=16, channels=768, width=256),
        ),
        RegionProposals(RPNHead(256, anchors_per_cell=3), Anchors(FPN_ANCHORS)),
        BoxHeads(TwoLayerHead(256), num_classes=num_classes, strides=(4, 8, 16, 32, 64)),
    )


@register("fasterrcnn_vitdet_tiny")
def fasterrcnn_vitdet_tiny(*, num_classes: int, drop_path: float = 0.1, checkpoint_blocks: bool = False) -> FasterRCNN:
    """ViT-Tiny/16 (192 wide, 3 heads) in the same form as `fasterrcnn_vitdet`."""
    return FasterRCNN(
        Joined(
            ViT(
                width=192,
                depth=12,
                heads=3,
                patch=16,
                window=14,
                global_blocks=(2, 5, 8, 11),
                drop_path=drop_path,
                checkpoint_blocks=checkpoint_blocks,
            ),
            SimpleFeaturePyramid(stride=16, channels=192, width=256),
        ),
        RegionProposals(RPNHead(256, anchors_per_cell=3), Anchors(FPN_ANCHORS)),
        BoxHeads(TwoLayerHead(256), num_classes=num_classes, strides=(4, 8, 16, 32, 64)),
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
