"""The build of the CPU kernel; everything else about the package is in pyproject.toml.

The kernel is called through ctypes and holds no symbol of Python's, so that one wheel a platform
serves every Python (``py3-none-PLATFORM``). Without a compiler, or with one that cannot build it,
the package is built without the kernel (``py3-none-any``) and PyTorch operators do its work.

``EMA_TIMM_KERNEL`` in the environment: ``required`` makes a kernel that cannot be built an error,
``none`` leaves it out.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError, LinkError

ROOT = Path(__file__).parent
FOLDER = "ema_timm/ops/cpu"
WISHES = ("auto", "required", "none")
# The package itself cannot be imported here: it needs PyTorch.
LIBRARY = runpy.run_path(str(ROOT / FOLDER / "library.py"))


class BuildKernel(build_ext):
    """Builds the library under a name without a Python, and notes from what, or why not.

    The compiler is handed the digest of the sources, which is the library's ABI number.
    """

    failure = None

    def run(self):
        """Build, then leave the note where the library lies."""
        self.force = True  # times of files do not tell whether a library is of these sources
        super().run()
        note = json.dumps({"abi": self._abi(), "failure": self.failure})
        for root in [self.build_lib, *([ROOT] if self.inplace else [])]:
            path = Path(root, FOLDER, LIBRARY["NOTE"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(note, encoding="utf-8")

    def get_ext_filename(self, fullname):
        """Where the library lies, without the suffix of one Python."""
        return str(Path(*fullname.split(".")).with_name(LIBRARY["NAME"]))

    def build_extension(self, ext):
        """Build one extension; what the compiler says passes through."""
        ext.define_macros = [*ext.define_macros, ("EMA_ABI", f"{self._abi():#x}u")]
        ext.extra_link_args = [*ext.extra_link_args, *self._openmp()]
        with tempfile.TemporaryFile("w+", errors="replace") as said:
            try:
                with _standard_error_to(said):
                    super().build_extension(ext)
            except (BaseError, CCompilerError, CompileError, LinkError) as error:
                said.seek(0)
                self.failure = _first_error(said.read()) or str(error)
                raise
            finally:
                said.seek(0)
                sys.stderr.write(said.read())

    def _abi(self):
        return LIBRARY["digest"](ROOT / FOLDER / "csrc")

    def _openmp(self):
        """Which OpenMP is linked: none, for PyTorch's is in the process; a second has threads too.

        Clang calls one by LLVM's names, which PyTorch's on Linux (GCC's) does not have.
        """
        if sys.platform == "darwin":
            return ["-undefined", "dynamic_lookup"]
        return ["-fopenmp"] if _is_clang(self.compiler.compiler_so[0]) else []


class Wheel(bdist_wheel):
    """Names the wheel for its platform, not for a Python; without a kernel, for none."""

    def get_tag(self):
        """The three parts of the wheel's tag; the kernel is built by then, or could not be."""
        _, _, platform = super().get_tag()
        built = self.get_finalized_command("build_ext").get_outputs()
        return ("py3", "none", platform if any(map(os.path.exists, built)) else "any")


@contextmanager
def _standard_error_to(file):
    """Send what this process and its children write to standard error to ``file``."""
    sys.stderr.flush()
    before = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)


def _first_error(said):
    signs = ("error:", "cannot find")
    return next((line.strip() for line in said.splitlines() if any(s in line for s in signs)), None)


def _is_clang(compiler):
    try:
        said = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return False  # the build itself says what is wrong with it
    return "clang" in said


def _kernel(wish):
    openmp = ["-Xclang", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
    return Extension(
        "ema_timm.ops.cpu._kernel",
        sources=sorted(glob(f"{FOLDER}/csrc/*.c")),
        depends=sorted(glob(f"{FOLDER}/csrc/*.h")),  # which takes them into the sdist too
        extra_compile_args=["-O3", "-g0", *openmp, "-Wno-psabi"],
        extra_link_args=["-lm"],
        optional=wish == "auto",
    )


wish = os.environ.get("EMA_TIMM_KERNEL", "auto")
if wish not in WISHES:
    raise SystemExit(f"EMA_TIMM_KERNEL is one of {', '.join(WISHES)}; got {wish!r}.")
setup(
    ext_modules=[] if wish == "none" else [_kernel(wish)],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": Wheel},
)
