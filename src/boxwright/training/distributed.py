"""Several processes as one training, through PyTorch's own engine: torchrun, DDP, and FSDP2 for what is too large.

A process alone is a world of one; nothing here then costs anything. Every rank knows the whole order of the data and
takes its share of each step; the first rank writes.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from boxwright import runs
from boxwright.inference.predictor import choose_device
from boxwright.models.detectors.base import Detector
from boxwright.types import BoxwrightError, UserError

T = TypeVar("T")

MEETING = timedelta(minutes=30)  # for what only some ranks wait for: start-up skew, downloads, scoring
SHARDED = 1_000_000  # parameters of a module from which on it is gathered by itself


class RankLost(BoxwrightError):
    """Another process of the job is gone, or too late; torchrun starts all of them again."""

    exit_code = 75


@dataclass(frozen=True)
class World:
    """The processes of one training."""

    rank: int = 0
    size: int = 1
    sharded: bool = False
    steps: Any = None  # the group whose members may not be late

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device of this process: the GPU of its own number on its machine."""
        device = choose_device(name)
        if self.size == 1 or device.type != "cuda":
            return device
        if name != "auto" and device.index is not None:  # pyright: ignore[reportUnnecessaryComparison]
            raise UserError(f"--device {name}: under torchrun each process takes a GPU of its own; say --device cuda")
        number = int(os.environ.get("LOCAL_RANK", "0"))
        if number >= torch.cuda.device_count():
            raise UserError(f"torchrun started more processes than there are GPUs ({torch.cuda.device_count()})")
        torch.cuda.set_device(number)
        return torch.device("cuda", number)

    # ------ Agreeing

    def sum(self, values: Tensor) -> Tensor:
        """The sum of everybody's `values`, on the CPU; in float64, so that no order of adding shows."""
        values = values.detach().to("cpu", torch.float64)
        if self.size > 1:
            dist.all_reduce(values, group=self.steps)
        return values

    def from_first(self, value: T) -> T:
        """The first rank's value, everywhere."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gathered(self, value: T) -> list[T]:
        """Everybody's values in the order of the ranks, everywhere."""
        if self.size == 1:
            return [value]
        found = cast(list[T], [None] * self.size)
        dist.all_gather_object(found, value)
        return found

    def one_after_the_other(self) -> AbstractContextManager[None]:
        """The first rank does what is inside before the others: downloads, which they find done."""
        return self._first_before_others() if self.size > 1 else nullcontext()

    @contextmanager
    def _first_before_others(self) -> Generator[None]:
        if not self.first:
            self.from_first(None)
        yield
        if self.first:
            self.from_first(None)

    # ------ Models

    def wrap(self, detector: Detector) -> nn.Module:
        """The detector as something to call with a batch for its losses, gradients made common on the way back.

        Gradients are means over the ranks: a loss is to be multiplied by `size` for their sum.
        """
        if self.size == 1:
            return detector
        if self.sharded:
            return detector  # `shard` has been called
        # Which parameters a step reaches depends on its pictures and differs between ranks.
        return DistributedDataParallel(detector, process_group=self.steps, find_unused_parameters=True)

    def shard(self, detector: Detector) -> None:
        """Cut the parameters of a detector into one piece a rank, in place; FSDP2 gathers them layer by layer."""
        if not self.sharded:
            return
        for module in reversed([*detector.backbone.modules()]):
            own = sum(p.numel() for p in module.parameters() if not isinstance(p, DTensor))
            if own >= SHARDED and not isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
                fully_shard(module)
        fully_shard(detector)
        register_fsdp_forward_method(detector, "predict")

    def waits(self, module: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Around the forward and backward of a part of a step: gradients become common with the last one."""
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last)
            return nullcontext()
        return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()

    def same_buffers(self, module: nn.Module) -> None:
        """Everybody takes the first rank's buffers: the running statistics of a BatchNorm saw other pictures each."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is not cut into pieces; of one that is, all ranks must ask at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(module: nn.Module) -> Mapping[str, Tensor]:
    """`state_dict()` with nothing cut into pieces."""
    return {name: whole(tensor) for name, tensor in module.state_dict().items()}


@torch.no_grad()
def put(target: Tensor, values: Tensor) -> None:
    """Copy whole `values` into a tensor that may be cut into pieces."""
    target.copy_(like(target, values))


def like(target: Tensor, values: Tensor) -> Tensor:
    """Whole `values` cut as `target` is, if it is and they are of its shape."""
    if not isinstance(target, DTensor) or target.shape != values.shape:
        return values
    return distribute_tensor(values.to(target.device), target.device_mesh, target.placements)


@contextmanager
def join(*, sharded: bool = False, step_timeout: float = 600) -> Generator[World]:
    """The world that torchrun has started this process in; alone without it."""
    size = runs.ranks()
    if size == 1:
        if sharded:
            raise UserError("--shard shares a model among several processes: start them with torchrun")
        yield World()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with lost("the processes did not find each other"):
        store, rank, size = next(rendezvous("env://", timeout=MEETING))
        store = PrefixStore(incarnation(store, rank, size), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=MEETING)
        steps = dist.new_group(timeout=timedelta(seconds=step_timeout))
        dist.barrier()
    yield World(dist.get_rank(), size, sharded, steps)
    dist.destroy_process_group()  # after an error the others may be gone, and there is nobody to say good-bye to


def incarnation(store: Store, rank: int, size: int) -> str:
    """A name that the processes alive now agree on, under which nobody before them has left anything.

    torchrun keeps its store when it starts processes again, with the addresses of the dead in it (pytorch#135712); and
    its count of restarts is each machine's own. So the first rank draws a name, and tells it to every other under a key
    that this one has drawn.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"boxwright/{rank}", own)
        key = f"boxwright/told/{own}"
        store.wait([key], MEETING)
        name = store.get(key).decode()
        store.set(f"boxwright/{name}/{rank}", "heard")
        return name
    deadline = time.monotonic() + MEETING.total_seconds()
    told: set[bytes] = set()
    silent = set(range(1, size))
    while silent:
        for other in [r for r in silent if store.check([f"boxwright/{r}"])]:
            theirs = store.get(f"boxwright/{other}")
            if theirs not in told:  # of one that is dead, perhaps: then nobody hears it
                told.add(theirs)
                store.set(f"boxwright/told/{theirs.decode()}", own)
            if store.check([f"boxwright/{own}/{other}"]):
                silent.remove(other)
        if time.monotonic() > deadline:
            raise RuntimeError(f"timed out waiting for {len(silent)} of {size} processes")
        time.sleep(0.01)
    return own


@contextmanager
def lost(what: str = "another process of this job is gone or did not answer in time") -> Generator[None]:
    """What c10d raises, as a `RankLost`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not is_of_c10d(error):
            raise
        raise RankLost(f"{what} ({' '.join(str(error).split())[:160]})") from error


def is_of_c10d(error: BaseException) -> bool:
    """Whether an error is about the others, not about this process."""
    words = ("gloo", "Gloo", "NCCL", "nccl", "Connection closed", "Connection reset", "imed out", "c10d", "TCPStore")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
