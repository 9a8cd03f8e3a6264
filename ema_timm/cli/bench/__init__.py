"""``ema-timm bench``: one file a kind of measurement, one line here."""

from ema_timm.cli.bench import bytes as moved
from ema_timm.cli.bench import deploy, gpu, layer, model, picture, table


def add_commands(commands) -> None:
    """Add the subcommand to the parser."""
    command = commands.add_parser(
        "bench",
        help="measure what EMA attention costs beside timm's other attention layers",
        description="Parity with the float64 definition is checked before anything is timed; "
        "variants are timed in turn, so that ratios hold when the machine drifts.",
    )
    kinds = command.add_subparsers(metavar="KIND", required=True)
    for kind in (layer, model, gpu, moved, deploy, table, picture):
        kind.add_kind(kinds)
