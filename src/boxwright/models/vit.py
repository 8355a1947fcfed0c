"""The plain Vision Transformer as a detection backbone: patches to tokens, then windowed and a few global blocks.

After "Exploring Plain Vision Transformer Backbones for Object Detection" (Li et al., 2022, arXiv:2203.16527). Parameter
names are those of the MAE and ViTDet checkpoints, so published weights load by key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from boxwright.models import chance
from boxwright.models.attention import Attention, Form, line_matrix, weighted
from boxwright.models.kept import Remembering


class ViT(Remembering):
    """A plain ViT whose blocks attend within windows, but for a few global ones.

    Images (B, 3, H, W), both sides multiples of `patch`, become one map {patch: (B, D, H/patch, W/patch)}.

    `pretrain_grid` is the side of the position table in patches (224 px / 16 = 14, and one row for the class token
    that MAE trained with), `relative_grid` the side that the global blocks' relative tables are made for (1024 px / 16
    = 64 in ViTDet). Both are resampled to the picture's grid by matrices that are made once for a grid: training
    multiplies by them, so gradients reach the published table; prediction keeps the product (see `Remembering`).

    `checkpoint_blocks` keeps only the tokens between blocks for the backward pass and runs each block again there.
    `attention` picks one form of it for every block (see `attend`); "auto" is the fastest where the model runs.
    """

    pos_embed: nn.Parameter | None
    weights_name: str | None = None  # of the weights published for it

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        patch: int = 16,
        window: int = 14,
        global_blocks: Sequence[int] = (2, 5, 8, 11),
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        pretrain_grid: int = 14,
        relative_grid: int = 64,
        use_abs_pos: bool = True,
        rel_pos: bool = True,
        checkpoint_blocks: bool = False,
        conv_stem: bool = False,
        attention: Form = "auto",
    ) -> None:
        super().__init__()
        assert all(0 <= block < depth for block in global_blocks), "a global block must be one of the blocks"
        assert 0 <= drop_path < 1, f"drop path {drop_path} is no share from 0 to below 1"
        self.stride = patch
        self.channels = {patch: width}
        self.drop_path = drop_path
        self.checkpoint_blocks = checkpoint_blocks
        self.patch_embed = ConvStem(patch, width) if conv_stem else PatchEmbed(patch, width)
        table = nn.Parameter(torch.zeros(1, pretrain_grid**2 + 1, width)) if use_abs_pos else None
        self.register_parameter("pos_embed", table)  # row 0: the class token's
        self.blocks = nn.ModuleList(
            Block(
                Attention(
                    width,
                    heads,
                    window=0 if i in global_blocks else window,
                    table_side=relative_grid if i in global_blocks else window,
                    relative=rel_pos,
                    form=attention,
                ),
                Mlp(width, int(width * mlp_ratio)),
            )
            for i in range(depth)
        )
        self.apply(_initialise)
        if table is not None:
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        x = self.patch_embed(images)  # (B, H/S, W/S, D)
        if self.pos_embed is not None:
            x = x + self.positions(x.shape[1], x.shape[2])  # float32 also under autocast, so that small steps add up
        for block, scale in zip(self.blocks, self._path_scales(x), strict=True):
            if self.checkpoint_blocks and self.training:
                x = cast(Tensor, checkpoint(block, x, scale, use_reentrant=False, preserve_rng_state=False))
            else:
                x = block(x, scale)
        return {self.stride: x.permute(0, 3, 1, 2)}  # (B, D, H/S, W/S), channels last in memory

    def positions(self, rows: int, columns: int) -> Tensor:
        """The position table for a grid: (1, rows, columns, D)."""
        return self.made_of("pos_embed", (rows, columns), lambda table: _resampled(table, rows, columns))

    def _path_scales(self, x: Tensor) -> Sequence[Tensor | None]:
        """For each block what its two branches are multiplied by, (2, B): 0, or 1 / the share that is kept.

        Stochastic depth (Huang et al., 2016); the share that is dropped grows linearly to `drop_path`. Drawn for all
        blocks at once, so that blocks run again by checkpointing drop the same, and are all one to a compiler.
        """
        depth = len(self.blocks)
        if not self.training or self.drop_path == 0:
            return [None] * depth
        kept = torch.linspace(1, 1 - self.drop_path * (depth > 1), depth, device=x.device)[:, None, None]
        return ((chance.uniform((depth, 2), len(x), x.device) < kept) / kept).unbind(0)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: (B, 3, H, W) → (B, H/S, W/S, D)."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        # As MAE: a patch embedding is a linear layer over the patch's pixels.
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))

    def forward(self, images: Tensor) -> Tensor:
        # Tokens in a row in memory from here on: sums and norms keep the layout that they find.
        return self.proj(images).permute(0, 2, 3, 1).contiguous()


class ConvStem(nn.Sequential):
    """3x3 convolutions of stride 2 in the place of one large patch: (B, 3, H, W) → (B, H/S, W/S, D).

    Learns from random weights in far fewer steps ("Early Convolutions Help Transformers See Better", Xiao et al.,
    2021, arXiv:2106.14881). `patch` is a power of two.
    """

    def __init__(self, patch: int, width: int) -> None:
        halvings = patch.bit_length() - 1
        assert patch == 2**halvings, f"patch {patch} is not a power of two"
        widths = [3, *(width // 2**i for i in reversed(range(halvings)))]
        layers: list[nn.Module] = []
        for source, target in pairwise(widths):
            conv = nn.Conv2d(source, target, kernel_size=3, stride=2, padding=1, bias=False)
            layers += [conv, nn.GroupNorm(1, target), nn.GELU()]
        super().__init__(*layers, nn.Conv2d(width, width, kernel_size=1))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).permute(0, 2, 3, 1).contiguous()


class Block(nn.Module):
    """Pre-norm transformer block over tokens on a grid: (B, H, W, D) → (B, H, W, D)."""

    def __init__(self, attention: Attention, mlp: Mlp) -> None:
        super().__init__()
        width = attention.qkv.in_features
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = mlp

    def forward(self, x: Tensor, scales: Tensor | None = None) -> Tensor:
        """`scales` (2, B) multiply what attention and mlp add to each sample."""
        x = _add(x, lambda x: self.attn(self.norm1(x)), None if scales is None else scales[0])
        return _add(x, lambda x: self.mlp(self.norm2(x)), None if scales is None else scales[1])


def _add(x: Tensor, branch: Callable[[Tensor], Tensor], scale: Tensor | None) -> Tensor:
    if scale is None:
        return x + branch(x)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        kept = scale.nonzero()[:, 0]
        if len(kept) < len(x):  # a branch that is dropped need not be run; elsewhere to look would mean to wait
            return x.index_add(0, kept, (branch(x[kept]) * scale[kept, None, None, None]).to(x.dtype))
    return x + branch(x) * scale[:, None, None, None]


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def _resampled(table: Tensor, rows: int, columns: int) -> Tensor:
    """The position table (1, 1 + G*G, D) for another grid, bicubically: (1, rows, columns, D)."""
    side = math.isqrt(table.shape[1] - 1)
    grid = table[0, 1:].unflatten(0, (side, side))
    grid = weighted(line_matrix, grid.transpose(0, 1), side, columns, "bicubic")  # (columns, G, D)
    return weighted(line_matrix, grid.transpose(0, 1), side, rows, "bicubic")[None]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
