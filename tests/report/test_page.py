"""The page as a file: nothing from elsewhere, everything escaped, every folder yields one."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.report import rig

from boxwright import verbs
from boxwright.__main__ import main
from boxwright.config import Run, make_run
from boxwright.errors import UserError
from boxwright.evaluating import About, write_evaluation
from boxwright.report import write_comparison, write_report
from boxwright.report.charts import Axis, Graph, Line, draw, ticks
from boxwright.report.described import commands, train_command
from boxwright.report.followed import _others
from boxwright.report.markup import Html, difference, escape, fraction, number, tag
from boxwright.report.page import of_run
from boxwright.report.pictures import MOST, embedded
from boxwright.report.reading import read

HOSTILE = (
    "<script>window.hit=1</script>", "\"'><img src=x onerror=window.hit=1>", "</script><script>window.hit=1</script>",
    "</style></title></svg><b onmouseover=window.hit=1>", "x" * 300, "日本語 🚲 \u202egnp", "a&lt;b &amp; c",
    "\x00\x1b\ud800\n",
)  # fmt: skip


class _Seen(HTMLParser):
    """Elements and their attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, str]] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style"):
            self.raw.append((self._inside, data))
        else:
            self.text += data


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = rig.write_run(tmp_path / "run")
    rig.write_evaluation(folder / "evaluation", tmp_path / "pictures")
    return folder


def seen(folder: Path) -> _Seen:
    return _Seen(write_report(folder).read_text(encoding="utf-8"))


def test_the_page_refers_to_nothing_outside_itself(run: Path) -> None:
    page = seen(run)
    for element, attributes in page.elements:
        for key in ("src", "href", "action", "data", "poster", "srcset", "xlink:href"):
            value = attributes.get(key) or ""
            assert not value or value.startswith(("#", "data:")), (element, key, value[:80])
        assert not any(key.startswith("on") or key == "style" for key in attributes), element
    for _, text in page.raw:
        assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)


def test_the_policy_names_exactly_the_style_and_scripts_that_are_in_it(run: Path) -> None:
    page = seen(run)
    policy = next(a["content"] for e, a in page.elements if e == "meta" and a.get("http-equiv")) or ""
    assert policy.startswith("default-src 'none'; img-src data:;")
    programs = [text for element, text in page.raw if element == "style" or not text.startswith("{")]
    hashes = {"sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in programs}
    assert set(re.findall(r"'(sha256-[^']+)'", policy)) == hashes
    assert "unsafe" not in policy
    assert "connect-src" not in policy
    assert "connect-src &#x27;self&#x27;" in of_run(read(run), live=True)


def test_every_part_is_there_and_navigation_leads_to_it(run: Path) -> None:
    page = seen(run)
    sections = [a["id"] for e, a in page.elements if e == "section"]
    assert sections == [
        "training", "seen", "scores", "errors", "thresholds", "curves", "confusion", "sizes", "pictures", "review",
        "faults", "again", "run",
    ]  # fmt: skip
    links = [a["href"] for e, a in page.elements if e == "a"]
    assert links == ["#main", *(f"#{name}" for name in sections)]
    assert all(a.get("alt") for e, a in page.elements if e == "img")
    assert all(a.get("aria-label") or a.get("aria-hidden") for e, a in page.elements if e == "svg")
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for figure in ("0.500", "0.700"):
        assert figure in page.text


def test_a_typical_page_is_small(run: Path) -> None:
    assert write_report(run).stat().st_size < 4_500_000


def test_pictures_are_fitted_to_their_share(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (1500, 2500, 3), np.uint8)  # the hardest to compress
    Image.fromarray(noise).save(tmp_path / "noise.jpg", quality=95)
    image = embedded(tmp_path / "noise.jpg", "noise", share=40)
    assert image
    assert len(image) < 2_600_000 / 40 * 4 / 3 + 500
    assert len(image) < MOST * 4 / 3
    assert embedded(tmp_path / "none.jpg", "", share=1) is None
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    assert embedded(tmp_path / "bad.jpg", "", share=1) is None


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_names_stay_text(tmp_path: Path, hostile: str) -> None:
    plain = rig.write_run(tmp_path / "plain", classes=["one", "two"])
    rig.write_evaluation(plain / "evaluation", tmp_path / "pictures", classes=["one", "two"], ids={0: "id"})
    wanted = [element for element, _ in seen(plain).elements]
    clean = hostile.encode("utf-8", "replace").decode()
    run = rig.write_run(tmp_path / "odd", classes=["one", clean])
    ids = {i: f"{clean}{i}" for i in range(40)}
    rig.write_evaluation(run / "evaluation", tmp_path / "pictures2", classes=["one", clean], ids=ids)
    text = (run / "train.log").read_text() + f"10:00:01 warning: {clean}\n"
    (run / "train.log").write_text(text, encoding="utf-8")
    environment = {"device": hostile, hostile: hostile, "data": {hostile: hostile}}
    (run / "env.json").write_text(json.dumps(environment))
    page = seen(run)
    assert {element for element, _ in page.elements} <= {*wanted, "p", "li"}
    assert [e for e, _ in page.elements if e == "script"] == ["script", "script"]
    assert not any(key.startswith("on") for _, a in page.elements for key in a)
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]", page.text)


@given(st.text(), st.text())
def test_escaped_text_is_read_as_it_was_written(text: str, value: str) -> None:
    page = _Seen(str(tag("p", text, title=value)))
    clean = escape(text)
    assert [element for element, _ in page.elements] == ["p"]
    assert page.text == (_Seen(clean).text if clean else "")
    assert "<" not in clean
    assert '"' not in clean
    assert str(tag("p", Html("<b>"), "<b>")) == "<p><b>&lt;b&gt;</p>"


def test_every_subset_of_a_runs_files_yields_a_page(tmp_path: Path) -> None:
    whole = rig.write_run(tmp_path / "whole", epochs=2, steps=3)
    names = ("run.yaml", "env.json", "metrics.jsonl", "results.csv", "train.log")
    for count, kept in enumerate(itertools.chain(*(itertools.combinations(names, n) for n in range(1, 6)))):
        folder = tmp_path / f"part_{count}"
        folder.mkdir()
        for name in kept:
            (folder / name).write_bytes((whole / name).read_bytes())
        if kept == ("env.json",):
            with pytest.raises(UserError, match="neither the folder of"):
                write_report(folder)
        else:
            assert "</html>" in write_report(folder).read_text(encoding="utf-8"), kept


@pytest.mark.parametrize("count", [0, 1, 2])
def test_evaluations_of_few_pictures_yield_a_page(tmp_path: Path, count: int) -> None:
    rig.write_evaluation(tmp_path / "evaluation", tmp_path / "pictures", count=count)
    assert "Threshold" in seen(tmp_path / "evaluation").text


def test_many_classes_are_cut_to_those_that_are_mixed_up(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(120)]
    rig.write_evaluation(tmp_path / "evaluation", tmp_path / "pictures", classes=names, count=300)
    path = write_report(tmp_path / "evaluation")
    assert "Of 120 classes these are the 40 that are mixed up most." in path.read_text(encoding="utf-8")
    assert path.stat().st_size < 5_000_000


# Numbers and graphs


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.51849, "0.518"), (0.0, "0.000"), (1.0, "1.000"), (None, "–"), (math.nan, "–"), (math.inf, "–"),
    ],
)  # fmt: skip
def test_fractions_have_three_digits(value: float | None, text: str) -> None:
    assert fraction(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.0, "3"), (12345.0, "12,345"), (1234.5, "1,234"), (0.000015, "1.5e-5"), (0.12345, "0.1235"), (math.nan, "–")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_differences_have_a_sign() -> None:
    assert [difference(v) for v in (0.0123, -0.0123, 0.0001, math.nan)] == ["+0.012", "-0.012", "0.000", "–"]


@given(st.floats(-1e6, 1e6), st.floats(1e-4, 1e6))
def test_ticks_are_few_round_and_inside(low: float, length: float) -> None:
    high = low + length
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    step = found[1] - found[0]
    assert all(math.isclose(b - a, step, rel_tol=1e-3) for a, b in itertools.pairwise(found))
    assert all(low - step * 1e-6 <= v <= high + step * 1e-6 for v in found)


@given(st.lists(st.one_of(st.floats(-1e9, 1e9), st.just(math.nan)), max_size=700), st.booleans())
def test_any_line_is_drawn_inside_its_graph(values: list[float], log: bool) -> None:
    graph = Graph("t", [Line("l", range(len(values)), values)], Axis("x"), Axis("y", log=log), "said")
    page = _Seen(str(draw(graph)))
    path = next(a for e, a in page.elements if e == "path" and "data-xs" in a)
    points = [float(v) for v in re.findall(r"-?[\d.]+", path["d"] or "")]
    assert all(-1 <= v <= 525 for v in points)
    assert len((path["data-ys"] or "").split()) <= 300
    assert "nan" not in str(draw(graph))


def test_a_point_without_neighbours_is_seen() -> None:
    values = [math.nan, 0.5, math.nan, 0.6, 0.7]
    page = _Seen(str(draw(Graph("t", [Line("l", range(5), values)], Axis("x"), Axis("y"), ""))))
    assert len([e for e, _ in page.elements if e == "circle"]) == 1


@pytest.mark.parametrize(("low", "high"), [(3.15, 3.40), (0.0301, 0.0302), (1000.1, 1000.4), (6.0, 9.0)])
@pytest.mark.parametrize("log", [False, True])
def test_a_narrow_range_has_ticks_that_differ(low: float, high: float, log: bool) -> None:
    text = str(draw(Graph("t", [Line("l", [0, 1], [low, high])], Axis("x"), Axis("y", log=log), "")))
    labels = re.findall(r'class="tick end"[^>]*>([^<]*)<', text)
    assert 2 <= len(labels) == len(set(labels))


def test_the_length_of_the_gradient_begins_at_zero_unless_it_has_spikes(tmp_path: Path) -> None:
    folder = rig.write_run(tmp_path / "run", epochs=1, steps=3)
    usual = next(g for g in _others(read(folder)) if g and g.title == "Length of the gradient")
    assert (usual.y.low, usual.y.log) == (0.0, False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 99, "epoch": 1, "loss": 1, "gradient": 1e4}) + "\n")
    assert next(g for g in _others(read(folder)) if g and g.title == "Length of the gradient").y.log


@pytest.mark.parametrize(("f1", "said"), [(1.0, True), (0.321, False)])
def test_best_pictures_are_called_flawless_only_if_they_are(tmp_path: Path, f1: float, said: bool) -> None:
    folder = rig.write_evaluation(tmp_path / "evaluation", tmp_path / "pictures")
    path = folder / "pictures" / "gallery.json"
    gallery = json.loads(path.read_text())
    for entry in gallery["pictures"]:
        if entry["group"] == "best":
            entry["caption"] = "2 right, 0 wrong, 0 missed; F1 1.000"
    gallery["pictures"][0]["caption"] = f"2 right, 0 wrong, 0 missed; F1 {f1:.3f}"
    path.write_text(json.dumps(gallery))
    assert gallery["pictures"][0]["group"] == "best"
    text = seen(folder).text
    assert ("All found, nothing invented" in text) == said
    assert ("The highest F1 first." in text) != said


def test_the_preview_tells_its_threshold_and_one_epoch_is_one(tmp_path: Path) -> None:
    folder = rig.write_run(tmp_path / "run", epochs=1, steps=3)
    assert "Boxes from a score" not in seen(folder).text
    books = folder / "results.csv"
    head, row = books.read_text().splitlines()
    books.write_text(f"{head},threshold\n{row},0.137\n")
    text = write_report(folder).read_text(encoding="utf-8")
    assert "Boxes from a score of 0.137 on" in text
    assert "<small>1 epoch</small>" in text


# How to reproduce


def said_again(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The run that a command line asks for."""
    asked: dict[str, Run] = {}

    def train(run: Run) -> Any:
        asked["run"] = run
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "train", train)
    assert main(words[1:]) == 130
    return asked["run"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model": "fasterrcnn_vitdet_nano", "epochs": 7, "lr": 0.0005, "optimizer": "adamw", "square_training": True},
        {"recipe": "vitdet", "epochs": 3},
        {"recipe": "article"},
        {
            "scale_jitter": (0.1, 2),
            "option": ("drop_path=0.2", "x=[1, 2]"),
            "log_to": ("tensorboard",),
            "batch": "auto",
        },
        {"data": "a folder/it's; $(x)", "name": "-odd name", "seed": 5, "max_bad": 0.123456789},
    ],
)
def test_the_command_of_a_run_asks_for_the_same_run(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(**{"data": "d", **options})
    described = json.loads(run.model_dump_json()) | {"classes": ["a"]}
    assert said_again(train_command(described), monkeypatch).model_dump() == run.model_dump()


def test_commands_fit_the_state(tmp_path: Path) -> None:
    done = rig.write_run(tmp_path / "done")
    part = rig.write_run(tmp_path / "part", finished=False)
    alone = rig.write_evaluation(tmp_path / "evaluation", tmp_path / "pictures")
    titles = [[said for said, _ in commands(read(folder))] for folder in (done, part, alone)]
    assert titles[0] == ["Train the same again", "Judge it", "Use it", "Make this page again"]
    assert titles[1] == ["Train the same again", "Go on where it stopped", "Judge it", "Use it", "Make this page again"]
    assert titles[2] == ["Judge the same again", "Make this page again"]
    (done / "env.json").write_text('{"ranks": 4}')
    assert commands(read(done))[0][1][:5] == ["torchrun", "--nproc-per-node=4", "-m", "boxwright", "train"]


# Comparison


def test_a_comparison_tells_runs_apart_and_says_what_differs(tmp_path: Path) -> None:
    one = rig.write_run(tmp_path / "a" / "run", lr=0.001)
    two = rig.write_run(tmp_path / "b" / "run", lr=0.002, best=0.6, epochs=3)
    rig.write_evaluation(one / "evaluation", tmp_path / "pictures")
    rig.write_evaluation(two / "evaluation", tmp_path / "pictures2", classes=["cat", "fish"])
    path = write_comparison([one, two])
    assert path == tmp_path / "a" / "comparison.html"
    page = _Seen(path.read_text(encoding="utf-8"))
    for text in ("a/run", "b/run", "0.600 +0.100", "--lr", "0.001", "0.002", "--epochs", "fish"):
        assert text in page.text, text
    assert "--batch" not in page.text
    ap = json.loads((one / "evaluation/analysis.json").read_text())["errors"]["ap"]
    lost = path.read_text(encoding="utf-8").split('id="errors"')[1].split("</section>")[0]
    assert f'AP at IoU 0.5</bdi></th><td class="n" data-v="{ap:.6g}">{ap:.3f}' in lost
    assert "A small loss says nothing where AP is small" in lost
    assert not re.search(r'class="(better|worse)"', lost)
    assert "--seed 0" not in page.text


def test_a_comparison_takes_what_has_little(tmp_path: Path) -> None:
    runs = [rig.write_run(tmp_path / "run"), tmp_path / "log", tmp_path / "evaluation"]
    runs[1].mkdir()
    (runs[1] / "train.log").write_text("")
    rig.write_evaluation(runs[2], tmp_path / "pictures")
    assert "3 runs compared" in write_comparison(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    nine = [rig.write_run(tmp_path / f"run {i}", epochs=1, steps=2) for i in range(9)]
    assert 'class="line c0 dashed"' in write_comparison(nine).read_text(encoding="utf-8")


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "which run?"),
        (["RUNN"], "Did you mean 'RUN'?"),
        (["RUN", "RUN"], "say --compare"),
        (["--compare", "RUN"], "at least two"),
        (["--compare", "RUN", "RUN"], "twice"),
        (["--compare", "--watch", "RUN"], "say one of them"),
        (["--watch", "RUN", "--output", "x.html"], "leave out --output"),
        (["--watch", "RUN", "--port", "70000"], "not between 0 and 65535"),
        (["RUN", "--output", "x.safetensors"], "must end in .html"),
        (["RUN", "--output", "."], "is a folder"),
        (["RUN", "--output", "RUN/run.yaml/x.html"], "cannot write"),
        (["RUN", "--output", "y" * 300 + ".html"], "cannot write"),
        (["RUN", "--colour", "red"], "Unknown option"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rig.write_run(tmp_path / "RUN", epochs=1, steps=2)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("boxwright: error: ")
    assert error.count("\n") == 1
    assert reason in error
    assert sorted(tmp_path.rglob("*")) == before


def test_report_writes_where_it_is_told_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = rig.write_run(tmp_path / "RUN", epochs=1, steps=2)
    target = tmp_path / "new" / "page.html"
    assert main(["report", str(run), "--output", str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(target)}
    assert target.is_file()
    assert not (run / "report.html").exists()


def test_a_report_is_written_without_pytorch(run: Path) -> None:
    code = (
        "import sys; from boxwright.__main__ import main; code = main(sys.argv[1:]);"
        "sys.exit(9 if {'torch', 'matplotlib'} & set(sys.modules) else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, "report", str(run)], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, f"{run / 'report.html'}\n")


def test_what_an_evaluation_really_writes_is_shown(tmp_path: Path) -> None:
    records, detections = rig.judged(tmp_path / "pictures")
    (tmp_path / "evaluation").mkdir()
    write_evaluation(
        tmp_path / "evaluation", records, detections, rig.CLASSES,
        origin={"weights": "w", "data": "d", "split": "val"}, about=About(resamples=20),
    )  # fmt: skip
    told = json.loads((tmp_path / "evaluation" / "scores.json").read_text())
    page = _Seen((tmp_path / "evaluation" / "report.html").read_text(encoding="utf-8"))
    low, high = told["intervals"]["coco"]["AP"]
    for text in (
        *(f"{entry['who']}" for entry in told["conventions"]),
        f"{told['coco']['AP']:.3f}", f"{low:.3f}–{high:.3f}", f"{told['per_class']['cat']['AP75']:.3f}",
    ):  # fmt: skip
        assert text in page.text, text
