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
    except (OSError, UserError):
        return None
    address, width, height = found
    return tag("img", src=address, alt=alt, width=width, height=height, decoding="async")


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
