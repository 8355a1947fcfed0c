"""Any backbone to any pyramid: names or modules in, one module of {stride: map} out.

A backbone takes normalised images (B, 3, H, W), H and W multiples of its coarsest stride, and gives maps
{stride: (B, C, H/stride, W/stride)}; its `channels` says {stride: C} of them. It may have `mean` and `std`, the
pixels' (0 .. 1) that it was trained with (ImageNet's where it has none).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from boxwright import registry
from boxwright.models.detectors.base import Detector
from boxwright.models.pyramid import Extra, Joined
from boxwright.types import UserError

LEVELS = (4, 8, 16, 32)  # strides of a pyramid below its extra levels


def build_detector(name: str, *, num_classes: int, **options: Any) -> Detector:
    """A detector by name, with random weights; `options` are its builder's, a `backbone` may be an `nn.Module`."""
    detector = registry.build(name, num_classes=num_classes, **options)
    if not isinstance(detector, Detector):
        raise UserError(f"{name} built a {type(detector).__name__}, not a subclass of Detector")
    return detector


def build_backbone(backbone: str | nn.Module, **options: Any) -> nn.Module:
    """A backbone by name (`timm:resnet50`, `torchvision:resnet50`, or a registered one), or a module as it is.

    A name that is not known and a module that is no backbone are a `UserError`.
    """
    if isinstance(backbone, nn.Module):
        body = backbone
        _try(body, type(body).__name__)
    elif not isinstance(backbone, str):  # pyright: ignore[reportUnnecessaryIsInstance] it may come from a file
        raise UserError(f"{backbone!r} is no backbone: a name or an nn.Module is wanted")
    elif backbone.startswith("timm:"):
        from boxwright.models.backbones import from_timm

        body = from_timm.build(backbone.removeprefix("timm:"), **options)
    elif backbone.startswith("torchvision:"):
        from boxwright.models.backbones import from_torchvision

        body = from_torchvision.build(backbone.removeprefix("torchvision:"), **options)
    else:
        if ":" in backbone:
            raise UserError(
                f"unknown backbone {backbone!r}: wanted is timm:NAME, torchvision:NAME or a registered name"
            )
        body = registry.build(backbone, kind="backbone", **options)
        if not registry.find(backbone, "backbone").path.is_relative_to(registry.PACKAGE):
            _try(body, backbone)
    _require_channels(body, backbone)
    return body


def join(
    backbone: str | nn.Module,
    pyramid: str | None = None,
    *,
    width: int = 256,
    levels: Sequence[int] = LEVELS,
    extra: Extra = "pool",
    backbone_options: Mapping[str, Any] | None = None,
    pyramid_options: Mapping[str, Any] | None = None,
) -> Joined:
    """A backbone with a pyramid of `width` channels at those of `levels` that it can give, and `extra` coarser ones.

    Where there are several maps, those coarser than all of `levels` become levels too: no layer stays without use.

    By default a backbone of one stride gets the simple feature pyramid, one of several an FPN. A pyramid that cannot
    stand on the backbone is a `UserError`.
    """
    if not isinstance(width, int) or not 1 <= width <= 8192:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(f"width {width!r} is no number of channels from 1 to 8192")
    body = build_backbone(backbone, **(backbone_options or {}))
    channels = cast(Mapping[int, int], body.channels)
    name = pyramid or ("simple" if len(channels) == 1 else "fpn")
    coarser = sorted(stride for stride in channels if stride > max(levels)) if len(channels) > 1 else []
    options = {"width": width, "levels": (*levels, *coarser), "extra": extra, **(pyramid_options or {})}
    built = registry.build(name, kind="pyramid", channels=channels, **options)
    if not isinstance(built, nn.Module) or not isinstance(getattr(built, "channels", None), Mapping):
        raise UserError(f"{name} built a {type(built).__name__}, no pyramid: a module with `channels` is wanted")
    return Joined(body, built)


def _try(body: object, name: str) -> None:
    """Run a user's own backbone once on a small picture: what it gives must be what it says."""
    if not isinstance(body, nn.Module):
        raise UserError(f"{name} built a {type(body).__name__}, no nn.Module")
    _require_channels(body, name)
    channels = cast(Mapping[int, int], body.channels)
    parameter = next(body.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    size = (2 * max(channels), 3 * max(channels))
    training = body.training
    try:
        maps = body.eval()(torch.zeros(1, 3, *size, device=device))
        found = {stride: tuple(level.shape) for stride, level in maps.items()}
    except Exception as error:  # whatever a user's code does
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{name} does not run on a picture of {size[0]} x {size[1]}: {reason}") from error
    finally:
        body.train(training)
    wanted = {stride: (1, c, size[0] // stride, size[1] // stride) for stride, c in channels.items()}
    if found != wanted:
        raise UserError(
            f"{name} gives maps {found} of a picture of {size[0]} x {size[1]}; its `channels` promise {wanted}"
        )
    learns = any(p.requires_grad for p in body.parameters())
    if learns and torch.is_grad_enabled() and not any(level.requires_grad for level in maps.values()):
        raise UserError(f"{name} would never learn: its maps carry no gradient. Freeze its parameters if that is meant")


def _require_channels(body: nn.Module, name: str | nn.Module) -> None:
    channels = getattr(body, "channels", None)
    what = name if isinstance(name, str) else type(name).__name__
    if not isinstance(channels, Mapping) or not channels:
        raise UserError(f"{what} is no backbone: it needs `channels`, {{stride: channels}} of the maps that it gives")
    odd = [stride for stride in channels if not isinstance(stride, int) or stride < 1 or stride & (stride - 1)]
    if odd:
        raise UserError(f"{what} gives maps of strides {odd}, which no pyramid stands on: powers of two are wanted")
