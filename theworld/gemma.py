"""Gemma 3: loading, prompts, answer tokens and image features. Frozen unless `theworld.unfrozen` sets parts of it free.

One `Gemma` serves both kinds: the multimodal `Gemma3ForConditionalGeneration` (4B and larger), which sees the
photograph through its SigLIP tower, and the text-only `Gemma3ForCausalLM` (270M, 1B), which does not.

Dimensions: B images, N image tokens an image (256 in the 4B), V vision width, D width of the language model.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
)
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from theworld.weights import hub_revision, model_id, weights_sha256


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
        # See `theworld.unfrozen`, which sets these.
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

    def vision_identity(self) -> dict[str, Any]:
        """The fields of a fingerprint that say which eyes made the vision features."""
        assert self.processor is not None, "a text-only Gemma has no eyes"
        tower = self.model.model.vision_tower.state_dict()
        processor = self.processor.image_processor
        return {
            "model_name": model_id(self.name),
            "model_revision": self.revision,
            "vision_weights_sha256": weights_sha256(tower),
            "image_processor": type(processor).__name__,
            "image_size": int(self.model.config.vision_config.image_size),
            "compute_dtype": str(self.dtype).removeprefix("torch."),
        }


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
