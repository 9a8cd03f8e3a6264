"""The tests' side of `hub_worker`: a process that runs ``ema-timm`` commands one after another."""

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest


class Worker:
    """A process for `ema-timm` commands; see hub_worker.py."""

    PATIENCE = 300  # seconds; a task without an answer by then hangs

    def __init__(self, env):
        script = Path(__file__).with_name("hub_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
        )

    def run(self, *args, **settings):
        """Exit code and both streams of ``ema-timm ARGS``, and how long it slept."""
        return self._do({"args": [str(arg) for arg in args], **settings})

    def load(self, name, **settings):
        """``{"outputs": ...}`` of a timm name, or ``{"error": ...}``."""
        return self._do({"name": name, **settings})

    def _do(self, task):
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], self.PATIENCE)[0]:
            self.close()
            pytest.fail(f"no answer to {task}")
        return json.loads(self._process.stdout.readline())

    def close(self):
        """Kill the process: a closed pipe does not end it if another process holds the pipe."""
        with self._process:
            self._process.kill()
