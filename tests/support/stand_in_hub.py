"""A stand-in for the Hugging Face Hub on loopback, for the unmodified ``huggingface_hub`` client.

It speaks the protocol of pushing (repositories, branches, preupload, large files, commits, pull
requests) and of loading (model information, trees, resolve with its redirect to another host), and
keeps everything in memory. `StandInHub.fault` makes any step go wrong. The pages that a browser
would see, xet storage, datasets and spaces are not here.
"""

import contextlib
import dataclasses
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from support.stand_in_answers import ADA, ADA_READS, BOB, TOKENS, Answers, RefusedError
from support.stand_in_store import Store

__all__ = ["ADA", "ADA_READS", "BOB", "TOKENS", "Fault", "StandInHub"]

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


class _Handler(Answers, BaseHTTPRequestHandler):
    """One connection: the step, its fault, and bytes; what a step answers is in `Answers`."""

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
