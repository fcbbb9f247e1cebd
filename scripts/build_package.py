"""Builds the package for pip (PEP 517 and 660): `pip install .`, `pip install -e .`, `pip wheel .`.

setuptools writes the metadata that pyproject.toml describes; the modules are added as scripts/name_space.py rewrites
them. An editable installation holds only a finder that does the same with the checkout's files as they are imported.
"""

import base64
import hashlib
import os
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from name_space import NAME, own_names, package_files, rewritten
from setuptools import build_meta

__all__ = [
    "build_editable", "build_sdist", "build_wheel", "get_requires_for_build_editable", "get_requires_for_build_sdist",
    "get_requires_for_build_wheel", "prepare_metadata_for_build_editable", "prepare_metadata_for_build_wheel",
]  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent
DESCRIBING = ("pyproject.toml", "README.md", "LICENSE")  # what setuptools needs for the metadata

_MAIN = f'"""`python -m {NAME}`."""\n\nfrom {NAME} import command\n\ncommand()\n'
_EDITABLE = f"""\
'''Finds {NAME} in the checkout that `pip install -e` was given.'''

import sys

ROOT = {{root!r}}


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] != {NAME!r}:
            return None
        module = sys.modules.get("_{NAME}_name_space")
        if module is None:
            from importlib import util

            spec = util.spec_from_file_location("_{NAME}_name_space", ROOT + "/scripts/name_space.py")
            module = util.module_from_spec(spec)
            spec.loader.exec_module(module)
            sys.modules["_{NAME}_name_space"] = module
        return module.find(name, module.Path(ROOT))


sys.meta_path.append(_Finder)
"""


def _modules() -> dict[str, bytes]:
    """{path in the wheel: content} of the whole package."""
    own, found = own_names(ROOT), {f"{NAME}/__main__.py": _MAIN.encode()}
    for name, path in package_files(ROOT).items():
        content = path.read_bytes()
        if path.suffix == ".py":
            content = rewritten(content.decode(), own, str(path)).encode()
        found[f"{NAME}/{name}"] = content
    return found


def _finder() -> dict[str, bytes]:
    """What an editable installation holds."""
    module = f"_{NAME}_editable"
    return {f"{module}.py": _EDITABLE.format(root=str(ROOT)).encode(), f"{module}.pth": f"import {module}\n".encode()}


def _in_copy(build: Any, *arguments: Any) -> Any:
    """Runs a function of setuptools on a copy of the describing files, so that nothing is written into the checkout."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        for name in DESCRIBING:
            shutil.copy(ROOT / name, folder)
        os.chdir(folder)
        try:
            return build(*arguments)
        finally:
            os.chdir(before)


def _build(wheel_directory: str, settings: Any, files: dict[str, bytes]) -> str:
    """The wheel that setuptools makes, which has no module, with these files."""
    directory = os.path.abspath(wheel_directory)
    name = _in_copy(build_meta.build_wheel, directory, settings)
    path = Path(directory, name)
    with zipfile.ZipFile(path) as wheel:
        files = files | {n: wheel.read(n) for n in wheel.namelist() if not n.endswith("/RECORD")}
        (record,) = (n for n in wheel.namelist() if n.endswith("/RECORD"))
    lines = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for file, content in sorted(files.items(), key=lambda entry: (".dist-info/" in entry[0], entry[0])):
            wheel.writestr(_entry(file), content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            lines.append(f"{file},sha256={digest},{len(content)}")
        wheel.writestr(_entry(record), "\n".join([*lines, f"{record},,", ""]))
    return name


def _entry(name: str) -> zipfile.ZipInfo:
    """A file that all may read, with the same date in every build."""
    entry = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
    entry.external_attr, entry.compress_type = 0o100644 << 16, zipfile.ZIP_DEFLATED
    return entry


# ------------------------------------------------------------------------------------------------------ what pip calls
def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: Any = None) -> str:
    return _build(wheel_directory, config_settings, _modules())


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: Any = None) -> str:
    return _build(wheel_directory, config_settings, _finder())


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    """An archive of what a wheel is built from."""
    directory = os.path.abspath(sdist_directory)
    builders = [ROOT / "scripts" / name for name in ("build_package.py", "name_space.py")]
    with tempfile.TemporaryDirectory() as folder:
        info = _in_copy(build_meta.prepare_metadata_for_build_wheel, folder, config_settings)
        name = info.removesuffix(".dist-info")
        with tarfile.open(Path(directory, f"{name}.tar.gz"), "w:gz", format=tarfile.PAX_FORMAT) as sdist:
            sdist.add(Path(folder, info, "METADATA"), f"{name}/PKG-INFO")
            for path in [*(ROOT / n for n in DESCRIBING), *builders, *package_files(ROOT).values()]:
                sdist.add(path, f"{name}/{path.relative_to(ROOT)}")
    return f"{name}.tar.gz"


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    return _in_copy(build_meta.prepare_metadata_for_build_wheel, os.path.abspath(metadata_directory), config_settings)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return []


get_requires_for_build_editable = get_requires_for_build_sdist = get_requires_for_build_wheel
prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel
