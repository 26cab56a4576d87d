"""Records, and metrics from them, against values worked out by hand."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from records import four_rows, statement, with_rest

from theworld.evaluation.conditions import checkpoint_of, checkpoints_in, condition_type, find_condition
from theworld.evaluation.metrics import (
    accuracy,
    calibration_bins,
    cluster_bootstrap,
    find_pair,
    mcnemar,
    probability_metrics,
    summarise,
    write_summary,
)
from theworld.evaluation.records import read_jsonl, records, write_jsonl
from theworld.evaluation.tables import table


def test_wilson_interval_of_7_of_10() -> None:
    # Centre (p + z²/2n) / (1 + z²/n), half-width z sqrt(p(1-p)/n + z²/4n²) / (1 + z²/n), z = 1.959964, p = 0.7, n = 10
    score = accuracy([True] * 7 + [False] * 3)
    assert score["n"] == 10
    assert score["accuracy"] == 0.7
    assert score["low"] == pytest.approx(0.396775, abs=1e-5)
    assert score["high"] == pytest.approx(0.892209, abs=1e-5)


def test_exact_mcnemar_of_8_against_2() -> None:
    # two-sided binomial: 2 (C(10,0) + C(10,1) + C(10,2)) / 2^10 = 2 x 56 / 1024
    first = [True] * 8 + [False] * 2 + [True] * 5 + [False] * 5
    second = [False] * 8 + [True] * 2 + [True] * 5 + [False] * 5
    assert mcnemar(first, second) == {"only_first": 8, "only_second": 2, "p_value": pytest.approx(0.109375)}
    assert mcnemar(first, first) == {"only_first": 0, "only_second": 0, "p_value": 1.0}


def test_the_metrics_of_four_probabilities() -> None:
    labels = np.array([1, 0, 1, 0])
    margin = np.array([3.0, 2.0, 1.0, -1.0])
    p_true = np.array([0.9, 0.8, 0.6, 0.3])
    found = probability_metrics(labels, p_true, margin)
    assert found["says_true"] == 0.75
    assert found["balanced_accuracy"] == 0.75  # 2 of 2 true statements, 1 of 2 false ones
    assert (
        found["auroc"] == 0.75
    )  # of four pairs of a true and a false statement only 1 against 2 is the wrong way
    assert found["brier"] == pytest.approx((0.01 + 0.64 + 0.16 + 0.09) / 4)
    # 0.9, 0.8, 0.6 and 0.3 are the lower ends of four bins, so each stands alone
    assert found["calibration_error"] == pytest.approx((0.1 + 0.8 + 0.4 + 0.3) / 4)


def test_balanced_accuracy_and_auroc_are_none_if_all_labels_are_equal() -> None:
    found = probability_metrics(np.array([1, 1]), np.array([0.9, 0.2]), np.array([2.0, -1.5]))
    assert found["balanced_accuracy"] is None
    assert found["auroc"] is None
    assert found["brier"] == pytest.approx((0.01 + 0.64) / 2)


def test_auroc_ranks_by_logits_where_probabilities_round_to_one() -> None:
    found = probability_metrics(np.array([1, 0]), np.array([1.0, 1.0]), np.array([60.0, 50.0]))
    assert found["auroc"] == 1.0


def test_the_calibration_bins_of_four_probabilities() -> None:
    bins = calibration_bins(np.array([0, 1, 1, 1]), np.array([0.05, 0.07, 0.95, 1.0]))
    assert [(b["from"], b["to"], b["n"]) for b in bins] == [(0.0, 0.1, 2), (0.9, 1.0, 2)]
    assert [b["p_true"] for b in bins] == pytest.approx([0.06, 0.975])
    assert [b["true"] for b in bins] == [0.5, 1.0]
    # Wilson of 1 of 2: (0.5 + z²/4) / (1 + z²/2) ± ..., which is 0.0945 to 0.9055
    assert (bins[0]["low"], bins[0]["high"]) == pytest.approx((0.094529, 0.905471), abs=1e-5)
    found = probability_metrics(
        np.array([0, 1, 1, 1]), np.array([0.05, 0.07, 0.95, 1.0]), np.array([-3, -2, 3, 9.0])
    )
    assert found["calibration_error"] == pytest.approx(0.5 * 0.44 + 0.5 * 0.025)


def test_the_bootstrap_draws_all_statements_of_an_image_together() -> None:
    # Drawn twice with replacement: a and a (all right), b and b (all wrong), or one of each; a quarter is more than
    # 2.5 %, so the interval is all there is.
    images = ["a", "a", "a", "b"]
    right = np.array([[1, 1, 1, 0.0]])
    assert cluster_bootstrap(images, right) == [(0.0, 1.0)]
    assert cluster_bootstrap(images, np.array([[1, 1, 1, 1.0]])) == [(1.0, 1.0)]


def test_repeating_the_statements_of_each_image_does_not_narrow_the_bootstrap_interval() -> None:
    right = np.random.default_rng(1).integers(0, 2, 60).astype(float)
    images = [f"{i}.jpg" for i in range(60)]
    once, *_ = cluster_bootstrap(images, right[None])
    twice, *_ = cluster_bootstrap(images * 2, np.tile(right, 2)[None])
    assert once == twice
    other, *_ = cluster_bootstrap([f"{i}.jpg" for i in range(120)], np.tile(right, 2)[None])
    assert other is not None
    assert once is not None
    assert other[1] - other[0] < 0.8 * (once[1] - once[0])


def test_the_bootstrap_of_several_quantities_equals_that_of_each_alone() -> None:
    values = np.random.default_rng(2).integers(-1, 2, (3, 40)).astype(float)
    images = [str(i % 25) for i in range(40)]
    assert cluster_bootstrap(images, values) == [cluster_bootstrap(images, row[None])[0] for row in values]


def test_the_bootstrap_of_one_image_has_no_interval() -> None:
    assert cluster_bootstrap(["a", "a"], np.array([[1.0, 0.0], [1.0, 1.0]])) == [None, None]
    assert cluster_bootstrap(["a", "b"], np.zeros((0, 2))) == []


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


def test_the_summary_of_four_statements() -> None:
    summary = summarise(four_rows())
    assert summary["statements"] == 4
    assert summary["images"] == 2
    assert summary["majority_class"] == 0.75
    assert summary["systems"]["world"]["accuracy"] == 0.75
    assert summary["systems"]["baseline"]["accuracy"] == 0.5
    assert summary["world_against"] == {"baseline": {"only_first": 2, "only_second": 1, "p_value": 1.0}}
    by_relation = {k: (v["world"]["n"], v["world"]["accuracy"]) for k, v in summary["by_relation"].items()}
    assert by_relation == {"near": (1, 1.0), "on": (2, 1.0), "x": (1, 0.0)}
    by_category = {k: v["baseline"]["accuracy"] for k, v in summary["by_category"].items()}
    assert by_category == {"proximity": 0.0, "topological": 0.5, "unknown": 1.0}
    assert {k: v["world"]["n"] for k, v in summary["by_seen"].items()} == {"False": 2, "True": 2}


def test_each_pair_has_its_difference_interval_and_discordant_counts() -> None:
    summary = summarise(four_rows())
    (pair,) = summary["pairs"]
    # Image 0: world 2 of 2, baseline 1 of 2; image 1: 1 of 2 each. So 0.5, 0.25 or 0 when images are drawn again.
    assert pair == {
        "first": "world",
        "second": "baseline",
        "n": 4,
        "difference": 0.25,
        "low": 0.0,
        "high": 0.5,
        "only_first": 2,
        "only_second": 1,
        "p_value": 1.0,
    }
    world, baseline = summary["systems"]["world"], summary["systems"]["baseline"]
    assert (world["image_low"], world["image_high"]) == (0.5, 1.0)
    assert (baseline["image_low"], baseline["image_high"]) == (0.5, 0.5)
    seen, unseen = summary["gain_by_seen"]["True"], summary["gain_by_seen"]["False"]
    assert [(p["n"], p["difference"], p["low"]) for p in (*seen, *unseen)] == [(2, 0.0, None), (2, 0.5, None)]
    turned = find_pair(summary["pairs"], "baseline", "world")
    assert turned is not None
    assert (turned["difference"], turned["low"], turned["high"]) == (-0.25, -0.5, 0.0)
    assert (turned["only_first"], turned["only_second"]) == (1, 2)
    assert find_pair(summary["pairs"], "world", "zero") is None


def test_the_summary_has_the_other_token_probability() -> None:
    world = summarise(four_rows())["systems"]["world"]
    assert world["outside_mean"] == pytest.approx(0.5)
    assert world["outside_max"] == pytest.approx(0.5)
    assert world["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert world["says_true"] == 0.5


def test_the_checkpoint_stands_before_the_condition() -> None:
    conditions = ["a:world", "baseline", "a/b:world", "a/b:zero"]
    assert checkpoints_in(conditions) == ["a", "a/b"]
    assert checkpoints_in(["world", "baseline"]) == [""]
    assert (checkpoint_of("a/b:zero"), condition_type("a/b:zero")) == ("a/b", "zero")
    assert (checkpoint_of("zero"), condition_type("zero")) == ("", "zero")
    assert find_condition(conditions, "a", "world") == "a:world"
    assert find_condition(conditions, "a", "baseline") == "baseline"
    assert find_condition(conditions, "a", "zero") is None


def three_seeds() -> list[dict]:
    statements = [statement(i, f"{i}.jpg", 1) for i in range(4)]
    right, wrong = [0.0, 1.0], [1.0, 0.0]
    hits = {"s0:world": 4, "s1:world": 3, "s2:world": 2, "baseline": 1}
    answers = {s: with_rest(np.array([right] * n + [wrong] * (4 - n))) for s, n in hits.items()}
    return records(statements, answers, set())


def test_the_spread_over_checkpoints_is_mean_sample_deviation_and_each() -> None:
    found = summarise(three_seeds())["checkpoints"]
    assert set(found) == {"world", "gain"}  # a shared condition has no spread
    assert found["world"] == {
        "each": {"s0": 1.0, "s1": 0.75, "s2": 0.5},
        "mean": 0.75,
        "sd": pytest.approx(0.25),
    }
    assert found["gain"] == {
        "each": {"s0": 0.75, "s1": 0.5, "s2": 0.25},
        "mean": 0.5,
        "sd": pytest.approx(0.25),
    }
    assert summarise(four_rows())["checkpoints"] == {}
    assert "  world                   75.0%   25.0%  s0 100.0%, s1 75.0%, s2 50.0%" in table(
        summarise(three_seeds())
    )


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


def test_the_table_marks_groups_of_few_statements() -> None:
    text = table(summarise(four_rows()))
    assert "majority class" in text
    assert "2 right only with world tokens, 1 only without, p = 1" in text
    assert "  on                         2  100.0% / 50.0%  (few)" in text


def test_no_statements_are_refused() -> None:
    with pytest.raises(ValueError, match="no statements"):
        summarise([])
