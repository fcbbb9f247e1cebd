"""Horovod as it is built here, started by each launcher that can run on one machine: ranks reduce, stop and fail."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("horovod", reason="horovod is not installed: make horovod")

from jobs import CLEAN, REPOSITORY, free_port

NODE = str(REPOSITORY / "scripts/horovod_node.py")
RUN = [str(Path(sys.executable).parent / "horovodrun"), "--gloo"]
REDUCE = """
from utils.tf_v1 import tf  # first: it prepares TensorFlow
import horovod.tensorflow as hvd
hvd.init()
total = hvd.allreduce(tf.constant([1.0, 10.0]) * (hvd.rank() + 1), op=hvd.Sum)
with tf.Session() as session:
    a, b = session.run(total)
text = f"rank {hvd.rank()}/{hvd.size()} local {hvd.local_rank()}/{hvd.local_size()} "
print(text + f"cross {hvd.cross_rank()}/{hvd.cross_size()} sum {a:.0f} {b:.0f}", flush=True)
"""


@pytest.fixture
def program(tmp_path):
    def write(text):
        (tmp_path / "rank.py").write_text(text)
        return [sys.executable, str(tmp_path / "rank.py")]

    return write


def sums(text):
    """The lines that REDUCE prints, without what horovodrun puts before them."""
    return sorted(line[line.index("rank ") :] for line in text.splitlines() if " sum " in line)


def test_machines_with_different_numbers_of_ranks_reduce_together(program):
    port, command = free_port(), program(REDUCE)
    machines = [
        subprocess.Popen(
            [sys.executable, NODE, "--nodes", "2", "--node-rank", str(node), "--port", str(port), "--slots", str(slots),
             "--poll", "0.3", "--", *command],
            env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node, slots in enumerate([1, 2])
    ]  # fmt: skip
    outputs = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert sums(outputs[0]) == ["rank 0/3 local 0/1 cross 0/2 sum 6 60"]
    assert sums(outputs[1]) == ["rank 1/3 local 0/2 cross 1/2 sum 6 60", "rank 2/3 local 1/2 cross 0/1 sum 6 60"]


def test_sigterm_to_horovodrun_leaves_the_time_it_was_told_to_save(program, tmp_path):
    """Horovod's own limit is 5 s; the environment variable is the build's."""
    save = (
        "import os, signal, sys, time\nos.chdir(sys.argv[1])\nrank = os.environ['HOROVOD_RANK']\n"
        "def save(*_):\n    time.sleep(6); open('saved' + rank, 'w').close(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\nopen('up' + rank, 'w').close()\ntime.sleep(100)\n"
    )
    job = subprocess.Popen(
        [*RUN, "-np", "2", "-H", "localhost:2", *program(save), str(tmp_path)],
        env={**CLEAN, "HOROVOD_GRACEFUL_TERMINATION_TIME_S": "30"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 150
        while not all((tmp_path / f"up{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=60)
    finally:
        job.kill()
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()


def test_a_stopped_process_is_reported_with_its_exit_code(program, tmp_path):
    """As horovodrun reports it: whoever stops it must not take the code from who waits for it, nor freeze its shell."""
    from horovod.runner.common.util import safe_shell_exec

    stop = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))"
    words = program(f"import signal, sys, time\n{stop}\nopen(sys.argv[1], 'w').close()\ntime.sleep(60)")
    for attempt in range(5):
        up = tmp_path / f"up{attempt}"
        shell = subprocess.Popen(f"{' '.join(words)} {up}; exit $?", shell=True)
        deadline = time.monotonic() + 30
        while not up.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        began = time.monotonic()
        safe_shell_exec.terminate_executor_shell_and_children(shell.pid)
        # The shell itself gets SIGTERM too, if it has not yet ended by then.
        assert shell.wait(10) in (143, -signal.SIGTERM) and time.monotonic() - began < 4


@pytest.mark.slow
def test_ranks_on_two_hosts_reduce_over_the_network_until_its_cable_is_cut(two_hosts, program):
    command = program(REDUCE + "while True:\n    with tf.Session() as session: session.run(total)\n")
    (first, master), _ = two_hosts.items()
    machines = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, NODE, "--nodes", "2", "--node-rank", str(node),
             "--master", master, "--poll", "0.3", "--grace", "5", "--", *command],
            env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node, name in enumerate(two_hosts)
    ]  # fmt: skip
    try:
        said = []
        for machine in machines:  # each until it has reduced
            said.append("")
            while " sum " not in said[-1]:
                line = machine.stdout.readline()
                assert line, said
                said[-1] += line
        assert "interface eth0" in said[0]
        sum_lines = ["rank 0/2 local 0/1 cross 0/2 sum 3 30", "rank 1/2 local 0/1 cross 1/2 sum 3 30"]
        assert sums("".join(said)) == sum_lines
        subprocess.run(["ip", "-n", first, "link", "set", "eth0", "down"], check=True)
        outputs = [machine.communicate(timeout=60)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.terminate()
    assert all(machine.returncode not in (0, None) for machine in machines)
    assert "machine 1 (10.213.7.2) has been silent" in outputs[0], outputs
    assert "machine 0 (10.213.7.1) does not answer" in outputs[1], outputs


@pytest.mark.slow
@pytest.mark.parametrize("interface", [["--network-interfaces", "eth0"], []], ids=["named", "found"])
def test_horovodrun_starts_ranks_on_another_host_over_ssh(two_hosts, ssh_to_second_host, program, interface):
    first, second = two_hosts.values()
    options, path = ssh_to_second_host
    result = subprocess.run(
        ["ip", "netns", "exec", next(iter(two_hosts)), *RUN, "-np", "2", "-H", f"{first}:1,{second}:1", *interface,
         *options, *program(REDUCE)],
        capture_output=True, text=True, timeout=120, env={**CLEAN, "PATH": path}, cwd=REPOSITORY,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    lines = ["rank 0/2 local 0/1 cross 0/2 sum 3 30", "rank 1/2 local 0/1 cross 1/2 sum 3 30"]
    assert sums(result.stdout) == lines
