"""An encoder says what its rows mean before any model loads, and everybody who asks refuses other rows alike."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from constants import EMBEDDED_GEMMA, EMBEDDED_VAE
from safetensors.torch import load_file, save_file

from theworld.cli import dry_run
from theworld.cli.doctor import FAULT, look_over
from theworld.config.config import Config
from theworld.data.images import read_image, sha256
from theworld.data.square import latent_pixels, square
from theworld.evaluation.score import score
from theworld.extraction import extract as phase_1
from theworld.extraction.encoders import check_stores, encoder_of, specs_of
from theworld.extraction.extract import extract
from theworld.extraction.reading import ReadBatch, Source, in_processes
from theworld.models import cosmos
from theworld.models.cosmos import CosmosEncoder, CosmosLatents
from theworld.models.encoder import PRECISION, UNTIL_DOWNLOADED, UNTIL_LOADED
from theworld.models.gemma import Gemma
from theworld.models.gemma_vision import VisionEncoder
from theworld.store.format import LATENTS, VISION, StoreMismatch
from theworld.store.shard import ImageEntry
from theworld.store.writer import Store
from theworld.training.trainer import Trainer
from theworld.utils import files

SETTINGS = Config(cosmos_model_name=str(EMBEDDED_VAE), latent_size=64, device="cpu", encode_batch_size=2)


def test_latents_of_bytes_are_those_of_pixels_in_the_unit_range(photographs: Path) -> None:
    encoder = CosmosLatents(SETTINGS)
    pixels = read_image(photographs, "a.png")
    prepared = encoder.prepare(pixels)
    assert prepared.dtype == torch.uint8
    assert np.array_equal(prepared.numpy(), square(pixels, 64))
    wanted = CosmosEncoder(str(EMBEDDED_VAE)).encode(latent_pixels(pixels, 64)[None])
    assert torch.equal(encoder.encode(prepared[None]), wanted)
    half = CosmosLatents(replace(SETTINGS, latent_dtype="float16")).encode(prepared[None])
    assert torch.equal(half, wanted.half())


def test_a_compiled_encoder_is_part_of_the_fingerprint() -> None:
    plain, compiled = (CosmosLatents.describe(replace(SETTINGS, compile=c)).fields for c in (None, True))
    assert compiled == {**plain, "compiled": True}


def test_gemmas_image_processor_works_in_another_process(tiny: Config, photographs: Path) -> None:
    encoder = VisionEncoder(tiny)
    row = ImageEntry("a.png", sha256((photographs / "a.png").read_bytes()))
    with in_processes(ReadBatch(Source(photographs, 10**6, 1), encoder.prepare, 1), [[row]], 1) as items:
        (batch,) = items
    gemma = Gemma(tiny.model_name)
    wanted = gemma.pixel_values([read_image(photographs, "a.png")])
    side = wanted.shape[-1]
    assert (batch.pixels.dtype, batch.pixels.shape) == (torch.uint8, (1, 3, side, side))
    features = gemma.vision_features(wanted)
    assert torch.equal(encoder.encode(batch.pixels), features)
    assert torch.equal(encoder.encode(wanted), features)


def test_of_a_gemma_the_tower_alone_is_loaded(tiny: Config, tmp_path: Path) -> None:
    encoder, gemma = VisionEncoder(tiny), Gemma(tiny.model_name)
    own, whole = encoder.tower.state_dict(), gemma.model.model.vision_tower.state_dict()
    assert own.keys() == whole.keys()
    assert all(torch.equal(own[name], whole[name]) for name in own)
    assert encoder.spec.fields["vision_weights_sha256"] == gemma.vision_weights_sha256()

    shutil.copytree(tiny.model_name, tmp_path / "gemma")
    file = tmp_path / "gemma" / "model.safetensors"
    weights = load_file(file)
    missing = next(name for name in weights if "vision_tower" in name and "fc1.bias" in name)
    del weights[missing]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors missing: .*fc1\.bias"):
        VisionEncoder(replace(tiny, model_name=str(tmp_path / "gemma")))


def test_a_compiled_tower_says_by_which_steps_it_computes() -> None:
    config = replace(SETTINGS, model_name=str(EMBEDDED_GEMMA))
    plain, compiled = (VisionEncoder.describe(replace(config, compile=c)).fields for c in (None, True))
    assert compiled == {**plain, "compiled": True, "arithmetic": 2}


PIXELS = {
    "preprocessing_alpha": "composited over white",
    "preprocessing_colour": "ICC profiles ignored; CMYK, palette and grey to RGB as PIL converts them",
    "preprocessing_depth": "16-bit grey / 257, rounded; of 16-bit colour the high byte",
    "preprocessing_orientation": "EXIF orientation applied; EXIF that cannot be parsed counts as none",
    "preprocessing_range": "x / 127.5 - 1, float32 in [-1, 1]",
    "preprocessing_resize": "PIL bicubic with antialiasing, the whole picture stretched to the square",
}
# Of stores that the commit 2116c0f made of the embedded models, without the versions of libraries, and the first and
# last of the sixteen channels' numbers.
MADE_BEFORE: dict[str, dict[str, Any]] = {
    LATENTS: PIXELS
    | {
        "arithmetic": 2,
        "compute_dtype": "float32",
        "cosmos_model_name": "vae",
        "cosmos_revision": None,
        "cosmos_weights_sha256": "616961278924fcc8bf1ccc757de1c2dee817981c2225f522ab47fd384b1ca23d",
        "encode_batch_size": 2,
        "latent_shape": [16, 8, 8],
        "latent_size": 64,
        "latents_mean": [0.3520629405975342, -0.4520651400089264],
        "latents_std": [0.8045006394386292, 0.5705806612968445],
        "num_world_steps": 0,
        "posterior": "mean",
        "storage_dtype": "float32",
    },
    VISION: PIXELS
    | {
        "compute_dtype": "float32",
        "encode_batch_size": 2,
        "image_processor": "Gemma3ImageProcessorPil",
        "image_size": 4,
        "model_name": "gemma",
        "model_revision": None,
        "storage_dtype": "float32",
        "vision_weights_sha256": "0456b4c01f2263c7953100e0f86f764beda979f6c8ae7e063deae5327fb61f4b",
    },
}
LIBRARIES = {LATENTS: {"torch", "pillow", "diffusers"}, VISION: {"torch", "pillow", "transformers"}}
FIELDS = [(s, f) for s, own in MADE_BEFORE.items() for f in sorted(own.keys() | LIBRARIES[s])]
WEIGHTS = {"cosmos_weights_sha256", "vision_weights_sha256"}


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
    assert str(error) == words(root, field, changed)


def words(root: Path, field: str, changed: Changed) -> str:
    return (
        f"{root} was made with other settings or photographs than those of this run:\n"
        f"  {field}: cached {json.dumps(changed.cached)}, wanted {json.dumps(changed.wanted)}\n"
        "Name another --cache, or change the setting back."
    )


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights fails."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("weights were loaded")

    for name in ("transformers.PreTrainedModel.from_pretrained", "theworld.models.cosmos.load_vae"):
        monkeypatch.setattr(name, refuse)


def test_a_store_has_the_fields_that_it_always_had(tiny: Config) -> None:
    for name, wanted in MADE_BEFORE.items():
        found = json.loads((cache_of(tiny) / name / "store.json").read_text())["fingerprint"]
        for key in ("latents_mean", "latents_std"):
            if key in found:
                assert len(found[key]) == 16
                found[key] = [found[key][0], found[key][-1]]
        assert {key: found[key] for key in found if key not in LIBRARIES[name]} == wanted
        assert LIBRARIES[name] <= found.keys()


def test_all_but_the_hash_of_the_weights_is_known_before_they_load(tiny: Config, no_models: None) -> None:
    for spec in specs_of(tiny, with_vision=True):
        reader = json.loads((cache_of(tiny) / spec.name / "store.json").read_text())
        assert spec.unknown == {"cosmos_weights_sha256" if spec.name == LATENTS else "vision_weights_sha256"}
        known = {key: value for key, value in spec.fields.items() if key not in spec.unknown}
        assert known == {key: reader["fingerprint"][key] for key in known}
        assert reader["fingerprint"].keys() == spec.fields.keys()
        array = {"name": spec.name, "shape": list(spec.array.shape), "dtype": spec.dtype}
        assert reader["arrays"] == [array]


def test_a_model_that_is_not_downloaded_yet_is_not_guessed_at(tiny: Config) -> None:
    config = replace(tiny, cosmos_model_name="somebody/vae", model_name="somebody/gemma")
    latents, vision = specs_of(config, with_vision=True)
    assert latents.row_shape is vision.row_shape is UNTIL_DOWNLOADED
    assert {key: value for key, value in latents.fields.items() if key in latents.unknown} == {
        "cosmos_weights_sha256": UNTIL_LOADED,
        "cosmos_revision": UNTIL_DOWNLOADED,
        "latent_shape": UNTIL_DOWNLOADED,
        "latents_mean": UNTIL_DOWNLOADED,
        "latents_std": UNTIL_DOWNLOADED,
    }
    assert vision.unknown == {"vision_weights_sha256", "model_revision", "image_processor", "image_size"}
    with pytest.raises(StoreMismatch) as caught:
        check_stores(config, cache_of(tiny), with_vision=False)
    assert caught.value.differences == [("cosmos_model_name", "vae", "somebody/vae")]
    with pytest.raises(AssertionError, match="are not known yet"):
        latents.fingerprint()


def test_a_vae_whose_config_lacks_a_field_is_named(tmp_path: Path) -> None:
    values = json.loads((EMBEDDED_VAE / "config.json").read_text())
    del values["latents_std"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match=r"config\.json: no latents_std in it; wanted the config of a Wan 2\.1"
    ):
        CosmosLatents.describe(replace(SETTINGS, cosmos_model_name=str(tmp_path)))


def test_a_store_of_another_world_encoder_is_no_store_of_this_one(tiny: Config) -> None:
    assert encoder_of(LATENTS, tiny) is CosmosLatents
    assert encoder_of(VISION, tiny) is VisionEncoder
    with pytest.raises(
        ValueError, match=r"pixels: not the store of world_encoder 'cosmos', which is latents"
    ):
        encoder_of("pixels", tiny)


# ---- each field of a fingerprint, changed alone, is refused by all who ask, with the same words


@pytest.mark.parametrize(("store", "field"), FIELDS)
@pytest.mark.torture("cache", "each fingerprint field changed alone: extraction refuses")
def test_extraction_refuses_each_field_before_any_model_loads(
    tiny: Config, store: str, field: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    root = cache_of(tiny) / store
    if field not in WEIGHTS:  # whose hash is known when they are read, before anything is encoded
        request.getfixturevalue("no_models")
    monkeypatch.setattr(phase_1, "encode_shards", None)
    with Changed(root, field) as changed, pytest.raises(StoreMismatch) as caught:
        extract(tiny, cache_of(tiny), with_vision=True, allow_missing=False)
    check_message(caught.value, root, field, changed)
    check_stores(tiny, cache_of(tiny), with_vision=True)


@pytest.mark.parametrize(("store", "field"), FIELDS)
@pytest.mark.usefixtures("no_models")
def test_the_dry_run_refuses_what_the_run_refuses(tiny: Config, store: str, field: str) -> None:
    root = cache_of(tiny) / store

    def dry() -> list[str]:
        return list(dry_run.extraction(tiny, cache_of(tiny), True, False, None))

    with Changed(root, field) as changed:
        if field in WEIGHTS:  # known once they are read
            assert f"{root}: complete, 3 images" in "".join(dry())
            return
        with pytest.raises(StoreMismatch) as caught:
            dry()
    check_message(caught.value, root, field, changed)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("store", "field"), FIELDS)
@pytest.mark.usefixtures("no_models")
def test_the_doctor_refuses_what_the_next_run_on_this_store_refuses(
    tiny: Config, store: str, field: str, finished: bool
) -> None:
    """That is training where the store is finished, and extraction where it is not."""
    root, topic = cache_of(tiny) / store, {LATENTS: "latents", VISION: "vision"}[store]
    with Changed(root, field) as changed:
        if not finished:
            changed.manifest.unlink()
        (found,) = [one for one in look_over(tiny, cache_of(tiny)) if one.topic == topic]
    refused = field not in WEIGHTS and (not finished or field not in PRECISION)
    assert found.state == FAULT  # in any case: the records of shards name the fingerprint
    assert (found.message == words(root, field, changed)) is refused


@pytest.mark.parametrize(("store", "field"), FIELDS)
@pytest.mark.torture("cache", "each fingerprint field changed alone: training, resume, evaluation")
def test_training_refuses_each_field_that_changes_the_meaning(
    tiny: Config, store: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, config = cache_of(tiny) / store, replace(tiny, output_dir=tiny.output_dir + "-fields")
    checkpoint = Path(config.output_dir) / "checkpoint-1"
    if not checkpoint.exists():
        Trainer(config, cache_of(tiny)).run()
    again = replace(config, output_dir=tiny.output_dir + "-again")

    def refused(*calls: Callable[[], object]) -> None:
        for call in calls:
            with pytest.raises(StoreMismatch) as caught:
                call()
            check_message(caught.value, root, field, changed)

    def train() -> object:
        return Trainer(again, cache_of(tiny))

    def resume() -> object:
        return Trainer(replace(config, resume_from=str(checkpoint)), cache_of(tiny))

    def evaluate() -> object:
        return score(checkpoint, cache_of(tiny), None, "test", ["world"], {})

    def dry() -> object:
        models, path = [Path(config.output_dir)], Path(tiny.output_dir).parent / "records.jsonl"
        return list(dry_run.evaluation(models, cache_of(tiny), None, "test", ["world"], path, {}))

    with Changed(root, field) as changed:
        if field == "vision_weights_sha256":
            return refused(train)
        monkeypatch.setattr(Gemma, "with_weights", None)
        monkeypatch.setattr("theworld.evaluation.score.TheWorld", None)
        if field == "cosmos_weights_sha256":
            return refused(resume, evaluate, dry)
        if field not in PRECISION:
            return refused(train, *((evaluate, dry) if store == LATENTS else ()))
        with pytest.raises(TypeError):  # it goes on to the model, which is None here
            train()


def test_training_asks_for_the_storage_dtype_only_where_the_settings_name_one(tiny: Config) -> None:
    spec, root = CosmosLatents.describe(tiny), cache_of(tiny) / LATENTS
    cached = dict(spec.having(cosmos_weights_sha256="x", storage_dtype="bfloat16", torch="1.0").fields)
    spec.check_compatible(root, cached)
    with pytest.raises(StoreMismatch) as caught:
        CosmosLatents.describe(replace(tiny, latent_dtype="float32")).check_compatible(root, cached)
    assert caught.value.differences == [("storage_dtype", "bfloat16", "float32")]


def test_a_store_of_other_shards_or_rows_is_refused_before_any_model_loads(
    tiny: Config, tmp_path: Path, no_models: None
) -> None:
    spec = CosmosLatents.describe(tiny).having(cosmos_weights_sha256="x")
    image = [ImageEntry("a.png", "0" * 64)]
    Store.create(tmp_path / "shards", spec.fingerprint(), image, [spec.array], 7)
    with pytest.raises(StoreMismatch) as caught:
        spec.check_store(tmp_path / "shards", 512)
    assert caught.value.differences == [("shard_size", 7, 512)]
    other = replace(spec, row_shape=(16, 8, 4))
    Store.create(tmp_path / "rows", spec.fingerprint(), image, [other.array], 512)
    with pytest.raises(StoreMismatch, match=r"arrays: cached .*\[16, 8, 4\].*, wanted .*\[16, 8, 8\]"):
        spec.check_store(tmp_path / "rows", 512)


def test_an_evaluation_from_photographs_refuses_another_encoder_before_it_loads(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny, output_dir=tiny.output_dir + "-alone")
    checkpoint, folder = Trainer(config, cache_of(tiny)).run(), Path(str(tiny.image_folder))
    monkeypatch.setattr(cosmos, "load_vae", None)
    found = []
    for call in (
        lambda: score(checkpoint, None, folder, "test", ["world"], {"latent_size": 80}),
        lambda: list(
            dry_run.evaluation(
                [checkpoint], None, folder, "test", ["world"], folder / "records.jsonl", {"latent_size": 80}
            )
        ),
    ):
        with pytest.raises(StoreMismatch) as caught:
            call()
        found.append(str(caught.value))
    assert found[0] == found[1]
    assert caught.value.differences == [
        ("latent_shape", [16, 10, 10], [16, 8, 8]),
        ("latent_size", 80, 64),
    ]
