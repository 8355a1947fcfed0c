"""Drawing changes its copy only, keeps a class's colour, and shows boxes and tags inside the picture."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from boxwright.inference import draw as module
from boxwright.inference.draw import colour, contact_sheet, draw, draw_truth
from boxwright.types import Detections, UInt8

CLASSES = [f"class{index}" for index in range(100)]
GREY = (99, 98, 97)  # no class has it, black and white text neither


def canvas(height: int, width: int) -> UInt8:
    return np.full((height, width, 3), GREY, np.uint8)


def detections(*boxes: tuple[float, float, float, float], labels: list[int] | None = None) -> Detections:
    count = len(boxes)
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.linspace(0.99, 0.5, count, dtype=np.float32),
        np.array(labels if labels is not None else range(count), np.int64),
    )


def drawn_with(image: UInt8, label: int) -> tuple[int, int, int, int]:
    """The extent x1 y1 x2 y2 of the pixels in a class's colour."""
    rows, columns = np.nonzero((image == colour(label)).all(axis=2))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


# Colours


def oklab(rgb: tuple[int, int, int]) -> np.ndarray:
    """Perceived colour: B. Ottosson, 'A perceptual color space for image processing', 2020."""
    c = np.array(rgb) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return to_lab @ np.cbrt(to_lms @ linear)


def test_classes_are_told_apart_by_colour() -> None:
    colours = [oklab(colour(label)) for label in range(28)]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)) > 0.1
    assert len({colour(label) for label in range(1000)}) > 300


def test_tags_contrast_with_their_text() -> None:
    for label in range(200):
        light = module._luminance(colour(label))
        contrast = max((light + 0.05) / 0.05, 1.05 / (light + 0.05))
        assert contrast >= 4.5  # WCAG 2.1, AA


def test_a_class_has_its_colour_whatever_else_is_there() -> None:
    box = (20.0, 30.0, 60.0, 80.0)
    alone = draw(canvas(100, 200), detections(box, labels=[7]), CLASSES, labels=False)
    among = draw(canvas(100, 200), detections(box, (120, 30, 170, 80), labels=[7, 3]), CLASSES, labels=False)
    truth = draw_truth(canvas(100, 200), np.array([box], np.float32), np.array([7]), CLASSES[:8])
    assert drawn_with(alone, 7) == drawn_with(among, 7)
    assert (truth[30, 20] == colour(7)).all()


# Boxes


def test_the_line_lies_on_the_box_and_scales_with_the_picture() -> None:
    widths = []
    for scale in (1, 4, 20):
        box = (50.0 * scale, 40.0 * scale, 150.0 * scale, 120.0 * scale)
        image = draw(canvas(200 * scale, 200 * scale), detections(box), CLASSES, labels=False)
        x1, y1, x2, y2 = drawn_with(image, 0)
        assert np.abs(np.array([x1, y1, x2, y2]) - box).max() <= scale
        row = (image[(y1 + y2) // 2] == colour(0)).all(axis=1)
        assert not row[x1 + (x2 - x1) // 4 : x2 - (x2 - x1) // 4].any()  # hollow
        widths.append(int(row[: x1 + (x2 - x1) // 2].sum()))
    assert widths[0] == 1
    assert widths[0] < widths[1] < widths[2] < 20


def test_truth_is_dashed_with_whole_corners() -> None:
    box = np.array([[20, 30, 180, 170]], np.float32)
    image = draw_truth(canvas(200, 200), box, np.array([0]), ["a"])
    left = (image[31:170, 20] == colour(0)).all(axis=1)
    assert 0.3 < left.mean() < 0.8
    for y, x in ((30, 179), (169, 20), (169, 179)):
        assert (image[y, x] == colour(0)).all()


def test_boxes_at_and_over_the_edge_stay_visible() -> None:
    edge = detections((0, 0, 100, 80), (-50, -50, 30, 30), (90, 70, 500, 500), (99.5, 79.5, 100, 80))
    image = draw(canvas(80, 100), edge, CLASSES, labels=False)
    assert drawn_with(image, 0) == (0, 0, 100, 80)
    assert drawn_with(image, 1)[2:] == (30, 30)
    assert drawn_with(image, 2)[:2] == (90, 70)


def test_the_best_is_on_top() -> None:
    box = (10.0, 10.0, 60.0, 60.0)
    image = draw(canvas(80, 100), detections(box, box, labels=[0, 1]), CLASSES, labels=False)
    assert (image[10, 10:60] == colour(0)).all()


coordinates = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    boxes=hnp.arrays(np.float32, st.tuples(st.integers(0, 8), st.just(4)), elements=coordinates),
    name=st.text(max_size=12),
)
def test_the_given_picture_stays(size: tuple[int, int], boxes: np.ndarray, name: str) -> None:
    image = canvas(*size)
    corners = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], 1)
    labels = np.zeros(len(boxes), np.int64)
    found = Detections(corners, np.full(len(boxes), 0.5, np.float32), labels)
    for result in (draw(image, found, [name]), draw_truth(image, corners, labels, [name])):
        assert result.shape == image.shape
        assert result.dtype == np.uint8
        assert not np.shares_memory(result, image)
    assert (image == GREY).all()


def test_read_only_and_reversed_pictures_are_drawn_on_alike() -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    found = detections((5, 15, 40, 50))
    frozen = image.copy()
    frozen.setflags(write=False)
    bgr = np.ascontiguousarray(image[..., ::-1])
    assert (draw(frozen, found, CLASSES) == draw(image, found, CLASSES)).all()
    assert (draw(bgr[..., ::-1], found, CLASSES) == draw(image, found, CLASSES)).all()


def test_nothing_found_changes_nothing() -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    assert (draw(image, Detections(), CLASSES) == image).all()


# Tags


def tag_pixels(box: tuple[float, float, float, float], name: str, size: tuple[int, int]) -> np.ndarray:
    """The mask of what a tag changed."""
    found = detections(box, labels=[0])
    with_tag = draw(canvas(*size), found, [name])
    return (with_tag != draw(canvas(*size), found, [name], labels=False)).any(axis=2)


@pytest.mark.parametrize(
    "box",
    [(0, 0, 30, 30), (280, 0, 300, 40), (0, 180, 20, 200), (285, 190, 300, 200), (0, 0, 300, 200)],
)
def test_tags_stay_whole_inside_the_picture(box: tuple[float, float, float, float]) -> None:
    here = draw(canvas(200, 300), detections(box, labels=[0]), ["person"])
    middle = draw(canvas(200, 300), detections((100, 100, 101, 101), labels=[0]), ["person"])
    ink = [int((image.max(axis=2) < 80).sum()) for image in (here, middle)]  # pixels of the text
    assert ink[0] == ink[1] > 30


def test_text_grows_with_the_picture() -> None:
    heights = []
    for scale in (1, 3, 20):
        box = (50.0 * scale, 100.0 * scale, 150.0 * scale, 150.0 * scale)
        rows = np.nonzero(tag_pixels(box, "dog", (200 * scale, 200 * scale)).any(axis=1))[0]
        heights.append(int(rows.max() - rows.min()) + 1)
    assert 10 <= heights[0] < heights[1] < heights[2]
    assert heights[2] < 200  # of 4000


@pytest.mark.parametrize("name", ["собака", "κύων", "façade", "Straßenbahn", "شجرة", "Việt"])
def test_letters_beyond_ascii_are_drawn(name: str) -> None:
    box = (20.0, 60.0, 90.0, 90.0)
    unknown = tag_pixels(box, "\U0010ffff" * len(name), (200, 300))  # a letter that no font has
    assert (tag_pixels(box, name, (200, 300)) != unknown).any()
    assert module._has_letters(module._font_file(name), name)


def test_long_names_are_cut_and_the_score_kept() -> None:
    assert module._fit_text("person", " 0.93", 10, 300) == "person 0.93"
    cut = module._fit_text("a very long name of a class indeed", " 0.93", 10, 120)
    assert cut.startswith("a very")
    assert cut.endswith("… 0.93")
    assert module._fit_text("person", " 0.93", 10, 8) == ""
    assert module._fit_text("two\nlines", "", 10, 300) == "two lines"


def test_neighbours_do_not_hide_each_others_tags() -> None:
    boxes = [(60.0 + dx, 80.0 + dy, 160.0 + dx, 160.0 + dy) for dx, dy in ((0, 0), (4, 2), (8, -3), (-5, 4))]
    outlines = [tuple(int(v) for v in box) for box in boxes]
    sizes = [(70, 14)] * len(boxes)
    places = module._place_tags(outlines, sizes, (320, 240))
    spans = [(x, y, x + 70, y + 14) for x, y in places]
    for a, b in itertools.combinations(spans, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


# Sheets


def test_a_sheet_holds_every_picture_in_its_cell() -> None:
    images = [np.full((h, w, 3), 40 * i, np.uint8) for i, (h, w) in enumerate([(50, 100), (100, 50), (3, 3)])]
    sheet = contact_sheet(images, 2, (80, 80))
    assert sheet.shape == (2 * 80 + 3 * 2, 2 * 80 + 3 * 2, 3)
    assert (sheet[2 + 40, 2 + 40] == 0).all()
    assert (sheet[2 + 40, 84 + 40] == 40).all()
    assert (sheet[84 + 40, 2 + 40] == 80).all()
    assert (sheet[84 + 40, 84 + 40] == 255).all()  # no fourth picture
    assert (sheet[2 + 5, 2 + 40] == 255).all()  # a wide picture keeps its shape
