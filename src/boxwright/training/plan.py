"""What a run would take, measured before it begins: its own step on drawn pictures, 1, 2, 4, ... of them at once.

Nothing is learned and nothing is written. `plan` foretells memory, speed and the end of a run; `with_chosen_batch`
settles `--batch auto` by the same measurements.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar, cast

import numpy as np
import torch

from boxwright import recipes, registry
from boxwright.config import Run
from boxwright.data.dataset import Split, open_dataset
from boxwright.data.loader import Aspects, EpochOrder, Samples, Share, collate
from boxwright.data.transforms import Fit
from boxwright.inference.predictor import choose_device
from boxwright.models.join import build_detector
from boxwright.progress import clock
from boxwright.training.budget import RESERVE
from boxwright.training.distributed import World
from boxwright.training.loop import default_workers, make_deterministic
from boxwright.training.moving import Average
from boxwright.training.optim import autocast_type, make_optimizer
from boxwright.training.seen import augmentations, largest_fit, mixing_of
from boxwright.training.step import Asked, OutOfMemory, Step, is_out_of_memory
from boxwright.training.validation import WithLosses
from boxwright.types import Batch, BoxwrightError, Sample, Size, UserError

if sys.platform != "win32":
    import resource

T = TypeVar("T")
Say = Callable[[str], None]

USABLE = {"cpu": 0.6, "cuda": 0.9}  # of the free memory: beside a CPU other programs live, on a GPU it is in pieces
SECONDS = 60.0  # for measuring steps
PATIENCE = 10.0  # seconds for steps of one size, once two are done, or one that took as long
REPEATS = 3  # timed steps of one size, after one that is not
READING = 3.0  # seconds for reading pictures
MOST = 64  # pictures a step that `--batch auto` takes, and that a GPU is measured up to
CPU_BATCH = 4  # what `--batch auto` takes on a CPU, unless more was measured faster
FASTER = 1.05  # times the images/s
UNKNOWN_MEMORY = 2  # pictures at once that are tried where nobody knows how much memory is free
FORETOLD = 16  # times the measured pictures: no line is trusted further
BOXES, CLASSES = 5, 20  # of a picture where there is no data
LIMITS = {  # files of Linux's control groups, version 2 and 1: what may be taken, what is taken
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}
ONEDNN = "could not create a"  # "primitive", "memory": what its convolutions say when they are refused memory
KNOBS = "a smaller --imgsz or --model, --optimizer sgd, --option checkpoint_blocks=true where the model has it"


# ------ Memory


class Room:
    """The memory of a device: what this process may take of it, and the most that it took since `watch`."""

    def __init__(self, device: torch.device, processes: int = 1) -> None:
        self.device = device
        self.limit: int | None = None  # bytes that `peak` may come to; None where nobody knows
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
            self.limit = int(USABLE["cuda"] * free)
        elif device.type == "cpu" and (available := available_memory()) is not None:
            self.limit = self.taken() + int(USABLE["cpu"] * available / processes)

    def watch(self) -> None:
        """Forget earlier peaks, where the system can."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif sys.platform == "linux":
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int | None:
        """Bytes; None where nobody knows."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _peak_resident() if self.device.type == "cpu" else None

    def taken(self) -> int:
        """Bytes at this moment; 0 where nobody knows."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _of_status("VmRSS") or 0

    def fits(self, memory: float | None) -> bool:
        return self.limit is None or memory is None or memory <= self.limit

    @contextmanager
    def guarded(self) -> Generator[None]:
        """Within the block memory beyond the limit is refused, before the machine swaps; on Linux's CPUs alone."""
        size = _of_status("VmSize")
        if sys.platform == "win32" or self.device.type != "cpu" or self.limit is None or size is None:
            yield
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = size + self.limit - self.taken()
        least = min([wanted, *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY)])
        resource.setrlimit(resource.RLIMIT_AS, (least, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def available_memory() -> int | None:
    """Bytes that programs may take before the machine swaps or their container is stopped; None if nobody knows."""
    with suppress(OSError, ValueError, AttributeError):
        free = _of_table(Path("/proc/meminfo"), "MemAvailable:")
        found = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if free is None else 1024 * free
        return min([found, *_left_in_groups()])
    return None


def _left_in_groups() -> Generator[int]:
    """What the control groups of this process, versions 1 and 2, leave it; caches of files would be given back."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers not in LIMITS:
                continue
            root = Path("/sys/fs/cgroup", controllers)
            for folder in (root / group.lstrip("/"), root):  # inside a container its own group is the root
                with suppress(OSError, ValueError):  # "max": no limit
                    most, used = (int((folder / name).read_text()) for name in LIMITS[controllers])
                    yield max(most - used + (_of_table(folder / "memory.stat", "inactive_file") or 0), 0)


def _of_table(path: Path, name: str) -> int | None:
    """The number beside `name` in one of Linux's tables; None without that table or line."""
    with suppress(OSError):
        rows = (line.split() for line in path.read_text().splitlines())
        return next((int(row[1]) for row in rows if row[0] == name), None)
    return None


def _of_status(name: str) -> int | None:
    kibibytes = _of_table(Path("/proc/self/status"), f"{name}:")
    return None if kibibytes is None else 1024 * kibibytes


def _peak_resident() -> int | None:
    if (bytes_ := _of_status("VmHWM")) is not None or sys.platform == "win32":
        return bytes_
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Line:
    """Memory by the number of pictures at once."""

    fixed: float  # bytes
    each: float  # bytes a picture, not negative

    def at(self, pictures: int) -> float:
        return self.fixed + self.each * pictures

    def most(self, limit: float, cap: int) -> int:
        """Pictures that fit into `limit`, at most `cap`."""
        if self.at(cap) <= limit:
            return cap
        return max(math.floor((limit - self.fixed) / self.each), 0) if self.each else 0


def line_of(points: Sequence[tuple[int, float]], base: float) -> Line:
    """The straight line nearest to the points (pictures, bytes) that none of them lies above; it never falls.

    Through one point it comes from `base` bytes, what was taken before there were pictures.
    """
    pictures, memory = np.array(points, np.float64).T
    if len(points) == 1:
        return Line(min(base, memory[0]), float(max(memory[0] - base, 0) / pictures[0]))
    each = max(float(np.polyfit(pictures, memory, 1)[0]), 0.0)
    return Line(float(np.max(memory - each * pictures)), each)


# ------ Measuring


@dataclass(frozen=True)
class Scene:
    """What the pictures of a run are like."""

    canvas: Size  # the largest of a batch
    boxes: int  # in a picture
    classes: int
    area: float  # pixels of a batch's canvas on average
    judged_area: float  # the same of validation pictures


@dataclass(frozen=True)
class Probe:
    """A step with so many pictures at once."""

    pictures: int
    seconds: float
    memory: int | None  # bytes at its peak

    @property
    def speed(self) -> float:
        return self.pictures / self.seconds  # images/s


End = Literal["memory", "time", "size"]  # why no more pictures at once were tried


@dataclass(frozen=True)
class Measured:
    """Steps of growing size, as far as they fitted."""

    probes: tuple[Probe, ...]
    ended: End
    limit: int | None  # bytes
    line: Line | None
    judging: float  # seconds a picture; 0 where nothing fitted
    weights: int  # bytes; 0 where not even they fitted

    @property
    def largest(self) -> int | None:
        """Pictures at once that fit, 0 for none; None where nobody knows."""
        if not self.probes:
            return 0
        if self.limit is None or self.line is None:
            return None
        measured = self.probes[-1].pictures
        if self.ended == "memory" and self.line.at(2 * measured) <= self.limit:
            return measured  # the line is wrong: what it says would fit was refused
        cap = 2 * measured - 1 if self.ended == "memory" else FORETOLD * measured
        return max(self.line.most(self.limit, cap), measured)

    def seconds_of(self, pictures: int, micro_batch: int) -> float:
        """Of a step of so many, `micro_batch` at once: as measured, else in proportion to the nearest smaller size."""
        if pictures > micro_batch:
            whole, rest = divmod(pictures, micro_batch)
            return whole * self.seconds_of(micro_batch, micro_batch) + (self.seconds_of(rest, rest) if rest else 0)
        nearest = [probe for probe in self.probes if probe.pictures <= pictures][-1]
        return nearest.seconds * pictures / nearest.pictures


class Rehearsal:
    """A run's own step and judging on drawn pictures, from random weights, at a learning rate of 0."""

    def __init__(self, run: Run, device: torch.device, scene: Scene, room: Room) -> None:
        torch.manual_seed(run.seed)
        self.detector = build_detector(run.model, num_classes=scene.classes, **run.model_options).to(device)
        self.average = Average(self.detector, run.ema) if run.ema else None
        self.scene, self.device, self.room = scene, device, room
        amp = autocast_type(run.precision, device)
        scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        self._step = Step(
            self.detector, make_optimizer(self.detector, run), scaler, World(), device,
            seed=run.seed, clip=run.clip, amp=amp, micro_batch=None, say=_does_not_fit,
        )  # fmt: skip

    def probe(self, pictures: int) -> Probe:
        """Steps of so many pictures at once."""
        share = Share(self._drawn(pictures), pictures, pictures)
        self._step.micro_batch = pictures
        times: list[float] = []
        self.room.watch()
        # The first step of all is slow, as kernels are chosen and modules imported; that of each size, a little.
        while len(times) < 1 + (pictures == 1) or (len(times) <= REPEATS and sum(times) < PATIENCE):
            times.append(self._timed(lambda: self._do(share)))
        return Probe(pictures, statistics.median(times[1:] or times), self.room.peak())

    def judging(self, pictures: int) -> float:
        """Seconds for a picture's boxes and losses, so many at once."""
        batch = self._drawn(pictures)
        self.detector.eval()
        watched = WithLosses(self.detector)
        with torch.inference_mode():
            first, second = (self._timed(lambda: watched.predict(batch.to(self.device))) for _ in range(2))
        return min(first, second) / pictures

    def _do(self, share: Share) -> None:
        self._step(share, 0, 0.0, Asked)
        if self.average:
            self.average.update(0)

    def _timed(self, work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    def _drawn(self, pictures: int) -> Batch:
        """Noise with boxes of a tenth to four tenths of the canvas's sides."""
        rng = np.random.default_rng(pictures)
        height, width = self.scene.canvas
        boxes = self.scene.boxes

        def sample(number: int) -> Sample:
            corners = rng.uniform(0, 0.6, (boxes, 2))  # fractions
            edges = np.hstack([corners, corners + rng.uniform(0.1, 0.4, (boxes, 2))])  # (N, 4)
            return Sample(
                str(number),
                rng.integers(0, 256, (height, width, 3), np.uint8),
                (height, width),
                (edges * [width, height, width, height]).astype(np.float32),
                rng.integers(0, self.scene.classes, boxes),
                np.zeros(boxes, bool),
                number,
            )

        return collate([sample(number) for number in range(pictures)])


def _does_not_fit(line: str) -> None:
    raise OutOfMemory(line)  # instead of the smaller parts that a step would go on in


def fitting(work: Callable[[], T]) -> T | None:
    """What `work` gives, None where memory runs out."""
    try:
        return work()
    except (RuntimeError, MemoryError, BoxwrightError) as error:
        if not is_out_of_memory(error) and ONEDNN not in str(error):
            raise
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


def measure(
    run: Run,
    device: torch.device,
    scene: Scene,
    *,
    most: int,
    processes: int = 1,
    enough: Callable[[Sequence[Probe]], bool] = lambda _: False,
    say: Say = lambda _: None,
) -> Measured:
    """Steps of 1, 2, 4, ... pictures until memory, time, `most` or what `enough` says ends it, and a judging."""
    if run.deterministic:
        make_deterministic()
    room = Room(device, processes if device.type == "cpu" else 1)
    most = most if room.limit is not None else min(most, UNKNOWN_MEMORY)
    probes: list[Probe] = []
    line, judging, weights = None, 0.0, 0
    ended: End | None = None
    with room.guarded():
        rehearsal = fitting(partial(Rehearsal, run, device, scene, room))
        base = room.taken()
        began, pictures = time.monotonic(), 1
        while ended is None:
            probe = fitting(partial(rehearsal.probe, pictures)) if rehearsal else None
            if probe is None or not room.fits(probe.memory):
                ended = "memory"
                break
            probes.append(probe)
            points = [(p.pictures, float(p.memory)) for p in probes if p.memory is not None]
            line = line_of(points, base) if points else None
            at_peak = "" if probe.memory is None else f", {gigabytes(probe.memory)}"
            say(f"{probe.pictures} at once: {probe.seconds:.3g} s a step{at_peak}")
            pictures *= 2
            more = pictures * probe.seconds / probe.pictures  # seconds of the next size's step
            if pictures > most or enough(probes):
                ended = "size"
            elif device.type != "cuda" and line and not room.fits(line.at(pictures)):  # a GPU refuses, nobody swaps
                ended = "memory"
            elif time.monotonic() - began + (more if more > PATIENCE else 2 * more) > SECONDS:
                ended = "time"
        if rehearsal:
            weights = sum(t.nbytes for t in rehearsal.detector.state_dict().values())
        if rehearsal and probes:
            last = probes[-1].pictures
            at_once = min(last, run.eval_batch or run.micro_batch or (last if run.batch == "auto" else run.batch))
            judging = fitting(partial(rehearsal.judging, at_once)) or probes[-1].seconds / last
    return Measured(tuple(probes), ended, room.limit, line, judging, weights)


# ------ The run's own pictures


@dataclass(frozen=True)
class Pictures:
    """What is known of a run's data."""

    training: Split
    validation: Split
    classes: int


def pictures_of(run: Run) -> Pictures | None:
    """The pictures of a run; None where it names no data."""
    if not run.data:
        return None
    dataset = open_dataset(run.data)
    training = dataset.read("train", **run.tolerance)
    return Pictures(training, dataset.read("val", **run.tolerance), len(dataset.classes))


def scene_of(run: Run, pictures: Pictures | None, batch: int) -> Scene:
    """What the network sees of the pictures, in batches of `batch`; looked at in 50 of them."""
    fit, largest = Fit(run.imgsz, run.square_training), largest_fit(run)
    if pictures is None:
        canvas = largest.largest_canvas
        return Scene(canvas, BOXES, CLASSES, math.prod(canvas), math.prod(fit.largest_canvas))
    records = pictures.training.records
    samples = samples_of(run, pictures)
    at_largest = replace(samples, fit=largest)
    order = EpochOrder(len(records), batch, run.seed, Aspects.of(records) if run.group_aspect else None)
    steps = range(min(50, order.steps_per_epoch))
    batches = [[samples.of_step(step).canvas(place) for place in order[step]] for step in steps]
    canvases = np.array([np.max(canvases, axis=0) for canvases in batches])  # (50, 2)
    height, width = (max(at_largest.canvas(place)[side] for step in steps for place in order[step]) for side in (0, 1))
    judged = np.array([fit.place(record.size).canvas for record in pictures.validation.records])
    boxes = round(statistics.fmean(len(record.boxes) for record in records))
    areas = (float(sizes.prod(axis=1).mean()) for sizes in (canvases, judged))
    return Scene((height, width), max(boxes, 1), pictures.classes, *areas)


def samples_of(run: Run, pictures: Pictures) -> Samples:
    """The training samples of the first epoch."""
    fit = Fit(run.imgsz, run.square_training, run.decode_scaled)
    chosen = augmentations(run, largest_fit(run), pictures.classes)
    return Samples(
        pictures.training.records, fit, chosen, run.seed,
        scale_jitter=run.scale_jitter, mixing=mixing_of(run, run.epochs, 1), multi_scale=run.multi_scale,
    )  # fmt: skip


def seconds_to_read(samples: Samples) -> float:
    """A training picture from its file to its sample, in this process; the mean of some that lie apart."""
    indices = np.linspace(0, len(samples) - 1, min(len(samples), 17)).astype(int)
    samples[0, int(indices[0])]  # loads what reading needs
    began, done = time.perf_counter(), 0
    for index in indices:
        samples[0, int(index)]
        done += 1
        if time.perf_counter() - began > READING:
            break
    return (time.perf_counter() - began) / done


# ------ `--batch auto`


def with_chosen_batch(run: Run, world: World, say: Say) -> Run:
    """The run with as many pictures a step as fit at once, which the first process finds out for all of them."""
    device = world.device(run.device)
    if world.first:
        batch, _, measured = chosen_batch(run, device, pictures_of(run), world.size, say)
        if not batch:
            raise UserError(f"--batch auto: not even one picture fits into {_limit(measured)}. Try {KNOBS}")
        run = with_batch(run, batch)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what was measured is gone, and its memory is in pieces
    return world.from_first(run)


def chosen_batch(
    run: Run, device: torch.device, pictures: Pictures | None, ranks: int, say: Say
) -> tuple[int, Scene, Measured]:
    """Pictures a step, 0 where not one fits, and what they were chosen by."""
    if run.shard:
        raise UserError("--batch auto measures one process, not what --shard makes fit: give --batch a number")
    most = power_below(max(min(MOST, len(pictures.training.records) if pictures else MOST) // ranks, 1))
    scene = scene_of(run, pictures, most * ranks)
    on_cpu = device.type == "cpu"
    measured = measure(
        run, device, scene, most=most, processes=ranks, enough=lambda found: on_cpu and not worthwhile(found), say=say
    )
    if not measured.probes:
        return 0, scene, measured
    each, reason = choose(measured, most, on_cpu=on_cpu)
    batch = each * ranks
    say(f"--batch auto: {batch} pictures a step{f', {each} on each of {ranks}' if ranks > 1 else ''}: {reason}")
    return batch, replace(scene, area=min(scene_of(run, pictures, batch).area, math.prod(scene.canvas))), measured


def choose(measured: Measured, most: int, *, on_cpu: bool) -> tuple[int, str]:
    """The power of two of pictures at once that a run is to take, at most `most`, and why no more."""
    if measured.limit is None or measured.line is None:
        return min(CPU_BATCH, most), "how much memory is free is not known here"
    probes = measured.probes
    last = probes[-1].pictures
    while measured.ended == "time" and 2 * last <= min(CPU_BATCH, most, measured.largest or 0):
        last *= 2
    if on_cpu and not worthwhile(probes):
        return probes[-2].pictures, f"{last} at once are no faster"
    at_peak = f"they take {gigabytes(measured.line.at(last))} of {_limit(measured)}"
    if last == most:
        return last, f"the most that it takes; {at_peak}"
    return last, f"{at_peak}, {2 * last} " + ("do not fit" if measured.ended == "memory" else "would take long to try")


def worthwhile(probes: Sequence[Probe]) -> bool:
    """Whether the last size was worth it on a CPU: up to a few always, beyond only if it was faster."""
    return probes[-1].pictures <= CPU_BATCH or probes[-1].speed > FASTER * probes[-2].speed


def with_batch(run: Run, batch: int) -> Run:
    """The run with that batch; a learning rate that is its recipe's own becomes the recipe's for that batch."""

    def rate(batch: int | str) -> float | None:
        given = {"model": run.model, "backbone": run.backbone, "optimizer": run.optimizer, "batch": batch}
        return recipes.resolved(run.recipe or "", given).get("lr")

    follows = run.recipe is not None and run.lr == rate("auto")
    return run.model_copy(update={"batch": batch, **({"lr": rate(batch)} if follows else {})})


def power_below(number: int) -> int:
    """The largest power of two that is not above `number`, which is positive."""
    return 1 << (number.bit_length() - 1)


def micro_batch_of(pictures: int, largest: int) -> int:
    """The most pictures at once, at most `largest`, that a step of `pictures` is a multiple of."""
    return max(size for size in range(1, min(pictures, largest) + 1) if pictures % size == 0)


# ------ The plan


Checkpointing = Literal["no such option", "on", "not needed", "needed", "not enough"]


@dataclass(frozen=True)
class Speed:
    """Of a run's steps and of its judging; all ranks together."""

    step: float  # seconds, with the reading that it waits for
    images: float  # a second
    judging: float  # seconds a picture, with its reading
    reading: float | None  # seconds a picture, by one process; None without data
    workers: int


@dataclass(frozen=True)
class Course:
    """A run from its first step to its end, if it does not stop early."""

    steps_per_epoch: int
    steps: int
    epochs: float
    epoch: float  # seconds
    evaluation: float  # seconds
    evaluations: int
    seconds: float  # of it all
    finish: str  # if it began now
    time_budget: str | None  # that the steps were counted by


@dataclass(frozen=True)
class Plan:
    """What a run would take; None where it is not known, or where nothing fits. Memory and disk in bytes."""

    model: str
    device: str
    ranks: int
    scene: Scene
    batch: int  # pictures a step, over all ranks
    micro_batch: int | None  # of them at once on a rank
    accumulation: int | None  # parts of a rank's share of a step
    largest_micro_batch: int | None  # that fits; 0: not even one picture
    memory: float | None  # at the micro-batch
    checkpoint_blocks: Checkpointing
    measured: Measured
    speed: Speed | None
    course: Course | None
    disk: int | None
    disk_free: int
    advice: tuple[str, ...]
    assumed: tuple[str, ...]

    def described(self) -> dict[str, str]:
        """Names and values for a person."""
        return {name: text for name, text in _rows(self) if text}


def plan(run: Run, *, ranks: int = 1, say: Say = lambda _: None) -> Plan:
    """Measure what `run` would take on this machine, without learning or writing anything; a run may have no data.

    A mistake in the run or its data is a `UserError` before the first measurement.
    """
    device = choose_device(run.device)
    autocast_type(run.precision, device)
    pictures = pictures_of(run)
    if run.batch == "auto":
        batch, scene, measured = chosen_batch(run, device, pictures, ranks, say)
        batch = batch or ranks
        run = with_batch(run, batch)
    else:
        batch = run.batch
        scene = scene_of(run, pictures, batch)
        power_above = 1 << (-(-batch // ranks) - 1).bit_length()
        most = max(power_above, MOST if device.type == "cuda" else CPU_BATCH)
        measured = measure(run, device, scene, most=most, processes=ranks, say=say)
    share, largest = -(-batch // ranks), measured.largest
    micro_batch = min(run.micro_batch or share, share)
    if largest is not None and micro_batch > largest:
        micro_batch = micro_batch_of(share, largest) if largest else None
    speed = _speed(run, device, pictures, scene, measured, micro_batch, ranks) if micro_batch else None
    checkpoint_blocks = _checkpointing(run, device, scene, measured, ranks, say)
    counts = (len(pictures.training.records), len(pictures.validation.records)) if pictures else None
    return Plan(
        model=run.model,
        device=str(device),
        ranks=ranks,
        scene=scene,
        batch=batch,
        micro_batch=micro_batch,
        accumulation=-(-share // micro_batch) if micro_batch else None,
        largest_micro_batch=largest,
        memory=measured.line.at(micro_batch) if measured.line and micro_batch else None,
        checkpoint_blocks=checkpoint_blocks,
        measured=measured,
        speed=speed,
        course=course_of(run, speed, *counts) if speed and counts else None,
        disk=disk_needed(run, measured.weights) or None,
        disk_free=shutil.disk_usage(_existing(run.project_dir)).free,
        advice=_advice(run, share, micro_batch, checkpoint_blocks),
        assumed=tuple(_assumed(run, device, pictures, ranks)),
    )


def _speed(
    run: Run,
    device: torch.device,
    pictures: Pictures | None,
    scene: Scene,
    measured: Measured,
    micro_batch: int,
    ranks: int,
) -> Speed:
    batch = cast(int, run.batch)
    whole = math.prod(scene.canvas)
    share = -(-batch // ranks)
    step = measured.seconds_of(share, micro_batch) * scene.area / whole
    judging = measured.judging * scene.judged_area / whole
    workers = run.workers if run.workers is not None else default_workers(device, ranks)
    reading = seconds_to_read(samples_of(run, pictures)) if pictures else None
    if workers:  # they read while the network works
        step, judging = max(step, share * (reading or 0) / workers), max(judging, (reading or 0) / workers)
    else:
        step, judging = step + share * (reading or 0), judging + (reading or 0)
    return Speed(step, batch / step, judging / ranks, reading, workers)


def course_of(run: Run, speed: Speed, training: int, validation: int) -> Course:
    """A run on so many pictures at that speed; with `--time-budget` as long as that allows."""
    steps_per_epoch = -(-training // cast(int, run.batch))
    epoch = training / speed.images
    evaluation = validation * speed.judging
    limit = run.max_steps or sys.maxsize
    if run.budget:
        of_a_step = (epoch + evaluation / run.eval_every) / steps_per_epoch
        steps = min(max(int((run.budget * RESERVE - evaluation) / of_a_step), 1), limit)  # as Budget.total
    else:
        steps = min(run.epochs * steps_per_epoch, limit)
    evaluations = -(-steps // (steps_per_epoch * run.eval_every))
    seconds = steps * epoch / steps_per_epoch + evaluations * evaluation
    finish = datetime.now().astimezone() + timedelta(seconds=min(seconds, 1e9))
    return Course(
        steps_per_epoch, steps, steps / steps_per_epoch, epoch, evaluation, evaluations, seconds,
        finish.isoformat(timespec="seconds"), run.time_budget,
    )  # fmt: skip


def disk_needed(run: Run, weights: int) -> int:
    """What `run_folder.check_space` asks for, of a model with so many bytes of weights."""
    copies = 1 + bool(run.ema) + {"sgd": 1, "adamw": 2}[run.optimizer]
    return (3 + 3 * copies) * weights + 50_000_000 if weights else 0


def _checkpointing(
    run: Run, device: torch.device, scene: Scene, measured: Measured, ranks: int, say: Say
) -> Checkpointing:
    """Whether the model's blocks must be run again for their gradients; tried where not one picture fits."""
    if "checkpoint_blocks" not in registry.find(run.model).options:
        return "no such option"
    if run.model_options.get("checkpoint_blocks"):
        return "on"
    if measured.largest != 0:
        return "not needed"
    say("with checkpoint_blocks:")
    other = run.model_copy(update={"option": (*run.option, "checkpoint_blocks=true")})
    return "needed" if measure(other, device, scene, most=1, processes=ranks, say=say).largest else "not enough"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


# ------ In words


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _limit(measured: Measured) -> str:
    """The memory that may be taken."""
    return "the memory" if measured.limit is None else gigabytes(measured.limit)


def _advice(run: Run, share: int, micro_batch: int | None, checkpoint_blocks: Checkpointing) -> tuple[str, ...]:
    if not micro_batch:
        knobs = "--option checkpoint_blocks=true: then one fits" if checkpoint_blocks == "needed" else KNOBS
        return (f"not even one picture fits. Try {knobs}",)
    if micro_batch == min(run.micro_batch or share, share):
        return ()
    evaluation = "" if run.eval_batch else f" --eval-batch {micro_batch}"
    return (f"{min(run.micro_batch or share, share)} at once do not fit: add --micro-batch {micro_batch}{evaluation}",)


def _assumed(run: Run, device: torch.device, pictures: Pictures | None, ranks: int) -> Generator[str]:
    if pictures is None:
        yield f"no --data: {BOXES} objects a picture, {CLASSES} classes, square pictures that take no time to read"
    yield "random weights and noise: judging takes less once fewer boxes are sure"
    yield "saving, drawing, the arithmetic of the scores and the start take no time; no early stop"
    if run.workers or device.type != "cpu":
        yield "reading processes share no cores with the network; their memory is not counted"
    if ranks > 1:
        yield f"{ranks} ranks are {ranks} times as fast as one" + (", on one machine" if device.type == "cpu" else "")
    if run.shard:
        yield "no --shard: each rank holds the whole model"
    if device.type not in USABLE:
        yield f"the memory of {device.type} cannot be measured"


def _rows(plan: Plan) -> Generator[tuple[str, str]]:
    scene, measured, speed, course = plan.scene, plan.measured, plan.speed, plan.course
    height, width = scene.canvas
    yield "model", f"{plan.model} on {f'{plan.ranks} x ' if plan.ranks > 1 else ''}{plan.device}"
    yield "pictures", f"{height} x {width}, {scene.boxes} objects each, {scene.classes} classes"
    if line := measured.line:
        of = "how much is free is not known" if measured.limit is None else f"{gigabytes(measured.limit)} may be taken"
        yield "memory", f"{gigabytes(line.fixed)} + {gigabytes(line.each)} a picture; {of}"
    if plan.largest_micro_batch is not None:
        capped = measured.probes and plan.largest_micro_batch == FORETOLD * measured.probes[-1].pictures
        yield "largest micro-batch", f"{plan.largest_micro_batch}{' or more' if capped else ''}"
    if plan.micro_batch:
        at = f", {gigabytes(plan.memory)}" if plan.memory else ""
        yield "this run", f"{plan.batch} a step = {plan.ranks} x {plan.micro_batch} at once x {plan.accumulation}{at}"
    yield "checkpoint_blocks", plan.checkpoint_blocks
    if speed:
        by = f"{speed.workers or 'no'} workers"
        reading = "" if speed.reading is None else f", of it reading {speed.reading:.3g} s a picture, {by}"
        yield "speed", f"{speed.images:.3g} images/s: {speed.step:.3g} s a step{reading}"
        yield "judging", f"{speed.judging:.3g} s a picture"
    if course:
        yield "epoch", f"{course.steps_per_epoch:,} steps, {clock(course.epoch)}; evaluation {clock(course.evaluation)}"
        within = f"--time-budget {course.time_budget}: " if course.time_budget else ""
        yield "run", f"{within}{course.epochs:.3g} epochs, {course.steps:,} steps, {course.evaluations} evaluations"
        yield "finished", f"after {clock(course.seconds)}: {course.finish} if it began now"
    needed = f"{gigabytes(plan.disk)} of " if plan.disk else ""
    yield "disk", f"{needed}{gigabytes(plan.disk_free)} free"
    sizes = ", ".join(str(probe.pictures) for probe in measured.probes)
    why = {"memory": "more do not fit", "time": "more would take long to try", "size": "more is not needed"}
    others = (", judging" if speed else "") + (", reading" if speed and speed.reading else "")
    yield "measured", f"steps of {sizes or 'no'} pictures ({why[measured.ended]}){others}"
    yield "assumed", "; ".join(plan.assumed)
    yield "advice", "; ".join(plan.advice)
