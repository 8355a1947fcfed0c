"""Batches are a function of the seed and the step: not of workers, of history, or of where a run began."""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from boxwright.data.article import article_augmentation
from boxwright.data.loader import (
    Aspects,
    EpochOrder,
    Samples,
    collate,
    grouped,
    ordered_batches,
    shuffled,
    training_batches,
)
from boxwright.data.transforms import Augmentation, Fit, make_sample, random_flip
from boxwright.types import Batch, Record, Size, UserError

FIT = Fit(64)
ARTICLE: tuple[Augmentation, ...] = (random_flip(0.5), article_augmentation())


def make_records(folder: Path, sizes: Sequence[Size]) -> list[Record]:
    """Noisy PNGs with one or two objects each; every third has none."""
    records = []
    for index, (height, width) in enumerate(sizes):
        path = folder / f"{index:03d}.png"
        rng = np.random.default_rng(index)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
        boxes = np.array([[1.25, 2, width / 2, height / 2], [3, 3.5, width, height - 1]], np.float32)[: index % 3]
        flags = np.zeros(len(boxes), bool)
        labels = np.arange(len(boxes)) + index
        records.append(Record(path.stem, path, (height, width), boxes, labels, flags, flags))
    return records


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    sizes = [(48, 64), (64, 48), (30, 30), (48, 64), (100, 90), (20, 64), (64, 64)]
    return make_records(tmp_path_factory.mktemp("pictures"), sizes)


def digest(batches: Iterable[Batch]) -> str:
    total = hashlib.sha256()
    for batch in batches:
        total.update(repr((batch.ids, batch.sizes, tuple(batch.images.shape))).encode())
        for tensor in (batch.images, *batch.boxes, *batch.labels, *batch.difficult):
            total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def training(*arguments: Any, **options: Any) -> Iterator[Batch]:
    """The batches of a training process that is alone."""
    return (share.batch for share in training_batches(*arguments, **options))


def names(batches: Iterable[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.ids]


# Which pictures, in which order


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 20])
def test_every_record_comes_once_an_epoch(records: list[Record], batch: int) -> None:
    steps = -(-len(records) // batch)
    batches = training(records, FIT, batch=batch)
    for _ in range(3):
        epoch = list(islice(batches, steps))
        assert sorted(names(epoch)) == [record.id for record in records]
        assert all(len(b) == batch for b in epoch[:-1])


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    orders = {(seed, epoch): shuffled(50, seed, epoch).tolist() for seed in range(4) for epoch in range(4)}
    assert len({tuple(order) for order in orders.values()}) == 16
    for (seed, epoch), order in reversed(orders.items()):
        assert sorted(order) == list(range(50))
        assert shuffled(50, seed, epoch).tolist() == order


def test_the_seed_changes_pictures_and_order(records: list[Record]) -> None:
    def first(seed: int) -> str:
        return digest(islice(training(records, FIT, batch=2, seed=seed), 4))

    assert len({first(seed) for seed in range(4)}) == 4
    assert first(1) == first(1)


def test_an_epoch_augments_anew(records: list[Record]) -> None:
    batches = islice(training(records[-1:], FIT, batch=1, augmentations=ARTICLE), 12)
    assert len({digest([batch]) for batch in batches}) > 4


# What they do not depend on


@pytest.mark.parametrize("augmentations", [(), ARTICLE], ids=["plain", "augmented"])
def test_workers_change_nothing(records: list[Record], augmentations: tuple[Augmentation, ...]) -> None:
    made = {
        workers: digest(
            islice(training(records, FIT, batch=2, augmentations=augmentations, seed=5, workers=workers), 10)
        )
        for workers in (0, 1, 2)
    }
    assert len(set(made.values())) == 1, made


def test_workers_change_no_evaluation(records: list[Record]) -> None:
    assert len({digest(ordered_batches(records, FIT, batch=2, workers=n)) for n in (0, 2)}) == 1


@pytest.mark.parametrize("start", [1, 3, 4, 5, 11])
def test_starting_at_a_step_is_skipping_to_it(records: list[Record], start: int) -> None:
    straight = training(records, FIT, batch=2, augmentations=ARTICLE)
    later = training(records, FIT, batch=2, augmentations=ARTICLE, start_step=start)
    assert digest(islice(straight, start, start + 5)) == digest(islice(later, 5))


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_drawn_from_global_generators(records: list[Record], workers: int) -> None:
    torch_before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    list(islice(training(records, FIT, batch=2, augmentations=ARTICLE, workers=workers), 6))
    list(ordered_batches(records, FIT, batch=2, workers=workers))
    assert torch.equal(torch.random.get_rng_state(), torch_before)
    assert np.random.get_state()[1].tolist() == numpy_before


def test_samples_cross_into_a_spawned_process(records: list[Record]) -> None:
    # Linux forks its workers, which needs no pickling; macOS and Windows spawn them.
    samples = Samples(records, FIT, ARTICLE, seed=3)
    again = pickle.loads(pickle.dumps(samples))
    for place in ((0, 1), (2, 4)):
        assert digest([collate([again[place]])]) == digest([collate([samples[place]])])


# What a batch holds


def test_unequal_canvases_are_padded_to_the_largest(records: list[Record]) -> None:
    samples = [make_sample(np.full((*r.size, 3), 255, np.uint8), r, FIT) for r in records]
    batch = collate(samples)
    assert batch.images.shape == (len(records), 3, 64, 64)
    assert batch.images.dtype == torch.uint8
    for image, (height, width), sample in zip(batch.images, batch.sizes, samples, strict=True):
        assert (height, width) == sample.size
        assert (image[:, :height, :width] == 255).all()
        assert not image[:, height:].any()
        assert not image[:, :, width:].any()


def test_boxes_keep_their_fractions_of_a_pixel(records: list[Record]) -> None:
    (batch,) = [b for b in ordered_batches(records, Fit(64), batch=9) if "001" in b.ids]
    scale = 64 / 64  # its longer side is 64 already
    found = batch.boxes[batch.ids.index("001")]
    np.testing.assert_allclose(found.numpy(), records[1].boxes * scale)
    assert found.dtype == torch.float32
    assert found[0, 0].item() == 1.25


def test_types_hold_for_pictures_without_objects(records: list[Record]) -> None:
    batch = next(ordered_batches(records[:1], FIT, batch=1))
    assert batch.boxes[0].shape == (0, 4)
    assert batch.boxes[0].dtype == torch.float32
    assert batch.labels[0].dtype == torch.int64
    assert batch.difficult[0].dtype == torch.bool


@pytest.mark.parametrize("batch", [1, 2, 4, 50])
def test_evaluation_sees_each_picture_once_with_its_like(records: list[Record], batch: int) -> None:
    batches = list(ordered_batches(records, FIT, batch=batch))
    assert Counter(names(batches)) == Counter(record.id for record in records)
    by_id = {record.id: record for record in records}
    for pictures in batches:
        assert len(pictures) <= batch
        assert {FIT.place(by_id[name].size).canvas for name in pictures.ids} == {tuple(pictures.images.shape[-2:])}


def test_evaluation_does_not_depend_on_its_batch(records: list[Record]) -> None:
    def pictures(batch: int) -> dict[str, bytes]:
        batches = ordered_batches(records, FIT, batch=batch)
        return {name: image.numpy().tobytes() for b in batches for name, image in zip(b.ids, b.images, strict=True)}

    assert pictures(1) == pictures(3)


# Pictures that go missing after the scan


def without(records: list[Record], *indices: int) -> list[Record]:
    """The same records, some of them without their file."""
    return [
        replace(record, image=record.image.with_name(f"gone_{record.id}.png")) if index in indices else record
        for index, record in enumerate(records)
    ]


def test_training_takes_another_and_names_the_missing(records: list[Record], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "boxwright"):
        epoch = list(islice(training(without(records, 1, 2), FIT, batch=1), len(records)))
    assert Counter(names(epoch)) == Counter({"000": 1, "003": 3, "004": 1, "005": 1, "006": 1})
    for missing in ("gone_001.png", "gone_002.png"):
        assert missing in caplog.text
    three = next(batch for batch in epoch if batch.ids == ("003",))
    assert len(three.boxes[0]) == len(records[3].boxes)  # with its own objects, not those of the missing


def test_evaluation_counts_the_objects_of_the_missing(records: list[Record], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "boxwright"):
        batches = list(ordered_batches(without(records, 1), FIT, batch=1))
    missing = next(batch for batch in batches if batch.ids == ("001",))
    assert not missing.images.any()
    assert len(missing.boxes[0]) == len(records[1].boxes) == 1
    assert "gone_001.png" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_when_all_are_gone_it_says_so(records: list[Record], workers: int) -> None:
    with pytest.raises(UserError, match=r"gone_00\d\.png"):
        next(training(without(records, *range(len(records))), FIT, batch=2, workers=workers))


# Pictures of similar aspect together


def aspects(count: int) -> Aspects:
    return Aspects(np.random.default_rng(0).uniform(0.5, 2, count).astype(np.float32))


@pytest.mark.parametrize(("count", "batch"), [(1, 4), (7, 2), (400, 3), (1000, 4), (12, 50)])
def test_a_grouped_epoch_has_every_picture_once(count: int, batch: int) -> None:
    seen = {tuple(grouped(aspects(count), batch, 1, epoch).tolist()) for epoch in range(3)}
    assert all(sorted(order) == list(range(count)) for order in seen)
    assert len(seen) == (3 if count > 1 else 1)
    assert tuple(grouped(aspects(count), batch, 1, 2).tolist()) in seen


def test_grouping_makes_a_batch_alike() -> None:
    known = aspects(1000)

    def spread(order: Any) -> float:
        batches = known.values[order[:1000]].reshape(-1, 4)
        return float(np.mean(batches.max(axis=1) - batches.min(axis=1)))

    assert spread(grouped(known, 4, 0, 0)) < spread(shuffled(1000, 0, 0)) / 20


def test_neighbours_change_from_epoch_to_epoch() -> None:
    known = aspects(1000)
    pairs = [{frozenset(pair) for pair in grouped(known, 2, 0, epoch).reshape(-1, 2).tolist()} for epoch in range(2)]
    assert len(pairs[0] & pairs[1]) < 50


@pytest.mark.parametrize("workers", [0, 2])
def test_grouped_batches_can_be_gone_on_with_and_shared(records: list[Record], workers: int) -> None:
    options: dict[str, Any] = {"batch": 3, "group_aspect": True, "augmentations": ARTICLE, "workers": workers}
    straight = list(islice(training(records, FIT, **options), 9))
    for epoch in (straight[:3], straight[3:6], straight[6:]):
        assert sorted(names(epoch)) == [record.id for record in records]
    assert digest(islice(training(records, FIT, start_step=4, **options), 5)) == digest(straight[4:])
    shares = [islice(training_batches(records, FIT, rank=rank, ranks=2, **options), 9) for rank in (0, 1)]
    for whole, both in zip(straight, zip(*shares, strict=True), strict=True):
        joined = [image for share in both for image in share.batch.images[: share.pictures]]
        assert torch.equal(torch.stack(joined), whole.images)


def test_the_step_of_a_place_is_where_it_comes() -> None:
    for order in (EpochOrder(11, 3, 5), EpochOrder(11, 3, 5, aspects(11))):
        assert all(order.step_of(place) == step for step in range(12) for place in order[step])


# Batches of several sizes


@pytest.mark.parametrize("workers", [0, 2])
def test_the_size_of_a_batch_is_drawn_from_its_step(records: list[Record], workers: int) -> None:
    options: dict[str, Any] = {"batch": 3, "multi_scale": (32, 128), "augmentations": ARTICLE, "workers": workers}
    straight = list(islice(training(records, FIT, **options), 30))
    sides = [max(batch.images.shape[2:]) for batch in straight]
    assert set(sides) == {32, 64, 96, 128}
    for batch, side in zip(straight, sides, strict=True):
        assert all(max(size) == side for size in batch.sizes)
    assert digest(islice(training(records, FIT, start_step=7, **options), 5)) == digest(straight[7:12])
    shares = [islice(training_batches(records, FIT, rank=rank, ranks=2, **options), 6) for rank in (0, 1)]
    for whole, both in zip(straight, zip(*shares, strict=True), strict=False):
        joined = [image for share in both for image in share.batch.images[: share.pictures]]
        assert torch.equal(torch.stack(joined), whole.images)


def test_boxes_follow_the_size_of_the_batch(records: list[Record]) -> None:
    by_id = {record.id: record for record in records}
    for batch in islice(training(records, FIT, batch=2, multi_scale=(32, 128)), 12):
        for name, (height, width), boxes in zip(batch.ids, batch.sizes, batch.boxes, strict=True):
            record = by_id[name]
            scale = np.array([width / record.size[1], height / record.size[0]] * 2, np.float32)
            np.testing.assert_allclose(boxes.numpy(), record.boxes * scale, rtol=1e-6)


def test_readers_have_room_for_the_largest_batch(records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("boxwright.data.feeding._read_here", lambda *_: pytest.fail("a slot was too small"))
    options: dict[str, Any] = {"batch": 7, "multi_scale": (32, 256), "scale_jitter": (0.5, 2.0)}
    sides = {batch.images.shape[2] for batch in islice(training(records, FIT, workers=2, **options), 20)}
    assert 256 in sides


# A picture that changed since the scan


def test_another_picture_under_the_name_is_no_picture_of_the_record(
    records: list[Record], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "other.png"
    Image.fromarray(np.full((64, 48, 3), 255, np.uint8)).save(path)
    changed = [replace(records[1], image=path, size=(48, 64)), records[2]]
    with caplog.at_level(logging.WARNING, "boxwright"):
        assert set(names(islice(training(changed, FIT, batch=1), 2))) == {"002"}
        assert not next(ordered_batches(changed[:1], FIT, batch=1)).images.any()
    assert "is 48x64 now, it was 64x48" in caplog.text


def test_without_a_gpu_nothing_is_pinned(records: list[Record]) -> None:
    batch = next(ordered_batches(records, FIT, batch=2))
    assert batch.images.dtype == torch.uint8
    assert not batch.images.is_pinned()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_batches_hold_the_same(records: list[Record]) -> None:
    plain = list(ordered_batches(records, FIT, batch=2))
    pinned = list(ordered_batches(records, FIT, batch=2, pinned=True))
    assert all(batch.images.is_pinned() for batch in pinned)
    assert digest(pinned) == digest(plain) == digest(batch.to("cuda").to("cpu") for batch in pinned)
