"""What a run is going to do, before it does it: what trains, how many steps, and about how much memory they take."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from theworld.batch import Packer
from theworld.card import Facts
from theworld.config import Config
from theworld.feed import parts_of_step
from theworld.gemma import Gemma
from theworld.projection import WorldProjection
from theworld.saved import VISION
from theworld.schedule import Order
from theworld.unfrozen import IN_WORDS, parameters_of
from theworld.weights import count_parameters

TRAINED_BYTES = 16  # of a parameter: weight, gradient and AdamW's two moments, in float32
# Values that a token keeps for the backward pass, in multiples of what `_layer_values` counts. Measured: RESULTS.md.
PLAIN = 2.0  # transformers' own decoder, beside ours
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, about."""

    frozen: float  # weights
    trained: float  # weights, gradients and moments
    activations: float  # what the largest pass of a step keeps for its backward pass
    available: float

    def __str__(self) -> str:
        total = (self.frozen + self.trained + self.activations) / GIB
        return (
            f"memory: about {total:,.1f} of {self.available / GIB:,.1f} GiB: frozen weights {self.frozen / GIB:,.1f}, "
            f"what trains with gradients and moments {self.trained / GIB:,.1f}, a pass {self.activations / GIB:,.1f}"
        )


def facts_of(
    config: Config,
    gemma: Gemma,
    projection: WorldProjection,
    num_steps: int,
    processes: int,
    data: Sequence[str],
) -> Facts:
    """Counted parameters and steps."""
    also = {
        IN_WORDS[part]: sum(p.numel() for p in parameters_of(gemma, part).values()) for part in gemma.trained
    }
    every = sum(p.numel() for p in gemma.model.parameters())
    own, _ = count_parameters(projection)
    per_step = config.batch_size * config.gradient_accumulation_steps * processes
    return Facts(own + sum(also.values()), every - sum(also.values()), num_steps, per_step, data, also)


def describe(
    config: Config, gemma: Gemma, projection: WorldProjection, facts: Facts, memory: Memory, processes: int
) -> list[str]:
    """What trains and what is frozen, on what, in how many steps: lines to show before the start."""
    share = facts.trainable / (facts.trainable + facts.frozen)
    own = facts.trainable - sum(facts.also.values())
    trains = [f"projection, {own:,}", *(f"{name}, {count:,}" for name, count in facts.also.items())]
    trains[0] += " parameters"
    if facts.also:
        trains[-1] += f"; together {facts.trainable:,}"
    statements = f"{config.batch_size} x {config.gradient_accumulation_steps}"
    statements += f" x {processes} (processes)" if processes > 1 else ""
    return [
        f"trains: {'; '.join(trains)} ({share:.3%}); frozen: Gemma, {facts.frozen:,} ({1 - share:.3%})",
        *facts.data,
        f"{facts.num_steps:,} optimizer steps of {statements} statements, {projection.shape.num_tokens} world tokens "
        f"and {gemma.num_image_tokens} image tokens each, on {gemma.device}",
        str(memory),
    ]


def memory_of(
    config: Config,
    gemma: Gemma,
    projection: WorldProjection,
    packer: Packer,
    order: Order,
    processes: int,
    sharded: bool,
) -> Memory:
    """An estimate, for the first step of the main phase."""
    trained = [p for part in gemma.trained for p in parameters_of(gemma, part).values()]
    ours = {id(p) for p in trained}
    frozen = sum(p.numel() * p.element_size() for p in gemma.model.parameters() if id(p) not in ours)
    share = processes if sharded else 1
    held = TRAINED_BYTES * sum(p.numel() for p in trained) / share
    held += TRAINED_BYTES * sum(p.numel() for p in projection.parameters())
    batches = [packer.pack(part) for part in parts_of_step(config, packer, order, 0, processes) if part]
    tokens = max(batch.token_ids.numel() for batch in batches)
    images = max(len(batch.images) for batch in batches)
    text = gemma.text_config
    heads = 4 * text.num_attention_heads * text.head_dim
    layer = 3 * text.hidden_size + 2 * text.intermediate_size + heads
    layer *= PLAIN if gemma.plain_decoder else 1
    kept = tokens * _kept(config, text.num_hidden_layers, text.hidden_size, layer)
    if VISION in gemma.trained:
        eyes = gemma.model.config.vision_config
        patches = (eyes.image_size // eyes.patch_size) ** 2
        layer = PLAIN * (8 * eyes.hidden_size + 2 * eyes.intermediate_size)
        kept += images * patches * _kept(config, eyes.num_hidden_layers, eyes.hidden_size, layer)
    width = torch.finfo(gemma.dtype).bits // 8
    return Memory(frozen / share, held, kept * width, _available(gemma.device))


def _kept(config: Config, layers: int, width: int, layer: float) -> float:
    """Values that a token keeps: all layers' own or, with checkpointing, their inputs and one layer's own."""
    return layers * width + layer if config.use_gradient_checkpointing else layers * layer


def _available(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(memory: Memory, sharded: bool) -> None:
    """ValueError where what is held from the first step to the last does not fit; a pass can be made smaller."""
    held = memory.frozen + memory.trained
    if held > memory.available:
        cure = "more GPUs" if sharded else "more GPUs with `accelerate launch --use_fsdp`"
        raise ValueError(
            f"weights, gradients and moments take {held / GIB:,.1f} GiB, and there are {memory.available / GIB:,.1f}: "
            f"train less of Gemma (--lora_rank 16), or use {cure}"
        )
