"""Files that are published by rename, and strict, sealed JSON.

A file is taken to be damaged until its hash shows otherwise. The rules are in cache/README.md.
"""

import collections
import contextlib
import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from theworld.utils.jsonc import json_bytes, unique_keys

SCHEMA_VERSION = 1
MAX_JSON_BYTES = 1 << 30  # images.jsonl and the manifest, which grow with the number of images
MAX_STORE_BYTES, MAX_RECORD_BYTES = 1 << 22, 1 << 16  # store.json; a record
STALE_SECONDS = 24 * 3600
TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp")
FAILURES = "failures.jsonl"
COMPARED = 1 << 20  # bytes at a time
SMALL_FILE = 1 << 16  # bytes that have to be free for a file of results
HEX_SHA256 = re.compile(r"[0-9a-f]{64}")


class StoreError(ValueError):
    """A store is damaged, incomplete or ill-formed."""


class UnknownVersion(StoreError):
    """A sound file of another version of the format."""


class PlainFile(io.FileIO):
    """A file that closes with the last reference to it: a reader can go on, whatever others do meanwhile."""

    def __del__(self) -> None:
        self.close()


def open_plain(path: Path) -> PlainFile:
    """Open a file for reading, unbuffered.

    Raises StoreError if it is missing or no plain file: a FIFO would block, a link leads outside of the store.
    """
    try:
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            raise StoreError(f"{path} is {stat.filemode(mode)}, expected a plain file")
        return PlainFile(path)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{path} is missing") from None


def hash_file(path: Path) -> tuple[int, str]:
    """Return the size in bytes and the SHA-256 of a plain file."""
    with open_plain(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def holds(path: Path, data: bytes) -> bool:
    """Whether a plain file has exactly these bytes."""
    try:
        if path.lstat().st_size != len(data):
            return False
        with open_plain(path) as file:
            parts = iter(lambda: file.read(COMPARED), b"")
            return all(part == data[n * COMPARED : n * COMPARED + len(part)] for n, part in enumerate(parts))
    except (FileNotFoundError, NotADirectoryError, StoreError):
        return False


def identity(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a plain file is replaced or written to; None if there is none.

    The file is opened for it, because network file systems answer from memory otherwise.
    """
    try:
        with open_plain(path) as file:
            status = os.fstat(file.fileno())
    except StoreError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def explained(error: OSError, path: Path, needed: str) -> OSError:
    """Return the same error with the path, what was needed and how much room there is."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    return OSError(error.errno, f"{error.strerror or error}; {needed} needed, {free:,} bytes free", str(path))


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError of the block the path that was written to: of a write into an open file it has none."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError with its path."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # what file systems say that cannot sync a folder at all
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise explained(error, folder, "its names on disk") from error


def make_folder(folder: Path) -> None:
    """Make a folder, with its parents, if it is not there. Raises OSError with its path and the bytes free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explained(error, folder, "a folder") from error


def refuse_special(path: Path) -> None:
    """Raise OSError for a device, a FIFO or a socket, which a file that is published would take the place of."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(
            errno.EINVAL, "a device, a FIFO or a socket, and a file is wanted; name another", str(path)
        )


def publish_bytes(path: Path, data: bytes, overwrite: bool = False) -> None:
    """Put `data` at `path`, whole or not at all, and durable on return.

    The same bytes may be published again; other bytes raise FileExistsError, unless `overwrite`. A symbolic link stays:
    the file that it names is published. On any error nothing of `data` stays under `path`. Raises OSError for what is
    no plain file, and with the bytes needed and free where there is no room.
    """
    refuse_special(path)
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    if holds(path, data):
        return sync_folder(path.parent)  # the process that renamed it may not have come this far
    # Asked again: another process may have published the same since.
    if not overwrite and os.path.lexists(path) and not holds(path, data):
        words = "already there with other content; it is never overwritten"
        raise FileExistsError(errno.EEXIST, words, str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        try:
            sync_folder(path.parent)
        except OSError:
            path.unlink()
            raise
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        reason = str(error.strerror or error).partition("; ")[0]
        detail = f"{reason}; {len(data):,} bytes needed, {free:,} free; nothing was published"
        raise OSError(error.errno, detail, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # after the rename, or where nothing can be written
            temporary.unlink()


def write_failures(folder: Path, failures: Sequence[tuple[str, str]]) -> None:
    """Write `failures.jsonl`, one object with path and reason per line, or remove it if there are no failures."""
    path = folder / FAILURES
    if not failures:
        path.unlink(missing_ok=True)
        return
    lines = (json_bytes({"path": p, "reason": r}) + b"\n" for p, r in failures)
    publish_bytes(path, b"".join(lines), overwrite=True)


def check_unique(names: Sequence[str], what: str) -> None:
    """Raise StoreError for the first name that occurs twice."""
    for name, number in collections.Counter(names).items():
        if number > 1:
            raise StoreError(f"{what} {name!r} stands twice")


# --- JSON ----------------------------------------------------------------------------------------


def canonical_json(value: Any) -> bytes:
    """Return the one spelling that is hashed and compared: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def canonical_sha256(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def parse_json(data: bytes, where: object) -> dict[str, Any]:
    """Return one object of ASCII JSON. Raises StoreError that names `where` for duplicate keys, NaN and all else."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(data.decode("ascii"), object_pairs_hook=unique_keys("key"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise StoreError(f"{where} holds {type(value).__name__}, expected an object")
    return value


def check_keys(fields: Any, kinds: Mapping[str, type], where: object) -> None:
    """Raise StoreError unless there are exactly these keys, with values of exactly these types.

    Integers are from 0 to 2^62 - 1, and the values of keys that end in sha256 are 64 hex digits.
    """
    if not isinstance(fields, dict):
        raise StoreError(f"{where}: {fields!r:.100} is no object")
    for key in sorted(kinds.keys() ^ fields.keys()):
        raise StoreError(f"{where}: key {key!r} is {'missing' if key in kinds else 'unknown'}")
    for key, kind in kinds.items():
        value, right_type = fields[key], type(fields[key]) is kind
        if not right_type or (kind is int and not 0 <= value < 1 << 62):
            raise StoreError(f"{where}: {key} is {value!r:.100}, expected {kind.__name__}")
        if key.endswith("sha256") and not HEX_SHA256.fullmatch(value):
            raise StoreError(f"{where}: {key} is {value!r:.100}, expected 64 hex digits")


def seal(fields: dict[str, Any]) -> bytes:
    """Return a JSON file that carries its own hash: `self_sha256`, over the canonical rest."""
    sealed = {**fields, "self_sha256": canonical_sha256(fields)}
    return (json.dumps(sealed, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def _has_seal(fields: dict[str, Any]) -> bool:
    """Whether an object of any version carries its own hash."""
    rest = {key: value for key, value in fields.items() if key != "self_sha256"}
    try:
        return fields.get("self_sha256") == canonical_sha256(rest)
    except (ValueError, RecursionError):  # 1e999 is read as infinity
        return False


def read_plain(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Return all of a small plain file. Raises StoreError if missing, no plain file, or above `limit` bytes."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise StoreError(f"{path}: {size:,} bytes, limit {limit:,}")
        return file.readall()


def read_sealed(
    path: Path, kinds: Mapping[str, type], limit: int = MAX_STORE_BYTES
) -> tuple[dict[str, Any], str]:
    """Return the fields without the seal, and the SHA-256 of the file.

    Raises StoreError if a single byte is not as `seal` wrote it or if there are more than `limit` bytes, UnknownVersion
    for a sound file of another version.
    """
    data = read_plain(path, limit)
    fields = parse_json(data, path)
    if fields.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        version, error = fields["schema_version"], UnknownVersion if _has_seal(fields) else StoreError
        raise error(f"{path}: schema_version is {version!r:.100}, this program reads {SCHEMA_VERSION}")
    check_keys(fields, {**kinds, "self_sha256": str}, path)
    stated = fields.pop("self_sha256")
    try:
        actual, expected_data = canonical_sha256(fields), seal(fields)
    except (ValueError, RecursionError) as error:  # 1e999 is read as infinity
        raise StoreError(f"{path} cannot be written back: {error}") from None
    if stated != actual:
        raise StoreError(
            f"{path} is damaged or was edited: self_sha256 is {stated}, its content has {actual}"
        )
    if data != expected_data:
        raise StoreError(f"{path} is damaged or was edited: it is not spelled as it was written")
    return fields, hashlib.sha256(data).hexdigest()


# ---- room


def nearest_folder(path: Path) -> Path:
    """Return the lowest existing folder on the way to `path`. Raises NotADirectoryError if a file is in the way."""
    path = path.absolute()
    while not os.path.lexists(path):
        path = path.parent
    if not path.is_dir():
        raise NotADirectoryError(
            f"{path} is a file, and a folder is wanted there; move it, or choose another"
        )
    return path


def free_bytes(path: Path) -> int:
    """Return the bytes that are free on the disk of `path`, which need not exist."""
    return shutil.disk_usage(nearest_folder(path)).free


def check_room(path: Path, size: int, flag: str) -> int:
    """Return the bytes that are free on the disk of `path`. Raises ValueError if they are fewer than `size`."""
    free = free_bytes(path)
    if size > free:
        raise ValueError(f"{path}: {size:,} bytes are needed and {free:,} are free; make room or move {flag}")
    return free


def check_folder(folder: Path, flag: str) -> None:
    """Raise OSError if nothing can be written into a folder, which need not exist."""
    there = nearest_folder(folder)
    if not os.access(there, os.W_OK | os.X_OK):
        reason = "is not yours to write to"
        if os.statvfs(there).f_flag & os.ST_RDONLY:
            reason = "is on a file system that cannot be written to"
        raise PermissionError(f"{flag} {folder}: {there} {reason}; choose another {flag}")


def companion(path: Path, suffix: str, own: str) -> Path:
    """Return the file that goes with `path`: `own`, the suffix of its kind, makes way for `suffix`.

    A name without `own` keeps all of itself: runs called lr-0.001 and lr-0.003 have files of their own.
    """
    return path.with_name(path.name.removesuffix(own) + suffix)


def check_output(path: Path, flag: str = "--output") -> str:
    """Return " (replaces the one there)" or nothing. Raises OSError if the file could not be written."""
    check_folder(path.parent, flag)
    if path.is_dir():
        raise IsADirectoryError(f"{flag} {path} is a folder, and a file is wanted; name one in it")
    refuse_special(path)
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{flag} {path} is not yours to write to; choose another {flag}")
    check_room(path.parent, SMALL_FILE, flag)
    return " (replaces the one there)" if path.exists() else ""
