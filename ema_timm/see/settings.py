"""Settings of ``attend`` and ``predict``. No torch here, so that ``--help`` is fast."""

from dataclasses import dataclass

from ema_timm.options import option


@dataclass
class AttendConfig:
    """Settings of `ema_timm.see.attend`; the command line is made from these fields.

    ``source`` is a checkpoint folder, a timm name or ``hf-hub:USER/NAME``; ``images`` are files.
    """

    source: str
    images: list[str]
    output: str = option("attend.png", "picture to write")
    groups: bool = option(
        False, "write the maps of all groups too, as NAME-groups.png beside the picture", flag=True
    )
    layers: str = option("", "layers to show, with commas (default: the last of each stage)")
    target: str = option("", "class for Grad-CAM, a name or number (default: the predicted)")
    cam: bool = option(True, "draw Grad-CAM, which needs 'ema-timm[see]'", flag=True)
    cam_layer: str = option("", "layer for Grad-CAM (default: the network's last stage)")
    beside: str = option("", "a second network, such as the plain twin, for its Grad-CAM beside")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")


@dataclass
class PredictConfig:
    """Settings of `ema_timm.see.predict`; the command line is made from these fields.

    ``source`` is a checkpoint folder, a timm name, ``hf-hub:USER/NAME`` or an ``.onnx`` file in a
    checkpoint folder; ``images`` are files and folders.
    """

    source: str
    images: list[str]
    topk: int = option(5, "classes to give for each image")
    output: str = option("", "file to write: .csv, .jsonl or .parquet (default: print)")
    sheet: str = option("", "contact sheet of the images with their labels to write, a .png")
    batch_size: int = option(64, "images in a batch")
    workers: int = option(2, "data loading processes, where the images fill more than a batch")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
