"""Random numbers of each picture's own: what a picture draws does not depend on those that share its batch."""

from __future__ import annotations

from collections.abc import Generator as Iterating
from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import Generator, Tensor

_pictures: list[Generator] = []  # of the batch that is being trained on, where its pictures have seeds


@contextmanager
def of_pictures(seeds: Sequence[int], device: torch.device) -> Iterating[list[Generator | None]]:
    """Within the block each picture of a batch draws from a generator of its own; `seeds` has one for each."""
    _pictures[:] = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    try:
        yield [*_pictures]
    finally:
        _pictures.clear()


def uniform(shape: Sequence[int], pictures: int, device: torch.device) -> Tensor:
    """For each picture of the batch numbers from 0 to 1: (*shape, pictures). Without seeds the generator is global."""
    if torch.compiler.is_compiling() or len(_pictures) != pictures:
        return torch.rand(*shape, pictures, device=device)
    return torch.stack([torch.rand(*shape, generator=own, device=device) for own in _pictures], dim=-1)
