#!/usr/bin/env python3
"""Starts a training job on Amazon SageMaker: an example of an estimator that runs scripts/sagemaker_entry.py.

    pip install 'sagemaker<3'
    scripts/train_sagemaker.py r50-fpn --image ACCOUNT.dkr.ecr.REGION.amazonaws.com/packrcnn:1 --role ROLE_ARN \\
        --data s3://bucket/coco --weights s3://bucket/R50.npz --checkpoints s3://bucket/runs/r50-fpn \\
        --instance ml.p4d.24xlarge --count 2 TRAIN.LR_SCHEDULE=1x

The image holds the repository in /packrcnn (--directory) with its environment .venv and Horovod with NCCL. --data must
hold annotations/ and the image folders. The same command again, with the same --checkpoints, continues the run.
--dry-run prints the arguments of the estimator, the channels and what each container runs, and needs no account.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parent / "recipes.txt"


def recipe_settings(name: str) -> list[str]:
    """The KEY=VAL settings of a line of scripts/recipes.txt; ValueError names the known ones."""
    lines = [line.split() for line in RECIPES.read_text().splitlines() if line.strip() and not line.startswith("#")]
    recipes = {words[0]: words[1:] for words in lines}
    if name not in recipes:
        raise ValueError(f"unknown recipe '{name}': one of {', '.join(recipes)}")
    return recipes[name]


def estimator_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of sagemaker.estimator.Estimator."""
    arguments = {
        "image_uri": args.image,
        "role": args.role,
        "instance_type": args.instance,
        "instance_count": args.count,
        "volume_size": args.volume,
        "max_run": args.hours * 3600,
        "base_job_name": f"packrcnn-{args.recipe}",
        "checkpoint_s3_uri": args.checkpoints,
        "checkpoint_local_path": "/opt/ml/checkpoints",
        "container_entry_point": [f"{args.directory}/.venv/bin/python", f"{args.directory}/scripts/sagemaker_entry.py"],
        "container_arguments": [*recipe_settings(args.recipe), *args.settings],
    }
    if args.spot:
        # Waiting for capacity counts, too.
        arguments.update(use_spot_instances=True, max_wait=2 * args.hours * 3600)
    return arguments


def channels(args: argparse.Namespace) -> dict[str, str]:
    """{channel: S3 prefix}, mounted at /opt/ml/input/data/<channel>."""
    return {"coco": args.data, **({"weights": args.weights} if args.weights else {})}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a name of scripts/recipes.txt")
    parser.add_argument("settings", nargs="*", metavar="KEY=VAL", help="further settings")
    parser.add_argument("--image", required=True, help="container image in ECR")
    parser.add_argument("--role", required=True, help="IAM role that SageMaker takes on")
    parser.add_argument("--data", required=True, metavar="S3URI")
    parser.add_argument("--weights", metavar="S3URI", help="an .npz of ImageNet weights")
    parser.add_argument("--checkpoints", required=True, metavar="S3URI")
    parser.add_argument("--instance", default="ml.p4d.24xlarge", metavar="TYPE", help="default %(default)s")
    parser.add_argument("--count", type=int, default=1, help="number of machines")
    parser.add_argument("--volume", type=int, default=200, metavar="GB", help="disk of each machine")
    parser.add_argument("--hours", type=int, default=48, help="the job ends after so long (default %(default)s)")
    parser.add_argument("--spot", action="store_true", help="spot instances")
    parser.add_argument("--directory", default="/packrcnn", help="the repository in the image")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_intermixed_args(argv)
    bad = [setting for setting in args.settings if not re.match(r"[A-Z][A-Z0-9_.]*=", setting)]
    if bad:
        parser.error(f"'{bad[0]}' is not of the form KEY=VAL")
    for flag in ("data", "weights", "checkpoints"):
        if getattr(args, flag) and not getattr(args, flag).startswith("s3://"):
            parser.error(f"--{flag} {getattr(args, flag)} must be an s3:// address")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    arguments = estimator_arguments(args)
    if args.dry_run:
        print(json.dumps({"estimator": arguments, "channels": channels(args)}, indent=1))
        return
    try:
        from sagemaker.estimator import Estimator
    except ImportError:
        raise ValueError("the SageMaker SDK is missing: pip install 'sagemaker<3'") from None
    Estimator(**arguments).fit(channels(args))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as e:
        print(f"train_sagemaker: {e}", file=sys.stderr)
        sys.exit(2)
