"""Registers the EMA attention models when timm is imported, so that ``import timm`` is enough.

It also adds the layer's name to the module that builds YOLO models, when that is imported.

timm has no plug-in discovery, but it always imports torch. At the end of its own import, torch
calls every entry point of the group ``torch.backends`` (pytorch RFC, issue 122468). `autoload` is
such an entry point. It only puts a finder in front of ``sys.meta_path``. The finder lets
``timm.models``, or a builder of YOLO models, load as usual and then registers our names.

This module is outside of the package for two reasons. With ``EMA_TIMM_AUTOLOAD=0`` it must not
import ``ema_timm``, or a later ``import ema_timm`` could no longer register the models. And if the
package's folder is damaged or missing, torch still finds this file and prints only one warning.
It uses only the standard library, because torch is still initialising when it runs.
"""

import os
import sys
import threading

_TIMM = "timm.models"
# ultralytics, the package yolov5, and a clone of YOLOv5, which has top-level modules.
_YOLO = ("ultralytics.nn.tasks", "yolov5.models.yolo", "models.yolo")
_TARGETS = (_TIMM, *_YOLO)


class _RegisteringLoader:
    """Runs the real loader, then registers our models. The module does not see this loader."""

    def __init__(self, loader, finder):
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        """Call the real loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module):
        """Load the module with the real loader, then register."""
        # inspect, importlib.resources and reload read these two attributes.
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
    """Meta path finder for the targets only. It asks the other finders for their spec."""

    def __init__(self):
        self.loading = set()
        self._asking = threading.local()

    def find_spec(self, fullname, path=None, target=None):
        """The other finders' spec of a target, with our loader in it."""
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
    """Register the models when ``timm.models`` is imported, or now if it already is.

    This also covers the layer's name in the builders of YOLO models. You can call it from several
    threads and more than once. It imports neither torch nor timm.
    """
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    for target in _TARGETS:
        _install(target)
    _install_script()


def _install(target):
    module = sys.modules.get(target)
    if module is None:
        return
    if getattr(getattr(module, "__spec__", None), "_initializing", False):
        if target in _finder.loading:
            return  # our loader is running in another thread and registers at its end
        from importlib import import_module

        # Wait for another thread, which imports it without our loader. In this thread the module
        # is the first of the process and has just imported torch.
        import_module(target)
    _register(module)


def _install_script():
    """Register in ``python models/yolo.py``, which is loading, as YOLOv5's way to try a YAML."""
    script = sys.modules.get("__main__")
    file = getattr(script, "__file__", None) or ""
    if os.path.normpath(file).split(os.sep)[-2:] == ["models", "yolo.py"]:
        _register(script)


def _register(module):
    try:
        if module.__name__ == _TIMM:
            from ema_timm.backbones import register

            register()
        else:
            from ema_timm.integrations.yolo.layer import register

            register(module)
    except Exception as error:  # an error of ours must not break the import of the target
        if type(error).__name__ == "_DeadlockError":
            return  # another thread imports our package, waits for timm, and then registers
        _warn(error)


def _warn(error):
    global _warned
    if _warned:
        return
    _warned = True
    remedy = ""
    if not getattr(error, "has_remedy", False):  # two remedies would contradict each other
        remedy = (
            "; reinstall or remove the package: pip install --force-reinstall --no-deps ema-timm, "
            "or pip uninstall ema-timm"
        )
    text = (
        f"ema-timm could not register its models ({type(error).__name__}: {error}). "
        f"torch, timm and YOLO still work{remedy}."
    )
    try:
        import warnings

        warnings.warn(text, RuntimeWarning, stacklevel=2)
    except Exception:  # -W error: a warning must not become the failure it reports
        print(text, file=sys.stderr)
