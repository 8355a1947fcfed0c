"""Records → the names of their pictures in a new folder: distinct everywhere, and found by the format's readers."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from boxwright.data.formats.written import Named, Writer
from boxwright.data.images import EXTENSIONS, read_header
from boxwright.types import Record, UserError


def picture_names(records: Sequence[Record], writer: Writer, title: str) -> list[Named]:
    """Records by names that no two share, not even where a and A are one name; ids are kept where they can be.

    Raises `UserError` for a picture that no name would let the readers of the format find: a GIF in a folder.
    """
    wanted = [_possible(record.id, writer) for record in records]
    suffixes = [_suffix(record, writer, title) for record in records]
    folders = {parent.as_posix().casefold() for stem in wanted for parent in PurePosixPath(stem).parents}
    taken: set[str] = set()
    names = list(wanted)
    for index in sorted(range(len(records)), key=lambda index: wanted[index] != records[index].id):
        number = 1
        while (key := names[index].casefold()) in taken or {f"{key}{suffixes[index].lower()}", f"{key}.txt"} & folders:
            number += 1
            names[index] = f"{wanted[index]}_{number}"
        taken.add(key)
    return [
        Named(f"{name}{suffix}", replace(record, id=name))
        for name, suffix, record in zip(names, suffixes, records, strict=True)
    ]


_MOST_BYTES = 240  # of a name: file systems take 255 with the extension
_MOST_FOLDERS = 12


def _possible(id: str, writer: Writer) -> str:
    """The nearest to an id that every reader of the format can find a picture by."""
    letters = unicodedata.normalize("NFC", id).replace("\\", "_")
    letters = "".join("_" if unicodedata.category(letter).startswith("C") else letter for letter in letters)
    parts = [_part(part) for part in letters.split("/")]
    parts = [*(f"{part}_" if part.lower() in writer.closed else part for part in parts[:-1]), parts[-1]]
    if re.fullmatch("[A-Za-z]:", parts[0]):
        parts[0] = f"{parts[0][0]}_"  # the drive of a Windows path
    if not writer.nested or len(parts) > _MOST_FOLDERS:
        parts = [_part("_".join(parts))]
    return "/".join(parts)


def _part(part: str) -> str:
    part = part.strip()
    if not part or part.startswith("."):  # hidden, or no name at all
        part = f"_{part}"
    if len(data := part.encode()) > _MOST_BYTES:
        digest = hashlib.sha256(data).hexdigest()[:12]
        part = f"{data[: _MOST_BYTES - 13].decode(errors='ignore')}_{digest}"
    return part


def _suffix(record: Record, writer: Writer, title: str) -> str:
    """The extension of a picture: its own, or that of what it holds where its own says nothing."""
    own = Path(record.image).suffix
    if own.lower() in EXTENSIONS:
        return own
    form = read_header(record.image).format
    if form != "GIF":
        return {"JPEG": ".jpg", "TIFF": ".tif"}.get(form, f".{form.lower()}")
    if not writer.listed:
        raise UserError(f"{record.image} is a GIF, which nothing finds in a folder of {title}. Make a PNG of it first")
    return own if not record.id.endswith(own) else ""
