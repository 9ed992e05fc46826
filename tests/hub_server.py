"""As much of the Hugging Face Hub as its client asks for, on loopback: one repo, its files and their hashes, ranges."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = ".safetensors"  # kept in LFS, and so declared by their SHA-256


class Hub:
    def __init__(self, repo: str, folder: Path) -> None:
        self.repo, self.folder = repo, folder
        self.sent: list[str] = []  # names of files whose bytes were asked for
        self.damaged = ""  # this one is sent with one byte changed
        self.missing = ""  # this one answers 500

    def declared(self, file: Path) -> dict[str, Any]:
        content = file.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        fact: dict[str, Any] = {"rfilename": self.name(file), "size": len(content), "blobId": blob}
        if file.suffix == LARGE:
            fact["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
        return fact

    def name(self, file: Path) -> str:
        return str(file.relative_to(self.folder))

    def files(self) -> list[Path]:
        return sorted(file for file in self.folder.rglob("*") if file.is_file())

    def info(self) -> dict[str, Any]:
        return {"id": self.repo, "sha": COMMIT, "siblings": [self.declared(file) for file in self.files()]}

    def tree(self) -> list[dict[str, Any]]:
        facts = [self.declared(file) for file in self.files()]
        return [
            {"type": "file", "path": file["rfilename"], "size": file["size"], "oid": file["blobId"]}
            | (
                {"lfs": {"oid": file["lfs"]["sha256"], "size": file["size"], "pointerSize": 100}}
                if "lfs" in file
                else {}
            )
            for file in facts
        ]


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Gives what HF_ENDPOINT is to be."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{hub.repo}/tree/"):
                return self.send(json.dumps(hub.tree()).encode(), {"Content-Type": "application/json"}, body)
            if path in (f"/api/models/{hub.repo}", *(f"/api/models/{hub.repo}/revision/{r}" for r in ("main", COMMIT))):
                return self.send(json.dumps(hub.info()).encode(), {"Content-Type": "application/json"}, body)
            file = hub.folder / path.removeprefix(f"/{hub.repo}/resolve/{COMMIT}/")
            if not path.startswith(f"/{hub.repo}/resolve/{COMMIT}/") or not file.is_file():
                return self.send(b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, body, 404)
            if body and hub.name(file) == hub.missing:
                return self.send(b"", {}, body, 500)
            content, fact = file.read_bytes(), hub.declared(file)
            if hub.name(file) == hub.damaged:
                content = content[:-1] + bytes([content[-1] ^ 1])
            if body:
                hub.sent.append(hub.name(file))
            etag = fact["lfs"]["sha256"] if "lfs" in fact else fact["blobId"]
            self.send(content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)

        def send(self, content: bytes, headers: dict[str, str], body: bool, status: int = 200) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
