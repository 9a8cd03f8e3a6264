"""A step on the Hub: its time limit, and that no message holds the token."""

import hashlib
import signal
import threading
import time

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from ema_timm.errors import HubError
from ema_timm.hub import fetch as fetch_module
from ema_timm.hub.fetch import fetch
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


def test_offline_a_damaged_file_in_the_cache_is_named_with_its_digest(tmp_path, monkeypatch):
    file, expected = tmp_path / "model.safetensors", "0" * 64
    file.write_bytes(b"damaged")
    answers = [(file, expected), LocalEntryNotFoundError("offline, and not in the cache")]

    def download(where, cache_dir):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(fetch_module, "_download", download)
    digest = hashlib.sha256(b"damaged").hexdigest()[:12]
    said = rf"{file} was damaged and is removed: its hash is {digest}…, but .*{expected[:12]}…\. A "
    with pytest.raises(
        HubError, match=said + r"new download failed: fetching .*\(ada/base\) failed"
    ):
        fetch("ada/base", "model.safetensors")
    assert not file.exists() and not answers
