"""The plain Vision Transformer as a detection backbone: windowed and global attention, decomposed relative position.

After "Exploring Plain Vision Transformer Backbones for Object Detection" (Li et al., 2022, arXiv:2203.16527). Parameter
names are those of the MAE and ViTDet checkpoints, so published weights load by key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ViT(nn.Module):
    """A plain ViT whose blocks attend within windows, but for a few global ones.

    Images (B, 3, H, W), both sides multiples of `patch`, become one map {patch: (B, D, H/patch, W/patch)}.

    `pretrain_grid` is the side of the position table in patches (224 px / 16 = 14, and one row for the class token
    that MAE trained with), `relative_grid` the side that the global blocks' relative tables are made for (1024 px / 16
    = 64 in ViTDet). Both are resampled to the picture's grid by a matrix that is made once for a grid: training
    multiplies by it, so gradients reach the published table; prediction keeps the product.
    """

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
        checkpoint_blocks: bool = False,
        conv_stem: bool = False,
    ) -> None:
        super().__init__()
        assert all(0 <= block < depth for block in global_blocks), "a global block must be one of the blocks"
        self.stride = patch
        self.channels = {patch: width}
        self.checkpoint_blocks = checkpoint_blocks
        self.patch_embed = ConvStem(patch, width) if conv_stem else PatchEmbed(patch, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, pretrain_grid**2 + 1, width))  # row 0: the class token's
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                mlp_ratio=mlp_ratio,
                drop_path=drop_path * i / max(depth - 1, 1),  # grows linearly with depth
                window=0 if i in global_blocks else window,
                table_side=relative_grid if i in global_blocks else window,
            )
            for i in range(depth)
        )
        self._kept_positions: tuple[tuple[object, ...], Tensor] | None = None
        self.apply(_initialise)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        x = self.patch_embed(images)  # (B, H/S, W/S, D)
        x = x + self.positions(x.shape[1], x.shape[2]).to(x.dtype)
        for block in self.blocks:
            if self.checkpoint_blocks and self.training:
                x = cast(Tensor, checkpoint(block, x, use_reentrant=False))
            else:
                x = block(x)
        return {self.stride: x.permute(0, 3, 1, 2)}  # (B, D, H/S, W/S), channels last in memory

    def positions(self, rows: int, columns: int) -> Tensor:
        """The position table for a grid: (1, rows, columns, D)."""
        key = (rows, columns, self.pos_embed._version, self.pos_embed.data_ptr())
        if torch.is_grad_enabled():
            self._kept_positions = None  # a step may follow, and fused optimizers leave `_version` as it is
        elif self._kept_positions and self._kept_positions[0] == key:
            return self._kept_positions[1]
        table = self.pos_embed[0, 1:]  # (G*G, D)
        side = math.isqrt(len(table))
        with torch.autocast(table.device.type, enabled=False):
            resampled = grid_matrix(side, rows, columns, table.device) @ table  # (rows*columns, D)
        resampled = resampled.reshape(1, rows, columns, -1)
        if not torch.is_grad_enabled():
            self._kept_positions = (key, resampled)
        return resampled


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: (B, 3, H, W) → (B, H/S, W/S, D)."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        # As MAE: a patch embedding is a linear layer over the patch's pixels.
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).permute(0, 2, 3, 1)


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
        return super().forward(input).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Pre-norm transformer block over tokens on a grid, (B, H, W, D) → (B, H, W, D); `window` 0 is global attention."""

    def __init__(
        self, width: int, heads: int, *, mlp_ratio: float, drop_path: float, window: int, table_side: int
    ) -> None:
        super().__init__()
        self.window = window
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, table_side)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self._attend(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        if not self.window:
            return self.attn(x)
        windows, padded = split_windows(x, self.window)
        return join_windows(self.attn(windows), padded, x.shape[1], x.shape[2])

    def _drop(self, branch: Tensor) -> Tensor:
        """Stochastic depth (Huang et al., 2016): the whole branch of a sample is left out, the others scaled up."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        mask = branch.new_empty(branch.shape[0], 1, 1, 1).bernoulli_(keep)
        return branch * mask / keep


class Attention(nn.Module):
    """Multi-head self-attention over a grid of tokens with decomposed relative position: (B, H, W, D) → (B, H, W, D).

    The logit of query (y, x) and key (v, u) is q·k/√d + q·Rh[y - v] + q·Rw[x - u]. Queries lengthened by q·Rh and q·Rw
    and keys lengthened by one-hot rows and columns give the same sum as one dot product, so fused attention needs no
    bias of T x T logits.
    """

    def __init__(self, width: int, heads: int, table_side: int) -> None:
        super().__init__()
        assert width % heads == 0, f"width {width} is not a multiple of {heads} heads"
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * table_side - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * table_side - 1, width // heads))

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, D = x.shape
        d = D // self.heads
        qkv = self.qkv(x).reshape(B, H * W, 3, self.heads, d).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each (B, heads, T, d), T = H*W
        grid = q.reshape(B, self.heads, H, W, d)
        by_row = torch.einsum("bnyxd,yvd->bnyxv", grid, relative_rows(self.rel_pos_h, H).to(q.dtype))
        by_column = torch.einsum("bnyxd,xud->bnyxu", grid, relative_rows(self.rel_pos_w, W).to(q.dtype))
        q = torch.cat([q * d**-0.5, by_row.flatten(2, 3), by_column.flatten(2, 3)], dim=-1)  # (B, heads, T, d+H+W)
        where = one_hot_grid(H, W, k.device, k.dtype).expand(B, self.heads, -1, -1)  # (B, heads, T, H+W)
        k = torch.cat([k, where], dim=-1)
        # Fused kernels want one head size for q, k and v: zeros behind v come out as zeros and are cut off.
        y = F.scaled_dot_product_attention(q, k, F.pad(v, (0, H + W)), scale=1.0)[..., :d]
        return self.proj(y.transpose(1, 2).reshape(B, H, W, D))


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def split_windows(x: Tensor, side: int) -> tuple[Tensor, tuple[int, int]]:
    """(B, H, W, D) → (B*windows, side, side, D) and the padded (H, W).

    Grids that `side` does not divide are padded with zeros at the bottom and right; the padding takes part in the
    attention as it did when the published weights were trained.
    """
    B, H, W, D = x.shape
    x = F.pad(x, (0, 0, 0, -W % side, 0, -H % side))
    padded = (x.shape[1], x.shape[2])
    x = x.reshape(B, padded[0] // side, side, padded[1] // side, side, D).transpose(2, 3)
    return x.reshape(-1, side, side, D), padded


def join_windows(windows: Tensor, padded: tuple[int, int], rows: int, columns: int) -> Tensor:
    """The inverse of `split_windows`: (B*windows, side, side, D) → (B, rows, columns, D)."""
    side, D = windows.shape[1], windows.shape[3]
    x = windows.reshape(-1, padded[0] // side, padded[1] // side, side, side, D).transpose(2, 3)
    return x.reshape(-1, *padded, D)[:, :rows, :columns].contiguous()


def relative_rows(table: Tensor, side: int) -> Tensor:
    """Rows of a relative-position table for every pair of places on a side: (2L-1, d) → (side, side, d).

    A table made for another side is resampled linearly, as ViTDet does.
    """
    if len(table) != 2 * side - 1:
        with torch.autocast(table.device.type, enabled=False):
            table = line_matrix(len(table), 2 * side - 1, table.device) @ table  # (2*side-1, d)
    place = torch.arange(side, device=table.device)
    return table[place[:, None] - place[None, :] + side - 1]


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def line_matrix(source: int, target: int, device: torch.device) -> Tensor:
    """The linear resampling of `source` points to `target` as a matrix (target, source)."""
    with torch.no_grad():
        rows = F.interpolate(torch.eye(source)[:, None], size=target, mode="linear")  # (source, 1, target)
        return rows[:, 0].T.contiguous().to(device)


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def grid_matrix(side: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """The bicubic resampling of a side x side grid to rows x columns as a matrix (rows*columns, side*side)."""
    if (side, side) == (rows, columns):
        return torch.eye(side * side, device=device)
    with torch.no_grad():
        basis = torch.eye(side * side).reshape(side * side, 1, side, side)
        grids = F.interpolate(basis, size=(rows, columns), mode="bicubic", align_corners=False)
        return grids.reshape(side * side, rows * columns).T.contiguous().to(device)


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def one_hot_grid(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """For each place of a grid its row and its column as one-hot numbers: (rows*columns, rows+columns)."""
    row = torch.eye(rows).repeat_interleave(columns, dim=0)
    column = torch.eye(columns).repeat(rows, 1)
    return torch.cat([row, column], dim=1).to(device, dtype)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
