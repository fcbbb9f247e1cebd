"""Hosts on this machine for the tests of launchers: network namespaces with addresses and names, and an ssh server."""

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks.scaling import ADDRESSES, cable


def can_make_networks():
    if os.geteuid() != 0 or not shutil.which("ip"):
        return False
    made = subprocess.run(["ip", "netns", "add", "packrcnn-probe"], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", "packrcnn-probe"], check=True)
    return made


@pytest.fixture
def two_hosts():
    """Two network namespaces with one address each, joined by a cable; yields {name: address}."""
    with open(Path(tempfile.gettempdir()) / "packrcnn-networks.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other test processes use the same names
        if not can_make_networks():
            pytest.skip("network namespaces need root and iproute2")
        with cable() as names:
            yield dict(zip(names, ADDRESSES))


@pytest.fixture
def name_hosts(two_hosts):
    """name_hosts({host: {name: address}}): what the file /etc/hosts says on each of the two hosts."""
    folders = [Path("/etc/netns") / host for host in two_hosts]

    def write(names):
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            lines = [f"{address} {name}\n" for name, address in names[folder.name].items()]
            (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))

    try:
        yield write
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ssh_to_second_host(two_hosts, tmp_path):
    """An ssh server on the second host that admits a new key; yields horovodrun's options and the PATH to use it."""
    sshd = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin")
    if not sshd or not shutil.which("ssh"):
        pytest.skip("openssh-server is not installed")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    (tmp_path / "config").write_text(
        f"HostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\nPermitRootLogin yes\nStrictModes no\n"
        "UsePAM no\nPasswordAuthentication no\nPidFile none\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    # An ssh that leaves the known hosts of whoever runs the tests alone.
    ssh = tmp_path / "bin/ssh"
    ssh.parent.mkdir()
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -o UserKnownHostsFile={tmp_path}/known "$@"\n')
    ssh.chmod(0o755)
    second, address = list(two_hosts.items())[1]
    server = subprocess.Popen(
        ["ip", "netns", "exec", second, sshd, "-D", "-q", "-f", str(tmp_path / "config"), "-p", "2222"]
    )
    options = ["-p", "2222", "-i", str(tmp_path / "user")]
    login = ["ip", "netns", "exec", next(iter(two_hosts)), str(ssh), "-o", "BatchMode=yes"]
    login += ["-o", "StrictHostKeyChecking=no", *options, address]
    try:
        deadline = time.monotonic() + 20
        while subprocess.run([*login, "true"], capture_output=True).returncode:
            assert time.monotonic() < deadline, "the ssh server does not answer"
            time.sleep(0.2)
        yield options, f"{ssh.parent}:{os.environ['PATH']}"
    finally:
        server.terminate()
        server.wait(10)
