"""A published file arrives whole or not at all, once, and only over https."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import logging
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email.message import Message
from pathlib import Path

import pytest

from boxwright import download as module
from boxwright.download import File, cache_folder, fetch, readable_size, told
from boxwright.types import UserError

BODY = bytes(range(256)) * 4096  # 1 MiB
WAY_OUT = "name a local copy with --weights FILE"
SHA256 = hashlib.sha256(BODY).hexdigest()


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


def published(url: str, sha256: str | None = SHA256, size: int | None = len(BODY)) -> File:
    return File("test", url, sha256, size, way_out=WAY_OUT)


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
        (status(302, Location="http://["), "no address", 1),
        (status(302, Location="http://127.0.0.1:abc/x"), "no address", 1),
        (status(302, Location=f"https://{'a' * 70}.invalid/w.pth"), "no address", 1),
        (lambda handler: handler.head(200, Content_Length="1" * 5000), "5000 digits", 1),
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
    with pytest.raises(module.RefusedError):
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


def test_a_dripping_answer_is_left(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dripping(handler: Handler) -> None:
        handler.head(200, Content_Length=len(BODY))
        with contextlib.suppress(OSError):  # the client hangs up
            for _ in range(400):
                handler.body(b"x")
                time.sleep(0.05)

    monkeypatch.setattr(module, "TIMEOUT", 0.4)
    wanted = published(server.url("/w.pth", dripping))
    assert "less than 1000 bytes a second" in refusal(lambda: fetch(wanted, cache=tmp_path))
    assert server.sent < 200


def test_a_host_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    for host in ("[", "a" * 70, "a..b"):
        assert "no address" in refusal(lambda host=host: fetch(published(f"https://{host}/w.pth"), cache=tmp_path))


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


def test_a_download_says_what_comes_how_large_and_from_where(server: Server, tmp_path: Path) -> None:
    said: list[str] = []
    wanted = published(server.url("/w.pth", whole), size=None)
    fetch(wanted, cache=tmp_path, progress=told(wanted, said.append, terms="CC0-1.0"))
    assert said == [f"downloading test (1 MB, CC0-1.0) from {wanted.url}"]
    report = told(replace(wanted, name="clip"), said.append)
    report(10, None)
    assert said[1] == f"downloading clip from {wanted.url}"


def test_the_way_out_is_the_callers(server: Server, tmp_path: Path) -> None:
    """A data set has no --weights."""
    wanted = File("voc", server.url("/w.pth", status(404)), None, None, way_out="put the archive into --data FOLDER")
    message = refusal(lambda: fetch(wanted, cache=tmp_path))
    assert message.endswith(f"; put the archive into --data FOLDER, or put the file at {tmp_path / 'w.pth'}")
    assert refusal(lambda: fetch(replace(wanted, way_out=""), cache=tmp_path)).endswith(
        f"; put the file at {tmp_path / 'w.pth'}"
    )


@pytest.mark.parametrize(("count", "text"), [(900, "900 bytes"), (3 << 20, "3.0 MiB"), (5 << 29, "2.5 GiB")])
def test_sizes_are_in_the_largest_unit_that_fits(count: int, text: str) -> None:
    assert readable_size(count) == text
