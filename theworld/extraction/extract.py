"""Phase 1: photographs through a frozen encoder into a store, once, resumable.

    list ─> check ─> encode (see `pipeline`; `rollouts` for rollouts) ─> publish
    load the first encoder (beside the list)

The list has the photographs that statements name and that decode; the others are named with their reasons. While it is
made, the first encoder is loaded and compiled; nothing is encoded before all photographs are listed. Any number
of processes may share the work (`theworld.utils.distributed`): whichever finds all shards committed publishes. The same
extraction mends a damaged store (`theworld.store.writer`).
"""

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, TypeVar

import numpy as np

from theworld.config.cli import settings_as_flags
from theworld.config.config import Config
from theworld.data.square import Square
from theworld.data.vsr import images_of, load_all
from theworld.extraction.encoders import (
    RolloutEncoder,
    check_stores,
    open_store,
    specs_of,
)
from theworld.extraction.pipeline import Feed, encode_shards, feed
from theworld.extraction.reading import (
    SPOOL_MEMORY,
    ListPhotographs,
    Prepare,
    Source,
    Spool,
    in_processes,
    item_bytes,
    num_workers,
    workers_for,
)
from theworld.extraction.rollouts import refusals, roll_out
from theworld.models import world_encoder
from theworld.models.encoder import Encoder, EncoderSpec
from theworld.models.gemma_vision import VisionEncoder
from theworld.store.format import LATENTS, VISION, known_hashes, stores_of
from theworld.store.shard import ImageEntry
from theworld.store.verify import Problem, examine
from theworld.store.writer import Store
from theworld.utils.commands import PLACEHOLDER, SETTINGS, command, extraction
from theworld.utils.console import duration, progress
from theworld.utils.device import current_device, resolve_device
from theworld.utils.distributed import Part, this_part
from theworld.utils.files import (
    FAILURES,
    check_folder,
    check_room,
    free_bytes,
    make_folder,
    write_failures,
)
from theworld.utils.hub import locate
from theworld.utils.text import byte_size, counted

logger = logging.getLogger(__name__)

CHUNK = 32  # photographs in a task of the listing; this process, which loads an encoder meanwhile, hears of each task
T = TypeVar("T")


class Stopped(Exception):
    """The listing was asked to stop."""


class Listing(NamedTuple):
    """The photographs of an extraction, and those of them that need not be read again."""

    images: list[ImageEntry]
    spool: Spool


def freeze(
    paths: Sequence[str],
    source: Source,
    known: dict[str, str],
    spool: Spool | None = None,
    stop: Event | None = None,
) -> tuple[list[ImageEntry], list[tuple[str, str]]]:
    """Read every photograph and return those that decode with their hashes, sorted, and the others with the reason.

    A photograph of the same bytes as in `known` (path -> SHA-256) is not decoded again; what is decoded goes into the
    spool, which has as many places. Raises Stopped soon after `stop` is set.
    """
    ordered = sorted(paths)
    tasks = [
        (start, {path: known.get(path) for path in ordered[start : start + CHUNK]})
        for start in range(0, len(ordered), CHUNK)
    ]
    # One process beside this one, which only waits, would gain nothing.
    wanted = source.num_workers if source.num_workers > 1 else 0
    workers, _ = workers_for(len(ordered), len(tasks), wanted)
    images, failures = list[ImageEntry](), list[tuple[str, str]]()
    bar = progress(total=len(ordered), desc="reading photographs", unit=" images", leave=False)
    with bar, in_processes(ListPhotographs(source, spool), tasks, workers) as results:
        for found in results:
            if stop is not None and stop.is_set():
                raise Stopped
            images += found.images
            failures += found.failures
            for place, digest in found.spooled:
                assert spool is not None
                spool.note(place, digest)
            bar.update(len(found.images) + len(found.failures))
    return images, failures


def preflight(store: Store, encoder: Encoder, pending: list[int], batch_size: int, fed: Feed) -> str:
    """Return one line before the start: how many images, how large, how much room, about how long.

    Raises ValueError if the disk has not the room.
    """
    num_rows = sum(len(store.shard_rows(shard)) for shard in pending)
    size = encoder.spec.array.row_nbytes * num_rows
    work = amount(store.root, num_rows, len(store.rows), len(pending), store.num_shards, size)
    seconds = _seconds_an_image(encoder, batch_size, fed) * num_rows if num_rows else 0.0
    return f"{work}, about {duration(seconds)}"


def amount(root: Path, num_rows: int, all_rows: int, pending: int, all_shards: int, size: int) -> str:
    """Return what is still to be encoded into a store, in words (`size`: bytes). Raises ValueError without room."""
    free = check_room(root, size, "--cache")
    return (
        f"{root.name}: {num_rows:,} of {counted(all_rows, 'image')} to encode in {pending:,} of "
        f"{counted(all_shards, 'shard')}, {byte_size(size)} on disk ({byte_size(free)} free)"
    )


def _seconds_an_image(encoder: Encoder, batch_size: int, fed: Feed) -> float:
    """Return the seconds per image of reading (of the first batch) or encoding, whichever takes longer.

    Blank batches are encoded. An encoder that starts slowly is started first, on a batch as it will get them, so
    nothing is compiled twice. On a CPU one blank photograph is enough if a batch would take over a second.
    """
    encoding = _encoding_seconds(encoder, batch_size)
    first = fed.peek()  # reading processes have read it meanwhile
    return max(encoding, sum(first.seconds.values()) / first.num_photographs / max(1, fed.num_workers))


def _encoding_seconds(encoder: Encoder, batch_size: int) -> float:
    if not starts_slowly(encoder):
        alone = encode_blank(encoder, 1)
        if alone * 2 * batch_size > 1:
            return alone
    encode_blank(encoder, batch_size)
    return encode_blank(encoder, batch_size) / batch_size


def verify(cache: Path) -> list[Problem]:
    """Return the problems of the stores of a cache: none if every byte is as it was written."""
    stores = stores_of(cache)
    if not stores:
        message = f"{cache}: no store in it; make it with: {extraction(cache)}"
        return [Problem(message, (), damaged=False)]
    return [problem for root in stores for problem in examine(root)]


def photographs_command(config: Config) -> str:
    """Return the command that gets the photographs of the settings' statements into their image folder."""
    own = settings_as_flags(config, SETTINGS["get_images"])
    return command("get_images", *own, "--output", config.image_folder or PLACEHOLDER)


def extract(
    config: Config,
    cache: Path,
    with_vision: bool,
    allow_missing: bool,
    part: Part | None = None,
    guardrail: Any = None,
    others: Sequence[Config] = (),
) -> bool:
    """Run phase 1 as `tools/extract_latents.py` does: list, check, encode, publish.

    `part`: of independent tasks; `guardrail`: see `Rollout`; `others`: the settings of further world encoders, without
    predicted frames, whose stores are made in the same run: photographs are decoded once for all that take them alike.
    Returns whether all of the cache is there now, which it is not before the last task is done; of processes launched
    together only the main one returns True. Raises ValueError if photographs are missing or unreadable and
    `allow_missing` is not given: all of them are then in `failures.jsonl`, and nothing was encoded. Photographs are
    read in processes that import the main module: a script calls this under `if __name__ == "__main__":`.
    """
    part = this_part(part)
    config = replace(config, device=part.device(config.device))
    if any(other.num_world_steps for other in others):
        raise ValueError(
            "num_world_steps: predicted frames are extracted by themselves; wanted 0 in the others"
        )
    stored = [other for other in others if world_encoder.describe(other).stored]
    every = [config, *(replace(other, device=config.device) for other in stored)]

    def check_all() -> None:
        specs = [spec for one in every for spec in specs_of(one, with_vision)]
        check_start(config, cache, part, specs, guardrail)
        for one in every:
            check_stores(one, cache, with_vision)

    def check_all_models() -> None:
        for one in every:
            check_models(one, with_vision)

    def list_all(stop: Event) -> Listing:
        if part.is_main_process:
            return list_images(config, cache, source, allow_missing, part.count == 1, stop)
        stop.wait()  # the main process sends the list
        return Listing([], Spool(Square(config.latent_size)))

    def load_first(listing: Future[Listing]) -> Encoder | None:
        check_all_models()
        if config.num_world_steps or not encoders:
            return None
        (kind, own), *_ = encoders
        return load(kind, own, cache, lambda: not listing.done())

    part.broadcast_from_main(check_all)
    source, complete = source_of(config, part), True
    encoders = encoders_of(every, with_vision)
    with current_device(resolve_device(config.device)):
        images, spool, first = list_while_loading(part, list_all, load_first)
        if config.num_world_steps:
            rollouts = RolloutEncoder(config, guardrail)
            complete = roll_out(rollouts, cache, images, source, config, part, allow_missing)
            del rollouts  # the largest models of all
        for kind, own in encoders:
            if kind is VisionEncoder:
                spool.close()  # the vision tower takes photographs in another form
            encoder, first = first or kind(own), None
            complete = run(encoder, cache, images, source, own, part, spool) and complete
            del encoder  # before the next is loaded
    part.close()
    return complete and part.is_main_process


def encoders_of(every: Sequence[Config], with_vision: bool) -> list[tuple[type[Encoder], Config]]:
    """Return the classes of the encoders whose stores are made of photographs alone, in order, with their settings."""
    described = [(world_encoder.describe(one), one) for one in every]
    encoders = [
        (world_encoder.encoder_class(one), one)
        for spec, one in described
        if spec.stored and not one.num_world_steps
    ]
    if with_vision and VISION not in (spec.name for spec, _ in described):
        encoders.append((VisionEncoder, every[0]))
    return encoders


def list_while_loading(
    part: Part,
    list_all: Callable[[Event], Listing],
    load_first: Callable[[Future[Listing]], Encoder | None],
) -> tuple[list[ImageEntry], Spool, Encoder | None]:
    """Return the photographs, the spool and the first encoder. Of two errors, that of the listing is raised."""
    with beside(list_all) as listing:
        loaded = outcome_of(lambda: load_first(listing))
        images = part.broadcast_from_main(lambda: listing.result().images)
    part.broadcast_from_main(lambda: raise_error_of(loaded))
    return images, listing.result().spool, loaded.result()


@contextlib.contextmanager
def beside(work: Callable[[Event], T]) -> Iterator[Future[T]]:
    """Do some work in a thread beside the block, at whose end the event says that nobody waits for it any more."""
    stop = Event()
    with ThreadPoolExecutor(1) as thread:
        try:
            yield thread.submit(work, stop)
        finally:
            stop.set()


def outcome_of(work: Callable[[], T]) -> Future[T]:
    """Do some work now, and return its result or its error, which is raised when the result is asked for."""
    outcome = Future[T]()
    try:
        outcome.set_result(work())
    except (ValueError, OSError, RuntimeError) as error:
        outcome.set_exception(error)
    return outcome


def raise_error_of(outcome: Future[Any]) -> None:
    """Raise the error of some work, if there was one."""
    error = outcome.exception()
    if error is not None:
        raise error


def load(kind: type[Encoder], config: Config, cache: Path, time_left: Callable[[], bool]) -> Encoder:
    """Return an encoder with its weights; while there is time, one that starts slowly is started."""
    encoder = kind(config)
    complete = (cache / encoder.name / "manifest.json").exists()
    if starts_slowly(encoder) and not complete and time_left():
        encode_blank(encoder, min(config.encode_batch_size, config.shard_size))
    return encoder


def starts_slowly(encoder: Encoder) -> bool:
    """Whether the first batch of a size takes far longer than those after it."""
    return "compiled" in encoder.spec.fields or encoder.device.type == "cuda"


def encode_blank(encoder: Encoder, size: int) -> float:
    """Encode a blank batch and return the seconds that it took."""
    blank = encoder.prepare(np.zeros((16, 16, 3), np.uint8))[None].zero_()
    start = time.perf_counter()
    encoder.encode(blank.expand(size, *blank.shape[1:]).contiguous()).cpu()
    return time.perf_counter() - start


def check_start(
    config: Config, cache: Path, part: Part, specs: Sequence[EncoderSpec], guardrail: Any = None
) -> Source:
    """Return where the photographs are read from. `specs`: of the stores that are to be there.

    Raises ValueError or OSError for what stops an extraction before it reads any: no folder of photographs, device or
    video model, or a cache that cannot be written and lacks one of the stores.
    """
    source = source_of(config, part)
    resolve_device(config.device)
    if not all((cache / spec.name / "manifest.json").exists() for spec in specs):
        check_folder(cache, "--cache")
    if config.num_world_steps:
        from theworld.models.rollout import check_rollout  # which loads diffusers

        check_rollout(config, guardrail)
    return source


def check_models(config: Config, with_vision: bool) -> None:
    """Raise ValueError if one of the encoders cannot be loaded, before the first has worked for hours."""
    for spec in specs_of(config, with_vision):
        if spec.weights is not None:
            locate(spec.weights.model, spec.weights.file)


def source_of(config: Config, part: Part) -> Source:
    """Return where the photographs are read from. Raises ValueError if the settings name no folder."""
    if config.image_folder is None:
        raise ValueError("image_folder is not set: give --image_folder, the folder with the COCO photographs")
    workers = num_workers(config.num_workers, part.local_count)
    source = Source(Path(config.image_folder), config.max_image_pixels, workers, config.follow_links)
    if not source.folder.is_dir():
        raise ValueError(
            f"image_folder {source.folder}: not a folder; say where the photographs are with --image_folder, or get "
            f"them with: {photographs_command(config)}"
        )
    return source


def list_images(
    config: Config,
    cache: Path,
    source: Source,
    allow_missing: bool,
    spooled: bool = False,
    stop: Event | None = None,
) -> Listing:
    """Return the readable photographs that statements name; the others are in `failures.jsonl`. Raises as `extract`.

    `spooled`: what is decoded is kept, if there is room for all. Raises Stopped soon after `stop` is set.
    """
    splits = load_all(config.annotations, config.dataset_name)
    names = images_of([statement for own in splits.values() for statement in own])
    if len(splits) < 3:
        logger.info("%s: no other statements than those of %s", config.annotations, " and ".join(splits))
    make_folder(cache)
    prepare = Square(config.latent_size)
    kept = spooled and has_room(prepare, config, len(names))
    spool = Spool(prepare, len(names) if kept else 0)
    images, failures = freeze(names, source, known_hashes(cache), spool if kept else None, stop)
    refused = refusals(cache / LATENTS)
    predicted = [(image.path, refused[image.sha256]) for image in images if image.sha256 in refused]
    write_failures(cache, sorted(failures + predicted))
    note = check_readable(failures, len(names), allow_missing, f"All are listed in {cache / FAILURES}. ")
    if note:
        logger.info(note)
    return Listing(images, spool)


def has_room(prepare: Prepare, config: Config, num_images: int) -> bool:
    """Whether a spool serves this extraction, and leaves half of the free room for temporary files to others."""
    size, free = item_bytes(prepare) * num_images, free_bytes(Path(tempfile.gettempdir()))
    return not config.num_world_steps and (size <= SPOOL_MEMORY or 2 * size <= free)


def check_readable(
    failures: list[tuple[str, str]], total: int, allow_missing: bool | None, listed: str = ""
) -> str:
    """Return a line that says how many of `total` photographs are left out; nothing if none is.

    Raises ValueError with the first (path, reason) of `failures` unless `allow_missing`, or if none would be left.
    `allow_missing`: None for a tool without this flag.
    """
    if not failures:
        return ""
    if allow_missing and len(failures) < total:
        there = total - len(failures)
        return f"{there:,} of {counted(total, 'photograph')}; {len(failures):,} left out by --allow_missing"
    some = "\n".join(f"  {path}: {reason}" for path, reason in failures[:5])
    hints = {
        True: "--allow_missing leaves none; check --image_folder",
        False: "Mend them, or go on without them with --allow_missing",
        None: "Mend them, or name another --image_folder",
    }
    raise ValueError(
        f"{len(failures):,} of {counted(total, 'photograph')} cannot be read:\n{some}\n{listed}{hints[allow_missing]}"
    )


def run(
    encoder: Encoder,
    cache: Path,
    images: list[ImageEntry],
    source: Source,
    config: Config,
    part: Part,
    spool: Spool,
) -> bool:
    """Commit this part's shards of one store, whatever state they are in, and publish the store if all are there.

    Returns whether all shards are there. `spool`: photographs that need not be read again.
    """
    if spool.prepare != encoder.prepare:  # the listing keeps them in another form than the encoder takes
        spool = Spool(encoder.prepare)
    with part.main_process_first():
        store = open_store(cache, encoder.spec, images, config.shard_size)
    own = [shard for shard in range(store.num_shards) if part.owns(shard)]
    # A batch is filled up to its size, and none has more photographs than the first shard, the largest.
    batch_size = min(config.encode_batch_size, len(store.shard_rows(0)))
    pending = store.pending(own)
    level = part.log_level
    if pending and len(pending) < len(own):
        logger.log(level, "resuming: %d of %d shards valid", len(own) - len(pending), len(own))
    with feed(store, encoder, pending, source, batch_size, spool) as fed:
        logger.log(level, preflight(store, encoder, pending, batch_size, fed))
        if pending:
            encode_shards(store, encoder, pending, fed, not part.is_main_process)
    part.barrier()
    missing = store.missing()
    if missing:
        logger.log(
            level,
            f"{encoder.spec.name}: {len(missing):,} of {counted(store.num_shards, 'shard')} still missing: those of "
            "other parts. Whichever part finishes last completes the store",
        )
    elif part.is_main_process and not store.is_complete:
        store.publish()  # which reads every byte of all of them
    return not missing
