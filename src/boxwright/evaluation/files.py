"""Ground truth and detections in files → records and detections to be judged, without a model and without PyTorch.

Ground truth: any dataset that Boxwright reads; a COCO json whose pictures are elsewhere; a folder of `PICTURE.txt` with
lines of `class x1 y1 x2 y2 [difficult]`. Detections: COCO's list of results; detections.json as `evaluate` writes it;
predictions.json as `predict` writes it; a folder of `PICTURE.txt` with lines of `class score x1 y1 x2 y2`.

Numbers from files stay float64 here, as other tools take them: rounded to float32, scores that differ would be equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from boxwright.data.formats.base import RefusedError, number, quoted, read_text, shown_value, stated_size
from boxwright.data.formats.json_file import has_keys, read_json
from boxwright.registry import nearest
from boxwright.types import Detections, Record, UserError

if TYPE_CHECKING:
    from boxwright.data.dataset import Dataset

Float64 = NDArray[np.float64]
Boxes = Literal["edges", "pixels", "sizes"]  # how text files write a box
Part = Literal["train", "val", "test", "all"]

LIMIT = 4_000_000_000  # bytes of a file
LARGEST = 1e7  # pixels: of a box's numbers
UNKNOWN = (0, 0)  # the size of a picture that nobody told


@dataclass(frozen=True, eq=False)
class Truth:
    """What is to be found: records, and what it takes to know their pictures and classes in another file."""

    path: Path
    records: tuple[Record, ...]
    classes: tuple[str, ...]
    open: bool = False  # whether detections may bring further classes: text files list none
    areas: tuple[Float64, ...] | None = None  # of each record's objects, where the file tells them
    pictures: Mapping[Any, int] = field(default_factory=dict[Any, int])  # index of a record by COCO's image id
    categories: Mapping[Any, int] = field(default_factory=dict[Any, int])  # label by COCO's category id
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Found:
    """Detections, those of the truth's records in their order."""

    detections: tuple[Detections, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read_truth(path: Path, *, split: Part = "val", boxes: Boxes = "edges", skip_bad: bool = False) -> Truth:
    """The ground truth at `path`. `boxes` is for text files only: see `_corners`; `skip_bad` for datasets.

    Raises `UserError` for a file that is missing, is none of the kinds, or has anything wrong in it.
    """
    if path.is_dir() and _texts(path):
        return _text_truth(path, boxes)
    if path.suffix.lower() == ".json" and path.is_file() and has_keys(path, "annotations", "images", "categories"):
        return _coco_truth(path)
    _refuse_a_folder_around(path, "--truth", "annotations")
    from boxwright.data.dataset import open_dataset

    dataset = open_dataset(path)
    return Truth(path, records_of(dataset, split, skip_bad=skip_bad), tuple(dataset.classes), notes=dataset.notes)


def records_of(
    dataset: Dataset, split: Part, *, skip_bad: bool = False, ignore_unknown: bool = False
) -> tuple[Record, ...]:
    """The records of a split, or of all: each picture once, in the order of their ids. The rest is `Dataset.read`'s."""
    names = dataset.splits if split == "all" else (split,)
    parts = [dataset.read(name, skip_bad=skip_bad, ignore_unknown=ignore_unknown) for name in names]
    if split != "all":
        return parts[0].records
    every = {record.id: record for part in parts for record in part.records}
    return tuple(every[name] for name in sorted(every))


def read_detections(path: Path, truth: Truth, *, boxes: Boxes = "edges") -> Found:
    """The detections at `path` for the pictures of `truth`; a picture that is not named has none.

    Raises `UserError` for a file that is missing, is none of the kinds, names a picture or class that `truth` does not
    have, or holds anything but finite boxes with scores from 0 to 1.
    """
    if path.is_dir():
        return _text_detections(path, truth, boxes)
    content = _json(path)
    if isinstance(content, dict) and isinstance(content.get("results"), list):
        return _predictions(path, content, truth)
    if isinstance(content, dict) and isinstance(content.get("detections"), list) and "images" in content:
        return _own(path, content, truth)
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        content = content["annotations"]  # some tools write a whole COCO json, with a score in each annotation
    if not isinstance(content, list):
        raise UserError(
            f"{path}: holds no detections. Wanted: COCO's list of results, detections.json of evaluate, "
            "predictions.json of predict, or a folder of text files"
        )
    return _results(path, content, truth)


# --- text files


def _texts(folder: Path) -> list[Path]:
    """The text files of a folder that holds nothing but them (and hidden files)."""
    try:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    return inside if all(path.suffix == ".txt" and path.is_file() for path in inside) else []


def _refuse_a_folder_around(folder: Path, option: str, *keys: str) -> None:
    """Raises if the folder holds one json, with such keys, and nothing else: the json itself is to be named."""
    inside = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    alone = len(inside) == 1 and inside[0].suffix.lower() == ".json" and inside[0].is_file()
    if alone and (not keys or has_keys(inside[0], *keys)):
        raise UserError(f"{folder} is a folder with one json in it: name the json itself, {option} {inside[0]}")


def _text_truth(folder: Path, boxes: Boxes) -> Truth:
    rows = {path.stem: _lines(path, 5, "class x1 y1 x2 y2 [difficult]") for path in _texts(folder)}
    classes = tuple(sorted({words[0] for lines in rows.values() for words, _ in lines}))
    records: list[Record] = []
    for name, lines in rows.items():
        where = [f"{folder / name}.txt:{line}" for _, line in lines]
        for place, (words, _) in zip(where, lines, strict=True):
            if len(words) > 6 or (len(words) == 6 and words[5] not in ("difficult", "0", "1")):
                raise UserError(f"{place}: after the box may stand `difficult`, 0 or 1, not {quoted(words[5])}")
        difficult = np.array([words[5:] in (["difficult"], ["1"]) for words, _ in lines], np.bool_)
        labels = np.array([classes.index(words[0]) for words, _ in lines], np.int64)
        corners = _corners([words[1:5] for words, _ in lines], where, boxes)
        records.append(_record(name, UNKNOWN, corners, labels, difficult, np.zeros_like(difficult)))
    return Truth(folder, tuple(records), classes, open=True)


def _text_detections(folder: Path, truth: Truth, boxes: Boxes) -> Found:
    texts = _texts(folder)
    if not texts:
        _refuse_a_folder_around(folder, "--detections")
        raise UserError(f"{folder}: wanted is a folder of nothing but text files, one for each picture")
    index = _pictures(truth)
    _require_known([path.stem for path in texts], index, f"{folder} has files for", truth)
    of: dict[int, Path] = {}
    for path in texts:
        if (other := of.setdefault(index[path.stem], path)) is not path:
            raise UserError(f"{folder}: {other.name} and {path.name} are of the same picture")
    classes = _Classes(truth)
    found = [Detections() for _ in truth.records]
    for path in texts:
        lines = _lines(path, 6, "class score x1 y1 x2 y2", exactly=True)
        where = [f"{path}:{line}" for _, line in lines]
        labels: list[int] = []
        for (words, _), place in zip(lines, where, strict=True):
            labels.append(classes.label(words[0], place))
        scores = _scores([words[1] for words, _ in lines], where)
        found[index[path.stem]] = _detections(_corners([words[2:] for words, _ in lines], where, boxes), scores, labels)
    return Found(tuple(found), classes.names, classes.notes)


def _lines(path: Path, least: int, form: str, *, exactly: bool = False) -> list[tuple[list[str], int]]:
    """The words of each line that has any, and the line's number."""
    try:
        text = read_text(path, LIMIT, empty=True)
    except RefusedError as error:
        raise UserError(f"{path}: {error}") from None
    lines = [(line.split(), at) for at, line in enumerate(text.splitlines(), 1) if line.strip()]
    for words, at in lines:
        if len(words) < least or (exactly and len(words) > least):
            raise UserError(f"{path}:{at}: has {len(words)} words; a line is `{form}`")
    return lines


def _corners(rows: Sequence[Sequence[str]], where: Sequence[str], boxes: Boxes) -> Float64:
    """x1 y1 x2 y2 (N, 4) with continuous edges, of text.

    `edges` are such; `pixels` are the first and the last pixel, as in VOC's XML; `sizes` are left, top, width, height.
    """
    values = [[number(word) for word in row] for row in rows]
    corners = np.array(values, np.float64).reshape(-1, 4)
    if boxes == "pixels":
        corners = corners - np.array([1.0, 1, 0, 0])
    elif boxes == "sizes":
        corners[:, 2:] += corners[:, :2]
    hint = "" if boxes == "sizes" else " (--boxes sizes if these are left top width height)"
    return _checked(corners, lambda n: f"{where[n]}: ", lambda n: " ".join(rows[n]), turned=hint)


# --- COCO


def _coco_truth(path: Path) -> Truth:
    content = _json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: is no COCO json: wanted is an object with images, annotations and categories")
    images, annotations, categories = (
        _objects(path, content, key, needs)
        for key, needs in (("images", ["id"]), ("annotations", ["image_id", "category_id", "bbox"]),
                           ("categories", ["id", "name"]))
    )  # fmt: skip
    if not images or not categories:
        raise UserError(f"{path}: has no {'categories' if images else 'images'}")
    pictures = {_hashable(entry["id"]): at for at, entry in enumerate(images)}
    kinds = {_hashable(entry["id"]): label for label, entry in enumerate(categories)}
    for what, ids, entries in (("images", pictures, images), ("categories", kinds, categories)):
        if len({str(one) for one in ids}) < len(entries):  # 1 and "1" are one: other files tell no difference
            many = Counter(str(_hashable(entry["id"])) for entry in entries)
            twice = next(entry["id"] for entry in entries if many[str(_hashable(entry["id"]))] > 1)
            raise UserError(f"{path}: two of {what} have the id {shown_value(twice)}")
    mine: list[list[int]] = [[] for _ in images]
    for at, entry in enumerate(annotations):
        picture = pictures.get(_hashable(entry["image_id"]))
        if picture is None:
            raise UserError(f"{path}: annotation {at + 1} is of the image {shown_value(entry['image_id'])}, not listed")
        if _hashable(entry["category_id"]) not in kinds:
            raise UserError(
                f"{path}: annotation {at + 1} is of the category {shown_value(entry['category_id'])}, not listed"
            )
        mine[picture].append(at)
    corners = _from_sizes(path, annotations, "annotation")
    sizes = [stated_size(entry.get("height"), entry.get("width")) for entry in images]
    areas = _areas(path, annotations, corners, [sizes[pictures[_hashable(e["image_id"])]] for e in annotations])
    labels = np.array([kinds[_hashable(entry["category_id"])] for entry in annotations], np.int64)
    crowd, difficult = (_flags(path, annotations, key) for key in ("iscrowd", "difficult"))
    names = _picture_names(images)
    records = tuple(
        _record(
            names[at],
            sizes[at] or UNKNOWN,
            corners[mine[at]], labels[mine[at]], difficult[mine[at]], crowd[mine[at]],
            Path(str(entry.get("file_name", ""))),
        )
        for at, entry in enumerate(images)
    )  # fmt: skip
    classes = tuple(str(entry["name"]) for entry in categories)
    if len(set(classes)) < len(classes):
        raise UserError(f"{path}: two categories are called {Counter(classes).most_common(1)[0][0]!r}")
    return Truth(
        path, records, classes, areas=tuple(areas[which] for which in mine), pictures=pictures, categories=kinds
    )


def _areas(
    path: Path, annotations: Sequence[Mapping[str, Any]], corners: Float64, sizes: Sequence[tuple[int, int] | None]
) -> Float64:
    """Square pixels of each annotation (N,), the box's where none are stated; `sizes` are of their pictures.

    COCO judges an object only where its area is one, so a wrong one would take the object out of every figure.
    """
    sides = corners[:, 2:] - corners[:, :2]
    stated = [entry.get("area") for entry in annotations]
    areas = np.array([number(value) for value in stated], np.float64)
    without = np.array([value is None for value in stated], np.bool_)
    areas = np.where(without, sides.prod(axis=1), areas)
    # A box may reach beyond the picture, and some count the last pixel.
    most = np.array([(size[0] + 1.0) * (size[1] + 1.0) if size else LARGEST**2 for size in sizes], np.float64)
    most = np.maximum(most, (sides + 1).prod(axis=1))
    wrong = np.flatnonzero(~without & ~((areas >= 0) & (areas <= most)))
    if len(wrong):
        at = int(wrong[0])
        reason = "larger than the picture" if areas[at] > 0 else "not a number from 0 on"
        raise UserError(f"{path}: annotation {at + 1}: area is {shown_value(stated[at])}, {reason}")
    return areas


def _flags(path: Path, annotations: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.bool_]:
    values = [entry.get(key) for entry in annotations]
    for at, value in enumerate(values):
        if value is not None and not (isinstance(value, int) and value in (0, 1)):
            raise UserError(f"{path}: annotation {at + 1}: {key} is {shown_value(value)}, not 0, 1, true or false")
    return np.array([bool(value) for value in values], np.bool_)


def _picture_names(images: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whole numbers in a width that sorts them as numbers, as pycocotools does; else the ids as text."""
    ids = [entry["id"] for entry in images]
    if all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 10**15 for one in ids):
        return [f"{one:0{len(str(max(ids)))}d}" for one in ids]
    return [str(one) for one in ids]


def _results(path: Path, content: list[Any], truth: Truth) -> Found:
    entries = _objects(path, {"it": content}, "it", ["image_id", "category_id", "bbox", "score"])
    pictures = _pictures(truth)
    images = [_hashable(entry["image_id"]) for entry in entries]
    _require_known(images, pictures, f"{path} has results for", truth)
    categories = truth.categories or {name: label for label, name in enumerate(truth.classes)}
    labels: list[int] = []
    for at, entry in enumerate(entries):
        label = categories.get(_hashable(entry["category_id"]))
        if label is None:
            hint = "" if truth.categories else ". Numbers of categories stand in the COCO json: give that as --truth"
            raise UserError(f"{path}: result {at + 1}: no category {shown_value(entry['category_id'])}{hint}")
        labels.append(label)
    scores = _scores([entry["score"] for entry in entries], _Places(path, "result"))
    corners = _from_sizes(path, entries, "result")
    return Found(_grouped([pictures[image] for image in images], corners, scores, labels, truth), truth.classes)


def _from_sizes(path: Path, entries: Sequence[Mapping[str, Any]], what: str) -> Float64:
    """x1 y1 x2 y2 (N, 4) of COCO's x, y, width, height."""
    sizes = _fours([entry["bbox"] for entry in entries], _Places(path, what))
    corners = np.concatenate([sizes[:, :2], sizes[:, :2] + sizes[:, 2:]], axis=1)
    return _checked(corners, lambda n: f"{path}: {what} {n + 1}: ", lambda n: shown_value(entries[n]["bbox"]))


# --- our own


def _own(path: Path, content: Mapping[str, Any], truth: Truth) -> Found:
    images = _objects(path, content, "images", ["id"])
    entries = _objects(path, content, "detections", ["image", "class", "score", "box"])
    names = _names(path, content)
    index = _pictures(truth)
    ids = [_hashable(entry["id"]) for entry in images]
    _require_known(ids, index, f"{path} has detections for", truth)
    for at, entry in enumerate(entries):
        for key, length in (("image", len(images)), ("class", len(names))):
            if not isinstance(entry[key], int) or isinstance(entry[key], bool) or not 0 <= entry[key] < length:
                raise UserError(
                    f"{path}: detection {at + 1}: {key} is {shown_value(entry[key])}, not an index below {length}"
                )
    classes = _Classes(truth)
    many = Counter(entry["class"] for entry in entries)
    known = {label: classes.label(names[label], str(path), count) for label, count in sorted(many.items())}
    places = _Places(path, "detection")
    corners = _fours([entry["box"] for entry in entries], places)
    corners = _checked(corners, lambda n: f"{places[n]}: ", lambda n: shown_value(entries[n]["box"]))
    scores = _scores([entry["score"] for entry in entries], places)
    pictures = [index[ids[entry["image"]]] for entry in entries]
    labels = [known[entry["class"]] for entry in entries]
    return Found(_grouped(pictures, corners, scores, labels, truth), classes.names, classes.notes)


def _predictions(path: Path, content: Mapping[str, Any], truth: Truth) -> Found:
    results = [entry for entry in _objects(path, content, "results", []) if "image" in entry]
    if not results:
        raise UserError(f"{path}: has no pictures, only videos; ground truth is of pictures")
    stems: dict[str, int] = {}
    for at, record in enumerate(truth.records):
        for name in (record.id, Path(record.id).name, record.image.stem):
            stems[name] = -1 if stems.get(name, at) != at else at  # several pictures of one name
    names = [Path(str(entry["image"])).stem for entry in results]
    _require_known(names, {name: at for name, at in stems.items() if at >= 0}, f"{path} has detections for", truth)
    pictures: list[int] = []
    entries: list[Mapping[str, Any]] = []
    for name, entry in zip(names, results, strict=True):
        found = _objects(path, entry, "detections", ["class", "score", "box"])
        entries += found
        pictures += [stems[name]] * len(found)
    places = _Places(path, "detection")
    classes = _Classes(truth)
    labels = [classes.label(str(entry["class"]), places[at]) for at, entry in enumerate(entries)]
    corners = _fours([entry["box"] for entry in entries], places)
    corners = _checked(corners, lambda n: f"{places[n]}: ", lambda n: shown_value(entries[n]["box"]))
    scores = _scores([entry["score"] for entry in entries], places)
    least = number(content.get("threshold"))
    notes = [f"{path} has no boxes below a score of {least:g}: AP counts what is missing as not found"]
    notes = (*(notes if least > 0.05 else ()), *classes.notes)
    return Found(_grouped(pictures, corners, scores, labels, truth), classes.names, notes)


# --- checks, and what all share


class _Places:
    """Where the n-th entry of a file stands, said only when asked."""

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what

    def __getitem__(self, at: int) -> str:
        return f"{self._path}: {self._what} {at + 1}"


def _json(path: Path) -> Any:
    if not path.exists():
        near = nearest(path.name, [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise UserError(f"no file at {path} (looked from {Path.cwd()}).{near}")
    try:
        return read_json(path, LIMIT)
    except RefusedError as error:
        raise UserError(f"{path}: {error}") from None


def _objects(path: Path, content: Mapping[str, Any], key: str, needs: Sequence[str]) -> list[dict[str, Any]]:
    """The list of objects under `key`, each with what it needs."""
    listed = content.get(key)
    if not isinstance(listed, list):
        raise UserError(f"{path}: {key} is {shown_value(listed)}, not a list")
    for at, entry in enumerate(listed):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: entry {at + 1} is {shown_value(entry)}, not an object")
        for need in needs:
            if need not in entry:
                raise UserError(f"{path}: entry {at + 1} has no {need}")
    return cast(list[dict[str, Any]], listed)


def _names(path: Path, content: Mapping[str, Any]) -> list[str]:
    names = content.get("classes")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: classes is {shown_value(names)}, not a list of names")
    return names


def _hashable(value: Any) -> Any:
    """An id as a key: 7 and 7.0 are one, 7 and True are not."""
    return value if isinstance(value, int | float | str) and not isinstance(value, bool) else shown_value(value)


def _index(word: str, below: int) -> bool:
    return word.isascii() and word.isdecimal() and len(word) < 10 and int(word) < below


class _Classes:
    """Labels of the classes that detections name: the truth's, and further ones where it lists none of its own."""

    def __init__(self, truth: Truth) -> None:
        self._labels = {name: label for label, name in enumerate(truth.classes)}
        self._open, self._known = truth.open, len(truth.classes)
        self._strange: Counter[str] = Counter()

    def label(self, name: str, where: str, times: int = 1) -> int:
        """A class by its name, or by its number where it is no name; never by number where any name may come."""
        label = self._labels.get(name)
        if label is None and self._open:
            label = self._labels[name] = len(self._labels)
        if label is not None:
            if label >= self._known:
                self._strange[name] += times
            return label
        if _index(name, self._known):
            return int(name)
        hint = nearest(name, self._labels) or f" Known: {', '.join(list(self._labels)[:20])}"
        raise UserError(f"{where}: unknown class {quoted(name)}.{hint}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._labels)

    @property
    def notes(self) -> tuple[str, ...]:
        if not self._strange:
            return ()
        few = ", ".join(name if name.isprintable() else quoted(name) for name in list(self._strange)[:10])
        more = f" and {len(self._strange) - 10} more" if len(self._strange) > 10 else ""
        return (f"no object has the class {few}{more}: their {self._strange.total()} detections change no mean",)


def _pictures(truth: Truth) -> dict[Any, int]:
    """Index of a record by its id, and by COCO's id as it stands in the json or as text."""
    known: dict[Any, int] = {record.id: at for at, record in enumerate(truth.records)}
    for name, at in truth.pictures.items():
        known.setdefault(str(name), at)
    return known | dict(truth.pictures)


def _require_known(names: Iterable[Any], known: Mapping[Any, int], what: str, truth: Truth) -> None:
    strange = [name for name in dict.fromkeys(names) if name not in known]
    if strange:
        near = nearest(str(strange[0]), dict.fromkeys(str(name) for name in known if str(name) != str(strange[0])))
        raise UserError(
            f"{what} {len(strange)} pictures that {truth.path} does not have; the first is {shown_value(strange[0])}."
            f"{near}"
        )


def _scores(values: Sequence[Any], where: Sequence[str] | _Places) -> Float64:
    scores = np.array([number(value) for value in values], np.float64)
    wrong = np.flatnonzero(~((scores >= 0) & (scores <= 1)))
    if len(wrong):
        at = int(wrong[0])
        raise UserError(f"{where[at]}: the score is {shown_value(values[at])}, not a number from 0 to 1")
    return scores


def _fours(values: Sequence[Any], where: _Places) -> Float64:
    for at, value in enumerate(values):
        if not isinstance(value, list) or len(value) != 4:
            raise UserError(f"{where[at]}: the box is {shown_value(value)}, not four numbers")
    return np.array([[number(one) for one in value] for value in values], np.float64).reshape(-1, 4)


def _checked(corners: Float64, where: Callable[[int], str], said: Callable[[int], str], *, turned: str = "") -> Float64:
    """The corners (N, 4) if each is a box; one without area is: it overlaps nothing. `turned` ends what is said of
    corners that are the wrong way round.
    """
    for wrong, reason in (
        (np.isnan(corners).any(axis=1), "not four numbers"),
        ((abs(corners) > LARGEST).any(axis=1), f"beyond {LARGEST:,.0f} pixels"),
        (
            (corners[:, 2:] < corners[:, :2]).any(axis=1),
            f"with its corners the wrong way round, or a negative side{turned}",
        ),
    ):
        if wrong.any():
            at = int(np.argmax(wrong))
            raise UserError(f"{where(at)}the box is {said(at)}: {reason}")
    return corners


def _record(
    name: str,
    size: tuple[int, int],
    boxes: Float64,
    labels: NDArray[np.int64],
    difficult: NDArray[np.bool_],
    crowd: NDArray[np.bool_],
    image: Path | None = None,
) -> Record:
    corners = cast(Any, boxes)  # float64: see the head of this file
    return Record(name, image or Path(name), size, corners, labels, difficult, np.zeros_like(difficult), crowd=crowd)


def _detections(boxes: Float64, scores: Float64, labels: Sequence[int]) -> Detections:
    return Detections(cast(Any, boxes), cast(Any, scores), np.array(labels, np.int64).reshape(-1))


def _grouped(
    pictures: Sequence[int], boxes: Float64, scores: Float64, labels: Sequence[int], truth: Truth
) -> tuple[Detections, ...]:
    """Detections in the order of the file → those of each record, best first."""
    images = np.array(pictures, np.int64).reshape(-1)
    kinds = np.array(labels, np.int64).reshape(-1)
    order = np.lexsort((-scores, images))
    edges = np.searchsorted(images[order], np.arange(len(truth.records) + 1))
    parts = [order[edges[at] : edges[at + 1]] for at in range(len(truth.records))]
    return tuple(Detections(cast(Any, boxes[part]), cast(Any, scores[part]), kinds[part]) for part in parts)
