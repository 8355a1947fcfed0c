"""What holds for every named detector, and the published numbers of some."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from boxwright import registry
from boxwright.models import checkpoint
from boxwright.models.backbones import from_torchvision
from boxwright.models.backbones.from_torchvision import Staged
from boxwright.models.checkpoint import Header
from boxwright.models.detectors.faster_rcnn import FasterRCNN
from boxwright.types import Batch, Detections

CLASSES = ["first", "second", "third"]
SIZES = ((64, 96), (50, 70))  # of the pictures, on a canvas of 64 x 96
LOSSES = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}


def make_batch() -> Batch:
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = (torch.tensor([[4.0, 6, 50, 60], [30.5, 2.25, 90, 40]]), torch.tensor([[10.0, 10, 60, 45]]))
    labels = (torch.tensor([0, 2]), torch.tensor([1]))
    difficult = (torch.zeros(2, dtype=torch.bool), torch.zeros(1, dtype=torch.bool))
    return Batch(("a", "b"), images, SIZES, boxes, labels, difficult)


def one_of(batch: Batch, i: int) -> Batch:
    rest = (batch.sizes, batch.boxes, batch.labels, batch.difficult)
    return Batch((batch.ids[i],), batch.images[i : i + 1], *((values[i],) for values in rest))


def lighten(detector: FasterRCNN) -> FasterRCNN:
    """The same with fewer regions, which cost most of the time and prove nothing more."""
    detector.rpn.keep_after_nms = (60, 60)
    detector.roi_heads.samples = 48
    return detector


@pytest.fixture(scope="module", params=registry.entries())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def detector(name: str) -> Iterator[FasterRCNN]:
    """With random weights, its BatchNorms used to the batch: without that no untrained ResNet is calm."""
    torch.manual_seed(0)
    built = lighten(registry.build(name, num_classes=len(CLASSES)))
    norms = [module for module in built.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        built.train().losses(make_batch())
    for norm in norms:
        norm.momentum = 0.1
    yield built
    built.to("meta")  # a name at a time in memory


@pytest.fixture(scope="module")
def predicted(detector: FasterRCNN) -> list[Detections]:
    return detector.eval().predict(make_batch())


# ------ The contract of every name


def test_losses_reach_every_parameter(detector: FasterRCNN) -> None:
    detector.train()
    torch.manual_seed(1)
    losses = detector.losses(make_batch())
    assert losses.keys() == LOSSES
    assert all(loss.ndim == 0 and loss >= 0 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name
    detector.zero_grad(set_to_none=True)


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


def test_pictures_together_are_pictures_one_by_one(detector: FasterRCNN, predicted: list[Detections]) -> None:
    for i, expected in enumerate(predicted):
        (alone,) = detector.eval().predict(one_of(make_batch(), i))
        same(alone, expected, 1e-4)


def test_a_checkpoint_brings_the_same_detector_back(
    name: str, detector: FasterRCNN, predicted: list[Detections], tmp_path: Path
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
        same(found, expected, 0)


def test_levels_are_as_promised(detector: FasterRCNN) -> None:
    """Strides and channels of every level; cells that the detector's anchors and pooling can trust."""
    detector.eval()
    with torch.no_grad():
        levels = detector.backbone(torch.zeros(1, 3, 64, 128))
    assert {stride: level.shape[1] for stride, level in levels.items()} == detector.backbone.channels
    for stride, level in levels.items():
        assert level.shape[2:] == (-(-64 // stride), -(-128 // stride))
    assert set(detector.rpn.anchors.strides) <= levels.keys()
    assert set(detector.roi_heads.strides) <= levels.keys()


def same(found: Detections, expected: Detections, atol: float) -> None:
    np.testing.assert_allclose(found.scores, expected.scores, atol=atol, rtol=0)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=atol * 100, rtol=0)  # of 96 pixels
    np.testing.assert_array_equal(found.labels, expected.labels)


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
    assert [i for i, block in enumerate(vit.blocks) if block.window == 0] == [2, 5, 8, 11]
    assert {block.window for block in vit.blocks} == {0, 14}
    for i in range(12):  # 14 windows, or the 64 cells of 1024 px: both ways, and none
        rows = 2 * (64 if i in (2, 5, 8, 11) else 14) - 1
        assert tables[f"blocks.{i}.attn.rel_pos_h"] == tables[f"blocks.{i}.attn.rel_pos_w"] == (rows, 64)
    assert {norm.eps for norm in detector.modules() if isinstance(norm, nn.LayerNorm)} == {1e-6}
    assert not any(vit.get_parameter(name).any() for name in tables)  # no opinion before training


@pytest.mark.parametrize("name", ["fasterrcnn_vitdet_tiny", "fasterrcnn_vitdet_nano"])
def test_options_of_the_vit(name: str) -> None:
    detector = registry.build(name, num_classes=1, drop_path=0.2)
    assert detector.backbone.body.blocks[-1].drop_path == pytest.approx(0.2)
    assert registry.build(
        "fasterrcnn_vitdet_tiny", num_classes=1, checkpoint_blocks=True
    ).backbone.body.checkpoint_blocks


# ------ Backbones cut out of torchvision's


def by_hand(net: Any, images: Tensor) -> dict[int, Tensor]:
    """torchvision's ResNet up to its pooling, stage by stage."""
    x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
    maps = {}
    for stride, stage in ((4, net.layer1), (8, net.layer2), (16, net.layer3), (32, net.layer4)):
        maps[stride] = x = stage(x)
    return maps


def check_maps(body: Staged, found: dict[int, Tensor], expected: dict[int, Tensor]) -> None:
    assert {stride: level.shape[1] for stride, level in found.items()} == body.channels
    assert found.keys() == expected.keys()
    for stride, level in expected.items():
        torch.testing.assert_close(found[stride], level, msg=str(stride))


@torch.no_grad()
def test_resnet_is_torchvision_s() -> None:
    net, body = torchvision.models.resnet50(weights=None).eval(), from_torchvision.resnet(50).eval()
    state = {key: value for key, value in net.state_dict().items() if not key.startswith("fc.")}
    body.load_state_dict(state)
    images = torch.randn(1, 3, 64, 96)
    check_maps(body, body(images), by_hand(net, images))


@torch.no_grad()
def test_mobilenet_is_torchvision_s_with_its_norms_frozen() -> None:
    net, body = torchvision.models.mobilenet_v2(weights=None), from_torchvision.mobilenet_v2()
    for key, value in net.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        if key.endswith("running_mean"):
            value.normal_(std=0.1)
    body.load_state_dict(net.features.state_dict())
    x = images = torch.randn(2, 3, 64, 96)
    expected = {}
    for i, layer in enumerate(net.eval().features):
        x = layer(x)
        if i in (3, 6, 13, 18):  # the last of each stride
            expected[{3: 4, 6: 8, 13: 16, 18: 32}[i]] = x
    check_maps(body, body.eval()(images), expected)
    before = {key: value.clone() for key, value in body.state_dict().items()}
    check_maps(body, body.train()(images), expected)  # nor do they learn from a batch
    assert all(torch.equal(value, before[key]) for key, value in body.state_dict().items())


@torch.no_grad()
def test_squeezenet_is_torchvision_s_but_for_its_padding() -> None:
    """With torchvision's padding of none our layers give torchvision's numbers."""
    net, body = torchvision.models.squeezenet1_1(weights=None).eval(), from_torchvision.squeezenet1_1().eval()
    state = net.features.state_dict()
    assert list(body.state_dict()) == list(state)
    body.load_state_dict(state)
    for layer, theirs in zip(body.values(), net.features, strict=True):
        assert type(layer) is type(theirs)
        if isinstance(layer, nn.MaxPool2d | nn.Conv2d):
            layer.padding = theirs.padding
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = theirs.ceil_mode
    x = images = torch.randn(1, 3, 96, 128)
    expected = {}
    for i, layer in enumerate(net.features):
        x = layer(x)
        if i in (7, 12):
            expected[{7: 8, 12: 16}[i]] = x
    check_maps(body, body(images), expected)


@pytest.mark.parametrize(
    "body", [from_torchvision.squeezenet1_1, from_torchvision.mobilenet_v2, lambda: from_torchvision.resnet(50)]
)
@torch.no_grad()
def test_cells_lie_on_their_strides(body: Callable[[], Staged]) -> None:
    """What a pixel at 640 reaches lies evenly about cell 640 / stride: there the anchors stand and regions are read."""
    net = body().eval()
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.1 if parameter.ndim > 1 else 0)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d):
            nn.init.ones_(norm.weight)
    image = torch.zeros(1, 3, 32, 1280)
    image[:, :, 16, 640] = 1
    for stride, level in net(image).items():
        reached = level.amax(dim=(0, 1, 2)).nonzero()  # columns
        assert (reached.min() + reached.max()).item() == 2 * 640 // stride, stride
        assert len(reached) < level.shape[3] / 2


def test_layers_behind_the_last_tap_are_left_out() -> None:
    layers = {"a": nn.Conv2d(3, 4, 2, stride=2), "b": nn.Conv2d(4, 5, 2, stride=2), "c": nn.Conv2d(5, 6, 2, stride=2)}
    body = Staged(layers, {"b": (4, 5), "a": (2, 4)})
    assert list(body.state_dict()) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert {s: tuple(m.shape) for s, m in body(torch.zeros(1, 3, 8, 8)).items()} == {2: (1, 4, 4, 4), 4: (1, 5, 2, 2)}
