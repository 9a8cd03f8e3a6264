"""The last block of each stage of a timm network, for ``inject(model, at="stages")``.

timm's ``feature_info`` names a module for each stage. It is often not a place for a layer: an
activation inside the next block, an identity, a list, a container that would run a child of its
own again, or a name that no module has. `stage_maps` then looks for the last block before it that
returns a map of the width and size that ``feature_info`` gives.
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from ema_timm.backbones.trace import Shape, Trace

SMALLEST_STRIDE = 4


class Stage(NamedTuple):
    """An entry of ``feature_info``: module, width, and stride of the map."""

    module: str
    channels: int
    stride: int


def stage_maps(model: nn.Module, trace: Trace) -> tuple[dict[str, str], list[str]]:
    """The modules after which the layers go, with the layout of each output.

    Args:
        model: The network.
        trace: One forward of it.

    Returns:
        Layout ("NCHW" or "NHWC") by name of the module, and a line for each stage without one.

    Raises:
        ValueError: If the network does not list its stages, or at most half of them have a map.
    """
    finder, found, notes = _Finder(trace), {}, []
    stages = _stages(model)
    for stage in stages:
        name = finder.find(stage)
        if name is None:
            notes.append(finder.why_not(stage))
        else:
            found[finder.last_block_of(name)] = finder.layout(name, stage)
    if not stages or 2 * len(found) <= len(stages):
        reason = "; ".join(notes[:3]) or "feature_info lists none"
        raise ValueError(
            f"{type(model).__name__} has too few stages with a map (B, C, H, W) for at='stages': "
            f"{reason}. Name modules that return one: at='PATTERN'."
        )
    return found, notes


def _stages(model: nn.Module) -> list[Stage]:
    """The last entry of each stride from 4 on, in the order of strides."""
    info = getattr(model, "feature_info", None)
    entries = getattr(info, "info", info) or []
    last = {
        entry["reduction"]: Stage(entry.get("module") or "", entry["num_chs"], entry["reduction"])
        for entry in entries
        if entry["reduction"] >= SMALLEST_STRIDE
    }
    return [last[stride] for stride in sorted(last)]


def is_container(module: nn.Module) -> bool:
    """Whether a module runs its children itself: a layer that it gets as a child runs twice."""
    return isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def last_child(name: str, modules: dict[str, nn.Module]) -> str:
    """The last module of a (nested) ``nn.Sequential``; other modules are their own."""
    while type(modules[name]) is nn.Sequential and len(modules[name]):
        name = f"{name}.{list(modules[name]._modules)[-1]}"
    return name


def fits(found: Iterable[int], size: Iterable[int], stride: float) -> bool:
    """Whether a map is about as large as an image divided by a stride."""
    return all(
        abs(length - whole / stride) <= max(2, 0.15 * length)
        for length, whole in zip(found, size, strict=True)
    )


class _Finder:
    """Looks for the module of a stage in a trace."""

    def __init__(self, trace: Trace):
        self.trace, self.modules = trace, trace.modules
        self.ended = {call.name: i for i, call in enumerate(trace.calls)}

    def find(self, stage: Stage) -> str | None:
        """The module of a stage, or None."""
        named = stage.module
        if named in self.modules and named:
            named = last_child(named, self.modules)
        if self._is_block(named, stage):
            return named
        if self._is_tokens(named) or self._kind(named) == "tuple":
            return None
        stop = self.ended.get(named, len(self.trace.calls)) if named else len(self.trace.calls)
        before, after = self.trace.calls[:stop], self.trace.calls[stop:]
        # A container's own output is after its children: its stage is the next module.
        if named in self.ended and is_container(self.modules[named]):
            if not self._returns_no_tensor(named) and (
                next_ones := self._fitting(after, stage, leaves=True)
            ):
                return next_ones[0]
        if blocks := self._fitting(before, stage):
            return blocks[-1]
        if self._returns_no_tensor(named) and (later := self._fitting(after, stage)):
            return later[0]
        if named and named in self.modules and not is_container(self.modules[named]):
            if self.layout(named, stage):
                return named
        if leaves := self._fitting(before, stage, leaves=True):
            return leaves[-1]
        return next(iter(self._fitting(after, stage, leaves=True)), None)

    def layout(self, name: str, stage: Stage) -> str | None:
        """The layout in which a module's output fits a stage, or None."""
        shape, size = self.trace.map_of(name), self.trace.size
        if shape is None or size is None:
            return None
        if shape[1] == stage.channels and fits(shape[2:], size, stage.stride):
            return "NCHW"
        if shape[3] == stage.channels and fits(shape[1:3], size, stage.stride):
            return "NHWC"
        return None

    def last_block_of(self, stage: str) -> str:
        """The block inside a stage that returns the stage's output, or the stage itself.

        Layer decay counts a layer on a block to the block, and one on a stage often to the head.
        """
        inside = [
            name
            for name in self.trace.of(stage)[0].same
            if name.startswith(f"{stage}.")
            and isinstance(self._parent(name), nn.Sequential | nn.ModuleList)
            and not is_container(self.modules[name])
            and any(self.modules[name].children())
            and _has_weights(self.modules[name])
            and len(self.trace.of(name)) == 1
        ]
        return _outermost(inside)[-1] if inside else stage

    def why_not(self, stage: Stage) -> str:
        """Why a stage has no place."""
        name = stage.module or "(the network)"
        if self._is_tokens(stage.module):
            return f"{name} returns tokens {self.trace.of(stage.module)[0].shape}"
        if self._kind(stage.module) == "tuple":
            return f"{name} returns a tuple"
        return f"no module returns {stage.channels} channels at stride {stage.stride} ({name})"

    def _is_block(self, name: str, stage: Stage) -> bool:
        module = self.modules.get(name) if name else None
        if module is None or is_container(module) or not _has_weights(module):
            return False
        return self.layout(name, stage) is not None

    def _fitting(self, calls: list, stage: Stage, leaves: bool = False) -> list[str]:
        """The outermost modules among these calls whose output fits a stage."""
        names = [
            call.name
            for call in calls
            if call.name
            and self._is_block(call.name, stage)
            # A bare convolution is a patch or position embedding of a network of tokens.
            and not isinstance(self.modules[call.name], nn.Conv2d)
            and (leaves or any(self.modules[call.name].children()))
        ]
        return _outermost(names)

    def _is_tokens(self, name: str) -> bool:
        calls = self.trace.of(name) if name else []
        return bool(calls) and calls[-1].shape is not None and len(calls[-1].shape) == 3

    def _kind(self, name: str) -> str:
        calls = self.trace.of(name) if name else []
        return calls[-1].kind if calls else ""

    def _returns_no_tensor(self, name: str) -> bool:
        calls = self.trace.of(name) if name else []
        return not calls or calls[-1].shape is None

    def _parent(self, name: str) -> nn.Module:
        return self.modules[name.rpartition(".")[0]]


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _outermost(names: list[str]) -> list[str]:
    return [n for n in names if not any(n.startswith(f"{outer}.") for outer in names)]


def layout_by_shape(shape: Shape, size: Shape | None) -> str:
    """The layout of a map whose width is not known: "NHWC" if only that fits the image.

    Args:
        shape: Shape of the output, 4 dimensions.
        size: (H, W) of the image, if there is one.
    """
    if size is None or _proportional(shape[2:], size) or not _proportional(shape[1:3], size):
        return "NCHW"
    return "NHWC"


def _proportional(found: Shape, size: Shape) -> bool:
    stride = (size[0] * size[1] / max(1, found[0] * found[1])) ** 0.5
    return fits(found, size, stride)
