"""What a run is going to do, before it does it: what trains, how many steps, and about how much memory they take."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from theworld.batch import Packer
from theworld.card import Facts
from theworld.checkpoint import find_start
from theworld.config import Config
from theworld.data import load_data, prepare_gemma
from theworld.feed import parts_of_step
from theworld.machine import GIB, kept_values, layer_values, memory_of
from theworld.objectives import captions_for, check_align
from theworld.processes import Processes
from theworld.projection import ProjectionShape, WorldProjection
from theworld.resume import find_sound, refuse_to_overwrite
from theworld.saved import VISION
from theworld.schedule import Order, num_train_steps
from theworld.sharding import wants_sharding
from theworld.unfrozen import IN_WORDS, load_gemma, parameters_of
from theworld.weights import count_parameters, wants_compile

TRAINED_BYTES = 16  # of a parameter: weight, gradient and AdamW's two moments, in float32
# What transformers' own layers keep for the backward pass, in multiples of what is counted here, which is what ours
# keep. Fitted to what was measured: RESULTS.md.
PLAIN, PLAIN_UNCOMPILED = 2.1, 3.0


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, about."""

    frozen: float  # weights
    trained: float  # weights, gradients and moments
    activations: float  # what the largest pass of a step keeps for its backward pass
    available: float

    @property
    def total(self) -> float:
        """All of what is used."""
        return self.frozen + self.trained + self.activations

    def __str__(self) -> str:
        total, available, frozen, trained, activations = (
            f"{size / GIB:,.1f}"
            for size in (self.total, self.available, self.frozen, self.trained, self.activations)
        )
        return (
            f"memory: about {total} of {available} GiB: frozen weights {frozen}, what trains with its gradients and "
            f"moments {trained}, a pass {activations}"
        )


class Plan:
    """A run before its weights load: data, order, steps, and counts from the shapes of the models alone."""

    def __init__(self, config: Config, cache: Path) -> None:
        """Raises ValueError, StoreError and CheckpointError for what stands in the way of the run."""
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.processes = Processes(config.device)
        count = self.processes.count
        self.per_step = config.batch_size * config.gradient_accumulation_steps * count
        self.data = load_data(config, cache)
        self.resumed = find_sound(config.resume_from) if config.resume_from else None
        refuse_to_overwrite(self.output_dir, self.resumed)
        init = find_start(config.init_from) if config.init_from else None
        self.start = self.resumed.path if self.resumed is not None else init
        self.order = Order(self.data.train, config.seed)
        before = config.align_steps + config.statement_steps
        self.num_steps = before + num_train_steps(config, len(self.data.train), self.per_step)
        self.gemma = load_gemma(config, self.processes.device, weights=False)
        prepare_gemma(self.gemma, config, self.data, self.start)
        self.sharded = wants_sharding(count, self.gemma)
        fingerprint = self.data.latents.reader.fingerprint
        shape = ProjectionShape.from_settings(config, fingerprint, self.gemma.width)
        check_align(config, shape, self.gemma.num_image_tokens)
        own, _ = count_parameters(
            WorldProjection(shape, fingerprint["latents_mean"], fingerprint["latents_std"])
        )
        self.facts = self._facts(own)
        self.sizes = own, shape
        self.memory = self.estimate(config)
        check_memory(self.memory, self.sharded)
        self.lines = self._lines(own, shape)

    def _facts(self, projection: int) -> Facts:
        gemma = self.gemma
        also = {IN_WORDS[part]: _number(parameters_of(gemma, part).values()) for part in gemma.trained}
        trains = sum(also.values())
        frozen = _number(gemma.model.parameters()) - trains
        return Facts(projection + trains, frozen, self.num_steps, self.per_step, self.data.notes, also)

    def _lines(self, projection: int, shape: ProjectionShape) -> list[str]:
        """What trains and what is frozen, on what, in how many steps: lines to show before the start."""
        config, facts, count = self.config, self.facts, self.processes.count
        share = facts.trainable / (facts.trainable + facts.frozen)
        trains = f"projection, {projection:,} parameters"
        if facts.also:
            trains += "".join(f"; {name}, {number:,}" for name, number in facts.also.items())
            trains += f"; together {facts.trainable:,}"
        statements = f"{config.batch_size} x {config.gradient_accumulation_steps}"
        statements += f" x {count} (processes)" if count > 1 else ""
        lines = [
            f"trains: {trains} ({share:.3%}); frozen: Gemma, {facts.frozen:,} ({1 - share:.3%})",
            *facts.data,
            f"{facts.num_steps:,} optimizer steps of {statements} statements, {shape.num_tokens} world tokens "
            f"and {self.gemma.num_image_tokens} image tokens each, on {self.gemma.device}",
            str(self.memory),
        ]
        if self.resumed is not None:
            lines += [f"skipped: {reason}" for reason in self.resumed.skipped.values()]
            lines.append(f"resumed after step {self.resumed.progress['step']:,}, from {self.resumed.path}")
        return lines

    def estimate(self, config: Config, start: int = 0) -> Memory:
        """What settings take that differ from the run's in how a step is divided; for the step of the main phase whose
        first statement is the `start`-th of the order."""
        (projection, shape), gemma = self.sizes, self.gemma
        share = self.processes.count if self.sharded else 1
        trained = [p for part in gemma.trained for p in parameters_of(gemma, part).values()]
        every = sum(p.numel() * p.element_size() for p in gemma.model.parameters())
        frozen = every - sum(p.numel() * p.element_size() for p in trained)
        packer = Packer(
            gemma, config.question_template, shape.num_tokens, world_position=config.world_position
        )
        parts = parts_of_step(config, packer, self.order, start, self.processes.count)
        phase = (
            "words" if config.statement_steps else "train"
        )  # captions that the second reads, the first does, too
        batches = [
            packer.pack(part, captions=captions_for(config, self.data, phase, part, 0))
            for part in parts
            if part
        ]
        text = gemma.text_config
        heads = 2 * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
        layer: float = layer_values(text.hidden_size, text.intermediate_size, heads)
        if gemma.plain_decoder:
            compiled = wants_compile(config.compile, gemma.device) and not self.sharded
            layer *= PLAIN if compiled else PLAIN_UNCOMPILED
        tokens = max(batch.token_ids.numel() for batch in batches)
        kept = tokens * kept_values(config, text.num_hidden_layers, text.hidden_size, layer)
        if VISION in gemma.trained:
            eyes = gemma.model.config.vision_config
            patches = (eyes.image_size // eyes.patch_size) ** 2
            layer = PLAIN * (8 * eyes.hidden_size + 2 * eyes.intermediate_size)
            images = max(len(batch.images) for batch in batches)
            kept += images * patches * kept_values(config, eyes.num_hidden_layers, eyes.hidden_size, layer)
        held = TRAINED_BYTES * (_number(trained) / share + projection)
        width = gemma.dtype.itemsize
        if gemma.dtype != torch.float32 and not self.sharded:
            held += width * _number(trained)  # copies to compute with, for the time of a pass
        return Memory(frozen / share, held, kept * width, memory_of(gemma.device).total)


def _number(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def check_memory(memory: Memory, sharded: bool) -> None:
    """ValueError where what is held from the first step to the last does not fit; a pass can be made smaller."""
    held = memory.frozen + memory.trained
    if held > memory.available:
        cure = "more GPUs" if sharded else "more GPUs with `accelerate launch --use_fsdp`"
        raise ValueError(
            f"weights, gradients and moments take {held / GIB:,.1f} GiB, and there are {memory.available / GIB:,.1f}: "
            f"train less of Gemma (--lora_rank 16), or use {cure}"
        )
