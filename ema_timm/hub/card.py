"""Measured results -> the text of a model card. Pure: reads no weights and no network."""

import json
from importlib import resources
from string import Template

_WHAT_EMA = (
    "An image classifier whose blocks carry EMA attention: Efficient Multi-scale Attention "
    "(arXiv:2305.13563), a gate over channel groups. It is not an exponential moving average of "
    "weights."
)
_WHAT_PLAIN = "An image classifier, fine-tuned with ema-timm."
_EMA_CITATION = """\
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
_TIMM_CITATION = """\
```bibtex
@misc{rw2019timm,
  title  = {PyTorch Image Models},
  author = {Wightman, Ross},
  year   = {2019},
  doi    = {10.5281/zenodo.4414861}
}
```"""


def card_text(results: dict) -> str:
    """The README.md of a checkpoint folder; the same results give the same text.

    Args:
        results: Content of results.json, as `ema_timm.finetune.finetune` returns it.
    """
    ema = results["architecture"].endswith("_ema")
    template = Template(
        resources.files(__package__).joinpath("card_template.md").read_text("utf-8")
    )
    body = template.substitute(
        architecture=results["architecture"],
        what=_WHAT_EMA if ema else _WHAT_PLAIN,
        numbers=_numbers(results),
        training=_training(results),
        install="pip install ema-timm adds the EMA models" if ema else "pip install timm",
        limits=_limits(results),
        citation="\n\n".join([_EMA_CITATION, _TIMM_CITATION] if ema else [_TIMM_CITATION]),
    )
    return _front_matter(results, ema) + body


def _front_matter(results: dict, ema: bool) -> str:
    lines = ["---", "library_name: timm", "pipeline_tag: image-classification"]
    lines += ["tags:", "- image-classification", "- timm"]
    if ema:
        lines += ["- ema-attention"]
    base = results["base"]
    if base["license"]:
        lines += [f"license: {base['license']}"]
    if base["hub_repository"]:
        lines += [f"base_model: {base['hub_repository']}"]
    return "\n".join([*lines, "---", "", ""])


def _numbers(results: dict) -> str:
    metrics = results["metrics"]
    channels, height, width = results["input"]["input_size"]
    rows = [
        ("Top-1 accuracy", f"{metrics['top1']:.2f}% ({metrics['correct']} of {metrics['images']})"),
        ("Top-5 accuracy", None if metrics["top5"] is None else f"{metrics['top5']:.2f}%"),
        ("Cross-entropy", f"{metrics['loss']:.4f}"),
        ("Validation images", str(metrics["images"])),
        ("Classes", str(len(results["classes"]))),
        ("Input", f"{channels}×{height}×{width}"),
        ("Parameters", f"{results['parameters']:,}"),
    ]
    table = [f"| {name} | {value} |" for name, value in rows if value is not None]
    return "\n".join(["| measured | |", "|---|---|", *table])


def _training(results: dict) -> str:
    base, arguments, data = results["base"], results["arguments"], results["data"]
    settings = ("opt", "lr", "weight_decay", "epochs", "batch_size", "sched", "smoothing", "seed")
    used = ", ".join(f"{name} {arguments[name]}" for name in settings)
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return (
        f"Fine-tuned from `{base['model']}` ({base['weights']}) on "
        f"{data['train']['images']} images with `ema-timm finetune`; these are the weights of "
        f"epoch {results['best_epoch']}, the best by top-1 on the validation images.\n\n"
        f"Settings: {used}. Every setting, the history of all epochs and a fingerprint of the "
        f"images are in `results.json`.\n\n"
        f"Versions: {versions}; device {results['device']}.\n\n"
        "![loss and accuracy](curves.png)"
    )


def _limits(results: dict) -> str:
    classes = results["classes"]
    shown = ", ".join(json.dumps(name, ensure_ascii=False) for name in classes[:20])
    more = f" and {len(classes) - 20} more" if len(classes) > 20 else ""
    return (
        f"It tells {len(classes)} classes apart: {shown}{more}. The epoch was chosen on the same "
        "images that the accuracy is given for, so expect a little less on new ones. Images from "
        "elsewhere than the training images were not tried."
    )
