"""A Hugging Face Hub on loopback: the part of its HTTP API that uploads and downloads models."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

RESOLVE = re.compile(r"^/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)$")
MODEL = re.compile(r"^/api/models/(?P<repo>[^/]+/[^/]+)/(?P<verb>[a-z-]+)(/(?P<rev>[^/]+))?(/.*)?$")


class Hub(ThreadingHTTPServer):
    """Repositories by name, each a dict of path -> bytes. `fail` refuses every write."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.tokens: set[str | None] = set()
        self.fail = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo: str, folder: Path) -> None:
        self.repos[repo] = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}

    def commit(self, repo: str) -> str:
        """The commit's id follows from what it holds."""
        digest = hashlib.sha1()
        for name, data in sorted(self.repos[repo].items()):
            digest.update(name.encode() + hashlib.sha1(data).digest())
        return digest.hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, body: object = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code: str = "EntryNotFound") -> None:
        self.answer(404, {"error": code}, X_Error_Code=code)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.tokens.add(self.headers.get("Authorization"))
        if path == "/api/whoami-v2":
            return self.answer(200, {"type": "user", "name": "someone", "orgs": []})
        if match := RESOLVE.match(path):
            files = self.server.repos.get(match["repo"])
            if files is None:
                return self.missing("RepoNotFound")
            if match["path"] not in files:
                return self.missing()
            data = files[match["path"]]
            tag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.answer(200, data, ETag=tag, X_Repo_Commit=self.server.commit(match["repo"]))
        match = MODEL.match(path)
        repo = match["repo"] if match else path.removeprefix("/api/models/")
        if repo not in self.server.repos:
            return self.missing("RepoNotFound")
        files = self.server.repos[repo]
        if match and match["verb"] == "tree":
            rows = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in files.items()
            ]
            return self.answer(200, rows)
        info = {"id": repo, "sha": self.server.commit(repo), "private": False, "tags": []}
        return self.answer(200, {**info, "siblings": [{"rfilename": name} for name in files]})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if self.server.fail:
            return self.answer(403, {"error": "no write access"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            self.server.repos.setdefault(repo, {})
            return self.answer(200, {"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})
        match = MODEL.match(path)
        if not match or match["repo"] not in self.server.repos:
            return self.missing("RepoNotFound")
        repo = match["repo"]
        if match["verb"] == "preupload":
            rows = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": rows})
        if match["verb"] == "paths-info":
            return self.answer(200, [])
        for line in body.splitlines():
            row = json.loads(line)
            if row["key"] == "header":
                self.server.messages.append(row["value"]["summary"])
            elif row["key"] == "file":
                data = base64.b64decode(row["value"]["content"])
                self.server.repos[repo][row["value"]["path"]] = data
        commit = self.server.commit(repo)
        url = f"{self.server.url}/{repo}/commit/{commit}"
        return self.answer(200, {"success": True, "commitUrl": url, "commitOid": commit})


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
