"""The positive control: hard scenes, and an encoder that learns to see through them."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from constants import ROOT
from demo_models.control_vae import draw_pairs, make_control_vae, plan_control_vae, train_encoder
from demo_models.hard_scenes import draw_hard_scene
from demo_models.lessons import POOL_SEED
from demo_models.settings import ControlSettings
from diffusers import AutoencoderKLWan
from PIL import Image

from theworld.data.scenes import draw_scene, make_scene
from theworld.models.cosmos import CosmosEncoder
from theworld.study.protocol import arm_config, read_study

EMBEDDED = ROOT / "theworld" / "embedded" / "vae"


def test_a_hard_scene_is_the_same_at_every_call_and_has_the_clutter_of_its_own_scene() -> None:
    scene = make_scene(0, "test", 0)
    first, again = draw_hard_scene(scene), draw_hard_scene(scene)
    assert first.shape == (192, 192, 3)
    assert first.dtype == np.uint8
    assert (first == again).all()
    assert (first != draw_hard_scene(make_scene(0, "test", 1))).mean() > 0.9


@pytest.fixture(scope="module")
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """24 scenes, plain and hard."""
    return draw_pairs(0, 24, 1)


def test_plain_and_hard_pictures_are_of_the_same_scenes_in_order(pairs) -> None:
    for pictures, draw in zip(pairs, (draw_scene, draw_hard_scene), strict=True):
        assert pictures.shape == (24, 3, 64, 64)
        for index in (0, 23):
            scene = draw(make_scene(POOL_SEED, "train", index))
            wanted = Image.fromarray(scene).resize((64, 64), Image.Resampling.BICUBIC)
            assert (pictures[index].permute(1, 2, 0).numpy() == np.asarray(wanted)).all()


@pytest.mark.heavy
def test_processes_draw_the_same_pictures(pairs) -> None:
    assert all(torch.equal(a, b) for a, b in zip(draw_pairs(0, 24, 2), pairs, strict=True))


def test_the_encoder_alone_is_trained_and_knows_more_of_hard_scenes_after_it(pairs) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan.from_pretrained(EMBEDDED)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    history = train_encoder(vae, *pairs, ControlSettings(steps=20, batch_size=8))
    assert [row["step"] for row in history] == list(range(1, 21))
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    changed = {name for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"encoder", "quant_conv"}
    assert not any("time_conv" in name for name in changed)


def test_the_folder_is_a_vae_like_the_embedded_one_and_says_what_it_is_for(tmp_path: Path) -> None:
    settings = ControlSettings(num_scenes=3, steps=2, batch_size=2, workers=1)
    make_control_vae(tmp_path, settings, "python tools/make_control_vae.py --output x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "training.json",
    ]
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["purpose"] == "the positive control of a study; no video model"
    assert record["command"] == "python tools/make_control_vae.py --output x"
    assert record["settings"] == {
        "seed": 0,
        "num_scenes": 3,
        "steps": 2,
        "batch_size": 2,
        "learning_rate": 0.001,
        "workers": 1,
    }
    assert [row["step"] for row in record["history"]] == [1, 2]
    own, embedded = (
        {
            key: value
            for key, value in json.loads((folder / "config.json").read_text()).items()
            if key[0] != "_"
        }
        for folder in (tmp_path, EMBEDDED)
    )
    assert own == embedded
    assert CosmosEncoder(str(tmp_path)).weights_sha256 != CosmosEncoder(str(EMBEDDED)).weights_sha256
    assert list(plan_control_vae(tmp_path, settings))[-1].endswith(
        "; replaces config.json, diffusion_pytorch_model.safetensors, training.json there"
    )


def test_the_plain_scene_is_the_target(pairs) -> None:
    """An encoder that is given plain scenes as the hard ones has nothing to learn: its first loss is 0."""
    vae = AutoencoderKLWan.from_pretrained(EMBEDDED)
    plain = pairs[0][:4]
    history = train_encoder(vae, plain, plain, ControlSettings(steps=1, batch_size=2))
    assert history[0]["loss"] == 0


def test_a_data_set_of_hard_scenes_has_the_statements_of_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, flags, said in (("plain", [], "scenes"), ("hard", ["--hard"], "hard scenes")):
        counts = ["--train", "2", "--dev", "1", "--test", "1"]
        command = ["draw_scenes.py", "--output", str(tmp_path / folder), *counts, *flags]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools" / "draw_scenes.py"), run_name="__main__")
        assert ended.value.code == 0
        assert capsys.readouterr().out == f"{tmp_path / folder}: 2 train, 1 dev, 1 test {said}\n"
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "hard" / name).read_bytes()
    for folder, draw in (("plain", draw_scene), ("hard", draw_hard_scene)):
        picture = Image.open(tmp_path / folder / "images" / "scene-test-000000.png")
        assert (np.asarray(picture) == draw(make_scene(0, "test", 0))).all()


def test_the_control_decides_as_a_real_study_does_with_one_vae_in_all_arms() -> None:
    study = read_study(ROOT / "configs" / "control_study.json", {"cosmos_model_name": "a-control-vae"})
    real = read_study(ROOT / "configs" / "demo_study.json")
    assert [arm.name for arm in study.arms] == ["world", "prompt", "pixels", "untrained", "noise"]
    assert study.primary == real.primary
    assert {arm_config(study, arm).cosmos_model_name for arm in study.arms} == {"a-control-vae"}
    assert list(study.seeds) == [0, 1, 2]


def test_the_study_of_a_text_only_gemma_has_every_arm_but_its_own_features() -> None:
    study = read_study(ROOT / "configs" / "text_study.json")
    real = read_study(ROOT / "configs" / "vsr_study.json")
    assert [arm.name for arm in real.arms if arm not in study.arms] == ["again"]
    assert len(study.arms) == len(real.arms) - 1
    assert study.primary == real.primary
    base = study.base
    assert (base.projection, base.learning_rate, base.world_positions, base.batch_size) == (
        "conv",
        0.003,
        True,
        128,
    )
    assert (base.statement_steps, base.max_steps, base.relation_loss_weight) == (3000, 2000, 1)
