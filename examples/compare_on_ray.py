"""Train the runs of a comparison on a Ray cluster, one GPU each.

    python compare_on_ray.py runs/compare --model resnet50 --data-dir flowers --seeds 5

The arguments are the folder of the comparison and other options of ``ema-timm compare``. All
machines need ema-timm and the same file system. If a worker dies, Ray starts its run again, which
continues from its last saved state. If a run fails, the same command trains only what is left.
"""

import shlex
import subprocess
import sys

import ray

output, *options = sys.argv[1:]
ema_timm = [sys.executable, "-m", "ema_timm"]
compare = [*ema_timm, "compare", "--output", output]


@ray.remote(max_retries=5, retry_exceptions=[subprocess.CalledProcessError])
def train(line: str) -> None:
    """Run one line of ``ema-timm compare --list``."""
    subprocess.run([*ema_timm, *shlex.split(line)[1:]], check=True)


ray.init()
gpus = 1 if ray.cluster_resources().get("GPU") else 0
listed = subprocess.run(
    [*compare, *options, "--list"], check=True, text=True, stdout=subprocess.PIPE
).stdout
left = [train.options(num_gpus=gpus).remote(line) for line in listed.splitlines()]
while left:
    (done,), left = ray.wait(left)
    try:
        ray.get(done)
    except ray.exceptions.RayError as error:
        print(f"a run failed: {error}", file=sys.stderr)
sys.exit(subprocess.run([*compare, "--collect"]).returncode)
