"""Predicted moments through phases 2 and 3: a cache of them trains, evaluates and is refused like any other."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from commands import tool
from safetensors.torch import load_file
from video2world import Guardrail

from theworld.cli.dry_run import evaluation
from theworld.config.config import Config
from theworld.evaluation.alignment import SAME_PLACE, align, report
from theworld.evaluation.conditions import CONDITIONS
from theworld.evaluation.score import score
from theworld.extraction.extract import extract
from theworld.extraction.features import CachedFeatures
from theworld.hub.card import Facts, model_card
from theworld.models.packing import Control
from theworld.models.serialization import SavedModel
from theworld.models.theworld import TheWorld
from theworld.store.format import LATENTS, StoreMismatch
from theworld.training.data import load_data
from theworld.training.objectives import align_losses, align_microbatch
from theworld.training.trainer import Trainer


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def cache(rolling: Config, shared: Path) -> Path:
    """A finished cache of two moments after each of the three photographs, and of vision features."""
    if not shared.joinpath("cache").exists():
        extract(rolling, shared / "cache", with_vision=True, allow_missing=False, guardrail=Guardrail())
    return shared / "cache"


@pytest.fixture
def checkpoint(rolling: Config, cache: Path, shared: Path) -> Path:
    """Two steps of training from it."""
    config = replace(rolling, max_steps=2, max_world_steps=4, output_dir=str(shared / "run"))
    if not shared.joinpath("run").exists():
        Trainer(config, cache).run()
    return shared / "run" / "checkpoint-2"


def test_it_trains_with_a_vector_for_each_moment(checkpoint: Path, rolling: Config, cache: Path) -> None:
    saved = load_file(checkpoint / "projection.safetensors")
    assert saved["time"].shape == (5, 64)
    assert saved["time"].abs().sum(1).gt(0).tolist() == [True, True, True, False, False]
    world = json.loads((checkpoint / "world.json").read_text())
    assert (world["projection"]["steps"], world["projection"]["max_steps"]) == (2, 4)
    assert world["fingerprint"]["num_world_steps"] == 2
    model = TheWorld.from_pretrained(checkpoint)
    assert model.projection.shape.num_tokens == 3 * 16
    assert all(torch.equal(saved[name], p) for name, p in model.trainable().items())
    assert model.mean_latent.shape == (3, 16, 8, 8)
    lines = (checkpoint.parent / "metrics.jsonl").read_text().splitlines()
    assert "dev_loss" in json.loads(lines[-1])


def test_it_is_evaluated_with_every_control(checkpoint: Path, cache: Path) -> None:
    rows = score(checkpoint, cache, None, "test", CONDITIONS, {})
    assert len(rows) == 4
    p_true = {system: [row["systems"][system]["p_true"] for row in rows] for system in CONDITIONS}
    assert len({tuple(values) for values in p_true.values()}) == len(CONDITIONS)


def test_the_later_moments_reach_the_answer_and_zero_stands_for_all_of_them(
    checkpoint: Path, cache: Path
) -> None:
    model, rows = TheWorld.from_pretrained(checkpoint), CachedFeatures(cache / LATENTS)
    batch = model.packer().pack(load_data(model.config, cache).train[:1], [Control.ZERO])
    assert batch.world_slots.shape == (1, 3 * 16 + 2)
    zero = model.latents(batch, rows)
    assert zero is not None
    assert zero.shape == (1, 3, 16, 8, 8)
    assert zero.amax((0, 1, 3, 4)).tolist() == pytest.approx(model.fingerprint["latents_mean"])
    vision = torch.zeros(1, 16, 64)
    with torch.no_grad():
        own = model(batch, rows(["a.png"]), vision)
        for moment in range(3):
            changed = rows(["a.png"]).clone()
            changed[:, moment] = 0
            assert not torch.equal(model(batch, changed, vision), own)


def test_a_cache_of_other_moments_is_refused(checkpoint: Path, cache: Path, rolling: Config) -> None:
    for changes, message in (
        ({"num_world_steps": 0}, "num_world_steps: cached 2, wanted 0"),
        ({"rollout_seed": 5}, "rollout_seed: cached 0, wanted 5"),
        ({"rollout_prompt": "Other."}, 'rollout_prompt: cached .* wanted "Other'),
    ):
        with pytest.raises(StoreMismatch, match=message):
            load_data(replace(rolling, **changes), cache)  # type: ignore[arg-type]


def test_a_projection_for_photographs_alone_refuses_a_cache_of_moments_and_the_other_way(
    checkpoint: Path, cache: Path, config: Config, tmp_path: Path
) -> None:
    config = replace(config, cosmos_model_name=TheWorld.from_pretrained(checkpoint).config.cosmos_model_name)
    extract(config, tmp_path / "cache", with_vision=True, allow_missing=False)
    alone = Trainer(replace(config, max_steps=2), tmp_path / "cache").run()
    with pytest.raises(StoreMismatch, match="num_world_steps: cached 0, wanted 2"):
        score(checkpoint, tmp_path / "cache", None, "test", ("world",), {})
    with pytest.raises(StoreMismatch, match="num_world_steps: cached 2, wanted 0"):
        score(alone, cache, None, "test", ("world",), {})


def test_what_takes_a_photograph_alone_is_refused_with_the_cure(
    checkpoint: Path, photographs: Path, tmp_path: Path
) -> None:
    model = TheWorld.from_pretrained(checkpoint)
    message, command = (
        r"trained on 2 predicted frames a photograph .* only a cache holds",
        r".*eval\.py --cache FOLDER",
    )
    with pytest.raises(
        ValueError, match=f"{message}; generate needs no cache with enable_world=False, {command}"
    ):
        model.generate(photographs / "a.png", "Where?")
    model.generate(photographs / "a.png", "Where?", enable_world=False, max_new_tokens=1)
    with pytest.raises(
        ValueError, match=f"{message}; photographs alone, --image_folder, are not enough; {command}"
    ):
        score(checkpoint, None, photographs, "test", ("world",), {})
    with pytest.raises(
        ValueError, match=f"{message}; photographs alone, --image_folder, are not enough; {command}"
    ):
        list(evaluation([checkpoint], None, photographs, "test", ("world",), tmp_path / "out.jsonl", {}))


def test_the_start_at_image_tokens_takes_the_photographs_own_tokens_there(
    rolling: Config, cache: Path, tmp_path: Path
) -> None:
    config = replace(rolling, align_steps=2, max_steps=1, output_dir=str(tmp_path / "run"))
    trainer = Trainer(config, cache)
    one = align_microbatch(trainer.model, trainer.data, trainer.data.train[:2])
    assert one.latents is not None
    loss = align_losses(trainer.model, one)["total"]
    later = one.latents.clone()
    later[:, 1:] += 1
    assert torch.equal(align_losses(trainer.model, replace(one, latents=later))["total"], loss)
    with torch.no_grad():
        tokens = trainer.model.projection(one.latents)[:, :16]
        target = trainer.model.gemma.image_features(one.vision)
        wanted = ((tokens - target).pow(2).mean((1, 2)) / target.pow(2).mean((1, 2))).sum()
    torch.testing.assert_close(loss.detach(), wanted)
    trainer.run()
    with pytest.raises(ValueError, match=r"64 world tokens .* and 16 image tokens do not lie on the same"):
        Trainer(replace(config, world_patch=1, output_dir=str(tmp_path / "other")), cache)


def test_alignment_measures_the_photographs_own_tokens_and_says_so(checkpoint: Path, cache: Path) -> None:
    measured, result = align(checkpoint, cache, "train", 3, {})
    assert result["comparison"] == SAME_PLACE
    assert (result["world_tokens"], result["predicted_moments_left_out"]) == (16, 2)
    assert measured["trained"].cosine.shape == (3 * 16,)
    assert "world tokens of 2 predicted frames have no place in the photograph and are left out" in report(
        result
    )


def test_the_model_card_names_the_moments(checkpoint: Path) -> None:
    card = model_card(SavedModel.read(checkpoint), Facts(1, 2, 2, 4, ["train: 6 of 6 statements"]), [])
    assert "and for each of the 2 latent frames that its Video2World model predicts after it." in card
    assert '"rollout_prompt": "The scene goes on as it is. The camera does not move."' in card


def test_a_text_only_gemma_reads_moments_too(
    rolling: Config, cache: Path, text_gemma_folder: Path, tmp_path: Path
) -> None:
    config = replace(
        rolling, model_name=str(text_gemma_folder), max_steps=2, output_dir=str(tmp_path / "run")
    )
    rows = score(Trainer(config, cache).run(), cache, None, "test", ("world", "shuffled"), {})
    assert len(rows) == 4


@pytest.mark.skipif(find_spec("cosmos_guardrail") is not None, reason="cosmos_guardrail is installed here")
def test_the_tool_asks_for_the_guardrail_before_it_does_anything(rolling: Config, tmp_path: Path) -> None:
    done = tool(
        "extract_latents",
        *("--cosmos_model_name", rolling.cosmos_model_name, "--num_world_steps", "2", "--rollout_steps", "2"),
        *("--annotations", str(rolling.annotations), "--image_folder", str(rolling.image_folder)),
        *("--latent_size", "64", "--device", "cpu", "--cache", str(tmp_path / "cache")),
        check=False,
    )
    assert done.returncode == 1
    assert "num_world_steps 2 takes the package cosmos_guardrail" in done.stderr
    assert not (tmp_path / "cache").exists()
