"""scores.json → AP by every rule, with the rule and whose it is, and AP of each class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from boxwright.report.charts import bar
from boxwright.report.markup import Html, fraction, join, name, number, table, tag
from boxwright.report.reading import Judged

RULES = (
    ("coco", "COCO", "AP is the mean over IoU 0.50 to 0.95 and all classes; AR the recall with so many boxes."),
    ("voc", "Pascal VOC", "07@50 is VOC 2007's mean of 11 points, area the one since 2010; the IoU after the @."),
)
ORIGIN = ("weights", "detections", "data", "split")
INTERVAL = "95 %"


def scores(judged: Judged) -> Html | None:
    """AP by every rule, and of each class."""
    found = judged.scores
    parts = [part for key, title, said in RULES if (part := _rule(found, key, title, said))]
    blocks = [tag("div", *parts, class_="columns") if parts else None, _conventions(found), per_class(judged)]
    if not any(blocks):
        return None
    said = [f"{key} {found[key]}" for key in ORIGIN if isinstance(found.get(key), str)]
    said += [f"{number(float(found[key]))} {key}" for key in ("images", "objects") if isinstance(found.get(key), int)]
    return join([tag("p", "; ".join(said)) if said else None, *blocks])


def per_class(judged: Judged) -> Html | None:
    """Every figure of each class."""
    rows = class_figures(judged.scores)
    if not rows:
        return None
    keys = [key for key in dict.fromkeys(key for row in rows.values() for key in row) if key != "objects"]
    first = main_figure(rows)
    intervals = _mapping(_mapping(judged.scores.get("intervals")).get("per_class"))
    errors = judged.analysis.errors.per_class if judged.analysis else {}
    head = [
        "class",
        "",
        *keys,
        *([f"{first}, {INTERVAL}"] if intervals else []),
        *(["objects", "found"] if errors else []),
    ]
    body: list[list[Any]] = []
    for title, row in rows.items():
        value = row.get(first, math.nan)
        cells: list[Any] = [(name(title), title), (bar(value, 1.0, label=fraction(value)), value)]
        cells += [(fraction(row.get(key)), row.get(key, math.nan)) for key in keys]
        if intervals:
            cells.append((_interval(_mapping(intervals.get(title)).get(first)), value))
        if errors:
            known = errors.get(title)
            cells += [number(known.objects), number(known.found)] if known else ["–", "–"]
        body.append(cells)
    said = "A class far below the others has too few objects, or is confused with another."
    if intervals:
        said += (
            " 95 % are what other pictures of the same kind would give: where these ranges overlap widely, there are "
            "too few pictures to tell which class is better."
        )
    return join([table(head, body, caption="Each class", sortable=True), tag("p", said, class_="said")])


def class_figures(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Figures by class name, as far as scores.json has them."""
    return {str(title): figures(row) for title, row in _mapping(found.get("per_class")).items()}


def main_figure(rows: Mapping[str, Mapping[str, float]]) -> str:
    """The figure by which classes are compared: AP, or the first that there is."""
    keys = [key for row in rows.values() for key in row if key != "objects"]
    return "AP" if "AP" in keys or not keys else keys[0]


def figures(value: Any) -> dict[str, float]:
    """The figures of a mapping, NaN for null."""
    return {
        str(k): math.nan if v is None else float(v)
        for k, v in _mapping(value).items()
        if v is None or (isinstance(v, int | float) and not isinstance(v, bool))
    }


def _rule(found: Mapping[str, Any], key: str, title: str, said: str) -> Html | None:
    known = figures(found.get(key))
    if not known:
        return None
    intervals = _mapping(_mapping(found.get("intervals")).get(key))
    rows = [
        [k, bar(v, 1.0, label=fraction(v)), fraction(v), *([_interval(intervals.get(k))] if intervals else [])]
        for k, v in known.items()
    ]
    head = ["figure", "", title, *([INTERVAL] if intervals else [])]
    return tag("div", table(head, rows, caption=title, words=2), tag("p", said, class_="said"))


def _conventions(found: Mapping[str, Any]) -> Html | None:
    listed = found.get("conventions")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    if not entries:
        return None
    printed = [figures(entry.get("figures")) for entry in entries]
    keys = list(dict.fromkeys(key for row in printed for key in row))
    rows = [
        [str(entry.get("who", "")), *(fraction(row.get(key)) for key in keys), str(entry.get("rule", ""))]
        for entry, row in zip(entries, printed, strict=True)
    ]
    said = "The same detections: compare your AP only with figures of the same line."
    return join(
        [
            table(("who prints it", *keys, "how"), rows, caption="What other programs would print", last=1),
            tag("p", said, class_="said"),
        ]
    )


def _interval(pair: Any) -> str:
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(v, int | float) for v in pair):
        return "–"
    return "–".join(fraction(float(v)) for v in pair)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
