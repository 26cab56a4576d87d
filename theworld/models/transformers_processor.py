"""transformers' processor of a checkpoint: chat messages and photographs become the inputs of its model.

Prompts are those of `Gemma.prompt`: Gemma's own chat template, with slots for the world tokens of each photograph
before or behind its image tokens, as the checkpoint was trained.

Dimensions: B prompts of L tokens, G photographs, N world tokens, S side in pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, BatchFeature
from transformers.image_utils import load_image
from transformers.processing_utils import ProcessorMixin

from theworld.config.config import FIELDS, Config
from theworld.data.images import photograph
from theworld.data.square import Square
from theworld.models.gemma import is_multimodal
from theworld.models.projection import ProjectionShape
from theworld.models.serialization import SavedModel
from theworld.utils.hub import GEMMA_FILE, source_of_model

# Values of token_type_ids, in which 0 is text and 1 an image token, as for Gemma.
WORLD, BRACKET = 2, 3
_START_OF_IMAGE = "<start_of_image>"


class TheWorldProcessor(ProcessorMixin):
    """Gemma's processor, with world tokens.

    `enable_world` False makes Gemma's own prompts, without world tokens. Prompts are padded on the left.
    """

    def __init__(self, gemma: Any, config: Config, num_world_tokens: int, enable_world: bool = True) -> None:
        """`gemma`: the processor of a multimodal Gemma or the tokeniser of a text-only one."""
        self.tokenizer = getattr(gemma, "tokenizer", gemma)
        self.tokenizer.padding_side = "left"
        super().__init__(chat_template=gemma.chat_template or self.tokenizer.chat_template)
        self.image_processor = getattr(gemma, "image_processor", None)  # None: text-only
        self.config, self.num_world_tokens, self.enable_world = config, num_world_tokens, enable_world
        self.boi_token = getattr(gemma, "boi_token", _START_OF_IMAGE)
        self.image_sequence = getattr(gemma, "full_image_sequence", "")
        self.image_token_id = getattr(self.tokenizer, "image_token_id", None)

    @classmethod
    def from_pretrained(
        cls, name_or_path: Any, enable_world: bool = True, revision: str | None = None, **options: Any
    ) -> "TheWorldProcessor":
        """Return the processor of a checkpoint: a folder, a run of which the newest one is taken, or user/name.

        Settings among the `options` take precedence; others are not needed, as the processor is Gemma's own.
        """
        saved = SavedModel.open(name_or_path, revision)
        of_model = ("dtype", "device")  # which a pipeline gives to the processor too
        config = saved.config({k: v for k, v in options.items() if k in FIELDS and k not in of_model})
        saved.locate(config, config.model_name, GEMMA_FILE)
        commit = saved.world.get("model_revision")
        source, hub = (
            source_of_model(config.model_name, GEMMA_FILE, commit),
            {"revision": commit} if commit else {},
        )
        kind = AutoProcessor if is_multimodal(config.model_name, **hub) else AutoTokenizer
        shape = ProjectionShape.from_dict(saved.world["projection"])
        return cls(kind.from_pretrained(source, **hub), config, shape.num_tokens, enable_world)

    def save_pretrained(self, save_directory: Any, **options: Any) -> list[str]:
        """Write nothing: a checkpoint names its Gemma, whose processor this is."""
        return []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config.model_name}, {self.num_world_tokens} world tokens)"

    @property
    def model_input_names(self) -> list[str]:
        """The names of what `__call__` returns."""
        return ["input_ids", "attention_mask", "token_type_ids", "pixel_values", "world_pixels"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: Any = False,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        pad_to_multiple_of: int | None = None,
        **others: Any,
    ) -> BatchFeature:
        """Return input_ids, attention_mask and token_type_ids, int64[B, L], and of the photographs pixel_values,
        float32[G, 3, S, S], and world_pixels, uint8[G, S, S, 3].

        `text`: rendered chats with <start_of_image> where a photograph stands. `images`: files, addresses, PIL images
        or uint8[H, W, 3], in their order, as one list or one list for each text. Raises ValueError if their numbers
        differ and for an option that has no meaning here, such as truncation, and ImageError for a photograph that
        cannot be read.
        """
        unknown = sorted(name for name, value in others.items() if value not in (None, False))
        if unknown:
            raise ValueError(
                f"processor of TheWorld: {', '.join(unknown)}: not an option; leave it out, or is it one of generate?"
            )
        if text is None:
            raise ValueError(f"text is None; give a prompt with {self.boi_token} where the photograph stands")
        texts = [text] if isinstance(text, str) else list(text)
        pictures = self._pictures(images, [t.count(self.boi_token) for t in texts])
        rows = [self._tokens(t, add_special_tokens) for t in texts]
        data: dict[str, Any] = self.tokenizer.pad(
            {"input_ids": [ids for ids, _ in rows], "token_type_ids": [types for _, types in rows]},
            padding=padding,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=True,
        )
        pixels = [photograph(picture, self.config.max_image_pixels) for picture in pictures]
        encoding = BatchFeature(dict(data), tensor_type=return_tensors)
        if pixels and self.image_processor is not None:
            encoding["pixel_values"] = self.image_processor(images=pixels, return_tensors="pt")[
                "pixel_values"
            ]
        if pixels and self.enable_world:
            encoding["world_pixels"] = torch.stack([Square(self.config.latent_size)(p) for p in pixels])
        return encoding

    def _pictures(self, images: Any, wanted: list[int]) -> list[Any]:
        """Return the photographs in order, loaded where they are addresses. `wanted`: their number in each text."""
        groups = _nested(images)
        found = [len(group) for group in groups]
        if (found != wanted) if len(found) == len(wanted) > 1 else (sum(found) != sum(wanted)):
            raise ValueError(
                f"{found} images and {wanted} times {self.boi_token} in the texts: give an image for each"
            )
        return [_loaded(image) for group in groups for image in group]

    def _tokens(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[int]]:
        """Return the token ids and token types of one prompt; the text on both sides of world tokens is tokenised by
        itself, as in training."""
        start, *rest = text.split(self.boi_token)
        image = self.image_sequence
        cut = len(image.rstrip()) if self.config.world_position == "after" else 0  # right behind <eoi>
        pieces = [start]
        for part in rest:
            pieces[-1] += image[:cut]
            pieces.append(image[cut:] + part)
        if not self.enable_world:
            pieces = ["".join(pieces)]
        ids: list[int] = []
        types: list[int] = []
        for number, piece in enumerate(pieces):
            if number:
                ids += [0] * (self.num_world_tokens + 2)
                types += [BRACKET, *[WORLD] * self.num_world_tokens, BRACKET]
            special = add_special_tokens and not number
            own = self.tokenizer(piece, add_special_tokens=special)["input_ids"]
            ids += own
            types += [int(token == self.image_token_id) for token in own] if image else [0] * len(own)
        return ids, types


def _nested(images: Any) -> list[list[Any]]:
    """Return images as a list for each text; a flat list is one of a single image for each text."""
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [[images]]
    return [list(image) if isinstance(image, list | tuple) else [image] for image in images]


def _loaded(image: Any) -> Any:
    """Return a photograph that `theworld.data.images.photograph` reads, of an address or base64 text as transformers
    loads it."""
    if isinstance(image, Path | np.ndarray | Image.Image) or Path(image).is_file():
        return image
    return load_image(image)
