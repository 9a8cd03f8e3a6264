"""For each layer: parity of every candidate, then time, then the choice and its reasons."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ema_timm.bench.parity import Candidate, Case, call_of, error_of, make_case, tolerance
from ema_timm.bench.timing import Clock, medians
from ema_timm.errors import VerificationError, first_line
from ema_timm.ops.gpu.choices import Layer
from ema_timm.tuning.store import ACCEPTED, REJECTED, SOUND, Store

BASE = "closed_form"
"""What runs where nobody was chosen; it needs no mark before it runs."""
FASTER = 0.95
"""A candidate takes the place of `BASE` below this part of its time."""


@dataclass(frozen=True)
class Outcome:
    """What became of one layer.

    Args:
        layer: The layer.
        chosen: Who computes it; None where no candidate can.
        candidates: For each its state, and ``reason``, ``error`` and ``ms`` where it has them.
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
) -> list[Outcome]:
    """Choose among ``candidates`` at each layer, and note it.

    Args:
        layers: What to choose for, with the type of the parameters.
        candidates: Implementations by name.
        store: The notes.
        clock: Of the device.
        retry: Forget what is noted of ``layers``, and which candidates are barred.
        progress: Show a bar (on a terminal).

    Raises:
        VerificationError: If a candidate broke the device for this process.
    """
    outcomes = []
    with store.hold(retry, layers), _as_where_networks_train(clock.device):
        bar = tqdm(layers, "layers", disable=None if progress else True, leave=False)
        for layer in bar:
            bar.set_postfix_str(str(layer))
            remembered = store.known(layer, candidates)
            if not remembered:
                _choose(layer, layers[layer], candidates, store, clock)
            found = store.notes.layers[layer]
            chosen = store.notes.chosen.get(layer)
            outcomes.append(Outcome(layer, chosen, dict(found), remembered))
    return outcomes


@contextlib.contextmanager
def _as_where_networks_train(device: torch.device) -> Iterator[None]:
    """Gradients are recorded, and a backward runs outside of autocast, whatever the caller does."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield


def _choose(
    layer: Layer,
    kind: torch.dtype,
    candidates: Mapping[str, Candidate],
    store: Store,
    clock: Clock,
) -> None:
    case = make_case(layer, kind, clock.device)
    sound = [n for n, run in candidates.items() if _is_sound(n, run, layer, case, store, clock)]
    times = medians({name: call_of(candidates[name], case) for name in sound}, clock)
    chosen = _fastest(times)
    for name, ms in times.items():
        if name == chosen:
            store.note(layer, name, ACCEPTED, ms=ms)
        else:
            store.note(layer, name, REJECTED, ms=ms, reason=_slower(times, name, chosen))
    store.choose(layer, chosen)


def _is_sound(
    name: str, run: Candidate, layer: Layer, case: Case, store: Store, clock: Clock
) -> bool:
    """Whether a candidate runs and agrees with the definition; noted with the reason if not."""
    if name in store.notes.barred:
        store.note(layer, name, REJECTED, reason=store.notes.barred[name])
        return False
    with store.trying(layer, name, marked=name != BASE):
        try:
            error = error_of(run, case)
            clock.wait()
        except Exception as raised:  # whatever it raises is its reason, and is shown
            reason = f"{type(raised).__name__}: {first_line(raised)}"
            _require_alive(clock, store, layer, name, reason)
            store.note(layer, name, REJECTED, reason=reason)
            return False
        limit = tolerance(layer)
        if error > limit:
            reason = f"failed parity: error {error:.1e} over {limit:.0e}"
            store.note(layer, name, REJECTED, reason=reason)
            return False
        store.note(layer, name, SOUND, error=error)
    return True


def _require_alive(clock: Clock, store: Store, layer: Layer, name: str, reason: str) -> None:
    """After a fault of the GPU nothing more can be computed in this process."""
    try:
        clock.wait()
    except RuntimeError as error:
        store.bar(layer, name, f"it broke the GPU for its process at {layer} ({reason})")
        raise VerificationError(
            f"{name} broke the GPU for this process at {layer}: {reason}. It is noted: start "
            "again, and it is not tried."
        ) from error


def _fastest(times: Mapping[str, float]) -> str | None:
    """Who computes from now on: not `BASE` only where another is clearly faster."""
    if not times:
        return None
    best = min(times, key=times.__getitem__)
    if BASE in times and times[best] >= FASTER * times[BASE]:
        return BASE
    return best


def _slower(times: Mapping[str, float], name: str, chosen: str) -> str:
    ratio = times[name] / times[chosen]
    limit = f", not below {FASTER}" if ratio < 1 else ""
    return f"{ratio:.2f} of {chosen}'s time{limit}"
