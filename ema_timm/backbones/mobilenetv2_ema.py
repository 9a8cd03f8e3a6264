"""``<name>_ema`` for timm's MobileNetV2s."""

from collections.abc import Callable

from timm.models import DefaultCfg, list_models
from timm.models._builder import pretrained_cfg_for_features
from torch import nn

from ema_timm.backbones import registry

__all__: list[str] = []
default_cfgs: dict[str, DefaultCfg] = {}


def register() -> None:
    """Register the names with timm."""
    for name in list_models("mobilenetv2_*", module="efficientnet"):
        registry.register(
            __name__,
            f"{name}_ema",
            registry.ema_entrypoint(name, build),
            registry.warm_start_cfgs(name),
        )


def build(plain: Callable, variant: str, pretrained: bool, **kwargs) -> nn.Module:
    """`registry.build_ema`, with the feature extractor that timm uses for this family.

    With ``features_only`` and no wrapper timm builds an ``EfficientNetFeatures``, which has no head
    and loads non-strictly. This function does the same through timm's model function.
    """
    if not kwargs.get("features_only") or "feature_cfg" in kwargs or "feature_cls" in kwargs:
        return registry.build_ema(plain, variant, pretrained, **kwargs)
    del kwargs["features_only"]
    model = registry.build_ema(
        plain,
        variant,
        pretrained,
        plain_kwargs={"features_only": True},
        pretrained_strict=False,
        kwargs_filter=("num_classes", "num_features", "head_conv", "global_pool"),
        **kwargs,
    )
    model.pretrained_cfg = model.default_cfg = pretrained_cfg_for_features(model.pretrained_cfg)
    return model
