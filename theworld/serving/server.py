"""The page of `tools/ask.py --serve`: a Starlette app and the uvicorn server that runs it.

    GET  /      the page; its files are /style.css and /script.js
    POST /ask   {"photograph": base64 of a file, "statements": ["...", ...]}  ->  {"answers": [...]}

Every error is {"error": "..."} with a status of 400 and above. The page is for the person at this machine. No file is
opened for a client. A request is refused if its Host header names another host, because another page could have its
own name point to this machine (DNS rebinding), and if another page sent it. One question is answered at a time.
"""

import asyncio
import base64
import html
import ipaddress
import json
import re
import socket
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from theworld.data.images import MAX_BYTES, MAX_PIXELS, decode
from theworld.utils.text import check_texts, decoded

MAX_STATEMENTS = 32  # in one question
MAX_CHARACTERS = 1000  # in one statement
MAX_QUESTIONS = 4  # held in memory at a time, one of them being answered
READ_TIMEOUT = 60.0  # seconds without a byte of a question, after which the question is dropped
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "TheWorld",
}
Answer = Callable[[np.ndarray, list[str]], list[dict[str, Any]]]  # of pixels uint8[H, W, 3] and statements
PageFiles = Mapping[str, tuple[str, bytes]]  # path -> media type, content


@dataclass(frozen=True)
class Limits:
    """Bounds on the photograph of a question."""

    max_bytes: int = MAX_BYTES  # of the photograph's file
    max_pixels: int = MAX_PIXELS

    @property
    def max_body(self) -> int:
        """Bytes of the longest request: the file in base64, and statements of at most 12 bytes a character in JSON."""
        return 4 * -(-self.max_bytes // 3) + 13 * MAX_STATEMENTS * MAX_CHARACTERS

    def read(self, body: bytes) -> tuple[np.ndarray, list[str]]:
        """Return pixels, uint8[H, W, 3], and statements of a request's body.

        Raises ValueError, in words for the person who asked, for any other body, and ImageError for a photograph that
        cannot be read.
        """
        try:
            question = json.loads(decoded(body, "the request"))
        except (ValueError, RecursionError):
            raise ValueError("the request is no JSON") from None
        if not isinstance(question, dict) or set(question) != {"photograph", "statements"}:
            raise ValueError("wanted a JSON object of photograph and statements")
        _check_statements(question["statements"])
        try:
            data = base64.b64decode(question["photograph"], validate=True)
        except (TypeError, ValueError):
            raise ValueError("photograph: wanted a file in base64") from None
        if len(data) > self.max_bytes:
            raise ValueError(f"the photograph has {len(data):,} bytes; at most {self.max_bytes:,} are read")
        return decode(data, "the photograph", self.max_pixels), question["statements"]


def _check_statements(statements: object) -> None:
    if not isinstance(statements, list) or not all(isinstance(text, str) for text in statements):
        raise ValueError("statements: wanted a list of texts")
    if not 1 <= len(statements) <= MAX_STATEMENTS:
        raise ValueError(f"{len(statements)} statements; wanted 1 to {MAX_STATEMENTS} at once")
    check_texts(statements, "statement")
    for number, text in enumerate(statements, 1):
        if len(text) > MAX_CHARACTERS:
            raise ValueError(
                f"statement {number} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read"
            )


# ---- the app


def page_files(model: str, labels: Sequence[tuple[str, str]], limits: Limits) -> PageFiles:
    """Return the files of the page of the model of that name. `labels` are (condition, label), in the order shown."""
    values = {
        "model": model,
        "conditions": json.dumps(labels),
        "max_bytes": limits.max_bytes,
        "max_statements": MAX_STATEMENTS,
    }
    web, theme = files("theworld.serving") / "web", files("theworld.utils") / "theme.css"
    page = string.Template((web / "index.html").read_text(encoding="utf-8"))
    text = page.substitute({key: html.escape(str(value)) for key, value in values.items()})
    return {
        "/": ("text/html", text.encode()),
        "/style.css": ("text/css", theme.read_bytes() + (web / "style.css").read_bytes()),
        "/script.js": ("text/javascript", (web / "script.js").read_bytes()),
    }


def create_app(questions: "Questions", pages: PageFiles, host: str) -> Starlette:
    """Return the app of the page. `host` is the name or address that the server was told to listen on."""
    app = Starlette(
        routes=[
            *(Route(path, partial(_send_file, file), methods=["GET"]) for path, file in pages.items()),
            Route("/ask", questions.reply, methods=["POST"]),
        ],
        middleware=[Middleware(SenderCheck, host=host)],
        exception_handlers={
            404: _no_such_page,
            405: _no_such_page,
            HTTPException: _refused,
            ValueError: _bad_question,
            ClientDisconnect: _client_gone,
            Exception: _failed,
        },
    )
    app.router.redirect_slashes = False
    return app


def _json(status: int, content: dict[str, Any]) -> Response:
    media_type = "application/json; charset=utf-8"
    return Response(json.dumps(content), status, HEADERS, media_type)


async def _send_file(file: tuple[str, bytes], request: Request) -> Response:
    media_type, content = file
    return Response(content, 200, HEADERS, media_type)


async def _no_such_page(request: Request, error: Exception) -> Response:
    status = 404 if request.method in ("GET", "HEAD", "POST") else 405
    text = "questions go to /ask" if request.method == "POST" else "there is nothing here but the page, /"
    return _json(status, {"error": text})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json(error.status_code, {"error": error.detail})


async def _bad_question(request: Request, error: Exception) -> Response:
    return _json(400, {"error": str(error)})


async def _client_gone(request: Request, error: Exception) -> Response:
    return _json(400, {"error": "the client has gone"})  # uvicorn drops it


async def _failed(request: Request, error: Exception) -> Response:
    """Answer for a failure such as a GPU without memory; Starlette and uvicorn log its traceback in the terminal."""
    text = f"this failed ({type(error).__name__}); the terminal of tools/ask.py shows why"
    return _json(500, {"error": text})


class SenderCheck:
    """ASGI middleware that refuses requests under another host's name and requests of another page, with 403."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app, self.host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        hosts, origin = headers.getlist("host"), headers.get("origin")
        app = self.app
        if len(hosts) != 1 or not is_own_name(hosts[0], self.host):
            app = _json(403, {"error": f"this is not {', '.join(hosts) or 'a host without a name'}"})
        elif origin is not None and origin.partition("://")[2] != hosts[0]:
            app = _json(403, {"error": "another page may not ask here"})
        await app(scope, receive, send)


def is_own_name(name: str, host: str) -> bool:
    """Return whether a Host header can name this server: as localhost, as `host`, or as an address in numbers.

    Nobody can have an address in numbers point to another machine, so it may be any of this machine's addresses.
    """
    if name.rpartition(":")[2].isdigit():
        name = name.rpartition(":")[0]
    if name.lower() in ("localhost", host.lower()):
        return name != ""
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


class Questions:
    """Answers questions one at a time. A few more may wait; the rest are told to try again."""

    def __init__(self, answer: Answer, limits: Limits) -> None:
        """`answer` is called in a thread, so that the page still comes meanwhile."""
        self.limits = limits
        self.held = 0  # questions that are read, wait or are answered
        self._answer = answer
        self._turn = asyncio.Lock()
        self._reading: set[asyncio.Timeout] = set()
        self._ending = False

    async def reply(self, request: Request) -> Response:
        """Answer POST /ask. The handlers of `create_app` turn what is raised into a response."""
        self._check_head(request.headers)
        if self.held == MAX_QUESTIONS:
            raise HTTPException(503, "others are waiting for answers; try again")
        self.held += 1
        try:
            body = await self._read_body(request)
            pixels, statements = await asyncio.to_thread(self.limits.read, body)
            async with self._turn:
                self._check_open()
                if await request.is_disconnected():  # such as for another photograph, while this one waited
                    raise ClientDisconnect
                answers = await asyncio.to_thread(self._answer, pixels, statements)
        finally:
            self.held -= 1
        return _json(200, {"answers": answers})

    def end(self) -> None:
        """Refuse every question that is not being answered yet, and stop waiting for the bytes of clients."""
        self._ending = True
        for timeout in self._reading:
            if not timeout.expired():
                timeout.reschedule(0)

    def _check_open(self) -> None:
        if self._ending:
            raise HTTPException(503, "this page is ending")

    def _check_head(self, headers: Headers) -> None:
        """Raise HTTPException unless the headers announce JSON of a bounded length."""
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":  # the forms of other pages cannot send JSON
            raise HTTPException(415, f"{media_type or 'no Content-Type'}: wanted application/json")
        length = headers.get("content-length", "")
        if not re.fullmatch("[0-9]{1,18}", length):
            raise HTTPException(411, "wanted a Content-Length in bytes")
        self._check_length(int(length))

    def _check_length(self, length: int) -> None:
        if length > self.limits.max_body:
            text = f"a photograph may have {self.limits.max_bytes:,} bytes; this is larger"
            raise HTTPException(413, text)

    async def _read_body(self, request: Request) -> bytes:
        body, clock = bytearray(), asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(READ_TIMEOUT) as timeout:
                self._reading.add(timeout)
                async for chunk in request.stream():
                    self._check_open()
                    timeout.reschedule(clock() + READ_TIMEOUT)
                    body += chunk
                    self._check_length(len(body))  # a chunked request may be longer than it announces
        except TimeoutError:
            self._check_open()
            raise HTTPException(408, f"nothing was sent for {READ_TIMEOUT:g} seconds") from None
        finally:
            self._reading.discard(timeout)
        return bytes(body)


# ---- the server


class Server(uvicorn.Server):
    """Runs the page on a socket that listens already: `run()`, until Ctrl-C, SIGTERM or `should_exit`.

    At the end the question that is being answered gets its answer, the rest are refused, and no thread is left.
    """

    def __init__(self, listener: socket.socket, host: str, questions: Questions, pages: PageFiles) -> None:
        app = create_app(questions, pages, host)
        # What happens must not depend on what else is installed, so no choice is left on "auto".
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http="h11",
                ws="none",
                interface="asgi3",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                proxy_headers=False,
                server_header=False,
            )
        )
        self._listener, self._questions = listener, questions

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the end. A signal that ended it is raised again."""
        super().run([self._listener] if sockets is None else sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End gracefully."""
        self._questions.end()
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address; port 0 is a free one. Raises OSError naming the flags."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        raise OSError(f"--host {host} --port {port}: {reason}; choose another") from error


def plan_page(host: str, port: int) -> Iterator[tuple[str, str]]:
    """Yield (part, what would be done) for the page. Raises OSError for an address that cannot be had."""
    listen(host, port).close()
    yield "serves", f"a page on {host}, {f'port {port}' if port else 'a free port'}"


def url_of(listener: socket.socket, host: str) -> str:
    """Return the address of the page for a browser."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"


def announcement(listener: socket.socket, host: str) -> Iterator[str]:
    """Return the lines that tell where the page is and who can reach it."""
    yield f"{url_of(listener, host)} (Ctrl-C ends it)"
    if not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        yield "every machine that reaches this one can ask; leave --host out to change that"
