"""Parity first, then time, then a choice that is remembered: with stand-in candidates."""

import json

import pytest
import torch
from support import candidates as stand_ins
from support.candidates import LAYER, LAYERS, Candidate, StandInClock

from ema_timm.bench.parity import PARITY_TOLERANCE, error_of, make_case
from ema_timm.errors import VerificationError
from ema_timm.ops import ema_attention
from ema_timm.ops.gpu.choice_file import LAYOUTS, Layer, file_of, read_file
from ema_timm.ops.gpu.choices import layout as layout_of
from ema_timm.tuning.decide import decide
from ema_timm.tuning.store import ACCEPTED, REJECTED, TRYING


@pytest.fixture
def clock():
    return StandInClock()


def run(candidates, clock, layers=LAYERS, **options):
    return decide(layers, candidates, stand_ins.store(), clock, progress=False, **options)


def noted():
    return read_file(file_of(stand_ins.ENVIRONMENT), stand_ins.ENVIRONMENT)


@pytest.mark.parametrize(("ms", "chosen"), [(9.4, "swift"), (9.6, "closed_form"), (30.0, None)])
def test_the_fastest_is_chosen_where_it_is_clearly_faster(clock, ms, chosen):
    outcomes = run({"closed_form": Candidate(clock, 10.0), "swift": Candidate(clock, ms)}, clock)
    assert [outcome.layer for outcome in outcomes] == list(LAYERS)
    for outcome in outcomes:
        assert outcome.chosen == (chosen or "closed_form")
        assert outcome.candidates["swift"]["ms"] == pytest.approx(ms)
        states = {name: entry["state"] for name, entry in outcome.candidates.items()}
        assert states.pop(outcome.chosen) == ACCEPTED
        assert set(states.values()) == {REJECTED}
    assert noted().chosen == {outcome.layer: outcome.chosen for outcome in outcomes}


def test_nobody_is_measured_twice(clock):
    candidates = {"closed_form": Candidate(clock, 10.0), "swift": Candidate(clock, 1.0)}
    first = run(candidates, clock)
    calls = candidates["swift"].calls
    again = run(candidates, clock)
    assert candidates["swift"].calls == calls
    assert [(o.chosen, o.candidates) for o in again] == [(o.chosen, o.candidates) for o in first]
    assert all(o.remembered for o in again) and not any(o.remembered for o in first)
    assert not any(o.remembered for o in run(candidates, clock, retry=True))


def test_who_does_not_agree_with_the_definition_gets_no_time(clock):
    wrong = Candidate(clock, 1.0, change=lambda out: 1.01 * out)
    for outcome in run({"closed_form": Candidate(clock, 10.0), "wrong": wrong}, clock):
        assert outcome.chosen == "closed_form"
        assert "ms" not in outcome.candidates["wrong"]
        assert outcome.candidates["wrong"]["reason"].startswith("failed parity")
    assert wrong.calls == len(LAYERS)


def test_who_raises_is_out_with_the_reason(clock):
    def refuse():
        raise RuntimeError("no compiler here.\nA long story.")

    outcomes = run(
        {"closed_form": Candidate(clock, 10.0), "lame": Candidate(clock, 1.0, act=refuse)}, clock
    )
    for outcome in outcomes:
        assert outcome.chosen == "closed_form"
        assert outcome.candidates["lame"]["reason"] == "RuntimeError: no compiler here."


def test_where_the_base_cannot_another_computes_and_where_none_can_nobody_is_chosen(clock):
    def refuse():
        raise RuntimeError("no.")

    lame = Candidate(clock, 1.0, act=refuse)
    assert [
        o.chosen for o in run({"closed_form": lame, "slow": Candidate(clock, 99.0)}, clock)
    ] == ["slow"] * len(LAYERS)
    assert [o.chosen for o in run({"closed_form": lame}, clock, retry=True)] == [None] * len(LAYERS)
    assert noted().chosen == {}


def test_trying_is_on_the_disk_before_a_candidate_runs_and_the_base_needs_no_mark(clock):
    seen = []

    def look():
        seen.append(noted().layers.get(LAYER, {}))

    candidates = {
        "closed_form": Candidate(clock, 10.0, act=look),
        "swift": Candidate(clock, 1.0, act=look),
    }
    run(candidates, clock, layers={LAYER: torch.float32})
    assert "closed_form" not in seen[0]
    assert seen[1]["swift"]["state"] == TRYING
    assert not any(entry["state"] == TRYING for late in seen[2:] for entry in late.values())


def test_ctrl_c_leaves_no_mark(clock):
    def stop():
        raise KeyboardInterrupt

    stopped = Candidate(clock, 1.0, act=stop)
    with pytest.raises(KeyboardInterrupt):
        run({"closed_form": Candidate(clock, 10.0), "swift": stopped}, clock)
    outcomes = run({"closed_form": Candidate(clock, 10.0), "swift": Candidate(clock, 1.0)}, clock)
    assert {o.chosen for o in outcomes} == {"swift"}


def test_a_layer_that_was_left_half_way_is_measured_whole(clock):
    def refuse():
        raise RuntimeError("no.")

    def stop():
        raise KeyboardInterrupt

    lame = Candidate(clock, 1.0, act=refuse)
    with pytest.raises(KeyboardInterrupt):
        run({"closed_form": lame, "swift": Candidate(clock, 1.0, act=stop)}, clock)
    outcomes = run({"closed_form": lame, "swift": Candidate(clock, 1.0)}, clock)
    assert {(o.chosen, o.remembered) for o in outcomes} == {("swift", False)}


def test_a_fault_of_the_gpu_bars_the_candidate_and_ends_in_one_line(clock, caplog):
    def fault():
        clock.broken = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    faulty = Candidate(clock, 1.0, act=fault)
    with pytest.raises(VerificationError, match="swift broke the GPU") as raised:
        run({"closed_form": Candidate(clock, 10.0), "swift": faulty}, clock)
    assert "\n" not in str(raised.value)
    clock = StandInClock()  # the next process
    swift = Candidate(clock, 1.0)
    candidates = {"closed_form": Candidate(clock, 10.0), "swift": swift}
    assert {o.chosen for o in run(candidates, clock)} == {"closed_form"}
    assert swift.calls == 0
    assert [r.message.split(":")[0] for r in caplog.records] == ["swift is not tried"]
    assert {o.chosen for o in run(candidates, clock, retry=True)} == {"swift"}


def test_a_fault_that_shows_only_when_the_device_is_waited_for_is_seen_too(clock):
    faulty = Candidate(clock, 1.0, act=lambda: setattr(clock, "broken", True))
    with pytest.raises(VerificationError, match="illegal memory access"):
        run({"closed_form": Candidate(clock, 10.0), "swift": faulty}, clock)
    assert set(noted().disabled) == {"swift"}


def test_a_damaged_file_is_ignored_with_one_line_and_written_anew(clock, caplog):
    candidates = {"closed_form": Candidate(clock, 10.0), "swift": Candidate(clock, 1.0)}
    run(candidates, clock)
    file = file_of(stand_ins.ENVIRONMENT)
    whole = json.loads(file.read_text())
    file.write_text(file.read_text()[:-40])
    assert not any(o.remembered for o in run(candidates, clock))
    assert len(caplog.records) == 1
    assert json.loads(file.read_text()) == whole


def test_what_was_chosen_in_another_environment_does_not_count(clock):
    candidates = {"closed_form": Candidate(clock, 10.0), "swift": Candidate(clock, 1.0)}
    run(candidates, clock)
    other = stand_ins.Store({**stand_ins.ENVIRONMENT, "driver": "newer"})
    outcomes = decide(LAYERS, candidates, other, clock, progress=False)
    assert not any(outcome.remembered for outcome in outcomes)
    assert noted().chosen  # and stays where it was


def test_where_nothing_can_be_written_one_line_is_said_and_the_choice_holds(
    clock, caplog, monkeypatch, tmp_path
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EMA_TIMM_CACHE", str(tmp_path / "file"))  # root may write anywhere else
    candidates = {"closed_form": Candidate(clock, 10.0), "swift": Candidate(clock, 1.0)}
    assert {o.chosen for o in run(candidates, clock)} == {"swift"}
    (record,) = caplog.records
    assert "cannot be written" in record.message and "EMA_TIMM_CACHE" in record.message


def test_notes_that_can_be_read_alone_are_read(clock, caplog, monkeypatch):
    candidates = {"closed_form": Candidate(clock, 10.0), "swift": Candidate(clock, 1.0)}
    run(candidates, clock)
    lock = file_of(stand_ins.ENVIRONMENT).with_suffix(".lock")
    lock.mkdir()  # what a read-only folder says, for root too
    assert all(o.remembered for o in run(candidates, clock))
    assert len(caplog.records) == 1


def test_a_lock_of_another_machine_is_taken_over_with_one_line(clock, caplog):
    lock = file_of(stand_ins.ENVIRONMENT).with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    lock.write_text("elsewhere 12\n")
    candidates = {"closed_form": Candidate(clock, 10.0), "swift": Candidate(clock, 1.0)}
    assert {o.chosen for o in run(candidates, clock)} == {"swift"}
    (record,) = caplog.records
    assert record.message.startswith("process 12 on elsewhere may be choosing")
    assert not lock.exists()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((3, 8, 6, 5), 2), ((1, 8, 1, 1), 2), ((2, 6, 1, 4), 6), ((4, 4, 2, 1), 1)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_closed_form_passes_parity_and_a_wrong_gradient_does_not(
    shape, groups, dtype, layout, training
):
    batch, channels, height, width = shape
    layer = Layer(batch, channels, groups, height, width, dtype, layout, training)
    case = make_case(layer, torch.float32, torch.device("cpu"))
    assert layout_of(case.x) == layout or 1 in shape[1:]

    def closed_form(x, weights, groups):
        return ema_attention(x, weights, groups, impl="closed_form")

    limit = PARITY_TOLERANCE[case.x.dtype]
    assert error_of(closed_form, case) <= limit

    def scaled(x, weights, groups):
        out = closed_form(x, weights, groups)
        return out + 0.1 * (out - out.detach())  # the output is right

    if training:
        assert error_of(scaled, case) > limit


def test_only_the_ends_of_the_batch_are_compared_and_all_of_it_must_be_finite():
    case = make_case(LAYER, torch.float32, torch.device("cpu"))

    def spoil(value):
        mask = torch.zeros(3, 1, 1, 1)
        mask[1] = 1

        def run(x, weights, groups):
            return ema_attention(x, weights, groups) + mask * value

        return error_of(run, case)

    assert spoil(0.0) < 1e-5
    assert spoil(float("nan")) == float("inf")
