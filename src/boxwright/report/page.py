"""Parts → one HTML file that needs nothing else: style and script are in it, and its policy lets nothing be fetched."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from boxwright.report import described, followed, judged
from boxwright.report.followed import Section
from boxwright.report.markup import Html, join, name, tag
from boxwright.report.pictures import Album
from boxwright.report.reading import Found
from boxwright.version import __version__

HERE = Path(__file__).parent
STATES = {
    "finished": "finished",
    "running": "running",
    "not finished": "not finished",
    "not begun": "not begun",
    "no training": "evaluation",
}


def of_run(found: Found, *, live: bool = False) -> str:
    """The report of one run or evaluation."""
    album = Album()
    sections = followed.sections(found, album)
    data = None
    if found.judged:
        sections += judged.sections(found.judged, album)
        if found.judged.analysis:
            data = judged.curves_data(found.judged.analysis)
    sections += described.sections(found)
    notes = [*found.notes, *(found.judged.notes if found.judged else ()), *album.notes()]
    model = found.options.get("model") or (found.judged.scores.get("weights") if found.judged else None)
    lead = [
        tag("span", STATES[found.state], class_=f"state {found.state.replace(' ', '-')}"),
        *([" ", name(model)] if model else []),
        *([" on ", name(source)] if (source := found.options.get("data")) else []),
    ]
    head = join(
        [
            tag("p", *lead, class_="lead"),
            followed.glance(found),
            tag("ul", *(tag("li", note) for note in notes), class_="notes", aria_label="Notes") if notes else None,
        ]
    )
    return document(found.name, head, sections, data=data, live=live)


def document(
    title: str, head: Html, sections: Sequence[Section], *, data: Html | None = None, live: bool = False
) -> str:
    """A whole page: title, what stands under it, sections with a way to each."""
    style, script = _asset("page.css"), _asset("page.js")
    scripts = [_asset("watch.js"), script] if live else [script]
    links = [tag("li", tag("a", section.short or section.title, href=f"#{section.anchor}")) for section in sections]
    made = f"Made by Boxwright {__version__} on {time.strftime('%Y-%m-%d %H:%M %Z')}."
    page = join(
        [
            Html("<!doctype html>\n"),
            tag(
                "html",
                tag(
                    "head",
                    tag("meta", charset="utf-8"),
                    tag("meta", http_equiv="Content-Security-Policy", content=policy(style, scripts, live=live)),
                    tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
                    tag("meta", name="referrer", content="no-referrer"),
                    tag("title", f"{title} · Boxwright"),
                    tag("link", rel="icon", href="data:,"),
                    tag("style", Html(style)),
                ),
                tag(
                    "body",
                    tag("a", "Skip to the content", href="#main", class_="skip"),
                    tag(
                        "header",
                        tag(
                            "div",
                            tag("div", tag("h1", name(title))),
                            class_="title",
                        ),
                        tag("div", head, id="head"),
                    ),
                    tag("nav", tag("ul", *links), aria_label="Parts of the page") if links else None,
                    tag("main", *(section.drawn() for section in sections), data, id="main", tabindex="-1"),
                    tag("footer", tag("p", made)),
                    *(tag("script", Html(text)) for text in scripts),
                ),
                lang="en",
            ),
            "\n",
        ]
    )
    return str(page)


def policy(style: str, scripts: Sequence[str], *, live: bool) -> str:
    """What a browser may do with the page: show its own pictures, its own style, run its own script, no more."""
    own = " ".join(f"'{_hash(text)}'" for text in scripts)
    fetch = " connect-src 'self';" if live else ""
    return (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src {own};{fetch} "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _asset(file: str) -> str:
    text = (HERE / file).read_text(encoding="utf-8")
    assert "</s" not in text, "it would end the element that it stands in"
    return text
