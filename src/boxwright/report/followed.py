"""How a training went: its figures at a glance, mAP, losses, learning rate, speed, what the network saw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from boxwright.progress import clock
from boxwright.report.charts import Axis, Graph, Line, Rule, draw
from boxwright.report.markup import Html, fraction, join, number, plural, tag
from boxwright.report.pictures import Album
from boxwright.report.reading import PREVIEWS, Found

WORDS = {
    "loss": "all together",
    "loss_classifier": "class of the box",
    "loss_box_reg": "place of the box",
    "loss_objectness": "object or not",
    "loss_rpn_box_reg": "place of the proposal",
    "loss_cls": "class",
    "bbox_regression": "place of the box",
}
SPIKE = 100.0  # times the usual length of the gradient, from which its graph is logarithmic


@dataclass(frozen=True)
class Section:
    """A part of the page that the navigation leads to."""

    anchor: str
    title: str
    body: Html
    short: str = ""  # in the navigation, where the title is long

    def drawn(self) -> Html:
        """The section with its heading."""
        heading = tag("h2", self.title, id=f"{self.anchor}-title")
        return tag("section", heading, self.body, id=self.anchor, aria_labelledby=f"{self.anchor}-title")


def glance(found: Found) -> Html:
    """The run in a handful of figures."""
    best, last = found.best, found.evaluations[-1] if found.evaluations else {}
    cards: list[tuple[str, str, str]] = []
    if best:
        cards.append(("mAP", fraction(best.get("map")), f"best, epoch {number(best.get('epoch'))}"))
        cards.append(("mAP50", fraction(best.get("map50")), "at IoU 0.50, same epoch"))
    elif coco := _mapping(found.judged.scores.get("coco") if found.judged else None):
        cards.append(("AP", fraction(_float(coco.get("AP"))), "COCO, IoU 0.50 to 0.95"))
        cards.append(("AP50", fraction(_float(coco.get("AP50"))), "COCO, IoU 0.50"))
    if last:
        cards.append(
            (
                "time",
                _time(last.get("seconds", math.nan)),
                f"{number(last.get('epoch'))} {plural(last.get('epoch', 0), 'epoch')}",
            )
        )
    speeds = [row["images_per_s"] for row in found.steps if math.isfinite(row.get("images_per_s", math.nan))]
    if speeds:
        cards.append(("speed", number(sorted(speeds)[len(speeds) // 2], 3), "pictures a second, the median"))
    elif found.judged:
        speed = _float(_mapping(found.judged.scores.get("speed")).get("images_per_second"))
        if math.isfinite(speed):
            cards.append(("speed", number(speed, 3), "pictures a second, predicting"))
    if found.judged and (analysis := found.judged.analysis):
        overall = analysis.thresholds.overall
        objects = f"{number(analysis.objects)} {plural(analysis.objects, 'object')}"
        if math.isfinite(overall.f1):
            cards.append(("threshold", fraction(overall.threshold), f"F1 {fraction(overall.f1)} there"))
        cards.append(
            (
                "judged on",
                number(analysis.images),
                f"{plural(analysis.images, 'picture')}, {objects}",
            )
        )
    if not cards:
        return join([])
    items = [tag("div", tag("dt", what), tag("dd", tag("b", value), tag("small", said))) for what, value, said in cards]
    return tag("dl", *items, class_="cards")


def sections(found: Found, album: Album) -> list[Section]:
    """The parts of the page about the training; none for an evaluation alone."""
    made: list[Section] = []
    graphs = [graph for graph in (mean_ap(found), losses(found), *_others(found)) if graph]
    if graphs:
        made.append(Section("training", "Training", tag("div", *map(draw, graphs), class_="graphs")))
    pictures = [_preview(found, name, album) for name in PREVIEWS if name in found.previews]
    if pictures:
        made.append(Section("seen", "What the network saw", tag("div", *pictures, class_="previews"), "Seen"))
    return made


def mean_ap(found: Found) -> Graph | None:
    """The article's graph: mAP on the validation pictures after each evaluation."""
    rows = found.evaluations
    if not rows:
        return None
    epochs = column(rows, "epoch")
    lines = [
        Line("IoU 0.50", epochs, column(rows, "map50"), 0, dots=len(rows) <= 40),
        Line("IoU 0.50 to 0.95", epochs, column(rows, "map"), 1, dots=len(rows) <= 40),
    ]
    best = found.best
    rules = [Rule(best["epoch"], f"best {fraction(best['map'])}")] if best and len(rows) > 1 else []
    return Graph(
        "mAP",
        lines,
        Axis("epoch", whole=True),
        Axis("mAP on the validation pictures", 0.0, 1.0),
        "Good: both rise and flatten out high. If they still rise at the end, train longer; if they fall, stop.",
        rules,
    )


def losses(found: Found) -> Graph | None:
    """Losses of training over the steps, and that of the validation pictures."""
    rows = found.steps
    if not rows:
        return None
    steps = column(rows, "step")
    names = sorted({key for row in rows for key in row if key.startswith("loss")} - {"loss"})
    lines = [Line(worded(key), steps, column(rows, key), colour) for colour, key in enumerate(["loss", *names])]
    judged = [row for row in found.evaluations if math.isfinite(row.get("val_loss", math.nan))]
    if judged:
        lines.append(Line("validation", column(judged, "step"), column(judged, "val_loss"), 0, dashed=True, dots=True))
    return Graph(
        "Losses",
        lines,
        Axis("step"),
        Axis("loss", 0.0),
        "Good: they fall, fast at first. If the one of the validation pictures rises while the others fall, "
        "the network learns its pictures by heart.",
    )


def _others(found: Found) -> list[Graph | None]:
    rows = found.steps
    steps = column(rows, "step")

    def graph(title: str, key: str, label: str, explained: str, *, spikes: bool = False) -> Graph | None:
        finite = [value for value in column(rows, key) if math.isfinite(value)]
        if not finite:
            return None
        usual = sorted(finite)[len(finite) // 2]
        log = spikes and 0 < usual * SPIKE < max(finite)  # from 0 on, all but the spikes would lie on the axis
        low = None if log else 0.0
        return Graph(title, [Line(label, steps, column(rows, key))], Axis("step"), Axis(label, low, log=log), explained)

    return [
        graph("Learning rate", "lr", "learning rate", "As planned: it rises in the warm-up and follows --schedule."),
        graph(
            "Speed", "images_per_s", "pictures a second",
            "Good: level. Dips are other work on the machine; a slow fall is a disk or a cache that fills.",
        ),
        graph(
            "Length of the gradient", "gradient", "norm before clipping",
            "Good: it settles. Spikes that come more and more often announce that the training will diverge.",
            spikes=True,
        ),
    ]  # fmt: skip


def worded(key: str) -> str:
    """A loss by what it measures."""
    return WORDS.get(key, key.removeprefix("loss_").replace("_", " "))


def column(rows: Sequence[Mapping[str, float]], key: str) -> list[float]:
    """One figure of each row, NaN where it is missing."""
    return [row.get(key, math.nan) for row in rows]


def _preview(found: Found, name: str, album: Album) -> Html:
    said = PREVIEWS[name]
    threshold = found.evaluations[-1].get("threshold", math.nan) if found.evaluations else math.nan
    if name == "validation" and math.isfinite(threshold):
        said += f" Boxes from a score of {fraction(threshold)} on, where F1 was best after the last evaluation."
    image = album.picture(found.previews[name], said, share=8)
    if image is None:
        return tag("p", f"previews/{name}.jpg cannot be read.", class_="absent")
    return tag("figure", image, tag("figcaption", said), class_="picture")


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _float(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _time(seconds: float) -> str:
    return clock(seconds) if math.isfinite(seconds) else "–"
