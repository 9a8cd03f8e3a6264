"""The weights are found in whatever mapping and behind whatever prefix a file has them."""

import pytest
import timm
import torch

from ema_timm.checkpoints.network import rebuild
from ema_timm.checkpoints.read import Checkpoint, read_checkpoint
from ema_timm.checkpoints.state import find_prefix, find_state
from ema_timm.checkpoints.write import write_converted
from ema_timm.cli import main
from ema_timm.errors import UserError
from ema_timm.training.initial_weights import InitialModel
from ema_timm.training.network import create_model

NAME = "test_resnet_ema"


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=4).state_dict()


@pytest.fixture
def save(tmp_path):
    def saved(content):
        torch.save(content, tmp_path / "w.ckpt")
        return tmp_path / "w.ckpt"

    return saved


def behind(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def without_counters(state):
    return {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}


OPTIMIZER = {
    "state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(3, 3)}},
    "param_groups": [],
}
FORMS = {
    "Lightning": (
        lambda s: {
            "state_dict": {**behind("net.", s), "loss.weight": torch.ones(4)},
            "pytorch-lightning_version": "2.5.0",
            "optimizer_states": [OPTIMIZER],
            "hyper_parameters": {"lr": 0.1},
            "epoch": 3,
        },
        ["removed net. from the beginning of its names", "did not use loss.weight"],
    ),
    "two wrappers": (
        lambda s: behind("model.backbone.", s),
        ["removed model.backbone. from the beginning of its names"],
    ),
    "compiled inside": (
        lambda s: behind("net._orig_mod.", s),
        ["removed net._orig_mod. from the beginning of its names"],
    ),
    "the head outside": (
        lambda s: {n if n.startswith("fc.") else f"backbone.{n}": t for n, t in s.items()},
        ["removed backbone. from the beginning of its names"],
    ),
    "model_state_dict": (
        lambda s: {"epoch": 3, "model_state_dict": s, "optimizer_state_dict": OPTIMIZER},
        ["took the weights in model_state_dict"],
    ),
    "net": (lambda s: {"net": s, "acc": 91.0}, ["took the weights in net"]),
    "metrics beside": (
        lambda s: {"net": s, "metrics": {"acc": torch.ones(())}},
        ["took the weights in net"],
    ),
    "a configuration as model": (
        lambda s: {"model": {"depth": 3}, "weights": s},
        ["took the weights in weights"],
    ),
    "no counters": (
        without_counters,
        ["it has no num_batches_tracked; they count batches and change no output"],
    ),
    "torch's average": (
        lambda s: {"n_averaged": torch.tensor(3), **behind("module.", s)},
        [],
    ),
    "plain": (lambda s: s, []),
}  # fmt: skip


def same(network, state):
    mine = network.state_dict()
    wrong = [n for n, t in without_counters(state).items() if not torch.equal(mine[n], t)]
    assert not wrong and mine.keys() == state.keys()


@pytest.mark.parametrize("form", FORMS)
def test_evaluate_convert_and_finetune_read_every_form(form, state, save, tmp_path, capsys):
    make, notes = FORMS[form]
    file = save(make(state))
    said = [f"{file}: {note}" for note in notes]

    rebuilt = rebuild(read_checkpoint(file), NAME)
    same(rebuilt.network, state)
    assert list(rebuilt.notes) == said

    done, found = write_converted(file, tmp_path / "out", NAME)
    same(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True), state)
    assert list(found) == [note for note in said if "did not use" not in note]
    assert done.unused == (("loss.weight",) if form == "Lightning" else ())

    started, _ = create_model(InitialModel(NAME, {}, weights=str(file)), 4)
    head = {"fc.weight", "fc.bias"}  # of 1000 classes in timm's configuration of the name
    mine = started.state_dict()
    for name, tensor in without_counters(state).items():
        assert name in head or torch.equal(mine[name], tensor), name
    assert capsys.readouterr().err.splitlines()[-len(said) :] == said or not said
    assert "state_dict" not in started.pretrained_cfg


AMBIGUOUS = {
    "two networks": (
        lambda s: {"student": s, "teacher": s},
        r"2 state dicts: student, teacher\. Save",
    ),
    "two prefixes": (
        lambda s: behind("student.", s) | behind("teacher.", s),
        r"several times: its names follow student\. and teacher\.\. Save",
    ),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_two_networks_are_not_guessed_between(case, state, save, tmp_path):
    make, said = AMBIGUOUS[case]
    file = save(make(state))
    for use in (
        lambda: rebuild(read_checkpoint(file), NAME),
        lambda: write_converted(file, tmp_path / "out", NAME),
        lambda: create_model(InitialModel(NAME, {}, weights=str(file)), 4),
    ):
        with pytest.raises(UserError, match=said):
            use()


def test_a_prefix_is_removed_only_if_the_network_is_behind_it(state):
    assert find_prefix(state, state) == ""
    assert find_prefix(behind("net.", state), state) == "net."
    assert find_prefix({f"net.{name}.x": t for name, t in state.items()}, state) == ""
    some = dict(list(behind("encoder.", state).items())[:20])  # of another network, by chance
    assert find_prefix(some, state) == ""


def test_the_averaged_weights_of_timm_are_the_default(state, save):
    zeros = {name: torch.zeros_like(t) for name, t in state.items()}
    file = save({"state_dict": state, "state_dict_ema": zeros})
    for averaged, kind, option in (
        (None, "averaged weights (state_dict_ema)", "trained ones (state_dict) with --no-use"),
        (True, "averaged weights (state_dict_ema)", "trained ones (state_dict) with --no-use"),
        (False, "trained weights (state_dict)", "averaged ones (state_dict_ema) with --use"),
    ):
        read = read_checkpoint(file, averaged)
        assert read.averaged is (averaged is not False)
        assert any(t.any() for t in read.state.values()) is (averaged is False)
        assert kind in read.notes[0] and option in read.notes[0]
    model = timm.models.load_state_dict(str(file))
    assert not any(t.any() for t in model.values())  # what timm itself takes


def test_averaged_weights_of_other_code_are_taken_only_if_asked_for(state):
    ones = {name: torch.ones_like(t) for name, t in state.items()}
    found = find_state({"net": state, "net_ema": ones})
    assert (found.key, found.averaged, found.other) == ("net", False, "net_ema")
    assert find_state({"net": state, "net_ema": ones}, averaged=True).key == "net_ema"
    with pytest.raises(UserError, match=r"only averaged weights \(ema\)\. Leave out --no-use"):
        find_state({"ema": ones}, averaged=False)
    assert find_state({"net": state, "schema": ones["fc.weight"]}).key == "net"


def test_names_to_rename_are_those_of_the_file_or_those_without_the_prefix(state, save, tmp_path):
    moved = {n.replace("layer4.0.se", "attention"): t for n, t in behind("net.", state).items()}
    file = save({"state_dict": moved})
    with pytest.raises(UserError, match="no place for the EMA layer attention"):
        write_converted(file, tmp_path / "out", NAME)
    for number, old in enumerate(("attention", "net.attention")):
        args = ["convert", file, "--model", NAME, "--output", tmp_path / f"{number}"]
        assert main([*map(str, args), "--rename", f"{old}=layer4.0.se"]) == 0


def test_weights_without_a_classifier_are_named(state, save):
    file = save({n: t for n, t in behind("net.", state).items() if "fc." not in n})
    with pytest.raises(UserError, match=r"holds no classifier \(fc\.weight\).*names are bn1\.bias"):
        rebuild(read_checkpoint(file), NAME)


def test_a_note_names_the_file(tmp_path):
    checkpoint = Checkpoint(tmp_path / "w.pt", {}).noted("one", "two")
    assert checkpoint.notes == (f"{tmp_path / 'w.pt'}: one", f"{tmp_path / 'w.pt'}: two")
