"""``evaluate``: metrics of a checkpoint on images, written to results.json.

Every published number comes from here. A checkpoint file is first written as a folder in timm's Hub
format, and the folder is measured. Images go through timm's own loader as its validation script
sets it up, so that the metrics are the same.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from timm.data import create_loader
from torch import nn

from ema_timm.checkpoints.config import completed
from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.checkpoints.layout import RESULTS, WEIGHTS
from ema_timm.checkpoints.network import check_network, load_network
from ema_timm.checkpoints.preprocessing import preprocessing
from ema_timm.checkpoints.results import carried_over, describe, read_results
from ema_timm.data.check import check_readable
from ema_timm.data.image_folder import LabelledImages
from ema_timm.data.splits import open_measured
from ema_timm.environment import pick_device, versions
from ema_timm.files import sha256
from ema_timm.measure.metrics import Tally, tally
from ema_timm.measure.settings import EvaluateConfig
from ema_timm.measure.source import folder_to_measure, images_of, with_class_names
from ema_timm.options import check_ranges

try:
    from ema_timm.measure.confusion import save_confusion
except ImportError:  # matplotlib is an extra; the command says so
    save_confusion = None

CONFUSION = "confusion.png"
MOST_CLASSES = 1000
"""Most classes for which a confusion matrix is drawn."""


def evaluate(config: EvaluateConfig, progress: bool = True) -> dict[str, Any]:
    """Measure a checkpoint and write results.json and a confusion matrix into its folder.

    Other entries of results.json, such as those of the training, are kept.

    Args:
        config: The checkpoint, the images and how to run.
        progress: Show bars (on a terminal) and notes on stderr.

    Returns:
        The content of results.json.

    Raises:
        UserError: For bad input.
    """
    check_ranges(config)
    path, found = folder_to_measure(config)
    saved = with_class_names(check_network(path, relabel=bool(config.labels)), path, config)
    names = saved["label_names"]
    indices = {name: index for index, name in enumerate(names)}
    dataset = open_measured(*images_of(config), indices)
    network = load_network(path, saved)
    data = preprocessing(network, saved.get("model_args", {}), {}, use_test_size=True)
    dataset.read_channels(data["input_size"][0])
    notes = [*found, *dataset.notes, *check_readable(dataset, progress)]
    if progress:
        print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)
    folder = CheckpointWriter(path)
    folder.make()  # an error here comes before the measurement
    device = torch.device(pick_device(config.device))
    counts = _count(network, dataset, data, config, device, progress)
    digest = sha256(path / WEIGHTS)
    results = _carried(path, digest, progress) | describe(network, digest, names, data)
    results["metrics"] = counts.metrics(device)._asdict()
    results["evaluation"] = {
        "per_class": _per_class(counts, names),
        **_conditions(config, dataset, network, device),
    }
    results["plots"] = _draw(folder, counts, results, progress)
    folder.save_config(completed(saved))
    folder.write_json(RESULTS, results)
    return results


def _count(
    network: nn.Module,
    dataset: LabelledImages,
    data: dict,
    config: EvaluateConfig,
    device: torch.device,
    progress: bool,
) -> Tally:
    """Run the network over the images, loaded as timm's validation script loads them."""
    loader = create_loader(
        dataset,
        batch_size=config.batch_size,
        use_prefetcher=True,
        num_workers=config.workers,
        persistent_workers=False,
        pin_memory=False,
        device=device,
        **data,
    )
    amp_dtype = getattr(torch, config.amp_dtype) if config.amp_dtype else None
    return tally(network.to(device), loader, device, amp_dtype=amp_dtype, progress=progress)


def _carried(path: Path, digest: str, progress: bool) -> dict:
    """The content of results.json; if it is of other weights, only the card's fields."""
    if not (path / RESULTS).is_file():
        return {}
    old = read_results(path / RESULTS)
    results = carried_over(old, digest)
    if results is old:
        return old
    kept = path / "results.previous.json"
    # A copy: results.json must stay until this call has written the new one.
    CheckpointWriter(path).write(
        kept.name, lambda file: file.write_bytes((path / RESULTS).read_bytes())
    )
    if progress:
        print(f"{RESULTS} was of other weights, and is now {kept}", file=sys.stderr)
    return results


def _per_class(counts: Tally, names: list[str]) -> dict:
    """Images of each class, and how many of them were predicted correctly."""
    images, correct = (each.tolist() for each in counts.per_class())
    return {
        name: {"images": total, "correct": right}
        for name, total, right in zip(names, images, correct, strict=True)
    }


def _conditions(
    config: EvaluateConfig, dataset: LabelledImages, network: nn.Module, device: torch.device
) -> dict:
    """Settings and versions, without local paths, so that others can repeat the measurement."""
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


def _draw(folder: CheckpointWriter, counts: Tally, results: dict, progress: bool) -> list[str]:
    """Draw the confusion matrix if that is possible; returns the names of all figures."""
    names = results["classes"]
    others = [name for name in results.get("plots", ()) if name != CONFUSION]
    missing = ""
    if len(names) > MOST_CLASSES:
        missing = f"{len(names)} classes are more than a figure shows"
    elif save_confusion is None:
        missing = "matplotlib is missing (pip install 'ema-timm[train]')"
    if missing:
        (folder.path / CONFUSION).unlink(missing_ok=True)  # it is of an earlier measurement
        if progress:
            print(f"no {CONFUSION}: {missing}", file=sys.stderr)
        return others
    confusion = counts.confusion()
    folder.write(CONFUSION, lambda file: save_confusion(confusion, names, file))
    return sorted({*others, CONFUSION})
