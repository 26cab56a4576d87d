"""A store from several processes, killed, resumed, damaged and read."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from forks import in_child

from theworld.store import shard as shards
from theworld.store.format import StoreMismatch, fingerprint_differences
from theworld.store.reader import StoreReader, verify_store
from theworld.store.shard import ArraySpec, ImageEntry
from theworld.store.writer import Store
from theworld.utils import files
from theworld.utils.files import StoreError

FINGERPRINT = {"model": "vae", "size": 512, "scale": 0.5, "exif": True, "steps": [1, 2], "crop": None}
LATENT, FEATURE = ArraySpec("latent", (2, 3), "float32"), ArraySpec("feature", (4,), "bfloat16")
FILES = ["images.jsonl", "manifest.json", "shards/00000.h5", "shards/00000.json"]
FILES += ["shards/00001.h5", "shards/00001.json", "store.json"]


def entry(name: str, content: str | None = None) -> ImageEntry:
    return ImageEntry(name, hashlib.sha256((content or name).encode()).hexdigest())


IMAGES = [entry(f"{name}.jpg") for name in "abcde"]


def values(rows: list[ImageEntry]) -> dict[str, np.ndarray]:
    """Arrays that depend on each image's content alone, as an encoder's do."""
    raw = np.stack([np.frombuffer(bytes.fromhex(row.sha256), np.uint8) for row in rows])
    return {
        "latent": raw[:, :6].reshape(-1, 2, 3).astype(np.float32) / 7,
        "feature": raw[:, 8:16].copy().view(np.uint16) & 0x3FFF,
    }


def create(
    root: Path, images: list[ImageEntry] = IMAGES, shard_size: int = 3, **fingerprint: object
) -> Store:
    return Store.create(root, {**FINGERPRINT, **fingerprint}, images, [LATENT, FEATURE], shard_size)


def fill(store: Store, seed: int = 0) -> Store:
    """Writes what is pending, in an order of its own."""
    pending = store.pending()
    for shard in random.Random(seed).sample(pending, len(pending)):
        store.write_shard(shard, values(store.shard_rows(shard)))
    return store


def build(root: Path, images: list[ImageEntry] = IMAGES, shard_size: int = 3) -> Path:
    fill(create(root, images, shard_size)).publish()
    return root


def tree(root: Path) -> dict[str, bytes]:
    """Every file but the temporary ones of killed runs."""
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in paths
        if not files.TEMPORARY.fullmatch(path.name)
    }


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- what is written -----------------------------------------------------------------------------


def test_literal_files_of_a_tiny_store(tmp_path: Path) -> None:
    images = [
        ImageEntry("b/2.jpg", "22" * 32),
        ImageEntry("a/ä.jpg", "11" * 32),
        ImageEntry("c.jpg", "11" * 32),
    ]
    store = Store.create(tmp_path, {"model": "vae"}, images, [ArraySpec("latent", (1,), "float16")], 1)
    for shard in range(2):
        store.write_shard(shard, {"latent": np.array([[shard]], np.float16)})
    store.publish()
    ones, twos = "11" * 32, "22" * 32
    assert (tmp_path / "images.jsonl").read_text() == (
        f'{{"path":"a/\\u00e4.jpg","sha256":"{ones}"}}\n'
        f'{{"path":"b/2.jpg","sha256":"{twos}"}}\n'
        f'{{"path":"c.jpg","sha256":"{ones}"}}\n'
    )
    images_sha256 = hashlib.sha256((tmp_path / "images.jsonl").read_bytes()).hexdigest()
    canonical = (
        '{"arrays":[{"dtype":"float16","name":"latent","shape":[1]}],"fingerprint":{"model":"vae"},'
        f'"images_sha256":"{images_sha256}","num_images":3,"num_rows":2,"schema_version":1,"shard_size":1}}'
    )
    assert (
        (tmp_path / "store.json").read_text()
        == f"""{{
 "arrays": [
  {{
   "dtype": "float16",
   "name": "latent",
   "shape": [
    1
   ]
  }}
 ],
 "fingerprint": {{
  "model": "vae"
 }},
 "images_sha256": "{images_sha256}",
 "num_images": 3,
 "num_rows": 2,
 "schema_version": 1,
 "self_sha256": "{hashlib.sha256(canonical.encode()).hexdigest()}",
 "shard_size": 1
}}
"""
    )
    record = json.loads((tmp_path / "shards/00001.json").read_text())
    file = (tmp_path / "shards/00001.h5").read_bytes()
    offset = record["offsets"]["latent"]
    assert file[offset : offset + 2] == bytes.fromhex("003c")
    seal = record.pop("self_sha256")
    assert (
        seal == hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    )
    assert record == {
        "schema_version": 1,
        "shard": 1,
        "first_row": 1,
        "num_rows": 1,
        "file_size": len(file),
        "file_sha256": hashlib.sha256(file).hexdigest(),
        "fingerprint_sha256": hashlib.sha256(b'{"model":"vae"}').hexdigest(),
        "rows_sha256": hashlib.sha256(b"\x22" * 32).hexdigest(),
        "index_sha256": hashlib.sha256(file[:offset] + file[offset + 2 :]).hexdigest(),
        "offsets": {"latent": offset},
    }
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert sorted(manifest) == [
        "num_images",
        "num_rows",
        "schema_version",
        "self_sha256",
        "shards",
        "store_sha256",
    ]
    assert manifest["store_sha256"] == hashlib.sha256((tmp_path / "store.json").read_bytes()).hexdigest()
    assert manifest["shards"][1] == {
        "file_size": len(file),
        "file_sha256": hashlib.sha256(file).hexdigest(),
        "record_sha256": hashlib.sha256((tmp_path / "shards/00001.json").read_bytes()).hexdigest(),
    }


def test_the_files_of_a_finished_store(tmp_path: Path) -> None:
    assert sorted(tree(build(tmp_path))) == FILES
    assert verify_store(tmp_path) == []


def test_equal_bytes_are_one_row_of_the_first_path(tmp_path: Path) -> None:
    images = [entry("z.jpg", "one"), entry("b.jpg", "two"), entry("c.jpg", "one")]
    reader = StoreReader(build(tmp_path, images))
    assert [row.path for row in create(tmp_path, images).rows] == ["b.jpg", "c.jpg"]
    assert (len(reader), reader.num_rows, reader.nbytes("latent")) == (3, 2, 2 * 6 * 4)
    assert np.array_equal(reader.read("z.jpg", "latent"), reader.read("c.jpg", "latent"))
    assert not np.array_equal(reader.read("z.jpg", "latent"), reader.read("b.jpg", "latent"))


def test_every_row_reads_back(tmp_path: Path) -> None:
    reader = StoreReader(build(tmp_path), {"size": 512})
    wanted = values(IMAGES)
    for row, image in enumerate(IMAGES):
        latent, feature = reader.read(image.path, "latent"), reader.read(image.path, "feature")
        assert (latent.dtype, feature.dtype) == (np.float32, np.uint16)
        assert np.array_equal(latent, wanted["latent"][row])
        assert np.array_equal(feature, wanted["feature"][row])
        latent += 1  # the caller's own
    assert np.array_equal(reader.read("a.jpg", "latent"), wanted["latent"][0])
    assert reader.images == {image.path: image.sha256 for image in IMAGES}
    assert reader.arrays == {"latent": LATENT, "feature": FEATURE}
    assert reader.fingerprint == FINGERPRINT
    assert "a.jpg" in reader
    assert "x.jpg" not in reader
    reader.close()
    assert np.array_equal(reader.read("a.jpg", "latent"), wanted["latent"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": np.zeros((3, 2, 3), np.float64)}, "latent is float64"),
        ({"latent": np.zeros((2, 2, 3), np.float32)}, r"\(2, 2, 3\), expected float32 \(3, 2, 3\)"),
        ({"latent": np.zeros((3, 3, 2), np.float32)}, "expected float32"),
        ({"latent": np.full((3, 2, 3), np.inf, np.float32)}, r"not finite for 3 of 3 images: \['a.jpg'"),
        (
            {"feature": np.array([[0] * 4, [0x7FC0] * 4, [0] * 4], np.uint16)},
            r"feature .* 1 of 3 images: \['b.jpg'\]",
        ),
        ({"more": np.zeros(3, np.float32)}, "arrays are"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    store = create(tmp_path)
    with pytest.raises(StoreError, match=message):
        store.write_shard(0, {**values(store.shard_rows(0)), **change})
    assert os.listdir(tmp_path / "shards") == []


@pytest.mark.parametrize(
    "fingerprint",
    [{"a": {"b": 1}}, {"a": [[1]]}, {"a": float("nan")}, {1: 2}, {"a": b"x"}, {"a": np.int64(1)}],
)
def test_a_fingerprint_is_flat_json(tmp_path: Path, fingerprint: dict) -> None:
    with pytest.raises(StoreError, match="fingerprint"):
        Store.create(tmp_path / "new", fingerprint, IMAGES, [LATENT])
    assert not (tmp_path / "new").exists()


def test_an_image_list_without_images_or_with_one_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="0 and 2"):
        create(tmp_path, [])
    with pytest.raises(StoreError, match=r"image 'a.jpg' stands twice"):
        create(tmp_path, [*IMAGES, entry("a.jpg", "other")])


# --- several processes, kills, resume ------------------------------------------------------------


def test_three_processes_on_one_folder_write_the_same_bytes(tmp_path: Path) -> None:
    images = [entry(f"{number}.jpg") for number in range(20)]
    expected = tree(build(tmp_path / "one", images))

    def work(seed: int) -> None:
        store = fill(create(tmp_path / "three", images), seed)
        if not store.pending():
            store.publish()

    children = [in_child(lambda seed=seed: work(seed)) for seed in range(3)]
    assert [exit_code(child) for child in children] == [0, 0, 0]
    assert tree(tmp_path / "three") == expected


def test_killed_at_random_moments_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    images = [entry(f"{number}.jpg") for number in range(60)]
    start = time.monotonic()
    expected = tree(build(tmp_path / "once", images))
    duration, moments = time.monotonic() - start, random.Random(0)
    for _ in range(6):
        children = [in_child(lambda: build(tmp_path / "killed", images)) for _ in range(2)]
        time.sleep(moments.uniform(0, duration / 3))
        for child in children:
            os.kill(child, signal.SIGKILL)
            exit_code(child)
    assert tree(build(tmp_path / "killed", images)) == expected
    assert verify_store(tmp_path / "killed") == []


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("rename", range(7))
@pytest.mark.torture("cache", "SIGKILL before and after each rename, the store alone")
def test_killed_at_each_rename(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    rename: int,
    after: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = tree(build(tmp_path_factory.mktemp("once")))

    def work() -> None:
        real, count = os.replace, iter(range(100))

        def replace(source: Path, target: Path) -> None:
            kill = next(count) == rename
            if after or not kill:
                real(source, target)
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace
        build(tmp_path)

    assert exit_code(in_child(work)) == -signal.SIGKILL
    before = tree(tmp_path)
    assert before.items() <= expected.items()
    store = create(tmp_path)
    # images.jsonl, store.json, then file and record of shards 1 and 0 (in this order), then the manifest
    committed = (rename + after - 2) // 2 if rename + after > 2 else 0
    assert len(store.pending()) == 2 - min(committed, 2)
    fill(store).publish()
    assert tree(tmp_path) == expected
    assert [line for line in caplog.messages if "temporary" not in line] == []


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_an_error_at_each_call_commits_nothing_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    expected, real, failures = tree(build(tmp_path / "once")), getattr(os, function), 0
    for failing in range(40):
        root, count = tmp_path / str(failing), iter(range(100))

        def call(*arguments: object, failing: int = failing, count=count) -> object:
            if next(count) == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        monkeypatch.setattr(os, function, call)
        with contextlib.suppress(OSError):
            build(root)
        if next(count) > failing:
            failures += 1
            assert tree(root).items() <= expected.items()
            assert "manifest.json" not in tree(root)
        monkeypatch.setattr(os, function, real)
        assert [path for path in root.rglob("*") if path.name.endswith(".tmp")] == []
        assert tree(build(root)) == expected
    assert failures == {"fsync": 2 + 2 * 7, "replace": 7}[function]


def test_resume_counts_and_says_what_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [entry(f"{number:02}.jpg") for number in range(12)]
    store = create(tmp_path, images)
    for shard in (0, 1, 3):
        store.write_shard(shard, values(store.shard_rows(shard)))
    again = create(tmp_path, images)
    assert (again.num_shards, again.pending(), caplog.messages) == (4, [2], [])
    assert store.missing() == [2]
    with pytest.raises(StoreError, match=r"1 of 4 shards missing: \[2\]; run the extraction again"):
        again.publish()
    _flip(tmp_path / "shards/00000.h5", 3000)
    (tmp_path / "shards/00001.h5").unlink()
    _flip(tmp_path / "shards/00003.json", 100)
    again = create(tmp_path, images)
    assert again.pending() == [0, 1, 2, 3]
    for line, text in zip(
        caplog.messages, ["00000.h5 is damaged", "00001.h5 is missing", "00003.json"], strict=True
    ):
        assert text in line
    fill(again).publish()
    assert sorted(re.sub(r"\.[0-9a-f]{8}$", "", name) for name in os.listdir(tmp_path / "quarantine")) == [
        "00000.h5",
        "00003.json",
    ]
    assert sum("was moved to" in line for line in caplog.messages) == 2
    assert verify_store(tmp_path) == []


def test_other_values_for_a_committed_shard_are_an_error(tmp_path: Path) -> None:
    store = fill(create(tmp_path))
    before, other = tree(tmp_path), values(store.shard_rows(0))
    store.write_shard(0, other)
    other["latent"] = other["latent"] + 1
    with pytest.raises(StoreError, match="shard 0 is committed, with other values"):
        store.write_shard(0, other)
    assert tree(tmp_path) == before
    store.publish()
    store.publish()
    (tmp_path / "shards/00000.h5").unlink()
    with pytest.raises(StoreError, match="is published"):
        store.write_shard(0, other)
    assert fill(store).pending() == []
    assert tree(tmp_path).items() >= before.items()


def test_a_half_published_shard_of_other_values_is_replaced(tmp_path: Path) -> None:
    store = create(tmp_path)
    (tmp_path / "shards/00000.h5").write_bytes(b"a run that was killed before the record")
    assert store.pending() == [0, 1]
    fill(store).publish()
    (kept,) = (tmp_path / "quarantine").iterdir()
    assert kept.read_bytes() == b"a run that was killed before the record"
    assert sorted(tree(tmp_path)) == sorted([*FILES, f"quarantine/{kept.name}"])


def test_temporary_files_are_removed_after_a_day(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    store = fill(create(tmp_path))
    old, young = (tmp_path / f"shards/.00000.h5.{pid}.0123abcd.tmp" for pid in (1, 2))
    other = tmp_path / "shards/notes.tmp"
    for path in (old, young, other):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    store.publish()
    assert (old.exists(), young.exists(), other.exists()) == (False, True, True)
    assert sorted(line.split()[-1] for line in caplog.messages) == ["old", "removed"]
    assert verify_store(tmp_path) == []


# --- other settings, other images ----------------------------------------------------------------


def test_differences_show_types_and_absent_fields() -> None:
    cached = {"a": 1, "b": 1, "c": None, "d": [1]}
    assert fingerprint_differences(cached, dict(cached)) == []
    assert fingerprint_differences(cached, {"a": 1.0, "b": True, "d": (1,), "e": ""}) == [
        ("a", 1, 1.0),
        ("b", 1, True),
        ("c", None, "(absent)"),
        ("e", "(absent)", ""),
    ]


def test_other_settings_are_a_mismatch_field_by_field(tmp_path: Path) -> None:
    build(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(StoreMismatch) as caught:
        create(tmp_path, size=256, more="x")
    assert caught.value.differences == [("more", "(absent)", "x"), ("size", 512, 256)]
    assert str(caught.value) == (
        f"{tmp_path} was made with other settings or photographs than those of this run:\n"
        '  more: cached (absent), wanted "x"\n'
        "  size: cached 512, wanted 256\n"
        "Name another --cache, or change the setting back."
    )
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301
    with pytest.raises(StoreMismatch, match="shard_size: cached 3, wanted 4"):
        create(tmp_path, shard_size=4)
    with pytest.raises(StoreMismatch, match="arrays: cached"):
        Store.create(tmp_path, FINGERPRINT, IMAGES, [LATENT], 3)
    with pytest.raises(StoreMismatch) as caught:
        StoreReader(tmp_path, {"model": "vae", "scale": 1, "new": None})
    assert caught.value.differences == [("new", "(absent)", None), ("scale", 0.5, 1)]
    assert tree(tmp_path) == before


def test_other_images_are_a_mismatch_once_published(tmp_path: Path) -> None:
    build(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(StoreMismatch) as caught:
        create(tmp_path, [*IMAGES[:4], entry("e.jpg", "edited"), entry("f.jpg")])
    assert caught.value.differences == [
        ("number of images", 5, 6),
        ("image e.jpg", IMAGES[4].sha256, entry("x", "edited").sha256),
        ("image f.jpg", "(absent)", entry("f.jpg").sha256),
    ]
    assert tree(tmp_path) == before


def test_other_images_replace_an_unfinished_list(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    images = [entry(f"{number:02}.jpg") for number in range(10)]
    old = fill(create(tmp_path / "store", images))
    mended = [*images[:4], entry("04.jpg", "mended"), *images[5:9]]
    store = create(tmp_path / "store", mended)
    assert store.pending() == [1]
    changed, *surplus, stale = caplog.messages
    assert changed == "the image list changed: 10 paths before, 9 now"
    assert [line.split()[0] for line in surplus] == ["00003.h5", "00003.json"]
    assert "shard 1 has to be written again" in stale
    with pytest.raises(StoreError, match="changed by another process"):
        old.write_shard(1, values(old.shard_rows(1)))
    fill(store).publish()
    for call in (old.pending, old.publish):
        with pytest.raises(StoreError, match="changed by another process"):
            call()
    finished = tree(tmp_path / "store")
    assert {k: v for k, v in finished.items() if "quarantine" not in k} == tree(
        build(tmp_path / "once", mended)
    )


def test_an_interrupted_replacement_of_the_list_is_mended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(create(tmp_path))
    (tmp_path / "images.jsonl").write_bytes(b"")
    store = create(tmp_path)
    (line,) = caplog.messages
    assert line.startswith(f"images.jsonl was moved to {tmp_path / 'quarantine/images.jsonl'}.")
    assert line.endswith(": damaged; it is written again")
    store.publish()
    assert verify_store(tmp_path) == []


def forget(root: Path, name: str) -> None:
    (root / name).unlink()


def damage(root: Path, name: str) -> None:
    _flip(root / name, 30)


@pytest.mark.parametrize("lose", [damage, forget])
@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("name", ["store.json", "images.jsonl"])
def test_a_lost_list_is_written_again_and_said(
    tmp_path: Path, lose: Callable, published: bool, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    build(tmp_path)
    before = tree(tmp_path)
    if not published:
        (tmp_path / "manifest.json").unlink()
    lose(tmp_path, name)
    store = create(tmp_path)
    assert store.pending() == []
    if not published:
        store.publish()
    found = tree(tmp_path)
    kept = [data for path, data in found.items() if "quarantine" in path]
    assert {path: data for path, data in found.items() if "quarantine" not in path} == before
    assert (len(kept), before[name] in kept) == (int(lose is damage), False)
    (line,) = caplog.messages
    assert (f"{name} was moved to " in line) == (lose is damage)
    assert ("is missing: it is written again" in line) == (lose is forget)


@pytest.mark.parametrize("witness", ["manifest.json", "shards/00000.json"])
def test_a_lost_store_json_is_not_written_as_another_one(tmp_path: Path, witness: str) -> None:
    build(tmp_path)
    if witness != "manifest.json":
        (tmp_path / "manifest.json").unlink()
    damage(tmp_path, "store.json")
    before = tree(tmp_path)
    words = rf"store\.json is damaged or missing and cannot be made again: .*{witness}"
    with pytest.raises(StoreError, match=words):
        create(tmp_path, size=256)
    if witness == "manifest.json":  # else it is another list of an unfinished store
        with pytest.raises(StoreError, match=words):
            create(tmp_path, IMAGES[:4])
    assert tree(tmp_path) == before


def test_a_lost_list_of_a_published_store_is_not_written_as_another_one(tmp_path: Path) -> None:
    build(tmp_path)
    lines = (tmp_path / "images.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "images.jsonl").write_text("".join(lines[:-1]))
    before = tree(tmp_path)
    other = [entry("a.jpg", "edited"), *IMAGES[1:]]
    words = (
        rf"images\.jsonl is damaged .*(.|\n)*image a\.jpg: {IMAGES[0].sha256} on disk, [0-9a-f]{{64}} by the"
    )
    with pytest.raises(StoreError, match=words):
        create(tmp_path, other)
    damage(tmp_path, "manifest.json")  # a damaged manifest is still one
    with pytest.raises(StoreError, match=words):
        create(tmp_path, other)
    damage(tmp_path, "manifest.json")
    assert tree(tmp_path) == before


def test_where_nothing_sound_is_left_the_store_starts_anew(tmp_path: Path) -> None:
    build(tmp_path)
    before = tree(tmp_path)
    for name in FILES:
        _flip(tmp_path / name, 90)
    damaged = tree(tmp_path)
    fill(create(tmp_path)).publish()
    found = tree(tmp_path)
    assert {name: data for name, data in found.items() if "quarantine" not in name} == before
    assert set(damaged.values()) == {data for name, data in found.items() if "quarantine" in name}


def test_files_of_another_version_are_not_taken_for_damaged(tmp_path: Path) -> None:
    build(tmp_path)
    fields = json.loads((tmp_path / "store.json").read_text())
    del fields["self_sha256"]
    (tmp_path / "store.json").write_bytes(files.seal(fields | {"schema_version": 2, "new": 1}))
    before = tree(tmp_path)
    with pytest.raises(StoreError, match="schema_version is 2, this program reads 1"):
        create(tmp_path)
    assert tree(tmp_path) == before


def test_a_damaged_manifest_is_kept_until_its_shards_are_checked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(tmp_path)
    before = tree(tmp_path)
    damage(tmp_path, "manifest.json")
    store = create(tmp_path)
    assert caplog.messages[0].startswith(f"{tmp_path / 'manifest.json'} is damaged: it is written again once")
    with pytest.raises(StoreMismatch, match="number of images: cached 5, wanted 4"):
        create(tmp_path, IMAGES[:4])
    assert (store.is_complete, store.pending()) == (False, [])
    store.publish()
    found = tree(tmp_path)
    assert {path: data for path, data in found.items() if "quarantine" not in path} == before
    assert len(found) == len(before) + 1


def test_publishing_reads_what_changed_since_this_process_hashed_it_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = shards.hash_file

    def counted(path: Path) -> tuple[int, str]:
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(shards, "hash_file", counted)
    fill(create(tmp_path / "a")).publish()
    assert read == []
    again = create(tmp_path / "a")
    assert (again.pending(), read) == ([], ["00000.h5", "00001.h5"])
    (tmp_path / "a/manifest.json").unlink()
    again.publish()
    assert read == ["00000.h5", "00001.h5"]
    other = fill(create(tmp_path / "b"))
    _flip(tmp_path / "b/shards/00001.h5", 3000)
    with pytest.raises(StoreError, match=r"1 of 2 shards missing: \[1\]"):
        other.publish()


# --- reading -------------------------------------------------------------------------------------


def test_an_unfinished_store_is_refused_with_the_command(tmp_path: Path) -> None:
    store = create(tmp_path / "latents")
    store.write_shard(1, values(store.shard_rows(1)))
    message = (
        "1 of 2 shards written. Go on with: python tools/extract_latents.py --config FILE --image_folder "
    )
    message += f"FOLDER --cache {tmp_path}"
    with pytest.raises(StoreError, match=re.escape(message)):
        StoreReader(tmp_path / "latents")
    assert len(verify_store(tmp_path / "latents")) == 1


def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    reader = StoreReader(build(tmp_path))
    with pytest.raises(StoreError, match=r"'a.jpeg' is not one of the 5 .*; nearest: 'a.jpg'"):
        reader.read("a.jpeg", "latent")
    with pytest.raises(StoreError, match=r"'latents' is not one of the 2 .*; nearest: 'latent'"):
        reader.read("a.jpg", "latents")


def _offset(root: Path, shard: int, array: str) -> int:
    return json.loads((root / f"shards/{shard:05}.json").read_text())["offsets"][array]


def _flip(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def test_every_payload_flip_is_caught_by_an_open_reader(tmp_path: Path) -> None:
    reader = StoreReader(build(tmp_path))
    path, start = tmp_path / "shards/00000.h5", _offset(tmp_path, 0, "latent")
    reader.read("a.jpg", "latent")
    for bit in range(24 * 8):
        with path.open("r+b") as file:
            file.seek(start + 24 + bit // 8)  # the second row
            (value,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([value ^ 1 << bit % 8]))
            file.flush()
            with pytest.raises(StoreError, match=r"00000.h5 is damaged: latent of image 'b.jpg' has CRC-32"):
                reader.read("b.jpg", "latent")
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([value]))
    assert np.array_equal(reader.read("b.jpg", "latent"), values(IMAGES)["latent"][1])
    with path.open("r+b") as file:
        file.truncate(start + 30)
    with pytest.raises(StoreError, match=r"it ends within latent of image 'b.jpg'"):
        reader.read("b.jpg", "latent")


def test_a_shard_of_other_images_is_refused(tmp_path: Path) -> None:
    build(tmp_path)
    for suffix in ("h5", "json"):
        (tmp_path / f"shards/00001.{suffix}").write_bytes((tmp_path / f"shards/00000.{suffix}").read_bytes())
    with pytest.raises(StoreError, match=r"00001.json: shard is 0, the store says 1"):
        StoreReader(tmp_path).read("e.jpg", "latent")
    assert len(verify_store(tmp_path)) == 1


def test_a_reader_can_be_pickled_and_forked(tmp_path: Path) -> None:
    reader, wanted = StoreReader(build(tmp_path)), values(IMAGES)["latent"]
    reader.read("a.jpg", "latent")
    copy = pickle.loads(pickle.dumps(reader))  # noqa: S301
    assert np.array_equal(copy.read("b.jpg", "latent"), wanted[1])

    def work() -> None:
        for _ in range(200):
            for row, image in enumerate(IMAGES):
                assert np.array_equal(reader.read(image.path, "latent"), wanted[row])

    children = [in_child(work) for _ in range(2)]
    work()
    assert [exit_code(child) for child in children] == [0, 0]


def test_a_read_only_store_is_read_and_verified(tmp_path: Path) -> None:
    build(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    create(tmp_path)
    assert StoreReader(tmp_path).verify() == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    for path in before:
        path.chmod(0o755)


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_every_flip_is_found(tmp_path: Path, name: str) -> None:
    reader, path, chance = StoreReader(build(tmp_path)), tmp_path / name, random.Random(name)
    sound = path.read_bytes()
    for _ in range(200 if "00001" not in name else 20):
        _flip(path, chance.randrange(len(sound)), chance.randrange(8))
        problems = reader.verify()
        assert problems != []
        assert str(tmp_path) in problems[0]
        path.write_bytes(sound)
    assert reader.verify() == []


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_found(tmp_path: Path, name: str) -> None:
    reader, path = StoreReader(build(tmp_path)), tmp_path / name
    sound = path.read_bytes()
    for length in [*range(0, len(sound), max(1, len(sound) // 60)), len(sound) - 1]:
        path.write_bytes(sound[:length])
        assert len(reader.verify()) == 1, length
    path.write_bytes(sound + b"\n")
    assert len(reader.verify()) == 1
    path.unlink()
    assert "missing" in reader.verify()[0] or "unfinished" in reader.verify()[0]
    path.mkdir()
    assert "expected a plain file" in reader.verify()[0]


def test_every_flip_is_found_by_reading_all_rows(tmp_path: Path) -> None:
    build(tmp_path)
    path, chance = tmp_path / "shards/00000.h5", random.Random(0)
    sound = path.read_bytes()
    for _ in range(200):
        _flip(path, chance.randrange(len(sound)), chance.randrange(8))
        with pytest.raises(StoreError, match=r"00000.h5 is damaged"):
            _read_all(StoreReader(tmp_path))
        path.write_bytes(sound)
    _read_all(StoreReader(tmp_path))


def _read_all(reader: StoreReader) -> None:
    for path in reader.images:
        for array in reader.arrays:
            reader.read(path, array)


def test_files_that_belong_to_no_shard_are_reported(tmp_path: Path) -> None:
    build(tmp_path)
    (tmp_path / "shards/00002.h5").write_bytes(b"")
    (tmp_path / "README.md").write_bytes(b"")
    assert verify_store(tmp_path) == [f"{tmp_path}/shards/00002.h5 is no file of this store"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[::-1], "canonical form"),
        (lambda lines: [*lines, lines[0]], "image 'a.jpg' stands twice"),
        (lambda lines: [lines[0].replace(b":", b": "), *lines[1:]], "canonical form"),
        (lambda lines: [lines[0].replace(b"a.jpg", b"../a.jpg"), *lines[1:]], "image path '../a.jpg'"),
        (lambda lines: [lines[0].replace(b"path", b"file"), *lines[1:]], "line 1: key 'file' is unknown"),
        (lambda lines: lines[:-1], "do not agree"),
    ],
)
def test_a_forged_list_with_right_hashes_is_refused(tmp_path: Path, change: Callable, message: str) -> None:
    build(tmp_path)
    path, store = tmp_path / "images.jsonl", json.loads((tmp_path / "store.json").read_text())
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    del store["self_sha256"]
    store["images_sha256"] = files.hash_file(path)[1]
    (tmp_path / "store.json").write_bytes(files.seal(store))
    with pytest.raises(StoreError, match=re.escape(message)):
        StoreReader(tmp_path)


@pytest.mark.torture("security", "HDF5 of another schema: links, virtual, external, chunked, filters")
def test_a_forged_shard_with_right_hashes_everywhere_is_refused(tmp_path: Path) -> None:
    build(tmp_path)
    path, record_path = tmp_path / "shards/00001.h5", tmp_path / "shards/00001.json"
    with h5py.File(path, "r+") as file:
        del file["feature"]
        file["feature"] = h5py.ExternalLink("/etc/passwd", "/feature")
    record = json.loads(record_path.read_text())
    del record["self_sha256"]
    size, digest = files.hash_file(path)
    with path.open("rb", buffering=0) as raw:
        spans = shards.payload([LATENT, FEATURE], 2, record["offsets"])
        index = shards.index_sha256(raw, spans, size)
    record |= {"file_size": size, "file_sha256": digest, "index_sha256": index}
    record_path.write_bytes(files.seal(record))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["self_sha256"]
    manifest["shards"][1] = {"file_size": size, "file_sha256": digest}
    manifest["shards"][1]["record_sha256"] = files.hash_file(record_path)[1]
    (tmp_path / "manifest.json").write_bytes(files.seal(manifest))
    with pytest.raises(StoreError, match="feature is a link to elsewhere"):
        StoreReader(tmp_path).read("e.jpg", "latent")
    assert ["feature is a link to elsewhere" in problem for problem in verify_store(tmp_path)] == [True]
