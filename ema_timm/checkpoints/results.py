"""results.json: what was measured, of which weights, how. Filled by whoever measures or trains.

One JSON object. Times in s, accuracies in %, sizes in pixels. A key whose fact is unknown is left
out or null; unknown keys are kept by everything that rewrites the file.

Always there (`FORMAT` 1):

- ``format``: 1.
- ``architecture``: timm's name of the network, as in config.json.
- ``task``: "image-classification".
- ``weights_sha256``: hex sha256 of model.safetensors; the results are those of these weights.
- ``parameters``: number of parameters.
- ``classes``: class names in the order of the outputs.
- ``input``: ``input_size`` [C, H, W], ``interpolation``, ``mean``, ``std``, ``crop_pct``,
  ``crop_mode`` of the measurement.

Measured, where it was:

- ``metrics``: ``top1``, ``top5`` (null below six classes), ``loss`` (mean cross-entropy),
  ``correct``, ``images``.
- ``macs``: multiply-accumulates of one image of ``input_size``, as
  `ema_timm.backbones.complexity` counts them: ``total``, ``ema`` (the EMA layers' part, in the
  closed form that runs), ``ema_definition`` (what that part is by the paper's definition),
  ``convention``.
- ``evaluation``: how `ema_timm.measure.evaluate` measured ``metrics``: ``data`` (``name``,
  ``split``, ``images``, ``fingerprint``), ``per_class`` (class name to ``images`` and
  ``correct``), ``dtype``, ``amp_dtype``, ``device``, ``batch_size``, ``versions``.
- ``plots``: names of the pictures in the folder.

Of a training, where one is known (`ema_timm.training.finetune` writes all of them):

- ``base``: ``model``, ``weights``, ``hub_repository``, ``license`` of the start.
- ``best_epoch``, ``history`` (an object an epoch), ``arguments`` (every setting), ``data``
  (``train`` and ``val``, each ``images`` and ``fingerprint``), ``device``, ``processes``,
  ``versions``.
- ``trained_with``: the script, where it is not `ema_timm.training.finetune`; ``epoch`` of its
  checkpoint.
- ``checkpoint``: ``file`` that the folder was written from, and whether its ``averaged`` weights.

Told, not measured (options of ``ema-timm card``):

- ``card``: ``license``, ``license_name``, ``license_link``, ``datasets`` (ids on the Hub),
  ``base_model``, ``repo_id``.
"""

from pathlib import Path

from torch import nn

from ema_timm.backbones.complexity import count_macs, count_parameters
from ema_timm.checkpoints.layout import RESULTS, WEIGHTS, read_json
from ema_timm.checkpoints.preprocessing import PREPROCESSING
from ema_timm.errors import UserError
from ema_timm.files import sha256

FORMAT = 1

_REQUIRED = {
    "architecture": str,
    "weights_sha256": str,
    "parameters": int,
    "classes": list,
    "input": dict,
}


def read_results(file: Path) -> dict:
    """Read and check a results.json.

    Raises:
        UserError: If it is missing, damaged, of a newer format, or lacks what is always there.
    """
    results = read_json(file, "Measure the weights with: ema-timm evaluate FOLDER --data-dir DIR")
    form = results.get("format", FORMAT)
    if form != FORMAT:
        raise UserError(
            f"{file} is of format {form!r}, and this ema-timm reads format {FORMAT}. Update it: "
            "pip install -U ema-timm"
        )
    for key, kind in _REQUIRED.items():
        if not isinstance(results.get(key), kind):
            raise UserError(
                f"{file} must hold {key!r} ({kind.__name__}), got {results.get(key)!r}. Measure "
                f"the weights again: ema-timm evaluate {file.parent} --data-dir DIR"
            )
    return results


def read_own_results(path: Path, config: dict) -> dict:
    """Read a folder's results.json, which must be of the weights and the network beside it.

    Args:
        path: The folder.
        config: Content of its config.json.

    Raises:
        UserError: If it is of others, or `read_results` refuses it.
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
            f"{path / RESULTS} is of {named[0]} with {named[1]} classes, and config.json of "
            f"{config['architecture']} with {config['num_classes']}. {measure}"
        )
    return results


def public_name(model: str) -> str:
    """A timm name for results that are published: of a local folder its name, not its place."""
    source, _, folder = model.partition(":")
    return f"local-dir:{Path(folder).name}" if source == "local-dir" else model


def describe(network: nn.Module, digest: str, classes: list[str], data_config: dict) -> dict:
    """What results.json says of a network before anything is measured.

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
