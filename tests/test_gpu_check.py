"""tools/gpu_check.py: every check runs on the CPU; what it reports, its files and its exit codes."""

import json

import pytest

from tools import gpu_check
from tools.gpu_check import Result, Settings, busy_share, main, markdown, placement_in, run_checks
from utils import tf_v1

FACTS = [("cpu", "one | two")]


def test_all_checks_run_on_the_cpu_and_their_results_are_in_the_report(tmp_path, capsys):
    assert main(["--device", "cpu", "--output", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    assert report["passed"] and report["device"] == "/cpu:0" and report["quick"]
    checks = report["checks"]
    assert [checks[name]["passed"] for name in checks] == [True, True, None, True, True, None, None]
    assert list(checks) == [
        "placement", "equality with the CPU", "recording of detectron2", "precision", "training", "speed", "profile",
    ]  # fmt: skip
    assert checks["placement"]["numbers"]["kernels"]["CPU"] > 1000 and not checks["placement"]["numbers"]["elsewhere"]
    assert all(error == 0 for error, _ in checks["equality with the CPU"]["numbers"].values())
    assert len(checks["training"]["numbers"]["losses"]) == 5
    assert all(speed > 0 for speed in checks["speed"]["numbers"]["float32"].values())
    assert checks["profile"]["numbers"]["kernels"] > 1000 and 0 < checks["profile"]["numbers"]["busy"] <= 1
    text = (tmp_path / "out" / "gpu-check.md").read_text()
    assert "Every check passed." in text and "## profile" in text and "tensorflow" in text
    assert json.loads((tmp_path / "out" / "gpu-check-trace.json").read_text())["traceEvents"]


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(tf_v1.tf.config, "list_physical_devices", lambda kind: [])
    tf_v1.gpu_count.cache_clear()
    yield
    tf_v1.gpu_count.cache_clear()


@pytest.mark.quick
def test_without_a_gpu_one_line_says_so(no_gpu, tmp_path, capsys):
    assert main(["--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "no GPU is seen, so nothing was checked" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.quick
def test_a_check_that_raises_has_failed_and_the_next_one_runs():
    def check_first(settings):
        raise RuntimeError("no kernel image\nis available")

    def check_second(settings):
        return Result("second", True, "fine")

    first, second = run_checks(Settings("/gpu:0", True), [check_first, check_second])
    assert first.passed is False and first.name == "first" and "no kernel image" in first.summary
    assert "\n" not in first.summary and second.passed
    text = markdown([first, second], FACTS, "/gpu:0")
    assert "Failed: first." in text and "FAILED" in text


@pytest.mark.quick
def test_an_error_beyond_its_limit_or_not_a_number_fails_a_comparison():
    compared = gpu_check._compared
    assert compared("x", [("a", 1e-4, 1e-3), ("b", 0.0, 0.0)]).passed
    assert not compared("x", [("a", 1e-2, 1e-3)]).passed
    assert not compared("x", [("a", float("nan"), 1e-3)]).passed
    assert "TOO LARGE" in compared("x", [("a", 1.0, 0.0)]).table
    assert compared("x", [("a", 0.1, 1), ("a", 0.3, 1), ("a", 0.2, 1)]).numbers == {"a": [0.3, 1]}


@pytest.mark.quick
def test_the_busy_share_counts_overlapping_kernels_once():
    assert busy_share([]) == 0
    assert busy_share([(0, 10), (5, 20), (30, 40)]) == 30 / 40
    assert busy_share([(30, 40), (0, 10), (2, 3)]) == 20 / 40


@pytest.mark.quick
def test_placement_fails_where_a_product_runs_on_another_device():
    def graph(device, *kinds):
        content = tf_v1.tf.GraphDef()
        for kind in kinds:
            content.node.add(name=kind, op=kind, device=f"/job:localhost/replica:0/task:0/device:{device}:0")
        return content

    gpu, cpu = graph("GPU", "Relu", "Conv2D", "_Send", "Const"), graph("CPU", "_Recv", "Where", "Const")
    result = placement_in([gpu, cpu], "GPU")
    assert result.passed and result.summary == "2 of 3 kernels on the GPU (67%), 1 tensors sent"
    assert result.numbers["elsewhere"] == {"Where": 1}
    result = placement_in([gpu, graph("CPU", "_MklNativeConv2D")], "GPU")
    assert not result.passed and "on another device: _MklNativeConv2D" in result.summary
    assert not placement_in([gpu], "CPU").passed
