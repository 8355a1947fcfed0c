"""What a run is made of: default, type, range and help of every option in one place.

A `Run` is read from the command line, written as run.yaml and carried by every checkpoint.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from boxwright import recipes
from boxwright.errors import UserError
from boxwright.registry import nearest

Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["constant", "cosine", "step"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]

SMALLEST, LARGEST = 32, 4096  # pixels a side
# What may change when a run goes on: where and how it is computed, not what.
MAY_CHANGE = (
    "device", "workers", "micro_batch", "eval_batch", "save_minutes", "shard", "data_timeout", "step_timeout", "log_to",
    "cache", "cache_gb",
)  # fmt: skip


class Run(BaseModel):
    """One detector trained on one dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # What
    data: str = Field(
        "",
        description="Data YAML, VOCdevkit, COCO json, CSV, or folder of pictures with VOC XML, YOLO or LabelMe files.",
    )
    model: str = Field("fasterrcnn_resnet50_fpn_v2", description="Name of the detector; `boxwright models` lists them.")
    backbone: str | None = Field(
        None,
        min_length=1,
        description="Backbone under the model: timm:NAME, torchvision:NAME or a registered name.",
    )
    pyramid: str | None = Field(None, description="Pyramid between them: fpn, simple; by default what fits.")
    option: tuple[str, ...] = Field((), description="Option of the model's builder, NAME=VALUE; may be repeated.")
    plugin: tuple[Path, ...] = Field((), description="Python file that registers parts of your own; may be repeated.")
    recipe: str | None = Field(
        None, description="Complete recipe: article, vitdet; what is given beside it stands. See `boxwright models`."
    )
    weights: str | None = Field(
        None,
        description="Start from these weights: a file, a published name, or `pretrained` for the backbone's own; "
        "otherwise from random numbers.",
    )
    require_license: Literal["permissive"] | None = Field(
        None, description="Refuse weights whose licence does not allow any use."
    )
    name: str | None = Field(None, description="Name of the run folder; by default res_1, res_2, ...")
    project_dir: Path = Field(Path("outputs/training"), description="Folder that run folders are made in.")
    exist_ok: bool = Field(False, description="Write into a run folder that exists, replacing what is there.")

    resume: Path | None = Field(
        None,
        exclude=True,
        description="Go on with the run of this folder exactly where it stopped; `auto`: with --name's, once begun.",
    )
    init_from: Path | None = Field(
        None,
        exclude=True,
        description="Start a new run from the best weights of this run folder, with its options where none are given.",
    )
    ignore_unknown: bool = Field(False, description="Leave out objects of classes that are not in the list.")
    skip_bad: bool = Field(
        False, description="Leave out annotations that contradict themselves, such as xmax below xmin, and go on."
    )
    max_bad: float = Field(
        0.01, ge=0, le=1, description="Largest share of the pictures that may be left out, as unreadable or unlabelled."
    )

    # How long
    epochs: int = Field(5, ge=1, description="Passes over the training pictures.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many steps, however many epochs that is.")
    time_budget: str | None = Field(
        None, description="Train as long as this allows, such as 3h or 90m: the schedule is fitted to measured speed."
    )
    patience: int = Field(10, ge=1, description="Stop when this many evaluations in a row bring no better mAP.")
    eval_every: int = Field(1, ge=1, description="Evaluate every so many epochs, and at the end.")

    # What the network sees
    imgsz: int = Field(
        640, ge=SMALLEST, le=LARGEST, multiple_of=16, description="Side in pixels that pictures are resized to."
    )
    square_training: bool = Field(
        False, description="Stretch pictures to a square; otherwise keep their aspect and pad."
    )
    multi_scale: tuple[int, int] | None = Field(
        None, description="Smallest and largest --imgsz of a training batch, such as 480 800, drawn for each."
    )
    group_aspect: bool = Field(False, description="Put pictures of similar aspect into one batch: less padding.")
    decode_scaled: bool = Field(
        False, description="Reduce JPEGs of twice the size and more while decoding: faster, slightly other pixels."
    )
    use_train_aug: bool = Field(
        False, description="The article's augmentations: blur, grey, brightness, colour, gamma."
    )
    flip: float = Field(0.0, ge=0, le=1, description="Share of the training pictures mirrored left for right.")

    scale_jitter: tuple[float, float] | None = Field(
        None, description="Smallest and largest random scale of a training picture, such as 0.1 2: cropped or padded."
    )
    mosaic: float = Field(0.0, ge=0, le=1, description="Share of the training samples that join four pictures.")
    mixup: float = Field(0.0, ge=0, le=1, description="Share of the training samples that blend two pictures.")
    copy_paste: float = Field(
        0.0, ge=0, le=1, description="Share of the training samples that get objects of another picture."
    )
    close_mosaic: int = Field(10, ge=0, description="Last epochs without mosaic, mixup and pasted objects.")
    augment: Path | None = Field(
        None, description="Python file with an augmentation of your own: Albumentations, torchvision v2 or a function."
    )
    article_faults: bool = Field(
        False, description="Bring back the article's faults, to compare: boxes cut to integers, difficult ones learnt."
    )

    # Optimisation
    batch: int | Literal["auto"] = Field(
        4, description="Pictures in a step, over all GPUs together; `auto`: as many as fit, at most 64."
    )
    micro_batch: int | None = Field(
        None, ge=1, description="Pictures at once; a step adds up as many as --batch says. Less memory, same training."
    )
    lr: float | None = Field(None, gt=0, le=10, description="Learning rate; 0.001 for SGD, 0.0001 for AdamW.")
    optimizer: Optimizer = Field("sgd", description="SGD with Nesterov momentum 0.9, or AdamW.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="Decay of weights; biases, norms and positions have none.")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="Learning rate of a backbone's layer relative to the one above it (ViTDet: 0.7)."
    )
    schedule: Schedule = Field(
        "constant", description="Learning rate after warm-up; step: a tenth at 89 % and at 96 %."
    )
    warmup_steps: int = Field(1000, ge=0, description="Steps of rising learning rate, at most the first epoch.")
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Judge and save an average of the weights with this decay, such as 0.9998; 0: none.",
    )
    clip: float = Field(10.0, gt=0, description="Largest norm of the gradient; longer ones are shortened to it.")

    # The machine
    shard: bool = Field(
        False, description="Share out weights, gradients and optimizer among the GPUs (FSDP2), for what does not fit."
    )
    deterministic: bool = Field(
        False, description="The same bits from the same run on a GPU too, slower; a CPU gives them anyway."
    )
    data_timeout: float = Field(300.0, gt=0, description="Seconds that a picture may take to be read.")
    step_timeout: float = Field(600.0, gt=0, description="Seconds that a GPU waits for the others in a step.")
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        (), description="Also log to tensorboard, wandb or mlflow; may be repeated."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps.")
    precision: Precision = Field("auto", description="Autocast: bf16 or fp16 where the device has it.")
    workers: int | None = Field(
        None, ge=0, description="Processes that read pictures; by default chosen by the device."
    )
    cache: Literal["off", "memory", "disk"] = Field(
        "off", description="Keep decoded pictures, for all processes of this machine: memory, disk."
    )
    cache_gb: float | None = Field(
        None, gt=0, description="Gigabytes that they may take; by default half of what is free."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Of initial weights, order, augmentation and sampling.")

    save_minutes: float = Field(10.0, ge=0, description="Save what a resume needs every so many minutes.")

    # Judging
    eval_batch: int | None = Field(
        None, ge=1, description="Pictures at once in evaluation; by default as many as in training."
    )

    @field_validator("option", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """From Python options may be a mapping."""
        return tuple(f"{k}={json.dumps(v)}" for k, v in value.items()) if isinstance(value, Mapping) else value

    @model_validator(mode="before")
    @classmethod
    def _generic_model(cls, values: Any) -> Any:
        """A backbone without a model's name goes under Faster R-CNN."""
        if isinstance(values, dict) and values.get("backbone") and "model" not in values:
            return {**values, "model": "fasterrcnn"}
        return values

    @model_validator(mode="before")
    @classmethod
    def _with_recipe(cls, values: Any) -> Any:
        """A recipe says what the options given leave open."""
        if isinstance(values, dict) and values.get("recipe"):
            try:
                return recipes.resolved(str(values["recipe"]), values)
            except UserError as error:
                raise ValueError(str(error)) from None
        return values

    @field_validator("batch", mode="before")
    @classmethod
    def _whole_batch(cls, value: Any) -> Any:
        if value == "auto" or (re.fullmatch(r"\d{1,6}", str(value).strip()) and int(value) >= 1):
            return value if value == "auto" else int(value)
        raise ValueError(f"--batch {str(value)[:20]}: neither a number of pictures from 1 on nor auto")

    @field_validator("time_budget")
    @classmethod
    def _readable_budget(cls, value: str | None) -> str | None:
        if value is not None and not seconds_in(value):
            raise ValueError(f"--time-budget {value[:40]!r} is no time such as 3h, 90m or 1h30m")
        return value

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        if not self.data and not self.resume and not self.init_from:
            raise ValueError(f"--data is missing: {Run.model_fields['data'].description}")
        limit = {"sgd": 10.0, "adamw": 0.004}[self.optimizer]
        if self.lr is not None and self.lr > limit:
            raise ValueError(
                f"--lr {self.lr:g} belongs to SGD; AdamW wants 0.0001 or so. Lower it, or use --optimizer sgd"
            )
        if self.optimizer == "sgd" and self.lr is not None and self.lr < 1e-5:
            raise ValueError(
                f"--lr {self.lr:g} belongs to AdamW; SGD wants 0.001 to 0.02. Raise it, or use --optimizer adamw"
            )
        if self.scale_jitter and not 0.05 <= self.scale_jitter[0] <= self.scale_jitter[1] <= 4:
            raise ValueError("--scale-jitter wants two factors from 0.05 to 4, the smaller one first, such as 0.1 2")
        if self.multi_scale and not (
            SMALLEST <= self.multi_scale[0] <= self.multi_scale[1] <= LARGEST
            and not any(side % 32 for side in self.multi_scale)
        ):
            raise ValueError(
                f"--multi-scale wants two multiples of 32 from {SMALLEST} to {LARGEST}, the smaller one first, "
                "such as 480 800"
            )
        if self.cache_gb is not None and self.cache == "off":
            raise ValueError("--cache-gb goes with --cache memory or --cache disk")
        odd = [text for text in self.option if not text.partition("=")[0].isidentifier() or "=" not in text]
        if odd:
            raise ValueError(f"--option {odd[0][:80]!r} is not NAME=VALUE, such as drop_path=0.2")
        names = [text.partition("=")[0] for text in self.option]
        for name in names:
            if name == "num_classes":
                raise ValueError("--option num_classes: the number of classes comes from the data")
            if name in ("backbone", "pyramid"):
                raise ValueError(f"--option {name}: say --{name}")
            if names.count(name) > 1:
                raise ValueError(f"--option {name} is given twice")
        return self

    @property
    def model_options(self) -> dict[str, Any]:
        """What the model's builder is given besides the number of classes."""
        joined = {"backbone": self.backbone, "pyramid": self.pyramid}
        pairs = (text.partition("=") for text in self.option)
        return {k: v for k, v in joined.items() if v is not None} | {k: _literal(v) for k, _, v in pairs}

    @property
    def tolerance(self) -> dict[str, Any]:
        """What `Dataset.read` is to let pass."""
        return {"max_bad": self.max_bad, "ignore_unknown": self.ignore_unknown, "skip_bad": self.skip_bad}

    @property
    def budget(self) -> float | None:
        """Seconds that the run may take."""
        return seconds_in(self.time_budget) if self.time_budget else None

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""
        return self.lr if self.lr is not None else {"sgd": 1e-3, "adamw": 1e-4}[self.optimizer]

    def learning_rate_at(self, step: int, steps_per_epoch: int, total_steps: int) -> float:
        """The learning rate of a step, a pure function of the step (0-based)."""
        warmup = min(self.warmup_steps, max(steps_per_epoch, total_steps // 20))
        rise = 1e-3 + (1 - 1e-3) * step / warmup if step < warmup else 1.0  # from lr/1000, as the article's pipeline
        if self.schedule == "constant":
            return self.learning_rate * rise
        if self.schedule == "step":  # ViTDet's: 100 epochs, a tenth after 88.9 and 96.3
            return self.learning_rate * rise * 0.1 ** sum(step >= share * total_steps for share in (8 / 9, 26 / 27))
        progress = min(max(step - warmup, 0) / max(total_steps - warmup, 1), 1.0)
        return self.learning_rate * rise * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def seconds_in(text: str) -> float:
    """Of a time such as 3h, 90m, 1h30m or 45s; 0 where it is none."""
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+)s)?", text.strip().lower())
    return (
        sum(float(part or 0) * size for part, size in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0
    )


def _literal(text: str) -> Any:
    """A number, true, false, null, a list; anything else is text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def make_run(**options: Any) -> Run:
    """A checked `Run`; what is wrong becomes one `UserError` that names the flags."""
    try:
        return Run(**options)
    except ValidationError as error:
        raise UserError("; ".join(explain(e) for e in error.errors())) from None


def read_run(folder: Path) -> Run:
    """The run of a folder, from its run.yaml."""
    import yaml

    path = folder / "run.yaml"
    if not path.is_file():
        raise UserError(f"no run at {folder}: it has no run.yaml. Wanted is the folder that a training wrote")
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise UserError(f"{path} uses YAML aliases, which no run.yaml of ours does: it may be a trap")
        described = yaml.safe_load(text)
        described.pop("classes", None)
        return Run(**described)
    except ValidationError as error:
        reason = "; ".join(explain(e) for e in error.errors())
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
    raise UserError(f"{path} is no run that this version can read: {reason}")


def explain(error: Any) -> str:
    """One of pydantic's errors in the words of the command line."""
    if not error["loc"] or error["type"] == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    name = str(error["loc"][0])
    flag = "--" + name.replace("_", "-")
    given = error.get("input")
    if error["type"] == "extra_forbidden":
        return f"unknown option {flag}.{nearest(name, Run.model_fields)}"
    if error["type"] == "missing":
        return f"{flag} is missing: {Run.model_fields[name].description}"
    if error["type"] == "multiple_of":
        below = int(given) // 16 * 16
        allowed = sorted({min(max(side, SMALLEST), LARGEST) for side in (below, below + 16)})
        return f"{flag} {given} is not a multiple of 16; use {' or '.join(map(str, allowed))}"
    return f"{flag} {given}: {error['msg'][0].lower()}{error['msg'][1:]}"
