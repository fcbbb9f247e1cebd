"""Every format's fixture loads to known boxes, scores its own annotations perfectly, and refuses what is wrong."""

import json
import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

import dataset_cityscapes
import dataset_openimages
import dataset_voc
from common import UserError
from config import default_config, finalize_config
from data_sampling import class_aware_images, repeat_factors
from dataset import load_format
from dataset_openimages import load_openimages
from utils import polygons
from utils.image_header import image_header_size

DATA = Path(__file__).parent / "data"
EXPECTED = json.loads((DATA / "golden_oid/expected.json").read_text())


def settings(basedir: Path, *more: str):
    return finalize_config(default_config().update_args([f"DATA.BASEDIR={basedir}", "MODE_MASK=False", *more]))


def annotations_as_results(split, score=lambda i: 0.9, masks: bool = False) -> list[dict]:
    """The split's own objects as detections."""
    results = []
    for i in range(len(split)):
        found = split.annotations(i)
        height, width = split.image_size(i)
        for box, label, crowd, rings in zip(found["boxes"], found["labels"], found["is_crowd"], found["rings"]):
            if crowd:
                continue
            x1, y1, x2, y2 = box.astype(float).tolist()
            result = {"image_id": split.image_id(i), "category_id": split.label_to_category_id(int(label))}
            result |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "score": score(i)}
            if masks:
                from pycocotools import mask as mask_utils

                bitmap = polygons.rasterize(
                    polygons.rings_to_edges(rings), np.array([0, 0, width, height], np.float32), (height, width)
                )
                run = mask_utils.encode(np.asfortranarray(bitmap.astype(np.uint8)))
                result["segmentation"] = {"size": run["size"], "counts": run["counts"].decode()}
            results.append(result)
    return results


# ------------------------------------------------------------------------------------------------ image headers
@pytest.mark.quick
def test_header_sizes_equal_decoding(tmp_path):
    image = np.zeros((31, 47, 3), np.uint8)
    files = []
    for name, options in {
        "a.jpg": [],
        "b.jpg": [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
        "c.png": [],
        "d.bmp": [],
    }.items():
        files.append(tmp_path / name)
        cv2.imwrite(str(files[-1]), image, options)
    assert [image_header_size(f) for f in files] == [(31, 47)] * 4
    (tmp_path / "e.jpg").write_bytes(b"\xff\xd8\xff\xe0\x00")
    with pytest.raises(UserError, match="e.jpg is not an image that OpenCV can read"):
        image_header_size(tmp_path / "e.jpg")


# ------------------------------------------------------------------------------------------------ Pascal VOC
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


# ------------------------------------------------------------------------------------------------ LVIS
@pytest.mark.quick
def test_lvis_loads_by_url_and_scores_like_the_package(tmp_path):
    content = json.loads((DATA / "lvis_mini/lvis_v1_mini.json").read_text())
    (tmp_path / "val2017").mkdir()
    for image in content["images"]:
        name = image["coco_url"].rsplit("/", 1)[1]
        cv2.imwrite(str(tmp_path / "val2017" / name), np.zeros((image["height"], image["width"], 3), np.uint8))
    shutil.copy(DATA / "lvis_mini/lvis_v1_mini.json", tmp_path)
    split = load_format(["lvis", "lvis_v1_mini.json", "."], settings(tmp_path), "lvis")
    assert len(split) == 14 and len(split.class_names) == 9
    assert Path(split.image_file(3)).is_file()
    results = json.loads((DATA / "lvis_mini/results.json").read_text())
    metrics = split.evaluate(results, verbose=False)
    expected = json.loads((DATA / "lvis_mini/expected.json").read_text())
    for kind in ("bbox", "segm"):
        for name in ("AP", "APr", "APc", "APf", "AR"):
            assert metrics[f"{kind}/{name}"] == pytest.approx(expected[f"{kind}-300"][name], abs=1e-9)


# ------------------------------------------------------------------------------------------------ Cityscapes
@pytest.mark.quick
def test_cityscapes_instances_are_what_stays_visible():
    cfg = settings(DATA, "MODE_MASK=True")
    split = load_format(["cityscapes", "cityscapes_mini", "val"], cfg, "city")
    assert [split.image_id(i) for i in range(len(split))] == [
        "aachen_000000_000019", "aachen_000001_000019", "bonn_000000_000019",
    ]  # fmt: skip
    assert split.class_names == dataset_cityscapes.CITYSCAPES_CLASSES
    first, second = split.annotations(0), split.annotations(1)
    # A corner of the first car and a strip of it lie behind later objects; the licence plate hides nothing.
    assert first["boxes"].tolist() == [[10, 15, 40, 35], [30, 20, 60, 40], [70, 10, 86, 31]]
    assert first["is_crowd"].tolist() == [False, False, True]
    areas = [sum(polygons.signed_area(r) for r in rings) for rings in first["rings"][:2]]
    assert areas == [30 * 20 - 10 * 15 - 5 * 20, 30 * 20]
    # A person entirely behind a bus is not visible and no instance.
    assert [split.class_names[label - 1] for label in second["labels"]] == ["rider", "bus", "bicycle"]
    assert len(split.annotations(2)["labels"]) == 0
    assert all(Path(split.image_file(i)).is_file() for i in range(3))


@pytest.mark.quick
def test_cityscapes_annotations_as_detections_score_one():
    split = load_format(["cityscapes", "cityscapes_mini", "val"], settings(DATA, "MODE_MASK=True"), "city")
    metrics = split.evaluate(annotations_as_results(split, masks=True), verbose=False)
    assert metrics["bbox/AP"] == pytest.approx(1.0) and metrics["segm/AP"] == pytest.approx(1.0)
    assert metrics["cityscapes/AP"] == pytest.approx(1.0) == metrics["cityscapes/AP50_per_class/bus"]
    assert np.isnan(metrics["cityscapes/AP_per_class/train"])
    plain = load_format(["cityscapes", "cityscapes_mini", "val"], settings(DATA), "city")
    assert not any(k.startswith("cityscapes/") for k in plain.evaluate(annotations_as_results(plain), verbose=False))


@pytest.mark.quick
def test_cityscapes_instance_images_and_polygons_give_the_same(tmp_path):
    folder = tmp_path / "cityscapes_mini"
    shutil.copytree(DATA / "cityscapes_mini", folder)
    painted = dataset_cityscapes.read_cityscapes_content(folder, "val")
    for file in folder.glob("gtFine/val/*/*_polygons.json"):
        ids = dataset_cityscapes._paint_cityscapes(str(file)).astype(np.uint16)
        cv2.imwrite(str(file).replace("polygons.json", "instanceIds.png"), ids)
        file.unlink()
    assert dataset_cityscapes.read_cityscapes_content(folder, "val") == painted
    # Void is what no object covers (0), here the upper part of a picture with a road below.
    void = polygons.decode_rle(painted["images"][0]["void"], 48, 96)
    assert void[:5].all() and not void[40:].any()
    file = folder / "gtFine/val/aachen/aachen_000000_000019_gtFine_polygons.json"
    file.write_text((DATA / "cityscapes_mini/gtFine/val/aachen" / file.name).read_text().replace("persongroup", "cow"))
    file.with_name(file.name.replace("polygons.json", "instanceIds.png")).unlink()
    with pytest.raises(UserError, match="aachen_000000_000019_gtFine_polygons.json: unknown label 'cow'"):
        dataset_cityscapes.read_cityscapes_content(folder, "val")


# ------------------------------------------------------------------------------------------------ csv of boxes
@pytest.mark.quick
def test_csv_of_boxes_loads_with_and_without_a_header():
    split = load_format(["csv", "csv_mini/boxes.csv", "csv_mini/images"], settings(DATA), "boxes")
    assert [split.image_id(i) for i in range(3)] == ["a.jpg", "b.jpg", "sub/c.jpg"]
    assert split.class_names == ["fruit, ripe", "leaf"]
    assert [split.image_size(i) for i in range(3)] == [(40, 50), (30, 30), (25, 45)]
    assert split.annotations(0)["boxes"].tolist() == [[5, 5, 20.5, 30], [25, 3, 48, 36]]
    assert len(split.annotations(1)["labels"]) == 0
    assert split.annotations(2)["is_crowd"].tolist() == [True, False]
    plain = load_format(["csv", "csv_mini/headless.csv", "csv_mini/images"], settings(DATA), "boxes")
    assert plain.class_names == ["fruit", "leaf"] and plain.annotations(0)["boxes"].tolist() == [[5, 5, 20, 30]]


@pytest.mark.quick
def test_csv_annotations_as_detections_score_one():
    split = load_format(["csv", "csv_mini/boxes.csv", "csv_mini/images"], settings(DATA), "boxes")
    assert split.evaluate(annotations_as_results(split), verbose=False)["bbox/AP"] == pytest.approx(1.0)


@pytest.mark.quick
def test_csv_errors_name_the_row(tmp_path):
    shutil.copytree(DATA / "csv_mini", tmp_path / "c")
    spec, cfg = ["csv", "c/boxes.csv", "c/images"], settings(tmp_path)
    text = (tmp_path / "c/boxes.csv").read_text()
    (tmp_path / "c/boxes.csv").write_text(text.replace("20.5", "2O.5"))
    with pytest.raises(UserError, match="row 2: a coordinate is not a number"):
        load_format(spec, cfg, "boxes")
    (tmp_path / "c/boxes.csv").write_text(text.replace("ymax", "bottom edge"))
    with pytest.raises(UserError, match="no column for y2 in its header"):
        load_format(spec, cfg, "boxes")
    (tmp_path / "c/boxes.csv").write_text(text.replace("b.jpg", "gone.jpg"))
    with pytest.raises(UserError, match="1 of 3 images are missing, e.g. .*gone.jpg"):
        load_format(spec, cfg, "boxes")


# ------------------------------------------------------------------------------------------------ Open Images
@pytest.fixture
def open_images(tmp_path) -> Path:
    folder = tmp_path / "oid"
    shutil.copytree(DATA / "golden_oid", folder)
    # The box coordinates mean the image's size, which the csv files do not hold.
    return folder


@pytest.mark.quick
def test_open_images_boxes_are_in_pixels_of_the_images(open_images):
    split = load_openimages("oid", open_images, "validation")
    assert split.class_names == list(EXPECTED["classes"].values())
    lines = (open_images / "validation-annotations-bbox.csv").read_text().splitlines()[1:]
    assert sum(len(split.annotations(i)["labels"]) for i in range(len(split))) == len(lines)
    place = {split.image_id(i): i for i in range(len(split))}
    names = list(EXPECTED["classes"])
    expected = {i: [] for i in range(len(split))}
    for line in lines:
        image, _, label, _, x1, x2, y1, y2, _, _, group, _, _ = line.split(",")
        i = place[image]
        height, width = cv2.imread(split.image_file(i)).shape[:2]
        assert split.image_size(i) == (height, width)
        box = [float(x1) * width, float(y1) * height, float(x2) * width, float(y2) * height]
        expected[i].append((names.index(label) + 1, group == "1", box))
    for i, objects in expected.items():
        found = split.annotations(i)
        assert found["labels"].tolist() == [label for label, _, _ in objects]
        assert found["is_crowd"].tolist() == [group for _, group, _ in objects]
        assert np.allclose(found["boxes"], np.array([b for _, _, b in objects]).reshape(-1, 4), atol=1e-3)


@pytest.mark.quick
def test_open_images_options_change_the_boxes(open_images):
    plain = load_openimages("oid", open_images, "validation")
    objects = load_openimages("oid", open_images, "validation", group_of="object")
    dropped = load_openimages("oid", open_images, "validation", group_of="drop")
    expanded = load_openimages("oid", open_images, "validation", expand=True)
    stats = EXPECTED["stats"]

    def count(split, crowd):
        return sum(int((split.annotations(i)["is_crowd"] == crowd).sum()) for i in range(len(split)))

    assert (count(plain, False), count(plain, True)) == (stats["gt_boxes"] - stats["group_of"], stats["group_of"])
    assert (count(objects, False), count(objects, True)) == (stats["gt_boxes"], 0)
    assert (count(dropped, False), count(dropped, True)) == (stats["gt_boxes"] - stats["group_of"], 0)
    assert dropped.dropped == {"group-of box (group_of=drop)": stats["group_of"]}
    assert count(expanded, False) + count(expanded, True) == stats["gt_boxes_expanded"]
    with pytest.raises(UserError, match="group_of='keep' must be"):
        load_openimages("oid", open_images, "validation", group_of="keep")


def published_rows(folder: Path, name: str, expanded: bool) -> list[list[str]]:
    """Rows of a csv file of the golden validation set, or of what the official tool expands it to."""
    path = folder / (f"expected/validation-annotations-{name}_expanded.csv" if expanded else
                     f"validation-annotations-{name}.csv")  # fmt: skip
    return [line.split(",") for line in path.read_text().splitlines()[1:]]


@pytest.mark.quick
@pytest.mark.parametrize("expand", [False, True])
def test_open_images_verified_classes_are_those_of_the_image_labels_and_boxes(open_images, expand):
    split = load_openimages("oid", open_images, "validation", expand=expand)
    expected: dict = {}
    for name in ("human-imagelabels-boxable", "bbox"):
        for image, _, label, *_ in published_rows(open_images, name, expand):
            expected.setdefault(image, set()).add(EXPECTED["classes"][label])
    sizes = set()
    for i in range(len(split)):
        verified = split.verified_classes(i)
        found = {n for n, known in zip(split.class_names, verified[1:]) if known}
        assert verified[0] and found == expected[split.image_id(i)]
        sizes.add(len(found))
    assert split.is_federated() and len(sizes) > 3


@pytest.mark.quick
def test_open_images_classes_with_objects_left_out_are_not_verified(open_images):
    """What is trained on may lack objects that people annotated; there, their class is not background."""
    everything = load_openimages("oid", open_images, "validation")
    for options in ({"group_of": "drop"}, {"masks": True, "need_masks": True}):
        split = load_openimages("oid", open_images, "validation", **options)
        lost = 0
        for i in range(len(split)):
            before, after = everything.annotations(i), split.annotations(i)
            for label in np.unique(before["labels"]):
                whole = (before["labels"] == label).sum() == (after["labels"] == label).sum()
                assert split.verified_classes(i)[label] == whole
                lost += not whole
        assert lost > 0


@pytest.mark.quick
def test_open_images_boxes_of_ancestors_stand_beside_their_own(open_images):
    split = load_openimages("oid", open_images, "validation", expand=True)
    plain = load_openimages("oid", open_images, "validation")
    expected: dict = {}
    for image, _, label, _, x1, x2, y1, y2, *flags in published_rows(open_images, "bbox", True):
        box = [float(v) for v in (x1, y1, x2, y2)]
        expected.setdefault(image, []).append((EXPECTED["classes"][label], flags[2] == "1", *np.round(box, 4)))
    for i in range(len(split)):
        height, width = split.image_size(i)
        found = split.annotations(i)
        boxes = (found["boxes"] / np.array([width, height, width, height])).round(4)
        rows = zip([split.class_names[k - 1] for k in found["labels"]], found["is_crowd"].tolist(), *boxes.T)
        for row, wanted in zip(sorted(rows), sorted(expected.pop(split.image_id(i), [])), strict=True):
            assert row[:2] == wanted[:2] and np.allclose(row[2:], wanted[2:], atol=2e-4)
    assert not expected
    # A model of these boxes finds ancestors by itself: its detections are scored as they are.
    perfect = annotations_as_results(split)
    assert split.evaluate(perfect, verbose=False)["oid-challenge/mAP"] == pytest.approx(
        plain.evaluate(annotations_as_results(plain), verbose=False)["oid-challenge/mAP"]
    )


@pytest.mark.quick
def test_open_images_masks_become_outlines_of_their_boxes(open_images):
    split = load_openimages("oid", open_images, "validation", masks=True)
    traced = [r for i in range(len(split)) for r in split.annotations(i)["rings"] if r]
    assert len(traced) == EXPECTED["stats"]["masks"]
    lines = (open_images / "validation-annotations-object-segmentation.csv").read_text().splitlines()[1:]
    areas = []
    for line in lines:
        name, image = line.split(",")[:2]
        mask = cv2.imread(str(open_images / "masks" / name), cv2.IMREAD_GRAYSCALE) > 0
        height, width = cv2.imread(str(open_images / f"images/validation/{image}.jpg")).shape[:2]
        areas.append(mask.mean() * height * width)
    found = [sum(polygons.signed_area(r) for r in rings) for rings in traced]
    assert np.allclose(sorted(found), sorted(areas), rtol=0.02)
    trained = load_openimages("oid", open_images, "validation", masks=True, need_masks=True)
    for i in range(len(trained)):
        found = trained.annotations(i)
        assert all(rings or crowd for rings, crowd in zip(found["rings"], found["is_crowd"]))


@pytest.mark.quick
@pytest.mark.parametrize("radius", [3, 12, 60, 250])
def test_simplified_outlines_fill_nearly_the_same_pixels_with_few_vertices(radius):
    bitmap = np.zeros((600, 600), np.uint8)
    cv2.ellipse(bitmap, (300, 300), (radius, radius * 3 // 4), 30, 0, 360, 1, -1)
    cv2.circle(bitmap, (300, 300), radius // 3, 0, -1)  # a hole
    rings = polygons.mask_to_rings(bitmap > 0)
    simple = [dataset_openimages._simplified(ring) for ring in rings]
    assert len(simple) == 2 and [polygons.signed_area(r) > 0 for r in simple] == [True, False]
    drawn = polygons.rasterize(
        polygons.rings_to_edges(simple), np.array([0, 0, 600, 600], np.float32), (600, 600)
    )  # fmt: skip
    assert (drawn & (bitmap > 0)).sum() / (drawn | (bitmap > 0)).sum() > 0.97
    assert abs(drawn.sum() / bitmap.sum() - 1) < 0.02
    low, high = simple[0].min(0), simple[0].max(0)
    assert np.abs([low - rings[0].min(0), high - rings[0].max(0)]).max() <= min(1.0, 0.02 * radius)
    if radius == 250:
        assert sum(map(len, simple)) < sum(map(len, rings)) / 4


@pytest.mark.quick
def test_open_images_cache_is_used_until_a_file_changes(open_images, monkeypatch):
    first = load_openimages("oid", open_images, "validation")
    reader = dataset_openimages.read_columns
    monkeypatch.setattr(dataset_openimages, "read_columns", lambda *a, **k: pytest.fail("the cache was not used"))
    second = load_openimages("oid", open_images, "validation")
    assert np.array_equal(first.columns["boxes"], second.columns["boxes"])
    assert [second.image_file(i) for i in range(len(second))] == [first.image_file(i) for i in range(len(first))]
    assert not second.columns["boxes"].flags.owndata  # mapped, not read
    monkeypatch.setattr(dataset_openimages, "read_columns", reader)
    path = open_images / "validation-annotations-bbox.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    assert len(load_openimages("oid", open_images, "validation").columns["boxes"]) == len(first.columns["boxes"]) - 1
    # A model that names all classes in their order uses the same one.
    assert len(list((open_images / ".packrcnn-cache").iterdir())) == 1
    names = list(EXPECTED["classes"].values())
    assert load_openimages("oid", open_images, "validation", names).class_names == names
    assert len(list((open_images / ".packrcnn-cache").iterdir())) == 1
    # A damaged cache is made anew.
    for file in (open_images / ".packrcnn-cache").glob("*/boxes.npy"):
        file.write_bytes(b"")
    assert len(load_openimages("oid", open_images, "validation").columns["boxes"]) == len(first.columns["boxes"]) - 1


@pytest.mark.quick
def test_open_images_without_a_writable_folder_caches_at_home(open_images, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (open_images / ".packrcnn-cache").write_text("a file in the way of the folder")
    load_openimages("oid", open_images, "validation")
    assert list((tmp_path / "home/packrcnn").glob("*/validation-*/meta.json"))


@pytest.mark.quick
def test_open_images_missing_images_are_counted_and_refused_unless_allowed(open_images):
    files = sorted((open_images / "images/validation").iterdir())
    for file in files[:3]:
        file.unlink()
    with pytest.raises(UserError, match=f"3 of 40 images are missing, e.g. .*{files[0].name}"):
        load_openimages("oid", open_images, "validation")
    split = load_openimages("oid", open_images, "validation", keep_missing=True)
    assert len(split) == 37 and split.missing == 3
    assert split.dropped["image is missing on disk"] > 0
    assert all(Path(split.image_file(i)).is_file() for i in range(len(split)))
    split.evaluate([], verbose=False)


@pytest.mark.quick
def test_open_images_results_score_and_submit_like_the_csv(open_images, tmp_path):
    """Golden detections as COCO-format results of the split: official scores, and files that score the same."""
    from utils.oid_eval import evaluate, read_detections, read_truth

    split = load_openimages("oid", open_images, "validation")
    place = {split.image_id(i): split.image_size(i) for i in range(len(split))}
    results = []
    for line in (open_images / "detections.csv").read_text().splitlines()[1:]:
        image, label, score, *sides = line.split(",")
        if image in place:
            height, width = place[image]
            x1, x2, y1, y2 = (float(v) * s for v, s in zip(sides, (width, width, height, height)))
            results.append(
                {"image_id": image, "category_id": label, "score": float(score), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            )
    metrics = split.evaluate(results, verbose=False)
    assert metrics["oid-v2/mAP"] == pytest.approx(EXPECTED["results"]["v2_detection"]["mAP"], abs=1e-6)
    assert metrics["oid-challenge/mAP"] == pytest.approx(EXPECTED["results"]["challenge_detection"]["mAP"], abs=1e-6)
    expected = EXPECTED["results"]["v2_detection"]["per_class_AP"]["/m/0k4j"]
    assert metrics["oid-v2/AP_per_class/Car"] == pytest.approx(expected, abs=1e-6)
    truth = read_truth(open_images)
    for path in split.write_submission(tmp_path / "results.json", results):
        scores = evaluate(truth, read_detections(path, truth), "v2")
        assert scores["mAP"] == pytest.approx(EXPECTED["results"]["v2_detection"]["mAP"], abs=1e-6), path


@pytest.mark.quick
def test_open_images_masks_score_one_against_themselves(open_images, tmp_path):
    split = load_openimages("oid", open_images, "validation", masks=True, need_masks=True)
    results = annotations_as_results(split, masks=True)
    metrics = split.evaluate(results, verbose=False)
    assert metrics["oid-challenge-segm/mAP"] == pytest.approx(1.0)
    assert len(split.write_submission(tmp_path / "r.json", results)) == 4


@pytest.mark.quick
def test_open_images_classes_follow_the_given_order(open_images):
    split = load_openimages("oid", open_images, "validation", ["Dog", "Unicorn", "Car"])
    assert split.label_to_category_id(1) == "/m/0bt9lr" and split.label_to_category_id(2) is None
    labels = np.concatenate([split.annotations(i)["labels"] for i in range(len(split))])
    everything = load_openimages("oid", open_images, "validation")
    names = np.concatenate([everything.annotations(i)["labels"] for i in range(len(everything))])
    names = [everything.class_names[label - 1] for label in names]
    assert [["Dog", "", "Car"][label - 1] for label in labels] == [n for n in names if n in ("Dog", "Car")]
    assert split.dropped["class is unknown or not trained"] == len(names) - len(labels)


@pytest.mark.quick
def test_open_images_is_reached_by_the_settings_with_options(open_images):
    spec = ["openimages", "oid", "validation", "expand=True", "group_of=object"]
    split = load_format(spec, settings(open_images.parent), "oid")
    assert split.name == "oid"
    assert sum(len(split.annotations(i)["labels"]) for i in range(len(split))) == EXPECTED["stats"]["gt_boxes_expanded"]
    with pytest.raises(UserError, match="format 'openimages' has no option 'colour'"):
        load_format([*spec, "colour=red"], settings(open_images.parent), "oid")


# ------------------------------------------------------------------------------------------------ the long tail
@pytest.mark.quick
def test_repeat_factors_equal_the_formula(open_images):
    split = load_openimages("oid", open_images, "validation", group_of="object")
    threshold = 0.5
    shown = [set(split.annotations(i)["labels"].tolist()) for i in range(len(split))]
    for i, factor in enumerate(repeat_factors(split, threshold)):
        fractions = [sum(c in s for s in shown) / len(shown) for c in shown[i]]
        assert factor == pytest.approx(max([max(1, (threshold / f) ** 0.5) for f in fractions], default=1))
    assert (repeat_factors(split, 1e-9) == 1).all()


@pytest.mark.quick
def test_class_aware_draws_show_every_class_equally_often(open_images):
    split = load_openimages("oid", open_images, "validation", group_of="object")
    images = class_aware_images(split, 40000, seed=1)
    assert np.array_equal(images, class_aware_images(split, 40000, seed=1))
    c = split.columns
    owners = np.repeat(np.arange(len(split)), np.diff(c["first_object"]))
    present = np.unique(c["labels"])
    drawn = np.bincount(images, minlength=len(split))
    # Each class is drawn 40000 / C times, and seen at least that often, since images show other classes too.
    for label in present:
        assert drawn[np.unique(owners[c["labels"] == label])].sum() > 0.95 * 40000 / len(present)
    assert (drawn[np.diff(c["first_object"]) == 0] == 0).all()


# ------------------------------------------------------------------------------------------------ formats of one's own
@pytest.mark.quick
@pytest.mark.parametrize(
    "spec", [["voc", "voc_mini", "trainval"], ["csv", "csv_mini/boxes.csv", "csv_mini/images"]], ids=lambda s: s[0]
)
def test_splits_survive_pickling_and_can_still_be_scored(spec):
    split = load_format(spec, settings(DATA), "set")
    copy = pickle.loads(pickle.dumps(split))
    results = annotations_as_results(split)
    assert copy.evaluate(results, verbose=False) == pytest.approx(split.evaluate(results, verbose=False), nan_ok=True)


@pytest.mark.quick
def test_unknown_formats_and_modules_are_named():
    with pytest.raises(UserError, match="unknown format 'yolo'; known are cityscapes, csv, lvis, openimages, voc"):
        load_format(["yolo", "a", "b"], settings(DATA), "mine")
    with pytest.raises(UserError, match="No module named 'no_such_module'"):
        load_format(["no_such_module:load", "a"], settings(DATA), "mine")
    with pytest.raises(UserError, match="'voc_nowhere' does not exist|voc_nowhere does not exist"):
        load_format(["voc", "voc_nowhere", ""], settings(DATA), "mine")


@pytest.mark.quick
def test_documented_example_of_an_own_data_set_loads_and_scores(tmp_path):
    for name, lines in {
        "a": ["2 3 20 25.5 circle", "10 10 40 30 triangle"],
        "b": [],
        "c": ["0 0 50 40 square"],
    }.items():
        cv2.imwrite(str(tmp_path / f"{name}.jpg"), np.zeros((40, 50, 3), np.uint8))
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    split = load_format(["demo.own_dataset:load", str(tmp_path)], settings(tmp_path), "mine")
    assert split.class_names == ["circle", "square", "triangle"] and len(split) == 3
    assert split.annotations(0)["boxes"].tolist() == [[2, 3, 20, 25.5], [10, 10, 40, 30]]
    results = annotations_as_results(split)
    assert split.evaluate(results, verbose=False)["bbox/AP"] == pytest.approx(1.0)
    assert split.evaluate(results[1:], verbose=False)["bbox/AP_per_class/circle"] == 0
