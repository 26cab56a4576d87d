"""The server by real requests: what it answers, and what it does not."""

import base64
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from theworld.local_server import HEADERS, WAITING, Answer, Server
from theworld.questions import Limits

FILES = {"/": ("text/html", b"<p>page"), "/style.css": ("text/css", b"p {}")}


def shape_and_words(pixels: np.ndarray, statements: list[str]) -> list[dict[str, Any]]:
    """Stands in for a model where a test is about the server."""
    return [{"statement": text, "p_true": {"world": pixels.shape[0] / 1000}} for text in statements]


@contextmanager
def running(answer: Answer = shape_and_words, **options: Any) -> Iterator[Server]:
    with Server(answer, FILES, **options) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(
    server: Server, body: bytes | None = None, method: str = "POST", path: str = "/ask", **headers: str
) -> tuple[int, Any, dict[str, str]]:
    """Status, reply and headers. Header names with _ for -; an empty one is left out."""
    port = server.server_address[1]
    given = {"Host": f"127.0.0.1:{port}", "Content-Type": "application/json"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    if body is not None and "Content-Length" not in given:
        given["Content-Length"] = str(len(body))
    for name, value in given.items():
        if value:
            connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    kind = response.getheader("Content-Type") or ""
    return response.status, json.loads(data) if "json" in kind else data, dict(response.getheaders())


@pytest.fixture
def question(photographs: Path) -> bytes:
    coded = base64.b64encode((photographs / "a.png").read_bytes()).decode()
    return json.dumps({"photograph": coded, "statements": ["One.", "Two."]}).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as one:
        yield one


def test_a_question_is_answered(server: Server, question: bytes) -> None:
    status, reply, headers = ask(server, question)
    rows = [{"statement": text, "p_true": {"world": 0.08}} for text in ("One.", "Two.")]  # a.png is 80 high
    assert (status, reply) == (200, {"answers": rows})
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert headers["Server"].strip() == "TheWorld"


def test_only_its_own_files_are_served_whatever_the_path(server: Server) -> None:
    assert ask(server, method="GET", path="/")[:2] == (200, b"<p>page")
    status, reply, headers = ask(server, method="GET", path="/style.css")
    assert (status, reply, headers["Content-Type"]) == (200, b"p {}", "text/css; charset=utf-8")
    for path in (
        "/etc/passwd",
        "/../setup.cfg",
        "/%2e%2e/setup.cfg",
        "/style.css?x",
        "/ask",
        "*",
    ):
        status, reply, _ = ask(server, method="GET", path=path)
        assert (status, reply) == (404, {"error": "there is nothing here but the page, /"})
    assert ask(server, b"{}", path="/else")[:2] == (404, {"error": "questions go to /ask"})
    assert ask(server, method="DELETE", path="/")[0] == 501


def test_every_reply_says_what_a_page_may_do(server: Server, question: bytes) -> None:
    for reply in (
        ask(server, method="GET", path="/"),
        ask(server, method="GET", path="/x"),
        ask(server, question),
        ask(server, b"{}"),
    ):
        assert HEADERS.items() <= reply[2].items()
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http" not in policy


def test_it_listens_on_this_machine_only_unless_told(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.socket.getsockname()[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_address[1]}/"
    with running(host="0.0.0.0") as wide:
        assert wide.socket.getsockname()[0] == "0.0.0.0"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8642", "127.0.0.1.evil.example", "localhost.evil"]
)
def test_another_hosts_name_is_refused(server: Server, question: bytes, host: str) -> None:
    for status, reply, _ in (
        ask(server, question, Host=host),
        ask(server, method="GET", path="/", Host=host),
    ):
        assert (status, reply) == (403, {"error": f"this is not {host}"})


def test_its_own_names_are_known() -> None:
    with Server(shape_and_words, FILES, host="localhost") as server:
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:9", "[::1]:8642", "192.168.0.7:80"):
            assert server.knows(host), host
        for host in (
            "",
            ":80",
            "evil",
            "localhost:",
            "localhost:x",
            "1.2.3",
            "::ffff:evil",
            "127.0.0.1@evil",
        ):
            assert not server.knows(host), host


def test_no_host_and_two_hosts_are_refused(server: Server) -> None:
    assert ask(server, method="GET", path="/", Host="")[0] == 403
    port = server.server_address[1]
    with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.0 403 ")


def test_another_page_may_not_ask(server: Server, question: bytes) -> None:
    port = server.server_address[1]
    for origin in ("http://evil.example", "null", f"http://localhost:{port}", "http://127.0.0.1", "http://["):
        status, reply, _ = ask(server, question, Origin=origin)
        assert (status, reply) == (403, {"error": "another page may not ask here"}), origin
    assert ask(server, question, Origin=f"http://127.0.0.1:{port}")[0] == 200
    # What a form or a plain fetch of another page can send without asking first.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert ask(server, question, Content_Type=kind)[0] == 415


def test_bad_questions_are_answered_in_words(server: Server, photographs: Path) -> None:
    assert ask(server, b"{")[:2] == (400, {"error": "the request is no JSON"})
    page = base64.b64encode(b"<html>").decode()
    status, reply, _ = ask(server, json.dumps({"photograph": page, "statements": ["So."]}).encode())
    assert status == 400
    assert reply["error"].startswith("the photograph: an HTML or XML page, not a photograph")
    assert ask(server, method="POST")[:2] == (411, {"error": "wanted a Content-Length in bytes"})
    for length in ("-1", "1e3", "٣", "9" * 19, "0x10"):
        assert ask(server, b"", Content_Length=length.encode().decode("latin-1"))[0] == 411


def test_a_body_that_is_too_large_is_refused_unread_and_the_client_learns_why(question: bytes) -> None:
    with running(limits=Limits(max_bytes=1000)) as server:
        too_much = b"x" * (server.limits.max_body + 1)
        status, reply, _ = ask(server, too_much)
        assert (status, reply) == (413, {"error": "a photograph may have 1,000 bytes; this is larger"})
        assert ask(server, b"", Content_Length="9" * 18)[0] == 413
        status, reply, _ = ask(server, question)  # within the body's limit, the file is too large
        assert status == 400
        assert reply["error"].endswith("bytes; at most 1,000 are read")


def test_what_fails_is_said_and_it_goes_on(question: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    failures: list[Exception] = [RuntimeError("out of /secret/room"), ValueError("statement 1 is empty")]

    def answer(pixels: np.ndarray, statements: list[str]) -> list[dict[str, Any]]:
        if failures:
            raise failures.pop(0)
        return shape_and_words(pixels, statements)

    with running(answer) as server:
        status, reply, _ = ask(server, question)
        assert status == 500
        assert reply == {"error": "this failed (RuntimeError); the terminal of tools/ask.py shows why"}
        assert "RuntimeError: out of /secret/room" in capfd.readouterr().err
        assert ask(server, question)[:2] == (400, {"error": "statement 1 is empty"})
        assert ask(server, question)[0] == 200
        assert server.slots._value == WAITING  # type: ignore[attr-defined]  # none was lost


def test_one_question_is_answered_at_a_time_and_few_may_wait(question: bytes) -> None:
    inside, most = 0, 0
    go_on = threading.Event()

    def answer(pixels: np.ndarray, statements: list[str]) -> list[dict[str, Any]]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        go_on.wait(30)
        time.sleep(0.02)
        inside -= 1
        return shape_and_words(pixels, statements)

    with running(answer) as server:
        found: list[int] = []
        threads = [
            threading.Thread(target=lambda: found.append(ask(server, question)[0])) for _ in range(WAITING)
        ]
        for thread in threads:
            thread.start()
        while server.slots._value:  # type: ignore[attr-defined]
            time.sleep(0.01)
        status, reply, _ = ask(server, question)
        assert (status, reply) == (503, {"error": "others are waiting for answers; try again"})
        assert ask(server, method="GET", path="/")[0] == 200  # the page itself still comes
        go_on.set()
        for thread in threads:
            thread.join()
        assert found == [200] * WAITING
        assert most == 1
        assert ask(server, question)[0] == 200


def test_a_client_that_goes_away_or_never_speaks_holds_nobody_up(
    question: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("theworld.local_server.Handler.timeout", 0.2)
    with running() as server:
        address = ("127.0.0.1", server.server_address[1])
        silent = [socket.create_connection(address) for _ in range(2 * WAITING)]
        head = "POST /ask HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(question)}\r\n\r\n"
        for one in silent[:WAITING]:
            one.sendall(head.encode() + b"{")  # and no more
        gone = socket.create_connection(address)
        gone.sendall(head.encode() + question)
        gone.close()
        until = time.monotonic() + 30
        while ask(server, question)[0] != 200:
            assert time.monotonic() < until
            time.sleep(0.05)
        for one in silent:
            one.close()
    assert "Traceback" not in capfd.readouterr().err


def test_an_address_that_is_taken_is_named(server: Server) -> None:
    port = server.server_address[1]
    with pytest.raises(
        OSError, match=f"--host 127.0.0.1 --port {port}: Address already in use; choose another"
    ):
        Server(shape_and_words, FILES, port=port)


def test_it_ends_with_the_answer_in_work_and_leaves_no_thread(question: bytes) -> None:
    """A thread that Python leaves behind in torch's code aborts the process."""
    before, inside, go_on = set(threading.enumerate()), threading.Event(), threading.Event()

    def answer(pixels: np.ndarray, statements: list[str]) -> list[dict[str, Any]]:
        inside.set()
        assert go_on.wait(30)
        return []

    replies: list[tuple[int, Any]] = []
    with running(answer) as server:
        clients = [
            threading.Thread(target=lambda: replies.append(ask(server, question)[:2])) for _ in range(2)
        ]
        clients[0].start()
        assert inside.wait(30)
        clients[1].start()
        while len(server.connections) < 2:
            time.sleep(0.01)
        idle = socket.create_connection(
            ("127.0.0.1", server.server_address[1]), timeout=30
        )  # as browsers open
        while len(server.connections) < 3:
            time.sleep(0.01)
        time.sleep(0.2)  # until the second has been read, and waits for the first
        threading.Timer(0.5, go_on.set).start()
    assert go_on.is_set()
    assert idle.recv(1) == b""
    idle.close()
    for client in clients:
        client.join(30)
    assert sorted(replies, key=str) == [(200, {"answers": []}), (503, {"error": "this page is ending"})]
    assert [t for t in threading.enumerate() if t not in before and not isinstance(t, threading.Timer)] == []
