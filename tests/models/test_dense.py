"""What holds for every detector that speaks about every cell: RetinaNet and FCOS, on pyramids of several kinds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from boxwright import registry
from boxwright.models.detectors.boxes import Anchors
from boxwright.models.detectors.dense import DenseDetector
from boxwright.models.detectors.retinanet import RetinaNet, RetinaNetHead
from boxwright.models.pyramid import FPN, Joined
from boxwright.types import Batch, UserError

CLASSES, WIDTH = 3, 32
SIZES = ((128, 160), (100, 140))


class Body(nn.Module):
    """A backbone of a convolution a stride."""

    def __init__(self, *strides: int) -> None:
        super().__init__()
        self.channels = dict.fromkeys(strides, 8)
        self.layers = nn.ModuleList(nn.Conv2d(3, 8, s + 1, stride=s, padding=s // 2) for s in strides)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        return {s: layer(images).relu() for s, layer in zip(self.channels, self.layers, strict=True)}


def make_batch(boxes: list[list[list[float]]] | None = None) -> Batch:
    if boxes is None:
        boxes = [[[10.0, 20, 90, 100], [60.5, 30.25, 150, 120]], [[5.0, 5, 40, 30]]]
    images = torch.randint(0, 256, (2, 3, 128, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(
        ("a", "b"),
        images,
        SIZES,
        tuple(torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in boxes),
        tuple(torch.arange(len(b)) % CLASSES for b in boxes),
        tuple(torch.zeros(len(b), dtype=torch.bool) for b in boxes),
    )


def build(name: str, *strides: int) -> DenseDetector:
    torch.manual_seed(0)
    model = registry.build(name, num_classes=CLASSES, backbone=Body(*(strides or (8, 16, 32))), width=WIDTH)
    logits = model.head.classification_head.cls_logits
    nn.init.constant_(logits.bias, -1.0)  # an untrained detector finds nothing
    for layer in model.head.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    return model


@pytest.fixture(params=["retinanet", "fcos"])
def model(request: pytest.FixtureRequest) -> DenseDetector:
    return build(request.param)


# ------ Any backbone


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
@pytest.mark.parametrize(
    ("strides", "levels"),
    [
        ((4, 8, 16, 32), [8, 16, 32, 64, 128]),
        ((8, 16), [8, 16, 32, 64]),  # the levels above go on from what is there
        ((16,), [8, 16, 32, 64, 128]),  # the simple pyramid
        ((8,), [8, 16, 32, 64, 128]),
    ],
)
def test_any_backbone(name: str, strides: tuple[int, ...], levels: list[int]) -> None:
    model = build(name, *strides)
    assert model.strides == list(model.backbone.channels) == levels
    losses = model.train().losses(make_batch())
    assert all(loss.ndim == 0 and torch.isfinite(loss) and loss > 0 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        if strides[0] == 4 and parameter_name.startswith("backbone.body.layers.0"):
            continue  # a map that no level is made of
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.any(), parameter_name
    for detections, (height, width) in zip(model.eval().predict(make_batch()), SIZES, strict=True):
        assert len(detections) > 5
        x1, y1, x2, y2 = detections.boxes.T
        assert ((x1 >= 0) & (y1 >= 0) & (x1 < x2) & (y1 < y2) & (x2 <= width) & (y2 <= height)).all()
        assert (np.diff(detections.scores) <= 0).all()
        assert set(detections.labels.tolist()) <= set(range(CLASSES))


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_before_training_every_class_is_unlikely(name: str) -> None:
    model = registry.build(name, num_classes=CLASSES, backbone=Body(8, 16, 32), width=WIDTH).eval()
    for level in model.backbone(torch.zeros(1, 3, 128, 128)).values():
        assert model.head(level)[0].sigmoid().mean().item() == pytest.approx(0.01, rel=0.2)


def test_a_pyramid_without_a_level_is_refused() -> None:
    body = Joined(Body(8, 16), FPN({8: 8, 16: 8}, WIDTH))
    with pytest.raises(UserError, match="RetinaNet looks at strides 4 8, but the pyramid gives 8 16 32: 4 are missing"):
        RetinaNet(body, RetinaNetHead(WIDTH, 3, CLASSES), Anchors({4: [16.0], 8: [32.0]}))
    with pytest.raises(UserError, match="expects levels of 64 channels"):
        RetinaNet(body, RetinaNetHead(64, 3, CLASSES), Anchors({8: [32.0]}))


# ------ Training


def test_pictures_without_objects(model: DenseDetector) -> None:
    losses = model.train().losses(make_batch([[], []]))
    assert losses["loss_box_reg"].item() == 0
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_a_picture_without_objects_beside_one_with_them(model: DenseDetector) -> None:
    losses = model.train().losses(make_batch([[], [[5.0, 5, 40, 30]]]))
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())


def logit_gradients(model: DenseDetector, batch: Batch) -> list[Tensor]:
    """Of the sum of the losses by the class logits of each level, (B, N, K)."""
    logits: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, outputs: tuple[Tensor, ...]) -> None:
        outputs[0].retain_grad()
        logits.append(outputs[0])

    hook = model.head.register_forward_hook(keep)
    torch.stack(list(model.train().losses(batch).values())).sum().backward()
    hook.remove()
    return [level.grad for level in logits if level.grad is not None]


def test_ignored_regions_neither_attract_nor_repel(model: DenseDetector) -> None:
    """Class logits over an ignored region may be anything; a box is wanted nowhere in it."""
    region = torch.tensor([[20.0, 20, 116, 116]])
    batch = make_batch([region.tolist(), [[5.0, 5, 40, 30]]])
    ignored = replace(batch, difficult=(torch.tensor([True]), torch.tensor([False])))
    maps = model.backbone(model.normalise(batch))
    if isinstance(model, RetinaNet):
        inside = [box_iou(region, anchors)[0] >= 0.4 for anchors in model.anchors(maps)]
    else:
        cells = [level[:, :2] for level in model._cells(maps)]
        inside = [((c > region[0, :2]) & (c < region[0, 2:])).all(dim=1) for c in cells]
    assert sum(int(level.sum()) for level in inside) > 5
    with_object = logit_gradients(model, batch)
    with_region = logit_gradients(model, ignored)
    without = logit_gradients(model, make_batch([[], batch.boxes[1].tolist()]))
    for level, here in enumerate(inside):
        assert not with_region[level][0, here].any()
        torch.testing.assert_close(with_region[level][0, ~here], without[level][0, ~here])
        torch.testing.assert_close(with_region[level][1], without[level][1])
        assert without[level][0].all()  # where nothing is, every logit is pushed down
    assert any((level[0, here] < 0).any() for level, here in zip(with_object, inside, strict=True))  # attracted
    everywhere = replace(batch, difficult=tuple(torch.ones_like(d) for d in batch.difficult))
    assert model.losses(everywhere)["loss_box_reg"].item() == 0


def test_an_object_in_an_ignored_region_still_attracts(model: DenseDetector) -> None:
    batch = make_batch([[[10.0, 20, 90, 100], [0, 0, 160, 128]], []])
    batch = replace(batch, difficult=(torch.tensor([False, True]), batch.difficult[1]))
    assert any((level[0, :, 0] < 0).any() for level in logit_gradients(model, batch))
    assert model.losses(batch)["loss_box_reg"] > 0


def test_losses_are_float32_under_autocast(model: DenseDetector) -> None:
    batch = make_batch()
    exact = model.train().losses(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.losses(batch)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.05), name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(found.boxes.dtype == np.float32 for found in model.eval().predict(batch))


# ------ Prediction


def test_pictures_together_are_pictures_one_by_one(model: DenseDetector) -> None:
    batch = make_batch()
    for i, expected in enumerate(model.eval().predict(batch)):
        (alone,) = model.predict(Batch(("x",), batch.images[i : i + 1], batch.sizes[i : i + 1], (), (), ()))
        np.testing.assert_allclose(alone.scores, expected.scores, atol=1e-5)
        np.testing.assert_allclose(alone.boxes, expected.boxes, atol=1e-3)
        np.testing.assert_array_equal(alone.labels, expected.labels)


def test_each_level_gives_its_best(model: DenseDetector) -> None:
    """Without suppression the best of each level are found, be they fewer than asked for; none without area."""
    model.eval()
    model.nms_threshold, model.candidates_per_level, model.detections_per_image = 1.0, 40, 1000
    batch = make_batch()
    with torch.no_grad():
        levels = model.score(model.backbone(model.normalise(batch)))
    for i, (found, (height, width)) in enumerate(zip(model.predict(batch), SIZES, strict=True)):
        wanted: list[float] = []
        for scores, codes, places in levels:
            ranked = sorted(((s, n) for n, row in enumerate(scores[i].tolist()) for s in row), reverse=True)[:40]
            for score, n in ranked:
                x1, y1, x2, y2 = model.decode(codes[i, n : n + 1], places[n : n + 1])[0].tolist()
                seen = min(x2, width) - max(x1, 0) >= 1e-2 and min(y2, height) - max(y1, 0) >= 1e-2
                if score > model.score_threshold and seen:
                    wanted.append(score)
        assert len(wanted) > 40
        np.testing.assert_allclose(found.scores, sorted(wanted, reverse=True), rtol=1e-6)
    model.score_threshold = 1.0
    assert [len(found) for found in model.predict(batch)] == [0, 0]


def test_work_runs_every_layer_of_the_head(model: DenseDetector) -> None:
    ran: dict[str, int] = {}
    for name, layer in model.head.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda *_, name=name: ran.update({name: ran.get(name, 0) + 1}))
    model.eval().work(model.backbone(torch.zeros(1, 3, 128, 128)))
    layers = [name for name, layer in model.head.named_modules() if isinstance(layer, nn.Conv2d)]
    assert ran == dict.fromkeys(layers, len(model.strides))
