"""A checkpoint folder as one file for deployment: ONNX, TorchScript or torch.export.

A file gets its final name only after it has been loaded afresh and has agreed with the network on
inputs of several sizes; batch, height and width stay free.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.utils import reparameterize_model
from torch import Tensor, nn

from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.errors import UserError, VerificationError

TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest number of the network's output."""

INT8_IMAGES = 32
"""Random images on which the int8 file is compared."""

Run = Callable[[Tensor], Tensor]


class Exported(NamedTuple):
    """One verified file.

    Attributes:
        path: Where it is.
        sizes: Inputs it was compared on, (B, C, H, W) each.
        difference: Largest difference from the network, relative to its largest output.
    """

    path: Path
    sizes: list[tuple[int, ...]]
    difference: float


class Quantized(NamedTuple):
    """An int8 file, and how it agrees with the float32 file on random images.

    Attributes:
        path: Where it is.
        difference: As in `Exported`.
        same_class: Images with the same most probable class.
        images: Images compared.
    """

    path: Path
    difference: float
    same_class: int
    images: int


def export(
    folder: str | Path, format: str, reparam: bool = False, exporter: str = "dynamo"
) -> Exported:
    """Write ``model.onnx``, ``model.torchscript`` or ``model.pt2`` into a checkpoint folder.

    Args:
        folder: A checkpoint in timm's format, such as a run of ``ema-timm finetune``.
        format: A key of `FORMATS`.
        reparam: Fold first what depends on weights alone, timm's ``--reparam``.
        exporter: For ONNX, which of PyTorch's two exporters: "dynamo" or "legacy".

    Raises:
        UserError: If the folder holds no checkpoint, or a package is missing.
        VerificationError: If the file does not compute what the network computes.
    """
    way = FORMATS[format]
    _require(*way.packages, *(["onnxscript"] if (format, exporter) == ("onnx", "dynamo") else []))
    model = load(folder, scriptable=format == "torchscript", exportable=format == "onnx")
    if reparam:
        model = reparameterize_model(model).eval()
    inputs = check_inputs(model)
    _require_free_sizes(model, inputs)
    options = {"exporter": exporter} if format == "onnx" else {}
    found = []

    def write_and_verify(path: Path) -> None:
        with torch.no_grad(), warnings.catch_warnings():
            # PyTorch's exporters warn about their own future, at every call.
            warnings.simplefilter("ignore")
            way.write(model, inputs[-1], path, **options)
            found.append(_verify(path, way, model, inputs))

    run = CheckpointWriter(folder)
    run.write(way.file, write_and_verify)
    return Exported(run.path / way.file, [tuple(x.shape) for x in inputs], found[0])


def quantize_int8(folder: str | Path) -> Quantized:
    """Write ``model.int8.onnx`` beside ``model.onnx``, by ONNX Runtime's dynamic quantisation.

    Convolutions and the classifier are quantised; the statistics and gates of EMA attention stay
    in float32.

    Args:
        folder: Where `export` has written ``model.onnx``.
    """
    _require("onnx", "onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    run, source = CheckpointWriter(folder), Path(folder) / FORMATS["onnx"].file
    size = check_inputs(load(folder))[0].shape[1:]
    found = []

    def quantize_and_compare(path: Path) -> None:
        quant_pre_process(source, path, skip_symbolic_shape=True)
        quantize_dynamic(
            _without_inner_shapes(path),
            path,
            op_types_to_quantize=["Conv", "Gemm"],
            weight_type=QuantType.QUInt8,
        )
        found.extend(_agreement(open_onnx(path), open_onnx(source), size))

    run.write("model.int8.onnx", quantize_and_compare)
    return Quantized(run.path / "model.int8.onnx", *found, INT8_IMAGES)


def _agreement(small: Run, exact: Run, size: tuple[int, ...]) -> tuple[float, int]:
    images = torch.randn(INT8_IMAGES, *size, generator=torch.Generator().manual_seed(0))
    want = torch.cat([exact(x[None]) for x in images])
    found = torch.cat([small(x[None]) for x in images])
    same = (want.argmax(1) == found.argmax(1)).sum().item()
    return relative_difference(found, want), same


def _without_inner_shapes(path: Path):
    """The model less the shapes noted between its nodes: quantisation transposes weights."""
    import onnx

    model = onnx.load(path)
    del model.graph.value_info[:]
    return model


def load(folder: str | Path, **options) -> nn.Module:
    """The network of a checkpoint folder, for inference.

    Raises:
        UserError: If the folder holds no checkpoint that timm can load.
    """
    missing = [n for n in ("config.json", "model.safetensors") if not (Path(folder) / n).is_file()]
    if missing:
        raise UserError(
            f"{folder} is no checkpoint in timm's format: {', '.join(missing)} is missing. Give "
            "the --output of ema-timm finetune, or a folder of timm's save_for_hf."
        )
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()
    except (RuntimeError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise UserError(f"cannot load {folder}: {str(error).strip().splitlines()[0]}") from error


def check_inputs(model: nn.Module) -> list[Tensor]:
    """Inputs of three sizes, the network's own first; the last is the exporters' example."""
    channels, height, width = resolve_data_config(model=model)["input_size"]
    sizes = [
        (1, channels, height, width),
        (3, channels, height + 32, width),
        (2, channels, height // 2 + 16, width // 2 + 25),
    ]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in sizes]


def _require_free_sizes(model: nn.Module, inputs: list[Tensor]) -> None:
    for x in inputs:
        try:
            with torch.no_grad():
                model(x)
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"export leaves the image size free, and this network does not take "
                f"{x.shape[2]}x{x.shape[3]}: {str(error).strip().splitlines()[0]}"
            ) from error


def relative_difference(found: Tensor, want: Tensor) -> float:
    """Largest difference over the largest magnitude of ``want``."""
    return ((found - want).abs().max() / want.abs().max()).item()


def _verify(path: Path, way: "Format", model: nn.Module, inputs: list[Tensor]) -> float:
    name = way.file
    try:
        run = way.open(path)
        found = [relative_difference(run(x), model(x)) for x in inputs]
    except Exception as error:  # the runtimes' errors have nothing else in common
        raise VerificationError(
            f"{name} was not written: it does not load, or not take another size than it was "
            f"exported with ({str(error).strip().splitlines()[0]})."
        ) from error
    if not all(difference <= TOLERANCE for difference in found):  # NaN fails too
        worst = max(found)
        raise VerificationError(
            f"{name} was not written: it differs from the network by {worst:.1e} of its largest "
            f"output, over {TOLERANCE:.0e}. Try another --format or --exporter."
        )
    return max(found)


def write_onnx(model: nn.Module, example: Tensor, path: Path, exporter: str = "dynamo") -> None:
    """An ONNX file with the input ``x`` and the output ``logits``, sizes free."""
    axes = {0: "batch", 2: "height", 3: "width"}
    names = {"input_names": ["x"], "output_names": ["logits"]}
    if exporter == "legacy":
        torch.onnx.export(
            model, (example,), str(path), dynamo=False, dynamic_axes={"x": axes}, **names
        )
        return
    dims = {axis: torch.export.Dim(name, max=1 << 15) for axis, name in axes.items()}
    program = torch.onnx.export(
        model, (example,), dynamo=True, dynamic_shapes=(dims,), verbose=False, **names
    )
    program.save(str(path), external_data=False)


def open_onnx(path: Path) -> Run:
    """An ONNX file in ONNX Runtime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _write_torchscript(model: nn.Module, example: Tensor, path: Path) -> None:
    torch.jit.script(model).save(str(path))


def _write_pt2(model: nn.Module, example: Tensor, path: Path) -> None:
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 2: auto, 3: auto},)
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    with path.open("wb") as file:
        torch.export.save(program, file)


def _open_pt2(path: Path) -> Run:
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _require(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(f"this needs {', '.join(missing)}: pip install 'ema-timm[export]'")


class Format(NamedTuple):
    """How a format is written and read back.

    Attributes:
        file: Name in the folder.
        packages: What it needs beyond PyTorch.
        write: ``write(model, example, path)``.
        open: ``open(path)`` gives a function of the input.
    """

    file: str
    packages: tuple[str, ...]
    write: Callable[..., None]
    open: Callable[[Path], Run]


FORMATS = {
    "onnx": Format("model.onnx", ("onnx", "onnxruntime"), write_onnx, open_onnx),
    "torchscript": Format("model.torchscript", (), _write_torchscript, torch.jit.load),
    "pt2": Format("model.pt2", (), _write_pt2, _open_pt2),
}
