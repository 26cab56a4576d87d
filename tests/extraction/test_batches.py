"""Work that is made ahead: the same items in the same order, and nothing swallowed."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from theworld.extraction.batches import Microbatch, prefetch


def test_items_come_in_order_from_another_thread_and_not_too_far_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[tuple[int, int]]:
        for number in range(6):
            made.append(number)
            yield number, threading.get_ident()

    got = []
    for number, thread in prefetch(items(), depth=2):
        assert thread != threading.get_ident()
        got.append(number)
        time.sleep(0.02)  # time enough to run far ahead, if it did
        assert len(made) <= number + 1 + 2
    assert got == list(range(6))
    assert list(prefetch([])) == []


def test_an_error_is_raised_where_its_item_would_have_come() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    stream = prefetch(items())
    assert next(stream) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)


def test_a_loop_that_is_left_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    for _ in prefetch(iter(range(1000))):
        break
    assert threading.active_count() == before


def test_items_are_begun_while_the_gate_is_open_or_when_they_are_waited_for() -> None:
    made, gate = [], threading.Event()

    def items() -> Iterator[int]:
        for number in range(6):
            made.append(number)
            yield number

    stream = prefetch(items(), gate=gate)
    assert next(stream) == 0  # nobody had opened it
    gate.clear()
    time.sleep(0.05)
    begun = len(made)  # what was under way before it was closed
    for number in range(1, begun):  # nothing is begun while there are items
        assert next(stream) == number
        gate.clear()
    time.sleep(0.05)
    assert len(made) == begun
    gate.set()
    while len(made) < begun + 1:
        time.sleep(0.001)
    assert list(stream) == list(range(begun, 6))


def test_a_loop_with_a_closed_gate_can_be_left() -> None:
    before, gate = threading.active_count(), threading.Event()
    for _ in prefetch(iter(range(1000)), gate=gate):
        gate.clear()
        break
    assert threading.active_count() == before


def test_a_microbatch_without_a_batch_moves_too() -> None:
    one = Microbatch((), None, torch.ones(2), None).pin(torch.device("cpu")).to(torch.device("cpu"))
    assert one.batch is None
    assert torch.equal(one.latents, torch.ones(2))
