"""The environment report: one line per fact, and what it reads from the machine's files."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tools.env import main, report, translated
from utils.processor import cpu_facts

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent


def test_cpu_facts_reads_name_and_instructions_from_the_kernels_text():
    intel = "processor\t: 0\nmodel name\t: Xeon 8481C\nflags\t\t: fpu avx2 fma avx512f avx512_bf16 amx_bf16 amx_tile\n"
    name, features = cpu_facts(intel * 2)
    assert name == "Xeon 8481C"
    assert features == {"avx2": True, "fma": True, "avx512f": True, "avx512_bf16": True, "amx_bf16": True}
    assert not cpu_facts(intel.replace("amx_bf16 ", ""))[1]["amx_bf16"]
    assert cpu_facts("flags : amx_bf16x\n")[1]["amx_bf16"] is False  # a name is a whole word
    arm = "processor\t: 0\nFeatures\t: fp asimd bf16\nModel\t\t: Neoverse-N2\n"
    assert cpu_facts(arm)[0] == "Neoverse-N2" and not any(cpu_facts(arm)[1].values())


def test_the_report_has_one_line_per_fact_and_the_installed_versions(capsys, monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")
    monkeypatch.setenv("HOROVOD_SECRET_KEY", "hidden")
    assert main(["--quick"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["tensorflow"].strip() == metadata.version("tensorflow")
    assert lines["python"].strip().startswith("3.")
    assert lines["TF_CPP_MIN_LOG_LEVEL"].strip() == "1" and "HOROVOD_SECRET_KEY" not in lines
    assert all(value.strip() for value in lines.values())


def test_a_package_that_is_missing_is_named_as_such(monkeypatch):
    def missing(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    assert dict(report(quick=True))["horovod"] == "not installed"


def test_a_package_that_python_translates_at_every_start_is_told(tmp_path, monkeypatch):
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    said = translated("fresh")
    assert said.startswith("no, ") and said.endswith(f"python -m compileall -q -j 0 {tmp_path}")
    subprocess.run([sys.executable, *said.split("python ")[1].split()], check=True)
    assert translated("fresh") == "yes" and translated("no_such_package") == "not installed"


@pytest.mark.parametrize("command", [["-m", "tools.env"], ["tools/env.py"]])
def test_both_ways_of_starting_it_work_and_the_quick_one_imports_no_tensorflow(command):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--quick"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("packrcnn:")
    assert "tensorflow" not in {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
