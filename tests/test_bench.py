"""The measuring tool, end to end at the smallest shapes; what it finds is no matter here."""

import json
from pathlib import Path

import pytest
from test_tools import tool

from theworld.bench_results import Results, spread


def test_the_tool_measures_and_its_last_line_is_json(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    parts = "encode train variants losses start evaluate growth_images growth_statements".split()
    arguments = ["--shapes", "tiny", "--output", output, "--folder", tmp_path / "folder", "--device", "cpu"]
    done = tool("bench", *arguments, "--parts", *parts, "--variants", "exact", "--changes", '{"seed": 1}')
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["failed"] == 0
    assert summary["extract_speedup"] > 0
    assert summary["train_speedup"] > 0
    found = json.loads(output.read_text())
    assert found["machine"]["cores"] >= 1
    assert list(found["parts"]) == ["chip", *parts]
    assert found["parts"]["train"]["command"].startswith("python tools/bench.py --shapes tiny")
    assert set(found["parts"]["train"]["rows"]) == {"tokens", "end to end", "ours", "floor", "stages"}
    stages = found["parts"]["train"]["rows"]["stages"]
    assert {"pack_ms", "forward_ms", "backward_ms", "optimizer_ms", "rest_ms"} < set(stages)
    assert "end to end" in done.stdout
    assert not (tmp_path / "folder" / "runs").exists()


def test_a_fault_costs_its_own_row_alone(tmp_path: Path) -> None:
    results = Results(tmp_path / "a.json", "command")
    results.begin("part")
    with results.attempt("part", "bad"):
        raise FloatingPointError("not a number")
    results.add("part", "good", spread([1.0, 3.0, 2.0]) | {"unit": "images/s"})
    part = json.loads((tmp_path / "a.json").read_text())["parts"]["part"]
    assert part["failed"] == {"bad": "FloatingPointError: not a number"}
    assert part["rows"]["good"] == {"rate": 2.0, "low": 1.0, "high": 3.0, "repeats": 3, "unit": "images/s"}
    assert "bad" in results.table()


def test_parts_of_a_later_run_are_added(tmp_path: Path) -> None:
    for part in ("one", "two"):
        results = Results(tmp_path / "a.json", "command")
        results.begin(part)
        results.add(part, "row", {"rate": 2.0})
    assert results.ratio("two", "row", "row") == 1.0
    assert list(json.loads((tmp_path / "a.json").read_text())["parts"]) == ["one", "two"]


def test_figures_of_another_machine_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"machine": {"cpu": "another"}, "parts": {}}')
    with pytest.raises(ValueError, match="another machine"):
        Results(tmp_path / "a.json", "command")
