"""Mends a damaged cache: what is damaged goes into a quarantine, and only that is made again from the photographs.

    verify ─> plan: what store.json and images.jsonl were ─> quarantine ─> encode the damaged shards ─> verify

What is made again has to have the hash that what is sound still states of it; where it has another one nothing is
replaced. So a repaired cache is, byte for byte, the one that was damaged.
"""

import hashlib
import json
import os
import secrets
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from theworld.config.config import Config
from theworld.data.images import check_photographs
from theworld.data.vsr import images_of, load_all
from theworld.extraction.encoders import encoder_of
from theworld.extraction.extract import freeze, source_of, stores_of
from theworld.extraction.pipeline import Source, encode_shards
from theworld.models.encoder import Encoder
from theworld.store import shard as shards
from theworld.store.format import (
    LATENTS,
    STORE_KEYS,
    Plan,
    StoreMismatch,
    fingerprint_differences,
    image_differences,
    image_table,
    parse_images,
    parse_manifest,
    paths,
    read_failures,
)
from theworld.store.verify import DAMAGED, SOUND, Problem, examine, status
from theworld.store.writer import Store
from theworld.utils import files
from theworld.utils.distributed import Part, num_launched
from theworld.utils.files import StoreError

Say = Callable[[str], None]


def repair(config: Config, cache: Path, say: Say = tqdm.write) -> int:
    """Mends every damaged store of a cache; returns SOUND. Raises ValueError or OSError, with nothing lost, where it
    cannot."""
    if num_launched() > 1:
        raise ValueError(f"--repair runs in one process; {num_launched()} were launched")
    damaged = [root for root in stores_of(cache) if _damage(root)]
    if config.num_world_steps and any(root.name == LATENTS for root in damaged):
        raise ValueError(
            f"{cache / LATENTS}: --repair makes no rollouts. The extraction itself does: it sets damaged shards aside "
            "and rolls out their photographs again, and no others"
        )
    if not damaged:
        say(f"{cache}: nothing is known to be damaged; --verify says whether all is there")
    for root in damaged:
        _repair(root, config, source_of(config, Part()), say)
    return SOUND


def report(problems: Sequence[Problem], cache: Path, command: Sequence[str]) -> int:
    """Prints what verification found and, of damage, the command that mends it; returns the exit status. `command`: the
    arguments of the verification."""
    print("\n".join(map(str, problems)) or f"{cache}: sound")
    found = status(problems)
    if found == DAMAGED:
        words = ["--repair" if word == "--verify" else word for word in command]
        if not any(word.startswith(("--image_folder", "--image-folder", "--config")) for word in words):
            words += ["--config", "FILE", "--image_folder", "FOLDER"]
        print(f"repair it with: {shlex.join(['python', *words])}")
    return found


def _damage(root: Path) -> list[Problem]:
    return [problem for problem in examine(root) if problem.damaged]


def _repair(root: Path, config: Config, source: Source, say: Say) -> None:
    problems, before, published = _damage(root), list[Problem](), False
    while problems:  # again where damaged lists hid what else is damaged
        if problems == before:
            raise StoreError("\n".join(["damaged after the repair:", *map(str, problems)]))
        mending = Mending(root, problems, config, source, say)
        published = published or mending.is_bad("manifest.json")
        mending.run()
        problems, before = _damage(root), problems
    if published:
        Store(root, Plan.load(root)).publish()


class Mended(Store):
    """A store of which what is replaced goes to a quarantine, and what is written has to be what was there before."""

    stated: dict[int, str]  # SHA-256 of the files of the damaged shards, as far as anything sound states them

    def write_shard(self, shard: int, arrays: dict[str, np.ndarray]) -> None:
        """As `Store.write_shard`. StoreError, with nothing replaced, if the file is not what it was."""
        data, _ = shards.pack(self.plan.arrays, self.shard_rows(shard), arrays)
        digest = hashlib.sha256(data).hexdigest()
        stated = self.stated.get(shard, digest)
        if digest != stated:
            raise StoreError(
                f"shard {shard} encoded again has SHA-256 {digest}, but was {stated}; nothing was replaced. Repair it "
                "on the kind of machine that extracted it, or extract into another --cache"
            )
        path = paths(self.root, shard)[0]
        if os.path.lexists(path) and not files.holds(path, data):
            self.set_aside(path, "damaged")
        super().write_shard(shard, arrays)


class Mending:
    """The repair of one store."""

    def __init__(
        self, root: Path, problems: Sequence[Problem], config: Config, source: Source, say: Say
    ) -> None:
        self.root, self.problems, self.config, self.source, self.say = root, problems, config, source, say
        self.bad = {path for problem in problems for path in problem.paths}
        self.shards = sorted({p.shard for p in problems if p.shard is not None})
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        self.quarantine = root / "quarantine" / f"{stamp}-damaged-{secrets.token_hex(4)}"
        self._encoding: Encoder | None = None

    def run(self) -> None:
        """Everything, in an order in which a kill at any moment leaves a store that can be repaired again."""
        manifest = None if self.is_bad("manifest.json") else self._manifest()
        plan = self._plan(manifest)
        self._check_photographs(plan)
        if self.shards:
            self._check_encoding(plan)
        store = Mended(self.root, plan)
        store.aside, store.stated = self.quarantine, self._stated(manifest)
        self._write_why()
        for name, data in (("images.jsonl", plan.images_bytes), ("store.json", plan.store_bytes)):
            self._replace(store, self.root / name, data)
        own = {path for shard in self.shards for path in paths(self.root, shard)}
        for path in sorted(self.bad - own):
            if path.name == "manifest.json" or path.parent.name == "shards":
                store.set_aside(path, "damaged, or no file of this store")
        if self.shards:
            batch_size = self.config.encode_batch_size
            encode_shards(store, self._loaded(), self.shards, self.source, batch_size)
        what = [f"shards {', '.join(map(str, self.shards))} encoded again"] if self.shards else []
        what += sorted(path.name for path in self.bad - own)
        for line in (*store.notes, f"{self.root}: repaired: {'; '.join(what)}"):
            self.say(line)

    def _replace(self, store: Store, path: Path, data: bytes) -> None:
        """A list by the right one, of which at every moment one is there."""
        if files.holds(path, data):
            return
        if path.is_file() and not path.is_symlink():
            files.publish_bytes(self.quarantine / path.name, path.read_bytes())
        else:
            store.set_aside(path, "damaged")
        files.publish_bytes(path, data, overwrite=True)

    # ---- what the store was

    def is_bad(self, name: str) -> bool:
        return self.root / name in self.bad

    def _manifest(self) -> dict[str, Any] | None:
        path = self.root / "manifest.json"
        return parse_manifest(path) if os.path.lexists(path) else None

    def _plan(self, manifest: dict[str, Any] | None) -> Plan:
        """The plan of the store before it was damaged: read, or made again and proven by a hash. StoreError if neither
        the list on disk nor the photographs give it."""
        store, images = self.root / "store.json", self.root / "images.jsonl"
        if not self.is_bad("store.json") and not self.is_bad("images.jsonl"):
            return Plan.load(self.root)
        if self.is_bad("store.json"):
            spec = self._loaded().spec
            fields: dict[str, Any] = {"fingerprint": spec.fingerprint(), "arrays": [spec.array]}
            fields["shard_size"] = self.config.shard_size
        else:
            fields = files.read_sealed(store, STORE_KEYS)[0]
            fields["arrays"] = [shards.ArraySpec(**array) for array in fields["arrays"]]
        tried: list[dict[str, str]] = []
        for listed in (self._listed, self._photographed):
            table = listed()
            if not table:
                continue
            plan = Plan(fields["fingerprint"], table, fields["arrays"], fields["shard_size"])
            if self._is_proven(plan, fields.get("images_sha256"), manifest):
                return plan
            tried.append(table)
        raise self._no_plan(images if self.is_bad("images.jsonl") else store, tried)

    def _is_proven(self, plan: Plan, images_sha256: str | None, manifest: dict[str, Any] | None) -> bool:
        """Whether something sound states the hash of this plan: store.json, the manifest, or else the records."""
        if images_sha256 is not None:
            return hashlib.sha256(plan.images_bytes).hexdigest() == images_sha256
        if manifest is not None:
            return hashlib.sha256(plan.store_bytes).hexdigest() == manifest["store_sha256"]
        agree = [self._agrees(plan, shard) for shard in range(plan.num_shards)]
        return True in agree and False not in agree

    def _agrees(self, plan: Plan, shard: int) -> bool | None:
        """Whether a record is of this plan; None if there is none that can be read."""
        try:
            record = files.read_sealed(
                paths(self.root, shard)[1], shards.RECORD_KEYS, files.MAX_RECORD_BYTES
            )[0]
        except StoreError:
            return None
        return record.items() >= plan.record_fields(shard).items()

    def _listed(self) -> dict[str, str]:
        """The photographs as images.jsonl has them; none where it is too damaged to be read."""
        try:
            path = self.root / "images.jsonl"
            return image_table(parse_images(files.read_plain(path), path))
        except StoreError:
            return {}

    def _photographed(self) -> dict[str, str]:
        """The photographs that the statements name, as they are now, without those that were left out."""
        splits = load_all(self.config.annotations, self.config.dataset_name)
        names = images_of([statement for own in splits.values() for statement in own])
        left_out = read_failures(self.root.parent)
        entries, _ = freeze([name for name in names if name not in left_out], self.source, {})
        return {entry.path: entry.sha256 for entry in entries}

    def _no_plan(self, path: Path, tried: list[dict[str, str]]) -> StoreError:
        lines = [f"{path} cannot be made again: what these settings and photographs give has another hash."]
        if len(tried) == 2:
            differences = image_differences(tried[0], tried[1])
            lines += [f"  {what}: {old} on disk, {new} by the photographs" for what, old, new in differences]
        lines.append(
            f"Nothing was changed. Give the settings, statements and photographs of the extraction, or move "
            f"{self.root} away and extract again"
        )
        return StoreError("\n".join(lines))

    # ---- what it takes to make shards again

    def _loaded(self) -> Encoder:
        if self._encoding is None:
            self._encoding = encoder_of(self.root.name, self.config)(self.config)
        return self._encoding

    def _check_photographs(self, plan: Plan) -> None:
        rows = [row for shard in self.shards for row in plan.shard_rows(shard)]
        check_photographs({row.path: row.sha256 for row in rows}, self.source.folder)

    def _check_encoding(self, plan: Plan) -> None:
        """StoreMismatch, field by field, unless the encoder here gives the numbers that are in the store."""
        own = self._loaded().spec.fingerprint()
        differences = fingerprint_differences(plan.fingerprint, own)
        if differences:
            raise StoreMismatch(self.root, differences)

    def _stated(self, manifest: dict[str, Any] | None) -> dict[int, str]:
        if manifest is not None:
            return {shard: manifest["shards"][shard]["file_sha256"] for shard in self.shards}
        records = {shard: paths(self.root, shard)[1] for shard in self.shards}
        sound = {shard: path for shard, path in records.items() if path not in self.bad}
        return {
            shard: files.read_sealed(path, shards.RECORD_KEYS, files.MAX_RECORD_BYTES)[0]["file_sha256"]
            for shard, path in sound.items()
        }

    def _write_why(self) -> None:
        """`why.jsonl` in the quarantine: what was wrong with what is in it."""
        files.make_folder(self.quarantine)
        lines = [
            json.dumps(
                {"files": [p.relative_to(self.root).as_posix() for p in problem.paths], "says": str(problem)}
            )
            for problem in self.problems
        ]
        files.publish_bytes(self.quarantine / "why.jsonl", "".join(line + "\n" for line in lines).encode())
