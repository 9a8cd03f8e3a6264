"""``ema-timm bench gpu``."""

import argparse
from functools import partial

from ema_timm.cli.bench.measurement import add_output_options, measure_in_parts, show


def add_kind(kinds) -> None:
    """Add the kind to ``ema-timm bench``."""
    gpu = kinds.add_parser(
        "gpu", help="parity, layers and networks on a GPU in one go, one JSON to send"
    )
    gpu.add_argument("--device", default="cuda", help="cpu tries the command (default: cuda)")
    gpu.add_argument("--batch", type=int, default=64, help="images (default: %(default)s)")
    gpu.add_argument("--size", type=int, default=224, help="pixels (default: %(default)s)")
    gpu.add_argument("--rounds", type=int, default=7, help="samples (default: %(default)s)")
    gpu.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    add_output_options(gpu)
    gpu.set_defaults(run=_bench_gpu)


def _bench_gpu(args: argparse.Namespace) -> int:
    from ema_timm.bench.gpu import bench_gpu

    settings = (args.device, args.batch, args.size, args.rounds, not args.no_compile)
    return show(args, measure_in_parts(args, partial(bench_gpu, *settings)))
