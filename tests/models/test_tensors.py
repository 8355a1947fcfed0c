"""Named tensors come out of every known form of file, no file runs code, and what is no weights is named."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import math
import os
import pickle
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from boxwright.models.tensors import read_tensors
from boxwright.types import UserError


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def some_tensors() -> dict[str, Tensor]:
    return {
        "stem.weight": torch.randn(4, 3, 3, 3),
        "norm.running_mean": torch.zeros(4, dtype=torch.float16),
        "norm.num_batches_tracked": torch.tensor(7),
        "head.weight": torch.randn(2, 4).t(),  # not contiguous
    }


def save_legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return list(found) == list(wanted) and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
    )


def identity(tensors: Any) -> Any:
    return tensors


@pytest.mark.parametrize("save", [torch.save, save_legacy])
@pytest.mark.parametrize(
    "wrap",
    [
        identity,
        OrderedDict,
        lambda t: {"model": t},
        lambda t: {"state_dict": t, "epoch": 3, "optimizer": {"state": {0: {"momentum": torch.ones(1)}}}},
        lambda t: {"model_state_dict": t, "best": torch.tensor(0.5)},
        lambda t: {"model": {"stem.weight": torch.zeros(1)}, "ema": {"module": t, "updates": 9}},
        lambda t: {**t, "epoch": 3},
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
def test_containers_and_prefixes_come_off_and_it_is_said(
    tmp_path: Path,
    save: Callable[[Any, Path], None],
    wrap: Callable[[dict[str, Tensor]], dict[str, Any]],
    prefix: str,
) -> None:
    wanted = some_tensors()
    wrapped = wrap({prefix + name: tensor for name, tensor in wanted.items()})
    save(wrapped, path := tmp_path / "w.pth")
    found = read_tensors(path)
    assert same(found, wanted)
    for word in ("module", "_orig_mod"):
        assert (f"'{word}.' taken off" in found.notes) == (word in prefix)
    assert bool(found.notes) == (prefix != "" or wrap not in (identity, OrderedDict))


def test_wrappers_inside_a_name_and_averaged_models(tmp_path: Path) -> None:
    torch.save({"n_averaged": torch.tensor(3), "module.body._orig_mod.conv.weight": torch.ones(1)}, tmp_path / "w.pt")
    found = read_tensors(tmp_path / "w.pt")
    assert list(found) == ["body.conv.weight"]
    assert "'n_averaged' left out" in found.notes
    torch.save({"a.module.weight": torch.ones(1), "module.b": torch.ones(1)}, tmp_path / "w.pt")
    assert list(read_tensors(tmp_path / "w.pt")) == ["a.module.weight", "module.b"]
    torch.save({"a._orig_mod.b": torch.ones(1), "a.b": torch.ones(1)}, tmp_path / "w.pt")
    assert "two tensors of one name" in refusal(lambda: read_tensors(tmp_path / "w.pt"))


def test_safetensors_under_any_name(tmp_path: Path) -> None:
    wanted = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    for name in ("w.safetensors", "w.pth", "w"):
        safetensors.torch.save_file(wanted, tmp_path / name)
        found = read_tensors(tmp_path / name)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


class Payload:
    """A pickle that makes a folder when it is opened by anything that runs code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def save_tar(content: Any, path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name, value in (("storages", 0), ("tensors", 0), ("pickle", content)):
            entry, data = tarfile.TarInfo(name), pickle.dumps(value, protocol=2)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def save_zip_in_tar(content: Any, path: Path) -> None:
    torch.save(content, inner := path.with_name("inner.pt"))
    with tarfile.open(path, "w") as archive:
        archive.add(inner, "pickle")


def save_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def save_pickle_2(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("save", [torch.save, save_legacy, save_tar, save_zip_in_tar, save_pickle, save_pickle_2])
@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.ckpt"])
def test_no_payload_runs(
    tmp_path: Path, save: Callable[[Any, Path], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "marker"
    save({"model": some_tensors(), "args": Payload(marker)}, path := tmp_path / name)
    message = refusal(lambda: read_tensors(path))
    assert "refused" in message or "tar archive" in message
    assert not marker.exists()


def test_the_payload_is_a_real_one(tmp_path: Path) -> None:
    torch.save({"args": Payload(tmp_path / "marker")}, tmp_path / "w.pt")
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("save", [torch.save, save_legacy])
@pytest.mark.parametrize(
    ("content", "named"),
    [({"args": argparse.Namespace(x=1)}, "argparse.Namespace"), (nn.Linear(1, 1), "torch.nn.modules.linear")],
)
def test_harmless_code_is_refused_by_name(
    tmp_path: Path, save: Callable[[Any, Path], None], content: Any, named: str
) -> None:
    save(content, tmp_path / "w.pt")
    message = refusal(lambda: read_tensors(tmp_path / "w.pt"))
    assert "holds code" in message
    assert named in message


def save_safetensors(content: dict[str, Tensor], path: Path) -> None:
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)


SAVES = {"zip": torch.save, "legacy": save_legacy, "safetensors": save_safetensors}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("saved") / "w"
    torch.manual_seed(0)
    contents = {}
    for form, save in SAVES.items():
        save(some_tensors(), path)
        contents[form] = path.read_bytes()
    return contents


@pytest.mark.parametrize("form", SAVES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(tmp_path: Path, saved: dict[str, bytes], form: str, fraction: float) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(saved[form][: int(fraction * len(saved[form]))])
    refusal(lambda: read_tensors(path))


@pytest.mark.parametrize("form", SAVES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_end_in_a_refusal_or_do_no_harm(
    tmp_path: Path, saved: dict[str, bytes], form: str, data: st.DataObject
) -> None:
    content = bytearray(saved[form])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    found = None
    with contextlib.suppress(UserError):
        found = read_tensors(path)
    if found is not None and form == "zip":  # the other forms have no checksum
        path.write_bytes(saved[form])
        assert same(found, read_tensors(path))


@pytest.mark.parametrize("save", [torch.save, save_legacy])
@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(1).expand(1 << 34), "64.0 GiB"),
        (torch.zeros(1, 1).expand(1 << 20, 1 << 20), "4096.0 GiB"),
        (torch.empty(1 << 34, device="meta"), "on meta"),
        (torch.zeros(3, dtype=torch.int8), "torch.int8"),
        (torch.zeros(3, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(3, dtype=torch.complex64), "complex64"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.tensor([1.0, math.nan]), "NaN or infinity in 1 of 2 tensors: bad"),
        (torch.tensor([1.0, -math.inf]), "NaN or infinity"),
        (torch.tensor([math.inf], dtype=torch.bfloat16), "NaN or infinity"),
        (torch.tensor([math.nan], dtype=torch.float16), "NaN or infinity"),
    ],
)
def test_tensors_that_nothing_can_be_trained_from(
    tmp_path: Path, save: Callable[[Any, Path], None], tensor: Tensor, words: str
) -> None:
    save({"good": torch.ones(3), "bad": tensor}, tmp_path / "w.pt")
    assert (tmp_path / "w.pt").stat().st_size < 4000
    assert words in refusal(lambda: read_tensors(tmp_path / "w.pt"))


def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch gives these up
        quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
        torch.save({"bad": quantised}, tmp_path / "w.pt")
    assert "torch.qint8" in refusal(lambda: read_tensors(tmp_path / "w.pt"))
    torch.save({"bad": torch.zeros(3, dtype=torch.float8_e4m3fn)}, tmp_path / "w.pt")
    assert "float8" in refusal(lambda: read_tensors(tmp_path / "w.pt"))


def test_shared_and_empty_tensors_are_fine(tmp_path: Path) -> None:
    shared = torch.ones(1000)
    wanted = {"a": shared, "b": shared.view(10, 100), "none": torch.zeros(0, 4)}
    torch.save(wanted, tmp_path / "w.pt")
    assert same(read_tensors(tmp_path / "w.pt"), wanted)


def itself() -> dict[str, Any]:
    content: dict[str, Any] = {}
    content["model"] = content
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.ones(3), "holds a Tensor"),
        ([torch.ones(3)], "holds a list"),
        (3, "holds a int"),
        ({}, "no named tensors"),
        ({"model": {}}, "no named tensors; its entries: model"),
        ({0: torch.ones(3)}, "no named tensors"),
        (itself(), "no named tensors"),
        ({"\x1b[2J\nbad": torch.tensor(math.nan)}, r"\x1b[2J\nbad"),
    ],
)
def test_other_contents_are_named(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    assert words in refusal(lambda: read_tensors(tmp_path / "w.pt"))


def onnx() -> bytes:
    """ir_version 8, producer_name "pytorch"."""
    return b"\x08\x08\x12\x07pytorch" + bytes(300)


def npz() -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("weight.npy", b"\x93NUMPY")
    return buffer.getvalue()


def bomb() -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", b"0" * (1 << 24))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"\xef\xbb\xbf\n <HTML><body>404</body></html>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
        (onnx(), "ONNX"),
        (gzip.compress(b"weights", mtime=0), "gzip"),
        (npz(), "torch.save did not write"),
        (bomb(), "claims more bytes"),
        (b"PK\x03\x04 and no more", "truncated or damaged"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"hello", "truncated or damaged"),
        (b"\x80", "truncated or damaged"),
        ((1 << 20).to_bytes(8, "little") + b'{"a":', "truncated or damaged"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    assert words in refusal(lambda: read_tensors(tmp_path / "w.pth"))


def test_torchscript_folders_and_absent_files_are_named(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch gives TorchScript up
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pt")
    assert "TorchScript" in refusal(lambda: read_tensors(tmp_path / "w.pt"))
    assert "a folder" in refusal(lambda: read_tensors(tmp_path))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    assert "distributed checkpoint" in refusal(lambda: read_tensors(tmp_path))
    assert not (tmp_path / "marker").exists()
    assert "No such file" in refusal(lambda: read_tensors(tmp_path / "none.pt"))
    (tmp_path / "w.safetensors").write_bytes(b"hello")
    assert "named .safetensors" in refusal(lambda: read_tensors(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("save", [torch.save, save_legacy])
def test_parameters_that_were_saved_as_such_are_plain_tensors(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "w.pth"
    save({"a": torch.ones(3, requires_grad=True)}, path)
    assert not read_tensors(path)["a"].requires_grad
