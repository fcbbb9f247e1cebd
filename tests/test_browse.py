"""Pages of data: which images are chosen, what a training batch's picture shows, the page in a browser, bad input."""

import csv
import itertools
import re
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np
import pytest
from browser import Browser, needs_browser
from format_sets import copy_sets
from graph import save_untrained
from tiny import COCO_MINI

import browse
import browse_rois
from common import UserError
from config import default_config, finalize_config
from data import training_keys
from data_workers import training_dataflow
from dataset import load_split, load_training_split
from tools import browse as tool
from utils import np_box_ops

SETTINGS = [f"DATA.BASEDIR={COCO_MINI}", "TRAIN.EVAL_PERIOD=0"]


def configured(*more):
    return finalize_config(default_config().update_args([*SETTINGS, *more]))


@pytest.fixture(scope="module")
def split():
    return load_split(configured(), "coco_train2017")


def test_images_are_chosen_by_what_their_annotations_hold(split):
    facts = []
    for i in range(len(split)):
        a = split.annotations(i)
        area = (a["boxes"][:, 2:] - a["boxes"][:, :2]).prod(1)
        facts.append((a["labels"], area, a["is_crowd"]))
    person = split.class_names.index("person") + 1

    def expected(fits):
        return [i for i, fact in enumerate(facts) if fits(*fact)]

    cases = [
        (browse.Filter(), lambda labels, area, crowd: True),
        (browse.Filter(classes=["person"]), lambda labels, area, crowd: (labels[~crowd] == person).any()),
        (browse.Filter(size="small"), lambda labels, area, crowd: (area[~crowd] < 32**2).any()),
        (browse.Filter(classes=["person"], size="large"),
         lambda labels, area, crowd: ((labels == person) & (area >= 96**2) & ~crowd).any()),
        (browse.Filter(crowd=True), lambda labels, area, crowd: crowd.any()),
        (browse.Filter(empty=True), lambda labels, area, crowd: len(labels) == 0),
    ]  # fmt: skip
    for wanted, fits in cases:
        assert browse.choose_images(split, wanted).tolist() == expected(fits), wanted
    ids = [str(split.image_id(3)), str(split.image_id(1))]
    assert browse.choose_images(split, browse.Filter(image_ids=ids)).tolist() == [1, 3]


def test_a_page_shows_the_chosen_images_with_their_objects(split, tmp_path):
    count = browse.write_images(split, browse.Filter(classes=["person"]), tmp_path, number=2, start=1)
    page = (tmp_path / "index.html").read_text()
    assert f"{count} of {len(split)} images fit; number 2 to 3 are shown." in page
    assert ("--start 3 shows the next." in page) == (count > 3)
    chosen = browse.choose_images(split, browse.Filter(classes=["person"]))[1:3]
    names = re.findall(r'<img loading=lazy src="([^"]+)"', page)
    assert names == [f"images/{i}-{split.image_id(i)}.jpg" for i in chosen]
    for name, i in zip(names, chosen):
        picture = cv2.imread(str(tmp_path / name)).astype(int)
        photo = cv2.resize(cv2.imread(split.image_file(i)), picture.shape[1::-1]).astype(int)
        assert (np.abs(picture - photo).max(2) > 60).mean() > 0.01  # something is drawn


def test_the_tool_shows_the_batches_that_training_reads_with_all_its_changes(tmp_path, split, monkeypatch):
    shown, original = [], browse.draw_batch
    monkeypatch.setattr(browse, "draw_batch", lambda batch, n, names: shown.append(batch) or original(batch, n, names))
    arguments = ["MODE_FPN=True", "MODE_MASK=True", "PREPROC.SHORT_EDGE_SIZE=[96,128]", "PREPROC.MAX_SIZE=192",
                 "TRAIN.SEED=3", "PREPROC.RANDOM_CROP=[0.6,1.0]", "PREPROC.COPY_PASTE=1.0",
                 "PREPROC.PHOTOMETRIC=1.0"]  # fmt: skip
    words = ["--batches", "2", "--start", "1", "--out", str(tmp_path)]
    assert tool.main(["--config", *SETTINGS, *arguments, *words]) == 0
    texts = re.findall(r"<figcaption>(.*?)</figcaption>", (tmp_path / "index.html").read_text())
    assert [t.split(":")[0] for t in texts] == ["batch 1, image 0", "batch 2, image 0"]
    cfg = configured(*arguments, "DATA.NUM_WORKERS=2")
    flow = training_dataflow(load_training_split(cfg), cfg)
    for batch, values in zip(shown, itertools.islice(iter(flow), 1, 3)):
        for key, value in zip(training_keys(cfg), values):
            np.testing.assert_array_equal(batch[key], value)


@pytest.fixture(scope="module")
def every_format(tmp_path_factory):
    return copy_sets(tmp_path_factory.mktemp("sets"))


@pytest.mark.parametrize(
    "spec, images, filtered",
    [
        (["voc", "voc_mini", "trainval"], 2, {"--crowd": 1, "--size small": 2}),
        (["lvis", "lvis_mini/lvis_v1_mini.json", "lvis_mini"], 14, {"--size small": 14}),
        (["cityscapes", "cityscapes_mini", "val"], 3, {"--crowd": 1, "--empty": 1, "--class car": 1}),
        (
            ["openimages", "golden_oid", "validation"],
            40,
            {"--crowd": 23, "--empty": 2, "--image-id 4d8c8d40b351bd54": 1},
        ),
        (["csv", "csv_mini/boxes.csv", "csv_mini/images"], 3, {"--empty": 1, "--crowd": 1}),
    ],
)
def test_every_format_has_its_page_and_its_filters(every_format, tmp_path, spec, images, filtered):
    config = [f"DATA.BASEDIR={every_format}", f"DATA.DATASETS={{'set': {spec}}}", "DATA.TRAIN=set"]

    def shown(*args):
        out = tmp_path / f"page{len(list(tmp_path.iterdir()))}"
        assert tool.main(["--config", *config, "--out", str(out), *args]) == 0
        page = (out / "index.html").read_text()
        pictures = [unquote(p) for p in re.findall(r'src="([^"]+)"', page)]
        assert all(cv2.imread(str(out / p)) is not None for p in pictures)
        return len(pictures)

    assert shown() == images
    for flags, count in filtered.items():
        assert shown(*flags.split()) == count
    config.append("MODE_MASK=False")
    assert shown("--batches", "1") == 1


def test_images_of_similar_names_have_pictures_of_their_own(tmp_path):
    names = ["a/1.png", "a_1.png", "a 1.png", *(f"{'long' * 30}{k}.png" for k in range(2))]
    (tmp_path / "a").mkdir()
    for value, name in enumerate(names):
        cv2.imwrite(str(tmp_path / name), np.full((40, 60, 3), 50 * value, np.uint8))
    (tmp_path / "boxes.csv").write_text("image,x1,y1,x2,y2,label\n" + "".join(f"{n},1,1,9,9,cat\n" for n in names))
    config = [f"DATA.BASEDIR={tmp_path}", "DATA.DATASETS={'set': ['csv', 'boxes.csv', '.']}"]
    assert tool.main(["--config", *config, "--data", "set", "--out", str(tmp_path / "page")]) == 0
    pictures = re.findall(r'src="([^"]+)"', (tmp_path / "page/index.html").read_text())
    values = [int(np.median(cv2.imread(str(tmp_path / "page" / p)))) for p in pictures]
    assert values == pytest.approx([50 * k for k in range(5)], abs=3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--class", "unicorn"], "--class unicorn: coco_train2017 has no such class"),
        (["--image-id", "77777"], "--image-id 77777 is not in coco_train2017"),
        (["--start", "9999"], "no image to show"),
        (["--batches", "1", "--empty"], "--batches shows what training reads"),
        (["--load", "x"], "give --batches"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message):
    assert tool.main(["--config", *SETTINGS, "--out", str(tmp_path / "page"), *arguments]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "page").exists()


def test_an_image_that_cannot_be_chosen_is_a_usererror(split):
    with pytest.raises(UserError):
        browse.choose_images(split, browse.Filter(classes=["unicorn"]))


def test_a_models_proposals_and_sampled_rois_are_shown_with_their_labels(tmp_path, monkeypatch):
    seen, original = [], browse_rois.roi_reader

    def recorded(*args):
        read = original(*args)
        return lambda batch: seen.append((batch, read(batch))) or seen[-1][1]

    monkeypatch.setattr(browse_rois, "roi_reader", recorded)
    model_file = save_untrained(tmp_path / "model.npz")
    rng = np.random.default_rng(0)
    lines = ["image,x1,y1,x2,y2,label"]
    for k, label in enumerate(("cat", "dog", "owl")):
        cv2.imwrite(str(tmp_path / f"{k}.png"), rng.integers(0, 255, (90, 120, 3), np.uint8))
        lines += [f"{k}.png,5,5,60,70,{label}", f"{k}.png,50,20,110,85,owl"]
    (tmp_path / "boxes.csv").write_text("\n".join(lines) + "\n")
    config = [f"DATA.BASEDIR={tmp_path}", "DATA.DATASETS={'set': ['csv', 'boxes.csv', '.']}", "DATA.TRAIN=set",
              "MODE_MASK=False", "TRAIN.EVAL_PERIOD=0"]  # fmt: skip
    out = tmp_path / "page"
    assert tool.main(["--config", *config, "--batches", "2", "--load", str(model_file), "--out", str(out)]) == 0
    page = (out / "index.html").read_text()
    texts = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert len(texts) == 6
    assert all("objects" in a and "proposals" in b and "sampled RoIs" in c for a, b, c in zip(*[iter(texts)] * 3))
    assert all(cv2.imread(str(out / p)) is not None for p in re.findall(r'src="([^"]+)"', page))

    # A RoI is labelled as the object that it overlaps by half or more; objects themselves are among the RoIs.
    (batch, found), _ = seen
    rois, labels, kept = (found[key][0] for key in ("rois", "labels", "kept"))
    common = np_box_ops.pairwise_intersection(rois[kept], batch["gt_boxes"][0])
    iou = common / (np_box_ops.area(rois[kept])[:, None] + np_box_ops.area(batch["gt_boxes"][0]) - common)
    expected = np.where(iou.max(1) >= 0.5, batch["gt_labels"][0][iou.argmax(1)], 0)
    assert labels[kept].tolist() == expected.tolist() and (iou.max(0) > 0.999).all()
    assert found["valid"].any() and (np.diff(found["proposals"][0], axis=0) != 0).any()


@needs_browser()
def test_names_of_classes_and_files_are_text(tmp_path):
    name, label = "<img src=x onerror=alert(1)>&'.png", "<svg onload=alert(2)>\"'&</script><u>cat"
    cv2.imwrite(str(tmp_path / name), np.zeros((40, 60, 3), np.uint8))
    rows = [["image", "x1", "y1", "x2", "y2", "label"], [name, 1, 1, 9, 9, label]]
    with open(tmp_path / "boxes.csv", "w", newline="") as f:
        csv.writer(f).writerows(rows)
    config = [f"DATA.BASEDIR={tmp_path}", "DATA.DATASETS={'<b>set': ['csv', 'boxes.csv', '.']}"]
    assert tool.main(["--config", *config, "--data", "<b>set", "--out", str(tmp_path / "page")]) == 0
    with Browser(360, 800) as page:
        page.open(tmp_path / "page/index.html")
        page.wait_for("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert page.js("document.querySelector('figcaption').textContent").endswith(f"{name}: 1 {label}")
        assert page.js("document.querySelectorAll('main b, main u, main svg, main [onerror]').length") == 0
        assert page.js("document.documentElement.scrollWidth") <= 360 and page.problems == []


@needs_browser()
def test_the_page_works_in_a_browser_at_both_widths(split, tmp_path):
    browse.write_images(split, browse.Filter(), tmp_path)
    for width in (1400, 360):
        with Browser(width, 800) as page:
            page.open(Path(tmp_path / "index.html"))
            assert page.js("document.documentElement.scrollWidth") <= width
            page.js("i = document.querySelector('input'); i.value = 'person'; i.dispatchEvent(new Event('input'))")
            shown = page.js("[...document.querySelectorAll('figure')].filter(f => !f.hidden).length")
            assert shown == len(browse.choose_images(split, browse.Filter(classes=["person"])))
            page.js("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
            page.wait_for("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            assert page.problems == []
