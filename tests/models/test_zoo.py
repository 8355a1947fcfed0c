"""What holds for every name of the registry, and the published numbers of some.

The big ones (`BIG`) are built on the meta device only, where tensors have shapes but no values; those of them that fit
into 16 GB while training keep the whole contract too, under the mark `slow`.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from boxwright import registry
from boxwright.models import checkpoint, winograd
from boxwright.models.checkpoint import Header
from boxwright.models.detectors.base import Detector
from boxwright.models.detectors.faster_rcnn import BoxHeads, FasterRCNN, RegionProposals
from boxwright.models.summary import summarise
from boxwright.testing import assert_is_backbone
from boxwright.types import Batch, Detections

CLASSES = ["first", "second", "third"]
SIZES = ((64, 96), (50, 70))  # of the pictures, on a canvas of 64 x 96
LOSSES = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}

BIG = re.compile(
    r"vitdet_[lh]|cascade_vitdet|vit[lh]16|convnext_(base|large)|resnet152"
)  # 80 to 900 million parameters
BIGGEST = re.compile(r"vitdet_h|vith16")  # 650 million and more

# Fewer regions, which cost most of the time and prove nothing more; every score counts, so that there is a detection;
# nothing is dropped by chance.
LIGHT = {
    "keep_before_nms": (100, 100), "keep_after_nms": (60, 60), "candidates_per_level": 60, "score_threshold": 0.0,
    "drop_path": 0.0, "drop_prob": 0.0, "p": 0.0,
}  # fmt: skip


def make_batch() -> Batch:
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = (torch.tensor([[4.0, 6, 50, 60], [30.5, 2.25, 90, 40]]), torch.tensor([[10.0, 10, 60, 45]]))
    labels = (torch.tensor([0, 2]), torch.tensor([1]))
    difficult = (torch.zeros(2, dtype=torch.bool), torch.zeros(1, dtype=torch.bool))
    return Batch(("a", "b"), images, SIZES, boxes, labels, difficult)


def one_of(batch: Batch, i: int) -> Batch:
    rest = (batch.sizes, batch.boxes, batch.labels, batch.difficult)
    return Batch((batch.ids[i],), batch.images[i : i + 1], *((values[i],) for values in rest))


def lighten(detector: Detector) -> Detector:
    for module in detector.modules():
        for name, value in LIGHT.items():
            if isinstance(getattr(module, name, None), type(value)):
                setattr(module, name, value)
        if isinstance(module, BoxHeads):
            module.samples = 24
        if isinstance(module, RegionProposals):
            module.samples = 10_000  # all, so that the few anchors of the coarsest level are among them
    return detector


@torch.no_grad()
def settle(detector: Detector) -> None:
    """Every BatchNorm, learning or frozen, used to the batch: without that no untrained ResNet is calm.

    None of them starts as zero, as in timm's residual branches: behind zeros no gradient arrives at first.
    """

    def adopt(norm: FrozenBatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        norm.running_var, norm.running_mean = torch.var_mean(inputs[0], dim=(0, 2, 3))

    norms = [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d)]
    frozen = [module for module in detector.modules() if isinstance(module, FrozenBatchNorm2d)]
    handles = [norm.register_forward_pre_hook(adopt) for norm in frozen]
    if not norms and not frozen:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        if not norm.weight.any():
            nn.init.ones_(norm.weight)
    detector.train().losses(make_batch())
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for handle in handles:
        handle.remove()


@torch.no_grad()
def sharpen(detector: Detector) -> Detector:
    """Scores far apart and boxes off their lattice: of an untrained head's, rounding decides whom NMS keeps."""
    for name, parameter in detector.named_parameters():
        if name.endswith(("cls_logits.weight", "cls_score.weight")):
            parameter.mul_(30)
        if name.endswith("bbox_pred.weight"):
            parameter.mul_(3)
    return detector


def named(names: Iterable[str]) -> list[object]:
    return [pytest.param(name, marks=pytest.mark.slow if BIG.search(name) else ()) for name in names]


@pytest.fixture(scope="module", params=named(name for name in registry.entries() if not BIGGEST.search(name)))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@dataclass(frozen=True)
class Trained:
    """A detector after two steps of training, and what they showed."""

    detector: Detector
    losses: list[dict[str, float]]  # of each step
    without: list[str]  # parameters that the first step had no gradient for, or a gradient of zero


@pytest.fixture(scope="module")
def trained(name: str) -> Iterator[Trained]:
    torch.manual_seed(0)
    detector = lighten(registry.build(name, num_classes=len(CLASSES)))
    settle(detector)
    detector.train()
    optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=1e-4)
    steps, without = [], []
    for step in range(2):
        losses = detector.losses(make_batch())
        assert all(loss.ndim == 0 for loss in losses.values())
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        if step == 0:
            learning = [(name, p.grad) for name, p in detector.named_parameters() if p.requires_grad]
            without = [name for name, gradient in learning if gradient is None or not gradient.any()]
        optimizer.step()
        steps.append({name: loss.item() for name, loss in losses.items()})
    optimizer.zero_grad()
    yield Trained(detector, steps, without)
    detector.to("meta")  # a name at a time in memory


@pytest.fixture(scope="module")
def detector(trained: Trained) -> Detector:
    return trained.detector.eval()


@pytest.fixture(scope="module")
def predicted(detector: Detector) -> list[Detections]:
    return detector.predict(make_batch())


# ------ The contract of every name


def test_losses_reach_every_parameter(trained: Trained) -> None:
    assert not trained.without
    for losses in trained.losses:
        assert losses.keys() == LOSSES if type(trained.detector) is FasterRCNN else losses
        assert all(loss >= 0 for loss in losses.values())


def test_steps_of_training_stay_finite(trained: Trained) -> None:
    assert all(math.isfinite(loss) for losses in trained.losses for loss in losses.values())
    state = trained.detector.state_dict()
    assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())


def test_predictions_are_boxes_in_the_picture(predicted: list[Detections]) -> None:
    for detections, (height, width) in zip(predicted, SIZES, strict=True):
        assert 0 < len(detections) <= 100
        x1, y1, x2, y2 = detections.boxes.T
        assert (x1 >= 0).all()
        assert (y1 >= 0).all()
        assert (x1 < x2).all()
        assert (y1 < y2).all()
        assert (x2 <= width).all()
        assert (y2 <= height).all()
        assert (np.diff(detections.scores) <= 0).all()
        assert ((detections.scores > 0) & (detections.scores <= 1)).all()
        assert set(detections.labels.tolist()) <= set(range(len(CLASSES)))
        kinds = (detections.boxes.dtype, detections.scores.dtype, detections.labels.dtype)
        assert kinds == (np.float32, np.float32, np.int64)


def test_pictures_together_are_pictures_one_by_one(detector: Detector) -> None:
    detector = sharpen(copy.deepcopy(detector))
    for i, expected in enumerate(detector.predict(make_batch())):
        (alone,) = detector.predict(one_of(make_batch(), i))
        assert len(alone) == pytest.approx(len(expected), rel=0.1)
        assert shared(alone, expected) >= 0.9 * len(expected)  # boxes that overlap just so much may go or stay


def test_a_checkpoint_brings_the_same_detector_back(
    name: str, detector: Detector, predicted: list[Detections], tmp_path: Path
) -> None:
    header = Header(model=name, options={}, classes=CLASSES, fit={"imgsz": 96, "square": False}, epoch=3)
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, detector, header)
    again, read = checkpoint.load(path)
    path.unlink()
    assert not again.training
    assert replace(read, sha256="") == header
    state = again.state_dict()
    for key, value in detector.state_dict().items():
        assert state[key].dtype == value.dtype, key
        assert torch.equal(state.pop(key), value), key
    assert not state
    for found, expected in zip(lighten(again).predict(make_batch()), predicted, strict=True):
        same(found, expected)


def test_levels_are_as_promised(detector: Detector) -> None:
    """Strides and channels of every level; cells that the detector's anchors and pooling can trust."""
    with torch.no_grad():
        levels = detector.backbone(torch.zeros(1, 3, 64, 128))
    assert {stride: level.shape[1] for stride, level in levels.items()} == detector.backbone.channels
    for stride, level in levels.items():
        assert level.shape[2:] == (-(-64 // stride), -(-128 // stride))
    if isinstance(detector, FasterRCNN):
        assert set(detector.rpn.anchors.strides) <= levels.keys()
        assert set(detector.roi_heads.strides) <= levels.keys()


def shared(found: Detections, expected: Detections) -> int:
    """How many of the expected are found, in whatever order: scores that are next to equal may change places."""
    boxes = np.abs(found.boxes[:, None] - expected.boxes).max(axis=2) < 0.1  # (found, expected); of 96 pixels
    scores = np.abs(found.scores[:, None] - expected.scores) < 1e-3
    return int((boxes & scores & (found.labels[:, None] == expected.labels)).any(axis=0).sum())


def same(found: Detections, expected: Detections) -> None:
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    np.testing.assert_array_equal(found.labels, expected.labels)


@pytest.mark.parametrize("name", [name for name in registry.entries() if BIG.search(name)], ids="{}-on-meta".format)
def test_the_big_ones_without_their_values(name: str) -> None:
    """They run on pictures of their own size, and are as big as is said here."""
    found = summarise(name, num_classes=len(CLASSES), size=256)
    assert found.parameters > 60e6
    assert found.backbone_gflops > 0
    assert (found.parameters > 400e6) == bool(BIGGEST.search(name))


@pytest.mark.parametrize("name", named(name for name in registry.entries("backbone") if not BIGGEST.search(name)))
def test_every_backbone_keeps_its_contract(name: str) -> None:
    assert_is_backbone(registry.build(name, kind="backbone"))


# ------ Names

OF_THE_ARTICLE = [
    "resnet50_fpn", "resnet50_fpn_v2", "resnet18", "resnet101", "resnet152", "custom_resnet", "darknet",
    "mini_darknet", "mini_darknet_nano_head", "nano", "vgg16", "squeezenet1_0", "squeezenet1_1",
    "squeezenet1_1_small_head", "mini_squeezenet1_1_small_head", "mini_squeezenet1_1_tiny_head",
    "mobilenetv3_large_fpn", "mobilenetv3_large_320_fpn", "mbv3_large", "mbv3_small_nano_head", "efficientnet_b0",
    "efficientnet_b4", "convnext_tiny", "convnext_small", "regnet_y_400mf", "mobilevit_xxs", "vitdet", "vitdet_tiny",
    "dinov3_vits16", "dinov3_vits16plus", "dinov3_vitb16", "dinov3_vitl16", "dinov3_vith16plus",
    "dinov3_convnext_tiny", "dinov3_convnext_tiny_multifeat", "dinov3_convnext_small", "dinov3_convnext_base",
    "dinov3_convnext_large",
]  # fmt: skip


def test_every_model_of_the_article_s_codebase_has_its_name() -> None:
    assert len(OF_THE_ARTICLE) == 38
    assert not {f"fasterrcnn_{name}" for name in OF_THE_ARTICLE} - registry.entries().keys()


def test_every_name_has_a_line_of_description() -> None:
    for kind in ("detector", "backbone", "pyramid"):
        for entry in registry.entries(kind).values():
            assert entry.summary.endswith("."), entry.name


# ------ Published numbers

MAE_BLOCK = {
    "norm1": (768,), "attn.qkv": (2304, 768), "attn.proj": (768, 768),
    "norm2": (768,), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072),
}  # fmt: skip


def test_the_article_s_model() -> None:
    """Its parameters to the last one, and MAE's names and shapes for all that it shares with MAE."""
    detector = registry.build("fasterrcnn_vitdet", num_classes=20)
    assert sum(p.numel() for p in detector.parameters()) == 106_046_264
    vit = detector.backbone.body
    published = {
        "pos_embed": (1, 197, 768), "patch_embed.proj.weight": (768, 3, 16, 16), "patch_embed.proj.bias": (768,)
    }  # fmt: skip
    for i in range(12):
        for layer, shape in MAE_BLOCK.items():
            published |= {f"blocks.{i}.{layer}.weight": shape, f"blocks.{i}.{layer}.bias": shape[:1]}
    own = {name: tuple(value.shape) for name, value in vit.state_dict().items()}
    tables = {name: own.pop(name) for name in list(own) if "rel_pos" in name}
    assert own == published
    assert [i for i, block in enumerate(vit.blocks) if block.attn.window == 0] == [2, 5, 8, 11]
    assert {block.attn.window for block in vit.blocks} == {0, 14}
    for i in range(12):  # 14 windows, or the 64 cells of 1024 px: both ways, and none
        rows = 2 * (64 if i in (2, 5, 8, 11) else 14) - 1
        assert tables[f"blocks.{i}.attn.rel_pos_h"] == tables[f"blocks.{i}.attn.rel_pos_w"] == (rows, 64)
    assert {norm.eps for norm in detector.modules() if isinstance(norm, nn.LayerNorm)} == {1e-6}
    assert not any(vit.get_parameter(name).any() for name in tables)  # no opinion before training


@pytest.mark.parametrize("name", ["fasterrcnn_vitdet_tiny", "fasterrcnn_vitdet_nano"])
def test_options_of_the_vit(name: str) -> None:
    detector = registry.build(name, num_classes=1, drop_path=0.2)
    assert detector.backbone.body.drop_path == pytest.approx(0.2)
    assert registry.build(
        "fasterrcnn_vitdet_tiny", num_classes=1, checkpoint_blocks=True
    ).backbone.body.checkpoint_blocks


# ------ torchvision's detectors: its weights by key, its boxes


TORCHVISION = {
    "fasterrcnn_resnet50_fpn": detection.fasterrcnn_resnet50_fpn,
    "fasterrcnn_mobilenetv3_large_fpn": detection.fasterrcnn_mobilenet_v3_large_fpn,
    "fasterrcnn_mobilenetv3_large_320_fpn": detection.fasterrcnn_mobilenet_v3_large_320_fpn,
}
EPS = {
    "fasterrcnn_resnet50_fpn": 0.0
}  # of BatchNorm, which torchvision sets when it loads the COCO weights; elsewhere 1e-5


@pytest.fixture(scope="module", params=TORCHVISION)
def pair(request: pytest.FixtureRequest) -> tuple[FasterRCNN, detection.FasterRCNN]:
    """torchvision's detector without its resizing, and ours with the same weights."""
    torch.manual_seed(0)
    theirs = TORCHVISION[request.param](weights=None, weights_backbone=None, num_classes=4)
    theirs.transform.resize = lambda image, target: (image, target)
    norms = [module for module in theirs.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    theirs.train()(list(torch.rand(2, 3, 128, 192)), [nothing, nothing])
    for norm in norms:
        norm.eps = EPS.get(request.param, 1e-5)
        norm.running_var.clamp_(min=0.01)  # what hardly varies would blow rounding errors up
    state = theirs.eval().state_dict()
    state["rpn.head.cls_logits.weight"].normal_(std=0.1)  # scores that are apart, on both sides of 0.05
    state["rpn.head.cls_logits.bias"].fill_(-3.0)
    state["roi_heads.box_predictor.cls_score.weight"].normal_(std=0.02)
    ours = registry.build(request.param, num_classes=3)
    keys = ours.load_state_dict(state, strict=False)
    assert set(keys.missing_keys) == {"pixel_mean", "pixel_std"}
    assert not keys.unexpected_keys
    frozen = [module for module in ours.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert [norm.eps for norm in frozen] == [norm.eps for norm in norms]
    return ours.eval(), theirs


@torch.no_grad()
def test_same_boxes_as_torchvision(
    pair: tuple[FasterRCNN, detection.FasterRCNN], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "FEWEST_CELLS", 10**9)  # its rounding is another test's subject
    ours, theirs = pair
    sizes = ((128, 192), (100, 140))  # a canvas of whole cells of stride 64: torchvision guesses strides from sizes
    images = torch.randint(0, 256, (2, 3, 128, 192), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = [image[:, :h, :w] / 255 for image, (h, w) in zip(images, sizes, strict=True)]
    maps = ours.backbone(ours.normalise(Batch(("a", "b"), images, sizes, (), (), ())))
    wanted = [len(proposals) for proposals in propose(theirs, pictures)]
    assert [len(proposals) for proposals in ours.rpn.propose(maps, sizes)] == wanted
    found = ours.predict(Batch(("a", "b"), images, sizes, (), (), ()))
    for mine, other in zip(found, theirs(pictures), strict=True):
        assert len(mine) == len(other["scores"]) > 10
        np.testing.assert_allclose(mine.boxes, other["boxes"].numpy(), atol=0.01)
        np.testing.assert_allclose(mine.scores, other["scores"].numpy(), atol=1e-4)
        np.testing.assert_array_equal(mine.labels + 1, other["labels"].numpy())


def propose(theirs: detection.FasterRCNN, pictures: list[Tensor]) -> list[Tensor]:
    images, _ = theirs.transform(pictures)
    return theirs.rpn(images, theirs.backbone(images.tensors))[0]
