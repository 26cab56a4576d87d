"""Downloads of photographs that trust nobody: https only, named hosts only, public addresses only, under limits.

An address is checked after the name is resolved, and the connection goes to that very address, so that a name cannot
change its meaning in between; each redirect is checked in the same way. Certificates are always verified, against the
system's authorities. Proxies and .netrc are not used: behind a proxy, nothing is downloaded.
"""

import http.client
import io
import ipaddress
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from theworld.images import MAX_BYTES, MAX_PIXELS, ImageError, decode

COCO_HOST = "images.cocodataset.org"
# COCO's own host cannot do https (its certificate is for other names): the same files have these addresses.
PATH_STYLE_HOSTS = {COCO_HOST: "s3.amazonaws.com"}
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK = 1 << 16
HOST = re.compile(r"[a-z0-9-]{1,63}(\.[a-z0-9-]{1,63})*(:[0-9]{1,5})?")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class FetchError(Exception):
    """A download that failed: `reason` in words."""

    def __init__(self, reason: str, may_pass: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.may_pass = (
            may_pass  # whether the network or the server had trouble that may be over the next time
        )
        self.retry_after = retry_after  # seconds that the server asks to wait

    def __str__(self) -> str:
        return self.reason


class CertificateRefused(FetchError):
    """The server cannot show that it is the one that was asked for."""


@dataclass(frozen=True)
class Limits:
    """What a download may take; times in seconds."""

    connect_seconds: float = 10.0
    # to connect, and again for the TLS handshake
    read_seconds: float = 30.0
    # without a byte
    total_seconds: float = 300.0
    # for an image with all its redirects, tries and waits; resolving a name takes what the system lets it take
    max_bytes: int = MAX_BYTES
    max_pixels: int = MAX_PIXELS
    max_redirects: int = 5
    max_tries: int = 5
    first_wait: float = 1.0
    # before the second try; it doubles with each, and a random half of it is left out
    longest_wait: float = 60.0
    # whatever the server asks for


class Target(NamedTuple):
    """A checked URL."""

    host: str
    port: int
    netloc: str  # as the Host header has it
    path: str  # with the query


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, and so is the IPv4 address that it may carry inside."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not (address.is_multicast or address.is_reserved)
    inner = address.ipv4_mapped or address.sixtofour
    if address in _NAT64:
        inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if inner is not None:
        return is_public(inner)
    return address in _GLOBAL_UNICAST and address.is_global and not address.is_multicast


def secure_url(link: str) -> str:
    """The https address of a published link: http becomes https, COCO's host the one that has a certificate."""
    if link[:7].lower() == "http://":
        link = f"https://{link[7:]}"
    for host, server in PATH_STYLE_HOSTS.items():
        start = f"https://{host}/"
        if link[: len(start)].lower() == start:
            return f"https://{server}/{host}/{link[len(start) :]}"
    return link


def checked(url: str, allowed_hosts: Collection[str]) -> Target:
    """Where a URL leads. Raises FetchError unless it is plain https to an allowed host ("host" or "host:port")."""
    if not re.fullmatch(r"[!-~]+", url):
        raise FetchError(
            f"refused: {url!r:.200} is empty or holds spaces, control or other non-ASCII characters"
        )
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 443
    except ValueError as error:
        raise FetchError(f"refused: {url:.200} is no URL: {error}") from None
    if parts.scheme != "https":
        raise FetchError(f"refused: {url:.200} is {parts.scheme or 'no'}://, only https:// is used")
    if "@" in parts.netloc:
        raise FetchError(f"refused: the URL names a user for {host}")
    if ".." in unquote(parts.path).split("/"):
        raise FetchError(f"refused: {url:.200} climbs with ..")
    netloc = host if port == 443 else f"{host}:{port}"
    published = _published_host(netloc, parts)
    if published not in allowed_hosts:
        raise FetchError(f"refused: {published} is not an allowed host ({', '.join(sorted(allowed_hosts))})")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(host, port, netloc, path)


def _published_host(netloc: str, parts: SplitResult) -> str:
    """Whose files these are: on a server of many hosts, the first folder's."""
    for host, server in PATH_STYLE_HOSTS.items():
        if netloc == server and parts.path.startswith(f"/{host}/"):
            return host
    return netloc


class Deadline:
    """Seconds that are left; asked before every wait."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end = time.monotonic() + seconds

    def left(self, at_most: float) -> float:
        """The time for the next wait. Raises FetchError when there is none."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise FetchError(f"not done within {self.seconds:g} s in all", may_pass=True)
        return min(left, at_most)


class TimedSocket(io.RawIOBase):
    """A TLS connection as http.client wants it; a server that sends a byte now and then cannot hold it for long."""

    def __init__(self, connection: ssl.SSLSocket, deadline: Deadline, limits: Limits) -> None:
        self.connection = connection
        self.deadline = deadline
        self.limits = limits

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def sendall(self, data: bytes) -> None:
        self.connection.settimeout(self.deadline.left(self.limits.read_seconds))
        self.connection.sendall(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.connection.settimeout(self.deadline.left(self.limits.read_seconds))
        return self.connection.recv_into(buffer)

    def close(self) -> None:
        """Nothing: whoever made the connection closes it, after the answer is read."""


@dataclass
class Fetcher:
    """Downloads under limits. `context` and `is_allowed` are there for tests, which have a server of their own.

    Raises ValueError for an allowed host that is none and for a context that does not verify certificates.
    """

    allowed_hosts: Collection[str] = (COCO_HOST,)
    limits: Limits = Limits()
    context: ssl.SSLContext = field(default_factory=ssl.create_default_context)
    is_allowed: Callable[[Address], bool] = is_public
    stop: threading.Event = field(default_factory=threading.Event)
    # when set, whoever downloads gives up soon

    def __post_init__(self) -> None:
        for host in self.allowed_hosts:
            if not HOST.fullmatch(host):
                raise ValueError(
                    f"allowed_host is {host!r}; give a host's name in small letters, or name:port"
                )
        if self.context.verify_mode != ssl.CERT_REQUIRED or not self.context.check_hostname:
            raise ValueError("the TLS context does not verify certificates and host names; it has to")

    def photograph(self, link: str, name: str) -> bytes:
        """The bytes of a published photograph that decodes; `name` is for messages only.

        What may pass is tried again, after waits that double. Raises FetchError.
        """
        deadline = Deadline(self.limits.total_seconds)
        for number in range(1, self.limits.max_tries + 1):
            try:
                return self._one_try(secure_url(link), name, deadline)
            except FetchError as error:
                wait = min(self.limits.first_wait * 2 ** (number - 1), self.limits.longest_wait)
                wait = max(wait * random.uniform(0.5, 1), min(error.retry_after, self.limits.longest_wait))
                out_of_time = time.monotonic() + wait >= deadline.end
                if not error.may_pass or number == self.limits.max_tries or out_of_time:
                    error.reason += f" (tried {number} times)" if number > 1 else ""
                    raise
                if self.stop.wait(wait):
                    raise FetchError("stopped") from error
        raise AssertionError("the last try returns or raises")

    def _one_try(self, url: str, name: str, deadline: Deadline) -> bytes:
        for _ in range(self.limits.max_redirects + 1):
            target = checked(url, self.allowed_hosts)
            try:
                answer = self._ask(target, deadline)
            except ssl.SSLCertVerificationError as error:
                reason = f"the certificate of {target.netloc} is not accepted: {error.verify_message}"
                raise CertificateRefused(reason) from error
            except TimeoutError as error:
                deadline.left(0)
                raise FetchError(f"{target.netloc} does not answer: {error}", may_pass=True) from error
            except (OSError, http.client.HTTPException) as error:
                reason = f"the connection to {target.netloc} failed: {error!r}"
                raise FetchError(reason, may_pass=True) from error
            if isinstance(answer, str):
                url = _redirected(url, answer)
                continue
            data, is_whole = answer
            try:
                decode(data, name, self.limits.max_pixels)
            except ImageError as error:
                # A body that was sent whole will not be another one the next time.
                raise FetchError(error.reason, may_pass=not is_whole) from error
            return data
        raise FetchError(f"refused: more than {self.limits.max_redirects} redirects, the last to {url:.200}")

    def _ask(self, target: Target, deadline: Deadline) -> str | tuple[bytes, bool]:
        """The address of a redirect, or the body and whether it is known to be whole."""
        with self._connect(target, deadline) as raw:
            raw.settimeout(deadline.left(self.limits.connect_seconds))
            with self.context.wrap_socket(raw, server_hostname=target.host) as secure:
                connection = http.client.HTTPConnection(target.host, target.port)
                connection.auto_open = 0  # it shall use this connection or none
                connection.sock = TimedSocket(secure, deadline, self.limits)
                headers = {"Host": target.netloc, "Accept-Encoding": "identity", "Connection": "close"}
                connection.request("GET", target.path, headers=headers | {"User-Agent": "theworld"})
                response = connection.getresponse()
                if response.status in REDIRECTS:
                    return response.headers.get("Location", "")
                if response.status != 200:
                    again = response.status == 429 or response.status >= 500
                    wait = _seconds(response.headers.get("Retry-After", ""))
                    raise FetchError(f"HTTP status {response.status} from {target.netloc}", again, wait)
                return self._body(response)

    def _connect(self, target: Target, deadline: Deadline) -> socket.socket:
        """A connection to the first address that answers; FetchError if any of them is not allowed."""
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        for *_, where in found:
            if not self.is_allowed(ipaddress.ip_address(str(where[0]).split("%")[0])):
                raise FetchError(f"refused: {target.host} is at {where[0]}, which is no public address")
        failure: OSError = ConnectionError(f"{target.host} has no address")
        for family, kind, protocol, _, where in found:
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(deadline.left(self.limits.connect_seconds))
                connection.connect(where)
                return connection
            except OSError as error:
                connection.close()
                failure = error
            except FetchError:
                connection.close()
                raise
        raise failure

    def _body(self, response: http.client.HTTPResponse) -> tuple[bytes, bool]:
        """All bytes, and whether the answer says how many they are."""
        stated, limit = response.length, self.limits.max_bytes
        if stated is not None and stated > limit:
            raise FetchError(f"{stated} bytes; at most {limit} are read")
        data = bytearray()
        while chunk := response.read(CHUNK):
            data += chunk
            if len(data) > limit:
                raise FetchError(f"more than {limit} bytes; at most {limit} are read")
            if self.stop.is_set():
                raise FetchError("stopped")
        if stated is not None and len(data) != stated:
            raise FetchError(f"cut off: {len(data)} of {stated} bytes arrived", may_pass=True)
        return bytes(data), stated is not None or bool(response.chunked)


def _redirected(url: str, location: str) -> str:
    """The absolute address that a redirect leads to. Raises FetchError if it is none."""
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise FetchError(f"refused: a redirect to {location!r:.200}, which is no URL: {error}") from None


def _seconds(retry_after: str) -> float:
    """The seconds that a Retry-After header asks for, as a number or a date; 0 for anything else."""
    if re.fullmatch(r"[0-9]{1,9}", retry_after.strip()):
        return float(retry_after)
    try:
        date = parsedate_to_datetime(retry_after)
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0
