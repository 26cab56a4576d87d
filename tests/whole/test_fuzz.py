"""Whatever stands in a file: it is read as it was meant, or refused in words. Any other exception is a defect."""

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torture import Tally

from theworld.config.config import FIELDS, Config, load_config, save_config
from theworld.data.captions import load_captions
from theworld.data.vsr import load_statements
from theworld.store import shard as shards
from theworld.store.format import Plan, known_hashes, read_failures, read_manifest
from theworld.store.reader import StoreReader
from theworld.store.shard import ArraySpec, ImageEntry
from theworld.store.verify import examine
from theworld.store.writer import Store
from theworld.utils import files
from theworld.utils.files import FAILURES, StoreError

T = TypeVar("T")
TEXT = st.text(max_size=12) | st.sampled_from(
    ["", "a/../b", "/etc/passwd", "a\0b", "\ud800", "0" * 64, "1e999", "NaN"]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**31, 2**63, 2**200, True, 1e308])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
TOKENS = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"\n",
    b"\r",
    b"\0",
    b"NaN",
    b"1e999",
    b"-",
    b"\xff",
    b"/*",
]
TOKENS += [
    b"//",
    b"#",
    b"null",
    b"\\ud800",
    b"\xef\xbb\xbf",
    b"[" * 3000,
    b"9" * 5000,
    b'"a":1,"a":1',
    b"0.1",
    b" ",
]
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "copy", "token"]),
        st.floats(0, 1),
        st.floats(0, 0.2),
        st.integers(0, 7),
        st.sampled_from(TOKENS),
    ),
    min_size=1,
    max_size=4,
)


def changed(data: bytes, changes: list[tuple[str, float, float, int, bytes]]) -> bytes:
    """Bytes with bits flipped, parts cut out, copied or replaced by a token."""
    for kind, where, length, bit, token in changes:
        start = int(where * len(data))
        end = start + int(length * len(data)) + 1
        part = {"flip": data[start:end], "cut": b"", "copy": data[start:end] * 2, "token": token}[kind]
        if kind == "flip":
            part = bytes([part[0] ^ 1 << bit]) + part[1:] if part else b""
        data = data[:start] + part + data[end:]
    return data


def read_or_words(read: Callable[[], T]) -> T | str:
    """What is read, or the words in which it is refused."""
    try:
        return read()
    except ValueError as error:
        return str(error)


def fuzz(tally: Tally, full: int, sample: int, **strategies: Any) -> Callable[[Callable[..., None]], None]:
    """Runs what it decorates on so many examples."""
    number = tally.number(full, sample)
    quiet = settings(
        max_examples=number,
        deadline=None,
        database=None,
        derandomize=not tally.full,
        suppress_health_check=list(HealthCheck),
    )

    def run(check: Callable[..., None]) -> None:
        calls = 0

        def counted(**arguments: Any) -> None:
            nonlocal calls
            calls += 1
            check(**arguments)

        quiet(given(**strategies)(counted))()
        tally(inputs=calls)

    return run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A finished store of two shards."""
    images = [ImageEntry(f"{name}.jpg", files.canonical_sha256(name)) for name in "abc"]
    store = Store.create(
        tmp_path / "latents", {"model": "x", "mean": [0.5, 1]}, images, [ArraySpec("a", (2,), "float32")], 2
    )
    for shard in range(2):
        rows = len(store.shard_rows(shard))
        store.write_shard(shard, {"a": np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)})
    store.publish()
    return store.root


ROW = {"image": "a/b.jpg", "caption": "The cat is left of the dog.", "label": 1, "relation": "left of"}


@pytest.mark.torture("security", "fuzzing: settings")
def test_settings_are_valid_or_refused(tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "run.json"
    save_config(Config(), path)
    valid = path.read_bytes()
    texts = st.builds(changed, st.just(valid), CHANGES)
    objects = st.dictionaries(st.sampled_from(sorted(FIELDS)) | TEXT, VALUES, max_size=4).map(
        lambda values: json.dumps(values).encode()
    )

    @fuzz(tally, 12_000, 150, data=texts | objects)
    def check(data: bytes) -> None:
        path.write_bytes(data)
        config = read_or_words(lambda: load_config(path))
        if isinstance(config, str):
            assert str(path) in config
            return
        save_config(config, tmp_path / "again.json")
        assert load_config(tmp_path / "again.json") == config


@pytest.mark.torture("security", "fuzzing: annotations")
def test_annotations_are_statements_or_refused(tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "train.jsonl"
    valid = b"".join(json.dumps({**ROW, "image": f"{i}.jpg"}).encode() + b"\n" for i in range(3))
    rows = st.fixed_dictionaries({}, optional={key: VALUES | st.just(value) for key, value in ROW.items()})
    lines = rows.map(lambda row: json.dumps(row).encode() + b"\n")

    @fuzz(tally, 20_000, 150, data=st.builds(changed, st.just(valid), CHANGES) | lines)
    def check(data: bytes) -> None:
        path.write_bytes(data)
        statements = read_or_words(lambda: load_statements(path, "train"))
        if isinstance(statements, str):
            assert str(path) in statements
            return
        for statement in statements:
            image = PurePosixPath(statement.image)
            assert not image.is_absolute()
            assert ".." not in image.parts
            assert "\0" not in statement.image
            assert statement.label in (0, 1)


@pytest.mark.torture("security", "fuzzing: captions")
@pytest.mark.parametrize("name", ["own.jsonl", "coco.json"])
def test_captions_are_texts_of_the_photographs_or_refused(tmp_path: Path, name: str, tally: Tally) -> None:
    path = tmp_path / name
    row = {"image": "a.jpg", "caption": "A dog."}
    image, annotation = {"id": 7, "file_name": "a.jpg"}, {"image_id": 7, "caption": "A dog."}
    coco = {"images": [image], "annotations": [annotation]}
    valid = json.dumps(coco if name == "coco.json" else row).encode()

    def like(whole: dict[str, Any]) -> Any:
        return st.fixed_dictionaries(
            {}, optional={key: VALUES | st.just(value) for key, value in whole.items()}
        )

    lists = {
        "images": st.lists(like(image), max_size=2),
        "annotations": st.lists(like(annotation), max_size=2),
    }
    objects = st.fixed_dictionaries(lists) if name == "coco.json" else like(row)
    data = st.builds(changed, st.just(valid), CHANGES) | objects.map(lambda own: json.dumps(own).encode())

    @fuzz(tally, 4000, 150, data=data)
    def check(data: bytes) -> None:
        path.write_bytes(data)
        captions = read_or_words(lambda: load_captions(path, ["a.jpg"]))
        if isinstance(captions, str):
            assert str(path) in captions
            return
        assert list(captions) == ["a.jpg"]
        assert all(text.strip() for text in captions["a.jpg"])


@pytest.mark.torture("security", "fuzzing: records, manifest, store.json, images.jsonl")
@pytest.mark.parametrize("name", ["store.json", "images.jsonl", "manifest.json", "shards/00000.json"])
def test_other_bytes_are_never_taken_for_a_store(root: Path, name: str, tally: Tally) -> None:
    path = root / name
    valid = path.read_bytes()

    @fuzz(tally, 4000, 60, data=st.builds(changed, st.just(valid), CHANGES) | st.binary(max_size=60))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        problems = examine(root)
        assert (problems == []) == (data == valid)
        with contextlib.nullcontext() if data == valid else pytest.raises(StoreError):
            StoreReader(root).read("a.jpg", "a")
        with contextlib.suppress(StoreError):
            known_hashes(root.parent)

    path.write_bytes(valid)


@pytest.mark.torture("security", "fuzzing: the same with right seals and hashes, as a forger would")
@pytest.mark.parametrize("name", ["store.json", "manifest.json", "shards/00000.json"])
def test_forged_fields_are_refused_or_the_same_store(root: Path, name: str, tally: Tally) -> None:
    path = root / name
    valid = path.read_bytes()
    sound = json.loads(valid)
    del sound["self_sha256"]
    places = [(key,) for key in sound]
    places += [(key, inner) for key, value in sound.items() if isinstance(value, dict) for inner in value]
    places += [("shards", 0), ("shards", 0, "file_size")] if "shards" in sound else []
    places += [("arrays", 0), ("arrays", 0, "shape"), ("arrays", 0, "name")] if "arrays" in sound else []

    @fuzz(tally, 4000, 60, place=st.sampled_from(places), value=VALUES)
    def check(place: tuple, value: Any) -> None:
        fields = json.loads(json.dumps(sound))
        inner = fields
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        try:
            path.write_bytes(files.seal(fields))
        except (ValueError, UnicodeEncodeError):  # NaN: cannot be written in the first place
            return
        with contextlib.suppress(StoreError):
            plan = Plan.load(root)
            assert plan.store_bytes == (root / "store.json").read_bytes()
            assert plan.images_bytes == (root / "images.jsonl").read_bytes()
            manifest = read_manifest(root)
            assert manifest is not None
            record, _ = shards.read_record(root / "shards/00000.json", plan.record_fields(0), plan.arrays)
            spans = shards.payload(plan.arrays, record["num_rows"], record["offsets"])
            assert all(0 <= start <= end <= record["file_size"] for start, end in spans)
        problems = examine(root)
        assert (problems == []) == (path.read_bytes() == valid)

    path.write_bytes(valid)


@pytest.mark.torture("security", "fuzzing: forged lists of images")
def test_forged_paths_never_leave_the_folder(root: Path, tally: Tally) -> None:
    store = json.loads((root / "store.json").read_bytes())
    del store["self_sha256"]

    @fuzz(tally, 6000, 60, path=TEXT, sha256=st.just("0" * 64) | TEXT)
    def check(path: str, sha256: str) -> None:
        lines = [{"path": "a.jpg", "sha256": "1" * 64}, {"path": path, "sha256": sha256}]
        lines.sort(key=lambda line: line["path"])
        data = b"".join(files.canonical_json(line) + b"\n" for line in lines)
        (root / "images.jsonl").write_bytes(data)
        number = {"images_sha256": files.hash_file(root / "images.jsonl")[1], "num_images": 2, "num_rows": 2}
        (root / "store.json").write_bytes(files.seal({**store, **number}))
        try:
            images = Plan.load(root).images
        except StoreError:
            return
        for name in images:
            parts = name.split("/")
            assert name
            assert not {"", ".", ".."} & set(parts)
            assert "\0" not in name
            assert "\\" not in name


@pytest.mark.torture("security", "fuzzing: failures.jsonl")
def test_a_list_of_failures_is_read_or_refused(tmp_path: Path, tally: Tally) -> None:
    valid = b'{"path": "a.jpg", "reason": "zero bytes"}\n{"path": "b.jpg", "reason": "gone"}\n'
    lines = VALUES.map(lambda value: json.dumps(value).encode())

    @fuzz(tally, 6000, 100, data=st.builds(changed, st.just(valid), CHANGES) | lines)
    def check(data: bytes) -> None:
        (tmp_path / FAILURES).write_bytes(data)
        with contextlib.suppress(StoreError):
            for path, reason in read_failures(tmp_path).items():
                assert isinstance(path, str)
                assert isinstance(reason, str)


def in_child(work: Callable[[], None], seconds: int = 10) -> int:
    """The exit status of a process that does `work`: 0 done, 1 an exception, 98 no end, -N a signal."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, lambda *_: os._exit(98))
        signal.alarm(seconds)
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.torture("security", "fuzzing: HDF5 files with right hashes, as a forger would")
def test_a_forged_hdf5_file_is_refused(root: Path, tally: Tally) -> None:
    path, record_path, manifest_path = (
        root / n for n in ("shards/00000.h5", "shards/00000.json", "manifest.json")
    )
    valid, record = path.read_bytes(), json.loads(record_path.read_bytes())
    manifest = json.loads(manifest_path.read_bytes())
    del record["self_sha256"], manifest["self_sha256"]
    spans = [(record["offsets"]["a"], record["offsets"]["a"] + 2 * 8)]
    end = record["offsets"]["a"]

    def work(chunk: list[list[tuple[int, int]]]) -> None:
        for flips in chunk:
            data = bytearray(valid)
            for byte, bit in flips:
                data[byte % end] ^= 1 << bit
            path.write_bytes(data)
            size, digest = files.hash_file(path)
            with path.open("rb", buffering=0) as raw:
                index = shards.index_sha256(raw, spans, size)
            record.update(file_size=size, file_sha256=digest, index_sha256=index)
            record_path.write_bytes(files.seal(record))
            manifest["shards"][0] = {"file_size": size, "file_sha256": digest}
            manifest["shards"][0]["record_sha256"] = files.hash_file(record_path)[1]
            manifest_path.write_bytes(files.seal(manifest))
            with contextlib.suppress(StoreError):
                values = StoreReader(root).read("a.jpg", "a").tolist()
                assert values == [0.0, 1.0]

    statuses: dict[int, int] = {}

    @fuzz(tally, 60, 2, seed=st.integers(0, 2**32))
    def check(seed: int) -> None:
        generator = np.random.default_rng(seed)
        chunk = [
            [
                (int(generator.integers(end)), int(generator.integers(8)))
                for _ in range(int(generator.integers(1, 4)))
            ]
            for _ in range(100)
        ]
        status = in_child(lambda: work(chunk))
        statuses[status] = statuses.get(status, 0) + 1
        assert status == 0

    tally(files_in_all=100 * sum(statuses.values()))
