"""Backbones from torchvision: any of its classifiers, cut into maps by stride."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.models import VisionTransformer
from torchvision.ops import FrozenBatchNorm2d

from boxwright.models.pyramid import Maps
from boxwright.registry import nearest
from boxwright.types import Size, UserError

Norm = Literal["train", "frozen"]  # BatchNorms that learn from each batch, or stay what the weights make them

FINEST = 4  # stride; what lies before it is too large and too shallow to look for objects in
SIZES: tuple[Size, Size] = ((256, 320), (384, 512))  # of the dry run; both sides differ, so only channels are the same
MOST_PADDING = 3  # pixels that a layer may lack on each side: SqueezeNet 1.0's first


class Staged(nn.ModuleDict):
    """Named layers run one after the other; the output of some is kept as the map of a stride.

    `taps` is {layer name: (stride, channels)}. Layers behind the last tap are left out. State-dict keys are the layers'
    names, dots and all, so published weights load by key. A layer in `padding` {name: pixels} gets its input with so
    many zeros on each side; those of `channels_last` give (B, H, W, C) and are tapped as (B, C, H, W).
    """

    mean: Sequence[float]  # of the pixels that the layers were trained on, 0 .. 1; ImageNet's where not set
    std: Sequence[float]
    weights_name: str  # of the weights published for them, where there are any

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        taps: Mapping[str, tuple[int, int]],
        *,
        padding: Mapping[str, int] | None = None,
        channels_last: Iterable[str] = (),
    ) -> None:
        super().__init__()
        names = list(layers)
        self.order = names[: 1 + max(names.index(name) for name in taps)]
        self.taps = dict(taps)
        self.channels = dict(taps.values())
        self.padding = dict(padding or {})
        self.channels_last = frozenset(channels_last)
        for name in self.order:
            folder, _, last = name.rpartition(".")
            self._folder(folder)[last] = layers[name]

    def forward(self, images: Tensor) -> Maps:
        maps: Maps = {}
        for name in self.order:
            images = self.get_submodule(name)(_pad(images, self.padding.get(name, 0)))
            if name in self.taps:
                stride = self.taps[name][0]
                maps[stride] = images.permute(0, 3, 1, 2) if name in self.channels_last else images
        return maps

    def _folder(self, name: str) -> nn.ModuleDict:
        folder: nn.ModuleDict = self
        for part in name.split(".") if name else ():
            if part not in folder:
                folder[part] = nn.ModuleDict()
            folder = cast(nn.ModuleDict, folder[part])
        return folder


class VisionTransformerMap(nn.Module):
    """torchvision's ViT up to its head: images of any multiple of its patch → {patch: (B, D, H/patch, W/patch)}.

    Positions are resampled bicubically from the grid that they were learned on. State-dict keys are torchvision's.
    """

    mean: Sequence[float]
    std: Sequence[float]
    weights_name: str

    def __init__(self, net: VisionTransformer) -> None:
        super().__init__()
        self.class_token = net.class_token
        self.conv_proj = net.conv_proj
        self.encoder = net.encoder
        self.patch = net.patch_size
        self.side = net.image_size // net.patch_size  # of the grid of learned positions
        self.channels = {net.patch_size: net.hidden_dim}

    def forward(self, images: Tensor) -> Maps:
        cells = self.conv_proj(images)  # (B, D, h, w)
        rows, columns = cells.shape[-2:]
        first = self.class_token.expand(len(images), -1, -1)  # (B, 1, D)
        tokens = torch.cat([first, cells.flatten(2).transpose(1, 2)], dim=1)  # (B, 1 + h*w, D)
        tokens = self.encoder.layers(self.encoder.dropout(tokens + self._positions(rows, columns)))
        tokens = self.encoder.ln(tokens)[:, 1:]
        return {self.patch: tokens.transpose(1, 2).unflatten(2, (rows, columns))}

    def _positions(self, rows: int, columns: int) -> Tensor:
        table = self.encoder.pos_embedding  # (1, 1 + side*side, D)
        grid = table[:, 1:].transpose(1, 2).unflatten(2, (self.side, self.side))  # (1, D, side, side)
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def build(name: str, *, norm: Norm = "train") -> Staged | VisionTransformerMap:
    """torchvision's classifier `name` up to its pooling, with random weights: the last map of each stride from 4 on.

    State-dict keys are torchvision's without the prefix `features.`; a ViT gives one map. A name that torchvision does
    not have, and a network that takes one size only, are a `UserError`.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UserError(f"torchvision has no classifier {name!r}.{nearest(name, known)}")
    if norm not in get_args(Norm):
        raise UserError(f"unknown norm {norm!r} of torchvision:{name}: wanted is {' or '.join(get_args(Norm))}")
    # These two, and no others, take options: heads that help to train them are left out.
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    with torch.device("cpu"):  # RegNets read their widths off tensors, which on the meta device have no values
        net = torchvision.models.get_model(name, weights=None, **options)
        if norm == "frozen":
            _freeze(net)
    net = net.to(torch.get_default_device())
    body = _vision_transformer(net, name) if isinstance(net, VisionTransformer) else cut(net, name)
    body.mean, body.std = _pixels(net, name)
    body.weights_name = f"torchvision:{name}"
    return body


def resnet(depth: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> Staged:
    """torchvision's ResNet-18/34/50/101/152: strides 4 to 32."""
    name = f"resnet{depth}"
    body = cut(getattr(torchvision.models, name)(weights=None, norm_layer=norm), name)
    body.weights_name = f"torchvision:{name}"
    return body


def squeezenet1_1() -> Staged:
    """The convolutional part of SqueezeNet 1.1 (arXiv:1602.07360): strides 4, 8 and 16."""
    return cast(Staged, build("squeezenet1_1"))


def mobilenet_v2() -> Staged:
    """The convolutional part of MobileNetV2 (arXiv:1801.04381): strides 4 to 32.

    BatchNorm is frozen: detection batches are too small for their own statistics.
    """
    return cast(Staged, build("mobilenet_v2", norm="frozen"))


def cut(net: nn.Module, name: str) -> Staged:
    """A classifier whose layers run one after the other, up to its pooling: the last map of each stride from 4 on.

    SqueezeNet, Inception and others were published with layers that are padded on one side or not at all, so that
    their cells lie up to a whole stride off the places that their strides say. Such layers get padding on both sides,
    which puts the cells there and makes every map exactly 1 / stride of the image; the weights are the same.
    """
    for layer in net.modules():
        if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            layer.ceil_mode = False  # that is: padded at the bottom and right
    try:
        layers = {place.removeprefix("features."): layer for place, layer in _dry_run(net).items()}
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"torchvision's {name} is no backbone: it takes pictures of one size only") from error
    behind = [*list(layers.values())[1:], None]
    taps = {
        place: (layer.maps.stride, layer.maps.channels)
        for (place, layer), after in zip(layers.items(), behind, strict=True)
        if layer.maps.stride >= FINEST and (after is None or after.maps.stride > layer.maps.stride)
    }
    return Staged(
        {place: layer.module for place, layer in layers.items()},
        taps,
        padding={place: layer.padding for place, layer in layers.items() if layer.padding},
        channels_last=[place for place, layer in layers.items() if layer.maps.channels_last],
    )


# ------ The dry run: on the meta device, where tensors have shapes but no values


class _Maps:
    """What a layer makes of the pictures of `SIZES`."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        one, other = (tensor.shape[1:] for tensor in tensors)
        (channels,) = (axis for axis in range(3) if one[axis] == other[axis])
        self.tensors = tensors
        self.channels = one[channels]
        self.channels_last = channels == 2
        self.sides = [side for shape in (one, other) for axis, side in enumerate(shape) if axis != channels]

    @property
    def stride(self) -> int:
        return round(SIZES[0][0] / self.sides[0])


class _Layer(NamedTuple):
    """A layer and what the dry run showed of it."""

    module: nn.Module
    padding: int  # pixels that its input needs on each side
    maps: _Maps  # that it gives


def _dry_run(net: nn.Module) -> dict[str, _Layer]:
    """Every layer up to the pooling."""
    maps = _Maps([torch.empty(1, 3, *size, device="meta") for size in SIZES])
    layers: dict[str, _Layer] = {}
    net.eval()
    for name, module in net.named_children():
        if _begins_head(module):
            break
        layers |= _read(name, module, maps)
        maps = _last(layers).maps
    net.train()
    return layers


def _begins_head(module: nn.Module) -> bool:
    first = next(iter(module), None) if isinstance(module, nn.Sequential) else module
    return isinstance(first, nn.AdaptiveAvgPool2d | nn.Dropout | nn.Linear)


def _read(name: str, module: nn.Module, maps: _Maps) -> dict[str, _Layer]:
    """A layer by its name; of a sequence in which the stride grows more than twofold the layers in it."""
    if not isinstance(module, nn.ModuleList) and type(module).forward is not nn.Sequential.forward:
        return {name: _fit(module, maps)}
    before = maps
    layers: dict[str, _Layer] = {}
    for place, child in module.named_children():
        layers |= _read(f"{name}.{place}", child, maps)
        maps = _last(layers).maps
    if any(layer.padding for layer in layers.values()) or maps.stride > 2 * before.stride:
        return layers
    return {name: _Layer(module, 0, maps)}


def _last(layers: Mapping[str, _Layer]) -> _Layer:
    *_, last = layers.values()
    return last


def _fit(module: nn.Module, maps: _Maps) -> _Layer:
    """The layer with the padding by which it gives exactly 1 / stride of what it gets."""
    for padding in range(1 if maps.channels_last else MOST_PADDING + 1):
        after = _run(module, maps, padding)
        scale = round(maps.sides[0] / after.sides[0])
        if maps.sides == [side * scale for side in after.sides]:
            return _Layer(module, padding, after)
    raise AssertionError("no padding gives a map of a whole stride")


def _run(module: nn.Module, maps: _Maps, padding: int) -> _Maps:
    tensors = chain(module.named_parameters(), module.named_buffers())
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    with torch.no_grad():
        return _Maps([functional_call(module, shapes, (_pad(tensor, padding),)) for tensor in maps.tensors])


def _pad(images: Tensor, pixels: int) -> Tensor:
    return F.pad(images, [pixels] * 4) if pixels else images


# ------ What torchvision's networks have besides layers


def _vision_transformer(net: VisionTransformer, name: str) -> VisionTransformerMap:
    if net.patch_size & (net.patch_size - 1):
        raise UserError(
            f"torchvision's {name} is no backbone: no pyramid stands on its stride of {net.patch_size}, "
            "a power of two is wanted"
        )
    return VisionTransformerMap(net)


def _freeze(net: nn.Module) -> None:
    for parent in list(net.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
                frozen.load_state_dict(norm.state_dict())
                parent.add_module(name, frozen)


def _pixels(net: nn.Module, name: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the pixels that the network's published weights were trained on."""
    if hasattr(net, "transform_input"):  # GoogLeNet and Inception, whose own first step is from ImageNet's to these
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    published = cast(Any, torchvision.models.get_model_weights(name)).DEFAULT.transforms()
    return tuple(published.mean), tuple(published.std)
