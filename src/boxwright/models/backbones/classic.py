"""Small convolutional backbones, for training without published weights, and the SqueezeNets.

The channels are those of the Faster R-CNN training pipeline at github.com/sovit-123, and so are the state-dict keys: a
trunk that it saved under `backbone.` is ours under `backbone.body.`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.squeezenet import Fire

from boxwright.models.backbones import from_torchvision
from boxwright.models.backbones.from_torchvision import Staged
from boxwright.registry import register

LEAK = 0.1  # of LeakyReLU, as Darknet's

# ------ Darknets: stages of convolutions, each half the size of the one before


@register("darknet", kind="backbone")
def darknet() -> Staged:
    """Darknet of 20 convolutions, up to 1024 channels (YOLO's first, arXiv:1506.02640): strides 4 to 32."""
    return _darknet([(64,), (192,), (128, 256, 256, 512), (*(256, 512) * 4, 512, 1024), (512, 1024) * 2])


@register("mini_darknet", kind="backbone")
def mini_darknet() -> Staged:
    """Darknet's layers with an eighth of the channels or fewer: strides 4 to 32."""
    return _darknet([(4,), (8,), (16, 32, 64, 128), (*(64, 128) * 4, 128, 256), (128, 256, 128, 128)])


@register("nano", kind="backbone")
def nano() -> Staged:
    """Five convolutions, 256 channels: strides 4 and 8."""
    return _darknet([(64,), (128,), (256, 256, 256)])


def _darknet(stages: Sequence[Sequence[int]]) -> Staged:
    """The channels of every convolution, by stage: the first 7x7 of stride 2, the second 3x3, then 1x1 and 3x3 in turn.

    Max-pooling stands between stages. The fourth ends without an activation, as in the trunks saved elsewhere.
    """
    layers: list[nn.Module] = []
    taps: dict[str, tuple[int, int]] = {}
    source = 3
    for stage, widths in enumerate(stages):
        if stage > 0:
            layers.append(nn.MaxPool2d(2))
        for i, width in enumerate(widths):
            kernel = (7, 3)[stage] if stage < 2 else (1, 3)[i % 2]
            stride = 2 if stage == 0 else 1
            layers += [nn.Conv2d(source, width, kernel, stride, padding=kernel // 2), nn.LeakyReLU(LEAK, inplace=True)]
            source = width
        if stage == 3:
            layers.pop()
        if stage > 0:
            taps[str(len(layers) - 1)] = (2 << stage, source)
    _initialise(layers, LEAK)
    return Staged({str(i): layer for i, layer in enumerate(layers)}, taps)


# ------ A small residual network


@register("custom_resnet", kind="backbone")
def custom_resnet() -> Staged:
    """A ResNet of 9 blocks, 16 to 256 channels: strides 4 to 64."""
    widths = (16, 32, 64, 128, 256)
    stem = [nn.Conv2d(3, widths[0], 7, stride=2, padding=3), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)]
    stages = [nn.Sequential(*stem, nn.MaxPool2d(3, stride=2, padding=1))]
    for source, width in pairwise(widths):
        stages.append(nn.Sequential(ResidualBlock(source, width, stride=2), ResidualBlock(width, width, stride=1)))
    _initialise(stages, 0)
    return Staged(
        {str(i): stage for i, stage in enumerate(stages)},
        {str(i): (4 << i, width) for i, width in enumerate(widths)},
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a 1x1 one (ResNet, arXiv:1512.03385)."""

    def __init__(self, source: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(source, width, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(source, width, 1, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + self.conv3(x))


# ------ SqueezeNets (arXiv:1602.07360)


@register("squeezenet1_0", kind="backbone")
def squeezenet1_0() -> Staged:
    """SqueezeNet 1.0, padded on all sides: strides 4, 8 and 16."""
    return cast(Staged, from_torchvision.build("squeezenet1_0"))


@register("squeezenet1_1", kind="backbone")
def squeezenet1_1() -> Staged:
    """SqueezeNet 1.1, padded on all sides: strides 4, 8 and 16."""
    return from_torchvision.squeezenet1_1()


@register("mini_squeezenet1_1", kind="backbone")
def mini_squeezenet1_1() -> Staged:
    """SqueezeNet 1.1 whose last fire module is a quarter as wide: strides 4, 8 and 16."""
    net = torchvision.models.squeezenet1_1(weights=None)
    narrow = Fire(512, squeeze_planes=32, expand1x1_planes=64, expand3x3_planes=64)
    _initialise([narrow], 0)
    net.features[-1] = narrow
    return from_torchvision.cut(net, "squeezenet1_1")


def _initialise(layers: Sequence[nn.Module], leak: float) -> None:
    """Kaiming's initialisation of every convolution (arXiv:1502.01852)."""
    for layer in nn.ModuleList(layers).modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, a=leak, nonlinearity="leaky_relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
