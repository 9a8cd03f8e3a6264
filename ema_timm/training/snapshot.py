"""What of a run is saved to continue from, and how it is taken up again."""

import dataclasses

from ema_timm.training.epoch import Position
from ema_timm.training.history import History
from ema_timm.training.parts import Parts
from ema_timm.training.settings import FinetuneConfig


def snapshot(
    config: FinetuneConfig, identity: dict, parts: Parts, position: Position, history: History
) -> dict:
    """All that the rest of a run depends on.

    Returns:
        Tensors, numbers, strings and containers of them. Keys: ``identity`` and ``config`` of the
        run, ``base`` of its network, those of `TrainStep.state_dict`, the fields of `Position`,
        ``history``, ``best`` and ``extended``. The tensors are those of the network, not copies.
    """
    return {
        "identity": identity,
        "config": dataclasses.asdict(config),
        "base": parts.network.base,
        **parts.train_step.state_dict(),
        **vars(position),
        "history": history.entries,
        "best": history.best,
        "extended": history.extended,
    }


def restore(state: dict, parts: Parts, weights_alone: bool = False) -> Position:
    """Bring freshly assembled parts to where `snapshot` was taken.

    Args:
        state: The snapshot.
        parts: What it is brought into.
        weights_alone: Leave optimiser and schedule as they are when a run starts.

    Raises:
        UserError: If it is of another network.
    """
    parts.train_step.load_state_dict(state, weights_alone)
    return Position(**{field.name: state[field.name] for field in dataclasses.fields(Position)})
