"""utils/archives.py: images in .zip and .tar files give what the folder gives; damage is one line."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from format_sets import DATA, copy_sets, settings
from test_dataset_voc import write_voc_masks
from tiny import COCO_MINI, TINY_MODEL, TINY_TRAINING

from common import UserError
from config import default_config, finalize_config
from data import BatchMaker, inference_batches, list_images, read_image, read_split_image
from data_workers import training_dataflow
from dataset import load_format, load_split
from labels_read import read_labels
from report_files import problem_of_split, read_problem
from report_read import image_path
from tools import check_data, score
from utils import archives
from utils.archives import is_file, is_folder, list_folder, read_file, read_start, split_path
from utils.image_header import image_header_size
from video_source import find_sources, open_source

pytestmark = pytest.mark.quick


def tiny_config(*settings):
    return finalize_config(default_config().update_args([*TINY_MODEL, *settings]))


FOLDER = COCO_MINI / "val2017"
FILES = {"val2017/a.jpg": b"jpeg a" * 500, "val2017/sub/b.png": b"png b", "ünï.txt": b"", "x" * 150 + "/c.jpg": b"c"}


@pytest.fixture(autouse=True)
def _forget():
    archives._open_archives.clear()


def zipped(path, files=FILES, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarred(path, files=FILES, form=tarfile.GNU_FORMAT, prefix=""):
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(prefix + name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


MAKERS = {
    "stored zip": ("a.zip", zipped),
    "deflated zip": ("a.zip", lambda p, f=FILES: zipped(p, f, zipfile.ZIP_DEFLATED)),
    "GNU tar": ("a.tar", tarred),
    "pax tar": ("a.tar", lambda p, f=FILES: tarred(p, f, tarfile.PAX_FORMAT)),
    "ustar": ("a.tar", lambda p, f=FILES: tarred(p, f, tarfile.USTAR_FORMAT, "./")),
}


@pytest.mark.parametrize("kind", list(MAKERS))
def test_members_are_read_like_files(kind, tmp_path):
    name, make = MAKERS[kind]
    path = make(tmp_path / name)
    for member, content in FILES.items():
        full = f"{path}/{member}"
        assert read_file(full).tobytes() == content and is_file(full)
        assert read_start(full, 4) == content[:4] and read_start(full, 10**6) == content
    assert split_path(f"{path}/./val2017//a.jpg") == (str(path), "val2017/a.jpg")
    assert is_folder(path) and is_folder(f"{path}/val2017/sub") and not is_folder(f"{path}/val2017/a.jpg")
    assert sorted(list_folder(f"{path}/val2017")) == ["a.jpg", "sub"] and not is_file(f"{path}/val2017")
    assert sorted(list_folder(path)) == sorted({n.split("/")[0] for n in FILES})
    with pytest.raises(FileNotFoundError):
        read_file(f"{path}/no.jpg")
    with pytest.raises(FileNotFoundError):
        list_folder(f"{path}/no")
    with pytest.raises(UserError, match=r"no\.jpg cannot be read: not in the archive"):
        read_image(f"{path}/no.jpg")


def test_a_directory_may_be_called_like_an_archive(tmp_path):
    (tmp_path / "a.zip").mkdir()
    (tmp_path / "a.zip" / "b.txt").write_bytes(b"x")
    assert split_path(tmp_path / "a.zip" / "b.txt") is None and read_file(tmp_path / "a.zip/b.txt").tobytes() == b"x"
    inner = zipped(tmp_path / "a.zip" / "c.zip")
    assert split_path(f"{inner}/val2017/a.jpg") == (str(inner), "val2017/a.jpg")


def test_the_only_folder_of_an_archive_may_be_left_out(tmp_path):
    path = zipped(tmp_path / "a.zip", {"val2017/a.jpg": b"a", "val2017/sub/b.jpg": b"b"})
    for place in (path, f"{path}/val2017"):
        assert sorted(list_folder(place)) == ["a.jpg", "sub"]
        assert read_file(f"{place}/a.jpg").tobytes() == b"a" and is_file(f"{place}/sub/b.jpg")
        assert list_folder(f"{place}/sub") == ["b.jpg"]


def test_threads_and_processes_read_at_once(tmp_path):
    files = {f"{i}.jpg": bytes([i]) * (1000 + i) for i in range(60)}
    path, wrong = tarred(tmp_path / "a.tar", files), []

    def read():
        wrong.extend(n for n, content in files.items() if read_file(f"{path}/{n}").tobytes() != content)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    pid = os.fork()
    if pid == 0:
        read()
        os._exit(len(wrong))
    assert os.waitpid(pid, 0)[1] == 0


# ------------------------------------------------------------------------------------------------ damage
def test_damage_is_one_line_that_names_archive_and_member(tmp_path):
    path = zipped(tmp_path / "a.zip", {"a.jpg": b"x" * 500, "b.jpg": b"y" * 500, "c.jpg": bytes(500)})
    content = bytearray(path.read_bytes())
    content[100] ^= 1  # in a.jpg
    second = content.index(b"b.jpg") - 30
    content[second] = 0  # its header
    path.write_bytes(content)
    for name, reason in (("a.jpg", "its checksum is wrong"), ("b.jpg", "its header is missing")):
        with pytest.raises(UserError, match=rf"a\.zip: its member {name} is damaged: {reason}") as e:
            read_file(f"{path}/{name}")
        assert "\n" not in str(e.value)
    assert read_file(f"{path}/c.jpg").tobytes() == bytes(500)


def test_archives_that_cannot_be_opened(tmp_path):
    for name, content in (
        ("a.zip", b"no zip"),
        ("b.zip", b""),
        ("c.zip", zipped(tmp_path / "x.zip").read_bytes()[:-30]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} is damaged, or not a zip file"):
            is_folder(tmp_path / name)
    whole = tarred(tmp_path / "x.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:2000])  # within the first member
    (tmp_path / "bad.tar").write_bytes(whole[:3584] + b"X" + whole[3585:])  # a header's first byte
    (tmp_path / "gz.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    for name, reason in (("cut", "which it cannot be"), ("bad", "no header at byte"), ("gz", "is compressed")):
        with pytest.raises(UserError, match=reason):
            is_folder(tmp_path / f"{name}.tar")
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match="compressed archive, in which single images cannot be found; unpack it"):
        is_folder(tmp_path / "a.tar.gz")


def test_members_that_claim_too_much_take_no_memory(tmp_path):
    path = zipped(tmp_path / "a.zip", {"a.jpg": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02")
    content[place + 24 : place + 28] = struct.pack("<I", 1000)  # its size: what does not fit is not expanded
    path.write_bytes(content)
    with pytest.raises(UserError, match="longer than the archive's list says"):
        read_file(f"{path}/a.jpg")
    archives._open_archives.clear()
    content[place + 24 : place + 28] = struct.pack("<I", (1 << 32) - 2)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jpg is damaged: it has 4294967294 bytes"):
        read_file(f"{path}/a.jpg")


def test_broken_lists_end_in_one_line_and_take_no_memory(tmp_path):
    path = zipped(tmp_path / "a.zip", {"a.jpg": bytes(500)})
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02")
    content[place + 20 : place + 24] = struct.pack("<I", 1 << 31)  # its size in the archive
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jpg is damaged: the archive ends before it does"):
        read_file(f"{path}/a.jpg")
    archives._open_archives.clear()
    content[place + 28 : place + 30] = bytes(2)  # no name: what follows is read as another entry
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a zip file"):
        is_folder(path)


def test_encrypted_and_strangely_compressed_members_are_named(tmp_path):
    path = zipped(tmp_path / "a.zip", {"a.jpg": b"x" * 500}, zipfile.ZIP_BZIP2)
    with pytest.raises(UserError, match=r"a\.jpg is damaged: it is compressed by method 12"):
        read_file(f"{path}/a.jpg")


def test_names_that_lead_out_of_the_archive_are_not_there(tmp_path):
    path = tarred(tmp_path / "a.tar", {"../a.jpg": b"x", "/b.jpg": b"y", "c/../d.jpg": b"z"})
    assert sorted(list_folder(path)) == ["b.jpg", "d.jpg"]
    assert not is_file(f"{path}/../a.jpg")


# ------------------------------------------------------------------------------------------------ the index of a tar
def test_a_large_tar_gets_an_index_that_is_used_until_the_tar_changes(tmp_path, monkeypatch):
    files = {f"{i:04}.jpg": b"%d" % i for i in range(1000)}
    path = tarred(tmp_path / "a.tar", files)
    assert read_file(f"{path}/0007.jpg").tobytes() == b"7" and (tmp_path / "a.tar.index").is_file()
    archives._open_archives.clear()
    walk = archives._walk_tar
    monkeypatch.setattr(archives, "_walk_tar", lambda *_: pytest.fail("the index was not used"))
    assert read_file(f"{path}/0999.jpg").tobytes() == b"999"
    monkeypatch.setattr(archives, "_walk_tar", walk)
    stamp = [path.stat().st_size, path.stat().st_mtime_ns]
    outside = json.dumps({"stamp": stamp, "members": {"0007.jpg": [0, 10**12]}}).encode()
    for broken in (b"", b"[]", b'{"stamp": 1}', outside):
        archives._open_archives.clear()
        (tmp_path / "a.tar.index").write_bytes(broken)
        assert read_file(f"{path}/0007.jpg").tobytes() == b"7"
    archives._open_archives.clear()
    tarred(path, {**files, "new.jpg": b"new"})
    assert read_file(f"{path}/new.jpg").tobytes() == b"new"


# ------------------------------------------------------------------------------------------------ data sets
@pytest.fixture(params=["zip", "tar", "zip inside"])
def set_in_archive(request, tmp_path):
    """(a set whose images are in an archive, the archive)."""
    shutil.copytree(COCO_MINI / "annotations", tmp_path / "annotations")
    files = {f"val2017/{p.name}": p.read_bytes() for p in sorted(FOLDER.glob("*.jpg"))}
    if request.param == "zip inside":
        files["more/readme.txt"] = b"x"
    make = tarred if request.param == "tar" else zipped
    path = make(tmp_path / f"val2017.{'tar' if request.param == 'tar' else 'zip'}", files)
    return str(path) + ("/val2017" if request.param == "zip inside" else ""), path


def test_training_evaluation_and_checks_read_from_archives(set_in_archive, tmp_path, capsys):
    folder, path = set_in_archive
    json_file = tmp_path / "annotations/instances_val2017.json"
    spec = {"packed": [str(json_file), folder], "plain": [str(json_file), str(FOLDER)]}
    cfg = finalize_config(default_config().update_args([
        *TINY_TRAINING, f"DATA.DATASETS={spec!r}", "DATA.TRAIN=packed", "DATA.NUM_WORKERS=1", "MODE_MASK=True",
    ]))  # fmt: skip
    packed, plain = (load_split(cfg, name, training=True) for name in ("packed", "plain"))
    flow = training_dataflow(packed, cfg)  # in a process of its own
    flow.reset_state()
    try:
        batch = next(iter(flow))
    finally:
        flow.stop()
    for a, b in zip(batch, BatchMaker(plain, cfg, (0, 1), 1).make(0)):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(inference_batches(packed, cfg), inference_batches(plain, cfg)):
        np.testing.assert_array_equal(a["image"], b["image"])
    assert image_header_size(packed.image_file(0)) == packed.image_size(0)
    assert check_data.main(["--data", str(json_file), folder, "--page", str(tmp_path / "page")]) in (0, 1)
    assert "missing" not in capsys.readouterr().out
    files = list_images([folder])
    assert len(files) == len(list(FOLDER.glob("*.jpg")))
    assert (read_image(files[0]) == read_image(FOLDER / os.path.basename(files[0]))).all()


def test_cocos_own_sets_are_found_in_the_archives_as_downloaded(set_in_archive, tmp_path):
    folder, path = set_in_archive
    if folder.endswith("/val2017"):
        pytest.skip("not as downloaded")
    split = load_split(tiny_config(f"DATA.BASEDIR={tmp_path}", "MODE_MASK=True"), "coco_val2017")
    assert split.image_file(0).startswith(str(path)) and is_file(split.image_file(0))


def test_missing_members_and_compressed_folders_stop_before_the_work(tmp_path):
    shutil.copytree(COCO_MINI / "annotations", tmp_path / "annotations")
    names = sorted(p.name for p in FOLDER.glob("*.jpg"))
    path = zipped(tmp_path / "val2017.zip", {n.replace(".jpg", ".JPG"): b"x" for n in names})
    with pytest.raises(UserError, match=rf"images are missing, e\.g\. {path}/\d+\.jpg \(did you mean"):
        load_split(tiny_config(f"DATA.BASEDIR={tmp_path}", "MODE_MASK=True"), "coco_val2017")
    (tmp_path / "val.tar.gz").write_bytes(b"\x1f\x8b")
    spec = {"mine": ["annotations/instances_val2017.json", "val.tar.gz"]}
    with pytest.raises(UserError, match="compressed archive"):
        load_split(tiny_config(f"DATA.BASEDIR={tmp_path}", f"DATA.DATASETS={spec!r}", "MODE_MASK=True"), "mine")


def test_the_benchmark_compares_folder_zip_and_tar(tmp_path):
    root = Path(__file__).resolve().parent.parent
    words = ["--images", str(FOLDER), "--rounds", "1", "--repeat", "1", "--json", str(tmp_path / "a.json")]
    run = [sys.executable, str(root / "benchmarks/archive_speed.py"), *words]
    subprocess.run(run, check=True, capture_output=True, timeout=300)
    result = json.loads((tmp_path / "a.json").read_text())
    assert set(result["images_per_second"]) == {"folder", "zip", "tar"} and result["ratio"]["tar"] > 0


# ------------------------------------------------------------------------------------------------ sets of other formats
def packed(folder, archive, prefix="", more=()):
    """The folder's files as an archive, the folder removed."""
    files = {prefix + str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    (tarred if archive.suffix == ".tar" else zipped)(archive, {**files, **dict.fromkeys(more, b"x")})
    shutil.rmtree(folder)


def pack_voc_folders(base):
    for name in ("JPEGImages", "Annotations", "SegmentationObject", "ImageSets"):
        packed(base / "voc" / name, base / "voc" / f"{name}.zip", f"{name}/")


def pack_cityscapes(base):
    folder = base / "cityscapes_mini"
    packed(folder / "leftImg8bit", folder / "leftImg8bit_trainvaltest.zip", "leftImg8bit/", ["README", "license.txt"])
    packed(folder / "gtFine", folder / "gtFine_trainvaltest.zip", "gtFine/", ["README", "license.txt"])


def pack_open_images(base):
    folder = base / "golden_oid"
    images = sorted((folder / "images/validation").iterdir())
    for n, some in {"0": images[::2], "f": images[1::2]}.items():
        tarred(folder / f"validation_{n}.tar", {f"validation_{n}/{p.name}": p.read_bytes() for p in some})
    shutil.rmtree(folder / "images")
    masks = sorted((folder / "masks").iterdir())
    for digit in sorted({p.name[0] for p in masks}):
        these = {p.name: p.read_bytes() for p in masks if p.name[0] == digit}
        zipped(folder / f"masks/validation-masks-{digit}.zip", these)
    for p in masks:
        p.unlink()


def pack_lvis(base):
    packed(base / "lvis_mini/val2017", base / "lvis_mini/val2017.zip", "val2017/")


PACKINGS = {
    "VOC's folders": (pack_voc_folders, ["voc", "voc", "trainval"], None),
    "VOC's tar": (lambda b: packed(b / "voc", b / "trainval.tar", "VOCdevkit/VOC2007/"), ["voc", "voc", "trainval"],
                  ["voc", "trainval.tar", "trainval"]),
    "a folder with VOC's tar": (lambda b: packed(b / "voc", b / "cityscapes_mini/trainval.tar", "VOCdevkit/VOC2007/"),
                                ["voc", "voc", "trainval"], ["voc", "cityscapes_mini", "trainval"]),
    "Cityscapes' zips": (pack_cityscapes, ["cityscapes", "cityscapes_mini", "val"], None),
    "Cityscapes in one tar": (lambda b: packed(b / "cityscapes_mini", b / "all.tar"),
                              ["cityscapes", "cityscapes_mini", "val"], ["cityscapes", "all.tar", "val"]),
    "Open Images' archives": (pack_open_images, ["openimages", "golden_oid", "validation"], None),
    "one archive of Open Images": (lambda b: packed(b / "golden_oid/images/validation", b / "golden_oid/photos.zip"),
                                   ["openimages", "golden_oid", "validation"],
                                   ["openimages", "golden_oid", "validation", "images=golden_oid/photos.zip"]),
    "LVIS with COCO's zip": (pack_lvis, ["lvis", "lvis_mini/lvis_v1_mini.json", "lvis_mini"], None),
    "csv": (lambda b: packed(b / "csv_mini/images", b / "csv_mini/images.tar"), ["csv", "csv_mini/boxes.csv",
            "csv_mini/images"], ["csv", "csv_mini/boxes.csv", "csv_mini/images.tar"]),
}  # fmt: skip


@pytest.mark.parametrize("which", PACKINGS)
def test_sets_of_every_format_are_read_from_their_archives(which, tmp_path, monkeypatch, capsys):
    pack, plain_spec, packed_spec = PACKINGS[which]
    write_voc_masks(tmp_path / "voc")
    copy_sets(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    masks = f"MODE_MASK={plain_spec[0] != 'csv'}"
    cfg = settings(tmp_path, masks)
    plain = load_format(plain_spec, cfg, "set")
    expected = [(plain.image_id(i), read_split_image(plain, i), plain.annotations(i)) for i in range(len(plain))]
    content, settings_of = plain.content(), [f"DATA.BASEDIR={tmp_path}", "DATA.TRAIN=set", "DATA.VAL=[]", masks]
    pack(tmp_path)
    spec = packed_spec or plain_spec
    split = load_format(spec, cfg, "set")
    assert len(split) == len(expected) > 0
    for i, (image_id, pixels, found) in enumerate(expected):
        assert not os.path.exists(split.image_file(i))
        assert split.image_id(i) == image_id and np.array_equal(read_split_image(split, i), pixels)
        assert image_header_size(split.image_file(i)) == pixels.shape[:2]
        for key in ("boxes", "labels", "is_crowd"):
            assert np.array_equal(split.annotations(i)[key], found[key])
        assert [len(rings) for rings in split.annotations(i)["rings"]] == [len(rings) for rings in found["rings"]]
    assert list(split.content()["annotations"]) == list(content["annotations"])
    problem = problem_of_split(split, [])
    assert all(is_file(image_path(problem, image["file_name"])) for image in problem.content["images"])
    # The check opens every image.
    assert check_data.main(["--config", *settings_of, f"DATA.DATASETS={ {'set': spec}!r}"]) in (0, 1)
    assert "missing" not in capsys.readouterr().out


def test_scores_and_reports_read_annotations_from_archives(tmp_path):
    write_voc_masks(tmp_path / "voc")
    plain = read_problem("voc07", tmp_path / "voc", split="trainval")
    packed(tmp_path / "voc", tmp_path / "voc.tar", "VOC2007/")
    problem = read_problem("voc07", tmp_path / "voc.tar", split="trainval")
    assert problem.content == plain.content and is_folder(problem.image_folders[0])
    results = [{"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.5}
               for a in plain.content["annotations"]]  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(results))
    words = ["--protocol", "voc07", "--gt", str(tmp_path / "voc.tar"), "--split", "trainval", "--detections"]
    assert score.main([*words, str(tmp_path / "results.json"), "--json", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["mAP"] == 1


def test_a_compressed_archive_of_a_folder_that_is_not_there_is_named(tmp_path):
    shutil.copytree(DATA / "golden_oid", tmp_path / "oid", ignore=shutil.ignore_patterns("images"))
    (tmp_path / "oid/validation_3.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match=r"validation_3\.tar\.gz is a compressed archive"):
        load_format(["openimages", "oid", "validation"], settings(tmp_path), "oid")
    (tmp_path / "oid/validation_3.tar.gz").unlink()
    with pytest.raises(UserError, match=r"no image folder validation/.* and no \.zip or \.tar of such a name"):
        load_format(["openimages", "oid", "validation"], settings(tmp_path), "oid")


def test_frames_and_sizes_for_converted_labels_come_from_archives(tmp_path):
    image = cv2.imencode(".png", np.full((20, 30, 3), 7, np.uint8))[1].tobytes()
    path = zipped(tmp_path / "shots.zip", {"shots/frame_10.png": image, "shots/frame_9.png": image, "notes.txt": b"x"})
    images, (source,) = find_sources([f"{path}/shots"], frames=True)
    frames = list(open_source(source, fps=5).frames(0, 1))
    assert not images and [(f.seconds, f.pixels.shape) for f in frames] == [(0, (20, 30, 3)), (0.2, (20, 30, 3))]
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/frame_9.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "classes.txt").write_text("fig\n")
    content, left_out, _ = read_labels(tmp_path, "yolo", images=f"{path}/shots")
    assert [(i["file_name"], i["height"]) for i in content["images"]] == [("frame_10.png", 20), ("frame_9.png", 20)]
    assert content["annotations"][0]["bbox"] == pytest.approx([12, 8, 6, 4]) and not left_out
