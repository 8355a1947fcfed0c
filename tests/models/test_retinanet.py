"""Our RetinaNet against torchvision's, with the same weights; what holds for FCOS too stands in test_dense.py."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import retinanet as torchvision_retinanet
from torchvision.models.detection import retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from boxwright import registry
from boxwright.models.detectors.boxes import Truth
from boxwright.models.detectors.dense import published_tensors
from boxwright.models.detectors.retinanet import RetinaNet, RetinaNetHead, anchors_for
from boxwright.models.pyramid import FPN, Joined, group_norm
from boxwright.types import Batch

PIXEL_BUFFERS = {"pixel_mean", "pixel_std"}
CHANNELS = {8: 8, 16: 12, 32: 16}
STRIDES = (8, 16, 32, 64, 128)
WIDTH, CLASSES = 64, 3
SIZES = ((128, 256), (100, 140))  # on a canvas of whole cells of 128: torchvision guesses strides from rounded sizes


class Body(nn.Module):
    """A backbone of a convolution a stride."""

    channels = CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 9, stride=8, padding=4)
        self.next = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.last = nn.Conv2d(12, 16, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        c3 = self.stem(images).relu()
        c4 = self.next(c3).relu()
        return {8: c3, 16: c4, 32: self.last(c4).relu()}


class TorchvisionBackbone(nn.Module):
    out_channels = WIDTH

    def __init__(self, p6_channels: int) -> None:
        super().__init__()
        self.body = Body()
        self.fpn = FeaturePyramidNetwork(list(CHANNELS.values()), WIDTH, LastLevelP6P7(p6_channels, WIDTH))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(s), level) for s, level in self.body(images).items()))


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    boxes = (
        torch.tensor([[10.0, 20, 90, 100], [60.5, 30.25, 250, 126], [64, 32, 80, 44], [130, 10, 133, 15]]),
        torch.tensor([[5.0, 5, 70, 60]]),
    )
    return Batch(
        ("a", "b"),
        torch.randint(0, 256, (2, 3, 128, 256), dtype=torch.uint8, generator=generator),
        SIZES,
        boxes,
        tuple(torch.arange(len(b)) % CLASSES for b in boxes),
        tuple(torch.zeros(len(b), dtype=torch.bool) for b in boxes),
    )


BATCH = make_batch()


def as_torchvision(batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images = [image[:, :h, :w].float() / 255 for image, (h, w) in zip(batch.images, batch.sizes, strict=True)]
    targets = [{"boxes": b, "labels": k + 1} for b, k in zip(batch.boxes, batch.labels, strict=True)]
    return images, targets


def without_slivers(found: dict[str, Tensor], most: int = 300) -> dict[str, Tensor]:
    """Without the boxes that clipping to the picture leaves no area: torchvision keeps them."""
    kept = torch.where((found["boxes"][:, 2:] - found["boxes"][:, :2] >= 1e-2).all(dim=1))[0][:most]
    return {name: values[kept] for name, values in found.items()}


def enliven(head: nn.Module, per_cell: int) -> None:
    """Weights that tell cells apart, and a class 0 that says nothing, as we have none."""
    for name, layer in head.named_modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.weight, std=0.03) if "bbox_reg" in name else None
    logits = head.classification_head.cls_logits
    nn.init.normal_(logits.weight, std=0.1)
    nn.init.constant_(logits.bias, -3.0)
    logits.bias.data[:: len(logits.bias) // per_cell] = -100.0


Pair = tuple[RetinaNet, TorchvisionRetinaNet]


@pytest.fixture(scope="module", params=["v1", "v2"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """torchvision's RetinaNet on a small body, without its resizing, and ours with the same weights."""
    torch.manual_seed(0)
    v2 = request.param == "v2"
    backbone = TorchvisionBackbone(CHANNELS[32] if v2 else WIDTH)
    anchors = torchvision_retinanet._default_anchorgen()
    head = torchvision_retinanet.RetinaNetHead(WIDTH, 9, CLASSES + 1, partial(nn.GroupNorm, 32) if v2 else None)
    head.regression_head._loss_type = "giou" if v2 else "l1"
    enliven(head, per_cell=9)
    theirs = TorchvisionRetinaNet(backbone, CLASSES + 1, anchor_generator=anchors, head=head)
    theirs.transform.resize = lambda image, target: (image, target)
    theirs.detections_per_img = 1000  # slivers among them
    ours = RetinaNet(
        Joined(Body(), FPN(CHANNELS, WIDTH, extra="p6p7_of_c5" if v2 else "p6p7")),
        RetinaNetHead(WIDTH, 9, CLASSES, norm=group_norm if v2 else None),
        anchors_for(STRIDES),
        box_loss="giou" if v2 else "l1",
    )
    keys = ours.load_state_dict(published_tensors(theirs.state_dict()), strict=False)
    assert set(keys.missing_keys) == PIXEL_BUFFERS
    assert not keys.unexpected_keys
    return ours, theirs


def test_same_boxes_as_torchvision(pair: Pair) -> None:
    ours, theirs = pair[0].eval(), pair[1].eval()
    with torch.no_grad():
        expected = [without_slivers(found) for found in theirs(as_torchvision(BATCH)[0])]
    for mine, other in zip(ours.predict(BATCH), expected, strict=True):
        assert len(mine) == len(other["scores"]) > 10
        np.testing.assert_allclose(mine.boxes, other["boxes"].numpy(), atol=0.01)
        np.testing.assert_allclose(mine.scores, other["scores"].numpy(), atol=1e-4)
        np.testing.assert_array_equal(mine.labels + 1, other["labels"].numpy())


def test_same_losses_and_gradients_as_torchvision(pair: Pair) -> None:
    ours, theirs = pair[0].train(), pair[1].train()
    ours.zero_grad()
    theirs.zero_grad()
    expected, found = theirs(*as_torchvision(BATCH)), ours.losses(BATCH)
    names = {"classification": "loss_classifier", "bbox_regression": "loss_box_reg"}
    assert {names[name] for name in expected} == found.keys()
    for name, value in expected.items():
        assert value > 0
        assert found[names[name]].item() == pytest.approx(value.item(), rel=1e-4), name
    torch.stack(list(expected.values())).sum().backward()
    torch.stack(list(found.values())).sum().backward()
    gradients = published_tensors({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert gradients[name].any(), name
        assert (parameter.grad - gradients[name]).norm() <= 1e-4 * gradients[name].norm(), name


def test_anchors_are_torchvision_s() -> None:
    theirs = torchvision_retinanet._default_anchorgen().cell_anchors
    for mine, other in zip(anchors_for(STRIDES).cells.values(), theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_matching_rules() -> None:
    """The best anchor of an object belongs to it however small its overlap; what lies between the bounds is nothing."""
    model = RetinaNet(Joined(Body(), FPN(CHANNELS, WIDTH)), RetinaNetHead(WIDTH, 9, CLASSES), anchors_for((8, 16, 32)))
    objects = torch.tensor([[0.0, 0, 100, 100], [200, 200, 220, 220]])
    anchors = torch.tensor(
        [[0.0, 0, 100, 100], [0, 0, 100, 45], [0, 0, 100, 30], [205, 205, 260, 260], [500, 500, 600, 600.0]]
    )
    nothing = objects[:0]
    labels, boxes = model._match(anchors, Truth(objects, torch.tensor([2, 0]), nothing))
    assert labels.tolist() == [3, -1, 0, 1, 0]
    assert torch.equal(boxes[[0, 3]], objects)
    labels, _ = model._match(anchors, Truth(objects, torch.tensor([2, 0]), anchors[4:]))
    assert labels.tolist() == [3, -1, 0, 1, -1]


# ------ torchvision's own


def older_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As in the file published in 2020: without the blocks around convolutions."""
    names = {}
    for i in range(4):
        for kind in ("weight", "bias"):
            for branch in ("classification", "regression"):
                names[f"head.{branch}_head.conv.{i}.0.{kind}"] = f"head.{branch}_head.conv.{2 * i}.{kind}"
            for block in ("inner", "layer"):
                names[f"backbone.fpn.{block}_blocks.{i}.0.{kind}"] = f"backbone.fpn.{block}_blocks.{i}.{kind}"
    return {names.get(name, name): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("retinanet_resnet50_fpn", retinanet_resnet50_fpn), ("retinanet_resnet50_fpn_v2", retinanet_resnet50_fpn_v2)],
)
def test_named_builders_are_torchvision_s(name: str, theirs: type) -> None:
    torch.manual_seed(0)
    expected = theirs(weights=None, weights_backbone=None, num_classes=CLASSES + 1).eval()
    frozen = name == "retinanet_resnet50_fpn"
    for layer in expected.modules():
        if frozen and isinstance(layer, nn.BatchNorm2d):
            layer.eps = 0.0  # as torchvision does where it loads the published weights
    for key, value in expected.state_dict().items():
        if key.endswith("bn3.weight"):
            value.fill_(0.2)  # calm, as no untrained ResNet is by itself
    enliven(expected.head, per_cell=9)
    expected.transform.resize = lambda image, target: (image, target)
    expected.detections_per_img = 1000  # slivers among them
    ours = registry.build(name, num_classes=CLASSES).eval()
    state = expected.state_dict()
    found = ours.load_state_dict(published_tensors(older_names(state) if frozen else state), strict=False)
    assert set(found.missing_keys) == PIXEL_BUFFERS
    assert not found.unexpected_keys
    batch = Batch(BATCH.ids[:1], BATCH.images[:1], BATCH.sizes[:1], (), (), ())
    with torch.no_grad():
        levels = expected.backbone(ours.normalise(batch))
        for mine, other in zip(ours.backbone(ours.normalise(batch)).values(), levels.values(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
        theirs_found = without_slivers(expected(as_torchvision(BATCH)[0][:1])[0])
    (mine,) = ours.predict(batch)
    assert len(mine) == len(theirs_found["scores"]) > 10
    np.testing.assert_allclose(mine.scores, theirs_found["scores"].numpy(), atol=1e-4)
    np.testing.assert_allclose(mine.boxes, theirs_found["boxes"].numpy(), atol=0.01)


@pytest.mark.parametrize(
    ("name", "parameters"), [("retinanet_resnet50_fpn", 34_014_999), ("retinanet_resnet50_fpn_v2", 38_198_935)]
)
def test_published_sizes(name: str, parameters: int) -> None:
    """As torchvision counts them with its class 0, and FrozenBatchNorm without parameters."""
    with torch.device("meta"):
        model = registry.build(name, num_classes=91)
    norms = sum(2 * len(m.weight) for m in model.modules() if isinstance(m, FrozenBatchNorm2d))
    assert sum(p.numel() for p in model.parameters()) + norms in (parameters, parameters + norms)
    assert {m.eps for m in model.modules() if isinstance(m, FrozenBatchNorm2d)} <= {0.0}
