"""Pyramids give the levels that they promise, and torchvision's and detectron2's numbers with their weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from boxwright import registry
from boxwright.models.join import join
from boxwright.models.pyramid import FPN, ChannelNorm, Extra, Joined, SimpleFeaturePyramid, group_norm
from boxwright.types import UserError


def some_maps(channels: dict[int, int], height: int, width: int, count: int = 2) -> dict[int, Tensor]:
    """Random maps of a canvas of that size, sides rounded up."""
    generator = torch.Generator().manual_seed(height * width)
    return {s: torch.randn(count, c, -(-height // s), -(-width // s), generator=generator) for s, c in channels.items()}


# ------ Simple feature pyramid


@pytest.mark.parametrize(
    ("stride", "scales", "strides"),
    [
        (16, (4.0, 2.0, 1.0, 0.5), [4, 8, 16, 32, 64]),
        (8, (2.0, 1.0, 0.5), [4, 8, 16, 32]),
        (8, (0.5, 0.25), [16, 32, 64]),
        (32, (8.0, 4.0), [4, 8, 16]),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(128, 128), (192, 64), (160, 224)])
def test_one_map_becomes_many(
    stride: int, scales: tuple[float, ...], strides: list[int], height: int, width: int
) -> None:
    pyramid = SimpleFeaturePyramid(stride, channels=16, width=8, scales=scales)
    maps = some_maps({stride: 16}, height, width)
    levels = pyramid(maps)
    assert list(levels) == list(pyramid.channels) == strides
    for level, features in levels.items():
        assert features.shape[:2] == (2, pyramid.channels[level])
        assert features.shape[2:] == (-(-height // level), -(-width // level))
    assert torch.equal(levels[strides[-1]], levels[strides[-2]][:, :, ::2, ::2])
    assert list(maps) == [stride]
    torch.stack([level.square().mean() for level in levels.values()]).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in pyramid.parameters())


def test_every_cell_looks_at_its_own_place() -> None:
    """A change of one cell of the map reaches each level only where that cell lies, and beside it."""
    pyramid = SimpleFeaturePyramid(16, channels=8, width=4).eval()
    maps = some_maps({16: 8}, 256, 256, count=1)
    changed = {16: maps[16].clone()}
    changed[16][:, :, 6, 9] += 1  # pixels 144 .. 160 from the left, 96 .. 112 from the top
    before, after = pyramid(maps), pyramid(changed)
    for stride in (4, 8, 16, 32):
        touched = (before[stride] != after[stride]).any(dim=1)[0].nonzero() * stride  # (N, 2) y, x
        assert (touched.amin(0) >= torch.tensor([96, 144]) - 2 * stride).all()
        assert (touched.amax(0) <= torch.tensor([112, 160]) + stride).all()
        assert len(touched) >= 4


def test_keys_are_detectron2_s() -> None:
    published = ["simfp_2.0", "simfp_2.1", "simfp_2.3", "simfp_3.0"]  # with a bias
    published = [f"{name}.{kind}" for name in published for kind in ("weight", "bias")]
    for level, (first, second) in {2: (4, 5), 3: (1, 2), 4: (0, 1), 5: (1, 2)}.items():
        for layer in (first, second):
            published += [f"simfp_{level}.{layer}.{kind}" for kind in ("weight", "norm.weight", "norm.bias")]
    state = SimpleFeaturePyramid(16, channels=768).state_dict()
    assert sorted(state) == sorted(published)
    assert state["simfp_2.0.weight"].shape == (768, 384, 2, 2)
    assert state["simfp_2.3.weight"].shape == (384, 192, 2, 2)
    assert [state[f"simfp_{k}.{i}.weight"].shape[:2] for k, i in ((2, 4), (3, 1), (4, 0), (5, 1))] == [
        (256, 192),
        (256, 384),
        (256, 768),
        (256, 768),
    ]


# ------ Feature pyramid network


EXTRAS: list[tuple[Extra, ExtraFPNBlock | None, int]] = [
    ("pool", LastLevelMaxPool(), 1),
    ("p6p7", LastLevelP6P7(8, 8), 2),
    ("p6p7_of_c5", LastLevelP6P7(14, 8), 2),
    (None, None, 0),
]


@pytest.mark.parametrize(("extra", "block", "more"), EXTRAS)
@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d])
@pytest.mark.parametrize(("height", "width"), [(128, 192), (104, 72), (100, 150)])
def test_same_levels_and_gradients_as_torchvision(
    extra: Extra,
    block: ExtraFPNBlock | None,
    more: int,
    norm: Callable[[int], nn.Module] | None,
    height: int,
    width: int,
) -> None:
    channels = {4: 6, 8: 10, 16: 12, 32: 14}
    torch.manual_seed(0)
    theirs = FeaturePyramidNetwork(list(channels.values()), 8, deepcopy(block), norm_layer=norm)
    ours = FPN(channels, width=8, norm=norm, extra=extra)
    ours.load_state_dict(theirs.state_dict())
    maps = some_maps(channels, height, width)
    expected = theirs(OrderedDict((str(s), m) for s, m in maps.items()))
    found = ours(maps)
    assert list(found) == list(ours.channels) == [4, 8, 16, 32, 64, 128][: 4 + more]
    assert set(ours.channels.values()) == {8}
    for mine, other in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(mine, other)
    for levels in (found, expected):
        torch.stack([level.square().mean() for level in levels.values()]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert len(gradients) == len(list(ours.parameters()))
    for name, mine in ours.named_parameters():
        torch.testing.assert_close(mine.grad, gradients[name], msg=name)


def test_the_order_of_the_maps_is_that_of_their_strides() -> None:
    channels = {16: 12, 4: 6, 8: 10}
    pyramid, maps = FPN(channels, width=8), some_maps(channels, 64, 96)
    levels = pyramid(maps)
    assert list(levels) == [4, 8, 16, 32]
    for stride, level in pyramid(dict(reversed(maps.items()))).items():
        assert torch.equal(level, levels[stride])


def test_the_coarsest_level_is_every_second_cell() -> None:
    channels = {8: 3, 16: 3}
    levels = FPN(channels, width=4)(some_maps(channels, 112, 80))
    assert torch.equal(levels[32], levels[16][:, :, ::2, ::2])


def test_a_backbone_and_its_pyramid_are_one_module() -> None:
    class Body(nn.Module):
        def forward(self, images: Tensor) -> dict[int, Tensor]:
            return {8: F.avg_pool2d(images, 8)}

    joined = Joined(Body(), FPN({8: 3}, width=5))
    levels = joined(torch.randn(1, 3, 64, 32))
    assert {stride: level.shape[1] for stride, level in levels.items()} == joined.channels == {8: 5, 16: 5}


# ------ By name


class Body(nn.Module):
    """Every map is a mean of the picture's pixels."""

    def __init__(self, *strides: int) -> None:
        super().__init__()
        self.channels = dict.fromkeys(strides, 3)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        return {stride: F.avg_pool2d(images, stride) for stride in self.channels}


@pytest.mark.parametrize("extra", ["pool", "p6p7", None])
@pytest.mark.parametrize(
    ("strides", "levels", "given"),
    [
        ((4, 8, 16, 32), (4, 8, 16, 32), [4, 8, 16, 32]),
        ((4, 8, 16, 32), (8, 16, 32), [8, 16, 32]),
        ((8, 16, 32), (4, 8, 16, 32), [8, 16, 32]),  # those that it can
        ((4, 8, 16), (8, 16, 32), [8, 16]),
        ((2, 4, 64), (4, 64), [4, 64]),
        ((16,), (4, 8, 16, 32), [4, 8, 16, 32]),
        ((8,), (8, 16, 32), [8, 16, 32]),
        ((32,), (32, 8, 16), [8, 16, 32]),
        ((64,), (4, 8), [4, 8]),
    ],
)
def test_levels_of_any_backbone(strides: tuple[int, ...], levels: tuple[int, ...], given: list[int], extra: Extra):
    joined = join(Body(*strides), levels=levels, extra=extra, width=16)
    above = {"pool": [2], "p6p7": [2, 4], None: []}[extra]
    assert list(joined.channels) == [*given, *(given[-1] * factor for factor in above)]
    found = joined(torch.randn(2, 3, 128, 192))
    assert {stride: level.shape[1] for stride, level in found.items()} == joined.channels
    for stride, level in found.items():
        assert level.shape[2:] == (-(-128 // stride), -(-192 // stride))


@pytest.mark.parametrize(("norm", "layer"), [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)])
def test_norms_of_the_fpn(norm: str, layer: type[nn.Module]) -> None:
    pyramid = registry.build("fpn", kind="pyramid", channels={8: 3, 16: 3}, width=48, norm=norm)
    assert sum(isinstance(module, layer) for module in pyramid.modules()) == 4
    assert all(module.bias is None for module in pyramid.modules() if isinstance(module, nn.Conv2d))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("fpn", {"channels": {16: 3}}, "stands on two maps or more.*gives 16 .*use the simple pyramid$"),
        ("fpn", {"channels": {2: 3, 4: 3, 64: 3}}, "gives 4 .it has 2 4 64.: ask for levels that it has$"),
        ("fpn", {"channels": {2: 3, 64: 3}}, "of strides 4 8 16 32 the backbone gives none"),
        ("simple", {"channels": {8: 3, 16: 3}}, r"gives 2 \(strides 8 16\): an FPN stands on several"),
        ("simple", {"channels": {8: 3}, "levels": (4, 12)}, r"powers of two such as 4 8 16 32, not \[12\]"),
        ("simple", {"channels": {8: 3}, "levels": ()}, r"powers of two such as 4 8 16 32, not \[\]"),
        ("simple", {"channels": {8: 3}, "extra": "p6p7_of_c5"}, "p6p7_of_c5 wants a map as coarse"),
        ("fpn", {"channels": {8: 3, 16: 3}, "extra": "p6p8"}, "unknown extra levels 'p6p8'.*Did you mean 'p6p7'"),
        ("fpn", {"channels": {8: 3, 16: 3}, "norm": "layer"}, "unknown norm 'layer'"),
        ("simple", {"channels": {8: 3}, "norm": "batch"}, "simple has no option 'norm'"),
    ],
)
def test_what_no_pyramid_stands_on(name: str, options: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        registry.build(name, kind="pyramid", **options)
    assert "\n" not in str(caught.value)


# ------ Norm


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channel_norm_is_layer_norm_over_channels(layout: torch.memory_format) -> None:
    norm = ChannelNorm(6, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (torch.randn(2, 6, 5, 4) * 3 + 7).contiguous(memory_format=layout)
    centred = x - x.mean(dim=1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    expected = scaled * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-5)
    for y, x_ in ((2, 3), (4, 0)):
        own = F.layer_norm(x[1, :, y, x_], (6,), norm.weight, norm.bias, eps=1e-6)
        torch.testing.assert_close(norm(x)[1, :, y, x_], own)


@pytest.mark.parametrize("channels", [2, 3, 16, 32, 48, 64, 100, 256])
def test_group_norm_takes_any_width_and_a_single_cell(channels: int) -> None:
    norm = group_norm(channels)
    assert norm(torch.randn(1, channels, 1, 1)).isfinite().all()
    assert norm.num_groups == 32 or channels < 64 or channels % 64


# ------ Memory


@pytest.mark.parametrize("extra", ["pool", "p6p7"])
@pytest.mark.parametrize("strides", [(16,), (8, 16, 32)])
def test_memory_stays_channels_last(strides: tuple[int, ...], extra: Extra) -> None:
    """No layer of a pyramid turns maps around that come with their channels last, which convolutions like."""
    channels = dict.fromkeys(strides, 8)
    pyramid = registry.build("simple" if len(strides) == 1 else "fpn", kind="pyramid", channels=channels, extra=extra)
    turned: list[str] = []

    def watch(name: str, output: Tensor) -> None:
        if not output.is_contiguous(memory_format=torch.channels_last):
            turned.append(name)

    for name, layer in pyramid.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | ChannelNorm | nn.GELU | nn.MaxPool2d):
            layer.register_forward_hook(lambda _layer, _inputs, output, name=name: watch(name, output))
    maps = some_maps(channels, 192, 128)
    levels = pyramid({stride: level.contiguous(memory_format=torch.channels_last) for stride, level in maps.items()})
    for stride, level in levels.items():
        watch(str(stride), level)
    assert not turned
