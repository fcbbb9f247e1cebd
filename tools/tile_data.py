#!/usr/bin/env python3
"""Cuts the large images of a COCO-format data set into overlapping tiles to train on, and takes results back.

    tools/tile_data.py cut photos/train.json photos/ --tile 1024 --output tiles
    tools/tile_data.py join tiles/annotations.json --output back.json
    tools/tile_data.py join tiles/annotations.json --results results.json --output back.json

`cut` writes tiles/annotations.json and tiles/images/. Objects wholly inside a tile keep their polygons. Others become
run-length masks of exactly those pixels of the object that lie in the tile, or polygons with --polygons. Pieces of
which less than --min-visible is seen become crowd regions, which are neither trained as objects nor as background.
Every tile and every piece notes where it comes from, so that `join` can put the pieces together again: annotations,
also after they were corrected in the tiles, or a model's results of the tiles, in the frame of the original images.
"""

import import_path

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as coco_mask

from common import (
    UserError,
    atomic_write,
    check_output_file,
    check_output_folder,
    errors_in_one_line,
    logger,
    path_argument,
    read_json,
    write_json,
)
from detections import coco_results
from eval import write_results
from predict_tiles import Found, ImageParts, View, merge_views, open_parts, tile_views
from utils.coco_format import as_results, read_truth
from utils.image_header import decode_image
from utils.polygons import clip_ring, encode_segmentation, move_rle, unite_rles

__all__ = ["cut_annotation", "cut_annotations", "join_annotations", "join_results"]

_DECIMALS = 6  # of coordinates: moving them there and back gives the same numbers


# ------------------------------------------------------------------------------------------------------------- cutting
def cut_annotations(
    content: dict[str, Any], tile: int, overlap: float, min_visible: float = 0.2, as_polygons: bool = False
) -> dict[str, Any]:
    """The content of an annotation file (of `read_truth`, with sizes) for tiles of its images.

    Each image has the key `tile`: x, y, and the original's image_id, file_name, height and width. Each annotation has
    the key `cut`: the original's annotation_id and iscrowd, and which share of it is visible.
    """
    objects = defaultdict(list)
    for a in content["annotations"]:
        objects[a["image_id"]].append(a)
    images, annotations = [], []
    names: set[str] = set()
    for image in content["images"]:
        first = len(images)
        views = tile_views(image["height"], image["width"], tile, overlap)
        for view in views:
            original = {"image_id": image["id"], **{k: image[k] for k in ("file_name", "height", "width")}}
            images.append({
                **image, "id": len(images) + 1, "file_name": _tile_name(image, view, names), "height": view.height,
                "width": view.width, "tile": {"x": view.x, "y": view.y, **original},
            })  # fmt: skip
        for a in objects[image["id"]]:
            mask = _mask_of(a, image["height"], image["width"])
            for n, view in enumerate(views, first + 1):
                piece = cut_annotation(a, mask, view, min_visible, as_polygons)
                if piece is not None:
                    annotations.append({**piece, "id": len(annotations) + 1, "image_id": n})
    return {**content, "images": images, "annotations": annotations}


def _tile_name(image: dict[str, Any], view: View, names: set[str]) -> str:
    stem = str(Path(str(image["file_name"])).with_suffix("")).replace("/", "_").replace("\\", "_").strip("._")
    name = f"{stem}_{view.x}_{view.y}"
    if name in names:  # a.jpg and a.png
        name = f"{stem}_id{image['id']}_{view.x}_{view.y}"
    names.add(name)
    return f"{name}.png"


def _mask_of(a: dict[str, Any], height: int, width: int) -> dict[str, Any] | None:
    """The RLE of an annotation's outline; None without one."""
    return _text(encode_segmentation(a["segmentation"], height, width)) if a.get("segmentation") else None


def _text(rle: dict[str, Any]) -> dict[str, Any]:
    counts = rle["counts"]
    return {"size": [int(v) for v in rle["size"]], "counts": counts if isinstance(counts, str) else counts.decode()}


def cut_annotation(
    a: dict[str, Any], mask: dict[str, Any] | None, view: View, min_visible: float = 0.2, as_polygons: bool = False
) -> dict[str, Any] | None:
    """What is seen of an annotation in a tile, in the tile's frame; None if nothing. mask: its RLE, if it has one."""
    x, y, width, height = view
    left, top, w, h = a["bbox"]
    inside = left >= x and top >= y and left + w <= x + width and top + h <= y + height
    piece = {k: v for k, v in a.items() if k not in ("segmentation", "keypoints", "num_keypoints")}
    visible = 1.0
    if mask is not None:
        m_left, m_top, m_w, m_h = coco_mask.toBbox(mask).tolist()
        if m_left >= x + width or m_top >= y + height or m_left + m_w <= x or m_top + m_h <= y or not m_w * m_h:
            return None
        part = move_rle(mask, -x, -y, height, width)
        seen, whole = int(coco_mask.area(part)), int(coco_mask.area(mask))
        if seen == 0:
            return None
        visible = seen / whole
        inside = inside and seen == whole
        piece["segmentation"] = _cut_outline(a["segmentation"], part, view, seen == whole, as_polygons)
        if not inside:
            piece["bbox"], piece["area"] = coco_mask.toBbox(part).tolist(), float(seen)
    elif not inside:
        x1, y1, x2, y2 = max(left, x), max(top, y), min(left + w, x + width), min(top + h, y + height)
        if x2 <= x1 or y2 <= y1:
            return None
        visible = (x2 - x1) * (y2 - y1) / (w * h)
        piece["bbox"], piece["area"] = _rounded([x1 - x, y1 - y, x2 - x1, y2 - y1]), a["area"] * visible
    if inside:
        piece["bbox"] = _rounded([left - x, top - y, w, h])
    if a.get("keypoints"):
        points = np.reshape(a["keypoints"], (-1, 3)).astype(float)
        place = points[:, :2] + 0.5  # COCO's keypoints are pixels, whose centres lie half a pixel further
        gone = ((place < [x, y]) | (place >= [x + width, y + height])).any(1) | (points[:, 2] <= 0)
        points[:, :2] -= [x, y]
        points[gone] = 0
        piece["keypoints"], piece["num_keypoints"] = _rounded(points.ravel()), int((points[:, 2] > 0).sum())
    elif "keypoints" in a:
        piece["keypoints"], piece["num_keypoints"] = [], 0
    piece["cut"] = {"annotation_id": a.get("id"), "iscrowd": a["iscrowd"], "visible": round(visible, 6)}
    if visible < min_visible:
        piece["iscrowd"] = 1
    return piece


def _cut_outline(outline: Any, part: dict[str, Any], view: View, whole: bool, as_polygons: bool) -> Any:
    """The outline of a piece: polygons where they have exactly its pixels or are wanted, else its RLE."""
    rings = outline if isinstance(outline, list) and not any(isinstance(r, dict) for r in outline) else None
    if rings is None:
        return part
    moved = [_rounded(np.reshape(r, (-1, 2)) - [view.x, view.y]) for r in rings]
    if whole and _text(encode_segmentation(moved, view.height, view.width)) == part:
        return moved
    if as_polygons:
        clipped = [clip_ring(np.reshape(r, (-1, 2)), view.height, view.width) for r in moved]
        clipped = [_rounded(r) for r in clipped if len(r)]
        return clipped or part
    return part


def _rounded(values: Any) -> list[float]:
    return [round(v, _DECIMALS) for v in np.asarray(values, float).ravel().tolist()]


# ------------------------------------------------------------------------------------------------------------- joining
def _originals(content: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[Any, View]]:
    """(entries of the original images, the view of each tile by its id)."""
    images, views = {}, {}
    for image in content["images"]:
        try:
            t = image["tile"]
            original = {**image, "id": t["image_id"], **{k: t[k] for k in ("file_name", "height", "width")}}
            views[image["id"]] = View(int(t["x"]), int(t["y"]), int(image["width"]), int(image["height"]))
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"image {image['id']!r} does not say which part of an original it is: `tile_data.py cut` writes that"
            ) from None
        original.pop("tile")
        images.setdefault(t["image_id"], original)
    return list(images.values()), views


def join_annotations(content: dict[str, Any]) -> dict[str, Any]:
    """The content of the tiles' annotation file (of `read_truth`) in the frame of the original images: pieces of one
    annotation are united; what was added in a tile is an annotation of its own."""
    images, views = _originals(content)
    of_tile = {image["id"]: image["tile"] for image in content["images"]}
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for n, a in enumerate(content["annotations"]):
        cut = a.get("cut") or {}
        known = cut.get("annotation_id")
        own = ("new", n) if known is None else (of_tile[a["image_id"]]["image_id"], known, a["category_id"])
        groups[own].append(a)
    taken = {key[1] for key in groups if key[0] != "new" and isinstance(key[1], int)}
    free = max(taken, default=0)
    joined = []
    for key, pieces in groups.items():
        original = of_tile[pieces[0]["image_id"]]
        if key[0] == "new":
            free += 1
        one = _join_pieces(pieces, views, original["height"], original["width"])
        joined.append({**one, "id": free if key[0] == "new" else key[1], "image_id": original["image_id"]})
    return {**content, "images": images, "annotations": joined}


def _join_pieces(pieces: Sequence[dict[str, Any]], views: dict[Any, View], height: int, width: int) -> dict[str, Any]:
    """One annotation of its pieces; a piece that shows all of it is taken as it is."""
    with_points = [a for a in pieces if a.get("keypoints")]  # a point may lie beside the box
    whole = [a for a in pieces if (a.get("cut") or {"visible": 1})["visible"] == 1]
    pieces = whole[:1] or pieces
    lead = max(pieces, key=lambda a: (a.get("cut") or {"visible": 1})["visible"])
    joined = {k: v for k, v in lead.items() if k != "cut"}
    joined["iscrowd"] = (lead.get("cut") or lead)["iscrowd"]
    boxes = []
    for a in pieces:
        view, (x, y, w, h) = views[a["image_id"]], a["bbox"]
        boxes.append([x + view.x, y + view.y, x + view.x + w, y + view.y + h])
    x1, y1, x2, y2 = [*np.min(boxes, 0)[:2].tolist(), *np.max(boxes, 0)[2:].tolist()]
    joined["bbox"] = _rounded([x1, y1, x2 - x1, y2 - y1])
    outlined = [a for a in pieces if a.get("segmentation")]
    if len(pieces) > 1:
        joined["area"] = joined["bbox"][2] * joined["bbox"][3]
    if outlined:
        outline = outlined[0]["segmentation"]
        if len(outlined) == 1 and isinstance(outline, list) and not any(isinstance(r, dict) for r in outline):
            view = views[outlined[0]["image_id"]]
            joined["segmentation"] = [_rounded(np.reshape(r, (-1, 2)) + [view.x, view.y]) for r in outline]
        else:
            masks = [_moved_mask(a, views[a["image_id"]], height, width) for a in outlined]
            joined["segmentation"] = unite_rles(masks)
            joined["area"] = float(coco_mask.area(joined["segmentation"]))
    if with_points:
        points = np.zeros((len(with_points[0]["keypoints"]) // 3, 3))
        for a in with_points:
            view, own = views[a["image_id"]], np.reshape(a["keypoints"], (-1, 3)).astype(float)
            new = (own[:, 2] > 0) & (points[:, 2] == 0)
            points[new] = own[new] + [view.x, view.y, 0]
        joined["keypoints"], joined["num_keypoints"] = _rounded(points.ravel()), int((points[:, 2] > 0).sum())
    return joined


def _moved_mask(a: dict[str, Any], view: View, height: int, width: int) -> dict[str, Any]:
    """The mask of an annotation or a result of a tile, in the frame of the original."""
    mask = _text(encode_segmentation(a["segmentation"], view.height, view.width))
    return move_rle(mask, view.x, view.y, height, width)


def join_results(
    content: dict[str, Any], results: Sequence[dict[str, Any]], threshold: float = 0.5, limit: int = 1000
) -> list[dict[str, Any]]:
    """Results of the tiles (of `as_results`), merged as predictions with TEST.TILE are, for the original images."""
    images, views = _originals(content)
    by_tile = defaultdict(list)
    for r in results:
        by_tile[r["image_id"]].append(r)
    tiles_of = defaultdict(list)
    for image in content["images"]:
        tiles_of[image["tile"]["image_id"]].append(image["id"])
    categories = [c["id"] for c in content["categories"]]
    labels = {c: n for n, c in enumerate(categories, 1)}
    joined = []
    for image in images:
        size = image["height"], image["width"]
        found = [_found(by_tile[t], views[t], labels, *size) for t in tiles_of[image["id"]]]
        merged = merge_views(found, *size, threshold, False, limit)
        joined += coco_results(merged, image["id"], lambda label: categories[label - 1])
    return joined


def _found(results: Sequence[dict[str, Any]], view: View, labels: dict[Any, int], height: int, width: int) -> Found:
    results = sorted(results, key=lambda r: -r["score"])
    masks = keypoints = None
    if any(r.get("segmentation") for r in results):
        masks = [_moved_mask(r, view, height, width) for r in results]
    boxes = [r.get("bbox") or coco_mask.toBbox(_mask_of(r, view.height, view.width)).tolist() for r in results]
    boxes = np.array(boxes, np.float64).reshape(-1, 4) + [view.x, view.y, 0, 0]
    boxes[:, 2:] += boxes[:, :2]
    if any(r.get("keypoints") for r in results):
        keypoints = np.array([r["keypoints"] for r in results], np.float32).reshape(len(results), -1, 3)
        keypoints[..., :2] += np.float32([view.x + 0.5, view.y + 0.5])
    scores = np.array([r["score"] for r in results], np.float32)
    names = np.array([labels[r["category_id"]] for r in results], np.int32)
    return Found(view, boxes, scores, names, masks, keypoints)


# -------------------------------------------------------------------------------------------------------------- images
def _open(folder: Path, image: dict[str, Any]) -> ImageParts:
    """The image in the orientation of its annotations."""
    path, size = folder / image["file_name"], (image["height"], image["width"])
    parts = open_parts(path)
    if (parts.height, parts.width) != size:
        parts = open_parts(decode_image(path, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION))
    if (parts.height, parts.width) != size:
        raise UserError(
            f"image {path} is {parts.width}x{parts.height} pixels but the annotations say {size[1]}x{size[0]} (width x "
            "height); correct the json or the file"
        )
    return parts


def write_tiles(content: dict[str, Any], tiles: dict[str, Any], folder: Path, output: Path) -> None:
    """Writes the images of `tiles`, which were cut from those of `content` in `folder`."""
    of_image = defaultdict(list)
    for t in tiles["images"]:
        of_image[t["tile"]["image_id"]].append(t)
    for n, image in enumerate(content["images"], 1):
        if not of_image[image["id"]]:
            continue
        parts = _open(folder, image)
        for t in of_image[image["id"]]:
            pixels = parts.read(t["tile"]["x"], t["tile"]["y"], t["width"], t["height"])
            encoded = cv2.imencode(Path(t["file_name"]).suffix, pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
            with atomic_write(output / t["file_name"], "wb", durable=False) as f:
                f.write(encoded.tobytes())
        logger.info(f"{n}/{len(content['images'])} {image['file_name']}: {len(of_image[image['id']])} tiles")


def _cut(args: argparse.Namespace) -> None:
    if not 0 <= args.overlap <= 0.9 or not 0 <= args.min_visible <= 1 or not 16 <= args.tile <= 65535:
        raise UserError("--tile must be from 16 to 65535, --overlap from 0 to 0.9, --min-visible from 0 to 1")
    output = Path(args.output)
    target = output / "annotations.json"
    check_output_folder(output, "--output")
    if target.exists():
        raise UserError(f"{target} exists already; move it away, or choose another folder with --output")
    content = read_truth(args.annotations, need_size=True)
    tiles = cut_annotations(content, args.tile, args.overlap, args.min_visible, args.polygons)
    if args.drop_empty:
        used = {a["image_id"] for a in tiles["annotations"]}
        tiles["images"] = [t for t in tiles["images"] if t["id"] in used]
    if args.jpeg:
        for t in tiles["images"]:
            t["file_name"] = str(Path(t["file_name"]).with_suffix(".jpg"))
    write_tiles(content, tiles, Path(args.images), output / "images")
    write_json(target, tiles)  # last: it says that all images are there
    pieces = len(tiles["annotations"])
    logger.info(
        f"{len(content['images'])} images are {len(tiles['images'])} tiles, {len(content['annotations'])} annotations "
        f"{pieces} pieces, in {target} and {output / 'images'}"
    )


def _join(args: argparse.Namespace) -> None:
    check_output_file(args.output, "--output")
    if args.results is None:
        joined = join_annotations(read_truth(args.annotations, need_size=True))
        write_json(args.output, joined)
        logger.info(f"{len(joined['annotations'])} annotations of {len(joined['images'])} images in {args.output}")
        return
    content = read_truth(args.annotations, need_size=True)
    results = as_results(read_json(args.results, "results file"), content, f"results file {args.results}")
    joined = join_results(content, results, args.threshold, args.limit)
    write_results(args.output, joined)
    logger.info(f"{len(results)} results of tiles are {len(joined)} of original images, in {args.output}")


@errors_in_one_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cut = commands.add_parser("cut", help="large images and their annotations into tiles")
    cut.add_argument("annotations", type=path_argument, help="COCO-format json")
    cut.add_argument("images", type=path_argument, help="folder of its images")
    cut.add_argument("--output", type=path_argument, required=True, metavar="DIR")
    cut.add_argument("--tile", type=int, default=1024, metavar="PIXELS", help="side of a tile (default: %(default)s)")
    cut.add_argument("--overlap", type=float, default=0.25, metavar="SHARE", help="of a tile (default: %(default)s)")
    cut.add_argument(
        "--min-visible", type=float, default=0.2, metavar="SHARE",
        help="pieces that show less of their object become crowd regions (default: %(default)s)",
    )  # fmt: skip
    cut.add_argument("--polygons", action="store_true", help="cut polygons stay polygons; pixels at the cut may differ")
    cut.add_argument("--jpeg", action="store_true", help="write JPEG files, smaller but not exact, in place of PNG")
    cut.add_argument("--drop-empty", action="store_true", help="leave out tiles without an annotation")
    join = commands.add_parser("join", help="annotations or results of tiles back to the original images")
    join.add_argument("annotations", type=path_argument, help="the annotations.json that `cut` wrote")
    join.add_argument(
        "--results", type=path_argument, metavar="JSON", help="results of the tiles, as --evaluate writes"
    )
    join.add_argument("--output", type=path_argument, required=True, metavar="JSON")
    join.add_argument("--threshold", type=float, default=0.5, help="IoU of NMS between tiles (default: %(default)s)")
    join.add_argument("--limit", type=int, default=1000, help="most results of an image (default: %(default)s)")
    args = parser.parse_args(argv)
    _cut(args) if args.command == "cut" else _join(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
