"""Captions: both forms of their files, every refusal, and which of them a step reads."""

import json
from pathlib import Path

import pytest
from constants import CAPTIONS

from theworld.data.captions import captions_note, load_captions, pick_captions
from theworld.data.vsr import Statement

OWN = {"a.jpg": ("A dog on a bed.", "A bed."), "b.jpg": ("A cat.",)}
COCO = {
    "info": {"year": 2017},
    "images": [
        {"id": 7, "file_name": "a.jpg", "height": 4},
        {"id": 3, "file_name": "b.jpg"},
        {"id": 4, "file_name": "c.jpg"},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "caption": "A dog on a bed."},
        {"id": 2, "image_id": 3, "caption": "A cat."},
        {"id": 5, "image_id": 4, "caption": "Nobody asks for this."},
        {"id": 9, "image_id": 7, "caption": "A bed."},
    ],
}


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def coco(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps(COCO | changes))
    return path


def test_both_forms_give_the_captions_of_the_photographs_that_are_asked_for(tmp_path: Path) -> None:
    rows = [{"image": image, "caption": text} for image, own in OWN.items() for text in own]
    written = lines(tmp_path / "own.jsonl", *rows, {"image": "other.jpg", "caption": "Nobody asks for this."})
    assert load_captions(written, ["b.jpg", "a.jpg", "none.jpg"]) == OWN
    assert load_captions(coco(tmp_path / "coco.json"), ["a.jpg", "b.jpg"]) == OWN
    assert captions_note(OWN, ["a.jpg", "b.jpg", "none.jpg"]) == "captions: 3 for 2 of 3 training photographs"


def test_blank_lines_and_marks_are_read_over(tmp_path: Path) -> None:
    rows = "\r\n\r\n".join(json.dumps({"image": i, "caption": c}) for i, own in OWN.items() for c in own)
    (tmp_path / "own.jsonl").write_bytes(f"\ufeff{rows}\r\n".encode())
    assert load_captions(tmp_path / "own.jsonl", list(OWN)) == OWN
    (tmp_path / "coco.json").write_text(json.dumps(COCO), encoding="utf-8-sig")
    assert load_captions(tmp_path / "coco.json", ["a.jpg", "b.jpg"]) == OWN


@pytest.mark.parametrize("name", ["own.jsonl", "coco.json"])
def test_another_encoding_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(COCO), encoding="utf-16")
    with pytest.raises(ValueError, match=rf"{name}: is UTF-16, .*iconv"):
        load_captions(tmp_path / name, ["a.jpg"])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"image": "a.jpg"}, r"own\.jsonl:1: is {.*}; wanted an object with image and caption"),
        (["a.jpg"], r"own\.jsonl:1: is \[\"a\.jpg\"\]; wanted an object"),
        ({"image": "a.jpg", "caption": " "}, r"own\.jsonl:1: caption is \" \"; give text that is not empty"),
        ({"image": [3], "caption": "A."}, r"own\.jsonl:1: the image is \[3\]; give its path"),
        ({"image": "a.jpg", "caption": 3}, r"own\.jsonl:1: caption is 3; give text"),
        (
            {"image": "x.jpg", "caption": "A."},
            r"has none of the 1 training photographs \(such as a\.jpg\) \(such as x\.jpg\)",
        ),
    ],
)
def test_a_line_that_is_wrong_is_refused(row: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        load_captions(lines(tmp_path / "own.jsonl", row), ["a.jpg"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"images": {}}, r"images is {}; wanted a list"),
        ({"images": [{"id": 7}]}, r"images\[0\]: is .*; wanted an object with id and file_name"),
        ({"images": [{"id": [7], "file_name": "a.jpg"}]}, r"images\[0\]: id is \[7\]; wanted an integer"),
        ({"annotations": 3}, r"annotations is 3; wanted a list"),
        (
            {"annotations": [{"image_id": 8, "caption": "A."}]},
            r"annotations\[0\]: image_id 8 is not the id of an image",
        ),
        (
            {"annotations": [{"image_id": 7, "caption": None}]},
            r"annotations\[0\]: caption is null; give text",
        ),
        (
            {"annotations": [{"image_id": 7}]},
            r"annotations\[0\]: is .*; wanted an object with image_id and caption",
        ),
        ({"annotations": []}, r"has none of the 1 training photographs \(such as a\.jpg\); give a file"),
    ],
)
def test_a_coco_file_that_is_wrong_is_refused(changes: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        load_captions(coco(tmp_path / "coco.json", **changes), ["a.jpg"])


def test_another_file_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"captions: no file .*; wanted COCO's captions_\*\.json, or a \.jsonl"
    ):
        load_captions(tmp_path / "none.json", ["a.jpg"])
    for name, content in (
        ("torn.json", '{"images": ['),
        ("twice.json", '{"images": [], "images": []}'),
        ("a.csv", ""),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name}.*; wanted COCO's captions"):
            load_captions(tmp_path / name, ["a.jpg"])
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(
        ValueError, match=r"list\.json: is \[\]; wanted an object with images and annotations"
    ):
        load_captions(tmp_path / "list.json", ["a.jpg"])
    (tmp_path / "torn.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"torn\.jsonl:1:2"):
        load_captions(tmp_path / "torn.jsonl", ["a.jpg"])


def test_a_step_reads_one_caption_of_each_photograph_and_always_the_same() -> None:
    statements = [Statement(*row, index=0) for row in CAPTIONS]
    captions = {"a.png": ["1", "2", "3", "4"], "c.png": ["5"]}
    found = [pick_captions(captions, statements, 0, step) for step in range(200)]
    assert found == [pick_captions(captions, statements[::-1], 0, step) for step in range(200)]
    assert all(list(one) == ["a.png", "c.png"] and one["c.png"] == "5" for one in found)
    assert {one["a.png"] for one in found} == {"1", "2", "3", "4"}
    assert min(sum(one["a.png"] == text for one in found) for text in "1234") > 30  # about 50 each
    assert found != [pick_captions(captions, statements, 1, step) for step in range(200)]
