"""A cache, a checkpoint and records that commit 2116c0f wrote are read, resumed and scored to the same numbers."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from constants import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from theworld.config.config import load_config
from theworld.data.scenes import write_scenes
from theworld.evaluation.conditions import CONDITIONS
from theworld.evaluation.metrics import write_summary
from theworld.evaluation.records import read_jsonl
from theworld.evaluation.score import score_to_file
from theworld.extraction.extract import extract
from theworld.store.reader import verify_store
from theworld.training.trainer import Trainer

OLD = Path(__file__).parent / "made_by_2116c0f"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old files in the folder that their settings name, below the working folder."""
    shutil.copytree(OLD, tmp_path / "made_by_2116c0f")
    (tmp_path / "theworld").symlink_to(ROOT / "theworld")
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return Path("made_by_2116c0f")


def test_the_old_files_stay_small() -> None:
    assert sum(path.stat().st_size for path in OLD.rglob("*") if path.is_file()) < 200_000


@pytest.mark.parametrize("store", ["latents", "gemma_vision"])
def test_an_old_store_is_sound(old: Path, store: str) -> None:
    assert verify_store(old / "cache" / store) == []


def test_an_old_cache_is_complete_for_the_extraction_that_made_it(old: Path) -> None:
    cached = json.loads((old / "cache/latents/store.json").read_text())["fingerprint"]
    for library in ("torch", "diffusers", "pillow"):
        if version(library) != cached[library]:
            pytest.skip(f"{library} {version(library)} is here; the cache was made with {cached[library]}")
    write_scenes(old / "scenes", {"train": 4, "dev": 2, "test": 2}, seed=3)
    before = {path: path.read_bytes() for path in (old / "cache").rglob("*") if path.is_file()}
    config = load_config(old / "run/checkpoint-3/config.json")
    extract(config, old / "cache", with_vision=True, allow_missing=False)
    assert {path: path.read_bytes() for path in (old / "cache").rglob("*") if path.is_file()} == before


def test_an_old_checkpoint_is_resumed_to_the_same_weights_and_losses(old: Path) -> None:
    config = load_config(old / "run/checkpoint-3/config.json", {"resume_from": str(old / "run/checkpoint-3")})
    checkpoint = Trainer(config, old / "cache").run()
    assert checkpoint == old / "run/checkpoint-7"
    have, want = load_file(checkpoint / "projection.safetensors"), load_file(OLD / "projection-7.safetensors")
    assert have.keys() == want.keys()
    # Bit for bit on the machine that wrote them; other processors round sums of a matrix product elsewhere.
    for name in want:
        torch.testing.assert_close(have[name], want[name], rtol=1e-4, atol=1e-5)
    kept = ("loss", "accuracy", "dev_loss", "dev_accuracy", "learning_rate")
    lines = [json.loads(line) for line in (old / "run/metrics.jsonl").read_text().splitlines()]
    wanted = [json.loads(line) for line in (OLD / "metrics.jsonl").read_text().splitlines()]
    wanted = [line for line in wanted if line["step"] > 3]
    assert [line["step"] for line in lines[-len(wanted) :]] == [line["step"] for line in wanted]
    for have_line, want_line in zip(lines[-len(wanted) :], wanted, strict=True):
        for key in kept:
            assert have_line.get(key) == pytest.approx(want_line.get(key), abs=1e-4)


def test_an_old_checkpoint_is_scored_to_the_same_numbers(old: Path) -> None:
    wanted = read_jsonl(OLD / "records.jsonl")
    output, _ = score_to_file(
        [old / "run/checkpoint-3"], "test", old / "cache", None, CONDITIONS, {}, ["eval"], old / "new.jsonl"
    )
    have = read_jsonl(output)
    assert len(have) == len(wanted) == 4
    for new, was in zip(have, wanted, strict=True):
        assert {k: new[k] for k in ("image", "statement", "label", "split")} == {
            k: was[k] for k in ("image", "statement", "label", "split")
        }
        for condition, figures in was["systems"].items():
            assert new["systems"][condition]["correct"] is figures["correct"]
            for key in ("logit_0", "logit_1", "logsumexp", "p_true", "outside"):
                assert new["systems"][condition][key] == pytest.approx(figures[key], abs=1e-4)


def test_an_old_checkpoint_loads_through_transformers(old: Path) -> None:
    statement = read_jsonl(OLD / "records.jsonl")[0]
    write_scenes(old / "scenes", {"train": 4, "dev": 2, "test": 2}, seed=3)
    processor = AutoProcessor.from_pretrained(old / "run/checkpoint-3")
    model = AutoModelForImageTextToText.from_pretrained(old / "run/checkpoint-3")
    text = model.theworld.config.question_template.replace("{caption}", statement["statement"])
    image = {"type": "image", "image": str(old / "scenes/images" / statement["image"])}
    chat = [{"role": "user", "content": [image, {"type": "text", "text": text}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    with torch.no_grad():
        logits = model(**processor.apply_chat_template(chat, **options)).logits[0, -1]
    figures = statement["systems"]["world"]
    wanted = [figures["logit_0"], figures["logit_1"]]
    assert logits[list(model.theworld.gemma.answer_ids)].tolist() == pytest.approx(wanted, abs=1e-4)


def test_old_records_give_the_figures_that_they_gave(old: Path) -> None:
    summary = write_summary(read_jsonl(old / "records.jsonl"), old / "records.jsonl")
    assert {name: figures["accuracy"] for name, figures in summary["systems"].items()} == {
        "world": 0.75, "baseline": 1.0, "zero": 0.75, "shuffled": 0.5, "text": 0.75
    }  # fmt: skip
