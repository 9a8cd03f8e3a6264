"""Ways of running a training step: on two processes, and compiled."""

import os
import subprocess
import sys

import pytest
import timm
import torch
from support.networks import shake
from torch import nn

STEP = """
import hashlib, timm, torch
import torch.distributed as dist
from pathlib import Path

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)  # each process starts elsewhere: wrapping must make them equal
model = timm.create_model("test_resnet_ema", num_classes=3, zero_init_last=False)
model.load_state_dict(torch.load("start.pt")) if rank == 0 else None
ddp = torch.nn.parallel.DistributedDataParallel(model.eval())
x, y = torch.load("data.pt")
loss = torch.nn.functional.cross_entropy(ddp(x[rank::2]), y[rank::2])
loss.backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
digest = hashlib.sha256()
for parameter in model.parameters():
    digest.update(parameter.detach().numpy().tobytes())
Path(f"digest{rank}").write_text(digest.hexdigest())
if rank == 0:
    torch.save(model.state_dict(), "end.pt")
dist.destroy_process_group()
"""


@pytest.fixture
def step():
    """A network whose blocks let EMA attention learn, in eval mode, and a batch."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet_ema", num_classes=3, zero_init_last=False)
    return shake(model).eval(), torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 1])


def train(model, call, x, y):
    nn.functional.cross_entropy(call(x), y).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return model.state_dict()


@pytest.mark.slow
def test_two_processes_end_equal_and_as_one_process_does(step, tmp_path):
    model, x, y = step
    torch.save(model.state_dict(), tmp_path / "start.pt")
    torch.save((x, y), tmp_path / "data.pt")
    (tmp_path / "step.py").write_text(STEP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "step.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "digest0").read_text() == (tmp_path / "digest1").read_text()
    start = torch.load(tmp_path / "start.pt")
    expected, found = train(model, model, x, y), torch.load(tmp_path / "end.pt")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found["layer1.0.se.gn.bias"], start["layer1.0.se.gn.bias"])


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, while it compiles
def test_compiled_step_is_the_eager_one(step):
    from copy import deepcopy

    model, x, y = step
    twin = deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    expected, found = train(model, model, x, y), train(twin, compiled, x, y)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_synchronised_norms_leave_the_layer_alone(step):
    from timm.layers import convert_sync_batchnorm

    model, x, _ = step
    expected = model(x)
    converted = convert_sync_batchnorm(model).eval()
    norms = [type(m).__name__ for m in converted.modules() if "Norm" in type(m).__name__]
    assert norms.count("GroupNorm") == 4  # those of the EMA layers
    assert not norms.count("BatchNorm2d")
    torch.testing.assert_close(converted(x), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripted_network_trains_and_then_infers(step):
    model, x, y = step
    scripted = torch.jit.script(model)
    for _ in range(3):  # the interpreter specialises on what it has seen
        nn.functional.cross_entropy(scripted(x), y).backward()
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(scripted(x), model(x))
