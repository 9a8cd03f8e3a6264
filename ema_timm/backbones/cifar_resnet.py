"""The paper's CIFAR networks, with EMA attention (``_ema``) and plain.

timm ResNets with the CIFAR stem of the paper: a 3×3 convolution of stride 1 and no pooling, for
32×32 images. The stages then run at strides 1, 2, 4 and 8.
"""

from collections import deque
from collections.abc import Callable
from functools import partial

from timm.models import DefaultCfg, PretrainedCfg, build_model_with_cfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from ema_timm.backbones import registry

__all__: list[str] = []
default_cfgs: dict[str, DefaultCfg] = {}

_LAYERS = {
    "cifar_resnet18": (BasicBlock, (2, 2, 2, 2)),
    "cifar_resnet50": (Bottleneck, (3, 4, 6, 3)),
    "cifar_resnet101": (Bottleneck, (3, 4, 23, 3)),
}
_CIFAR_MEAN = tuple(value / 255 for value in (125.3, 123.0, 113.9))
_CIFAR_STD = tuple(value / 255 for value in (63.0, 62.1, 66.7))
_IMAGENET_STEM_STRIDE = 4


def register() -> None:
    """Register the networks with timm, with and without EMA attention."""
    for name in _LAYERS:
        registry.register(__name__, name, _plain_entrypoint(name), _cfgs())
        registry.register(__name__, f"{name}_ema", registry.ema_entrypoint(name), _cfgs())


def _plain_entrypoint(name: str) -> Callable:
    block, layers = _LAYERS[name]

    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        network = partial(cifar_resnet, block, layers)
        return build_model_with_cfg(network, name, pretrained, **kwargs)

    entrypoint.__doc__ = f"{name}: ResNet with the CIFAR stem, for 32×32 images, 100 classes."
    return entrypoint


def cifar_resnet(
    block: type[nn.Module], layers: tuple[int, ...], output_stride: int = 8, **kwargs
) -> ResNet:
    """A timm ResNet whose stem is a 3×3 convolution of stride 1 without pooling.

    Args:
        block: timm's BasicBlock or Bottleneck.
        layers: Blocks in each stage.
        output_stride: Stride of the last stage: 8, or 4 or 2 with dilation.
        **kwargs: Arguments of timm's ResNet.

    Raises:
        ValueError: If ``output_stride`` is none of 8, 4, 2.
    """
    if output_stride not in (8, 4, 2):
        raise ValueError(
            f"A CIFAR ResNet has output stride 8, or 4 or 2 with dilation, got {output_stride}."
        )
    # timm includes the stem's stride of 4, which this stem does not have.
    model = ResNet(block, layers, output_stride=output_stride * _IMAGENET_STEM_STRIDE, **kwargs)
    old = model.conv1
    model.conv1 = nn.Conv2d(
        old.in_channels,
        old.out_channels,
        kernel_size=3,
        padding=1,
        bias=False,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    model.feature_info[0]["reduction"] = 1
    for info in model.feature_info[1:]:
        info["reduction"] //= _IMAGENET_STEM_STRIDE
    return model


def _cfgs() -> DefaultCfg:
    cfg = PretrainedCfg(
        num_classes=100,
        input_size=(3, 32, 32),
        pool_size=(4, 4),
        crop_pct=1.0,
        interpolation="bicubic",
        mean=_CIFAR_MEAN,
        std=_CIFAR_STD,
        first_conv="conv1",
        classifier="fc",
        license="apache-2.0",
        paper_ids="arXiv:2305.13563",
    )
    return DefaultCfg(tags=deque(["untrained"]), cfgs={"untrained": cfg})
