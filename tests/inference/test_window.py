"""The live window, on a virtual screen of its own: it shows what it is given and closes on a key."""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

HAS_TKINTER = all(importlib.util.find_spec(name) for name in ("tkinter", "_tkinter"))

# Xlib ends the process that loses its screen, so the window lives in a process of its own.
SHOW = """
import sys, time
import numpy as np
from boxwright.inference.window import LiveWindow

height, width, shown = (int(v) for v in sys.argv[1:])
with LiveWindow("boxwright") as window:
    for index in range(10):
        image = np.full((height, width, 3), (200, 30, 60), np.uint8)
        image[:, : width * (index + 1) // 20] = (30, 200, 60)  # at last the left half
        assert window.show(image)
    print("shown", flush=True)
    deadline = time.monotonic() + 20
    while shown and window.show(image) and time.monotonic() < deadline:
        time.sleep(0.01)
    print("open" if window.show(image) else "closed")
"""


def start(code: str, *arguments: str, display: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    environment = {**os.environ, "DISPLAY": display}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[str]:
    """A virtual display of 400 by 300 pixels, kept in the file Xvfb_screen0 of the test's folder."""
    if not shutil.which("Xvfb"):
        pytest.skip("no Xvfb here, so no virtual screen")
    if not HAS_TKINTER:
        pytest.skip("this Python has no tkinter")
    reader, writer = os.pipe()
    command = ["Xvfb", "-displayfd", str(writer), "-screen", "0", "400x300x24", "-nolisten", "tcp"]
    command += ["-fbdir", str(tmp_path)]
    server = subprocess.Popen(command, pass_fds=[writer], stderr=subprocess.DEVNULL)
    os.close(writer)
    with os.fdopen(reader) as file:
        number = file.readline().strip()
    yield f":{number}"
    server.terminate()
    server.wait(timeout=10)


def screenshot(folder: Path) -> np.ndarray:
    """(300, 400, 3) RGB of the virtual display's memory, an XWD file: a header, a colour table, B G R x."""
    data = (folder / "Xvfb_screen0").read_bytes()
    header = struct.unpack(">25I", data[:100])
    height, line, colours = header[5], header[12], header[19]
    start = header[0] + 12 * colours
    rows = np.frombuffer(data, np.uint8, height * line, start).reshape(height, line // 4, 4)
    return rows[..., 2::-1]


def test_frames_are_shown_and_a_key_closes(screen: str, tmp_path: Path) -> None:
    with start(SHOW, "120", "160", "1", display=screen) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "shown\n"
        shot = screenshot(tmp_path)
        left, right = ((shot == c).all(axis=2) for c in ((30, 200, 60), (200, 30, 60)))
        assert left.sum() == right.sum() == 120 * 80
        assert np.nonzero(left)[1].max() + 1 == np.nonzero(right)[1].min()
        if not shutil.which("xdotool"):
            process.kill()
            pytest.skip("no xdotool here, so nobody presses the key; the frames were shown")
        # Without a window manager, keys go to the window below the pointer.
        command = ["xdotool", "mousemove", "80", "60", "key", "q"]
        subprocess.run(command, env={**os.environ, "DISPLAY": screen}, check=True, timeout=20)
        out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == ("closed\n", "", 0)


def test_a_large_picture_is_fitted_to_the_screen(screen: str, tmp_path: Path) -> None:
    with start(SHOW, "1200", "1200", "1", display=screen) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "shown\n"
        shot = screenshot(tmp_path)
        process.kill()
        process.communicate()
    rows, columns = np.nonzero((shot == (200, 30, 60)).all(axis=2))
    assert rows.max() - rows.min() + 1 == 270  # 0.9 of the screen's height
    assert columns.max() - columns.min() + 1 == 135


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="there is always a display")
@pytest.mark.skipif(not HAS_TKINTER, reason="this Python has no tkinter")
@pytest.mark.parametrize("display", ["", ":987654"])
def test_no_display_is_told_in_one_line(display: str) -> None:
    with start(SHOW, "12", "16", "0", display=display) as process:
        out, err = process.communicate(timeout=30)
    assert out == ""
    assert "UserError: a live window needs a display" in err.splitlines()[-1]


def test_a_python_without_tkinter_is_told_in_one_line() -> None:
    code = "import sys; sys.modules['tkinter'] = None\n" + SHOW
    with start(code, "12", "16", "0", display="") as process:
        _, err = process.communicate(timeout=30)
    assert "UserError: a live window needs tkinter" in err.splitlines()[-1]


def test_importing_the_window_needs_no_tkinter() -> None:
    code = "import sys; import boxwright.inference.window; sys.exit('tkinter' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0
