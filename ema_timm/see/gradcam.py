"""Grad-CAM (Selvaraju et al., ICCV 2017, arXiv:1610.02391), by the grad-cam library."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ema_timm.errors import UserError


class Cam(NamedTuple):
    """Grad-CAM of one network for some images.

    Attributes:
        name: Name of the network.
        layer: Name of the module.
        seen: Images as the network sees them, (B, C, H, W), 0 to 1.
        maps: (B, H, W), 0 to 1.
        classes: Number of each map's class.
        labels: Name of each map's class.
        probs: Probability of each map's class.
    """

    name: str
    layer: str
    seen: Tensor
    maps: Tensor
    classes: Sequence[int]
    labels: Sequence[str]
    probs: Sequence[float]


def grad_cam(model: nn.Module, layer: str, images: Tensor, classes: Sequence[int]) -> Tensor:
    """Compute Grad-CAM of one layer.

    Args:
        model: Classifier; left without gradients.
        layer: Name of a module in it whose output is a map, (B, C, h, w).
        images: Prepared images, (B, C, H, W).
        classes: Number of the class of each image.

    Returns:
        (B, H, W), each map from 0 to its own largest value, which is 1.

    Raises:
        UserError: If there is no such layer, or its output is not a feature map.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    modules = dict(model.named_modules())
    if layer not in modules:
        raise UserError(
            f"--cam-layer: {type(model).__name__} has no module {layer!r}. See "
            "model.named_modules()."
        )
    cam = GradCAM(model, [modules[layer]])
    try:
        maps = cam(images, [ClassifierOutputTarget(index) for index in classes])
    except (ValueError, AttributeError) as error:  # tokens, or several outputs
        raise UserError(
            f"Grad-CAM needs a feature map, but the output of {layer} is none: {error} Give "
            "another --cam-layer, or leave Grad-CAM out with --no-cam."
        ) from error
    finally:
        # Not as a context manager: the library's would swallow an IndexError.
        cam.activations_and_grads.release()
        model.zero_grad(set_to_none=True)
    return torch.from_numpy(maps)


def last_stage(model: nn.Module) -> str:
    """The module that computes the last feature map, by timm's ``feature_info``."""
    info = getattr(model, "feature_info", None)
    if not info:
        raise UserError(
            f"timm does not know the last feature map of {type(model).__name__}. Give its module "
            "as --cam-layer, or leave Grad-CAM out with --no-cam."
        )
    return info[-1]["module"]
