"""tools/ask.py: its answers, what it refuses, and its dry run."""

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from commands import main_of, tool, trace
from constants import EMBEDDED_GEMMA, EMBEDDED_VAE, ROOT
from serving_models import STATEMENTS, save_model

from theworld.config.config import Config
from theworld.data.images import ImageError
from theworld.evaluation.conditions import CONDITION_TYPES
from theworld.models.gemma import GemmaParts
from theworld.models.inference import CONDITIONS
from theworld.models.serialization import CheckpointError, find_model
from theworld.models.theworld import TheWorld
from theworld.serving.ask import LABELS, answers, load_for_asking, plan, table
from theworld.utils.console import NOTHING_WRITTEN


@pytest.fixture
def saved(config: Config, tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", config)


def test_the_tool_prints_the_probabilities_of_score(saved: Path, photographs: Path) -> None:
    model = TheWorld.from_pretrained(saved)
    image = photographs / "a.png"
    with_world, without = (model.score(image, STATEMENTS, enable_world=world) for world in (True, False))
    command = ("--model", saved, "--image", image, "--statement", STATEMENTS[0], "--statement", STATEMENTS[1])
    done = tool("ask", *command, "--json")
    said = json.loads(done.stdout)
    assert set(said) == {"model", "image", "answers"}
    assert (said["model"], said["image"]) == (str(saved), str(image))
    assert [row["statement"] for row in said["answers"]] == STATEMENTS
    assert [row["p_true"]["world"] for row in said["answers"]] == pytest.approx(with_world, abs=1e-5)
    assert [row["p_true"]["baseline"] for row in said["answers"]] == pytest.approx(without, abs=1e-5)
    assert all(list(row["p_true"]) == list(CONDITIONS) for row in said["answers"])
    lines = table(answers(model, image, STATEMENTS)).splitlines()
    assert lines[0].split("  ") == ["P(true) with world tokens", "without world tokens", "zero latents"]
    for line, one, other, statement in zip(lines[1:], with_world, without, STATEMENTS, strict=True):
        assert line.split()[:2] == [f"{one:.1%}", f"{other:.1%}"]
        assert line.endswith(f"%  {statement}")


def test_a_table_has_a_column_for_each_condition() -> None:
    rows = [
        {"statement": "So.", "p_true": {"world": 0.0746, "zero": 1.0}},
        {"statement": "Or so.", "p_true": {"world": 0.5, "zero": 0.0}},
    ]
    assert table(rows).splitlines() == [
        "P(true) with world tokens  zero latents",
        "                     7.5%        100.0%  So.",
        "                    50.0%          0.0%  Or so.",
    ]
    assert set(LABELS) == {*CONDITIONS, "without"} < set(CONDITION_TYPES)


def test_a_gemma_that_was_trained_is_no_baseline(saved: Path, photographs: Path) -> None:
    model = load_for_asking(str(saved), CONDITIONS, {})
    plain = answers(model, photographs / "a.png", STATEMENTS)
    model.gemma.parts = GemmaParts(("vision",))
    trained = answers(model, photographs / "a.png", STATEMENTS)
    assert [list(row["p_true"]) for row in trained] == [["world", "without", "zero"]] * 2
    assert [r["p_true"]["without"] for r in trained] == [r["p_true"]["baseline"] for r in plain]
    assert table(trained) == table(plain)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--image", "a.png"], 2, "--image and --statement are required, or --serve"),
        (["--statement", "So."], 2, "--image and --statement are required, or --serve"),
        (["--serve", "--image", "a.png"], 2, "leave out --image, --statement and --json"),
        (["--serve", "--port", "65536"], 2, "--port is 65536; give 0 to 65535"),
        (
            ["--image", "a.png", "--statement", "So.", "--systems", "shuffled"],
            2,
            "invalid choice: 'shuffled'",
        ),
        (["--image", "a.png", "--statement", "So."], 1, "ask: a.png: no such file in ."),
        (
            ["--image", "https://example.org/a.jpg", "--statement", "So."],
            1,
            "ask: https://example.org/a.jpg: an address, and only files are read; download it first: curl",
        ),
        (["--image", "a.png", "--statement", "So.", "--device", "tpu"], 1, 'device is "tpu"; allowed: auto'),
    ],
)
def test_wrong_usage_is_answered_in_words(
    saved: Path,
    arguments: list[str],
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    given = ["--model", saved, *arguments]
    found, _, err = main_of("ask", given, monkeypatch, capsys)
    assert found == status
    assert message in err


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    command = ("--image", "a.png", "--statement", "So.")
    done = tool("ask", "--model", tmp_path, *command, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"ask: {tmp_path}: neither a checkpoint")
    assert "Traceback" not in done.stderr
    with pytest.raises(CheckpointError, match=r"nowhere: neither .* in it: there is no such folder$"):
        find_model(tmp_path / "nowhere")


def test_a_dry_run_names_its_questions_and_writes_nothing(
    saved: Path,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    before = trace(tmp_path), trace(photographs)
    image = photographs / "a.png"
    given = ["--model", saved, "--image", image, "--statement", *STATEMENTS]
    status, out, err = main_of("ask", given, monkeypatch, capsys)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"projection   {saved}, for gemma",
        f"Gemma        {EMBEDDED_GEMMA}: a local folder; cpu, torch.float32",
        f"Cosmos VAE   {EMBEDDED_VAE}: a local folder",
        f"reads        {image}, 96 x 80 pixels",
        "asks         3 conditions (world, baseline, zero) about 2 statements",
        NOTHING_WRITTEN,
    ]
    given = ["--model", saved, "--serve", "--port", "0", "--conditions", "baseline"]
    status, out, err = main_of("ask", given, monkeypatch, capsys)
    assert (status, err) == (0, "")
    assert out.splitlines()[2:] == ["serves       a page on 127.0.0.1, a free port", NOTHING_WRITTEN]
    assert (trace(tmp_path), trace(photographs)) == before


def test_predicted_frames_are_refused_before_weights_load(
    config: Config, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving = replace(config, num_world_steps=2)
    saved = save_model(tmp_path / "moving", moving, num_world_steps=2)
    message = r"trained on 2 predicted frames .* only a cache holds; --conditions baseline zero needs none"
    with monkeypatch.context() as patched:
        patched.setattr(TheWorld, "from_pretrained", None)
        with pytest.raises(ValueError, match=message):
            load_for_asking(str(saved), CONDITIONS, {})
        with pytest.raises(ValueError, match=message):
            list(plan(str(saved), photographs / "a.png", STATEMENTS, CONDITIONS, {}))
    rest = ["baseline", "zero"]
    assert list(plan(str(saved), photographs / "a.png", STATEMENTS, rest, {}))[-1][0] == "asks"
    model = load_for_asking(str(saved), rest, {})
    rows = answers(model, photographs / "a.png", STATEMENTS, rest)
    assert [list(row["p_true"]) for row in rows] == [rest, rest]


def test_the_vae_loads_before_the_first_question(saved: Path, photographs: Path) -> None:
    model = load_for_asking(str(saved), CONDITIONS, {"max_image_pixels": 100})
    assert "encoder" in model.__dict__
    assert model.config.compile is False
    with pytest.raises(ValueError, match=r"a\.png: 96 x 80 pixels; at most 100"):
        answers(model, photographs / "a.png", STATEMENTS)


def test_help_shows_every_flag() -> None:
    done: subprocess.CompletedProcess[str] = tool("ask", "--help")
    for flag in ("--model", "--image", "--statement", "--json", "--serve", "--host", "--port", "--dry_run"):
        assert flag in done.stdout
    assert "default: 127.0.0.1" in done.stdout


def test_a_photograph_is_read_through_links_anywhere(saved: Path, photographs: Path, tmp_path: Path) -> None:
    """Caches of the hub, DVC and git-annex hold links to files elsewhere."""
    model = load_for_asking(str(saved), CONDITIONS, {})
    wanted = answers(model, photographs / "a.png", STATEMENTS)
    folder, other = tmp_path / "links", tmp_path / "other"
    folder.mkdir()
    other.symlink_to(photographs)
    (folder / "link.png").symlink_to(photographs / "a.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    for path in (folder / "link.png", other / "a.png", folder / ".." / "links" / "link.png"):
        assert answers(model, str(path), STATEMENTS) == wanted
    for name, message in {
        "loop.png": "not a regular file",
        "dangling.png": f"a symbolic link to {folder}/nowhere.png, which is not there",
        "": "not a regular file",
        "\0": "no such file|not a path",
    }.items():
        with pytest.raises(ImageError, match=message):
            answers(model, f"{folder}/{name}", STATEMENTS)
    with pytest.raises(ImageError, match="only files are read"):
        model.score("https://example.org/a.jpg", STATEMENTS)


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_serve_without_its_packages_fails_before_a_model_loads(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in list(sys.modules):
        if name == "theworld.serving.server" or name.startswith(f"{missing}."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    arguments = ["--model", "nowhere", "--serve"]
    for run in (run_ask, dry_run_ask):
        status, out, err = run(arguments, monkeypatch, capsys)
        assert (status, out) == (1, "")
        assert err == f"ask: --serve needs {missing}: pip install 'theworld[serve]'\n"


def test_an_address_is_refused_before_a_model_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "nowhere", "--image", "https://example.org/a.jpg", "--statement", "So."]
    status, out, err = run_ask(arguments, monkeypatch, capsys)
    assert (status, out) == (1, "")
    assert err == (
        "ask: https://example.org/a.jpg: an address, and only files are read; download it first: "
        "curl --location --output photo.jpg https://example.org/a.jpg\n"
    )


def test_a_statement_that_is_no_text_is_refused_before_a_model_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "nowhere", "--image", "a.png", "--statement", "So.", "a\udcff"]  # argv in Latin-1
    status, _, err = run_ask(arguments, monkeypatch, capsys)
    assert (status, err) == (1, "ask: statement 2 holds half a character (a lone surrogate); remove it\n")


def run_ask(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[object, str, str]:
    """Return the status, output and errors of the tool, run in this process."""
    monkeypatch.setattr(sys, "argv", ["ask.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / "ask.py"), run_name="__main__")
    return ended.value.code, *capsys.readouterr()


def dry_run_ask(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[object, str, str]:
    """Return the status, output and errors of the tool's dry run, run in this process."""
    return run_ask([*arguments, "--dry_run"], monkeypatch, capsys)
