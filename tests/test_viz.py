"""Pictures show what they should where they should, and files of different inputs never replace each other."""

import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
import types

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import pytest

import viz
from common import UserError
from detections import Detections, paste_masks

pytestmark = pytest.mark.quick

GRAY = 127


def blank(height=240, width=320):
    return np.full((height, width, 3), GRAY, np.uint8)


def make_detections(boxes, scores=None, labels=None, masks=False, keypoints=None, shape=(240, 320)):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    n = len(boxes)
    rles = paste_masks(np.full((n, 14, 14), 0.99, np.float32), boxes, *shape) if masks else None
    scores = np.linspace(0.99, 0.6, n) if scores is None else scores
    labels = np.arange(1, n + 1) if labels is None else labels
    return Detections(boxes, np.array(scores, np.float32), np.array(labels, np.int32), rles, keypoints)


def tags(detections, names, shape=(240, 320), font=None):
    """The rectangles of the name tags, by recording where text is put."""
    places = []
    original = viz._put_text

    def record(canvas, text, left, top, size, color, weight=500):
        width, height, _ = viz._text_size(text, size, weight)
        places.append((text, left, top, left + width, top + height))
        original(canvas, text, left, top, size, color, weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(viz, "_put_text", record)
        viz.draw_detections(blank(*shape), detections, names)
    return places


def test_names_are_drawn_where_the_font_has_letters_of_them_else_the_number_of_the_class():
    for name in ("dog", "日本語", "кот", "حصان", "?", "-", "", "cat 🐱", "ไทย cat"):
        assert viz.drawable_name(name, 3) == name
    for name in ("हिन्दी", "ไทย"):
        assert viz.drawable_name(name, 3) == "class 3"
    (shown,) = tags(make_detections([[10, 20, 60, 70]], labels=[2]), ["a", "ไทย"])
    assert shown[0] == "class 2 0.99"


def test_class_colours_are_stable_distinct_and_allow_readable_text():
    colors = np.array([viz.class_color(label) for label in range(1, 81)], np.float32)
    lab = cv2.cvtColor(colors[None] / 255, cv2.COLOR_BGR2Lab)[0]
    distance = np.linalg.norm(lab[:, None] - lab, axis=-1) + 1e9 * np.eye(80)
    assert distance.min() > 8  # a just noticeable difference is about 2
    assert distance[:12, :12].min() > 35
    assert viz.class_color(1) == viz.class_color(1) and viz.class_color(1000) is not None
    linear = np.where(colors <= 10, colors / 255 / 12.92, ((colors / 255 + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.0722, 0.7152, 0.2126]
    for color, value in zip(colors, luminance):
        text = viz._text_color(tuple(int(c) for c in color))
        contrast = (value + 0.05) / 0.05 if text == (0, 0, 0) else 1.05 / (value + 0.05)
        assert contrast > 4.5  # WCAG 2 level AA


def test_only_detections_above_the_threshold_are_drawn_and_the_input_stays():
    image = blank()
    found = make_detections([[20, 40, 90, 120], [200, 100, 300, 220]], [0.9, 0.3], masks=True)
    picture = viz.draw_detections(image, found, ["a", "b"], threshold=0.5)
    assert (image == GRAY).all() and picture.shape == image.shape and picture.dtype == np.uint8
    changed = (picture != GRAY).any(-1)
    assert changed[60:100, 30:80].all()
    assert not changed[:, 190:].any()
    assert (viz.draw_detections(image, found, ["a", "b"], threshold=0.95) == image).all()


def test_a_mask_is_translucent_and_a_small_object_stays_visible_on_a_large_one():
    image = blank()
    image[::2] = 30
    found = make_detections([[140, 100, 180, 140], [0, 0, 320, 240]], [0.6, 0.9], [1, 2], masks=True)
    picture = viz.draw_detections(image, found, ["small", "large"]).astype(int)
    inside = picture[110:130, 150:170]
    assert np.abs(inside[::2].mean((0, 1)) - inside[1::2].mean((0, 1))).min() > 15
    alone = viz.draw_detections(image, make_detections([[0, 0, 320, 240]], labels=[2], masks=True), ["", "l"])
    toward = np.array(viz.class_color(1)) - np.array(viz.class_color(2))
    shift = (inside - alone[110:130, 150:170]).mean((0, 1))
    assert np.dot(shift, toward) / np.linalg.norm(shift) / np.linalg.norm(toward) > 0.5


@pytest.mark.parametrize("shape", [(240, 320), (60, 400), (1000, 50), (24, 24), (1, 300), (1500, 2000)])
def test_tags_stay_inside_the_picture(shape):
    height, width = shape
    boxes = [[0, 0, width, height], [0, 0, 5, 5], [width - 3, height - 3, width, height], [-9, -9, width + 9, 4]]
    for text, x1, y1, x2, y2 in tags(make_detections(boxes, shape=shape), ["cat"] * 4, shape):
        assert x1 >= 0 and y1 >= 0
        if width > 100:
            assert x2 <= width, text
        if height > 40:
            assert y2 <= height, text


def test_tags_of_nearby_objects_do_not_cover_each_other():
    boxes = [[60 + 7 * i, 60 + 5 * i, 200 + 7 * i, 190 + 5 * i] for i in range(6)]
    places = tags(make_detections(boxes), ["object"] * 6)
    assert len(places) == 6
    for i, a in enumerate(places):
        for b in places[:i]:
            overlap = max(0, min(a[3], b[3]) - max(a[1], b[1])) * max(0, min(a[4], b[4]) - max(a[2], b[2]))
            assert overlap <= 0.1 * (a[3] - a[1]) * (a[4] - a[2])


@pytest.mark.parametrize("name", ["café", "Größe", "кошка", "猫", "고양이", "a" * 200, "", "tab\tname"])
def test_names_in_any_script_are_drawn(name):
    with_name = viz.draw_detections(blank(), make_detections([[50, 80, 250, 200]]), [name])
    without = viz.draw_detections(blank(), make_detections([[50, 80, 250, 200]]), [""])
    assert (with_name != without).any() or name == ""


def test_different_letters_look_different():
    drawn = [viz.draw_detections(blank(), make_detections([[50, 80, 250, 200]]), [n]) for n in ("猫", "犬", "é", "è")]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert (a != b).any()


def test_a_label_without_a_name_is_still_drawn():
    (place,) = tags(make_detections([[50, 80, 250, 200]], labels=[7]), ["only"])
    assert place[0].startswith("class 7 ")


def test_line_width_and_letters_grow_with_the_picture():
    small = tags(make_detections([[50, 80, 250, 200]]), ["a"])
    large = tags(make_detections([[500, 800, 2500, 2000]]), ["a"], (2400, 3200))
    assert large[0][4] - large[0][2] > 3 * (small[0][4] - small[0][2])

    def border(scale):
        picture = viz.draw_detections(
            blank(240 * scale, 320 * scale), make_detections(np.array([50, 80, 250, 200]) * scale), ["a"]
        )
        return int((picture[190 * scale, : 150 * scale] != GRAY).any(-1).sum())

    assert border(1) == 1 and 5 <= border(8) <= 9


def test_crowds_are_hatched_holes_stay_open_and_parts_unite():
    outer = np.array([[40, 40], [200, 40], [200, 200], [40, 200]], np.float32)
    hole = np.array([[90, 90], [90, 150], [150, 150], [150, 90]], np.float32)
    part = np.array([[180, 180], [230, 180], [230, 230], [180, 230]], np.float32)
    annotations = {
        "boxes": np.array([[40, 40, 230, 230]], np.float32),
        "labels": np.array([1], np.int32),
        "is_crowd": np.array([False]),
        "rings": [[outer, hole, part]],
        "keypoints": None,
    }
    picture = viz.draw_annotations(blank(), annotations, ["ring"])
    changed = (picture != GRAY).any(-1)
    assert changed[55:80, 55:80].all() and changed[184:196, 184:196].all() and changed[210:222, 210:222].all()
    assert not changed[100:140, 100:140].any()
    crowd = viz.draw_annotations(blank(), {**annotations, "is_crowd": np.array([True])}, ["ring"])
    share = (crowd != GRAY).any(-1)[55:80, 55:80].mean()
    assert 0.2 < share < 0.7


def test_annotations_without_masks_or_objects_are_drawn():
    none = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "is_crowd": np.zeros(0, bool), "rings": []}
    assert (viz.draw_annotations(blank(), none, ["a"]) == GRAY).all()
    one = {"boxes": np.array([[10, 50, 100, 90]]), "labels": np.array([1]), "is_crowd": np.array([False])}
    assert (viz.draw_annotations(blank(), {**one, "rings": [[]]}, ["a"]) != GRAY).any()


def test_keypoints_are_joined_by_the_skeleton_and_invisible_ones_left_out():
    xy = np.stack([np.linspace(40, 280, 17), np.where(np.arange(17) % 2, 60, 180)], 1)
    points = np.concatenate([xy, np.full((17, 1), 2)], 1)[None]
    one = {"boxes": np.array([[5, 5, 315, 235]]), "labels": np.array([1]), "is_crowd": np.array([False]), "rings": [[]]}
    every = viz.draw_annotations(blank(), {**one, "keypoints": points}, ["a"])
    hidden = points.copy()
    hidden[0, :, 2] = 0
    none = viz.draw_annotations(blank(), {**one, "keypoints": hidden}, ["a"])
    drawn = (every != none).any(-1)
    for x, y in xy:
        assert drawn[int(y), int(x)]
    middle = ((xy[5] + xy[11]) / 2).astype(int)  # left shoulder to left hip
    assert drawn[middle[1], middle[0]]
    other = viz.draw_annotations(blank(), {**one, "keypoints": points[:, :5]}, ["a"])
    assert (other != none).any(-1).sum() < drawn.sum()


def test_side_by_side_and_contact_sheet_keep_whole_pictures():
    both = viz.side_by_side(blank(100, 200), blank(200, 100), ("truth", "found"))
    assert both.shape[0] > 200 and both.shape[1] > 400 + 100
    pictures = [np.full((100, w, 3), i * 20, np.uint8) for i, w in enumerate([100, 200, 50, 300, 120])]
    sheet = viz.contact_sheet(pictures, columns=3, width=600, gap=6)
    assert sheet.shape[1] == 600
    for i in range(5):
        assert (sheet == i * 20).all(-1).sum() > 500
    assert viz.contact_sheet(pictures[:1], columns=4, width=300).shape == (300, 300, 3)
    with pytest.raises(ValueError):
        viz.contact_sheet([])


# ------------------------------------------------------------------------------------------ files
@pytest.fixture(autouse=True)
def plain_reader(monkeypatch):
    monkeypatch.setitem(sys.modules, "data", types.SimpleNamespace(read_image=cv2.imread))


def write(out, path, value=50):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        cv2.imwrite(str(path), np.full((80, 100, 3), value, np.uint8))
    return viz.write_prediction(out, path, make_detections([[10, 20, 60, 70]]), ["cat"])


def test_inputs_of_one_name_get_pictures_of_their_own(tmp_path):
    out = tmp_path / "out"
    inputs = [tmp_path / p for p in ("a.jpg", "dir/a.jpg", "dir/a.bmp", "other/dir/a.jpg", "a.png", "deep/dir/a.tif")]
    written = [write(out, path, 40 * i) for i, path in enumerate(inputs)]
    assert len(set(written)) == len(inputs)
    assert [p.name for p in written[:2]] == ["a.jpg", "dir_a.jpg"] and written[4].name == "a.png"
    for i, path in enumerate(written):
        assert abs(int(cv2.imread(str(path))[75, 95, 0]) - 40 * i) <= 2
    again = [write(out, path) for path in reversed(inputs)]
    assert again[::-1] == written
    assert len(os.listdir(out)) == len(inputs)


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_an_input_is_never_overwritten_by_its_own_picture(tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    cv2.imwrite(str(path), np.full((80, 100, 3), 99, np.uint8))
    before = path.read_bytes()
    written = write(tmp_path, path)
    assert written != path and path.read_bytes() == before
    assert write(tmp_path, path) == written
    picture = cv2.imread(str(written))
    assert picture is not None and picture.shape == (320, 400, 3)  # enlarged, so that names can be read


def test_memory_of_drawing_is_that_of_one_mask():
    """A mask of the image has 0.48 MB, those of all objects 96 MB."""
    image = np.zeros((600, 800, 3), np.uint8)
    boxes = [[10 + i, 20 + i, 210 + i, 180 + i] for i in range(200)]
    found = make_detections(boxes, shape=(600, 800), masks=True)
    rings = [[np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], np.float64)] for x1, y1, x2, y2 in boxes]
    annotations = {"boxes": np.array(boxes, np.float64), "labels": [1] * 200, "rings": rings, "is_crowd": [True] * 200}
    viz.class_color(1)  # makes the palette
    for draw in (
        lambda: viz.draw_detections(image, found, ["cat"]),
        lambda: viz.draw_annotations(image, annotations, []),
    ):
        tracemalloc.start()
        draw()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 25e6


def test_a_folder_without_a_free_name_is_an_error(tmp_path):
    path = tmp_path / "in" / "a.jpg"
    for _ in range(4):
        write(tmp_path / "out", path).write_bytes(b"mine")
    with pytest.raises(UserError, match="a.jpg"):
        write(tmp_path / "out", path)


def test_the_predictions_entry_is_json_and_complete():
    points = np.random.default_rng(0).random((2, 17, 3)).astype(np.float32)
    found = make_detections([[10, 20, 60, 70], [1, 2, 3, 5]], [0.9, 0.3], [2, 1], masks=True, keypoints=points)
    entry = viz.prediction_entry("dir/a.jpg", (240, 320), found, ["cat", "dög"], [0, 18])
    assert json.loads(json.dumps(entry)) == entry
    assert (entry["file"], entry["height"], entry["width"]) == ("dir/a.jpg", 240, 320)
    assert [(d["class"], d["category_id"], d["score"]) for d in entry["detections"]] == [
        ("dög", 18, 0.9),
        ("cat", 0, 0.3),
    ]
    assert entry["detections"][0]["box"] == [10, 20, 60, 70]
    assert coco_mask.decode(entry["detections"][0]["mask"]).shape == (240, 320)
    assert np.shape(entry["detections"][1]["keypoints"]) == (17, 3)
    empty = viz.prediction_entry("b.png", (5, 6), make_detections([]), ["cat"])
    assert empty == {"file": "b.png", "height": 5, "width": 6, "detections": []}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the display variables are those of Linux")
def test_a_window_opens_only_with_a_display(monkeypatch, tmp_path):
    viewer, shown = tmp_path / "xdg-open", tmp_path / "shown"
    viewer.write_text(f'#!/bin/sh\necho "$1" > {shown}.part && mv {shown}.part {shown}\n')
    viewer.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    assert viz.show_window("a.jpg") is False
    monkeypatch.setenv("DISPLAY", ":0")
    assert viz.show_window("a.jpg") is True
    deadline = time.monotonic() + 10
    while not shown.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert shown.read_text() == "a.jpg\n"


# ------------------------------------------------------------------------------------------------ ways to draw
def test_a_contour_leaves_the_inside_of_a_mask_as_it_was():
    found = make_detections([[60, 60, 260, 200]], masks=True)
    middle = slice(120, 140), slice(140, 180)
    filled = viz.draw_detections(blank(), found, [""])
    outline = viz.draw_detections(blank(), found, [""], style=viz.Style(contour=True))
    assert (filled[middle] != blank()[middle]).all()
    assert (outline[middle] == blank()[middle]).all() and (outline != blank()).any()


def test_boxes_alone_and_masks_alone_leave_out_the_other():
    found = make_detections([[60, 60, 260, 200]], masks=True)
    without = make_detections([[60, 60, 260, 200]])
    boxes = viz.draw_detections(blank(), found, [""], style=viz.Style(parts="boxes"))
    assert (boxes == viz.draw_detections(blank(), without, [""])).all()
    masks = viz.draw_detections(blank(), found, [""], style=viz.Style(parts="masks"))
    both = viz.draw_detections(blank(), found, [""])
    changed = (masks != both).any(2)
    assert changed.any() and not changed[100:150, 100:200].any()
    # An object without a mask keeps its box.
    assert (viz.draw_detections(blank(), without, [""], style=viz.Style(parts="masks")) != blank()).any()


def test_instances_of_one_class_get_colours_of_their_own_when_asked():
    found = make_detections([[10, 10, 120, 110], [180, 10, 290, 110]], labels=[1, 1], masks=True)

    def inside(style):
        picture = viz.draw_detections(blank(), found, ["", ""], style=style)
        return picture[80, 65].tolist(), picture[80, 240].tolist()

    first, second = inside(viz.Style())
    assert first == second
    first, second = inside(viz.Style(colors="instance"))
    assert first != second


@pytest.mark.parametrize("masks", [True, False])
def test_objects_of_one_class_that_meet_are_told_apart(masks):
    # A row of objects, each of which meets its neighbours, one far from all, and one of another class.
    boxes = [[10 + 40 * k, 10, 60 + 40 * k, 110] for k in range(6)] + [[20, 180, 60, 220], [10, 120, 60, 150]]
    labels = [3] * 7 + [4]
    found = make_detections(boxes, labels=labels, masks=masks)
    annotations = {"boxes": found.boxes, "labels": found.labels}
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(viz, "_draw", lambda image, items, style: drawn.append(items))
        viz.draw_detections(blank(), found, [""] * 4)
        viz.draw_annotations(blank(), annotations, [""] * 4)
    for items in drawn:
        colors = np.array([item.color for item in items], np.float32)
        lab = cv2.cvtColor(colors[None] / 255, cv2.COLOR_BGR2Lab)[0]
        assert (np.abs(np.diff(lab[:6, 0])) > 12).all()  # neighbours differ in lightness
        angle = np.degrees(np.arctan2(*lab[:6, :0:-1].T))
        assert np.ptp(angle) < 15  # and have the hue of their class
        assert items[6].color == viz.class_color(3) and items[7].color == viz.class_color(4)


def test_masks_of_one_class_that_overlap_do_not_merge():
    found = make_detections([[10, 10, 200, 200], [110, 30, 300, 220]], labels=[1, 1], masks=True)
    picture = viz.draw_detections(blank(), found, [""], style=viz.Style(parts="masks"))
    first, both, second = (picture[150, x].astype(int) for x in (50, 150, 260))
    assert min(np.abs(first - second).max(), np.abs(first - both).max(), np.abs(second - both).max()) > 20


def test_a_small_picture_is_enlarged_so_that_names_do_not_cover_it():
    found = make_detections([[5, 5, 40, 40]], masks=False)
    small = viz.draw_detections(blank(48, 48), found, ["zebra"])
    large = viz.draw_detections(blank(48, 48), found, ["zebra"], style=viz.Style(smallest=320))
    assert small.shape[:2] == (48, 48) and large.shape[:2] == (336, 336)

    def covered(picture):
        return (picture != blank(1, 1)[0, 0]).any(2).mean()

    assert covered(large) < 0.5 * covered(small)
    # The box is where it belongs: at 5 and 40 of 48.
    assert (large[5 * 7 + 100, 5 * 7 - 2 : 5 * 7 + 3] != blank(1, 1)[0, 0]).any()
    same = viz.draw_detections(blank(400, 300), found, [""], style=viz.Style(smallest=320))
    assert same.shape == (400, 300, 3)


def test_an_enlarged_mask_covers_the_same_share():
    found = make_detections([[8, 8, 40, 40]], shape=(48, 48), masks=True)
    large = viz.draw_detections(blank(48, 48), found, [""], style=viz.Style(parts="masks", smallest=96))
    mask = coco_mask.decode(found.masks[0])
    share = (large[:, :] != blank(1, 1)[0, 0]).any(2).mean()
    assert abs(share - mask.mean()) < 0.25 * mask.mean()


def test_a_cut_out_is_the_object_alone_with_alpha():
    image = np.random.default_rng(0).integers(1, 255, (60, 80, 3), np.uint8)
    mask = np.zeros((60, 80), np.uint8)
    cv2.circle(mask, (40, 30), 15, 1, -1)
    rle = coco_mask.encode(np.asfortranarray(mask))
    pixels = viz.cut_out(image, {"size": [60, 80], "counts": rle["counts"].decode()})
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    assert (pixels[:, :, 3] == 255 * mask[box]).all()
    assert (pixels[:, :, :3] == image[box] * mask[box][:, :, None]).all()
    empty = coco_mask.encode(np.zeros((60, 80), np.uint8, order="F"))
    assert viz.cut_out(image, {"size": [60, 80], "counts": empty["counts"].decode()}) is None


def test_rows_of_the_table_have_cocos_box_and_ids():
    found = make_detections([[10, 20, 60, 70]], labels=[2])
    entry = viz.prediction_entry("a.png", (240, 320), found, ["cat", "dög"], [7, 18])
    entry["image_id"] = 99
    assert viz.prediction_rows(entry) == [["a.png", 99, 18, "dög", entry["detections"][0]["score"], 10, 20, 50, 50]]
    assert len(viz.CSV_HEADER) == 9


@pytest.mark.skipif(not shutil.which("Xvfb"), reason="no virtual screen here: apt-get install xvfb")
def test_the_window_closes_with_a_key(tmp_path):
    """Shown on a virtual screen; the key is sent from inside, as no other program can type there."""
    screen = subprocess.Popen(["Xvfb", "-displayfd", "1", "-screen", "0", "640x480x24"], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        number = screen.stdout.readline().decode().strip()
        picture = cv2.imencode(".png", blank(2000, 3000))[1].tobytes()
        press = "root.update(); root.after(300, lambda: root.event_generate('<Key>', keysym='q'))"
        check = "assert root.winfo_width() <= 640; root.mainloop(); print('closed')"
        typed = viz.WINDOW.replace("root.mainloop()", f"{press}; {check}")
        command, screen_of_it = [sys.executable, "-c", typed, "", "a.png"], {**os.environ, "DISPLAY": f":{number}"}
        done = subprocess.run(command, input=picture, capture_output=True, timeout=60, env=screen_of_it)
        assert done.stdout.decode().strip() == "closed", done.stderr.decode()
    finally:
        screen.terminate()
        screen.wait()


def test_texts_that_opencv_cannot_draw_do_not_end_the_process():
    image = np.zeros((60, 80, 3), np.uint8)
    objects = {"boxes": np.array([[5, 5, 60, 50]], np.float32), "labels": np.array([1]), "is_crowd": np.zeros(1, bool)}
    assert viz.draw_annotations(image, {**objects, "rings": [[]]}, ["caf\udce9"]).any()
