"""``ema-timm bench picture``: measurements made before, at a glance."""

import argparse


def add_kind(kinds) -> None:
    """Add it to ``ema-timm bench``."""
    picture = kinds.add_parser(
        "picture",
        help="what EMA attention costs at a glance, of several measurements' JSON",
        description="Draw measurements side by side, each as bars from zero: a layer's time "
        "relative to SE, a network's training speed relative to the plain network. The PNG holds "
        "the sha256 of the files.",
    )
    picture.add_argument("files", metavar="FILE.json", nargs="+", help="of layer or model")
    picture.add_argument("--output", metavar="FILE.png", required=True, help="the picture")
    picture.set_defaults(run=_bench_picture)


def _bench_picture(args: argparse.Namespace) -> int:
    from ema_timm.bench.report.picture import picture

    picture(args.files, args.output)
    print(args.output)
    return 0
