"""What a run is made of, put together in the one order that its outcome depends on."""

import dataclasses
from dataclasses import dataclass

from torch.utils.data import DataLoader

from ema_timm.training.data import Images, train_loader, val_loader
from ema_timm.training.epoch import Position
from ema_timm.training.history import History
from ema_timm.training.network import Network, build_network
from ema_timm.training.processes import Process
from ema_timm.training.seeding import RepeatableImages, check_augmentation, seed_everything
from ema_timm.training.settings import FinetuneConfig
from ema_timm.training.step import TrainStep


@dataclass(frozen=True)
class Parts:
    """The parts of a run that do not change while it goes on, but for what they learn."""

    network: Network
    train_loader: DataLoader
    val_loader: DataLoader
    train_step: TrainStep


def assemble(
    config: FinetuneConfig,
    images: Images,
    process: Process,
    base: dict | None = None,
    first: int = 0,
    weights: list[float] | None = None,
) -> Parts:
    """Put a run together.

    Args:
        config: Its settings.
        images: Its images.
        process: This process.
        base: Where the first weights came from, of a run that continues.
        first: Epochs done before its schedule begins.
        weights: Weights of the classes in its loss.

    Raises:
        UserError: If timm cannot build what the settings say, or the images do not suit it.
        HubError: If the Hub does not give the weights, or gives them damaged.
    """
    check_augmentation(config)  # before weights are fetched
    seed_everything(config.seed, 0, 0)  # the same start on every process
    network = build_network(config, images.train.class_names, process.device, base)
    images.read_channels(network.preprocessing["input_size"][0])
    repeatable = RepeatableImages(images.train, config.seed)
    training = train_loader(config, repeatable, network.preprocessing, process)
    validation = val_loader(config, images.val, network.preprocessing, process)
    train_step = TrainStep(
        config, network.model, len(network.classes), len(training), process, first, weights
    )
    return Parts(network, training, validation, train_step)


# MERGED: What of a run is saved to continue from, and how it is taken up again.
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
