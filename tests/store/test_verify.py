"""What verification says of damage: which file of which shard, the hash it has and the one it should have."""

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import pytest
from jobs import flip

from theworld.store.reader import StoreReader
from theworld.store.shard import ArraySpec, ImageEntry
from theworld.store.verify import DAMAGED, SOUND, UNKNOWN, Problem, examine, status
from theworld.store.writer import Store
from theworld.utils import files

NAMES = ["manifest.json", "store.json", "images.jsonl", "shards/00001.h5", "shards/00001.json"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A finished store of three shards of two images."""
    images = [ImageEntry(f"{i}.jpg", hashlib.sha256(bytes([i])).hexdigest()) for i in range(6)]
    store = Store.create(tmp_path / "latents", {"model": "x"}, images, [ArraySpec("a", (3,), "float32")], 2)
    for shard in range(3):
        store.write_shard(shard, {"a": np.full((2, 3), shard, np.float32)})
    store.publish()
    return store.root


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_said_with_the_hash_that_is_there_and_the_one_that_should_be(root: Path, name: str) -> None:
    path = root / name
    expected = sha256(path)
    for change in (lambda: flip(path), lambda: path.write_bytes(path.read_bytes()[:-7])):
        sound = path.read_bytes()
        change()
        (problem,) = examine(root)
        assert problem.damaged
        assert problem.paths == (path,)
        assert problem.shard == (1 if "shards" in name else None)
        assert str(path) in str(problem)
        assert f"SHA-256 {'is ' if 'manifest' in name else ''}{sha256(path)}" in str(problem)
        assert f"expected {expected}" in str(problem) or f", {expected} by" in str(problem)
        path.write_bytes(sound)
    assert examine(root) == []


def test_every_damaged_file_is_found_however_many_there_are(root: Path) -> None:
    for name in NAMES:
        flip(root / name)
    found = examine(root)
    assert [path for problem in found for path in problem.paths] == [root / name for name in NAMES[:2]]
    for name in NAMES[:2]:
        flip(root / name)  # back again: the lists no longer hide the shards
    (images, shard) = examine(root)
    assert images.paths == (root / "images.jsonl",)
    assert shard.paths == (root / "shards/00001.json", root / "shards/00001.h5")
    assert str(shard).startswith("shard 1: ")


def test_shards_are_verified_below_damaged_lists_and_without_a_manifest(root: Path) -> None:
    flip(root / "store.json")
    flip(root / "images.jsonl")
    flip(root / "shards/00002.h5")
    assert [problem.shard for problem in examine(root)] == [None, 2]
    flip(root / "store.json")
    flip(root / "images.jsonl")
    (root / "manifest.json").unlink()
    damaged, unfinished = examine(root)
    assert (damaged.shard, damaged.damaged, unfinished.damaged) == (2, True, False)
    assert str(unfinished) == (
        f"{root} is unfinished: manifest.json is missing, 3 of 3 shards written. "
        f"Go on with: python tools/extract_latents.py --config FILE --image_folder FOLDER --cache {root.parent}"
    )


def test_a_manifest_of_another_store_is_damage(root: Path, tmp_path: Path) -> None:
    other = Store.create(
        tmp_path / "other", {"model": "y"}, [ImageEntry("a", "0" * 64)], [ArraySpec("a", (1,), "float32")], 2
    )
    other.write_shard(0, {"a": np.zeros((1, 1), np.float32)})
    other.publish()
    (root / "manifest.json").write_bytes((other.root / "manifest.json").read_bytes())
    assert status(examine(root)) == DAMAGED
    manifest = files.parse_json((other.root / "manifest.json").read_bytes(), "x")
    del manifest["self_sha256"]
    manifest["store_sha256"] = sha256(root / "store.json")
    (root / "manifest.json").write_bytes(files.seal(manifest))
    (problem,) = examine(root)
    assert f"{root / 'manifest.json'} is not the manifest of this store.json" in str(problem)


def test_what_cannot_be_read_is_no_damage_and_not_sound(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files.hash_file

    def hash_file(path: Path) -> tuple[int, str]:
        if path.name == "00001.h5":
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(files, "hash_file", hash_file)
    (problem,) = examine(root)
    assert (problem.shard, problem.damaged) == (1, False)
    assert "Input/output error" in str(problem)
    assert status([problem]) == UNKNOWN
    assert status([problem, Problem("", ())]) == DAMAGED
    assert status([]) == SOUND


@pytest.mark.parametrize("kind", ["fifo", "folder", "link", "device"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.torture("security", "a FIFO, folder, link or device in the place of each file")
def test_what_is_no_plain_file_is_damage_and_is_not_waited_for(root: Path, name: str, kind: str) -> None:
    path = root / name
    path.rename(root / "elsewhere")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(root / "elsewhere" if kind == "link" else "/dev/zero")
    (problem,) = examine(root)
    assert problem.damaged
    assert re.search(r"is [-a-z]{10}, expected a plain file", str(problem))


def test_a_folder_without_a_store_says_so(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        (problem,) = examine(root)
        assert (problem.damaged, str(problem).split(";")[0]) == (False, f"{root}: no store in it")


@pytest.mark.torture("cache", "a moved cache is sound")
def test_a_moved_cache_is_sound_and_names_no_machine(root: Path, tmp_path: Path) -> None:
    before = {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert not any(
        str(tmp_path).encode() in data or os.uname().nodename.encode() in data for data in before.values()
    )
    root.rename(tmp_path / "elsewhere")
    assert examine(tmp_path / "elsewhere") == []
    assert StoreReader(tmp_path / "elsewhere").read("3.jpg", "a").tolist() == [1, 1, 1]


@pytest.mark.torture("security", "records and store.json of 512 MB refused unread")
def test_large_files_are_refused_by_their_size(root: Path) -> None:
    for name in ("store.json", "shards/00001.json"):
        sound = (root / name).read_bytes()
        with (root / name).open("r+b") as file:
            file.truncate(1 << 29)  # sparse
        with pytest.raises(files.StoreError, match=r"536,870,912 bytes, limit (4,194,304|65,536)"):
            StoreReader(root).read("3.jpg", "a")
        (root / name).write_bytes(sound)
