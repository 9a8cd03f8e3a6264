"""What was chosen for a model, and how it is shown."""

from dataclasses import asdict, dataclass

from ema_timm.bench.report.markdown import grid
from ema_timm.ops.gpu.choices import Layer
from ema_timm.tuning.decide import BASE, FASTER, Outcome


@dataclass(frozen=True)
class Tuned:
    """What was chosen; printed, it is a table.

    Args:
        environment: What the choices hold for.
        wish: The value of EMA_TIMM_GPU: with another than "auto" they are not looked up.
        file: Where they are remembered; None where they hold for this process alone.
        outcomes: One a layer.
        noted: Who was chosen at every layer that is noted, those of other models too.
    """

    environment: dict[str, str]
    wish: str
    file: str | None
    outcomes: list[Outcome]
    noted: dict[Layer, str]

    def __str__(self) -> str:
        """One row a layer, then who is out and why, and where the choices are remembered."""
        names = list(dict.fromkeys(name for o in self.outcomes for name in o.candidates))
        header = ["layer", "chosen", *[f"{name}, ms" for name in names], "why"]
        rows = [_row(outcome, names) for outcome in self.outcomes]
        return "\n".join([grid(header, rows), "", *_reasons(self.outcomes), *_notes(self)])

    def as_json(self) -> dict:
        """The same as plain data."""
        layers = [{**asdict(o), "layer": o.layer._asdict(), "why": _why(o)} for o in self.outcomes]
        return {"environment": self.environment, "file": self.file, "layers": layers}


def _row(outcome: Outcome, names: list[str]) -> list[str]:
    times = [_time(outcome.candidates.get(name, {})) for name in names]
    when = " (measured before)" if outcome.remembered else ""
    return [str(outcome.layer), outcome.chosen or "nobody", *times, _why(outcome) + when]


def _why(outcome: Outcome) -> str:
    """Why that candidate was chosen, in a few words."""
    times = {name: entry["ms"] for name, entry in outcome.candidates.items() if "ms" in entry}
    if outcome.chosen is None:
        return "none can compute it"
    if len(times) == 1:
        return "the only one that can"
    if outcome.chosen != BASE and BASE in times:
        return f"{times[outcome.chosen] / times[BASE]:.2f} of {BASE}'s time"
    best = min(times, key=times.__getitem__)
    if best != outcome.chosen:
        part = times[best] / times[BASE]
        return f"{best} takes {part:.2f} of its time, not below {FASTER}"
    return "the fastest"


def _time(entry: dict) -> str:
    return f"{entry['ms']:.3f}" if "ms" in entry else "out"


def _reasons(outcomes: list[Outcome]) -> list[str]:
    """Why a candidate was not chosen, with the number of layers of which that is said."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        for name, entry in outcome.candidates.items():
            if "ms" not in entry:
                reason = f"{name} is out: {entry['reason']}"
                counts[reason] = counts.get(reason, 0) + 1
    return [f"{reason} ({n} of {len(outcomes)} layers)" for reason, n in counts.items()]


def _notes(tuned: Tuned) -> list[str]:
    machine = tuned.environment
    kept = f"remembered in {tuned.file}" if tuned.file else "for this process alone"
    lines = [f"Measured on {machine['device']}, torch {machine['torch']}; {kept}."]
    if any(outcome.remembered for outcome in tuned.outcomes):
        lines.append("--retry (retry=True) measures again what was measured before.")
    if machine["device"] == "cpu":
        lines.append("On the CPU nothing is looked up: the closed form runs there.")
    elif tuned.wish != "auto":
        lines.append(f"EMA_TIMM_GPU={tuned.wish} overrules these choices.")
    return lines
