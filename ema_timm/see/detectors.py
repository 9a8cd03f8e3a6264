"""A detector of ultralytics for `attend`: its network, its images and its best detections."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ema_timm.data.images import read_image
from ema_timm.integrations.yolo.check import is_detector
from ema_timm.integrations.yolo.files import open_detector
from ema_timm.integrations.yolo.folder import load
from ema_timm.see.predictions import Prediction


def names_detector(source: str) -> bool:
    """Whether a source is a checkpoint ``.pt`` or the folder of a detector."""
    return Path(source).suffix == ".pt" or is_detector(source)


def opened(source: str) -> Any:
    """The YOLO or RTDETR object of a source that `names_detector` accepts."""
    return open_detector(source) if Path(source).suffix == ".pt" else load(source)


def letterboxed(yolo: Any, files: Sequence[Path]) -> Tensor:
    """Images as the detector takes them, (B, 3, H, W), 0 to 1.

    Args:
        yolo: The detector, whose own image size is used.
        files: Image files.

    Raises:
        UnreadableImageError: For the first file that cannot be decoded.
    """
    from ultralytics.data.augment import LetterBox

    size = yolo.overrides.get("imgsz", 640)
    box = LetterBox((size, size) if isinstance(size, int) else tuple(size), auto=False)
    images = [box(image=np.asarray(read_image(file, "RGB"))) for file in files]
    return torch.stack([torch.tensor(image) for image in images]).permute(0, 3, 1, 2) / 255


def best_detections(yolo: Any, files: Sequence[Path], device: torch.device) -> list[Prediction]:
    """The most probable class or detection of each image, as ``YOLO.predict`` gives it.

    ultralytics may fuse the network in place, so nothing else can use it afterwards.
    """
    results = yolo.predict([str(file) for file in files], device=device, verbose=False)
    return [_best(str(file), result) for file, result in zip(files, results, strict=True)]


def _best(file: str, result: Any) -> Prediction:
    if result.probs is not None:
        index, prob = result.probs.top1, float(result.probs.top1conf)
        return Prediction(file, [index], [result.names[index]], [prob])
    boxes = result.obb if result.obb is not None else result.boxes
    if not len(boxes):
        return Prediction(file, [-1], ["nothing detected"], [0.0])
    first = int(boxes.conf.argmax())
    index = int(boxes.cls[first])
    return Prediction(file, [index], [result.names[index]], [float(boxes.conf[first])])
