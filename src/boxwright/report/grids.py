"""Graphs that are no lines: how far scores can be trusted, and which class is taken for which."""

from __future__ import annotations

import math

from boxwright.evaluation.calibration import Calibration
from boxwright.evaluation.confusion import Confusion
from boxwright.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, axes, figure, scale, swatch
from boxwright.report.markup import Html, fraction, join, name, number, shortened, table, tag

MOST = 40  # classes of a confusion matrix that can be told apart
COUNTED = 14  # classes up to which cells have their numbers in them
CELL = 26  # units
MIXED_UP = 12  # rows of the list of what is taken for what


def calibration(found: Calibration) -> Html:
    """The share of right detections by their score, beside the diagonal of scores that keep their word."""
    share, score = Axis("share that is right", 0.0, 1.0), Axis("score", 0.0, 1.0)
    x = scale(score, (), LEFT, WIDTH - RIGHT)
    y = scale(share, (), HEIGHT - BOTTOM, TOP)
    most = max((one.count for one in found.bins), default=0)
    bars: list[Html] = []
    for one in found.bins:
        if not one.count or not math.isfinite(one.right):
            continue
        left, right = x(one.low) + 2, x(one.high) - 2
        tall = (HEIGHT - BOTTOM) - y(one.right)
        told = f"score {one.low:.1f} to {one.high:.1f}: {fraction(one.right)} of {number(one.count)} are right"
        bars.append(
            tag("rect", tag("title", told), x=f"{left:.1f}", y=f"{y(one.right):.1f}", width=f"{right - left:.1f}",
                height=f"{max(tall, 1.5):.1f}", class_="bar c0", opacity=f"{0.35 + 0.65 * one.count / most:.2f}")
        )  # fmt: skip
        bars.append(tag("circle", cx=f"{x(one.score):.1f}", cy=f"{y(one.right):.1f}", r=3.5, class_="dot c1"))
        above = max(y(one.right) - 6, TOP + 9)
        style = "mark middle"
        bars.append(tag("text", number(one.count, 3), x=f"{(left + right) / 2:.1f}", y=f"{above:.1f}", class_=style))
    diagonal = tag("path", d=f"M{LEFT} {HEIGHT - BOTTOM}L{WIDTH - RIGHT} {TOP}", class_="rule")
    told = "; ".join(f"{one.low:.1f} to {one.high:.1f}: {fraction(one.right)}" for one in found.bins if one.count)
    drawing = tag(
        "svg", *axes(score, share, x, y), diagonal, *bars, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img",
        aria_label=f"Calibration: share of right detections by score. {told}",
    )  # fmt: skip
    legend = tag(
        "ul",
        tag("li", swatch(0), "share that is right"),
        tag("li", swatch(1), "at the mean score"),
        tag("li", "calibration error", tag("output", fraction(found.error))),
        tag("li", "of the shown", tag("output", fraction(found.error_shown))),
        class_="legend",
    )
    lean = found.overconfident
    said = "" if not math.isfinite(lean) else " Here scores promise too much." if lean > 0.02 else (
        " Here scores promise too little." if lean < -0.02 else ""
    )  # fmt: skip
    explained = (
        "Good: bars end at the diagonal, so that of boxes with score 0.8 eight in ten are right; numbers are boxes."
    )
    return figure("Calibration", legend, drawing, explained + said)


def confusion(found: Confusion) -> Html:
    """Annotated classes by found ones, and what is mixed up most."""
    size = len(found.names)
    if any(len(row) != size for row in found.counts) or len(found.counts) != size:
        return tag("p", "The confusion matrix is not square: evaluate again to have it here.", class_="absent")
    kept = _kept(found)
    said = (
        f"Rows are annotated classes, columns what was found at the threshold {fraction(found.threshold)}; IoU "
        f"{found.iou:g}. Good: a strong diagonal. The last column are objects nobody found, the last row boxes "
        "where nothing is."
    )
    if len(kept) < size + found.left_out:
        said += f" Of {size - 1 + found.left_out} classes these are the {len(kept) - 1} that are mixed up most."
    title = "Confusion matrix"
    matrix = tag("figure", tag("h3", title), _matrix(found, kept), tag("figcaption", said), class_="graph")
    return tag(
        "div",
        matrix,
        tag("div", _mixed_up(found), class_="beside"),
        class_="graphs tall" if len(kept) > 20 else "graphs",
    )


def _kept(found: Confusion) -> list[int]:
    """Rows that are drawn: all, or those with the most confusion between classes."""
    last = len(found.names) - 1
    if last <= MOST:
        return list(range(last + 1))
    mixed = [sum(found.counts[i][:last]) + sum(row[i] for row in found.counts[:last]) - 2 * found.counts[i][i]
             for i in range(last)]  # fmt: skip
    return [*sorted(sorted(range(last), key=lambda i: -mixed[i])[:MOST]), last]


def _matrix(found: Confusion, kept: list[int]) -> Html:
    size = len(kept)
    letters = 14 if size <= COUNTED else 10
    margin = 12 + 7.4 * min(letters, max(len(found.names[i]) for i in kept))
    side = margin + size * CELL + 4
    wide = side + margin / 2  # the last column's name leans over the edge
    parts: list[Html] = []
    for row, a in enumerate(kept):
        title = shortened(found.names[a], letters)
        middle = margin + (row + 0.5) * CELL
        whole = tag("title", found.names[a])
        parts.append(
            tag("text", title, whole, x=f"{margin - 5:.1f}", y=f"{middle:.1f}", dy="0.35em", class_="tick end")
        )
        turned = f"translate({middle:.1f} {margin - 5:.1f}) rotate(-60)"
        parts.append(tag("text", title, whole, transform=turned, dy="0.35em", class_="tick"))
        total = sum(found.counts[a])
        for column, b in enumerate(kept):
            if count := found.counts[a][b]:
                parts += _cell(found, a, b, margin + column * CELL, margin + row * CELL, count / total, size)
    edge = size * CELL
    frame = [
        tag("rect", x=f"{margin:.1f}", y=f"{margin:.1f}", width=edge, height=edge, class_="frame"),
        tag(
            "path",
            d=f"M{margin:.1f} {side - 4 - CELL:.1f}h{edge}M{side - 4 - CELL:.1f} {margin:.1f}v{edge}",
            class_="axis",
        ),
    ]
    told = "Confusion matrix of annotated by found classes; the list beside it has what is mixed up most."
    drawing = tag(
        "svg",
        frame[0],
        *parts,
        frame[1],
        viewBox=f"0 0 {wide:.0f} {side:.0f}",
        width=f"{wide * (1.25 if size <= COUNTED else 1):.0f}",
        role="img",
        aria_label=told,
        class_="matrix",
    )
    return tag("div", drawing, class_="scroll", tabindex="0", role="region", aria_label="Confusion matrix")


def _cell(found: Confusion, a: int, b: int, x: float, y: float, share: float, size: int) -> list[Html]:
    last = len(found.names) - 1
    count = number(found.counts[a][b])
    told = (
        f"{count} of {found.names[a]} found as {found.names[b]}" if a != last and b != last
        else f"{count} of {found.names[a]} not found" if b == last
        else f"{count} times {found.names[b]} where nothing is"
    )  # fmt: skip
    kind = "right" if a == b else "wrong"
    strength = 0.12 + 0.88 * share
    drawn = [
        tag("rect", tag("title", told), x=f"{x + 0.5:.1f}", y=f"{y + 0.5:.1f}", width=CELL - 1, height=CELL - 1,
            class_=f"cell {kind}", fill_opacity=f"{strength:.2f}")
    ]  # fmt: skip
    if size - 1 <= COUNTED:
        style = "count strong" if strength > 0.55 else "count"
        text = f"{found.counts[a][b] / 1000:.0f}k" if found.counts[a][b] >= 10000 else str(found.counts[a][b])
        drawn.append(tag("text", text, x=f"{x + CELL / 2:.1f}", y=f"{y + CELL / 2:.1f}", dy="0.35em", class_=style))
    return drawn


def _mixed_up(found: Confusion) -> Html:
    last = len(found.names) - 1
    pairs = [(count, a, b) for a, row in enumerate(found.counts[:last]) for b, count in enumerate(row[:last])
             if a != b and count]  # fmt: skip
    if not pairs:
        return tag("p", "No class is taken for another at this threshold.")
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    rows = [
        [(name(found.names[a]), found.names[a]), name(found.names[b]), number(count),
         (fraction(count / sum(found.counts[a])), count / sum(found.counts[a]))]
        for count, a, b in pairs[:MIXED_UP]
    ]  # fmt: skip
    head = ("annotated", "found as", "how often", "share")
    return join([table(head, rows, caption="Mixed up most", sortable=True, words=2)])
