"""The demo: its files, its result line and, at full length, its result."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from constants import ROOT
from PIL import Image

from theworld.cli import demo
from theworld.cli.demo import run_demo
from theworld.config.config import load_config

CONFIG = ROOT / "configs" / "demo.json"
KEYS = ["statements", "baseline", "world", "zero", "shuffled", "p_value", "seconds"]


def test_a_short_demo_writes_its_files_and_returns_its_result_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    short = replace(load_config(CONFIG), max_steps=4, align_steps=3, batch_size=8, logging_steps=1)
    monkeypatch.setattr(demo, "load_config", lambda path: short)
    monkeypatch.chdir(tmp_path)  # the demo needs nothing of the project's folder
    caplog.set_level("INFO", logger="theworld")
    output = tmp_path / "demo"
    result = run_demo(CONFIG, output, seed=3, num_scenes={"train": 12, "dev": 4, "test": 6})
    assert list(result) == KEYS
    assert result["statements"] == 12
    assert json.loads((output / "demo.json").read_text()) == result
    names = [".lock", "cache", "demo.json", "report.html", "result.png", "results.jsonl", "results.meta.json"]
    names += ["results.summary.json", "run", "scenes", "scenes.png"]
    assert sorted(p.name for p in output.iterdir()) == names
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") > 0  # scenes
    assert page.count("data:image/png") == 1  # the alignment
    assert "is not there" not in page
    assert f"python {ROOT / 'tools/eval.py'} --model {output / 'run'} --cache {output / 'cache'}" in page
    for picture in ("result.png", "scenes.png"):
        with Image.open(output / picture) as image:
            assert image.width > 1000
            assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 10
    assert "majority class" in caplog.text
    # Again in the same place: the demo first removes the output of the earlier one, and logs it.
    monkeypatch.setattr(demo, "write_scenes", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_demo(CONFIG, output, seed=3)
    assert sorted(path.name for path in output.iterdir()) == [".lock", "demo.json"]
    assert (output / "demo.json").read_text() == "{}\n"
    assert f"removing the output of an earlier demo in {output}" in caplog.text


def test_the_package_contains_the_settings_of_the_demo() -> None:
    carried = demo.EMBEDDED / "demo.json"
    assert carried.samefile(CONFIG)
    assert load_config(carried) == load_config(CONFIG)


def test_a_folder_that_no_demo_wrote_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds files that no demo wrote"):
        run_demo(CONFIG, tmp_path, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.heavy
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_world_tokens_help_and_controls_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_demo(CONFIG, tmp_path / "demo", seed)
    assert result["baseline"] > 0.55  # it sees something
    assert result["world"] >= result["baseline"] + 0.15
    assert result["zero"] <= result["baseline"]
    assert result["shuffled"] <= result["baseline"]
    assert result["p_value"] < 1e-6
