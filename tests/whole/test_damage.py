"""Bits that flip and files that end too early: in a cache at rest, and in one that a run is reading."""

import contextlib
import hashlib
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import tool
from jobs import flip
from torture import Tally

from theworld.config.config import Config, save_config
from theworld.extraction.extract import extract
from theworld.extraction.features import CachedFeatures
from theworld.store.format import LATENTS
from theworld.store.reader import StoreReader
from theworld.store.shard import ArraySpec, ImageEntry, payload
from theworld.store.verify import DAMAGED, examine, status
from theworld.store.writer import Store
from theworld.training.trainer import Trainer
from theworld.utils.files import StoreError

ARRAY = ArraySpec("latents", (4, 3), "bfloat16")
NAMES = ["shards/00001.h5", "shards/00001.json", "manifest.json", "store.json", "images.jsonl"]
WITNESSED = NAMES[:2] + NAMES[3:]  # a file above says what their hash is


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of three shards of four images."""
    images = [ImageEntry(f"{i:02}.jpg", hashlib.sha256(bytes([i])).hexdigest()) for i in range(12)]
    store = Store.create(tmp_path_factory.mktemp("cache") / LATENTS, {"model": "x"}, images, [ARRAY], 4)
    values = np.random.default_rng(0).integers(0, 0x7F00, (12, 4, 3), dtype=np.uint16)
    for shard in range(3):
        store.write_shard(shard, {LATENTS: values[4 * shard : 4 * shard + 4]})
    store.publish()
    return store.root


@contextlib.contextmanager
def no_hang(seconds: int = 20) -> Iterator[None]:
    """An error where the block takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError("verification hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_found(root: Path, name: str, sound: bytes) -> None:
    """Verification says which file of which shard, its hash and the hash that it should have."""
    with no_hang():
        problems = examine(root)
    assert status(problems) == DAMAGED
    (problem,) = problems
    assert problem.paths == (root / name,)
    assert problem.shard == (1 if "shards" in name else None)
    words = str(problem)
    assert hashlib.sha256((root / name).read_bytes()).hexdigest() in words
    assert hashlib.sha256(sound).hexdigest() in words


@pytest.mark.torture("cache", "bit flips in each kind of file, found by --verify")
@pytest.mark.parametrize("name", NAMES)
def test_every_bit_flip_is_found_and_said(root: Path, name: str, tally: Tally) -> None:
    sound, chance, flips = (root / name).read_bytes(), random.Random(name), tally.number(1000, sample=40)
    for _ in range(flips):
        flip(root / name, chance.randrange(len(sound)), chance.randrange(8))
        check_found(root, name, sound)
        (root / name).write_bytes(sound)
    assert examine(root) == []
    tally(**{f"flips_in_{name.rpartition('/')[2].replace('00001', 'a_shard')}": flips})
    tally(found_by_name_and_hashes=flips)


@pytest.mark.torture("cache", "every truncation of each kind of file, found by --verify")
@pytest.mark.parametrize("name", NAMES)
def test_every_truncation_is_found_and_said(root: Path, name: str, tally: Tally) -> None:
    sound = (root / name).read_bytes()
    step = tally.number(1, sample=max(1, len(sound) // 40))
    lengths = range(0, len(sound), step)
    for length in lengths:
        (root / name).write_bytes(sound[:length])
        check_found(root, name, sound)
    (root / name).write_bytes(sound)
    assert examine(root) == []
    tally(lengths=len(lengths), found_by_name_and_hashes=len(lengths))


def payload_of(root: Path) -> tuple[int, int]:
    """Where the rows of the second shard start and end."""
    reader = StoreReader(root)
    record = reader._read_record(1)
    ((start, end),) = payload(list(reader.arrays.values()), record["num_rows"], record["offsets"])
    return start, end


@pytest.mark.torture("cache", "payload flips after verification, caught when the row is read")
def test_every_payload_flip_is_caught_on_read(root: Path, tally: Tally) -> None:
    """By a reader that has the shard open, and by one that opens it."""
    start, end = payload_of(root)
    chance, path, sound = random.Random(0), root / NAMES[0], (root / NAMES[0]).read_bytes()
    flips = tally.number(1000, sample=60)
    opened = StoreReader(root)
    opened.read("04.jpg", LATENTS)
    for _ in range(flips):
        byte = chance.randrange(start, end)
        image = f"{4 + (byte - start) // ARRAY.row_nbytes:02}.jpg"
        with path.open("r+b") as file:
            file.seek(byte)
            file.write(bytes([sound[byte] ^ 1 << chance.randrange(8)]))
        words = rf"00001\.h5 is damaged: latents of image '{image}' has CRC-32 [0-9a-f]{{8}}, expected [0-9a-f]{{8}}"
        with pytest.raises(StoreError, match=words):
            opened.read(image, LATENTS)
        with pytest.raises(StoreError, match=words):
            CachedFeatures(root)([image])
        with path.open("r+b") as file:
            file.seek(byte)
            file.write(sound[byte : byte + 1])
    assert examine(root) == []
    tally(flips=flips, caught=flips)


def damage_rows(root: Path) -> dict[Path, bytes]:
    """Flips a bit in each row of each shard; what was there."""
    reader, before = StoreReader(root), {}
    for shard in range(len(list((root / "shards").glob("*.h5")))):
        path, record = root / f"shards/{shard:05}.h5", reader._read_record(shard)
        before[path] = path.read_bytes()
        for row in range(record["num_rows"]):
            flip(path, record["offsets"][LATENTS] + row * reader.arrays[LATENTS].row_nbytes)
    return before


@pytest.mark.torture("cache", "a flip while training: it stops, and the checkpoint is intact")
def test_training_stops_at_a_flip_and_goes_on_from_its_checkpoint(
    config: Config, tmp_path: Path, tally: Tally
) -> None:
    config = replace(config, num_workers=0, save_steps=1, save_total_limit=None)
    cache = tmp_path / "cache"
    extract(config, cache, with_vision=True, allow_missing=False)
    whole = Trainer(replace(config, output_dir=str(tmp_path / "whole")), cache).run()

    trainer = Trainer(config, cache)
    for _ in range(2):
        trainer.train_step()
    saved = trainer.save()
    content = {path: path.read_bytes() for path in saved.iterdir()}
    before = damage_rows(cache / LATENTS)
    weights = {name: p.detach().clone() for name, p in trainer.model.trainable().items()}
    words = (
        r"shards/0000\d\.h5 is damaged: latents of image '[abc]\.png' has CRC-32 .*mend it with: .* --cache "
    )
    with pytest.raises(StoreError, match=words):
        trainer.train_step()
    for name, parameter in trainer.model.trainable().items():
        assert bool((parameter == weights[name]).all())
    assert {path: path.read_bytes() for path in saved.iterdir()} == content
    assert sorted(path.name for path in trainer.output_dir.iterdir()) == [".lock", "checkpoint-2"]

    resume = replace(config, resume_from=str(saved))
    with pytest.raises(StoreError, match=words):
        Trainer(resume, cache).run()
    assert {path: path.read_bytes() for path in saved.iterdir()} == content
    for path, data in before.items():
        path.write_bytes(data)
    last = Trainer(resume, cache).run()
    same = (last / "projection.safetensors").read_bytes() == (whole / "projection.safetensors").read_bytes()
    assert same
    tally(stopped=2, checkpoint_intact="yes", resumed_to_the_same_bits="yes" if same else "NO")


def test_the_tools_say_image_shard_hashes_and_the_command_that_mends(config: Config, tmp_path: Path) -> None:
    save_config(replace(config, num_workers=0), tmp_path / "tiny.json")
    cache, before = tmp_path / "cache", {}
    extract(config, cache, with_vision=True, allow_missing=False)
    before = {p: p.read_bytes() for p in sorted(cache.rglob("*")) if p.is_file()}

    def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
        return tool(name, "--config", tmp_path / "tiny.json", "--cache", cache, *words, check=False)

    damage_rows(cache / LATENTS)
    done = run("train")
    assert done.returncode == 1
    assert re.search(
        r"train: .*shards/0000\d\.h5 is damaged: latents of image '[abc]\.png' has CRC-32", done.stderr
    )
    assert "Traceback" not in done.stderr
    done = run("extract_latents", "--verify")
    assert done.returncode == 1
    path = cache / LATENTS / "shards/00001.h5"
    actual, expected = (hashlib.sha256(data).hexdigest() for data in (path.read_bytes(), before[path]))
    lines = done.stdout.splitlines()
    assert lines[1] == (
        f"shard 1: {path} is damaged: {len(before[path]):,} bytes, SHA-256 {actual}; expected "
        f"{len(before[path]):,} bytes, {expected} by the manifest"
    )
    command = (
        f"python tools/extract_latents.py --config {tmp_path / 'tiny.json'} --cache {cache} --gemma_vision"
    )
    assert lines[2:] == [f"mend it with: {command}"]
    done = run("extract_latents")  # as the line says
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0)
    assert "resuming" not in done.stdout  # both shards of the latents were damaged
    assert (
        len(
            re.findall(r"^shard [01] has to be written again: .*00000?[01]\.h5 is damaged", done.stdout, re.M)
        )
        == 2
    )
    assert len(re.findall(r"^0000[01]\.h5 was moved to .*quarantine/0000[01]\.h5\.", done.stdout, re.M)) == 2
    assert {p: p.read_bytes() for p in before} == before
    done = run("extract_latents", "--audit", "2")
    assert done.returncode == 0
    assert done.stdout.count("2 of 3 images encoded again in float32: largest difference ") == 2
