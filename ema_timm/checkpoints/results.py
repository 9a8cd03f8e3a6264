"""results.json: the metrics of a checkpoint, and how it was trained and measured.

Training and ``evaluate`` write it. One JSON object; times in s, accuracies in %, sizes in pixels.
A key whose value is unknown is missing or null. Keys that this version does not know are kept.

Always there (`FORMAT` 1):

- ``format``: 1.
- ``architecture``: timm's name of the network, as in config.json.
- ``task``: "image-classification".
- ``weights_sha256``: hex sha256 of model.safetensors; the results are those of these weights.
- ``parameters``: number of parameters.
- ``classes``: class names in the order of the outputs.
- ``input``: ``input_size`` [C, H, W], ``interpolation``, ``mean``, ``std``, ``crop_pct``,
  ``crop_mode`` of the measurement.

If it was measured:

- ``metrics``: ``top1``, ``top5`` (null below six classes), ``balanced_accuracy`` (mean over the
  classes; since 0.3.0), ``loss`` (mean cross-entropy), ``correct``, ``images``.
- ``macs``: multiply-accumulates of one image of ``input_size``, as
  `ema_timm.backbones.complexity` counts them: ``total``, ``ema`` (the EMA layers' part, in the
  closed form that runs), ``ema_definition`` (what that part is by the paper's definition),
  ``convention``.
- ``evaluation``: how `ema_timm.measure.evaluation` measured ``metrics``: ``data`` (``name``,
  ``split``, ``images``, ``fingerprint``), ``per_class`` (class name to ``images`` and
  ``correct``), ``dtype``, ``amp_dtype``, ``device``, ``batch_size``, ``versions``.
- ``plots``: names of the figures in the folder.

Of a training, if one is known (`ema_timm.training.run` writes all of them):

- ``base``: ``model``, ``weights``, ``hub_repository``, ``license`` and, if they came from a file,
  ``sha256`` of the initial weights.
- ``best_epoch``, ``history`` (an object an epoch), ``arguments`` (every setting), ``data``
  (``train`` and ``val``, each ``images`` and ``fingerprint``), ``device``, ``processes``,
  ``versions``.
- in an object of ``history``: ``epoch``, ``train_loss``, ``seconds`` of its training,
  ``images_per_second`` trained on in that time by all processes, ``peak_memory_mib`` (the most
  that the process had held until then: allocated by PyTorch on a GPU, else resident), and the
  ``metrics`` of the validation images after it.
- ``extended_after``: numbers of epochs after which a finished run was extended: a new run
  started there from the last weights, with its own schedule.
- ``stopped_early``: if a run ended before its last epoch: the ``epoch``, and the ``patience``,
  the number of epochs without improvement after which it ended.
- ``class_weights``: weights of the classes in the loss, by name, if there were some.
- ``identical_images``: number of validation images that are training images too, if there are some.
- ``trained_with``: the script, if it is not `ema_timm.training.run`; ``epoch`` of its
  checkpoint.
- ``checkpoint``: ``file`` that the folder was written from, and whether its ``averaged`` weights.

Given as options of ``ema-timm card``:

- ``card``: ``license``, ``license_name``, ``license_link``, ``datasets`` (ids on the Hub),
  ``base_model``, ``repo_id``.
"""

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from torch import nn

from ema_timm.backbones.complexity import count_macs, count_parameters
from ema_timm.checkpoints.config import without_loading
from ema_timm.checkpoints.layout import RESULTS, WEIGHTS, read_json
from ema_timm.checkpoints.preprocessing import PREPROCESSING, check_preprocessing
from ema_timm.checkpoints.schema import RESULTS_FIELDS
from ema_timm.errors import UserError
from ema_timm.fields import check_fields
from ema_timm.files import sha256

FORMAT = 1

_PATHS = (
    "data",
    "data_dir",
    "output",
    "weights",
    "resume",
    "initial_checkpoint",
    "pretrained_path",
    "config",
    "class_weights",
)
_SYSTEMS = (PurePosixPath, PureWindowsPath)


def read_results(file: Path) -> dict:
    """Read and check a results.json.

    Raises:
        UserError: If it is missing, damaged or of a newer format, or lacks a required key.
    """
    measure = f"the weights with: ema-timm evaluate {file.parent} --data-dir DIR"
    if not file.exists():
        raise UserError(f"{file} is missing. Measure {measure}")
    again = f"Remove the file, then measure {measure}"
    results = read_json(file, again)
    check_format(results, file)
    check_fields(results, RESULTS_FIELDS, file, again)
    check_preprocessing(results["input"], str(file))
    return results


def check_format(results: dict, file: Path) -> None:
    """Raise UserError for a results.json of a newer format."""
    found = results.get("format", FORMAT)
    if found != FORMAT:
        raise UserError(
            f"{file} is of format {found!r}, and this ema-timm reads format {FORMAT}. Update it: "
            "pip install -U ema-timm"
        )


def carried_over(old: dict, digest: str) -> dict:
    """The entries of an old results.json that stay: all, or of other weights the card's fields."""
    if old.get("weights_sha256") == digest:
        return old
    return {"card": old["card"]} if isinstance(old.get("card"), dict) else {}


def read_own_results(path: Path, config: dict) -> dict:
    """Read a folder's results.json, which must be of the folder's weights and network.

    Args:
        path: The folder.
        config: Content of its config.json.

    Raises:
        UserError: If it is of others, or `read_results` raises one.
    """
    results, digest = read_results(path / RESULTS), sha256(path / WEIGHTS)
    measure = f"Measure these weights: ema-timm evaluate {path} --data-dir DIR"
    if results["weights_sha256"] != digest:
        raise UserError(
            f"{path / RESULTS} does not belong to {WEIGHTS}: it was measured on weights of sha256 "
            f"{results['weights_sha256'][:12]}…, and these are {digest[:12]}…. {measure}"
        )
    named = (results["architecture"], len(results["classes"]))
    if named != (config["architecture"], config["num_classes"]):
        raise UserError(
            f"{path / RESULTS} is of {named[0]} with {named[1]} classes, but config.json is of "
            f"{config['architecture']} with {config['num_classes']}. {measure}"
        )
    for index, (mine, its) in enumerate(zip(results["classes"], _labels(config), strict=False)):
        if mine != its:
            raise UserError(
                f"{path / RESULTS} names class {index} {mine!r}, but label_names in config.json "
                f"names it {its!r}. Correct label_names. If they are right: {measure}"
            )
    return results


def _labels(config: dict) -> list:
    return config.get("label_names") or []


def without_local_paths(results: dict) -> dict:
    """``results`` with names of files and folders instead of their paths.

    Args:
        results: Content of results.json; ``arguments`` holds a training's settings.
    """
    arguments = results.get("arguments")
    if not isinstance(arguments, dict):
        return results
    return {**results, "arguments": hide_local_paths(arguments)}


def hide_local_paths(arguments: dict) -> dict:
    """Settings of a training with names of files instead of paths, and without loading arguments.

    Args:
        arguments: As JSON; ``model_kwargs`` are the arguments of the network.
    """
    public = {name: _without_path(value) for name, value in arguments.items()}
    for key in _PATHS:
        if isinstance(public.get(key), str):
            public[key] = Path(public[key]).name
    if isinstance(public.get("model"), str):
        public["model"] = public_model_name(public["model"])
    if isinstance(arguments.get("model_kwargs"), dict):
        public["model_kwargs"] = _without_path(without_loading(arguments["model_kwargs"]))
    return public


def _without_path(value: Any) -> Any:
    """The name of an absolute path, also inside lists and objects; other values as they are."""
    if isinstance(value, str):
        absolute = value.startswith("~") or any(kind(value).is_absolute() for kind in _SYSTEMS)
        return PureWindowsPath(value).name if absolute else value
    if isinstance(value, dict):
        return {name: _without_path(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_path(each) for each in value]
    return value


def public_model_name(model: str) -> str:
    """A timm name without local paths: of a folder only its name."""
    source, _, folder = model.partition(":")
    return f"local-dir:{Path(folder).name}" if source == "local-dir" else model


def describe(network: nn.Module, digest: str, classes: list[str], data_config: dict) -> dict:
    """The content of results.json for a network that is not measured yet.

    Args:
        network: The network.
        digest: sha256 of its weights file.
        classes: Names of the classes, in order.
        data_config: Preprocessing of the evaluation, as timm resolves it.
    """
    return {
        "format": FORMAT,
        "architecture": network.pretrained_cfg["architecture"],
        "task": "image-classification",
        "weights_sha256": digest,
        "parameters": count_parameters(network),
        "macs": count_macs(network, tuple(data_config["input_size"])),
        "classes": classes,
        "input": {key: data_config[key] for key in PREPROCESSING},
    }
