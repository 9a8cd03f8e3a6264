"""``ema-timm bench bytes``."""

import argparse

from ema_timm.cli.bench.measurement import add_output_options, show


def add_kind(kinds) -> None:
    """Add the kind to ``ema-timm bench``."""
    counts = kinds.add_parser(
        "bytes", help="what a training step moves and keeps on a GPU, counted without one"
    )
    counts.add_argument("--batch", type=int, default=256, help="images (default: %(default)s)")
    counts.add_argument("--brief", action="store_true", help="whole networks alone")
    add_output_options(counts)
    counts.set_defaults(run=_bench_bytes)


def _bench_bytes(args: argparse.Namespace) -> int:
    from ema_timm.bench.bytes import bench_bytes

    return show(args, bench_bytes(batch=args.batch), args.brief)
