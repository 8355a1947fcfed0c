"""The catalogue of bad inputs, a row each: what is put into a good dataset, and what both commands answer.

What is right is one letter, ours another where it differs, and then `differs` says why:

    E  refused before anything is computed: `train` ends with 2, `data check` with 1 (the data) or 2 (no dataset)
    S  left out, listed; training begins      F  mended when read, listed      A  used as it is, noted where odd

`says` is found in what `train` prints (E), or in a finding of `data check`, `path:line: reason [level kind]`; "" where
nothing is to be said. `used` is how many pictures more than the four good ones are trained on.
"""

from __future__ import annotations

import gzip
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from tests.catalogue.files import (
    BOX,
    HEIGHT,
    OBJECT,
    WIDTH,
    YAML,
    Dataset,
    annotation,
    box,
    encoded,
    jpeg,
    jpeg_claiming,
    picture_of,
    png_16_bit,
    png_bomb,
    png_header,
    size,
    thing,
    with_orientation,
    with_text_chunk,
)

Answer = Literal["E", "S", "F", "A"]
Make = Callable[[Dataset], Any]


@dataclass(frozen=True)
class Row:
    number: int
    what: str
    right: Answer  # as the catalogue has it
    make: Make
    says: str
    ours: Answer | None = None  # where it is another
    differs: str = ""  # why
    used: int | None = None  # pictures; by the answer where None
    check: tuple[str, ...] = ()  # options of `data check`
    train: tuple[str, ...] = ()  # and of `train`
    seconds: float = 2.0  # of the processor
    data: str = "data.yaml"  # what is opened, below the dataset's folder
    trained_on: Callable[[list[Any]], bool] = field(default=lambda _: True)  # of the bad picture's boxes, if it is used

    @property
    def name(self) -> str:
        return f"{self.number:03}-{self.what.replace(' ', '-')}"

    @property
    def answer(self) -> Answer:
        return self.ours or self.right


def image(data: bytes | Image.Image, name: str = "bad.jpg", xml: str | None = None, **options: Any) -> Make:
    return lambda dataset: dataset.image(data, name, xml, **options)


def xml(*inside: str) -> Make:
    return lambda dataset: dataset.xml(annotation(*inside))


def raw(text: str | bytes) -> Make:
    return lambda dataset: dataset.xml(text)


def yaml(text: str | bytes) -> Make:
    return lambda dataset: dataset.yaml(text)


GOOD = picture_of(99)
JPEG = jpeg(GOOD)
GREY, ALPHA = GOOD.convert("L"), GOOD.convert("RGBA")
FRAMES = {"save_all": True, "append_images": [picture_of(98)]}
IMAGES = (
    Row(1, "jpeg cut at half", "S", image(JPEG[: len(JPEG) // 2]), r"bad\.jpg: is cut short"),
    Row(
        2,
        "jpeg without its last two bytes",
        "A",
        image(JPEG[:-2]),
        r"bad\.jpg: is cut short",
        "S",
        "without decoding it cannot be told from one that is cut: it costs one picture, by name",
    ),
    Row(3, "jpeg of 100 bytes", "S", image(JPEG[:100]), r"bad\.jpg: is cut short"),
    Row(4, "no bytes", "S", image(b""), r"bad\.jpg: is empty"),
    Row(5, "html called jpg", "S", image(b"<!doctype html><html>404</html>"), r"bad\.jpg: looks like HTML"),
    Row(
        6,
        "jpeg damaged in its middle",
        "A",
        image(JPEG[:900] + bytes(60) + JPEG[960:]),
        "",
        differs="there is no list of sums to hold it against (--verify)",
    ),
    Row(7, "png called jpg", "A", image(encoded(GOOD, "PNG")), r"bad\.jpg: is a PNG, though it is called \.jpg"),
    Row(8, "cmyk jpeg", "F", image(jpeg(GOOD.convert("CMYK"))), "CMYK JPEG: read as RGB", "A", "noted, as any kind is"),
    Row(9, "grey jpeg", "F", image(jpeg(GREY)), "grey JPEG: read as RGB", "A", "noted, as any kind is"),
    Row(10, "grey png of 16 bits", "F", image(png_16_bit(False), "bad.png"), "16 bits a channel", "A", "noted"),
    Row(11, "colour png of 16 bits", "F", image(png_16_bit(True), "bad.png"), "16 bits a channel", "A", "noted"),
    Row(
        12,
        "palette and transparency",
        "F",
        lambda d: d.image(GOOD.convert("P"), "bad.png", transparency=3),
        "has a palette",
        "A",
        "noted",
    ),
    Row(13, "rgba", "F", image(ALPHA, "bad.png"), "alpha channel: left away", "A", "noted"),
    Row(13, "grey and alpha", "F", image(GREY.convert("LA"), "bad.png"), "alpha channel: left away", "A", "noted"),
    Row(14, "one bit", "F", image(GOOD.convert("1"), "bad.png"), "grey PNG of 1 bit", "A", "noted"),
    Row(
        15,
        "tiff of floats",
        "S",
        image(GREY.convert("F"), "bad.tif"),
        "bad.tif: .*(read here|bits)",
        "S",
        "its header is whole, so that it is found when decoded: by check --decode, and by training then",
        used=1,
        check=("--decode",),
    ),
    Row(16, "tiff of two pages", "A", image(GOOD, "bad.tif", **FRAMES), "several pages: the first is read"),
    Row(
        17,
        "animated gif",
        "A",
        lambda d: d.image(GOOD, "bad.gif", **FRAMES),
        "there is no picture of this name",
        "S",
        "GIF has 256 colours and no extension that is looked for in a folder of photographs",
    ),
    Row(17, "animated gif called jpg", "A", image(encoded(GOOD, "GIF", **FRAMES)), "animation of 2 frames: the first"),
    Row(18, "animated webp", "A", image(encoded(GOOD, "WebP", **FRAMES), "bad.webp"), "animation: the first frame"),
    Row(19, "avif", "S", image(b"\0\0\0\x20ftypavif" + bytes(99), "bad.jpg"), "AVIF, HEIC or a video; save it as"),
    Row(19, "heic", "S", image(b"\0\0\0\x20ftypheic" + bytes(99), "bad.jpg"), "AVIF, HEIC or a video; save it as"),
    Row(
        20,
        "exif rotation after labelling",
        "E",
        image(jpeg(GOOD, exif=with_orientation(6)), xml=annotation(size(WIDTH, HEIGHT), OBJECT)),
        r"bad\.xml:2: .*(swapped|EXIF)",
    ),
    Row(20, "exif rotation", "A", image(jpeg(GOOD, exif=with_orientation(6))), "turned by its EXIF orientation 6"),
    Row(21, "exif orientation 99", "A", image(jpeg(GOOD, exif=with_orientation(99))), ""),
    Row(21, "broken exif", "A", image(jpeg(GOOD, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")), ""),
    Row(
        22,
        "png bomb",
        "S",
        lambda d: d.image(png_bomb(20_000, 20_000), "bad.png"),
        "claims 20000x20000 pixels",
        seconds=0.5,
    ),
    Row(23, "png header of 60000", "S", image(png_header(60_000, 60_000), "bad.png"), "claims 60000x60000 pixels"),
    Row(24, "jpeg header of 65000", "S", image(jpeg_claiming(65_000, 65_000)), "claims 65000x65000 pixels"),
    Row(25, "one pixel", "S", image(picture_of(1, 1, 1), "bad.png"), "is 1x1 pixels: too small"),
    Row(26, "3000 x 1", "S", image(picture_of(1, 3000, 1), "bad.png"), "is 3000x1 pixels: too small"),
    Row(27, "width 0", "S", image(png_header(0, 40), "bad.png"), "has no pixels: 0x40"),
    Row(28, "path that is not ascii", "A", image(GOOD, "größe 人 é.jpg"), ""),
    Row(29, "name with signs", "A", image(GOOD, "a %03d [1] * ? $HOME #.jpg"), ""),
    Row(30, "symlink to itself", "S", lambda d: loop(d.image(b"")), r"bad\.jpg: cannot be read: Too many levels"),
    Row(31, "symlink out of the folder", "A", lambda d: outward(d, d.image(JPEG)), ""),
    Row(33, "folder called jpg", "S", lambda d: replaced(d.image(b""), Path.mkdir), r"bad\.jpg: is a folder"),
    Row(34, "fifo", "S", lambda d: replaced(d.image(b""), os.mkfifo), r"bad\.jpg: is not a regular file"),
    Row(34, "socket", "S", lambda d: replaced(d.image(b""), listen), r"bad\.jpg: is not a regular file"),
    Row(37, "extension JPEG", "A", image(GOOD, "bad.JPEG"), ""),
    Row(37, "extension PNG", "A", image(GOOD, "bad.PNG"), ""),
    Row(37, "extension bmp", "A", image(GOOD, "bad.bmp"), ""),
    Row(
        38, "three gigabytes", "S", lambda d: os.truncate(d.image(JPEG), 3 << 30), r"bad\.jpg: is larger than 1024 MiB"
    ),
    Row(39, "bad icc profile", "A", image(with_text_chunk(), "bad.png"), ""),
    Row(39, "bytes after the end", "A", image(JPEG + b"trailing \xff\xd8 junk" * 50), ""),
)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def outward(dataset: Dataset, path: Path) -> None:
    outside = dataset.root.parent / "elsewhere.jpg"
    shutil.move(path, outside)
    path.symlink_to(outside)


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket has 108 bytes at most
        try:
            end.bind(path.name)
        finally:
            os.chdir(here)


def declared(encoding: str, text: str = annotation("<pose>左é</pose>", OBJECT), real: str | None = None) -> bytes:
    return f'<?xml version="1.0" encoding="{encoding}"?>{text}'.encode(real or encoding, "replace")


LAUGHS = "<!DOCTYPE a [" + "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12)) + "]>"
QUADRATIC = f'<!DOCTYPE a [<!ENTITY x "{"x" * 50_000}">]><annotation>{"&x;" * 50_000}</annotation>'
AT_0 = "".join(
    thing(box(*corners)) for corners in ((0, 3, 20, 20), (7, 0, 30, 31), (0, 9, 40, 30), (9, 0, 63, 40), (0, 0, 10, 9))
)
ANNOTATIONS = (
    Row(40, "malformed", "E", raw("<annotation>\n<object>\n</annotation>"), r"bad\.xml:3: .*mismatched tag, column 3"),
    Row(40, "cut short", "E", raw(annotation(OBJECT)[:-9]), r"bad\.xml:3: is not well-formed XML: .*, column"),
    Row(40, "empty", "E", raw(""), r"bad\.xml: is empty"),
    Row(40, "malformed and skipped", "S", raw("<annotation>"), r"bad\.xml:1: .* \[lost", check=("--skip-bad",),
        train=("--skip-bad",)),
    Row(41, "byte order mark", "A", raw(b"\xef\xbb\xbf" + annotation(OBJECT).encode()), ""),
    Row(42, "utf-16", "A", raw(declared("utf-16")), ""),
    Row(43, "latin-1 declared", "A", raw(declared("latin-1")), ""),
    Row(43, "latin-1 not declared", "E", raw(annotation(OBJECT, "<!--é-->").encode("latin-1")),
        r"bad\.xml:3: .*save it as UTF-8"),
    Row(44, "gbk", "F", raw(declared("gbk")), "", "A", "what is said is read: nothing to report"),
    Row(44, "shift-jis", "F", raw(declared("shift_jis")), "", "A", "what is said is read: nothing to report"),
    Row(45, "blank line before xml", "F", raw('\n<?xml version="1.0"?>' + annotation(OBJECT)), r"bad\.xml.*blank line"),
    Row(45, "NUL at the end", "F", raw(annotation(OBJECT) + "\0\0"), "", "A",
        "not counted: nothing can be meant by it"),
    Row(46, "no size", "F", xml(OBJECT), r"bad\.xml: <size> is missing: the picture's own", "A", "noted"),
    Row(47, "other size", "E", xml(size(640, 480), OBJECT), r"bad\.xml:2: .*10 times its scale"),
    Row(47, "other picture", "E", xml(size(500, 20), OBJECT), r"bad\.xml:2: .*labelled on another picture"),
    Row(48, "size 0", "F", xml(size(0, 0), OBJECT), r"bad\.xml: <size> is", "A", "noted, as one that is missing"),
    Row(49, "swapped size", "E", xml(size(HEIGHT, WIDTH), OBJECT), r"bad\.xml:2: .*swapped"),
    Row(50, "swapped corners", "E", xml(thing(box(30, 5, 10, 20))), r"bad\.xml:2: xmin 30 is greater than xmax 10"),
    Row(51, "no area", "S", xml(OBJECT, thing(box(7, 5, 7, 20))), r"bad\.xml:3: has no area", used=1),
    Row(51, "side of a pixel", "S", xml(OBJECT, thing(box(64, 5, 64.5, 20))), r"bad\.xml:3: .*no area", used=1),
    Row(52, "a pixel outside", "F", xml(thing(box(0, 5, 30, 20))), r"bad\.xml:2: .*leaves the 64x48 picture"),
    Row(53, "mostly outside", "F", xml(thing(box(50, 20, 500, 300))), r"bad\.xml:2: .*leaves the 64x48 picture"),
    Row(53, "fully outside", "S", xml(OBJECT, thing(box(80, 5, 90, 20))), r"bad\.xml:3: .*no area inside", used=1),
    Row(54, "float coordinates", "A", xml(thing(box(5.25, 6.5, 30.75, 40.125))), "",
        trained_on=lambda boxes: boxes == [[4.25, 5.5, 30.75, 40.125]]),
    Row(55, "counted from 0", "A", xml(AT_0), r"bad\.xml: .*begin at 0 .*VOC counts from 1.*\[suspect counts-from-0",
        differs="told by evidence; there is no option to count from 0"),
    *(Row(56, f"coordinate {value!a}", "E", xml(thing(box(value, 1, 30, 20))), r"bad\.xml:2: xmin is .*no number")
      for value in ("nan", "inf", "1e400", "12,5", "١٢", "1_0", "", "0x10")),
    Row(57, "a little negative", "F", xml(thing(box(-1, 5, 30, 20))), r"bad\.xml:2: .*leaves the"),
    Row(57, "far negative", "S", xml(OBJECT, thing(box(-50, 5, -9, 20))), r"bad\.xml:3: .*no area inside", used=1),
    Row(58, "no name", "E", xml(f"<object>{BOX}</object>"), r"bad\.xml:2: <object> has no <name>"),
    Row(58, "empty name", "E", xml(thing(name=" ")), r"bad\.xml:2: <object> has no <name>"),
    Row(59, "unknown class", "E", xml(thing(name="dgo")), r"bad\.xml:2: .*'dgo'( \(1 objects\), perhaps 'dog')?"),
    Row(59, "unknown class ignored", "S", xml(OBJECT, thing(name="dgo")), r"bad\.xml:3: class 'dgo'", used=1,
        check=("--ignore-unknown",), train=("--ignore-unknown",)),
    Row(60, "class with space", "F", xml(thing(name="\u00a0cat \n")), r"bad\.xml:2: <name> .*has space around it"),
    Row(61, "class in another case", "E", xml(thing(name="Cat")),
        r"bad\.xml:2: .*'Cat'( \(1 objects\), perhaps 'cat')?"),
    Row(62, "decomposed class", "F", lambda d: (d.yaml(YAML.replace("dog", "dog, blå")), d.xml(annotation(
        thing(name="bla\u030a")))), r"bad\.xml:2: .*decomposed Unicode"),
    Row(63, "difficult", "A", xml(thing(f"<difficult>1</difficult>{BOX}")), ""),
    Row(64, "difficult unspecified", "E", xml(thing(f"<difficult>Unspecified</difficult>{BOX}")),
        r"bad\.xml:2: difficult is 'Unspecified': taken as 0"),
    Row(65, "odd marks", "A", xml(thing(f"<truncated/><pose>?</pose><occluded>yes</occluded>{BOX}")), ""),
    Row(66, "parts", "A", xml(f"<object><part><name>head</name>{box(1, 1, 9, 9)}</part><name>cat</name>{BOX}</object>"),
        "", trained_on=lambda boxes: boxes == [[4, 5, 30, 40]]),
    Row(67, "no box", "E", xml(thing("<polygon/>")), r"bad\.xml:2: <object> has no <bndbox>"),
    Row(68, "two boxes", "E", xml(thing(BOX + box(1, 1, 9, 9))), r"bad\.xml:2: has 2 <bndbox>"),
    Row(68, "other order of fields", "A", xml(f"<object>{BOX}<name>cat</name></object>"), ""),
    Row(69, "object twice", "F", xml(OBJECT, OBJECT), r"bad\.xml:3: is in the file twice", "S",
        "the second is left out",
        used=1, trained_on=lambda boxes: len(boxes) == 1),
    Row(70, "billion laughs", "E", raw(LAUGHS + "<annotation>&a11;</annotation>"), r"bad\.xml:1: has a DOCTYPE"),
    Row(70, "quadratic blowup", "E", raw(QUADRATIC), r"bad\.xml:1: has a DOCTYPE"),
    Row(71, "external entity", "E", raw('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;'),
        r"bad\.xml:1: has a DOCTYPE"),
    Row(71, "parameter entity", "E", raw('<!DOCTYPE a [<!ENTITY % x SYSTEM "http://127.0.0.1/">%x;]><annotation/>'),
        r"bad\.xml:1: has a DOCTYPE"),
    Row(72, "deep nesting", "E", raw("<annotation>" + "<a>" * 5000), r"bad\.xml:1: elements are nested deeper than 64"),
    Row(73, "200 MB", "E", lambda d: os.truncate(d.xml("<annotation>"), 200 << 20), r"bad\.xml: is larger than 10 MB"),
    Row(73, "a million objects", "E", raw("<annotation>" + "<object/>" * 1_000_000), r"more than 10000 objects"),
    Row(74, "other filename", "A", xml("<filename>other.jpg</filename>", OBJECT),
        "<filename> is 'other.jpg', not 'bad"),
    Row(75, "filename leads out", "A", xml("<filename>../../etc/passwd</filename>", OBJECT), "passwd': not used"),
    Row(75, "absolute filename", "A", xml("<filename>/etc/passwd</filename>", OBJECT), "'/etc/passwd': not used"),
    Row(76, "no object", "A", raw("<annotation/>"), "", trained_on=lambda boxes: boxes == []),
    Row(77, "all difficult", "A", xml(thing(f"<difficult>1</difficult>{BOX}")), ""),
    Row(78, "Object", "E", xml("<Object/>"), r"bad\.xml:2: <Object> must be written <object>"),
    Row(78, "Bndbox", "E", xml("<object>", "<Bndbox/></object>"), r"bad\.xml:3: <Bndbox> must be written <bndbox>"),
    Row(79, "comments and cdata", "A", xml(f"<?x?><!-- --><object><name><![CDATA[cat]]></name>{BOX}</object>"), ""),
    Row(79, "namespace", "A", raw(annotation(OBJECT).replace("<annotation>", "<annotation xmlns='http://x.org'>")), ""),
    Row(80, "5000 objects", "A", xml(*(thing(box(1 + n % 50, 1 + n // 50 % 40, 4 + n % 50 + n // 2000, 48))
        for n in range(5000))), "", seconds=6, trained_on=lambda boxes: len(boxes) == 5000),
)  # fmt: skip


def without_pictures(dataset: Dataset) -> None:
    for path in dataset.images.iterdir():
        path.rename(path.with_suffix(".heic"))


def instead_of_images(dataset: Dataset) -> None:
    shutil.rmtree(dataset.root / "train")
    (dataset.root / "train").write_text("")


def empty_annotations(dataset: Dataset) -> None:
    for path in dataset.labels.iterdir():
        path.write_text(annotation())


def devkit(dataset: Dataset, **lists: str) -> None:
    """The same pictures as a year of VOC, with ImageSets."""
    year = dataset.root / "VOC2007"
    for old, new in (("images", "JPEGImages"), ("labels", "Annotations")):
        shutil.copytree(dataset.root / "train" / old, year / new)
        for path in (dataset.root / "valid" / old).iterdir():
            shutil.copy(path, year / new)
    (year / "ImageSets" / "Main").mkdir(parents=True)
    for name, text in lists.items():
        (year / "ImageSets" / "Main" / f"{name}.txt").write_bytes(text.encode())


TRAIN, VAL = "train0\ntrain1\ntrain2\ntrain3\n", "valid0\nvalid1\n"


def junk(dataset: Dataset) -> None:
    for name in (".hidden.jpg", "._train0.jpg", "Thumbs.db", ".DS_Store"):
        (dataset.images / name).write_bytes(b"junk")


def foreign_cache(dataset: Dataset) -> None:
    payload = b"cos\nsystem\n(S'touch boxwright-was-here'\ntR."  # a pickle
    for place in (dataset.root / "train" / "labels.cache", dataset.labels / "x.npy", dataset.images / "x.pkl"):
        place.write_bytes(payload)
    (dataset.root / "train.cache").write_bytes(gzip.compress(payload))


DATASETS = (
    Row(81, "no pictures", "E", without_pictures, r"no pictures in .*images: looked for \.jpg .*found 4 \.heic"),
    Row(82, "folder missing", "E", yaml(YAML.replace("train: train", "train: trian")),
        r"data\.yaml:1: .*nothing at .*Did you mean 'train'"),
    Row(82, "folder is a file", "E", instead_of_images, r"data\.yaml:1: train: .*in no folder with JPEGImages"),
    Row(82, "nothing there", "E", lambda d: shutil.rmtree(d.root / "train"), r"data\.yaml:1: train: nothing at"),
    Row(83, "picture without annotation", "S", lambda d: d.xml("").unlink(),
        r"bad\.jpg: there is no annotation of this name"),
    Row(83, "many without annotation", "E", lambda d: [d.image(JPEG, f"bad{n}.jpg").parent.parent.joinpath(
        "labels", f"bad{n}.xml").unlink() for n in range(6)], r"6 of the 10 pictures of 'train' cannot be used"),
    Row(84, "annotation without picture", "S", lambda d: d.image(JPEG).unlink(),
        r"bad\.xml: there is no picture of this name"),
    Row(85, "two pictures for one annotation", "E", lambda d: (d.image(JPEG), d.image(encoded(GOOD, "PNG"), "bad.png")),
        r"one annotation cannot serve two pictures: bad\.jpg and bad\.png"),
    Row(87, "val shares files", "E", lambda d: devkit(d, train=TRAIN, val="train3\nvalid0\n"),
        r"train and val share 1 pictures: train3\.jpg|train3\.jpg: is in train and in val", data="VOC2007"),
    Row(87, "val has an equal picture", "A", lambda d: shutil.copy(d.root / "valid/images/valid0.jpg", d.image(b"")),
        r"is the same file as .*\[suspect leak"),
    Row(88, "val is train", "E", yaml(YAML.replace("val: valid", "val: train")), r"train and val are the same"),
    Row(89, "nothing to learn", "E", empty_annotations, r"0 objects to train on in 4 pictures"),
    Row(90, "class without objects", "A", yaml(YAML.replace("dog]", "dog, horse]")),
        r"class 'horse' has no object in train: it cannot be learnt", used=0),
    Row(90, "class without objects in val", "A", yaml(YAML.replace("dog]", "dog, horse]")),
        r"class 'horse' has no object in val: its AP is n/a", used=0),
    Row(91, "split file in every dialect", "A", lambda d: devkit(
        d, train="train0  1\r\n\r\ntrain1.jpg\r\nJPEGImages/train2.JPG -1\r\ntrain3 0\r\n", val=VAL), "",
        data="VOC2007", used=0),
    Row(91, "split file of one line", "A", lambda d: devkit(d, train="train0 1", val=VAL), "", data="VOC2007", used=-3),
    Row(92, "split file lists what is not there", "E", lambda d: devkit(d, train=TRAIN + "none\n", val=VAL),
        r"train\.txt lists 1 pictures that are not in .*: none", data="VOC2007"),
    Row(93, "id twice", "F", lambda d: devkit(d, train=TRAIN + "train1\n", val=VAL),
        r"train\.txt:5: train1 is listed twice",
        data="VOC2007", used=0),
    Row(96, "cache of another tool", "A", foreign_cache, "", used=0),
    Row(98, "two layouts in one folder", "A", lambda d: devkit(d, train=TRAIN, val=VAL), "", data=".", used=0,
        differs="the VOC year is taken; which one is not said"),
    Row(99, "batch larger than the set", "E", lambda d: None, "", "A",
        "a batch of fewer is trained; the schedule counts steps",
        train=("--batch", "16"), used=0),
    Row(100, "hidden files", "A", junk, "", used=0, differs="ignored, not counted"),
)  # fmt: skip

ARTICLE = """\
TRAIN_DIR_IMAGES: train/images
TRAIN_DIR_LABELS: train/labels
VALID_DIR_IMAGES: valid/images
VALID_DIR_LABELS: valid/labels
CLASSES: [__background__, cat, dog]
NC: 3
SAVE_VALID_PREDICTION_IMAGES: True
"""


def article(old: str, new: str) -> Make:
    assert old in ARTICLE
    return yaml(ARTICLE.replace(old, new))


BOMB = "a0: &a0 x\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30))
NAMES = ", ".join(f"class_{n}" for n in range(1200))
YAMLS = (
    Row(101, "keys missing", "E", yaml("TRAIN_DIR_IMAGES: train/images\nNC: 3\n"),
        r"data\.yaml: TRAIN_DIR_LABELS, VALID_DIR_IMAGES, VALID_DIR_LABELS, CLASSES missing"),
    Row(102, "NC in quotes", "E", article("NC: 3", 'NC: "20"'), r"data\.yaml:6: NC must be a whole number"),
    Row(102, "CLASSES a word", "E", article("[__background__, cat, dog]", "cat"),
        r"data\.yaml:5: CLASSES must be a list"),
    Row(103, "misspelt key", "E", article("CLASSES", "CLASES"),
        r"data\.yaml:5: unknown key 'CLASES'\. Did you mean 'CLASSES'"),
    Row(104, "key twice", "E", yaml(ARTICLE + "NC: 4\n"), r"data\.yaml:8: NC is there twice, first on line 6"),
    Row(105, "class twice", "E", article("dog", "cat"), r"data\.yaml:5: CLASSES: 'cat' is there twice"),
    Row(106, "NC is not the number of classes", "E", article("NC: 3", "NC: 7"),
        r"data\.yaml:6: NC is 7, but CLASSES has 2"),
    *(Row(107, f"class {word}", "E", article("cat", word), rf"data\.yaml:5: .*YAML reads {word} as .*: quote it")
      for word in ("no", "off", "012", "3:30", "null")),
    Row(108, "number that is text", "F", lambda d: None, "", "A",
        "a data YAML holds no numbers but counts; --lr is parsed",
        train=("--lr", "1e-3"), used=0),
    Row(109, "python tag", "E", article("CLASSES: ", "CLASSES: !!python/object/apply:os.system "),
        r"data\.yaml:5: CLASSES must"),
    Row(109, "python tag of a word", "E", article("cat", "!!python/name:os.system cat"), r"data\.yaml:5: .*text"),
    Row(110, "alias bomb", "E", yaml(BOMB), r"data\.yaml:1: unknown key 'a0'"),
    Row(110, "50 MB", "E", yaml(b"a: " + b"b" * 50_000_000), r"data\.yaml is larger than 1 MB"),
    Row(110, "a thousand deep", "E", yaml("a: " + "[" * 1000 + "]" * 1000), r"data\.yaml is nested too deep"),
    Row(110, "too many nodes", "E", yaml("a: [" + "[]," * 300_000 + "]"), r"data\.yaml:1:.*more than 50000", seconds=8),
    Row(111, "relative path", "E", article("train/images", "here/images"),
        r"data\.yaml:1: TRAIN_DIR_IMAGES: nothing at /"),
    Row(112, "variable", "E", article("train/images", "$DATA/images"), r"data\.yaml:1: .*Variables are not expanded"),
    Row(112, "home", "A", article("TRAIN_DIR_IMAGES: train", "TRAIN_DIR_IMAGES: ~/train"), "", used=0),
    Row(113, "list", "E", yaml("- a\n- b\n"), r"data\.yaml is no data YAML"),
    Row(113, "empty", "E", yaml(""), r"data\.yaml is no data YAML"),
    Row(113, "binary", "E", yaml(bytes(range(128, 256))), r"data\.yaml is no UTF-8 text"),
    Row(113, "tab", "E", yaml("train: train\n\tval: valid\n"), r"data\.yaml:2:1: is no YAML"),
    Row(114, "background not first", "E", article("__background__, cat", "cat, __background__"),
        r"data\.yaml:5: .*must come first"),
    Row(114, "without background", "A", article("__background__, ", ""), "", used=0),
    Row(115, "trailing spaces", "F", article("train/images", "train/images   "), "", "A", "YAML itself strips them",
        used=0),
    Row(115, "trailing spaces in quotes", "F", article("train/images", "'train/images  '"), "", "A",
        "stripped, not counted",
        used=0),
    Row(115, "backslashes", "E", article("train/images", "train\\images"), r"data\.yaml:1: .*Write / between folders"),
    Row(116, "1200 classes", "A", yaml(YAML.replace("dog", f"dog, {NAMES}")), "", used=0),
    Row(116, "one class", "A", lambda d: (d.yaml(YAML.replace("cat, dog", "cat")), [path.write_text(annotation(OBJECT))
        for path in d.root.rglob("*.xml")]), "", used=0),
    Row(116, "no classes", "E", article("[__background__, cat, dog]", "[]"), r"data\.yaml:5: CLASSES names no class"),
)  # fmt: skip

ROWS = (*IMAGES, *ANNOTATIONS, *DATASETS, *YAMLS)
