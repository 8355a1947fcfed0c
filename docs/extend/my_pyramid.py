"""A pyramid of your own: `boxwright train --plugin docs/extend/my_pyramid.py --pyramid my_pyramid ...`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from boxwright.registry import register


class Flat(nn.Module):
    """Each map by itself through a 1x1 convolution, and a coarser level by pooling: no way down."""

    def __init__(self, sources: Mapping[int, int], width: int, levels: Sequence[int]) -> None:
        super().__init__()
        self.strides = [stride for stride in sorted(sources) if stride in levels]
        self.convolutions = nn.ModuleList(nn.Conv2d(sources[stride], width, 1) for stride in self.strides)
        self.channels = dict.fromkeys([*self.strides, 2 * self.strides[-1]], width)  # {stride: channels}, the contract

    def forward(self, maps: Mapping[int, Tensor]) -> dict[int, Tensor]:
        levels = {s: layer(maps[s]) for s, layer in zip(self.strides, self.convolutions, strict=True)}
        top = self.strides[-1]
        return levels | {2 * top: F.max_pool2d(levels[top], kernel_size=1, stride=2)}


@register("my_pyramid", kind="pyramid")
def my_pyramid(*, channels: Mapping[int, int], width: int, levels: Sequence[int], extra: str | None) -> Flat:
    """One 1x1 convolution a map; `channels` is {stride: channels} of the backbone."""
    return Flat(channels, width, levels)
