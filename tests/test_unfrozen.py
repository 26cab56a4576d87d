"""Stages: what of Gemma trains beside the projection, what is saved of it, and how it is loaded again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import EMBEDDED_GEMMA
from safetensors.torch import load_file, save_file
from test_model import gradients, latents_of, make_model
from torch import Tensor

from theworld.cache import LivePixels
from theworld.card import model_card
from theworld.checkpoint import CheckpointError
from theworld.config import Config
from theworld.extract import extract
from theworld.gemma import Gemma
from theworld.images import read_image
from theworld.metrics import SYSTEMS
from theworld.model import TheWorld
from theworld.publish import snapshot
from theworld.saved import LANGUAGE, LORA, VISION, read_world
from theworld.score import score
from theworld.train import Trainer
from theworld.unfrozen import load_gemma, parameters_of, prepare_parts, trained_parts
from theworld.vsr import Statement

STAGES = {
    "vision": {"freeze_gemma_vision": False},
    "language": {"freeze_gemma_language": False},
    "lora": {"freeze_gemma_language": False, "lora_rank": 2},
    "all": {"freeze_gemma_vision": False, "freeze_gemma_language": False},
}
FILES = {
    "vision": ["vision"],
    "language": ["language"],
    "lora": ["lora"],
    "all": ["language", "vision"],
}


@pytest.fixture
def cache(config: Config, tmp_path: Path) -> Path:
    """A finished cache with latents and vision features of the three photographs."""
    extract(config, tmp_path / "cache", with_vision=True, allow_missing=False)
    return tmp_path / "cache"


@pytest.fixture
def first(config: Config, cache: Path, tmp_path: Path) -> Path:
    """The last checkpoint of a first stage."""
    return Trainer(replace(config, output_dir=str(tmp_path / "first"), do_eval=False), cache).run()


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    return {k: v for path in sorted(checkpoint.glob("*.safetensors")) for k, v in load_file(path).items()}


def published() -> dict[str, Tensor]:
    return dict(Gemma(str(EMBEDDED_GEMMA)).model.named_parameters())


def test_the_parts_of_gemma_are_all_of_its_weights_each_once(gemma: Gemma, text_gemma_folder: Path) -> None:
    vision, language = parameters_of(gemma, VISION), parameters_of(gemma, LANGUAGE)
    assert {*vision, *language} == {name for name, _ in gemma.model.named_parameters()}
    assert not vision.keys() & language.keys()
    assert not parameters_of(gemma, LORA)
    assert any("multi_modal_projector" in name for name in vision)
    assert sum(p.numel() for p in [*vision.values(), *language.values()]) == sum(
        p.numel() for p in gemma.model.parameters()
    )
    text = Gemma(str(text_gemma_folder))
    assert not parameters_of(text, VISION)
    assert len(parameters_of(text, LANGUAGE)) == len(list(text.model.parameters()))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_what_it_says_and_leaves_every_other_bit(
    stage: str, config: Config, cache: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(config, init_from=str(first), output_dir=str(tmp_path / stage), **STAGES[stage])
    trainer = Trainer(settings, cache)
    before = {name: p.detach().clone() for name, p in trainer.model.gemma.model.named_parameters()}
    trains = set(trainer.model.trainable())
    checkpoint = trainer.run()
    changed = {
        f"gemma.{name}"
        for name, p in trainer.model.gemma.model.named_parameters()
        if not torch.equal(p, before[name])
    }
    assert changed
    assert changed <= trains
    # The embedded tower's class embedding and the like may get no gradient; whole matrices do.
    matrices = {n for n in trains if n.startswith("gemma.") and n.endswith("proj.weight")}
    assert matrices <= changed
    assert {*trains} == {
        *trainer.model.projection.state_dict().keys() - {"latents_mean", "latents_std"},
        *(f"gemma.{n}" for part in trained_parts(settings) for n in parameters_of(trainer.model.gemma, part)),
    }
    assert sorted(p.stem for p in checkpoint.glob("*.safetensors")) == sorted([*FILES[stage], "projection"])
    out = capsys.readouterr().out
    counts = {
        p: sum(t.numel() for t in load_file(checkpoint / f"{p}.safetensors").values()) for p in FILES[stage]
    }
    for count in counts.values():
        assert f", {count:,}" in out
    assert "memory: about " in out


@pytest.mark.parametrize("stage", STAGES)
def test_a_saved_stage_answers_as_the_one_that_was_trained(
    stage: str, config: Config, cache: Path, first: Path, tmp_path: Path
) -> None:
    settings = replace(config, init_from=str(first), output_dir=str(tmp_path / stage), **STAGES[stage])
    trainer = Trainer(settings, cache)
    checkpoint = trainer.run()
    one = trainer.prepare(0)[0]
    loaded = TheWorld.from_pretrained(checkpoint)
    assert not loaded.gemma.trained
    with torch.no_grad():
        wanted = trainer.model(one.batch, one.latents, one.vision)
        # fp32: transformers' decoder and ours add in other orders
        found = loaded(one.batch, one.latents, one.vision)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    plain = TheWorld.from_pretrained(first)
    assert not torch.allclose(
        plain(one.batch, one.latents, trainer_vision(plain, config, one)), wanted, atol=1e-3
    )
    rows = score(checkpoint, cache, None, "test", SYSTEMS, {})
    assert len(rows) == 4


def trainer_vision(model: TheWorld, config: Config, one: object) -> Tensor:
    return LivePixels(model.gemma, str(config.image_folder), 10**8)(one.batch.images)  # type: ignore[attr-defined]


def test_a_language_model_that_trains_has_the_losses_and_gradients_of_the_frozen_one(
    gemma: Gemma, photographs: Path, statements: list[Statement]
) -> None:
    """Before the first step nothing differs: the projection's gradients through transformers' decoder are ours."""
    found = []
    for settings in ({}, STAGES["all"], STAGES["lora"]):
        own = Gemma(gemma.name)
        prepare_parts(own, Config(**settings))
        model = make_model(own, **settings)
        batch = model.packer().pack(statements)
        pixels = own.pixel_values([read_image(photographs, image) for image in batch.images])
        losses = model.losses(batch, latents_of(batch.worlds), pixels, 0.5)
        losses["total"].backward()
        found.append((losses["total"].detach(), gradients(model)))
    for total, own_gradients in found[1:]:
        torch.testing.assert_close(total, found[0][0], atol=1e-4, rtol=1e-5)
        for name, gradient in found[0][1].items():
            torch.testing.assert_close(own_gradients[name], gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(
    stage: str, gemma: Gemma, photographs: Path, statements: list[Statement]
) -> None:
    found, kept = [], []

    def keep(tensor: Tensor) -> Tensor:
        kept[-1] += tensor.numel()
        return tensor

    for checkpointing in (False, True):
        own = Gemma(gemma.name)
        prepare_parts(own, Config(**STAGES[stage]))
        model = make_model(own, use_gradient_checkpointing=checkpointing, **STAGES[stage])
        batch = model.packer().pack(statements)
        pixels = own.pixel_values([read_image(photographs, image) for image in batch.images])
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = model.losses(batch, latents_of(batch.worlds), pixels)["total"]
        total.backward()
        found.append({name: p.grad for name, p in model.trainable().items() if p.grad is not None})
    assert kept[1] < 0.6 * kept[0]
    assert found[0].keys() == found[1].keys()
    assert any(name.startswith("gemma.") for name in found[0])
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], atol=1e-6, rtol=1e-5)


def test_stages_follow_each_other_and_each_checkpoint_stands_for_itself(
    config: Config, cache: Path, first: Path, tmp_path: Path
) -> None:
    second = Trainer(
        replace(config, init_from=str(first), output_dir=str(tmp_path / "2"), **STAGES["vision"]), cache
    ).run()
    third = Trainer(
        replace(config, init_from=str(second), output_dir=str(tmp_path / "3"), **STAGES["lora"]), cache
    ).run()
    assert read_world(third)["parts"] == ["vision", "lora"]
    assert read_world(third)["lora_rank"] == 2
    # The third stage froze the tower that the second trained, and holds it all the same.
    assert (third / "vision.safetensors").read_bytes() == (second / "vision.safetensors").read_bytes()
    for path in (first, second):
        for file in path.iterdir():
            file.unlink()
    model = TheWorld.from_pretrained(third)
    assert model.gemma.changed == ("vision", "lora")
    answers = model.generate(
        Path(str(config.image_folder)) / "a.png", "left of?", max_new_tokens=3, do_sample=False
    )
    assert len(answers) == 1
    # And a fourth one goes on from it, with the same LoRA matrices.
    fourth = Trainer(
        replace(config, init_from=str(third), output_dir=str(tmp_path / "4"), **STAGES["lora"]), cache
    )
    for name, tensor in load_file(third / "lora.safetensors").items():
        assert torch.equal(parameters_of(fourth.model.gemma, LORA)[name], tensor)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_stage_gives_the_same_bits(
    stage: str, config: Config, cache: Path, first: Path, tmp_path: Path
) -> None:
    settings = replace(config, init_from=str(first), **STAGES[stage])
    whole = Trainer(replace(settings, output_dir=str(tmp_path / "whole")), cache).run()
    half = tmp_path / "whole" / "checkpoint-2"
    again = Trainer(replace(settings, output_dir=str(tmp_path / "again"), resume_from=str(half)), cache).run()
    found, wanted = tensors(again), tensors(whole)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


def test_a_vision_tower_that_trains_looks_at_photographs_and_says_so(
    config: Config, cache: Path, first: Path, tmp_path: Path
) -> None:
    settings = replace(config, init_from=str(first), **STAGES["vision"])
    trainer = Trainer(settings, cache)
    assert isinstance(trainer.data.vision, LivePixels)
    assert any("photographs are read" in note for note in trainer.data.notes)
    with pytest.raises(ValueError, match=r"looks at the photographs: .*; give --image_folder"):
        Trainer(replace(settings, image_folder=None), cache)


def test_a_stage_that_cannot_be_is_refused_in_words(
    config: Config, cache: Path, first: Path, tmp_path: Path, text_gemma_folder: Path
) -> None:
    lora = replace(config, init_from=str(first), output_dir=str(tmp_path / "lora"), **STAGES["lora"])
    with_lora = Trainer(lora, cache).run()
    other = replace(lora, init_from=str(with_lora), output_dir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"lora_rank is 4, but the checkpoint .* rank 2"):
        Trainer(replace(other, lora_rank=4), cache)
    with pytest.raises(ValueError, match=r"in two ways, one by LoRA .* go on in the same way"):
        Trainer(replace(other, lora_rank=None), cache)
    resumed = replace(config, resume_from=str(with_lora), output_dir=str(tmp_path / "resumed"))
    with pytest.raises(
        CheckpointError, match=r"trained \['lora'\] of Gemma, now nothing would .*--init_from"
    ):
        Trainer(resumed, cache)
    blind = Config(model_name=str(text_gemma_folder), device="cpu", **STAGES["vision"])
    text = load_gemma(blind)
    with pytest.raises(ValueError, match="text-only: it has no vision tower to train"):
        prepare_parts(text, blind)


def test_a_stage_starts_from_sound_weights_of_the_same_shape_or_not_at_all(
    config: Config, cache: Path, first: Path, tmp_path: Path
) -> None:
    settings = replace(config, init_from=str(first), output_dir=str(tmp_path / "2"), **STAGES["vision"])
    with pytest.raises(ValueError, match=r"projection\.safetensors: .* has shape .*; this model wants"):
        Trainer(replace(settings, projection="linear"), cache)
    second = Trainer(settings, cache).run()
    state = load_file(second / "vision.safetensors")
    removed = sorted(state)[0]
    save_file({k: v for k, v in state.items() if k != removed}, second / "vision.safetensors")
    with pytest.raises(CheckpointError, match=r"vision\.safetensors is damaged"):
        Trainer(replace(settings, init_from=str(second), output_dir=str(tmp_path / "3")), cache)
    (second / "checkpoint.json").unlink()  # as a download has none
    with pytest.raises(ValueError, match=r"vision\.safetensors: .* has shape nothing; this model wants"):
        Trainer(replace(settings, init_from=str(second), output_dir=str(tmp_path / "3")), cache)
    world = json.loads((second / "world.json").read_text())
    world["fingerprint"]["latent_size"] = 32
    (second / "world.json").write_text(json.dumps(world))
    with pytest.raises(ValueError, match="latent_size"):
        Trainer(replace(settings, init_from=str(second), output_dir=str(tmp_path / "3")), cache)


def test_a_card_says_what_of_gemma_is_in_the_repository(
    config: Config, cache: Path, first: Path, tmp_path: Path
) -> None:
    settings = replace(config, init_from=str(first), output_dir=str(tmp_path / "2"), **STAGES["vision"])
    trainer = Trainer(settings, cache)
    second = trainer.run()
    card = model_card(second, trainer.plan.facts, [])
    count = sum(p.numel() for p in parameters_of(trainer.model.gemma, VISION).values())
    assert f"- Trained as well: Gemma's vision tower and its projector, {count:,} parameters." in card
    assert (
        "- Not as Google published it: `vision.safetensors`, a derivative of Gemma under Gemma's terms."
        in card
    )
    assert str(tmp_path) not in card
    files = snapshot(second, card, resumable=False)
    assert sorted(files) == [
        "README.md",
        "config.json",
        "projection.safetensors",
        "vision.safetensors",
        "world.json",
    ]


def test_gemma_has_a_learning_rate_of_its_own(config: Config, cache: Path, first: Path) -> None:
    for settings, share in (
        (STAGES["vision"], 0.1),
        (STAGES["lora"], 1.0),
        ({**STAGES["all"], "gemma_learning_rate": 2e-4}, 0.2),
    ):
        trainer = Trainer(replace(config, init_from=str(first), **settings), cache)
        trainer.train_step()
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        assert rates == pytest.approx([1e-3, 1e-3, 1e-3 * share, 1e-3 * share])
        held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in trainer.model.trainable().values()}
