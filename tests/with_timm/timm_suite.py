"""timm's own model tests, unmodified, on the names that this package registers.

    python tests/with_timm/timm_suite.py                          every name
    python tests/with_timm/timm_suite.py --fast                   the names that CI takes
    python tests/with_timm/timm_suite.py resnet18_ema -- -k fx    some names; the rest is for pytest

timm's source distribution carries its tests. pip fetches the one of the installed version, or
TIMM_SDIST names an unpacked one. Nothing in it is changed and nothing of timm is patched: a pytest
plug-in puts our names where a parametrised test has their plain twin, so that what timm runs or
leaves out for resnet50 is run or left out for resnet50_ema. A test that skips one of ours is run
on the twin; where the twin is not skipped, that is a failure.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest
import timm
from timm.models import is_model, model_entrypoint
from timm_twins import NOT_RUN, Twins
from timm_weights import StandInHub

FAST = (
    "resnet18_ema",
    "resnet50_ema",
    "resnext50_32x4d_ema",
    "wide_resnet50_2_ema",
    "mobilenetv2_100_ema",
    "cifar_resnet18_ema",
    "test_resnet_ema",
)


def twins() -> dict[str, str]:
    """Every name of ours, and the network of timm whose tests it takes."""
    ours = [n for n in timm.list_models() if model_entrypoint(n).__module__.startswith("ema_timm.")]
    return {name: name.removeprefix("cifar_").removesuffix("_ema") for name in ours}


class Outcomes:
    """Records the outcome of each test."""

    def __init__(self):
        self.outcome: dict[str, str] = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.outcome[report.nodeid] = report.outcome


def sdist(work: Path) -> Path:
    """The unpacked source distribution of the installed timm."""
    given = os.environ.get("TIMM_SDIST")
    if given:
        folder = Path(given)
    else:
        version = f"timm=={timm.__version__}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        done = subprocess.run([*command, "--no-binary", "timm", version, "--dest", str(work)])
        archives = list(work.glob("timm-*.tar.gz"))
        if done.returncode or not archives:
            sys.exit(f"pip cannot fetch the source of {version}: set TIMM_SDIST to an unpacked one")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(work, filter="data")
        folder = work / f"timm-{timm.__version__}"
    if not (folder / "tests" / "test_models.py").is_file():
        sys.exit(f"{folder} has no tests/test_models.py: it is no source distribution of timm")
    found = re.search(r"^Version: (.*)$", (folder / "PKG-INFO").read_text(), re.MULTILINE)[1]
    if found != timm.__version__:
        sys.exit(f"{folder} is timm {found}, and timm {timm.__version__} is installed")
    return folder


def run(folder: Path, plugin, *args: str) -> int:
    """Run pytest on timm's model tests under timm's own configuration."""
    config = ["-c", str(folder / "pyproject.toml"), "--rootdir", str(folder)]
    quiet = ["-p", "no:cacheprovider", "--import-mode=importlib", "-o", "addopts="]
    return pytest.main([*config, *quiet, *args], plugins=[plugin])


def unjustified(folder: Path, skipped: dict[str, str]) -> list[str]:
    """The skipped tests of ours whose plain twin is not skipped."""
    if not skipped:
        return []
    plain = Outcomes()
    run(folder, plain, "-q", *(str(folder / node) for node in sorted(set(skipped.values()))))
    return [ours for ours, twin in skipped.items() if plain.outcome.get(twin) != "skipped"]


def main(argv: list[str]) -> int:
    """Run the suite; returns 0 if all passed and nothing was skipped that timm does not skip."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="names of ours (default: all)")
    parser.add_argument("--fast", action="store_true", help="the names of continuous integration")
    args = parser.parse_args(argv[:end])
    known = twins()
    chosen = args.names or (FAST if args.fast else known)
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        parser.error(f"not names of this package: {', '.join(unknown)}")
    if strangers := [n for n in chosen if not is_model(known[n])]:
        parser.error(f"timm has no plain twin of {', '.join(strangers)}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        folder = sdist(Path(work))
        plugin = Twins({n: known[n] for n in chosen}, args.fast, StandInHub(Path(work) / "hub"))
        tests = str(folder / "tests" / "test_models.py")
        code = run(folder, plugin, tests, "-q", "-ra", *argv[end + 1 :])
        wrong = unjustified(folder, plugin.skipped)
    report(plugin, wrong, time.monotonic() - started)
    return 1 if wrong else int(code)


def report(plugin: Twins, wrong: list[str], seconds: float) -> None:
    """Print the outcomes by name, what was not run, and skips that timm does not share."""
    print(f"\ntimm {timm.__version__}, its tests/test_models.py, {seconds:.0f} s")
    for name, counts in plugin.counts.items():
        print(f"  {name:28}", ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())))
    for test, count in plugin.not_run.items():
        print(f"  not run: {test} ({count}): {NOT_RUN[test]}")
    if plugin.left_out:
        print(
            f"  not run with --fast: {plugin.left_out} tests of further tags, and the longest ones"
        )
    for node in wrong:
        print(f"  SKIPPED, AND ITS TWIN IS NOT: {node}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
