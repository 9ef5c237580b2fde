"""A Hugging Face Hub on loopback, kept in memory, for tests with the real `huggingface_hub` client.

It speaks what `create_repo`, `upload_folder`, `model_info` and `snapshot_download` ask for models and data sets, which
share their names here: creating a repository, validating the card, preupload (every file is answered "regular"),
commits (ndjson), revisions, the tree and the files. Left out: large-file storage (LFS, Xet), branches other than main,
pull requests, gated repositories, pagination, ranges, folders within the tree, and what the real Hub checks
of a card.

The client reads its settings when it is imported, so a test runs its story with the Hub `in_own_process`.
"""

import hashlib
import inspect
import json
import os
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit


class RefusalError(Exception):
    """`RefusalError(status, error_code)` ends a request; the client derives its own error from both."""


@dataclass
class Commit:
    message: str
    files: dict[str, bytes]  # the whole tree after this commit
    oid: str  # 40 hexadecimal digits


@dataclass
class Hub:
    url: str
    token: str | None = None  # where given, writing needs it, and a request that carries another one is refused
    repos: dict[str, list[Commit]] = field(default_factory=dict)  # oldest first; a new one holds an initial commit
    fail_commits: list[int | None] = field(default_factory=list)  # statuses for the next commits; None accepts one
    private: set[str] = field(default_factory=set)  # repositories that only the token may read
    requests: list[str] = field(default_factory=list)  # "METHOD /path", in the order of arrival

    def create(self, request: dict) -> dict:
        """The answer to a wish for a repository, which may be there already."""
        repo = f"{request['organization'] or 'user'}/{request['name']}"
        status = 409 if repo in self.repos else 200
        if status == 200:
            self.repos[repo] = []
            if request.get("private") or request.get("visibility") == "private":  # as older clients say it, and newer
                self.private.add(repo)
            self.add_commit(repo, "initial commit", {".gitattributes": b""})
        kind = "datasets/" if request.get("type") == "dataset" else ""
        return {"status": status, "url": f"{self.url}/{kind}{repo}"}

    def find(self, repo: str, revision: str = "main") -> Commit:
        """The commit that "main" or an oid names."""
        if repo not in self.repos:
            raise RefusalError(404, "RepoNotFound")
        commits = self.repos[repo]
        found = commits[-1:] if revision == "main" else [commit for commit in commits if commit.oid == revision]
        if not found:
            raise RefusalError(404, "RevisionNotFound")
        return found[0]

    def add_commit(self, repo: str, message: str, changes: dict[str, bytes], deleted: Collection[str] = ()) -> Commit:
        """A commit on main: the files of the last one with these added or replaced, and those deleted."""
        commits = self.repos[repo]
        parent = commits[-1] if commits else Commit("", {}, "")
        files = {path: content for path, content in parent.files.items() if path not in deleted} | changes
        blobs = {path: blob_oid(content) for path, content in files.items()}
        oid = hashlib.sha1(json.dumps([parent.oid, message, blobs]).encode()).hexdigest()
        commits.append(Commit(message, files, oid))
        return commits[-1]


def blob_oid(content: bytes) -> str:
    """git's name of a file's content, by which the client finds what it need not send again."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self.serve()

    def do_HEAD(self) -> None:
        self.serve()

    def do_POST(self) -> None:
        self.serve()

    def log_message(self, *_) -> None:
        """No line per request on stderr."""

    def serve(self) -> None:
        """Answer one request; the body is read first, for a refusal must not cut off who is still sending."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(f"{self.command} {self.path}")
        path = urlsplit(self.path).path.strip("/").split("/")
        try:
            self.check_token()
            if path[0] == "api":
                answer = self.api([unquote(part) for part in path[1:]], body)
                self.send(answer.pop("status", 200) if isinstance(answer, dict) else 200, json.dumps(answer).encode())
            else:  # owner/name/resolve/revision/file, after "datasets" for a data set
                path = path[1:] if path[0] == "datasets" else path
                commit = self.hub.find("/".join(path[:2]), unquote(path[3]))
                file = unquote("/".join(path[4:]))
                if file not in commit.files:
                    raise RefusalError(404, "EntryNotFound")
                content = commit.files[file]
                self.send(200, content, {"ETag": f'"{blob_oid(content)}"', "X-Repo-Commit": commit.oid})
        except RefusalError as refusal:
            status, code = refusal.args
            self.send(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code, "X-Error-Message": code})

    def check_token(self) -> None:
        given = self.headers.get("Authorization")
        needed = self.command == "POST" or any(f"/{repo}/" in f"{self.path}/" for repo in self.hub.private)
        if self.hub.token and given != f"Bearer {self.hub.token}" and (given or needed):
            raise RefusalError(401, "Unauthorized")

    def api(self, path: list[str], body: bytes) -> dict | list:
        """What /api/... answers: JSON, with the HTTP status under "status" where it is not 200."""
        hub = self.hub
        if path == ["repos", "create"]:
            return hub.create(json.loads(body))
        if path == ["validate-yaml"]:
            return {"errors": [], "warnings": []}
        repo, action, revision = "/".join(path[1:3]), (path[3:] or ["revision"])[0], (path[4:] or ["main"])[0]
        commit = hub.find(repo, revision)
        if action == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [preupload_entry(path, commit) for path in paths]}
        if action == "commit":
            if hub.fail_commits and (status := hub.fail_commits.pop(0)):
                raise RefusalError(status, "ToldToFail")
            lines = [json.loads(line) for line in body.splitlines()]
            changes = {line["value"]["path"]: line["value"] for line in lines if line["key"] == "file"}
            contents = {path: b64decode(file["content"]) for path, file in changes.items()}
            deleted = {line["value"]["path"] for line in lines if line["key"] == "deletedFile"}
            added = hub.add_commit(repo, lines[0]["value"]["summary"], contents, deleted)
            return {"success": True, "commitOid": added.oid, "commitUrl": f"{hub.url}/{repo}/commit/{added.oid}"}
        if action == "tree":
            return [
                {"type": "file", "path": path, "size": len(content), "oid": blob_oid(content)}
                for path, content in commit.files.items()
            ]
        if action == "revision":
            siblings = [{"rfilename": path} for path in commit.files]
            return {"id": repo, "sha": commit.oid, "private": False, "tags": [], "siblings": siblings}
        raise RefusalError(404, f"no {action!r} here")

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def preupload_entry(path: str, commit: Commit) -> dict:
    """How to send one file, and the content that the repository has under its name now."""
    oid = blob_oid(commit.files[path]) if path in commit.files else None
    return {"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": oid}


@contextmanager
def serve_hub(token: str | None = None) -> Iterator[Hub]:
    """A Hub that listens on 127.0.0.1 inside the block, on a port that the system chooses."""
    hub = Hub(url="", token=token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def in_own_process(story: Callable, folder: Path, url: str, offline: str = "0", token: str | None = None) -> Any:
    """What `story()` returns, JSON, in a fresh Python whose client is set as given, whatever is set outside.

    `story` is a function of a test module beside this one; it runs in `folder`, where its cache is too.
    """
    tests = Path(__file__).resolve().parent
    settings = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    settings |= {"HF_ENDPOINT": url, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": offline}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    settings |= {"HF_TOKEN": token} if token else {}
    settings["PYTHONPATH"] = os.pathsep.join([str(tests), os.environ["PYTHONPATH"]])  # see conftest.py
    module = Path(inspect.getfile(story)).stem
    code = f"import json, {module}; print(json.dumps({module}.{story.__name__}()))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, env=settings, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def error_of(action: Callable[[], Any]) -> str:
    """`class: message` of what the action raises."""
    try:
        action()
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).strip()}"
    return "nothing was raised"
