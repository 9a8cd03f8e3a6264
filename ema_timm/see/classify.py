"""Labels and probabilities of images, with the preprocessing of a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from ema_timm.data.images import mode_of, read_image
from ema_timm.environment import pick_device
from ema_timm.errors import UnreadableImageError
from ema_timm.options import check_ranges
from ema_timm.see.images import find_images, image_loader, keep_images
from ema_timm.see.networks import Classifier, open_classifier, open_exported
from ema_timm.see.predictions import (
    Prediction,
    check_output,
    check_png,
    top_classes,
    write_predictions,
)
from ema_timm.see.settings import PredictConfig

ONNX = ".onnx"


class Predicted(NamedTuple):
    """The result of `predict`.

    Attributes:
        rows: One for each image that could be read, in order.
        unreadable: One line for each image that could not.
        omitted: Number of images that are not on the contact sheet.
        skipped: Sentences on what was skipped in folders.
    """

    rows: list[Prediction]
    unreadable: list[str]
    omitted: int = 0
    skipped: Sequence[str] = ()


def predict(config: PredictConfig, progress: bool = True) -> Predicted:
    """Classify images as timm's ``inference.py`` does, and write the files of the settings.

    Args:
        config: Network, images and outputs.
        progress: Show a bar on stderr (on a terminal).

    Raises:
        UserError: If a setting is wrong, or the network or an image is missing.
        HubError: If a download from the Hub fails.
    """
    check_ranges(config)
    if config.output:
        check_output(config.output)
    if config.sheet:
        check_png("--sheet", config.sheet)
    files, skipped = find_images(config.images)
    if config.sheet:
        keep_images(files, "--sheet", config.sheet)
    device = torch.device(pick_device(config.device))
    if config.source.endswith(ONNX):
        device = torch.device("cpu")  # ONNX Runtime reads its input there
        network = open_exported(Path(config.source))
    else:
        network = open_classifier(config.source, device)
    done = classify(network, files, device, config, progress)._replace(skipped=skipped)
    if config.output:
        write_predictions(done.rows, min(config.topk, len(network.labels)), config.output)
    if config.sheet:
        from ema_timm.see.sheet import save_sheet  # needs matplotlib

        channels = network.data["input_size"][0]
        done = done._replace(omitted=save_sheet(done.rows, channels, Path(config.sheet)))
    return done


def classify(
    network: Classifier,
    files: Sequence[Path],
    device: torch.device,
    config: PredictConfig,
    progress: bool = True,
) -> Predicted:
    """The most probable classes of each file."""
    batch_size = 1 if network.one_by_one else config.batch_size
    loader = image_loader(files, network.data, batch_size, config.workers, device)
    rows: list[Prediction] = []
    unreadable: list[str] = []
    hide = None if progress else True
    with tqdm(total=len(files), desc="predicting", disable=hide, leave=False) as bar:
        for images, indices in loader:
            bad = indices < 0
            unreadable += [_why(files[-1 - index], network) for index in indices[bad].tolist()]
            if not bad.all():
                probabilities = network.probabilities(images)[~bad]
                kept = [files[index] for index in indices[~bad].tolist()]
                rows += top_classes(kept, probabilities, network.labels, config.topk)
            bar.update(len(indices))
    return Predicted(rows, unreadable)


def _why(file: Path, network: Classifier) -> str:
    """Why an image could not be read; loader processes return only numbers."""
    try:
        read_image(file, mode_of(network.data["input_size"][0]))
    except UnreadableImageError as error:
        return str(error)
    return f"{file} could not be read at first, and can be now"
