"""The installed package: what the wheel holds, and that it works outside of the checkout, alone in its name space."""

import ast
import base64
import csv
import hashlib
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tiny import COCO_MINI, TINY_TRAINING

from command_line import parse_args

ROOT = Path(__file__).resolve().parent.parent
PHOTO = sorted((COCO_MINI / "val2017").glob("*.jpg"))[0]


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


name_space = load_script("name_space")
OWN = name_space.own_names(ROOT)


# ------------------------------------------------------------------------------------------------------------ rewriting
@pytest.mark.quick
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from common import UserError", "from packrcnn.common import UserError"),
        ("from utils.tf_v1 import tf", "from packrcnn.utils.tf_v1 import tf"),
        ("from utils import ranks, polygons as p", "from packrcnn.utils import ranks, polygons as p"),
        ("if a:\n  from eval import (\n    b,\n  )", "if a:\n  from packrcnn.eval import (\n    b,\n  )"),
        ("import common", "from packrcnn import common"),
        ("import common as c; import json", "from packrcnn import common as c; import json"),
        ("import utils.ranks as r", "import packrcnn.utils.ranks as r"),
        ("é = 1; import common", "é = 1; from packrcnn import common"),
        ("import json, os\nimport numpy as np", "import json, os\nimport numpy as np"),
        ("from . import common\ntext = 'from common import x'", "from . import common\ntext = 'from common import x'"),
        ("'run pip install -r requirements-gpu.txt'", "'run pip install 'packrcnn[gpu]''"),
        ("'run ./train.py or python tools/score.py'", "'run packrcnn or python -m packrcnn.tools.score'"),
        ("ROOT / 'train.py', \"tools/score.py\", 'x/train.py'", "ROOT / 'train.py', \"tools/score.py\", 'x/train.py'"),
    ],
)  # fmt: skip
def test_imports_and_commands_are_rewritten(before, after):
    assert name_space.rewritten(before, OWN) == after


@pytest.mark.quick
@pytest.mark.parametrize("source", ["import common, config", "import utils.ranks", "import json, common"])
def test_imports_that_would_bind_another_name_are_refused_with_their_line(source):
    with pytest.raises(ValueError, match=r"own\.py:2: import own modules one by one"):
        name_space.rewritten(f"x = 1\n{source}", OWN, "own.py")


@pytest.mark.quick
def test_every_module_can_be_rewritten_and_keeps_its_lines():
    for name, path in name_space.package_files(ROOT).items():
        if name.endswith(".py"):
            source = path.read_text()
            after = name_space.rewritten(source, OWN, str(path))
            compile(after, name, "exec")
            assert len(after.split("\n")) == len(source.split("\n")), name


@pytest.mark.quick
def test_what_the_package_imports_of_itself_is_in_it():
    files = name_space.package_files(ROOT)
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files}
    for name in (n for n in files if n.endswith(".py")):
        for node in ast.walk(ast.parse(name_space.rewritten(files[name].read_text(), OWN))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                inside = node.module in ("packrcnn", *(f"packrcnn.{folder}" for folder in name_space.FOLDERS))
                imported = [f"{node.module}.{alias.name}" for alias in node.names] if inside else [node.module]
            for module in imported:
                top, _, rest = module.partition(".")
                assert top not in OWN, f"{name} imports {module}, which is outside of the package"
                assert top != "packrcnn" or rest in modules | {"command"}, f"{name} imports {module}, which is left out"


# -------------------------------------------------------------------------------------------------------- what it holds
def pip(*arguments, python=sys.executable, cwd=ROOT):
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", f"--python={python}", *arguments]
    subprocess.run(command, cwd=cwd, check=True, timeout=300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), ".")
    assert not list(ROOT.glob("*.egg-info")), "building writes into the checkout"
    (path,) = folder.glob("packrcnn-*-py3-none-any.whl")
    return path


@pytest.mark.quick
def test_the_wheel_holds_every_module_the_tools_the_recipes_and_the_licence_and_nothing_beside_the_name_space(wheel):
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        record = list(csv.reader(io.StringIO(content.read(next(n for n in names if n.endswith("/RECORD"))).decode())))
        for name, digest, size in record[:-1]:
            data = content.read(name)
            assert digest == "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            assert int(size) == len(data)
    assert {name for name, *_ in record} == names
    assert {n.split("/")[0].partition("-")[0] for n in names} == {"packrcnn"}
    wanted = {
        p.relative_to(ROOT).as_posix() for folder in (".", "utils", "tools") for p in (ROOT / folder).glob("*.py")
    }
    wanted -= {"packrcnn.py", "tools/import_path.py", "tools/recipes.py", "tools/settings_doc.py"}
    wanted |= {"__init__.py", "__main__.py", "scripts/recipes.txt", "demo/make_shapes.py", "demo/own_head.py"}
    assert not {f"packrcnn/{n}" for n in wanted} - names
    assert not [n for n in names if "/tests/" in n or "__pycache__" in n]
    assert [n for n in names if n.endswith(".dist-info/licenses/LICENSE")]


@pytest.mark.quick
def test_a_wheel_of_the_source_archive_is_the_same(wheel, tmp_path):
    code = "import sys; sys.path.insert(0, 'scripts'); import build_package; build_package.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    (archive,) = tmp_path.glob("packrcnn-*.tar.gz")
    with tarfile.open(archive) as content:
        content.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    assert (tmp_path / archive.name.removesuffix(".tar.gz") / "PKG-INFO").is_file()
    pip("wheel", "--no-build-isolation", "--no-deps", f"--wheel-dir={tmp_path}", str(archive))
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


# ------------------------------------------------------------------------------------------------------------ installed
def environment(folder):
    """A fresh environment that sees this one's packages (not the checkout); returns its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "these.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The `bin` folder of an environment with the wheel."""
    python = environment(tmp_path_factory.mktemp("installed") / "venv")
    pip("install", "--no-deps", "--no-index", str(wheel), python=python)
    return python.parent


def run(*command, cwd, code=0):
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done


FACTS = """
import sys
import packrcnn
from packrcnn.common import UserError, project_version
assert packrcnn.UserError is UserError and "tensorflow" not in sys.modules
own = {own!r}
import importlib.util, pkgutil
strange = [name for name in own if (spec := importlib.util.find_spec(name)) and "{root}" in str(spec.origin)]
strange += [name for name in own if name in sys.modules and "packrcnn" in str(sys.modules[name].__file__)]
print(packrcnn.__file__, strange, project_version())
"""


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_command_and_modules_work_outside_of_the_checkout(kind, request, tmp_path):
    if kind == "wheel":
        folder = request.getfixturevalue("installed")
    else:
        folder = environment(tmp_path / "venv").parent
        pip("install", "--no-build-isolation", "--no-deps", "--no-index", "-e", ".", python=folder / "python")
    (tmp_path / "config.py").write_text("raise SystemExit('the config module of somebody else')")
    version = run(folder / "packrcnn", "--version", cwd=tmp_path).stdout
    assert version.startswith("packrcnn 0.") and ("git" in version) == (kind == "editable" and (ROOT / ".git").exists())
    assert (
        "MODE_FPN=True" in run(folder / "packrcnn", "--print-config", "--config", "MODE_FPN=True", cwd=tmp_path).stdout
    )
    wrong = run(folder / "packrcnn", "--config", "MODE_FPM=True", cwd=tmp_path, code=2)
    assert "MODE_FPN" in wrong.stderr and "Traceback" not in wrong.stderr
    assert run(folder / "packrcnn", "--help", cwd=tmp_path).stdout.startswith("usage: packrcnn ")
    usage = run(folder / "python", "-m", "packrcnn.tools.score", "--help", cwd=tmp_path).stdout
    assert "python -m packrcnn.tools.score --protocol coco" in usage
    # -I: the working directory, which has a config.py, is not on the path.
    code = FACTS.format(own=sorted(OWN), root=ROOT)
    file, strange, number = run(folder / "python", "-I", "-c", code, cwd=tmp_path).stdout.rsplit(None, 2)
    assert strange == "[]" and number == version.split()[1]
    assert Path(file).is_relative_to(ROOT) == (kind == "editable")


OWN_HEAD = """
import tensorflow.compat.v1 as tf
from packrcnn.basemodel import fully_connected

def head(features, cfg):
    return fully_connected("fc", tf.reduce_mean(features, [1, 2]), 8, relu=True)
"""


def test_the_installed_package_trains_and_predicts_with_workers_and_a_head_of_the_users(
    installed, tmp_path, monkeypatch
):
    """The worker processes find the package, `mine:head` is found in the working directory, and what was trained finds
    in a photo exactly what the checkout's code finds."""
    (tmp_path / "mine.py").write_text(OWN_HEAD)
    settings = [*TINY_TRAINING, "DATA.NUM_WORKERS=1", "TRAIN.MAX_STEPS=1", "FPN.FRCNN_HEAD_FUNC=mine:head"]
    done = run(installed / "packrcnn", "--logdir", "run", "--config", *settings, cwd=tmp_path)
    assert "finished 1 steps" in done.stderr and (tmp_path / "run" / "model-1.index").exists()
    shutil.copy(PHOTO, tmp_path / "photo.jpg")
    some = ["TEST.RESULT_SCORE_THRESH=0", "TEST.RESULTS_PER_IM=5"]
    words = ["--predict", "photo.jpg", "--load", "run", "--output", "out", "--no-window", "--config", *some]
    run(installed / "packrcnn", *words, "--trust-code", "mine", cwd=tmp_path)
    (entry,) = json.loads((tmp_path / "out/predictions.json").read_text())
    assert (tmp_path / "out/photo.jpg").is_file() and len(entry["detections"]) == 5
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("packrcnn")  # in the checkout too, the head may import packrcnn.basemodel
    from predict import load_predictor  # TensorFlow comes late: most of this file does without

    predictor = load_predictor(tmp_path / "run", some, trusted=["mine"])
    found = predictor(PHOTO)
    assert [d["class"] for d in entry["detections"]] == [predictor.class_names[n - 1] for n in found.labels]
    np.testing.assert_allclose([d["score"] for d in entry["detections"]], found.scores, atol=1e-4)
    np.testing.assert_allclose([d["box"] for d in entry["detections"]], found.boxes, atol=0.02)


# ----------------------------------------------------------------------------------------------------------- containers
@pytest.mark.quick
@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gpu"])
def test_a_dockerfile_copies_what_exists_and_its_commands_are_accepted(name):
    text = (ROOT / "docker" / name).read_text()
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    instructions = re.findall(r"(?m)^([A-Z]+) (.*)$", text)
    assert {i for i, _ in instructions} <= {"FROM", "COPY", "RUN", "ENV", "WORKDIR", "ENTRYPOINT", "CMD"}
    (version,) = re.findall(r"^FROM python:3\.(\d+)-slim$", text, re.M)
    assert 10 <= int(version) <= 13
    copied = [source for i, words in instructions if i == "COPY" for source in words.split()[:-1]]
    for source in copied:
        assert (ROOT / source).exists() and source not in ignored
    (wanted,) = re.findall(r"-r /tmp/requirements/(\S+)", text)
    lines = [line for f in copied if f != "." for line in (ROOT / f).read_text().splitlines()]
    needed = {wanted} | {line.split()[1] for line in lines if line.startswith(("-r ", "-c "))}
    assert needed <= set(copied), "requirements name a file that is not copied"
    assert not {"pyproject.toml", "README.md", "LICENSE", "scripts", "utils", "tools", "demo"} & set(ignored)
    assert dict(instructions)["ENTRYPOINT"] == '["packrcnn"]'
    for command in re.findall(r"(?m)^#   docker run .* packrcnn(?:-gpu)? (.*)$", text):
        parse_args(shlex.split(command))
    assert f"-f docker/{name} ." in text
    for line in re.findall(r"(?m)^#   (docker .*)$", text):
        assert line in (ROOT / "docs" / "INSTALL.md").read_text()
