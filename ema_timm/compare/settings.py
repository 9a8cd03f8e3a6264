"""What a comparison can be told beside what its runs are told. No torch, so `--help` is instant."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ema_timm.errors import UserError
from ema_timm.files import write_whole
from ema_timm.options import option
from ema_timm.training.settings import FinetuneConfig

ATTENTION = ("none", "se", "eca", "cbam", "coord", "ema")
PLAN = "plan.json"


@dataclass
class CompareConfig:
    """Settings of `ema_timm.compare`, beside those of its runs."""

    seeds: int = option(5, "runs of each variant, with the seeds --seed, --seed + 1, ...")
    latency: bool = option(
        False, "measure the time of one image in each network, side by side", flag=True
    )
    exported_latency: bool = option(
        False, "the same of the network exported to ONNX, in ONNX Runtime on the CPU", flag=True
    )


@dataclass
class Plan:
    """What is compared: enough to go on with it, or to make its table.

    Args:
        attention: The variants, as `ema_timm.compare.variants` reads them.
        seeds: Runs of each.
        settings: The settings of `FinetuneConfig` that were given, by name; ``model`` is the plain
            network, ``output`` the folder of the comparison, ``seed`` the first seed.
    """

    attention: list[str] = field(default_factory=lambda: list(ATTENTION))
    seeds: int = 5
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        """The folder of the comparison."""
        return Path(self.settings["output"])

    @property
    def seed_numbers(self) -> list[int]:
        """The seeds of the runs."""
        first = self.settings.get("seed", FinetuneConfig.seed)
        return list(range(first, first + self.seeds))

    def save(self) -> None:
        """Write the plan, from which the comparison goes on, into its folder."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_whole(self.output / PLAN, lambda path: path.write_text(text, encoding="utf-8"))


def make_plan(settings: dict, attention: list[str] | None, seeds: int | None) -> Plan:
    """The plan that settings ask for; what they leave out is as in the folder's own plan.

    Args:
        settings: Of `FinetuneConfig`, by name, those that were given.
        attention: The variants; None is those of the folder, or `ATTENTION`.
        seeds: Runs of each; None likewise.

    Raises:
        UserError: If something is missing, or is not what the runs in the folder were trained with.
    """
    settings = json.loads(json.dumps(settings))  # lists for tuples, as they come back from a file
    _require(settings, ["output"])
    saved = _read(Path(settings["output"]) / PLAN)
    if saved:
        _check_same(saved.settings, settings)
    old = saved or Plan()
    plan = Plan(
        attention or old.attention,
        old.seeds if seeds is None else seeds,
        {**old.settings, **settings},
    )
    _require(plan.settings, ["model"])
    if not plan.settings.get("data_dir") and not plan.settings.get("dataset"):
        _require(plan.settings, ["data_dir"])
    if plan.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {plan.seeds}.")
    return plan


def _require(settings: dict, names: list[str]) -> None:
    missing = [f"--{name.replace('_', '-')}" for name in names if not settings.get(name)]
    if missing:
        raise UserError(f"compare needs {', '.join(missing)}; see ema-timm compare --help.")


def _read(file: Path) -> Plan | None:
    if not file.is_file():
        return None
    try:
        return Plan(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{file} is damaged ({error}). Remove it and give all settings again."
        ) from error


def _check_same(saved: dict, given: dict) -> None:
    """Refuse settings under which the runs that are there would not be comparable to others."""
    for name, value in given.items():
        before = saved.get(name, getattr(FinetuneConfig(), name))
        if name not in FinetuneConfig.ANYTIME and value != before:
            raise UserError(
                f"cannot go on: --{name.replace('_', '-')} is {value!r}, and the runs in "
                f"{given['output']} have {before!r}. Leave it out, or give another --output."
            )
