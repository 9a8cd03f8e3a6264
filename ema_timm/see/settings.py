"""What `predict` can be told. No torch here, so that ``--help`` is instant."""

from dataclasses import dataclass

from ema_timm.options import option


@dataclass
class PredictConfig:
    """Settings of `ema_timm.see.predict.predict`; the command line is made from these fields.

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
