"""A checkpoint and images -> results.json: the only source of published numbers.

A checkpoint file is first written as a folder in timm's Hub format, and the folder is measured:
what is published is what was measured. Images go through timm's own loader as its validation
script sets it up, so that the accuracies agree to the last image.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.data import create_loader
from torch import nn

from ema_timm.checkpoints.check import RESULTS, WEIGHTS, build_network, check_network
from ema_timm.checkpoints.config import completed
from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.checkpoints.labels import Labels, check_count, read_labels
from ema_timm.checkpoints.preprocessing import preprocessing
from ema_timm.checkpoints.read import read_checkpoint
from ema_timm.checkpoints.results import read_results
from ema_timm.checkpoints.write import build_for, describe, write_folder
from ema_timm.errors import UserError
from ema_timm.files import sha256
from ema_timm.measure.check import check_readable
from ema_timm.measure.device import pick_device
from ema_timm.measure.metrics import Tally, tally
from ema_timm.measure.select import Dataset, class_names, open_measured
from ema_timm.measure.settings import EvaluateConfig
from ema_timm.measure.versions import versions

try:
    from ema_timm.measure.confusion import save_confusion
except ImportError:  # matplotlib is an extra; the command says so
    save_confusion = None

CONFUSION = "confusion.png"
MOST_CLASSES = 1000
"""Up to so many classes a confusion matrix is drawn."""


def evaluate(config: EvaluateConfig, progress: bool = True) -> dict:
    """Measure a checkpoint and write results.json and a confusion matrix into its folder.

    What results.json said of the training is kept.

    Args:
        config: The checkpoint, the images and how to run.
        progress: Show bars (on a terminal) and notes on stderr.

    Returns:
        The content of results.json.

    Raises:
        UserError: For bad input.
    """
    source = Path(config.source)
    if not source.exists():
        raise UserError(f"there is no checkpoint {source}. Give a checkpoint folder or file.")
    if source.is_dir():
        _check_folder_options(config)
        return _measure_folder(source, config, progress)
    if not config.output:
        raise UserError(
            f"{source} is a file: --output FOLDER says where to write its checkpoint folder."
        )
    return _measure_folder(_write_folder(source, config), config, progress)


def _check_folder_options(config: EvaluateConfig) -> None:
    given = [name for name in EvaluateConfig.OF_A_FILE if getattr(config, name)]
    if given:
        option = "--" + given[0].replace("_", "-")
        raise UserError(
            f"{option} is for checkpoint files: {config.source} is a folder, and its config.json "
            f"decides. Leave {option} out."
        )


def _write_folder(source: Path, config: EvaluateConfig) -> Path:
    """The checkpoint folder of a checkpoint file."""
    checkpoint = read_checkpoint(source, config.use_averaged)
    network, model_args = build_for(checkpoint, config.model, config.model_kwargs)
    if checkpoint.arguments.get("class_map") and not config.labels:
        raise UserError(
            f"{source} was trained with --class-map {checkpoint.arguments['class_map']}, which "
            "orders the classes. Give their names in that order with --labels FILE."
        )
    labels = _labels(config)
    check_count(labels, network.num_classes, config.labels or config.data_dir)
    told = {key: getattr(config, key) for key in ("img_size", "crop_pct", "interpolation")}
    told = {**checkpoint.arguments, **{key: value for key, value in told.items() if value}}
    data = preprocessing(network, model_args, told, use_test_size=True)
    return write_folder(checkpoint, network, model_args, config.output, labels, data)


def _labels(config: EvaluateConfig) -> Labels:
    """Class names of a checkpoint file, which has none: as told, else the class folders."""
    if config.labels:
        return read_labels(config.labels)
    return Labels(class_names(*_images(config)))


def _images(config: EvaluateConfig) -> tuple[str, str, str, str]:
    """What names the images."""
    if not config.data_dir:
        raise UserError("evaluate needs --data-dir; see ema-timm evaluate --help.")
    return config.data_dir, config.split, config.val_split, config.dataset


def _measure_folder(path: Path, config: EvaluateConfig, progress: bool) -> dict:
    hub = check_network(path)
    names = _class_names(path, hub, config)
    indices = {name: index for index, name in enumerate(names)}
    dataset = open_measured(*_images(config), indices)
    network = build_network(path, hub)
    network.load_state_dict(load_file(path / WEIGHTS))
    data = preprocessing(network, hub.get("model_args", {}), {}, use_test_size=True)
    dataset.read_channels(data["input_size"][0])
    notes = dataset.notes + check_readable(dataset, progress)
    if progress:
        print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)
    CheckpointWriter(path).make()  # said before the measurement, not after it
    device = torch.device(pick_device(config.device))
    counts = tally(
        network.to(device),
        _loader(dataset, data, config, device),
        device,
        amp_dtype=getattr(torch, config.amp_dtype) if config.amp_dtype else None,
        progress=progress,
    )
    digest = sha256(path / WEIGHTS)
    results = _carried(path, digest, progress) | describe(network, digest, names, data)
    results |= _measured(counts, names, device)
    results["evaluation"] |= _conditions(config, dataset, network, device)
    _write(path, hub, results, counts, progress)
    return results


def _class_names(path: Path, hub: dict, config: EvaluateConfig) -> list[str]:
    if hub.get("label_names"):
        if config.labels and read_labels(config.labels).names != hub["label_names"]:
            raise UserError(
                f"--labels {config.labels} differs from the label_names in {path}/config.json. "
                "Leave it out."
            )
        return hub["label_names"]
    labels = _labels(config)
    check_count(labels, hub["num_classes"], config.labels or config.data_dir)
    hub["label_names"] = labels.names
    if labels.descriptions:
        hub["label_descriptions"] = labels.descriptions
    return labels.names


def _loader(dataset: Dataset, data: dict, config: EvaluateConfig, device: torch.device):
    """The loader as timm's validation script sets it up."""
    return create_loader(
        dataset,
        batch_size=config.batch_size,
        use_prefetcher=True,
        num_workers=config.workers,
        persistent_workers=False,
        pin_memory=False,
        device=device,
        **data,
    )


def _carried(path: Path, digest: str, progress: bool) -> dict:
    """What results.json says already; of other weights, what was told for the card alone."""
    if not (path / RESULTS).is_file():
        return {}
    old = read_results(path / RESULTS)
    if old["weights_sha256"] == digest:
        return old
    kept = path / "results.previous.json"
    (path / RESULTS).replace(kept)
    if progress:
        print(f"{RESULTS} was of other weights, and is now {kept}", file=sys.stderr)
    return {"card": old["card"]} if "card" in old else {}


def _measured(counts: Tally, names: list[str], device: torch.device) -> dict:
    images, correct = (each.tolist() for each in counts.per_class(len(names)))
    per_class = {
        name: {"images": total, "correct": right}
        for name, total, right in zip(names, images, correct, strict=True)
    }
    return {
        "metrics": counts.metrics(device)._asdict(),
        "evaluation": {"per_class": per_class},
    }


def _conditions(
    config: EvaluateConfig, dataset: Dataset, network: nn.Module, device: torch.device
) -> dict:
    """How the measurement was made, for others to repeat it; no path of this machine."""
    return {
        "data": {
            "name": dataset.name,
            "split": dataset.split,
            "images": len(dataset),
            "fingerprint": dataset.fingerprint(),
        },
        "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
        "amp_dtype": config.amp_dtype or None,
        "device": device.type,
        "batch_size": config.batch_size,
        "versions": versions(),
    }


def _write(path: Path, hub: dict, results: dict, counts: Tally, progress: bool) -> None:
    folder = CheckpointWriter(path)
    names = results["classes"]
    missing = "matplotlib is missing (pip install 'ema-timm[train]')"
    if len(names) > MOST_CLASSES:
        missing = f"{len(names)} classes are more than a picture shows"
    if save_confusion is None or len(names) > MOST_CLASSES:
        (path / CONFUSION).unlink(missing_ok=True)  # it would be of an earlier measurement
        results["plots"] = [name for name in results.get("plots", ()) if name != CONFUSION]
        if progress:
            print(f"no {CONFUSION}: {missing}", file=sys.stderr)
    else:
        confusion = counts.confusion(len(names))
        folder.write(CONFUSION, lambda file: save_confusion(confusion, names, file))
        results["plots"] = sorted({*results.get("plots", ()), CONFUSION})
    folder.save_config(completed(hub))
    folder.write_json(RESULTS, results)
