"""Pictures → their pixels, decoded in several processes: which are damaged, of one colour, or equal."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import NamedTuple

from boxwright.data.check.finding import Finding, Picture
from boxwright.data.images import ImageError, decode
from boxwright.data.placing import Say
from boxwright.progress import Progress

_CHUNK = 32  # pictures that a process is given at once


class Pixels(NamedTuple):
    """What the pixels of a dataset show."""

    findings: list[Finding]
    equal: list[list[Picture]]  # groups of pictures with the same pixels


class _Look(NamedTuple):
    """What the pixels of one picture show."""

    digest: bytes
    colour: str | None  # of all pixels, if it is one
    damaged: str | None  # why there are none


def look_at_pixels(pictures: Mapping[Picture, Sequence[str]], *, workers: int, say: Say) -> Pixels:
    """Decode every picture; `pictures` has the splits of each. `workers` 0 does it in this process.

    Raises `ReadingError` at the first picture that a server does not give: the next ones would fail alike.
    """
    progress = Progress("decoded", len(pictures), say)
    findings: list[Finding] = []
    alike: defaultdict[bytes, list[Picture]] = defaultdict(list)
    for done, (path, look) in enumerate(_looks(list(pictures), workers), 1):
        progress(done)
        for split in pictures[path]:
            if look.damaged:
                reason = look.damaged
                findings.append(
                    Finding(split, "damaged-picture", "lost", reason, "leaves the picture out", "skipped image", path)
                )
            elif look.colour:
                reason = f"every pixel is {look.colour}"
                findings.append(Finding(split, "one-colour", "suspect", reason, "uses it", path=path, image=path))
        if not look.damaged and not look.colour:
            alike[look.digest].append(path)
    return Pixels(findings, [paths for paths in alike.values() if len(paths) > 1])


def _looks(paths: Sequence[Picture], workers: int) -> Iterator[tuple[Picture, _Look]]:
    if workers < 1:
        for path in paths:
            yield path, _look(path)
        return
    # Started afresh: a fork would copy the locks of threads that this process may have.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start) as pool:
        chunks = (paths[at : at + _CHUNK] for at in range(0, len(paths), _CHUNK))
        waiting = [(chunk, pool.submit(_look_at, chunk)) for chunk in islice(chunks, 4 * workers)]
        try:
            while waiting:  # in order, and never more than a few results in memory
                chunk, result = waiting.pop(0)
                looks = result.result()
                waiting += [(following, pool.submit(_look_at, following)) for following in islice(chunks, 1)]
                yield from zip(chunk, looks, strict=True)
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure, not what else was given out


def _start() -> None:
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    import cv2

    cv2.setNumThreads(1)  # the processes are the threads


def _look_at(paths: Iterable[Picture]) -> list[_Look]:
    return [_look(path) for path in paths]


def _look(path: Picture) -> _Look:
    try:
        image = decode(path)
    except ImageError as error:
        return _Look(b"", None, error.reason)
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    digest.update(image.data)
    first = image[0, 0]
    one = bool((image == first).all())
    return _Look(digest.digest(), f"({first[0]}, {first[1]}, {first[2]})" if one else None, None)
