"""A model loaded in another process, and its outputs for a fixed input."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping

import torch
from torch import nn

from ema_timm.errors import HubError

Outputs = list[list[float]]

# For rounding: the order of a sum may differ between two processes. Different weights are detected
# by their sha256.
RELOAD_TOLERANCE = 1e-5
_SECONDS = 600

LOAD_WITH_TIMM = """
import json, sys
import timm
import ema_timm  # in case timm does not find it
from ema_timm.publishing.reload import fixed_logits
print(json.dumps(fixed_logits(timm.create_model(sys.argv[1], pretrained=True))))
"""


@torch.inference_mode()
def fixed_logits(model: nn.Module) -> Outputs:
    """Logits of ``model`` for two fixed random images of its own input size, (2, classes)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *model.pretrained_cfg["input_size"], generator=generator)
    return model.eval()(images).double().tolist()


def reload_elsewhere(name: str, env: Mapping[str, str], code: str = LOAD_WITH_TIMM) -> Outputs:
    """Load a model by its name in a new process, offline.

    Args:
        name: ``local-dir:FOLDER``, or ``hf-hub:USER/NAME@COMMIT`` whose files are in the cache; or
            names of another kind of folder.
        env: Environment variables that differ from this process.
        code: Code of the process, which prints the outputs of the model of its argument as JSON.

    Raises:
        HubError: If it does not load.
    """
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, "-c", code, name]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=env,
            timeout=_SECONDS,
            cwd=os.sep,  # a folder timm/ in the current one would shadow the installed package
        )
    except subprocess.TimeoutExpired as error:
        raise HubError(f"{name} did not load within {_SECONDS} s in a fresh process.") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise HubError(f"{name} does not load in a fresh process: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def same(first: Outputs, second: Outputs) -> bool:
    """Whether two outputs are equal up to `RELOAD_TOLERANCE` of the largest logit."""
    a, b = torch.tensor(first), torch.tensor(second)
    if a.shape != b.shape or not torch.isfinite(a).all():
        return False
    return bool((a - b).abs().max() <= RELOAD_TOLERANCE * max(1.0, float(a.abs().max())))
