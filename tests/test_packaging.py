"""What the repository promises outside of its code: pins, imports and the licence. The documents: test_docs.py."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
# Distributions whose module has another name.
DISTRIBUTIONS = {"cv2": "opencv-python-headless", "PIL": "matplotlib"}  # matplotlib needs pillow
# Asked for where they are used, with a message that says how to install them.
OPTIONAL = {"detectron2", "horovod", "mlflow", "sagemaker", "supervision", "torch", "torchvision", "wandb"}


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
    direct |= {"setuptools"}  # TensorBoard needs it; scripts/build_package.py imports it
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


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def modules_of_the_house():
    """{module: what it imports from others as (module, names)}, anywhere in its file."""
    found = {}
    for path in tracked("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "tests":
            continue
        imports = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imports += [(alias.name, []) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imports.append((node.module, [alias.name for alias in node.names]))
                imports += [(f"{node.module}.{alias.name}", []) for alias in node.names]
        found[".".join(parts)] = imports
    return found


def test_private_names_stay_in_their_file():
    modules = modules_of_the_house()
    for name, imports in modules.items():
        private = [f"{m}.{n}" for m, names in imports for n in names if n.startswith("_") and m in modules]
        assert not private, f"{name} imports {private}"


def test_imports_make_no_circle():
    modules = modules_of_the_house()
    below = {name: {m for m, _ in imports if m in modules and m != name} for name, imports in modules.items()}
    while free := [name for name, needs in below.items() if not needs]:
        below = {name: needs - set(free) for name, needs in below.items() if name not in free}
    assert not below, f"these import each other: {sorted(below)}"


def test_the_package_asks_for_ranges_around_the_pins():
    text = (ROOT / "pyproject.toml").read_text()
    ranges = {}
    for line in re.search(r"(?ms)^dependencies = \[\n(.*?)^\]", text)[1].splitlines():
        requirement = Requirement(line.strip().strip('",'))
        ranges[requirement.name] = requirement.specifier
    pins = requirements("requirements.txt")
    assert set(ranges) == {pin.name for pin in pins}
    for pin in pins:
        (version,) = (specifier.version for specifier in pin.specifier)
        assert ranges[pin.name].contains(version), pin
    assert 'requires-python = ">=3.10,<3.14"' in text and PYTHONS[-1] == "3.13"
    for file in ROOT.glob("requirements-*.txt"):
        extra = re.search(rf"(?m)^{file.stem.partition('-')[2]} = \[(.*)\]", text)
        assert extra or file.name == "requirements-dev.txt"
        for pin in requirements(file.name) if extra else []:
            (wanted,) = (w for w in re.findall(r'"([^"]+)"', extra[1]) if Requirement(w).name == pin.name)
            assert all(Requirement(wanted).specifier.contains(s.version) for s in pin.specifier), pin
    (gpu,) = requirements("requirements-gpu.txt")
    assert f'gpu = ["tensorflow[and-cuda]{ranges["tensorflow"]}"]' in text and gpu.extras == {"and-cuda"}
