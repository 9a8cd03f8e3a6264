"""The result of `ema_timm.tune`, as a table and as JSON."""

from dataclasses import asdict, dataclass

from ema_timm.bench.report.markdown import grid
from ema_timm.ops.gpu.choice_file import Layer
from ema_timm.tuning.decide import DEFAULT, FASTER, LayerChoice


@dataclass(frozen=True)
class TuneResult:
    """The choices for a model; ``print`` shows a table.

    Args:
        environment: What the choices depend on, from `choice_file.tuning_key`.
        gpu_mode: The value of EMA_TIMM_GPU; the choices are used only if it is "auto".
        file: Where they are stored; None if they hold only for this process.
        choices: One per layer.
        stored: The implementation of every layer in the file, also of other models' layers.
    """

    environment: dict[str, str]
    gpu_mode: str
    file: str | None
    choices: list[LayerChoice]
    stored: dict[Layer, str]

    def __str__(self) -> str:
        """One row per layer, then the rejected candidates, and where the choices are stored."""
        names = list(dict.fromkeys(name for c in self.choices for name in c.candidates))
        header = ["layer", "chosen", *[f"{name}, ms" for name in names], "why"]
        rows = [_row(choice, names) for choice in self.choices]
        return "\n".join([grid(header, rows), "", *_rejected(self.choices), *_notes(self)])

    def as_json(self) -> dict:
        """The same as plain data."""
        layers = [{**asdict(c), "layer": c.layer._asdict(), "why": _why(c)} for c in self.choices]
        return {"environment": self.environment, "file": self.file, "layers": layers}


def _row(choice: LayerChoice, names: list[str]) -> list[str]:
    times = [_time(choice.candidates.get(name, {})) for name in names]
    when = " (measured before)" if choice.remembered else ""
    return [str(choice.layer), choice.chosen or "none", *times, _why(choice) + when]


def _why(choice: LayerChoice) -> str:
    """The reason for a choice, in a few words."""
    times = {name: entry["ms"] for name, entry in choice.candidates.items() if "ms" in entry}
    if choice.chosen is None:
        return "no implementation can run"
    if len(times) == 1:
        return "the only one that can run"
    if choice.chosen != DEFAULT and DEFAULT in times:
        return f"{times[choice.chosen] / times[DEFAULT]:.2f} of {DEFAULT}'s time"
    best = min(times, key=times.__getitem__)
    if best != choice.chosen:
        part = times[best] / times[DEFAULT]
        return f"{best} takes {part:.2f} of its time, not below {FASTER}"
    return "the fastest"


def _time(entry: dict) -> str:
    return f"{entry['ms']:.3f}" if "ms" in entry else "rejected"


def _rejected(choices: list[LayerChoice]) -> list[str]:
    """The reasons why candidates were not timed, each with its number of layers."""
    counts: dict[str, int] = {}
    for choice in choices:
        for name, entry in choice.candidates.items():
            if "ms" not in entry:
                reason = f"{name} is rejected: {entry['reason']}"
                counts[reason] = counts.get(reason, 0) + 1
    return [f"{reason} ({n} of {len(choices)} layers)" for reason, n in counts.items()]


def _notes(result: TuneResult) -> list[str]:
    machine = result.environment
    place = f"stored in {result.file}" if result.file else "valid only for this process"
    lines = [f"Measured on {machine['device']}, torch {machine['torch']}; {place}."]
    if any(choice.remembered for choice in result.choices):
        lines.append("Use --retry (retry=True) to measure again what was measured before.")
    if machine["device"] == "cpu":
        lines.append("The CPU always runs the closed form: these choices are not used.")
    elif result.gpu_mode != "auto":
        lines.append(f"EMA_TIMM_GPU={result.gpu_mode} overrides these choices.")
    return lines
