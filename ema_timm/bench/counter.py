"""Count the operators of CUDA's path, and the bytes that they read and write, without a GPU.

Fake CUDA tensors have a device, a dtype and strides but no data, so every choice is made as it
would be on CUDA. An operator counts as reading each of its inputs once and writing each of its
outputs once. Views and allocations cost nothing, and a broadcast input counts once. A library
kernel may read its input twice (a group norm does), and an operator may launch several kernels: the
counts are lower bounds, alike for all variants.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE = {
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}
"""Operators that touch no memory, although their schema names no view."""

WRITE_ONLY = {"copy_", "fill_", "zero_"}
"""In-place operators that do not read what they overwrite."""


class Counter(TorchDispatchMode):
    """Adds up the operators that are dispatched inside it.

    Attributes:
        bytes: Read and written.
        launches: Operators that touch memory.
        lines: The name and the bytes of each, in order.
    """

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.launches = 0
        self.lines: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        moved = _moved(func._schema, args, kwargs, result)
        if moved is not None:
            self.bytes += moved
            self.launches += 1
            self.lines.append((func._schema.name.removeprefix("aten::"), moved))
        return result


def _moved(schema: torch._C.FunctionSchema, args: tuple, kwargs: dict, result) -> int | None:
    """Bytes that one call moves; None if it is a view or touches no memory."""
    name = schema.name.removeprefix("aten::")
    views = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
    if views or name in FREE or schema.name.startswith("prim"):
        return None
    read, moved = {}, 0
    for position, argument in enumerate(schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
        written = argument.alias_info is not None and argument.alias_info.is_write
        moved += sum(_touched(t) for t in tensors) if written else 0
        if not (written and (argument.kwarg_only or name in WRITE_ONLY)):
            read |= {id(t): t for t in tensors}
    fresh = [r for r in schema.returns if r.alias_info is None]
    made = [t for t in tree_leaves(result) if isinstance(t, Tensor)] if fresh else []
    if not (moved or read or made):  # asks only for a dtype
        return None
    return moved + sum(_touched(t) for t in [*read.values(), *made])


def _touched(t: Tensor) -> int:
    """Bytes of the distinct elements of a tensor: an expanded axis holds one."""
    size = t.element_size()
    for length, stride in zip(t.shape, t.stride(), strict=True):
        size *= length if stride or not length else 1
    return size


@contextlib.contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """Mixed precision for CUDA tensors, which `torch.autocast` refuses without a GPU.

    Args:
        dtype: Of the mixed precision; float32 switches it off.
    """
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype != torch.float32)
    torch.set_autocast_dtype("cuda", dtype if dtype != torch.float32 else before[1])
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@torch.no_grad()
def backward(out: Tensor, grad: Tensor) -> None:
    """Run ``out.backward(grad)`` node by node, without PyTorch's engine, which needs a GPU.

    The gradients of the leaves are dropped.
    """
    waiting = _edges(out.grad_fn)
    arrived: dict = defaultdict(dict)
    arrived[out.grad_fn][out.output_nr] = grad
    ready = [out.grad_fn]
    while ready:
        node = ready.pop()
        found = _apply(node, arrived.pop(node, {}))
        for (target, number), value in zip(node.next_functions, found, strict=True):
            if target is None:
                continue
            if value is not None:
                value = _fitted(value, target._input_metadata[number])
                there = arrived[target].get(number)
                arrived[target][number] = value if there is None else there + value
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)


def _edges(root) -> dict:
    """For each node, the number of nodes that send it a gradient."""
    waiting: dict = defaultdict(int)
    seen, stack = {root}, [root]
    while stack:
        for target, _ in stack.pop().next_functions:
            if target is not None:
                waiting[target] += 1
                if target not in seen:
                    seen.add(target)
                    stack.append(target)
    return waiting


def _apply(node, gradients: dict[int, Tensor]) -> list[Tensor | None]:
    if not node.next_functions:
        return []
    call = getattr(node, "apply", node)  # a function written in Python is not callable
    found = call(*[gradients.get(i) for i in range(len(node._input_metadata))])
    found = list(found) if isinstance(found, tuple) else [found]
    while len(found) > len(node.next_functions):  # arguments that are not tensors have no edge
        found.remove(None)
    return found


def _fitted(grad: Tensor, wanted) -> Tensor:
    """The gradient summed over broadcast axes, in the dtype of its tensor, as the engine does."""
    lead = grad.dim() - len(wanted.shape)
    sizes = zip(grad.shape[lead:], wanted.shape, strict=True)
    over = [*range(lead), *(lead + i for i, (is_, want) in enumerate(sizes) if is_ != want)]
    if over:
        grad = grad.sum(over, keepdim=True).view(wanted.shape)
    return grad if grad.dtype == wanted.dtype else grad.to(wanted.dtype)
