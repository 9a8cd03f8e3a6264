"""compare.json, the table in Markdown and CSV, and the picture where matplotlib is there."""

from pathlib import Path

from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.training.compare.tables import as_csv, markdown

try:
    from ema_timm.training.compare.picture import save_comparison
except ImportError:  # matplotlib is an extra
    save_comparison = None


def write_report(content: dict, output: Path) -> None:
    """Write compare.json, compare.md, compare.csv and compare.png.

    Args:
        content: What compare.json will hold.
        output: The folder.
    """
    folder = CheckpointWriter(output)
    folder.write_json("compare.json", content)
    folder.write_text("compare.md", markdown(content))
    folder.write_text("compare.csv", as_csv(content))
    if save_comparison is not None and any("top1" in row for row in content["rows"]):
        folder.write("compare.png", lambda path: save_comparison(content, path))
