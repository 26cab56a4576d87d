"""Models and statements by hub name, from a stand-in hub on this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import EMBEDDED_GEMMA, EMBEDDED_VAE, ROOT
from hub import COMMIT, serve

SCRIPT = """
import json
from theworld.gemma import Gemma
from theworld.vae import CosmosEncoder
from theworld.vsr import load_statements

gemma = Gemma("google/gemma-3-4b-it")
encoder = CosmosEncoder("nvidia/Cosmos-Predict2-2B-Video2World")
statements = {split: len(load_statements(None, split, "vsr")) for split in ("train", "dev", "test")}
zeroshot = [s.caption for s in load_statements(None, "test", "vsr_zeroshot")]
print(json.dumps([gemma.vision_identity(), encoder.identity(), statements, zeroshot]))
"""


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
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            cwd=ROOT,
            env=clean | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr[-3000:] + "\n".join(requests[-20:])
    vision, cosmos_identity, statements, zeroshot = json.loads(done.stdout.splitlines()[-1])
    assert (vision["model_name"], vision["model_revision"]) == ("google/gemma-3-4b-it", COMMIT)
    assert cosmos_identity["cosmos_model_name"] == "nvidia/Cosmos-Predict2-2B-Video2World"
    assert cosmos_identity["cosmos_revision"] == COMMIT
    assert statements == {"train": 6, "dev": 1, "test": 4}
    assert zeroshot[0] == "The dog is at the right side of the bicycle."
    assert not [line for line in requests if line.startswith("GET") and "transformer/" in line]
