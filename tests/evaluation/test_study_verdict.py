"""What a study shows, from hand-made records of its arms and seeds."""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from records import with_rest
from study_records import NUM, SEEN, STATEMENTS, few_statements, run, study

from theworld.evaluation.comparison import Images, difference_values, estimate, holm
from theworld.evaluation.power import smallest_points
from theworld.evaluation.records import records
from theworld.evaluation.study_summary import learning_curve, summarise_study
from theworld.evaluation.study_verdict import (
    CONTROL_AS_WELL,
    HELPS,
    NO_DIFFERENCE,
    NO_VERDICT,
    PLAIN,
    WORSE,
    Question,
)


@pytest.fixture(scope="module")
def helpful() -> dict:
    """The summary of a study whose world tokens help."""
    return summarise_study(study(0.7) | {PLAIN: {0: run(0.55, 0, "baseline")}})


def outcome(arms: dict[str, dict[int, list]]) -> tuple[str, str]:
    found = summarise_study(arms)["scopes"]["all"]["verdict"]
    return found["kind"], found["sentence"]


def test_world_tokens_that_beat_every_control_help(helpful: dict) -> None:
    verdict = helpful["scopes"]["all"]["verdict"]
    assert verdict["kind"] == HELPS
    assert verdict["sentence"].startswith(
        "The video model helps beyond training alone, the picture's own pixels, an untrained encoder and noise on the "
        "test split of VSR random (600 statements about 300 images; 3 seeds): 70.1 % against 60.3 % of training alone, "
        "+9.7 points (95 % interval +7.6 to +11.8); 70.1 % against "
    )


def test_a_control_that_does_as_well_is_named() -> None:
    kind, sentence = outcome(study(0.7, pixels=0.7, noise=0.78))
    assert kind == CONTROL_AS_WELL
    opening, pixels, noise = (
        sentence.partition("; 3 seeds): ")[0],
        *sentence.partition("; 3 seeds): ")[2].split("; "),
    )
    assert opening == (
        "World tokens help beyond training alone and an untrained encoder, but not beyond the picture's own pixels and "
        "noise, on the test split of VSR random (600 statements about 300 images"
    )
    assert "70.1 % of the picture's own pixels, +0.0 points" in pixels
    assert pixels.endswith(", which is equal within 1.0 points")
    assert noise.endswith("), which does better.")


def test_no_difference_says_what_could_have_been_found() -> None:
    arms = study(0.6)
    summary = summarise_study(arms)
    verdict = summary["scopes"]["all"]["verdict"]
    assert verdict["kind"] == NO_DIFFERENCE
    smallest = summary["scopes"]["all"]["differences"]["prompt"]["accuracy"]["smallest_detectable"]
    assert verdict["sentence"].startswith(
        "No difference that this study could have detected on the test split"
    )
    assert verdict["sentence"].endswith(
        f"; the smallest difference found with 80 % power is {smallest_points(smallest)} points."
    )


def test_arms_that_answer_alike_are_equal_within_the_margin() -> None:
    arms = study(0.6)
    arms["world"] = arms["prompt"]
    _, sentence = outcome(arms)
    assert "+0.0 points (95 % interval +0.0 to +0.0); the two are equal within 1.0 points; the" in sentence
    assert sentence.endswith("the smallest difference found with 80 % power is below 0.1 points.")


def test_worse_than_training_alone_is_worse() -> None:
    kind, sentence = outcome(study(0.5))
    assert kind == WORSE
    assert sentence.startswith("Worse on the test split of VSR random")


def test_two_seeds_give_no_verdict() -> None:
    kind, sentence = outcome(study(0.7, seeds=2))
    assert kind == NO_VERDICT
    assert sentence.startswith(
        "No verdict on the test split of VSR random (600 statements about 300 images; 2 seeds)"
    )
    assert "it takes 3 seeds. So far 69.8 % against" in sentence


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


def explored(accuracies: dict[str, float], baseline: str | None = None, seeds: int = 3) -> dict:
    """The scope of all statements of a study of these arms without a comparison that decides."""
    arms = {name: {s: run(accuracy, s) for s in range(seeds)} for name, accuracy in accuracies.items()}
    names = list(arms)
    question = Question(names[0], names[1], tuple(names[1:]), decides=False, baseline=baseline)
    return summarise_study(arms, question)["scopes"]["all"]


ARMS = {"linear": 0.6, "mlp": 0.7, "conv": 0.7}


def test_a_study_that_fixed_no_comparison_says_which_arms_differ_and_gives_no_verdict() -> None:
    place = "No verdict on the test split of VSR random (600 statements about 300 images; {}): no comparison was fixed "
    verdict = explored(ARMS)["verdict"]
    assert (verdict["kind"], verdict["notes"]) == (NO_VERDICT, ())
    assert verdict["sentence"] == (
        place.format("3 seeds")
        + "before the study ran. In accuracy, corrected for 3 comparisons, mlp is above linear by "
        "9.7 points and conv is above linear by 9.7 points."
    )
    assert explored({"linear": 0.6, "mlp": 0.6})["verdict"]["sentence"].endswith(
        "before the study ran. In accuracy, no two arms are shown to differ."
    )
    same = {"linear": 0.6, "mlp": 0.6, "conv": 0.6}
    assert explored(same, "mlp", seeds=1)["verdict"]["sentence"].endswith(
        "In accuracy, corrected for 2 comparisons, no arm is shown to differ from mlp; of one seed each, so of these "
        "runs alone."
    )
    many = {str(i): 0.5 + 0.1 * i for i in range(4)}
    assert "1 is above 0" not in explored(many)["verdict"]["sentence"]
    assert explored(many)["verdict"]["sentence"].endswith(" points and 3 more pairs differ.")


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


def test_an_arm_of_another_name_is_not_called_the_video_model() -> None:
    arms = study(0.7)
    renamed = {"patch-2": arms["world"], "patch-4": arms["prompt"]}
    found = summarise_study(renamed, Question("patch-2", "patch-4", ("patch-4",)))["scopes"]["all"]["verdict"]
    assert found["sentence"].startswith("patch-2 helps beyond patch-4 on the test split")


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


def test_a_gain_that_only_the_answers_show_may_be_calibration() -> None:
    """The control ranks statements as world does, and says "true" of too few."""
    arms = study(0.7)
    for control in ("prompt", "pixels", "untrained", "noise"):
        for seed, rows in arms["world"].items():
            logits = np.array(
                [[a["logit_0"] + 0.6, a["logit_1"]] for r in rows for a in [r["systems"]["world"]]]
            )
            arms[control][seed] = records(
                STATEMENTS, {"world": with_rest(logits)}, SEEN, dataset="vsr_random", split="test"
            )
    verdict = summarise_study(arms)["scopes"]["all"]["verdict"]
    assert verdict["kind"] == HELPS
    assert verdict["notes"][0] == (
        "AUROC does not show the gain over training alone, the picture's own pixels, an untrained encoder and noise: "
        "it may be one of calibration."
    )


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "again"}, "reference is 'again'; wanted one of prompt, pixels, untrained, noise"),
        ({"metric": "brier"}, "metric is 'brier'; allowed: accuracy, balanced_accuracy, auroc"),
        ({"margin": 0.0}, "alpha is 0.05 and margin 0.0"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Question(**options)
