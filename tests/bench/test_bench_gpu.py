"""Everything that is measured on a GPU in one command, tried on the CPU."""

import json
from functools import partial

import pytest

from ema_timm.attention import EmaAttn
from ema_timm.bench import gpu
from ema_timm.bench.authors_code import AUTHORS
from ema_timm.bench.gpu import MODELS, bench_gpu
from ema_timm.bench.model import NETWORKS
from ema_timm.cli import main

TINY = {"tiny": (64, 6, 5)}
SMALL = {"plain": ("test_resnet", {}), "ema": ("test_resnet_ema", {})}
small = partial(bench_gpu, shapes=TINY, networks=SMALL, progress=False)
ARGS = ["--batch-size", "2", "--img-size", "64", "--rounds", "1", "--no-compile"]


def test_without_a_gpu_one_line_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert main(["bench", "gpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert "bench bytes" in line and "--device cpu" in line


def test_one_command_gives_parity_layers_networks_and_one_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "bench_gpu", small)
    file = tmp_path / "gpu.json"
    assert main(["bench", "gpu", "--device", "cpu", *ARGS, "--json", str(file)]) == 0
    text = capsys.readouterr().out
    result = json.loads(file.read_text())
    kinds = [(part["bench"], part["settings"]["memory_format"]) for part in result["parts"]]
    assert kinds == [
        ("layer", "channels_last"),
        ("layer", "contiguous"),
        ("layer", "contiguous"),
        ("model", "channels_last"),
        ("model", "contiguous"),
    ]
    for part in result["parts"][:3]:
        rows = {row["variant"]: row for row in part["rows"]}
        for variant in (AUTHORS, "closed_form"):
            assert rows[variant]["parity"] and rows[variant]["both_ms"]["median"] > 0
    assert all(row["parity"] for row in result["rows"]) and len(result["rows"]) == 11
    assert "closed_form" in result["machine"]["environment"]
    assert text.index("largest error") < text.index("64×6×5") < text.index("images/s")
    assert main(["bench", "table", str(file)]) == 0
    assert capsys.readouterr().out.strip() == text.strip()


def test_a_wrong_implementation_ends_the_command_with_1(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "bench_gpu", small)
    forward = EmaAttn.forward
    monkeypatch.setattr(EmaAttn, "forward", lambda self, x: _wrong(forward, self, x))
    assert main(["bench", "gpu", "--device", "cpu", *ARGS]) == 1
    assert "failed: tiny" in capsys.readouterr().out


def _wrong(forward, layer, x):
    return forward(layer, x) * (1 if layer.impl == "reference" else 0.9)


def test_a_variant_that_cannot_run_says_so_and_the_rest_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "bench_gpu", small)
    forward = EmaAttn.forward

    def failing(self, x):
        if self.impl == "closed_form":
            raise RuntimeError("no kernel image\nand more")
        return forward(self, x)

    monkeypatch.setattr(EmaAttn, "forward", failing)
    file = tmp_path / "gpu.json"
    assert main(["bench", "gpu", "--device", "cpu", *ARGS, "--json", str(file)]) == 1
    text = capsys.readouterr().out
    assert "tiny, closed_form: failed (no kernel image)" in text and "and more" not in text
    rows = {row["variant"]: row for row in json.loads(file.read_text())["parts"][0]["rows"]}
    assert rows["reference"]["both_ms"]["median"] > 0 and "both_ms" not in rows["closed_form"]


def test_a_part_that_cannot_be_measured_leaves_the_others(monkeypatch, tmp_path, capsys):
    def out_of_memory(*args, **kwargs):
        raise RuntimeError("CUDA out of memory")

    out_of_memory.__name__ = "bench_model"
    monkeypatch.setattr(gpu, "bench_gpu", small)
    monkeypatch.setattr(gpu, "bench_model", out_of_memory)
    picture = tmp_path / "gpu.png"
    assert main(["bench", "gpu", "--device", "cpu", *ARGS, "--plot", str(picture)]) == 1
    text = capsys.readouterr().out
    assert text.count("failed (CUDA out of memory)") == 2 and "64×6×5" in text
    assert picture.stat().st_size > 0


@pytest.mark.parametrize("asked", [True, False])
def test_what_was_measured_until_ctrl_c_is_shown_and_kept(asked, monkeypatch, tmp_path, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "bench_gpu", small)
    monkeypatch.setattr(gpu, "bench_model", interrupted)
    file = tmp_path / "gpu.json"
    file.write_text("an older measurement")
    args = ["bench", "gpu", "--device", "cpu", *ARGS]
    assert main([*args, *(["--json", str(file)] * asked)]) == 130
    said = capsys.readouterr()
    assert "64×6×5" in said.out and "unfinished 3 of 5 parts" in said.out
    (line,) = said.err.splitlines()
    assert "stopped: the result so far is above" in line
    assert (str(file) in line) == asked
    if asked:
        assert len(json.loads(file.read_text())["parts"]) == 3
    else:
        assert file.read_text() == "an older measurement"


def test_the_networks_are_those_of_bench_model():
    assert set(MODELS) <= set(NETWORKS)
