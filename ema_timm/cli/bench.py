"""``ema-timm bench``."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from ema_timm.errors import UserError


def add_commands(commands) -> None:
    """Add the subcommand to the parser."""
    command = commands.add_parser(
        "bench",
        help="measure what EMA attention costs beside timm's other attention layers",
        description="Parity with the float64 definition is checked before anything is timed; "
        "variants are timed in turn, so that ratios hold when the machine drifts.",
    )
    kinds = command.add_subparsers(metavar="KIND", required=True)
    layer = kinds.add_parser("layer", help="one layer at the shapes of ResNet-50 and MobileNetV2")
    layer.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    layer.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    layer.add_argument("--rounds", type=int, default=15, help="samples (default: %(default)s)")
    layer.set_defaults(run=_bench_layer)
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
    model.set_defaults(run=_bench_model)
    for kind in (layer, model):
        kind.add_argument("--batch", type=int, help="images (default: 8; 1 with --resolution)")
        kind.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
        kind.add_argument("--channels-last", action="store_true", help="memory format")
        kind.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
        kind.add_argument("--json", metavar="FILE", help="write the measurement here")
        kind.add_argument("--plot", metavar="FILE.png", help="draw it here")
    table = kinds.add_parser("table", help="the Markdown table of a measurement's JSON")
    table.add_argument("file", metavar="FILE.json")
    table.add_argument(
        "--into", metavar="FILE.md", help="replace the part between its <!-- bench: … --> lines"
    )
    table.add_argument("--brief", action="store_true", help="medians only, all shapes in one")
    table.set_defaults(run=_bench_table)


def _bench_layer(args: argparse.Namespace) -> int:
    from ema_timm.bench.layer import bench_layer

    return _report(
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


def _bench_model(args: argparse.Namespace) -> int:
    from ema_timm.bench.model import bench_model, bench_resolution

    if args.resolution:
        ignored = {
            "--size": args.size != 224,
            "--amp": args.amp,
            "--channels-last": args.channels_last,
            "--impl": args.impl != "auto",
        }
        if any(ignored.values()):
            names = ", ".join(name for name, given in ignored.items() if given)
            raise UserError(f"--resolution measures in float32 at its own sizes: drop {names}.")
        return _report(
            args,
            lambda device: bench_resolution(
                batch=args.batch or 1, rounds=args.rounds, device=device
            ),
        )
    return _report(
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


def _report(args: argparse.Namespace, measure: Callable[[str], dict]) -> int:
    """Measure, print the table, write what was asked for; 1 where a variant failed parity."""
    import torch

    from ema_timm.bench.report import plot, table
    from ema_timm.measure.device import pick_device

    if args.threads:
        torch.set_num_threads(args.threads)
    result = measure(pick_device(args.device))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    if args.plot:
        plot(result, args.plot)
    return 0 if all(row.get("parity", True) for row in result["rows"]) else 1


def _bench_table(args: argparse.Namespace) -> int:
    from ema_timm.bench.report import put_into, table

    try:
        result = json.loads(Path(args.file).read_text())
        text = table(result, args.brief)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{args.file} is not a measurement of ema-timm bench --json.") from error
    if not args.into:
        print(text)
    elif put_into(args.into, result["bench"], text):
        print(f"{args.into} changed", file=sys.stderr)
    return 0
