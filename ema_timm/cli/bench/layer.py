"""``ema-timm bench layer``."""

import argparse

from ema_timm.cli.bench.measurement import add_shared_options, report


def add_kind(kinds) -> None:
    """Add the kind to ``ema-timm bench``."""
    layer = kinds.add_parser("layer", help="one layer at the shapes of ResNet-50 and MobileNetV2")
    layer.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    layer.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    layer.add_argument("--rounds", type=int, default=15, help="samples (default: %(default)s)")
    add_shared_options(layer)
    layer.set_defaults(run=_bench_layer)


def _bench_layer(args: argparse.Namespace) -> int:
    from ema_timm.bench.layer import bench_layer

    return report(
        args,
        lambda device: bench_layer(
            batch=args.batch or 8,
            rounds=args.rounds,
            device=device,
            dtype=args.dtype,
            channels_last=args.channels_last,
            compiled=not args.no_compile,
        ),
    )
