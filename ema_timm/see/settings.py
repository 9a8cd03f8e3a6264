"""Settings of `attend` and `predict`. Imports no torch, so that ``--help`` is instant."""

from dataclasses import dataclass

from ema_timm.options import option


@dataclass
class AttendConfig:
    """Settings of `ema_timm.see.attend`. Each field is an option of the command line.

    ``source`` is a checkpoint folder, a timm name, ``hf-hub:USER/NAME``, or a detector of
    ultralytics: a ``.pt`` or its folder; ``images`` are files.
    """

    source: str
    images: list[str]
    output: str = option("attend.png", "figure to write")
    groups: bool = option(False, "also write the maps of all groups to NAME-groups.png", flag=True)
    layers: str = option(
        "", "layers to show, separated by commas (default: last of each stage)", once=True
    )
    target: str = option("", "class for Grad-CAM, by name or number (default: the predicted one)")
    cam: bool = option(True, "draw Grad-CAM; needs the extra see", flag=True)
    cam_layer: str = option("", "layer for Grad-CAM (default: the last stage)")
    beside: str = option("", "second model, whose Grad-CAM is drawn next to the first")
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps")


@dataclass
class PredictConfig:
    """Settings of `ema_timm.see.predict`. Each field is an option of the command line.

    ``source`` is a checkpoint folder, a timm name, ``hf-hub:USER/NAME`` or an ``.onnx`` file of
    ``ema-timm export``; ``images`` are files and folders.
    """

    source: str
    images: list[str]
    topk: int = option(5, "number of classes to print for each image", least=1)
    output: str = option("", "file to write: .csv, .jsonl or .parquet (default: print)")
    sheet: str = option("", "contact sheet of the labelled images to write, a .png")
    batch_size: int = option(64, "images in a batch", least=1)
    workers: int = option(2, "data-loader processes, if there is more than one batch", least=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps")
