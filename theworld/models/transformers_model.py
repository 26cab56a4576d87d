"""A checkpoint as a model of transformers: `AutoModelForImageTextToText.from_pretrained(checkpoint)`.

Its modules are transformers' Gemma and the projection, so that `generate`, the pipelines and peft find what they
expect. Photographs are encoded as they come. The logits are those of `TheWorld`; they are computed by transformers' own
layers, so changes of these, such as peft's, take effect.

Dimensions: B prompts of L tokens, G photographs, N world tokens, D the width of the language model, S side in pixels.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import (
    create_masks_for_vision_model,
    get_block_sequence_ids_for_mask,
)

from theworld.config.config import FIELDS
from theworld.models.encoder import Encoder
from theworld.models.gemma import parameters_of
from theworld.models.inference import load_encoder
from theworld.models.theworld import TheWorld
from theworld.models.transformers_config import TheWorldConfig
from theworld.models.transformers_processor import BRACKET, WORLD

_PREFILL_ONLY = ("token_type_ids", "pixel_values", "world_pixels")
# Options that transformers hands on, and that change nothing here.
_WITHOUT_EFFECT = frozenset(
    "trust_remote_code _from_auto _from_pipeline low_cpu_mem_usage use_safetensors".split()
)


class TheWorldForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A Gemma with world tokens, in transformers' terms. The projection trains; Gemma is frozen."""

    config_class = TheWorldConfig
    base_model_prefix = "gemma"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]

    def __init__(self, config: TheWorldConfig, theworld: TheWorld | None = None) -> None:
        """Wrap a model that is loaded. Raises ValueError without one: `from_pretrained` makes it."""
        if theworld is None:
            raise ValueError(
                "TheWorld has no random weights of its own; load a checkpoint with from_pretrained"
            )
        super().__init__(config)
        object.__setattr__(self, "theworld", theworld)
        self.theworld: TheWorld
        self.gemma = theworld.gemma.model
        self.projection = theworld.projection
        self.generation_config = self.gemma.generation_config
        tied = self.gemma.all_tied_weights_keys
        self.all_tied_weights_keys = {f"gemma.{a}": f"gemma.{b}" for a, b in tied.items()}

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *arguments: Any,
        config: TheWorldConfig | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        revision: str | None = None,
        attn_implementation: str | None = None,
        adapter_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> "TheWorldForConditionalGeneration":
        """Load a checkpoint as `TheWorld.from_pretrained` does; other settings are taken from `options`.

        Where transformers was given the folder of a peft adapter for a checkpoint, the adapter is loaded too.
        Raises ValueError for an option that cannot be followed, such as flash attention, which ignores the masks of
        image and world tokens.
        """
        attention = attn_implementation or getattr(config, "_attn_implementation", None)
        if attention not in (None, "sdpa"):
            raise ValueError(f"attn_implementation {attention!r}: TheWorld has 'sdpa' alone; leave it out")
        settings = {k: v for k, v in options.items() if k in FIELDS}
        others = {k for k, v in options.items() if k not in (*settings, *_WITHOUT_EFFECT) and v}
        if others or arguments:
            raise ValueError(
                f"from_pretrained of TheWorld: {', '.join(sorted(others))}: not an option; leave it out"
            )
        overrides = {"compile": False, "dtype": dtype if dtype is not None else torch_dtype, **settings}
        world = TheWorld.from_pretrained(name_or_path, revision=revision, device_map=device_map, **overrides)
        gemma = world.gemma.model.config
        config = TheWorldConfig(
            settings=world.config.to_dict(),
            text_config=gemma.get_text_config(),
            vision_config=getattr(gemma, "vision_config", None),
            name_or_path=str(name_or_path),
            architectures=[cls.__name__],
            attn_implementation="sdpa",
            dtype=world.gemma.dtype,
        )
        model = cls(config, world)
        if adapter_kwargs and "_adapter_model_path" in adapter_kwargs:  # of the auto classes
            model.load_adapter(adapter_kwargs["_adapter_model_path"])
        return model.eval()

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write a model that `from_pretrained` and `TheWorld.from_pretrained` load: see `TheWorld.save_pretrained`.

        Raises ValueError if a parameter of Gemma trains that would not be saved.
        """
        gemma = self.theworld.gemma
        saved = {f"gemma.{name}" for part in gemma.modified_parts for name in parameters_of(gemma, part)}
        trained = [name for name, p in self.named_parameters() if p.requires_grad]
        lost = [name for name in trained if name not in saved and not name.startswith("projection.")]
        if lost:
            raise ValueError(
                f"{save_directory}: {len(lost):,} parameters train that a checkpoint does not hold, such as {lost[0]}; "
                "save an adapter with peft's own save_pretrained, or freeze them"
            )
        self.theworld.save_pretrained(save_directory)

    @cached_property
    def encoder(self) -> Encoder:
        """The world encoder, in the revision that the projection was trained for; loaded with the first photograph."""
        world = self.theworld
        world.check_alone("leave world tokens out: AutoProcessor.from_pretrained(..., enable_world=False)")
        return load_encoder(world.config, world.fingerprint, self.device, self.dtype)

    def get_input_embeddings(self) -> Any:
        """Return Gemma's table of embeddings."""
        return self.gemma.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """Return Gemma's head."""
        return self.gemma.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        world_pixels: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Return logits, float[B, L, vocabulary], and the loss where `labels`, int64[B, L], are given (-100: none).

        Inputs are those of `TheWorldProcessor`; `options` are those of transformers' Gemma.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("neither input_ids nor inputs_embeds; give all that the processor returns")
            inputs_embeds = self.embed(input_ids, token_type_ids, pixel_values, world_pixels)
        if token_type_ids is not None and not isinstance(attention_mask, dict):
            if position_ids is None and attention_mask is not None:
                position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)
            own = (self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
            attention_mask = self.create_masks_for_generate(*own, token_type_ids)
        output = self.gemma(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **options,
        )
        if labels is not None:
            size = self.config.get_text_config().vocab_size
            output.loss = self.loss_function(logits=output.logits, labels=labels, vocab_size=size, **options)
        return output

    def embed(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        pixel_values: Tensor | None,
        world_pixels: Tensor | None,
    ) -> Tensor:
        """Return the embeddings, dtype[B, L, D], with image features and world tokens in their slots."""
        image_id = self.theworld.gemma.image_token_id
        is_image = (
            input_ids == image_id if image_id is not None else torch.zeros_like(input_ids, dtype=torch.bool)
        )
        # The image token may lie outside the table.
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if pixel_values is not None:
            features = self.gemma.get_image_features(pixel_values.to(self.device, self.dtype)).pooler_output
            embeddings = _fill(embeddings, is_image, features, "image")
        if world_pixels is not None:
            if token_type_ids is None:
                raise ValueError("world_pixels without token_type_ids; give all that the processor returns")
            is_world = (token_type_ids == WORLD) | (token_type_ids == BRACKET)
            embeddings = _fill(embeddings, is_world, self.world_tokens(pixel_values, world_pixels), "world")
        return embeddings

    def world_tokens(self, pixel_values: Tensor | None, world_pixels: Tensor) -> Tensor:
        """Return the world tokens of photographs between their brackets, float32[G, N + 2, D].

        Each photograph is encoded by itself, since in 16 bits latents depend on their batch.
        """
        # Gemma's own features are the only rows that are not made of the square photograph.
        prepared = pixel_values if self.encoder.name == "gemma_vision" else world_pixels.cpu()
        assert prepared is not None, "gemma_vision is the encoder of multimodal Gemmas alone"
        rows, view = (
            torch.cat([self.encoder.encode(one[None]) for one in prepared]),
            self.encoder.spec.use.view,
        )
        tokens = self.projection((rows if view is None else view(rows)).to(self.device))
        opening, closing = self.projection.brackets[:, None].expand(2, len(tokens), -1).unsqueeze(2)
        return torch.cat([opening, tokens, closing], 1)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, use_cache: bool = True, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the inputs of one step: photographs and token types belong to the prompt alone.

        transformers takes the arguments of `forward` as options of `generate` where this one is called `kwargs`.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids, use_cache=use_cache, is_first_iteration=is_first_iteration, **kwargs
        )
        if use_cache and not is_first_iteration:
            inputs = {name: value for name, value in inputs.items() if name not in _PREFILL_ONLY}
        return inputs

    def create_masks_for_generate(
        self,
        config: Any,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Any,
        position_ids: Tensor | None,
        token_type_ids: Tensor | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Return the masks of both kinds of layers: tokens of an image, and world tokens of a photograph, see each
        other in both directions."""
        if token_type_ids is None:
            token_type_ids = torch.zeros(
                inputs_embeds.shape[:2], dtype=torch.int64, device=inputs_embeds.device
            )
        both = token_type_ids == 1
        if self.theworld.config.world_attention == "bidirectional":
            both = both | (token_type_ids == WORLD)
        return create_masks_for_vision_model(
            self.config.get_text_config(),
            inputs_embeds,
            attention_mask,
            past_key_values,
            position_ids,
            get_block_sequence_ids_for_mask(both.long(), device=inputs_embeds.device),
        )


def _fill(embeddings: Tensor, slots: Tensor, values: Tensor, kind: str) -> Tensor:
    """Return embeddings, dtype[B, L, D], with values, float[G, n, D], in the slots, bool[B, L], in order."""
    wanted, found = int(slots.sum()), values.shape[0] * values.shape[1]
    if wanted != found:
        raise ValueError(
            f"{wanted} slots for {kind} tokens in input_ids, and {found} of them from the photographs"
        )
    return embeddings.masked_scatter(slots[..., None], values.to(embeddings.dtype))
