"""The one training loop, top to bottom: data, model, steps, and once in a while a score and a checkpoint."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from boxwright import registry
from boxwright.config import Run
from boxwright.data.dataset import Dataset, open_dataset
from boxwright.data.loader import training_batches
from boxwright.data.transforms import Augmentation, Fit, random_flip
from boxwright.evaluation import score
from boxwright.inference.predictor import Predictor, choose_device
from boxwright.models import checkpoint
from boxwright.models.start import Origin, start_from
from boxwright.training import previews, run_folder
from boxwright.training.journal import Journal
from boxwright.training.optim import autocast_type, make_optimizer
from boxwright.types import Batch, Diverged, Record, UserError


@dataclass
class Trained:
    """What a run came to."""

    folder: Path
    steps: int = 0
    best: dict[str, float] = field(default_factory=dict)  # scores of best_model.safetensors
    best_epoch: int = 0
    evaluations_since: int = 0


def train(run: Run, *, quiet: bool = False) -> Trained:
    """Train one detector as `run` says; training/run_folder.py shows what is written.

    A mistake in the run or its data is a `UserError` before the first step, a loss that is not finite `Diverged`.
    """
    device = choose_device(run.device)
    amp = autocast_type(run.precision, device)
    dataset = open_dataset(run.data)
    training = dataset.read("train", ignore_unknown=run.ignore_unknown)
    validation = dataset.read("val", ignore_unknown=run.ignore_unknown)
    if not any((~record.difficult).any() for record in validation.records):
        raise UserError(f"{run.data}: 0 objects to be judged on in {len(validation.records)} validation pictures")
    torch.manual_seed(run.seed)
    detector = registry.build(run.model, num_classes=len(dataset.classes))
    origin = start_from(detector, run.weights, say=(lambda _: None) if quiet else say)
    fit = Fit(run.imgsz, run.square_training)
    folder = run_folder.make_folder(run)
    run_folder.check_space(folder, sum(t.nbytes for t in detector.state_dict().values()))
    run_folder.write_run(folder, run, dataset, (training, validation), device)

    detector.to(device)
    predictor = Predictor(detector, dataset.classes, fit, device)
    optimizer = make_optimizer(detector, run)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    workers = run.workers if run.workers is not None else default_workers(device)
    batches = training_batches(
        training.records,
        fit,
        batch=run.batch,
        augmentations=augmentations(run),
        seed=run.seed,
        workers=workers,
    )
    steps_per_epoch = -(-len(training.records) // run.batch)
    total = min(run.epochs * steps_per_epoch, run.max_steps or sys.maxsize)
    header = make_header(run, dataset, fit, origin)
    result = Trained(folder)

    with Journal(folder, run, total, steps_per_epoch, device, quiet=quiet) as journal:
        journal.introduce(dataset, (training, validation), detector, origin.text)
        try:
            for step, batch in zip(range(total), batches, strict=False):
                # ------------------------------------------------------------------------------------- the step
                rate = run.learning_rate_at(step, steps_per_epoch, total)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                torch.manual_seed(step_seed(run.seed, step))  # sampling and drop path are functions of the step
                detector.train()
                with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                    losses = detector.losses(batch.to(device))
                loss = torch.stack(list(losses.values())).sum()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(detector.parameters(), run.clip)
                check_finite(losses, norm, batch, step, may_overflow=scaler.is_enabled())
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                # ------------------------------------------------------------------------------ once in a while
                journal.step(step, losses, rate, norm)
                result.steps = step + 1
                if step == 0:
                    previews.first_batch(folder, batch, dataset.classes)
                epoch, into_epoch = divmod(step + 1, steps_per_epoch)
                due = into_epoch == 0 and epoch % run.eval_every == 0
                if not due and step + 1 < total:
                    continue
                scores = evaluate(predictor, validation.records, run, workers, journal)
                judge(result, scores, detector, header, epoch=epoch + (into_epoch > 0))
                if dataset.save_previews:
                    previews.validation(folder, predictor, validation.records)
                journal.evaluation(step, scores, best=result.evaluations_since == 0)
                if result.evaluations_since >= run.patience:
                    journal.say(f"no better mAP in {run.patience} evaluations: stopped early")
                    break
        except KeyboardInterrupt:
            checkpoint.save(folder / "last_model.safetensors", detector, replace(header, step=result.steps))
            journal.say(f"stopped after {result.steps} steps; the weights so far: {folder / 'last_model.safetensors'}")
            raise
        journal.conclude(result.best, result.best_epoch)
    return result


def evaluate(
    predictor: Predictor, records: tuple[Record, ...], run: Run, workers: int, journal: Journal
) -> dict[str, float]:
    """The scores of a split, through the predictor exactly as a user would run it."""
    assert isinstance(predictor.detector, nn.Module)
    predictor.detector.eval()
    found = {}
    for index, detections in predictor.each_record(records, batch=run.eval_batch or run.batch, workers=workers):
        found[index] = detections
        journal.evaluating(len(found), len(records))
    return score(records, [found[i] for i in range(len(records))], predictor.classes).summary()


def judge(
    result: Trained, scores: dict[str, float], detector: nn.Module, header: checkpoint.Header, *, epoch: int
) -> None:
    """Save the weights as the last, and as the best if no earlier ones scored higher."""
    header = replace(header, epoch=epoch, step=result.steps, scores=scores)
    checkpoint.save(result.folder / "last_model.safetensors", detector, header)
    result.evaluations_since += 1
    if not result.best or scores["map"] > result.best["map"]:
        checkpoint.save(result.folder / "best_model.safetensors", detector, header)
        result.best, result.best_epoch, result.evaluations_since = scores, epoch, 0


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
        options={},
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
