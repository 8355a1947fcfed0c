"""A server that does what none should: one line, in bounded time and memory."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import pytest
from tests.data.served import Raw, answering, served

from boxwright import download
from boxwright.__main__ import main
from boxwright.data import layout, members, shards
from boxwright.data.check.pixels import look_at_pixels
from boxwright.data.dataset import open_dataset
from boxwright.data.feeding import ReadingError
from boxwright.data.synth import synthesize
from boxwright.types import Member


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(members, "PAUSES", (0.01,))
    monkeypatch.setattr(members, "_without_ranges", set[str]())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    source = synthesize(folder / "files", train=4, valid=2, size=(64, 96))
    shards.shard(open_dataset(source), folder / "out", size=10**6, tolerance={}, say=lambda _: None)
    return folder / "out"


def refused(address: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code of a command that reads an address, and its one line."""
    code = main(["data", "check", address])
    gc.collect()  # what a connection that was never made says when it goes
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "Error" not in said
    assert said.count("boxwright: error: ") == said.count("\n") == 1, said
    return code, said


def head(*lines: str, status: str = "200 OK") -> bytes:
    return "\r\n".join((f"HTTP/1.1 {status}", *lines, "", "")).encode("latin-1")


@pytest.mark.parametrize(
    "target",
    [
        "http://[", "http://127.0.0.1:abc/x", "http://127.0.0.1:99999/x", f"https://{'a' * 70}.invalid/x",
        "https://a..b/x", "https://[::1%25x]y/x", f"https://{'a.' * 200}invalid/x", "https://me:secret@127.0.0.1/x",
    ],
)  # fmt: skip
def test_a_redirect_to_what_is_no_address_is_one_line(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(Raw(head(f"Location: {target}", "Content-Length: 0", status="302 Found"))) as address:
        code, said = refused(address, capsys)
    assert code == 74
    assert "redirected, but" in said
    assert "secret" not in said


def test_a_redirect_to_letters_beyond_ascii_is_followed(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "%C3%A9.json").write_bytes((sharded / "train.json").read_bytes())  # the server unquotes nothing
    with served(tmp_path) as server:
        server.redirect, server.redirects = f"{server.address}/é.json", 1
        assert members.save(f"{server.address}/train.json", tmp_path / "saved", 10**6)
    assert (tmp_path / "saved").read_bytes() == (sharded / "train.json").read_bytes()


def test_an_address_beyond_ascii_is_quoted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with served(tmp_path) as server:
        code, said = refused(f"{server.address}/é", capsys)
        assert server.asked[0] == "/data/%C3%A9/train.json"
    assert code == 2
    assert "no dataset at" in said


@pytest.mark.parametrize("host", ["a" * 70 + ".invalid", "a..invalid", "a." * 150 + "invalid", "[::1]x", "[zz]"])
def test_a_host_that_cannot_be_is_a_mistake_of_the_user(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = refused(f"https://{host}/data", capsys)
    assert code == 2
    assert "no address" in said


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Raw(head("Content-Length: " + "1" * 5000) + b"{}"), "a length of 5000 digits"),
        (Raw(head("Content-Length: 999999999999")), "more than the 1000000000 that are read"),
        (Raw(head(status="100 Continue"), again=1 << 20), "does not end"),
        (Raw(head("Transfer-Encoding: chunked") + b"zz\r\nhello\r\n"), "cannot be read"),
    ],
)
def test_an_answer_that_cannot_be_is_one_line(answer: Raw, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(answer) as address:
        code, said = refused(address, capsys)
    assert code == 74
    assert says in said


@pytest.mark.parametrize("start", [head(), head("Transfer-Encoding: chunked") + b"-1\r\n"])
def test_an_endless_index_ends_and_is_never_in_memory(
    start: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "LARGEST_INDEX", 40_000_000)
    with answering(Raw(start, b" " * (1 << 16), again=1 << 20)) as address:
        tracemalloc.start()
        with pytest.raises(ReadingError, match="more than the 40000000 bytes"):
            open_dataset(address)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 5_000_000
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("start", [b"", head("Content-Length: 100000")])
def test_a_server_that_drips_is_left(start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its head, or in its body."""
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    answer = Raw(start, b"H" if not start else b" ", again=400, pause=0.05)
    with answering(answer) as address, pytest.raises(ReadingError, match="less than 1000 bytes a second"):
        open_dataset(address)
    assert answer.sent < 60
    assert answer.requests == 1


def test_a_server_that_is_slow_to_begin_is_waited_for(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    body = (sharded / "train.json").read_bytes()
    with answering(Raw(b"", head(f"Content-Length: {len(body)}") + body, again=1, pause=0.4)) as address:
        assert open_dataset(address).items("train")


def pictures(data: str | Path) -> dict[Path | Member, list[str]]:
    return {item.image: ["train"] for item in open_dataset(data).items("train") if item.image}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_gives_no_pictures_ends_the_decoding_of_all(sharded: Path, workers: int) -> None:
    with served(sharded) as server:
        wanted = pictures(server.address)
        server.asked.clear()
        server.redirect = "http://example.com/x"
        with pytest.raises(ReadingError, match="redirected to"):
            look_at_pixels(wanted, workers=workers, say=lambda _: None)
        assert len(server.asked) == 1


def test_a_damaged_member_is_one_finding(sharded: Path, tmp_path: Path) -> None:
    for file in sharded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "train-000000.tar").write_bytes(bytes((sharded / "train-000000.tar").stat().st_size))
    with served(tmp_path) as server:
        wanted = pictures(server.address)
        found = look_at_pixels(wanted, workers=0, say=lambda _: None).findings
    assert [(finding.kind, finding.path) for finding in found] == [("damaged-picture", path) for path in wanted]
