"""Phase 1: photographs through a frozen encoder into a store, once, resumable. It serves both encoders.

    read ─> decode ─> encode ─> write      read and decode in threads ahead of the encoder, write behind it

What a shard holds depends on the frozen image list alone, and the batches inside it on nothing but the shard,
so any run, however often interrupted, gives the same files.
"""

import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from theworld.cache import FAILURES, LATENTS, VISION, to_numpy
from theworld.config import Config
from theworld.console import progress
from theworld.encodings import Encoding, LatentEncoding, VisionEncoding
from theworld.gemma import Gemma
from theworld.images import PREPROCESSING, ImageError, decode, read_bytes, sha256
from theworld.listing import Source, freeze, known_hashes, write_failures
from theworld.store import ArraySpec, ImageEntry, Store, verify_store
from theworld.vae import CosmosEncoder
from theworld.vsr import images_of, load_statements
from theworld.weights import resolve_device, resolve_dtype

AHEAD = 4  # batches that are read and decoded ahead of the encoder


@dataclass
class Stages:
    """Seconds of work in each stage; read and decode are shared by several threads."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("read", "decode", "encode", "write"), 0.0)
    )
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time the block takes to `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self.lock:
                self.seconds[stage] += time.perf_counter() - start

    def bound(self, num_workers: int) -> str:
        """The stage that the others wait for."""
        shared = {"read": num_workers, "decode": num_workers}
        return max(self.seconds, key=lambda s: self.seconds[s] / max(1, shared.get(s, 1)))


def open_store(
    cache: Path, encoding: Encoding, images: list[ImageEntry], shard_size: int, batch_size: int
) -> Store:
    """The store of one encoding in the cache, new or to be resumed; StoreMismatch where it is another one."""
    fingerprint = {
        **encoding.fingerprint(),
        **{f"preprocessing_{k}": v for k, v in PREPROCESSING.items()},
        "storage_dtype": encoding.arrays[0].dtype,
        "encode_batch_size": batch_size,
    }
    return Store.create(cache / encoding.name, fingerprint, images, encoding.arrays, shard_size)


def preflight(store: Store, encoding: Encoding, pending: list[int], source: Source, batch_size: int) -> str:
    """One line before the start: how many images, how large, how much room, about how long.

    Raises ValueError where the disk has not the room.
    """
    rows = [row for shard in pending for row in store.shard_rows(shard)]
    size = sum(_row_bytes(spec) for spec in encoding.arrays) * len(rows)
    free = shutil.disk_usage(store.root).free
    if size > free:
        raise ValueError(
            f"{store.root}: {size:,} bytes are needed and {free:,} are free; make room or move --cache"
        )
    seconds = _seconds_an_image(rows[:batch_size], encoding, source) * len(rows) if rows else 0.0
    return (
        f"{encoding.name}: {len(rows):,} of {len(store.rows):,} images to encode in {len(pending)} of "
        f"{store.num_shards} shards, {size / 2**20:,.1f} MiB on disk ({free / 2**30:,.1f} GiB free), "
        f"about {_duration(seconds)}"
    )


def _seconds_an_image(rows: Sequence[ImageEntry], encoding: Encoding, source: Source) -> float:
    """Measured on the first batch, the second time around since the first one pays for starting up; on its first
    photograph alone where even that takes more than a second."""

    def timed(chosen: Sequence[ImageEntry]) -> float:
        start = time.perf_counter()
        encoding.encode([encoding.prepare(_pixels(row, source, Stages())) for row in chosen])
        return (time.perf_counter() - start) / len(chosen)

    alone = timed(rows[:1])
    if alone > 1:
        return alone
    timed(rows)
    return timed(rows)


def encode_shards(
    store: Store,
    encoding: Encoding,
    pending: list[int],
    source: Source,
    batch_size: int,
    log: Callable[[str], None] = tqdm.write,
) -> None:
    """Encodes and commits the pending shards. Raises ImageError if a photograph changed since it was listed."""
    stages = Stages()
    total = sum(len(store.shard_rows(shard)) for shard in pending)
    workers = max(1, source.num_workers)
    bar = progress(total=total, desc=encoding.name, unit=" images", smoothing=0.1)
    with bar, ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        for shard in pending:
            batches = _prepared(store.shard_rows(shard), encoding, source, batch_size, readers, stages)
            encoded: list[np.ndarray] = []
            for batch in batches:
                with stages.timed("encode"):
                    encoded.append(to_numpy(encoding.encode(batch)))
                bar.set_postfix_str(f"bound by {stages.bound(workers)}", refresh=False)
                bar.update(len(batch))
            if written is not None:
                written.result()  # an error of the write before this one
            written = writer.submit(
                _write, store, shard, {encoding.arrays[0].name: np.concatenate(encoded)}, stages
            )
        if written is not None:
            written.result()
    rate = total / max(bar.format_dict["elapsed"], 1e-9)
    log(f"{encoding.name}: {total:,} images, {rate:,.1f} images/s, bound by {stages.bound(workers)}")


def _write(store: Store, shard: int, arrays: dict[str, np.ndarray], stages: Stages) -> None:
    with stages.timed("write"):
        store.write_shard(shard, arrays)


def _prepared(
    rows: Sequence[ImageEntry],
    encoding: Encoding,
    source: Source,
    batch_size: int,
    readers: ThreadPoolExecutor,
    stages: Stages,
) -> Iterator[list[Tensor]]:
    """The shard's photographs, prepared, in batches of fixed membership; a few batches ahead."""

    def prepare(row: ImageEntry) -> Tensor:
        return encoding.prepare(_pixels(row, source, stages))

    waiting = iter(rows)
    ahead = deque(readers.submit(prepare, row) for row in islice(waiting, (AHEAD + 1) * batch_size))
    while ahead:
        batch = [ahead.popleft().result() for _ in range(min(batch_size, len(ahead)))]
        ahead.extend(readers.submit(prepare, row) for row in islice(waiting, batch_size))
        yield batch


def _pixels(row: ImageEntry, source: Source, stages: Stages) -> np.ndarray:
    with stages.timed("read"):
        data = read_bytes(source.folder, row.path)
    with stages.timed("decode"):
        digest = sha256(data)
        if digest != row.sha256:
            raise ImageError(
                row.path, f"changed while extracting: SHA-256 was {row.sha256}, is {digest}; run again"
            )
        return decode(data, row.path, max_pixels=source.max_image_pixels)


def _row_bytes(spec: ArraySpec) -> int:
    return int(np.prod(spec.shape)) * (4 if spec.dtype == "float32" else 2)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    )


def verify(cache: Path) -> list[str]:
    """What is wrong with the stores of a cache; empty when every byte reads back as it was written."""
    problems: list[str] = []
    stores = [cache / name for name in (LATENTS, VISION) if (cache / name).exists()]
    if not stores:
        return [f"{cache}: no store in it; run tools/extract_latents.py first"]
    for root in stores:
        problems += verify_store(root)
    return problems


def extract(config: Config, cache: Path, with_vision: bool, allow_missing: bool) -> None:
    """Phase 1 as `tools/extract_latents.py` runs it: list, check, encode, publish.

    Raises ValueError if photographs are missing or unreadable and `allow_missing` is not given: all of them are
    then in `failures.jsonl`, and nothing was encoded.
    """
    if config.image_folder is None:
        raise ValueError("image_folder is not set: give --image_folder, the folder with the COCO photographs")
    workers = config.num_workers if config.num_workers is not None else len(os.sched_getaffinity(0))
    source = Source(Path(config.image_folder), config.max_image_pixels, workers)
    if not source.folder.is_dir():
        raise ValueError(f"image_folder {source.folder}: not a folder")
    splits = ("train", "dev", "test")
    paths = images_of(
        [s for x in splits for s in load_statements(config.annotations, x, config.dataset_name)]
    )
    cache.mkdir(parents=True, exist_ok=True)
    images, failures = freeze(paths, source, known_hashes(cache))
    write_failures(cache, failures)
    if failures and not (allow_missing and images):
        some = "\n".join(f"  {path}: {reason}" for path, reason in failures[:5])
        raise ValueError(
            f"{len(failures):,} of {len(paths):,} photographs cannot be read:\n{some}\n"
            f"All are listed in {cache / FAILURES}. Mend them, or go on without them with --allow_missing"
        )
    if failures:
        tqdm.write(
            f"{len(images):,} of {len(paths):,} photographs; {len(failures):,} left out by --allow_missing"
        )
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    encoder = CosmosEncoder(config.cosmos_model_name, dtype, device)
    run(LatentEncoding(encoder, config.latent_size, config.latent_dtype), cache, images, source, config)
    if with_vision:
        run(VisionEncoding(Gemma(config.model_name, dtype, device)), cache, images, source, config)


def run(encoding: Encoding, cache: Path, images: list[ImageEntry], source: Source, config: Config) -> None:
    """Brings one encoding's store from whatever state it is in to its manifest."""
    store = open_store(cache, encoding, images, config.shard_size, config.encode_batch_size)
    pending = store.pending()
    for note in store.notes:
        tqdm.write(note)
    if pending and len(pending) < store.num_shards:
        tqdm.write(f"resuming: {store.num_shards - len(pending)} of {store.num_shards} shards valid")
    tqdm.write(preflight(store, encoding, pending, source, config.encode_batch_size))
    if pending:
        encode_shards(store, encoding, pending, source, config.encode_batch_size)
    if not store.is_complete:
        store.publish()
