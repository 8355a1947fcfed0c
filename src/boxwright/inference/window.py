"""A window that shows pictures while they are predicted (`--show`). The one file that needs a display."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

import cv2
import numpy as np

from boxwright.types import UInt8, UserError

if TYPE_CHECKING:
    import tkinter


class LiveWindow:
    """A window for frames as they come, closed by q, Escape or its button; on macOS for the main thread only.

    Raises `UserError` on entering where there is no display or Python came without tkinter.

        with LiveWindow("boxwright") as window:
            for frame in video.frames():
                if not window.show(frame.image):
                    break
    """

    def __init__(self, title: str):
        self._title = title
        self._open = False

    def __enter__(self) -> Self:
        try:
            import tkinter
        except ImportError as error:
            raise UserError(
                "a live window needs tkinter, which this Python lacks; install it (apt install python3-tk,"
                " brew install python-tk) or show no window"
            ) from error
        try:
            self._root = tkinter.Tk()
        except tkinter.TclError as error:
            raise UserError(f"a live window needs a display, and there is none here ({error})") from error
        self._root.title(self._title)
        self._root.resizable(width=False, height=False)
        self._root.protocol("WM_DELETE_WINDOW", self._close)
        for key in ("<q>", "<Q>", "<Escape>"):
            self._root.bind(key, self._close)
        self._picture = tkinter.PhotoImage(master=self._root)
        tkinter.Label(self._root, image=self._picture, borderwidth=0).pack()
        self._open = True
        return self

    def show(self, image: UInt8) -> bool:
        """Shows a picture (H, W, 3) RGB, fitted to the screen; False once the person closed the window."""
        if not self._open:
            return False
        image = self._fit(image)
        height, width = image.shape[:2]
        header = f"P6 {width} {height} 255 ".encode()
        self._picture.configure(width=width, height=height, data=header + image.tobytes(), format="PPM")
        self._root.update()  # draws, and calls _close if a key asked for it
        return self._open

    def _fit(self, image: UInt8) -> UInt8:
        # 0.9: panels and the window's frame take some of the screen
        room = 0.9 * self._root.winfo_screenheight(), 0.9 * self._root.winfo_screenwidth()
        scale = min(1.0, room[0] / image.shape[0], room[1] / image.shape[1])
        if scale == 1.0:
            return image
        size = (max(1, int(image.shape[1] * scale)), max(1, int(image.shape[0] * scale)))
        return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)

    def _close(self, event: tkinter.Event[tkinter.Misc] | None = None) -> None:
        self._open = False
        self._root.withdraw()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        self._root.destroy()
