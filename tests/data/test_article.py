"""The article's augmentations: its list and shares, objects carried along whole, randomness counted."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boxwright.data.article import article_augmentation, article_faults
from boxwright.data.transforms import Augmentation, Labelled
from boxwright.types import UInt8, no_boxes


@pytest.fixture(scope="module")
def augment() -> Augmentation:
    return article_augmentation()


def picture_of(size: tuple[int, int] = (24, 32), boxes: Any = (), seed: int = 0) -> Labelled:
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    labels = np.arange(len(boxes))[::-1] + 3
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return Labelled(image, boxes, labels, labels % 2 == 0)


def test_the_list_is_the_articles(augment: Augmentation) -> None:
    transforms = augment.args[0].transforms  # of the `partial`
    assert [(type(t).__name__, t.p) for t in transforms] == [
        ("OneOf", 0.5),
        ("ToGray", 0.1),
        ("RandomBrightnessContrast", 0.1),
        ("ColorJitter", 0.1),
        ("RandomGamma", 0.1),
    ]
    blurs = transforms[0].transforms
    assert [(type(t).__name__, t.p) for t in blurs] == [("Blur", 0.5), ("MotionBlur", 0.5), ("MedianBlur", 0.5)]
    for blur in blurs:
        assert tuple(np.atleast_1d(blur.blur_limit))[-1] == 3
    # All else is as Albumentations has it by default, as in the article.
    for transform in transforms[1:]:
        defaults = type(transform)(p=0.1)
        names = [name for name in inspect.signature(type(transform)).parameters if hasattr(defaults, name)]
        assert {n: getattr(transform, n) for n in names} == {n: getattr(defaults, n) for n in names}


def test_the_shares_are_the_articles(augment: Augmentation) -> None:
    picture = picture_of((16, 16))
    runs = 1000
    made = [augment(picture, np.random.default_rng(seed)).image for seed in range(runs)]
    grey = sum(bool((image == image[..., :1]).all()) for image in made)
    same = sum(bool((image == picture.image).all()) for image in made)
    assert grey == pytest.approx(0.1 * runs, abs=40)  # four standard deviations
    assert same == pytest.approx(0.5 * 0.9**4 * runs, abs=60)  # which says that each is drawn by itself


def test_transforms_are_drawn_independently(augment: Augmentation, monkeypatch: pytest.MonkeyPatch) -> None:
    # Albumentations' own seeding gives every transform the same stream: on 9 of 10 pictures it does nothing but blur.
    acted: list[str] = []
    for transform in augment.args[0].transforms[1:]:

        def spy(
            *given: Any, original: Any = transform.apply_with_params, name: str = str(transform), **more: Any
        ) -> Any:
            acted.append(name)
            return original(*given, **more)

        monkeypatch.setattr(transform, "apply_with_params", spy)
    together = Counter[int]()
    for seed in range(1000):
        acted.clear()
        augment(picture_of((16, 16)), np.random.default_rng(seed))
        together[len(acted)] += 1
    assert together[0] == pytest.approx(0.9**4 * 1000, abs=60)
    assert together[1] == pytest.approx(4 * 0.1 * 0.9**3 * 1000, abs=58)
    assert together[4] <= 3  # one in 10,000


def sides(low: float, high: float) -> st.SearchStrategy[tuple[float, float]]:
    """Edges in 0 .. 1, some at the border, some a hair apart."""
    edge = st.floats(low, high, width=32) | st.sampled_from([0.0, 1.0])
    return st.tuples(edge, edge).map(sorted).filter(lambda pair: pair[1] - pair[0] > 0.004).map(tuple)


objects = st.lists(st.tuples(sides(0, 1), sides(0, 1)), max_size=6)


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.tuples(st.integers(16, 80), st.integers(16, 80)), objects)
def test_every_object_keeps_its_box_label_and_flag(seed: int, size: tuple[int, int], drawn: Any) -> None:
    height, width = size
    boxes = [[x1 * width, y1 * height, x2 * width, y2 * height] for (x1, x2), (y1, y2) in drawn]
    picture = picture_of(size, boxes)
    out = MADE(picture, np.random.default_rng(seed))
    np.testing.assert_allclose(out.boxes, picture.boxes, rtol=0, atol=1e-3)  # never cut to whole pixels
    np.testing.assert_array_equal(out.labels, picture.labels)
    np.testing.assert_array_equal(out.difficult, picture.difficult)
    assert out.boxes.dtype == np.float32
    assert (out.labels.dtype, out.difficult.dtype) == (picture.labels.dtype, np.bool_)


MADE = article_augmentation()  # hypothesis and fixtures of a narrower scope do not mix


def test_pixels_stay_bytes_of_the_same_size_and_the_given_ones_stay_as_they_are(augment: Augmentation) -> None:
    picture = picture_of((24, 32), [[1.5, 2.5, 10.25, 20]])
    before = picture.image.copy(), picture.boxes.copy()
    for seed in range(60):
        out = augment(picture, np.random.default_rng(seed))
        assert out.image.dtype == np.uint8
        assert out.image.shape == picture.image.shape
    np.testing.assert_array_equal(picture.image, before[0])
    np.testing.assert_array_equal(picture.boxes, before[1])


def test_a_picture_without_objects_passes(augment: Augmentation) -> None:
    out = augment(picture_of(), np.random.default_rng(1))
    assert out.boxes.shape == no_boxes().shape
    assert out.labels.shape == out.difficult.shape == (0,)


def images(augment: Augmentation, seeds: range) -> list[UInt8]:
    return [augment(picture_of(), np.random.default_rng(seed)).image for seed in seeds]


def test_what_comes_out_depends_on_the_generator_alone(augment: Augmentation) -> None:
    forwards = images(augment, range(40))
    backwards = images(augment, range(39, -1, -1))[::-1]
    np.random.seed(1)
    another = images(article_augmentation(), range(40))
    for image, later, elsewhere in zip(forwards, backwards, another, strict=True):
        np.testing.assert_array_equal(image, later)
        np.testing.assert_array_equal(image, elsewhere)
    assert len({image.tobytes() for image in forwards}) > 20  # and it does depend on it


def test_it_crosses_into_another_process(augment: Augmentation) -> None:
    # Where processes are spawned rather than forked (macOS, Windows), reading workers get it pickled.
    again = pickle.loads(pickle.dumps(augment))
    for image, there in zip(images(augment, range(20)), images(again, range(20)), strict=True):
        np.testing.assert_array_equal(image, there)


IMPORT = """
import sys
asked = []
sys.addaudithook(lambda event, values: asked.append(event) if event.startswith(("socket.", "urllib.")) else None)
import boxwright.data.article
network = [event for event in asked if event not in ("socket.__new__", "socket.gethostname")]
sys.exit(f"asked the network: {network}" if network else 0)
"""


def test_importing_it_asks_no_network() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@given(objects)
def test_the_faults_cut_boxes_to_integers_and_forget_what_is_difficult(drawn: Any) -> None:
    boxes = [[x1 * 32, y1 * 24, x2 * 32, y2 * 24] for (x1, x2), (y1, y2) in drawn]
    picture = picture_of((24, 32), boxes)
    out = article_faults(picture, np.random.default_rng(0))
    whole = np.trunc(picture.boxes)
    has_area = (whole[:, 2] > whole[:, 0]) & (whole[:, 3] > whole[:, 1])  # without, the network refuses them
    np.testing.assert_array_equal(out.boxes, whole[has_area])
    np.testing.assert_array_equal(out.labels, picture.labels[has_area])
    assert out.boxes.dtype == np.float32
    assert not out.difficult.any()
    assert out.image is picture.image
