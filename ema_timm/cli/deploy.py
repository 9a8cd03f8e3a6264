"""``ema-timm export``."""

import argparse

from ema_timm.errors import UserError


def add_commands(commands) -> None:
    """Add the subcommand to the parser."""
    command = commands.add_parser(
        "export",
        help="write a trained folder as ONNX, TorchScript or torch.export (.pt2), verified",
        description="Write a checkpoint folder's network as one file into that folder. Batch, "
        "height and width stay free. The file gets its name only after it has been loaded afresh "
        "and has agreed with the network at three sizes.",
        epilog="example: ema-timm export runs/flowers --format onnx",
    )
    command.add_argument("folder", metavar="FOLDER", help="a checkpoint in timm's format")
    command.add_argument("--format", required=True, choices=("onnx", "torchscript", "pt2"))
    command.add_argument(
        "--reparam", action="store_true", help="fold what depends on weights alone first"
    )
    command.add_argument(
        "--exporter",
        default="dynamo",
        choices=("dynamo", "legacy"),
        help="PyTorch's ONNX exporter; legacy is faster (default: %(default)s)",
    )
    command.add_argument(
        "--int8", action="store_true", help="quantise the ONNX file too and report its agreement"
    )
    command.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    if args.format != "onnx" and (args.int8 or args.exporter != "dynamo"):
        raise UserError("--int8 and --exporter go with --format onnx.")
    from ema_timm.export import export, quantize_int8

    done = export(args.folder, args.format, args.reparam, args.exporter)
    sizes = ", ".join("x".join(map(str, size)) for size in done.sizes)
    print(f"{done.path}: agrees with the network at {sizes} to {done.difference:.1e}")
    if args.int8:
        small = quantize_int8(args.folder)
        print(
            f"{small.path}: differs by {small.difference:.1e}, same class for {small.same_class} "
            f"of {small.images} random images; measure its accuracy on yours"
        )
    return 0
