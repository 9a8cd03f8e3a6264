"""The text of a model card, from results.json only."""

import json

from ema_timm.checkpoints.cards import parts
from ema_timm.checkpoints.cards.metadata import front_matter, is_ema, measured_on
from ema_timm.checkpoints.cards.parts import (
    SHOWN,
    count_rows,
    fill,
    listed,
    table,
    versions_text,
    with_checksum,
)
from ema_timm.checkpoints.config import needs_auto_map
from ema_timm.names import code, escape

_WHAT_EMA = f"An image classifier whose blocks carry {parts.EMA_ATTENTION}"
_WHAT_PLAIN = "An image classifier in timm's format."
_FOLDER = "PATH/TO/THIS/FOLDER"
_SETTINGS = ("opt", "lr", "weight_decay", "epochs", "batch_size", "sched", "smoothing", "seed")


def card_text(results: dict) -> str:
    """The README.md of a checkpoint folder; the same results give the same text.

    Args:
        results: Content of results.json (`ema_timm.checkpoints.results` lists its keys). Optional
            keys that are missing are not mentioned.
    """
    ema, ours = is_ema(results), needs_auto_map(results["architecture"])
    repository = results.get("card", {}).get("repo_id")
    body = fill(
        "checkpoint.md",
        architecture=escape(results["architecture"]),
        what=_WHAT_EMA if ema else _WHAT_PLAIN,
        numbers=_numbers(results),
        measured=_measured(results),
        training=_training(results),
        install="pip install ema-timm" if ours else "pip install timm",
        mode="L" if results["input"]["input_size"][0] == 1 else "RGB",
        timm_name=json.dumps(f"hf-hub:{repository}" if repository else f"local-dir:{_FOLDER}"),
        transformers_name=json.dumps(repository or _FOLDER),
        where=_where(repository, ours),
        limits=_limits(results),
        citation="\n\n".join([parts.CITE_EMA, parts.CITE_TIMM] if ema else [parts.CITE_TIMM]),
    )
    return with_checksum(front_matter(results) + body)


def _numbers(results: dict) -> str:
    metrics, size = results.get("metrics"), results["input"]
    rows = []
    if metrics:
        top5, balanced = metrics.get("top5"), metrics.get("balanced_accuracy")
        counts = f"({metrics['correct']} of {metrics['images']})"
        rows = [
            ("Top-1 accuracy", f"{metrics['top1']:.2f}% {counts}"),
            ("Top-5 accuracy", None if top5 is None else f"{top5:.2f}%"),
            ("Balanced accuracy", None if balanced is None else f"{balanced:.2f}%"),
            ("Cross-entropy", f"{metrics['loss']:.4f}"),
            ("Images", f"{metrics['images']}{_identical(results)}"),
        ]
    rows += [
        ("Classes", str(len(results["classes"]))),
        ("Input", "×".join(map(str, size["input_size"]))),
        *count_rows(results),
    ]
    return table(rows)


def _identical(results: dict) -> str:
    """How many of the measured images the network was trained on, if there are some."""
    count = results.get("identical_images")
    if not count or not _measured_on_val(results):
        return ""
    return f" ({count} are training images too: expect less on new images)"


def _measured(results: dict) -> str:
    evaluation = results.get("evaluation")
    if not evaluation:
        return ""
    data, size, where = evaluation["data"], results["input"], measured_on(results)
    precision = escape(evaluation["dtype"])
    if evaluation.get("amp_dtype"):
        precision += f" under autocast to {escape(evaluation['amp_dtype'])}"
    text = (
        "## How it was measured\n\n"
        f"On the {data['images']} images of {code('/'.join(map(str, where.values())))} "
        f"(fingerprint {code(data['fingerprint'][:12])}), {escape(size['interpolation'])} "
        f"interpolation, crop {size['crop_pct']:g} ({escape(size['crop_mode'])}), {precision}, on "
        f"{escape(evaluation['device'])}, "
        f"with {versions_text(evaluation['versions'])}: `ema-timm evaluate` counts as timm's "
        "validation script does, to the last image."
    )
    classes = evaluation["per_class"]
    if len(classes) <= SHOWN:
        rows = [(code(name), f"{c['correct']} of {c['images']}") for name, c in classes.items()]
        text += "\n\n" + table(rows, "correct, by class")
    return "\n\n".join([text, *_plots(results, "confusion.png", "confusion matrix")])


def _training(results: dict) -> str:
    arguments, base = results.get("arguments"), results.get("base")
    if not arguments:
        return ""
    used = ", ".join(f"{name} {arguments[name]}" for name in _SETTINGS if name in arguments)
    images = (results.get("data", {}).get("train") or {}).get("images")
    script = results.get("trained_with", "ema-timm finetune")
    text = (
        f"## How it was trained\n\n{_start(base)}"
        f"{f' on {images} images' if images else ''} with {code(script)}"
        f"{_epoch(results)}.{_in_parts(results)}\n\nSettings: {escape(used)}. Every setting"
        f"{' and the history of all epochs are' if results.get('history') else ' is'} in "
        "`results.json`."
    )
    if results.get("versions"):
        versions, device = versions_text(results["versions"]), escape(str(results.get("device")))
        text += f"\n\nVersions: {versions}; device {device}."
    return "\n\n".join([text, *_plots(results, "curves.png", "loss and accuracy")])


def _start(base: dict | None) -> str:
    if not base:
        return "Trained"
    if base.get("weights") == "random start":
        return f"Trained from a random start of {code(str(base.get('model')))}"
    return f"Fine-tuned from {code(str(base.get('model')))} ({escape(str(base.get('weights')))})"


def _epoch(results: dict) -> str:
    if results.get("best_epoch"):
        decay = results.get("arguments", {}).get("average_weights")
        kind = f"averaged weights (decay {decay:g})" if decay else "weights"
        return (
            f"; these are the {kind} of epoch {results['best_epoch']}, the best by top-1 on the "
            "validation images"
        )
    if results.get("epoch"):
        averaged = results.get("checkpoint", {}).get("averaged")
        kind = "averaged weights (the other EMA)" if averaged else "weights"
        return f"; these are the {kind} of epoch {results['epoch']}"
    return ""


def _in_parts(results: dict) -> str:
    """A sentence about a run that was extended, or that ended early."""
    ends, early, text = results.get("extended_after"), results.get("stopped_early"), ""
    if ends:
        once = f"epoch {ends[0]}" if len(ends) == 1 else f"epochs {', '.join(map(str, ends))}"
        text = (
            f" The run was finished after {once} and extended, each time as a new run from its "
            "last weights with a schedule of its own."
        )
    if early:
        text += (
            f" It ended after epoch {early['epoch']}: the last {early['patience']} had brought "
            "nothing better."
        )
    return text


def _plots(results: dict, name: str, shown: str) -> list[str]:
    return [f"![{shown}]({name})"] if name in results.get("plots", ()) else []


def _where(repository: str | None, ours: bool) -> str:
    lines = []
    if not repository:
        lines.append("From the Hugging Face Hub the same works as `hf-hub:USER/NAME`.")
    if ours:
        lines.append(
            "Where `ema-timm` is not installed, timm does not know this network; with "
            "`trust_remote_code=True` transformers names what to install."
        )
    return " ".join(lines)


def _limits(results: dict) -> str:
    classes = results["classes"]
    text = f"It tells {len(classes)} classes apart: {listed(classes)}."
    if _chosen_on_the_same(results):
        text += (
            " The epoch was chosen on the same images that the accuracy is given for, so expect a "
            "little less on new ones."
        )
    return f"{text} Images from elsewhere than the data set were not tried."


def _chosen_on_the_same(results: dict) -> bool:
    return bool(results.get("best_epoch")) and _measured_on_val(results)


def _measured_on_val(results: dict) -> bool:
    chosen = (results.get("data", {}).get("val") or {}).get("fingerprint")
    measured = results.get("evaluation", {}).get("data", {}).get("fingerprint", chosen)
    return measured == chosen
