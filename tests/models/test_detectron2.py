"""detectron2's ViTDet weights in our detectors, from tensors in its layout as its code and its files have it."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from boxwright import registry
from boxwright.models.detectors.boxes import FPN_ANCHORS, Anchors
from boxwright.models.detectors.cascade_rcnn import STAGES, CascadeHeads, CascadeRCNN
from boxwright.models.detectors.faster_rcnn import BoxHeads, ConvHead, FasterRCNN, RegionProposals, RPNHead
from boxwright.models.detectron2 import looks_like, to_ours
from boxwright.models.pickles import read_detectron2
from boxwright.models.pyramid import Joined, SimpleFeaturePyramid
from boxwright.models.vit import ViT
from boxwright.types import Batch

Shapes = dict[str, tuple[int, ...]]
PIXEL_BUFFERS = {"pixel_mean", "pixel_std"}


def normed(name: str, shape: tuple[int, ...]) -> Shapes:
    """A convolution without bias, and its LayerNorm."""
    return {f"{name}.weight": shape, f"{name}.norm.weight": shape[:1], f"{name}.norm.bias": shape[:1]}


def layer(name: str, shape: tuple[int, ...], outputs: int | None = None) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": (outputs or shape[0],)}


def published(
    width: int,
    depth: int,
    heads: int,
    global_blocks: set[int],
    *,
    cascade: bool,
    classes: int = 80,
    mask: bool = True,
    channels: int = 256,
    hidden: int = 1024,
) -> Shapes:
    """Names and shapes of detectron2's mask_rcnn_vitdet_* and cascade_mask_rcnn_vitdet_*, as its configs build them."""
    shapes: Shapes = {"backbone.net.pos_embed": (1, 14 * 14 + 1, width)}
    shapes |= layer("backbone.net.patch_embed.proj", (width, 3, 16, 16))
    for i in range(depth):
        block, rows = f"backbone.net.blocks.{i}", 127 if i in global_blocks else 27
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        shapes |= {f"{block}.attn.rel_pos_{axis}": (rows, width // heads) for axis in "hw"}
        shapes |= layer(f"{block}.attn.qkv", (3 * width, width)) | layer(f"{block}.attn.proj", (width, width))
        shapes |= layer(f"{block}.mlp.fc1", (4 * width, width)) | layer(f"{block}.mlp.fc2", (width, 4 * width))
    half, quarter = width // 2, width // 4
    shapes |= layer("backbone.simfp_2.0", (width, half, 2, 2), half)
    shapes |= {"backbone.simfp_2.1.weight": (half,), "backbone.simfp_2.1.bias": (half,)}
    shapes |= layer("backbone.simfp_2.3", (half, quarter, 2, 2), quarter)
    shapes |= layer("backbone.simfp_3.0", (width, half, 2, 2), half)
    for level, first, source in ((2, 4, quarter), (3, 1, half), (4, 0, width), (5, 1, width)):
        shapes |= normed(f"backbone.simfp_{level}.{first}", (channels, source, 1, 1))
        shapes |= normed(f"backbone.simfp_{level}.{first + 1}", (channels, channels, 3, 3))
    rpn = "proposal_generator.rpn_head"
    for i in range(2):
        shapes |= layer(f"{rpn}.conv.conv{i}", (channels, channels, 3, 3))
    shapes |= layer(f"{rpn}.objectness_logits", (3, channels, 1, 1))
    shapes |= layer(f"{rpn}.anchor_deltas", (12, channels, 1, 1))
    for stage in (".0", ".1", ".2") if cascade else ("",):
        for i in range(1, 5):
            shapes |= normed(f"roi_heads.box_head{stage}.conv{i}", (channels, channels, 3, 3))
        shapes |= layer(f"roi_heads.box_head{stage}.fc1", (hidden, channels * 7 * 7))
        shapes |= layer(f"roi_heads.box_predictor{stage}.cls_score", (classes + 1, hidden))
        shapes |= layer(f"roi_heads.box_predictor{stage}.bbox_pred", (4 if cascade else 4 * classes, hidden))
    if mask:
        for i in range(1, 5):
            shapes |= normed(f"roi_heads.mask_head.mask_fcn{i}", (channels, channels, 3, 3))
        shapes |= layer("roi_heads.mask_head.deconv", (channels, channels, 2, 2))
        shapes |= layer("roi_heads.mask_head.predictor", (classes, channels, 1, 1))
    return shapes


FORMS = {
    "b": (768, 12, 12, {2, 5, 8, 11}),
    "l": (1024, 24, 16, {5, 11, 17, 23}),
    "h": (1280, 32, 16, {7, 15, 23, 31}),
}


@pytest.mark.parametrize(
    ("size", "cascade", "millions"),  # of parameters, as the article counts them (table 4 of arXiv:2203.16527)
    [("b", False, 111), ("l", False, 331), ("h", False, 662), ("b", True, 141), ("l", True, 361), ("h", True, 692)],
)
def test_published_names_and_shapes_are_ours(size: str, cascade: bool, millions: int) -> None:
    shapes = published(*FORMS[size], cascade=cascade)
    assert sum(np.prod(shape) for shape in shapes.values()) / 1e6 == pytest.approx(millions, abs=1)
    with torch.device("meta"):
        model = registry.build(f"cascade_vitdet_{size}" if cascade else f"vitdet_{size}", num_classes=80)
        found, notes = to_ours({name: torch.empty(shape) for name, shape in shapes.items()})
    own = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in PIXEL_BUFFERS}
    assert {name: tuple(value.shape) for name, value in found.items()} == own
    assert notes[1:] == ("left out: the mask head (16 tensors)",)
    blocks = model.backbone.body.blocks
    assert len(blocks) == FORMS[size][1]


def test_drop_path_is_the_configs() -> None:
    for size, rate in (("b", 0.1), ("l", 0.4), ("h", 0.5)):
        for name in (f"vitdet_{size}", f"cascade_vitdet_{size}"):
            with torch.device("meta"):
                assert registry.build(name, num_classes=1).backbone.body.drop_path == rate


# ------ A small one, there and back


def small(*, cascade: bool, classes: int) -> FasterRCNN:
    """ViTDet's form, 32 wide, its levels 16."""

    def head(**options: object) -> BoxHeads:
        return BoxHeads(
            ConvHead(16, width=64, norm="layer"),
            num_classes=classes,
            strides=(4, 8, 16, 32),
            points=0,
            aligned=True,
            beta=0,
            score_threshold=0.0,
            nms_threshold=0.9,
            **options,
        )

    backbone = Joined(
        ViT(width=32, depth=3, heads=2, window=14, global_blocks=(1,), drop_path=0.1),
        SimpleFeaturePyramid(16, 32, width=16),
    )
    rpn = RegionProposals(RPNHead(16, 3, depth=2), Anchors(FPN_ANCHORS, rounded=False), keep_after_nms=(20, 20), beta=0)
    if not cascade:
        return FasterRCNN(backbone, rpn, head())
    stages = [head(class_agnostic=True, foreground_overlap=o, box_weights=w) for o, w in STAGES]
    return CascadeRCNN(backbone, rpn, CascadeHeads(stages))


def in_their_layout(state: dict[str, Tensor], classes: int, *, cascade: bool) -> dict[str, Tensor]:
    """Our tensors as detectron2 keeps them, each of its names looked up in ours: its files' contents."""
    theirs: dict[str, Tensor] = {}
    for name in published(32, 3, 2, {1}, cascade=cascade, classes=classes, mask=False, channels=16, hidden=64):
        words = name.split(".")
        match words:
            case ["backbone", "net", *rest]:
                ours = ["backbone", "body", *rest]
            case ["backbone", *rest]:
                ours = ["backbone", "fpn", *rest]
            case ["proposal_generator", "rpn_head", "conv", conv, kind]:
                ours = ["rpn", "head", "conv", conv[-1], "0", kind]
            case ["proposal_generator", "rpn_head", what, kind]:
                ours = ["rpn", "head", {"objectness_logits": "cls_logits", "anchor_deltas": "bbox_pred"}[what], kind]
            case ["roi_heads", part, *rest]:
                stage = ["stages", rest.pop(0)] if cascade else []
                conv = {f"conv{i}": str(i - 1) for i in range(1, 5)}.get(rest[0])
                if rest[0] == "fc1":
                    rest = ["5", rest[1]]
                elif conv:
                    rest = [conv, "1", rest[2]] if rest[1] == "norm" else [conv, "0", rest[1]]
                ours = ["roi_heads", *stage, part, *rest]
        value = state[".".join(ours)]
        if "cls_score" in name:  # foreground first, background last
            value = torch.stack([*value[1:], value[0]])
        elif "bbox_pred" in name and not cascade and "roi_heads" in name:
            value = value[4:]  # no boxes of the background
        theirs[name] = value
    return theirs


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("cascade", [False, True])
def test_a_detector_comes_back_whole_and_finds_the_same(cascade: bool, classes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small(cascade=cascade, classes=classes).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.add_(torch.randn_like(value) * 0.02)  # also where it starts as zero
            if not cascade and "roi_heads.box_predictor.bbox_pred" in name:
                value[:4] = 0  # which detectron2 does not have
    state = {name: value for name, value in model.state_dict().items() if name not in PIXEL_BUFFERS}
    theirs = in_their_layout(state, classes, cascade=cascade)
    theirs |= {"roi_heads.mask_head.predictor.bias": torch.ones(classes), "pixel_mean": torch.ones(3, 1, 1)}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(
        pickle.dumps({"model": {name: value.numpy() for name, value in theirs.items()}, "__author__": "us"})
    )
    read = read_detectron2(path)
    assert looks_like(read)
    found, notes = to_ours(read)
    assert notes[1:] == (
        "left out: the mask head (1 tensors)",
        "left out: the pixels' mean and deviation, which are ImageNet's (1 tensors)",
    )
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(found[name], value), name
    again = small(cascade=cascade, classes=classes).eval()
    assert set(again.load_state_dict(found, strict=False).missing_keys) == PIXEL_BUFFERS
    images = torch.randint(0, 256, (1, 3, 96, 128), dtype=torch.uint8)
    batch = Batch(("a",), images, ((96, 120),), (), (), ())
    (expected,), (detections,) = model.predict(batch), again.predict(batch)
    assert len(expected) > 5
    np.testing.assert_array_equal(detections.boxes, expected.boxes)
    np.testing.assert_array_equal(detections.scores, expected.scores)
    np.testing.assert_array_equal(detections.labels, expected.labels)


def test_background_moves_to_the_front() -> None:
    """Classes 0 1 2 and the background of a Faster R-CNN, the rows written by hand."""
    predictor = "roi_heads.box_predictor."
    found, _ = to_ours(
        {
            f"{predictor}cls_score.bias": torch.tensor([10.0, 11, 12, -1]),
            f"{predictor}cls_score.weight": torch.tensor([[10.0], [11], [12], [-1]]),
            f"{predictor}bbox_pred.bias": torch.arange(12.0),
        }
    )
    assert found[f"{predictor}cls_score.bias"].tolist() == [-1, 10, 11, 12]
    assert found[f"{predictor}cls_score.weight"].tolist() == [[-1], [10], [11], [12]]
    assert found[f"{predictor}bbox_pred.bias"].tolist() == [0, 0, 0, 0, *range(12)]


def test_what_is_unknown_keeps_its_name_and_lvis_is_told() -> None:
    unknown = {
        "roi_heads.keypoint_head.score.bias": torch.ones(2),
        "roi_heads.box_predictor.cls_score.bias": torch.ones(1204),
    }
    found, notes = to_ours(unknown)
    assert "roi_heads.keypoint_head.score.bias" in found
    assert any("LVIS" in note for note in notes)
    assert not any("LVIS" in note for note in to_ours({"roi_heads.box_predictor.cls_score.bias": torch.ones(81)})[1])


def test_only_theirs_look_like_it() -> None:
    assert looks_like(published(*FORMS["b"], cascade=True))
    with torch.device("meta"):
        assert not looks_like(registry.build("vitdet_b", num_classes=3).state_dict())
    assert not looks_like([])
    assert not looks_like(["backbone.net.pos_embed", "rpn.head.conv.weight", "roi_heads.box_head.fc6.weight"])
    assert not looks_like(["backbone.bottom_up.stem.conv1.weight", "proposal_generator.rpn_head.conv.weight"])
