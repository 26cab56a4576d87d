"""Fill a folder with the photographs that statements name, by download or from an existing copy of COCO.

A download uses https only, goes to allowed hosts only, at the first address and at every redirect, and has limits of
bytes, pixels and time. Certificates are always verified. `requests` reads the environment as usual: HTTPS_PROXY,
NO_PROXY, REQUESTS_CA_BUNDLE; .netrc is not used and no cookie is kept.

A photograph is decoded before it counts and appears under its name only when it is complete, so the same call resumes
after any interruption.
"""

import contextlib
import functools
import os
import re
import secrets
import socket
import ssl
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPSConnection
from urllib3.exceptions import HTTPError, InvalidHeader, MaxRetryError, ProtocolError
from urllib3.response import HTTPResponse
from urllib3.util.retry import Retry

from theworld.config.config import Config
from theworld.data.images import MAX_BYTES, MAX_PIXELS, ImageError, decode, missing_photographs, read_bytes
from theworld.data.vsr import Statement, load_all, statements_at_hand
from theworld.utils.console import progress
from theworld.utils.files import FAILURES, check_folder, check_room, publish_bytes, write_failures
from theworld.utils.text import byte_size, counted, difference, folded

COCO_HOST = "images.cocodataset.org"
# COCO's host has no certificate of its own: the same files are served over https by the host at the right.
PATH_STYLE_HOSTS = {COCO_HOST: "s3.amazonaws.com"}
HOST = re.compile(r"[a-z0-9-]{1,63}(\.[a-z0-9-]{1,63})*(:[0-9]{1,5})?")
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK_BYTES = 1 << 16
MEAN_BYTES = 160_000  # of a photograph of COCO 2017, for the estimate of a dry run
MAX_FAILURES_IN_A_ROW = 50  # of the network or the server, after which the remaining downloads are not tried

COCO_SPLITS = ("train2017", "val2017")
# Folders of a COCO folder in which photographs are looked for.
COCO_FOLDERS = ("", *(f"{parent}{split}/" for parent in ("", "images/", "coco/") for split in COCO_SPLITS))

# (name, link, path to write): raises DownloadError or ImageError with the reason of a failure.
Save = Callable[[str, str, Path], None]


class DownloadError(Exception):
    """A failed download: the reason in words, whether a retry may help, and the seconds the server asks to wait."""

    def __init__(self, reason: str, can_retry: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.can_retry = can_retry
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.reason


class CertificateError(DownloadError):
    """A certificate that cannot be verified. A retry does not help; the next photograph has the same trouble."""


# --- Addresses -----------------------------------------------------------------------------------


def secure_url(link: str) -> str:
    """Return the https address of a published link; COCO's host becomes the host that has a certificate."""
    if link[:7].lower() == "http://":
        link = f"https://{link[7:]}"
    for host, server in PATH_STYLE_HOSTS.items():
        start = f"https://{host}/"
        if link[: len(start)].lower() == start:
            return f"https://{server}/{host}/{link[len(start) :]}"
    return link


def check_hosts(allowed_hosts: Collection[str]) -> None:
    """Raise ValueError unless every allowed host is a lower-case host name, with or without a port."""
    for host in allowed_hosts:
        if not HOST.fullmatch(host):
            raise ValueError(f"allowed_host is {host!r}; give a host's name in small letters, or name:port")


def check_url(url: str, allowed_hosts: Collection[str]) -> None:
    """Raise DownloadError unless a URL is plain https to an allowed host ("host" or "host:port")."""
    shown = _without_secrets(url)
    if not re.fullmatch(r"[!-~]+", url):
        raise DownloadError(
            f"refused: {shown!r} is empty or holds spaces, control or other non-ASCII characters"
        )
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 443
    except ValueError as error:
        raise DownloadError(f"refused: {shown} is no URL: {error}") from None
    if parts.scheme != "https":
        raise DownloadError(f"refused: {shown} is {parts.scheme or 'no'}://, only https:// is used")
    if "@" in parts.netloc:
        raise DownloadError(f"refused: the URL names a user for {host}")
    if ".." in unquote(parts.path).split("/"):
        raise DownloadError(f"refused: {shown} climbs with ..")
    netloc = host if port == 443 else f"{host}:{port}"
    for published, server in PATH_STYLE_HOSTS.items():
        if netloc == server and parts.path.startswith(f"/{published}/"):
            netloc = published  # this folder of the shared server belongs to the published host
            break
    if netloc not in allowed_hosts:
        allowed = ", ".join(sorted(allowed_hosts))
        raise DownloadError(f"refused: {netloc} is not an allowed host ({allowed})")


def _without_secrets(text: str) -> str:
    """Return at most 200 characters of a URL or message, without user names, passwords and queries of URLs."""
    return re.sub(r"\?\S*", "?...", re.sub(r"//\S*@", "//***@", text))[:200]


# --- Limits --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DownloadLimits:
    """Limits of the download of one photograph. Times are in seconds."""

    connect_seconds: float = 10.0
    # to connect, and again for the TLS handshake
    read_seconds: float = 30.0
    # for the headers of a response, and without a byte of its body
    total_seconds: float = 300.0
    # with all redirects, retries and waits; looking up a name takes as long as the system lets it
    max_bytes: int = MAX_BYTES
    max_pixels: int = MAX_PIXELS
    max_redirects: int = 5
    max_tries: int = 5
    backoff_factor: float = 1.0
    # the first retry comes at once, the next ones after 2, 4, 8, ... times this, plus a random part of it
    max_wait: float = 60.0
    # between two tries, whatever the server asks for

    def retry(self) -> Retry:
        """Return urllib3's retry policy for these limits: 429 and 5xx, with exponential backoff."""
        return Retry(
            total=self.max_tries - 1,
            status_forcelist=[429, *range(500, 600)],
            backoff_factor=self.backoff_factor,
            backoff_jitter=self.backoff_factor,
            backoff_max=self.max_wait,
            respect_retry_after_header=True,
        )

    def retry_after(self, response: requests.Response) -> float:
        """Return the seconds that a response asks to wait, at most `max_wait`; 0 if it does not say."""
        try:
            seconds = self.retry().parse_retry_after(response.headers.get("Retry-After", "0"))
        except (InvalidHeader, ValueError, OverflowError):
            return 0.0
        return min(seconds, self.max_wait)


class Deadline:
    """The end of the time that one download may take."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end = time.monotonic() + seconds

    def left(self, at_most: float = float("inf")) -> float:
        """Return the seconds that are left, at most `at_most`. Raises DownloadError if there are none."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise DownloadError(f"not done within {self.seconds:g} s in all", can_retry=True)
        return min(left, at_most)


@contextlib.contextmanager
def _time_limit(seconds: float, shutdown: Callable[[], object]) -> Iterator[None]:
    """Shut a socket down if the block takes longer than `seconds`, and raise TimeoutError.

    The timeout of a socket starts again with every byte, so a server that sends a byte now and then passes it.
    """
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # the connection may be closed already
            shutdown()

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if expired.is_set():
            raise TimeoutError("timed out")


# --- Requests ------------------------------------------------------------------------------------


class _Connection(HTTPSConnection):
    """An HTTPS connection on which the headers of a response have to arrive within the read timeout."""

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]  # as urllib3 has it
        seconds = self.timeout
        assert seconds, "every request has a read timeout"
        with _time_limit(seconds, lambda: self.sock and self.sock.shutdown(socket.SHUT_RDWR)):
            return super().getresponse()


class _Adapter(HTTPAdapter):
    """requests' adapter, directly or through a proxy, over `_Connection`."""

    def get_connection_with_tls_context(self, *arguments: Any, **options: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*arguments, **options)
        pool.ConnectionCls = _Connection
        return pool


class _Session(requests.Session):
    """A session that sends no credentials of .netrc, keeps no cookies and leaves redirects to the caller."""

    def __init__(self, num_connections: int) -> None:
        super().__init__()
        self.headers.update({"User-Agent": "theworld", "Accept-Encoding": "identity"})
        self.auth = lambda request: request  # with any other value requests looks into .netrc
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self.mount("https://", _Adapter(pool_maxsize=num_connections))

    def get_redirect_target(self, response: Any) -> None:
        """Return None: for a redirect requests would read its whole body, without a limit."""
        return None


class Downloader:
    """Downloads photographs from allowed hosts under limits; several threads may use one object.

    After `MAX_FAILURES_IN_A_ROW` failures of the network the remaining downloads fail at once. When `stop` is set,
    downloads that are under way end soon. Raises ValueError for an allowed host that is no host name.
    """

    def __init__(
        self,
        allowed_hosts: Collection[str] = (COCO_HOST,),
        limits: DownloadLimits | None = None,
        num_workers: int = 8,
        stop: threading.Event | None = None,
    ) -> None:
        check_hosts(allowed_hosts)
        self.allowed_hosts = allowed_hosts
        self.limits = limits or DownloadLimits()
        self.stop = stop or threading.Event()
        self._session = _Session(num_workers)
        self._lock = threading.Lock()
        self._failures_in_a_row = 0

    def save(self, name: str, link: str, path: Path) -> None:
        """Download the photograph at `link` to `path`. Raises DownloadError, and OSError if it cannot be written."""
        if not link:
            raise DownloadError(
                "the annotations have no image_link for it; take it from a COCO folder or zip"
            )
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            raise DownloadError(
                f"not tried: {MAX_FAILURES_IN_A_ROW} downloads in a row had failed; run again"
            )
        try:
            data = self.fetch(name, link)
        except DownloadError as error:
            if error.can_retry or isinstance(error, CertificateError):
                with self._lock:
                    self._failures_in_a_row += 1
            raise
        with self._lock:
            self._failures_in_a_row = 0
        publish_bytes(path, data, overwrite=True)

    def fetch(self, name: str, link: str) -> bytes:
        """Return the bytes of a published photograph that decodes; `name` is for messages only.

        Failures that may pass are retried. Raises DownloadError.
        """
        # This loop applies urllib3's policy, not the adapter: an adapter's retries end with the headers, and its waits
        # know neither the total time nor `stop`.
        url, deadline, retry = secure_url(link), Deadline(self.limits.total_seconds), self.limits.retry()
        while True:
            try:
                return self._fetch_once(name, url, deadline)
            except DownloadError as error:
                num_tries = len(retry.history) + 1
                if num_tries > 1:
                    error.reason += f" (tried {num_tries} times)"
                if not error.can_retry:
                    raise
                try:
                    retry = retry.increment("GET", url, error=error)
                except MaxRetryError:
                    raise error from None
                wait = max(retry.get_backoff_time(), error.retry_after)
                if time.monotonic() + wait >= deadline.end:
                    raise
                if self.stop.wait(wait):
                    raise DownloadError("stopped") from error

    def _fetch_once(self, name: str, url: str, deadline: Deadline) -> bytes:
        for _ in range(self.limits.max_redirects + 1):
            check_url(url, self.allowed_hosts)
            try:
                answer = self._request(url, deadline)
            except (OSError, HTTPError, ValueError) as error:  # requests' own exceptions are OSErrors
                deadline.left()
                raise _explained(error, urlsplit(url).netloc) from error
            if isinstance(answer, str):
                url = _redirected(url, answer)
                continue
            data, is_complete = answer
            try:
                decode(data, name, self.limits.max_pixels)
            except ImageError as error:
                # A body that arrived as the server sent it will be the same at the next try.
                raise DownloadError(error.reason, can_retry=not is_complete) from error
            return data
        raise DownloadError(
            f"refused: more than {self.limits.max_redirects} redirects, the last to {_without_secrets(url)}"
        )

    def _request(self, url: str, deadline: Deadline) -> str | tuple[bytes, bool]:
        """Return the address of a redirect, or the body and whether it is known to be complete."""
        timeout = deadline.left(self.limits.connect_seconds), deadline.left(self.limits.read_seconds)
        with self._session.get(url, stream=True, allow_redirects=False, timeout=timeout) as response:
            status = response.status_code
            if status in REDIRECTS:
                return response.headers.get("Location", "")
            if status != 200:
                can_retry = self.limits.retry().is_retry("GET", status)
                reason = f"HTTP status {status} from {urlsplit(url).netloc}"
                raise DownloadError(reason, can_retry, self.limits.retry_after(response))
            with _time_limit(deadline.left(), response.raw.shutdown):
                return self._read_body(response.raw)

    def _read_body(self, raw: HTTPResponse) -> tuple[bytes, bool]:
        """Return the body, and whether the response says where it ends."""
        length, limit = raw.length_remaining, self.limits.max_bytes
        if length is not None and length > limit:
            raise DownloadError(f"{length} bytes; at most {limit} are read")
        data = bytearray()
        try:
            for chunk in raw.stream(CHUNK_BYTES, decode_content=False):
                data += chunk
                if len(data) > limit:
                    raise DownloadError(f"more than {limit} bytes; at most {limit} are read")
                if self.stop.is_set():
                    raise DownloadError("stopped")
        except ProtocolError as error:
            arrived = (
                f"{max(len(data), raw.tell())} of {'an unknown number of' if length is None else length}"
            )
            raise DownloadError(f"cut off: {arrived} bytes arrived", can_retry=True) from error
        return bytes(data), length is not None or raw.chunked


def _redirected(url: str, location: str) -> str:
    """Return the absolute address of a redirect. Raises DownloadError if it is no URL."""
    try:
        return urljoin(url, location)
    except ValueError as error:
        shown = _without_secrets(location)
        raise DownloadError(f"refused: a redirect to {shown!r}, which is no URL: {error}") from None


def _explained(error: Exception, host: str) -> DownloadError:
    """Return the failure of a request to `host` in words, without passwords of a proxy."""
    causes: list[BaseException] = [error]
    while following := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(following)
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return CertificateError(f"the certificate of {host} is not accepted: {cause.verify_message}")
    if isinstance(error, ValueError):
        # requests' words repeat the address of the proxy, with its password. The URL itself was checked before.
        return DownloadError(
            "the proxy in the environment (HTTPS_PROXY or ALL_PROXY) cannot be used: give http://HOST:PORT"
        )
    if any(isinstance(cause, TimeoutError) for cause in causes):
        return DownloadError(f"{host} does not answer: timed out", can_retry=True)
    is_proxy = isinstance(error, requests.exceptions.ProxyError)
    way = f"the proxy to {host}" if is_proxy else f"the connection to {host}"
    return DownloadError(_without_secrets(f"{way} failed: {causes[-1]!r}"), can_retry=True)


# --- Copies of COCO ------------------------------------------------------------------------------


class CocoCopy:
    """The photographs of a folder, or of a zip file such as COCO's train2017.zip.

    They lie at its top, or in train2017/ or val2017/: of a folder in `COCO_FOLDERS`, of a zip below any folders, with
    / or \\ between them. Raises FileNotFoundError if the path does not exist, ValueError if it is no folder or zip.
    """

    def __init__(self, path: Path, max_pixels: int = MAX_PIXELS, follow_links: bool = False) -> None:
        if not path.exists():
            raise FileNotFoundError(f"coco: no file or folder {path}")
        self.path = path
        self.max_pixels = max_pixels
        self.follow_links = follow_links
        self.archive: zipfile.ZipFile | None = None
        if path.is_dir():
            folders = [folder for folder in COCO_FOLDERS if (path / folder).is_dir()]
            paths = {folder + name: folder + name for folder in folders for name in os.listdir(path / folder)}
        else:
            try:
                self.archive = zipfile.ZipFile(path)  # several threads may read from one object
            except zipfile.BadZipFile as error:
                raise ValueError(f"{path} is neither a folder nor a whole zip file: {error}") from error
            paths = {entry: entry.replace("\\", "/") for entry in self.archive.namelist()}
        self.entries: dict[str, str] = {}  # name -> path as the folder or zip has it, with the fewest folders
        for entry in sorted(paths, key=lambda entry: (paths[entry].count("/"), entry)):
            *folders, name = paths[entry].split("/")
            if not folders or folders[-1] in (*COCO_SPLITS, "."):
                self.entries.setdefault(name, entry)

    def save(self, name: str, path: Path) -> None:
        """Put a photograph of `entries` at `path`, as a hard link where that is possible. Raises ImageError."""
        entry = self.entries[name]
        if self.archive is None:
            data = read_bytes(self.path, entry, follow_links=self.follow_links)
        else:
            data = self._read(self.archive, entry)
        decode(data, entry, self.max_pixels)
        if self.archive is not None or not _link(self.path / entry, path):
            publish_bytes(path, data, overwrite=True)

    def _read(self, archive: zipfile.ZipFile, entry: str) -> bytes:
        try:
            with archive.open(entry) as file:
                data = file.read(MAX_BYTES + 1)  # whatever its header says
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            # RuntimeError: encrypted; NotImplementedError: a compression that Python does not know
            raise ImageError(entry, f"cannot be read from {self.path.name}: {error}") from error
        if len(data) > MAX_BYTES:
            raise ImageError(entry, f"more than {MAX_BYTES} bytes; at most {MAX_BYTES} are read")
        return data

    @functools.cached_property
    def similar_names(self) -> dict[str, str]:
        """The names of `entries`, by what `folded` makes of them."""
        return {folded(name): name for name in self.entries}


def _link(source: Path, path: Path) -> bool:
    """Make `path` a hard link of a file, replacing what is there. Return whether the file system could."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        os.link(os.path.realpath(source), temporary)
    except OSError:  # another file system, no hard links, or a file of another user
        return False
    try:
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    return True


def save_copy(copies: Sequence[CocoCopy], name: str, link: str, path: Path) -> None:
    """Put a photograph of the first copy that has it at `path`. Raises ImageError if none has, or it is damaged."""
    for copy in copies:
        if name in copy.entries:
            return copy.save(name, path)
    raise ImageError(name, why_missing(copies, name, link))


def why_missing(copies: Sequence[CocoCopy], name: str, link: str) -> str:
    """Return a message about a photograph that no copy has, with a similar name or the part of COCO that has it."""
    reason = f"not in {', '.join(str(copy.path) for copy in copies)}"
    for copy in copies:
        similar = copy.similar_names.get(folded(name))
        if similar is not None:
            entry, words = copy.entries[similar], difference(similar, name)
            return f"{reason}; {copy.path} has {entry!a}, which differs in {words}: rename one of the two"
    split = urlsplit(link).path.strip("/").rpartition("/")[0]
    return f"{reason}; it is one of COCO's {split}: give that with --coco too" if split else reason


# --- All photographs -----------------------------------------------------------------------------


class Summary(NamedTuple):
    """The outcome of `save_all`; the three counts add up to the number of photographs asked for."""

    num_present: int
    num_new: int
    failures: list[tuple[str, str]]  # name and reason, sorted

    def report(self, output: Path) -> str:
        """Return lines for a terminal: the first five failures, the counts, and where all failures are listed."""
        lines = [f"{name}: {reason}" for name, reason in self.failures[:5]]
        if len(self.failures) > 5:
            lines.append(f"and {len(self.failures) - 5:,} more")
        lines.append(
            f"{counted(self.num_present + self.num_new + len(self.failures), 'photograph')}: "
            f"{self.num_present:,} there before, {self.num_new:,} new, {len(self.failures):,} failed"
        )
        if self.failures:
            lines.append(f"all reasons: {output / FAILURES}; the same command tries those again")
        return "\n".join(lines)


def get_images(
    config: Config, output: Path, coco: Sequence[Path], allowed_hosts: Sequence[str], num_workers: int
) -> Summary:
    """Get the photographs of all splits of the configured annotations, from `coco` or, if empty, from the network.

    Raises as `load_all`, `image_links`, `CocoCopy`, `Downloader` and `save_all` do.
    """
    splits = load_all(config.annotations, config.dataset_name)
    links = image_links(statement for statements in splits.values() for statement in statements)
    check_folder(output, "--output")
    if not coco:
        check_hosts(allowed_hosts)
        missing = missing_photographs(list(links), output)
        allowed = sum(_is_allowed(links[name], allowed_hosts) for name in missing)
        check_room(output, allowed * MEAN_BYTES, "--output")
    stop = threading.Event()
    save: Save
    if coco:
        copies = [CocoCopy(path, config.max_image_pixels, config.follow_links) for path in coco]
        save = functools.partial(save_copy, copies)
    else:
        limits = DownloadLimits(max_pixels=config.max_image_pixels)
        save = Downloader(allowed_hosts, limits, num_workers, stop).save
    pixels = config.max_image_pixels
    return save_all(links, output, save, num_workers, pixels, stop, config.follow_links)


def plan_images(
    config: Config, output: Path, coco: Sequence[Path], allowed_hosts: Sequence[str], num_workers: int
) -> Iterator[str]:
    """Yield lines on what `get_images` would do with the same arguments. Writes, decodes and downloads nothing."""
    splits = statements_at_hand(config.annotations, config.dataset_name)
    copies = [CocoCopy(path) for path in coco]
    check_hosts(allowed_hosts)
    check_folder(output, "--output")
    if splits is None:
        yield f"statements   {config.dataset_name}, from the hub when the run starts; not counted here"
        return
    links = image_links(statement for statements in splits.values() for statement in statements)
    missing = missing_photographs(list(links), output, config.follow_links)
    yield f"statements   {sum(map(len, splits.values())):,}, about {counted(len(links), 'photograph')}"
    yield f"photographs  {len(links) - len(missing):,} are in {output}, {len(missing):,} to get"
    if copies:
        failing = [name for name in missing if not any(name in copy.entries for copy in copies)]
        sources = ", ".join(map(str, coco))
        yield f"takes        {len(missing) - len(failing):,} from {sources}, {num_workers} at a time"
    else:
        failing = [name for name in missing if not _is_allowed(links[name], allowed_hosts)]
        size = (len(missing) - len(failing)) * MEAN_BYTES
        free = check_room(output, size, "--output")
        yield (
            f"downloads    {len(missing) - len(failing):,} from {', '.join(allowed_hosts)}, {num_workers} at a time: "
            f"about {byte_size(size)} ({byte_size(free)} free)"
        )
    if failing:
        first, reason = failing[0], "without a link, or with one to another host"
        if copies:
            reason = why_missing(copies, first, links[first])
        yield f"would fail   {len(failing):,}, such as {first}: {reason}"


def _is_allowed(link: str, allowed_hosts: Sequence[str]) -> bool:
    try:
        check_url(secure_url(link), allowed_hosts)
    except DownloadError:
        return False
    return True


def image_links(statements: Iterable[Statement]) -> dict[str, str]:
    """Return the link of each photograph that statements name, by its name, sorted.

    Raises ValueError for a name that is more than a plain file name, and for a name with two links.
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


def save_all(
    links: Mapping[str, str],
    output: Path,
    save: Save,
    num_workers: int = 8,
    max_pixels: int = MAX_PIXELS,
    stop: threading.Event | None = None,
    follow_links: bool = False,
) -> Summary:
    """Call `save` for every photograph that is not in `output` yet, in `num_workers` threads.

    A file that is there but does not decode is replaced; a symbolic link is not, as it may lead anywhere.
    Failures are written to failures.jsonl in `output`; without failures there is no such file. `stop` is set when the
    call ends early. Raises OSError if `output` cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    failures: list[tuple[str, str]] = []
    num_present = 0

    def save_unless_present(name: str) -> bool:
        """Return whether the photograph was there before."""
        try:
            decode(read_bytes(output, name, follow_links=follow_links), name, max_pixels)
        except ImageError as error:
            if os.path.islink(output / name):
                raise ImageError(name, f"{error.reason}; a link is not replaced: remove it") from error
            save(name, links[name], output / name)
            return False
        return True

    executor = ThreadPoolExecutor(num_workers)
    try:
        waiting = {executor.submit(save_unless_present, name): name for name in links}
        bar = progress(as_completed(waiting), total=len(waiting), desc="photographs", unit=" images")
        for done in bar:
            try:
                num_present += done.result()
            except (DownloadError, ImageError) as error:
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
    return Summary(num_present, len(links) - num_present - len(failures), failures)
