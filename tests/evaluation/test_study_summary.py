"""The figures of a study, from hand-made records of its arms and seeds."""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from study_records import ARMS, NUM, explored, few_statements, run, single_image, study

from theworld.evaluation.comparison import Images, difference_values, estimate, holm
from theworld.evaluation.study_summary import learning_curve, summarise_study
from theworld.evaluation.study_verdict import NO_VERDICT, PLAIN, Question


def test_no_figure_is_beyond_what_can_be_where_two_seeds_of_few_statements_lie_apart() -> None:
    arms = few_statements()
    question = Question("world", "prompt", ("prompt",))
    summary = summarise_study(arms, question)
    assert list(summary["scopes"]) == ["all"]  # a single unseen image has no interval
    scope = summary["scopes"]["all"]
    for metric in ("accuracy", "balanced_accuracy", "auroc"):
        test = scope["differences"]["prompt"][metric]
        assert (test["low"], test["high"]) == (-1.0, 1.0), metric
        assert -1 <= test["bootstrap_low"] <= test["bootstrap_high"] <= 1
        assert test["smallest_detectable"] == 1.0
        for arm in ("world", "prompt"):
            assert 0 <= scope["arms"][arm][metric]["low"] <= scope["arms"][arm][metric]["high"] <= 1
    assert "(95 % interval −100.0 to +100.0)" in scope["verdict"]["sentence"]
    explores = replace(question, decides=False)
    (pair,) = summarise_study(arms, explores)["scopes"]["all"]["pairs"]
    assert (pair["auroc"]["low"], pair["auroc"]["high"]) == (-1.0, 1.0)
    (curve,) = learning_curve({1.0: arms}, {1.0: 6}, question)
    assert (curve["differences"]["prompt"]["low"], curve["differences"]["prompt"]["high"]) == (-1.0, 1.0)


def test_pairs_are_every_two_arms_or_each_and_the_baseline_corrected_for_their_number() -> None:
    pairs = explored(ARMS)["pairs"]
    assert [(pair["first"], pair["second"]) for pair in pairs] == [
        *(("mlp", "linear"), ("conv", "linear"), ("conv", "mlp"))
    ]
    found = pairs[0]["accuracy"]
    rights = {
        name: np.array([[row["systems"]["world"]["correct"] for row in run(ARMS[name], s)] for s in range(3)])
        for name in ("mlp", "linear")
    }
    images = Images.of([row["image"] for row in run(0.6, 0)])
    alone = estimate(rights["mlp"].astype(float) - rights["linear"], images)
    assert found["difference"] == pytest.approx(alone.value)
    assert (found["low"], found["high"]) == pytest.approx(alone.interval(0.05 / 3))
    p_values = [pair["accuracy"]["p_value"] for pair in pairs]
    assert found["p_value"] == pytest.approx(alone.p_value())
    assert [pair["accuracy"]["adjusted_p_value"] for pair in pairs] == holm(p_values)
    assert pairs[0].keys() == {"first", "second", "accuracy", "balanced_accuracy", "auroc"}

    pairs = explored(ARMS, "mlp")["pairs"]
    assert [(pair["first"], pair["second"]) for pair in pairs] == [("linear", "mlp"), ("conv", "mlp")]
    assert pairs[0]["accuracy"]["low"] == pytest.approx(-alone.interval(0.05 / 2)[1])
    assert "pairs" not in summarise_study(study(0.7))["scopes"]["all"]


def test_a_learning_curve_has_every_arm_on_every_share() -> None:
    shares = {1.0: study(0.7), 0.1: study(0.62)}
    curve = learning_curve(shares, {1.0: 6000, 0.1: 600}, Question())
    assert [(one["share"], one["training_statements"]) for one in curve] == [(0.1, 600), (1.0, 6000)]
    for one in curve:
        whole = summarise_study(shares[one["share"]])["scopes"]["all"]
        assert one["arms"] == whole["arms"]
        for control, test in one["differences"].items():
            own = whole["differences"][control]["accuracy"]
            assert {k: test[k] for k in ("difference", "low", "high", "p_value", "each")} == {
                k: own[k] for k in ("difference", "low", "high", "p_value", "each")
            }
    tests = [test for one in curve for test in one["differences"].values()]
    assert [test["adjusted_p_value"] for test in tests] == holm([test["p_value"] for test in tests])


def test_unseen_images_have_their_own_verdict(helpful: dict) -> None:
    scopes = helpful["scopes"]
    assert {name: (s["statements"], s["images"]) for name, s in scopes.items()} == {
        "all": (600, 300),
        "unseen": (300, 150),
    }
    place = "(300 statements about 150 images, those whose image is not in the training set; 3 seeds)"
    assert place in scopes["unseen"]["verdict"]["sentence"]


def test_a_study_whose_images_are_all_unseen_has_one_scope() -> None:
    arms = study(0.7, seeds=1)
    for runs in arms.values():
        for row in runs[0]:
            row["image_seen_in_train"] = False
    assert list(summarise_study(arms)["scopes"]) == ["all"]


def test_the_figures_are_those_of_the_comparison(helpful: dict) -> None:
    arms, summary = study(0.7), helpful
    assert json.loads(json.dumps(summary))["seeds"] == [0, 1, 2]
    scope = summary["scopes"]["all"]
    assert list(scope["arms"]) == ["world", "prompt", "pixels", "untrained", "noise", PLAIN]
    assert list(scope["arms"][PLAIN]["accuracy"]["each"]) == [""]
    assert scope["arms"][PLAIN]["accuracy"]["sd"] is None
    margins = {
        arm: np.array(
            [
                [r["systems"]["world"]["logit_1"] - r["systems"]["world"]["logit_0"] for r in rows]
                for rows in of.values()
            ]
        )
        for arm, of in arms.items()
    }
    labels, images = np.arange(NUM) % 2, Images.of(np.arange(NUM) // 2)
    for metric in ("accuracy", "balanced_accuracy", "auroc"):
        wanted = estimate(difference_values(metric, margins["world"], margins["noise"], labels), images)
        found = scope["differences"]["noise"][metric]
        assert (found["difference"], found["low"], found["high"]) == pytest.approx(
            (wanted.value, *wanted.interval())
        )
        assert list(found["each"].values()) == pytest.approx(wanted.each)
        assert found["bootstrap_low"] < found["difference"] < found["bootstrap_high"]
    each = scope["differences"]["noise"]["by_seed"]["0"]
    assert each["difference"] == pytest.approx((each["only_first"] - each["only_second"]) / NUM)
    assert set(scope["differences"]) == {"prompt", "pixels", "untrained", "noise", PLAIN}


def test_groups_are_adjusted_for_their_number_and_small_ones_have_no_interval() -> None:
    arms = study(0.7)
    for runs in arms.values():
        for rows in runs.values():
            for row in rows[:3]:
                row["relation"] = "beneath"
    groups = summarise_study(arms)["groups"]["by_relation"]
    assert {g["group"]: g["statements"] for g in groups} == {"beneath": 3, "left of": 199, "near": 398}
    tests = [test for group in groups for test in group["differences"].values()]
    smallest = min(tests, key=lambda test: test["p_value"])
    assert smallest["adjusted_p_value"] == pytest.approx(12 * smallest["p_value"])
    few = groups[0]["differences"]["prompt"]
    assert (few["low"], few["high"]) == (None, None)
    assert few["p_value"] >= 0.5  # two images: no sign test of them can say more
    assert groups[1]["differences"]["prompt"]["low"] is not None


def without_seed(arms: dict) -> None:
    del arms["noise"][1]


def without_arm(arms: dict) -> None:
    del arms["pixels"]


def other_statements(arms: dict) -> None:
    arms["noise"][1] = arms["noise"][1][1:]


def other_condition(arms: dict) -> None:
    arms["noise"][2] = run(0.6, 2, "baseline")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_seed, "the arm noise has the seeds 0, 2; world has 0, 1, 2"),
        (without_arm, "the study has no arm pixels; it has world, prompt, untrained, noise"),
        (
            other_statements,
            r"the arm noise, seed 1, are of other statements \(599\) than .* world, seed 0 \(600\)",
        ),
        (other_condition, "the arm noise, seed 2, have the conditions baseline; wanted world"),
    ],
)
def test_arms_that_do_not_fit_are_named(damage: Callable[[dict], None], message: str) -> None:
    arms = study(0.7)
    damage(arms)
    with pytest.raises(ValueError, match=message):
        summarise_study(arms)


def test_a_study_of_a_single_image_has_accuracies_no_interval_and_no_verdict() -> None:
    arms, question = single_image(), Question("world", "prompt", ("prompt",))
    summary = summarise_study(arms, question)
    json.dumps(summary, allow_nan=False)
    scope = summary["scopes"]["all"]
    assert scope["verdict"]["kind"] == NO_VERDICT
    assert scope["verdict"]["sentence"] == (
        "No verdict on the test split of VSR random (6 statements about 1 image; 2 seeds): it takes two images. So far "
        "83.3 % against 33.3 % of training alone, +50.0 points (no interval over a single image)."
    )
    assert scope["arms"]["world"]["accuracy"]["each"] == {"0": 1.0, "1": 4 / 6}
    for metric in ("accuracy", "balanced_accuracy", "auroc"):
        test = scope["differences"]["prompt"][metric]
        assert [test[key] for key in ("low", "high", "p_value", "within_margin")] == [-1.0, 1.0, 1.0, False]
        assert (test["bootstrap_low"], test["bootstrap_high"], test["smallest_detectable"]) == (
            -1.0,
            1.0,
            1.0,
        )
    (curve,) = learning_curve({1.0: arms}, {1.0: 6}, question)
    assert curve["differences"]["prompt"]["adjusted_p_value"] == 1.0
    explores = summarise_study(arms, replace(question, decides=False))["scopes"]["all"]
    assert explores["pairs"][0]["accuracy"]["adjusted_p_value"] == 1.0
    assert explores["verdict"]["sentence"].endswith(
        "In accuracy, no two arms are shown to differ; no interval over a single image, so none could be."
    )


def test_statements_of_one_label_have_accuracy_alone_and_no_other_metric_decides() -> None:
    arms = {
        arm: {seed: [row for row in rows if row["label"]] for seed, rows in own.items()}
        for arm, own in few_statements().items()
    }
    question = Question("world", "prompt", ("prompt",))
    assert list(summarise_study(arms, question)["scopes"]["all"]["arms"]["world"]) == ["accuracy"]
    with pytest.raises(
        ValueError, match=r"^auroc needs true and false statements; all 3 have the same label$"
    ):
        summarise_study(arms, replace(question, metric="auroc"))
