"""Reports in a real browser: quick, complete without network, readable on a phone, in the light and in the dark."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.report import rig

from boxwright.report import write_comparison, write_report
from boxwright.report.watch import serve

Visit = Callable[..., Any]

HOSTILE = "</script><script>window.hit=1</script><img src=x onerror=window.hit=1>\"'&<svg onload=window.hit=1>🚲"
LONGEST = 1.0  # seconds until a page has loaded

CONTRAST = """
([pairs]) => {
  const channel = (v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const luminance = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  return pairs.map(([selector, property]) => {
    const element = document.querySelector(selector);
    if (!element) return [selector, 0];
    const [a, b] = [luminance(getComputedStyle(element)[property]), luminance(behind(element))];
    return [selector, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
  });
}
"""
TEXTS = (
    "h1", "h2", ".lead", ".state", "nav a", ".cards dt", ".cards small", "figcaption", ".legend output",
    "th[scope=col]", "td", "caption", ".said", "pre", "summary", "footer p", "p", "a",
)  # fmt: skip
DRAWN = ("svg .tick", "svg .label", "svg .mark")
LINES = tuple(f"svg .line.c{i}" for i in range(3))


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run of 20 epochs with an evaluation; not to be changed."""
    folder = tmp_path_factory.mktemp("report")
    run = rig.write_run(folder / "run", epochs=20, steps=100)
    rig.write_evaluation(run / "evaluation", folder / "pictures", count=60)
    return write_report(run)


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report full of names that are programs, or 300 letters long."""
    folder = tmp_path_factory.mktemp("hostile")
    classes = ["x" * 300, HOSTILE, "\u202eright to left"]
    run = rig.write_run(folder / ("r" * 120), classes=classes, model="fasterrcnn", backbone=HOSTILE, data=HOSTILE)
    with (run / "train.log").open("a", encoding="utf-8") as file:
        file.write(f"10:00:01 warning: {HOSTILE}\n10:00:01 warning: {'y' * 3000}\n")
    ids = {i: f"{HOSTILE}{'z' * 300}{i}" for i in range(60)}
    rig.write_evaluation(run / "evaluation", folder / "pictures", classes=classes, count=60, ids=ids)
    return write_report(run)


def wide(page: Any) -> tuple[int, int]:
    """How wide the page is, and its window."""
    return tuple(page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]"))


def test_the_page_loads_in_a_second(visit: Visit, report: Path) -> None:
    page = visit(report)
    timing = page.evaluate(
        "(() => { const t = performance.getEntriesByType('navigation')[0];"
        " return [t.domContentLoadedEventEnd, t.loadEventEnd]; })()"
    )
    assert 0 < timing[0] <= timing[1] < LONGEST * 1000


@pytest.mark.parametrize("width", [360, 390, 768, 1024, 1440, 1920])
@pytest.mark.parametrize("name", ["report", "hostile"])
def test_nothing_leaves_the_window(visit: Visit, request: pytest.FixtureRequest, name: str, width: int) -> None:
    page = visit(request.getfixturevalue(name), width=width)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    content, window = wide(page)
    assert content <= window


def test_notes_on_thresholds_are_not_cut(visit: Visit, tmp_path: Path) -> None:
    classes = [*rig.CLASSES, "a class without any object", "another one that has none"]
    evaluation = rig.write_evaluation(tmp_path / "evaluation", tmp_path / "pictures", classes=classes)
    analysis = json.loads((evaluation / "analysis.json").read_text())
    for one in analysis["thresholds"]["per_class"].values():
        one["note"] = "too few objects: the threshold of all classes"
    (evaluation / "analysis.json").write_text(json.dumps(analysis))
    frame = visit(write_report(evaluation), width=1440).locator("#thresholds .beside .scroll")
    assert frame.evaluate("(frame) => frame.scrollWidth - frame.clientWidth") <= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_in_both_themes(visit: Visit, report: Path, scheme: str) -> None:
    page = visit(report, color_scheme=scheme)
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (min(map(int, back[4:-1].split(","))) > 200) == (scheme == "light")
    pairs = [[text, "color"] for text in TEXTS] + [[text, "fill"] for text in DRAWN]
    for selector, ratio in page.evaluate(CONTRAST, [pairs]):
        assert ratio >= 4.5, f"{selector} {ratio:.2f}"  # WCAG 2.2 AA, text
    for selector, ratio in page.evaluate(CONTRAST, [[[line, "stroke"] for line in LINES]]):
        assert ratio >= 3, f"{selector} {ratio:.2f}"  # and graphics


def test_the_theme_turns_and_stays(visit: Visit, report: Path) -> None:
    page = visit(report, color_scheme="light")
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.get_by_role("button", name="Dark theme").click()
    dark = page.evaluate(colour)
    assert dark != light
    page.reload()
    assert page.evaluate(colour) == dark
    page.get_by_role("button", name="Light theme").click()
    assert page.evaluate(colour) == light


def test_tables_sort_by_number_and_by_word(visit: Visit, report: Path) -> None:
    page = visit(report)
    table = page.locator("table", has=page.get_by_text("Each class", exact=True))
    column = "(table) => [...table.tBodies[0].rows].map((row) => row.cells[2].textContent)"
    before = table.evaluate(column)
    table.get_by_role("button", name="AP", exact=True).first.click()
    assert table.evaluate(column) == sorted(before, key=float, reverse=True)
    assert table.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    table.get_by_role("button", name="AP", exact=True).first.click()
    assert table.evaluate(column) == sorted(before, key=float)
    table.get_by_role("button", name="class").click()
    assert table.evaluate("(table) => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent)") == sorted(
        rig.CLASSES
    )


def test_graphs_tell_the_value_under_the_pointer_and_by_keys(visit: Visit, report: Path) -> None:
    page = visit(report)
    figure = page.locator("figure.graph").first
    svg = figure.locator("> svg")
    svg.scroll_into_view_if_needed()
    values = figure.locator(".legend li:not([data-label]) output")
    assert values.all_text_contents() == ["0.700", "0.500"]
    box = svg.bounding_box()
    page.mouse.move(box["x"] + 57 / 520 * box["width"], box["y"] + box["height"] / 2)
    assert values.all_text_contents() == ["0.035", "0.025"]
    assert figure.locator(".at").text_content() == "epoch 1"
    page.mouse.move(0, 0)
    assert values.all_text_contents() == ["0.700", "0.500"]
    svg.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert figure.locator(".at").text_content() == "epoch 3"
    assert values.all_text_contents()[1] == "0.075"


def test_curves_of_one_class_take_the_place_of_all(visit: Visit, report: Path) -> None:
    page = visit(report)
    figure = page.locator("figure[data-picker]").first
    line = figure.locator("path[data-key=f1]")
    together = line.get_attribute("d")
    figure.get_by_role("combobox").select_option(label="dog")
    row = page.locator("table", has=page.get_by_text("Best threshold of each class")).locator("tr", has_text="dog")
    threshold, f1 = row.locator("td").all_text_contents()[:2]
    assert line.get_attribute("d") != together
    assert figure.locator(".legend output").first.text_content() == f1
    assert figure.locator("g[data-key=at] text").text_content() == f"best F1 at {threshold}"
    assert page.locator("figure[data-picker] select").nth(1).input_value() == "2"
    figure.get_by_role("combobox").select_option(label="all classes")
    moved = [float(a) - float(b) for a, b in zip(_numbers(line.get_attribute("d")), _numbers(together), strict=True)]
    assert max(map(abs, moved)) < 0.25  # units of the graph: values have three digits in the script's data


def _numbers(path: str) -> list[str]:
    return path.replace("M", " ").replace("L", " ").split()


def test_pictures_open_large_and_close_again(visit: Visit, report: Path) -> None:
    page = visit(report)
    image = page.locator("#pictures .picture img").last
    assert image.evaluate("(image) => image.complete && image.naturalWidth > 0")
    image.focus()
    page.keyboard.press("Enter")
    assert page.locator("dialog[open] img").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0


def test_all_pictures_can_be_seen(visit: Visit, report: Path) -> None:
    page = visit(report)
    page.evaluate("Promise.all([...document.images].map((image) => image.decode()))")
    assert page.evaluate("[...document.images].every((image) => image.naturalWidth > 0 && image.alt)")


def test_headings_go_down_one_step_at_a_time_and_everything_has_a_name(visit: Visit, report: Path) -> None:
    page = visit(report)
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, a, select, [tabindex=\"0\"]')].filter((e) => !(e.textContent.trim()"
        " || e.getAttribute('aria-label') || e.alt)).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert nameless == []
    assert page.evaluate("document.documentElement.lang") == "en"


def test_it_can_be_read_without_scripts(visit: Visit, report: Path) -> None:
    page = visit(report, java_script_enabled=False)
    assert page.locator("figure.graph svg").first.is_visible()
    assert page.get_by_text("How to reproduce").is_visible()
    assert page.locator("button").count() == 0


def test_print_leaves_out_what_paper_cannot_do(visit: Visit, report: Path) -> None:
    page = visit(report)
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    assert not page.locator("button.theme").is_visible()


def test_hostile_names_do_nothing(visit: Visit, hostile: Path) -> None:
    page = visit(hostile, width=390)
    page.locator("figure[data-picker] select").first.select_option(index=2)
    page.locator("th button").first.click()
    page.locator("#pictures .picture img").last.click()
    page.wait_for_timeout(100)
    assert page.evaluate("window.hit") is None
    assert page.locator("img[onerror], svg[onload]").count() == 0
    assert page.get_by_text(HOSTILE).count() > 0


@pytest.mark.parametrize("width", [360, 1440])
def test_runs_are_compared(visit: Visit, tmp_path: Path, width: int) -> None:
    runs = [rig.write_run(tmp_path / name, best=best, lr=lr) for name, best, lr in
            (("one", 0.4, 0.001), ("two", 0.5, 0.002), ("three" * 20, 0.3, 0.003))]  # fmt: skip
    page = visit(write_comparison(runs), width=width)
    assert page.get_by_role("row", name="two").first.text_content().startswith("two0.500 +0.100")
    assert page.locator("figure.graph").first.locator("path.line[data-xs]").count() == 3
    content, window = wide(page)
    assert content <= window


# Live


@pytest.fixture
def live(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A run that is going on, and the address of its page."""
    run = rig.write_run(tmp_path / "run", epochs=2, finished=False)
    with serve(run, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield run, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_a_watched_page_follows_the_run_and_stays_where_it_is(visit: Visit, live: tuple[Path, str]) -> None:
    run, address = live
    page = visit(address, height=600)
    card = page.locator(".cards b").first
    assert card.text_content() == "0.500"
    details = page.locator("#run details").first
    details.locator("summary").click()
    page.evaluate("document.getElementById('again').scrollIntoView({behavior: 'instant'})")
    place = page.evaluate("document.getElementById('again').getBoundingClientRect().top")
    page.locator("figure.graph").first.evaluate("(figure) => { figure.old = true; }")
    page.locator("#seen").evaluate("(part) => { part.old = true; }")
    rig.add_epoch(run, 3, score=0.875)
    page.locator(".cards b", has_text="0.875").first.wait_for(timeout=10_000)
    assert abs(page.evaluate("document.getElementById('again').getBoundingClientRect().top") - place) < 2
    assert page.locator("#run details").first.get_attribute("open") is not None
    assert page.locator("#seen").evaluate("(part) => part.old")  # what has not changed is not touched
    assert page.locator("figure.graph").first.evaluate("(figure) => figure.old") is None
    assert page.locator("figure.graph").first.locator("circle").count() == 6
    assert page.locator("button.theme").count() == 1
    with (run / "train.log").open("a") as file:
        file.write(rig.END)
    page.locator(".state", has_text="finished").wait_for(timeout=10_000)


def test_a_watched_page_gets_parts_that_were_not_there(visit: Visit, live: tuple[Path, str], tmp_path: Path) -> None:
    run, address = live
    page = visit(address)
    assert page.locator("#review").count() == 0
    rig.write_evaluation(run / "evaluation", tmp_path / "pictures")
    page.wait_for_selector("#review", timeout=10_000)
    assert page.locator("nav a", has_text="Review").count() == 1
    assert page.locator("figure[data-picker] select").count() == 2
    assert page.locator("nav").count() == 1
