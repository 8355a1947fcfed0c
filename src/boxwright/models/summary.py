"""What a named detector costs, found without memory for its weights: parameters, FLOPs, levels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.flop_counter import FlopCounterMode

from boxwright import registry
from boxwright.models.detectors.base import Detector


@dataclass(frozen=True)
class Summary:
    """A detector in numbers."""

    name: str
    parameters: int
    trainable: int
    gflops: float  # 10^9 floating-point operations (a multiply-add is two) to predict one picture of `size` squared
    backbone_gflops: float  # of them for backbone and pyramid
    size: int  # pixels
    levels: dict[int, int]  # {stride: channels} that the detection module looks at


def summarise(name: str, *, num_classes: int = 20, size: int = 640, **options: Any) -> Summary:
    """Build a detector on the meta device, where tensors have shapes but no values, and count."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that tensors there have shapes but no values: as is meant
        detector = registry.build(name, num_classes=num_classes, **options)
    assert isinstance(detector, Detector)
    detector.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        maps = detector.backbone(torch.zeros(1, 3, size, size, device="meta"))
        below = counter.get_total_flops()
        detector.work(maps)
        total = counter.get_total_flops()
    return Summary(
        name,
        parameters=sum(p.numel() for p in detector.parameters()),
        trainable=sum(p.numel() for p in detector.parameters() if p.requires_grad),
        gflops=total / 1e9,
        backbone_gflops=below / 1e9,
        size=size,
        levels=dict(cast(Mapping[int, int], detector.backbone.channels)),
    )
