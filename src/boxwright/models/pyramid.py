"""From a backbone's maps to the levels that a detector looks at, keyed by stride: `{4: ..., 8: ...}`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from boxwright.models.winograd import Conv
from boxwright.registry import nearest, register
from boxwright.types import UserError

Maps = dict[int, Tensor]

# What stands above a pyramid's coarsest level: nothing, every second cell of it (Faster R-CNN), or two more levels by
# convolution (RetinaNet), from that level or from the backbone's map below it.
Extra = Literal["pool", "p6p7", "p6p7_of_c5"] | None


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

    A map {S: (B, D, h, w)} becomes {S / scale: (B, width, ...)} for each of `scales`, powers of two, and the `extra`
    levels above them. The state-dict keys are detectron2's.
    """

    def __init__(
        self,
        stride: int,
        channels: int,
        width: int = 256,
        scales: Sequence[float] = (4.0, 2.0, 1.0, 0.5),
        extra: Extra = "pool",
    ) -> None:
        super().__init__()
        self.source = stride
        self.scales = {int(stride / scale): scale for scale in scales}
        for level, scale in self.scales.items():
            rescale, left = _rescale(channels, scale)
            smooth = [NormedConv(left, width, 1), NormedConv(width, width, 3)]
            self.add_module(_name(level), nn.Sequential(*rescale, *smooth))
        self.extra_blocks = _extra_blocks(extra, width)
        self.channels = _channels(self.scales, self.extra_blocks, width)

    def forward(self, maps: Mapping[int, Tensor]) -> Maps:
        levels = {level: self.get_submodule(_name(level))(maps[self.source]) for level in self.scales}
        return levels | self.extra_blocks(levels, maps)


class FPN(nn.Module):
    """Many maps → many: top-down sums of 1x1 laterals, then 3x3 convolutions (Lin et al., 2017, arXiv:1612.03144).

    Maps {S: (B, C_S, ...)} become {S: (B, width, ...)} and the `extra` levels above them; maps of other strides than
    those of `channels` are not looked at. The state-dict keys are torchvision's.
    """

    def __init__(
        self,
        channels: Mapping[int, int],
        width: int = 256,
        norm: Callable[[int], nn.Module] | None = None,
        extra: Extra = "pool",
    ) -> None:
        super().__init__()
        self.strides = sorted(channels)

        def convolution(source: int, kernel: int) -> nn.Sequential:
            layer = _convolution(source, width, kernel, bias=norm is None)
            return nn.Sequential(layer, norm(width)) if norm else nn.Sequential(layer)

        self.inner_blocks = nn.ModuleList(convolution(channels[s], 1) for s in self.strides)
        self.layer_blocks = nn.ModuleList(convolution(width, 3) for _ in self.strides)
        self.extra_blocks = _extra_blocks(extra, width, channels[self.strides[-1]])
        self.channels = _channels(self.strides, self.extra_blocks, width)

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
        return levels | self.extra_blocks(levels, maps)


# ------ Levels above the coarsest


class NoExtra(nn.Module):
    """No level above the coarsest."""

    count = 0

    def forward(self, levels: Maps, maps: Mapping[int, Tensor]) -> Maps:
        return {}


class Pool(nn.Module):
    """One level above the coarsest: every second cell of it, as Faster R-CNN has it."""

    count = 1

    def forward(self, levels: Maps, maps: Mapping[int, Tensor]) -> Maps:
        top = max(levels)
        return {top * 2: F.max_pool2d(levels[top], kernel_size=1, stride=2)}


class P6P7(nn.Module):
    """Two levels above the coarsest by strided convolutions (RetinaNet, arXiv:1708.02002); torchvision's keys.

    They begin at the coarsest level or, given the `channels` of the backbone's map of that stride, at that map.
    """

    count = 2

    def __init__(self, width: int, channels: int | None = None) -> None:
        super().__init__()
        self.of_map = channels is not None
        self.p6 = _convolution(channels or width, width, 3, stride=2)
        self.p7 = _convolution(width, width, 3, stride=2)

    def forward(self, levels: Maps, maps: Mapping[int, Tensor]) -> Maps:
        top = max(levels)
        p6 = self.p6(maps[top] if self.of_map else levels[top])
        return {top * 2: p6, top * 4: self.p7(F.relu(p6))}


ExtraBlocks = NoExtra | Pool | P6P7


def _extra_blocks(extra: Extra, width: int, channels: int | None = None) -> ExtraBlocks:
    if extra is None:
        return NoExtra()
    if extra == "pool":
        return Pool()
    if extra == "p6p7":
        return P6P7(width)
    if extra == "p6p7_of_c5":
        if channels is None:
            raise UserError("p6p7_of_c5 wants a map as coarse as the coarsest level: an FPN has one, else use p6p7")
        return P6P7(width, channels)
    choices = ["pool", "p6p7", "p6p7_of_c5"]
    raise UserError(f"unknown extra levels {extra!r}: wanted is {', '.join(choices)} or none.{nearest(extra, choices)}")


def _channels(strides: Iterable[int], above: ExtraBlocks, width: int) -> dict[int, int]:
    strides = list(strides)
    return dict.fromkeys([*strides, *(max(strides) << i for i in range(1, above.count + 1))], width)


# ------ By name


@register("fpn", kind="pyramid")
def fpn(
    *,
    channels: Mapping[int, int],
    width: int = 256,
    levels: Sequence[int] = (4, 8, 16, 32),
    extra: Extra = "pool",
    norm: Literal["batch", "group"] | None = None,
) -> FPN:
    """Feature pyramid network over those maps of the backbone that have a stride of `levels`."""
    norms = {None: None, "batch": nn.BatchNorm2d, "group": group_norm}
    if norm not in norms:
        raise UserError(f"unknown norm {norm!r} of the fpn: wanted is batch, group or none.")
    taken = {stride: channels[stride] for stride in sorted(channels) if stride in levels}
    if len(taken) < 2:
        advice = "use the simple pyramid" if len(channels) == 1 else "ask for levels that it has"
        raise UserError(
            f"an FPN stands on two maps or more, and of strides {_list(levels)} the backbone gives "
            f"{_list(taken) or 'none'} (it has {_list(channels)}): {advice}"
        )
    return FPN(taken, width, norms[norm], extra)


@register("simple", kind="pyramid")
def simple(
    *,
    channels: Mapping[int, int],
    width: int = 256,
    levels: Sequence[int] = (4, 8, 16, 32),
    extra: Extra = "pool",
) -> SimpleFeaturePyramid:
    """ViTDet's simple feature pyramid: every one of `levels` from the backbone's only map."""
    if len(channels) != 1:
        raise UserError(
            f"the simple pyramid stands on one map, and the backbone gives {len(channels)} "
            f"(strides {_list(channels)}): an FPN stands on several"
        )
    odd = [level for level in levels if not _is_power_of_two(level)]
    if odd or not levels:
        raise UserError(f"a pyramid's levels are strides, powers of two such as 4 8 16 32, not {list(odd or levels)}")
    ((stride, count),) = channels.items()
    return SimpleFeaturePyramid(stride, count, width, [stride / level for level in sorted(levels)], extra)


def _list(strides: Iterable[int]) -> str:
    return " ".join(str(stride) for stride in sorted(strides))


def _is_power_of_two(stride: int) -> bool:
    return stride >= 1 and stride & (stride - 1) == 0


# ------ Layers


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        normed = super().forward(input.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)  # channels last in memory, which convolutions like


class NormedConv(Conv):
    """A convolution without bias, then LayerNorm over channels; keys `weight` and `norm.*` as in detectron2."""

    def __init__(self, source: int, target: int, kernel: int) -> None:
        super().__init__(source, target, kernel, bias=False)
        self.norm = ChannelNorm(target, eps=1e-6)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(super().forward(input))


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups (Wu & He, 2018, arXiv:1803.08494), or of fewer that divide the channels.

    A group has two channels or more, so that a level of a single cell has a spread.
    """
    return nn.GroupNorm(max(math.gcd(64, channels) // 2, 1), channels)


def _convolution(source: int, target: int, kernel: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    if stride == 1:
        layer = Conv(source, target, kernel, bias=bias)
    else:
        layer = nn.Conv2d(source, target, kernel, stride=stride, padding=kernel // 2, bias=bias)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _name(stride: int) -> str:
    return f"simfp_{stride.bit_length() - 1}"  # simfp_2 has stride 4, as in detectron2


def _rescale(channels: int, scale: float) -> tuple[list[nn.Module], int]:
    """Layers that scale a map, and the channels that come out: each doubling of its sides halves them."""
    steps = round(math.log2(scale))
    assert 2.0**steps == scale, f"a scale of {scale} is no power of two"
    layers: list[nn.Module] = [nn.MaxPool2d(kernel_size=2, stride=2) for _ in range(-steps)]
    for step in range(steps):
        if step:
            layers += [ChannelNorm(channels, eps=1e-6), nn.GELU()]
        left = max(channels // 2, 1)
        layers.append(nn.ConvTranspose2d(channels, left, kernel_size=2, stride=2))
        channels = left
    return layers, channels
