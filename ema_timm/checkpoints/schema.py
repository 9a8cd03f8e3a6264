"""The types of the fields of config.json and results.json, and of the arguments of timm's train.py.

`ema_timm.fields.check_fields` takes them. Fields that are not listed may be anything.
"""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""timm's names of Pillow's filters."""

CONFIG_FIELDS = {
    "architecture": str,
    "num_classes?": int,
    "pretrained_cfg?": {"architecture?": str, "license?": str},
    "model_args?": dict,
    "label_names?": [str],
    "label_descriptions?": {"*": str},
}
"""config.json, in today's format of timm and in older ones."""

TRAIN_FIELDS = {
    "model?": str,
    "model_kwargs?": dict,
    "gp?": str,
    "class_map?": str,
    "data_dir?": str,
    "input_size?": [int],
    "img_size?": int,
    "mean?": [float],
    "std?": [float],
    "crop_pct?": float,
    "crop_mode?": str,
    "interpolation?": str,
}
"""Arguments of timm's train script, in a checkpoint or in the args.yaml beside it."""

_VERSIONS = {"*": str}
_IMAGES = {"images": int, "fingerprint": str}

CARD_FIELDS = {
    **{f"{name}?": str for name in ("license", "license_name", "license_link")},
    **{f"{name}?": str for name in ("base_model", "repo_id")},
    "datasets?": [str],
}
"""Types of the fields of ``card``, as `check_fields` takes them."""

RESULTS_FIELDS = {
    "architecture": str,
    "weights_sha256": str,
    "parameters": int,
    "classes": [str],
    "input": {"input_size": [int], "interpolation": str, "crop_pct": float, "crop_mode": str},
    "metrics?": {
        "top1": float,
        "top5?": float,
        "balanced_accuracy?": float,
        "loss": float,
        "correct": int,
        "images": int,
    },
    "macs?": {"total": int, "ema": int, "ema_definition": int, "convention?": str},
    "evaluation?": {
        "data": {"name": str, "split?": str, **_IMAGES},
        "per_class": {"*": {"images": int, "correct": int}},
        "dtype": str,
        "amp_dtype?": str,
        "device": str,
        "versions": _VERSIONS,
    },
    "plots?": [str],
    "base?": {"model": str, "weights?": str, "hub_repository?": str, "license?": str},
    "best_epoch?": int,
    "epoch?": int,
    "history?": [dict],
    "arguments?": {"data_dir?": str, "average_weights?": float},
    "data?": {
        split: {f"{key}?": kind for key, kind in _IMAGES.items()} for split in ("train?", "val?")
    },
    "device?": str,
    "versions?": _VERSIONS,
    "extended_after?": [int],
    "stopped_early?": {"epoch": int, "patience": int},
    "trained_with?": str,
    "checkpoint?": {"file?": str, "averaged?": bool},
    "card?": CARD_FIELDS,
}
"""results.json; `ema_timm.checkpoints.results` says what its fields mean."""
