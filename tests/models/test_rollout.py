"""The video model on one photograph: diffusers' own numbers, undone once, and only what the guardrail lets through."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from constants import EMBEDDED_VAE
from diffusers import Cosmos2VideoToWorldPipeline
from PIL import Image
from torch import Tensor, nn
from video2world import Blurring, Guardrail, Refusing, make_pipeline

from theworld.config.config import Config
from theworld.models import rollout
from theworld.models.projection import ProjectionShape, WorldProjection
from theworld.models.rollout import FramesRefused, Rollout, check_rollout, image_seed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def load(config: Config, guardrail: Any = None, dtype: torch.dtype = torch.float32) -> Rollout:
    return Rollout(config, dtype, CPU, None, guardrail or Guardrail())


def directly(config: Config, pixels: np.ndarray, guardrail: Guardrail, output_type: str) -> Any:
    """What the pipeline itself gives for the same settings, called as its documentation says."""
    pipe = Cosmos2VideoToWorldPipeline.from_pretrained(config.cosmos_model_name, safety_checker=guardrail)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        image=Image.fromarray(pixels),
        prompt=config.rollout_prompt,
        height=64,
        width=64,
        num_frames=config.video_frames,
        num_inference_steps=config.rollout_steps,
        guidance_scale=config.rollout_guidance,
        generator=torch.Generator().manual_seed(7),
        output_type=output_type,
    ).frames


def normalised(latents: Tensor, config: Any) -> Tensor:
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (config.latents_mean, config.latents_std))
    return (latents - mean) / std


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_world_steps": 1, "rollout_frames": 13},  # the first of three
        {"rollout_guidance": 1.0},
        {"rollout_prompt": "A ball rolls.", "rollout_steps": 3},
    ],
)
def test_moments_are_the_pipelines_own_without_its_normalisation(
    rolling: Config, pixels: np.ndarray, changes: dict[str, Any]
) -> None:
    config = replace(rolling, **changes)
    roll = load(config)
    predicted = roll.predicted_frames(pixels, 7)
    assert predicted.dtype == torch.float32
    assert predicted.shape == (config.num_world_steps, 16, 8, 8)
    frames = directly(config, pixels, Guardrail(), "latent")
    assert frames.shape == (1, 16, 1 + (config.video_frames - 1) // 4, 8, 8)
    wanted = frames[0, :, 1 : 1 + config.num_world_steps].transpose(0, 1)
    torch.testing.assert_close(normalised(predicted, roll.pipe.vae.config), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(predicted, wanted, atol=0.1)  # the embedded VAE's mean and std are not 0 and 1


def test_the_projection_normalises_a_moment_to_what_the_diffusion_model_had(
    rolling: Config, pixels: np.ndarray
) -> None:
    roll = load(rolling)
    frames = directly(rolling, pixels, Guardrail(), "latent")[0].transpose(0, 1)
    stored = torch.cat([torch.zeros(1, 16, 8, 8), roll.predicted_frames(pixels, 7)])
    vae = roll.pipe.vae.config
    shape = ProjectionShape((16, 8, 8), width=16, mode="channel", steps=2)
    projection = WorldProjection(shape, list(vae.latents_mean), list(vae.latents_std))
    projection.layers, projection.norm = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    projection.time = nn.Parameter(torch.zeros(3, 1))
    tokens = projection(stored[None])[0].view(3, 16, 8, 8)
    torch.testing.assert_close(tokens[1:], frames[1:], atol=1e-5, rtol=1e-5)


def test_other_settings_give_other_moments_and_equal_ones_the_same(
    rolling: Config, pixels: np.ndarray
) -> None:
    roll = load(rolling)
    predicted = roll.predicted_frames(pixels, 7)
    assert not torch.equal(roll.predicted_frames(pixels, 8), predicted)
    assert not torch.equal(roll.predicted_frames(255 - pixels, 7), predicted)
    # nothing is left over from the two calls before
    assert torch.equal(roll.predicted_frames(pixels, 7), predicted)
    for changes in ({"rollout_steps": 3}, {"rollout_guidance": 2.0}, {"rollout_prompt": "A ball rolls."}):
        assert not torch.equal(load(replace(rolling, **changes)).predicted_frames(pixels, 7), predicted), (
            changes
        )


def test_a_photographs_seed_is_a_function_of_the_setting_and_its_bytes() -> None:
    assert image_seed(0, "0" * 64) == 3182070237305874408
    assert image_seed(1, "0" * 64) == 4488352372866094386
    seeds = {image_seed(seed, f"{n:064x}") for seed in range(10) for n in range(100)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_prompt_is_checked_and_read_once(rolling: Config, pixels: np.ndarray) -> None:
    guardrail = Guardrail()
    roll = load(rolling, guardrail)
    roll.predicted_frames(pixels, 1)
    roll.predicted_frames(pixels, 2)
    assert guardrail.prompts == [rolling.rollout_prompt]
    assert len(guardrail.videos) == 2
    assert roll.pipe.text_encoder is None
    with pytest.raises(ValueError, match=r"rollout_prompt 'A weapon\.': the guardrail refuses it"):
        load(replace(rolling, rollout_prompt="A weapon."))
    with pytest.raises(ValueError, match="rollout_prompt has 513 tokens; allowed: at most 512"):
        load(replace(rolling, rollout_prompt="ball " * 512))
    load(replace(rolling, rollout_prompt="ball " * 511))


def test_the_guardrail_sees_the_frames_that_the_pipeline_would_show_it(
    rolling: Config, pixels: np.ndarray
) -> None:
    ours, theirs = Guardrail(), Guardrail()
    config = replace(rolling, rollout_frames=13)  # more than are kept
    load(config, ours).predicted_frames(pixels, 7)
    directly(config, pixels, theirs, "np")
    assert ours.videos[0].dtype == np.uint8
    assert ours.videos[0].shape == theirs.videos[0].shape == (13, 64, 64, 3)
    assert np.abs(ours.videos[0].astype(int) - theirs.videos[0]).max() <= 1


def test_of_frames_that_the_guardrail_changes_the_changed_ones_are_kept(
    rolling: Config, pixels: np.ndarray
) -> None:
    guardrail = Blurring()
    roll = load(rolling, guardrail)
    predicted = roll.predicted_frames(pixels, 7)
    assert not torch.allclose(predicted, load(rolling).predicted_frames(pixels, 7), atol=1e-2)
    changed = guardrail.videos[0]
    changed[:, :16, :16] = 128
    video = torch.from_numpy(changed).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        wanted = roll.pipe.vae.encode(video).latent_dist.mode()
    assert torch.equal(predicted, wanted[0, :, 1:].transpose(0, 1))


def test_frames_that_the_guardrail_refuses_are_an_error(rolling: Config, pixels: np.ndarray) -> None:
    roll = load(rolling, Refusing([1]))
    roll.predicted_frames(pixels, 0)
    with pytest.raises(FramesRefused, match="the guardrail refuses the frames that were predicted from it"):
        roll.predicted_frames(pixels, 1)


def test_there_is_no_rollout_without_a_guardrail(rolling: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "is_cosmos_guardrail_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"num_world_steps 2 takes the package cosmos_guardrail, .*: pip install"
    ):
        check_rollout(rolling)
    with pytest.raises(ValueError, match="cosmos_guardrail"):
        Rollout(rolling, torch.float32, CPU)
    monkeypatch.setattr(rollout, "is_cosmos_guardrail_available", lambda: True)
    check_rollout(rolling)


def test_a_model_that_is_no_video2world_is_refused(rolling: Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model_index\.json in it; num_world_steps 2 takes the whole"):
        check_rollout(replace(rolling, cosmos_model_name=str(EMBEDDED_VAE)), Guardrail())
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(
        ValueError, match="holds a WanPipeline; num_world_steps 2 takes a Cosmos2VideoToWorld"
    ):
        check_rollout(replace(rolling, cosmos_model_name=str(tmp_path)), Guardrail())


def test_the_identity_names_everything_that_changes_numbers(rolling: Config, tmp_path: Path) -> None:
    identity = load(rolling).identity()
    assert sorted(identity) == [
        "cosmos_guardrail",
        "guardrail",
        "rollout_fps",
        "rollout_frames",
        "rollout_guidance",
        "rollout_negative_prompt",
        "rollout_pipeline",
        "rollout_prompt",
        "rollout_scheduler",
        "rollout_scheduler_config",
        "rollout_seed",
        "rollout_steps",
        "rollout_text_encoder_sha256",
        "rollout_transformer_sha256",
        "transformers",
    ]
    assert (identity["rollout_pipeline"], identity["rollout_fps"]) == ("Cosmos2VideoToWorldPipeline", 16)
    assert (identity["rollout_frames"], identity["guardrail"]) == (9, "Guardrail")
    assert json.loads(identity["rollout_scheduler_config"])["use_karras_sigmas"] is True
    assert load(rolling, dtype=torch.bfloat16).identity() == identity
    unguided = load(replace(rolling, rollout_guidance=1.0)).identity()
    assert unguided == identity | {"rollout_guidance": 1.0, "rollout_negative_prompt": None}
    other = make_pipeline(tmp_path / "other", seed=1)
    found = load(replace(rolling, cosmos_model_name=str(other))).identity()
    differing = {key for key in identity if found[key] != identity[key]}
    assert differing == {"rollout_transformer_sha256", "rollout_text_encoder_sha256"}
    shutil.rmtree(other / "transformer")
    shutil.copytree(Path(rolling.cosmos_model_name) / "transformer", other / "transformer")
    found = load(replace(rolling, cosmos_model_name=str(other))).identity()
    assert found["rollout_transformer_sha256"] == identity["rollout_transformer_sha256"]


def test_the_measurement_makes_two_steps_and_decodes_nothing(
    rolling: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    guardrail = Guardrail()
    roll = load(replace(rolling, rollout_steps=35), guardrail)
    calls = []
    roll.pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(roll.pipe.vae, "decode", None)
    step, before = roll.measure(64)
    assert len(calls) == 4  # two steps, with guidance two passes each
    assert step > 0
    assert before >= 0
    assert guardrail.videos == []
