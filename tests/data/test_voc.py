"""VOC XML: an exact round trip, and for everything that is wrong a fault that says where."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boxwright.data.dataset import open_dataset
from boxwright.data.formats.base import Annotation, UnknownClass
from boxwright.data.formats.voc import class_counts, read_annotation, write_annotation
from boxwright.types import Record, UserError

NAMES = ("cat", "dog", "blå <&> \"'")
LABELS = {name: label for label, name in enumerate(NAMES)}
SIZE = (100, 200)
BOX = "<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>"
GOOD = f"<object><name>cat</name>{BOX}</object>"


def bndbox(xmin: object, ymin: object, xmax: object, ymax: object) -> str:
    corners = zip(("xmin", "ymin", "xmax", "ymax"), (xmin, ymin, xmax, ymax), strict=True)
    return "<bndbox>" + "".join(f"<{name}>{value}</{name}>" for name, value in corners) + "</bndbox>"


def thing(inner: str, name: str = "cat") -> str:
    return f"<object>\n<name>{name}</name>{inner}</object>"


def read(tmp_path: Path, xml: str | bytes) -> Annotation:
    path = tmp_path / "a.xml"
    path.write_bytes(xml if isinstance(xml, bytes) else xml.encode())
    return read_annotation(path, LABELS, SIZE)


def document(*objects: str, size: str = "") -> str:
    return f"<annotation>{size}\n" + "\n".join(objects) + "\n</annotation>"


# --- what is right

pixels = st.one_of(st.integers(0, 600), st.floats(2**-20, 600, width=32)).map(np.float32)


@st.composite
def records(draw: st.DrawFn) -> Record:
    height, width = draw(st.integers(2, 500)), draw(st.integers(2, 500))
    boxes: dict[tuple[int, ...], tuple[int, list[np.float32]]] = {}
    for _ in range(draw(st.integers(0, 6))):
        x1, x2 = sorted(min(draw(pixels), np.float32(width)) for _ in range(2))
        y1, y2 = sorted(min(draw(pixels), np.float32(height)) for _ in range(2))
        label = draw(st.integers(0, len(NAMES) - 1))
        if float(x2) - float(x1) > 1 and float(y2) - float(y1) > 1:
            boxes[label, x1, y1, x2, y2] = label, [x1, y1, x2, y2]
    count = len(boxes)
    flags = st.lists(st.booleans(), min_size=count, max_size=count)
    poses = st.lists(st.sampled_from(["", "Left", "Rear <&> side"]), min_size=count, max_size=count)
    return Record(
        id="a",
        image=Path("folder/a & b.jpg"),
        size=(height, width),
        boxes=np.array([box for _, box in boxes.values()], np.float32).reshape(-1, 4),
        labels=np.array([label for label, _ in boxes.values()], np.int64),
        difficult=np.array(draw(flags), np.bool_),
        truncated=np.array(draw(flags), np.bool_),
        crowd=np.array(draw(flags), np.bool_),
        occluded=np.array(draw(flags), np.bool_),
        pose=np.array(draw(poses), np.str_),
    )


@settings(max_examples=150, deadline=None)
@given(record=records())
def test_what_is_written_is_read_again_exactly(record: Record, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round.xml"
    before = record.boxes.copy()
    write_annotation(path, record, NAMES)
    found = read_annotation(path, LABELS, record.size)
    assert found.faults == ()
    assert np.array_equal(record.boxes, before)
    for name in ("boxes", "labels", "difficult", "truncated", "crowd", "occluded", "pose"):
        ours, theirs = getattr(found, name), getattr(record, name)
        assert ours.dtype.kind == theirs.dtype.kind
        assert ours.shape == theirs.shape
        assert np.array_equal(ours, theirs), name


def test_coordinates_are_one_based_and_inclusive(tmp_path: Path) -> None:
    found = read(tmp_path, document(thing(bndbox(1, 1, 200, 100)), thing(bndbox(" 11.5\n", "2e1", "+30.25", "40."))))
    assert found.boxes.tolist() == [[0, 0, 200, 100], [10.5, 19, 30.25, 40]]
    assert found.faults == ()


def test_parts_are_no_objects(tmp_path: Path) -> None:
    part = f"<part><name>head</name>{bndbox(1, 1, 5, 5)}</part>"
    found = read(tmp_path, document(f"<object>{part}<name>dog</name>{BOX}{part}</object>", f"<group>{GOOD}</group>"))
    assert found.labels.tolist() == [1]
    assert found.boxes.tolist() == [[10, 20, 30, 40]]
    assert found.faults == ()


def test_flags_are_kept(tmp_path: Path) -> None:
    flags = "<difficult>{}</difficult><truncated>{}</truncated>"
    pairs = [("1", "0"), (" true ", "0.3"), ("0", "1"), ("", "False")]
    objects = [thing(flags.format(*pair) + bndbox(1, 1, 10 + n, 10)) for n, pair in enumerate(pairs)]
    found = read(tmp_path, document(*objects, thing(BOX)))
    assert found.difficult.tolist() == [True, True, False, False, False]
    assert found.truncated.tolist() == [False, True, True, False, False]
    assert found.faults == ()


def test_occlusion_and_pose_are_kept(tmp_path: Path) -> None:
    found = read(tmp_path, document(thing(f"<pose>\nRear </pose><occluded>1</occluded>{BOX}"), thing(BOX, "dog")))
    assert found.occluded.tolist() == [True, False]
    assert found.pose.tolist() == ["Rear", ""]
    assert found.crowd.tolist() == [False, False]


def test_no_object_is_a_negative(tmp_path: Path) -> None:
    found = read(tmp_path, "<annotation/>")
    assert found.boxes.shape == (0, 4)
    assert not found.skipped


UTF16 = '<?xml version="1.0" encoding="UTF-16"?>' + document(GOOD)


@pytest.mark.parametrize(
    "xml",
    [
        b"\xef\xbb\xbf" + document(GOOD).encode(),
        UTF16.encode("utf-16"),
        UTF16.encode("utf-16-le"),
        UTF16.replace("UTF-16", "utf-8").encode("utf-16"),  # as a tool saves again what said so
        UTF16.replace("UTF-16", "unicode_escape").encode("utf-16"),
        b'\n\n<?xml version="1.0"?>' + document(GOOD).encode(),
        b'\n<?xml version="1.0" encoding="ISO-8859-1"?>' + document(GOOD, "<!--\xe9-->").encode("latin-1"),
        document(GOOD).encode() + b"\n\0\0",
        b'<?xml version="1.0" encoding="GBK"?>' + document("<pose>左</pose>", GOOD).encode("gbk"),
        b'<?xml version="1.0" encoding="Shift-JIS"?>' + document("<pose>左</pose>", GOOD).encode("cp932"),
        b'<?xml version="1.0" encoding="windows-1252"?>' + document(GOOD, "<pose>\xe9</pose>").encode("cp1252"),
        document(f"<?pi x?><!-- c --><object><name><![CDATA[cat]]></name>{BOX}</object>"),
        document(GOOD).replace("<annotation>", '<annotation xmlns="http://x.org">'),
        document(GOOD)
        .replace("<", "<v:")
        .replace("<v:/", "</v:")
        .replace("<v:annotation>", '<v:annotation xmlns:v="x">'),
        document(GOOD, size="<size><width>0</width><height>0</height></size>"),
        document(GOOD, size="<size><width>200</width><height>100</height><depth>3</depth></size>"),
        document(GOOD, size="<filename>../../etc/passwd</filename><path>/etc/passwd</path>"),
        document(f"<object><name>\u00a0cat\n</name>{BOX}</object>"),
        document(f"<object>{BOX}<pose>Left</pose><name>cat</name></object>"),
    ],
)
def test_odd_but_readable_files_are_read(xml: str | bytes, tmp_path: Path) -> None:
    found = read(tmp_path, xml)
    assert [str(fault) for fault in found.faults] == []
    assert found.boxes.tolist() == [[10, 20, 30, 40]]
    assert found.labels.tolist() == [0]


def test_names_are_composed(tmp_path: Path) -> None:
    assert read(tmp_path, document(thing(BOX, "bla\u030a &lt;&amp;> \"'"))).labels.tolist() == [2]


# --- what is wrong


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        ("", "no <bndbox>"),
        ("<polygon/>", "no <bndbox>"),
        ("<bndbox><xmin>1</xmin></bndbox>", "no <ymin>"),
        (bndbox(50, 1, 10, 10), "xmin 50 is greater than xmax 10"),
        (bndbox(5, 7, 10, 7), "ymin and ymax are both 7"),
        (bndbox(201, 1, 220, 10), "no area inside"),
        (bndbox(200, 1, 220, 10), "no area inside"),
        (bndbox(-50, 1, -3, 10), "no area inside"),
        *((bndbox(1, 1, bad, 10), "xmax is .* no number") for bad in ("nan", "inf", "1e400", "12,5", "١٢", "1_0", "")),
        (
            "<bndbox><xmin>1<b>7</b></xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>",
            "xmin is '', which",
        ),
    ],
)
def test_a_bad_box_costs_the_box_and_says_where(inner: str, reason: str, tmp_path: Path) -> None:
    found = read(tmp_path, document(thing(inner), GOOD))
    assert found.boxes.tolist() == [[10, 20, 30, 40]]
    (fault,) = found.faults
    assert fault.action == "dropped box"
    assert fault.path == tmp_path / "a.xml"
    assert fault.line in (2, 3)
    assert re.search(reason, fault.reason)


@pytest.mark.parametrize("name", ["", "  ", None])
def test_a_nameless_object_is_dropped(name: str | None, tmp_path: Path) -> None:
    nameless = f"<object>{'' if name is None else f'<name>{name}</name>'}{BOX}</object>"
    found = read(tmp_path, document(nameless, GOOD))
    assert [(fault.reason, fault.action) for fault in found.faults] == [("<object> has no <name>", "dropped box")]
    assert len(found.boxes) == 1


def test_a_class_that_is_not_in_the_list_is_told_apart(tmp_path: Path) -> None:
    found = read(tmp_path, document(thing(BOX, "Cat"), GOOD))
    (fault,) = found.faults
    assert isinstance(fault, UnknownClass)
    assert (fault.name, fault.line) == ("Cat", 2)
    assert class_counts(tmp_path / "a.xml") == {"Cat": 1, "cat": 1}


def test_a_box_that_leaves_the_picture_is_clamped(tmp_path: Path) -> None:
    found = read(tmp_path, document(thing(bndbox(0, 0, 50, 50)), thing(bndbox(150, -20, 201, 300))))
    assert found.boxes.tolist() == [[0, 0, 50, 50], [149, 0, 200, 100]]
    assert [fault.action for fault in found.faults] == ["repaired"] * 2
    assert "VOC counts from 1" in found.faults[0].reason


def test_an_object_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    found = read(tmp_path, document(GOOD, thing(BOX, "dog"), GOOD))
    assert found.labels.tolist() == [0, 1]
    assert [(fault.action, fault.line) for fault in found.faults] == [("dropped box", 5)]


def test_an_unreadable_flag_is_taken_as_unset(tmp_path: Path) -> None:
    found = read(tmp_path, document(thing(f"<difficult>Unspecified</difficult>{BOX}")))
    assert found.difficult.tolist() == [False]
    assert [(fault.action, fault.wrong) for fault in found.faults] == [("repaired", True)]  # it decides what counts
    found = read(tmp_path, document(thing(f"<truncated>Unspecified</truncated>{BOX}")))
    assert [(fault.action, fault.wrong) for fault in found.faults] == [("repaired", False)]


def test_of_two_boxes_the_first_is_read_but_that_is_a_guess(tmp_path: Path) -> None:
    found = read(tmp_path, document(thing(f"{BOX}{bndbox(1, 1, 5, 5)}")))
    assert found.boxes.tolist() == [[10, 20, 30, 40]]
    (fault,) = found.faults
    assert (fault.reason, fault.action, fault.line) == ("has 2 <bndbox>: the first is read", "repaired", 2)
    assert fault.wrong


@pytest.mark.parametrize(
    ("inner", "wrong"),
    [
        ("", True),
        (bndbox(50, 1, 10, 10), True),
        (bndbox("nan", 1, 10, 10), True),
        (bndbox(5, 7, 10, 7), False),
        (bndbox(201, 1, 220, 10), False),
        (BOX, False),
        (bndbox(150, -20, 201, 300), False),
    ],
)
def test_a_contradiction_is_told_from_a_loss(inner: str, wrong: bool, tmp_path: Path) -> None:
    found = read(tmp_path, document(GOOD, thing(inner)))
    assert [fault.wrong for fault in found.faults] == [wrong]


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [(100, 200, "swapped"), (400, 200, "2 times its scale"), (199, 100, None), (640, 480, "another picture")],
)
def test_labels_made_for_another_size_cannot_be_trusted(
    width: int, height: int, reason: str | None, tmp_path: Path
) -> None:
    size = f"\n<size><width>{width}</width><height>{height}</height></size>"
    found = read(tmp_path, document(GOOD, size=size))
    if reason is None:
        assert not found.skipped
    else:
        assert found.skipped
        assert found.faults[0].line == 2
        assert reason in found.faults[0].reason
        assert len(found.boxes) == 0


BOMB = "<!DOCTYPE a [" + "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12)) + "]>"


@pytest.mark.parametrize(
    ("xml", "reason", "line"),
    [
        (b"", "is empty", None),
        (b" \0\n", "is empty", None),
        (document(GOOD)[:-5], "not well-formed", 3),
        ("<annotation>\n<object>\n</annotation>", "mismatched tag", 3),
        (document(GOOD, "<!--\xe9-->").encode("latin-1"), "save it as UTF-8", 3),
        (b'<?xml version="1.0" encoding="gbk"?>' + b"<annotation>\xff</annotation>", "is not gbk", 1),
        (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "klingon", 1),
        (b'<?xml version="1.0" encoding="unicode_escape"?><annotation/>', "unicode_escape", 1),
        (BOMB + "<annotation>&a11;</annotation>", "DOCTYPE", 1),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "DOCTYPE", 1),
        ("<annotation>" + "<a>" * 5000, "nested deeper than 64", 1),
        (document("<object/>" * 10_001), "more than 10000 objects", 2),
        (b"<annotation>" + b" " * 10_000_000, "larger than 10 MB", None),
        ("<html/>", "<html>", 1),
        ("<annotation>\n<Object/></annotation>", "must be written <object>", 2),
        ("<annotation>\n<object><Bndbox/></object></annotation>", "must be written <bndbox>", 2),
    ],
)
def test_a_bad_file_costs_the_picture(xml: str | bytes, reason: str, line: int | None, tmp_path: Path) -> None:
    start = time.process_time()  # what others do on the machine does not count
    found = read(tmp_path, xml)
    assert time.process_time() - start < 1
    (fault,) = found.faults
    assert found.skipped
    assert len(found.boxes) == len(found.difficult) == 0
    assert reason in fault.reason
    assert fault.line == line


def test_a_missing_file_is_a_fault_too(tmp_path: Path) -> None:
    for path in (tmp_path / "none.xml", tmp_path):
        assert read_annotation(path, LABELS, SIZE).skipped
        assert not class_counts(path)


# --- whatever comes

SEED = document(GOOD, thing(BOX, "dog"), thing(bndbox(0, 0, 5000, 7)), size="<size><width>200</width></size>")
tokens = st.sampled_from(["<", ">", "&", "&#0;", "nan", "1e999", "-", "</object>", "<bndbox>", "9", "\0", "é", "]]>"])


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(SEED)), st.integers(0, 9), tokens), max_size=5),
    noise=st.binary(max_size=30),
    at=st.integers(0, 2 * len(SEED)),
)
def test_damaged_xml_gives_sound_boxes_or_faults(
    edits: list[tuple[int, int, str]], noise: bytes, at: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    xml = SEED
    for start, length, token in edits:
        xml = xml[:start] + token + xml[start + length :]
    data = xml.encode()
    if at < len(data):
        data = data[:at] + noise + data[at:]
    path = tmp_path_factory.getbasetemp() / "fuzzed.xml"
    path.write_bytes(data)
    found = read_annotation(path, LABELS, SIZE)
    check_sound(found)
    assert len(found.boxes) or found.faults or b"<object" not in data or not class_counts(path)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=60))
def test_random_bytes_never_raise(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "random.xml"
    path.write_bytes(data)
    assert read_annotation(path, LABELS, SIZE).skipped
    path.write_bytes(b"<?xml version='1.0' encoding='" + data + b"'?><annotation/>")
    check_sound(read_annotation(path, LABELS, SIZE))


corner = st.one_of(st.integers(-9, 300), st.floats(), st.text(max_size=4)).map(str)


@settings(max_examples=200, deadline=None)
@given(corners=st.lists(st.tuples(corner, corner, corner, corner), max_size=4))
def test_accepted_boxes_are_sound_and_stable(
    corners: list[tuple[str, str, str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "sound.xml"
    escaped = [tuple(text.replace("&", "").replace("<", "") for text in four) for four in corners]
    path.write_text(document(*(thing(bndbox(*four)) for four in escaped)), "utf-8", errors="replace")
    found = read_annotation(path, LABELS, SIZE)
    check_sound(found)
    record = Record("a", Path("a.jpg"), SIZE, *found[:4])
    write_annotation(path, record, NAMES)
    again = read_annotation(path, LABELS, SIZE)
    assert again.faults == ()
    assert np.allclose(again.boxes, found.boxes, rtol=0, atol=2**-20)


def check_sound(found: Annotation) -> None:
    boxes, (height, width) = found.boxes, SIZE
    assert len(boxes) == len(found.labels) == len(found.difficult) == len(found.truncated)
    assert (boxes.dtype, boxes.shape[1:]) == (np.float32, (4,))
    assert np.isfinite(boxes).all()
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= width).all()
    assert (boxes[:, 3] <= height).all()
    assert (boxes[:, 2:] - boxes[:, :2] > 0).all()
    assert set(found.labels.tolist()) <= set(LABELS.values())
    for fault in found.faults:
        assert fault.reason
        assert "\n" not in fault.reason


@pytest.mark.parametrize(
    ("said", "expected"), [("from 1", [9, 19, 30, 40]), ("from 0", [10, 20, 31, 41]), ("edges", [10, 20, 30, 40])]
)
@pytest.mark.parametrize("form", ["article", "short"])
def test_a_data_yaml_says_what_corners_are(make_voc: Any, tmp_path: Path, form: str, said: str, expected: Any) -> None:
    data = make_voc(
        tmp_path / "d", {f"{split}/a.png": [[9, 19, 30, 40]] for split in ("train", "valid")}
    )  # 10 20 30 40
    if form == "article":
        keys = {"TRAIN": "train", "VALID": "valid"}
        lines = [f"{k}_DIR_{w.upper()}: d/{f}/{w}" for k, f in keys.items() for w in ("images", "labels")]
        text = "\n".join([*lines, "CLASSES: [thing]"])
    else:
        text = f"path: {data}"
    (path := tmp_path / "data.yaml").write_text(f"{text}\nvoc_boxes: {said}\n")
    dataset = open_dataset(path)
    assert [dataset.read(split).records[0].boxes.tolist() for split in ("train", "val")] == [[expected]] * 2
    assert any(note.startswith("corners in VOC XML") for note in dataset.notes)


def test_what_corners_cannot_be(make_voc: Any, tmp_path: Path) -> None:
    make_voc(tmp_path / "d", {f"{split}/a.png": [[9, 19, 30, 40]] for split in ("train", "valid")})
    (path := tmp_path / "data.yaml").write_text("path: d\nvoc_boxes: from 2\n")
    with pytest.raises(UserError, match=r"data\.yaml:2: voc_boxes must be one of from 1, from 0, edges"):
        open_dataset(path)
