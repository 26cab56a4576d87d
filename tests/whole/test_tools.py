"""Every tool as a user runs it: a process, its output, its exit status."""

import json
import shutil
from pathlib import Path

import pytest
from commands import tool
from constants import EMBEDDED_GEMMA, EMBEDDED_VAE


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, photographs: Path, annotations: Path) -> Path:
    """A settings file of a tiny run."""
    folder = tmp_path_factory.mktemp("tools")
    path = folder / "tiny.json"
    path.write_text(
        json.dumps(
            {
                "model_name": str(EMBEDDED_GEMMA),
                "cosmos_model_name": str(EMBEDDED_VAE),
                "annotations": str(annotations),
                "image_folder": str(photographs),
                "output_dir": str(folder / "run"),
                "latent_size": 64,
                "world_patch": 2,
                "batch_size": 2,
                "max_steps": 2,
                "device": "cpu",
            }
        )
    )
    return path


def test_the_three_phases_one_after_the_other(settings: Path) -> None:
    cache, run = settings.parent / "cache", settings.parent / "run"
    done = tool("extract_latents", "--config", settings, "--cache", cache, "--gemma_vision")
    assert "latents: 3 of 3 images to encode in 1 of 1 shard," in done.stdout
    assert "GiB free), about " in done.stdout
    assert "images/s" in done.stderr
    assert "bound by" in done.stderr
    assert tool("extract_latents", "--verify", "--cache", cache).stdout == f"{cache}: sound\n"

    done = tool("train", "--config", settings, "--cache", cache)
    assert "trains: projection, 8,512 parameters (3.084%); frozen: Gemma, 267,520 (96.916%)" in done.stdout
    assert f"done: {run / 'checkpoint-2'}" in done.stdout
    assert "statements_per_second=" in done.stderr
    assert sorted(p.name for p in run.iterdir()) == [".lock", "checkpoint-2", "logs", "metrics.jsonl"]
    assert list((run / "logs").glob("events.out.tfevents.*"))

    output = settings.parent / "results.jsonl"
    done = tool("eval", "--model", run, "--cache", cache, "--split", "test", "--output", output)
    for line in ("majority class", "world ", "baseline ", "zero ", "shuffled ", "by category", "by relation"):
        assert line in done.stdout
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert set(rows[0]["systems"]) == {"world", "baseline", "zero", "shuffled", "text"}
    summary = json.loads(output.with_suffix(".summary.json").read_text())
    assert summary["statements"] == 4

    # The figures again, from the records alone, to the letter.
    output.with_suffix(".summary.json").unlink()
    again = tool("eval", "--from", output)
    assert done.stdout.endswith(again.stdout)
    assert json.loads(output.with_suffix(".summary.json").read_text()) == summary

    done = tool("eval", "--model_name", run, "--cache", cache)
    assert f"records: {run / 'evaluation' / 'checkpoint-2-own-data-test.jsonl'}" in done.stdout
    assert tool("report", run).stdout == f"page: {run / 'report.html'}\n"
    assert (run / "report.html").read_text(encoding="utf-8").count("data:image/jpeg") > 0

    photographs = json.loads(settings.read_text())["image_folder"]
    other = settings.parent / "direct.jsonl"
    tool("eval", "--model_name", run / "checkpoint-2", "--image-dir", photographs, "--output", other)
    for a, b in zip(rows, [json.loads(line) for line in other.read_text().splitlines()], strict=True):
        assert a["systems"]["world"]["p_true"] == pytest.approx(b["systems"]["world"]["p_true"], abs=1e-4)


def test_a_dry_run_of_training_says_what_it_would_do_and_writes_nothing(
    settings: Path, tmp_path: Path
) -> None:
    tool("extract_latents", "--config", settings, "--cache", tmp_path / "cache", "--gemma_vision")
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    command = (
        "--config",
        settings,
        "--cache",
        tmp_path / "cache",
        "--output_dir",
        tmp_path / "run",
        "--dry_run",
    )
    lines = tool("train", *command).stdout.splitlines()
    assert lines[0] == "trains: projection, 8,512 parameters (3.084%); frozen: Gemma, 267,520 (96.916%)"
    assert lines[-1] == "dry run: nothing was written"
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == files
    done = tool("train", *command, "--latent_size", "32", check=False)
    assert done.returncode == 1
    assert "latent_size" in done.stderr


def test_a_flipped_bit_is_found_and_named(settings: Path, tmp_path: Path) -> None:
    tool("extract_latents", "--config", settings, "--cache", tmp_path)
    shard = tmp_path / "latents" / "shards" / "00000.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(bytes(content))
    done = tool("extract_latents", "--verify", "--cache", tmp_path, check=False)
    assert done.returncode == 1
    assert "00000.h5" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_photographs_come_from_a_coco_that_is_there(
    kind: str, photographs: Path, annotations: Path, tmp_path: Path
) -> None:
    coco, output = tmp_path / "coco", tmp_path / "images"
    (coco / "train2017").mkdir(parents=True)
    for name in ("a.png", "b.png", "unnamed.png"):
        shutil.copy(photographs / name.replace("unnamed", "c"), coco / "train2017" / name)
    source = coco if kind == "folder" else Path(shutil.make_archive(str(coco), "zip", coco))
    command = ("--output", output, "--annotations", annotations, "--coco", source)

    done = tool("get_images", *command, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"c.png: not in {source}",
        "3 photographs: 0 there before, 2 new, 1 failed",
        f"all reasons: {output / 'failures.jsonl'}; the same command tries those again",
    ]
    assert "images/s" in done.stderr
    assert sorted(path.name for path in output.iterdir()) == ["a.png", "b.png", "failures.jsonl"]

    done = tool("get_images", *command, "--coco", photographs)
    assert done.stdout == "3 photographs: 2 there before, 1 new, 0 failed\n"
    assert sorted(path.name for path in output.iterdir()) == ["a.png", "b.png", "c.png"]
    for name in ("a.png", "b.png", "c.png"):
        assert (output / name).read_bytes() == (photographs / name).read_bytes()


def test_a_host_that_was_not_allowed_is_not_asked(tmp_path: Path) -> None:
    row = {"image": "a.jpg", "image_link": "http://example.org/a.jpg", "caption": "On.", "label": 1}
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row | {"relation": "on"}) + "\n")
    done = tool("get_images", "--output", tmp_path / "images", "--annotations", tmp_path, check=False)
    assert done.returncode == 1
    assert "a.jpg: refused: example.org is not an allowed host (images.cocodataset.org)" in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "status", "message"),
    [
        ("extract_latents", ["--cache", "nowhere"], 1, "image_folder is not set: give --image_folder"),
        ("extract_latents", ["--verify", "--cache", "nowhere"], 2, "nowhere: no store in it"),
        (
            "extract_latents",
            ["--audit", "3", "--part", "1/2"],
            2,
            "--part and --dry_run are for extracting; --audit reads all",
        ),
        ("extract_latents", ["--audit", "3", "--verify"], 2, "not allowed with argument"),
        (
            "extract_latents",
            ["--latent_sise", "64"],
            2,
            "unknown flag --latent_sise; did you mean --latent_size?",
        ),
        ("extract_latents", ["--part", "9/8"], 2, "--part: '9/8' is not I/N with I from 1 to N, such as 3/8"),
        ("train", ["--cache", "nowhere"], 1, "nowhere"),
        ("train", ["--learning_rate", "fast"], 2, "'fast' is not a finite number"),
        ("train", ["--no-freeze_cosmos_vae"], 1, "a cache cannot follow a VAE that trains"),
        ("train", ["--push_to_hub"], 1, "hub_model_id is null; allowed: user/name, as push_to_hub is true"),
        ("train", ["--config", "nowhere.json"], 1, "nowhere.json"),
        ("get_images", ["--annotations", "nowhere"], 1, "annotations: no file or folder nowhere"),
        ("get_images", ["--num_workers", "0"], 2, "--num_workers is 0; give 1 or more"),
        ("get_benchmark", ["whatsup"], 2, "NAME: invalid choice: 'whatsup' (choose from 'whatsup_a', "),
        (
            "get_benchmark",
            ["whatsup_a", "--source", "nowhere"],
            1,
            "nowhere: has no file data/Controlled_Images_A-",
        ),
        (
            "study",
            ["--benchmarks", "nowhere"],
            1,
            "--benchmarks nowhere: wanted a folder of tools/get_benchmark.py",
        ),
        ("eval", ["--model_name", "nowhere", "--cache", "c"], 1, "nowhere: neither a checkpoint"),
        (
            "eval",
            ["--model_name", "nowhere"],
            2,
            "give --model with --cache or --image_folder, or give --from",
        ),
        ("eval", ["--cache", "c"], 2, "give --model with --cache or --image_folder, or give --from"),
        (
            "eval",
            ["--from", "r.jsonl", "--output", "o.jsonl"],
            2,
            "--from needs no --model, --cache, --image_folder or --output",
        ),
        ("eval", ["--from", "r.jsonl", "--cache", "c"], 2, "--from needs no --model, --cache"),
        ("eval", ["--model", "m", "--cache", "c", "--split", "tests"], 2, "did you mean test?"),
        ("eval", ["--model", "m", "--cach", "c"], 2, "unknown flag --cach; did you mean --cache?"),
        ("eval", ["--from", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        ("report", ["nowhere"], 1, "nowhere: no such folder; name a run such as checkpoints/vsr"),
    ],
)
def test_wrong_usage_is_answered_in_words(name: str, arguments: list[str], status: int, message: str) -> None:
    done = tool(name, *arguments, check=False)
    assert done.returncode == status
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if status == 2 and "--verify" not in arguments[:1]:
        assert done.stderr.startswith(f"{name}.py: error: ")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["get_images", "get_benchmark", "extract_latents", "train", "eval", "report", "demo"]
)
def test_help_shows_every_flag_with_its_default(name: str) -> None:
    text = tool(name, "--help", fresh=True).stdout
    assert "default" in text
    if name == "train":
        assert "--learning_rate" in text
        assert "per optimizer step. (default: 0.0001)" in " ".join(text.split())
