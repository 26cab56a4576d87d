"""What training and evaluation read of each image: from a cache, or computed on the fly from the photograph.

cache/latents/         Cosmos latents, one float[C, H, W] an image; float[1 + n, C, H, W] with n predicted latent frames
cache/pixels/          the same of another world encoder, under its name: pixels, cosmos_random, noise
cache/gemma_vision/    optional: Gemma's own pooled vision features, one float[N, V] an image
cache/failures.jsonl   images that statements name but that could not be read, with the reason

A feature source is called with image paths and returns one row an image, in their order. Rows of a cache are read from
the files at each call: the operating system's page cache keeps them, once for all processes of a machine.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from theworld.config.cli import extraction_command
from theworld.config.config import Config
from theworld.data.images import ImageError, decode, read_bytes, read_image, sha256
from theworld.data.vsr import Statement, images_of
from theworld.extraction.batches import FeatureSource
from theworld.models import world_encoder
from theworld.models.encoder import Encoder, EncoderSpec, encode_alone
from theworld.models.gemma import Gemma, is_multimodal
from theworld.models.gemma_vision import VisionEncoder, vision_spec
from theworld.models.serialization import VISION as VISION_PART
from theworld.store.format import VISION, read_failures
from theworld.store.reader import StoreReader
from theworld.utils.commands import PLACEHOLDER, extraction
from theworld.utils.device import torch_dtype
from theworld.utils.files import StoreError
from theworld.utils.text import counted, difference, folded

KEPT_BYTES = 2**30  # of the rows that a source which computes them keeps


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a tensor as the store takes it: bfloat16, which NumPy lacks, as the uint16 of the same bits."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


class CachedFeatures:
    """The rows of one finished store as tensors, by image path. Threads may share it, and processes may fork it."""

    def __init__(self, root: Path, spec: EncoderSpec | None = None) -> None:
        """`spec`: what the rows have to mean; None: not compared. Raises StoreError if there is no such store or it is
        unfinished or damaged, StoreMismatch if it holds something else."""
        if not root.exists():
            raise StoreError(_not_there(root, extraction(root.parent)))
        self.reader = StoreReader(root)
        if spec is not None:
            spec.check_compatible(root, self.reader.fingerprint)
        (self.array,) = self.reader.arrays.values()

    def __call__(self, images: Sequence[str]) -> Tensor:
        """[len(images), *row_shape] in the stored dtype, on the CPU.

        Raises StoreError for an image that is not in the store or a row that is damaged.
        """
        rows = [self.reader.row(image) for image in images]
        features = torch.empty((len(rows), *self.array.shape), dtype=torch_dtype(self.array.dtype))
        memory = to_numpy(features)
        for place, row in enumerate(rows):
            self.reader.read_row(row, self.array.name, memory[place, ...])
        return features

    def __contains__(self, image: object) -> bool:
        return image in self.reader


class WorldRows(CachedFeatures):
    """The rows that world tokens are made of, as a projection takes them: see `theworld.models.encoder.Use`."""

    def __init__(self, root: Path, spec: EncoderSpec, compare: bool = True) -> None:
        """`compare`: whether the store has to hold what the settings of `spec` say. Raises as `CachedFeatures`."""
        super().__init__(root, spec if compare else None)
        self.root, self.cache, self.use = root, root.parent, spec.use
        # Of a projection that takes these rows; without statistics where they are measured: see `having`.
        self.fingerprint = {**self.reader.fingerprint, **spec.use.fields}
        self.images: Mapping[str, str] = self.reader.images  # path -> SHA-256
        self.pairs = {} if spec.use.pairs is None else spec.use.pairs(self.images)

    def __call__(self, images: Sequence[str]) -> Tensor:
        """[len(images), *latent_shape] in the stored dtype, on the CPU; with predicted frames, [len(images), 1 + n, C,
        H, W]. Raises as `CachedFeatures`."""
        rows = super().__call__([self.pairs.get(image, image) for image in images])
        return rows if self.use.view is None else self.use.view(rows)

    def having(self, **fields: Any) -> "WorldRows":
        """Return the same rows with these values of the fingerprint."""
        other = copy.copy(self)
        other.fingerprint = {**self.fingerprint, **fields}
        return other


class NoRows:
    """The rows of an encoder without a store: zeros for each image."""

    def __init__(self, cache: Path, spec: EncoderSpec) -> None:
        self.root, self.cache = cache / spec.name, cache
        self.shape, self.fingerprint = spec.array.shape, spec.fingerprint()
        self.images: Mapping[str, str] | None = None
        self.left_out = read_failures(cache)

    def __call__(self, images: Sequence[str]) -> Tensor:
        """float32[len(images), *latent_shape], on the CPU."""
        return torch.zeros(len(images), *self.shape)

    def __contains__(self, image: object) -> bool:
        return image not in self.left_out  # so that all encoders have the same statements


class KeptRows:
    """Rows by image path that were computed lately, up to `KEPT_BYTES`, so that none is computed for each batch and
    condition of an evaluation."""

    def __init__(self, compute: Callable[[str], Tensor]) -> None:
        """`compute`: gives the row of one image, without a batch dimension."""
        self.compute = compute
        self.rows: OrderedDict[str, Tensor] = OrderedDict()
        self.num_bytes = 0

    def __call__(self, images: Sequence[str]) -> Tensor:
        """[len(images), *row_shape] on the CPU."""
        return torch.stack([self._row(image) for image in images])

    def _row(self, image: str) -> Tensor:
        row = self.rows.pop(image, None)
        if row is None:
            row = self.compute(image).cpu()
            self.num_bytes += row.nbytes
        self.rows[image] = row  # the one used last stands last
        while self.num_bytes > KEPT_BYTES and len(self.rows) > 1:
            self.num_bytes -= self.rows.popitem(last=False)[1].nbytes
        return row


class OnTheFlyLatents:
    """Rows of a world encoder straight from the photographs, for evaluation without a cache."""

    def __init__(
        self, encoder: Encoder, image_folder: str | Path, max_image_pixels: int, follow_links: bool = False
    ) -> None:
        self.encoder = encoder
        self.follow_links = follow_links
        self.image_folder = Path(image_folder)
        self.max_image_pixels = max_image_pixels
        self.kept = KeptRows(self._encode)

    def __call__(self, images: Sequence[str]) -> Tensor:
        """dtype[len(images), *row_shape] on the CPU, each encoded by itself. Raises ImageError for an unreadable
        one."""
        return self.kept(images)

    def _encode(self, image: str) -> Tensor:
        pixels = read_image(self.image_folder, image, self.max_image_pixels, self.follow_links)
        return encode_alone(self.encoder, pixels)[0]


class OnTheFlyPixels:
    """Photographs as Gemma's vision tower takes them, for a tower that trains."""

    def __init__(
        self,
        gemma: Gemma,
        image_folder: str | Path,
        max_image_pixels: int,
        hashes: Mapping[str, str] | None = None,
        follow_links: bool = False,
    ) -> None:
        """`hashes`: path -> SHA-256 of the photographs whose latents go with these features."""
        self.gemma = gemma
        self.image_folder = Path(image_folder)
        self.max_image_pixels = max_image_pixels
        self.hashes = hashes
        self.follow_links = follow_links
        self.readers = ThreadPoolExecutor(8)  # PIL decodes outside of Python's lock

    def __call__(self, images: Sequence[str]) -> Tensor:
        """float32[len(images), 3, S, S] on the CPU. Raises ImageError for a photograph that cannot be read or was
        changed."""
        return torch.cat(list(self.readers.map(self._read, images)))

    def _read(self, image: str) -> Tensor:
        data = read_bytes(self.image_folder, image, follow_links=self.follow_links)
        if self.hashes is not None and sha256(data) != self.hashes[image]:
            raise ImageError(
                image,
                f"changed since its latents were extracted: SHA-256 was {self.hashes[image]}, is {sha256(data)}; "
                "put it back, or extract into another --cache",
            )
        return self.gemma.pixel_values([decode(data, image, self.max_image_pixels)])


class OnTheFlyVision(OnTheFlyPixels):
    """Gemma's vision features straight from the photographs, for a frozen tower whose features are not cached."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.kept = KeptRows(self._encode)

    def __call__(self, images: Sequence[str]) -> Tensor:
        """dtype[len(images), N, V] on the CPU, each encoded by itself. Raises as `OnTheFlyPixels`."""
        return self.kept(images)

    @torch.no_grad()
    def _encode(self, image: str) -> Tensor:
        return self.gemma.vision_features(self._read(image))[0]


def in_cache(
    statements: list[Statement], features: CachedFeatures | NoRows, cache: str | Path
) -> tuple[list[Statement], str]:
    """Return the statements whose image is in the cache, and a line that says how many of how many these are.

    Only images that extraction left out knowingly may be missing. Raises StoreError for any other.
    """
    images = images_of(statements)
    missing = {image for image in images if image not in features}
    unknown = sorted(missing - read_failures(cache).keys())
    if unknown and isinstance(features, CachedFeatures):
        first = unknown[0]
        raise StoreError(
            f"{cache}: lacks {len(unknown):,} of {counted(len(images), 'image')} that the statements name, such as "
            f"{first}{_similar(first, features.reader.images)}; name other statements with "
            f"--annotations, or make a cache of these with: {extraction(Path(f'{cache}-new'))}"
        )
    kept = [s for s in statements if s.image not in missing]
    found = f"{len(images) - len(missing):,} of {counted(len(images), 'image')}"
    note = f"{len(kept):,} of {counted(len(statements), 'statement')}, {found}"
    return kept, note + (f" ({len(missing)} left out by --allow_missing)" if missing else "")


def _similar(name: str, cached: Iterable[str]) -> str:
    """Return in words which of the cached names differs in case or Unicode form only; nothing if none does."""
    found = next((own for own in cached if folded(own) == folded(name)), None)
    return "" if found is None else f" (it has {found!a}, which differs in {difference(name, found)})"


def cached_latents(config: Config, cache: Path) -> WorldRows | NoRows:
    """Return the cache's rows of the world encoder that the settings name, as they describe them."""
    spec = world_encoder.describe(config)
    if not spec.stored:
        return NoRows(cache, spec)
    _check_there(cache / spec.name, config)
    return WorldRows(cache / spec.name, spec)


def _check_there(root: Path, config: Config) -> None:
    """Raise StoreError with the command that makes a store with these settings, if there is none."""
    if not root.exists():
        raise StoreError(_not_there(root, extraction_command(config, root.parent)))


def _not_there(root: Path, command: str) -> str:
    return f"{root} is not there; name another --cache, or make it with: {command}"


def latents_for(fingerprint: Mapping[str, Any], config: Config, cache: Path) -> WorldRows | NoRows:
    """Return the cache's rows of a checkpoint's world encoder. `fingerprint`, `config`: the checkpoint's.

    Raises StoreMismatch if they are others than those it was trained on.
    """
    spec = world_encoder.describe(config, fingerprint)
    if not spec.stored:
        spec.check_taken(cache, spec.fields, fingerprint)
        return NoRows(cache, spec)
    _check_there(cache / spec.name, config)
    rows = WorldRows(cache / spec.name, spec, compare=False)
    spec.check_taken(rows.root, rows.reader.fingerprint, fingerprint)
    return rows


def cached_vision(config: Config, cache: Path) -> CachedFeatures | None:
    """Return the cache's vision features, of a Gemma as it was published; None if it is text-only or has none there."""
    if not (cache / VISION).exists() or not is_multimodal(config.model_name):
        return None
    return CachedFeatures(cache / VISION, VisionEncoder.describe(config))


CHANGED_TOWER = "Gemma's vision tower is not as it was published, so cached features of it are of no use"


def vision_source(
    gemma: Gemma,
    config: Config,
    cached: CachedFeatures | None,
    hashes: Mapping[str, str] | None = None,
    cache: str | Path = PLACEHOLDER,
) -> FeatureSource | None:
    """Return where a Gemma's vision comes from: cached features; else photographs, through its tower or, if that
    trains, as pixels; None for a text-only Gemma. `hashes`: path -> SHA-256 of the photographs whose latents go with
    them. `cache`: for the message, the folder where cached features would be.

    Raises ValueError if photographs are needed and `image_folder` is not set, StoreMismatch if cached features are
    another tower's.
    """
    if not gemma.is_multimodal:
        return None
    changed = VISION_PART in gemma.modified_parts
    if cached is not None and not changed:
        check_vision_tower(gemma, config, cached)
        return cached
    if config.image_folder is None:
        reason = CHANGED_TOWER if changed else "the cache has no features of them"
        other = ""
        if not gemma.modified_parts:
            other = f", or extract them once with: {extraction_command(config, cache, '--gemma_vision')}"
        raise ValueError(f"this Gemma looks at the photographs: {reason}; give --image_folder{other}")
    kind = OnTheFlyPixels if VISION_PART in gemma.trainable_parts else OnTheFlyVision
    return kind(gemma, config.image_folder, config.max_image_pixels, hashes, config.follow_links)


def vision_note(gemma: Gemma, cached: CachedFeatures | None) -> list[str]:
    """Return a line that says why cached features are not read; nothing where they are, or where there are none."""
    unused = cached is not None and gemma.is_multimodal and VISION_PART in gemma.modified_parts
    return [f"photographs are read: {CHANGED_TOWER}"] if unused else []


def check_vision_tower(gemma: Gemma, config: Config, cached: CachedFeatures) -> None:
    """Raise StoreMismatch if cached features come from another vision tower. Weights that were cast have other bits, so
    towers are compared where they were loaded in the same dtype."""
    fingerprint = cached.reader.fingerprint
    same_dtype = fingerprint["compute_dtype"] == str(gemma.dtype).removeprefix("torch.")
    if gemma.has_weights and same_dtype:
        vision_spec(config, gemma).check_compatible(cached.reader.root, fingerprint)
