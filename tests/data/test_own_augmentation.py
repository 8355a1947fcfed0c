"""A user's own augmentation: three kinds of file, objects carried along whole, counted randomness, mistakes told."""

from __future__ import annotations

import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from boxwright.data.loader import Samples, training_batches
from boxwright.data.own_augmentation import own_augmentation
from boxwright.data.transforms import Augmentation, Fit, Labelled
from boxwright.types import Record, UserError

FIT = Fit(160)
CLASSES = 5
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "augmentation.md"

ALBUMENTATIONS = """
import albumentations as A
augment = A.Compose([A.HorizontalFlip(p=0.5), A.RandomBrightnessContrast(p=0.5), A.Affine(translate_px=(-60, 60), p=1)])
"""
OWN_PARAMETERS = """
import albumentations as A
augment = A.Compose(
    [A.HorizontalFlip(p=0.5), A.RandomCrop(100, 100)],
    bbox_params=A.BboxParams(format="coco", label_fields=["class_labels"], min_visibility=0.6),
)
"""
ONE_TRANSFORM = """
import albumentations as A
augment = A.OneOf([A.HorizontalFlip(p=1), A.VerticalFlip(p=1)], p=0.8)
"""
PIXELS_ONLY = """
import albumentations as A
augment = A.Compose([A.GaussNoise(p=1), A.RandomGamma(p=0.5)])
"""
TORCHVISION = """
from torchvision.transforms import v2
sanitize = v2.SanitizeBoundingBoxes()
augment = v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(0.3, 0.3), v2.RandomCrop(100), sanitize])
"""
TORCHVISION_FORMAT = """
from torchvision.transforms import v2
augment = v2.Compose([v2.RandomVerticalFlip(), v2.ConvertBoundingBoxFormat("CXCYWH")])
"""
FUNCTION = """
import numpy as np

def augment(image, boxes, labels, rng):
    if rng.random() < 0.5:
        boxes[:, [0, 2]] = image.shape[1] - boxes[:, [2, 0]]
        image[:] = image[:, ::-1].copy()
    order = rng.permutation(len(labels))[: rng.integers(len(labels) + 1)]
    return image, boxes[order], labels[order]
"""
GLOBAL_DRAWS = """
import random
import numpy as np
import torch

def augment(image, boxes, labels, rng):
    image[0, 0] = random.randrange(256), np.random.randint(256), torch.randint(256, ()).item()
    return image, boxes, labels
"""
FILES = {
    name.lower(): text
    for name, text in globals().items()
    if name.isupper() and isinstance(text, str) and "augment" in text
}

Load = Callable[[str], Augmentation]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "mine.py"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def load(write: Callable[[str], Path]) -> Load:
    return lambda text: own_augmentation(write(text), FIT, classes=CLASSES)


def coloured(seed: int = 0, size: tuple[int, int] = (120, 160)) -> Labelled:
    """Five grey rectangles whose brightness says their label, the odd ones difficult, on black."""
    labels = np.random.default_rng(seed).permutation(CLASSES)
    image = np.zeros((*size, 3), np.uint8)
    boxes = np.array([[4 + 30 * n, 10 + 5 * n, 4 + 30 * n + 24, 60 + 10 * n] for n in range(CLASSES)], np.float32)
    for (x1, y1, x2, y2), label in zip(boxes.astype(int), labels, strict=True):
        image[y1:y2, x1:x2] = 50 * (label + 1)
    return Labelled(image, boxes, labels, labels % 2 == 1)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Objects


@pytest.mark.parametrize("kind", ["albumentations", "own_parameters", "one_transform", "torchvision", "function"])
def test_objects_move_with_their_pixels_labels_and_flags(load: Load, kind: str) -> None:
    augment = load(
        FILES[kind].replace("A.RandomBrightnessContrast(p=0.5), ", "").replace("v2.ColorJitter(0.3, 0.3), ", "")
    )
    kept = 0
    for seed in range(40):
        picture = coloured(seed)
        before = picture.image.copy(), picture.boxes.copy()
        out = augment(picture, np.random.default_rng(seed))
        np.testing.assert_array_equal(picture.image, before[0])
        np.testing.assert_array_equal(picture.boxes, before[1])
        assert (out.image.dtype, out.boxes.dtype, out.labels.dtype) == (np.uint8, np.float32, np.int64)
        np.testing.assert_array_equal(out.difficult, out.labels % 2 == 1)
        for (x1, y1, x2, y2), label in zip(out.boxes, out.labels, strict=True):
            inside = out.image[round(y1) + 1 : round(y2) - 1, round(x1) + 1 : round(x2) - 1]
            assert (inside == 50 * (label + 1)).mean() > 0.95 if inside.size else True
        kept += len(out.labels)
    assert kept > 40


def test_pixels_alone_leave_boxes_as_they_are(load: Load) -> None:
    picture = coloured()
    picture = Labelled(picture.image, picture.boxes + np.float32(0.37), picture.labels, picture.difficult)
    out = load(PIXELS_ONLY)(picture, np.random.default_rng(0))
    np.testing.assert_allclose(out.boxes, picture.boxes, rtol=0, atol=1e-3)
    assert not np.array_equal(out.image, picture.image)


def test_a_users_own_bbox_parameters_hold(load: Load) -> None:
    def kept(text: str) -> int:
        augment = load(text)
        return sum(len(augment(coloured(), np.random.default_rng(seed)).labels) for seed in range(40))

    assert kept(OWN_PARAMETERS) < kept(OWN_PARAMETERS.replace("min_visibility=0.6", "min_visibility=0.01"))


def test_boxes_in_another_format_come_back_as_corners(load: Load) -> None:
    augment = load(TORCHVISION_FORMAT)
    picture = coloured()
    for seed in range(8):
        out = augment(picture, np.random.default_rng(seed))
        np.testing.assert_allclose(out.boxes[:, [0, 2]], picture.boxes[:, [0, 2]], atol=1e-3)


@pytest.mark.parametrize("kind", list(FILES))
def test_a_picture_without_objects_passes(load: Load, kind: str) -> None:
    picture = coloured().keep(np.zeros(0, np.int64), np.zeros((0, 4), np.float32))
    for seed in range(4):
        out = load(FILES[kind])(picture, np.random.default_rng(seed))
        assert (out.boxes.shape, out.labels.shape, out.difficult.shape) == ((0, 4), (0,), (0,))


# Randomness


@pytest.mark.parametrize("kind", list(FILES))
def test_what_comes_out_depends_on_the_generator_alone(load: Load, kind: str) -> None:
    augment = load(FILES[kind])
    again = pickle.loads(pickle.dumps(augment))

    def images(augment: Augmentation, seeds: range) -> list[bytes]:
        return [augment(coloured(), np.random.default_rng(seed)).image.tobytes() for seed in seeds]

    forwards = images(augment, range(12))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert images(augment, range(11, -1, -1))[::-1] == forwards == images(again, range(12))
    assert len(set(forwards)) > 1


@pytest.mark.parametrize("kind", ["torchvision", "global_draws", "albumentations"])
def test_global_generators_are_left_as_they_were(load: Load, kind: str) -> None:
    augment = load(FILES[kind])
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    augment(coloured(), np.random.default_rng(0))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_albumentations_draws_each_transform_by_itself(load: Load) -> None:
    augment = load("import albumentations as A\naugment = A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)])")
    outcomes = {augment(coloured(), np.random.default_rng(seed)).image.tobytes() for seed in range(40)}
    assert len(outcomes) == 4  # with one seed for all, both would flip or none


# The door

HOSTILE = {  # files, and what is said to them
    "class Odd(Exception):\n    def __str__(self): raise RuntimeError\n"
    "def augment(image, boxes, labels, rng): raise Odd": "Odd: it cannot be printed",
    "class Odd(BaseException): pass\ndef augment(image, boxes, labels, rng): raise Odd('no')": "Odd: no",
    "class Odd:\n    def __array__(self, *_, **__): raise KeyError('x')\n"
    "def augment(image, boxes, labels, rng): return image, Odd(), labels": "gives back what is no array: KeyError",
    "import numpy as np\ndef augment(image, boxes, labels, rng):\n"
    "    return image, boxes, np.full(len(boxes), 2**64 - 1, np.uint64)": "gives back the label 18446744073709551615",
    "class Odd(BaseException): pass\nraise Odd('early')": "Odd: early",
}


@pytest.mark.parametrize(("text", "reason"), HOSTILE.items())
def test_whatever_a_file_does_is_told_in_one_line(load: Load, text: str, reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        load(text)
    assert "\n" not in str(caught.value)


FUNCTIONS = {  # what one gives back, and what is said to it
    "image": "gives back ndarray, wanted (image, boxes, labels)",
    "image / 255, boxes, labels": "an image of float64 (120, 160, 3)",
    "image[..., 0], boxes, labels": "an image of uint8 (120, 160)",
    "image[:0], boxes, labels": "an image of uint8 (0, 160, 3)",
    "image.repeat(2, 0), boxes, labels": "larger than --imgsz 160",
    "image, boxes[:1], labels": "labels of int64 (2,) for 1 boxes",
    "image, boxes, labels / 2": "labels of float64 (2,) for 2 boxes",
    "image, boxes * float('nan'), labels": "is not finite",
    "image, boxes + 90, labels": "outside of its picture of 160x120",
    "image, boxes[:, ::-1], labels": "turned over",
    "image, boxes[:, :2], labels": "boxes of float32 (2, 2)",
    "image, [[1, 2], [3]], labels": "no array",
    "image, boxes, labels * 0 + 5": "the label 5, of 5 classes the last is 4",
    "image, boxes, labels['a']": "mine.py:2: IndexError",
}
MISTAKES = {
    f"def augment(image, boxes, labels, rng):\n    return {gives}": said for gives, said in FUNCTIONS.items()
} | {
    "augment = 3": "`augment` is int; wanted a transform or a function",
    "x = 1": "defines no `augment`",
    "import nowhere_at_all": "mine.py:1 does not run: ModuleNotFoundError",
    "\n\ndef augment(:": "mine.py:3 does not run: SyntaxError",
    "raise SystemExit(3)": "mine.py:1 does not run: SystemExit",
    "def augment(image, boxes, labels):\n    pass": "TypeError",
    "import albumentations as A\naugment = A.RandomCrop(400, 400)": "CropSizeError",
    "import albumentations as A\naugment = A.Compose([A.HorizontalFlip(), A.ToFloat()])": "leave normalising",
    "import torch\nfrom torchvision.transforms import v2\naugment = v2.ToDtype(torch.float32)": "an image of float32",
    GLOBAL_DRAWS.replace("np.random.randint", "own.integers") + "own = np.random.default_rng()": "not the same twice",
}


@pytest.mark.parametrize(("text", "reason"), MISTAKES.items(), ids=list(MISTAKES.values()))
def test_a_mistake_is_told_in_one_line_before_training(load: Load, tmp_path: Path, text: str, reason: str) -> None:
    told = refusal(lambda: load(text))
    assert str(tmp_path / "mine.py") in told
    assert reason in told


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "no augmentation file at" in refusal(lambda: own_augmentation(tmp_path / "no.py", FIT, classes=2))


LATER = """
def augment(image, boxes, labels, rng):
    if len(boxes) != 2:
        return image, boxes, labels[:0]
    return image, boxes, labels
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_at_a_sample_names_file_picture_and_reason(load: Load, drawn_record: Record, workers: int) -> None:
    augment = load(LATER)
    told = refusal(
        lambda: next(training_batches([drawn_record], FIT, batch=1, augmentations=(augment,), workers=workers))
    )
    assert "mine.py: gives back labels of int64 (0,) for 5 boxes" in told
    assert str(drawn_record.image) in told


@pytest.fixture
def drawn_record(tmp_path: Path) -> Record:
    from PIL import Image

    picture = coloured()
    Image.fromarray(picture.image).save(tmp_path / "drawn.png")
    size = (picture.image.shape[0], picture.image.shape[1])
    flags = np.zeros(CLASSES, bool)
    return Record("drawn", tmp_path / "drawn.png", size, picture.boxes, picture.labels, picture.difficult, flags)


def test_a_file_that_has_changed_is_read_anew(load: Load) -> None:
    text = "def augment(image, boxes, labels, rng):\n    return image * 0 + 7, boxes, labels"
    for value in "789":
        out = load(text.replace("7", value))(coloured(), np.random.default_rng(0))
        assert (out.image == int(value)).all()


# The guide

EXAMPLES = [block.split("```")[0] for block in GUIDE.read_text(encoding="utf-8").split("```python\n")[1:]]


@pytest.mark.parametrize("text", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_guides_examples_run(load: Load, drawn_record: Record, text: str) -> None:
    samples = Samples([drawn_record], FIT, (load(text),))
    made = [samples[(epoch, 0)] for epoch in range(12)]
    assert len({sample.image.tobytes() for sample in made}) > 1
    for sample in made:
        np.testing.assert_array_equal(sample.difficult, sample.labels % 2 == 1)


def test_the_guide_has_an_example_of_each_kind() -> None:
    kinds = ("albumentations", "torchvision", "def augment")
    assert all(sum(kind in text for text in EXAMPLES) == 1 for kind in kinds)
