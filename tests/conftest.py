"""What every test may ask for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets named by BOXWRIGHT_TEST_DATA; the test is skipped where there is none."""
    folder = os.environ.get("BOXWRIGHT_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("BOXWRIGHT_TEST_DATA does not name a folder of real data")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data.yaml of 8 + 4 drawn pictures of 64x64 in two classes; not to be changed."""
    from boxwright.data.synth import synthesize

    folder = tmp_path_factory.mktemp("drawn") / "final_xml_dataset"
    return synthesize(
        folder, train=8, valid=4, size=(64, 64), classes=("circle", "square"), objects=(1, 2), scale=(0.3, 0.6)
    )


@pytest.fixture(scope="session")
def trained(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on `drawn`, two epochs at 64 px; not to be changed."""
    from boxwright.verbs import train

    return train(
        model="fasterrcnn_vitdet_nano", data=str(drawn), epochs=2, batch=4, imgsz=64, optimizer="adamw", lr=0.002,
        device="cpu", name="trained", project_dir=tmp_path_factory.mktemp("training"), quiet=True,
    ).folder  # fmt: skip
