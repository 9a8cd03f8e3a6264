"""Files of the Hub, compared with the digest that the Hub names them by.

timm takes two things on trust: a download of the right size is taken for the right file, and
where model.safetensors cannot be had for whatever reason, it goes on to pytorch_model.bin. Our
own names, and everything that `ema_timm.training.run` starts from on the Hub, come through
here instead, and fail.
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

    It is compared with the digest that the Hub gives for it. A damaged one is removed from the
    cache, so that nobody else is given it either, and fetched once more.

    Returns:
        The file, or None where the Hub says that the repository has none of that name.

    Raises:
        HubError: If it cannot be had, or comes damaged twice.
    """
    repo, _, revision = model_id.partition("@")
    where = {"repo_id": repo, "filename": name, "revision": revision or None}
    steps = Steps(repo, TimeLimit(TIME_LIMIT), get_token(), writes=False)
    for _ in range(2):
        file, expected = steps.patiently(lambda: _download(steps, where, cache_dir))
        if file is None or _digest(file, expected) == expected:
            return file
        _remove(file)
    raise HubError(
        f"fetching {name} ({repo}) gave a damaged file, twice: the Hub says that its digest is "
        f"{expected}. It was removed. Run the same command again; if that does not help, tell the "
        f"owner of https://huggingface.co/{repo}."
    )


def _download(steps: Steps, where: dict, cache_dir: str | None) -> tuple[Path | None, str]:
    """The file, and the digest that the Hub gives for it."""
    with steps.step(f"fetching {where['filename']}"):
        try:
            if not isinstance(try_to_load_from_cache(**where, cache_dir=cache_dir), str):
                # Without an answer the client would ask again for half a minute, unheard; so it
                # is asked once here, and again by `Steps.patiently`.
                with contextlib.suppress(OfflineModeIsEnabled):
                    get_hf_file_metadata(hf_hub_url(**where), token=get_token())
            file = Path(hf_hub_download(**where, cache_dir=cache_dir))
        except LocalEntryNotFoundError:  # not here, and the Hub has not said that it has none
            raise
        except RemoteEntryNotFoundError:
            return None, ""
        if file.is_symlink():  # the cache names its files by what the Hub says
            return file, file.readlink().name
        try:
            return file, get_hf_file_metadata(hf_hub_url(**where), token=get_token()).etag or ""
        except OfflineModeIsEnabled:  # a cache without links, and nobody to ask: as it came then
            return file, ""


def _digest(file: Path, expected: str) -> str:
    """The file's digest of the kind of ``expected``: sha256 of large files, git's of small ones."""
    if _SHA256.fullmatch(expected):
        return sha256(file)
    if _GIT.fullmatch(expected):
        return git_oid(file)
    return expected  # a server with names of its own, a mirror perhaps: nothing to compare with


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):  # a cache that is read-only keeps it, and the error stands
        file.resolve().unlink()
        file.unlink()
