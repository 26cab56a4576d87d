"""Encode some of a cache's photographs again, in float32, and compare them with the cache.

Verification finds rows that changed after they were written. An audit finds rows that were wrong when they were
written: of another model, other pixels or other photographs, or of a device that computes wrongly.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from theworld.config.cli import extraction_command
from theworld.config.config import Config
from theworld.extraction.encoders import encoder_of, specs_to_extract
from theworld.extraction.extract import source_of
from theworld.extraction.features import CachedFeatures
from theworld.extraction.reading import Source, read_photograph
from theworld.models.encoder import Encoder, check_compatible
from theworld.models.gemma_vision import VisionEncoder
from theworld.models.serialization import weights_sha256
from theworld.store.format import VISION, stores_of
from theworld.store.shard import ImageEntry
from theworld.utils.device import torch_dtype
from theworld.utils.distributed import Part
from theworld.utils.files import StoreError
from theworld.utils.text import counted

# Distance ||cached - encoded again|| / ||encoded again|| of one image that rounding can explain, by the coarser of the
# dtypes in which it was computed and stored. A VAE of the real shape (random weights, CPU) is at 1.2e-2 when computed
# in bfloat16, at 1.7e-3 when only stored in it. float32 leaves room for TF32, in which GPUs convolve. Another
# photograph's latent is at about 1.
TOLERANCE = {"float32": 5e-3, "float16": 5e-3, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Audit:
    """The result of one store."""

    root: Path
    num_images: int
    of: int
    tolerance: float
    image: str  # the image that is furthest from its photograph
    distance: float
    largest: float  # difference of a single value, anywhere

    @property
    def holds(self) -> bool:
        """Whether every image is within the tolerance."""
        return self.distance <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{self.root}: {self.num_images:,} of {counted(self.of, 'image')} encoded again in float32: largest "
            f"difference {self.distance:.2e} of the norm ({self.image}), of a single value {self.largest:.2e}; "
            f"tolerance {self.tolerance:.0e} of the norm: {'within it' if self.holds else 'BEYOND IT'}"
        )


def audit(config: Config, cache: Path, num_images: int) -> list[Audit]:
    """Compare `num_images` random images of each store that these settings name, and return the results.

    Raises StoreError for a damaged cache, StoreMismatch for other settings or weights than the cache's, ImageError for
    a photograph that changed since it was extracted.
    """
    if num_images < 1:
        raise ValueError(f"--audit {num_images}: give 1 or more images")
    named = {spec.name for spec in specs_to_extract(config, with_vision=(cache / VISION).exists())}
    roots = [root for root in stores_of(cache) if root.name in named]
    if not roots:
        raise StoreError(f"{cache}: no store in it; make it with: {extraction_command(config, cache)}")
    source = source_of(config, Part())
    return [audit_store(root, config, source, num_images) for root in roots]


def audit_store(root: Path, config: Config, source: Source, num_images: int) -> Audit:
    """Return the audit of one store. Raises as `audit`."""
    rows = CachedFeatures(root)
    fingerprint = rows.reader.fingerprint
    exact = replace(config, dtype="float32", compile=False, latent_dtype=None)
    encoder = encoder_of(root.name, config)(exact)
    own = encoder.spec.fingerprint()
    if isinstance(encoder, VisionEncoder):
        own["vision_weights_sha256"] = _tower_sha256(encoder, fingerprint["compute_dtype"])
    steps = fingerprint.get("num_world_steps", 0)
    if steps:  # only the photograph's own latent frame; the others were predicted from it
        own["num_world_steps"] = config.num_world_steps
        check_compatible(root, {key: fingerprint.get(key) for key in own}, own)
    else:
        check_compatible(root, fingerprint, own)
    precision = {fingerprint["compute_dtype"], fingerprint["storage_dtype"]}
    tolerance = max(TOLERANCE[dtype] for dtype in precision)
    images = rows.reader.images
    chosen = random.SystemRandom().sample(sorted(images), min(num_images, len(images)))
    furthest, largest = ("", -1.0), 0.0
    for path in tqdm(chosen, desc="audit", unit=" images", leave=False):
        cached = rows([path])[0].double()
        cached = cached[0] if steps else cached
        again = _encode(encoder, ImageEntry(path, images[path]), source)
        difference = cached - again
        distance = float(difference.norm() / again.norm().clamp_min(1e-30))
        furthest = max(furthest, (path, distance), key=lambda pair: pair[1])
        largest = max(largest, float(difference.abs().max()))
    return Audit(root, len(chosen), len(images), tolerance, *furthest, largest)


def _tower_sha256(encoder: VisionEncoder, dtype: str) -> str:
    """Return the hash of the tower's weights in the dtype in which the cache was computed: cast weights have other
    bits."""
    tower = encoder.tower.state_dict()
    cast = {k: v.to(torch_dtype(dtype)) if v.is_floating_point() else v for k, v in tower.items()}
    return weights_sha256(cast)


def _encode(encoder: Encoder, row: ImageEntry, source: Source) -> Tensor:
    """float64[*row_shape] on the CPU: one photograph by itself, read and checked as in extraction."""
    pixels = read_photograph(row, source, {"read": 0.0, "decode": 0.0})
    return encoder.encode(encoder.prepare(pixels)[None])[0].cpu().double()
