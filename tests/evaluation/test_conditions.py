"""The names of conditions."""

from theworld.evaluation.conditions import checkpoint_of, checkpoints_in, condition_type, find_condition


def test_the_checkpoint_stands_before_the_condition() -> None:
    conditions = ["a:world", "baseline", "a/b:world", "a/b:zero"]
    assert checkpoints_in(conditions) == ["a", "a/b"]
    assert checkpoints_in(["world", "baseline"]) == [""]
    assert (checkpoint_of("a/b:zero"), condition_type("a/b:zero")) == ("a/b", "zero")
    assert (checkpoint_of("zero"), condition_type("zero")) == ("", "zero")
    assert find_condition(conditions, "a", "world") == "a:world"
    assert find_condition(conditions, "a", "baseline") == "baseline"
    assert find_condition(conditions, "a", "zero") is None
