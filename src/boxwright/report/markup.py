"""Values → HTML: every text is escaped by the one function that makes elements, so none can be forgotten."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable
from typing import Any

VOID = ("br", "col", "hr", "img", "input", "link", "meta")
NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # no HTML page may hold these


class Html(str):
    """Text that is HTML already; any other text is escaped where it enters."""

    __slots__ = ()


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. `class_` is class, `data_x` is data-x; None and False are left out, True has no value."""
    pairs = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID:
        assert not children
        return Html(f"<{name}{pairs}>")
    return Html(f"<{name}{pairs}>{join(children)}</{name}>")


def join(parts: Iterable[Any]) -> Html:
    """Parts behind each other: elements as they are, text escaped, None left out."""
    return Html("".join(part if isinstance(part, Html) else escape(str(part)) for part in parts if part is not None))


def escape(text: str) -> str:
    """Text as HTML shows it, whatever is in it: markup, quotes, control characters, halves of a surrogate pair."""
    return html.escape(NOT_TEXT.sub("\ufffd", text), quote=True)


def name(text: Any) -> Html:
    """A name out of a file: set apart, so that one written from right to left turns nothing else round."""
    return tag("bdi", str(text), class_="name")


def shortened(text: str, most: int) -> str:
    """At most `most` letters, for places that cannot grow."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def fraction(value: float | None) -> str:
    """A score, share or AP with three digits as the commands print it; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def number(value: float | None, digits: int = 4) -> str:
    """A loss, rate or speed with a few significant digits; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    return text.replace("e-0", "e-").replace("e+0", "e+")


def plural(count: float, what: str) -> str:
    """What is counted, without the number: `picture` for one, else `pictures`."""
    return what if count == 1 else f"{what}s"


def difference(value: float, digits: int = 3) -> str:
    """A change with its sign; a dash where one side is missing."""
    if not math.isfinite(value):
        return "–"
    return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def table(
    head: Iterable[Any],
    rows: Iterable[Iterable[Any]],
    *,
    caption: str,
    sortable: bool = False,
    words: int = 1,
    last: int = 0,
) -> Html:
    """A table in a frame that scrolls by itself; the first `words` and `last` columns are words, the others numbers.

    A cell is a value or, where it is not sorted by its text, `(what is shown, what it is sorted by)`.
    """
    columns = list(head)

    def style(place: int) -> str | None:
        return None if place < words or place >= len(columns) - last else "n"

    heading = tag("tr", *(tag("th", text, scope="col", class_=style(i)) for i, text in enumerate(columns)))
    body = [tag("tr", *(_cell(cell, style(i), first=i == 0) for i, cell in enumerate(row))) for row in rows]
    made = tag(
        "table",
        tag("caption", caption),
        tag("thead", heading),
        tag("tbody", *body),
        class_="sortable" if sortable else None,
    )
    return tag("div", made, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _cell(cell: Any, style: str | None, *, first: bool) -> Html:
    shown, key = cell if isinstance(cell, tuple) else (cell, None)
    if isinstance(key, float):
        key = f"{key:.6g}" if math.isfinite(key) else ""
    return tag("th", shown, scope="row", data_v=key) if first else tag("td", shown, class_=style, data_v=key)


def _attribute(key: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    key = key.rstrip("_").replace("_", "-")
    return f" {key}" if value is True else f' {key}="{escape(str(value))}"'
