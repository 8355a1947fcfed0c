"""Numbers → graphs as inline SVG that scale with the page, take their colours from its theme and need no script.

A script finds what it needs to read values off a graph in `data-` attributes: the axes' ranges in the `<svg>`, the
exact values in each line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from boxwright.report.markup import Html, fraction, join, number, shortened, tag

WIDTH, HEIGHT = 520, 300  # of a graph, in its own units
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 30, 42  # between the graph's edge and its axes
COLOURS = 8  # of lines, --c0 .. --c7 in page.css
POINTS = 300  # of a line: more than that nobody can tell apart on a page


@dataclass(frozen=True)
class Line:
    """One line of a graph; NaN makes a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False
    dots: bool = False
    key: str | None = None  # under which a script replaces its values
    told: str | None = None  # in the legend; by default the last value


@dataclass(frozen=True)
class Axis:
    """What an axis measures; without a range it is fitted to the values."""

    label: str
    low: float | None = None
    high: float | None = None
    whole: bool = False  # ticks at whole numbers only
    log: bool = False

    @property
    def share(self) -> bool:
        """Whether it measures fractions, which are told with three digits."""
        return (self.low, self.high) == (0.0, 1.0)


@dataclass(frozen=True)
class Rule:
    """A vertical line that marks a place on the x axis."""

    x: float
    label: str
    key: str | None = None


@dataclass(frozen=True)
class _Scale:
    """From values to the graph's units."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:  # what is far below all others lies on the axis
            low, high, value = (math.log10(v) for v in (self.low, self.high, max(value, self.low)))
        else:
            low, high = self.low, self.high
        return self.start + (value - low) / (high - low) * (self.end - self.start)


@dataclass(frozen=True)
class Graph:
    """A graph of lines over a common x axis."""

    title: str
    lines: Sequence[Line]
    x: Axis
    y: Axis
    explained: str  # one sentence: what good looks like
    rules: Sequence[Rule] = ()
    under: Sequence[Html] = field(default=())  # drawn under the lines, in units of the graph
    picker: str | None = None  # name of the data that a script may show instead


def draw(graph: Graph) -> Html:
    """The graph as a `<figure>`: title, legend with the last values, drawing, explanation."""
    lines = [_thinned(line) for line in graph.lines]
    x = scale(graph.x, (v for line in lines for v in line.x), LEFT, WIDTH - RIGHT)
    y = scale(graph.y, (v for line in lines for v in line.y), HEIGHT - BOTTOM, TOP)
    drawing = tag(
        "svg",
        *axes(graph.x, graph.y, x, y),
        *graph.under,
        *(_rule(rule, x) for rule in graph.rules if math.isfinite(rule.x)),
        *(_line(line, x, y) for line in lines),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=_told(graph),
        data_x=f"{x.low:.6g} {x.high:.6g} {x.start} {x.end}",
        data_y=f"{y.low:.6g} {y.high:.6g} {y.start} {y.end}",
        data_share=graph.y.share,
    )
    return figure(graph.title, _legend(lines, graph), drawing, graph.explained, picker=graph.picker)


def figure(title: str, legend: Html | None, drawing: Html, explained: str, *, picker: str | None = None) -> Html:
    """A graph with what stands around it."""
    caption = tag("figcaption", explained)
    return tag("figure", tag("h3", title), legend, drawing, caption, class_="graph", data_picker=picker)


def scale(axis: Axis, values: Iterable[float], start: float, end: float) -> _Scale:
    """From an axis' values to units; the range is the axis' own or holds all the values."""
    finite = [v for v in values if math.isfinite(v) and (v > 0 or not axis.log)]
    low = axis.low if axis.low is not None else min(finite, default=0.0)
    high = axis.high if axis.high is not None else max(finite, default=1.0)
    if axis.low is None and axis.high is None and high == low:
        low, high = (low / 2, high * 2) if axis.log else (low - 0.5, high + 0.5)
    if high <= low:
        high = low + max(1.0, abs(low) * 1e-6)  # beyond 2**53 one more is the same
    if axis.log:
        low = max(low, high * 1e-9, 1e-300)
        return _Scale(low, max(high, low) * 1.05, start, end, log=True)
    if axis.high is None and axis.low is not None:
        high += 0.04 * (high - low)
    return _Scale(low, high, start, end)


def ticks(low: float, high: float, *, most: int = 6, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` of them."""
    assert high > low
    parts = max(most - 1, 1)
    rough = high / parts - low / parts  # the difference of the two may be more than a float holds
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def axes(x_axis: Axis, y_axis: Axis, x: _Scale, y: _Scale) -> list[Html]:
    """Grid, ticks with their numbers, and what the axes measure."""
    parts: list[Html] = []
    upwards = _log_ticks(y) if y.log else ticks(y.low, y.high, whole=y_axis.whole)
    digits = _digits(upwards)
    for value in upwards:
        at = f"{y(value):.1f}"
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", number(value, digits), x=LEFT - 7, y=at, class_="tick end", dy="0.35em"))
    for value in ticks(x.low, x.high, most=7, whole=x_axis.whole):
        at = f"{x(value):.1f}"
        parts.append(tag("line", x1=at, x2=at, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="axis"))
        parts.append(tag("text", number(value, 3), x=at, y=HEIGHT - BOTTOM + 17, class_="tick middle"))
    parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="axis"))
    parts.append(tag("text", x_axis.label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, class_="label middle"))
    parts.append(tag("text", y_axis.label, x=2, y=14, class_="label"))
    return parts


def swatch(colour: int, *, dashed: bool = False) -> Html:
    """A short piece of a line, for a legend."""
    style = f"line c{colour % COLOURS}{' dashed' if dashed else ''}"
    return tag("svg", tag("path", d="M0 5H20", class_=style), viewBox="0 0 20 10", class_="swatch", aria_hidden="true")


def bar(value: float, most: float, *, colour: int = 0, label: str = "") -> Html:
    """A horizontal bar for a cell of a table; one below 0 is hollow."""
    share = abs(value) / most * 100 if math.isfinite(value) and most > 0 else 0.0
    style = f"bar c{colour % COLOURS}{' hollow' if value < 0 else ''}"
    return tag(
        "svg",
        tag("rect", width=100, height=10, class_="track"),
        tag("rect", width=f"{min(share, 100):.2f}", height=10, class_=style),
        viewBox="0 0 100 10",
        preserveAspectRatio="none",
        class_="bars",
        role="img",
        aria_label=label or number(value, 3),
    )


def _legend(lines: Sequence[Line], graph: Graph) -> Html:
    """Names of the lines with their last values, which a script replaces by those under the pointer."""
    items = [
        tag(
            "li",
            swatch(line.colour, dashed=line.dashed),
            tag("bdi", shortened(line.name, 60), title=line.name if len(line.name) > 60 else None),
            tag("output", told(line, graph.y)),
        )
        for line in lines
    ]
    return tag("ul", *items, tag("li", tag("output", "", class_="at"), data_label=graph.x.label), class_="legend")


def told(line: Line, axis: Axis) -> str:
    """What the legend says of a line."""
    return line.told or (fraction if axis.share else number)(_last(line.y))


def _line(line: Line, x: _Scale, y: _Scale) -> Html:
    points = [
        (x(a), y(b)) if math.isfinite(a) and math.isfinite(b) and (b > 0 or not y.log) else None
        for a, b in zip(line.x, line.y, strict=False)
    ]
    path, pen = "", "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        path += f"{pen}{point[0]:.1f} {point[1]:.1f}"
        pen = "L"
    style = f"line c{line.colour % COLOURS}{' dashed' if line.dashed else ''}"
    alone = _alone(points)
    dots = [tag("circle", cx=f"{p[0]:.1f}", cy=f"{p[1]:.1f}", r=3.2, class_=f"dot c{line.colour % COLOURS}")
            for i, p in enumerate(points) if p and (line.dots or alone[i])]  # fmt: skip
    drawn = tag(
        "path",
        d=path or "M0 0",
        class_=style,
        data_xs=" ".join(f"{a:.6g}" for a in line.x),
        data_ys=" ".join("-" if not math.isfinite(b) else f"{b:.5g}" for b in line.y),
        data_key=line.key,
    )
    return join([drawn, *dots])


def _alone(points: Sequence[tuple[float, float] | None]) -> list[bool]:
    """Whether a point has no neighbour, so that no line would show it."""
    return [
        (i == 0 or points[i - 1] is None) and (i + 1 == len(points) or points[i + 1] is None)
        for i in range(len(points))
    ]


def _rule(rule: Rule, x: _Scale) -> Html:
    at = x(rule.x)
    style = "middle" if LEFT + 80 < at < WIDTH - RIGHT - 80 else "end" if at > WIDTH / 2 else "start"
    return tag(
        "g",
        tag("line", x1=f"{at:.1f}", x2=f"{at:.1f}", y1=TOP, y2=HEIGHT - BOTTOM, class_="rule"),
        tag("text", rule.label, x=f"{at:.1f}", y=TOP + 11, class_=f"mark {style}"),
        data_key=rule.key,
    )


def _thinned(line: Line) -> Line:
    """At most `POINTS` points, each the mean of those next to it."""
    if len(line.x) <= POINTS:
        return line
    size = -(-len(line.x) // POINTS)
    parts = [slice(start, start + size) for start in range(0, len(line.x), size)]
    return Line(
        line.name,
        [line.x[part][-1] for part in parts],
        [_mean(line.y[part]) for part in parts],
        line.colour,
        line.dashed,
        line.dots,
        line.key,
        line.told,
    )


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


def _last(values: Sequence[float]) -> float:
    return next((v for v in reversed(values) if math.isfinite(v)), math.nan)


def _log_ticks(scale: _Scale) -> list[float]:
    first, last = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    values = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    inside = [v for v in values if scale.low <= v <= scale.high]
    return inside if len(inside) > 1 else ticks(scale.low, scale.high)


def _digits(values: Sequence[float]) -> int:
    """As few as tell the ticks apart."""
    return next((n for n in range(3, 12) if len({number(v, n) for v in values}) == len(values)), 12)


def _told(graph: Graph) -> str:
    """The graph in words, for those who cannot see it."""
    lines = [f"{line.name} {told(line, graph.y)}" for line in graph.lines]
    return f"{graph.title}: {graph.y.label} by {graph.x.label}. At the end: {'; '.join(lines[:8])}"
