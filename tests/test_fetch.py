"""What a download accepts, refuses, tries again and gives up, against a server on this machine."""

import ipaddress
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from tls_server import Handler, Server, make_certificate, serve

from theworld import fetch
from theworld.fetch import (
    CertificateRefused,
    Fetcher,
    FetchError,
    Limits,
    checked,
    is_public,
    secure_url,
)

ADDRESSES = {
    "photographs.test": ["127.0.0.1"],
    "other.test": ["127.0.0.1"],
    "s3.amazonaws.com": ["127.0.0.1"],
    "private.test": ["10.0.0.7"],
    "mixed.test": ["127.0.0.1", "169.254.169.254"],
}


class Waits(threading.Event):
    """Notes the waits instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0)
        return False


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def server(certificate: Path) -> Iterator[Server]:
    with serve(certificate) as running:
        yield running


@pytest.fixture
def photograph(photographs: Path) -> bytes:
    return (photographs / "a.png").read_bytes()


@pytest.fixture(autouse=True)
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names have the addresses of `ADDRESSES`; gives the names that were asked for."""
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        asked.append(host)
        if host not in ADDRESSES:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, (address, port)) for address in ADDRESSES[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)  # the longest wait of its range
    return asked


def fetcher(server: Server, names: tuple[str, ...] = ("photographs.test",), **limits: float) -> Fetcher:
    """One that trusts the server's certificate and takes 127.0.0.1 for a public address."""
    return Fetcher(
        allowed_hosts=[f"{name}:{server.port}" for name in names],
        limits=Limits(**limits),  # type: ignore[arg-type]
        context=server.context,
        is_allowed=lambda address: str(address) == "127.0.0.1",
        stop=Waits(),
    )


def waits_of(one: Fetcher) -> list[float]:
    assert isinstance(one.stop, Waits)
    return one.stop.waits


# --- What is asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "url"),
    [
        (
            "http://images.cocodataset.org/train2017/1.jpg",
            "https://s3.amazonaws.com/images.cocodataset.org/train2017/1.jpg",
        ),
        (
            "https://Images.cocodataset.org/val2017/1.jpg",
            "https://s3.amazonaws.com/images.cocodataset.org/val2017/1.jpg",
        ),
        ("http://example.org/1.jpg", "https://example.org/1.jpg"),
        (
            "https://images.cocodataset.org.example.org/1.jpg",
            "https://images.cocodataset.org.example.org/1.jpg",
        ),
    ],
)
def test_a_published_link_becomes_https(link: str, url: str) -> None:
    assert secure_url(link) == url


def test_cocos_files_are_allowed_under_both_of_their_addresses_and_nothing_beside_them_is() -> None:
    allowed = ["images.cocodataset.org"]
    target = checked("https://s3.amazonaws.com/images.cocodataset.org/val2017/1.jpg?a=b#c", allowed)
    path = "/images.cocodataset.org/val2017/1.jpg?a=b"
    assert target == ("s3.amazonaws.com", 443, "s3.amazonaws.com", path)
    for path in ("/others/1.jpg", "/images.cocodataset.org", "/images.cocodataset.orgs/1.jpg"):
        with pytest.raises(FetchError, match=r"s3\.amazonaws\.com is not an allowed host"):
            checked(f"https://s3.amazonaws.com{path}", allowed)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://a.test/1.jpg", "is http://, only https:// is used"),
        ("file:///etc/passwd", "is file://, only https:// is used"),
        ("//a.test/1.jpg", "is no://, only https:// is used"),
        ("https://b.test/1.jpg", r"b.test is not an allowed host \(a.test\)"),
        ("https://a.test.b.test/1.jpg", "a.test.b.test is not an allowed host"),
        ("https://a.test./1.jpg", "a.test. is not an allowed host"),
        ("https://a.test:8443/1.jpg", "a.test:8443 is not an allowed host"),
        ("https://a.test:99999/1.jpg", "is no URL: Port out of range"),
        ("https://[::1/1.jpg", "is no URL: Invalid IPv6 URL"),
        ("https://a.test@b.test/1.jpg", "names a user for b.test"),
        ("https://a.test/x/../1.jpg", "climbs with .."),
        ("https://a.test/x/%2e%2E/1.jpg", "climbs with .."),
        ("https://a.test/1.jpg\r\nHost: b.test", "control or other non-ASCII"),
        ("https://a.test/\u0661.jpg", "control or other non-ASCII"),
        ("", "is empty"),
    ],
)
def test_a_url_is_refused_with_its_reason(url: str, reason: str) -> None:
    with pytest.raises(FetchError, match=reason) as caught:
        checked(url, ["a.test"])
    assert not caught.value.may_pass


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    "0.0.0.0 10.0.0.1 100.64.0.1 127.0.0.1 169.254.169.254 172.16.0.1 192.168.1.1 198.18.0.1 192.0.2.1 224.0.0.1 "
    "240.0.0.1 255.255.255.255 :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1 64:ff9b:1::1 "
    "2002:7f00:1::1 2001:db8::1 2001:0:1::1 fc00::1 fe80::1 fec0::1 ff02::1".split(),
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("host", ["https://a.test", "A.test", "a..test", "a.test/x", "", "a" * 64])
def test_an_allowed_host_is_a_name(host: str) -> None:
    with pytest.raises(ValueError, match="allowed_host is"):
        Fetcher(allowed_hosts=[host])


def test_a_context_that_does_not_verify_is_refused() -> None:
    context = ssl.create_default_context()
    context.check_hostname = False
    with pytest.raises(ValueError, match="does not verify"):
        Fetcher(context=context)
    context.verify_mode = ssl.CERT_NONE
    with pytest.raises(ValueError, match="does not verify"):
        Fetcher(context=context)


# --- Where the connection goes -------------------------------------------------------------------


def test_a_photograph_arrives_from_the_address_that_was_checked(
    server: Server, photograph: bytes, resolved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is resolved once: what it means a moment later does not matter. No proxy is asked."""
    for name in ("https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(200, photograph)
    one = fetcher(server)
    seen: list[str] = []
    one.is_allowed = lambda address: seen.append(str(address)) is None
    assert one.photograph(f"http://photographs.test:{server.port}/1.jpg", "1.jpg") == photograph
    assert resolved == ["photographs.test"]
    assert seen == ["127.0.0.1"]
    assert server.requests == [f"photographs.test:{server.port} /1.jpg"]
    assert waits_of(one) == []


@pytest.mark.parametrize(
    ("name", "address"), [("private.test", "10.0.0.7"), ("mixed.test", "169.254.169.254")]
)
def test_a_name_with_a_private_address_is_refused(server: Server, name: str, address: str) -> None:
    with pytest.raises(FetchError, match=f"{name} is at {address}, which is no public address"):
        fetcher(server, (name,)).photograph(server.url("/1.jpg", name), "1.jpg")
    assert server.requests == []


def test_by_itself_this_machine_is_refused(server: Server) -> None:
    one = fetcher(server)
    one.is_allowed = is_public
    with pytest.raises(FetchError, match=r"is at 127\.0\.0\.1, which is no public address"):
        one.photograph(server.url("/1.jpg"), "1.jpg")
    assert server.requests == []


def test_an_unknown_certificate_is_refused_at_once(server: Server) -> None:
    one = fetcher(server)
    one.context = ssl.create_default_context()
    with pytest.raises(CertificateRefused, match="is not accepted: self-signed certificate"):
        one.photograph(server.url("/1.jpg"), "1.jpg")
    assert (server.requests, waits_of(one)) == ([], [])


def test_a_certificate_for_other_names_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADDRESSES, "unnamed.test", ["127.0.0.1"])
    with pytest.raises(CertificateRefused, match="Hostname mismatch"):
        fetcher(server, ("unnamed.test",)).photograph(server.url("/1.jpg", "unnamed.test"), "1.jpg")
    assert server.requests == []


def test_cocos_links_are_asked_for_where_coco_has_a_certificate(
    server: Server, photograph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, store = f"images.test:{server.port}", f"s3.amazonaws.com:{server.port}"
    monkeypatch.setattr(fetch, "PATH_STYLE_HOSTS", {host: store})
    server.answers[f"/{host}/val2017/1.jpg"] = lambda handler, _: handler.answer(200, photograph)
    one = fetcher(server, ("images.test",))
    assert one.photograph(f"http://{host}/val2017/1.jpg", "1.jpg") == photograph
    assert server.requests == [f"{store} /{host}/val2017/1.jpg"]


def redirect(server: Server, path: str, location: str) -> None:
    server.answers[path] = lambda handler, _: handler.answer(302, b"moved", Location=location)


def test_redirects_are_followed_to_allowed_hosts(server: Server, photograph: bytes) -> None:
    redirect(server, "/1.jpg", "sub/2.jpg")
    redirect(server, "/sub/2.jpg", server.url("/3.jpg", "other.test"))
    server.answers["/3.jpg"] = lambda handler, _: handler.answer(200, photograph)
    one = fetcher(server, ("photographs.test", "other.test"))
    assert one.photograph(server.url("/1.jpg"), "1.jpg") == photograph
    assert [r.split(":")[0] for r in server.requests] == [
        "photographs.test",
        "photographs.test",
        "other.test",
    ]


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://photographs.test:{port}/2.jpg", "is http://, only https:// is used"),
        ("https://other.test:{port}/2.jpg", "other.test:[0-9]+ is not an allowed host"),
        ("https://private.test:{port}/2.jpg", r"private.test is at 10\.0\.0\.7, which is no public address"),
        ("https://127.0.0.1:{port}/2.jpg", r"127\.0\.0\.1:[0-9]+ is not an allowed host"),
        ("https://[", "a redirect to 'https://\\[', which is no URL"),
        ("file:///etc/passwd", "is file://, only https:// is used"),
    ],
)
def test_a_redirect_is_checked_like_the_first_address(server: Server, location: str, reason: str) -> None:
    redirect(server, "/1.jpg", location.format(port=server.port))
    one = fetcher(server, ("photographs.test", "private.test"))
    with pytest.raises(FetchError, match=reason):
        one.photograph(server.url("/1.jpg"), "1.jpg")
    assert len(server.requests) == 1
    assert waits_of(one) == []


def test_a_loop_of_redirects_ends_after_five(server: Server) -> None:
    redirect(server, "/1.jpg", "/1.jpg")
    with pytest.raises(FetchError, match="more than 5 redirects, the last to https://"):
        fetcher(server).photograph(server.url("/1.jpg"), "1.jpg")
    assert len(server.requests) == 6


# --- What is tried again -------------------------------------------------------------------------


def test_a_server_in_trouble_is_asked_again_after_waits_that_double(
    server: Server, photograph: bytes
) -> None:
    server.answers["/1.jpg"] = lambda handler, n: handler.answer(
        *((500, b"") if n < 3 else (200, photograph))
    )
    one = fetcher(server)
    assert one.photograph(server.url("/1.jpg"), "1.jpg") == photograph
    assert waits_of(one) == [1.0, 2.0]


def test_the_fifth_failure_is_the_last(server: Server) -> None:
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(503)
    one = fetcher(server)
    with pytest.raises(
        FetchError, match=r"HTTP status 503 from photographs.test:\d+ \(tried 5 times\)"
    ) as caught:
        one.photograph(server.url("/1.jpg"), "1.jpg")
    assert caught.value.reason == str(caught.value)
    assert caught.value.may_pass
    assert waits_of(one) == [1.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("retry_after", "wait"),
    [("7", 7.0), ("0", 1.0), ("99999", 60.0), ("-5", 1.0), ("soon", 1.0), (None, 1.0)],
)
def test_retry_after_is_honoured_up_to_a_limit(
    server: Server, photograph: bytes, retry_after: str | None, wait: float
) -> None:
    def answer(handler: Handler, number: int) -> None:
        if number == 1:
            return handler.answer(429, Retry_After=retry_after)
        return handler.answer(200, photograph)

    server.answers["/1.jpg"] = answer
    one = fetcher(server)
    assert one.photograph(server.url("/1.jpg"), "1.jpg") == photograph
    assert waits_of(one) == [wait]


def test_retry_after_may_be_a_date(server: Server, photograph: bytes) -> None:
    date = formatdate(time.time() + 20, usegmt=True)
    server.answers["/1.jpg"] = lambda handler, n: handler.answer(
        *((429, b"") if n == 1 else (200, photograph)), Retry_After=date
    )
    one = fetcher(server)
    one.photograph(server.url("/1.jpg"), "1.jpg")
    # The header has whole seconds, and the request takes part of one.
    assert waits_of(one) == [pytest.approx(20, abs=2)]


def test_a_wait_beyond_the_total_time_is_not_begun(server: Server) -> None:
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(429, Retry_After=40)
    one = fetcher(server, total_seconds=30)
    with pytest.raises(FetchError, match="HTTP status 429"):
        one.photograph(server.url("/1.jpg"), "1.jpg")
    assert waits_of(one) == []


@pytest.mark.parametrize("status", [400, 403, 404, 410, 204])
def test_an_answer_that_will_stay_is_not_asked_for_again(server: Server, status: int) -> None:
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(status)
    one = fetcher(server)
    with pytest.raises(FetchError, match=f"HTTP status {status}") as caught:
        one.photograph(server.url("/1.jpg"), "1.jpg")
    assert not caught.value.may_pass
    assert waits_of(one) == []


@pytest.mark.parametrize("how", ["length", "chunks", "no length", "hangs up"])
def test_what_is_cut_off_is_asked_for_again(server: Server, photograph: bytes, how: str) -> None:
    half = photograph[: len(photograph) // 2]

    def answer(handler: Handler, number: int) -> None:
        if number == 2:
            handler.answer(200, photograph)
        elif how == "length":
            handler.answer(200, half, Content_Length=len(photograph))
        elif how == "chunks":
            chunk = b"%x\r\n%s\r\n" % (len(half), half)
            handler.answer(200, chunk, Content_Length=None, Transfer_Encoding="chunked")
        elif how == "no length":
            handler.answer(200, half, Content_Length=None)

    server.answers["/1.jpg"] = answer
    one = fetcher(server)
    assert one.photograph(server.url("/1.jpg"), "1.jpg") == photograph
    assert waits_of(one) == [1.0]


def test_a_refused_connection_and_an_unknown_name_are_tried_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        server.port = closed.getsockname()[1]
    one = fetcher(server, max_tries=2)
    with pytest.raises(FetchError, match=r"the connection to photographs.test:\d+ failed: ConnectionRefused"):
        one.photograph(server.url("/1.jpg"), "1.jpg")
    monkeypatch.delitem(ADDRESSES, "photographs.test")
    with pytest.raises(FetchError, match="Name or service not known"):
        one.photograph(server.url("/1.jpg"), "1.jpg")
    assert waits_of(one) == [1.0, 1.0]


# --- What is believed ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "zero bytes"),
        (b"<!DOCTYPE html><p>Sign in</p>", "an HTML or XML page, not a photograph"),
        (b"\0" * 50, "not a photograph in a format that is read"),
    ],
)
def test_what_is_no_photograph_is_refused_for_good(server: Server, body: bytes, reason: str) -> None:
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(200, body, Content_Type="image/jpeg")
    one = fetcher(server)
    with pytest.raises(FetchError, match=reason):
        one.photograph(server.url("/1.jpg"), "1.jpg")
    assert waits_of(one) == []


def test_a_length_that_is_too_short_leaves_a_damaged_photograph(server: Server, photograph: bytes) -> None:
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(200, photograph, Content_Length=1000)
    with pytest.raises(FetchError, match="damaged or not complete"):
        fetcher(server).photograph(server.url("/1.jpg"), "1.jpg")


def test_too_many_pixels_are_refused(server: Server, photograph: bytes) -> None:
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(200, photograph)
    with pytest.raises(FetchError, match="96 x 80 pixels; at most 7679 are decoded"):
        fetcher(server, max_pixels=7679).photograph(server.url("/1.jpg"), "1.jpg")


def test_too_many_bytes_are_refused_by_the_header_and_while_reading(server: Server) -> None:
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(200, b"", Content_Length=10**12)
    server.answers["/2.jpg"] = lambda handler, _: handler.answer(200, b"x" * 200_000, Content_Length=None)
    one = fetcher(server, max_bytes=100_000)
    with pytest.raises(FetchError, match="1000000000000 bytes; at most 100000 are read"):
        one.photograph(server.url("/1.jpg"), "1.jpg")
    with pytest.raises(FetchError, match="more than 100000 bytes"):
        one.photograph(server.url("/2.jpg"), "2.jpg")
    assert waits_of(one) == []


# --- How long it takes ---------------------------------------------------------------------------


def test_a_server_that_stalls_is_left(server: Server, photograph: bytes) -> None:
    def stall(handler: Handler, _: int) -> None:
        handler.answer(200, photograph[:10], Content_Length=len(photograph))
        server.ending.wait(20)

    server.answers["/1.jpg"] = stall
    start = time.monotonic()
    with pytest.raises(
        FetchError, match=r"photographs.test:\d+ does not answer: .*timed out \(tried 2 times\)"
    ):
        fetcher(server, read_seconds=0.2, max_tries=2).photograph(server.url("/1.jpg"), "1.jpg")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("where", ["header", "body"])
def test_a_server_that_drips_is_left_when_the_total_time_is_over(server: Server, where: str) -> None:
    def drip(handler: Handler, _: int) -> None:
        start = b"HTTP/1.1 200 OK\r\n" + (b"Content-Length: 10000\r\n\r\n" if where == "body" else b"X: ")
        handler.wfile.write(start)
        while not server.ending.wait(0.02):
            handler.wfile.write(b"x")

    server.answers["/1.jpg"] = drip
    start = time.monotonic()
    with pytest.raises(FetchError, match=r"not done within 0\.5 s in all"):
        fetcher(server, total_seconds=0.5, read_seconds=10).photograph(server.url("/1.jpg"), "1.jpg")
    assert 0.5 <= time.monotonic() - start < 5


def test_a_handshake_that_is_not_answered_is_left(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server.port = silent.getsockname()[1]
        with pytest.raises(FetchError, match="does not answer"):
            fetcher(server, connect_seconds=0.2, max_tries=1).photograph(server.url("/1.jpg"), "1.jpg")


def test_a_stop_ends_the_waits(server: Server) -> None:
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(500)
    one = fetcher(server)
    one.stop = threading.Event()
    one.stop.set()
    with pytest.raises(FetchError, match="stopped"):
        one.photograph(server.url("/1.jpg"), "1.jpg")
