"""The documents: links lead somewhere, names exist, and every command line is one that its program accepts.

Commands stand in blocks that are indented by four spaces; other listings are fenced. A command that cannot run on a
fresh machine with two CPU cores says what it needs in its comment ("needs COCO and GPUs", "takes minutes").
"""

import argparse
import functools
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from mkdocs.utils.yaml import yaml_load

from common import UserError, project_version
from config import Config, default_config, finalize_config
from config_files import settings_words
from config_names import ALIASES, TENSORPACK
from tools.parity import TOLERANCES
from tools.recipes import END, START, page, read_recipes
from train import parse_args
from training_plan import COCO_SIZED, make_plan

ROOT = Path(__file__).resolve().parent.parent
FIDELITY = ROOT / "docs" / "FIDELITY.md"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "RESULTS.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# Names of files that a user has or a run writes, and that these documents call by name.
USERS_FILES = {"list_hosts.sh", "dataset_mine.py"}
# Commands of the system that documents may name.
SYSTEM = {".", "git", "sudo", "tensorboard", "pre-commit", "cd", "mkdir", "curl", "cp", "find", "ls", "sbatch"}


class Command(NamedTuple):
    document: str
    words: list[str]
    comment: str


def name(document: Path) -> str:
    return str(document.relative_to(ROOT))


@functools.cache
def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"(?ms)^```.*?^```$|^(?: {4}.*\n)+", "", text))


def commands() -> list[Command]:
    """The indented blocks of all documents with continued lines joined (lists indent by two spaces only), and commands
    within a line of text. "…" stands for what is left out; within a line such commands are not tested."""
    found = []
    for document in DOCUMENTS:
        text = re.sub(r"(?ms)^```.*?^```$", "", text_of(document))
        for block in re.findall(r"(?m)(?<=\n\n)(?: {4}.*\n)+|(?<=\n)(?: {4}.*\n)+", text):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.replace("…", ""), comments=True)
                comment = line.rpartition(" # ")[2] if " # " in line else ""
                if words:
                    found.append(Command(name(document), words, comment))
        for line in re.findall(r"`((?:\./train\.py|python|sbatch|make|(?:tools|scripts)/[\w./]+) [^`]+)`", text):
            if "…" not in line and document.name != "CHANGELOG.md":  # which names options
                found.append(Command(name(document), shlex.split(line), "needs what the text says"))
    return found


COMMANDS = commands()
TRAIN = [c for c in COMMANDS if any(w.endswith("train.py") for w in c.words)]


def arguments_of_train(command: Command) -> list[str]:
    start = next(i for i, w in enumerate(command.words) if w.endswith("train.py"))
    return command.words[start + 1 :]


# ---------------------------------------------------------------------------------------------------------------- links
def anchors(document: Path) -> set[str]:
    titles = re.findall(r"(?m)^#+ (.+)$", text_of(document))
    return {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}


@pytest.mark.quick
@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_and_pictures_lead_to_files_of_this_repository_or_to_the_web(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text_of(document))):
        if re.match(r"https?://[\w.-]+\.[a-z]+(/|$)", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        file = file / "README.md" if file.is_dir() else file
        assert file.is_file() and file.is_relative_to(ROOT), f"{name(document)}: {target}"
        assert not anchor or anchor in anchors(file), f"{name(document)}: {target}"


@pytest.mark.quick
def test_every_document_can_be_reached_from_the_readme_and_is_on_the_site():
    index = text_of(ROOT / "docs" / "README.md")
    site = (ROOT / "mkdocs.yml").read_text()
    assert "(docs/README.md)" in text_of(ROOT / "README.md")
    for document in (ROOT / "docs").glob("*.md"):
        if document.name != "README.md":
            assert f"({document.name})" in index, f"docs/README.md does not link {document.name}"
        assert f": {document.name}\n" in site, f"mkdocs.yml does not list {document.name}"


@pytest.mark.quick
@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_files_and_settings_that_a_document_names_exist(document):
    text = text_of(document)
    folders = r"(?:tests|tools|scripts|benchmarks|demo|docs|utils)/[\w./-]*\w"
    names = re.findall(rf"`(?:python )?({folders}|[\w-]+\.(?:py|md|toml|yml|sh))(?:[ :`])", text)
    assert not {n for n in names if not [*ROOT.glob(n), *ROOT.glob(f"*/{n}")]} - USERS_FILES
    known = {*dict(default_config().items()), *ALIASES, *TENSORPACK}
    groups = {k.split(".")[0] for k in known if "." in k}
    settings = {k for k in re.findall(r"\b([A-Z]+\.[A-Z_0-9]+)\b", text) if k.split(".")[0] in groups}
    assert not settings - known


@pytest.mark.quick
def test_the_readme_stays_short():
    lines = text_of(ROOT / "README.md").splitlines()
    assert len(lines) <= 200
    assert max(len(line) for line in lines if not line.startswith("|")) <= 120


# ------------------------------------------------------------------------------------------------------------- commands
@pytest.mark.quick
@pytest.mark.parametrize("command", TRAIN, ids=lambda c: f"{c.document}: {' '.join(c.words)[:60]}")
def test_a_command_of_train_py_is_accepted_with_its_settings(command):
    args = parse_args(arguments_of_train(command))
    listed = args.recipe == "list"
    words = settings_words(args.config, recipe=None if listed else args.recipe)
    cfg = finalize_config(default_config().update_args(words))
    trains = not (args.predict or args.evaluate or args.print_config or args.resume or listed)
    own = cfg.DATA.DATASETS or args.load
    if "horovodrun" in command.words or (trains and not own):
        assert "needs" in command.comment, "say that it needs COCO or GPUs"
    if trains and own:  # COCO's schedule on somebody's own photos would take weeks
        schedule = cfg.TRAIN.LR_SCHEDULE
        assert cfg.TRAIN.EPOCHS or schedule == "auto" or schedule[-1] <= 2000 and cfg.TRAIN.WARMUP < 1000


class Parsed(Exception):
    """The arguments of a program were accepted."""


def parse_only(path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the program `path` until it has parsed `words`; SystemExit if it does not accept them."""
    real = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        real(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_intermixed_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        module.main()
    except TypeError:  # a main that wants its arguments
        module.main(words)


@pytest.mark.quick
@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c not in TRAIN], ids=lambda c: f"{c.document}: {' '.join(c.words)[:60]}"
)
def test_every_other_command_is_one_that_its_program_accepts(command, monkeypatch):
    words = list(command.words)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # a variable of the environment
        words = words[1:]
    if "|" in words:
        words = words[: words.index("|")]
    if re.fullmatch(r"(\.venv/bin/)?python3?", words[0]):
        words = words[1:]
        if words[0] == "-m" and words[1] == "pytest":
            assert all((ROOT / w).exists() for w in words[2:] if w.startswith("tests/"))
            return
        if words[0] == "-m" and words[1].startswith(("tools.", "tests.")):
            words = [words[1].replace(".", "/") + ".py", *words[2:]]
    program = words[0].removeprefix("./")
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
        assert {w for w in words[1:] if "=" not in w} <= targets
    elif program.endswith(".py") and len(words) == 1 and "argparse" not in (ROOT / program).read_text():
        pass
    elif program.endswith(".py") and program.startswith(("tools/", "scripts/")):
        with pytest.raises(Parsed):
            parse_only(ROOT / program, words[1:], monkeypatch)
    elif program.endswith((".py", ".sh", ".sbatch")) or "/" in program:
        assert (ROOT / program).is_file()
        options = {w.partition("=")[0] for w in words[1:] if w.startswith("--")}
        code = (ROOT / program).read_text() + (ROOT / "scripts" / "launch_common.sh").read_text()
        assert all(option in code for option in options)
        if program.startswith("scripts/train_"):
            done = subprocess.run(["bash", program, *words[1:], "--dry-run"], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    else:
        assert program in SYSTEM, f"{command.document}: what is {program}?"


@pytest.mark.quick
def test_make_offers_the_targets_that_the_documents_name():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    named = {t for d in DOCUMENTS for t in re.findall(r"`make ([a-z][a-z-]*)\b", text_of(d))}
    assert {"demo", "test", "lint", "docs"} <= targets and not named - targets
    assert targets == set(re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split())


def tutorial_data(folder: Path) -> None:
    """photos/ with labels.json, as the README has it, of the two COCO photographs with fewest objects, four times."""
    source = ROOT / "tests" / "data" / "coco_mini"
    content = json.loads((source / "annotations" / "instances_val2017.json").read_text())
    (folder / "photos").mkdir()
    for image in content["images"]:
        shutil.copy(source / "val2017" / image["file_name"], folder / "photos")
    (folder / "photos" / "labels.json").write_text(json.dumps(content))


@pytest.mark.quick
def test_the_readmes_short_commands_run_as_printed(tmp_path):
    tutorial_data(tmp_path)
    programs = ("tools/split.py", "tools/check_data.py", "./train.py")
    readme = [c.words for c in COMMANDS if c.document == "README.md"]
    readme = [words[words[0] == "python" :] for words in readme]
    wanted = [w for w in readme if w[0] in programs and (w[0] != "./train.py" or "--print-config" in w)]
    assert {w[0] for w in wanted} == set(programs)
    output = ""
    for program, *words in wanted:
        words = [sys.executable, str(ROOT / program), *words]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout
        output += done.stdout
    assert (tmp_path / "photos" / "train.json").is_file() and list((tmp_path / "check").glob("*.html"))
    assert "MODE_FPN=False" in output and "MODE_FPN=True" in output


def own_photos_settings() -> Config:
    command = next(c for c in TRAIN if c.document == "README.md")
    return finalize_config(default_config().update_args(parse_args(arguments_of_train(command)).config))


@pytest.mark.quick
def test_the_readmes_schedule_for_your_own_photos_is_what_it_says():
    text = text_of(ROOT / "README.md")
    plan = make_plan(own_photos_settings(), 1, 60)
    assert plan.total_steps == 1500 and "1,500 steps of 2 images" in text
    assert plan.epochs(plan.total_steps) == 50 and "50 epochs" in text
    assert plan.warmup_steps < plan.milestones[0] / 2 and not plan.warnings(own_photos_settings())
    assert plan.evaluate_every == 100 and "every 100 steps" in text
    assert COCO_SIZED == 50000 and "50,000 photos or more" in text


# ------------------------------------------------------------------------------------------------------- generated text
@pytest.mark.quick
def test_the_tables_of_recipes_are_those_of_the_launchers():
    current = text_of(ROOT / "docs" / "RECIPES.md")
    assert page(current, (ROOT / "scripts" / "recipes.txt").read_text()) == current, "run python tools/recipes.py"


@pytest.mark.quick
def test_a_table_of_recipes_has_the_columns_that_its_recipes_fill():
    sections = read_recipes(
        "# x\n\n## A\n# Text.\n#: 1 / 2 | 3 | 4 | - | R50\na K=1 L=2\n\n## B\n#: - | 5 | 6 | - | -\nb\n"
    )
    first, second = sections
    assert (first.title, first.text) == ("A", ["Text."]) and first.recipes[0].settings == ["K=1", "L=2"]
    assert second.recipes == [("b", [], "", "5", "6", "", "")]
    written = page(
        f"x\n{START}old\n{END}y\n", "## A\n#: 1 / 2 | 3 | 4 | - | R50\na K=1\n\n## B\n#: - | 5 | 6 | - | -\nb\n"
    )
    assert "| `a` | `K=1` | 1&nbsp;/&nbsp;2 | 3 | 4 | [R50](http" in written and "| `b` | `` | 5 | 6 |" in written
    assert written.startswith("x\n") and written.endswith("y\n") and "old" not in written


@pytest.mark.quick
@pytest.mark.parametrize(
    "text", ["## A\na K=1\n", "## A\n#: 1 | 2\na K=1\n", "a\n", "## A\n#: 1|2|3|4|5\na\n#: 1|2|3|4|5\na\n"]
)
def test_a_recipe_without_its_facts_or_with_a_name_in_use_is_refused(text):
    with pytest.raises(UserError, match="recipes, line"):
        read_recipes(text)


@pytest.mark.quick
def test_every_difference_in_the_table_of_fidelity_is_within_the_tolerance_it_states():
    rows = re.findall(r"(?m)^\| ([^|]*\([^|]*|[^|]*: [^|]*|[a-zA-Z ]+) \| ([\d.e-]+) \| (.*) \|$", text_of(FIDELITY))
    assert len(rows) == len(TOLERANCES)
    for quantity, tolerance, cells in rows:
        assert float(tolerance) == TOLERANCES[quantity.strip()], quantity
        for cell in filter(None, map(str.strip, cells.split("|"))):
            error, own = re.fullmatch(r"([\d.e-]+)(?: \(of ([\d.e-]+)\))?", cell).groups()
            assert float(error) <= float(own or tolerance), f"{quantity}: {cell}"
            assert own is None or float(own) > float(tolerance)


# -------------------------------------------------------------------------------------------- site, release, automation
@pytest.mark.quick
def test_the_web_site_builds_without_a_warning_and_needs_no_other_server(tmp_path):
    """Links between the pages are checked by mkdocs, whose warnings are errors here."""
    site = tmp_path / "site"
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    pages = {page.stem for page in site.glob("*.html")} - {"404", "search"}
    assert pages == {"index", "READ_ME"} | {d.stem for d in DOCUMENTS} - {"README"}
    for stem in pages:
        html = (site / f"{stem}.html").read_text()
        assert not re.findall(r"""<(?:script|link|img)[^>]+(?:src|href)=["']?(?:https?:)?//""", html), stem
        paragraphs = re.findall(r"(?s)<p>(.*?)</p>", re.sub(r"(?s)<(pre|code).*?</\1>", "", html))
        broken = [p for p in paragraphs if re.search(r"\n *(- |\d+\. |\|)", p)]
        assert not broken, f"{stem}: a list or table needs an empty line before it: {broken[0]}"
        for picture in re.findall(r'<img[^>]+src="([^"]+)"', html):
            assert (site / picture).is_file(), f"{stem}: {picture}"


@pytest.mark.quick
def test_the_changelogs_newest_version_is_the_projects_version():
    versions = re.findall(r"(?m)^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", text_of(ROOT / "CHANGELOG.md"))
    assert versions[0] == project_version()
    assert text_of(ROOT / "CHANGELOG.md").index("## [Unreleased]") < text_of(ROOT / "CHANGELOG.md").index(versions[0])


@pytest.mark.quick
def test_continuous_integration_and_pre_commit_run_what_is_run_by_hand():
    github = yaml_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    gitlab = yaml_load((ROOT / ".gitlab-ci.yml").read_text())
    commands = [step.get("run") for step in github["jobs"]["test"]["steps"]]
    assert ".ci/run" in commands and ".ci/run" in gitlab["test"]["script"]
    tested = {"3.11", *github["jobs"]["pythons"]["strategy"]["matrix"]["python"]}
    assert tested == {"3.11", *gitlab["pythons"]["parallel"]["matrix"][0]["PYTHON"]} == {"3.10", "3.11", "3.12", "3.13"}
    (repository,) = yaml_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (hook,) = repository["hooks"]
    assert hook["entry"].split()[0] == "make" and hook["entry"].split()[-1] == "lint" and not hook["pass_filenames"]
