"""A data YAML → its nodes, looked at but never constructed: messages know lines, and no tag in it can act."""

from __future__ import annotations

from pathlib import Path

import yaml

from boxwright.data.formats.base import class_name, is_class_name, one_line
from boxwright.registry import nearest
from boxwright.types import UserError

ARTICLE_DIRS = ("TRAIN_DIR_IMAGES", "TRAIN_DIR_LABELS", "VALID_DIR_IMAGES", "VALID_DIR_LABELS")
ARTICLE = (*ARTICLE_DIRS, "CLASSES", "NC", "SAVE_VALID_PREDICTION_IMAGES")
SHORT = ("path", "train", "val", "test", "format", "classes", "images")
YOLO = (*SHORT, "names", "nc")
ANY = ("voc_boxes",)  # keys of every form
_OTHER_TOOLS = {"names": "classes", "valid": "val", "nc": "NC", "root": "path"}
BACKGROUND = "__background__"
_MAX_YAML_BYTES = 1_000_000
_MAX_NODES = 50_000  # a second of reading; 20,000 classes, numbered, are 40,000
_LONGEST = 1000  # letters of a message
_MOST_DIGITS = 5  # of a class's number


class DataYaml:
    """The keys of the article's form, of the short form or of YOLO's, each once; what is wrong is a `UserError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.yolo = False  # of YOLO's kind: `names` beside the folders
        self.unused: list[str] = []  # keys that only YOLO's tools know
        self.nodes = self._read()

    def error(self, node: yaml.Node, what: str) -> UserError:
        """What is wrong with a node, with its line; a line itself, however long what it quotes may be."""
        what = what if len(what) <= _LONGEST else what[:_LONGEST] + "…"
        return UserError(f"{self.path}:{_line(node)}: {one_line(what)}")

    def items(self, node: yaml.Node) -> list[yaml.Node]:
        """The nodes of a list, or the node itself."""
        return node.value if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq" else [node]

    @property
    def bases(self) -> tuple[Path, ...]:
        """Where relative paths start."""
        return self.path.parent, Path.cwd()

    def existing(self, node: yaml.Node, key: str, bases: tuple[Path, ...], *, folder: bool = False) -> Path:
        """The file or folder that a node names, looked for below each of `bases` unless it is absolute."""
        text = self.text(node, key)
        tried = list(dict.fromkeys((base / expanded(Path(text))).absolute() for base in bases))
        if self.yolo and text.startswith("../"):  # as Roboflow writes what lies beside the YAML
            tried += [(base / text.removeprefix("../")).absolute() for base in bases]
        place = next((place for place in tried if exists(place)), None)
        if place is None:
            hint = ""
            if "\\" in text:
                hint = " Write / between folders"
            elif "$" in text:
                hint = " Variables are not expanded"
            where = " or ".join(str(place) for place in tried)
            raise self.error(node, f"{key}: nothing at {where}.{hint or nearest_path(tried[0])}")
        if folder and not place.is_dir():
            raise self.error(node, f"{key}: {place} is a file, not a folder")
        return place

    def text(self, node: yaml.Node, what: str) -> str:
        """A node's text; what YAML reads as something else must be quoted."""
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(node, f"{what} must be text")
        if node.tag != _TAG + "str":
            kind = node.tag.removeprefix(_TAG)
            if not node.value:
                raise self.error(node, f"{what} is empty")
            raise self.error(node, f"{what} must be text, and YAML reads {node.value} as {kind}: quote it")
        if not node.value.strip():
            raise self.error(node, f"{what} is empty")
        return node.value.strip()

    def names(self) -> tuple[str, ...]:
        """What YOLO's classes 0, 1, ... are called, by a list or a number each; "" where there is none."""
        node = self.nodes["names"]
        if "kpt_shape" in self.unused:
            raise UserError(f"{self.path}: labels with key points (kpt_shape) are not read: leave only the boxes")
        names = self._numbered(node) if isinstance(node, yaml.MappingNode) else self.list_of_names("names")
        if not names:
            raise self.error(node, "names names no class")
        stated = self.whole_number("nc")
        if stated is not None and stated != len(names):
            raise self.error(self.nodes["nc"], f"nc is {stated}, but names has {len(names)}")
        return names

    def classes(self, key: str) -> tuple[str, ...]:
        """A list of names without the background that may come first."""
        names = self.list_of_names(key)
        if BACKGROUND in names[1:]:
            item = self.nodes[key].value[names.index(BACKGROUND)]
            raise self.error(item, f"{key}: {BACKGROUND} must come first, or not at all")
        names = tuple(name for name in names if name != BACKGROUND)
        if not names:
            raise self.error(self.nodes[key], f"{key} names no class")
        return names

    def list_of_names(self, key: str) -> tuple[str, ...]:
        """A list of names, each once."""
        node = self.nodes[key]
        if not isinstance(node, yaml.SequenceNode) or node.tag != _TAG + "seq":
            raise self.error(node, f"{key} must be a list of names")
        lines: dict[str, int] = {}
        for item in node.value:
            self._add_name(item, key, lines)
        return tuple(lines)

    def _numbered(self, node: yaml.MappingNode) -> tuple[str, ...]:
        """The names of a mapping from numbers, in their order."""
        names: dict[int, str] = {}
        lines: dict[str, int] = {}
        for key, item in node.value:
            if key.tag != _TAG + "int" or not key.value.isdecimal() or len(key.value) > _MOST_DIGITS:
                raise self.error(key, "names: a class is a whole number from 0, without quotes")
            if int(key.value) in names:
                raise self.error(key, f"names: {key.value} is there twice")
            names[int(key.value)] = self._add_name(item, "names", lines)
        return tuple(names.get(number, "") for number in range(max(names, default=-1) + 1))

    def _add_name(self, item: yaml.Node, key: str, lines: dict[str, int]) -> str:
        """A class name that is not among those of earlier `lines`."""
        name = class_name(self.text(item, f"{key}: a class name"))
        if not is_class_name(name):
            raise self.error(item, f"{key}: {name!r} is no name for a class")
        if name in lines:
            raise self.error(item, f"{key}: {name!r} is there twice, first on line {lines[name]}")
        lines[name] = _line(item)
        return name

    def whole_number(self, key: str) -> int | None:
        """A number from 0, None where the key is missing."""
        node = self.nodes.get(key)
        if node is None:
            return None
        if node.tag != _TAG + "int" or not node.value.isdecimal():
            raise self.error(node, f"{key} must be a whole number, without quotes")
        return int(node.value[:9])

    def flag(self, key: str, *, default: bool) -> bool:
        """True or False as it is written, `default` where the key is missing."""
        node = self.nodes.get(key)
        if node is None:
            return default
        value = yaml.SafeLoader.bool_values.get(str(node.value).lower()) if node.tag == _TAG + "bool" else None
        if value is None:  # `!!bool maybe` has the tag too
            raise self.error(node, f"{key} must be True or False, without quotes")
        return value

    def _read(self) -> dict[str, yaml.Node]:
        """The nodes by their keys: known keys, each once."""
        root = self._compose()
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{self.path} is no data YAML: it must hold keys like TRAIN_DIR_IMAGES: ... or train: ...")
        nodes: dict[str, yaml.Node] = {}
        lines: dict[str, int] = {}
        keys = {str(key.value) for key, _ in root.value}
        self.yolo = "names" in keys and not keys.isdisjoint(("path", "train", "val", "valid"))
        for key_node, node in root.value:
            key = str(key_node.value)
            if self.yolo and key == "valid" and "val" not in keys:
                key = "val"
            if self.yolo and key not in (*ARTICLE, *YOLO, *ANY):
                self.unused.append(one_line(key[:80]))
                continue
            forms = (*ARTICLE, *(YOLO if self.yolo else SHORT), *ANY)
            if not isinstance(key_node, yaml.ScalarNode) or key not in forms:
                known = _OTHER_TOOLS.get(key)
                hint = f" Did you mean {known!r}?" if known else nearest(key, (*ARTICLE, *SHORT, *ANY))
                raise self.error(key_node, f"unknown key {key[:80]!r}.{hint}")
            if key in nodes:
                raise self.error(key_node, f"{key} is there twice, first on line {lines[key]}")
            nodes[key], lines[key] = node, _line(key_node)
        return nodes

    def _compose(self) -> yaml.Node | None:
        try:
            with self.path.open("rb") as file:
                data = file.read(_MAX_YAML_BYTES + 1)
            if len(data) > _MAX_YAML_BYTES:
                raise UserError(f"{self.path} is larger than {_MAX_YAML_BYTES // 1_000_000} MB: no data YAML")
            return yaml.compose(data.decode("utf-8-sig"), Loader=_Loader)
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


class _Loader(yaml.SafeLoader):
    """PyYAML's, which stops at a file that would keep it busy for long."""

    _nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._nodes += 1
        if self._nodes > _MAX_NODES:
            problem = f"more than {_MAX_NODES} keys and values"
            raise yaml.MarkedYAMLError(None, None, problem, self.peek_event().start_mark)
        return super().compose_node(parent, index)


_TAG = "tag:yaml.org,2002:"


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


# --- paths as people write them


def expanded(path: Path) -> Path:
    """The same path, ~ replaced where there is such a home."""
    try:
        return path.expanduser()
    except RuntimeError:  # ~nobody
        return path


def exists(path: Path) -> bool:
    """Whether there is something that can be looked at."""
    try:
        return path.exists()
    except OSError:  # a name too long, a folder that may not be looked into
        return False


def nearest_path(path: Path) -> str:
    """What exists beside `path` under nearly its name."""
    if not exists(path.parent):
        return f" There is no folder {path.parent.absolute()} either"
    try:
        return nearest(path.name, (beside.name for beside in path.parent.iterdir()))
    except OSError:
        return ""
