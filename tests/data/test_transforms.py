"""A picture comes onto its canvas and back without moving, and nothing that was given is changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from boxwright.data.transforms import MULTIPLE, Fit, Labelled, flip, make_sample, pad, random_flip
from boxwright.types import Float32, Record, Size, UInt8, no_boxes

sides = st.integers(1, 4096)
sizes = st.tuples(sides, sides)
fits = st.builds(Fit, st.integers(2, 64).map(lambda n: 16 * n), st.booleans())


def boxes_in(size: Size, fractions: list[list[float]]) -> Float32:
    """Boxes (N, 4) of a picture from corners as fractions of its sides."""
    corners = np.sort(np.array(fractions, np.float64).reshape(-1, 2, 2), axis=1)  # (N, corner, x y)
    return (corners * (size[1], size[0])).reshape(-1, 4).astype(np.float32)


def picture_of(size: Size, seed: int = 0) -> UInt8:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def record_of(size: Size, boxes: Float32) -> Record:
    count = len(boxes)
    flags = np.arange(count) % 2 == 1
    return Record("it", Path("it.jpg"), size, boxes, np.arange(count), flags, np.zeros(count, bool))


def labelled(image: UInt8, boxes: Float32) -> Labelled:
    count = len(boxes)
    return Labelled(image, boxes, np.arange(count), np.arange(count) % 2 == 1)


quadruples = st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), max_size=4)


# The way there and back


@given(fits, sizes, quadruples)
def test_to_picture_inverts_to_canvas(fit: Fit, size: Size, fractions: list[list[float]]) -> None:
    boxes = boxes_in(size, fractions)
    place = fit.place(size)
    on_canvas = place.to_canvas(boxes)
    height, width = place.content
    assert (on_canvas >= 0).all()
    assert (on_canvas <= np.array([width, height, width, height]) * (1 + 1e-6)).all()
    np.testing.assert_allclose(place.to_picture(on_canvas), boxes, rtol=0, atol=1e-3)


@given(fits, sizes)
def test_boxes_are_cut_at_the_pictures_edges(fit: Fit, size: Size) -> None:
    wide = np.array([[-50, -50, 9999, 9999]], np.float32)
    height, width = size
    assert fit.place(size).to_picture(wide).tolist() == [[0, 0, width, height]]


def test_no_boxes_stay_no_boxes() -> None:
    place = Fit(64).place((30, 40))
    assert place.to_canvas(no_boxes()).shape == place.to_picture(no_boxes()).shape == (0, 4)


# Sizes


@given(fits, sizes)
@example(Fit(640), (1, 3000))
@example(Fit(640), (3000, 1))
@example(Fit(32), (4096, 1))
def test_the_canvas_holds_the_picture_and_suits_every_stride(fit: Fit, size: Size) -> None:
    place = fit.place(size)
    for content, canvas in zip(place.content, place.canvas, strict=True):
        assert 1 <= content <= canvas < content + MULTIPLE
        assert canvas % MULTIPLE == 0
    assert max(place.content) == fit.imgsz


@given(fits, sizes)
def test_square_stretches_and_else_the_aspect_is_kept(fit: Fit, size: Size) -> None:
    height, width = fit.place(size).content
    if fit.square:
        assert (height, width) == (fit.imgsz, fit.imgsz)
    else:
        exact = [side * fit.imgsz / max(size) for side in size]
        assert [height, width] == pytest.approx(exact, abs=1)


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1)])
def test_thin_pictures_are_resized_too(size: Size, square: bool) -> None:
    fit = Fit(96, square)
    sample = make_sample(picture_of(size), record_of(size, no_boxes()), fit)
    assert sample.size == fit.place(size).content
    assert sample.image.shape == (*fit.place(size).canvas, 3)


# Pixels


@given(
    st.sampled_from([96, 160]),
    st.booleans(),
    st.tuples(st.integers(40, 400), st.integers(40, 400)),
    st.lists(st.floats(0.1, 0.9), min_size=4, max_size=4),
)
def test_pixels_and_boxes_move_together(imgsz: int, square: bool, size: Size, fractions: list[float]) -> None:
    x1, y1, x2, y2 = boxes_in(size, [fractions])[0].round().astype(int)
    x2, y2 = max(x2, x1 + size[1] // 8), max(y2, y1 + size[0] // 8)
    image = np.zeros((*size, 3), np.uint8)
    image[y1:y2, x1:x2] = 255
    drawn = np.array([[x1, y1, min(x2, size[1]), min(y2, size[0])]], np.float32)
    fit = Fit(imgsz, square)
    sample = make_sample(image, record_of(size, drawn), fit)
    bright = sample.image[..., 0] > 127
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert sample.boxes[0] == pytest.approx(seen, abs=1)


def test_a_fine_pattern_shrinks_to_its_mean() -> None:
    image = np.zeros((256, 256, 3), np.uint8)
    image[:, ::4] = 255  # linear interpolation at 1/4 would see all of the lines or none
    assert Fit(64).resize(image).mean() == pytest.approx(255 / 4, abs=2)


def test_padding_is_black_and_below_and_right() -> None:
    image = np.full((20, 40, 3), 200, np.uint8)
    canvas = pad(image, (32, 64))
    assert canvas.shape == (32, 64, 3)
    assert (canvas[:20, :40] == 200).all()
    assert not canvas[20:].any()
    assert not canvas[:, 40:].any()


# Flipping


@given(st.tuples(st.integers(1, 300), st.integers(1, 300)), quadruples)
def test_flipping_twice_changes_nothing_and_once_keeps_sizes(size: Size, fractions: list[list[float]]) -> None:
    picture = labelled(picture_of((2, size[1])), boxes_in(size, fractions))
    once = flip(picture)
    twice = flip(once)
    np.testing.assert_array_equal(twice.image, picture.image)
    np.testing.assert_allclose(twice.boxes, picture.boxes, atol=1e-3)
    np.testing.assert_allclose(
        once.boxes[:, 2:] - once.boxes[:, :2], picture.boxes[:, 2:] - picture.boxes[:, :2], atol=1e-3
    )
    assert (once.boxes[:, 0] <= once.boxes[:, 2]).all()
    np.testing.assert_array_equal(once.labels, picture.labels)
    np.testing.assert_array_equal(once.difficult, picture.difficult)


def test_a_flipped_box_still_holds_its_object() -> None:
    image = np.zeros((10, 30, 3), np.uint8)
    image[2:6, 4:11] = 255
    mirrored = flip(labelled(image, np.array([[4, 2, 11, 6]], np.float32)))
    x1, y1, x2, y2 = mirrored.boxes[0].astype(int)
    assert (x1, y1, x2, y2) == (19, 2, 26, 6)
    assert (mirrored.image[y1:y2, x1:x2] == 255).all()
    assert mirrored.image.sum() == image.sum()


def test_the_asked_share_is_flipped() -> None:
    picture = labelled(np.arange(2, dtype=np.uint8)[None, :, None].repeat(3, axis=2), no_boxes())
    augment = random_flip(0.3)
    flipped = sum(int(augment(picture, np.random.default_rng(seed)).image[0, 0, 0]) for seed in range(1000))
    assert flipped == pytest.approx(300, abs=60)  # four standard deviations
    assert random_flip(0.0)(picture, np.random.default_rng(0)) is picture


# What was given stays


@pytest.mark.parametrize("size", [(64, 64), (64, 100), (20, 20)])
def test_nothing_given_is_changed(size: Size) -> None:
    image, boxes = picture_of(size), boxes_in(size, [[0.1, 0.2, 0.7, 0.9], [0, 0, 1, 1]])
    record = record_of(size, boxes)
    before = image.copy(), boxes.copy(), record.labels.copy(), record.difficult.copy()
    sample = make_sample(image, record, Fit(64), (random_flip(1.0),), np.random.default_rng(0))
    sample.boxes[:] = -1  # neither is what comes out a view of what went in
    for given_array, copy in zip((image, boxes, record.labels, record.difficult), before, strict=True):
        np.testing.assert_array_equal(given_array, copy)


def test_augmentations_come_one_after_another_before_the_padding() -> None:
    seen: list[tuple[int, ...]] = []

    def darken(picture: Labelled, rng: np.random.Generator) -> Labelled:
        seen.append(picture.image.shape)
        return Labelled(picture.image // 2, picture.boxes, picture.labels, picture.difficult)

    image = np.full((40, 80, 3), 200, np.uint8)
    sample = make_sample(image, record_of((40, 80), no_boxes()), Fit(80), (darken, darken), np.random.default_rng(0))
    assert seen == [(40, 80, 3), (40, 80, 3)]
    assert sample.size == (40, 80)
    assert sample.image.shape == (64, 96, 3)
    assert (sample.image[:40, :80] == 50).all()
