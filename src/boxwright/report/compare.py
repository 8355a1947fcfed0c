"""Several runs side by side: their curves over each other, final figures, options that differ, classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from boxwright.progress import clock
from boxwright.report.charts import COLOURS, Axis, Graph, Line, draw, swatch
from boxwright.report.described import changed, defaults, shown
from boxwright.report.followed import Section, column
from boxwright.report.markup import Html, difference, fraction, join, name, number, table, tag
from boxwright.report.page import STATES, document
from boxwright.report.reading import Found
from boxwright.report.scored import class_figures, figures, main_figure


@dataclass(frozen=True)
class _Final:
    """A figure that a run ends with: its column in results.csv, or its place in scores.json."""

    title: str
    column: str
    rule: str = ""
    key: str = ""
    better: bool | None = True  # whether more is better; None: neither

    def of(self, run: Found) -> float:
        """The figure of a run, NaN where it is not known."""
        if self.column == "images_per_s":
            speeds = sorted(v for v in column(run.steps, self.column) if math.isfinite(v))
            return speeds[len(speeds) // 2] if speeds else math.nan
        scores = figures(_mapping(run, self.rule)) if self.rule else {}
        return run.best.get(self.column, scores.get(self.key, math.nan))


FINAL = (
    _Final("mAP", "map", "coco", "AP"),
    _Final("mAP50", "map50", "coco", "AP50"),
    _Final("mAP75", "map75", "coco", "AP75"),
    _Final("VOC 2007", "voc07", "voc", "07@50"),
    _Final("validation loss", "val_loss", better=False),
    _Final("best epoch", "epoch", better=None),
    _Final("pictures a second", "images_per_s"),
)
CURVES = (  # title, where from, column, y axis, what good looks like
    ("mAP", "evaluations", "map", Axis("mAP, IoU 0.50 to 0.95", 0.0, 1.0), "Good: higher and earlier."),
    ("mAP50", "evaluations", "map50", Axis("mAP at IoU 0.50", 0.0, 1.0), "Good: higher and earlier."),
    ("Loss", "steps", "loss", Axis("loss of training", 0.0), "Lower is better only between runs with the same model."),
    ("Loss on validation", "evaluations", "val_loss", Axis("loss on validation", 0.0),
     "Good: still falling. The run that turns up first learns by heart first."),
    ("Learning rate", "steps", "lr", Axis("learning rate", 0.0), "What each run was told to do."),
    ("Speed", "steps", "images_per_s", Axis("pictures a second", 0.0), "Good: high and level."),
)  # fmt: skip


def of_runs(runs: Sequence[Found]) -> str:
    """The page about several runs; the first is what the others are compared with."""
    labels = titles(runs)
    notes = [f"{label}: {note}" for label, run in zip(labels, runs, strict=True) for note in _notes(run)]
    listed = [
        tag("li", swatch(i, dashed=i >= COLOURS), name(label), " ", tag("span", STATES[run.state], class_="said"))
        for i, (label, run) in enumerate(zip(labels, runs, strict=True))
    ]
    head = join(
        [
            tag("ul", *listed, class_="legend"),
            tag("details", tag("summary", f"Notes ({len(notes)})"), tag("ul", *(tag("li", n) for n in notes),
                class_="notes")) if notes else None,
        ]
    )  # fmt: skip
    sections = [Section("final", "Figures", final(labels, runs))]
    graphs = [graph for graph in curves(labels, runs) if graph.lines]
    if graphs:
        sections.append(Section("curves", "Curves", tag("div", *map(draw, graphs), class_="graphs")))
    if classes := per_class(labels, runs):
        sections.append(Section("classes", "Classes", classes))
    if mistakes := kinds(labels, runs):
        sections.append(Section("errors", "Where AP is lost", mistakes))
    sections.append(Section("options", "Options that differ", options(labels, runs)))
    return document(f"{len(runs)} runs compared", head, sections)


def titles(runs: Sequence[Found]) -> list[str]:
    """A title for each run: its folder's name, with as many folders above as tell it from the others."""
    places = [run.folder.resolve() for run in runs]
    depth = next(
        (n for n in range(1, 30) if len({place.parts[-n:] for place in places}) == len(places)),
        max(len(place.parts) for place in places),
    )
    return ["/".join(place.parts[-depth:]) for place in places]


def final(labels: Sequence[str], runs: Sequence[Found]) -> Html:
    """The figures after the best epoch, and how far they are from the first run's."""
    head = ["run", *(one.title for one in FINAL), "time"]
    rows: list[list[Any]] = []
    for label, run in zip(labels, runs, strict=True):
        cells: list[Any] = [(name(label), label)]
        for one in FINAL:
            value, base = one.of(run), one.of(runs[0])
            share = bool(one.rule)
            written = fraction(value) if share else number(value)
            delta = None if run is runs[0] or one.better is None else _delta(value - base, one.better, share=share)
            cells.append((join([written, *([" ", delta] if delta else [])]), value))
        seconds = run.evaluations[-1].get("seconds", math.nan) if run.evaluations else math.nan
        cells.append((clock(seconds) if math.isfinite(seconds) else "–", seconds))
        rows.append(cells)
    said = (
        "Of the epoch with the highest mAP; in small the difference to the first run. The same run with another --seed "
        "differs too: compare several before you believe a small difference."
    )
    return join([table(head, rows, caption="Final figures", sortable=True), tag("p", said, class_="said")])


def curves(labels: Sequence[str], runs: Sequence[Found]) -> list[Graph]:
    """Each curve of all runs that have it."""
    made: list[Graph] = []
    for title, part, key, axis, said in CURVES:
        x = "epoch" if part == "evaluations" and key != "val_loss" else "step"
        lines: list[Line] = []
        for place, (label, run) in enumerate(zip(labels, runs, strict=True)):
            rows = [row for row in getattr(run, part) if math.isfinite(row.get(key, math.nan))]
            if rows:
                dots = part == "evaluations" and len(rows) <= 40
                values = column(rows, x), column(rows, key)
                lines.append(Line(label, *values, place, dashed=place >= COLOURS, dots=dots))
        made.append(Graph(title, lines, Axis(x, whole=x == "epoch"), axis, said))
    return made


def per_class(labels: Sequence[str], runs: Sequence[Found]) -> Html | None:
    """AP of each class in each run that was evaluated."""
    listed = [class_figures(run.judged.scores) if run.judged else {} for run in runs]
    found = [{title: row.get(main_figure(rows), math.nan) for title, row in rows.items()} for rows in listed]
    rows = _side_by_side(found, better=True)
    if not rows:
        return None
    return join([
        table(["class", *map(name, labels)], rows, caption="AP of each class", sortable=True),
        tag("p", "A class that loses while the mean gains is worth a look at its pictures.", class_="said"),
    ])  # fmt: skip


def kinds(labels: Sequence[str], runs: Sequence[Found]) -> Html | None:
    """What each kind of mistake costs in each run."""
    analyses = [run.judged.analysis if run.judged else None for run in runs]
    found = [{k: loss.gain for k, loss in a.errors.losses.items()} if a else {} for a in analyses]
    rows = _side_by_side(found, better=None)  # a run that finds nothing has little to gain, and is not the better one
    if not rows:
        return None
    total = [a.errors.ap if a else math.nan for a in analyses]
    ious = sorted({a.iou for a in analyses if a})
    title = f"AP at IoU {', '.join(f'{iou:g}' for iou in ious)}"
    rows.insert(0, [(name(title), title), *((fraction(value), value) for value in total)])
    said = (
        "First AP itself, then what it would gain if this kind of mistake alone were mended. "
        "A small loss says nothing where AP is small: there is no more to lose."
    )
    return join([table(["kind", *map(name, labels)], rows, caption="Kinds of mistakes (TIDE)"),
                 tag("p", said, class_="said")])  # fmt: skip


def options(labels: Sequence[str], runs: Sequence[Found]) -> Html:
    """The options that are not the same in all runs."""
    known = [run for run in runs if run.options]
    usual = [defaults(run.options) for run in runs]
    keys = dict.fromkeys(key for run in known for key in [*changed(run.options), *run.options])
    rows: list[list[Any]] = []
    for key in keys:
        if key in ("name", "project_dir", "exist_ok", "classes"):
            continue
        values = [run.options.get(key, usual[i].get(key)) if run.options else None
                  for i, run in enumerate(runs)]  # fmt: skip
        told = [shown(value) if run.options else "not known" for value, run in zip(values, runs, strict=True)]
        if len({text for text, run in zip(told, runs, strict=True) if run.options}) > 1:
            rows.append([f"--{key.replace('_', '-')}", *told])
    for key in ("boxwright", "torch", "device", "data"):
        told = [shown(run.environment.get(key)) for run in runs]
        if len(set(told)) > 1:
            rows.append([f"{key} (env.json)", *told])
    if not rows:
        return tag("p", "No option differs, nor versions, device and data.")
    return table(["option", *map(name, labels)], rows, caption="Only what differs", words=len(labels) + 1)


def _side_by_side(found: Sequence[Mapping[str, float]], *, better: bool | None) -> list[list[Any]]:
    keys = dict.fromkeys(key for row in found for key in row)
    rows: list[list[Any]] = []
    for key in keys:
        cells: list[Any] = [(name(key), key)]
        base = found[0].get(key, math.nan)
        for place, row in enumerate(found):
            value = row.get(key, math.nan)
            delta = _delta(value - base, better, share=True) if place else None
            cells.append((join([fraction(value), *([" ", delta] if delta else [])]), value))
        rows.append(cells)
    return rows


def _delta(value: float, better: bool | None, *, share: bool) -> Html | None:
    """A change, coloured by whether it is one for the better; `better` None: nobody can say."""
    if not math.isfinite(value):
        return None
    text = difference(value) if share else f"{value:+.3g}"
    style = None if float(text) == 0 or better is None else "better" if (value > 0) == better else "worse"
    return tag("small", text, class_=style)


def _notes(run: Found) -> list[str]:
    return [*run.notes, *(run.judged.notes if run.judged else ())]


def _mapping(run: Found, key: str) -> Mapping[str, Any]:
    value = run.judged.scores.get(key) if run.judged else None
    return value if isinstance(value, dict) else {}
