"""Photographs arrive whole, once, from allowed places only, and every failure is named with its reason."""

import json
import os
import random
import shutil
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from email.utils import formatdate
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from constants import ROOT
from photograph_server import Handler, Server, make_certificate, serve, serve_proxy
from PIL import Image

from theworld.config.config import Config
from theworld.data import download
from theworld.data.download import (
    COCO_HOST,
    CertificateError,
    CocoCopy,
    Downloader,
    DownloadError,
    DownloadLimits,
    Summary,
    check_url,
    image_links,
    plan_images,
    save_all,
    save_copy,
    secure_url,
)
from theworld.data.images import ImageError
from theworld.data.vsr import Statement, load_statements

VSR = ROOT.parent / "shared" / "vsr"
LINKS = {name: f"https://photographs.test/train2017/{name}" for name in ("a.png", "b.png", "c.png")}
ADDRESSES = ("photographs.test", "other.test", "unnamed.test", "s3.amazonaws.com", "127.0.0.1")


class Waits(threading.Event):
    """An event that records the waits instead of waiting."""

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
def looked_up(monkeypatch: pytest.MonkeyPatch, certificate: Path) -> list[str]:
    """An environment without proxies and .netrc that trusts the server. Returns the host names that are looked up."""
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, *_: object, **__: object) -> list[tuple[object, ...]]:
        asked.append(host)
        if host not in ADDRESSES:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(random, "random", lambda: 0.0)  # of the part of a wait that is random
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    return asked


def downloader(server: Server, names: tuple[str, ...] = ("photographs.test",), **limits: float) -> Downloader:
    hosts = [f"{name}:{server.port}" for name in names]
    return Downloader(hosts, DownloadLimits(**limits), stop=Waits())  # type: ignore[arg-type]


def waits_of(one: Downloader) -> list[float]:
    assert isinstance(one.stop, Waits)
    return one.stop.waits


# --- Addresses -----------------------------------------------------------------------------------


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
    check_url("https://s3.amazonaws.com/images.cocodataset.org/val2017/1.jpg?a=b#c", allowed)
    check_url("https://images.cocodataset.org/val2017/1.jpg", allowed)
    for path in ("/others/1.jpg", "/images.cocodataset.org", "/images.cocodataset.orgs/1.jpg"):
        with pytest.raises(DownloadError, match=r"s3\.amazonaws\.com is not an allowed host"):
            check_url(f"https://s3.amazonaws.com{path}", allowed)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://a.test/1.jpg", "is http://, only https:// is used"),
        ("file:///etc/passwd", "is file://, only https:// is used"),
        ("//a.test/1.jpg", "is no://, only https:// is used"),
        ("https://b.test/1.jpg", r"b.test is not an allowed host \(a.test\)"),
        ("https://a.test.b.test/1.jpg", "a.test.b.test is not an allowed host"),
        ("https://a.test./1.jpg", "a.test. is not an allowed host"),
        ("https://a.test\\.b.test/1.jpg", "is not an allowed host"),
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
    with pytest.raises(DownloadError, match=reason) as caught:
        check_url(url, ["a.test"])
    assert not caught.value.can_retry


@pytest.mark.parametrize(
    "url",
    ["http://me:secret@a.test/1.jpg", "https://a.test/x/../1.jpg?key=secret", "https://me:secret@a.test/"],
)
def test_a_refusal_does_not_repeat_what_may_be_secret_in_a_url(url: str) -> None:
    with pytest.raises(DownloadError) as caught:
        check_url(url, ["a.test"])
    assert "a.test" in caught.value.reason
    assert "secret" not in caught.value.reason


@pytest.mark.parametrize("host", ["https://a.test", "A.test", "a..test", "a.test/x", "", "a" * 64])
def test_an_allowed_host_is_a_name(host: str) -> None:
    with pytest.raises(ValueError, match="allowed_host is"):
        Downloader(allowed_hosts=[host])


# --- Connections ---------------------------------------------------------------------------------


def test_photographs_arrive_over_one_connection(
    server: Server, photograph: bytes, looked_up: list[str]
) -> None:
    server.answers["/1.jpg"] = server.answers["/2.jpg"] = lambda handler, _: handler.answer(200, photograph)
    one = downloader(server)
    assert one.fetch("1.jpg", f"http://photographs.test:{server.port}/1.jpg") == photograph
    assert one.fetch("2.jpg", server.url("/2.jpg")) == photograph
    assert looked_up == ["photographs.test"]
    assert server.requests == [f"photographs.test:{server.port} /{n}.jpg" for n in (1, 2)]
    assert server.num_connections == 1
    assert waits_of(one) == []


def test_the_proxy_of_the_environment_is_used(
    server: Server, photograph: bytes, looked_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(200, photograph)
    with serve_proxy(server.port) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        assert downloader(server).fetch("1.jpg", server.url("/1.jpg")) == photograph
        assert [head.split()[:2] for head in proxy.heads] == [["CONNECT", f"photographs.test:{server.port}"]]
        assert set(looked_up) == {"127.0.0.1"}  # the proxy looks up the host itself
        monkeypatch.setenv("NO_PROXY", "photographs.test")
        assert downloader(server).fetch("1.jpg", server.url("/1.jpg")) == photograph
        assert len(proxy.heads) == 1


def test_redirects_are_checked_behind_a_proxy_too(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    redirect(server, "/1.jpg", server.url("/2.jpg", "other.test"))
    with serve_proxy(server.port) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        with pytest.raises(DownloadError, match=r"other\.test:\d+ is not an allowed host"):
            downloader(server).fetch("1.jpg", server.url("/1.jpg"))
        assert len(proxy.heads) == 1


def test_the_password_of_a_proxy_goes_to_the_proxy_only_and_is_not_shown(
    server: Server, photograph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(200, photograph)
    with serve_proxy(server.port) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:secret@127.0.0.1:{proxy.port}")
        downloader(server).fetch("1.jpg", server.url("/1.jpg"))
        assert "Proxy-Authorization: Basic " in proxy.heads[0]
        assert "proxy-authorization" not in {name.lower() for name in server.headers[0]}
    with serve_proxy(server.port, "407 Proxy Authentication Required") as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:secret@127.0.0.1:{proxy.port}")
        with pytest.raises(DownloadError, match=r"the proxy to photographs.test:.*407 Proxy Auth") as caught:
            downloader(server).fetch("1.jpg", server.url("/1.jpg"))
        assert "secret" not in caught.value.reason
        assert caught.value.can_retry
        assert len(proxy.heads) == 5


@pytest.mark.parametrize(
    "address",
    ["http://me:secret@[proxy", "http://me:se/secret@proxy:80", "foo://me:secret@proxy:80", "http://"],
)
def test_an_unusable_proxy_is_named_without_its_password(
    server: Server, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", address)
    with pytest.raises(DownloadError, match=r"HTTPS_PROXY or ALL_PROXY\) cannot be used") as caught:
        downloader(server).fetch("1.jpg", server.url("/1.jpg"))
    assert "secret" not in caught.value.reason
    assert server.requests == []


def test_no_credentials_and_no_cookies_are_sent(
    server: Server, photograph: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text(
        "machine photographs.test login me password secret\ndefault login me password x\n"
    )
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_TOKEN", "hf_secretSecretSecret0123456789")
    assert requests.utils.get_netrc_auth(server.url("/1.jpg")) == ("me", "secret")
    redirect(server, "/1.jpg", "/2.jpg", Set_Cookie="session=secret")
    server.answers["/2.jpg"] = lambda handler, _: handler.answer(200, photograph, Set_Cookie="a=secret")
    one = downloader(server)
    for _ in range(2):
        one.fetch("1.jpg", server.url("/1.jpg"))
    wanted = {
        "Host": f"photographs.test:{server.port}",
        "User-Agent": "theworld",
        "Accept-Encoding": "identity",
        "Accept": "*/*",
        "Connection": "keep-alive",
    }
    assert server.headers == [wanted] * 4


def test_an_unknown_certificate_is_refused_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    one = downloader(server)
    with pytest.raises(CertificateError, match="is not accepted: self-signed certificate"):
        one.fetch("1.jpg", server.url("/1.jpg"))
    assert (server.requests, waits_of(one)) == ([], [])


def test_a_certificate_for_other_names_is_refused(server: Server) -> None:
    with pytest.raises(CertificateError, match="Hostname mismatch"):
        downloader(server, ("unnamed.test",)).fetch("1.jpg", server.url("/1.jpg", "unnamed.test"))
    assert server.requests == []


def test_links_of_coco_go_to_the_host_that_has_a_certificate(
    server: Server, photograph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, store = f"images.test:{server.port}", f"s3.amazonaws.com:{server.port}"
    monkeypatch.setattr(download, "PATH_STYLE_HOSTS", {host: store})
    server.answers[f"/{host}/val2017/1.jpg"] = lambda handler, _: handler.answer(200, photograph)
    assert downloader(server, ("images.test",)).fetch("1.jpg", f"http://{host}/val2017/1.jpg") == photograph
    assert server.requests == [f"{store} /{host}/val2017/1.jpg"]


def redirect(server: Server, path: str, location: str, **headers: object) -> None:
    server.answers[path] = lambda handler, _: handler.answer(302, b"moved", Location=location, **headers)


def test_redirects_are_followed_to_allowed_hosts(server: Server, photograph: bytes) -> None:
    redirect(server, "/1.jpg", "sub/2.jpg")
    redirect(server, "/sub/2.jpg", server.url("/3.jpg", "other.test"))
    server.answers["/3.jpg"] = lambda handler, _: handler.answer(200, photograph)
    one = downloader(server, ("photographs.test", "other.test"))
    assert one.fetch("1.jpg", server.url("/1.jpg")) == photograph
    assert server.requests == [
        f"photographs.test:{server.port} /1.jpg",
        f"photographs.test:{server.port} /sub/2.jpg",
        f"other.test:{server.port} /3.jpg",
    ]


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://photographs.test:{port}/2.jpg", "is http://, only https:// is used"),
        ("https://other.test:{port}/2.jpg", "other.test:[0-9]+ is not an allowed host"),
        ("//other.test:{port}/2.jpg", "other.test:[0-9]+ is not an allowed host"),
        ("https://127.0.0.1:{port}/2.jpg", r"127\.0\.0\.1:[0-9]+ is not an allowed host"),
        ("https://[", "a redirect to 'https://\\[', which is no URL"),
        ("file:///etc/passwd", "is file://, only https:// is used"),
    ],
)
def test_a_redirect_is_checked_like_the_first_address(server: Server, location: str, reason: str) -> None:
    redirect(server, "/1.jpg", location.format(port=server.port))
    one = downloader(server)
    with pytest.raises(DownloadError, match=reason):
        one.fetch("1.jpg", server.url("/1.jpg"))
    assert len(server.requests) == 1
    assert waits_of(one) == []


def test_a_loop_of_redirects_ends_after_five(server: Server) -> None:
    redirect(server, "/1.jpg", "/1.jpg")
    with pytest.raises(DownloadError, match="more than 5 redirects, the last to https://"):
        downloader(server).fetch("1.jpg", server.url("/1.jpg"))
    assert len(server.requests) == 6


def test_the_body_of_a_redirect_is_not_read(server: Server, photograph: bytes) -> None:
    def endless(handler: Handler, _: int) -> None:
        handler.answer(302, b"", Location="/2.jpg", Content_Length=10**12)
        server.ending.wait(20)

    server.answers |= {"/1.jpg": endless, "/2.jpg": lambda handler, _: handler.answer(200, photograph)}
    assert downloader(server).fetch("1.jpg", server.url("/1.jpg")) == photograph


# --- Retries -------------------------------------------------------------------------------------


def test_a_server_in_trouble_is_asked_again_after_waits_that_double(
    server: Server, photograph: bytes
) -> None:
    server.answers["/1.jpg"] = lambda handler, n: handler.answer(
        *((500, b"") if n < 5 else (200, photograph))
    )
    one = downloader(server)
    assert one.fetch("1.jpg", server.url("/1.jpg")) == photograph
    assert waits_of(one) == [0.0, 2.0, 4.0, 8.0]


def test_the_fifth_failure_is_the_last(server: Server) -> None:
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(503)
    one = downloader(server)
    reason = r"^HTTP status 503 from photographs.test:\d+ \(tried 5 times\)$"
    with pytest.raises(DownloadError, match=reason) as caught:
        one.fetch("1.jpg", server.url("/1.jpg"))
    assert caught.value.reason == str(caught.value)
    assert caught.value.can_retry
    assert len(server.requests) == 5


@pytest.mark.parametrize(
    ("retry_after", "wait"),
    [("7", 7.0), ("0", 0.0), ("99999", 60.0), ("9" * 400, 60.0), ("-5", 0.0), ("soon", 0.0), (None, 0.0)],
)
def test_retry_after_is_respected_up_to_a_limit(
    server: Server, photograph: bytes, retry_after: str | None, wait: float
) -> None:
    def answer(handler: Handler, number: int) -> None:
        if number == 1:
            return handler.answer(429, Retry_After=retry_after)
        return handler.answer(200, photograph)

    server.answers["/1.jpg"] = answer
    one = downloader(server)
    assert one.fetch("1.jpg", server.url("/1.jpg")) == photograph
    assert waits_of(one) == [wait]


def test_retry_after_may_be_a_date(server: Server, photograph: bytes) -> None:
    date = formatdate(time.time() + 20, usegmt=True)
    server.answers["/1.jpg"] = lambda handler, n: handler.answer(
        *((429, b"") if n == 1 else (200, photograph)), Retry_After=date
    )
    one = downloader(server)
    one.fetch("1.jpg", server.url("/1.jpg"))
    # The header has whole seconds, and the request takes part of one.
    assert waits_of(one) == [pytest.approx(20, abs=2)]


def test_a_wait_beyond_the_total_time_is_not_begun(server: Server) -> None:
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(429, Retry_After=40)
    one = downloader(server, total_seconds=30)
    with pytest.raises(DownloadError, match="HTTP status 429"):
        one.fetch("1.jpg", server.url("/1.jpg"))
    assert waits_of(one) == []


@pytest.mark.parametrize("status", [400, 403, 404, 410, 204])
def test_a_final_status_is_not_retried(server: Server, status: int) -> None:
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(status)
    one = downloader(server)
    with pytest.raises(DownloadError, match=f"HTTP status {status}") as caught:
        one.fetch("1.jpg", server.url("/1.jpg"))
    assert not caught.value.can_retry
    assert (len(server.requests), waits_of(one)) == (1, [])


@pytest.mark.parametrize("how", ["length", "chunks", "no length", "hangs up"])
def test_a_truncated_body_is_retried(server: Server, photograph: bytes, how: str) -> None:
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
    one = downloader(server)
    assert one.fetch("1.jpg", server.url("/1.jpg")) == photograph
    assert waits_of(one) == [0.0]


def test_a_truncated_body_is_reported_with_its_number_of_bytes(server: Server, photograph: bytes) -> None:
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(200, photograph[:999], Content_Length=5000)
    with pytest.raises(DownloadError, match=r"cut off: 999 of 5000 bytes arrived \(tried 2 times\)"):
        downloader(server, max_tries=2).fetch("1.jpg", server.url("/1.jpg"))


def test_a_refused_connection_and_an_unknown_name_are_retried(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        server.port = closed.getsockname()[1]
    one = downloader(server, ("photographs.test", "unknown.test"), max_tries=2)
    with pytest.raises(DownloadError, match=r"the connection to photographs.test:\d+ failed: ConnectionRef"):
        one.fetch("1.jpg", server.url("/1.jpg"))
    with pytest.raises(DownloadError, match="Name or service not known"):
        one.fetch("1.jpg", server.url("/1.jpg", "unknown.test"))
    assert waits_of(one) == [0.0, 0.0]


# --- Contents ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "zero bytes"),
        (b"<!DOCTYPE html><p>Sign in</p>", "an HTML or XML page, not a photograph"),
        (b"\0" * 50, "not a photograph in a format that is read"),
    ],
)
def test_a_body_that_is_not_a_photograph_is_not_retried(server: Server, body: bytes, reason: str) -> None:
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(200, body, Content_Type="image/jpeg")
    one = downloader(server)
    with pytest.raises(DownloadError, match=reason):
        one.fetch("1.jpg", server.url("/1.jpg"))
    assert waits_of(one) == []


def test_a_corrupt_jpeg_is_refused(server: Server, photographs: Path, tmp_path: Path) -> None:
    Image.open(photographs / "a.png").save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(200, data[: len(data) // 2])
    one = downloader(server)
    output = tmp_path / "images"
    summary = save_all({"1.jpg": server.url("/1.jpg")}, output, one.save, 1)
    assert [(name, reason[:23]) for name, reason in summary.failures] == [
        ("1.jpg", "damaged or not complete")
    ]
    assert names_in(output) == ["failures.jsonl"]
    assert waits_of(one) == []


def test_a_length_that_is_too_short_leaves_a_damaged_photograph(server: Server, photograph: bytes) -> None:
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(200, photograph, Content_Length=1000)
    with pytest.raises(DownloadError, match="damaged or not complete"):
        downloader(server).fetch("1.jpg", server.url("/1.jpg"))


def test_too_many_pixels_are_refused(server: Server, photograph: bytes) -> None:
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(200, photograph)
    with pytest.raises(DownloadError, match="96 x 80 pixels; at most 7679 are decoded"):
        downloader(server, max_pixels=7679).fetch("1.jpg", server.url("/1.jpg"))


def test_too_many_bytes_are_refused_by_the_header_and_while_reading(server: Server) -> None:
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(200, b"", Content_Length=10**12)
    server.answers["/2.jpg"] = lambda handler, _: handler.answer(200, b"x" * 200_000, Content_Length=None)
    one = downloader(server, max_bytes=100_000)
    with pytest.raises(DownloadError, match="1000000000000 bytes; at most 100000 are read"):
        one.fetch("1.jpg", server.url("/1.jpg"))
    with pytest.raises(DownloadError, match="more than 100000 bytes"):
        one.fetch("2.jpg", server.url("/2.jpg"))
    assert waits_of(one) == []


# --- Time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["headers", "body"])
def test_a_server_that_stalls_is_left(server: Server, photograph: bytes, where: str) -> None:
    def stall(handler: Handler, _: int) -> None:
        if where == "body":
            handler.answer(200, photograph[:10], Content_Length=len(photograph))
        server.ending.wait(20)

    server.answers["/1.jpg"] = stall
    start = time.monotonic()
    reason = r"photographs.test:\d+ does not answer: .*timed out \(tried 2 times\)"
    with pytest.raises(DownloadError, match=reason):
        downloader(server, read_seconds=0.2, max_tries=2).fetch("1.jpg", server.url("/1.jpg"))
    assert 0.4 <= time.monotonic() - start < 5


@pytest.mark.parametrize("where", ["headers", "body", "body without length", "chunk"])
def test_a_server_that_drips_is_left_when_the_total_time_is_over(server: Server, where: str) -> None:
    heads = {
        "headers": b"X: ",
        "body": b"Content-Length: 10000\r\n\r\n",
        "body without length": b"\r\n",
        "chunk": b"Transfer-Encoding: chunked\r\n\r\n0",
    }

    def drip(handler: Handler, _: int) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + heads[where])
        while not server.ending.wait(0.02):
            handler.wfile.write(b"0")

    server.answers["/1.jpg"] = drip
    start = time.monotonic()
    with pytest.raises(DownloadError, match=r"not done within 0\.5 s in all"):
        downloader(server, total_seconds=0.5, read_seconds=10).fetch("1.jpg", server.url("/1.jpg"))
    assert 0.5 <= time.monotonic() - start < 5


def test_a_server_that_drips_headers_is_left_after_the_read_timeout(server: Server) -> None:
    def drip(handler: Handler, _: int) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while not server.ending.wait(0.02):
            handler.wfile.write(b"x")

    server.answers["/1.jpg"] = drip
    with pytest.raises(DownloadError, match="does not answer: timed out"):
        downloader(server, read_seconds=0.2, max_tries=1).fetch("1.jpg", server.url("/1.jpg"))


def test_a_handshake_without_an_answer_times_out(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server.port = silent.getsockname()[1]
        with pytest.raises(DownloadError, match="does not answer"):
            downloader(server, connect_seconds=0.2, max_tries=1).fetch("1.jpg", server.url("/1.jpg"))


def test_a_stop_ends_the_waits(server: Server) -> None:
    server.answers["/1.jpg"] = lambda handler, _: handler.answer(500)
    one = downloader(server)
    one.stop = threading.Event()
    one.stop.set()
    with pytest.raises(DownloadError, match="stopped"):
        one.fetch("1.jpg", server.url("/1.jpg"))


# --- All photographs -----------------------------------------------------------------------------


class Network(Downloader):
    """A downloader that takes files of a folder, or raises the errors it is given by the first letter of a name."""

    def __init__(self, folder: Path, **errors: DownloadError) -> None:
        super().__init__()
        self.folder = folder
        self.errors = errors
        self.asked: list[str] = []

    def fetch(self, name: str, link: str) -> bytes:
        self.asked.append(link)
        if name[0] in self.errors:
            raise self.errors[name[0]]
        return (self.folder / name).read_bytes()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def statement(image: str, link: str = "", index: int = 0) -> Statement:
    return Statement(image, "The cat is on the mat.", 1, "on", index, link)


def test_every_photograph_has_one_link() -> None:
    links = image_links([statement("b.png", "B"), statement("a.png", "A", 1), statement("b.png", "B", 2)])
    assert list(links.items()) == [("a.png", "A"), ("b.png", "B")]
    with pytest.raises(ValueError, match=r"image a\.png has two links, 'A' and 'B'; keep one"):
        image_links([statement("a.png", "A"), statement("a.png", "B", 1)])


@pytest.mark.parametrize(
    "name", ["x/a.png", "/a.png", "../a.png", "..", ".", ".a.png", "x\\a.png", "a\0.png", ""]
)
def test_a_name_other_than_a_plain_file_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no plain file name") as caught:
        image_links([statement("b.png"), statement(name, index=6)])
    assert str(caught.value).startswith(f"image {name!r} (statement 7)")


def test_existing_photographs_that_decode_are_not_downloaded_again(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((photographs / "a.png").read_bytes())
    (tmp_path / "b.png").write_bytes((photographs / "b.png").read_bytes()[:99])
    network = Network(photographs)
    assert save_all(LINKS, tmp_path, network.save, 2) == Summary(1, 2, [])
    assert sorted(network.asked) == [LINKS["b.png"], LINKS["c.png"]]
    assert names_in(tmp_path) == ["a.png", "b.png", "c.png"]
    for name in LINKS:
        assert (tmp_path / name).read_bytes() == (photographs / name).read_bytes()
    assert save_all(LINKS, tmp_path, network.save, 2) == Summary(3, 0, [])
    assert len(network.asked) == 2


def test_failures_are_listed_until_they_are_mended(photographs: Path, tmp_path: Path) -> None:
    network = Network(
        photographs, c=DownloadError("HTTP status 404"), a=DownloadError("cut off", can_retry=True)
    )
    summary = save_all(LINKS | {"d.png": ""}, tmp_path, network.save, 2)
    reason = "the annotations have no image_link for it; take it from a COCO folder or zip"
    assert summary == Summary(0, 1, [("a.png", "cut off"), ("c.png", "HTTP status 404"), ("d.png", reason)])
    assert names_in(tmp_path) == ["b.png", "failures.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert rows == [{"path": name, "reason": reason} for name, reason in summary.failures]
    network.errors = {}
    assert save_all(LINKS, tmp_path, network.save, 2) == Summary(1, 2, [])
    assert names_in(tmp_path) == ["a.png", "b.png", "c.png"]


def test_the_report_shows_the_first_five_failures(tmp_path: Path) -> None:
    failures = [(f"{i}.png", "gone") for i in range(7)]
    assert Summary(1000, 2, failures).report(tmp_path).splitlines() == [
        *(f"{i}.png: gone" for i in range(5)),
        "and 2 more",
        "1,009 photographs: 1,000 there before, 2 new, 7 failed",
        f"all reasons: {tmp_path / 'failures.jsonl'}; the same command tries those again",
    ]
    assert Summary(1, 2, []).report(tmp_path) == "3 photographs: 1 there before, 2 new, 0 failed"


@pytest.mark.parametrize("error", [DownloadError("no answer", can_retry=True), CertificateError("unknown")])
def test_downloads_end_early_when_the_network_is_down(
    error: DownloadError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_FAILURES_IN_A_ROW", 3)
    network = Network(tmp_path, x=error)
    links = {f"x{i}.png": "https://photographs.test/x.png" for i in range(10)}
    summary = save_all(links, tmp_path / "images", network.save, 1)
    assert len(network.asked) == 3
    assert [reason for _, reason in summary.failures] == [error.reason] * 3 + [
        "not tried: 3 downloads in a row had failed; run again"
    ] * 7


def test_missing_photographs_do_not_count_as_network_failures(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_FAILURES_IN_A_ROW", 2)
    network = Network(photographs, x=DownloadError("HTTP status 404"))
    links = {f"x{i}.png": "https://photographs.test/x.png" for i in range(5)} | LINKS
    assert len(save_all(links, tmp_path, network.save, 1).failures) == 5
    assert len(network.asked) == 8


def test_a_disk_that_cannot_be_written_ends_the_call_and_its_downloads(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes, overwrite: bool) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(download, "publish_bytes", full)
    stop = threading.Event()
    with pytest.raises(OSError, match="No space left"):
        save_all(LINKS, tmp_path, Network(photographs).save, 1, stop=stop)
    assert stop.is_set()
    assert names_in(tmp_path) == []


def test_eight_threads_get_every_photograph_after_retries(
    server: Server, photograph: bytes, tmp_path: Path
) -> None:
    """Of 40 photographs 7.png is missing, and every third arrives at the second request only."""
    names = [f"{i}.png" for i in range(40)]

    def answer(handler: Handler, number: int) -> None:
        i = int(handler.path.strip("/.png"))
        status = 404 if i == 7 else 500 if i % 3 == 0 and number == 1 else 200
        handler.answer(status, photograph)

    server.answers = {f"/{name}": answer for name in names}
    links = {name: server.url(f"/{name}") for name in names}
    summary = save_all(links, tmp_path / "images", downloader(server).save, 8)
    assert summary == Summary(0, 39, [("7.png", f"HTTP status 404 from photographs.test:{server.port}")])
    assert len(server.requests) == 40 + 14
    assert {path.read_bytes() for path in (tmp_path / "images").glob("*.png")} == {photograph}
    assert len(names_in(tmp_path / "images")) == 40
    assert save_all({"8.png": links["8.png"]}, tmp_path / "images", downloader(server).save) == Summary(
        1, 0, []
    )
    assert len(server.requests) == 40 + 14


@pytest.mark.skipif(not VSR.is_dir(), reason="no real data: ../shared/vsr is not there")
@pytest.mark.parametrize(("release", "number"), [("random", 6259), ("zeroshot", 3181)])
def test_every_link_of_vsr_is_allowed(release: str, number: int) -> None:
    links = image_links(
        s
        for split in ("train", "dev", "test")
        for s in load_statements(VSR / release, split, f"vsr_{release}")
    )
    assert len(links) == number
    for name, link in links.items():
        check_url(secure_url(link), [COCO_HOST])
        folder = urlsplit(secure_url(link)).path.removesuffix(f"/{name}")
        assert folder in ("/images.cocodataset.org/train2017", "/images.cocodataset.org/val2017")


# --- Copies of COCO ------------------------------------------------------------------------------


def copying(*paths: Path) -> download.Save:
    return partial(save_copy, [CocoCopy(path) for path in paths])


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
    assert save_all(LINKS, output, copying(coco, coco_zip), 2) == Summary(0, 3, [])
    assert names_in(output) == ["a.png", "b.png", "c.png"]
    for name in LINKS:
        assert (output / name).read_bytes() == (photographs / name).read_bytes()
    assert os.path.samefile(output / "a.png", coco / "train2017" / "a.png")
    assert os.path.samefile(output / "b.png", coco / "val2017" / "b.png")


def test_a_photograph_is_copied_if_hard_links_are_not_possible(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: str, path: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    output = tmp_path / "images"
    save_all({"a.png": ""}, output, copying(coco), 1)
    assert (output / "a.png").read_bytes() == (coco / "train2017" / "a.png").read_bytes()
    assert not os.path.samefile(output / "a.png", coco / "train2017" / "a.png")
    assert names_in(output) == ["a.png"]


def test_a_damaged_file_is_replaced_by_the_link(coco: Path, tmp_path: Path) -> None:
    output = tmp_path / "images"
    output.mkdir()
    (output / "a.png").write_bytes(b"half")
    CocoCopy(coco).save("a.png", output / "a.png")
    assert os.path.samefile(output / "a.png", coco / "train2017" / "a.png")
    assert names_in(output) == ["a.png"]


def test_a_photograph_in_no_source_is_named_with_its_place_in_coco(coco: Path, tmp_path: Path) -> None:
    summary = save_all(LINKS, tmp_path / "images", copying(coco), 1)
    reason = f"not in {coco}; it is one of COCO's train2017: give that with --coco too"
    assert summary == Summary(0, 2, [("c.png", reason)])


@pytest.mark.parametrize("separator", ["/", "\\"])
@pytest.mark.parametrize("above", ["", "data/", "home/me/coco/images/", "./"])
def test_a_zip_may_have_folders_above_those_of_coco(
    above: str, separator: str, photographs: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "coco.zip", "w") as archive:
        for place, name in (("train2017/", "a.png"), ("val2017/", "b.png"), ("other/", "c.png")):
            entry = zipfile.ZipInfo("x")
            entry.filename = f"{above}{place}{name}".replace("/", separator)
            archive.writestr(entry, (photographs / name).read_bytes())
    output = tmp_path / "images"
    summary = save_all(dict.fromkeys(LINKS, ""), output, copying(tmp_path / "coco.zip"), 1)
    assert summary == Summary(0, 2, [("c.png", f"not in {tmp_path / 'coco.zip'}")])
    for name in ("a.png", "b.png"):
        assert (output / name).read_bytes() == (photographs / name).read_bytes()


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    ("stored", "wanted", "shown", "difference"),
    [
        ("A.PNG", "a.png", "A.PNG", "upper and lower case"),
        ("a.PNG", "A.png", "a.PNG", "upper and lower case"),
        ("cafe\u0301.png", "caf\u00e9.png", "cafe\\u0301.png", r"Unicode form (NFC or NFD)"),
        ("caf\u00e9.png", "cafe\u0301.png", "caf\\xe9.png", r"Unicode form (NFC or NFD)"),
        ("CAFE\u0301.png", "caf\u00e9.png", "CAFE\\u0301.png", "upper and lower case"),
    ],
)
def test_a_similar_name_is_not_taken_but_named(
    kind: str, stored: str, wanted: str, shown: str, difference: str, photographs: Path, tmp_path: Path
) -> None:
    source = tmp_path / "coco"
    (source / "train2017").mkdir(parents=True)
    shutil.copy(photographs / "a.png", source / "train2017" / stored)
    if (source / "train2017" / wanted).exists():
        pytest.skip("this file system takes both names for one")
    if kind == "zip":
        source = Path(shutil.make_archive(str(tmp_path / "coco"), "zip", source))
    reason = f"not in {source}; {source} has 'train2017/{shown}', which differs in {difference}: rename one of the two"
    assert save_all({wanted: ""}, tmp_path / "images", copying(source), 1) == Summary(
        0, 0, [(wanted, reason)]
    )
    assert names_in(tmp_path / "images") == ["failures.jsonl"]


def test_a_damaged_photograph_of_a_source_is_not_copied(coco: Path, coco_zip: Path, tmp_path: Path) -> None:
    (coco / "train2017" / "a.png").write_bytes((coco / "train2017" / "a.png").read_bytes()[:-500])
    data = bytearray(coco_zip.read_bytes())
    data[len(data) // 2] ^= 4
    coco_zip.write_bytes(bytes(data))
    summary = save_all(LINKS, tmp_path / "images", copying(coco, coco_zip), 1)
    assert [name for name, _ in summary.failures] == ["a.png", "c.png"]
    assert summary.failures[0][1].startswith("damaged or not complete")
    assert (
        summary.failures[1][1] == "cannot be read from train2017.zip: Bad CRC-32 for file 'train2017/c.png'"
    )
    assert names_in(tmp_path / "images") == ["b.png", "failures.jsonl"]


def test_a_link_out_of_the_coco_folder_is_not_followed(coco: Path, photographs: Path, tmp_path: Path) -> None:
    (coco / "c.png").symlink_to(photographs / "c.png")
    with pytest.raises(ImageError, match=r"a symbolic link out of the image folder, .* --follow_links reads"):
        CocoCopy(coco).save("c.png", tmp_path / "c.png")
    CocoCopy(coco, follow_links=True).save("c.png", tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes() == (photographs / "c.png").read_bytes()
    assert not (tmp_path / "c.png").is_symlink()


def test_nothing_is_written_through_a_link(photographs: Path, tmp_path: Path) -> None:
    output, network = tmp_path / "images", Network(photographs)
    output.mkdir()
    (tmp_path / "kept.png").write_bytes(b"another file")
    shutil.copy(photographs / "b.png", tmp_path / "blob")
    (output / "a.png").symlink_to(tmp_path / "kept.png")
    (output / "b.png").symlink_to(tmp_path / "blob")
    way = f"a symbolic link out of the image folder, to {tmp_path}"
    wanted = f"{way}/%s; --follow_links reads it; a link is not replaced: remove it"
    links = {name: LINKS[name] for name in ("a.png", "b.png")}
    refused = [("a.png", wanted % "kept.png"), ("b.png", wanted % "blob")]
    assert save_all(links, output, network.save, 1) == Summary(0, 0, refused)
    summary = save_all(links, output, network.save, 1, follow_links=True)
    assert (summary.num_present, [name for name, _ in summary.failures]) == (1, ["a.png"])
    assert (tmp_path / "kept.png").read_bytes() == b"another file"


def test_a_zip_cannot_hold_more_than_a_photograph_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_BYTES", 1000)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.bmp")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "a.bmp", "a.bmp")
    summary = save_all({"a.bmp": ""}, tmp_path / "images", copying(tmp_path / "bomb.zip"), 1)
    assert summary.failures == [("a.bmp", "more than 1000 bytes; at most 1000 are read")]


def test_a_source_has_to_be_there_and_a_folder_or_a_zip(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="coco: no file or folder"):
        CocoCopy(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"a\.png is neither a folder nor a whole zip file"):
        CocoCopy(photographs / "a.png")


# --- Dry run -------------------------------------------------------------------------------------


def test_a_plan_counts_present_available_and_lacking_photographs(
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


def test_a_plan_of_downloads_has_their_size_and_the_disallowed_hosts(
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
    assert lines[2].startswith(f"downloads    1 from {COCO_HOST}, 8 at a time: about 0.2 MiB (")
    assert lines[3] == "would fail   2, such as b.jpg: without a link, or with one to another host"
    monkeypatch.setattr("theworld.utils.files.free_bytes", lambda path: 159_999)
    with pytest.raises(ValueError, match="160,000 bytes are needed and 159,999 are free"):
        list(plan_images(config, tmp_path / "images", [], [COCO_HOST], 8))
    with pytest.raises(ValueError, match="allowed_host is 'https://x'"):
        list(plan_images(config, tmp_path / "images", [], ["https://x"], 8))
    with pytest.raises(FileNotFoundError, match="coco: no file or folder nowhere"):
        list(plan_images(config, tmp_path / "images", [Path("nowhere")], [COCO_HOST], 8))
