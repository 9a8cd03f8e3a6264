"""``<name>_ema`` for every timm ResNet without an attention layer.

The module is not called ``resnet``, because timm lists models by the name of their module.
"""

from collections.abc import Callable

from timm.models import DefaultCfg, list_models, model_entrypoint

from ema_timm.backbones import registry

__all__: list[str] = []
default_cfgs: dict[str, DefaultCfg] = {}


def register() -> None:
    """Register the names with timm."""
    for name in plain_names():
        registry.register(
            __name__,
            f"{name}_ema",
            registry.ema_entrypoint(name),
            registry.warm_start_cfgs(name),
        )


def plain_names() -> list[str]:
    """The ResNets of timm without an attention layer, from its registry."""
    return [n for n in list_models(module="resnet") if not _sets_attention(model_entrypoint(n))]


def _sets_attention(entrypoint: Callable) -> bool:
    """Whether a timm model function sets the block argument ``attn_layer``.

    Read from its bytecode, because building eighty networks takes seconds. A test builds them all
    and compares.
    """
    code = entrypoint.__code__
    constants = [c if isinstance(c, tuple) else (c,) for c in code.co_consts]
    return "attn_layer" in code.co_varnames or any("attn_layer" in c for c in constants)
