"""timm networks with EMA attention: where it goes, the registered names, the warm start."""

import threading

import ema_timm_autoload

_lock = threading.Lock()
_registered = False


def register() -> None:
    """Register every name with timm. Safe to call again and from several threads.

    Raises:
        OldTimmError: If the installed timm is older than the package supports.
    """
    global _registered
    # Before the families, which import names that older versions lack.
    from ema_timm.backbones.timm_version import require_supported_timm

    require_supported_timm()
    # Imported before the lock is taken: a lock held across imports can deadlock with theirs.
    from ema_timm.backbones import cifar_resnet, mobilenetv2_ema, resnet_ema

    with _lock:
        for family in (resnet_ema, mobilenetv2_ema, cifar_resnet):
            family.register()
        _registered = True


# Last, and before any module of this wing: loading timm.models registers the names, and that
# imports the modules of this wing, which import timm.models themselves. The first of them to be
# imported would otherwise be asked for names that it does not have yet. The whole of timm first:
# a thread that loads timm.models by itself and one that is inside timm wait for each other.
import timm  # noqa: E402
import timm.models  # noqa: E402, F401

if not _registered:  # where another thread has loaded timm and could not wait for this module
    ema_timm_autoload.install()
