"""The control "another image": Cosmos latents, of another image than the statement's, in training and evaluation.

The latents are those of the world encoder cosmos, from the same store. What is left of a gain with them is owed to the
statements, and not to the picture.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import Any

from theworld.config.config import Config
from theworld.models.cosmos import CosmosLatents
from theworld.models.encoder import EncoderSpec, Use


class MismatchedLatents(CosmosLatents):
    """Photographs to their latents, each of which stands for another image."""

    @staticmethod
    def describe(config: Config, like: Mapping[str, Any] | None = None) -> EncoderSpec:
        """Return what is stored of a photograph, its own latent, and that the projection takes another image's."""
        fields = {"world_encoder": "mismatched", "control_seed": config.control_seed}
        pairs = partial(another_image, seed=config.control_seed)
        return replace(CosmosLatents.describe(config, like), use=Use(fields, pairs=pairs))


def another_image(hashes: Mapping[str, str], seed: int) -> dict[str, str]:
    """Return for each image path another one, with other bytes; `hashes`: path -> SHA-256.

    The different images are put into an order by a hash of seed and SHA-256, in which each is followed by the image
    that stands for it, and the last by the first. So each stands for one other, whatever the paths are. Raises
    ValueError for fewer than two different images.
    """
    first: dict[str, str] = {}
    for path in sorted(hashes):
        first.setdefault(hashes[path], path)
    if len(first) < 2:
        raise ValueError(
            f"world_encoder mismatched: {len(first)} different image in the store; it takes two, one for the other"
        )
    order = sorted(first, key=lambda digest: sha256(f"{seed} {digest}".encode()).digest())
    follower = dict(zip(order, order[1:] + order[:1], strict=True))
    return {path: first[follower[digest]] for path, digest in hashes.items()}
