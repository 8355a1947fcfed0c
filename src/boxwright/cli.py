"""One function a verb: parse, call, print; no logic. The work is in `verbs`.

The program finds the public functions here by reading this file: `data_synth` is `boxwright data synth`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import Field

from boxwright import registry, runs, verbs
from boxwright.config import Run, make_run

Json = Annotated[bool, Parameter(help="Print the result as one JSON object on standard output.")]


def demo(*, folder: Path = Path("outputs/demo"), seed: int = 0, json: Json = False) -> int:
    """Draw a small dataset, train a small ViTDet Faster R-CNN on it, evaluate, predict. A CPU, no network.

    Parameters
    ----------
    folder
        Where everything goes; a number is added if it exists.
    seed
        Of the drawing and the training.
    """
    made = verbs.demo(folder, seed=seed, say=_say)
    map50 = made.evaluated.scores.coco["AP50"]
    _say("")
    _say(_table(made.evaluated.scores))
    _say(f"pictures with boxes   {made.predicted.folder}/*.jpg  clip.mp4")
    _say(f"graphs                {made.trained.folder}/plots/map.png  loss.png")
    _say(f"all on one page       {made.trained.folder}/report.html")
    _say(f"what it trained on    {made.trained.folder}/previews/first_batch.jpg")
    _say(f"weights               {made.trained.folder}/best_model.safetensors")
    _say("")
    _say("Your own data: a folder with train/images, train/labels, valid/images, valid/labels (VOC XML), then")
    _say("  boxwright train --model fasterrcnn_vitdet_tiny --data FOLDER --epochs 20 --name first")
    _say("  boxwright predict --weights outputs/training/first/best_model.safetensors --input PICTURES")
    _result(json, {"folder": made.folder, "map50": map50, "scores": made.evaluated.scores})
    return 0


def train(*, run: Annotated[Run | None, Parameter(name="*")] = None, json: Json = False) -> int:
    """Train one detector on one dataset."""
    trained = verbs.train(run or make_run())
    _result(json, trained)
    return 0


class _Planned(Run):
    """A run that may have no data yet."""

    data: str = Field(
        verbs.NO_DATA, description="Data YAML, VOCdevkit folder, or folder with train/ and valid/; may be left out."
    )


def plan(*, run: Annotated[_Planned | None, Parameter(name="*")] = None, ranks: int = 1, json: Json = False) -> int:
    """Foretell memory, batch, speed and end of a training, measured on this machine. The options are train's.

    Parameters
    ----------
    ranks
        GPUs, or processes on a CPU, that would train together.
    """
    planned = verbs.plan(run, ranks=ranks, say=_say)
    _say(_lines(planned.described()))
    _result(json, planned)
    return 0


def evaluate(
    *,
    weights: Path | None = None,
    data: str | None = None,
    truth: str | None = None,
    detections: Path | None = None,
    boxes: Literal["edges", "pixels", "sizes"] = "edges",
    split: Literal["train", "val", "test", "all"] = "val",
    iou: Annotated[list[float] | None, Parameter(consume_multiple=True)] = None,
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
    plugin: list[Path] | None = None,
    json: Json = False,
) -> int:
    """Judge a detector, or detections in files, by every convention side by side.

    Parameters
    ----------
    weights
        best_model.safetensors of a run.
    data
        Data YAML or folder, as in training.
    truth
        With --detections: a dataset, a COCO json alone, or a folder of text files of `class x1 y1 x2 y2 [difficult]`.
    detections
        Instead of --weights: COCO's results, our detections.json or predictions.json, or a folder of text files of
        `class score x1 y1 x2 y2`.
    boxes
        In text files: edges; pixels, the first and last as VOC has them; or sizes, left top width height.
    split
        Which part of the data; all for every picture.
    iou
        Of VOC's figures; 0.5 and 0.75 are always shown.
    intervals
        Resamples of the pictures for 95 % intervals; 0 for none.
    seed
        Of the resamples.
    skip_bad
        Leave out annotations that contradict themselves, as in training.
    ignore_unknown
        Leave out objects of classes that the detector does not know.
    imgsz
        Side that pictures are resized to; by default as in training. With --detections, by the article's convention.
    square_img
        Stretch pictures to a square; by default as in training.
    batch
        Pictures at once.
    workers
        Processes that read pictures.
    device
        auto, cpu, cuda, cuda:1, mps.
    name
        Of the folder with scores.json, detections.json and report.html.
    project_dir
        Where that folder is made.
    plugin
        Python file that registers parts of your own, as in training.
    """
    done = verbs.evaluate(
        weights, data, truth=truth, detections=detections, boxes=boxes, split=split, iou=iou or (0.5, 0.75),
        intervals=intervals, seed=seed, skip_bad=skip_bad, ignore_unknown=ignore_unknown, imgsz=imgsz,
        square_img=square_img, batch=batch, workers=workers, device=device, name=name,
        project_dir=project_dir, plugin=plugin or (), say=_say,
    )  # fmt: skip
    from boxwright.evaluation.printed import tables

    if runs.first():
        speed = done.images_per_second
        _say(tables(done.judgement, images_per_second=speed, threshold=done.threshold, note=done.note))
        _say(f"{done.folder / 'report.html'}")
        _result(json, done)
    return 0


def predict(
    *,
    weights: Path,
    input: str,
    threshold: float | None = None,
    imgsz: int | None = None,
    square_img: bool | None = None,
    classes: Annotated[list[str], Parameter(consume_multiple=True)] | None = None,
    no_labels: bool = False,
    show: bool = False,
    stream: bool = False,
    batch: int = 1,
    device: str = "auto",
    name: str | None = None,
    output: Path = Path("outputs/inference"),
    plugin: list[Path] | None = None,
    json: Json = False,
) -> int:
    """Draw boxes on pictures and videos.

    Parameters
    ----------
    weights
        best_model.safetensors of a run.
    input
        A picture, a video, a folder of them, a glob, a camera's number, or an address (with --stream).
    threshold
        Boxes with a lower score are left out; by default the checkpoint's own, of the highest F1 in its validation.
    imgsz
        Side that pictures are resized to; by default as in training.
    square_img
        Stretch pictures to a square; by default as in training.
    classes
        Names of the classes to keep; by default all.
    no_labels
        Draw boxes without names.
    show
        Show the result in a window while it is made.
    stream
        Allow an rtsp or http address as input.
    batch
        Frames of a video at once.
    device
        auto, cpu, cuda, cuda:1, mps.
    name
        Of the folder with the results.
    output
        Where that folder is made.
    plugin
        Python file that registers parts of your own, as in training.
    """
    done = verbs.predict(
        weights, input, threshold=threshold, imgsz=imgsz, square_img=square_img, classes=classes or (),
        labels=not no_labels, show=show, stream=stream, batch=batch, device=device, name=name, output=output,
        plugin=plugin or (), say=_say,
    )  # fmt: skip
    counts = [f"{n} {what}" for n, what in ((done.pictures, "pictures"), (done.frames, "frames")) if n]
    _say(f"{done.objects} objects in {' and '.join(counts)}; {done.folder}")
    for reason in done.skipped:
        _say(f"skipped: {reason}")
    _result(json, done)
    return 3 if done.skipped else 0


def report(
    *runs: Path,
    compare: bool = False,
    watch: bool = False,
    output: Path | None = None,
    port: int = 8770,
    json: Json = False,
) -> int:
    """Write one offline page about a run: curves, pictures, mistakes, options.

    Parameters
    ----------
    runs
        The folder of a training or of an evaluation; with --compare several.
    compare
        Lay several runs side by side.
    watch
        Serve the page to this machine while the run goes on; Ctrl-C ends it.
    output
        The page; by default report.html in the folder, or comparison.html beside the first.
    port
        Of --watch; 0 takes any that is free.
    """
    path = verbs.report(*runs, compare=compare, watch=watch, output=output, port=port, say=_say)
    if path:
        _say(str(path))
    _result(json, {"report": path})
    return 0


def models(
    name: str | None = None, /, *, plugin: Annotated[list[Path] | None, Parameter()] = None, json: Json = False
) -> int:
    """List detectors, backbones, pyramids and weights, or tell all about one.

    Parameters
    ----------
    name
        A model: its parameters, FLOPs, options and weights. Or `timm:` and a pattern: the backbones of that name.
    plugin
        Python file that registers parts of your own.
    """
    for path in plugin or ():
        registry.use_plugin(path)
    if name and name.startswith("timm:"):
        backbones = verbs.timm_backbones(name)
        _print(json, "\n".join(f"timm:{found}  {licence}" for found, licence in backbones.items()))
        _result(json, backbones)
    elif name:
        described = verbs.describe(name)
        _print(json, _lines(described))
        _result(json, described)
    else:
        listed = verbs.list_models()
        for heading, rows in listed.items():
            width = max(len(row) for row in rows)
            _print(json, "\n".join([heading, *(f"  {row:{width}}  {text}" for row, text in rows.items())]))
        _result(
            json, {kind: [dataclasses.asdict(e) for e in registry.entries(kind).values()] for kind in registry.WORDS}
        )
    return 0


def data_synth(
    folder: Path,
    *,
    train: int = 200,
    valid: int = 50,
    size: tuple[int, int] = (240, 320),
    classes: Annotated[list[str], Parameter(consume_multiple=True)] | None = None,
    objects: tuple[int, int] = (1, 5),
    scale: tuple[float, float] = (0.15, 0.5),
    seed: int = 0,
    json: Json = False,
) -> int:
    """Draw a VOC dataset: pictures of shapes over busy backgrounds, with XML.

    Parameters
    ----------
    folder
        To be made, with train/, valid/ and data.yaml inside.
    train
        Pictures to train on.
    valid
        Pictures to validate on.
    size
        Height and width of the pictures.
    classes
        Shapes to draw; by default all.
    objects
        Fewest and most objects in a picture.
    scale
        Smallest and largest side of an object, as a fraction of the picture's shorter side.
    seed
        The same seed draws the same pictures.
    """
    from boxwright.data.synth import CLASSES, synthesize

    path = synthesize(
        folder,
        train=train,
        valid=valid,
        size=size,
        classes=tuple(classes or CLASSES),
        objects=objects,
        scale=scale,
        seed=seed,
    )
    _say(f"{train} + {valid} pictures drawn; {path}")
    _result(json, {"data": path})
    return 0


def data_prepare(
    dataset: Literal["voc"],
    /,
    *,
    root: Path | None = None,
    archives: Path | None = None,
    folder: Path = Path("final_xml_dataset"),
    years: Annotated[list[Literal[2007, 2012]] | None, Parameter(consume_multiple=True)] = None,
    train: Annotated[list[Literal["train", "val", "trainval", "test"]] | None, Parameter(consume_multiple=True)] = None,
    valid: Annotated[list[Literal["train", "val", "trainval", "test"]] | None, Parameter(consume_multiple=True)] = None,
    copy: bool = False,
    json: Json = False,
) -> int:
    """Make a folder to train on from the official Pascal VOC.

    Parameters
    ----------
    dataset
        voc: train on 2007 + 2012 trainval (16,551 pictures), validate on 2007 test (4,952).
    root
        An unpacked VOCdevkit, or a folder with one in it.
    archives
        A folder with the official tar files. Without this and --root they are downloaded (2.9 GB for both years).
    folder
        To be made, with train/, valid/ and data.yaml inside.
    years
        2007, 2012 or both, the default.
    train
        Lists to train on; by default trainval, or train where --valid is val.
    valid
        Lists to validate on; by default test, or val where no test is public (2012).
    copy
        Make copies where hard links to the files of --root would do.
    """
    from boxwright.data.prepare import prepare_voc

    done = prepare_voc(
        folder, root=root, archives=archives, years=years or (2007, 2012), train=train or (), valid=valid or (),
        copy=copy, say=_say,
    )  # fmt: skip
    _say(f"{done.train:,} + {done.valid:,} pictures; {done.data}")
    _result(json, done)
    return 0


def data_convert(
    source: str,
    folder: Path,
    /,
    *,
    to: Literal["voc", "coco", "yolo", "labelme", "csv"],
    splits: Annotated[list[Literal["train", "val", "test"]] | None, Parameter(consume_multiple=True)] = None,
    difficult: Literal["keep", "drop"] | None = None,
    copy: bool = False,
    ignore_unknown: bool = False,
    skip_bad: bool = False,
    max_bad: float = 0.01,
    json: Json = False,
) -> int:
    """Write a dataset in another format; what that cannot hold is said first.

    Parameters
    ----------
    source
        What --data takes in training: a folder, data YAML, COCO json, CSV or shards. It stays as it is.
    folder
        To be made, with pictures, annotations and data.yaml inside.
    to
        The format to write.
    splits
        Those to be written, train among them; by default all.
    difficult
        What becomes of objects marked difficult or crowd in a format without marks (yolo): keep makes ordinary objects
        of them, drop leaves them out.
    copy
        Make copies of the pictures where hard links would do.
    ignore_unknown
        Leave out objects of classes that are not in the list.
    skip_bad
        Leave out annotations that contradict themselves, such as xmax below xmin.
    max_bad
        Largest share of the pictures that may be left out, as unreadable or unlabelled.
    """
    from boxwright.data.convert import convert_dataset

    done = convert_dataset(
        source, folder, to=to, splits=splits or (), difficult=difficult, copy=copy, ignore_unknown=ignore_unknown,
        skip_bad=skip_bad, max_bad=max_bad, say=_say,
    )  # fmt: skip
    pictures = " + ".join(f"{count:,} {split}" for split, count in done.pictures.items())
    _say(f"{pictures} pictures, {sum(done.objects.values()):,} objects; {done.data}")
    _result(json, done)
    return 0


def data_show(
    data: str | None = None,
    /,
    *,
    run: Path | None = None,
    epoch: int = 1,
    split: Literal["train", "val", "test"] = "train",
    pictures: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    count: int = 12,
    classes: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    draw_seed: int = 0,
    each: bool = False,
    imgsz: int | None = None,
    square_training: bool | None = None,
    use_train_aug: bool | None = None,
    flip: float | None = None,
    scale_jitter: tuple[float, float] | None = None,
    mosaic: float | None = None,
    mixup: float | None = None,
    copy_paste: float | None = None,
    augment: Path | None = None,
    recipe: str | None = None,
    seed: int | None = None,
    name: str | None = None,
    project_dir: Path = Path("outputs/shown"),
    json: Json = False,
) -> int:
    """Draw pictures of a dataset with their boxes: as annotated, and as a network sees them in training.

    Parameters
    ----------
    data
        Data YAML, folder or file, as in training; may be left out with --run.
    run
        Run folder: show what its network sees, sample by sample as in its training.
    epoch
        Of the training, counted from 1.
    split
        Which part of the dataset.
    pictures
        Ids of the pictures to show; by default some are drawn by chance.
    count
        How many are drawn by chance.
    classes
        Show pictures with an object of these classes.
    draw_seed
        Which pictures are drawn by chance.
    each
        Also write each picture alone, as PNG.
    imgsz
        With this or any option below, also show what the network sees; as in train.
    square_training
        As in train.
    use_train_aug
        As in train.
    flip
        As in train.
    scale_jitter
        As in train.
    mosaic
        As in train.
    mixup
        As in train.
    copy_paste
        As in train.
    augment
        As in train: a Python file with an augmentation of your own.
    recipe
        As in train.
    seed
        As in train.
    name
        Of the folder with the sheets.
    project_dir
        Where that folder is made.
    """
    shown = verbs.show(
        data, run=run, epoch=epoch, split=split, pictures=pictures or (), count=count, classes=classes or (),
        draw_seed=draw_seed, each=each, name=name, project_dir=project_dir, say=_say, imgsz=imgsz,
        square_training=square_training, use_train_aug=use_train_aug, flip=flip, scale_jitter=scale_jitter,
        mosaic=mosaic, mixup=mixup, copy_paste=copy_paste, augment=augment, recipe=recipe, seed=seed,
    )  # fmt: skip
    for reason in shown.skipped:
        _say(f"skipped: {reason}")
    _say(f"{len(shown.pictures)} pictures; {', '.join(map(str, shown.sheets))}")
    _result(json, shown)
    return 3 if shown.skipped else 0


def data_check(
    data: str,
    /,
    *,
    split: Annotated[list[Literal["train", "val", "test"]] | None, Parameter(consume_multiple=True)] = None,
    decode: bool = False,
    imgsz: int | None = None,
    limit: int = 5,
    max_bad: float = 0.01,
    skip_bad: bool = False,
    ignore_unknown: bool = False,
    fix: Path | None = None,
    copy: bool = False,
    html: Path | None = None,
    workers: int | None = None,
    json: Json = False,
) -> int:
    """Find everything in a dataset that training would refuse, leave out or mend, and what looks wrong.

    Exit code 0 where training would take it, 1 where it would refuse it. The dataset is only read.

    Parameters
    ----------
    data
        Data YAML, folder or file, as in training.
    split
        Parts of it; by default all.
    decode
        Decode all pixels too: finds damaged pictures, and equal ones in other files.
    imgsz
        Count the objects that would be under 8 pixels at this size of training.
    limit
        Findings of each kind that are told one by one; --json has all.
    max_bad
        As in train.
    skip_bad
        As in train: annotations that contradict themselves are left out, and no error.
    ignore_unknown
        As in train: objects of unknown classes are left out, and no error.
    fix
        A folder to be made: a corrected copy, with a list of all changes. The dataset stays as it is.
    copy
        With --fix: make copies where hard links to the pictures would do.
    html
        A file to be written: the report as one offline page, with pictures of the worst.
    workers
        Processes that decode; by default one for each core.
    """
    from boxwright.data.check.text import as_json, encodable, mended_lines, printable, report_lines

    checked = verbs.check(
        data, splits=split or (), decode=decode, imgsz=imgsz, max_bad=max_bad, skip_bad=skip_bad,
        ignore_unknown=ignore_unknown, html=html, workers=workers, say=_say,
    )  # fmt: skip
    if not json:
        _print(json, "\n".join(encodable(report_lines(checked, limit=max(limit, 0)), sys.stdout.encoding)))
    mended = verbs.mend(data, fix, copy=copy, say=_say) if fix else None
    if mended and not json:
        _print(json, "\n".join(encodable(mended_lines(mended), sys.stdout.encoding)))
    if html:
        stream = sys.stderr if json else sys.stdout
        _print(json, "\n".join(encodable([f"page: {printable(str(html.expanduser()))}"], stream.encoding)))
    _result(json, {**as_json(checked), "fixed": mended})
    return 1 if checked.errors else 0


def data_shard(
    data: str,
    folder: Path,
    /,
    *,
    size_mb: int = 256,
    max_bad: float = 0.01,
    ignore_unknown: bool = False,
    skip_bad: bool = False,
    json: Json = False,
) -> int:
    """Write a dataset as few large tar files, for a server or a disk that minds many small ones.

    Parameters
    ----------
    data
        Data YAML, folder or file, as in training.
    folder
        To be made; then --data FOLDER, or the address where it is served.
    size_mb
        About how large a file becomes.
    max_bad
        Largest share of the pictures that may be left out, as unreadable or unlabelled.
    ignore_unknown
        Leave out objects of classes that are not in the list.
    skip_bad
        Leave out annotations that contradict themselves, such as xmax below xmin.
    """
    done = verbs.shard(
        data, folder, size_mb=size_mb, max_bad=max_bad, ignore_unknown=ignore_unknown, skip_bad=skip_bad, say=_say
    )
    counts = ", ".join(f"{count:,} pictures of {split}" for split, count in done.pictures.items())
    _say(f"{counts} in {done.shards} shards, {done.bytes / 1e6:,.0f} MB; {done.folder}")
    _result(json, done)
    return 0


def _say(message: str) -> None:
    sys.stderr.write(message + "\n")


def _print(json: bool, text: str) -> None:
    """What was asked to be listed, on standard output; under `--json` that is for the object alone."""
    (sys.stderr if json else sys.stdout).write(text + "\n")


def _result(wanted: bool, value: Any) -> None:
    """The result as the last thing on standard output, if it was asked for; in ASCII, which every terminal takes."""
    if wanted:
        sys.stdout.write(json.dumps(_plain(value)) + "\n")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(values: dict[str, Any]) -> str:
    """Names and values under each other."""
    width = max(len(name) for name in values)
    return "\n".join(f"{name:{width}}  {value}" for name, value in values.items())


def _table(scores: Any) -> str:
    """Scores as a person reads them."""
    coco, voc = scores.coco, scores.voc
    lines = [
        f"{scores.images} pictures, {scores.objects} objects",
        f"COCO  AP {coco['AP']:.3f}  AP50 {coco['AP50']:.3f}  AP75 {coco['AP75']:.3f}  small {coco['APsmall']:.3f}  "
        f"medium {coco['APmedium']:.3f}  large {coco['APlarge']:.3f}  AR100 {coco['AR100']:.3f}",
        f"VOC   11 points {voc['07@50']:.3f}  area {voc['area@50']:.3f}  area at IoU 0.75 {voc['area@75']:.3f}",
    ]
    width = max(len(name) for name in scores.per_class)
    for name, row in scores.per_class.items():
        lines.append(f"  {name:{width}}  AP {row['AP']:.3f}  AP50 {row['AP50']:.3f}")
    return "\n".join(lines)
