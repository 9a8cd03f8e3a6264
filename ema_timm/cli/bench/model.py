"""``ema-timm bench model``, with ``--resolution`` too."""

import argparse

from ema_timm.cli.bench.measurement import add_shared_options, report
from ema_timm.errors import UserError


def add_kind(kinds) -> None:
    """Add the kind to ``ema-timm bench``."""
    model = kinds.add_parser("model", help="whole networks: inference and a training step")
    model.add_argument("--size", type=int, default=224, help="pixels (default: %(default)s)")
    model.add_argument("--amp", action="store_true", help="bfloat16 mixed precision")
    model.add_argument(
        "--impl",
        default="auto",
        choices=("auto", "reference", "closed_form", "fused"),
        help="who computes the EMA layers (default: %(default)s)",
    )
    model.add_argument(
        "--resolution",
        action="store_true",
        help="instead, how inference grows from 224 to 1,344 px",
    )
    model.add_argument("--rounds", type=int, default=5, help="samples (default: %(default)s)")
    add_shared_options(model)
    model.set_defaults(run=_bench_model)


def _bench_model(args: argparse.Namespace) -> int:
    if args.resolution:
        return _bench_resolution(args)
    from ema_timm.bench.model import bench_model

    return report(
        args,
        lambda device: bench_model(
            batch=args.batch or 8,
            size=args.size,
            rounds=args.rounds,
            device=device,
            amp=args.amp,
            channels_last=args.channels_last,
            impl=args.impl,
        ),
    )


def _bench_resolution(args: argparse.Namespace) -> int:
    ignored = {
        "--size": args.size != 224,
        "--amp": args.amp,
        "--channels-last": args.channels_last,
        "--impl": args.impl != "auto",
    }
    if any(ignored.values()):
        names = ", ".join(name for name, given in ignored.items() if given)
        raise UserError(f"--resolution measures in float32 at its own sizes: drop {names}.")
    from ema_timm.bench.model import bench_resolution

    return report(
        args,
        lambda device: bench_resolution(batch=args.batch or 1, rounds=args.rounds, device=device),
    )
