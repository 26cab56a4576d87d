"""Small models with random projections, and what transformers gives for the same prompts."""

from pathlib import Path

import torch
from constants import QUESTION
from PIL import Image

from theworld.config.config import Config
from theworld.data.images import read_image
from theworld.data.vsr import Statement
from theworld.models.gemma import Gemma
from theworld.models.projection import ProjectionShape, WorldProjection
from theworld.models.theworld import TheWorld

LATENT_SHAPE = (16, 8, 8)


def make_model(gemma: Gemma, positions: bool = True, **settings: object) -> TheWorld:
    """A model with a random projection whose every part matters."""
    torch.manual_seed(1)
    shape = ProjectionShape(LATENT_SHAPE, gemma.width, patch=2, positions=positions)
    projection = WorldProjection(
        shape, [0.1] * 16, [0.9] * 16, gemma.embedding_scale(), gemma.bracket_embeddings()
    )
    if projection.positions is not None:
        torch.nn.init.normal_(projection.positions, std=0.3)
    return TheWorld(gemma, projection, Config(question_template=QUESTION, **settings), {})


def latents_of(images: list[str] | tuple[str, ...]) -> torch.Tensor:
    """float32[G, 16, 8, 8], different for each name and the same for the same."""
    return torch.stack(
        [torch.randn(LATENT_SHAPE, generator=torch.Generator().manual_seed(ord(i[0]))) for i in images]
    )


def vision_of(gemma: Gemma, photographs: Path, images: list[str] | tuple[str, ...]) -> torch.Tensor | None:
    if not images:
        return None
    return gemma.vision_features(gemma.pixel_values([read_image(photographs, i) for i in images]))


def transformers_logits(
    gemma: Gemma, statement: Statement, photographs: Path, with_image: bool = True
) -> torch.Tensor:
    """float32[vocabulary] after the prompt, by transformers' own model and processor alone."""
    text = {"type": "text", "text": QUESTION.replace("{caption}", statement.caption)}
    if gemma.is_multimodal and with_image:
        content = [{"type": "image", "image": Image.open(photographs / statement.image)}, text]
    else:
        content = [text]
    tool = gemma.processor or gemma.tokenizer
    inputs = tool.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    with torch.no_grad():
        return gemma.model(**inputs).logits[0, -1]


def gradients(model: TheWorld) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.trainable().items()}
    model.zero_grad(set_to_none=True)
    return found
