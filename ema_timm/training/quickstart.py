"""An end-to-end example in a minute, offline: real images, training, a reloaded checkpoint."""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_loader, resolve_data_config
from torch import nn

from ema_timm.data.folders import VAL
from ema_timm.data.image_folder import open_folder
from ema_timm.errors import UserError, require_packages
from ema_timm.measure.metrics import measure
from ema_timm.training.run import finetune
from ema_timm.training.settings import FinetuneConfig

MODEL = "test_resnet_ema"
"""timm's smallest ResNet, with EMA attention: under half a million parameters."""

_RELOAD = """
import json, sys, timm, torch
from ema_timm.training.quickstart import validate
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True)
print(json.dumps(validate(model, sys.argv[2])))
"""


def quickstart(output: str | Path, progress: bool = True) -> str:
    """Fine-tune on handwritten digits, reload the checkpoint in a new process and compare.

    Args:
        output: Folder to write: ``digits`` (the images) and ``run`` (the checkpoint).
        progress: Show progress on stderr.

    Returns:
        A message with the accuracy and the next commands.

    Raises:
        UserError: If the folder exists or scikit-learn is missing.
        RuntimeError: If the reloaded model's accuracy differs by even one image.
    """
    started = time.perf_counter()
    output = Path(output)
    images, run = output / "digits", output / "run"
    if run.exists():
        raise UserError(f"{run} exists. Remove {output}, or give another --output.")
    write_digits(images)
    results = finetune(quickstart_config(images, run), progress=progress)
    metrics = results["metrics"]
    reloaded = _validate_elsewhere(run, images)
    same = {key: metrics[key] for key in reloaded}
    if reloaded != same:
        raise RuntimeError(
            f"the reloaded model gives {reloaded}, but the trained model gave {same}"
        )
    seconds = time.perf_counter() - started
    return (
        f"{MODEL}: top-1 {metrics['top1']:.2f}% ({metrics['correct']} of {metrics['images']} "
        f"held-out digits) after {seconds:.0f} s.\n"
        f'Reloaded in a new process by timm.create_model("local-dir:{run}", pretrained=True): '
        "exactly the same accuracy.\n\n"
        f"Look at {run / 'README.md'} and {run / 'curves.png'}. Next, your own images:\n"
        "  ema-timm finetune --model resnet50_ema --data-dir DIR --output runs/mine\n"
        "with DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg. All names:\n"
        "  python -c 'import timm; print(timm.list_models(\"*_ema\"))'"
    )


def quickstart_config(images: Path, run: Path) -> FinetuneConfig:
    """The settings of the example run."""
    return FinetuneConfig(
        model=MODEL,
        data_dir=str(images),
        output=str(run),
        pretrained=False,
        img_size=64,
        epochs=10,
        batch_size=32,
        lr=4e-3,
        warmup_epochs=2,
        smoothing=0.1,
        hflip=0.0,  # a mirrored digit is another symbol
        scale_min=0.7,
        device="cpu",
        workers=0,
    )


def write_digits(folder: Path) -> None:
    """Write scikit-learn's handwritten digits as an image folder, every fifth one in ``val``.

    1,797 greyscale images of 8×8 pixels, ten classes (UCI ML repository, Alpaydin and Kaynak).
    """
    require_packages(["sklearn"], "train", "quickstart")
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (image, target) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "val" if index % 5 == 0 else "train"
        write_image(image, folder / split / str(target) / f"{index:04d}.png")


def write_image(digit, path: Path) -> None:
    """Write one of scikit-learn's digits, (8, 8) with values 0 to 16, as a greyscale image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((digit * (255 / 16)).round().astype("uint8")).save(path)


def validate(model: nn.Module, data_dir: str | Path) -> dict:
    """Count correct predictions on the validation images, with the model's own preprocessing."""
    data = resolve_data_config(model=model)
    classes = model.pretrained_cfg["label_names"]
    class_map = {name: index for index, name in enumerate(classes)}
    images = open_folder(data_dir, VAL, class_map)
    images.read_channels(data["input_size"][0])
    loader = create_loader(
        images,
        batch_size=32,
        use_prefetcher=False,
        num_workers=0,
        persistent_workers=False,
        **data,
    )
    metrics = measure(model, loader, torch.device("cpu"), progress=False)
    return {"correct": metrics.correct, "images": metrics.images}


def _validate_elsewhere(run: Path, images: Path) -> dict:
    command = [sys.executable, "-c", _RELOAD, str(run), str(images)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the checkpoint in {run} does not load back:\n{done.stderr}")
    return json.loads(done.stdout)
