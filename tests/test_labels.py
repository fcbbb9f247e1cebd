"""labels_read.py and labels_write.py: what is written is read back, and what others write is read as they mean it."""

import base64
import json
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import UserError
from labels_read import detect_format, read_labels
from labels_write import WRITERS, Outlines, write_labels
from utils.coco_format import as_truth
from utils.polygons import (
    decode_rle,
    encode_mask,
    join_rings,
    mask_to_rings,
    nest_rings,
    orient_outer,
    rasterize,
    rings_to_edges,
    signed_area,
    simplify_ring,
)

pytestmark = pytest.mark.quick

# Names with quotes, commas, markup, comments, blanks, other scripts; without what XML cannot hold.
NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters=[chr(c) for c in range(32) if c not in (9, 10, 13)]
                  + ["\ufffe", "\uffff"]), min_size=1, max_size=12,
)  # fmt: skip
TRICKY = [
    "a, b",
    "it's",
    'say "no"',
    "<b>&amp;",
    "# no comment",
    "- dash",
    "x: y",
    " spaced ",
    "猫",
    "é",
    "1",
    "[x]",
    "a\nb",
]


def png(array):
    return cv2.imencode(".png", array)[1].tobytes()


def filled(segmentation, height, width):
    """bool [height, width] of a COCO segmentation, by the winding rule."""
    if isinstance(segmentation, dict):
        return decode_rle(segmentation, height, width)
    mask = np.zeros((height, width), bool)
    for part in segmentation:
        ring = orient_outer(np.reshape(part, (-1, 2)))
        mask |= rasterize(rings_to_edges([ring]), np.array([0, 0, width, height]), (height, width))
    return mask


@st.composite
def contents(draw):
    """COCO content: images of odd sizes with boxes, polygons of one or several parts, and masks with holes."""
    names = draw(st.lists(st.one_of(NAMES, st.sampled_from(TRICKY)), min_size=1, max_size=4, unique=True))
    images, annotations = [], []
    for i in range(1, draw(st.integers(1, 3)) + 1):
        height, width = draw(st.integers(8, 60)), draw(st.integers(8, 60))
        folder = draw(st.sampled_from(["", "sub/", "ünï/"]))
        images.append({"id": i, "file_name": f"{folder}bild {i}&.jpg", "height": height, "width": width})
        for _ in range(draw(st.integers(0, 3))):
            kind = draw(st.sampled_from(["box", "polygons", "mask"]))
            a = {"image_id": i, "category_id": draw(st.integers(1, len(names))), "iscrowd": 0}
            if kind == "box":
                x, y, w, h = (draw(st.floats(0.125, 0.5, width=32)) for _ in range(4))
                a["bbox"] = [x * width, y * height, w * width, h * height]
            elif kind == "polygons":
                # Drawn from a seed, so that no edge runs exactly through a pixel's centre, where rounding decides.
                rng = np.random.default_rng(draw(st.integers(0, 999)))
                angles = np.sort(rng.random((draw(st.integers(1, 3)), draw(st.integers(3, 6)))) * 2 * np.pi, 1)
                around = np.stack([np.cos(angles), np.sin(angles)], -1) * rng.uniform(0.2, 0.3, (len(angles), 1, 1))
                parts = (around + rng.uniform(0.3, 0.7, (len(angles), 1, 2))) * [width, height]
                a["segmentation"] = [part.ravel().tolist() for part in parts]
                low, high = parts.min((0, 1)), parts.max((0, 1))
                a["bbox"] = [*low.tolist(), *(high - low).tolist()]
            else:
                seed = draw(st.integers(0, 99))
                coarse = np.random.default_rng(seed).random((6, 6)) < 0.6
                mask = cv2.resize(coarse.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0
                if not mask.any():
                    continue
                a["segmentation"] = encode_mask(mask)
            annotations.append({"id": len(annotations) + 1, **a})
    categories = [{"id": n, "name": name} for n, name in enumerate(names, 1)]
    return as_truth({"images": images, "annotations": annotations, "categories": categories})


def objects_of(content):
    """{image name: [(class, box, mask or None)]}."""
    names = {c["id"]: c["name"] for c in content["categories"]}
    images = {i["id"]: i for i in content["images"]}
    found = {i["file_name"]: [] for i in images.values()}
    for a in content["annotations"]:
        image = images[a["image_id"]]
        outline = a.get("segmentation")
        mask = filled(outline, image["height"], image["width"]) if outline else None
        found[image["file_name"]].append((names[a["category_id"]], np.array(a["bbox"]), mask))
    return found


@pytest.mark.parametrize("form", list(WRITERS))
@given(content=contents())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read_back(form, content, tmp_path_factory):
    out = tmp_path_factory.mktemp("labels")
    if form == "yolo":  # stores no sizes
        for image in content["images"]:
            path = out / "images" / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(np.zeros((image["height"], image["width"]), np.uint8)))
    files, _ = write_labels(content, form, out, Outlines(tolerance=0))
    source = files[0] if form in ("coco", "cvat") else out
    assert detect_format(source) == form
    labels = read_labels(source, form)
    assert not labels.left_out
    assert [c["name"] for c in labels.content["categories"]][: len(content["categories"])] == [
        c["name"] for c in content["categories"]
    ] or form == "labelme"  # which lists the classes that occur alone
    sizes = {i["file_name"]: (i["height"], i["width"]) for i in content["images"]}
    assert {i["file_name"]: (i["height"], i["width"]) for i in labels.content["images"]} == sizes
    wanted, found = objects_of(content), objects_of(labels.content)
    for name, objects in wanted.items():
        assert [o[0] for o in found[name]] == [o[0] for o in objects]
        for (_, box, mask), (_, box_found, mask_found) in zip(objects, found[name]):
            np.testing.assert_allclose(box_found, box, atol=2e-3)
            assert (mask is None) == (mask_found is None)
            if mask is not None:  # pixels whose centres lie within rounding of an edge may change
                assert np.mean(mask != mask_found) <= 0.01, np.argwhere(mask != mask_found)


@given(st.integers(0, 10**6), st.floats(0.3, 4))
def test_a_simplified_ring_is_within_the_tolerance_of_the_ring_and_the_ring_of_it(seed, tolerance):
    rng = np.random.default_rng(seed)
    mask = cv2.resize(rng.random((9, 9)).astype(np.float32), (70, 50)) > 0.5
    for ring in mask_to_rings(mask):
        simple = simplify_ring(ring, tolerance)
        if not len(simple):
            continue
        assert {tuple(p) for p in simple} <= {tuple(p) for p in ring.astype(float)}
        start, end = simple, np.roll(simple, -1, 0)
        along = end - start
        for point in ring:
            share = np.clip(((point - start) * along).sum(1) / np.maximum((along**2).sum(1), 1e-12), 0, 1)
            assert np.linalg.norm(start + share[:, None] * along - point, axis=1).min() <= tolerance + 1e-9


@given(st.integers(0, 10**6))
def test_bridges_to_holes_and_parts_enclose_the_same_pixels(seed):
    coarse = np.random.default_rng(seed).random((7, 7)) < 0.6
    mask = np.kron(coarse, np.ones((3, 3), bool))
    rings = mask_to_rings(mask)
    nested = nest_rings(rings)
    assert sum(len(holes) for _, holes in nested) == sum(signed_area(r) < 0 for r in rings)
    whole = [join_rings(outer, holes) for outer, holes in nested]
    box, size = np.array([0, 0, 21, 21]), (21, 21)
    assert (rasterize(rings_to_edges(whole), box, size) == mask).all()
    if whole:
        one = join_rings(whole[0], whole[1:], holes=False)
        assert (rasterize(rings_to_edges([one]), box, size) == mask).all()


# ------------------------------------------------------------------------------------------------ as others write them
CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version>
<meta><task><labels><label><name>owl</name></label><label><name>cat</name></label></labels></task></meta>
<image id="0" name="a.jpg" width="20" height="10">
  <box label="cat" source="manual" occluded="0" xtl="1.5" ytl="2" xbr="5" ybr="8" z_order="0"></box>
  <box label="cat" xtl="4" ytl="4" xbr="12" ybr="6" rotation="90"></box>
  <polygon label="owl" points="1,1;4,1;4,4" group_id="1"></polygon>
  <polygon label="owl" points="8,8;9,8;9,9" group_id="1"></polygon>
  <mask label="owl" rle="1, 2, 1" left="17" top="4" width="2" height="2"></mask>
  <ellipse label="cat" cx="10" cy="5" rx="4" ry="3"></ellipse>
  <polyline label="cat" points="1,1;2,2"></polyline>
  <polygon label="cat" points="1,1;2,nan;3,3"></polygon>
  <mask label="owl" rle="9" left="0" top="0" width="2" height="2"></mask>
  <box xtl="1" ytl="1" xbr="2" ybr="2"></box>
  <tag label="owl"></tag>
</image></annotations>"""


def test_cvat(tmp_path):
    (tmp_path / "a.xml").write_text(CVAT)
    content, left_out, examples = read_labels(tmp_path / "a.xml")
    assert [c["name"] for c in content["categories"]] == ["owl", "cat"]
    box, turned, grouped, mask, ellipse = content["annotations"]
    assert box["bbox"] == [1.5, 2, 3.5, 6] and "segmentation" not in box
    np.testing.assert_allclose(turned["bbox"], [7, 1, 2, 8], atol=1e-9)  # a quarter turn around (8, 5)
    assert len(grouped["segmentation"]) == 2 and grouped["bbox"] == [1, 1, 8, 8] and grouped["area"] == 5
    drawn = decode_rle(mask["segmentation"], 10, 20)  # row by row: 0 1 / 1 0
    assert np.argwhere(drawn).tolist() == [[4, 18], [5, 17]] and mask["bbox"] == [17, 4, 2, 2]
    np.testing.assert_allclose(ellipse["area"], np.pi * 12, rtol=0.08)
    assert left_out == {"shape": 1, "number": 1, "mask": 1, "label": 1}
    assert "a.jpg, object 7: polyline" in examples["shape"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;">]><annotations>&y;</annotations>', "document type"),
        ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotations>&x;</annotations>', "document type"),
        ("<annotations>" + "<a>" * 300, "nested too deeply"),
        ("<annotations><image></annotations>", "mismatched"),
        ("<annotations><track/></annotations>", "CVAT for images"),
        ("<annotation/>", "not CVAT's format"),
        ('<annotations><image name="a" width="x" height="3"/></annotations>', "whole numbers"),
        ('<annotations><image name="a" width="3" height="1e40"/></annotations>', "whole numbers"),
        ('<annotations><image width="3" height="3"/></annotations>', "file_name must be a text"),
    ],
)
def test_cvat_files_that_cannot_be_read_are_one_line(text, message, tmp_path):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(UserError, match=message) as e:
        read_labels(tmp_path / "a.xml")
    assert "\n" not in str(e.value) and "a.xml" in str(e.value)


def test_labelme(tmp_path):
    shapes = [
        {"label": "cat", "shape_type": "polygon", "points": [[1, 1], [5, 1], [5, 5]], "group_id": 3, "flags": {}},
        {"label": "cat", "shape_type": "polygon", "points": [[7, 7], [9, 7], [9, 9]], "group_id": 3},
        {"label": "owl", "shape_type": "rectangle", "points": [[8, 6], [2, 3]]},
        {"label": "owl", "shape_type": "circle", "points": [[5, 5], [5, 8]]},
        {"label": "owl", "shape_type": "mask", "points": [[3, 4], [4, 5]],
         "mask": base64.b64encode(png(np.array([[1, 0], [1, 1]], np.uint8) * 255)).decode()},
        {"label": "owl", "shape_type": "mask", "points": [[3, 4], [4, 5]], "mask": "bm8="},
        {"label": "owl", "shape_type": "line", "points": [[3, 4], [4, 5]]},
        {"label": None, "points": [[1, 1], [5, 1], [5, 5]]},
        {"label": "owl", "points": [[1, 1], [5, 1]]},
        17,
    ]  # fmt: skip
    (tmp_path / "json").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(np.zeros((12, 20), np.uint8)))
    entry = {"shapes": shapes, "imagePath": "..\\images\\a.png", "imageHeight": 12, "imageWidth": 20}
    (tmp_path / "json" / "a.json").write_text(json.dumps(entry))
    content, left_out, _ = read_labels(tmp_path / "json", images=tmp_path / "images")
    assert content["images"] == [{"id": 1, "file_name": "a.png", "height": 12, "width": 20}]
    cat, box, circle, mask = content["annotations"]
    assert cat["area"] == 10 and box["bbox"] == [2, 3, 6, 3]
    np.testing.assert_allclose(circle["area"], np.pi * 9, rtol=0.09)
    assert np.argwhere(decode_rle(mask["segmentation"], 12, 20)).tolist() == [[4, 3], [5, 3], [5, 4]]
    assert left_out == {"mask": 1, "shape": 1, "label": 1, "points": 1, "entry": 1}
    del entry["imageHeight"]  # then the size is the image's own
    (tmp_path / "json" / "a.json").write_text(json.dumps(entry))
    assert read_labels(tmp_path / "json", "", tmp_path / "images").content["images"] == content["images"]


@pytest.mark.parametrize(
    ("yaml", "names"),
    [
        ("nc: 2\nnames: ['it''s', \"a, b\"]\n", ["it's", "a, b"]),
        ("names: [cat, big dog] # two\n", ["cat", "big dog"]),
        ("names:\n  0: cat # a cat\n  1: 'dog'\nnc: 2\n", ["cat", "dog"]),
        ("path: x\nnames:\n- cat\n- \"d\\u00e9\"\ntrain: y\n", ["cat", "dé"]),
    ],
)  # fmt: skip
def test_yolo(yaml, names, tmp_path):
    (tmp_path / "data.yaml").write_text(yaml)
    for name in ("images/a.png", "images/train/b.png", "images/broken.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(np.zeros((10, 20), np.uint8)) if "broken" not in name else b"no")
    (tmp_path / "labels" / "train").mkdir(parents=True)
    lines = "0 0.5 0.5 0.2 0.4\n1 .1 .1 .5 .1 .5 .5\n1 0.5 0.5 0.2 0.4 0.97\n5 .5 .5 .1 .1\n0 .1 .1\n0 .1 x .1 .1\n"
    (tmp_path / "labels" / "train" / "b.txt").write_text(lines)
    (tmp_path / "labels" / "lost.txt").write_text("0 0.5 0.5 0.2 0.4\n")
    content, left_out, examples = read_labels(tmp_path)
    assert [c["name"] for c in content["categories"]] == names
    assert [i["file_name"] for i in content["images"]] == ["a.png", "train/b.png"]
    box, outline, scored = content["annotations"]
    np.testing.assert_allclose(box["bbox"], [8, 3, 4, 4])
    np.testing.assert_allclose(outline["segmentation"], [[2, 1, 10, 1, 10, 5]])
    assert box["image_id"] == 2 and scored["bbox"] == box["bbox"]
    assert left_out == {"size": 1, "image": 1, "class": 1, "points": 1, "number": 1}
    assert examples["image"] == "lost.txt" and "train/b.png, object 4" in examples["class"]


def test_yolo_without_class_names_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.2 0.4\n")
    with pytest.raises(UserError, match="--classes"):
        read_labels(tmp_path)
    (tmp_path / "data.yaml").write_text("names: &anchor\n  x: y\n")
    with pytest.raises(UserError, match="cannot be read"):
        read_labels(tmp_path)


def test_via_of_versions_one_and_two(tmp_path):
    (tmp_path / "a.png").write_bytes(png(np.zeros((10, 20), np.uint8)))
    polygon = {"name": "polygon", "all_points_x": [1, 5, 5], "all_points_y": [1, 1, 5]}
    regions = [
        {"shape_attributes": polygon, "region_attributes": {"kind": "cat", "note": "x"}},
        {"shape_attributes": {"name": "rect", "x": 2, "y": 3, "width": 4, "height": 5},
         "region_attributes": {"kind": {"owl": True, "cat": False}}},
        {"shape_attributes": {"name": "circle", "cx": 5, "cy": 5, "r": 2}, "region_attributes": {}},
        {"shape_attributes": {"name": "point", "cx": 5, "cy": 5}, "region_attributes": {"kind": "cat"}},
    ]  # fmt: skip
    one = {"a.png9": {"filename": "a.png", "size": 9, "regions": {str(i): r for i, r in enumerate(regions)}}}
    two = {"_via_settings": {}, "_via_img_metadata": {"k": {"filename": "a.png", "regions": regions},
                                                      "m": {"filename": "missing.png", "regions": []}}}  # fmt: skip
    for number, document in enumerate((one, two)):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(document))
        assert detect_format(path) == "via"
        content, left_out, _ = read_labels(path, attribute="kind")
        names = {c["id"]: c["name"] for c in content["categories"]}
        assert [names[a["category_id"]] for a in content["annotations"]] == ["cat", "owl"]
        assert content["annotations"][1]["bbox"] == [2, 3, 4, 5] and content["annotations"][0]["area"] == 8
        assert left_out == {"label": 1, "shape": 1} | ({"size": 1} if number else {})
        with pytest.raises(UserError, match="--attribute"):
            read_labels(path)
        content = read_labels(path, one_class="thing").content
        assert content["categories"] == [{"id": 1, "name": "thing"}] and len(content["annotations"]) == 3


def test_supervisely(tmp_path):
    mask = np.zeros((3, 4, 4), np.uint8)
    mask[1, 1:3] = 255
    packed = base64.b64encode(zlib.compress(png(mask))).decode()
    bomb = base64.b64encode(zlib.compress(bytes(1 << 28))).decode()
    square = [[2, 2], [12, 2], [12, 9], [2, 9]]
    objects = [
        {"classTitle": "cat", "geometryType": "polygon",
         "points": {"exterior": square, "interior": [[[4, 4], [8, 4], [8, 7], [4, 7]]]}},
        {"classTitle": "owl", "geometryType": "rectangle", "points": {"exterior": [[1, 2], [5, 8]], "interior": []}},
        {"classTitle": "owl", "geometryType": "bitmap", "bitmap": {"data": packed, "origin": [18, 5]}},
        {"classTitle": "owl", "geometryType": "bitmap", "bitmap": {"data": bomb, "origin": [0, 0]}},
        {"classTitle": "owl", "geometryType": "point", "points": {"exterior": [[1, 2]], "interior": []}},
    ]  # fmt: skip
    (tmp_path / "ds" / "ann").mkdir(parents=True)
    entry = {"size": {"height": 12, "width": 20}, "objects": objects}
    (tmp_path / "ds" / "ann" / "a.jpg.json").write_text(json.dumps(entry))
    (tmp_path / "meta.json").write_text(json.dumps({"classes": [{"title": "owl"}, {"title": "cat"}]}))
    assert detect_format(tmp_path) == "supervisely"
    content, left_out, _ = read_labels(tmp_path)
    assert [c["name"] for c in content["categories"]] == ["owl", "cat"]
    holed, box, bitmap = content["annotations"]
    drawn = filled(holed["segmentation"], 12, 20)
    assert drawn.sum() == 10 * 7 - 4 * 3 and not drawn[5, 5] and holed["area"] == 58
    assert box["bbox"] == [1, 2, 4, 6]
    assert np.argwhere(decode_rle(bitmap["segmentation"], 12, 20)).tolist() == [[6, 19]]  # the rest is outside
    assert left_out == {"mask": 1, "shape": 1}


def test_roboflows_grouping_class_is_left_out(tmp_path):
    categories = [{"id": 0, "name": "pets", "supercategory": "none"}, {"id": 1, "name": "cat", "supercategory": "pets"}]
    images = [{"id": 0, "file_name": "a.jpg", "height": 5, "width": 6, "extra": {"name": "A.JPG"}}]
    annotations = [{"id": 0, "image_id": 0, "category_id": 1, "bbox": [1, 1, 2, 2], "segmentation": []}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "_annotations.coco.json").write_text(json.dumps(document))
    content, left_out, _ = read_labels(tmp_path)
    assert [c["name"] for c in content["categories"]] == ["cat"] and left_out == {"category": 1}
    annotations[0]["category_id"] = 0  # then it is a class like others
    (tmp_path / "_annotations.coco.json").write_text(json.dumps(document))
    assert len(read_labels(tmp_path).content["categories"]) == 2


# ------------------------------------------------------------------------------------------------ writing
def small(**more):
    a = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "iscrowd": 0, **more}
    image = {"id": 1, "file_name": "a.jpg", "height": 10, "width": 20}
    return as_truth({"images": [image], "annotations": [a], "categories": [{"id": 1, "name": "cat"}]})


def test_corrected_files_are_never_replaced_unasked(tmp_path):
    for form in WRITERS:
        files, _ = write_labels(small(), form, tmp_path / form, Outlines())
        files[0].write_text("corrected")
        with pytest.raises(UserError, match="--overwrite"):
            write_labels(small(), form, tmp_path / form, Outlines())
        assert files[0].read_text() == "corrected"
        write_labels(small(), form, tmp_path / form, Outlines(), overwrite=True)
        assert files[0].read_text() != "corrected"


def test_what_a_format_cannot_hold_is_counted_or_refused(tmp_path):
    crowd = small(iscrowd=1)
    assert write_labels(crowd, "cvat", tmp_path / "a", Outlines())[1]["crowd"] == 1
    assert write_labels(crowd, "labelme", tmp_path / "b", Outlines())[1]["crowd"] == 0
    assert read_labels(tmp_path / "b", "labelme").content["annotations"][0]["iscrowd"] == 1
    content = small(keypoints=[1, 1, 2])
    assert write_labels(content, "yolo", tmp_path / "c", Outlines())[1]["keypoints"] == 1
    content["categories"][0]["name"] = "bell\x07"
    with pytest.raises(UserError, match="XML"):
        write_labels(content, "cvat", tmp_path / "d", Outlines())
    content["categories"].append({"id": 2, "name": "bell\x07"})
    with pytest.raises(UserError, match="two classes"):
        write_labels(content, "yolo", tmp_path / "d", Outlines())
    for name in ("../a.jpg", "/a.jpg"):
        content = small()
        content["images"][0]["file_name"] = name
        with pytest.raises(UserError, match="outside of the output folder"):
            write_labels(content, "labelme", tmp_path / "e", Outlines())
    content = small()
    content["images"].append({**content["images"][0], "id": 2, "file_name": "a.png"})
    with pytest.raises(UserError, match="rename an image"):
        write_labels(content, "yolo", tmp_path / "f", Outlines())
    assert not any((tmp_path / n).exists() for n in "def")


def test_boxes_alone_and_a_tolerance(tmp_path):
    circle = np.zeros((10, 20), np.uint8)
    cv2.circle(circle, (9, 5), 4, 1, -1)
    content = small(segmentation=encode_mask(circle))
    counts = []
    for tolerance in (0, 1, 3):
        write_labels(content, "labelme", tmp_path / str(tolerance), Outlines(tolerance))
        (shape,) = json.loads((tmp_path / str(tolerance) / "a.json").read_text())["shapes"]
        counts.append(len(shape["points"]))
    assert counts[0] > counts[1] > counts[2] >= 3
    write_labels(content, "labelme", tmp_path / "boxes", Outlines(1, boxes_only=True))
    (shape,) = json.loads((tmp_path / "boxes" / "a.json").read_text())["shapes"]
    assert shape["shape_type"] == "rectangle" and shape["points"] == [[1, 1], [5, 5]]
