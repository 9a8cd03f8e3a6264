"""``attend``: a figure of the attention maps of a checkpoint, and of Grad-CAM, over images."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ema_timm.environment import pick_device
from ema_timm.errors import UserError, require_packages
from ema_timm.see.detectors import best_detections, letterboxed, names_detector, opened
from ema_timm.see.gates import LayerGates, last_of_stages, layer_gates
from ema_timm.see.gradcam import Cam, grad_cam, last_stage
from ema_timm.see.images import find_images, keep_images, prepare
from ema_timm.see.networks import Classifier, open_classifier
from ema_timm.see.predictions import Prediction, check_png, top_classes
from ema_timm.see.settings import AttendConfig

MOST_IMAGES = 24
"""Rows of one figure."""


class Attended(NamedTuple):
    """The result of `attend`.

    Attributes:
        pictures: Files that were written.
        layers: Names of the layers in them.
        rows: The most probable class of each image.
        skipped: Sentences on what was skipped in folders.
    """

    pictures: list[Path]
    layers: list[str]
    rows: list[Prediction]
    skipped: list[str]


def attend(config: AttendConfig) -> Attended:
    """Draw the gates of each stage, and Grad-CAM, over images.

    Raises:
        UserError: If a setting is wrong, or the network or an image is missing.
        HubError: If a download from the Hub fails.
    """
    detects = names_detector(config.source)
    _check(config, detects)
    from ema_timm.see.drawing import save_attention, save_groups

    files, skipped = find_images(config.images)
    if len(files) > MOST_IMAGES:
        raise UserError(
            f"a figure has rows for {MOST_IMAGES} images, got {len(files)}. Give fewer."
        )
    pictures = [Path(config.output)]
    if config.groups:
        pictures.append(pictures[0].with_name(f"{pictures[0].stem}-groups.png"))
    for picture in pictures:
        keep_images(files, "--output", picture)
    look = _at_detector if detects else _at_classifier
    seen, gates, rows, cams = look(config, files, torch.device(pick_device(config.device)))
    save_attention(seen, gates, cams, rows, pictures[0])
    if config.groups:
        save_groups(seen, gates, rows, pictures[1])
    return Attended(pictures, list(gates), rows, skipped)


_Seen = tuple[Tensor, dict[str, LayerGates], list[Prediction], list[Cam]]


def _at_classifier(config: AttendConfig, files: list[Path], device: torch.device) -> _Seen:
    network = open_classifier(config.source, device)
    images, seen = prepare(files, network.data)
    gates = _chosen(layer_gates(network.run, images), network.run, config.layers)
    probabilities = network.probabilities(images.to(device))
    rows = top_classes(files, probabilities, network.labels, 1)
    cams = []
    if config.cam:
        classes = _classes(rows, network, config.target)
        cams.append(_cam(network, files, classes, config.cam_layer, device))
        if config.beside:
            other = _second(config, network, device)
            cams.append(_cam(other, files, classes, config.cam_layer, device))
    return seen, gates, rows, cams


def _at_detector(config: AttendConfig, files: list[Path], device: torch.device) -> _Seen:
    yolo = opened(config.source)
    seen = letterboxed(yolo, files)
    net = yolo.model.to(device)
    gates = _chosen(layer_gates(net, seen), net, config.layers)
    return seen, gates, best_detections(yolo, files, device), []


def _check(config: AttendConfig, detects: bool) -> None:
    """Check the settings, before any work."""
    check_png("--output", config.output)
    given = [name for name in ("beside", "target", "cam_layer") if getattr(config, name)]
    if given and (detects or not config.cam):
        option = "--" + given[0].replace("_", "-")
        without = "is not drawn for detectors" if detects else "--no-cam leaves out"
        about = f"{option} is about Grad-CAM, which {without}"
        raise UserError(f"{about}. Drop {'it' if detects else 'one of them'}.")
    if config.cam and not detects:
        require_packages(["pytorch_grad_cam"], "see", "Grad-CAM (which --no-cam leaves out)")


def _chosen(gates: dict[str, LayerGates], model: nn.Module, names: str) -> dict[str, LayerGates]:
    """The layers to show: those named, else the last of each stage."""
    if not names:
        return {name: gates[name] for name in last_of_stages(model, gates)}
    wanted = [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in gates]
    if unknown:
        raise UserError(
            f"--layers: {unknown[0]!r} is not an EMA attention layer. There are {', '.join(gates)}."
        )
    return {name: gates[name] for name in wanted}


def _classes(rows: list[Prediction], network: Classifier, target: str) -> list[int]:
    """Number of the class that Grad-CAM is for, of each image."""
    if not target:
        return [row.index[0] for row in rows]
    if target in network.labels:
        index = network.labels.index(target)
    elif target.isdecimal() and int(target) < len(network.labels):
        index = int(target)
    else:
        raise UserError(
            f"--target is the name or number of a class, but {network.name} has no {target!r}. It "
            f"has {len(network.labels)}, such as {network.labels[0]!r}."
        )
    return [index] * len(rows)


def _second(config: AttendConfig, network: Classifier, device: torch.device) -> Classifier:
    other = open_classifier(config.beside, device)
    if other.labels != network.labels:
        raise UserError(
            f"--beside takes a network of the same classes, but {config.beside} has other classes "
            f"than {config.source}. Give one that was trained on the same data."
        )
    return other


def _cam(
    network: Classifier, files: list[Path], classes: list[int], layer: str, device: torch.device
) -> Cam:
    images, seen = prepare(files, network.data)
    images = images.to(device)
    layer = layer or last_stage(network.run)
    maps = grad_cam(network.run, layer, images, classes)
    probs = network.probabilities(images).cpu()[range(len(classes)), classes]
    labels = [network.labels[index] for index in classes]
    return Cam(network.name, layer, seen, maps, classes, labels, probs.tolist())
