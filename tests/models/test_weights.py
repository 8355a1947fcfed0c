"""Every tensor is accounted for, and a ViT's tables fit the grid that they are loaded into."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from boxwright.models.tensors import read_tensors
from boxwright.models.vit import ViT
from boxwright.models.weights import Account, load, load_vit, resize_patches
from boxwright.types import UserError


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def small() -> nn.Module:
    return nn.Sequential(OrderedDict(body=nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), head=nn.Linear(4, 3)))


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


KEYS = list(small().state_dict())
FATES = ("whole", "gone", "other shape", "integer", "renamed", "half")


@settings(max_examples=100, deadline=None)
@given(
    fates=st.lists(st.sampled_from(FATES), min_size=len(KEYS), max_size=len(KEYS)),
    extra=st.integers(0, 3),
    prefix=st.sampled_from(["", "model."]),
)
def test_every_tensor_is_accounted_for(fates: list[str], extra: int, prefix: str) -> None:
    net = small()
    before, wanted = state(net), {name: torch.randn(value.shape) for name, value in state(net).items()}
    wanted["body.1.num_batches_tracked"] = torch.tensor(5)
    tensors: dict[str, Tensor] = {f"{prefix}extra{i}": torch.ones(1) for i in range(extra)}
    for name, fate in zip(KEYS, fates, strict=True):
        value = wanted[name]
        changed = {
            "other shape": torch.zeros(*value.shape, 2),
            "integer": value.float() if value.dtype == torch.int64 else value.long(),
            "half": value.half() if value.is_floating_point() else value,
        }.get(fate, value)
        if fate != "gone":
            tensors[f"{prefix}{'old.' if fate == 'renamed' else ''}{name}"] = changed
    given_names = dict(tensors)

    def attempt() -> Account:
        return load(net, tensors, source="w", rename=lambda name: name.removeprefix("old."), may_miss=["*"])

    used = {name for name, fate in zip(KEYS, fates, strict=True) if fate in ("whole", "renamed", "half")}
    if used:
        account = attempt()
        other = {mismatch.name for mismatch in account.mismatched}
        assert account.used == len(used)
        assert used | set(account.missing) | other == set(KEYS)
        assert account.used + len(account.missing) + len(account.mismatched) == len(KEYS) == account.total
        assert account.used + len(account.unexpected) + len(account.mismatched) == len(tensors)
        assert all(line.strip() for line in str(account).splitlines())
    else:
        assert "matched 0 of 9" in refusal(attempt)
    after = state(net)
    for name, fate in zip(KEYS, fates, strict=True):
        value = wanted[name]
        if fate == "half" and value.is_floating_point():
            value = value.half().float()
        assert torch.equal(after[name], value if name in used else before[name])
    assert tensors.keys() == given_names.keys()
    assert all(tensors[name] is given_names[name] for name in tensors)


def test_another_class_count_needs_leave_and_is_told() -> None:
    source, net = small(), small()
    tensors = {**state(source), "head.weight": torch.ones(91, 4), "head.bias": torch.ones(91)}
    before = state(net)
    message = refusal(lambda: load(net, tensors, source="coco.pth"))
    assert "head.weight (in the file (91, 4) float32, in the model (3, 4) float32)" in message
    assert all(torch.equal(value, before[name]) for name, value in state(net).items())
    account = load(net, tensors, source="coco.pth", may_miss=["head.*"])
    assert [mismatch.name for mismatch in account.mismatched] == ["head.weight", "head.bias"]
    assert "2" in str(account)
    assert torch.equal(net.state_dict()["head.weight"], before["head.weight"])
    assert torch.equal(net.state_dict()["body.0.weight"], tensors["body.0.weight"])


def test_missing_and_left_over_tensors_need_leave() -> None:
    net, tensors = small(), state(small())
    del tensors["body.1.num_batches_tracked"]  # old files never had it
    assert load(net, tensors, source="w").missing == ("body.1.num_batches_tracked",)
    del tensors["head.bias"]
    before = state(net)
    assert "1 tensors of the model are missing: head.bias" in refusal(lambda: load(net, tensors, source="w"))
    tensors["head.bias"], tensors["fc.weight"] = torch.ones(3), torch.ones(2)
    assert "no place in the model: fc.weight" in refusal(lambda: load(net, tensors, source="w", may_leave=["aux.*"]))
    assert all(torch.equal(value, before[name]) for name, value in state(net).items())
    assert load(net, tensors, source="w").unexpected == ("fc.weight",)


def test_another_architecture_is_told_as_such() -> None:
    resnet, squeezenet = torchvision.models.resnet18(), torchvision.models.squeezenet1_1()
    message = refusal(lambda: load(resnet, state(squeezenet), source="w.pth"))
    assert message.startswith("w.pth: matched 0 of 122 tensors: these weights are for another architecture")
    account = Account("w", used=3, missing=tuple(map(str, range(211))), unexpected=(), mismatched=())
    assert "matched 3 of 214 tensors" in refusal(lambda: account.check(0.5))
    assert account.check(0.01) is account


def test_two_names_may_not_become_one() -> None:
    tensors = {**state(small()), "top.bias": torch.ones(3)}
    message = refusal(lambda: load(small(), tensors, source="w", rename=lambda n: n.replace("top", "head")))
    assert "both become head.bias" in message


class StandIn(nn.Module):
    """The names and shapes that ViTDet's ViT has in common with MAE's, and what it adds."""

    def __init__(self, width: int = 8, depth: int = 2, tokens: int = 197) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList(self.block(width) for _ in range(depth))

    @staticmethod
    def block(width: int) -> nn.Module:
        block = nn.Module()
        block.norm1, block.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        block.attn, block.mlp = nn.Module(), nn.Module()
        block.attn.qkv, block.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        block.attn.rel_pos_h = nn.Parameter(torch.zeros(27, width))
        block.attn.rel_pos_w = nn.Parameter(torch.zeros(27, width))
        block.mlp.fc1, block.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        return block


def mae_checkpoint(
    width: int = 8, depth: int = 2, tokens: int = 197, patch: int = 4, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random numbers under the names and shapes of the encoder that facebookresearch/mae publishes."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(depth):
        for name, shape in {
            "norm1": (width,),
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "norm2": (width,),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def test_mae_loads_with_a_full_account(tmp_path: Path) -> None:
    torch.save({"model": mae_checkpoint()}, tmp_path / "mae.pth")
    net, tensors = StandIn(), read_tensors(tmp_path / "mae.pth")
    account = load_vit(net, tensors)
    assert account.used == len(tensors) - 3
    assert account.unexpected == ("cls_token", "norm.bias", "norm.weight")
    assert account.missing == tuple(f"blocks.{i}.attn.rel_pos_{axis}" for i in (0, 1) for axis in "hw")
    assert account.notes == ("taken from 'model'",)
    loaded = net.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items() if name in loaded)
    assert not any(loaded[name].any() for name in account.missing)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.1.attn.qkv.bias": None}, "missing: blocks.1.attn.qkv.bias"),
        ({"pos_embed": None}, "missing: pos_embed"),
        ({"head.weight": torch.ones(1000, 8)}, "no place in the model: head.weight"),
        ({"blocks.2.norm1.weight": torch.ones(8)}, "no place in the model: blocks.2.norm1.weight"),
        ({"patch_embed.proj.weight": torch.ones(8, 4, 4, 4)}, "another shape: patch_embed.proj.weight"),
        ({"pos_embed": torch.ones(1, 200, 8)}, "200 tokens, neither a square grid"),
    ],
)
def test_mae_with_anything_else_is_refused(change: dict[str, Tensor | None], words: str) -> None:
    changed = {**mae_checkpoint(), **change}
    tensors = {name: tensor for name, tensor in changed.items() if tensor is not None}
    net = StandIn()
    before = state(net)
    assert words in refusal(lambda: load_vit(net, tensors))
    assert all(torch.equal(value, before[name]) for name, value in state(net).items())


def test_mae_of_another_size_is_another_architecture() -> None:
    assert "another architecture" in refusal(lambda: load_vit(StandIn(), mae_checkpoint(width=16, depth=4)))


def test_a_whole_autoencoder_gives_its_encoder() -> None:
    decoder = {"mask_token": torch.ones(1, 1, 4), "decoder_embed.weight": torch.ones(4, 8)}
    assert load_vit(StandIn(), {**mae_checkpoint(), **decoder}).used == 26 + 1


@pytest.mark.parametrize("own", [197, 196, 65, 64])
@pytest.mark.parametrize("found", [197, 196, 577, 576, 50])
def test_positions_are_fitted_to_the_grid(own: int, found: int) -> None:
    side, found_side = math.isqrt(own), math.isqrt(found)
    across = torch.linspace(0, 1, found_side)
    ramp = (across[:, None] + 2 * across).flatten()[:, None].expand(-1, 8)  # (G*G, D), plane over the grid
    table = torch.cat([torch.full((found - found_side**2, 8), 9.0), ramp])[None]
    tensors, net = {**mae_checkpoint(), "pos_embed": table}, StandIn(tokens=own)
    first = net.pos_embed[0, 0].clone()
    account = load_vit(net, tensors)
    assert bool(account.notes) == (own != found)
    assert table.shape == (1, found, 8)
    if own > side**2:
        assert torch.equal(net.pos_embed[0, 0], table[0, 0] if found > found_side**2 else first)
    grid = net.pos_embed[0, own - side**2 :].reshape(side, side, 8).detach()
    if side == found_side:
        assert torch.equal(grid.flatten(0, 1), ramp)
    down, right = grid[-3, 2:-2] - grid[2, 2:-2], grid[2:-2, -3] - grid[2:-2, 2]
    slope = (found_side / side) / (found_side - 1)  # of the rows; the columns have twice that
    assert torch.allclose(down, torch.tensor((side - 5) * slope), rtol=0.05)
    assert torch.allclose(right, 2 * down.mean(), rtol=0.1)


def test_positions_are_resampled_as_the_vit_does() -> None:
    def small_vit(pretrain_grid: int) -> ViT:
        return ViT(width=24, depth=1, heads=3, patch=4, window=7, global_blocks=(0,), pretrain_grid=pretrain_grid)

    tensors = mae_checkpoint(width=24, depth=1, tokens=577)
    resampled, whole_table = small_vit(14), small_vit(24)
    load_vit(resampled, tensors)
    load_vit(whole_table, tensors)
    assert torch.allclose(resampled.positions(14, 14), whole_table.positions(14, 14), atol=1e-5)


def test_positions_on_a_grid_of_two_sides_are_the_same() -> None:
    """timm's Segment Anything keeps (1, G, G, D), without a class token."""
    flat, grid = StandIn(), StandIn()
    grid.load_state_dict(flat.state_dict())
    table = torch.randn(1, 16, 16, 8)
    load_vit(flat, {**mae_checkpoint(), "pos_embed": table.flatten(1, 2)})
    load_vit(grid, {**mae_checkpoint(), "pos_embed": table})
    assert torch.equal(flat.pos_embed, grid.pos_embed)


@pytest.mark.parametrize("side", [14, 20, 64])
def test_relative_positions_are_resampled_as_the_attention_does(side: int) -> None:
    """A table resampled at load sees what the whole table, resampled in the attention, sees."""

    def vit(relative_grid: int) -> ViT:
        return ViT(
            width=24, depth=1, heads=3, patch=4, window=7, global_blocks=(0,), relative_grid=relative_grid
        ).eval()

    whole, other = vit(side), vit(14)
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.3)
    account = load_vit(other, whole.state_dict())
    said = (
        f"relative positions resampled from {2 * side - 1} to 27 rows: blocks.0.attn.rel_pos_h, blocks.0.attn.rel_pos_w"
    )
    assert account.notes == (() if side == 14 else (said,))
    assert account.used == account.total
    pictures = torch.randn(1, 3, 56, 56)  # 14 patches a side
    with torch.no_grad():
        assert torch.allclose(whole(pictures)[4], other(pictures)[4], atol=1e-4)


# ------ Patches of another size


def smooth(count: int, channels: int, side: int, points: int = 5) -> Tensor:
    """Pictures without detail finer than side / points pixels, so that a resized one is the same picture."""
    return F.interpolate(torch.randn(count, channels, points, points), size=side, mode="bicubic", align_corners=False)


def resized(pictures: Tensor, side: int) -> Tensor:
    return F.interpolate(pictures, size=side, mode="bicubic", antialias=True)


def test_patches_of_the_same_size_stay_as_they_are() -> None:
    kernel = torch.randn(8, 3, 16, 16)
    assert torch.equal(resize_patches(kernel, (16, 16)), kernel)


@given(old=st.integers(2, 10), more=st.integers(1, 6), channels=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_an_enlarged_patch_gets_the_answer_of_the_patch(old: int, more: int, channels: int) -> None:
    kernel, patches = torch.randn(6, channels, old, old), torch.rand(5, channels, old, old)
    larger = resize_patches(kernel, (old + more, old + more))
    assert larger.shape == (6, channels, old + more, old + more)
    before = torch.einsum("dchw,nchw->nd", kernel, patches)
    after = torch.einsum("dchw,nchw->nd", larger, resized(patches, old + more))
    assert torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("there", [8, 12, 14, 20, 24, 32])
def test_a_round_trip_of_a_smooth_kernel_is_close(there: int) -> None:
    torch.manual_seed(0)
    kernel = smooth(8, 3, 16)
    back = resize_patches(resize_patches(kernel, (there, there)), (16, 16))
    assert F.cosine_similarity(kernel.flatten(1), back.flatten(1)).min() > 0.97


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.25, 1.5, 2.0])
def test_a_vits_features_stay_close_when_picture_and_patch_are_resized_alike(scale: float) -> None:
    torch.manual_seed(0)

    def vit(patch: int) -> ViT:
        return ViT(width=48, depth=2, heads=3, patch=patch, window=7, global_blocks=(1,)).eval()

    whole, other = vit(16), vit(round(16 * scale))
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    account = load_vit(other, whole.state_dict())
    assert (account.used, bool(account.notes)) == (account.total, True)
    pictures = smooth(2, 3, 224, points=40)
    with torch.no_grad():
        features = whole(pictures)[16].flatten(2)
        there = other(resized(pictures, round(224 * scale)))[round(16 * scale)].flatten(2)  # (B, D, T)
    assert F.cosine_similarity(features, there, dim=1).min() > 0.95


def test_the_real_vit_takes_the_official_shapes(tmp_path: Path) -> None:
    with torch.device("meta"):
        vit = ViT(width=768, depth=12, heads=12, patch=16, window=14, global_blocks=(2, 5, 8, 11))
    vit.to_empty(device="cpu")
    pool = torch.randn(3072 * 768, dtype=torch.bfloat16)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in mae_checkpoint(768, 12, 197, patch=16).items()}
    checkpoint = {name: pool[: shape.numel()].reshape(shape).clone() for name, shape in shapes.items()}
    torch.save({"model": checkpoint}, tmp_path / "mae.pth")  # 172 MB, half of the published file
    account = load_vit(vit, read_tensors(tmp_path / "mae.pth"))
    assert account.used == 147
    assert len(account.missing) == 24
    loaded = vit.state_dict()
    for name in ("pos_embed", "patch_embed.proj.weight", "blocks.11.mlp.fc2.weight"):
        assert torch.equal(loaded[name], checkpoint[name].float())


@pytest.mark.real_data
def test_real_files_load(real_data: Path) -> None:
    folder = real_data / "weights"
    squeezenet = torchvision.models.squeezenet1_1()
    tensors = read_tensors(folder / "squeezenet1_1" / "squeezenet1_1_imagenet_features_torchvision.pth")
    account = load(squeezenet, tensors, source="squeezenet1_1", may_miss=["classifier.*"])
    assert (account.used, account.missing) == (50, ("classifier.1.weight", "classifier.1.bias"))
    mobilenet = torchvision.models.mobilenet_v2()
    tensors = read_tensors(folder / "mobilenet_v2" / "mobilenet_v2_imagenet_from_int8_torchvision.pth")
    account = load(mobilenet, tensors, source="mobilenet_v2", may_leave=())
    assert (account.used, account.missing, account.notes) == (314, (), ())
