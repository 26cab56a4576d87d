"""Order and learning rate as pure functions of the step."""

from collections import Counter
from itertools import pairwise

import pytest

from theworld.config.config import Config
from theworld.data.vsr import Statement
from theworld.training.schedule import (
    Order,
    Phase,
    learning_rate,
    num_train_steps,
    num_warmup_steps,
    phase_of,
    phases,
    split,
)


def make(counts: list[int]) -> list[Statement]:
    """One image for each count, with so many statements."""
    pairs = [(f"{i}.jpg", n) for i, count in enumerate(counts) for n in range(count)]
    return [
        Statement(image=i, caption=f"{i} {n}", label=0, relation="on", index=k)
        for k, (i, n) in enumerate(pairs)
    ]


def test_every_epoch_has_every_statement_once_with_those_of_an_image_together() -> None:
    statements = make([2, 1, 3, 1, 2])
    order = Order(statements, seed=0)
    epochs = [order.epoch(n) for n in range(4)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(statements)
        runs = 1 + sum(a.image != b.image for a, b in pairwise(epoch))
        assert runs == 5
    assert len({tuple(s.index for s in epoch) for epoch in epochs}) > 1


def test_the_stream_is_a_pure_function_of_seed_and_position() -> None:
    statements = make([2, 1, 3, 1, 2])
    stream = [s for n in range(3) for s in Order(statements, 5).epoch(n)]
    assert Order(statements, 5).take(4, 17) == stream[4:21]
    assert Order(statements[::-1], 5).take(0, 9)[0].image == stream[0].image
    assert Order(statements, 6).take(0, 27) != stream


def test_a_step_takes_exactly_batch_size_times_accumulation_statements() -> None:
    config = Config(batch_size=8, gradient_accumulation_steps=2, num_epochs=3)
    assert num_train_steps(config, 7680, 16) == 1440
    assert num_train_steps(config, 10, 16) == 2
    assert num_train_steps(Config(batch_size=8, max_steps=7), 7680, 16) == 7


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("cosine", [0.5, 1.0, 1.0, 0.75, 0.25]),
        ("linear", [0.5, 1.0, 1.0, 2 / 3, 1 / 3]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rates_of_five_steps_with_two_of_warm_up(schedule: str, values: list[float]) -> None:
    config = Config(lr_schedule=schedule, warmup_steps=2)
    assert [learning_rate(config, Phase("train", 0, 5, 1.0), step) for step in range(5)] == pytest.approx(
        values
    )


def test_warm_up_is_a_share_of_all_steps_where_no_number_is_given() -> None:
    config = Config(warmup_steps=None, warmup_ratio=0.1, lr_schedule="constant")
    assert [learning_rate(config, Phase("train", 0, 20, 1.0), step) for step in range(3)] == [0.5, 1.0, 1.0]


def test_a_step_splits_into_parts_of_about_equal_work_with_the_statements_of_an_image_together() -> None:
    statements = make([1, 4, 1, 2, 1, 3, 1, 3])
    parts = split(statements, 3, 500, 40)
    assert Counter(s for part in parts for s in part) == Counter(statements)
    images = [{s.image for s in part} for part in parts]
    assert sum(len(i) for i in images) == 8  # so none stands in two parts
    work = [500 * len(i) + 40 * len(part) for i, part in zip(images, parts, strict=True)]
    assert max(work) - min(work) <= 500 + 40
    assert parts == split(statements, 3, 500, 40)
    assert split(statements, 1, 500, 40) == [
        sorted(statements, key=lambda s: (-[1, 4, 1, 2, 1, 3, 1, 3][int(s.image[0])], s.index))
    ]
    assert [len(part) for part in split(make([3]), 2, 500, 40)] == [3, 0]


def test_phases_follow_each_other() -> None:
    config = Config(align_steps=2, statement_steps=3)
    found = [phase_of(phases(config, 9), step) for step in range(9)]
    assert [p.name for p in found] == ["align"] * 2 + ["words"] * 3 + ["train"] * 4
    assert [(p.start, p.stop) for p in found] == [(0, 2)] * 2 + [(2, 5)] * 3 + [(5, 9)] * 4
    assert [p.name for p in phases(Config(), 9)] == ["train"]


def test_a_phase_has_its_learning_rate_and_loss_weights() -> None:
    config = Config(align_steps=2, align_learning_rate=0.5, statement_steps=3, relation_loss_weight=0.25)
    weights = {"statement_loss_weight": 0.0, "relation_loss_weight": 0.25}
    align, words, train = phases(config, 9)
    assert (align.peak_learning_rate, align.loss_weights, align.word_losses) == (0.5, {}, [])
    assert words.loss_weights == weights | {"label_loss_weight": 0.0}
    assert train.loss_weights == weights | {"label_loss_weight": 1.0}
    assert words.word_losses == train.word_losses == ["relation"]
    assert words.peak_learning_rate == train.peak_learning_rate == config.learning_rate


def test_without_a_weight_of_words_the_phase_of_words_reads_statements() -> None:
    words, train = phases(Config(statement_steps=3), 9)
    assert words.word_losses == ["statement"]
    assert words.loss_weights["statement_loss_weight"] == 1.0
    assert train.word_losses == []


def test_the_warm_up_is_a_number_or_a_share() -> None:
    assert num_warmup_steps(Config(warmup_steps=7), 100) == 7
    assert num_warmup_steps(Config(warmup_ratio=0.03), 110) == 4
