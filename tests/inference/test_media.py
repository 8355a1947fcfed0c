"""What is named as input is found, or refused in one line; what of a video decodes is read in time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from boxwright.inference import media
from boxwright.inference.media import Source, open_input, read_video
from boxwright.inference.output import VideoWriter
from boxwright.types import UserError

NTSC = Fraction(30000, 1001)


def level(index: int) -> int:
    """The grey of frame `index` of a drawn clip, which so tells which frame it is."""
    return 20 + 2 * index


def make_clip(
    path: Path,
    count: int = 30,
    rate: Fraction = Fraction(25),
    size: tuple[int, int] = (48, 64),
    *,
    codec: str = "libx264",
    noise: bool = False,
    times: Sequence[Fraction] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """A grey clip, ever brighter, with a red top left corner; `noise` makes every frame take some bytes."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options={"g": "10"})
        stream.height, stream.width = size
        odd = size[0] % 2 or size[1] % 2
        stream.pix_fmt = "yuv444p" if odd else "yuv420p"
        clock = Fraction(1, 600) if times else 1 / rate
        stream.codec_context.time_base = clock
        for index in range(count):
            image = np.full((*size, 3), level(index), np.uint8)
            if noise:
                image[size[0] // 2 :] = rng.integers(0, 256, (size[0] - size[0] // 2, size[1], 3))
            image[: size[0] // 4, : size[1] // 4] = (220, 20, 20)
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.time_base = clock
            frame.pts = round(times[index] / clock) if times else index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def shown(path: Path) -> tuple[list[Fraction], Fraction | None, tuple[int, int]]:
    """Times of its frames from the first on, its rate and its size, as PyAV alone sees them."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stamps = [frame.pts * stream.time_base for frame in container.decode(stream)]
        return [s - stamps[0] for s in stamps], stream.average_rate, (stream.height, stream.width)


def copy(source: Path, target: Path) -> media.Video:
    video = read_video(source)
    with VideoWriter(target, video.rate, video.size, clock=video.clock) as writer:
        for frame in video.frames():
            writer.write(frame.image, frame.time)
    return video


# What a person names


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.jpg", "a.png", ".hidden.jpg", "inner/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "c.mp4").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(sources: list[Source]) -> list[tuple[str, str]]:
    return [(source.kind, Path(source.name).name) for source in sources]


def test_a_folder_gives_its_pictures_and_videos_sorted(folder: Path) -> None:
    assert names(open_input(str(folder))) == [("image", "a.png"), ("image", "b.jpg"), ("video", "c.mp4")]


def test_brackets_in_a_folder_that_exists_are_no_pattern(tmp_path: Path) -> None:
    odd = tmp_path / "mix [1] %s é"
    odd.mkdir()
    Image.new("RGB", (9, 9)).save(odd / "a.jpg")
    assert [source.path.name for source in open_input(str(odd / "*.jpg"))] == ["a.jpg"]


def test_a_number_too_large_for_a_camera_is_a_path() -> None:
    with pytest.raises(UserError, match="no such file"):
        open_input("99999999999999999999")


def test_a_glob_gives_what_it_matches(folder: Path) -> None:
    assert names(open_input("*.[jp]*g")) == [("image", "a.png"), ("image", "b.jpg")]
    assert names(open_input(str(folder / "**" / "*.jpg"))) == [("image", "b.jpg"), ("image", "c.jpg")]


@pytest.mark.parametrize("name", ["a[b].jpg", "0", "frame%03d.png", "a[1-9]"])
def test_what_exists_is_meant_literally(folder: Path, name: str) -> None:
    Image.new("RGB", (8, 6)).save(folder / name, "PNG")
    (folder / "a5").write_bytes((folder / "a.png").read_bytes())
    assert open_input(name) == [Source("image", name)]
    assert open_input(name)[0].path.exists()


def test_the_content_tells_the_kind_before_the_name(folder: Path) -> None:
    make_clip(folder / "clip.mp4", 3).rename(folder / "clip.jpg")
    (folder / "a.png").rename(folder / "picture.mp4")
    assert open_input("clip.jpg")[0].kind == "video"
    assert open_input("picture.mp4")[0].kind == "image"


def test_cameras_and_streams_only_where_plainly_meant(folder: Path) -> None:
    assert open_input("0") == [Source("camera", "0")]
    for url in ("rtsp://host/live", "http://host/a.mp4", "https://host/a.mp4"):
        assert open_input(url, stream=True) == [Source("stream", url)]
        with pytest.raises(UserError, match="--stream"):
            open_input(url)
    with pytest.raises(UserError):
        open_input("concat:a.mp4|b.mp4", stream=True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("b.jgp", r"no such file or folder.*b\.jpg\?"),
        ("*.bmp", "matches no picture or video"),
        ("", "no such file"),
        ("notes.txt", "neither a picture nor a video"),
        ("inner/empty", "no picture or video in this folder"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(folder: Path, text: str, says: str) -> None:
    (folder / "inner/empty").mkdir()
    with pytest.raises(UserError, match=says) as caught:
        open_input(text)
    assert "\n" not in str(caught.value)


def test_an_unknown_path_is_told_with_where_it_was_looked_for(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_input("videos/nothing.mp4")
    assert str(folder / "videos" / "nothing.mp4") in str(caught.value)
    assert f"working directory {folder}" in str(caught.value)


# What is in a video


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts"])
@pytest.mark.parametrize("rate", [Fraction(24), Fraction(25), NTSC], ids=str)
def test_a_copy_has_the_same_frames_at_the_same_times(tmp_path: Path, rate: Fraction, suffix: str) -> None:
    source = make_clip(tmp_path / f"in{suffix}", rate=rate, codec="mpeg4" if suffix == ".avi" else "libx264")
    video = copy(source, tmp_path / "out.mp4")
    assert (video.rate, video.size, video.lost) == (rate, (48, 64), 0)
    times, out_rate, size = shown(tmp_path / "out.mp4")
    assert times == [index / rate for index in range(30)]
    assert (out_rate, size) == (rate, (48, 64))
    if suffix == ".mp4":
        assert video.frames_estimate == 30


@pytest.mark.parametrize("size", [(47, 64), (48, 63), (49, 65)])
def test_a_copy_of_odd_size_gains_a_pixel_at_most(tmp_path: Path, size: tuple[int, int]) -> None:
    video = copy(make_clip(tmp_path / "in.mp4", size=size), tmp_path / "out.mp4")
    assert video.size == size
    times, rate, out_size = shown(tmp_path / "out.mp4")
    assert (len(times), rate) == (30, 25)
    assert out_size == (size[0] + size[0] % 2, size[1] + size[1] % 2)


def test_a_copy_keeps_uneven_times(tmp_path: Path) -> None:
    times = [Fraction(t, 600) for t in np.cumsum([0, 20, 20, 45, 7, 300, 20, 20, 133]).tolist()]
    video = copy(make_clip(tmp_path / "in.mp4", len(times), times=times), tmp_path / "out.mp4")
    assert [frame.time for frame in video.frames()] == times
    assert shown(tmp_path / "out.mp4")[0] == times


def test_frames_come_in_order_and_again(tmp_path: Path) -> None:
    video = read_video(make_clip(tmp_path / "in.mp4"))
    for _ in range(2):
        greys = [frame.image[-1, -1].mean() for frame in video.frames()]
        assert greys == pytest.approx([level(i) for i in range(30)], abs=4)


IDENTITY = bytes.fromhex("00010000 00000000 00000000 00000000 00010000 00000000 00000000 00000000 40000000")
TURNED = {  # display matrices (ISO/IEC 14496-12, tkhd), and the corner at which the stored top left is shown
    90: ("00000000 00010000 00000000 ffff0000 00000000 00000000 00000000 00000000 40000000", (0, -1)),
    180: ("ffff0000 00000000 00000000 00000000 ffff0000 00000000 00000000 00000000 40000000", (-1, -1)),
    270: ("00000000 ffff0000 00000000 00010000 00000000 00000000 00000000 00000000 40000000", (-1, 0)),
}


@pytest.mark.parametrize("clockwise", TURNED)
def test_rotation_is_applied(tmp_path: Path, clockwise: int) -> None:
    path = make_clip(tmp_path / "in.mp4", 3)
    matrix, corner = TURNED[clockwise]
    data = path.read_bytes()
    at = data.index(IDENTITY, data.index(b"tkhd"))
    path.write_bytes(data[:at] + bytes.fromhex(matrix) + data[at + len(IDENTITY) :])
    video = read_video(path)
    assert video.size == ((48, 64) if clockwise == 180 else (64, 48))
    assert video.rotation == 360 - clockwise
    image = next(video.frames()).image
    assert image.shape[:2] == video.size
    reds = {c: int(image[c][0]) - int(image[c][1]) for c in ((0, 0), (0, -1), (-1, 0), (-1, -1))}
    assert max(reds, key=lambda c: reds[c]) == corner


def test_a_change_of_size_is_fitted_into_the_first(tmp_path: Path) -> None:
    wide, tall = make_clip(tmp_path / "a.ts", 10), make_clip(tmp_path / "b.ts", 10, size=(96, 48))
    both = tmp_path / "both.ts"
    both.write_bytes(wide.read_bytes() + tall.read_bytes())
    frames = list(read_video(both).frames())
    assert len(frames) == 20
    assert {frame.image.shape for frame in frames} == {(48, 64, 3)}
    assert frames[-1].image[:, :16].max() < 40  # the bar beside the tall picture
    times = [frame.time for frame in frames]
    assert all(early < late for early, late in pairwise(times))


# What is wrong with a video


def test_a_damaged_middle_is_counted_and_the_rest_read_in_time(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "in.mp4", 60, noise=True, options={"movflags": "+faststart"})
    data = bytearray(path.read_bytes())
    middle, length = len(data) // 2, len(data) // 10
    data[middle : middle + length] = np.random.default_rng(1).integers(0, 256, length, np.uint8).tobytes()
    path.write_bytes(data)
    video = read_video(path)
    frames = list(video.frames())
    assert 40 <= len(frames) < 60
    lost = video.lost
    assert lost >= 60 - len(frames)
    assert frames[-1].time == Fraction(59, 25)
    assert len(list(video.frames())) == len(frames)
    assert video.lost == lost  # counted anew, not on


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_cut_video_says_how_many_frames_are_missing(tmp_path: Path, suffix: str) -> None:
    codec, options = ("mpeg4", {}) if suffix == ".avi" else ("libx264", {"movflags": "+faststart"})
    options = options if suffix == ".mp4" else {}
    path = make_clip(tmp_path / f"in{suffix}", 100, noise=True, codec=codec, options=options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    video = read_video(path)
    read = len(list(video.frames()))
    assert 30 < read < 70
    assert 100 <= read + video.lost <= 102


def test_a_count_that_cannot_be_is_ignored(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "in.avi", codec="mpeg4")
    data = bytearray(path.read_bytes())
    for chunk, field in ((b"avih", 16), (b"strh", 32)):  # dwTotalFrames, dwLength
        at = data.index(chunk) + 8 + field
        data[at : at + 4] = (2**31 - 7).to_bytes(4, "little")
    path.write_bytes(data)
    video = read_video(path)
    assert video.frames_estimate is None
    assert len(list(video.frames())) == 30
    assert video.lost == 0


def test_a_missing_index_is_told(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "in.mp4", noise=True)  # the index comes last
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(UserError, match="moov"):
        read_video(path)


def audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"this is text\n", "text"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nclip.mp4\n#EXT-X-ENDLIST\n", "text"),
        (b"ffconcat version 1.0\nfile clip.mp4\n", "text"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "no known kind"),
        (bytes(range(255, 0, -1)), "no known kind"),
        (b"\x00\x00\x00\x18ftypisom" + bytes(range(256)) * 8, "no video stream"),
        (b"\x1a\x45\xdf\xa3" + b"#EXTM3U\nclip.mp4\n" * 20, "no video stream"),
        (None, "no video stream"),
    ],
    ids=["empty", "text", "hls", "concat", "png", "noise", "mp4 head", "mkv head", "audio"],
)
def test_what_is_no_video_is_refused_in_one_line(tmp_path: Path, content: bytes | None, says: str) -> None:
    make_clip(tmp_path / "clip.mp4", 3)
    path = tmp_path / "in.mp4"
    if content is None:
        audio_only(path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read_video(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_missing_camera_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_video(tmp_path / "none.mp4")
    with pytest.raises(UserError, match="camera 63: not found"):
        read_video(Source("camera", "63"))


# Streams


@contextmanager
def serve(data: bytes, breaks_off: set[int]) -> Iterator[str]:
    """An address that gives `data`; the requests counted in `breaks_off` (from 0) get only half of it."""
    requests = iter(range(1000))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if next(requests) in breaks_off else data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/live.ts"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_stream_is_read_to_its_end(tmp_path: Path) -> None:
    with serve(make_clip(tmp_path / "in.ts", noise=True).read_bytes(), set()) as url:
        video = read_video(open_input(url, stream=True)[0])
        assert [frame.time for frame in video.frames()] == [Fraction(i, 25) for i in range(30)]
        assert video.lost == 0


def test_a_broken_stream_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "RECONNECT_AFTER", (0, 0))
    with serve(make_clip(tmp_path / "in.ts", noise=True).read_bytes(), {1}) as url:
        video = read_video(Source("stream", url))
        times = [frame.time for frame in video.frames()]
    assert len(times) > 35  # nearly half of it, then all of it
    assert video.lost >= 1
    assert min(late - early for early, late in pairwise(times)) == Fraction(1, 25)


def test_a_stream_that_stays_away_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "RECONNECT_AFTER", (0, 0))
    with serve(make_clip(tmp_path / "in.ts", noise=True).read_bytes(), {1}) as url:
        video = read_video(Source("stream", url))
    assert list(video.frames()) == []
    assert video.lost == 3
    with pytest.raises(UserError, match="stream cannot be read"):
        read_video(Source("stream", url))


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "rate", "size"),
    [
        ("bottle-detection.mp4", Fraction(179, 6), (360, 640)),
        ("car-detection.mp4", Fraction(25, 2), (432, 768)),
    ],
)
def test_real_videos_keep_their_times(
    real_data: Path, tmp_path: Path, name: str, rate: Fraction, size: tuple[int, int]
) -> None:
    video = read_video(real_data / "video" / name)
    assert (video.rate, video.size, video.rotation) == (rate, size, 0)
    with VideoWriter(tmp_path / "out.mp4", video.rate, video.size, clock=video.clock) as writer:
        for frame, _ in zip(video.frames(), range(20), strict=False):
            writer.write(frame.image, frame.time)
    assert shown(tmp_path / "out.mp4") == ([index / rate for index in range(20)], rate, size)
