"""What is scored, and what training had of it: nothing counts as held out that was trained on, without a word.

Checkpoints scored together answer as each by itself, and say where their answers come from.
"""

import json
import logging
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import benchmark_data
import pytest
from constants import ROOT
from jobs import held
from PIL import Image
from serving_models import save_model

from theworld.cli.doctor import look_over
from theworld.config.config import Config, save_config
from theworld.data.benchmarks import BENCHMARKS, get_benchmark
from theworld.data.images import ImageError, sha256
from theworld.data.vsr import (
    OWN,
    PUBLISHED_SHA256,
    load_statements,
    release_of,
    statements_sha256,
    training_statements,
)
from theworld.evaluation.conditions import CONDITIONS
from theworld.evaluation.metrics import summarise
from theworld.evaluation.records import read_jsonl, read_results, read_source, write_jsonl
from theworld.evaluation.score import (
    HeldOut,
    default_output,
    held_out,
    score,
    score_to_file,
    short_names,
)
from theworld.evaluation.verdict import verdict
from theworld.extraction.extract import extract
from theworld.models import theworld
from theworld.models.gemma import Gemma
from theworld.models.serialization import SavedModel, fingerprint_of, write_world
from theworld.report.examples import _photograph
from theworld.store.shard import ArraySpec, ImageEntry
from theworld.store.writer import Store
from theworld.training.trainer import Trainer
from theworld.utils.files import hash_file
from theworld.utils.locks import InUse


@pytest.fixture
def seeds(config: Config, cache: Path, tmp_path: Path) -> list[Path]:
    """Two runs of one step, of different seeds."""
    config = replace(config, max_steps=1, do_eval=False)
    return [
        Trainer(replace(config, seed=s, output_dir=str(tmp_path / f"s{s}")), cache).run().parent
        for s in (0, 1)
    ]


def test_checkpoints_together_answer_as_each_by_itself_with_one_gemma(
    seeds: list[Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    real = theworld.TheWorld.from_pretrained

    def watched(saved: SavedModel, gemma: Gemma | None, **overrides: object) -> object:
        model = real(saved, gemma, **overrides)
        loaded.append(model.gemma)
        return model

    alone = [score(path / "checkpoint-1", cache, None, "test", CONDITIONS, {}) for path in seeds]
    monkeypatch.setattr(theworld.TheWorld, "from_pretrained", watched)
    output = tmp_path / "both.jsonl"
    command = ["python", "tools/eval.py", "--annotations", "my data"]
    path, summary = score_to_file(seeds, "test", cache, None, CONDITIONS, {}, command, output)
    assert path == output
    rows = read_jsonl(output)
    own = [f"{name}:{kind}" for name in ("s0", "s1") for kind in ("world", "zero", "shuffled")]
    assert list(rows[0]["systems"]) == ["baseline", "text", *own]
    for name, wanted in zip(("s0", "s1"), alone, strict=True):
        for row, one in zip(rows, wanted, strict=True):
            for kind in CONDITIONS:
                found = row["systems"][kind if kind in ("baseline", "text") else f"{name}:{kind}"]
                assert found == pytest.approx(one["systems"][kind], abs=1e-4)
    assert loaded[0] is loaded[1]
    assert rows[0]["systems"]["s0:world"] != rows[0]["systems"]["s1:world"]
    assert summary == summarise(rows)
    assert set(summary["checkpoints"]["world"]["each"]) == {"s0", "s1"}
    source = read_source(output)
    assert source is not None
    assert source["command"] == "python tools/eval.py --annotations 'my data'"
    assert source["records_sha256"] == hash_file(output)[1]
    assert [source["checkpoints"][name]["seed"] for name in ("s0", "s1")] == [0, 1]
    assert source["checkpoints"]["s1"]["step"] == 1
    assert source["cache"]["latents"]["fingerprint"]["latent_size"] == 64
    assert "latents_mean" not in source["cache"]["latents"]["fingerprint"]
    assert source["statements_in_split"] == len(rows) == 4


def test_checkpoints_that_ask_in_other_words_have_a_baseline_each(
    config: Config, cache: Path, tmp_path: Path
) -> None:
    config = replace(config, max_steps=1, do_eval=False)
    ways = {"plainly": config, "worded": replace(config, question_template="Is it so? {caption}")}
    runs = [
        Trainer(replace(way, output_dir=str(tmp_path / name)), cache).run().parent
        for name, way in ways.items()
    ]
    score_to_file(runs, "test", cache, None, ("world", "baseline"), {}, [], tmp_path / "r.jsonl")
    rows = read_jsonl(tmp_path / "r.jsonl")
    wanted = ["plainly:world", "plainly:baseline", "worded:world", "worded:baseline"]
    assert list(rows[0]["systems"]) == wanted
    assert rows[0]["systems"]["plainly:baseline"] != rows[0]["systems"]["worded:baseline"]


def test_baseline_is_the_published_gemma_and_a_trained_one_stands_beside_it(
    seeds: list[Path], config: Config, cache: Path, tmp_path: Path
) -> None:
    """A second stage that trains Gemma's language model: what that answers alone is another system."""
    stage = replace(
        config,
        max_steps=3,
        do_eval=False,
        learning_rate=1e-2,
        init_from=str(seeds[0]),
        freeze_gemma_language=False,
        output_dir=str(tmp_path / "stage-2"),
    )
    second = Trainer(stage, cache).run()
    assert SavedModel.read(second).world["parts"] == ["language"]
    alone = score(seeds[0] / "checkpoint-1", cache, None, "test", CONDITIONS, {})
    score_to_file([seeds[0], second.parent], "test", cache, None, CONDITIONS, {}, [], tmp_path / "r.jsonl")
    rows = read_jsonl(tmp_path / "r.jsonl")
    own = ["world", "zero", "shuffled", "text"]
    wanted = ["baseline", *(f"s0:{k}" for k in own), "stage-2:world", "stage-2:without"]
    assert list(rows[0]["systems"]) == [*wanted, *(f"stage-2:{k}" for k in own[1:])]
    single = score(second, cache, None, "test", CONDITIONS, {})
    assert list(single[0]["systems"]) == ["world", "without", "zero", "shuffled", "text", "baseline"]
    for row, one, published in zip(rows, single, alone, strict=True):
        plain = published["systems"]["baseline"]
        assert row["systems"]["baseline"] == pytest.approx(plain, abs=1e-4)
        assert one["systems"]["baseline"] == pytest.approx(plain, abs=1e-4)
        assert row["systems"]["stage-2:without"] == pytest.approx(one["systems"]["without"], abs=1e-4)
    gap = [
        abs(one["systems"]["without"]["logit_1"] - one["systems"]["baseline"]["logit_1"]) for one in single
    ]
    assert max(gap) > 1e-2
    source = read_source(tmp_path / "r.jsonl")
    assert source is not None
    assert [source["checkpoints"][name]["parts"] for name in ("s0", "stage-2")] == [[], ["language"]]


def test_results_of_a_run_lie_in_it(seeds: list[Path], cache: Path) -> None:
    path, _ = score_to_file(seeds[:1], "test", cache, None, ("world",), {}, [])
    assert path == seeds[0] / "evaluation" / "checkpoint-1-own-data-test.jsonl"
    names = ["checkpoint-1-own-data-test" + end for end in (".jsonl", ".meta.json", ".summary.json")]
    assert sorted(p.name for p in path.parent.iterdir()) == names
    with pytest.raises(ValueError, match="several models belong to no single run; name an --output"):
        score_to_file(seeds, "test", cache, None, ("world",), {}, [])


def test_a_model_that_lies_by_itself_has_its_results_in_its_folder(tmp_path: Path) -> None:
    download = tmp_path / "snapshot"
    wanted = download / "evaluation" / "snapshot-own-data-dev.jsonl"
    assert default_output([SavedModel(download, {}, {})], "own data", "dev") == wanted


def test_where_results_come_from_is_not_believed_of_other_records(seeds: list[Path], cache: Path) -> None:
    path, _ = score_to_file(seeds[:1], "test", cache, None, ("world",), {}, [])
    meta = path.with_suffix(".meta.json")
    whole = json.loads(meta.read_text())
    assert read_source(path) == whole
    del whole["checkpoints"][""]["parts"], whole["date"]
    meta.write_text(json.dumps(whole))
    with pytest.raises(
        ValueError, match=r"test\.meta\.json has no date, parts; score again, or move it away"
    ):
        read_source(path)
    score_to_file(seeds[:1], "test", cache, None, ("world",), {}, [])
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"test\.meta\.json is of records with SHA-256 .*; score again"):
        read_source(path)
    path.with_suffix(".meta.json").unlink()
    assert read_source(path) is None


def test_a_text_only_gemma_is_not_asked_without_the_photograph(
    config: Config, cache: Path, text_gemma_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(config, model_name=str(text_gemma_folder), do_eval=False, max_steps=1)
    checkpoint = Trainer(config, cache).run()
    caplog.set_level("INFO", "theworld")
    rows = score(checkpoint, cache, None, "test", ("baseline", "text"), {})
    assert list(rows[0]["systems"]) == ["baseline"]
    assert "without 'text': this Gemma sees no photograph, so it is 'baseline'" in caplog.text
    with pytest.raises(ValueError, match="so it is the same as 'baseline'; give that"):
        score(checkpoint, cache, None, "test", ("text",), {})


def test_names_are_the_shortest_that_tell_checkpoints_apart(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a/run/checkpoint-4", "b/run/checkpoint-4", "b/run/checkpoint-8")]
    assert short_names(folders[:1], folders[:1]) == [""]
    assert short_names(folders[1:], folders[1:]) == ["checkpoint-4", "checkpoint-8"]
    assert short_names(folders, folders) == ["a/run/checkpoint-4", "b/run/checkpoint-4", "b/run/checkpoint-8"]
    assert short_names([tmp_path / "a", tmp_path / "c:d"], folders[:2]) == ["a", "c_d"]  # as they were given
    with pytest.raises(ValueError, match=r"a/run/checkpoint-4 is named twice"):
        short_names([tmp_path / "a" / "run", folders[0]], [folders[0], folders[0]])


VSR = ROOT.parent / "shared" / "vsr"


def write(folder: Path, split: str, captions: Sequence[tuple[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"image": i, "caption": c, "label": 1, "relation": "on"} for i, c in captions]
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def vsr(tmp_path: Path) -> Path:
    """Both releases in small: two of three zeroshot test statements are in random train, none of random's own test."""
    folder = tmp_path / "vsr"
    write(folder / "random", "train", [("a.jpg", "one"), ("b.jpg", "two"), ("c.jpg", "three")])
    write(folder / "random", "test", [("a.jpg", "four"), ("d.jpg", "five")])
    write(folder / "zeroshot", "train", [("a.jpg", "four"), ("e.jpg", "six")])
    write(folder / "zeroshot", "test", [("a.jpg", "one"), ("b.jpg", "two"), ("d.jpg", "five")])
    return folder


def checkpoint(folder: Path, annotations: Path, name: str = "vsr", **settings: object) -> SavedModel:
    """A saved model without weights."""
    folder.mkdir(parents=True)
    (folder / "projection.safetensors").touch()
    write_world(folder, {"fingerprint": {}})
    config = Config(annotations=str(annotations), dataset_name=name, image_folder="photos", **settings)  # type: ignore[arg-type]
    save_config(config, folder / "config.json")
    return SavedModel.open_folder(folder)


def test_a_split_with_what_training_had_of_it(vsr: Path, tmp_path: Path) -> None:
    data = held_out({"": checkpoint(tmp_path / "c", vsr)}, "test", {})
    assert [s.caption for s in data.statements] == ["four", "five"]
    assert data.seen_images == {"a.jpg"}
    assert data.in_train == set()
    assert (data.dataset, data.split, data.image_folder) == (OWN, "test", "photos")
    assert data.trained_on == {"": "3 statements of the train split of custom data"}


def test_statements_that_were_cut_from_training_were_not_seen(vsr: Path, tmp_path: Path) -> None:
    data = held_out({"": checkpoint(tmp_path / "c", vsr, num_samples=1)}, "train", {})
    assert data.in_train == {("a.jpg", "one")}
    assert data.seen_images == {"a.jpg"}


def test_statements_that_a_share_left_out_were_not_seen(vsr: Path, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "c", vsr, train_share=0.3)  # one of three
    drawn = training_statements(load_statements(str(vsr), "train", "vsr"), path.config())
    data = held_out({"": path}, "train", {})
    assert data.in_train == {(s.image, s.caption) for s in drawn}
    assert (len(drawn), data.trained_on) == (1, {"": "1 statement of the train split of custom data"})


def test_zeroshot_is_refused_to_a_model_of_random_unless_it_is_asked_for(vsr: Path, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "c", vsr, "vsr_random")
    wanted = "c was trained on VSR random, and 2 of the 3 statements of zeroshot test are among its training"
    with pytest.raises(
        ValueError, match=rf"{wanted}.* --dataset_name vsr_zeroshot, or give --allow_trained_statements"
    ):
        held_out({"": path}, "test", {"dataset_name": "vsr_zeroshot"})
    data = held_out({"": path}, "test", {"dataset_name": "vsr_zeroshot"}, allow_trained=True)
    assert [(s.image, s.caption) in data.in_train for s in data.statements] == [True, True, False]
    assert data.seen_images == {"a.jpg", "b.jpg"}


def test_the_reverse_is_refused_where_statements_are_shared(vsr: Path, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "c", vsr, "vsr_zeroshot")
    with pytest.raises(ValueError, match="VSR zeroshot, and 1 of the 2 statements of random test"):
        held_out({"": path}, "test", {"dataset_name": "vsr"})
    assert len(held_out({"": path}, "test", {}).statements) == 3


def test_training_statements_that_moved_have_to_be_named(vsr: Path, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "c", tmp_path / "gone")
    with pytest.raises(
        ValueError, match=r"cannot be told: annotations: no file or folder .*gone; give --train_annot"
    ):
        held_out({"": path}, "test", {"annotations": str(vsr)})
    data = held_out({"": path}, "test", {"annotations": str(vsr)}, train_annotations=str(vsr))
    assert data.seen_images == {"a.jpg"}


def test_what_an_earlier_stage_was_trained_on_was_seen(vsr: Path, tmp_path: Path) -> None:
    write(tmp_path / "own", "train", [("d.jpg", "five")])
    first = checkpoint(tmp_path / "first", tmp_path / "own")
    second = checkpoint(tmp_path / "second", vsr, init_from=str(first.folder))
    data = held_out({"": second}, "test", {})
    assert data.seen_images == {"a.jpg", "d.jpg"}
    assert data.trained_on == {
        "": "3 statements of the train split of custom data, before that on 1 statement of the train split of "
        "custom data"
    }
    (first.folder / "projection.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"second was trained on train of .*vsr \(vsr\) from .*first, .*neither a check"
    ):
        held_out({"": second}, "test", {})
    assert held_out({"": second}, "test", {}, train_annotations=str(vsr)).seen_images == {"a.jpg"}


def test_a_folder_that_an_older_checkpoint_recorded_means_its_newest_checkpoint_and_that_is_logged(
    vsr: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "own", "train", [("d.jpg", "five")])
    for step, annotations in ((2, vsr), (10, tmp_path / "own")):
        first = checkpoint(tmp_path / "run" / f"checkpoint-{step}", annotations).folder
        names = ("projection.safetensors", "world.json", "config.json")
        index = {"format": 1, "step": step, "files": {name: fingerprint_of(first / name) for name in names}}
        (first / "checkpoint.json").write_text(json.dumps(index) + "\n")
    second = checkpoint(tmp_path / "second", vsr, init_from=str(tmp_path / "run"))
    assert held_out({"": second}, "test", {}).seen_images == {"a.jpg", "d.jpg"}
    (message,) = [message for _, _, message in caplog.record_tuples]
    assert message == (
        f"{second.folder}/config.json: init_from is the folder {tmp_path}/run; its newest checkpoint now, "
        "checkpoint-10, is taken for the one that was meant"
    )


def test_stages_that_lead_back_to_themselves_are_refused(vsr: Path, tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "one", vsr, init_from=str(tmp_path / "two"))
    checkpoint(tmp_path / "two", vsr, init_from=str(tmp_path / "three"))
    checkpoint(tmp_path / "three", vsr, init_from=str(tmp_path / "two"))
    with pytest.raises(
        ValueError, match=r"three/config\.json: init_from is .*two, which leads back to .*two .*--train_ann"
    ):
        held_out({"": one}, "test", {})
    assert held_out({"": one}, "test", {}, train_annotations=str(vsr)).seen_images == {"a.jpg"}


def test_each_file_of_a_checkpoint_is_read_and_hashed_once_in_an_evaluation(
    seeds: list[Path], cache: Path, opened: Callable[[Path], dict[str, int]]
) -> None:
    score_to_file(seeds[:1], "test", cache, None, ("world", "baseline"), {}, [])
    # The library that loads the weights opens the file by itself.
    wanted = ["checkpoint.json", "config.json", "projection.safetensors", "world.json"]
    assert opened(seeds[0] / "checkpoint-1") == dict.fromkeys(wanted, 1)


def test_checkpoints_are_compared_on_the_same_statements(vsr: Path, tmp_path: Path) -> None:
    write(tmp_path / "own", "train", [("d.jpg", "five")])
    both = {"x": checkpoint(tmp_path / "x", vsr), "y": checkpoint(tmp_path / "y", tmp_path / "own")}
    with pytest.raises(
        ValueError, match=r"name different statements \(x: .*vsr, vsr; y: .*own, vsr\); give --annot"
    ):
        held_out(both, "test", {})
    data = held_out(both, "test", {"annotations": str(vsr)})
    assert data.seen_images == {"a.jpg", "d.jpg"}  # by either
    assert data.in_train == {("d.jpg", "five")}
    assert set(data.trained_on) == {"x", "y"}


def test_a_statement_was_seen_whatever_its_case_spaces_and_unicode_form(vsr: Path, tmp_path: Path) -> None:
    write(vsr / "random", "train", [("a.jpg", "The Caf\u00e9 is  left of it."), ("b.jpg", "Two.")])
    write(
        vsr / "random",
        "test",
        [("a.jpg", " the cafe\u0301 is left\tof it "), ("a.jpg", "Two."), ("b.jpg", "two")],
    )
    data = held_out({"": checkpoint(tmp_path / "c", vsr)}, "test", {})
    assert [(s.image, s.caption) in data.in_train for s in data.statements] == [True, False, True]


@pytest.fixture
def renamed(vsr: Path, photographs: Path, tmp_path: Path) -> Path:
    """Photographs of which d.jpg has the bytes of a.jpg, for a test split about d.jpg and e.jpg; c.jpg is missing."""
    write(vsr / "random", "test", [("d.jpg", "ONE"), ("d.jpg", "five"), ("e.jpg", "one")])
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, source in (("a", "a"), ("b", "b"), ("d", "a"), ("e", "c")):
        shutil.copy(photographs / f"{source}.png", folder / f"{name}.jpg")
    return folder


def seen(data: HeldOut) -> list[tuple[bool, bool]]:
    """Whether training had the image, and the statement, of each statement of a split."""
    return [(s.image in data.seen_images, (s.image, s.caption) in data.in_train) for s in data.statements]


def test_a_photograph_was_seen_under_another_name(
    vsr: Path, renamed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "theworld")
    saved = checkpoint(tmp_path / "c", vsr)
    assert seen(held_out({"": saved}, "test", {})) == [(False, False)] * 3  # there is nothing to compare
    assert caplog.messages == []
    wanted = [(True, True), (True, False), (False, False)]
    assert seen(held_out({"": saved}, "test", {}, image_folder=renamed)) == wanted
    assert caplog.messages == [
        f"1 of the 3 training photographs are not in {renamed}: "
        "whether the split has them is told by their names alone"
    ]
    images = [ImageEntry(path.name, sha256(path.read_bytes())) for path in sorted(renamed.iterdir())]
    array = ArraySpec("latents", (1,), "float32")
    Store.create(tmp_path / "cache" / "latents", {"model": "m"}, images, [array], 2)
    assert seen(held_out({"": saved}, "test", {}, cache=tmp_path / "cache")) == wanted


def test_photographs_of_a_benchmark_are_told_by_their_source_and_by_content_in_the_folder_of_training(
    vsr: Path, photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "theworld")
    trained, own = tmp_path / "trained", tmp_path / "own" / "images"
    trained.mkdir()
    own.mkdir(parents=True)
    for name in "abc":
        Image.open(photographs / f"{name}.png").save(trained / f"{name}.jpg")
    Image.open(trained / "a.jpg").save(own / "1.png")
    shutil.copy(photographs / "b.png", own / "2.png")  # not what was trained on: a JPEG loses
    shutil.copy(photographs / "c.png", own / "3.png")
    rows = [
        {"image": "1.png", "statement": "one", "label": 1},
        {"image": "1.png", "statement": "two", "label": 1},
        {"image": "2.png", "statement": "two", "label": 1},
        {"image": "3.png", "statement": "Three.", "label": 1, "source_image": "COCO_val2014_c.jpg"},
    ]
    (tmp_path / "own" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    saved = checkpoint(tmp_path / "c", vsr)
    given = {"": saved}, "test", {"annotations": str(tmp_path / "own")}
    by_name = [(False, False)] * 3 + [(True, True)]
    assert seen(held_out(*given, train_annotations=str(vsr), image_folder=own)) == by_name
    save_config(replace(saved.config(), image_folder=str(trained)), saved.folder / "config.json")
    given = {"": SavedModel.open_folder(saved.folder)}, *given[1:]
    caplog.clear()
    assert seen(held_out(*given, train_annotations=str(vsr), image_folder=own)) == [
        (True, True),
        (True, False),
        *by_name[2:],
    ]
    assert caplog.messages == [
        "photographs of the split that training had under another name: 1 by the name in their data set, 1 by content"
    ]


def test_records_and_summary_say_that_a_photograph_was_seen_under_another_name(
    config: Config, photographs: Path, tmp_path: Path
) -> None:
    write(tmp_path / "own", "test", [("x.png", "It is so."), ("y.png", "It is so.")])
    shutil.copytree(photographs, tmp_path / "photos")
    shutil.copy(photographs / "a.png", tmp_path / "photos" / "x.png")
    (tmp_path / "photos" / "y.png").write_bytes((photographs / "a.png").read_bytes() + b"\0")
    model, output = save_model(tmp_path / "model", config), tmp_path / "r.jsonl"
    given = {"annotations": str(tmp_path / "own")}
    places = (None, tmp_path / "photos", ("baseline",), given, ["eval"], output)
    _, summary = score_to_file([model], "test", *places, train_annotations=config.annotations)
    assert [row["image_seen_in_train"] for row in read_jsonl(output)] == [True, False]
    assert {key: group["baseline"]["n"] for key, group in summary["by_seen"].items()} == {
        "True": 1,
        "False": 1,
    }


def test_options_and_questions_are_scored_from_photographs_and_from_a_cache(
    config: Config, cache: Path, photographs: Path, tmp_path: Path
) -> None:
    sets = {"sets": {"set": "1"}}
    rows = [
        *(
            {"image": "a.png", "statement": t, "label": y, "group": "1"} | sets
            for t, y in (("On it.", 1), ("Off it.", 0))
        ),
        *(
            {"image": "b.png", "statement": t, "label": y, "group": "2"} | sets
            for t, y in (("On it.", 0), ("Off it.", 1))
        ),
        {"image": "a.png", "question": "Is it on it?", "label": 1},
        {"image": "a.png", "statement": "Is it on it?", "label": 1},
    ]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, given = save_model(tmp_path / "model", config), {"annotations": str(tmp_path / "own")}
    found = []
    for name, places in (("photographs", (None, photographs)), ("cache", (cache, None))):
        output = tmp_path / f"{name}.jsonl"
        options = (("world", "baseline"), given, ["eval"], output)
        _, summary = score_to_file([model], "test", *places, *options, train_annotations=config.annotations)
        found.append(read_jsonl(output))
        assert summary["choices"]["groups"] == 2
        assert summary["choices"]["sets"] == {"set": {"n": 1, "chance": 0.25}}
        assert summary["statements"] == 6
    by_photographs, by_cache = ([row["systems"]["world"]["p_true"] for row in rows] for rows in found)
    assert by_cache == pytest.approx(by_photographs, abs=1e-5)  # other batches of the same photographs
    assert by_cache[4] != by_cache[5]  # the question has another prompt than the statement of the same words
    assert [row.get("question", False) for row in found[0]] == [False] * 4 + [True, False]


def test_a_benchmark_is_scored_under_its_name_with_records_of_its_own(
    config: Config, annotations: Path, tmp_path: Path
) -> None:
    small = replace(BENCHMARKS["whatsup_a"], rows=8)
    source = benchmark_data.write_files(
        tmp_path / "hub", small.files, benchmark_data.whatsup_a(8), benchmark_data.WHATSUP
    )
    folder = tmp_path / "whatsup_a"
    get_benchmark(small, folder, source)
    model = save_model(tmp_path / "model", config)
    given = {"annotations": str(folder)}
    places = (None, folder / "images", ("world", "baseline"), given, ["eval"])
    output, summary = score_to_file([model], "test", *places, train_annotations=str(annotations))
    assert output.name == "model-whatsup_a-test.jsonl"
    assert summary["data"] == [("whatsup_a", "test")]
    choices = summary["choices"]
    assert (choices["groups"], choices["options"], choices["chance"]) == (8, [4], 0.25)
    assert choices["sets"] == {"pair": {"n": 4, "chance": 1 / 16}, "set": {"n": 2, "chance": 1 / 256}}
    assert sorted(summary["by_relation"]) == ["left of", "on", "right of", "under"]
    with (folder / "test.jsonl").open("a") as file:
        file.write("\n")
    assert held_out({"": SavedModel.open_folder(model)}, "test", given, str(annotations)).dataset == OWN


def test_all_phases_read_a_folder_of_links_on_request(
    config: Config, photographs: Path, tmp_path: Path
) -> None:
    folder, output = tmp_path / "images", tmp_path / "r.jsonl"
    folder.mkdir()
    for path in photographs.iterdir():
        (folder / path.name).symlink_to(path)
    config = replace(config, image_folder=str(folder), max_steps=1, do_eval=False)
    with pytest.raises(ValueError, match=r"a\.png: a symbolic link out of .*; --follow_links reads it"):
        extract(config, tmp_path / "cache", with_vision=False, allow_missing=False)
    config = replace(config, follow_links=True)
    extract(config, tmp_path / "cache", with_vision=False, allow_missing=False)
    page = {finding.topic: finding for finding in look_over(config, tmp_path / "cache")}
    assert page["photographs"].message.endswith("3 of 3 looked at can be read")
    assert page["compared"].state == "ok"
    run = Trainer(config, tmp_path / "cache").run()  # Gemma looks at the photographs
    score_to_file([run], "test", None, folder, ("world", "baseline"), {}, ["eval"], output)
    assert [row["image_seen_in_train"] for row in read_jsonl(output)] == [True] * 4
    source = read_source(output)
    assert source is not None
    assert source["follow_links"] is True
    assert _photograph(folder, "a.png", source["follow_links"])["width"] == 96
    with pytest.raises(ImageError, match="--follow_links reads it"):
        score_to_file([run], "test", None, folder, ("world",), {"follow_links": False}, ["eval"], output)


def test_a_release_is_told_by_its_statements_whatever_it_is_called(
    vsr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small zeroshot test split, as own data under the name vsr."""
    rows = [(s.image, s.caption, s.label) for s in load_statements(vsr, "test", "vsr_zeroshot")]
    monkeypatch.setitem(PUBLISHED_SHA256, ("vsr_zeroshot", "test"), statements_sha256(rows))
    saved = checkpoint(tmp_path / "c", vsr)
    shutil.copytree(vsr / "zeroshot", tmp_path / "own")
    with pytest.raises(ValueError, match="VSR random, and 2 of the 3 statements of zeroshot test"):
        held_out({"": saved}, "test", {"annotations": str(tmp_path / "own")})


@pytest.mark.skipif(not VSR.is_dir(), reason="no real data: ../shared/vsr is not there")
def test_the_real_releases(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "c", VSR)
    with pytest.raises(ValueError, match=r"830 of the 1,222 statements of zeroshot test"):
        held_out({"": path}, "test", {"dataset_name": "vsr_zeroshot"})
    data = held_out({"": path}, "test", {})
    assert sum(s.image in data.seen_images for s in data.statements) == 1226
    assert data.dataset == "vsr_random"
    assert data.trained_on == {"": "7,680 statements of the train split of VSR random"}
    for release, split in PUBLISHED_SHA256:
        rows = ((s.image, s.caption, s.label) for s in load_statements(VSR, split, release))
        assert release_of(rows, split) == release


def test_records_that_were_changed_since_are_read_by_nothing(
    seeds: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, summary = score_to_file(seeds[:1], "test", cache, None, ("world",), {}, [])
    rows, source = read_results(path)
    assert (len(rows), source) == (summary["statements"], read_source(path))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    before = path.with_suffix(".summary.json").read_bytes()
    monkeypatch.setattr(sys, "argv", ["eval.py", "--from", str(path)])
    for flags in ([], ["--dry_run"]):
        monkeypatch.setattr(sys, "argv", ["eval.py", "--from", str(path), *flags])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools/eval.py"), run_name="__main__")
        assert ended.value.code == 1
        assert re.match(
            r"eval: .*\.meta\.json is of records with SHA-256 \w+, .*\.jsonl has",
            capsys.readouterr().err.splitlines()[-1],
        )
    assert path.with_suffix(".summary.json").read_bytes() == before


def test_validation_is_dev_in_records_provenance_and_file_names(seeds: list[Path], cache: Path) -> None:
    path, summary = score_to_file(seeds[:1], "validation", cache, None, ("world",), {}, [])
    assert path.name == "checkpoint-1-own-data-dev.jsonl"
    rows, source = read_results(path)
    assert source is not None
    assert ({row["split"] for row in rows}, source["split"]) == ({"dev"}, "dev")
    assert [split for _, split in summary["data"]] == ["dev"]
    path.with_suffix(".meta.json").unlink()
    write_jsonl([row | {"split": "validation"} for row in rows], path)  # as earlier versions wrote
    assert {row["split"] for row in read_jsonl(path)} == {"dev"}


def test_two_evaluations_do_not_write_to_one_file(seeds: list[Path], cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "results" / "lr-0.001"
    arguments = (seeds[:1], "test", cache, None, ("world",), {}, [], output)
    with held(output, is_file=True), pytest.raises(InUse, match=f"--output {output} is in use"):
        score_to_file(*arguments)
    assert [path.name for path in output.parent.iterdir()] == [".lr-0.001.lock"]
    score_to_file(*arguments)
    names = ["lr-0.001", "lr-0.001.meta.json", "lr-0.001.summary.json"]
    assert sorted(path.name for path in output.parent.iterdir()) == names


def test_another_image_is_asked_of_a_single_photograph_before_any_model_loads(
    config: Config, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    row = {"image": "a.png", "statement": "On it.", "label": 1}
    (tmp_path / "own" / "test.jsonl").write_text(json.dumps(row) + "\n")
    model, given = save_model(tmp_path / "model", config), {"annotations": str(tmp_path / "own")}
    output = tmp_path / "r.jsonl"
    options = (given, ["eval"], output)

    def scored(*conditions: str) -> dict:
        places = ("test", cache, None, conditions, *options)
        return score_to_file([model], *places, train_annotations=config.annotations)[1]

    assert scored("world", "baseline")["systems"]["world"]["image_low"] is None
    assert "1 statement is few: the intervals are wide." in verdict(summarise(read_jsonl(output))).notes
    monkeypatch.setattr(theworld.TheWorld, "from_pretrained", None)
    with pytest.raises(
        ValueError, match=r"^condition 'shuffled' needs at least two images; leave it out of --conditions$"
    ):
        scored("world", "shuffled")
