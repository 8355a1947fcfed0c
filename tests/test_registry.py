"""Names are known before PyTorch is, one name is one builder, and a slip gets the nearest right word."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from boxwright import registry
from boxwright.types import UserError


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_are_found_without_pytorch() -> None:
    code = (
        "import sys; from boxwright import registry; print(*registry.entries()); "
        "assert 'torch' not in sys.modules, 'torch was imported'; "
        "assert not any(m.startswith('boxwright.models') for m in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(registry.entries())
    assert "fasterrcnn_vitdet" in done.stdout.split()


@pytest.mark.parametrize("name", registry.entries())
def test_an_entry_says_where_its_builder_is(name: str) -> None:
    entry = registry.find(name)
    line = entry.path.read_text(encoding="utf-8").splitlines()[entry.line - 1]
    assert line.startswith(f"def {entry.function}(")
    assert entry.summary.endswith(".")
    builder = getattr(importlib.import_module(entry.module), entry.function)
    assert Path(inspect.getfile(builder)).samefile(entry.path)
    assert all(p.kind is p.KEYWORD_ONLY for p in inspect.signature(builder).parameters.values())
    assert inspect.signature(builder).parameters["num_classes"].default is inspect.Parameter.empty


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("fasterrcn_vitdet", "fasterrcnn_vitdet"),
        ("fasterrcnn-resnet50-fpn-v2", "fasterrcnn_resnet50_fpn_v2"),
        ("fasterrcnn_squeezenet", "fasterrcnn_squeezenet1_1"),
    ],
)
def test_a_mistyped_name_gets_the_nearest(typed: str, meant: str) -> None:
    message = refusal(lambda: registry.find(typed))
    assert message == f"unknown model {typed!r}. Did you mean {meant!r}?"


@pytest.mark.parametrize("name", ["", "os.system", "../../x", "a\nb", "\x1b[2J"])
def test_a_name_near_nothing_is_told_where_names_are_listed(name: str) -> None:
    assert refusal(lambda: registry.find(name)).endswith("`boxwright models` lists them.")


def test_an_option_that_the_builder_does_not_take() -> None:
    message = refusal(lambda: registry.build("fasterrcnn_vitdet_nano", num_classes=3, drop_pth=0.1))
    assert message == "fasterrcnn_vitdet_nano has no option 'drop_pth'. Did you mean 'drop_path'?"


def test_options_reach_the_builder() -> None:
    detector = registry.build("fasterrcnn_vitdet_nano", num_classes=7, drop_path=0.3)
    assert detector.num_classes == 7
    assert detector.backbone.body.drop_path == pytest.approx(0.3)


def source_tree(tmp_path: Path, request: pytest.FixtureRequest, **files: str) -> None:
    """A package of those files in the place of ours."""
    package = tmp_path / "package"
    for name, text in files.items():
        path = package / "models" / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch = pytest.MonkeyPatch()
    request.addfinalizer(monkeypatch.undo)
    monkeypatch.setattr(registry, "PACKAGE", package)
    monkeypatch.setattr(registry, "BUILDERS", package / "models")
    registry._own.cache_clear()
    request.addfinalizer(registry._own.cache_clear)


BUILDER = '@register("{0}")\ndef build_{0}(*, num_classes):\n    """A {0}.\n\n    More of it."""\n'


def test_a_file_in_any_folder_is_enough(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source_tree(
        tmp_path,
        request,
        one="raise ImportError('never imported')\n" + BUILDER.format("first"),
        deep__er=BUILDER.format("second") + "\n\ndef not_registered(): ...\n\n\n@cache\ndef other(): ...\n",
    )
    found = registry.entries()
    assert set(found) == {"first", "second"}
    second = found["second"]
    assert (second.module, second.function) == ("package.models.deep.er", "build_second")
    assert (second.line, second.summary) == (2, "A second.")


def test_one_name_is_one_builder(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source_tree(tmp_path, request, one=BUILDER.format("same"), two=BUILDER.format("same"))
    with pytest.raises(AssertionError, match=r"same is registered twice: .*one\.py and .*two\.py"):
        registry.entries()


def test_only_identifiers_are_names() -> None:
    def builder() -> None: ...

    assert registry.register("plain_name")(builder) is builder
    for name in ("os.system", "../x", "two words", ""):
        with pytest.raises(AssertionError):
            registry.register(name)(builder)
