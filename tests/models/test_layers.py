"""Depths of parameters: every one has one, blocks are told apart, and rates grow from the stem to the heads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from boxwright.models.backbones import from_timm, from_torchvision
from boxwright.models.layers import decay_scales, depth_of_parameters
from boxwright.models.pyramid import Joined, Maps
from boxwright.models.vit import ViT


class Unknown(nn.Module):
    """A plug-in's backbone, which says nothing of the order of its layers."""

    channels = {8: 4}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.first = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Maps:
        return {8: self.second(self.first(images))}


def our_vit() -> nn.Module:
    return ViT(width=32, depth=3, heads=2, global_blocks=(2,))


def timm(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return from_timm.build(name, **options)


def detector(body: nn.Module, *, joined: bool = True) -> nn.Module:
    whole = nn.Module()
    whole.backbone = Joined(body, nn.Conv2d(4, 4, 1)) if joined else body
    whole.head = nn.Linear(4, 4)
    return whole


# body: the number of its blocks, and of some of its parameters the depth
KNOWN: dict[str, tuple[nn.Module, int, dict[str, int]]] = {
    "our ViT": (
        our_vit(), 3,
        {"pos_embed": 0, "patch_embed.proj.weight": 0, "blocks.0.norm1.weight": 1, "blocks.2.mlp.fc2.bias": 3},
    ),
    "timm's ViT": (
        timm("vit_tiny_patch16_224", depth=4), 4,
        {"cls_token": 0, "pos_embed": 0, "patch_embed.proj.bias": 0, "blocks.3.attn.qkv.weight": 4, "norm.weight": 5},
    ),
    "timm's ViT with rotary positions that learn": (
        timm("vit_small_patch16_rope_mixed_224", depth=2), 2,
        {"rope.freqs": 0, "blocks.1.attn.qkv.weight": 2, "norm.bias": 3},
    ),
    "another ViT of timm's": (
        timm("samvit_base_patch16", depth=2, global_attn_indexes=(1,)), 2,
        {"net.pos_embed": 0, "net.blocks.0.attn.rel_pos_h": 1, "net.blocks.1.attn.qkv.bias": 2},
    ),
    "torchvision's ResNet-50": (
        from_torchvision.resnet(50), 16,
        {"conv1.weight": 0, "bn1.bias": 0, "layer1.0.downsample.0.weight": 1, "layer2.0.conv1.weight": 4,
         "layer4.2.bn3.weight": 16},
    ),
    "torchvision's SqueezeNet": (
        from_torchvision.squeezenet1_1(), 8, {"0.weight": 0, "3.squeeze.weight": 1, "12.expand3x3.bias": 8}
    ),
    "timm's ResNet-18": (
        timm("resnet18"), 8, {"net.conv1.weight": 0, "net.bn1.weight": 0, "net.layer4.1.conv2.weight": 8}
    ),
    "timm's ConvNeXt": (
        timm("convnext_atto"), 15,
        {"net.stem.1.weight": 0, "net.stages.0.blocks.0.gamma": 1, "net.stages.1.downsample.0.weight": 3,
         "net.stages.3.blocks.1.mlp.fc2.weight": 15},
    ),
    "timm's Swin": (
        timm("swin_tiny_patch4_window7_224"), 15,
        {"net.patch_embed.proj.weight": 0, "net.layers.0.blocks.0.norm1.weight": 1,
         "net.layers.3.blocks.1.mlp.fc2.bias": 15},
    ),
    "timm's VGG-11": (timm("vgg11"), 7, {"net.features.0.weight": 0, "net.features.18.bias": 7}),
    "an unknown one": (Unknown(), 0, {"first.weight": 0, "second.0.weight": 0, "second.1.bias": 0}),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_blocks_have_the_depths_in_which_they_run(name: str) -> None:
    body, blocks, some = KNOWN[name]
    whole = detector(body)
    depths = depth_of_parameters(whole)
    assert list(depths) == [parameter for parameter, _ in whole.named_parameters()]
    for parameter, depth in some.items():
        assert depths[f"backbone.body.{parameter}"] == depth, parameter
    assert set(depths.values()) == set(range(blocks + 2))  # no depth is skipped
    for above in ("backbone.fpn.weight", "head.weight", "head.bias"):
        assert depths[above] == blocks + 1


@pytest.mark.parametrize("name", KNOWN)
def test_rates_fall_by_one_factor_a_layer_from_the_heads_down(name: str) -> None:
    body, blocks, _ = KNOWN[name]
    whole = detector(body)
    depths, scales = depth_of_parameters(whole), decay_scales(whole, 0.8)
    assert scales["head.weight"] == 1
    assert all(math.isclose(scales[p], 0.8 ** (blocks + 1 - depths[p])) for p in depths)
    assert set(decay_scales(whole, 1.0).values()) == {1.0}


def test_a_backbone_without_a_pyramid_is_its_own_body() -> None:
    depths = depth_of_parameters(detector(our_vit(), joined=False))
    assert depths["backbone.pos_embed"] == 0
    assert depths["backbone.blocks.2.mlp.fc2.bias"] == 3
    assert depths["head.bias"] == 4
