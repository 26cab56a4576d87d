"""Gemma 3: loading, prompts, answer tokens and image features. Frozen, except for parts that are set free to train.

One `Gemma` serves both kinds: the multimodal `Gemma3ForConditionalGeneration` (4B and larger), which sees the
photograph through its SigLIP tower, and the text-only `Gemma3ForCausalLM` (270M, 1B), which does not.

Dimensions: B images, N image tokens an image (256 in the 4B), V vision width, D width of the language model.

What of Gemma trains beside the projection, and the files of a checkpoint that hold it.

    stage 1    the projection alone                                                   projection.safetensors
    stage 2    freeze_gemma_vision false: Gemma's vision tower and its projector too  vision.safetensors
    stage 3    freeze_gemma_language false: the language model too, all of it         language.safetensors
               or, with lora_rank, low-rank matrices beside its linear layers         lora.safetensors

A checkpoint holds each part that differs from the Gemma that was published, whether its own run trained it or the one
that it started from, and nothing else of Gemma. What trains is in float32, and computed in the dtype of the rest.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
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
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from theworld.config.config import Config
from theworld.models.serialization import (
    LANGUAGE,
    LORA,
    PARTS,
    VISION,
    copy_strictly,
    part_file,
    weights_sha256,
)
from theworld.utils.device import resolve_device, resolve_dtype, wants_compile
from theworld.utils.hub import hub_revision


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt in two parts: what all statements of an image share, and one statement's branch.

    `world_at` is the index in `shared` before which the world tokens and their two brackets stand, or None
    for a prompt without them. `caption` is the (start, end) range of the caption's tokens in `branch`, `spans` what
    of the stripped caption each of them stands for: (start, end) in characters.
    """

    shared: tuple[int, ...]
    branch: tuple[int, ...]
    world_at: int | None
    caption: tuple[int, int]
    spans: tuple[tuple[int, int], ...]

    def tokens_of(self, start: int, end: int) -> list[int]:
        """The indices in `branch` of the tokens that the caption's characters from `start` to `end` are in."""
        return [self.caption[0] + i for i, (a, b) in enumerate(self.spans) if b > start and a < end]


class Gemma:
    """A frozen Gemma 3 with its tokeniser and, where it has eyes, its image processor."""

    def __init__(
        self,
        name_or_path: str,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attention: str = "sdpa",
        revision: str | None = None,
        weights: bool = True,
    ) -> None:
        """`revision`: the commit of a hub model; None: the newest. `weights` False: shapes without values, which can be
        counted and packed for, until `load_weights`.

        `attention`: how packed rows are read, "sdpa" with dense masks or "flex_attention" with block masks, which give
        the same; flex needs rows of whole blocks, and is for compiled code on a GPU. (The FlashAttention kernels ignore
        such masks without a word.) transformers' own forward always has sdpa.
        """
        self.name = name_or_path
        self.device = torch.device(device)
        self.dtype = dtype
        self.attention = attention
        # See `theworld.models.gemma`, which sets these.
        self.changed: tuple[str, ...] = ()  # parts that are not as they were published
        self.trained: tuple[str, ...] = ()  # those of them that train
        self.lora_rank: int | None = None
        self.plain_decoder = False  # packed rows are read by transformers' own decoder
        if self.attention not in ("sdpa", "flex_attention"):
            raise ValueError(f"attention {self.attention!r}: wanted sdpa or flex_attention")
        hub = {"revision": revision} if revision else {}
        self._hub = hub
        self.model = _load_model(name_or_path, dtype, self.device, hub, weights)
        self.revision = revision or hub_revision(name_or_path, "config.json")
        self.is_multimodal = isinstance(self.model, Gemma3ForConditionalGeneration)
        self.processor = AutoProcessor.from_pretrained(name_or_path, **hub) if self.is_multimodal else None
        self.tokenizer = (
            self.processor.tokenizer if self.processor else AutoTokenizer.from_pretrained(name_or_path, **hub)
        )
        _check_template(self.tokenizer, self.processor, name_or_path)
        self.text_config = self.model.config.get_text_config()
        added = self.tokenizer.added_tokens_decoder.values()
        self._control_tokens = sorted(token.content for token in added if token.special)
        self.answer_ids = tuple(_single_token(self.tokenizer, digit) for digit in "01")

    @property
    def has_weights(self) -> bool:
        """Whether it is more than shapes."""
        return not self.text_model.embed_tokens.weight.is_meta

    def load_weights(self) -> None:
        """The weights of a Gemma that was made without them, as they were published."""
        self.model = _load_model(self.name, self.dtype, self.device, self._hub, weights=True)

    # ---- parts

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
        """How many tokens back a sliding-window layer sees, itself included."""
        return int(self.text_config.sliding_window)

    @property
    def num_image_tokens(self) -> int:
        """N, the image tokens of one photograph; 0 for a text-only Gemma."""
        return int(self.model.config.mm_tokens_per_image) if self.is_multimodal else 0

    @property
    def image_token_id(self) -> int | None:
        """The id of the soft token that stands where an image feature goes."""
        return int(self.model.config.image_token_id) if self.is_multimodal else None

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64[...] -> dtype[..., D]: the embeddings as the first layer expects them (scaled by sqrt(D)).

        The image token may lie outside the table; where it stands an image feature comes, so any row will do.
        """
        if self.image_token_id is not None:
            token_ids = token_ids.masked_fill(token_ids == self.image_token_id, 0)
        return self.text_model.embed_tokens(token_ids).to(self.dtype)

    def computing(self) -> torch.autocast:
        """What trains is kept in float32; within this it is computed in `dtype` all the same."""
        enabled = bool(self.trained) and self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def logits(self, hidden: Tensor) -> Tensor:
        """dtype[S, D] -> float32[S, vocabulary]: the head, as the model's own forward applies it."""
        with self.computing():
            logits = self.model.lm_head(hidden).float()
        cap = getattr(self.text_config, "final_logit_softcapping", None)
        return logits if cap is None or self.is_multimodal else torch.tanh(logits / cap) * cap

    @torch.no_grad()
    def embedding_scale(self) -> float:
        """The root mean square of a token's embedding as the first layer sees it, over the vocabulary."""
        table = self.text_model.embed_tokens
        return float(table.weight.float().pow(2).mean().sqrt()) * float(table.embed_scale)

    @torch.no_grad()
    def bracket_embeddings(self) -> Tensor:
        """float32[2, D]: where the two brackets around the world tokens start. They are the embeddings of the
        tokens around an image or, in a text-only Gemma, of square brackets."""
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

        Without world tokens the whole is exactly what the processor makes of the same message. With them,
        what is left and right of them is tokenised by itself. `world_position` "after": they follow <eoi>.
        Without the image (`with_image` False) it is that of a message which is text and nothing else.
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
        """Where the question begins in the rendered text."""
        head = question_template.split("{caption}")[0].strip()
        after_image = text.index(image) + len(image)
        return text.index(head, after_image) if head else after_image

    def _branch_start(self, ids: list[int], world_at: int | None, with_image: bool) -> int:
        """Special tokens and the world's place are sure boundaries between tokens, so the parts may split there."""
        if with_image:
            return ids.index(self.model.config.eoi_token_index) + 1
        return world_at if world_at is not None else 1

    # ---- sight

    def pixel_values(self, pixels: list[np.ndarray]) -> Tensor:
        """uint8[H, W, 3] photographs -> float32[B, 3, S, S], by Gemma's own image processor."""
        assert self.processor is not None, "a text-only Gemma sees no photographs"
        return self.processor.image_processor(images=pixels, return_tensors="pt")["pixel_values"]

    def vision_features(self, pixel_values: Tensor) -> Tensor:
        """float[B, 3, S, S] -> dtype[B, N, V]: SigLIP's patches, pooled to N places as Gemma's projector does it.

        This is what a cache keeps: smaller than image features and independent of the projector.
        """
        tower, projector = self.model.model.vision_tower, self.model.model.multi_modal_projector
        if tower is None:
            raise ValueError("this Gemma was without its vision tower (drop_vision)")
        with self.computing():
            patches = tower(pixel_values=pixel_values.to(self.device, self.dtype)).last_hidden_state
        grid = patches.transpose(1, 2).unflatten(2, (projector.patches_per_image,) * 2)
        return F.avg_pool2d(grid, projector.kernel_size).flatten(2).transpose(1, 2)

    def image_features(self, vision_features: Tensor) -> Tensor:
        """dtype[B, N, V] -> dtype[B, N, D]: the other half of Gemma's projector, into the language model's space."""
        projector = self.model.model.multi_modal_projector
        with self.computing():
            normed = projector.mm_soft_emb_norm(vision_features.to(self.device, self.dtype))
            return normed @ projector.mm_input_projection_weight

    def compile_vision(self) -> None:
        """Compiles the layers of the vision tower: pays for thousands of photographs in batches of one size."""
        for module in self.model.model.vision_tower.modules():
            if isinstance(module, SiglipEncoderLayer):
                module.compile()

    def drop_vision(self) -> None:
        """Frees the vision tower: for runs whose features come from a cache."""
        self.model.model.vision_tower = None

    def vision_weights_sha256(self) -> str:
        """Return the hash of the vision tower's weights, in the dtype in which they were loaded."""
        return weights_sha256(self.model.model.vision_tower.state_dict())


def is_multimodal(name_or_path: str, **hub: str) -> bool:
    """Whether a Gemma sees photographs, from its config alone. ValueError for a model of another kind."""
    model_type = AutoConfig.from_pretrained(name_or_path, **hub).model_type
    if model_type not in _CLASSES:
        raise ValueError(
            f"model_name {name_or_path!r}: model_type {model_type!r}; wanted a Gemma 3 ({', '.join(_CLASSES)})"
        )
    return model_type == "gemma3"


_CLASSES = {"gemma3": Gemma3ForConditionalGeneration, "gemma3_text": Gemma3ForCausalLM}


def _load_model(
    name: str, dtype: torch.dtype, device: torch.device, hub: dict[str, str], weights: bool
) -> PreTrainedModel:
    kind = _CLASSES["gemma3" if is_multimodal(name, **hub) else "gemma3_text"]
    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    if weights:
        model = kind.from_pretrained(name, **options, device_map=str(device), **hub)
    else:
        with torch.device("meta"):
            model = kind._from_config(AutoConfig.from_pretrained(name, **hub), **options)
    return model.eval().requires_grad_(False)


def _check_template(tokenizer: Any, processor: Any, name: str) -> None:
    template = processor.chat_template if processor is not None else tokenizer.chat_template
    if not template:
        raise ValueError(
            f"model_name {name!r} has no chat template, so how it wants its prompts is unknown; use an "
            "instruction-tuned Gemma (…-it) or put its chat_template.jinja into the folder"
        )


def _single_token(tokenizer: Any, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"{text!r} is {len(ids)} tokens in this vocabulary; TheWorld needs it to be one")
    return int(ids[0])


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
