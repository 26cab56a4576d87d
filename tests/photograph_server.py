"""Stand-ins on 127.0.0.1: a photograph host with https under made-up names, and a proxy."""

import contextlib
import select
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

NAMES = ("photographs.test", "other.test", "s3.amazonaws.com")


@dataclass
class Server:
    """A running server: how it answers, and the requests it got."""

    port: int
    answers: dict[str, Callable[["Handler", int], None]] = field(default_factory=dict)
    # path -> function that answers its n-th request, counted from 1
    requests: list[str] = field(default_factory=list)
    # "Host path" of each request
    headers: list[dict[str, str]] = field(default_factory=list)
    # of each request
    num_connections: int = 0
    ending: threading.Event = field(default_factory=threading.Event)
    # set at the end, so that stalled answers end

    def url(self, path: str, name: str = "photographs.test") -> str:
        return f"https://{name}:{self.port}{path}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Server

    def setup(self) -> None:
        super().setup()
        self.served.num_connections += 1

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.served.requests.append(f"{self.headers['Host']} {self.path}")
        self.served.headers.append(dict(self.headers))
        number = sum(request.endswith(f" {self.path}") for request in self.served.requests)
        self.close_connection = True
        self.served.answers[self.path](self, number)

    def answer(self, status: int, body: bytes = b"", **headers: object) -> None:
        """Send a response. Headers such as Content_Length replace the true ones; None leaves a header out."""
        self.send_response(status)
        for key, value in ({"Content_Length": len(body)} | headers).items():
            if value is not None:
                self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = "Content_Length" in headers


def make_certificate(folder: Path) -> Path:
    """Return a PEM file with a key and its self-signed certificate for `NAMES`. Skip the test without openssl."""
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
    """Serve until the block is left."""
    own_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own_context.load_cert_chain(certificate)

    class OneHandler(Handler):
        pass

    class QuietServer(ThreadingHTTPServer):
        def handle_error(self, *arguments: object) -> None:
            pass  # clients that leave early are part of the tests

    http_server = QuietServer(("127.0.0.1", 0), OneHandler)
    # The handshake happens in the handling thread, so that a stalled client holds up no other.
    http_server.socket = own_context.wrap_socket(
        http_server.socket, server_side=True, do_handshake_on_connect=False
    )
    server = Server(http_server.server_address[1])
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


@dataclass
class Proxy:
    """A running proxy that leads every CONNECT to one port of 127.0.0.1, and the request heads it got."""

    port: int
    heads: list[str] = field(default_factory=list)


@contextmanager
def serve_proxy(target_port: int, refusal: str = "") -> Iterator[Proxy]:
    """Run a proxy until the block is left; `refusal` is a status line to answer instead of connecting."""
    listener = socket.create_server(("127.0.0.1", 0))
    proxy = Proxy(listener.getsockname()[1])

    def tunnel(client: socket.socket) -> None:
        with client, contextlib.suppress(ConnectionError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(4096)
            proxy.heads.append(head.decode())
            if refusal:
                client.sendall(f"HTTP/1.1 {refusal}\r\nContent-Length: 0\r\n\r\n".encode())
                return
            with socket.create_connection(("127.0.0.1", target_port)) as target:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                others = {client: target, target: client}
                while True:
                    for ready in select.select(list(others), [], [], 20)[0]:
                        data = ready.recv(65536)
                        if not data:
                            return
                        others[ready].sendall(data)

    def accept() -> None:
        while True:
            try:
                client = listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=tunnel, args=[client], daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield proxy
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
