"""``python -m ema_timm``, for torchrun: ``torchrun --nproc-per-node 2 -m ema_timm finetune …``."""

import sys

from ema_timm.cli import main

if __name__ == "__main__":
    sys.exit(main())
