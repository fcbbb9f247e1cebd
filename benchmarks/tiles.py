#!/usr/bin/env python3
"""What tiles do to the scores of the demo's model, and what a very large image costs.

    python benchmarks/tiles.py score --load train_log/demo       (after `make demo`)
    python benchmarks/tiles.py memory --load train_log/demo      (draws a picture of 20,000 x 20,000 pixels, 1.2 GB)

score: the demo's held-out pictures, which fit into a tile or do not, and mosaics of them, in which objects are small.
memory: peak memory and time of --predict for one picture as a TIFF of tiles, a TIFF of strips and a JPEG.
"""

import import_path

import argparse
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from tabulate import tabulate

from common import UserError, errors_in_one_line, logger, path_argument, write_json
from demo.make_shapes import CATEGORY_IDS, draw_image, make_dataset
from utils.polygons import encode_runs, move_rle

__all__ = ["make_mosaics", "write_tiled_tiff"]

ROOT = Path(__file__).resolve().parent.parent
CELL = 224  # pixels of a picture's place in a mosaic


def make_mosaics(folder: Path, count: int, side: int, seed: int = 11) -> Path:
    """Writes `count` mosaics of side x side of the demo's pictures, and returns their annotation file."""
    images, annotations = [], []
    (folder / "mosaics").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        canvas = np.full((side * CELL, side * CELL, 3), 128, np.uint8)
        for cell in range(side * side):
            picture, found = draw_image(np.random.default_rng([seed, number, cell]))
            y, x = (v * CELL for v in divmod(cell, side))
            canvas[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
            for a in found:
                moved = _moved(a, x, y, picture.shape[:2], canvas.shape[:2])
                annotations.append({**moved, "id": len(annotations) + 1, "image_id": number + 1})
        name = f"{number + 1:03d}.png"
        cv2.imwrite(str(folder / "mosaics" / name), canvas)
        images.append({"id": number + 1, "file_name": name, "height": canvas.shape[0], "width": canvas.shape[1]})
    categories = [{"id": i, "name": name} for name, i in CATEGORY_IDS.items()]
    target = folder / "mosaics.json"
    write_json(target, {"images": images, "annotations": annotations, "categories": categories})
    return target


def _moved(a: dict, x: int, y: int, size: tuple[int, int], whole: tuple[int, int]) -> dict:
    left, top, width, height = a["bbox"]
    outline = a["segmentation"]
    if isinstance(outline, dict):
        counts = outline["counts"]
        if not isinstance(counts, str):
            counts = encode_runs(np.array(counts), *size)["counts"]
        outline = move_rle({"size": list(size), "counts": counts}, x, y, *whole)
    else:
        outline = [[v + (y if i % 2 else x) for i, v in enumerate(ring)] for ring in outline]
    return {**a, "bbox": [left + x, top + y, width, height], "segmentation": outline}


def _evaluate(load: str, folder: Path, sets: dict, name: str, settings: list[str]) -> dict:
    out = folder / "results.json"
    command = [sys.executable, str(ROOT / "train.py"), "--evaluate", str(out), "--load", load, "--config"]
    command += [f"DATA.BASEDIR={folder}", f"DATA.DATASETS={json.dumps(sets)}", f"DATA.VAL={name}", *settings]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return json.loads((folder / "results.metrics.json").read_text())


def score(load: str, folder: Path) -> None:
    make_dataset(folder)
    make_mosaics(folder, 4, 6)
    sets = {"val": ["annotations/instances_val.json", "val"], "mosaics": ["mosaics.json", "mosaics"]}
    rows = []
    for name, tiles in (("val", (0, 224, 128)), ("mosaics", (0, 192, 256))):
        for tile in tiles:
            m = _evaluate(load, folder, sets, name, [f"TEST.TILE={tile}"])
            rows.append([name, tile or "none", *(f"{100 * m[k]:.1f}" for k in ("bbox/AP", "bbox/AP50", "segm/AP"))])
            logger.info(f"{rows[-1]}")
    print(tabulate(rows, ["set", "tile", "box AP", "box AP50", "mask AP"], "github"))


def memory(load: str, folder: Path, side: int) -> None:
    rows = []
    for kind in ("small.png", "tiles.tif", "strips.tif", "photo.jpg"):
        path, size = folder / kind, 1024 if kind == "small.png" else side
        subprocess.run([sys.executable, __file__, "draw", "--work", str(path), "--side", str(size)], check=True)
        command = [sys.executable, str(ROOT / "train.py"), "--predict", str(path), "--load", load, "--output"]
        command += [str(folder / "out"), "--no-window", "--config", "TEST.TILE=1024", "TEST.BATCH_SIZE=4"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise UserError(f"{kind}: {said.splitlines()[-1]}")
        peak = usage.ru_maxrss / 2**20
        seconds = re.search(r"\(([\d.]+) s/image\)", said)[1]
        objects = re.search(r": (\d+) objects", said)[1]
        rows.append(
            [kind, f"{path.stat().st_size / 2**20:.0f} MiB", objects, f"{peak:.2f} GiB", f"{float(seconds):.0f} s"]
        )
        logger.info(f"{rows[-1]}")
        path.unlink()
    print(tabulate(rows, ["file", "size", "objects", "peak memory", "time"], "github"))


def draw(path: Path, side: int) -> None:
    """A picture of side x side pixels of the demo's shapes."""
    cells = [draw_image(np.random.default_rng([5, n]))[0] for n in range(40)]
    rng = np.random.default_rng(6)
    band = np.full((CELL, side, 3), 128, np.uint8)

    def next_band() -> np.ndarray:
        for x in range(0, side, CELL):
            cell = cells[rng.integers(len(cells))][:, : side - x]
            band[: cell.shape[0], x : x + cell.shape[1]] = cell
        return band

    if path.name == "tiles.tif":
        write_tiled_tiff(path, side, side, (next_band()[: min(CELL, side - y)] for y in range(0, side, CELL)))
        return
    whole = np.empty((side, side, 3), np.uint8)
    for y in range(0, side, CELL):
        whole[y : y + CELL] = next_band()[: side - y]
    if not cv2.imwrite(str(path), whole):
        raise UserError(f"{path} cannot be written")


def write_tiled_tiff(
    path: str | os.PathLike, height: int, width: int, bands: Iterable[np.ndarray], tile: int = 256
) -> None:
    """Writes bands uint8 BGR [h, width, 3], from top to bottom, as a TIFF of deflated tiles, without the whole image in
    memory."""
    offsets, sizes = [], []
    waiting = np.empty((0, width, 3), np.uint8)
    columns = -(-width // tile)

    def write_row(f: IO[bytes], rows: np.ndarray) -> None:
        padded = np.zeros((tile, columns * tile, 3), np.uint8)
        padded[: len(rows), :width] = rows[:, :, ::-1]
        for x in range(0, columns * tile, tile):
            content = zlib.compress(padded[:, x : x + tile].tobytes(), 1)
            offsets.append(f.tell())
            sizes.append(len(content))
            f.write(content + bytes(len(content) % 2))

    with open(path, "wb") as f:
        f.write(b"II*\0" + bytes(4))
        for band in bands:
            waiting = np.concatenate([waiting, band])
            while len(waiting) >= tile:
                write_row(f, waiting[:tile])
                waiting = waiting[tile:].copy()
        if len(waiting):
            write_row(f, waiting)
        lists = f.tell()
        f.write(struct.pack(f"<{len(offsets)}I", *offsets) + struct.pack(f"<{len(sizes)}I", *sizes))
        f.write(struct.pack("<3H", 8, 8, 8) + bytes(2))
        bits = lists + 8 * len(offsets)
        one = len(offsets) == 1  # a single value stands in the entry itself
        tags = [
            (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, bits), (259, 3, 1, 8), (262, 3, 1, 2), (277, 3, 1, 3),
            (322, 4, 1, tile), (323, 4, 1, tile), (324, 4, len(offsets), offsets[0] if one else lists),
            (325, 4, len(sizes), sizes[0] if one else lists + 4 * len(offsets)),
        ]  # fmt: skip
        start = f.tell()
        f.write(struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4))
        f.seek(4)
        f.write(struct.pack("<I", start))


@errors_in_one_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["score", "memory", "draw"])
    parser.add_argument("--load", type=path_argument, default="train_log/demo", help="the demo's model")
    parser.add_argument("--work", type=path_argument, help="folder for pictures (default: a temporary one)")
    parser.add_argument("--side", type=int, default=20000, help="pixels of the large picture's side")
    args = parser.parse_args()
    if args.what == "draw":
        draw(Path(args.work), args.side)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.work or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        score(args.load, folder) if args.what == "score" else memory(args.load, folder, args.side)
    return 0


if __name__ == "__main__":
    sys.exit(main())
