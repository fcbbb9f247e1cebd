"""command_line.py: hints for mistyped options, empty values, paths of the home folder, options without effect."""

import os

import pytest

import train
from command_line import parse_args

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--conifg MODE_FPN=True", "there is no option --conifg; did you mean --config?"),
        ("--evalute=o.json", "there is no option --evalute=o.json; did you mean --evaluate?"),
        ("--xyzzy", "there is no option --xyzzy\n"),
        ("MODE_FPN=True", "settings follow --config: --config MODE_FPN=True"),
        ("--logdir run TRAIN.BASE_LR=0.1", "settings follow --config: --config TRAIN.BASE_LR=0.1"),
        ("photo.jpg", "no option takes the value photo.jpg"),
        ("--resume", "--resume needs --logdir"),
        ("--trim-heads --match-classes --load x", "exclude each other"),
    ],
)
def test_a_mistyped_command_line_says_what_was_probably_meant(words, message, capsys):
    with pytest.raises(SystemExit) as e:
        parse_args(words.split())
    assert e.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--logdir", "--load", "--evaluate", "--output", "--predict", "--resume", "--report"]
)
@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_path_is_refused_by_the_name_of_its_option(option, value, capsys):
    with pytest.raises(SystemExit) as e:
        parse_args([option, value])
    assert e.value.code == 2 and f"argument {option}: a path must not be empty" in capsys.readouterr().err


def test_the_home_folder_is_found_in_every_path():
    home = os.path.expanduser("~")
    args = parse_args(["--predict", "~/a.jpg", "b.jpg", "--load", "~/run", "--output", "~/out"])
    assert args.predict == [f"{home}/a.jpg", "b.jpg"]
    assert (args.load, args.output) == (f"{home}/run", f"{home}/out")
    assert parse_args(["--logdir", "~/run"]).logdir == f"{home}/run"
    assert parse_args(["--evaluate", "~/o.json", "--load", "x", "--report", "~/r"]).evaluate == f"{home}/o.json"


def test_a_run_is_resumed_from_its_newest_checkpoint_a_step_or_a_path(tmp_path):
    asked = {
        "--resume --logdir run": ("run", True),
        "--logdir run --resume 500": ("run", "500"),
        "--resume runs/a/model-500": ("runs/a", "runs/a/model-500"),
        f"--resume {tmp_path}": (str(tmp_path), True),
    }
    for words, (logdir, resume) in asked.items():
        args = parse_args(words.split())
        assert (args.logdir, args.resume) == (logdir, resume), words


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        ("--predict /no.jpg --load x --logdir y", "without effect with --predict: --logdir"),
        ("--evaluate o.json --load /no --no-window", "without effect with --evaluate: --no-window"),
        (
            "--evaluate o.json --load /no --draw boxes --colors instance",
            "without effect with --evaluate: --draw, --colors",
        ),
        (
            "--resume --logdir /no --trim-heads --output o",
            "without effect when a run is resumed: --output, --trim-heads",
        ),
        ("--config MODE_FNP=1 --match-classes", "without effect when training starts like this: --match-classes"),
    ],
)
def test_options_without_effect_are_named(words, idle, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(words.split()) == 2
    assert idle in capsys.readouterr().err
