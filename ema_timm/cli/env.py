"""``ema-timm env``."""

import argparse


def add_commands(commands) -> None:
    """Add the subcommand to the parser."""
    command = commands.add_parser(
        "env", help="print versions and what can run here, for bug reports"
    )
    command.set_defaults(run=_env)


def _env(args: argparse.Namespace) -> int:
    from ema_timm.environment import environment

    for name, value in environment().items():
        print(f"{name}: {value}")
    return 0
