"""`Checked` → the lines that a person reads, and the object that a program does."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from boxwright.data.check.doctor import Checked
from boxwright.data.check.figures import LEARNABLE, Figures, Spread
from boxwright.data.check.finding import KINDS, LEVELS, Finding, Level, counted

if TYPE_CHECKING:
    from boxwright.data.check.mend import Mended

HEADINGS: dict[Level, str] = {
    "error": "ERRORS: training refuses these",
    "lost": "LEFT OUT of training",
    "repaired": "REPAIRED when read",
    "suspect": "SUSPECT: used as it is, but have a look",
    "note": "NOTED, and fine",
}


def printable(text: str) -> str:
    """Text from files or their names, as a terminal may have it: what is no letter of a line stands as its escape.

    Controls, line breaks, marks that turn the direction of writing, and halves of letters are.
    """
    return "".join(
        letter if letter == " " or unicodedata.category(letter)[0] not in "CZ"
        else letter.encode("unicode_escape", "surrogatepass").decode("ascii")
        for letter in text
    )  # fmt: skip


def report_lines(checked: Checked, *, limit: int = 5) -> Iterator[str]:
    """The whole report; of each kind of finding the first `limit` are told one by one."""
    yield f"{printable(checked.data)}: {len(checked.classes):,} class{'es' * (len(checked.classes) != 1)}"
    for note in checked.notes:
        yield f"note: {printable(note)}"
    yield ""
    yield from table(*summary_table(checked))
    yield from _findings(checked, limit)
    if checked.splits:
        yield ""
        yield from table(*class_table(checked))
        yield ""
        yield from table(*spread_table(checked))
        yield ""
        yield from area_lines(checked)
    yield ""
    yield verdict(checked)


def verdict(checked: Checked) -> str:
    """The last line: what training would do."""
    found = checked.findings
    if checked.errors:
        kinds = [kind for level, kind in found.kinds() if level == "error"]
        more = f" of {len(kinds)} kinds" if len(kinds) > 1 else ""
        hint = ". `--fix FOLDER` writes a corrected copy" if "split" not in kinds else ""
        return f"{checked.errors:,} error{'s' * (checked.errors > 1)}{more}: training refuses this dataset{hint}"
    counts = [f"{found.count(level):,} {word}" for level, word in _WORDS.items() if found.count(level)]
    return f"no errors{': ' if counts else ''}{', '.join(counts)}"


_WORDS: dict[Level, str] = {"lost": "left out", "repaired": "repaired", "suspect": "suspect", "note": "noted"}


def summary_table(checked: Checked) -> tuple[list[str], list[list[str]]]:
    head = ["split", "pictures", "used", "objects", "difficult", "empty", "errors", "left out", "repaired", "suspect",
            "noted"]  # fmt: skip
    rows: list[list[str]] = []
    for name, of in checked.splits.items():
        difficult = of.difficult + of.crowd
        numbers = [of.pictures, of.used, of.objects, difficult, of.empty]
        numbers += [checked.findings.count(level, name) for level in LEVELS]
        rows.append([name, *(f"{number:,}" for number in numbers)])
    others = {split for split, _, _ in checked.findings.counts}.difference(checked.splits)
    for name in sorted(others):
        counts = [f"{checked.findings.count(level, name):,}" for level in LEVELS]
        rows.append([name, "", "", "", "", "", *counts])
    return head, rows


def class_table(checked: Checked) -> tuple[list[str], list[list[str]]]:
    """Each class's objects and pictures by split, those that occur most first."""
    splits = checked.splits
    head = ["class", *(f"{name} {what}" for name in splits for what in ("objects", "pictures", "difficult"))]
    order = sorted(checked.classes, key=lambda name: -sum(of.classes[name].objects for of in splits.values()))
    rows: list[list[str]] = []
    for name in order:
        cells = [of.classes[name] for of in splits.values()]
        numbers = [number for row in cells for number in (row.objects, row.pictures, row.difficult + row.crowd)]
        rows.append([printable(name), *(f"{number:,}" for number in numbers)])
    return head, rows


def spread_table(checked: Checked) -> tuple[list[str], list[list[str]]]:
    head = ["", "split", "least", "quarter", "half", "three quarters", "most"]
    names = dict.fromkeys(name for of in checked.splits.values() for name in of.spreads)
    rows = [
        [name, split, *(f"{value:.3g}" if value < 100 else f"{value:,.0f}" for value in of.spreads[name].quantiles)]
        for name in names
        for split, of in checked.splits.items()
        if name in of.spreads
    ]
    return head, rows


def area_lines(checked: Checked) -> Iterator[str]:
    """COCO's three sizes, and what is lost at the size of training."""
    for split, of in checked.splits.items():
        yield f"{split}: {area_line(of, checked.imgsz)}"


def area_line(of: Figures, imgsz: int | None) -> str:
    if not of.objects:
        return "no objects"
    parts = [
        f"{name} {count / of.objects:.0%}"
        for name, count in (("small", of.small), ("medium", of.medium), ("large", of.large))
    ]
    line = f"objects by COCO's areas: {', '.join(parts)}"
    if of.under is not None:
        line += f"; at --imgsz {imgsz} {of.under:,} have a side under {LEARNABLE} pixels"
    extra = [
        f"{count:,} {what}"
        for count, what in (
            (of.truncated, "truncated"),
            (of.occluded, "occluded"),
            (of.crowd, "a crowd"),
            (of.parts, "<part> boxes (not objects)"),
            (of.fractional, "with corners between pixels"),
            (of.all_difficult, "pictures with difficult objects only"),
        )
        if count
    ]
    return "; ".join((line, *extra))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns under each other, the first to the left, the others to the right."""
    widths = [max(_width(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        cells = [
            cell + " " * (width - _width(cell)) if column == 0 else " " * (width - _width(cell)) + cell
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _width(text: str) -> int:
    """The columns of a terminal that text takes."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def _findings(checked: Checked, limit: int) -> Iterator[str]:
    last = None
    for (level, kind), listed in checked.findings.kinds().items():
        if level != last:
            yield ""
            yield HEADINGS[level]
            last = level
        total = checked.findings.total(level, kind)
        done = "" if level in ("error", "suspect", "note") else f"; training {listed[0].training}"
        yield f"  {KINDS[kind]}: {checked.findings.classes(level, kind) or total:,}{done}"
        for finding in listed[:limit]:
            yield f"    {line_of_finding(finding)}"
        if total > limit and limit:
            yield f"    and {total - min(limit, len(listed)):,} more"


def line_of_finding(finding: Finding) -> str:
    """Where, and what."""
    if finding.path is None:
        return printable(finding.reason)
    return printable(f"{finding.where}: {finding.reason}")


def mended_lines(mended: Mended) -> Iterator[str]:
    """What `--fix` did."""
    yield ""
    pictures = " + ".join(f"{count:,} {name}" for name, count in mended.pictures.items())
    many = "s" * (sum(mended.pictures.values()) != 1)
    changes = counted(mended.changes, "change")
    yield f"corrected copy: {pictures} picture{many}, {changes}; {printable(str(mended.data))}"
    for kind, count in mended.kinds.items():
        yield f"  {kind}: {count:,}"
    if mended.changes:
        yield f"  each with its line before and after in {printable(str(mended.data.parent / 'changes.txt'))}"


# --- for programs


def as_json(checked: Checked) -> dict[str, Any]:
    """What `--json` prints: findings worst first, counts of all, figures, equal pictures."""
    return {
        "data": checked.data,
        "ok": not checked.errors,
        "errors": checked.errors,
        "classes": list(checked.classes),
        "notes": list(checked.notes),
        "decoded": checked.decoded,
        "imgsz": checked.imgsz,
        "counts": [
            {"split": split, "kind": kind, "level": level, "count": count}
            for (split, kind, level), count in checked.findings.counts.items()
        ],
        "findings": [_finding_json(finding) for finding in checked.findings],
        "splits": {name: _figures_json(of) for name, of in checked.splits.items()},
        "leaks": _groups_json(checked, several=True),
        "duplicates": _groups_json(checked, several=False),
    }


def _finding_json(finding: Finding) -> dict[str, Any]:
    return {
        "split": finding.split,
        "path": str(finding.path) if finding.path else None,
        "line": finding.line,
        "kind": finding.kind,
        "level": finding.level,
        "reason": finding.reason,
        "action": finding.action,
        "training": finding.training,
        "image": str(finding.image) if finding.image else None,
        "box": list(finding.box) if finding.box else None,
        "classes": list(finding.classes),
    }


def _figures_json(of: Figures) -> dict[str, Any]:
    plain = {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}
    plain["classes"] = {name: dataclasses.asdict(row) for name, row in of.classes.items()}
    plain["spreads"] = {name: _spread_json(spread) for name, spread in of.spreads.items()}
    return plain


def _spread_json(spread: Spread) -> dict[str, Any]:
    least, quarter, half, three_quarters, most = spread.quantiles
    return {
        "least": least, "quarter": quarter, "half": half, "three_quarters": three_quarters, "most": most,
        "histogram": list(spread.bars),
    }  # fmt: skip


def _groups_json(checked: Checked, *, several: bool) -> list[dict[str, Any]]:
    return [
        {
            "pictures": [{"split": split, "path": str(path)} for split, path in group.members],
            "pixels": group.pixels,
            "labels_differ": group.labels_differ,
        }
        for group in checked.groups
        if (len(group.splits) > 1) == several
    ]


def encodable(lines: Iterable[str], encoding: str | None) -> Iterator[str]:
    """Lines that a stream of that encoding takes: other letters stand as their escapes."""
    for line in lines:
        yield line.encode(encoding or "ascii", "backslashreplace").decode(encoding or "ascii")
