"""timm networks with EMA attention: placement, registered names, identity initialisation."""

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
    # Imported before the lock is acquired: holding it during imports can deadlock with their locks.
    from ema_timm.backbones import any_network, cifar_resnet, mobilenetv2_ema, resnet_ema

    with _lock:
        for family in (resnet_ema, mobilenetv2_ema, cifar_resnet, any_network):
            family.register()
        _registered = True


# In the last lines, and before any module of this package: importing timm.models registers the
# names, which imports the modules of this package, which import timm.models. Otherwise the first of
# them would be incomplete when its names are needed. All of timm first: a thread that imports
# timm.models and one that is importing timm would wait for each other.
import timm  # noqa: E402
import timm.models  # noqa: E402, F401

if not _registered:  # another thread has imported timm and could not wait for this module
    ema_timm_autoload.install()
