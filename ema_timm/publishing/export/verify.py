"""A written file, loaded afresh, against the network it was made from."""

from pathlib import Path

from torch import Tensor, nn

from ema_timm.errors import VerificationError, first_line
from ema_timm.publishing.export.formats import Format

TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest number of the network's output."""


def relative_difference(found: Tensor, want: Tensor) -> float:
    """Largest difference over the largest magnitude of ``want``."""
    return ((found - want).abs().max() / want.abs().max()).item()


def verify(path: Path, way: Format, model: nn.Module, inputs: list[Tensor]) -> float:
    """Compare the file with the network on every input.

    Returns:
        The largest `relative_difference`.

    Raises:
        VerificationError: If the file does not load, or does not compute what the network does.
    """
    name = way.file
    try:
        run = way.open(path)
        found = [relative_difference(run(x), model(x)) for x in inputs]
    except Exception as error:  # the runtimes' errors have nothing else in common
        raise VerificationError(
            f"{name} was not written: it does not load, or not take another size than it was "
            f"exported with ({first_line(error)}). Give the size of your images with --size, or "
            "another --format."
        ) from error
    if not all(difference <= TOLERANCE for difference in found):  # NaN fails too
        worst = max(found)
        raise VerificationError(
            f"{name} was not written: it differs from the network by {worst:.1e} of its largest "
            f"output, over {TOLERANCE:.0e}. Try another --format or --exporter."
        )
    return max(found)
