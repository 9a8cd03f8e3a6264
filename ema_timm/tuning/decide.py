"""For each layer: check the parity of every candidate, time it, and choose."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ema_timm.bench.parity import PARITY_TOLERANCE, Candidate, Case, call_of, error_of, make_case
from ema_timm.bench.timing import Clock, round_robin
from ema_timm.errors import VerificationError, first_line
from ema_timm.ops.gpu.choice_file import Layer
from ema_timm.tuning.store import ACCEPTED, CORRECT, REJECTED, Store

DEFAULT = "closed_form"
"""The implementation that runs without a choice. It needs no TRYING record before it runs."""
FASTER = 0.95
"""Another candidate replaces `DEFAULT` only if it takes less than this part of its time."""
ROUNDS = 11
"""Samples of each call."""
SAMPLE_MS = 5.0
"""Length of a sample."""


@dataclass(frozen=True)
class LayerChoice:
    """The choice for one layer.

    Args:
        layer: The layer.
        chosen: The implementation; None if no candidate can run.
        candidates: For each its ``state``, and ``reason``, ``error`` and ``ms`` if it has them.
        remembered: Whether it was measured before.
    """

    layer: Layer
    chosen: str | None
    candidates: dict[str, dict[str, Any]]
    remembered: bool


def decide(
    layers: Mapping[Layer, torch.dtype],
    candidates: Mapping[str, Candidate],
    store: Store,
    clock: Clock,
    retry: bool = False,
    progress: bool = True,
) -> list[LayerChoice]:
    """Choose among ``candidates`` at each layer, and record the choice.

    Args:
        layers: The layers, each with the dtype of its parameters.
        candidates: Implementations by name.
        store: The records.
        clock: The clock of the device.
        retry: Clear the records of ``layers``, and enable all disabled candidates.
        progress: Show a bar (on a terminal).

    Raises:
        VerificationError: If a candidate broke the device for this process.
    """
    choices = []
    with store.hold(retry, layers), _as_in_training(clock.device):
        bar = tqdm(layers, "layers", disable=None if progress else True, leave=False)
        for layer in bar:
            bar.set_postfix_str(str(layer))
            remembered = store.is_complete(layer, candidates)
            if not remembered:
                _choose(layer, layers[layer], candidates, store, clock)
            found = store.records.layers[layer]
            chosen = store.records.chosen.get(layer)
            choices.append(LayerChoice(layer, chosen, dict(found), remembered))
    return choices


@contextlib.contextmanager
def _as_in_training(device: torch.device) -> Iterator[None]:
    """Record gradients and switch autocast off, regardless of the caller's settings."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield


def _choose(
    layer: Layer,
    dtype: torch.dtype,
    candidates: Mapping[str, Candidate],
    store: Store,
    clock: Clock,
) -> None:
    case = make_case(layer, dtype, clock.device)
    correct = [n for n, run in candidates.items() if _is_correct(n, run, layer, case, store, clock)]
    calls = {name: call_of(candidates[name], case) for name in correct}
    times = round_robin(calls, ROUNDS, clock, progress=False, sample_ms=SAMPLE_MS)
    medians = {name: timing.median for name, timing in times.items()}
    chosen = _fastest(medians)
    for name, ms in medians.items():
        if name == chosen:
            store.record(layer, name, ACCEPTED, ms=ms)
        else:
            store.record(layer, name, REJECTED, ms=ms, reason=_slower(medians, name, chosen))
    store.choose(layer, chosen)


def _is_correct(
    name: str, run: Candidate, layer: Layer, case: Case, store: Store, clock: Clock
) -> bool:
    """Whether a candidate runs and agrees with the reference; otherwise record the reason."""
    if name in store.records.disabled:
        store.record(layer, name, REJECTED, reason=store.records.disabled[name])
        return False
    with store.trying(layer, name, marked=name != DEFAULT):
        try:
            error = error_of(run, case)
            clock.wait()
        except Exception as raised:  # any exception is a reason to reject, and is shown
            reason = f"{type(raised).__name__}: {first_line(raised)}"
            _require_working_gpu(clock, store, layer, name, reason)
            store.record(layer, name, REJECTED, reason=reason)
            return False
        limit = PARITY_TOLERANCE[case.x.dtype]
        if error > limit:
            reason = f"failed parity: error {error:.1e} over {limit:.0e}"
            store.record(layer, name, REJECTED, reason=reason)
            return False
        store.record(layer, name, CORRECT, error=error)
    return True


def _require_working_gpu(clock: Clock, store: Store, layer: Layer, name: str, reason: str) -> None:
    """Disable a candidate after which the GPU cannot compute anything in this process.

    Raises:
        VerificationError: If that is so.
    """
    try:
        clock.wait()
    except RuntimeError as error:
        store.disable(layer, name, f"it broke the GPU for its process at {layer} ({reason})")
        raise VerificationError(
            f"{name} broke the GPU for this process at {layer}: {reason}. It is now disabled: run "
            "the same command again to continue without it."
        ) from error


def _fastest(times: Mapping[str, float]) -> str | None:
    """The fastest candidate; `DEFAULT` unless another one is clearly faster."""
    if not times:
        return None
    best = min(times, key=times.__getitem__)
    if DEFAULT in times and times[best] >= FASTER * times[DEFAULT]:
        return DEFAULT
    return best


def _slower(times: Mapping[str, float], name: str, chosen: str) -> str:
    ratio = times[name] / times[chosen]
    limit = f", not below {FASTER}" if ratio < 1 else ""
    return f"{ratio:.2f} of {chosen}'s time{limit}"
