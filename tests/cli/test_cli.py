"""The command line as a person meets it."""

import argparse
from dataclasses import fields

import pytest

from ema_timm.cli import build_parser, main
from ema_timm.options import pair
from ema_timm.training.settings import FinetuneConfig

COMMANDS = (
    *(
        "finetune",
        "compare",
        "quickstart",
        "recipes",
        "evaluate",
        "convert",
        "card",
        "publish",
        "export",
    ),
    *("attend", "predict", "yolo", "bench", "tune", "env"),
)


@pytest.mark.parametrize("args", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_does_not_import_torch(python, args):
    code = (
        "import sys; from ema_timm.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "assert not {'torch', 'timm'} & set(sys.modules)"
    )
    assert "usage: ema-timm" in python(code, args=args)


def test_every_setting_is_an_option_with_help_and_default(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(FinetuneConfig):
        assert "--" + field.name.replace("_", "-") in text
        assert field.metadata["help"] in text
    assert f"(default: {FinetuneConfig.lr})" in text
    assert "--resume" in text


def subcommands(parser, name=""):
    """Each command by its name, with those inside of it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, command in action.choices.items():
                yield f"{name} {word}".strip(), command
                yield from subcommands(command, f"{name} {word}".strip())


OTHER_NAMES = {"--size": "--img-size", "--imgsz": "--img-size", "--batch": "--batch-size"}


@pytest.mark.parametrize(
    "command",
    [pytest.param(command, id=name) for name, command in subcommands(build_parser())],
)
def test_options_have_help_and_the_same_names_in_every_command(command):
    for action in command._actions:
        assert action.help or isinstance(action, argparse._SubParsersAction), action
        assert not OTHER_NAMES.keys() & set(action.option_strings), OTHER_NAMES


def test_each_command_has_one_line_in_the_list():
    (commands,) = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    assert {*COMMANDS} == {*commands.choices}
    for line in commands._choices_actions:
        assert len(line.help) <= 64, line.help  # what is left of 80 columns
        assert line.help[0].islower() and not line.help.endswith("."), line.help


def test_version(capsys):
    import ema_timm

    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"ema-timm {ema_timm.__version__}\n"


def test_unknown_command_and_option_exit_with_2(capsys):
    for args in (["train"], ["finetune", "--learning-rate", "1"], ["finetune", "--epochs", "x"]):
        with pytest.raises(SystemExit) as exit:
            main(args)
        assert exit.value.code == 2
    assert "invalid" in capsys.readouterr().err


def test_an_error_from_a_loader_process_is_its_message_alone(monkeypatch, capsys):
    from torch._utils import ExceptionWrapper

    from ema_timm.errors import UnreadableImageError
    from ema_timm.training import run as finetune

    def broken(*args, **kwargs):
        try:
            raise UnreadableImageError("cannot read a.png: cut short. Repair or remove it.")
        except UnreadableImageError:
            wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
        wrapped.reraise()

    monkeypatch.setattr(finetune, "finetune", broken)
    assert main(["finetune", "--model", "x", "--data-dir", "x", "--output", "x"]) == 2
    said = capsys.readouterr().err
    assert said == "ema-timm: cannot read a.png: cut short. Repair or remove it.\n"


def options_of_several_values():
    for name, command in subcommands(build_parser()):
        for action in command._actions:
            commas = "separated by commas" in str(action.help)
            if action.option_strings and (action.nargs == "+" or commas):
                yield pytest.param(action, id=f"{name} {action.option_strings[-1]}")


@pytest.mark.parametrize("action", list(options_of_several_values()))
def test_a_repeated_option_loses_no_values(action, capsys):
    first, second = action.choices or (("a=1", "b=2") if action.type is pair else ("1", "2"))
    parser = argparse.ArgumentParser()
    parser._add_action(action)
    flag = action.option_strings[-1]
    try:
        found = getattr(parser.parse_args([flag, first, flag, second]), action.dest)
    except SystemExit:
        assert f"argument {flag}: is given twice" in capsys.readouterr().err
        return
    assert found == parser.parse_args([flag, first, second]).__dict__[action.dest]
    assert len(found) == 2


@pytest.mark.parametrize("line", [("a=1", "a=2"), ("a=1", "--rename", "a=2")])
def test_a_key_that_is_given_twice_is_an_error(line, capsys):
    with pytest.raises(SystemExit):
        main(["convert", "x.pth", "--output", "y", "--rename", *line])
    assert "argument --rename: 'a' is given twice" in capsys.readouterr().err


def test_a_name_that_the_terminal_lacks_ends_no_command(python):
    code = (
        "from ema_timm.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit: print('caf\\u00e9 \\udce9')"
    )
    said = python(code, env={"PYTHONIOENCODING": "ascii:strict"})
    assert said.splitlines()[1] == r"caf\xe9 \udce9"


def test_an_error_of_several_lines_is_printed_whole_in_one(monkeypatch, capsys):
    from ema_timm.errors import UserError
    from ema_timm.training import run as finetune

    def broken(*args, **kwargs):
        raise UserError("the class 'a\n  b' is wrong.\nCorrect it.")

    monkeypatch.setattr(finetune, "finetune", broken)
    assert main(["finetune", "--model", "x", "--data-dir", "x", "--output", "x"]) == 2
    assert capsys.readouterr().err == "ema-timm: the class 'a b' is wrong. Correct it.\n"


def test_errors_of_other_libraries_keep_all_their_lines():
    from ema_timm.errors import LONGEST_REASON, sentence

    error = RuntimeError('Error(s) in loading state_dict for ResNet:\n\tMissing key(s): "fc".\n')
    assert sentence(error) == 'Error(s) in loading state_dict for ResNet: Missing key(s): "fc".'
    assert len(sentence(RuntimeError("word\n" * 9999))) <= LONGEST_REASON + 1
    assert sentence(KeyError("os.system")) == "KeyError: 'os.system'."
    assert sentence(AssertionError()) == "AssertionError."


@pytest.mark.parametrize(
    "command", [["finetune", "--model", "test_resnet"], ["evaluate", "FOLDER"]], ids=lambda c: c[0]
)
def test_a_data_set_without_a_folder_is_an_error_with_the_reason(
    command, trained, tmp_path, capsys
):
    args = [str(trained) if word == "FOLDER" else word for word in command]
    output = ["--output", str(tmp_path / "run")] if args[0] == "finetune" else []
    assert main([*args, *output, "--dataset", "hfds/ada/flowers"]) == 2
    assert (
        "--dataset hfds/ada/flowers needs --data-dir, the folder that holds the data set, or in "
        "which Hugging Face keeps its downloads."
    ) in capsys.readouterr().err
