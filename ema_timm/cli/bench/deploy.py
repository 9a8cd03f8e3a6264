"""``ema-timm bench deploy``."""

import argparse
import sys
from functools import partial

from ema_timm.cli.bench.measurement import measure_in_parts, report


def add_kind(kinds) -> None:
    """Add the kind to ``ema-timm bench``."""
    deploy = kinds.add_parser(
        "deploy", help="exported networks in other runtimes, relative to the plain twin"
    )
    deploy.add_argument(
        "--networks",
        nargs="+",
        metavar="NAME",
        help="timm names (default: resnet50 mobilenetv2_100)",
    )
    deploy.add_argument(
        "--runtimes",
        nargs="+",
        metavar="NAME",
        help="onnxruntime, openvino, torchscript, torch.export (default: those installed)",
    )
    deploy.add_argument(
        "--batch", type=int, nargs="+", default=[1, 8], help="images (default: 1 8)"
    )
    deploy.add_argument("--size", type=int, default=224, help="pixels (default: %(default)s)")
    deploy.add_argument("--rounds", type=int, default=11, help="samples (default: %(default)s)")
    deploy.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    deploy.add_argument("--json", metavar="FILE", help="write the measurement here")
    deploy.add_argument("--plot", metavar="FILE.png", help="draw it here")
    deploy.set_defaults(run=_bench_deploy, device="cpu")


def _bench_deploy(args: argparse.Namespace) -> int:
    from ema_timm.bench.deploy import NETWORKS, bench_deploy
    from ema_timm.bench.runtimes import RUNTIMES, missing_packages

    for name in () if args.runtimes else RUNTIMES:
        if missing := missing_packages(name):
            needs = " ".join(missing)
            print(f"{name} is left out, not installed: pip install {needs}", file=sys.stderr)
    settings = (args.networks or NETWORKS, args.runtimes, args.batch, args.size, args.rounds)
    return report(args, lambda _: measure_in_parts(args, partial(bench_deploy, *settings)))
