"""Model folders of random weights in real or smaller shapes, for measuring only: `from_pretrained` loads them.

The tokenizer, processor and chat template are copied from another Gemma's folder, with its token ids, so a vocabulary
of the real size is used in its first rows only; that changes no time.
"""

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GenerationConfig

PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
)
COPIED_IDS = ("boi_token_index", "eoi_token_index", "image_token_index", "eos_token_id")


@dataclass(frozen=True)
class Shapes:
    """What is measured: the sizes of models, pictures and data."""

    name: str
    text: dict[str, Any]  # Gemma3TextConfig
    vision: dict[str, Any]  # SiglipVisionConfig
    image_tokens: int  # of one photograph
    vae: dict[str, Any]  # AutoencoderKLWan
    latent_size: int  # side of the square the VAE sees, pixels
    share: float  # of VSR's images
    photograph: tuple[int, int]  # width and height, pixels
    num_pictures: int  # distinct ones among the photographs
    # Measuring
    batch_size: int  # ours, statements in one pass
    baseline_batch_size: int  # statements in one pass of the end-to-end baseline
    encode_batch_size: int  # ours, photographs
    warm_up: int  # training steps before any counts: compilation, allocator, page cache
    repeats: int  # of each measurement
    steps: int  # of training in each repeat
    loss_steps: int  # of training, to compare losses
    store_rows: tuple[int, ...]  # sizes of stores, for growth
    world_patches: tuple[int, ...]  # for growth; all divide latent_size / 8


_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

# Gemma 3 4B with its SigLIP tower; the Wan 2.1 VAE is what AutoencoderKLWan makes by itself.
REAL = Shapes(
    name="real",
    text={
        "hidden_size": 2560,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 10240,
        "sliding_window": 1024,
        "vocab_size": 262208,
        "rope_parameters": _ROPE,
    },
    vision={
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    },
    image_tokens=256,
    vae={},
    latent_size=512,
    share=1.0,
    photograph=(640, 480),
    num_pictures=256,
    batch_size=16,
    baseline_batch_size=8,
    encode_batch_size=32,
    warm_up=3,
    repeats=5,
    steps=8,
    loss_steps=200,
    store_rows=(1_000, 20_000, 200_000),
    world_patches=(16, 8, 4, 2, 1),
)

# VAE, tower and language model share the time of an end-to-end step about as the real ones do; for two CPU cores.
SMALL = Shapes(
    name="small",
    text={
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "intermediate_size": 1024,
        "sliding_window": 1024,
        "vocab_size": 5120,
    },
    vision={
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 768,
        "image_size": 336,
        "patch_size": 14,
        "vision_use_head": False,
    },
    image_tokens=64,
    vae={"base_dim": 16},
    latent_size=128,
    share=0.005,
    photograph=(640, 480),
    num_pictures=8,
    batch_size=8,
    baseline_batch_size=8,
    encode_batch_size=8,
    warm_up=1,
    repeats=5,
    steps=1,
    loss_steps=20,
    store_rows=(1_000, 20_000, 200_000),
    world_patches=(4, 2, 1),
)

# For tests: as small as the classes allow.
TINY = Shapes(
    name="tiny",
    text={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "intermediate_size": 64,
        "sliding_window": 512,
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size": 1024,
    },
    vision={
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 28,
        "patch_size": 7,
        "vision_use_head": False,
    },
    image_tokens=4,
    vae={"base_dim": 8, "num_res_blocks": 1},
    latent_size=32,
    share=0.001,
    photograph=(64, 48),
    num_pictures=2,
    batch_size=4,
    baseline_batch_size=2,
    encode_batch_size=2,
    warm_up=1,
    repeats=1,
    steps=1,
    loss_steps=3,
    store_rows=(10, 30),
    world_patches=(4, 2),
)
SHAPES = {shapes.name: shapes for shapes in (REAL, SMALL, TINY)}


def gemma_config(shapes: Shapes, token_ids: dict[str, Any]) -> Gemma3Config:
    """The config of a Gemma of these shapes with another one's token ids."""
    return Gemma3Config(
        text_config={"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, **shapes.text},
        vision_config=shapes.vision,
        mm_tokens_per_image=shapes.image_tokens,
        attn_implementation="sdpa",
        **token_ids,
    )


def make_gemma_folder(folder: Path, shapes: Shapes, processor: Path, dtype: torch.dtype, device: str) -> None:
    """A `Gemma3ForConditionalGeneration` of random weights, drawn on `device` in `dtype`; kept where it is there.

    Drawn as transformers draws them (standard deviation 0.02): every layer's output is normalised before it is
    added, so values stay finite at any depth. `processor`: the folder of another Gemma.
    """
    if folder.exists():
        return
    token_ids = {k: v for k, v in json.loads((processor / "config.json").read_text()).items()}
    config = gemma_config(shapes, {key: token_ids[key] for key in COPIED_IDS})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        with torch.device(device):
            model = Gemma3ForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():  # transformers starts this one at zero
        weight = model.model.multi_modal_projector.mm_input_projection_weight
        nn.init.normal_(weight, std=shapes.vision["hidden_size"] ** -0.5)
    model.generation_config = GenerationConfig(bos_token_id=2, eos_token_id=token_ids["eos_token_id"])
    temporary = _temporary(folder)
    model.to(dtype).save_pretrained(temporary)
    _copy_processor(processor, temporary, shapes)
    os.replace(temporary, folder)


def _copy_processor(source: Path, target: Path, shapes: Shapes) -> None:
    """The processor's files, with the picture size and number of image tokens of these shapes."""
    for name in PROCESSOR_FILES:
        shutil.copyfile(source / name, target / name)
    side = shapes.vision["image_size"]
    changes = {"size": {"height": side, "width": side}, "image_seq_length": shapes.image_tokens}
    # Bilinear, as google/gemma-3-4b-it's processor has it.
    for name, changed in (
        ("preprocessor_config.json", changes | {"resample": 2}),
        ("processor_config.json", {"image_seq_length": shapes.image_tokens}),
    ):
        content = json.loads((target / name).read_text()) | changed
        (target / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_vae_folder(folder: Path, shapes: Shapes) -> None:
    """An `AutoencoderKLWan` of random weights in float32, with the Wan VAE's own latents_mean and latents_std."""
    if folder.exists():
        return
    torch.manual_seed(0)
    temporary = _temporary(folder)
    AutoencoderKLWan(**shapes.vae).save_pretrained(temporary)
    os.replace(temporary, folder)


def _temporary(folder: Path) -> Path:
    """A fresh folder beside `folder`, to be renamed to it when it is whole."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def num_world_tokens(shapes: Shapes, patch: int) -> int:
    """World tokens of a latent in `patch` x `patch` pieces; the VAE's latents are 8 times smaller than pictures."""
    side = shapes.latent_size // 8
    return math.prod((side // patch, side // patch))
