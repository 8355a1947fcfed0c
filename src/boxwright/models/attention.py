"""Self-attention over a grid of tokens with decomposed relative position, in the forms that suit a CPU and a GPU.

The logit of query (y, x) and key (v, u) is q·k/√d + q·Rh[y - v] + q·Rw[x - u] (MViTv2, Li et al., 2022,
arXiv:2112.01526; so in ViTDet). All forms give the same numbers; benchmarks/vitdet.py compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from boxwright.models.kept import Remembering, constant, without_autocast

Form = Literal["auto", "explicit", "folded", "masked", "blocked"]
BLOCK = 1 << 19  # logits at a time and thread in the blocked form: 2 MiB of float32, about a core's share of cache


class Attention(Remembering):
    """Multi-head self-attention over a grid of tokens, (B, H, W, D) → (B, H, W, D); `window` 0 is global attention.

    Grids that `window` does not divide reach past their end into windows of which only part is there. Published
    weights were trained with zeros behind the norm at those places, which all attend to: there q, k and v are the
    bias of `qkv`. So they cost nothing in the linear layers.

    `table_side` is the side of the grid that the relative tables are made for; other sides resample them linearly.
    """

    rel_pos_h: nn.Parameter | None
    rel_pos_w: nn.Parameter | None

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        window: int,
        table_side: int,
        relative: bool = True,
        form: Form = "auto",
    ) -> None:
        super().__init__()
        assert width % heads == 0, f"width {width} is not a multiple of {heads} heads"
        assert form in get_args(Form), f"{form!r} is no form of attention: {get_args(Form)}"
        self.heads = heads
        self.window = window
        self.form: Form = form
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        for name in ("rel_pos_h", "rel_pos_w"):
            table = nn.Parameter(torch.zeros(2 * table_side - 1, width // heads)) if relative else None
            self.register_parameter(name, table)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        h, w = (self.window, self.window) if self.window else (H, W)
        qkv = self.qkv(x)  # (B, H, W, 3*D)
        qkv = pad_grid(qkv, -(-H // h) * h, -(-W // w) * w, self.qkv.bias.to(qkv.dtype))
        y = attend(split(qkv, h, w, self.heads), self._relative(h, w, qkv.dtype), self.form)
        return self.proj(join(y, h, w, qkv.shape[1:3])[:, :H, :W].contiguous())

    def _relative(self, h: int, w: int, dtype: torch.dtype) -> Relative | None:
        if self.rel_pos_h is None:
            return None
        rows = self.made_of("rel_pos_h", h, lambda table: relative_rows(table, h))
        columns = self.made_of("rel_pos_w", w, lambda table: relative_rows(table, w))
        return rows.to(dtype), columns.to(dtype)


Relative = tuple[Tensor, Tensor]  # rows (H, H, d) and columns (W, W, d): of each query's place, each key's


def attend(qkv: Tensor, relative: Relative | None, form: Form = "auto") -> Tensor:
    """q, k, v of a grid in one tensor, (3, B, heads, T, d) → (B, heads, T, d), T = H*W.

    Forms:
        explicit  logits, softmax and product one after the other, as ViTDet writes them.
        folded    queries lengthened by their position terms and keys by one-hot rows and columns: one dot product
                  gives the sum, so fused attention needs no bias, and its flash kernel stays in use on a GPU.
        masked    fused attention with the position terms as a T x T bias.
        blocked   some query rows at a time, small enough to stay in the cache, again in the backward pass: a T x T
                  tensor never exists. On one core 3 times as fast as explicit, 1.7 times with the backward pass.
        auto      blocked in float32 on a CPU, training or not; folded on anything else and in reduced precision;
                  explicit on the meta device, where FLOPs are counted.

    Where the model is being traced, blocked means folded: a graph would hold every block.

    Without relative positions all of them are plain fused attention.
    """
    if relative is None:
        q, k, v = qkv.unbind(0)
        return F.scaled_dot_product_attention(q, k, v)
    form = _chosen(form, qkv)
    return {"explicit": _explicit, "folded": _folded, "masked": _masked, "blocked": _blocked}[form](qkv, *relative)


def _chosen(form: Form, qkv: Tensor) -> Form:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return "folded" if form in ("auto", "blocked") else form  # blocks would be unrolled
    if form != "auto":
        return form
    if qkv.is_meta:
        return "explicit"
    return "blocked" if qkv.device.type == "cpu" and qkv.dtype in (torch.float32, torch.float64) else "folded"


def _explicit(qkv: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    q, k, v = qkv.unbind(0)
    by_row, by_column = _position_terms(q, rows, columns)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, T, T)
    return (logits + _grid_bias(by_row, by_column)).softmax(-1) @ v


def _masked(qkv: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    q, k, v = qkv.unbind(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_grid_bias(*_position_terms(q, rows, columns)))


def _folded(qkv: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    q, k, v = qkv.unbind(0)
    B, heads, _, d = q.shape
    H, W = len(rows), len(columns)
    by_row, by_column = _position_terms(q, rows, columns)
    spare = -(d + H + W) % 8  # fused kernels want a head size that is a multiple of 8, the same for q, k and v
    q = torch.cat([q * d**-0.5, by_row.flatten(2, 3), by_column.flatten(2, 3)], dim=-1)  # (B, heads, T, d+H+W)
    where = one_hot_grid(H, W, k.device, k.dtype).expand(B, heads, -1, -1)  # (B, heads, T, H+W)
    k = torch.cat([k, where], dim=-1)
    q, k, v = F.pad(q, (0, spare)), F.pad(k, (0, spare)), F.pad(v, (0, H + W + spare))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :d]


def _position_terms(q: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """For queries (..., H*W, d) q·Rh (..., H, W, H) and q·Rw (..., H, W, W)."""
    grid = q.unflatten(-2, (len(rows), len(columns)))
    by_row = torch.einsum("...yxd,yvd->...yxv", grid, rows)
    return by_row, torch.einsum("...yxd,xud->...yxu", grid, columns)


def _grid_bias(by_row: Tensor, by_column: Tensor) -> Tensor:
    """Position terms as a bias of logits: (..., H*W, H*W)."""
    bias = by_row[..., :, None] + by_column[..., None, :]  # (..., H, W, H, W)
    return bias.flatten(-2).flatten(-3, -2)


# ------ The blocked form


def _blocked(qkv: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    _, B, heads, T, d = qkv.shape
    flat = qkv.reshape(3, B * heads, T, d)
    with without_autocast(qkv.device):
        needed = torch.is_grad_enabled() and (qkv.requires_grad or rows.requires_grad or columns.requires_grad)
        y = _Blocked.apply(flat, rows, columns) if needed else _blocked_forward(flat, rows, columns)
    return cast(Tensor, y).view(B, heads, T, d)


class _Blocked(torch.autograd.Function):
    """The blocked form with its backward pass, which makes each block's weights again instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(qkv, rows, columns)
        return _blocked_forward(qkv, rows, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        qkv, rows, columns = ctx.saved_tensors
        with without_autocast(dy.device):
            return _blocked_backward(qkv, rows, columns, dy)


def _blocked_forward(qkv: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    q, k, v = qkv  # each (N, T, d)
    y = torch.empty_like(q)
    for heads, first, last, queries in _blocks(len(q), len(rows), len(columns)):
        weights = _weights(q[heads, queries], k[heads], rows[first:last], columns)
        torch.bmm(weights, v[heads], out=y[heads, queries])
    return y


def _blocked_backward(qkv: Tensor, rows: Tensor, columns: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv (3, N, T, d), rows (H, H, d) and columns (W, W, d)."""
    H, W, scale = len(rows), len(columns), qkv.shape[-1] ** -0.5
    q, k, v = qkv
    of_qkv, of_rows, of_columns = torch.empty_like(qkv), torch.zeros_like(rows), torch.zeros_like(columns)
    of_q, of_k, of_v = of_qkv
    for heads, first, last, queries in _blocks(len(q), H, W):
        query, upstream, some_rows = q[heads, queries], dy[heads, queries], rows[first:last]
        weights = _weights(query, k[heads], some_rows, columns)
        begun = float(first > 0)  # 0 overwrites
        of_v[heads].baddbmm_(weights.transpose(1, 2), upstream, beta=begun)
        of_logits = torch.bmm(upstream, v[heads].transpose(1, 2)).mul_(weights)
        of_logits.addcmul_(weights, of_logits.sum(-1, keepdim=True), value=-1)
        of_k[heads].baddbmm_(of_logits.transpose(1, 2), query, beta=begun, alpha=scale)
        pairs = of_logits.unflatten(2, (H, W)).unflatten(1, (-1, W))  # (n, y, x, v, u)
        by_row, by_column = pairs.sum(4), pairs.sum(3)
        grid = query.unflatten(1, (-1, W))  # (n, y, x, d)
        of_rows[first:last] += torch.einsum("nyxv,nyxd->yvd", by_row, grid)
        of_columns += torch.einsum("nyxu,nyxd->xud", by_column, grid)
        of_query = torch.einsum("nyxv,yvd->nyxd", by_row, some_rows)
        of_query += torch.einsum("nyxu,xud->nyxd", by_column, columns)
        of_q[heads, queries] = of_query.flatten(1, 2).baddbmm_(of_logits, k[heads], alpha=scale)
    return of_qkv, of_rows, of_columns


def _weights(query: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Attention weights (n, y*W, T) of queries (n, y*W, d) on some rows (y, H, d) of the grid."""
    by_row, by_column = _position_terms(query, rows, columns)
    shape = (*by_row.shape, len(columns))  # (n, y, W, H, W)
    logits = torch.add(by_row[..., :, None], by_column[..., None, :], out=query.new_empty(shape))
    logits = logits.flatten(3).flatten(1, 2)
    return torch.baddbmm(logits, query, k.transpose(1, 2), alpha=query.shape[-1] ** -0.5, out=logits).softmax(-1)


def _blocks(N: int, H: int, W: int) -> list[tuple[slice, int, int, slice]]:
    """Heads, first and last row, and the queries of these rows, so that a block has about BLOCK logits a thread."""
    most = BLOCK * torch.get_num_threads()
    T = H * W
    heads = max(most // (T * T), 1)
    rows = H if heads > 1 else min(max(most // (W * T), 1), H)
    return [
        (slice(head, head + heads), row, min(row + rows, H), slice(row * W, min(row + rows, H) * W))
        for head in range(0, N, heads)
        for row in range(0, H, rows)
    ]


# ------ Windows


def pad_grid(tokens: Tensor, rows: int, columns: int, filling: Tensor) -> Tensor:
    """(B, H, W, C) → (B, rows, columns, C): at the bottom and right `filling` (C,)."""
    B, H, W, C = tokens.shape
    if columns > W:
        tokens = torch.cat([tokens, filling.expand(B, H, columns - W, C)], dim=2)
    if rows > H:
        tokens = torch.cat([tokens, filling.expand(B, rows - H, columns, C)], dim=1)
    return tokens


def split(qkv: Tensor, h: int, w: int, heads: int) -> Tensor:
    """(B, i*h, j*w, 3*D) → (3, B*i*j, heads, h*w, d): windows of h x w tokens, row by row."""
    B, rows, columns, width = qkv.shape
    i, j, d = rows // h, columns // w, width // (3 * heads)
    windows = qkv.reshape(B, i, h, j, w, 3, heads, d).permute(5, 0, 1, 3, 6, 2, 4, 7)
    return windows.reshape(3, B * i * j, heads, h * w, d)


def join(y: Tensor, h: int, w: int, grid: tuple[int, int] | torch.Size) -> Tensor:
    """The inverse of `split`, of one value a token: (B*i*j, heads, h*w, d) → (B, i*h, j*w, D)."""
    rows, columns = grid
    count, heads, _, d = y.shape
    i, j = rows // h, columns // w
    windows = y.reshape(count // (i * j), i, j, heads, h, w, d).permute(0, 1, 4, 2, 5, 3, 6)
    return windows.reshape(len(windows), rows, columns, heads * d)


# ------ Tables


def relative_rows(table: Tensor, side: int) -> Tensor:
    """Rows of a relative-position table for every pair of places on a side: (2L-1, d) → (side, side, d).

    A table made for another side is resampled linearly, as ViTDet does.
    """
    return weighted(pair_matrix, table, len(table), side).unflatten(0, (side, side))


def weighted(make: Callable[..., Tensor], table: Tensor, *size: Any) -> Tensor:
    """The constant matrix `make(*size)` times a table (L, ...), in float32 at least whatever autocast says."""
    exact = torch.promote_types(table.dtype, torch.float32)
    with without_autocast(table.device):
        product = make(*size, table.device, exact) @ table.flatten(1).to(exact)
    return product.to(table.dtype).unflatten(1, table.shape[1:])


@constant
def line_matrix(source: int, target: int, mode: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The resampling, "linear" or "bicubic", of `source` points to `target` as a matrix (target, source)."""
    points = torch.eye(source, device=device, dtype=dtype)[:, None]  # (source, 1, source)
    if mode == "bicubic":  # exists for pictures only, here of one column
        lines = F.interpolate(points[..., None], size=(target, 1), mode=mode)[..., 0]
    else:
        lines = F.interpolate(points, size=target, mode=mode)
    return lines[:, 0].T.contiguous()


@constant
def pair_matrix(length: int, side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """For each pair of places on a side the shares of a table's rows: (side*side, length).

    A product with it costs less than a gather does in the backward pass, and adds up in a fixed order on a GPU.
    """
    place = torch.arange(side, device=device)
    distance = place[:, None] - place[None, :] + side - 1  # (query, key)
    return line_matrix(length, 2 * side - 1, "linear", device, dtype)[distance.flatten()]


@constant
def one_hot_grid(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """For each place of a grid its row and its column as one-hot numbers: (rows*columns, rows+columns)."""
    row = torch.eye(rows, device=device, dtype=dtype).repeat_interleave(columns, dim=0)
    return torch.cat([row, torch.eye(columns, device=device, dtype=dtype).repeat(rows, 1)], dim=1)
