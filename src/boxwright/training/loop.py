"""The one training loop, top to bottom: data, model, steps, and once in a while a score and a checkpoint."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from boxwright.config import MAY_CHANGE, Run
from boxwright.data.dataset import Dataset, open_dataset
from boxwright.data.loader import training_batches
from boxwright.data.transforms import Augmentation, Fit, random_flip
from boxwright.evaluation import score
from boxwright.folders import held
from boxwright.inference.predictor import Predictor, choose_device
from boxwright.models import checkpoint
from boxwright.models.detectors.base import Detector
from boxwright.models.join import build_detector
from boxwright.models.start import Origin, start_from
from boxwright.training import previews, run_folder
from boxwright.training.journal import Journal
from boxwright.training.moving import Average, Moving
from boxwright.training.optim import autocast_type, make_optimizer
from boxwright.training.state import States
from boxwright.training.stopping import Stop
from boxwright.types import Batch, Diverged, Record, Stopped, UserError

FOLDERS = ("name", "project_dir", "exist_ok", "plugin", "data", "weights")  # where things are, not what they are


@dataclass
class Trained:
    """What a run came to."""

    folder: Path
    steps: int = 0
    best: dict[str, float] = field(default_factory=dict)  # scores of best_model.safetensors
    best_epoch: int = 0
    evaluations_since: int = 0
    judged: int = 0  # steps at the last evaluation


def train(run: Run, *, quiet: bool = False) -> Trained:
    """Train one detector as `run` says; training/run_folder.py shows what is written.

    A mistake in the run or its data is a `UserError` before the first step, a loss that is not finite `Diverged`.
    SIGTERM and SIGUSR1 end it with `Stopped`, Ctrl-C with `KeyboardInterrupt`, after the step and with its state saved.
    """
    with ExitStack() as stack:
        if run.resume:
            stack.enter_context(held(run.resume))
        return _train(run, stack, quiet=quiet)


def _train(run: Run, stack: ExitStack, *, quiet: bool) -> Trained:
    device = choose_device(run.device)
    amp = autocast_type(run.precision, device)
    dataset = open_dataset(run.data)
    training = dataset.read("train", ignore_unknown=run.ignore_unknown)
    validation = dataset.read("val", ignore_unknown=run.ignore_unknown)
    if not any((~record.difficult).any() for record in validation.records):
        raise UserError(f"{run.data}: 0 objects to be judged on in {len(validation.records)} validation pictures")
    identity = {
        "data": {split.name: dataset.fingerprint(split) for split in (training, validation)},
        "classes": list(dataset.classes),
        "run": {k: v for k, v in run.model_dump(mode="json").items() if k not in MAY_CHANGE + FOLDERS},
    }
    states = States(Path(run.resume or "") / "state")
    state, faults = states.newest() if run.resume else (None, [])
    if state:
        require_same(state.values["identity"], identity, states.folder)
    elif run.resume:
        require_unborn(run.resume, faults)
    torch.manual_seed(run.seed)
    detector = build_detector(run.model, num_classes=len(dataset.classes), **run.model_options)
    if state:
        origin = Origin(f"from the state after {state.step} steps", state.values["weights_from"])
    else:
        origin = start_from(
            detector,
            run.weights,
            model=run.model,
            backbone=run.backbone,
            require_license=run.require_license,
            say=(lambda _: None) if quiet else say,
        )
    fit = Fit(run.imgsz, run.square_training)
    folder = Path(run.resume) if run.resume else run_folder.make_folder(run)
    if not run.resume:
        stack.enter_context(held(folder))
    states = States(folder / "state")
    copies = 1 + bool(run.ema) + {"sgd": 1, "adamw": 2}[run.optimizer]
    run_folder.check_space(folder, sum(t.nbytes for t in detector.state_dict().values()), copies)
    if not state:
        run_folder.write_run(folder, run, identity, device)
        states.clear()

    detector.to(device)
    average = Average(detector, run.ema) if run.ema else None
    judged_detector: Detector = average.detector if average else detector
    predictor = Predictor(judged_detector, dataset.classes, fit, device)
    optimizer = make_optimizer(detector, run)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    workers = run.workers if run.workers is not None else default_workers(device)
    steps_per_epoch = -(-len(training.records) // run.batch)
    total = min(run.epochs * steps_per_epoch, run.max_steps or sys.maxsize)
    header = make_header(run, dataset, fit, origin)
    moving = Moving(detector, average.detector if average else None, optimizer, scaler)
    result = Trained(folder)
    if state:
        moving.restore(state)
        result = Trained(folder, **state.values["result"])
        if result.best and not (folder / "best_model.safetensors").exists():
            raise UserError(
                f"best_model.safetensors is gone from {folder}: put it back, or start a new run with "
                f"--weights {folder / 'last_model.safetensors'}"
            )

    def save() -> None:
        progress = {k: v for k, v in asdict(result).items() if k != "folder"}
        known = {"identity": identity, "result": progress, "weights_from": origin.sources}
        states.save(moving.state(result.steps, {**known, "journal": journal.place()}))

    books = state.values["journal"] if state else None
    with Stop() as stop, Journal(folder, run, total, steps_per_epoch, device, quiet=quiet, since=books) as journal:
        for fault in faults:
            journal.say(fault)
        journal.introduce(dataset, (training, validation), detector, origin.text)
        batches = training_batches(
            training.records,
            fit,
            batch=run.batch,
            augmentations=augmentations(run),
            seed=run.seed,
            workers=workers,
            start_step=result.steps,
        )
        saved = time.monotonic()
        while True:
            # ------------------------------------------------------------------------------------ once in a while
            epoch, into_epoch = divmod(result.steps, steps_per_epoch)
            due = result.steps >= total or (into_epoch == 0 and epoch % run.eval_every == 0)
            if due and result.steps > result.judged:
                save()  # judging takes a while
                scores = evaluate(predictor, validation.records, run, workers, journal, stop)
                if not stop:
                    states.wait()
                    judge(result, scores, judged_detector, header, epoch=epoch + (into_epoch > 0))
                    if dataset.save_previews:
                        previews.validation(folder, predictor, validation.records)
                    journal.evaluation(result.steps - 1, scores, best=result.evaluations_since == 0)
                    saved = -math.inf
            if stop or time.monotonic() - saved > 60 * run.save_minutes:
                save()
                saved = time.monotonic()
            if stop:
                break
            if result.evaluations_since >= run.patience:
                journal.say(f"no better mAP in {run.patience} evaluations: stopped early")
                break
            if result.steps >= total:
                break
            # ------------------------------------------------------------------------------------------ the step
            step, batch = result.steps, next(batches)
            rate = run.learning_rate_at(step, steps_per_epoch, total)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            torch.manual_seed(step_seed(run.seed, step))  # for what does not draw from the pictures' own seeds
            detector.train()
            losses: dict[str, Tensor] = {}
            for part in batch.parts(run.micro_batch or len(batch)):
                with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                    found = detector.losses(part.to(device))
                share = len(part) / len(batch)  # losses are means over pictures
                scaler.scale(torch.stack(list(found.values())).sum() * share).backward()
                for name, loss in found.items():
                    losses[name] = losses.get(name, 0) + loss.detach() * share
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(detector.parameters(), run.clip)
            check_finite(losses, norm, batch, step, may_overflow=scaler.is_enabled())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if average:
                average.update(step)
            journal.step(step, losses, rate, norm)
            result.steps = step + 1
            if step == 0:
                previews.first_batch(folder, batch, dataset.classes)
        states.wait()
        if stop:
            checkpoint.save(folder / "last_model.safetensors", judged_detector, replace(header, step=result.steps))
            journal.say(f"stopped after {result.steps} steps. To go on: boxwright train --resume {folder}")
            if stop.signal == signal.SIGINT:
                raise KeyboardInterrupt
            raise Stopped(
                f"stopped after {result.steps} steps, state saved. To go on: boxwright train --resume {folder}"
            )
        journal.conclude(result.best, result.best_epoch)
    return result


def evaluate(
    predictor: Predictor, records: tuple[Record, ...], run: Run, workers: int, journal: Journal, stop: Stop
) -> dict[str, float]:
    """The scores of a split, through the predictor exactly as a user would run it; nothing once asked to stop."""
    assert isinstance(predictor.detector, nn.Module)
    predictor.detector.eval()
    found = {}
    for index, detections in predictor.each_record(records, batch=run.eval_batch or run.batch, workers=workers):
        found[index] = detections
        journal.evaluating(len(found), len(records))
        if stop:
            return {}
    return score(records, [found[i] for i in range(len(records))], predictor.classes).summary()


def judge(
    result: Trained, scores: dict[str, float], detector: nn.Module, header: checkpoint.Header, *, epoch: int
) -> None:
    """Save the weights as the last, and as the best if no earlier ones scored higher."""
    header = replace(header, epoch=epoch, step=result.steps, scores=scores)
    checkpoint.save(result.folder / "last_model.safetensors", detector, header)
    result.evaluations_since += 1
    result.judged = result.steps
    if not result.best or scores["map"] > result.best["map"]:
        checkpoint.save(result.folder / "best_model.safetensors", detector, header)
        result.best, result.best_epoch, result.evaluations_since = scores, epoch, 0


def require_unborn(folder: Path, faults: Sequence[str]) -> None:
    """Refuse to begin again where something would be lost: a run that has weights or states, if spoilt ones."""
    weights = [name for name in ("last_model.safetensors", "best_model.safetensors") if (folder / name).exists()]
    if not weights and not faults:
        return
    reason = "; ".join(fault.partition(": the state before")[0] for fault in faults) or "its states are gone"
    hint = f" Start a new run with --weights {folder / weights[0]}" if weights else " Start a new run"
    raise UserError(f"{folder} cannot be gone on with: {reason}.{hint}")


def require_same(saved: dict[str, Any], found: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with other data or classes than the state was made with."""
    if saved["classes"] != found["classes"]:
        raise UserError(f"{folder} was saved with the classes {saved['classes']}, the data now has {found['classes']}")
    before, now = saved.get("run", {}), found["run"]
    other = [k for k in now if before.get(k) != now[k]]
    if other:
        what = ", ".join(f"{k} was {before.get(k)!r}, now {now[k]!r}" for k in other)
        raise UserError(f"run.yaml is not what {folder} was saved with: {what}. Put it back, or start a new run")
    changed = [name for name, value in found["data"].items() if saved["data"].get(name) != value]
    if changed:
        raise UserError(
            f"the data has changed since {folder} was saved ({' and '.join(changed)}: other pictures or objects). "
            "Put it back, or start a new run from its weights with --weights"
        )


def check_finite(losses: dict[str, Tensor], norm: Tensor, batch: Batch, step: int, *, may_overflow: bool) -> None:
    """Stop, naming the pictures, when a loss or gradient is not finite; fp16 gradients may overflow and are skipped."""
    wrong = [name for name, value in losses.items() if not torch.isfinite(value)]
    if not wrong and not may_overflow and not torch.isfinite(norm):
        wrong = ["the gradient"]
    if wrong:
        raise Diverged(
            f"{', '.join(wrong)} not finite at step {step + 1}, on the pictures {', '.join(batch.ids)}. "
            "Lower --lr, or look at these pictures and their boxes"
        )


def augmentations(run: Run) -> tuple[Augmentation, ...]:
    """What a run does to its training pictures."""
    chosen: list[Augmentation] = []
    if run.flip:
        chosen.append(random_flip(run.flip))
    if run.use_train_aug:
        from boxwright.data.article import article_augmentation  # loads Albumentations, which takes seconds

        chosen.append(article_augmentation())
    return tuple(chosen)


def make_header(run: Run, dataset: Dataset, fit: Fit, origin: Origin) -> checkpoint.Header:
    return checkpoint.Header(
        model=run.model,
        options=run.model_options,
        classes=list(dataset.classes),
        fit={"imgsz": fit.imgsz, "square": fit.square},
        run=run.model_dump(mode="json"),
        weights_from=origin.sources,
    )


def say(line: str) -> None:
    """What is told before there is a run folder to tell it in."""
    sys.stderr.write(line + "\n")


def step_seed(seed: int, step: int) -> int:
    """A seed of its own for every step of every run."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step}".encode(), digest_size=7).digest())


def default_workers(device: torch.device) -> int:
    """Reading processes: several beside a GPU; none beside a CPU that is busy with the network itself."""
    return min(8, os.cpu_count() or 1) if device.type != "cpu" else 0
