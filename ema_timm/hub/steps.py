"""Steps on the Hub: their time limits, retries and error messages."""

import contextlib
import dataclasses
import errno
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ema_timm.errors import HubError, one_line
from ema_timm.hub.time_limit import TimeLimit, TimeUpError

T = TypeVar("T")
ATTEMPTS = 3
_LONGEST_WAIT = 120.0

# The client's errors, for each HTTP library that it may use. It raises ValueError and KeyError for
# malformed responses, and RuntimeError for failed uploads.
CLIENT_ERRORS = (HfHubHTTPError.__bases__[0], OSError, ValueError, KeyError, RuntimeError)
_UNREADABLE = (ValueError, KeyError)
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
_READ_AGAIN = "Run the same command again."
_READ_REMEDIES = {
    403: "The token may not read this: accept the conditions at https://huggingface.co/{repo}, "
    "or take one that may.",
    409: _READ_AGAIN,
    412: _READ_AGAIN,
}
_TROUBLE = "The Hub is in trouble (https://status.huggingface.co). Later, run the same command."
_OFFLINE = "Check the network and HF_ENDPOINT, then run the same command again."


class StepError(HubError):
    """A step that failed.

    Attributes:
        what: What failed, without the remedy.
        status: HTTP status, or None without a response.
        retry_after: Seconds that the Hub asks to wait, or None.
        final: Whether a retry is useless: the disk failed, or the client has already retried.
    """

    def __init__(
        self,
        what: str,
        remedy: str,
        status: int | None = None,
        retry_after: float | None = None,
        final: bool = False,
    ):
        super().__init__(f"{what}. {remedy}")
        self.what, self.status, self.retry_after, self.final = what, status, retry_after, final

    @property
    def may_pass(self) -> bool:
        """Whether a retry may help."""
        if self.final:
            return False
        return self.status is None or self.status in (408, 409, 429) or self.status >= 500

    @property
    def may_have_landed(self) -> bool:
        """Whether the request may have taken effect although it failed."""
        return self.status is None or self.status in (408, 409, 412) or self.status >= 500


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of one command on one repository.

    Attributes:
        repo: USER/NAME.
        limit: Time limit of the whole command.
        token: Kept out of every message.
        writes: Whether the command changes the repository.
    """

    repo: str
    limit: TimeLimit
    token: str | None = None
    writes: bool = True

    @contextlib.contextmanager
    def step(self, doing: str, seconds: float | None = None) -> Iterator[None]:
        """Run calls of the client; their errors are raised as one line.

        Args:
            doing: What the step does, such as "uploading model.safetensors".
            seconds: Time limit of this step; None is the time that is left.

        Raises:
            StepError: If the step fails or takes too long.
        """
        try:
            with self.limit.step(seconds):
                yield
        except TimeUpError:
            allowed = min(seconds or self.limit.seconds, self.limit.seconds)
            more = ", or give more time with --time-limit" if self.writes else ""
            raise StepError(
                f"{doing} ({self.repo}) took more than {allowed:.0f} s",
                f"Check the network{more}. {AGAIN if self.writes else _READ_AGAIN}",
            ) from None
        except CLIENT_ERRORS as error:
            # Without its cause: a traceback of the client could show what it sent.
            raise self._failure(doing, error) from None

    def with_retries(
        self,
        doing: str,
        call: Callable[[], T],
        seconds: float | None = None,
        attempts: int = ATTEMPTS,
        done_already: Callable[[StepError], T | None] = lambda failure: None,
    ) -> T:
        """Run a step until it succeeds, while a retry may help and within the time limit.

        Args:
            doing: See `step`.
            call: The step. It may be called again after it failed.
            seconds: See `step`.
            attempts: Maximum number of calls.
            done_already: Gets the error of ``call`` and returns the result if the call took effect
                all the same.
        """
        for attempt in itertools.count(1):
            try:
                with self.step(doing, seconds):
                    return call()
            except StepError as error:
                failure = error
            done = done_already(failure) if failure.may_have_landed else None
            if done is not None:
                return done
            wait = 2.0 ** (attempt - 1) if failure.retry_after is None else failure.retry_after
            if attempt == attempts or not failure.may_pass or wait > self._longest_wait():
                raise failure
            print(f"{failure.what}; trying again in {wait:.0f} s", file=sys.stderr)
            time.sleep(wait)

    def _longest_wait(self) -> float:
        return min(_LONGEST_WAIT, self.limit.left)

    def _failure(self, doing: str, error: BaseException) -> StepError:
        """The error for a failure of the client, with its remedy."""
        cause = _root(error)
        response = getattr(cause, "response", None)
        status = getattr(response, "status_code", None)
        wait = _retry_after(response) if status else None
        local = not status and getattr(cause, "errno", None) in _DISK
        if status:
            remedies = _REMEDIES if self.writes else {**_REMEDIES, **_READ_REMEDIES}
            owner = self.repo.partition("/")[0]
            remedy = remedies.get(status, _TROUBLE).format(repo=self.repo, owner=owner)
            said = f"{status}: {getattr(cause, 'server_message', None) or one_line(cause)}"
        elif local:
            remedy = "Free space, or set TMPDIR to another disk, then run the same command again."
            said = str(cause)
        else:
            remedy = _OFFLINE
            unread = "an answer that cannot be read, " if isinstance(cause, _UNREADABLE) else ""
            said = f"{unread}{type(cause).__name__}: {one_line(cause)}"
        asked = f" (the Hub asks to wait {wait:.0f} s)" if wait else ""
        what = f"{doing} ({self.repo}) failed, {' '.join(said.split()).rstrip('.')}{asked}"
        final = local or isinstance(error, LocalEntryNotFoundError)
        return StepError(scrub(what, self.token), remedy, status, wait, final)


def scrub(text: str, token: str | None) -> str:
    """``text`` without the token, and without whatever looks like one."""
    if token:
        text = text.replace(token, "hf_***")
    return _TOKEN.sub("hf_***", text)


def _root(error: BaseException) -> BaseException:
    """The response of the Hub that caused an error, or the innermost cause."""
    while getattr(error, "response", None) is None:
        cause = error.__cause__
        if cause is None:
            break
        error = cause
    return error


def _retry_after(response) -> float | None:
    value = response.headers.get("Retry-After", "").strip()
    return float(value) if value.isdigit() else None
