"""A cache folder as the training and evaluation loops see it: images in, tensors out.

cache/latents/         the Cosmos latents, one float[C, H, W] an image; float[1 + n, C, H, W] with n predicted moments
cache/gemma_vision/    optional: Gemma's own pooled SigLIP features, one float[N, V] an image
cache/failures.jsonl   images that statements name but that could not be read, with the reason
"""

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from theworld.config.config import Config
from theworld.data.images import ImageError, decode, latent_pixels, read_bytes, read_image, sha256
from theworld.data.vsr import Statement, images_of
from theworld.extraction.batches import Fetch
from theworld.extraction.encoders import expected_vision
from theworld.models.cosmos import CosmosEncoder
from theworld.models.gemma import Gemma, is_multimodal
from theworld.models.serialization import VISION as VISION_PART
from theworld.store.format import VISION, check_meaning, read_failures
from theworld.store.reader import StoreReader
from theworld.utils.files import StoreError


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor as the store takes it: bfloat16, which NumPy does not have, as the uint16 of the same bits."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def as_tensor(array: np.ndarray) -> Tensor:
    """The inverse of `to_numpy`: the same memory, which has to be writable."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


_EMPTY, _BUSY, _THERE = range(3)  # a row of the memory: nobody reads it, somebody does, it is read and sound


def room_for_rows() -> int:
    """Bytes that the rows of one store may take: a quarter of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


class Rows:
    """One array of one store as tensors by image path.

    Rows stay in memory, in one tensor, where they fit (`room_for_rows`): all rows of the store, else those that
    `preload` is asked for. Threads may share it.
    """

    def __init__(
        self, root: Path, array: str, expected: dict[str, Any] | None = None, pin: bool = False
    ) -> None:
        """`pin`: what a call returns lies in page-locked memory, from which a copy to the GPU is faster and need
        not be waited for. Raises StoreError as `StoreReader` does, ValueError to pin without CUDA."""
        if pin and not torch.cuda.is_available():
            raise ValueError(f"{root}: pin is True, but there is no CUDA device to copy to; leave pin out")
        if not root.exists():
            cure = f"make it with tools/extract_latents.py --cache {root.parent}, or name another --cache"
            raise StoreError(f"{root} is not there; {cure}")
        self.reader = StoreReader(root, expected)
        self.array = array
        self.pin = pin
        self._lock = threading.Lock()  # of _memory and _state, and never held while a row is read
        self._place = np.full(self.reader.num_rows, -1)  # of each row of the store in the memory; -1: none
        self._memory: Tensor | None = None
        self._raw = np.empty(0)  # the same bytes as NumPy has them
        self._state = np.empty(0, np.int8)
        self._allocate(np.arange(self.reader.num_rows))

    def __call__(self, images: Sequence[str]) -> Tensor:
        """[len(images), ...] in the stored dtype. Raises StoreError for an image that is not there."""
        rows = np.array([self.reader.row(image) for image in images], np.int64)
        places = self._place[rows]
        if self._memory is not None and (places >= 0).all() and (self._state[places] == _THERE).all():
            shape = (len(rows), *self._memory.shape[1:])
            out = torch.empty(shape, dtype=self._memory.dtype, pin_memory=True) if self.pin else None
            return torch.index_select(self._memory, 0, torch.from_numpy(places), out=out)
        gathered = torch.stack([self._row(row) for row in rows.tolist()])
        return gathered.pin_memory() if self.pin else gathered

    def preload(
        self, images: Iterable[str], num_threads: int = 4, stop: threading.Event | None = None
    ) -> int:
        """Reads the rows of these images in file order, as fast as it goes, checked as ever: how many of them are in
        memory then. 0 where they do not fit; rows without a place are read each time they are asked for.

        Calls meanwhile, from other threads, read for themselves what is not there yet, so this can run in a daemon
        thread beside the first steps. Ends after the rows under way once `stop` is set. Raises StoreError or OSError
        for the first row that cannot be read.
        """
        rows = np.unique(np.array([self.reader.row(image) for image in images], np.int64))
        with self._lock:
            if self._memory is None:
                self._allocate(rows)
        rows = rows[self._place[rows] >= 0]
        waiting = iter(rows.tolist())
        errors: list[Exception] = []

        def work() -> None:
            for row in waiting:  # shared: each thread takes the next row of the file
                try:
                    self._fill(row)
                except (StoreError, OSError) as error:
                    errors.append(error)
                if errors or (stop is not None and stop.is_set()):
                    return

        # Daemons, so that a program that ends does not wait for gigabytes that nobody will use.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(max(1, num_threads))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return int((self._state[self._place[rows]] == _THERE).sum())

    def _allocate(self, rows: np.ndarray) -> None:
        """Makes room for these rows of the store where they fit. The system gives the memory as it is written to."""
        spec = self.reader.arrays[self.array]
        if not 0 < len(rows) * spec.row_nbytes <= room_for_rows():
            return
        # PyTorch's memory and not NumPy's, whose large pages make rows that come in any order several times slower.
        memory = torch.empty((len(rows), *spec.shape), dtype=getattr(torch, spec.dtype))
        self._raw = to_numpy(memory)
        self._state = np.full(len(rows), _EMPTY, np.int8)
        self._memory = memory
        self._place[rows] = np.arange(len(rows))  # last: who sees a place finds the memory

    def _fill(self, row: int) -> bool:
        """Reads a row into its place unless it is there or somebody does; whether it was read now."""
        place = self._place[row]
        with self._lock:
            if place < 0 or self._state[place] != _EMPTY:
                return False
            self._state[place] = _BUSY
        state = _EMPTY
        try:
            self.reader.read_row(row, self.array, self._raw[place, ...])
            state = _THERE
        finally:
            self._state[place] = state
        return True

    def _row(self, row: int) -> Tensor:
        place = self._place[row]
        if place >= 0 and (self._fill(row) or self._state[place] == _THERE):
            assert self._memory is not None
            return self._memory[place]
        return as_tensor(self.reader.read_row(row, self.array))


class LivePixels:
    """Photographs as Gemma's vision tower takes them: what a tower that trains has to see."""

    def __init__(
        self,
        gemma: Gemma,
        image_folder: str | Path,
        max_image_pixels: int,
        hashes: Mapping[str, str] | None = None,
    ) -> None:
        """`hashes`: path -> SHA-256 of the photographs whose latents go with these features."""
        self.gemma = gemma
        self.image_folder = Path(image_folder)
        self.max_image_pixels = max_image_pixels
        self.hashes = hashes
        self.readers = ThreadPoolExecutor(8)  # PIL decodes outside of Python's lock

    def __call__(self, images: Sequence[str]) -> Tensor:
        """float32[len(images), 3, S, S] on the CPU. Raises ImageError for a photograph that cannot be read or was
        changed."""
        return torch.cat(list(self.readers.map(self._one, images)))

    def _one(self, image: str) -> Tensor:
        data = read_bytes(self.image_folder, image)
        if self.hashes is not None and sha256(data) != self.hashes[image]:
            raise ImageError(
                image,
                f"changed since its latents were extracted: SHA-256 was {self.hashes[image]}, is {sha256(data)}; "
                "put it back, or extract into another --cache",
            )
        return self.gemma.pixel_values([decode(data, image, self.max_image_pixels)])


class LiveVision(LivePixels):
    """Gemma's vision features straight from the photographs: what stands in where they are not cached."""

    @torch.no_grad()
    def __call__(self, images: Sequence[str]) -> Tensor:
        """dtype[len(images), N, V]. Raises ImageError for a photograph that cannot be read or was changed."""
        return self.gemma.vision_features(super().__call__(images))


def in_cache(statements: list[Statement], rows: Rows, cache: str | Path) -> tuple[list[Statement], str]:
    """The statements whose image is in the cache, and a line that says how many of how many those are.

    Only images that extraction left out knowingly may be missing; StoreError for any other.
    """
    images = images_of(statements)
    missing = {image for image in images if image not in rows.reader}
    unknown = sorted(missing - read_failures(cache).keys())
    if unknown:
        raise StoreError(
            f"{cache}: {len(unknown)} of {len(images)} images that the statements name are not in "
            f"the cache, such as {unknown[0]}; run tools/extract_latents.py with the same --annotations"
        )
    kept = [s for s in statements if s.image not in missing]
    found = f"{len(images) - len(missing)} of {len(images)} images"
    note = f"{len(kept)} of {len(statements)} statements, {found}"
    return kept, note + (f" ({len(missing)} left out by --allow_missing)" if missing else "")


class LiveLatents:
    """Latents straight from the photographs, for evaluation without a cache."""

    def __init__(
        self, encoder: CosmosEncoder, image_folder: str | Path, size: int, max_image_pixels: int
    ) -> None:
        self.encoder = encoder
        self.image_folder = Path(image_folder)
        self.size = size
        self.max_image_pixels = max_image_pixels

    def __call__(self, images: Sequence[str]) -> Tensor:
        """dtype[len(images), C, H, W], each encoded by itself. Raises ImageError for an unreadable one."""
        rows = []
        for image in images:
            pixels = read_image(self.image_folder, image, max_pixels=self.max_image_pixels)
            rows.append(self.encoder.encode(latent_pixels(pixels, self.size)[None]))
        return torch.cat(rows)


def cached_vision(config: Config, cache: Path) -> Rows | None:
    """The cache's vision features, of a Gemma as it was published; None if it does not see or they are not there."""
    if not (cache / VISION).exists() or not is_multimodal(config.model_name):
        return None
    return Rows(cache / VISION, VISION, expected_vision(config))


def vision_for(
    gemma: Gemma,
    config: Config,
    cached: Fetch | None,
    notes: list[str],
    hashes: Mapping[str, str] | None = None,
) -> Fetch | None:
    """Where a Gemma's sight comes from: cached features, photographs through its tower or, if that trains, photographs
    alone; None for one that does not see. Adds a note where cached features are of no use. `hashes`: path -> SHA-256 of
    the photographs whose latents go with them.

    Raises ValueError if photographs are needed and `image_folder` is not set, StoreMismatch if cached features are
    another tower's.
    """
    if not gemma.is_multimodal:
        return None
    if isinstance(cached, Rows) and VISION_PART not in gemma.changed:
        if gemma.has_weights:
            check_same_eyes(gemma, cached)
        return cached
    if VISION_PART in gemma.changed:
        reason = "Gemma's vision tower is not as it was published, so cached features of it are of no use"
        note = f"photographs are read: {reason}"
        if isinstance(cached, Rows) and note not in notes:
            notes.append(note)
    else:
        reason = "the cache has no features of them"
    if config.image_folder is None:
        other = "" if gemma.changed else ", or extract them once with tools/extract_latents.py --gemma_vision"
        raise ValueError(f"this Gemma looks at the photographs: {reason}; give --image_folder{other}")
    kind = LivePixels if VISION_PART in gemma.trained else LiveVision
    return kind(gemma, config.image_folder, config.max_image_pixels, hashes)


def check_same_eyes(gemma: Gemma, vision: Rows) -> None:
    """StoreMismatch if cached features come from another tower. Cast weights have other bits, so towers are
    compared where they were loaded in the same dtype."""
    cached, own = vision.reader.fingerprint, gemma.vision_identity()
    if cached["compute_dtype"] == own["compute_dtype"]:
        check_meaning(vision.reader.root, {key: cached.get(key) for key in own}, own)
