"""What a run is going to do, before it does it: what trains, how many steps, and about how much memory they take.

Whether a machine is enough for a training, estimated before any model is loaded.

What a run says of a step that failed, and ends with: numbers that are not finite, or no memory left.
"""

import math
import re
import resource
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig

from theworld.config.config import Config
from theworld.data.vsr import Statement
from theworld.extraction.batches import Pass
from theworld.hub.card import Facts
from theworld.hub.publish import check_hub
from theworld.models.fsdp import wants_sharding
from theworld.models.gemma import IN_WORDS, load_gemma, parameters_of
from theworld.models.packing import ZERO, Packer
from theworld.models.projection import ProjectionShape, WorldProjection
from theworld.models.serialization import VISION, find_start, list_checkpoints
from theworld.training.checkpoint import find_sound, refuse_to_overwrite
from theworld.training.data import load_data, prepare_gemma
from theworld.training.objectives import captions_for, check_align
from theworld.training.schedule import Order, num_train_steps, parts_of_step
from theworld.utils.console import ExplainedError
from theworld.utils.device import (
    GIB,
    count_parameters,
    memory_of,
    resolve_device,
    resolve_dtype,
    wants_compile,
)
from theworld.utils.distributed import Processes
from theworld.utils.hub import GEMMA_FILE, Fault, locate

TEXT_TOKENS = 60  # of a statement with the guide's question, at most
FP8_CAPABILITY = (9, 0)  # Hopper
SURVEYED_EPOCHS = 3  # for the step that takes the most memory


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
    heads = sizes.heads * sizes.head_dim
    kept = decoder_values(config, sizes.layers, sizes.hidden, sizes.feed_forward, heads)
    return sizes.parameters * width, tokens * width * kept


def layer_values(hidden: int, feed_forward: int, heads: int) -> int:
    """Values that a decoder layer of ours keeps of a token for the backward pass: its input and two products of that
    width, gate and up, queries, keys and values, queries and keys once more after norm and rotation, and the output of
    attention. `heads`: the width of all heads of queries, keys, values and outputs together."""
    return 3 * hidden + 2 * feed_forward + heads * 3 // 2


def decoder_values(config: Config, layers: int, hidden: int, feed_forward: int, heads: int) -> float:
    """Values a token that our decoder holds where a backward pass needs most, at its beginning: what all layers but the
    last keep, which goes on with few tokens, and gradients of gate and up; in 8 bits what is made of them, too."""
    layer = layer_values(hidden, feed_forward, heads)
    if config.use_gradient_checkpointing:
        return kept_values(config, layers, hidden, layer)
    return (layers - 1) * layer + (4 if config.fp8 else 2) * feed_forward


def projection_bytes(shape: ProjectionShape) -> int:
    """Bytes that the projection keeps of an image for the backward pass, in float32: its inner values before and after
    GELU, its tokens before and after their norm, and between brackets."""
    inner = 0 if shape.architecture == "linear" else shape.inner
    return 4 * shape.num_tokens * (2 * inner + 3 * shape.width)


def kept_values(config: Config, layers: int, hidden: int, layer: float) -> float:
    """Values that all layers keep of a token; with checkpointing only their inputs, and one layer at work: its values
    again, their gradients, and what is between the two."""
    return layers * hidden + 3 * layer if config.use_gradient_checkpointing else layers * layer


TRAINED_BYTES = 16  # of a parameter: weight, gradient and AdamW's two moments, in float32
# What transformers' own layers keep for the backward pass, in multiples of what is counted here, which is what ours
# keep. Fitted to what was measured: RESULTS.md.
PLAIN, PLAIN_UNCOMPILED = 1.93, 2.75


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
        if self.processes.is_main_process:  # the only one that uploads
            check_hub(config)
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
        self.data = prepare_gemma(self.gemma, config, self.data, self.start)
        self.sharded = wants_sharding(count, self.gemma)
        fingerprint = self.data.latents.reader.fingerprint
        shape = ProjectionShape.from_settings(config, fingerprint, self.gemma.width)
        check_align(config, shape, self.gemma.num_image_tokens)
        own, _ = count_parameters(
            WorldProjection(shape, fingerprint["latents_mean"], fingerprint["latents_std"])
        )
        self.facts = self._facts(own)
        self.sizes = own, shape
        self.heaviest = self._heaviest()
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

    def _heaviest(self) -> int:
        """The place in the order of the first statement of the step with the most images, in the first epochs."""
        stop = min(self.num_steps * self.per_step, SURVEYED_EPOCHS * self.order.num_statements)
        starts = range(0, stop, self.per_step)
        return max(starts, key=lambda start: len({s.image for s in self.order.take(start, self.per_step)}))

    def estimate(self, config: Config, start: int | None = None) -> Memory:
        """What settings take that differ from the run's in how a step is divided; for the step of the main phase whose
        first statement is the `start`-th of the order, by default the heaviest."""
        (projection, shape), gemma = self.sizes, self.gemma
        share = self.processes.count if self.sharded else 1
        trained = [p for part in gemma.trained for p in parameters_of(gemma, part).values()]
        every = sum(p.numel() * p.element_size() for p in gemma.model.parameters())
        frozen = every - sum(p.numel() * p.element_size() for p in trained)
        packer = Packer(
            gemma, config.question_template, shape.num_tokens, world_position=config.world_position
        )
        start = self.heaviest if start is None else start
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
        sizes = text.num_hidden_layers, text.hidden_size, text.intermediate_size
        if gemma.plain_decoder:
            compiled = wants_compile(config.compile, gemma.device) and not self.sharded
            layer = (PLAIN if compiled else PLAIN_UNCOMPILED) * layer_values(*sizes[1:], heads)
            values = kept_values(config, *sizes[:2], layer)
        else:
            values = decoder_values(config, *sizes, heads)
        tokens = max(batch.token_ids.numel() for batch in batches)
        kept = tokens * values
        if VISION in gemma.trained:
            eyes = gemma.model.config.vision_config
            patches = (eyes.image_size // eyes.patch_size) ** 2
            layer = PLAIN * (8 * eyes.hidden_size + 2 * eyes.intermediate_size)
            images = max(len(batch.images) for batch in batches)
            kept += images * patches * kept_values(config, eyes.num_hidden_layers, eyes.hidden_size, layer)
        worlds = max(len(batch.worlds) for batch in batches)
        held = TRAINED_BYTES * (_number(trained) / share + projection)
        width = gemma.dtype.itemsize
        if gemma.dtype != torch.float32 and not self.sharded:
            held += width * _number(trained)  # copies to compute with, for the time of a pass
        activations = kept * width + worlds * projection_bytes(shape)
        return Memory(frozen / share, held, activations, memory_of(gemma.device).total)


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


SHOWN = 8  # images that are named
ROOM = 0.95  # of the memory that settings may fill to be said to fit
# How torch says it where it has no type for it: the CPU, and a library that asks the device itself.
_WORDS = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class NotFinite(ExplainedError, ArithmeticError):
    """A loss or gradient that is not a number; the step, its images and settings are in the message."""


class OutOfMemory(ExplainedError, MemoryError):
    """A step that did not fit; its pass, and settings that would fit, are in the message."""


# ---- numbers


def not_finite(step: int, loss: float, norm: float, rate: float, passes: Sequence[Pass]) -> NotFinite:
    """The loss or the gradient norm of the `step`-th step, over all processes, is not finite; `passes`: of this one."""
    what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient norm", norm)
    culprits = "; ".join(f"{kind} of {named(images)} are not finite" for kind, images in _faulty(passes))
    return NotFinite(
        f"step {step}: the {what} is {value} (learning rate {rate:.3g}; images {_images(passes)}; gradient norm "
        f"{norm:.3g}{'; ' + culprits if culprits else ''}); nothing was updated or overwritten. Lower --learning_rate, "
        "or resume from the last checkpoint"
    )


def check_answers(step: int, statements: Sequence[Statement], logits: np.ndarray) -> None:
    """NotFinite if the answers to some statements of dev, float32[n, _], are not finite after `step` steps."""
    bad = sorted({s.image for s, row in zip(statements, logits, strict=True) if not np.isfinite(row).all()})
    if bad:
        raise NotFinite(
            f"step {step}: answers on dev are not finite (images {named(bad)}); nothing was overwritten. Resume from "
            "the last checkpoint with a lower --learning_rate"
        )


def _faulty(passes: Sequence[Pass]) -> Iterator[tuple[str, list[str]]]:
    """What the passes read that is not finite itself, and of which images."""
    for kind in ("latents", "vision features"):
        found = set[str]()
        for one in passes:
            rows = one.latents if kind == "latents" else one.vision
            names: Sequence[str] = [s.image for s in one.statements]
            if one.batch is not None:
                names = one.batch.worlds if kind == "latents" else one.batch.images
            if rows is not None:
                finite = rows.flatten(1).isfinite().all(1).tolist()
                found |= {name for name, good in zip(names, finite, strict=True) if not good and name != ZERO}
        if found:
            yield kind, sorted(found)


def _images(passes: Sequence[Pass]) -> str:
    return named(sorted({s.image for one in passes for s in one.statements}))


def named(images: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(images) - SHOWN} more" if len(images) > SHOWN else ""
    return ", ".join(images[:SHOWN]) + more


# ---- memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a GPU or here."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def out_of_memory(plan: Plan, step: int, start: int, one: Pass) -> OutOfMemory:
    """Memory ran out in a pass of the `step`-th step, whose first statement is the `start`-th of the order."""
    device = plan.gemma.device
    tokens = f", {one.batch.token_ids.numel():,} tokens" if one.batch is not None else ""
    images = sorted({s.image for s in one.statements})
    if device.type == "cuda":
        peak, room = torch.cuda.max_memory_allocated(device), _room_on_gpu(device)
    else:
        peak, room = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, memory_of(device).total
    older = list_checkpoints(plan.output_dir)
    cure = (
        f"go on from {older[-1]} with --resume_from {plan.output_dir}"
        if older
        else "no checkpoint was saved yet"
    )
    return OutOfMemory(
        f"step {step}: out of memory in a pass of {len(one.statements)} statements about {len(images)} images{tokens} "
        f"({named(images)}): this process had {peak / GIB:.1f} GiB at most, {device} has {room / GIB:.1f} for it. "
        f"{_advice(settings_that_fit(plan, start, room))}; {cure}"
    )


def _room_on_gpu(device: torch.device) -> float:
    """What this process could have, beside others on the same GPU."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def _advice(found: Sequence[str]) -> str:
    if not found:
        return (
            "By the estimate no way to divide this step would fit: train less of Gemma (--lora_rank 16), take fewer "
            "world tokens (a larger --world_patch), a smaller Gemma, or a larger GPU"
        )
    return f"The same training in settings that would fit, by the estimate: {', or '.join(found)}"


def settings_that_fit(plan: Plan, start: int, room: float) -> list[str]:
    """Flags that divide the same step so that it fits into `room` bytes: the largest passes that do, and gradient
    checkpointing. A pass is taken to need what is estimated or, since it did not fit, at least what there was."""
    now = plan.estimate(plan.config, start)
    factor = max(1.0, (room - now.frozen - now.trained) / now.activations)

    def fits(config: Config) -> bool:
        memory = plan.estimate(config, start)
        return memory.frozen + memory.trained + factor * memory.activations <= ROOM * room

    found = []
    for checkpointing in (False, True):
        if checkpointing and plan.config.use_gradient_checkpointing:
            break
        flag = ["--use_gradient_checkpointing"] if checkpointing else []
        changed = replace(
            plan.config, use_gradient_checkpointing=checkpointing or plan.config.use_gradient_checkpointing
        )
        # As it was, but checkpointed, or else in smaller passes.
        divided = next((d for d in _divided(changed) if (checkpointing or d != changed) and fits(d)), None)
        if divided is not None:
            if divided.batch_size != plan.config.batch_size:
                sizes = (divided.batch_size, divided.gradient_accumulation_steps)
                flag = ["--batch_size {} --gradient_accumulation_steps {}".format(*sizes), *flag]
            found.append(" ".join(flag))
    return found


def _divided(config: Config) -> Iterator[Config]:
    """The same statements a step in passes of a half, a quarter and so on, where that comes out even; itself first."""
    total = config.batch_size * config.gradient_accumulation_steps
    for size in range(config.batch_size, 0, -1):
        if total % size == 0:
            yield replace(config, batch_size=size, gradient_accumulation_steps=total // size)
