"""Broken inputs, each made from a kind and a number alone, and what a user would do with each.

`make(kind, number, folder)` writes the input into the empty folder and returns the calls to try on it: what train.py,
tools/check_data.py, tools/score.py and tools/convert.py do with such a file, through the same functions.
"""

import base64
import json
import pickle
import random
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from config import default_config, explain, finalize_config
from data import BatchMaker, read_image
from data_check import quick_check
from dataset import class_count_table, load_training_split, load_validation_splits
from labels_write import WRITERS, Outlines, write_labels
from run_start import load_model
from tests.tiny import COCO_MINI, TINY_MODEL
from tests.torch_files import save_stream, save_zip, tensors
from tools import check_data, convert, convert_data, score
from utils.checkpoint import checkpoint_writer, load_weights, make_meta, save_npz, save_tf_checkpoint
from utils.coco_format import as_truth
from utils.safe_pickle import read_pickle

__all__ = ["Dice", "KINDS", "make"]

DATA = Path(__file__).resolve().parent.parent / "data"
Call = Callable[[], Any]


class Dice(random.Random):
    """Random numbers, and whether what they would break stays sound: for the test that looks whether it is accepted."""

    sound = False


# ------------------------------------------------------------------------------------------------------- what breaks
ODD = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.5, 1e-320, 1e30, 1e308, float("nan"),
    float("inf"), -float("inf"), "", " ", "0", "-3", "1e400", "nan", "x" * 10000, "../../../etc/passwd", "/dev/zero",
    "\ud800", "\x00", "ä\u0301", "[]", "*", "a/b", "true", [], [[]], [1], [None], ["a"], [[1, 2, 3]], [0, 0, 0, 0],
    [1e308] * 4, [1, 2, 3, 4, 5, 6], {}, {"id": 1}, {"counts": "x", "size": [1, 1]},
    {"counts": [10**9], "size": [10**5] * 2},
]  # fmt: skip


def _places(content: Any, path: tuple = ()) -> list[tuple]:
    """Paths to every value in a parsed json."""
    found = [path]
    if isinstance(content, dict):
        for key, value in content.items():
            found += _places(value, (*path, key))
    elif isinstance(content, list):
        for i, value in enumerate(content[:40]):
            found += _places(value, (*path, i))
    return found


def _break_json(content: Any, rng: Dice) -> Any:
    """Replaces, removes, doubles or moves values at one to three places."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = _places(content)
        depth = rng.randint(1, max(1, max(map(len, places))))  # else most would be coordinates of outlines
        path = rng.choice([p for p in places if len(p) == depth] or places[1:] or [()])
        if not path:
            return rng.choice(ODD)
        parent = content
        for step in path[:-1]:
            parent = parent[step]
        key, action = path[-1], rng.choice(["replace"] * 5 + ["remove", "double", "other", "wrap", "text"])
        if action == "replace":
            parent[key] = rng.choice(ODD)
        elif action == "remove":
            del parent[key]
        elif action == "double" and isinstance(parent, list):
            parent.append(parent[key])
        elif action == "other":
            value = content
            for step in rng.choice(places):
                try:
                    value = value[step]
                except (KeyError, IndexError, TypeError):
                    break
            parent[key] = json.loads(json.dumps(value))
        elif action == "wrap":
            parent[key] = [parent[key]]
        else:
            parent[key] = str(parent[key])
    return content


def _break_bytes(data: bytes, rng: Dice) -> bytes:
    """Flips, cuts, repeats, inserts or zeroes some bytes."""
    if rng.sound:
        return data
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        at = rng.randrange(len(changed) + 1)
        action = rng.choice(["flip", "flip", "byte", "cut", "repeat", "insert", "zero", "head"])
        if action in ("flip", "byte", "head") and changed:
            at = min(at, len(changed) - 1) if action != "head" else rng.randrange(min(64, len(changed)))
            changed[at] = changed[at] ^ 1 << rng.randrange(8) if action == "flip" else rng.randrange(256)
        elif action == "cut":
            del changed[at : at + rng.choice([1, 10, 1000, len(changed)])]
        elif action == "repeat":
            changed[at:at] = changed[at : at + rng.choice([1, 20, 500])]
        elif action == "insert":
            changed[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 4, 100])))
        elif action == "zero":
            end = min(len(changed), at + rng.choice([1, 8, 200]))
            changed[at:end] = bytes(end - at)
    return bytes(changed)


def _break_text(text: str, rng: Dice) -> bytes:
    """Words and numbers of a text become odd ones; or its bytes, its encoding or its line ends break."""
    if rng.sound:
        return text.encode()
    action = rng.choice(["words"] * 5 + ["bytes"] * 3 + ["encoding", "lines", "empty"])
    if action == "bytes":
        return _break_bytes(text.encode(), rng)
    if action == "encoding":
        return text.encode(rng.choice(["utf-16", "utf-8-sig", "utf-32", "cp037"]))
    if action == "empty":
        return rng.choice([b"", b"\n", b"\x00" * 100, b"\xff\xfe", text.encode() * 2])
    if action == "lines":
        lines = text.splitlines()
        rng.shuffle(lines)
        return rng.choice(["\n", "\r", "\r\n", "\x00"]).join(lines[: rng.randint(0, len(lines))]).encode()
    words = text.replace("<", " <").replace(">", "> ").replace(",", " , ").split(" ")
    for _ in range(rng.choice([1, 1, 2, 4])):
        words[rng.randrange(len(words))] = str(rng.choice(ODD))
    return " ".join(words).replace(" <", "<").replace("> ", ">").replace(" , ", ",").encode(errors="replace")


def _write_json(path: Path, content: Any, rng: Dice) -> None:
    """The content with broken values, or its text with broken bytes or of extreme shape."""
    if rng.sound:
        path.write_text(json.dumps(content))
        return
    action = rng.choice(["values"] * 7 + ["text"] * 2 + ["extreme"])
    text = json.dumps(_break_json(content, rng) if action == "values" else content)
    if action == "extreme":
        deep, digits = "[" * 100000, "9" * 6000
        number = text.replace(": ", f": {digits}", 1)
        shapes = [deep, deep + "]" * 100000, f'{{"images": {digits}}}', number, text[:-1], text + "}", text + text]
        text = rng.choice([*shapes, "NaN", "null", '"text"', "[]", "{}"])
    path.write_bytes(_break_text(text, rng) if action == "text" else text.encode(errors="surrogatepass"))


# ------------------------------------------------------------------------------------------------ what is done with it
def _train_reads(*settings: str) -> Call:
    """What a training run does before it builds its graph: load, look, count, make a batch; and its validation sets."""

    def call():
        cfg = finalize_config(default_config().update_args([*TINY_MODEL, "TRAIN.SEED=1", *settings]))
        split = load_training_split(cfg)
        quick_check(split)
        class_count_table(split)
        maker = BatchMaker(split, cfg, (0, 1), 1)
        for batch in range(2):
            maker.make(batch)
        load_validation_splits(cfg)

    return call


def _checks(*words: str) -> Call:
    return lambda: check_data.main([*words])


def _scores(*words: str) -> Call:
    return lambda: score.main([*map(str, words)])


def _settings_of(folder: Path, spec: list) -> list[str]:
    return [f"DATA.BASEDIR={folder}", f"DATA.DATASETS={{'set':{spec!r}}}", "DATA.TRAIN=set", "DATA.VAL=set"]


# ------------------------------------------------------------------------------------------------------------ the kinds
def _coco(folder: Path, rng: Dice) -> list[Call]:
    shutil.copytree(COCO_MINI / "val2017", folder / "val2017")
    content = json.loads((COCO_MINI / "annotations/instances_val2017.json").read_text())
    content["annotations"] = rng.sample(content["annotations"], 6)
    _write_json(folder / "val.json", content, rng)
    results = [{"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.5}
               for a in content["annotations"]]  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    settings = _settings_of(folder, [str(folder / "val.json"), str(folder / "val2017")])
    out = folder / "out"
    written = ["--fix", str(out / "fixed"), "--page", str(out)]
    return [
        _checks("--data", str(folder / "val.json"), str(folder / "val2017"), *written),
        _train_reads(*settings),
        _scores("--protocol", rng.choice(["coco", "voc07", "lvis", "oid-v2"]), "--gt", folder / "val.json",
                "--detections", folder / "results.json", "--json", out / "scores.json"),
    ]  # fmt: skip


def _voc(folder: Path, rng: Dice) -> list[Call]:
    shutil.copytree(DATA / "voc_mini", folder / "voc")
    files = sorted(p for p in (folder / "voc").rglob("*") if p.suffix in (".xml", ".txt"))
    path = rng.choice(files)
    text = path.read_text()
    if rng.random() < 0.1 and path.suffix == ".xml":
        text = '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">' + "".join(
            f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(9)
        ) + "]>" + text.replace("</name>", "&j;</name>", 1)  # fmt: skip
        path.write_text(text)
    else:
        path.write_bytes(_break_text(text, rng))
    split = rng.choice(["", *(p.stem for p in (folder / "voc/ImageSets/Main").glob("*.txt"))])
    settings = [*_settings_of(folder, ["voc", "voc", split]), "MODE_MASK=False"]
    return [_checks("--config", *settings), _train_reads(*settings)]


def _csv(folder: Path, rng: Dice) -> list[Call]:
    shutil.copytree(DATA / "csv_mini", folder / "set")
    name = rng.choice(["boxes.csv", "headless.csv"])
    path = folder / "set" / name
    path.write_bytes(_break_text(path.read_text(), rng))
    settings = _settings_of(folder, ["csv", f"set/{name}", "set/images"])
    return [_checks("--config", *settings), _train_reads(*settings, "MODE_MASK=False")]


def _cityscapes(folder: Path, rng: Dice) -> list[Call]:
    shutil.copytree(DATA / "cityscapes_mini", folder / "city")
    path = rng.choice(sorted(p for p in (folder / "city").rglob("*") if p.suffix in (".json", ".png", ".jpg")))
    if path.suffix == ".json":
        _write_json(path, json.loads(path.read_text()), rng)
    else:
        path.write_bytes(_break_bytes(path.read_bytes(), rng))
    settings = _settings_of(folder, ["cityscapes", "city", "val"])
    return [_checks("--config", *settings), _train_reads(*settings)]


def _lvis(folder: Path, rng: Dice) -> list[Call]:
    content = json.loads((DATA / "lvis_mini/lvis_v1_mini.json").read_text())
    results = json.loads((DATA / "lvis_mini/results.json").read_text())[:40]
    broken = rng.random() < 0.5
    for name, what, breaks in (("gt.json", content, broken), ("results.json", results, not broken)):
        if breaks:
            _write_json(folder / name, what, rng)
        else:
            (folder / name).write_text(json.dumps(what))
    for image in content["images"]:
        (folder / image["coco_url"].split("/")[-2]).mkdir(exist_ok=True)
        pixels = np.zeros((image["height"], image["width"], 3), np.uint8)
        cv2.imwrite(str(folder / "/".join(image["coco_url"].split("/")[-2:])), pixels)
    settings = _settings_of(folder, ["lvis", "gt.json", "."])
    words = ["--protocol", "lvis", "--gt", folder / "gt.json", "--detections", folder / "results.json"]
    return [_scores(*words), _checks("--config", *settings, "DATA.KEEP_MISSING_IMAGES=True", "--quick"),
            _train_reads(*settings)]  # fmt: skip


def _open_images(folder: Path, rng: Dice) -> list[Call]:
    shutil.copytree(DATA / "golden_oid", folder / "oid", ignore=shutil.ignore_patterns("expected*", "masks"))
    files = [p for p in (folder / "oid").iterdir() if p.suffix in (".csv", ".json") and "train" not in p.name]
    path = rng.choice(sorted(files))
    if path.suffix == ".json":
        _write_json(path, json.loads(path.read_text()), rng)
    else:
        path.write_bytes(_break_text("\n".join(path.read_text().splitlines()[:60]) + "\n", rng))
    sets = {"set": ["openimages", str(folder / "oid"), "validation"]}
    settings = [f"DATA.DATASETS={sets}", "DATA.TRAIN=set", "DATA.VAL=set", "MODE_MASK=False"]
    words = ["--protocol", rng.choice(["oid-v2", "oid-challenge"]), "--gt", folder / "oid"]
    return [_scores(*words, "--detections", folder / "oid/detections.csv"), _train_reads(*settings),
            _checks("--config", *settings, "--quick")]  # fmt: skip


def _results(folder: Path, rng: Dice) -> list[Call]:
    truth = json.loads((COCO_MINI / "annotations/instances_val2017.json").read_text())
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": rng.random(),
         "segmentation": a["segmentation"]} for a in truth["annotations"][:8]
    ]  # fmt: skip
    (folder / "gt.json").write_text(json.dumps(truth))
    _write_json(folder / "results.json", results, rng)
    words = ["--gt", folder / "gt.json", "--detections", folder / "results.json", "--json", folder / "out/s.json"]
    protocols = rng.sample(["coco", "voc07", "voc12", "lvis", "cityscapes", "oid-v2"], 2)
    return [_scores("--protocol", protocol, *words) for protocol in protocols]


def _archive(folder: Path, rng: Dice) -> list[Call]:
    """COCO's set with its images in a broken zip or tar."""
    shutil.copytree(COCO_MINI / "annotations", folder / "annotations")
    path = folder / f"val2017.{rng.choice(['zip', 'tar'])}"
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as z:
            for file in sorted((COCO_MINI / "val2017").iterdir()):
                z.writestr(zipfile.ZipInfo(f"val2017/{file.name}"), file.read_bytes())
    else:
        with tarfile.open(path, "w", format=rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) as t:
            t.add(COCO_MINI / "val2017", "val2017")
    content = path.read_bytes()
    if rng.random() < 0.5:  # most bytes are pixels: break those of the lists
        at = content.find(b"PK\x01\x02") if path.suffix == ".zip" else 512 * rng.randrange(2)
        content = content[:at] + _break_bytes(content[at : at + 512], rng) + content[at + 512 :]
    else:
        content = _break_bytes(content, rng)
    path.write_bytes(content)
    settings = [f"DATA.BASEDIR={folder}", "DATA.TRAIN=coco_val2017", "DATA.VAL=coco_val2017"]
    return [_train_reads(*settings), _checks("--config", *settings)]


def _labels(folder: Path, rng: Dice) -> list[Call]:
    """Annotations of a labelling program, one file of them broken."""
    content = json.loads((COCO_MINI / "annotations/instances_val2017.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if not a["iscrowd"]][:12]
    form = rng.choice(["cvat", "labelme", "yolo", "via", "supervisely"])
    source = folder / "set"
    if form in ("cvat", "labelme", "yolo"):
        write_labels(as_truth(content), form, source, Outlines(2.0))
    else:
        source.mkdir()
        _write_via_or_supervisely(source, content, form)
    path = rng.choice(sorted(p for p in source.rglob("*") if p.is_file()))
    if path.suffix == ".json":
        _write_json(path, json.loads(path.read_text()), rng)
    elif path.suffix == ".xml" and not rng.sound and rng.random() < 0.1:
        path.write_text(path.read_text().replace("<annotations>", '<!DOCTYPE a [<!ENTITY a "a">]><annotations>&a;', 1))
    else:
        path.write_bytes(_break_text(path.read_text(), rng))
    words = [str(path if form in ("cvat", "via") else source), str(folder / "out/a.json"), "--overwrite"]
    words += ["--images", str(COCO_MINI / "val2017"), *rng.choice([["--from", form], []] if form != "yolo" else [[]])]
    back = rng.choice(list(WRITERS))
    again = [*words[:1], str(folder / "out" / back), *words[2:], "--to", back, "--tolerance", "1"]
    return [lambda: convert_data.main(words), lambda: convert_data.main(again)]


def _write_via_or_supervisely(source: Path, content: dict, form: str) -> None:
    names = {c["id"]: c["name"] for c in content["categories"]}
    entries = {}
    for image in content["images"]:
        parts = [(names[a["category_id"]], np.reshape(a["segmentation"][0], (-1, 2)).tolist())
                 for a in content["annotations"] if a["image_id"] == image["id"]]  # fmt: skip
        if form == "via":
            regions = [{"shape_attributes": {"name": "polygon", "all_points_x": list(x), "all_points_y": list(y)},
                        "region_attributes": {"class": n}} for n, p in parts for x, y in [zip(*p)]]  # fmt: skip
            entries[image["file_name"]] = {"filename": image["file_name"], "regions": regions}
        else:
            objects = [{"classTitle": n, "geometryType": "polygon", "points": {"exterior": p, "interior": [p[:3]]}}
                       for n, p in parts]  # fmt: skip
            packed = base64.b64encode(zlib.compress(cv2.imencode(".png", np.eye(9, dtype=np.uint8))[1])).decode()
            bitmap = {"data": packed, "origin": [3, 4]}
            objects.append({"classTitle": "x", "geometryType": "bitmap", "bitmap": bitmap})
            path = source / "ds" / "ann" / f"{image['file_name']}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            size = {"height": image["height"], "width": image["width"]}
            path.write_text(json.dumps({"size": size, "objects": objects}))
    if form == "via":
        (source / "via.json").write_text(json.dumps({"_via_img_metadata": entries}))


def _image(folder: Path, rng: Dice) -> list[Call]:
    pixels = cv2.imread(str(next((COCO_MINI / "val2017").glob("*.jpg"))))[:120, :160]
    suffix = rng.choice([".jpg", ".png", ".bmp", ".tiff", ".webp"])
    if suffix == ".png":
        pixels = rng.choice(
            [pixels, pixels[..., 0], np.dstack([pixels, pixels[..., 0]]), pixels.astype(np.uint16) * 257]
        )
    content = cv2.imencode(suffix, pixels)[1].tobytes()
    extreme = rng.random()
    if suffix == ".png" and extreme < 0.25:  # a header that promises more than there is
        size = struct.pack(">II", *(rng.choice([0, 1, 2**15, 2**20, 2**31 - 1]) for _ in range(2)))
        chunk = b"IHDR" + size + content[24:29]
        content = content[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]
    elif extreme < 0.9:
        content = _break_bytes(content, rng)
    else:
        content = rng.choice([b"", b"\x00", b"GIF89a", b"%PDF-1.7", b"<svg/>", content[:20], b"\x89PNG\r\n\x1a\n"])
    (folder / "images").mkdir()
    path = folder / "images" / f"photo{suffix}"
    path.write_bytes(content)
    truth = {"images": [{"id": 1, "file_name": path.name, "height": 120, "width": 160}],
             "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 40], "area": 2000,
                              "iscrowd": 0, "segmentation": [[10, 10, 60, 10, 60, 50, 10, 50]]}],
             "categories": [{"id": 1, "name": "thing"}]}  # fmt: skip
    (folder / "set.json").write_text(json.dumps(truth))
    settings = _settings_of(folder, [str(folder / "set.json"), str(folder / "images")])
    return [_checks("--data", str(folder / "set.json"), str(folder / "images"), "--page", str(folder / "out")),
            _train_reads(*settings), lambda: read_image(str(path))]  # fmt: skip


def _small_weights(rng: Dice) -> dict[str, np.ndarray]:
    shapes = {"conv0/W": (7, 7, 3, 8), "conv0/bn/gamma": (8,), "rpn/conv0/W": (3, 3, 16, 16),
              "rpn/class/W": (1, 1, 16, 3), "fastrcnn/outputs/class/W": (32, 4),
              "fastrcnn/outputs/class/b": (4,), "global_step": ()}  # fmt: skip
    values = np.random.default_rng(rng.randrange(2**32))
    return {name: values.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _torch_resnet(values: np.random.Generator) -> dict[str, np.ndarray]:
    """A ResNet-18 as torchvision saves it, an eighth as wide."""
    shapes: dict[str, tuple] = {"conv1.weight": (8, 3, 7, 7), "fc.weight": (10, 64), "fc.bias": (10,)}
    norms, before = {"bn1": 8}, 8
    for group, width in enumerate((8, 16, 32, 64), 1):
        for block in range(2):
            name = f"layer{group}.{block}"
            shapes |= {f"{name}.conv1.weight": (width, before, 3, 3), f"{name}.conv2.weight": (width, width, 3, 3)}
            norms |= {f"{name}.bn1": width, f"{name}.bn2": width}
            if before != width:
                shapes[f"{name}.downsample.0.weight"] = (width, before, 1, 1)
                norms[f"{name}.downsample.1"] = width
            before = width
    shapes |= {f"{n}.{k}": (c,) for n, c in norms.items() for k in ("weight", "bias", "running_mean", "running_var")}
    return {name: values.random(shape, np.float32) for name, shape in shapes.items()}


def _npy(array: np.ndarray, rng: Dice) -> bytes:
    """An .npy file, its header sometimes with another shape or type than its data."""
    header = f"{{'descr': {array.dtype.str!r}, 'fortran_order': False, 'shape': {array.shape}, }}"
    if rng.random() < 0.4:
        shape = rng.choice([(2**40,), (10**6, 10**6), (-1,), (2**31, 4), (), (0,), "x", (1.5,)])
        descr = rng.choice(["<f4", "|O", "<M8[ns]", "<U1000000", "|V10", "<c16", "nonsense"])
        header = f"{{'descr': {descr!r}, 'fortran_order': {rng.choice([True, False, 3])}, 'shape': {shape!r}, }}"
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + array.tobytes()


def _weights(folder: Path, rng: Dice) -> list[Call]:
    values, suffix = _small_weights(rng), rng.choice([".npz", ".npz", ".npz", ".pth", ".pth", ".pkl", ".h5"])
    path = folder / f"weights{suffix}"
    if suffix == ".npz":
        meta = make_meta(
            default_config().to_dict() if hasattr(default_config(), "to_dict") else {}, ["a", "b", "c"], 10
        )
        if rng.random() < 0.4:
            meta = _break_json(meta, rng)
        if rng.random() < 0.5:
            save_npz(path, values, meta if isinstance(meta, dict) else {"settings": meta})
        else:
            with zipfile.ZipFile(path, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
                for name, value in values.items():
                    archive.writestr(f"{name}.npy", _npy(value, rng))
                if rng.random() < 0.2:
                    archive.writestr("zeros.npy", _npy(np.zeros(5 * 10**7, np.float32), Dice(0)))
    elif suffix == ".pth":
        if rng.random() < 0.6:
            values = _torch_resnet(np.random.default_rng(rng.randrange(2**32)))
            for name in rng.sample(sorted(values), rng.choice([0, 0, 1, 3])):
                values[name] = rng.choice(
                    [values[name][:1], np.float32(1), np.zeros((0, 3)), values[name].astype(np.int64)]
                )
        content = tensors(values) if rng.random() < 0.5 else {"model": tensors(values), "iteration": 3}
        (save_zip if rng.random() < 0.6 else save_stream)(path, content)
    elif suffix == ".pkl":
        path.write_bytes(pickle.dumps({"model": values, "__author__": "x"}, protocol=rng.choice([2, 4])))
    else:
        path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(2000))
    if rng.random() < 0.7:
        path.write_bytes(_break_bytes(path.read_bytes(), rng))
    return [lambda: load_weights(path), lambda: load_model(str(path)),
            lambda: convert.main([str(path), str(folder / "out/weights.npz")])]  # fmt: skip


def _random_pickle(rng: Dice) -> bytes:
    """A pickle of random, mostly well-formed operations."""
    word = rng.choice([b"os\nsystem\n", b"builtins\neval\n", b"builtins\nbytearray\n", b"numpy\nndarray\n",
                       b"numpy.core.multiarray\n_reconstruct\n", b"collections\nOrderedDict\n",
                       b"torch\nload\n"])  # fmt: skip
    parts = [
        lambda: b"K" + bytes([rng.randrange(256)]), lambda: b"J" + struct.pack("<i", rng.randrange(-(2**31), 2**31)),
        lambda: b"]", lambda: b"}", lambda: b")", lambda: b"(", lambda: b"N", lambda: b"c" + word, lambda: b"R",
        lambda: b"b", lambda: b"l", lambda: b"t", lambda: b"d", lambda: b"0", lambda: b"2", lambda: b"a", lambda: b"s",
        lambda: b"\x8c\x04name", lambda: b"r" + struct.pack("<I", rng.choice([1, 2**20, 2**31])), lambda: b"\x94",
        lambda: b"\x8e" + struct.pack("<Q", rng.choice([1, 2**33, 2**62])), lambda: b"T" + struct.pack("<I", 2**31 - 1),
        lambda: b"\x8a\x08" + bytes(rng.randrange(256) for _ in range(8)), lambda: b"Q", lambda: b"\x81", lambda: b"u",
        lambda: b"\x85", lambda: b"\x86", lambda: b"h\x00", lambda: b"j" + struct.pack("<I", rng.choice([0, 2**31])),
    ]  # fmt: skip
    return (
        b"\x80" + bytes([rng.randint(0, 6)]) + b"".join(rng.choice(parts)() for _ in range(rng.randint(0, 30))) + b"."
    )


def _pickle(folder: Path, rng: Dice) -> list[Call]:
    path = folder / rng.choice(["weights.pkl", "weights.pth"])
    if rng.random() < 0.5:
        path.write_bytes(_random_pickle(rng))
    else:
        values: Any = {"model": _small_weights(rng)}
        if rng.random() < 0.3:
            values = rng.choice(ODD[:-2] + [{"model": rng.choice(ODD)}, {"blobs": {"conv1_w": rng.choice(ODD)}}])
        if rng.random() < 0.2:
            for _ in range(3000):
                values = [values]
        try:
            content = pickle.dumps(values, protocol=rng.randint(0, 5))
        except (RecursionError, UnicodeEncodeError):
            content = b"\x80\x02" + b"]" * 5000 + b"."
        path.write_bytes(_break_bytes(content, rng) if rng.random() < 0.7 else content)
    return [lambda: read_pickle(path), lambda: convert.main([str(path), str(folder / "out/weights.npz")])]


_CHECKPOINT: dict[str, bytes] = {}  # files of a sound one, made once in a process


def _sound_checkpoint() -> dict[str, bytes]:
    if not _CHECKPOINT:
        from utils.tf_v1 import tf

        with tempfile.TemporaryDirectory() as parent, tf.Graph().as_default(), tf.Session() as session:
            for name, value in _small_weights(Dice(0)).items():
                tf.get_variable(name, initializer=value)
            session.run(tf.global_variables_initializer())
            meta = make_meta({"MODE_FPN": True}, ["a", "b", "c"], 10)
            save_tf_checkpoint(checkpoint_writer(tf.global_variables()), session, parent, 10, meta)
            _CHECKPOINT.update({p.name: p.read_bytes() for p in Path(parent).iterdir() if p.is_file()})
    return _CHECKPOINT


def _checkpoint(folder: Path, rng: Dice) -> list[Call]:
    files = _sound_checkpoint()
    (folder / "run").mkdir()
    broken = rng.choice(sorted(files))
    for name, content in files.items():
        path = folder / "run" / name
        if name != broken:
            path.write_bytes(content)
        elif name.endswith(".json") and rng.random() < 0.7:
            _write_json(path, json.loads(content), rng)
        elif rng.random() < 0.9:
            path.write_bytes(_break_bytes(content, rng))
    prefix = str(folder / "run" / "model-10")
    return [lambda: load_weights(folder / "run"), lambda: load_model(str(folder / "run")), lambda: load_weights(prefix)]


def _settings(folder: Path, rng: Dice) -> list[Call]:
    keys = [key for key, _ in default_config().items()]
    words = []
    for _ in range(rng.choice([1, 1, 2, 4])):
        value = rng.choice(
            [*map(repr, ODD), *map(str, ODD), "1x", "'", "(", "__import__('os')", "1e-3", "[800,1333]", "-7"]
        )
        key = rng.choice(keys)
        if rng.random() < 0.1:
            key = _break_bytes(key.encode(), rng).decode(errors="replace")
        words.append(f"{key}{rng.choice(['='] * 9 + [''])}{value}")
    (folder / "run").mkdir()
    stored = {key: rng.choice(ODD) for key in rng.sample(keys, 2)}
    save_npz(folder / "run/weights.npz", _small_weights(rng), make_meta(stored, ["a"], 1))

    def given():
        explain(finalize_config(default_config().update_args(words)))

    return [given, lambda: load_model(str(folder / "run/weights.npz"), words[:1])]


KINDS: dict[str, Callable[[Path, random.Random], list[Call]]] = {
    "COCO": _coco, "VOC": _voc, "csv": _csv, "Cityscapes": _cityscapes, "LVIS": _lvis, "Open Images": _open_images,
    "results": _results, "labels": _labels, "archives": _archive, "images": _image, "weights": _weights,
    "pickles": _pickle, "checkpoints": _checkpoint, "settings": _settings,
}  # fmt: skip


def make(kind: str, number: int, folder: Path, sound: bool = False) -> list[Call]:
    """Writes input `number` of a kind into the folder, the same one each time, and returns what to try on it."""
    rng = Dice(f"{kind} {number}")
    rng.sound = sound
    return KINDS[kind](folder, rng)
