"""Train the runs of a comparison on a Ray cluster, one GPU each.

    python compare_on_ray.py runs/compare --model resnet50 --data-dir flowers --seeds 5

The arguments are the folder of the comparison and other options of ``ema-timm compare``. All machines
need ema-timm and the same file system. Ray starts a run again if its worker dies, and the run
continues where its last state was saved. If some runs fail, the same command trains only these.
"""

import shlex
import subprocess
import sys

import ray

output, *options = sys.argv[1:]
compare = [sys.executable, "-m", "ema_timm", "compare", "--output", output]


@ray.remote(max_retries=5, retry_exceptions=[subprocess.CalledProcessError])
def train(line: str) -> None:
    subprocess.run(
        [sys.executable, "-m", *shlex.split(line.replace("ema-timm", "ema_timm", 1))], check=True
    )


ray.init()
gpus = 1 if ray.cluster_resources().get("GPU") else 0
lines = subprocess.run(
    [*compare, *options, "--list"], check=True, text=True, stdout=subprocess.PIPE
)
left = [train.options(num_gpus=gpus).remote(line) for line in lines.stdout.splitlines()]
while left:
    (done, *_), left = ray.wait(left)
    try:
        ray.get(done)
    except ray.exceptions.RayError as error:
        print(f"a run failed: {error}", file=sys.stderr)
sys.exit(subprocess.run([*compare, "--collect"]).returncode)
