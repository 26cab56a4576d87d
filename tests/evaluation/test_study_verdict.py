"""What the figures of a study say, in words."""

import numpy as np
import pytest
from records import with_rest
from study_records import ARMS, SEEN, STATEMENTS, explored, study

from theworld.evaluation.power import smallest_points
from theworld.evaluation.records import records
from theworld.evaluation.study_summary import summarise_study
from theworld.evaluation.study_verdict import (
    CONTROL_AS_WELL,
    HELPS,
    NO_DIFFERENCE,
    NO_VERDICT,
    WORSE,
    Question,
    point_words,
)


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


def test_an_arm_of_another_name_is_not_called_the_video_model() -> None:
    arms = study(0.7)
    renamed = {"patch-2": arms["world"], "patch-4": arms["prompt"]}
    found = summarise_study(renamed, Question("patch-2", "patch-4", ("patch-4",)))["scopes"]["all"]["verdict"]
    assert found["sentence"].startswith("patch-2 helps beyond patch-4 on the test split")


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


def test_a_margin_is_in_percentage_points() -> None:
    margins = [point_words(points) for points in (1.0, 0.5, 100 * 0.02)]
    assert margins == ["1 percentage point", "0.5 percentage points", "2 percentage points"]


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
