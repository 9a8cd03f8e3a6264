"""Runtimes for deployment: a network in each, as a call and a count of its nodes."""

import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ema_timm.errors import UserError, require_packages
from ema_timm.export.formats import open_onnx, write_onnx
from ema_timm.export.inputs import FREE_AXES
from ema_timm.export.layers import ready_to_export
from ema_timm.integrations.int8 import disable_telemetry


class Loaded(NamedTuple):
    """A network in a runtime.

    Attributes:
        call: Logits of images, (B, C, H, W).
        nodes: Operators in its graph, constants left out.
    """

    call: Callable[[Tensor], Tensor]
    nodes: int


def load_runtime(runtime: str, model: nn.Module, images: Tensor, fixed: bool) -> Loaded:
    """Export a network and load the result in a runtime.

    Args:
        runtime: A key of `RUNTIMES`.
        model: A network in inference mode.
        images: An input.
        fixed: Whether the result supports only the sizes of ``images``.
    """
    ready = ready_to_export(model, RUNTIMES[runtime].dialect, images if fixed else None)
    if not fixed:
        images = images.repeat(2, 1, 1, 1)  # a batch of one would be burnt in
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's exporters warn about their own future
        return RUNTIMES[runtime].load(ready, images, {} if fixed else FREE_AXES)


def _onnxruntime(model: nn.Module, images: Tensor, free: dict[int, str]) -> Loaded:
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(model, images, path, "legacy", free)
        nodes = sum(node.op_type != "Constant" for node in onnx.load(path).graph.node)
        return Loaded(open_onnx(path), nodes)


def _openvino(model: nn.Module, images: Tensor, free: dict[int, str]) -> Loaded:
    disable_telemetry()
    import openvino

    sizes = [-1 if axis in free else size for axis, size in enumerate(images.shape)]
    converted = openvino.convert_model(model, example_input=images, input=[sizes])
    # On CPUs that have it OpenVINO computes in bfloat16 unless told otherwise.
    hint = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(converted, "CPU", hint)
    request = compiled.create_infer_request()

    def call(x: Tensor) -> Tensor:
        """Logits, in memory that the next call writes over."""
        found = request.infer([x.numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(found[0])

    kinds = [node.get_type_name() for node in converted.get_ops()]
    nodes = sum(kind not in ("Constant", "Parameter", "Result") for kind in kinds)
    return Loaded(call, nodes)


def _torchscript(model: nn.Module, images: Tensor, free: dict[int, str]) -> Loaded:
    frozen = torch.jit.freeze(torch.jit.trace(model, images, check_trace=False))
    for _ in range(3):  # it specialises on what it has seen
        frozen(images)
    return Loaded(frozen, sum(n.kind().startswith("aten::") for n in frozen.inlined_graph.nodes()))


def _torch_export(model: nn.Module, images: Tensor, free: dict[int, str]) -> Loaded:
    shapes = (dict.fromkeys(free, torch.export.Dim.AUTO),)
    program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    nodes = sum(node.op == "call_function" for node in program.graph.nodes)
    return Loaded(program.module(), nodes)


class Runtime(NamedTuple):
    """A runtime.

    Attributes:
        load: Loads a network that `ready_to_export` returned; the other arguments are images and
            the axes that stay free.
        packages: The packages that it needs besides PyTorch.
        dialect: The dialect of the exported layers, as `ready_to_export` names it.
    """

    load: Callable[[nn.Module, Tensor, dict[int, str]], Loaded]
    packages: tuple[str, ...] = ()
    dialect: str = "plain"


RUNTIMES = {
    "onnxruntime": Runtime(_onnxruntime, ("onnx", "onnxruntime"), "onnx"),
    "openvino": Runtime(_openvino, ("openvino",)),
    "torchscript": Runtime(_torchscript, dialect="pytorch"),
    "torch.export": Runtime(_torch_export, dialect="pytorch"),
}


def require_runtime(name: str) -> None:
    """Name what is known, and what is missing, before any work.

    Raises:
        UserError: If the runtime is unknown, or a package of it is missing.
    """
    if name not in RUNTIMES:
        raise UserError(f"{name} is no runtime here: give {', '.join(RUNTIMES)}.")
    require_packages(RUNTIMES[name].packages, purpose=name)


def missing_packages(name: str) -> list[str]:
    """What a runtime needs and is not installed."""
    return [package for package in RUNTIMES[name].packages if find_spec(package) is None]
