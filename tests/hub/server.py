"""A small Hub on loopback: repositories, LFS and commits over HTTP, with faults on request."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Kind = Literal["status", "hang", "drop"]
OWNER = "me"
LFS_FROM = 4096  # [bytes] what is larger, and what is binary, goes over LFS
_BINARY = (".safetensors", ".bin", ".png", ".parquet", ".pt", ".pth")
_SHA = "a" * 40


@dataclass
class Fault:
    """What goes wrong with requests whose ``METHOD path`` has ``pattern``, ``times`` times."""

    pattern: str
    kind: Kind = "status"
    status: int = 500
    times: int = 10**9


@dataclass
class Asked:
    """A request that arrived."""

    method: str
    path: str
    body: bytes

    @property
    def payload(self) -> Any:
        return json.loads(self.body)


@dataclass
class Commit:
    """A commit as the Hub took it."""

    repo: str
    message: str
    paths: list[str]


@dataclass
class Hub:
    """What the server has: ``models/me/name`` or ``datasets/me/name`` to its files."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[Commit] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    closing: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def fault(self, asked: str) -> Fault | None:
        for each in self.faults:
            if each.times > 0 and re.search(each.pattern, asked):
                each.times -= 1
                return each
        return None

    def sent(self, pattern: str) -> list[Asked]:
        """The requests whose ``METHOD path`` has a pattern."""
        return [each for each in self.asked if re.search(pattern, f"{each.method} {each.path}")]

    # What it answers ------------------------------------------------------------------------------

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        for pattern, answer in (
            (r"POST /api/repos/create", self._create),
            (r"POST /api/validate-yaml", lambda _: (200, {"errors": [], "warnings": []})),
            (r"POST /api/(models/.+|datasets/.+)/preupload/.+", self._preupload),
            (r"POST /api/(models/.+|datasets/.+)/commit/.+", self._commit),
            (r"POST /(.+)\.git/info/lfs/objects/batch", self._batch),
            (r"PUT /lfs/(\w+)", self._put),
            (r"POST /verify", self._verify),
            (r"GET /api/(models/.+|datasets/.+)", self._info),
        ):
            if match := re.fullmatch(pattern, f"{method} {path.partition('?')[0]}"):
                return answer(*match.groups(), body)
        return 404, {"error": f"unknown: {method} {path}"}

    def _create(self, body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        kind = f"{asked.get('type', 'model')}s"
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        there = f"{kind}/{name}" in self.files
        self.files.setdefault(f"{kind}/{name}", {})
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.private.setdefault(f"{kind}/{name}", private)
        address = f"{self.url}/{name}" if kind == "models" else f"{self.url}/{kind}/{name}"
        return (409 if there else 200), {"url": address, "error": "it is there already"}

    def _info(self, repo: str, _: bytes) -> tuple[int, Any]:
        repo = re.sub(r"/revision/.+", "", repo)
        if repo not in self.files:
            return 404, {"error": "no such repository"}
        name = repo.partition("/")[2]
        return 200, {"id": name, "sha": _SHA, "private": self.private[repo], "siblings": []}

    def _preupload(self, repo: str, body: bytes) -> tuple[int, Any]:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _is_large(file) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return (200, {"files": files}) if repo in self.files else (404, {"error": "not there"})

    def _batch(self, _: str, body: bytes) -> tuple[int, Any]:
        objects: list[dict[str, Any]] = []
        for each in json.loads(body)["objects"]:
            upload = {"href": f"{self.url}/lfs/{each['oid']}?signature=signed-{each['oid']}"}
            actions = {"upload": upload, "verify": {"href": f"{self.url}/verify"}}
            objects.append(each if each["oid"] in self.blobs else each | {"actions": actions})
        return 200, {"transfer": "basic", "objects": objects}

    def _put(self, oid: str, body: bytes) -> tuple[int, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "other bytes than announced"}
        self.blobs[oid] = body
        return 200, {}

    def _verify(self, body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        found = self.blobs.get(asked["oid"])
        return (200 if found is not None and len(found) == asked["size"] else 404), {}

    def _commit(self, repo: str, body: bytes) -> tuple[int, Any]:
        lines = [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.blobs[value["oid"]]
        self.files[repo] |= files
        self.commits.append(Commit(repo, lines[0]["value"]["summary"], sorted(files)))
        address = f"{self.url}/{repo.removeprefix('models/')}/commit/{_SHA}"
        return 200, {"commitUrl": address, "commitOid": _SHA}


def _is_large(file: dict[str, Any]) -> bool:
    return bool(file["size"] > LFS_FROM or file["path"].endswith(_BINARY))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        fault = self.hub.fault(f"{self.command} {self.path}")
        if fault is not None and fault.kind == "drop":
            self.rfile.read(min(64, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            self.connection.close()
            return
        body = self._body()
        self.hub.asked.append(Asked(self.command, self.path, body))
        if given := self.headers.get("Authorization"):
            self.hub.tokens.add(given.removeprefix("Bearer "))
        if fault is not None and fault.kind == "hang":
            self.hub.closing.wait()
            return
        if fault is not None:
            self._reply(fault.status, {"error": "fault"})
        else:
            self._reply(*self.hub.answer(self.command, self.path, body))

    do_GET = do_POST = do_PUT = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _reply(self, status: int, payload: Any) -> None:
        body = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass  # of connections that were cut off


@contextmanager
def serving(*faults: Fault, port: int = 0) -> Iterator[Hub]:
    """A Hub for the duration of a test."""
    hub = Hub(faults=list(faults))
    server = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()


def wait_for(condition: Any, *, limit_s: float = 60.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
