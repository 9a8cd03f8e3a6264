"""What the stand-in for the Hub answers at each step; see stand_in_hub.py for HTTP and faults."""

import base64
import hashlib
import json
import re
from urllib.parse import quote, urlsplit

from support.stand_in_store import Blob, as_blob, is_large

TOKENS = {
    "hf_StandInWriteTokenOfAda00": ("ada", "write"),
    "hf_StandInWriteTokenOfBob00": ("bob", "write"),
    "hf_StandInReadTokenOfAda000": ("ada", "read"),
}
ADA, BOB, ADA_READS = TOKENS
PAGE = 3  # commits on a page of the history: small, so that reading on is tried too


class RefusedError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "", **more):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **more}
        self.headers = {"X-Error-Code": code} if code else {}


class Answers:
    """Each step is a method named after it: it returns the JSON of its answer, or sends one.

    The handler has ``hub``, and of the request ``body``, ``query``, ``headers`` and ``path``.
    """

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
