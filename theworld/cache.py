"""A cache folder as the training and evaluation loops see it: images in, tensors out.

cache/latents/         the Cosmos latents, one float[C, H, W] an image; float[1 + n, C, H, W] with n predicted moments
cache/gemma_vision/    optional: Gemma's own pooled SigLIP features, one float[N, V] an image
cache/failures.jsonl   images that statements name but that could not be read, with the reason
"""

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from theworld.config import Config
from theworld.gemma import Gemma
from theworld.images import PREPROCESSING, ImageError, decode, read_bytes, sha256, square, to_unit_range
from theworld.store import StoreError, StoreMismatch, StoreReader, fingerprint_differences
from theworld.vsr import Statement, images_of
from theworld.weights import model_id

LATENTS, VISION, FAILURES = "latents", "gemma_vision", "failures.jsonl"


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor as the store takes it: bfloat16, which NumPy does not have, as the uint16 of the same bits."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def as_tensor(array: np.ndarray) -> Tensor:
    """The inverse of `to_numpy`: the same memory, which has to be writable."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def latent_pixels(pixels: np.ndarray, size: int) -> Tensor:
    """uint8[H, W, 3] -> float32[3, size, size] in [-1, 1]: a photograph as the VAE takes it."""
    return torch.from_numpy(to_unit_range(square(pixels, size)))


_PREPROCESSING = {f"preprocessing_{key}": value for key, value in PREPROCESSING.items()}


def expected_latents(config: Config) -> dict[str, Any]:
    """The fields of a latents fingerprint that follow from a run's settings."""
    expected: dict[str, Any] = {
        "cosmos_model_name": model_id(config.cosmos_model_name),
        "latent_size": config.latent_size,
        "num_world_steps": config.num_world_steps,
        "posterior": "mean",
        **_PREPROCESSING,
        **config.rollout_settings,
    }
    return expected | ({"storage_dtype": config.latent_dtype} if config.latent_dtype else {})


def expected_vision(config: Config) -> dict[str, Any]:
    """The fields of a vision fingerprint that follow from a run's settings."""
    return {"model_name": model_id(config.model_name), **_PREPROCESSING}


# Fields of a fingerprint that say how exactly a number was computed, not what it means.
_PRECISION = {
    "arithmetic",
    "compute_dtype",
    "compiled",
    "storage_dtype",
    "encode_batch_size",
    "torch",
    "diffusers",
    "transformers",
    "cosmos_guardrail",
    "pillow",
}


def meaning(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The part of a fingerprint in which two caches must agree to serve one projection."""
    return {key: value for key, value in fingerprint.items() if key not in _PRECISION}


def check_meaning(root: Path, cached: dict[str, Any], wanted: dict[str, Any]) -> None:
    """StoreMismatch, field by field, unless two fingerprints of latents can serve one projection."""
    differences = fingerprint_differences(meaning(cached), meaning(wanted))
    if differences:
        raise StoreMismatch(root, differences)


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

    def preload(self, images: Iterable[str], num_threads: int = 4) -> int:
        """Reads the rows of these images in file order, as fast as it goes, checked as ever: how many of them are in
        memory then. 0 where they do not fit; rows without a place are read each time they are asked for.

        Calls meanwhile, from other threads, read for themselves what is not there yet, so this can run in a daemon
        thread beside the first steps. Raises StoreError or OSError for the first row that cannot be read.
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
                if errors:
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


def read_failures(cache: str | Path) -> dict[str, str]:
    """path -> reason of the images that were left out of this cache, knowingly, with --allow_missing."""
    path = Path(cache) / FAILURES
    if not path.is_file():
        return {}
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        reasons = {row["path"]: row["reason"] for row in rows}
        if not all(isinstance(text, str) for pair in reasons.items() for text in pair):
            raise TypeError("path and reason are strings")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(
            f"{path} is damaged: {error!r:.200}; run tools/extract_latents.py with --allow_missing again"
        ) from None
    return reasons


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
