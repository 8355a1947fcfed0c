"""Weights arrive whole or not at all, no file runs code, and every tensor is accounted for."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import http.server
import io
import logging
import math
import os
import pickle
import shutil
import tarfile
import threading
import urllib.request
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from boxwright.models import weights as module
from boxwright.models.vit import ViT
from boxwright.models.weights import (
    PUBLISHED,
    Account,
    Weights,
    cache_folder,
    fetch,
    load,
    load_mae,
    read_tensors,
)
from boxwright.types import UserError

BODY = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(BODY).hexdigest()


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------ Onto the disk


class Server(http.server.ThreadingHTTPServer):
    """Answers each path with the next of its scripted answers, the last one for ever."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, list[Callable[[Handler], None]]] = {}
        self.asked: list[tuple[str, str | None]] = []  # path, Range
        self.sent = 0  # bytes of bodies

    def url(self, path: str, *answers: Callable[[Handler], None]) -> str:
        self.answers[path] = list(answers)
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Range"]))
        answers = self.server.answers[self.path]
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def body(self, content: bytes) -> None:
        self.server.sent += len(content)
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def whole(handler: Handler) -> None:
    handler.head(200, Content_Length=len(BODY))
    handler.body(BODY)


def resuming(handler: Handler) -> None:
    """The whole file, or what the client lacks of it."""
    if not (asked := handler.headers["Range"]):
        return whole(handler)
    start = int(asked.removeprefix("bytes=").removesuffix("-"))
    if start >= len(BODY):
        return handler.head(416, Content_Range=f"bytes */{len(BODY)}")
    rest = BODY[start:]
    handler.head(206, Content_Length=len(rest), Content_Range=f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
    return handler.body(rest)


def dropping(handler: Handler) -> None:
    """Half of what is asked for, then the connection closes."""
    have = int((handler.headers["Range"] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
    rest = BODY[have:]
    handler.head(
        206 if have else 200,
        Content_Length=len(rest),
        Content_Range=f"bytes {have}-{len(BODY) - 1}/{len(BODY)}",
    )
    handler.body(rest[: len(rest) // 2])


def another_range(handler: Handler) -> None:
    handler.head(206, Content_Length=10, Content_Range=f"bytes 5-14/{len(BODY)}")
    handler.body(BODY[5:15])


def endless(handler: Handler) -> None:
    handler.head(200)
    with contextlib.suppress(OSError):  # the client hangs up
        while handler.server.sent < 64 * len(BODY):
            handler.body(BODY)


def status(code: int, **headers: object) -> Callable[[Handler], None]:
    return lambda handler: handler.head(code, Content_Length=0, **headers)


def page(handler: Handler) -> None:
    handler.head(200, Content_Type="text/html; charset=utf-8", Content_Length=14)
    handler.body(b"<html>log in</")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "BOXWRIGHT_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "PAUSES", (0.0, 0.0))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def published(url: str, sha256: str | None = SHA256, size: int | None = len(BODY)) -> Weights:
    return Weights("test", url, sha256, size, "CC0-1.0", "a test", permissive=True)


@pytest.mark.parametrize("sha256", [SHA256, SHA256[:8], SHA256.upper()])
@pytest.mark.parametrize("size", [len(BODY), None])
def test_fetch_brings_the_file_once(server: Server, tmp_path: Path, sha256: str, size: int | None) -> None:
    seen: list[tuple[int, int | None]] = []
    wanted = published(server.url("/w.pth", whole), sha256, size)
    path = fetch(wanted, cache=tmp_path / "new", progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == BODY
    assert seen == sorted(seen)
    assert seen[-1] == (len(BODY), len(BODY))
    assert not path.with_name("w.pth.part").exists()
    assert path.with_name("w.pth.sha256").read_text(encoding="utf-8") == f"{SHA256}  w.pth\n"
    assert fetch(wanted, cache=tmp_path / "new", offline=True) == path
    assert len(server.asked) == 1


def test_a_wrong_hash_leaves_nothing(server: Server, tmp_path: Path) -> None:
    wanted = published(server.url("/w.pth", whole), "0" * 64)
    message = refusal(lambda: fetch(wanted, cache=tmp_path))
    assert SHA256 in message
    assert "--weights FILE" in message
    assert str(tmp_path / "w.pth") in message
    assert not list(tmp_path.glob("*.pth")) + list(tmp_path.glob("*.part"))
    assert len(server.asked) == 1


def test_a_dropped_connection_is_resumed(server: Server, tmp_path: Path) -> None:
    wanted = published(server.url("/w.pth", dropping, dropping, resuming))
    assert fetch(wanted, cache=tmp_path).read_bytes() == BODY
    assert [asked for _, asked in server.asked] == [None, "bytes=524288-", "bytes=786432-"]


def test_a_server_that_always_cuts_is_left_and_the_next_run_goes_on(server: Server, tmp_path: Path) -> None:
    def cutting(handler: Handler) -> None:
        handler.head(200, Content_Length=len(BODY))
        handler.body(BODY[:1000])

    assert "closed after 1000 of" in refusal(lambda: fetch(published(server.url("/w.pth", cutting)), cache=tmp_path))
    assert len(server.asked) == 3
    url = server.url("/w.pth", resuming)
    assert fetch(published(url), cache=tmp_path).read_bytes() == BODY
    assert server.asked[-1] == ("/w.pth", "bytes=1000-")


@pytest.mark.parametrize("answers", [(whole,), (another_range, whole), (status(503), whole), (status(416), whole)])
@pytest.mark.parametrize("size", [len(BODY), None])
def test_a_part_never_spoils_the_whole(
    server: Server, tmp_path: Path, answers: tuple[Callable[[Handler], None], ...], size: int | None
) -> None:
    (tmp_path / "w.pth.part").write_bytes(BODY[:70_000])
    assert fetch(published(server.url("/w.pth", *answers), size=size), cache=tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("beyond", [0, 9])
def test_a_part_that_is_whole_or_too_long_is_used_or_replaced(server: Server, tmp_path: Path, beyond: int) -> None:
    (tmp_path / "w.pth.part").write_bytes(BODY + bytes(beyond))
    assert fetch(published(server.url("/w.pth", resuming)), cache=tmp_path).read_bytes() == BODY
    assert len(server.asked) == (2 if beyond else 0)


def test_a_part_of_another_file_is_caught_by_the_hash(server: Server, tmp_path: Path) -> None:
    (tmp_path / "w.pth.part").write_bytes(b"x" * 1000)
    wanted = published(server.url("/w.pth", resuming))
    assert "SHA-256" in refusal(lambda: fetch(wanted, cache=tmp_path))
    assert fetch(wanted, cache=tmp_path).read_bytes() == BODY


@pytest.mark.parametrize(
    ("answer", "words", "requests"),
    [
        (status(404), "404", 1),
        (status(403), "403", 1),
        (status(500), "500", 3),
        (status(204), "0 bytes", 1),
        (status(302, Location="http://example.invalid/w.pth"), "only https", 1),
        (status(302, Location="ftp://127.0.0.1/w.pth"), "only https", 1),
        (status(302, Location="file:///etc/hostname"), "not allowed", 1),
        (status(302, Location="/w.pth"), "302", 1),
        (page, "web page", 1),
        (lambda handler: handler.head(200, Content_Length=7), "7 bytes", 1),
    ],
)
def test_what_another_try_would_not_mend_is_refused(
    server: Server, tmp_path: Path, answer: Callable[[Handler], None], words: str, requests: int
) -> None:
    wanted = published(server.url("/w.pth", answer))
    message = refusal(lambda: fetch(wanted, cache=tmp_path))
    assert words in message
    assert wanted.url in message
    assert not (tmp_path / "w.pth").exists()
    assert len(server.asked) == requests or words == "302"  # a loop is followed a few times


def test_a_redirect_on_this_machine_is_followed(server: Server, tmp_path: Path) -> None:
    elsewhere = server.url("/other.pth", whole)
    url = server.url("/w.pth", status(302, Location=elsewhere))
    assert fetch(published(url), cache=tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("new", ["http://127.0.0.1/w.pth", "http://example.org/w.pth", "ftp://example.org/w.pth"])
def test_no_redirect_leads_from_https_to_less(new: str) -> None:
    handler, old = module._SafeRedirects(), urllib.request.Request("https://example.org/w.pth")
    with pytest.raises(module._RefusedError):
        handler.redirect_request(old, io.BytesIO(), 302, "Found", Message(), new)  # type: ignore[arg-type]
    followed = handler.redirect_request(old, io.BytesIO(), 302, "", Message(), "https://e.org/w")  # type: ignore[arg-type]
    assert followed is not None


@pytest.mark.parametrize("size", [100_000, None])
def test_an_endless_answer_is_cut(
    server: Server, tmp_path: Path, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGEST", 2 * len(BODY))
    wanted = published(server.url("/w.pth", endless), size=size)
    assert "sends more than" in refusal(lambda: fetch(wanted, cache=tmp_path))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == 0


def test_a_closed_server(server: Server, tmp_path: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_address[1]
    message = refusal(lambda: fetch(published(f"http://127.0.0.1:{port}/w.pth"), cache=tmp_path))
    assert "--weights FILE" in message


@pytest.mark.parametrize("url", ["http://example.org/w.pth", "ftp://example.org/w.pth", "file:///etc/passwd"])
def test_only_https_leaves_this_machine(url: str, tmp_path: Path) -> None:
    assert "only https" in refusal(lambda: fetch(published(url), cache=tmp_path, offline=False))


@pytest.mark.parametrize("url", ["https://example.org/", "https://example.org/..", "https://e.org/a%2Fb"])
def test_a_url_cannot_choose_a_place_on_the_disk(url: str, tmp_path: Path) -> None:
    assert "plain file name" in refusal(lambda: fetch(published(url), cache=tmp_path, offline=True))


def test_offline_says_where_the_file_goes_and_uses_it_there(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path))
    monkeypatch.setenv("BOXWRIGHT_OFFLINE", "1")
    wanted = published(server.url("/w.pth", whole))
    assert str(tmp_path / "w.pth") in refusal(lambda: fetch(wanted))
    (tmp_path / "w.pth").write_bytes(BODY)
    assert fetch(wanted) == tmp_path / "w.pth"
    assert not server.asked
    monkeypatch.setenv("BOXWRIGHT_OFFLINE", "0")
    (tmp_path / "w.pth").unlink()
    assert fetch(wanted).is_file()


def test_a_damaged_file_in_the_cache_is_named_and_kept(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(BODY[:-1] + b"?")
    message = refusal(lambda: fetch(published("https://example.org/w.pth"), cache=tmp_path))
    assert "delete it and run again" in message
    assert (tmp_path / "w.pth").exists()


def test_without_a_published_hash_the_first_one_is_told_and_kept(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = published(server.url("/w.pth", whole), sha256=None, size=None)
    with caplog.at_level(logging.WARNING):
        path = fetch(wanted, cache=tmp_path)
    assert SHA256 in caplog.text
    caplog.clear()
    assert fetch(wanted, cache=tmp_path) == path
    assert not caplog.text
    assert fetch(replace(wanted, sha256=SHA256), cache=tmp_path) == path
    path.write_bytes(BODY + b"!")
    assert "recorded in" in refusal(lambda: fetch(wanted, cache=tmp_path))
    path.unlink()

    def another(handler: Handler) -> None:
        handler.head(200, Content_Length=3)
        handler.body(b"abc")

    server.url("/w.pth", another)
    assert "recorded in" in refusal(lambda: fetch(wanted, cache=tmp_path))


def test_a_full_disk_is_told_before_it_is_full(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1 << 20))
    message = refusal(lambda: fetch(published(server.url("/w.pth", whole)), cache=tmp_path))
    assert "no room for 1.0 MiB" in message


def test_a_cache_that_is_a_file(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    wanted = published(server.url("/w.pth", whole))
    assert "cannot download" in refusal(lambda: fetch(wanted, cache=tmp_path / "cache"))


def test_fetchers_at_the_same_time_download_once(server: Server, tmp_path: Path) -> None:
    wanted = published(server.url("/w.pth", dropping, resuming))
    with ThreadPoolExecutor(6) as pool:  # the lock is the system's, on a handle of each: as between processes
        paths = list(pool.map(lambda _: fetch(wanted, cache=tmp_path), range(6)))
    assert {path.read_bytes() for path in paths} == {BODY}
    assert len(server.asked) == 2


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("BOXWRIGHT_CACHE")
    assert "boxwright" in cache_folder().parts


def test_the_table_of_published_weights_is_whole() -> None:
    for name, entry in PUBLISHED.items():
        assert entry.name == name
        assert entry.url.startswith("https://")
        assert entry.sha256 is None or (len(entry.sha256) >= 8 and int(entry.sha256, 16))
        assert entry.permissive == (entry.licence in {"BSD-3-Clause", "Apache-2.0", "MIT"})
    urls = {entry.url for entry in PUBLISHED.values()}
    for name in (
        "SqueezeNet1_1_Weights.IMAGENET1K_V1",
        "ResNet50_Weights.IMAGENET1K_V2",
        "MobileNet_V2_Weights.IMAGENET1K_V2",
        "FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1",
    ):
        assert torchvision.models.get_weight(name).url in urls


# ------ Out of a file


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


# ------ Into a model


def small() -> nn.Module:
    return nn.Sequential(OrderedDict(body=nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), head=nn.Linear(4, 3)))


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


KEYS = list(small().state_dict())
FATES = ("whole", "gone", "other shape", "integer", "renamed", "half")


@settings(max_examples=100, deadline=None)
@given(
    fates=st.lists(st.sampled_from(FATES), min_size=len(KEYS), max_size=len(KEYS)),
    extra=st.integers(0, 3),
    prefix=st.sampled_from(["", "model."]),
)
def test_every_tensor_is_accounted_for(fates: list[str], extra: int, prefix: str) -> None:
    net = small()
    before, wanted = state(net), {name: torch.randn(value.shape) for name, value in state(net).items()}
    wanted["body.1.num_batches_tracked"] = torch.tensor(5)
    tensors: dict[str, Tensor] = {f"{prefix}extra{i}": torch.ones(1) for i in range(extra)}
    for name, fate in zip(KEYS, fates, strict=True):
        value = wanted[name]
        changed = {
            "other shape": torch.zeros(*value.shape, 2),
            "integer": value.float() if value.dtype == torch.int64 else value.long(),
            "half": value.half() if value.is_floating_point() else value,
        }.get(fate, value)
        if fate != "gone":
            tensors[f"{prefix}{'old.' if fate == 'renamed' else ''}{name}"] = changed
    given_names = dict(tensors)

    def attempt() -> Account:
        return load(net, tensors, source="w", rename=lambda name: name.removeprefix("old."), may_miss=["*"])

    used = {name for name, fate in zip(KEYS, fates, strict=True) if fate in ("whole", "renamed", "half")}
    if used:
        account = attempt()
        other = {mismatch.name for mismatch in account.mismatched}
        assert account.used == len(used)
        assert used | set(account.missing) | other == set(KEYS)
        assert account.used + len(account.missing) + len(account.mismatched) == len(KEYS) == account.total
        assert account.used + len(account.unexpected) + len(account.mismatched) == len(tensors)
        assert all(line.strip() for line in str(account).splitlines())
    else:
        assert "matched 0 of 9" in refusal(attempt)
    after = state(net)
    for name, fate in zip(KEYS, fates, strict=True):
        value = wanted[name]
        if fate == "half" and value.is_floating_point():
            value = value.half().float()
        assert torch.equal(after[name], value if name in used else before[name])
    assert tensors.keys() == given_names.keys()
    assert all(tensors[name] is given_names[name] for name in tensors)


def test_another_class_count_needs_leave_and_is_told() -> None:
    source, net = small(), small()
    tensors = {**state(source), "head.weight": torch.ones(91, 4), "head.bias": torch.ones(91)}
    before = state(net)
    message = refusal(lambda: load(net, tensors, source="coco.pth"))
    assert "head.weight (in the file (91, 4) float32, in the model (3, 4) float32)" in message
    assert all(torch.equal(value, before[name]) for name, value in state(net).items())
    account = load(net, tensors, source="coco.pth", may_miss=["head.*"])
    assert [mismatch.name for mismatch in account.mismatched] == ["head.weight", "head.bias"]
    assert "2" in str(account)
    assert torch.equal(net.state_dict()["head.weight"], before["head.weight"])
    assert torch.equal(net.state_dict()["body.0.weight"], tensors["body.0.weight"])


def test_missing_and_left_over_tensors_need_leave() -> None:
    net, tensors = small(), state(small())
    del tensors["body.1.num_batches_tracked"]  # old files never had it
    assert load(net, tensors, source="w").missing == ("body.1.num_batches_tracked",)
    del tensors["head.bias"]
    before = state(net)
    assert "1 tensors of the model are missing: head.bias" in refusal(lambda: load(net, tensors, source="w"))
    tensors["head.bias"], tensors["fc.weight"] = torch.ones(3), torch.ones(2)
    assert "no place in the model: fc.weight" in refusal(lambda: load(net, tensors, source="w", may_leave=["aux.*"]))
    assert all(torch.equal(value, before[name]) for name, value in state(net).items())
    assert load(net, tensors, source="w").unexpected == ("fc.weight",)


def test_another_architecture_is_told_as_such() -> None:
    resnet, squeezenet = torchvision.models.resnet18(), torchvision.models.squeezenet1_1()
    message = refusal(lambda: load(resnet, state(squeezenet), source="w.pth"))
    assert message.startswith("w.pth: matched 0 of 122 tensors: these weights are for another architecture")
    account = Account("w", used=3, missing=tuple(map(str, range(211))), unexpected=(), mismatched=())
    assert "matched 3 of 214 tensors" in refusal(lambda: account.check(0.5))
    assert account.check(0.01) is account


def test_two_names_may_not_become_one() -> None:
    tensors = {**state(small()), "top.bias": torch.ones(3)}
    message = refusal(lambda: load(small(), tensors, source="w", rename=lambda n: n.replace("top", "head")))
    assert "both become head.bias" in message


class StandIn(nn.Module):
    """The names and shapes that ViTDet's ViT has in common with MAE's, and what it adds."""

    def __init__(self, width: int = 8, depth: int = 2, tokens: int = 197) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList(self.block(width) for _ in range(depth))

    @staticmethod
    def block(width: int) -> nn.Module:
        block = nn.Module()
        block.norm1, block.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        block.attn, block.mlp = nn.Module(), nn.Module()
        block.attn.qkv, block.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        block.attn.rel_pos_h = nn.Parameter(torch.zeros(27, width))
        block.attn.rel_pos_w = nn.Parameter(torch.zeros(27, width))
        block.mlp.fc1, block.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        return block


def mae_checkpoint(
    width: int = 8, depth: int = 2, tokens: int = 197, patch: int = 4, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random numbers under the names and shapes of the encoder that facebookresearch/mae publishes."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(depth):
        for name, shape in {
            "norm1": (width,),
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "norm2": (width,),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def test_mae_loads_with_a_full_account(tmp_path: Path) -> None:
    torch.save({"model": mae_checkpoint()}, tmp_path / "mae.pth")
    net, tensors = StandIn(), read_tensors(tmp_path / "mae.pth")
    account = load_mae(net, tensors)
    assert account.used == len(tensors) - 3
    assert account.unexpected == ("cls_token", "norm.bias", "norm.weight")
    assert account.missing == tuple(f"blocks.{i}.attn.rel_pos_{axis}" for i in (0, 1) for axis in "hw")
    assert account.notes == ("taken from 'model'",)
    loaded = net.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items() if name in loaded)
    assert not any(loaded[name].any() for name in account.missing)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.1.attn.qkv.bias": None}, "missing: blocks.1.attn.qkv.bias"),
        ({"pos_embed": None}, "missing: pos_embed"),
        ({"head.weight": torch.ones(1000, 8)}, "no place in the model: head.weight"),
        ({"blocks.2.norm1.weight": torch.ones(8)}, "no place in the model: blocks.2.norm1.weight"),
        ({"patch_embed.proj.weight": torch.ones(8, 3, 8, 8)}, "another shape: patch_embed.proj.weight"),
        ({"pos_embed": torch.ones(1, 200, 8)}, "200 tokens, neither a square grid"),
    ],
)
def test_mae_with_anything_else_is_refused(change: dict[str, Tensor | None], words: str) -> None:
    changed = {**mae_checkpoint(), **change}
    tensors = {name: tensor for name, tensor in changed.items() if tensor is not None}
    net = StandIn()
    before = state(net)
    assert words in refusal(lambda: load_mae(net, tensors))
    assert all(torch.equal(value, before[name]) for name, value in state(net).items())


def test_mae_of_another_size_is_another_architecture() -> None:
    assert "another architecture" in refusal(lambda: load_mae(StandIn(), mae_checkpoint(width=16, depth=4)))


def test_a_whole_autoencoder_gives_its_encoder() -> None:
    decoder = {"mask_token": torch.ones(1, 1, 4), "decoder_embed.weight": torch.ones(4, 8)}
    assert load_mae(StandIn(), {**mae_checkpoint(), **decoder}).used == 26 + 1


@pytest.mark.parametrize("own", [197, 196, 65, 64])
@pytest.mark.parametrize("found", [197, 196, 577, 576, 50])
def test_positions_are_fitted_to_the_grid(own: int, found: int) -> None:
    side, found_side = math.isqrt(own), math.isqrt(found)
    across = torch.linspace(0, 1, found_side)
    ramp = (across[:, None] + 2 * across).flatten()[:, None].expand(-1, 8)  # (G*G, D), plane over the grid
    table = torch.cat([torch.full((found - found_side**2, 8), 9.0), ramp])[None]
    tensors, net = {**mae_checkpoint(), "pos_embed": table}, StandIn(tokens=own)
    first = net.pos_embed[0, 0].clone()
    account = load_mae(net, tensors)
    assert bool(account.notes) == (own != found)
    assert table.shape == (1, found, 8)
    if own > side**2:
        assert torch.equal(net.pos_embed[0, 0], table[0, 0] if found > found_side**2 else first)
    grid = net.pos_embed[0, own - side**2 :].reshape(side, side, 8).detach()
    if side == found_side:
        assert torch.equal(grid.flatten(0, 1), ramp)
    down, right = grid[-3, 2:-2] - grid[2, 2:-2], grid[2:-2, -3] - grid[2:-2, 2]
    slope = (found_side / side) / (found_side - 1)  # of the rows; the columns have twice that
    assert torch.allclose(down, torch.tensor((side - 5) * slope), rtol=0.05)
    assert torch.allclose(right, 2 * down.mean(), rtol=0.1)


def test_positions_are_resampled_as_the_vit_does() -> None:
    def small_vit(pretrain_grid: int) -> ViT:
        return ViT(width=24, depth=1, heads=3, patch=4, window=7, global_blocks=(0,), pretrain_grid=pretrain_grid)

    tensors = mae_checkpoint(width=24, depth=1, tokens=577)
    resampled, whole_table = small_vit(14), small_vit(24)
    load_mae(resampled, tensors)
    load_mae(whole_table, tensors)
    assert torch.allclose(resampled.positions(14, 14), whole_table.positions(14, 14), atol=1e-5)


def test_the_real_vit_takes_the_official_shapes(tmp_path: Path) -> None:
    with torch.device("meta"):
        vit = ViT(width=768, depth=12, heads=12, patch=16, window=14, global_blocks=(2, 5, 8, 11))
    vit.to_empty(device="cpu")
    pool = torch.randn(3072 * 768, dtype=torch.bfloat16)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in mae_checkpoint(768, 12, 197, patch=16).items()}
    checkpoint = {name: pool[: shape.numel()].reshape(shape).clone() for name, shape in shapes.items()}
    torch.save({"model": checkpoint}, tmp_path / "mae.pth")  # 172 MB, half of the published file
    account = load_mae(vit, read_tensors(tmp_path / "mae.pth"))
    assert account.used == 147
    assert len(account.missing) == 24
    loaded = vit.state_dict()
    for name in ("pos_embed", "patch_embed.proj.weight", "blocks.11.mlp.fc2.weight"):
        assert torch.equal(loaded[name], checkpoint[name].float())


@pytest.mark.real_data
def test_real_files_load(real_data: Path) -> None:
    folder = real_data / "weights"
    squeezenet = torchvision.models.squeezenet1_1()
    tensors = read_tensors(folder / "squeezenet1_1" / "squeezenet1_1_imagenet_features_torchvision.pth")
    account = load(squeezenet, tensors, source="squeezenet1_1", may_miss=["classifier.*"])
    assert (account.used, account.missing) == (50, ("classifier.1.weight", "classifier.1.bias"))
    mobilenet = torchvision.models.mobilenet_v2()
    tensors = read_tensors(folder / "mobilenet_v2" / "mobilenet_v2_imagenet_from_int8_torchvision.pth")
    account = load(mobilenet, tensors, source="mobilenet_v2", may_leave=())
    assert (account.used, account.missing, account.notes) == (314, (), ())
