"""What of Gemma trains beside the projection, and the files of a checkpoint that hold it.

    stage 1    the projection alone                                                   projection.safetensors
    stage 2    freeze_gemma_vision false: Gemma's vision tower and its projector too  vision.safetensors
    stage 3    freeze_gemma_language false: the language model too, all of it         language.safetensors
               or, with lora_rank, low-rank matrices beside its linear layers         lora.safetensors

A checkpoint holds each part that differs from the Gemma that was published, whether its own run trained it or the one
that it started from, and nothing else of Gemma. What trains is in float32, and computed in the dtype of the rest.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from theworld.config import Config
from theworld.gemma import Gemma
from theworld.saved import LANGUAGE, LORA, PARTS, VISION, part_file
from theworld.weights import resolve_device, resolve_dtype, wants_compile

IN_WORDS = {
    VISION: "Gemma's vision tower and its projector",
    LANGUAGE: "Gemma's language model",
    LORA: "LoRA matrices beside Gemma's language model",
}
LORA_SCALE = 2  # of the low-rank product: lora_alpha / r (Hu et al. 2021, arXiv 2106.09685)
_LINEARS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def trained_parts(config: Config) -> list[str]:
    """The parts of Gemma that the settings let train."""
    parts = [] if config.freeze_gemma_vision else [VISION]
    if not config.freeze_gemma_language:
        parts.append(LANGUAGE if config.lora_rank is None else LORA)
    return parts


def parameters_of(gemma: Gemma, part: str) -> dict[str, nn.Parameter]:
    """The parameters of a part by transformers' names; tied ones once."""
    found = {}
    for name, parameter in gemma.model.named_parameters():
        if "lora_" in name:
            own = LORA
        else:
            own = VISION if "vision_tower." in name or "multi_modal_projector." in name else LANGUAGE
        if own == part:
            found[name] = parameter
    return found


def prepare_parts(gemma: Gemma, config: Config, world: dict[str, Any] | None = None) -> None:
    """Makes of a Gemma as it was published the one that a run trains: adds the LoRA matrices that it wants, and sets
    free what trains. `world`: the world.json of the checkpoint that the run starts from, if there is one.

    Raises ValueError for settings that this Gemma or that checkpoint cannot serve.
    """
    trains = trained_parts(config)
    held = list((world or {}).get("parts", []))
    if VISION in trains and not gemma.is_multimodal:
        raise ValueError(
            f"freeze_gemma_vision is false, but {gemma.name} is text-only: it has no vision tower to train"
        )
    rank = (world or {}).get("lora_rank")
    if LORA in trains and LORA in held and rank != config.lora_rank:
        raise ValueError(
            f"lora_rank is {config.lora_rank}, but the checkpoint to start from has LoRA matrices of rank {rank}"
        )
    if {LORA, LANGUAGE} <= {*held, *trains}:
        raise ValueError(
            "the checkpoint to start from and this run train the language model in two ways, one by LoRA and one by "
            f"its own weights (lora_rank is {json.dumps(config.lora_rank)}, the checkpoint's {json.dumps(rank)}): "
            "go on in the same way"
        )
    if LORA in {*held, *trains}:
        torch.manual_seed(config.seed)
        add_lora(gemma, config.lora_rank if LORA in trains else rank)
    for part in trains:
        for parameter in parameters_of(gemma, part).values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    set_parts(gemma, [part for part in PARTS if part in {*held, *trains}], trains)


def load_gemma(
    config: Config,
    device: torch.device | None = None,
    revision: str | None = None,
    weights: bool = True,
) -> Gemma:
    """The Gemma that the settings name, as it was published, computed as they want; `device` goes before theirs.
    `weights`, `revision`: as for `Gemma`."""
    device = device or resolve_device(config.device)
    # Flex attention is only fast, and only small, in compiled code.
    fast = device.type == "cuda" and wants_compile(config.compile, device)
    attention = "flex_attention" if fast else "sdpa"
    dtype = resolve_dtype(config.dtype, device)
    if dtype == torch.bfloat16:
        # What stays in float32 is the projection: TF32 rounds its products to 10 bits, the frozen models have 7.
        torch.set_float32_matmul_precision("high")
    return Gemma(config.model_name, dtype, device, attention, revision, weights)


def set_parts(gemma: Gemma, changed: Sequence[str], trains: Sequence[str] = ()) -> None:
    """Tells a Gemma what of it is not as it was published, and what of that trains."""
    gemma.changed, gemma.trained = tuple(changed), tuple(trains)
    if LORA in changed or LANGUAGE in trains:
        gemma.plain_decoder, gemma.attention = True, "sdpa"


def add_lora(gemma: Gemma, rank: int | None) -> None:
    """Low-rank matrices beside every linear layer of the language model, which change nothing as yet. Frozen.

    Raises ValueError where peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model  # optional, so not at the top
    except ImportError as error:
        raise ValueError(f"LoRA is asked for, but {error}; run `pip install peft`") from None
    assert rank is not None
    settings = LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, target_modules=_LINEARS, lora_dropout=0.0)
    inject_adapter_in_model(settings, gemma.text_model)
    gemma.lora_rank = rank
    for parameter in parameters_of(gemma, LORA).values():
        parameter.requires_grad_(False)


def restore_parts(gemma: Gemma, folder: Path, world: dict[str, Any]) -> None:
    """Makes of a Gemma as it was published the one of a saved model; nothing of it trains."""
    if LORA in world["parts"]:
        add_lora(gemma, world["lora_rank"])
    set_parts(gemma, world["parts"])
    load_parts(gemma, folder, world["parts"])


def load_parts(gemma: Gemma, folder: Path, parts: Sequence[str]) -> None:
    """Loads those parts of a checkpoint into a Gemma that has them, strictly: see `copy_strictly`."""
    for part in parts:
        copy_strictly(folder / part_file(part), parameters_of(gemma, part))


def copy_strictly(path: Path, wanted: dict[str, nn.Parameter]) -> None:
    """Copies the tensors of a file into parameters of the same names and shapes, in the parameters' dtype.

    Raises ValueError naming what is missing, unknown or of another shape, before anything was changed.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; download or copy the whole folder again")
    state = load_file(path)
    for name in sorted(wanted.keys() | state.keys()):
        have = tuple(state[name].shape) if name in state else "nothing"
        want = tuple(wanted[name].shape) if name in wanted else "nothing"
        if have != want:
            raise ValueError(f"{path}: {name} has shape {have}; this model wants {want}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(state[name])
