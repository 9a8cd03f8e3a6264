"""One run on two machines: two agents of torchrun on this one, also as SLURM starts them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.runs import cli

from ema_timm.training.resume import RunState

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

RENDEZVOUS = {
    "static": "--node-rank {node} --master-addr 127.0.0.1 --master-port {port}",
    "c10d": "--rdzv-backend c10d --rdzv-id 17 --rdzv-endpoint 127.0.0.1:{port} "
    "--local-addr 127.0.0.1",
}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@contextlib.contextmanager
def two_agents(rendezvous, folder, args, restarts):
    """Two agents with one process each, and the file that both write to; killed in the end."""
    log, port, agents = folder / "log.txt", free_port(), []
    with log.open("a") as output:
        for node in "01":
            where = RENDEZVOUS[rendezvous].format(node=node, port=port).split()
            start = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", f"--max-restarts={restarts}"]
            start += where
            started = [*start, "-m", "ema_timm", *args]
            env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            agents.append(subprocess.Popen(started, stdout=output, stderr=output, env=env))
    try:
        yield agents, log
    finally:
        for agent in agents:
            agent.terminate()  # its processes end with it
        for agent in agents:
            agent.wait(60)


def wait_for(text, log, seconds=240):
    until = time.monotonic() + seconds
    while text not in (said := log.read_text()):
        assert time.monotonic() < until, said
        time.sleep(0.1)
    return said


def workers(agent):
    """Ids of the processes that an agent of torchrun started."""
    return [
        int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    ]


@pytest.mark.long
def test_sigterm_on_one_machine_stops_the_run_on_both_and_the_same_command_continues(
    config, tmp_path
):
    args = cli(config, "--resume", "--epochs", 500, "--batch-size", 6, "--workers", 1)
    with two_agents("static", tmp_path, args, restarts=0) as (agents, log):
        wait_for("epoch 2/", log)
        agents[1].send_signal(signal.SIGTERM)
        assert [agent.wait(120) for agent in agents] == [1, 1]  # torchrun's own code
        said = log.read_text()
        assert said.count("ema-timm: stopped; continue with") == 1, said
    state = RunState(config.output).load()
    position = f"from epoch {state['epoch'] + 1}, step {state['step'] + 1}"
    with two_agents("static", tmp_path, args, restarts=0) as (_, log):
        wait_for(position, log)
    assert "connectFullMesh" not in log.read_text()


@pytest.mark.long
def test_torchrun_restarts_a_run_on_two_machines_after_a_kill_and_it_continues(config, tmp_path):
    """Only with the c10d rendezvous, and a store for each start: see the guide."""
    args = cli(config, "--resume", "--epochs", 500, "--batch-size", 6, "--workers", 1)
    with two_agents("c10d", tmp_path, args, restarts=2) as (agents, log):
        wait_for("epoch 2/", log)
        os.kill(workers(agents[1])[0], signal.SIGKILL)
        said = wait_for("from epoch", log)
        assert said.count("lost the connection to another process") == 1, said
        for agent in agents:
            agent.send_signal(signal.SIGTERM)
        wait_for("ema-timm: stopped; continue with", log)
    assert RunState(config.output).load()["epoch"] >= 2


SLURM = {
    # Starts a task for each machine. It answers SIGTERM as the real one does.
    "srun": "trap 'kill -9 $(cat tasks)' TERM\nfor i in 0 1; do SLURM_PROCID=$i SLURM_NTASKS=2 "
    'SLURM_LOCALID=0 "$@" & echo $! >> tasks; done\nwait; wait; rm tasks',
    "scancel": '[ "$1" = --signal=TERM ] && kill -TERM $(cat tasks)',
    "scontrol": 'case "$1" in show) echo 127.0.0.1; echo 127.0.0.1;;\n'
    'requeue) echo "$2" > requeued;; esac',
}


@pytest.fixture
def slurm(tmp_path):
    """Runs a script as SLURM does until a line of output appears, then signals it."""

    def submit(script, until):
        log = tmp_path / "slurm.txt"
        env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        env |= {"SLURM_JOB_ID": "17", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "here[1-2]"}
        with log.open("w") as output:
            job = subprocess.Popen(
                ["bash", script], cwd=tmp_path, stdout=output, stderr=output,
                env={**os.environ, **env, "SLURM_ARRAY_TASK_ID": "2"},
            )  # fmt: skip
        try:
            wait_for(until, log)
            job.send_signal(signal.SIGUSR1)
            job.wait(120)
        finally:
            job.kill()
        assert (tmp_path / "requeued").read_text() == "17\n"
        (tmp_path / "requeued").unlink()
        return log.read_text()

    (tmp_path / "bin").mkdir()
    for name, text in {
        **SLURM,
        "torchrun": f'exec {" ".join(TORCHRUN)} "$@"',
        "ema-timm": f'exec {sys.executable} -m ema_timm "$@"',
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return submit


@pytest.mark.long
def test_the_script_for_slurm_is_requeued_and_continues(config, slurm, tmp_path):
    text = (EXAMPLES / "finetune.sbatch").read_text()
    settings = " ".join(cli(config, "--epochs", 500, "--batch-size", 6)[1:])
    for old, new in {
        "--nproc-per-node 4": "--nproc-per-node 1",
        "29500": free_port(),
        "--model resnet50_ema --data-dir flowers --output runs/flowers": settings,
    }.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "finetune.sbatch").write_text(text)
    saved, epochs = RunState(config.output), []
    for _ in range(2):
        said = slurm("finetune.sbatch", f"epoch {(epochs or [0])[-1] + 2}/")
        assert said.count("ema-timm: stopped; continue with") == 1, said
        epochs.append(saved.load()["epoch"])
        assert ("from epoch" in said) == (len(epochs) > 1), said
    assert epochs[0] >= 2 and epochs[1] > epochs[0]


@pytest.mark.long
def test_a_task_of_the_array_is_requeued_and_continues(config, slurm, tmp_path):
    (tmp_path / "compare.sbatch").write_text((EXAMPLES / "compare.sbatch").read_text())
    line = " ".join(["ema-timm", *cli(config, "--resume", "--epochs", 500)])
    (tmp_path / "runs.txt").write_text(f"false\n{line}\nfalse\n")
    slurm("compare.sbatch", "epoch 2/")
    said = slurm("compare.sbatch", "from epoch")
    assert said.count("ema-timm: stopped; continue with") == 1, said
    assert RunState(config.output).load()["epoch"] >= 2
