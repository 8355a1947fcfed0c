"""Several processes train as one does: the same losses, the same weights, the same scores."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from boxwright.data.dataset import open_dataset
from boxwright.data.synth import synthesize
from boxwright.inference.predictor import Predictor
from boxwright.models.checkpoint import read_tensors
from boxwright.training import distributed
from boxwright.training.distributed import RankLost, World, incarnation, lost
from boxwright.training.run_folder import read_rows
from boxwright.types import UserError
from boxwright.verbs import train

WORDS = (
    "--model fasterrcnn_vitdet_nano --epochs 2 --batch 4 --imgsz 64 --optimizer adamw --lr 0.002 --device cpu "
    "--ema 0.9 --flip 0.5 --save-minutes 0"
)  # 21 pictures: the last batch of an epoch has one, and one of two ranks none
Launch = Callable[..., Path]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "final_xml_dataset"
    kinds = ("circle", "square")
    return synthesize(folder, train=21, valid=9, size=(64, 64), classes=kinds, objects=(1, 2), scale=(0.3, 0.6))


@pytest.fixture(scope="module")
def launch(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Trains in so many processes, and gives the run folder."""

    def launch(name: str, ranks: int, *more: str, given: str = WORDS) -> Path:
        place = tmp_path_factory.mktemp(name)
        words = ["boxwright", "train", "--data", str(data), "--project-dir", str(place), "--name", name]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        running = [
            subprocess.Popen(
                [sys.executable, "-m", *words, *given.split(), *more],
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        told = [process.communicate(timeout=300)[1] for process in running]
        assert [process.returncode for process in running] == [0] * ranks, told
        return place / name

    return launch


@pytest.fixture(scope="module")
def alone(launch: Launch) -> Path:
    return launch("alone", 1)


@pytest.mark.parametrize("more", [[], ["--micro-batch", "1"], ["--shard"]], ids=["ddp", "in-parts", "fsdp"])
def test_two_processes_are_one(launch: Launch, alone: Path, more: list[str]) -> None:
    together = launch("together", 2, *more)
    for which in ("last_model", "best_model"):
        one, two = (read_tensors(folder / f"{which}.safetensors") for folder in (alone, together))
        assert one.keys() == two.keys()
        assert max((one[name].double() - two[name].double()).abs().max().item() for name in one) < 1e-5
    one, two = (read_rows(folder / "results.csv") for folder in (alone, together))
    assert len(one) == len(two) == 2
    for mine, theirs in zip(one, two, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        if "--shard" not in more:
            assert mine["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)


@pytest.mark.parametrize("ranks", [2, 3])
def test_judging_shared_out_finds_what_one_process_finds(trained: Path, drawn: Path, ranks: int) -> None:
    predictor = Predictor.load(trained / "best_model.safetensors", device="cpu")
    records = open_dataset(drawn).read("train").records
    alone = dict(predictor.each_record(records, batch=2))
    shares = [dict(predictor.each_record(records, batch=2, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert sorted(index for share in shares for index in share) == sorted(alone)  # each once
    assert all(shares)
    assert sum(len(found) for found in alone.values()) > 0
    for index, found in (pair for share in shares for pair in share.items()):
        for name in ("boxes", "scores", "labels"):
            assert (getattr(found, name) == getattr(alone[index], name)).all()


@pytest.mark.slow
def test_sgd_moves_pieces_too(launch: Launch) -> None:
    words = WORDS.replace("--optimizer adamw --lr 0.002", "--optimizer sgd --lr 0.002")
    one, two = (launch(f"sgd{ranks}", ranks, *more, given=words) for ranks, more in ((1, []), (2, ["--shard"])))
    mine, theirs = (read_tensors(folder / "last_model.safetensors") for folder in (one, two))
    assert max((mine[name].double() - theirs[name].double()).abs().max().item() for name in mine) < 1e-5


def test_sharing_a_model_takes_several_processes(data: Path) -> None:
    with pytest.raises(UserError, match="torchrun"):
        train(data=str(data), model="fasterrcnn_vitdet_nano", shard=True)


def test_a_gpu_is_not_named_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "choose_device", lambda name: torch.device(name))
    with pytest.raises(UserError, match="--device cuda"):
        World(1, 2).device("cuda:1")


# ------ Finding each other


def agree(store: dist.Store, size: int) -> list[str]:
    """What each of `size` processes, here threads, comes to."""
    names = [""] * size

    def one(rank: int) -> None:
        names[rank] = incarnation(store, rank, size)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in reversed(range(size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return names


@pytest.mark.parametrize("size", [2, 3, 5])
def test_all_agree_on_a_name_that_nobody_before_them_had(size: int) -> None:
    store = dist.HashStore()
    before: set[str] = set()
    for _ in range(4):  # the store is kept when processes are started again
        names = set(agree(store, size))
        assert len(names) == 1
        assert names.pop()
        assert not names & before
        before |= names


def test_words_of_the_dead_are_not_believed() -> None:
    store = dist.HashStore()
    for rank in (1, 2):  # said hello and died
        store.set(f"boxwright/{rank}", f"dead{rank}")
    names = set(agree(store, 3))
    assert len(names) == 1
    assert names != {""}


# ------ When others are gone


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:27568",
        "Gloo connectFullMesh failed with timed out connecting",
        "Timed out waiting 1000ms for recv operation to complete",
    ],
)
def test_what_c10d_raises_is_one_line(text: str) -> None:
    with pytest.raises(RankLost, match="gone"), lost():
        raise RuntimeError(text)


def test_an_error_of_one_s_own_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="shapes"), lost():
        raise RuntimeError("shapes do not match")
    assert not issubclass(RankLost, RuntimeError)
