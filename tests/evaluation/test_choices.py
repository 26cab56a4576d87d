"""Choices: the largest P(true) of a group, sets of groups, and what stands beside them; every figure by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from records import four_rows, statement, with_rest

from theworld.evaluation.choices import choices_of
from theworld.evaluation.metrics import summarise
from theworld.evaluation.records import Row, read_jsonl, records, write_jsonl
from theworld.evaluation.tables import table
from theworld.evaluation.verdict import verdict


def rows_of(**margins: list[float]) -> list[Row]:
    """Return the records of three choices of two statements: the logit of "1" less that of "0", by condition.

    The choices 0 and 1 are a pair, and the third one has no set; a statement of no choice follows. The first option of
    each is the true one.
    """
    asked = []
    for i in range(6):
        sets = (("pair", "first"),) if i < 4 else ()
        asked.append(replace(statement(i, f"{i // 2}.jpg", 1 - i % 2), group=f"g{i // 2}", sets=sets))
    asked.append(statement(6, "3.jpg", 1))
    logits = {c: with_rest(np.stack([np.zeros(7), np.array(m)], 1)) for c, m in margins.items()}
    return records(asked, logits, set(), set(), "own data", "test")


ROWS = rows_of(
    # right (both called false), right (both called true), a tie; the last is called true
    world=[-1.0, -2.0, 3.0, 2.0, 1.0, 1.0, 1.0],
    # right, wrong, wrong; the last is called false
    baseline=[0.5, -0.5, 1.0, 2.0, -3.0, -1.0, -1.0],
)


def test_the_largest_p_true_answers_a_choice_and_a_tie_is_a_wrong_answer() -> None:
    found = choices_of(ROWS)
    assert [(c["group"], c["image"], c["options"], c["sets"]) for c in found] == [
        ("g0", "0.jpg", 2, {"pair": "first"}),
        ("g1", "1.jpg", 2, {"pair": "first"}),
        ("g2", "2.jpg", 2, {}),
    ]
    assert [c["systems"]["world"] for c in found] == [
        {"correct": True, "tie": False},
        {"correct": True, "tie": False},
        {"correct": False, "tie": True},
    ]
    assert [c["systems"]["baseline"]["correct"] for c in found] == [True, False, False]


def test_options_are_ranked_where_p_true_rounds_to_one() -> None:
    rows = rows_of(world=[50.0, 49.0, 40.0, 41.0, 0.0, -1.0, 0.0])
    assert rows[0]["systems"]["world"]["p_true"] == rows[1]["systems"]["world"]["p_true"] == 1.0
    assert [c["systems"]["world"]["correct"] for c in choices_of(rows)] == [True, False, True]


def test_the_summary_of_three_choices() -> None:
    summary = summarise(ROWS)
    choices = summary["choices"]
    assert {key: choices[key] for key in ("groups", "images", "options", "chance")} == {
        "groups": 3,
        "images": 3,
        "options": [2],
        "chance": 0.5,
    }
    assert choices["sets"] == {"pair": {"n": 1, "chance": 0.25}}
    world, baseline = (choices["systems"][c] for c in ("world", "baseline"))
    assert (world["accuracy"], world["n"], world["ties"], world["sets"]["pair"]["accuracy"]) == (
        2 / 3,
        3,
        1,
        1.0,
    )
    assert (baseline["accuracy"], baseline["ties"], baseline["sets"]["pair"]["accuracy"]) == (1 / 3, 0, 0.0)
    assert (world["image_low"], world["image_high"]) == (0.0, 1.0)  # three images drawn again
    (pair,) = choices["pairs"]
    assert (pair["first"], pair["second"], pair["n"]) == ("world", "baseline", 3)
    assert (pair["only_first"], pair["only_second"], pair["p_value"]) == (1, 0, 1.0)
    assert pair["difference"] == pytest.approx(1 / 3)
    # The figures of statements are those of all seven, as without groups.
    plain = summarise([{k: v for k, v in row.items() if k not in ("group", "sets")} for row in ROWS])
    assert summary["systems"]["world"]["accuracy"] == pytest.approx(4 / 7)
    assert {key: value for key, value in summary.items() if key != "choices"} == plain


def test_chance_is_the_mean_over_choices_of_any_number_of_options() -> None:
    asked = [
        replace(statement(i, "a.jpg", int(i in (0, 2))), group="ab"[i >= 2], sets=(("set", "s"),))
        for i in range(6)
    ]
    rows = records(asked, {"world": with_rest(np.zeros((6, 2)))}, set())
    choices = summarise(rows)["choices"]
    assert choices["options"] == [2, 4]
    assert choices["chance"] == (1 / 2 + 1 / 4) / 2
    assert choices["sets"] == {"set": {"n": 1, "chance": 1 / 8}}
    assert choices["systems"]["world"]["ties"] == 2
    assert choices["systems"]["world"]["image_low"] is None  # one image alone
    assert "groups of 2 to 4 statements about 1 image;" in table(summarise(rows))


def test_records_have_group_sets_and_question_only_where_there_is_one(tmp_path: Path) -> None:
    extra = [{k: row[k] for k in ("group", "sets", "question") if k in row} for row in ROWS]
    assert extra[0] == {"group": "g0", "sets": {"pair": "first"}}
    assert extra[4:] == [{"group": "g2"}, {"group": "g2"}, {}]
    asked = replace(statement(0, "a.jpg", 1), is_question=True)
    (row,) = records([asked], {"world": with_rest(np.zeros((1, 2)))}, set())
    assert row["question"] is True
    write_jsonl(ROWS, tmp_path / "r.jsonl")
    assert read_jsonl(tmp_path / "r.jsonl") == ROWS
    assert "choices" not in summarise(four_rows())


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, {"group": 5}, r"r\.jsonl:1: group is 5; wanted str"),
        (0, {"sets": ["first"]}, r"r\.jsonl:1: sets is \['first'\]; wanted an object of texts"),
        (6, {"question": "yes"}, r"r\.jsonl:7: question is 'yes'; wanted bool"),
        (1, {"group": "g9"}, r'r\.jsonl:1: group "g0" has this line alone'),
        (3, {"image": "9.jpg"}, r'r\.jsonl:4: image is "9.jpg", and group "g1" is about "1.jpg"'),
    ],
)
def test_records_of_a_group_that_is_no_choice_are_refused(
    tmp_path: Path, number: int, change: Row, message: str
) -> None:
    write_jsonl([row | change if i == number else row for i, row in enumerate(ROWS)], tmp_path / "r.jsonl")
    with pytest.raises(ValueError, match=message):
        read_jsonl(tmp_path / "r.jsonl")


def test_the_table_and_the_notes_of_the_verdict_have_the_choices() -> None:
    summary = summarise(ROWS)
    lines = table(summary).splitlines()
    start = lines.index(
        "choices: 3 groups of 2 statements about 3 images; right: the true one has the largest P(true), alone"
    )
    assert lines[start + 1].split("  ")[-1].strip() == "pairs right"
    assert lines[start + 2].split() == ["chance", "3", "50.0%", "25.0%"]
    assert lines[start + 3].split()[:3] == ["world", "3", "66.7%"]
    assert lines[start + 3].split()[-2:] == ["1", "100.0%"]
    note = verdict(summary).notes[0]
    assert note.startswith(
        "As 3 choices (chance 50.0 %): 66.7 % against 33.3 % of plain Gemma, +33.3 points (95 %"
    )
