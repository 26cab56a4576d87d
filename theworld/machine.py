"""Whether a machine is enough for a training, estimated before any model is loaded."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from theworld.config import Config
from theworld.places import GEMMA_FILE, Fault, locate
from theworld.weights import resolve_device, resolve_dtype

GIB = 2**30
TEXT_TOKENS = 60  # of a statement with the guide's question, at most
FP8_CAPABILITY = (9, 0)  # Hopper


@dataclass(frozen=True)
class Sizes:
    """What of a Gemma decides how much memory it takes."""

    hidden: int
    layers: int
    feed_forward: int
    heads: int  # of queries, keys, values and outputs together
    head_dim: int
    parameters: float  # of the language model
    image_tokens: int


# Published shapes of Gemma 3 (arXiv 2503.19786), for one whose config is not on this machine yet.
PUBLISHED = {
    "270m": Sizes(640, 18, 2048, 10, 256, 0.27e9, 0),
    "1b": Sizes(1152, 26, 6912, 10, 256, 1.0e9, 0),
    "4b": Sizes(2560, 34, 10240, 24, 256, 3.88e9, 256),
    "12b": Sizes(3840, 48, 15360, 48, 256, 11.8e9, 256),
    "27b": Sizes(5376, 62, 21504, 96, 128, 27.0e9, 256),
}


def sizes_of(model_name: str) -> Sizes | None:
    """Those of a Gemma by its config or, where that is not on this machine, by its published name; None: unknown."""
    try:
        place = locate(model_name, GEMMA_FILE)
    except Fault:
        place = None
    if place is None or place.config is None:
        size = re.search(r"gemma-3-(270m|1b|4b|12b|27b)\b", model_name)
        return PUBLISHED[size[1]] if size else None
    config = AutoConfig.from_pretrained(Path(place.config).parent)
    text = config.get_text_config()
    heads = 2 * text.num_attention_heads + 2 * text.num_key_value_heads
    layer = text.hidden_size * (heads * text.head_dim + 3 * text.intermediate_size)
    return Sizes(
        text.hidden_size,
        text.num_hidden_layers,
        text.intermediate_size,
        heads,
        text.head_dim,
        text.num_hidden_layers * layer + text.vocab_size * text.hidden_size,
        getattr(config, "mm_tokens_per_image", 0) if hasattr(config, "vision_config") else 0,
    )


def training_bytes(config: Config, sizes: Sizes) -> tuple[float, float]:
    """What the frozen language model takes, and what one pass keeps for its backward, at most: as if no two of its
    statements were about one image. RESULTS.md says how the values that a layer keeps were counted."""
    device = resolve_device(config.device)
    width = resolve_dtype(config.dtype, device).itemsize
    side = config.latent_size // 8
    world = 16 if config.world_mode == "channel" else (side // config.world_patch) ** 2
    world *= 1 + config.num_world_steps
    tokens = config.batch_size * (world + sizes.image_tokens + TEXT_TOKENS)
    layer = layer_values(sizes.hidden, sizes.feed_forward, sizes.heads * sizes.head_dim)
    return sizes.parameters * width, tokens * width * kept_values(config, sizes.layers, sizes.hidden, layer)


def layer_values(hidden: int, feed_forward: int, heads: int) -> int:
    """Values that a decoder layer of ours keeps of a token for the backward pass: its input and two products of that
    width, gate and up, and the width of all heads of queries, keys, values and outputs together."""
    return 3 * hidden + 2 * feed_forward + heads


def kept_values(config: Config, layers: int, hidden: int, layer: float) -> float:
    """Values that all layers keep of a token; with checkpointing only their inputs, and one layer at work: its values
    again, their gradients, and what is between the two."""
    return layers * hidden + 3 * layer if config.use_gradient_checkpointing else layers * layer


@dataclass(frozen=True)
class Memory:
    """Of a GPU, or of the machine for a CPU; bytes."""

    name: str
    free: float
    total: float
    capability: tuple[int, int] | None = None  # of a GPU


def memory_of(device: torch.device) -> Memory:
    """What a device has."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(
            torch.cuda.get_device_name(device), free, total, torch.cuda.get_device_capability(device)
        )
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    available = re.search(r"MemAvailable:\s+(\d+) kB", _meminfo())
    free = int(available[1]) * 1024 if available else page * os.sysconf("SC_AVPHYS_PAGES")
    return Memory(f"CPU, {len(os.sched_getaffinity(0))} cores", free, total)


def _meminfo() -> str:
    path = Path("/proc/meminfo")
    return path.read_text() if path.is_file() else ""
