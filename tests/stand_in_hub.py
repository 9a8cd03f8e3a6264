"""A stand-in for the Hugging Face Hub on loopback, for the unmodified ``huggingface_hub`` client.

It speaks the protocol of pushing (repositories, branches, preupload, large files, commits, pull
requests) and of loading (model information, trees, resolve with its redirect to another host), and
keeps everything in memory. `StandInHub.fault` makes any step go wrong. The pages that a browser
would see, xet storage, datasets and spaces are not here.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

from stand_in_store import Blob, Store, as_blob, is_large

TOKENS = {
    "hf_StandInWriteTokenOfAda00": ("ada", "write"),
    "hf_StandInWriteTokenOfBob00": ("bob", "write"),
    "hf_StandInReadTokenOfAda000": ("ada", "read"),
}
ADA, BOB, ADA_READS = TOKENS
PAGE = 3  # commits on a page of the history: small, so that reading on is tried too

_REPO = r"(?P<repo>[^/]+/[^/]+)"
# step -> method, path. The steps are the client's; a fault is injected at one of them.
STEPS = {
    "whoami": ("GET", r"/api/whoami-v2"),
    "create": ("POST", r"/api/repos/create"),
    "validate": ("POST", r"/api/validate-yaml"),
    "info": ("GET", rf"/api/models/{_REPO}(/revision/(?P<rev>[^/]+))?"),
    "tree": ("GET", rf"/api/models/{_REPO}/tree/(?P<rev>[^/]+)"),
    "commits": ("GET", rf"/api/models/{_REPO}/commits/(?P<rev>[^/]+)"),
    "refs": ("GET", rf"/api/models/{_REPO}/refs"),
    "discussions": ("GET", rf"/api/models/{_REPO}/discussions"),
    "branch": ("POST", rf"/api/models/{_REPO}/branch/(?P<rev>[^/]+)"),
    "preupload": ("POST", rf"/api/models/{_REPO}/preupload/(?P<rev>[^/]+)"),
    "batch": ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch"),
    "upload": ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})"),
    "verify": ("POST", rf"/{_REPO}\.git/info/lfs/verify"),
    "commit": ("POST", rf"/api/models/{_REPO}/commit/(?P<rev>[^/]+)"),
    "head": ("HEAD", rf"/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)"),
    "file": ("GET", rf"/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)"),
    "storage": ("GET", r"/storage/(?P<oid>[0-9a-f]{64})"),
}
_ROUTES = [(step, method, re.compile(path + "$")) for step, (method, path) in STEPS.items()]


@dataclasses.dataclass
class Fault:
    """What goes wrong.

    kind is a status (401, 503, ...) or: ``cut``, the connection ends before the answer and without
    effect; ``lost``, the request takes effect and the connection ends before the answer; ``short``,
    half a body under a length that says so; ``broken``, half a body under the full length;
    ``corrupt``, one byte of the body changed; ``slow``, the answer comes ``seconds`` late.
    """

    kind: int | str
    times: int = 10**9
    retry_after: int | None = None
    seconds: float = 0.0
    match: str = ""  # only requests whose path holds this
    hits: int = 0


class RefusedError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "", **more):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **more}
        self.headers = {"X-Error-Code": code} if code else {}


class StandInHub:
    """``with StandInHub() as hub``: serves at ``hub.url`` until the block ends."""

    def __init__(self):
        self.store = Store()
        self.requests: list[tuple[str, str]] = []  # (step, path), in order
        self.leaks: list[str] = []  # requests that took the token to another host
        self._faults: dict[str, list[Fault]] = {}
        self._meanwhile: dict[str, Callable] = {}

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.other_host = f"http://localhost:{port}"  # large files come from a host of their own
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fault(self, step: str, kind: int | str, **settings) -> Fault:
        """From now on ``step`` goes wrong, ``times`` times."""
        assert step in STEPS, step
        fault = Fault(kind, **settings)
        self._faults.setdefault(step, []).append(fault)
        return fault

    def meanwhile(self, step: str, action: Callable[[], object]) -> None:
        """The next time, before ``step`` takes effect, somebody else does ``action``."""
        self._meanwhile[step] = action

    def heal(self) -> None:
        """Forget the faults, the record of requests, and uploads that no commit took."""
        self._faults.clear()
        self._meanwhile.clear()
        self.store.large.clear()
        self.requests.clear()

    def take_fault(self, step: str, path: str) -> Fault | None:
        with self.store.lock:
            for fault in self._faults.get(step, []):
                if fault.hits < fault.times and fault.match in path:
                    fault.hits += 1
                    return fault
        return None

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision; empty where there is no such repository."""
        found = self.store.repos.get(repo)
        commit = found.resolve(revision) if found else None
        return {p: b.content for p, b in commit.files.items()} if commit else {}

    def titles(self, repo: str, revision: str = "main") -> list[str]:
        """Titles of the commits, newest first."""
        found = self.store.repos.get(repo)
        return [commit.title for commit in found.history(revision)] if found else []

    def count(self, step: str) -> int:
        return sum(1 for name, _ in self.requests if name == step)


def _handler(hub: StandInHub) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    return Handler


class _Handler(BaseHTTPRequestHandler):
    """One connection. Each step is a method named after it that returns the JSON of its answer."""

    hub: StandInHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, *args):
        pass

    def handle_one_request(self):
        with contextlib.suppress(ConnectionError):  # the client may leave when it likes
            super().handle_one_request()
            return
        self.close_connection = True

    def _answer(self):
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        matches = (  # before unquoting: a revision may hold a slash
            (step, found)
            for step, method, route in _ROUTES
            if method == self.command and (found := route.match(url.path))
        )
        step, found = next(matches, (None, None))
        if step is None:
            self._json(404, {"error": f"no such page: {self.command} {url.path}"})
            return
        parts = {name: unquote(value or "") for name, value in found.groupdict().items()}
        self.hub.requests.append((step, url.path))
        self.fault = self.hub.take_fault(step, url.path)
        kind = self.fault.kind if self.fault else None
        self.hub._meanwhile.pop(step, lambda: None)()
        if kind == "slow":
            time.sleep(self.fault.seconds)
        if kind == "cut":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            return
        self.body = self._read_body()
        if isinstance(kind, int):
            self._fail(kind)
            return
        try:
            user = self._user() if step not in ("upload", "storage") else self._stranger()
            with self.hub.store.lock:
                answer = getattr(self, "_" + step)(user, **parts)
        except RefusedError as refused:
            self._json(refused.status, refused.body, refused.headers)
            return
        if kind == "lost":
            self.close_connection = True
            return
        if answer is not None:
            self._json(200, answer)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _fail(self, status: int):
        """A failure as the Hub words it; it repeats the caller's token, as no server should."""
        said = {401: "Invalid credentials in Authorization header", 404: "Repository not found"}
        text = said.get(status, f"the stand-in was told to answer {status}")
        body = {"error": f"{text} (got {self.headers.get('Authorization')})"}
        headers = {"X-Error-Message": said[401]} if status == 401 else {}
        if status == 404:
            headers["X-Error-Code"] = "RepoNotFound"
        if self.fault.retry_after is not None:
            headers["Retry-After"] = str(self.fault.retry_after)
        self._json(status, body, headers)

    def _json(self, status: int, content, headers=None):
        self._send(status, json.dumps(content).encode(), headers)

    def _send(self, status: int, content: bytes, headers=None):
        sent, length = content, len(content)
        kind = self.fault.kind if getattr(self, "fault", None) else None
        if kind == "corrupt":
            middle = length // 2
            sent = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        elif kind in ("short", "broken"):
            sent = content[: length // 2]
            length = len(sent) if kind == "short" else length
            self.close_connection = kind == "broken"
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": length, **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)

    # Who asks, and for what

    def _user(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return None
        if token not in TOKENS:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        self.role = TOKENS[token][1]
        return TOKENS[token][0]

    def _stranger(self) -> None:
        if self.headers.get("Authorization"):
            self.hub.leaks.append(self.path)

    def _repo(self, user, name):
        repo = self.hub.store.repos.get(name)
        if repo is None or (repo.private and user != name.partition("/")[0]):
            raise RefusedError(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _may_write(self, user, name):
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        if user != name.partition("/")[0] or self.role != "write":
            raise RefusedError(403, "You don't have the rights to do this")

    def _commit_of(self, user, name, revision):
        commit = self._repo(user, name).resolve(revision or "main")
        if commit is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # The steps of a push

    def _whoami(self, user):
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        return {"type": "user", "name": user, "auth": {"accessToken": {"role": self.role}}}

    def _create(self, user):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or user}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        self._may_write(user, name)
        if name in self.hub.store.repos:
            raise RefusedError(409, "You already created this model repo", url=url)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.store.create(name, bool(private))
        return {"url": url, "name": name, "id": name}

    def _validate(self, user):
        text = json.loads(self.body)["content"]
        if not text.startswith("---\n"):
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]}
        return {"errors": [], "warnings": []}

    def _branch(self, user, repo, rev):
        self._may_write(user, repo)
        found = self._repo(user, repo)
        if rev in found.refs:
            raise RefusedError(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        found.refs[rev] = self._commit_of(user, repo, start).oid
        return {}

    def _preupload(self, user, repo, rev):
        commit = self._commit_of(user, repo, rev)
        if not self.query.get("create_pr"):
            self._may_write(user, repo)
        files = []
        for file in json.loads(self.body)["files"]:
            there = commit.files.get(file["path"])
            large = is_large(file["path"], file["size"])
            entry = {"path": file["path"], "uploadMode": "lfs" if large else "regular"}
            entry |= {"shouldIgnore": False}
            if there:
                entry["oid"] = there.sha256 if there.large else there.oid
            files.append(entry)
        return {"files": files, "commitOid": commit.oid}

    def _batch(self, user, repo):
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        self._repo(user, repo)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.store.large:
                href = f"{self.hub.other_host}/storage/{wanted['oid']}?signature=x"
                verify = f"{self.hub.url}/{repo}.git/info/lfs/verify"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": verify}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def _upload(self, user, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusedError(400, "XAmzContentSHA256Mismatch")
        self.hub.store.large[oid] = self.body
        return {}

    def _verify(self, user, repo):
        asked = json.loads(self.body)
        if len(self.hub.store.large.get(asked["oid"], b"")) != asked["size"]:
            raise RefusedError(404, "Object not found")
        return {}

    def _commit(self, user, repo, rev):
        found = self._repo(user, repo)
        head = self._commit_of(user, repo, rev)
        pull_request = bool(self.query.get("create_pr"))
        if not pull_request:
            self._may_write(user, repo)
            if rev not in found.refs:
                raise RefusedError(400, "a commit needs a branch")
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", head.oid) != head.oid:
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        changes = dict(self._change(line["key"], line["value"]) for line in lines[1:])
        ref = found.open_pull_request() if pull_request else rev
        commit = found.add(ref, changes, header["summary"], header["description"], user)
        answer = {"success": True, "commitOid": commit.oid, "hookOutput": ""}
        answer["commitUrl"] = f"{self.hub.url}/{repo}/commit/{commit.oid}"
        if pull_request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{ref.split('/')[-1]}"
        return answer

    def _change(self, key, value) -> tuple[str, Blob | None]:
        path = value["path"]
        if key == "file":
            return path, as_blob(path, base64.b64decode(value["content"]))
        if key == "lfsFile":
            if value["oid"] not in self.hub.store.large:
                raise RefusedError(400, f"LFS pointer pointed to a missing object: {path}")
            return path, Blob(self.hub.store.large[value["oid"]], large=True)
        assert key == "deletedFile", key
        return path, None

    # The steps of a look and of a load

    def _info(self, user, repo, rev=""):
        commit, found = self._commit_of(user, repo, rev), self._repo(user, repo)
        siblings = [{"rfilename": path} for path in commit.files]
        about = {"_id": repo, "id": repo, "modelId": repo, "sha": commit.oid, "tags": []}
        return about | {"private": found.private, "gated": False, "siblings": siblings}

    def _tree(self, user, repo, rev):
        entries = []
        for path, blob in self._commit_of(user, repo, rev).files.items():
            size = len(blob.content)
            entry = {"type": "file", "path": path, "oid": blob.oid, "size": size}
            if blob.large:
                entry["lfs"] = {"oid": blob.sha256, "size": size, "pointerSize": 134}
            entries.append(entry)
        return entries

    def _commits(self, user, repo, rev):
        self._commit_of(user, repo, rev)
        history = self._repo(user, repo).history(rev)
        page = int(self.query.get("p", 0))
        shown = history[page * PAGE : (page + 1) * PAGE]
        date = "2025-01-01T00:00:00.000Z"
        items = [
            {"id": c.oid, "title": c.title, "message": c.message, "date": date}
            | {"authors": [{"user": c.user}]}
            for c in shown
        ]
        if len(history) <= (page + 1) * PAGE:
            return items
        following = f"{self.hub.url}{urlsplit(self.path).path}?p={page + 1}"
        self._json(200, items, {"Link": f'<{following}>; rel="next"'})
        return None

    def _refs(self, user, repo):
        found = self._repo(user, repo)
        refs = [
            {"name": name.removeprefix("refs/"), "ref": name, "targetCommit": oid}
            for name, oid in found.refs.items()
        ]
        mine = [ref for ref in refs if ref["ref"].startswith("refs/pr/")]
        rest = [{**r, "ref": f"refs/heads/{r['name']}"} for r in refs if r not in mine]
        answer = {"branches": rest, "converts": [], "tags": []}
        return answer | ({"pullRequests": mine} if self.query.get("include_prs") else {})

    def _discussions(self, user, repo):
        wanted = self.query.get("status")
        shown = [
            {"num": number, "title": f"#{number}", "status": status, "isPullRequest": True}
            | {"createdAt": "2025-01-01T00:00:00.000Z", "repo": {"name": repo, "type": "model"}}
            for number, status in self._repo(user, repo).pull_requests.items()
            if wanted in (None, status)
        ]
        return {"discussions": shown, "start": 0, "count": len(shown)}

    def _head(self, user, repo, rev, path):
        commit = self._commit_of(user, repo, rev)
        headers = {"X-Repo-Commit": commit.oid}
        blob = commit.files.get(path)
        if blob is None:
            headers["X-Error-Code"] = "EntryNotFound"
            self._json(404, {"error": "Entry not found"}, headers)
        elif blob.large:
            self.hub.store.large[blob.sha256] = blob.content
            size = len(blob.content)
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": size}
            headers["ETag"] = f'"{blob.oid}"'
            headers["Location"] = f"{self.hub.other_host}/storage/{blob.sha256}?n={quote(path)}"
            self._send(302, b"", headers)
        else:
            self._send_ranged(blob.content, {**headers, "ETag": f'"{blob.oid}"'})
        return None

    _file = _head

    def _storage(self, user, oid):
        if oid not in self.hub.store.large:
            raise RefusedError(404, "NoSuchKey")
        self._send_ranged(self.hub.store.large[oid], {"ETag": f'"{oid}"'})

    def _send_ranged(self, content: bytes, headers: dict):
        wanted = re.match(r"bytes=(\d+)-$", self.headers.get("Range", ""))
        if not wanted:
            self._send(200, content, headers)
            return
        start = int(wanted[1])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206, content[start:], headers)
