"""Our Faster R-CNN against torchvision's, with the same weights and the same random numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn, fasterrcnn_resnet50_fpn_v2
from torchvision.ops import roi_align

from boxwright import registry
from boxwright.models import winograd
from boxwright.models.detectors import pooling
from boxwright.models.detectors.boxes import Anchors, Truth, decode, encode, ignore_inside, match_boxes, sample
from boxwright.models.detectors.faster_rcnn import (
    BoxHeads,
    BoxPredictor,
    ConvHead,
    FasterRCNN,
    RegionProposals,
    Regions,
    RPNHead,
    TwoLayerHead,
)
from boxwright.types import Batch, UserError

PIXEL_BUFFERS = {"pixel_mean", "pixel_std"}


def make_batch(sizes: list[tuple[int, int]], boxes: list[list[list[float]]], seed: int = 0) -> Batch:
    """Random pictures of those sizes on one canvas, with label i % 3 for the i-th box."""
    generator = torch.Generator().manual_seed(seed)
    H, W = (-(-max(side) // 32) * 32 for side in zip(*sizes, strict=True))
    images = torch.randint(0, 256, (len(sizes), 3, H, W), dtype=torch.uint8, generator=generator)
    return Batch(
        ids=tuple(str(i) for i in range(len(sizes))),
        images=images,
        sizes=tuple(sizes),
        boxes=tuple(torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in boxes),
        labels=tuple(torch.arange(len(b)) % 3 for b in boxes),
        difficult=tuple(torch.zeros(len(b), dtype=torch.bool) for b in boxes),
    )


@pytest.fixture(scope="module")
def pair() -> tuple[FasterRCNN, TorchvisionFasterRCNN]:
    """torchvision's v2 detector without its resizing, and ours with the same weights."""
    torch.manual_seed(0)
    theirs = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=4)
    theirs.transform.resize = lambda image, target: (image, target)
    ours = registry.build("fasterrcnn_resnet50_fpn_v2", num_classes=3)
    state = theirs.state_dict()
    for (
        name,
        value,
    ) in state.items():  # tame the untrained features, so that no score saturates and ties with another
        if name.startswith("backbone.fpn.layer_blocks") and name.endswith("1.weight"):
            value.mul_(0.02)
    state["roi_heads.box_predictor.cls_score.weight"].normal_(std=0.1)
    keys = ours.load_state_dict(state, strict=False)
    assert set(keys.missing_keys) == PIXEL_BUFFERS
    assert not keys.unexpected_keys
    return ours, theirs


BATCH = make_batch([(160, 192), (128, 140)], [[[10, 20, 90, 100], [60.5, 30.25, 180, 150]], [[5, 5, 70, 60]]])


def as_torchvision(batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images = [image[:, :h, :w].float() / 255 for image, (h, w) in zip(batch.images, batch.sizes, strict=True)]
    targets = [{"boxes": b, "labels": k + 1} for b, k in zip(batch.boxes, batch.labels, strict=True)]
    return images, targets


def test_same_boxes_as_torchvision(
    pair: tuple[FasterRCNN, TorchvisionFasterRCNN], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "FEWEST_CELLS", 10**9)  # its rounding is another test's subject
    ours, theirs = pair[0].eval(), pair[1].eval()
    images, _ = as_torchvision(BATCH)
    with torch.no_grad():
        expected = theirs(images)
    found = ours.predict(BATCH)
    for mine, other in zip(found, expected, strict=True):
        assert len(mine) == len(other["scores"]) > 10
        np.testing.assert_allclose(mine.boxes, other["boxes"].numpy(), atol=0.01)
        np.testing.assert_allclose(mine.scores, other["scores"].numpy(), atol=1e-4)
        np.testing.assert_array_equal(mine.labels + 1, other["labels"].numpy())


def test_same_losses_and_gradients_as_torchvision(
    pair: tuple[FasterRCNN, TorchvisionFasterRCNN], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pooled by one kernel: another order of additions is amplified by BatchNorm over untrained features.
    # test_pooling.py compares the kernels.
    monkeypatch.setattr(
        pooling, "align_regions", lambda x, boxes, pool, stride, **_: roi_align(x, boxes, pool, 1 / stride, 2)
    )
    ours, theirs = pair[0].train(), pair[1].train()
    images, targets = as_torchvision(BATCH)
    losses = []
    for step in (lambda: theirs(images, targets), lambda: ours.losses(BATCH)):
        torch.manual_seed(7)  # both draw their samples from the global generator, in the same order
        losses.append(step())
    expected, found = losses
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-4), name
    torch.stack(list(expected.values())).sum().backward()
    torch.stack(list(found.values())).sum().backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        other = theirs_by_name[name].grad
        if "roi_heads" in name or "rpn" in name:
            assert parameter.grad is not None
            assert other is not None
            assert (parameter.grad - other).norm() <= 1e-4 * other.norm(), name


def test_same_keys_as_torchvision() -> None:
    ours = registry.build("fasterrcnn_resnet50_fpn_v2", num_classes=90)
    theirs = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
    mine = {k: v.shape for k, v in ours.state_dict().items() if k not in PIXEL_BUFFERS}
    assert mine == {k: v.shape for k, v in theirs.state_dict().items()}
    assert len(mine) == 404


def test_anchors_are_torchvision_s() -> None:
    theirs = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None).rpn.anchor_generator
    ours = Anchors(dict.fromkeys((32, 64), (32.0, 64.0, 128.0, 256.0, 512.0)))
    for mine, other in zip(ours.cells.values(), theirs.cell_anchors, strict=False):
        torch.testing.assert_close(mine, other)


def test_unrounded_anchors_keep_area_and_ratio() -> None:
    """As detectron2's: side² = w h, ratio = h / w, around the cell's corner."""
    (boxes,) = Anchors({16: [128.0]}, rounded=False)({16: torch.zeros(1, 1, 1, 2)})
    sides = boxes[:, 2:] - boxes[:, :2]  # (6, 2): three ratios at each of two cells
    torch.testing.assert_close(sides.prod(dim=1), torch.full((6,), 128.0**2))
    torch.testing.assert_close(sides[:, 1] / sides[:, 0], torch.tensor([0.5, 1, 2, 0.5, 1, 2]))
    torch.testing.assert_close((boxes[:, 2:] + boxes[:, :2]) / 2, torch.tensor([[0.0, 0]] * 3 + [[16.0, 0]] * 3))


def test_anchors_keep_their_stride_where_the_canvas_does_not_divide() -> None:
    anchors = Anchors({32: [32.0]}, ratios=(1.0,))
    (boxes,) = anchors({32: torch.zeros(1, 1, 20, 20)})  # of a canvas of 656 px: 20.5 cells
    assert boxes[-1].tolist() == [19 * 32 - 16, 19 * 32 - 16, 19 * 32 + 16, 19 * 32 + 16]


def test_decode_inverts_encode() -> None:
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(50, 2, 2, generator=generator) * 300
    sides = torch.rand(50, 2, 2, generator=generator) * 100 + 1
    boxes, anchors = (torch.cat([corners[:, i], corners[:, i] + sides[:, i]], dim=1) for i in (0, 1))
    for weights in ((1, 1, 1, 1), (10, 10, 5, 5)):
        torch.testing.assert_close(
            decode(encode(boxes, anchors, weights), anchors, weights), boxes, atol=1e-3, rtol=1e-5
        )


def test_decode_bounds_wild_deltas() -> None:
    wild = decode(torch.full((1, 4), 1e4), torch.tensor([[0.0, 0, 16, 16]]), (1, 1, 1, 1))
    assert torch.isfinite(wild).all()


def test_padding_changes_nothing_the_network_sees() -> None:
    model = registry.build("fasterrcnn_vitdet_nano", num_classes=3)
    black, white = (
        Batch(("a",), torch.full((1, 3, 64, 64), fill, dtype=torch.uint8), ((40, 48),), (), (), ()) for fill in (0, 255)
    )
    black.images[:, :, :40, :48] = white.images[:, :, :40, :48] = 77
    torch.testing.assert_close(model.normalise(black), model.normalise(white))


def test_matching_rules() -> None:
    truth = torch.tensor([[0.0, 0, 100, 100], [200, 200, 220, 220]])
    boxes = torch.tensor(
        [[0.0, 0, 100, 100], [0, 0, 100, 50], [0, 0, 100, 10], [205, 205, 260, 260], [500, 500, 510, 510]]
    )
    assert match_boxes(truth, boxes, 0.7, 0.3, keep_best_of_each=False).tolist() == [0, -2, -1, -1, -1]
    assert match_boxes(truth, boxes, 0.7, 0.3, keep_best_of_each=True).tolist() == [0, -2, -1, 1, -1]
    assert match_boxes(truth[:0], boxes, 0.7, 0.3, keep_best_of_each=True).tolist() == [-1] * 5


def test_ignored_regions_are_never_negatives() -> None:
    boxes = torch.tensor([[0.0, 0, 100, 100], [300, 300, 400, 400], [0, 0, 90, 100]])
    labels = ignore_inside(torch.tensor([0, 0, 2]), boxes, boxes[:1], 0.5)
    assert labels.tolist() == [-1, 0, 2]


def test_difficult_objects_neither_attract_nor_repel() -> None:
    """With every object difficult no anchor and no proposal is positive."""
    model = registry.build("fasterrcnn_vitdet_nano", num_classes=3).train()
    batch = make_batch([(64, 64)], [[[0, 0, 64, 64]]])
    everything_difficult = Batch(
        batch.ids, batch.images, batch.sizes, batch.boxes, batch.labels, (torch.tensor([True]),)
    )
    losses = model.losses(everything_difficult)
    assert losses["loss_box_reg"].item() == losses["loss_rpn_box_reg"].item() == 0
    assert model.losses(batch)["loss_rpn_box_reg"].item() > 0


def test_pictures_without_objects_give_finite_losses() -> None:
    model = registry.build("fasterrcnn_vitdet_nano", num_classes=3).train()
    losses = model.losses(make_batch([(64, 64), (64, 64)], [[], []]))
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert torch.isfinite(total)
    assert losses["loss_box_reg"].item() == 0


def test_sampling_takes_what_there_is() -> None:
    labels = torch.tensor([1, 1, 0, 0, 0, 0, 0, -1])
    positive, negative = sample(labels, 4, 0.25)
    assert len(positive) == 1
    assert len(negative) == 3
    positive, negative = sample(labels, 100, 0.5)
    assert sorted(positive.tolist()) == [0, 1]
    assert sorted(negative.tolist()) == [2, 3, 4, 5, 6]


# ------ What ViTDet has otherwise


def heads(**options: Any) -> BoxHeads:
    torch.manual_seed(0)
    return BoxHeads(TwoLayerHead(4, pool=2, width=8), num_classes=2, strides=(8, 16), pool=2, **options)


def regions_of(label: list[int], boxes: list[list[float]], meant: list[list[float]]) -> Regions:
    return Regions([torch.tensor(boxes)], torch.tensor(label), torch.tensor(meant))


REGIONS = regions_of(
    [0, 2, -1], [[0, 0, 10, 10], [0, 0, 20, 10], [0, 0, 8, 8]], [[0, 0, 1, 1], [2, 0, 22, 20], [0] * 4]
)


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("beta", [0.0, 1 / 9, 2.0])
def test_losses_of_boxes_by_hand(class_agnostic: bool, beta: float) -> None:
    """Of the second region alone: its object is 2 px to the right, as wide, and twice as high."""
    logits = torch.tensor([[1.0, 2, 3], [0, 0, 1], [50, 0, -50]])
    deltas = torch.zeros(3, 1 if class_agnostic else 3, 4)
    losses = heads(class_agnostic=class_agnostic, beta=beta).compare(logits, deltas, REGIONS)
    chance = [torch.tensor([1.0, 2, 3]).softmax(0)[0], torch.tensor([0.0, 0, 1]).softmax(0)[2]]
    assert losses["loss_classifier"].item() == pytest.approx(-sum(p.log().item() for p in chance) / 2)
    off = [10 * 2 / 20, 10 * 5 / 10, 0, 5 * math.log(2)]
    each = [d - beta / 2 if d >= beta else d**2 / 2 / beta for d in off]
    assert losses["loss_box_reg"].item() == pytest.approx(sum(each) / 2, rel=1e-5)


def test_only_a_class_s_own_boxes_learn_or_one_for_all() -> None:
    deltas = torch.zeros(3, 3, 4, requires_grad=True)
    sum(heads().compare(torch.zeros(3, 3), deltas, REGIONS).values()).backward()
    assert deltas.grad.abs().sum(-1).nonzero().tolist() == [[1, 2]]
    one = torch.zeros(3, 1, 4, requires_grad=True)
    sum(heads(class_agnostic=True).compare(torch.zeros(3, 3), one, REGIONS).values()).backward()
    assert one.grad.abs().sum(-1).nonzero().tolist() == [[1, 0]]


def test_one_box_for_all_classes_is_found_as_each() -> None:
    agnostic = heads(class_agnostic=True, score_threshold=0.1)
    boxes, scores = torch.tensor([[[5.0, 5, 90, 20]]]), torch.tensor([[0.2, 0.3, 0.5]])
    ((found, found_scores, labels),) = agnostic.select([boxes], scores, [(64, 64)])
    assert found.tolist() == [[5, 5, 64, 20]] * 2
    assert (labels.tolist(), found_scores.tolist()) == ([1, 0], pytest.approx([0.5, 0.3]))


def test_a_small_start_prefers_no_class_and_moves_no_box() -> None:
    predictor = BoxPredictor(1024, 80, small_start=True)
    with torch.no_grad():
        logits, deltas = predictor(torch.rand(64, 1024))
    assert logits.softmax(-1).max() < 0.05
    assert deltas.abs().max() < 0.2
    assert deltas.shape == (64, 81, 4)


def test_layer_norm_knows_one_region_only() -> None:
    """BatchNorm's regions share their statistics; LayerNorm's over channels depend on the place alone."""
    torch.manual_seed(0)
    head = ConvHead(8, pool=3, width=16, norm="layer").train()
    regions = torch.randn(5, 8, 3, 3)
    torch.testing.assert_close(head(regions)[2], head(regions[2:3])[0])
    conv, norm = head[0][0], head[0][1]
    x = conv(regions)
    centred = x - x.mean(dim=1, keepdim=True)
    by_hand = centred / (x.var(dim=1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), by_hand, atol=1e-5, rtol=1e-5)
    assert [layer.bias is None for layer in head.modules() if isinstance(layer, nn.Conv2d)] == [True] * 4


@pytest.mark.parametrize(("beta", "loss"), [(0.0, 1 / 8), (1 / 9, 1 / 8 - 1 / 18), (0.5, (1 / 8) ** 2 / 2 / 0.5)])
def test_regression_of_proposals_by_hand(beta: float, loss: float) -> None:
    """An untrained head on empty maps moves nothing; of 64 anchors one is positive, 2 of 16 px off, one undecided."""
    rpn = RegionProposals(RPNHead(4, 1, depth=2), Anchors({8: [16.0]}, (1.0,)), beta=beta)
    truth = Truth(torch.tensor([[18.0, 16, 34, 32]]), torch.tensor([0]), torch.zeros(0, 4))
    losses = rpn.losses({8: torch.zeros(1, 4, 8, 8)}, [(64, 64)], [truth])[1]
    assert losses["loss_rpn_box_reg"].item() == pytest.approx(loss / 63)
    assert losses["loss_objectness"].item() == pytest.approx(math.log(2))


# ------ On any backbone


class Steps(nn.Module):
    """A backbone of its own: one strided convolution a stride."""

    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.channels = {stride: 4 + i for i, stride in enumerate(strides)}
        self.convs = nn.ModuleList(nn.Conv2d(3, c, s, stride=s) for s, c in self.channels.items())

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        return {s: conv(images) for s, conv in zip(self.channels, self.convs, strict=True)}


@pytest.mark.parametrize(
    ("strides", "levels", "pooled"),
    [
        ((4, 8, 16, 32), [4, 8, 16, 32, 64], [4, 8, 16, 32]),
        ((8, 16), [8, 16, 32], [8, 16]),
        ((16,), [4, 8, 16, 32, 64], [4, 8, 16, 32]),  # the simple pyramid
    ],
)
@pytest.mark.parametrize("head", ["2fc", "4conv1fc"])
def test_faster_rcnn_on_a_backbone_of_one_s_own(
    strides: tuple[int, ...], levels: list[int], pooled: list[int], head: str
) -> None:
    torch.manual_seed(0)
    model = registry.build("fasterrcnn", num_classes=3, backbone=Steps(strides), width=16, head=head)
    assert model.rpn.anchors.strides == levels
    assert model.roi_heads.strides == pooled
    for stride, cells in model.rpn.anchors.cells.items():
        assert cells[1].tolist() == [-4 * stride, -4 * stride, 4 * stride, 4 * stride]  # 8 strides wide
    assert model.pixel_mean.flatten().tolist() == [0.5] * 3
    losses = model.train().losses(BATCH)
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert len(model.eval().predict(BATCH)) == 2


@pytest.mark.parametrize("name", ["fasterrcnn", "cascade_rcnn"])
def test_a_mistyped_head(name: str) -> None:
    with pytest.raises(
        UserError, match=r"unknown box head '4conv1f': wanted is 2fc or 4conv1fc. Did you mean '4conv1fc'\?"
    ):
        registry.build(name, num_classes=3, backbone=Steps((8, 16)), head="4conv1f")
