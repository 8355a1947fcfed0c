"""Predict on whatever `--input` names and write it down.

outputs/inference/<name>/
├── <picture>.jpg            each picture with its boxes, in its own size
├── <video>.mp4              each video, in its own size, rate and number of frames
└── predictions.json         every box, in the pixels of the original
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from boxwright.data.images import decode
from boxwright.inference.draw import draw
from boxwright.inference.media import Frame, Source, Video, read_video
from boxwright.inference.output import VideoWriter, unique_names, write_image, write_text
from boxwright.inference.predictor import Predictor
from boxwright.inference.window import LiveWindow
from boxwright.progress import Progress
from boxwright.types import Detections, UInt8, UserError

Say = Callable[[str], None]


@dataclass
class Predicted:
    """What came of a prediction."""

    folder: Path
    pictures: int = 0
    frames: int = 0
    objects: int = 0
    skipped: list[str] = field(default_factory=list)  # inputs that could not be read, each with the reason


@dataclass(frozen=True)
class Style:
    """Which boxes are kept, and how they are shown."""

    threshold: float = 0.5
    only: frozenset[int] | None = None  # labels; None for all
    names: bool = True  # class and score beside each box
    show: bool = False  # a live window
    batch: int = 1  # frames of a video at once


def predict_sources(
    predictor: Predictor, sources: Sequence[Source], folder: Path, style: Style, say: Say = lambda _: None
) -> Predicted:
    """Predict on every source; annotated copies and predictions.json go into `folder`.

    A source that cannot be read is skipped and told by `say`; when none can be, that is a `UserError`.
    """
    result = Predicted(folder)
    names = unique_names(Path(source.name) for source in sources)
    found: list[dict[str, Any]] = []
    with LiveWindow("boxwright") if style.show else nullcontext() as window:
        pen = _Pen(predictor, style, window, result)
        progress = Progress("input", len(sources), say)
        for number, source in enumerate(sources):
            progress(number)
            target = folder / names[Path(source.name)]
            try:
                if source.kind == "image":
                    found.append(pen.picture(source.path, target))
                else:
                    found.append(
                        pen.video(read_video(source), source.name, target.with_name(target.name + ".mp4"), say)
                    )
            except UserError as error:
                if error.exit_code != UserError.exit_code or len(sources) == 1:
                    raise  # the disk, not the source; or nothing else to do
                say(f"skipped: {error}")
                result.skipped.append(str(error))
            if pen.closed:
                say("the window was closed: stopped here")
                break
    if not found:
        raise UserError(f"none of {len(sources)} inputs could be read; the first: {result.skipped[0]}")
    head = {"classes": predictor.classes, "threshold": style.threshold}
    write_text(folder / "predictions.json", json.dumps({**head, "results": found}, ensure_ascii=False) + "\n")
    return result


class _Pen:
    """Predicts, draws, shows and counts."""

    def __init__(self, predictor: Predictor, style: Style, window: LiveWindow | None, result: Predicted) -> None:
        self.predictor, self.style, self.window, self.result = predictor, style, window, result
        self.closed = False

    def picture(self, path: Path, target: Path) -> dict[str, Any]:
        image = decode(path)
        (found,) = self._predict([path if self.predictor.fit.decode_scaled else image])
        suffix = ".png" if path.suffix.lower() == ".png" else ".jpg"
        write_image(target.with_name(target.name + suffix), self._annotate(image, found))
        self.result.pictures += 1
        return {"image": str(path), "size": image.shape[:2], "detections": self._as_json(found)}

    def video(self, video: Video, name: str, target: Path, say: Say) -> dict[str, Any]:
        frames: list[dict[str, Any]] = []
        size = 1 if self.window else self.style.batch
        progress = Progress(f"{name}: frame", video.frames_estimate, say)
        with VideoWriter(target, video.rate, video.size, clock=video.clock) as writer:
            for chunk in _chunks(video.frames(), size):
                for frame, found in zip(chunk, self._predict([f.image for f in chunk]), strict=True):
                    writer.write(self._annotate(frame.image, found), frame.time)
                    frames.append({"time": float(frame.time), "detections": self._as_json(found)})
                progress(len(frames))
                if self.closed:
                    break
        self.result.frames += len(frames)
        if video.lost:
            self.result.skipped.append(f"{name}: {video.lost} frames are damaged or missing")
        return {"video": name, "size": video.size, "rate": float(video.rate), "frames": frames}

    def _predict(self, images: Sequence[UInt8 | Path]) -> list[Detections]:
        only = self.style.only
        found = self.predictor.predict_many(images, threshold=self.style.threshold)
        if only is not None:
            found = [f[[int(label) in only for label in f.labels]] for f in found]
        self.result.objects += sum(len(f) for f in found)
        return found

    def _annotate(self, image: UInt8, found: Detections) -> UInt8:
        annotated = draw(image, found, self.predictor.classes, labels=self.style.names)
        if self.window and not self.window.show(annotated):
            self.closed = True
        return annotated

    def _as_json(self, found: Detections) -> list[dict[str, Any]]:
        return [
            {"class": self.predictor.classes[label], "score": round(float(score), 4), "box": _rounded(box)}
            for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True)
        ]


def _rounded(box: Iterable[float]) -> list[float]:
    return [round(float(edge), 2) for edge in box]  # a hundredth of a pixel


def _chunks(frames: Iterator[Frame], size: int) -> Iterator[list[Frame]]:
    while chunk := list(islice(frames, size)):
        yield chunk
