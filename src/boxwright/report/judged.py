"""An evaluation's figures and pictures → the parts of the page that say where AP is lost and what to mend."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from boxwright.evaluation.analysis import Analysis
from boxwright.evaluation.breakdown import Group
from boxwright.evaluation.curves import Curve
from boxwright.evaluation.errors import KINDS
from boxwright.report.charts import Axis, Graph, Line, Rule, bar, draw
from boxwright.report.followed import Section
from boxwright.report.grids import calibration, confusion
from boxwright.report.markup import Html, fraction, join, name, number, plural, table, tag
from boxwright.report.pictures import Album
from boxwright.report.reading import Judged, Shown
from boxwright.report.scored import scores

MEANT = {
    "class": "the box fits, the class is wrong",
    "place": "the class is right, the box fits badly",
    "both": "wrong class and badly placed",
    "duplicate": "a better detection has the object already",
    "background": "there is nothing",
    "missed": "no detection found the object",
    "false positives": "all wrong detections together",
    "false negatives": "all objects not found together",
}
GROUPS = {
    "best": ("Best", "The highest F1 first."),
    "worst": ("Worst", "Look here first: what do these pictures have in common?"),
    "random": ("Random", "Drawn by lot: what to expect of a new picture."),
}
FLAWLESS = "All found, nothing invented: the most objects first."  # of the best, where it is true of all
FIRST = 8  # pictures of the review list that are seen at once
MOST_SUSPECTS = 200  # rows of the review list


def sections(judged: Judged, album: Album) -> list[Section]:
    """What is known about the detections; parts without anything to tell are left out."""
    made = [Section("scores", "Scores", part)] if (part := scores(judged)) else []
    if analysis := judged.analysis:
        made += [
            Section("errors", "Where AP is lost", errors(analysis), "Errors"),
            Section("thresholds", "Threshold", thresholds(analysis)),
            Section("curves", "Precision and recall", tag("div", draw(precision(analysis.curves.overall, analysis)),
                    calibration(analysis.calibration), class_="graphs"), "Curves"),
            Section("confusion", "Confusion", confusion(analysis.confusion)),
            Section("sizes", "Size and crowding", breakdown(analysis), "Sizes"),
        ]  # fmt: skip
    if pictures := gallery(judged, album):
        made.append(Section("pictures", "Pictures", pictures))
    if judged.analysis:
        made.append(Section("review", "Annotations to look at", review(judged, judged.analysis, album), "Review"))
    return made


def curves_data(analysis: Analysis) -> Html:
    """The curves of every class, for the script that shows one instead of all: no program, only data."""
    curves = analysis.curves
    told: dict[str, Any] = {
        "recalls": _rounded(curves.recalls),
        "thresholds": _rounded(curves.thresholds),
        "classes": [
            {
                "name": title,
                "at": _finite(best.threshold),
                "told": {
                    "best_precision": fraction(curve.ap),
                    "f1": fraction(best.f1),
                    "precision": fraction(best.precision),
                    "recall": fraction(best.recall),
                },
                **{key: _rounded(getattr(curve, key)) for key in ("best_precision", "precision", "recall", "f1")},
            }
            for title, curve, best in (
                ("all classes", curves.overall, analysis.thresholds.overall),
                *(
                    (title, curve, analysis.thresholds.per_class[title])
                    for title, curve in curves.per_class.items()
                    if title in analysis.thresholds.per_class
                ),
            )
        ],
    }
    text = json.dumps(told, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")
    return Html(f'<script type="application/json" id="curves-data">{text}</script>')


def errors(analysis: Analysis) -> Html:
    """TIDE's kinds of mistakes, each with what AP would gain without it."""
    losses = analysis.errors.losses
    most = max((loss.gain for loss in losses.values() if math.isfinite(loss.gain)), default=0.0)
    rows = [[kind, bar(loss.gain, most, colour=1, label=fraction(loss.gain)), fraction(loss.gain), number(loss.count),
             MEANT.get(kind, "")] for kind, loss in losses.items()]  # fmt: skip
    per_class = [
        [
            (name(title), title),
            *((fraction(loss.gain), loss.gain) if (loss := one.losses.get(kind)) else "–" for kind in KINDS),
            (fraction(one.ap), one.ap),
        ]
        for title, one in analysis.errors.per_class.items()
    ]
    return join(
        [
            tag("p", f"AP at IoU {analysis.iou:g} is {fraction(analysis.errors.ap)}. The longer a bar, the more AP "
                "would rise if that kind of mistake alone were mended; the gains do not add up."),
            table(("kind", "", "AP gained", "how many", "what it is"), rows, caption="Kinds of mistakes (TIDE)",
                  words=2, last=1),
            tag("details", tag("summary", "By class"), table(("class", *KINDS, f"AP{analysis.iou * 100:g}"), per_class,
                caption="AP gained without each kind of mistake, by class", sortable=True)),
        ]
    )  # fmt: skip


def thresholds(analysis: Analysis) -> Html:
    """Which score to show boxes from."""
    best = analysis.thresholds.overall
    curves = analysis.curves
    axis = Axis("threshold", 0.0, 1.0)
    graph = Graph(
        "By threshold",
        [
            Line(
                "F1" if key == "f1" else key,
                curves.thresholds,
                getattr(curves.overall, key),
                colour,
                dashed=key != "f1",
                key=key,
                told=fraction(getattr(best, key)),
            )
            for colour, key in enumerate(("f1", "precision", "recall"))
        ],
        axis,
        Axis("share", 0.0, 1.0),
        "Good: a broad top of F1, as then the exact threshold hardly matters. Higher thresholds show fewer boxes, "
        "more of them right.",
        [Rule(best.threshold, f"best F1 at {fraction(best.threshold)}", key="at")],
        picker="curves",
    )
    rows = [
        [(name(title), title), (fraction(one.threshold), one.threshold), (fraction(one.f1), one.f1),
         (fraction(one.precision), one.precision), (fraction(one.recall), one.recall), number(one.shown), one.note]
        for title, one in analysis.thresholds.per_class.items()
    ]  # fmt: skip
    head = ["class", "threshold", "F1", "precision", "recall", "boxes shown", ""]
    noted = any(one.note for one in analysis.thresholds.per_class.values())
    if not noted:
        head, rows = head[:-1], [row[:-1] for row in rows]
    told = (
        f"F1 is highest, {fraction(best.f1)}, if boxes with a score of at least {fraction(best.threshold)} are shown: "
        f"then {fraction(best.precision)} of the boxes are right and {fraction(best.recall)} of the objects are found."
    )
    if best.note:
        told = f"There is no best threshold: {best.note}."
    return join(
        [
            tag("p", told),
            tag("div", draw(graph), tag("div", table(head, rows, caption="Best threshold of each class",
                sortable=True, last=int(noted)), class_="beside"), class_="graphs"),
        ]
    )  # fmt: skip


def precision(curve: Curve, analysis: Analysis) -> Graph:
    """Precision by recall at the analysis' IoU."""
    return Graph(
        "Precision by recall",
        [Line("AP", analysis.curves.recalls, curve.best_precision, 0, key="best_precision", told=fraction(curve.ap))],
        Axis("recall", 0.0, 1.0),
        Axis(f"precision at IoU {analysis.iou:g}", 0.0, 1.0),
        "Good: close to the upper right corner. AP is the area under it; where it drops to 0 the rest is never found.",
        picker="curves",
    )


def breakdown(analysis: Analysis) -> Html:
    """AP and recall of objects by size and by how crowded they stand."""
    found = analysis.breakdown
    parts = [
        _groups("By size", "size", found.sizes, "COCO's sizes: small below 32 × 32 pixels, large from 96 × 96 on. "
                "If small ones are lost, train at a larger --imgsz."),
        _groups("By share of the picture", "side, relative", found.relative_sizes,
                "The side of an object as a share of the picture's: good is level."),
        _groups("By overlap within the class", "largest IoU", found.crowding,
                "Objects that overlap others of their class: if they are lost, suppression takes them away."),
        _groups("By neighbours", "neighbours", found.neighbours, "Objects by how many others touch them."),
    ]  # fmt: skip
    return tag("div", *parts, class_="columns")


def _groups(title: str, what: str, groups: Sequence[Group], said: str) -> Html:
    rows = [
        [group.name, bar(group.ap, 1.0, label=fraction(group.ap)), fraction(group.ap), fraction(group.recall),
         fraction(group.recall_shown), number(group.objects)]
        for group in groups
    ]  # fmt: skip
    head = (what, "", "AP", "recall", "shown", "objects")
    return tag("div", table(head, rows, caption=title, words=2), tag("p", said, class_="said"))


def gallery(judged: Judged, album: Album) -> Html | None:
    """Best, worst and random pictures, annotations beside predictions."""
    parts: list[Html] = []
    for group, (title, said) in GROUPS.items():
        members = [one for one in judged.gallery if one.group == group]
        if group == "best" and all(one.caption.endswith("; F1 1.000") for one in members):
            said = FLAWLESS
        shown = [tile for one in members if (tile := _tile(one, len(judged.gallery), album))]
        if shown:
            parts.append(join([tag("h3", title), tag("p", said, class_="said"), tag("div", *shown, class_="tiles")]))
    if not parts:
        return None
    told = "Left what is annotated (dashed), right what the network found at the recommended threshold."
    return join([tag("p", told), *parts])


def _tile(shown: Shown, count: int, album: Album) -> Html | None:
    image = album.picture(shown.file, f"{shown.image}: annotations beside predictions. {shown.caption}", share=count)
    if image is None:
        return None
    caption = tag("figcaption", name(shown.image), " ", shown.caption)
    return tag("figure", image, caption, class_="picture")


def review(judged: Judged, analysis: Analysis, album: Album) -> Html:
    """Annotations that a confident detection speaks against."""
    suspects = analysis.review.suspects
    if not suspects:
        return tag("p", "No annotation looks wrong: no confident detection speaks against one.")
    counts = ", ".join(f"{number(count)} {kind}" for kind, count in analysis.review.counts.items() if count)
    tiles = [
        tile for one in judged.gallery if one.group == "review" and (tile := _tile(one, len(judged.gallery), album))
    ]
    rows = [
        [number(place + 1), name(one.image), one.kind, *map(_maybe, (one.annotated_label, one.found_label)),
         (fraction(one.score), math.nan if one.score is None else one.score), (fraction(one.suspicion), one.suspicion),
         one.reason]
        for place, one in enumerate(suspects[:MOST_SUSPECTS])
    ]  # fmt: skip
    head = ("", "picture", "what", "annotated", "found", "score", "suspicion", "why")
    more = len(suspects) - MOST_SUSPECTS
    said = "The most suspicious first. Mending what is really wrong helps more than most options; not all of it is."
    listed = table(head, rows, caption="Review list", sortable=True, words=5, last=1)
    return join(
        [
            tag("p", f"{said} {counts}."),
            tag("div", *tiles[:FIRST], class_="tiles") if tiles else None,
            tag(
                "details",
                tag("summary", f"{len(tiles) - FIRST} more {plural(len(tiles) - FIRST, 'picture')}"),
                tag("div", *tiles[FIRST:], class_="tiles"),
            )
            if len(tiles) > FIRST
            else None,
            tag("details", tag("summary", f"The list of {min(len(suspects), MOST_SUSPECTS)}"), listed),
            tag("p", f"{number(more)} more are in analysis.json.", class_="said") if more > 0 else None,
        ]
    )


def _maybe(text: str | None) -> Html | str:
    return "–" if text is None else name(text)


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [_finite(value) for value in values]


def _finite(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None
