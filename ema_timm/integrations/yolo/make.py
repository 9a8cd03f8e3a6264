"""A detector's checkpoint -> its folder, measured where that is asked for, with its card."""

from pathlib import Path

from ema_timm.checkpoints.layout import RESULTS, read_json
from ema_timm.errors import UserError
from ema_timm.integrations.yolo.card import write_detector_card
from ema_timm.integrations.yolo.check import is_detector
from ema_timm.integrations.yolo.files import open_detector
from ema_timm.integrations.yolo.folder import save_folder
from ema_timm.integrations.yolo.measure import measure_folder


def make_folder(
    source: str | Path,
    folder: str | Path | None = None,
    data: str | Path | None = None,
    imgsz: int | None = None,
    split: str = "val",
    device: str | None = None,
) -> tuple[Path, dict]:
    """Write a checkpoint as a folder, or take one that is there; measure it; write its card.

    Args:
        source: A checkpoint ``.pt``, or a folder, where that is to be measured.
        folder: Where to; None where ``source`` is the folder.
        data: As in `ema_timm.integrations.yolo.measure.measure_folder`; None measures nothing.
        imgsz: The same.
        split: The same.
        device: The same.

    Returns:
        The folder, and the content of its results.json.

    Raises:
        UserError: If the source is neither, or cannot be read, or the data set cannot.
        EditedCardError: If the folder has a card that was edited by hand; the rest is written.
    """
    if folder is None:
        if not is_detector(source):
            raise UserError(
                f"{source} is no folder of a detector. Write one first: ema-timm yolo MODEL.pt "
                "--folder DIR"
            )
        folder = source
    elif Path(source).suffix != ".pt":
        raise UserError(f"a folder is made of a checkpoint .pt, got {source}.")
    else:
        save_folder(open_detector(source), folder)
    folder = Path(folder)
    if data is not None:
        measure_folder(folder, data, imgsz, split=split, device=device)
    write_detector_card(folder)
    return folder, read_json(folder / RESULTS, "Run the command again.")


def measured_lines(results: dict) -> list[str]:
    """What was measured, a line each; that nothing was, where nothing was."""
    metrics = dict(results.get("metrics") or {})
    if not metrics:
        return ["not measured: --data DATA.yaml does that"]
    images = metrics.pop("images")
    return [*(f"{name}: {value:.4f}" for name, value in metrics.items()), f"images: {images}"]
