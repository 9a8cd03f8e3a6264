"""A step on the Hub: its time limit, and that no message holds the token."""

import signal
import threading
import time

import pytest

from ema_timm.hub.steps import scrub
from ema_timm.hub.time_limit import TimeLimit, TimeUpError


def test_scrub_knows_the_token_and_what_looks_like_one():
    assert scrub("Bearer secret-of-mine, hf_AbCdEfGh1234", "secret-of-mine") == (
        "Bearer hf_***, hf_***"
    )


def test_time_limit_ends_a_blocking_call_and_leaves_no_alarm():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeUpError), TimeLimit(60).step(0.1):
        time.sleep(60)
        pytest.fail("the call was waited for")
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    limit = TimeLimit(0.05)
    time.sleep(0.06)
    with pytest.raises(TimeUpError), limit.step():
        raise AssertionError("the time was up before")


def test_time_limit_works_in_a_thread_between_steps():
    seen = []

    def work():
        with TimeLimit(60).step(0.01):
            time.sleep(0.05)
        seen.append("no alarm in a thread")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen
