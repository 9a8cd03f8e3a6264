"""The C kernel under sanitizers, on buffers between pages that fault; `fuzz_kernel.c` is the rest.

Plain C against the kernel's own sources, so that no interpreter and no allocator of PyTorch stands
between an index and the page behind its buffer.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ema_timm.ops.cpu import library

CSRC = Path(library.__file__).parent / "csrc"
DRIVER = Path(__file__).with_name("fuzz_kernel.c")
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)

pytestmark = [
    pytest.mark.skipif(not CSRC.is_dir(), reason="no C sources: not a checkout"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
    pytest.mark.skipif(os.name != "posix", reason="guard pages are made by mmap"),
]


def build(sources: Path, to: Path, *flags: str, cc: str = "cc") -> Path:
    files = [DRIVER, *sorted(sources.glob("*.c"))]
    objects = [to.with_name(f"{file.stem}.o") for file in files]
    compiler = [cc, "-g", "-fopenmp", "-Wno-psabi", f"-I{sources}", *flags]

    def compile_one(file: Path, object_file: Path) -> None:
        subprocess.run([*compiler, "-c", file, "-o", object_file], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, files, objects))
    subprocess.run([*compiler, *objects, "-o", to, "-lm"], check=True)
    return to


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "empty.c").write_text("int main(void) { return 0; }\n")
    probe = ["cc", *SANITIZERS, folder / "empty.c", "-o", folder / "empty"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("the compiler has no sanitizers")
    return build(CSRC, folder / "fuzz", "-O1", *SANITIZERS)


def run(program: Path, first: int, last: int, processes: int = 2) -> list[tuple[int, str]]:
    """Run the cases from ``first`` up to ``last``; exit code and output of each process."""
    step = -(-(last - first) // processes)
    parts = [(i, min(i + step, last)) for i in range(first, last, step)]
    started = [
        subprocess.Popen(
            [program, *map(str, part)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        )
        for part in parts
    ]
    said = [process.communicate()[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def assert_clean(program: Path, first: int, last: int) -> None:
    found = run(program, first, last)
    assert not [text[-3000:] for code, text in found if code]
    assert sum(int(text.split()[0]) for _, text in found) == last - first


@pytest.mark.slow
def test_a_few_hundred_cases(fuzz):
    assert_clean(fuzz, 0, 500)


@pytest.mark.long
def test_the_whole_grid(fuzz):
    assert_clean(fuzz, 500, 20_000)


@pytest.mark.long
def test_optimised_as_installed_without_sanitizers(tmp_path):
    """The pages alone: other code than the sanitizers' build, with the loops vectorised."""
    assert_clean(build(CSRC, tmp_path / "fuzz", "-O3"), 0, 5_000)


CROSS, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"


@pytest.mark.long
@pytest.mark.skipif(
    not (shutil.which(CROSS) and shutil.which(EMULATOR)), reason="no cross-compiler or emulator"
)
def test_on_aarch64_under_emulation(tmp_path):
    """The vectors are NEON's there, and the baseline is the only instruction set."""
    program = build(CSRC, tmp_path / "fuzz", "-O3", "-static", cc=CROSS)
    ran = subprocess.run([EMULATOR, program, "0", "500"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.split()[0] == "500"


# One index off by one each: read and written, at the border and in scratch memory.
BROKEN = {
    "a packed row is read past its map": (
        "rows.h",
        "(H - h) * W - whole >= LANES)\n            store(to",
        "(H - h) * W - whole >= LANES - 1)\n            store(to",
    ),
    "a packed row is written past its map": (
        "rows.h",
        "(H - h) * W - whole >= LANES)\n            store_numbers(to",
        "(H - h) * W - whole >= LANES - 1)\n            store_numbers(to",
    ),
    "a row is one number too long": (
        "rows.h",
        "for (int64_t w = 0; w < width; w++) p[w * step] = from[w];",
        "for (int64_t w = 0; w <= width; w++) p[w * step] = from[w];",
    ),
    "a gate is put past its channel": (
        "gate.h",
        "i + LANES <= area ? i : area - LANES",
        "i + LANES <= area + 1 ? i : area - LANES",
    ),
    "pixels are read past the last channel": (
        "rows.h",
        "c + LANES <= n ? c : n - LANES",
        "c + LANES <= n + 1 ? c : n - LANES",
    ),
    "scratch memory is one vector short": (
        "gate.h",
        "m.row = take(arena, size.Wp);",
        "m.row = take(arena, size.Wp - LANES);",
    ),
    "the products read one row more": (
        "products.h",
        "(i < last ? i : last)",
        "(i <= last ? i : last + 1)",
    ),
    "one number too many is saved": (
        "forward.h",
        "vectors[i], n * sizeof(float)",
        "vectors[i], (n + 1) * sizeof(float)",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("broken", BROKEN)
def test_an_index_off_by_one_is_found(broken, fuzz, tmp_path):
    sources = shutil.copytree(CSRC, tmp_path / "csrc")
    name, right, wrong = BROKEN[broken]
    text = (sources / name).read_text()
    assert text.count(right) >= 1
    (sources / name).write_text(text.replace(right, wrong))
    program = build(sources, tmp_path / "fuzz", "-O0", *SANITIZERS)
    assert any(code for code, _ in run(program, 0, 500))
