"""What an evaluation measures: the folder, the images and the class names of its settings."""

from pathlib import Path

from ema_timm.checkpoints.labels import Labels, check_count, read_labels, require_unique
from ema_timm.checkpoints.network import rebuild
from ema_timm.checkpoints.read import read_checkpoint
from ema_timm.checkpoints.write import write_folder
from ema_timm.data.splits import class_names
from ema_timm.errors import UserError
from ema_timm.measure.settings import EvaluateConfig


def folder_to_measure(config: EvaluateConfig) -> tuple[Path, tuple[str, ...]]:
    """The checkpoint folder. For a checkpoint file it is written first.

    Returns:
        The folder, and sentences on how the weights were found in the file.

    Raises:
        UserError: If there is no checkpoint, or an option is not for this kind of checkpoint.
    """
    source = Path(config.source)
    if not source.exists():
        raise UserError(f"there is no checkpoint {source}. Give a checkpoint folder or file.")
    if source.is_dir():
        _refuse_options_of_a_file(config)
        return source, ()
    if not config.output:
        raise UserError(
            f"{source} is a file: --output FOLDER says where to write its checkpoint folder."
        )
    return _write_folder_of(source, config)


def images_of(config: EvaluateConfig) -> tuple[str, str, str, str]:
    """The settings that name the images: folder, split, part held out, timm's data set.

    Raises:
        UserError: If none are given.
    """
    if not config.data_dir and not config.dataset:
        raise UserError("evaluate needs --data-dir; see ema-timm evaluate --help.")
    return config.data_dir, config.split, config.val_split, config.dataset


def with_class_names(saved: dict, path: Path, config: EvaluateConfig) -> dict:
    """A folder's config.json with class names: its own, else those of the settings.

    Args:
        saved: Content of config.json.
        path: The folder.
        config: The settings.

    Raises:
        UserError: If the settings give other names than it has, or too many or too few.
    """
    own, classes = saved.get("label_names"), saved["num_classes"]
    if not own or len(own) != classes:
        labels = _labels(config, classes)
        described = {"label_descriptions": labels.descriptions} if labels.descriptions else {}
        kept = {key: value for key, value in saved.items() if key != "label_descriptions"}
        return {**kept, "label_names": labels.names, **described}
    require_unique(own, f"{path}/config.json: label_names")
    if config.labels and read_labels(config.labels).names != own:
        raise UserError(
            f"--labels {config.labels} differs from the label_names in {path}/config.json. Leave "
            "it out or, if it is right, remove label_names from config.json."
        )
    return saved


def _refuse_options_of_a_file(config: EvaluateConfig) -> None:
    unset = EvaluateConfig(config.source)
    given = [n for n in EvaluateConfig.OF_A_FILE if getattr(config, n) != getattr(unset, n)]
    if given:
        option = "--" + given[0].replace("_", "-")
        raise UserError(
            f"{option} is for checkpoint files, but {config.source} is a folder, whose config.json "
            f"decides. Leave {option} out."
        )


def _write_folder_of(source: Path, config: EvaluateConfig) -> tuple[Path, tuple[str, ...]]:
    """Write the checkpoint folder of a checkpoint file."""
    checkpoint = read_checkpoint(source, config.use_averaged)
    network, model_args, notes = rebuild(checkpoint, config.model, config.model_kwargs)
    if checkpoint.arguments.get("class_map") and not config.labels:
        raise UserError(
            f"{source} was trained with --class-map {checkpoint.arguments['class_map']}, which "
            "orders the classes. Give their names in that order with --labels FILE."
        )
    labels = _labels(config, network.num_classes)
    given = {key: getattr(config, key) for key in ("img_size", "crop_pct", "interpolation")}
    given = {key: value for key, value in given.items() if value}
    return write_folder(checkpoint, network, model_args, config.output, labels, given), notes


def _labels(config: EvaluateConfig, classes: int) -> Labels:
    """Class names of a checkpoint without any: those of --labels, else of the class folders."""
    if config.labels:
        labels = read_labels(config.labels)
    else:
        labels = Labels(class_names(*images_of(config)))
    check_count(labels, classes, config.labels or config.data_dir)
    return labels
