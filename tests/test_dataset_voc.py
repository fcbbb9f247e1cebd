"""Pascal VOC loads to known boxes and masks, scores its own annotations perfectly, and refuses what is wrong."""

import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from format_sets import DATA, annotations_as_results, settings

import dataset_voc
from common import UserError
from dataset import load_format
from utils import polygons


@pytest.mark.quick
def test_voc_pixels_become_continuous_boxes():
    split = load_format(["voc", "voc_mini", "trainval"], settings(DATA), "voc")
    assert [split.image_id(i) for i in range(len(split))] == ["000001", "000002"]
    assert split.class_names == dataset_voc.VOC_CLASSES
    first, second = split.annotations(0), split.annotations(1)
    assert first["boxes"].tolist() == [[4, 3, 30, 30], [27, 1, 60, 40]]
    assert [split.class_names[label - 1] for label in first["labels"]] == ["dog", "person"]
    assert second["boxes"][0].tolist() == [0, 0, 50, 50]  # the whole image
    assert second["is_crowd"].tolist() == [False, True, False]
    assert Path(split.image_file(0)).is_file() and split.image_size(0) == (40, 60)
    kept = load_format(["voc", "voc_mini", "trainval", "difficult=object"], settings(DATA), "voc")
    assert not kept.annotations(1)["is_crowd"].any()


@pytest.mark.quick
def test_voc_annotations_as_detections_score_one():
    split = load_format(["voc", "voc_mini", ""], settings(DATA), "voc")
    metrics = split.evaluate(annotations_as_results(split), verbose=False)
    for name in ("voc07/mAP", "voc12/mAP", "voc12/AP_per_class/cat", "bbox/AP"):
        assert metrics[name] == pytest.approx(1.0), name
    assert np.isnan(metrics["voc12/AP_per_class/bird"])


def write_voc_masks(folder: Path) -> np.ndarray:
    """voc_mini with a segmentation of its first image: the dog behind the person, a void border, VOC's colours."""
    shutil.copytree(DATA / "voc_mini", folder)
    numbers = np.zeros((40, 60), np.uint8)
    numbers[3:30, 4:30] = 1
    numbers[1:40, 28:60] = 2
    numbers[1:3, 27:60] = 255
    palette = np.zeros((256, 3), int)
    for number in range(256):
        red, green, blue = (sum((number >> (3 * k + c) & 1) << (7 - k) for k in range(3)) for c in range(3))
        palette[number] = blue, green, red
    assert palette[[1, 2, 255]].tolist() == [[0, 0, 128], [0, 128, 0], [192, 224, 224]]  # as known of VOC
    (folder / "SegmentationObject").mkdir()
    cv2.imwrite(str(folder / "SegmentationObject/000001.png"), palette[numbers].astype(np.uint8))
    (folder / "ImageSets/Segmentation").mkdir()
    (folder / "ImageSets/Segmentation/train.txt").write_text("000001\n")
    return numbers


@pytest.mark.quick
def test_voc_segmentations_become_masks_of_their_objects(tmp_path):
    numbers = write_voc_masks(tmp_path / "voc")
    cfg = settings(tmp_path, "MODE_MASK=True")
    split = load_format(["voc", "voc", "Segmentation/train"], cfg, "voc", training=True)
    assert len(split) == 1 and not split.dropped
    found = split.annotations(0)
    assert found["boxes"].tolist() == [[4, 3, 30, 30], [27, 1, 60, 40]]  # those of the xml file
    for rings, place in zip(found["rings"], (1, 2)):
        drawn = polygons.rasterize(polygons.rings_to_edges(rings), np.array([0, 0, 60, 40], np.float32), (40, 60))
        assert np.array_equal(drawn, numbers == place)
    assert split.evaluate(annotations_as_results(split, masks=True), verbose=False)["segm/AP"] == pytest.approx(1)
    everything = load_format(["voc", "voc", ""], cfg, "voc", training=True)
    assert everything.dropped == {"no outline (MODE_MASK trains masks)": 4}  # of the images without a segmentation
    assert not load_format(["voc", "voc", ""], settings(tmp_path), "voc", training=True).dropped


@pytest.mark.quick
def test_voc_segmentations_that_do_not_fit_are_named(tmp_path, caplog, monkeypatch):
    numbers = write_voc_masks(tmp_path / "voc")
    file = tmp_path / "voc/SegmentationObject/000001.png"
    spec, cfg = ["voc", "voc", "Segmentation/train"], settings(tmp_path, "MODE_MASK=True")
    monkeypatch.setattr(dataset_voc.logger, "propagate", True)
    cv2.imwrite(str(file), np.where(numbers == 1, 2, 0).astype(np.uint8))  # plain numbers, the dog's at the person
    split = load_format(spec, cfg, "voc", training=True)
    assert split.dropped == {"no outline (MODE_MASK trains masks)": 2}
    assert "2 objects have no mask in their box, e.g. object 1 of" in caplog.text
    cv2.imwrite(str(file), np.full((40, 60, 3), 77, np.uint8))
    with pytest.raises(UserError, match="000001.png has colours that are not in VOC's palette"):
        load_format(spec, cfg, "voc")
    cv2.imwrite(str(file), numbers[:-1])
    with pytest.raises(UserError, match="000001.png is not an image of 60x40 pixels"):
        load_format(spec, cfg, "voc")


@pytest.mark.quick
def test_voc_errors_name_the_file(tmp_path):
    with pytest.raises(UserError, match="ImageSets/Main/val.txt does not exist"):
        load_format(["voc", "voc_mini", "val"], settings(DATA), "voc")
    shutil.copytree(DATA / "voc_mini", tmp_path / "voc")
    file = tmp_path / "voc/Annotations/000001.xml"
    file.write_text(file.read_text().replace("<xmin>5</xmin>", "<xmin>five</xmin>"))
    with pytest.raises(UserError, match="000001.xml: a number is missing from size or from an object's bndbox"):
        load_format(["voc", "voc", ""], settings(tmp_path), "voc")
    file.write_text("<annotation>")
    with pytest.raises(UserError, match="000001.xml cannot be read"):
        load_format(["voc", "voc", ""], settings(tmp_path), "voc")


def write_voc(folder: Path, stems=("a1", "a2"), name="person", second="dog", filename="{stem}.jpg", encoding="utf-8"):
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for stem in stems:
        cv2.imwrite(str(folder / "JPEGImages" / f"{stem}.jpg"), np.full((50, 60, 3), 128, np.uint8))
        boxes = "".join(
            f"<object><name>{n}</name><difficult>0</difficult><bndbox><xmin>{x}</xmin><ymin>6</ymin>"
            f"<xmax>{x + 19}</xmax>"
            "<ymax>40</ymax></bndbox></object>" for n, x in ((name, 1), (second, 31))
        )  # fmt: skip
        text = f'<?xml version="1.0" encoding="{encoding}"?>\n<annotation>'
        text += f"<filename>{filename.format(stem=stem)}</filename>"
        text += f"<size><width>60</width><height>50</height></size>{boxes}</annotation>"
        (folder / "Annotations" / f"{stem}.xml").write_bytes(text.encode(encoding))
    (folder / "ImageSets/Main/train.txt").write_text("\n".join(stems) + "\n")


def load_voc(folder: Path):
    split = load_format(["voc", str(folder), "train"], settings(folder), "set")
    assert [split.objects(i).boxes.tolist() for i in range(len(split))] == [[[0, 5, 20, 40], [30, 5, 50, 40]]] * len(
        split
    )
    assert all(os.path.isfile(split.image_file(i)) for i in range(len(split)))
    assert split.evaluate(annotations_as_results(split), verbose=False)["voc12/mAP"] == pytest.approx(1)
    return split


@pytest.mark.quick
@pytest.mark.parametrize("encoding", ["gb2312", "big5", "UTF8", "shift_jis", "utf-16", "latin-1", "cp1252", "utf-8"])
def test_voc_annotations_may_have_any_encoding_that_they_name(tmp_path, encoding):
    name = {"latin-1": "caf\u00e9", "cp1252": "caf\u00e9"}.get(encoding, "\u72ac")
    write_voc(tmp_path / "voc", name=name, encoding=encoding)
    assert load_voc(tmp_path / "voc").class_names == sorted(["dog", name])


@pytest.mark.quick
@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbfa1\r\na2\r\n", "a1\na2\n".encode("utf-16"), b"a1  1\na2 -1\n", b"a1.jpg\na2.xml\n", b"\n a1 \n\na2",
])  # fmt: skip
def test_voc_lists_may_have_marks_flags_and_suffixes(tmp_path, content):
    write_voc(tmp_path / "voc")
    (tmp_path / "voc/ImageSets/Main/train.txt").write_bytes(content)
    assert [load_voc(tmp_path / "voc").image_id(i) for i in (0, 1)] == ["a1", "a2"]


@pytest.mark.quick
@pytest.mark.parametrize("stems", [("my photo 1", "my photo 2"), ("cam1.5_1", "cam1.5_2"), ("a[1]", "a*"), ("1", "-1")])
@pytest.mark.parametrize("filename", [
    "{stem}.jpg", "{stem}", "JPEGImages/{stem}.jpg", "C:\\Users\\a\\old {stem}.png", "", "/home/a/{stem}.JPEG",
])  # fmt: skip
def test_voc_images_are_found_by_their_names_or_by_those_of_the_annotations(tmp_path, stems, filename):
    write_voc(tmp_path / "voc", stems, filename=filename)
    split = load_voc(tmp_path / "voc")
    assert [split.image_id(i) for i in (0, 1)] == list(stems)


@pytest.mark.quick
@pytest.mark.parametrize(
    "name, second", [("cup[big]", "a/b"), ("big_cup", "cup"), ("a*", "a"), ("..", "x.txt"), ("?", "[")]
)
def test_voc_class_names_are_names_not_patterns_or_paths(tmp_path, name, second):
    write_voc(tmp_path / "voc", name=name, second=second)
    (tmp_path / "found").mkdir()
    for n, x in ((name, 1), (second, 31)):
        lines = [f"{stem} 0.9 {x} 6 {x + 19} 40" for stem in ("a1", "a2")]
        if "/" not in n:
            (tmp_path / "found" / f"comp4_det_test_{n}.txt").write_text("\n".join(lines) + "\n")
    content = dataset_voc.read_voc_content(tmp_path / "voc", "train")
    results = dataset_voc.read_voc_detections(tmp_path / "found", content)
    names = {c["id"]: c["name"] for c in content["categories"]}
    counts = [sum(names[r["category_id"]] == n for r in results) for n in (name, second)]
    assert counts == [2, 0 if "/" in second else 2]


@pytest.mark.quick
def test_voc_detections_of_images_with_spaces_and_unknown_ones(tmp_path):
    write_voc(tmp_path / "voc", ("my photo 1", "my photo 2"))
    (tmp_path / "found").mkdir()
    file = tmp_path / "found" / "person.txt"
    file.write_text("my photo 1 0.9 1 6 20 40\n\nmy photo 2 0.8 1 6 20 40\n")
    content = dataset_voc.read_voc_content(tmp_path / "voc", "train")
    assert [r["image_id"] for r in dataset_voc.read_voc_detections(tmp_path / "found", content)] == [
        "my photo 1",
        "my photo 2",
    ]
    for line, message in (
        ("gone 0.9 1 6 20 40", "line 1: image gone"),
        ("my photo 1 nan 1 6 20 40", "line 1: not 'image"),
    ):
        file.write_text(line)
        with pytest.raises(UserError, match=message):
            dataset_voc.read_voc_detections(tmp_path / "found", content)


@pytest.mark.quick
@pytest.mark.parametrize("change, message", [
    (("<xmin>1<", "<xmin>nan<"), "a1.xml: a number"), (("<xmin>1<", "<xmin><"), "a1.xml: a number"),
    (("<name>person<", "<name> <"), "object has no name"), (("<width>60<", "<width>wide<"), "a1.xml: a number"),
    (("<difficult>0<", "<difficult>maybe<"), "a1.xml: a number"), (("</annotation>", ""), "1.xml cannot be"),
    (('encoding="utf-8"', 'encoding="klingon"'), "1.xml cannot be"),
])  # fmt: skip
def test_voc_annotations_that_cannot_be_read_are_one_line(tmp_path, change, message):
    write_voc(tmp_path / "voc")
    file = tmp_path / "voc/Annotations/a1.xml"
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(UserError, match=message) as e:
        load_voc(tmp_path / "voc")
    assert "\n" not in str(e.value)
