"""tools/tile_data.py: annotations cut into tiles and put together again are those of the original, pixel for pixel."""

import json

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny import COCO_MINI

from config import default_config, finalize_config
from dataset import load_split
from predict_tiles import View, tile_views
from tools import tile_data
from tools.tile_data import cut_annotations, join_annotations, join_results
from utils.coco_format import as_results, as_truth, read_truth
from utils.polygons import decode_rle, encode_mask, encode_segmentation

pytestmark = pytest.mark.quick
HEIGHT, WIDTH = 70, 90


def content_of(annotations, height=HEIGHT, width=WIDTH):
    content = {
        "images": [{"id": 7, "file_name": "a/b.jpg", "height": height, "width": width, "neg_category_ids": [3]}],
        "categories": [{"id": 5, "name": "x"}, {"id": 3, "name": "y"}],
        "annotations": [{"id": n, "image_id": 7, "category_id": 5, **a} for n, a in enumerate(annotations, 11)],
    }
    return as_truth(json.loads(json.dumps(content)), need_size=True)


def pixels(a, height=HEIGHT, width=WIDTH):
    rle = encode_segmentation(a["segmentation"], height, width)
    return decode_rle(rle, height, width)


def written(content):
    """As it comes from a file."""
    return as_truth(json.loads(json.dumps(content)), need_size=True)


coordinates = st.floats(-5, 95, allow_nan=False).map(lambda v: round(v, 2))
ring = st.lists(st.tuples(coordinates, coordinates), min_size=3, max_size=8).map(lambda r: [v for p in r for v in p])
outline = st.one_of(
    st.lists(ring, min_size=1, max_size=3),
    arrays(bool, (HEIGHT, WIDTH), elements=st.booleans(), fill=st.just(False)).map(encode_mask),
)
tiles = st.tuples(st.integers(16, 100), st.floats(0, 0.8))


@settings(max_examples=60)
@given(st.lists(outline, min_size=1, max_size=3), tiles, st.booleans())
def test_the_union_of_all_pieces_is_the_original_mask(outlines, tile, crowd):
    content = content_of([{"segmentation": s, "iscrowd": int(crowd)} for s in outlines])
    content["annotations"] = [a for a in content["annotations"] if pixels(a).any()]
    cut = written(cut_annotations(content, *tile))
    views = tile_views(HEIGHT, WIDTH, *tile)
    assert [View(t["tile"]["x"], t["tile"]["y"], t["width"], t["height"]) for t in cut["images"]] == views
    # Each piece is exactly what lies in its tile.
    whole = {a["id"]: pixels(a) for a in content["annotations"]}
    seen = set()
    for piece in cut["annotations"]:
        v, original = views[piece["image_id"] - 1], whole[piece["cut"]["annotation_id"]]
        part = original[v.y : v.y + v.height, v.x : v.x + v.width]
        np.testing.assert_array_equal(pixels(piece, v.height, v.width), part)
        assert piece["cut"]["visible"] == pytest.approx(part.sum() / original.sum(), abs=1e-6)
        assert piece["cut"]["iscrowd"] == int(crowd)
        assert piece["iscrowd"] == int(crowd or piece["cut"]["visible"] < 0.2)
        seen.add((piece["cut"]["annotation_id"], piece["image_id"]))
    expected = {
        (i, n) for i, m in whole.items() for n, v in enumerate(views, 1)
        if m[v.y : v.y + v.height, v.x : v.x + v.width].any()
    }  # fmt: skip
    assert seen == expected
    back = written(join_annotations(cut))
    assert back["images"] == content["images"]
    assert {a["id"]: a["iscrowd"] for a in back["annotations"]} == {i: int(crowd) for i in whole}
    for a in back["annotations"]:
        np.testing.assert_array_equal(pixels(a), whole[a["id"]])
        assert a["category_id"] == 5 and a["image_id"] == 7


places, sides = (st.floats(*limits).map(lambda v: round(v, 2)) for limits in ((0, 60), (1, 30)))
boxes = st.tuples(places, places, sides, sides)
keypoints = st.lists(st.tuples(st.integers(0, 89), st.integers(0, 69), st.integers(0, 2)), min_size=2, max_size=2)


@settings(max_examples=40)
@given(boxes, tiles, keypoints)
def test_boxes_and_keypoints_come_back_as_they_were(box, tile, points):
    box = [box[0], box[1], min(box[2], WIDTH - box[0]), min(box[3], HEIGHT - box[1])]
    points = [v for x, y, v in points for v in ((x, y, v) if v else (0, 0, 0))]
    content = content_of([{"bbox": box, "keypoints": points, "area": 10.0}])
    cut = written(cut_annotations(content, *tile))
    for piece in cut["annotations"]:
        t = cut["images"][piece["image_id"] - 1]
        x, y, w, h = piece["bbox"]
        assert x >= 0 and y >= 0 and x + w <= t["width"] + 1e-6 and y + h <= t["height"] + 1e-6
        for px, py, v in np.reshape(piece["keypoints"], (-1, 3)):
            assert not v or 0 <= px < t["width"] and 0 <= py < t["height"]
        assert piece["num_keypoints"] == (np.array(piece["keypoints"][2::3]) > 0).sum()
    (back,) = join_annotations(cut)["annotations"]
    np.testing.assert_allclose(back["bbox"], box, atol=1e-5)
    # A point outside of all tiles that show a part of the box is in no piece.
    shown = [cut["images"][p["image_id"] - 1] for p in cut["annotations"]]
    for n, (x, y, v) in enumerate(np.reshape(points, (-1, 3)).tolist()):
        near = any(0 <= x - t["tile"]["x"] < t["width"] and 0 <= y - t["tile"]["y"] < t["height"] for t in shown)
        got = back["keypoints"][3 * n : 3 * n + 3]
        if near:
            assert got == [x, y, v]
        else:
            assert got == [0, 0, 0]


def test_polygons_inside_a_tile_stay_and_cut_ones_can():
    inside, across = [5.1, 5.2, 20.3, 5, 15, 25.7], [30.0, 10, 80, 10, 80, 40, 30, 40]
    content = content_of([{"segmentation": [inside]}, {"segmentation": [across]}])
    cut = cut_annotations(content, 50, 0.2)
    assert cut["annotations"][0]["segmentation"] == [inside]
    pieces = [a for a in cut["annotations"] if a["cut"]["annotation_id"] == 12]
    assert all(isinstance(a["segmentation"], dict) for a in pieces) and len(pieces) > 2
    cut = cut_annotations(content, 50, 0.2, as_polygons=True)
    views = tile_views(HEIGHT, WIDTH, 50, 0.2)
    for a in [a for a in cut["annotations"] if a["cut"]["annotation_id"] == 12]:
        v = views[a["image_id"] - 1]
        expected = pixels(content["annotations"][1])[v.y : v.y + v.height, v.x : v.x + v.width]
        assert isinstance(a["segmentation"], list)
        np.testing.assert_array_equal(pixels(a, v.height, v.width), expected)  # corners on whole pixels
    back = written(join_annotations(cut))
    assert back["annotations"][0]["segmentation"] == [inside]
    np.testing.assert_array_equal(pixels(back["annotations"][1]), pixels(content["annotations"][1]))


def test_what_a_person_adds_or_removes_in_a_tile_is_so_in_the_original():
    content = content_of([{"bbox": [10, 10, 10, 10]}, {"bbox": [60, 40, 20, 20]}])
    cut = cut_annotations(content, 50, 0.2)
    last = cut["images"][-1]
    cut["annotations"] = [a for a in cut["annotations"] if a["cut"]["annotation_id"] == 12]
    cut["annotations"].append({"id": 99, "image_id": last["id"], "category_id": 3, "bbox": [1, 2, 5, 6]})
    back = join_annotations(written(cut))["annotations"]
    assert [(a["id"], a["category_id"]) for a in back] == [(12, 5), (13, 3)]
    assert back[1]["bbox"] == [1 + last["tile"]["x"], 2 + last["tile"]["y"], 5, 6]


def test_results_of_tiles_are_those_of_the_original():
    """A model that finds in each tile what is annotated there."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[20:50, 8:85] = True  # across all tiles
    content = content_of([{"segmentation": encode_mask(mask)}, {"bbox": [2, 2, 9, 9]}, {"bbox": [70, 60, 10, 9]}])
    content["annotations"][2]["category_id"] = 3
    for a in content["annotations"][1:]:
        x, y, w, h = (int(v) for v in a["bbox"])
        own = np.zeros((HEIGHT, WIDTH), bool)
        own[y : y + h, x : x + w] = True
        a["segmentation"] = encode_mask(own)
    cut = written(cut_annotations(content, 40, 0.3))
    results = [
        {k: a[k] for k in ("image_id", "category_id", "bbox", "segmentation")}
        | {"score": 0.5 + 0.4 * a["cut"]["visible"]}
        for a in cut["annotations"]
    ]
    joined = join_results(cut, as_results(results, cut, "results"))
    assert sorted((r["image_id"], r["category_id"], r["bbox"]) for r in joined) == sorted(
        (7, a["category_id"], a["bbox"]) for a in content["annotations"]
    )
    for r in joined:
        (a,) = [a for a in content["annotations"] if a["bbox"] == r["bbox"]]
        np.testing.assert_array_equal(pixels(r), pixels(a))


def test_a_cut_set_is_a_data_set_and_its_pixels_are_those_of_the_photographs(tmp_path, capfd):
    source, photos = COCO_MINI / "annotations/instances_val2017.json", COCO_MINI / "val2017"
    words = ["cut", str(source), str(photos), "--tile", "200", "--output", str(tmp_path)]
    assert tile_data.main(words) == 0
    assert tile_data.main(words) == 2 and "exists already" in capfd.readouterr().err
    cut = json.loads((tmp_path / "annotations.json").read_text())
    for t in cut["images"][::7]:
        tile = cv2.imread(str(tmp_path / "images" / t["file_name"]))
        x, y = t["tile"]["x"], t["tile"]["y"]
        photo = cv2.imread(str(photos / t["tile"]["file_name"]))
        np.testing.assert_array_equal(tile, photo[y : y + t["height"], x : x + t["width"]])
    sets = json.dumps({"tiles": ["annotations.json", "images"]})
    cfg = finalize_config(default_config().update_args([f"DATA.BASEDIR={tmp_path}", f"DATA.DATASETS={sets}"]))
    split = load_split(cfg, "tiles")
    assert len(split) == len(cut["images"])
    counts = sum(int((~split.objects(i).is_crowd).sum()) for i in range(len(split)))
    assert counts == sum(not a["iscrowd"] for a in cut["annotations"])
    assert tile_data.main(["join", str(tmp_path / "annotations.json"), "--output", str(tmp_path / "back.json")]) == 0
    original, back = read_truth(source), read_truth(tmp_path / "back.json")
    assert back["images"] == original["images"]
    sizes = {i["id"]: (i["height"], i["width"]) for i in original["images"]}
    masks = {a["id"]: pixels(a, *sizes[a["image_id"]]) for a in back["annotations"]}
    for a in original["annotations"]:
        np.testing.assert_array_equal(masks.pop(a["id"]), pixels(a, *sizes[a["image_id"]]))
    assert not masks


def test_other_annotation_files_cannot_be_joined(tmp_path, capfd):
    source = COCO_MINI / "annotations/instances_val2017.json"
    assert tile_data.main(["join", str(source), "--output", str(tmp_path / "b.json")]) == 2
    assert "does not say which part of an original it is" in capfd.readouterr().err
    words = ["cut", str(source), str(tmp_path), "--output", str(tmp_path / "t"), "--overlap", "1"]
    assert tile_data.main(words) == 2 and "--overlap from 0 to 0.9" in capfd.readouterr().err
    assert tile_data.main(words[:-2]) == 2 and "cannot be read" in capfd.readouterr().err
