"""``ema-timm bench``: one subcommand for each kind of measurement, and for tables and pictures."""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ema_timm.errors import InterruptedRunError, UserError
from ema_timm.files import write_whole


def add_commands(commands) -> None:
    """Add the subcommand to the parser."""
    command = commands.add_parser(
        "bench",
        help="measure the cost of EMA attention and of other layers",
        description="Measure the cost of EMA attention. Each implementation must first agree with "
        "the float64 reference. All variants are timed in turn, so that a drift of the machine "
        "affects all alike.",
    )
    kinds = command.add_subparsers(metavar="KIND", required=True)
    for add in (
        _add_layer,
        _add_model,
        _add_gpu,
        _add_bytes,
        _add_deploy,
        _add_table,
        _add_picture,
    ):
        add(kinds)


def _add_layer(kinds) -> None:
    layer = _add_kind(
        kinds, "layer", _bench_layer, "measure one layer at the shapes of ResNet-50 and MobileNetV2"
    )
    dtypes = ("float32", "bfloat16", "float16")
    help = "dtype of the feature map (default: float32)"
    layer.add_argument("--dtype", default="float32", choices=dtypes, help=help)
    _add_number(layer, "--batch-size", 8, "images in a batch")
    _add_number(layer, "--rounds", 15, "samples of each variant")
    _add_flag(layer, "--no-compile", "do not measure torch.compile")
    _add_machine_options(layer)


def _bench_layer(args: argparse.Namespace) -> int:
    from ema_timm.bench.layer import bench_layer

    measure = partial(
        bench_layer,
        batch_size=args.batch_size,
        rounds=args.rounds,
        dtype=args.dtype,
        channels_last=args.channels_last,
        compiled=not args.no_compile,
    )
    return _measure_on_device(args, measure)


def _add_model(kinds) -> None:
    model = _add_kind(
        kinds, "model", _bench_model, "measure inference and a training step of whole networks"
    )
    _add_number(model, "--batch-size", None, "images in a batch (default: 8; 1 with --resolution)")
    _add_number(model, "--img-size", 224, "image size in pixels")
    _add_number(model, "--rounds", 5, "samples of each network")
    _add_flag(model, "--amp", "use bfloat16 mixed precision")
    model.add_argument(
        "--impl",
        default="auto",
        choices=("auto", "reference", "closed_form", "fused"),
        help="implementation of the EMA layers (default: auto)",
    )
    _add_flag(model, "--resolution", "measure only inference, from 224 to 1,344 pixels")
    _add_machine_options(model)


def _bench_model(args: argparse.Namespace) -> int:
    from ema_timm.bench.model import bench_model, bench_resolution

    if args.resolution:
        _refuse_with_resolution(args)
        measure = partial(bench_resolution, batch_size=args.batch_size or 1, rounds=args.rounds)
    else:
        measure = partial(
            bench_model,
            batch_size=args.batch_size or 8,
            img_size=args.img_size,
            rounds=args.rounds,
            amp=args.amp,
            channels_last=args.channels_last,
            impl=args.impl,
        )
    return _measure_on_device(args, measure)


def _refuse_with_resolution(args: argparse.Namespace) -> None:
    given = {
        "--img-size": args.img_size != 224,
        "--amp": args.amp,
        "--channels-last": args.channels_last,
        "--impl": args.impl != "auto",
    }
    if names := ", ".join(name for name, is_given in given.items() if is_given):
        raise UserError(f"--resolution measures float32 at several sizes. Remove {names}.")


def _add_gpu(kinds) -> None:
    gpu = _add_kind(
        kinds,
        "gpu",
        _bench_gpu,
        "check and measure layers and networks on a GPU (experimental)",
        "Check the parity of layers and networks on a GPU and measure them, with one JSON file as "
        "the result. Experimental: not run on a GPU yet.",
    )
    gpu.add_argument("--device", default="cuda", help="cuda, or cpu to try it (default: cuda)")
    _add_number(gpu, "--batch-size", 64, "images in a batch")
    _add_number(gpu, "--img-size", 224, "image size in pixels")
    _add_number(gpu, "--rounds", 7, "samples of each variant")
    _add_flag(gpu, "--no-compile", "do not measure torch.compile")


def _bench_gpu(args: argparse.Namespace) -> int:
    from ema_timm.bench.gpu import bench_gpu

    settings = (args.device, args.batch_size, args.img_size, args.rounds, not args.no_compile)
    return _show(args, _measure_in_parts(args, partial(bench_gpu, *settings)))


def _add_bytes(kinds) -> None:
    counts = _add_kind(
        kinds,
        "bytes",
        _bench_bytes,
        "count the bytes that a training step moves on a GPU (experimental)",
        "Count the bytes that a training step moves and saves on a GPU. No GPU is needed. "
        "Experimental: these counts have not been compared with times on a GPU yet.",
    )
    _add_number(counts, "--batch-size", 256, "images in a batch")
    _add_flag(counts, "--brief", "print only whole networks")


def _bench_bytes(args: argparse.Namespace) -> int:
    from ema_timm.bench.bytes import bench_bytes

    return _show(args, bench_bytes(batch_size=args.batch_size), args.brief)


def _add_deploy(kinds) -> None:
    deploy = _add_kind(
        kinds, "deploy", _bench_deploy, "measure exported networks in several runtimes"
    )
    deploy.add_argument(
        "--networks",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="timm names of networks without EMA layers (default: resnet50 mobilenetv2_100)",
    )
    deploy.add_argument(
        "--runtimes",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="onnxruntime, openvino, torchscript, torch.export (default: those installed)",
    )
    several = {"nargs": "+", "action": "extend"}
    _add_number(deploy, "--batch-size", None, "batch sizes to measure (default: 1 8)", **several)
    _add_number(deploy, "--img-size", 224, "image size in pixels")
    _add_number(deploy, "--rounds", 11, "samples of each network")
    _add_number(deploy, "--threads", 1, "CPU threads")
    deploy.set_defaults(device="cpu")


def _bench_deploy(args: argparse.Namespace) -> int:
    from ema_timm.bench.deploy import bench_deploy
    from ema_timm.bench.model import BASELINES
    from ema_timm.bench.runtimes import RUNTIMES, missing_packages

    for name in () if args.runtimes else RUNTIMES:
        if missing := missing_packages(name):
            install = " ".join(missing)
            print(f"{name} is skipped, not installed: pip install {install}", file=sys.stderr)
    measure = partial(
        bench_deploy,
        args.networks or BASELINES,
        args.runtimes,
        args.batch_size or (1, 8),
        args.img_size,
        args.rounds,
    )
    return _measure_on_device(args, lambda device: _measure_in_parts(args, measure))


def _add_table(kinds) -> None:
    table = kinds.add_parser("table", help="print the Markdown table of a measurement's JSON file")
    table.add_argument("file", metavar="FILE.json", help="JSON file of a measurement")
    table.add_argument(
        "--into", metavar="FILE.md", help="replace the part between its <!-- bench: … --> lines"
    )
    _add_flag(table, "--brief", "print a shorter table")
    table.set_defaults(run=_table)


def _table(args: argparse.Namespace) -> int:
    from ema_timm.bench.report.kinds import measurement, table
    from ema_timm.bench.report.markdown import put_into

    with measurement(args.file) as result:
        text = table(result, args.brief)
    if not args.into:
        print(text)
    elif put_into(args.into, result["bench"], text):
        print(f"{args.into} changed", file=sys.stderr)
    return 0


def _add_picture(kinds) -> None:
    picture = kinds.add_parser(
        "picture",
        help="draw a summary figure from the JSON files of layer and model",
        description="Draw measurements side by side, each as bars from zero: a layer's time "
        "relative to SE, or a network's training speed relative to the same network without "
        "attention layers. The PNG holds the sha256 of the files.",
    )
    picture.add_argument("files", metavar="FILE.json", nargs="+", help="of layer or model")
    picture.add_argument(
        "--output", metavar="FILE.png", required=True, help="write the figure here"
    )
    picture.set_defaults(run=_picture)


def _picture(args: argparse.Namespace) -> int:
    from ema_timm.bench.report.picture import picture

    picture(args.files, args.output)
    print(args.output)
    return 0


def _add_kind(kinds, name: str, run: Callable, help: str, description: str | None = None):
    """A parser for one kind of measurement, with the options for its results."""
    kind = kinds.add_parser(name, help=help, description=description or f"{help.capitalize()}.")
    kind.add_argument("--json", metavar="FILE", help="write the measurement to this file")
    kind.add_argument("--plot", metavar="FILE.png", help="draw the measurement to this file")
    kind.set_defaults(run=run)
    return kind


def _add_number(kind, name: str, default: int | None, help: str, **more) -> None:
    if default is not None:
        help += " (default: %(default)s)"
    kind.add_argument(name, type=int, default=default, metavar="N", help=help, **more)


def _add_flag(kind, name: str, help: str) -> None:
    kind.add_argument(name, action="store_true", help=help)


def _add_machine_options(kind) -> None:
    """Options that say how the machine is used."""
    kind.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    _add_flag(kind, "--channels-last", "use channels-last memory format")
    _add_number(kind, "--threads", None, "CPU threads (default: PyTorch's choice)")


def _measure_on_device(args: argparse.Namespace, measure: Callable[..., dict]) -> int:
    """Call ``measure(device=...)`` for the chosen device and threads, and show the result."""
    import torch

    from ema_timm.environment import pick_device

    if args.threads:
        torch.set_num_threads(args.threads)
    return _show(args, measure(device=pick_device(args.device)))


def _measure_in_parts(args: argparse.Namespace, measure: Callable[..., dict]) -> dict:
    """Call ``measure(keep=...)``, and write the JSON file after each part.

    Raises:
        InterruptedRunError: If Ctrl-C stopped it after the first part; the result so far is shown.
    """
    found: list[dict] = []

    def keep(result: dict) -> None:
        found[:] = [result]
        if args.json:
            _write(args.json, result)

    try:
        return measure(keep=keep)
    except KeyboardInterrupt:
        if not found:
            raise
        _show(args, found[0])
        where = f" and in {args.json}" if args.json else ""
        raise InterruptedRunError(f"stopped: the result so far is above{where}") from None


def _show(args: argparse.Namespace, result: dict, brief: bool = False) -> int:
    """Print the table, write the files, and return 1 if a variant failed parity."""
    from ema_timm.bench.report.kinds import table
    from ema_timm.bench.report.picture import plot

    if args.json:
        _write(args.json, result)
    print(table(result, brief))
    if args.plot:
        plot(result, args.plot)
    return 0 if all(row.get("parity", True) for row in result["rows"]) else 1


def _write(file: str, result: dict) -> None:
    text = json.dumps(result, indent=1) + "\n"
    write_whole(Path(file), lambda path: path.write_text(text))
