"""Commands that messages show, pasted back: each works as it stands."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import flags_of, run_command, shown_commands
from constants import ROOT

from theworld.cli.doctor import look_over
from theworld.config.cli import nearest_flag
from theworld.config.config import Config, save_config
from theworld.training import trainer
from theworld.utils.commands import TOOLS, command

Paste = Callable[[str], tuple[object, str, str]]


@pytest.fixture
def paste(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Paste:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    capsys.readouterr()
    return lambda line: run_command(line, monkeypatch, capsys)


@pytest.fixture
def folder(config: Config, tmp_path: Path) -> Path:
    """A folder whose name a shell would take apart, with the settings of a run of two steps."""
    folder = tmp_path / "it's $HOME; a folder"
    folder.mkdir()
    run = replace(config, output_dir=str(folder / "run"), max_steps=2, image_folder=None)
    save_config(run, folder / "tiny.json")
    return folder


def only(text: str) -> str:
    (line,) = shown_commands(text)
    return line


def test_each_phase_says_the_next_and_it_works(folder: Path, config: Config, paste: Paste) -> None:
    cache, photographs = folder / "cache", str(config.image_folder)
    start = ("--config", folder / "tiny.json", "--image-dir", photographs, "--cache", cache)
    status, _, err = paste(command("train", *start))
    assert (status, f"{cache / 'latents'} is not there" in err) == (1, True)
    status, out, _ = paste(only(err))
    assert status == 0
    status, out, _ = paste(only(out))  # reads the photographs of --image-dir, as there are no vision features
    assert status == 0
    status, out, _ = paste(only(out))
    assert (status, f"records: {folder / 'run' / 'evaluation'}" in out) == (0, True)


def test_a_stopped_training_says_how_to_go_on(
    folder: Path, config: Config, session_cache: Path, paste: Paste, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_config(replace(config, output_dir=str(folder / "other")), folder / "tiny.json")
    start = ("--config", folder / "tiny.json", "--cache", session_cache, "--output_dir", folder / "run")
    real = trainer.append

    def stopping(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "append", stopping)
        status, out, _ = paste(command("train", *start))
    assert (status, "stopped as asked: " in out) == (75, True)
    status, out, _ = paste(only(out))
    assert (status, f"done: {folder / 'run' / 'checkpoint-4'}" in out) == (0, True)


def test_statements_without_dev_and_test_have_a_next_command_that_works(
    folder: Path, config: Config, paste: Paste
) -> None:
    statements = folder / "statements"
    statements.mkdir()
    shutil.copy(Path(str(config.annotations)) / "train.jsonl", statements)
    flags = ("--annotations", statements, "--image_folder", config.image_folder, "--cache", folder / "cache")
    status, out, _ = paste(command("extract_latents", "--config", folder / "tiny.json", *flags))
    line = only(out)
    assert (status, "--no-do_eval" in line) == (0, True)
    status, out, _ = paste(line)
    line = only(out)
    assert (status, line.endswith(" --split train")) == (0, True)
    assert paste(line)[0] == 0
    (statements / "train.jsonl").rename(statements / "test.jsonl")  # nothing to train on
    status, out, _ = paste(
        command("extract_latents", "--config", folder / "tiny.json", *flags[:-1], folder / "b")
    )
    assert (status, shown_commands(out)) == (0, [])


def test_a_command_for_a_cache_that_is_not_there_makes_one_that_serves(
    folder: Path, config: Config, session_cache: Path, paste: Paste
) -> None:
    """An evaluation has no settings file: the settings are the checkpoint's."""
    settings = replace(config, output_dir=str(folder / "run"), max_steps=1)
    save_config(settings, folder / "tiny.json")
    assert paste(command("train", "--config", folder / "tiny.json", "--cache", session_cache))[0] == 0
    evaluation = ("--model", folder / "run", "--cache", folder / "new")
    status, _, err = paste(command("eval", *evaluation))
    assert status == 1
    assert paste(only(err))[0] == 0
    assert paste(command("eval", *evaluation))[0] == 0
    line = only(paste(command("visualize_alignment", *evaluation, "--output", folder / "a.png"))[2])
    assert line.endswith(" --gemma_vision")
    assert paste(line)[0] == 0
    assert paste(command("visualize_alignment", *evaluation, "--output", folder / "a.png"))[0] == 0


def test_a_verification_says_how_to_mend(folder: Path, config: Config, paste: Paste) -> None:
    cache = folder / "cache"
    given = ("--config", folder / "tiny.json", "--image_folder", config.image_folder, "--cache", cache)
    assert paste(command("extract_latents", *given, "--gemma_vision"))[0] == 0
    (cache / "gemma_vision" / "shards" / "00001.h5").write_bytes(b"")
    verification = command("extract_latents", *given, "--verify")
    status, out, _ = paste(verification)
    assert status == 1
    assert paste(out.splitlines()[-1].removeprefix("mend it with: "))[0] == 0
    assert paste(verification)[:2] == (0, f"{cache}: sound\n")


def test_hints_of_the_doctor_work(
    folder: Path, config: Config, monkeypatch: pytest.MonkeyPatch, paste: Paste
) -> None:
    def hints(config: Config) -> dict[str, str]:
        return {finding.topic: finding.hint for finding in look_over(config, folder / "cache")}

    assert paste(hints(config)["vision"])[0] == 0
    assert not {"latents", "vision"} & {topic for topic, hint in hints(config).items() if hint}
    (folder / "photos").mkdir()
    line = only(hints(replace(config, image_folder=str(folder / "photos")))["photographs"])
    status, _, err = paste(f"{line} --dry_run")
    assert (status, err) == (0, "")


@pytest.mark.parametrize("name", TOOLS)
def test_wrong_usage_costs_one_line_with_the_nearest_flag(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, parser = flags_of(name, monkeypatch)
    mistakes = (lambda f: f[:-1], str.upper, lambda f: f"{f[:4]}{f[5:]}")  # cut short, shouted, a letter lost
    long = [flag for flag in flags if len(flag) >= 8 and not flag.startswith("--no-")]
    for number, flag in enumerate(long):
        wrong = mistakes[number % len(mistakes)](flag)
        if wrong in flags:
            continue
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([wrong, "x"])
        out, err = capsys.readouterr()
        assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
        nearest = err.partition("did you mean ")[2].partition("?")[0]
        assert nearest in flags
        assert nearest == ALIASED.get(flag, flag) or nearest.startswith(wrong[:6]), (wrong, nearest)


ALIASED = {"--image_dir": "--image_folder", "--image-dir": "--image_folder", "--dataset": "--dataset_name"}


@pytest.mark.parametrize(
    ("name", "wrong", "nearest"),
    [
        ("train", "--lr", "--learning_rate"),
        ("train", "--per_device_train_batch_size=4", "--batch_size"),
        ("train", "--num-train-epochs", "--num_epochs"),
        ("train", "--output", "--output_dir"),
        ("train", "--bf16", "--dtype"),
        ("eval", "--ckpt", "--model"),
        ("eval", "--images", "--image_folder"),
        ("eval", "--output_dir", "--output"),
        ("ask", "--image_dir", "--image"),
        ("ask", "--question", "--statement"),
        ("extract_latents", "--batch_size", "--encode_batch_size"),
        ("report", "--gpu", None),
        ("get_images", "--steps", None),
    ],
)
def test_names_of_other_programs_lead_to_the_flag_and_nothing_is_guessed(
    name: str, wrong: str, nearest: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, _ = flags_of(name, monkeypatch)
    found = nearest_flag(wrong.partition("=")[0].replace("-", "_").replace("__", "--", 1), flags)
    assert found == nearest
