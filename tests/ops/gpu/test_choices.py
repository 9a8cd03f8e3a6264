"""What "auto" looks up on a GPU: fake tensors of CUDA stand in for those that are not here."""

import json
import logging
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from ema_timm import EmaAttn, ema_attention
from ema_timm.errors import CannotCompileError, UserError
from ema_timm.ops import dispatch
from ema_timm.ops.gpu import choice_file, choices
from ema_timm.ops.gpu.choice_file import Layer, Records, file_of, tuning_key

GPU = torch.device("cuda:0")
LAYER = Layer(2, 8, 2, 6, 5, "float32", "contiguous", False)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A process that has looked nothing up, and a cache of its own."""
    monkeypatch.setattr(choices, "_chosen", {})
    monkeypatch.setattr(choices, "_default", {})
    monkeypatch.setenv("EMA_TIMM_CACHE", str(tmp_path))
    monkeypatch.delenv("EMA_TIMM_GPU", raising=False)
    choices.pass_over.cache_clear()


@pytest.fixture
def ran(monkeypatch):
    """Names of the implementations that ran."""
    names = []

    def watch(name, home, attribute):
        plain = getattr(home, attribute)

        def watched(*args, **kwargs):
            names.append(name)
            return plain(*args, **kwargs)

        monkeypatch.setattr(home, attribute, watched)

    watch("reference", dispatch, "reference")
    watch("closed_form", dispatch, "closed_form")
    watch("closed_form", dispatch, "closed_form_eager")
    return names


def on_gpu(shape, dtype=torch.float32, layout=torch.contiguous_format):
    """A map on a GPU that is not there, with the layer's parameters beside it."""
    with FakeTensorMode():
        x = torch.randn(shape, device=GPU, dtype=dtype).to(memory_format=layout)
        weights = EmaAttn(shape[1], groups=2, device=GPU).requires_grad_(False).weights()
    return x, weights


def test_auto_takes_what_was_chosen_for_that_layer_alone(ran):
    choices.remember(GPU, {LAYER: "reference"})
    assert ema_attention(*on_gpu((2, 8, 6, 5)), 2).shape == (2, 8, 6, 5)
    assert ran == ["reference"]
    for other in (
        on_gpu((3, 8, 6, 5)),
        on_gpu((2, 8, 5, 6)),
        on_gpu((2, 8, 6, 5), torch.bfloat16),
        on_gpu((2, 8, 6, 5), layout=torch.channels_last),
    ):
        ran.clear()
        ema_attention(*other, 2)
        assert ran == ["closed_form"]
    ran.clear()
    x, weights = on_gpu((2, 8, 6, 5))
    ema_attention(x.requires_grad_(), weights, 2)  # a backward may follow
    assert ran == ["closed_form"]


def test_a_named_implementation_is_not_overruled(ran):
    choices.remember(GPU, {LAYER: "reference"})
    ema_attention(*on_gpu((2, 8, 6, 5)), 2, impl="closed_form")
    assert ran == ["closed_form"]


def test_the_cpu_never_asks(monkeypatch):
    def refuse(*call):
        raise AssertionError("looked up")

    monkeypatch.setattr(choices, "look_up", refuse)
    layer = EmaAttn(8, groups=2)
    layer(torch.randn(2, 8, 6, 5)).sum().backward()
    with torch.no_grad():
        layer(torch.randn(2, 8, 6, 5))


def test_once_loaded_a_call_costs_a_look_at_a_dict(monkeypatch):
    x, _ = on_gpu((2, 8, 6, 5))
    monkeypatch.setattr(choice_file, "tuning_key", lambda device: {"device": "none"})
    assert choices.look_up(x, 2, False) is None

    def refuse(*call):
        raise AssertionError("looked further")

    for name in ("read_device", "gpu_mode"):
        monkeypatch.setattr(choices, name, refuse)
    assert choices.look_up(x, 2, False) is None


def test_a_later_process_reads_the_file(monkeypatch, tmp_path):
    here = {"device": "a GPU", "torch": "2"}
    monkeypatch.setattr(choice_file, "tuning_key", lambda device: here)
    file = file_of(here)
    file.parent.mkdir(parents=True)
    file.write_text(content(here))
    x, _ = on_gpu((2, 8, 6, 5))
    assert choices.look_up(x, 2, False) == "fused"
    assert choices.look_up(x, 2, True) is None


def content(key, **changes):
    entry = {"layer": LAYER._asdict(), "chosen": "fused", "candidates": {}}
    return json.dumps({"environment": key, "disabled": {}, "layers": [entry], **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        content({"device": "another"}),
        content({"device": "a GPU"}, layers=[{"layer": {}, "chosen": None, "candidates": {}}]),
        content({"device": "a GPU"}, layers=7),
        content({"device": "a GPU"}, disabled=[]),
        content({"device": "a GPU"}).replace('"float32"', '"float33"'),
        content({"device": "a GPU"}).replace('"candidates": {}', '"candidates": []'),
        content({"device": "a GPU"})[:-9],
    ],
)
def test_what_is_damaged_or_of_another_environment_is_ignored_with_one_line(tmp_path, caplog, text):
    file = tmp_path / "choices.json"
    file.write_text(text)
    assert choice_file.read_file(file, {"device": "a GPU"}) == Records()
    (record,) = caplog.records
    assert "ignored" in record.message and "\n" not in record.message


def test_what_is_written_is_read_again(tmp_path):
    key, file = {"device": "a GPU"}, tmp_path / "choices.json"
    candidates = {"fused": {"state": "accepted", "ms": 0.1}}
    records = Records({LAYER: candidates}, {LAYER: "fused"}, {"reference": "it is slow"})
    choice_file.write_file(file, key, records)
    assert choice_file.read_file(file, key) == records


def test_every_tuning_key_has_its_own_file():
    here = tuning_key(torch.device("cpu"))
    assert {"device", "capability", "driver", "torch", "triton", "sources"} < set(here)
    files = {file_of({**here, part: "other"}) for part in here}
    assert len(files | {file_of(here)}) == len(here) + 1


def test_off_and_fused_overrule_what_was_chosen(monkeypatch, ran, caplog):
    monkeypatch.setenv("EMA_TIMM_GPU", "off")
    choices.remember(GPU, {LAYER: "reference"})
    ema_attention(*on_gpu((2, 8, 6, 5)), 2)
    assert ran == ["closed_form"]
    monkeypatch.setenv("EMA_TIMM_GPU", "fused")
    choices.remember(GPU, {LAYER: "reference"})
    assert choices.look_up(on_gpu((2, 8, 6, 5))[0], 2, False) == "fused"
    with caplog.at_level(logging.WARNING):
        for _ in range(3):  # the kernels do not take float64: the closed form does, after one line
            ema_attention(*on_gpu((2, 8, 6, 5), torch.float64), 2)
    assert ran == ["closed_form"] * 4
    assert len(caplog.records) == 1 and "float64" in caplog.text


def test_kernels_that_no_longer_compile_leave_auto_to_the_closed_form(monkeypatch, ran, caplog):
    """Chosen where there was a compiler; who names the kernels is still told."""
    tried = []

    def failing(*args):
        tried.append(args)
        try:
            raise OSError("Read-only file system: '/cache'\nand more")
        except OSError as error:
            raise CannotCompileError("in one line, with the remedy") from error

    monkeypatch.setattr(dispatch, "_fused", failing)
    monkeypatch.setattr(dispatch, "fused_unavailable", lambda *_: None)
    monkeypatch.setattr(dispatch, "require_fused", lambda *_: None)
    x, weights = on_gpu((2, 8, 6, 5))
    choices.remember(GPU, {LAYER: "fused", LAYER._replace(batch=3): "fused"})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert ema_attention(x, weights, 2).shape == x.shape
    assert len(tried) == 1 and ran == ["closed_form"] * 3
    (record,) = caplog.records
    assert "could not compile" in record.message and "Read-only" in record.message
    assert "\n" not in record.message
    assert choices.look_up(on_gpu((3, 8, 6, 5))[0], 2, False) is None
    with pytest.raises(CannotCompileError, match="with the remedy"):
        ema_attention(x, weights, 2, impl="fused")


def test_a_choice_can_be_taken_back():
    x, _ = on_gpu((2, 8, 6, 5))
    choices.remember(GPU, {LAYER: "reference"})
    choices.remember(GPU, {LAYER._replace(batch=9): "fused"})
    assert choices.look_up(x, 2, False) == "reference"
    choices.remember(GPU, {LAYER: None})
    assert choices.look_up(x, 2, False) is None


def test_an_unknown_gpu_mode_is_one_clear_line(monkeypatch):
    monkeypatch.setenv("EMA_TIMM_GPU", "fuse")
    with pytest.raises(UserError, match=r"^EMA_TIMM_GPU must be .*'fuse'.*unset it\.$"):
        ema_attention(*on_gpu((2, 8, 6, 5)), 2)


def test_choices_depend_on_every_source_of_the_operator(monkeypatch):
    """A changed file anywhere below ops/ makes earlier timings void."""
    read = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or real(path))
    choice_file._sources.__wrapped__()
    ops = Path(choice_file.__file__).parents[1]
    assert set(read) == set(ops.rglob("*.py"))
    assert ops / "dispatch.py" in read
