"""All that moves while a detector is trained, as one state: weights, their average, the optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from boxwright.models.detectors.base import Detector
from boxwright.training.distributed import like, put, whole
from boxwright.training.state import State
from boxwright.types import UserError


class Average:
    """The exponential moving average of a detector's weights, as a detector of its own: smoother, and often better.

    Over the first steps the average is shorter (Polyak averaging's usual warm-up), so that the random start is soon
    forgotten.
    """

    def __init__(self, detector: Detector, decay: float, shard: Callable[[Detector], None] = lambda _: None) -> None:
        self.decay = decay
        self.detector = copy.deepcopy(detector).requires_grad_(requires_grad=False).eval()
        shard(self.detector)  # before the detector itself is: pieces cannot be copied
        self.follow(detector)

    def follow(self, detector: Detector) -> Detector:
        """Average the parameters that `detector` has now; gives the averaged detector."""
        self._parameters = (
            cast(list[Tensor], list(self.detector.parameters())),
            cast(list[Tensor], list(detector.parameters())),
        )
        self._buffers = list(zip(self.detector.buffers(), detector.buffers(), strict=True))
        return self.detector

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after step number `step` (0-based); buffers are taken as they are."""
        decay = min(self.decay, (1 + step) / (10 + step))
        ours, theirs = self._parameters
        get_ema_multi_avg_fn(decay)(ours, theirs, None)
        for own, other in self._buffers:
            own.copy_(other)


class Moving:
    """The parts of a run that a state holds: weights, average, optimizer, loss scale."""

    def __init__(
        self,
        detector: nn.Module,
        average: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        self.modules = {"model": detector} | ({"average": average} if average else {})
        self.optimizer = optimizer
        self.scaler = scaler

    def state(self, step: int, values: dict[str, Any]) -> State:
        """Everything as it is now. The tensors are the living ones: they are to be copied before the next step.

        Where they are cut into pieces all ranks must ask at once.
        """
        tensors = {name: whole(tensor) for name, tensor in self._tensors()}
        tensors |= {f"optimizer/{i}/{k}": whole(t) for i, k, t in _entries(self.optimizer.state_dict()["state"])}
        return State(step, tensors, {**values, "scaler": self.scaler.state_dict(), "threads": torch.get_num_threads()})

    def restore(self, state: State) -> None:
        """Put everything back; a state of another model or optimizer is a `UserError`."""
        own = dict(self._tensors())
        saved = {k: t for k, t in state.tensors.items() if not k.startswith("optimizer/")}
        wrong = sorted(own.keys() ^ saved.keys()) or [k for k in own if own[k].shape != saved[k].shape]
        if wrong:
            raise UserError(
                f"the state was saved by another model or with other options: {len(wrong)} tensors differ "
                f"({wrong[0]} ...)"
            )
        for name, tensor in own.items():
            put(tensor, saved[name])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        entries: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.tensors.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/")
                entries.setdefault(int(index), {})[key] = like(parameters[int(index)], tensor)
        groups = self.optimizer.state_dict()["param_groups"]  # decided by the run, as they were
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        self.scaler.load_state_dict(state.values["scaler"])

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for part, module in self.modules.items():
            for name, tensor in module.state_dict().items():
                yield f"{part}/{name}", tensor


def _entries(states: Mapping[int, Mapping[str, Any]]) -> Iterator[tuple[int, str, Tensor]]:
    for index, entry in states.items():
        for key, value in entry.items():
            if value is not None:  # SGD keeps a None where it has no momentum yet
                yield index, key, value if isinstance(value, Tensor) else torch.tensor(value)
