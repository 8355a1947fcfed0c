"""What every test may ask for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("boxwright", deadline=None)  # a busy machine is no failure
settings.load_profile("boxwright")


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


@pytest.fixture(scope="session")
def make_voc() -> Callable[..., Path]:
    """Writes dark pictures with bright boxes of class `thing` and their XML: `train/a.jpg: [[x1, y1, x2, y2], ...]`."""
    import numpy as np
    from PIL import Image

    def make_voc(folder: Path, pictures: Mapping[str, Sequence[Sequence[float]]], size: int = 64) -> Path:
        for name, boxes in pictures.items():
            image = folder / Path(name).parent / "images" / Path(name).name
            labels = folder / Path(name).parent / "labels" / f"{image.stem}.xml"
            for parent in (image.parent, labels.parent):
                parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(len(name)).integers(0, 60, (size, size, 3), np.uint8)
            objects = ""
            for x1, y1, x2, y2 in boxes:
                pixels[round(y1) : round(y2), round(x1) : round(x2)] = 230
                corners = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}  # 1-based, inclusive
                box = "".join(f"<{corner}>{value}</{corner}>" for corner, value in corners.items())
                objects += f"<object><name>thing</name><bndbox>{box}</bndbox></object>"
            Image.fromarray(pixels).save(image)
            labels.write_text(f"<annotation>{objects}</annotation>", encoding="utf-8")
        return folder

    return make_voc
