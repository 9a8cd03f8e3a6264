"""Settings of an evaluation. Imports no torch, so that ``--help`` is instant."""

from dataclasses import dataclass, field
from typing import Any

from ema_timm.checkpoints.schema import INTERPOLATIONS
from ema_timm.options import option


@dataclass
class EvaluateConfig:
    """Settings of `ema_timm.measure.evaluate`. Each field is an option of the command line.

    ``source`` is the checkpoint: a folder in timm's Hub format, or a file.
    """

    source: str
    data_dir: str = option("", "image folder with val/CLASS/*.jpg (and train/, for class names)")
    split: str = option("", "name of the split to measure on (default: val or validation)")
    dataset: str = option(
        "", "timm dataset, such as torch/cifar10 or hfds/USER/NAME; --data-dir is its root"
    )
    val_split: str = option(
        "", "measure on the fraction that finetune --val-split held out, such as 0.2"
    )
    labels: str = option(
        "", "file of class names in output order: one per line, or JSON with descriptions"
    )
    batch_size: int = option(64, "images in a batch", least=1)
    workers: int = option(2, "data-loader processes", least=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps")
    amp_dtype: str = option(
        "", "use mixed precision with this dtype (default: off)", choices=("bfloat16", "float16")
    )

    output: str = option(
        "", "checkpoint folder to write (required)", group="only for checkpoint files"
    )
    model: str = option("", "timm model name (default: from the file)")
    model_kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "arguments of the model, such as ema_groups=8",
            "pairs": True,
        },
    )
    use_averaged: bool | None = option(
        None, "use the averaged weights (default: if the file is of timm's --model-ema)", flag=True
    )
    img_size: int = option(0, "image size in pixels (default: from the model)", least=0)
    crop_pct: float = option(0.0, "centre-crop fraction (default: from the model)", least=0, most=1)
    interpolation: str = option(
        "", "interpolation of the images (default: from the model)", choices=INTERPOLATIONS
    )

    OF_A_FILE = (
        "output", "model", "model_kwargs", "use_averaged", "img_size", "crop_pct", "interpolation",
    )  # fmt: skip
    """Fields for checkpoint files only: a folder gives them in its config.json."""
