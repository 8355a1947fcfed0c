"""The verbs of the command line as Python functions: `boxwright.train(...)`, `boxwright.evaluate(...)`, ...

Each checks everything that can be checked cheaply before PyTorch is imported, then does its work.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from boxwright import registry, runs
from boxwright.config import LARGEST, SMALLEST, Run, make_run
from boxwright.errors import UserError
from boxwright.folders import claim, require_name
from boxwright.progress import Progress

if TYPE_CHECKING:
    from boxwright.data.check import Checked
    from boxwright.data.check.mend import Mended
    from boxwright.data.shards import Sharded
    from boxwright.evaluating import Evaluated
    from boxwright.inference.run import Predicted
    from boxwright.training.loop import Trained
    from boxwright.training.plan import Plan
    from boxwright.training.show import Shown
    from boxwright.types import Detections

Say = Callable[[str], None]


def train(run: Run | None = None, *, quiet: bool = False, **options: Any) -> Trained:
    """Train one detector on one dataset: a `Run`, or its fields as keywords. See `config.Run` for them.

    Raises `UserError` for a mistake in the options or the data, before training; `Diverged` when a loss is not finite.
    """
    run = run or make_run(**options)
    if runs.ranks() > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns that a model may use all its parameters
        return _train(run, quiet=quiet)
    from boxwright.training.stopping import Stop

    with Stop():
        return _train(runs.settled(run), quiet=quiet)


def _train(run: Run, *, quiet: bool) -> Trained:
    _check_run(run)
    from boxwright.training.loop import train

    return train(run, quiet=quiet)


NO_DATA = "none yet"  # in the place of `Run.data` where a run without any is planned


def plan(run: Run | None = None, *, ranks: int = 1, say: Say = lambda _: None, **options: Any) -> Plan:
    """Measure what a run would take: memory, batch, speed, its end. The options are `train`'s; `data` may be left out.

    Nothing is learned, and nothing written. Raises `UserError` for a mistake in the options or the data.
    """
    if not any(options.get(name) for name in ("data", "resume", "init_from")):
        options["data"] = NO_DATA
    run = runs.settled(run or make_run(**options))
    if ranks < 1:
        raise UserError(f"--ranks {ranks} must be at least 1")
    if runs.ranks() > 1:
        raise UserError("plan measures one process: start it without torchrun, and say --ranks")
    if run.data == NO_DATA:
        run = run.model_copy(update={"data": ""})
    _check_run(run)
    from boxwright.training.plan import plan

    return plan(run, ranks=ranks, say=say)


def evaluate(
    weights: str | Path | None = None,
    data: str | Path | None = None,
    *,
    truth: str | Path | None = None,
    detections: str | Path | None = None,
    boxes: Literal["edges", "pixels", "sizes"] = "edges",
    split: Literal["train", "val", "test", "all"] = "val",
    iou: Sequence[float] = (0.5, 0.75),
    intervals: int = 200,
    seed: int = 0,
    skip_bad: bool = False,
    ignore_unknown: bool = False,
    imgsz: int | None = None,
    square_img: bool | None = None,
    batch: int = 1,
    workers: int = 0,
    device: str = "auto",
    name: str | None = None,
    project_dir: Path = Path("outputs/evaluation"),
    plugin: Sequence[str | Path] = (),
    say: Say = lambda _: None,
) -> Evaluated:
    """Judge a checkpoint on a split, or detections in a file, by every convention; writes a folder.

    Classes are compared by name: those of the data must be the checkpoint's, in any order. Under torchrun the processes
    share the pictures; the figures are those of one process, and only the first writes.
    """
    _check_sizes(imgsz, batch, workers)
    if wrong := [value for value in iou if not 0 < value <= 1]:
        hint = f" Did you mean {wrong[0] / 100:g}?" if 1 < wrong[0] <= 100 else ""
        raise UserError(f"--iou {wrong[0]:g} is not above 0 and at most 1.{hint}")
    if not 0 <= intervals <= MOST_RESAMPLES or seed < 0:
        raise UserError(f"--intervals must be from 0 to {MOST_RESAMPLES:,}, --seed at least 0")
    require_name(name)
    if (weights is None) == (detections is None):
        raise UserError("evaluate wants --weights of a detector, or --detections of a file or folder: one of them")
    if (data is None) == (truth is None):
        raise UserError("evaluate wants what is to be found: --data, or --truth beside --detections")
    if detections is not None:
        found = Path(detections).expanduser()
        expected = Path(truth if truth is not None else str(data)).expanduser()
        return _evaluate_files(
            found, expected, boxes=boxes, split=split, skip_bad=skip_bad, iou=iou, intervals=intervals, seed=seed,
            resized=(imgsz or 640, bool(square_img)), name=name, project_dir=project_dir, say=say,
        )  # fmt: skip
    if data is None or weights is None:
        raise UserError("--truth is for --detections; say --data beside --weights")
    for path in plugin:
        registry.use_plugin(path)
    if (kind := Path(weights).suffix.lower()) in EXPORTED:
        raise UserError(f"{weights}: exported models ({kind}) cannot be judged yet; give the run's .safetensors")
    weights = _existing(weights)
    from boxwright.data.dataset import open_dataset

    dataset = open_dataset(data)
    from boxwright.evaluation.files import records_of
    from boxwright.inference.predictor import Predictor
    from boxwright.models.checkpoint import read_header

    classes = read_header(weights).classes
    missing = sorted(set(dataset.classes) - set(classes))
    if missing and not ignore_unknown:
        raise UserError(
            f"{weights} does not know the classes {', '.join(missing)} of {data}; it knows {', '.join(classes)}"
        )
    dataset = dataset.with_classes(classes)
    records = records_of(dataset, split, skip_bad=skip_bad, ignore_unknown=ignore_unknown)
    from boxwright.evaluating import About, write_evaluation
    from boxwright.evaluation.conventions import Resized
    from boxwright.training.distributed import join

    with join() as world:
        say = say if world.first else lambda _: None
        predictor = Predictor.load(weights, device=str(world.device(device)), imgsz=imgsz, square=square_img)
        folder = world.from_first(claim(project_dir, name) if world.first else None)
        assert folder is not None
        for note in dataset.notes:
            say(note)
        say(f"{split}: {len(records)} pictures of {data}, on {predictor.device}")
        started = time.monotonic()
        progress = Progress("picture", len(records), say)
        mine: dict[int, Detections] = {}
        each = predictor.each_record(records, batch=batch, workers=workers, rank=world.rank, ranks=world.size)
        for index, its in each:
            mine[index] = its
            progress(min(len(mine) * world.size, len(records)))
        shares = world.gathered(mine)
        speed = len(records) / (time.monotonic() - started)
        done = None
        if world.first:
            found = {index: its for share in shares for index, its in share.items()}
            fit = predictor.fit
            done = write_evaluation(
                folder, records, [found[i] for i in range(len(records))], classes,
                origin={"weights": str(weights), "data": str(data), "split": split},
                about=About(iou, Resized(fit.imgsz, fit.square), intervals, seed),
                images_per_second=speed,
            )  # fmt: skip
        done = world.from_first(done)
    assert done is not None
    return done


def _evaluate_files(
    found: Path,
    expected: Path,
    *,
    boxes: Literal["edges", "pixels", "sizes"],
    split: Literal["train", "val", "test", "all"],
    skip_bad: bool,
    iou: Sequence[float],
    intervals: int,
    seed: int,
    resized: tuple[int, bool],
    name: str | None,
    project_dir: Path,
    say: Say,
) -> Evaluated:
    """Judge detections in files; nothing here needs PyTorch."""
    from boxwright.evaluating import About, write_evaluation
    from boxwright.evaluation.conventions import Resized
    from boxwright.evaluation.files import read_detections, read_truth

    if not found.exists():
        _existing(found, "detections")
    truth = read_truth(expected, split=split, boxes=boxes, skip_bad=skip_bad)
    judged = read_detections(found, truth, boxes=boxes)
    for note in (*truth.notes, *judged.notes):
        say(note)
    count = sum(len(one) for one in judged.detections)
    say(f"{len(truth.records)} pictures of {expected}, {count} detections of {found}")
    return write_evaluation(
        claim(project_dir, name), truth.records, judged.detections, judged.classes,
        origin={"detections": str(found), "data": str(expected), "split": split},
        about=About(iou, Resized(*resized), intervals, seed, truth.areas),
    )  # fmt: skip


MOST_RESAMPLES = 100_000
EXPORTED = frozenset({".onnx", ".engine", ".pt2", ".torchscript", ".mlmodel", ".mlpackage", ".tflite", ".xml"})


def predict(
    weights: str | Path,
    input: str | Path,
    *,
    threshold: float | None = None,
    imgsz: int | None = None,
    square_img: bool | None = None,
    classes: Sequence[str] = (),
    labels: bool = True,
    show: bool = False,
    stream: bool = False,
    batch: int = 1,
    device: str = "auto",
    name: str | None = None,
    output: Path = Path("outputs/inference"),
    plugin: Sequence[str | Path] = (),
    say: Say = lambda _: None,
) -> Predicted:
    """Boxes on pictures, folders, globs, videos, cameras: annotated copies and predictions.json in a new folder.

    Without a `threshold` it is the checkpoint's own: the one with the highest F1 on its validation pictures.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        hint = f" Did you mean {threshold / 100:g}?" if 1 < threshold <= 100 else ""
        raise UserError(f"--threshold {threshold:g} is not between 0 and 1.{hint}")
    _check_sizes(imgsz, batch)
    for path in plugin:
        registry.use_plugin(path)
    weights = _existing(weights)
    from boxwright.inference.media import open_input

    sources = open_input(str(input), stream=stream)
    from boxwright.inference.predictor import Predictor
    from boxwright.inference.run import Style, predict_sources
    from boxwright.models.checkpoint import read_header

    header = read_header(weights)
    only = frozenset(_label(name, header.classes) for name in classes) or None
    predictor = Predictor.load(weights, device=device, imgsz=imgsz, square=square_img)
    if predictor.fit != type(predictor.fit)(**header.fit):
        say(f"note: trained at {_describe(header.fit)}, predicting at {_describe(vars(predictor.fit))}")
    why = "the highest F1 on its validation pictures" if "threshold" in header.scores else "no better one is known"
    own, threshold = threshold is None, header.threshold if threshold is None else threshold
    style = Style(threshold, only, labels, show, batch)
    folder = claim(output, name)
    try:
        done = predict_sources(predictor, sources, folder, style, say)
    except UserError:
        with suppress(OSError):  # not empty: something was written before
            folder.rmdir()
        raise
    if own:
        say(f"threshold {threshold:.2f}: {why} (--threshold says another)")
    return done


def check(
    data: str | Path,
    *,
    splits: Sequence[Literal["train", "val", "test"]] = (),
    decode: bool = False,
    imgsz: int | None = None,
    max_bad: float = 0.01,
    skip_bad: bool = False,
    ignore_unknown: bool = False,
    html: Path | None = None,
    workers: int | None = None,
    say: Say = lambda _: None,
) -> Checked:
    """Everything in a dataset that training would refuse, leave out or mend, and what looks wrong; it is only read.

    `html` is written: the same as one offline page. Raises `UserError` where the dataset cannot be opened.
    """
    if not 0 <= max_bad <= 1:
        raise UserError(f"--max-bad {max_bad:g} is not between 0 and 1")
    _check_sizes(imgsz, 1, workers or 0)
    from boxwright.data.check import Rules, check_dataset

    if workers is None:
        workers = os.cpu_count() or 1
    if html:
        from boxwright.report import checked_output

        html = checked_output(html, "--html")
    rules = Rules(max_bad, skip_bad, ignore_unknown)
    checked = check_dataset(
        data, splits=splits, decode=decode, imgsz=imgsz, workers=workers if workers > 1 else 0, rules=rules, say=say
    )
    if html:
        from boxwright.report import write_check

        write_check(checked, html)
    return checked


def mend(data: str | Path, folder: Path, *, copy: bool = False, say: Say = lambda _: None) -> Mended:
    """A corrected copy of a dataset in a new folder, with a list of all changes; the dataset stays as it is."""
    from boxwright.data.check.mend import mend_dataset

    return mend_dataset(data, folder, copy=copy, say=say)


def report(
    *folders: str | Path,
    compare: bool = False,
    watch: bool = False,
    output: str | Path | None = None,
    port: int = 8770,
    say: Say = lambda _: None,
) -> Path | None:
    """One offline page about a run: the folder of a training or of an evaluation; gives the page's path.

    `compare` lays several runs side by side. `watch` serves the page on this machine while the run goes on, until
    Ctrl-C, and writes nothing. Only files are read: no model, no data set.
    """
    if compare and watch:
        raise UserError("--watch follows one run, --compare lays several side by side: say one of them")
    if not folders:
        raise UserError("which run? `boxwright report RUN` wants the folder that a training or an evaluation wrote")
    if len(folders) > 1 and not compare:
        raise UserError(f"{len(folders)} folders: say --compare to lay them side by side, or name one")
    places = [Path(folder) for folder in folders]
    if watch:
        if output:
            raise UserError("--watch writes no file: leave out --output")
        from boxwright.report.watch import watch as serve

        serve(places[0], port=port, say=say)
        return None
    from boxwright.report import write_comparison, write_report

    target = Path(output) if output else None
    return write_comparison(places, target) if compare else write_report(places[0], target)


@dataclass(frozen=True)
class Demo:
    """What the demo made."""

    folder: Path
    trained: Trained
    evaluated: Evaluated
    predicted: Predicted


def demo(folder: Path = Path("outputs/demo"), *, seed: int = 0, say: Say = lambda _: None) -> Demo:
    """Draw a small VOC dataset, train a small ViTDet Faster R-CNN on it, evaluate, predict; a CPU, no network.

    outputs/demo/
    ├── final_xml_dataset/       drawn to train on, with data.yaml
    ├── unseen/                  drawn from another seed: pictures to be judged and predicted on, and clip.mp4
    ├── training/                the run folder
    ├── evaluation/              scores.json
    └── inference/               annotated pictures and video, predictions.json
    """
    from boxwright.data.synth import draw_clip, synthesize

    folder = claim(folder.parent, folder.name)
    say(f"1/5  drawing {DEMO_PICTURES} pictures to train on, and others to be judged on")
    shapes = ("circle", "triangle", "star", "cross", "heart", "arrow")
    drawing: dict[str, Any] = {"size": (96, 128), "classes": shapes, "objects": (1, 2), "scale": (0.45, 0.75)}
    data = synthesize(folder / "final_xml_dataset", train=DEMO_PICTURES, valid=60, seed=seed, **drawing)
    unseen = synthesize(folder / "unseen", train=12, valid=200, seed=seed + 1, **drawing)
    say("2/5  training fasterrcnn_vitdet_nano")
    trained = train(
        model="fasterrcnn_vitdet_nano", data=str(data), name="training", project_dir=folder, seed=seed,
        epochs=3, batch=4, imgsz=128, optimizer="adamw", lr=0.0015, weight_decay=0.05, schedule="cosine",
        warmup_steps=100, clip=1.0,
    )  # fmt: skip
    weights = trained.folder / "best_model.safetensors"
    say("3/5  judging it on 200 pictures that it has never seen")
    evaluated = evaluate(weights, unseen, batch=8, name="evaluation", project_dir=folder)
    say("4/5  drawing a short video")
    from fractions import Fraction

    from boxwright.inference.output import VideoWriter

    clip = folder / "unseen" / "train" / "images" / "clip.mp4"
    with VideoWriter(clip, Fraction(24), drawing["size"]) as writer:
        shown = {name: drawing[name] for name in ("size", "classes", "scale")}
        for frame in draw_clip(seed + 6, frames=72, objects=2, **shown):
            writer.write(frame)
    say("5/5  predicting on pictures and the video")
    predicted = predict(weights, clip.parent, threshold=0.6, name="inference", output=folder)
    return Demo(folder, trained, evaluated, predicted)


def show(
    data: str | Path | None = None,
    *,
    run: Path | None = None,
    epoch: int = 1,
    split: Literal["train", "val", "test"] = "train",
    pictures: Sequence[str] = (),
    count: int = 12,
    classes: Sequence[str] = (),
    draw_seed: int = 0,
    each: bool = False,
    name: str | None = None,
    project_dir: Path = Path("outputs/shown"),
    say: Say = lambda _: None,
    **options: Any,
) -> Shown:
    """Draw pictures of a dataset with their ground truth, and as a network sees them.

    What it sees is decided by a run folder, `run`, or by options of training such as `mosaic=0.5`; `epoch` counts from
    1. The same samples come out as in that run's training, bit for bit.
    """
    if not 1 <= count <= MOST_SHOWN or len(pictures) > MOST_SHOWN:
        raise UserError(f"--count and --pictures: a sheet shows 1 to {MOST_SHOWN} pictures")
    if epoch < 1:
        raise UserError(f"--epoch {epoch} must be at least 1: epochs count from 1")
    options = {key: value for key, value in options.items() if value is not None}
    if run and options:
        flags = ", ".join("--" + key.replace("_", "-") for key in options)
        raise UserError(f"--run {run} says what the network sees: leave out {flags}")
    planned = runs.of_folder(run) if run else make_run(data=str(data or NO_DATA), **options) if options else None
    if planned and not data:
        data = planned.data
    if not data or data == NO_DATA:
        raise UserError("data show wants a dataset, or --run with a run folder")
    if planned and run and epoch > planned.epochs and not planned.budget:
        raise UserError(f"--epoch {epoch}: the run of {run} has {planned.epochs} of them")
    if planned and split != "train":
        raise UserError(f"--split {split}: only training pictures are augmented; leave out the options of training")
    if planned and planned.augment and not planned.augment.is_file():
        raise UserError(f"no file at {planned.augment} for --augment (looked from {Path.cwd()})")
    from boxwright.data.dataset import open_dataset

    dataset = open_dataset(data)
    tolerance: dict[str, Any] = planned.tolerance if planned else {"max_bad": 1.0, "skip_bad": True}
    part = dataset.read(split, **tolerance)
    from boxwright.training.show import Wanted, show

    for note in dataset.notes:
        say(note)
    if lost := part.pictures - len(part.records):
        say(f"{lost} of {part.pictures} pictures are left out: `boxwright data check` says why")
    wanted = Wanted(count, tuple(pictures), tuple(classes), draw_seed)
    return show(dataset, part, wanted, planned, epoch=epoch - 1, name=name, project_dir=project_dir, each=each)


MOST_SHOWN = 100  # pictures on a sheet


def shard(
    data: str | Path,
    folder: Path,
    *,
    size_mb: int = 256,
    max_bad: float = 0.01,
    ignore_unknown: bool = False,
    skip_bad: bool = False,
    say: Say = lambda _: None,
) -> Sharded:
    """Write a dataset as few large tar files into a new folder, which then is a dataset, here or behind an address."""
    if not 1 <= size_mb <= 65536:
        raise UserError(f"--size-mb {size_mb} must be from 1 to 65536")
    if not 0 <= max_bad <= 1:
        raise UserError(f"--max-bad {max_bad:g} must be from 0 to 1")
    from boxwright.data.dataset import open_dataset
    from boxwright.data.shards import shard

    tolerance = {"max_bad": max_bad, "ignore_unknown": ignore_unknown, "skip_bad": skip_bad}
    return shard(open_dataset(data), folder, size=size_mb << 20, tolerance=tolerance, say=say)


def list_models() -> dict[str, dict[str, str]]:
    """Everything with a name: headings, and under each the names with a line about each."""
    from boxwright.models.published import PUBLISHED

    def rows(kind: registry.Kind) -> dict[str, str]:
        return {name: f"{entry.summary}  [{_where(entry)}]" for name, entry in registry.entries(kind).items()}

    backbones = {
        "timm:NAME": "any of timm's that gives maps; `boxwright models 'timm:*vit*'` lists names",
        "torchvision:NAME": "any of torchvision's classifiers that gives maps, such as torchvision:resnet50",
    }
    weights = {name: f"{entry.licence}, {entry.source}" for name, entry in PUBLISHED.items()}
    return {
        "models (--model; `boxwright models NAME` tells more)": rows("detector"),
        "backbones (--backbone)": backbones | rows("backbone"),
        "pyramids (--pyramid)": rows("pyramid"),
        "weights (--weights; or a file, or `pretrained` for the backbone's own)": weights,
    }


def describe(name: str, **options: Any) -> dict[str, Any]:
    """A model in numbers: parameters, GFLOPs for a picture of 640 x 640, options, published weights."""
    entry = registry.find(name)
    from boxwright.models.published import fitting, own_weights
    from boxwright.models.summary import summarise

    summary = summarise(name, **options)
    published = {weights.name: f"{weights.name} ({weights.licence})" for weights in fitting(name, own_weights(name))}
    return {
        "name": name,
        "what": entry.summary,
        "parameters": f"{summary.parameters:,}",
        "GFLOPs": f"{summary.gflops:.1f} at {summary.size} px (backbone and pyramid {summary.backbone_gflops:.1f})",
        "levels": ", ".join(f"stride {s}: {c} channels" for s, c in summary.levels.items()),
        "options": ", ".join(entry.options),
        "weights": ", ".join(published.values()) or own_weights(name) or "none published",
        "builder": _where(entry),
    }


def timm_backbones(pattern: str) -> dict[str, str]:
    """timm's names that match `timm:PATTERN` (as a shell would match), each with the licence of its weights."""
    from boxwright.models.backbones import from_timm

    return from_timm.matching(pattern.removeprefix("timm:") or "*")


def _where(entry: registry.Entry) -> str:
    inside = entry.path.is_relative_to(registry.PACKAGE)
    return f"{entry.path.relative_to(registry.PACKAGE.parent) if inside else entry.path}:{entry.line}"


def check_model(run: Run) -> None:
    """Names and options of model, backbone and pyramid, before PyTorch is imported."""
    registry.require_options(registry.find(run.model), run.model_options)
    if run.backbone and ":" not in run.backbone:
        registry.find(run.backbone, "backbone")
    if run.pyramid:
        registry.find(run.pyramid, "pyramid")


DEMO_PICTURES = 1800  # with 3 epochs of them the detector gets well past mAP50 0.8


def _check_run(run: Run) -> None:
    """Names and paths of a run, before PyTorch is imported."""
    for path in run.plugin:
        registry.use_plugin(path)
    check_model(run)
    from boxwright.data.dataset import open_dataset

    if run.augment and not run.augment.is_file():
        raise UserError(f"no file at {run.augment} for --augment (looked from {Path.cwd()})")
    if run.log_to:
        from boxwright.training.sinks import require_sinks

        require_sinks(run.log_to)
    if run.data:
        open_dataset(run.data)
    if not run.resume and not run.init_from:
        _check_weights_path(run.weights)


def _check_sizes(imgsz: int | None, batch: int, workers: int = 0) -> None:
    if imgsz is not None and (imgsz < SMALLEST or imgsz > LARGEST or imgsz % 16):
        raise UserError(f"--imgsz {imgsz} must be a multiple of 16 from {SMALLEST} to {LARGEST}")
    if batch < 1:
        raise UserError(f"--batch {batch} must be at least 1")
    if workers < 0:
        raise UserError(f"--workers {workers} must be at least 0")


def _label(name: str, classes: Sequence[str]) -> int:
    if name not in classes:
        hint = registry.nearest(name, classes) or f" Known: {', '.join(classes)}"
        raise UserError(f"unknown class {name!r}.{hint}")
    return list(classes).index(name)


def _describe(fit: dict[str, Any]) -> str:
    return f"{fit['imgsz']}{' square' if fit['square'] else ', aspect kept'}"


def _existing(weights: str | Path, what: str = "weights") -> Path:
    path = Path(weights).expanduser()
    if len(path.name) > 255:
        raise UserError(f"no {what} at {str(path)[:80]}...: no file name is that long")
    if not path.exists():
        nearby = registry.nearest(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise UserError(f"no {what} at {path} (looked from {Path.cwd()}).{nearby}")
    return path


def _check_weights_path(weights: str | None) -> None:
    """A start that looks like a path must exist; names are looked up later, beside the table of published weights."""
    if weights and weights.startswith(("timm:", "torchvision:")):
        return
    if weights and ("/" in weights or "\\" in weights or "." in Path(weights).name):
        _existing(weights)
