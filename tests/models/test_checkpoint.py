"""A checkpoint is whole or refused in one line, runs nothing, and stands on its own wherever it lies."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from boxwright import registry
from boxwright.models import checkpoint
from boxwright.models.checkpoint import FORMAT, KEY, Header, digest
from boxwright.types import UserError
from boxwright.version import __version__

NAME = "fasterrcnn_vitdet_nano"
HEADER = Header(
    model=NAME,
    options={"drop_path": 0.1},
    classes=["Katze", "Löwe", "猫"],
    fit={"imgsz": 96, "square": True},
    run={"data": "d", "lr": None, "seed": 3},
    epoch=4,
    step=17,
    scores={"map": 0.25, "map_small": math.inf},
    weights_from=["mae_vit_base (CC-BY-NC-4.0)"],
)


@pytest.fixture(scope="module")
def detector() -> torch.nn.Module:
    torch.manual_seed(0)
    return registry.build(NAME, num_classes=3, drop_path=0.1)


@pytest.fixture(scope="module")
def saved(detector: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint; not to be changed."""
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    checkpoint.save(path, detector, HEADER)
    return path


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert str(caught.value).isprintable()  # one line, and nothing that a terminal would obey
    return str(caught.value)


def with_header(saved: Path, path: Path, **changes: Any) -> Path:
    """The same tensors under a header with some of its values changed."""
    values = json.loads(raw_header(saved)) | changes
    return with_text(saved, path, json.dumps(values))


def with_text(saved: Path, path: Path, text: str | None) -> Path:
    metadata = {"other": "thing"} if text is None else {KEY: text}
    safetensors.torch.save_file(safetensors.torch.load_file(saved), path, metadata=metadata)
    return path


def raw_header(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return file.metadata()[KEY]


# ------ Whole


def test_what_is_saved_is_loaded(detector: torch.nn.Module, saved: Path) -> None:
    loaded, header = checkpoint.load(saved)
    state = detector.state_dict()
    assert header == Header(**{**vars(HEADER), "sha256": digest(state)})
    assert (header.version, header.format) == (__version__, FORMAT)
    assert checkpoint.read_header(saved) == header
    assert not loaded.training
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert loaded.backbone.body.drop_path == pytest.approx(0.1)  # the options reach the builder


def test_scores_that_are_not_numbers_are_kept(detector: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save(
        path, detector, Header(NAME, {}, ["a", "b", "c"], {"imgsz": 64, "square": False}, scores={"map": math.nan})
    )
    assert math.isnan(checkpoint.read_header(path).scores["map"])


def test_a_checkpoint_needs_no_neighbours(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = tmp_path / "a folder" / "größer.bin"  # any name will do
    moved.parent.mkdir()
    shutil.copy(saved, moved)
    monkeypatch.chdir(moved.parent)
    _, header = checkpoint.load(Path(moved.name))
    assert header == checkpoint.read_header(saved)


def test_saving_leaves_the_detector_and_replaces_the_file(detector: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"an older one")
    detector.train()
    before = digest(detector.state_dict())
    checkpoint.save(path, detector, HEADER)
    assert detector.training
    assert digest(detector.state_dict()) == before == checkpoint.load(path)[1].sha256
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_digest_is_of_names_shapes_types_and_values() -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(5), "none": torch.zeros(0, 3)}
    same = {"none": torch.zeros(0, 3), "b": torch.tensor(5), "a": torch.arange(6.0).reshape(3, 2).T.reshape(2, 3)}
    same["a"] = torch.arange(6.0).reshape(2, 3).T.contiguous().T  # another order of the dict and in memory
    assert digest(same) == digest(tensors)
    for change in (
        {"a": tensors["a"].reshape(3, 2)},
        {"a": tensors["a"].double()},
        {"a": tensors["a"].view(torch.int32)},
        {"a": torch.nextafter(tensors["a"], torch.tensor(9.0))},
        {"b": torch.tensor(6)},
        {"c": torch.tensor(0)},
    ):
        assert digest(tensors | change) != digest(tensors)
    assert digest({"b": tensors["a"], "a": tensors["b"]}) != digest({"a": tensors["a"], "b": tensors["b"]})
    assert digest({"h": torch.ones(3, dtype=torch.bfloat16)}) != digest({"h": torch.ones(3, dtype=torch.float16)})


# ------ Not whole


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.9999])
def test_a_truncated_file(saved: Path, tmp_path: Path, share: float) -> None:
    data = saved.read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[: int(len(data) * share)])
    message = refusal(lambda: checkpoint.load(tmp_path / "w.safetensors"))
    assert f"{tmp_path / 'w.safetensors'} is not a Boxwright checkpoint" in message


def test_a_flipped_bit_of_a_tensor(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    data = saved.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for place in (start, start + (len(data) - start) // 3, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        assert refusal(lambda: checkpoint.load(path)).startswith(f"{path} is damaged")


def test_a_flipped_bit_before_the_tensors_is_refused_or_does_them_no_harm(saved: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(saved, tmp_path / "w.safetensors"))
    wanted = checkpoint.read_header(saved).sha256
    data = saved.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    ours = data.index(b"__metadata__")
    places = {*range(10), *range(ours, data.index(b"sha256") + 20, 7), *range(10, length, length // 100)}
    refusals: list[str] = []
    with path.open("r+b", buffering=0) as file:
        for place in sorted(places):
            file.seek(place)
            file.write(bytes([data[place] ^ 1 << place % 7]))
            try:
                loaded, _ = checkpoint.load(path)
            except UserError as error:
                refusals.append(str(error))
            else:
                assert digest(loaded.state_dict()) == wanted
            file.seek(place)
            file.write(data[place : place + 1])
    assert all(message.isprintable() for message in refusals)
    assert len(refusals) > len(places) / 2
    checkpoint.load(path)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def write_others(folder: Path) -> dict[str, str]:
    """Files that are no checkpoints, and what is said of each."""
    (folder / "empty").write_bytes(b"")
    (folder / "text.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "plain.pkl").write_bytes(pickle.dumps(Payload(folder / "ran")))
    torch.save({"model": torch.ones(3), "code": Payload(folder / "ran")}, folder / "torch.pth")
    torch.save(torch.ones(3), folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "long.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    safetensors.torch.save_file({"w": torch.ones(3)}, folder / "foreign.safetensors")
    safetensors.torch.save_file({"w": torch.ones(3)}, folder / "timm.safetensors", metadata={"format": "pt"})
    (folder / "folder.safetensors").mkdir()
    not_ours = "is not a Boxwright checkpoint, or damaged ("
    return {
        "empty": not_ours,
        "text.safetensors": not_ours,
        "plain.pkl": not_ours,
        "torch.pth": not_ours,
        "old.pt": not_ours,
        "long.safetensors": not_ours,
        "foreign.safetensors": "is a safetensors file, but not one that Boxwright trained: it has no class names",
        "timm.safetensors": "is a safetensors file, but not one that Boxwright trained: it has no class names",
        "folder.safetensors": "is a folder; --weights wants a file such as ",
    }


def test_other_files_are_named_and_not_run(tmp_path: Path) -> None:
    for name, words in write_others(tmp_path).items():
        for read in (checkpoint.load, checkpoint.read_header):
            assert refusal(lambda n=name, r=read: r(tmp_path / n)).startswith(f"{tmp_path / name} {words}"), name
    assert not (tmp_path / "ran").exists()
    message = refusal(lambda: checkpoint.load(tmp_path / "none.safetensors"))
    assert message == f"no weights at {tmp_path / 'none.safetensors'} (looked in {Path.cwd()})"


# ------ Headers that are not ours

HEADERS: list[tuple[dict[str, Any], str]] = [
    ({"model": "os.system"}, "unknown model 'os.system'."),
    ({"model": "../../x"}, "unknown model '../../x'."),
    ({"model": "builtins.exec"}, "unknown model 'builtins.exec'."),
    ({"model": "fasterrcn_vitdet"}, "Did you mean 'fasterrcnn_vitdet'?"),
    ({"model": "\x1b[2J\n"}, "unknown model"),
    ({"model": ["os.system"]}, "has a header that is not ours: Input should be a valid string"),
    ({"model": None}, "has a header that is not ours"),
    ({"options": {"num_classes": 5}}, "has options that fasterrcnn_vitdet_nano does not take"),
    ({"options": {"drop_path": "much"}}, "cannot build fasterrcnn_vitdet_nano with"),
    ({"options": {"drop_path": 1.5}}, "drop path 1.5 is no share from 0 to below 1"),
    ({"options": {"drop_paths": 0.1}}, "has no option 'drop_paths'. Did you mean 'drop_path'?"),
    ({"options": {"__class__": 1}}, "has no option '__class__'"),
    ({"options": ["drop_path"]}, "has a header that is not ours"),
    ({"classes": []}, "has no class names"),
    ({"classes": "abc"}, "has a header that is not ours"),
    ({"classes": [1, 2, 3]}, "has a header that is not ours"),
    ({"classes": 3}, "has a header that is not ours"),
    ({"classes": ["a", "b"]}, f"does not fit {NAME}: 4 tensors of another shape (roi_heads.box_predictor."),
    ({"fit": "640"}, "has a header that is not ours"),
    ({"fit": {"square": True}}, "fitted by {'square': True}"),
    ({"fit": {"imgsz": "64", "square": True}}, "fitted by"),
    ({"fit": {"imgsz": True, "square": True}}, "fitted by"),
    ({"fit": {"imgsz": 0, "square": True}}, "fitted by"),
    ({"fit": {"imgsz": 10**9, "square": True}}, "fitted by"),
    ({"classes": ["a", "a", "b"]}, "not distinct lines"),
    ({"classes": ["a\nb", "c", "d"]}, "not distinct lines"),
    ({"epoch": "last"}, "has a header that is not ours"),
    ({"scores": {"map": "good"}}, "has a header that is not ours"),
    ({"sha256": ""}, "is damaged"),
    ({"sha256": None}, "has a header that is not ours"),
    ({"more": "than we know", "\n": 1}, "has a header that is not ours"),
    ({"format": FORMAT + 1, "version": "9.9"}, f"was written by Boxwright '9.9'; this is {__version__}. Upgrade it"),
    ({"format": FORMAT + 1, "version": "\x1b[2J"}, "was written by Boxwright"),
    ({"format": FORMAT + 1, "new": {}, "model": ["of another form"]}, "Upgrade it"),  # asked before all else
    ({"format": "1"}, "was written by Boxwright"),
]


@pytest.mark.parametrize(("changes", "words"), HEADERS)
def test_a_header_is_believed_in_nothing(saved: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = with_header(saved, tmp_path / "w.safetensors", **changes)
    assert words in refusal(lambda: checkpoint.load(path))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "5", '"text"', "{}", '{"format": 1}', "[" * 100_000, "\0"])
def test_a_header_that_is_no_header(saved: Path, tmp_path: Path, text: str) -> None:
    path = with_text(saved, tmp_path / "w.safetensors", text)
    assert refusal(lambda: checkpoint.read_header(path)).startswith(f"{path} ")


def test_tensors_of_another_model(detector: torch.nn.Module, saved: Path, tmp_path: Path) -> None:
    class Fewer(torch.nn.Module):
        def __init__(self, **changes: torch.Tensor | None) -> None:
            super().__init__()
            self.changes = changes

        def state_dict(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
            changed = {**detector.state_dict(), **{k.replace("__", "."): v for k, v in self.changes.items()}}
            return {name: value for name, value in changed.items() if value is not None}

    for changes, words in (
        ({"backbone__body__pos_embed": None}, "1 tensors missing (backbone.body.pos_embed ...)"),
        ({"stranger": torch.ones(2)}, "1 tensors unexpected (stranger ...)"),
        ({"pixel_mean": torch.ones(3)}, "1 tensors of another shape (pixel_mean ...)"),
    ):
        checkpoint.save(tmp_path / "w.safetensors", Fewer(**changes), HEADER)
        message = refusal(lambda: checkpoint.load(tmp_path / "w.safetensors"))
        assert message == f"{tmp_path / 'w.safetensors'} does not fit {NAME}: {words}"


# ------ Writing that fails


def assert_untouched(folder: Path) -> None:
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"model.safetensors": b"the last good one"}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_what_cannot_be_finished_is_not_there(
    detector: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "model.safetensors").write_bytes(b"the last good one")
    monkeypatch.setattr(*((os, "fsync", full) if step == "fsync" else (Path, "replace", full)))
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path / "model.safetensors", detector, HEADER)
    assert_untouched(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file")
def test_a_disk_that_fills_up_in_the_middle(detector: torch.nn.Module, tmp_path: Path) -> None:
    import resource
    import signal

    (tmp_path / "model.safetensors").write_bytes(b"the last good one")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))  # a megabyte, of several
    try:
        with pytest.raises((OSError, safetensors.SafetensorError), match="File too large"):
            checkpoint.save(tmp_path / "model.safetensors", detector, HEADER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)
    assert_untouched(tmp_path)


def test_a_folder_that_is_not_there(detector: torch.nn.Module, tmp_path: Path) -> None:
    with pytest.raises((OSError, safetensors.SafetensorError), match="No such file"):
        checkpoint.save(tmp_path / "none" / "model.safetensors", detector, HEADER)
    assert not list(tmp_path.iterdir())
