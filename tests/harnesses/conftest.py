"""A checkpoint, scenes to ask it about, and its evaluation, for the tests of all harnesses."""

import pytest
from constants import EMBEDDED_GEMMA, EMBEDDED_VAE
from harness_interfaces import Scored

from theworld.config.config import Config
from theworld.data.scenes import write_scenes
from theworld.data.vsr import load_statements
from theworld.evaluation.score import score
from theworld.harnesses.answers import Answers
from theworld.models.cosmos import CosmosLatents
from theworld.models.gemma import Gemma
from theworld.models.theworld import TheWorld

TEMPLATE = "Is it so? {caption} Say '0' or '1':"  # another one than the default


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """An untrained checkpoint, which is right and wrong in turn, evaluated on twelve statements about drawn scenes."""
    folder = tmp_path_factory.mktemp("harness")
    scenes = folder / "scenes"
    write_scenes(scenes, {"train": 1, "dev": 1, "test": 6}, seed=1)
    config = Config(
        model_name=str(EMBEDDED_GEMMA),
        cosmos_model_name=str(EMBEDDED_VAE),
        annotations=str(scenes),
        image_folder=str(scenes / "images"),
        question_template=TEMPLATE,
        latent_size=64,
        world_patch=2,
        device="cpu",
    )
    fingerprint = CosmosLatents(config).spec.fingerprint()
    checkpoint = folder / "run"
    TheWorld.from_config(config, Gemma(str(EMBEDDED_GEMMA)), fingerprint).save_pretrained(checkpoint)
    rows = score(checkpoint, None, scenes / "images", "test", ["world"], {})
    figures = [row["systems"]["world"] for row in rows]
    said = [int(one["logit_1"] > one["logit_0"]) for one in figures]
    assert 0 < sum(said) < len(said)
    return Scored(checkpoint, scenes, load_statements(scenes, "test"), said)


@pytest.fixture(scope="session")
def answers(scored: Scored) -> Answers:
    return Answers(str(scored.checkpoint), batch_size=4)
