"""What a commit on the Hub is made of, where it goes, and the hashes by which it is found again."""

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
        revision: Branch; created if it is missing.
        private: Make a new repository private.
        create_pr: Open a pull request instead of committing to the branch.
    """

    repo: str
    revision: str = "main"
    private: bool = False
    create_pr: bool = False


class File:
    """One file to publish, with the hashes that the Hub knows it by."""

    def __init__(self, path: Path):
        self.path, self.name, self.size = path, path.name, path.stat().st_size
        self.sha256 = sha256(path)

    @functools.cached_property
    def git_oid(self) -> str:
        """The Hub's hash, if the file is not in large-file storage."""
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
    """One hash of all files together."""
    lines = sorted(f"{file.name} {file.sha256}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def git_oid(file: Path) -> str:
    """Hex sha1 of git's blob: the Hub's hash of a file that is not in large-file storage."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
