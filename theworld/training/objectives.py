"""What the projection is trained towards: the answer to a statement and the words of true ones or, to begin with,
Gemma's own image tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from theworld.config.config import Config
from theworld.data.captions import pick_captions
from theworld.data.vsr import Statement
from theworld.extraction.batches import Pass
from theworld.models.projection import ProjectionShape
from theworld.models.theworld import TheWorld
from theworld.training.data import Data


def make_optimizer(model: TheWorld, config: Config) -> torch.optim.AdamW:
    """AdamW over what trains; weight decay on the matrices alone, as is usual. A group's `share` of the learning rate
    is 1 for the projection, and for what trains of Gemma what `gemma_learning_rate` says."""
    groups = []
    for of_gemma, share in ((False, 1.0), (True, gemma_share(config))):
        named = {n: p for n, p in model.trainable().items() if n.startswith("gemma.") is of_gemma}
        matrices = [p for name, p in named.items() if name.endswith("weight") and p.ndim >= 2]
        vectors = [p for name, p in named.items() if not (name.endswith("weight") and p.ndim >= 2)]
        if named:
            groups.append({"params": matrices, "weight_decay": config.weight_decay, "share": share})
            groups.append({"params": vectors, "weight_decay": 0.0, "share": share})
    # Fused, a step is one launch and needs no room beside the weights.
    fused = model.gemma.device.type == "cuda"
    betas = (0.9, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused)


def gemma_share(config: Config) -> float:
    """The learning rate of what trains of Gemma, as a share of the projection's."""
    if config.gemma_learning_rate is not None:
        return config.gemma_learning_rate / config.learning_rate
    return 0.1 if config.lora_rank is None else 1.0


def loss_weights(config: Config, phase: str) -> dict[str, float]:
    """What the losses of a pass count in a phase: see `TheWorld.losses`. In the phase "words" the label counts nothing,
    and where no weight of words is set either, the whole statements count 1."""
    words = {name: getattr(config, name) for name in ("statement_loss_weight", "relation_loss_weight")}
    if phase == "words" and not any(words.values()):
        words["statement_loss_weight"] = 1.0
    return words | {"label_loss_weight": 0.0 if phase == "words" else 1.0}


def asked_words(config: Config, phase: str) -> list[str]:
    """The losses of words that a phase asks for."""
    weights = loss_weights(config, phase)
    return [name for name in ("statement", "relation") if phase != "align" and weights[f"{name}_loss_weight"]]


def captions_for(
    config: Config, data: Data, phase: str, statements: Sequence[Statement], step: int
) -> dict[str, str] | None:
    """What captions a pass of these statements reads; None where words are those of true statements, or not asked."""
    if data.captions is None or not loss_weights(config, phase)["statement_loss_weight"]:
        return None
    return pick_captions(data.captions, statements, config.seed, step)


def answer_loss(model: TheWorld, one: Pass, phase: str = "train") -> dict[str, Tensor]:
    """Sums over the pass: see `TheWorld.losses`; `correct` counts statements where the right answer is the likelier."""
    assert one.batch is not None
    losses = model.losses(one.batch, one.latents, one.vision, **loss_weights(model.config, phase))
    said_true = losses["logits"][:, 1] > losses["logits"][:, 0]
    is_true = one.batch.labels == model.gemma.answer_ids[1]
    return losses | {"correct": (said_true == is_true).sum()}


def on_image_tokens(config: Config, shape: ProjectionShape, image: int) -> bool:
    """Whether the world tokens of a photograph and `image` image tokens lie on the same places."""
    return shape.tokens_per_moment == image and config.world_mode == "patch"


def check_align(config: Config, shape: ProjectionShape, image: int) -> None:
    """A start at Gemma's image tokens, of which there are `image`, needs as many world tokens of a photograph, on the
    same places."""
    world = shape.tokens_per_moment
    if config.align_steps and not on_image_tokens(config, shape, image):
        raise ValueError(
            f"align_steps {config.align_steps}: {world} world tokens (world_mode {config.world_mode}) "
            f"and {image} image tokens do not lie on the same places; choose a world_patch that gives as many, "
            "or align_steps 0"
        )


def align_pass(model: TheWorld, data: Data, statements: list[Statement]) -> Pass:
    """The rows of the statements' images, without a language model's batch."""
    images = [s.image for s in statements]
    assert data.vision is not None
    return Pass(tuple(statements), None, data.latents(images), data.vision(images)).pin(model.gemma.device)


def align_loss(model: TheWorld, one: Pass) -> dict[str, Tensor]:
    """Squared distance of a photograph's world tokens (those of moments predicted from it have no place there) to
    Gemma's image tokens of the same places, as a share of the image tokens' own squared size, summed over statements:
    each by itself, so that it does not matter which others are in the pass."""
    assert one.latents is not None
    assert one.vision is not None
    target = model.gemma.image_features(one.vision).float()
    tokens = model.projection(one.latents)[:, : model.projection.shape.tokens_per_moment]
    loss = ((tokens - target).pow(2).mean((1, 2)) / target.pow(2).mean((1, 2))).sum()
    zero = torch.zeros_like(loss).detach()
    return {"total": loss, "label": loss.detach(), "statement": zero, "relation": zero, "correct": zero}
