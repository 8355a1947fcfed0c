"""One step of training: a share of a batch, in parts that fit the memory → gradients → the optimizer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from boxwright.data.loader import Share
from boxwright.models.detectors.base import Detector
from boxwright.training.distributed import World, whole
from boxwright.types import Batch, BoxwrightError


class Asked(NamedTuple):
    """What any of the processes was asked for while a step was done."""

    interrupt: bool = False  # Ctrl-C
    stop: bool = False  # another signal
    save: bool = False  # the time for a state has come

    @property
    def end(self) -> bool:
        return self.interrupt or self.stop


@dataclass(frozen=True)
class Done:
    """What a step came to, over all processes."""

    losses: dict[str, float]
    gradient: float  # its norm, before it was shortened
    wrong: tuple[str, ...]  # what was not finite: then nothing was learned
    suspects: tuple[str, ...]  # this process's pictures that it may come from
    asked: Asked


class OutOfMemory(BoxwrightError):
    """Not even one picture at a time fits."""

    exit_code = 70


class Step:
    """Does steps. With too little memory it goes on in smaller parts, which train the same, and says so."""

    def __init__(
        self,
        detector: Detector,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        world: World,
        device: torch.device,
        *,
        seed: int,
        clip: float,
        amp: torch.dtype | None,
        micro_batch: int | None,
        say: Callable[[str], None],
    ) -> None:
        self.detector = detector
        self.wrapped = world.wrap(detector)
        self.optimizer = optimizer
        self.scaler = scaler
        self.world = world
        self.device = device
        self.seed = seed
        self.clip = clip
        self.amp = amp
        self.micro_batch = micro_batch
        self.say = say

    def __call__(self, share: Share, step: int, rate: float, asked: Callable[[], Asked]) -> Done:
        """Step number `step` (0-based) at the learning rate `rate`; `asked` is called at its end."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.detector.train()
        names, losses = self._with_gradients(share, step)
        total = self.world.sum(torch.cat([losses.cpu().double(), torch.tensor(asked(), dtype=torch.float64)]))
        *common, interrupt, stop, save = total.tolist()
        self.scaler.unscale_(self.optimizer)
        norm = whole(nn.utils.clip_grad_norm_(self.detector.parameters(), self.clip))
        wrong = [name for name, value in zip(names, common, strict=True) if not math.isfinite(value)]
        gradient = norm.item()
        if (
            not wrong and not math.isfinite(gradient) and not self.scaler.is_enabled()
        ):  # fp16 may overflow: it is skipped
            wrong = ["the gradient"]
        if not wrong or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        here = not torch.isfinite(losses).all()
        suspects = share.batch.ids if here or wrong == ["the gradient"] else ()
        asked_of = Asked(interrupt > 0, stop > 0, save > 0)
        return Done(dict(zip(names, common, strict=True)), gradient, tuple(wrong), suspects, asked_of)

    def _with_gradients(self, share: Share, step: int) -> tuple[list[str], Tensor]:
        """Names and values of the share's losses, their gradients added up; in smaller parts if memory runs out."""
        while True:
            torch.manual_seed(step_seed(self.seed, step))  # for what does not draw from the pictures' own seeds
            size = self.micro_batch or len(share.batch)
            try:
                return self._added_up(list(share.batch.parts(size)), share)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0][:200]
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            size = min(size, len(share.batch))
            if size == 1 or self.world.size > 1:  # others may be waiting for this one's gradients
                smaller = f"--micro-batch {max(size // 2, 1)}, " if size > 1 else ""
                raise OutOfMemory(
                    f"out of memory at step {step + 1} with {size} pictures at once ({reason}). Try {smaller}"
                    "a smaller --imgsz, or --option checkpoint_blocks=true where the model has it"
                )
            self.micro_batch = -(-size // 2)
            self.say(
                f"out of memory with {size} pictures at once: going on with {self.micro_batch} at once, "
                f"still {share.of} a step"
            )

    def _added_up(self, parts: list[Batch], share: Share) -> tuple[list[str], Tensor]:
        values: list[Tensor] = []
        names: list[str] = []
        for number, part in enumerate(parts, 1):
            with self.world.waits(self.wrapped, last=number == len(parts)):
                with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
                    found: dict[str, Tensor] = self.wrapped(part.to(self.device))
                counts = len(part) if share.pictures else 0  # a stand-in for an empty share counts nothing
                weighted = torch.stack(list(found.values())) * (counts / share.of)  # losses are means over pictures
                self.scaler.scale(weighted.sum() * self.world.size).backward()
            names = list(found)
            values.append(weighted.detach())
        return names, torch.stack(values).sum(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the system had no memory left."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def step_seed(seed: int, step: int) -> int:
    """A seed of its own for every step of every run."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step}".encode(), digest_size=7).digest())
