"""detectron2's .pkl files: what is in them comes out, and what is hostile or broken ends in one line."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boxwright.models import pickles
from boxwright.models.pickles import read_detectron2
from boxwright.types import UserError

Write = Callable[[bytes], Path]
MODEL: dict[str, Any] = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "conv.bias": np.array([1.5, -2.5], np.float16),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "every_second": np.arange(10, dtype=np.int64)[::2],
    "big_endian": np.array([1, 2, 3], ">i4"),
    "mask": np.array([True, False, True]),
    "count": np.array(7),
    "scalar": np.float32(2.5),
    "nothing": np.zeros((0, 4), np.float32),
}
SMALL = {"model": {"a": np.arange(3, dtype=np.float32)}, "__author__": "a test"}


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    path = tmp_path_factory.mktemp("pickles") / "model.pkl"

    def write(content: bytes) -> Path:
        path.write_bytes(content)
        return path

    return write


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_detectron2(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------ What is in them


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("numpy_1", [False, True])
@pytest.mark.parametrize("mapping", [dict, collections.OrderedDict])
def test_arrays_come_out_as_they_went_in(write: Write, protocol: int, numpy_1: bool, mapping: type[dict]) -> None:
    content = pickle.dumps({"model": mapping(MODEL), "__author__": "a test", "iteration": 10**30}, protocol=protocol)
    if numpy_1:  # its modules were called numpy.core; a short text has its length before it
        content = content.replace(b"numpy._core.", b"numpy.core.")
        content = content.replace(b"\x8c\x16numpy.core.", b"\x8c\x15numpy.core.")  # multiarray
        content = content.replace(b"\x8c\x13numpy.core.", b"\x8c\x12numpy.core.")  # numeric
    found = read_detectron2(write(content))
    assert list(found) == list(MODEL)
    for name, expected in MODEL.items():
        native = np.asarray(expected).astype(expected.dtype.newbyteorder("="))
        assert found[name].shape == native.shape, name
        assert found[name].is_contiguous()
        assert torch.equal(found[name], torch.from_numpy(native.copy())), name


def test_a_python_2_pickle(write: Write) -> None:
    """As caffe2 wrote them: bytes are strings without a known encoding."""
    data = struct.pack("<2f", 1.5, 254.0)
    content = (
        b"\x80\x02}U\x05model}U\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x08" + data + b"tbss."
    )
    pickle.loads(content, encoding="latin1")  # it is a true one
    assert read_detectron2(write(content))["a"].tolist() == [1.5, 254.0]


def test_a_state_dict_with_attributes(write: Write) -> None:
    """torch's state dicts carry `_metadata` as an attribute."""
    state = torch.nn.Linear(2, 2).state_dict()
    arrays = collections.OrderedDict((name, value.numpy()) for name, value in state.items())
    arrays._metadata = state._metadata
    found = read_detectron2(write(pickle.dumps({"model": arrays})))
    assert {name: value.tolist() for name, value in found.items()} == {n: v.tolist() for n, v in state.items()}


def test_two_names_of_one_array_are_two_tensors(write: Write) -> None:
    shared = np.ones(50, np.float32)
    found = read_detectron2(write(pickle.dumps({"model": {"a": shared, "b": shared}})))
    found["a"].zero_()
    assert found["b"].sum() == 50


# ------ What is not theirs


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": {}}, "no 'model' as detectron2's files do; its entries: state_dict"),
        ({"model": {}}, "no 'model'"),
        ({"model": [1]}, "no 'model'"),
        ([1, 2], "its entries: none"),
        ({"model": {"a": np.zeros(2), "b": [1.0], "c": "x"}}, "no arrays: b, c"),
        ({"model": {"a": np.array([{}, None])}}, "an array of O8, not of numbers"),
        ({"model": {"a": np.array(["text"])}}, "an array of U4, not of numbers"),
        ({"model": {"a": np.zeros(2, np.complex64)}}, "an array of c8, not of numbers"),
        ({"model": {"a": np.zeros(2, [("x", "f4")])}}, "an array of V4, not of numbers"),
        ({"model": {("a",): np.zeros(2)}}, "truncated or damaged"),
        ({"model": {"a": torch.zeros(2)}}, "holds code (torch._utils._rebuild_tensor_v2)"),
    ],
)
def test_other_contents_are_refused(write: Write, content: Any, words: str) -> None:
    assert words in refused(write(pickle.dumps(content)))


def test_no_file_and_an_empty_one(tmp_path: Path, write: Write) -> None:
    assert "cannot read the weights" in refused(tmp_path / "none.pkl")
    assert "cannot read the weights" in refused(tmp_path)
    assert "is empty" in refused(write(b""))
    assert "no pickle of arrays" in refused(write(b"<html>"))


# ------ What is hostile


class Runs:
    """Pickled, it is a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_code_is_named_and_never_run(tmp_path: Path, write: Write, protocol: int) -> None:
    trace = tmp_path / "it_ran"
    for payload in (
        Runs(os.system, f'echo > "{trace}"'),
        Runs(eval, f"open({str(trace)!r}, 'w')"),
        Runs(exec, f"open({str(trace)!r}, 'w')"),
        Runs(getattr, "", "join"),
        Runs(np.load, str(trace)),
        Runs(np.memmap, str(trace), "u1", "w+", 0, (1,)),
    ):
        path = write(pickle.dumps({"model": {"a": np.zeros(2), "b": payload}}, protocol=protocol))
        words = refused(path)
        name = payload.call[0].__name__
        assert (f"{name}), not only tensors; refused" in words) or protocol < 2, words
    assert not trace.exists()


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (b"cos\nsystem\n(S'x'\ntR.", "holds code (os.system)"),
        (b"(S'x'\nios\nsystem\n.", "truncated or damaged"),  # text is of protocol 0, before the call comes
        (b"(ios\nsystem\n.", "holds code (os.system)"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "holds code (the word NEWOBJ)"),
        (b"\x80\x02\x82\x01.", "holds code (the word EXT1)"),
        (b"\x80\x02K\x01Q.", "holds code (the word BINPERSID)"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "holds code (builtins.eval)"),
        (b"\x80\x04\x8c\x07bad\x1b[2J\x8c\x01x\x93.", r"holds code ('bad\x1b[2J.x')"),  # fit for a terminal
        (b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.", "holds code (numpy.ndarray.dumps)"),
        (b"\x80\x04]]\x93.", "truncated or damaged"),
        (b"\x80\x02cnumpy\nndarray\nK\x05\x85R.", "truncated or damaged"),  # a call of ndarray itself
        (b"\x80\x02cnumpy\ndtype\ncnumpy\nndarray\n\x85R.", "truncated or damaged"),
        (b"\x80\x02cnumpy\nndarray\n}U\x01ash}b.", "truncated or damaged"),  # attributes for a class
        (b"\x80\x04\x8f.", "truncated or damaged"),  # a set
        (b"\x80\x05\x97.", "truncated or damaged"),  # a buffer from outside
    ],
)
def test_words_of_other_programs(write: Write, program: bytes, words: str) -> None:
    assert words in refused(write(program))


def array_of(shape: bytes, data: bytes, dtype: bytes = b"U\x02f4") -> bytes:
    """A file with one array, of pickled shape and dtype."""
    return (
        b"\x80\x02}U\x05model}U\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01" + shape + b"cnumpy\ndtype\n" + dtype + b"K\x00K\x01\x87R\x89" + data + b"tbss."
    )


def test_a_made_up_array_is_one(write: Write) -> None:
    found = read_detectron2(write(array_of(b"K\x02\x85", b"U\x08" + struct.pack("=2f", 3, 4))))
    assert found["a"].tolist() == [3, 4]


huge = b"\x8a\x08" + (1 << 61).to_bytes(8, "little")  # LONG1
BOMBS = {
    "a shape without numbers": array_of(huge + b"\x85", b"U\x08aaaabbbb"),
    "a shape whose product is the length": array_of(huge + huge + b"K\x00\x87", b"U\x00"),
    "a shape of less than nothing": array_of(b"J\xff\xff\xff\xffJ\xfe\xff\xff\xff\x86", b"U\x08aaaabbbb"),
    "a shape of words": array_of(b"U\x01a\x85", b"U\x08aaaabbbb"),
    "a shape of many axes": array_of(b"(" + b"K\x01" * 70 + b"t", b"U\x04aaaa"),
    "a shape of great numbers": array_of(b"(" + (b"\x8a\xff" + b"\x7f" * 255) * 2000 + b"t", b"U\x04aaaa"),
    "fewer numbers than claimed": array_of(b"K\x03\x85", b"U\x08aaaabbbb"),
    "a number that is not there": b"\x80\x02}U\x05model}U\x01ah\x07ss.",
    "a note under a great number": b"\x80\x02}r\xfe\xff\xff\xff.",
    "a text of great length": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fabc.",
    "bytes of great length": b"\x80\x04\x8e" + b"\x00\x00\x00\x00\x40\x00\x00\x00abc.",
    "a buffer of great length": b"\x80\x05\x96" + b"\x00\x00\x00\x00\x40\x00\x00\x00abc.",
    "a frame of great length": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f}.",
    "a number of great length": b"\x80\x02\x8b\xff\xff\xff\x7fabc.",
    "one text encoded again and again": b"\x80\x02X\x00\x00\x01\x00" + b"a" * 65536 + b"q\x01]("
    + b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R" * 20000 + b"e.",
    "one array under ten thousand names": array_of(b"K\x3f\x85", b"U\xfc" + b"a" * 252).removesuffix(b"ss.")
    + b"q\x09s(" + b"".join(b"U\x04%04dh\x09" % i for i in range(10000)) + b"us.",
    "tuples within tuples as a name": b"\x80\x02}U\x05model})" + b"\x85" * 100_000 + b"K\x01ss.",
    "tuples within tuples as a value": b"\x80\x02}U\x05model}U\x01a)" + b"\x85" * 100_000 + b"ss.",
    "tuples within tuples as a shape": array_of(b")" + b"\x85" * 100_000, b"U\x04aaaa"),
    "lists within lists": b"\x80\x02" + b"](" * 100_000 + b"e" * 100_000 + b".",
    "a model that holds itself": b"\x80\x02}U\x05model}q\x01U\x01ah\x01ss.",
    "a list that holds itself": b"\x80\x02]q\x01h\x01a.",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_in_one_line_and_little_memory(write: Write, name: str) -> None:
    path = write(BOMBS[name])
    tracemalloc.start()
    try:
        assert refused(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200 * len(BOMBS[name]) + 5_000_000


SOUND = [pickle.dumps({"model": MODEL, "__author__": "a test"}, protocol=protocol) for protocol in (2, 4, 5)]


def test_more_values_than_a_model_has(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a byte in the file and a hundred in memory."""
    monkeypatch.setattr(pickles, "MOST_WORDS", 1000)
    assert "has more than 1000 pickled values; refused" in refused(write(b"\x80\x02](" + b"]" * 1000 + b"e."))


@given(sound=st.sampled_from(SOUND), data=st.data())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_broken_files_end_in_one_line(write: Write, sound: bytes, data: st.DataObject) -> None:
    """Changed, cut or stuffed bytes give tensors of the file's own size, or a `UserError`."""
    place = st.integers(0, len(sound) - 1)
    changes = data.draw(st.lists(st.tuples(place, st.binary(max_size=3)), min_size=1, max_size=4))
    content = bytearray(sound)
    for at, replacement in changes:
        content[at : at + data.draw(st.integers(0, 3))] = replacement
    path = write(bytes(content[: data.draw(place)] if data.draw(st.booleans()) else content))
    tracemalloc.start()
    try:
        found, words = read_detectron2(path), ""
    except UserError as error:
        found, words = {}, str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert "\n" not in words
    assert sum(tensor.nbytes for tensor in found.values()) <= 2 * len(content)
    assert peak < 5_000_000


def test_nothing_is_imported_for_a_name(write: Write) -> None:
    before = set(sys.modules)
    refused(write(b"\x80\x04\x8c\x06turtle\x8c\x03Pen\x93."))
    assert set(sys.modules) == before
