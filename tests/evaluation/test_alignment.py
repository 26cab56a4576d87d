"""Alignment: measurements by hand, the sample, and the tool."""

import json
import math
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import in_this_process
from conftest import tiny_run
from constants import ROOT
from PIL import Image
from serving_models import save_model

from theworld.config.config import Config
from theworld.data.images import read_image
from theworld.evaluation.alignment import (
    CAUTION,
    KEPT,
    NEAREST_IMAGE,
    NEAREST_TEXT,
    SAME_PLACE,
    Measured,
    Sample,
    Tokens,
    align,
    compare,
    comparison,
    draw,
    figures,
    load_sample,
    measure,
    project,
    report,
)
from theworld.extraction.extract import extract
from theworld.models.gemma import Gemma
from theworld.models.projection import ProjectionShape
from theworld.models.theworld import TheWorld
from theworld.store.format import VISION, StoreMismatch
from theworld.training.trainer import Trainer

KEYS = ["checkpoint", "split", "images", "world_tokens", "image_tokens", "comparison", "untrained", "trained"]
FIGURES = ["cosine", "control_cosine", "distance", "norm", "norm_ratio", "mean_vector_cosine"]


@pytest.fixture(scope="module")
def cache(session_cache: Path) -> Path:
    """A finished cache with latents and vision features of the three photographs. Nobody writes to it."""
    return session_cache


@pytest.fixture(scope="module")
def checkpoint(
    cache: Path, photographs: Path, annotations: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The checkpoint of a run of four steps on it."""
    return Trainer(tiny_run(tmp_path_factory.mktemp("run"), photographs, annotations), cache).run()


# ---- numbers


def test_tokens_of_the_same_place_are_compared_pairwise() -> None:
    world = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    cosine, distance = compare(world, torch.tensor([[4.0, 3.0], [0.0, -1.0]]), SAME_PLACE)
    assert cosine.tolist() == pytest.approx([24 / 25, -1])
    assert distance.tolist() == pytest.approx([math.sqrt(2), 3])


@pytest.mark.parametrize("kind", [NEAREST_IMAGE, NEAREST_TEXT])
def test_the_nearest_token_has_the_highest_cosine_not_the_smallest_distance(kind: str) -> None:
    world = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    target = torch.tensor([[0.0, 1.0], [1.0, 1.0], [5.0, 0.0]])
    cosine, distance = compare(world, target, kind)
    assert cosine.tolist() == pytest.approx([1, 1])
    assert distance.tolist() == pytest.approx([4, 1])


def test_the_control_is_the_same_place_in_the_image_before() -> None:
    # 3 images, 2 tokens each
    image = torch.tensor([[[1.0, 0], [0, 1]], [[0, 1], [0, 1]], [[-1, 0], [0, -1]]])
    world = torch.tensor([[1.0, 0], [0, 1]]).expand(3, 2, 2)
    sample = Sample(["a", "b", "c"], torch.zeros(3), image, torch.eye(2), [torch.eye(2)] * 3)
    measured = measure(world, sample, SAME_PLACE)
    assert measured.cosine.tolist() == [1, 1, 0, 1, -1, -1]
    assert measured.control.tolist() == [-1, -1, 1, 1, 0, 1]  # with images c, a, b
    assert measured.distance.tolist() == pytest.approx([0, 0, math.sqrt(2), 0, 2, 2])
    assert {kind: len(v) for kind, v in measured.vectors.items()} == {"world": 6, "image": 6, "text": 2}


def test_text_tokens_are_those_of_the_images_own_statements() -> None:
    text_of = [torch.tensor([[2.0, 0]]), torch.tensor([[0, 1.0], [3.0, 0]])]
    sample = Sample(["a", "b"], torch.zeros(2), None, torch.eye(2), text_of)
    measured = measure(torch.tensor([[[0.0, 1]], [[0, 1.0]]]), sample, NEAREST_TEXT)
    assert (measured.cosine.tolist(), measured.control.tolist()) == ([0, 1], [1, 0])
    assert list(measured.vectors) == ["world", "text"]


def test_figures_by_hand() -> None:
    vectors = {
        "world": torch.tensor([[3.0, 4.0], [0.0, 1.0]]),  # norms 5 and 1, mean (1.5, 2.5)
        "image": torch.tensor([[0.0, 6.0]]),
        "text": torch.tensor([[2.0, 0.0]]),
    }
    control, distance = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 3.0])
    kinds = {kind: Tokens().add(tokens, most=9) for kind, tokens in vectors.items()}
    result = figures(Measured(torch.tensor([0.0, 1.0]), control, distance, kinds))
    assert list(result) == FIGURES
    quantiles = {"0.05": 0.05, "0.25": 0.25, "0.5": 0.5, "0.75": 0.75, "0.95": 0.95}
    assert result["cosine"] == {"n": 2, "mean": 0.5, "quantiles": pytest.approx(quantiles)}
    assert result["control_cosine"]["mean"] == 0.5
    assert (result["distance"]["n"], result["distance"]["mean"]) == (2, 2)
    assert {k: (v["n"], v["mean"]) for k, v in result["norm"].items()} == {
        "world": (2, 3),
        "image": (1, 6),
        "text": (1, 2),
    }
    assert result["norm_ratio"] == {"world_image": 0.5, "world_text": 1.5}
    length = math.hypot(1.5, 2.5)
    assert result["mean_vector_cosine"] == {
        "world_image": {"n": [2, 1], "cosine": pytest.approx(2.5 / length)},
        "world_text": {"n": [2, 1], "cosine": pytest.approx(1.5 / length)},
        "image_text": {"n": [1, 1], "cosine": 0},
    }


def test_norms_and_mean_are_of_all_tokens_and_a_fixed_sample_is_kept() -> None:
    torch.manual_seed(0)
    every = [torch.randn(700, 3) for _ in range(4)]
    tokens, again = Tokens(), Tokens()
    for one in every:
        tokens.add(one, most=5)
        again.add(one, most=5)
    assert torch.equal(tokens.norms, torch.cat(every).norm(dim=-1))
    torch.testing.assert_close(tokens.mean, torch.cat(every).double().mean(0))
    assert tokens.some.shape == (20, 3)
    assert torch.equal(tokens.some, again.some)
    rows = {tuple(row) for row in torch.cat(every).tolist()}
    assert {tuple(row) for row in tokens.some.tolist()} <= rows
    assert len(tokens.some.unique(dim=0)) == 20


def test_the_number_of_kept_tokens_does_not_grow_with_the_images() -> None:
    """Of 64 images with 1,000 tokens each as many tokens stay in memory as of two."""
    held = []
    for count in (2, 64):
        image = [torch.ones(4, 2)] * count
        names = [str(i) for i in range(count)]
        sample = Sample(names, torch.zeros(count), image, torch.eye(2), [torch.eye(2)] * count)
        measured = measure((torch.ones(1000, 2) for _ in range(count)), sample, NEAREST_IMAGE)
        assert len(measured.cosine) == len(measured.kinds["world"].norms) == 1000 * count
        held.append(len(measured.vectors["world"]))
    assert held[0] == KEPT
    assert KEPT <= held[1] < KEPT + 64


def test_only_as_many_patches_as_image_tokens_lie_at_the_same_places() -> None:
    shape = ProjectionShape((16, 8, 8), 64, patch=2)  # 16 tokens
    assert comparison(shape, 16) == SAME_PLACE
    assert comparison(shape, 256) == NEAREST_IMAGE
    assert comparison(replace(shape, mode="channel"), 16) == NEAREST_IMAGE  # 16 channels, which have no place
    assert comparison(shape, 0) == NEAREST_TEXT


# ---- the sample


def test_align_measures_the_projections_and_tokens_of_the_run(
    cache: Path, config: Config, gemma: Gemma
) -> None:
    trainer = Trainer(config, cache)
    start = {name: p.detach().clone() for name, p in trainer.model.trainable().items()}
    checkpoint = trainer.run()
    torch.manual_seed(5)  # whatever was drawn before
    measured, result = align(checkpoint, cache, "train", 100, {})
    model = TheWorld.from_pretrained(checkpoint, gemma)
    sample = load_sample(model, cache, "train", 100)
    assert sorted(sample.images) == ["a.png", "b.png", "c.png"]

    def world() -> torch.Tensor:
        return torch.cat(list(project(model.projection, sample.latents)))

    assert torch.equal(measured["trained"].vectors["world"], world())
    with torch.no_grad():
        for name, parameter in model.trainable().items():
            parameter.copy_(start[name])
    assert torch.equal(measured["untrained"].vectors["world"], world())

    pixels = [read_image(Path(str(config.image_folder)), image) for image in sample.images]
    seen = gemma.image_features(gemma.vision_features(gemma.pixel_values(pixels)))
    for (
        one
    ) in measured.values():  # cached in another order, so in other batches: sums differ in the last bits
        torch.testing.assert_close(one.vectors["image"], seen.flatten(0, 1), atol=1e-4, rtol=1e-4)
    ids = gemma.tokenizer.encode("The dog is at the right side of the bicycle.", add_special_tokens=False)
    words = sample.text_of[sample.images.index("b.png")]
    assert torch.equal(words, gemma.embed(torch.tensor(sorted(set(ids)))))
    assert len(sample.text) == len(sample.text.unique(dim=0))  # each token once
    assert (result["images"], result["comparison"]) == (3, SAME_PLACE)


def test_photographs_alone_give_the_figures_of_a_cache(cache: Path, checkpoint: Path, tmp_path: Path) -> None:
    _, wanted = align(checkpoint, cache, "train", 2, {})
    _, found = align(checkpoint, None, "train", 2, {})
    for name in ("untrained", "trained"):
        for key in FIGURES[:3]:
            assert found[name][key]["mean"] == pytest.approx(wanted[name][key]["mean"], abs=1e-4)
    with pytest.raises(ValueError, match="neither a cache nor photographs: give --cache, or --image_folder"):
        align(checkpoint, None, "train", 2, {"image_folder": None})
    with pytest.raises(ValueError, match=r"image_folder .*nowhere: not a folder; give --cache, or"):
        align(checkpoint, None, "train", 2, {"image_folder": str(tmp_path / "nowhere")})


def test_fewer_samples_are_some_of_the_split(cache: Path, checkpoint: Path, gemma: Gemma) -> None:
    model = TheWorld.from_pretrained(checkpoint, gemma)
    every = load_sample(model, cache, "train", 3)
    some = load_sample(model, cache, "train", 2)
    assert some.images == every.images[:2]
    assert some.latents.shape == (2, 16, 8, 8)
    assert some.image is not None
    assert [tokens.shape for tokens in some.image] == [(16, 64), (16, 64)]


def test_without_equal_grids_world_tokens_are_compared_with_the_nearest(cache: Path, config: Config) -> None:
    checkpoint = Trainer(replace(config, world_patch=4, max_steps=1), cache).run()
    _, result = align(checkpoint, cache, "test", 100, {})
    assert (result["world_tokens"], result["image_tokens"], result["comparison"]) == (4, 16, NEAREST_IMAGE)
    assert result["trained"]["cosine"]["n"] == 2 * 4
    assert "do not lie at the same places" in report(result)


def test_a_text_only_gemma_is_measured_against_text_alone(
    cache: Path, config: Config, text_gemma_folder: Path
) -> None:
    config = replace(config, model_name=str(text_gemma_folder), max_steps=1)
    _, result = align(Trainer(config, cache).run(), cache, "test", 100, {})
    assert (result["image_tokens"], result["comparison"]) == (0, NEAREST_TEXT)
    assert list(result["trained"]["norm"]) == ["world", "text"]
    assert list(result["trained"]["norm_ratio"]) == ["world_text"]
    assert list(result["trained"]["mean_vector_cosine"]) == ["world_text"]
    assert "rule of thumb" not in report(result)  # it is about image tokens


def test_too_few_images_and_a_cache_of_other_settings_are_refused(
    cache: Path, checkpoint: Path, config: Config, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"--num_samples 100, 1 image in dev; .* at least two images"):
        align(checkpoint, cache, "dev", 100, {})
    with pytest.raises(ValueError, match=r"--num_samples -3, 2 images in test"):
        align(checkpoint, cache, "test", -3, {})
    other = tmp_path / "other"
    extract(replace(config, latent_size=80), other, with_vision=False, allow_missing=False)
    with pytest.raises(StoreMismatch, match="latent_size: cached 80, wanted 64"):
        align(checkpoint, other, "test", 100, {})
    shutil.copytree(cache, tmp_path / "cache", ignore=shutil.ignore_patterns(VISION))
    with pytest.raises(ValueError, match=r"no vision features to compare with; .* --gemma_vision"):
        align(checkpoint, tmp_path / "cache", "test", 100, {})


@pytest.mark.parametrize(("mean", "word"), [(0.51, "good"), (0.4, "in between"), (0.29, "poor")])
def test_the_rule_of_thumb_stands_beside_the_control_and_the_caution(mean: float, word: str) -> None:
    def some(cosine: float) -> dict[str, Any]:
        values = {kind: Tokens().add(torch.ones(2, 2), 2) for kind in ("world", "image", "text")}
        return figures(Measured(torch.full((2,), cosine), torch.full((2,), 0.25), torch.ones(2), values))

    result = dict(zip(KEYS, ["c", "test", 2, 1, 1, SAME_PLACE, some(0), some(mean)], strict=True))
    text = report(result)
    assert (
        f"mean cosine {mean:.2f}, {mean - 0.25:+.2f} against the control. By a rule of thumb: {word} " in text
    )
    assert text.endswith(CAUTION)


# ---- the tool


def test_the_tool_draws_a_picture_and_writes_its_figures(
    cache: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, output = checkpoint.parent, tmp_path / "new" / "alignment.png"
    given = ["--model_name", run, "--cache", cache, "--num_samples", "2", "--output", output]
    status, out, _ = in_this_process("visualize_alignment", given, monkeypatch, capsys)
    assert status == 0
    assert "2 images of test: 16 world tokens each, 16 image tokens" in out
    assert CAUTION in out
    result = json.loads(output.with_suffix(".json").read_text())
    assert list(result) == KEYS
    assert result["checkpoint"] == str(run / "checkpoint-4")
    for name in ("untrained", "trained"):
        assert list(result[name]) == FIGURES
        assert list(result[name]["norm"]) == ["world", "image", "text"]
        assert result[name]["cosine"]["n"] == result[name]["control_cosine"]["n"] == 2 * 16
    assert result["untrained"]["cosine"] != result["trained"]["cosine"]
    assert sorted(p.name for p in output.parent.iterdir()) == ["alignment.json", "alignment.png"]
    with Image.open(output) as image:
        assert image.size == (2160, 1080)
        # All eight panels have something in them.
        for row in range(2):
            for column in range(4):
                panel = image.crop((540 * column + 60, 540 * row + 80, 540 * column + 520, 540 * row + 480))
                assert len(set(panel.convert("RGB").get_flattened_data())) > 5


def test_the_command_of_the_original_recipe_needs_no_cache(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = save_model(tmp_path / "model", config), Path("visualizations/x.png")
    (tmp_path / "cache").mkdir()  # an empty one is none
    monkeypatch.chdir(tmp_path)
    words = f"--model {model} --dataset vsr --num_samples 100 --output {output}".split()
    for dry_run in (["--dry_run"], []):
        monkeypatch.setattr(sys, "argv", ["visualize_alignment.py", *words, *dry_run])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools" / "visualize_alignment.py"), run_name="__main__")
        assert ended.value.code == 0, capsys.readouterr().err
        assert output.is_file() != bool(dry_run)
    lines = capsys.readouterr().out.splitlines()
    assert f"reads        2 photographs in {config.image_folder}" in lines
    assert f"test: photographs in {config.image_folder}" in lines
    assert "2 images of test: 16 world tokens each, 16 image tokens" in lines


def test_drawing_is_deterministic(cache: Path, checkpoint: Path, tmp_path: Path) -> None:
    measured, result = align(checkpoint, cache, "test", 2, {})
    for name in "ab":
        draw(measured, result, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_few_tokens_and_no_image_tokens_can_be_drawn(
    cache: Path, config: Config, text_gemma_folder: Path, tmp_path: Path
) -> None:
    config = replace(config, model_name=str(text_gemma_folder), world_patch=8, max_steps=1)
    measured, result = align(Trainer(config, cache).run(), cache, "test", 2, {})
    assert len(measured["trained"].vectors["world"]) == 2
    draw(measured, result, tmp_path / "few.png")
    with Image.open(tmp_path / "few.png") as image:
        assert image.size == (2160, 1080)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--model", "nowhere", "--cache", "c"], 1, "nowhere: neither a checkpoint"),
        (["--cache", "c"], 2, "the following arguments are required: --model"),
        (
            ["--model_name", "m", "--cache", "c", "--output", "a.json"],
            2,
            "--output a.json: wanted a .png file",
        ),
        (
            "--model nowhere --dataset vsr --num_samples 100 --output visualizations/x.png".split(),
            1,
            "nowhere: neither a checkpoint",
        ),
        (["--help"], 0, "Number of images whose tokens are compared. (default: 100)"),
    ],
)
def test_the_tool_answers_wrong_usage_with_one_line(
    arguments: list[str],
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ended, out, err = in_this_process("visualize_alignment", arguments, monkeypatch, capsys)
    assert ended == status
    assert message in " ".join((out + err).split())
    assert "Traceback" not in err
