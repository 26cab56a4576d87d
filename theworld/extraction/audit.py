"""Encodes some of a cache's photographs again, in float32, and compares: whether the numbers are what they claim to be.

Verification finds what changed after it was written. An audit finds what was wrong when it was written: another model,
other pixels, rows of other photographs, a device that computes wrongly.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from theworld.config.config import Config
from theworld.extraction.encoders import Encoding, VisionEncoding, full_fingerprint
from theworld.extraction.extract import load_encoding, source_of, stores_of
from theworld.extraction.features import Rows
from theworld.extraction.pipeline import Source, read_photograph
from theworld.models.serialization import weights_sha256
from theworld.store.format import LATENTS, VISION, check_meaning
from theworld.store.shard import ImageEntry
from theworld.store.verify import DAMAGED, SOUND
from theworld.utils.device import torch_dtype
from theworld.utils.distributed import Part
from theworld.utils.files import StoreError

# Distance ||cached - encoded again|| / ||encoded again|| of one image that rounding can explain, by the coarser of the
# dtypes in which it was computed and stored. A VAE of the real shape (random weights, CPU) is at 1.2e-2 when computed
# in bfloat16, at 1.7e-3 when only stored in it. float32 leaves room for TF32, in which GPUs convolve. Another
# photograph's latent is at about 1.
TOLERANCE = {"float32": 5e-3, "float16": 5e-3, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Audit:
    """What came out for one store."""

    root: Path
    num_images: int
    of: int
    tolerance: float
    image: str
    # the one that is furthest from its photograph
    distance: float
    largest: float
    # difference of a single value, anywhere

    @property
    def holds(self) -> bool:
        """Whether every image is within the tolerance."""
        return self.distance <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{self.root}: {self.num_images:,} of {self.of:,} images encoded again in float32: largest difference "
            f"{self.distance:.2e} of the norm ({self.image}), of a single value {self.largest:.2e}; tolerance "
            f"{self.tolerance:.0e} of the norm: {'within it' if self.holds else 'BEYOND IT'}"
        )


def audit(config: Config, cache: Path, num_images: int) -> int:
    """Compares so many random images of each store and prints what came out; returns SOUND where all are within the
    tolerance, else DAMAGED.

    Raises StoreError for a damaged cache, StoreMismatch for other settings or weights than the cache's, ImageError for
    a photograph that is not the one that was extracted.
    """
    if num_images < 1:
        raise ValueError(f"--audit {num_images}: give 1 or more images")
    roots = stores_of(cache)
    if not roots:
        raise StoreError(f"{cache}: no store in it; run tools/extract_latents.py first")
    source = source_of(config, Part())
    audits = [audit_store(root, config, source, num_images) for root in roots]
    print("\n".join(map(str, audits)))
    return SOUND if all(one.holds for one in audits) else DAMAGED


def audit_store(root: Path, config: Config, source: Source, num_images: int) -> Audit:
    """As `audit`, of one store."""
    assert root.name in (LATENTS, VISION)
    rows = Rows(root, root.name)
    fingerprint = rows.reader.fingerprint
    encoding = load_encoding(root.name, config, config.device, exact=True)
    own = full_fingerprint(encoding, config.encode_batch_size)
    if isinstance(encoding, VisionEncoding):
        own["vision_weights_sha256"] = _tower_sha256(encoding, fingerprint["compute_dtype"])
    moments = fingerprint.get("num_world_steps", 0)
    if moments:  # only the first one, the photograph's own: the others were predicted from it
        own["num_world_steps"] = config.num_world_steps
        check_meaning(root, {key: fingerprint.get(key) for key in own}, own)
    else:
        check_meaning(root, fingerprint, own)
    precision = {fingerprint["compute_dtype"], fingerprint["storage_dtype"]}
    tolerance = max(TOLERANCE[dtype] for dtype in precision)
    images = rows.reader.images
    chosen = random.SystemRandom().sample(sorted(images), min(num_images, len(images)))
    furthest, largest = ("", -1.0), 0.0
    for path in tqdm(chosen, desc="audit", unit=" images", leave=False):
        cached = rows([path])[0].double()
        cached = cached[0] if moments else cached
        again = _encode(encoding, ImageEntry(path, images[path]), source)
        difference = cached - again
        distance = float(difference.norm() / again.norm().clamp_min(1e-30))
        furthest = max(furthest, (path, distance), key=lambda pair: pair[1])
        largest = max(largest, float(difference.abs().max()))
    return Audit(root, len(chosen), len(images), tolerance, *furthest, largest)


def _tower_sha256(encoding: VisionEncoding, dtype: str) -> str:
    """What the tower's weights hash to in the dtype in which the cache was computed: cast weights have other bits."""
    tower = encoding.gemma.model.model.vision_tower.state_dict()
    cast = {k: v.to(torch_dtype(dtype)) if v.is_floating_point() else v for k, v in tower.items()}
    return weights_sha256(cast)


def _encode(encoding: Encoding, row: ImageEntry, source: Source) -> Tensor:
    """float64 on the host: one photograph by itself, read and checked as in extraction."""
    pixels = read_photograph(row, source, {"read": 0.0, "decode": 0.0})
    return encoding.encode(encoding.prepare(pixels)[None])[0].cpu().double()
