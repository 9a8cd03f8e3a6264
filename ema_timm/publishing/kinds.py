"""The kinds of folder that are published: a timm network, and an ultralytics detector."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ema_timm.checkpoints.cards.file import WrittenCard, write_card
from ema_timm.checkpoints.check import CheckedFolder, check_publishable
from ema_timm.checkpoints.network import load_network
from ema_timm.errors import UserError, sentence
from ema_timm.integrations.yolo.card import write_detector_card
from ema_timm.integrations.yolo.check import check_detector, fixed_outputs, is_detector
from ema_timm.publishing.reload import Outputs, fixed_logits, reload_elsewhere

Reload = Callable[[str, dict[str, str]], Outputs]

_DETECTOR = """
import json, sys
from ema_timm.publishing.kinds import detector_outputs
print(json.dumps(detector_outputs(sys.argv[1])))
"""


@dataclass(frozen=True)
class FolderKind:
    """The differences between the kinds.

    Attributes:
        check: Checks a folder and lists its files that are published.
        write_card: Writes its card: folder, fields of the card, whether to replace an edited one.
        outputs: Outputs of the model in a checked folder for a fixed input.
        reload: The same outputs of the model of a name, in a new process.
        local: A folder's name for ``reload``.
        remote: A commit's name for ``reload``; its files are in the client's cache.
        load_line: The line of Python that loads a commit.
        title: The commit's title, from results.json.
        on_pickles: Why a pickle in the repository is a risk.
    """

    check: Callable[[str | Path], CheckedFolder]
    write_card: Callable[[str | Path, dict[str, Any] | None, bool], WrittenCard]
    outputs: Callable[[CheckedFolder], Outputs]
    reload: Reload
    local: str
    remote: str
    load_line: str
    title: Callable[[dict[str, Any]], str]
    on_pickles: str


def kind_of(folder: str | Path) -> FolderKind:
    """The kind of a folder, by its files.

    Raises:
        UserError: If it is a checkpoint of a detector.
    """
    path = Path(folder)
    if path.suffix == ".pt" and not path.is_dir():
        raise UserError(
            f"{path} is a pickle, which can run any code when it is loaded, and is not published. "
            f"Write the detector as a folder: ema-timm yolo {path} --folder DIR"
        )
    return DETECTOR if is_detector(path) else NETWORK


def _network_outputs(folder: CheckedFolder) -> Outputs:
    try:
        return fixed_logits(load_network(folder.path, folder.config))
    except RuntimeError as error:
        raise UserError(
            f"{folder.path}: the network does not take images of the input_size in config.json: "
            f"{sentence(error)} Correct pretrained_cfg, or model_args."
        ) from error


def _network_title(results: dict[str, Any]) -> str:
    metrics = results.get("metrics")
    measured = f": top-1 {metrics['top1']:.2f}% of {metrics['images']} images" if metrics else ""
    return f"Publish {results['architecture']}{measured}"


def detector_outputs(name: str) -> Outputs:
    """`fixed_outputs` of ``yolo-dir:FOLDER`` or ``yolo-hub:USER/NAME@COMMIT``."""
    scheme, _, where = name.partition(":")
    repo, _, commit = where.partition("@") if scheme == "yolo-hub" else (where, "", "")
    return fixed_outputs(repo, commit or None)


def _detector_title(results: dict[str, Any]) -> str:
    metrics = results.get("metrics") or {}
    main = next((name for name in ("mAP50-95(B)", "accuracy_top1") if name in metrics), None)
    measured = f": {main} {metrics[main]:.4f} of {metrics['images']} images" if main else ""
    return f"Publish {results['architecture']}{measured}"


NETWORK = FolderKind(
    check=check_publishable,
    write_card=write_card,
    outputs=_network_outputs,
    reload=reload_elsewhere,
    local="local-dir:{path}",
    remote="hf-hub:{repo}@{commit}",
    load_line='timm.create_model("hf-hub:{repo}@{commit}", pretrained=True)',
    title=_network_title,
    on_pickles="timm reads a pickle if it cannot get model.safetensors",
)

DETECTOR = FolderKind(
    check=check_detector,
    write_card=write_detector_card,
    outputs=lambda folder: fixed_outputs(folder.path),
    reload=functools.partial(reload_elsewhere, code=_DETECTOR),
    local="yolo-dir:{path}",
    remote="yolo-hub:{repo}@{commit}",
    load_line='ema_timm.integrations.yolo.load("{repo}", revision="{commit}")',
    title=_detector_title,
    on_pickles="A pickle can run any code when it is loaded",
)
