"""A process that runs ``ema-timm`` commands one after another, for `test_hub_faults`.

The client reads HF_ENDPOINT and its other settings when it is imported, so it cannot run in the
process of the tests; and a new process for each of hundreds of faults would mostly import torch.
Reads the arguments of `run` or `load` and writes what it returns, as JSON, a line each. Nothing of
the client is changed but its time, which passes only while it sleeps (`Clock`). What publishing
gets is another `Reload`: models are loaded back from the same folders in this process.
(test_publish.py has the default, fresh processes.)
"""

import contextlib
import functools
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest.mock import patch

import timm
from huggingface_hub import constants, utils

from ema_timm.cli import main
from ema_timm.hub import fetch
from ema_timm.integrations.yolo.check import fixed_outputs
from ema_timm.publishing import upload as publish
from ema_timm.publishing.reload import fixed_logits


class Clock:
    """Time that passes only in `time.sleep`, so that a slow machine changes no outcome.

    The client sleeps between its calls, and so do we; the time limit and its alarm go by this too.
    """

    def __init__(self):
        self.now, self.alarm, self.interval = 0.0, None, 0.0

    def sleep(self, seconds: float) -> None:
        """Pass the time at once, up to the alarm."""
        self.now += seconds
        if self.alarm is not None and self.now >= self.alarm:
            self.now, self.alarm = self.alarm, self.alarm + self.interval
            signal.raise_signal(signal.SIGALRM)

    def setitimer(self, which: int, seconds: float, interval: float = 0.0) -> None:
        """What `signal.setitimer` does."""
        self.alarm, self.interval = (self.now + seconds if seconds else None), interval

    @contextlib.contextmanager
    def running(self):
        """In this block nothing goes by the machine's clock."""
        with (
            patch.object(time, "sleep", self.sleep),
            patch.object(time, "monotonic", lambda: self.now),
            patch.object(signal, "setitimer", self.setitimer),
        ):
            yield


def reload_here(name: str, env: dict[str, str]):
    source, _, where = name.partition(":")
    if source in ("hf-hub", "yolo-hub"):
        repo, _, commit = where.partition("@")
        where = f"{env['HF_HUB_CACHE']}/models--{repo.replace('/', '--')}/snapshots/{commit}"
    if source.startswith("yolo"):
        return fixed_outputs(where)
    return fixed_logits(timm.create_model(f"local-dir:{where}", pretrained=True))


def run(args: list[str], largest_file: int = resource.RLIM_INFINITY) -> dict:
    """One command, with everything that reaches the two streams, from whatever thread or logger.

    ``largest_file`` limits what it can write to a file, in bytes: a full disk.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    before = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            code = main(args)
        except Exception:  # a command must never end like this: the tests see the code
            traceback.print_exc()
            code = -1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(before[0], 1)
            os.dup2(before[1], 2)
            os.close(before[0])
            os.close(before[1])
        texts = [stream.seek(0) or stream.read().decode() for stream in (out, err)]
    return {"code": code, "out": texts[0], "err": texts[1]}


def load(name: str, symlinks: bool = True, keep_cache: bool = False, offline: bool = False) -> dict:
    """What `timm.create_model` makes of ``name``: the outputs of the model, or the error.

    Of ``yolo-hub:USER/NAME`` the same by `ema_timm.integrations.yolo.load`.
    """
    if not keep_cache:
        shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    constants.HF_HUB_DISABLE_SYMLINKS = not symlinks
    set_offline(offline)
    try:
        if name.startswith("yolo-hub:"):
            repo, _, revision = name.removeprefix("yolo-hub:").partition("@")
            return {"outputs": fixed_outputs(repo, revision or None)}
        return {"outputs": fixed_logits(timm.create_model(name, pretrained=True))}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        constants.HF_HUB_DISABLE_SYMLINKS = False
        set_offline(False)


def set_offline(offline: bool) -> None:
    """What HF_HUB_OFFLINE does in a new process."""
    constants.HF_HUB_OFFLINE = offline
    if hasattr(utils, "reset_sessions"):  # before 1.0 the client decides when a session begins
        utils.reset_sessions()


if __name__ == "__main__":
    publish.publish = functools.partial(publish.publish, reload=reload_here)
    publish.rehearse = functools.partial(publish.rehearse, reload=reload_here)
    fetch.TIME_LIMIT = 3.0  # finetune has no option for it
    assert Path(constants.HF_HUB_CACHE).is_relative_to(os.environ["HF_HOME"])
    for line in sys.stdin:
        task = json.loads(line)
        clock, real_time = Clock(), task.pop("real_time", False)
        with contextlib.nullcontext() if real_time else clock.running():
            answer = (load if "name" in task else run)(**task)
        print(json.dumps({**answer, "slept": clock.now}), flush=True)
