"""Open Images' csv files load to known boxes, outlines and verified classes, through the cache or not."""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from format_sets import DATA, annotations_as_results, settings

import dataset_openimages
from common import UserError
from dataset import load_format
from dataset_openimages import load_openimages
from utils import polygons

EXPECTED = json.loads((DATA / "golden_oid/expected.json").read_text())


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


@pytest.mark.quick
def test_open_images_caches_of_processes_with_one_number_do_not_collide(open_images, monkeypatch):
    """Containers and machines that share a folder have processes of the same number; one may have been killed."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    first = load_openimages("oid", open_images, "validation")
    (cached,) = (open_images / ".packrcnn-cache").iterdir()
    shutil.copytree(cached, cached.with_name(f".{cached.name}.7"))  # what a killed process left
    shutil.rmtree(cached)
    assert np.array_equal(load_openimages("oid", open_images, "validation").columns["boxes"], first.columns["boxes"])
    assert cached.is_dir()
