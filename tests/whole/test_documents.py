"""README, GUIDE and CONTRIBUTING name only what exists: files, anchors, flags, settings and commands that parse."""

import re
import runpy
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from constants import ROOT
from documents import (
    DOCUMENTS,
    MAIN,
    anchors,
    code_blocks,
    commands,
    inline_code,
    links,
    paths,
    settings_in_guide,
    settings_table,
    text_of,
)

import theworld
from theworld.config.cli import ArgumentParser

TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
# Flags of other programs than the project's tools.
OTHERS = {"--multi_gpu", "--num_processes", "--use_fsdp", "--logdir", "--user"}


class Parsed(Exception):
    """The command line of a tool was parsed, and nothing has run."""


@pytest.fixture
def flags_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that returns all flags of a tool, after it has parsed the arguments, if there are any."""
    original = ArgumentParser.parse_args

    def parse_only(self: ArgumentParser) -> None:
        if sys.argv[1:]:
            original(self)
        raise Parsed(self.flags())

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_only)
    monkeypatch.chdir(ROOT)

    def run(name: str, arguments: Sequence[str] = ()) -> list[str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with pytest.raises(Parsed) as parsed:
            runpy.run_path(f"tools/{name}.py")["main"]()
        return parsed.value.args[0]

    return run


def test_readme_has_at_most_1500_words() -> None:
    assert len(text_of("README.md").split()) <= 1500


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings(document: str) -> None:
    for link in links(text_of(document)):
        name, _, anchor = link.partition("#")
        target = ((ROOT / document).parent / name) if name else ROOT / document
        assert target.exists(), f"{document}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{document}: {link}"


def test_paths_exist() -> None:
    found = [path for document in DOCUMENTS for path in paths(text_of(document))]
    assert {"configs/vsr_training.json", "theworld/store/shard.py", "tools/slurm/train.sh"} <= set(found)
    assert [path for path in found if not (ROOT / path).exists()] == []


def test_names_in_the_table_of_where_to_change_what_are_in_their_files() -> None:
    table = text_of("CONTRIBUTING.md").partition("## Where do I change")[2].partition("\n## ")[0]
    found = re.findall(r"`([\w.]+)` in `(theworld/[\w/]+\.py)`", table)
    assert len(found) >= 5
    for name, path in found:
        assert re.search(rf"\b{name.split('.')[-1]}\b", text_of(path)), f"{name} is not in {path}"


def test_every_command_parses(flags_of: Any) -> None:
    found = [command for document in MAIN for command in commands(text_of(document))]
    assert {name for name, _ in found} >= {
        "get_images",
        "doctor",
        "extract_latents",
        "train",
        "eval",
        "report",
    }
    for name, arguments in found:
        flags_of(name, arguments)


def test_every_flag_belongs_to_a_tool(flags_of: Any) -> None:
    known = OTHERS.union(*(flags_of(name) for name in TOOLS))
    for document in MAIN:
        for code in inline_code(text_of(document)):
            for flag in re.findall(r"(?:^|\s)(--[a-z][a-z0-9_-]*)(?=[\s=]|$)", code):
                assert flag in known, f"{document}: {code}"


def test_guide_has_every_setting_as_the_help_of_training_has_it() -> None:
    assert settings_in_guide() == settings_table(), "run `python tests/documents.py`"


def test_python_examples_import_what_there_is() -> None:
    lines = [line for block in code_blocks(text_of("GUIDE.md"), "python") for line in block.splitlines()]
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert imports
    for line in imports:
        exec(line, {})


def test_the_citation_has_the_version_of_the_package() -> None:
    assert f"\nversion: {theworld.__version__}\n" in text_of("CITATION.cff")


def test_pictures_are_small() -> None:
    for name in ("architecture.svg", "demo.png"):
        assert f"]({name})" in text_of("README.md")
        assert (ROOT / name).stat().st_size < 100_000
