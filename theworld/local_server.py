"""Python's own HTTP server around a function, for a page on this machine.

    GET  /            the page, and its files
    POST /ask         {"photograph": base64 of a file, "statements": ["...", ...]}  ->  {"answers": [...]}
                      or {"error": "..."} with a status of 400 and above

It is for the person at this machine. It opens no file, whatever a client says; a request under another host's name is
refused, since a page elsewhere could have had its name point here (DNS rebinding), and so is one that another page
sends. One request is answered at a time.
"""

import contextlib
import ipaddress
import json
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from theworld.questions import Limits

WAITING = 4  # requests that may be in memory at a time, one of them in work
PATIENCE = 60.0  # seconds without a byte of a request, after which it is dropped
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
Answers = list[dict[str, Any]]
Answer = Callable[[np.ndarray, list[str]], Answers]  # of pixels uint8[H, W, 3] and statements


class Refusal(Exception):
    """A request that is not answered: the status, and why in words."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Server(ThreadingHTTPServer):
    """Serves the page at `url` once `serve_forever` is called."""

    daemon_threads = False  # a thread that Python leaves behind in torch's code aborts the process

    def __init__(
        self,
        answer: Answer,
        files: Mapping[str, tuple[str, bytes]],
        host: str = "127.0.0.1",
        port: int = 0,
        limits: Limits | None = None,
    ) -> None:
        """`files`: (media type, content) by path. `port` 0: a free one. Raises OSError for an address that cannot be
        had."""
        self.answer, self.files, self.host, self.limits = answer, files, host, limits or Limits()
        self.slots = threading.BoundedSemaphore(WAITING)
        self.one_at_a_time = threading.Lock()
        self.ending = False
        self.connections: set[Any] = set()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise OSError(f"--host {host} --port {port}: {error.strerror}; choose another") from error

    def process_request(self, request: Any, client_address: Any) -> None:
        """Gives a connection a thread of its own."""
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Ends a connection."""
        self.connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Takes no more questions, and waits for the answer in work. What a client still sends is not waited for."""
        self.ending = True
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # it has gone by itself
                connection.shutdown(socket.SHUT_RD)
        super().server_close()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.server_address[1]}/"

    def knows(self, host: str) -> bool:
        """Whether a Host header can be ours: localhost, the name that it was told, or an address in numbers, which
        nobody can have pointed here."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if name.lower() in ("localhost", self.host.lower()):
            return name != ""
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a client that went away."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    server_version, sys_version = "TheWorld", ""
    timeout = PATIENCE

    def do_GET(self) -> None:
        """The page and its two files."""
        try:
            self._check_sender()
            if self.path not in self.server.files:
                raise Refusal(HTTPStatus.NOT_FOUND, "there is nothing here but the page, /")
        except Refusal as refusal:
            self._send_json(refusal.status, {"error": str(refusal)})
        else:
            self._send(HTTPStatus.OK, *self.server.files[self.path])

    def do_POST(self) -> None:
        """Answers, or why there are none."""
        try:
            status, reply = HTTPStatus.OK, {"answers": self._answers()}
        except Refusal as refusal:
            self._send_json(refusal.status, {"error": str(refusal)})
            self._read_on()
            return
        except (ConnectionError, TimeoutError):  # the client has gone, or never went on
            raise
        except ValueError as error:
            status, reply = HTTPStatus.BAD_REQUEST, {"error": str(error)}  # type: ignore[dict-item]
        except Exception as error:  # noqa: BLE001 - such as a GPU without room: said here and there, and it goes on
            traceback.print_exc()
            says = f"this failed ({type(error).__name__}); the terminal of tools/ask.py shows why"
            status, reply = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": says}  # type: ignore[dict-item]
        self._send_json(status, reply)

    def _answers(self) -> Answers:
        """Refusal before the request's body is read, ValueError after."""
        self._check_sender()
        if self.path != "/ask":
            raise Refusal(HTTPStatus.NOT_FOUND, "questions go to /ask")
        length = self._length()
        if not self.server.slots.acquire(blocking=False):
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "others are waiting for answers; try again")
        try:
            pixels, statements = self.server.limits.read(self.rfile.read(length))
            with self.server.one_at_a_time:
                if self.server.ending:
                    raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "this page is ending")
                return self.server.answer(pixels, statements)
        finally:
            self.server.slots.release()

    def _check_sender(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not self.server.knows(hosts[0]):
            raise Refusal(HTTPStatus.FORBIDDEN, f"this is not {', '.join(hosts) or 'a host without a name'}")
        origin = self.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != hosts[0]:
            raise Refusal(HTTPStatus.FORBIDDEN, "another page may not ask here")

    def _length(self) -> int:
        """Bytes of the body, which is JSON and not too large."""
        kind = self.headers.get_content_type()
        if kind != "application/json":  # which no form of another page can send
            raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"{kind}: wanted application/json")
        given = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,18}", given):
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "wanted a Content-Length in bytes")
        if int(given) > self.server.limits.max_body:
            says = f"a photograph may have {self.server.limits.max_bytes:,} bytes; this is larger"
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, says)
        return int(given)

    def _read_on(self) -> None:
        """Reads what a refused client still sends, within limits: it would be cut off before it reads why."""
        given = self.headers.get("Content-Length", "")
        left = min(int(given), self.server.limits.max_body) if re.fullmatch("[0-9]{1,18}", given) else 0
        while left > 0 and (data := self.rfile.read(min(left, 1 << 16))):
            left -= len(data)

    def _send_json(self, status: HTTPStatus, reply: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(reply).encode("utf-8"))

    def _send(self, status: HTTPStatus, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a terminal has better uses."""
