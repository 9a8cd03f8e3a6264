"""Compile the Triton kernels for GPUs that are not here, from the launches of real calls.

`python tests/support/offline.py` prints, for ResNet-50's stages, what each kernel takes on
chip. The interpreter checks numbers; this checks types, layouts and resources.
"""

import inspect
import math
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ema_timm.ops.formula import fold
from ema_timm.ops.gpu.fused import launch

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.oracle import make_case
from support.sass import issued

_MODULES = ("weight_gradients", "forward_kernels", "backward_kernels")
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Compiled(NamedTuple):
    """One kernel on one GPU.

    Attributes:
        name: Of the kernel.
        registers: For each thread.
        spilled: Bytes a thread keeps in memory for want of registers.
        shared: Bytes of shared memory a program.
        warps: Warps a program.
        programs: Of the launch.
        cubin: Its machine code.
        numbers: Its arguments, None for pointers.
        capability: Of the GPU, 10·major + minor.
    """

    name: str
    registers: int
    spilled: int
    shared: int
    warps: int
    programs: int
    cubin: bytes
    numbers: tuple
    capability: int

    @property
    def issued(self) -> Counter:
        """What a warp of one program issues, by instruction; ValueError where a loop has no end."""
        return issued(self.cubin, self.numbers, self.capability)

    @property
    def resident(self) -> int:
        """Warps a multiprocessor holds: of 64, by registers alone."""
        each = -(-self.registers // 8) * 8 * 32 * self.warps
        return min(64, 65536 // each * self.warps)

    @property
    def lanes(self) -> int:
        """Lane-instructions of the whole launch."""
        return self.issued.total() * self.warps * 32 * self.programs


class Recorder:
    """Stands in for a kernel: compiles each launch instead of running it."""

    def __init__(self, kernel, capability: int, found: list[Compiled]):
        self.kernel, self.capability, self.found = kernel, capability, found

    def __getitem__(self, grid):
        return partial(self.launch, math.prod(grid))

    def launch(self, programs: int, *args, **kwargs):
        """Compile for the types and values of one launch."""
        options = {k: kwargs.pop(k) for k in _OPTIONS if k in kwargs}
        bound = inspect.signature(self.kernel.fn).bind(*args, **kwargs).arguments
        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        signature, constexprs, attrs, numbers = {}, {}, {}, []
        for index, (name, value) in enumerate(bound.items()):
            if name in constants:
                signature[name], constexprs[(index,)] = "constexpr", value
            else:
                signature[name] = _specialize(value, (index,), constexprs, attrs, numbers)
        source = ASTSource(self.kernel, signature, constexprs=constexprs, attrs=attrs)
        done = triton.compile(source, GPUTarget("cuda", self.capability, 32), options=options)
        registers, spilled = _assemble(done.asm["ptx"], self.capability)
        name = self.kernel.fn.__name__
        on_chip = registers, spilled, done.metadata.shared, options["num_warps"]
        code = done.asm["cubin"], tuple(numbers), self.capability
        self.found.append(Compiled(name, *on_chip, programs, *code))


def _specialize(value, path: tuple[int, ...], constexprs: dict, attrs: dict, numbers: list):
    """The type of one argument, or of each in a bundle; what a launch would know of its value."""
    if isinstance(value, tuple):
        types = [
            _specialize(v, (*path, i), constexprs, attrs, numbers) for i, v in enumerate(value)
        ]
        return type(value)(*types)
    if isinstance(value, int) and value == 1:
        constexprs[path] = value
        return "constexpr"
    if isinstance(value, Tensor) or value % 16 == 0:
        attrs[path] = [["tt.divisibility", 16]]
    numbers.append(None if isinstance(value, Tensor) else value)
    return _TYPES[value.dtype] if isinstance(value, Tensor) else "i32"


class _Recorders:
    """Stands in for a module of kernels."""

    def __init__(self, module, capability: int, found: list[Compiled]):
        self._all = module, capability, found

    def __getattr__(self, name):
        module, capability, found = self._all
        value = getattr(module, name)
        kernel = isinstance(value, triton.runtime.JITFunction)
        return Recorder(value, capability, found) if kernel else value


def compile_call(
    x: Tensor, weights, groups: int, grad: Tensor | None, capability: int
) -> list[Compiled]:
    """Every kernel of one forward and one backward, without ``grad`` of inference; runs nothing."""
    found: list[Compiled] = []
    modules = {name: getattr(launch, name) for name in _MODULES}
    try:
        for name, module in modules.items():
            setattr(launch, name, _Recorders(module, capability, found))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Triton 3.9 announces a default that will change
            _, saved = launch.forward(x, fold(weights), groups, save=grad is not None)
            if saved is not None:
                launch.backward(grad, x, saved, weights, groups)
    finally:
        for name, module in modules.items():
            setattr(launch, name, module)
    return found


def _assemble(ptx: str, capability: int) -> tuple[int, int]:
    """Registers and spilled bytes, as ptxas counts them."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    version = tuple(map(int, re.search(r"^\.version (\d+)\.(\d+)", ptx, re.M).groups()))
    target = re.search(r"^\.target (\S+)", ptx, re.M).group(1).rstrip(",")
    for ptxas in sorted(folder.glob("ptxas*")):
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "kernel.ptx"
            file.write_text(ptx)
            done = subprocess.run(
                [ptxas, "-v", f"--gpu-name={target}", file, "-o", file.with_suffix(".cubin")],
                capture_output=True,
                text=True,
            )
        if done.returncode == 0:
            registers = int(re.search(r"Used (\d+) registers", done.stderr).group(1))
            return registers, int(re.search(r"(\d+) bytes spill stores", done.stderr).group(1))
    raise RuntimeError(f"no ptxas in {folder} takes PTX {version} for {target}: {done.stderr}")


STAGES = {
    "ResNet-50": ((256, 56), (512, 28), (1024, 14), (2048, 7)),
    "MobileNetV2": ((192, 28), (384, 14), (576, 14), (960, 7)),
}
"""Channels and height of the maps that EMA gates in both networks, 32 groups."""


def stage(channels: int, size: int, layout: str, capability: int) -> list[Compiled]:
    """Every kernel of one training step of one layer, bfloat16 and 2 samples."""
    case = make_case((2, channels, size, size), 32, torch.bfloat16, layout)
    weights = type(case.weights)(*[w.float() for w in case.weights])
    grad = torch.empty_like(case.x).copy_(case.grad)
    return compile_call(case.x, weights, 32, grad, capability)


def counted(kernel: Compiled, elements: int) -> str:
    """Registers, spilled bytes, warps of a multiprocessor, barriers, lane-instructions."""
    on_chip = f"{kernel.registers}, {kernel.spilled}, {kernel.resident}"
    try:
        return f"{on_chip}, {kernel.issued['BAR']}, {kernel.lanes / elements:.1f}"
    except ValueError:  # a loop whose end is not known before the launch
        return f"{on_chip}, –, –"


def main() -> None:
    """Print the table of both networks' stages: `offline.py 80 90 100`."""
    capabilities = [int(text) for text in sys.argv[1:]] or [90]
    names = [f"{capability / 10}" for capability in capabilities]
    print(f"| map | layout | kernel | warps | {' | '.join(names)} |")
    print("|" + "---|" * (4 + len(capabilities)))
    for channels, size in [shape for shapes in STAGES.values() for shape in shapes]:
        for layout in ("contiguous", "channels_last"):
            each = [stage(channels, size, layout, capability) for capability in capabilities]
            for kernels in zip(*each, strict=True):
                name = kernels[0].name.removesuffix("_tile")
                if name in ("forward", "backward"):  # the sums over tiles depend on the batch
                    shape = f"{channels}×{size}×{size} | {layout} | {name} | {kernels[0].warps}"
                    numbers = [counted(k, 2 * channels * size * size) for k in kernels]
                    print(f"| {shape} | {' | '.join(numbers)} |", flush=True)


if __name__ == "__main__":
    main()
