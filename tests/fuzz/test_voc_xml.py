"""VOC XML that nobody would write, and a million of it: sound boxes, or faults that say where, and nothing vanishes.

Most damage to bytes ends in expat's "not well-formed"; so most cases are trees that are well-formed and hostile.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fuzz import hostile

from boxwright.data.formats.base import Annotation, UnknownClass
from boxwright.data.formats.voc import class_counts, read_annotation, write_annotation
from boxwright.types import Record

CLASSES = ("cat", "dog", "blå")
LABELS = {name: label for label, name in enumerate(CLASSES)}
HEIGHT, WIDTH = SIZE = (100, 200)

# --- twenty files as tools write them

_OBJECT = (
    "\t<object>\n\t\t<name>{name}</name>\n\t\t<pose>{pose}</pose>\n\t\t<truncated>{flag}</truncated>\n"
    "\t\t<difficult>{flag}</difficult>\n\t\t<bndbox>\n\t\t\t<xmin>{0}</xmin>\n\t\t\t<ymin>{1}</ymin>\n"
    "\t\t\t<xmax>{2}</xmax>\n\t\t\t<ymax>{3}</ymax>\n\t\t</bndbox>\n{part}\t</object>\n"
)
_PART = (
    "\t\t<part>\n\t\t\t<name>head</name>\n"
    "\t\t\t<bndbox><xmin>3</xmin><ymin>3</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>\n\t\t</part>\n"
)
_SIZE = "\t<size>\n\t\t<width>200</width>\n\t\t<height>100</height>\n\t\t<depth>3</depth>\n\t</size>\n"
_HEADS = (
    "<annotation>\n\t<folder>VOC2007</folder>\n\t<filename>000005.jpg</filename>\n\t<source>\n\t\t<database>The VOC2007"
    " Database</database>\n\t\t<flickrid>325991873</flickrid>\n\t</source>\n\t<owner>\n\t\t<name>?</name>\n\t</owner>\n"
    + _SIZE
    + "\t<segmented>0</segmented>\n",
    '<?xml version="1.0" encoding="utf-8"?>\n<annotation verified="yes">\n\t<folder>imgs</folder>\n\t<filename>人 1.png'
    "</filename>\n\t<path>C:\\Users\\me\\imgs\\人 1.png</path>\n" + _SIZE,
    "<?xml version='1.0'?>\n<!-- made by a tool -->\n<annotation>\n" + _SIZE,
    "<annotation>\n\t<filename>a.jpg</filename>\n",
)
_BOXES = (
    ((1, 1, 200, 100),),
    ((48, 24, 195, 71), (8, 12, 52, 97)),
    ((7.5, 3.25, 19.125, 50.0), (0, 0, 200, 100), (190, 90, 201, 101)),
    (),
    tuple((5 * n + 1, 3 * n + 1, 5 * n + 12, 3 * n + 9) for n in range(20)),
)
SEEDS = tuple(
    (
        head
        + "".join(
            _OBJECT.format(*box, name=CLASSES[n % 3], pose="Left", flag=n % 2, part=_PART if n % 3 == 1 else "")
            for n, box in enumerate(boxes)
        )
        + "</annotation>\n"
    ).encode()
    for head in _HEADS
    for boxes in _BOXES
)
TOKENS = tuple(
    b"<|>|</|/>|&|&amp;|&#0;|&#x10FFFF;|&#xD800;|&bogus;|<![CDATA[|]]>|<!--|-->|<?x |?>|<object>|</object>|<bndbox>|"
    b"</bndbox>|<xmin>|</xmin>|<name>|</name>|</annotation>|<annotation>|<!DOCTYPE a>|<!ENTITY x 'y'>|\0|\xff|\xc3|"
    b"\xef\xbb\xbf|\xff\xfe|encoding='gbk'|encoding='utf-16'|xmlns='x'|nan|-|9999999999".split(b"|")
)


# --- trees

Node = tuple[str, "list[Node] | str"]


def xml(r: Random) -> bytes:
    """One case: a hostile tree, or a file of a tool after an accident."""
    if r.randrange(6) == 0:
        return hostile.damaged(r, r.choice(SEEDS), SEEDS, TOKENS)
    wild = r.choice((0.0, 0.05, 0.1, 0.2, 0.4))  # how often something is not as it should be
    text = _written(r, _twisted(r, _annotation(r, wild), wild), wild)
    return _encoded(r, _prologue(r, wild) + text + _epilogue(r, wild), wild)


def _annotation(r: Random, wild: float) -> Node:
    inside: list[Node] = []
    if r.randrange(3):
        good = r.random() >= wild / 2
        sides = ("200", "100", "3") if good else tuple(hostile.number(r) for _ in range(3))
        inside.append(("size", list(zip(("width", "height", "depth"), sides, strict=True))))
    if r.randrange(2):
        inside.append((r.choice(("filename", "path", "folder", "segmented")), r.choice(hostile.WORDS)))
    inside += [_thing(r, wild) for _ in range(r.choice((0, 1, 1, 2, 3, 8)))]
    return "annotation", inside


def _thing(r: Random, wild: float) -> Node:
    name = r.choice(CLASSES) if r.random() >= wild else r.choice(hostile.WORDS)
    fields: list[Node] = [("name", name)]
    for mark in ("pose", "truncated", "difficult", "occluded", "crowd"):
        if r.randrange(3) == 0:
            value = str(r.randrange(2)) if r.random() >= wild else r.choice((hostile.number(r), "Unspecified", "yes"))
            fields.append((mark, value))
    if r.random() < wild:
        fields.append(("part", [("name", "head"), _box(r, wild)]))
    if r.random() >= wild / 4:
        fields.append(_box(r, wild))
    return "object", fields


def _box(r: Random, wild: float) -> Node:
    x1, y1 = r.randint(1, WIDTH - 3), r.randint(1, HEIGHT - 3)
    corners = [x1, y1, r.randint(x1 + 2, WIDTH), r.randint(y1 + 2, HEIGHT)]
    values = [str(corner) if r.random() >= wild / 2 else hostile.number(r) for corner in corners]
    return "bndbox", list(zip(("xmin", "ymin", "xmax", "ymax"), values, strict=True))


def _twisted(r: Random, node: Node, wild: float) -> Node:
    """The same tree with elements missing, there twice, out of order, misspelt, in one another."""
    tag, inside = node
    if r.random() < wild / 12:
        tag = r.choice((tag.upper(), tag.title(), "v:" + tag, tag + "s", "part", "object", "bndbox", "a" * 300, "ö"))
    if isinstance(inside, str):
        return (tag, [("b", inside)]) if r.random() < wild / 8 else (tag, inside)
    children = [_twisted(r, child, wild) for child in inside]
    if children and r.random() < wild / 2:
        at = r.randrange(len(children))
        how = r.randrange(5)
        if how == 0:
            del children[at]
        elif how == 1:
            children.insert(r.randrange(len(children) + 1), children[at])
        elif how == 2:
            r.shuffle(children)
        elif how == 3:
            children[at] = (r.choice(("group", "part", "object", "annotation", "bndbox")), [children[at]])
        else:
            children.append(r.choice(children))
            children *= r.choice((1, 1, 3))
    return tag, children


def _written(r: Random, node: Node, wild: float) -> str:
    tag, inside = node
    attributes = (
        r.choice((' id="1"', " xmlns='http://x.org'", ' xmlns:v="v"', " a='<'")) if r.random() < wild / 20 else ""
    )
    gap = r.choice(("", "", "\n", "\r\n", "<!-- c -->", "<?pi x?>", " text ")) if r.random() < wild / 2 else ""
    if isinstance(inside, str):
        return f"<{tag}{attributes}>{_text(r, inside, wild)}</{tag}>{gap}"
    if not inside and r.randrange(2):
        return f"<{tag}{attributes}/>{gap}"
    return f"<{tag}{attributes}>{gap}{''.join(_written(r, child, wild) for child in inside)}</{tag}>{gap}"


def _text(r: Random, text: str, wild: float) -> str:
    if r.random() >= wild / 4:
        return text.replace("&", "&amp;").replace("<", "&lt;")
    how = r.randrange(4)
    if how == 0:
        return f"<![CDATA[{text}]]>"
    if how == 1:
        return "".join(f"&#{ord(letter)};" for letter in text[:50])
    if how == 2:
        return text[: len(text) // 2] + r.choice(("<!-- -->", "<?x?>", "<b/>", "<b>7</b>")) + text[len(text) // 2 :]
    return text + r.choice(("&#0;", "&bogus;", "\0", "]]>", "\x0b", "&lt;", "&#9;", "&gt;", " ", "\n"))


def _prologue(r: Random, wild: float) -> str:
    start = r.choice(("", "", '<?xml version="1.0"?>', "<?xml version='1.0' encoding='utf-8'?>\n"))
    if r.random() < wild / 4:
        start = r.choice(("\n", " \r\n", "\ufeff", "text", "<!-- -->")) + start
    if r.random() < wild / 8:
        start += r.choice(DOCTYPES)
    return start


DOCTYPES = (
    "<!DOCTYPE annotation>",
    '<!DOCTYPE a SYSTEM "file:///etc/passwd">',
    '<!DOCTYPE a [<!ENTITY % p SYSTEM "http://127.0.0.1/x"> %p;]>',
    "<!DOCTYPE a [<!ENTITY cat 'dog'>]>",
    "<!DOCTYPE a [" + "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12)) + "]>",
)


def _epilogue(r: Random, wild: float) -> str:
    if r.random() >= wild / 4:
        return ""
    return r.choice(("\n", "\0\0", "<!-- -->", "<annotation/>", "text", " " * 500, "</annotation>", "<deep>" * 200))


def _encoded(r: Random, text: str, wild: float) -> bytes:
    if r.random() >= wild / 4:
        return text.encode("utf-8", "replace")
    said = r.choice(ENCODINGS)
    real = r.choice((said, said, "utf-8", "utf-16", "latin-1", "gbk"))
    text = f'<?xml version="1.0" encoding="{said}"?>' + (text if "<?xml" not in text else text.partition("?>")[2])
    try:
        return text.encode(real, "replace")
    except (LookupError, UnicodeError):  # no encoding of text, or one that cannot replace
        return text.encode("utf-8", "replace")


ENCODINGS = (
    "utf-8", "UTF8", "utf-16", "utf-16-le", "utf-32", "latin-1", "ISO-8859-15", "windows-1252", "cp437", "gbk",
    "GB18030",
    "gb2312", "big5", "shift_jis", "euc-kr", "koi8-r", "utf-7", "utf-8-sig", "idna", "punycode", "rot13", "zlib", "hex",
    "unicode_escape", "raw_unicode_escape", "undefined", "mbcs", "klingon", "x" * 39, "..", "ascii", "cp65001", "hz",
)  # fmt: skip


# --- what must hold


def check(path: Path, data: bytes, case: object = None) -> Annotation:
    """Read `data` as an annotation, and hold the answer against what is promised about every one."""
    path.write_bytes(data)
    with hostile.in_time(case):
        found = read_annotation(path, LABELS, SIZE)
        counted = class_counts(path)
    boxes, labels = found.boxes, found.labels
    assert (boxes.dtype, boxes.shape) == (np.float32, (len(labels), 4))
    assert len(found.difficult) == len(found.truncated) == len(found.crowd) == len(found.occluded) == len(found.pose)
    if len(boxes):
        assert np.isfinite(boxes).all()
        assert boxes.min() >= 0
        assert boxes[:, 2].max() <= WIDTH
        assert boxes[:, 3].max() <= HEIGHT
        assert (boxes[:, 2:] - boxes[:, :2]).min() > 1
        assert 0 <= labels.min() <= labels.max() < len(CLASSES)
    lines = data.count(b"\n") + data.count(b"\r") + 1
    for fault in found.faults:
        hostile.one_line(fault.reason)
        assert fault.path == path
        assert fault.line is None or 1 <= fault.line <= lines
    if found.skipped:
        assert len(boxes) == 0
        assert len(found.faults) == 1
        return found
    dropped = sum(fault.action == "dropped box" for fault in found.faults)
    assert len(boxes) + dropped >= sum(counted.values())
    assert sum(isinstance(fault, UnknownClass) for fault in found.faults) == sum(
        count for name, count in counted.items() if name not in LABELS
    )
    if (objects := _objects(data)) is not None:
        assert len(boxes) + dropped == objects  # each is a box or a fault
    return found


def _objects(data: bytes) -> int | None:
    """How many <object>s another parser sees below the root, None where it sees no XML."""
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError, Warning):  # Python learns strange encodings with a warning
        return None
    return sum(child.tag.rpartition("}")[2] == "object" for child in root if isinstance(child.tag, str))


def rewritten(path: Path, found: Annotation) -> None:
    """What was accepted is written, and read again without a fault."""
    write_annotation(path, Record("a", Path("a.jpg"), SIZE, *found[:4]), CLASSES)
    again = read_annotation(path, LABELS, SIZE)
    assert again.faults == ()
    assert np.allclose(again.boxes, found.boxes, rtol=0, atol=2**-16)
    assert again.labels.tolist() == found.labels.tolist()


def fuzz(path: Path, count: int, make: Callable[[Random], bytes] = xml) -> Counter[str]:
    """Try cases 0 .. count-1; how many were read, in part or not at all."""
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    for case in range(count):
        data = make(Random(case))
        start = time.perf_counter()
        try:
            found = check(path, data, case)
            if case % 50 == 0:
                rewritten(path, found)
        except Exception as error:
            raise AssertionError(f"case {case}: {data[:300]!r}") from error
        slowest = max(slowest, time.perf_counter() - start)
        outcomes["refused" if found.skipped else "in part" if found.faults else "whole"] += 1
        outcomes["boxes"] += len(found.boxes)
    print(f"{count:,} cases, the slowest {slowest:.3f} s: {dict(outcomes)}")  # noqa: T201
    return outcomes


# --- tests


@settings(max_examples=150, deadline=None)
@given(r=st.randoms(use_true_random=False))
def test_hostile_xml_gives_sound_boxes_or_faults(r: Random, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "hypothesis.xml"
    rewritten(path, check(path, xml(r)))


def test_seeds_are_read_whole(tmp_path: Path) -> None:
    assert len(SEEDS) == 20
    for seed in SEEDS:
        found = check(tmp_path / "a.xml", seed)
        assert not found.skipped
        assert len(found.boxes) == seed.count(b"<object>")


def test_numbered_cases_of_hostile_xml(tmp_path: Path) -> None:
    outcomes = fuzz(tmp_path / "a.xml", hostile.cases(3000))
    for outcome in ("whole", "in part", "refused"):  # the cases are of all kinds, so that something is tested
        assert outcomes[outcome] > 0.1 * (outcomes.total() - outcomes["boxes"])


@pytest.mark.slow
def test_a_million_cases_of_hostile_xml(tmp_path: Path) -> None:
    fuzz(tmp_path / "a.xml", hostile.cases(1_000_000))


def test_an_oracle_that_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that lets one wrong box or one lost object through is caught within the short run's cases."""

    def broken(change: Callable[[Annotation], Annotation]) -> Callable[..., Annotation]:
        return lambda *arguments: change(read_annotation(*arguments))

    def outside(found: Annotation) -> Annotation:
        return found._replace(boxes=found.boxes + np.float32(1) * (found.boxes.max(initial=0) == WIDTH))

    def silent(found: Annotation) -> Annotation:
        return found._replace(faults=tuple(fault for fault in found.faults if "no number" not in fault.reason))

    changes: list[Any] = [outside, silent]
    for change in changes:
        monkeypatch.setattr(f"{__name__}.read_annotation", broken(change))
        with pytest.raises(AssertionError, match=r"^case \d+"):
            fuzz(tmp_path / "a.xml", 3000)
        monkeypatch.undo()
