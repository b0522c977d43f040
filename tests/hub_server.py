"""A small Hub over HTTP on loopback: what `huggingface_hub` asks to create, fill and read a model repository.

Answers are in the shapes that the real client reads; weights go through the LFS endpoints. `Hub.trouble` lets a test
break requests: it sees (method, path) and returns a status to answer with, "hang up" to close the connection,
"lose the answer" to do what was asked and then close it, or None.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"  # tokens


@dataclass
class Repo:
    """Files by commit, commits by branch."""

    private: bool = False
    gated: bool = False  # terms that nobody has accepted: its page is there for all, its files for none
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """A new state of a branch; its name is the commit's number, as long as a real one."""
        sha = f"{len(self.commits) + 1:040x}"
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """What a branch or commit holds."""
        return self.commits[self.branches.get(revision, revision)]


class Hub:
    """The server; a context manager that runs it in a thread."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[str] = []  # what the Hub has against the metadata of a card
        self.ignored = ""  # a file name that the repository's .gitignore leaves out
        self.trouble: Callable[[str, str], int | str | None] = lambda method, path: None
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def create(self, name: str, private: bool = False, **files: bytes) -> Repo:
        """A repository with a first commit, as the Hub makes it."""
        repo = self.repos[name] = Repo(private)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"} | files)
        return repo


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub
    mute = False

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.state.requests.append((self.command, path))
        broken = self.state.trouble(self.command, path)
        if broken in ("hang up", "lose the answer"):
            self.mute = True
            if broken == "lose the answer":
                self._route(path, body)
            self.close_connection = True
        elif broken is not None:
            self._send(int(broken), {"error": "out of order"})
        else:
            self._route(path, body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while length := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        if self.mute:
            return
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def _route(self, path: str, body: bytes) -> None:
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            if self._token not in (WRITER, READER):
                return self._refuse(401, "", "Invalid credentials")
            role = {WRITER: "write", READER: "read"}[self._token]
            return self._send(200, {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": role}}})
        if path == "/api/validate-yaml":
            errors = [{"message": fault} for fault in self.state.faults]
            return self._send(400 if errors else 200, {"errors": errors, "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if parts[:2] == ["api", "models"]:
            return self._api("/".join(parts[2:4]), parts[4:], body)
        if parts[0] == "lfs":
            if hashlib.sha256(body).hexdigest() != parts[1]:
                return self._send(400, {"error": "another sha256"})
            self.state.large[parts[1]] = body
            return self._send(200, {})
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if len(parts) > 4 and parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self._refuse(404, "", f"{path} is not an address of this server")

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if self._token != WRITER or wanted.get("organization") not in (None, "me", "us"):
            return self._refuse(403, "", "You don't have the rights to create a model under this namespace")
        if name in self.state.repos:
            return self._send(409, {"error": "You already created this model repo", "url": f"{self.state.url}/{name}"})
        self.state.create(name, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return self._send(200, {"url": f"{self.state.url}/{name}", "name": name})

    def _readable(self, name: str) -> Repo | None:
        repo = self.state.repos.get(name)
        return None if repo is None or (repo.private and not self._token) else repo

    def _api(self, name: str, rest: list[str], body: bytes) -> None:
        repo = self._readable(name)
        if repo is None:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        verb, revision = (rest + ["revision", "main"][len(rest) :])[:2]
        if verb == "branch":
            if revision in repo.branches:
                return self._send(409, {"error": "Reference already exists"})
            repo.branches[revision] = repo.branches["main"]
            return self._send(200, {})
        if revision not in repo.branches and revision not in repo.commits:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.files(revision)
        if verb == "preupload":
            return self._send(200, {"files": [self._mode(file["path"], files) for file in json.loads(body)["files"]]})
        if verb == "commit":
            return self._commit(name, repo, revision, [json.loads(line) for line in body.splitlines()])
        entries = [self._entry(path, content) for path, content in files.items()]
        if verb == "tree":
            return self._send(200, [{"type": "file", "oid": e["blobId"], "path": e["rfilename"], **e} for e in entries])
        sha = repo.branches.get(revision, revision)
        known = {
            "id": name,
            "modelId": name,
            "sha": sha,
            "private": repo.private,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        return self._send(200, known | {"siblings": entries})

    @staticmethod
    def _is_large(path: str) -> bool:
        return path.endswith((".safetensors", ".gguf"))

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": blob}
        if self._is_large(path):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"size": len(content), "sha256": digest, "oid": digest, "pointerSize": 134}
        return entry

    def _mode(self, path: str, files: dict[str, bytes]) -> dict[str, Any]:
        large = self._is_large(path)
        found: dict[str, Any] = {"path": path, "uploadMode": "lfs" if large else "regular"}
        found["shouldIgnore"] = path == self.state.ignored
        if path in files:
            entry = self._entry(path, files[path])
            found["oid"] = entry["lfs"]["oid"] if large else entry["blobId"]
        return found

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for item in wanted["objects"]:
            action = {"upload": {"href": f"{self.state.url}/lfs/{item['oid']}", "header": {}}}
            objects.append(item | ({} if item["oid"] in self.state.large else {"actions": action}))
        self._send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> None:
        files = dict(repo.files(branch))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.state.large:
                    return self._send(400, {"error": f"no such object: {value['path']}"})
                files[value["path"]] = self.state.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(branch, files)
        return self._send(200, {"commitUrl": f"{self.state.url}/{name}/commit/{sha}", "commitOid": sha})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._readable(name)
        if repo is None:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if revision not in repo.branches and revision not in repo.commits:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if repo.gated:
            return self._refuse(403 if self._token else 401, "GatedRepo", f"Access to model {name} is restricted")
        sha, files = repo.branches.get(revision, revision), repo.files(revision)
        if path not in files:
            return self._send(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        entry = self._entry(path, files[path])
        etag = entry.get("lfs", {}).get("oid") or entry["blobId"]
        return self._send(200, files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": sha})
