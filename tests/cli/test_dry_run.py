"""A dry run says what the run would do, or the error that it would die of; and it leaves no trace."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import main_of, tool, trace
from jobs import flip
from records import four_rows

from theworld.cli import dry_run
from theworld.cli.dry_run import alignment, evaluation, extraction, recomputation
from theworld.config.config import Config, save_config
from theworld.evaluation.conditions import CONDITIONS
from theworld.evaluation.records import write_jsonl
from theworld.extraction.encoders import specs_of
from theworld.extraction.extract import extract
from theworld.report.report import plan_report
from theworld.store.format import StoreMismatch
from theworld.store.reader import StoreReader
from theworld.training.trainer import Trainer
from theworld.utils.console import NOTHING_WRITTEN
from theworld.utils.files import StoreError
from theworld.utils.hub import Fault, Place


@pytest.fixture
def settings(config: Config, tmp_path: Path) -> Path:
    save_config(config, tmp_path / "settings.json")
    return tmp_path / "settings.json"


@pytest.fixture
def run(config: Config, cache: Path) -> Path:
    """A finished run of one step."""
    return Trainer(replace(config, max_steps=1), cache).run().parent


def test_no_tool_leaves_a_trace(
    settings: Path,
    run: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    (tmp_path / "results.jsonl").write_text("older\n")
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "demo.json").write_text("{}\n")
    config = json.loads(settings.read_text())
    commands = {
        "extract_latents": ["--config", settings, "--cache", cache, "--gemma_vision"],
        "get_images": ["--annotations", config["annotations"], "--output", tmp_path / "images"],
        "eval": ["--model_name", run, "--cache", cache, "--output", tmp_path / "results.jsonl"],
        "report": [run],
        "visualize_alignment": ["--model_name", run, "--cache", cache, "--output", tmp_path / "a.png"],
        "demo": ["--output", demo],
        "bench": ["--shapes", "tiny", "--folder", tmp_path / "bench", "--output", tmp_path / "b.json"],
        "make_demo_models": ["--output", tmp_path / "models"],
        "make_control_vae": ["--output", tmp_path / "vae"],
    }
    commands["get_images"] += ["--coco", config["image_folder"]]
    before = trace(tmp_path), trace(Path(config["image_folder"])), trace(Path(config["annotations"]))
    for name, arguments in commands.items():
        status, out, err = main_of(name, arguments, monkeypatch, capsys)
        assert (status, err) == (0, ""), name
        assert len(out.splitlines()) > 2
        assert out.splitlines()[-1] == NOTHING_WRITTEN
    after = trace(tmp_path), trace(Path(config["image_folder"])), trace(Path(config["annotations"]))
    assert after == before


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("extract_latents", [], "image_folder is not set: give --image_folder"),
        ("extract_latents", ["--image_folder", "nowhere"], "image_folder nowhere: not a folder"),
        ("get_images", ["--annotations", "nowhere"], "annotations: no file or folder nowhere"),
        ("eval", ["--model_name", "nowhere", "--cache", "c"], "nowhere: neither a checkpoint"),
        ("eval", ["--from", "nowhere.jsonl"], "nowhere.jsonl"),
        ("report", ["nowhere"], "nowhere: no such folder"),
        ("visualize_alignment", ["--model_name", "nowhere", "--cache", "c"], "nowhere: neither a checkpoint"),
        ("demo", ["--output", "tests"], "tests holds files that no demo wrote"),
        ("demo", ["--config", "nowhere.json"], "nowhere.json"),
        ("bench", ["--changes", '{"sead": 1}'], "the nearest known key is seed"),
        ("bench", ["--sizes", '{"repeat": 1}'], "--sizes: no size 'repeat'; the nearest is repeats"),
        ("bench", ["--share", "0"], "--share is 0.0; give more than 0 and at most 1"),
        ("make_demo_models", ["--output", "m", "--batch_size", "0"], "batch_size is 0; give more than 0"),
        ("make_control_vae", ["--output", "m", "--steps", "0"], "steps is 0; give more than 0"),
        ("make_control_vae", ["--output", "m", "--num_scenes", "1"], "num_scenes is 1; one is held out"),
        (
            "make_demo_models",
            ["--output", "setup.cfg/m"],
            "setup.cfg is a file, and a folder is wanted there",
        ),
    ],
)
def test_what_would_stop_the_run_stops_its_dry_run(
    name: str,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, err = main_of(name, arguments, monkeypatch, capsys)
    assert status == 1
    assert err.startswith(f"{name}: ")
    assert message in err
    assert NOTHING_WRITTEN not in out  # the error is what one reads


@pytest.mark.parametrize("index", ["0", "1"])
def test_of_processes_launched_together_the_first_alone_speaks(
    index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", index)
    done = tool("demo", "--dry_run", "--output", "nowhere/demo")
    assert (done.stdout == "") == (index == "1")


# ---- phase 1


def test_what_is_planned_is_what_extraction_makes(config: Config, cache: Path) -> None:
    for spec in specs_of(config, with_vision=True):
        assert [*StoreReader(cache / spec.name).arrays.values()] == [spec.array]


def test_a_new_cache_then_a_finished_one(config: Config, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    lines = list(extraction(config, root, True, False, None))
    assert lines[0] == "statements   6 train, 1 dev, 4 test, about 3 photographs"
    assert lines[1].startswith(f"photographs  all 3 are in {config.image_folder}; ")
    assert lines[4] == f"cache        {root / 'latents'}: new, 16 x 8 x 8 float32 an image"
    assert lines[5].startswith(
        "             latents: 3 of 3 images to encode in 2 of 2 shards, 12.0 KiB on disk"
    )
    assert lines[7] == f"cache        {root / 'gemma_vision'}: new, 16 x 64 float32 an image"
    extract(config, root, True, False)
    lines = list(extraction(config, root, True, False, None))
    complete = "complete, 3 images, made with these settings"
    assert [lines[4], lines[6]] == [
        f"cache        {root / name}: {complete}" for name in ("latents", "gemma_vision")
    ]


def test_the_size_of_rows_of_a_model_that_is_not_downloaded_is_not_guessed_at(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("theworld.cli.dry_run", "theworld.extraction.extract"):
        monkeypatch.setattr(f"{module}.locate", lambda name, file: Place(None, "on the hub"))
    config = replace(config, cosmos_model_name="somebody/vae")
    *_, model, cache = extraction(config, tmp_path / "cache", False, False, None)
    assert model == "model        Cosmos VAE, somebody/vae: on the hub"
    assert cache == (
        f"cache        {tmp_path / 'cache' / 'latents'}: new; the size of a row is known once the model's config "
        "file is on this machine"
    )


def test_an_unfinished_cache_goes_on_with_what_is_missing(config: Config, tmp_path: Path) -> None:
    config = replace(config, shard_size=1)
    root = tmp_path / "cache"
    extract(config, root, with_vision=False, allow_missing=False)
    (root / "latents" / "manifest.json").unlink()
    (root / "latents" / "shards" / "00001.json").unlink()
    *_, what, work = extraction(config, root, False, False, None)
    assert what.startswith(f"cache        {root / 'latents'}: goes on")
    assert "1 of 3 images to encode in 1 of 3 shards" in work


def test_a_cache_of_other_settings_is_shown_field_by_field(config: Config, cache: Path) -> None:
    with pytest.raises(
        StoreMismatch,
        match=r"encode_batch_size: cached \d+, wanted 5\n.*latent_shape: .*\n.*latent_size: cached 64",
    ):
        list(extraction(replace(config, latent_size=80, encode_batch_size=5), cache, False, False, None))
    with pytest.raises(StoreMismatch, match=r"shard_size: cached \d+, wanted 7"):
        list(extraction(replace(config, shard_size=7), cache, False, False, None))


def test_a_finished_cache_of_fewer_photographs_is_refused(
    config: Config, cache: Path, tmp_path: Path, annotations: Path
) -> None:
    folder = tmp_path / "more"
    shutil.copytree(annotations, folder)
    row = {"image": "d.png", "caption": "The cup is on the table.", "label": 1, "relation": "on"}
    with open(folder / "dev.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    photographs = tmp_path / "photographs"
    shutil.copytree(str(config.image_folder), photographs)
    more = replace(config, annotations=str(folder), image_folder=str(photographs))
    with pytest.raises(ValueError, match=r"1 of 4 photographs cannot be read:\n  d\.png: no such file in "):
        list(extraction(more, cache, False, False, None))
    assert any(
        "3 of 4 photographs; 1 left out" in line for line in extraction(more, cache, False, True, None)
    )
    shutil.copy(photographs / "a.png", photographs / "d.png")
    with pytest.raises(StoreMismatch, match=r"number of images: cached 3, wanted 4\n.*image d\.png: cached"):
        list(extraction(more, cache, False, False, None))


def test_a_damaged_store_a_full_disk_and_a_blind_gemma_stop_it(
    config: Config, cache: Path, tmp_path: Path, text_gemma_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="is text-only: it has no vision features to cache"):
        list(
            extraction(replace(config, model_name=str(text_gemma_folder)), tmp_path / "b", True, False, None)
        )
    (cache / "latents" / "images.jsonl").write_text("{}\n")
    with pytest.raises(StoreError, match=r"images\.jsonl is damaged"):
        list(extraction(config, cache, False, False, None))
    monkeypatch.setattr("theworld.utils.files.free_bytes", lambda path: 100)
    with pytest.raises(
        ValueError, match=r"12,288 bytes are needed and 100 are free; make room or move --cache"
    ):
        list(extraction(config, tmp_path / "new", False, False, None))


def test_statements_that_only_the_hub_has_are_not_counted(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "statements_at_hand", lambda annotations, name: None)
    lines = list(extraction(replace(config, annotations=None), tmp_path / "c", False, False, None))
    assert lines[0] == "statements   vsr, from the hub when the run starts; not counted here"
    assert lines[-1].startswith("             latents: 0 of 0 images")  # its photographs are no .jpg


# ---- phase 3


@pytest.fixture
def no_weights(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights fails, once the run has been made."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("weights were loaded")

    for name in ("safetensors.torch.load_file", "transformers.PreTrainedModel.from_pretrained"):
        monkeypatch.setattr(name, refuse)
    monkeypatch.setattr(torch, "load", refuse)


@pytest.mark.usefixtures("no_weights")
def test_an_evaluation_in_numbers(config: Config, run: Path, cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.jsonl"
    lines = list(evaluation([run], cache, None, "test", ["world", "zero"], output, {"eval_batch_size": 3}))
    assert lines == [
        f"projection   {run / 'checkpoint-1'}, for gemma",
        f"Gemma        {config.model_name}: a local folder; cpu, torch.float32",
        f"reads        4 of 4 statements, 2 of 2 images, from {cache}: latents and vision features",
        "asks         2 conditions (world, zero) about 4 statements, 2 batches",
        "trained on   6 statements of the train split of custom data, which shows 2 of the 2 images of test",
        f"writes       {output}, 4 lines, and {output.with_suffix('.summary.json')}",
    ]
    folder = Path(str(config.image_folder))
    output.write_text("")
    lines = list(evaluation([run], None, folder, "train", ["world"], output, {}))
    assert lines[2:4] == [
        f"Cosmos VAE   {config.cosmos_model_name}: a local folder",
        f"reads        3 photographs in {folder}",
    ]
    assert lines[-1].startswith(f"writes       {output}, 6 lines (replaces the one there)")


@pytest.mark.usefixtures("no_weights")
def test_an_evaluation_of_several_and_one_again(run: Path, cache: Path, tmp_path: Path) -> None:
    other = run.parent / "other"
    shutil.copytree(run, other)
    with pytest.raises(ValueError, match="several models belong to no single run; name an --output"):
        list(evaluation([run, other], cache, None, "test", ["world"], None, {}))
    lines = list(evaluation([run, other], cache, None, "test", CONDITIONS, tmp_path / "r.jsonl", {}))
    assert [line.split()[0] for line in lines] == [
        *["projection", "Gemma"] * 2,
        *["reads", "asks"] * 2,
        "trained",
        "writes",
    ]
    assert (
        "asks         5 conditions (world, baseline, zero, shuffled, text) about 4 statements, 1 batch"
        in lines
    )
    lines = list(evaluation([run], cache, None, "test", ["world"], None, {}))
    output = run / "evaluation" / "checkpoint-1-own-data-test.jsonl"
    assert lines[-1] == f"writes       {output}, 4 lines, and {output.with_suffix('.summary.json')}"
    write_jsonl(four_rows(), output)
    output.with_suffix(".summary.json").touch()
    assert list(recomputation(output)) == [
        f"reads        {output}: 4 statements, world, baseline",
        f"writes       {output.with_suffix('.summary.json')} (replaces the one there)",
    ]
    lines = list(plan_report(run))
    assert lines[0] == f"reads        {output}: 4 statements, world, baseline"
    assert f"             {run / 'alignment.json'}: not there, which the page says" in lines
    assert lines[-1] == f"writes       {run / 'report.html'}"


def test_what_would_stop_an_evaluation(config: Config, run: Path, cache: Path, tmp_path: Path) -> None:
    def plan(**changes: object) -> Callable[[], list[str]]:
        values = {
            "cache": cache,
            "folder": None,
            "split": "test",
            "conditions": ["world"],
            "output": tmp_path / "r",
            "overrides": {},
        }
        return lambda: list(evaluation([run], *(values | changes).values()))  # type: ignore[arg-type]

    with pytest.raises(
        ValueError,
        match=r"2 of 2 photographs cannot be read:\n  (.*\n)*Mend them, or name another --image_folder$",
    ):
        plan(cache=None, folder=tmp_path)()
    with pytest.raises(ValueError, match="at least two images; leave it out of --conditions"):
        plan(split="dev", conditions=["shuffled"])()
    with pytest.raises(IsADirectoryError, match="is a folder, and a file is wanted"):
        plan(output=tmp_path)()
    (cache / "gemma_vision").rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"has no vision features; score from .* or extract them with: python tools"
    ):
        plan(overrides={"image_folder": None})()
    other = tmp_path / "other"
    extract(replace(config, latent_size=80), other, with_vision=False, allow_missing=False)
    with pytest.raises(StoreMismatch, match="latent_size: cached 80, wanted 64"):
        plan(cache=other)()
    flip(run / "checkpoint-1" / "projection.safetensors")
    with pytest.raises(ValueError, match=r"projection\.safetensors is damaged"):
        plan()()


@pytest.mark.usefixtures("no_weights")
def test_an_alignment_in_numbers(run: Path, cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.png"
    lines = list(alignment(run, cache, "train", 2, output, {}))
    assert lines[2:] == [
        f"reads        2 images of train (6 of 6 statements, 3 of 3 images), from {cache}",
        "measures     16 world tokens of each, untrained and trained",
        f"writes       {output} and {tmp_path / 'a.json'}",
    ]
    with pytest.raises(ValueError, match=r"--num_samples 100, 1 image in dev; .* at least two images"):
        list(alignment(run, cache, "dev", 100, output, {}))
    (cache / "gemma_vision").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="no vision features to compare with"):
        list(alignment(run, cache, "test", 100, output, {}))


def test_a_model_that_is_nowhere_stops_it(config: Config, run: Path, cache: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(Fault, match=r"a local folder without vae/config\.json; give a folder with a model"):
        list(extraction(replace(config, cosmos_model_name=str(empty)), cache, False, False, None))
    with pytest.raises(Fault, match=r"a local folder without config\.json"):
        list(evaluation([run], cache, None, "test", ["world"], tmp_path / "r", {"model_name": str(empty)}))


def test_a_folder_that_is_not_ones_own_stops_it(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").mkdir()
    # Nothing is forbidden to root, as whom tests may run.
    monkeypatch.setattr("theworld.utils.files.os.access", lambda path, mode: path != tmp_path / "theirs")
    with pytest.raises(PermissionError, match=r"--cache .* is not yours to write to; choose another --cache"):
        list(extraction(config, tmp_path / "theirs" / "cache", False, False, None))
