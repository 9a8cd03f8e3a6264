"""What goes into a commit on the Hub, where to, and how it is known again."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from ema_timm.files import sha256


@dataclass(frozen=True)
class Destination:
    """Where to publish.

    Attributes:
        repo: USER/NAME.
        revision: Branch; made where it is missing.
        private: Make a new repository private.
        create_pr: Open a pull request instead of committing to the branch.
    """

    repo: str
    revision: str = "main"
    private: bool = False
    create_pr: bool = False


class File:
    """One file to publish, with the names that the Hub gives to its content."""

    def __init__(self, path: Path):
        self.path, self.name, self.size = path, path.name, path.stat().st_size
        self.sha256 = sha256(path)

    @functools.cached_property
    def git_oid(self) -> str:
        """Git's name of the content, where it is not in large-file storage."""
        return git_oid(self.path)


@dataclass(frozen=True)
class Landed:
    """A commit that is on the Hub.

    Attributes:
        commit: Its full hash.
        url: Page of the commit or of the pull request.
        new: Whether this run made it.
    """

    commit: str
    url: str
    new: bool


def digest(files: list[File]) -> str:
    """One name for all the files together."""
    lines = sorted(f"{file.name} {file.sha256}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# MERGED: git's name of a file's content: what the Hub calls a file that is not in large-file storage.
def git_oid(file: Path) -> str:
    """Hex sha1 of the blob."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
