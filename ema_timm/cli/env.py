"""``ema-timm env``."""

import argparse


def add_commands(commands) -> None:
    """Add the subcommand to the parser."""
    command = commands.add_parser("env", help="versions and what can run here, for bug reports")
    command.set_defaults(run=_env)


def _env(args: argparse.Namespace) -> int:
    import torch

    from ema_timm.measure.versions import versions
    from ema_timm.ops.closed_form import native
    from ema_timm.ops.dispatch import fused_unavailable

    for name, version in versions().items():
        print(f"{name}: {version}")
    cuda = torch.cuda.is_available()
    print(f"CUDA: {torch.cuda.get_device_name() if cuda else 'not available'}")
    print("reference: runs anywhere")
    print(
        f"closed_form: runs anywhere; on the CPU {native.status()}, "
        f"{torch.get_num_threads()} threads"
    )
    probe = torch.empty(1, 1, 1, 1, device="cuda" if cuda else "cpu")
    reason = fused_unavailable(probe, probe[0, 0, 0])
    print(f"fused: {f'cannot run here: {reason}' if reason else 'runs'}")
    return 0
