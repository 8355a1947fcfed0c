"""Where a dataset's files lie: a folder of a known shape, or a data YAML → the folders of each split.

Nothing but names is looked at here, so that a wrong path is answered at once. Understood are

    VOCdevkit/VOC*/{Annotations,JPEGImages,ImageSets/Main/*.txt}   also one such year by itself
    {train,valid}/{images,labels}                                  `val`, `test`, `annotations` are known too
    {images,annotations}  or pictures and XML side by side         no validation split: one is drawn
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import yaml

from boxwright.data.formats.voc import class_name
from boxwright.registry import nearest
from boxwright.types import UserError

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Source:
    """One folder of pictures with the folder of their annotations, or a part of it."""

    images: Path
    annotations: Path
    listing: Path | None = None  # a text file of ids; None for all pictures in the folder
    share: Literal["all", "train", "val"] = "all"  # of a split that is drawn by a hash of the id
    prefix: str = ""  # makes ids unique where a split has several sources


Splits = Mapping[SplitName, tuple[Source, ...]]


@dataclass(frozen=True)
class Layout:
    """The folders of each split, and what a data YAML says beside them."""

    splits: Splits
    classes: tuple[str, ...] | None = None  # foreground only; None: collect them from the annotations
    notes: tuple[str, ...] = ()  # choices made that the user should hear of
    save_previews: bool = True  # the article's SAVE_VALID_PREDICTION_IMAGES


def find_layout(data: Path) -> Layout:
    """The layout of a folder or of a data YAML; raises `UserError` where there is none."""
    data = _expanded(data)
    if not _exists(data):
        raise UserError(f"no dataset at {data.absolute()}.{_nearest_path(data)}")
    if data.is_dir():
        return _folder_layout(data)
    if data.suffix.lower() in (".yaml", ".yml"):
        return _Description(data).layout()
    raise UserError(f"{data} is neither a folder nor a data YAML")


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # ~nobody
        return path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long, a folder that may not be looked into
        return False


def _nearest_path(path: Path) -> str:
    """What exists beside `path` under nearly its name."""
    if not _exists(path.parent):
        return f" There is no folder {path.parent.absolute()} either"
    try:
        return nearest(path.name, (beside.name for beside in path.parent.iterdir()))
    except OSError:
        return ""


# --- folders

_IMAGES = ("images", "jpegimages")
_ANNOTATIONS = ("labels", "annotations")
_SPLIT_FOLDERS: dict[SplitName, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("valid", "val", "validation"),
    "test": ("test", "testing"),
}


def _folder_layout(folder: Path) -> Layout:
    inside = _folders(folder)
    candidates = [folder] if _is_voc_year(folder) else [inside[name] for name in sorted(inside)]
    if years := [path for path in candidates if _is_voc_year(path)]:
        return _devkit_layout(years)
    if "vocdevkit" in inside:
        return _folder_layout(inside["vocdevkit"])
    splits: dict[SplitName, tuple[Source, ...]] = {}
    for split, names in _SPLIT_FOLDERS.items():
        if found := _first(inside, names):
            splits[split] = (_pair(found),)
    if "train" not in splits:
        splits = {"train": (_pair(folder),)}
    return _with_validation(Layout(splits))


def _folders(folder: Path) -> dict[str, Path]:
    """The folders in `folder` by their names in lower case."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name.lower(): folder / entry.name for entry in entries if entry.is_dir()}
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror or error}") from None


def _first(inside: Mapping[str, Path], names: Iterable[str]) -> Path | None:
    return next((inside[name] for name in names if name in inside), None)


def _is_voc_year(folder: Path) -> bool:
    return (folder / "Annotations").is_dir() and (folder / "JPEGImages").is_dir()


def _pair(folder: Path) -> Source:
    """The pictures and annotations of `folder`: in folders of their own inside it, beside it, or mixed."""
    inside = _folders(folder)
    beside = _folders(folder.parent) if folder.name.lower() in _IMAGES else {}
    if images := _first(inside, _IMAGES):
        return Source(images, _first(inside, _ANNOTATIONS) or images)
    return Source(folder, _first(beside, _ANNOTATIONS) or folder)


def _devkit_layout(years: list[Path]) -> Layout:
    """trainval and test, as the challenges use them, if some year has both; else train and val."""

    def lists(year: Path, names: Iterable[str]) -> list[Source]:
        paths = [year / "ImageSets" / "Main" / f"{name}.txt" for name in names]
        return [replace(_pair(year), listing=path) for path in paths if path.is_file()]

    def sources(*choices: tuple[str, ...]) -> tuple[Source, ...]:
        """For each year, the first choice of which it has a list."""
        found = [next(filter(None, (lists(year, names) for names in choices)), []) for year in years]
        union = [source for sources in found for source in sources]
        return tuple(_prefixed(union) if len(years) > 1 else union)

    test = sources(("test",))
    tested: Splits = {"test": test} if test else {}
    if any(len(lists(year, ("trainval", "test"))) == 2 for year in years):
        train = sources(("trainval",), ("train", "val"))
        note = "training on trainval, validating on test"
        return Layout({"train": train, "val": test, **tested}, notes=(note,))
    train, val = sources(("train",), ("trainval",)), sources(("val",))
    if train and val:
        return Layout({"train": train, "val": val, **tested})
    everything = [_pair(year) for year in years]
    train = train or tuple(_prefixed(everything) if len(years) > 1 else everything)
    return _with_validation(Layout({"train": train, **tested}))


def _prefixed(sources: Iterable[Source]) -> list[Source]:
    """Sources whose ids begin with the name of their folder."""
    return [replace(source, prefix=f"{source.images.parent.name}_") for source in sources]


def _with_validation(layout: Layout) -> Layout:
    """The same layout with a tenth of the training pictures drawn for validation, if it has no such split."""
    if "val" in layout.splits:
        return layout
    train = layout.splits["train"]
    drawn: Splits = {
        **layout.splits,
        "train": tuple(replace(source, share="train") for source in train),
        "val": tuple(replace(source, share="val") for source in train),
    }
    note = "no validation split: a tenth of the pictures, drawn by a hash of their names, is kept for it"
    return replace(layout, splits=drawn, notes=(*layout.notes, note))


# --- data YAML

_ARTICLE_DIRS = ("TRAIN_DIR_IMAGES", "TRAIN_DIR_LABELS", "VALID_DIR_IMAGES", "VALID_DIR_LABELS")
_ARTICLE = (*_ARTICLE_DIRS, "CLASSES", "NC", "SAVE_VALID_PREDICTION_IMAGES")
_SHORT = ("path", "train", "val", "test", "format", "classes")
_OTHER_TOOLS = {"names": "classes", "valid": "val", "nc": "NC", "root": "path"}
_BACKGROUND = "__background__"
_MAX_YAML_BYTES = 1_000_000


class _Description:
    """A data YAML, its nodes looked at but never constructed: messages know lines, and no tag can act."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nodes = self._read()

    def layout(self) -> Layout:
        article = [key for key in self.nodes if key in _ARTICLE]
        short = [key for key in self.nodes if key in _SHORT]
        if article and short:
            raise self._error(self.nodes[short[0]], f"{short[0]!r} does not go with {article[0]!r}: use one form")
        return self._short_form() if short else self._article_form()

    def _article_form(self) -> Layout:
        missing = [key for key in (*_ARTICLE_DIRS, "CLASSES") if key not in self.nodes]
        if missing:
            raise UserError(f"{self.path}: {', '.join(missing)} missing")
        classes, stated = self._classes("CLASSES"), self._whole_number("NC")
        if stated is not None and stated not in (len(classes), len(classes) + 1):
            raise self._error(
                self.nodes["NC"],
                f"NC is {stated}, but CLASSES has {len(classes)}, {len(classes) + 1} with {_BACKGROUND}",
            )
        train_images, train_labels, val_images, val_labels = (
            self._existing(self.nodes[key], key, self._bases(), folder=True) for key in _ARTICLE_DIRS
        )
        return Layout(
            {"train": (Source(train_images, train_labels),), "val": (Source(val_images, val_labels),)},
            classes,
            save_previews=self._flag("SAVE_VALID_PREDICTION_IMAGES", default=True),
        )

    def _short_form(self) -> Layout:
        if "format" in self.nodes and self._text(self.nodes["format"], "format") not in ("voc", "auto"):
            raise self._error(self.nodes["format"], "format must be voc or auto")
        classes = self._classes("classes") if "classes" in self.nodes else None
        bases = self._bases()
        if "path" in self.nodes:
            bases = (self._existing(self.nodes["path"], "path", bases, folder=True),)
        splits: dict[SplitName, tuple[Source, ...]] = {}
        for split in SPLITS:
            if split in self.nodes:
                splits[split] = self._sources(split, bases)
        if not splits and "path" in self.nodes:
            return replace(_folder_layout(bases[0]), classes=classes)
        if "train" not in splits:
            raise UserError(f"{self.path}: train missing")
        return _with_validation(Layout(splits, classes))

    def _sources(self, split: SplitName, bases: tuple[Path, ...]) -> tuple[Source, ...]:
        node = self.nodes[split]
        items = node.value if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq" else [node]
        places = [self._existing(item, split, bases) for item in items]
        if not places:
            raise self._error(node, f"{split} is empty")
        sources: list[Source] = []
        for item, place in zip(items, places, strict=True):
            year = next((parent for parent in place.parents if _is_voc_year(parent)), None)
            if place.is_dir():
                sources.append(_pair(place))
            elif year:
                sources.append(replace(_pair(year), listing=place))
            else:
                raise self._error(item, f"{split}: {place} is a file in no folder with JPEGImages and Annotations")
        return tuple(_prefixed(sources) if len(sources) > 1 else sources)

    def _bases(self) -> tuple[Path, ...]:
        return self.path.parent, Path.cwd()

    def _existing(self, node: yaml.Node, key: str, bases: tuple[Path, ...], *, folder: bool = False) -> Path:
        """The file or folder that a node names, looked for below each of `bases` unless it is absolute."""
        text = self._text(node, key)
        tried = list(dict.fromkeys((base / _expanded(Path(text))).absolute() for base in bases))
        place = next((place for place in tried if _exists(place)), None)
        if place is None:
            hint = ""
            if "\\" in text:
                hint = " Write / between folders"
            elif "$" in text:
                hint = " Variables are not expanded"
            where = " or ".join(str(place) for place in tried)
            raise self._error(node, f"{key}: nothing at {where}.{hint or _nearest_path(tried[0])}")
        if folder and not place.is_dir():
            raise self._error(node, f"{key}: {place} is a file, not a folder")
        return place

    def _classes(self, key: str) -> tuple[str, ...]:
        node = self.nodes[key]
        if not isinstance(node, yaml.SequenceNode) or node.tag != _TAG + "seq":
            raise self._error(node, f"{key} must be a list of names")
        lines: dict[str, int] = {}
        for item in node.value:
            name = class_name(self._text(item, f"{key}: a class name"))
            if not name or any(unicodedata.category(letter).startswith("C") for letter in name):
                raise self._error(item, f"{key}: {name!r} is no name for a class")
            if name in lines:
                raise self._error(item, f"{key}: {name!r} is there twice, first on line {lines[name]}")
            if name == _BACKGROUND and lines:
                raise self._error(item, f"{key}: {_BACKGROUND} must come first, or not at all")
            lines[name] = _line(item)
        lines.pop(_BACKGROUND, None)
        if not lines:
            raise self._error(node, f"{key} names no class")
        return tuple(lines)

    def _text(self, node: yaml.Node, what: str) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(node, f"{what} must be text")
        if node.tag != _TAG + "str":
            kind = node.tag.removeprefix(_TAG)
            if not node.value:
                raise self._error(node, f"{what} is empty")
            raise self._error(node, f"{what} must be text, and YAML reads {node.value} as {kind}: quote it")
        if not node.value.strip():
            raise self._error(node, f"{what} is empty")
        return node.value.strip()

    def _whole_number(self, key: str) -> int | None:
        node = self.nodes.get(key)
        if node is None:
            return None
        if node.tag != _TAG + "int" or not node.value.isdecimal():
            raise self._error(node, f"{key} must be a whole number, without quotes")
        return int(node.value[:9])

    def _flag(self, key: str, *, default: bool) -> bool:
        node = self.nodes.get(key)
        if node is None:
            return default
        if node.tag != _TAG + "bool":
            raise self._error(node, f"{key} must be True or False, without quotes")
        return yaml.SafeLoader.bool_values[node.value.lower()]

    def _read(self) -> dict[str, yaml.Node]:
        """The nodes by their keys: known keys, each once."""
        root = self._compose()
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{self.path} is no data YAML: it must hold keys like TRAIN_DIR_IMAGES: ... or train: ...")
        nodes: dict[str, yaml.Node] = {}
        lines: dict[str, int] = {}
        for key_node, node in root.value:
            key = str(key_node.value)
            if not isinstance(key_node, yaml.ScalarNode) or key not in (*_ARTICLE, *_SHORT):
                known = _OTHER_TOOLS.get(key)
                hint = f" Did you mean {known!r}?" if known else nearest(key, (*_ARTICLE, *_SHORT))
                raise self._error(key_node, f"unknown key {key[:80]!r}.{hint}")
            if key in nodes:
                raise self._error(key_node, f"{key} is there twice, first on line {lines[key]}")
            nodes[key], lines[key] = node, _line(key_node)
        return nodes

    def _compose(self) -> yaml.Node | None:
        try:
            with self.path.open("rb") as file:
                data = file.read(_MAX_YAML_BYTES + 1)
            if len(data) > _MAX_YAML_BYTES:
                raise UserError(f"{self.path} is larger than {_MAX_YAML_BYTES // 1_000_000} MB: no data YAML")
            return yaml.compose(data.decode("utf-8-sig"), Loader=yaml.SafeLoader)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise UserError(f"{self.path} is no UTF-8 text") from None
        except RecursionError:
            raise UserError(f"{self.path} is nested too deep for a data YAML") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
            raise UserError(f"{self.path}{where}: is no YAML: {error.problem or error.context}") from None
        except yaml.YAMLError as error:  # a character that YAML does not allow
            raise UserError(f"{self.path} is no YAML: {str(error).splitlines()[0]}") from None

    def _error(self, node: yaml.Node, what: str) -> UserError:
        return UserError(f"{self.path}:{_line(node)}: {what}")


_TAG = "tag:yaml.org,2002:"


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
