"""A backbone of your own: `boxwright train --plugin docs/extend/my_backbone.py --backbone my_backbone --data DATA`."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from boxwright.registry import register


class Steps(nn.Module):
    """Convolutions that halve the picture five times; the last four maps are kept."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [3, width, width, 2 * width, 4 * width, 8 * width]
        self.steps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(1, after), nn.GELU())
            for before, after in pairwise(widths)
        )
        self.channels = {4: width, 8: 2 * width, 16: 4 * width, 32: 8 * width}  # {stride: channels}, the contract

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        maps = {}
        for i, step in enumerate(self.steps):
            images = step(images)  # (B, C, H / 2^(i+1), W / 2^(i+1))
            maps[2 ** (i + 1)] = images
        return {stride: maps[stride] for stride in self.channels}


@register("my_backbone", kind="backbone")
def my_backbone(*, width: int = 32) -> Steps:
    """Five strided convolutions."""
    return Steps(width)
