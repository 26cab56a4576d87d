"""Who writes which shard."""

import argparse

import pytest

from theworld.utils.distributed import Part, part_of, this_part


def test_parts_own_each_shard_exactly_once() -> None:
    parts = [part_of(f"{i}/3") for i in (1, 2, 3)]
    assert [[s for s in range(8) if part.owns(s)] for part in parts] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert all(Part().owns(shard) for shard in range(8))


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3", "", "1.0/2", "01/2"])
def test_nonsense_is_no_part(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not I/N with I from 1 to N, such as 3/8"):
        part_of(text)


def test_a_plain_run_is_all_of_it_and_connects_with_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("accelerate.PartialState", None)
    assert this_part(None) == Part(0, 1, together=False)
    assert this_part(part_of("2/3")) == Part(1, 3, together=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        ValueError, match=r"--part 2/3 in one of 4 processes launched together.* leave --part"
    ):
        this_part(part_of("2/3"))


def test_processes_launched_together_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    third = Part(6, 8, together=True, local_index=2, local_count=4)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert third.device("auto") == "auto"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert third.device("auto") == third.device("cuda") == "cuda:2"
    assert third.device("cpu") == "cpu"
    assert Part(6, 8).device("cuda:3") == "cuda:3"
    with pytest.raises(ValueError, match=r"'cuda:3' is one GPU for 8 processes; use --device cuda"):
        third.device("cuda:3")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 processes on this machine and 2 GPUs"):
        third.device("cuda")


def test_only_the_first_of_processes_launched_together_is_the_main_process() -> None:
    assert Part(0, 2, together=True).is_main_process
    assert not Part(1, 2, together=True).is_main_process
    assert Part(1, 2).is_main_process
