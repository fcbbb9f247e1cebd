#!/usr/bin/env python3
"""Images per second that worker processes read from a folder, a .zip and a .tar of the same images.

benchmarks/archive_speed.py --images ~/data/coco/val2017 --rounds 5

The archives are made in a temporary folder beside the images. The three take turns, each read completely by
`--workers` processes that open them by themselves; the ratio is that of the medians. `--header` reads sizes only.
"""

import import_path

import argparse
import statistics
import sys
import tarfile
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tabulate import tabulate

from common import UserError, logger, write_json
from data import list_images, read_image
from utils.image_header import image_header_size


def read_all(files: list[str], header: bool, repeat: int) -> float:
    """Seconds to read all of them."""
    started = time.perf_counter()
    for _ in range(repeat):
        for file in files:
            (image_header_size if header else read_image)(file)
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="a folder of images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=1, help="times that each round reads all images")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--header", action="store_true", help="read sizes only")
    parser.add_argument("--json", help="also write the result there")
    args = parser.parse_args()
    try:
        files = [Path(f) for f in list_images([args.images])]
    except UserError as e:
        logger.error(str(e))
        return 2
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(args.workers) as pool:
        with zipfile.ZipFile(f"{scratch}/a.zip", "w") as z, tarfile.open(f"{scratch}/a.tar", "w") as t:
            for file in files:
                z.write(file, file.name)
                t.add(file, file.name)
        places = {"folder": args.images, "zip": f"{scratch}/a.zip", "tar": f"{scratch}/a.tar"}
        seconds: dict[str, list[float]] = {kind: [] for kind in places}
        for number in range(args.rounds + 1):
            for kind, place in places.items():
                names = [f"{place}/{file.name}" for file in files]
                parts = [names[w :: args.workers] for w in range(args.workers)]
                jobs = [pool.submit(read_all, part, args.header, args.repeat) for part in parts]
                took = max(job.result() for job in jobs)
                if number:  # the first round warms the page cache and opens the archives
                    seconds[kind].append(took)
    rates = {kind: len(files) * args.repeat / statistics.median(s) for kind, s in seconds.items()}
    ratio = {kind: statistics.median(f / s for f, s in zip(seconds["folder"], own)) for kind, own in seconds.items()}
    print(tabulate([[k, rates[k], ratio[k]] for k in places], ["from", "images/s", "of the folder's"], floatfmt=".3g"))
    if args.json:
        write_json(args.json, {"images_per_second": rates, "ratio": ratio, "images": len(files)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
