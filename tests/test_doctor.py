"""The page that says what stands in the way of a run."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from theworld import doctor, rollout
from theworld.config import Config
from theworld.doctor import FAULT, NOTE, OK, Finding, look_over
from theworld.extract import extract


@pytest.fixture
def cache(config: Config, tmp_path: Path) -> Path:
    extract(config, tmp_path / "cache", with_vision=True, allow_missing=False)
    return tmp_path / "cache"


def by_topic(findings: list[Finding]) -> dict[str, Finding]:
    assert len({f.topic for f in findings}) == len(findings)
    return {f.topic: f for f in findings}


def test_where_all_is_well_nothing_is_in_the_way(config: Config, cache: Path) -> None:
    page = by_topic(look_over(config, cache))
    states = {topic: finding.state for topic, finding in page.items()}
    assert states.pop("device") == NOTE  # a CPU
    assert states.pop("libraries") in (OK, NOTE)
    assert states == dict.fromkeys(
        ["Gemma", "Cosmos VAE", "statements", "photographs", "latents", "vision", "compared"], OK
    )
    assert page["statements"].says == "6 train, 1 dev, 4 test, about 3 photographs"
    assert page["photographs"].says.endswith("; 3 of 3 looked at can be read")
    assert page["latents"].says == "3 images, every byte as it was written"
    assert page["compared"].says == "photographs: all 3 are those that were extracted"


def test_what_is_not_there_yet_is_a_note_with_the_command(config: Config, tmp_path: Path) -> None:
    page = by_topic(look_over(replace(config, image_folder=None), tmp_path / "none"))
    assert (page["photographs"].state, page["latents"].state, page["vision"].state) == (NOTE, NOTE, NOTE)
    assert (
        page["vision"].cure == f"python tools/extract_latents.py --cache {tmp_path / 'none'} --gemma_vision"
    )


def test_photographs_that_are_missing_or_damaged_are_faults(
    config: Config, cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photographs"
    shutil.copytree(str(config.image_folder), folder)
    config = replace(config, image_folder=str(folder))
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:400])
    found = by_topic(look_over(config, cache))["photographs"]
    assert (found.state, found.says.split("; ")[1]) == (FAULT, "2 of 3 looked at can be read")
    assert found.cure.startswith("b.png: damaged")
    (folder / "b.png").unlink()
    found = by_topic(look_over(config, cache))["photographs"]
    assert (found.state, found.says) == (FAULT, f"1 of 3 are not in {folder}, such as b.png")


def test_a_damaged_cache_and_one_of_other_settings_are_faults(config: Config, cache: Path) -> None:
    found = by_topic(look_over(replace(config, latent_size=80), cache))["latents"]
    assert found.state == FAULT
    assert "latent_size: cached 64, wanted 80" in found.says
    shard = cache / "gemma_vision" / "shards" / "00000.h5"
    shard.write_bytes(shard.read_bytes()[:-1])
    page = by_topic(look_over(config, cache))
    assert (page["latents"].state, page["vision"].state) == (OK, FAULT)
    assert page["vision"].says.startswith("shard 0: ")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError, "the licence is not accepted, or no token is set"),
        (RepositoryNotFoundError, "no such model, or a private one"),
        (LocalEntryNotFoundError, "the hub cannot be reached"),
    ],
)
def test_models_on_the_hub_are_asked_for_by_their_config(
    config: Config, cache: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], words: str
) -> None:
    asked = []

    def download(name: str, file: str) -> None:
        asked.append((name, file))
        response = SimpleNamespace(headers={}, request=None)
        raise error("no") if error is LocalEntryNotFoundError else error("no", response=response)  # type: ignore[call-arg]

    monkeypatch.setattr(doctor, "hf_hub_download", download)
    names = {
        "model_name": "google/gemma-3-4b-it",
        "cosmos_model_name": "nvidia/Cosmos-Predict2-2B-Video2World",
    }
    page = by_topic(look_over(replace(config, **names), cache))
    assert asked == [(names["model_name"], "config.json"), (names["cosmos_model_name"], "vae/config.json")]
    for topic, name in (("Gemma", names["model_name"]), ("Cosmos VAE", names["cosmos_model_name"])):
        assert (page[topic].state, page[topic].says) == (FAULT, f"{name}: {words}")
        assert page[topic].cure


def test_a_photograph_that_changed_since_it_was_extracted_is_a_fault(
    config: Config, cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(str(config.image_folder), folder)
    shutil.copy(folder / "a.png", folder / "c.png")
    found = by_topic(look_over(replace(config, image_folder=str(folder)), cache))["compared"]
    assert found.state == FAULT
    assert "c.png: SHA-256 was " in found.says


def test_a_rollout_takes_a_pipeline_and_its_guardrail(
    rolling: Config, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "is_cosmos_guardrail_available", lambda: False)
    found = by_topic(look_over(rolling, tmp_path))["rollout"]
    assert found.state == FAULT
    assert found.says.endswith("pip install cosmos_guardrail")
    monkeypatch.setattr(rollout, "is_cosmos_guardrail_available", lambda: True)
    assert by_topic(look_over(rolling, tmp_path))["rollout"].state == OK
    found = by_topic(look_over(replace(config, num_world_steps=2), tmp_path))["rollout"]
    assert (found.state, "no model_index.json" in found.says) == (FAULT, True)
