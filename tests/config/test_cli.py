"""What command lines share: completion in a shell, and light loading."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark.bench import PARTS
from benchmark.choices import PART_NAMES, SHAPE_NAMES
from benchmark.models import SHAPES
from constants import ROOT

TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


def complete(
    line: str, tmp_path: Path, **environment: str
) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """What argcomplete offers for a line, by its protocol: asked in the environment, answered into a file."""
    answer = tmp_path / "answer"
    answer.unlink(missing_ok=True)
    asked = {
        "_ARGCOMPLETE": "2",  # words before the arguments: the interpreter and the tool
        "_ARGCOMPLETE_SHELL": "bash",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-X", "importtime", line.split()[1]],
        env=os.environ | asked | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    loaded = {row.split("|")[-1].strip() for row in done.stderr.splitlines()}
    assert "argparse" in loaded
    assert "torch" not in loaded
    words = answer.read_text().split("\n") if answer.exists() else []
    return [word.strip() for word in words], done


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("tools/train.py --world_p", {"--world_patch", "--world_position", "--world_positions"}),
        ("tools/train.py --projection l", {"linear"}),
        ("tools/train.py --lr_schedule ", {"cosine", "linear", "constant"}),
        ("tools/extract_latents.py --latent_dtype ", {"float32", "float16", "bfloat16", "none"}),
        ("tools/eval.py --model_name m --cache c --systems z", {"zero"}),
        ("tools/bench.py --shapes ", set(SHAPE_NAMES)),
        ("tools/make_demo_models.py --gemma", {"--gemma_steps"}),
        ("tools/demo.py --dry", {"--dry_run"}),
        ("theworld/demo.py --s", {"--seed"}),
    ],
)
def test_flags_and_choices_are_completed_without_torch(line: str, wanted: set[str], tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    words, _ = complete(f"python {line}", tmp_path)
    assert set(words) == wanted


def test_completion_without_argcomplete_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "argcomplete.py").write_text("raise ImportError('not installed')\n")
    words, done = complete("python tools/doctor.py --", tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (words, done.returncode, done.stdout) == ([], 1, "")


@pytest.mark.parametrize("name", [f"tools/{name}.py" for name in TOOLS] + ["theworld/demo.py"])
def test_a_shell_finds_the_mark_that_a_tool_completes(name: str) -> None:
    assert "PYTHON_ARGCOMPLETE_OK" in (ROOT / name).read_text()[:1024]


@pytest.mark.parametrize("name", TOOLS)
def test_help_is_shown_without_torch(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", f"tools/{name}.py", "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ")
    assert "torch" not in {row.split("|")[-1].strip() for row in done.stderr.splitlines()}
    if name not in ("doctor", "train"):
        assert "--dry_run" in done.stdout


def test_the_choices_of_the_benchmark_match_its_parts_and_shapes() -> None:
    assert tuple(PARTS) == PART_NAMES
    assert tuple(SHAPES) == SHAPE_NAMES
