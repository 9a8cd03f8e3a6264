"""Downloads from the Hub, compared with the hash that the Hub has for each file.

timm accepts every download of the right size, and loads pytorch_model.bin if it cannot get
model.safetensors. Models with names of this package, and the initial weights that
`ema_timm.training.run` loads from the Hub, are downloaded here instead: a failure is an error.
"""

import contextlib
import re
from pathlib import Path

from huggingface_hub import (
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from ema_timm.errors import HubError
from ema_timm.files import sha256
from ema_timm.hub.commit import git_oid
from ema_timm.hub.steps import Steps
from ema_timm.hub.time_limit import TimeLimit

try:
    from huggingface_hub.errors import RemoteEntryNotFoundError
except ImportError:  # huggingface_hub before 1.0 has one name for both
    from huggingface_hub.errors import EntryNotFoundError as RemoteEntryNotFoundError

TIME_LIMIT = 3600.0
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT = re.compile(r"[0-9a-f]{40}")


def fetch(model_id: str, name: str, cache_dir: str | None = None) -> Path | None:
    """Download one file of ``USER/NAME`` or ``USER/NAME@REVISION`` into the client's cache.

    It is compared with the Hub's hash. A damaged file is removed from the cache, so that no other
    program reads it, and downloaded once more.

    Returns:
        The file, or None if the repository has none of that name.

    Raises:
        HubError: If the download fails, or is damaged twice.
    """
    repo, _, revision = model_id.partition("@")
    where = {"repo_id": repo, "filename": name, "revision": revision or None}
    steps = Steps(repo, TimeLimit(TIME_LIMIT), get_token(), writes=False)
    damage = ""
    for _ in range(2):
        try:
            file, expected = steps.with_retries(
                f"fetching {name}", lambda: _download(where, cache_dir)
            )
        except HubError as error:
            if not damage:
                raise
            raise HubError(f"{damage}{error}") from error
        found = _digest(file, expected) if file else expected
        if file is None or found == expected:
            return file
        _remove(file)
        damage = (
            f"{file} was damaged and is removed: its hash is {found[:12]}…, but the Hub's is "
            f"{expected[:12]}…. A new download failed: "
        )
    raise HubError(
        f"fetching {name} ({repo}) gave a damaged file twice: its hash on the Hub is "
        f"{expected}. It was removed. Run the same command again; if that does not help, tell the "
        f"owner of https://huggingface.co/{repo}."
    )


def _download(where: dict, cache_dir: str | None) -> tuple[Path | None, str]:
    """The file, and its hash on the Hub."""
    try:
        if not isinstance(try_to_load_from_cache(**where, cache_dir=cache_dir), str):
            # Without an answer the client would retry for half a minute without a message. So
            # this asks once, and `Steps.with_retries` asks again.
            with contextlib.suppress(OfflineModeIsEnabled):
                get_hf_file_metadata(hf_hub_url(**where), token=get_token())
        file = Path(hf_hub_download(**where, cache_dir=cache_dir))
    except LocalEntryNotFoundError:  # not in the cache, and the Hub has not answered
        raise
    except RemoteEntryNotFoundError:
        return None, ""
    if file.is_symlink():  # the cache names its files by their hashes
        return file, file.readlink().name
    try:
        return file, get_hf_file_metadata(hf_hub_url(**where), token=get_token()).etag or ""
    except OfflineModeIsEnabled:  # a cache without links, offline: not compared
        return file, ""


def _digest(file: Path, expected: str) -> str:
    """The file's hash of the kind of ``expected``: sha256 of large files, git's of small ones."""
    if _SHA256.fullmatch(expected):
        return sha256(file)
    if _GIT.fullmatch(expected):
        return git_oid(file)
    return expected  # another server, such as a mirror: nothing to compare with


def _remove(file: Path) -> None:
    with contextlib.suppress(
        OSError
    ):  # a read-only cache keeps the file; the error is raised anyway
        file.resolve().unlink()
        file.unlink()
