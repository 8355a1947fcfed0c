"""A plain ViT from timm as a backbone of one map: windowed and global attention, positions for any size of picture."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from boxwright.models import chance
from boxwright.models.pyramid import Maps
from boxwright.types import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # timm's own, on import
    from timm.layers.pos_embed import resample_abs_pos_embed

WINDOW = 14  # tokens a side, as ViTDet has it
PREFIX = ("cls_token", "dist_token", "reg_token")  # tokens that stand for no place, in timm's order

Attend = Callable[[Tensor, Tensor | None], Tensor]  # tokens (L, P + T, D) and their rotations → (L, P + T, D)


class Body(nn.Module):
    """What a backbone from timm is besides its layers.

    `mean` and `std` are the pixels' that it was trained with; `weights_name` (timm:NAME) and `options` are what timm
    builds the same net from. A frozen one gets no gradients and stays in evaluation mode.
    """

    runs_in_order = True  # its layers are registered in the order in which they run

    def __init__(self, name: str, options: dict[str, object], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.weights_name, self.options = f"timm:{name}", options
        self.mean, self.std = tuple(mean), tuple(std)
        self.channels: dict[int, int] = {}  # {stride: C} of the maps that come out
        self.frozen = False

    def freeze(self) -> None:
        self.frozen = True
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Body:
        return super().train(mode and not self.frozen)


class ViTDetForm(Body):
    """timm's VisionTransformer or Eva whose blocks attend within windows, but for a few global ones.

    After "Exploring Plain Vision Transformer Backbones for Object Detection" (Li et al., 2022, arXiv:2203.16527).
    Images (B, 3, H, W), both sides multiples of the patch, become one map {patch: (B, D, H/patch, W/patch)}, after the
    net's last norm where it has one. The layers are the net's own and so are their names, so its weights load by key.

    A window's tokens attend to each other and to the prefix tokens (class, registers): each window has a copy of
    those, and the copies are averaged behind the block, each counted as often as its window has tokens. Windows that
    the picture's edge cuts are smaller; there is no padding. Rotary embeddings are those of a token's place in the
    picture, whatever its window. `window` 0 makes every block global: the function that was pretrained.
    """

    def __init__(
        self,
        vit: nn.Module,
        *,
        window: int = WINDOW,
        global_blocks: Sequence[int] | None = None,
        drop_path: float = 0.0,
        checkpoint_blocks: bool = False,
        **about: object,
    ) -> None:
        super().__init__(**about)  # pyright: ignore[reportArgumentType]
        depth = len(cast(nn.ModuleList, vit.blocks))
        self.window = window
        self.global_blocks = frozenset(quarters(depth) if global_blocks is None else global_blocks)
        self.drop_path = drop_path
        self.checkpoint_blocks = checkpoint_blocks
        if window < 0 or not all(0 <= block < depth for block in self.global_blocks):
            asked = f"window {window}, global_blocks {sorted(self.global_blocks)}"
            raise UserError(
                f"{self.weights_name} has blocks 0 to {depth - 1} and windows of 0 tokens or more, not {asked}"
            )
        self.patch_embed = cast(nn.Module, vit.patch_embed)
        for token in PREFIX:
            self.register_parameter(token, cast(nn.Parameter | None, getattr(vit, token, None)))
        self.pos_embed = cast(nn.Parameter | None, vit.pos_embed)
        self.pos_drop = cast(nn.Module, vit.pos_drop)
        self.norm_pre = cast(nn.Module, vit.norm_pre)
        self.rope = cast(nn.Module | None, getattr(vit, "rope", None))
        self.rope_of_each_block = bool(getattr(vit, "rope_mixed", False))
        self.blocks = nn.ModuleList(cast(nn.ModuleList, vit.blocks))
        self.norm = cast(nn.Module, vit.norm)
        self.pretrain_grid = cast(tuple[int, int], self.patch_embed.grid_size)
        self.stride = cast(Callable[[], int], self.patch_embed.feat_ratio)()
        self.channels = {self.stride: cast(int, vit.embed_dim)}

    def forward(self, images: Tensor) -> Maps:
        x, grid = self._embed(images)  # (B, P + T, D), P prefix tokens, T = H/S * W/S
        rotations = self._rotations(grid)
        for i, block in enumerate(self.blocks):
            attend = self._attend(block, grid, 0 if i in self.global_blocks else self.window)
            turn = rotations[i] if rotations is not None and self.rope_of_each_block else rotations
            if self.checkpoint_blocks and self.training:
                after = checkpoint(attend, x, turn, use_reentrant=False)
            else:
                after = attend(x, turn)
            x = self._drop(x, after, self.drop_path * i / max(len(self.blocks) - 1, 1))  # grows linearly with depth
        x = self.norm(x[:, -math.prod(grid) :])  # (B, T, D)
        return {self.stride: x.unflatten(1, grid).permute(0, 3, 1, 2)}  # (B, D, H/S, W/S), channels last in memory

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.patch_embed(images)  # (B, H/S, W/S, D)
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        tokens = [getattr(self, name) for name in PREFIX]
        prefix = [token.expand(len(x), -1, -1) for token in tokens if token is not None]
        if self.pos_embed is None:
            x = torch.cat([*prefix, x], dim=1)
        else:
            rows = self.pos_embed.shape[1] - math.prod(self.pretrain_grid)  # of the table, for prefix tokens
            table = resample_abs_pos_embed(self.pos_embed, list(grid), list(self.pretrain_grid), rows)
            x = torch.cat([*prefix, x], dim=1) + table if rows else torch.cat([*prefix, x + table], dim=1)
        return self.norm_pre(self.pos_drop(x)), grid

    def _rotations(self, grid: tuple[int, int]) -> Tensor | None:
        """(T, 2d) for all blocks, or (blocks, heads, T, 2d): the sines and cosines of each token's place."""
        return None if self.rope is None else cast(Callable[..., Tensor], self.rope.get_embed)(shape=grid)

    def _attend(self, block: nn.Module, grid: tuple[int, int], window: int) -> Attend:
        def everywhere(x: Tensor, turn: Tensor | None) -> Tensor:
            return block(x) if turn is None else block(x, rope=turn)

        def within_windows(x: Tensor, turn: Tensor | None) -> Tensor:
            return attend_in_windows(everywhere, x, turn, grid, window)

        return within_windows if window and window < max(grid) else everywhere

    def _drop(self, before: Tensor, after: Tensor, rate: float) -> Tensor:
        """Stochastic depth (Huang et al., 2016): what the block adds to a picture is left out, or scaled up."""
        if not self.training or rate == 0:
            return after
        kept = (chance.uniform((), len(before), before.device) < 1 - rate).to(before.dtype)[:, None, None]
        return before + (after - before) * kept / (1 - rate)


def quarters(depth: int) -> list[int]:
    """The last block of each quarter of the depth: 2 5 8 11 of 12."""
    return sorted({math.ceil(depth * quarter / 4) - 1 for quarter in (1, 2, 3, 4)})


class Span(NamedTuple):
    """A part of one side of the grid that windows of one length fill."""

    start: int
    stop: int
    window: int


def spans(length: int, window: int) -> list[Span]:
    """A side of the grid as whole windows and what is left of it."""
    whole = length - length % window
    parts = [Span(0, whole, window), Span(whole, length, length - whole)]
    return [part for part in parts if part.start < part.stop]


def attend_in_windows(attend: Attend, x: Tensor, turn: Tensor | None, grid: tuple[int, int], window: int) -> Tensor:
    """Run a block in each window of the grid alone: (B, P + T, D) → (B, P + T, D).

    Windows of one size run together, so there are at most four runs. `turn` is (T, 2d) or (heads, T, 2d).
    """
    cells = math.prod(grid)
    prefix, tokens = x[:, :-cells], x[:, -cells:].unflatten(1, grid)  # (B, P, D), (B, H, W, D)
    places = None if turn is None else turn.reshape(-1, *grid, turn.shape[-1])  # (heads or 1, H, W, 2d)
    averaged = torch.zeros_like(prefix)
    bands: list[Tensor] = []
    for rows in spans(grid[0], window):
        band: list[Tensor] = []
        for columns in spans(grid[1], window):
            windows = cut(tokens, rows, columns)  # (B, n, h*w, D)
            count, area = windows.shape[1:3]
            copies = prefix[:, None].expand(-1, count, -1, -1)  # (B, n, P, D)
            turns = None
            if places is not None:
                turns = cut(places, rows, columns).transpose(0, 1).repeat(len(x), 1, 1, 1)  # (B*n, heads, h*w, 2d)
            seen = attend(torch.cat([copies, windows], dim=2).flatten(0, 1), turns)  # (B*n, P + h*w, D)
            seen = seen.unflatten(0, (-1, count))
            averaged = averaged + seen[:, :, :-area].sum(1) * (area / cells)
            band.append(paste(seen[:, :, -area:], rows, columns))
        bands.append(torch.cat(band, dim=2))
    return torch.cat([averaged, torch.cat(bands, dim=1).flatten(1, 2)], dim=1)


def cut(x: Tensor, rows: Span, columns: Span) -> Tensor:
    """The windows of one part of a grid: (L, H, W, D) → (L, n, h*w, D)."""
    x = x[:, rows.start : rows.stop, columns.start : columns.stop]
    x = x.unflatten(2, (-1, columns.window)).unflatten(1, (-1, rows.window))  # (L, n_h, h, n_w, w, D)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def paste(windows: Tensor, rows: Span, columns: Span) -> Tensor:
    """The inverse of `cut`: (L, n, h*w, D) → (L, H, W, D) of that part."""
    across = (columns.stop - columns.start) // columns.window
    x = windows.unflatten(2, (rows.window, columns.window)).unflatten(1, (-1, across))  # (L, n_h, n_w, h, w, D)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
