"""Where models lie and in what numbers, in transformers' words and ours."""

import os

import pytest
import torch

from theworld.config.config import Config
from theworld.utils.device import device_setting, pin, seeded, set_up_torch, start_compilers


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
    with pytest.raises(ValueError, match=r"device_map \{.*\}: all models are on one device"):
        device_setting(device_map)


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "high"), (torch.float32, "highest")])
def test_products_in_float32_are_rounded_beside_models_in_bfloat16_alone(
    dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")  # as `accelerate launch --use_fsdp` has it
    try:
        set_up_torch(dtype)
        assert torch.get_float32_matmul_precision() == precision
        assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("compile", "device", "has_gpu", "starts"),
    [
        (None, "auto", True, True),
        (True, "cuda:1", True, True),
        (False, "auto", True, False),
        (None, "cpu", True, False),
        (None, "auto", False, False),
    ],
)
def test_compilers_start_where_a_gpu_will_compute_compiled_code(
    compile: bool | None, device: str, has_gpu: bool, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr("torch._inductor.async_compile.maybe_warm_pool", lambda: started.append(device))
    start_compilers(compile, device)
    assert started == [device] * starts


def test_a_seeded_block_draws_from_its_seed_and_leaves_the_generator_as_it_was() -> None:
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    with seeded(2):
        inside = torch.rand(3)
    assert torch.equal(inside, torch.rand(3, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, torch.bool, torch.int64, torch.float8_e4m3fn]
)
def test_a_pinned_copy_has_the_bits_of_any_tensor(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    if not torch.cuda.is_available():  # ordinary memory then
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **options: empty(*size, **options))
    values = torch.arange(12).view(3, 4).to(dtype)
    for tensor in (values, values.t(), values[1], values[1, 2], values[:0]):
        copy = pin(tensor)
        assert (copy.dtype, copy.shape) == (dtype, tensor.shape)
        assert torch.equal(copy.float(), tensor.float())
        assert copy.is_contiguous()
        assert copy.data_ptr() != tensor.data_ptr() or not tensor.numel()
