"""From records to batches: decode, transform, collate. Nothing random is carried from one sample to the next.

The order of an epoch is a function of (seed, epoch), the augmentation of a sample of (seed, epoch, index): batches do
not depend on the number of workers, nor on where a run stopped.
"""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from boxwright.data.images import ImageError, decode
from boxwright.data.transforms import Augmentation, Fit, make_sample, pad
from boxwright.types import Batch, Int64, Record, Sample, UserError

log = logging.getLogger(__name__)

Place = tuple[int, int]  # (epoch, index of the record)


@dataclass(frozen=True)
class Samples(Dataset[Sample]):
    """Records as samples.

    A picture that has become unreadable since the scan is named in the log; in training its neighbour is taken instead,
    in evaluation it is black, so that its objects count as missed.
    """

    records: Sequence[Record]
    fit: Fit
    augmentations: tuple[Augmentation, ...] = ()
    seed: int = 0
    training: bool = True

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: Place) -> Sample:
        epoch, index = place
        rng = np.random.default_rng([self.seed, epoch, index])
        for attempt in range(min(len(self.records), 8) if self.training else 1):
            record = self.records[(index + attempt) % len(self.records)]
            try:
                image = decode(record.image)
            except ImageError as error:
                log.warning(
                    "%s; %s",
                    error,
                    "another is used instead" if self.training else "its objects count as missed",
                )
                continue
            sample = make_sample(image, record, self.fit, self.augmentations, rng)
            return replace(sample, seed=int(rng.integers(2**62)))
        if self.training:
            raise UserError(
                f"{self.records[index].image} and the pictures after it cannot be read. Is the folder there?"
            )
        record = self.records[index]
        return make_sample(np.zeros((*record.size, 3), np.uint8), record, self.fit)


@dataclass(frozen=True)
class EpochOrder(Sampler[list[Place]]):
    """Batches of places, epoch after epoch without end, from any step on."""

    length: int
    batch: int
    seed: int
    start_step: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.length // self.batch)

    def __iter__(self) -> Iterator[list[Place]]:
        epoch, skip = divmod(self.start_step, self.steps_per_epoch)
        while True:
            order = shuffled(self.length, self.seed, epoch)
            for start in range(skip * self.batch, self.length, self.batch):
                yield [(epoch, int(index)) for index in order[start : start + self.batch]]
            epoch, skip = epoch + 1, 0


def shuffled(length: int, seed: int, epoch: int) -> Int64:
    """The order of an epoch: a permutation of 0 .. length-1."""
    return np.random.default_rng([seed, epoch]).permutation(length).astype(np.int64)


def training_batches(
    records: Sequence[Record],
    fit: Fit,
    *,
    batch: int,
    augmentations: tuple[Augmentation, ...] = (),
    seed: int = 0,
    workers: int = 0,
    start_step: int = 0,
) -> Iterator[Batch]:
    """Endless shuffled batches; the last of an epoch may be smaller."""
    samples = Samples(records, fit, augmentations, seed)
    order = EpochOrder(len(records), batch, seed, start_step)
    return _iterate(samples, order, workers)


def ordered_batches(records: Sequence[Record], fit: Fit, *, batch: int, workers: int = 0) -> Iterator[Batch]:
    """Every record once, unaugmented; pictures of one canvas together, so that no padding depends on neighbours."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(fit.place(record.size).canvas, []).append(index)
    places = [
        [(0, index) for index in group[start : start + batch]]
        for group in groups.values()
        for start in range(0, len(group), batch)
    ]
    return _iterate(Samples(records, fit, training=False), places, workers)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples on one canvas, the largest of theirs."""
    canvas = (max(s.image.shape[0] for s in samples), max(s.image.shape[1] for s in samples))
    images = np.stack([pad(s.image, canvas) for s in samples])  # (B, H, W, 3)
    return Batch(
        ids=tuple(s.id for s in samples),
        images=torch.from_numpy(images).permute(0, 3, 1, 2),  # (B, 3, H, W), channels last in memory
        sizes=tuple(s.size for s in samples),
        boxes=tuple(torch.from_numpy(np.ascontiguousarray(s.boxes, np.float32)) for s in samples),
        labels=tuple(torch.from_numpy(np.ascontiguousarray(s.labels)) for s in samples),
        difficult=tuple(torch.from_numpy(np.ascontiguousarray(s.difficult)) for s in samples),
        seeds=tuple(s.seed for s in samples),
    )


def _iterate(samples: Samples, batches: Sampler[list[Place]] | list[list[Place]], workers: int) -> Iterator[Batch]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores: as asked
        loader = DataLoader(
            samples,
            batch_sampler=cast(Sampler[list[int]], batches),  # a place stands for an index
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # its own, so that making a loader draws nothing from the global one
        )
        return cast(Iterator[Batch], iter(loader))  # collated


def _begin_worker(_: int) -> None:
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the training process decides
