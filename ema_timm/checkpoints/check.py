"""A checkpoint folder, read and checked before anyone is given it.

Everything that publishes or measures goes through here, so that a folder that loads here loads
elsewhere: the weights are whole, finite and those of the network that config.json names, and
results.json and README.md speak of these weights.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ema_timm.checkpoints.card import card_text, is_generated
from ema_timm.checkpoints.config import STUB, completed, needs_auto_map, stub_text
from ema_timm.checkpoints.results import read_json, read_results
from ema_timm.errors import UserError, first_line, some
from ema_timm.files import sha256

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"
RESULTS = "results.json"

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PICTURE = re.compile(r"!\[[^\]]*\]\(([^):]+)\)")  # no scheme: a file beside the card


@dataclass(frozen=True)
class CheckpointFolder:
    """A folder that passed every check.

    Attributes:
        path: The folder.
        config: Content of config.json.
        results: Content of results.json.
        card: Text of README.md.
        weights_sha256: Hex sha256 of model.safetensors, computed from the file.
        files: What is published, by name in the folder: weights, config, card, results, the stub
            that ``auto_map`` names, pictures. Never a pickle, never ``training/``.
    """

    path: Path
    config: dict
    results: dict
    card: str
    weights_sha256: str
    files: tuple[str, ...]


def check_folder(path: str | Path) -> CheckpointFolder:
    """Read a folder that is to be published.

    Raises:
        UserError: With what failed and the remedy, for the first thing that is missing, damaged,
            or belongs to something else.
    """
    path = Path(path)
    config = check_network(path)
    results = read_results(path / RESULTS)
    digest = sha256(path / WEIGHTS)
    check_belongs(path, config, results, digest)
    _check_auto_map(path, config)
    card = _check_card(path, results)
    return CheckpointFolder(path, config, results, card, digest, _published(path, config))


def check_network(path: str | Path) -> dict:
    """Read config.json and check model.safetensors against the network that it names.

    Returns:
        The content of config.json.

    Raises:
        UserError: If either is missing or damaged, or they belong to different networks.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"there is no folder {path}. Give the folder that holds {WEIGHTS}.")
    config = read_config(path)
    _check_weights(path / WEIGHTS, _expected(path, config))
    return config


def read_config(path: Path) -> dict:
    """Read a folder's config.json in timm's Hub format."""
    file = path / CONFIG
    remedy = "Write the folder anew with ema-timm evaluate CHECKPOINT --output FOLDER."
    config = read_json(file, remedy)
    for key, kind in (("architecture", str), ("num_classes", int), ("pretrained_cfg", dict)):
        if not isinstance(config.get(key), kind):
            raise UserError(
                f"{file} must hold {key!r} ({kind.__name__}), got {config.get(key)!r}. {remedy}"
            )
    names = config.get("label_names")
    if names is not None and len(names) != config["num_classes"]:
        raise UserError(
            f"{file} has {len(names)} label_names for num_classes {config['num_classes']}. {remedy}"
        )
    return config


def build_network(path: Path, config: dict) -> nn.Module:
    """The network that a folder's config.json names, without its weights.

    Raises:
        UserError: If timm does not know it or its arguments.
    """
    try:
        return timm.create_model(f"local-dir:{path}", pretrained=False)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path / CONFIG}: timm {timm.__version__} cannot build {config['architecture']}: "
            f"{first_line(error)} Correct the name and model_args, or install what registers it."
        ) from error


def _expected(path: Path, config: dict) -> dict[str, torch.Tensor]:
    """Names, shapes and types of the weights that the network takes; no memory is used."""
    with torch.device("meta"):
        return build_network(path, config).state_dict()


def _check_weights(file: Path, expected: dict[str, torch.Tensor]) -> None:
    remedy = "Copy the file again from where it was whole, or write the folder anew."
    if not file.is_file():
        raise UserError(f"{file} is missing. Give a folder that ema-timm or timm wrote.")
    try:
        with safe_open(file, framework="pt") as weights:
            check_names(file, set(weights.keys()), expected)
            for name in weights.keys():
                check_tensor(file, name, weights.get_tensor(name), expected[name])
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged: {str(error).rstrip('.')}. {remedy}") from error


def check_names(file: Path, found: set[str], expected: dict[str, torch.Tensor]) -> None:
    """Refuse weights whose names are not those of the network."""
    missing, unknown = sorted(expected.keys() - found), sorted(found - expected.keys())
    if missing or unknown:
        said = [f"lacks {some(missing, 3)}"] if missing else []
        said += [f"has {some(unknown, 3)}"] if unknown else []
        raise UserError(
            f"{file} is not of the network that config.json names: it {' and '.join(said)}. "
            "Put the config.json and the weights of one checkpoint together."
        )


def check_tensor(file: Path, name: str, tensor: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuse a tensor of another shape or type than the network's, or that is not finite."""
    if tensor.shape != expected.shape:
        raise UserError(
            f"{file}: {name} is {tuple(tensor.shape)}, and the network of config.json takes "
            f"{tuple(expected.shape)}. Put the config.json and the weights of one checkpoint "
            "together."
        )
    floating = expected.is_floating_point()
    if tensor.dtype not in (_FLOATS if floating else (expected.dtype,)):
        raise UserError(
            f"{file}: {name} is {tensor.dtype}, and the network takes {expected.dtype}. The "
            "header lies or the file was converted wrongly; write the folder anew."
        )
    if floating and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise UserError(
            f"{file}: {name} holds {bad} NaN or infinite values. Train again with a smaller "
            "learning rate, or take an earlier checkpoint."
        )


def check_belongs(path: Path, config: dict, results: dict, digest: str) -> None:
    """Refuse a results.json that is not of the weights of ``digest``, or of another network."""
    measure = f"Measure these weights: ema-timm evaluate {path} --data-dir DIR"
    if results["weights_sha256"] != digest:
        raise UserError(
            f"{path / RESULTS} does not belong to {WEIGHTS}: it was measured on weights of sha256 "
            f"{results['weights_sha256'][:12]}…, and these are {digest[:12]}…. {measure}"
        )
    named = (results["architecture"], len(results["classes"]))
    if named != (config["architecture"], config["num_classes"]):
        raise UserError(
            f"{path / RESULTS} is of {named[0]} with {named[1]} classes, and config.json of "
            f"{config['architecture']} with {config['num_classes']}. {measure}"
        )


def _check_auto_map(path: Path, config: dict) -> None:
    if completed(config) != config:
        raise UserError(
            f"{path / CONFIG} is not complete: transformers refuses num_classes in model_args, and "
            f"needs auto_map for {config['architecture']}. ema-timm card {path} repairs it."
        )
    if not needs_auto_map(config["architecture"]):
        return
    stub = path / STUB
    if not stub.is_file() or stub.read_text("utf-8") != stub_text():
        raise UserError(
            f"{stub}, which auto_map names, is missing or altered. ema-timm card {path} repairs it."
        )


def _check_card(path: Path, results: dict) -> str:
    file = path / CARD
    write = f"Write it with: ema-timm card {path}"
    try:
        card = file.read_text("utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing. {write}") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}. {write} --force") from error
    if is_generated(card) and card != card_text(results):
        raise UserError(f"{file} is not of these results. {write}")
    for name in _PICTURE.findall(card):
        if not (path / name).is_file():
            raise UserError(f"{file} shows {name}, which is missing. {write}")
    return card


def _published(path: Path, config: dict) -> tuple[str, ...]:
    names = [WEIGHTS, CONFIG, CARD, RESULTS]
    if needs_auto_map(config["architecture"]):
        names.append(STUB)
    return (*names, *sorted(file.name for file in path.glob("*.png") if file.is_file()))
