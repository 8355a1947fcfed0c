"""How deep in its detector each parameter stands, for learning rates that decay from the top layer down."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from boxwright.models.backbones.from_torchvision import Staged

CONTAINERS = (nn.Sequential, nn.ModuleList)


def depth_of_parameters(detector: nn.Module) -> dict[str, int]:
    """For every parameter of the detector its depth.

    0 is the stem or patch embedding with the position tables, 1 .. n are the blocks of the backbone's body in the
    order in which they run, n + 1 is all above: last norm, pyramid, heads. Blocks are known of a body with `blocks`
    (a ViT), of torchvision's `Staged`, and of one that says of itself that its layers are registered as they run
    (`runs_in_order`); any other is one layer of depth 0. So is all of a module without a backbone.
    """
    if not hasattr(detector, "backbone"):
        return dict.fromkeys((name for name, _ in detector.named_parameters()), 0)
    prefix = "backbone.body." if hasattr(detector.get_submodule("backbone"), "body") else "backbone."
    body = detector.get_submodule(prefix.removesuffix("."))
    within = {prefix + name: depth for name, depth in _depths(body).items()}
    above = _top(within) + 1
    return {name: within.get(name, above) for name, _ in detector.named_parameters()}


def decay_scales(detector: nn.Module, decay: float) -> dict[str, float]:
    """For every parameter `decay` to the number of layers above it; 1 for the pyramid and the heads.

    As in BEiT's fine-tuning and ViTDet, which use 0.7 to 0.8 for a ViT of 12 or 24 blocks.
    """
    depths = depth_of_parameters(detector)
    return {name: decay ** (_top(depths) - depth) for name, depth in depths.items()}


def _top(depths: dict[str, int]) -> int:
    return max(depths.values(), default=0)


def _depths(body: nn.Module) -> dict[str, int]:
    """The depths of a body's own parameters, without those of its last norm."""
    prefix, core = _core(body)
    if isinstance(getattr(core, "blocks", None), CONTAINERS):
        layers = _around_blocks(core)
    elif isinstance(body, Staged) or getattr(body, "runs_in_order", False):
        layers = _in_order(core)
    else:
        return dict.fromkeys((name for name, _ in body.named_parameters()), 0)
    return {prefix + name: depth for depth, layer in enumerate(layers) for name in layer}


def _core(module: nn.Module) -> tuple[str, nn.Module]:
    """The module inside of wrappers that have nothing but it: its name and itself."""
    children = [(name, child) for name, child in module.named_children() if _has_parameters(child)]
    if len(children) != 1 or _own(module) or isinstance(module, nn.ModuleList):
        return "", module
    name, core = children[0]
    deeper, core = _core(core)
    return f"{name}.{deeper}", core


def _around_blocks(core: nn.Module) -> list[list[str]]:
    """What is registered before `blocks`, then each of them; what comes behind is not of the body's layers."""
    layers: list[list[str]] = [_own(core)]
    for name, child in core.named_children():
        if name == "blocks":
            return [*layers, *(_all(block, f"blocks.{i}.") for i, block in child.named_children())]
        layers[0] += _all(child, f"{name}.")
    raise AssertionError("a module with `blocks` has them as a child")


def _in_order(core: nn.Module) -> list[list[str]]:
    """The first layer whole, as the stem, then each block that follows; a norm belongs to what it stands behind."""
    stem, *others = [(name, child) for name, child in core.named_children() if _has_parameters(child)]
    layers = [_own(core) + _all(stem[1], f"{stem[0]}.")]
    for name, child in others:
        for block in _blocks(child, f"{name}."):
            if all(core.get_parameter(parameter).ndim < 2 for parameter in block):
                layers[-1] += block
            else:
                layers.append(block)
    return layers


def _blocks(module: nn.Module, prefix: str) -> Iterator[list[str]]:
    """The parameters of each block of a stage, which is a container of more than layers, or a module with `blocks`."""
    children = dict(module.named_children())
    made_of_blocks = isinstance(module, CONTAINERS) and any(_has_layers(child) for child in children.values())
    if not (made_of_blocks or isinstance(children.get("blocks"), CONTAINERS)):
        yield _all(module, prefix)
        return
    waiting = _own(module, prefix)
    for name, child in children.items():
        for block in _blocks(child, f"{prefix}{name}."):
            yield [*waiting, *block]
            waiting = []


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _has_layers(module: nn.Module) -> bool:
    return any(_has_parameters(child) for child in module.children())


def _own(module: nn.Module, prefix: str = "") -> list[str]:
    return [prefix + name for name, _ in module.named_parameters(recurse=False)]


def _all(module: nn.Module, prefix: str) -> list[str]:
    return [prefix + name for name, _ in module.named_parameters()]
