"""Read photographs under limits, and check that they have not changed since they were extracted.

`PREPROCESSING` describes how a file becomes pixels. It is part of a cache's fingerprint: after a change, caches have
to be extracted again.

Dimensions: H and W, height and width in pixels.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import itertools
import math
import os
import random
import re
import shlex
import stat
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

from theworld.utils.console import progress
from theworld.utils.text import counted, difference, folded

T = TypeVar("T")

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_BYTES = 64 * 1024 * 1024
# Largest number of pixels that PIL opens without a warning; it refuses twice as many by itself.
MAX_PIXELS = 89_478_485

PREPROCESSING: dict[str, str] = {
    "orientation": "EXIF orientation applied; EXIF that cannot be parsed counts as none",
    "alpha": "composited over white",
    "colour": "ICC profiles ignored; CMYK, palette and grey to RGB as PIL converts them",
    "depth": "16-bit grey / 257, rounded; of 16-bit colour the high byte",
    "resize": "PIL bicubic with antialiasing, the whole picture stretched to the square",
    "range": "x / 127.5 - 1, float32 in [-1, 1]",
}

_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112
# (bits, colour type) of PNGs whose transparent colour PIL loses, as it compares it with pixels that it has scaled.
_LOST_KEYS = {(2, 0), (4, 0), (16, 2)}


class ImageError(ValueError):
    """A photograph that cannot be used: its `path` as it was given, and the `reason`."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both as arguments, so that worker processes can pickle it
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def read_bytes(
    root: str | Path, relative_path: str, max_bytes: int = MAX_BYTES, follow_links: bool = False
) -> bytes:
    """Return the bytes of a regular file below `root`.

    Raises ImageError for a missing, empty, unreadable or too large file, for anything but a regular file (without
    waiting for a FIFO), for a path that leads out of `root`, and, unless `follow_links`, for a symbolic link that does.
    """
    return _read_regular(_inside(root, relative_path, follow_links), relative_path, root, max_bytes)


def _read_regular(location: str, name: str, root: str | Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the bytes of a regular file at a real location; `name` and `root` are for messages only."""
    try:
        if not stat.S_ISREG(os.lstat(location).st_mode):  # before opening: to open a device can act on it
            raise ImageError(name, "not a regular file")
        # O_NONBLOCK: if the file is replaced by a FIFO in between, do not wait for its writer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(location, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(name, "not a regular file")
            if status.st_size > max_bytes:
                raise ImageError(name, f"{status.st_size} bytes; at most {max_bytes} are read")
            data = file.read(status.st_size + 1)  # one more: a file that grows is seen
    except OSError as error:
        missing = error.errno == errno.ENOENT
        reason = _not_there(root, name, location) if missing else os.strerror(error.errno or 0)
        raise ImageError(name, reason) from error
    if not data:
        raise ImageError(name, "zero bytes")
    if len(data) != status.st_size:
        raise ImageError(name, f"{status.st_size} bytes, but {len(data)} were read: the file is changing")
    return data


def _inside(root: str | Path, relative_path: str, follow_links: bool) -> str:
    """Return the location of a path below `root` with links followed.

    Raises ImageError if the path leads out of `root`, or, unless `follow_links`, a link on the way.
    """
    if "\0" in relative_path or os.path.isabs(relative_path) or ".." in relative_path.split("/"):
        raise ImageError(relative_path, "not a path below the image folder")
    try:
        real_root = os.path.realpath(root)
        location = os.path.realpath(os.path.join(real_root, relative_path))
    except (OSError, ValueError) as error:  # a loop of links; text that no file system can hold
        raise ImageError(relative_path, f"not a path: {error}") from error
    if not follow_links and os.path.commonpath([real_root, location]) != real_root:
        raise ImageError(
            relative_path, f"a symbolic link out of the image folder, to {location}; --follow_links reads it"
        )
    return location


def _not_there(root: str | Path, name: str, location: str) -> str:
    """Return the reason why there is no file `name` in `root`, with a similar name if there is one."""
    if os.path.islink(os.path.join(root, name)):
        return f"a symbolic link to {location}, which is not there"
    reason, similar = f"no such file in {root}", similar_name(root, name)
    if not similar:
        return reason
    return (
        f"{reason}; it has {similar!a}, which differs in {difference(name, similar)}: rename one of the two"
    )


def similar_name(root: str | Path, name: str) -> str:
    """Return the path below `root` that differs from `name` in case or Unicode form only; nothing if there is none."""
    folder, found = str(root), []
    for part in Path(name).parts:
        if not os.path.lexists(os.path.join(folder, part)):
            try:
                own = _names_by_fold(folder, os.stat(folder).st_mtime_ns).get(folded(part))
            except OSError:
                return ""
            if own is None:
                return ""
            part = own
        found.append(part)
        folder = os.path.join(folder, part)
    return "/".join(found)


@functools.lru_cache(maxsize=8)
def _names_by_fold(folder: str, changed: int) -> dict[str, str]:
    """Return the names in a folder by what `folded` makes of them; `changed`: when one last came or went."""
    return {folded(name): name for name in sorted(os.listdir(folder))}


def decode(data: bytes, path: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the pixels of a photograph, uint8[H, W, 3], as in `PREPROCESSING`; `path` is for messages only.

    A JPEG may have further pictures (a preview, a gain map, the other eye): the first one is read. Raises ImageError
    for another format, too many pixels (before any is decoded), an animation, a JPEG that `check_jpeg` refuses, and
    data that PIL cannot decode to the end. PIL only warns about sizes and metadata, never about damaged pixels.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so damaged photographs would be accepted; set it to False"
        )
    try:
        data = without_large_texts(data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(path, f"{width} x {height} pixels; at most {max_pixels} are decoded")
            if image.format in ("JPEG", "MPO"):  # MPO: with further pictures
                check_jpeg(data, path)
            elif getattr(image, "n_frames", 1) != 1:
                raise ImageError(path, "holds more than one picture (animated)")
            image.load()
            if image.size != (width, height):
                raise ImageError(
                    path, f"{image.width} x {image.height} pixels; its header has {width} x {height}"
                )
            if "transparency" in image.info and image.format == "PNG" and tuple(data[24:26]) in _LOST_KEYS:
                raise ImageError(
                    path, "a transparent colour at a bit depth where PIL loses it; save it with 8 bits"
                )
            return _to_rgb(_upright(image), path)
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(path, f"more than {max_pixels} pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(path, _describe(data)) from error
    except Exception as error:  # PIL's decoders raise nearly everything on damaged bytes
        raise ImageError(path, f"damaged or not complete: {error}") from error


def check_jpeg(data: bytes, path: str) -> None:
    """Raise ImageError for a JPEG whose compressed pixels are damaged or end too early.

    PIL ignores what libjpeg only warns about, such as a scan that ends in the middle: the rest of the picture is then
    grey or repeated. simplejpeg treats these warnings as errors. It decodes to an eighth of the size, which reads the
    whole scan in a third of the time. No decoder notices bytes that changed into other valid codes: of 300 single bits
    flipped in the scan of a photograph, 55 were noticed.
    """
    try:
        _, _, colours, _ = simplejpeg.decode_jpeg_header(data)
        colours = "RGB" if colours == "RGB" else "GRAY"
        simplejpeg.decode_jpeg(data, colours, min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        raise ImageError(path, f"damaged or not complete: {error}") from error


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
# PIL refuses a picture for one compressed text or profile of more bytes, and for texts of more bytes together.
MAX_COMPRESSED_TEXT, MAX_TEXTS = 2**20, 2**26


def without_large_texts(data: bytes) -> bytes:
    """Return a PNG without the texts and colour profiles for which PIL would refuse it; its pixels stay the same.

    Other bytes are returned as they are, and so is everything from the first chunk that is not whole.
    """
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept, start, total = [PNG_SIGNATURE], len(PNG_SIGNATURE), 0
    while start + 12 <= len(data):
        length, kind = int.from_bytes(data[start : start + 4]), data[start + 4 : start + 8]
        end = start + 12 + length
        if end > len(data):
            break
        size = _text_bytes(kind, data[start + 8 : end - 4]) if kind in PNG_TEXTS else 0
        if size is not None and total + size <= MAX_TEXTS:
            kept.append(data[start:end])
            total += size
        start = end
    return b"".join([*kept, data[start:]])


def _text_bytes(kind: bytes, content: bytes) -> int | None:
    """Return the size of a PNG's text or profile, decompressed; None if it is compressed and more than PIL takes."""
    # after the name: the method, in iTXt a flag, the method and two texts
    _, _, rest = content.partition(b"\0")
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] != b"\1"):
        return len(content)
    packed = rest[2:].split(b"\0", 2)[-1] if kind == b"iTXt" else rest[1:]
    try:
        size = len(zlib.decompressobj().decompress(packed, MAX_COMPRESSED_TEXT + 1))
    except zlib.error:
        return len(content)
    return size if size <= MAX_COMPRESSED_TEXT else None


def _describe(data: bytes) -> str:
    """Return what data may be that PIL does not recognise as a photograph."""
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not data:
        return "zero bytes"
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")):
        return "an HTML or XML page, not a photograph: the download failed; get the file again"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not a photograph; get the file with `git lfs pull`"
    return f"not a photograph in a format that is read ({', '.join(FORMATS)})"


def _upright(image: Image.Image) -> Image.Image:
    """Return the picture turned according to its EXIF orientation."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - PIL raises nearly everything for a broken header; viewers ignore it too
        return image
    turn = _ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, path: str) -> np.ndarray:
    """Return a loaded picture as uint8[H, W, 3], from any colour mode that `FORMATS` can have."""
    if image.mode.startswith("I"):
        return _from_16_bit_grey(image, path)
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK"):
        raise ImageError(path, f"colour mode {image.mode} is not supported")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.array(image.convert("RGB"))


def _from_16_bit_grey(image: Image.Image, path: str) -> np.ndarray:
    """Return 16-bit grey as uint8[H, W, 3]. PIL's own conversion clips at 255."""
    grey = np.asarray(image).astype(np.uint32)
    if grey.max(initial=0) > 65_535:
        raise ImageError(path, "grey values of more than 16 bits")
    pixels = ((grey + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        pixels[grey == transparent] = 255
    return np.repeat(pixels[:, :, None], 3, axis=2)


def read_image(
    root: str | Path, relative_path: str, max_pixels: int = MAX_PIXELS, follow_links: bool = False
) -> np.ndarray:
    """Return the pixels of a photograph file below `root`, uint8[H, W, 3]. Raises ImageError as `read_bytes` does."""
    return decode(read_bytes(root, relative_path, follow_links=follow_links), relative_path, max_pixels)


def photograph(image: str | Path | np.ndarray | Image.Image, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the pixels, uint8[H, W, 3], of a file, of a PIL image, or of an array that holds them already.

    A symbolic link is followed wherever it leads. Raises ImageError for a file that cannot be read and for a web
    address, ValueError for an array of another type or shape.
    """
    if isinstance(image, np.ndarray):
        check_pixels(image)
        return image
    if isinstance(image, Image.Image):
        return _to_rgb(_upright(image), "the given picture")
    refuse_address(image)
    path = Path(image)
    name = path.name or str(path)
    try:
        location = os.path.realpath(path)  # a file that the user names is read wherever it lies
    except (OSError, ValueError) as error:
        raise ImageError(name, f"not a path: {error}") from error
    return decode(_read_regular(location, name, path.parent), name, max_pixels)


def refuse_address(image: str | Path) -> None:
    """Raise ImageError for an address such as https://... where a file is wanted, with the command that gets it."""
    if re.match("[A-Za-z][A-Za-z0-9+.-]+:/", str(image)) and not os.path.lexists(image):
        command = f"curl --location --output photo.jpg {shlex.quote(str(image))}"
        raise ImageError(str(image), f"an address, and only files are read; download it first: {command}")


def sha256(data: bytes) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits, by which photographs are compared."""
    return hashlib.sha256(data).hexdigest()


def check_pixels(pixels: np.ndarray) -> None:
    """Raise ValueError unless pixels are uint8[H, W, 3]."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels are {pixels.dtype}{list(pixels.shape)}; wanted uint8[H, W, 3]")


THREADS = 8  # hashing releases Python's lock, and a network disk serves several reads at once
CHUNK = 64  # photographs between two looks at the clock
SHOWN = 5  # changed photographs that a message names


class PhotographsChanged(ValueError):
    """Photographs that changed. `changes`: path -> (SHA-256 when extracted, SHA-256 now or why there is none)."""

    def __init__(self, folder: Path, changes: Mapping[str, tuple[str, str]], number: int) -> None:
        self.folder, self.changes = folder, dict(changes)
        lines = [
            f"{len(changes):,} of {counted(number, 'photograph')} in {folder} changed since they were extracted:"
        ]
        shown = sorted(changes.items())[:SHOWN]
        lines += [f"  {path}: SHA-256 was {old}, now {new}" for path, (old, new) in shown]
        lines += [f"  and {len(changes) - SHOWN:,} more"] if len(changes) > SHOWN else []
        super().__init__("\n".join([*lines, "Put them back, or extract into another --cache"]))


def check_photographs(
    images: Mapping[str, str],
    folder: Path,
    since: float | None = None,
    seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    follow_links: bool = False,
) -> str:
    """Compare photographs with their SHA-256 (`images`: path -> hash); return a line with their number.

    Without `seconds` all are read. Otherwise those whose time stamp is later than `since` (seconds since 1970) are all
    read, and of the others, in random order, as many as the time allows; a missing file is always found. Raises
    PhotographsChanged, which names them.
    """
    changes: dict[str, tuple[str, str]] = {}
    hash_now = functools.partial(_hash_now, folder, follow_links=follow_links)
    bar = progress(total=len(images), desc="comparing photographs", unit=" images", leave=False)
    with bar, ThreadPoolExecutor(THREADS) as pool:
        times = _each(pool, lambda path: _changed_at(folder / path), list(images))
        changed_at = dict(zip(images, times, strict=True))
        first = [path for path in images if since is None or changed_at[path] > since]
        rest = sorted(images.keys() - set(first))
        random.shuffle(rest)
        compared, end = 0, None if seconds is None else clock() + seconds
        chunks = [(chunk, True) for chunk in _chunks(first, CHUNK)]
        chunks += [(chunk, False) for chunk in _chunks(rest, CHUNK)]
        for chunk, is_first in chunks:
            if not is_first and end is not None and clock() >= end:
                break
            for path, now in zip(chunk, _each(pool, hash_now, chunk), strict=True):
                if now != images[path]:
                    changes[path] = (images[path], now)
            compared += len(chunk)
            bar.update(len(chunk))
    if changes:
        raise PhotographsChanged(folder, changes, compared)
    if compared == len(images):
        return f"photographs: all {compared:,} are as they were extracted"
    return (
        f"photographs: {compared:,} of {len(images):,} compared in {seconds:.0f} s ({len(first):,} with newer time "
        "stamps, the others at random): all are as they were extracted; tools/doctor.py compares every one"
    )


def _chunks(paths: Sequence[str], size: int) -> list[Sequence[str]]:
    return [paths[start : start + size] for start in range(0, len(paths), size)]


def _each(pool: ThreadPoolExecutor, function: Callable[[str], T], paths: Sequence[str]) -> Iterator[T]:
    """Yield what the function returns for each path. A thread takes several at a time: to hand over one takes as long
    as to read its time stamp."""
    groups = pool.map(lambda group: [function(path) for path in group], _chunks(paths, CHUNK // THREADS))
    return itertools.chain.from_iterable(groups)


def _changed_at(path: Path) -> float:
    """Return when a file's content or name last changed (`touch` and `cp -p` do not set this); infinity if missing."""
    try:
        return os.stat(path).st_ctime
    except (OSError, ValueError):
        return math.inf


def _hash_now(folder: Path, path: str, follow_links: bool) -> str:
    try:
        return sha256(read_bytes(folder, path, follow_links=follow_links))
    except ImageError as error:
        return error.reason


def contents(folder: Path, names: Sequence[str], follow_links: bool = False) -> dict[str, str]:
    """Return for each photograph that is in the folder a word that only files of the same bytes share.

    It is the SHA-256 where files have the same size; others, whose size tells them apart, are not read.
    """
    sizes: dict[str, int] = {}
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            sizes[name] = os.stat(folder / name).st_size
    shared = Counter(sizes.values())
    return {
        name: _hash_now(folder, name, follow_links) if shared[size] > 1 else f"{size} bytes"
        for name, size in sizes.items()
    }


def same_photographs(
    folder: Path, names: Sequence[str], other: Path, other_names: Sequence[str], follow_links: bool = False
) -> dict[str, str]:
    """Return for each photograph of `folder` that is also in `other` its name there.

    Files of one format are the same if their bytes are. Those of two formats, such as a JPEG that was saved again as a
    PNG, are the same if their pixels are; this reads all that have as many pixels. Damaged files are left out.
    """
    others = _headers(other, other_names)

    @functools.cache
    def by_bytes(kind: str, size: int) -> dict[str, str]:
        """Return the names of the other photographs of this format and size by the hash of their bytes."""
        same = [n for n, (own_kind, _, own_size) in others.items() if (own_kind, own_size) == (kind, size)]
        return {_content_now(other, n, follow_links): n for n in same}

    @functools.cache
    def by_pixels(kind: str, sides: tuple[int, ...]) -> dict[str, str]:
        """Return the names of the other photographs of another format and these sides by the hash of their pixels."""
        same = [
            n for n, (own_kind, own_sides, _) in others.items() if own_kind != kind and own_sides == sides
        ]
        return {_content_now(other, n, follow_links, as_pixels=True): n for n in same}

    found = {}
    own = _headers(folder, names).items()
    for name, (kind, sides, size) in progress(own, desc="compare photographs", unit=" images", leave=False):
        for candidates, as_pixels in ((by_bytes(kind, size), False), (by_pixels(kind, sides), True)):
            content = candidates and _content_now(folder, name, follow_links, as_pixels)
            if content and content in candidates:
                found[name] = candidates[content]
                break
    return found


def _headers(folder: Path, names: Sequence[str]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Return the format, the sides in pixels (a rotated file has them exchanged) and the bytes of photographs."""
    found = {}
    for name in names:
        with contextlib.suppress(OSError, ValueError, Image.DecompressionBombError):
            status = os.stat(folder / name)
            if stat.S_ISREG(status.st_mode):
                with Image.open(folder / name) as image:
                    found[name] = (image.format or "", tuple(sorted(image.size)), status.st_size)
    return found


def _content_now(folder: Path, name: str, follow_links: bool, as_pixels: bool = False) -> str:
    """Return the SHA-256 of a photograph's bytes or pixels; "" if it cannot be read."""
    try:
        if not as_pixels:
            return sha256(read_bytes(folder, name, follow_links=follow_links))
        pixels = read_image(folder, name, follow_links=follow_links)
    except ImageError:
        return ""
    return sha256(str(pixels.shape).encode() + pixels.tobytes())


def missing_photographs(names: Sequence[str], folder: Path, follow_links: bool = False) -> dict[str, str]:
    """Return the names without a file in the folder, with the reasons.

    Does not open the files, so damaged ones are not found.
    """
    reasons = {name: _why_missing(name, folder, follow_links) for name in names}
    return {name: reason for name, reason in reasons.items() if reason}


def _why_missing(name: str, folder: Path, follow_links: bool) -> str:
    try:
        location = _inside(folder, name, follow_links)
    except ImageError as error:
        return error.reason
    if os.path.isfile(location):
        return ""
    return "not a regular file" if os.path.exists(location) else _not_there(folder, name, location)
