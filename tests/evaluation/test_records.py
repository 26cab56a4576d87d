"""Records: what they hold, what is refused, and that they read back equal."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from records import four_rows, statement

from theworld.evaluation.metrics import summarise, write_summary
from theworld.evaluation.records import read_jsonl, records, write_jsonl


def test_a_record_holds_the_answer_under_each_condition() -> None:
    logits = {"world": np.array([[1.0, 3.0, 3.5], [0.5, 0.5, 0.5 + math.log(2)]])}
    asked = [statement(0, "a", 1), statement(7, "b", 0, "near")]
    rows = records(asked, logits, {"b"}, {("b", "caption 7")}, "vsr_random", "test")
    assert rows[0] == {
        "index": 0,
        "image": "a",
        "statement": "caption 0",
        "relation": "left of",
        "category": "projective",
        "label": 1,
        "dataset": "vsr_random",
        "release": "vsr_random",
        "split": "test",
        "image_seen_in_train": False,
        "statement_in_train": False,
        "systems": {
            "world": {
                "logit_0": 1.0,
                "logit_1": 3.0,
                "logsumexp": 3.5,
                "p_true": 1 / (1 + math.exp(-2)),
                "outside": pytest.approx(1 - math.exp(-2.5) - math.exp(-0.5)),
                "correct": True,
            },
        },
    }
    # Equal logits mean false. Two tokens with all of the probability leave none to other tokens.
    assert rows[1]["systems"]["world"]["p_true"] == 0.5
    assert rows[1]["systems"]["world"]["correct"] is True
    assert rows[1]["systems"]["world"]["outside"] == pytest.approx(0, abs=1e-12)
    assert rows[1]["image_seen_in_train"] is True
    assert rows[1]["statement_in_train"] is True


@pytest.mark.parametrize(
    ("answer", "shown"), [([np.nan, 1, 2], "nan, 1.0"), ([1, 2, np.inf], "a logsumexp of inf")]
)
def test_logits_that_are_not_finite_are_refused(answer: list[float], shown: str) -> None:
    with pytest.raises(ValueError, match=rf"world: statement 3 \(a\) has logits .*{shown}"):
        records([statement(3, "a", 1)], {"world": np.array([answer])}, set())


def test_records_read_back_equal_and_give_the_same_summary(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    rows = four_rows()
    rows[0]["statement"] = "a line separator \u2028 and a\rreturn"
    write_jsonl(rows, path)
    assert len(path.read_bytes().splitlines()) == 4
    assert read_jsonl(path) == rows
    assert write_summary(read_jsonl(path), path) == summarise(rows)
    path.write_bytes(b"\xef\xbb\xbf\n" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert read_jsonl(path) == rows
    saved = json.loads((tmp_path / "new" / "results.summary.json").read_text())
    assert saved == json.loads(json.dumps(summarise(rows)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("label"), "results.jsonl:2: label is None; wanted int"),
        (lambda r: r.update(label=2), "results.jsonl:2: label is 2; wanted 0 or 1"),
        (lambda r: r.update(image="\ud83d"), "results.jsonl:2: image is '\\ud83d', which holds half a"),
        (lambda r: r.update(image_seen_in_train="no"), "image_seen_in_train is 'no'; wanted bool"),
        (lambda r: r.pop("systems"), "results.jsonl:2: has no answers under 'systems'"),
        (lambda r: r["systems"].pop("world"), "has the conditions baseline; line 1 has world, baseline"),
        (lambda r: r["systems"]["world"].update(logit_1="x"), "world has logit_0, logit_1, logsumexp"),
        (
            lambda r: r["systems"]["world"].update(correct=False),
            "world has correct False; its logits and label give True",
        ),
        (lambda r: r["systems"]["world"].pop("outside"), "world has outside None"),
        (lambda r: r.update(index=0), "results.jsonl:2: is statement 0, as line 1 is; remove one"),
    ],
)
def test_a_damaged_record_is_refused_naming_line_and_field(
    tmp_path: Path, change: object, message: str
) -> None:
    rows = four_rows()
    change(rows[1])  # type: ignore[operator]
    write_jsonl(rows, tmp_path / "results.jsonl")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_jsonl(tmp_path / "results.jsonl")


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("{}x\n")
    with pytest.raises(
        ValueError, match=r"r\.jsonl:1:3: Extra data; wanted one record of tools/eval.py a line"
    ):
        read_jsonl(tmp_path / "r.jsonl")
    (tmp_path / "r.jsonl").write_text("{}", encoding="utf-16")
    with pytest.raises(ValueError, match=r"r\.jsonl: is UTF-16"):
        read_jsonl(tmp_path / "r.jsonl")
    (tmp_path / "r.jsonl").write_text("")
    with pytest.raises(ValueError, match="no statements"):
        read_jsonl(tmp_path / "r.jsonl")
