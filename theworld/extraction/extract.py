"""Phase 1: photographs through a frozen encoder into a store, once, resumable. It serves both encoders.

    list ─> check ─> encode (see `pipeline`; `rollouts` for rollouts) ─> publish

Any number of processes may share the work (`theworld.utils.distributed`); whoever finds all shards committed publishes.

Which photographs phase 1 encodes: those that statements name and that can be read; the others by name and reason.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from theworld.config.config import Config
from theworld.data.images import ImageError, decode, read_bytes, sha256
from theworld.data.vsr import images_of, load_all
from theworld.extraction.encoders import (
    RolloutEncoder,
    VisionEncoder,
    check_stores,
    open_store,
    specs_of,
)
from theworld.extraction.pipeline import (
    Batches,
    Source,
    batches_of,
    encode_shards,
    in_processes,
    num_workers,
    workers_for,
)
from theworld.extraction.rollouts import refusals, roll_out
from theworld.models import world_encoder
from theworld.models.encoder import Encoder
from theworld.models.rollout import check_rollout
from theworld.store.format import LATENTS, VISION
from theworld.store.shard import ImageEntry
from theworld.store.verify import Problem, examine
from theworld.store.writer import Store
from theworld.utils.console import duration, progress
from theworld.utils.device import resolve_device
from theworld.utils.distributed import Part, this_part
from theworld.utils.files import FAILURES, StoreError, check_room, make_folder, write_failures
from theworld.utils.hub import locate

CHUNK = 16  # photographs that a process looks at before it answers

Look = ImageEntry | tuple[str, str]  # a readable photograph, or the path and reason of another


class Looks(Dataset[list[Look]]):
    """Item n is what was found at the n-th `CHUNK` paths."""

    def __init__(self, paths: Sequence[str], source: Source, known: dict[str, str]) -> None:
        self.paths = paths
        self.source = source
        self.known = known

    def __len__(self) -> int:
        return -(-len(self.paths) // CHUNK)

    def __getitem__(self, number: int) -> list[Look]:
        return [self._look(path) for path in self.paths[number * CHUNK : (number + 1) * CHUNK]]

    def _look(self, path: str) -> Look:
        try:
            data = read_bytes(self.source.folder, path)
            digest = sha256(data)
            if self.known.get(path) != digest:
                decode(data, path, max_pixels=self.source.max_image_pixels)
        except ImageError as error:
            return path, error.reason
        return ImageEntry(path, digest)


def freeze(
    paths: Sequence[str], source: Source, known: dict[str, str]
) -> tuple[list[ImageEntry], list[tuple[str, str]]]:
    """Reads every photograph: (the readable ones with their hashes, sorted; the others with the reason).

    A photograph is decoded before it counts, except where `known` (path -> SHA-256) has seen the same bytes.
    """
    looks = Looks(sorted(paths), source, known)
    # One process beside this one, which only waits, would gain nothing.
    workers = workers_for(len(paths), len(looks), source.num_workers)[0] if source.num_workers > 1 else 0
    looked: list[Look] = []
    bar = progress(total=len(paths), desc="reading photographs", unit=" images", leave=False)
    with bar, in_processes(looks, workers) as chunks:
        for found in chunks:
            looked += found
            bar.update(len(found))
    entries = [x for x in looked if isinstance(x, ImageEntry)]
    return entries, [x for x in looked if not isinstance(x, ImageEntry)]


def known_hashes(cache: Path) -> dict[str, str]:
    """path -> SHA-256 of photographs that an earlier run on this cache has decoded. StoreError if damaged."""
    known: dict[str, str] = {}
    for root in stores_of(cache):
        path = root / "images.jsonl"
        if path.is_file():
            try:
                rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                known |= {row["path"]: row["sha256"] for row in rows}
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise StoreError(
                    f"{path} is damaged: {error!r:.200}; mend it with tools/extract_latents.py --repair, or move "
                    f"{path.parent} away and extract again"
                ) from None
    return known


def preflight(store: Store, encoder: Encoder, pending: list[int], source: Source, batch_size: int) -> str:
    """One line before the start: how many images, how large, how much room, about how long.

    Raises ValueError where the disk has not the room.
    """
    rows = [row for shard in pending for row in store.shard_rows(shard)]
    size = encoder.spec.array.row_nbytes * len(rows)
    work = amount(store.root, len(rows), len(store.rows), len(pending), store.num_shards, size)
    seconds = _seconds_an_image(store, encoder, pending, source, batch_size) * len(rows) if rows else 0.0
    return f"{work}, about {duration(seconds)}"


def amount(root: Path, num_rows: int, all_rows: int, pending: int, all_shards: int, size: int) -> str:
    """What is still to be encoded into a store, and its size in bytes. ValueError where the disk has not the room."""
    free = check_room(root, size, "--cache")
    return (
        f"{root.name}: {num_rows:,} of {all_rows:,} images to encode in {pending} of {all_shards} shards, "
        f"{size / 2**20:,.1f} MiB on disk ({free / 2**30:,.1f} GiB free)"
    )


def _seconds_an_image(
    store: Store, encoder: Encoder, pending: list[int], source: Source, batch_size: int
) -> float:
    """Of the slower of the two that go on at the same time: reading, measured on the first photograph, and encoding,
    measured on a blank batch. An encoder that starts slowly is started first, on a batch as it will get them, so
    nothing is compiled twice. On a CPU one blank photograph is enough where a batch would take more than a second.
    """
    batch = Batches([batches_of(store, pending, 1)[0]], source, encoder.prepare, 1)[0]
    if batch.pixels is None:
        return 0.0  # the run is about to say why
    reading = sum(batch.seconds.values()) / max(1, source.num_workers)

    def encoding_seconds(size: int) -> float:
        start = time.perf_counter()
        encoder.encode(blank.expand(size, *blank.shape[1:]).contiguous()).cpu()
        return (time.perf_counter() - start) / size

    blank = torch.zeros_like(batch.pixels)
    starts_slowly = "compiled" in encoder.spec.fields or encoder.device.type == "cuda"
    if not starts_slowly:
        alone = encoding_seconds(1)
        if alone * 2 * batch_size > 1:
            return max(reading, alone)
    encoding_seconds(batch_size)
    return max(reading, encoding_seconds(batch_size))


def stores_of(cache: Path) -> list[Path]:
    """Return the folders of the stores that are in a cache, that of the latents first."""
    known = [cache / name for name in (LATENTS, VISION) if (cache / name).exists()]
    others = sorted(path.parent for path in cache.glob("*/store.json"))
    return known + [root for root in others if root not in known]


def verify(cache: Path) -> list[Problem]:
    """What is wrong with the stores of a cache; empty when every byte reads back as it was written."""
    stores = stores_of(cache)
    if not stores:
        return [Problem(f"{cache}: no store in it; run tools/extract_latents.py first", (), damaged=False)]
    return [problem for root in stores for problem in examine(root)]


def extract(
    config: Config,
    cache: Path,
    with_vision: bool,
    allow_missing: bool,
    part: Part | None = None,
    guardrail: Any = None,
) -> bool:
    """Phase 1 as `tools/extract_latents.py` runs it: list, check, encode, publish. `part`: of independent tasks.
    `guardrail`: see `Rollout`.

    Returns whether all of the cache is there now, which it is not before the last task is done, and False in the
    processes of one run that leave the last word to the first. Raises ValueError if photographs are missing or
    unreadable and `allow_missing` is not given: all of them are then in `failures.jsonl`, and nothing was encoded.
    """
    part = this_part(part)
    config = replace(config, device=part.device(config.device))

    def look() -> list[ImageEntry]:
        source = source_of(config, part)
        check_stores(config, cache, with_vision)
        if config.num_world_steps:
            check_rollout(config, guardrail)
        return list_images(config, cache, source, allow_missing)

    images = part.broadcast_from_main(look)
    part.broadcast_from_main(lambda: check_models(config, with_vision))
    source, device = source_of(config, part), resolve_device(config.device)
    if device.index is not None:
        torch.cuda.set_device(device)  # pinned memory and events are those of the current one
    if config.num_world_steps:
        rollouts = RolloutEncoder(config, guardrail)
        complete = roll_out(rollouts, cache, images, source, config, part, allow_missing)
        del rollouts  # the largest models of all
    else:
        complete = run(world_encoder.encoder_class(config)(config), cache, images, source, config, part)
    if with_vision:
        complete = run(VisionEncoder(config), cache, images, source, config, part) and complete
    part.close()
    return complete and part.is_main_process


def check_models(config: Config, with_vision: bool) -> None:
    """Raise ValueError where one of the encoders cannot be loaded, before the first has worked for hours."""
    for spec in specs_of(config, with_vision):
        if spec.weights is not None:
            locate(spec.weights.model, spec.weights.file)


def source_of(config: Config, part: Part) -> Source:
    """Where the photographs are read from. Raises ValueError where the settings name no folder."""
    if config.image_folder is None:
        raise ValueError("image_folder is not set: give --image_folder, the folder with the COCO photographs")
    workers = num_workers(config.num_workers, part.local_count)
    source = Source(Path(config.image_folder), config.max_image_pixels, workers)
    if not source.folder.is_dir():
        raise ValueError(
            f"image_folder {source.folder}: not a folder; get the photographs with tools/get_images.py, or say where "
            "they are with --image_folder"
        )
    return source


def list_images(config: Config, cache: Path, source: Source, allow_missing: bool) -> list[ImageEntry]:
    """The readable photographs that statements name; the others are in `failures.jsonl`. Raises as `extract`."""
    splits = load_all(config.annotations, config.dataset_name)
    names = images_of([statement for own in splits.values() for statement in own])
    if len(splits) < 3:
        tqdm.write(f"{config.annotations}: no other statements than those of {' and '.join(splits)}")
    make_folder(cache)
    images, failures = freeze(names, source, known_hashes(cache))
    refused = refusals(cache / LATENTS)
    predicted = [(image.path, refused[image.sha256]) for image in images if image.sha256 in refused]
    write_failures(cache, sorted(failures + predicted))
    note = check_readable(failures, len(names), allow_missing, f"All are listed in {cache / FAILURES}. ")
    if note:
        tqdm.write(note)
    return images


def check_readable(failures: list[tuple[str, str]], total: int, allow_missing: bool, listed: str = "") -> str:
    """A line that says how many of `total` photographs are left out; nothing where none is.

    Raises ValueError with the first (path, reason) of `failures` unless `allow_missing`, or if none would be left.
    """
    if not failures:
        return ""
    if allow_missing and len(failures) < total:
        there = total - len(failures)
        return f"{there:,} of {total:,} photographs; {len(failures):,} left out by --allow_missing"
    some = "\n".join(f"  {path}: {reason}" for path, reason in failures[:5])
    cure = "Mend them, or go on without them with --allow_missing"
    if allow_missing:
        cure = "--allow_missing leaves none; check --image_folder"
    raise ValueError(f"{len(failures):,} of {total:,} photographs cannot be read:\n{some}\n{listed}{cure}")


def run(
    encoder: Encoder, cache: Path, images: list[ImageEntry], source: Source, config: Config, part: Part
) -> bool:
    """Brings this part's shards of one encoding's store from whatever state they are in to commitment, and the
    store to its manifest if all shards are there. Returns whether they are."""
    with part.main_process_first():
        store = open_store(cache, encoder.spec, images, config.shard_size)
    own = [shard for shard in range(store.num_shards) if part.owns(shard)]
    pending = store.pending(own)
    say = tqdm.write if part.is_main_process else _say_nothing
    for note in store.notes:
        say(note)
    if pending and len(pending) < len(own):
        say(f"resuming: {len(own) - len(pending)} of {len(own)} shards valid")
    say(preflight(store, encoder, pending, source, config.encode_batch_size))
    if pending:
        encode_shards(store, encoder, pending, source, config.encode_batch_size, not part.is_main_process)
    part.barrier()
    missing = store.missing()
    if missing:
        say(
            f"{encoder.spec.name}: {len(missing):,} of {store.num_shards:,} shards are still missing: those of other "
            "parts. Whichever part finishes last completes the store"
        )
    elif part.is_main_process and not store.is_complete:
        store.publish()  # which reads every byte of all of them
    return not missing


def _say_nothing(_: str) -> None:
    pass
