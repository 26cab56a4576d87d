"""Where models lie and in what numbers, in transformers' words and ours."""

import pytest
import torch

from theworld.config.config import Config
from theworld.utils.device import device_setting


@pytest.mark.parametrize(
    ("device_map", "setting"),
    [
        ("auto", "auto"),
        ("cpu", "cpu"),
        ("cuda:1", "cuda:1"),
        (0, "cuda:0"),
        (torch.device("cuda", 2), "cuda:2"),
        (torch.device("cpu"), "cpu"),
        ({"": 1}, "cuda:1"),
        ({"": "cpu"}, "cpu"),
    ],
)
def test_a_device_map_is_the_setting_device(device_map: object, setting: str) -> None:
    assert device_setting(device_map) == setting
    assert Config(device=setting).device == setting


@pytest.mark.parametrize("device_map", [{"model": 0, "lm_head": 1}, {}])
def test_a_model_in_parts_is_refused(device_map: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"device_map \{.*\}: all models lie on one device"):
        device_setting(device_map)
