"""The files and the destination of a commit, checked before anything is sent."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ema_timm.checkpoints.check import CheckedFolder
from ema_timm.errors import UserError
from ema_timm.hub.commit import Destination, File
from ema_timm.publishing.kinds import FolderKind, kind_of


@dataclass(frozen=True)
class Plan:
    """The files of a folder, and where they are published."""

    kind: FolderKind
    folder: CheckedFolder
    files: list[File]
    destination: Destination

    def __str__(self) -> str:
        to = self.destination
        where = f"a pull request on {to.repo}" if to.create_pr else f"{to.repo}, {to.revision}"
        lines = [f"{where}{' (private, if it is new)' if to.private else ''}:"]
        width = max(len(file.name) for file in self.files)
        lines += [f"  {f.name:{width}} {f.size:>13,} bytes  sha256 {f.sha256}" for f in self.files]
        total = sum(file.size for file in self.files)
        return "\n".join([*lines, f"  {'together':{width}} {total:>13,} bytes in one commit"])


def make_plan(folder: str | Path, destination: Destination) -> Plan:
    """Check the folder and the destination's name; no network.

    Raises:
        UserError: For a folder or a name that cannot be published.
    """
    _check_destination(destination)
    kind = kind_of(folder)
    checked = kind.check(folder)
    return Plan(kind, checked, [File(checked.path / name) for name in checked.files], destination)


def _check_destination(to: Destination) -> None:
    try:
        validate_repo_id(to.repo)
    except HFValidationError as error:
        raise UserError(f"--repo-id {to.repo!r}: {error} Give USER/NAME.") from error
    if to.repo.count("/") != 1:
        raise UserError(f"--repo-id must be USER/NAME, got {to.repo!r}.")
    if not to.revision:
        raise UserError("--revision is empty. Name a branch, such as main.")
    if re.fullmatch(r"[0-9a-f]{40}", to.revision):
        raise UserError(f"--revision must name a branch, but {to.revision} is a commit.")
    if to.create_pr and to.revision != "main":
        raise UserError("--create-pr is for the branch main: leave out --revision.")


def check_space(plan: Plan, scratch: Path) -> None:
    """Check that there is space to download the files again.

    Raises:
        UserError: If not.
    """
    needed, free = sum(file.size for file in plan.files), shutil.disk_usage(scratch).free
    if free < needed:
        raise UserError(
            f"{scratch.parent} has {free:,} bytes free, but fetching the files back takes "
            f"{needed:,}. Free space, or set TMPDIR to another disk."
        )
