"""Our FCOS against torchvision's, with the same weights; what holds for RetinaNet too stands in test_dense.py."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import fcos as torchvision_fcos
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from boxwright import registry
from boxwright.models.detectors.boxes import Truth
from boxwright.models.detectors.dense import published_tensors
from boxwright.models.detectors.fcos import FCOS, FCOSHead
from boxwright.models.pyramid import FPN, Joined
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

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.fpn = FeaturePyramidNetwork(list(CHANNELS.values()), WIDTH, LastLevelP6P7(WIDTH, WIDTH))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(s), level) for s, level in self.body(images).items()))


def make_batch() -> Batch:
    """Objects of every size, many of them over one another."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(12, 2, generator=generator) * torch.tensor([200.0, 100])
    sides = 2 ** (torch.rand(12, 2, generator=generator) * 6 + 2)
    boxes = torch.cat([corners, (corners + sides).minimum(torch.tensor([256.0, 128]))], dim=1)
    boxes = (boxes, torch.tensor([[5.0, 5, 70, 60], [5.0, 5, 70, 60], [0, 0, 140, 100]]))
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


def without_slivers(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The best 100 without the boxes that clipping to the picture leaves no area: torchvision keeps them."""
    kept = torch.where((found["boxes"][:, 2:] - found["boxes"][:, :2] >= 1e-2).all(dim=1))[0][:100]
    return {name: values[kept] for name, values in found.items()}


def enliven(head: nn.Module) -> None:
    """Weights that tell cells apart, and a class 0 that says nothing, as we have none."""
    for layer in head.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    logits = head.classification_head.cls_logits
    nn.init.normal_(logits.weight, std=0.1)
    nn.init.constant_(logits.bias, -1.0)
    logits.bias.data[0] = -100.0


Pair = tuple[FCOS, torchvision_fcos.FCOS]


@pytest.fixture(scope="module")
def pair() -> Pair:
    """torchvision's FCOS on a small body, without its resizing, and ours with the same weights."""
    torch.manual_seed(0)
    theirs = torchvision_fcos.FCOS(TorchvisionBackbone(), CLASSES + 1)
    theirs.transform.resize = lambda image, target: (image, target)
    theirs.detections_per_img = 1000  # slivers among them
    enliven(theirs.head)
    ours = FCOS(Joined(Body(), FPN(CHANNELS, WIDTH, extra="p6p7")), FCOSHead(WIDTH, CLASSES), strides=STRIDES)
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
    first = next(BATCH.parts(1))  # alone: torchvision divides by the cells of the whole batch, we picture by picture
    expected, found = theirs(*as_torchvision(first)), ours.losses(first)
    names = {
        "classification": "loss_classifier",
        "bbox_regression": "loss_box_reg",
        "bbox_ctrness": "loss_centerness",
    }
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


def test_losses_are_means_over_pictures(pair: Pair) -> None:
    model = pair[0].train()
    together = model.losses(BATCH)
    each = [model.losses(part) for part in BATCH.parts(1)]
    assert len(each) > 1
    for name, loss in together.items():
        torch.testing.assert_close(loss, torch.stack([losses[name] for losses in each]).mean(), rtol=1e-5, atol=0)


# ------ Which cell belongs to which object


def make_model(strides: tuple[int, ...] = (8, 16, 32)) -> FCOS:
    return FCOS(Joined(Body(), FPN(CHANNELS, WIDTH)), FCOSHead(WIDTH, CLASSES), strides=strides)


def labels_of(cells: list[list[float]], objects: list[list[float]], ignored: list[list[float]] | None = None) -> list:
    """Of label i for the i-th object: i + 1 where a cell belongs to it."""
    boxes, regions = (torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in (objects, ignored or []))
    truth = Truth(boxes, torch.arange(len(boxes)), regions)
    labels, wanted = make_model()._match(torch.tensor(cells, dtype=torch.float32), truth)
    for label, box in zip(labels.tolist(), wanted, strict=True):
        assert label < 1 or torch.equal(box, boxes[label - 1])
    return labels.tolist()


def test_cells_near_the_middle_of_an_object_belong_to_it() -> None:
    wide = [0.0, 40, 60, 56]  # its middle at 30, 48
    cells = [[24, 48, 8], [40, 48, 8], [48, 48, 8], [24, 32, 8], [32, 40, 8]]  # the last one on its edge
    assert labels_of(cells, [wide]) == [1, 1, 0, 0, 0]


def test_a_cell_of_two_objects_belongs_to_the_smaller() -> None:
    assert labels_of([[24, 24, 8]], [[0, 0, 50, 50], [10, 10, 40, 40]]) == [2]


@pytest.mark.parametrize(("side", "owner"), [(40, 8), (100, 8), (200, 16), (300, 32), (2000, 32)])
def test_each_object_has_the_level_of_its_size(side: float, owner: int) -> None:
    middle = 1024.0
    box = [middle - side / 2, middle - side / 2, middle + side / 2, middle + side / 2]
    labels = labels_of([[middle, middle, stride] for stride in (8, 16, 32)], [box])
    assert labels == [int(stride == owner) for stride in (8, 16, 32)]


def test_cells_of_ignored_regions_are_nothing_unless_an_object_has_them() -> None:
    cells = [[24, 24, 8], [80, 80, 8], [80, 80, 32], [200, 200, 8]]
    assert labels_of(cells, [[0, 0, 50, 50]], ignored=[[0, 0, 100, 100]]) == [1, -1, -1, 0]
    assert labels_of(cells, [], ignored=[[0, 0, 100, 100]]) == [-1, -1, -1, 0]


# ------ torchvision's own


def test_the_named_builder_is_torchvision_s() -> None:
    torch.manual_seed(0)
    theirs = torchvision_fcos.fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CLASSES + 1).eval()
    theirs.transform.resize = lambda image, target: (image, target)
    theirs.detections_per_img = 1000
    for key, value in theirs.state_dict().items():
        if key.endswith("bn3.weight"):
            value.fill_(0.2)  # calm, as no untrained ResNet is by itself
    enliven(theirs.head)
    ours = registry.build("fcos_resnet50_fpn", num_classes=CLASSES).eval()
    keys = ours.load_state_dict(published_tensors(theirs.state_dict()), strict=False)
    assert set(keys.missing_keys) == PIXEL_BUFFERS
    assert not keys.unexpected_keys
    with torch.no_grad():
        expected = without_slivers(theirs(as_torchvision(BATCH)[0][:1])[0])
    (mine,) = ours.predict(Batch(BATCH.ids[:1], BATCH.images[:1], BATCH.sizes[:1], (), (), ()))
    assert len(mine) == len(expected["scores"]) > 10
    np.testing.assert_allclose(mine.scores, expected["scores"].numpy(), atol=1e-4)
    np.testing.assert_allclose(mine.boxes, expected["boxes"].numpy(), atol=0.01)


def test_published_size() -> None:
    """As torchvision counts it, with its class 0 and without FrozenBatchNorm."""
    with torch.device("meta"):
        model = registry.build("fcos_resnet50_fpn", num_classes=91)
    assert sum(p.numel() for p in model.parameters()) == 32_269_600
    assert {m.eps for m in model.modules() if isinstance(m, FrozenBatchNorm2d)} == {1e-5}
