"""Makes ``import timm`` enough: registers the EMA attention models once timm has loaded.

The same for YOLO: the layer's name goes to the module that builds YOLO models once that has loaded.

timm has no plug-in discovery, but it always imports torch, and torch calls every entry point of
the group ``torch.backends`` at the end of its own import (pytorch RFC, issue 122468). `autoload`
is such an entry point. It only puts a finder in front of ``sys.meta_path``; the finder lets
``timm.models``, or a builder of YOLO models, load as always and then registers our names.

This module stands beside the package, not in it, for two reasons. ``EMA_TIMM_AUTOLOAD=0`` must
leave ``ema_timm`` unimported, or a later ``import ema_timm`` could no longer register. And where
the package's folder is damaged or gone, torch still finds this file, so that the worst case is
one warning. Standard library only, because torch is still initialising when it runs.
"""

import os
import sys
import threading

_TIMM = "timm.models"
# ultralytics, the package yolov5, and a clone of YOLOv5, whose modules are top-level.
_YOLO = ("ultralytics.nn.tasks", "yolov5.models.yolo", "models.yolo")
_TARGETS = (_TIMM, *_YOLO)


class _RegisteringLoader:
    """Runs the real loader, hides itself from the module, then registers our models."""

    def __init__(self, loader, finder):
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        """Leave it to the real loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module):
        """Run ``timm.models`` as if this loader were not there, then register."""
        # The module must look as if nothing had been there: inspect, importlib.resources and
        # reload all read these two.
        module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        name = module.__name__
        self._finder.loading.add(name)
        try:
            self._loader.exec_module(module)
            _register(module)
        finally:
            self._finder.loading.discard(name)


class _TimmModelsFinder:
    """Meta path finder that answers for the targets alone, by asking the other finders."""

    def __init__(self):
        self.loading = set()
        self._asking = threading.local()

    def find_spec(self, fullname, path=None, target=None):
        """The spec that the other finders have for one of the targets, with our loader in it."""
        if fullname not in _TARGETS or getattr(self._asking, "now", False):
            return None
        self._asking.now = True
        try:
            for finder in sys.meta_path:
                find_spec = getattr(finder, "find_spec", None)
                spec = find_spec(fullname, path, target) if find_spec else None
                if spec is not None:
                    break
            else:
                return None
        finally:
            self._asking.now = False
        if hasattr(spec.loader, "exec_module"):
            spec.loader = _RegisteringLoader(spec.loader, self)
        return spec


_finder = _TimmModelsFinder()
_warned = False


def autoload():
    """Entry point for torch (and, one day, timm): `install`, unless EMA_TIMM_AUTOLOAD=0."""
    if os.environ.get("EMA_TIMM_AUTOLOAD") == "0":
        return
    try:
        install()
    except Exception as error:  # an exception here would make `import torch` itself fail
        _warn(error)


def install():
    """Register the models as soon as ``timm.models`` is loaded, or now where it already is.

    The same for the layer's name and the builders of YOLO models.

    Safe to call from several threads and any number of times. Imports neither torch nor timm.
    """
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    for target in _TARGETS:
        _install(target)


def _install(target):
    module = sys.modules.get(target)
    if module is None:
        return
    if getattr(getattr(module, "__spec__", None), "_initializing", False):
        if target in _finder.loading:
            return  # our loader is at work in some thread and registers when it is done
        from importlib import import_module

        import_module(target)  # another thread loads it without our loader: wait for that
    _register(module)


def _register(module):
    try:
        if module.__name__ == _TIMM:
            from ema_timm.backbones import register

            register()
        else:
            from ema_timm.integrations.yolo.layer import register

            register(module)
    except Exception as error:  # the target must import as before, whatever is wrong with us
        if type(error).__name__ == "_DeadlockError":
            return  # another thread is importing that wing, waits for timm, and registers then
        _warn(error)


def _warn(error):
    global _warned
    if _warned:
        return
    _warned = True
    remedy = ""
    if not getattr(error, "has_remedy", False):  # a second one would contradict the first
        remedy = (
            "; reinstall or remove the package: pip install --force-reinstall --no-deps ema-timm, "
            "or pip uninstall ema-timm"
        )
    text = (
        f"ema-timm could not register its models ({type(error).__name__}: {error}). "
        f"torch, timm and YOLO work as before{remedy}."
    )
    try:
        import warnings

        warnings.warn(text, RuntimeWarning, stacklevel=2)
    except Exception:  # -W error: a warning must not become the failure it reports
        print(text, file=sys.stderr)
