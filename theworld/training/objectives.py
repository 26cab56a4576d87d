"""The optimizer, and the objective of the phase "align": world tokens close to Gemma's image tokens.

The other phases have the losses of `TheWorld.losses`, weighted as their `Phase` says.
"""

import torch
from torch import Tensor

from theworld.config.config import Config
from theworld.data.vsr import Statement
from theworld.extraction.batches import Microbatch
from theworld.models.projection import ProjectionShape
from theworld.models.theworld import TheWorld
from theworld.training.data import Data


def make_optimizer(model: TheWorld, config: Config) -> torch.optim.AdamW:
    """Return AdamW over the parameters that train, with weight decay on matrices alone, as is usual.

    The learning rate of a group is its `share` of the step's: 1 for the projection, `gemma_share` for parts of Gemma.
    """
    groups = []
    for of_gemma, share in ((False, 1.0), (True, gemma_share(config))):
        named = {n: p for n, p in model.trainable().items() if n.startswith("gemma.") is of_gemma}
        matrices = [p for name, p in named.items() if name.endswith("weight") and p.ndim >= 2]
        vectors = [p for name, p in named.items() if not (name.endswith("weight") and p.ndim >= 2)]
        if named:
            groups.append({"params": matrices, "weight_decay": config.weight_decay, "share": share})
            groups.append({"params": vectors, "weight_decay": 0.0, "share": share})
    # A fused step is one launch, and takes no memory beside the weights.
    fused = model.gemma.device.type == "cuda"
    betas = (0.9, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused)


def gemma_share(config: Config) -> float:
    """Return the learning rate of Gemma's parts that train as a share of the projection's."""
    if config.gemma_learning_rate is not None:
        return config.gemma_learning_rate / config.learning_rate
    return 0.1 if config.lora_rank is None else 1.0


def on_image_tokens(config: Config, shape: ProjectionShape, num_image_tokens: int) -> bool:
    """Return whether a photograph's world tokens and its image tokens are tokens of the same patches."""
    return shape.tokens_per_frame == num_image_tokens and config.world_mode == "patch"


def check_align(config: Config, shape: ProjectionShape, num_image_tokens: int) -> None:
    """Raise ValueError if `align_steps` is set, and world tokens and image tokens are not of the same patches."""
    world = shape.tokens_per_frame
    if config.align_steps and not on_image_tokens(config, shape, num_image_tokens):
        raise ValueError(
            f"align_steps {config.align_steps}: {world} world tokens (world_mode {config.world_mode}) "
            f"and {num_image_tokens} image tokens do not lie on the same places; choose a world_patch that gives as "
            "many, or align_steps 0"
        )


def align_microbatch(model: TheWorld, data: Data, statements: list[Statement]) -> Microbatch:
    """Return the latents and vision features of the statements' images, without a batch of the language model."""
    images = [s.image for s in statements]
    assert data.vision is not None
    rows = data.latents(images), data.vision(images)
    return Microbatch(tuple(statements), None, *rows).pin(model.gemma.device)


def align_losses(model: TheWorld, microbatch: Microbatch) -> dict[str, Tensor]:
    """Return the losses of the phase "align" under the names of `TheWorld.losses`, summed over statements.

    The loss of a statement is the squared distance of its photograph's world tokens to Gemma's image tokens of the same
    patches, as a share of the image tokens' own squared size. Tokens of predicted frames have no such patches, and do
    not count.
    """
    assert microbatch.latents is not None
    assert microbatch.vision is not None
    target = model.gemma.image_features(microbatch.vision).float()
    tokens = model.projection(microbatch.latents)[:, : model.projection.shape.tokens_per_frame]
    loss = ((tokens - target).pow(2).mean((1, 2)) / target.pow(2).mean((1, 2))).sum()
    zero = torch.zeros_like(loss).detach()
    return {"total": loss, "label": loss.detach(), "statement": zero, "relation": zero, "correct": zero}
