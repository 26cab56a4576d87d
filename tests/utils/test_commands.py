"""Commands in messages: quoted, complete, and all made in one place."""

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest
from commands import flags_of
from constants import ROOT

from theworld.config.cli import extraction_command
from theworld.config.config import Config
from theworld.utils.commands import (
    OF_EXTRACTION,
    SETTINGS,
    SHARED,
    TOOLS,
    again,
    command,
    extraction,
    following,
)


def given(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", shlex.split(line))


def test_paths_are_quoted_for_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, "tools/train.py")
    line = command("eval", "--model", Path("my runs/it's $HOME"), "--cache", "c")
    assert line == """python tools/eval.py --model 'my runs/it'"'"'s $HOME' --cache c"""
    assert shlex.split(line)[3] == "my runs/it's $HOME"


def test_a_tool_is_named_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, "tools/train.py")
    monkeypatch.chdir(tmp_path)
    assert command("eval") == f"python {ROOT / 'tools' / 'eval.py'}"
    monkeypatch.chdir(ROOT / "tools")
    assert command("eval") == "python eval.py"


def test_an_interpreter_that_a_shell_does_not_find_is_named_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, "tools/train.py")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    assert command("eval") == f"{tmp_path}/bin/python tools/eval.py"
    monkeypatch.setattr(sys, "executable", str(ROOT / ".venv" / "bin" / "python"))
    assert command("eval") == ".venv/bin/python tools/eval.py"


def test_flags_that_the_next_tool_has_are_carried_over(monkeypatch: pytest.MonkeyPatch) -> None:
    given(
        monkeypatch,
        "tools/extract_latents.py --config 'my c.json' --cache old --image-dir 'my photos' --dataset vsr_zeroshot "
        "--no-compile --batch-size=4 --gemma_vision --allow_missing --part 1/8",
    )
    assert following("train", "--cache", "new") == (
        "python tools/train.py --config 'my c.json' --image-dir 'my photos' --dataset vsr_zeroshot --no-compile "
        "--batch-size=4 --cache new"
    )
    given(monkeypatch, "tools/train.py --config c.json --annotations a --batch_size 4 --output_dir r")
    assert (
        extraction(Path("new"))
        == "python tools/extract_latents.py --config c.json --annotations a --cache new"
    )
    given(monkeypatch, "tools/ask.py --model r --image i.jpg --statement 'a b' --device cpu")
    assert following("eval", "--cache", "c") == "python tools/eval.py --model r --device cpu --cache c"


def test_a_process_that_is_no_tool_hands_on_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, "notebook.py --config c.json")
    assert following("train", "--cache", "c") == "python tools/train.py --cache c"
    assert extraction(Path("c")) == (
        "python tools/extract_latents.py --config FILE --image_folder FOLDER --cache c"
    )


def test_the_file_of_a_study_is_no_settings_file(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, "tools/study.py --config configs/vsr_study.json --device cpu --cache c")
    assert extraction(Path("c")) == (
        "python tools/extract_latents.py --device cpu --config FILE --image_folder FOLDER --cache c"
    )
    assert extraction_command(Config(device="cpu"), Path("c")) == (
        "python tools/extract_latents.py --device cpu --image_folder FOLDER --cache c"
    )


def test_a_command_is_repeated_with_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, "tools/train.py --resume-from=old --cache 'my cache' --no-fp8 --dry_run")
    assert again("--resume_from", "a run", without=["dry_run"]) == (
        "python tools/train.py --cache 'my cache' --no-fp8 --resume_from 'a run'"
    )
    given(monkeypatch, "tools/report.py 'a run' --output x.html")
    assert again("--output", "y.html") == "python tools/report.py 'a run' --output y.html"


def test_the_extraction_for_settings_without_a_file_has_each_as_a_flag(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given(monkeypatch, "tools/eval.py --model r --cache c")
    config = Config(
        latent_size=64, compile=False, annotations="my statements", image_folder="photos", batch_size=4
    )
    assert extraction_command(config, Path("c"), "--gemma_vision") == (
        "python tools/extract_latents.py --annotations 'my statements' --image_folder photos --latent_size 64 "
        "--no-compile --cache c --gemma_vision"
    )
    given(monkeypatch, "tools/train.py --config c.json --latent_size 64 --cache c")
    assert extraction_command(Config(latent_size=64), Path("c")) == (
        "python tools/extract_latents.py --config c.json --latent_size 64 --image_folder FOLDER --cache c"
    )


def test_every_flag_that_is_carried_over_is_one_of_the_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    tools = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
    assert sorted(TOOLS) == tools
    for tool in SETTINGS.keys() | SHARED.keys():
        flags, _ = flags_of(tool, monkeypatch)
        assert {f"--{key}" for key in (*SETTINGS.get(tool, ()), *SHARED.get(tool, ()))} <= set(flags), tool
    of_extraction, of_train = flags_of("extract_latents", monkeypatch)[0], flags_of("train", monkeypatch)[0]
    only = set(of_extraction) - set(of_train)
    assert only == {f"--{name}" for name in OF_EXTRACTION}


COMMAND = re.compile(r"python[\w.]* \S*tools/|tools/\w+\.py\W+--|(?:run|with|use) (?:python )?tools/")


def test_commands_in_messages_come_from_one_place() -> None:
    found = []
    for path in [*(ROOT / "theworld").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        tree = ast.parse(path.read_text())
        documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
                found += [f"{path.name}: {node.value}"] * bool(COMMAND.search(node.value))
    assert found == []
