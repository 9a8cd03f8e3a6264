"""What Inductor makes of the closed form for an H100 that is not here: kernels and their bytes.

`python tests/support/inductor.py` prints both networks' stages; nothing is compiled or run. The
graphs of forward and backward are traced with fake CPU tensors, put on a fake GPU, and lowered and
scheduled by the steps of `torch._inductor.compile_fx`, in its order: no public call stops before
code is run. Inductor reads sizes, strides and a few properties of the GPU, and remembers them for
the whole process: run this in one of its own.

Bytes are Inductor's own: a kernel reads and writes each of its buffers once, however often it
comes back to it, so they are a floor. Seen with PyTorch 2.14; it is private, and others may differ.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.device_interface import CudaInterface
from torch._dynamo.source import ConstantSource
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._inductor.compile_fx import partition_fn, record_original_output_strides
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

sys.path.insert(0, str(Path(__file__).parents[1]))

from ema_timm.bench.layer import SHAPES
from ema_timm.ops.formula import closed_form
from ema_timm.ops.weights import EmaWeights

BATCH, GROUPS, DTYPE = 256, 32, torch.bfloat16
FLOOR = 5
"""Sizes of x that must move: x and out; D, x and dx."""

FUSED = partial(closed_form, for_inductor=True)
H100 = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
)


class Kernel(NamedTuple):
    """One launch: a kernel that Inductor writes, or one of a library.

    Attributes:
        moved: Read and written, in sizes of x.
        copies: Whether it reads only an input of the graph, and writes a map in float32.
    """

    moved: float
    copies: bool


class Lowered(NamedTuple):
    """One training step of one layer.

    Attributes:
        forward: Its kernels.
        backward: Its kernels.
        pinned: Sizes, of those that may vary, that the kernels hold for only.
    """

    forward: list[Kernel]
    backward: list[Kernel]
    pinned: list[str]

    @property
    def moved(self) -> float:
        """Bytes of the whole step, in sizes of x."""
        return sum(kernel.moved for kernel in self.forward + self.backward)


@contextmanager
def fake_h100():
    """Answer for the GPU where Inductor asks about it."""

    def answer(*_args):
        return H100

    with ExitStack() as stack:
        for place in (CudaInterface, CudaInterface.Worker):
            static = staticmethod(answer)
            stack.enter_context(mock.patch.object(place, "get_device_properties", static))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", answer))
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", lambda: True))
        yield


def lowered(
    shape: tuple[int, int, int], layout: str, form: Callable = FUSED, dynamic: bool = False
) -> Lowered:
    """Lower forward and backward of one layer.

    Args:
        shape: (C, H, W).
        layout: contiguous or channels_last.
        form: Of the signature of `closed_form`.
        dynamic: Lower for any H and W; ``shape`` says what bytes are counted at.
    """
    channels, height, width = shape
    sizes = ShapeEnv() if dynamic else None
    mode = FakeTensorMode(shape_env=sizes)
    unit = BATCH * channels * height * width * DTYPE.itemsize
    if sizes:
        height, width = (_any(sizes, name, n) for name, n in (("H", height), ("W", width)))
    n = channels // GROUPS
    with mode:
        x = torch.empty(BATCH, channels, height, width, dtype=DTYPE)
        if layout == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        each = ((n, n, 1, 1), (n,), (n, n, 3, 3), (n,), (n,), (n,))
        inputs = [t.requires_grad_() for t in (x, *map(torch.empty, each))]
        joint = aot_export_joint_simple(
            lambda x, *weights: (form(x, EmaWeights(*weights), GROUPS),),
            tuple(inputs),
            trace_joint=True,
            decompositions=select_decomp_table(),
        )
        graphs = partition_fn(joint, (), num_fwd_outputs=1)
    kernels = [_kernels(graph, mode, unit, back) for back, graph in enumerate(graphs)]
    return Lowered(*kernels, [str(name) for name in sizes.replacements] if sizes else [])


def _any(sizes: ShapeEnv, name: str, hint: int) -> torch.SymInt:
    """A size that may vary, and is ``hint`` where bytes are counted."""
    source = ConstantSource(name)
    symbol = sizes.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    return sizes.create_symintnode(symbol, hint=hint, source=source)


def _kernels(graph: fx.GraphModule, mode: FakeTensorMode, unit: int, back: int) -> list[Kernel]:
    """Lower and schedule one graph: every node of the schedule that is launched."""
    inputs = _on_gpu(graph, mode)
    view_to_reshape(graph)
    with torch.no_grad(), enable_python_dispatcher():
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
    output = graph.graph.output_node()
    output.meta["user_visible_output_idxs"] = range(len(output.args[0])) if back else [0]
    record_original_output_strides(graph)
    with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()), fake_h100():
        post_grad_passes(graph, is_inference=False)
        lowering = GraphLowering(
            graph, example_inputs=inputs, shape_env=mode.shape_env, is_backward=bool(back)
        )
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            lowering.init_wrapper_code()
            lowering._update_scheduler()
            nodes = lowering.scheduler.nodes
            return [_kernel(n, unit) for n in nodes if not isinstance(n, NopKernelSchedulerNode)]


def _kernel(node, unit: int) -> Kernel:
    reads = node.get_read_write_buffer_accesses(include_reads=True, include_writes=False)
    writes = node.get_read_write_buffer_accesses(include_reads=False, include_writes=True)
    wide = max(writes.values(), default=0) >= unit * torch.float32.itemsize // DTYPE.itemsize
    copies = wide and len(reads) == 1 and V.graph.graph_inputs.keys() >= reads.keys()
    return Kernel(node.get_read_write_buffers_sizes() / unit, copies)


def _on_gpu(graph: fx.GraphModule, mode: FakeTensorMode) -> list:
    """Move a graph's constants to the GPU; its inputs there.

    Traced there, autograd's engine would ask for a GPU.
    """
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    graph.recompile()
    with mode:
        return [
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda")
            if isinstance(v, Tensor)
            else v
            for v in (node.meta["val"] for node in graph.graph.find_nodes(op="placeholder"))
        ]


def main() -> None:
    """Print sizes of x moved, and kernels, with H and W fixed and free."""
    print("| map | layout | H, W | forward | kernels | backward | kernels | × floor |")
    print("|---|---|---|---|---|---|---|---|")
    for place, shape in SHAPES.items():
        for layout in ("contiguous", "channels_last"):
            for dynamic in (False, True):
                found = lowered(shape, layout, dynamic=dynamic)
                cells = [place, layout, "free" if dynamic else "fixed"]
                for kernels in (found.forward, found.backward):
                    cells += [f"{sum(k.moved for k in kernels):.1f}", str(len(kernels))]
                print("|", " | ".join([*cells, f"{found.moved / FLOOR:.1f}"]), "|", flush=True)


if __name__ == "__main__":
    main()
