"""Models and statements by hub name, from a stand-in hub on this machine."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from constants import EMBEDDED_GEMMA, EMBEDDED_VAE, ROOT
from fake_hub import COMMIT, serve
from tiny_model import make_model
from video2world import Guardrail

from theworld.config.config import Config
from theworld.models.cosmos import CosmosLatents
from theworld.models.gemma import Gemma
from theworld.models.rollout import Rollout

SCRIPT = """
import json
from theworld.config.config import Config
from theworld.models.gemma_vision import VisionEncoder
from theworld.models.cosmos import CosmosLatents
from theworld.data.vsr import load_statements

latents, vision = (kind(Config(device="cpu")).spec.fingerprint() for kind in (CosmosLatents, VisionEncoder))
statements = {split: len(load_statements(None, split, "vsr")) for split in ("train", "dev", "test")}
zeroshot = [s.caption for s in load_statements(None, "test", "vsr_zeroshot")]
print(json.dumps([vision, latents, statements, zeroshot]))
"""

ANSWER = """
import json
from theworld.models.theworld import TheWorld

model = TheWorld.from_pretrained("you/world", dtype="float32", device_map="cpu", enable_world=False)
revisions = [model.gemma.revision, model.encoder.spec.fields["cosmos_revision"]]
print(json.dumps([revisions, model.enable_world, len(model.trainable())]))

from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("you/world", dtype="float32", device_map="cpu")
revisions = [model.theworld.gemma.revision, model.encoder.spec.fields["cosmos_revision"]]
print(json.dumps([revisions, AutoProcessor.from_pretrained("you/world").num_world_tokens]))
"""


def run(script: str, address: str, home: Path) -> subprocess.CompletedProcess[str]:
    """A process that knows of no other hub than the one at `address`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=clean | {"HF_ENDPOINT": address, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_models_and_statements_load_by_hub_name_with_their_revision(
    annotations: Path, tmp_path: Path
) -> None:
    cosmos = tmp_path / "cosmos"
    shutil.copytree(EMBEDDED_VAE, cosmos / "vae")
    (cosmos / "transformer").mkdir()
    (cosmos / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"not to be downloaded")
    repositories = {
        "google/gemma-3-4b-it": EMBEDDED_GEMMA,
        "nvidia/Cosmos-Predict2-2B-Video2World": cosmos,
        "datasets/cambridgeltl/vsr_random": annotations,
        "datasets/cambridgeltl/vsr_zeroshot": annotations,
    }
    with serve(repositories) as (address, requests):
        done = run(SCRIPT, address, tmp_path / "home")
    assert done.returncode == 0, done.stderr[-3000:] + "\n".join(requests[-20:])
    vision, cosmos_identity, statements, zeroshot = json.loads(done.stdout.splitlines()[-1])
    assert (vision["model_name"], vision["model_revision"]) == ("google/gemma-3-4b-it", COMMIT)
    assert cosmos_identity["cosmos_model_name"] == "nvidia/Cosmos-Predict2-2B-Video2World"
    assert cosmos_identity["cosmos_revision"] == COMMIT
    assert statements == {"train": 6, "dev": 1, "test": 4}
    assert zeroshot[0] == "The dog is at the right side of the bicycle."
    assert not [line for line in requests if line.startswith("GET") and "transformer/" in line]


def test_a_projection_loads_by_hub_name_with_its_models_in_the_revisions_it_was_trained_for(
    tmp_path: Path,
) -> None:
    cosmos, world = tmp_path / "cosmos", tmp_path / "world"
    shutil.copytree(EMBEDDED_VAE, cosmos / "vae")
    gemma = Gemma(str(EMBEDDED_GEMMA))
    names = {
        "model_name": "google/gemma-3-4b-it",
        "cosmos_model_name": "nvidia/Cosmos-Predict2-2B-Video2World",
    }
    model = make_model(gemma, **names)
    old = "89abcdef0123456789abcdef0123456789abcdef"
    encoder = CosmosLatents(replace(model.config, cosmos_model_name=str(EMBEDDED_VAE)))
    model.fingerprint = encoder.spec.fingerprint() | {
        "cosmos_model_name": names["cosmos_model_name"],
        "cosmos_revision": old,
    }
    gemma.revision = old
    model.save_pretrained(world)
    (world / "trainer.pt").write_bytes(b"not to be downloaded")
    repositories = {
        names["model_name"]: EMBEDDED_GEMMA,
        names["cosmos_model_name"]: cosmos,
        "you/world": world,
    }
    with serve(repositories) as (address, requests):
        done = run(ANSWER, address, tmp_path / "home")
    assert done.returncode == 0, done.stderr[-3000:] + "\n".join(requests[-20:])
    own, through_transformers = map(json.loads, done.stdout.splitlines()[-2:])
    assert own == [[old, old], False, 7]
    assert through_transformers == [[old, old], 16]
    asked = "\n".join(requests)
    assert f"{names['model_name']}/resolve/{old}/model.safetensors" in asked
    assert f"{names['cosmos_model_name']}/resolve/{old}/vae/" in asked
    assert "trainer.pt" not in asked


ROLLOUT = """
import json
import sys

import torch
sys.path.insert(0, "tests")
from video2world import Guardrail
from theworld.config.config import Config
from theworld.models.rollout import Rollout
from theworld.models.cosmos import CosmosEncoder

config = Config(num_world_steps=1, rollout_steps=2)
encoder = CosmosEncoder(config.cosmos_model_name)
rollout = Rollout(config, torch.float32, torch.device("cpu"), encoder.revision, Guardrail())
print(json.dumps([encoder.revision, rollout.identity()]))
"""


def test_a_video_model_loads_by_hub_name_in_the_revision_of_its_vae(
    video2world: Path, tmp_path: Path
) -> None:
    with serve({"nvidia/Cosmos-Predict2-2B-Video2World": video2world}) as (address, requests):
        done = run(ROLLOUT, address, tmp_path / "home")
    assert done.returncode == 0, done.stderr[-3000:] + "\n".join(requests[-20:])
    revision, identity = json.loads(done.stdout.splitlines()[-1])
    assert revision == COMMIT
    config = Config(cosmos_model_name=str(video2world), num_world_steps=1, rollout_steps=2)
    assert identity == Rollout(config, torch.float32, torch.device("cpu"), None, Guardrail()).identity()
    asked = [line for line in requests if line.startswith("GET") and "safetensors" in line]
    assert {line.split("/resolve/")[1].split("/")[0] for line in asked} == {COMMIT}
