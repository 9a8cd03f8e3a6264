"""Variants, settings and commands of a comparison."""

import dataclasses
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.networks import shake

from ema_timm.cli import build_parser
from ema_timm.compare.runs import is_trained, plan_runs
from ema_timm.compare.settings import ATTENTION, make_comparison
from ema_timm.compare.variants import describe_start, read_variants
from ema_timm.errors import UserError
from ema_timm.options import command_arguments, given_options
from ema_timm.training.initial_weights import InitialModel
from ema_timm.training.network import build_run_network
from ema_timm.training.settings import FinetuneConfig


@pytest.fixture
def given(tmp_path):
    return {"model": "resnet18", "data_dir": "flowers", "output": str(tmp_path / "compare")}


def test_the_package_exports_the_function_and_imports_torch_only_for_it(python):
    code = (
        "import sys; from ema_timm.compare import CompareConfig, Comparison, make_comparison\n"
        "assert CompareConfig().seeds == 5 and 'torch' not in sys.modules\n"
        "from ema_timm.compare import compare, comparison, list_commands\n"
        "assert compare is comparison.compare\n"
        "assert not hasattr(sys.modules['ema_timm.compare'], 'anything_else')"
    )
    python(code)


def test_variants_say_their_network():
    names = ["none", "se", "ema", "ema-no-cross-spatial", "ema@groups=8,stages=(3,4)",
             "se@rd_ratio=0.25"]  # fmt: skip
    variants = read_variants(names, "resnet18")
    assert [v.model for v in variants] == ["resnet18", *["resnet18_ema"] * 5]
    assert [v.model_kwargs for v in variants] == [
        {},
        {"attn": "se"},
        {},
        {"ema_cross_spatial": False},
        {"ema_groups": 8, "ema_stages": (3, 4)},
        {"attn": "se", "attn_kwargs": {"rd_ratio": 0.25}},
    ]
    assert [v.folder for v in variants][4:] == ["ema_groups_8_stages_3_4_", "se_rd_ratio_0.25"]


def test_a_tag_names_the_same_weights():
    (ema,) = read_variants(["ema"], "resnet18.a1_in1k")
    assert ema.model == "resnet18_ema.warm_a1_in1k"
    (untrained,) = read_variants(["ema"], "cifar_resnet18.untrained")
    assert untrained.model == "cifar_resnet18_ema.untrained"


@pytest.mark.parametrize(
    "names, model, said",
    [
        (["sea"], "resnet18", "--attention sea: there is no layer 'sea'"),
        (["ema", "ema@"], "resnet18", "--attention ema and ema@ are the same network"),
        (["se@rd_ratio=0.5", "se@rd_ratio=.5"], "resnet18", "are the same network"),
        (["none@groups=8"], "resnet18", "has no arguments"),
        (["ema@factor=8"], "resnet18", "groups, stages, cross_spatial, got factor"),
        (["ema@8"], "resnet18", "not KEY=VALUE"),
        (["ema", "ema"], "resnet18", "once"),
        (["cbam"], "seresnet50", "can be compared with none, ema"),
        (["ema"], "resnet18_ema", "--model resnet18$"),
        (["ema"], "resnet18_ema.warm_a1_in1k", "--model resnet18.a1_in1k$"),
        (["ema"], "ema_any", "must be a plain network"),
        (["ema"], "resnet81", "plain network"),
        (["ema"], "local-dir:run", "--weights FILE"),
    ],
)
def test_what_is_no_variant_is_refused_before_anything_is_trained(names, model, said):
    with pytest.raises(UserError, match=said):
        read_variants(names, model)


def test_how_each_started():
    none, se, gc = read_variants(["none", "se", "gc"], "test_resnet")
    said = [describe_start(v, v.model_kwargs, "timm/test_resnet.r160_in1k") for v in (none, se, gc)]
    assert said == [
        "plain weights",
        "plain weights, layer with identity initialisation",
        "plain weights, layer with timm's initialisation",
    ]
    assert describe_start(se, se.model_kwargs, "random start") == "random start"


def test_with_weights_every_variant_starts_with_the_function_of_the_plain_network(tmp_path, given):
    plain = shake(timm.create_model("test_resnet")).eval()
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    names = [*ATTENTION, "ema-no-cross-spatial", "ema@groups=8"]
    settings = {"model": "test_resnet", "weights": str(tmp_path / "plain.safetensors")}
    comparison = make_comparison({**given, **settings}, names, 1)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = plain.forward_features(x)
        for run in plan_runs(comparison, read_variants(names, "test_resnet")):
            config = run.config
            initial = InitialModel(config.model, config.model_kwargs, weights=config.weights)
            network = build_run_network(initial, ["a", "b", "c", "d"], torch.device("cpu"))
            got = network.model.eval().forward_features(x)
            assert float((got - want).norm() / want.norm()) < 1e-5, run.name


def test_what_is_left_out_is_as_before_and_a_comparison_can_grow(given):
    comparison = make_comparison(
        {**given, "lr": 0.1, "model_kwargs": {"channels": (8, 16)}}, None, None
    )
    assert (comparison.attention, comparison.seeds) == (list(ATTENTION), 5)
    comparison.output.mkdir()
    comparison.save()
    again = make_comparison(
        {"output": given["output"], "model_kwargs": {"channels": (8, 16)}}, None, 7
    )
    assert again == dataclasses.replace(comparison, seeds=7)
    grown = make_comparison({"output": given["output"], "data_dir": "moved"}, ["none", "ema"], None)
    assert grown.attention == ["none", "ema"]
    assert grown.settings["data_dir"] == "moved"


def test_runs_of_other_settings_do_not_come_together(given):
    comparison = make_comparison({**given, "lr": 0.1}, None, None)
    comparison.output.mkdir()
    comparison.save()
    with pytest.raises(UserError, match=r"--lr is 0\.2, but the runs in .* have 0\.1"):
        make_comparison({"output": given["output"], "lr": 0.2}, None, None)
    with pytest.raises(UserError, match="--epochs is 3"):
        make_comparison({"output": given["output"], "epochs": 3}, None, None)
    with pytest.raises(UserError, match="--patience is 1"):
        make_comparison({"output": given["output"], "patience": 1}, None, None)


def test_missing_settings_are_named(given):
    with pytest.raises(UserError, match="--output"):
        make_comparison({}, None, None)
    with pytest.raises(UserError, match="--model"):
        make_comparison({"output": given["output"]}, None, None)
    with pytest.raises(UserError, match="--data-dir"):
        make_comparison({"output": given["output"], "model": "resnet18"}, None, None)


def test_every_variant_of_one_seed_comes_before_the_next_seed(given):
    comparison = make_comparison({**given, "seed": 7}, ["none", "ema@groups=8"], 2)
    runs = plan_runs(comparison, read_variants(comparison.attention, "resnet18"))
    assert [run.name for run in runs] == [
        "none, seed 7", "ema@groups=8, seed 7", "none, seed 8", "ema@groups=8, seed 8",
    ]  # fmt: skip
    assert len({run.folder for run in runs}) == 4


def test_a_run_is_trained_when_its_last_epoch_or_its_patience_is_over():
    results = {"history": [{"epoch": 3}], "arguments": {"epochs": 20}}
    assert not is_trained(results)
    assert is_trained({**results, "stopped_early": {"epoch": 3, "patience": 2}})
    assert is_trained({**results, "arguments": {"epochs": 3}})


def test_settings_are_written_as_they_are_read():
    """New settings of finetune come along: each is given a value that is not its default."""
    values = {}
    for field in dataclasses.fields(FinetuneConfig):
        default = getattr(FinetuneConfig(), field.name)
        if field.metadata.get("pairs"):
            values[field.name] = {"a": "text", "b": "1", "c": [1, {"d": None}], "e": -0.5, "f": ""}
        elif field.metadata.get("flag"):
            values[field.name] = not default
        elif field.metadata.get("several"):
            values[field.name] = list(field.metadata["choices"])
        elif field.metadata.get("choices"):
            values[field.name] = field.metadata["choices"][-1]
        elif field.metadata.get("numbers"):
            values[field.name] = [0.5, -0.25]
        elif isinstance(default, str):
            values[field.name] = "-x y'z"
        else:
            values[field.name] = default - 3
    args = build_parser().parse_args(["finetune", *command_arguments(values, FinetuneConfig)])
    assert given_options(args, FinetuneConfig) == values
    assert json.loads(json.dumps(values)) == values


def test_every_option_of_finetune_is_one_of_compare():
    values = command_arguments({"lr": 0.1, "amp": True, "model_kwargs": {"a": 1}}, FinetuneConfig)
    args = build_parser().parse_args(["compare", *values, "--attention", "none", "--seeds", "2"])
    assert given_options(args, FinetuneConfig) == {"lr": 0.1, "amp": True, "model_kwargs": {"a": 1}}


GOOD = {"attention": ["none"], "seeds": 1, "settings": {"model": "test_resnet", "data_dir": "s"}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is damaged"),
        ("[" * 200_000, "is damaged"),
        ("[]", "its content must be an object"),
        (json.dumps({**GOOD, "seeds": "x"}), "seeds must be a whole number, got 'x'"),
        (json.dumps({**GOOD, "attention": 3}), "attention must be a list, got 3"),
        (json.dumps({**GOOD, "settings": []}), "settings must be an object"),
        (json.dumps({**GOOD, "settings": {"blah": 1}}), "unknown setting blah"),
        (json.dumps({**GOOD, "settings": {"epochs": "x"}}), "epochs must be a whole number"),
    ],
    ids=lambda text: text[:40],
)
def test_a_damaged_plan_is_named(content, said, tmp_path):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        make_comparison({"output": str(tmp_path)})
    assert str(caught.value).startswith(str(tmp_path / "plan.json"))
