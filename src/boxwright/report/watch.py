"""The report of a run while it goes on: one page, served to this machine alone, made anew when a file has changed."""

from __future__ import annotations

import errno
import hashlib
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from boxwright.errors import BoxwrightError, UserError
from boxwright.report.page import of_run
from boxwright.report.reading import FRESH, existing, read

HOST = "127.0.0.1"
TIMEOUT = 10.0  # seconds that a reader may take to ask
FILES = (
    *("run.yaml", "env.json", "metrics.jsonl", "results.csv", "train.log", "previews/*.jpg"),
    *("scores.json", "analysis.json", "pictures/gallery.json"),
    *("evaluation/scores.json", "evaluation/analysis.json", "evaluation/pictures/gallery.json"),
)


def watch(folder: Path, *, port: int, say: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C. Raises `UserError` where the folder is no run or the port is taken."""
    folder = existing(folder)
    with serve(folder, port) as server:
        say(f"http://{HOST}:{server.server_port}/ shows {folder} as it is now; Ctrl-C ends it")
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            say("stopped")


def serve(folder: Path, port: int) -> Server:
    """The server, listening but not yet answering; port 0 takes any that is free."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port} is not between 0 and 65535")
    try:
        return Server(folder, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port} is taken by another program. Choose another, or 0 for any") from None
        raise UserError(f"--port {port} cannot be listened on: {error.strerror}") from None


class Server(ThreadingHTTPServer):
    """Answers on the loopback address only, and keeps the page until a file changes."""

    daemon_threads = True
    allow_reuse_address = True  # a port that was left a moment ago; one in use is still refused

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__((HOST, port), _Handler)
        self.folder = folder
        self._lock = threading.Lock()
        self._tag, self._body = "", b""

    def page(self) -> tuple[str, bytes]:
        """The page and a tag that changes with it."""
        with self._lock:
            tag = signature(self.folder)
            if tag != self._tag:
                self._body = of_run(read(self.folder), live=True).encode()
                self._tag = tag
            return self._tag, self._body


def signature(folder: Path) -> str:
    """What changes when any file of a report does, or when a run has been silent for so long that it has stopped."""
    told: list[str] = []
    newest = 0.0
    for path in sorted(path for pattern in FILES for path in folder.glob(pattern)):
        try:
            facts = path.stat()
        except OSError:  # it was replaced just now
            continue
        told.append(f"{path.name} {facts.st_mtime_ns} {facts.st_size}")
        newest = max(newest, facts.st_mtime)
    told.append(f"fresh {time.time() - newest < FRESH}")
    return f'"{hashlib.sha256("|".join(told).encode()).hexdigest()[:24]}"'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "boxwright", ""
    timeout = TIMEOUT

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):  # the reader has gone
            self.close_connection = True

    def parse_request(self) -> bool:
        """Refuse what is not `GET /` asked of this very address: a name that leads here is a trick of another page."""
        if not super().parse_request():
            return False
        if self.headers.get("Host", "") not in self._names():
            self._answer(HTTPStatus.FORBIDDEN, b"this page answers to its own address only\n")
        elif self.path != "/":
            self._answer(HTTPStatus.NOT_FOUND, b"there is only /\n")
        elif self.command != "GET":
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET\n", Allow="GET")
        else:
            return True
        self.close_connection = True
        return False

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        try:
            tag, body = server.page()
        except (BoxwrightError, OSError) as error:
            text = f"{server.folder} cannot be read now: {' '.join(str(error).split())}\n"
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, text.encode(errors="replace"))
            return
        if self.headers.get("If-None-Match") == tag:
            self._answer(HTTPStatus.NOT_MODIFIED, b"", ETag=tag)
        else:
            self._answer(HTTPStatus.OK, body, kind="text/html", ETag=tag)

    def log_message(self, format: str, *args: object) -> None:
        pass  # every two seconds the same

    def _names(self) -> tuple[str, ...]:
        assert isinstance(self.server, Server)
        port = self.server.server_port
        return f"{HOST}:{port}", f"localhost:{port}"

    def _answer(self, status: HTTPStatus, body: bytes, *, kind: str = "text/plain", **headers: str) -> None:
        self.send_response(status)
        fixed = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "frame-ancestors 'none'",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
        }
        if self.close_connection or status not in (HTTPStatus.OK, HTTPStatus.NOT_MODIFIED):
            fixed["Connection"] = "close"
        for key, value in {**fixed, **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
