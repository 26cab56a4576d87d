"""The bytes of a shard, its exact schema, strict JSON and publishing by rename."""

import errno
import hashlib
import json
import os
import resource
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest

from theworld.store import shard
from theworld.store.shard import ArraySpec, ImageEntry
from theworld.utils import files
from theworld.utils.files import StoreError

LATENT = ArraySpec("latent", (2, 2), "bfloat16")
ROWS = [ImageEntry("a.jpg", "aa" * 32), ImageEntry("b.jpg", "bb" * 32)]
VALUES = {"latent": np.array([[[1, 2], [3, 4]], [[5, 6], [7, 0x3F80]]], np.uint16)}


@pytest.mark.parametrize(
    "path", ["", "/a.jpg", "../a", "a/../b", "./a", "a//b", "a\0b", "a\\b", "C:/a", "a/", "\udc80"]
)
@pytest.mark.torture("security", "paths in image lists: absolute, .., NUL, drives")
def test_a_path_that_could_leave_the_folder_is_refused(path: str) -> None:
    with pytest.raises(StoreError, match="image path"):
        ImageEntry(path, "00" * 32)


@pytest.mark.parametrize("sha256", ["", "0" * 63, "A" * 64, "g" * 64])
def test_a_hash_is_64_lower_case_digits(sha256: str) -> None:
    with pytest.raises(StoreError, match="64 hex digits"):
        ImageEntry("a", sha256)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        ("Latent", (1,), "float32", "array name"),
        ("a_crc32", (1,), "float32", "array name"),
        ("a", (0,), "float32", "shape"),
        ("a", (True,), "float32", "shape"),
        ("a", (1,), "float64", "dtype"),
        ("a", (1 << 30,), "float32", "bytes a row"),
    ],
)
def test_an_ill_formed_array_is_refused(name: str, shape: tuple, dtype: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        ArraySpec(name, shape, dtype)


def test_literal_bytes_of_a_shard() -> None:
    data, fields = shard.pack([LATENT], ROWS, VALUES)
    start = fields["offsets"]["latent"]
    assert data[start:] == bytes.fromhex("0100 0200 0300 0400 0500 0600 0700 803f")
    assert fields["file_size"] == len(data) == start + 16
    assert fields["index_sha256"] == hashlib.sha256(data[:start]).hexdigest()
    # Equal with HDF5 1.14 and 2.0. Another value means another format: then SCHEMA_VERSION has to change.
    assert (
        fields["file_sha256"]
        == hashlib.sha256(data).hexdigest()
        == ("aaba2b80a9b5d46b4e709833a07d7596c201c1b35a475f0fe81748104e08ff4e")
    )


def test_the_index_hash_covers_exactly_what_is_not_payload() -> None:
    two = [LATENT, ArraySpec("scale", (), "float32")]
    data, fields = shard.pack(two, ROWS, {**VALUES, "scale": np.array([1, 2], np.float32)})
    spans = shard.payload(two, 2, fields["offsets"])
    inside = {byte for start, end in spans for byte in range(start, end)}
    assert len(inside) == 16 + 8
    outside = bytes(value for byte, value in enumerate(data) if byte not in inside)
    assert fields["index_sha256"] == hashlib.sha256(outside).hexdigest()


def test_any_hdf5_program_reads_a_shard(tmp_path: Path) -> None:
    data, _ = shard.pack([LATENT], ROWS, VALUES)
    (tmp_path / "0.h5").write_bytes(data)
    with h5py.File(tmp_path / "0.h5", "r") as file:
        assert sorted(file) == ["latent", "latent_crc32", "source_sha256"]
        assert np.array_equal(file["latent"][()], VALUES["latent"])
        assert file["source_sha256"][1].tobytes().hex() == "bb" * 32
        assert file["latent_crc32"].dtype == "<u4"


# --- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 1}', "'a' stands twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": "\u00e4"}', "not valid JSON"),
        ("[1]", "expected an object"),
        ('{"a": ' + "[" * 100_000, "not valid JSON"),
        ('{"a": ' + "1" * 5000 + "}", "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_json_is_parsed_strictly(text: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        files.parse_json(text.encode(), "x.json")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"number": 1, "sha256": "0" * 64, "more": 1}, "'more' is unknown"),
        ({"number": 1}, "'sha256' is missing"),
        ({"number": True, "sha256": "0" * 64}, "number is True, expected int"),
        ({"number": -1, "sha256": "0" * 64}, "number is -1, expected int"),
        ({"number": 1, "sha256": "0"}, "expected 64 hex digits"),
        ({"schema_version": 2}, "schema_version is 2, this program reads 1"),
    ],
)
def test_keys_and_types_are_exact(tmp_path: Path, fields: dict, message: str) -> None:
    (tmp_path / "x.json").write_bytes(files.seal(fields))
    with pytest.raises(StoreError, match=message):
        files.read_sealed(tmp_path / "x.json", {"number": int, "sha256": str})


@pytest.mark.parametrize(
    ("old", "new"), [("1.5", "2.5"), ("1.5", "1.50"), ("\n", "\n\n"), ("1e-05", "1E-05")]
)
def test_a_sealed_file_may_not_be_spelled_otherwise(tmp_path: Path, old: str, new: str) -> None:
    text = files.seal({"list": [1.5, 0.00001]}).decode()
    path = tmp_path / "x.json"
    path.write_text(text)
    assert files.read_sealed(path, {"list": list})[0] == {"list": [1.5, 0.00001]}
    path.write_text(text.replace(old, new))
    with pytest.raises(StoreError, match="damaged or was edited"):
        files.read_sealed(path, {"list": list})


def test_only_plain_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "target").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("fifo", "link", "."):
        with pytest.raises(StoreError, match="expected a plain file"):
            files.read_plain(tmp_path / name)
    with pytest.raises(StoreError, match="is missing"):
        files.read_plain(tmp_path / "target" / "below")


# --- publishing ----------------------------------------------------------------------------------


def test_publishing_twice_takes_equal_bytes_only(tmp_path: Path) -> None:
    path = tmp_path / "x"
    files.publish_bytes(path, b"one")
    files.publish_bytes(path, b"one")
    with pytest.raises(FileExistsError, match="already there with other content; it is never overwritten"):
        files.publish_bytes(path, b"two")
    assert path.read_bytes() == b"one"
    files.publish_bytes(path, b"two", overwrite=True)
    assert os.listdir(tmp_path) == ["x"]
    assert path.read_bytes() == b"two"


@pytest.mark.parametrize(("function", "calls"), [("fsync", 0), ("fsync", 1), ("replace", 0)])
def test_a_failing_disk_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, calls: int
) -> None:
    real, count = getattr(os, function), iter(range(100))

    def failing(*arguments: object) -> object:
        if next(count) >= calls:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, function, failing)
    with pytest.raises(OSError, match=r"3 bytes needed, .* free; nothing was published") as caught:
        files.publish_bytes(tmp_path / "x", b"one")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_a_write_that_the_system_cuts_short_publishes_nothing(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            files.publish_bytes(tmp_path / "x", bytes(5000))
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == errno.EFBIG
    assert os.listdir(tmp_path) == []


# --- exact schema --------------------------------------------------------------------------------


def _other_file(file: h5py.File) -> str:
    path = Path(file.filename).with_name("secret.h5")
    with h5py.File(path, "w") as other:
        other["latent"] = VALUES["latent"]
    return str(path)


def external_link(file: h5py.File) -> None:
    file["latent"] = h5py.ExternalLink(_other_file(file), "/latent")


def soft_link(file: h5py.File) -> None:
    file["latent"] = h5py.SoftLink("/source_sha256")


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((2, 2, 2), "<u2")
    layout[:] = h5py.VirtualSource(_other_file(file), "latent", (2, 2, 2))
    file.create_virtual_dataset("latent", layout)


def external_storage(file: h5py.File) -> None:
    file.create_dataset("latent", (2, 2, 2), "<u2", external=[(_other_file(file), 0, 16)])


def chunked(file: h5py.File) -> None:
    file.create_dataset("latent", data=VALUES["latent"], chunks=(1, 2, 2))


def compressed(file: h5py.File) -> None:
    file.create_dataset("latent", data=VALUES["latent"], compression="gzip")


def extendible(file: h5py.File) -> None:
    file.create_dataset("latent", data=VALUES["latent"], maxshape=(None, 2, 2))


def group(file: h5py.File) -> None:
    file.create_group("latent")


def other_dtype(file: h5py.File) -> None:
    file["latent"] = VALUES["latent"].astype(">u2")


def other_shape(file: h5py.File) -> None:
    file["latent"] = VALUES["latent"].reshape(2, 4)


def alias(file: h5py.File) -> None:
    del file["latent_crc32"]
    file["latent"] = VALUES["latent"]
    file["latent_crc32"] = file["latent"]


def extra_dataset(file: h5py.File) -> None:
    file["latent"] = VALUES["latent"]
    file["more"] = np.zeros(1)


def root_attribute(file: h5py.File) -> None:
    file["latent"] = VALUES["latent"]
    file.attrs["x"] = 1


def attribute(file: h5py.File) -> None:
    file["latent"] = VALUES["latent"]
    file["latent"].attrs["x"] = 1


def elsewhere(file: h5py.File) -> None:
    file["latent"] = VALUES["latent"]  # sound, but not where the record says


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (external_link, "latent is a link to elsewhere"),
        (soft_link, "latent is a link to elsewhere"),
        (virtual, "layout is"),
        (external_storage, "number of external files is 1"),
        (chunked, "layout is"),
        (compressed, "layout is"),
        (extendible, "layout is"),
        (group, "latent is no dataset"),
        (other_dtype, "dtype is >u2, expected <u2"),
        (other_shape, "shape is"),
        (alias, "latent_crc32: shape is"),
        (extra_dataset, "'more'"),
        (root_attribute, "1 attributes"),
        (attribute, "number of attributes is 1"),
        (elsewhere, "offset is"),
    ],
)
@pytest.mark.torture("security", "HDF5 of another schema: links, virtual, external, chunked, filters")
def test_a_forged_file_with_right_hashes_is_refused(tmp_path: Path, attack, message: str) -> None:
    path, offset = tmp_path / "0.h5", 16000
    with h5py.File(path, "w") as file:
        file["source_sha256"] = shard.source_table(ROWS)
        file["latent_crc32"] = shard.row_crc32(VALUES["latent"])
        attack(file)
    data = path.read_bytes().ljust(offset + 16, b"\0")
    path.write_bytes(data)
    record = {"num_rows": 2, "file_size": len(data), "offsets": {"latent": offset}}
    with path.open("rb", buffering=0) as raw:
        record["index_sha256"] = shard.index_sha256(raw, [(offset, offset + 16)], len(data))
    with pytest.raises(StoreError, match=message):
        shard.ShardFile(path, record, [LATENT], ROWS)


def test_a_shard_of_other_photographs_is_refused(tmp_path: Path) -> None:
    data, record = shard.pack([LATENT], ROWS, VALUES)
    (tmp_path / "0.h5").write_bytes(data)
    record["num_rows"] = 2
    with shard.ShardFile(tmp_path / "0.h5", record, [LATENT], ROWS).file:
        pass
    with pytest.raises(StoreError, match="source_sha256 is not that of the store's images"):
        shard.ShardFile(tmp_path / "0.h5", record, [LATENT], ROWS[::-1])


def test_a_file_that_is_no_hdf5_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.h5").write_bytes(bytes(3000))
    with pytest.raises(StoreError, match="no readable HDF5 file"):
        shard.read_tables(tmp_path / "0.h5", [LATENT], 2, {"latent": 100})


@pytest.mark.parametrize(
    "offsets", [{}, {"latent": -1}, {"latent": 1 << 40}, {"latent": 0, "more": 1}, {"latent": "0"}]
)
def test_offsets_outside_of_the_file_are_refused(tmp_path: Path, offsets: dict) -> None:
    _, described = shard.pack([LATENT], ROWS, VALUES)
    fixed = {"schema_version": 1, "shard": 0, "first_row": 0, "num_rows": 2}
    fixed |= {"fingerprint_sha256": "0" * 64, "rows_sha256": "0" * 64}
    path = tmp_path / "0.json"
    path.write_bytes(files.seal({**fixed, **described, "offsets": offsets}))
    with pytest.raises(StoreError, match="offsets"):
        shard.read_record(path, fixed, [LATENT])
    path.write_bytes(files.seal({**fixed, **described}))
    assert shard.read_record(path, fixed, [LATENT])[0] == json.loads(json.dumps({**fixed, **described}))
