"""What a Hub remembers: repositories, their branches, commits and large files. No HTTP here."""

import dataclasses
import hashlib
import itertools
import threading

LARGE = 10 * 2**20  # as on the Hub, files beyond this go to large-file storage whatever their name
LARGE_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".png", ".jpg", ".tar")


@dataclasses.dataclass(frozen=True)
class Blob:
    """One file of a commit."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """git's name of the blob: of the file, or of the pointer to a large one."""
        content = self.content
        if self.large:
            pointer = f"oid sha256:{self.sha256}\nsize {len(content)}\n"
            content = ("version https://git-lfs.github.com/spec/v1\n" + pointer).encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclasses.dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    user: str
    files: dict[str, Blob]


class Repo:
    """Branches and pull requests point at commits; a commit holds all its files."""

    def __init__(self, name: str, private: bool, count):
        self.name, self.private = name, private
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.pull_requests: dict[int, str] = {}  # number -> "open" or "closed"
        self._count = count
        first = {".gitattributes": Blob(b"*.safetensors filter=lfs\n", large=False)}
        self.add("main", first, "initial commit", user="system")

    def resolve(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    def add(self, ref: str, changes: dict, title: str, message: str = "", user="ada") -> Commit:
        """A commit on ``ref``; a change to None deletes the file."""
        parent = self.refs.get(ref)
        files = dict(self.commits[parent].files) if parent else {}
        files = {**files, **changes}
        files = {path: blob for path, blob in files.items() if blob is not None}
        seed = f"{self.name} {next(self._count)} {parent} {title}"
        oid = hashlib.sha1(seed.encode()).hexdigest()
        commit = Commit(oid, parent, title, message, user, files)
        self.commits[oid] = commit
        self.refs[ref] = oid
        return commit

    def open_pull_request(self) -> str:
        number = len(self.pull_requests) + 1
        self.pull_requests[number] = "open"
        self.refs[f"refs/pr/{number}"] = self.refs["main"]
        return f"refs/pr/{number}"

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        commit, found = self.resolve(revision), []
        while commit:
            found.append(commit)
            commit = self.commits.get(commit.parent)
        return found


class Store:
    """All repositories; every change happens under ``lock``."""

    def __init__(self):
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}  # uploaded, by sha256; in no commit yet, perhaps
        self._count = itertools.count()

    def create(self, name: str, private: bool = False) -> Repo:
        with self.lock:
            repo = self.repos[name] = Repo(name, private, self._count)
            return repo

    def put(self, name: str, files: dict[str, bytes], title: str, ref="main", user="eve") -> Commit:
        """What somebody commits without the client."""
        with self.lock:
            repo = self.repos.get(name) or self.create(name)
            blobs = {path: as_blob(path, content) for path, content in files.items()}
            return repo.add(ref, blobs, title, user=user)


def as_blob(path: str, content: bytes) -> Blob:
    return Blob(content, is_large(path, len(content)))


def is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE_SUFFIXES) or size > LARGE
