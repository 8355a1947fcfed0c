"""What a run makes of its pictures before the network sees them, and any sample of any epoch made again."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from boxwright.config import Run
from boxwright.data.cache import Cache, opened
from boxwright.data.dataset import Split
from boxwright.data.loader import Aspects, EpochOrder, Samples
from boxwright.data.mixing import Mixing
from boxwright.data.transforms import Augmentation, Fit, random_flip
from boxwright.types import Record, Sample


def seen(run: Run, records: Sequence[Record], indices: Sequence[int], *, epoch: int, classes: int) -> list[Sample]:
    """The samples that the records at `indices` become in an epoch (0-based) of a run on `records`, bit for bit."""
    fit = Fit(run.imgsz, run.square_training, run.decode_scaled)
    batch = run.batch if isinstance(run.batch, int) else 1
    order = EpochOrder(len(records), batch, run.seed, Aspects.of(records) if run.group_aspect else None)
    steps_per_epoch = order.steps_per_epoch
    total = min(run.epochs * steps_per_epoch, run.max_steps or sys.maxsize)
    samples = Samples(
        records,
        fit,
        augmentations(run, fit, classes),
        run.seed,
        scale_jitter=run.scale_jitter,
        mixing=mixing_of(run, total, steps_per_epoch),
        multi_scale=run.multi_scale,
    )
    return [samples.of_step(order.step_of((epoch, index)))[epoch, index] for index in indices]


def largest_fit(run: Run) -> Fit:
    """That of the largest pictures that a training batch may have."""
    return Fit(max((run.imgsz, *(run.multi_scale or ()))), run.square_training, run.decode_scaled)


def cache_of(
    run: Run, fit: Fit, splits: Sequence[Split], say: Callable[[str], None]
) -> AbstractContextManager[Cache | None]:
    """The cache of a run's decoded pictures, in the sizes that its training and its evaluation read them in."""
    training, validation = (split.records for split in splits)
    mixing = Mixing(run.mosaic, run.mixup, run.copy_paste)
    readers = (
        Samples(training, fit, scale_jitter=run.scale_jitter, mixing=mixing, multi_scale=run.multi_scale),
        Samples(validation, fit),
    )
    name = repr((os.path.abspath(run.data), *(reader.form for reader in readers)))  # noqa: PTH100  an address, perhaps
    capacity = None if run.cache_gb is None else run.cache_gb * 1e9
    return opened(run.cache, capacity, name, sum(reader.room() for reader in readers), say)


def augmentations(run: Run, fit: Fit, classes: int) -> tuple[Augmentation, ...]:
    """What a run does to its training pictures."""
    chosen: list[Augmentation] = []
    if run.flip:
        chosen.append(random_flip(run.flip))
    if run.use_train_aug:
        from boxwright.data.article import article_augmentation  # loads Albumentations, which takes seconds

        chosen.append(article_augmentation())
    if run.augment:
        from boxwright.data.own_augmentation import own_augmentation

        chosen.append(own_augmentation(run.augment, fit, classes=classes))
    if run.article_faults:
        from boxwright.data.article import article_faults

        chosen.append(article_faults)
    return tuple(chosen)


def mixing_of(run: Run, total: int, steps_per_epoch: int) -> Mixing:
    """What is mixed, and from which epoch on no more: at the end the network sees pictures as they are."""
    epochs = -(-total // steps_per_epoch)
    return Mixing(run.mosaic, run.mixup, run.copy_paste, epochs - min(run.close_mosaic, epochs // 2))
