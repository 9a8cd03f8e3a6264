"""Settings of a fine-tuning run. Imports no torch, so that ``--help`` is instant."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ema_timm.checkpoints.schema import INTERPOLATIONS
from ema_timm.errors import UserError
from ema_timm.names import encodable
from ema_timm.options import check_ranges, option


@dataclass
class FinetuneConfig:
    """Settings of `ema_timm.training.finetune`. Each field is an option of the command line."""

    model: str = option(
        "", "timm model name, hf-hub:USER/NAME or local-dir:FOLDER", group="model, images, output"
    )
    data_dir: str = option("", "image folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    dataset: str = option(
        "", "timm dataset, such as torch/cifar10 or hfds/USER/NAME; --data-dir is its root"
    )
    split: str = option("", "name of the split to validate on (default: val or validation)")
    val_split: str = option(
        "", "hold out this fraction of the training images and validate on it, such as 0.2"
    )
    check: bool = option(True, "decode every image before training", flag=True)
    output: str = option("", "checkpoint folder to write, in timm's Hub format")

    pretrained: bool | None = option(
        None,
        "start from pretrained weights (default: on, if the model has some)",
        flag=True,
        group="weights and architecture",
    )
    weights: str = option("", "load the pretrained weights from this file, offline")
    model_kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "arguments of the model, such as ema_groups=8", "pairs": True},
    )
    img_size: int = option(0, "image size in pixels (default: from the model)", least=0)
    mean: list[float] = field(
        default_factory=list,
        metadata={
            "help": "mean to normalise images with: one number, or one for each channel "
            "(default: from the model)",
            "numbers": True,
        },
    )
    std: list[float] = field(
        default_factory=list,
        metadata={
            "help": "standard deviation, as --mean (default: from the model)",
            "numbers": True,
        },
    )
    interpolation: str = option(
        "",
        "interpolation of validation images (default: from the model)",
        choices=INTERPOLATIONS,
    )
    crop_pct: float = option(
        0.0, "centre-crop fraction of validation images (default: from the model)", least=0, most=1
    )
    drop_path: float = option(0.0, "stochastic depth rate", least=0, below=1)
    grad_checkpointing: bool = option(False, "recompute activations to save memory", flag=True)

    epochs: int = option(20, "number of epochs", group="optimisation", least=1)
    patience: int = option(
        0, "stop after this many epochs without improvement (default: off)", least=0
    )
    freeze_epochs: int = option(
        0, "train only the head and the EMA layers for this many epochs first (default: 0)", least=0
    )
    batch_size: int = option(64, "images in a batch, on each device", least=1)
    grad_accum_steps: int = option(
        1, "accumulate the gradients of this many batches for a step", least=1
    )
    average_weights: float = option(
        0.0,
        "evaluate and save a weight average with this decay, such as 0.999; timm's --model-ema "
        "(default: off)",
        least=0,
        below=1,
    )
    opt: str = option("adamw", "timm optimiser name")
    lr: float = option(5e-4, "peak learning rate", least=0)
    weight_decay: float = option(0.05, "weight decay", least=0)
    momentum: float = option(0.9, "momentum, for optimisers that have one", least=0, below=1)
    layer_decay: float = option(
        0.0, "layer-wise learning rate decay (default: off)", least=0, most=1
    )
    clip_grad: float = option(0.0, "clip the gradient norm to this value (default: off)", least=0)
    sched: str = option("cosine", "timm scheduler name")
    warmup_epochs: int = option(1, "epochs of linear warm-up", least=0)
    min_lr: float = option(1e-6, "final learning rate", least=0)

    class_weights: str = option(
        "",
        "class weights in the loss: balanced, or a JSON file of class names and weights",
        group="loss and augmentation",
    )
    smoothing: float = option(0.1, "label smoothing", least=0, below=1)
    mixup: float = option(0.0, "mixup alpha (default: off)", least=0)
    cutmix: float = option(0.0, "cutmix alpha (default: off)", least=0)
    aa: str = option("", "AutoAugment policy, such as rand-m9-mstd0.5 (default: off)")
    reprob: float = option(0.0, "random erasing probability", least=0, most=1)
    hflip: float = option(0.5, "horizontal flip probability", least=0, most=1)
    scale_min: float = option(
        0.5, "smallest area of the random crop, as a fraction", least=0, most=1
    )
    color_jitter: float = option(0.0, "colour jitter", least=0)

    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps", group="hardware and logging")
    amp: bool = option(False, "use mixed precision", flag=True)
    amp_dtype: str = option("bfloat16", "dtype of mixed precision", choices=("bfloat16", "float16"))
    channels_last: bool = option(False, "use channels-last memory format", flag=True)
    workers: int = option(2, "data-loader processes", least=0)
    seed: int = option(42, "random seed", least=0)
    # Not --log: torchrun would read it as an abbreviation of one of its own options.
    record: list[str] = field(
        default_factory=list,
        metadata={
            "help": "also log each epoch to OUTPUT/training, as csv or tensorboard",
            "several": True,
            "choices": ("csv", "tensorboard"),
        },
    )

    WITHOUT_EFFECT = (
        *("data_dir", "dataset", "split", "val_split", "check", "output", "device", "workers"),
        "record",
    )
    """Fields that do not change the results. Runs compare images by their fingerprints."""

    ANYTIME = (*WITHOUT_EFFECT, "patience")
    """Fields that may change when a run resumes: they do not change what an epoch computes."""

    @property
    def image_settings(self) -> dict[str, Any]:
        """How images are prepared, by timm's names, where it differs from the model's own."""
        names = ("img_size", "mean", "std", "interpolation", "crop_pct")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


def check_settings(config: FinetuneConfig) -> None:
    """Raise UserError for a value out of range, or for settings that cannot work together."""
    check_ranges(config)
    if (config.mixup or config.cutmix) and config.batch_size % 2:
        raise UserError(
            f"--mixup and --cutmix pair the images of a batch, so --batch-size must be even, "
            f"got {config.batch_size}."
        )
    if encodable(config.output) != config.output:
        raise UserError(
            f"--output {encodable(config.output)} is not UTF-8, which safetensors needs. Give "
            "another name."
        )
    if config.weights and not Path(config.weights).is_file():
        raise UserError(f"--weights: there is no file {config.weights}.")
