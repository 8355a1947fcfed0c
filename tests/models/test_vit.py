"""Our ViT against the paper's arithmetic written out, and what it keeps and does not keep between forwards."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from boxwright.models import attention
from boxwright.models.pyramid import Joined, SimpleFeaturePyramid
from boxwright.models.vit import ViT

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
    ("rows", "columns", "count"),
    [
        (10, 10, 1),  # whole windows
        (5, 15, 2),
        (6, 6, 3),  # the side of the position table; windows padded
        (8, 8, 2),  # the side of the global blocks' relative tables
        (7, 12, 1),
        (2, 3, 3),  # smaller than a window
        (1, 1, 2),
    ],
)
@pytest.mark.parametrize("form", ["auto", "folded"])  # of a CPU and of a GPU; the others: test_attention.py
def test_same_maps_and_gradients_as_the_equations(rows: int, columns: int, count: int, form: str) -> None:
    net, images = small_vit(attention=form), pictures(rows, columns, count)
    parameters = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
    expected = reference(parameters, images)
    found = net(images)[PATCH]
    assert found.shape == (count, WIDTH, rows, columns)
    assert found.is_contiguous(memory_format=torch.channels_last)
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

    monkeypatch.setattr(attention.F, "interpolate", counted)
    return calls


def test_interpolation_runs_once_for_a_grid(interpolations: list[str]) -> None:
    options = {"pretrain_grid": 11, "relative_grid": 13}  # sides that no other test asks for
    net, other = small_vit(**options), small_vit(seed=1, **options)
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


# ------ What prediction keeps

Optimizer = Callable[..., torch.optim.Optimizer]


def learn(net: ViT) -> None:
    """Gradients from a picture, in whatever mode the network is."""
    net(pictures(7, 7))[PATCH].square().mean().backward()


def step(net: ViT, make: Optimizer, *, between: Callable[[], object] = lambda: None) -> None:
    optimizer = make(net.parameters(), lr=0.1)
    learn(net)
    between()
    optimizer.step()
    optimizer.zero_grad()


def predict(net: ViT) -> Tensor:
    with torch.no_grad():
        return net(pictures(7, 7))[PATCH]


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
    "sgd, one by one": lambda *a, **o: torch.optim.SGD(*a, foreach=False, **o),
    "sgd, fused": lambda *a, **o: torch.optim.SGD(*a, fused=True, **o),  # leaves version counters as they are
    "adamw, fused": lambda *a, **o: torch.optim.AdamW(*a, fused=True, **o),
}


def average_in(net: ViT) -> None:
    torch._foreach_lerp_(list(net.parameters()), list(small_vit(seed=5).parameters()), 0.5)


def write_through_data(net: ViT) -> None:
    for parameter, other in zip(net.parameters(), small_vit(seed=5).parameters(), strict=True):
        parameter.data.copy_(other)
    net.eval()


CHANGES: dict[str, Callable[[ViT], object]] = {
    **{name: lambda net, make=make: step(net, make) for name, make in OPTIMIZERS.items()},
    **{
        f"{name}, with a prediction before the step": lambda net, make=make: step(
            net, make, between=lambda: predict(net)
        )
        for name, make in OPTIMIZERS.items()
    },
    "load_state_dict": lambda net: net.load_state_dict(small_vit(seed=5).state_dict()),
    "load_state_dict by assignment": lambda net: net.load_state_dict(small_vit(seed=5).state_dict(), assign=True),
    "averaging": lambda net: torch.no_grad()(average_in)(net),
    "data and eval": write_through_data,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_kept_follows_the_tables(change: str, mode: Callable[[], Any]) -> None:
    """All of it in evaluation mode, so that no switch of the mode helps."""
    net, images = small_vit().eval(), pictures(7, 7)
    with mode():
        before, maps = net.positions(7, 7), net(images)[PATCH]
        assert net.positions(7, 7) is before
    CHANGES[change](net)
    with mode():
        after = net.positions(7, 7)
        assert net.positions(7, 7) is after
    torch.testing.assert_close(after, published_positions(net.pos_embed, 7, 7), atol=1e-5, rtol=1e-5)
    assert (after - before).abs().max() > 1e-4
    fresh = small_vit().eval()
    fresh.load_state_dict(net.state_dict())
    with mode():
        assert torch.equal(net(images)[PATCH], fresh(images)[PATCH])  # relative tables too
        assert not torch.equal(net(images)[PATCH], maps)


def test_nothing_is_kept_while_a_gradient_waits_or_in_training() -> None:
    net = small_vit().eval()
    with torch.no_grad():
        assert net.positions(7, 7) is net.positions(7, 7)
        net.train()
        assert net.positions(7, 7) is not net.positions(7, 7)
    learn(net.eval())
    with torch.no_grad():
        assert net.positions(7, 7) is not net.positions(7, 7)
        net.zero_grad()
        assert net.positions(7, 7) is net.positions(7, 7)


def test_kept_positions_are_of_the_grid_asked_for() -> None:
    net = small_vit().eval()
    with torch.no_grad():
        for rows, columns in ((4, 9), (9, 4), (6, 6), (4, 9)):
            expected = published_positions(net.pos_embed, rows, columns)
            torch.testing.assert_close(net.positions(rows, columns), expected, atol=1e-5, rtol=1e-5)


def test_kept_positions_move_and_change_type_with_the_network() -> None:
    net = small_vit().eval()
    with torch.no_grad():
        net.positions(7, 7)
        assert net.double().positions(7, 7).dtype == torch.float64
        assert net(pictures(7, 7).double())[PATCH].dtype == torch.float64
        assert net.bfloat16()(pictures(7, 7).bfloat16())[PATCH].isfinite().all()


def test_prediction_leaves_no_trace_in_training() -> None:
    """What prediction keeps is neither learned past nor saved, and does not stop a copy."""
    net, fresh = small_vit(), small_vit()
    names = set(net.state_dict())
    with torch.inference_mode():
        net.eval()(pictures(7, 7))
    assert set(net.state_dict()) == names
    twin = copy.deepcopy(net)
    with torch.inference_mode():
        twin(pictures(7, 7))
    gradients = []
    for trained in (fresh.eval(), net, twin, twin.train()):
        trained.zero_grad()
        learn(trained)
        gradients.append(trained.pos_embed.grad)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


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


def test_drop_path_is_off_in_prediction() -> None:
    images = pictures(7, 6)
    torch.testing.assert_close(small_vit(drop_path=0.9).eval()(images), small_vit(drop_path=0.0).eval()(images))
    torch.testing.assert_close(small_vit(drop_path=0.0).train()(images), small_vit(drop_path=0.0).eval()(images))


def test_dropped_paths_grow_with_depth_and_keep_the_expectation() -> None:
    """Of each sample and branch either all or nothing, scaled up so that the mean stays."""
    net, scales = small_vit(drop_path=0.3).train(), []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda block, inputs: scales.append(inputs[1]))
    torch.manual_seed(0)
    with torch.no_grad():
        net(pictures(1, 1, count=4000))
    for scale, kept in zip(scales, (1, 0.9, 0.8, 0.7), strict=True):
        assert scale.shape == (2, 4000)
        torch.testing.assert_close(scale.unique(), torch.tensor([0, 1 / kept][kept == 1 :]))
        assert (scale > 0).float().mean(dim=1).tolist() == pytest.approx([kept] * 2, abs=0.03)  # > 4 deviations
    assert not torch.equal(scales[3][0], scales[3][1])  # branches are drawn one by one


@pytest.mark.parametrize("scales", [[[1.5, 0, 1.5], [0, 0, 2]], [[0, 0, 0], [0, 1, 1]], [[1, 2, 3], [3, 2, 1]]])
def test_branches_that_are_dropped_count_as_nothing(scales: list[list[float]]) -> None:
    """On a CPU they are not even run."""
    block, scale = small_vit().blocks[0], torch.tensor(scales)
    found, expected = [], []
    for results in (found, expected):
        x = torch.randn(3, 7, 6, WIDTH, generator=torch.Generator().manual_seed(4)).requires_grad_()
        block.zero_grad()
        if results is found:
            out = block(x, scale)
        else:
            y = x + block.attn(block.norm1(x)) * scale[0, :, None, None, None]
            out = y + block.mlp(block.norm2(y)) * scale[1, :, None, None, None]
        out.square().mean().backward()
        results += [out, x.grad, *(p.grad for p in block.parameters())]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    seen: list[int] = []
    block.mlp.register_forward_pre_hook(lambda mlp, inputs: seen.append(len(inputs[0])))
    block(torch.randn(3, 7, 6, WIDTH), scale)
    assert seen == [scale[1].count_nonzero()]


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
    with pytest.raises(AssertionError, match="no form of attention"):
        small_vit(attention="flash")


# ------ Without tables, in reduced precision, compiled


def test_positions_can_be_left_out() -> None:
    whole = small_vit()
    for left_out in ({"use_abs_pos": False}, {"rel_pos": False}):
        net = small_vit(**left_out)
        gone = set(whole.state_dict()) - set(net.state_dict())
        name = "pos_embed" if "use_abs_pos" in left_out else "rel_pos"
        assert gone
        assert all(name in key for key in gone)
        zeroed = small_vit()
        for key in gone:
            torch.nn.init.zeros_(zeroed.get_parameter(key))
        net.load_state_dict({k: v for k, v in zeroed.state_dict().items() if k not in gone})
        torch.testing.assert_close(net(pictures(7, 6))[PATCH], zeroed(pictures(7, 6))[PATCH], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_autocast_stays_near_full_precision(dtype: torch.dtype, training: bool) -> None:
    net, images = ViT(width=48, depth=4, heads=3, window=5, global_blocks=(1, 3), drop_path=0.0), pictures(32, 28)
    expected = net(images)[16]
    with torch.autocast("cpu", dtype):
        found = net.train(training)(images)[16]
    assert found.isfinite().all()
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    assert found.dtype == torch.float32  # the sum over the blocks
    found.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_compiles_to_one_graph_with_its_pyramid(training: bool) -> None:
    body = small_vit(depth=2, global_blocks=(1,), drop_path=0.5)
    net = Joined(body, SimpleFeaturePyramid(stride=PATCH, channels=WIDTH, width=8, scales=(1.0, 0.5))).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager", dynamic=False)
    for rows, columns in ((6, 6), (7, 9)):
        images, maps = pictures(rows * 2, columns * 2), []
        for run in (net, compiled):
            torch.manual_seed(0)
            net.zero_grad()
            maps.append(run(images))
            torch.stack([level.square().mean() for level in maps[-1].values()]).sum().backward()
            maps[-1]["gradient"] = body.pos_embed.grad
        for level, expected in maps[0].items():
            torch.testing.assert_close(maps[1][level], expected, atol=1e-5, rtol=1e-4)
