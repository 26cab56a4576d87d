"""Arms have as many trained parameters as the one that has to win, whatever their rows are."""

from dataclasses import replace

import pytest

from theworld.study.protocol import Arm, Study
from theworld.study.sizes import equal_sizes, parameters


def test_the_width_inside_is_solved_for_where_rows_have_another_width(study: Study) -> None:
    arms = [
        Arm(name, {"world_encoder": name}) for name in ("cosmos", "pixels", "none", "noise", "gemma_vision")
    ]
    own = Arm("own width", {"world_encoder": "pixels", "projection_hidden": 5})
    found = equal_sizes(
        replace(study, primary=None, arms=[*arms, own, Arm("linear", {"projection": "linear"})])
    )
    changed = {arm.name: arm.changes.get("projection_hidden") for arm in found.arms}
    assert changed == {
        **{"cosmos": None, "pixels": 10, "none": 56, "noise": None, "gemma_vision": None},
        **{"own width": 5, "linear": None},
    }
    counts = [parameters(replace(study.base, **dict(arm.changes))) for arm in found.arms[:5]]
    assert counts == [8512, 8586, 8504, 8512, 8512]
    assert all(abs(count - 8512) <= 851 for count in counts)


def test_an_arm_that_cannot_be_as_large_is_named(study: Study) -> None:
    arms = [Arm("world", {}), Arm("pixels", {"world_encoder": "pixels", "projection": "linear"})]
    with pytest.raises(ValueError, match=r"arm 'pixels': projection linear: no projection_hidden gives rows"):
        equal_sizes(replace(study, primary=None, arms=arms))
