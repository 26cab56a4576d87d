"""Other world encoders than Cosmos: pixels, and one that a single file adds, through every phase."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from theworld.cli import dry_run
from theworld.cli.doctor import FAULT, look_over
from theworld.config.config import Config
from theworld.data.images import read_image
from theworld.data.square import square
from theworld.evaluation.score import score
from theworld.extraction.audit import audit
from theworld.extraction.extract import extract, verify
from theworld.extraction.features import CachedFeatures
from theworld.models import world_encoder
from theworld.models.encoder import EncoderSpec, common_fields
from theworld.models.pixels import PixelEncoder
from theworld.models.theworld import TheWorld
from theworld.store.format import StoreMismatch
from theworld.training.trainer import Trainer

CONDITIONS = ["world", "baseline", "zero", "shuffled"]


class QuadrantEncoder:
    """The mean colours of a photograph's four quadrants: four tokens of three channels."""

    name = "quadrants"

    def __init__(self, config: Config, like: Mapping[str, Any] | None = None) -> None:
        self.device, self.spec = torch.device("cpu"), self.describe(config, like)

    @staticmethod
    def describe(config: Config, like: Mapping[str, Any] | None = None) -> EncoderSpec:
        fields = {
            "latent_shape": [4, 3],
            "latents_mean": [127.5] * 3,
            "latents_std": [30.0, 40.0, 50.0],
            "num_world_steps": 0,
            **common_fields(config, "float32"),
        }
        return EncoderSpec("quadrants", (4, 3), "float32", None, fields)

    def prepare(self, pixels: np.ndarray) -> Tensor:
        return torch.from_numpy(square(pixels, 2))

    def encode(self, prepared: Tensor) -> Tensor:
        return prepared.flatten(1, 2).float()


def all_phases(config: Config, cache: Path, name: str, row_shape: tuple[int, ...]) -> TheWorld:
    """Extract, verify, audit, train two steps, and evaluate from the cache and from photographs; return the model."""
    assert extract(config, cache, with_vision=True, allow_missing=False)
    assert sorted(path.name for path in cache.iterdir()) == sorted(["gemma_vision", name])
    assert verify(cache) == []
    assert [one.holds for one in audit(config, cache, 3)] == [True, True]
    lines = "\n".join(dry_run.extraction(config, cache, True, False, None))
    assert f"{cache / name}: complete, 3 images, made with these settings" in lines
    assert [one for one in look_over(config, cache) if one.state == FAULT] == []
    assert CachedFeatures(cache / name)(["a.png"]).shape == (1, *row_shape)

    checkpoint = Trainer(config, cache).run()
    assert checkpoint.name == "checkpoint-2"
    rows = score(checkpoint, cache, None, "test", CONDITIONS, {})
    folder = Path(str(config.image_folder))
    alone = score(checkpoint, None, folder, "test", CONDITIONS, {})
    for row, other in zip(rows, alone, strict=True):
        for condition in CONDITIONS:  # float32: cached vision features were computed in batches
            found, wanted = (one["systems"][condition]["logit_1"] for one in (row, other))
            assert found == pytest.approx(wanted, abs=1e-4)
    model = TheWorld.from_pretrained(checkpoint)
    asked = model.score([folder / row["image"] for row in rows], [row["statement"] for row in rows])
    assert asked == pytest.approx([row["systems"]["world"]["p_true"] for row in rows], abs=1e-5)
    assert model.projection.shape.row_shape == row_shape
    return model


def test_pixels_go_through_every_phase(config: Config, tmp_path: Path) -> None:
    config = replace(config, world_encoder="pixels", max_steps=2)
    model = all_phases(config, tmp_path / "cache", "pixels", (192, 8, 8))
    assert isinstance(model.encoder, PixelEncoder)
    assert (model.projection.shape.num_tokens, model.projection.shape.values_per_token) == (16, 768)
    fingerprint = json.loads((tmp_path / "cache/pixels/store.json").read_text())["fingerprint"]
    assert (fingerprint["world_encoder"], fingerprint["storage_dtype"]) == ("pixels", "float16")
    assert not any("cosmos" in key for key in fingerprint)


def test_pixels_are_the_levels_of_the_same_cells(config: Config, photographs: Path) -> None:
    encoder = PixelEncoder(replace(config, world_encoder="pixels"))
    pixels = read_image(photographs, "a.png")
    row = encoder.encode(encoder.prepare(pixels)[None])[0]
    assert (row.shape, row.dtype) == ((192, 8, 8), torch.float16)
    levels = square(pixels, 64)
    for colour, y, x, i, j in ((0, 0, 0, 0, 0), (1, 3, 7, 5, 2), (2, 7, 7, 7, 7)):
        assert row[colour * 64 + 8 * y + x, i, j] == levels[8 * i + y, 8 * j + x, colour]
    mean, std = (encoder.spec.fields[key] for key in ("latents_mean", "latents_std"))
    assert [mean[0], mean[63], mean[64], mean[191]] == [123.675, 123.675, 116.28, 103.53]
    assert [std[0], std[64], std[128]] == [58.395, 57.12, 57.375]
    for dtype in ("float32", "bfloat16"):  # each holds 0 to 255 exactly
        other = PixelEncoder(replace(config, world_encoder="pixels", latent_dtype=dtype))
        assert torch.equal(other.encode(encoder.prepare(pixels)[None])[0].half(), row)


def test_stores_of_two_encoders_lie_in_one_cache_and_are_not_taken_for_each_other(
    config: Config, tmp_path: Path
) -> None:
    pixels = replace(config, world_encoder="pixels", max_steps=2)
    for one in (config, pixels):
        extract(one, tmp_path, with_vision=False, allow_missing=False)
    assert sorted(path.name for path in tmp_path.glob("*/store.json")) == ["store.json"] * 2
    assert verify(tmp_path) == []
    checkpoint = Trainer(pixels, tmp_path).run()
    assert score(checkpoint, tmp_path, None, "test", ["world"], {})
    with pytest.raises(StoreMismatch, match=r"latent_shape: cached \[16, 8, 8\], wanted \[192, 8, 8\]"):
        score(checkpoint, tmp_path, None, "test", ["world"], {"world_encoder": "cosmos"})
    with pytest.raises(ValueError, match=r"num_world_steps.*world_encoder is pixels"):
        replace(pixels, num_world_steps=1)


def test_a_checkpoint_without_the_setting_is_one_of_cosmos(config: Config, session_cache: Path) -> None:
    checkpoint = Trainer(replace(config, max_steps=1), session_cache).run()
    settings = json.loads((checkpoint / "config.json").read_text())
    assert settings.pop("world_encoder") == "cosmos"
    (checkpoint / "checkpoint.json").unlink()  # the hash of its config is in it
    (checkpoint / "config.json").write_text(json.dumps(settings))
    assert TheWorld.from_pretrained(checkpoint).encoder.name == "latents"


def test_one_file_and_one_if_add_an_encoder_of_tokens(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world_encoder, "encoder_class", lambda config: QuadrantEncoder)
    model = all_phases(replace(config, max_steps=2), tmp_path / "cache", "quadrants", (4, 3))
    assert isinstance(model.encoder, QuadrantEncoder)
    assert (model.projection.shape.num_tokens, model.projection.shape.values_per_token) == (4, 3)


def test_each_photograph_is_encoded_once_in_an_evaluation_without_a_cache(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world_encoder, "encoder_class", lambda config: QuadrantEncoder)
    extract(config, tmp_path, with_vision=True, allow_missing=False)
    checkpoint = Trainer(replace(config, max_steps=1), tmp_path).run()
    encoded: list[int] = []
    encode = QuadrantEncoder.encode

    def counting(self: QuadrantEncoder, prepared: Tensor) -> Tensor:
        encoded.append(len(prepared))
        return encode(self, prepared)

    monkeypatch.setattr(QuadrantEncoder, "encode", counting)
    photographs = Path(str(config.image_folder))
    score(checkpoint, None, photographs, "train", CONDITIONS, {"eval_batch_size": 1})
    assert encoded == [1, 1, 1]  # 3 photographs, 6 batches, 2 conditions that look at them
