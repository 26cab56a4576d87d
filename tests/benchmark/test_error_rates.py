"""Simulated studies with a known effect: a small sample of `make study-errors`, with exact counts."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmark import error_rates
from benchmark.error_rates import (
    WAYS,
    Case,
    Structure,
    assumptions_of,
    beats_all,
    measure,
    simulate,
    tables,
    too_often,
)
from constants import ROOT

from theworld.evaluation.power import Assumptions


@pytest.fixture(scope="module")
def structure() -> Structure:
    return Structure.drawn()


def test_the_drawn_statements_have_the_counts_of_random_test(structure: Structure) -> None:
    counts = np.bincount(structure.index)
    assert (len(structure.index), len(counts), int((counts == 1).sum())) == (2195, 1874, 1609)
    assert structure.labels.mean() == pytest.approx(0.538, abs=1 / 2195)


def test_few_images_have_two_statements_each() -> None:
    found = Structure.pairs(3)
    assert (found.index.tolist(), found.labels.tolist()) == ([0, 0, 1, 1, 2, 2], [1, 0, 1, 0, 1, 0])


def test_statements_are_read_from_a_file(tmp_path: Path) -> None:
    rows = [("b.jpg", 1), ("a.jpg", 0), ("b.jpg", 0)]
    text = "".join(
        json.dumps({"image": i, "caption": f"{i} {y}", "label": y, "relation": "on"}) + "\n" for i, y in rows
    )
    (tmp_path / "test.jsonl").write_text(text)
    found = Structure.read(tmp_path, "test", "vsr_random")
    assert (found.index.tolist(), found.labels.tolist()) == ([1, 0, 1], [1, 0, 0])


@pytest.mark.parametrize("alike", [False, True])
def test_arms_have_the_accuracy_and_the_spread_that_are_asked_for(structure: Structure, alike: bool) -> None:
    case = Case(10, 0.04, (0.04, 0.0), alike)
    margin = simulate(structure, case, 30, np.random.default_rng(0))
    assert margin.shape == (30, 2, 10, 2195)
    accuracy = ((margin > 0) == (structure.labels == 1)).mean(-1)
    # 300 runs with a deviation of 3 points each.
    assert accuracy.mean((0, 2)) == pytest.approx([0.80, 0.76], abs=0.006)
    spread = np.sqrt((accuracy[:, 0] - accuracy[:, 1]).var(-1, ddof=1).mean())
    assert spread == pytest.approx(0.04, abs=0.004)


def test_a_sample_of_studies_without_an_effect(structure: Structure) -> None:
    """A sample of 100: 7 false alarms are within chance of 5 %, the 30 and 46 of usual ways are not."""
    cell = measure(structure, Case(3, 0.02, (0.0, 0.0)), Assumptions(), 100)
    assert cell["found"] == {
        "accuracy": 7,
        "balanced_accuracy": 6,
        "auroc": 6,
        "satterthwaite": 10,
        "bootstrap": 16,
        "seeds": 8,
        "images": 30,
        "mcnemar": 46,
        "within": 0,
    }
    assert cell["predicted"] is None
    assert too_often({"cells": [cell]}) == []


def test_a_sample_of_studies_with_an_effect_is_found_as_promised(structure: Structure) -> None:
    assumed = assumptions_of(structure)[False]
    cell = measure(structure, Case(5, 0.01, (0.03, 0.0)), assumed, 200)
    assert cell["mean_difference"] == pytest.approx(0.03, abs=0.002)
    assert cell["predicted"] == pytest.approx(0.912, abs=5e-4)
    assert cell["found"] == {"accuracy": 190, "within": 0}
    assert cell["wrong_side"] == 0


def test_a_study_rarely_beats_four_controls_of_which_one_does_as_well(structure: Structure) -> None:
    found = beats_all(structure, Case(3, 0.01, (0.0, 0.0, -0.2, -0.2, -0.2)), 100)
    assert found == {"seeds": 3, "spread": 0.01, "studies": 100, "helps": 1}


def test_false_alarms_beyond_chance_are_named() -> None:
    cell = {"effect": 0.0, "seeds": 3, "spread": 0.01, "studies": 2000}
    few = {"found": {"accuracy": 100, "balanced_accuracy": 115, "auroc": 118, "satterthwaite": 900}}
    many = {"found": {"accuracy": 140, "balanced_accuracy": 0, "auroc": 0}}
    equal = {"effect": 0.01, "found": {"accuracy": 2000, "within": 160}}
    assert too_often({"cells": [cell | few, cell | many, cell | equal]}) == [
        "accuracy: 7.0% with 3 seeds, a spread of 1 points and an effect of 0",
        "within: 8.0% with 3 seeds, a spread of 1 points and an effect of 1",
    ]


def test_the_tool_writes_figures_and_prints_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, few in (("SEEDS", (3,)), ("SPREADS", (0.0,)), ("EFFECTS", (4.0,))):
        monkeypatch.setattr(error_rates, name, few)
    output = tmp_path / "errors" / "figures.json"
    monkeypatch.setattr(sys, "argv", ["study_errors.py", "--studies", "4", "--output", str(output)])
    assert runpy.run_path(str(ROOT / "tools" / "study_errors.py"))["main"]() == 0
    figures = json.loads(output.read_text())
    assert [(c["effect"], c["alike"]) for c in figures["cells"]] == [(0, False), (0, True), (0.04, False)]
    assert set(figures["cells"][0]["found"]) == set(WAYS)
    printed = capsys.readouterr().out
    assert tables(figures) in printed
    assert f"| 3 | differ | 0 | {100 * figures['cells'][0]['deviation_of_an_arm']:.2f} |" in printed
    monkeypatch.setattr(sys, "argv", ["study_errors.py", "--dry_run", "--output", str(output)])
    assert runpy.run_path(str(ROOT / "tools" / "study_errors.py"))["main"]() == 0
    assert "simulates    3 rows of 2,000 studies with 3 seeds" in capsys.readouterr().out
