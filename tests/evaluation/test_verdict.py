"""Each verdict, from records made for it."""

import numpy as np
import pytest
from records import statement, with_rest

from theworld.evaluation.metrics import summarise
from theworld.evaluation.records import records
from theworld.evaluation.verdict import (
    HELPS,
    HURTS,
    NO_EVIDENCE,
    NOT_THE_WORLD,
    UNCONTROLLED,
    UNTESTED,
    Verdict,
    verdict,
)

N = 200


def judged(seen: int = 0, trained: int = 0, n: int = N, labels: str = "both", **hits: int) -> Verdict:
    """Return the verdict on `n` statements about one image each. `hits`: right answers, the first ones."""
    asked = [statement(i, f"{i:03}.jpg", i % 2 if labels == "both" else 1) for i in range(n)]
    answers = {}
    for condition, count in hits.items():
        says = [s.label if i < count else 1 - s.label for i, s in enumerate(asked)]
        answers[condition.replace("__", ":")] = with_rest(np.array([[1.0 - x, float(x)] for x in says]))
    in_train = {(s.image, s.caption) for s in asked[:trained]}
    return verdict(summarise(records(asked, answers, {s.image for s in asked[n - seen :]}, in_train)))


def test_helps_if_neither_control_reproduces_the_gain() -> None:
    found = judged(world=180, baseline=140, zero=138, shuffled=100)
    assert found.kind == HELPS
    # 40 statements only with world tokens: p = 2 / 2^40. The interval: a share of 0.2 of 200 is ± 1.96 x 2.83 points,
    # in steps of half a point.
    assert found.sentence == (
        "World tokens help: 90.0 % against 70.0 % of plain Gemma, +20.0 points (95 % interval +14.5 to +26.0, exact "
        "McNemar p = 1.8e-12); another image's latents (50.0 %) and zero latents (69.0 %) do not reproduce the gain."
    )
    assert found.notes == ()


def test_the_part_of_the_gain_that_a_control_keeps_is_named() -> None:
    found = judged(world=180, baseline=140, zero=150, shuffled=100)
    assert found.kind == HELPS
    assert found.sentence.endswith(
        "; another image's latents (50.0 %) do not reproduce the gain, zero latents (75.0 %) keep +5.0 points of it."
    )


def test_not_the_world_if_zero_latents_help_as_much() -> None:
    found = judged(world=180, baseline=140, zero=179, shuffled=100)
    assert found.kind == NOT_THE_WORLD
    assert "but zero latents (89.5 %) help as much (+0.5 points with world tokens, " in found.sentence
    assert found.sentence.endswith("exact McNemar p = 1).")
    assert found.notes == ("Another image's latents (50.0 %) do not reproduce the gain.",)


def test_not_the_world_if_another_images_latents_help_more() -> None:
    found = judged(world=180, baseline=140, zero=100, shuffled=190)
    assert found.kind == NOT_THE_WORLD
    assert "another image's latents (95.0 %) help as much (−5.0 points with world tokens" in found.sentence


def test_a_control_that_is_not_shown_to_do_less_is_not_called_as_good() -> None:
    found = judged(world=147, baseline=140, zero=143, shuffled=100)
    assert found.kind == NOT_THE_WORLD
    assert (
        "but zero latents (71.5 %) are not shown to do less (+2.0 points with world tokens, "
        in found.sentence
    )


def test_a_trained_gemma_without_world_tokens_is_a_control_too() -> None:
    found = judged(world=180, baseline=140, zero=138, shuffled=100, without=178)
    assert found.kind == NOT_THE_WORLD
    assert (
        "but the trained Gemma's answers without world tokens (89.0 %) help as much (+1.0 points with world tokens"
        in found.sentence
    )
    better = judged(world=180, baseline=140, zero=138, shuffled=100, without=150)
    assert better.kind == HELPS
    assert better.sentence.endswith(
        "another image's latents (50.0 %) and zero latents (69.0 %) do not reproduce the gain, the trained "
        "Gemma's answers without world tokens (75.0 %) keep +5.0 points of it."
    )
    assert judged(world=180, baseline=140, zero=100, without=100).kind == UNCONTROLLED


def test_without_controls_the_cause_of_the_gain_is_open() -> None:
    found = judged(world=180, baseline=140, zero=100)
    assert found.kind == UNCONTROLLED
    assert found.sentence.endswith("is open: another image's latents were not evaluated.")
    both = judged(world=180, baseline=140)
    assert both.sentence.endswith("is open: another image's latents and zero latents were not evaluated.")


def test_no_evidence() -> None:
    found = judged(world=142, baseline=140, zero=100, shuffled=100)
    assert found.kind == NO_EVIDENCE
    assert found.sentence.startswith(
        "No evidence that world tokens help: 71.0 % against 70.0 % of plain Gemma, +1.0 points"
    )
    assert judged(world=140, baseline=140).kind == NO_EVIDENCE


def test_hurts() -> None:
    found = judged(world=120, baseline=140, zero=140, shuffled=100)
    assert found.kind == HURTS
    assert found.sentence.startswith("World tokens hurt: 60.0 % against 70.0 % of plain Gemma, −10.0 points")
    assert "95 % interval −14.5 to −6.0" in found.sentence


@pytest.mark.parametrize("missing", ["world", "baseline"])
def test_not_tested(missing: str) -> None:
    hits = {s: 100 for s in ("world", "baseline", "zero") if s != missing}
    assert (
        judged(**hits).sentence
        == f"Whether world tokens help is not tested: {missing} is not among the conditions."
    )
    assert judged(**hits).kind == UNTESTED


def test_a_single_image_is_no_evidence() -> None:
    asked = [statement(i, "only.jpg", 1) for i in range(50)]
    answers = {
        "world": with_rest(np.tile([0.0, 1.0], (50, 1))),
        "baseline": with_rest(np.tile([1.0, 0.0], (50, 1))),
    }
    found = verdict(summarise(records(asked, answers, set())))
    assert found.kind == NO_EVIDENCE
    assert "no interval over a single image" in found.sentence


def test_notes_name_training_overlap_majority_class_and_few_statements() -> None:
    found = judged(seen=120, trained=30, world=180, baseline=140, zero=138, shuffled=100)
    assert found.notes == (
        # The first 80 statements are right with either.
        "On the 80 statements about images that are not in the training set: +0.0 points (95 % interval +0.0 to "
        "+0.0, exact McNemar p = 1).",
        "30 of the 200 statements are in the training set: these are not results on held-out statements.",
    )
    poor = judged(n=20, labels="true", world=16, baseline=10)
    assert poor.notes == (
        "With world tokens the accuracy is not above that of always giving the more frequent answer (100.0 %).",
        "20 statements are few: the intervals are wide.",
    )


def test_a_note_names_a_large_other_token_probability() -> None:
    asked = [statement(i, f"{i}.jpg", 1) for i in range(40)]
    answers = {s: np.tile([0.0, 1.0, 4.0], (40, 1)) for s in ("world", "baseline")}
    notes = verdict(summarise(records(asked, answers, set()))).notes
    assert any(
        n.startswith("The mean other-token probability is above one half (world, baseline)") for n in notes
    )


def test_several_checkpoints_have_a_common_sentence_and_one_each() -> None:
    hits = {"zero": 138, "shuffled": 100}
    each = {f"{m}__{s}": n for m in ("s0", "s1") for s, n in hits.items()}
    found = judged(s0__world=180, s1__world=190, baseline=140, **each)
    assert found.kind == HELPS
    assert found.sentence == (
        "World tokens help, and the controls do not reproduce the gain, in each of 2 checkpoints: +22.5 points over "
        "plain Gemma on average (standard deviation 3.5, from +20.0 points to +25.0 points)."
    )
    assert [note[:27] for note in found.notes] == [
        "s0: World tokens help: 90.0",
        "s1: World tokens help: 95.0",
    ]
    mixed = judged(s0__world=180, s1__world=140, baseline=140, **each)
    assert mixed.kind == "mixed"
    assert mixed.sentence == "The 2 checkpoints do not agree: s0 helps, s1 no evidence."
