"""A stand-in for a photograph host: https on 127.0.0.1 under made-up names, as good or as bad as a test wants it."""

import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

NAMES = ("photographs.test", "other.test", "private.test", "mixed.test", "s3.amazonaws.com")


@dataclass
class Server:
    """A running server: what it was asked, and how it answers."""

    port: int
    context: ssl.SSLContext
    # which trusts the server's certificate
    answers: dict[str, Callable[["Handler", int], None]] = field(default_factory=dict)
    # path -> what answers its n-th request, from 1
    requests: list[str] = field(default_factory=list)
    # "Host path", in the order they came
    ending: threading.Event = field(default_factory=threading.Event)
    # what stalls waits for it

    def url(self, path: str, name: str = "photographs.test") -> str:
        return f"https://{name}:{self.port}{path}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Server

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.served.requests.append(f"{self.headers['Host']} {self.path}")
        number = sum(request.endswith(f" {self.path}") for request in self.served.requests)
        self.served.answers[self.path](self, number)
        self.close_connection = True

    def answer(self, status: int, body: bytes = b"", **headers: object) -> None:
        """Content_Length and the like take the place of what is true; None leaves the header out."""
        self.send_response(status)
        for key, value in ({"Content_Length": len(body)} | headers).items():
            if value is not None:
                self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)


def make_certificate(folder: Path) -> Path:
    """A key and its self-signed certificate for `NAMES`, in one PEM file; skips the test where openssl is missing."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the openssl command is missing, which makes the test server's certificate")
    key, certificate, both = folder / "key.pem", folder / "certificate.pem", folder / "both.pem"
    names = ",".join(f"DNS:{name}" for name in NAMES)
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    command += ["-addext", f"subjectAltName={names}", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    both.write_text(key.read_text() + certificate.read_text())
    return both


@contextmanager
def serve(certificate: Path) -> Iterator[Server]:
    """Serves until the block is left."""
    own_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own_context.load_cert_chain(certificate)

    class OneHandler(Handler):
        pass

    class QuietServer(ThreadingHTTPServer):
        def handle_error(self, *arguments: object) -> None:
            pass  # clients that leave early are what is tested

    http_server = QuietServer(("127.0.0.1", 0), OneHandler)
    # The handshake is the handling thread's, so that a client that stalls holds up no other.
    http_server.socket = own_context.wrap_socket(
        http_server.socket, server_side=True, do_handshake_on_connect=False
    )
    server = Server(http_server.server_address[1], ssl.create_default_context(cafile=str(certificate)))
    OneHandler.served = server
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ending.set()
        http_server.shutdown()
        http_server.server_close()
        thread.join()
