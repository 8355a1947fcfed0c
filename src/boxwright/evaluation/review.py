"""Objects and detections → annotations that look wrong, the most suspicious first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from boxwright.evaluation.breakdown import coco_size
from boxwright.evaluation.judging import (
    Float64,
    Judged,
    judge,
    nearest,
    overlapping,
    select,
    with_objects,
)
from boxwright.evaluation.matching import Flat, Pairs, flatten
from boxwright.evaluation.thresholds import best_of
from boxwright.types import Bool, Detections, Int64, Record

Box = tuple[float, float, float, float]  # x1 y1 x2 y2, pixels
Suspicion = Literal["missing label", "wrong class", "wrong box", "nothing there"]


@dataclass(frozen=True)
class Suspect:
    """One annotation, or the lack of one, that a confident detection speaks against.

    `missing label`: a detection where no object is annotated (annotated_box and annotated_label are None).
    `wrong class`: the box fits an object that is annotated as another class. `wrong box`: the class agrees, the box
    does not. `nothing there`: an object that no detection of any class comes near (found_* and score are None).
    """

    kind: Suspicion
    image: str  # the record's id
    object: int | None  # index among the record's objects
    annotated_box: Box | None
    annotated_label: str | None  # class name
    found_box: Box | None
    found_label: str | None  # class name
    score: float | None  # of the detection
    iou: float | None  # of the two boxes; None where there is but one
    persistence: float | None  # share of the earlier epochs that say the same; None where none were given
    suspicion: float  # 0 .. 1, what the list is sorted by
    reason: str  # one sentence for people


@dataclass(frozen=True)
class Review:
    """The review list and how many suspects of each kind there were before it was cut to its length."""

    suspects: tuple[Suspect, ...]  # the most suspicious first
    counts: dict[str, int]  # by kind
    least_score: float  # from which on a detection may speak against an annotation
    epochs: int  # how many earlier epochs' detections were looked at


LIMIT = 200  # suspects listed
NEAR = 0.3  # IoU below which a detection and an object have little to do with each other
TOUCHES = 0.1  # IoU from which on a detection is near an object
SURE = 0.25  # a detection speaks against an annotation if its score is above those of this share of right ones
FAINT = 0.1  # of the recommended threshold: detections below say nothing
KINDS: tuple[Suspicion, ...] = ("missing label", "wrong class", "wrong box", "nothing there")


@dataclass(frozen=True, eq=False)
class _Claims:
    """Suspects before they are worded, in flat arrays; -1 where there is no detection or no object."""

    kind: Int64  # (S,) index into KINDS
    detection: Int64  # (S,)
    object: Int64  # (S,)
    iou: Float64  # (S,)
    strength: Float64  # (S,)


def review(
    judged: Judged,
    *,
    threshold: float,
    records: Sequence[Record] = (),
    earlier: Sequence[Sequence[Detections]] = (),
    limit: int = LIMIT,
) -> Review:
    """The annotations most worth a second look; `threshold` is the recommended one.

    Suspicion is strength times the share of epochs, this one among them, that say the same. Strength is
    `missing label`: score x (1 - IoU with the nearest object); `wrong class`: score x IoU x (1 - score of the right
    detection that the object has nonetheless); `wrong box`: score x (1 - IoU); `nothing there`: the share of
    the objects of its class and COCO size that are found at the threshold. Difficult objects and crowd regions are
    never suspects, and detections that lie on them speak against nothing.

    earlier: for each epoch before, the detections of `records`, in that order.
    """
    flat, least = judged.flat, _least_score(judged, threshold)
    claims = _joined(
        [
            _missing_labels(judged, least),
            _wrong_classes(judged, least),
            _wrong_boxes(judged, least),
            _nothing_there(judged, threshold),
        ]
    )
    persistence = _persistence(flat, claims, records, earlier, judged.iou)
    said = (1 + persistence * len(earlier)) / (1 + len(earlier))
    suspicion = claims.strength * said
    order = np.lexsort((claims.detection, claims.object, claims.kind, -suspicion))
    order = order[suspicion[order] > 0]  # such objects are never found, say: nothing speaks against these
    return Review(
        suspects=tuple(
            _worded(flat, claims, index, float(suspicion[index]), float(persistence[index]) if earlier else None)
            for index in order[:limit].tolist()
        ),
        counts={kind: int((claims.kind[order] == index).sum()) for index, kind in enumerate(KINDS)},
        least_score=least,
        epochs=len(earlier),
    )


def _least_score(judged: Judged, threshold: float) -> float:
    """As sure as three in four right detections: it fits detectors whose scores are low, too."""
    right = judged.flat.scores[judged.right]
    return max(threshold, float(np.quantile(right, SURE, method="lower"))) if len(right) else threshold


def _sure(judged: Judged, least: float) -> Bool:
    """Detections that may speak against an annotation, (D,)."""
    return judged.wrong & ~judged.excused & (judged.flat.scores >= least)


def _missing_labels(judged: Judged, least: float) -> _Claims:
    """Sure detections near no object; of those that overlap each other the best, whatever their class."""
    flat = judged.flat
    iou, _ = nearest(judged.pairs, len(flat.scores))  # difficult ones and crowd regions are objects too
    alone = np.flatnonzero(_sure(judged, least) & (iou < NEAR) & ~_claims_a_box(judged))
    alone = alone[np.lexsort((judged.rank[alone], flat.images[alone]))]
    alone = alone[_best_of_heaps(flat, alone, judged.iou)]
    return _claims("missing label", alone, np.full(len(alone), -1), iou[alone], flat.scores[alone] * (1 - iou[alone]))


def _claims_a_box(judged: Judged) -> Bool:
    """Detections near an object of their class that nobody found, (D,): about its box, not about a missing one."""
    return _unfound_of_own_class(judged)[0] >= TOUCHES


def _unfound_of_own_class(judged: Judged) -> tuple[Float64, Int64]:
    """The largest IoU with an object of the detection's class that nobody found, and the object, (D,) both."""
    flat, near = judged.flat, judged.pairs
    own = flat.labels[near.detection] == flat.object_labels[near.object]
    lost = judged.counted & ~judged.found
    return nearest(select(near, own & lost[near.object]), len(flat.scores))


def _wrong_boxes(judged: Judged, least: float) -> _Claims:
    """For an object that nobody found, the best sure detection of its class that touches it."""
    scores = judged.flat.scores
    iou, objects = _unfound_of_own_class(judged)
    these = np.flatnonzero(_sure(judged, least) & (iou >= TOUCHES))
    these = _best_of_each(these, objects, scores)
    return _claims("wrong box", these, objects[these], iou[these], scores[these] * (1 - iou[these]))


def _wrong_classes(judged: Judged, least: float) -> _Claims:
    """For each object, the best sure detection of another class that fits it."""
    flat, near = judged.flat, judged.pairs
    other = flat.labels[near.detection] != flat.object_labels[near.object]
    fits = other & judged.counted[near.object] & (near.iou >= judged.iou)
    iou, objects = nearest(select(near, fits), len(flat.scores))
    these = np.flatnonzero(_sure(judged, least) & (objects >= 0))
    these = _best_of_each(these, objects, flat.scores * iou)
    finder = judged.finder[objects[these]]
    contradicted = np.where(finder >= 0, flat.scores[finder], 0.0) if len(finder) else np.zeros(0)
    strength = flat.scores[these] * iou[these] * (1 - contradicted)
    return _claims("wrong class", these, objects[these], iou[these], strength)


def _nothing_there(judged: Judged, threshold: float) -> _Claims:
    """Objects that no detection but the faintest touches."""
    flat = judged.flat
    objects = np.flatnonzero(judged.counted & ~_touched(flat, judged.pairs, FAINT * threshold))
    found = np.zeros(len(judged.counted), np.bool_)
    found[judged.taken[judged.right & (flat.scores >= threshold)]] = True
    alike = 3 * flat.object_labels + coco_size(flat.object_areas)  # class and size as one number
    groups = 3 * len(flat.classes)
    number = np.bincount(alike[judged.counted], minlength=groups)
    usual = np.bincount(alike[found], minlength=groups) / np.maximum(number, 1)
    none = np.full(len(objects), -1)
    return _claims("nothing there", none, objects, np.zeros(len(objects)), usual[alike[objects]])


def _touched(flat: Flat, near: Pairs, least: float) -> Bool:
    """Objects that a detection of any class and at least that score touches, (N,)."""
    touched = np.zeros(len(flat.object_labels), np.bool_)
    touched[near.object[(near.iou >= TOUCHES) & (flat.scores[near.detection] >= least)]] = True
    return touched


def _best_of_each(these: Int64, objects: Int64, scores: Float64) -> Int64:
    """Of the detections at `these`, for each object (D,) the one with the highest score (D,)."""
    best_first = these[np.argsort(-scores[these], kind="stable")]
    _, first = np.unique(objects[best_first], return_index=True)
    return best_first[first]


def _best_of_heaps(flat: Flat, these: Int64, iou: float) -> Bool:
    """Which detections no better one that is kept itself overlaps by `iou`; (T,) `these`, best first in a picture."""
    boxes, labels, images = flat.boxes[these], flat.labels[these], flat.images[these]
    heap = replace(flat, boxes=boxes, labels=labels, images=images, scores=flat.scores[these])
    near = overlapping(with_objects(heap, boxes, labels, images), minimum=iou, same_class=False)
    better = near.object < near.detection
    keep = np.ones(len(these), np.bool_)
    for worse, than in sorted(zip(near.detection[better].tolist(), near.object[better].tolist(), strict=True)):
        keep[worse] &= not keep[than]
    return keep


def _claims(kind: Suspicion, detection: Int64, which: Int64, iou: Float64, strength: Float64) -> _Claims:
    return _Claims(np.full(len(detection), KINDS.index(kind)), detection, which, iou, strength)


def _joined(parts: Sequence[_Claims]) -> _Claims:
    return _Claims(*(np.concatenate([getattr(part, name.name) for part in parts]) for name in fields(_Claims)))


def _persistence(
    flat: Flat, claims: _Claims, records: Sequence[Record], earlier: Sequence[Sequence[Detections]], iou: float
) -> Float64:
    """The share of the earlier epochs that make the same claim, (S,); 0 without any."""
    silent = claims.detection < 0  # nothing there: it persists where again nothing touches the object
    boxes = _either(silent, flat.object_boxes, claims.object, flat.boxes, claims.detection)
    labels = _either(silent, flat.object_labels, claims.object, flat.labels, claims.detection)
    images = _either(silent, flat.object_images, claims.object, flat.images, claims.detection)
    order = np.argsort(images, kind="stable")  # flat arrays go picture by picture
    silent, boxes, labels, images = silent[order], boxes[order], labels[order], images[order]
    said = np.zeros(len(silent))
    for found in earlier:
        then = flatten(records, found, flat.classes)
        judged = judge(then, overlapping(then, minimum=iou), iou=iou)
        threshold = best_of(judged).threshold
        least = _least_score(judged, threshold)
        suspects = with_objects(then, boxes, labels, images)
        near = overlapping(suspects, minimum=TOUCHES, same_class=False)
        own = (near.iou >= iou) & (then.labels[near.detection] == labels[near.object])
        repeated = np.zeros(len(silent), np.bool_)
        repeated[near.object[own & (then.scores[near.detection] >= least)]] = True
        said[order] += np.where(silent, ~_touched(suspects, near, FAINT * threshold), repeated)
    return said / max(len(earlier), 1)


def _either(first: Bool, ours: NDArray[Any], at: Int64, theirs: NDArray[Any], there: Int64) -> NDArray[Any]:
    """ours[at] where `first`, else theirs[there]."""
    values = np.empty((len(first), *ours.shape[1:]), ours.dtype)
    values[first], values[~first] = ours[at[first]], theirs[there[~first]]
    return values


def _worded(flat: Flat, claims: _Claims, index: int, suspicion: float, persistence: float | None) -> Suspect:
    kind, detection, which = KINDS[claims.kind[index]], int(claims.detection[index]), int(claims.object[index])
    iou = float(claims.iou[index]) if detection >= 0 and which >= 0 else None
    image = int(flat.images[detection] if detection >= 0 else flat.object_images[which])
    annotated = flat.classes[flat.object_labels[which]] if which >= 0 else None
    found = flat.classes[flat.labels[detection]] if detection >= 0 else None
    score = float(flat.scores[detection]) if detection >= 0 else None
    reason = {
        "missing label": f"{found} found with a score of {_two(score)} where nothing is annotated",
        "wrong class": f"annotated as {annotated}, found as {found} with a score of {_two(score)}",
        "wrong box": f"{found} found with a score of {_two(score)}, but the boxes agree by an IoU of {_two(iou)} only",
        "nothing there": f"annotated as {annotated}, but nothing is found there, though "
        f"{claims.strength[index]:.0%} of such objects are",
    }[kind]
    return Suspect(
        kind=kind,
        image=flat.ids[image],
        object=int(flat.object_places[which]) if which >= 0 else None,
        annotated_box=_box(flat.object_boxes[which]) if which >= 0 else None,
        annotated_label=annotated,
        found_box=_box(flat.boxes[detection]) if detection >= 0 else None,
        found_label=found,
        score=score,
        iou=iou,
        persistence=persistence,
        suspicion=suspicion,
        reason=reason,
    )


def _box(corners: Float64) -> Box:
    x1, y1, x2, y2 = corners.tolist()
    return x1, y1, x2, y2


def _two(value: float | None) -> str:
    return f"{value or 0:.2f}"
