"""Benchmarks from data sets of the hub's schemas: counts as published, resumed after any end, and refused otherwise."""

import json
import logging
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark_data as data
import pyarrow as pa
import pytest
from fake_hub import COMMIT, serve

from theworld.data.benchmarks import BENCHMARKS, finished, get_benchmark, plan_benchmark
from theworld.data.images import ImageError, read_image, sha256
from theworld.data.vsr import load_statements
from theworld.utils.hub import Fault

WHATSUP, BLINK, CV_BENCH = (BENCHMARKS[name] for name in ("whatsup_a", "blink_spatial", "cvbench_relation"))
SMALL = replace(WHATSUP, rows=24)


@pytest.fixture(scope="module")
def whatsup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for the data set of What'sUp with 24 items, in two files, with a split beside it."""
    folder = tmp_path_factory.mktemp("whatsup")
    data.write_files(folder, "data/Controlled_Images_B-*.parquet", [], data.WHATSUP)
    return data.write_files(folder, WHATSUP.files, data.whatsup_a(24), data.WHATSUP, parts=2)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name[0] != "."
    }


def test_the_published_counts() -> None:
    assert {name: (one.rows, one.options) for name, one in BENCHMARKS.items()} == {
        "whatsup_a": (412, 4),
        "whatsup_b": (408, 4),
        "coco_spatial_one": (2247, 2),
        "coco_spatial_two": (440, 2),
        "gqa_spatial_one": (1160, 2),
        "gqa_spatial_two": (291, 2),
        "blink_spatial": (143, 1),
        "cvbench_relation": (650, None),
    }
    assert len({(one.repository, one.files) for one in BENCHMARKS.values()}) == 8
    assert all(one.licence and "@inproceedings" in one.citation for one in BENCHMARKS.values())


def test_whatsup_becomes_choices_with_pairs_and_sets(tmp_path: Path) -> None:
    output = tmp_path / "whatsup_a"
    source = data.write_files(tmp_path / "hub", WHATSUP.files, data.whatsup_a(), data.WHATSUP, parts=3)
    record = get_benchmark(WHATSUP, output, source)
    found = load_statements(output, "test")
    assert (record["items"], record["statements"], len(record["photographs"])) == (412, 1648, 412)
    first = json.loads((output / "test.jsonl").read_text().splitlines()[0])
    assert first == {
        "image": "whatsup_a-0001.png",
        "group": "1",
        "sets": {"pair": "1 on/under", "set": "1"},
        "statement": "A mug 0 on a table",
        "label": 1,
        "relation": "on",
    }
    assert [s.relation for s in found[8:12]] == ["left of", "on", "under", "right of"]
    assert [s.label for s in found[8:12]] == [1, 0, 0, 0]
    assert dict(found[8].sets) == {"pair": "1 left of/right of", "set": "1"}
    assert dict(found[16].sets)["set"] == "2"
    photographs = {s.image for s in found}
    assert all(read_image(output / "images", name).shape == (8, 12, 3) for name in photographs)
    assert {name: sha256((output / "images" / name).read_bytes()) for name in photographs} == record[
        "photographs"
    ]
    readme = (output / "README.md").read_text()
    assert "1,648 lines of test.jsonl about 412 photographs" in readme
    assert "kamath2023whatsup" in readme
    assert "MIT" in readme


def test_relations_are_the_words_that_differ() -> None:
    rows = [
        ["A photo of a bench on the left", "A photo of a bench on the right"],
        ["A photo of a dog to the left of a bench", "A photo of a dog to the right of a bench"],
        ["A photo of a dog above a bench", "A photo of a dog below a bench"],
        ["A cup in front of a plate", "A cup behind a plate", "A cup to the right of a plate"],
    ]
    found = [
        BENCHMARKS["gqa_spatial_two"].read({"image_options": {}, "caption_options": row}) for row in rows
    ]
    assert [item and item.relations for item in found] == [
        ("left", "right"),
        ("left of", "right of"),
        ("above", "below"),
        ("in front of", "behind", "right of"),
    ]


def test_blink_becomes_questions(tmp_path: Path) -> None:
    source = data.write_files(tmp_path / "hub", BLINK.files, data.blink(), data.BLINK)
    get_benchmark(BLINK, tmp_path / "out", source)
    found = load_statements(tmp_path / "out", "test")
    assert len(found) == 143
    assert all(s.is_question and not s.group for s in found)
    assert [s.label for s in found[:4]] == [1, 0, 0, 1]
    assert (found[0].image, found[0].caption) == ("blink_spatial-0001.jpg", "Is the car beneath the cat 0?")


def test_cv_bench_becomes_statements_and_keeps_the_name_of_the_photograph(tmp_path: Path) -> None:
    rows = data.cv_bench()
    rows[4]["question"] = "Is the rug on the pillow or below it?"
    source = data.write_files(tmp_path / "hub", CV_BENCH.files, rows, data.CV_BENCH)
    record = get_benchmark(CV_BENCH, tmp_path / "out", source)
    found = load_statements(tmp_path / "out", "test")
    assert (record["statements"], len(record["photographs"])) == (1300, 325)  # two items a photograph
    assert [(s.caption, s.label, s.relation, s.image) for s in found[:3]] == [
        (
            "The rug (annotated by the red box) is above the pillow 0.",
            0,
            "above",
            "cvbench_relation-0001.png",
        ),
        (
            "The rug (annotated by the red box) is below the pillow 0.",
            1,
            "below",
            "cvbench_relation-0001.png",
        ),
        (
            "The rug (annotated by the red box) is left of the pillow 1.",
            0,
            "left of",
            "cvbench_relation-0001.png",
        ),
    ]
    assert [s.caption for s in found[4:6]] == [
        "Is the rug on the pillow or below it? Above.",
        "Is the rug on the pillow or below it? Below.",
    ]
    assert found[4].source_image == "000000000001.jpg"


def test_a_finished_folder_is_checked_and_a_damaged_one_mended(whatsup: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    record = get_benchmark(SMALL, output, whatsup)
    whole = files_of(output)
    assert get_benchmark(SMALL, output, tmp_path / "nowhere") == record  # nothing is read
    (output / "images" / "whatsup_a-0007.png").write_bytes(b"damaged")
    (output / "test.jsonl").unlink()
    assert finished(SMALL, output) is None
    assert get_benchmark(SMALL, output, whatsup) == record
    assert files_of(output) == whole
    with pytest.raises(
        ValueError, match=r"benchmark\.json: name is 'whatsup_a', and blink_spatial is wanted; give an"
    ):
        get_benchmark(BLINK, output, whatsup)


@pytest.mark.parametrize("end", [1, 13, 24, "test.jsonl", "README.md", "benchmark.json"])
def test_a_run_that_is_killed_goes_on_and_ends_in_the_same_bytes(
    whatsup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: int | str
) -> None:
    whole = files_of_whole(whatsup, tmp_path)
    published = 0

    def publish(path: Path, *arguments: Any, **options: Any) -> None:
        nonlocal published
        published += 1
        if end in (published, path.name):
            raise KeyboardInterrupt
        real(path, *arguments, **options)

    from theworld.data import benchmarks

    real = benchmarks.publish_bytes
    monkeypatch.setattr(benchmarks, "publish_bytes", publish)
    with pytest.raises(KeyboardInterrupt):
        get_benchmark(SMALL, tmp_path / "out", whatsup)
    left = files_of(tmp_path / "out")
    assert "benchmark.json" not in left
    assert isinstance(end, str) or "test.jsonl" not in left
    before = published
    end = 0
    get_benchmark(SMALL, tmp_path / "out", whatsup)
    assert files_of(tmp_path / "out") == whole
    kept = sum(name.startswith("images/") for name in left)
    assert published - before == 24 - kept + 3  # no photograph is written again


def files_of_whole(whatsup: Path, tmp_path: Path) -> dict[str, bytes]:
    get_benchmark(SMALL, tmp_path / "whole", whatsup)
    return files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows.pop(),
            "has 23 items, 92 statements, 11 pairs of 2, 5 sets of 4 of whatsup_a, and 24 items, 96",
        ),
        (
            lambda rows: rows[3].update(caption_options=rows[4]["caption_options"]),
            "10 pairs of 2, 4 sets of 4",
        ),
        (
            lambda rows: rows[0].update(caption_options=["a", "a"]),
            r"parquet row 1: caption_options are \['a', 'a'\]",
        ),
        (lambda rows: rows[5].update(image_options=None), "parquet row 6: has no bytes of a photograph"),
        (lambda rows: rows[5]["image_options"].update(bytes=b"GIF8"), "parquet row 6: "),
    ],
)
def test_rows_that_are_not_as_published_are_refused_and_leave_no_statements(
    tmp_path: Path, change: Any, message: str
) -> None:
    rows = data.whatsup_a(24)
    change(rows)
    source = data.write_files(tmp_path / "hub", WHATSUP.files, rows, data.WHATSUP)
    with pytest.raises((ValueError, ImageError), match=message):
        get_benchmark(SMALL, tmp_path / "out", source)
    assert not (tmp_path / "out" / "test.jsonl").exists()


def test_other_columns_choices_and_files_are_named(tmp_path: Path) -> None:
    source = tmp_path / "hub"
    other = pa.schema([("image", data.IMAGE), ("caption_options", pa.list_(pa.string()))])
    data.write_files(source, WHATSUP.files, [{"caption_options": ["a", "b"]}], other)
    with pytest.raises(
        ValueError, match=r"row 1: has no field 'image_options'; ServiceNow/whatsup_all is not as it"
    ):
        get_benchmark(SMALL, tmp_path / "out", source)
    rows = data.blink()
    for change, message in (
        ({"answer": "(C)"}, "answer is '(C)' and choices are"),
        ({"choices": ["a", "b"]}, "wanted yes"),
    ):
        data.write_files(source, BLINK.files, [rows[0] | change], data.BLINK)
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            get_benchmark(BLINK, tmp_path / "blink", source)
    (path,) = source.glob(WHATSUP.files)
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"is no whole parquet file .*; remove it and run again"):
        get_benchmark(SMALL, tmp_path / "out", source)
    path.rename(path.with_name(path.name.replace("of-00001", "of-00002")))
    with pytest.raises(FileNotFoundError, match="has 1 of 2 files data/Controlled_Images_A-"):
        get_benchmark(SMALL, tmp_path / "out", source)
    with pytest.raises(
        FileNotFoundError, match=r"has no file test_2d\*\.parquet; wanted those of nyu-visionx/CV-Bench"
    ):
        get_benchmark(CV_BENCH, tmp_path / "cv", source)
    assert not (tmp_path / "cv").exists()


def test_a_plan_writes_nothing(whatsup: Path, tmp_path: Path) -> None:
    lines = list(plan_benchmark(SMALL, tmp_path / "out", whatsup))
    assert lines[0].startswith("benchmark    What'sUp, controlled images A: ")
    assert (
        "Controlled_Images_A-00000-of-00002.parquet, Controlled_Images_A-00001-of-00002.parquet" in lines[1]
    )
    assert not (tmp_path / "out").exists()
    get_benchmark(SMALL, tmp_path / "out", whatsup)
    assert (
        "is complete, so nothing would be done" in list(plan_benchmark(SMALL, tmp_path / "out", whatsup))[1]
    )


def test_a_benchmark_comes_by_hub_name_and_from_the_download_where_the_hub_is_gone(
    whatsup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "theworld")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in [n for n in os.environ if "proxy" in n.lower()]:
        monkeypatch.delenv(name)
    with serve({"datasets/ServiceNow/whatsup_all": whatsup}) as (address, requests):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        url = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url)
        record = get_benchmark(SMALL, tmp_path / "out")
        assert record["revision"] == COMMIT
        fetched = Counter(
            line.rpartition("/")[2] for line in requests if line.startswith("GET") and "resolve" in line
        )
        assert fetched == {f"Controlled_Images_A-0000{part}-of-00002.parquet": 1 for part in (0, 1)}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert get_benchmark(SMALL, tmp_path / "again") == record
    gone = "the hub is not asked, as HF_HUB_OFFLINE is set"
    assert caplog.messages[-1] == f"ServiceNow/whatsup_all: {gone}; what was downloaded before is taken"
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")
    with pytest.raises(Fault, match=rf"BLINK: {gone}; check the network and HF_TOKEN; or give --source"):
        get_benchmark(BLINK, tmp_path / "blink")
    with pytest.raises(Fault, match="or give --source"):  # other files of the same data set
        get_benchmark(BENCHMARKS["whatsup_b"], tmp_path / "b")
