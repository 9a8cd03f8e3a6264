"""One step on the Hub: its time limit, and what is said when it fails."""

import contextlib
import errno
import re
from collections.abc import Iterator

from huggingface_hub.errors import HfHubHTTPError

from ema_timm.errors import HubError
from ema_timm.hub.time_limit import TimeLimit, TimeUpError

# The client's errors, whichever HTTP library it is built on; ValueError and KeyError are answers
# that it cannot read, RuntimeError is how it wraps the failure of an upload.
CLIENT_ERRORS = (HfHubHTTPError.__bases__[0], OSError, ValueError, KeyError, RuntimeError)
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG}
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_-]{8,}")

AGAIN = "Run the same command again: it looks first, and makes no second commit."
_REMEDIES = {
    400: "Read what the Hub says, correct it and run the same command again.",
    401: "The token is not valid: log in anew with hf auth login, or correct HF_TOKEN.",
    402: "The Hub asks for payment: see https://huggingface.co/settings/billing.",
    403: "The token may not do this: take one with write access to {owner}'s repositories "
    "(https://huggingface.co/settings/tokens), or another repository.",
    404: "There is no {repo}, or the token may not see it: correct the name, or the token.",
    409: "The repository is busy with another change. " + AGAIN,
    412: "Somebody has committed in between, and nothing was overwritten. Look at that commit, "
    "then run the same command again.",
    413: "A file is too large for the Hub.",
    429: "There were too many requests. Wait, then run the same command again.",
}
_TROUBLE = "The Hub is in trouble (https://status.huggingface.co). Later, run the same command."
_OFFLINE = "Check the network and HF_ENDPOINT, then run the same command again."


class StepError(HubError):
    """A step that failed.

    Attributes:
        what: What failed, without the remedy.
        status: HTTP status, or None where no answer came.
        retry_after: Seconds that the Hub asks to wait, or None.
    """

    def __init__(
        self,
        what: str,
        remedy: str,
        status: int | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(f"{what}. {remedy}")
        self.what, self.status, self.retry_after = what, status, retry_after

    @property
    def may_pass(self) -> bool:
        """Whether trying again may help."""
        return self.status is None or self.status in (408, 409, 429) or self.status >= 500

    @property
    def may_have_landed(self) -> bool:
        """Whether the request, or one like it before, may have taken effect all the same."""
        return self.status is None or self.status in (408, 409, 412) or self.status >= 500


@contextlib.contextmanager
def hub_step(
    doing: str, repo: str, limit: TimeLimit, seconds: float | None = None, token: str | None = None
) -> Iterator[None]:
    """Run calls of the client; whatever fails in them is raised as one clear line.

    Args:
        doing: What the step does, such as "uploading model.safetensors".
        repo: USER/NAME.
        limit: The time of the whole command.
        seconds: The time of this step; None is all that is left.
        token: Kept out of the message.

    Raises:
        StepError: If the step fails or takes too long.
    """
    try:
        with limit.step(seconds):
            yield
    except TimeUpError:
        allowed = limit.seconds if seconds is None else min(seconds, limit.seconds)
        raise StepError(
            f"{doing} ({repo}) took more than {allowed:.0f} s",
            f"Check the network, or give more time with --time-limit. {AGAIN}",
        ) from None
    except CLIENT_ERRORS as error:
        # Without its cause: a traceback of the client could show what it sent.
        raise step_error(doing, repo, error, token) from None


def step_error(doing: str, repo: str, error: BaseException, token: str | None) -> StepError:
    """What a failure of the client means, and what to do about it."""
    cause = _root(error)
    response = getattr(cause, "response", None)
    status = getattr(response, "status_code", None)
    wait = _retry_after(response) if status else None
    if status:
        remedy = _REMEDIES.get(status, _TROUBLE).format(repo=repo, owner=repo.partition("/")[0])
        said = f"{status}: {getattr(cause, 'server_message', None) or _first_line(cause)}"
    elif getattr(cause, "errno", None) in _DISK:
        remedy = "Free space, or set TMPDIR to another disk, then run the same command again."
        said = str(cause)
    else:
        remedy = _OFFLINE
        said = f"{type(cause).__name__}: {_first_line(cause)}"
    asked = f" (the Hub asks to wait {wait:.0f} s)" if wait else ""
    what = f"{doing} ({repo}) failed, {' '.join(said.split()).rstrip('.')}{asked}"
    return StepError(scrub(what, token), remedy, status, wait)


def scrub(text: str, token: str | None) -> str:
    """``text`` without the token, and without anything that looks like one."""
    if token:
        text = text.replace(token, "hf_***")
    return _TOKEN.sub("hf_***", text)


def _root(error: BaseException) -> BaseException:
    """The answer of the Hub that an error goes back to, or its innermost cause."""
    while getattr(error, "response", None) is None:
        cause = error.__cause__
        if cause is None:
            break
        error = cause
    return error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no more is known"]
    return lines[0]


def _retry_after(response) -> float | None:
    value = response.headers.get("Retry-After", "").strip()
    return float(value) if value.isdigit() else None
