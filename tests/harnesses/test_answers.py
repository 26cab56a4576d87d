"""A checkpoint as harnesses ask it: its answers are those of TheWorld and of an evaluation."""

from typing import Any

import pytest
import torch

from theworld.harnesses.answers import Answers, Asked


def asked(scored: Any, answers: Answers) -> list[Asked]:
    return [Asked((str(scored.images / s.image),), answers.statement(s.caption)) for s in scored.statements]


def test_true_and_false_are_those_of_an_evaluation(scored: Any, answers: Answers) -> None:
    assert answers.is_true(asked(scored, answers)) == [said == 1 for said in scored.said]


def test_a_text_in_the_default_words_is_asked_in_those_of_the_checkpoint(answers: Answers) -> None:
    text = "Statement: The cat is\non the mat.\nAnswer (only '0' or '1'):"
    assert answers.trained(text) == "Is it so? The cat is\non the mat. Say '0' or '1':"
    assert answers.trained("Statement: no more") == "Statement: no more"


def test_the_loss_of_a_continuation_is_the_sum_over_its_tokens(scored: Any, answers: Answers) -> None:
    question, long = asked(scored, answers)[0], "0 The red ball"
    (((short, _), (whole, _)),) = answers.losses([question], [["0", long]])
    tokens = answers.tokenizer(long, add_special_tokens=False)["input_ids"]
    assert len(tokens) > 3
    inputs = answers._inputs([question], [tokens])
    with torch.no_grad():
        logs = answers.model(**inputs).logits[0].log_softmax(-1)
    each = [-logs[-len(tokens) - 1 + i, token].item() for i, token in enumerate(tokens)]
    assert short == pytest.approx(each[0], abs=1e-4)  # sums of float32 in another order
    assert whole == pytest.approx(sum(each), abs=1e-4)


def test_losses_do_not_depend_on_what_is_asked_beside(scored: Any, answers: Answers) -> None:
    questions = [*asked(scored, answers)[:3], Asked((), "What is red? Say it in many words, or in few.")]
    choices = [["0", "1"], ["1"], ["the ball", "0", "a box"], ["0 1", "0"]]
    together = answers.losses(questions, choices)
    for question, own, found in zip(questions, choices, together, strict=True):
        (alone,) = answers.losses([question], [own])
        assert [greedy for _, greedy in found] == [greedy for _, greedy in alone]
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in alone], abs=1e-4)


def test_greedy_is_what_generation_gives(scored: Any, answers: Answers) -> None:
    questions = asked(scored, answers)[:2]
    texts = answers.generate(questions, max_new_tokens=1)
    for found, text in zip(answers.losses(questions, [[t, "ball"] for t in texts]), texts, strict=True):
        assert [greedy for _, greedy in found] == [True, text == "ball"]


def test_leading_spaces_of_a_continuation_are_left_out(scored: Any, answers: Answers) -> None:
    question = asked(scored, answers)[0]
    ((one, other),) = answers.losses([question], [[" 0", "0"]])
    assert one == other
    with pytest.raises(ValueError, match="continuation ' ': no token in it"):
        answers.losses([question], [[" "]])


def test_answers_in_words_are_those_of_theworld(scored: Any, answers: Answers) -> None:
    questions, model = asked(scored, answers), answers.model.theworld
    images, texts = [q.images[0] for q in questions], [q.text for q in questions]
    wanted = model.generate(images, texts, max_new_tokens=5, do_sample=False)
    # As harnesses ask: a temperature of 0 is greedy, and what `generate` does not know is left out.
    options = {"max_new_tokens": 5, "temperature": 0, "top_p": 1.0, "until": ["\n\n"], "num_beams": 1}
    assert answers.generate(questions, **options) == wanted


def test_plain_gemma_is_asked_without_world_tokens(scored: Any, answers: Answers) -> None:
    plain = Answers(str(scored.checkpoint), batch_size=4, enable_world=False)
    assert "world_pixels" not in plain._inputs(asked(scored, answers)[:1], [()])
    wanted = answers.model.theworld.score(
        [q.images[0] for q in asked(scored, answers)],
        [s.caption for s in scored.statements],
        enable_world=False,
    )
    assert plain.is_true(asked(scored, answers)) == [p > 0.5 for p in wanted]


def test_a_batch_has_at_least_one_question(scored: Any) -> None:
    with pytest.raises(ValueError, match="batch_size is 0; give 1 or more"):
        Answers(str(scored.checkpoint), batch_size=0)
