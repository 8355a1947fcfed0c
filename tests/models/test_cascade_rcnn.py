"""Cascade R-CNN: its laws, and small cases by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from boxwright import registry
from boxwright.models.detectors.boxes import Truth
from boxwright.models.detectors.cascade_rcnn import STAGES, CascadeHeads, CascadeRCNN
from boxwright.models.detectors.faster_rcnn import BoxHeads, Regions, TwoLayerHead
from boxwright.models.detectors.pooling import pool_regions
from boxwright.types import Batch

SIZES = ((64, 96), (50, 70))  # of the pictures, on a canvas of 64 x 96
STRIDES = (8, 16)
LOSSES = {f"{name}_{i}" for name in ("loss_classifier", "loss_box_reg") for i in range(3)}


def make_batch() -> Batch:
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = (torch.tensor([[4.0, 6, 50, 60], [30.5, 2.25, 90, 40]]), torch.tensor([[10.0, 10, 60, 45]]))
    labels = (torch.tensor([0, 2]), torch.tensor([1]))
    return Batch(("a", "b"), images, SIZES, boxes, labels, (torch.zeros(2).bool(), torch.zeros(1).bool()))


class Steps(nn.Module):
    """A backbone of one strided convolution a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = {8: 4, 16: 6}
        self.convs = nn.ModuleList(nn.Conv2d(3, c, s, stride=s) for s, c in self.channels.items())

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        return {s: conv(images) for s, conv in zip(self.channels, self.convs, strict=True)}


def build(head: str = "2fc") -> CascadeRCNN:
    torch.manual_seed(0)
    detector = registry.build("cascade_rcnn", num_classes=3, backbone=Steps(), width=16, head=head)
    detector.rpn.keep_after_nms = (60, 60)
    for stage in detector.roi_heads.stages:  # opinions, so that something is found
        stage.samples = 40
        nn.init.normal_(stage.box_predictor.cls_score.weight, std=0.3)
        nn.init.normal_(stage.box_predictor.bbox_pred.weight, std=0.3)
    return detector


def heads(**options: float) -> CascadeHeads:
    """Three small stages; nothing is left out of what they find."""
    torch.manual_seed(0)
    return CascadeHeads(
        [
            BoxHeads(
                TwoLayerHead(4, pool=2, width=8),
                num_classes=2,
                strides=STRIDES,
                pool=2,
                class_agnostic=True,
                foreground_overlap=overlap,
                box_weights=weights,
                **{"score_threshold": 0.0, "nms_threshold": 1.0, "detections_per_image": 1000, **options},
            )
            for overlap, weights in STAGES
        ]
    )


def make_maps(pictures: int = 2) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {s: torch.randn(pictures, 4, 64 // s, 96 // s, generator=generator) for s in STRIDES}


def stay(stages: CascadeHeads, *shifts: tuple[float, float, float, float]) -> None:
    """Let each stage give every region the same deltas."""
    for stage, shift in zip(stages.stages, shifts, strict=True):
        nn.init.zeros_(stage.box_predictor.bbox_pred.weight)
        stage.box_predictor.bbox_pred.bias.data = torch.tensor(shift)


NOTHING = torch.zeros(0, 4)
STILL = (0.0, 0.0, 0.0, 0.0)


# ------ The whole


@pytest.mark.parametrize("head", ["2fc", "4conv1fc"])
def test_losses_reach_every_parameter(head: str) -> None:
    detector = build(head).train()
    losses = detector.losses(make_batch())
    assert losses.keys() == LOSSES | {"loss_objectness", "loss_rpn_box_reg"}
    assert all(loss.ndim == 0 and loss >= 0 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any() or name.endswith("bbox_pred.bias"), name  # where L1's signs may cancel out


def test_pictures_together_are_pictures_one_by_one() -> None:
    detector, batch = build().eval(), make_batch()
    for i, expected in enumerate(detector.predict(batch)):
        rest = (batch.sizes, batch.boxes, batch.labels, batch.difficult)
        (alone,) = detector.predict(Batch((str(i),), batch.images[i : i + 1], *((v[i],) for v in rest)))
        assert len(expected) > 5
        np.testing.assert_allclose(alone.scores, expected.scores, atol=1e-5)
        np.testing.assert_allclose(alone.boxes, expected.boxes, atol=1e-3)
        np.testing.assert_array_equal(alone.labels, expected.labels)
        height, width = batch.sizes[i]
        assert (expected.boxes >= 0).all()
        assert (expected.boxes[:, 2] <= width).all()
        assert (expected.boxes[:, 3] <= height).all()


def test_stages_are_the_article_s() -> None:
    for name, options in (("cascade_rcnn", {"backbone": Steps()}), ("cascade_vitdet_b", {})):
        with torch.device("meta"):
            stages = registry.build(name, num_classes=3, **options).roi_heads.stages
        assert [stage.foreground_overlap for stage in stages] == [0.5, 0.6, 0.7]
        assert [tuple(stage.box_weights) for stage in stages] == [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
        assert all(stage.class_agnostic for stage in stages)
        assert all(stage.beta == 0 for stage in stages)


def test_difficult_objects_neither_attract_nor_repel() -> None:
    """With every object difficult no stage has a positive, and no region on one is a negative."""
    detector = build().train()
    difficult = tuple(torch.ones_like(flags) for flags in make_batch().difficult)
    losses = detector.losses(replace(make_batch(), difficult=difficult))
    assert [losses[f"loss_box_reg_{i}"].item() for i in range(3)] == [0, 0, 0]


def test_pictures_without_objects_give_finite_losses() -> None:
    detector = build().train()
    none = (NOTHING, NOTHING)
    empty = tuple(torch.zeros(0, dtype=torch.int64) for _ in range(2))
    losses = detector.losses(replace(make_batch(), boxes=none, labels=empty, difficult=tuple(e.bool() for e in empty)))
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert torch.isfinite(total)
    assert [losses[f"loss_box_reg_{i}"].item() for i in range(3)] == [0, 0, 0]


def test_work_runs_every_layer_of_a_prediction() -> None:
    detector = build().eval()
    ran: set[str] = set()
    for name, layer in detector.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(lambda *_, name=name: ran.add(name))
    maps = detector.backbone(torch.zeros(1, 3, 64, 96))
    ran.clear()
    detector.work(maps)
    worked, _ = set(ran), ran.clear()
    detector.detect(maps, [(64, 96)])
    assert worked == ran
    assert sum("roi_heads" in name for name in ran) == 3 * 4


# ------ From stage to stage


def record(stages: CascadeHeads, monkeypatch: pytest.MonkeyPatch) -> list[Regions]:
    """What each stage learns from, in order."""
    seen: list[Regions] = []
    for stage in stages.stages:
        compare = stage.compare
        monkeypatch.setattr(
            stage, "compare", lambda *given, compare=compare: (seen.append(given[2]), compare(*given))[1]
        )
    return seen


def test_a_box_is_matched_anew_at_each_stage_s_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes that stay where they are: what is near enough for one stage is background for the next."""
    stages = heads()
    stay(stages, STILL, STILL, STILL)
    seen = record(stages, monkeypatch)
    truth = Truth(torch.tensor([[0.0, 0, 40, 40]]), torch.tensor([1]), NOTHING)
    proposals = torch.tensor([[0.0, 0, 40, 18], [0, 0, 40, 22], [0, 0, 40, 26], [0, 0, 40, 30]])  # IoU .45 .55 .65 .75
    monkeypatch.setattr(stages.stages[0], "positive_fraction", 1.0)
    losses = stages.losses(make_maps(1), [proposals], [(64, 96)], [truth])
    assert losses.keys() == LOSSES
    assert [regions.labels.tolist() for regions in seen] == [[0, 2, 2, 2, 2], [0, 0, 2, 2, 2], [0, 0, 0, 2, 2]]
    for regions in seen:  # the object itself is the fifth, added once
        torch.testing.assert_close(regions.boxes[0], torch.cat([proposals, truth.boxes]))
        assert (regions.meant[regions.labels > 0] == truth.boxes).all()


def test_each_stage_gets_the_boxes_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 deltas of the first stage are a box's width, 20 of the second; what leaves the picture is cut or dropped."""
    stages = heads()
    stay(stages, (5.0, 0, 0, 0), (0, -20.0, 0, 0), STILL)
    seen = record(stages, monkeypatch)
    proposals = torch.tensor([[0.0, 20, 20, 40], [80, 20, 90, 40], [50, 5, 60, 15]])
    losses = stages.losses(make_maps(1), [proposals], [(50, 88)], [Truth(NOTHING, torch.zeros(0).long(), NOTHING)])
    boxes = [regions.boxes[0].tolist() for regions in seen]
    assert boxes[1] == [[10, 20, 30, 40], [85, 20, 88, 40], [55, 5, 65, 15]]
    assert boxes[2] == [[10, 0, 30, 20], [85, 0, 88, 20], [55, 0, 65, 5]]
    assert all(torch.isfinite(loss) for loss in losses.values())
    stay(stages, (1000.0, 0, 0, 0), STILL, STILL)
    seen.clear()
    losses = stages.losses(make_maps(1), [proposals], [(50, 88)], [Truth(NOTHING, torch.zeros(0).long(), NOTHING)])
    assert [len(regions.boxes[0]) for regions in seen] == [3, 0, 0]
    assert losses["loss_classifier_1"].item() == losses["loss_box_reg_2"].item() == 0


def test_ignored_regions_count_for_nothing_in_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = heads()
    stay(stages, STILL, STILL, STILL)
    seen = record(stages, monkeypatch)
    truth = Truth(NOTHING, torch.zeros(0).long(), torch.tensor([[0.0, 0, 40, 40]]))
    proposals = torch.tensor([[0.0, 0, 40, 38], [50, 0, 90, 40]])
    stages.losses(make_maps(1), [proposals], [(64, 96)], [truth])
    assert [regions.labels.tolist() for regions in seen] == [[0], [0], [0]]  # never sampled
    assert [stage.match([proposals], [truth]).labels.tolist() for stage in stages.stages] == [[-1, 0]] * 3
    for stage in stages.stages:
        both, one = (stage.match([boxes], [truth]) for boxes in (proposals, proposals[1:]))
        expected = stage.compare(*stage.classify(make_maps(1), one.boxes), one)
        found = stage.compare(*stage.classify(make_maps(1), both.boxes), both)
        for name, loss in expected.items():
            torch.testing.assert_close(found[name], loss)


def test_maps_get_the_average_gradient_and_heads_their_whole() -> None:
    stages = heads()
    maps = {s: m.requires_grad_() for s, m in make_maps(1).items()}
    proposals = [torch.tensor([[3.0, 3, 40, 40], [10, 10, 30, 60]])]
    stage = stages.stages[0]
    gradients = []
    for gradient in (1.0, 1 / 3):
        stage.zero_grad()
        maps[8].grad = None
        logits, _ = stage.classify(maps, proposals, gradient=gradient)
        logits.square().sum().backward()
        gradients.append((maps[8].grad.clone(), stage.box_head.fc6.weight.grad.clone()))
    (whole, of_head), (third, of_head_again) = gradients
    assert whole.abs().sum() > 0
    torch.testing.assert_close(third, whole / 3)
    torch.testing.assert_close(of_head_again, of_head)


def test_losses_pass_a_third_of_their_gradient_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = heads()
    asked: list[float] = []
    for stage in stages.stages:
        classify = stage.classify
        monkeypatch.setattr(
            stage,
            "classify",
            lambda *given, classify=classify, **options: (asked.append(options.get("gradient")), classify(*given))[1],
        )
    truth = Truth(torch.tensor([[0.0, 0, 40, 40]]), torch.tensor([1]), NOTHING)
    stages.losses(make_maps(1), [torch.tensor([[0.0, 0, 40, 30]])], [(64, 96)], [truth])
    assert asked == pytest.approx([1 / 3] * 3)


# ------ What is found, against a slow reference


def slowly(stages: CascadeHeads, maps: dict[int, Tensor], box: Tensor, size: tuple[int, int]) -> tuple[list, list]:
    """The box and the scores of one region of the first picture, one number at a time."""
    at, chances = box.tolist(), []
    for stage, (_, (wx, wy, ww, wh)) in zip(stages.stages, STAGES, strict=True):
        at = [min(max(value, 0), size[(i + 1) % 2]) for i, value in enumerate(at)]
        features = pool_regions(maps, [torch.tensor([at])], STRIDES, 2).flatten()
        head, predictor = stage.box_head, stage.box_predictor
        hidden = (head.fc7.weight @ (head.fc6.weight @ features + head.fc6.bias).relu() + head.fc7.bias).relu()
        odds = (predictor.cls_score.weight @ hidden + predictor.cls_score.bias).exp()
        chances.append((odds / odds.sum()).tolist())
        dx, dy, dw, dh = (predictor.bbox_pred.weight @ hidden + predictor.bbox_pred.bias).tolist()
        x, y, w, h = (at[0] + at[2]) / 2, (at[1] + at[3]) / 2, at[2] - at[0], at[3] - at[1]
        x, y, w, h = x + dx / wx * w, y + dy / wy * h, w * np.exp(dw / ww), h * np.exp(dh / wh)
        at = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
    at = [min(max(value, 0), size[(i + 1) % 2]) for i, value in enumerate(at)]
    return at, [sum(chance[k] for chance in chances) / 3 for k in (1, 2)]


@torch.no_grad()
def test_found_boxes_are_the_last_stage_s_with_the_average_score() -> None:
    stages, maps, sizes = heads(), make_maps(2), [(64, 96), (50, 70)]
    for stage in stages.stages:
        stage.box_predictor.bbox_pred.weight.data *= 10
    proposals = [torch.tensor([[5.0, 5, 40, 40], [30, 20, 90, 60], [0, 0, 90, 20]]), torch.tensor([[10.0, 10, 60, 45]])]
    found = stages.detect(maps, proposals, sizes)
    for i, (boxes, scores, labels) in enumerate(found):
        of_picture = {stride: level[i : i + 1] for stride, level in maps.items()}
        expected = [slowly(stages, of_picture, box, sizes[i]) for box in proposals[i]]
        wanted = sorted(((s, k, box) for box, each in expected for k, s in enumerate(each)), reverse=True)
        assert len(boxes) == len(wanted) == 2 * len(proposals[i])
        assert (boxes[::2] - proposals[i][0]).abs().max() > 1  # something moved
        for box, score, label, (score_by_hand, label_by_hand, box_by_hand) in zip(
            boxes, scores, labels, wanted, strict=True
        ):
            assert score.item() == pytest.approx(score_by_hand, abs=1e-5)
            assert label.item() == label_by_hand
            np.testing.assert_allclose(box, box_by_hand, atol=1e-3)


def test_classes_with_boxes_of_their_own_make_no_cascade() -> None:
    stage = BoxHeads(TwoLayerHead(4, pool=2, width=8), num_classes=2, strides=STRIDES, pool=2)
    with pytest.raises(AssertionError, match="one box for a region"):
        CascadeHeads([stage, stage])
