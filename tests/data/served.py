"""A web server on this machine that gives files by ranges, and faults on demand."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler


@dataclass
class Served:
    """What a server does, and what it was asked for."""

    folder: Path
    address: str = ""
    ranges: bool = True
    failing: int = 0  # requests that are answered with `status`
    status: int = 503
    cutting: int = 0  # requests that get half of their bytes
    redirect: str = ""
    redirects: int = -1  # how many requests are redirected; -1 for all
    asked: list[str] = field(default_factory=list)  # path and range
    connections: int = 0


@contextmanager
def served(folder: Path) -> Generator[Served]:
    """Serve a folder while the block runs."""
    state = Served(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, state))
    server.daemon_threads = True
    state.address = f"http://127.0.0.1:{server.server_address[1]}/data"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Raw:
    """An answer, byte by byte as it is: a start, then a part `again` times, with a pause before each."""

    start: bytes
    part: bytes = b""  # none: the start once more
    again: int = 0
    pause: float = 0.0  # seconds
    sent: int = 0  # parts
    requests: int = 0


@contextmanager
def answering(answer: Raw) -> Generator[str]:
    """The address of a server that gives this answer to whoever connects."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_RawHandler, answer))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/data"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _RawHandler(StreamRequestHandler):
    def __init__(self, answer: Raw, *arguments: object) -> None:
        self.answer = answer
        super().__init__(*arguments)  # type: ignore[arg-type]

    def handle(self) -> None:
        while self.rfile.readline().strip():
            pass  # of the request
        self.answer.requests += 1
        with suppress(OSError):  # the client has gone
            self.wfile.write(self.answer.start)
            for _ in range(self.answer.again):
                time.sleep(self.answer.pause)
                self.wfile.write(self.answer.part or self.answer.start)
                self.answer.sent += 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10

    def __init__(self, state: Served, *arguments: object) -> None:
        self.state = state
        super().__init__(*arguments)  # type: ignore[arg-type]

    def setup(self) -> None:
        self.state.connections += 1
        super().setup()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        state = self.state
        state.asked.append(f"{self.path} {self.headers.get('Range', '')}".strip())
        path = state.folder / self.path.removeprefix("/data/")
        if state.redirect and state.redirects:
            state.redirects -= 1
            self.send_response(302)
            self.send_header("Location", state.redirect.encode().decode("latin-1"))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if state.failing and "Range" in self.headers:
            state.failing -= 1
            self._give(state.status, b"sorry")
        elif not path.is_file():
            self._give(404, b"")
        elif state.ranges and (found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            data = path.read_bytes()
            start, last = int(found[1]), int(found[2] or len(data) - 1)
            self._give(206, data[start : last + 1], f"bytes {start}-{last}/{len(data)}")
        else:
            self._give(200, path.read_bytes())

    def _give(self, status: int, data: bytes, span: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if span:
            self.send_header("Content-Range", span)
        self.end_headers()
        if self.state.cutting and span:
            self.state.cutting -= 1
            data = data[: len(data) // 2]
            self.close_connection = True
        self.wfile.write(data)
