"""Phase 1 with rollouts: an image takes minutes, so each row is durable as soon as it is there.

    list ─> predict ─> publish its row ─> ... ─> all rows are there: shards, manifest ─> remove the rows

    finished/SHA256.row       one row of the store's array, of the photograph with this SHA-256
    finished/SHA256.refused   instead of a row: why there is none

A kill at any moment loses the image in work and no other. A row belongs to a photograph and a fingerprint, not to a
place in an image list: a list that changes (a photograph is mended, the guardrail refuses one) moves rows between
shards and costs nothing. The SHA-256 alone decides which part rolls out a photograph, so parts may start at any time,
with any list. Rows stay until the manifest names their shards. The bytes are specified in cache/README.md.
"""

import contextlib
import logging
import math
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from theworld.config.config import Config
from theworld.extraction.encoders import RolloutEncoder, open_store
from theworld.extraction.features import to_numpy
from theworld.extraction.reading import Source, read_photograph
from theworld.store.format import LATENTS, read_failures
from theworld.store.shard import ArraySpec, ImageEntry
from theworld.store.writer import Store, quarantine
from theworld.utils import files
from theworld.utils.console import duration, progress
from theworld.utils.distributed import Part
from theworld.utils.files import FAILURES, SCHEMA_VERSION, StoreError, canonical_sha256, write_failures
from theworld.utils.text import byte_size, counted

logger = logging.getLogger(__name__)

FOLDER = "finished"
REFUSAL_KEYS = {"schema_version": int, "fingerprint_sha256": str, "source_sha256": str, "reason": str}


class FinishedRows:
    """The finished rows beside one store. A damaged file goes to the store's quarantine and is never used."""

    def __init__(self, root: Path, fingerprint_sha256: str, spec: ArraySpec) -> None:
        """`root`: the store's folder."""
        self.root, self.folder = root, root / FOLDER
        self.fingerprint_sha256, self.spec = fingerprint_sha256, spec

    def write(self, source_sha256: str, row: np.ndarray) -> None:
        """Publish the row, [*shape] of the stored dtype, of the photograph with this hash; durable on return.

        Raises StoreError for another shape or dtype and for values that are not finite, FileExistsError if another row
        is there already, OSError if it cannot be written.
        """
        if row.shape != self.spec.shape or row.dtype != self.spec.storage:
            raise StoreError(
                f"{self.spec.name} is {row.dtype} {row.shape}, expected {self.spec.storage} {self.spec.shape}"
            )
        if not self.spec.finite(row).all():
            raise StoreError(f"{self.spec.name} is not finite for the photograph of SHA-256 {source_sha256}")
        data = np.ascontiguousarray(row).tobytes()
        self._publish(f"{source_sha256}.row", self._header(source_sha256, data) + data)

    def refuse(self, source_sha256: str, reason: str) -> None:
        """Record for good that this photograph has no row, and why."""
        fields = {"schema_version": SCHEMA_VERSION, "fingerprint_sha256": self.fingerprint_sha256}
        fields |= {"source_sha256": source_sha256, "reason": reason}
        self._publish(f"{source_sha256}.refused", files.seal(fields))

    def read(self, source_sha256: str) -> np.ndarray | None:
        """Return the row, or None if there is none.

        A file that is not, byte for byte, a row of this photograph and fingerprint goes to the quarantine.
        """
        path = self.folder / f"{source_sha256}.row"
        if not os.path.lexists(path):
            return None
        header_size = len(self._header(source_sha256, b""))
        try:
            whole = files.read_plain(path)
        except StoreError as error:
            quarantine(self.root, path, str(error))
            return None
        header, data = whole[:header_size], whole[header_size:]
        if len(data) != self.spec.row_nbytes or header != self._header(source_sha256, data):
            quarantine(self.root, path, "damaged, or not a row of this photograph and fingerprint")
            return None
        return np.frombuffer(data, self.spec.storage).reshape(self.spec.shape)

    def refusal(self, source_sha256: str) -> str | None:
        """Return why this photograph has no row; or None. A damaged record goes to the quarantine."""
        path = self.folder / f"{source_sha256}.refused"
        if not os.path.lexists(path):
            return None
        try:
            fields, _ = files.read_sealed(path, REFUSAL_KEYS)
        except StoreError as error:
            quarantine(self.root, path, str(error))
            return None
        if (fields["fingerprint_sha256"], fields["source_sha256"]) != (
            self.fingerprint_sha256,
            source_sha256,
        ):
            quarantine(self.root, path, "not of this photograph and fingerprint")
            return None
        return fields["reason"]

    def missing(self, hashes: Iterable[str]) -> list[str]:
        """Return the hashes with neither a row nor a refusal, by the names of files alone."""
        there = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        return [sha256 for sha256 in hashes if there.isdisjoint((f"{sha256}.row", f"{sha256}.refused"))]

    def remove(self, hashes: Iterable[str]) -> None:
        """Remove the rows of these photographs, which a published store holds now; refusals stay.

        Temporary files that are a day old, which only a killed run can have left, go too.
        """
        for sha256 in hashes:
            (self.folder / f"{sha256}.row").unlink(missing_ok=True)
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # its owner was faster
                if files.TEMPORARY.fullmatch(path.name) and _is_old(path):
                    path.unlink()
        with contextlib.suppress(OSError):  # not empty
            self.folder.rmdir()

    def _header(self, source_sha256: str, data: bytes) -> bytes:
        """Return the line before the data. Its length does not depend on the data."""
        fields: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint_sha256": self.fingerprint_sha256,
            "source_sha256": source_sha256,
            "array": self.spec.name,
            "shape": list(self.spec.shape),
            "dtype": self.spec.dtype,
            "crc32": f"{zlib.crc32(data):08x}",
        }
        return files.canonical_json(fields) + b"\n"

    def _publish(self, name: str, data: bytes) -> None:
        if not self.folder.is_dir():
            self.folder.mkdir(exist_ok=True)
            files.sync_folder(self.root)
        files.publish_bytes(self.folder / name, data)


def _is_old(path: Path) -> bool:
    return time.time() - path.lstat().st_mtime > files.STALE_SECONDS


def refusals(root: Path) -> dict[str, str]:
    """Return SHA-256 of a photograph -> why a store has no row of it.

    Damaged records are left to `FinishedRows.refusal`, which moves them to the quarantine.
    """
    found: dict[str, str] = {}
    for path in sorted((root / FOLDER).glob("*.refused")):
        with contextlib.suppress(StoreError):
            fields, _ = files.read_sealed(path, REFUSAL_KEYS)
            found[fields["source_sha256"]] = fields["reason"]
    return found


DAY = 24 * 3600  # seconds; what takes longer is better shared


def roll_out(
    encoding: RolloutEncoder,
    cache: Path,
    images: list[ImageEntry],
    source: Source,
    config: Config,
    part: Part,
    allow_missing: bool,
) -> bool:
    """Roll out the photographs of this part that have no row yet, and complete the store if all rows are there.

    Returns whether the store is complete. Raises ValueError if the guardrail refused some predictions and
    `allow_missing` is not given: those photographs are then in `failures.jsonl`, and the others stay finished. Raises
    ImageError if a photograph changed since it was listed, StoreMismatch for a store of something else.
    """
    job = Job(encoding, cache, images, config, part)
    todo = job.begin()
    roll_out_each(encoding, job.finished, todo, source, quiet=not part.is_main_process)
    part.barrier()
    return part.broadcast_from_main(lambda: job.complete(allow_missing))


class Job:
    """All photographs on their way into a store, of which this process has a part."""

    def __init__(
        self, encoding: RolloutEncoder, cache: Path, images: list[ImageEntry], config: Config, part: Part
    ) -> None:
        self.encoding, self.cache, self.images, self.config, self.part = encoding, cache, images, config, part
        fingerprint_sha256 = canonical_sha256(encoding.spec.fingerprint())
        self.finished = FinishedRows(cache / LATENTS, fingerprint_sha256, encoding.spec.array)

    def open(self) -> tuple[Store, list[ImageEntry]]:
        """Return the store of all photographs that are not refused, and its rows that no valid shard holds."""
        kept = [image for image in self.images if self.finished.refusal(image.sha256) is None]
        if not kept:
            raise ValueError(
                f"the guardrail refuses what was predicted from every photograph, {len(self.images):,} in all"
            )
        config = self.config
        store = open_store(self.cache, self.encoding.spec, kept, config.shard_size)
        return store, [row for shard in store.pending() for row in store.shard_rows(shard)]

    def begin(self) -> list[ImageEntry]:
        """Return the photographs that this part has to roll out, after a preflight."""
        part, finished = self.part, self.finished
        with part.main_process_first():
            store, rows = self.open()
        own = [row for row in rows if int(row.sha256[:12], 16) % part.count == part.index]
        todo = [row for row in own if finished.read(row.sha256) is None]
        if len(todo) < len(own):
            logger.log(
                part.log_level,
                f"resuming: {len(own) - len(todo):,} of {counted(len(own), 'photograph')} rolled out",
            )
        if part.is_main_process:
            missing = len(finished.missing(row.sha256 for row in rows))
            num_todo = missing if part.together else len(todo)
            logger.info(preflight(self.encoding, store, len(rows) + missing, num_todo, part))
        return todo

    def complete(self, allow_missing: bool) -> bool:
        """Gather and publish the store, and return whether all parts are done. Raises as `roll_out`."""
        refused = {i.path: reason for i in self.images if (reason := self.finished.refusal(i.sha256))}
        if refused:
            write_failures(self.cache, sorted({**read_failures(self.cache), **refused}.items()))
        store, rows = self.open()
        missing = self.finished.missing(row.sha256 for row in rows)
        if missing:
            logger.log(
                self.part.log_level,
                f"{LATENTS}: {len(missing):,} of {store.plan.num_rows:,} photographs are still missing: those of other "
                "parts. Whichever part finishes last completes the store",
            )
            return False
        if refused and not allow_missing:
            some = "\n".join(f"  {path}: {reason}" for path, reason in list(refused.items())[:5])
            raise ValueError(
                f"no rollout of {len(refused):,} of {counted(len(self.images), 'photograph')}:\n{some}\nAll are "
                f"listed in {self.cache / FAILURES}, and the others are finished. Go on without them with "
                "--allow_missing"
            )
        gather(store, self.finished)
        return True


def roll_out_each(
    encoding: RolloutEncoder, finished: FinishedRows, todo: Sequence[ImageEntry], source: Source, quiet: bool
) -> None:
    """Publish a row, or the guardrail's refusal, for each of these photographs."""
    from theworld.models.rollout import FramesRefused  # which loads diffusers

    for row in progress(todo, total=len(todo), desc="roll out", unit=" images", disable=quiet or not todo):
        if not finished.missing([row.sha256]):
            continue  # another process was there meanwhile
        pixels = read_photograph(row, source, {"read": 0.0, "decode": 0.0})
        try:
            values = encoding.encode(pixels, row.sha256)
        except FramesRefused as refusal:
            finished.refuse(row.sha256, str(refusal))
        else:
            finished.write(row.sha256, to_numpy(values))


def gather(store: Store, finished: FinishedRows) -> None:
    """Put finished rows together to the missing shards, publish the store, and remove the rows.

    Raises StoreError if a row is damaged, which then goes to the quarantine: the next run makes it again.
    """
    for shard in store.pending():
        rows = [finished.read(row.sha256) for row in store.shard_rows(shard)]
        values = [row for row in rows if row is not None]
        if len(values) == len(rows):
            store.write_shard(shard, {finished.spec.name: np.stack(values)})
        elif store.pending([shard]):  # else another part has written it, and removed its rows
            raise StoreError(f"{finished.folder}: a finished row is gone; run the same command again")
    if not store.is_complete:
        store.publish()
    finished.remove(row.sha256 for row in store.rows)


def preflight(encoding: RolloutEncoder, store: Store, room_for: int, num_todo: int, part: Part) -> str:
    """Return what is about to be done, its size, and its time, for which a denoising step is measured.

    Raises ValueError if the disk has no room for `room_for` rows: finished rows and rows in shards.
    """
    a_row = encoding.spec.array.row_nbytes
    needed, free = a_row * room_for, shutil.disk_usage(store.root).free
    if needed > free:
        raise ValueError(
            f"{store.root}: {needed:,} bytes are needed (each row is there twice until all are in shards) and {free:,} "
            "are free; make room or move --cache"
        )
    share = f" of part {part.index + 1}/{part.count}" if part.count > 1 and not part.together else ""
    line = (
        f"{LATENTS}: {counted(num_todo, 'photograph')}{share} to roll out, {store.plan.num_rows:,} in the store: "
        f"{byte_size(a_row * store.plan.num_rows)}, twice that until all are in shards ({byte_size(free)} free)"
    )
    if not num_todo:
        return line
    steps = encoding.rollout.config.rollout_steps
    step, before = encoding.rollout.measure(encoding.latents.prepare.size)
    seconds = num_todo * (before + steps * step)
    return f"{line}\n{estimate(seconds, num_todo, steps, step, before, encoding.latents.device.type, part)}"


def estimate(
    seconds: float, images: int, steps: int, step: float, before: float, device: str, part: Part
) -> str:
    """Return the measured cost in words; `seconds`: of all images on one device."""
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
