"""Where a dataset's files lie and of which format they are: a folder of a known shape, a file, or a data YAML → the
sources of each split.

Only names are looked at, and the first lines of a few files, so that a wrong path is answered at once. Understood are

    VOCdevkit/VOC*/{Annotations,JPEGImages,ImageSets/Main/*.txt}   also one such year by itself
    {train,valid}/{images,labels}                                  `val`, `test`, `annotations` are known too
    {images,labels}/{train,val}
    {images,annotations}  or pictures and annotations side by side no validation split: one is drawn
    annotations/instances_{train,val}2017.json                     one file a split, in the folder or in `annotations`
    {train,val}.json beside tar files                              shards; also behind an address
    a COCO json, a CSV, a YOLO data.yaml                           by themselves
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import yaml

from boxwright.data import members
from boxwright.data.data_yaml import (
    ARTICLE,
    ARTICLE_DIRS,
    BACKGROUND,
    YOLO,
    DataYaml,
    exists,
    expanded,
    nearest_path,
)
from boxwright.data.formats import FORMATS
from boxwright.data.formats.base import FormatName, Source, VocBoxes
from boxwright.data.formats.pictures import ANNOTATION_FOLDERS, IMAGE_FOLDERS, annotation_folder, few, scan
from boxwright.data.formats.shards import LARGEST_INDEX
from boxwright.data.formats.yolo import NAME_FILES, read_names
from boxwright.download import cache_folder
from boxwright.registry import nearest
from boxwright.types import UserError

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
Splits = Mapping[SplitName, tuple[Source, ...]]


@dataclass(frozen=True)
class Layout:
    """The sources of each split, and what a data YAML says beside them."""

    splits: Splits
    classes: tuple[str, ...] | None = None  # foreground only; None: collect them from the annotations
    notes: tuple[str, ...] = ()  # choices made that the user should hear of
    save_previews: bool = True  # the article's SAVE_VALID_PREDICTION_IMAGES


def find_layout(data: Path) -> Layout:
    """The layout of a folder, a data YAML or an annotation file; raises `UserError` where there is none."""
    data = expanded(data)
    if not exists(data):
        raise UserError(f"no dataset at {data.absolute()}.{nearest_path(data)}")
    if data.is_dir():
        return _with_stated_classes(_folder_layout(data), data)
    if data.suffix.lower() in (".yaml", ".yml"):
        return _yaml_layout(DataYaml(data))
    return _file_layout(data)


def address_layout(address: str) -> Layout:
    """The layout of shards on a server: the address of their folder, or of the index of `train` in it.

    The indices are fetched each time, and kept where others of that address were. Raises `UserError` for an address
    that is not allowed or has no index, `ReadingError` where the server does not answer.
    """
    members.require_allowed(address)
    base = address.rstrip("/").removesuffix("/train.json")
    folder = cache_folder() / "indices" / hashlib.sha256(base.encode()).hexdigest()[:20]
    splits: dict[SplitName, tuple[Source, ...]] = {}
    for split in SPLITS:
        path = folder / f"{split}.json"
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                if not members.save(f"{base}/{split}.json", temporary, LARGEST_INDEX):
                    continue
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write into {folder}: {error.strerror}. Set BOXWRIGHT_CACHE to a folder") from None
        splits[split] = (Source(None, path, format="shards", address=base),)
    if "train" not in splits:
        raise UserError(f"no dataset at {address}: there is no {base}/train.json. Wanted is what `data shard` writes")
    return _with_validation(Layout(splits))


# --- one file


def _file_layout(path: Path) -> Layout:
    """The layout of a file that annotates all pictures."""
    for name, form in FORMATS.items():
        if path.suffix.lower() != form.suffix or not path.is_file():
            continue
        if form.one_file:
            source = Source(None, path, format=name)
            reason = form.sign([path])
            if not reason:
                form.open(source)  # raises, and says why it is not understood
            return _with_validation(Layout({"train": (source,)}, notes=_format_notes([(source, reason or path.name)])))
        if form.suffix == ".json" and form.sign([path]):
            raise UserError(f"{path} is {form.title}'s annotation of one picture: give its folder")
    raise UserError(f"{path} is neither a folder nor a data YAML, COCO json or CSV")


# --- folders

_SPLIT_FOLDERS: dict[SplitName, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("valid", "val", "validation"),
    "test": ("test", "testing"),
}


def _folder_layout(folder: Path, only: FormatName | None = None, names: tuple[str, ...] = ()) -> Layout:
    """The layout of a folder: of the format `only`, or of what is recognised; `names` are YOLO's, if known."""
    inside = _folders(folder)
    candidates = [folder] if _is_voc_year(folder) else [inside[name] for name in sorted(inside)]
    if only in (None, "voc") and (years := [path for path in candidates if _is_voc_year(path)]):
        return _devkit_layout(years)
    if "vocdevkit" in inside:
        return _folder_layout(inside["vocdevkit"], only, names)
    shaped = _pairs(folder)
    pairs: dict[SplitName, Source] = shaped or {"train": _pair(folder)}
    sources, notes = _recognised(folder, pairs, only, one_file=bool(shaped))
    described = _description_in(folder) if only in (None, "yolo") and not names and _may_be_yolo(sources) else None
    if described and len(sources) < 2:  # its splits are better than none
        layout = _yaml_layout(described)
        return replace(layout, notes=(*notes, *layout.notes))
    if not sources:
        if only and FORMATS[only].one_file:
            raise UserError(f"no {FORMATS[only].title} file in {folder}: looked for *{FORMATS[only].suffix}")
        sources.update((split, replace(pair, format=only or "voc")) for split, pair in pairs.items())
    if sources["train"].format == "yolo" and not names:
        names, origin = _class_names(folder, sources["train"], described)
        notes += (f"the classes' names are those of {origin}",)
    splits: Splits = {split: (_named(source, names),) for split, source in sources.items()}
    return _with_validation(Layout(splits, notes=notes))


def _with_stated_classes(layout: Layout, folder: Path) -> Layout:
    """The same layout with the classes that a data YAML of ours in the folder lists, as `data convert` writes it."""
    path = folder / "data.yaml"
    if layout.classes or not path.is_file():
        return layout
    try:
        data = DataYaml(path)
        key = next((key for key in ("CLASSES", "classes") if key in data.nodes), None)
        classes = data.classes(key) if key else None
    except UserError as error:  # it may be another tool's, and the folder was understood without it
        return replace(layout, notes=(*layout.notes, f"not used: {error}"))
    if not classes:
        return layout
    return replace(layout, classes=classes, notes=(*layout.notes, f"the classes are those that {path} lists"))


def _recognised(
    folder: Path, pairs: Mapping[SplitName, Source], only: FormatName | None, *, one_file: bool
) -> tuple[dict[SplitName, Source], tuple[str, ...]]:
    """The sources of a folder by split, and why they are taken for what they are; none where nothing is recognised."""
    seen: dict[SplitName, tuple[Source, str]] = {}
    for split, pair in pairs.items():
        if found := _understood(pair, only, one_file=one_file):
            seen[split] = found
    sources: dict[SplitName, Source] = {}
    if seen:  # a split that shows nothing is of the format of the others
        form = seen["train" if "train" in seen else min(seen)][0].format
        if not FORMATS[form].one_file:
            sources.update((split, replace(pair, format=form)) for split, pair in pairs.items())
    else:
        seen = _one_file_each(folder, only)
    sources.update((split, source) for split, (source, _) in seen.items())
    if sources and "train" not in sources:
        raise UserError(f"{folder}: nothing to train on; {_SAY_WHICH}")
    return sources, _format_notes(seen.values())


def _may_be_yolo(sources: Mapping[SplitName, Source]) -> bool:
    return not sources or sources["train"].format == "yolo"


def _named(source: Source, names: tuple[str, ...]) -> Source:
    return replace(source, names=names) if source.format == "yolo" else source


def _pairs(folder: Path) -> dict[SplitName, Source]:
    """Folders of pictures and of annotations, by the names of splits; none if no folder is called so."""
    inside = _folders(folder)
    images = _first(inside, IMAGE_FOLDERS)
    for place in (inside, _folders(images) if images else {}):
        found: dict[SplitName, Source] = {}
        for split in SPLITS:
            if path := _split_folder(place, split):
                found[split] = _pair(path)
        if "train" in found:
            return found
    return {}


def _split_folder(inside: Mapping[str, Path], split: SplitName) -> Path | None:
    names = _SPLIT_FOLDERS[split]
    of_a_year = [name for name in sorted(inside) if re.fullmatch(rf"({'|'.join(names)})20\d\d", name)]
    return _first(inside, (*names, *of_a_year))


def _understood(source: Source, only: FormatName | None = None, *, one_file: bool) -> tuple[Source, str] | None:
    """The same source in the format that its annotations are of, and what shows it; None where nothing does.

    `one_file`: formats with one file for all pictures count too.
    """
    files = _by_suffix(source.annotations)
    for name, form in FORMATS.items():
        found = files.get(form.suffix, [])
        if only not in (None, name) or not found or (form.one_file and not one_file):
            continue
        if form.one_file:
            found = _signed(found, name)
            if len(found) > 1:
                raise UserError(f"{source.annotations} has several {form.title} files: {_names(found)}. {_SAY_WHICH}")
        if found and (reason := form.sign(found)):
            left = "" if only else _left_aside(name, files)
            if form.one_file:
                return Source(None, found[0], format=name), f"{reason}{left}"
            return replace(source, format=name), f"{reason} in {source.annotations}{left}"
    return None


def _left_aside(taken: FormatName, files: Mapping[str, list[Path]]) -> str:
    """What other formats a folder shows, which come later in the order; nothing if there is none."""
    others: list[str] = []
    for name, form in FORMATS.items():
        if name != taken and (there := files.get(form.suffix)) and (reason := form.sign(there)):
            others.append(f"{form.title}'s ({reason})")
    return f"; {' and '.join(others)} in the same place not read: `format:` in a data YAML chooses" if others else ""


_SAY_WHICH = "Say in a data YAML which are train and val"
_MOST_FILES = 100  # of one suffix: more are files of single pictures


def _signed(paths: Sequence[Path], name: FormatName) -> list[Path]:
    """Those of a few files that a format with one file for all pictures takes for its own."""
    return [path for path in paths[:_MOST_FILES] if FORMATS[name].sign([path])]


def _one_file_each(folder: Path, only: FormatName | None) -> dict[SplitName, tuple[Source, str]]:
    """A file for each split, by its name, in a folder or in its folder of annotations."""
    inside = _folders(folder)
    for place in (folder, *(inside[name] for name in ANNOTATION_FOLDERS if name in inside)):
        files = _by_suffix(place)
        for name, form in FORMATS.items():
            if form.one_file and only in (None, name) and (found := _signed(files.get(form.suffix, []), name)):
                return {
                    split: (Source(None, path, format=name), form.sign([path]) or "")
                    for split, path in _by_split(place, found).items()
                }
    return {}


def _by_split(place: Path, paths: Sequence[Path]) -> dict[SplitName, Path]:
    """Files by the split that their names tell; COCO's `instances_*` before captions and key points."""
    paths = [path for path in paths if path.name.startswith("instances")] or paths
    if len(paths) == 1:
        return {"train": paths[0]}
    found: dict[SplitName, list[Path]] = {}
    for path in paths:
        words = re.findall(r"[a-z]+", path.stem.lower())
        for split, names in _SPLIT_FOLDERS.items():
            if any(word in names for word in words):
                found.setdefault(split, []).append(path)
    if "train" not in found or any(len(those) > 1 for those in found.values()):
        raise UserError(f"{place} has {_names(paths)}. {_SAY_WHICH}")
    return {split: found[split][0] for split in SPLITS if split in found}


def _names(paths: Iterable[Path]) -> str:
    return few(path.name for path in paths)


def _by_suffix(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for entry in scan(folder):
        if entry.is_file():  # a FIFO would be waited for
            files.setdefault(os.path.splitext(entry.name)[1].lower(), []).append(Path(entry.path))  # noqa: PTH122
    return files


def _format_notes(seen: Iterable[tuple[Source, str]]) -> tuple[str, ...]:
    """What was recognised and why."""
    return tuple(dict.fromkeys(f"{FORMATS[source.format].title}: {reason}" for source, reason in seen))


def _description_in(folder: Path) -> DataYaml | None:
    """The data YAML of YOLO's kind in a folder."""
    for name in ("data.yaml", "data.yml", "dataset.yaml"):
        if (folder / name).is_file() and (description := DataYaml(folder / name)).yolo:
            return description
    return None


def _class_names(folder: Path, source: Source, described: DataYaml | None) -> tuple[tuple[str, ...], Path]:
    """What YOLO's classes 0, 1, ... are called, and the file that says it."""
    if described:
        return described.names(), described.path
    folders = dict.fromkeys((folder, source.annotations, source.annotations.parent))
    for path in (place / name for place in folders for name in NAME_FILES):
        if path.is_file():
            return read_names(path), path
    raise UserError(
        f"{folder} has labels of YOLO, but nothing says what their classes are called: looked for data.yaml, "
        f"{', '.join(NAME_FILES)}. Write classes.txt with a name a line, the first for class 0"
    )


def _folders(folder: Path) -> dict[str, Path]:
    """The folders in `folder` by their names in lower case."""
    return {entry.name.lower(): folder / entry.name for entry in scan(folder) if entry.is_dir()}


def _first(inside: Mapping[str, Path], names: Iterable[str]) -> Path | None:
    return next((inside[name] for name in names if name in inside), None)


def _is_voc_year(folder: Path) -> bool:
    return (folder / "Annotations").is_dir() and (folder / "JPEGImages").is_dir()


def _pair(folder: Path) -> Source:
    """The pictures and annotations of `folder`: in folders of their own inside it, beside it, or mixed."""
    inside = _folders(folder)
    images = _first(inside, IMAGE_FOLDERS)
    annotations = _first(inside, ANNOTATION_FOLDERS)
    if images:
        return Source(images, annotations or images)
    return Source(folder, annotations or annotation_folder(folder))


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

    known = f"{FORMATS['voc'].title}: Annotations and JPEGImages in {', '.join(map(str, years))}"
    test = sources(("test",))
    tested: Splits = {"test": test} if test else {}
    if any(len(lists(year, ("trainval", "test"))) == 2 for year in years):
        train = sources(("trainval",), ("train", "val"))
        note = "training on trainval, validating on test"
        return Layout({"train": train, "val": test, **tested}, notes=(known, note))
    train, val = sources(("train",), ("trainval",)), sources(("val",))
    if train and val:
        note = "training on train, validating on val"
        return Layout({"train": train, "val": val, **tested}, notes=(known, note))
    everything = [_pair(year) for year in years]
    train = train or tuple(_prefixed(everything) if len(years) > 1 else everything)
    return _with_validation(Layout({"train": train, **tested}, notes=(known,)))


def _prefixed(sources: Iterable[Source]) -> list[Source]:
    """Sources whose ids begin with the name of their folder, or with a number where these are the same."""
    sources = list(sources)
    places = list(dict.fromkeys(source.images or source.annotations for source in sources))
    names = {place: place.parent.name if place.is_dir() else place.stem for place in places}
    if len(set(names.values())) < len(names):
        names = {place: str(number) for number, place in enumerate(places, 1)}
    return [replace(source, prefix=f"{names[source.images or source.annotations]}_") for source in sources]


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


def _yaml_layout(data: DataYaml) -> Layout:
    article = [key for key in data.nodes if key in ARTICLE]
    short = [key for key in data.nodes if key in YOLO]
    if article and short:
        raise data.error(data.nodes[short[0]], f"{short[0]!r} does not go with {article[0]!r}: use one form")
    layout = _short_form(data) if short else _article_form(data)
    return _with_voc_boxes(layout, data) if "voc_boxes" in data.nodes else layout


def _with_voc_boxes(layout: Layout, data: DataYaml) -> Layout:
    """The same layout, corners in its VOC XML taken for what the data YAML says they are."""
    node = data.nodes["voc_boxes"]
    said, choices = data.text(node, "voc_boxes"), get_args(VocBoxes)
    if said not in choices:
        raise data.error(node, f"voc_boxes must be one of {', '.join(choices)}.{nearest(said, choices)}")
    if not any(source.format == "voc" for sources in layout.splits.values() for source in sources):
        raise data.error(node, "voc_boxes is for VOC XML, and there is none")
    splits: Splits = {
        split: tuple(
            replace(source, voc_boxes=said) if source.format == "voc" else source for source in layout.splits[split]
        )
        for split in layout.splits
    }
    return replace(layout, splits=splits, notes=(*layout.notes, f"corners in VOC XML: {_CORNERS[said]}"))


_CORNERS = {
    "from 1": "pixels counted from 1, the last one inside",
    "from 0": "pixels counted from 0, the last one inside",
    "edges": "edges counted from 0",
}


def _article_form(data: DataYaml) -> Layout:
    missing = [key for key in (*ARTICLE_DIRS, "CLASSES") if key not in data.nodes]
    if missing:
        raise UserError(f"{data.path}: {', '.join(missing)} missing")
    classes, stated = data.classes("CLASSES"), data.whole_number("NC")
    if stated is not None and stated not in (len(classes), len(classes) + 1):
        raise data.error(
            data.nodes["NC"],
            f"NC is {stated}, but CLASSES has {len(classes)}, {len(classes) + 1} with {BACKGROUND}",
        )
    train_images, train_labels, val_images, val_labels = (
        data.existing(data.nodes[key], key, data.bases, folder=True) for key in ARTICLE_DIRS
    )
    return Layout(
        {"train": (Source(train_images, train_labels),), "val": (Source(val_images, val_labels),)},
        classes,
        save_previews=data.flag("SAVE_VALID_PREDICTION_IMAGES", default=True),
    )


def _short_form(data: DataYaml) -> Layout:
    form = _stated_format(data)
    names = data.names() if "names" in data.nodes else ()
    classes = data.classes("classes") if "classes" in data.nodes else None
    if classes and not names:
        names = data.list_of_names("classes")
    if names and not classes:
        classes = tuple(name for name in names if name not in ("", BACKGROUND))
    bases = data.bases
    if "path" in data.nodes:
        bases = (data.existing(data.nodes["path"], "path", bases, folder=True),)
    notes = (f"{data.path.name}: not used: {', '.join(data.unused)}",) if data.unused else ()
    stated = _Stated(data, bases, form, names)
    splits: dict[SplitName, tuple[Source, ...]] = {}
    for split in SPLITS:
        if split in data.nodes:
            splits[split], found = stated.sources(split)
            notes += found
    if not splits and "path" in data.nodes and "images" not in data.nodes:
        layout = _folder_layout(bases[0], form, names)
        return replace(layout, classes=classes, notes=(*notes, *layout.notes))
    if "train" not in splits:
        raise UserError(f"{data.path}: train missing")
    return _with_validation(Layout(splits, classes, tuple(dict.fromkeys(notes))))


def _stated_format(data: DataYaml) -> FormatName | None:
    """The format that a data YAML states; None where it is to be recognised."""
    said = data.text(data.nodes["format"], "format") if "format" in data.nodes else "yolo" if data.yolo else "auto"
    for name in get_args(FormatName):
        if said == name:
            return name
    if said != "auto":
        choices = (*get_args(FormatName), "auto")
        raise data.error(data.nodes["format"], f"format must be one of {', '.join(choices)}.{nearest(said, choices)}")
    return None


@dataclass(frozen=True)
class _Stated:
    """What the short form says that holds for every split."""

    data: DataYaml
    bases: tuple[Path, ...]  # where the paths of splits start
    form: FormatName | None  # None: to be recognised
    names: tuple[str, ...]  # of YOLO's classes, if stated

    def sources(self, split: SplitName) -> tuple[tuple[Source, ...], tuple[str, ...]]:
        """The sources of a split, and what was recognised."""
        items = self.data.items(self.data.nodes[split])
        places = [self.data.existing(item, split, self.bases) for item in items]
        if not places:
            raise self.data.error(self.data.nodes[split], f"{split} is empty")
        images = self._images(split)
        sources: list[Source] = []
        seen: list[tuple[Source, str]] = []
        for item, place in zip(items, places, strict=True):
            if place.is_dir():
                source, reason = self._of_folder(item, split, place, images)
                seen += [(source, reason)] if reason else []
            else:
                source = self._of_file(item, split, place, images)
            if source.format == "yolo":
                source = _named(source, self.names or _class_names(place, source, None)[0])
            sources.append(source)
        return tuple(_prefixed(sources) if len(sources) > 1 else sources), _format_notes(seen)

    def _of_folder(self, node: yaml.Node, split: SplitName, place: Path, images: Path | None) -> tuple[Source, str]:
        """The source in a folder, and what shows its format, if that is not stated."""
        pair = Source(images, place) if images else _pair(place)
        if self.form and not FORMATS[self.form].one_file:
            return replace(pair, format=self.form), ""
        if found := _understood(pair, self.form, one_file=True):
            source, reason = found
            return replace(source, images=images or source.images), "" if self.form else reason
        if self.form:
            raise self.data.error(node, f"{split}: no {FORMATS[self.form].title} file in {pair.annotations}")
        return pair, ""

    def _of_file(self, node: yaml.Node, split: SplitName, place: Path, images: Path | None) -> Source:
        """The source that a file is: the annotations of all pictures, or a list of pictures."""
        for name, form in FORMATS.items():
            if form.one_file and (self.form == name or (self.form is None and place.suffix.lower() == form.suffix)):
                return Source(images, place, format=name)
        if self.form == "yolo":
            return Source(images, place.parent, listing=place, format="yolo")
        if year := next((parent for parent in place.parents if _is_voc_year(parent)), None):
            return replace(_pair(year), listing=place)
        hint = "If it is YOLO's, say `format: yolo`"
        raise self.data.error(node, f"{split}: {place} is a file in no folder with JPEGImages and Annotations. {hint}")

    def _images(self, split: SplitName) -> Path | None:
        """The folder of pictures that is stated, for all splits or for this one."""
        node = self.data.nodes.get("images")
        if isinstance(node, yaml.MappingNode):
            by_split = {str(key.value): value for key, value in node.value}
            for key, _ in node.value:
                if str(key.value) not in SPLITS:
                    raise self.data.error(key, f"images: {str(key.value)[:80]!r} is none of {', '.join(SPLITS)}")
            node = by_split.get(split)
        return self.data.existing(node, "images", self.bases, folder=True) if node else None
