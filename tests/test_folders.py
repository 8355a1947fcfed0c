"""Results never land on others, and what cannot be written is told in one line."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from boxwright.folders import claim
from boxwright.types import UserError


def test_without_a_name_numbers_count_up(tmp_path: Path) -> None:
    assert [claim(tmp_path / "new" / "parent", None).name for _ in range(3)] == ["res_1", "res_2", "res_3"]


def test_a_taken_name_gets_a_number(tmp_path: Path) -> None:
    (tmp_path / "b_2").write_text("a file stands there")
    assert [claim(tmp_path, "a").name for _ in range(3)] == ["a", "a_2", "a_3"]
    assert [claim(tmp_path, "b").name for _ in range(2)] == ["b", "b_3"]
    assert (tmp_path / "b_2").read_text() == "a file stands there"


def test_a_gap_is_filled_and_nothing_else_touched(tmp_path: Path) -> None:
    for name in ("res_1", "res_3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").write_text(name)
    assert claim(tmp_path, None) == tmp_path / "res_2"
    assert {p.read_text() for p in tmp_path.glob("*/kept")} == {"res_1", "res_3"}


def test_exist_ok_takes_the_folder_as_it_is(tmp_path: Path) -> None:
    first = claim(tmp_path, "a", exist_ok=True)
    (first / "kept").write_text("x")
    assert claim(tmp_path, "a", exist_ok=True) == first == tmp_path / "a"
    assert [p.name for p in first.iterdir()] == ["kept"]  # nor does trying to write leave anything
    assert claim(tmp_path, None, exist_ok=True).name == "res_1"


def test_claims_at_the_same_time_get_a_folder_each(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: claim(tmp_path, "run"), range(40)))
    assert len(set(claimed)) == 40
    assert all(folder.is_dir() for folder in claimed)


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "../a", "/", "a/", "/etc", "a\0b"])
@pytest.mark.parametrize("exist_ok", [False, True])
def test_only_a_plain_name_is_a_name(tmp_path: Path, name: str, exist_ok: bool) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(f'--name {name!r} is not a folder name')}$"):
        claim(tmp_path / "parent", name, exist_ok=exist_ok)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["führt-zu_Wörtern", "with space", ".hidden", "a.b", "运行"])
def test_any_plain_name_is_one(tmp_path: Path, name: str) -> None:
    assert claim(tmp_path, name) == tmp_path / name


def refused(parent: Path, name: str | None, *, exist_ok: bool = False) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(f'cannot write into {parent}: ')}.*Choose another folder$"):
        claim(parent, name, exist_ok=exist_ok)


def test_places_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", None)
    refused(tmp_path / "file" / "below", "a")
    refused(tmp_path, "file", exist_ok=True)
    refused(tmp_path, "x" * 300)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    refused(tmp_path, "a")
