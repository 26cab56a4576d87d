"""The three phases together, on the embedded models: what a user's run rests on."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from constants import EMBEDDED_VAE, ROOT
from safetensors.torch import load_file
from transformers import Gemma3ForConditionalGeneration

from theworld.config.config import Config, save_config
from theworld.data.images import read_image
from theworld.data.square import square, to_unit_range
from theworld.evaluation.conditions import CONDITIONS
from theworld.evaluation.metrics import summarise
from theworld.evaluation.score import score
from theworld.extraction.extract import extract, verify
from theworld.extraction.features import CachedFeatures, OnTheFlyLatents, OnTheFlyVision
from theworld.models.cosmos import CosmosLatents, load_vae
from theworld.models.gemma import Gemma
from theworld.models.serialization import CheckpointError, list_checkpoints
from theworld.store.format import LATENTS, VISION, StoreMismatch
from theworld.training.memory import NotFinite, Plan
from theworld.training.trainer import Trainer
from theworld.utils.files import StoreError


def weights(checkpoint: Path) -> bytes:
    return (checkpoint / "projection.safetensors").read_bytes()


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "statements_per_second"} for line in lines]


def test_extraction_writes_exactly_these_files_and_they_verify(cache: Path) -> None:
    files = sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file())
    own = ["images.jsonl", "manifest.json", "shards/00000.h5", "shards/00000.json", "shards/00001.h5"]
    own += ["shards/00001.json", "store.json"]
    assert files == [f"{store}/{name}" for store in ("gemma_vision", "latents") for name in own]
    assert verify(cache) == []


def test_cached_latents_equal_diffusers_own_encoding(cache: Path, config: Config) -> None:
    vae = load_vae(str(EMBEDDED_VAE))
    rows = CachedFeatures(cache / LATENTS)
    for image in ("a.png", "b.png", "c.png"):
        pixels = to_unit_range(square(read_image(Path(str(config.image_folder)), image), 64))
        assert pixels.min() >= -1
        assert pixels.max() <= 1
        with torch.no_grad():
            wanted = vae.encode(torch.from_numpy(pixels)[None, :, None]).latent_dist.mode()[0, :, 0]
        torch.testing.assert_close(rows([image])[0], wanted, atol=1e-5, rtol=1e-5)


def test_a_second_run_of_extraction_changes_no_byte(cache: Path, config: Config) -> None:
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in cache.rglob("*") if p.is_file()}
    extract(config, cache, with_vision=True, allow_missing=False)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in cache.rglob("*") if p.is_file()} == before


@pytest.mark.usefixtures("log_shown")
def test_extraction_resumes_to_the_same_bytes(
    cache: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in cache.rglob("*") if p.is_file()}
    for name in ("manifest.json", "shards/00001.json", "shards/00001.h5"):
        (cache / LATENTS / name).unlink()
    extract(config, cache, with_vision=True, allow_missing=False)
    assert {p: p.read_bytes() for p in cache.rglob("*") if p.is_file()} == before
    assert "resuming: 1 of 2 shards valid" in capsys.readouterr().out


def test_unreadable_photographs_are_all_named_before_anything_is_encoded(
    config: Config, tmp_path: Path
) -> None:
    folder = tmp_path / "photographs"
    shutil.copytree(str(config.image_folder), folder)
    (folder / "a.png").unlink()
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:500])
    config, cache = replace(config, image_folder=str(folder)), tmp_path / "cache"
    with pytest.raises(ValueError, match=r"2 of 3 photographs cannot be read:\n  a\.png: .*\n  b\.png: "):
        extract(config, cache, with_vision=False, allow_missing=False)
    rows = [json.loads(line) for line in (cache / "failures.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == ["a.png", "b.png"]
    assert all(row["reason"] for row in rows)
    assert not (cache / LATENTS).exists()


def test_a_damaged_image_list_is_named(cache: Path, config: Config) -> None:
    path = cache / LATENTS / "images.jsonl"
    sound = path.read_bytes()
    path.write_text("{")
    with pytest.raises(StoreError, match=r"latents/images\.jsonl is damaged: "):
        Trainer(config, cache)
    extract(config, cache, with_vision=False, allow_missing=False)
    assert path.read_bytes() == sound


def test_allow_missing_goes_on_and_every_later_step_says_so(
    config: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "photographs"
    shutil.copytree(str(config.image_folder), folder)
    (folder / "b.png").unlink()
    config, cache = replace(config, image_folder=str(folder)), tmp_path / "cache"
    caplog.set_level("INFO", "theworld")
    extract(config, cache, with_vision=True, allow_missing=True)
    assert "2 of 3 photographs; 1 left out by --allow_missing" in caplog.text
    checkpoint = Trainer(config, cache).run()
    note = "5 of 6 statements, 2 of 3 images (1 left out by --allow_missing)"
    assert f"train: {note}" in caplog.text
    score(checkpoint, cache, None, "train", ["baseline"], {})
    assert f"scoring {note}" in caplog.text
    # Missing without having been left out is another matter.
    (cache / "failures.jsonl").unlink()
    with pytest.raises(
        StoreError, match=r"1 of 3 images .* such as b\.png; name other .*: python tools/extract_latents\.py"
    ):
        Trainer(replace(config, output_dir=str(tmp_path / "other")), cache)


@pytest.mark.parametrize(
    ("setting", "value", "field"),
    [
        ("latent_size", 80, "latent_size: cached 64, wanted 80"),
        ("cosmos_model_name", "a/b", "cosmos_model_name"),
    ],
)
def test_a_cache_of_other_settings_is_refused_before_any_model_loads(
    cache: Path, config: Config, setting: str, value: object, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("theworld.training.data.Gemma", None)
    with pytest.raises(StoreMismatch, match=field):
        Trainer(replace(config, **{setting: value}), cache)


def test_features_of_another_vision_tower_are_refused(cache: Path, config: Config, tmp_path: Path) -> None:
    model = Gemma3ForConditionalGeneration.from_pretrained(config.model_name)
    other = tmp_path / "gemma"  # the same name, other weights
    shutil.copytree(config.model_name, other)
    next(model.model.vision_tower.parameters()).data.add_(1.0)
    model.save_pretrained(other)
    with pytest.raises(StoreMismatch, match="vision_weights_sha256"):
        Trainer(replace(config, model_name=str(other)), cache)


def stopped_and_resumed(config: Config, cache: Path, step: int) -> Trainer:
    """What goes on from the checkpoint of a run after `step` steps."""
    trainer = Trainer(config, cache)
    while trainer.step < step:
        trainer.train_step()
    return Trainer(replace(config, resume_from=str(trainer.save())), cache)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(cache: Path, config: Config, tmp_path: Path) -> None:
    config = replace(
        config, align_steps=3, statement_loss_weight=0.3, max_steps=5, save_steps=1, save_total_limit=None
    )
    whole = Trainer(config, cache).run()
    assert whole.name == "checkpoint-8"
    for stop in (2, 3, 5):  # inside the start at the image tokens, at its end, in the main phase
        resumed = stopped_and_resumed(
            replace(config, output_dir=str(tmp_path / f"stopped-{stop}")), cache, stop
        )
        assert resumed.step == stop
        last = resumed.run()
        assert weights(last) == weights(whole)
        assert torch.equal(
            torch.load(last / "trainer.pt", weights_only=True)["optimizer"]["state"][0]["exp_avg_sq"],
            torch.load(whole / "trainer.pt", weights_only=True)["optimizer"]["state"][0]["exp_avg_sq"],
        )
        tail = [line for line in metrics(whole.parent) if line["step"] > stop + 1]
        assert [line for line in metrics(last.parent) if line["step"] > stop + 1] == tail


@pytest.mark.parametrize("words", [{}, {"relation_loss_weight": 0.7}])
def test_a_run_with_words_first_is_resumed_bitwise(
    cache: Path, config: Config, tmp_path: Path, words: dict[str, float]
) -> None:
    config = replace(
        config,
        align_steps=1,
        statement_steps=2,
        max_steps=13,
        save_steps=1,
        num_epochs=99,
        eval_steps=3,
        **words,
    )  # type: ignore[arg-type]
    config = replace(config, save_total_limit=None, projection="transformer")
    whole = Trainer(config, cache).run()
    assert whole.name == "checkpoint-16"
    lines = [line for line in metrics(whole.parent) if "loss" in line]
    assert [line["phase"] for line in lines] == ["align", "words", "words", *["train"] * 13]
    has = {
        name: [n for n, line in enumerate(lines) if name in line]
        for name in ("statement_loss", "relation_loss")
    }
    assert has["relation_loss"] == (list(range(1, 16)) if words else [])
    assert has["statement_loss"] == ([] if words else [1, 2])
    # On dev, too, what the phase asks for.
    of_dev = [line for line in metrics(whole.parent) if "dev_loss" in line]
    assert [line["step"] for line in of_dev] == [3, 6, 9, 12, 15, 16]
    of_words = [{"dev_relation_loss", "dev_statement_loss"} & line.keys() for line in of_dev]
    assert of_words == ([{"dev_relation_loss"}] * 6 if words else [{"dev_statement_loss"}, *[set()] * 5])
    # The first window of ten steps of the main phase, in which four of six statements are true again and again.
    (watched,) = [line for line in metrics(whole.parent) if "watch_mean" in line]
    assert (watched["step"], watched["watch_steps"]) == (13, 10)
    assert watched["watch_mean"] == pytest.approx(np.mean([line["loss"] for line in lines[3:13]]))
    for stop in (2, 3, 8):  # among the words, at their end, and within the watch's window
        resumed = stopped_and_resumed(
            replace(config, output_dir=str(tmp_path / f"stopped-{stop}")), cache, stop
        )
        last = resumed.run()
        assert weights(last) == weights(whole)
        tail = [line for line in metrics(whole.parent) if line["step"] > stop + 1]
        assert [line for line in metrics(last.parent) if line["step"] > stop + 1] == tail


def test_words_alone_do_not_look_at_the_label(cache: Path, config: Config, tmp_path: Path) -> None:
    config = replace(config, statement_steps=2, max_steps=1)
    first = Trainer(config, cache)
    other = Trainer(replace(config, output_dir=str(tmp_path / "other")), cache)
    other.model.gemma.answer_ids = first.model.gemma.answer_ids[::-1]  # every label is the other one
    for trainer in (first, other):
        for _ in range(2):
            trainer.train_step()
    pairs = zip(first.model.trainable().values(), other.model.trainable().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    first.train_step()
    other.train_step()
    pairs = zip(first.model.trainable().values(), other.model.trainable().values(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_a_run_on_captions_is_resumed_bitwise_and_not_on_others(
    cache: Path, config: Config, tmp_path: Path
) -> None:
    rows = [
        {"image": f"{name}.png", "caption": f"A {name} {thing}{' on a table' * 20}."}
        for name in "ab"
        for thing in ("cat", "dog")
    ]
    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(config, captions=str(path), statement_loss_weight=0.5, statement_steps=2, save_steps=1)
    config = replace(config, save_total_limit=None)
    trainer = Trainer(config, cache)
    assert "captions: 4 for 2 of 3 training photographs" in trainer.plan.lines
    read = [one.batch for step in range(6) for one in trainer.microbatches(step)]
    assert all(batch is not None and len(batch.words) > 0 for batch in read if "a.png" in batch.images)
    plain = replace(config, captions=None, output_dir=str(tmp_path / "statements"))
    first = Plan(replace(config, statement_loss_weight=0.0), cache)  # captions in the phase of words alone
    assert first.memory.activations == trainer.plan.memory.activations > Plan(plain, cache).memory.activations
    whole = trainer.run()
    # other texts than the captions
    assert not any("dev_statement_loss" in line for line in metrics(whole.parent))
    other = Trainer(plain, cache).run()
    assert weights(other) != weights(whole)
    again = replace(
        config, resume_from=str(whole.with_name("checkpoint-3")), output_dir=str(tmp_path / "again")
    )
    assert weights(Trainer(again, cache).run()) == weights(whole)
    path.write_text(path.read_text().replace("cat", "cow"))
    again = replace(again, output_dir=str(tmp_path / "never"))
    with pytest.raises(CheckpointError, match=r"checkpoint-3 was trained on other statements or captions"):
        Trainer(again, cache)


@pytest.mark.usefixtures("log_shown")
def test_a_loss_at_chance_is_said_once_with_what_to_try(
    cache: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(replace(config, max_steps=30, num_epochs=99, learning_rate=1e-9, do_eval=False), cache).run()
    said = capsys.readouterr().out
    assert said.count("chance:") == 1
    assert "  1. --align_steps 300 --world_positions: start at Gemma's own image tokens" in said
    assert "  5. another --learning_rate than 1e-09" in said
    assert sum("watch_mean" in line for line in metrics(Path(config.output_dir))) == 1


@pytest.mark.usefixtures("log_shown")
def test_a_run_says_where_relations_have_no_words(
    cache: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(replace(config, relation_loss_weight=0.5, max_steps=1), cache)
    (note,) = [line for line in trainer.plan.lines if line.startswith("relation words")]
    true = sum(s.label for s in trainer.data.train)
    assert note == f"relation words: in {true} of {true} true statements"
    assert not any("relation words" in line for line in Trainer(config, cache).plan.lines)


class VaeInTheLoop:
    """Latents encoded afresh at every step, by diffusers' own 3-D path."""

    def __init__(self, rows: CachedFeatures, config: Config) -> None:
        self.reader = rows.reader
        self.vae = load_vae(config.cosmos_model_name)
        self.folder = Path(str(config.image_folder))

    def __call__(self, images: list[str]) -> torch.Tensor:
        pixels = [to_unit_range(square(read_image(self.folder, image), 64)) for image in images]
        with torch.no_grad():
            return self.vae.encode(torch.from_numpy(np.stack(pixels))[:, :, None]).latent_dist.mode()[:, :, 0]


def test_training_from_the_cache_equals_training_with_the_vae_in_the_loop(
    cache: Path, config: Config
) -> None:
    cached, live = Trainer(config, cache), Trainer(config, cache)
    live.data.latents = VaeInTheLoop(cached.data.latents, config)  # type: ignore[assignment]
    live.data.vision = OnTheFlyVision(live.model.gemma, str(config.image_folder), 10**8)
    live.data.vision.gemma = Gemma(config.model_name)  # a run from the cache has dropped its vision tower
    for _ in range(4):
        cached.train_step()
        live.train_step()
    losses = [t.window["loss"] / t.window["statements"] for t in (cached, live)]  # means, as a step has them
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, parameter in cached.model.trainable().items():
        torch.testing.assert_close(live.model.trainable()[name], parameter, atol=1e-5, rtol=1e-5)


def test_frozen_weights_do_not_change_by_a_bit_and_have_no_gradient(cache: Path, config: Config) -> None:
    trainer = Trainer(config, cache)
    frozen = {name: p.clone() for name, p in trainer.model.gemma.model.named_parameters()}
    trained = {name: p.detach().clone() for name, p in trainer.model.trainable().items()}
    for _ in range(2):
        trainer.train_step()
    for name, parameter in trainer.model.gemma.model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, frozen[name])
    assert all(not torch.equal(p, trained[name]) for name, p in trainer.model.trainable().items())


def test_training_never_loads_the_vae(cache: Path, config: Config, tmp_path: Path) -> None:
    save_config(replace(config, max_steps=1), tmp_path / "config.json")
    arguments = ["train", "--config", str(tmp_path / "config.json"), "--cache", str(cache)]
    script = (
        "import runpy, sys\n"
        f"sys.argv = {arguments!r}\n"
        "try:\n    runpy.run_path('tools/train.py', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        "assert 'diffusers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)
    assert (Path(config.output_dir) / "checkpoint-1").is_dir()


def test_training_without_cached_vision_reads_the_photographs_and_gives_the_same(
    cache: Path, config: Config, tmp_path: Path
) -> None:
    from_cache = load_file(Trainer(config, cache).run() / "projection.safetensors")
    shutil.rmtree(cache / VISION)
    live = load_file(
        Trainer(replace(config, output_dir=str(tmp_path / "live")), cache).run() / "projection.safetensors"
    )
    for name in from_cache:  # not to the bit: the tower rounds differently in batches of another size
        torch.testing.assert_close(live[name], from_cache[name], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"give --image_folder, or extract them once .* --gemma_vision"):
        Trainer(replace(config, image_folder=None, output_dir=str(tmp_path / "blind")), cache)


def test_a_text_only_gemma_trains_and_evaluates(cache: Path, config: Config, text_gemma_folder: Path) -> None:
    config = replace(config, model_name=str(text_gemma_folder), do_eval=False)
    checkpoint = Trainer(config, cache).run()
    summary = summarise(score(checkpoint, cache, None, "test", CONDITIONS, {}))
    assert set(summary["systems"]) == set(CONDITIONS) - {"text"}  # which is the baseline of a text-only Gemma


def test_a_start_at_image_tokens_needs_as_many_of_them(
    cache: Path, config: Config, text_gemma_folder: Path
) -> None:
    with pytest.raises(ValueError, match=r"align_steps 5: 4 world tokens .* and 16 image tokens"):
        Trainer(replace(config, align_steps=5, world_patch=4), cache)
    with pytest.raises(ValueError, match=r"align_steps 5: 16 world tokens .* and 0 image tokens"):
        Trainer(replace(config, align_steps=5, model_name=str(text_gemma_folder)), cache)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(
    cache: Path, config: Config
) -> None:
    trainer = Trainer(config, cache)
    trainer.train_step()
    before = {name: p.detach().clone() for name, p in trainer.model.trainable().items()}
    saved = trainer.save()
    content = weights(saved)
    rows = trainer.data.latents
    trainer.data.latents = lambda images: rows(images) * float("nan")  # type: ignore[assignment]
    with pytest.raises(NotFinite, match=r"step 2: the loss is nan \(learning rate 0\.\d+; images [abc]\.png"):
        trainer.train_step()
    for name, parameter in trainer.model.trainable().items():
        assert torch.equal(parameter, before[name])
    assert weights(saved) == content


def test_a_run_does_not_write_over_the_checkpoints_of_another(cache: Path, config: Config) -> None:
    first = Trainer(config, cache).run()
    assert [p.name for p in list_checkpoints(first.parent)] == ["checkpoint-2", "checkpoint-4"]
    with pytest.raises(
        CheckpointError, match=r"already holds checkpoint-2, checkpoint-4; go on with --resume_from"
    ):
        Trainer(config, cache)


def test_a_resume_on_other_statements_is_refused(cache: Path, config: Config, tmp_path: Path) -> None:
    last = Trainer(config, cache).run()
    shorter = tmp_path / "shorter"
    shutil.copytree(Path(str(config.annotations)), shorter)
    lines = (shorter / "train.jsonl").read_text().splitlines(keepends=True)
    (shorter / "train.jsonl").write_text("".join(lines[:5]))
    with pytest.raises(CheckpointError, match="was trained on 6 statements, now there are 5"):
        Trainer(replace(config, resume_from=str(last), annotations=str(shorter)), cache)


def test_damaged_checkpoints_are_refused(cache: Path, config: Config) -> None:
    last = Trainer(config, cache).run()
    for name in ("projection.safetensors", "trainer.pt", "trainer.json", "config.json", "world.json"):
        content = (last / name).read_bytes()
        (last / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            Trainer(replace(config, resume_from=str(last)), cache)
        (last / name).write_bytes(content)
    (last / "trainer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"trainer\.pt is missing"):
        Trainer(replace(config, resume_from=str(last)), cache)


def test_scores_from_photographs_equal_scores_from_the_cache(cache: Path, config: Config) -> None:
    checkpoint = Trainer(config, cache).run()
    one = score(checkpoint, cache, None, "test", CONDITIONS, {})
    two = score(checkpoint, None, Path(str(config.image_folder)), "test", CONDITIONS, {})
    for a, b in zip(one, two, strict=True):
        for system in CONDITIONS:
            assert a["systems"][system]["logit_1"] == pytest.approx(b["systems"][system]["logit_1"], abs=1e-4)


def test_a_projection_for_other_latents_is_refused_at_evaluation(
    cache: Path, config: Config, tmp_path: Path
) -> None:
    checkpoint = Trainer(config, cache).run()
    other = tmp_path / "other"
    extract(replace(config, latent_size=80), other, with_vision=True, allow_missing=False)
    with pytest.raises(StoreMismatch, match="latent_size: cached 80, wanted 64"):
        score(checkpoint, other, None, "test", ["world"], {})


def test_live_latents_are_those_of_the_encoder(config: Config) -> None:
    live = OnTheFlyLatents(CosmosLatents(config), str(config.image_folder), 10**8)
    assert live(["a.png", "b.png"]).shape == (2, 16, 8, 8)


@pytest.mark.usefixtures("log_shown")
def test_a_data_set_of_ones_own_goes_through_all_phases(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for split, names in (("train", "abc"), ("test", "ab")):
        rows = [
            {"image": f"{n}.png", "statement": f"It is {n}.", "label": i % 2} for i, n in enumerate(names)
        ]
        (own / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(config, annotations=str(own), do_eval=False)
    extract(config, tmp_path / "cache", with_vision=True, allow_missing=False)
    assert "no other statements than those of train and test" in capsys.readouterr().out
    checkpoint = Trainer(config, tmp_path / "cache").run()
    rows = score(checkpoint, tmp_path / "cache", None, "test", CONDITIONS, {})
    assert [(row["statement"], row["relation"], row["category"]) for row in rows] == [
        ("It is a.", "(none)", "unknown"),
        ("It is b.", "(none)", "unknown"),
    ]
    with pytest.raises(FileNotFoundError, match=r"no dev\.jsonl or validation\.jsonl"):
        Trainer(replace(config, do_eval=True, output_dir=str(tmp_path / "other")), tmp_path / "cache")
