"""``ema-timm bench table``: a measurement made before, as Markdown."""

import argparse
import sys


def add_kind(kinds) -> None:
    """Add it to ``ema-timm bench``."""
    table = kinds.add_parser("table", help="the Markdown table of a measurement's JSON")
    table.add_argument("file", metavar="FILE.json")
    table.add_argument(
        "--into", metavar="FILE.md", help="replace the part between its <!-- bench: … --> lines"
    )
    table.add_argument("--brief", action="store_true", help="medians only, all shapes in one")
    table.set_defaults(run=_bench_table)


def _bench_table(args: argparse.Namespace) -> int:
    from ema_timm.bench.report.kinds import measurement, table
    from ema_timm.bench.report.markdown import put_into

    with measurement(args.file) as result:
        text = table(result, args.brief)
    if not args.into:
        print(text)
    elif put_into(args.into, result["bench"], text):
        print(f"{args.into} changed", file=sys.stderr)
    return 0
