"""config_files.py, config_recipes.py: settings from files and by the name of a recipe, and back from --print-config."""

import json
import os

import pytest

import train
from common import UserError
from config import SETTINGS, default_config, explain, finalize_config
from config_files import settings_words
from config_recipes import RECIPES, listing, read_recipes

pytestmark = pytest.mark.quick


def settings_of(*words, **options):
    return finalize_config(default_config().update_args(settings_words(words, **options)))


def written(tmp_path, text, name="mine.txt"):
    path = tmp_path / name
    path.write_text(text, "utf-8")
    return f"@{path}"


# --------------------------------------------------------------------------------------------------------------- lines
def test_a_file_has_a_setting_on_each_line_with_comments_and_quotes(tmp_path):
    text = (
        "\ufeff# my settings\r\n\r\n  MODE_FPN = True   # FPN\nDATA.BASEDIR=/data/my # 1 photos\n"
        "DATA.TRAIN=['a b', \"c # d\"]  # two\n\"DATA.VAL=['x']\"\nBACKBONE.NORM=None\n#TRAIN.BASE_LR=9\n"
        "BACKBONE.WEIGHTS=/it's/R#50.npz\nTRAIN.FREEZE_PATTERN='a # b'"
    )
    cfg = settings_of(written(tmp_path, text))
    assert cfg.MODE_FPN is True and cfg.BACKBONE.NORM is None and cfg.TRAIN.BASE_LR == 0.01
    assert (cfg.DATA.BASEDIR, cfg.DATA.TRAIN, cfg.DATA.VAL) == ("/data/my", ["a b", "c # d"], ["x"])
    assert (cfg.BACKBONE.WEIGHTS, cfg.TRAIN.FREEZE_PATTERN) == ("/it's/R#50.npz", "a # b")


def test_files_and_words_are_mixed_and_later_ones_win(tmp_path):
    first = written(tmp_path, "TRAIN.BASE_LR=0.1\nTRAIN.MOMENTUM=0.5\nTRAIN.SEED=1", "first")
    second = written(tmp_path, "TRAIN.MOMENTUM=0.6", "second")

    def values(*words):
        train_settings = settings_of(*words).TRAIN
        return train_settings.BASE_LR, train_settings.MOMENTUM, train_settings.SEED

    assert values(first, "TRAIN.SEED=2", second) == (0.1, 0.6, 2)
    assert values(second, "TRAIN.SEED=2", first) == (0.1, 0.5, 1)
    assert values("TRAIN.BASE_LR=0.3", second, "TRAIN.MOMENTUM=0.7") == (0.3, 0.7, 42)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n\nMODE_FNP=True", "line 3: unknown setting MODE_FNP; did you mean MODE_FPN?"),
        ("MODE_FPN=perhaps", "line 1: MODE_FPN='perhaps' must be True or False"),
        ("MODE_FPN=True\nMODE_MASK", "line 2: 'MODE_MASK' is not of the form KEY=VAL"),
        ("DATA.BASEDIR=/data MODE_FPN=True", "line 1: .* must be one setting; give each its own line"),
        ("@other", "line 1: '@other' is not of the form KEY=VAL"),
        ("{}", "it has no settings"),
        ('{"settings": {"MODE_FNP": true}}', "unknown setting MODE_FNP"),
        ('{"settings": 3}', "an object of settings"),
        ("{", "mine.txt"),
    ],
)
def test_a_wrong_line_is_named_with_its_file(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as e:
        settings_words([written(tmp_path, text)])
    assert "mine.txt" in str(e.value) and "\n" not in str(e.value)


def test_what_is_no_file_of_settings_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "large", "wb") as f:
        f.truncate(9 << 20)
    for name, message in {
        "binary": "not a text",
        "pipe": "no regular file",
        "large": "9 MB",
        "none": "no such",
    }.items():
        with pytest.raises(UserError, match=message):
            settings_words([f"@{tmp_path / name}"])
    with pytest.raises(UserError, match="no such file"):  # a folder without a run
        settings_words([f"@{tmp_path}"])
    with pytest.raises(UserError, match="no such file"):
        settings_words(["@"])


# --------------------------------------------------------------------------------------------------------------- runs
def stored_run(tmp_path, **settings):
    flat = {**default_config().to_dict(), **{key.replace("__", "."): value for key, value in settings.items()}}
    (tmp_path / "settings.json").write_text(json.dumps({"settings": flat, "step": 3}))
    return flat


def test_a_runs_settings_are_taken_from_its_folder_or_its_file(tmp_path):
    stored_run(tmp_path, MODE_FPN=True, TRAIN__GRADIENT_CLIP=2.5, DATA__TRAIN=["it's", "b"])
    for word in (f"@{tmp_path}", f"@{tmp_path}/settings.json"):
        cfg = settings_of(word, "TRAIN.SEED=7")
        assert (cfg.MODE_FPN, cfg.TRAIN.GRADIENT_CLIP, cfg.DATA.TRAIN, cfg.TRAIN.SEED) == (True, 2.5, ["it's", "b"], 7)


def test_names_of_earlier_versions_are_understood(tmp_path):
    (tmp_path / "settings.json").write_text('{"settings": {"TRAIN.STEPS_PER_EPOCH": 500, "TRAIN.EVAL_PERIOD": 50}}')
    cfg = settings_of(f"@{tmp_path}")
    assert (cfg.TRAIN.PERIOD_STEPS, cfg.TRAIN.EVAL_PERIOD) == (500, 50)


@pytest.mark.parametrize("form", ["json", "lines"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("BACKBONE.NAME", "evil:net"),
        ("FPN.FRCNN_HEAD_FUNC", "evil.part:head"),
        ("FPN.MRCNN_HEAD_FUNC", "evil:head"),
        ("DATA.DATASETS", {"a": ["evil:load", "x"]}),
    ],
)
def test_a_file_cannot_make_the_program_import_code(tmp_path, form, key, value):
    module = (value if isinstance(value, str) else value["a"][0]).partition(":")[0]
    if form == "json":
        stored_run(tmp_path, **{key.replace(".", "__"): value})
        word = f"@{tmp_path}"
    else:
        word = written(tmp_path, f"MODE_FPN=True\n{key}={value!r}")
    with pytest.raises(UserError, match=f"asks for code of the module {module} .*--trust-code {module}"):
        settings_words([word])
    with pytest.raises(UserError, match="asks for code"):
        settings_words([f"{key}={value!r}", word])  # the file wins, so it must be trusted
    assert f"{key}={value!r}" in settings_words([word], trusted=[module])
    # Given on the command line as well, it is not the file's.
    assert settings_words([word, f"{key}={value!r}"])[-1] == f"{key}={value!r}"


# ---------------------------------------------------------------------------------------------------- --print-config
AWKWARD = {
    "DATA.BASEDIR": "/my data/# 1 'a' \"b\" \\ \n new", "DATA.TRAIN": ["it's", 'a "b"', "None", "3"], "DATA.VAL": [],
    "DATA.CLASS_NAMES": ["a=b", "# c", "é", "\udcff"], "DATA.NUM_CATEGORY": 4, "BACKBONE.WEIGHTS": "None",
    "DATA.DATASETS": {"it's": ["a.json", "b"], "x y": ["voc", "/d", "train"]}, "TRAIN.FREEZE_PATTERN": r"^conv\d/'#' x",
    "TRAIN.BASE_LR": 1 / 3, "TRAIN.EPOCHS": 0.1, "TRAIN.SEED": None, "RPN.CELL_ANCHORS": [[[-1.5, -2.0, 3.0, 4e-5]]],
}  # fmt: skip


@pytest.mark.parametrize("key", [None, *SETTINGS])
def test_what_print_config_writes_can_be_read_again(tmp_path, key):
    """For the defaults, an unusual value of each setting alone, and all of them together."""
    cfg = default_config()
    for name, value in AWKWARD.items():
        if key in (None, name):
            cfg.set(name, value)
    path = tmp_path / "settings.txt"
    path.write_bytes(explain(cfg).encode("utf-8", "surrogatepass"))
    again = default_config().update_args(settings_words([f"@{path}"]))
    assert again.to_dict() == cfg.to_dict()


def test_the_whole_way_from_the_command_line_and_back(tmp_path, capsys):
    words = ["TRAIN.BASE_LR=0.02", "DATA.VAL=['a','b']", "TRAIN.LR_SCHEDULE=[10,20]", "TRAIN.STEPS_PER_EPOCH=7"]
    assert train.main(["--print-config", "--recipe", "r50-fpn-cascade", "--config", *words]) == 0
    printed = capsys.readouterr().out
    assert train.main(["--print-config", "--config", written(tmp_path, printed)]) == 0
    assert capsys.readouterr().out == printed
    assert {"FPN.CASCADE=True", "TRAIN.BASE_LR=0.02", "TRAIN.PERIOD_STEPS=7"} <= set(printed.splitlines())


# -------------------------------------------------------------------------------------------------------------- recipes
def every_recipe():
    return [recipe for section in read_recipes(RECIPES.read_text()) for recipe in section.recipes]


def test_a_recipe_is_its_settings_with_a_schedule_that_gives_way_to_small_data():
    for recipe in every_recipe():
        cfg = settings_of(recipe=recipe.name)
        plain = finalize_config(default_config().update_args(recipe.settings))
        differing = {k for k, v in cfg.to_dict().items() if plain.get(k) != v}
        assert differing <= {"TRAIN.LR_SCHEDULE"}
        schedule = [s.partition("=")[2] for s in recipe.settings if s.startswith("TRAIN.LR_SCHEDULE")]
        assert (f"auto:{schedule[0]}" if schedule else "auto") == cfg.TRAIN.LR_SCHEDULE
    assert settings_of("TRAIN.LR_SCHEDULE=1x", recipe="r50-fpn-gn-cascade").TRAIN.LR_SCHEDULE[-1] == 180000


@pytest.mark.parametrize(
    ("name", "near"), [("r50fpn", "r50-fpn"), ("R50-FPN-GN", "r50-fpn-gn"), ("x", "--recipe list")]
)
def test_an_unknown_recipe_is_refused_with_the_nearest(name, near, capsys):
    assert train.main(["--recipe", name]) == 2
    error = capsys.readouterr().err
    assert f"--recipe {name}" in error and near in error


def test_the_list_has_every_recipe_with_its_scores_and_settings(capsys):
    assert train.main(["--recipe", "list"]) == 0
    table = capsys.readouterr().out
    assert table == listing() + "\n"
    for recipe in every_recipe():
        (line,) = (line for line in table.splitlines() if line.split()[:1] == [recipe.name])
        assert recipe.score in line and recipe.parameters in line and recipe.settings[0] in line
    words = set(table.split())
    assert all(setting in words for recipe in every_recipe() for setting in recipe.settings)


def test_a_recipe_is_refused_where_a_run_has_its_settings(capsys):
    with pytest.raises(SystemExit) as e:
        train.main(["--resume", "--logdir", "x", "--recipe", "r50-fpn"])
    assert e.value.code == 2 and "--resume continues a run with its own settings" in capsys.readouterr().err
