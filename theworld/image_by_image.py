"""Phase 1 where an image takes minutes: one after the other, each durable as soon as it is there.

    list ─> predict ─> publish its row ─> ... ─> all rows are there: shards, manifest ─> remove the rows

Killing it at any moment loses the image in work and no other. Rows stay until the manifest names their shards: a list
that changes (a photograph is mended, the guardrail refuses one) moves rows between shards, and costs nothing. Which
part of several rolls out a photograph is a function of its SHA-256 alone, so parts may start at any time, with any
list.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from theworld.cache import FAILURES, LATENTS, read_failures, to_numpy
from theworld.config import Config
from theworld.console import duration, progress
from theworld.encodings import RolloutEncoding, full_fingerprint, open_store
from theworld.files import canonical_sha256
from theworld.finished import FinishedRows
from theworld.listing import write_failures
from theworld.parts import Part
from theworld.reading import Source, read_photograph
from theworld.rollout import FramesRefused
from theworld.store import ImageEntry, Store, StoreError

DAY = 24 * 3600  # seconds; what takes longer is better shared


def roll_out(
    encoding: RolloutEncoding,
    cache: Path,
    images: list[ImageEntry],
    source: Source,
    config: Config,
    part: Part,
    allow_missing: bool,
) -> bool:
    """Rolls out this part's photographs that are not yet, and completes the store if all are there. Returns whether
    it is complete.

    Raises ValueError if the guardrail refused what was predicted from some of them and `allow_missing` is not given:
    they are then in `failures.jsonl`, and the others stay finished. Raises ImageError if a photograph changed since
    it was listed, StoreMismatch for a store of something else.
    """
    job = Job(encoding, cache, images, config, part)
    todo = job.begin()
    roll_out_each(encoding, job.finished, todo, source, quiet=not part.speaks)
    part.wait()
    return part.from_first(lambda: job.complete(allow_missing))


class Job:
    """All photographs of a store on their way into it, of which this process has a part."""

    def __init__(
        self, encoding: RolloutEncoding, cache: Path, images: list[ImageEntry], config: Config, part: Part
    ) -> None:
        self.encoding, self.cache, self.images, self.config, self.part = encoding, cache, images, config, part
        self.say: Callable[[str], None] = tqdm.write if part.speaks else _say_nothing
        fingerprint_sha256 = canonical_sha256(full_fingerprint(encoding, config.encode_batch_size))
        self.finished = FinishedRows(cache / LATENTS, fingerprint_sha256, encoding.arrays[0])

    def open(self) -> tuple[Store, list[ImageEntry]]:
        """The store of all that is not refused, and the rows of it that no valid shard holds."""
        kept = [image for image in self.images if self.finished.refusal(image.sha256) is None]
        if not kept:
            raise ValueError(
                f"the guardrail refuses what was predicted from all {len(self.images)} photographs"
            )
        config = self.config
        store = open_store(self.cache, self.encoding, kept, config.shard_size, config.encode_batch_size)
        for note in store.notes:
            self.say(note)
        return store, [row for shard in store.pending() for row in store.shard_rows(shard)]

    def begin(self) -> list[ImageEntry]:
        """What this part has to roll out, after a preflight of it."""
        part, finished = self.part, self.finished
        with part.first_goes_first():
            store, rows = self.open()
        own = [row for row in rows if int(row.sha256[:12], 16) % part.count == part.index]
        todo = [row for row in own if finished.read(row.sha256) is None]
        for note in finished.notes:
            self.say(note)
        if len(todo) < len(own):
            self.say(f"resuming: {len(own) - len(todo):,} of {len(own):,} photographs rolled out")
        if part.speaks:
            missing = len(finished.missing(row.sha256 for row in rows))
            num_todo = missing if part.together else len(todo)
            self.say(preflight(self.encoding, store, len(rows) + missing, num_todo, part))
        return todo

    def complete(self, allow_missing: bool) -> bool:
        """Gathers and publishes the store if all parts are done: whether they are. Raises as `roll_out`."""
        refused = {i.path: reason for i in self.images if (reason := self.finished.refusal(i.sha256))}
        if refused:
            write_failures(self.cache, sorted({**read_failures(self.cache), **refused}.items()))
        store, rows = self.open()
        missing = self.finished.missing(row.sha256 for row in rows)
        if missing:
            self.say(
                f"{LATENTS}: {len(missing):,} of {store.plan.num_rows:,} photographs are still missing: those of other "
                "parts. Whichever part finishes last completes the store"
            )
            return False
        if refused and not allow_missing:
            some = "\n".join(f"  {path}: {reason}" for path, reason in list(refused.items())[:5])
            raise ValueError(
                f"{len(refused):,} of {len(self.images):,} photographs have no rollout:\n{some}\nAll are listed in "
                f"{self.cache / FAILURES}, and the others are finished. Go on without them with --allow_missing"
            )
        gather(store, self.finished)
        return True


def roll_out_each(
    encoding: RolloutEncoding, finished: FinishedRows, todo: Sequence[ImageEntry], source: Source, quiet: bool
) -> None:
    """Publishes a row, or the guardrail's refusal, for each of these photographs."""
    for row in progress(todo, total=len(todo), desc="roll out", unit=" images", disable=quiet or not todo):
        if not finished.missing([row.sha256]):
            continue  # another process was there meanwhile
        pixels = read_photograph(row, source, {"read": 0.0, "decode": 0.0})
        try:
            moments = encoding.encode(pixels, row.sha256)
        except FramesRefused as refusal:
            finished.refuse(row.sha256, str(refusal))
        else:
            finished.write(row.sha256, to_numpy(moments))


def gather(store: Store, finished: FinishedRows) -> None:
    """Puts finished rows together to the shards that are not there, publishes the store, removes the rows.

    Raises StoreError where a row is damaged, which is then set aside: a next run makes it again.
    """
    for shard in store.pending():
        rows = [finished.read(row.sha256) for row in store.shard_rows(shard)]
        values = [row for row in rows if row is not None]
        if len(values) == len(rows):
            store.write_shard(shard, {finished.spec.name: np.stack(values)})
        elif store.pending([shard]):  # else another part has written it, and removed its rows
            raise StoreError(
                "\n".join([*finished.notes, "a finished row is gone: run the same command again"])
            )
    if not store.is_complete:
        store.publish()
    finished.remove(row.sha256 for row in store.rows)


def preflight(encoding: RolloutEncoding, store: Store, room_for: int, num_todo: int, part: Part) -> str:
    """What is about to be done, how large it is and how long it takes, of which a denoising step is measured.

    Raises ValueError where the disk has no room for `room_for` rows: finished ones and those in shards.
    """
    a_row = encoding.arrays[0].row_nbytes
    needed, free = a_row * room_for, shutil.disk_usage(store.root).free
    if needed > free:
        raise ValueError(
            f"{store.root}: {needed:,} bytes are needed (each row is there twice until all are in shards) and {free:,} "
            "are free; make room or move --cache"
        )
    share = f" of part {part.index + 1}/{part.count}" if part.count > 1 and not part.together else ""
    line = (
        f"{LATENTS}: {num_todo:,} photographs{share} to roll out, {store.plan.num_rows:,} in the store: "
        f"{a_row * store.plan.num_rows / 2**20:,.1f} MiB, twice that until all are in shards "
        f"({free / 2**30:,.1f} GiB free)"
    )
    if not num_todo:
        return line
    steps = encoding.rollout.config.rollout_steps
    step, before = encoding.rollout.measure(encoding.latents.size)
    seconds = num_todo * (before + steps * step)
    return f"{line}\n{estimate(seconds, num_todo, steps, step, before, encoding.latents.device.type, part)}"


def estimate(
    seconds: float, images: int, steps: int, step: float, before: float, device: str, part: Part
) -> str:
    """The measured cost in words; `seconds`: of all images on one device."""
    sharing = part.count if part.together else 1
    line = (
        f"measured now: {step:.2f} s a denoising step, {before:.2f} s before the first. {images:,} x ({before:.2f} + "
        f"{steps} x {step:.2f}) s = {seconds / 3600:,.1f} {'GPU' if device == 'cuda' else 'CPU'}-hours, about "
        f"{duration(seconds / sharing)} here; what decoding for the guardrail takes comes on top"
    )
    if seconds / sharing <= DAY or part.count > 1:
        return line
    devices = 2 ** math.ceil(math.log2(seconds / DAY))
    return (
        f"{line}\nshared by {devices} GPUs it is about {duration(seconds / devices)}: accelerate launch --multi_gpu, "
        f"or --part 1/{devices} to {devices}/{devices} on one each"
    )


def _say_nothing(_: str) -> None:
    pass
