"""Settings of ``evaluate``. No torch here, so that ``--help`` is fast."""

from dataclasses import dataclass, field
from typing import Any

from ema_timm.options import option


@dataclass
class EvaluateConfig:
    """Settings of `ema_timm.measure.evaluate`; the command line is made from these fields.

    ``source`` is the checkpoint: a folder in timm's Hub format, or a file.
    """

    source: str
    data_dir: str = option("", "image folder with val/CLASS/*.png (and train/, for class names)")
    split: str = option("", "name of the folder to measure on (default: val or validation)")
    dataset: str = option(
        "", "timm's data set by name, torch/NAME or hfds/NAME, which lies in --data-dir"
    )
    val_split: str = option(
        "", "measure on the part that finetune --val-split set aside, such as 0.2"
    )
    labels: str = option(
        "", "class names in the order of the outputs: one a line, or JSON with descriptions"
    )
    batch_size: int = option(64, "images in a batch")
    workers: int = option(2, "data loading processes")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    amp_dtype: str = option(
        "", "mixed precision type (default: none)", choices=("bfloat16", "float16")
    )

    output: str = option(
        "", "checkpoint folder to write; needed for checkpoint files, like what follows"
    )
    model: str = option("", "timm model name (default: as the file says)")
    model_kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "arguments for the model, as KEY=VALUE ...", "pairs": True},
    )
    use_averaged: bool = option(False, "take the averaged weights of timm's --model-ema", flag=True)
    img_size: int = option(0, "image size in pixels (default: as validate.py has it)")
    crop_pct: float = option(0.0, "part of the image to crop; 0 is as validate.py has it")
    interpolation: str = option(
        "", "interpolation, such as bicubic (default: as validate.py has it)"
    )

    OF_A_FILE = (
        "output", "model", "model_kwargs", "use_averaged", "img_size", "crop_pct", "interpolation",
    )  # fmt: skip
    """Fields that are only for checkpoint files: a folder's config.json decides them."""
