"""The table of an evaluation, line by line."""

from dataclasses import replace

import numpy as np
import pytest
from records import four_rows, statement, with_rest

from theworld.data.references import quoted
from theworld.data.vsr import OWN, PUBLISHED_SHA256, statements_sha256
from theworld.evaluation.metrics import (
    summarise,
)
from theworld.evaluation.records import records
from theworld.evaluation.tables import table


def shown(dataset: str, split: str = "test") -> list[str]:
    """Return the table of four true statements about four images: world has 3 right, baseline 1."""
    asked = [replace(statement(i, f"{i}.jpg", 1), relation="left of") for i in range(4)]
    hits = {"world": 3, "baseline": 1}
    answers = {s: with_rest(np.array([[0.0, 1.0]] * n + [[1.0, 0.0]] * (4 - n))) for s, n in hits.items()}
    return table(summarise(records(asked, answers, {"0.jpg"}, set(), dataset, split))).splitlines()


def test_published_accuracies_stand_below_and_are_marked_as_quoted() -> None:
    lines = shown("vsr_random")
    assert lines[0] == "4 statements about 4 images: the test split of VSR random"
    found = [line for line in lines if "quoted: " in line]
    assert [line.split("  ")[0] for line in found] == [one.name for one in quoted("vsr_random", "test")]
    assert found[0].split()[1] == "95.4%"
    wanted = "2,195 statements; Liu, Emerson, Collier: Visual Spatial Reasoning, TACL 2023 (arXiv 2205.00363)"
    assert found[-1].endswith(f"56.0%  quoted: {wanted}")
    zeroshot = shown("vsr_zeroshot")
    (gemma,) = [line for line in zeroshot if line.startswith("Gemma 3 4B, zero-shot")]
    assert gemma.endswith("66.3%  quoted: 1,222 statements, generated; a third party, unpublished [4]")
    assert [line[:3] for line in zeroshot if line.startswith("[")] == ["[1]", "[2]", "[3]", "[4]"]
    assert not any("quoted" in line for line in [*shown("own data"), *shown("vsr_random", "dev")])


def test_own_data_of_the_size_of_vsr_has_no_published_accuracies_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = [statement(i, f"{i}.jpg", 1) for i in range(2195)]
    rows = records(own, {"world": with_rest(np.array([[0.0, 1.0]] * 2195))}, set(), set(), OWN, "test")
    assert "quoted" not in table(summarise(rows))
    # Records without a release, whose data set was told from the number of statements, are told from the statements.
    older = [{k: v for k, v in row.items() if k != "release"} | {"dataset": "vsr_random"} for row in rows]
    assert "quoted" not in table(summarise(older))
    digest = statements_sha256((row["image"], row["statement"], row["label"]) for row in older)
    monkeypatch.setitem(PUBLISHED_SHA256, ("vsr_random", "test"), digest)
    assert table(summarise(older)).count("quoted") == 8
    assert "quoted" not in table(summarise(older[1:]))


def test_conditions_pairs_and_groups_have_intervals() -> None:
    lines = shown("own data")
    # Wilson of 3 of 4; images drawn again have 3 of 4 right as well, from 1 to 4 of them in 95 % of the cases.
    assert "world                        4     75.0%  30.1%–95.4%      25.0%–100.0%" in lines
    assert any(
        line.startswith("world − baseline") and "+50.0 points" in line and "2 / 0, p = 0.5" in line
        for line in lines
    )
    assert "  left of                    4  75.0% / 25.0%  (few)  [30.1%–95.4% / 4.6%–69.9%]" in lines
    assert "  seen in training           1  100.0% / 100.0%  (few)  [20.7%–100.0% / 20.7%–100.0%]" in lines
    # Nothing is balanced, or put in order, among statements that are all true.
    assert [line.split()[2:4] for line in lines if line.startswith("world ") and "mean" in line] == [
        ["none", "none"]
    ]


def test_the_last_lines_are_the_verdict_and_its_notes() -> None:
    lines = shown("own data")
    (place,) = [
        i for i, line in enumerate(lines) if line.startswith("No evidence that world tokens help: 75.0 %")
    ]
    assert all(line.startswith("- ") for line in lines[place + 1 :])
    assert lines[-1] == "- 4 statements are few: the intervals are wide."


def test_the_table_marks_groups_of_few_statements() -> None:
    text = table(summarise(four_rows()))
    assert "majority class" in text
    assert "2 right only with world tokens, 1 only without, p = 1" in text
    assert "  on                         2  100.0% / 50.0%  (few)" in text
