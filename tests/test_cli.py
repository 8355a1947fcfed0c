"""The command line as a person meets it: right commands do what they say, wrong ones are answered in one line."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from boxwright import registry, verbs
from boxwright.__main__ import main
from boxwright.__main__ import verbs as listed_verbs
from boxwright.config import Run, make_run
from boxwright.models.published import PUBLISHED

VERBS = [
    "demo", "train", "evaluate", "predict", "report", "models", "plan",
    "data check", "data convert", "data prepare", "data shard", "data show", "data synth",
]  # fmt: skip
BOX = [[8, 8, 40, 40]]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every test runs in a folder of its own, where `outputs/` would appear, on a machine with no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)


def shell(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "", "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    command = [sys.executable, "-m", "boxwright", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, text=True, timeout=120, check=False, env=environment, **streams)


# Help


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_of_every_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb.split(), "--help"]) == 0
    out, error = capsys.readouterr()
    assert out.startswith(f"Usage: boxwright {verb}".rstrip())
    assert not error


def test_help_lists_every_verb_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    out = capsys.readouterr().out
    assert {name.replace("_", " ", 1) if name.startswith("data_") else name for name, _ in listed_verbs()} == set(VERBS)
    for name, text in listed_verbs():
        assert text.endswith(".")
        assert name.partition("_")[0] in out


def test_every_option_of_a_run_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, option in Run.model_fields.items():
        assert "--" + name.replace("_", "-") in out
        assert option.description


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Usage: boxwright COMMAND" in capsys.readouterr().out


IMPORTS = """
import contextlib, io, json, sys
from boxwright.__main__ import main
heavy = ("torch", "torchvision", "cv2", "albumentations", "av")
answers = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(arguments)
    answers.append([code, [name for name in heavy if name in sys.modules]])
print(json.dumps(answers))
"""


def test_help_and_mistakes_are_answered_before_pytorch_is_imported(tmp_path: Path) -> None:
    train = ["train", "--data", "."]
    commands = {
        **{f"{verb} --help": ([*verb.split(), "--help"], 0) for verb in ["", *VERBS]},
        "version": (["--version"], 0),
        "models": (["models"], 0),
        "model": ([*train, "--model", "fasterrcnn_vitdt"], 2),
        "option": ([*train, "--epoch", "3"], 2),
        "imgsz": ([*train, "--imgsz", "641"], 2),
        "lr": ([*train, "--optimizer", "adamw", "--lr", "0.005"], 2),
        "data": (["train", "--data", "nowhere"], 2),
        "train --weights": ([*train, "--weights", "none.pth"], 2),
        "predict --weights": (["predict", "--weights", "none.safetensors", "--input", "."], 2),
        "threshold": (["predict", "--weights", ".", "--input", ".", "--threshold", "90"], 2),
        "evaluate --weights": (["evaluate", "--weights", "none.safetensors", "--data", "."], 2),
    }
    arguments = json.dumps([command for command, _ in commands.values()])
    done = subprocess.run([sys.executable, "-c", IMPORTS, arguments], capture_output=True, text=True, check=True)
    answers = json.loads(done.stdout.splitlines()[-1])
    assert dict(zip(commands, answers, strict=True)) == {name: [code, []] for name, (_, code) in commands.items()}


def test_import_boxwright_loads_no_pytorch() -> None:
    code = "import sys, boxwright; dir(boxwright); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Spellings


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `train` and `predict` are asked for; neither does anything."""
    seen: dict[str, Any] = {}

    def train(run: Run) -> Any:
        seen["run"] = run
        raise KeyboardInterrupt  # enough of it

    def predict(*values: Any, **options: Any) -> Any:
        seen.update(options, weights=values[0], input=values[1])
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "train", train)
    monkeypatch.setattr(verbs, "predict", predict)
    return seen


def test_the_articles_training_line_works(asked: dict[str, Any]) -> None:
    line = (
        "train --model fasterrcnn_vitdet --data data_configs/voc.yaml --epochs 50 --batch 2 --imgsz 640 "
        "--square-training --use-train-aug --name fasterrcnn_vitdet_voc --lr 0.005"
    )
    main(line.split())
    assert asked["run"] == make_run(
        model="fasterrcnn_vitdet", data="data_configs/voc.yaml", epochs=50, batch=2, imgsz=640, square_training=True,
        use_train_aug=True, name="fasterrcnn_vitdet_voc", lr=0.005,
    )  # fmt: skip
    assert asked["run"].optimizer == "sgd"


def test_the_articles_short_spellings_train(asked: dict[str, Any]) -> None:
    line = "train -m fasterrcnn_vitdet --data d -e 50 -b 2 -ims 320 -st -uta -n it -w mae.pth -j 3 -d cpu"
    main(line.split())
    assert asked["run"] == make_run(
        model="fasterrcnn_vitdet", data="d", epochs=50, batch=2, imgsz=320, square_training=True, use_train_aug=True,
        name="it", weights="mae.pth", workers=3, device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "predict --weights best.safetensors --input ../in/ --imgsz 640 --square-img --threshold 0.90 --show",
        "predict -w best.safetensors -i ../in/ -ims 640 --square-img -th 0.90 -si",
    ],
)
def test_the_articles_prediction_lines_work(line: str, asked: dict[str, Any]) -> None:
    main(line.split())
    assert asked["weights"] == Path("best.safetensors")
    assert Path(asked["input"]) == Path("../in")
    assert (asked["imgsz"], asked["square_img"], asked["threshold"], asked["show"]) == (640, True, 0.9, True)


def test_classes_may_have_spaces_and_come_several_at_once(asked: dict[str, Any]) -> None:
    main(["predict", "-w", "a", "-i", "b", "--classes", "dining table", "cat", "--output", "there", "-nlb"])
    assert asked["classes"] == ["dining table", "cat"]
    assert (asked["output"], asked["labels"]) == (Path("there"), False)


# Mistakes


class Marker:
    """Pickled, it makes a folder when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.fixture
def place(drawn: Path, trained: Path, make_voc: Callable[..., Path], tmp_path: Path) -> dict[str, str]:
    """Files that commands name in braces."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(Marker()))
    (tmp_path / "raw.safetensors").write_bytes(pickle.dumps(Marker()))
    torch.save({"model": Marker()}, tmp_path / "zipped.pth")
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    weights = trained / "best_model.safetensors"
    (tmp_path / "half.safetensors").write_bytes(weights.read_bytes()[:100_000])
    (tmp_path / "flipped.safetensors").write_bytes(flipped(weights.read_bytes()))
    things = make_voc(tmp_path / "things", {"train/a.jpg": BOX, "valid/b.jpg": BOX})
    make_voc(tmp_path / "pictures", {"a.jpg": BOX})
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "pictures/images/a.jpg").read_bytes()[:-200])
    (tmp_path / "unknown.yaml").write_text("path: things\ntrain: train\nval: valid\nclasses: [thingy, other]\n")
    for name, text in BAD_XML.items():
        shutil.copytree(things, tmp_path / name)
        (tmp_path / name / "train/labels/a.xml").write_text(text)
    shutil.copytree(things, tmp_path / "cut")
    shutil.copy(tmp_path / "cut.jpg", tmp_path / "cut/train/images/a.jpg")
    shutil.copytree(things, tmp_path / "imageless")
    (tmp_path / "imageless/train/images/a.jpg").unlink()
    return {"data": str(drawn), "weights": str(weights), "picture": str(tmp_path / "pictures/images/a.jpg")}


def flipped(data: bytes) -> bytes:
    """One bit of the last tensor is another."""
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


BAD_XML = {
    "malformed": "<annotation>\n<object><name>thing</nam",
    "bomb": '<!DOCTYPE a [<!ENTITY b "&c;&c;"><!ENTITY c "dddd">]>\n<annotation>&b;</annotation>',
}

TRAIN = "train --model fasterrcnn_vitdet_nano --imgsz 64 --epochs 1 --device cpu"
REFUSED = {
    # What was typed
    "trian --data {data}": "train",
    f"{TRAIN}": "--data",
    f"{TRAIN} --data {{data}} --epoch 3": "--epochs",
    f"{TRAIN} --data {{data}} stray": "stray",
    "train --data {data} --model fasterrcnn_vitdt": "Did you mean 'fasterrcnn_vitdet'",
    "train --data {data} --model yolo": "`boxwright models` lists them",
    f"{TRAIN} --data nowhere/at_all": "nowhere",
    f"{TRAIN} --data thing": "Did you mean 'things'",
    "train --data {data} --imgsz 641": "use 640 or 656",
    "train --data {data} --imgsz 0": "--imgsz 0",
    f"{TRAIN} --data {{data}} --batch 0": "--batch 0",
    "train --data {data} --epochs -1": "--epochs -1",
    "train --data {data} --epochs many": "many",
    f"{TRAIN} --data {{data}} --lr nan": "--lr nan",
    f"{TRAIN} --data {{data}} --lr 0": "--lr 0",
    f"{TRAIN} --data {{data}} --lr 0.005 --optimizer adamw": "belongs to SGD",
    f"{TRAIN} --data {{data}} --lr 0.000001": "belongs to AdamW",
    f"{TRAIN} --data {{data}} --optimizer adam": "adamw",
    f"{TRAIN} --data {{data}} --precision fp16": "--precision fp16",
    f"{TRAIN} --data {{data}} --workers -1": "--workers -1",
    "train --data {data} --device cuda": "no CUDA GPU",
    "train --data {data} --device gpu": "unknown device 'gpu'",
    f"{TRAIN} --data {{data}} --name a/b": "--name 'a/b'",
    f"{TRAIN} --data {{data}} --name ..": "--name '..'",
    f"{TRAIN} --data {{data}} --project-dir file/runs": "cannot write into",
    f"{TRAIN} --data {{data}} --weights none.pth": "no weights at none.pth",
    f"{TRAIN} --data {{data}} --weights raw.pkl": "raw.pkl",
    f"{TRAIN} --data {{data}} --weights raw.safetensors": "raw.safetensors",
    f"{TRAIN} --data {{data}} --weights zipped.pth": "zipped.pth",
    f"{TRAIN} --data {{data}} --weights foreign.safetensors": "foreign.safetensors",
    f"{TRAIN} --data {{data}} --weights half.safetensors": "half.safetensors",
    f"{TRAIN} --data {{data}} --weights empty/": "empty",
    # What is in the data
    f"{TRAIN} --data empty": "empty",
    f"{TRAIN} --data file": "neither a folder nor a data YAML",
    f"{TRAIN} --data imageless": "no pictures",
    f"{TRAIN} --data unknown.yaml": "perhaps 'thingy'",
    f"{TRAIN} --data malformed": "a.xml:2: is not well-formed",
    f"{TRAIN} --data bomb": "DOCTYPE",
    f"{TRAIN} --data cut": "cut short",
    # Evaluating
    "evaluate --weights none.safetensors --data {data}": "no weights at none.safetensors",
    "evaluate --weights empty --data {data}": "is a folder",
    "evaluate --weights {weights} --data nowhere": "nowhere",
    "evaluate --weights {weights} --data things": "does not know the classes thing",
    "evaluate --weights {weights} --data {data} --split tset": "tset",
    "evaluate --weights {weights} --data {data} --split test": "no split 'test'",
    "evaluate --weights {weights} --data {data} --imgsz 641": "--imgsz 641",
    "evaluate --weights {weights} --data {data} --imgsz 0": "--imgsz 0",
    "evaluate --weights {weights} --data {data} --batch 0": "--batch 0",
    "evaluate --weights {weights} --data {data} --workers -2": "--workers -2",
    "evaluate --weights {weights} --data {data} --device cuda": "no CUDA GPU",
    "evaluate --weights raw.safetensors --data {data}": "raw.safetensors",
    "evaluate --weights {weights} --data {data} --name a/b": "--name 'a/b'",
    # Predicting
    "predict --input {picture}": "--weights",
    "predict --weights {weights}": "--input",
    "predict --weights {weights} --input {picture} --threshold 90": "Did you mean 0.9?",
    "predict --weights {weights} --input {picture} --threshold -1": "--threshold -1",
    "predict --weights {weights} --input {picture} --threshold nan": "--threshold nan",
    "predict --weights {weights} --input {picture} --imgsz 641": "--imgsz 641",
    "predict --weights {weights} --input {picture} --batch 0": "--batch 0",
    "predict --weights {weights} --input {picture} --device cuda:1": "no CUDA GPU",
    "predict --weights {weights} --input {picture} --classes cirle": "Did you mean 'circle'",
    "predict --weights {weights} --input {picture} --classes zebra": "Known: circle, square",
    "predict --weights {weights} --input {picture} --name a/b": "--name 'a/b'",
    "predict --weights {weights} --input {picture} --output file/there": "cannot write into",
    "predict --weights {weights} --input none.jpg": "no such file or folder",
    "predict --weights {weights} --input empty": "no picture or video",
    "predict --weights {weights} --input *.gif": "matches no picture",
    "predict --weights {weights} --input file": "neither a picture nor a video",
    "predict --weights {weights} --input http://localhost/a": "--stream",
    "predict --weights {weights} --input cut.jpg": "cut.jpg: is cut short",
    "predict --weights raw.pkl --input {picture}": "raw.pkl",
    "predict --weights raw.safetensors --input {picture}": "raw.safetensors",
    "predict --weights zipped.pth --input {picture}": "zipped.pth",
    "predict --weights foreign.safetensors --input {picture}": "foreign.safetensors",
    "predict --weights half.safetensors --input {picture}": "half.safetensors",
    "predict --weights flipped.safetensors --input {picture}": "is damaged",
    "predict --weights {data} --input {picture}": "data.yaml",
    # Drawing
    "data synth things": "already holds something",
    "data synth new --classes cirlce": "circle",
    "data synth new --train 0": "train",
    "data synth new --size 4 4": "size",
    "data synth file/new": "cannot write",
    "data snyth new": "synth",
}


def tree(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} | {
        str(p.relative_to(folder)): 0 for p in folder.rglob("*") if p.is_dir()
    }


@pytest.mark.parametrize("line", REFUSED)
def test_a_mistake_is_answered_in_one_line_and_nothing_is_written(
    line: str, place: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = tree(tmp_path)
    code = main([word.format(**place) for word in line.split()])
    out, error = capfd.readouterr()
    assert code == 2, error
    assert error.startswith("boxwright: error: ")
    assert error.count("\n") == 1, error
    assert REFUSED[line] in error
    assert out == ""
    left = {name: value for name, value in tree(tmp_path).items() if name not in ("outputs", "outputs/inference")}
    assert left == before  # and no pickle was executed


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root and Windows write everywhere")
@pytest.mark.parametrize("line", [f"{TRAIN} --data {{data}}", "evaluate --weights {weights} --data {data}"])
def test_a_folder_without_permission_is_told(line: str, place: dict[str, str], capsys: Any) -> None:
    Path("empty").chmod(0o555)
    assert main([*(word.format(**place) for word in line.split()), "--project-dir", "empty/runs"]) == 2
    assert "ermission" in capsys.readouterr().err
    Path("empty").chmod(0o755)


def test_a_few_bad_files_are_skipped_and_counted(
    make_voc: Callable[..., Path], place: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["good.jpg", "malformed.jpg", "bomb.jpg", "cut.jpg", "alone.jpg"]
    data = make_voc(tmp_path / "mostly", {**{f"train/{name}": BOX for name in names}, "valid/v.jpg": BOX})
    for name, text in BAD_XML.items():
        (data / f"train/labels/{name}.xml").write_text(text)
    shutil.copy(tmp_path / "cut.jpg", data / "train/images/cut.jpg")
    (data / "train/labels/alone.xml").unlink()
    assert main([*TRAIN.split(), "--data", str(data)]) == 2  # two contradict themselves
    assert "bomb.xml:1: has a DOCTYPE" in capsys.readouterr().err
    assert main([*TRAIN.split(), "--data", str(data), "--skip-bad"]) == 0
    error = capsys.readouterr().err
    assert "train: 1 pictures" in error
    assert "4 × skipped image" in error
    for where in ("malformed.xml:2", "bomb.xml:1", "cut.jpg", "alone.jpg"):
        assert where in error


def test_the_traceback_is_there_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOXWRIGHT_DEBUG", "1")
    with pytest.raises(verbs.UserError, match="nowhere"):
        main(["train", "--data", "nowhere"])


def test_a_full_disk_ends_with_74(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def train(run: Run) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "last_model.safetensors")

    monkeypatch.setattr(verbs, "train", train)
    assert main(["train", "--data", "x"]) == 74
    error = capsys.readouterr().err
    assert error.startswith("boxwright: error: No space left on device: last_model.safetensors")
    assert error.count("\n") == 1


# Results


def one_object(out: str) -> Any:
    """The result: one line, one JSON value, no NaN."""
    assert out.count("\n") == 1
    return json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_train_prints_one_object(place: dict[str, str], capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*TRAIN.split(), "--data", place["data"], "--json"]) == 0
    result = one_object(capfd.readouterr().out)
    assert Path(result["folder"]) == Path("outputs/training/res_1")
    assert (tmp_path / result["folder"] / "best_model.safetensors").exists()
    assert result["steps"] == 2


def test_evaluate_prints_one_object(place: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--weights", place["weights"], "--data", place["data"], "--json"]) == 0
    out, error = capfd.readouterr()
    result = one_object(out)
    assert set(result["scores"]["per_class"]) == {"circle", "square"}
    assert result["scores"]["coco"]["APlarge"] is None  # there are no large objects at 64 px
    assert "COCO  AP " in error
    written = json.loads((Path(result["folder"]) / "scores.json").read_text("utf-8"))
    assert written["coco"] == result["scores"]["coco"]


def test_predict_prints_one_object(place: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    line = ["predict", "--weights", place["weights"], "--input", place["picture"], "--threshold", "0", "--json"]
    assert main(line) == 0
    result = one_object(capfd.readouterr().out)
    assert (result["pictures"], result["skipped"]) == (1, [])
    written = json.loads((Path(result["folder"]) / "predictions.json").read_text("utf-8"))
    assert len(written["results"][0]["detections"]) == result["objects"] > 0


def test_models_prints_one_object(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    out, error = capfd.readouterr()
    listed = one_object(out)
    for kind in registry.WORDS:
        assert {entry["name"] for entry in listed[kind]} == set(registry.entries(kind))
        for name, entry in registry.entries(kind).items():
            assert f"{name} " in error
            assert f"{entry.path.name}:{entry.line}" in error
    for name, weights in PUBLISHED.items():
        assert f"{name} " in error
        assert weights.licence in error


def test_data_synth_prints_one_object(capfd: pytest.CaptureFixture[str]) -> None:
    line = "data synth new --train 2 --valid 1 --size 64 96 --classes star heart --objects 1 2 --scale 0.3 0.5 --json"
    assert main(line.split()) == 0
    assert one_object(capfd.readouterr().out) == {"data": str(Path("new/data.yaml"))}
    assert len(list(Path("new/train/images").iterdir())) == 2


def test_nothing_is_printed_unasked(place: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--weights", place["weights"], "--input", place["picture"]]) == 0
    assert capfd.readouterr().out == ""


# Surroundings

SYNTH = "data synth {} --train 1 --valid 1 --size 32 32 --scale 0.3 0.5 --json"


def test_a_reader_that_has_gone_is_no_error() -> None:
    for arguments in ("models --json", SYNTH.format("new"), "--help", "train --help"):
        reading, writing = os.pipe()
        os.close(reading)  # as `| head` does, at the latest when it has seen enough
        done = shell(*arguments.split(), stdout=writing)
        os.close(writing)
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        assert "Error" not in done.stderr


def test_a_terminal_without_unicode_gets_along() -> None:
    plain = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = shell(*SYNTH.format("новый").split(), env=plain)
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)["data"]) == Path("новый/data.yaml")
    for verb in ("--help", "train --help"):
        assert shell(*verb.split(), env=plain).returncode == 0


def test_the_program_ends_with_its_exit_code() -> None:
    done = shell("train", "--data", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("boxwright: error: no dataset at ")
    assert shell("--version").returncode == 0


@pytest.mark.slow
def test_the_demo_leaves_what_it_says(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(verbs, "DEMO_PICTURES", 16)
    assert main(["demo", "--folder", "there", "--json"]) == 0
    out, error = capfd.readouterr()
    assert Path(one_object(out)["folder"]) == Path("there")
    assert {p.name for p in Path("there").iterdir()} == {
        "final_xml_dataset", "unseen", "training", "evaluation", "inference",
    }  # fmt: skip
    for line in error.splitlines():
        if line.startswith(("graphs", "weights", "what it trained on")):
            assert Path(line.rpartition("   ")[2].split()[0]).exists(), line
    assert (Path("there/inference") / "clip.mp4").exists()
