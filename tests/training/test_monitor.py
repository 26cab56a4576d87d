"""When a loss counts as at chance, and what is said of it."""

import math

import pytest

from theworld.config.config import Config
from theworld.training.monitor import (
    LossMonitor,
    below_chance_from,
    chance_loss,
    loss_window,
    warning,
    what_to_try,
    window_size,
)

LN2 = math.log(2)


def test_chance_is_the_entropy_of_the_labels() -> None:
    assert chance_loss([0, 1, 1, 0]) == pytest.approx(LN2)
    assert chance_loss([1, 1, 1, 0]) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert chance_loss([1, 1]) == 0


def test_a_window_is_read_with_three_standard_errors() -> None:
    reading = loss_window([0.6, 0.7, 0.6, 0.7], LN2)
    assert (reading.steps, reading.mean) == (4, pytest.approx(0.65))
    deviation = math.sqrt(4 * 0.05**2 / 3)
    assert reading.noise == pytest.approx(3 * deviation / 2)
    assert not reading.below_chance  # 0.65 + 0.087 is above 0.693
    assert loss_window([0.6, 0.61, 0.6, 0.61], LN2).below_chance
    assert not loss_window(
        [1.6, 1.61, 1.6, 1.61], LN2
    ).below_chance  # above chance nothing has been learnt either


def test_the_step_at_which_the_loss_left_chance() -> None:
    losses = [0.69, 0.70] * 10 + [0.5, 0.51] * 5
    # From the 23rd on, a window of four has three of the low losses, and from the 24th on four: only these agree.
    assert below_chance_from(losses, LN2, 4) == 24
    assert below_chance_from([0.69, 0.70] * 10, LN2, 4) is None
    assert below_chance_from([0.5], LN2, 4) is None
    assert below_chance_from([0.5, 0.51] * 5, LN2, 4) == 4
    for_a_while = [0.5, 0.51] * 5 + [0.69, 0.70] * 5
    assert below_chance_from(for_a_while, LN2, 4) is None
    assert below_chance_from(for_a_while + losses, LN2, 4) == 20 + 24


def test_a_window_is_a_tenth_of_the_main_phase_within_bounds() -> None:
    assert [window_size(n) for n in (4, 400, 1440, 90_000)] == [10, 40, 144, 200]


def test_the_watch_reports_once_after_warm_up_and_a_whole_window() -> None:
    monitor = LossMonitor(100, warmup=7, chance=LN2)
    said = [done for done in range(1, 101) if monitor.add(done, 0.69 + 0.01 * (done % 2)) is not None]
    assert said == [17]


def test_the_watch_is_silent_while_the_loss_falls_and_reports_if_it_comes_back() -> None:
    monitor = LossMonitor(100, warmup=0, chance=LN2)
    losses = [0.5 + 0.01 * (n % 2) for n in range(30)] + [0.7 + 0.01 * (n % 2) for n in range(70)]
    said = [done for done, loss in enumerate(losses, 1) if monitor.add(done, loss) is not None]
    assert said == [40]
    assert monitor.reported


def test_a_restored_watch_goes_on_as_the_other() -> None:
    first, second = (LossMonitor(100, warmup=3, chance=LN2) for _ in range(2))
    for done in range(1, 10):
        first.add(done, 0.7 + 0.001 * done)
    second.restore(first.state())
    readings = [[monitor.add(done, 0.7) for done in range(10, 30)] for monitor in (first, second)]
    assert readings[0] == readings[1]
    assert [r is not None for r in readings[0]] == [done == 13 for done in range(10, 30)]


def test_a_watch_that_starts_in_the_middle_waits_for_a_whole_window() -> None:
    monitor = LossMonitor(100, warmup=0, chance=LN2)
    assert [done for done in range(9, 51) if monitor.add(done, 0.7) is not None] == [20]


def test_what_to_try_leaves_out_what_is_tried_or_cannot_be() -> None:
    def flags(config: Config, same_places: bool = True) -> list[str]:
        return [line.split(":")[0] for line in what_to_try(config, same_places)]

    everything = flags(Config())
    assert everything == [
        "--align_steps 300 --world_positions",
        "--relation_loss_weight 1",
        "--projection conv",
        "--statement_steps 500",
        "another --learning_rate than 0.0001",
    ]
    assert flags(Config(), same_places=False) == everything[1:]
    assert flags(Config(world_mode="channel"))[2] == "--projection transformer"  # there is no grid of patches
    assert flags(Config(world_positions=True))[0] == "--align_steps 300"
    tried = Config(align_steps=1, relation_loss_weight=1, statement_steps=1, projection="conv")
    assert flags(tried) == everything[-1:]


def test_the_warning_has_the_numbers_and_the_order() -> None:
    said = warning(loss_window([0.69, 0.70] * 5, LN2), ["--a: b", "--c: d"])
    assert "at chance: 0.6950 ± 0.0050 over the last 10 steps, and 0.6931 is" in said
    assert said.splitlines()[1:] == ["  1. --a: b", "  2. --c: d"]
    assert "above chance: 1.6950" in warning(loss_window([1.69, 1.70] * 5, LN2), [])
