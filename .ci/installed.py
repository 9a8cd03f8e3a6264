"""Tries an installed ema-timm: names, which kernel runs, and its numbers against the definition.

python .ci/installed.py native      # the C kernel must run
python .ci/installed.py fallback    # PyTorch operators must
"""

import subprocess
import sys

import timm
import torch

PARAMETERS = 25_755_400
TOLERANCE = 1e-5
"""Largest difference to the float64 definition, relative to the largest number."""


def main(expected: str) -> None:
    """Print what was found, or fail on the first thing that is not as it should be."""
    model = timm.create_model("resnet50_ema")  # nothing of ours is imported yet
    parameters = sum(p.numel() for p in model.parameters())
    check(parameters == PARAMETERS, f"resnet50_ema has {parameters:,} parameters")
    print(f"timm {timm.__version__}, torch {torch.__version__}: resnet50_ema")

    found = subprocess.run(
        [sys.executable, "-m", "ema_timm", "env"], check=True, capture_output=True, text=True
    ).stdout
    native = "on the CPU native kernel" in found
    print(found)
    check(native == (expected == "native"), f"expected the {expected} path")
    compare(torch.float32)


def compare(dtype: torch.dtype) -> None:
    """The layer's output and input gradient against the definition in float64."""
    from ema_timm import EmaAttn

    torch.manual_seed(0)
    layer = EmaAttn(64, groups=8)
    x = torch.randn(2, 64, 13, 9)
    wanted = run(layer.double(), x.double(), "reference")
    found = run(layer.to(dtype), x.to(dtype), "closed_form")
    for name, a, b in zip(("output", "gradient"), found, wanted, strict=True):
        error = ((a.double() - b).abs().max() / b.abs().max()).item()
        print(f"{name}: {error:.1e} from the float64 definition")
        check(error < TOLERANCE, f"the {name} differs from the definition")


def run(layer, x: torch.Tensor, implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient of ``x``, both (B, C, H, W)."""
    layer.impl = implementation
    x = x.detach().requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    return out.detach(), x.grad


def check(holds: bool, message: str) -> None:
    """Stop with a message; an assert would be left out under -O."""
    if not holds:
        raise SystemExit(f"ema-timm: {message}.")


if __name__ == "__main__":
    main(sys.argv[1])
