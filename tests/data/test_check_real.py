"""On real datasets the doctor finds what is there, and nothing that is not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from boxwright.data.check import Checked, check_dataset
from boxwright.data.check.mend import mend_dataset

pytestmark = pytest.mark.real_data


def kinds(checked: Checked) -> dict[str, int]:
    found: Counter[str] = Counter()
    for (_, kind, _), count in checked.findings.counts.items():
        found[kind] += count
    return dict(found)


def test_bccd_has_two_boxes_without_area(real_data: Path) -> None:
    checked = check_dataset(real_data / "bccd" / "BCCD", decode=True)
    assert kinds(checked) == {"no-area": 2}
    assert sorted((Path(f.path or "").name, f.line) for f in checked.findings) == [
        ("BloodImage_00338.xml", 158), ("BloodImage_00343.xml", 50),
    ]  # fmt: skip
    assert checked.errors == 0


def test_raccoon_has_grey_pictures_and_four_pairs(real_data: Path) -> None:
    checked = check_dataset(real_data / "raccoon", decode=True)
    assert len(checked.groups) == 4
    assert all(len(group.members) == 2 and group.labels_differ for group in checked.groups)
    grey = sorted(Path(f.path or "").stem for f in checked.findings if f.kind == "grey")
    assert grey == ["raccoon-150", "raccoon-152", "raccoon-161"]
    assert set(kinds(checked)) == {"grey", "leak", "same-picture-other-labels", "whole-picture"}
    assert kinds(checked)["whole-picture"] == 1  # raccoon-3, which fills it


def test_voc_has_parts_and_difficult_objects_and_nothing_wrong(real_data: Path) -> None:
    checked = check_dataset(real_data / "voc_mini" / "VOCdevkit", decode=True)
    assert set(kinds(checked)) == {"no-val-objects"}
    train, val = checked.splits["train"], checked.splits["val"]
    assert train.difficult + val.difficult == 41
    assert train.parts + val.parts > 0


def test_voc_of_size_has_nothing_wrong(real_data: Path) -> None:
    checked = check_dataset(real_data / "voc12_subset" / "VOCdevkit")
    found = kinds(checked)
    assert set(found) == {"no-train-objects", "no-val-objects", "whole-picture"}
    missing = [found.classes for found in checked.findings if found.kind == "no-train-objects"]
    assert sorted(sum(missing, ())) == ["aeroplane", "train"]
    assert checked.splits["train"].pictures + checked.splits["val"].pictures == 2883


def test_bccd_is_mended(real_data: Path, tmp_path: Path) -> None:
    done = mend_dataset(real_data / "bccd" / "BCCD", tmp_path / "fixed", copy=True)
    assert (done.changes, done.left_out) == (2, 0)
    assert kinds(check_dataset(tmp_path / "fixed")) == {}
