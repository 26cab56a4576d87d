"""The plan of a run before its weights load, with an estimate of its memory, and the errors of a step that failed.

Two steps fail for reasons that a user can mend: numbers that are not finite, and a micro-batch that does not fit into
memory. Their errors name the images and the settings that would do.
"""

import math
import re
import resource
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from theworld.config.config import Config
from theworld.data.vsr import Statement
from theworld.extraction.batches import Microbatch
from theworld.hub.card import Facts
from theworld.hub.publish import check_hub
from theworld.models.fp8 import check_fp8
from theworld.models.fsdp import wants_sharding
from theworld.models.gemma import PART_DESCRIPTIONS, parameters_of
from theworld.models.packing import Batch, Control, Packer
from theworld.models.projection import ProjectionShape, WorldProjection
from theworld.models.serialization import (
    LANGUAGE,
    LORA,
    VISION,
    CheckpointError,
    SavedModel,
    find_model,
    list_checkpoints,
)
from theworld.training.checkpoint import (
    Changed,
    ResumePoint,
    check_same_run,
    check_same_settings,
    compare_settings,
    in_words,
    latest_valid_checkpoint,
    refuse_to_overwrite,
)
from theworld.training.data import load_data, plan_gemma, with_statistics, with_vision
from theworld.training.logging import METRICS, check_trackers
from theworld.training.objectives import check_align
from theworld.training.schedule import Order, num_train_steps, phase_of, phases, split_step
from theworld.utils.commands import flags
from theworld.utils.console import ExplainedError
from theworld.utils.device import (
    count_parameters,
    resolve_device,
    resolve_dtype,
    room_on,
    seeded,
    wants_compile,
)
from theworld.utils.distributed import Processes
from theworld.utils.files import check_output, check_room
from theworld.utils.hub import GEMMA_FILE, Fault, locate
from theworld.utils.locks import check_unlocked
from theworld.utils.text import byte_size

FROZEN = "frozen"  # beside LANGUAGE and LORA: how the language model trains
TEXT_TOKENS = 60  # of a statement with its question and the chat template, at most
SURVEYED_EPOCHS = 3  # of the order, for the step that takes the most memory


@dataclass(frozen=True)
class Sizes:
    """The shapes of a language model that decide how much memory it takes."""

    hidden: int
    layers: int
    feed_forward: int
    heads: int  # of queries, keys, values and outputs together
    head_dim: int
    parameters: float  # of the language model
    image_tokens: int
    query_heads: int


# Published shapes of Gemma 3 (arXiv 2503.19786), for models whose config is not on this machine yet.
PUBLISHED = {
    "270m": Sizes(640, 18, 2048, 10, 256, 0.27e9, 0, 4),
    "1b": Sizes(1152, 26, 6912, 10, 256, 1.0e9, 0, 4),
    "4b": Sizes(2560, 34, 10240, 24, 256, 3.88e9, 256, 8),
    "12b": Sizes(3840, 48, 15360, 48, 256, 11.8e9, 256, 16),
    "27b": Sizes(5376, 62, 21504, 96, 128, 27.0e9, 256, 32),
}


def sizes_of(model_name: str) -> Sizes | None:
    """Return the sizes of a Gemma from its config or, if that is not on this machine, from its published name; None for
    an unknown model."""
    try:
        place = locate(model_name, GEMMA_FILE)
    except Fault:
        place = None
    if place is None or place.config is None:
        size = re.search(r"gemma-3-(270m|1b|4b|12b|27b)\b", model_name)
        return PUBLISHED[size[1]] if size else None
    return config_sizes(AutoConfig.from_pretrained(Path(place.config).parent))


def config_sizes(config: PretrainedConfig) -> Sizes:
    """Return the sizes of a Gemma from its config."""
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
        text.num_attention_heads,
    )


@dataclass(frozen=True)
class Layers:
    """How the layers of a language model are computed, which decides what they keep for the backward pass."""

    compiled: bool
    kind: str = FROZEN
    width: int = 2  # bytes of a value
    fp8: bool = False
    checkpointed: bool = False

    @property
    def widened(self) -> int:
        """The size of a float32 value in values: those that norms keep in float32."""
        return 4 // self.width


def training_bytes(config: Config, sizes: Sizes) -> tuple[float, float]:
    """Return the bytes of the frozen language model and those that a micro-batch keeps for its backward pass, at most:
    as if each of its statements were about another image."""
    device = resolve_device(config.device)
    width = resolve_dtype(config.dtype, device).itemsize
    side = config.latent_size // 8
    world = 16 if config.world_mode == "channel" else (side // config.world_patch) ** 2
    world *= 1 + config.num_world_steps
    tokens = config.batch_size * (world + sizes.image_tokens + TEXT_TOKENS)
    compiled = wants_compile(config.compile, device)
    layers = Layers(compiled, FROZEN, width, config.fp8, config.use_gradient_checkpointing)
    frozen = sizes.parameters * width - (linear_weights(sizes) * (width - 1) if config.fp8 else 0)
    return frozen, tokens * width * kept_values(layers, sizes)


def linear_weights(sizes: Sizes) -> int:
    """Return the number of weights in the linear layers of a language model's decoder, which fp8 holds in a byte
    each."""
    return sizes.layers * sizes.hidden * (sizes.heads * sizes.head_dim + 3 * sizes.feed_forward)


def layer_values(layers: Layers, sizes: Sizes) -> int:
    """Return the number of values that a decoder layer keeps of a token for the backward pass.

    Counted from the tensors that autograd, or torch's partitioner where code is compiled, saves of one layer at the
    widths of Gemma 3 4B (RESULTS.md). A norm that is not compiled keeps its input in float32.
    """
    hidden, inner, wide = sizes.hidden, sizes.feed_forward, layers.widened
    turned = sizes.heads // 2 * sizes.head_dim  # queries and keys
    queries = sizes.query_heads * sizes.head_dim  # as keys and values are, once they are repeated
    if layers.compiled and layers.kind == FROZEN:
        # Compiled code keeps queries and keys once, and with fp8 gate and up in a byte each.
        return 3 * hidden + (1 if layers.fp8 else 2) * inner + sizes.heads * sizes.head_dim
    if layers.compiled:
        adapters = queries if layers.kind == LORA else 0
        return 5 * hidden + 3 * inner + turned + 4 * queries + adapters
    if layers.kind == FROZEN:
        return 4 * wide * hidden + 3 * inner + wide * turned + 4 * queries
    if layers.kind == LORA:
        return (4 * wide + 5) * hidden + 4 * inner + wide * turned + 5 * queries
    return (8 * wide + 2) * hidden + 4 * inner + 2 * wide * turned + 4 * queries


def kept_values(layers: Layers, sizes: Sizes) -> int:
    """Return the number of values that all decoder layers keep of a token for the backward pass.

    The last layer of a frozen language model keeps little. Most memory is taken as the backward pass begins, with the
    gradients of gate and up and, with `fp8`, their products. With checkpointing the layers keep their inputs, and one
    layer at work has its values and their gradients and, where it is transformers' own, intermediate values.
    """
    layer = layer_values(layers, sizes)
    if layers.checkpointed:
        return sizes.layers * sizes.hidden + (2 if layers.kind == FROZEN else 3) * layer
    last = 0 if layers.kind == FROZEN else layer
    return (sizes.layers - 1) * layer + last + (4 if layers.fp8 else 2) * sizes.feed_forward


def vision_values(tower: PretrainedConfig, layers: Layers) -> int:
    """Return the number of values that a vision tower that trains keeps of a patch, fitted to what was measured: two
    widths more than the tensors that autograd saves (RESULTS.md)."""
    hidden = tower.hidden_size
    layer = (8 + 2 * layers.widened) * hidden + 2 * tower.intermediate_size
    if layers.checkpointed:
        return tower.num_hidden_layers * hidden + 2 * layer
    return tower.num_hidden_layers * layer


def projection_bytes(shape: ProjectionShape) -> int:
    """Return the bytes that the projection keeps of an image for the backward pass, in float32: its inner values before
    and after GELU, and its tokens before and after their norm and between the brackets."""
    inner = 0 if shape.architecture == "linear" else shape.inner
    return 4 * shape.num_tokens * (2 * inner + 3 * shape.width)


CHECKPOINT_BYTES = 12  # for each parameter that trains: weight and AdamW's two moments, in float32
TRAINED_BYTES = 16  # for each parameter: weight, gradient and AdamW's two moments, in float32


@dataclass(frozen=True)
class Memory:
    """An estimate of the bytes on one device."""

    frozen: float  # weights
    trained: float  # weights, gradients and moments
    activations: float  # kept by the largest micro-batch of a step for its backward pass
    available: float
    loading: float = 0.0  # while weights load, which every process does whole

    @property
    def total(self) -> float:
        """The most that is used at a time, in a step or while weights load."""
        return max(self.frozen + self.trained + self.activations, self.loading)

    def __str__(self) -> str:
        total, available, frozen, trained, activations = (
            byte_size(size)
            for size in (self.total, self.available, self.frozen, self.trained, self.activations)
        )
        return (
            f"memory: about {total} of {available}: frozen weights {frozen}, what trains with its gradients and "
            f"moments {trained}, a micro-batch {activations}"
        )


class Plan:
    """A run before its weights load: data, order, steps, and counts from the shapes of the models alone."""

    def __init__(
        self, config: Config, cache: Path, allow_changed: bool = False, flag: str = "--output_dir"
    ) -> None:
        """`allow_changed`: take changes, by a resume, of what the run learns. `flag`: what says where the run writes.

        Raises ValueError, StoreError or CheckpointError if the run could not start.
        """
        self.output_dir = Path(config.output_dir)
        self.processes = Processes(config.device)
        if self.processes.is_main_process:  # the only one that writes, logs and uploads
            check_hub(config)
            check_trackers(config)
            check_output(self.output_dir / METRICS, flag)
        if config.fp8:
            check_fp8(self.processes.device)
        count = self.processes.count
        self.global_batch_size = config.batch_size * config.gradient_accumulation_steps * count
        self.data = load_data(config, cache)
        self.resumed = latest_valid_checkpoint(config.resume_from) if config.resume_from else None
        check_unlocked(self.output_dir, flag)
        refuse_to_overwrite(self.output_dir, self.resumed)
        self.start, init_from = _start(config, self.resumed)
        self.data = with_statistics(self.data, self.start)
        self.config = config = replace(config, init_from=init_from)
        self.changed, self.changed_besides = Changed(), Changed()
        if self.resumed is not None:
            found = compare_settings(self.resumed, config, self.processes.device)
            self.changed, self.changed_besides = found
            check_same_settings(self.resumed, self.changed, allow_changed)
        self.order = Order(self.data.train, config.seed)
        before = config.align_steps + config.statement_steps
        self.num_steps = before + num_train_steps(config, self.data.num_epoch, self.global_batch_size)
        self.phases = phases(config, self.num_steps)
        self.gemma = plan_gemma(config, self.processes.device, self.data, self.start)
        self.data = with_vision(self.data, self.gemma, config)
        self.loading = _number(self.gemma.model.parameters()) * self.gemma.dtype.itemsize
        if self.resumed is not None:
            revision = self.gemma.revision
            self.changed |= check_same_run(self.resumed, self.identity(), revision, allow_changed)
        self.sharded = wants_sharding(count, self.gemma)
        fingerprint = self.data.latents.fingerprint
        shape = ProjectionShape.from_settings(config, fingerprint, self.gemma.width)
        check_align(config, shape, self.gemma.num_image_tokens)
        with seeded(config.seed):  # its values count for nothing
            own, _ = count_parameters(
                WorldProjection(shape, fingerprint["latents_mean"], fingerprint["latents_std"])
            )
        self.facts = self._facts(own)
        if self.processes.is_main_process:
            check_room(self.output_dir, CHECKPOINT_BYTES * self.facts.trainable, flag)
        self.sizes = own, shape
        self.heaviest_start = self._heaviest_start()
        self.memory = self.estimate(config)
        check_memory(self)
        self.lines = self._lines(own, shape)

    @property
    def finished(self) -> bool:
        """Whether the run that is resumed has taken all of its steps."""
        return self.resumed is not None and self.resumed.progress["step"] >= self.num_steps

    def identity(self) -> dict[str, Any]:
        """Return the facts about a run that have to be the same where it is resumed."""
        return {
            "num_statements": len(self.data.train),
            "data_sha256": self.data.sha256(),
            "statements_per_step": self.global_batch_size,
            "trained": list(self.gemma.trainable_parts),
            "dtype": str(self.gemma.dtype).removeprefix("torch."),
        }

    def _facts(self, projection: int) -> Facts:
        gemma = self.gemma
        also = {
            PART_DESCRIPTIONS[part]: _number(parameters_of(gemma, part).values())
            for part in gemma.trainable_parts
        }
        trains = sum(also.values())
        frozen = _number(gemma.model.parameters()) - trains
        return Facts(
            projection + trains, frozen, self.num_steps, self.global_batch_size, self.data.notes, also
        )

    def _lines(self, projection: int, shape: ProjectionShape) -> list[str]:
        """Return the lines to show before the start: trained and frozen parameters, data, steps and memory."""
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
            if self.changed_besides:
                lines.append(f"changed, but not what is learnt: {in_words(self.changed_besides)}")
            if self.changed:
                lines.append(f"changed on purpose (--allow_changed): {in_words(self.changed)}")
        if self.finished:
            lines.append(_finished(config, self.num_steps))
        return lines

    def _heaviest_start(self) -> int:
        """Return the place in the order of the first statement of the step with the most images."""
        steps_end = min(self.num_steps * self.global_batch_size, SURVEYED_EPOCHS * self.order.num_statements)
        starts = range(0, steps_end, self.global_batch_size)
        return max(starts, key=lambda i: len({s.image for s in self.order.take(i, self.global_batch_size)}))

    def estimate(self, config: Config, start: int | None = None) -> Memory:
        """Return the memory of a step with these settings, which may divide it otherwise than the run's: of the step in
        the main phase whose first statement is the `start`-th of the order, by default of that with the most images."""
        (projection, shape), gemma = self.sizes, self.gemma
        share = self.processes.count if self.sharded else 1
        trained = [p for part in gemma.trainable_parts for p in parameters_of(gemma, part).values()]
        every = sum(p.numel() * p.element_size() for p in gemma.model.parameters())
        frozen = every - sum(p.numel() * p.element_size() for p in trained)
        if config.fp8:
            frozen -= linear_weights(config_sizes(gemma.model.config)) * (gemma.dtype.itemsize - 1)
        packer = Packer(
            gemma, config.question_template, shape.num_tokens, world_position=config.world_position
        )
        start = self.heaviest_start if start is None else start
        parts = split_step(config, packer, self.order, start, self.processes.count)
        # The first phase with a language model reads captions if any does.
        phase, seed = phase_of(self.phases, config.align_steps), config.seed
        batches = [
            packer.pack(part, captions=self.data.captions_of(part, phase, seed, 0)) for part in parts if part
        ]
        sizes, width = config_sizes(gemma.model.config), gemma.dtype.itemsize
        layers = self._layers_of(config)
        kept = max(map(partial(_kept_bytes, layers=layers, sizes=sizes), batches))
        if VISION in gemma.trainable_parts:
            tower = gemma.model.config.vision_config
            patches = (tower.image_size // tower.patch_size) ** 2
            images = max(len(batch.images) for batch in batches)
            kept += images * patches * width * vision_values(tower, layers)
        kept += max(len(batch.worlds) for batch in batches) * projection_bytes(shape)
        held = TRAINED_BYTES * (_number(trained) / share + projection)
        if trained and not self.sharded:
            kept = self._with_gradients(kept, _number(trained), layers, len(batches))
        return Memory(frozen / share, held, kept, room_on(gemma.device), self.loading)

    def _layers_of(self, config: Config) -> Layers:
        gemma = self.gemma
        compiled = wants_compile(config.compile, gemma.device)
        kind = FROZEN
        if gemma.uses_hf_decoder:
            compiled = compiled and not self.sharded
            kind = LORA if LORA in gemma.modified_parts else LANGUAGE
        width = gemma.dtype.itemsize
        return Layers(compiled, kind, width, config.fp8, config.use_gradient_checkpointing)

    def _with_gradients(self, kept: float, trained: int, layers: Layers, num_microbatches: int) -> float:
        """Return the bytes that a step takes beyond weights, gradients and moments of all that trains, where `kept` is
        kept for the backward pass and so many parameters of Gemma train.

        As the backward pass begins there are also the copies of the weights in the dtype to compute in, or of one layer
        with checkpointing, and the gradient of the head; gradients of the weights are there only from an earlier
        micro-batch. As it ends there are all gradients, and that of the embeddings once more.
        """
        language = layers.kind == LANGUAGE
        table = self.gemma.text_model.embed_tokens.weight.numel() if language else 0
        copies = 0 if layers.widened == 1 else layers.width * (table if layers.checkpointed else trained)
        earlier = 4 * trained if num_microbatches == 1 else 0
        return max(kept + copies + 4 * table - earlier, 4 * table)


def _kept_bytes(batch: Batch, layers: Layers, sizes: Sizes) -> float:
    """Return the bytes that the decoder keeps of a batch: nothing of the prefix, which has no gradient, but its keys
    and values, and dense masks of both kinds where code is not compiled."""
    rows, length = batch.token_ids.shape
    prefix = rows * batch.num_prefix_tokens
    values = (rows * length - prefix) * kept_values(layers, sizes)
    groups = sizes.heads // 2 - sizes.query_heads
    if not layers.checkpointed:
        values += prefix * sizes.layers * 2 * groups * sizes.head_dim
    dense = not (layers.compiled and layers.kind == FROZEN)
    masks = 2 * rows * (length - batch.num_prefix_tokens) * length if dense else 0
    return layers.width * (values + masks)


def _start(config: Config, resumed: ResumePoint | None) -> tuple[SavedModel | None, str | None]:
    """Return the saved model that a run starts from, if any, and the checkpoint to record as `init_from`.

    A folder as `init_from` means its newest checkpoint when the run first starts, and the same one after a resume.
    """
    if resumed is None:
        start = SavedModel.open_folder(config.init_from) if config.init_from else None
        return start, None if start is None else str(start.folder)
    recorded = resumed.saved.config().init_from
    if config.init_from is None:
        return resumed.saved, recorded
    if recorded is None:  # as in a checkpoint from the hub, whose settings are without paths
        return resumed.saved, str(find_model(config.init_from))
    meant = Path(recorded).resolve()
    if Path(config.init_from).resolve() not in (meant, meant.parent):
        raise CheckpointError(
            f"init_from is {config.init_from}, but the run of {resumed.path} started from {recorded}; leave "
            "--init_from out to go on with that run, or leave --resume_from out to start another"
        )
    return resumed.saved, recorded


def _finished(config: Config, num_steps: int) -> str:
    """Return a line that says that a run has taken all of its steps, and the flags that double them."""
    longer = f"--num_epochs {2 * config.num_epochs}"
    longer += f" --max_steps {2 * config.max_steps}" if config.max_steps is not None else ""
    return (
        f"finished: all {num_steps:,} optimizer steps are taken; to go on, give more with {longer} --allow_changed, or "
        "start a second stage from it with --init_from"
    )


def _number(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def check_memory(plan: Plan) -> None:
    """Raise ValueError for a run that does not fit by its estimate, with settings that would, unless the setting
    `check_memory` is false."""
    memory = plan.memory
    if not plan.config.check_memory or memory.total <= memory.available:
        return
    held = memory.frozen + memory.trained
    if memory.loading > memory.available:
        size = byte_size(memory.loading)
        hint = f"Loading the weights takes {size} for a moment: use a smaller Gemma or a larger GPU"
    elif held > memory.available:  # micro-batches can be made smaller, this cannot
        more = "more GPUs" if plan.sharded else "more GPUs with `accelerate launch --use_fsdp`"
        hint = f"Train less of Gemma (--lora_rank 16), or use {more}"
    else:
        hint = advice(settings_that_fit(plan, plan.heaviest_start, memory.available))
    raise ValueError(
        f"this run does not fit on {plan.gemma.device}. {memory}. {hint}; to try it as it is, add --no-check_memory"
    )


SHOWN = 8  # images that a message names
ROOM = 0.95  # part of the memory that suggested settings may fill
# Messages of torch where it has no error type of its own: on the CPU, and from a library that allocates by itself.
_WORDS = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class NotFinite(ExplainedError, ArithmeticError):
    """A loss or gradient that is not a number; the step, its images and settings are in the message."""


class OutOfMemory(ExplainedError, MemoryError):
    """A step that did not fit; its micro-batch, and settings that would fit, are in the message."""


# ---- numbers


def not_finite(
    step: int, loss: float, norm: float, rate: float, microbatches: Sequence[Microbatch]
) -> NotFinite:
    """Return the error for a loss or gradient norm of the `step`-th step that is not finite.

    Both are over all processes; `microbatches` are those of this process.
    """
    what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient norm", norm)
    culprits = "; ".join(
        f"{kind} of {named(images)} are not finite" for kind, images in _faulty(microbatches)
    )
    return NotFinite(
        f"step {step}: the {what} is {value} (learning rate {rate:.3g}; images {_images(microbatches)}; gradient norm "
        f"{norm:.3g}{'; ' + culprits if culprits else ''}); nothing was updated or overwritten. Lower --learning_rate, "
        "or resume from the last checkpoint"
    )


def check_answers(step: int, statements: Sequence[Statement], logits: np.ndarray) -> None:
    """Raise NotFinite if answers to dev statements, float32[n, _], are not finite after `step` steps."""
    bad = sorted({s.image for s, row in zip(statements, logits, strict=True) if not np.isfinite(row).all()})
    if bad:
        raise NotFinite(
            f"step {step}: answers on dev are not finite (images {named(bad)}); nothing was overwritten. Resume from "
            "the last checkpoint with a lower --learning_rate"
        )


def _faulty(microbatches: Sequence[Microbatch]) -> Iterator[tuple[str, list[str]]]:
    """Yield each kind of input of the micro-batches that is not finite itself, with its images."""
    for kind in ("latents", "vision features"):
        found = set[str]()
        for one in microbatches:
            rows = one.latents if kind == "latents" else one.vision
            names: Sequence[str | Control] = [s.image for s in one.statements]
            if one.batch is not None:
                names = one.batch.worlds if kind == "latents" else one.batch.images
            if rows is not None:
                finite = rows.flatten(1).isfinite().all(1).tolist()
                bad = (name for name, good in zip(names, finite, strict=True) if not good)
                found |= {name for name in bad if isinstance(name, str)}
        if found:
            yield kind, sorted(found)


def _images(microbatches: Sequence[Microbatch]) -> str:
    return named(sorted({s.image for one in microbatches for s in one.statements}))


def named(images: Sequence[str]) -> str:
    """Return the first few images, and how many more there are."""
    more = f" and {len(images) - SHOWN} more" if len(images) > SHOWN else ""
    return ", ".join(images[:SHOWN]) + more


# ---- memory


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that there is no memory left, on a GPU or here."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def out_of_memory(plan: Plan, step: int, start: int, one: Microbatch) -> OutOfMemory:
    """Return the error for a micro-batch of the `step`-th step that did not fit.

    The first statement of the step is the `start`-th of the order.
    """
    device = plan.gemma.device
    tokens = f", {one.batch.token_ids.numel():,} tokens" if one.batch is not None else ""
    images = sorted({s.image for s in one.statements})
    room = room_on(device)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    older = list_checkpoints(plan.output_dir)
    hint = (
        f"go on from {older[-1]} with {flags('--resume_from', plan.output_dir)}"
        if older
        else "no checkpoint was saved yet"
    )
    return OutOfMemory(
        f"step {step}: out of memory in a micro-batch of {len(one.statements)} statements about {len(images)} "
        f"images{tokens} ({named(images)}): this process had {byte_size(peak)} at most, {device} has "
        f"{byte_size(room)} for it. {advice(settings_that_fit(plan, start, room))}; {hint}"
    )


def advice(found: Sequence[str]) -> str:
    """Return a sentence that proposes these settings, or others where there are none."""
    if not found:
        return (
            "By the estimate no way to divide this step would fit: train less of Gemma (--lora_rank 16), take fewer "
            "world tokens (a larger --world_patch), a smaller Gemma, or a larger GPU"
        )
    return f"The same training in settings that would fit, by the estimate: {', or '.join(found)}"


def settings_that_fit(plan: Plan, start: int, room: float) -> list[str]:
    """Return flags that divide the same step so that it fits into `room` bytes: the largest micro-batches that do, and
    gradient checkpointing. A micro-batch is taken to need the estimate or, since it did not fit, at least `room`."""
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
        # The same micro-batches, but checkpointed, or else smaller ones.
        divided = next((d for d in _divided(changed) if (checkpointing or d != changed) and fits(d)), None)
        if divided is not None:
            if divided.batch_size != plan.config.batch_size:
                sizes = (divided.batch_size, divided.gradient_accumulation_steps)
                flag = ["--batch_size {} --gradient_accumulation_steps {}".format(*sizes), *flag]
            found.append(" ".join(flag))
    return found


def _divided(config: Config) -> Iterator[Config]:
    """Yield the settings, then the same with smaller micro-batches that divide a step evenly."""
    total = config.batch_size * config.gradient_accumulation_steps
    for size in range(config.batch_size, 0, -1):
        if total % size == 0:
            yield replace(config, batch_size=size, gradient_accumulation_steps=total // size)
