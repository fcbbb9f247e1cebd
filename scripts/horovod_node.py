#!/usr/bin/env python3
"""Starts this machine's Horovod ranks, where a scheduler and not ssh starts one process per machine.

Slurm, Kubernetes and SageMaker start the same command on every machine, while `horovodrun` has to log in to each.
So run this once per machine with the training command, naming the same first machine everywhere:

    scripts/horovod_node.py --nodes 2 --master HOST0 --slots 8 -- ./train.py --config TRAINER=horovod MODE_FPN=True

Machine 0 holds the key-value store through which Horovod's gloo connects, and numbers the ranks machine by machine;
machines may differ in their number of slots. A rank that fails ends the ranks of every machine within seconds, and the
command's exit code is that rank's on all of them (137 for one killed by SIGKILL); it is 75 when a machine is lost: the
same command can continue there or elsewhere. SIGTERM or SIGINT to any of them (preemption, a drained machine) reaches
every rank as SIGTERM, which saves a checkpoint, and the exit code is 143. Like horovodrun's, the store has no
authentication: keep the port inside the cluster.
"""

import argparse
import contextlib
import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from typing import IO, Any

# Exit codes: of a wrong command line; when a machine is lost (EX_TEMPFAIL of sysexits.h, which no rank uses); of a
# stopped job (128 + 15).
USAGE, LOST, STOPPED = 2, 75, 143
# train.py's exit code after a rank elsewhere has ended: a consequence of a failure, not its cause.
FOLLOWED = 4
# A machine that does not report for this many rounds of --poll is lost: under a minute, since all others wait for it.
SILENT_ROUNDS = 40
# The same when ranks here have already noticed that another is gone.
SILENT_ROUNDS_AFTER_LOSS = 8
# Seconds for ranks to react when the job has failed: they may be inside a reduction that never ends.
ENDING_SECONDS = 5.0
# Environment variables in which schedulers number their machines.
NODE_RANK_VARIABLES = ("JOB_COMPLETION_INDEX", "SLURM_NODEID")

_libc = ctypes.CDLL(None)


def say(text: str) -> None:
    print(f"horovod_node: {text}", file=sys.stderr, flush=True)


class Failure(Exception):
    """An error with one line for the user, and the exit code."""

    def __init__(self, text: str, code: int = LOST):
        super().__init__(text)
        self.code = code


class Store:
    """Client of the key-value store of machine 0, which ranks use as well; values are JSON."""

    def __init__(self, host: str, port: int):
        self.url = f"http://{host}:{port}"
        # Requests within the cluster must not go through a proxy from the environment.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, key: str) -> Any:
        """The value; None when it is not set. ConnectionError when machine 0 does not answer."""
        return self._send(urllib.request.Request(f"{self.url}/launch/{key}"))

    def put(self, key: str, value: Any) -> None:
        data = json.dumps(value).encode()
        self._send(urllib.request.Request(f"{self.url}/launch/{key}", data=data, method="PUT"))

    def _send(self, request: urllib.request.Request) -> Any:
        try:
            with self.opener.open(request, timeout=5) as response:
                body = response.read()
                return json.loads(body) if body else None
        except urllib.error.HTTPError as e:
            if e.code == 404:
                return None
            raise ConnectionError(str(e)) from e
        except OSError as e:  # URLError and timeouts are OSErrors
            raise ConnectionError(str(e)) from e


def serve(port: int) -> int:
    """Starts the store in a daemon thread; returns its port, a free one for 0."""
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

    try:
        server = RendezvousHTTPServer(("", port), RendezvousHandler, 0)
    except OSError as e:
        raise Failure(f"port {port} cannot be opened ({e.strerror}): choose another with --port", USAGE) from None
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address[1]


def address_of(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        raise ConnectionError(f"{host}: no such machine") from None


def address_towards(host: str) -> str:
    """The address that this machine has in the network of `host`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address_of(host), 9))  # of a datagram socket: chooses the route, sends nothing
        return probe.getsockname()[0]


def interface_towards(host: str) -> str:
    """Name of the network interface through which this machine reaches `host`."""
    import psutil

    address = address_towards(host)
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    raise Failure(f"no network interface has the address {address}: name one with --interface", USAGE)


def rank_environments(node: int, slots: Sequence[int], master: str, port: int, interface: str) -> list[dict[str, str]]:
    """Horovod's environment variables for each rank of machine `node`; `slots` are the numbers of ranks of the
    machines.

    Ranks count up machine by machine. "cross" is the group of the ranks with the same number on their machines.
    """
    environments = []
    for local in range(slots[node]):
        peers = [i for i, count in enumerate(slots) if count > local]
        environments.append(
            {
                "HOROVOD_HOSTNAME": f"node{node}",
                "HOROVOD_RANK": str(sum(slots[:node]) + local),
                "HOROVOD_SIZE": str(sum(slots)),
                "HOROVOD_LOCAL_RANK": str(local),
                "HOROVOD_LOCAL_SIZE": str(slots[node]),
                "HOROVOD_CROSS_RANK": str(peers.index(node)),
                "HOROVOD_CROSS_SIZE": str(len(peers)),
                "HOROVOD_GLOO_RENDEZVOUS_ADDR": master,
                "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
                "HOROVOD_GLOO_IFACE": interface,
                "HOROVOD_CONTROLLER": "gloo",
                "HOROVOD_CPU_OPERATIONS": "gloo",
                "PYTHONUNBUFFERED": "1",
            }
        )
    return environments


def join(store: Store, args: argparse.Namespace, stopped: Callable[[], bool]) -> tuple[list[int], list[str]]:
    """Waits until every machine is there; returns the number of ranks and the address of each, --master for machine 0.

    A machine that was restarted may still find the store of the job that is just ending: it registers again and again
    until a plan includes this very process.
    """
    node, nodes = args.node_rank, args.nodes
    me = uuid.uuid4().hex
    deadline = time.monotonic() + args.wait
    present: set[int] = set()
    while time.monotonic() < deadline:
        if stopped():
            raise Failure("stopped before the start", STOPPED)
        with contextlib.suppress(ConnectionError):
            plan = store.get("plan")
            if plan is None:
                address = address_towards(args.master) if node else args.master
                store.put(f"node{node}", [me, args.slots, address])
            elif plan["ids"][node] == me:
                return plan["slots"], plan["addresses"]
            if node == 0 and plan is None:
                entries = [store.get(f"node{i}") for i in range(nodes)]
                present = {i for i, entry in enumerate(entries) if entry}
                if len(present) == nodes:
                    ids, slots, addresses = zip(*entries)
                    store.put("plan", {"ids": ids, "slots": slots, "addresses": addresses})
                    continue
        time.sleep(args.poll / 2)
    if node == 0:
        missing = ", ".join(str(i) for i in range(nodes) if i not in present)
        raise Failure(f"machine {missing} of {nodes} did not join within {args.wait:.0f} s: is port {args.port} open?")
    raise Failure(f"no job started within {args.wait:.0f} s at {store.url}: is machine 0 up and the port open?")


class Ranks:
    """The rank processes of this machine, each the leader of its own process group (with its data workers)."""

    def __init__(self, command: Sequence[str], environments: Sequence[dict[str, str]]):
        self.numbers = [int(e["HOROVOD_RANK"]) for e in environments]
        # Rank 0 keeps a terminal, for its progress bar.
        direct = [number == 0 and sys.stderr.isatty() for number in self.numbers]
        self.processes = [
            # Its own session: Ctrl-C at a terminal must reach the rank only once, through this launcher.
            subprocess.Popen(
                command, env={**os.environ, **environment}, start_new_session=True, preexec_fn=die_with_parent,
                stderr=None if terminal else subprocess.PIPE,
            )
            for environment, terminal in zip(environments, direct)
        ]  # fmt: skip
        self.relays = [
            threading.Thread(target=relay, args=(process.stderr, number), daemon=True)
            for process, number in zip(self.processes, self.numbers)
            if process.stderr
        ]
        for thread in self.relays:
            thread.start()

    def codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def failed(self) -> tuple[str, int] | None:
        """(what happened, exit code) of the rank that failed; if several failed, of one that failed first."""
        bad = [(code == FOLLOWED, code > 0, number, code) for number, code in zip(self.numbers, self.codes()) if code]
        if not bad:
            return None
        *_, number, code = min(bad)
        if code > 0:
            return f"rank {number} ended with {code}", code
        why = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"rank {number} was killed by {signal_name(-code)}{why}", 128 - code

    def signal(self, number: int) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                if process.poll() is None:
                    # SIGTERM goes to the rank, which then ends its workers; SIGKILL goes to all remaining processes.
                    (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)

    def end(self, seconds: float) -> None:
        """Sends SIGTERM, waits up to `seconds`, then sends SIGKILL to the remaining processes, including workers."""
        self.signal(signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and None in self.codes():
            time.sleep(0.1)
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for thread in self.relays:
            thread.join(2.0)


def relay(stream: IO[bytes], rank: int) -> None:
    """Prints a rank's messages line by line, marked with its number unless it is 0."""
    mark = b"[%d] " % rank if rank else b""
    for line in stream:
        # Horovod's message that another rank is gone, just before the rank ends for that reason.
        if b"background loop uncaught exception" in line and b"by peer" in line:
            continue
        sys.stderr.buffer.write(mark + line)
        sys.stderr.buffer.flush()


def die_with_parent() -> None:
    """Runs in a new process: Linux kills it when its parent dies, so that no rank of a lost job keeps a GPU."""
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def supervise(
    ranks: Ranks, store: Store, args: argparse.Namespace, addresses: Sequence[str], stopped: Callable[[], bool]
) -> int:
    """Waits for the ranks of all machines; returns the exit code. Machines exchange their states through the store."""
    node, nodes = args.node_rank, args.nodes
    machines = [f"machine {i} ({address})" for i, address in enumerate(addresses)]
    # Machine 0 holds the store: it leaves last, when the others have read how the job ended.
    linger = 3 * args.poll if node == 0 and nodes > 1 else 0
    answered = time.monotonic()
    heard = {i: (time.monotonic(), None) for i in range(nodes)}
    stopping_since = followed_since = None

    def end(text: str, code: int) -> int:
        say(text)
        ranks.end(min(args.grace, ENDING_SECONDS))
        time.sleep(linger)
        return code

    while True:
        codes = ranks.codes()
        done = all(code == 0 for code in codes)
        problem = ranks.failed() if stopping_since is None else None
        if problem and problem[1] == FOLLOWED:
            # The cause is a rank that is still ending here, or one on another machine, which reports it or stops
            # answering.
            followed_since = followed_since or time.monotonic()
            problem = None
        saved = problem is not None and problem[1] in (128 + signal.SIGHUP, 128 + signal.SIGINT, 128 + signal.SIGTERM)
        if saved:
            say(problem[0])
            problem = None
        if problem:
            if problem[1] < 128:
                # A failure of another program may be a consequence as well: wait for that machine's reason first.
                time.sleep(args.poll)
            earlier = stop = None
            with contextlib.suppress(ConnectionError):
                earlier, stop = store.get("failure"), store.get("stop") or stopped()
                if not earlier and not stop:
                    store.put("failure", [f"{problem[0]} on {machines[node]}", problem[1]])
            if stop:
                return end("stopped", STOPPED)
            text, code = earlier or problem
            return end(f"{text}; ending the job", code)
        rounds = SILENT_ROUNDS if followed_since is None else SILENT_ROUNDS_AFTER_LOSS
        silent_seconds = rounds * args.poll
        try:
            # [a counter that moves while this machine lives, whether its ranks are done]
            store.put(f"state{node}", [time.time(), done])
            states = [store.get(f"state{i}") for i in range(nodes)] if node == 0 else []
            all_done = all(s and s[1] for s in states) if node == 0 else bool(store.get("done"))
            if node == 0 and all_done:
                store.put("done", True)
            failure = store.get("failure")
            stop = store.get("stop")
            if (stopped() or saved) and not stop:
                store.put("stop", True)
                stop = True
            answered = time.monotonic()
        except ConnectionError:
            states, failure, stop, all_done = [], None, stopped() or saved, done
            if not done and time.monotonic() - answered > min(silent_seconds, SILENT_ROUNDS * args.poll / 3):
                failure = [f"{machines[0]} does not answer any more", LOST]
        for i, state in enumerate(states):
            if state and state != heard[i][1]:
                heard[i] = (time.monotonic(), state)
            elif time.monotonic() - heard[i][0] > silent_seconds and not (state and state[1]):
                failure = [f"{machines[i]} has been silent for {silent_seconds:.0f} s", LOST]
                with contextlib.suppress(ConnectionError):
                    store.put("failure", failure)
        if failure:
            return end(f"{failure[0]}; ending the ranks here", failure[1])
        if followed_since is not None and time.monotonic() - followed_since > 3 * silent_seconds:
            return end("another rank is gone and no machine reports why; ending the ranks here", LOST)
        if stop and stopping_since is None:
            stopping_since = time.monotonic()
            say(f"stopping: SIGTERM to the ranks, {args.grace:.0f} s to save")
            ranks.signal(signal.SIGTERM)
        if stopping_since is not None and (None not in codes or time.monotonic() - stopping_since > args.grace):
            ranks.end(0)
            time.sleep(linger)
            return STOPPED
        if done and all_done:
            time.sleep(linger)
            return 0
        time.sleep(args.poll)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of machines")
    parser.add_argument(
        "--node-rank", type=int, metavar="R",
        help="number of this machine, 0 first; default: $" + " or $".join(NODE_RANK_VARIABLES),
    )  # fmt: skip
    parser.add_argument("--master", default="127.0.0.1", metavar="HOST", help="name or address of machine 0")
    parser.add_argument("--port", type=int, help="port of machine 0; default: 23456, or a free one for one machine")
    parser.add_argument("--slots", type=int, default=1, metavar="N", help="ranks on this machine: its number of GPUs")
    parser.add_argument("--interface", metavar="NAME", help="network interface; default: the one that reaches HOST")
    parser.add_argument("--wait", type=float, default=900, metavar="S", help="seconds for all machines to join")
    parser.add_argument(
        "--grace", type=float, default=100, metavar="S", help="seconds to save a checkpoint when stopped"
    )
    parser.add_argument("--poll", type=float, default=1, metavar="S", help="seconds between looks at the others")
    parser.add_argument("--dry-run", action="store_true", help="print what each rank here would run, and end")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command of a rank")
    args = parser.parse_args(argv)
    args.command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if args.node_rank is None:
        args.node_rank = next((int(os.environ[v]) for v in NODE_RANK_VARIABLES if os.environ.get(v, "").isdigit()), 0)
    if args.port is None:
        args.port = 0 if args.nodes == 1 else 23456
    if not args.command:
        parser.error("the command to run is missing: put it behind --")
    if args.nodes < 1 or args.slots < 1:
        parser.error("--nodes and --slots must be 1 or more")
    if not 0 <= args.node_rank < args.nodes:
        parser.error(f"--node-rank {args.node_rank} is not one of the {args.nodes} machines 0 … {args.nodes - 1}")
    return args


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    if args.dry_run:
        interface = args.interface or "IFACE"
        for environment in rank_environments(
            args.node_rank, [args.slots] * args.nodes, args.master, args.port, interface
        ):
            print(shlex.join(["env"] + [f"{k}={v}" for k, v in environment.items()] + args.command))
        return 0
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda *_: stop.set())
    try:
        import horovod.runner  # noqa: F401
    except ImportError:
        raise Failure(f"horovod is missing in {sys.executable}: run `make horovod`", USAGE) from None
    if args.node_rank == 0:
        args.port = serve(args.port)
    # Machine 0 may be unable to resolve the name by which others reach it.
    store = Store("127.0.0.1" if args.node_rank == 0 else args.master, args.port)
    slots, addresses = join(store, args, stop.is_set)
    # Machine 0's own name may resolve to a loopback address there, which no other machine can reach.
    peer = args.master if args.node_rank else (addresses[1] if args.nodes > 1 else "127.0.0.1")
    try:
        address = address_of(args.master) if args.node_rank else "127.0.0.1"
        interface = args.interface or interface_towards(peer)
    except ConnectionError as e:
        raise Failure(str(e), USAGE) from None
    # NCCL must also use the network that connects the machines.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    # Ranks that start while others still read their annotations must not give up after Horovod's 30 s.
    os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", "300")
    if args.node_rank == 0:
        say(f"{sum(slots)} ranks on {len(slots)} machine(s), interface {interface}")
    ranks = Ranks(args.command, rank_environments(args.node_rank, slots, address, args.port, interface))
    try:
        return supervise(ranks, store, args, addresses, stop.is_set)
    finally:
        ranks.end(0)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Failure as failure:
        say(str(failure))
        sys.exit(failure.code)
