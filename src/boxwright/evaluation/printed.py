"""A judgement → the tables that a person reads, at most 100 columns wide, in plain ASCII."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from boxwright.evaluation.coco_ap import FIGURES
from boxwright.evaluation.conventions import Judgement

MEANT = {"ignore": "ignored", "count": "counted", "delete": "deleted"}
_CLASSES = 100  # rows of the table of classes; scores.json has all


def tables(
    judgement: Judgement, *, images_per_second: float = math.nan, threshold: float = math.nan, note: str = ""
) -> str:
    """All of them under each other; `note` says why `threshold` is not the one with the best F1, if it is not."""
    scores, voc = judgement.scores, judgement.voc
    keys = list(voc[0].figures)
    difficult = _difficult(judgement)
    lines = [_headline(judgement), f"{_counted(scores.images, 'picture')}, {_counted(scores.objects, 'object')}", ""]
    lines += _lines(
        ["what each would print", "AP", "AP50", "AP75", "how it counts"],
        [
            [one.who, *(_figure(one.figures[k]) if k in one.figures else "" for k in ("AP", "AP50", "AP75")), one.rule]
            for one in judgement.printed
        ],
    )
    lines += ["", *_coco(judgement, difficult), ""]
    head = [f"{'11 pt' if key.startswith('07') else 'area'} {_iou(key)}" for key in keys]
    lines += _lines(
        ["VOC: difficult objects" if difficult else "VOC", "sides", *head],
        [
            [
                MEANT[v.difficult] if difficult else "",
                "+1" if v.plus_one else "",
                *(_figure(v.figures[k]) for k in keys),
            ]
            for v in voc
            if difficult or v.difficult == "ignore"
        ],
    )
    if not difficult:
        lines.append("no figure depends on difficult objects: there are none, or they change nothing")
    if judgement.intervals:
        lines += ["", *_intervals(judgement.intervals)]
    lines += ["", *_per_class(judgement)]
    facts = [f"speed {images_per_second:.1f} images/s"] if math.isfinite(images_per_second) else []
    if math.isfinite(threshold):
        facts.append(f"no best threshold: {note}" if note else f"best F1 from a score of {threshold:.3f}")
    return "\n".join([*lines, *(["", "; ".join(facts)] if facts else [])])


def _headline(judgement: Judgement) -> str:
    """The two figures that are asked for first, with their intervals where there are any."""
    said: dict[str, tuple[float, float]] = judgement.intervals.get("coco", {})
    parts: list[str] = []
    for name in ("AP", "AP50"):
        part = f"{name} {_figure(judgement.scores.coco[name])}"
        if name in said:
            part += f" [{' - '.join(_figure(one) for one in said[name])}]"
        parts.append(part)
    return "  ".join([*parts, "(COCO)"])


def _difficult(judgement: Judgement) -> bool:
    """Whether any figure depends on what is done with difficult objects."""
    kinds = [[v.figures for v in judgement.voc if v.difficult == kind] for kind in MEANT]
    return not all(_same(kinds[0], kind) for kind in kinds[1:]) or not all(
        _same([judgement.coco["ignore"]], [judgement.coco[kind]]) for kind in MEANT
    )


def _same(one: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> bool:
    """Whether the figures that both have are equal."""
    pairs = [(a[key], b[key]) for a, b in zip(one, other, strict=True) for key in a.keys() & b.keys()]
    return all(x == y or (math.isnan(x) and math.isnan(y)) for x, y in pairs)


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _coco(judgement: Judgement, difficult: bool) -> list[str]:
    coco = judgement.scores.coco
    lines = ["COCO  " + "  ".join(f"{name} {_figure(coco[name])}" for name in FIGURES[:6])]
    lines.append("      " + "  ".join(f"{name} {_figure(coco[name])}" for name in FIGURES[6:]))
    for done in ("ignore", "delete") if difficult else ():
        row = judgement.coco[done]
        figures = "  ".join(f"{name} {_figure(row[name])}" for name in ("AP", "AP50", "AP75"))
        lines.append(f"      {figures}  with difficult objects {MEANT[done]}")
    return lines


def _intervals(said: dict[str, Any]) -> list[str]:
    parts = [
        f"{_name(key)} {_figure(low)}-{_figure(high)}"
        for kind in ("coco", "voc")
        for key, (low, high) in said[kind].items()
    ]
    head = f"{said['level']:.0%} of {said['resamples']} resamples of the pictures:"
    lines = [head]
    for part in parts:
        if len(lines[-1]) + len(part) > 96 or lines[-1] is head:
            lines.append(f"  {part}")
        else:
            lines[-1] += f"   {part}"
    return lines


def _per_class(judgement: Judgement) -> list[str]:
    keys = ["AP", "AP50", "AP75", "07@50", "area@50"]
    between = judgement.intervals.get("per_class", {})
    rows: list[list[str]] = []
    for name, row in list(judgement.per_class.items())[:_CLASSES]:
        cells = [_short(name), f"{int(row['objects']):,}", *(_figure(row[key]) for key in keys)]
        if name in between:
            low, high = between[name]["AP"]
            cells.append(f"{_figure(low)}-{_figure(high)}" if math.isfinite(low) else "-")
        rows.append(cells)
    more = len(judgement.per_class) - len(rows)
    head = ["class", "objects", "AP", "AP50", "AP75", "11 pt .50", "area .50", *(["AP's interval"] if between else [])]
    return [*_lines(head, rows), *([f"and {more} classes more: see scores.json"] if more else [])]


def _lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns, the first and any of words to the left, numbers to the right."""
    table = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[at]) for row in table) for at in range(len(head))]
    words = [at == 0 or any(cell and not cell[0].isdigit() and cell != "-" for cell in column[1:])
             for at, column in enumerate(zip(*table, strict=True))]  # fmt: skip
    lines = [
        "  ".join(cell.ljust(width) if left else cell.rjust(width)
                  for cell, width, left in zip(row, widths, words, strict=True)).rstrip()
        for row in table
    ]  # fmt: skip
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _figure(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def _short(name: str) -> str:
    """A class's name, in what every terminal takes."""
    plain = "".join(one if one.isprintable() else f"\\x{ord(one):02x}" for one in name)
    plain = plain.encode("ascii", "backslashreplace").decode()
    return plain if len(plain) <= 24 else plain[:21] + "..."


def _iou(key: str) -> str:
    return f"at .{key.split('@')[1].replace('.', '')}" if key.split("@")[1] != "100" else "at 1"


def _name(key: str) -> str:
    return f"{'11 pt' if key.startswith('07') else 'area'} {_iou(key)}" if "@" in key else key
