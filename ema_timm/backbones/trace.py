"""What each module of a network returns in one forward: shapes, order, and number of calls."""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ema_timm.attention import EmaAttn
from ema_timm.backbones.modes import evaluating
from ema_timm.errors import sentence

FORWARD_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""What a network's forward raises for an input, or a child, that it does not take."""

Shape = tuple[int, ...]


class Call(NamedTuple):
    """One call of a module.

    Attributes:
        name: Name of the module in the network.
        given: Shape of the first argument; None if it is not a tensor.
        shape: Shape of the output; None if it is not a tensor.
        kind: Class name of the output.
        same: Names of the modules that returned this very tensor, the innermost first.
    """

    name: str
    given: Shape | None
    shape: Shape | None
    kind: str
    same: list[str]


class Trace:
    """The calls of one forward, in the order in which they ended.

    Args:
        model: The network.
        example: What it is called with; see `as_arguments`.
    """

    def __init__(self, model: nn.Module, example: Any):
        modules = dict(model.named_modules())
        layers = {name for name, module in modules.items() if isinstance(module, EmaAttn)}
        # A hooked child would make an EMA layer call its children.
        self.modules = {n: m for n, m in modules.items() if n.rpartition(".")[0] not in layers}
        self.calls: list[Call] = []
        self._by_name: dict[str, list[Call]] = {}
        self._last: dict[int, tuple[weakref.ref, list[str]]] = {}
        args, kwargs = as_arguments(example)
        with self._hooked(), evaluating(model), torch.no_grad():
            model(*args, **kwargs)
        self._last.clear()
        maps = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() == 4]
        self.size = tuple(maps[0].shape[2:]) if maps else None
        self.output = self.calls[-1].shape

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        handles = [
            module.register_forward_hook(partial(self._note, name))
            for name, module in self.modules.items()
            if not isinstance(module, torch.jit.ScriptModule)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        first = inputs[0] if inputs else None
        same = self._same(output)
        same.append(name)
        call = Call(name, _shape(first), _shape(output), type(output).__name__, same)
        self.calls.append(call)
        self._by_name.setdefault(name, []).append(call)

    def _same(self, output: Any) -> list[str]:
        """The list for modules that return ``output``. An id can be that of a freed tensor."""
        if not isinstance(output, Tensor):
            return []
        known, names = self._last.get(id(output), (None, []))
        if known is None or known() is not output:
            names = []
            self._last[id(output)] = weakref.ref(output), names
        return names

    def of(self, name: str) -> list[Call]:
        """The calls of one module."""
        return self._by_name.get(name, [])

    def map_of(self, name: str) -> Shape | None:
        """The shape of a module's only output, if it ran once and returned 4 dimensions."""
        calls = self.of(name)
        shape = calls[0].shape if len(calls) == 1 else None
        return shape if shape and len(shape) == 4 else None


def _shape(value: Any) -> Shape | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def as_arguments(example: Any) -> tuple[tuple, dict]:
    """Arguments of a network's forward from an example.

    Args:
        example: A tuple of positional arguments, a dict of keyword arguments, or the only argument.
    """
    if isinstance(example, dict):
        return (), example
    return (example if isinstance(example, tuple) else (example,)), {}


def moved(example: Any, device: torch.device) -> Any:
    """``example`` with its tensors on ``device``, also inside tuples, lists and dicts."""
    if isinstance(example, Tensor):
        return example.to(device)
    if isinstance(example, dict):
        return {name: moved(each, device) for name, each in example.items()}
    if isinstance(example, list | tuple):
        return type(example)(moved(each, device) for each in example)
    return example


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the meta device, without a copy of its weights in memory."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        kept = nn.Parameter(empty, tensor.requires_grad)
        memo[id(tensor)] = kept if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo).to("meta")


def nominal_example(model: nn.Module) -> Tensor:
    """An image of a timm network's own size, on the meta device, (1, C, H, W).

    Raises:
        ValueError: If ``model`` is not a timm network.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, dict) or "input_size" not in cfg:
        raise ValueError(
            f"{type(model).__name__} does not say what its input is. Give one: "
            "example=torch.zeros(1, 3, 224, 224)."
        )
    channels, *size = cfg["input_size"]
    stem = cfg.get("first_conv")
    if isinstance(stem, str):
        channels = getattr(_submodule(model, stem), "in_channels", channels)
    channels = getattr(model, "in_chans", channels)
    embed = getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = getattr(model, "_traits", {}).get("img_size") or embed or size
    return torch.empty(1, channels, *size, device="meta")


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules()).get(name)


def trial(model: nn.Module, example: Any) -> tuple[nn.Module, Any]:
    """The network and the input for `Trace`: the model itself, or a copy on meta.

    Args:
        model: The network; not changed.
        example: An input, or None for `nominal_example`.
    """
    if example is not None:
        like = next(iter((*model.parameters(), *model.buffers())), None)
        return model, example if like is None else moved(example, like.device)
    return on_meta(model), nominal_example(model)


def traced(model: nn.Module, example: Any) -> Trace:
    """`Trace`, with an error that says what to do."""
    try:
        return Trace(model, example)
    except FORWARD_ERRORS as error:
        raise ValueError(
            f"{type(model).__name__} could not be run once: {sentence(error)} Give an input that "
            "it takes, on its device: example=images."
        ) from error
