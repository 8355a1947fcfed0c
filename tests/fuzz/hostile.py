"""What every format's fuzzing shares: words and numbers that broke readers, damage to bytes, and how much to try.

Cases are drawn from a `random.Random`: hypothesis gives one whose choices it can shrink, the long run one with a seed
of its own for each case, so that a case is known by its number.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random

SECONDS = 1.0  # that reading one case may take


def cases(few: int) -> int:
    """How many cases to try: BOXWRIGHT_FUZZ, or `few`."""
    return int(os.environ.get("BOXWRIGHT_FUZZ", few))


def number(r: Random) -> str:
    """A coordinate, a size or a flag: a good one three times of five."""
    kind = r.randrange(10)
    if kind < 4:
        return str(r.randint(1, 200))
    if kind < 6:
        return f"{r.uniform(-2, 205):.{r.randint(0, 9)}f}"
    if kind == 6:
        return str(r.choice((-1, 0, 1, 99, 100, 101, 199, 200, 201, 2**31, 2**63, -(2**63), 10**20)))
    return r.choice(NUMBERS)


NUMBERS = (
    "nan", "NaN", "inf", "-inf", "Infinity", "1e400", "-1e400", "1e-400", "1e308", "5e-324", "12,5", "1_0", "0x10", "",
    " 7 ", "\n7\n", "+3", "--3", "1e2", "1E+1", "1.", ".5", ".", "e5", "1 2", "1;2", "null", "None", "True", "-0",
    "0.0", "١٢", "１２", "१२",
    "Ⅷ", "½", "²", "12\u00a0", "\u200b5", "\u22125", "∞", "9" * 400, "0." + "1" * 400, "%d", "{}",
    "1/0", "1.5.2", "0b1", "12px", "50%", "١٢.٥", "\ufeff9",
)  # fmt: skip

WORDS = (
    "cat", "dog", "cat", "dog", "Cat", "cat ", "\tdog\n", "cat\u00a0", "", " ", "ca t", "zebra", "人", "blå",
    "bla\u030a", "\u202ecat", "\u200bcat", "cat" * 2000,
    "__background__", "../../etc/passwd", "/etc/passwd", "a\\b", "%s", "{0}",
    "0", "1", "null", "true", "\ud7ff", "\ue000", "😀", "e\u0301" * 300,
    "-", "$HOME", "~", "*", "constructor", "cat,dog",
)  # fmt: skip


def damaged(r: Random, data: bytes, others: tuple[bytes, ...], tokens: tuple[bytes, ...]) -> bytes:
    """Bytes after one to four accidents."""
    for _ in range(r.choice((1, 1, 1, 2, 4))):
        at = r.randrange(len(data) + 1)
        length = r.choice((0, 1, 1, 2, 8, 64))
        data = data[:at] + _ACCIDENTS[r.randrange(len(_ACCIDENTS))](r, data, at, length, others, tokens)
    return data


Accident = Callable[[Random, bytes, int, int, tuple[bytes, ...], tuple[bytes, ...]], bytes]


def _flipped(r: Random, data: bytes, at: int, *_: object) -> bytes:
    rest = data[at:]
    return bytes([rest[0] ^ 1 << r.randrange(8)]) + rest[1:] if rest else rest


def _spliced(r: Random, data: bytes, at: int, length: int, others: tuple[bytes, ...], *_: object) -> bytes:
    other = r.choice(others)
    return other[r.randrange(len(other) + 1) :]


_ACCIDENTS: tuple[Accident, ...] = (
    _flipped,
    _spliced,
    lambda r, data, at, length, *_: data[at + length :],  # cut out
    lambda r, data, at, length, *_: data[at : at + length] + data[at:],  # there twice
    lambda r, data, at, length, *_: r.randbytes(length) + data[at + length :],
    lambda r, data, at, length, others, tokens: r.choice(tokens) + data[at:],
    lambda r, data, at, length, others, tokens: r.choice(tokens) + data[at + length :],
    lambda r, data, at, length, *_: b"",  # cut short
    lambda r, data, at, length, *_: number(r).encode() + data[at + length :],
)


@contextmanager
def in_time(case: object) -> Iterator[None]:
    """Fails where what is done takes longer than a case may. Of the processor's time: others may use the machine."""
    start = time.process_time()
    yield
    taken = time.process_time() - start
    assert taken < SECONDS, f"{taken:.2f} s for case {case}"


def one_line(text: str) -> None:
    """A message is one line that can be printed, and no wall of text."""
    assert text
    assert "\n" not in text
    assert "\r" not in text
    assert len(text) < 2000
