"""The launchers in scripts/: the commands they print, what they refuse, and how the ranks of machines live and end."""

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import CLEAN, REPOSITORY, free_port, slurm_stand_ins

from config import default_config, finalize_config

SCRIPTS = REPOSITORY / "scripts"
SHELL_SCRIPTS = sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")])
_NO_LAUNCHERS = {SCRIPTS / name for name in ("import_path.py", "build_package.py", "name_space.py")}
PROGRAMS = sorted({*SCRIPTS.glob("train*"), *SCRIPTS.glob("*.py"), SCRIPTS / "install_horovod.sh"} - _NO_LAUNCHERS)
RECIPES = {
    line.split()[0]: line.split()[1:]
    for line in (SCRIPTS / "recipes.txt").read_text().splitlines()
    if line and not line.startswith("#")
}


def launch(script, *words, **environment):
    """Runs a launcher to its end."""
    interpreter = [sys.executable] if script.endswith(".py") else []
    return subprocess.run(
        [*interpreter, str(SCRIPTS / script), *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**CLEAN, **environment},
    )


def printed(script, *words, **environment):
    """The words of the command that a launcher prints with --dry-run, as a shell reads them."""
    result = launch(script, *words, "--dry-run", **environment)
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout.splitlines()[0])


def training(recipe, *extra, python="PY", script=str(REPOSITORY / "train.py"), logdir=None):
    settings = [*RECIPES[recipe], *extra]
    return [python, script, "--config", "TRAINER=horovod", *settings, "--logdir", logdir or f"train_log/{recipe}"]


# ------------------------------------------------------------------------------------------------ commands
@pytest.mark.quick
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_a_valid_set_of_settings(recipe):
    finalize_config(default_config().update_args(RECIPES[recipe]))


@pytest.mark.quick
@pytest.mark.parametrize("gpus", [1, 3, 8])
def test_one_machine_runs_one_rank_per_gpu(gpus):
    words = printed(
        "train_ec2.sh", str(gpus), "r50-fpn", "--python", "PY", "--data", "/my data", "--weights", "/w/R50.npz",
        "TRAIN.LR_SCHEDULE=[150000,230000,280000]", "--load", "model.npz", "--logdir", "/runs/a",
    )  # fmt: skip
    assert words == ["PY", str(SCRIPTS / "horovod_node.py"), "--slots", str(gpus), "--grace", "50", "--"] + [
        "PY", str(REPOSITORY / "train.py"), "--config", "TRAINER=horovod", "MODE_FPN=True", "DATA.BASEDIR=/my data",
        "BACKBONE.WEIGHTS=/w/R50.npz", "TRAIN.LR_SCHEDULE=[150000,230000,280000]",
        "--load", "model.npz", "--logdir", "/runs/a",
    ]  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipes_settings_reach_the_command(recipe):
    words = printed("train_ec2.sh", "8", recipe, "--python", "PY")
    assert words[words.index("--") + 1 :] == training(recipe)


@pytest.mark.quick
def test_a_setting_given_on_the_command_line_wins_over_the_recipes():
    words = printed("train_ec2.sh", "2", "r50-fpn", "MODE_FPN=False", "--python", "PY")
    settings = words[words.index("--config") + 1 : words.index("--logdir")]
    assert default_config().update_args(settings).MODE_FPN is False


@pytest.mark.quick
def test_several_hosts_run_one_rank_per_gpu_of_each():
    result = launch(
        "train_hosts.sh", "10.0.0.1:8,node-b.example:4", "r101-fpn", "--python", "PY", "--interface", "ens5",
        "--ssh-port", "2222", "--identity", "/k/id", "--port", "4321", "--data", "/it's data", "--dry-run",
        NCCL_DEBUG="INFO of all",
    )  # fmt: skip
    here, there = map(shlex.split, result.stdout.splitlines())

    def machine(number, slots):
        return [
            "PY", str(SCRIPTS / "horovod_node.py"), "--nodes", "2", "--node-rank", str(number), "--master", "10.0.0.1",
            "--port", "4321", "--slots", str(slots), "--grace", "50", "--wait", "120", "--interface", "ens5", "--",
            *training("r101-fpn", "DATA.BASEDIR=/it's data"),
        ]  # fmt: skip

    assert here == machine(0, 8)
    assert there[0] == "ssh" and there[-2] == "node-b.example"
    assert there[there.index("-p") :][:2] == ["-p", "2222"] and there[there.index("-i") :][:2] == ["-i", "/k/id"]
    remote = shlex.split(there[-1])  # what the shell of the other machine makes of it
    assert remote[:5] == ["cd", str(REPOSITORY), "&&", "exec", "env"]
    assert "NCCL_DEBUG=INFO of all" in remote and not any(word.startswith("PATH=") for word in remote)
    assert remote[remote.index("PY") :] == machine(1, 4)


@pytest.mark.quick
def test_slurm_starts_one_launcher_per_machine(tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\n[ "$1 $2 $3" = "show hostnames gpu[07-09]" ] && printf "gpu07\\ngpu08\\ngpu09\\n"\n'
    )
    scontrol.chmod(0o755)
    words = printed(
        "train.sbatch", "r50-fpn", "--python", "PY", PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="41",
        SLURM_SUBMIT_DIR=str(REPOSITORY), SLURM_JOB_NUM_NODES="3", SLURM_JOB_NODELIST="gpu[07-09]",
        SLURM_GPUS_ON_NODE="8",
    )  # fmt: skip
    assert words == [
        "srun", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=120", "PY", str(SCRIPTS / "horovod_node.py"),
        "--nodes", "3", "--master", "gpu07", "--port", "20041", "--slots", "8", "--", *training("r50-fpn"),
    ]  # fmt: skip


@pytest.mark.quick
def test_kubernetes_manifest_names_pod_0_as_the_pods_find_it():
    yaml = pytest.importorskip("yaml")
    result = launch(
        "train_kubernetes.sh", "4", "8", "r50-fpn", "--image", "registry/it's:1", "--claim", "coco", "--dry-run",
        "--python", "PY", "TRAIN.LR_SCHEDULE=[1,2]", "--data", "/data/my coco",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    comment, _, manifest = result.stdout.partition("\n")
    service, job = yaml.safe_load_all(manifest)
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["command"] == [
        "PY", "/packrcnn/scripts/horovod_node.py", "--nodes", "4",
        "--master", "packrcnn-r50-fpn-0.packrcnn-r50-fpn", "--port", "23456", "--slots", "8", "--grace", "100", "--",
        *training("r50-fpn", "DATA.BASEDIR=/data/my coco", "TRAIN.LR_SCHEDULE=[1,2]", script="/packrcnn/train.py",
                  logdir="/data/train_log/r50-fpn"),
    ]  # fmt: skip
    assert shlex.split(comment.removeprefix("# ")) == container["command"]
    # An Indexed Job's pod i has the host name JOB-i, which resolves inside its subdomain, the headless service.
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 4
    assert f"{job['metadata']['name']}-0.{pod['subdomain']}" == "packrcnn-r50-fpn-0.packrcnn-r50-fpn"
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert container["image"] == "registry/it's:1" and container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    mounts = {m["name"] for m in container["volumeMounts"]}
    assert mounts == {v["name"] for v in pod["volumes"]} == {"shm", "data"}


@pytest.mark.quick
@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
@pytest.mark.parametrize("more", [["0"], ["8", "--claim", "coco"]], ids=["cpu", "gpus"])
def test_kubectl_knows_every_field_of_the_manifest(more):
    """Without a cluster: `kubectl set --local` reads it into the API's types, which lose what they do not know."""
    yaml = pytest.importorskip("yaml")
    result = launch("train_kubernetes.sh", "4", *more, "r50-fpn", "--image", "i:1", "--dry-run", "--python", "PY")
    service, job = yaml.safe_load_all(result.stdout.partition("\n")[2])

    def read(manifest, *change):
        words = ["kubectl", "set", *change, "--local", "-o", "json", "-f", "-"]
        done = subprocess.run(words, input=json.dumps(manifest), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def missing(known, given, path):
        if isinstance(given, dict):
            return [m for k, v in given.items() for m in missing((known or {}).get(k), v, f"{path}.{k}")]
        if isinstance(given, list) and isinstance(known, list) and len(known) == len(given):
            return [m for i, (k, v) in enumerate(zip(known, given)) for m in missing(k, v, f"{path}[{i}]")]
        return [] if str(known) == str(given) else [path]

    assert missing(read(service, "selector", f"job-name={job['metadata']['name']}"), service, "service") == []
    changed = read(job, "image", "train=i:2")
    assert missing(changed, job, "job") == ["job.spec.template.spec.containers[0].image"]


@pytest.fixture
def sagemaker_root(tmp_path):
    """A /opt/ml as the second of two machines sees it."""
    (tmp_path / "input/config").mkdir(parents=True)
    (tmp_path / "input/data/coco").mkdir(parents=True)
    (tmp_path / "input/config/resourceconfig.json").write_text(
        json.dumps({"current_host": "algo-2", "hosts": ["algo-2", "algo-1"], "network_interface_name": "eth0"})
    )
    return tmp_path


@pytest.mark.quick
def test_sagemaker_containers_run_what_the_estimator_asks_for(sagemaker_root):
    (sagemaker_root / "input/data/weights").mkdir()
    (sagemaker_root / "input/data/weights/R50.npz").touch()
    result = launch(
        "train_sagemaker.py", "r50-fpn", "TRAIN.LR_SCHEDULE=1x", "--image", "i:1", "--role", "r", "--data", "s3://b/coco",
        "--weights", "s3://b/R50.npz", "--checkpoints", "s3://b/run", "--count", "2", "--spot", "--dry-run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    started = json.loads(result.stdout)
    estimator = started["estimator"]
    assert estimator["instance_count"] == 2 and estimator["max_wait"] >= estimator["max_run"]
    assert started["channels"] == {"coco": "s3://b/coco", "weights": "s3://b/R50.npz"}
    assert estimator["container_entry_point"][1] == "/packrcnn/scripts/sagemaker_entry.py"
    words = printed(
        "sagemaker_entry.py", *estimator["container_arguments"], "--root", str(sagemaker_root), "--gpus", "8"
    )
    node = words[: words.index("--")]
    assert node[1:] == [
        str(SCRIPTS / "horovod_node.py"), "--nodes", "2", "--node-rank", "1", "--master", "algo-1", "--port", "23456",
        "--slots", "8", "--interface", "eth0", "--grace", "100",
    ]  # fmt: skip
    assert words[words.index("--") + 2 :] == [
        str(REPOSITORY / "train.py"), "--config", "TRAINER=horovod", "MODE_FPN=True", "TRAIN.LR_SCHEDULE=1x",
        f"DATA.BASEDIR={sagemaker_root}/input/data/coco",
        f"BACKBONE.WEIGHTS={sagemaker_root}/input/data/weights/R50.npz", "--logdir", f"{sagemaker_root}/checkpoints",
    ]  # fmt: skip


@pytest.mark.quick
def test_sagemaker_entry_keeps_what_was_set_and_passes_flags_on(sagemaker_root):
    words = printed(
        "sagemaker_entry.py", "DATA.BASEDIR=/x", "--load", "m.npz", "--root", str(sagemaker_root), "--gpus", "0"
    )
    assert words[words.index("--config") :] == [
        "--config", "TRAINER=horovod", "DATA.BASEDIR=/x", "--logdir", f"{sagemaker_root}/checkpoints",
        "--load", "m.npz",
    ]  # fmt: skip
    assert words[words.index("--slots") + 1] == "1"


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.quick
@pytest.mark.parametrize(
    ("script", "words", "names"),
    [
        ("train_ec2.sh", ["8", "r50-fnp"], "unknown recipe 'r50-fnp': one of r50-fpn-box-quick, r50-c4-box, "),
        ("train_ec2.sh", ["r50-fpn"], "say how many GPUs"),
        ("train_ec2.sh", ["0", "r50-fpn", "--dry-run"], "GPUS=0 must be 1 or more"),
        ("train_ec2.sh", ["8"], "name a recipe"),
        ("train_ec2.sh", ["8", "r50-fpn", "r50-c4"], "one recipe is enough"),
        ("train_ec2.sh", ["8", "r50-fpn", "--data"], "--data needs a value"),
        ("train_ec2.sh", ["8", "r50-fpn", "--dat", "x"], "unknown option --dat"),
        ("train_ec2.sh", ["8", "r50-fpn", "--grace", "soon"], "--grace needs a number"),
        ("train_hosts.sh", ["a:8,b", "r50-fpn"], "'b' is not of the form HOST:GPUS"),
        ("train_hosts.sh", ["a:8,b:0", "r50-fpn"], "'b:0' is not of the form HOST:GPUS"),
        ("train_hosts.sh", ["r50-fpn"], "name the machines"),
        ("train.sbatch", ["r50-fpn"], "no Slurm job"),
        ("train.sbatch", ["r50-fpn", "--slots", "many"], "--slots needs a number"),
        ("train_kubernetes.sh", ["4", "8", "r50-fpn"], "--image is missing"),
        ("train_kubernetes.sh", ["4", "r50-fpn", "--image", "i"], "how many pods and GPUs"),
        ("train_kubernetes.sh", ["4", "8", "r50-fpn", "--image", "i", "--name", "My_Job"], "--name My_Job"),
        ("train_sagemaker.py", ["r5", "--image=i", "--role=r", "--data=s3://d", "--checkpoints=s3://c"], "recipe 'r5'"),
        ("sagemaker_entry.py", ["--root", "/nowhere"], "/nowhere/input/config/resourceconfig.json does not describe"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_refused_in_one_line_that_names_it(script, words, names):
    result = launch(script, *words)
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and names in lines[0], result.stderr
    assert result.stdout == ""


@pytest.mark.quick
@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=lambda p: p.name)
def test_shell_scripts_parse_and_are_clean(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        result = subprocess.run(["shellcheck", "-x", str(path)], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


@pytest.mark.quick
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.name)
def test_launchers_are_executable_and_explain_themselves(path):
    assert path.stat().st_mode & stat.S_IXUSR
    result = launch(path.name, "--help")
    assert result.returncode == 0 and path.name in result.stdout and len(result.stdout) > 500


@pytest.mark.quick
def test_training_on_several_hosts_checks_each_of_them_first(tmp_path):
    """`ssh` is a stand-in that runs the command here, or fails for one host."""
    ssh = tmp_path / "ssh"
    ssh.write_text(
        "#!/bin/sh\n"
        'for last; do host=$command; command=$last; done\n'
        'case $host in bad) echo "ssh: connect to host bad port 22: No route to host" >&2; exit 255;; esac\n'
        'case $host in old) echo different; exit 0;; esac\n'
        'exec sh -c "$command"\n'
    )  # fmt: skip
    ssh.chmod(0o755)
    # An interpreter that claims to have Horovod, and tells with what it was to start ranks.
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase $1 in *horovod_node.py) echo "ran $*";; -c) echo 0.28.1 2.0;;'
        f' *) exec {sys.executable} "$@";; esac\n'
    )
    python.chmod(0o755)
    common = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ["r50-fpn", "--python", str(python), "--grace", "7"]
    result = launch("train_hosts.sh", "127.0.0.1:1,two:2", *words, **common)
    assert result.returncode == 0, result.stderr
    started = sorted(line.split("--node-rank ")[1].split() for line in result.stdout.splitlines() if "ran" in line)
    assert [line[0] for line in started] == ["0", "1"]
    ports = {line[line.index("--port") + 1] for line in started}
    assert len(ports) == 1 and int(ports.pop()) > 1000
    assert all(line[line.index("--grace") + 1] == "7" for line in started)
    for hosts, more, message, code in (
        ("127.0.0.1:1,bad:2", [], "bad is not there: ssh: connect", 75),
        ("127.0.0.1:1,old:2", [], "old has another version", 2),
        ("127.0.0.1:1,two:2", ["--data", "/no/such/data"], "/no/such/data", 2),
        ("192.0.2.1:1,two:2", [], "the first machine, 192.0.2.1, must be this one: it is not an address", 2),
    ):
        result = launch("train_hosts.sh", hosts, *words, *more, **common)
        assert result.returncode == code and "ran" not in result.stdout
        assert len(result.stderr.splitlines()) == 1 and message in result.stderr


# ------------------------------------------------------------------------------------------------ machines and ranks
horovod_runner = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import horovod.runner"], capture_output=True).returncode != 0,
    reason="horovod is not installed: make horovod",
)


@horovod_runner
@pytest.mark.quick
@pytest.mark.parametrize("slots", [[1], [4], [2, 2], [1, 2, 3], [3, 1, 2], [8] * 4])
def test_ranks_are_numbered_as_horovodrun_numbers_them(slots):
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts

    from scripts.horovod_node import rank_environments

    ours = [e for node in range(len(slots)) for e in rank_environments(node, slots, "10.0.0.1", 1234, "eth0")]
    plan = get_host_assignments(parse_hosts(",".join(f"node{i}:{n}" for i, n in enumerate(slots))), sum(slots))
    assert len(ours) == len(plan)
    for environment, slot in zip(ours, plan):
        for field in ("hostname", "rank", "size", "local_rank", "local_size", "cross_rank", "cross_size"):
            assert environment[f"HOROVOD_{field.upper()}"] == str(getattr(slot, field)), field


class Machines:
    """Launchers of one job, all on this machine; a rank is `python -c program`."""

    def __init__(self, tmp_path):
        self.port, self.tmp_path, self.launchers = free_port(), tmp_path, {}

    def start(self, node, nodes, program, slots=1, *flags):
        self.launchers[node] = subprocess.Popen(
            [sys.executable, str(SCRIPTS / "horovod_node.py"), "--nodes", str(nodes), "--node-rank", str(node),
             "--port", str(self.port), "--slots", str(slots), "--poll", "0.2", *flags,
             "--", sys.executable, "-c", program],
            cwd=self.tmp_path, env=CLEAN, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self

    def wait_for(self, *files):
        deadline = time.monotonic() + 30
        while not all((self.tmp_path / f).exists() for f in files):
            assert time.monotonic() < deadline, [p.name for p in self.tmp_path.iterdir()]
            time.sleep(0.05)

    def ends(self, seconds=90):
        """{machine: (exit code, stderr)}"""
        result = {}
        for node, process in sorted(self.launchers.items()):
            _, err = process.communicate(timeout=seconds)
            result[node] = (process.returncode, err)
        return result


@pytest.fixture
def machines(tmp_path):
    machines = Machines(tmp_path)
    yield machines
    for process in machines.launchers.values():
        if process.poll() is None:
            process.terminate()
            process.wait(20)


ALIVE = "import os, time; open('up' + os.environ['HOROVOD_RANK'], 'w').close(); time.sleep(60)"


@horovod_runner
def test_every_rank_of_every_machine_runs_and_the_job_ends_well(machines):
    program = "import os; open('rank' + os.environ['HOROVOD_RANK'] + 'of' + os.environ['HOROVOD_SIZE'], 'w').close()"
    machines.start(1, 2, program, 2).start(0, 2, program, 1)
    assert [code for code, _ in machines.ends().values()] == [0, 0]
    assert sorted(p.name for p in machines.tmp_path.iterdir()) == ["rank0of3", "rank1of3", "rank2of3"]


@horovod_runner
@pytest.mark.parametrize("last_words", ["os.kill(os.getpid(), 9)", "os._exit(7)"])
def test_a_rank_that_dies_ends_all_machines_with_a_reason(machines, last_words):
    die = f"import os, time; time.sleep(1); {last_words}"
    began = time.monotonic()
    machines.start(0, 2, ALIVE, 2).start(1, 2, die)
    ends = machines.ends()
    assert time.monotonic() - began < 20
    reason = "rank 2 was killed by SIGKILL" if "kill" in last_words else "rank 2 ended with 7"
    code = 137 if "kill" in last_words else 7
    assert ends[0][0] == ends[1][0] == code and reason in ends[1][1]
    assert reason in ends[0][1] and " on machine 1 (127.0.0.1); ending" in ends[0][1]


@horovod_runner
def test_the_rank_that_failed_is_named_not_those_that_followed_it(machines):
    """train.py ends with 4 when another rank has ended, mostly before that one's launcher has looked."""
    fail = (
        "import os, time\nfirst = os.environ['HOROVOD_RANK'] == '2'\n"
        "time.sleep(2 if first else 1); os._exit(7 if first else 4)\n"
    )
    machines.start(0, 2, fail).start(1, 2, fail, 2)
    ends = machines.ends()
    assert [code for code, _ in ends.values()] == [7, 7]
    assert all("rank 2 ended with 7" in text and "ended with 4" not in text for _, text in ends.values())


@horovod_runner
def test_machines_whose_ranks_follow_a_lost_machine_say_so_soon(machines):
    follow = "import os, time; open('up' + os.environ['HOROVOD_RANK'], 'w').close(); time.sleep(1.5); os._exit(4)"
    machines.start(0, 3, follow).start(1, 3, ALIVE).start(2, 3, follow)
    machines.wait_for("up0", "up1", "up2")
    machines.launchers[1].kill()
    began = time.monotonic()
    ends = machines.ends()
    assert time.monotonic() - began < 7  # and not the 8 s after which a machine is silent
    for node in (0, 2):
        assert ends[node][0] == 75 and "machine 1 (127.0.0.1) has been silent" in ends[node][1]


@horovod_runner
def test_a_rank_that_was_told_to_stop_stops_all(machines):
    """As when a scheduler sends SIGTERM to every process of one machine."""
    save = (
        "import os, signal, sys, time\nrank = os.environ['HOROVOD_RANK']\n"
        "def save(*_):\n    open('saved' + rank, 'w').close(); os._exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "open('tmp' + rank, 'w').write(str(os.getpid())); os.rename('tmp' + rank, 'pid' + rank)\ntime.sleep(60)\n"
    )
    machines.start(0, 2, save).start(1, 2, save)
    machines.wait_for("pid0", "pid1")
    os.kill(int((machines.tmp_path / "pid1").read_text()), signal.SIGTERM)
    assert [code for code, _ in machines.ends().values()] == [143, 143]
    machines.wait_for("saved0", "saved1")


@horovod_runner
def test_what_ranks_say_is_marked_with_their_number_and_a_lost_connection_is_not_told_by_each(machines):
    program = (
        "import os, sys\n"
        "print('[1] Horovod background loop uncaught exception: Connection reset by peer', file=sys.stderr)\n"
        "print('hello from', os.environ['HOROVOD_RANK'], file=sys.stderr)\n"
    )
    machines.start(0, 1, program, 2)
    code, text = machines.ends()[0]
    assert code == 0
    assert sorted(line for line in text.splitlines() if "horovod_node" not in line) == [
        "[1] hello from 1",
        "hello from 0",
    ]


@horovod_runner
@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_one_machine_lets_every_rank_save(machines, told):
    save = (
        "import os, signal, sys, time\n"
        "rank = os.environ['HOROVOD_RANK']\n"
        "def save(*_):\n    time.sleep(1.5); open('saved' + rank, 'w').close(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "open('up' + rank, 'w').close()\n"
        "time.sleep(60)\n"
    )
    machines.start(0, 2, save).start(1, 2, save, 2)
    machines.wait_for("up0", "up1", "up2")
    machines.launchers[told].send_signal(signal.SIGTERM)
    assert [code for code, _ in machines.ends().values()] == [143, 143]
    machines.wait_for("saved0", "saved1", "saved2")


@horovod_runner
def test_a_rank_that_ignores_sigterm_is_killed_with_its_workers(machines):
    program = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open('worker.tmp', 'w').write(str(worker.pid)); os.rename('worker.tmp', 'worker')\n"
        "time.sleep(60)\n"
    )
    machines.start(0, 1, program, 1, "--grace", "1")
    machines.wait_for("worker")
    machines.launchers[0].send_signal(signal.SIGTERM)
    assert machines.ends()[0][0] == 143
    worker = Path("/proc") / (machines.tmp_path / "worker").read_text() / "status"
    assert not worker.exists() or "State:\tZ" in worker.read_text()


@horovod_runner
def test_a_machine_that_vanishes_with_its_store_ends_the_others(machines):
    machines.start(0, 2, ALIVE).start(1, 2, ALIVE)
    machines.wait_for("up0", "up1")
    machines.launchers[0].kill()
    ends = machines.ends()
    assert ends[1][0] == 75 and "machine 0 (127.0.0.1) does not answer any more" in ends[1][1]


@horovod_runner
def test_a_launcher_that_is_killed_takes_its_ranks_along(machines):
    machines.start(
        0, 1, "import os; open('pid.tmp', 'w').write(str(os.getpid())); os.rename('pid.tmp', 'pid');" + ALIVE
    )
    machines.wait_for("pid")
    rank = Path("/proc") / (machines.tmp_path / "pid").read_text() / "status"
    machines.launchers[0].kill()
    machines.ends()
    deadline = time.monotonic() + 5
    while rank.exists() and "State:\tZ" not in rank.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@horovod_runner
def test_a_machine_that_falls_silent_is_named(machines):
    machines.start(0, 2, ALIVE).start(1, 2, ALIVE)
    machines.wait_for("up0", "up1")
    machines.launchers[1].send_signal(signal.SIGSTOP)
    try:
        _, err = machines.launchers[0].communicate(timeout=30)
    finally:
        machines.launchers[1].kill()
    assert machines.launchers[0].returncode == 75 and "machine 1 (127.0.0.1) has been silent for 8 s" in err


@horovod_runner
def test_a_machine_that_does_not_come_is_named(machines):
    machines.start(0, 3, ALIVE, 1, "--wait", "3").start(2, 3, ALIVE, 1, "--wait", "3")
    ends = machines.ends()
    assert ends[0][0] == ends[2][0] == 75
    assert "machine 1 of 3 did not join within 3 s" in ends[0][1]
    assert not list(machines.tmp_path.iterdir())


@horovod_runner
def test_a_restarted_machine_waits_for_the_next_job_not_the_one_that_is_ending(machines):
    first = "import os, time; open('up' + os.environ['HOROVOD_RANK'], 'w').close(); time.sleep(4)"
    machines.start(0, 2, first).start(1, 2, first)
    machines.wait_for("up0", "up1")
    early = Machines(machines.tmp_path)
    early.port = machines.port
    second = "import os; open('again' + os.environ['HOROVOD_RANK'], 'w').close()"
    early.start(1, 2, second)
    assert [code for code, _ in machines.ends().values()] == [0, 0]
    assert early.launchers[1].poll() is None and not (machines.tmp_path / "again1").exists()
    early.start(0, 2, second)
    assert [code for code, _ in early.ends().values()] == [0, 0]
    machines.wait_for("again0", "again1")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--nodes", "2", "--node-rank", "2", "--", "x"], "--node-rank 2 is not one of the 2 machines"),
        (["--nodes", "2"], "the command to run is missing"),
        (["--slots", "0", "--", "x"], "must be 1 or more"),
    ],
)
def test_the_node_launcher_refuses_what_cannot_work(words, names):
    result = launch("horovod_node.py", *words)
    assert result.returncode == 2 and names in result.stderr


@horovod_runner
def test_slurm_requeues_a_stopped_job_and_not_a_broken_one(tmp_path):
    """`srun` is a stand-in that runs the launcher once for each machine; `scontrol` notes what it is asked."""
    slurm = slurm_stand_ins(tmp_path)
    # The interpreter of the ranks: stands in for `python train.py` and is python for the launcher.
    (tmp_path / "python").write_text(
        "#!/bin/sh\n"
        'case $1 in */train.py) echo "$PWD" > "$NOTES.$HOROVOD_RANK"; exec sh -c "$RANK";; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    (tmp_path / "python").chmod(0o755)
    notes = tmp_path / "notes"

    def job(rank):
        return subprocess.Popen(
            [str(SCRIPTS / "train.sbatch"), "r50-fpn", "--python", str(tmp_path / "python"), "--slots", "1"],
            env={**CLEAN, **slurm, "NOTES": str(notes), "RANK": rank}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    # Of one machine: a mistake, a rank that the kernel killed. They would come again.
    for words, code in (("exit 2", 2), ("kill -9 $$", 137)):
        broken = job(f'sleep 1; [ "$HOROVOD_RANK" = 0 ] || {words}; sleep 20')
        assert broken.wait(30) == code and not notes.exists()
        for i in (0, 1):
            (tmp_path / f"notes.{i}").unlink()
    lost = job("exit 75")
    assert lost.wait(30) == 75 and notes.read_text().startswith("requeue ")
    for name in ("notes", "notes.0", "notes.1"):
        (tmp_path / name).unlink()
    stopped = job("trap 'exit 0' TERM; while :; do sleep 0.2; done")
    deadline = time.monotonic() + 30
    while not (tmp_path / "notes.0").exists() or not (tmp_path / "notes.1").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(30) == 143
    assert notes.read_text().startswith("requeue ")
