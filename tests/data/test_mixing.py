"""Mixed, jittered and augmented pictures: under each box is its object, and each sample depends on its place alone.

The drawn objects are rectangles in the colour of their label, (255, 0, 0), (0, 255, 0) or (0, 0, 255), on black.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from boxwright.data.article import article_augmentation
from boxwright.data.loader import Samples, training_batches
from boxwright.data.mixing import UNMIXED, Mixing, Source, blend, mosaic, paste, place_mixed
from boxwright.data.own_augmentation import own_augmentation
from boxwright.data.transforms import (
    VISIBLE,
    Augmentation,
    Fit,
    Labelled,
    Scales,
    areas,
    cut,
    flip,
    jittered,
    random_flip,
)
from boxwright.types import Batch, Float32, Record, Sample, Size, UInt8, UserError, no_boxes

FIT = Fit(128)
ALL = Mixing(mosaic=0.5, mixup=0.5, copy_paste=0.5, until_epoch=3)
sizes = st.tuples(st.integers(24, 300), st.integers(24, 300))
seeds = st.integers(0, 2**32)
rng_of = np.random.default_rng


def drawn_source(size: Size, seed: int, count: int = 3) -> Source:
    """A picture of up to `count` rectangles that do not touch, at fractions of pixels only in name."""
    rng = np.random.default_rng(seed)
    image = np.zeros((*size, 3), np.uint8)
    boxes: list[list[int]] = []
    for column in range(count):  # one in each vertical strip
        left, right = size[1] * column // count, size[1] * (column + 1) // count - 1
        x1, x2 = np.sort(rng.choice(np.arange(left, right + 1), 2, replace=False))
        y1, y2 = np.sort(rng.choice(size[0] + 1, 2, replace=False))
        if x2 - x1 >= 3 and y2 - y1 >= 3:
            boxes.append([x1, y1, x2, y2])
    labels = rng.integers(0, 3, len(boxes))
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        image[y1:y2, x1:x2, label] = 255
    array = np.array(boxes, np.float32).reshape(-1, 4)
    record = Record(f"{seed}", Path(f"{seed}.png"), size, array, labels, labels == 2, np.zeros(len(boxes), bool))
    return image, record


def drawn_picture(size: Size, seed: int) -> Labelled:
    image, record = drawn_source(size, seed)
    return Labelled(image, record.boxes, record.labels, record.difficult)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("drawn")
    found: list[Record] = []
    for seed, size in enumerate([(96, 128), (128, 96), (60, 60), (300, 200), (40, 128), (128, 128), (90, 260)]):
        image, record = drawn_source(size, seed)
        found.append(replace(record, image=folder / f"{seed}.png"))
        Image.fromarray(image).save(folder / f"{seed}.png")
    return found


def assert_boxes_lie_in(boxes: Float32, size: Size) -> None:
    height, width = size
    assert boxes.dtype == np.float32
    assert np.isfinite(boxes).all()
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    assert (boxes >= -1e-3).all()
    assert (boxes <= np.array([width, height, width, height]) + 1e-3).all()


def assert_colours_fit(image: UInt8, boxes: Float32, labels: Sequence[int], *, least: int, share: float) -> None:
    """Of each box's inner pixels at least that share shows `least` of its label's colour."""
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        rows, columns = slice(int(np.ceil(y1)), int(y2)), slice(int(np.ceil(x1)), int(x2))
        inside = image[rows, columns, label]
        if inside.size and min(inside.shape) >= 3:  # the edges of smaller ones are blurred through
            assert (inside >= least).mean() >= share, (label, (x1, y1, x2, y2))


# Scale jitter


@given(st.sampled_from([64, 96, 128]), st.booleans(), sizes, seeds)
def test_jitter_by_one_is_the_fit(imgsz: int, square: bool, size: Size, seed: int) -> None:
    fit = Fit(imgsz, square)
    source = drawn_source(size, seed)
    plain, same = fit.place(size).put(*source), jittered(fit, size, (1.0, 1.0), rng_of(seed)).put(*source)
    np.testing.assert_array_equal(same.image, plain.image)
    np.testing.assert_array_equal(same.boxes, plain.boxes)


@given(st.booleans(), sizes, seeds, st.floats(0.05, 4), st.floats(0.05, 4))
def test_jitter_places_a_part_that_can_be_found_again(
    square: bool, size: Size, seed: int, one: float, other: float
) -> None:
    fit = Fit(128, square)
    placement = jittered(fit, size, (min(one, other), max(one, other)), rng_of(seed))
    assert placement.canvas == fit.largest_canvas
    boxes = drawn_source(size, seed)[1].boxes
    np.testing.assert_allclose(placement.to_picture(placement.to_canvas(boxes)), boxes, rtol=0, atol=1e-2)
    for side, start, part, content in zip(size, placement.corner, placement.part, placement.content, strict=True):
        assert 0 <= start <= start + part <= side
        assert 1 <= content <= 128
        assert part == side or content == 128  # cut only where the canvas is full


@given(st.floats(0.1, 2), sizes, seeds)
@example(1.78125, (24, 42), 0)  # cut by less than half a pixel of the picture: all of it is the part
def test_jitter_scales_by_the_factor(factor: float, size: Size, seed: int) -> None:
    placement = jittered(FIT, size, (factor, factor), rng_of(seed))
    for part, content in zip(placement.part, placement.content, strict=True):
        exact = factor * 128 / max(size)
        cut_off = content == 128  # then the part is whole pixels of the picture, else the content of the canvas
        assert content / part == pytest.approx(exact, abs=0.51 / part + (exact * 0.51 / part if cut_off else 0))


def test_a_jittered_part_lies_anywhere() -> None:
    corners = {jittered(FIT, (100, 100), (2.0, 2.0), rng_of(seed)).corner for seed in range(400)}
    for axis in (0, 1):
        assert {corner[axis] for corner in corners} == set(range(51))


# What is cut


@given(sizes, st.lists(st.tuples(*[st.floats(-200, 400, width=32)] * 4), max_size=8))
def test_cutting_keeps_what_shows_enough(size: Size, corners: list[tuple[float, ...]]) -> None:
    boxes = np.array(corners, np.float32).reshape(-1, 4)
    boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
    labels = np.arange(len(boxes))
    out = cut(Labelled(np.zeros((*size, 3), np.uint8), boxes, labels, labels % 2 == 0))
    assert_boxes_lie_in(out.boxes, size)
    np.testing.assert_array_equal(out.difficult, out.labels % 2 == 0)
    height, width = size
    for label, (x1, y1, x2, y2) in enumerate(boxes.astype(np.float64)):
        seen = max(min(x2, width) - max(x1, 0), 0) * max(min(y2, height) - max(y1, 0), 0)
        share = seen / max((x2 - x1) * (y2 - y1), 1e-9)
        if label in out.labels:
            assert share >= VISIBLE - 1e-4
        elif min(min(x2, width) - max(x1, 0), min(y2, height) - max(y1, 0)) > 1.001:
            assert share <= VISIBLE + 1e-4


# Mosaic


@given(st.sampled_from([32, 48, 128]), st.booleans(), st.lists(sizes, min_size=4, max_size=4), seeds)
def test_a_mosaics_tiles_are_four_rectangles_without_gaps(imgsz: int, square: bool, of: list[Size], seed: int) -> None:
    sources = []
    for number, size in enumerate(of):
        record = Record("it", Path("it"), size, no_boxes(), np.zeros(0, np.int64), *[np.zeros(0, bool)] * 2)
        sources.append((np.full((*size, 3), 10 + number, np.uint8), record))
    image = mosaic(sources, Fit(imgsz, square), rng_of(seed)).image
    assert image.shape == (imgsz, imgsz, 3)
    area = 0
    for number in range(4):
        rows, columns = np.nonzero(image[..., 0] == 10 + number)
        assert (np.ptp(rows) + 1) * (np.ptp(columns) + 1) == len(rows) >= (imgsz // 4) ** 2  # a filled rectangle
        area += len(rows)
    assert area == imgsz**2


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1)])
def test_the_thinnest_pictures_fill_their_tiles(size: Size) -> None:
    record = Record("it", Path("it"), size, np.array([[0, 0, size[1], size[0]]], np.float32), np.array([0]),
                    *[np.zeros(1, bool)] * 2)  # fmt: skip
    out = mosaic([(np.full((*size, 3), 200, np.uint8), record)] * 4, FIT, rng_of(0))
    assert (out.image == 200).all()
    assert_boxes_lie_in(out.boxes, (128, 128))


@settings(max_examples=50)
@given(sizes, seeds)
def test_objects_in_a_mosaic_are_no_larger_than_in_their_picture(size: Size, seed: int) -> None:
    source = drawn_source(size, seed)
    out = mosaic([source] * 4, FIT, rng_of(seed))
    assert_boxes_lie_in(out.boxes, (128, 128))
    assert_colours_fit(out.image, out.boxes, out.labels.tolist(), least=100, share=0.8)
    assert len(out.boxes) <= 4 * len(source[1].boxes)
    assert set(out.labels) <= set(source[1].labels)


# Mixup


@given(sizes, sizes, seeds)
def test_mixup_shows_both_pictures_and_has_the_objects_of_both(one: Size, other: Size, seed: int) -> None:
    first, second = drawn_picture(one, seed), drawn_picture(other, seed + 1)
    out = blend(first, second, rng_of(seed))
    assert out.image.shape[:2] == (max(one[0], other[0]), max(one[1], other[1]))
    for name in ("boxes", "labels", "difficult"):
        joined = np.concatenate([getattr(first, name), getattr(second, name)])
        np.testing.assert_array_equal(getattr(out, name), joined)
    assert_colours_fit(out.image, out.boxes, out.labels.tolist(), least=40, share=1.0)


# Pasted objects


@settings(max_examples=60)
@given(sizes, sizes, seeds)
def test_pasting_leaves_no_box_over_what_is_hidden(one: Size, other: Size, seed: int) -> None:
    first, second = drawn_picture(one, seed), drawn_picture(other, seed + 1)
    before = first.image.copy(), first.boxes.copy()
    out = paste(first, second, rng_of(seed))
    assert_boxes_lie_in(out.boxes, one)
    assert_colours_fit(out.image, out.boxes, out.labels.tolist(), least=255, share=VISIBLE * 0.7)  # of inner pixels
    np.testing.assert_array_equal(out.difficult, out.labels == 2)
    np.testing.assert_array_equal(first.image, before[0])  # what was given stays
    np.testing.assert_array_equal(first.boxes, before[1])


def one_object(size: Size, label: int) -> Labelled:
    """A picture that is one object from edge to edge, in the grey of its label."""
    box = np.array([[0, 0, size[1], size[0]]], np.float32)
    return Labelled(np.full((*size, 3), label, np.uint8), box, np.array([label]), np.array([False]))


def test_an_object_covered_from_edge_to_edge_keeps_the_box_of_what_shows() -> None:
    covered: set[int] = set()
    for seed in range(100):
        out = paste(one_object((20, 70), 0), one_object((20, 50), 1), rng_of(seed))
        columns = np.flatnonzero(out.image[0, :, 0] == 0)
        x1, y1, x2, y2 = out.boxes[out.labels == 0][0]
        assert (x1, y1, x2, y2) == (columns[0], 0, columns[-1] + 1, 20)
        assert areas(out.boxes[out.labels == 1]).tolist() == [1000]
        covered.add(int(out.boxes[out.labels == 1][0, 0]))
    assert {0, 20} < covered  # to either edge, and between


@pytest.mark.parametrize(("width", "kept"), [(32, False), (30, True)])  # of 39: 18 % and 23 % show
def test_an_object_covered_but_for_a_fifth_goes(width: int, kept: bool) -> None:
    for seed in range(10):
        out = paste(one_object((20, 39), 0), one_object((20, width), 1), rng_of(seed))
        assert (0 in out.labels) == kept
        assert 1 in out.labels


def test_pasting_prefers_free_ground() -> None:
    flags = np.array([False])
    image = np.zeros((200, 200, 3), np.uint8)
    picture = Labelled(image, np.array([[0, 0, 100, 200]], np.float32), np.array([0]), flags)
    small = Labelled(image[:40, :40] + 9, np.array([[0, 0, 40, 40]], np.float32), np.array([1]), flags)
    overlaps = [paste(picture, small, rng_of(seed)).boxes[1, 0] < 100 for seed in range(200)]
    assert np.mean(overlaps) < 0.1  # of a random place more than half would


def test_difficult_objects_are_not_chosen_for_pasting() -> None:
    picture, other = drawn_picture((100, 100), 1), drawn_picture((100, 100), 2)
    hard = replace(other, difficult=np.ones(len(other.labels), bool))
    assert paste(picture, hard, rng_of(0)) is picture


# All together, through `Samples`

OWN = """
import albumentations as A
augment = A.Compose([A.RandomRotate90(p=0.5), A.RandomSizedBBoxSafeCrop(100, 90, p=0.3), A.VerticalFlip(p=0.5)])
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Augmentation:
    path = tmp_path_factory.mktemp("own") / "turn.py"
    path.write_text(OWN, encoding="utf-8")
    return own_augmentation(path, FIT, classes=3)


def all_samples(samples: Samples, epochs: Iterable[int]) -> list[Sample]:
    return [samples[(epoch, index)] for epoch in epochs for index in range(len(samples))]


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("scales", [None, (0.3, 2.0)])
@pytest.mark.parametrize(
    "mixing",
    [UNMIXED, Mixing(mosaic=1), Mixing(copy_paste=1), Mixing(mixup=1), Mixing(1, 0, 1), Mixing(1, 1, 1), ALL],
    ids=str,
)
def test_under_every_box_is_its_colour(
    records: list[Record], own: Augmentation, square: bool, scales: Scales | None, mixing: Mixing
) -> None:
    fit = Fit(128, square)
    samples = Samples(records, fit, (random_flip(0.5), own), 1, scale_jitter=scales, mixing=mixing)
    made = all_samples(samples, range(3))
    mixed = mixing.mixup > 0
    for sample in made:
        assert_boxes_lie_in(sample.boxes, sample.size)
        assert len(sample.boxes) == len(sample.labels) == len(sample.difficult)
        np.testing.assert_array_equal(sample.difficult, sample.labels == 2)
        assert not sample.image[sample.size[0] :].any()
        assert not sample.image[:, sample.size[1] :].any()
        covered = mixing.copy_paste > 0
        share = VISIBLE * 0.7 if covered else 0.75
        assert_colours_fit(sample.image, sample.boxes, sample.labels.tolist(), least=40 if mixed else 100, share=share)
    assert sum(len(sample.boxes) for sample in made) > len(made)
    if scales or mixing != UNMIXED:
        assert {sample.image.shape for sample in made} == {(128, 128, 3)}


@pytest.mark.parametrize("off", [UNMIXED, Mixing(until_epoch=40), Mixing(1, 1, 1, until_epoch=0)], ids=str)
def test_off_is_the_fit_and_nothing_else(records: list[Record], off: Mixing) -> None:
    for epoch, (index, record) in ((e, r) for e in range(2) for r in enumerate(records)):
        sample = Samples(records, FIT, (random_flip(0.5),), 7, mixing=off)[(epoch, index)]
        rng = np.random.default_rng([7, epoch, index])  # the flip is the first draw, the network's seed the next
        picture = FIT.place(record.size).put(np.asarray(Image.open(record.image)), record)
        picture = flip(picture) if rng.random() < 0.5 else picture
        height, width = sample.size
        np.testing.assert_array_equal(sample.image[:height, :width], picture.image)
        np.testing.assert_array_equal(sample.boxes, picture.boxes)
        assert sample.seed == int(rng.integers(2**62))
        assert sample.image.shape[:2] == FIT.place(record.size).canvas


def same(one: Sample, other: Sample) -> bool:
    arrays = ("image", "boxes", "labels", "difficult")
    return (one.id, one.size, one.seed) == (other.id, other.size, other.seed) and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays
    )


def test_from_the_epoch_on_nothing_is_mixed(records: list[Record]) -> None:
    plain = Samples(records, FIT, (random_flip(0.5),), scale_jitter=(0.5, 1.5))
    mixing = replace(plain, mixing=ALL)
    assert all(map(same, all_samples(mixing, (3, 4, 50)), all_samples(plain, (3, 4, 50))))
    assert not all(map(same, all_samples(mixing, (2,)), all_samples(plain, (2,))))


def test_nothing_is_drawn_for_what_is_off(records: list[Record]) -> None:
    rng, untouched = rng_of(3), rng_of(3)

    def another() -> Source:
        raise AssertionError("no other picture is asked for")

    image = np.asarray(Image.open(records[0].image))
    place_mixed((image, records[0]), another, FIT, UNMIXED, None, rng)
    assert rng.bit_generator.state == untouched.bit_generator.state


def test_the_asked_share_is_mixed(records: list[Record]) -> None:
    plain = {record.id: FIT.place(record.size).content for record in records}
    told = [index for index, record in enumerate(records) if plain[record.id] != (128, 128)]  # by its size
    samples = Samples(records, FIT, mixing=Mixing(mosaic=0.3))
    made = [samples[(epoch, index)] for epoch in range(60) for index in told]
    assert np.mean([sample.size != plain[sample.id] for sample in made]) == pytest.approx(0.3, abs=0.12)  # 5 deviations


# What they do not depend on


def digest(batches: Iterable[Batch]) -> str:
    total = hashlib.sha256()
    for batch in batches:
        total.update(repr((batch.ids, batch.sizes, batch.seeds, tuple(batch.images.shape))).encode())
        for tensor in (batch.images, *batch.boxes, *batch.labels, *batch.difficult):
            total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def test_workers_change_nothing(records: list[Record], own: Augmentation) -> None:
    chosen = (random_flip(0.5), article_augmentation(), own)
    made = {}
    for workers in (0, 1, 2):
        batches = training_batches(
            records, FIT, batch=3, augmentations=chosen, scale_jitter=(0.3, 2.0), mixing=ALL, seed=5, workers=workers
        )
        made[workers] = digest(share.batch for share in islice(batches, 12))
    assert len(set(made.values())) == 1, made


def test_the_shares_of_two_processes_are_the_batch_of_one(records: list[Record], own: Augmentation) -> None:
    wide = [record for record in records if FIT.place(record.size).canvas[0] < 128]  # chance makes some square

    def shares(rank: int, ranks: int, mixing: Mixing, *augmentations: Augmentation) -> list[Batch]:
        batches = training_batches(
            wide, FIT, batch=2, augmentations=augmentations, mixing=mixing, rank=rank, ranks=ranks
        )
        return [share.batch for share in islice(batches, 12) if share.of == 2]

    for chosen in ((Mixing(mosaic=0.3, until_epoch=4),), (UNMIXED, own)):
        for whole, first, second in zip(*(shares(*of, *chosen) for of in ((0, 1), (0, 2), (1, 2))), strict=True):
            assert first.images.shape == second.images.shape
            np.testing.assert_array_equal(whole.images, np.concatenate([first.images, second.images]))


def test_samples_cross_into_a_spawned_process(records: list[Record], own: Augmentation) -> None:
    samples = Samples(records, FIT, (own,), 3, scale_jitter=(0.3, 2.0), mixing=ALL)
    again = pickle.loads(pickle.dumps(samples))
    assert all(map(same, all_samples(samples, (1,)), all_samples(again, (1,))))


# Pictures that go missing


def test_an_unreadable_neighbour_is_replaced_and_named(records: list[Record], caplog: pytest.LogCaptureFixture) -> None:
    gone = [replace(record, image=record.image.with_name("gone.png")) if index else record
            for index, record in enumerate(records)]  # fmt: skip
    sample = Samples(gone, FIT, mixing=Mixing(mosaic=1.0))[(0, 0)]
    assert sample.image.any()
    assert "gone.png: cannot be read" in caplog.text
    with pytest.raises(UserError, match=r"gone\.png"):
        Samples(gone[1:], FIT, mixing=Mixing(mosaic=1.0))[(0, 0)]
