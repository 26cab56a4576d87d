"""Published weights: every parameter comes from the files, and broken files are refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from constants import ROOT
from safetensors.torch import load_file, save_file

from theworld.models.cosmos import load_vae
from theworld.models.gemma import Gemma
from theworld.models.pretrained import copy_in_parts
from theworld.utils.hub import GEMMA_FILE, VAE_FILE, Fault, check_weight_files, locate

EMBEDDED = ROOT / "theworld/embedded"
FILES = {"gemma": "model.safetensors", "vae": "diffusion_pytorch_model.safetensors"}
LOAD: dict[str, Callable[[str], object]] = {"gemma": Gemma, "vae": load_vae}


@pytest.fixture(params=["gemma", "vae"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shutil.copytree(EMBEDDED / request.param, tmp_path / request.param)
    return tmp_path / request.param


def change(model: Path, tensors: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = model / FILES[model.name]
    save_file(tensors(load_file(path)), path, metadata={"format": "pt"})


def refused(model: Path) -> str:
    with pytest.raises(ValueError, match=str(model)) as error:
        LOAD[model.name](str(model))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_whole_files_load(model: Path) -> None:
    LOAD[model.name](str(model))


@pytest.mark.parametrize("staged", [8, 12, 1024])
@pytest.mark.parametrize("shape", [(), (5,), (3, 7)])
def test_a_tensor_is_copied_part_by_part(shape: tuple[int, ...], staged: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        source = torch.randn(shape).mul(100).to(dtype)
        target = torch.zeros(shape, dtype=dtype)
        copy_in_parts(source, target, torch.empty(staged, dtype=torch.uint8))
        assert torch.equal(target, source)


def test_a_tensor_that_is_not_contiguous_is_copied_too() -> None:
    target = torch.zeros(3, 4)
    copy_in_parts(torch.arange(12.0).view(4, 3).T, target, torch.empty(16, dtype=torch.uint8))
    assert torch.equal(target, torch.arange(12.0).view(4, 3).T)


def test_a_missing_tensor_is_named(model: Path) -> None:
    names = sorted(load_file(model / FILES[model.name]))
    gone = next(name for name in names if "norm" in name and name.endswith(("weight", "gamma")))
    change(model, lambda tensors: {k: v for k, v in tensors.items() if k != gone})
    assert "1 tensors missing" in refused(model)
    assert gone.split(".", 1)[1] in refused(model)


def test_tensors_under_another_prefix_are_refused(model: Path) -> None:
    count = len(load_file(model / FILES[model.name]))
    change(model, lambda tensors: {f"base_model.{k}": v for k, v in tensors.items()})
    assert f"{count:,} tensors unknown: base_model." in refused(model)


def test_a_tensor_of_another_shape_is_named(model: Path) -> None:
    name = next(k for k, v in sorted(load_file(model / FILES[model.name]).items()) if v.ndim == 1)
    change(model, lambda tensors: tensors | {name: torch.zeros(tensors[name].shape[0] + 1)})
    assert "1 tensors of another shape" in refused(model)


def test_a_git_lfs_pointer_is_told(model: Path) -> None:
    path = model / FILES[model.name]
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 8000000\n")
    assert refused(model) == f"{path}: a Git LFS pointer, not the weights; get the file with `git lfs pull`"
    with pytest.raises(Fault, match="Git LFS pointer"):  # the doctor and the dry run ask this
        locate(str(model), VAE_FILE if model.name == "vae" else GEMMA_FILE)


def test_half_a_file_is_told(model: Path) -> None:
    path = model / FILES[model.name]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    half = f"{path}: {len(whole) // 2:,} bytes; its header says {len(whole):,}"
    assert refused(model) == f"{half}; download or copy the file again"


@pytest.mark.parametrize("data", [b"", b"abc", b"\x05\0\0\0\0\0\0\0[1,2]", b"\x02\0\0\0\0\0\0\0{}"])
def test_what_is_no_safetensors_file_is_told(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(Fault, match="no header of a safetensors file"):
        check_weight_files(tmp_path)


def test_a_quantised_config_without_its_package_is_told_in_a_line(tmp_path: Path) -> None:
    model = Path(shutil.copytree(EMBEDDED / "gemma", tmp_path / "gemma"))
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (model / "config.json").write_text(json.dumps(config))
    assert "cannot be loaded" in refused(model)
