"""The page of tools/ask.py: the server by real requests, the bounds of a question, the page in a real Chromium."""

import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CONTRAST, SMALL, Browser, needs_browser
from constants import EMBEDDED_GEMMA, EMBEDDED_VAE, ROOT
from PIL import Image
from serving_models import STATEMENTS, save_model

from theworld.config.config import Config
from theworld.data.images import ImageError, read_image
from theworld.models.inference import CONDITIONS
from theworld.models.theworld import TheWorld
from theworld.serving.ask import LABELS, answers, load_for_asking
from theworld.serving.server import (
    HEADERS,
    MAX_CHARACTERS,
    MAX_QUESTIONS,
    MAX_STATEMENTS,
    Answer,
    Limits,
    PageFiles,
    Questions,
    Server,
    announcement,
    is_own_name,
    listen,
    page_files,
    plan_page,
    url_of,
)

PAGES = {"/": ("text/html", b"<p>page"), "/style.css": ("text/css", b"p {}")}
WEB = ROOT / "theworld" / "serving" / "web"
EVIL = '"><script>document.title="evil"</script><img src=x onerror=alert(1)> & $model'


class Running:
    """A server in a thread, as a test sees it."""

    def __init__(self, answer: Answer, pages: PageFiles, host: str, limits: Limits) -> None:
        self.listener = listen(host, 0)
        self.url, self.port = url_of(self.listener, host), self.listener.getsockname()[1]
        self.questions = Questions(answer, limits)
        self.server = Server(self.listener, host, self.questions, pages)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()

    def end(self) -> None:
        self.server.should_exit = True
        self.thread.join()


def shape_and_words(pixels: np.ndarray, statements: list[str]) -> list[dict[str, Any]]:
    """Stands in for a model where a test is about the server."""
    return [{"statement": text, "p_true": {"world": pixels.shape[0] / 1000}} for text in statements]


@contextlib.contextmanager
def running(
    answer: Answer = shape_and_words,
    pages: PageFiles = PAGES,
    host: str = "127.0.0.1",
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> Iterator[Running]:
    one = Running(answer, pages, host, limits)
    try:
        yield one
    finally:
        one.end()


def ask(
    server: Running, body: bytes | None = None, method: str = "POST", path: str = "/ask", **headers: str
) -> tuple[int, Any, dict[str, str]]:
    """Status, reply and headers. Header names with _ for -; an empty one is left out."""
    port = server.port
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
    return (
        response.status,
        json.loads(data) if data and "json" in kind else data,
        {name.lower(): value for name, value in response.getheaders()},
    )


@pytest.fixture
def question(photographs: Path) -> bytes:
    coded = base64.b64encode((photographs / "a.png").read_bytes()).decode()
    return json.dumps({"photograph": coded, "statements": ["One.", "Two."]}).encode()


@pytest.fixture
def server() -> Iterator[Running]:
    with running() as one:
        yield one


def test_a_question_is_answered(server: Running, question: bytes) -> None:
    status, reply, headers = ask(server, question)
    rows = [{"statement": text, "p_true": {"world": 0.08}} for text in ("One.", "Two.")]  # a.png is 80 high
    assert (status, reply) == (200, {"answers": rows})
    assert headers["content-type"] == "application/json; charset=utf-8"
    assert headers["server"] == "TheWorld"


def test_only_the_files_of_the_page_are_served(server: Running) -> None:
    assert ask(server, method="GET", path="/")[:2] == (200, b"<p>page")
    status, reply, headers = ask(server, method="GET", path="/style.css")
    assert (status, reply, headers["content-type"]) == (200, b"p {}", "text/css; charset=utf-8")
    for path in (
        "/etc/passwd",
        "/../setup.cfg",
        "/%2e%2e/setup.cfg",
        "/else?/",
        "/ask",
        "/ask/",
        "//",
        "*",
    ):
        status, reply, _ = ask(server, method="GET", path=path)
        assert (status, reply) == (404, {"error": "there is nothing here but the page, /"})
    for path in ("/", "/else", "/ask/"):
        assert ask(server, b"{}", path=path)[:2] == (404, {"error": "questions go to /ask"})
    for method in ("DELETE", "PUT", "OPTIONS"):
        status, reply, _ = ask(server, method=method, path="/")
        assert (status, reply) == (405, {"error": "there is nothing here but the page, /"})


def test_a_query_and_head_get_the_page(server: Running) -> None:
    plain = ask(server, method="GET", path="/")
    assert ask(server, method="GET", path="/?anything=1")[:2] == plain[:2] == (200, b"<p>page")
    assert ask(server, method="GET", path="/style.css?v=2")[:2] == (200, b"p {}")
    for path in ("/", "/?anything=1"):
        status, body, headers = ask(server, method="HEAD", path=path)
        assert (status, body) == (200, b"")
        assert {**headers, "date": ""} == {**plain[2], "date": ""}
    assert ask(server, method="HEAD", path="/else")[0] == 404


def test_every_reply_has_the_security_headers(server: Running, question: bytes) -> None:
    for reply in (
        ask(server, method="GET", path="/"),
        ask(server, method="GET", path="/x"),
        ask(server, question),
        ask(server, b"{}"),
    ):
        assert {name.lower(): value for name, value in HEADERS.items()}.items() <= reply[2].items()
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http" not in policy


def test_the_server_listens_on_localhost_by_default(server: Running) -> None:
    assert server.listener.getsockname()[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.port}/"
    assert list(announcement(server.listener, "127.0.0.1")) == [f"{server.url} (Ctrl-C ends it)"]
    with running(host="0.0.0.0") as wide:
        assert wide.listener.getsockname()[0] == "0.0.0.0"
        assert list(announcement(wide.listener, "0.0.0.0"))[1:] == [
            "every machine that reaches this one can ask; leave --host out to change that"
        ]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8642", "127.0.0.1.evil.example", "localhost.evil"]
)
def test_another_hosts_name_is_refused(server: Running, question: bytes, host: str) -> None:
    for status, reply, _ in (
        ask(server, question, Host=host),
        ask(server, method="GET", path="/", Host=host),
    ):
        assert (status, reply) == (403, {"error": f"this is not {host}"})


def test_the_names_of_the_host_are_accepted() -> None:
    for name in (
        "localhost",
        "LOCALHOST:1",
        "127.0.0.1",
        "127.0.0.1:9",
        "[::1]:8642",
        "192.168.0.7:80",
        "my-pc",
    ):
        assert is_own_name(name, "my-pc"), name
    for name in ("", ":80", "evil", "localhost:", "localhost:x", "1.2.3", "::ffff:evil", "127.0.0.1@evil"):
        assert not is_own_name(name, "my-pc"), name


def test_no_host_and_two_hosts_are_refused(server: Running) -> None:
    for request, status in (
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),  # by the parser of HTTP
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", b"400"),
        (b"GET / HTTP/1.0\r\n\r\n", b"403"),
        (b"GET / HTTP/1.0\r\nHost: \r\n\r\n", b"403"),
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:
            raw.sendall(request)
            assert raw.recv(100).startswith(b"HTTP/1.1 " + status + b" ")


def test_another_page_may_not_ask(server: Running, question: bytes) -> None:
    port = server.port
    for origin in ("http://evil.example", "null", f"http://localhost:{port}", "http://127.0.0.1", "http://["):
        status, reply, _ = ask(server, question, Origin=origin)
        assert (status, reply) == (403, {"error": "another page may not ask here"}), origin
    assert ask(server, question, Origin=f"http://127.0.0.1:{port}")[0] == 200
    # What a form or a plain fetch of another page can send without asking first.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert ask(server, question, Content_Type=kind)[0] == 415


def test_bad_questions_are_answered_in_words(server: Running, photographs: Path) -> None:
    assert ask(server, b"{")[:2] == (400, {"error": "the request is no JSON"})
    page = base64.b64encode(b"<html>").decode()
    status, reply, _ = ask(server, json.dumps({"photograph": page, "statements": ["So."]}).encode())
    assert status == 400
    assert reply["error"].startswith("the photograph: an HTML or XML page, not a photograph")
    assert ask(server, method="POST")[:2] == (411, {"error": "wanted a Content-Length in bytes"})
    assert ask(server, b"", Content_Length="9" * 19)[0] == 411
    for length in ("-1", "1e3", "٣", "0x10"):  # these stop at the parser of HTTP
        assert ask(server, b"", Content_Length=length.encode().decode("latin-1"))[0] == 400


def test_a_body_that_is_too_large_is_refused_unread_with_the_reason(question: bytes) -> None:
    with running(limits=Limits(max_bytes=1000)) as server:
        too_much = b"x" * (server.questions.limits.max_body + 1)
        status, reply, _ = ask(server, too_much)
        assert (status, reply) == (413, {"error": "a photograph may have 1,000 bytes; this is larger"})
        assert ask(server, b"", Content_Length="9" * 18)[0] == 413
        status, reply, _ = ask(server, question)  # within the body's limit, the file is too large
        assert status == 400
        assert reply["error"].endswith("bytes; at most 1,000 are read")


def test_a_chunked_question_is_refused(server: Running, question: bytes) -> None:
    chunked = f"{len(question):x}\r\n".encode() + question + b"\r\n0\r\n\r\n"
    status, reply, _ = ask(server, chunked, Transfer_Encoding="chunked", Content_Length="")
    assert (status, reply) == (411, {"error": "wanted a Content-Length in bytes"})
    with running(limits=Limits(max_bytes=1000)) as small:  # HTTP lets the chunks win over the length
        much = b"x" * (small.questions.limits.max_body + 1)
        chunked = f"{len(much):x}\r\n".encode() + much + b"\r\n0\r\n\r\n"
        assert ask(small, chunked, Transfer_Encoding="chunked", Content_Length="10")[0] == 413


def test_an_error_is_reported_and_the_server_goes_on(
    question: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    failures: list[Exception] = [RuntimeError("out of /secret/room"), ValueError("statement 1 is empty")]

    def answer(pixels: np.ndarray, statements: list[str]) -> list[dict[str, Any]]:
        if failures:
            raise failures.pop(0)
        return shape_and_words(pixels, statements)

    with running(answer) as server:
        status, reply, _ = ask(server, question)
        assert status == 500
        assert reply == {"error": "this failed (RuntimeError); the terminal of tools/ask.py shows why"}
        assert ask(server, question)[:2] == (400, {"error": "statement 1 is empty"})
        assert ask(server, question)[0] == 200
        assert server.questions.held == 0
    assert "RuntimeError: out of /secret/room" in caplog.text  # which goes to the terminal


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
            threading.Thread(target=lambda: found.append(ask(server, question)[0]))
            for _ in range(MAX_QUESTIONS)
        ]
        for thread in threads:
            thread.start()
        while server.questions.held < MAX_QUESTIONS:
            time.sleep(0.01)
        status, reply, _ = ask(server, question)
        assert (status, reply) == (503, {"error": "others are waiting for answers; try again"})
        assert ask(server, method="GET", path="/")[0] == 200  # the page itself still comes
        go_on.set()
        for thread in threads:
            thread.join()
        assert found == [200] * MAX_QUESTIONS
        assert most == 1
        assert ask(server, question)[0] == 200


def test_a_client_that_goes_away_or_never_speaks_holds_nobody_up(
    question: bytes,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("theworld.serving.server.READ_TIMEOUT", 0.2)
    with running() as server:
        address = ("127.0.0.1", server.port)
        silent = [socket.create_connection(address) for _ in range(2 * MAX_QUESTIONS)]
        head = "POST /ask HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(question)}\r\n\r\n"
        for one in silent[:MAX_QUESTIONS]:
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
    assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_a_question_whose_client_left_while_it_waited_is_not_asked(question: bytes) -> None:
    inside, go_on, asked = threading.Event(), threading.Event(), []

    def answer(pixels: np.ndarray, statements: list[str]) -> list[dict[str, Any]]:
        asked.append(statements)
        inside.set()
        assert go_on.wait(30)
        return []

    with running(answer) as server:
        first = threading.Thread(target=ask, args=(server, question))
        first.start()
        assert inside.wait(30)
        head = "POST /ask HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as gone:
            gone.sendall(f"{head}Content-Length: {len(question)}\r\n\r\n".encode() + question)
            while server.questions.held < 2:
                time.sleep(0.01)
        time.sleep(0.2)  # until the server has heard that the client left
        go_on.set()
        first.join()
        assert ask(server, question)[0] == 200
        assert len(asked) == 2
        assert server.questions.held == 0


def test_an_address_in_use_is_named(server: Running) -> None:
    port = server.port
    with pytest.raises(
        OSError, match=f"--host 127.0.0.1 --port {port}: Address already in use; choose another"
    ):
        listen("127.0.0.1", port)
    with pytest.raises(OSError, match=f"port {port}: Address already in use; choose another"):
        list(plan_page("127.0.0.1", port))
    assert list(plan_page("127.0.0.1", 0)) == [("serves", "a page on 127.0.0.1, a free port")]


def test_the_server_finishes_its_answer_and_leaves_no_thread(question: bytes) -> None:
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
        while len(server.server.server_state.connections) < 2:
            time.sleep(0.01)
        idle = socket.create_connection(("127.0.0.1", server.port), timeout=30)  # as browsers open
        while len(server.server.server_state.connections) < 3:
            time.sleep(0.01)
        unfinished = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        unfinished.sendall(
            b"POST /ask HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        while server.questions.held < 3:
            time.sleep(0.01)
        time.sleep(0.2)  # until the second has been read, and waits for the first
        threading.Timer(0.5, go_on.set).start()
    assert go_on.is_set()
    assert idle.recv(1) == b""
    idle.close()
    assert b"this page is ending" in unfinished.recv(5000)
    unfinished.close()
    for client in clients:
        client.join(30)
    assert sorted(replies, key=str) == [(200, {"answers": []}), (503, {"error": "this page is ending"})]
    assert [t for t in threading.enumerate() if t not in before and not isinstance(t, threading.Timer)] == []


# ---- the bounds of a question


def body(photograph: Any, statements: Any) -> bytes:
    coded = base64.b64encode(photograph).decode() if isinstance(photograph, bytes) else photograph
    return json.dumps({"photograph": coded, "statements": statements}).encode()


def test_a_photograph_and_statements_come_out_as_they_went_in(photographs: Path) -> None:
    statements = ["The cat is on the mat.", "Die Katze – “links” \u2028 😀"]
    pixels, found = Limits().read(body((photographs / "a.png").read_bytes(), statements))
    assert found == statements
    np.testing.assert_array_equal(pixels, read_image(photographs, "a.png"))


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"", "the request is no JSON"),
        (b"\xff\xfe{}", "the request is no JSON"),
        (body("", ["So."]).decode().encode("utf-16"), "the request is no JSON"),
        (body("", ["So.", "a\0"]), "statement 2 holds NUL, the character of number 0; remove it"),
        (body("", ["So.", " "]), "statement 2 is empty; leave it out, or say what it states"),
        (b"[" * 100_000, "the request is no JSON"),
        (b"[]", "wanted a JSON object of photograph and statements"),
        (b'{"photograph": ""}', "wanted a JSON object of photograph and statements"),
        (b'{"photograph": "", "statements": [], "path": "/etc/passwd"}', "wanted a JSON object of"),
        (body("", "So."), "statements: wanted a list of texts"),
        (body("", ["So.", 1]), "statements: wanted a list of texts"),
        (body("", []), "0 statements; wanted 1 to 32 at once"),
        (body("", ["So."] * (MAX_STATEMENTS + 1)), "33 statements; wanted 1 to 32 at once"),
        (body("", ["So.", "o" * (MAX_CHARACTERS + 1)]), "statement 2 has 1,001 characters; at most 1,000"),
        (body(None, ["So."]), "photograph: wanted a file in base64"),
        (body("/etc/passwd!", ["So."]), "photograph: wanted a file in base64"),
        (body("é", ["So."]), "photograph: wanted a file in base64"),
        (body("", ["So."]), "the photograph: zero bytes"),
        (body("", ["So.", "a \ud83d cat"]), "statement 2 holds half a character"),
        (body(b"<!doctype html>", ["So."]), "the photograph: an HTML or XML page, not a photograph"),
    ],
)
def test_anything_else_is_refused_in_words(sent: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits().read(sent)


def test_the_file_and_its_pixels_have_limits(photographs: Path) -> None:
    data = (photographs / "b.png").read_bytes()  # 64 x 64
    Limits(max_bytes=len(data), max_pixels=4096).read(body(data, ["So."]))
    with pytest.raises(
        ValueError, match=f"the photograph has {len(data):,} bytes; at most {len(data) - 1:,}"
    ):
        Limits(max_bytes=len(data) - 1).read(body(data, ["So."]))
    with pytest.raises(ImageError, match="64 x 64 pixels; at most 4095 are decoded"):
        Limits(max_pixels=4095).read(body(data, ["So."]))
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    with pytest.raises(ImageError, match="the photograph: more than 89478485 pixels"):
        Limits().read(body(bomb.getvalue(), ["So."]))


def test_the_largest_request_that_is_allowed_fits() -> None:
    limits = Limits(max_bytes=1000)
    largest = body(bytes(1000), ["😀" * MAX_CHARACTERS] * MAX_STATEMENTS)  # 12 bytes a character in JSON
    assert len(largest) <= limits.max_body < len(largest) + 50_000


# ---- the process


@pytest.mark.parametrize(
    ("number", "status", "last"), [(signal.SIGINT, 130, "ask: interrupted\n"), (signal.SIGTERM, -15, "")]
)
def test_the_tool_serves_until_a_signal_ends_it(
    config: Config, photographs: Path, tmp_path: Path, number: int, status: int, last: str
) -> None:
    saved = save_model(tmp_path / "model", config)
    process = subprocess.Popen(
        [sys.executable, "tools/ask.py", "--model", str(saved), "--serve", "--port", "0"],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.fullmatch(r"(http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n", said)
        assert found, said
        coded = base64.b64encode((photographs / "a.png").read_bytes()).decode()
        request = urllib.request.Request(
            found[1] + "ask",
            json.dumps({"photograph": coded, "statements": STATEMENTS}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            rows = json.load(response)["answers"]
        process.send_signal(number)
        rest, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, rest) == (status, "")
    assert errors.endswith(last)
    assert "Traceback" not in errors
    model = TheWorld.from_pretrained(saved)
    wanted = model.score(photographs / "a.png", STATEMENTS)
    assert [row["p_true"]["world"] for row in rows] == pytest.approx(wanted, abs=1e-5)


def test_the_page_is_filled_in_and_nothing_can_break_out() -> None:
    made = page_files(EVIL, [("world", LABELS["world"])], Limits(max_bytes=123))
    assert set(made) == {"/", "/style.css", "/script.js"}
    page = made["/"][1].decode()
    assert "<script>document" not in page
    assert "&lt;script&gt;document.title=&quot;evil&quot;&lt;/script&gt;" in page
    assert page.count("<script") == 1
    assert 'data-max-bytes="123"' in page
    assert 'data-conditions="[[&quot;world&quot;, &quot;with world tokens&quot;]]"' in page
    # nothing from outside, nothing that the policy would stop
    for path in (
        *WEB.iterdir(),
        ROOT / "theworld" / "utils" / "theme.css",
    ):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://|style=|\son\w+=|innerHTML|eval\(|@import|url\(", text), path


# ---- the page


SHOWN_LABELS = [(condition, LABELS[condition]) for condition in CONDITIONS]
OVERFLOW = """
[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.tagName + ' ' + e.textContent.slice(0, 40))
"""
SHOWN = """
[...document.querySelectorAll('#list li')].map(item => [item.querySelector('h3').textContent,
  [...item.querySelectorAll('.row')].map(row => [row.querySelector('dt').textContent,
    row.querySelector('.figure').textContent, row.querySelector('.fill').style.width])])
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TheWorld:
    """An untrained one of the embedded models."""
    config = Config(
        model_name=str(EMBEDDED_GEMMA),
        cosmos_model_name=str(EMBEDDED_VAE),
        latent_size=64,
        world_patch=2,
        device="cpu",
    )
    saved = save_model(tmp_path_factory.mktemp("served") / "model", config)
    return load_for_asking(str(saved), CONDITIONS, {})


@pytest.fixture(scope="module")
def url(model: TheWorld) -> Iterator[str]:
    """Where the page of that model is served."""

    def answer(pixels: np.ndarray, statements: list[str]) -> list[dict[str, Any]]:
        return answers(model, pixels, statements)

    limits = Limits(max_bytes=200_000, max_pixels=1_000_000)
    with running(answer, page_files("you/world " + EVIL, SHOWN_LABELS, limits), limits=limits) as server:
        yield server.url


def visit(browser: Browser, url: str, width: int = 1200, dark: bool = False) -> None:
    """Loads the page in a window of that size and colour scheme."""
    browser.show(WEB / "style.css", width, dark=dark)
    browser.requests.clear()
    browser.logged.clear()
    browser.call("Page.navigate", url=url)
    while browser._read().get("method") != "Page.loadEventFired":
        pass


def choose(browser: Browser, path: Path) -> None:
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])


def write(browser: Browser, *statements: str) -> None:
    browser.evaluate(f"document.getElementById('statements').value = {json.dumps(chr(10).join(statements))}")


def press_ask(browser: Browser) -> str:
    """Presses the button and returns the status line, or the error."""
    browser.evaluate("document.getElementById('ask').click()")
    return outcome(browser)


def outcome(browser: Browser) -> str:
    until = time.monotonic() + 60
    while browser.evaluate("document.getElementById('ask').hasAttribute('aria-disabled')"):
        assert time.monotonic() < until
        time.sleep(0.02)
    text = "document.getElementById('error').textContent || document.getElementById('status').textContent"
    return browser.evaluate(text)


def expected(model: TheWorld, image: Path, statements: list[str]) -> list[Any]:
    """What the page should show, as SHOWN reads it."""
    names = {"world": "with world tokens", "baseline": "without world tokens", "zero": "zero latents"}
    shown = []
    for row in answers(model, image, statements):
        figures = []
        for system, p in row["p_true"].items():
            said = "true" if p > 0.5 else "not true"
            figures.append([names[system], f"{100 * p:.1f}\u00a0% {said}"])
        shown.append([row["statement"], figures])
    return shown


def without_widths(shown: list[Any]) -> list[Any]:
    return [[statement, [row[:2] for row in rows]] for statement, rows in shown]


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 390, 768, 1200])
def test_the_page_answers_fits_is_legible_and_loads_nothing_from_elsewhere(
    browser: Browser, url: str, model: TheWorld, photographs: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    visit(browser, url, width, dark)
    assert browser.evaluate("document.title") == "Is it true of this photograph? TheWorld"
    assert browser.evaluate(CONTRAST) == []
    choose(browser, photographs / "a.png")
    statements = [*STATEMENTS, EVIL, "The" + " very long" * 40 + " statement is " + "t" * 90 + "rue."]
    write(browser, *statements[:2], "   ", *statements[2:])
    assert re.fullmatch(r"4 statements answered below in \d+\.\d+ s\.", press_ask(browser))
    shown = browser.evaluate(SHOWN)
    assert without_widths(shown) == expected(model, photographs / "a.png", statements)
    # and no script ran
    assert browser.evaluate("document.title") == "Is it true of this photograph? TheWorld"
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    for check in (OVERFLOW, CONTRAST, SMALL):
        assert browser.evaluate(check) == []
    assert browser.evaluate("document.getElementById('preview').naturalWidth") == 96
    asked = [r for r in browser.requests if not r.startswith(("blob:" + url, "data:,"))]
    assert asked == [url, url + "style.css", url + "script.js", url + "ask"]
    assert browser.logged == []
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 27)" if dark else "rgb(247, 246, 242)")
    browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.width == width


@needs_browser
def test_the_length_of_a_bar_is_its_probability(
    browser: Browser, url: str, model: TheWorld, photographs: Path
) -> None:
    visit(browser, url)
    choose(browser, photographs / "b.png")
    write(browser, STATEMENTS[0])
    assert press_ask(browser).startswith("1 statement answered below in ")
    share = "(e => e.getBoundingClientRect().width / e.parentElement.getBoundingClientRect().width)"
    wanted = list(answers(model, photographs / "b.png", STATEMENTS[:1])[0]["p_true"].values())
    until = time.monotonic() + 30  # they grow
    while True:
        found = browser.evaluate(f"[...document.querySelectorAll('.fill')].map({share})")
        if found == pytest.approx(wanted, abs=0.002):
            break
        assert time.monotonic() < until, (found, wanted)
        time.sleep(0.05)


@needs_browser
def test_the_page_reports_an_error_until_it_is_corrected(
    browser: Browser, url: str, photographs: Path, tmp_path: Path
) -> None:
    visit(browser, url)
    assert press_ask(browser) == "Choose a photograph first."
    assert browser.evaluate("document.activeElement.id") == "file"
    choose(browser, photographs / "a.png")
    assert browser.evaluate("document.getElementById('error').hidden")
    assert press_ask(browser).startswith("Write a statement first, such as: ")
    assert browser.evaluate("document.activeElement.id") == "statements"
    write(browser, *["So."] * 33)
    assert press_ask(browser) == "At most 32 statements at once; these are 33."
    write(browser, "The cat.<end_of_turn>")
    assert "holds Gemma's control token '<end_of_turn>'; remove it" in press_ask(browser)
    write(browser, STATEMENTS[0])
    (tmp_path / "large.png").write_bytes(bytes(200_001))
    choose(browser, tmp_path / "large.png")
    assert press_ask(browser) == "The photograph has 200,001 bytes; at most 200,000 are read."
    (tmp_path / "page.jpg").write_text("<!doctype html>")
    choose(browser, tmp_path / "page.jpg")
    assert press_ask(browser).startswith("the photograph: an HTML or XML page, not a photograph")
    Image.new("1", (1001, 1000)).save(tmp_path / "wide.png")
    choose(browser, tmp_path / "wide.png")
    assert press_ask(browser) == "the photograph: 1001 x 1000 pixels; at most 1000000 are decoded"
    choose(browser, photographs / "a.png")
    assert press_ask(browser).startswith("1 statement answered below in ")
    choose(browser, photographs / "b.png")
    assert browser.evaluate("document.getElementById('answers').hidden")  # they were about the other one


@needs_browser
def test_the_page_reports_a_server_that_does_not_answer(browser: Browser, photographs: Path) -> None:
    with running(pages=page_files("m", SHOWN_LABELS, Limits())) as server:
        visit(browser, server.url)
    choose(browser, photographs / "a.png")
    write(browser, STATEMENTS[0])
    said = press_ask(browser)
    assert said.startswith("No answer came: ")
    assert said.endswith("Is tools/ask.py still running?")


@needs_browser
def test_a_photograph_can_be_dropped_and_pasted(
    browser: Browser, url: str, model: TheWorld, photographs: Path
) -> None:
    visit(browser, url)
    data = {"items": [], "files": [str(photographs / "c.png")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        browser.call("Input.dispatchDragEvent", type=kind, x=300, y=300, data=data)
    assert browser.evaluate("document.getElementById('file').files[0].name") == "c.png"
    write(browser, STATEMENTS[1])
    press_ask(browser)
    shown = without_widths(browser.evaluate(SHOWN))
    assert shown == expected(model, photographs / "c.png", STATEMENTS[1:])
    coded = base64.b64encode((photographs / "b.png").read_bytes()).decode()
    paste = """(() => { const held = new DataTransfer();
      held.items.add(new File([Uint8Array.from(atob('CODED'), c => c.charCodeAt(0))], 'pasted.png'));
      document.body.dispatchEvent(new ClipboardEvent('paste', {clipboardData: held, bubbles: true})); })()"""
    browser.evaluate(paste.replace("CODED", coded))
    assert browser.evaluate("document.getElementById('file').files[0].name") == "pasted.png"
    press_ask(browser)
    shown = without_widths(browser.evaluate(SHOWN))
    assert shown == expected(model, photographs / "b.png", STATEMENTS[1:])


@needs_browser
def test_an_answer_about_a_photograph_that_was_replaced_is_never_shown(
    browser: Browser, photographs: Path
) -> None:
    go_on, asked = threading.Event(), []

    def answer(pixels: np.ndarray, statements: list[str]) -> list[dict[str, Any]]:
        asked.append(pixels.shape)
        if len(asked) == 1:
            assert go_on.wait(60)
        p_true = dict.fromkeys(CONDITIONS, pixels.shape[0] / 1000)
        return [{"statement": text, "p_true": p_true} for text in statements]

    with running(answer, page_files("m", SHOWN_LABELS, Limits())) as server:
        visit(browser, server.url)
        choose(browser, photographs / "a.png")
        write(browser, STATEMENTS[0])
        browser.evaluate("document.getElementById('ask').click()")
        assert browser.evaluate("document.getElementById('status').textContent") == "Asking the model …"
        until = time.monotonic() + 60
        while not asked:  # the server works on the first photograph
            assert time.monotonic() < until
            browser.evaluate("0")
            time.sleep(0.02)
        choose(browser, photographs / "b.png")
        assert not browser.evaluate("document.getElementById('ask').hasAttribute('aria-disabled')")
        assert browser.evaluate("document.getElementById('status').textContent") == ""
        go_on.set()
        while server.questions.held:
            assert time.monotonic() < until
            time.sleep(0.02)
        for _ in range(10):  # time in which the old answer would be shown
            time.sleep(0.05)
            assert browser.evaluate("document.getElementById('answers').hidden")
            assert browser.evaluate("document.getElementById('error').hidden")
        assert press_ask(browser).startswith("1 statement answered below in ")
        # b.png is 64 high
        assert {row[1] for row in browser.evaluate(SHOWN)[0][1]} == {"6.4\u00a0% not true"}
        assert len(asked) == 2


@needs_browser
def test_text_that_comes_with_a_picture_goes_to_the_field_it_is_meant_for(
    browser: Browser, url: str, photographs: Path
) -> None:
    """Spreadsheets put both on the clipboard, and may be dragged from, too."""
    visit(browser, url)
    choose(browser, photographs / "a.png")
    send = """((target, kind, text) => { const held = new DataTransfer();
      held.items.add(new File([Uint8Array.from(atob('CODED'), c => c.charCodeAt(0))], 'cells.png'));
      if (text) held.setData('text/plain', 'The cup is on the book.');
      const options = {bubbles: true, cancelable: true};
      const event = kind === 'paste' ? new ClipboardEvent(kind, {...options, clipboardData: held})
        : new DragEvent(kind, {...options, dataTransfer: held});
      document.getElementById(target).dispatchEvent(event);
      return [event.defaultPrevented, document.getElementById('file').files[0].name]; })"""
    send = send.replace("CODED", base64.b64encode((photographs / "b.png").read_bytes()).decode())
    for kind, prevented in (("paste", False), ("dragover", True), ("drop", True)):
        taken = "a.png" if kind == "dragover" else "cells.png"
        for target, text in (("statements", "false"), ("ask", "true")):
            choose(browser, photographs / "a.png")
            assert browser.evaluate(f"{send}('{target}', '{kind}', {text})") == [prevented, taken], (
                kind,
                target,
            )
        choose(browser, photographs / "a.png")
        assert browser.evaluate(f"{send}('statements', '{kind}', true)") == [False, "a.png"], kind
    assert browser.evaluate("document.getElementById('error').hidden")
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    copy = """(async () => { const bytes = Uint8Array.from(atob('CODED'), c => c.charCodeAt(0));
      const parts = {'image/png': new Blob([bytes], {type: 'image/png'}),
        'text/plain': new Blob(['The cup is on the book.'], {type: 'text/plain'})};
      await navigator.clipboard.write([new ClipboardItem(parts)]); return 'copied'; })()"""
    copy = copy.replace("CODED", base64.b64encode((photographs / "b.png").read_bytes()).decode())
    browser.call("Page.bringToFront")
    found = browser.call("Runtime.evaluate", expression=copy, awaitPromise=True, returnByValue=True)
    assert found["result"].get("value") == "copied", found
    browser.evaluate("document.getElementById('statements').focus()")
    key = {"key": "v", "code": "KeyV", "windowsVirtualKeyCode": 86, "modifiers": 2, "commands": ["paste"]}
    browser.call("Input.dispatchKeyEvent", type="rawKeyDown", **key)
    browser.call(
        "Input.dispatchKeyEvent", type="keyUp", key="v", code="KeyV", windowsVirtualKeyCode=86, modifiers=2
    )
    assert browser.evaluate("document.getElementById('statements').value") == "The cup is on the book."
    assert browser.evaluate("document.getElementById('file').files[0].name") == "a.png"


@needs_browser
def test_the_keyboard_is_enough_and_sees_where_it_is(
    browser: Browser, url: str, model: TheWorld, photographs: Path
) -> None:
    visit(browser, url)
    choose(browser, photographs / "a.png")
    seen = []
    where = "[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]"
    for _ in range(3):
        browser.press("Tab", 9)
        seen.append(browser.evaluate(where))
        if seen[-1][0] == "statements":
            browser.call("Input.insertText", text=STATEMENTS[0])
    assert seen == [["file", "solid"], ["statements", "solid"], ["ask", "solid"]]
    browser.press("Enter", 13, "\r")
    assert outcome(browser).startswith("1 statement answered below in ")
    assert browser.evaluate("document.activeElement.id") == "ask"  # where it was
    wanted = expected(model, photographs / "a.png", STATEMENTS)
    assert without_widths(browser.evaluate(SHOWN)) == wanted[:1]
    browser.evaluate("document.getElementById('statements').focus()")
    browser.call("Input.insertText", text=chr(10) + STATEMENTS[1])
    for kind in ("rawKeyDown", "keyUp"):
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "modifiers": 2}
        browser.call("Input.dispatchKeyEvent", type=kind, **key)
    assert outcome(browser).startswith("2 statements answered below in ")
    assert sorted(without_widths(browser.evaluate(SHOWN))) == sorted(wanted)


@needs_browser
def test_a_screen_reader_can_read_the_page(browser: Browser, url: str, photographs: Path) -> None:
    visit(browser, url)
    choose(browser, photographs / "a.png")
    write(browser, STATEMENTS[0])
    press_ask(browser)
    nodes = [n for n in browser.call("Accessibility.getFullAXTree")["nodes"] if not n["ignored"]]
    found = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes]
    roles = [role for role, _ in found]
    for landmark in ("banner", "main", "contentinfo", "status", "list"):
        assert roles.count(landmark) == 1, landmark
    assert ("region", "How likely it is that the statement is true") in found
    assert ("textbox", "Statements, one a line") in found
    assert ("button", "Ask") in found
    assert any(role == "button" and name.startswith("Photograph") for role, name in found)
    assert [name for role, name in found if role == "image"] == ["The chosen photograph"]
    headings = [name for role, name in found if role == "heading"]
    assert headings == [
        "Is it true of this photograph?",
        "How likely it is that the statement is true",
        STATEMENTS[0],
    ]
    words = [name for role, name in found if role == "StaticText"]
    figures = [figure for _, figure, _ in browser.evaluate(SHOWN)[0][1]]
    assert [word for word in words if word.endswith("%")] == [
        figure.partition("% ")[0] + "%" for figure in figures
    ]
    assert {"with world tokens", "without world tokens", "zero latents"} <= set(words)
    browser.evaluate("document.getElementById('statements').value = ''")
    press_ask(browser)
    nodes = [n for n in browser.call("Accessibility.getFullAXTree")["nodes"] if not n["ignored"]]
    assert "alert" in [n["role"]["value"] for n in nodes]
