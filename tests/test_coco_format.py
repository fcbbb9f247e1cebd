"""The reader of COCO's files: what each value may be, and that training, checking and scoring judge files alike."""

import json
import math
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dataset
from common import UserError, logger
from config import default_config, finalize_config
from tools import check_data, score
from utils import coco_format
from utils.coco_format import Unusable, as_results, as_truth, read_annotation, read_flag, read_id, read_number

pytestmark = pytest.mark.quick
FAULTS = Path(os.environ.get("PACKRCNN_SHARED", Path(__file__).parents[2] / "shared")) / "faults"
nan, inf = float("nan"), float("inf")


# ------------------------------------------------------------------------------------------------ single values
@pytest.mark.parametrize("value, expected", [(3, 3), (3.0, 3), ("3", "3"), ("a", "a"), (0, 0), (-1.0, -1)])
def test_ids_are_whole_numbers_or_texts(value, expected):
    assert read_id(value) == expected and type(read_id(value)) is type(expected)


@pytest.mark.parametrize("value", [None, True, [1], {"id": 1}, 1.5, nan, inf, 1e300])
def test_nothing_else_is_an_id(value):
    with pytest.raises(Unusable):
        read_id(value)


@pytest.mark.parametrize("value, expected", [(1, 1), ("12.5", 12.5), (" 7 ", 7), (1e30, 1e30), ("-3e2", -300)])
def test_numbers_may_be_text(value, expected):
    assert read_number(value) == expected


@pytest.mark.parametrize("value", [None, True, "", "one", [1], nan, inf, -inf, "nan", "inf", 1e31, 10**400, "1e999"])
def test_nothing_else_is_a_number(value):
    with pytest.raises(Unusable):
        read_number(value)


@pytest.mark.parametrize("value", [None, 0, 0.0, False, "0", "false", "False", "", "no"])
def test_flags_that_are_off(value):
    assert read_flag(value) is False


@pytest.mark.parametrize("value", [1, 1.0, True, "1", "true", "TRUE", "yes"])
def test_flags_that_are_on(value):
    assert read_flag(value) is True


@pytest.mark.parametrize("value", [[0], [1], {}, 2, -1, 0.5, "maybe", nan])
def test_nothing_else_is_a_flag(value):
    with pytest.raises(Unusable):
        read_flag(value)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=20,
)
KEYS = [
    "image_id",
    "category_id",
    "bbox",
    "iscrowd",
    "ignore",
    "segmentation",
    "keypoints",
    "area",
    "num_keypoints",
    "id",
]


@given(entry=st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, JUNK)) | JUNK)
def test_any_json_is_an_annotation_or_unusable(entry):
    entry = json.loads(json.dumps(entry))
    try:
        a = read_annotation(entry)
    except Unusable as e:
        assert e.reason in coco_format.REASONS and "\n" not in str(e)
        return
    assert type(a.image_id) in (int, str) and type(a.category_id) in (int, str)
    assert a.box is None or all(math.isfinite(v) for v in a.box)
    assert all(len(ring) >= 6 and len(ring) % 2 == 0 and np.isfinite(ring).all() for ring in a.rings)


@given(changes=st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=3), part=st.sampled_from(["gt", "results"]))
def test_any_json_is_scored_or_told_in_one_line(changes, part):
    content, results = base_content(), perfect_results()
    target = content["annotations"][0] if part == "gt" else results[0]
    target.update(json.loads(json.dumps(changes)))
    logger.disabled = True
    try:
        truth = as_truth(content)
        from eval_protocols import PROTOCOLS

        for name in ("coco", "voc12", "oid-v2"):
            PROTOCOLS[name](truth, as_results(results, truth, "results"), verbose=False)
    except UserError as e:
        assert "\n" not in str(e)
    finally:
        logger.disabled = False


# ------------------------------------------------------------------------------------------------ whole files
HEIGHT, WIDTH = 75, 100
BOXES = [(5, 8, 40, 30), (50, 20, 45, 40), (10, 10, 50, 50), (60, 5, 30, 60)]


def polygon(box):
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def base_content():
    """Two images with two objects each."""
    annotations = [
        {"id": n + 1, "image_id": 1 + n // 2, "category_id": 1 + n % 2, "bbox": list(box), "area": box[2] * box[3],
         "iscrowd": 0, "segmentation": [polygon(box)]}
        for n, box in enumerate(BOXES)
    ]  # fmt: skip
    images = [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (1, 2)]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "b"}],
    }


def perfect_results():
    return [
        {"image_id": a["image_id"], "category_id": a["category_id"], "score": 0.9, "bbox": a["bbox"],
         "segmentation": a["segmentation"]}
        for a in base_content()["annotations"]
    ]  # fmt: skip


class Verdicts:
    """What training, checking and scoring say of one annotation file."""

    def __init__(self, folder, text, results=None, files=("1.png", "2.png"), options=()):
        self.folder = folder
        (folder / "images").mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for file in files:
            pixels = cv2.imencode(".png", rng.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8))[1]
            (folder / "images" / file).write_bytes(pixels.tobytes())
        data = text if isinstance(text, (bytes, str)) else json.dumps(text)
        (folder / "gt.json").write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
        (folder / "r.json").write_text(json.dumps(perfect_results() if results is None else results))
        self.spec = [str(folder / "gt.json"), str(folder / "images"), *options]

    def train(self, *settings):
        """(the split, what was logged), or a UserError's text."""
        cfg = finalize_config(default_config().update_args([
            f"DATA.DATASETS={{'s': {self.spec!r}}}", "DATA.TRAIN=s", "DATA.VAL=s", *settings]))  # fmt: skip
        try:
            split = dataset.load_training_split(cfg)
            (validation,) = dataset.load_validation_splits(cfg)
            # What the start of a run accepts, its evaluation must not refuse.
            scores = validation.evaluate(perfect_results(), verbose=False)
            return split, scores
        except UserError as e:
            assert "\n" not in str(e)
            return str(e)

    def check(self, capsys):
        capsys.readouterr()
        code = check_data.main(["--data", *self.spec[:2], "--json", str(self.folder / "found.json")])
        found = self.folder / "found.json"
        findings = json.loads(found.read_text())["findings"] if found.exists() else []
        return code, "".join(capsys.readouterr()), findings

    def score(self, capsys, protocol="coco", *more):
        capsys.readouterr()
        args = ["--protocol", protocol, "--gt", self.spec[0], "--detections", str(self.folder / "r.json"), *more]
        code = score.main([*args, "--json", str(self.folder / "scores.json")])
        text = "".join(capsys.readouterr())
        return code, text, json.loads((self.folder / "scores.json").read_text()) if code == 0 else None


def change(function):
    content = base_content()
    function(content)
    return content


def each_annotation(function):
    return change(lambda c: [function(a) for a in c["annotations"]])


def first(key, value):
    return change(lambda c: c["annotations"][0].update({key: value}))


def image(**changes):
    return change(lambda c: c["images"][0].update(changes))


def category(**changes):
    return change(lambda c: c["categories"][0].update(changes))


def in_images(function):
    return change(lambda c: [function(i) for i in c["images"]])


RLE = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}

# Files that mean the same as the plain one.
SAME = {
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(base_content()).encode(),
    "utf-16": json.dumps(base_content()).encode("utf-16"),
    "sizes as text": in_images(lambda i: i.update(height=str(HEIGHT), width=str(WIDTH))),
    "sizes as floats": in_images(lambda i: i.update(height=float(HEIGHT), width=float(WIDTH))),
    "numbers as text": each_annotation(
        lambda a: a.update(bbox=list(map(str, a["bbox"])), segmentation=[list(map(str, a["segmentation"][0]))])
    ),
    "polygons as json text": each_annotation(lambda a: a.update(segmentation=json.dumps(a["segmentation"]))),
    "polygons as pairs": each_annotation(
        lambda a: a.update(segmentation=[np.reshape(a["segmentation"][0], (-1, 2)).tolist()])
    ),
    "one polygon as pairs": each_annotation(
        lambda a: a.update(segmentation=np.reshape(a["segmentation"][0], (-1, 2)).tolist())
    ),
    "one flat polygon": each_annotation(lambda a: a.update(segmentation=a["segmentation"][0])),
    "ids as floats": change(
        lambda c: [
            e.update({k: float(e[k]) for k in ("id", "image_id", "category_id") if k in e})
            for key in ("images", "annotations", "categories")
            for e in c[key]
        ]  # fmt: skip
    ),
    "iscrowd false": each_annotation(lambda a: a.update(iscrowd=False)),
    "iscrowd '0'": each_annotation(lambda a: a.update(iscrowd="0")),
    "iscrowd null": each_annotation(lambda a: a.update(iscrowd=None)),
    "no area": each_annotation(lambda a: a.pop("area")),
    "no box": each_annotation(lambda a: a.pop("bbox")),
}


@pytest.mark.parametrize("kind", SAME)
def test_the_same_meaning_gives_the_same_training_checks_and_scores(tmp_path, capsys, kind):
    for name in ("plain", "other"):
        (tmp_path / name).mkdir()
    plain, other = Verdicts(tmp_path / "plain", base_content()), Verdicts(tmp_path / "other", SAME[kind])
    (wanted, scores), (got, got_scores) = plain.train(), other.train()
    assert got.dropped == {} and len(got) == len(wanted) == 2 and got_scores == scores
    for i in range(2):
        for key in ("boxes", "labels", "is_crowd", "vertices", "ring_sizes"):
            assert np.array_equal(getattr(got.objects(i), key), getattr(wanted.objects(i), key)), key
        assert got.image_id(i) == wanted.image_id(i) and got.image_size(i) == wanted.image_size(i)
    code, _, findings = other.check(capsys)
    assert code == 0 and findings == []
    for protocol in ("coco", "voc12", "oid-v2"):
        assert other.score(capsys, protocol)[2] == plain.score(capsys, protocol)[2]
    assert other.score(capsys)[2]["metrics"]["segm/AP"] == pytest.approx(1)


@pytest.mark.parametrize("flag", [{"iscrowd": 1}, {"iscrowd": True}, {"iscrowd": "1"}, {"ignore": 1}, {"ignore": True}])
def test_ignored_objects_are_neither_trained_nor_scored(tmp_path, capsys, flag):
    verdicts = Verdicts(tmp_path, change(lambda c: c["annotations"][0].update(flag)), perfect_results()[1:])
    split, _ = verdicts.train()
    assert split.objects(0).is_crowd.tolist() == [True, False]
    assert verdicts.check(capsys)[0] == 0
    for protocol in ("coco", "voc12", "oid-v2"):
        assert verdicts.score(capsys, protocol)[2]["mAP"] == pytest.approx(1), protocol


# Annotations that cannot be used, and what each program says of them.
LEFT_OUT = {
    "category id is a list": (
        first("category_id", [1, 2]),
        "image id or category id is not a number or a text: [1, 2]",
    ),
    "category id is null": (first("category_id", None), "image id or category id is not a number or a text: None"),
    "category id is an object": (first("category_id", {"id": 1}), "is not a number or a text: {'id': 1}"),
    "image id is a list": (first("image_id", [1]), "image id or category id is not a number or a text: [1]"),
    "image id is unknown": (first("image_id", 77), "image id is not in the file"),
    "image id is a text": (first("image_id", "1"), "image id is not in the file"),
    "flag is a list": (first("iscrowd", [0]), "iscrowd or ignore is neither 0 nor 1: [0]"),
    "flag is two": (first("ignore", 2), "iscrowd or ignore is neither 0 nor 1: 2"),
    "box is an object": (first("bbox", {"x": 1}), "box is not four numbers x, y, width, height: {'x': 1}"),
    "box has a word": (first("bbox", ["a", 1, 2, 3]), "a coordinate is not a finite number: bbox ['a', 1, 2, 3]"),
    "box is not finite": (first("bbox", [nan, 1, 2, 3]), "a coordinate is not a finite number: bbox [nan, 1, 2, 3]"),
    "outline is a word": (first("segmentation", "square"), "outline is neither polygons nor RLE: 'square'"),
    "outline is a number": (first("segmentation", 7), "outline is neither polygons nor RLE: 7"),
    "counts are words": (first("segmentation", {"size": [HEIGHT, WIDTH], "counts": ["a"]}), "nor RLE: RLE"),
    "entry is a number": (change(lambda c: c["annotations"].insert(0, 5)), "is not an object with image_id"),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_training_leaves_out_is_reported_and_not_scored(tmp_path, capsys, kind):
    content, message = LEFT_OUT[kind]
    reason = message.partition(":")[0]
    verdicts = Verdicts(tmp_path, content)
    split, scores = verdicts.train()
    assert sum(split.dropped.values()) == 1 and len(split.objects(0).labels) + len(split.objects(1).labels) >= 3
    assert scores["bbox/AP"] < 1 or kind == "entry is a number"
    code, text, findings = verdicts.check(capsys)
    assert code == 1 and any(f["kind"] == "error" for f in findings)
    assert message in " ".join(f["detail"] for f in findings) or "unknown image" in " ".join(
        f["check"] for f in findings
    )
    for protocol in ("coco", "voc12", "oid-v2"):
        code, text, _ = verdicts.score(capsys, protocol)
        assert code == 0 and "are not scored: 1 × " in text and "entry 0" in text and reason.strip("…") in text


PARTS = {
    "two points": ([[1, 2, 3, 4]], "polygon part with fewer than 3 points or an odd number of coordinates"),
    "odd": ([[1, 2, 3, 4, 5, 6, 7]], "polygon part with fewer than 3 points or an odd number of coordinates"),
    "not finite": ([[1, 2, nan, 4, 5, 6]], "polygon part with a coordinate that is not a finite number"),
    "words": ([["a", 2, 3, 4, 5, 6]], "polygon part with a coordinate that is not a finite number"),
    "of another size": ({"size": [9, 9], "counts": [0, 81]}, "RLE mask that does not fit its image"),
}


@pytest.mark.parametrize("kind", PARTS)
def test_parts_of_outlines_that_are_left_out_are_reported(tmp_path, capsys, kind):
    outline, reason = PARTS[kind]
    whole = polygon(BOXES[0])
    content = first("segmentation", outline if isinstance(outline, dict) else [*outline, whole])
    verdicts = Verdicts(tmp_path, content)
    split, _ = verdicts.train("MODE_MASK=False")
    assert split.dropped == {reason: 1} and len(split.objects(0).labels) == 2
    code, _, findings = verdicts.check(capsys)
    assert code == 1 and any(f["check"] == "outline invalid" and f["annotation_id"] == 1 for f in findings)
    code, text, _ = verdicts.score(capsys)
    assert code == 0 and f"1 × {reason} (e.g. entry 0: " in text


REFUSED = {
    "trailing comma": (json.dumps(base_content())[:-1] + ",}", "a comma stands before the closing bracket: line 1 col"),
    "comma in a list": (json.dumps(base_content()).replace("}], ", "},], ", 1), "a comma stands before the closing"),
    "text after the end": (json.dumps(base_content()) + "\n}", "Extra data: line 2 column 1"),
    "cut off": (json.dumps(base_content())[:-5], "is not valid JSON"),
    "nested deeply": ('{"images": ' + "[" * 100000, "is nested too deeply"),
    "a number without end": ('{"images": [' + "9" * 5000 + "]}", "is not valid JSON: Exceeds the limit"),
    "a key twice": ('{"images": [], "images": [], "categories": []}', "the key 'images' occurs twice"),
    "latin-1": ('{"images": [{"file_name": "caf\xe9"}]}'.encode("latin-1"), "is not UTF-8 text"),
    "name of a category is a list": (category(name=["red", "rouge"]), "must be a text, not ['red', 'rouge']"),
    "name of a category is an object": (category(name={"en": "red"}), "name of category 1 must be a text"),
    "id of a category is null": (category(id=None), "category id None of 'red' must be a whole"),
    "id of a category is a list": (category(id=[1]), "category id [1] of 'red' must be"),
    "id of an image is a list": (image(id=[1]), "image id [1] must be a whole number or a"),
    "height is zero": (image(height=0), "height and width must be whole numbers"),
    "height is a word": (image(height="tall"), "whole numbers of pixels, not 'tall'"),
    "height is a fraction": (image(height=7.5), "whole numbers of pixels, not 7.5"),
    "neg_category_ids is a number": (image(neg_category_ids=3), "neg_category_ids must be"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_training_refuses_are_refused_by_all_in_the_same_words(tmp_path, capsys, kind):
    content, message = REFUSED[kind]
    verdicts = Verdicts(tmp_path, content)
    refusal = verdicts.train()
    assert isinstance(refusal, str) and message in refusal and "gt.json" in refusal
    code, text, findings = verdicts.check(capsys)
    assert code in (1, 2) and (message in text or any(message in f["detail"] for f in findings))
    for protocol in ("coco", "voc12", "oid-v2", "lvis"):
        code, text, _ = verdicts.score(capsys, protocol)
        assert code == 2 and message in text and text.count("\n") == 1


@pytest.mark.parametrize("name, message", [
    (1, "image 1: file_name must be a text, not 1"), (["1.png"], "file_name must be a text, not ['1.png']"),
    (None, "image 1 needs an id, file_name, height and width"), ({"a": 1}, "file_name must be a text"),
    ("a\0b", "has a character that no file name can have"), ("\ud800.png", "no file name can have"),
])  # fmt: skip
def test_file_names_are_texts(tmp_path, capsys, name, message):
    verdicts = Verdicts(tmp_path, image(file_name=name))
    assert message in verdicts.train()
    code, _, findings = verdicts.check(capsys)
    assert code == 1 and any(message in f["detail"] for f in findings if f["check"] == "image entry incomplete")


def test_file_names_that_are_no_text_are_found_as_bytes(tmp_path, capsys):
    file = os.fsdecode(b"caf\xe9.png")
    content = image(file_name=file)
    verdicts = Verdicts(tmp_path, json.dumps(content), files=[file, "2.png"])
    split, scores = verdicts.train()
    assert split.image_file(0) == str(tmp_path / "images" / file) and scores["bbox/AP"] == pytest.approx(1)
    assert verdicts.check(capsys)[0] == 0
    assert check_data.main(["--data", *verdicts.spec, "--page", str(tmp_path / "page")]) == 0
    assert "caf\\udce9.png" in (tmp_path / "page/index.html").read_text()


@pytest.mark.parametrize("listed, there, hint", [
    ("images\\1.png", "1.png", "images/1.png"), ("my%201.png", "my 1.png", "images/my 1.png"),
    ("e\u03011.png", "\u00e91.png", "whose accents are composed"), ("\u00e91.png", "e\u03011.png", "are decomposed"),
    ("1.png", "1.PNG", "images/1.PNG"), ("1.jpg", "1.png", "images/1.png"), ("train/1.png", "1.png", "images/1.png"),
    ("C:\\data\\1.png", "1.png", "images/1.png"),
])  # fmt: skip
def test_the_hint_names_the_file_that_is_there(tmp_path, capsys, listed, there, hint):
    content = change(lambda c: (c["images"].pop(), c["images"][0].update(file_name=listed)))
    content["annotations"] = content["annotations"][:2]
    verdicts = Verdicts(tmp_path, content, files=[there])
    refusal = verdicts.train()
    assert "1 of 1 images are missing" in refusal and "did you mean" in refusal and hint in refusal
    code, text, _ = verdicts.check(capsys)
    assert code == 2 and "did you mean" in text and hint in text


def test_ids_and_class_names_may_hold_any_characters(tmp_path, capsys):
    odd, name = "\ud800\n/*[a]", "\ud800\n/*[b]"
    content = change(lambda c: (c["images"][0].update(id=odd), c["categories"][0].update(name=name)))
    for a in content["annotations"][:2]:
        a["image_id"] = odd
    results = [{**r, "image_id": odd if r["image_id"] == 1 else 2} for r in perfect_results()]
    verdicts = Verdicts(tmp_path, content, results)
    assert verdicts.check(capsys)[0] == 0
    assert check_data.main(["--data", *verdicts.spec, "--page", str(tmp_path / "page")]) == 0
    for protocol in ("coco", "voc12", "oid-v2"):
        scores = verdicts.score(capsys, protocol)[2]
        assert scores["mAP"] == pytest.approx(1) and name in scores["per_class_AP"]


def test_a_file_without_images_is_told(tmp_path, capsys):
    verdicts = Verdicts(tmp_path, change(lambda c: c["images"].clear()))
    assert "none of its 4 annotations has the image id of one of its 0 images" in verdicts.train()
    assert verdicts.check(capsys)[0] == 1


# ------------------------------------------------------------------------------------------------ coordinates
@pytest.mark.parametrize("value", [3e8, -3e8, 1e12, 1e30, -1e30])
def test_polygons_that_reach_far_away_are_clipped_before_they_are_drawn(tmp_path, capsys, value):
    """pycocotools walks along each edge: a point at 3e8 takes gigabytes, one at 1e30 ends the process."""
    x, y, w, h = BOXES[0]
    far = [[x, y, value if value > 0 else x + w, y, x + w, y + h, x if value > 0 else value, y + h]]
    content, results = first("segmentation", far), perfect_results()
    results[0]["segmentation"] = far
    verdicts = Verdicts(tmp_path, content, results)
    split, _ = verdicts.train()
    assert np.abs(split.objects(0).vertices).max() <= max(HEIGHT, WIDTH) and split.dropped == {}
    assert verdicts.check(capsys)[0] in (0, 1)
    code, _, scores = verdicts.score(capsys)
    assert code == 0 and scores["metrics"]["segm/AP"] == pytest.approx(1)
    for protocol in ("voc12", "oid-v2"):
        assert verdicts.score(capsys, protocol)[0] == 0


def test_coordinates_beyond_any_image_are_no_numbers(tmp_path, capsys):
    verdicts = Verdicts(tmp_path, base_content(), [{**perfect_results()[0], "segmentation": [[1, 2, 1e31, 4, 5, 6]]}])
    code, text, _ = verdicts.score(capsys)
    assert code == 2 and "a polygon's coordinate is not a finite number: 1e+31" in text


def scaled(content):
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        a["bbox"] = [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]
        flat = np.reshape(a["segmentation"][0], (-1, 2)) / [WIDTH, HEIGHT]
        a["segmentation"] = [flat.ravel().tolist()]
        del a["area"]
    return content


def test_normalised_boxes_are_named_and_read_with_an_option(tmp_path, capsys):
    for name in ("plain", "refused", "read"):
        (tmp_path / name).mkdir()
    refused = Verdicts(tmp_path / "refused", scaled(base_content()))
    message = "its boxes are normalised coordinates"
    assert message in refused.train("MODE_MASK=False") and "'normalised=True'" in refused.train("MODE_MASK=False")
    code, text, _ = refused.check(capsys)
    assert code == 1 and message in text
    assert refused.score(capsys)[0] == 2
    plain = Verdicts(tmp_path / "plain", base_content())
    read = Verdicts(tmp_path / "read", scaled(base_content()), options=["normalised=True"])
    (got, scores), (wanted, wanted_scores) = read.train(), plain.train()
    assert scores == pytest.approx(wanted_scores, nan_ok=True) and scores["segm/AP"] == pytest.approx(1)
    for i in range(2):
        assert np.allclose(got.objects(i).boxes, wanted.objects(i).boxes, atol=1e-4)
        assert np.allclose(got.objects(i).vertices, wanted.objects(i).vertices, atol=1e-4)
    assert refused.score(capsys, "coco", "--normalised")[2]["mAP"] == pytest.approx(1)


def test_one_small_box_is_not_taken_for_normalised_coordinates(tmp_path):
    content = change(lambda c: c.update(annotations=[{**c["annotations"][0], "bbox": [0, 0, 1, 1]}]))
    split, _ = Verdicts(tmp_path, content).train()
    assert split.objects(0).boxes.tolist() == [[0, 0, 1, 1]]


def test_boxes_that_look_like_corners_are_hinted_at(tmp_path, capsys, caplog):
    def corners(box):
        return [box[0], box[1], box[0] + box[2], box[1] + box[3]]

    results = [{**r, "bbox": corners(r["bbox"]), "segmentation": []} for r in perfect_results()]
    verdicts = Verdicts(tmp_path, base_content(), results)
    assert "its boxes look like x1 y1 x2 y2" in verdicts.score(capsys)[1]
    assert "look like" not in Verdicts(tmp_path, base_content()).score(capsys)[1]
    wrong = Verdicts(tmp_path, each_annotation(lambda a: a.update(bbox=corners(a["bbox"]), segmentation=[])))
    code, _, findings = wrong.check(capsys)
    assert code == 1 and any(f["check"] == "boxes look like x1 y1 x2 y2" for f in findings)


# ------------------------------------------------------------------------------------------------ results
def test_results_are_scored_for_what_they_hold(tmp_path, capsys):
    masks = [{k: v for k, v in r.items() if k != "bbox"} for r in perfect_results()]
    code, text, scores = Verdicts(tmp_path, base_content(), masks).score(capsys)
    assert code == 0 and scores["mAP"] == pytest.approx(1) and "segm/AP" in scores["metrics"]
    assert "mask" in text and "box" not in text and "bbox/AP" not in scores["metrics"]
    empty = [{**r, "segmentation": e} for r, e in zip(perfect_results(), ([], {}, None, ""))]
    code, text, scores = Verdicts(tmp_path, base_content(), empty).score(capsys)
    assert code == 0 and scores["mAP"] == pytest.approx(1) and "segm/AP" not in scores["metrics"]
    half = [{**r, "segmentation": []} if n % 2 else r for n, r in enumerate(perfect_results())]
    scores = Verdicts(tmp_path, base_content(), half).score(capsys)[2]
    assert scores["metrics"]["bbox/AP"] == pytest.approx(1) and scores["metrics"]["segm/AP"] == pytest.approx(0.5)


def test_the_twelve_numbers_are_printed_for_all_types(tmp_path, capsys):
    code, text, _ = Verdicts(tmp_path, base_content()).score(capsys)
    rows = [line.split() for line in text.splitlines() if line.split()[:1] in (["box"], ["mask"])]
    assert code == 0 and [len(r) for r in rows] == [13, 13] and "AP AP50 AP75 APs APm APl AR1" in " ".join(text.split())


# ------------------------------------------------------------------------------------------------ collected files
@pytest.mark.skipif(not FAULTS.is_dir(), reason="collected files of this kind are not there: ../shared/faults")
@pytest.mark.parametrize("folder", sorted(p.name for p in FAULTS.glob("c*") if (p / "train.json").exists()) or ["none"])
def test_collected_files_end_in_a_result_or_in_one_line(folder, capsys, tmp_path):
    spec = [str(FAULTS / folder / "train.json"), str(FAULTS / folder / "images")]
    verdicts = Verdicts(tmp_path, base_content())
    verdicts.spec = spec
    trained = load_only(spec)
    code, text, findings = verdicts.check(capsys)
    if isinstance(trained, str):
        assert code in (1, 2), (trained, text)
    else:
        assert (code == 0) == (not trained.dropped), (trained.dropped, text)
    for results in sorted((FAULTS / folder).glob("res*.json")):
        for protocol in ("coco", "voc12", "oid-v2"):
            args = ["--protocol", protocol, "--gt", spec[0], "--detections", str(results)]
            assert score.main(args) in (0, 2)


def load_only(spec):
    cfg = finalize_config(default_config().update_args([f"DATA.DATASETS={{'s': {spec!r}}}", "MODE_MASK=False"]))
    try:
        return dataset.load_split(cfg, "s")
    except UserError as e:
        return str(e)
