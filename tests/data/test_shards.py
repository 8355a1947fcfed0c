"""A dataset as shards: the same records and batches as from its files, from a disk or a server, and nothing else."""

from __future__ import annotations

import json
import shutil
import socket
import tarfile
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from tests.data.served import served
from tests.data.test_loader import digest, training

from boxwright import verbs
from boxwright.__main__ import main
from boxwright.config import MAY_CHANGE, make_run
from boxwright.data import members
from boxwright.data.cache import opened
from boxwright.data.dataset import open_dataset
from boxwright.data.feeding import ReadingError
from boxwright.data.images import ImageError, decode, read_bytes
from boxwright.data.loader import ordered_batches, training_batches
from boxwright.data.placing import BEGUN
from boxwright.data.synth import synthesize
from boxwright.data.transforms import Fit, random_flip
from boxwright.inference.predictor import Predictor
from boxwright.types import Member, Record, UserError

FIT = Fit(64)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn dataset, one of its pictures a PNG and one turned by EXIF."""
    folder = tmp_path_factory.mktemp("files") / "final"
    data = synthesize(folder, train=9, valid=3, size=(48, 64), classes=("circle", "star"), objects=(1, 3))
    image = folder / "train" / "images" / "train_00003.jpg"
    Image.open(image).save(image.with_suffix(".png"))
    image.unlink()
    return data


@pytest.fixture(scope="module")
def sharded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in shards; of 1 MB would be one, so each holds a few pictures."""
    folder = tmp_path_factory.mktemp("sharded") / "shards"
    from boxwright.data import shards

    shards.shard(open_dataset(source), folder, size=9_000, tolerance={}, say=lambda _: None)
    assert len(list(folder.glob("train-*.tar"))) > 2
    return folder


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(members, "PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setattr(members, "_without_ranges", set())
    members._whole.cache_clear()


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def read(data: str | Path, split: str = "train") -> tuple[Record, ...]:
    return open_dataset(data).read(split).records  # type: ignore[arg-type]


# The same as from files


@pytest.mark.parametrize("split", ["train", "val"])
def test_records_are_those_of_the_files(source: Path, sharded: Path, split: str) -> None:
    files, shards = (open_dataset(data) for data in (source, sharded))
    assert files.classes == shards.classes
    ours, theirs = files.read(split), shards.read(split)  # type: ignore[arg-type]
    assert files.fingerprint(ours) == shards.fingerprint(theirs)
    for a, b in zip(ours.records, theirs.records, strict=True):
        assert (a.id, a.size) == (b.id, b.size)
        for name in ("boxes", "labels", "difficult", "truncated", "crowd", "occluded", "pose"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert isinstance(a.image, Path)
        assert isinstance(b.image, Member)
        assert read_bytes(b.image) == a.image.read_bytes()
        np.testing.assert_array_equal(decode(b.image), decode(a.image))


def hashes(records: tuple[Record, ...], workers: int, **options: Any) -> list[str]:
    """Of three epochs, of the same gone on with in the middle, of their two halves joined, and of an evaluation."""
    steps = 3 * -(-len(records) // 2)
    train = {"batch": 2, "augmentations": (random_flip(0.5),), "seed": 3, "workers": workers, **options}
    straight = digest(islice(training(records, FIT, **train), steps))
    later = digest(islice(training(records, FIT, start_step=7, **train), steps - 7))
    halves = [
        islice(training_batches(records, FIT, rank=rank, ranks=2, **train), steps) for rank in (0, 1)
    ]  # fmt: skip
    seen: list[list[str]] = [[], [], []]
    for step, shares in enumerate(zip(*halves, strict=True)):
        seen[step * 3 // steps] += [name for share in shares for name in share.batch.ids[: share.pictures]]
    assert all(sorted(names) == sorted(record.id for record in records) for names in seen)  # none twice, none left out
    judged = digest(ordered_batches(records, FIT, batch=2, workers=workers, cache=options.get("cache")))
    return [straight, later, judged, repr(seen)]


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_batches_are_those_of_the_files(source: Path, sharded: Path, workers: int) -> None:
    wanted = hashes(read(source), 0)
    assert hashes(read(source), workers) == wanted
    assert hashes(read(sharded), workers) == wanted
    with opened("disk", 1e8, "it", 1 << 20) as cache:
        assert hashes(read(source), workers, cache=cache) == wanted
        assert hashes(read(sharded), workers, cache=cache) == wanted
    with served(sharded) as server:
        assert hashes(read(server.address), workers) == wanted
        assert any("bytes=" in asked for asked in server.asked)


def test_two_ranks_joined_are_one(source: Path, sharded: Path) -> None:
    alone = [b.images.numpy() for b in islice(training(read(source), FIT, batch=4, seed=1), 6)]
    shares = zip(
        *(islice(training_batches(read(sharded), FIT, batch=4, seed=1, rank=r, ranks=2), 6) for r in (0, 1)),
        strict=True,
    )
    for images, both in zip(alone, shares, strict=True):
        np.testing.assert_array_equal(np.concatenate([s.batch.images.numpy()[: s.pictures] for s in both]), images)


def test_marks_poses_odd_names_and_fractions_survive(tmp_path: Path) -> None:
    pixels = np.zeros((40, 50, 3), np.uint8)
    (tmp_path / "data" / "a").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "data" / "a" / "ü.b c.png")
    Image.fromarray(pixels).save(tmp_path / "data" / "a" / "plain.png")
    box = [1.1, 2.3, 30.7, 20.9]
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 7, "bbox": box, "iscrowd": 1, "attributes": {"occluded": True}},
        {"id": 2, "image_id": 1, "category_id": 7, "bbox": [3, 4, 5, 6], "ignore": 1, "pose": "Left", "truncated": 1},
        {"id": 3, "image_id": 2, "category_id": 7, "bbox": [1, 2, 3, 4]},
    ]
    images = [{"id": 1, "file_name": "a/ü.b c.png"}, {"id": 2, "file_name": "a/plain.png"}]
    document = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "größe 1"}]}
    (tmp_path / "data" / "all.json").write_text(json.dumps(document), encoding="utf-8")
    verbs.shard(tmp_path / "data" / "all.json", tmp_path / "shards")
    before, after = open_dataset(tmp_path / "data" / "all.json"), open_dataset(tmp_path / "shards")
    for split in ("train", "val"):
        assert before.fingerprint(before.read(split)) == after.fingerprint(after.read(split))  # type: ignore[arg-type]
    (odd,) = [record for split in ("train", "val") for record in read(tmp_path / "shards", split) if "ü" in record.id]
    assert odd.crowd.tolist() == [True, False]
    assert odd.occluded.tolist() == [True, False]
    assert odd.difficult.tolist() == [False, True]
    assert odd.truncated.tolist() == [False, True]
    assert odd.pose.tolist() == ["", "Left"]
    again = tmp_path / "again"
    verbs.shard(tmp_path / "shards", again)  # shards of shards are the same shards
    assert files_of(again) == files_of(tmp_path / "shards")


# What is written


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_are_what_webdataset_reads(source: Path, sharded: Path) -> None:
    names: list[str] = []
    for path in sorted(sharded.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            entries = tar.getmembers()
            names += [entry.name for entry in entries]
            for picture, described in zip(entries[::2], entries[1::2], strict=True):
                key, _, kind = picture.name.partition(".")
                assert described.name == f"{key}.json"
                assert kind in ("jpg", "png")
                file = tar.extractfile(described)
                assert file is not None
                sample = json.load(file)
                assert {"id", "width", "height", "objects"} == set(sample)
                assert (sample["width"], sample["height"]) == (64, 48)
                assert all({"class", "box"} <= set(thing) for thing in sample["objects"])
            assert {entry.mtime for entry in entries} == {0}
    assert names == [f"{n:08d}.{kind}" for n in range(9) for kind in ("png" if n == 3 else "jpg", "json")]
    assert len(read(source)) == 9


def test_the_same_dataset_gives_the_same_bytes(source: Path, sharded: Path, tmp_path: Path) -> None:
    verbs.shard(source, tmp_path / "one")
    verbs.shard(source, tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert sorted(files_of(tmp_path / "one")) == ["train-000000.tar", "train.json", "val-000000.tar", "val.json"]


def test_never_half_a_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from boxwright.data import shards

    class CutOffError(Exception):
        pass

    def cut_off(*_: object) -> bytes:
        raise CutOffError

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_described", cut_off)
        with pytest.raises(CutOffError):
            verbs.shard(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").is_dir()
    verbs.shard(source, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    assert len(read(tmp_path / "out")) == 9


def test_nothing_of_others_is_removed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        verbs.shard(source, tmp_path / "out")
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        verbs.shard(source, tmp_path / "other")
    assert (tmp_path / "other.partial" / "thesis.txt").read_text() == "x"


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, None being a folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_the_source_is_never_where_the_shards_grow(
    source: Path, sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What grows is begun anew: shards that are read from there would be removed first."""
    shutil.copytree(sharded, tmp_path / "d.partial")
    shutil.copytree(source.parent, tmp_path / "e.partial" / "inner")
    shutil.copytree(source.parent, tmp_path / "files")
    (tmp_path / "f.partial").symlink_to(tmp_path / "files")
    before = tree(tmp_path)
    for data, folder in (
        ("d.partial", "d"),
        ("e.partial/inner", "e"),
        ("e.partial/inner/data.yaml", "e"),
        ("files", "f"),
        ("files", "files/shards"),
        ("files", "files/train/images/shards"),
        ("files/data.yaml", "files/train/images/shards"),
    ):
        assert main(["data", "shard", str(tmp_path / data), str(tmp_path / folder)]) == 2
        said = capsys.readouterr().err
        assert "the source" in said
        assert tree(tmp_path) == before
        assert not (tmp_path / folder).exists()


def test_pictures_behind_links_are_not_removed_either(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source.parent, tmp_path / "files")
    image = tmp_path / "files" / "train" / "images" / "train_00000.jpg"
    (tmp_path / "d.partial").mkdir()
    image.replace(tmp_path / "d.partial" / "train.json")
    image.symlink_to(tmp_path / "d.partial" / "train.json")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="where the source is"):
        verbs.shard(tmp_path / "files", tmp_path / "d")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "names", [["a.json", "thesis.txt"], ["train-000000.tar"], ["train.json"], [BEGUN, "a.json"], [BEGUN, "val.tar"]]
)
def test_only_what_an_earlier_call_left_is_removed(names: list[str], source: Path, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / "out.partial").mkdir(exist_ok=True)
        (tmp_path / "out.partial" / name).write_text("years of work")
    with pytest.raises(UserError, match="no call that was cut off"):
        verbs.shard(source, tmp_path / "out")
    assert files_of(tmp_path / "out.partial") == dict.fromkeys(names, b"years of work")


def test_without_room_nothing_is_left(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(UserError, match="no room"):
        verbs.shard(source, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
    (tmp_path / "out.partial").mkdir()  # another's, if empty
    with pytest.raises(UserError, match="no room"):
        verbs.shard(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out.partial"]


def test_the_command_prints_what_it_wrote(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "shard", str(source), str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["pictures"] == {"train": 9, "val": 3}
    assert printed["shards"] == 2
    assert main(["data", "shard", str(source), str(tmp_path / "out2"), "--size-mb", "0"]) == 2
    assert not (tmp_path / "out2").exists()


def test_evaluate_takes_shards(source: Path, trained: Path, drawn: Path, tmp_path: Path) -> None:
    verbs.shard(drawn, tmp_path / "shards")
    weights = trained / "best_model.safetensors"
    ours = verbs.evaluate(weights, drawn, project_dir=tmp_path / "a", device="cpu")
    with served(tmp_path / "shards") as server:
        theirs = verbs.evaluate(weights, server.address, project_dir=tmp_path / "b", device="cpu", workers=1)
    assert repr(ours.scores) == repr(theirs.scores)


# Shards that are not right


def damage_byte(folder: Path) -> None:
    path = folder / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


def test_a_damaged_picture_is_told_and_left_out(sharded: Path, tmp_path: Path) -> None:
    folder = copied(sharded, tmp_path)
    damage_byte(folder)
    records = read(folder)
    with pytest.raises(ImageError, match=r"train-000000\.tar/00000000\.jpg: is not what the index says"):
        decode(records[0].image)
    epoch = list(islice(training(records, FIT, batch=1), len(records)))
    assert records[0].id not in {batch.ids[0] for batch in epoch}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "train-000001.tar").unlink(), "is not there"),
        (lambda f: (f / "train-000001.tar").write_bytes(b"x"), "it was cut or changed"),
    ],
)
def test_missing_and_cut_shards_are_refused_at_once(
    sharded: Path, tmp_path: Path, spoil: Callable[[Path], Any], says: str
) -> None:
    folder = copied(sharded, tmp_path)
    spoil(folder)
    with pytest.raises(UserError, match=rf"train-000001\.tar.*{says}"):
        read(folder)


def at(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(index: Any) -> None:
        for key in path[:-1]:
            index = index[key]
        index[path[-1]] = to

    return change


BAD = {
    "version": at("boxwright_shards", to=2),
    "version is true": at("boxwright_shards", to="1"),
    "no records": at("records", to=None),
    "classes no list": at("classes", to={"a": 1}),
    "class no name": at("classes", 0, to=""),
    "class twice": at("classes", 0, to="star"),
    "traversal": at("shards", 0, "name", to="../train-000000.tar"),
    "absolute": at("shards", 0, "name", to="/etc/passwd"),
    "address": at("shards", 0, "name", to="http://example.com/a.tar"),
    "hidden": at("shards", 0, "name", to=".."),
    "shard no object": at("shards", 0, to="train-000000.tar"),
    "shard twice": at("shards", 0, "name", to="train-000001.tar"),
    "huge shard": at("shards", 0, "size", to=1 << 60),
    "size text": at("shards", 0, "size", to="5"),
    "digest": at("shards", 0, "sha256", to="00"),
    "row short": at("records", 0, to=["a", 0]),
    "row object": at("records", 0, to={"id": "a"}),
    "id": at("records", 0, 0, to=5),
    "id with a control": at("records", 0, 0, to="a\n"),
    "shard number": at("records", 0, 1, to=99),
    "shard negative": at("records", 0, 1, to=-1),
    "member traversal": at("records", 0, 2, to="../x.jpg"),
    "offset negative": at("records", 0, 3, to=-512),
    "offset beyond": at("records", 0, 3, to=1 << 40),
    "offset fraction": at("records", 0, 3, to=1.5),
    "length zero": at("records", 0, 4, to=0),
    "length huge": at("records", 0, 4, to=1 << 40),
    "overlap": at("records", 1, 3, to=600),
    "crc": at("records", 0, 5, to=1 << 32),
    "height bool": at("records", 0, 6, to=True),
    "height zero": at("records", 0, 6, to=0),
    "a bomb": at("records", 0, 6, to=90_000_000),
    "objects": at("records", 0, 8, to="none"),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_a_bad_index_is_one_clear_line(
    sharded: Path, tmp_path: Path, change: Callable[[Any], None], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(sharded, tmp_path)
    index = json.loads((folder / "train.json").read_text("utf-8"))
    change(index)
    (folder / "train.json").write_text(json.dumps(index), encoding="utf-8")
    assert main(["data", "shard", str(folder), str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err.strip()
    assert "train.json" in told
    assert "\n" not in told
    assert not (tmp_path / "out").exists()


def test_an_index_that_is_no_json_is_one_clear_line(sharded: Path, tmp_path: Path) -> None:
    folder = copied(sharded, tmp_path)
    (folder / "train.json").write_text('{"boxwright_shards": 1, "records": [')
    with pytest.raises(UserError, match=r"train\.json:1: is no JSON"):
        read(folder)


@pytest.mark.parametrize("thing", [[99, 1, 2, 30, 40, 0], [0, "a", 2, 30, 40, 0], [0, 30, 2, 1, 40, 0], "x", [0, 1]])
def test_an_object_that_cannot_be_is_a_contradiction(sharded: Path, tmp_path: Path, thing: Any) -> None:
    folder = copied(sharded, tmp_path)
    index = json.loads((folder / "train.json").read_text("utf-8"))
    index["records"][2][8] = [thing, [0, 1, 2, 30, 40, 0]]
    (folder / "train.json").write_text(json.dumps(index), encoding="utf-8")
    dataset = open_dataset(folder)
    with pytest.raises(UserError, match="cannot be right"):
        dataset.read("train")
    assert len(dataset.read("train", skip_bad=True).records[2].boxes) == 1


def test_a_size_that_the_index_does_not_know_is_told(sharded: Path, tmp_path: Path) -> None:
    folder = copied(sharded, tmp_path)
    index = json.loads((folder / "train.json").read_text("utf-8"))
    index["records"][0][6:8] = [480, 640]
    (folder / "train.json").write_text(json.dumps(index), encoding="utf-8")
    records = read(folder)
    batches = ordered_batches(records[:1], FIT, batch=1)
    assert not next(batches).images.any()  # black: its objects count as missed


# From a server


def test_a_connection_is_kept(sharded: Path) -> None:
    with served(sharded) as server:
        records = read(server.address)
        before = server.connections
        for record in records:
            decode(record.image)
        assert server.connections <= before + 1
        assert sum("bytes=" in asked for asked in server.asked) == len(records)


def test_passing_faults_are_tried_again(sharded: Path) -> None:
    with served(sharded) as server:
        (record, *_) = read(server.address)
        wanted = decode(record.image)
        server.failing = 2
        np.testing.assert_array_equal(decode(record.image), wanted)
        server.cutting = 3
        np.testing.assert_array_equal(decode(record.image), wanted)


@pytest.mark.parametrize(("status", "tries"), [(503, 4), (403, 1), (404, 1)])
def test_a_server_that_does_not_give_it_is_named(sharded: Path, status: int, tries: int) -> None:
    with served(sharded) as server:
        (record, *_) = read(server.address)
        server.asked.clear()
        server.failing, server.status = 99, status
        with pytest.raises(ReadingError, match=rf"train-000000\.tar.*{status}"):
            decode(record.image)
        assert len(server.asked) == tries


def test_a_server_that_is_gone_ends_the_reading(sharded: Path) -> None:
    with served(sharded) as server:
        records = read(server.address)
    with pytest.raises(ReadingError, match=r"train-00000\d\.tar cannot be read"):
        next(training(records, FIT, batch=2, workers=1))


def test_without_ranges_a_shard_is_fetched_once(sharded: Path, source: Path) -> None:
    with served(sharded) as server:
        server.ranges = False
        records = read(server.address)
        server.asked.clear()
        for record, file in zip(records, read(source), strict=True):
            assert read_bytes(record.image) == read_bytes(file.image)
        shards = {record.image.shard for record in records if isinstance(record.image, Member)}
        whole = [asked for asked in server.asked if "bytes=" not in asked]
        assert len(whole) == len(shards)


def test_a_fetched_shard_must_be_the_right_one(sharded: Path, tmp_path: Path) -> None:
    folder = copied(sharded, tmp_path)
    damage_byte(folder)
    with served(folder) as server:
        server.ranges = False
        (record, *_) = read(server.address)
        with pytest.raises(ReadingError, match="SHA-256"):
            decode(record.image)


def test_bytes_that_are_others_are_no_picture(sharded: Path, tmp_path: Path) -> None:
    folder = copied(sharded, tmp_path)
    damage_byte(folder)
    with served(folder) as server:
        (record, *_) = read(server.address)
        with pytest.raises(ImageError, match="is not what the index says"):
            decode(record.image)


@pytest.mark.parametrize(
    "address",
    [
        "http://example.com/data", "http://192.168.0.1/data", "http://127.0.0.1.example.com/data",
        "https://user:secret@example.com/data", "https://example.com/data?key=1", "http:///data",
        "http://[::1/data", "https://exa mple.com/data", "http://localhost:99999999/data",
    ],
)  # fmt: skip
def test_addresses_that_are_not_safe_are_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("it was asked"))
    with pytest.raises(UserError) as caught:
        open_dataset(address)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("target", ["http://example.com/x.tar", "ftp://127.0.0.1/x", "file:///etc/passwd"])
def test_a_redirect_to_what_is_not_safe_is_refused(sharded: Path, target: str) -> None:
    with served(sharded) as server:
        (record, *_) = read(server.address)
        server.redirect = target
        with pytest.raises(ReadingError, match="redirected"):
            decode(record.image)


def test_an_endless_redirect_ends(sharded: Path) -> None:
    with served(sharded) as server:
        (record, *_) = read(server.address)
        server.redirect = f"{server.address}/train-000000.tar"
        with pytest.raises(ReadingError, match="redirected more than"):
            decode(record.image)


def test_an_address_without_a_dataset_is_said(tmp_path: Path) -> None:
    with served(tmp_path) as server, pytest.raises(UserError, match=r"no dataset at .*train\.json"):
        open_dataset(server.address)


def test_without_val_a_tenth_is_drawn(sharded: Path, tmp_path: Path) -> None:
    folder = copied(sharded, tmp_path)
    (folder / "val.json").unlink()
    drawn = {split: {record.id for record in read(folder, split)} for split in ("train", "val")}
    with served(folder) as server:
        assert {split: {r.id for r in read(server.address, split)} for split in ("train", "val")} == drawn
    assert drawn["val"]
    assert len(drawn["train"] | drawn["val"]) == 9
    assert not drawn["train"] & drawn["val"]


def test_a_member_without_a_cache_key_of_its_own_is_not_confused(sharded: Path, tmp_path: Path) -> None:
    """Two pictures of one shard, in one cache."""
    records = read(sharded)
    swapped = [replace(records[1], id=records[0].id), records[0]]
    with opened("disk", 1e8, "it", 1 << 20) as cache:
        for these in (records[:2], swapped):
            assert digest(ordered_batches(these, FIT, batch=2, cache=cache)) == digest(
                ordered_batches(these, FIT, batch=2)
            )


# Whole runs


def test_a_run_is_the_same_from_files_shards_a_server_and_the_cache(drawn: Path, tmp_path: Path) -> None:
    verbs.shard(drawn, tmp_path / "shards")

    def weights(name: str, data: str | Path, **options: Any) -> bytes:
        made = verbs.train(
            model="fasterrcnn_vitdet_nano", data=str(data), max_steps=3, batch=4, imgsz=64, device="cpu", name=name,
            project_dir=tmp_path / "runs", use_train_aug=True, group_aspect=True, quiet=True, **options,
        )  # fmt: skip
        with safe_open(str(made.folder / "last_model.safetensors"), "np") as file:
            return b"".join(file.get_tensor(key).tobytes() for key in sorted(file.keys()))

    wanted = weights("files", drawn)
    assert weights("cached", drawn, cache="disk", cache_gb=0.1, workers=2) == wanted
    assert list((tmp_path / "cache" / "pictures").glob("*/??/*"))
    assert weights("shards", tmp_path / "shards", workers=1) == wanted
    with served(tmp_path / "shards") as server:
        assert weights("served", server.address) == wanted


def test_scaled_decoding_goes_with_the_checkpoint(tmp_path: Path) -> None:
    data = synthesize(tmp_path / "large", train=4, valid=2, size=(200, 260), classes=("circle",), objects=(1, 1))
    made = verbs.train(
        model="fasterrcnn_vitdet_nano", data=str(data), max_steps=2, batch=2, imgsz=96, device="cpu", name="it",
        project_dir=tmp_path / "runs", decode_scaled=True, multi_scale=(64, 96), quiet=True,
    )  # fmt: skip
    predictor = Predictor.load(made.folder / "last_model.safetensors", device="cpu")
    assert predictor.fit == Fit(96, decode_scaled=True)
    records = read(data, "val")
    together = predictor.predict_records(records, batch=2)
    for record, found in zip(records, together, strict=True):
        alone = predictor.predict(record.image)
        np.testing.assert_allclose(alone.boxes, found.boxes, atol=1e-3)
        full = Predictor(predictor.detector, predictor.classes, Fit(96)).predict(record.image)
        assert not np.array_equal(alone.scores, full.scores)  # the pixels are others


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"multi_scale": (100, 200)}, "--multi-scale wants two multiples of 32"),
        ({"multi_scale": (640, 320)}, "the smaller one first"),
        ({"multi_scale": (0, 320)}, "--multi-scale wants"),
        ({"cache_gb": 3.0}, "--cache-gb goes with --cache"),
        ({"cache": "disk", "cache_gb": 0.0}, "--cache-gb"),
        ({"cache": "ram"}, "--cache"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_run(data="x", **options)


def test_where_pictures_are_kept_may_change_when_a_run_goes_on() -> None:
    assert {"cache", "cache_gb"} <= set(MAY_CHANGE)
    assert not {"decode_scaled", "multi_scale", "group_aspect"} & set(MAY_CHANGE)
