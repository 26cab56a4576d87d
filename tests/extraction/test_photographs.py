"""A folder of photographs as people have them: those that can be read are, all others are refused by name."""

import io
import json
import os
import shutil
import stat
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import EMBEDDED_VAE, content
from PIL import Image
from torture import Tally

from theworld.config.config import Config
from theworld.data.images import decode, read_image
from theworld.extraction.extract import extract
from theworld.store.format import LATENTS
from theworld.store.reader import StoreReader


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photograph(seed: int) -> Image.Image:
    """Noise of 40 x 30 pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def bomb() -> bytes:
    """A PNG of 21 KB with 177 megapixels."""
    side = 13_300
    compressor = zlib.compressobj(9)
    rows = b"".join(compressor.compress(bytes(1 + (side + 7) // 8)) for _ in range(side)) + compressor.flush()
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in (
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)),
        (b"IDAT", rows),
        (b"IEND", b""),
    ):
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    assert 20_000 < len(data) < 30_000
    return data


ANIMATED = encoded(photograph(0), "GIF", save_all=True, append_images=[photograph(1)])
JPEG = encoded(photograph(0), "JPEG")
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated.jpg": (lambda path: path.write_bytes(JPEG[: len(JPEG) // 2]), "damaged or not complete"),
    "without its end.jpg": (lambda path: path.write_bytes(JPEG[:-30]), "damaged or not complete"),
    "empty.jpg": (lambda path: path.write_bytes(b""), "zero bytes"),
    "page.jpg": (lambda path: path.write_bytes(b"<!DOCTYPE html><html>404</html>"), "an HTML or XML page"),
    "pointer.jpg": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "a Git LFS pointer",
    ),
    "fifo.jpg": (os.mkfifo, "not a regular file"),
    "folder.jpg": (lambda path: path.mkdir(), "not a regular file"),
    "socket.jpg": (lambda path: os.mknod(path, stat.S_IFSOCK | 0o600), "not a regular file"),
    "missing.jpg": (lambda path: None, "no such file in "),
    "animated.gif": (lambda path: path.write_bytes(ANIMATED), "holds more than one picture"),
    "bomb.png": (lambda path: path.write_bytes(bomb()), "13300 x 13300 pixels; at most "),
    "outside.jpg": (
        lambda path: path.symlink_to(path.parent.parent / "secret.jpg"),
        "a symbolic link out of the image",
    ),
    "device.jpg": (lambda path: path.symlink_to("/dev/zero"), "a symbolic link out of the image folder"),
    "loop.jpg": (lambda path: path.symlink_to(path.name), ""),
    "drawing.tif": (
        lambda path: path.write_bytes(encoded(photograph(0), "TIFF")),
        "not a photograph in a format",
    ),
}


def job(folder: Path, names: list[str]) -> Config:
    """Settings of an extraction of these photographs, in one shard."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    rows = [json.dumps({"image": name, "statement": "It is so.", "label": 1}) + "\n" for name in names]
    (folder / "annotations/train.jsonl").write_text("".join(rows))
    return Config(
        cosmos_model_name=str(EMBEDDED_VAE),
        annotations=str(folder / "annotations"),
        image_folder=str(folder / "images"),
        latent_size=32,
        encode_batch_size=2,
        device="cpu",
        num_workers=0,
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.torture("photographs", "unusable files refused by name, the others unaffected")
@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_files_are_named_and_the_others_are_as_without_them(
    tmp_path: Path, workers: int, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("theworld.extraction.reading.FEW", 1)
    good = [f"{i}.jpg" for i in range(5)]
    config = replace(job(tmp_path, [*good, *BAD]), num_workers=workers)
    folder = Path(str(config.image_folder))
    (tmp_path / "secret.jpg").write_bytes(JPEG)
    for seed, name in enumerate(good):
        (folder / name).write_bytes(encoded(photograph(seed), "JPEG"))
    for name, (make, _) in BAD.items():
        make(folder / name)
    with pytest.raises(ValueError, match=f"{len(BAD)} of {len(BAD) + 5} photographs cannot be read"):
        extract(config, tmp_path / "cache", with_vision=False, allow_missing=False)
    assert content(tmp_path / "cache").keys() == {"failures.jsonl"}
    extract(config, tmp_path / "cache", with_vision=False, allow_missing=True)
    failures = [json.loads(line) for line in (tmp_path / "cache/failures.jsonl").read_text().splitlines()]
    assert {row["path"] for row in failures} == set(BAD)
    for row in failures:
        assert row["reason"].startswith(BAD[row["path"]][1]), row
        assert row["reason"]

    alone = job(tmp_path / "alone", good)
    for name in good:
        shutil.copy(folder / name, str(alone.image_folder))
    extract(alone, tmp_path / "alone/cache", with_vision=False, allow_missing=False)
    stores = [content(cache / LATENTS) for cache in (tmp_path / "cache", tmp_path / "alone/cache")]
    assert stores[0] == stores[1]
    tally(refused=len(failures), others_changed=sum(stores[0][name] != stores[1][name] for name in stores[1]))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_a_device_is_refused_without_being_opened(tmp_path: Path) -> None:
    try:
        os.mknod(tmp_path / "tty.jpg", stat.S_IFCHR | 0o600, os.makedev(5, 0))
    except PermissionError:
        pytest.skip("no devices may be made here")
    with pytest.raises(ValueError, match=r"tty\.jpg: not a regular file"):
        read_image(tmp_path, "tty.jpg")


# --- right pixels ----------------------------------------------------------------------------------

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
CORNERS = {  # orientation: upper left, upper right, lower left, lower right, of a picture stored as in 1
    1: (RED, GREEN, BLUE, WHITE),
    2: (GREEN, RED, WHITE, BLUE),
    3: (WHITE, BLUE, GREEN, RED),
    4: (BLUE, WHITE, RED, GREEN),
    5: (RED, BLUE, GREEN, WHITE),
    6: (BLUE, RED, WHITE, GREEN),
    7: (WHITE, GREEN, BLUE, RED),
    8: (GREEN, WHITE, RED, BLUE),
}


@pytest.mark.torture("photographs", "all 8 EXIF orientations of a JPEG, against golden corners")
@pytest.mark.parametrize("orientation", list(CORNERS))
def test_a_jpeg_is_turned_upright(orientation: int, tally: Tally) -> None:
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:16, :32], stored[:16, 32:], stored[16:, :32], stored[16:, 32:] = CORNERS[1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Whole blocks of one colour without colour subsampling: JPEG loses at most a step or two.
    pixels = decode(
        encoded(Image.fromarray(stored), "JPEG", quality=100, subsampling=0, exif=exif), "a.jpg"
    ).astype(int)
    assert pixels.shape == ((32, 64, 3) if orientation < 5 else (64, 32, 3))
    corners = (pixels[4, 4], pixels[4, -5], pixels[-5, 4], pixels[-5, -5])
    for corner, right in zip(corners, CORNERS[orientation], strict=True):
        assert np.abs(corner - right).max() <= 2
    tally(orientations=1)


def sixteen_bits(values: list[list[int]]) -> Image.Image:
    return Image.fromarray(np.array(values, np.uint16))


GOLDEN: dict[str, tuple[bytes, list[list[tuple[int, int, int]]]]] = {
    "grey": (
        encoded(Image.fromarray(np.array([[0, 100], [200, 255]], np.uint8)), "PNG"),
        [[(0,) * 3, (100,) * 3], [(200,) * 3, WHITE]],
    ),
    "16-bit grey": (
        encoded(sixteen_bits([[0, 257], [32_125, 65_535]]), "PNG"),
        [[(0,) * 3, (1,) * 3], [(125,) * 3, WHITE]],
    ),
    "grey and alpha": (
        encoded(Image.fromarray(np.array([[[0, 255], [0, 0]], [[0, 51], [90, 255]]], np.uint8), "LA"), "PNG"),
        [[(0,) * 3, WHITE], [(204,) * 3, (90,) * 3]],
    ),
    "RGBA": (
        encoded(
            Image.fromarray(
                np.array([[[*RED, 255], [*RED, 0]], [[0, 100, 255, 51], [*BLUE, 255]]], np.uint8)
            ),
            "PNG",
        ),
        [[RED, WHITE], [(204, 224, 255), BLUE]],
    ),
}


@pytest.mark.torture(
    "photographs", "grey, 16-bit, LA, RGBA, palette, CMYK, 1-bit: golden pixels through to the latents"
)
@pytest.mark.parametrize("mode", [*GOLDEN, "palette", "1 bit", "CMYK"])
def test_the_latents_of_every_mode_are_those_of_the_right_pixels(
    tmp_path: Path, mode: str, tally: Tally
) -> None:
    kind, tolerance = "png", 0
    if mode == "palette":
        image = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8), "P")
        image.putpalette([*RED, *GREEN, *BLUE, 9, 8, 7])
        data, golden = encoded(image, "PNG"), [[RED, GREEN], [BLUE, (9, 8, 7)]]
    elif mode == "1 bit":
        bits = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
        data, golden = encoded(bits, "PNG"), [[(0,) * 3, WHITE], [WHITE, (0,) * 3]]
    elif mode == "CMYK":
        data, golden = (
            encoded(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "JPEG", quality=100),
            [[RED, RED], [RED, RED]],
        )
        kind, tolerance = "jpg", 1
    else:
        data, golden = GOLDEN[mode]
    right = np.array(golden, np.uint8)
    assert np.abs(decode(data, "a").astype(int) - right).max() <= tolerance
    config = job(tmp_path, [f"a.{kind}", "right.png"])
    folder = Path(str(config.image_folder))
    (folder / f"a.{kind}").write_bytes(data)
    Image.fromarray(right if tolerance == 0 else decode(data, "a")).save(folder / "right.png")
    extract(config, tmp_path / "cache", with_vision=False, allow_missing=False)
    reader = StoreReader(tmp_path / "cache" / LATENTS)
    np.testing.assert_array_equal(reader.read(f"a.{kind}", LATENTS), reader.read("right.png", LATENTS))
    assert reader.num_rows == 2  # not one row for equal bytes: these are two files
    tally(modes=1)
