"""Predictions as a file, with the columns of timm's inference script.

``filename``, ``index``, ``label`` and ``prob``, the most probable first. A CSV file has one column
per rank, ``label_0`` and so on, as the script has with ``--results-separate-col --include-index
--fullname --label-type name``. The other formats have lists.
"""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ema_timm.errors import UserError, require_packages
from ema_timm.files import make_writable, write_whole
from ema_timm.names import encodable


class Prediction(NamedTuple):
    """The most probable classes of one image, best first.

    Attributes:
        filename: As given, or the given folder and what is below it.
        index: Numbers of the classes.
        label: Their names.
        prob: Their probabilities, 0 to 1.
    """

    filename: str
    index: list[int]
    label: list[str]
    prob: list[float]


def top_classes(
    files: Sequence[Path], probabilities: Tensor, labels: Sequence[str], topk: int
) -> list[Prediction]:
    """The ``topk`` most probable classes of each file; ``probabilities`` is (B, classes)."""
    best = probabilities.topk(min(topk, probabilities.shape[1]))
    return [
        Prediction(str(file), index, [labels[i] for i in index], prob)
        for file, index, prob in zip(
            files, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]


def check_output(output: str) -> None:
    """Check, before any work, that a file can be written."""
    suffix = Path(output).suffix
    if suffix not in OUTPUT_FORMATS:
        raise UserError(
            f"--output ends in {', '.join(OUTPUT_FORMATS)}, got {output}. Give one of them."
        )
    if suffix == ".parquet":
        require_packages(["pyarrow"], "parquet", "a .parquet file")
    make_writable(Path(output).parent)


def check_png(option: str, file: str) -> None:
    """Check, before any work, that matplotlib is installed and a figure can be written."""
    require_packages(["matplotlib"], "see", option)
    if Path(file).suffix != ".png":
        raise UserError(f"{option} is a .png file, got {file}. Give such a name.")
    make_writable(Path(file).parent)


def write_predictions(rows: list[Prediction], topk: int, output: str) -> None:
    """Write a file in the format of its suffix.

    Args:
        rows: One per image.
        topk: Classes of each row.
        output: A name that `check_output` passed.
    """
    write = OUTPUT_FORMATS[Path(output).suffix]
    rows = [
        row._replace(filename=encodable(row.filename), label=[*map(encodable, row.label)])
        for row in rows
    ]
    write_whole(Path(output), lambda path: write(rows, topk, path))


def _write_csv(rows: list[Prediction], topk: int, path: Path) -> None:
    places = range(topk)
    header = [f"{name}_{place}" for name in ("index", "label", "prob") for place in places]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", *header])
        writer.writerows([row.filename, *row.index, *row.label, *row.prob] for row in rows)


def _write_jsonl(rows: list[Prediction], topk: int, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row._asdict(), ensure_ascii=False) + "\n")


def _write_parquet(rows: list[Prediction], topk: int, path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema(
        {
            "filename": pyarrow.string(),
            "index": pyarrow.list_(pyarrow.int64()),
            "label": pyarrow.list_(pyarrow.string()),
            "prob": pyarrow.list_(pyarrow.float32()),
        }
    )
    table = pyarrow.Table.from_pylist([row._asdict() for row in rows], schema=schema)
    parquet.write_table(table, path)


OUTPUT_FORMATS: dict[str, Callable[[list[Prediction], int, Path], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}
