"""The one training loop, top to bottom: data, model, steps, and once in a while a score and a checkpoint."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from boxwright import runs
from boxwright.config import Run
from boxwright.data.cache import Cache
from boxwright.data.dataset import Dataset, open_dataset
from boxwright.data.loader import Share, training_batches
from boxwright.data.transforms import Fit
from boxwright.evaluation import score
from boxwright.evaluation.thresholds import best_threshold
from boxwright.folders import held
from boxwright.inference.predictor import Predictor
from boxwright.models import checkpoint
from boxwright.models.detectors.base import Detector
from boxwright.models.join import build_detector
from boxwright.models.start import Origin, start_from
from boxwright.training import found, previews, run_folder
from boxwright.training.budget import Budget
from boxwright.training.distributed import World, join, lost, whole_state
from boxwright.training.journal import Journal, Unwritten
from boxwright.training.judged import write_judged
from boxwright.training.moving import Average, Moving
from boxwright.training.optim import autocast_type, make_optimizer
from boxwright.training.resuming import identity, require_same, require_unborn
from boxwright.training.seen import augmentations, cache_of, largest_fit, mixing_of
from boxwright.training.sinks import open_sinks
from boxwright.training.state import State, States
from boxwright.training.step import Asked, Done, Step
from boxwright.training.stopping import Stop
from boxwright.training.validation import WithLosses
from boxwright.types import Detections, Diverged, Record, Stopped, UserError

LEFT_OUT_IN_A_ROW = 3  # steps that are not finite, before the run goes back to its last state
RATE_AFTER_REWINDING = 0.1


@dataclass
class Trained:
    """What a run came to."""

    folder: Path
    steps: int = 0
    best: dict[str, float] = field(default_factory=dict)  # scores of best_model.safetensors
    best_epoch: int = 0
    best_step: int = 0
    evaluations_since: int = 0
    judged: int = 0  # steps at the last evaluation
    total: int = 0  # steps that the run is to have
    left_out: int = 0  # steps in a row that were not finite
    rewound: int = 0  # times that it went back to an earlier state

    def take(self, progress: dict[str, Any]) -> None:
        """Be what a state says."""
        for name, value in progress.items():
            setattr(self, name, value)


def train(run: Run, *, quiet: bool = False) -> Trained:
    """Train one detector as `run` says; training/run_folder.py shows what is written.

    Under torchrun all its processes train one detector together. A mistake in the run or its data is a `UserError`
    before the first step, losses that stay not finite `Diverged`. SIGTERM and SIGUSR1 end it with `Stopped`, Ctrl-C
    with `KeyboardInterrupt`, after the step and with its state saved.
    """
    sharded = run.shard and (runs.ranks() > 1 or not run.resume)  # alone one goes on whole with what several shared
    with join(sharded=sharded, step_timeout=run.step_timeout) as world, Stop() as stop, ExitStack() as stack:
        if world.size > 1:
            stack.enter_context(lost())
            run = world.from_first(runs.settled(run) if world.first else run)
        if run.resume and world.first:
            stack.enter_context(held(run.resume))
        if run.batch == "auto":
            from boxwright.training.plan import with_chosen_batch  # it measures parts of this loop

            run = with_chosen_batch(run, world, (lambda _: None) if quiet else say)
        return _train(run, world, stop, stack, quiet=quiet or not world.first)


def _train(run: Run, world: World, stop: Stop, stack: ExitStack, *, quiet: bool) -> Trained:
    device = world.device(run.device)
    amp = autocast_type(run.precision, device)
    if run.deterministic:
        make_deterministic()
    dataset = open_dataset(run.data)
    training = dataset.read("train", **run.tolerance)
    validation = dataset.read("val", **run.tolerance)
    if not any((~(record.difficult | record.crowd)).any() for record in validation.records):
        raise UserError(f"{run.data}: 0 objects to be judged on in {len(validation.records)} validation pictures")
    known = identity(run, dataset, (training, validation))
    state, faults = newest_state(Path(run.resume) / "state", world) if run.resume else (None, [])
    if state:
        require_same(state.values["identity"], known, Path(run.resume or "") / "state")
    elif run.resume:
        require_unborn(run.resume, faults)
    torch.manual_seed(run.seed)
    detector = build_detector(run.model, num_classes=len(dataset.classes), **run.model_options)
    if state:
        origin = Origin(f"from the state after {state.step} steps", state.values["weights_from"])
    else:
        with world.one_after_the_other():
            origin = start_from(
                detector,
                run.weights,
                model=run.model,
                backbone=run.backbone,
                require_license=run.require_license,
                say=(lambda _: None) if quiet else say,
            )
    fit = Fit(run.imgsz, run.square_training, run.decode_scaled)
    batch = batch_of(run)
    workers = run.workers if run.workers is not None else default_workers(device, world.size)
    chosen = augmentations(run, largest_fit(run), len(dataset.classes))
    folder = run_folder.place(run, world, stack)
    stack.enter_context(run_folder.written(folder))
    states = States(folder / "state")
    if world.first:
        copies = 1 + bool(run.ema) + {"sgd": 1, "adamw": 2}[run.optimizer]
        run_folder.check_space(folder, sum(t.nbytes for t in detector.state_dict().values()), copies)
        if not state:
            run_folder.write_run(folder, run, known, device, world.size)
            states.clear()

    detector.to(device)
    average = Average(detector, run.ema, world.shard) if run.ema else None
    world.shard(detector)
    judged_detector: Detector = average.follow(detector) if average else detector
    optimizer = make_optimizer(detector, run)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    moving = Moving(detector, average.detector if average else None, optimizer, scaler)
    steps_per_epoch = -(-len(training.records) // batch)
    result = Trained(folder, total=min(run.epochs * steps_per_epoch, run.max_steps or sys.maxsize))
    budget = Budget(run, len(validation.records), steps_per_epoch)
    if run.budget:
        result.total = run.max_steps or sys.maxsize  # until the speed is known
    if state:
        moving.restore(state)
        result.take(state.values["result"])
        if result.best and not (folder / "best_model.safetensors").exists():
            raise UserError(
                f"best_model.safetensors is gone from {folder}: put it back, or start a new run with "
                f"--weights {folder / 'last_model.safetensors'}"
            )
    header = make_header(run, dataset, fit, origin)
    predictor = Predictor(judged_detector, dataset.classes, fit, device)

    def save() -> None:
        if not (world.first or world.sharded):
            return
        progress = {k: v for k, v in asdict(result).items() if k != "folder"}
        values = {"identity": known, "result": progress, "weights_from": origin.sources, "journal": journal.place()}
        current = moving.state(result.steps, values)
        if world.first:
            states.save(current)

    def rewind(done: Done, suspects: list[str]) -> None:
        """Back to the last state, at a lower rate; the run ends if it was there before."""
        if world.first:
            states.wait()
        last, _ = newest_state(states.folder, world)
        if last is None or result.rewound:
            raise Diverged(not_finite(done, suspects, result))
        moving.restore(last)
        journal.take_back(last.values["journal"])
        result.take({**last.values["result"], "left_out": 0, "rewound": result.rewound + 1})
        journal.say(f"back to the state after {result.steps} steps, at a tenth of the learning rate")

    def batches_from(step: int) -> Iterator[Share]:
        return training_batches(
            training.records,
            fit,
            batch=batch,
            augmentations=chosen,
            scale_jitter=run.scale_jitter,
            mixing=mixing,
            seed=run.seed,
            workers=workers,
            start_step=step,
            rank=world.rank,
            ranks=world.size,
            timeout=run.data_timeout,
            multi_scale=run.multi_scale,
            group_aspect=run.group_aspect,
            cache=cache,
            pinned=device.type == "cuda",
        )

    def asked() -> Asked:
        due = world.first and time.monotonic() - saved > 60 * run.save_minutes
        return Asked(stop.signal == signal.SIGINT, bool(stop) and stop.signal != signal.SIGINT, due)

    journal = stack.enter_context(
        Journal(folder, run, result.total, steps_per_epoch, device, batch=batch, ranks=world.size, quiet=quiet)
        if world.first
        else Unwritten()
    )
    if state:
        journal.take_back(state.values["journal"])
    for fault in faults:
        journal.say(fault)
    journal.introduce(dataset, (training, validation), detector, origin.text)
    if world.first and run.log_to:
        described, resumed_at = run.model_dump(mode="json"), result.steps if run.resume else None
        sinks = open_sinks(run.log_to, folder, described, total_steps=result.total, resume_step=resumed_at)
        journal.sinks = stack.enter_context(sinks)
        for line in sinks.lines:
            journal.say(line)
    do_step = Step(
        detector, optimizer, scaler, world, device,
        seed=run.seed, clip=run.clip, amp=amp, micro_batch=run.micro_batch, say=journal.say,
    )  # fmt: skip
    mixing = mixing_of(run, result.total, steps_per_epoch)
    cache = stack.enter_context(cache_of(run, fit, (training, validation), journal.say))
    batches = batches_from(result.steps)
    request = Asked()
    saved = time.monotonic()
    stop.at_once = False
    while True:
        # ---------------------------------------------------------------------------------------- once in a while
        epoch, into_epoch = divmod(result.steps, steps_per_epoch)
        due = result.steps >= result.total or (into_epoch == 0 and epoch % run.eval_every == 0)
        if due and result.steps > result.judged:
            save()  # judging takes a while
            began = time.monotonic()
            world.same_buffers(judged_detector)
            scores, detections, request = evaluate(
                predictor, validation.records, run, batch, workers, journal, world, stop, cache
            )
            if scores:
                if world.first:
                    states.wait()
                judge(result, scores, judged_detector, header, world, epoch=epoch + (into_epoch > 0))
                if world.first:
                    found.keep(folder, result.steps, detections, best=result.best_step)
                if world.first and dataset.save_previews and not world.sharded:
                    previews.validation(folder, predictor, validation.records, threshold=scores["threshold"])
                journal.evaluation(result.steps - 1, scores, best=result.evaluations_since == 0)
                budget.evaluated(time.monotonic() - began)
                if world.from_first(budget.over(journal.seconds())):
                    result.total = journal.total = result.steps
                saved = -math.inf
        if world.size == 1:
            request = asked()
        if request.end or request.save or saved == -math.inf:
            save()
            saved = time.monotonic()
        if request.end:
            break
        if result.evaluations_since >= run.patience:
            journal.say(f"no better mAP in {run.patience} evaluations: stopped early")
            break
        if result.steps >= result.total:
            break
        # ---------------------------------------------------------------------------------------------- the step
        step, share = result.steps, next(batches)
        rate = run.learning_rate_at(step, steps_per_epoch, result.total) * RATE_AFTER_REWINDING**result.rewound
        done = do_step(share, step, rate, asked)
        request = done.asked
        result.steps = step + 1
        if done.wrong:
            suspects = [name for names in world.gathered(done.suspects) for name in names]
            result.left_out += 1
            journal.say(f"warning: {not_finite(done, suspects, result)}: nothing is learned from this step")
            if result.left_out > LEFT_OUT_IN_A_ROW or not all(world.gathered(finite(detector))):
                rewind(done, suspects)
                batches, saved = batches_from(result.steps), -math.inf
            continue
        result.left_out = 0
        if average:
            average.update(step)
        journal.step(step, done.losses, rate, done.gradient)
        if step == 0 and world.first:
            previews.first_batch(folder, share.batch, dataset.classes)
            journal.picture(1, "first_batch")
        if budget.due():
            result.total = journal.total = world.from_first(budget.total(result.steps, journal.seconds()))
            if mixing_of(run, result.total, steps_per_epoch) != mixing:
                mixing = mixing_of(run, result.total, steps_per_epoch)
                batches = batches_from(result.steps)
    if world.first:
        states.wait()
    if request.end:
        save_weights(folder / "last_model.safetensors", judged_detector, replace(header, step=result.steps), world)
        told = f"stopped after {result.steps} steps, state saved. To go on: boxwright train --resume {folder}"
        journal.say(told)
        if request.interrupt:
            raise KeyboardInterrupt
        raise Stopped(told)
    journal.conclude(result.best, result.best_epoch)
    if world.first and (report := write_judged(folder, run, validation.records, dataset.classes, result.best_step)):
        journal.say(f"all of it on one page: {report}")
    return result


def evaluate(
    predictor: Predictor,
    records: tuple[Record, ...],
    run: Run,
    batch: int,
    workers: int,
    journal: Journal,
    world: World,
    stop: Stop,
    cache: Cache | None,
) -> tuple[dict[str, float], list[Detections], Asked]:
    """The scores of a split and, for the first rank, what was found, through the predictor exactly as a user would run
    it; nothing once asked to stop.

    Each rank looks at its share of the batches that one process would make, so that the scores are the same. Where
    the model is cut into pieces all look at all of them, since every forward takes everybody, and there is no loss.
    """
    detector = cast(Detector, predictor.detector)
    detector.eval()
    watched = WithLosses(detector)
    if not world.sharded:
        predictor = Predictor(watched, predictor.classes, predictor.fit, predictor.device)
    mine: dict[int, Detections] = {}
    rank, ranks = (0, 1) if world.sharded else (world.rank, world.size)
    each = predictor.each_record(
        records,
        batch=run.eval_batch or run.micro_batch or batch,
        workers=workers,
        rank=rank,
        ranks=ranks,
        timeout=run.data_timeout,
        cache=cache,
    )
    for index, picture in each:
        mine[index] = picture
        journal.evaluating(len(mine) * ranks, len(records))
        if stop and not world.sharded:
            break
    shares = world.gathered((mine, stop.signal, watched.terms))
    signals = {number for _, number, _ in shares} - {None}
    if signals:
        return {}, [], Asked(signal.SIGINT in signals, bool(signals - {signal.SIGINT}))
    scores: dict[str, float] = {}
    detections: list[Detections] = []
    if world.first:
        everything = {index: picture for share, _, _ in shares for index, picture in share.items()}
        detections = [everything[i] for i in range(len(records))]
        scores = score(records, detections, predictor.classes).summary()
        scores["threshold"] = best_threshold(records, detections, predictor.classes)
        for _, _, terms in shares[1:]:
            watched.add(terms)
        losses = watched.means()
        scores |= {"val_loss": math.fsum(losses.values()), **{f"val_{k}": v for k, v in losses.items()}}
    return world.from_first(scores), detections, Asked()


def judge(
    result: Trained,
    scores: dict[str, float],
    detector: nn.Module,
    header: checkpoint.Header,
    world: World,
    *,
    epoch: int,
) -> None:
    """Save the weights as the last, and as the best if no earlier ones scored higher."""
    header = replace(header, epoch=epoch, step=result.steps, scores=scores)
    save_weights(result.folder / "last_model.safetensors", detector, header, world)
    result.evaluations_since += 1
    result.judged = result.steps
    if not result.best or scores["map"] > result.best["map"]:
        save_weights(result.folder / "best_model.safetensors", detector, header, world)
        result.best, result.best_epoch, result.evaluations_since = scores, epoch, 0
        result.best_step = result.steps


def save_weights(path: Path, detector: nn.Module, header: checkpoint.Header, world: World) -> None:
    """A checkpoint, written by the first rank."""
    if world.first or world.sharded:
        tensors = whole_state(detector)
        if world.first:
            checkpoint.save(path, tensors, header)


def newest_state(folder: Path, world: World) -> tuple[State | None, list[str]]:
    """The newest whole state as the first rank finds it, and what is wrong with newer ones."""
    nothing: tuple[State | None, list[str]] = (None, [])
    return world.from_first(States(folder).newest() if world.first else nothing)


def not_finite(done: Done, suspects: list[str], result: Trained) -> str:
    """What was not finite, where, and what to do about it."""
    return (
        f"{', '.join(done.wrong)} not finite at step {result.steps}, on the pictures {', '.join(suspects)}. "
        "Lower --lr, or look at these pictures and their boxes"
    )


def finite(detector: nn.Module) -> bool:
    """Whether all weights and running statistics are numbers; the latter see a picture before its loss does."""
    return all(bool(torch.isfinite(t).all()) for t in detector.state_dict().values() if t.is_floating_point())


def make_header(run: Run, dataset: Dataset, fit: Fit, origin: Origin) -> checkpoint.Header:
    return checkpoint.Header(
        model=run.model,
        options=run.model_options,
        classes=list(dataset.classes),
        fit={"imgsz": fit.imgsz, "square": fit.square} | ({"decode_scaled": True} if fit.decode_scaled else {}),
        run=run.model_dump(mode="json"),
        weights_from=origin.sources,
    )


def make_deterministic() -> None:
    """The same bits from the same run on a GPU; operations that cannot promise it raise."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def batch_of(run: Run) -> int:
    """Pictures in a step, over all processes."""
    assert isinstance(run.batch, int), "`auto` is settled before a run begins"
    return run.batch


def say(line: str) -> None:
    """What is told before there is a run folder to tell it in."""
    sys.stderr.write(line + "\n")


def default_workers(device: torch.device, ranks: int = 1) -> int:
    """Reading processes of a rank: several beside a GPU; none beside a CPU that is busy with the network itself."""
    return min(8, (os.cpu_count() or 1) // ranks) if device.type != "cpu" else 0
