"""Pyramids give the levels that they promise, and torchvision's and detectron2's numbers with their weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from boxwright.models.pyramid import FPN, ChannelNorm, Joined, SimpleFeaturePyramid, coarser


def some_maps(channels: dict[int, int], height: int, width: int, count: int = 2) -> dict[int, Tensor]:
    """Random maps of a canvas of that size, sides rounded up."""
    generator = torch.Generator().manual_seed(height * width)
    return {s: torch.randn(count, c, -(-height // s), -(-width // s), generator=generator) for s, c in channels.items()}


# ------ Simple feature pyramid


@pytest.mark.parametrize(
    ("stride", "scales", "strides"),
    [(16, (4.0, 2.0, 1.0, 0.5), [4, 8, 16, 32, 64]), (8, (2.0, 1.0, 0.5), [4, 8, 16, 32])],
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


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d])
@pytest.mark.parametrize(("height", "width"), [(128, 192), (104, 72), (100, 150)])
def test_same_levels_and_gradients_as_torchvision(
    norm: Callable[[int], nn.Module] | None, height: int, width: int
) -> None:
    channels = {4: 6, 8: 10, 16: 12, 32: 14}
    torch.manual_seed(0)
    theirs = FeaturePyramidNetwork(list(channels.values()), 8, LastLevelMaxPool(), norm_layer=norm)
    ours = FPN(channels, width=8, norm=norm)
    ours.load_state_dict(theirs.state_dict())
    maps = some_maps(channels, height, width)
    expected = theirs(OrderedDict((str(s), m) for s, m in maps.items()))
    found = ours(maps)
    assert list(found) == list(ours.channels) == [4, 8, 16, 32, 64]
    for mine, other in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(mine, other)
    for levels in (found, expected):
        torch.stack([level.square().mean() for level in levels.values()]).sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)


def test_the_order_of_the_maps_is_that_of_their_strides() -> None:
    channels = {16: 12, 4: 6, 8: 10}
    pyramid, maps = FPN(channels, width=8), some_maps(channels, 64, 96)
    levels = pyramid(maps)
    assert list(levels) == [4, 8, 16, 32]
    for stride, level in pyramid(dict(reversed(maps.items()))).items():
        assert torch.equal(level, levels[stride])


def test_the_coarsest_level_is_every_second_cell() -> None:
    levels = some_maps({8: 3, 16: 3}, 112, 80)
    top = coarser(levels)
    assert list(top) == [32]
    assert torch.equal(top[32], levels[16][:, :, ::2, ::2])


def test_a_backbone_and_its_pyramid_are_one_module() -> None:
    class Body(nn.Module):
        def forward(self, images: Tensor) -> dict[int, Tensor]:
            return {8: F.avg_pool2d(images, 8)}

    joined = Joined(Body(), FPN({8: 3}, width=5))
    levels = joined(torch.randn(1, 3, 64, 32))
    assert {stride: level.shape[1] for stride, level in levels.items()} == joined.channels == {8: 5, 16: 5}


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
