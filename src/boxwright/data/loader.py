"""From records to batches: decode, transform, collate. Nothing random is carried from one sample to the next.

The order of an epoch is a function of (seed, epoch), the augmentation of a sample of (seed, epoch, index): batches do
not depend on the number of workers, nor on where a run stopped.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, TypeVar

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from boxwright.data.feeding import feed, reading
from boxwright.data.images import ImageError, decode
from boxwright.data.mixing import UNMIXED, Mixing, Source, place_mixed
from boxwright.data.transforms import Augmentation, Fit, Scales, finish, pad
from boxwright.types import Batch, Int64, Record, Sample, Size, UserError

log = logging.getLogger(__name__)

Place = tuple[int, int]  # (epoch, index of the record)
Collated = TypeVar("Collated")

TIMEOUT = 300.0  # seconds that a picture may take to be read
BESIDE_PIXELS = 1 << 16  # bytes for a picture's boxes on their way from a reader: 2,500 objects


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
    scale_jitter: Scales | None = None
    mixing: Mixing = UNMIXED  # of several pictures into one

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: Place) -> Sample:
        epoch, index = place
        rng = np.random.default_rng([self.seed, epoch, index])
        image, record = self._read(index) if self.training else self._read_or_black(index)

        def another() -> Source:
            return self._read(int(rng.integers(len(self.records))))

        mixing = self.mixing.in_epoch(epoch)
        picture = place_mixed((image, record), another, self.fit, mixing, self.scale_jitter, rng)
        sample = finish(picture, record, self.augmentations, rng, canvas=self.canvas(place))
        return replace(sample, seed=int(rng.integers(2**62)))

    def canvas(self, place: Place) -> Size:
        """The canvas of a sample, known before it is read; the Fit's largest where chance may ask for it."""
        epoch, index = place
        by_chance = self.scale_jitter is not None or self.mixing.in_epoch(epoch) != UNMIXED
        if by_chance or any(getattr(augment, "resizes", False) for augment in self.augmentations):
            return self.fit.largest_canvas
        return self.fit.place(self.records[index].size).canvas

    def _read(self, index: int) -> Source:
        """The picture at `index`, or the first after it that can be read."""
        for attempt in range(min(len(self.records), 8)):
            record = self.records[(index + attempt) % len(self.records)]
            reading(record.image)
            try:
                return decode(record.image), record
            except ImageError as error:
                log.warning("%s; another is used instead", error)
        raise UserError(f"{self.records[index].image} and the pictures after it cannot be read. Is the folder there?")

    def _read_or_black(self, index: int) -> Source:
        record = self.records[index]
        reading(record.image)
        try:
            return decode(record.image), record
        except ImageError as error:
            log.warning("%s; its objects count as missed", error)
            return np.zeros((*record.size, 3), np.uint8), record


@dataclass(frozen=True)
class EpochOrder:
    """Batches of places, epoch after epoch without end: `order[step]`."""

    length: int
    batch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.length // self.batch)

    def __getitem__(self, step: int) -> list[Place]:
        epoch, into = divmod(step, self.steps_per_epoch)
        order = _shuffled(self.length, self.seed, epoch)[into * self.batch : (into + 1) * self.batch]
        return [(epoch, int(index)) for index in order]


def shuffled(length: int, seed: int, epoch: int) -> Int64:
    """The order of an epoch: a permutation of 0 .. length-1."""
    return np.random.default_rng([seed, epoch]).permutation(length).astype(np.int64)


_shuffled = lru_cache(maxsize=4)(shuffled)  # an epoch's steps ask for it one by one


@dataclass(frozen=True)
class Share:
    """What one of several training processes gets of a step's batch; alone it gets it all."""

    batch: Batch  # never empty, as the processes go through the network together: one picture where `pictures` is 0
    pictures: int  # that count: len(batch) or 0
    of: int  # pictures of all processes together


@dataclass(frozen=True)
class _Shares:
    """Each step's share of one training process: contiguous, as large as the others' or one larger."""

    order: EpochOrder
    rank: int
    ranks: int

    def __getitem__(self, step: int) -> list[Place]:
        places, start, stop = self.bounds(step)
        return places[start:stop] or places[:1]

    def bounds(self, step: int) -> tuple[list[Place], int, int]:
        """The step's places, and where the share begins and ends in them."""
        places = self.order[step]
        each, more = divmod(len(places), self.ranks)
        start = self.rank * each + min(self.rank, more)
        return places, start, start + each + (self.rank < more)


def training_batches(
    records: Sequence[Record],
    fit: Fit,
    *,
    batch: int,
    augmentations: tuple[Augmentation, ...] = (),
    scale_jitter: Scales | None = None,
    mixing: Mixing = UNMIXED,
    seed: int = 0,
    workers: int = 0,
    start_step: int = 0,
    rank: int = 0,
    ranks: int = 1,
    timeout: float = TIMEOUT,
) -> Iterator[Share]:
    """Endless shuffled batches of `batch` pictures, the last of an epoch may be smaller; of each, the share of `rank`.

    The shares of all ranks, one after the other, are the batch of a single one, bit for bit. A picture that takes
    longer than `timeout` seconds is a `ReadingError`.
    """
    samples = Samples(records, fit, augmentations, seed, scale_jitter=scale_jitter, mixing=mixing)
    shares = _Shares(EpochOrder(len(records), batch, seed), rank, ranks)

    def share(step: int, read: list[Sample]) -> Share:
        places, start, stop = shares.bounds(step)
        canvases = [samples.canvas(place) for place in places]  # all ranks', or padding would differ
        canvas = (max(height for height, _ in canvases), max(width for _, width in canvases))
        return Share(collate(read, canvas), stop - start, len(places))

    source = _Pictures(samples, shares)
    largest = -(-min(batch, len(records)) // ranks)
    return _iterate(source, share, range(start_step, sys.maxsize), workers, largest, timeout)


def ordered_batches(
    records: Sequence[Record],
    fit: Fit,
    *,
    batch: int,
    workers: int = 0,
    rank: int = 0,
    ranks: int = 1,
    timeout: float = TIMEOUT,
) -> Iterator[Batch]:
    """Every record once, unaugmented; pictures of one canvas together, so that no padding depends on neighbours.

    Of several processes each gets every `ranks`th of these batches.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(fit.place(record.size).canvas, []).append(index)
    batches = [
        [(0, index) for index in group[start : start + batch]]
        for group in groups.values()
        for start in range(0, len(group), batch)
    ][rank::ranks]
    source = _Pictures(Samples(records, fit, training=False), batches)
    largest = max(map(len, batches), default=0)
    return _iterate(source, lambda _, read: collate(read), range(len(batches)), workers, largest, timeout)


def collate(samples: Sequence[Sample], canvas: Size = (0, 0)) -> Batch:
    """Samples on one canvas, the largest of theirs and `canvas`; a copy of them."""
    canvas = (
        max(canvas[0], *(s.image.shape[0] for s in samples)),
        max(canvas[1], *(s.image.shape[1] for s in samples)),
    )
    images = np.stack([pad(s.image, canvas) for s in samples])  # (B, H, W, 3)
    return Batch(
        ids=tuple(s.id for s in samples),
        images=torch.from_numpy(images).permute(0, 3, 1, 2),  # (B, 3, H, W), channels last in memory
        sizes=tuple(s.size for s in samples),
        boxes=tuple(torch.from_numpy(np.array(s.boxes, np.float32)) for s in samples),
        labels=tuple(torch.from_numpy(np.array(s.labels)) for s in samples),
        difficult=tuple(torch.from_numpy(np.array(s.difficult)) for s in samples),
        seeds=tuple(s.seed for s in samples),
    )


class _Batches(Protocol):
    """Numbered batches of places."""

    def __getitem__(self, number: int, /) -> list[Place]: ...


@dataclass(frozen=True)
class _Pictures:
    """What the reading processes read: a batch's samples, not collated yet."""

    samples: Samples
    batches: _Batches

    def read(self, number: int) -> list[Sample]:
        return [self.samples[place] for place in self.batches[number]]


def _iterate(
    source: _Pictures,
    finish: Callable[[int, list[Sample]], Collated],
    numbers: range,
    workers: int,
    largest: int,
    timeout: float,
) -> Iterator[Collated]:
    height, width = source.samples.fit.largest_canvas
    capacity = largest * (3 * height * width + BESIDE_PIXELS)
    return feed(source, finish, numbers, workers=workers, capacity=capacity, timeout=timeout, begin=_begin_worker)


def _begin_worker(number: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Nothing of ours draws from global generators; what a user's augmentation draws should not be the same everywhere.
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)
