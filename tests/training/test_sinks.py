"""Places that a run also logs to: they never end a run, and what is logged is logged once, killed or not."""

from __future__ import annotations

import logging
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from boxwright.training import sinks
from boxwright.training.sinks import open_sinks, require_sinks
from boxwright.types import Diverged, Stopped, UserError

RUN = {"model": "fasterrcnn", "lr": 0.1, "option": ["a=1"]}
NAMES = ("tensorboard", "wandb", "mlflow")

Row = tuple[int, str, float]
Server = dict[str, Any]  # what a fake package was told: "rows" and more


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "it").mkdir()
    return tmp_path / "it"


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no server, and no settings of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", os.devnull)
    monkeypatch.setattr(sinks, "RETRY_SECONDS", 0.01)


def module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None, origin="made for a test")
    vars(made).update(content)
    return made


def install(monkeypatch: pytest.MonkeyPatch, sink: str, *modules: ModuleType) -> None:
    """Put modules in the place of a package, for an adapter that is imported anew."""
    for made in modules:
        monkeypatch.setitem(sys.modules, made.__name__, made)
    # Remembered, so that what is imported during the test is forgotten after it.
    monkeypatch.setitem(sys.modules, f"boxwright.training.sinks.{sink}", module("forgotten"))
    del sys.modules[f"boxwright.training.sinks.{sink}"]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Server:
    """A fake W&B: runs by id; what its server has of one when it is begun again, it drops, as the real one."""
    server: Server = {"key": True, "reachable": True, "runs": {}, "asked": [], "modes": [], "finished": [], "mode": ""}

    class Error(Exception):
        pass

    class Run:
        disabled, url = False, "https://wandb.test/it"

        def __init__(self, rows: list[Row], *, offline: bool) -> None:
            self.rows, self.offline = rows, offline
            self.step = 0 if offline else max((row[0] for row in rows), default=-1) + 1

        def log(self, values: Mapping[str, Any], step: int) -> None:
            if server.pop("broken", False):
                raise ConnectionError("the process of W&B is gone")
            if step >= self.step:
                self.step = step
                self.rows.extend((step, name, value) for name, value in values.items())

        def finish(self, exit_code: int) -> None:
            server["finished"].append(exit_code)

    def init(*, id: str, mode: str | None = None, **options: Any) -> Run:
        mode = mode or server["mode"] or "online"
        server["modes"].append(mode)
        server["options"] = options
        if mode == "online" and not server["reachable"]:
            raise Error("no route to\nhost")
        return Run(server["runs"].setdefault(id, []), offline=mode == "offline")

    def login(*, prompt: bool = True, verify: bool) -> bool:
        server["asked"].append(prompt)
        return server["key"]

    def setup(settings: Any) -> Any:
        return SimpleNamespace(
            settings=SimpleNamespace(mode=server["mode"] or "online", project=None, run_name=None), said=settings
        )

    install(
        monkeypatch,
        "wandb",
        module(
            "wandb", Error=Error, init=init, login=login, setup=setup, Settings=dict, teardown=lambda exit_code: None,
            Image=lambda path: ("picture", Path(path).name),
        ),
    )  # fmt: skip
    return server


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Server:
    """A fake MLflow: its server keeps whatever it is sent, also twice."""
    server: Server = {"runs": {}, "artifacts": [], "status": {}, "params": {}, "uris": [], "experiments": {}}

    class MlflowException(Exception):
        error_code = "RESOURCE_DOES_NOT_EXIST"

    class Client:
        def __init__(self, tracking_uri: str) -> None:
            server["uris"].append(tracking_uri)

        def get_experiment_by_name(self, name: str) -> Any:
            found = server["experiments"].get(name)
            return found and SimpleNamespace(experiment_id=found)

        def create_experiment(self, name: str, artifact_location: str | None) -> str:
            server["artifact_location"] = artifact_location
            return server["experiments"].setdefault(name, "7")

        def create_run(self, experiment_id: str, run_name: str) -> Any:
            assert (experiment_id, run_name) == ("7", "it")
            run_id = f"run{len(server['runs'])}"
            server["runs"][run_id], server["status"][run_id] = [], "RUNNING"
            return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

        def get_run(self, run_id: str) -> Any:
            if run_id not in server["runs"]:
                raise MlflowException(run_id)
            last = {name: step for step, name, _ in sorted(server["runs"][run_id])}
            metrics = [SimpleNamespace(key=name, step=step) for name, step in last.items()]
            proto = SimpleNamespace(data=SimpleNamespace(metrics=metrics))
            return SimpleNamespace(info=SimpleNamespace(lifecycle_stage="active"), to_proto=lambda: proto)

        def update_run(self, run_id: str, status: str) -> None:
            server["status"][run_id] = status

        set_terminated = update_run

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            assert len(params) <= 100
            server["params"].update(params)
            server["runs"][run_id].extend((step, name, value) for name, value, _, step in metrics)

        def log_artifact(self, run_id: str, path: str, place: str) -> None:
            server["artifacts"].append((Path(path).name, place))

    install(
        monkeypatch,
        "mlflow",
        module("mlflow", MlflowClient=Client, __path__=[]),
        module("mlflow.entities", Metric=lambda *values: values, Param=lambda *values: values),
        module("mlflow.exceptions", MlflowException=MlflowException),
    )
    return server


def log_steps(opened: sinks.Sinks, first: int, last: int, picture: Path | None = None) -> None:
    """Two numbers after every step, one more after each tenth, as a run would log them."""
    for step in range(first, last + 1):
        opened.write(step, {"train/loss": 1 / step, "lr": 0.1})
        if step % 10 == 0:
            opened.write(step, {"val/map": step / 100})
            if picture:
                opened.picture(step, "validation", picture)


def expected(last: int) -> list[Row]:
    rows: list[Row] = []
    for step in range(1, last + 1):
        rows += [(step, "train/loss", 1 / step), (step, "lr", 0.1)]
        rows += [(step, "val/map", step / 100)] * (step % 10 == 0)
    return sorted(rows)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (32, 16), (200, 30, 10)).save(tmp_path / "validation.png")
    return tmp_path / "validation.png"


# ------ What is imported, and when


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    for before in ("boxwright.training.sinks", "boxwright.training.loop"):
        loads = [*NAMES, "torch.utils.tensorboard", *(["torch"] if before.endswith("sinks") else [])]
        code = (
            f"import sys, {before}\nassert not set({loads}) & set(sys.modules), sorted(set({loads}) & set(sys.modules))"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_package_is_one_user_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UserError, match=r'^--log-to wandb needs `pip install "boxwright\[wandb\]"`$'):
        require_sinks(["wandb"])
    with pytest.raises(UserError, match=r'^--log-to mlflow tensorboard needs `pip install "boxwright\[mlflow,tensor'):
        require_sinks(["mlflow", "tensorboard", "mlflow"])
    (tmp_path / "wandb").mkdir()  # that offline runs lie in: no package
    with pytest.raises(UserError, match="--log-to wandb needs"):
        open_sinks(["wandb"], tmp_path, RUN, total_steps=1, resume_step=None)
    assert not (tmp_path / "mlflow").exists()
    require_sinks([])


def test_a_package_that_does_not_import_is_a_user_error(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    install(monkeypatch, "mlflow", module("mlflow"))
    with pytest.raises(UserError, match=r"^--log-to mlflow: cannot import name 'MlflowClient'.*\. Mend its package"):
        open_sinks(["mlflow"], folder, RUN, total_steps=1, resume_step=None)


def test_none_is_nothing(folder: Path) -> None:
    with open_sinks([], folder, RUN, total_steps=1, resume_step=None) as opened:
        log_steps(opened, 1, 20)
    assert not opened.lines
    assert not list(folder.iterdir())


# ------ Logged once


def rows_of(server: Server) -> list[Row]:
    (rows,) = server["runs"].values()
    return sorted(rows)


def test_everything_arrives(folder: Path, wandb: Server, mlflow: Server, picture: Path) -> None:
    with open_sinks(["wandb", "mlflow", "wandb"], folder, RUN, total_steps=20, resume_step=None) as opened:
        log_steps(opened, 1, 20, picture)
        opened.write(20, {"map_small": float("nan"), "worse": float("inf")})
    shown = [(step, "validation", ("picture", "validation.png")) for step in (10, 20)]
    assert rows_of(wandb) == sorted([*expected(20), *shown], key=lambda row: row[:2])
    assert rows_of(mlflow) == expected(20)
    assert mlflow["artifacts"] == [("validation.png", f"validation/{step:08}") for step in (10, 20)]
    assert mlflow["params"] == {"model": "fasterrcnn", "lr": "0.1", "option": "['a=1']", "total_steps": "20"}
    assert wandb["options"]["config"] == {**RUN, "total_steps": 20}
    assert (wandb["finished"], mlflow["status"]) == ([0], {"run0": "FINISHED"})
    assert opened.lines[0] == "wandb: https://wandb.test/it"
    assert f"--backend-store-uri sqlite:///{(folder / 'mlflow' / 'mlflow.db').as_posix()}" in opened.lines[1]


@pytest.mark.parametrize("ends", ["killed", "stopped"])
@pytest.mark.parametrize("key", [True, False])
def test_going_on_continues_the_same_run_and_doubles_nothing(
    key: bool, ends: str, folder: Path, wandb: Server, mlflow: Server
) -> None:
    wandb["key"] = key
    first = open_sinks(["wandb", "mlflow"], folder, RUN, total_steps=30, resume_step=None)
    log_steps(first, 1, 17)
    arrived(lambda: rows_of(mlflow) == expected(17) == rows_of(wandb))
    if ends == "stopped":
        first.finish(75)
        assert mlflow["status"] == {"run0": "KILLED"}
    else:
        kill(first)
    for _ in range(2):  # it is killed again, at the same place
        again = open_sinks(["wandb", "mlflow"], folder, RUN, total_steps=30, resume_step=10)
        log_steps(again, 11, 17)
        kill(again)
    assert mlflow["status"] == {"run0": "RUNNING"}
    with open_sinks(["wandb", "mlflow"], folder, RUN, total_steps=30, resume_step=12) as last:
        log_steps(last, 13, 30)
    assert rows_of(wandb) == rows_of(mlflow) == expected(30)
    assert mlflow["status"] == {"run0": "FINISHED"}


def test_a_new_run_in_an_old_folder_is_a_run_of_its_own(folder: Path, wandb: Server, mlflow: Server) -> None:
    for _ in range(2):
        with open_sinks(["wandb", "mlflow"], folder, RUN, total_steps=10, resume_step=None) as opened:
            log_steps(opened, 1, 10)
    for server in (wandb, mlflow):
        assert [sorted(rows) for rows in server["runs"].values()] == [expected(10)] * 2


def test_a_run_that_mlflow_no_longer_has_begins_again(folder: Path, mlflow: Server) -> None:
    with open_sinks(["mlflow"], folder, RUN, total_steps=10, resume_step=None) as opened:
        log_steps(opened, 1, 5)
    mlflow["runs"] = {"another": []}
    with open_sinks(["mlflow"], folder, RUN, total_steps=10, resume_step=5) as opened:
        log_steps(opened, 6, 10)
    assert sorted(mlflow["runs"]["run1"]) == [row for row in expected(10) if row[0] > 5]


def kill(opened: sinks.Sinks) -> None:
    """End the threads, as the end of their process would, after what they have been given."""
    for feed in opened._feeds:
        feed._entries.put(None)
        feed._thread.join(5)


def arrived(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ------ A sink never ends a run


class Moody:
    """A sink that fails as it is told to."""

    def __init__(self, failures: Mapping[str, int] | None = None) -> None:
        self.failures = dict(failures or {})  # of each method, so many times
        self.rows: list[Row] = []
        self.calls: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def _do(self, method: str) -> None:
        self.gate.wait(10)
        self.calls.append(method)
        if self.failures.get(method, 0):
            self.failures[method] -= 1
            raise OSError(28, "No space left on device", "http://me:secret@disk/x")

    def start(self, run_folder: Path, run: Mapping[str, Any], total_steps: int) -> str:
        self._do("start")
        return "here"

    def has(self, handed: Mapping[str, int]) -> Mapping[str, int]:
        return handed

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._do("write")
        self.rows += [(step, name, value) for name, value in values.items()]

    def picture(self, step: int, name: str, path: Path) -> None:
        self._do("picture")

    def finish(self, exit_code: int) -> None:
        self._do(f"finish {exit_code}")


@pytest.fixture
def moody(monkeypatch: pytest.MonkeyPatch) -> Iterator[Moody]:
    """The sink that every name opens."""
    sink = Moody()
    monkeypatch.setattr(sinks, "_installed", lambda _: True)
    monkeypatch.setattr(sinks, "_make", lambda *_: sink)
    yield sink
    sink.gate.set()


@pytest.mark.parametrize("method", ["start", "write"])
def test_a_sink_that_fails_is_one_warning_and_gets_everything_later(
    method: str, folder: Path, moody: Moody, caplog: pytest.LogCaptureFixture
) -> None:
    moody.failures[method] = 3
    with open_sinks(["wandb"], folder, RUN, total_steps=10, resume_step=None) as opened:
        log_steps(opened, 1, 10)
        arrived(lambda: sorted(moody.rows) == expected(10))
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert "wandb: [Errno 28] No space left on device" in warning.message
    assert "secret" not in warning.message
    assert moody.calls.count("start") == 4
    assert moody.calls[-1] == "finish 0"


def test_a_picture_that_is_not_taken_is_left(
    folder: Path, moody: Moody, picture: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moody.failures["picture"] = 1
    with open_sinks(["wandb"], folder, RUN, total_steps=10, resume_step=None) as opened:
        log_steps(opened, 1, 20, picture)
    assert sorted(moody.rows) == expected(20)
    assert (moody.calls.count("start"), moody.calls.count("picture")) == (1, 2)
    assert [record.message.partition(" ")[0] for record in caplog.records] == ["wandb:", "wandb:"]
    assert "1 things could not be logged" in caplog.text


def test_a_sink_that_stays_away_costs_no_time(
    folder: Path, moody: Moody, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sinks, "RETRY_SECONDS", 60)
    moody.failures["start"] = 10**6
    started = time.monotonic()
    with open_sinks(["wandb"], folder, RUN, total_steps=10, resume_step=None) as opened:
        log_steps(opened, 1, 10)
    assert time.monotonic() - started < 5
    assert [record.message for record in caplog.records][1:] == [
        "wandb: 11 things could not be logged; the run's own books have them"
    ]
    assert len(moody.calls) <= 3


def test_a_sink_that_hangs_does_not_hold_up_the_run(
    folder: Path, moody: Moody, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sinks, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(sinks, "BACKLOG", 5)
    opened = open_sinks(["wandb"], folder, RUN, total_steps=100, resume_step=None)
    moody.gate.clear()
    started = time.monotonic()
    log_steps(opened, 1, 100)
    opened.finish(0)
    assert time.monotonic() - started < 5
    assert "wandb: not done after 0.2 s" in caplog.text
    moody.gate.set()
    arrived(lambda: moody.calls[-1] == "finish 0")
    assert 5 <= moody.calls.count("write") <= 7  # a backlog has an end


@pytest.mark.parametrize(
    ("error", "code"), [(Stopped("x"), 75), (KeyboardInterrupt(), 130), (Diverged("x"), 70), (ValueError(), 1)]
)
def test_how_the_run_ended(error: BaseException, code: int, folder: Path, moody: Moody) -> None:
    with pytest.raises(type(error)), open_sinks(["wandb"], folder, RUN, total_steps=1, resume_step=None):
        raise error
    assert moody.calls == ["start", f"finish {code}"]


def test_a_spoilt_ledger_costs_rows_that_are_logged_twice_and_no_run(folder: Path, moody: Moody) -> None:
    (folder / "wandb").mkdir()
    (folder / "wandb" / "logged.json").write_text("{", "utf-8")
    with open_sinks(["wandb"], folder, RUN, total_steps=10, resume_step=3) as opened:
        log_steps(opened, 4, 10)
    assert sorted(moody.rows) == [row for row in expected(10) if row[0] > 3]


# ------ W&B by itself


@pytest.mark.parametrize("key", [True, False])
def test_wandb_never_asks_and_without_a_key_sends_nothing(key: bool, folder: Path, wandb: Server) -> None:
    wandb["key"] = key
    with open_sinks(["wandb"], folder, RUN, total_steps=10, resume_step=None) as opened:
        log_steps(opened, 1, 10)
    assert wandb["asked"] == [False]
    assert wandb["modes"] == ["online" if key else "offline"]
    assert ("no key" in opened.lines[0]) is not key
    assert rows_of(wandb) == expected(10)


def test_wandb_without_network_keeps_everything_here(folder: Path, wandb: Server) -> None:
    wandb["reachable"] = False
    with open_sinks(["wandb"], folder, RUN, total_steps=10, resume_step=None) as opened:
        log_steps(opened, 1, 10)
    assert wandb["modes"] == ["online", "offline"]
    assert opened.lines[0].startswith("wandb: no route to host, so nothing is sent; `wandb sync ")
    assert rows_of(wandb) == expected(10)


def test_wandbs_own_mode_holds(folder: Path, wandb: Server) -> None:
    wandb["mode"] = "offline"
    with open_sinks(["wandb"], folder, RUN, total_steps=10, resume_step=None) as opened:
        log_steps(opened, 1, 10)
    assert (wandb["asked"], wandb["modes"]) == ([], ["offline"])
    assert opened.lines[0].startswith("wandb: nothing is sent; ")


def test_wandb_whose_process_died_is_begun_again(folder: Path, wandb: Server) -> None:
    with open_sinks(["wandb"], folder, RUN, total_steps=10, resume_step=None) as opened:
        log_steps(opened, 1, 4)
        arrived(lambda: rows_of(wandb) == expected(4))
        wandb["broken"] = True
        log_steps(opened, 5, 10)
        arrived(lambda: rows_of(wandb) == expected(10))
    assert len(wandb["modes"]) == 2


# ------ MLflow by itself


def test_mlflows_server_is_that_of_its_variable(folder: Path, mlflow: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@mlflow.test")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    with open_sinks(["mlflow"], folder, RUN, total_steps=10, resume_step=None) as opened:
        pass
    assert mlflow["uris"] == ["http://me:secret@mlflow.test"]
    assert mlflow["experiments"] == {"mine": "7"}
    assert mlflow["artifact_location"] is None  # the server decides
    assert opened.lines == ["mlflow: run run0 at mlflow.test"]


# ------ The real ones


CHILD = """
import os, sys, time
from pathlib import Path
from boxwright.training.sinks import open_sinks
name, folder, picture, start, last, kills = sys.argv[1:]
resume = int(start) if start != "new" else None
opened = open_sinks([name], Path(folder), {"model": "x", "option": ["a=1"]}, total_steps=30, resume_step=resume)
for step in range((resume or 0) + 1, int(last) + 1):
    opened.write(step, {"train/loss": 1 / step, "lr": 0.1})
    if step % 10 == 0:
        opened.write(step, {"val/map": step / 100})
        opened.picture(step, "validation", Path(picture))
if kills == "kill":
    feed = opened._feeds[0]
    while not feed._entries.empty():
        time.sleep(0.01)
    time.sleep(2)
    os.kill(os.getpid(), 9)
opened.finish(0)
"""


def in_two_lives(name: str, folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process is killed after step 17, another goes on after step 10 until step 30."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start, last, kills in (("new", "17", "kill"), ("10", "30", "ends")):
        words = [sys.executable, "-c", CHILD, name, str(folder), str(picture), start, last, kills]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert ended.returncode == (-9 if kills == "kill" else 0), ended.stderr


needs_kill = pytest.mark.skipif(os.name == "nt", reason="Windows has no signal 9")


@needs_kill
def test_real_tensorboard(folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    in_two_lives("tensorboard", folder, picture, monkeypatch)
    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    rows = [(e.step, tag, e.value) for tag in read.Tags()["scalars"] for e in read.Scalars(tag)]
    assert [row[:2] for row in sorted(rows)] == [row[:2] for row in expected(30)]
    assert [row[2] for row in sorted(rows)] == pytest.approx([row[2] for row in expected(30)])
    assert [(e.step, e.width, e.height) for e in read.Images("validation")] == [(s, 32, 16) for s in (10, 20, 30)]


@needs_kill
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own
def test_real_mlflow(folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("mlflow").MlflowClient(f"sqlite:///{(folder / 'mlflow' / 'mlflow.db').as_posix()}")
    in_two_lives("mlflow", folder, picture, monkeypatch)
    experiment = client.get_experiment_by_name("boxwright").experiment_id
    (run,) = client.search_runs([experiment])
    assert (run.info.run_name, run.info.status) == ("it", "FINISHED")
    rows = [
        (m.step, m.key, m.value) for key in run.data.metrics for m in client.get_metric_history(run.info.run_id, key)
    ]
    assert sorted(rows) == expected(30)
    shown = [file.path for file in client.list_artifacts(run.info.run_id, "validation")]
    assert shown == [f"validation/{step:08}" for step in (10, 20, 30)]


@needs_kill
def test_real_wandb(folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    in_two_lives("wandb", folder, picture, monkeypatch)
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({path.name for path in files}) == 1  # of one run
    rows = [row for path in files for row in wandb_rows(path) if row[1] in ("train/loss", "lr", "val/map")]
    # W&B itself holds a step back until the next: of the one that it was killed in nothing is on the disk.
    assert sorted(rows) == [row for row in expected(30) if row[0] != 17]


def wandb_rows(path: Path) -> list[Row]:
    """The history in a file of W&B's, a log of LevelDB's format with records of protobuf."""
    import json

    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports]

    data, rows, whole, place = path.read_bytes(), [], b"", 7
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, or the last part
            record, whole = Record.FromString(whole), b""
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            step = record.history.step.num
            rows += [(step, name, value) for name, value in values.items() if not name.startswith("_")]
    return rows
