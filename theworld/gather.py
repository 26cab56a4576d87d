"""The photographs that statements name, put into one folder: downloaded, or taken from a COCO that is already there.

Each is decoded before it counts, and appears under its name only when it is whole, so that any stop leaves nothing
half done and the same call goes on.
"""

import contextlib
import os
import secrets
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from theworld.cache import FAILURES
from theworld.config import Config
from theworld.console import progress
from theworld.fetch import CertificateRefused, Fetcher, FetchError, Limits, checked, secure_url
from theworld.files import publish_bytes
from theworld.images import MAX_BYTES, MAX_PIXELS, ImageError, decode, read_bytes
from theworld.listing import write_failures
from theworld.places import check_folder, check_room, missing_photographs, statements_at_hand
from theworld.vsr import Statement, load_all

# Where COCO 2017's photographs lie in a folder or a zip, below it.
PLACES = (
    "",
    "train2017/",
    "val2017/",
    "images/train2017/",
    "images/val2017/",
    "coco/train2017/",
    "coco/val2017/",
)
MEAN_BYTES = 160_000  # of a photograph of COCO 2017, about
GIVE_UP = 50  # downloads in a row that the network or the server fails: the rest would wait for nothing

# (name, link, where to put it): raises FetchError or ImageError with the reason why it is not there.
Get = Callable[[str, str, Path], None]


class Gathered(NamedTuple):
    """What `gather` has done; the three add up to what was wanted."""

    already: int
    new: int
    failures: list[tuple[str, str]]  # name and reason, sorted

    def report(self, output: Path) -> str:
        """What was done, in lines for a terminal: the first five failures and where the others are."""
        lines = [f"{name}: {reason}" for name, reason in self.failures[:5]]
        if len(self.failures) > 5:
            lines.append(f"and {len(self.failures) - 5:,} more")
        lines.append(
            f"{self.already + self.new + len(self.failures):,} photographs: {self.already:,} there before, "
            f"{self.new:,} new, {len(self.failures):,} failed"
        )
        if self.failures:
            lines.append(f"all reasons: {output / FAILURES}; the same command tries those again")
        return "\n".join(lines)


def get_images(
    config: Config, output: Path, coco: Sequence[Path], allowed_hosts: Sequence[str], num_workers: int
) -> Gathered:
    """Gets the photographs of all splits of the configured annotations: from `coco`, or with none from the network.

    Raises as `load_all`, `links_of`, `CocoCopies`, `Fetcher` and `gather` do.
    """
    splits = load_all(config.annotations, config.dataset_name)
    links = links_of(statement for own in splits.values() for statement in own)
    stop = threading.Event()
    get: Get
    if coco:
        get = CocoCopies(coco, config.max_image_pixels)
    else:
        get = Downloads(Fetcher(allowed_hosts, Limits(max_pixels=config.max_image_pixels), stop=stop))
    return gather(links, output, get, num_workers, config.max_image_pixels, stop)


def plan_images(
    config: Config, output: Path, coco: Sequence[Path], allowed_hosts: Sequence[str], num_workers: int
) -> Iterator[str]:
    """What `get_images` would do with the same arguments, in lines; writes, decodes and downloads nothing."""
    splits = statements_at_hand(config.annotations, config.dataset_name)
    copies = CocoCopies(coco, config.max_image_pixels) if coco else None
    Fetcher(allowed_hosts)  # which refuses what is no host
    check_folder(output, "--output")
    if splits is None:
        yield f"statements   {config.dataset_name}, from the hub when the run starts; not counted here"
        return
    links = links_of(statement for own in splits.values() for statement in own)
    missing = missing_photographs(list(links), output)
    yield f"statements   {sum(map(len, splits.values())):,}, about {len(links):,} photographs"
    yield f"photographs  {len(links) - len(missing):,} are in {output}, {len(missing):,} to get"
    if copies is not None:
        absent = [name for name in missing if name not in copies]
        yield f"takes        {len(missing) - len(absent):,} from {copies.names}, {num_workers} at a time"
    else:
        absent = [name for name in missing if not _may_be_asked(links[name], allowed_hosts)]
        size = (len(missing) - len(absent)) * MEAN_BYTES
        free = check_room(output, size, "--output")
        yield (
            f"downloads    {len(missing) - len(absent):,} from {', '.join(allowed_hosts)}, {num_workers} at a time: "
            f"about {size / 2**20:,.0f} MiB ({free / 2**30:,.1f} GiB free)"
        )
    if absent:
        why = (
            f"not in {copies.names}" if copies is not None else "without a link, or with one to another host"
        )
        yield f"would fail   {len(absent):,}, such as {absent[0]}: {why}"


def _may_be_asked(link: str, allowed_hosts: Sequence[str]) -> bool:
    try:
        checked(secure_url(link), allowed_hosts)
    except FetchError:
        return False
    return True


def links_of(statements: Iterable[Statement]) -> dict[str, str]:
    """name -> link of the photographs that statements name, sorted.

    Raises ValueError for a name that is more than a plain file name, and for one with two links.
    """
    links: dict[str, str] = {}
    for statement in statements:
        name, link = statement.image, statement.image_link
        if not name or name.startswith(".") or name == FAILURES or any(sign in name for sign in "/\\\0"):
            raise ValueError(
                f"image {name!r} (statement {statement.index + 1}) is no plain file name; give one such as "
                f"000000000142.jpg, without folders, neither hidden nor {FAILURES}"
            )
        if links.setdefault(name, link) != link:
            raise ValueError(f"image {name} has two links, {links[name]!r} and {link!r}; keep one")
    return dict(sorted(links.items()))


def gather(
    links: Mapping[str, str],
    output: Path,
    get: Get,
    num_workers: int = 8,
    max_pixels: int = MAX_PIXELS,
    stop: threading.Event | None = None,
) -> Gathered:
    """Has `get` put every photograph into `output` that is not there yet, `num_workers` at a time.

    A file that is there but does not decode is replaced. What failed is written to failures.jsonl in `output`,
    which is not there when nothing failed. `stop` is set when the call ends early. Raises OSError where `output`
    cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    failures: list[tuple[str, str]] = []
    num_already = 0

    def one(name: str) -> bool:
        if _is_there(output, name, max_pixels):
            return True
        get(name, links[name], output / name)
        return False

    executor = ThreadPoolExecutor(num_workers)
    try:
        waiting = {executor.submit(one, name): name for name in links}
        bar = progress(as_completed(waiting), total=len(waiting), desc="photographs", unit=" images")
        for done in bar:
            try:
                num_already += done.result()
            except (FetchError, ImageError) as error:
                failures.append((waiting[done], error.reason))
                bar.set_postfix(failed=len(failures), refresh=False)
    except BaseException:
        if stop is not None:
            stop.set()
        raise
    finally:
        executor.shutdown(cancel_futures=True)
    failures.sort()
    write_failures(output, failures)
    return Gathered(num_already, len(links) - num_already - len(failures), failures)


def _is_there(folder: Path, name: str, max_pixels: int) -> bool:
    try:
        decode(read_bytes(folder, name), name, max_pixels)
    except ImageError:
        return False
    return True


# --- From the network ----------------------------------------------------------------------------


class Downloads:
    """Gets photographs from their links. When the network seems to be gone, it fails the rest at once."""

    def __init__(self, fetcher: Fetcher) -> None:
        self.fetcher = fetcher
        self.lock = threading.Lock()
        self.num_in_a_row = 0

    def __call__(self, name: str, link: str, path: Path) -> None:
        if not link:
            raise FetchError("the annotations have no image_link for it; take it from a COCO folder or zip")
        with self.lock:
            if self.num_in_a_row >= GIVE_UP:
                raise FetchError(f"not tried: {GIVE_UP} downloads in a row had failed; run again")
        try:
            data = self.fetcher.photograph(link, name)
        except FetchError as error:
            if error.may_pass or isinstance(error, CertificateRefused):
                with self.lock:
                    self.num_in_a_row += 1
            raise
        with self.lock:
            self.num_in_a_row = 0
        publish_bytes(path, data, overwrite=True)


# --- From a COCO that is there -------------------------------------------------------------------


@dataclass(frozen=True)
class CocoFolder:
    """The photographs of a folder; what it gives shares the disk space of what it has, where that can be."""

    folder: Path
    max_pixels: int = MAX_PIXELS

    def __contains__(self, name: str) -> bool:
        return any(os.path.lexists(self.folder / place / name) for place in PLACES)

    def __call__(self, name: str, path: Path) -> bool:
        """Puts the photograph there; whether the folder has it. Raises ImageError if it has but cannot be used."""
        for place in PLACES:
            source = self.folder / place / name
            if os.path.lexists(source):
                data = read_bytes(self.folder, place + name)
                decode(data, place + name, self.max_pixels)
                if not _link(source, path):
                    publish_bytes(path, data, overwrite=True)
                return True
        return False


def _link(source: Path, path: Path) -> bool:
    """Gives a file a second name, replacing what has that name; whether the file system could."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        os.link(os.path.realpath(source), temporary)
    except OSError:  # another file system, or one without hard links, or a file of somebody else
        return False
    try:
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    return True


class CocoZip:
    """The photographs of a zip file, such as COCO's train2017.zip. Raises ValueError if it is none."""

    def __init__(self, path: Path, max_pixels: int = MAX_PIXELS) -> None:
        self.path = path
        self.max_pixels = max_pixels
        try:
            self.archive = zipfile.ZipFile(path)  # several threads may read of one
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is neither a folder nor a whole zip file: {error}") from error
        self.members = {info.filename: info for info in self.archive.infolist()}

    def __contains__(self, name: str) -> bool:
        return any(place + name in self.members for place in PLACES)

    def __call__(self, name: str, path: Path) -> bool:
        """Puts the photograph there; whether the zip has it. Raises ImageError if it has but cannot be used."""
        for place in PLACES:
            info = self.members.get(place + name)
            if info is not None:
                data = self._read(info)
                decode(data, info.filename, self.max_pixels)
                publish_bytes(path, data, overwrite=True)
                return True
        return False

    def _read(self, info: zipfile.ZipInfo) -> bytes:
        try:
            with self.archive.open(info) as file:
                data = file.read(MAX_BYTES + 1)  # whatever its header says
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            # RuntimeError: encrypted; NotImplementedError: a compression that Python does not know
            raise ImageError(info.filename, f"cannot be read from {self.path.name}: {error}") from error
        if len(data) > MAX_BYTES:
            raise ImageError(info.filename, f"more than {MAX_BYTES} bytes; at most {MAX_BYTES} are read")
        return data


class CocoCopies:
    """Gets photographs from the first of several COCO folders and zips that has them; the network is not used.

    Raises FileNotFoundError for a source that is not there, ValueError for one that is no folder or zip.
    """

    def __init__(self, sources: Sequence[Path], max_pixels: int = MAX_PIXELS) -> None:
        for path in sources:
            if not path.exists():
                raise FileNotFoundError(f"coco: no file or folder {path}")
        self.names = ", ".join(str(path) for path in sources)
        self.sources = [
            CocoFolder(path, max_pixels) if path.is_dir() else CocoZip(path, max_pixels) for path in sources
        ]

    def __contains__(self, name: str) -> bool:
        return any(name in source for source in self.sources)

    def __call__(self, name: str, link: str, path: Path) -> None:
        if not any(source(name, path) for source in self.sources):
            split = urlsplit(link).path.strip("/").rpartition("/")[0]
            cure = f"; it is one of COCO's {split}: give that with --coco too" if split else ""
            raise FetchError(f"not in {self.names}{cure}")
