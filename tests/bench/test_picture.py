"""The picture of what EMA attention costs: the measurements' numbers, on honest axes."""

import copy
import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from ema_timm.bench.authors_code import AUTHORS
from ema_timm.bench.report.kinds import KINDS
from ema_timm.bench.report.panel import draw
from ema_timm.bench.report.picture import SOURCE
from ema_timm.cli import main
from ema_timm.files import sha256

BENCH = Path(__file__).resolve().parents[2] / "ema_timm" / "bench"
LAYER, MODEL, RESOLUTION = (
    BENCH / "results" / f"{kind}-cpu.json" for kind in ("layer", "model", "resolution")
)


def glance(file):
    result = json.loads(file.read_text())
    return result, KINDS[result["bench"]].glance(result)


def source_of(picture):
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 1000
        return image.text[SOURCE].splitlines()


def test_the_committed_picture_is_of_the_committed_measurements():
    assert source_of(BENCH / "cost.png") == [f"{f.name} {sha256(f)}" for f in (LAYER, MODEL)], (
        "draw it again: ema-timm bench picture ema_timm/bench/results/layer-cpu.json "
        "ema_timm/bench/results/model-cpu.json --output ema_timm/bench/cost.png"
    )


def test_layers_are_relative_to_se_at_the_four_stages():
    result, panel = glance(LAYER)
    assert [heading[:7] for heading in panel.groups] == [f"stage {i}" for i in (1, 2, 3, 4)]
    rows = {(row["place"], row["variant"]): row["both_ms"] for row in result["rows"]}
    for heading, bars in panel.groups.items():
        place = "resnet50 " + heading.partition(",")[0]
        se = rows[place, "se"]["median"]
        for bar, variant in zip(bars, (AUTHORS, "closed_form", "se"), strict=True):
            times = rows[place, variant]
            assert bar[2:5] == pytest.approx([times[k] / se for k in ("median", "min", "max")])
            assert f"{times['median']:.1f} ms" in bar.text
        assert bars[-1].value == panel.mark == 1


def test_networks_are_relative_to_their_plain_network():
    result, panel = glance(MODEL)
    assert list(panel.groups) == ["resnet50", "mobilenetv2_100"]
    speed = {row["network"]: row["training_images_per_s"] for row in result["rows"]}
    bars = [(plain, bar) for plain, group in panel.groups.items() for bar in group]
    assert len(bars) == len(speed)
    for (plain, bar), (name, images) in zip(bars, speed.items(), strict=True):
        assert bar.value == pytest.approx(100 * images / speed[plain])
        assert bar.low <= bar.value <= bar.high
        assert bar.name in ("plain", name, name.removeprefix(f"{plain}, "))


@pytest.mark.parametrize("file", [LAYER, MODEL])
def test_bars_are_as_long_as_their_values_from_zero(file):
    _, panel = glance(file)
    figure = Figure()
    draw(panel, figure)
    (axes,) = figure.axes
    bars = [bar for group in panel.groups.values() for bar in group]
    assert [patch.get_width() for patch in axes.patches] == [bar.value for bar in bars]
    assert {patch.get_x() for patch in axes.patches} == {0}
    assert axes.get_xlim()[0] == 0 and axes.get_xscale() == "linear"
    assert axes.get_xlim()[1] >= max(bar.high for bar in bars)
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [bar.name for bar in bars]


def test_command(tmp_path, capsys):
    output = tmp_path / "cost.png"
    assert main(["bench", "picture", str(MODEL), str(LAYER), "--output", str(output)]) == 0
    assert source_of(output) == [f"{file.name} {sha256(file)}" for file in (MODEL, LAYER)]
    assert capsys.readouterr().out == f"{output}\n"


def test_what_has_no_panel_is_refused(tmp_path, capsys):
    failed = copy.deepcopy(json.loads(LAYER.read_text()))
    for row in failed["rows"]:
        if row["variant"] == "closed_form":
            del row["both_ms"]
    (tmp_path / "failed.json").write_text(json.dumps(failed))
    (tmp_path / "other.json").write_text('{"accuracy": 1}')
    for file, said in (
        (RESOLUTION, "bench picture shows layer, model, not resolution"),
        (tmp_path / "failed.json", "closed_form failed parity"),
        (tmp_path / "other.json", "is not a measurement"),
    ):
        output = tmp_path / "cost.png"
        assert main(["bench", "picture", str(LAYER), str(file), "--output", str(output)]) == 2
        assert said in capsys.readouterr().err
        assert not output.exists()
