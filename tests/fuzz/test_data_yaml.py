"""Data YAMLs that nobody would write: a dataset with sound classes and folders that are there, or a line that says why
not. Each key is right, at a limit, of another type, missing, there twice, tagged, anchored, deep.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fuzz import hostile

from boxwright.data.data_yaml import BACKGROUND
from boxwright.data.dataset import open_dataset
from boxwright.data.formats.base import class_name, is_class_name
from boxwright.types import UserError

Pair = tuple[str, str]

ARTICLE = (
    ("TRAIN_DIR_IMAGES", "train/images"),
    ("TRAIN_DIR_LABELS", "train/labels"),
    ("VALID_DIR_IMAGES", "valid/images"),
    ("VALID_DIR_LABELS", "valid/labels"),
    ("CLASSES", "[__background__, cat, dog]"),
    ("NC", "3"),
    ("SAVE_VALID_PREDICTION_IMAGES", "True"),
)
SHORT = (("path", "."), ("train", "train"), ("val", "valid"), ("classes", "[cat, dog]"), ("format", "voc"))
YOLO = (
    ("path", "."), ("train", "yolo/images/train"), ("val", "yolo/images/val"), ("nc", "2"),
    ("names", "{0: cat, 1: dog}"),
)  # fmt: skip
FORMS = (ARTICLE, SHORT, SHORT[:3], YOLO, (*YOLO[1:4], ("names", "[cat, dog]")))
OTHER_KEYS = (
    "test", "images", "download", "roboflow", "kpt_shape", "root", "valid", "Names", "CLASES", "<<", "=", "~", "null",
    "1", "1.5", "yes", "", "''", "? [a]", "!!python/object/apply:os.system x", "&a x", "*a", "__class__", "train ",
    "名",
)  # fmt: skip
VALUES = (
    "", "~", "null", "yes", "no", "on", "012", "0o14", "3:30", "1e3", ".inf", "-.nan", "2026-11-29", "-1", "0",
    "99999999999", "1.0", "'3'", '"3"', "3 ", "[]", "{}", "[[]]", "[cat]", "[cat, cat]", "[cat, 'cat ']", "[no, yes]",
    "[1, 2]", "[~]", "{cat: 0}", "{0: cat, 0: dog}", "{0: cat, 2: dog}", "{-1: cat}", "{1.5: cat}", "{99999: cat}",
    "{99999999999: cat}", "{a: cat}", "{[a]: b}", "{0: [cat]}", "[cat, __background__]", "[__background__]",
    "[__background__, __background__]", "&a [cat, *a]", "&a [*a]", "&a {*a : *a}", "*a", "*nowhere",
    "!!python/object/apply:os.system ['true']", "!!binary YQ==", "!!set {a, b}", "!!str 3", "!!int x", "!!int 3",
    "!!bool maybe", "!!seq {}", "!!map []", "! x", "!x y", "|\n  cat\n", ">-\n  train\n", "'un", '"un', "[un", "{un",
    "a: b: c", "@x", "`x", "%x", "- x", "\t", "#", "train #x", "train: train", "\"\\0\"", '"\\uD800"', '"\\x07"',
    '"a\\nb"', "'" + "x" * 5000 + "'", "/etc/passwd", "/", "..", "../..", "~", "~nobody", "$HOME", "train\\images",
    "train/images/", "./train//images", "train/images/a.jpg", "coco.json", "[train, valid]", "[train, train]",
    "train, valid", "yolo/list.txt", "C:\\data", "file:///etc", "https://127.0.0.1:9/x", "s3://bucket/x",
    "train\u00a0", "tra\u0131n", "\u202etrain", "TRAIN", "{train: train/images}", "{valid: train}", "{1: 2}",
    "[" * 300, "[" * 90 + "]" * 90, "{a: " * 90 + "}" * 90, "- - - - - x",
)  # fmt: skip
TOKENS = tuple(
    b"\t|\n|\r|\0|\x85|\xff|\xef\xbb\xbf|: |- |? |# |&a |*a|!!str |!!python/name:os.system |'|\"|[|]|{|}|,|"
    b"\xe2\x80\xa8|"
    b"---\n|...\n|%YAML 9.9\n|<<: *a\n|  |\n  |\\|NC: 3\n|train: train\n|>".split(b"|")
)


def data_yaml(r: Random) -> bytes:
    """One case."""
    pairs = list(r.choice(FORMS))
    wild = r.choice((0.0, 0.05, 0.15, 0.4))
    written = [line for pair in pairs for line in _lines(r, pair, wild)]
    if r.random() < wild:
        written.insert(r.randrange(len(written) + 1), f"{r.choice(OTHER_KEYS)}: {r.choice(VALUES)}")
    if r.random() < wild:
        written += [line for pair in r.choice(FORMS)[: r.randint(1, 3)] for line in _lines(r, pair, wild)]
    if r.random() < wild / 2:
        r.shuffle(written)
    text = r.choice(("\n", "\n", "\r\n")).join(written) + "\n"
    if r.random() < wild / 2:
        text = r.choice(("---\n", "%YAML 1.2\n---\n", "\ufeff", "# c\n", "{", "- ", "--- !x\n", "a\n")) + text
    if r.random() < wild / 4:
        text += r.choice(("---\ntrain: x\n", "...\n", "...\nx", "\0", "]", "\t"))
    data = text.encode(r.choice(("utf-8", "utf-16", "latin-1")) if r.random() < wild / 4 else "utf-8", "replace")
    return hostile.damaged(r, data, SEEDS, TOKENS) if r.random() < wild else data


SEEDS = tuple("".join(f"{key}: {value}\n" for key, value in form).encode() for form in FORMS)


def _lines(r: Random, pair: Pair, wild: float) -> list[str]:
    """A pair as it is written: seldom missing, there twice, or with another value."""
    key, value = pair
    if r.random() < wild / 2:
        value = r.choice((r.choice(VALUES), r.choice(VALUES), hostile.number(r), r.choice(hostile.WORDS)))
    if r.random() < wild / 8:
        key = r.choice((key.lower(), key + "S", key[:-1], f'"{key}"', f"!!str {key}", f"&k {key}"))
    if r.random() < wild / 8:
        value = r.choice(("&v ", "!!str ", "!!seq ", "!!python/tuple ")) + value
    line = f"{key}: {value}"
    how = r.random()
    if how < wild / 8:
        return []
    if how < wild / 4:
        return [line, r.choice((line, f"{key}: {r.choice(VALUES)}"))]
    return [line]


# --- what must hold


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the right values name."""
    tmp_path = tmp_path_factory.mktemp("yaml")
    for place in ("train/images", "valid/images", "yolo/images/train", "yolo/images/val"):
        labels = place.replace("images", "labels")
        for made in (place, labels):
            (tmp_path / made).mkdir(parents=True)
        (tmp_path / place / "a.jpg").write_bytes(b"")
        (tmp_path / labels / ("a.txt" if "yolo" in place else "a.xml")).write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "coco.json").write_text('{"images": [], "annotations": [], "categories": []}')
    (tmp_path / "yolo" / "list.txt").write_text("images/train/a.jpg\n")
    return tmp_path


def check(path: Path, data: bytes, case: object = None) -> str:
    """Open `data` as a data YAML, and hold the answer against what is promised."""
    path.write_bytes(data)
    try:
        with hostile.in_time(case):
            dataset = open_dataset(path)
    except UserError as error:
        said = str(error)
        hostile.one_line(said)
        assert said.replace("\u00a0", " ").replace("\u3000", " ").isprintable(), said
        return "refused"
    assert {"train", "val"} <= set(dataset.splits)
    for sources in dataset.layout.splits.values():
        for source in sources:
            assert source.annotations.exists()
            assert source.images is None or source.images.is_dir()
    classes = dataset.layout.classes
    if classes is not None:
        assert len(classes) > 0
        assert len(set(classes)) == len(classes)
        assert BACKGROUND not in classes
        assert all(is_class_name(name) and class_name(name) == name for name in classes)
    for note in dataset.notes:
        hostile.one_line(note)
    return "opened"


def fuzz(path: Path, count: int) -> Counter[str]:
    """Try cases 0 .. count-1."""
    outcomes: Counter[str] = Counter()
    for case in range(count):
        data = data_yaml(Random(case))
        try:
            outcomes[check(path, data, case)] += 1
        except Exception as error:
            raise AssertionError(f"case {case}: {data[:400]!r}") from error
    print(f"{count:,} cases: {dict(outcomes)}")  # noqa: T201
    return outcomes


# --- tests


@settings(max_examples=100, deadline=None)
@given(r=st.randoms(use_true_random=False))
def test_hostile_yaml_is_opened_or_refused(r: Random, folder: Path) -> None:
    check(folder / "data.yaml", data_yaml(r))


def test_seeds_are_opened(folder: Path) -> None:
    for seed in SEEDS:
        assert check(folder / "data.yaml", seed) == "opened"


def test_numbered_cases_of_hostile_yaml(folder: Path) -> None:
    outcomes = fuzz(folder / "data.yaml", hostile.cases(1000))
    for outcome in ("opened", "refused"):
        assert outcomes[outcome] > 0.2 * outcomes.total()


@pytest.mark.slow
def test_two_hundred_thousand_cases_of_hostile_yaml(folder: Path) -> None:
    fuzz(folder / "data.yaml", hostile.cases(200_000))
