"""The build of the CPU kernel; everything else about the package is in pyproject.toml.

The kernel is called through ctypes and holds no symbol of Python's, so that one wheel a platform
serves every Python (``py3-none-PLATFORM``). Without a compiler, or with one that cannot build it,
the package is built without the kernel (``py3-none-any``) and PyTorch operators do its work.

``EMA_TIMM_KERNEL`` in the environment: ``required`` makes a kernel that cannot be built an error,
``none`` leaves it out.
"""

import os
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = "ema_timm/ops/closed_form/csrc"
WISHES = ("auto", "required", "none")


class BuildKernel(build_ext):
    """Compiles the kernel into a library whose name says nothing of a Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """Where the library lies, without the suffix of one Python."""
        return str(Path(*fullname.split("."))) + ".so"


class Wheel(bdist_wheel):
    """Names the wheel for its platform, not for a Python; without a kernel, for none."""

    def get_tag(self) -> tuple[str, str, str]:
        """The three parts of the wheel's tag; the kernel is built by then, or could not be."""
        _, _, platform = super().get_tag()
        kernel = any(
            Path(file).exists() for file in self.get_finalized_command("build_ext").get_outputs()
        )
        return ("py3", "none", platform if kernel else "any")


def kernel(wish: str) -> Extension:
    """The kernel's sources, and how they are compiled here.

    No OpenMP library is linked: PyTorch has loaded one, and its symbols are found in the process.
    A second one would have threads of its own.
    """
    mac = sys.platform == "darwin"
    openmp = ["-Xclang", "-fopenmp"] if mac else ["-fopenmp"]
    return Extension(
        "ema_timm.ops.closed_form._kernel",
        sources=sorted(glob(f"{SOURCES}/*.c")),
        depends=sorted(glob(f"{SOURCES}/*.h")),  # a change in one of them builds all anew
        extra_compile_args=["-O3", "-g0", *openmp, "-Wno-psabi"],
        extra_link_args=["-undefined", "dynamic_lookup"] if mac else ["-lm"],
        optional=wish == "auto",
    )


wish = os.environ.get("EMA_TIMM_KERNEL", "auto")
if wish not in WISHES:
    raise SystemExit(f"EMA_TIMM_KERNEL is one of {', '.join(WISHES)}; got {wish!r}.")
setup(
    ext_modules=[] if wish == "none" else [kernel(wish)],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": Wheel},
)
