"""Photographs that were edited, replaced or deleted after extraction are noticed before training.

Photographs: the right pixels of every mode and orientation, and everything that is refused.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from constants import ROOT
from PIL import Image, ImageFile

from theworld.config.config import Config
from theworld.data.images import (
    PREPROCESSING,
    ImageError,
    PhotographsChanged,
    check_photographs,
    contents,
    decode,
    missing_photographs,
    photograph,
    read_bytes,
    read_image,
    same_photographs,
    sha256,
)
from theworld.extraction.extract import extract
from theworld.extraction.features import CachedFeatures, OnTheFlyVision
from theworld.models.gemma import Gemma
from theworld.store.format import VISION
from theworld.training import data as loading
from theworld.training.trainer import Trainer
from theworld.utils.text import counted

PHOTOGRAPHS = ROOT.parent / "shared" / "coco"


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int = 12, width: int = 10) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, key: bytes = b"") -> bytes:
    """A PNG made by hand; colour 0 is grey, 2 is RGB; `key` is the transparent colour."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    middle = chunk(b"tRNS", key) if key else b""
    end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + end


def reason(data: bytes, **options: int) -> str:
    with pytest.raises(ImageError) as error:
        decode(data, "a.jpg", **options)
    assert error.value.path == "a.jpg"
    return error.value.reason


def pixel(data: bytes) -> list[int]:
    """The upper left pixel."""
    pixels = decode(data, "a.png")
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    return pixels[0, 0].tolist()


# Colour


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("1", 1, [255, 255, 255]),
        ("L", 77, [77, 77, 77]),
        ("RGB", (1, 2, 3), [1, 2, 3]),
        ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
        ("RGBA", (10, 20, 30, 0), [255, 255, 255]),
        ("RGBA", (0, 100, 255, 51), [204, 224, 255]),  # 255 - 0.2 (255 - x)
        ("LA", (0, 51), [204, 204, 204]),
        ("LA", (9, 255), [9, 9, 9]),
        ("I;16", 0, [0, 0, 0]),
        ("I;16", 128, [0, 0, 0]),
        ("I;16", 129, [1, 1, 1]),
        ("I;16", 32_125, [125, 125, 125]),
        ("I;16", 65_535, [255, 255, 255]),
    ],
)
@pytest.mark.torture("photographs", "every mode against golden values, decoder alone")
def test_every_mode_of_a_png_gives_the_right_colour(mode: str, colour: Any, rgb: list[int]) -> None:
    assert pixel(encoded(Image.new(mode, (2, 2), colour))) == rgb


@pytest.mark.torture("photographs", "every mode against golden values, decoder alone")
def test_a_palette_gives_its_colours_and_its_transparent_entries_are_white() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    right = [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    assert decode(encoded(image), "a")[0].tolist() == right
    assert decode(encoded(image, "GIF"), "a")[0].tolist() == right
    assert decode(encoded(image, transparency=1), "a")[0].tolist() == [right[0], [255] * 3, right[2]]
    graded = encoded(image, transparency=bytes([255, 0, 51]))
    assert decode(graded, "a")[0].tolist() == [right[0], [255] * 3, [218, 220, 222]]


@pytest.mark.torture("photographs", "every mode against golden values, decoder alone")
def test_16_bit_colour_keeps_its_high_byte() -> None:
    assert pixel(png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 0x0180, 0x80FF, 0xFFFF))) == [1, 0x80, 255]


@pytest.mark.torture("photographs", "every mode against golden values, decoder alone")
def test_a_transparent_grey_is_white() -> None:
    assert decode(png(3, 1, 8, 0, b"\0\x05\x06\x07", b"\0\x06"), "a")[0, :, 0].tolist() == [5, 255, 7]
    grey_16 = b"\0" + struct.pack(">3H", 257, 514, 515)
    assert decode(png(3, 1, 16, 0, grey_16, struct.pack(">H", 514)), "a")[0, :, 0].tolist() == [1, 255, 2]


@pytest.mark.parametrize(("bits", "colour", "size"), [(2, 0, 1), (4, 0, 1), (16, 2, 6)])
def test_a_transparent_colour_that_pil_would_lose_is_refused(bits: int, colour: int, size: int) -> None:
    rows = b"\0" + b"\x11" * size
    assert decode(png(1, 1, bits, colour, rows), "a").shape == (1, 1, 3)
    assert "save it with 8 bits" in reason(png(1, 1, bits, colour, rows, b"\0\x01" * (3 if colour else 1)))


@pytest.mark.torture("photographs", "every mode against golden values, decoder alone")
def test_cmyk_is_right_with_inverted_values_of_adobe() -> None:
    # Solid colours: JPEG's rounding is at most one step for each.
    for cmyk, rgb in (
        ((0, 255, 255, 0), (255, 0, 0)),
        ((255, 255, 0, 0), (0, 0, 255)),
        ((0, 0, 0, 155), (100,) * 3),
    ):
        data = encoded(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=100)
        assert b"Adobe" in data
        np.testing.assert_allclose(pixel(data), rgb, atol=1)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_lossless_formats_give_back_the_pixels(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decode(encoded(noise(), kind, **options), "a"), np.array(noise()))


def test_a_colour_profile_changes_nothing() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert pixel(encoded(Image.new("RGB", (1, 1), (9, 8, 7)), icc_profile=profile)) == [9, 8, 7]


# Orientation


@pytest.mark.parametrize(
    ("orientation", "right"),
    [
        (1, [[1, 2, 3], [4, 5, 6]]),
        (2, [[3, 2, 1], [6, 5, 4]]),
        (3, [[6, 5, 4], [3, 2, 1]]),
        (4, [[4, 5, 6], [1, 2, 3]]),
        (5, [[1, 4], [2, 5], [3, 6]]),
        (6, [[4, 1], [5, 2], [6, 3]]),
        (7, [[6, 3], [5, 2], [4, 1]]),
        (8, [[3, 6], [2, 5], [1, 4]]),
        (0, [[1, 2, 3], [4, 5, 6]]),
        (9, [[1, 2, 3], [4, 5, 6]]),
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16"])
@pytest.mark.torture("photographs", "all 8 EXIF orientations in L, RGB, RGBA and 16 bits")
def test_every_orientation_is_turned_upright(orientation: int, right: list[list[int]], mode: str) -> None:
    stored = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8)
    image = (
        Image.fromarray(stored.astype(np.uint16) * 257)
        if mode == "I;16"
        else Image.fromarray(stored).convert(mode)
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(encoded(image, exif=exif), "a")
    assert pixels[:, :, 0].tolist() == right
    assert pixels[:, :, 2].tolist() == right


def test_a_jpeg_and_a_webp_are_turned_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "WEBP"):
        data = encoded(Image.new("RGB", (32, 16)), kind, exif=exif)
        assert decode(data, "a").shape == (32, 16, 3)


def test_exif_that_cannot_be_parsed_counts_as_none() -> None:
    data = encoded(Image.new("RGB", (32, 16)), "JPEG", exif=b"Exif\0\0 this is no EXIF at all")
    assert decode(data, "a").shape == (16, 32, 3)


# Refused


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.torture(
    "photographs", "every truncation of a JPEG, PNG, WebP, GIF, BMP refused, or no pixel lost"
)
def test_every_truncation_is_refused_or_loses_no_pixel(kind: str) -> None:
    data = encoded(noise(), kind)
    whole = decode(data, "a")
    refused = 0
    for length in range(len(data)):
        try:
            pixels = decode(data[:length], "a")
        except ImageError:
            refused += 1
        else:
            np.testing.assert_array_equal(pixels, whole, err_msg=f"the first {length} of {len(data)} bytes")
    # What may be missing is what stands after the last pixel: an end marker, a checksum.
    assert len(data) - refused <= 20


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_damaged_bytes_are_an_image_error_or_pixels_and_never_another_error(kind: str) -> None:
    data = encoded(noise(), kind)
    generator = np.random.default_rng(1)
    for _ in range(300):
        damaged = bytearray(data)
        for place in generator.integers(0, len(data), 3):
            damaged[place] = generator.integers(0, 256)
        try:
            pixels = decode(bytes(damaged), "a", max_pixels=1_000_000)
        except ImageError:
            continue
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"mode": "L"}, {"mode": "CMYK"}]
)
@pytest.mark.torture("photographs", "a JPEG whose scan ends in the middle, or breaks, is refused")
def test_a_jpeg_with_a_damaged_scan_is_refused(options: dict[str, Any]) -> None:
    mode, rest = options.get("mode", "RGB"), {k: v for k, v in options.items() if k != "mode"}
    whole = encoded(noise(96, 80).convert(mode), "JPEG", quality=90, **rest)
    decode(whole, "a.jpg")
    half = whole[: len(whole) // 2] + b"\xff\xd9"
    Image.open(io.BytesIO(half)).load()  # PIL says nothing
    assert reason(half).startswith("damaged or not complete: Corrupt JPEG data: premature end")
    broken = bytearray(whole)
    middle = len(whole) // 2
    broken[middle : middle + 2] = b"\xff\xd3"  # a restart marker where there is none
    assert reason(bytes(broken)).startswith("damaged or not complete: Corrupt JPEG data")


def test_a_jpeg_in_rgb_is_checked_too() -> None:
    whole = encoded(noise(96, 80), "JPEG", keep_rgb=True)
    decode(whole, "a.jpg")
    assert "premature end" in reason(whole[: len(whole) // 2] + b"\xff\xd9")


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f"the photographs of {PHOTOGRAPHS} are not here")
def test_real_photographs_have_the_pixels_that_pil_gives() -> None:
    for path in sorted(PHOTOGRAPHS.rglob("*.jpg"))[:8]:
        with Image.open(path) as image:
            assert np.array_equal(decode(path.read_bytes(), path.name), np.array(image.convert("RGB")))


def test_of_a_photograph_with_a_second_picture_the_first_is_read() -> None:
    first, second = noise(16, 16), noise(16, 16).transpose(Image.Transpose.ROTATE_180)
    both = encoded(first, "MPO", save_all=True, append_images=[second])
    with Image.open(io.BytesIO(both)) as image:
        assert image.format == "MPO"
        assert image.n_frames == 2
    assert np.array_equal(decode(both, "a.jpg"), decode(encoded(first, "JPEG"), "a.jpg"))


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "iTXt compressed", "iCCP"])
def test_a_png_with_a_large_text_or_profile_has_its_pixels(kind: str) -> None:
    plain, size = encoded(noise()), 2**21
    text = b"x" * size
    content = {
        "tEXt": b"Comment\0" + text,
        "zTXt": b"Comment\0\0" + zlib.compress(text),
        "iTXt": b"Comment\0\0\0\0\0" + text,
        "iTXt compressed": b"Comment\0\1\0\0\0" + zlib.compress(text),
        "iCCP": b"profile\0\0" + zlib.compress(text),
    }[kind]
    large = plain[:33] + chunk(kind[:4].encode(), content) + plain[33:]
    assert np.array_equal(decode(large, "a.png"), decode(plain, "a.png"))
    assert "damaged" in reason(large[:-80])


def test_a_png_with_many_texts_has_its_pixels_and_its_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = encoded(noise(), exif=exif)
    texts = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 2**20)) * 80
    assert decode(plain, "a.png").shape == (10, 12, 3)
    assert np.array_equal(decode(plain[:33] + texts + plain[33:], "a.png"), decode(plain, "a.png"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
@pytest.mark.torture("photographs", "animated GIF, PNG and WebP refused")
def test_animated_pictures_are_refused_and_single_ones_are_not(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert pixel(encoded(frames[0], kind, **({"lossless": True} if kind == "WEBP" else {}))) == [255, 0, 0]
    animated = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert "more than one picture" in reason(animated)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "zero bytes"),
        (b"\n <!DOCTYPE html><html>404</html>", "HTML"),
        (b"<HTML><body>", "HTML"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "HTML or XML"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"just text", "JPEG, PNG, WEBP, GIF, BMP"),
        (encoded(Image.new("RGB", (2, 2)), "TIFF"), "JPEG, PNG, WEBP, GIF, BMP"),
    ],
)
def test_a_file_that_is_not_a_photograph_is_refused_with_the_reason(data: bytes, words: str) -> None:
    assert words in reason(data)


def test_the_pixel_limit_is_exact_and_taken_from_the_header() -> None:
    data = encoded(Image.new("RGB", (20, 10)))
    assert decode(data, "a", max_pixels=200).shape == (10, 20, 3)
    header = data[:41]  # signature, IHDR and the first words of IDAT: nothing to decode
    assert reason(header, max_pixels=199) == "20 x 10 pixels; at most 199 are decoded"


@pytest.mark.torture("photographs", "21 KB of 177 megapixels refused, memory up by less than 50 MB")
def test_a_small_file_of_177_megapixels_is_refused_in_little_memory(tmp_path: Path) -> None:
    side = 13_300
    compressor = zlib.compressobj(9)
    row = b"\0" * (1 + (side + 7) // 8)
    content = b"".join(compressor.compress(row) for _ in range(side)) + compressor.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    assert len(data) < 30_000
    (tmp_path / "bomb.png").write_bytes(data)
    # A WebP's canvas may be larger than its frames; to open one, PIL's decoder asks for two canvases.
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    webp = bytearray(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    webp[24:30] = (side - 1).to_bytes(3, "little") * 2
    (tmp_path / "bomb.webp").write_bytes(webp)
    program = """
import resource, sys, warnings
from theworld.data.images import ImageError, read_image
warnings.simplefilter("ignore")
read_image(sys.argv[1], "small.png")  # PIL's plugins are loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in ("bomb.png", "bomb.webp"):
    try:
        read_image(sys.argv[1], name)
        sys.exit("not refused")
    except ImageError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    (tmp_path / "small.png").write_bytes(encoded(noise()))
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        timeout=60,
    )
    first, second, megabytes = result.stdout.splitlines()
    assert first == "bomb.png: 13300 x 13300 pixels; at most 89478485 are decoded"
    assert second == "bomb.webp: 13300 x 13300 pixels; at most 89478485 are decoded"
    assert int(megabytes) < 50


def test_a_library_that_lets_truncated_files_pass_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES"):
        decode(encoded(noise()), "a")


# Files


def file_reason(root: Path, name: str, **options: int) -> str:
    with pytest.raises(ImageError) as error:
        read_bytes(root, name, **options)
    assert error.value.path == name
    return error.value.reason


def test_the_bytes_of_a_file_are_read_through_links_that_stay_inside(tmp_path: Path) -> None:
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.jpg").write_bytes(b"bytes")
    (root / "link.jpg").symlink_to("sub/a.jpg")
    (tmp_path / "other").symlink_to(root)
    assert read_bytes(root, "sub/a.jpg") == read_bytes(str(tmp_path / "other"), "link.jpg") == b"bytes"


@pytest.mark.torture("security", "paths that leave the folder: absolute, .., NUL, links, devices")
def test_anything_but_a_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "large.jpg").write_bytes(b"12345")
    assert file_reason(tmp_path, "fifo.jpg") == "not a regular file"
    assert file_reason(tmp_path, "folder.jpg") == "not a regular file"
    assert file_reason(tmp_path, ".") == "not a regular file"
    assert file_reason(tmp_path, "empty.jpg") == "zero bytes"
    assert file_reason(tmp_path, "loop.jpg")
    assert file_reason(tmp_path, "large.jpg", max_bytes=4) == "5 bytes; at most 4 are read"
    assert file_reason(tmp_path, "nowhere.jpg") == f"no such file in {tmp_path}"
    assert file_reason(tmp_path, "large.jpg/a") == "Not a directory"
    assert "too long" in file_reason(tmp_path, "a" * 300).lower()


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.jpg", "sub/../../a.jpg", "a\0.jpg", "\ud800.jpg"])
@pytest.mark.torture("security", "paths that leave the folder: absolute, .., NUL, links, devices")
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"secret")
    (tmp_path / "images" / "sub").mkdir(parents=True)
    assert "path" in file_reason(tmp_path / "images", name)


@pytest.mark.torture("security", "paths that leave the folder: absolute, .., NUL, links, devices")
def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    (tmp_path / "images2").mkdir()
    (tmp_path / "images2" / "a.jpg").write_bytes(b"secret")
    (root / "a.jpg").symlink_to(tmp_path / "images2" / "a.jpg")
    (root / "null.jpg").symlink_to("/dev/null")
    (root / "sub").symlink_to(tmp_path / "images2")
    for name in ("a.jpg", "null.jpg", "sub/a.jpg"):
        location = os.path.realpath(root / name)
        reason = f"a symbolic link out of the image folder, to {location}; --follow_links reads it"
        assert file_reason(root, name) == reason
        assert missing_photographs([name], root) == {name: reason}


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder of links as the hub's cache, DVC and git-annex make them, to files, to a folder and to nothing."""
    root, store = tmp_path / "images", tmp_path / "blobs"
    (store / "sub").mkdir(parents=True)
    root.mkdir()
    (store / "0123").write_bytes(b"blob")
    (store / "sub" / "b.jpg").write_bytes(b"below")
    (root / "a.jpg").symlink_to("../blobs/0123")
    (root / "sub").symlink_to(store / "sub")
    (root / "gone.jpg").symlink_to("../blobs/4567")
    return root


def test_links_that_leave_the_folder_are_read_on_request(linked: Path) -> None:
    assert read_bytes(linked, "a.jpg", follow_links=True) == b"blob"
    assert read_bytes(linked, "sub/b.jpg", follow_links=True) == b"below"
    reason = f"a symbolic link to {linked.parent}/blobs/4567, which is not there"
    assert file_reason(linked, "gone.jpg", follow_links=True) == reason
    assert missing_photographs(["a.jpg", "sub/b.jpg", "gone.jpg"], linked, True) == {"gone.jpg": reason}
    assert contents(linked, ["a.jpg", "sub/b.jpg", "gone.jpg"], True) == {
        "a.jpg": "4 bytes",
        "sub/b.jpg": "5 bytes",
    }


@pytest.mark.parametrize("name", ["../blobs/0123", "sub/../a.jpg", "/etc/passwd", "a\0"])
@pytest.mark.torture("security", "paths that leave the folder: absolute, .., NUL, links, devices")
def test_following_links_opens_no_other_way_out(linked: Path, name: str) -> None:
    assert file_reason(linked, name, follow_links=True) == "not a path below the image folder"


@pytest.mark.parametrize(
    ("there", "wanted", "words"),
    [
        ("A.JPG", "a.jpg", "'A.JPG', which differs in upper and lower case"),
        ("Sub/A.jpg", "sub/a.jpg", "'Sub/A.jpg', which differs in upper and lower case"),
        ("cafe\u0301.jpg", "caf\u00e9.jpg", r"'cafe\u0301.jpg', which differs in Unicode form (NFC or NFD)"),
        (
            "e\u0301te/a.jpg",
            "\u00e9te/a.jpg",
            r"'e\u0301te/a.jpg', which differs in Unicode form (NFC or NFD)",
        ),
    ],
)
def test_a_similar_name_is_shown_and_not_taken(there: str, wanted: str, words: str, tmp_path: Path) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_bytes(b"bytes")
    if (tmp_path / wanted).exists():
        pytest.skip("this file system takes both names for one")
    reason = f"no such file in {tmp_path}; it has {words}: rename one of the two"
    assert file_reason(tmp_path, wanted) == reason
    assert missing_photographs([wanted], tmp_path) == {wanted: reason}
    if "/" not in wanted:
        with pytest.raises(ImageError) as error:
            photograph(tmp_path / wanted)
        assert error.value.reason == reason


def test_a_folder_is_listed_once_for_all_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, real = [], os.listdir
    (tmp_path / "A.jpg").touch()
    monkeypatch.setattr(os, "listdir", lambda folder: [listed.append(folder), *real(folder)][1:])
    missing = missing_photographs([f"{n}.jpg" for n in "abcdefgh"], tmp_path)
    assert (len(missing), len(listed)) == (8, 1)
    assert "it has 'A.jpg'" in missing["a.jpg"]
    assert "it has" not in missing["b.jpg"]


def test_photographs_of_the_same_size_are_compared_by_their_bytes(tmp_path: Path) -> None:
    for name, data in (("a", b"11"), ("b", b"11"), ("c", b"22"), ("d", b"333")):
        (tmp_path / name).write_bytes(data)
    found = contents(tmp_path, ["a", "b", "c", "d", "missing"])
    assert found == {"a": sha256(b"11"), "b": sha256(b"11"), "c": sha256(b"22"), "d": "3 bytes"}


def test_an_image_error_has_path_and_reason_and_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a.jpg", "zero bytes")))  # noqa: S301 - our own bytes
    assert (error.path, error.reason, str(error)) == ("a.jpg", "zero bytes", "a.jpg: zero bytes")
    assert isinstance(error, ValueError)


def test_a_hash_is_the_sha256_of_the_bytes() -> None:
    assert sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_preprocessing_is_described_in_words() -> None:
    assert sorted(PREPROCESSING) == ["alpha", "colour", "depth", "orientation", "range", "resize"]
    assert all(isinstance(words, str) and words for words in PREPROCESSING.values())


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f"the photographs are not at {PHOTOGRAPHS}")
def test_all_real_photographs_are_read() -> None:
    names = sorted(path.name for path in PHOTOGRAPHS.glob("*.jpg"))
    assert len(names) == 96
    for name in names:
        pixels = read_image(PHOTOGRAPHS, name)
        assert pixels.dtype == np.uint8
        assert min(pixels.shape[:2]) > 100
        assert max(pixels.shape[:2]) <= 640
        assert 10 < pixels.mean() < 250


@pytest.fixture
def own(config: Config, tmp_path: Path) -> Config:
    """Settings with photographs of their own and a finished cache beside them."""
    shutil.copytree(str(config.image_folder), tmp_path / "photographs")
    config = replace(config, image_folder=str(tmp_path / "photographs"))
    extract(config, tmp_path / "cache", with_vision=True, allow_missing=False)
    return config


def edited(path: Path) -> None:
    """Another last byte, and the time stamp as before."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "edited": edited,
    "replaced": lambda path: shutil.copy(path.with_name("a.png"), path),
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.torture(
    "cache", "a photograph edited, replaced, deleted after extraction: noticed before training"
)
def test_training_does_not_start_on_photographs_that_changed(
    own: Config, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(str(own.image_folder)) / "b.png"
    before = sha256(path.read_bytes())
    CHANGES[change](path)
    monkeypatch.setattr(Gemma, "with_weights", None)  # no model loads
    monkeypatch.setattr(loading, "COMPARE_SECONDS", 0.0)  # what has another time stamp is read all the same
    with pytest.raises(PhotographsChanged) as caught:
        Trainer(own, tmp_path / "cache")
    now = {
        "deleted": f"no such file in {path.parent}",
        "emptied": "zero bytes",
        "a FIFO": "not a regular file",
    }
    # those with another time stamp; at once after extraction maybe all
    compared = int(str(caught.value).split()[2])
    assert compared in (1, 2, 3)
    after = now[change] if change in now else sha256(path.read_bytes())
    assert str(caught.value) == (
        f"1 of {counted(compared, 'photograph')} in {path.parent} changed since they were extracted:\n"
        f"  b.png: SHA-256 was {before}, now {after}\n"
        "Put them back, or extract into another --cache"
    )
    assert not Path(own.output_dir).exists()


def test_training_notes_the_comparison_of_photographs(
    own: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    assert "photographs: all 3 are as they were extracted" in Trainer(own, cache).data.notes
    moved = replace(own, image_folder=str(tmp_path / "nowhere"))
    assert f"photographs: not in {tmp_path / 'nowhere'}, so they were not compared with the cache" in (
        Trainer(moved, cache).data.notes
    )
    assert not any(
        "photographs" in note for note in Trainer(replace(own, image_folder=None), cache).data.notes
    )
    monkeypatch.setenv("RANK", "1")  # the first process looks
    edited(Path(str(own.image_folder)) / "a.png")
    assert loading.compared(own, CachedFeatures(cache / "latents"), ["a.png"]) == []


def test_with_too_little_time_all_that_are_newer_and_some_others_are_compared(tmp_path: Path) -> None:
    names = [f"{i:03}.jpg" for i in range(300)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    images = {name: sha256(name.encode()) for name in names}
    newest = max((tmp_path / name).stat().st_ctime for name in names)
    while True:  # until the clock of the file system has gone on
        (tmp_path / "007.jpg").write_bytes(b"007.jpg")
        if (tmp_path / "007.jpg").stat().st_ctime > newest:
            break

    def clock(times: Iterator[float] = iter([0.0, 1.0, 4.0, 6.0])) -> float:  # noqa: B008
        return next(times)

    line = check_photographs(images, tmp_path, newest, 5.0, clock)
    assert line == (
        "photographs: 129 of 300 compared in 5 s (1 with newer time stamps, the others at random): all are as they "
        "were extracted; tools/doctor.py compares every one"
    )
    (tmp_path / "008.jpg").write_bytes(b"other")
    with pytest.raises(PhotographsChanged, match=r"008\.jpg: SHA-256 was "):
        check_photographs(images, tmp_path, newest, 0.0)


def test_the_first_few_of_many_are_shown(tmp_path: Path) -> None:
    with pytest.raises(PhotographsChanged) as caught:
        check_photographs({f"{i}.jpg": "0" * 64 for i in range(8)}, tmp_path)
    assert len(caught.value.changes) == 8
    assert str(caught.value).splitlines()[-2:] == [
        "  and 3 more",
        "Put them back, or extract into another --cache",
    ]


@pytest.mark.torture("cache", "a photograph edited while training reads it")
def test_a_photograph_that_changes_while_training_stops_it(own: Config, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "cache" / VISION)
    trainer = Trainer(own, tmp_path / "cache")  # reads the photographs at every step
    assert isinstance(trainer.data.vision, OnTheFlyVision)
    trainer.train_step()
    saved = trainer.save()
    content = {path: path.read_bytes() for path in saved.iterdir()}
    for name in ("a.png", "b.png", "c.png"):
        edited(Path(str(own.image_folder)) / name)
    with pytest.raises(
        ImageError, match=r"[abc]\.png: changed since its latents were extracted: SHA-256 was"
    ):
        trainer.train_step()
    assert {path: path.read_bytes() for path in saved.iterdir()} == content


def test_the_same_photograph_is_found_under_other_names_and_in_other_formats(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    generator = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(generator.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(theirs / f"{i}.jpg")
    (ours / "copy.jpg").write_bytes((theirs / "1.jpg").read_bytes())
    # one format: bytes are compared
    (ours / "longer.jpg").write_bytes((theirs / "2.jpg").read_bytes() + b"\0")
    for name, picture in (("again.png", 3), ("drawn.png", 0)):
        pixels = read_image(theirs, f"{picture}.jpg")
        pixels[0, 0] += name == "drawn.png"
        Image.fromarray(pixels).save(ours / name)
    (ours / "damaged.png").write_bytes((ours / "again.png").read_bytes()[:-40])
    (theirs / "damaged.jpg").write_bytes((theirs / "3.jpg").read_bytes()[:-40])
    os.mkfifo(ours / "fifo.png")
    names = [*sorted(path.name for path in ours.iterdir()), "missing.png"]
    found = same_photographs(ours, names, theirs, sorted(path.name for path in theirs.iterdir()))
    assert found == {"copy.jpg": "1.jpg", "again.png": "3.jpg"}
