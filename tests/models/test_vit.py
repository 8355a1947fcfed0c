"""Our ViT against the paper's arithmetic written out, and what it keeps and does not keep between forwards."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from boxwright.models import vit as module
from boxwright.models.vit import Block, ViT, grid_matrix, join_windows, line_matrix, relative_rows, split_windows

PATCH, WIDTH, HEADS, DEPTH, WINDOW, GLOBAL = 4, 24, 3, 4, 5, (1, 3)


def small_vit(seed: int = 0, **options: Any) -> ViT:
    """Two windowed and two global blocks; every parameter random, relative positions too."""
    torch.manual_seed(seed)
    given_options = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "patch": PATCH, "window": WINDOW} | options
    net = ViT(**({"global_blocks": GLOBAL, "pretrain_grid": 6, "relative_grid": 8, "drop_path": 0.0} | given_options))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)
    return net


def pictures(rows: int, columns: int, count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, rows * PATCH, columns * PATCH, generator=torch.Generator().manual_seed(seed))


# ------ Parity with the paper's equations, written with nothing of ours


def reference(p: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """ViTDet's backbone from its parameters: explicit patches, windows one by one, explicit logits and softmax."""
    B, _, height, width = images.shape
    rows, columns = height // PATCH, width // PATCH
    patches = images.reshape(B, 3, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(B, rows, columns, -1)
    x = patches @ p["patch_embed.proj.weight"].reshape(WIDTH, -1).T + p["patch_embed.proj.bias"]
    x = x + published_positions(p["pos_embed"], rows, columns)
    for i in range(DEPTH):
        block = {name.removeprefix(f"blocks.{i}."): value for name, value in p.items()}
        normed = F.layer_norm(x, (WIDTH,), block["norm1.weight"], block["norm1.bias"], eps=1e-6)
        x = x + (attend(block, normed) if i in GLOBAL else attend_in_windows(block, normed))
        normed = F.layer_norm(x, (WIDTH,), block["norm2.weight"], block["norm2.bias"], eps=1e-6)
        hidden = normed @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + hidden @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"]
    return x.permute(0, 3, 1, 2)


def published_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """detectron2's `get_abs_pos`: the class token's row goes, the rest is resized bicubically."""
    side = math.isqrt(table.shape[1] - 1)
    grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if (rows, columns) != (side, side):
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1)


def published_table(table: Tensor, side: int) -> Tensor:
    """detectron2's `get_rel_pos`: a table for another side is resized linearly."""
    wanted = 2 * side - 1
    if len(table) == wanted:
        return table
    return F.interpolate(table.T[None], size=wanted, mode="linear")[0].T


def attend_in_windows(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    B, rows, columns, _ = x.shape
    result = torch.zeros_like(x)
    for top in range(0, rows, WINDOW):
        for left in range(0, columns, WINDOW):
            part = x[:, top : top + WINDOW, left : left + WINDOW]
            h, w = part.shape[1:3]
            tile = torch.zeros(B, WINDOW, WINDOW, WIDTH)
            tile[:, :h, :w] = part
            result[:, top : top + h, left : left + w] = attend(p, tile)[:, :h, :w]
    return result


def attend(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    B, H, W, _ = x.shape
    d = WIDTH // HEADS
    q, k, v = (x @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]).reshape(B, H * W, 3, HEADS, d).unbind(2)
    by_row, by_column = published_table(p["attn.rel_pos_h"], H), published_table(p["attn.rel_pos_w"], W)
    places = [(y, x) for y in range(H) for x in range(W)]
    up = torch.tensor([[y - v + H - 1 for v, _ in places] for y, _ in places])  # (T, T), of query and key
    across = torch.tensor([[x - u + W - 1 for _, u in places] for _, x in places])
    logits = torch.einsum("bqnd,bknd->bnqk", q, k) / math.sqrt(d)
    logits = (
        logits + torch.einsum("bqnd,qkd->bnqk", q, by_row[up]) + torch.einsum("bqnd,qkd->bnqk", q, by_column[across])
    )
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    y = torch.einsum("bnqk,bknd->bqnd", weights, v).reshape(B, H, W, WIDTH)
    return y @ p["attn.proj.weight"].T + p["attn.proj.bias"]


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (10, 10),  # whole windows
        (5, 15),
        (6, 6),  # the side of the position table; windows padded
        (8, 8),  # the side of the global blocks' relative tables
        (7, 12),
        (2, 3),  # smaller than a window
        (1, 1),
    ],
)
def test_same_maps_and_gradients_as_the_equations(rows: int, columns: int) -> None:
    net, images = small_vit(), pictures(rows, columns)
    parameters = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
    expected = reference(parameters, images)
    found = net(images)[PATCH]
    assert found.shape == (2, WIDTH, rows, columns)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)) / expected.numel() ** 0.5
    found.backward(upstream)
    expected.backward(upstream)
    for name, parameter in net.named_parameters():
        theirs = parameters[name].grad
        assert theirs is not None
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, theirs, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    if rows > 1 and columns > 1:
        assert all(
            net.get_parameter(f"blocks.{i}.attn.rel_pos_{a}").grad.abs().max() > 1e-3 for i in (0, 1) for a in "hw"
        )


def test_relative_positions_take_part() -> None:
    """The parity above would mean little if the tables were of no weight."""
    net, images = small_vit(), pictures(7, 6)
    before = net(images)[PATCH]
    for name, parameter in net.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.zeros_(parameter)
    assert (net(images)[PATCH] - before).abs().max() > 0.1


# ------ Tables


@pytest.mark.parametrize(("rows", "columns"), [(14, 14), (40, 40), (25, 42), (7, 9), (1, 30), (64, 64)])
def test_positions_are_resampled_by_the_published_rule(rows: int, columns: int) -> None:
    net = small_vit(pretrain_grid=14)
    found = net.positions(rows, columns)
    torch.testing.assert_close(found, published_positions(net.pos_embed, rows, columns), atol=1e-5, rtol=1e-5)


def test_positions_of_the_table_s_own_grid_are_the_table() -> None:
    net = small_vit()
    assert torch.equal(net.positions(6, 6).reshape(36, WIDTH), net.pos_embed[0, 1:])


@pytest.mark.parametrize("side", [8, 3, 5, 40, 1])
def test_relative_tables_are_resampled_by_the_published_rule(side: int) -> None:
    table = torch.randn(15, 6)
    expected = published_table(table, side)
    found = relative_rows(table, side)
    assert found.shape == (side, side, 6)
    for query in range(side):
        for key in range(side):
            torch.testing.assert_close(found[query, key], expected[query - key + side - 1], atol=1e-6, rtol=1e-5)


def test_gradients_reach_the_published_position_table() -> None:
    net = ViT(width=768, depth=1, heads=12, window=14, global_blocks=())
    assert net.pos_embed.shape == (1, 197, 768)
    net(torch.randn(1, 3, 224, 256))[16].square().sum().backward()
    gradient = net.pos_embed.grad
    assert gradient is not None
    assert not gradient[0, 0].any()  # the class token takes no part
    assert (gradient[0, 1:].abs().amax(dim=1) > 0).all()


@pytest.fixture
def interpolations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes of all calls of F.interpolate from now on."""
    calls: list[str] = []
    real: Callable[..., Tensor] = F.interpolate

    def counted(*inputs: Any, **options: Any) -> Tensor:
        calls.append(options["mode"])
        return real(*inputs, **options)

    monkeypatch.setattr(module.F, "interpolate", counted)
    grid_matrix.cache_clear()
    line_matrix.cache_clear()
    return calls


def test_interpolation_runs_once_for_a_grid(interpolations: list[str]) -> None:
    net, other = small_vit(), small_vit(seed=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(3):
        net(pictures(7, 7))[PATCH].square().mean().backward()
        optimizer.step()
        with torch.inference_mode():
            net(pictures(7, 7))
            other(pictures(7, 7))
    assert sorted(interpolations) == ["bicubic", "linear"]
    net(pictures(7, 9))
    assert sorted(interpolations) == ["bicubic", "bicubic", "linear", "linear"]


def change_by_optimizer(net: ViT, make: Callable[..., torch.optim.Optimizer]) -> None:
    optimizer = make(net.parameters(), lr=0.1)
    net(pictures(7, 7))[PATCH].square().mean().backward()
    optimizer.step()


CHANGES: dict[str, Callable[[ViT], object]] = {
    "sgd": lambda net: change_by_optimizer(net, torch.optim.SGD),
    "adamw": lambda net: change_by_optimizer(net, torch.optim.AdamW),
    "sgd, one by one": lambda net: change_by_optimizer(net, lambda *a, **o: torch.optim.SGD(*a, foreach=False, **o)),
    "sgd, fused": lambda net: change_by_optimizer(net, lambda *a, **o: torch.optim.SGD(*a, fused=True, **o)),
    "adamw, fused": lambda net: change_by_optimizer(net, lambda *a, **o: torch.optim.AdamW(*a, fused=True, **o)),
    "load_state_dict": lambda net: net.load_state_dict(small_vit(seed=5).state_dict()),
    "load_state_dict by assignment": lambda net: net.load_state_dict(small_vit(seed=5).state_dict(), assign=True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_kept_positions_follow_the_table(change: str, mode: Callable[[], Any]) -> None:
    net = small_vit().eval()
    with mode():
        before = net.positions(7, 7)
        assert net.positions(7, 7) is before
    CHANGES[change](net)
    with mode():
        after = net.positions(7, 7)
        assert net.positions(7, 7) is after
    torch.testing.assert_close(after, published_positions(net.pos_embed, 7, 7), atol=1e-5, rtol=1e-5)
    assert (after - before).abs().max() > 1e-4


def test_kept_positions_are_of_the_grid_asked_for() -> None:
    net = small_vit()
    with torch.no_grad():
        for rows, columns in ((4, 9), (9, 4), (6, 6), (4, 9)):
            expected = published_positions(net.pos_embed, rows, columns)
            torch.testing.assert_close(net.positions(rows, columns), expected, atol=1e-5, rtol=1e-5)


def test_prediction_leaves_no_trace_in_training() -> None:
    """What prediction keeps is neither learned past nor saved, and does not stop a copy."""
    net, fresh = small_vit(), small_vit()
    names = set(net.state_dict())
    with torch.inference_mode():
        net(pictures(7, 7))
    assert set(net.state_dict()) == names
    twin = copy.deepcopy(net)
    with torch.inference_mode():
        twin(pictures(7, 7))
    gradients = []
    for trained in (fresh, net, twin):
        trained(pictures(7, 7))[PATCH].square().mean().backward()
        gradients.append(trained.pos_embed.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


# ------ Windows

SIDES = st.integers(1, 13)


@settings(max_examples=60, deadline=None)
@given(B=st.integers(1, 3), rows=SIDES, columns=SIDES, side=st.integers(1, 6))
def test_windows_come_apart_and_together(B: int, rows: int, columns: int, side: int) -> None:
    x = torch.randn(B, rows, columns, 2)
    windows, padded = split_windows(x, side)
    down, across = -(-rows // side), -(-columns // side)
    assert padded == (down * side, across * side)
    assert windows.shape == (B * down * across, side, side, 2)
    assert torch.equal(join_windows(windows, padded, rows, columns), x)
    index = iter(windows)  # by picture, then row by row
    for b in range(B):
        for top in range(0, rows, side):
            for left in range(0, columns, side):
                part, window = x[b, top : top + side, left : left + side], next(index)
                h, w = part.shape[:2]
                assert torch.equal(window[:h, :w], part)
                assert not window[h:].any()
                assert not window[:, w:].any()


# ------ Training


def test_checkpointed_blocks_give_the_same_with_the_same_dropped_paths() -> None:
    results = []
    for checkpointed in (False, True):
        net = small_vit(checkpoint_blocks=checkpointed, drop_path=0.5).train()
        torch.manual_seed(3)
        out = net(pictures(7, 6, count=4))[PATCH]
        out.square().mean().backward()
        results.append((out, {name: p.grad for name, p in net.named_parameters()}))
    (plain, gradients), (again, recomputed) = results
    torch.testing.assert_close(again, plain)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_checkpointed_blocks_are_not_kept_in_memory() -> None:
    """The tensors that wait for the backward pass are fewer: that is what it is for."""

    def saved_numbers(checkpointed: bool) -> int:
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        net = small_vit(checkpoint_blocks=checkpointed).train()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            net(pictures(7, 6))
        return total

    assert saved_numbers(True) < saved_numbers(False) / 4


def test_drop_path_is_off_in_prediction_and_grows_with_depth() -> None:
    images = pictures(7, 6)
    torch.testing.assert_close(small_vit(drop_path=0.9).eval()(images), small_vit(drop_path=0.0).eval()(images))
    torch.testing.assert_close(small_vit(drop_path=0.0).train()(images), small_vit(drop_path=0.0).eval()(images))
    rates = [block.drop_path for block in small_vit(drop_path=0.3).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_dropped_paths_keep_the_expectation() -> None:
    """Of each sample a branch is either left out or scaled up, so that the mean stays."""
    torch.manual_seed(0)
    block = Block(8, 2, mlp_ratio=2, drop_path=0.25, window=0, table_side=2)
    torch.nn.init.zeros_(block.mlp.fc2.weight)  # leaves the attention branch alone
    torch.nn.init.zeros_(block.mlp.fc2.bias)
    x = torch.randn(1, 2, 2, 8).expand(4000, -1, -1, -1)
    with torch.no_grad():
        branch = block.eval()(x[:1]) - x[:1]
        added = block.train()(x) - x
    share = (added / branch).reshape(4000, -1)
    kept = share.mean(dim=1) > 0.5
    torch.testing.assert_close(share, torch.where(kept, 1 / 0.75, 0.0)[:, None].expand_as(share), atol=1e-2, rtol=1e-2)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)  # more than four standard deviations


def test_pictures_do_not_look_at_each_other() -> None:
    net, images = small_vit().eval(), pictures(7, 6, count=3)
    together = net(images)[PATCH]
    for i in range(3):
        torch.testing.assert_close(net(images[i : i + 1])[PATCH], together[i : i + 1], atol=1e-5, rtol=1e-5)


def test_global_blocks_must_be_blocks() -> None:
    with pytest.raises(AssertionError, match="global block"):
        small_vit(global_blocks=(1, 4))
    with pytest.raises(AssertionError, match="24 is not a multiple of 5 heads"):
        small_vit(heads=5)
