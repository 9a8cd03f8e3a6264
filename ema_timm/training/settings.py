"""Settings of a fine-tuning run. Imports no torch, so that ``--help`` is instant."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ema_timm.errors import UserError
from ema_timm.options import option, option_name


@dataclass
class FinetuneConfig:
    """Settings of `ema_timm.training.finetune`. Each field is an option of the command line."""

    model: str = option("", "timm model name; hf-hub:USER/NAME and local-dir:FOLDER too")
    data_dir: str = option("", "image folder with train/CLASS/*.png and val/CLASS/*.png")
    dataset: str = option(
        "", "timm's data set by name, torch/NAME or hfds/NAME, which lies in --data-dir"
    )
    val_split: str = option(
        "",
        "part of the training images to validate on, such as 0.2, where no folder holds some; or "
        "the name of the split that does (default: val or validation)",
    )
    check: bool = option(True, "decode every image before training", flag=True)
    output: str = option("", "run folder to write: the checkpoint in timm's Hub format")

    pretrained: bool | None = option(
        None, "start from pretrained weights (default: where the model name has some)", flag=True
    )
    weights: str = option("", "load the pretrained weights from this file, without network")
    model_kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "arguments for the model, as KEY=VALUE ...", "pairs": True},
    )
    img_size: int = option(0, "image size in pixels (default: the model's own)")
    drop_path: float = option(0.0, "stochastic depth rate")
    grad_checkpointing: bool = option(False, "recompute activations to save memory", flag=True)

    epochs: int = option(20, "passes over the training images")
    patience: int = option(0, "end after so many epochs in a row without a better one (0: off)")
    freeze_epochs: int = option(0, "epochs at the start in which head and EMA layers alone learn")
    batch_size: int = option(64, "images in a batch, on each device")
    grad_accum_steps: int = option(1, "batches whose gradients make one step")
    average_weights: float = option(
        0.0,
        "decay of averaged weights, such as 0.999, which are then measured and kept; --model-ema "
        "of timm's train.py (0: off)",
    )
    opt: str = option("adamw", "timm optimiser name")
    lr: float = option(5e-4, "peak learning rate")
    weight_decay: float = option(0.05, "weight decay")
    momentum: float = option(0.9, "momentum, for optimisers that have one")
    layer_decay: float = option(0.0, "layer-wise learning rate decay (0: off)")
    clip_grad: float = option(0.0, "clip the gradient's norm (0: off)")
    sched: str = option("cosine", "timm scheduler name")
    warmup_epochs: int = option(1, "epochs of linear warm-up")
    min_lr: float = option(1e-6, "learning rate at the end")

    class_weights: str = option(
        "", "weights of the classes in the loss: balanced, or a JSON file of names and numbers"
    )
    smoothing: float = option(0.1, "label smoothing")
    mixup: float = option(0.0, "mixup alpha (0: off)")
    cutmix: float = option(0.0, "cutmix alpha (0: off)")
    aa: str = option("", "AutoAugment policy, such as rand-m9-mstd0.5")
    reprob: float = option(0.0, "random erasing probability")
    hflip: float = option(0.5, "horizontal flip probability")
    scale_min: float = option(0.5, "smallest area of the random crop, as a fraction")
    color_jitter: float = option(0.0, "colour jitter")

    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    amp: bool = option(False, "mixed precision", flag=True)
    amp_dtype: str = option("bfloat16", "mixed precision type", choices=("bfloat16", "float16"))
    channels_last: bool = option(False, "channels-last memory format", flag=True)
    workers: int = option(2, "data loading processes")
    seed: int = option(42, "random seed")
    # Not --log: torchrun takes that for the start of an option of its own.
    record: list[str] = field(
        default_factory=list,
        metadata={
            "help": "what to write the epochs into as well, in OUTPUT/training",
            "several": True,
            "choices": ("csv", "tensorboard"),
        },
    )

    ANYTIME = (
        *("data_dir", "dataset", "val_split", "check", "output", "device", "workers"),
        *("record", "patience"),
    )
    """Fields that may change when a run resumes, because they do not change what an epoch computes.

    A run compares its images by their fingerprints, so their folder may change.
    """


_LOWEST = {"epochs": 1, "batch_size": 1, "grad_accum_steps": 1, "patience": 0, "freeze_epochs": 0}


def check_settings(config: FinetuneConfig) -> None:
    """Raise UserError for a value out of range, or for settings that cannot work together."""
    for name, least in _LOWEST.items():
        if getattr(config, name) < least:
            value = getattr(config, name)
            raise UserError(f"{option_name(name)} must be at least {least}, got {value}.")
    if not 0 <= config.average_weights < 1:
        raise UserError(
            f"--average-weights must be at least 0 and below 1, such as 0.999, "
            f"got {config.average_weights}."
        )
    if (config.mixup or config.cutmix) and config.batch_size % 2:
        raise UserError(
            f"--mixup and --cutmix pair the images of a batch, so --batch-size must be even, "
            f"got {config.batch_size}."
        )
    if config.weights and not Path(config.weights).is_file():
        raise UserError(f"--weights: there is no file {config.weights}.")
