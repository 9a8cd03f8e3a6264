"""Reads the files of a detector's folder as untrusted input: with limits, and without running code.

ultralytics' builder looks up a row's name in a module that holds more than layers, evaluates
``activation``, and builds layers of any number and width. So rows, activation and sizes are checked
before it allocates memory: every name is that of a layer, and the network on the meta device has
exactly the tensors of the weights file.
"""

import copy
import json
import re
from pathlib import Path
from types import ModuleType

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ema_timm.checkpoints.weights import check_bounds
from ema_timm.errors import UserError, sentence
from ema_timm.fields import CONSTRUCTOR_ERRORS
from ema_timm.integrations.yolo.rows import rows_of

MODEL = "model.yaml"
DESCRIPTION = "detector.json"

DECODERS = ("YOLO", "RTDETR")
LONGEST_TEXT = 2**20
"""Bytes of the YAML or the description; those of the largest detectors have about ten thousand."""
DEEPEST = 20
"""Levels of the YAML; a row's arguments are the fourth."""
MOST_REPEATS = 100
"""Repeats of a row's layer; YOLO's deepest has 12."""

REMEDY = "Write the folder again, or copy it again from its source"
_ACTIVATION = re.compile(r"(torch\.)?nn\.[A-Za-z0-9]+\([0-9A-Za-z_=., -]*\)")
# What the builder raises for rows that are not a network.
_BUILDER = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip


def read_description(folder: Path) -> dict:
    """Read detector.json: ``task``, ``decoder``, ``names``, ``imgsz``, ``license`` and others.

    Raises:
        UserError: If it is missing, damaged or describes something else.
    """
    file = folder / DESCRIPTION
    try:
        described = json.loads(_text(file))
        names, sizes = described["names"], described["imgsz"]
        whole = described["decoder"] in DECODERS
        whole = whole and all(isinstance(described[key], str) for key in ("task", "license"))
        sizes = sizes if isinstance(sizes, list) else [sizes]
        whole = whole and all(isinstance(size, int) and size > 0 for size in sizes)
        whole = whole and all(int(n) >= 0 and isinstance(name, str) for n, name in names.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is missing or damaged. {REMEDY}.") from error
    if not whole:
        raise UserError(f"{file} does not describe a detector. {REMEDY}.")
    return described


def read_model_yaml(folder: Path) -> dict:
    """Read model.yaml, which must make ultralytics build layers and do nothing else.

    Raises:
        UserError: If it is missing or damaged, or could do something else.
    """
    file = folder / MODEL
    try:
        text = _text(file)
        config = yaml.safe_load(text) if _is_plain(text) else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError, *CONSTRUCTOR_ERRORS) as error:
        raise UserError(f"{file} is missing or damaged. {REMEDY}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} does not describe a detector. {REMEDY}.")
    require_layers(config)
    return config


def _is_plain(text: str) -> bool:
    """Whether a YAML takes time and memory in proportion to its length.

    Nested aliases can expand a few lines to billions of nodes, and PyYAML takes minutes for deeply
    nested text.
    """
    depth = 0
    for event in yaml.parse(text):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
            return False
    return True


def _text(file: Path) -> str:
    if file.stat().st_size > LONGEST_TEXT:
        raise ValueError(f"more than {LONGEST_TEXT} bytes")
    return file.read_text("utf-8")


def require_layers(config: dict) -> None:
    """Check that a model YAML can make ultralytics call nothing but layers.

    Raises:
        UserError: For the first row whose module is not a layer or that repeats it too often, or
            for an activation that is more than a layer with plain arguments.
    """
    import ultralytics.nn.tasks as tasks

    activation = config.get("activation")
    if activation is not None and not _ACTIVATION.fullmatch(str(activation)):
        raise UserError(f"{MODEL}: activation must be like nn.SiLU(), got {activation!r}.")
    for number, row in enumerate(rows_of(config)):
        name = str(row[2])
        if not _is_layer(_found(name, tasks), tasks):
            raise UserError(
                f"{MODEL}: row {number} names {name!r}, which is not a layer of this ultralytics. "
                "Install the version that detector.json names, and trust no other YAML."
            )
        if not isinstance(row[1], int) or not 1 <= row[1] <= MOST_REPEATS:
            raise UserError(
                f"{MODEL}: row {number} must repeat its layer 1 to {MOST_REPEATS} times, got "
                f"{str(row[1])[:40]}. {REMEDY}."
            )


def _found(name: str, tasks: ModuleType):
    """The object that ultralytics would find for a row's name."""
    if name.startswith("nn."):
        return getattr(nn, name[3:], None)
    if name.startswith("torchvision.ops."):
        import torchvision

        return getattr(torchvision.ops, name[16:], None)
    return vars(tasks).get(name)


def _is_layer(found, tasks: ModuleType) -> bool:
    """Whether it is a layer. The networks of that module would read and run another YAML."""
    layer = isinstance(found, type) and issubclass(found, nn.Module)
    return layer and found.__module__ != tasks.__name__


def check_tensors(config: dict, file: Path) -> None:
    """Check that the weights are those of the network, before either takes memory.

    Args:
        config: The result of `read_model_yaml`.
        file: The weights.

    Raises:
        UserError: If the file is damaged or declares too much, has other tensors, or the rows are
            not a network.
    """
    import ultralytics.nn.tasks as tasks

    if not file.is_file():
        raise UserError(f"{file} is missing. {REMEDY}.")
    check_bounds(file)
    try:
        with safe_open(file, "pt") as weights:
            given = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is missing or damaged. {REMEDY}.") from error
    try:
        with torch.device("meta"):
            scaled = {**copy.deepcopy(config), "scale": next(iter(config.get("scales") or ()), "")}
            channels = config.get("channels", config.get("ch", 3))
            built, _ = tasks.parse_model(scaled, channels, verbose=False)
    except _BUILDER as error:
        raise UserError(
            f"{MODEL} does not build with this ultralytics: {sentence(error)} "
            f"{REMEDY}, or install the version that {DESCRIPTION} names."
        ) from error
    own = {f"model.{name}": tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if wrong:
        raise UserError(
            f"{file} is not of the network that {MODEL} describes: {len(wrong)} tensors differ, "
            f"first {wrong[0]}. Put the files of one detector together."
        )


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read weights that passed `check_tensors`.

    Raises:
        UserError: If there are values that are not finite.
    """
    weights = load_file(file)
    bad = [n for n, t in weights.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        raise UserError(f"{file}: {bad[0]} holds NaN or infinite values. {REMEDY}.")
    return weights
