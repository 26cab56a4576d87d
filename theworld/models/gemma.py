"""Gemma 3: loading, prompts, answer tokens and image features, and which parts of it train.

One `Gemma` serves both kinds: the multimodal `Gemma3ForConditionalGeneration` (4B and larger), which sees the
photograph through its SigLIP vision tower, and the text-only `Gemma3ForCausalLM` (270M, 1B), which does not. Gemma is
frozen unless the settings let parts of it train beside the projection:

    stage 1    the projection alone                                                   projection.safetensors
    stage 2    freeze_gemma_vision false: Gemma's vision tower and its projector too  vision.safetensors
    stage 3    freeze_gemma_language false: the language model too, all of it         language.safetensors
               or, with lora_rank, low-rank matrices beside its linear layers         lora.safetensors

A checkpoint holds each part that differs from the published Gemma, whether its own run trained the part or the run
that it started from. Parts that train are kept in float32 and computed in the dtype of the rest.

Dimensions: B images, N image tokens an image (256 in the 4B), V vision width, D width of the language model.
"""

import copy
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
)

from theworld.config.config import Config
from theworld.models.fp8 import Weight, check_fp8, convert_layer
from theworld.models.pretrained import load_pretrained, to_device
from theworld.models.serialization import (
    LANGUAGE,
    LORA,
    PARTS,
    VISION,
    copy_strictly,
    part_file,
    weights_sha256,
)
from theworld.utils.device import resolve_device, resolve_dtype, seeded, wants_compile
from theworld.utils.hub import GEMMA_FILE, file_at_hand, hub_revision, source_of_model

LORA_SCALE = 2  # factor of the low-rank product: lora_alpha / r (Hu et al. 2021, arXiv 2106.09685)
SCALED_ROWS = 2**14  # rows of the table of embeddings that are measured together
_LINEARS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
_CLASSES = {"gemma3": Gemma3ForConditionalGeneration, "gemma3_text": Gemma3ForCausalLM}


@dataclass(frozen=True)
class GemmaParts:
    """Which parts of a Gemma differ from the published one, and which of these train."""

    modified: tuple[str, ...] = ()  # some of VISION, LANGUAGE and LORA
    trainable: tuple[str, ...] = ()  # some of `modified`
    lora_rank: int | None = None  # None: no LoRA matrices

    @property
    def uses_hf_decoder(self) -> bool:
        """Whether transformers' own decoder reads packed rows, as weights that train and LoRA matrices need."""
        return LORA in self.modified or LANGUAGE in self.trainable


PUBLISHED = GemmaParts()


def trainable_parts(config: Config) -> list[str]:
    """Return the parts of Gemma that the settings let train."""
    parts = [] if config.freeze_gemma_vision else [VISION]
    if not config.freeze_gemma_language:
        parts.append(LANGUAGE if config.lora_rank is None else LORA)
    return parts


def decide_parts(config: Config, world: dict[str, Any] | None = None) -> GemmaParts:
    """Return the parts of Gemma in a run with these settings.

    `world` is the world.json of the checkpoint that the run starts from, or None. Raises ValueError for settings that
    cannot go on from that checkpoint.
    """
    trains = trainable_parts(config)
    held = list((world or {}).get("parts", []))
    rank = (world or {}).get("lora_rank")
    if LORA in trains and LORA in held and rank != config.lora_rank:
        raise ValueError(
            f"lora_rank is {config.lora_rank}, but the checkpoint to start from has LoRA matrices of rank {rank}"
        )
    modified = tuple(part for part in PARTS if part in {*held, *trains})
    if LORA in modified and LANGUAGE in modified:
        raise ValueError(
            "the checkpoint to start from and this run train the language model in two ways, one by LoRA and one by "
            f"its own weights (lora_rank is {json.dumps(config.lora_rank)}, the checkpoint's {json.dumps(rank)}): "
            "go on in the same way"
        )
    lora_rank = (config.lora_rank if LORA in trains else rank) if LORA in modified else None
    return GemmaParts(modified, tuple(trains), lora_rank)


def saved_parts(world: dict[str, Any]) -> GemmaParts:
    """Return the parts of Gemma in a saved model with this world.json; none of them trains."""
    return GemmaParts(tuple(world["parts"]), (), world["lora_rank"] if LORA in world["parts"] else None)


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt in two parts: the tokens that all statements of an image share, and one statement's branch.

    `world_at` is the index in `shared` before which the world tokens and their two brackets stand, or None
    for a prompt without them. `caption` is the (start, end) range of the caption's tokens in `branch`; `spans` gives
    for each of them the (start, end) characters of the stripped caption that it stands for.
    """

    shared: tuple[int, ...]
    branch: tuple[int, ...]
    world_at: int | None
    caption: tuple[int, int]
    spans: tuple[tuple[int, int], ...]

    def tokens_of(self, start: int, end: int) -> list[int]:
        """Return the indices in `branch` of the tokens that hold the caption's characters from `start` to `end`."""
        return [self.caption[0] + i for i, (a, b) in enumerate(self.spans) if b > start and a < end]


class Gemma:
    """A Gemma 3 with its tokeniser and, if it is multimodal, its image processor.

    In each layer of a frozen language model the weights of queries, keys and values are views of one matrix, `qkv`,
    which every decoder of this Gemma shares; transformers' own forward goes on working with the views. With `fp8` all
    linear layers are in 8 bits from the start.
    """

    def __init__(
        self,
        name_or_path: str,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attention: str = "sdpa",
        revision: str | None = None,
        parts: GemmaParts = PUBLISHED,
        seed: int = 0,
        weights: bool = True,
        checkpointed: bool = False,
        compiled: bool = False,
        fp8: bool = False,
    ) -> None:
        """Load a Gemma from a folder or the hub.

        `attention`: how packed rows are read, "sdpa" with dense masks or "flex_attention" with block masks, which give
        the same; flex needs rows of whole blocks, and is for compiled code on a GPU. (The FlashAttention kernels ignore
        such masks silently.) transformers' own forward always has sdpa.
        `revision`: commit of a hub model; None is the newest.
        `parts`: the parts that differ from the published Gemma. They have its weights until others are loaded
        (`load_parts`); new LoRA matrices are drawn from `seed` and change nothing yet.
        `weights`: False gives shapes without values, on the meta device, which can be counted and packed for.
        `checkpointed`: layers of parts that train keep only their inputs for the backward pass.
        `compiled`: transformers' decoder layers are compiled, where they read packed rows.
        `fp8`: the linear layers of the language model are in 8 bits (`theworld.models.fp8`), in place of the originals.

        Raises ValueError for another model than a Gemma 3, or one that cannot have these parts, or 8 bits.
        """
        if attention not in ("sdpa", "flex_attention"):
            raise ValueError(f"attention {attention!r}: wanted sdpa or flex_attention")
        if attention == "flex_attention" and parts.uses_hf_decoder:
            raise ValueError(
                "attention 'flex_attention': transformers' decoder takes dense masks; wanted sdpa"
            )
        if fp8 and {LANGUAGE, LORA} & set(parts.modified):
            raise ValueError(
                "fp8 is true, but the language model trains or was trained, and its weights stay in 16 bits; use "
                "--no-fp8"
            )
        self.name = name_or_path
        self.device = torch.device(device)
        if fp8:
            check_fp8(self.device)
        self.dtype = dtype
        self.attention = attention
        self.fp8 = fp8
        self.parts = parts
        self._hub = {"revision": revision} if revision else {}
        self._seed, self._checkpointed, self._compiled = seed, checkpointed, compiled
        self._source = source_of_model(name_or_path, GEMMA_FILE, revision)
        self.is_multimodal = is_multimodal(name_or_path, **self._hub)
        if VISION in parts.trainable and not self.is_multimodal:
            raise ValueError(
                f"freeze_gemma_vision is false, but {name_or_path} is text-only: it has no vision tower to train"
            )
        self._vision_sha256 = ""  # not taken yet
        self.model, self.qkv = self._build(weights)
        self.revision = revision or hub_revision(name_or_path, "config.json")
        self.processor = (
            AutoProcessor.from_pretrained(self._source, **self._hub) if self.is_multimodal else None
        )
        self.tokenizer = (
            self.processor.tokenizer
            if self.processor
            else AutoTokenizer.from_pretrained(self._source, **self._hub)
        )
        _check_template(self.tokenizer, self.processor, name_or_path)
        self.text_config = self.model.config.get_text_config()
        added = self.tokenizer.added_tokens_decoder.values()
        self._control_tokens = sorted(token.content for token in added if token.special)
        self.answer_ids = tuple(_single_token(self.tokenizer, digit) for digit in "01")

    def _build(self, weights: bool, vision: bool = True) -> tuple[PreTrainedModel, list[Weight]]:
        """Return the model with its parts, and for each layer of a frozen language model the merged matrix. `vision`:
        with the vision tower; of one that is left out, the hash is taken.

        Shapes without values are those of 16 bits: two copies in 8 bits take as much memory.
        """
        kind = _CLASSES["gemma3" if self.is_multimodal else "gemma3_text"]
        options: dict[str, Any] = {"dtype": self.dtype, "attn_implementation": "sdpa"}
        if weights:
            model = load_pretrained(kind, self.name, **options, **self._hub)
            with ThreadPoolExecutor(1) as thread:  # hashing releases Python's lock
                if not vision:
                    taken = thread.submit(weights_sha256, model.model.vision_tower.state_dict())
                    model.model.vision_tower = None
                to_device(model, self.device)
            self._vision_sha256 = self._vision_sha256 if vision else taken.result()
        else:
            with torch.device("meta"):
                model = kind._from_config(AutoConfig.from_pretrained(self._source, **self._hub), **options)
        model = model.eval().requires_grad_(False)
        if self.is_multimodal and model.model.vision_tower is not None:
            keep_patches_together(model.model.vision_tower)
        language = model.model.language_model if self.is_multimodal else model.model
        if self.parts.lora_rank is not None:
            with seeded(self._seed):
                _add_lora(language, self.parts.lora_rank)
        for name, parameter in model.named_parameters():
            if _part_of(name) in self.parts.trainable:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        if self._checkpointed and self.parts.uses_hf_decoder:
            _checkpoint_layers(language)
        if self._checkpointed and VISION in self.parts.trainable:
            _checkpoint_layers(model.model.vision_tower)
        if self._compiled and self.parts.uses_hf_decoder:
            for layer in language.layers:
                layer.compile()
        if self.parts.uses_hf_decoder:
            return model, []
        convert = self.fp8 and weights
        return model, [_merge_qkv(layer, convert) for layer in language.layers]

    @property
    def has_weights(self) -> bool:
        """Whether the parameters have values, and are more than shapes."""
        return not self.text_model.embed_tokens.weight.is_meta

    def with_weights(self) -> "Gemma":
        """Return this Gemma with the published weights, but without its vision tower where that was dropped; the two
        share the tokeniser and the image processor."""
        loaded = copy.copy(self)
        vision = not self.is_multimodal or self.model.model.vision_tower is not None
        loaded.model, loaded.qkv = loaded._build(True, vision)
        return loaded

    # ---- parts

    @property
    def modified_parts(self) -> tuple[str, ...]:
        """The parts that differ from the published Gemma."""
        return self.parts.modified

    @property
    def trainable_parts(self) -> tuple[str, ...]:
        """The parts that train."""
        return self.parts.trainable

    @property
    def uses_hf_decoder(self) -> bool:
        """Whether transformers' own decoder reads packed rows."""
        return self.parts.uses_hf_decoder

    @property
    def width(self) -> int:
        """D, the width of the language model."""
        return int(self.text_config.hidden_size)

    @property
    def text_model(self) -> Any:
        """The decoder without its head: embeddings in, hidden states out."""
        return self.model.model.language_model if self.is_multimodal else self.model.model

    @property
    def sliding_window(self) -> int:
        """The number of tokens that a sliding-window layer sees back, a token itself included."""
        return int(self.text_config.sliding_window)

    @property
    def num_image_tokens(self) -> int:
        """N, the image tokens of one photograph; 0 for a text-only Gemma."""
        return int(self.model.config.mm_tokens_per_image) if self.is_multimodal else 0

    @property
    def image_token_id(self) -> int | None:
        """The id of the soft token in whose place an image feature comes."""
        return int(self.model.config.image_token_id) if self.is_multimodal else None

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64[...] -> dtype[..., D]: the embeddings as the first layer expects them (scaled by sqrt(D)).

        The image token may lie outside the table; an image feature takes its place, so any row will do.
        """
        if self.image_token_id is not None:
            token_ids = token_ids.masked_fill(token_ids == self.image_token_id, 0)
        return self.text_model.embed_tokens(token_ids).to(self.dtype)

    def computing(self) -> torch.autocast:
        """Return a context in which parts that train, which are kept in float32, are computed in `dtype`."""
        enabled = bool(self.trainable_parts) and self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def logits(self, hidden: Tensor) -> Tensor:
        """dtype[S, D] -> float32[S, vocabulary]: the head, as the model's own forward applies it."""
        with self.computing():
            logits = self.model.lm_head(hidden).float()
        cap = self.text_config.final_logit_softcapping
        return logits if cap is None or self.is_multimodal else torch.tanh(logits / cap) * cap

    @torch.no_grad()
    def embedding_scale(self) -> float:
        """The root mean square of a token's embedding as the first layer sees it, over the vocabulary."""
        table = self.text_model.embed_tokens
        # In parts: all of a real table in float32 would take more memory than the steps of a small batch.
        squares = sum(
            len(part) * float(part.float().pow(2).mean()) for part in table.weight.split(SCALED_ROWS)
        )
        return float(torch.tensor(squares / len(table.weight)).sqrt()) * float(table.embed_scale)

    @torch.no_grad()
    def bracket_embeddings(self) -> Tensor:
        """float32[2, D]: the initial values of the two brackets around the world tokens.

        They are the embeddings of the tokens around an image or, in a text-only Gemma, of square brackets.
        """
        config = self.model.config
        if self.is_multimodal:
            ids = [config.boi_token_index, config.eoi_token_index]
        else:
            ids = [_single_token(self.tokenizer, bracket) for bracket in "[]"]
        return self.embed(torch.tensor(ids, device=self.device)).float()

    # ---- prompts

    def prompt(
        self,
        question_template: str,
        caption: str,
        with_world: bool,
        world_position: str = "before",
        with_image: bool = True,
    ) -> Prompt:
        """The prompt of one statement, tokenised by Gemma's own chat template.

            <bos><start_of_turn>user\\n [W] w1 ... wN [/W] \\n\\n<boi> i1 ... iN <eoi>    shared
            \\n\\nStatement: ...<end_of_turn>\\n<start_of_turn>model\\n                   branch

        Without world tokens the whole is exactly what the processor makes of the same message. With them, the text on
        their left and the text on their right are tokenised separately. `world_position` "after" puts them behind
        <eoi>. `with_image` False gives the prompt of a message that is text alone.
        """
        image = self.processor.full_image_sequence if self.processor and with_image else ""
        caption = caption.strip()
        for token in self._control_tokens:
            if token in caption:
                raise ValueError(f"caption {caption!r} holds Gemma's control token {token!r}; remove it")
        text = self._render(question_template.replace("{caption}", caption), bool(image))
        question_start = self._question_start(text, question_template, image)
        start = text.index(caption, question_start)
        cut = text.index(image) if image else question_start
        if world_position == "after":
            cut += len(image.rstrip())  # right behind <eoi>, a sure boundary between tokens
        pieces = [text[:cut], text[cut:]] if with_world else [text]
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        offset = 0
        for piece in pieces:
            encoded = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            ids += encoded["input_ids"]
            spans += [(a + offset, b + offset) for a, b in encoded["offset_mapping"]]
            offset += len(piece)
        world_at = sum(b <= cut for _, b in spans) if with_world else None
        branch_at = self._branch_start(ids, world_at, bool(image))
        in_caption = [i for i, (a, b) in enumerate(spans) if b > start and a < start + len(caption)]
        caption_range = (in_caption[0] - branch_at, in_caption[-1] + 1 - branch_at) if in_caption else (0, 0)
        own = tuple((spans[i][0] - start, spans[i][1] - start) for i in in_caption)
        return Prompt(tuple(ids[:branch_at]), tuple(ids[branch_at:]), world_at, caption_range, own)

    def _render(self, question: str, with_image: bool) -> str:
        content: list[dict[str, str]] = [{"type": "text", "text": question}]
        if with_image:
            content.insert(0, {"type": "image"})
        message = [{"role": "user", "content": content}]
        if self.processor is None:
            return self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        text = self.processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        if with_image:
            text = text.replace(self.processor.boi_token, self.processor.full_image_sequence, 1)
        return text

    def _question_start(self, text: str, question_template: str, image: str) -> int:
        """Return the index of the question's first character in the rendered text."""
        head = question_template.split("{caption}")[0].strip()
        if head:
            return text.index(head, text.index(image) + len(image))
        rendered = [self._render(question, bool(image)) for question in "01"]
        return len(commonprefix(rendered))  # noqa: RUF071 - of texts, not of paths

    def _branch_start(self, ids: list[int], world_at: int | None, with_image: bool) -> int:
        """Return the index of the first token that is a statement's own.

        Special tokens and the position of the world tokens are sure boundaries between tokens.
        """
        if with_image:
            return ids.index(self.model.config.eoi_token_index) + 1
        return world_at if world_at is not None else 1

    # ---- vision

    def pixel_values(self, pixels: list[np.ndarray]) -> Tensor:
        """uint8[H, W, 3] photographs -> float32[B, 3, S, S], by Gemma's own image processor."""
        assert self.processor is not None, "a text-only Gemma takes no photographs"
        return self.processor.image_processor(images=pixels, return_tensors="pt")["pixel_values"]

    def vision_features(self, pixel_values: Tensor) -> Tensor:
        """float[B, 3, S, S] -> dtype[B, N, V]: SigLIP's patches, pooled to N as Gemma's projector pools them.

        A cache keeps these: they are smaller than image features and independent of the projector.
        """
        tower = self.model.model.vision_tower
        if tower is None:
            raise ValueError("this Gemma is without its vision tower (drop_vision)")
        with self.computing():
            return pooled_patches(tower, pixel_values.to(self.device, self.dtype), self.num_image_tokens)

    def image_features(self, vision_features: Tensor) -> Tensor:
        """dtype[B, N, V] -> dtype[B, N, D]: the other half of Gemma's projector, into the language model's space."""
        projector = self.model.model.multi_modal_projector
        with self.computing():
            normed = projector.mm_soft_emb_norm(vision_features.to(self.device, self.dtype))
            return normed @ projector.mm_input_projection_weight

    def drop_vision(self) -> None:
        """Free the vision tower, which a run with cached features does not need."""
        self.model.model.vision_tower = None

    def vision_weights_sha256(self) -> str:
        """Return the hash of the vision tower's weights, in the dtype in which they were loaded; of a tower that was
        freed, the hash that was taken before."""
        tower = self.model.model.vision_tower
        if tower is not None:
            self._vision_sha256 = weights_sha256(tower.state_dict())
        if not self._vision_sha256:
            raise ValueError("this Gemma is without its vision tower (drop_vision)")
        return self._vision_sha256


@dataclass
class KeptGemma:
    """A Gemma as it was published that stays loaded from one run to the next that has the same."""

    loaded: Gemma | None = None

    def of(self, planned: Gemma) -> Gemma:
        """Return a planned Gemma with weights: the loaded one if it is the same, else a new one, before which that one
        is freed. A Gemma with parts of its own is not kept, since they may train."""
        if self.loaded is None or _settings(self.loaded) != _settings(planned):
            self.loaded = None
            gemma = planned.with_weights()
            if gemma.modified_parts:
                return gemma
            self.loaded = gemma
        return self.loaded


def _settings(gemma: Gemma) -> tuple[Any, ...]:
    """Return all that two Gemmas of one process have to share to be the same."""
    names = "name revision dtype device attention fp8 parts _checkpointed _compiled is_multimodal".split()
    blind = gemma.is_multimodal and gemma.model.model.vision_tower is None
    return blind, *(getattr(gemma, name) for name in names)


def pooled_patches(tower: Any, pixel_values: Tensor, num_tokens: int) -> Tensor:
    """dtype[B, 3, S, S] -> dtype[B, N, V]: the patches of a SigLIP tower, pooled to `num_tokens` as Gemma's projector
    pools them."""
    patches = tower(pixel_values=pixel_values).last_hidden_state
    side = math.isqrt(patches.shape[1])
    grid = patches.transpose(1, 2).unflatten(2, (side, side))
    return F.avg_pool2d(grid, side // math.isqrt(num_tokens)).flatten(2).transpose(1, 2)


def keep_patches_together(tower: Any) -> None:
    """Let the values of a patch lie side by side in every layer of a SigLIP tower.

    They come out of its convolution a channel after the other, an order that each sum of two hidden states inherits, so
    that every norm of every layer would read them from far apart. The numbers are the same.
    """
    tower.embeddings.register_forward_hook(_contiguous)


def _contiguous(_: nn.Module, __: Any, embeddings: Tensor) -> Tensor:
    return embeddings.contiguous()


def is_multimodal(name_or_path: str, **hub: str) -> bool:
    """Return whether a Gemma takes photographs, from its config alone. Raises ValueError for another kind of model."""
    path = file_at_hand(name_or_path, GEMMA_FILE, **hub)
    source = str(path.parent) if path else source_of_model(name_or_path, GEMMA_FILE, **hub)
    model_type = AutoConfig.from_pretrained(source, **hub).model_type
    if model_type not in _CLASSES:
        raise ValueError(
            f"model_name {name_or_path!r}: model_type {model_type!r}; wanted a Gemma 3 ({', '.join(_CLASSES)})"
        )
    return model_type == "gemma3"


def _check_template(tokenizer: Any, processor: Any, name: str) -> None:
    template = processor.chat_template if processor is not None else tokenizer.chat_template
    if not template:
        raise ValueError(
            f"model_name {name!r} has no chat template, so the form of its prompts is unknown; use an "
            "instruction-tuned Gemma (…-it) or put its chat_template.jinja into the folder"
        )


def _single_token(tokenizer: Any, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"{text!r} is {len(ids)} tokens in this vocabulary; TheWorld needs it to be one")
    return int(ids[0])


PART_DESCRIPTIONS = {
    VISION: "Gemma's vision tower and its projector",
    LANGUAGE: "Gemma's language model",
    LORA: "LoRA matrices beside Gemma's language model",
}


def parameters_of(gemma: Gemma, part: str) -> dict[str, nn.Parameter]:
    """Return the parameters of a part by transformers' names; tied parameters once."""
    return {name: p for name, p in gemma.model.named_parameters() if _part_of(name) == part}


def _part_of(name: str) -> str:
    if "lora_" in name:
        return LORA
    return VISION if "vision_tower." in name or "multi_modal_projector." in name else LANGUAGE


def load_gemma(
    config: Config,
    device: torch.device | None = None,
    revision: str | None = None,
    parts: GemmaParts = PUBLISHED,
    weights: bool = True,
    sharded: bool = False,
) -> Gemma:
    """Load the Gemma that the settings name, in the dtype and with the attention that they want.

    `device` takes precedence over the setting; `revision`, `parts` and `weights` are as for `Gemma`. `sharded`: FSDP
    will put its layers together around their calls, which compiled code would take in.
    """
    device = device or resolve_device(config.device)
    compiled = wants_compile(config.compile, device)
    # Flex attention is only fast, and only small, in compiled code.
    flex = device.type == "cuda" and compiled and not parts.uses_hf_decoder
    return Gemma(
        config.model_name,
        resolve_dtype(config.dtype, device),
        device,
        attention="flex_attention" if flex else "sdpa",
        revision=revision,
        parts=parts,
        seed=config.seed,
        weights=weights,
        checkpointed=config.use_gradient_checkpointing,
        compiled=compiled and not sharded,
        fp8=config.fp8,
    )


def _add_lora(language_model: nn.Module, rank: int) -> None:
    """Add frozen low-rank matrices beside every linear layer, which change nothing yet; their product is zero.

    Raises ValueError where peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model  # optional, so not at the top
    except ImportError as error:
        raise ValueError(f"LoRA is asked for, but {error}; run `pip install peft`") from None
    settings = LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, target_modules=_LINEARS, lora_dropout=0.0)
    inject_adapter_in_model(settings, language_model).requires_grad_(False)


def _checkpoint_layers(module: Any) -> None:
    """Let a transformers module keep only each layer's input for the backward pass.

    That takes its training mode, which changes nothing else in a Gemma 3, as it has no dropout.
    """
    module.gradient_checkpointing_enable({"use_reentrant": False})
    module.train()


@torch.no_grad()
def _merge_qkv(layer: Any, fp8: bool) -> Weight:
    """Return the weights of a layer's queries, keys and values as one matrix, of which its modules then keep views.

    `fp8`: all linear layers of the layer are then in 8 bits.
    """
    modules = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    merged = torch.cat([module.weight for module in modules])
    for module, rows in zip(modules, merged.split([len(m.weight) for m in modules]), strict=True):
        module.weight.data = rows
    return convert_layer(layer, merged) if fp8 else merged


def load_parts(gemma: Gemma, folder: Path, parts: Sequence[str]) -> None:
    """Load these parts of a checkpoint into a Gemma that has them, strictly: see `copy_strictly`."""
    for part in parts:
        copy_strictly(folder / part_file(part), parameters_of(gemma, part))
