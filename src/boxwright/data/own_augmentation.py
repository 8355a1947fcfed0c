"""A user's own augmentation from a Python file (`--augment`): loaded, tried before training, checked at each sample.

The file defines `augment`, one of

    an Albumentations transform or Compose      its boxes, labels and flags are taken care of here
    a torchvision v2 transform                  is given the picture and {"boxes", "labels"}
    augment(image, boxes, labels, rng) -> (image, boxes, labels), with types.py's conventions

In each of them the label of a `difficult` object is ~label, a negative number, so that the flag goes wherever the
label goes.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from boxwright.data.article import A, reseed
from boxwright.data.transforms import VISIBLE, Augmentation, Fit, Labelled, cut, resized
from boxwright.types import Float32, Int64, UInt8, UserError, no_boxes

# (image (H, W, 3), boxes (N, 4), labels (N,) of which the difficult are ~label, rng) -> the same three, unchecked
Call = Callable[[UInt8, Float32, Int64, np.random.Generator], Any]

TRIAL_SIZE = (480, 640)  # pixels of the picture that is tried, before the Fit
TRIALS = 4  # an augmentation that acts by chance acts in one of them, likely
ROUNDING = 1.0  # pixels that a box may reach out of its picture, to be cut


def own_augmentation(path: Path, fit: Fit, *, classes: int) -> Augmentation:
    """The augmentation of a user's file, after a trial on a drawn picture with two boxes.

    Raises `UserError` in one line for a file that is not there, does not run, or whose result is not as it should be.
    """
    path = path.expanduser().resolve()
    _load.cache_clear()  # the file may have changed since
    own = _OwnAugmentation(path, fit.imgsz, classes)
    picture = _trial_picture(fit, classes)
    height, width = picture.image.shape[:2]
    try:
        for seed in range(TRIALS):
            once, again = (own(picture, np.random.default_rng(seed)) for _ in range(2))
            if not _same(once, again):
                raise UserError(f"{path}: is not the same twice; draw from the `rng` it is given and nothing else")
    except UserError as error:
        raise UserError(f"{error} (on trial, at a drawn picture of {width}x{height} with two boxes)") from error
    return own


def _trial_picture(fit: Fit, classes: int) -> Labelled:
    image = np.random.default_rng(0).integers(0, 256, (*TRIAL_SIZE, 3), np.uint8)
    placement = fit.place(TRIAL_SIZE)
    boxes = placement.to_canvas(np.array([[40.5, 60.25, 290, 330], [300, 180, 610, 450.75]], np.float32))
    labels = np.array([0, classes - 1], np.int64)
    return Labelled(resized(image, placement.content), boxes, labels, np.array([False, True]))


@dataclass(frozen=True)
class _OwnAugmentation:
    """What crosses into reading processes is the path: each loads the file for itself."""

    path: Path
    imgsz: int
    classes: int
    resizes = True  # it may turn a picture on its side, or crop it

    def __call__(self, picture: Labelled, rng: np.random.Generator) -> Labelled:
        augment = _load(self.path)
        codes = np.where(picture.difficult, ~picture.labels, picture.labels)  # (N,)
        image = np.array(picture.image)  # a copy, theirs to write on, as boxes and codes are
        try:
            with _globals_seeded(rng):
                result = augment(image, picture.boxes.copy(), codes, rng)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise UserError(f"{_where(self.path, error)}: {_reason(error)}") from error
        try:
            return cut(_checked(result, self.imgsz, self.classes))
        except _WrongResultError as error:
            raise UserError(f"{self.path}: {error}") from None


class _WrongResultError(Exception):
    """What is wrong with that which an augmentation gave back."""


def _checked(result: Any, imgsz: int, classes: int) -> Labelled:
    if not isinstance(result, tuple | list) or len(result) != 3:
        raise _WrongResultError(f"gives back {type(result).__name__}, wanted (image, boxes, labels)")
    try:
        image, boxes, codes = (np.asarray(part) for part in result)
    except Exception as error:
        raise _WrongResultError(f"gives back what is no array: {_reason(error)}") from error
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise _WrongResultError(
            f"gives back an image of {image.dtype} {image.shape}, wanted uint8 (H, W, 3): "
            "leave normalising and conversion to tensors out, the model does them"
        )
    height, width = image.shape[:2]
    if max(height, width) > imgsz:
        raise _WrongResultError(f"makes a picture of {width}x{height}, larger than --imgsz {imgsz}")
    if not boxes.size and not codes.size:  # of whatever shape and type an empty list makes
        boxes, codes = no_boxes(), np.zeros(0, np.int64)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.dtype.kind not in "fiu":
        raise _WrongResultError(f"gives back boxes of {boxes.dtype} {boxes.shape}, wanted numbers (N, 4): x1 y1 x2 y2")
    if codes.shape != (len(boxes),) or codes.dtype.kind not in "iu":
        raise _WrongResultError(f"gives back labels of {codes.dtype} {codes.shape} for {len(boxes)} boxes")
    _check_boxes(boxes, (height, width))
    if codes.dtype.kind == "u" and codes.size and codes.max() >= classes:  # as int64 it might turn negative
        raise _WrongResultError(f"gives back the label {codes.max()}, of {classes} classes the last is {classes - 1}")
    codes = codes.astype(np.int64)
    labels = np.where(codes < 0, ~codes, codes)
    if (labels >= classes).any():
        raise _WrongResultError(f"gives back the label {labels.max()}, of {classes} classes the last is {classes - 1}")
    return Labelled(np.ascontiguousarray(image), boxes.astype(np.float32), labels, codes < 0)


def _check_boxes(boxes: Any, size: tuple[int, int]) -> None:
    height, width = size
    least, most = -ROUNDING, np.array([width, height, width, height]) + ROUNDING
    for ok, what in (
        (np.isfinite(boxes).all(axis=1), "is not finite"),
        ((boxes[:, :2] <= boxes[:, 2:]).all(axis=1), "is turned over: wanted x1 y1 x2 y2"),
        (((boxes >= least) & (boxes <= most)).all(axis=1), f"lies outside of its picture of {width}x{height}"),
    ):
        if not ok.all():
            box = ", ".join(f"{value:g}" for value in boxes[~ok][0])
            raise _WrongResultError(f"gives back the box [{box}], which {what}")


@cache
def _load(path: Path) -> Call:
    """The file's `augment` behind one interface."""
    if not path.is_file():
        raise UserError(f"no augmentation file at {path}")
    name = f"boxwright_augment_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file: its name should end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        del sys.modules[name]
        raise UserError(f"{_where(path, error)} does not run: {_reason(error)}") from error
    augment = getattr(module, "augment", None)
    if augment is None:
        raise UserError(f"{path} defines no `augment`: an Albumentations or torchvision v2 transform, or a function")
    if isinstance(augment, A.BaseCompose | A.BasicTransform):
        return _albumentations(augment)
    if isinstance(augment, torch.nn.Module):
        return _torchvision(augment)
    if not callable(augment):
        raise UserError(f"{path}: `augment` is {type(augment).__name__}; wanted a transform or a function")
    return augment


def _albumentations(augment: A.BaseCompose | A.BasicTransform) -> Call:
    """Composed anew, so that boxes come in our format; what a user's own bbox_params drop is dropped."""
    compose = augment if isinstance(augment, A.Compose) else A.Compose([augment])
    limits: dict[str, Any] = {"min_visibility": VISIBLE}
    if "bboxes" in compose.processors:
        names = ("min_area", "min_visibility", "min_width", "min_height", "max_accept_ratio")
        limits = {name: getattr(compose.processors["bboxes"].params, name) for name in names}
    bbox_params = A.BboxParams("pascal_voc", ["labels"], clip=True, filter_invalid_bboxes=True, **limits)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Got processor for bboxes")  # where only pixels change
        pipeline = A.Compose(compose.transforms, bbox_params, p=compose.p)

    def call(image: UInt8, boxes: Float32, codes: Int64, rng: np.random.Generator) -> Any:
        reseed(pipeline, rng)
        made = pipeline(image=image, bboxes=boxes, labels=codes)
        return made["image"], made["bboxes"], np.asarray(made["labels"], np.int64)

    return call


def _torchvision(augment: torch.nn.Module) -> Call:
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional

    corners = tv_tensors.BoundingBoxFormat.XYXY
    bounding_boxes: Any = tv_tensors.BoundingBoxes  # its type hides how it is made

    def call(image: UInt8, boxes: Float32, codes: Int64, rng: np.random.Generator) -> Any:
        shape = (image.shape[0], image.shape[1])
        target: Any = {
            "boxes": bounding_boxes(torch.from_numpy(boxes), format=corners, canvas_size=shape),  # (N, 4)
            "labels": torch.from_numpy(codes),
        }
        made, target = augment(tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)), target)  # (3, H, W)
        found = functional.convert_bounding_box_format(target["boxes"], new_format=corners)
        return made.permute(1, 2, 0).numpy(), found.numpy(), target["labels"].numpy()

    return call


@contextmanager
def _globals_seeded(rng: np.random.Generator) -> Generator[None]:
    """Python's, NumPy's and PyTorch's global generators seeded from `rng`; afterwards they are as they were.

    torchvision draws from PyTorch's; that of a function written elsewhere may be any.
    """
    seed = int(rng.integers(2**32))
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed the GPUs too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


def _where(path: Path, error: BaseException) -> str:
    """path:line of the user's file where an error came from, or the path alone."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    return f"{path}:{lines[-1]}" if lines else str(path)


def _reason(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  a user's own
        text = "it cannot be printed"
    return f"{type(error).__name__}: {' '.join(text.split())[:300]}"


def _same(one: Labelled, other: Labelled) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("image", "boxes", "labels", "difficult")
    )
