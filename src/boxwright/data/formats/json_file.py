"""A JSON file → its values, whatever is in the file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from boxwright.data.formats.base import RefusedError, read_bytes

HEAD = 1 << 16  # bytes that show what kind of JSON a file holds


def read_json(path: Path, limit: int, compact: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The value in a file; each object in it is replaced by `compact` of it as soon as it is read.

    Raises `RefusedError` where the file is no JSON, nested too deep or holds a number too long to be read.
    """
    data = read_bytes(path, limit)
    try:
        text = data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        raise RefusedError("is no UTF-8 text; save it as UTF-8", data.count(b"\n", 0, error.start) + 1) from None
    del data  # half of the memory, before the values need theirs
    try:
        return json.loads(text, object_hook=compact)
    except json.JSONDecodeError as error:
        raise RefusedError(f"is no JSON: {error.msg}, column {error.colno}", error.lineno) from None
    except RecursionError:
        raise RefusedError("is nested too deep") from None
    except ValueError:  # CPython reads no integer of more than 4,300 digits
        raise RefusedError("holds an integer of thousands of digits") from None


def has_keys(path: Path, *keys: str) -> bool:
    """Whether one of these keys is in the beginning of a file, without reading all of it."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD).replace(b"\0", b"")  # of UTF-16, what matters here
    except OSError:
        return False
    return re.search(rb'"(%s)"\s*:' % "|".join(keys).encode(), head) is not None
