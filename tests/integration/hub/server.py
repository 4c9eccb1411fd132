"""A server on loopback that speaks the Hub's file endpoints: resolve (HEAD and GET), create, preupload, LFS and commit."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


class HubServer:
    """Repositories: name -> branch or tag -> commit; commit -> file name -> bytes. ``requests``: what was asked for.
    ``broken``: end of a request as "GET .../name" -> what becomes of its connection: "close" before an answer, "reset" in it.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken: dict[str, str] = {}
        self.url = ""

    def commit(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add ``files`` to those of ``branch``; the new commit."""
        names = self.branches.setdefault(repository, {})
        whole = {**self.commits.get(names.get(branch, ""), {}), **files}
        digest = hashlib.sha1(repr(sorted((n, hashlib.sha256(b).hexdigest()) for n, b in whole.items())).encode())
        names[branch] = digest.hexdigest()
        self.commits[names[branch]] = whole
        return names[branch]

    def fetched(self) -> set[str]:
        """The files whose content was sent."""
        return {
            r.split("/resolve/")[1].partition("/")[2] for r in self.requests if r.startswith("GET") and "/resolve/" in r
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def parse_request(self) -> bool:
        how = ""
        if parsed := super().parse_request():
            asked = f"{self.command} {unquote(self.path.partition('?')[0])}"
            command, _, end = next((k for k in self.hub.broken if k.startswith(self.command)), "").partition(" ")
            if command and asked.endswith(end):
                how = self.hub.broken[f"{command} {end}"]
                self.hub.requests.append(asked)
        if how == "reset":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\nhalf")
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if how:
            self.close_connection = True
            self.rfile.close()
            self.connection.close()
        return parsed and not how

    def answer(self, status: int, body: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, content: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(content).encode())

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"{}", X_Error_Code=code, X_Error_Message=code)

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, hub = unquote(self.path.partition("?")[0]), self.hub
        hub.requests.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            private = found[1] in hub.private
            if found[1] not in hub.branches or (private and not self.headers.get("Authorization")):
                return self.refuse(404, "RepoNotFound")
            return self.json({"id": found[1], "private": private})
        if not (found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)):
            return self.refuse(404, "NotHere")
        repository, revision, name = found.groups()
        if repository not in hub.branches or (repository in hub.private and not self.headers.get("Authorization")):
            return self.refuse(404, "RepoNotFound")
        if repository in hub.gated and not self.headers.get("Authorization"):
            return self.refuse(403, "GatedRepo")
        commit = hub.branches[repository].get(revision, revision)
        if commit not in hub.commits:
            return self.refuse(404, "RevisionNotFound")
        if (data := hub.commits[commit].get(name)) is None:
            return self.answer(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.answer(200, data, "application/octet-stream", ETag=etag, X_Repo_Commit=commit, Accept_Ranges="bytes")

    def do_PUT(self) -> None:
        data = self.body()
        self.hub.requests.append(f"PUT {self.path}")
        assert self.path == f"/blobs/{hashlib.sha256(data).hexdigest()}"
        self.hub.blobs[self.path.rpartition("/")[2]] = data
        self.answer(200)

    def do_POST(self) -> None:
        path, data, hub = unquote(self.path.partition("?")[0]), self.body(), self.hub
        hub.requests.append(f"POST {path}")
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != "Bearer hf_tester":
            return self.answer(401, b'{"error": "Invalid credentials"}')
        if path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
            if name in hub.branches:
                return self.json({"url": f"{hub.url}/{name}"}, 409)
            hub.commit(name, {})
            if asked.get("private") or asked.get("visibility") == "private":
                hub.private.add(name)
            return self.json({"url": f"{hub.url}/{name}"})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/blobs/{o['oid']}"}}}
                for o in json.loads(data)["objects"]
            ]
            return self.json({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            names = hub.branches[found[1]]
            names[found[2]] = names["main"]
            return self.json({})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = json.loads(data)["files"]
            modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in files}
            return self.json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            files = {}
            for line in data.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                elif item["key"] == "lfsFile":
                    files[item["value"]["path"]] = hub.blobs[item["value"]["oid"]]
            commit = hub.commit(found[1], files, found[2])
            return self.json(
                {"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{found[1]}/commit/{commit}"}
            )
        return self.refuse(404, "NotHere")


@contextmanager
def serve() -> Iterator[HubServer]:
    """A running server; ``url`` is its HF_ENDPOINT."""
    hub = HubServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
