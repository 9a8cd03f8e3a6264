"""What a type checker sees of the public names, and that the package says that it has types."""

import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A user's module by the names that it imports. A line with "# wrong" must be an error.
USES = {
    "ema_timm": """
        import timm
        import torch

        import ema_timm
        from ema_timm import EmaAttn, EmaWeights, ema_attention, inject, placement
        from ema_timm import set_implementation, tune

        layer = EmaAttn(64, groups=8, device="cpu", dtype=torch.float32)
        EmaAttn("64")  # wrong
        EmaAttn(64, factor=8)
        EmaAttn(64, 8)  # wrong
        EmaAttn(64, reduction=8)  # wrong
        weights: EmaWeights = layer.weights()
        gated: torch.Tensor = ema_attention(torch.randn(1, 64, 7, 7), weights, 8)
        ema_attention(gated, weights, 8, impl=3)  # wrong
        model = inject(timm.create_model("resnet18"), groups=16, stages=(3, 4))
        inject(model, stage=3)  # wrong
        inject(model, at=["layer1.*", "layer2.*"], example=gated, replace=True)
        inject(model, at=3)  # wrong
        inject(model, **placement(model))
        placement("resnet18")  # wrong
        count: int = set_implementation(model, "reference")
        set_implementation("resnet18", "reference")  # wrong
        tune(model, gated)
        tune("resnet18", gated)  # wrong
        ema_timm.unknown  # wrong
    """,
    "ema_timm.training": """
        import ema_timm.training
        from ema_timm.training import FinetuneConfig, finetune

        config = FinetuneConfig(model="resnet18_ema", epochs=3)
        FinetuneConfig(epochs="three")  # wrong
        FinetuneConfig(learning_rate=1e-3)  # wrong
        finetune(config)
        finetune("resnet18_ema")  # wrong
        ema_timm.training.unknown  # wrong
    """,
    "ema_timm.measure": """
        import ema_timm.measure
        from ema_timm.measure import evaluate

        evaluate("runs/flowers")  # wrong
        ema_timm.measure.unknown  # wrong
    """,
    "ema_timm.compare": """
        import ema_timm.compare
        from ema_timm.compare import compare

        compare("runs/compare")  # wrong
        ema_timm.compare.unknown  # wrong
    """,
    "ema_timm.see": """
        import ema_timm.see
        from ema_timm.see import attention_maps, predict

        attention_maps("resnet18_ema")  # wrong
        predict("resnet18_ema")  # wrong
        ema_timm.see.unknown  # wrong
    """,
    "ema_timm.publishing": """
        import ema_timm.publishing
        from ema_timm.publishing import publish

        publish("runs/flowers", 3)  # wrong
        ema_timm.publishing.unknown  # wrong
    """,
    "ema_timm.export": """
        import ema_timm.export
        from ema_timm.export import export

        export("runs/flowers", "onnx")
        export("runs/flowers", 3)  # wrong
        ema_timm.export.unknown  # wrong
    """,
}


def test_mypy_sees_the_types_of_the_public_names(tmp_path):
    pytest.importorskip("mypy")
    lines = [line for text in USES.values() for line in dedent(text).splitlines()]
    (tmp_path / "user.py").write_text("\n".join(lines))
    # Silent: the package is read here, not installed, and mypy would report errors inside it.
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "user.py"]
    env = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    errors = {int(n) for n in re.findall(r"^user\.py:(\d+): error", done.stdout, re.M)}
    wrong = {n for n, line in enumerate(lines, 1) if "# wrong" in line}
    assert errors == wrong, done.stdout + done.stderr


def test_wheel_and_sdist_hold_the_mark_of_a_typed_package(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={tmp_path}"]
    command += ["build_py", f"--build-lib={tmp_path / 'lib'}"]
    env = {**os.environ, "EMA_TIMM_KERNEL": "none"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    assert (tmp_path / "lib" / "ema_timm" / "py.typed").is_file()
    (sources,) = tmp_path.glob("*.egg-info/SOURCES.txt")
    assert "ema_timm/py.typed" in sources.read_text().splitlines()
