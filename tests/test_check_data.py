"""Planted mistakes are found, named with their image ids, and repaired in a copy; clean data stay without findings."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from tools import check_data
from tools.check_data import CHECKS, DataSource, check_leakage, check_source, fixed_content, look_at_images

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"

from data_check import quick_check  # noqa: E402


def picture(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def clean(tmp_path) -> DataSource:
    """Six images of 60 x 80, two objects each, nothing wrong."""
    folder = tmp_path / "images"
    folder.mkdir()
    images, annotations = [], []
    for i in range(6):
        cv2.imwrite(str(folder / f"{i}.jpg"), picture(i))
        images.append({"id": 10 + i, "file_name": f"{i}.jpg", "height": 60, "width": 80})
        for j, x in enumerate((5, 40)):
            polygon = [[x, 10, x + 20, 10, x + 20, 40, x, 40]]
            annotations.append({
                "id": 2 * i + j + 1, "image_id": 10 + i, "category_id": 1 + j, "bbox": [x, 10, 20, 30], "area": 600,
                "segmentation": polygon, "iscrowd": 0,
            })  # fmt: skip
    categories = [{"id": 1, "name": "left"}, {"id": 2, "name": "right"}]
    content = {"info": {"year": 2020}, "images": images, "annotations": annotations, "categories": categories}
    return DataSource("set", content, str(folder))


def edit_annotation(**changes):
    return lambda source: source.content["annotations"][4].update(changes)


def edit_image(**changes):
    return lambda source: source.content["images"][2].update(changes)


def write(name: str, content: bytes):
    return lambda source: (Path(source.folder) / name).write_bytes(content)


def cut(source: DataSource) -> None:
    path = Path(source.folder) / "2.jpg"
    path.write_bytes(path.read_bytes()[:-60])


def same_file(source: DataSource) -> None:
    (Path(source.folder) / "2.jpg").write_bytes((Path(source.folder) / "0.jpg").read_bytes())


def twelve_bits(source: DataSource) -> None:
    cv2.imwrite(str(Path(source.folder) / "2.png"), picture(2).astype(np.uint16) * 16)
    source.content["images"][2]["file_name"] = "2.png"


def object_twice(source: DataSource) -> None:
    source.content["annotations"].append({**source.content["annotations"][4], "id": 99})


def category(entry: dict):
    return lambda source: source.content["categories"].append(entry)


nan = float("nan")
PLANTED = {
    "image id used twice": lambda s: s.content["images"].append({**s.content["images"][2], "file_name": "x/../2.jpg"}),
    "image file used twice": lambda s: s.content["images"].append({**s.content["images"][2], "id": 77}),
    "image entry incomplete": edit_image(height=None),
    "image missing": edit_image(file_name="none.jpg"),
    "image unreadable": write("2.jpg", b"\xff\xd8 no image \xff\xd9"),
    "image cut off": cut,
    "image size differs": edit_image(height=50),
    "same image twice": same_file,
    "category id used twice": category({"id": 2, "name": "other"}),
    "category name used twice": category({"id": 3, "name": "left"}),
    "category without objects": category({"id": 3, "name": "middle"}),
    "annotation id used twice": edit_annotation(id=1),
    "annotation of unknown image": edit_annotation(image_id=1000),
    "annotation of unknown category": edit_annotation(category_id=9),
    "box not four finite numbers": edit_annotation(bbox=[1, 2, nan, 4]),
    "box without extent": edit_annotation(bbox=[5, 10, 0, 30]),
    "box outside the image": edit_annotation(bbox=[85, 10, 20, 30]),
    "box partly outside the image": edit_annotation(bbox=[-4, 10, 29, 30]),
    "outline invalid": edit_annotation(segmentation=[[1, 2, 3, 4]]),
    "outline without area": edit_annotation(segmentation=[[5, 10, 15, 25, 25, 40]]),
    "outline outside the image": edit_annotation(segmentation=[[-5, 10, 25, 10, 25, 40, -5, 40]]),
    "outline and box disagree": edit_annotation(bbox=[50, 10, 20, 30]),
    "area not positive": edit_annotation(area=0),
    "object twice": object_twice,
    "object of an absent class": edit_image(neg_category_ids=[1]),
    "annotation unusable": edit_annotation(category_id=[1, 2]),
    "image uses few of its bits": twelve_bits,
}
# Of a whole set, see test_what_training_leaves_out_or_refuses_is_reported.
UNREPAIRED = ("same image twice", "category without objects", "image uses few of its bits")
OF_A_SET = {
    "same image in two sets", "similar image in two sets", "boxes look like x1 y1 x2 y2", "left out of training",
    "object without an outline", "refused by training",
}  # fmt: skip


@pytest.mark.quick
def test_clean_data_have_no_findings(clean):
    facts = look_at_images(clean)
    assert check_source(clean, facts) == []
    content, done = fixed_content(clean, facts)
    assert content == clean.content and not done


@pytest.mark.quick
@pytest.mark.parametrize("check", PLANTED)
def test_planted_mistake_is_found_where_it_is(clean, check):
    PLANTED[check](clean)
    found = [f for f in check_source(clean, look_at_images(clean)) if f.check == check]
    assert len(found) == 1
    if not check.startswith("category"):
        expected = {"image file used twice": 77, "annotation of unknown image": 1000}.get(check, 12)
        assert found[0].image_id == expected


@pytest.mark.quick
def test_every_check_has_a_test():
    assert set(PLANTED) | OF_A_SET == set(CHECKS)


@pytest.mark.quick
@pytest.mark.parametrize("check", [c for c in PLANTED if c not in UNREPAIRED])
def test_repaired_copy_is_clean_and_the_original_untouched(clean, check):
    PLANTED[check](clean)
    before = copy.deepcopy(clean.content)
    facts = look_at_images(clean)
    content, done = fixed_content(clean, facts)
    assert str(clean.content) == str(before)
    cleaned = clean._replace(content=content)
    again = [f for f in check_source(cleaned, look_at_images(cleaned)) if f.check != "category without objects"]
    left = {"outline outside the image", "outline and box disagree", "category name used twice"}
    left.add("object of an absent class")
    assert {f.check for f in again} <= left
    if check not in left:
        assert again == [] and sum(done.values()) > 0
    if check == "image size differs":
        assert content["images"][2]["height"] == 60
    assert content["info"] == {"year": 2020}
    assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"])


@pytest.mark.quick
def test_run_lengths_are_checked(clean):
    annotation = clean.content["annotations"][4]
    annotation["segmentation"] = {"size": [60, 80], "counts": [5 * 60 + 10, 30, 60 * 80 - 5 * 60 - 40]}
    annotation["bbox"] = [5, 10, 1, 30]
    assert check_source(clean, {}) == []
    annotation["segmentation"]["counts"] = [1, 2]
    assert [f.check for f in check_source(clean, {})] == ["outline invalid"]
    assert fixed_content(clean, {})[0]["annotations"][4]["segmentation"] == []


@pytest.mark.quick
def test_images_shared_by_two_sets_are_found_also_when_compressed_anew(clean, tmp_path):
    other = tmp_path / "val"
    other.mkdir()
    (other / "a.jpg").write_bytes((Path(clean.folder) / "3.jpg").read_bytes())
    cv2.imwrite(str(other / "b.png"), cv2.resize(picture(4), (160, 120)))
    cv2.imwrite(str(other / "c.jpg"), picture(50))
    sizes = {"a.jpg": (60, 80), "b.png": (120, 160), "c.jpg": (60, 80)}
    images = [{"id": n, "file_name": n, "height": h, "width": w} for n, (h, w) in sizes.items()]
    val = DataSource("val", {"images": images, "annotations": [], "categories": []}, str(other))
    found = check_leakage("set", look_at_images(clean), "val", look_at_images(val))
    assert [(f.check, f.data, f.image_id) for f in found] == [
        ("same image in two sets", "val", "a.jpg"),
        ("similar image in two sets", "val", "b.png"),
    ]
    assert "image 13 of set" in found[0].detail and "image 14 of set" in found[1].detail


@pytest.mark.quick
def test_command_line_writes_findings_copy_and_page(clean, tmp_path):
    PLANTED["box without extent"](clean)
    PLANTED["image size differs"](clean)
    file = tmp_path / "train.json"
    file.write_text(json.dumps(clean.content))
    before = file.read_bytes()
    call = [sys.executable, str(ROOT / "tools/check_data.py"), "--data", str(file), clean.folder]
    outputs = ["--json", tmp_path / "f.json", "--fix", tmp_path / "fixed", "--page", tmp_path / "page"]
    done = subprocess.run([*call, *map(str, outputs)], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "box without extent" in done.stdout
    report = json.loads((tmp_path / "f.json").read_text())
    assert report["counts"] == {"train": {"box without extent": 1, "image size differs": 1}}
    assert {f["image_id"] for f in report["findings"]} == {12}
    assert file.read_bytes() == before
    assert {"train", "images", "6", "annotations", "12", "errors", "2"} <= set(done.stdout.replace("|", " ").split())
    page = (tmp_path / "page/index.html").read_text()
    assert "left 6, right 6" in page
    # The box without extent is framed by stripes of black and white, and nothing else is.
    framed = []
    for name in sorted(p.name for p in (tmp_path / "page").glob("*.png")):
        picture = cv2.imread(str(tmp_path / "page" / name))
        y, x = np.ogrid[: picture.shape[0], : picture.shape[1]]
        striped = (picture == np.where((x + y) % 16 < 8, 255, 0)[:, :, None]).all(2)
        framed.append(bool(cv2.erode(striped.astype(np.uint8), np.ones((9, 9))).any()))
    assert framed == [True] + [False] * 5
    shown = sorted(p.name for p in (tmp_path / "page").glob("*.png"))
    assert len(shown) == 6 and all(name in page for name in shown) and "box without extent" in page
    fixed = [*call[:2], "--data", str(tmp_path / "fixed/train.json"), clean.folder]
    assert subprocess.run(fixed, capture_output=True).returncode == 0
    again = subprocess.run([*call, "--fix", str(tmp_path / "fixed")], capture_output=True, text=True)
    assert again.returncode == 2 and "train.json exists; choose a folder without it" in again.stderr


@pytest.mark.quick
def test_wrong_folder_is_said_once(clean, tmp_path, capsys):
    file = tmp_path / "train.json"
    file.write_text(json.dumps(clean.content))
    assert check_data.main(["--data", str(file), str(tmp_path)]) == 2
    assert "none of its 6 images exists" in capsys.readouterr().err


@pytest.mark.quick
def test_registered_sets_are_checked_through_the_settings():
    settings = [f"DATA.BASEDIR={DATA / 'coco_mini'}", "DATA.TRAIN=coco_train2017", "DATA.VAL=coco_val2017"]
    sources = [source for source, _ in check_data.configured_sources(settings)]
    findings, _ = check_data._check_all(sources, quick=False)
    assert {f.check for f in findings if CHECKS[f.check] == "error"} == set()


@pytest.fixture
def open_images(tmp_path) -> Path:
    folder = tmp_path / "oid"
    shutil.copytree(DATA / "golden_oid", folder)
    return folder


def open_images_settings(folder: Path, *more: str) -> list[str]:
    sets = {s: ["openimages", str(folder), s] for s in ("train", "validation")}
    return [f"DATA.DATASETS={sets}", "DATA.TRAIN=train", "DATA.VAL=validation", "MODE_MASK=False", *more]


@pytest.mark.quick
def test_open_images_are_checked_as_published(open_images, tmp_path):
    settings = open_images_settings(open_images)
    clean = [source for source, _ in check_data.configured_sources(settings)]
    before, _ = check_data._check_all(clean, quick=False)
    boxes = open_images / "validation-annotations-bbox.csv"
    lines = boxes.read_text().splitlines()
    image, source, label, confidence, x1, x2, y1, y2, *flags = lines[1].split(",")
    head = [image, source, label, confidence]
    lines += [
        ",".join([*head, x2, x1, y1, y2, *flags]),
        ",".join([*head, "0.9", "1.5", y1, y2, *flags]),
        ",".join([image, source, "/m/nothing", confidence, x1, x2, y1, y2, *flags]),
        lines[1],
    ]
    boxes.write_text("\n".join(lines) + "\n")
    gone = sorted((open_images / "images/validation").iterdir())[-1]
    gone.unlink()
    sources = [source for source, _ in check_data.configured_sources(settings)]
    found, _ = check_data._check_all(sources, quick=False)
    new = [f for f in found if f not in before and f.check != "annotation of unknown image"]
    assert sorted(f.check for f in new if f.annotation_id) == [
        "annotation of unknown category", "box partly outside the image", "box without extent", "object twice",
    ]  # fmt: skip
    last = len(lines) - 1
    assert {f.check: f.annotation_id for f in new if f.annotation_id} == {
        "box without extent": last - 3, "box partly outside the image": last - 2,
        "annotation of unknown category": last - 1, "object twice": last,
    }  # fmt: skip
    assert [(f.check, f.image_id) for f in new if f.check == "image missing"] == [("image missing", gone.stem)]


@pytest.mark.quick
def test_open_images_become_a_clean_json_that_says_the_same(open_images, tmp_path, capsys):
    """--fix writes COCO's format, which loads to the same boxes and verified classes as the csv files."""
    from config import default_config, finalize_config
    from dataset import load_split
    from dataset_openimages import load_openimages

    before = {p: p.read_bytes() for p in open_images.rglob("*.csv")}
    settings = open_images_settings(open_images)
    out = ["--fix", str(tmp_path / "fixed"), "--page", str(tmp_path / "page"), "--pictures", "3", "--quick"]
    assert check_data.main(["--config", *settings, *out]) in (0, 1)
    assert all(p.read_bytes() == content for p, content in before.items())
    assert len(list((tmp_path / "page").glob("train-*.png"))) >= 3
    cfg = default_config()
    images = open_images / "images/train"
    cfg.DATA.DATASETS = {"json": [str(tmp_path / "fixed/train.json"), str(images)]}
    plain = load_split(finalize_config(cfg), "json")
    csv = load_openimages("csv", open_images, "train")
    assert plain.class_names == sorted_names(csv) and len(plain) == len(csv)
    place = {csv.image_id(i): i for i in range(len(csv))}
    label = {n: k for k, n in enumerate(csv.class_names, 1)}
    order = [0, *(label[n] for n in plain.class_names)]
    for i in range(len(plain)):
        k = place[plain.image_id(i)]
        assert plain.image_file(i) == csv.image_file(k)
        assert np.array_equal(plain.verified_classes(i), csv.verified_classes(k)[order])
        mine, theirs = plain.annotations(i), csv.annotations(k)
        rows = {(*b.round(2).tolist(), order[n], bool(c)) for b, n, c in zip(*(mine[f] for f in FIELDS))}
        assert rows == {(*b.round(2).tolist(), int(n), bool(c)) for b, n, c in zip(*(theirs[f] for f in FIELDS))}


FIELDS = ("boxes", "labels", "is_crowd")


def sorted_names(split) -> list[str]:
    """Class names in the order of the category ids."""
    ids = [split.label_to_category_id(k) for k in range(1, len(split.class_names) + 1)]
    return [n for _, n in sorted(zip(ids, split.class_names))]


@pytest.mark.quick
@pytest.mark.parametrize("spec, checked", [
    (["voc", "voc_mini", ""], 7), (["csv", "csv_mini/boxes.csv", "csv_mini/images"], 4),
    (["cityscapes", "cityscapes_mini", "val"], 6), (["lvis", "lvis_mini/lvis_v1_mini.json", "."], 120),
], ids=lambda s: s[0] if isinstance(s, list) else "")  # fmt: skip
def test_every_format_is_checked_through_the_settings(spec, checked, tmp_path, capsys):
    settings = [f"DATA.BASEDIR={DATA}", f"DATA.DATASETS={{'set': {spec}}}", "DATA.TRAIN=set", "DATA.VAL=set"]
    if spec[0] == "lvis":  # its images are not in the tests
        assert check_data.main(["--config", *settings]) == 2
        assert "DATA.KEEP_MISSING_IMAGES" in capsys.readouterr().err
        return
    assert check_data.main(["--config", *settings, "--page", str(tmp_path)]) == 0
    assert f" {checked} " in capsys.readouterr().out
    assert list(tmp_path.glob("set-*.png"))


@pytest.mark.quick
def test_quick_check_opens_a_sample_of_a_split(clean, tmp_path):
    from config import default_config, finalize_config
    from dataset import load_split

    file = tmp_path / "train.json"
    PLANTED["image size differs"](clean)
    file.write_text(json.dumps(clean.content))
    cfg = default_config()
    cfg.DATA.DATASETS = {"mine": [str(file), clean.folder]}
    split = load_split(finalize_config(cfg), "mine")
    assert [(f.check, f.image_id) for f in quick_check(split)] == [("image size differs", 12)]


@pytest.mark.quick
def test_a_page_shows_names_of_half_a_character(clean, tmp_path):
    clean.content["categories"][0]["name"] = "le\ud800ft"
    (tmp_path / "set.json").write_text(json.dumps(clean.content))
    words = ["--data", str(tmp_path / "set.json"), clean.folder, "--page", str(tmp_path / "page")]
    assert check_data.main(words) in (0, 1)
    assert "le?ft" in (tmp_path / "page/index.html").read_text()
