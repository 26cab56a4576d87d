"""The list of photographs is the same whoever reads them."""

import json
import shutil
from pathlib import Path

import pytest

from theworld import listing, reading
from theworld.images import sha256
from theworld.listing import freeze, known_hashes, write_failures
from theworld.reading import Source
from theworld.store import ImageEntry


@pytest.fixture
def folder(photographs: Path, tmp_path: Path) -> Path:
    """40 photographs; 07.png is damaged, 20.png is missing."""
    for i in range(40):
        shutil.copy(photographs / "b.png", tmp_path / f"{i:02}.png")
    (tmp_path / "07.png").write_bytes((photographs / "b.png").read_bytes()[:99])
    (tmp_path / "20.png").unlink()
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_listing_is_sorted_and_names_what_cannot_be_read(
    folder: Path, photographs: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "FEW", 1)  # so that processes read
    names = [f"{i:02}.png" for i in range(40)]
    entries, failures = freeze(names[::-1], Source(folder, 10**6, workers), {})
    digest = sha256((photographs / "b.png").read_bytes())
    assert entries == [ImageEntry(name, digest) for name in names if name not in ("07.png", "20.png")]
    assert [path for path, _ in failures] == ["07.png", "20.png"]
    assert failures[0][1].startswith("damaged or not complete")
    assert failures[1][1] == f"no such file in {folder}"


def test_known_bytes_are_not_decoded_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    monkeypatch.setattr(listing, "decode", lambda data, path, max_pixels: decoded.append(path))
    digest = sha256((folder / "01.png").read_bytes())
    freeze(["01.png", "02.png", "03.png"], Source(folder, 10**6, 0), {"01.png": digest, "02.png": "0" * 64})
    assert decoded == ["02.png", "03.png"]


def test_failures_are_a_file_only_while_there_are_some(tmp_path: Path) -> None:
    path = tmp_path / "failures.jsonl"
    write_failures(tmp_path, [("a.png", "zero bytes"), ("ü.png", "gone")])
    write_failures(tmp_path, [("ü.png", "gone")])
    assert path.read_text(encoding="utf-8") == '{"path": "ü.png", "reason": "gone"}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["failures.jsonl"]
    write_failures(tmp_path, [])
    assert not path.exists()


def test_hashes_of_both_stores_are_known(tmp_path: Path) -> None:
    for store, path in (("latents", "a.png"), ("gemma_vision", "b.png")):
        (tmp_path / store).mkdir()
        (tmp_path / store / "images.jsonl").write_text(json.dumps({"path": path, "sha256": store}) + "\n")
    assert known_hashes(tmp_path) == {"a.png": "latents", "b.png": "gemma_vision"}
