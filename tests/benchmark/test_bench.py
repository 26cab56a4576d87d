"""Stand-ins: as many statements an image as VSR has, files that the project's own loaders read.

The measuring tool, end to end at the smallest shapes; what it finds is no matter here.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from benchmark.models import (
    PER_IMAGE,
    TINY,
    draw_photograph,
    make_gemma_folder,
    make_vae_folder,
    num_world_tokens,
    place_images,
    statement_images,
    with_comment,
    write_photographs,
    write_random_cache,
    write_statements,
)
from benchmark.results import Results, spread
from benchmark.setup import EMBEDDED, QUESTION
from commands import tool

from theworld.config.config import Config
from theworld.data.images import read_image, sha256
from theworld.data.vsr import images_of, load_statements, seen_images
from theworld.extraction.extract import verify
from theworld.models.cosmos import CosmosEncoder
from theworld.models.gemma import Gemma
from theworld.training.data import load_data


def test_the_tool_measures_and_its_last_line_is_json(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    parts = "encode train variants losses evaluate growth_images growth_statements".split()
    arguments = ["--shapes", "tiny", "--output", output, "--folder", tmp_path / "folder", "--device", "cpu"]
    done = tool("bench", *arguments, "--parts", *parts, "--variants", "exact", "--changes", '{"seed": 1}')
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["failed"] == 0
    assert summary["extract_speedup"] > 0
    assert summary["train_speedup"] > 0
    found = json.loads(output.read_text())
    assert found["machine"]["cores"] >= 1
    assert list(found["parts"]) == ["chip", *parts]
    assert found["parts"]["train"]["command"].startswith("python tools/bench.py --shapes tiny")
    assert set(found["parts"]["train"]["rows"]) == {"tokens", "end to end", "ours", "floor", "stages"}
    stages = found["parts"]["train"]["rows"]["stages"]
    assert {"pack_ms", "forward_ms", "backward_ms", "optimizer_ms", "rest_ms"} < set(stages)
    losses = found["parts"]["losses"]["rows"]
    assert list(losses) == ["exact", "exact, two micro-batches"]  # a CPU has no 8-bit products
    assert losses["exact, two micro-batches"]["of_exact"] == pytest.approx(
        1, abs=1e-3
    )  # the same, in float32
    assert "end to end" in done.stdout
    assert not (tmp_path / "folder" / "runs").exists()


@pytest.mark.heavy
def test_the_first_step_is_timed_from_the_start_of_the_tool(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    arguments = ["--shapes", "tiny", "--output", output, "--folder", tmp_path / "folder", "--device", "cpu"]
    done = tool("bench", *arguments, "--parts", "start")
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == 0
    assert list(json.loads(output.read_text())["parts"]) == ["chip", "start"]


def test_an_error_affects_only_its_own_row(tmp_path: Path) -> None:
    results = Results(tmp_path / "a.json", "command")
    results.begin("part")
    with results.attempt("part", "bad"):
        raise FloatingPointError("not a number")
    results.add("part", "good", spread([1.0, 3.0, 2.0]) | {"unit": "images/s"})
    part = json.loads((tmp_path / "a.json").read_text())["parts"]["part"]
    assert part["failed"] == {"bad": "FloatingPointError: not a number"}
    assert part["rows"]["good"] == {"rate": 2.0, "low": 1.0, "high": 3.0, "repeats": 3, "unit": "images/s"}
    assert "bad" in results.table()


def test_the_share_of_the_chip_follows_from_a_measured_one(tmp_path: Path) -> None:
    results = Results(tmp_path / "a.json", "command")
    results.begin("train")
    results.add("train", "floor", {"rate": 160.0, "mfu": 1.0})
    results.add("train", "ours", {"rate": 80.0, "mfu": 0.5})
    results.add("train", "of no known share", {"rate": 80.0})
    shares = [
        results.share("train", name, {"rate": 40.0})
        for name in ("floor", "ours", "of no known share", "none")
    ]
    assert shares == [0.25, 0.25, None, None]


def test_parts_of_a_later_run_are_added(tmp_path: Path) -> None:
    for part in ("one", "two"):
        results = Results(tmp_path / "a.json", "command")
        results.begin(part)
        results.add(part, "row", {"rate": 2.0})
    assert results.ratio("two", "row", "row") == 1.0
    assert list(json.loads((tmp_path / "a.json").read_text())["parts"]) == ["one", "two"]


def test_figures_of_another_machine_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"machine": {"cpu": "another"}, "parts": {}}')
    with pytest.raises(ValueError, match="another machine"):
        Results(tmp_path / "a.json", "command")


def test_the_stand_in_has_the_numbers_of_vsr(tmp_path: Path) -> None:
    write_statements(tmp_path)
    splits = {split: load_statements(tmp_path, split) for split in PER_IMAGE}
    assert {split: len(s) for split, s in splits.items()} == {"train": 7680, "dev": 1097, "test": 2195}
    for split, statements in splits.items():
        counts = Counter(Counter(s.image for s in statements).values())
        assert counts == PER_IMAGE[split]
    assert len(statement_images(tmp_path)) == 6259
    seen = seen_images(splits["test"], splits["train"])
    assert sum(s.image in seen for s in splits["test"]) == 1226


def test_a_share_is_smaller_in_every_split() -> None:
    placed = place_images(0.01)
    assert {split: len(images) for split, images in placed.items()} == {"train": 50, "dev": 10, "test": 18}
    assert len({image for images in placed.values() for image, _ in images}) == 63
    for images in placed.values():
        assert len({image for image, _ in images}) == len(images)


def test_no_two_photographs_are_equal_files(tmp_path: Path) -> None:
    names = [f"{i}.jpg" for i in range(5)]
    write_photographs(tmp_path, names, distinct=2, workers=1, size=(40, 30))
    pixels = [read_image(tmp_path, name) for name in names]
    assert pixels[0].shape == (30, 40, 3)
    assert (pixels[0] == pixels[2]).all()
    assert (pixels[0] != pixels[1]).any()
    assert len({sha256((tmp_path / name).read_bytes()) for name in names}) == 5


def test_a_photograph_is_as_large_as_those_of_coco() -> None:
    jpeg = draw_photograph(0)
    assert 130_000 < len(jpeg) < 190_000
    assert draw_photograph(0) == jpeg
    assert with_comment(jpeg, "ab") == jpeg[:2] + b"\xff\xfe\x00\x04ab" + jpeg[2:]


def test_models_load_as_any_other(tmp_path: Path) -> None:
    make_gemma_folder(tmp_path / "gemma", TINY, EMBEDDED / "gemma", torch.float32, "cpu")
    gemma = Gemma(str(tmp_path / "gemma"))
    assert gemma.num_image_tokens == TINY.image_tokens
    assert gemma.width == 32
    pixels = gemma.pixel_values([read_image_of_noise(tmp_path)])
    assert pixels.shape == (1, 3, 28, 28)
    features = gemma.image_features(gemma.vision_features(pixels))
    assert features.shape == (1, 4, 32)
    assert features.std() > 0.1  # not the zeros that transformers starts with
    make_vae_folder(tmp_path / "vae", TINY)
    latents = CosmosEncoder(str(tmp_path / "vae")).encode(torch.zeros(1, 3, 32, 32))
    assert latents.shape == (1, 16, 4, 4)
    assert torch.isfinite(latents).all()
    assert num_world_tokens(TINY, 2) == 4


def read_image_of_noise(folder: Path) -> object:
    write_photographs(folder, ["noise.jpg"], 1, 1, (64, 48))
    return read_image(folder, "noise.jpg")


def test_a_branch_has_as_many_tokens_as_with_gemmas_own_tokenizer(tmp_path: Path, gemma: Gemma) -> None:
    write_statements(tmp_path, 0.01)
    statements = load_statements(tmp_path, "train")
    lengths = [len(gemma.prompt(QUESTION, s.caption, True).branch) for s in statements]
    assert 40 < sum(lengths) / len(lengths) < 46
    assert len(images_of(statements)) == 50


@pytest.mark.parametrize("share", [0.001, 0.1])
def test_every_share_can_be_scored(share: float) -> None:
    placed = place_images(share)
    assert all(len(images) >= 2 for images in placed.values())


def test_a_random_cache_is_a_finished_one(tmp_path: Path) -> None:
    make_gemma_folder(tmp_path / "gemma", TINY, EMBEDDED / "gemma", torch.float32, "cpu")
    make_vae_folder(tmp_path / "vae", TINY)
    write_statements(tmp_path, 0.001)
    write_photographs(tmp_path / "images", statement_images(tmp_path), 2, 1, (40, 30))
    config = Config(
        model_name=str(tmp_path / "gemma"),
        cosmos_model_name=str(tmp_path / "vae"),
        annotations=str(tmp_path),
        image_folder=str(tmp_path / "images"),
        latent_size=32,
    )
    write_random_cache(config, tmp_path / "cache", torch.float32, torch.device("cpu"))
    assert verify(tmp_path / "cache") == []
    data = load_data(config, tmp_path / "cache")
    assert data.vision is not None
    image = data.train[0].image
    assert data.latents([image]).shape == (1, 16, 4, 4)
    assert 0.8 < data.latents([image]).std() < 1.2
