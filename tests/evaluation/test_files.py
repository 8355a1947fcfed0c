from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boxwright.__main__ import main
from boxwright.errors import UserError
from boxwright.evaluation.conventions import judge_all
from boxwright.evaluation.files import read_detections, read_truth

COCO: dict[str, Any] = {
    "images": [{"id": 9, "file_name": "a.jpg", "height": 50, "width": 80}, {"id": 10, "height": 50, "width": 80}],
    "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 5, "bbox": [1, 2, 10, 20], "area": 50, "iscrowd": 0},
        {"id": 2, "image_id": 10, "category_id": 3, "bbox": [5, 5, 10, 10], "iscrowd": 1},
    ],
}
RESULT = {"image_id": 9, "category_id": 5, "bbox": [1, 2, 10, 20], "score": 0.9}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "truth.json").write_text(json.dumps(COCO))
    (tmp_path / "found.json").write_text(json.dumps([RESULT]))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("cat 1 2 11 22\ncat 0 0 5 5 difficult\n\n")
    (tmp_path / "texts/b.txt").write_text("")
    (tmp_path / "guesses").mkdir()
    (tmp_path / "guesses/a.txt").write_text("cat 0.9 1 2 11 22\ndog .2 0 0 5 5\n")
    return tmp_path


def test_a_coco_json_needs_no_pictures(place: Path) -> None:
    truth = read_truth(Path("truth.json"))
    assert truth.classes == ("cat", "dog")
    assert [record.id for record in truth.records] == ["09", "10"]  # sorted as numbers
    assert truth.records[0].size == (50, 80)
    assert truth.records[0].boxes.tolist() == [[1, 2, 11, 22]]
    assert truth.records[1].crowd.tolist() == [True]
    assert truth.areas is not None
    assert [areas.tolist() for areas in truth.areas] == [[50], [100]]  # as stated, else the box's
    found = read_detections(Path("found.json"), truth)
    assert found.detections[0].labels.tolist() == [1]
    assert len(found.detections[1]) == 0


@pytest.mark.parametrize(
    ("boxes", "corners"),
    [("edges", [1, 2, 11, 22]), ("pixels", [0, 1, 11, 22]), ("sizes", [1, 2, 12, 24])],
)
def test_text_files(place: Path, boxes: Any, corners: list[float]) -> None:
    truth = read_truth(Path("texts"), boxes=boxes)
    assert [record.id for record in truth.records] == ["a", "b"]
    assert truth.records[0].boxes[0].tolist() == corners
    assert truth.records[0].difficult.tolist() == [False, True]
    found = read_detections(Path("guesses"), truth, boxes=boxes)
    assert found.detections[0].boxes[0].tolist() == corners
    assert found.classes == ("cat", "dog")
    assert found.notes == ("no object has the class dog: their 1 detections change no mean",)


BAD_DETECTIONS: dict[str, tuple[Any, str]] = {
    "no json": ("[1, 2", "is no JSON"),
    "empty": ("", "is empty"),
    "a number": ("7", "holds no detections"),
    "a list of numbers": ([1], "entry 1 is 1, not an object"),
    "no score": ([{k: v for k, v in RESULT.items() if k != "score"}], "entry 1 has no score"),
    "score nan": ("[" + json.dumps(RESULT | {"score": float("nan")}) + "]", "score is nan"),
    "score 7": ([RESULT | {"score": 7}], "score is 7, not a number from 0 to 1"),
    "score true": ([RESULT | {"score": True}], "score is True"),
    "score text": ([RESULT | {"score": "high"}], "score is 'high'"),
    "box of three": ([RESULT, RESULT | {"bbox": [1, 2, 3]}], "result 2: the box is [1, 2, 3], not four numbers"),
    "box of text": ([RESULT | {"bbox": [1, 2, 3, "x"]}], "not four numbers"),
    "box infinite": ("[" + json.dumps(RESULT | {"bbox": [1, 2, 3, float("inf")]}) + "]", "not four numbers"),
    "box huge": ([RESULT | {"bbox": [1, 2, 1e300, 5]}], "beyond 10,000,000 pixels"),
    "an integer of 400 digits": ([RESULT | {"bbox": [1, 2, 10**400, 5]}], "not four numbers"),
    "negative side": ([RESULT | {"bbox": [9, 9, -3, 5]}], "wrong way round, or a negative side"),
    "unknown image": ([RESULT | {"image_id": 77}], "1 pictures that truth.json does not have; the first is 77"),
    "unknown category": ([RESULT | {"category_id": 4}], "no category 4"),
    "image is a list": ([RESULT | {"image_id": [9]}], "does not have"),
    "own, index": (
        {"classes": ["cat"], "images": [{"id": "09"}],
         "detections": [{"image": 1, "class": 0, "score": 1, "box": [0, 0, 1, 1]}]},
        "image is 1, not an index below 1",
    ),
    "own, class": (
        {"classes": ["cow"], "images": [{"id": "09"}],
         "detections": [{"image": 0, "class": 0, "score": 1, "box": [0, 0, 1, 1]}]},
        "unknown class 'cow'",
    ),
    "own, corners": (
        {"classes": ["cat"], "images": [{"id": "09"}],
         "detections": [{"image": 0, "class": 0, "score": 1, "box": [5, 0, 1, 1]}]},
        "wrong way round",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_DETECTIONS)
def test_bad_detections_are_one_line(place: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    content, message = BAD_DETECTIONS[name]
    (place / "bad.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert main(["evaluate", "--truth", "truth.json", "--detections", "bad.json"]) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert message in error
    assert "bad.json" in error
    assert error.count("\n") == 1
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "has no images"),
        ({"categories": []}, "has no categories"),
        ({"annotations": 3}, "annotations is 3, not a list"),
        ({"images": [{"id": 9}, {"id": 9}]}, "two of images have the id 9"),
        ({"images": [{"id": 9}, {"id": 10}, {"id": "9"}]}, "two of images have the id 9$"),
        ({"images": [{"id": 9}]}, "is of the image 10, not listed"),
        ({"categories": [{"id": 5, "name": "x"}]}, "is of the category 3, not listed"),
        ({"annotations": [{"image_id": 9, "category_id": 5, "bbox": [1, 2, -3, 4]}]}, "negative side"),
        *(
            ({"annotations": [{"image_id": 9, "category_id": 5, "bbox": [1, 2, 3, 4], **wrong}]}, message)
            for wrong, message in [
                ({"area": -1}, "annotation 1: area is -1, not a number from 0 on"),
                ({"area": "much"}, "annotation 1: area is 'much', not a number"),
                ({"area": 10**400}, "area is 1000.*, not a number"),
                ({"area": 1e300}, r"area is 1e\+300, larger than the picture"),
                ({"area": 5000}, "area is 5000, larger than the picture"),
                ({"iscrowd": "0"}, "annotation 1: iscrowd is '0', not 0, 1, true or false"),
                ({"iscrowd": 2}, "iscrowd is 2"),
                ({"difficult": "no"}, "difficult is 'no'"),
            ]
        ),
    ],
)
def test_bad_truth_is_refused(place: Path, change: dict[str, Any], message: str) -> None:
    (place / "truth.json").write_text(json.dumps(COCO | change))
    with pytest.raises(UserError, match=message):
        read_truth(Path("truth.json"))


def test_a_class_that_the_truths_text_files_do_not_have_is_never_an_index(place: Path) -> None:
    (place / "texts/a.txt").write_text("1 1 2 11 22\n3 0 0 5 5\n")
    (place / "guesses/a.txt").write_text("0 0.9 1 2 11 22\n3 0.8 0 0 5 5\n")
    truth = read_truth(Path("texts"))
    (place / "p.json").write_text(
        json.dumps(
            {"classes": ["0"], "threshold": 0,
             "results": [{"image": "a", "detections": [{"class": "0", "score": 0.9, "box": [1, 2, 11, 22]}]}]}
        )
    )  # fmt: skip
    (place / "d.json").write_text(
        json.dumps(
            {"classes": ["0"], "images": [{"id": "a"}],
             "detections": [{"image": 0, "class": 0, "score": 0.9, "box": [1, 2, 11, 22]}]}
        )
    )  # fmt: skip
    for given in ("guesses", "p.json", "d.json"):
        found = read_detections(Path(given), truth)
        assert found.classes == ("1", "3", "0")
        assert found.detections[0].labels.tolist() == ([2, 1] if given == "guesses" else [2])
        assert found.notes == ("no object has the class 0: their 1 detections change no mean",)
        figures = judge_all(truth.records, found.detections, found.classes)
        assert figures.per_class["1"]["AP"] == 0


def test_a_name_in_a_note_is_printable(place: Path) -> None:
    (place / "guesses/a.txt").write_text("\x1b[31mred 0.9 1 2 11 22\n")
    assert read_detections(Path("guesses"), read_truth(Path("texts"))).notes[0].isprintable()


@pytest.mark.parametrize("name", ["9", "09", 9])
def test_pictures_go_by_their_own_ids_though_others_are_longer(place: Path, name: Any) -> None:
    truth = read_truth(Path("truth.json"))
    own = {"image": 0, "class": 0, "score": 0.9, "box": [1, 2, 11, 22]}
    (place / "own.json").write_text(json.dumps({"classes": ["dog"], "images": [{"id": name}], "detections": [own]}))
    (place / "results.json").write_text(json.dumps([RESULT | {"image_id": name}]))
    (place / f"guesses/{name}.txt").write_text("dog 0.9 1 2 11 22")
    (place / "guesses/a.txt").unlink()
    for given in ("own.json", "results.json", "guesses"):
        assert [len(one) for one in read_detections(Path(given), truth).detections] == [1, 0]


def test_two_text_files_of_one_picture_are_refused(place: Path) -> None:
    (place / "guesses/a.txt").rename(place / "guesses/9.txt")
    (place / "guesses/09.txt").write_text("")
    with pytest.raises(UserError, match=r"09\.txt and 9\.txt are of the same picture"):
        read_detections(Path("guesses"), read_truth(Path("truth.json")))


def test_a_hint_is_never_the_name_itself(place: Path) -> None:
    (place / "truth.json").write_text(json.dumps(COCO | {"images": [{"id": 9.5}, {"id": 10}], "annotations": []}))
    (place / "guesses/a.txt").rename(place / "guesses/9.6.txt")
    with pytest.raises(UserError, match=r"the first is '9.6'\. Did you mean '9.5'\?"):
        read_detections(Path("guesses"), read_truth(Path("truth.json")))
    (place / "results.json").write_text(json.dumps([RESULT | {"image_id": "10 "}]))
    with pytest.raises(UserError, match="the first is '10'") as error:
        read_detections(Path("results.json"), read_truth(Path("truth.json")))
    assert "mean '10 '" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cat 0.9 1 2 3", r"a.txt:1: has 5 words"),
        ("cat 0.9 1 2 3 4 5", "has 7 words"),
        ("cat nan 1 2 3 4", "the score is 'nan'"),
        ("cat 0.9 1 2 inf 4", "not four numbers"),
        ("cat 0.9 5 2 3 4", r"wrong way round.* \(--boxes sizes if these are left top width height\)$"),
    ],
)
def test_bad_lines_are_refused(place: Path, line: str, message: str) -> None:
    (place / "guesses/a.txt").write_text(line)
    with pytest.raises(UserError, match=message):
        read_detections(Path("guesses"), read_truth(Path("texts")))


def test_a_folder_around_a_json_is_told_to_name_the_json(place: Path) -> None:
    for name in ("truth", "found"):
        (place / name).mkdir()
        (place / f"{name}.json").rename(place / name / f"{name}.json")
    with pytest.raises(UserError, match=r"name the json itself, --truth truth/truth\.json$"):
        read_truth(Path("truth"))
    with pytest.raises(UserError, match=r"name the json itself, --detections found/found\.json$"):
        read_detections(Path("found"), read_truth(Path("truth/truth.json")))


def test_a_text_file_of_no_picture_is_refused(place: Path) -> None:
    (place / "guesses/zebra.txt").write_text("")
    with pytest.raises(UserError, match="the first is 'zebra'"):
        read_detections(Path("guesses"), read_truth(Path("texts")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--truth truth.json", "wants --weights of a detector, or --detections"),
        ("--truth truth.json --detections found.json --weights x", "one of them"),
        ("--detections found.json", "--data, or --truth"),
        ("--weights x --truth truth.json", "say --data beside --weights"),
        ("--weights model.onnx --data truth.json", "exported models (.onnx) cannot be judged yet"),
        ("--truth truth.json --detections found.json --iou 50", "Did you mean 0.5?"),
        ("--truth truth.json --detections found.json --iou 0", "--iou 0 is not above 0"),
        ("--truth truth.json --detections found.json --intervals -1", "--intervals"),
        ("--truth truth.json --detections fuond.json", "found.json"),
        ("--truth truth.json --detections fuond.json --name a/b", "--name 'a/b' is not a folder name"),
        ("--truth nothing --detections found.json", "nothing"),
    ],
)
def test_wrong_options_are_one_line(place: Path, line: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *line.split()]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_figures_can_be_made_again_from_what_was_written(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["evaluate", "--truth", "truth.json", "--json", "--intervals", "3"]
    assert main([*given, "--detections", "found.json"]) == 0
    first = json.loads(capfd.readouterr().out)
    assert main([*given, "--detections", f"{first['folder']}/detections.json"]) == 0
    second = json.loads(capfd.readouterr().out)
    assert first["scores"] == second["scores"]
    assert first["judgement"] == second["judgement"]
    assert first["scores"]["coco"]["AP"] == pytest.approx(1)
    written = json.loads(Path(first["folder"], "scores.json").read_text("utf-8"))
    assert written["conventions"][0]["figures"]["AP"] == first["scores"]["coco"]["AP"]
    assert written["classes"] == ["cat", "dog"]
    assert written["per_class"]["cat"]["AP"] is None  # it has a crowd region alone
    assert {path.name for path in Path(first["folder"]).iterdir()} >= {"scores.json", "analysis.json", "report.html"}


def test_predictions_of_predict(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = {"class": "cat", "score": 0.9, "box": [1, 2, 11, 22]}
    results = [{"image": "somewhere/a.png", "size": [50, 80], "detections": [found]}]
    (place / "predictions.json").write_text(json.dumps({"classes": ["cat"], "threshold": 0.5, "results": results}))
    assert main(["evaluate", "--truth", "texts", "--detections", "predictions.json", "--json", "--intervals", "0"]) == 0
    out, error = capfd.readouterr()
    assert json.loads(out)["scores"]["voc"]["area@50"] == 1
    assert "no boxes below a score of 0.5" in error


def test_boxes_of_next_to_no_area_overlap_nothing(place: Path) -> None:
    """Their areas are 0 as numbers; warnings are errors here."""
    (place / "texts/a.txt").write_text("cat 0 0 1e-300 1e-300\n")
    (place / "guesses/a.txt").write_text("cat 0.9 0 0 1e-300 1e-300\n")
    assert main(["evaluate", "--truth", "texts", "--detections", "guesses", "--json", "--intervals", "2"]) == 0


def test_files_need_no_torch(place: Path) -> None:
    code = (
        "import sys; from boxwright.__main__ import main; "
        "main(['evaluate', '--truth', 'truth.json', '--detections', 'found.json']); "
        "print({'torch', 'faster_coco_eval', 'pycocotools'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


@pytest.mark.real_data
def test_published_figures_from_the_files(fixtures: Path, real_data: Path, expected: Any) -> None:
    def judged(truth: Path, found: Path, boxes: Any) -> Any:
        known = read_truth(truth, boxes=boxes, split="all")
        its = read_detections(found, known, boxes=boxes)
        return judge_all(known.records, its.detections, its.classes, ious=[0.1, 0.3], areas=known.areas)

    coco = fixtures / "coco_sample100"
    figures = judged(coco / "gts/sampled_gts_bbox_area.json", coco / "dets/sampled_bbox_results.json", "edges")
    for name, value in figures.scores.coco.items():
        assert value == pytest.approx(expected["coco_sample100"][name], abs=1e-6)
    voc = real_data / "voc_mini/VOCdevkit/VOC2012"
    official = judged(voc, fixtures / "voc12_100/dets_abs_xyx2y2", "pixels").scores.voc
    published = expected["voc12_100"]["official_protocol_difficult_ignored"]
    assert official["area@50"] == pytest.approx(published["area@0.5"]["mAP"], abs=1e-9)
    assert official["area@75"] == pytest.approx(published["area@0.75"]["mAP"], abs=1e-9)
    padilla = judged(fixtures / "padilla_case1/gts", fixtures / "padilla_case1/dets", "sizes")
    with_pixel = next(v for v in padilla.voc if v.plus_one and v.difficult == "ignore").figures
    for iou, value in expected["padilla_case1"]["every_point"].items():
        assert with_pixel[f"area@{round(float(iou) * 100)}"] == pytest.approx(value, abs=1e-9)
    cartucho = judged(fixtures / "cartucho/ground-truth", fixtures / "cartucho/detection-results", "pixels")
    assert round(100 * cartucho.scores.voc["area@50"], 2) == expected["cartucho"]["mAP_percent"]
    assert np.isnan(cartucho.per_class["oven"]["area@50"])
