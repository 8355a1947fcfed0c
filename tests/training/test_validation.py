"""The loss on validation pictures: predictions stay as they are, and no picture's loss depends on the others."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from boxwright import registry
from boxwright.data.dataset import open_dataset
from boxwright.data.loader import ordered_batches
from boxwright.data.transforms import Fit
from boxwright.inference.predictor import Predictor
from boxwright.models.detectors.base import Detector
from boxwright.training.validation import WithLosses, picture_seed
from boxwright.types import Detections, Record

KINDS = ("fasterrcnn", "cascade_rcnn", "retinanet", "fcos")
FIT = Fit(96)


class Body(nn.Module):
    """A backbone of one convolution a stride, with BatchNorm, which training and evaluation treat differently."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = {8: 8, 16: 8, 32: 8}
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 8, s + 1, stride=s, padding=s // 2), nn.BatchNorm2d(8)) for s in self.channels
        )

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        return {s: layer(images).relu() for s, layer in zip(self.channels, self.layers, strict=True)}


@pytest.fixture(params=KINDS)
def detector(request: pytest.FixtureRequest) -> Detector:
    torch.manual_seed(0)
    made: Detector = registry.build(request.param, num_classes=2, backbone=Body(), width=16)
    for name, parameter in made.named_parameters():  # opinions, so that something is found
        if "cls" in name and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.5)
        elif name.endswith("cls_logits.bias"):
            nn.init.constant_(parameter, -1.0)
    return made.eval()


@pytest.fixture(scope="module")
def records(drawn: Path) -> tuple[Record, ...]:
    found = open_dataset(drawn).read("train").records
    hard = replace(found[1], difficult=np.ones(len(found[1].boxes), bool))
    of_objects = ("boxes", "labels", "difficult", "truncated", "crowd", "occluded", "pose")
    empty = replace(found[2], **{name: getattr(found[2], name)[:0] for name in of_objects})
    return (found[0], hard, empty, *found[3:])


def judged(detector: Detector, records: Sequence[Record], batch: int) -> tuple[WithLosses, list[Detections]]:
    watched = WithLosses(detector)
    return watched, Predictor(watched, ("circle", "square"), FIT).predict_records(records, batch=batch)


def test_predictions_are_those_without_losses_bit_for_bit(detector: Detector, records: tuple[Record, ...]) -> None:
    _, found = judged(detector, records, 4)
    alone = Predictor(detector, ("circle", "square"), FIT).predict_records(records, batch=4)
    assert sum(len(picture) for picture in alone) > 20
    for ours, theirs in zip(found, alone, strict=True):
        for name in ("boxes", "scores", "labels"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name))


def test_losses_are_the_detectors_own(detector: Detector, records: tuple[Record, ...]) -> None:
    batch = next(ordered_batches(records, FIT, batch=4))
    batch = replace(batch, seeds=tuple(picture_seed(name) for name in batch.ids))
    watched = WithLosses(detector)
    watched.predict(batch)
    with torch.inference_mode():
        own = {name: loss.item() for name, loss in detector.losses(batch).items()}
    assert watched.means() == pytest.approx(own, rel=1e-6)
    assert all(value > 0 for value in own.values())
    assert detector.train().losses(batch).keys() == own.keys()


def test_neither_order_nor_company_changes_the_loss(detector: Detector, records: tuple[Record, ...]) -> None:
    together = judged(detector, records, len(records))[0]
    shuffled = random.Random(0).sample(records, len(records))
    assert sum(together.terms[""]) == len(records)
    for order, batch in ((records, 1), (records, 3), (shuffled, 3)):
        torch.rand(3)
        other = judged(detector, order, batch)[0].means()
        assert other == pytest.approx(together.means(), abs=1e-5)


def test_the_same_pictures_give_the_same_numbers(detector: Detector, records: tuple[Record, ...]) -> None:
    assert judged(detector, records, 4)[0].means() == judged(detector, records, 4)[0].means()


def test_nothing_moves_while_judging(detector: Detector, records: tuple[Record, ...]) -> None:
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    generator = torch.get_rng_state()
    judged(detector, records, 4)
    assert torch.equal(torch.get_rng_state(), generator)
    for name, tensor in detector.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_no_pictures_no_means(detector: Detector) -> None:
    assert WithLosses(detector).means() == {}
