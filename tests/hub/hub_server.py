# SPDX-License-Identifier: Apache-2.0
"""A small imitation of the Hugging Face hub on this machine: one repository, real HTTP, faults on demand.

It answers `/api/models/OWNER/NAME[/revision/REV]` and `/OWNER/NAME/resolve/COMMIT/FILE` with the statuses, headers and
JSON of the hub, ranges included. `faults` maps a file's name (or "api") to what goes wrong.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from contextlib import contextmanager

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 1000  # bytes from which a file is kept outside git, with a SHA-256


class Repository:
    """What the server serves, and what it was asked."""

    def __init__(self, files: dict[str, bytes], name: str = "google/gemma-3-1b-it"):
        self.files, self.name, self.commit = dict(files), name, COMMIT
        self.gated = False  # a token is needed; "good" is one that has accepted the licence, "new" one that has not
        self.faults: dict[str, object] = {}
        self.listed: list[str] | None = None  # names that the API claims, if they are not those of `files`
        self.hashes: dict[str, str] = {}  # wrong SHA-256 by name
        self.asked: list[tuple[str, str, str]] = []  # method, path, Range
        self.tokens: set[str] = set()

    def info(self) -> dict:
        siblings = []
        for name in self.files if self.listed is None else self.listed:
            data = self.files.get(name, b"absent")
            entry = dict(
                rfilename=name, size=len(data), blobId=hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            )
            if len(data) >= LARGE:
                digest = self.hashes.get(name, hashlib.sha256(data).hexdigest())
                entry["lfs"] = dict(size=len(data), sha256=digest, pointerSize=134)
            siblings.append(entry)
        return dict(
            _id="1", id=self.name, modelId=self.name, sha=self.commit, private=False, siblings=siblings, tags=[]
        )


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repository: Repository

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        repo, path = self.repository, urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        repo.asked.append((self.command, path, self.headers.get("Range", "")))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        repo.tokens.add(token)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        if found is None or found[1] != repo.name:
            return self._error(404 if token else 401, "RepoNotFound", "Repository not found")
        if token and token not in ("good", "new"):
            return self._error(401, None, "Invalid credentials in Authorization header")
        if repo.gated and token != "good":
            return self._error(403 if token else 401, "GatedRepo", "Access to model is restricted")
        if found[2] not in (None, "main", "v1", repo.commit):
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        fault = repo.faults.get("api" if api else file[3])
        if isinstance(fault, list):
            fault = fault.pop(0) if fault else None
        if isinstance(fault, int):
            return self._error(fault, None, "fault", {"Retry-After": "7"} if fault == 429 else {})
        if api:
            return self._send(200, json.dumps(repo.info()).encode(), {"Content-Type": "application/json"}, body)
        if file[3] not in repo.files:
            return self._error(404, "EntryNotFound", "Entry not found")
        return self._file(repo.files[file[3]], fault, body)

    def _file(self, data: bytes, fault, body: bool) -> None:
        start, status, headers = 0, 200, {"X-Repo-Commit": self.repository.commit, "ETag": '"x"'}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and fault != "no ranges":
            start, status = int(wanted[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        part = data[start:]
        if fault == "damaged":
            part = bytes([part[0] ^ 1]) + part[1:]
        if fault == "too much":
            part += b"more"
        if fault == "too little":  # says so, too: the client's own check of the length must see it
            part = part[:-1]
        if isinstance(fault, tuple):  # ("cut", n): announces everything, sends n bytes, and hangs up
            self._send(status, part, headers, body, sent=fault[1])
            self.close_connection = True
            return
        self._send(status, part, headers, body)

    def _send(self, status, data, headers, body, sent=None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data if sent is None else data[:sent])

    def _error(self, status, code, message, headers=()) -> None:
        named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | dict(headers)
        self._send(status, json.dumps({"error": message}).encode(), named | {"Content-Type": "application/json"}, True)


@contextmanager
def serving(repository: Repository):
    """Runs the server; gives its address."""
    handler = type("Handler", (_Handler,), {"repository": repository})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
