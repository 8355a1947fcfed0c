"""The arrays of detectron2's published .pkl files, out of a pickle that is parsed and never run.

A pickle is a program for a machine with a stack, and Python's own machine calls whatever the program names. The one
here knows the words that make plain containers and the few names by which numpy writes an array. It makes values of
its own of them, spends no more memory than the file has bytes, and refuses every other word and name.
"""

from __future__ import annotations

import math
import mmap
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from boxwright.models.tensors import listed
from boxwright.types import UserError

MOST_WORDS = 1_000_000  # a tensor takes about 25; a word makes at most some hundred bytes
DTYPES = ("f4", "f2", "f8", "i8", "i4", "i2", "i1", "u1", "b1")  # numpy's codes
AXES = 32  # numpy 1 had no more

# What numpy (1.x and 2.x) and the protocols 2 .. 5 name to write an array, and what it is here.
KNOWN = {
    **{f"numpy.{core}.multiarray {name}": name for core in ("core", "_core") for name in ("_reconstruct", "scalar")},
    **{f"numpy.{core}.numeric _frombuffer": "_frombuffer" for core in ("core", "_core")},
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
    "__builtin__ bytes": "bytes",
    "collections OrderedDict": "OrderedDict",
}
CALLS = ("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID")  # beside REDUCE
VALUES = (
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
)  # fmt: skip


def read_detectron2(path: Path) -> dict[str, Tensor]:
    """The named tensors of a .pkl file of detectron2's model zoo, {"model": {name: array}, ...}, on the CPU.

    Raises UserError where the file is not whole, names code, or holds no such arrays.
    """
    try:
        size = path.stat().st_size
        if not size:
            raise UserError(f"{path} is empty: download it again")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            arrays = _arrays(_Machine(path, size).run(content), path)
    except OSError as error:
        raise UserError(f"cannot read the weights {path}: {error.strerror or error}") from error
    if sum(len(array.data) for array in arrays.values()) > 2 * size:  # arrays may be shared, not without end
        raise UserError(f"{path} claims more bytes than it has; refused")
    return {name: _tensor(arrays.pop(name), name, path, size) for name in list(arrays)}  # each freed when copied


@dataclass(frozen=True)
class _Known:
    """One of the names that may stand in the file."""

    name: str


@dataclass(eq=False)
class _DType:
    code: str
    order: str = "="


@dataclass(eq=False)
class _Array:
    shape: tuple[Any, ...] = ()
    dtype: _DType | None = None
    data: bytes | bytearray = b""
    fortran: bool = False


class _DamagedError(Exception):
    """The program makes no sense."""


class _Machine:
    """The stack, and what was laid aside under a number."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.left = 4 * size  # bytes that may still be made; text of two bytes a letter becomes one a byte
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def run(self, content: mmap.mmap) -> object:
        """What the program leaves on the stack."""
        try:
            for words, (word, argument, _) in enumerate(pickletools.genops(cast(Any, content))):
                if words > MOST_WORDS:
                    raise UserError(f"{self.path} has more than {MOST_WORDS} pickled values; refused")
                self._step(word.name, argument)
            return self.stack.pop()
        except (_DamagedError, ValueError, IndexError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path} is truncated or damaged, or no pickle of arrays: download it again"
            ) from error

    def _step(self, word: str, argument: Any) -> None:
        stack = self.stack
        match word:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[word])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[word])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(reversed([stack.pop() for _ in range(int(word[-1]))])))
            case "MARK":
                self.marked.append(stack)
                self.stack = []
            case "TUPLE":
                items = self._since_mark()
                self.stack.append(tuple(items))
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if word == "APPEND" else self._since_mark()
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(), stack.pop()][::-1] if word == "SETITEM" else self._since_mark()
                _set(self._top(dict), items)
            case "MEMOIZE" | "BINPUT" | "LONG_BINPUT":
                self.memo[len(self.memo) if word == "MEMOIZE" else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(self._named(argument))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self._named(f"{_text(module)} {_text(name)}"))
            case "REDUCE":
                arguments, known = stack.pop(), stack.pop()
                stack.append(self._made(known, arguments))
            case "BUILD":
                state = stack.pop()
                self._complete(stack[-1], state)
            case _ if word in VALUES:
                stack.append(argument)
            case _ if word in CALLS:
                raise self._holds_code(str(argument).replace(" ", ".") if word == "INST" else f"the word {word}")
            case _:
                raise _DamagedError(word)

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _top(self, kind: type[Any]) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise _DamagedError
        return self.stack[-1]

    def _named(self, name: str) -> _Known:
        if name not in KNOWN:
            raise self._holds_code(name.replace(" ", "."))
        return _Known(KNOWN[name])

    def _holds_code(self, name: str) -> UserError:
        return UserError(f"{self.path} holds code ({listed([name])}), not only tensors; refused: ask for .safetensors")

    def _made(self, known: object, arguments: object) -> object:
        """What numpy or Python would make of a known name and its arguments."""
        match known, arguments:
            case _Known("_reconstruct"), (_Known("ndarray"), tuple(), bytes() | str()):
                return _Array()  # filled by the word BUILD
            case _Known("scalar"), (_DType() as dtype, bytes() | str() as data):
                return _Array((), dtype, self._bytes(data))
            case _Known("_frombuffer"), (
                bytes() | bytearray() as data,
                _DType() as dtype,
                tuple() as shape,
                str(order),
            ):
                return _Array(shape, dtype, data, fortran=order == "F")
            case _Known("dtype"), (str(code), *_):
                if code not in DTYPES:
                    raise UserError(f"{self.path} holds an array of {listed([code])}, not of numbers; refused")
                return _DType(code)
            case _Known("encode"), (str(text), "latin1"):
                return self._bytes(text)
            case _Known("bytes"), ():
                return b""
            case _Known("OrderedDict"), ():
                return {}
            case _:
                raise _DamagedError

    def _complete(self, made: object, state: object) -> None:
        """What the word BUILD adds to a value: an array its contents, a dtype its byte order."""
        match made, state:
            case _Array(), (int(), tuple() as shape, _DType() as dtype, int(fortran), bytes() | str() as data):
                made.shape, made.dtype, made.data = shape, dtype, self._bytes(data)
                made.fortran = bool(fortran)
            case _DType(), (int(), "<" | ">" | "|" | "=" as order, None, None, None, *_):
                made.order = order
            case dict(), dict():
                pass  # attributes of an OrderedDict, such as a state dict's `_metadata`
            case _:
                raise _DamagedError

    def _bytes(self, data: bytes | str) -> bytes:
        """Bytes as protocol 2 writes them, or as they are."""
        if isinstance(data, bytes):
            return data
        self.left -= len(data)
        if self.left < 0:
            raise UserError(f"{self.path} claims more bytes than it has; refused")
        return data.encode("latin1")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _DamagedError
    return value


def _set(target: dict[str, Any], items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[_text(key)] = value  # text only: the hash of a deep tuple would overflow the stack


def _arrays(content: object, path: Path) -> dict[str, _Array]:
    entries = cast(Mapping[str, object], content) if isinstance(content, dict) else {}
    model = entries.get("model")
    if not isinstance(model, dict) or not model:
        raise UserError(
            f"{path} holds no 'model' as detectron2's files do; its entries: {listed(list(entries)) or 'none'}"
        )
    named = cast(dict[str, object], model)
    if others := [name for name, value in named.items() if not isinstance(value, _Array)]:
        raise UserError(f"{path} holds entries of its model that are no arrays: {listed(others)}")
    return cast(dict[str, _Array], dict(named))


def _tensor(array: _Array, name: str, path: Path, size: int) -> Tensor:
    """The array's numbers in a tensor of its own."""
    shape, dtype = array.shape, array.dtype
    plausible = len(shape) <= AXES and all(isinstance(side, int) and 0 <= side <= size for side in shape)
    if dtype is None or not plausible or math.prod(shape) * int(dtype.code[1]) != len(array.data):
        raise UserError(
            f"{path} is damaged: the shape of {listed([name])} is not that of its numbers: download it again"
        )
    stored = "u1" if dtype.code == "b1" else dtype.order + dtype.code  # a bool may be no other byte than 0 and 1
    numbers = np.frombuffer(array.data, stored).astype(dtype.code)
    return torch.from_numpy(np.asarray(numbers.reshape(shape, order="F" if array.fortran else "C"), order="C"))
