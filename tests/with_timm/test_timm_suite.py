"""The runner of timm's own tests: what it selects, and the skips that it does not accept."""

import sys

import pytest
import timm
import timm_suite

TESTS = """
import pytest
from timm import list_models

@pytest.mark.parametrize("model_name", list_models(module="resnet", exclude_filters="*34*"))
@pytest.mark.parametrize("batch_size", [1])
def test_every(model_name, batch_size):
    print("ran", model_name)

@pytest.mark.parametrize("model_name", list_models(["resnet18", "resnet200"], include_tags=True))
def test_tags(model_name):
    print("ran", model_name)

@pytest.mark.parametrize("model_name,kwargs", [("resnet18", {}), ("vgg11", {"a": [1]})])
def test_written_out(model_name, kwargs):
    print("ran", model_name, kwargs)
    if SKIP(model_name):
        pytest.skip("too large")

def test_of_something_else():
    assert False
"""


@pytest.fixture
def suite(tmp_path, monkeypatch, capfd):
    def run(*args, skip="False", version=timm.__version__):
        (tmp_path / "tests").mkdir(exist_ok=True)
        (tmp_path / "tests" / "test_models.py").write_text(TESTS.replace("SKIP(model_name)", skip))
        (tmp_path / "PKG-INFO").write_text(f"Name: timm\nVersion: {version}\n")
        (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
        monkeypatch.setenv("TIMM_SDIST", str(tmp_path))
        try:
            code = timm_suite.main([*args, "--", "-s"])
        except SystemExit as error:
            code = error.code
        finally:
            for name in [n for n in sys.modules if n.startswith("tests")]:
                del sys.modules[name]
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return run


def test_our_names_take_the_place_of_their_plain_twins(suite):
    code, out = suite("resnet18_ema", "cifar_resnet18")
    assert code == 0, out
    ran = [line.partition("ran ")[2] for line in out.splitlines() if "ran " in line]
    tags = [n.partition(".")[2] for n in timm.list_models("resnet18.*", include_tags=True)]
    both = ["resnet18_ema", "cifar_resnet18"]
    expected = [*both, *(f"{name} {{}}" for name in both), "cifar_resnet18.untrained"]
    assert sorted(ran) == sorted([*expected, *(f"resnet18_ema.warm_{tag}" for tag in tags)])


@pytest.mark.parametrize(
    ("skip", "code"), [("True", 0), ("model_name.endswith('_ema')", 1)], ids=["shared", "ours only"]
)
def test_a_skip_counts_only_where_the_twin_is_skipped_too(suite, skip, code):
    found, out = suite("resnet18_ema", skip=skip)
    assert found == code, out
    wrong = "AND ITS TWIN IS NOT: tests/test_models.py::test_written_out[resnet18_ema-kwargs0]"
    assert (wrong in out) == bool(code)


def test_a_name_that_no_test_takes_is_an_error(suite):
    code, out = suite("resnet34_ema")
    assert code == 4
    assert "no test of timm's was collected for ['resnet34_ema']" in out


def test_bad_input_is_refused(suite):
    code, out = suite("resnet18")
    assert code == 2
    assert "not names of this package: resnet18" in out
    code, out = suite("resnet18_ema", version="0.9.0")
    assert f"is timm 0.9.0, and timm {timm.__version__} is installed" in code
