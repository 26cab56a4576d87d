"""Stand-ins for the benchmark: models of random weights, statements and photographs, and a cache of random numbers.

Model folders have real or smaller shapes and load with `from_pretrained`. Tokenizer, processor and chat template are
copied from another Gemma, so only the first rows of a vocabulary of the real size are used, which changes no time.
Statements and photographs have what costs time in VSR and COCO: the number of statements of an image, its splits, the
size of its file. The content of the statements is meaningless.
"""

import io
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GenerationConfig

from theworld.config.config import Config
from theworld.data.vsr import RELATIONS, images_of, load_statements
from theworld.extraction.encoders import open_store
from theworld.extraction.extract import list_images
from theworld.extraction.features import to_numpy
from theworld.extraction.pipeline import Source
from theworld.models.cosmos import CosmosLatents
from theworld.models.gemma_vision import VisionEncoder
from theworld.utils.device import torch_dtype
from theworld.utils.starting import starting_workers

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
    """The sizes of models, pictures and data in a measurement."""

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
    """Return the config of a Gemma of these shapes, with the token ids of another Gemma."""
    return Gemma3Config(
        text_config={"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, **shapes.text},
        vision_config=shapes.vision,
        mm_tokens_per_image=shapes.image_tokens,
        attn_implementation="sdpa",
        **token_ids,
    )


def make_gemma_folder(folder: Path, shapes: Shapes, processor: Path, dtype: torch.dtype, device: str) -> None:
    """Write a `Gemma3ForConditionalGeneration` of random weights, drawn on `device` in `dtype`, unless it exists.

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
    """Write the processor's files, with the picture size and number of image tokens of these shapes."""
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
    """Write an `AutoencoderKLWan` of random float32 weights, with latents_mean and latents_std of the Wan VAE."""
    if folder.exists():
        return
    torch.manual_seed(0)
    temporary = _temporary(folder)
    AutoencoderKLWan(**shapes.vae).save_pretrained(temporary)
    os.replace(temporary, folder)


def _temporary(folder: Path) -> Path:
    """Return an empty folder beside `folder`, to be renamed to it when it is complete."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def num_world_tokens(shapes: Shapes, patch: int) -> int:
    """Return the number of world tokens of a latent, 8 times smaller than the picture, in patches of side `patch`."""
    side = shapes.latent_size // 8
    return math.prod((side // patch, side // patch))


# VSR's random release: split -> {statements an image: images}, counted in its files.
PER_IMAGE = {
    "train": {1: 3382, 2: 969, 3: 350, 4: 155, 5: 44, 6: 31, 7: 26, 8: 6, 9: 3, 13: 1, 14: 1},
    "dev": {1: 941, 2: 72, 3: 4},
    "test": {1: 1609, 2: 217, 3: 41, 4: 6, 5: 1},
}
NUM_IMAGES = 6259  # of the three splits together
SEEN_TEST_STATEMENTS = 1226  # about an image that is also in train
THINGS = """person bicycle car motorcycle airplane bus train truck boat bench bird cat dog horse sheep cow elephant
bear zebra giraffe backpack umbrella handbag tie suitcase skateboard surfboard bottle cup fork knife spoon bowl banana
apple sandwich orange pizza donut cake chair couch bed toilet tv laptop mouse remote keyboard microwave oven toaster
sink refrigerator book clock vase scissors""".split()
SPLITS = tuple(PER_IMAGE)
PHOTOGRAPH = (640, 480)  # width and height of most COCO photographs, pixels
QUALITY = 87  # JPEG; with it a stand-in is about as large as a COCO photograph, 160 KB


def image_counts(split: str, share: float = 1.0) -> list[int]:
    """Return the number of statements of each image of a split, in a fixed random order; at least two images."""
    counts: list[int] = []
    for number, images in PER_IMAGE[split].items():
        counts += [number] * (images if share == 1 else round(images * share))
    counts += [1] * (2 - len(counts))
    return [counts[i] for i in np.random.default_rng(len(split)).permutation(len(counts))]


def place_images(share: float = 1.0) -> dict[str, list[tuple[int, int]]]:
    """Return for each split (image, number of statements) of its images, numbered through the three splits.

    Test shares images with train until SEEN_TEST_STATEMENTS statements are about one; dev shares as many as it
    takes for NUM_IMAGES in all.
    """
    train, dev, test = (image_counts(split, share) for split in SPLITS)
    number, wanted = len(train), round(SEEN_TEST_STATEMENTS * share)
    placed: dict[str, list[tuple[int, int]]] = {"train": list(enumerate(train)), "dev": [], "test": []}
    seen_images, seen_statements = 0, 0
    for count in test:
        if seen_statements + count <= wanted and seen_images < len(train):
            placed["test"].append((seen_images, count))
            seen_images, seen_statements = seen_images + 1, seen_statements + count
        else:
            placed["test"].append((number, count))
            number += 1
    surplus = number + len(dev) - round(NUM_IMAGES * share)
    for index, count in enumerate(dev):
        shared = index < surplus
        placed["dev"].append((len(train) - 1 - index if shared else number, count))
        number += not shared
    return placed


def write_statements(folder: Path, share: float = 1.0) -> None:
    """Write train.jsonl, dev.jsonl and test.jsonl in the format of VSR; half of the labels are true."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, relations = np.random.default_rng(0), sorted(RELATIONS)
    for split, images in place_images(share).items():
        lines = []
        for image, count in images:
            for _ in range(count):
                one, other = generator.choice(THINGS, 2, replace=False)
                relation = str(generator.choice(relations))
                row = {"image": f"{image:012}.jpg", "image_link": "", "relation": relation}
                row |= {"caption": f"The {one} is {relation} the {other}."}
                lines.append(json.dumps(row | {"label": int(generator.integers(2))}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def draw_photograph(seed: int, size: tuple[int, int] = PHOTOGRAPH) -> bytes:
    """Return a JPEG of coloured noise with an amplitude that falls as 1 / frequency, as in photographs.

    See Field 1987, doi 10.1364/JOSAA.4.002379. `size`: width and height in pixels.
    """
    width, height = size
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    # Three independent layers, mixed: channels of a photograph resemble each other.
    layers = np.fft.rfft2(generator.standard_normal((3, height, width))) / frequency**1.1
    fields = np.fft.irfft2(layers, s=(height, width))
    fields /= fields.std(axis=(1, 2), keepdims=True)
    mixed = fields[:1] + 0.25 * fields
    pixels = np.clip(mixed * 48 + 120, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def with_comment(jpeg: bytes, text: str) -> bytes:
    """Return the same picture as another file, with a comment segment (FF FE, ITU T.81 section B.2.4.5)."""
    content = text.encode()
    return jpeg[:2] + b"\xff\xfe" + (len(content) + 2).to_bytes(2, "big") + content + jpeg[2:]


def write_photographs(
    folder: Path, names: Sequence[str], distinct: int, workers: int, size: tuple[int, int] = PHOTOGRAPH
) -> None:
    """Write a JPEG file for every name, from `distinct` pictures in turn, no two files equal, in worker processes."""
    folder.mkdir(parents=True, exist_ok=True)
    shares = [(folder, list(names)[seed::distinct], seed, size) for seed in range(min(distinct, len(names)))]
    if workers < 2:
        for share in shares:
            _write_share(share)
        return
    # A fork would carry a CUDA context of the parent along.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        with starting_workers():
            done = pool.map(_write_share, shares, chunksize=4)
        list(done)


def _write_share(share: tuple[Path, list[str], int, tuple[int, int]]) -> None:
    """Write all files of one picture."""
    folder, names, seed, size = share
    jpeg = draw_photograph(seed, size)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(with_comment(jpeg, name))


def statement_images(annotations: Path) -> list[str]:
    """Return the photographs of the three splits, each once, sorted."""
    return images_of([s for split in SPLITS for s in load_statements(annotations, split)])


def write_random_cache(config: Config, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Write finished stores of latents and vision features as extraction does, with random values."""
    source = Source(Path(str(config.image_folder)), config.max_image_pixels, 1)
    images = list_images(config, folder, source, allow_missing=False).images
    name: Any = str(dtype).removeprefix("torch.")
    config = replace(config, dtype=name, device=str(device), compile=False)
    generator = torch.Generator().manual_seed(0)
    for encoder in (CosmosLatents(config), VisionEncoder(config)):
        spec = encoder.spec.array
        store = open_store(folder, encoder.spec, images, config.shard_size)
        for shard in store.pending():
            shape = (len(store.shard_rows(shard)), *spec.shape)
            values = torch.randn(shape, generator=generator).to(torch_dtype(spec.dtype))
            store.write_shard(shard, {spec.name: to_numpy(values)})
        store.publish()
