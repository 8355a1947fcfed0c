"""Backbones from torchvision: its layers, cut into maps by stride."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from boxwright.models.pyramid import Maps


class Staged(nn.ModuleDict):
    """Named layers run one after the other; the output of some is kept as the map of a stride.

    `taps` is {layer name: (stride, channels)}. Layers behind the last tap are left out. State-dict keys are the layers'
    names, so published weights load by key.
    """

    def __init__(self, layers: Mapping[str, nn.Module], taps: Mapping[str, tuple[int, int]]) -> None:
        names = list(layers)
        last = max(names.index(name) for name in taps)
        super().__init__({name: layers[name] for name in names[: last + 1]})
        self.taps = dict(taps)
        self.channels = dict(taps.values())

    def forward(self, images: Tensor) -> Maps:
        maps: Maps = {}
        for name, layer in self.items():
            images = layer(images)
            if name in self.taps:
                maps[self.taps[name][0]] = images
        return maps


def resnet(depth: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> Staged:
    """torchvision's ResNet-50/101/152: strides 4 to 32."""
    net = getattr(torchvision.models, f"resnet{depth}")(weights=None, norm_layer=norm)
    layers = {name: layer for name, layer in net.named_children() if name not in ("avgpool", "fc")}
    return Staged(layers, {"layer1": (4, 256), "layer2": (8, 512), "layer3": (16, 1024), "layer4": (32, 2048)})


def squeezenet1_1() -> Staged:
    """The convolutional part of SqueezeNet 1.1 (arXiv:1602.07360): strides 8 and 16.

    It was published without padding, so that its cells lie up to a whole stride off the places that their strides
    say. A pixel of padding puts them there; the weights are the same.
    """
    layers = dict(torchvision.models.squeezenet1_1(weights=None).features.named_children())
    for name, layer in layers.items():
        if isinstance(layer, nn.MaxPool2d):
            layers[name] = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    first = layers["0"]
    assert isinstance(first, nn.Conv2d)
    first.padding = (1, 1)
    return Staged(layers, {"7": (8, 256), "12": (16, 512)})


def mobilenet_v2() -> Staged:
    """The convolutional part of MobileNetV2 (arXiv:1801.04381): strides 4 to 32.

    BatchNorm is frozen: detection batches are too small for their own statistics.
    """
    net = torchvision.models.mobilenet_v2(weights=None, norm_layer=FrozenBatchNorm2d)
    features = dict(net.features.named_children())
    return Staged(features, {"3": (4, 24), "6": (8, 32), "13": (16, 96), "18": (32, 1280)})
