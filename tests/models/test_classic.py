"""The small backbones: their channels, and keys and numbers of a plain sequence of their layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from boxwright import registry
from boxwright.models.backbones import classic
from boxwright.models.backbones.from_torchvision import Staged
from boxwright.models.join import join

# {stride: channels} and parameters, those of the codebase whose trunks can be loaded
PLANS = {
    "darknet": ({4: 192, 8: 512, 16: 1024, 32: 1024}, 22_403_136),
    "mini_darknet": ({4: 8, 8: 128, 16: 256, 32: 128}, 1_230_312),
    "nano": ({4: 128, 8: 256}, 772_224),
    "custom_resnet": ({4: 16, 8: 32, 16: 64, 32: 128, 64: 256}, 2_881_440),
    "squeezenet1_0": ({4: 256, 8: 512, 16: 512}, 735_424),
    "squeezenet1_1": ({4: 128, 8: 256, 16: 512}, 722_496),
    "mini_squeezenet1_1": ({4: 128, 8: 256, 16: 128}, 562_336),
}


def backbone(name: str) -> Staged:
    torch.manual_seed(0)
    return registry.build(name, kind="backbone")


@pytest.mark.parametrize("name", PLANS)
def test_channels_and_parameters(name: str) -> None:
    body = backbone(name)
    assert (body.channels, sum(p.numel() for p in body.parameters())) == PLANS[name]


@pytest.mark.parametrize("name", ["darknet", "mini_darknet", "nano", "custom_resnet"])
@torch.no_grad()
def test_keys_and_numbers_are_those_of_a_sequence(name: str) -> None:
    """Where others keep these layers in an `nn.Sequential`, its state dict is the body's."""
    body = backbone(name).eval()
    sequence = nn.Sequential(*body.values())
    assert list(sequence.state_dict()) == list(body.state_dict())
    images = torch.randn(1, 3, 128, 192)
    torch.testing.assert_close(body(images)[max(body.channels)], sequence(images))


def test_darknet_s_layers() -> None:
    """The first convolutions of YOLO's backbone, and the one that no activation follows."""
    body = backbone("darknet")
    convs = {name: layer for name, layer in body.items() if isinstance(layer, nn.Conv2d)}
    assert [layer.out_channels for layer in convs.values()][:8] == [64, 192, 128, 256, 256, 512, 256, 512]
    assert [layer.kernel_size[0] for layer in convs.values()] == [7, 3, *[1, 3] * 9]
    assert len(convs) == 20
    bare = [name for name in convs if not isinstance(body[str(int(name) + 1)], nn.LeakyReLU)]
    assert bare == ["33"]
    assert {layer.negative_slope for layer in body.values() if isinstance(layer, nn.LeakyReLU)} == {0.1}


@pytest.mark.parametrize("name", ["darknet", "mini_darknet", "nano", "custom_resnet"])
@torch.no_grad()
def test_signals_keep_their_size_from_the_first_layer_to_the_last(name: str) -> None:
    for stride, level in backbone(name).train()(torch.randn(4, 3, 128, 128)).items():
        assert 0.1 < level.std() < 10, stride


def test_the_mini_squeezenet_is_squeezenet_but_for_its_end() -> None:
    mini, whole = (backbone(name).state_dict() for name in ("mini_squeezenet1_1", "squeezenet1_1"))
    assert mini.keys() == whole.keys()
    changed = {key.split(".")[0] for key in mini if mini[key].shape != whole[key].shape}
    assert changed == {"12"}
    assert not hasattr(classic.mini_squeezenet1_1(), "weights_name")  # none are published for it


@pytest.mark.parametrize("name", PLANS)
def test_by_name_under_a_pyramid(name: str) -> None:
    joined = join(name, width=16)
    levels = joined(torch.zeros(1, 3, 64, 128))
    assert {stride: tuple(level.shape[1:]) for stride, level in levels.items()} == {
        stride: (16, -(-64 // stride), -(-128 // stride)) for stride in joined.channels
    }
