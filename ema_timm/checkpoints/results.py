"""results.json: what was measured, of which weights, how. Read here; written by what measures.

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
- ``extended_after``: numbers of epochs after which a finished run was extended: there a new run
  began, from the last weights, with a schedule of its own.
- ``trained_with``: the script, where it is not `ema_timm.training.finetune`; ``epoch`` of its
  checkpoint.
- ``checkpoint``: ``file`` that the folder was written from, and whether its ``averaged`` weights.

Told, not measured (options of ``ema-timm card``):

- ``card``: ``license``, ``license_name``, ``license_link``, ``datasets`` (ids on the Hub),
  ``base_model``, ``repo_id``.
"""

import json
from pathlib import Path

from ema_timm.errors import UserError

FORMAT = 1
PREPROCESSING = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")

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


def read_json(file: Path, remedy: str) -> dict:
    """Read a JSON object.

    Raises:
        UserError: With ``remedy``, if there is none.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing. {remedy}") from error
    except (ValueError, OSError) as error:  # ValueError: not JSON, or not UTF-8
        raise UserError(f"{file} cannot be read: {error}. {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a JSON object, got {type(content).__name__}. {remedy}")
    return content
