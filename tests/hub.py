"""A stand-in for the model hub on 127.0.0.1: enough of its HTTP interface to load models and data sets by name."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serves folders as repositories ("user/name", or "datasets/user/name"); gives its address and the requests."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            requests.append(f"{self.command} {path}")
            for name, folder in repositories.items():
                api = f"api/{name}" if name.startswith("datasets/") else f"api/models/{name}"
                if path.startswith(f"{name}/resolve/"):
                    return self.file(folder / path.removeprefix(f"{name}/resolve/").split("/", 1)[1])
                if path == api or path.startswith(f"{api}/"):
                    return self.describe(name, folder, path.removeprefix(api).strip("/"))
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def file(self, path: Path) -> None:
            if not path.is_file():
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            data = path.read_bytes()
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            return self.send(200, data, {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

        def describe(self, name: str, folder: Path, rest: str) -> None:
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            names = [str(p.relative_to(folder)) for p in files]
            if rest.startswith("tree"):
                under = rest.split("/", 2)[2] if rest.count("/") > 1 else ""
                rows = [
                    {
                        "type": "file",
                        "path": n,
                        "size": p.stat().st_size,
                        "oid": hashlib.sha1(n.encode()).hexdigest(),
                    }
                    for n, p in zip(names, files, strict=True)
                    if n.startswith(under)
                ]
                return self.send(200, json.dumps(rows).encode(), {})
            if rest.startswith("paths-info"):
                return self.send(200, b"[]", {})
            info = {
                "id": name,
                "sha": COMMIT,
                "siblings": [{"rfilename": n} for n in names],
                "private": False,
            }
            info |= {"tags": [], "gated": False, "disabled": False, "downloads": 0, "likes": 0}
            return self.send(200, json.dumps(info).encode(), {})

        def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
