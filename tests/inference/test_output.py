"""What is written is whole or absent, plays in time and in its colours, and never lands on another's name."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from boxwright.inference import output
from boxwright.inference.media import read_video
from boxwright.inference.output import VideoWriter, unique_names, write_image
from boxwright.types import UInt8, UserError

RATE = Fraction(25)


def picture(size: tuple[int, int] = (48, 64), seed: int = 0) -> UInt8:
    """Soft colours, such as survive a photograph's compression."""
    small = np.random.default_rng(seed).integers(40, 216, (3, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC))


# Videos


@pytest.mark.parametrize("size", [(48, 64), (47, 63), (720, 1280)])
def test_a_video_keeps_its_colours(tmp_path: Path, size: tuple[int, int]) -> None:
    # With one colour matrix at writing and another at reading, as by size, these are off by 15 to 40.
    colours = [(220, 30, 30), (30, 220, 30), (30, 30, 220), (255, 255, 255), (0, 0, 0), (240, 200, 20)]
    with VideoWriter(tmp_path / "out.mp4", RATE, size) as writer:
        for colour in colours:
            writer.write(np.full((*size, 3), colour, np.uint8))
    read = [frame.image for frame in read_video(tmp_path / "out.mp4").frames()]
    assert len(read) == len(colours)
    for colour, image in zip(colours, read, strict=True):
        assert image.mean(axis=(0, 1)) == pytest.approx(colour, abs=5)


def test_a_video_is_what_browsers_play(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    with VideoWriter(path, RATE, (48, 64), clock=Fraction(1, 12800)) as writer:
        writer.write(picture())
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.frames, stream.average_rate) == (1, RATE)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # the index first


def test_an_aborted_video_leaves_nothing(tmp_path: Path) -> None:
    def interrupt() -> None:
        with VideoWriter(tmp_path / "out.mp4", RATE, (48, 64)) as writer:
            for _ in range(100):
                writer.write(picture())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert list(tmp_path.iterdir()) == []


def test_an_aborted_video_leaves_an_earlier_one_whole(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_bytes(b"earlier")
    with (
        pytest.raises(UserError, match="no frame to write"),
        VideoWriter(tmp_path / "out.mp4", RATE, (48, 64)),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"earlier"


def test_without_an_h264_encoder_the_video_is_mpeg4_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(output, "ENCODERS", ("no_such_encoder", "mpeg4"))
    with VideoWriter(tmp_path / "out.mp4", RATE, (48, 64), clock=Fraction(1, 12800)) as writer:
        for seed in range(5):
            writer.write(picture(seed=seed))
    assert "no_such_encoder" in caplog.text
    video = read_video(tmp_path / "out.mp4")
    assert (len(list(video.frames())), video.rate) == (5, RATE)


# Pictures


@pytest.mark.parametrize(("name", "near"), [("out.png", 0), ("out.jpg", 3), ("Ü ä.JPEG", 3)])
def test_a_picture_reads_back(tmp_path: Path, name: str, near: int) -> None:
    write_image(tmp_path / name, picture())
    with Image.open(tmp_path / name) as again:
        difference = np.abs(np.asarray(again).astype(int) - picture())
    assert difference.mean() <= near
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_thin_coloured_lines_do_not_smear(tmp_path: Path) -> None:
    image = np.full((32, 32, 3), 128, np.uint8)
    image[:, 15] = (255, 0, 0)
    write_image(tmp_path / "out.jpg", image)
    with Image.open(tmp_path / "out.jpg") as again:
        red, green, _ = np.asarray(again)[16, 15].tolist()
    assert red > 220
    assert green < 40


# Errors of the disk


def refusals(path: Path) -> list[UserError]:
    """The errors of writing a picture and a video under `path`'s folder."""
    with pytest.raises(UserError) as of_image:
        write_image(path.with_suffix(".jpg"), picture())
    with pytest.raises(UserError) as of_video, VideoWriter(path, RATE, (48, 64)) as writer:
        writer.write(picture())
    return [of_image.value, of_video.value]


def test_a_folder_that_is_not_there_is_the_persons_mistake(tmp_path: Path) -> None:
    for error in refusals(tmp_path / "none" / "out.mp4"):
        assert str(tmp_path / "none" / "out.") in str(error)
        assert error.exit_code == 2


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root and Windows write everywhere")
def test_a_read_only_folder_is_the_persons_mistake(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    for error in refusals(tmp_path / "out.mp4"):
        assert "ermission" in str(error)
        assert error.exit_code == 2
    tmp_path.chmod(0o755)


def test_other_kinds_of_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.jpg or \.png"):
        write_image(tmp_path / "out.gif", picture())


FULL_DISK = """
import resource, sys
from fractions import Fraction
from pathlib import Path
import numpy as np
from boxwright.inference.output import VideoWriter, write_image
from boxwright.types import UserError

folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
try:
    if sys.argv[2] == "image":
        write_image(folder / "out.png", noise)
    else:
        with VideoWriter(folder / "out.mp4", Fraction(25), (240, 320)) as writer:
            for _ in range(int(sys.argv[2])):
                writer.write(noise)
except UserError as error:
    sys.exit(f"{error.exit_code} {error}")
"""


@pytest.mark.skipif(os.name == "nt", reason="a limit of file size stands for the full disk")
@pytest.mark.parametrize("what", ["image", "1", "30", "100"])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, what: str) -> None:
    command = [sys.executable, "-W", "error", "-c", FULL_DISK, str(tmp_path), what]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr.startswith("74 "), done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# Names


def test_names_of_neighbours_stay_apart() -> None:
    paths = [Path(p) for p in ("a.jpg", "a.png", "a.b.jpg", "a.c.jpg", "one/x.jpg", "two/x.jpg", "two/X.JPG")]
    assert list(unique_names(paths).values()) == ["a", "a_png", "a.b", "a.c", "x", "x_jpg", "two_X"]


parts = st.text(st.sampled_from("aAéE\u0301_.2"), min_size=1, max_size=3).filter(lambda s: s.strip("."))


@given(st.lists(st.builds(Path, st.sampled_from(["f", "g"]), parts), max_size=12))
def test_names_never_collide(paths: list[Path]) -> None:
    names = unique_names(paths)
    assert set(names) == set(paths)
    assert len({output._folded(name) for name in names.values()}) == len(names)
    assert all(name and "/" not in name for name in names.values())
    assert unique_names(paths) == names
