#!/usr/bin/env python3
"""Runs in each container of a SageMaker training job: starts its Horovod ranks with the given arguments of train.py.

SageMaker describes the machines in /opt/ml/input/config/resourceconfig.json and mounts a data channel NAME at
/opt/ml/input/data/NAME. Channel "coco" becomes DATA.BASEDIR and the one .npz of channel "weights" BACKBONE.WEIGHTS,
unless the arguments set them. Checkpoints go to /opt/ml/checkpoints, which SageMaker copies to and from S3, so that a
spot instance that is taken away costs no more than the steps since the last one. scripts/train_sagemaker.py starts it.
"""

import import_path

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from common import UserError, visible_gpus

REPOSITORY = Path(__file__).resolve().parent.parent

PORT = 23456


def node_command(root: Path, words: Sequence[str], gpus: int) -> list[str]:
    """The command of this container: `words` are KEY=VAL settings, then flags of train.py."""
    try:
        machines = json.loads((root / "input/config/resourceconfig.json").read_text())
        hosts, here = sorted(machines["hosts"]), machines["current_host"]
        interface = machines.get("network_interface_name", "eth0")
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{root}/input/config/resourceconfig.json does not describe the machines: {e!r}") from None
    first_flag = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    settings, flags = list(words[:first_flag]), list(words[first_flag:])
    if (root / "input/data/coco").is_dir() and not any(s.startswith("DATA.BASEDIR=") for s in settings):
        settings.append(f"DATA.BASEDIR={root}/input/data/coco")
    weights = sorted((root / "input/data/weights").glob("*.npz"))
    if weights and not any(s.startswith("BACKBONE.WEIGHTS=") for s in settings):
        if len(weights) > 1:
            raise UserError(f"channel weights holds {len(weights)} .npz files: say which with BACKBONE.WEIGHTS=PATH")
        settings.append(f"BACKBONE.WEIGHTS={weights[0]}")
    return [
        sys.executable, str(REPOSITORY / "scripts/horovod_node.py"), "--nodes", str(len(hosts)),
        "--node-rank", str(hosts.index(here)), "--master", hosts[0], "--port", str(PORT),
        "--slots", str(max(gpus, 1)), "--interface", interface, "--grace", "100", "--",
        sys.executable, str(REPOSITORY / "train.py"), "--config", "TRAINER=horovod", *settings,
        "--logdir", str(root / "checkpoints"), *flags,
    ]  # fmt: skip


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--root", type=Path, default=Path("/opt/ml"), help="where SageMaker mounts everything")
    parser.add_argument("--gpus", type=int, help="ranks on this machine; default: its GPUs, or 1")
    parser.add_argument("--dry-run", action="store_true", help="print the command and end")
    args, words = parser.parse_known_args(argv)
    command = node_command(args.root, words, visible_gpus() if args.gpus is None else args.gpus)
    if args.dry_run:
        print(shlex.join(command))
        return
    os.chdir(REPOSITORY)
    # Replaces this process, so that SageMaker's SIGTERM reaches the launcher of the ranks.
    os.execv(command[0], command)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as e:
        print(f"sagemaker_entry: {e}", file=sys.stderr)
        sys.exit(2)
