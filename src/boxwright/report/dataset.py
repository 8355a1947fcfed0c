"""What the dataset doctor found → one HTML page: findings, figures, and pictures of the worst with boxes drawn in."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from boxwright.data.check.doctor import Checked
from boxwright.data.check.figures import Spread
from boxwright.data.check.finding import KINDS, Finding, Level, Picture
from boxwright.data.check.text import (
    HEADINGS,
    area_lines,
    class_table,
    line_of_finding,
    printable,
    spread_table,
    summary_table,
    verdict,
)
from boxwright.data.check.voc_xml import corners, is_box, read_document
from boxwright.data.feeding import ReadingError
from boxwright.data.formats.base import Box
from boxwright.data.images import ImageError, decode
from boxwright.report.charts import figure
from boxwright.report.followed import Section
from boxwright.report.markup import Html, join, name, number, table, tag
from boxwright.report.page import document
from boxwright.types import Record

if TYPE_CHECKING:
    from boxwright.types import UInt8

SHOWN = 48  # pictures on the page
OF_A_KIND = 8
LISTED = 50  # findings of a kind that are told one by one
SIDE = 480  # pixels of a picture's longer side
_WORST: tuple[Level, ...] = ("error", "suspect", "lost", "repaired")


def of_dataset(checked: Checked) -> str:
    """The page of a checked dataset."""
    head = join(
        [
            tag("p", tag("span", "refused" if checked.errors else "no errors", class_=_state(checked)), class_="lead"),
            tag("p", verdict(checked)),
            tag("ul", *(tag("li", printable(note)) for note in checked.notes), class_="notes", aria_label="Notes")
            if checked.notes
            else None,
        ]
    )
    sections = [
        Section("summary", "Summary", _table(*summary_table(checked), caption="Findings by split")),
        Section("findings", "Findings", _findings(checked)),
    ]
    if pictures := list(_pictures(checked)):
        sections.append(Section("pictures", "Pictures of the worst", tag("div", *pictures, class_="tiles")))
    if checked.splits:
        sections.append(Section("classes", "Classes", _table(*class_table(checked), caption="Objects by class")))
        sections.append(Section("sizes", "Sizes", _sizes(checked)))
    return document(f"Check of {printable(checked.data)}", head, sections)


def _state(checked: Checked) -> str:
    return "state" if checked.errors else "state finished"


def _table(head: list[str], rows: list[list[str]], *, caption: str) -> Html:
    named = [[name(row[0]), *((cell, _sorted(cell)) for cell in row[1:])] for row in rows]
    return table(head, named, caption=caption, sortable=True)


def _sorted(cell: str) -> float | str:
    try:
        return float(cell.replace(",", ""))
    except ValueError:
        return cell


def _findings(checked: Checked) -> Html:
    if not checked.findings.counts:
        return tag("p", "Nothing was found.", class_="absent")
    parts: list[Html] = []
    last = None
    for (level, kind), listed in checked.findings.kinds().items():
        if level != last:
            parts.append(tag("h3", HEADINGS[level]))
            last = level
        total = checked.findings.total(level, kind)
        more = total - min(total, LISTED)
        lines = [tag("li", line_of_finding(finding)) for finding in listed[:LISTED]]
        lines += [tag("li", f"and {more:,} more")] if more else []
        heading = f"{KINDS[kind]}: {checked.findings.classes(level, kind) or total:,}; training {listed[0].training}"
        parts.append(
            tag(
                "details",
                tag("summary", heading),
                tag("ul", *lines, class_="lines"),
                open=level in ("error", "suspect"),
            )
        )
    return join(parts)


# --- pictures


def _pictures(checked: Checked) -> Iterator[Html]:
    """Figures of the worst findings, each picture once."""
    records = {record.image: record for those in checked.records.values() for record in those}
    shown: set[Picture] = set()
    for level in _WORST:
        for (of, kind), listed in checked.findings.kinds().items():
            drawn = 0
            for finding in listed if of == level else ():
                if drawn == OF_A_KIND or len(shown) == SHOWN:
                    break
                if finding.image is None or finding.image in shown:
                    continue
                address = _thumbnail(finding, records.get(finding.image))
                if address is None:
                    continue
                shown.add(finding.image)
                drawn += 1
                source, width, height = address
                picture = tag("img", src=source, alt=KINDS[kind], width=width, height=height, decoding="async")
                caption = tag("figcaption", name(KINDS[kind]), ": ", line_of_finding(finding))
                yield tag("figure", picture, caption, class_="picture")


def _thumbnail(finding: Finding, record: Record | None) -> tuple[str, int, int] | None:
    """A small JPEG of the picture with its boxes thin and the one that is meant thick; None where it has no pixels."""
    import cv2
    import numpy as np

    assert finding.image is not None
    try:
        pixels = decode(finding.image)
    except (ImageError, ReadingError):
        return None
    height, width = pixels.shape[:2]
    scale = SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small: UInt8 = np.ascontiguousarray(
        cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR), np.uint8
    )
    for box in record.boxes.tolist() if record else _all_in_file(finding):
        _draw(small, box, scale, _QUIET, 1)
    if meant := finding.box or _in_file(finding):
        _draw(small, meant, scale, _LOUD, 3)
    done, data = cv2.imencode(".jpg", small[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 75])
    if not done:
        return None
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii"), size[0], size[1]


_QUIET, _LOUD = (90, 200, 250), (255, 60, 60)


def _draw(image: UInt8, box: Sequence[float], scale: float, colour: tuple[int, int, int], thick: int) -> None:
    import cv2

    limit = 4 * SIDE  # a box far outside: OpenCV takes 32 bits
    x1, y1, x2, y2 = (round(min(max(edge * scale, -limit), limit)) for edge in box)
    cv2.rectangle(image, (x1, y1), (x2, y2), colour, thick, cv2.LINE_AA)


def _in_file(finding: Finding) -> Box | None:
    """The box that the VOC object on the finding's line has, as far as it is one."""
    return next((box for box, lines in _objects(finding) if finding.line in lines), None)


def _all_in_file(finding: Finding) -> list[Box]:
    """The boxes of a VOC file as they are written."""
    return [box for box, _ in _objects(finding)]


def _objects(finding: Finding) -> Iterator[tuple[Box, set[int]]]:
    """The boxes in the VOC file of a finding, each with the lines of its object."""
    if not isinstance(finding.path, Path) or finding.path.suffix.lower() != ".xml":
        return
    document = read_document(finding.path)
    for item in document.objects() if document else ():
        if is_box(box := corners(item)):
            assert document
            xmin, ymin, xmax, ymax = box
            lines = {document.lines[element] for element in item.iter() if element in document.lines}
            yield (xmin - 1, ymin - 1, xmax, ymax), lines


# --- sizes


def _sizes(checked: Checked) -> Html:
    graphs = [
        _histogram(f"{title}, {split}", spread)
        for split, of in checked.splits.items()
        for title, spread in of.spreads.items()
        if len(spread.bars) > 1
    ]
    lines = [tag("p", line) for line in area_lines(checked)]
    head, rows = spread_table(checked)
    return join(
        [*lines, table(head, rows, caption="Least, quartiles and most", words=2), tag("div", *graphs, class_="graphs")]
    )


def _histogram(title: str, spread: Spread) -> Html:
    """Bars of equal steps, between the least and the most."""
    width, height, base = 520, 160, 130
    most = max(spread.bars)
    step = width / len(spread.bars)
    bars: list[Any] = [
        tag(
            "rect", tag("title", f"{count:,}"), x=f"{index * step + 1:.1f}", y=f"{base - base * count / most:.1f}",
            width=f"{step - 2:.1f}", height=f"{base * count / most:.1f}", class_="bar c0",
        )
        for index, count in enumerate(spread.bars)
    ]  # fmt: skip
    ends = [
        tag("text", number(spread.low), x=0, y=height - 8, class_="start"),
        tag("text", f"half: {number(spread.quantiles[2])}", x=width / 2, y=height - 8, class_="middle"),
        tag("text", number(spread.high), x=width, y=height - 8, class_="end"),
    ]
    drawing = tag("svg", *bars, *ends, viewBox=f"0 0 {width} {height}", role="img", aria_label=title)
    return figure(title, None, drawing, f"the highest bar counts {most:,}")
