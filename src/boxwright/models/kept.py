"""What is made once and kept: constants for a size, and what prediction makes of a module's parameters."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from typing import Any, cast

import torch
from torch import Tensor, nn


class Remembering(nn.Module):
    """Keeps what prediction makes of a parameter for as long as nothing can have changed the parameter.

    Version counters do not tell, since fused optimizers leave them as they are. But an optimizer only moves what has
    a gradient, and a gradient takes a forward with gradients enabled. So a product is kept only in evaluation mode,
    with gradients disabled, of a parameter that has none; any other forward, `train`, `eval`, loading and moving
    forget it. Whoever writes through `parameter.data` in evaluation mode calls `eval()` afterwards.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept: dict[str, tuple[Hashable, Tensor]] = {}

    def made_of(self, name: str, size: Hashable, make: Callable[[Tensor], Tensor]) -> Tensor:
        """`make(parameter)` for the parameter called `name`, made anew when `size` is another than last time."""
        parameter = cast(Tensor, getattr(self, name))
        if torch.compiler.is_compiling():  # a graph holds the making itself
            return make(parameter)
        if self.training or torch.is_grad_enabled() or parameter.grad is not None:
            self._kept.pop(name, None)
            return make(parameter)
        version = None if parameter.is_inference() else parameter._version
        key = (size, version, parameter.data_ptr())
        if name not in self._kept or self._kept[name][0] != key:
            self._kept[name] = (key, make(parameter))
        return self._kept[name][1]

    def train(self, mode: bool = True) -> Any:
        self._kept.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._kept.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kept.clear()
        super()._load_from_state_dict(*args, **kwargs)


def constant(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a tensor once for the same arguments; where a compiler traces, leave the making in its graph."""
    kept = lru_cache(maxsize=64)(make)

    @wraps(make)
    def once(*arguments: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return make(*arguments)
        with torch.inference_mode(False), torch.no_grad():
            return kept(*arguments)

    return once


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Full precision for what is inside, on a device that has autocast at all."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
