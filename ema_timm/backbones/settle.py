"""Moves places of EMA layers until each layer would run exactly once in a forward."""

from typing import Any

from torch import nn

from ema_timm import hooks
from ema_timm.backbones.trace import FORWARD_ERRORS, Trace
from ema_timm.errors import sentence, some


def settled(
    model: nn.Module, layouts: dict[str, str], trace: Trace, example: Any, replace: bool
) -> dict[str, str]:
    """The places where a layer runs exactly once.

    Some modules run all their children themselves, such as timm's RegStage. A layer that they got
    would run twice, which the identity initialisation hides; its place is their last child.
    """
    while True:
        ran = _count_runs(model, layouts, example, replace)
        again = [name for name in layouts if ran[name] != 1]
        if not again:
            return layouts
        moved = dict(layouts)
        for name in again:
            children = list(model.get_submodule(name)._modules)
            child = f"{name}.{children[-1]}" if children else ""
            if not children or trace.map_of(child) != trace.map_of(name):
                raise ValueError(
                    f"{name} ({type(model.get_submodule(name)).__name__}) cannot take EMA "
                    f"attention: it would run {ran[name]} times. Name a module inside it."
                )
            moved[child] = moved.pop(name)
        layouts = moved


def _count_runs(
    model: nn.Module, layouts: dict[str, str], example: Any, replace: bool
) -> dict[str, int]:
    """How often each layer would run, counted with identities in place of the layers."""
    modules = {name: model.get_submodule(name) for name in layouts}
    try:
        for name, module in modules.items():
            if replace:
                put_module(model, name, nn.Identity())
            else:
                hooks.attach(module, nn.Identity(), layouts[name], gain=1)
        after = Trace(model, example)
    except FORWARD_ERRORS as error:
        raise ValueError(
            f"{type(model).__name__} fails with layers {'instead of' if replace else 'after'} "
            f"{some(list(modules))}: {sentence(error)} Name other modules."
        ) from error
    finally:
        for name, module in modules.items():
            if replace:
                put_module(model, name, module)
            elif hooks.attached(module):
                hooks.detach(module)
    return {name: len(after.of(name if replace else f"{name}.{hooks.CHILD}")) for name in modules}


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set a module of ``model`` by its dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
