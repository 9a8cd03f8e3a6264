"""The runs of a comparison: ordinary finetune runs, and how far each of them is."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from ema_timm.checkpoints.layout import RESULTS
from ema_timm.checkpoints.results import read_results
from ema_timm.compare.settings import Comparison
from ema_timm.compare.variants import Variant
from ema_timm.errors import UserError
from ema_timm.options import command_arguments, option_name
from ema_timm.training.checkpoint import public_arguments
from ema_timm.training.data import find_test_folder
from ema_timm.training.resume import RunState
from ema_timm.training.settings import FinetuneConfig


class Status(Enum):
    """How far a run is."""

    NEW = "not begun"
    BEGUN = "begun"
    TRAINED = "trained, not evaluated on the test images"
    DONE = "done"


class PlannedRun(NamedTuple):
    """The run of one variant with one seed.

    Args:
        variant: The variant.
        seed: The seed.
        settings: The settings of `FinetuneConfig` that are not left at their defaults, by name.
        test: The folder of test images, if there is one.
        log: The file for the output of the run.
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
        """The run's name in messages."""
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def epochs(self) -> int:
        """Epochs that it trains at most."""
        return self.config.epochs

    @property
    def config(self) -> FinetuneConfig:
        """All settings of the run."""
        return FinetuneConfig(**self.settings)

    def results(self) -> dict | None:
        """The run's results, or None before the end of its first epoch.

        Raises:
            UserError: If the folder belongs to another run, or results.json is damaged.
        """
        file = self.folder / RESULTS
        if not file.is_file():
            return None
        results = read_results(file)
        self._check_own(results.get("arguments") or {})
        return results

    def _check_own(self, arguments: dict) -> None:
        expected = public_arguments(dataclasses.asdict(self.config))
        # Results of an older version lack newer settings. Their defaults keep the old behaviour.
        trained = {**dataclasses.asdict(FinetuneConfig()), **arguments}
        for name, value in json.loads(json.dumps(expected)).items():  # tuples become lists
            if name not in FinetuneConfig.WITHOUT_EFFECT and trained[name] != value:
                raise UserError(
                    f"{self.folder} was trained with {option_name(name)} {trained[name]!r}, but "
                    f"this comparison has {value!r}. Use another --output."
                )

    def history(self) -> list[dict]:
        """The epochs so far, as in results.json. Raises as `results` does."""
        return (self.results() or {}).get("history", [])

    def status(self) -> Status:
        """How far the run is. Raises as `results` does."""
        results = self.results()
        if results is None or not is_trained(results):
            return Status.BEGUN if RunState(self.folder).exists() else Status.NEW
        if self.test is None:
            return Status.DONE
        split = results.get("evaluation", {}).get("data", {}).get("split")
        return Status.DONE if split == self.test.name else Status.TRAINED

    def arguments(self, device: str | None = None) -> list[str]:
        """``finetune`` and its options, to start the run or to continue it.

        Args:
            device: The device to run on; None means that of the settings.
        """
        settings = {**self.settings, **({"device": device} if device else {})}
        return ["finetune", *command_arguments(settings, FinetuneConfig), "--resume"]


def is_trained(results: dict) -> bool:
    """Whether a run has trained all its epochs, or stopped early."""
    history = results.get("history") or [{}]
    return "stopped_early" in results or history[-1].get("epoch") == results["arguments"]["epochs"]


def plan_runs(comparison: Comparison, variants: Sequence[Variant]) -> list[PlannedRun]:
    """All runs of a comparison, ordered by seed, so that all variants get equally far."""
    config, given, output = comparison.config, comparison.settings, comparison.output
    test = find_test_folder(config.data_dir, config.dataset, config.split)
    fields = [field.name for field in dataclasses.fields(FinetuneConfig)]
    runs = []
    for seed in comparison.seed_numbers:
        for variant in variants:
            name = f"{variant.folder}-seed{seed}"
            settings = {
                **given,
                "model": variant.model,
                "model_kwargs": {**config.model_kwargs, **variant.model_kwargs},
                "output": (output / name).as_posix(),
                "seed": seed,
            }
            ordered = {field: settings[field] for field in fields if field in settings}
            log = output / "logs" / f"{name}.txt"
            runs.append(PlannedRun(variant, seed, ordered, test, log))
    return runs


def command_line(arguments: Sequence[str]) -> str:
    """``ema-timm ARGUMENTS``, quoted for a shell."""
    return shlex.join(["ema-timm", *arguments])


def process_arguments(arguments: Sequence[str]) -> list[str]:
    """``ema-timm ARGUMENTS`` as a process of this Python interpreter."""
    return [sys.executable, "-m", "ema_timm", *arguments]
