"""A stand-in for the model hub on 127.0.0.1: enough of its HTTP interface to load models and data sets by name, and to
upload to one model.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Uploads:
    """One model that takes uploads from whoever has the token, and how it behaves."""

    name: str
    token: str
    exists: bool = False
    private: bool = False
    writable: bool = True
    address: str = ""  # of the hub, once it is up
    # What each commit is answered in turn, then "ok": "500" repeats the token, "cut" closes the connection.
    behaviour: list[str] = field(default_factory=list)
    go_on: threading.Event = field(default_factory=threading.Event)  # a "wait" is answered once it is set
    arrived: threading.Event = field(default_factory=threading.Event)  # set when a commit comes in
    # files of so many bytes are sent apart from the commit, as the hub wants LFS files
    large: int | None = None
    large_files: dict[str, int] = field(default_factory=dict)  # SHA-256 -> bytes of what was sent so
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)  # title, files

    def files(self) -> dict[str, bytes]:
        """What the model holds after all commits."""
        held: dict[str, bytes] = {}
        for _, files in self.commits:
            held |= files
        return held

    def answer(self, path: str, token: str, body: bytes) -> tuple[int, dict[str, object]] | None:
        """Status and JSON for a POST; None to close the connection."""
        if path == "api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if token != self.token:
            return 401, {"error": f"Invalid credentials: {token}"}
        if path == "api/repos/create":
            wanted = json.loads(body)
            if f"{wanted['organization']}/{wanted['name']}" != self.name:
                return 403, {"error": "You don't have the rights to create a model under this namespace"}
            if self.exists:
                url = f"{self.address}/{self.name}"
                return 409, {"error": "You already created this model repo", "url": url}
            self.exists, self.private = True, wanted.get("visibility") == "private"
            return 200, {"url": f"{self.address}/{self.name}"}
        if not self.writable:
            return 403, {
                "error": "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"
            }
        if path == f"api/models/{self.name}/preupload/main":
            return 200, {"files": [self.mode(file) for file in json.loads(body)["files"]]}
        if path == f"{self.name}.git/info/lfs/objects/batch":
            wanted = json.loads(body)["objects"]
            actions = [{"upload": {"href": f"{self.address}/large/{file['oid']}"}} for file in wanted]
            objects = [file | {"actions": action} for file, action in zip(wanted, actions, strict=True)]
            return 200, {"transfer": "basic", "objects": objects}
        assert path == f"api/models/{self.name}/commit/main", path
        return self.commit([json.loads(line) for line in body.splitlines()])

    def mode(self, file: dict) -> dict[str, object]:
        mode = "lfs" if self.large is not None and file["size"] >= self.large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def commit(self, lines: list[dict]) -> tuple[int, dict[str, object]] | None:
        behaviour = self.behaviour.pop(0) if self.behaviour else "ok"
        self.arrived.set()
        if behaviour == "500":
            return 500, {"error": f"Internal error for {self.token}"}
        if behaviour == "cut":
            return None
        if behaviour == "wait":
            assert self.go_on.wait(60)
        assert {line["key"] for line in lines} <= {"header", "file", "lfsFile"}
        assert all(line["value"]["oid"] in self.large_files for line in lines if line["key"] == "lfsFile")
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        self.commits.append((lines[0]["value"]["summary"], files))
        return 200, {"commitUrl": f"{self.address}/{self.name}/commit/{COMMIT}", "commitOid": COMMIT}


@contextmanager
def serve(repositories: dict[str, Path], uploads: Uploads | None = None) -> Iterator[tuple[str, list[str]]]:
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
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if uploads is None:
                return self.answer()
            path = unquote(urlsplit(self.path).path).strip("/")
            requests.append(f"{self.command} {path}")
            answer = uploads.answer(path, self.headers.get("Authorization", "").removeprefix("Bearer "), body)
            if answer is None:
                self.close_connection = True
                return self.connection.close()
            self.send(answer[0], json.dumps(answer[1]).encode(), {})

        def do_PUT(self) -> None:
            assert uploads is not None
            digest, left = hashlib.sha256(), int(self.headers["Content-Length"])
            size = left
            while left:
                data = self.rfile.read(min(left, 1 << 20))
                digest.update(data)
                left -= len(data)
            assert self.path == f"/large/{digest.hexdigest()}"
            uploads.large_files[digest.hexdigest()] = size
            self.send(200, b"", {})

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            requests.append(f"{self.command} {path}")
            if uploads is not None and uploads.exists and path == f"api/models/{uploads.name}":
                info = {"id": uploads.name, "sha": COMMIT, "private": uploads.private, "siblings": []}
                return self.send(200, json.dumps(info).encode(), {})
            if uploads is not None and path == "api/whoami-v2":
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                if token != uploads.token:
                    return self.send(401, b"{}", {})
                account = {"name": uploads.name.partition("/")[0], "type": "user", "orgs": []}
                return self.send(200, json.dumps(account).encode(), {})
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
    address = f"http://127.0.0.1:{server.server_address[1]}"
    if uploads is not None:
        uploads.address = address
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield address, requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
