"""Files that are published over what is there already, and the files that go with another."""

import os
from pathlib import Path

import pytest

from theworld.utils.files import check_output, companion, publish_bytes


@pytest.mark.parametrize("path", [Path("/dev/null"), Path("fifo")])
def test_a_device_or_fifo_is_refused_and_stays(path: Path, tmp_path: Path) -> None:
    path = tmp_path / path
    if not path.exists():
        os.mkfifo(path)
    kind = os.lstat(path).st_mode
    for write in (lambda: publish_bytes(path, b"data", overwrite=True), lambda: check_output(path)):
        with pytest.raises(OSError, match=f"a device, a FIFO or a socket, and a file is wanted.*{path}"):
            write()
    assert os.lstat(path).st_mode == kind


def test_a_link_stays_and_its_file_is_published(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to("there/file")
    publish_bytes(link, b"new", overwrite=True)
    assert os.readlink(link) == "there/file"
    assert (tmp_path / "there/file").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["link", "there"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("results.jsonl", "results.summary.json"),
        ("lr-0.001", "lr-0.001.summary.json"),
        ("lr-0.003", "lr-0.003.summary.json"),
        ("lr-0.003.jsonl", "lr-0.003.summary.json"),
    ],
)
def test_a_companion_keeps_the_whole_name(name: str, wanted: str) -> None:
    assert companion(Path("a.b") / name, ".summary.json", ".jsonl") == Path("a.b") / wanted
