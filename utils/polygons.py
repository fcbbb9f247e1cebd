"""Object outlines as rings of vertices: orientation, tracing from RLE masks, edges, and a reference rasteriser.

A ring is a float array [k, 2] of x y in continuous image coordinates (pixel i covers [i, i+1)), closed implicitly. An
object is a list of rings under the non-zero winding rule: outer rings have positive signed area (clockwise on the
screen, where y points down) and holes negative, so overlapping parts unite and holes stay holes. Nothing here clips:
scaling and mirroring are exact. RLE masks follow COCO's format (column-major run lengths, background first).
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as coco_mask

__all__ = [
    "boxes_inside",
    "clip_edges",
    "clip_ring",
    "decode_mask",
    "decode_part",
    "decode_rle",
    "decode_runs",
    "encode_mask",
    "encode_part",
    "encode_runs",
    "encode_segmentation",
    "flip_edges",
    "join_rings",
    "mask_to_rings",
    "move_rle",
    "nest_rings",
    "orient_outer",
    "pack_edges",
    "rasterize",
    "reduce_rle",
    "ring_areas",
    "rings_to_edges",
    "rle_runs",
    "rle_to_rings",
    "signed_area",
    "simplify_ring",
    "smooth_ring",
    "unite_rles",
    "vertices_to_edges",
]


def signed_area(ring: np.ndarray) -> float:
    """Shoelace area of one ring [k, 2]; positive when it runs clockwise on the screen."""
    x, y = np.asarray(ring, np.float64).T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(np.roll(x, -1), y)) / 2


def orient_outer(ring: np.ndarray) -> np.ndarray:
    """The ring in the orientation of an outer outline (signed area >= 0)."""
    return ring[::-1] if signed_area(ring) < 0 else ring


def _next_vertex(ring_sizes: np.ndarray) -> np.ndarray:
    """Index of each vertex's successor in its ring, for consecutive rings with these sizes (all positive)."""
    ends = np.cumsum(ring_sizes)
    successor = np.arange(1, (ends[-1] if len(ends) else 0) + 1)
    successor[ends - 1] = ends - ring_sizes
    return successor


def ring_areas(vertices: np.ndarray, ring_sizes: np.ndarray) -> np.ndarray:
    """Signed areas [R] (float64) of consecutive rings: vertices [V, 2], ring_sizes [R], all positive, sum V."""
    if len(ring_sizes) == 0:
        return np.zeros(0)
    starts = np.cumsum(ring_sizes) - ring_sizes
    # Relative to each ring's first vertex, to avoid cancellation far from the origin.
    local = vertices.astype(np.float64) - np.repeat(vertices[starts].astype(np.float64), ring_sizes, axis=0)
    after = local[_next_vertex(ring_sizes)]
    return np.add.reduceat(local[:, 0] * after[:, 1] - after[:, 0] * local[:, 1], starts) / 2


def vertices_to_edges(vertices: np.ndarray, ring_sizes: np.ndarray) -> np.ndarray:
    """Directed edges [V, 4] (x1 y1 x2 y2) of consecutive rings, in vertex order."""
    return np.concatenate([vertices, vertices[_next_vertex(ring_sizes)]], axis=1)


def rings_to_edges(rings: list) -> np.ndarray:
    """Directed edges [E, 4] of an object given as a list of rings."""
    rings = [np.asarray(r) for r in rings if len(r)]
    if not rings:
        return np.zeros((0, 4), np.float32)
    return vertices_to_edges(np.concatenate(rings), np.array([len(r) for r in rings]))


def flip_edges(edges: np.ndarray, width: float) -> np.ndarray:
    """Edges [..., 4] of the outlines mirrored horizontally; each edge is reversed, so outer rings stay outer."""
    return np.stack([width - edges[..., 2], edges[..., 3], width - edges[..., 0], edges[..., 1]], axis=-1)


def pack_edges(edges: np.ndarray, owners: np.ndarray, count: int) -> np.ndarray:
    """Edges of several objects as one array [count, E, 4] with zero-length padding; E >= 1.

    edges [n, 4]; owners [n] non-decreasing, the object of each edge. Vertical edges are left out: they cross no
    column's centre, so the graph's rasteriser, which works by columns like COCO's, does not need them.
    """
    slanted = edges[:, 0] != edges[:, 2]
    edges, owners = edges[slanted], owners[slanted]
    per_object = np.bincount(owners, minlength=count)
    packed = np.zeros((count, max(1, int(per_object.max(initial=0))), 4), edges.dtype)
    first = np.cumsum(per_object) - per_object
    packed[owners, np.arange(len(owners)) - first[owners]] = edges
    return packed


def _shares(distance: np.ndarray, step: np.ndarray) -> np.ndarray:
    """distance / step, limited to -1 to 2, which are both beyond an edge's ends; 0 where step is 0.

    The numerator is limited, so that a step next to zero overflows nothing.
    """
    limited = np.clip(distance, np.minimum(-step, 2 * step), np.maximum(-step, 2 * step))
    return np.divide(limited, step, out=np.zeros_like(limited), where=step != 0)


def boxes_inside(edges: np.ndarray, owners: np.ndarray, count: int, height: float, width: float) -> np.ndarray:
    """Tight boxes [count, 4] (float64) of the parts of objects that lie in the window [0, width] x [0, height].

    edges [n, 4]; owners [n], the object of each edge. An object without a part inside gets zeros. The visible part is
    bounded by the parts of edges in the window and by those window corners that lie inside the outline.
    """
    # For outlines that run along the window's border, points just inside of the border are tested: edges of objects
    # outside then vanish, and edges of objects inside are replaced by the parts that reach the border.
    margin = 1e-3
    low, high = np.full(2, margin), np.array([width, height]) - margin
    edges = edges.astype(np.float64)
    start, step = edges[:, :2], edges[:, 2:] - edges[:, :2]
    at_low, at_high = _shares(low - start, step), _shares(high - start, step)
    parallel = step == 0
    outside = (parallel & ((start < low) | (start > high))).any(1)
    enter = np.where(parallel, 0, np.minimum(at_low, at_high)).max(1, initial=0)
    leave = np.where(parallel, 1, np.maximum(at_low, at_high)).min(1, initial=1)
    crossing = (enter <= leave) & ~outside
    boxes = np.tile([np.inf, np.inf, -np.inf, -np.inf], (count, 1))
    for along in (enter, leave):
        points = (start + along[:, None] * step)[crossing]
        np.minimum.at(boxes[:, :2], owners[crossing], points)
        np.maximum.at(boxes[:, 2:], owners[crossing], points)
    for corner in ((x, y) for x in (low[0], high[0]) for y in (low[1], high[1])):
        crosses = (edges[:, 1] <= corner[1]).astype(np.int64) - (edges[:, 3] <= corner[1])
        left = start[:, 0] + _shares(corner[1] - start[:, 1], step[:, 1]) * step[:, 0] < corner[0]
        inside = np.bincount(owners[left], crosses[left], count) != 0
        boxes[inside] = np.concatenate(
            [np.minimum(boxes[inside, :2], corner), np.maximum(boxes[inside, 2:], corner)], 1
        )
    boxes = np.where(boxes <= margin * 1.001, 0, boxes)
    limits = np.array([width, height, width, height], np.float64)
    boxes = np.where(boxes >= limits - margin * 1.001, limits, boxes)
    boxes[~(boxes[:, 2:] > boxes[:, :2]).all(1)] = 0
    return boxes


def clip_edges(edges: np.ndarray, height: float, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Outlines confined to the window [0, width] x [0, height]: edges [m, 4], and for each which of `edges` it was.

    Edges are cut at the window's border, and parts outside are moved onto it. This keeps the winding number of each
    point inside and makes it zero outside.
    """
    start = edges[:, None, :2].astype(np.float64)
    step = edges[:, 2:] - start[:, 0]
    limits = np.array([[0, width], [0, height]], np.float64)
    cuts = _shares(limits - start.swapaxes(1, 2), step[:, :, None]).reshape(len(edges), 4)
    cuts = np.sort(np.clip(cuts, 0, 1), axis=1)
    along = np.pad(cuts, ((0, 0), (1, 1)), constant_values=(0, 1))
    points = np.clip(start + along[:, :, None] * step[:, None], 0, limits[:, 1]).astype(edges.dtype)
    pieces = np.concatenate([points[:, :-1], points[:, 1:]], axis=2)  # [n, 5, 4]
    origin, part = np.nonzero((pieces[..., :2] != pieces[..., 2:]).any(2))
    return pieces[origin, part], origin


# ---------------------------------------------------------------- masks
def decode_rle(rle: dict, height: int, width: int) -> np.ndarray:
    """Bool mask [height, width] of a COCO RLE, compressed (str or bytes) or not (list of runs).

    Raises ValueError, saying what is wrong, when the RLE does not describe a mask of this size.
    """
    runs = rle_runs(rle, height, width)
    values = np.zeros(len(runs), bool)
    values[1::2] = True
    return np.repeat(values, runs).reshape(width, height).T


def decode_mask(rle: dict) -> np.ndarray:
    """Bool mask of a compressed RLE that this program wrote or checked; `decode_rle` is for all others."""
    return coco_mask.decode(rle).astype(bool)


def decode_part(rle: dict) -> tuple[np.ndarray, int, int]:
    """As `decode_mask`, but only the object's bounding rectangle: bool [h, w], and its left and top in the image."""
    height = int(rle["size"][0])
    ends = np.cumsum(decode_runs(rle["counts"]))
    first, beyond = ends[:-1:2], ends[1::2]  # ends of the object's runs; a last background run has none
    some = beyond > first
    first, beyond = first[some], beyond[some]
    if len(first) == 0:
        return np.zeros((0, 0), bool), 0, 0
    left, right = int(first[0]) // height, int(beyond[-1] - 1) // height + 1
    runs = np.diff(np.stack([first, beyond], 1).ravel(), prepend=left * height, append=right * height)
    columns = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(right - left, height)
    rows = np.flatnonzero(columns.any(0))
    return columns.T[rows[0] : rows[-1] + 1], left, int(rows[0])


def rle_runs(rle: dict, height: int, width: int) -> np.ndarray:
    """Checked run lengths, int64, of alternating background and object; ValueError as for `decode_rle`.

    pycocotools checks nothing, so RLEs must be checked here before it decodes them.
    """
    size = rle.get("size")
    if size is not None and list(size) != [height, width]:
        raise ValueError(f"mask of {list(size)} in an image of height and width {[height, width]}")
    counts = rle.get("counts")
    if isinstance(counts, (str, bytes)):
        runs = decode_runs(counts)
    else:
        runs = np.asarray(counts)
        if runs.ndim != 1 or runs.dtype.kind not in "iuf" or not np.isfinite(runs).all() or (runs % 1).any():
            raise ValueError("run lengths are not whole numbers")
        runs = runs.astype(np.int64)
    if (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        raise ValueError("run lengths do not add up to height x width of the image")
    return runs


def decode_runs(text: str | bytes) -> np.ndarray:
    """Run lengths of COCO's compressed RLE: 5 bits a character from 48 on, sign-extended, deltas from the fourth on."""
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogatepass")
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if len(codes) == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("not a compressed RLE string")
    last = np.flatnonzero((codes & 32) == 0)  # the character that ends each number
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    if place.max() > 11:
        raise ValueError("not a compressed RLE string")
    values = np.add.reduceat((codes & 31) << (5 * place), first)
    negative = (codes[last] & 16) != 0
    values -= np.where(negative, np.int64(1) << (5 * (place[last] + 1)), 0)
    # From the fourth number on the difference to the run two before is stored: sum the two interleaved sequences.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def encode_runs(runs: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """COCO's compressed RLE of run lengths (column by column, background first); `counts` is a str."""
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode()}


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed RLE of a mask [height, width]; non-zero is the object."""
    rle = coco_mask.encode(np.asfortranarray(np.asarray(mask, bool)).view(np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def encode_part(mask: np.ndarray, left: int, top: int, height: int, width: int) -> dict[str, Any]:
    """COCO run lengths of a height x width image in which `mask` lies at (left, top)."""
    columns = np.zeros((mask.shape[1], mask.shape[0] + 2), bool)
    columns[:, 1:-1] = mask.T
    column, row = np.nonzero(columns[:, 1:] != columns[:, :-1])
    ends = (column + left) * height + row + top
    return _rle_of_ends(ends, height, width)


def _rle_of_ends(ends: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """The RLE of pixels where runs of the object begin and end, in turn."""
    # A run that continues in the next column has an end and a start at the same pixel: both are removed.
    again = np.flatnonzero(ends[1:] == ends[:-1])
    ends = np.delete(ends, np.concatenate([again, again + 1]))
    size = height * width
    counts = np.diff(ends, prepend=0, append=[] if len(ends) and ends[-1] == size else [size])
    return encode_runs(counts, height, width)


# Polygons that reach farther than this many image sides beyond the image are clipped first, because pycocotools walks
# along every edge pixel by pixel.
_FAR = 1.0


def encode_segmentation(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """COCO's compressed RLE (`counts` is bytes) of what utils/coco_format.py read: polygons, one RLE or several.

    Polygons and RLEs are united. None, [] or {} gives a mask without a pixel.
    """
    parts = [segmentation] if isinstance(segmentation, dict) else list(segmentation or ())
    rings = [_bounded(p, height, width) for p in parts if not isinstance(p, dict)]
    runs = coco_mask.frPyObjects([r for r in rings if len(r) >= 6], height, width) if any(map(len, rings)) else []
    for rle in parts:
        if isinstance(rle, dict) and rle:
            counts = rle["counts"]
            if not isinstance(counts, (str, bytes)):
                counts = encode_runs(np.asarray(counts, np.uint32), height, width)["counts"]
            runs.append({"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts})
    if not runs:
        runs = [coco_mask.frPyObjects({"size": [height, width], "counts": [height * width]}, height, width)]
    return runs[0] if len(runs) == 1 else coco_mask.merge(runs)


def _bounded(ring: Sequence[float], height: int, width: int) -> Sequence[float]:
    """The flat ring x1 y1 x2 y2 …, clipped to the image if it reaches far beyond it; [] if nothing is left."""
    x, y = ring[0::2], ring[1::2]
    margin = 1 + _FAR
    if min(x) >= -_FAR * width and max(x) <= margin * width and min(y) >= -_FAR * height and max(y) <= margin * height:
        return ring
    return clip_ring(np.asarray(ring, np.float64).reshape(-1, 2), height, width).ravel().tolist()


def clip_ring(ring: np.ndarray, height: float, width: float) -> np.ndarray:
    """The part of a ring [k, 2] in the window [0, width] x [0, height], as a ring; empty if it has fewer than 3 points.

    Coordinates beyond 1e9 are taken to be 1e9, so that float64 can compute with them.
    """
    ring = np.clip(ring, -1e9, 1e9)
    clipped = clip_edges(vertices_to_edges(ring, np.array([len(ring)])), height, width)[0][:, :2]
    return clipped if len(clipped) >= 3 else clipped[:0]


def rle_to_rings(rle: dict, height: int, width: int) -> list:
    """Exact outline of a COCO RLE mask along pixel borders: float32 rings [k, 2] with integer corners.

    Filling the rings gives the mask back. Pixels that touch at a corner only are separate outer rings; holes run the
    other way round. Every vertex is a right-angled corner. ValueError as for `decode_rle`.
    """
    return _trace(rle_runs(rle, height, width), height)


def mask_to_rings(mask: np.ndarray) -> list:
    """The outline of a bool mask [H, W], as `rle_to_rings` gives it."""
    flat = np.asarray(mask, bool).T.ravel()
    ends = np.flatnonzero(np.diff(flat, prepend=False, append=not flat[-1])) if flat.size else np.zeros(0, np.int64)
    return _trace(np.diff(ends, prepend=0), mask.shape[0])


def _vertical_pieces(begin: np.ndarray, end: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(column, first row, row behind the last) of an object's pieces, one or more in each pixel column; begin, end: its
    runs, none of them empty."""
    columns = (end - 1) // height - begin // height + 1
    column = np.arange(int(columns.sum())) - np.repeat(np.cumsum(columns) - columns - begin // height, columns)
    low = np.maximum(np.repeat(begin, columns) - column * height, 0)
    high = np.minimum(np.repeat(end, columns) - column * height, height)
    return column, low, high


def _rle_of_pieces(column: np.ndarray, low: np.ndarray, high: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """COCO's compressed RLE of pieces in the order of columns and rows, which do not overlap; those without a pixel are
    left out."""
    some = high > low
    ends = np.stack([column[some] * height + low[some], column[some] * height + high[some]], 1).ravel()
    return _rle_of_ends(ends, height, width)


def _pieces_of(rle: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    height = int(rle["size"][0])
    ends = np.cumsum(decode_runs(rle["counts"]))
    begin, end = ends[0 : len(ends) // 2 * 2 : 2], ends[1::2]
    return _vertical_pieces(begin[end > begin], end[end > begin], height)


def move_rle(rle: dict, right: int, down: int, height: int, width: int) -> dict[str, Any]:
    """A compressed RLE moved by whole pixels into a frame of another size; what lies outside of it is cut off. The work
    grows with the object's columns, not with the frames."""
    column, low, high = _pieces_of(rle)
    column = column + right
    inside = (column >= 0) & (column < width)
    low, high = (np.clip(v[inside] + down, 0, height) for v in (low, high))
    return _rle_of_pieces(column[inside], low, high, height, width)


def reduce_rle(rle: dict, times: int) -> dict[str, Any]:
    """A compressed RLE for the frame that is smaller by this whole number, rounded up: the middle one of every times x
    times pixels."""
    height, width = (-(-int(v) // times) for v in rle["size"])
    column, low, high = _pieces_of(rle)
    middle = times // 2
    kept = column % times == middle
    low, high = (np.clip(-((middle - v[kept]) // times), 0, height) for v in (low, high))
    return _rle_of_pieces(column[kept] // times, low, high, height, width)


def unite_rles(rles: Sequence[dict]) -> dict[str, Any]:
    """The compressed RLE of all pixels of several, of one frame."""
    if len(rles) == 1:
        return rles[0]
    united = coco_mask.merge([{"size": list(r["size"]), "counts": r["counts"]} for r in rles])
    return {"size": list(united["size"]), "counts": united["counts"].decode()}


def _trace(runs: np.ndarray, height: int) -> list:
    """Rings around the object of column-major runs; the work grows with their number, not with the image."""
    ends = np.cumsum(runs)
    begin, end = ends[0 : len(runs) // 2 * 2 : 2], ends[1::2]
    begin, end = begin[end > begin], end[end > begin]
    if len(begin) == 0:
        return []
    column, low, high = _vertical_pieces(begin, end, height)
    # Along a vertical line of the pixel grid, +1 means that the object lies only to its left, -1 only to its right.
    # Each piece changes this value at its ends on the line to its right and, with opposite sign, on the line to its
    # left. A change of 2 means that pixels touch at a corner. A run of +1 or -1 is a border that runs down or up.
    stride = height + 1
    right = column + 1
    keys = np.concatenate([right * stride + low, right * stride + high, column * stride + low, column * stride + high])
    signs = np.repeat([1, -1, -1, 1], len(column))
    keys, inverse = np.unique(keys, return_inverse=True)
    change = np.bincount(inverse, signs)
    kept = np.flatnonzero(change)
    kept = np.repeat(kept, np.abs(change[kept]).astype(np.int64))
    start, stop = kept[0::2], kept[1::2]
    x, y_low, y_high = keys[start] // stride, keys[start] % stride, keys[stop] % stride
    down = change[start] > 0
    # Horizontal borders join neighbouring border ends of a row in pairs. Where two vertical borders meet at a corner,
    # the one whose object lies to its left joins the horizontal border on the left.
    count = len(x)
    ends_x, ends_y = np.concatenate([x, x]), np.concatenate([y_low, y_high])
    order = np.lexsort((np.concatenate([~down, ~down]), ends_x, ends_y))
    partner = np.empty(2 * count, np.int64)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    following = (partner[np.arange(count) + np.where(down, count, 0)] % count).tolist()  # from the start of each border
    tail_y, head_y = np.where(down, y_low, y_high), np.where(down, y_high, y_low)
    corners = np.stack([x, tail_y, x, head_y], 1).astype(np.float32).reshape(count, 2, 2)
    seen = [False] * count
    rings = []
    for first in range(count):
        ring, border = [], first
        while not seen[border]:
            seen[border] = True
            ring.append(border)
            border = following[border]
        if ring:
            rings.append(corners[ring].reshape(-1, 2))
    return rings


def smooth_ring(ring: np.ndarray) -> np.ndarray:
    """A traced ring [k, 2] with far fewer vertices, at most about half a pixel away: staircases become slopes.

    Rings of a few corners stay exact.
    """
    if len(ring) <= 16:
        return ring
    after = np.roll(ring, -1, axis=0)
    long = np.abs(after - ring).sum(1) > 1
    # The midpoints of a staircase's steps lie on the drawn outline; a point where two long sides meet is a corner.
    points = np.stack([ring, (ring + after) / 2], 1)
    used = np.stack([long & np.roll(long, 1), np.ones(len(ring), bool)], 1)
    points = points[used][:, None].astype(np.float32)
    smooth = cv2.approxPolyDP(points, 0.3, True)[:, 0]
    return smooth if len(smooth) > 2 else ring


def simplify_ring(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """Some of the vertices of a ring [k, 2]: no point of the ring is farther than `tolerance` from the result, and the
    other way round (Douglas & Peucker 1973). Empty if fewer than three vertices are left."""
    ring = np.asarray(ring, np.float64)
    if tolerance <= 0 or len(ring) <= 3:
        return ring if len(ring) >= 3 else ring[:0]
    # A closed ring is two lines: from the first vertex to the one that is farthest from it, and back.
    far = int(np.argmax(((ring - ring[0]) ** 2).sum(1)))
    closed = np.concatenate([ring, ring[:1]])
    kept = np.zeros(len(closed), bool)
    kept[[0, far]] = True
    todo = [(0, far), (far, len(ring))]
    while todo:
        first, last = todo.pop()
        if last - first < 2:
            continue
        start, along = closed[first], closed[last] - closed[first]
        points = closed[first + 1 : last] - start
        length = float(along @ along)
        share = np.clip(points @ along / length, 0, 1) if length > 0 else np.zeros(len(points))
        distance = ((points - share[:, None] * along) ** 2).sum(1)
        worst = int(np.argmax(distance))
        if distance[worst] > tolerance * tolerance:
            middle = first + 1 + worst
            kept[middle] = True
            todo += [(first, middle), (middle, last)]
    result = ring[kept[:-1]]
    return result if len(result) >= 3 else result[:0]


def nest_rings(rings: Sequence[np.ndarray]) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """(outer ring, its holes) for each outer ring; a hole belongs to the smallest outer ring around it."""
    areas = [signed_area(ring) for ring in rings]
    outer = sorted((i for i, a in enumerate(areas) if a > 0), key=lambda i: areas[i])
    holes: dict[int, list[np.ndarray]] = {i: [] for i in outer}
    for ring, area in zip(rings, areas):
        if area < 0:
            inside = [i for i in outer if areas[i] > -area and _contains(rings[i], ring)]
            if inside:
                holes[inside[0]].append(ring)
    return [(rings[i], holes[i]) for i in sorted(outer)]


def _contains(outer: np.ndarray, ring: np.ndarray) -> bool:
    """Whether most vertices of `ring` are inside of `outer` or on it."""
    contour = np.asarray(outer, np.float32)[:, None]
    found = [
        cv2.pointPolygonTest(contour, (float(x), float(y)), False) >= 0 for x, y in ring[:: max(1, len(ring) // 9)]
    ]
    return 2 * sum(found) > len(found)


def join_rings(ring: np.ndarray, others: Sequence[np.ndarray], holes: bool = True) -> np.ndarray:
    """One ring that runs along `ring` and, over bridges without width, along each of `others`: its holes or, with
    holes=False, other parts of the same object. It encloses the same points."""
    joined = np.asarray(orient_outer(np.asarray(ring, np.float64)))
    for other in others:
        other = orient_outer(np.asarray(other, np.float64))
        other = other[::-1] if holes else other
        best, here, there = np.inf, 0, 0
        for i in range(0, len(joined), 1024):  # in blocks, to bound memory
            distance = ((joined[i : i + 1024, None] - other[None]) ** 2).sum(2)
            place = int(np.argmin(distance))
            if distance.flat[place] < best:
                best, here, there = distance.flat[place], i + place // len(other), place % len(other)
        around = np.concatenate([other[there:], other[: there + 1]])
        joined = np.concatenate([joined[: here + 1], around, joined[here:]])
    return joined


def rasterize(edges: np.ndarray, box: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """The part of an object inside a box as a bool mask: the float64 reference of the rasteriser in the graph.

    edges [E, 4] directed; box x1 y1 x2 y2; size M (or rows, columns). Mask pixel (i, j) is True where its centre,
    (x1 + (j + 0.5) * width / M, y1 + (i + 0.5) * height / M), has a non-zero winding number. A centre exactly on an
    edge belongs to the object when the object lies to its right or below.
    """
    rows, columns = size if isinstance(size, tuple) else (size, size)
    x1, y1, x2, y2 = np.asarray(box, np.float64)
    edges = np.asarray(edges, np.float64).reshape(-1, 4)
    centre_x = x1 + (np.arange(columns) + 0.5) * ((x2 - x1) / columns)
    centre_y = y1 + (np.arange(rows) + 0.5) * ((y2 - y1) / rows)
    # The rows that each edge crosses: those whose centre lies between its ends, the upper end included.
    first, last = np.searchsorted(centre_y, edges[:, 1]), np.searchsorted(centre_y, edges[:, 3])
    count = np.abs(last - first)
    edge = np.repeat(np.arange(len(edges)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count - np.minimum(first, last), count)
    along = (centre_y[row] - edges[edge, 1]) / (edges[edge, 3] - edges[edge, 1])
    cross_x = edges[edge, 0] + along * (edges[edge, 2] - edges[edge, 0])
    place = row * (columns + 1) + np.searchsorted(centre_x, cross_x)
    winding = np.zeros(rows * (columns + 1), np.int32)
    np.add.at(winding, place, np.where(last > first, 1, -1).astype(np.int32)[edge])
    winding = winding.reshape(rows, columns + 1)
    return np.cumsum(winding, axis=1, out=winding)[:, :columns] != 0
