"""From records to batches: decode, transform, collate. Nothing random is carried from one sample to the next.

The order of an epoch is a function of (seed, epoch), the augmentation of a sample of (seed, epoch, index), the size of
a batch of (seed, step): batches do not depend on the number of workers, nor on where a run stopped, nor on whether a
picture comes from a file, a shard or the cache.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Protocol, TypeVar

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from boxwright.data.cache import Cache, room_for
from boxwright.data.feeding import feed, reading
from boxwright.data.images import ImageError, decode
from boxwright.data.mixing import UNMIXED, Mixing, Source, place_mixed
from boxwright.data.transforms import MULTIPLE, Augmentation, Fit, Scales, finish
from boxwright.types import Batch, Float32, Int64, Record, Sample, Size, UInt8, UserError

log = logging.getLogger(__name__)

Place = tuple[int, int]  # (epoch, index of the record)
Sides = tuple[int, int]  # pixels: the smallest and the largest `imgsz`, multiples of 32
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
    multi_scale: Sides | None = None  # between which a batch's `imgsz` is drawn
    cache: Cache | None = None  # of decoded pictures

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: Place) -> Sample:
        epoch, index = place
        rng = np.random.default_rng([self.seed, epoch, index])
        image, record = self._read(index) if self.training else self._read_or_black(index)

        def another() -> Source:
            return self._read(int(rng.integers(len(self.records))))

        if self.form == WHOLE:
            mixing = self.mixing.in_epoch(epoch)
            picture = place_mixed((image, record), another, self.fit, mixing, self.scale_jitter, rng)
        else:
            picture = self.fit.place(record.size).label(image, record)
        sample = finish(picture, record, self.augmentations, rng, canvas=self.canvas(place))
        return replace(sample, seed=int(rng.integers(2**62)))

    def canvas(self, place: Place) -> Size:
        """The canvas of a sample, known before it is read; the Fit's largest where chance may ask for it."""
        epoch, index = place
        by_chance = self.scale_jitter is not None or self.mixing.in_epoch(epoch) != UNMIXED
        if any(getattr(augment, "resizes", False) for augment in self.augmentations):
            return self.largest_canvas
        return self.fit.largest_canvas if by_chance else self.fit.place(self.records[index].size).canvas

    @property
    def largest_canvas(self) -> Size:
        """That of all batches."""
        sides = (self.fit.imgsz, *(self.multi_scale or ()))
        return replace(self.fit, imgsz=max(sides)).largest_canvas

    @property
    def form(self) -> str:
        """How pictures are read: whole where chance decides on their scale, otherwise at the Fit's size."""
        chance = self.scale_jitter or self.multi_scale or self.mixing.mosaic or self.mixing.mixup
        return WHOLE if chance or self.mixing.copy_paste else str(self.fit)

    def of_step(self, step: int) -> Samples:
        """The same samples at the size that the step has by chance, which all processes know."""
        if not self.multi_scale:
            return self
        low, high = (side // MULTIPLE for side in self.multi_scale)
        side = int(np.random.default_rng([self.seed, step, _OF_STEPS]).integers(low, high + 1)) * MULTIPLE
        return replace(self, fit=replace(self.fit, imgsz=side))

    def room(self) -> int:
        """Bytes that a cache of all these pictures would take."""
        whole = self.form == WHOLE
        return room_for(record.size if whole else self.fit.content(record.size) for record in self.records)

    def _read(self, index: int) -> Source:
        """The picture at `index`, or the first after it that can be read."""
        for attempt in range(min(len(self.records), 8)):
            record = self.records[(index + attempt) % len(self.records)]
            try:
                return self._pixels(record), record
            except ImageError as error:
                log.warning("%s; another is used instead", error)
        raise UserError(f"{self.records[index].image} and the pictures after it cannot be read. Is the folder there?")

    def _read_or_black(self, index: int) -> Source:
        record = self.records[index]
        try:
            return self._pixels(record), record
        except ImageError as error:
            log.warning("%s; its objects count as missed", error)
            size = record.size if self.form == WHOLE else self.fit.content(record.size)
            return np.zeros((*size, 3), np.uint8), record

    def _pixels(self, record: Record) -> UInt8:
        """The picture in the form that is asked for, from the cache if it is there."""
        reading(record.image)
        form = self.form
        make = partial(_decoded, record, None if form == WHOLE else self.fit)
        if self.cache is None:
            return make()
        size = record.size if form == WHOLE else self.fit.content(record.size)
        return self.cache.get(record.image, form, size, make)


WHOLE = "whole"
_OF_STEPS = 1 << 40  # beyond the indices of records, so that steps draw from generators of their own


def _decoded(record: Record, fit: Fit | None) -> UInt8:
    if fit is None:
        pixels = decode(record.image)
        size = (pixels.shape[0], pixels.shape[1])
    else:
        pixels, size = fit.read(record.image)
    if size != record.size:  # its boxes are another picture's
        (height, width), (h, w) = size, record.size
        raise ImageError(record.image, f"is {width}x{height} now, it was {w}x{h} when the data was scanned")
    return pixels


@dataclass(frozen=True)
class EpochOrder:
    """Batches of places, epoch after epoch without end: `order[step]`."""

    length: int
    batch: int
    seed: int
    aspects: Aspects | None = field(default=None, compare=False)  # of the pictures: those alike come together

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.length // self.batch)

    def __getitem__(self, step: int) -> list[Place]:
        epoch, into = divmod(step, self.steps_per_epoch)
        order = self._of_epoch(epoch)[into * self.batch : (into + 1) * self.batch]
        return [(epoch, int(index)) for index in order]

    def step_of(self, place: Place) -> int:
        """The step that a place is in."""
        epoch, index = place
        at = int(np.flatnonzero(self._of_epoch(epoch) == index)[0])
        return epoch * self.steps_per_epoch + at // self.batch

    def _of_epoch(self, epoch: int) -> Int64:
        if self.aspects is None:
            return _shuffled(self.length, self.seed, epoch)
        return _grouped(self.aspects, self.batch, self.seed, epoch)


@dataclass(frozen=True, eq=False)
class Aspects:
    """Width over height of each picture."""

    values: Float32  # (N,)

    @classmethod
    def of(cls, records: Sequence[Record]) -> Aspects:
        return cls(np.array([record.size[1] / record.size[0] for record in records], np.float32))


def shuffled(length: int, seed: int, epoch: int) -> Int64:
    """The order of an epoch: a permutation of 0 .. length-1."""
    return np.random.default_rng([seed, epoch]).permutation(length).astype(np.int64)


def grouped(aspects: Aspects, batch: int, seed: int, epoch: int) -> Int64:
    """The order of an epoch in which a batch's pictures have similar aspects: a permutation of 0 .. N-1.

    The shuffled order is cut into stretches of `ALIKE` batches, each is sorted by aspect, and the batches of all are
    shuffled: who is whose neighbour changes from epoch to epoch. What is too little for a batch is the last.
    """
    order = shuffled(len(aspects.values), seed, epoch)
    whole = len(order) // batch * batch
    stretches = np.split(order[:whole], range(ALIKE * batch, whole, ALIKE * batch))
    ranked = [stretch[np.argsort(aspects.values[stretch], kind="stable")] for stretch in stretches]
    batches = np.concatenate(ranked).reshape(-1, batch)
    turn = np.random.default_rng([seed, epoch, _OF_STEPS, 1]).permutation(len(batches))
    return np.concatenate([batches[turn].reshape(-1), order[whole:]])


ALIKE = 64  # batches that are sorted together
_shuffled = lru_cache(maxsize=4)(shuffled)  # an epoch's steps ask for it one by one
_grouped = lru_cache(maxsize=4)(grouped)


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
    multi_scale: Sides | None = None,
    group_aspect: bool = False,
    cache: Cache | None = None,
    pinned: bool = False,
) -> Iterator[Share]:
    """Endless shuffled batches of `batch` pictures, the last of an epoch may be smaller; of each, the share of `rank`.

    The shares of all ranks, one after the other, are the batch of a single one, bit for bit, whether pictures come from
    the `cache` or not. `multi_scale` draws `imgsz` for each batch, `group_aspect` puts pictures of similar aspects
    together. `pinned` memory is what a GPU can fetch by itself. A picture that takes longer than `timeout` seconds is
    a `ReadingError`.
    """
    samples = Samples(
        records, fit, augmentations, seed,
        scale_jitter=scale_jitter, mixing=mixing, multi_scale=multi_scale, cache=cache,
    )  # fmt: skip
    shares = _Shares(EpochOrder(len(records), batch, seed, Aspects.of(records) if group_aspect else None), rank, ranks)

    def share(step: int, read: list[Sample]) -> Share:
        places, start, stop = shares.bounds(step)
        now = samples.of_step(step)
        canvases = [now.canvas(place) for place in places]  # all ranks', or padding would differ
        canvas = (max(height for height, _ in canvases), max(width for _, width in canvases))
        return Share(collate(read, canvas, pinned=pinned), stop - start, len(places))

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
    cache: Cache | None = None,
    pinned: bool = False,
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
    source = _Pictures(Samples(records, fit, training=False, cache=cache), batches)
    largest = max(map(len, batches), default=0)
    numbers = range(len(batches))
    return _iterate(source, lambda _, read: collate(read, pinned=pinned), numbers, workers, largest, timeout)


def collate(samples: Sequence[Sample], canvas: Size = (0, 0), *, pinned: bool = False) -> Batch:
    """Samples on one canvas, the largest of theirs and `canvas`; a copy of them, in memory that is `pinned` for a GPU
    or not."""
    canvas = (
        max(canvas[0], *(s.image.shape[0] for s in samples)),
        max(canvas[1], *(s.image.shape[1] for s in samples)),
    )
    images = torch.empty((len(samples), *canvas, 3), dtype=torch.uint8, pin_memory=pinned)  # (B, H, W, 3)
    for image, sample in zip(images.numpy(), samples, strict=True):
        height, width = sample.image.shape[:2]
        image[:height, :width] = sample.image
        image[height:], image[:height, width:] = 0, 0
    return Batch(
        ids=tuple(s.id for s in samples),
        images=images.permute(0, 3, 1, 2),  # (B, 3, H, W), channels last in memory
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
        samples = self.samples.of_step(number)
        return [samples[place] for place in self.batches[number]]


def _iterate(
    source: _Pictures,
    finish: Callable[[int, list[Sample]], Collated],
    numbers: range,
    workers: int,
    largest: int,
    timeout: float,
) -> Iterator[Collated]:
    height, width = source.samples.largest_canvas
    capacity = largest * (3 * height * width + BESIDE_PIXELS)
    return feed(source, finish, numbers, workers=workers, capacity=capacity, timeout=timeout, begin=_begin_worker)


def _begin_worker(number: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Nothing of ours draws from global generators; what a user's augmentation draws should not be the same everywhere.
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)
