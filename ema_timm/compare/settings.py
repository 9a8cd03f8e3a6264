"""Settings of a comparison. Imports no torch, so that ``--help`` is instant."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ema_timm.errors import UserError
from ema_timm.fields import check_fields, load_json
from ema_timm.files import write_whole
from ema_timm.options import checked_settings, command_arguments, option, option_name
from ema_timm.training.settings import FinetuneConfig

ATTENTION = ("none", "se", "eca", "cbam", "coord", "ema")
FILE = "plan.json"


@dataclass
class CompareConfig:
    """Settings of `ema_timm.compare`, beside those of its runs."""

    seeds: int = option(5, "runs of each variant, with the seeds --seed, --seed + 1, ...")
    latency: bool = option(False, "measure the time of one image in each network", flag=True)
    exported_latency: bool = option(
        False, "measure one image in each network's ONNX file, on the CPU", flag=True
    )


@dataclass
class Comparison:
    """What is compared. Its folder stores it, so that the comparison can be continued.

    Args:
        attention: The variants, as `ema_timm.compare.variants` reads them.
        seeds: Number of runs of each variant.
        settings: The settings of `FinetuneConfig` that were given, by name. ``model`` is the plain
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
    def config(self) -> FinetuneConfig:
        """The settings of the plain network's run, with the defaults of those not given."""
        return FinetuneConfig(**self.settings)

    @property
    def seed_numbers(self) -> list[int]:
        """The seeds of the runs."""
        first = self.config.seed
        return list(range(first, first + self.seeds))

    def arguments(self) -> list[str]:
        """``compare`` and its options, which make this comparison."""
        settings = command_arguments(self.settings, FinetuneConfig)
        return ["compare", *settings, "--attention", *self.attention, "--seeds", str(self.seeds)]

    def save(self) -> None:
        """Write the comparison into its folder, from which `make_comparison` reads it."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_whole(self.output / FILE, lambda path: path.write_text(text, encoding="utf-8"))


def make_comparison(
    settings: dict[str, Any], attention: list[str] | None = None, seeds: int | None = None
) -> Comparison:
    """Set up a comparison, or continue the one in the folder ``settings["output"]``.

    Args:
        settings: Settings of `FinetuneConfig`, by name. A comparison that continues needs only
            ``output``, and keeps its other settings.
        attention: The variants; None means those in the folder, or `ATTENTION`.
        seeds: Number of runs of each variant; None means as many as in the folder, or 5.

    Raises:
        UserError: If a setting is missing, or differs from the one that runs in the folder have.
    """
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    _require(settings, ["output"])
    saved = _read(Path(settings["output"]) / FILE)
    if saved:
        _check_same(saved.settings, settings)
    old = saved or Comparison()
    comparison = Comparison(
        attention or old.attention,
        old.seeds if seeds is None else seeds,
        {**old.settings, **settings},
    )
    data = "dataset" if comparison.settings.get("dataset") else "data_dir"
    _require(comparison.settings, ["model", data])
    if comparison.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {comparison.seeds}.")
    return comparison


def _require(settings: dict, names: list[str]) -> None:
    missing = [option_name(name) for name in names if not settings.get(name)]
    if missing:
        raise UserError(f"compare needs {', '.join(missing)}; see ema-timm compare --help.")


def _read(file: Path) -> Comparison | None:
    if not file.is_file():
        return None
    remedy = "Remove it and give all settings."
    try:
        content = load_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}). {remedy}") from error
    check_fields(content, {"attention": [str], "seeds": int, "settings": dict}, file, remedy)
    settings = checked_settings(content["settings"], FinetuneConfig, str(file))
    return Comparison(content["attention"], content["seeds"], settings)


def _check_same(saved: dict, given: dict) -> None:
    """Check that no setting changes the outcome, so that all runs stay comparable."""
    for name, value in given.items():
        before = saved.get(name, getattr(FinetuneConfig(), name))
        if name not in FinetuneConfig.WITHOUT_EFFECT and value != before:
            raise UserError(
                f"cannot continue: {option_name(name)} is {value!r}, but the runs in "
                f"{given['output']} have {before!r}. Omit the option, or use another --output."
            )
