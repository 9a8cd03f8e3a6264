"""The parts of every model card: template, metadata, tables of numbers, citations, checksum.

The last line of a card is a checksum of the text above it. It tells generated cards from cards that
somebody has edited.
"""

import hashlib
import re
from importlib import resources
from string import Template

import yaml

from ema_timm.errors import some
from ema_timm.names import code, escape

SHOWN = 20
"""Most classes whose names a card lists."""

_CHECKSUM = re.compile(r"<!-- ema-timm card, sha256 of the text above: ([0-9a-f]{64}) -->\n\Z")

EMA_ATTENTION = (
    "EMA attention: Efficient Multi-scale Attention (arXiv:2305.13563), a gate over channel "
    "groups. It is not an exponential moving average of weights."
)

CITE_EMA = """\
```bibtex
@inproceedings{ouyang2023ema,
  title     = {Efficient Multi-Scale Attention Module with Cross-Spatial Learning},
  author    = {Ouyang, Daliang and He, Su and Zhang, Guozhong and Luo, Mingzhu and Guo, Huaiyong
               and Zhan, Jian and Huang, Zhijie},
  booktitle = {ICASSP},
  pages     = {1--5},
  year      = {2023},
  doi       = {10.1109/ICASSP49357.2023.10096516}
}
```"""

CITE_TIMM = """\
```bibtex
@misc{rw2019timm,
  title  = {PyTorch Image Models},
  author = {Wightman, Ross},
  year   = {2019},
  doi    = {10.5281/zenodo.4414861}
}
```"""


def fill(template: str, **values: str) -> str:
    """A file of ``templates/`` with its blanks filled; an empty value leaves no gap."""
    text = resources.files(__package__).joinpath("templates", template).read_text("utf-8")
    return re.sub(r"\n{3,}", "\n\n", Template(text).substitute(values))


def yaml_block(facts: dict) -> str:
    """The metadata at the top of a card, without those that are unknown."""
    known = {key: value for key, value in facts.items() if value}
    text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n\n"


def table(rows: list[tuple[str, str | None]], title: str = "measured") -> str:
    """A table of two columns, without rows that have no value."""
    lines = [f"| {name} | {value} |" for name, value in rows if value is not None]
    return "\n".join([f"| {title} | |", "|---|---|", *lines])


def listed(classes: list[str]) -> str:
    """The first class names, and how many more there are."""
    return some([code(name) for name in classes], SHOWN)


def count_rows(results: dict) -> list[tuple[str, str | None]]:
    """Table rows of what is counted on the network without images."""
    macs = results.get("macs")
    ema = total = definition = None
    if macs:
        total = f"{macs['total']:,}"
        if macs["ema"]:
            ema = f"{macs['ema']:,}"
            definition = f"{macs['ema_definition']:,}"
    return [
        ("Parameters", f"{results['parameters']:,}"),
        ("Multiply-accumulates (convolutions and matrix products, one image)", total),
        ("… of which EMA attention, in the closed form that runs", ema),
        ("… EMA attention by the paper's definition would be", definition),
    ]


def versions_text(versions: dict) -> str:
    """Names and numbers of versions."""
    return escape(", ".join(f"{name} {number}" for name, number in versions.items()))


def card_name(results: dict) -> str:
    """The model's name on a card: that of its repository, else its architecture."""
    return (results.get("card", {}).get("repo_id") or results["architecture"]).split("/")[-1]


def model_index(
    results: dict, task: tuple[str, str], dataset: dict, metrics: list[tuple[str, str, float]]
) -> list[dict]:
    """The entry ``model-index`` of the metadata.

    Args:
        results: Content of results.json.
        task: The Hub's type of the task, and its name.
        dataset: The data set by the Hub's keys.
        metrics: The Hub's type, the name and the value of each metric.
    """
    entries = [{"type": kind, "name": name, "value": value} for kind, name, value in metrics]
    found = {"task": {"type": task[0], "name": task[1]}, "dataset": dataset, "metrics": entries}
    return [{"name": card_name(results), "results": [found]}]


def with_checksum(text: str) -> str:
    """``text`` with its checksum as the last line."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}\n<!-- ema-timm card, sha256 of the text above: {digest} -->\n"


def is_generated(text: str) -> bool:
    """Whether a card is as it was generated, by this version or an earlier one."""
    found = _CHECKSUM.search(text)
    return bool(found) and text == with_checksum(text[: found.start() - 1])
