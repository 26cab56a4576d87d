"""The mean and standard deviation of each channel of an encoder's rows, by which a projection standardises them."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from theworld.extraction.features import WorldRows

BATCH = 16  # images that are read at a time


def measured_on(rows: WorldRows, images: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a projection's fingerprint that are measured on the rows of its training images.

    `standardized_on` says on which: the SHA-256 of their sorted hashes. Images of equal bytes count once, and the order
    of `images` makes no difference. Raises ValueError for a channel that has no deviation.
    """
    first = {rows.images[image]: image for image in sorted(images, reverse=True)}
    hashes = sorted(first)
    mean, std = channel_statistics(rows, [first[digest] for digest in hashes])
    flat = [number for number, value in enumerate(std.tolist()) if not value > 0]
    if flat:
        raise ValueError(
            f"{rows.root}: channel {flat[0]} has a standard deviation of {std[flat[0]]} over the {len(hashes):,} "
            "training images, so its values cannot be standardised; wanted above 0"
        )
    listed = sha256("".join(f"{digest}\n" for digest in hashes).encode()).hexdigest()
    return {"latents_mean": mean.tolist(), "latents_std": std.tolist(), "standardized_on": listed}


def channel_statistics(rows: WorldRows, images: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (of the population) of each channel, float64[C] each, in one pass.

    Sums are of distances from the means of the first images, so that nothing is lost where a mean is large. NumPy adds
    them up in one thread: the numbers do not depend on how many there are.
    """
    is_grid = len(rows.fingerprint["latent_shape"]) == 3
    pivot, count = np.zeros(0), 0
    for start in range(0, len(images), BATCH):
        values = rows(images[start : start + BATCH]).double().movedim(-3 if is_grid else -1, 0)
        channels = values.flatten(1).contiguous().numpy()
        if start == 0:
            pivot = channels.mean(1)
            total, squares = np.zeros_like(pivot), np.zeros_like(pivot)
        channels -= pivot[:, None]
        total += channels.sum(1)
        squares += np.square(channels).sum(1)
        count += channels.shape[1]
    distance = total / count
    return pivot + distance, np.sqrt(squares / count - distance**2)
