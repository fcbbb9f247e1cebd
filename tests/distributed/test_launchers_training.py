"""Every launcher in scripts/ with the real train.py: trained, killed, stopped and continued by the same command.

`pytest -rP` prints how many seconds each job took to end (docs/LAUNCHERS.md).
"""

import json
import re
import subprocess
import sys
import time

import pytest

pytest.importorskip("horovod", reason="horovod is not installed: make horovod")

import psutil
from jobs import CLEAN, REPOSITORY, slurm_stand_ins
from tiny import COCO_MINI, RPN_ALONE, TINY_TRAINING

from utils.checkpoint import load_weights, newest_checkpoint

SCRIPTS = REPOSITORY / "scripts"
RECIPE, STEPS, EVERY = "r50-fpn-box", 40, 5
SETTINGS = [s for s in TINY_TRAINING if not s.startswith("DATA.BASEDIR=")]
SETTINGS += [f"TRAIN.MAX_STEPS={STEPS}", f"TRAIN.PERIOD_STEPS={EVERY}", *RPN_ALONE]
WORDS = [RECIPE, *SETTINGS, "--data", str(COCO_MINI), "--python", sys.executable]
pytestmark = pytest.mark.slow


class Job:
    """A run of train.py in `logdir` below `folder`, started by one command, or by one command for each machine."""

    def __init__(self, folder, logdir, *commands, **environment):
        self.folder, self.logdir, self.begun_at = folder, logdir, step_of(logdir)
        self.outputs = [folder / f"output-{time.monotonic_ns()}-{i}" for i in range(len(commands))]
        self.launchers = []
        for command, output in zip(commands, self.outputs):
            with open(output, "w") as file:
                process = subprocess.Popen(
                    list(map(str, command)), env={**CLEAN, **environment}, cwd=REPOSITORY, stdin=subprocess.DEVNULL,
                    stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            self.launchers.append(process)

    def trains(self):
        """Waits until it has written a checkpoint of its own."""
        deadline = time.monotonic() + 150
        while step_of(self.logdir) == self.begun_at:
            assert time.monotonic() < deadline and not self.codes(), self.text()
            time.sleep(0.05)
        return self

    def rank(self, number):
        """The process of a rank."""
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                ours = words[1:2] == [str(REPOSITORY / "train.py")] and any(str(self.folder) in word for word in words)
                if ours and process.environ().get("HOROVOD_RANK") == str(number):
                    return process
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                pass
        return None

    def codes(self):
        """Exit codes of the launchers that have ended."""
        return [process.returncode for process in self.launchers if process.poll() is not None]

    def ends(self, what, limit=60):
        """Waits for all launchers and both ranks; their exit codes, having noted the seconds since `what` was done."""
        began = time.monotonic()
        while len(self.codes()) < len(self.launchers) or self.rank(0) or self.rank(1):
            assert time.monotonic() - began < limit, self.text()
            time.sleep(0.1)
        print(f"seconds: {what}: {time.monotonic() - began:.1f}")
        return self.codes()

    def finishes(self):
        """Trains to the end, where every step was made and the model lies."""
        assert set(self.ends("to the end", 150)) == {0}, self.text()
        assert f"finished {STEPS} steps" in self.text() and step_of(self.logdir) == STEPS
        assert int(load_weights(self.logdir)[0]["global_step"]) == STEPS
        steps = [json.loads(line)["step"] for line in (self.logdir / "log.jsonl").read_text().splitlines()]
        assert steps[-1] == STEPS

    def text(self):
        return "\n".join(output.read_text() for output in self.outputs)

    def says_readably(self, *reasons):
        """What it says holds the reasons, and nothing that is not for the user."""
        text = self.text()
        for reason in reasons:
            assert re.search(reason, text), text
        for noise in ("Traceback", "absl", "oneDNN", "background loop", "stack trace", "libcuda"):
            assert noise not in text, text
        ends = [line for line in text.splitlines() if "another process of the job has ended" in line]
        assert len(ends) <= 1 and text.count("ERROR") <= 1, text
        if self.begun_at:
            assert f"continuing {self.logdir} at step {self.begun_at}" in text

    def kill(self):
        for process in [*self.launchers, self.rank(0), self.rank(1)]:
            if process is not None:
                process.kill()
        for process in self.launchers:
            process.wait(30)


@pytest.fixture
def start(tmp_path):
    """start(commands…, NAME=value…): a job in tmp_path/run; whatever is left of it ends with the test."""
    jobs = []

    def start(*commands, logdir=tmp_path / "run", **environment):
        jobs.append(Job(tmp_path, logdir, *commands, **environment))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def step_of(logdir):
    """The step of the newest checkpoint."""
    path = newest_checkpoint(logdir) if logdir.is_dir() else None
    return int(re.search(r"model-(\d+)", path).group(1)) if path else 0


def inside(host, *command):
    return ["ip", "netns", "exec", host, *command]


def test_one_machine_trains_through_a_killed_rank_and_sigterm_to_its_end(start, tmp_path):
    command = [SCRIPTS / "train_ec2.sh", "2", *WORDS, "--cpu", "--logdir", tmp_path / "run", "TRAIN.EVAL_PERIOD=1000"]
    job = start(command).trains()
    job.rank(0).kill()
    assert job.ends("train_ec2.sh, rank 0 killed") == [137]
    job.says_readably(r"horovod_node: rank 0 was killed by SIGKILL \(out of memory\?\); ending the job")
    assert step_of(tmp_path / "run") % EVERY == 0
    job = start(command).trains()
    job.launchers[0].terminate()
    assert job.ends("train_ec2.sh, SIGTERM") == [143]
    job.says_readably("stopped by SIGTERM; continue with: ./train.py --resume")
    assert step_of(tmp_path / "run") > job.begun_at
    job = start(command)
    job.finishes()
    job.says_readably()
    assert "proposals/AR@1000" in str(json.loads((tmp_path / "run/metrics.json").read_text()))


def test_machines_reached_by_ssh_train_through_a_killed_rank_and_a_cut_cable(
    start, tmp_path, two_hosts, ssh_to_second_host
):
    (here, first), (_, second) = two_hosts.items()
    options, path = ssh_to_second_host
    login = ["--ssh-port", options[1], "--identity", options[3], "--logdir", tmp_path / "run"]
    command = inside(here, SCRIPTS / "train_hosts.sh", f"{first}:1,{second}:1", *WORDS, *login)
    closed = start([*command, "--ssh-port", "2223"], PATH=path)
    assert closed.ends("train_hosts.sh, ssh refused") == [75]
    closed.says_readably(f"^train_hosts.sh: {second} is not there: ssh: connect to host {second} port 2223: .*refused")
    job = start(command, PATH=path).trains()
    job.rank(1).kill()
    assert job.ends("train_hosts.sh, rank of the second machine killed") == [137]
    job.says_readably("rank 1 was killed by SIGKILL .* on machine 1 .10.213.7.2.; ending the ranks here")
    job = start(command, PATH=path).trains()
    subprocess.run(["ip", "-n", here, "link", "set", "eth0", "down"], check=True)
    assert job.ends("train_hosts.sh, cable cut") == [75]
    job.says_readably("machine 1 .10.213.7.2. has been silent for 40 s; ending the ranks here")
    subprocess.run(["ip", "-n", here, "link", "set", "eth0", "up"], check=True)
    job = start(command, PATH=path)
    job.finishes()
    job.says_readably("2 ranks on 2 machine\\(s\\), interface eth0")


def test_slurm_puts_a_stopped_job_back_and_not_one_with_a_killed_rank(start, tmp_path):
    """`srun` is a stand-in that runs the launcher once for each machine; `scontrol` notes what it is asked."""
    slurm = slurm_stand_ins(tmp_path)
    command = [SCRIPTS / "train.sbatch", *WORDS, "--logdir", tmp_path / "run"]
    job = start(command, **slurm).trains()
    job.launchers[0].terminate()
    assert job.ends("train.sbatch, SIGTERM") == [143]
    job.says_readably("stopped by SIGTERM; continue with: ./train.py --resume", "back into the queue")
    assert (tmp_path / "notes").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    job = start(command, **slurm).trains()
    job.rank(1).kill()
    assert job.ends("train.sbatch, rank killed") == [137]
    job.says_readably("rank 1 was killed by SIGKILL .out of memory")
    assert (tmp_path / "notes").read_text().count("\n") == 1


def test_sagemaker_containers_train_and_outlive_a_machine_that_is_taken_away(start, tmp_path, two_hosts, name_hosts):
    """train_sagemaker.py with a stand-in of the SDK makes the words; the first machine's own name leads to loopback."""
    (tmp_path / "sdk/sagemaker").mkdir(parents=True)
    (tmp_path / "sdk/sagemaker/__init__.py").touch()
    (tmp_path / "sdk/sagemaker/estimator.py").write_text(
        "import json\nclass Estimator:\n    def __init__(self, **words):\n        self.words = words\n"
        "    def fit(self, inputs):\n        print(json.dumps([self.words, inputs]))\n"
    )
    asked = subprocess.run(
        [sys.executable, SCRIPTS / "train_sagemaker.py", RECIPE, *SETTINGS, "--image", "i", "--role", "r",
         "--data", "s3://b/coco", "--checkpoints", "s3://b/run", "--count", "2", "--directory", REPOSITORY],
        env={**CLEAN, "PYTHONPATH": str(tmp_path / "sdk")}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    words, channels = json.loads(asked.stdout)
    assert channels == {"coco": "s3://b/coco"} and words["checkpoint_local_path"] == "/opt/ml/checkpoints"
    machines = ["algo-1", "algo-2"]
    for name in machines:
        (tmp_path / name / "input/config").mkdir(parents=True)
        (tmp_path / name / "input/data").mkdir()
        (tmp_path / name / "input/data/coco").symlink_to(COCO_MINI)
        (tmp_path / name / "input/config/resourceconfig.json").write_text(
            json.dumps({"current_host": name, "hosts": machines[::-1], "network_interface_name": "eth0"})
        )
    (first, address), (second, _) = two_hosts.items()
    name_hosts({first: {"algo-1": "127.0.1.1"}, second: {"algo-1": address}})
    entry = [sys.executable, words["container_entry_point"][1], *words["container_arguments"], "--gpus", "1"]
    commands = [
        inside(host, *entry, "--root", tmp_path / name) for host, name in zip((first, second), machines)
    ]  # fmt: skip
    logdir = tmp_path / "algo-1/checkpoints"
    job = start(*commands, logdir=logdir).trains()
    job.launchers[1].kill()  # its ranks go with it
    assert job.ends("sagemaker_entry.py, a machine killed") == [75, -9]
    job.says_readably("machine 1 .10.213.7.2. has been silent for 8 s; ending the ranks here")
    job = start(*commands, logdir=logdir)
    job.finishes()
    job.says_readably()
    assert not list((tmp_path / "algo-2").glob("checkpoints/model-*"))


def test_the_pods_of_the_kubernetes_job_train_and_end_together(start, tmp_path, two_hosts, name_hosts):
    yaml = pytest.importorskip("yaml")
    asked = subprocess.run(
        [SCRIPTS / "train_kubernetes.sh", "2", "0", *WORDS, "--image", "i:1", "--directory", REPOSITORY, "--dry-run",
         "--logdir", tmp_path / "run"], env=CLEAN, capture_output=True, text=True, check=True,
    )  # fmt: skip
    _, job = yaml.safe_load_all(asked.stdout)
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (first, address), (second, other) = two_hosts.items()
    # As in a cluster: the pods' names in the subdomain, and its own host name.
    dns = {f"{name}-0.{pod['subdomain']}": address, f"{name}-1.{pod['subdomain']}": other}
    name_hosts({first: {f"{name}-0": address, **dns}, second: {f"{name}-1": other, **dns}})
    commands = [
        inside(host, "env", "-C", container["workingDir"], f"JOB_COMPLETION_INDEX={i}", *container["command"])
        for i, host in enumerate((first, second))
    ]
    job = start(*commands).trains()
    job.launchers[0].kill()
    assert job.ends("train_kubernetes.sh, pod 0 killed") == [-9, 75]
    job.says_readably(f"machine 0 .{name}-0.{name}. does not answer any more; ending the ranks here")
    job = start(*commands)
    job.finishes()
    job.says_readably()
