"""Each field of a fingerprint, changed alone, is refused before any model loads, with both values and what to do.

What is prepared in a worker and what the encoder makes of it.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from constants import EMBEDDED_VAE

from theworld.config.config import Config
from theworld.data.images import latent_pixels, read_image, sha256, square
from theworld.evaluation.score import score
from theworld.extraction import extract as phase_1
from theworld.extraction.encoders import LatentEncoding, VisionEncoding, check_settings, foreseen
from theworld.extraction.extract import extract
from theworld.extraction.pipeline import Batches, Source, in_processes
from theworld.models.cosmos import CosmosEncoder
from theworld.models.gemma import Gemma
from theworld.store.format import LATENTS, VISION, StoreMismatch
from theworld.store.shard import ImageEntry
from theworld.training.trainer import Trainer
from theworld.utils import files


def test_latents_of_bytes_are_those_of_pixels_in_the_unit_range(photographs: Path) -> None:
    encoder = CosmosEncoder(str(EMBEDDED_VAE))
    encoding = LatentEncoding(encoder, 64, None)
    pixels = read_image(photographs, "a.png")
    prepared = encoding.prepare(pixels)
    assert prepared.dtype == torch.uint8
    assert np.array_equal(prepared.numpy(), square(pixels, 64))
    assert torch.equal(encoding.encode(prepared[None]), encoder.encode(latent_pixels(pixels, 64)[None]))
    half = LatentEncoding(encoder, 64, "float16").encode(prepared[None])
    assert torch.equal(half, encoding.encode(prepared[None]).half())


def test_a_compiled_encoder_is_part_of_the_fingerprint() -> None:
    encoder = CosmosEncoder(str(EMBEDDED_VAE))
    plain = LatentEncoding(encoder, 64, None).fingerprint()
    encoder.compiled = True
    assert LatentEncoding(encoder, 64, None).fingerprint() == plain | {"compiled": True}


def test_gemmas_image_processor_works_in_another_process(gemma: Gemma, photographs: Path) -> None:
    encoding = VisionEncoding(gemma)
    row = ImageEntry("a.png", sha256((photographs / "a.png").read_bytes()))
    with in_processes(Batches([[row]], Source(photographs, 10**6, 1), encoding.prepare, 1), 1) as items:
        (batch,) = items
    wanted = gemma.pixel_values([read_image(photographs, "a.png")])
    assert torch.equal(batch.pixels, wanted)
    assert torch.equal(encoding.encode(batch.pixels), gemma.vision_features(wanted))


LATENT_FIELDS = """arithmetic compute_dtype cosmos_model_name cosmos_revision cosmos_weights_sha256 diffusers
encode_batch_size latent_shape latent_size latents_mean latents_std num_world_steps pillow posterior preprocessing_alpha
preprocessing_colour preprocessing_depth preprocessing_orientation preprocessing_range preprocessing_resize
storage_dtype torch""".split()
VISION_FIELDS = """compute_dtype encode_batch_size image_processor image_size model_name model_revision pillow
preprocessing_alpha preprocessing_colour preprocessing_depth preprocessing_orientation preprocessing_range
preprocessing_resize storage_dtype torch transformers vision_weights_sha256""".split()
FIELDS = [(LATENTS, field) for field in LATENT_FIELDS] + [(VISION, field) for field in VISION_FIELDS]
# What training knows by itself, and what a checkpoint or an evaluation has to agree with; the rest says how exactly a
# number was computed, which is as good for training on any machine.
TRAINING = {"cosmos_model_name", "latent_size", "num_world_steps", "posterior", "model_name"}
RESUMING = {"cosmos_revision", "cosmos_weights_sha256", "latent_shape", "latents_mean", "latents_std"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, photographs: Path, annotations: Path) -> Config:
    from constants import EMBEDDED_GEMMA, EMBEDDED_VAE

    config = Config(
        model_name=str(EMBEDDED_GEMMA),
        cosmos_model_name=str(EMBEDDED_VAE),
        annotations=str(annotations),
        image_folder=str(photographs),
        output_dir=str(tmp_path_factory.mktemp("run") / "run"),
        latent_size=64,
        world_patch=2,
        device="cpu",
        batch_size=2,
        max_steps=1,
        log_to_tensorboard=False,
        do_eval=False,
        encode_batch_size=2,
        num_workers=0,
    )
    extract(config, Path(config.output_dir).parent / "cache", with_vision=True, allow_missing=False)
    return config


def cache_of(config: Config) -> Path:
    return Path(config.output_dir).parent / "cache"


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, list):
        return [*value[:-1], other(value[-1])]
    return "other" if value is None else value + ("x" if isinstance(value, str) else 1)


class Changed:
    """A store whose store.json says another value of one field, under a right seal; put back at the end."""

    def __init__(self, root: Path, field: str) -> None:
        self.path, self.sound = root / "store.json", (root / "store.json").read_bytes()
        self.manifest, self.listed = root / "manifest.json", (root / "manifest.json").read_bytes()
        fields = json.loads(self.sound)
        del fields["self_sha256"]
        self.wanted = fields["fingerprint"][field]
        self.cached = fields["fingerprint"][field] = other(self.wanted)
        self.data = files.seal(fields)

    def __enter__(self) -> "Changed":
        self.path.write_bytes(self.data)
        manifest = json.loads(self.listed)
        del manifest["self_sha256"]
        manifest["store_sha256"] = files.hash_file(self.path)[1]
        self.manifest.write_bytes(files.seal(manifest))
        return self

    def __exit__(self, *_: object) -> None:
        self.path.write_bytes(self.sound)
        self.manifest.write_bytes(self.listed)


def check_message(error: StoreMismatch, root: Path, field: str, changed: Changed) -> None:
    assert error.differences == [(field, changed.cached, changed.wanted)]
    assert str(error) == (
        f"{root} holds something else than what is wanted:\n"
        f"  {field}: cached {json.dumps(changed.cached)}, wanted {json.dumps(changed.wanted)}\n"
        "Use another --cache folder, or change the setting back."
    )


def test_these_are_all_the_fields(tiny: Config) -> None:
    for store, fields in ((LATENTS, LATENT_FIELDS), (VISION, VISION_FIELDS)):
        fingerprint = json.loads((cache_of(tiny) / store / "store.json").read_text())["fingerprint"]
        assert sorted(fingerprint) == sorted(fields)
        wanted, later = foreseen(store, tiny, "cpu")
        assert wanted == {key: value for key, value in fingerprint.items() if key not in later}
        assert later == {"cosmos_weights_sha256" if store == LATENTS else "vision_weights_sha256"}


@pytest.mark.parametrize(("store", "field"), FIELDS)
@pytest.mark.torture("cache", "each fingerprint field changed alone: extraction refuses")
def test_extraction_refuses_each_field_before_any_model_loads(
    tiny: Config, store: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = cache_of(tiny) / store
    if "weights" not in field:  # whose hash is known when they are read, before anything is encoded
        monkeypatch.setattr(phase_1, "CosmosEncoder", None)
        monkeypatch.setattr(phase_1, "Gemma", None)
    monkeypatch.setattr(phase_1, "encode_shards", None)
    with Changed(root, field) as changed, pytest.raises(StoreMismatch) as caught:
        extract(tiny, cache_of(tiny), with_vision=True, allow_missing=False)
    check_message(caught.value, root, field, changed)
    check_settings(tiny, cache_of(tiny), "cpu", with_vision=True)


@pytest.mark.parametrize(("store", "field"), FIELDS)
@pytest.mark.torture("cache", "each fingerprint field changed alone: training, resume, evaluation")
def test_training_refuses_each_field_that_changes_the_meaning(
    tiny: Config, store: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, config = cache_of(tiny) / store, replace(tiny, output_dir=tiny.output_dir + "-fields")
    if not (Path(config.output_dir) / "checkpoint-1").exists():
        Trainer(config, cache_of(tiny)).run()
    checkpoint = Path(config.output_dir) / "checkpoint-1"
    monkeypatch.setattr(Gemma, "load_weights", None)
    monkeypatch.setattr("theworld.evaluation.score.TheWorld", None)
    again = replace(config, output_dir=tiny.output_dir + "-again")
    with Changed(root, field) as changed:
        if field in TRAINING or field.startswith("preprocessing"):
            with pytest.raises(StoreMismatch) as caught:
                Trainer(again, cache_of(tiny))
            check_message(caught.value, root, field, changed)
        elif field in RESUMING:
            for call in (
                lambda: Trainer(replace(config, resume_from=str(checkpoint)), cache_of(tiny)),
                lambda: score(checkpoint, cache_of(tiny), None, "test", ["world"], {}),
            ):
                with pytest.raises(StoreMismatch) as caught:
                    call()
                check_message(caught.value, root, field, changed)
        else:
            with pytest.raises(TypeError):  # it goes on to the model, which is None here
                Trainer(again, cache_of(tiny))


def test_a_model_that_is_not_downloaded_yet_is_not_guessed_at(tiny: Config) -> None:
    config = replace(tiny, cosmos_model_name="somebody/not-downloaded")
    wanted, later = foreseen(LATENTS, config, "cpu")
    assert later == RESUMING
    assert not wanted.keys() & later
    with pytest.raises(
        StoreMismatch, match='cosmos_model_name: cached "vae", wanted "somebody/not-downloaded"'
    ):
        check_settings(config, cache_of(tiny), "cpu", with_vision=False)
