"""The trained control arms: every world encoder through extraction, training and evaluation, from one cache."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_run
from safetensors.torch import load_file

from theworld.cli import dry_run
from theworld.cli.doctor import FAULT, look_over
from theworld.config.config import Config
from theworld.evaluation.score import score, score_to_file
from theworld.extraction import reading
from theworld.extraction.audit import audit
from theworld.extraction.encoders import specs_of
from theworld.extraction.extract import extract, verify
from theworld.extraction.features import CachedFeatures, cached_latents, latents_for
from theworld.models import world_encoder
from theworld.models.mismatched import another_image
from theworld.models.serialization import SavedModel
from theworld.models.theworld import TheWorld
from theworld.serving.ask import answers, load_for_asking
from theworld.store.format import StoreMismatch
from theworld.training.trainer import Trainer

ARMS = {  # the store of each
    "cosmos": "latents",
    "none": None,
    "pixels": "pixels",
    "cosmos_random": "cosmos_random",
    "gemma_vision": "gemma_vision",
    "noise": "noise",
    "mismatched": "latents",
}
CONDITIONS = ["world", "baseline", "zero", "shuffled"]


def settings(base: Config, arm: str, **others: Any) -> Config:
    return replace(base, world_encoder=arm, standardization="training_images", **({"max_steps": 2} | others))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, photographs: Path, annotations: Path) -> Config:
    return tiny_run(tmp_path_factory.mktemp("arms") / "run", photographs, annotations)


@pytest.fixture(scope="module")
def decoded() -> Counter[str]:
    """How often the extraction of the cache has decoded each photograph."""
    return Counter()


@pytest.fixture(scope="module")
def cache(base: Config, decoded: Counter[str]) -> Path:
    """One cache for all arms, which one call has made. Nobody writes to it."""
    folder, decode = Path(base.output_dir).parent / "cache", reading.decode

    def counting(data: bytes, path: str, max_pixels: int) -> Any:
        decoded[path] += 1
        return decode(data, path, max_pixels)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reading, "decode", counting)
        world, *others = (settings(base, arm) for arm in ARMS)
        assert extract(world, folder, with_vision=True, allow_missing=False, others=others)
    return folder


def test_one_call_extracts_the_stores_of_all_arms_and_decodes_each_photograph_twice(
    base: Config, cache: Path, decoded: Counter[str]
) -> None:
    assert sorted(path.name for path in cache.iterdir()) == sorted(
        {store for store in ARMS.values() if store}
    )
    assert verify(cache) == []
    # once for the world encoders, which take the same square, and once for Gemma, which takes another
    assert decoded == {"a.png": 2, "b.png": 2, "c.png": 2}
    images = [(cache / str(store) / "images.jsonl").read_bytes() for store in ARMS.values() if store]
    assert len(set(images)) == 1
    with pytest.raises(ValueError, match="num_world_steps: predicted frames are extracted by themselves"):
        extract(base, cache, False, False, others=[replace(base, num_world_steps=1)])


@pytest.mark.parametrize("arm", ARMS)
def test_dry_run_doctor_and_audit_know_each_arm(base: Config, cache: Path, arm: str) -> None:
    config, store = settings(base, arm), ARMS[arm]
    lines = "\n".join(dry_run.extraction(config, cache, True, False, None))
    stores = sorted({store, "gemma_vision"} - {None})  # type: ignore[type-var]
    for name in stores:
        assert lines.count(f"{cache / str(name)}: complete, 3 images, made with these settings") == 1
    assert lines.count("complete") == len(stores)
    findings = look_over(config, cache)
    assert [one for one in findings if one.state == FAULT] == []
    said = {one.topic: one.message for one in findings}
    assert said["latents"] == (
        "3 images, every byte as it was written" if store else "world_encoder none reads none"
    )
    results = audit(config, cache, 3)
    assert sorted(one.root.name for one in results) == stores
    assert all(one.holds for one in results)


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_trains_and_is_scored_from_the_cache_and_from_photographs(
    base: Config, cache: Path, tmp_path: Path, arm: str
) -> None:
    config = settings(base, arm, output_dir=str(tmp_path / "run"), world_positions=True)
    trainer = Trainer(config, cache)
    before = {name: p.detach().clone() for name, p in trainer.model.trainable().items()}
    checkpoint = trainer.run()
    saved = SavedModel.open(checkpoint)
    after = load_file(checkpoint / "projection.safetensors")
    assert after.keys() == before.keys()
    assert ("inputs" in after) == (arm == "none")
    assert not torch.equal(after["positions"], before["positions"])
    if arm == "none":
        assert after["inputs"].shape == (16, 8, 8)
        assert not torch.equal(after["inputs"], before["inputs"])

    fingerprint = saved.world["fingerprint"]
    assert fingerprint.get("world_encoder", "cosmos") == arm
    assert fingerprint.get("standardization") == (None if arm == "none" else "training_images")
    assert latents_for(fingerprint, config, cache)(["a.png"]).shape == (1, *fingerprint["latent_shape"])
    shape = trainer.model.projection.shape
    assert (shape.num_tokens, shape.grid) == (16, (4, 4))

    asked = ["world", "baseline"] if arm == "none" else CONDITIONS
    rows = score(checkpoint, cache, None, "test", CONDITIONS, {})
    assert list(rows[0]["systems"]) == asked
    folder = Path(str(config.image_folder))
    plan = dry_run.evaluation([checkpoint], None, folder, "test", CONDITIONS, tmp_path / "r.jsonl", {})
    if arm == "mismatched":
        refusal = (
            "world_encoder mismatched: a photograph has the latents of another image, which only a cache"
        )
        for attempt in (
            lambda: score(checkpoint, None, folder, "test", CONDITIONS, {}),
            lambda: list(plan),
            lambda: load_for_asking(str(checkpoint), ("world",), {}),
            lambda: TheWorld.from_pretrained(checkpoint).score([folder / "a.png"], ["A cat."]),
        ):
            with pytest.raises(ValueError, match=refusal):
                attempt()
        model = TheWorld.from_pretrained(checkpoint)
        assert model.score([folder / "a.png"], ["A cat."], enable_world=False)
        return
    assert f"{len(asked)} conditions ({', '.join(asked)})" in "\n".join(plan)
    alone = score(checkpoint, None, folder, "test", CONDITIONS, {})
    for row, other in zip(rows, alone, strict=True):
        for condition in asked:  # float32: cached features were computed in batches
            found, wanted = (one["systems"][condition]["logit_1"] for one in (row, other))
            assert found == pytest.approx(wanted, abs=2e-4)
    model = TheWorld.from_pretrained(checkpoint)
    p_true = model.score([folder / row["image"] for row in rows], [row["statement"] for row in rows])
    assert p_true == pytest.approx([row["systems"]["world"]["p_true"] for row in rows], abs=2e-5)


def test_statistics_are_of_the_training_images_and_kept_in_the_checkpoint(
    base: Config, cache: Path, tmp_path: Path
) -> None:
    config = settings(base, "cosmos_random", output_dir=str(tmp_path / "run"), num_samples=3)
    checkpoint = Trainer(config, cache).run()
    fingerprint = SavedModel.open(checkpoint).world["fingerprint"]
    images = ["a.png", "b.png"]  # of the first three statements
    values = CachedFeatures(cache / "cosmos_random")(images).double()
    mean, std = values.mean((0, 2, 3)), values.std((0, 2, 3), correction=0)
    assert fingerprint["latents_mean"] == pytest.approx(mean.tolist(), rel=1e-12)
    assert fingerprint["latents_std"] == pytest.approx(std.tolist(), rel=1e-12)

    model = TheWorld.from_pretrained(checkpoint)
    assert model.projection.latents_mean.flatten().tolist() == mean.float().tolist()
    assert model.mean_latent[:, 3, 5].tolist() == mean.float().tolist()  # of the condition zero

    # A run that goes on from these weights, on all images, takes the numbers that go with them.
    further = replace(config, init_from=str(checkpoint), output_dir=str(tmp_path / "2"), num_samples=None)
    trainer = Trainer(further, cache)
    assert trainer.model.fingerprint == fingerprint
    note = f"rows are standardised by the mean and deviation of each channel, measured by the run of {checkpoint}"
    assert note in trainer.data.notes
    resumed = Trainer(replace(config, resume_from=config.output_dir), cache)
    assert resumed.model.fingerprint == fingerprint


def test_a_checkpoint_is_not_served_by_rows_of_another_meaning(
    base: Config, cache: Path, tmp_path: Path
) -> None:
    checkpoint = Trainer(settings(base, "mismatched", output_dir=str(tmp_path / "run")), cache).run()
    for changes, field in (
        ({"world_encoder": "cosmos"}, r"world_encoder: cached \(absent\), wanted \"mismatched\""),
        ({"control_seed": 1}, "control_seed: cached 1, wanted 0"),
        ({"standardization": "encoder"}, r"standardization: cached \(absent\), wanted \"training_images\""),
    ):
        with pytest.raises(StoreMismatch, match=field) as caught:
            score(checkpoint, cache, None, "test", ["world"], changes)
        assert len(caught.value.differences) == (2 if "world_encoder" in changes else 1)
        changed = settings(base, "mismatched", output_dir=str(tmp_path / "2"), init_from=str(checkpoint))
        with pytest.raises(StoreMismatch, match=field):
            Trainer(replace(changed, **changes), cache)


def test_mismatched_rows_are_another_images_latents(base: Config, cache: Path) -> None:
    own, others = (cached_latents(settings(base, arm), cache) for arm in ("cosmos", "mismatched"))
    pairs = another_image(own.images or {}, 0)
    images = ["a.png", "b.png", "c.png"]
    assert sorted(pairs.values()) == images
    for image in images:
        assert pairs[image] != image
        assert torch.equal(others([image]), own([pairs[image]]))
    assert torch.equal(others(images), own([pairs[image] for image in images]))


def test_without_a_picture_neither_store_nor_photograph_is_read(
    base: Config, text_gemma_folder: Path, tmp_path: Path
) -> None:
    """On a text-only Gemma there is no cache at all."""
    config = settings(
        base, "none", model_name=str(text_gemma_folder), image_folder=None, output_dir=str(tmp_path / "run")
    )
    checkpoint = Trainer(config, tmp_path / "cache").run()
    rows = score(checkpoint, tmp_path / "cache", None, "test", ["world", "baseline"], {})
    assert len(rows) == 4
    model, statement = (
        load_for_asking(str(checkpoint), ("world", "baseline", "zero"), {}),
        rows[0]["statement"],
    )
    (answer,) = answers(model, str(Path(str(base.image_folder)) / rows[0]["image"]), [statement])
    assert answer["p_true"] == pytest.approx(
        {name: rows[0]["systems"][name]["p_true"] for name in ("world", "baseline")}, abs=1e-5
    )
    assert not (tmp_path / "cache").exists()
    with pytest.raises(
        ValueError, match=r"condition 'zero': these world tokens look at no picture .* 'world'"
    ):
        score(checkpoint, tmp_path / "cache", None, "test", ["zero", "shuffled"], {})
    assert specs_of(config, with_vision=False) == []
    config = replace(config, image_folder=base.image_folder)
    for attempt in (
        lambda: extract(config, tmp_path / "cache", False, False),
        lambda: list(dry_run.extraction(config, tmp_path / "cache", False, False, None)),
        lambda: audit(config, tmp_path / "cache", 1),
    ):
        with pytest.raises(
            ValueError, match="world_encoder none: it reads no store, so there is nothing to ext"
        ):
            attempt()


def test_without_a_picture_the_statements_are_those_of_the_other_arms(base: Config, tmp_path: Path) -> None:
    (tmp_path / "failures.jsonl").write_text(json.dumps({"path": "a.png", "reason": "missing"}) + "\n")
    rows = cached_latents(settings(base, "none"), tmp_path)
    assert ["a.png" in rows, "b.png" in rows] == [False, True]


def test_gemma_vision_needs_a_gemma_that_sees(base: Config, cache: Path, text_gemma_folder: Path) -> None:
    config = settings(base, "gemma_vision", model_name=str(text_gemma_folder))
    for attempt in (
        lambda: extract(config, cache, False, False),
        lambda: list(dry_run.extraction(config, cache, False, False, None)),
        lambda: Trainer(config, cache),
    ):
        with pytest.raises(ValueError, match="is text-only: it has no vision features"):
            attempt()
    assert "is text-only" in str(next(one for one in look_over(config, cache) if one.state == FAULT))


def test_statistics_of_the_encoder_are_taken_where_it_states_them(base: Config, cache: Path) -> None:
    stated = {
        arm: "standardization" not in world_encoder.describe(replace(base, world_encoder=arm)).use.fields  # type: ignore[arg-type]
        for arm in ARMS
    }
    assert stated == dict.fromkeys(ARMS, True) | {"cosmos_random": False, "gemma_vision": False}
    spec = world_encoder.describe(base)
    assert spec.use.fields == {}
    assert cached_latents(base, cache).fingerprint == CachedFeatures(cache / "latents").reader.fingerprint


def test_an_arm_without_a_picture_is_compared_with_another_in_one_evaluation(
    base: Config, cache: Path, tmp_path: Path
) -> None:
    runs = [tmp_path / arm for arm in ("cosmos", "none")]
    for run in runs:
        Trainer(settings(base, run.name, output_dir=str(run), max_steps=1), cache).run()
    output = tmp_path / "both.jsonl"
    _, summary = score_to_file(runs, "test", cache, None, CONDITIONS, {}, ["eval"], output)
    asked = {f"cosmos:{condition}" for condition in ("world", "zero", "shuffled")}
    assert summary["systems"].keys() == {"baseline", "none:world"} | asked
