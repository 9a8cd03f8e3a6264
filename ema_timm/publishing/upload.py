"""``publish``: one verified commit of a checkpoint folder on the Hub.

Nothing else in the package writes to the network. Before the commit, the folder is checked and
loaded in a new process, whose outputs must be those of the source model. After it, every file is
downloaded from the commit and compared by sha256, and the model is loaded from there in a new
process and compared again.
"""

import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, get_token

from ema_timm import __version__
from ema_timm.checkpoints.cards.file import require_unedited
from ema_timm.checkpoints.layout import CARD, RESULTS
from ema_timm.errors import HubError, UserError, some
from ema_timm.files import sha256
from ema_timm.hub.commit import Destination, File, Landed
from ema_timm.hub.repository import Repository
from ema_timm.hub.steps import AGAIN
from ema_timm.hub.time_limit import TimeLimit
from ema_timm.publishing.kinds import Reload
from ema_timm.publishing.plan import Plan, check_space, make_plan
from ema_timm.publishing.reload import Outputs, same

TIME_LIMIT = 3600.0
_PICKLES = re.compile(r"\.(bin|pth|pt|pth\.tar|pkl)$")


def publish(
    folder: str | Path,
    destination: Destination,
    *,
    force: bool = False,
    time_limit: float = TIME_LIMIT,
    reload: Reload | None = None,
    api: HfApi | None = None,
) -> Landed:
    """Publish a checkpoint folder.

    Args:
        folder: What `ema_timm.checkpoints.check.check_publishable` accepts, or
            `ema_timm.integrations.yolo.check.check_detector`.
        destination: The repository and branch.
        force: Replace a card on the Hub that was edited by hand.
        time_limit: Time limit in seconds for all network operations.
        reload: Loads a model by its name in another process and returns its outputs; by default
            that of the folder's kind.
        api: Client of the Hub; by default one with the user's token and endpoint.

    Returns:
        The commit that holds the folder's files, made by this run or an earlier one.

    Raises:
        UserError: For a folder or a destination that cannot be published; nothing was sent.
        EditedCardError: If the card on the Hub was edited by hand and ``force`` is off.
        HubError: If the Hub failed. It has the whole commit or nothing of it.
    """
    plan = _plan(folder, destination)
    reload = reload or plan.kind.reload
    api = _client(api)
    with tempfile.TemporaryDirectory(prefix="ema-timm-") as scratch:
        check_space(plan, Path(scratch))
        expected = check_loads_back(plan, reload, Path(scratch))
        repository = Repository(api, destination, TimeLimit(time_limit))
        landed = _push(plan, repository, Path(scratch), force)
        try:
            _verify(plan, landed, repository, expected, reload, Path(scratch))
        except HubError as error:
            raise HubError(
                f"{landed.url} holds the whole commit, but it was not verified: {error}"
            ) from error
    return landed


def rehearse(folder: str | Path, destination: Destination, *, reload: Reload | None = None) -> Plan:
    """All that `publish` does before it needs the network; raises the same errors."""
    plan = _plan(folder, destination)
    with tempfile.TemporaryDirectory(prefix="ema-timm-") as scratch:
        check_loads_back(plan, reload or plan.kind.reload, Path(scratch))
    return plan


def _plan(folder: str | Path, destination: Destination) -> Plan:
    plan = make_plan(folder, destination)
    if plan.folder.skipped:
        _say(
            f"not published, for neither {CARD} nor {RESULTS} names it: {some(plan.folder.skipped)}"
        )
    return plan


def check_loads_back(plan: Plan, reload: Reload, scratch: Path) -> Outputs:
    """Load the folder by its name in a new process; the outputs must be the source model's.

    Raises:
        UserError: If they differ or are not finite, or the folder does not load.
    """
    folder, kind = plan.folder, plan.kind
    expected = kind.outputs(folder)
    _say("loading the folder in a fresh process")
    loaded = reload(kind.local.format(path=folder.path.resolve()), {"TMPDIR": str(scratch)})
    if not same(expected, loaded):
        raise UserError(
            f"{folder.path}, loaded in a fresh process, does not answer as its own weights do. "
            f"Compare {folder.files[1]} with the model that was trained."
        )
    return expected


def _client(api: HfApi | None) -> HfApi:
    token = api.token if api and isinstance(api.token, str) else get_token()
    if not token:
        raise UserError(
            "publishing needs a token with write access, and there is none. Log in with "
            "hf auth login, or set HF_TOKEN (https://huggingface.co/settings/tokens)."
        )
    return HfApi(api.endpoint if api else None, token, "ema-timm", __version__)


def _push(plan: Plan, repository: Repository, scratch: Path, force: bool) -> Landed:
    _say(f"reading {plan.destination.repo}")
    repository.open()
    there = repository.contents()
    if all(there.get(file.name) in (file.sha256, file.git_oid) for file in plan.files):
        _say(_nothing_to_do(plan.destination))
        return Landed(repository.head, repository.url(repository.head), new=False)
    if CARD in there and not force:
        _keep_edited_card(plan, repository, scratch)
    _mention_pickles(there, plan.kind.on_pickles)
    return repository.push(plan.files, plan.kind.title(plan.folder.results))


def _nothing_to_do(destination: Destination) -> str:
    """The message if the Hub has the files already, which is a success."""
    if destination.create_pr:
        return f"no pull request was made: {destination.revision} holds these files already"
    return (
        f"{destination.revision} holds these files already: nothing to commit, and whether the "
        "token may write was not asked"
    )


def _mention_pickles(there: Iterable[str], what_they_do: str) -> None:
    pickles = ", ".join(name for name in there if _PICKLES.search(name))
    if pickles:
        _say(
            f"note: the repository also holds {pickles}. {what_they_do}; remove it if it is not of "
            "these weights"
        )


def _keep_edited_card(plan: Plan, repository: Repository, scratch: Path) -> None:
    """Refuse to replace a card on the Hub that ema-timm did not generate."""
    file = repository.fetch(CARD, repository.head, scratch / "card")
    ours = plan.folder.path / CARD
    require_unedited(
        file.read_text("utf-8", errors="replace"),
        plan.folder.card,
        (f"{plan.destination.repo}/{CARD}", str(ours)),
        f"{CARD} of {plan.destination.repo} was not written by ema-timm, or was edited, and is "
        f"kept; the difference is above. Copy the edits into {ours} and publish with --force, "
        "which replaces it.",
    )


def _verify(
    plan: Plan,
    landed: Landed,
    repository: Repository,
    expected: Outputs,
    reload: Reload,
    scratch: Path,
) -> None:
    """Compare the files and outputs of the commit with those that were published."""
    _say(f"fetching commit {landed.commit[:8]} back")
    cache = scratch / "fetched"
    for file in plan.files:
        _fetch_back(file, landed, repository, cache)
    name = plan.kind.remote.format(repo=plan.destination.repo, commit=landed.commit)
    _say(f"loading {name} in a fresh process")
    loaded = reload(name, {"HF_HUB_CACHE": str(cache), "HF_ENDPOINT": repository.api.endpoint})
    if not same(expected, loaded):
        raise HubError(f"{name} does not answer as the published model does. {AGAIN}")


def _fetch_back(file: File, landed: Landed, repository: Repository, cache: Path) -> None:
    got = sha256(repository.fetch(file.name, landed.commit, cache))
    if got != file.sha256:
        _say(f"{file.name} came back damaged; fetching it anew")
        got = sha256(repository.fetch(file.name, landed.commit, cache, again=True))
    if got != file.sha256:
        raise HubError(
            f"fetching {file.name} back gave sha256 {got}, not {file.sha256}, twice. {AGAIN}"
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr)
