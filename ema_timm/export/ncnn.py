"""Files of ncnn: pnnx converts a trace of the network, ncnn opens the result.

ncnn has no batch, and pnnx writes the size of the example into the graph, so a file supports one
image of one size. A network is a pair of files: the graph is ``.param``, the weights are ``.bin``.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from ema_timm.errors import VerificationError


def write_ncnn(
    model: nn.Module, example: Tensor, path: Path, free: Mapping[int, str], fp16: bool = False
) -> None:
    """Write a network for ncnn.

    Args:
        model: A network in inference mode.
        example: An input, (B, C, H, W); its batch is not used.
        path: The ``.param`` file; the weights get the same name with the suffix ``.bin``.
        free: Not used, since no size stays free.
        fp16: Store the weights in half precision.

    Raises:
        VerificationError: If pnnx cannot convert the network.
    """
    import pnnx

    example = example[:1]
    shape = ",".join(map(str, example.shape))
    options = [f"inputshape=[{shape}]f32", f"fp16={int(fp16)}"]
    with tempfile.TemporaryDirectory() as scratch:
        torch.jit.trace(model, example, check_trace=False).save(f"{scratch}/model.pt")
        done = subprocess.run(
            [pnnx.EXEC_PATH, "model.pt", *options], cwd=scratch, capture_output=True, text=True
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise VerificationError(
                f"{path.name} was not written: pnnx cannot convert the network ({said}). Try "
                "another --format."
            )
        shutil.move(f"{scratch}/model.ncnn.param", path)
        shutil.move(f"{scratch}/model.ncnn.bin", path.with_suffix(".bin"))


def open_ncnn(path: Path) -> Callable[[Tensor], Tensor]:
    """Open a ``.param`` file, and the ``.bin`` file beside it, in ncnn on the CPU.

    Returns:
        From images, (B, C, H, W), to logits; one image after the other.

    Raises:
        RuntimeError: If ncnn does not load or run the files.
    """
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    # By default ncnn rounds maps to half precision, which would hide small mistakes.
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    weights = path.with_suffix(".bin")
    if net.load_param(str(path)) or net.load_model(str(weights)):
        raise RuntimeError(f"ncnn does not load {path.name}")
    return lambda images: torch.stack([_run(net, image) for image in images])


def _run(net, image: Tensor) -> Tensor:
    """Logits of one image, (C, H, W)."""
    import ncnn

    with net.create_extractor() as run:
        run.input(net.input_names()[0], ncnn.Mat(image.numpy()))
        code, found = run.extract(net.output_names()[0])
        if code:
            raise RuntimeError(f"ncnn fails with code {code}")
        return torch.from_numpy(numpy.array(found))
