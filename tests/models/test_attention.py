"""Every form of attention against the equations written out; windows, tables, and what is kept between forwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from boxwright.models import attention as module
from boxwright.models.attention import Attention, Form, attend, join, line_matrix, pad_grid, relative_rows, split

FORMS = get_args(Form)
HEADS, WIDTH = 2, 12


def layer(
    form: Form = "auto", *, window: int = 0, table_side: int = 4, dtype: torch.dtype = torch.float64
) -> Attention:
    """Every parameter random."""
    torch.manual_seed(0)
    net = Attention(WIDTH, HEADS, window=window, table_side=table_side, form=form)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return net.to(dtype)


def tokens(B: int, H: int, W: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, H, W, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(1))


# ------ Parity with the equations, written with nothing of ours


def equations(net: Attention, x: Tensor) -> Tensor:
    """Window by window: zeros behind the norm where a window reaches past the grid, as in ViTDet."""
    if not net.window:
        return one_window(net, x)
    H, W = x.shape[1:3]
    result = torch.zeros_like(x)
    for top in range(0, H, net.window):
        for left in range(0, W, net.window):
            part = x[:, top : top + net.window, left : left + net.window]
            h, w = part.shape[1:3]
            tile = F.pad(part, (0, 0, 0, net.window - w, 0, net.window - h))
            result[:, top : top + h, left : left + w] = one_window(net, tile)[:, :h, :w]
    return result


def one_window(net: Attention, x: Tensor) -> Tensor:
    B, H, W, _ = x.shape
    d = WIDTH // HEADS
    q, k, v = (x @ net.qkv.weight.T + net.qkv.bias).reshape(B, H * W, 3, HEADS, d).unbind(2)  # (B, T, heads, d)
    rows, columns = published(net.rel_pos_h, H), published(net.rel_pos_w, W)
    logits = []
    for i in range(H * W):
        y, x_ = divmod(i, W)
        keys = [k[:, j] / math.sqrt(d) + rows[y - j // W + H - 1] + columns[x_ - j % W + W - 1] for j in range(H * W)]
        logits.append(torch.stack([(q[:, i] * key).sum(-1) for key in keys], dim=-1))  # (B, heads, T)
    weights = torch.stack(logits, dim=2).softmax(-1)  # (B, heads, T, T)
    out = torch.einsum("bnqk,bknd->bqnd", weights, v).reshape(B, H, W, WIDTH)
    return out @ net.proj.weight.T + net.proj.bias


def published(table: Tensor | None, side: int) -> Tensor:
    """detectron2's `get_rel_pos`: a table for another side is resized linearly."""
    assert table is not None
    return F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T


def assert_parity(net: Attention, x: Tensor, tolerance: float) -> None:
    """Answers, and gradients of the input and of every parameter, relative to their largest value."""
    answers, gradients = [], []
    for run in (net, lambda x: equations(net, x)):
        given = x.clone().requires_grad_()
        net.zero_grad()
        answers.append(run(given))
        upstream = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
        answers[-1].backward(upstream)
        gradients.append({"input": given.grad} | {name: p.grad for name, p in net.named_parameters()})
    with torch.no_grad():
        answers.append(net(x))
    for answer in (answers[0], answers[2]):
        torch.testing.assert_close(answer, answers[1], rtol=0, atol=tolerance * answers[1].abs().max().item())
    largest = max(gradient.abs().max().item() for gradient in gradients[1].values())
    for name, expected in gradients[1].items():
        found = gradients[0][name]
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * largest, msg=lambda m, n=name: f"{n}: {m}")


GRIDS = [  # batch, grid, window, side of the tables
    (1, (4, 4), 0, 4),
    (2, (3, 5), 0, 4),  # tables resampled to both sides
    (3, (6, 2), 0, 2),
    (2, (1, 1), 0, 3),
    (1, (1, 7), 0, 7),
    (1, (6, 6), 3, 3),
    (2, (3, 6), 3, 2),
    (3, (4, 5), 3, 3),  # windows reach past both ends
    (1, (7, 3), 3, 3),  # past the bottom
    (2, (2, 4), 3, 3),  # past the right end, and less than a window high
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("batch", "grid", "window", "side"), GRIDS)
@pytest.mark.parametrize("block", [1 << 19, 12], ids=["one block", "many blocks"])
def test_same_answers_and_gradients_as_the_equations(
    form: Form,
    batch: int,
    grid: tuple[int, int],
    window: int,
    side: int,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    assert_parity(layer(form, window=window, table_side=side), tokens(batch, *grid), 1e-12)
    if block > 12:
        single = layer(form, window=window, table_side=side, dtype=torch.float32)
        assert_parity(single, tokens(batch, *grid, dtype=torch.float32), 1e-5)


def test_the_blocked_form_has_the_gradients_of_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 30)  # two rows of one head at a time
    torch.manual_seed(0)
    inputs = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 1, 2, 15, 4), (3, 3, 4), (5, 5, 4))
    ]

    def blocked(qkv: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return attend(qkv, (rows, columns), "blocked")

    assert torch.autograd.gradcheck(blocked, inputs)


@pytest.mark.parametrize("form", FORMS)
def test_without_relative_positions_it_is_plain_attention(form: Form) -> None:
    net = Attention(WIDTH, HEADS, window=0, table_side=4, relative=False, form=form)
    assert not any("rel_pos" in name for name in net.state_dict())
    x = tokens(2, 3, 4, torch.float32)
    with_zeros = Attention(WIDTH, HEADS, window=0, table_side=4, form=form)
    with_zeros.load_state_dict(net.state_dict(), strict=False)
    torch.testing.assert_close(net(x), with_zeros(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "masked"])  # torch drops a mask of no pictures
def test_no_pictures_give_no_answers_and_zero_gradients(form: Form) -> None:
    net = layer(form, window=3)
    out = net(tokens(0, 4, 4))
    assert out.shape == (0, 4, 4, WIDTH)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


# ------ What the forms promise


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Size, bool]]:
    """The size of q, and whether there is a mask, of every call of fused attention from now on."""
    calls: list[tuple[torch.Size, bool]] = []
    real: Callable[..., Tensor] = F.scaled_dot_product_attention

    def spied(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        calls.append((q.shape, options.get("attn_mask") is not None))
        return real(q, k, v, **options)

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", spied)
    return calls


@pytest.mark.parametrize("grid", [(4, 4), (3, 4), (5, 2), (1, 1), (7, 7)])
def test_folded_heads_suit_fused_kernels(grid: tuple[int, int], fused: list[tuple[torch.Size, bool]]) -> None:
    layer("folded")(tokens(1, *grid))
    ((size, masked),) = fused
    assert not masked
    assert size[-1] % 8 == 0
    assert WIDTH // HEADS + sum(grid) <= size[-1] < WIDTH // HEADS + sum(grid) + 8


def test_masked_heads_keep_their_size(fused: list[tuple[torch.Size, bool]]) -> None:
    layer("masked")(tokens(1, 4, 4))
    assert fused == [(torch.Size([1, HEADS, 16, WIDTH // HEADS]), True)]


def test_auto_is_blocked_on_a_cpu_folded_in_reduced_precision(fused: list[tuple[torch.Size, bool]]) -> None:
    x = tokens(1, 4, 4, torch.float32)
    layer(dtype=torch.float32)(x)
    assert not fused
    layer(dtype=torch.bfloat16)(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        layer(dtype=torch.float32)(x)
    assert [masked for _, masked in fused] == [False, False]


class LargestTensor(TorchFunctionMode):
    """The most numbers in a tensor that any function of torch gave, called from Python."""

    most = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.most = max(self.most, out.numel())
        return out


def test_blocks_never_make_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 1000)
    threads = torch.get_num_threads()
    largest = {}
    for form in ("explicit", "blocked"):
        net, x = layer(form), tokens(1, 16, 16).requires_grad_()
        with LargestTensor() as mode:
            net(x).sum().backward()
        largest[form] = mode.most
    assert largest["explicit"] == HEADS * 256**2
    assert largest["blocked"] <= max(1000 * threads, 16 * 256, 3 * 256 * WIDTH)


def test_blocks_keep_no_weights_for_the_backward_pass() -> None:
    kept = {}
    for form in ("explicit", "blocked"):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            layer(form)(tokens(1, 16, 16))
        kept[form] = max(sizes)
    assert kept["explicit"] >= HEADS * 256**2
    assert kept["blocked"] == 3 * 256 * WIDTH  # q, k and v


def test_linear_layers_see_the_grid_s_own_tokens_only() -> None:
    net = layer(window=3)
    seen: list[torch.Size] = []
    for part in (net.qkv, net.proj):
        part.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].shape))
    net(tokens(2, 4, 5))
    assert seen == [(2, 4, 5, WIDTH)] * 2


def test_counted_on_the_meta_device_as_the_equations_are() -> None:
    """Folded heads would count arithmetic with zeros."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        net, x = Attention(WIDTH, HEADS, window=0, table_side=4), torch.zeros(1, 8, 8, WIDTH)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x)
    T, d = 64, WIDTH // HEADS
    linear, products, terms = 2 * T * 4 * WIDTH**2, 2 * HEADS * T * T * 2 * d, 2 * HEADS * T * 16 * d
    tables = 2 * 2 * T * 7 * d
    assert counter.get_total_flops() == linear + products + terms + tables


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [0, 3])
def test_reduced_precision_is_near(form: Form, dtype: torch.dtype, window: int) -> None:
    net, x = layer(form, window=window, dtype=torch.float32), tokens(2, 4, 5, torch.float32)
    expected = net(x)
    with torch.autocast("cpu", dtype):
        found = net(x)
    assert found.dtype == dtype
    assert found.isfinite().all()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    found.float().sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in net.parameters()
    )


def test_unknown_forms_are_refused() -> None:
    with pytest.raises(AssertionError, match="'flash' is no form of attention"):
        layer("flash")  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="12 is not a multiple of 5 heads"):
        Attention(12, 5, window=0, table_side=4)


# ------ Windows

SIDES = st.integers(1, 9)


@settings(max_examples=60, deadline=None)
@given(B=st.integers(1, 3), H=SIDES, W=SIDES, h=st.integers(1, 5), w=st.integers(1, 5))
@example(B=2, H=6, W=4, h=3, w=2)
def test_windows_come_apart_and_together(B: int, H: int, W: int, h: int, w: int) -> None:
    x, filling = torch.randn(B, H, W, 3 * 4), torch.arange(12.0)
    down, across = -(-H // h), -(-W // w)
    padded = pad_grid(x, down * h, across * w, filling)
    assert torch.equal(padded[:, :H, :W], x)
    assert (padded[:, H:] == filling).all()
    assert (padded[:, :, W:] == filling).all()
    parts = split(padded, h, w, heads=2)
    assert parts.shape == (3, B * down * across, 2, h * w, 2)
    for i in range(3):
        assert torch.equal(join(parts[i], h, w, padded.shape[1:3]), padded[..., 4 * i : 4 * i + 4])
    b, y, x_ = B - 1, H - 1, W - 1  # the last token: last picture, its own window and place
    window = (b * down + y // h) * across + x_ // w
    assert torch.equal(parts[:, window, :, y % h * w + x_ % w].flatten(), x[b, y, x_])


# ------ Tables


@pytest.mark.parametrize("side", [8, 3, 5, 40, 1])
def test_relative_tables_are_resampled_by_the_published_rule(side: int) -> None:
    table = torch.randn(15, 6)
    expected = published(table, side)
    found = relative_rows(table, side)
    assert found.shape == (side, side, 6)
    for query in range(side):
        for key in range(side):
            torch.testing.assert_close(found[query, key], expected[query - key + side - 1], atol=1e-6, rtol=1e-5)


def test_relative_tables_of_their_own_side_are_exact() -> None:
    table = torch.randn(15, 6)
    found = relative_rows(table, 8)
    assert all(torch.equal(found[q, k], table[q - k + 7]) for q in range(8) for k in range(8))


@pytest.mark.parametrize("mode", ["linear", "bicubic"])
@pytest.mark.parametrize(("source", "target"), [(14, 40), (127, 79), (5, 5), (3, 1), (1, 4)])
def test_a_line_matrix_resamples_as_interpolation_does(source: int, target: int, mode: str) -> None:
    points = torch.randn(source, 3)
    matrix = line_matrix(source, target, mode, torch.device("cpu"), torch.float32)
    if mode == "linear":
        expected = F.interpolate(points.T[None], size=target, mode="linear")[0].T
    else:
        expected = F.interpolate(points.T[None, :, :, None], size=(target, 1), mode="bicubic")[0, :, :, 0].T
    torch.testing.assert_close(matrix @ points, expected, atol=1e-5, rtol=1e-5)


def test_constants_are_made_once_and_serve_training_after_prediction() -> None:
    arguments = (9, 5, "linear", torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        made = line_matrix(*arguments)
    assert line_matrix(*arguments) is made
    assert not made.is_inference()
