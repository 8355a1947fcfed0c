"""The live page's server: this machine only, one address, one page, changed when a file is."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.report import rig

from boxwright.errors import UserError
from boxwright.report.watch import Server, serve


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return rig.write_run(tmp_path / "run", epochs=1, steps=3, finished=False)


@pytest.fixture
def server(run: Path) -> Iterator[Server]:
    with serve(run, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: Server, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers={key.replace("_", "-"): value for key, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, {key.lower(): value for key, value in answer.getheaders()}, body


def test_the_page_is_served_with_a_tag_and_not_twice(server: Server) -> None:
    status, headers, body = ask(server)
    assert status == 200
    assert body.startswith("<!doctype html>")
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    status, again, body = ask(server, If_None_Match=headers["etag"])
    assert (status, body, again["etag"]) == (304, "", headers["etag"])


def test_a_change_of_any_file_makes_another_tag(server: Server) -> None:
    tags = [ask(server)[1]["etag"]]
    rig.add_epoch(server.folder, 2, steps=3, score=0.75)
    status, headers, body = ask(server, If_None_Match=tags[0])
    assert status == 200
    assert "0.750" in body
    tags.append(headers["etag"])
    (server.folder / "previews" / "first_batch.jpg").unlink()
    tags.append(ask(server)[1]["etag"])
    assert len(set(tags)) == 3


def test_a_half_line_does_not_hurt(server: Server) -> None:
    with (server.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert ask(server)[0] == 200


@pytest.mark.parametrize(
    "path", ["/run.yaml", "/../run.yaml", "/?x=1", "/%2e%2e/", "/index.html", "http://other/", "*"]
)
def test_no_other_address_is_answered(server: Server, path: str) -> None:
    status, _, body = ask(server, path)
    assert status in (403, 404)
    assert "data.yaml" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "BREW"])
def test_no_other_method_is_answered(server: Server, method: str) -> None:
    assert ask(server, method=method)[0] == 405


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8770", "", "127.0.0.1", "localhost.evil.example"])
def test_another_host_is_refused(server: Server, host: str) -> None:
    status, _, body = ask(server, Host=host)
    assert status == 403
    assert "data.yaml" not in body


def test_localhost_is_this_host(server: Server) -> None:
    assert ask(server, Host=f"localhost:{server.server_port}")[0] == 200


def test_it_listens_on_the_loopback_address_alone(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    with socket.socket() as other:
        other.settimeout(2)
        with pytest.raises(OSError, match=r"refused|timed out|unreachable"):
            other.connect(("127.0.0.2", server.server_port))  # another address of the same machine


def test_nonsense_and_silence_harm_nobody(server: Server) -> None:
    for nonsense in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b""):
        with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
            connection.sendall(nonsense)
    with socket.create_connection(("127.0.0.1", server.server_port)):  # says nothing, and stays
        assert ask(server)[0] == 200


def test_a_folder_that_goes_is_said(server: Server) -> None:
    os.rename(server.folder, server.folder.with_name("gone"))  # noqa: PTH104
    status, _, body = ask(server)
    assert status == 503
    assert "cannot be read now" in body
    os.rename(server.folder.with_name("gone"), server.folder)  # noqa: PTH104
    assert ask(server)[0] == 200


def test_a_port_that_is_taken_is_a_mistake(run: Path, server: Server) -> None:
    with pytest.raises(UserError, match=f"--port {server.server_port} is taken"):
        serve(run, server.server_port)


def test_the_command_says_its_address_and_ends_with_ctrl_c(run: Path) -> None:
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from boxwright.__main__ import main; code = main(sys.argv[1:]);"
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    command = [sys.executable, "-c", code, "report", "--watch", str(run), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        said = process.stderr.readline()
        port = int(said.split(":")[2].split("/")[0])
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                connection.request("GET", "/")
                status = connection.getresponse().status
                connection.close()
                break
            except ConnectionError:
                time.sleep(0.05)
        assert status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stderr.read() == "stopped\n"
