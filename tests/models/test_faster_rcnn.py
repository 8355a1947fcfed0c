"""Our Faster R-CNN against torchvision's, with the same weights and the same random numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn, fasterrcnn_resnet50_fpn_v2
from torchvision.ops import roi_align

from boxwright import registry
from boxwright.models.detectors import faster_rcnn
from boxwright.models.detectors.boxes import Anchors, decode, encode, ignore_inside, match_boxes, sample
from boxwright.models.detectors.faster_rcnn import FasterRCNN
from boxwright.types import Batch

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


def test_same_boxes_as_torchvision(pair: tuple[FasterRCNN, TorchvisionFasterRCNN]) -> None:
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
        faster_rcnn, "align_regions", lambda x, boxes, pool, stride: roi_align(x, boxes, pool, 1 / stride, 2)
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
