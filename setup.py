"""Builds the CPU kernel and notes from what; all else stands in pyproject.toml."""

import json
import os
import runpy
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError, LinkError

ROOT = Path(__file__).parent
FOLDER = "ema_timm/ops/closed_form"
# The package itself cannot be imported here: it needs PyTorch.
LIBRARY = runpy.run_path(str(ROOT / FOLDER / "library.py"))


class BuildKernel(build_ext):
    """Hands the digest of the sources to the compiler, and notes it and the compiler's error."""

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

    def build_extension(self, ext):
        """Build one extension; what the compiler says passes through."""
        ext.define_macros = [*ext.define_macros, ("EMA_ABI", f"{self._abi():#x}u")]
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


setup(cmdclass={"build_ext": BuildKernel})
