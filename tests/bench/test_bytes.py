"""What a training step moves, counted on fake CUDA tensors: the counter and its numbers."""

import json
from functools import partial

import pytest
import torch

from ema_timm import EmaAttn
from ema_timm.bench import bytes as moved
from ema_timm.bench.authors_code import AUTHORS, AuthorsEmaAttn
from ema_timm.bench.bytes import Setting, bench_bytes, count_layer
from ema_timm.bench.counter import Counter, backward
from ema_timm.bench.layer import SHAPES
from ema_timm.cli import main

STAGES = {int(place[-1]): shape for place, shape in SHAPES.items() if "resnet50" in place}


def counted(call):
    with Counter() as counter:
        call()
    return counter.bytes, counter.launches


@pytest.mark.parametrize(
    ("call", "units", "launches"),
    [
        (lambda x, row, out: x.view(4, -1).t()[1:].unsqueeze(0).expand(3, -1, -1), 0, 0),
        (lambda x, row, out: torch.empty_like(x), 0, 0),
        (lambda x, row, out: torch.promote_types(x.dtype, torch.float64), 0, 0),
        (lambda x, row, out: x + x.detach().clone(), 5, 2),
        (lambda x, row, out: x * x, 2, 1),
        (lambda x, row, out: x.add_(out), 3, 1),
        (lambda x, row, out: torch.mul(x, row, out=out), 2 + 1 / 8, 1),
        (lambda x, row, out: out.copy_(row.expand_as(out)), 1 + 1 / 8, 1),
        (lambda x, row, out: x.sum(0), 1 + 1 / 8, 1),
        (lambda x, row, out: torch.cat([x, out]), 4, 1),
        (lambda x, row, out: x.zero_(), 1, 1),
        (lambda x, row, out: torch._foreach_mul_([x, out], [2, 3]), 4, 1),
    ],
)
def test_the_counter_knows_views_broadcasts_and_what_is_written_in_place(call, units, launches):
    x, out, row = torch.ones(8, 4), torch.ones(8, 4), torch.ones(1, 4)
    assert counted(lambda: call(x, row, out)) == (units * x.nbytes, launches)


@pytest.mark.parametrize("kind", [AuthorsEmaAttn, EmaAttn])
def test_the_backward_walked_node_by_node_is_that_of_autograd(kind):
    layer = kind(32, groups=4)
    x = torch.randn(2, 32, 6, 5, requires_grad=True)
    grad = torch.randn_like(x)
    walked = counted(partial(backward, layer(x), grad))
    out = layer(x)
    engine = counted(lambda: torch.autograd.grad(out, [x, *layer.parameters()], grad))
    assert walked == engine


def test_the_authors_code_counts_as_it_was_counted_by_hand():
    setting = Setting(256, "bfloat16", "contiguous")
    found = count_layer(AuthorsEmaAttn, STAGES[1], setting)
    # 2 pools, 2 gates of 2, a copy to float32 of 3, a norm of 4, a convolution of 2, two means of
    # 2 and 1, two products of 3, the gate of 2; the rest is what is small beside a map.
    assert 25 < found["forward_bytes"] / found["input_bytes"] < 27
    assert found["forward_launches"] == 29


# Stage of ResNet-50: largest forward in sizes of x, share of the authors' code in forward
# and in both. Towards the last stage rows and columns are as large as the map.
BOUNDS = {1: (14.5, 0.55, 0.55), 2: (14.8, 0.57, 0.58), 3: (17.4, 0.66, 0.66), 4: (25, 0.9, 0.9)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("stage", STAGES)
def test_auto_on_cuda_moves_less_than_the_authors_code(stage, layout, dtype):
    setting = Setting(256, dtype, layout)
    ours = count_layer(EmaAttn, STAGES[stage], setting)
    theirs = count_layer(AuthorsEmaAttn, STAGES[stage], setting)
    room = 1.02 if dtype == "float16" else 1  # products of float16 for the votes are in float64
    units, forward, both = [room * bound for bound in BOUNDS[stage]]
    assert ours["forward_bytes"] <= units * ours["input_bytes"]
    assert ours["forward_bytes"] <= forward * theirs["forward_bytes"]
    total = [c["forward_bytes"] + c["backward_bytes"] for c in (ours, theirs)]
    assert total[0] <= both * total[1]
    assert ours["saved_bytes"] <= 0.5 * ours["input_bytes"]
    assert ours["forward_launches"] <= 44 and ours["backward_launches"] <= 81


def test_float32_moves_less_too():
    setting = Setting(256, "float32", "channels_last")
    ours, theirs = (count_layer(kind, STAGES[2], setting) for kind in (EmaAttn, AuthorsEmaAttn))
    for key, share in (("forward_bytes", 0.75), ("backward_bytes", 0.75), ("saved_bytes", 0.1)):
        assert ours[key] <= share * theirs[key]


@pytest.fixture(scope="module")
def measured():
    one = {"tiny": (64, 6, 5)}
    return bench_bytes(one, ("test_resnet_ema",), 2, ("bfloat16",), ("contiguous",), 64)


def test_the_layers_of_a_network_are_added_up(measured):
    rows = {(row["place"], row["variant"]): row for row in measured["rows"]}
    assert list(rows) == [(p, v) for p in ("tiny", "test_resnet_ema") for v in (AUTHORS, "auto")]
    whole = rows["test_resnet_ema", "auto"]
    assert whole["layers"] > 1
    shapes = moved._layer_shapes("test_resnet_ema", 64)
    assert whole["layers"] == sum(shapes.values())
    setting = Setting(2, "bfloat16", "contiguous")
    parts = {s: count_layer(EmaAttn, s, setting)["forward_bytes"] for s in shapes}
    assert whole["forward_bytes"] == sum(n * parts[s] for s, n in shapes.items())


def test_counts_as_a_table_a_picture_and_json(measured, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(moved, "bench_bytes", lambda batch_size: measured)
    file, picture = tmp_path / "bytes.json", tmp_path / "bytes.png"
    args = ["bench", "bytes", "--json", str(file), "--plot", str(picture)]
    assert main(args) == 0
    text = capsys.readouterr().out
    assert "Counted on CUDA" in text and "ms" not in text.split("\n")[0].split()
    assert text.count("| test_resnet_ema |") == 2
    assert json.loads(file.read_text()) == measured
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["bench", "table", "--brief", str(file)]) == 0
    brief = capsys.readouterr().out
    assert "| test_resnet_ema, bfloat16, contiguous |" in brief
    assert "in parentheses" in text and "in parentheses" not in brief
