"""What the repository promises outside of its code: pins, make targets, and the commands printed in the README."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

from config import default_config, finalize_config
from train import parse_args

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
# Distributions whose module has another name.
DISTRIBUTIONS = {"cv2": "opencv-python-headless"}
# Asked for where they are used, with a message that says how to install them.
OPTIONAL = {"horovod", "sagemaker", "torch"}


def requirements(name):
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]


def applies(requirement, python):
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    return requirement.marker is None or Marker(str(requirement.marker)).evaluate(environment)


def tracked(pattern):
    found = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in found.stdout.splitlines() if (ROOT / line).exists()]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_package_is_pinned_once_for_each_python(python):
    everything = [
        *requirements("requirements.txt"),
        *requirements("requirements-dev.txt"),
        *requirements("constraints.txt"),
    ]
    names = []
    for requirement in everything:
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), f"{requirement} is not an exact pin"
        if applies(requirement, python):
            names.append(requirement.name.lower().replace("_", "-"))
    assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)
    direct = {r.name for r in requirements("requirements.txt") if applies(r, python)}
    assert {"tensorflow", "numpy", "tensorpack", "pycocotools"} <= direct


def test_the_gpu_requirements_are_the_same_tensorflow_with_cuda():
    (cpu,) = (r for r in requirements("requirements.txt") if r.name == "tensorflow")
    (gpu,) = requirements("requirements-gpu.txt")
    assert "-r requirements.txt" in (ROOT / "requirements-gpu.txt").read_text().splitlines()
    assert (gpu.name, gpu.extras, gpu.specifier) == ("tensorflow", {"and-cuda"}, cpu.specifier)


def test_what_is_installed_here_is_what_is_pinned():
    from importlib.metadata import version

    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    for requirement in requirements("requirements.txt"):
        if applies(requirement, python):
            assert requirement.specifier.contains(version(requirement.name)), requirement.name


def test_every_import_is_of_this_repository_the_standard_library_or_a_direct_requirement():
    files = tracked("*.py")
    own = {p.stem for p in files} | {p.name for p in ROOT.iterdir() if p.is_dir()}
    direct = {r.name for name in ("requirements.txt", "requirements-dev.txt") for r in requirements(name)}
    direct |= {"packaging"}  # pytest and TensorFlow need it; only tests import it
    strange = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for top in {m.split(".")[0] for m in modules} - own - OPTIONAL - set(sys.stdlib_module_names):
                if DISTRIBUTIONS.get(top, top) not in direct:
                    strange[top] = str(path.relative_to(ROOT))
    assert not strange


def test_make_offers_the_targets_that_the_readme_names():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    named = set(re.findall(r"(?:`|^    |\n)make ([a-z][a-z-]*)\b", (ROOT / "README.md").read_text(), re.M))
    assert {"demo", "test", "lint"} <= named <= targets, named - targets
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()
    assert targets == set(phony)


def readme_commands():
    """Commands of the README's indented blocks, with continuation lines joined and comments gone."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    for line in re.findall(r"^    (.*)$", text, re.M):
        yield shlex.split(line.replace("…", ""), comments=True)


def test_the_readme_prints_command_lines_that_train_py_accepts():
    commands = [words for words in readme_commands() if any(w.endswith("train.py") for w in words)]
    assert len(commands) >= 7
    for words in commands:
        start = next(i for i, w in enumerate(words) if w.endswith("train.py"))
        args = parse_args(words[start + 1 :])
        finalize_config(default_config().update_args(args.config))


def test_the_readme_names_settings_that_exist():
    text = (ROOT / "README.md").read_text()
    known = dict(default_config().items())
    groups = {k.split(".")[0] for k in known if "." in k}
    named = {k for k in re.findall(r"\b([A-Z]+\.[A-Z_0-9]+)\b", text) if k.split(".")[0] in groups}
    assert named and not named - set(known)


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_files_linked_from_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    names = re.findall(r"`((?:tests|tools|scripts|benchmarks|demo|docs)/[\w./-]+|[\w-]+\.(?:txt|md|py))`", text)
    missing = {n for n in names if not (ROOT / n).exists()}
    assert len(names) > 10 and not missing


def test_pictures_of_the_readme_exist():
    for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).is_file(), target
