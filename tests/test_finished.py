"""Rows on disk before their shard is: whole, of the right photograph and fingerprint, or set aside."""

import json
from pathlib import Path

import numpy as np
import pytest

from theworld.files import StoreError
from theworld.finished import FinishedRows, refusals
from theworld.shards import ArraySpec

A, B, C = ("a" * 64, "b" * 64, "c" * 64)  # photographs
F, G = ("1" * 64, "2" * 64)  # fingerprints


def rows_in(root: Path, fingerprint: str = F, dtype: str = "float32") -> FinishedRows:
    return FinishedRows(root, fingerprint, ArraySpec("latents", (2, 3), dtype))


def row(dtype: str = "float32") -> np.ndarray:
    values = np.arange(6).reshape(2, 3)
    return values.astype({"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_row_reads_back_as_it_was_written(tmp_path: Path, dtype: str) -> None:
    finished = rows_in(tmp_path, dtype=dtype)
    assert finished.read(A) is None
    assert finished.missing([A, B]) == [A, B]
    finished.write(A, row(dtype))
    finished.write(A, row(dtype))  # the same again is no matter
    found = rows_in(tmp_path, dtype=dtype).read(A)
    assert found is not None
    assert found.dtype == row(dtype).dtype
    assert np.array_equal(found, row(dtype))
    assert finished.missing([A, B]) == [B]
    assert [p.name for p in (tmp_path / "finished").iterdir()] == [f"{A}.row"]
    assert finished.notes == []


def test_the_bytes_of_a_row(tmp_path: Path) -> None:
    rows_in(tmp_path).write(A, row())
    header, data = (tmp_path / "finished" / f"{A}.row").read_bytes().split(b"\n", 1)
    assert header == (
        b'{"array":"latents","crc32":"91e79017","dtype":"float32","fingerprint_sha256":"%s","schema_version":1,'
        b'"shape":[2,3],"source_sha256":"%s"}' % (F.encode(), A.encode())
    )
    assert data == row().tobytes()


def test_any_damaged_byte_is_found_and_the_row_set_aside(tmp_path: Path) -> None:
    finished = rows_in(tmp_path)
    finished.write(A, row())
    path = tmp_path / "finished" / f"{A}.row"
    sound = path.read_bytes()
    for position in range(len(sound)):
        damaged = bytearray(sound)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert finished.read(A) is None
        assert not path.exists()
    for damaged in (sound[:-1], sound + b"\0", b""):
        path.write_bytes(damaged)
        assert finished.read(A) is None
    assert len(finished.notes) == len(list((tmp_path / "set-aside").iterdir())) == len(sound) + 3
    assert "was moved to" in finished.notes[0]


def test_a_row_of_another_fingerprint_or_photograph_or_behind_a_link_is_not_used(tmp_path: Path) -> None:
    rows_in(tmp_path, G).write(A, row())
    assert rows_in(tmp_path).read(A) is None
    finished = rows_in(tmp_path)
    finished.write(A, row())
    folder = tmp_path / "finished"
    (folder / f"{B}.row").write_bytes((folder / f"{A}.row").read_bytes())
    (folder / f"{C}.row").symlink_to(folder / f"{A}.row")
    assert finished.read(B) is None
    assert finished.read(C) is None
    assert finished.read(A) is not None
    assert len(finished.notes) == 2


def test_what_is_no_row_is_not_written(tmp_path: Path) -> None:
    finished = rows_in(tmp_path)
    with pytest.raises(StoreError, match=r"latents is float32 \(6,\), expected float32 \(2, 3\)"):
        finished.write(A, row().reshape(6))
    with pytest.raises(StoreError, match="latents is float64"):
        finished.write(A, row().astype("<f8"))
    with pytest.raises(StoreError, match="not finite for the photograph of SHA-256 aaaa"):
        finished.write(A, row() + np.float32("inf"))
    finished.write(A, row())
    with pytest.raises(StoreError, match="already there with other content"):
        finished.write(A, row() + 1)


def test_a_refusal_stays_and_is_found_damaged(tmp_path: Path) -> None:
    finished = rows_in(tmp_path)
    finished.refuse(B, "a reason")
    assert (finished.refusal(A), finished.refusal(B)) == (None, "a reason")
    assert finished.missing([A, B]) == [A]
    assert refusals(tmp_path) == {B: "a reason"}
    path = tmp_path / "finished" / f"{B}.refused"
    assert json.loads(path.read_text())["reason"] == "a reason"
    path.write_text(path.read_text().replace("a reason", "no reason"))
    assert refusals(tmp_path) == {}
    assert finished.refusal(B) is None
    assert "damaged or was edited" in finished.notes[0]
    rows_in(tmp_path, G).refuse(B, "a reason")
    assert rows_in(tmp_path).refusal(B) is None


def test_removal_leaves_refusals_and_rows_of_others(tmp_path: Path) -> None:
    finished = rows_in(tmp_path)
    finished.write(A, row())
    finished.write(B, row())
    finished.refuse(C, "a reason")
    finished.remove([A, C])
    assert sorted(p.name for p in (tmp_path / "finished").iterdir()) == [f"{B}.row", f"{C}.refused"]
    (tmp_path / "finished" / f"{C}.refused").unlink()
    finished.remove([B])
    assert not (tmp_path / "finished").exists()
    finished.remove([B])
