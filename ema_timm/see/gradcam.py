"""Grad-CAM (Selvaraju et al., ICCV 2017, arXiv:1610.02391), by the grad-cam library."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ema_timm.errors import UserError


class Cam(NamedTuple):
    """Grad-CAM of one network for some images.

    Attributes:
        name: Of the network.
        layer: Where in it.
        seen: Images as it sees them, (B, C, H, W), 0 to 1.
        maps: (B, H, W), 0 to 1.
        classes: Number of the class that each map is for.
        labels: Its name.
        probs: Its probability.
    """

    name: str
    layer: str
    seen: Tensor
    maps: Tensor
    classes: Sequence[int]
    labels: Sequence[str]
    probs: Sequence[float]


def grad_cam(model: nn.Module, layer: str, images: Tensor, classes: Sequence[int]) -> Tensor:
    """Where a layer's channels speak for a class.

    Args:
        model: Classifier; left without gradients.
        layer: Name of a module in it whose output is a map, (B, C, h, w).
        images: Prepared images, (B, C, H, W).
        classes: Number of the class of each image.

    Returns:
        (B, H, W), each map from 0 to 1, its own largest value.

    Raises:
        UserError: If there is no such layer, or its output is no map.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    modules = dict(model.named_modules())
    if layer not in modules:
        raise UserError(
            f"--cam-layer names a module of {type(model).__name__}, and it has no {layer!r}. See "
            "model.named_modules()."
        )
    cam = GradCAM(model, [modules[layer]])
    try:
        maps = cam(images, [ClassifierOutputTarget(index) for index in classes])
    except (ValueError, AttributeError) as error:  # of tokens, or of several outputs
        raise UserError(
            f"Grad-CAM needs a layer that gives a map, and {layer} does not: {error} Give another "
            "as --cam-layer, or leave Grad-CAM out with --no-cam."
        ) from error
    finally:
        # Not as a context manager: the library's would swallow an IndexError.
        cam.activations_and_grads.release()
        model.zero_grad(set_to_none=True)
    return torch.from_numpy(maps)


def last_stage(model: nn.Module) -> str:
    """The module that makes the last feature map, by timm's own description of the network."""
    info = getattr(model, "feature_info", None)
    if not info:
        raise UserError(
            f"timm does not say which module of {type(model).__name__} makes its last feature map. "
            "Give it as --cam-layer, or leave Grad-CAM out with --no-cam."
        )
    return info[-1]["module"]
