"""The kernel's library: built from these sources, by which compiler, with what in it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import oracle

from ema_timm.ops.autograd import closed_form_eager
from ema_timm.ops.cpu import library, native

FOLDER = Path(library.__file__).parent
ROOT = FOLDER.parents[2]
CSRC = FOLDER / "csrc"

needs_sources = pytest.mark.skipif(not CSRC.is_dir(), reason="no C sources: not a checkout")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
pytestmark = needs_sources


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Stands in for the package's folder: the C sources, and no library yet."""
    shutil.copytree(CSRC, tmp_path / "csrc")
    monkeypatch.setattr(library, "_HERE", tmp_path)
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


def forget():
    for cached in (library.library, library.has_float16, library._find, native._dtypes):
        cached.cache_clear()


def build(folder, *flags, compiler="cc"):
    sources = sorted((folder / "csrc").glob("*.c"))
    abi = f"-DEMA_ABI={library.digest(folder / 'csrc'):#x}u"
    command = [compiler, "-O0", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi", abi, *flags]
    subprocess.run([*command, *sources, "-o", folder / "_kernel.so", "-lm"], check=True)
    forget()


@needs_compiler
def test_a_library_of_other_sources_is_refused(folder):
    build(folder)
    assert library.status().startswith("native kernel")
    with open(folder / "csrc" / "rows.h", "a") as header:
        header.write("/* another version */\n")
    forget()
    assert "other sources: pip install -e . --no-deps" in library.status()
    shutil.rmtree(folder / "csrc")  # what is installed has no sources, and goes by the note
    (folder / library.NOTE).write_text(json.dumps({"abi": 1, "failure": None}))
    forget()
    assert "other sources: pip install --force-reinstall --no-deps ema-timm" in library.status()
    oracle.assert_matches(closed_form_eager, oracle.make_case((1, 8, 3, 4), 2))


def test_the_digest_sees_every_source(folder):
    before = {library.digest(folder / "csrc")}
    for path in sorted((folder / "csrc").iterdir()):
        path.write_bytes(path.read_bytes() + b"\n")
        before.add(library.digest(folder / "csrc"))
    assert len(before) == 1 + len(list((folder / "csrc").iterdir()))


@needs_compiler
def test_without_the_compilers_float16_pytorch_does_it(folder):
    build(folder, "-DEMA_NO_FLOAT16")
    assert "float16 in PyTorch" in library.status()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        case = oracle.make_case((2, 16, 5, 6), 2, dtype)
        assert native.takes(case.x, ()) == (dtype != torch.float16)
        oracle.assert_matches(closed_form_eager, case)


def test_all_that_a_target_uses_is_asked_for_at_run_time():
    choice = (CSRC / "closed_form.c").read_text()
    asked = set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', choice))
    asked |= set(re.findall(r"&& has_(\w+)", choice))
    for variant in ("avx2", "avx512"):
        targets = re.findall(
            r'target\(?\(?"([\w,]+)"|target "([\w,]+)"', (CSRC / f"{variant}.c").read_text()
        )
        assert len(targets) == 2
        for names in targets:
            assert set("".join(names).split(",")) <= asked


def run_build(compiler, tmp_path):
    """Run the build with ``compiler`` as an install does, and return the note that it leaves."""
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += [f"--build-lib={tmp_path / 'lib'}", f"--build-temp={tmp_path / 'temp'}"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "CC": str(compiler)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = tmp_path / "lib" / FOLDER.relative_to(ROOT)
    return found, json.loads((found / library.NOTE).read_text())


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("echo \"a.h:8:10: fatal error: 'omp.h' file not found\" >&2; exit 1", "'omp.h' file not"),
        ("echo 'ld: cannot find -lomp: No such file' >&2; exit 1", "cannot find -lomp"),
        (None, "No such file"),
    ],
)
def test_a_failed_build_is_named(compiler, reason, tmp_path, monkeypatch):
    path = tmp_path / "compiler"
    if compiler is not None:
        path.write_text(f"#!/bin/sh\n{compiler}\n")
        path.chmod(0o755)
    found, note = run_build(path, tmp_path)
    assert reason in note["failure"]
    assert "\n" not in note["failure"]
    monkeypatch.setattr(library, "_HERE", found)
    forget()
    try:
        assert reason in library.status()
    finally:
        monkeypatch.undo()
        forget()


COMPILERS = [
    name
    for name in ["gcc", "clang", *[f"{c}-{v}" for c in ("gcc", "clang") for v in range(10, 30)]]
    if shutil.which(name)
]


@pytest.mark.long
@pytest.mark.parametrize("compiler", COMPILERS)
def test_every_compiler_at_hand_builds_a_kernel_that_is_right(compiler, tmp_path, monkeypatch):
    found, note = run_build(compiler, tmp_path)
    if note["failure"] and "omp" in note["failure"]:
        pytest.skip(note["failure"])
    assert note == {"abi": library.digest(CSRC), "failure": None}
    monkeypatch.setattr(library, "_HERE", found)
    forget()
    try:
        assert library.status().startswith("native kernel")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for layout in ("contiguous", "channels_last"):
                case = oracle.make_case((2, 32, 9, 7), 2, dtype, layout)
                assert native.takes(case.x, ()) or dtype == torch.float16
                oracle.assert_matches(closed_form_eager, case)
    finally:
        monkeypatch.undo()
        forget()
