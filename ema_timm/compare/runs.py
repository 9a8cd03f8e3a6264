"""The runs of a comparison: ordinary finetune runs, and how far each of them is."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from ema_timm.checkpoints.layout import RESULTS
from ema_timm.checkpoints.results import read_results
from ema_timm.compare.settings import Plan
from ema_timm.compare.variants import Variant
from ema_timm.errors import UserError
from ema_timm.options import spelled
from ema_timm.training.checkpoint import public_arguments
from ema_timm.training.data import find_test
from ema_timm.training.resume import RunState
from ema_timm.training.settings import FinetuneConfig


class Stand(Enum):
    """How far a run is."""

    NEW = "not begun"
    BEGUN = "begun"
    TRAINED = "trained, not measured on the test images"
    DONE = "done"


class PlannedRun(NamedTuple):
    """One variant with one seed.

    Args:
        variant: The variant.
        seed: The seed.
        settings: All settings of `FinetuneConfig` that differ from its own, by name.
        test: The folder of test images, where there are some.
        log: What the run tells, while `compare` runs it.
    """

    variant: Variant
    seed: int
    settings: dict
    test: Path | None
    log: Path

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.settings["output"])

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.variant.name}, seed {self.seed}"

    def results(self) -> dict | None:
        """What the run has measured, or None before its first epoch's end.

        Raises:
            UserError: If the folder is another run's, or results.json is damaged.
        """
        file = self.folder / RESULTS
        if not file.is_file():
            return None
        results = read_results(file)
        self._check_own(results.get("arguments") or {})
        return results

    def _check_own(self, arguments: dict) -> None:
        wanted = public_arguments(FinetuneConfig(**self.settings))
        for name, value in wanted.items():
            if name in FinetuneConfig.ANYTIME or name not in arguments:
                continue
            if _as_json(arguments[name]) != _as_json(value):
                raise UserError(
                    f"{self.folder} was trained with --{name.replace('_', '-')} "
                    f"{arguments[name]!r}, and this comparison has {value!r}. Give another "
                    "--output."
                )

    def stand(self) -> Stand:
        """How far the run is; raises as `results` does."""
        results = self.results()
        if results is None or not is_trained(results):
            state = RunState(self.folder)
            return Stand.BEGUN if state.file.exists() or state.before.exists() else Stand.NEW
        return Stand.DONE if self.test is None or self.is_tested(results) else Stand.TRAINED

    def is_tested(self, results: dict) -> bool:
        """Whether ``metrics`` are those of the test images."""
        split = results.get("evaluation", {}).get("data", {}).get("split")
        return self.test is not None and split == self.test.name

    def arguments(self, device: str | None = None) -> list[str]:
        """``finetune`` and its options, to start the run or to continue it.

        Args:
            device: Where it runs; None leaves what the settings say.
        """
        settings = {**self.settings, **({"device": device} if device else {})}
        resume = ["--resume"] if self.stand() is Stand.BEGUN else []
        return ["finetune", *spelled(settings, FinetuneConfig), *resume]


def is_trained(results: dict) -> bool:
    """Whether a run has come to its end."""
    history = results.get("history") or [{}]
    return "stopped_early" in results or history[-1].get("epoch") == results["arguments"]["epochs"]


def plan_runs(plan: Plan, variants: Sequence[Variant]) -> list[PlannedRun]:
    """All runs of a comparison, a seed after the other, so that every variant has come as far.

    Args:
        plan: What is compared.
        variants: Its variants.
    """
    test = find_test(FinetuneConfig(**plan.settings))
    runs = []
    for seed in plan.seed_numbers:
        for variant in variants:
            name = f"{variant.folder}-seed{seed}"
            settings = {
                **plan.settings,
                "model": variant.model,
                "model_kwargs": {**plan.settings.get("model_kwargs", {}), **variant.model_kwargs},
                "output": (plan.output / name).as_posix(),
                "seed": seed,
            }
            log = plan.output / "logs" / f"{name}.txt"
            runs.append(PlannedRun(variant, seed, _in_order(settings), test, log))
    return runs


def command_line(arguments: Sequence[str]) -> str:
    """``ema-timm ARGUMENTS`` as a shell takes it."""
    return shlex.join(["ema-timm", *arguments])


def process_arguments(arguments: Sequence[str]) -> list[str]:
    """The same as a process is told, by this interpreter."""
    return [sys.executable, "-m", "ema_timm", *arguments]


def _in_order(settings: dict) -> dict:
    """Settings in the order in which ``--help`` has them."""
    return {
        f.name: settings[f.name] for f in dataclasses.fields(FinetuneConfig) if f.name in settings
    }


def _as_json(value):
    """Tuples as the lists that they come back as from a file."""
    if isinstance(value, dict):
        return {key: _as_json(each) for key, each in value.items()}
    return [_as_json(each) for each in value] if isinstance(value, list | tuple) else value
