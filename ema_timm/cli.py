"""The command ``ema-timm``: each subcommand parses, makes one library call and prints.

Results go to stdout, messages to stderr. Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped.
"""

import argparse
import ast
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ema_timm import __version__
from ema_timm.errors import InterruptedRunError, UserError
from ema_timm.finetune_config import FinetuneConfig, option_fields


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except UserError as error:
        # A loader process wraps the message in its traceback; the message is the last line.
        print(f"ema-timm: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 2
    except InterruptedRunError as error:
        print(f"ema-timm: {error}", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"ema-timm: {error}. What was saved before is whole.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ema-timm: stopped.", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The command line, built without importing torch."""
    parser = argparse.ArgumentParser(
        prog="ema-timm",
        description="EMA attention (Efficient Multi-scale Attention) for timm: train, measure, "
        "publish. Not an exponential moving average.",
    )
    parser.add_argument("--version", action="version", version=f"ema-timm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_finetune(commands)
    _add_quickstart(commands)
    _add_bench(commands)
    _add_env(commands)
    return parser


def _add_finetune(commands) -> None:
    command = commands.add_parser(
        "finetune",
        help="fine-tune a timm model on an image folder",
        description="Fine-tune any timm model on an image folder and write a checkpoint folder "
        "in timm's Hub format. Also runs under torchrun.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="example: ema-timm finetune --model resnet50_ema --data-dir flowers "
        "--output runs/flowers; after an interruption: "
        "ema-timm finetune --resume --output runs/flowers",
    )
    for field in option_fields():
        _add_option(command, field)
    command.add_argument(
        "--resume",
        action="store_true",
        help="continue the interrupted run in --output, with its settings",
    )
    command.set_defaults(run=_finetune)


def _add_option(command: argparse.ArgumentParser, field) -> None:
    """One option for one setting; what is not given stays out of the namespace."""
    flag = "--" + field.name.replace("_", "-")
    help = field.metadata["help"]
    shown = {"default": argparse.SUPPRESS}
    if field.metadata.get("pairs"):
        command.add_argument(flag, nargs="+", type=_pair, metavar="KEY=VALUE", help=help, **shown)
    elif field.metadata.get("flag"):
        command.add_argument(flag, action=argparse.BooleanOptionalAction, help=help, **shown)
    else:
        kind = type(field.default)
        if field.default or kind is float:
            help = f"{help} (default: {field.default})"
        choices = field.metadata.get("choices")
        metavar = None if choices else kind.__name__.upper()
        command.add_argument(flag, type=kind, choices=choices, metavar=metavar, help=help, **shown)


def _pair(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _finetune(args: argparse.Namespace) -> int:
    given = {f.name: getattr(args, f.name) for f in option_fields() if hasattr(args, f.name)}
    if "model_kwargs" in given:
        given["model_kwargs"] = dict(given["model_kwargs"])
    required = ["output"] if args.resume else ["model", "data_dir", "output"]
    missing = [f"--{name.replace('_', '-')}" for name in required if not given.get(name)]
    if missing:
        raise UserError(f"finetune needs {', '.join(missing)}; see ema-timm finetune --help.")

    from ema_timm.finetune import finetune
    from ema_timm.run_folder import RunFolder

    if args.resume:
        folder = RunFolder(given["output"])
        folder.prepare(resume=True)
        given = {**folder.load_state()["config"], **given}
    results = finetune(FinetuneConfig(**given), resume=args.resume)
    metrics = results["metrics"]
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        print(f"{given['output']}: top-1 {metrics['top1']:.2f}% of {metrics['images']} images")
    return 0


def _add_quickstart(commands) -> None:
    command = commands.add_parser(
        "quickstart",
        help="train a small EMA model on handwritten digits, offline, in about a minute",
        description="Fine-tune a small EMA model on the handwritten digits of scikit-learn, "
        "reload it by name in a fresh process and check that it is the same. Needs no network.",
    )
    command.add_argument(
        "--output", default="runs/quickstart", help="folder to write (default: %(default)s)"
    )
    command.set_defaults(run=_quickstart)


def _quickstart(args: argparse.Namespace) -> int:
    from ema_timm.quickstart import quickstart

    print(quickstart(args.output))
    return 0


def _add_bench(commands) -> None:
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
        ),
    )


def _report(args: argparse.Namespace, measure: Callable[[str], dict]) -> int:
    """Measure, print the table, write what was asked for; 1 where a variant failed parity."""
    import torch

    from ema_timm.base_model import pick_device
    from ema_timm.bench.report import plot, table

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


def _add_env(commands) -> None:
    command = commands.add_parser("env", help="versions and what can run here, for bug reports")
    command.set_defaults(run=_env)


def _env(args: argparse.Namespace) -> int:
    import torch

    from ema_timm.ops import closed_form_native
    from ema_timm.reproducible import versions

    for name, version in versions().items():
        print(f"{name}: {version}")
    print(
        f"closed_form on the CPU: {closed_form_native.status()}, {torch.get_num_threads()} threads"
    )
    cuda = torch.cuda.is_available()
    print(f"CUDA: {torch.cuda.get_device_name() if cuda else 'not available'}")
    return 0
