"""From a backbone's maps to the levels that a detector looks at, keyed by stride: `{4: ..., 8: ...}`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

Maps = dict[int, Tensor]
Extra = Literal["pool", "p6p7"] | None  # what stands above a pyramid's coarsest level


class Joined(nn.Module):
    """A backbone's body and its pyramid: normalised images (B, 3, H, W) → {stride: (B, C, H/S, W/S)}."""

    def __init__(self, body: nn.Module, fpn: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.fpn = fpn

    @property
    def channels(self) -> dict[int, int]:
        """{stride: C} of every level that comes out."""
        return self.fpn.channels  # pyright: ignore[reportReturnType]

    def __getattr__(self, name: str) -> Any:
        """`mean` and `std` are the body's."""
        if name in ("mean", "std"):
            return getattr(self.body, name)
        return super().__getattr__(name)

    def forward(self, images: Tensor) -> Maps:
        return self.fpn(self.body(images))


class SimpleFeaturePyramid(nn.Module):
    """One map → many: scaled side by side, then 1x1 and 3x3 convolutions with LayerNorm (ViTDet, section 3).

    A map {S: (B, D, h, w)} becomes {S / scale: (B, width, ...)} for each of `scales` and, by a strided max-pool, one
    more level of twice the coarsest stride.
    """

    def __init__(
        self, stride: int, channels: int, width: int = 256, scales: Sequence[float] = (4.0, 2.0, 1.0, 0.5)
    ) -> None:
        super().__init__()
        self.source = stride
        self.scales = {int(stride / scale): scale for scale in scales}
        self.channels = dict.fromkeys([*self.scales, max(self.scales) * 2], width)
        for level, scale in self.scales.items():
            self.add_module(_name(level), nn.Sequential(*_rescale(channels, scale), *_smooth(channels, scale, width)))

    def forward(self, maps: Mapping[int, Tensor]) -> Maps:
        levels = {level: self.get_submodule(_name(level))(maps[self.source]) for level in self.scales}
        return levels | coarser(levels)


class FPN(nn.Module):
    """Many maps → many: top-down sums of 1x1 laterals, then 3x3 convolutions (Lin et al., 2017, arXiv:1612.03144).

    Maps {S: (B, C_S, ...)} become {S: (B, width, ...)} and, by a strided max-pool, twice the coarsest stride. The
    state-dict keys are torchvision's.
    """

    def __init__(
        self, channels: Mapping[int, int], width: int = 256, norm: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.strides = sorted(channels)
        self.channels = dict.fromkeys([*self.strides, self.strides[-1] * 2], width)

        def convolution(source: int, kernel: int) -> nn.Sequential:
            layer = nn.Conv2d(source, width, kernel, padding=kernel // 2, bias=norm is None)
            nn.init.kaiming_uniform_(layer.weight, a=1)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            return nn.Sequential(layer, norm(width)) if norm else nn.Sequential(layer)

        self.inner_blocks = nn.ModuleList(convolution(channels[s], 1) for s in self.strides)
        self.layer_blocks = nn.ModuleList(convolution(width, 3) for _ in self.strides)

    def forward(self, maps: Mapping[int, Tensor]) -> Maps:
        levels: Maps = {}
        above: Tensor | None = None
        for i in reversed(range(len(self.strides))):
            merged = self.inner_blocks[i](maps[self.strides[i]])
            if above is not None:
                merged = merged + F.interpolate(above, size=merged.shape[-2:], mode="nearest")
            above = merged
            levels[self.strides[i]] = self.layer_blocks[i](merged)
        levels = {stride: levels[stride] for stride in self.strides}
        return levels | coarser(levels)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        normed = super().forward(input.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)  # channels last in memory, which convolutions like


class NormedConv(nn.Conv2d):
    """A convolution without bias, then LayerNorm over channels; keys `weight` and `norm.*` as in detectron2."""

    def __init__(self, source: int, target: int, kernel: int) -> None:
        super().__init__(source, target, kernel, padding=kernel // 2, bias=False)
        self.norm = ChannelNorm(target, eps=1e-6)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(super().forward(input))


def coarser(levels: Mapping[int, Tensor]) -> Maps:
    """The level that Faster R-CNN adds above the coarsest: every second cell of it."""
    top = max(levels)
    return {top * 2: F.max_pool2d(levels[top], kernel_size=1, stride=2)}


def _name(stride: int) -> str:
    return f"simfp_{stride.bit_length() - 1}"  # simfp_2 has stride 4, as in detectron2


def _rescale(channels: int, scale: float) -> Sequence[nn.Module]:
    def double(source: int, target: int) -> nn.Module:
        return nn.ConvTranspose2d(source, target, kernel_size=2, stride=2)

    half, quarter = channels // 2, channels // 4
    return {
        4.0: [double(channels, half), ChannelNorm(half, eps=1e-6), nn.GELU(), double(half, quarter)],
        2.0: [double(channels, half)],
        1.0: [],
        0.5: [nn.MaxPool2d(kernel_size=2, stride=2)],
    }[scale]


def _smooth(channels: int, scale: float, width: int) -> list[nn.Module]:
    source = int(channels / max(scale, 1.0))  # what _rescale left of them
    return [NormedConv(source, width, 1), NormedConv(width, width, 3)]
