"""The measurement: parity before time, the same calls for all, tables made from the JSON alone."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from ema_timm.bench import layer as layer_bench
from ema_timm.bench import runtimes
from ema_timm.bench.authors_code import AUTHORS, AuthorsEmaAttn
from ema_timm.bench.layer import CLONE, OTHERS, bench_layer
from ema_timm.bench.model import bench_model, bench_resolution, build
from ema_timm.bench.parity import network_error
from ema_timm.bench.report.kinds import table
from ema_timm.bench.report.markdown import put_into
from ema_timm.bench.report.picture import plot
from ema_timm.bench.timing import Clock, peak_extra_bytes, round_robin, saved_bytes
from ema_timm.cli import main
from ema_timm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "ema_timm" / "bench" / "results"
TINY = {"tiny": (64, 6, 5)}
SMALL = {"plain": ("test_resnet", {}), "ema": ("test_resnet_ema", {})}


@pytest.fixture(scope="module")
def measured():
    return bench_layer(TINY, batch_size=2, rounds=2, compiled=False, progress=False)


def test_every_variant_has_time_memory_and_parity(measured):
    rows = {row["variant"]: row for row in measured["rows"]}
    assert list(rows) == [AUTHORS, "reference", "closed_form", *OTHERS, CLONE]
    for name in (AUTHORS, "reference", "closed_form"):
        assert rows[name]["parity"] and rows[name]["error"] < 1e-4
    for name, row in rows.items():
        timing = row["forward_ms"]
        assert 0 < timing["min"] <= timing["median"] <= timing["max"]
        assert row["both_floor_ms"] == pytest.approx(2.5 * row["forward_floor_ms"])
        if name != CLONE:
            assert row["saved_bytes"] >= 0 and row["both_peak_bytes"] > 0
    assert rows["closed_form"]["saved_bytes"] < rows[AUTHORS]["saved_bytes"]
    assert measured["machine"]["name"] and measured["machine"]["threads"] >= 1


def test_the_authors_code_equals_the_reference():
    torch.manual_seed(0)
    authors = AuthorsEmaAttn(64, groups=16).double()
    x = torch.randn(2, 64, 5, 7, dtype=torch.float64)
    got = authors(x)
    authors.impl = "reference"
    want = super(AuthorsEmaAttn, authors).forward(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_no_time_without_parity(monkeypatch, capsys, tmp_path):
    """A wrong implementation is shown as such, and the command fails."""
    monkeypatch.setattr(AuthorsEmaAttn, "forward", lambda self, x: x * 0.5)
    monkeypatch.setattr(layer_bench, "bench_layer", partial(bench_layer, TINY))
    file = tmp_path / "bench.json"
    args = [
        "bench",
        "layer",
        "--batch-size",
        "1",
        "--rounds",
        "1",
        "--no-compile",
        "--json",
        str(file),
    ]
    assert main([*args, "--device", "cpu"]) == 1
    (row,) = [r for r in json.loads(file.read_text())["rows"] if r["variant"] == AUTHORS]
    assert row["parity"] is False
    assert not {"forward_ms", "both_ms", "saved_bytes"} & set(row)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if AUTHORS in line]
    assert line.count("failed parity") == 2


def test_calls_are_timed_in_turn():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = round_robin(calls, 3, Clock(torch.device("cpu")), progress=False)
    runs = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert runs[-6:] == ["a", "b"] * 3
    assert set(times) == {"a", "b"}


def test_peak_memory_is_what_is_held_at_once():
    x = torch.zeros(1024, 1024)

    def call():
        y = x + 1  # 4 MiB
        z = y * 2  # 4 more
        del y
        return z.sum()

    assert peak_extra_bytes(call, x.device) == pytest.approx(2 * x.nbytes, rel=0.01)


def test_saved_bytes_count_each_storage_once_and_not_what_is_known():
    x = torch.zeros(100, requires_grad=True)
    w = torch.ones(100, requires_grad=True)
    assert saved_bytes(lambda: x * w, [x, w]) == 0
    assert saved_bytes(lambda: (x * w).exp(), [x, w]) == 400
    assert saved_bytes(lambda: (x * w).exp().square(), [x, w]) == 400


def test_networks_and_their_growth():
    result = bench_model(SMALL, batch_size=2, img_size=64, rounds=1, progress=False)
    plain, ema = result["rows"]
    assert "parity" not in plain
    assert ema["parity"]
    for row in (plain, ema):
        expected = 2e3 / row["training_ms"]["median"]
        assert row["training_images_per_s"] == pytest.approx(expected)
    growth = bench_resolution(
        (64, 96), ("test_resnet", "test_resnet_ema"), rounds=1, progress=False
    )
    assert [row["size"] for row in growth["rows"]] == [64, 64, 96, 96]
    for measurement in (result, growth):
        text = table(measurement)
        assert "test_resnet_ema" in text or "| ema |" in text
        assert measurement["machine"]["name"] in text


def test_whole_network_parity_sees_a_wrong_layer(monkeypatch):
    from ema_timm import EmaAttn

    model = build("test_resnet_ema", {}, torch.device("cpu"))
    images = torch.randn(2, 3, 64, 64)
    assert network_error(model, images) < 1e-5
    monkeypatch.setattr(EmaAttn, "forward", lambda self, x: x * 0.6)
    assert network_error(model, images) > 1e-3


def test_table_from_the_json_file_and_into_a_document(measured, tmp_path, capsys):
    file, document = tmp_path / "bench.json", tmp_path / "README.md"
    file.write_text(json.dumps(measured))
    assert main(["bench", "table", str(file)]) == 0
    assert capsys.readouterr().out.strip() == table(measured).strip()
    document.write_text("before\n<!-- bench: layer -->\nold\n<!-- /bench -->\nafter\n")
    assert main(["bench", "table", str(file), "--into", str(document)]) == 0
    text = document.read_text()
    assert text.startswith("before\n<!-- bench: layer -->\n") and text.endswith("-->\nafter\n")
    assert "old" not in text and "closed_form" in text
    assert put_into(document, "layer", table(measured)) is False  # regenerating changes nothing
    with pytest.raises(UserError, match="no part between <!-- bench: model -->"):
        put_into(document, "model", "")
    file.write_text('{"accuracy": 1}')
    assert main(["bench", "table", str(file)]) == 2


def test_brief_table_has_one_row_a_variant(measured):
    lines = table(measured, brief=True).splitlines()
    assert lines[0].endswith("Times are medians in ms.")  # it has nothing else
    assert table(measured).splitlines()[0].endswith("medians in ms (smallest to largest).")
    assert lines[2].startswith("| forward / forward + backward, ms | 64×6×5 |")
    assert [line.split(" | ")[0][2:] for line in lines[4:]] == [
        AUTHORS,
        "reference",
        "closed_form",
        *OTHERS,
        CLONE,
    ]


@pytest.mark.parametrize(
    ("name", "where", "brief"),
    [
        ("layer", "cpu", True),
        ("model", "cpu", False),
        ("bytes", "cuda", True),
        ("deploy", "cpu", False),
    ],
)
def test_readme_tables_are_those_of_the_measurements(name, where, brief):
    wanted = table(json.loads((RESULTS / f"{name}-{where}.json").read_text()), brief)
    guide = RESULTS.parent / "README.md"
    for document in (guide, ROOT / "README.md"):
        _, marker, rest = document.read_text().partition(f"<!-- bench: {name} -->\n")
        assert marker or document != guide
        assert not marker or rest.partition("<!-- /bench -->")[0] == wanted, document


@pytest.mark.parametrize("kind", ["layer", "model", "resolution"])
def test_plots_are_pictures(measured, tmp_path, kind):
    if kind == "model":
        measured = bench_model(SMALL, batch_size=1, img_size=64, rounds=1, progress=False)
    elif kind == "resolution":
        measured = bench_resolution((64, 96), ("test_resnet",), rounds=1, progress=False)
    plot(measured, tmp_path / "bench.png")
    with Image.open(tmp_path / "bench.png") as picture:
        assert picture.format == "PNG" and picture.width > 500


def test_resolution_refuses_settings_it_would_ignore(capsys):
    args = ["bench", "model", "--resolution", "--amp", "--img-size", "64", "--impl", "reference"]
    assert main(args) == 2
    assert "Remove --img-size, --amp, --impl" in capsys.readouterr().err


def test_a_network_is_measured_with_the_given_implementation():
    result = bench_model(
        SMALL, batch_size=1, img_size=64, rounds=1, impl="reference", progress=False
    )
    assert result["settings"]["impl"] == "reference"
    assert {row["network"]: row.get("error") for row in result["rows"]} == {"plain": None, "ema": 0}


def test_env_says_which_kernel_runs(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "closed_form: runs anywhere; on the CPU " in text
    assert "fused: " in text
    assert "timm: " in text


def test_exported_networks_are_compared_with_the_baseline_se_and_the_authors_code(
    monkeypatch, capsys, tmp_path
):
    file = tmp_path / "deploy.json"
    args = ["bench", "deploy", "--networks", "test_resnet", "--runtimes", "torchscript"]
    args += ["--img-size", "64", "--rounds", "1", "--batch-size", "1", "--json", str(file)]
    args += ["--threads", str(torch.get_num_threads())]
    assert main(args) == 0
    result = json.loads(file.read_text())
    rows = {(row["sizes"], row["variant"]): row for row in result["rows"]}
    free, fixed = ["plain", "ema", "se"], ["plain", "ema", "se", AUTHORS]
    assert list(rows) == [("free", n) for n in free] + [("fixed", n) for n in fixed]
    assert all(row["parity"] and row["inference_ms"]["median"] > 0 for row in rows.values())
    assert rows["free", "se"]["nodes_per_layer"] < rows["free", "ema"]["nodes_per_layer"]
    assert "| test_resnet | torchscript | fixed | 1 |" in capsys.readouterr().out
    plot(result, tmp_path / "deploy.png")
    assert (tmp_path / "deploy.png").stat().st_size > 0

    monkeypatch.setattr(AuthorsEmaAttn, "forward", lambda self, x: x * 0.6)
    assert main(args) == 1
    assert "failed parity" in capsys.readouterr().out


def test_an_unknown_runtime_is_refused(capsys):
    assert main(["bench", "deploy", "--runtimes", "tensorrt"]) == 2
    assert "tensorrt is no runtime here: give onnxruntime" in capsys.readouterr().err


def test_a_runtime_that_is_missing_is_left_out_and_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    monkeypatch.setattr("ema_timm.errors.find_spec", lambda name: None)
    file = tmp_path / "deploy.json"
    args = ["bench", "deploy", "--networks", "test_resnet", "--img-size", "64", "--rounds", "1"]
    args += ["--batch-size", "1", "--json", str(file), "--threads", str(torch.get_num_threads())]
    assert main(args) == 0
    said = capsys.readouterr()
    assert "openvino is skipped, not installed: pip install openvino" in said.err
    assert "not installed onnxruntime, openvino" in said.out
    assert {row["runtime"] for row in json.loads(file.read_text())["rows"]} == {
        "torchscript",
        "torch.export",
    }
    assert main([*args, "--runtimes", "openvino"]) == 2
    assert "openvino needs openvino: pip install openvino" in capsys.readouterr().err


def test_what_a_runtime_does_not_take_is_said_and_the_rest_is_measured(monkeypatch, capsys):
    def load(model, images, free):
        if any(isinstance(m, AuthorsEmaAttn) for m in model.modules()):
            raise RuntimeError("no such operator\nmore")
        return runtimes._torchscript(model, images, free)

    monkeypatch.setitem(runtimes.RUNTIMES, "torchscript", runtimes.Runtime(load))
    args = ["bench", "deploy", "--networks", "test_resnet", "--runtimes", "torchscript"]
    args += ["--img-size", "64", "--rounds", "1", "--batch-size", "1"]
    assert main([*args, "--threads", str(torch.get_num_threads())]) == 1
    out = capsys.readouterr().out
    assert f"fixed sizes, batch 1, {AUTHORS}: failed (no such operator)" in out
    (line,) = [line for line in out.splitlines() if "| fixed |" in line]
    assert line.count("failed") == 1
