"""git's name of a file's content: what the Hub calls a file that is not in large-file storage."""

import hashlib
from pathlib import Path


def git_oid(file: Path) -> str:
    """Hex sha1 of the blob."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
