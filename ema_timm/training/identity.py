"""What makes a run this run, and no other: all that its outcome depends on."""

import dataclasses

import torch

from ema_timm.errors import UserError
from ema_timm.training.history import History
from ema_timm.training.settings import FinetuneConfig


def identify(
    config: FinetuneConfig, processes: int, data: dict, class_weights: list[float] | None = None
) -> dict:
    """The identity of a run.

    Args:
        config: Its settings.
        processes: How many it runs on.
        data: What identifies its images.
        class_weights: Weights of the classes in its loss.
    """
    arguments = dataclasses.asdict(config)
    return {
        "arguments": {k: v for k, v in arguments.items() if k not in FinetuneConfig.ANYTIME},
        "processes": processes,
        # How a sum is split among threads says how it is rounded.
        "threads": torch.get_num_threads(),
        "data": data,
        "class_weights": class_weights,
    }


def extends(state: dict, config: FinetuneConfig) -> bool:
    """Whether settings ask for more epochs of a run that is finished: a new run from its weights.

    Args:
        state: The run's state.
        config: The settings.
    """
    wanted, patience = state["config"]["epochs"], state["config"].get("patience", 0)
    history = History(state["history"], state["best"], state["extended"])
    finished = state["epoch"] == wanted or history.stalled(patience)
    return finished and config.epochs > wanted


def check_same_run(saved: dict, identity: dict, extended: bool = False) -> None:
    """Refuse to continue a run of identity ``saved`` as one of another outcome.

    Args:
        saved: The identity in the state.
        identity: What it is to be.
        extended: More epochs are asked for, as a new run.

    Raises:
        UserError: With the first difference.
    """
    if "threads" not in saved:
        raise UserError(
            "cannot resume: the run was started by an ema-timm that augmented images in another "
            "order. Train on from its weights with --model local-dir:FOLDER and another --output."
        )
    # A setting that is younger than the run was, in effect, what it is where nothing is said.
    before = {**dataclasses.asdict(FinetuneConfig()), **saved["arguments"]}
    for name, value in identity["arguments"].items():
        if before[name] != value and not (extended and name == "epochs"):
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"cannot resume: {option} is {value!r} and the run was started with "
                f"{before[name]!r}. Leave it out, or start anew with another --output."
            )
    if saved.get("class_weights") != identity["class_weights"]:
        raise UserError(
            "cannot resume: --class-weights holds other numbers than those the run was started "
            "with. Restore them, or start anew with another --output."
        )
    if saved["processes"] != identity["processes"]:
        raise UserError(
            f"cannot resume on {identity['processes']} process(es): the run was started on "
            f"{saved['processes']}."
        )
    if saved["data"] != identity["data"]:
        raise UserError(
            "cannot resume: the images in --data-dir are not those the run was started on. "
            "Restore them, or start anew with another --output."
        )
