"""Pictures on disk → small JPEGs inside the page."""

from __future__ import annotations

import base64
from functools import lru_cache
from io import BytesIO
from pathlib import Path

from boxwright.errors import UserError
from boxwright.report.markup import Html, tag

BUDGET = 2_600_000  # bytes of all pictures of a page together; base64 makes a third more of them
MOST = 260_000  # of one
STEPS = (
    (1200, 82),
    (900, 80),
    (720, 76),
    (560, 70),
    (400, 60),
)  # longer side in pixels, JPEG quality: the first that fits


def embedded(path: Path, alt: str, *, share: int, budget: int = BUDGET) -> Html | None:
    """An `<img>` with the picture in it, one of `share` on the page; None where it cannot be read."""
    try:
        facts = path.stat()
        found = _jpeg(path, facts.st_mtime_ns, facts.st_size, min(MOST, budget // max(share, 1)))
    except (OSError, UserError, ValueError):
        return None
    address, width, height = found
    return tag("img", src=address, alt=alt, width=width, height=height, decoding="async")


class Album:
    """The pictures of a page, as long as there is room; it knows which are not in it."""

    def __init__(self, budget: int = BUDGET) -> None:
        self._left = budget
        self._left_out = 0
        self._unread: list[str] = []

    def picture(self, path: Path, alt: str, *, share: int) -> Html | None:
        """As `embedded`; None also where the page has no room left."""
        if self._left <= 0:
            self._left_out += 1
            return None
        image = embedded(path, alt, share=share)
        if image is None:
            self._unread.append(path.name)
        elif (size := len(image) * 3 // 4) > self._left:
            self._left, self._left_out, image = 0, self._left_out + 1, None
        else:
            self._left -= size
        return image

    def notes(self) -> list[str]:
        """What is not on the page, as sentences."""
        made: list[str] = []
        if self._unread:
            more = f" and {len(self._unread) - 3} more" if len(self._unread) > 3 else ""
            named = ", ".join(self._unread[:3])
            made.append(f"Pictures that cannot be read, or claim more than 100 megapixels: {named}{more}.")
        if self._left_out:
            made.append(
                f"{self._left_out:,} pictures are left out: the page has no room for more. They are in pictures/."
            )
        return made


@lru_cache(maxsize=128)  # a page that is made again every few seconds has mostly the same pictures
def _jpeg(path: Path, modified: int, size: int, limit: int) -> tuple[str, int, int]:
    from PIL import Image

    from boxwright.data.images import decode

    picture = Image.fromarray(decode(path))
    fitted, data = picture, b""
    for side, quality in STEPS:
        fitted = picture
        if max(picture.size) > side:
            scale = side / max(picture.size)
            fitted = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
        file = BytesIO()
        fitted.save(file, "JPEG", quality=quality, optimize=True)
        data = file.getvalue()
        if len(data) <= limit:
            break
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii"), fitted.width, fitted.height
