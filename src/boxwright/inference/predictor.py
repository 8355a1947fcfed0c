"""A detector with everything it needs to read any picture: `Predictor.load(path).predict(image)`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from PIL import ImageOps

from boxwright.data.cache import Cache
from boxwright.data.images import decode
from boxwright.data.loader import TIMEOUT, collate, ordered_batches
from boxwright.data.transforms import Fit, finish
from boxwright.models import checkpoint
from boxwright.types import Batch, Detections, Member, Record, Sample, Size, UInt8, UserError, no_boxes

if TYPE_CHECKING:
    from PIL.Image import Image


class Detector(Protocol):
    """What a predictor asks of a model: pictures on a canvas in, boxes in canvas pixels out."""

    def predict(self, batch: Batch) -> list[Detections]: ...


class Predictor:
    """Pictures of any size → `Detections` in their own pixels."""

    def __init__(
        self, detector: Detector, classes: Sequence[str], fit: Fit, device: torch.device | str = "cpu"
    ) -> None:
        self.detector = detector
        self.classes = tuple(classes)
        self.fit = fit
        self.device = torch.device(device)
        self.threshold = 0.5  # from which score on a detection is worth showing

    @classmethod
    def load(
        cls, path: Path | str, *, device: str = "auto", imgsz: int | None = None, square: bool | None = None
    ) -> Predictor:
        """From a checkpoint. Pictures are fitted as they were in training, unless `imgsz` or `square` say otherwise."""
        chosen = choose_device(device)
        detector, header = checkpoint.load(Path(path))
        trained = Fit(**header.fit)
        fit = replace(trained, imgsz=imgsz or trained.imgsz, square=trained.square if square is None else square)
        predictor = cls(cast(Detector, detector.to(chosen)), header.classes, fit, chosen)
        predictor.threshold = header.threshold
        return predictor

    def predict(self, image: UInt8 | str | Path | Member | Image, *, threshold: float = 0.0) -> Detections:
        """Boxes in one picture: a path, an (H, W, 3) uint8 RGB array, or a PIL image."""
        return self.predict_many([image], threshold=threshold)[0]

    def predict_many(
        self, images: Sequence[UInt8 | str | Path | Member | Image], *, threshold: float = 0.0
    ) -> list[Detections]:
        """As `predict` for several pictures; those of one canvas go through the network together."""
        samples, sizes = zip(*map(self._sample, images), strict=True) if images else ((), ())
        found: dict[int, Detections] = {}
        for canvas in {s.image.shape for s in samples}:
            here = [i for i, s in enumerate(samples) if s.image.shape == canvas]
            for i, detections in zip(here, self._run(collate([samples[i] for i in here])), strict=True):
                found[i] = self._to_picture(detections, sizes[i]).above(threshold)
        return [found[i] for i in range(len(samples))]

    def _sample(self, image: UInt8 | str | Path | Member | Image) -> tuple[Sample, Size]:
        """A picture on its canvas, and its own size; one from a file is read as training and evaluation read it."""
        if isinstance(image, str | Path | Member):
            pixels, size = self.fit.read(Path(image) if isinstance(image, str) else image)
        else:
            array = as_array(image)
            pixels, size = self.fit.resize(array), (array.shape[0], array.shape[1])
        record = _blank_record(size)
        return finish(self.fit.place(size).label(pixels, record), record), size

    def predict_records(self, records: Sequence[Record], *, batch: int = 1, workers: int = 0) -> list[Detections]:
        """Boxes for every record, in the records' order."""
        found = dict(self.each_record(records, batch=batch, workers=workers))
        return [found[i] for i in range(len(records))]

    def each_record(
        self,
        records: Sequence[Record],
        *,
        batch: int = 1,
        workers: int = 0,
        rank: int = 0,
        ranks: int = 1,
        timeout: float = TIMEOUT,
        cache: Cache | None = None,
    ) -> Iterator[tuple[int, Detections]]:
        """(index of the record, its boxes), in the order in which they are ready: this rank's share of them."""
        index = {record.id: i for i, record in enumerate(records)}
        for pictures in ordered_batches(
            records, self.fit, batch=batch, workers=workers, rank=rank, ranks=ranks, timeout=timeout,
            cache=cache, pinned=self.device.type == "cuda",
        ):  # fmt: skip
            for name, found in zip(pictures.ids, self._run(pictures), strict=True):
                yield index[name], self._to_picture(found, records[index[name]].size)

    def _run(self, batch: Batch) -> list[Detections]:
        with torch.inference_mode():
            return self.detector.predict(batch.to(self.device))

    def _to_picture(self, found: Detections, size: Any) -> Detections:
        boxes = self.fit.place((int(size[0]), int(size[1]))).to_picture(found.boxes)
        return Detections(boxes, found.scores, found.labels)


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one; a device that is not there is a `UserError`."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}; there are auto, cpu, cuda, cuda:0, mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch sees no CUDA GPU here. Use --device cpu, or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from cuda:0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: PyTorch sees no Apple GPU here. Use --device cpu, or auto")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: only cpu, cuda and mps are supported")
    return device


def as_array(image: UInt8 | str | Path | Image) -> UInt8:
    """Any accepted picture as (H, W, 3) uint8 RGB."""
    if isinstance(image, str | Path):
        return decode(Path(image))
    array = np.asarray(image if isinstance(image, np.ndarray) else _upright(image))
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise UserError(f"a picture must be uint8 RGB of shape (H, W, 3), not {array.dtype} {array.shape}")
    return cast(UInt8, array)


def _upright(image: Image) -> Image:
    """As `decode` would give it: RGB, turned as its EXIF says."""
    if image.mode.startswith(("I", "F")):
        raise UserError(f"a PIL picture of mode {image.mode} has no agreed way to 8 bits: convert it to RGB first")
    return ImageOps.exif_transpose(image).convert("RGB")


def _blank_record(size: Size) -> Record:
    none = np.zeros(0)
    return Record("", Path(), size, no_boxes(), none.astype(np.int64), none.astype(bool), none.astype(bool))
