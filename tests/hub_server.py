"""A small server that answers as the hub does, for what huggingface_hub asks of it: repositories in memory, a record of requests."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "1234567890abcdef1234567890abcdef12345678"
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+))?(?:/(.*))?$")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


@dataclass
class Repository:
    files: dict[str, bytes]
    gated: bool = False
    """Its files are for those with the token; others may know that it is there."""
    private: bool = False
    revision: str = "main"
    cut: dict[str, int] = field(default_factory=dict)
    """File -> bytes after which the connection breaks."""


@dataclass
class Hub:
    url: str
    repositories: dict[str, Repository]
    """By name; those of data sets as datasets/owner/name."""
    token: str
    requests: list[str] = field(default_factory=list)
    """Of files' contents, "GET file"; and of all else."""


@contextmanager
def serving(repositories: dict[str, Repository], token: str = "hf_secret") -> Iterator[Hub]:
    """The hub, at `url`, while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = hub = Hub(f"http://127.0.0.1:{server.server_port}", repositories, token)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def log_message(self, *_) -> None:
        pass

    def _answer(self) -> None:
        hub: Hub = self.server.hub
        path = urlsplit(self.path).path
        known = self.headers.get("Authorization") == f"Bearer {hub.token}"
        if match := _FILE.match(path):
            kind, name, revision, file = match[1] or "", match[2], unquote(match[3]), unquote(match[4])
        elif match := _API.match(path):
            kind, name, revision, file = "datasets/" if match[1] == "datasets" else "", match[2], unquote(match[4] or ""), None
        else:
            return self._send(404, b"", {})
        hub.requests.append(f"{self.command} {file or path}")
        repository = hub.repositories.get(kind + name)
        if repository is None or (repository.private and not known):
            # The hub says 401 to those it does not know, so that nobody learns what is there.
            return self._send(404 if known else 401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if revision not in ("", repository.revision, COMMIT):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
        if file is None:
            listing = [_entry(path, content) for path, content in repository.files.items()]
            if match[3] in ("tree", "paths-info"):
                return self._json(listing)
            siblings = [{"rfilename": path} for path in repository.files]
            return self._json({"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "gated": repository.gated, "tags": []})
        if repository.gated and not known:
            message = f"Access to {name} is restricted."
            return self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": message})
        if file not in repository.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        content = repository.files[file]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if match := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            headers["Content-Range"] = f"bytes {match[1]}-{len(content) - 1}/{len(content)}"
            return self._send(206, content[int(match[1]) :], headers)
        return self._send(200, content, headers, repository.cut.get(file))

    def _json(self, value) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


def _entry(path: str, content: bytes) -> dict:
    digest = hashlib.sha256(content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": digest[:40]}
