"""Photographs come into the folder whole, once, and each that does not is named."""

import json
import os
import shutil
import socket
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from tls_server import Handler, make_certificate, serve

from theworld import gather as gathering
from theworld.config import Config
from theworld.fetch import COCO_HOST, CertificateRefused, Fetcher, FetchError, Limits, checked, secure_url
from theworld.gather import CocoCopies, CocoFolder, Downloads, Gathered, gather, links_of, plan_images
from theworld.images import ImageError
from theworld.vsr import Statement, load_statements

VSR = ROOT.parent / "shared" / "vsr"

LINKS = {name: f"https://photographs.test/train2017/{name}" for name in ("a.png", "b.png", "c.png")}


class Network:
    """Stands in for `Fetcher`: gives files of a folder, or the errors that it is told."""

    def __init__(self, folder: Path, **errors: FetchError) -> None:
        self.folder = folder
        self.errors = errors
        self.asked: list[str] = []

    def photograph(self, link: str, name: str) -> bytes:
        self.asked.append(link)
        if name[0] in self.errors:
            raise self.errors[name[0]]
        return (self.folder / name).read_bytes()


def downloads(network: Network) -> Downloads:
    return Downloads(network)  # type: ignore[arg-type]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def statement(image: str, link: str = "", index: int = 0) -> Statement:
    return Statement(image, "The cat is on the mat.", 1, "on", index, link)


def test_every_photograph_has_one_link() -> None:
    links = links_of([statement("b.png", "B"), statement("a.png", "A", 1), statement("b.png", "B", 2)])
    assert list(links.items()) == [("a.png", "A"), ("b.png", "B")]
    with pytest.raises(ValueError, match=r"image a\.png has two links, 'A' and 'B'; keep one"):
        links_of([statement("a.png", "A"), statement("a.png", "B", 1)])


@pytest.mark.parametrize(
    "name", ["x/a.png", "/a.png", "../a.png", "..", ".", ".a.png", "x\\a.png", "a\0.png", ""]
)
def test_a_name_that_is_no_plain_file_name_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match="is no plain file name") as caught:
        links_of([statement("b.png"), statement(name, index=6)])
    assert str(caught.value).startswith(f"image {name!r} (statement 7)")


def test_what_is_there_and_decodes_is_not_fetched_again(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((photographs / "a.png").read_bytes())
    (tmp_path / "b.png").write_bytes((photographs / "b.png").read_bytes()[:99])
    network = Network(photographs)
    assert gather(LINKS, tmp_path, downloads(network), 2) == Gathered(1, 2, [])
    assert sorted(network.asked) == [LINKS["b.png"], LINKS["c.png"]]
    assert names_in(tmp_path) == ["a.png", "b.png", "c.png"]
    for name in LINKS:
        assert (tmp_path / name).read_bytes() == (photographs / name).read_bytes()
    assert gather(LINKS, tmp_path, downloads(network), 2) == Gathered(3, 0, [])
    assert len(network.asked) == 2


def test_failures_are_listed_until_they_are_mended(photographs: Path, tmp_path: Path) -> None:
    network = Network(photographs, c=FetchError("HTTP status 404"), a=FetchError("cut off", may_pass=True))
    gathered = gather(LINKS | {"d.png": ""}, tmp_path, downloads(network), 2)
    reason = "the annotations have no image_link for it; take it from a COCO folder or zip"
    assert gathered == Gathered(0, 1, [("a.png", "cut off"), ("c.png", "HTTP status 404"), ("d.png", reason)])
    assert names_in(tmp_path) == ["b.png", "failures.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert rows == [{"path": name, "reason": reason} for name, reason in gathered.failures]
    network.errors = {}
    assert gather(LINKS, tmp_path, downloads(network), 2) == Gathered(1, 2, [])
    assert names_in(tmp_path) == ["a.png", "b.png", "c.png"]


def test_the_report_shows_the_first_five_failures(tmp_path: Path) -> None:
    failures = [(f"{i}.png", "gone") for i in range(7)]
    assert Gathered(1000, 2, failures).report(tmp_path).splitlines() == [
        *(f"{i}.png: gone" for i in range(5)),
        "and 2 more",
        "1,009 photographs: 1,000 there before, 2 new, 7 failed",
        f"all reasons: {tmp_path / 'failures.jsonl'}; the same command tries those again",
    ]
    assert Gathered(1, 2, []).report(tmp_path) == "3 photographs: 1 there before, 2 new, 0 failed"


@pytest.mark.parametrize("error", [FetchError("no answer", may_pass=True), CertificateRefused("unknown")])
def test_a_network_that_is_gone_is_not_asked_for_every_photograph(
    error: FetchError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "GIVE_UP", 3)
    network = Network(tmp_path, x=error)
    links = {f"x{i}.png": "https://photographs.test/x.png" for i in range(10)}
    gathered = gather(links, tmp_path / "images", downloads(network), 1)
    assert len(network.asked) == 3
    assert [reason for _, reason in gathered.failures] == [error.reason] * 3 + [
        "not tried: 3 downloads in a row had failed; run again"
    ] * 7


def test_missing_photographs_do_not_look_like_a_network_that_is_gone(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "GIVE_UP", 2)
    network = Network(photographs, x=FetchError("HTTP status 404"))
    links = {f"x{i}.png": "https://photographs.test/x.png" for i in range(5)} | LINKS
    assert len(gather(links, tmp_path, downloads(network), 1).failures) == 5
    assert len(network.asked) == 8


def test_a_disk_that_cannot_be_written_ends_the_call_and_its_downloads(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes, overwrite: bool) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(gathering, "publish_bytes", full)
    stop = threading.Event()
    with pytest.raises(OSError, match="No space left"):
        gather(LINKS, tmp_path, downloads(Network(photographs)), 1, stop=stop)
    assert stop.is_set()
    assert names_in(tmp_path) == []


def test_eight_threads_get_what_a_server_gives_in_the_end(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 40 photographs 7.png is missing, and every third comes at the second request only."""
    data = (photographs / "b.png").read_bytes()
    local = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **_: [(*local, ("127.0.0.1", port))])
    names = [f"{i}.png" for i in range(40)]

    def answer(handler: Handler, number: int) -> None:
        i = int(handler.path.strip("/.png"))
        status = 404 if i == 7 else 500 if i % 3 == 0 and number == 1 else 200
        handler.answer(status, data)

    with serve(make_certificate(tmp_path)) as server:
        server.answers = {f"/{name}": answer for name in names}
        fetcher = Fetcher(
            [f"photographs.test:{server.port}"], Limits(first_wait=0.01), server.context, lambda _: True
        )
        links = {name: server.url(f"/{name}") for name in names}
        gathered = gather(links, tmp_path / "images", Downloads(fetcher), 8)
    assert gathered == Gathered(0, 39, [("7.png", f"HTTP status 404 from photographs.test:{server.port}")])
    assert len(server.requests) == 40 + 14
    assert {path.read_bytes() for path in (tmp_path / "images").glob("*.png")} == {data}
    assert len(names_in(tmp_path / "images")) == 40


@pytest.mark.skipif(not VSR.is_dir(), reason="no real data: ../shared/vsr is not there")
@pytest.mark.parametrize(("release", "number"), [("random", 6259), ("zeroshot", 3181)])
def test_every_link_of_vsr_is_one_that_is_downloaded(release: str, number: int) -> None:
    links = links_of(
        s
        for split in ("train", "dev", "test")
        for s in load_statements(VSR / release, split, f"vsr_{release}")
    )
    assert len(links) == number
    for name, link in links.items():
        folder = checked(secure_url(link), [COCO_HOST]).path.removesuffix(f"/{name}")
        assert folder in ("/images.cocodataset.org/train2017", "/images.cocodataset.org/val2017")


# --- From a COCO that is there -------------------------------------------------------------------


@pytest.fixture
def coco(photographs: Path, tmp_path: Path) -> Path:
    """A COCO folder: a.png in train2017/, b.png in val2017/."""
    for place, name in (("train2017", "a.png"), ("val2017", "b.png")):
        (tmp_path / "coco" / place).mkdir(parents=True)
        (tmp_path / "coco" / place / name).write_bytes((photographs / name).read_bytes())
    return tmp_path / "coco"


@pytest.fixture
def coco_zip(photographs: Path, tmp_path: Path) -> Path:
    path = tmp_path / "train2017.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("train2017")
        archive.write(photographs / "c.png", "train2017/c.png")
    return path


def test_a_folder_and_a_zip_together(coco: Path, coco_zip: Path, photographs: Path, tmp_path: Path) -> None:
    output = tmp_path / "images"
    assert gather(LINKS, output, CocoCopies([coco, coco_zip]), 2) == Gathered(0, 3, [])
    assert names_in(output) == ["a.png", "b.png", "c.png"]
    for name in LINKS:
        assert (output / name).read_bytes() == (photographs / name).read_bytes()
    assert os.path.samefile(output / "a.png", coco / "train2017" / "a.png")
    assert os.path.samefile(output / "b.png", coco / "val2017" / "b.png")


def test_without_hard_links_it_is_a_copy(coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: str, path: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    output = tmp_path / "images"
    gather({"a.png": ""}, output, CocoCopies([coco]), 1)
    assert (output / "a.png").read_bytes() == (coco / "train2017" / "a.png").read_bytes()
    assert not os.path.samefile(output / "a.png", coco / "train2017" / "a.png")
    assert names_in(output) == ["a.png"]


def test_a_damaged_file_is_replaced_by_the_link(coco: Path, tmp_path: Path) -> None:
    output = tmp_path / "images"
    output.mkdir()
    (output / "a.png").write_bytes(b"half")
    assert CocoFolder(coco)("a.png", output / "a.png")
    assert os.path.samefile(output / "a.png", coco / "train2017" / "a.png")
    assert names_in(output) == ["a.png"]


def test_what_no_source_has_is_named_with_where_coco_has_it(coco: Path, tmp_path: Path) -> None:
    gathered = gather(LINKS, tmp_path / "images", CocoCopies([coco]), 1)
    reason = f"not in {coco}; it is one of COCO's train2017: give that with --coco too"
    assert gathered == Gathered(0, 2, [("c.png", reason)])


def test_what_a_source_has_damaged_does_not_come(coco: Path, coco_zip: Path, tmp_path: Path) -> None:
    (coco / "train2017" / "a.png").write_bytes((coco / "train2017" / "a.png").read_bytes()[:-500])
    data = bytearray(coco_zip.read_bytes())
    data[len(data) // 2] ^= 4
    coco_zip.write_bytes(bytes(data))
    gathered = gather(LINKS, tmp_path / "images", CocoCopies([coco, coco_zip]), 1)
    assert [name for name, _ in gathered.failures] == ["a.png", "c.png"]
    assert gathered.failures[0][1].startswith("damaged or not complete")
    assert (
        gathered.failures[1][1] == "cannot be read from train2017.zip: Bad CRC-32 for file 'train2017/c.png'"
    )
    assert names_in(tmp_path / "images") == ["b.png", "failures.jsonl"]


def test_a_link_out_of_the_coco_folder_is_not_followed(coco: Path, photographs: Path, tmp_path: Path) -> None:
    (coco / "c.png").symlink_to(photographs / "c.png")
    with pytest.raises(ImageError, match="a symbolic link out of the image folder"):
        CocoFolder(coco)("c.png", tmp_path / "c.png")


def test_a_zip_cannot_hold_more_than_a_photograph_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "MAX_BYTES", 1000)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.bmp")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "a.bmp", "a.bmp")
    gathered = gather({"a.bmp": ""}, tmp_path / "images", CocoCopies([tmp_path / "bomb.zip"]), 1)
    assert gathered.failures == [("a.bmp", "more than 1000 bytes; at most 1000 are read")]


def test_a_source_has_to_be_there_and_a_folder_or_a_zip(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="coco: no file or folder"):
        CocoCopies([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"a\.png is neither a folder nor a whole zip file"):
        CocoCopies([photographs / "a.png"])


# ---- what would be done


def test_a_plan_counts_what_is_there_what_a_coco_has_and_what_it_lacks(
    config: Config, photographs: Path, tmp_path: Path
) -> None:
    coco, output = tmp_path / "coco", tmp_path / "images"
    (coco / "train2017").mkdir(parents=True)
    output.mkdir()
    shutil.copy(photographs / "a.png", output)
    shutil.copy(photographs / "b.png", coco / "train2017")
    for source in (coco, Path(shutil.make_archive(str(tmp_path / "coco"), "zip", coco))):
        assert list(plan_images(config, output, [source], [COCO_HOST], 3)) == [
            "statements   11, about 3 photographs",
            f"photographs  1 are in {output}, 2 to get",
            f"takes        1 from {source}, 3 at a time",
            f"would fail   1, such as c.png: not in {source}",
        ]
    assert names_in(output) == ["a.png"]


def test_a_plan_of_downloads_has_their_size_and_hosts_that_are_not_asked(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"image": name, "image_link": link, "caption": "On.", "label": 1, "relation": "on"}
        for name, link in (
            ("a.jpg", f"http://{COCO_HOST}/train2017/a.jpg"),
            ("b.jpg", "https://example.org/b.jpg"),
            ("c.jpg", ""),
        )
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(config, annotations=str(tmp_path))
    lines = list(plan_images(config, tmp_path / "images", [], [COCO_HOST], 8))
    assert lines[2].startswith(f"downloads    1 from {COCO_HOST}, 8 at a time: about 0 MiB (")
    assert lines[3] == "would fail   2, such as b.jpg: without a link, or with one to another host"
    monkeypatch.setattr("theworld.places.free_bytes", lambda path: 159_999)
    with pytest.raises(ValueError, match="160,000 bytes are needed and 159,999 are free"):
        list(plan_images(config, tmp_path / "images", [], [COCO_HOST], 8))
    with pytest.raises(ValueError, match="allowed_host is 'https://x'"):
        list(plan_images(config, tmp_path / "images", [], ["https://x"], 8))
    with pytest.raises(FileNotFoundError, match="coco: no file or folder nowhere"):
        list(plan_images(config, tmp_path / "images", [Path("nowhere")], [COCO_HOST], 8))
