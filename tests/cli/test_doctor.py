"""The page that says what stands in the way of a run."""

import shutil
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from constants import GIB
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from theworld.cli import doctor
from theworld.cli.doctor import FAULT, NOTE, OK, Finding, look_over
from theworld.config.config import Config
from theworld.models import rollout
from theworld.training import memory
from theworld.training.memory import PUBLISHED
from theworld.training.trainer import Trainer
from theworld.utils import hub
from theworld.utils.device import Memory


def by_topic(findings: list[Finding]) -> dict[str, Finding]:
    assert len({f.topic for f in findings}) == len(findings)
    return {f.topic: f for f in findings}


def test_where_all_is_well_nothing_is_in_the_way(config: Config, cache: Path) -> None:
    page = by_topic(look_over(config, cache))
    states = {topic: finding.state for topic, finding in page.items()}
    assert states.pop("device") == NOTE  # a CPU
    assert states.pop("libraries") in (OK, NOTE)
    assert states == dict.fromkeys(
        "memory,Gemma,Cosmos VAE,statements,photographs,latents,vision,compared,output_dir".split(","), OK
    )
    assert page["statements"].message == "6 train, 1 dev, 4 test, about 3 photographs"
    assert page["photographs"].message.endswith("; 3 of 3 looked at can be read")
    assert page["latents"].message == "3 images, every byte as it was written"
    assert page["compared"].message == "photographs: all 3 are as they were extracted"


def test_a_text_only_gemma_is_not_asked_for_vision_features(
    config: Config, tmp_path: Path, text_gemma_folder: Path
) -> None:
    page = by_topic(look_over(replace(config, model_name=str(text_gemma_folder)), tmp_path / "none"))
    assert "vision" not in page
    assert page["latents"].state == NOTE


def test_what_is_not_there_yet_is_a_note_with_the_command(config: Config, tmp_path: Path) -> None:
    page = by_topic(look_over(replace(config, image_folder=None), tmp_path / "none"))
    assert (page["photographs"].state, page["latents"].state, page["vision"].state) == (NOTE, NOTE, NOTE)
    assert page["vision"].hint.startswith("python tools/extract_latents.py --cosmos_model_name ")
    assert page["vision"].hint.endswith(f" --image_folder FOLDER --cache {tmp_path / 'none'} --gemma_vision")


def test_photographs_that_are_missing_or_damaged_are_faults(
    config: Config, cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photographs"
    shutil.copytree(str(config.image_folder), folder)
    config = replace(config, image_folder=str(folder))
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:400])
    found = by_topic(look_over(config, cache))["photographs"]
    assert (found.state, found.message.split("; ")[1]) == (FAULT, "2 of 3 looked at can be read")
    assert found.hint.startswith("b.png: damaged")
    (folder / "b.png").unlink()
    found = by_topic(look_over(config, cache))["photographs"]
    assert (found.state, found.message) == (
        FAULT,
        f"1 of 3 cannot be read, such as b.png: no such file in {folder}",
    )
    (folder / "B.PNG").touch()
    assert "it has 'B.PNG', which differs in" in by_topic(look_over(config, cache))["photographs"].message
    missing = by_topic(look_over(replace(config, image_folder=str(tmp_path / "no")), cache))["photographs"]
    assert (missing.state, missing.message) == (FAULT, f"image_folder {tmp_path}/no: not a folder")


def test_one_cause_is_one_fault(config: Config, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.jsonl").write_text("{}\n")
    page = by_topic(look_over(replace(config, annotations=str(tmp_path / "own")), cache))
    assert page["statements"].message.startswith(f"{tmp_path}/own/train.jsonl:1: has no field image; ")
    assert [topic for topic, finding in page.items() if finding.state == FAULT] == ["statements"]
    for topic in ("photographs", "latents", "vision"):
        assert (page[topic].state, page[topic].message) == (NOTE, "not looked at; see statements above")


def test_statements_are_loaded_once(
    config: Config, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(*names: object) -> None:
        asked.append(names)
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr(doctor, "statements_at_hand", refuse)
    page = by_topic(look_over(replace(config, annotations=None), cache))
    assert (page["statements"].message, len(asked)) == ("the hub cannot be reached", 1)


def test_a_damaged_cache_and_one_of_other_settings_are_faults(config: Config, cache: Path) -> None:
    found = by_topic(look_over(replace(config, latent_size=80), cache))["latents"]
    assert found.state == FAULT
    assert "latent_size: cached 64, wanted 80" in found.message
    shard = cache / "gemma_vision" / "shards" / "00000.h5"
    shard.write_bytes(shard.read_bytes()[:-1])
    page = by_topic(look_over(config, cache))
    assert (page["latents"].state, page["vision"].state) == (OK, FAULT)
    assert page["vision"].message.startswith("shard 0: ")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError, "the licence is not accepted, or no token is set"),
        (RepositoryNotFoundError, "no such model, or a private one"),
        (ConnectionResetError, "the hub cannot be reached"),
    ],
)
def test_models_on_the_hub_are_asked_for_by_their_config(
    config: Config, cache: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], words: str
) -> None:
    asked = []

    def answer(url: str, timeout: float) -> None:
        name, _, file = url.removeprefix("https://huggingface.co/").partition("/resolve/main/")
        asked.append((name, file))
        if issubclass(error, ConnectionResetError):
            raise error("no")
        raise error("no", response=SimpleNamespace(headers={}, request=None))  # type: ignore[call-arg]

    monkeypatch.setattr(hub, "get_hf_file_metadata", answer)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "sizes_of", lambda name: None)
    monkeypatch.setattr(doctor, "_store", lambda *arguments: iter(()))
    names = {
        "model_name": "google/gemma-3-4b-it",
        "cosmos_model_name": "nvidia/Cosmos-Predict2-2B-Video2World",
    }
    page = by_topic(look_over(replace(config, **names), cache))
    assert asked == [(names["model_name"], "config.json"), (names["cosmos_model_name"], "vae/config.json")]
    for topic, name in (("Gemma", names["model_name"]), ("Cosmos VAE", names["cosmos_model_name"])):
        assert (page[topic].state, page[topic].message) == (FAULT, f"{name}: {words}")
        assert page[topic].hint


def test_a_photograph_that_changed_since_it_was_extracted_is_a_fault(
    config: Config, cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(str(config.image_folder), folder)
    shutil.copy(folder / "a.png", folder / "c.png")
    found = by_topic(look_over(replace(config, image_folder=str(folder)), cache))["compared"]
    assert found.state == FAULT
    assert "c.png: SHA-256 was " in found.message


def test_a_rollout_takes_a_pipeline_and_its_guardrail(
    rolling: Config, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "is_cosmos_guardrail_available", lambda: False)
    found = by_topic(look_over(rolling, tmp_path))["rollout"]
    assert found.state == FAULT
    assert found.message.endswith("pip install cosmos_guardrail")
    monkeypatch.setattr(rollout, "is_cosmos_guardrail_available", lambda: True)
    assert by_topic(look_over(rolling, tmp_path))["rollout"].state == OK
    found = by_topic(look_over(replace(config, num_world_steps=2), tmp_path))["rollout"]
    assert (found.state, "no model_index.json" in found.message) == (FAULT, True)


def test_cures_carry_the_settings_that_were_given(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["tools/doctor.py", "--config", "my.json", "--output_dir", "run"])
    page = by_topic(look_over(config, tmp_path / "c"))
    command = f"python tools/extract_latents.py --config my.json --cache {tmp_path / 'c'}"
    assert (page["latents"].hint, page["vision"].hint) == (command, f"{command} --gemma_vision")
    assert "it takes 12.0 KiB, " in page["latents"].message


def test_a_disk_without_room_for_the_cache_is_a_fault(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("theworld.utils.files.free_bytes", lambda path: 100)
    found = by_topic(look_over(config, tmp_path / "c"))["latents"]
    assert found.state == FAULT
    assert "12,288 bytes are needed and 100 are free" in found.message
    assert "move --cache" in found.message


def test_a_cache_that_could_not_be_written_is_a_fault(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("theworld.utils.files.os.access", lambda path, mode: False)
    found = by_topic(look_over(config, tmp_path / "c"))["latents"]
    assert found.state == FAULT
    assert found.message.startswith(f"--cache {tmp_path / 'c' / 'latents'}: {tmp_path} is ")
    assert found.message.endswith("; choose another --cache")


def test_checkpoints_in_the_way_are_a_fault_unless_they_are_resumed(
    config: Config, cache: Path, tmp_path: Path
) -> None:
    checkpoint = Trainer(replace(config, max_steps=1), cache).run()
    found = by_topic(look_over(config, cache))["output_dir"]
    assert (found.state, found.hint.split(" to ")[0]) == (FAULT, f"--resume_from {config.output_dir}")
    assert f"{config.output_dir} holds checkpoint-1, " in found.message
    resumed = replace(config, resume_from=str(checkpoint))
    assert by_topic(look_over(resumed, cache))["output_dir"].state == OK
    (tmp_path / "file").write_text("")
    blocked = by_topic(look_over(replace(config, output_dir=str(tmp_path / "file")), cache))["output_dir"]
    assert (blocked.state, "is a file, and a folder is wanted" in blocked.message) == (FAULT, True)


GPU = Memory("NVIDIA A100", free=70 * GIB, total=80 * GIB, capability=(8, 0))


@pytest.mark.parametrize(
    ("have", "fp8", "batch_size", "states"),
    [
        (GPU, False, 8, {"device": OK, "memory": OK}),
        (GPU, True, 8, {"device": OK, "fp8": FAULT, "memory": OK}),
        (replace(GPU, capability=(9, 0)), True, 8, {"device": OK, "memory": OK}),
        (GPU, False, 400, {"device": OK, "memory": FAULT}),
        (replace(GPU, free=9 * GIB), False, 8, {"device": OK, "memory": NOTE}),
        (replace(GPU, total=4 * GIB), False, 8, {"device": OK, "memory": FAULT}),
    ],
)
def test_a_gpu_is_held_against_what_a_training_takes(
    config: Config,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    have: Memory,
    fp8: bool,
    batch_size: int,
    states: dict[str, str],
) -> None:
    monkeypatch.setattr(doctor, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(memory, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(doctor, "memory_of", lambda device: have)
    monkeypatch.setattr(doctor, "sizes_of", lambda name: PUBLISHED["4b"])
    config = replace(config, fp8=fp8, batch_size=batch_size, latent_size=512, world_patch=4)
    found = by_topic(list(doctor._device(config)))
    assert {topic: finding.state for topic, finding in found.items()} == states
    assert all(finding.hint for finding in found.values() if finding.state != OK)


def test_a_library_that_is_missing_and_a_package_that_is_not_installed(
    config: Config, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch>=99", "nowhere>=1.0", "wandb; extra == 'x'"])
    page = by_topic(look_over(config, cache))
    assert (page["torch"].state, page["torch"].hint) == (NOTE, "pip install 'torch>=99'")
    assert (page["nowhere"].state, page["nowhere"].message) == (FAULT, "not installed")
    assert page["nowhere"].hint == "pip install 'nowhere>=1.0'"

    def missing(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", missing)
    assert by_topic(look_over(config, cache))["libraries"].hint == "pip install -e ."
