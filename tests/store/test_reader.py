"""Stores of thousands of images: the list checked at once, few files open, rows read by several threads."""

import gc
import hashlib
import json
import os
import resource
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from theworld.store import format, reader
from theworld.store import shard as shards
from theworld.store.reader import StoreReader, verify_store
from theworld.store.shard import ArraySpec, ImageEntry
from theworld.store.writer import Store
from theworld.utils import files
from theworld.utils.files import StoreError

NUMBER = ArraySpec("number", (2,), "float32")
SCALAR = ArraySpec("scalar", (), "bfloat16")


def entry(name: str) -> ImageEntry:
    return ImageEntry(name, hashlib.sha256(name.encode()).hexdigest())


def build(root: Path, names: list[str], shard_size: int) -> list[ImageEntry]:
    """A finished store; `number` of row r is [r, -r], `scalar` is r mod 100, in bits. Its images, sorted."""
    store = Store.create(root, {"model": "x"}, [entry(name) for name in names], [NUMBER, SCALAR], shard_size)
    for shard in store.pending():
        rows = np.arange(len(store.shard_rows(shard))) + shard * shard_size
        numbers = np.stack([rows, -rows], 1).astype(np.float32)
        store.write_shard(shard, {"number": numbers, "scalar": (rows % 100).astype(np.uint16)})
    store.publish()
    return store.rows


def open_shards(root: Path) -> int:
    """How many files of the store this process has open."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        if os.path.lexists(link := f"/proc/self/fd/{descriptor}"):
            links.append(os.readlink(link))
    return sum(link.startswith(str(root)) for link in links)


# --- the list ------------------------------------------------------------------------------------

ODD = [
    'a"b.jpg',
    "ä.jpg",
    "a\nb.jpg",
    "a\rb\x1cc.jpg",
    "\U0001f600/\u2028.jpg",
    "a b/…c.jpg",
    "{}.jpg",
    "\x7f.jpg",
]


def test_a_list_of_thousands_with_odd_names_loads_as_it_was_written(tmp_path: Path) -> None:
    names = [*ODD, *(f"train2017/{number:012}.jpg" for number in range(3000))]
    rows = build(tmp_path, names, 512)
    written = (tmp_path / "images.jsonl").read_bytes()
    canonical = [{"path": name, "sha256": entry(name).sha256} for name in sorted(names)]
    assert written == b"".join(files.canonical_json(line) + b"\n" for line in canonical)
    loaded = StoreReader(tmp_path)
    assert list(loaded.images.items()) == [(row.path, row.sha256) for row in rows]
    assert [loaded.row(name) for name in sorted(names)] == list(range(3008))
    assert format._cut_lines(written) == loaded.images
    assert [vars_of(image) for image in format.parse_images(written, tmp_path)] == list(loaded.images.items())


def vars_of(image: ImageEntry) -> tuple[str, str]:
    return image.path, image.sha256


HASH = "0" * 64


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            f'{{"path":"b","path":"b","sha256":"{HASH}"}}\n',
            "line 2 is not valid JSON: key 'path' stands twice",
        ),
        (f'{{"path":5,"sha256":"{HASH}"}}\n', "line 2: path is 5, expected str"),
        (f'{{"path":"b","sha256":"{HASH[1:]}Z"}}\n', "line 2: sha256 is '000"),
        (f'{{"path":"b","sha256":"{HASH[1:]}"}}\n', "expected 64 hex digits"),
        (f'{{"path":"b","sha256":"{HASH}","x":1}}\n', "line 2: key 'x' is unknown"),
        ('{"path":"b"}\n', "line 2: key 'sha256' is missing"),
        (f'{{"sha256":"{HASH}","path":"b"}}\n', "canonical form"),
        (f'{{"path":"b","sha256":"{HASH}"}}', "canonical form"),
        (f'{{"path":"b","sha256":"{HASH}"}}\r\n', "canonical form"),
        (f'{{"path":"\\u0062","sha256":"{HASH}"}}\n', "canonical form"),
        (f'{{"path":"\\u00E4","sha256":"{HASH}"}}\n', "canonical form"),
        (f'{{"path":"\u00e4","sha256":"{HASH}"}}\n', "line 2 is not valid JSON"),
        (f'{{"path":"b\tc","sha256":"{HASH}"}}\n', "line 2 is not valid JSON: Invalid control character"),
        (f'{{"path":"\\ud800","sha256":"{HASH}"}}\n', "not Unicode"),
        (f'{{"path":"b\\\\c","sha256":"{HASH}"}}\n', "only relative paths"),
        (f'{{"path":{"[" * 100_000},"sha256":"{HASH}"}}\n', "line 2 is not valid JSON"),
        ("\n", "line 2 is not valid JSON"),
    ],
)
@pytest.mark.torture("security", "image lists spelled otherwise")
def test_each_way_to_spell_a_line_otherwise_is_refused(tmp_path: Path, line: str, message: str) -> None:
    build(tmp_path, ["a"], 1)
    path, store = tmp_path / "images.jsonl", json.loads((tmp_path / "store.json").read_text())
    path.write_bytes(path.read_bytes() + line.encode())
    del store["self_sha256"]
    store |= {"images_sha256": files.hash_file(path)[1], "num_images": 2, "num_rows": 2}
    (tmp_path / "store.json").write_bytes(files.seal(store))
    with pytest.raises(StoreError) as caught:
        format.Plan.load(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("path", "sha256"),
    [(name, HASH) for name in [*ODD, "a", "...", "a/.../b", "a" * 4096, "1:/a", "CC:/a", "a/C:", ".a", "a."]]
    + [
        (name, HASH)
        for name in ["", "/a", "../a", "a/../b", "./a", "a//b", "a\0b", "a\\b", "C:/a", "a/", "a/.."]
    ]
    + [(name, HASH) for name in [".", "..", "a/.", "z:", "\udc80", "a" * 4097, "ä/\ud800"]]
    + [("a", digits) for digits in ["", "0" * 63, "A" * 64, "g" * 64, "0" * 65, "\u0660" * 64]],
)
def test_many_entries_are_taken_exactly_where_each_is(path: str, sha256: str) -> None:
    try:
        taken = ImageEntry(path, sha256).path == path
    except StoreError:
        taken = False
    assert shards.well_formed([path], [sha256]) is taken
    assert shards.well_formed(["b", path, "c"], ["1" * 64, sha256, "2" * 64]) is taken


def test_the_nearest_of_thousands_of_names(tmp_path: Path) -> None:
    build(tmp_path, [f"train/{number:06}.jpg" for number in range(5000)], 2500)
    store = StoreReader(tmp_path)
    with pytest.raises(StoreError, match=r"not one of the 5000 in .*; nearest: 'train/003456.jpg'"):
        store.read("003456.jpg", "number")
    with pytest.raises(StoreError, match=r"nearest: 'train/003456.jpg'"):
        store.row("train/003456.jpeg")


# --- open files ----------------------------------------------------------------------------------


def test_only_the_files_used_last_stay_open(tmp_path: Path) -> None:
    rows = build(tmp_path, [f"{number:04}.jpg" for number in range(2000)], 50)
    store = StoreReader(tmp_path)
    store.max_open_files = 3
    for step in (1, 7, 51):
        for row in range(0, 2000, step):
            assert store.read(rows[row].path, "number").tolist() == [row, -row]
            assert store.read(rows[row].path, "scalar").tolist() == row % 100
        assert open_shards(tmp_path) == 3
    store.read_row(0, "number")
    assert list(store._recent)[-1] == 0
    store.close()
    assert open_shards(tmp_path) == 0
    assert store.read_row(1999, "number").tolist() == [1999, -1999]


def test_a_file_that_was_closed_and_opened_again_is_checked_as_before(tmp_path: Path) -> None:
    build(tmp_path, [f"{number}.jpg" for number in range(4)], 1)
    store = StoreReader(tmp_path)
    store.max_open_files = 1
    store.read_row(0, "number")
    store.read_row(1, "number")
    path = tmp_path / "shards/00000.h5"
    data = bytearray(path.read_bytes())
    data[json.loads((tmp_path / "shards/00000.json").read_text())["offsets"]["number"]] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"00000.h5 is damaged: number of image '0.jpg' has CRC-32"):
        store.read_row(0, "number")
    store.read_row(1, "number")
    path.unlink()
    with pytest.raises(StoreError, match=r"00000.h5 is missing"):
        store.read_row(0, "number")


def test_files_are_closed_without_a_warning_and_never_under_a_reader(tmp_path: Path) -> None:
    build(tmp_path, [f"{number}.jpg" for number in range(3)], 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store = StoreReader(tmp_path)
        store.max_open_files = 1
        store.read_row(0, "number")
        held = store._shards[0].file
        store.read_row(1, "number")
        assert store._shards[0].file is None
        assert held is not None
        assert not held.closed
        del held, store
        gc.collect()
    assert caught == []
    assert open_shards(tmp_path) == 0


def test_threads_share_a_reader_that_closes_files_all_the_time(tmp_path: Path) -> None:
    build(tmp_path, [f"{number:04}.jpg" for number in range(2000)], 50)
    store = StoreReader(tmp_path)
    store.max_open_files = 2

    def work(seed: int) -> bool:
        chosen = np.random.default_rng(seed).integers(0, 2000, 2000).tolist()
        return all(store.read_row(row, "number").tolist() == [row, -row] for row in chosen)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [True] * 4
    assert open_shards(tmp_path) <= 2 + 4


def test_a_process_with_few_files_reads_a_store_of_many_shards(tmp_path: Path) -> None:
    build(tmp_path, [f"{number:04}.jpg" for number in range(300)], 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            limit = len(os.listdir("/proc/self/fd")) + 40
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            store = StoreReader(tmp_path)
            read = [store.read_row(row, "number").tolist() for row in range(300)]
            code = 0 if read == [[row, -row] for row in range(300)] and store.verify() == [] else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("limit", "expected"), [(1024, 256), (3, 1), (1 << 20, 4096), (resource.RLIM_INFINITY, 4096)]
)
def test_a_quarter_of_the_files_that_a_process_may_open(
    monkeypatch: pytest.MonkeyPatch, limit: int, expected: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, limit))
    assert reader.max_open_files() == expected


def test_a_row_is_read_into_the_callers_array(tmp_path: Path) -> None:
    build(tmp_path, ["a", "b"], 2)
    store, out = StoreReader(tmp_path), np.zeros((2, 2), np.float32)
    assert store.read_row(1, "number", out[0]) is not None
    assert out.tolist() == [[1, -1], [0, 0]]


# --- writing -------------------------------------------------------------------------------------


def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files that are hashed or compared whole from now on."""
    names: list[str] = []
    real, real_holds = files.hash_file, files.holds

    def holds(path: Path, data: bytes) -> bool:
        names.append(path.name)
        return real_holds(path, data)

    def hash_file(path: Path) -> tuple[int, str]:
        names.append(path.name)
        return real(path)

    for module in (files, shards):
        monkeypatch.setattr(module, "hash_file", hash_file)
    monkeypatch.setattr(files, "holds", holds)
    return names


def test_pending_reads_the_chosen_shards_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = build(tmp_path, [f"{number:04}.jpg" for number in range(2000)], 100)
    (tmp_path / "manifest.json").unlink()
    store = Store.create(tmp_path, {"model": "x"}, rows, [NUMBER, SCALAR], 100)
    for shard in (4, 7):
        with (tmp_path / f"shards/{shard:05}.h5").open("r+b") as file:
            file.truncate(1000)
    names = seen(monkeypatch)
    assert store.pending(iter([8, 3, 7, 3])) == [7]
    shard_files = [name for name in names if name.endswith(".h5")]
    assert shard_files == ["00003.h5", "00007.h5", "00008.h5"]
    assert [line.split(" has ")[0] for line in caplog.messages] == ["shard 7"]
    assert (store.pending([]), store.pending([4]), store.pending(range(5, 20)), store.pending()) == (
        [],
        [4],
        [7],
        [4, 7],
    )
    for wrong in ([20], [-1], [0, 99]):
        with pytest.raises(IndexError, match="of 20"):
            store.pending(wrong)


def test_the_list_is_hashed_once_for_all_shards_and_again_when_it_was_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [entry(f"{number:04}.jpg") for number in range(1000)]
    store = Store.create(tmp_path, {"model": "x"}, images, [NUMBER], 100)
    names = seen(monkeypatch)
    for shard in range(9):
        store.write_shard(shard, {"number": np.zeros((100, 2), np.float32)})
    assert names.count("images.jsonl") == 1
    path = tmp_path / "images.jsonl"
    data = path.read_bytes()
    os.utime(path, (1, 1))
    store.write_shard(0, {"number": np.zeros((100, 2), np.float32)})
    assert names.count("images.jsonl") == 2
    for damaged in (data.replace(b"0003.jpg", b"0003.JPG"), data[:-1], b""):
        files.publish_bytes(path, damaged, overwrite=True)
        for call in (lambda: store.write_shard(9, {"number": np.zeros((100, 2), np.float32)}), store.pending):
            with pytest.raises(StoreError, match=r"images\.jsonl was changed by another process or damaged"):
                call()
    path.unlink()
    with pytest.raises(StoreError, match=r"images\.jsonl was changed"):
        store.pending()


def damage_list(root: Path) -> None:
    data = (root / "images.jsonl").read_bytes()
    (root / "images.jsonl").write_bytes(data.replace(b"a.jpg", b"b.jpg"))


@pytest.mark.parametrize("damage", [damage_list, lambda root: (root / "images.jsonl").unlink()])
def test_a_finished_store_with_a_damaged_list_is_not_read_and_its_writer_mends_it(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    rows = build(tmp_path, ["a.jpg", "c.jpg"], 1)
    damage(tmp_path)
    with pytest.raises(
        StoreError, match=r"images\.jsonl is (damaged|missing).*; mend it with: python tools/extract_"
    ):
        StoreReader(tmp_path)
    assert len(verify_store(tmp_path)) == 1
    Store.create(tmp_path, {"model": "x"}, rows, [NUMBER, SCALAR], 1)
    assert verify_store(tmp_path) == []


def test_two_threads_that_open_one_shard_both_read_it(tmp_path: Path) -> None:
    build(tmp_path, ["a", "b"], 2)
    store, start = StoreReader(tmp_path), threading.Barrier(2)
    real = store._open_shard

    def open_shard(shard: int) -> shards.ShardFile:
        start.wait(10)  # until both found it closed
        return real(shard)

    store._open_shard = open_shard  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as pool:
        assert [row.tolist() for row in pool.map(lambda row: store.read_row(row, "number"), (0, 1))] == [
            [0, 0],
            [1, -1],
        ]
