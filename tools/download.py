#!/usr/bin/env python3
"""Downloads public data sets and weights, continues after interruptions, checks and unpacks.

    tools/download.py coco2017 --output ~/data/coco                 images and annotations, 26 GB
    tools/download.py coco2017 --parts val --no-unpack              a part; images are read from their zip
    tools/download.py coco2014 --output ~/data/coco                 with minival and valminusminival
    tools/download.py openimages --split validation --classes Cat Dog --limit 500 --output ~/data/oid
    tools/download.py backbone --name R50-AlignPadding --output ~/weights
    tools/download.py detector --name torchvision-maskrcnn-v2 --output ~/weights
    tools/download.py balloon --output ~/data

The same command again continues. docs/DATA.md tells what is checked.
"""

import import_path

import argparse
import csv
import os
import shlex
import stat
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from common import UserError, atomic_write, check_output_folder, logger, path_argument
from download_files import Remote, check_space, download, download_many, file_name_of
from utils.oid_format import read_classes

__all__ = ["BACKBONES", "COCO", "DETECTORS", "unpack"]

_COCO, _OID = "http://images.cocodataset.org", "https://storage.googleapis.com/openimages"
# Sizes are about right and serve the check of the disk. COCO publishes no sums; these MD5 sums are those against which
# several projects check its files.
COCO: dict[str, dict[str, Remote]] = {
    "coco2017": {
        "annotations": Remote(f"{_COCO}/annotations/annotations_trainval2017.zip", "annotations_trainval2017.zip",
                              252_907_541, "f4bbac642086de4f52a3fdda2de5fa2c"),
        "train": Remote(f"{_COCO}/zips/train2017.zip", "train2017.zip", 19_336_861_798,
                        "cced6f7f71b7629ddf16f17bbcfab6b2"),
        "val": Remote(f"{_COCO}/zips/val2017.zip", "val2017.zip", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80"),
    },
    "coco2014": {
        "annotations": Remote(f"{_COCO}/annotations/annotations_trainval2014.zip", "annotations_trainval2014.zip",
                              252_872_794, "0a379cfc70b0e71301e0f377548639bd"),
        "minival": Remote("https://dl.fbaipublicfiles.com/detectron/coco/coco_annotations_minival.tgz",
                          "coco_annotations_minival.tgz", 75_000_000, "2d2b9d2283adb5e3b8d25eec88e65064"),
        "train": Remote(f"{_COCO}/zips/train2014.zip", "train2014.zip", 13_510_573_713,
                        "0da8cfa0e090c266b78f30e2d2874f1a"),
        "val": Remote(f"{_COCO}/zips/val2014.zip", "val2014.zip", 6_645_013_297, "a3d79f5ed8d289b7a7554ce06a5782b3"),
    },
}  # fmt: skip
BALLOON = Remote(
    "https://github.com/matterport/Mask_RCNN/releases/download/v2.1/balloon_dataset.zip", "balloon_dataset.zip",
    40_000_000,
)  # fmt: skip
_TENSORPACK = "http://models.tensorpack.com/FasterRCNN/ImageNet-"
_D2, _TORCH = "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/", "https://download.pytorch.org/models/"
# PyTorch's and OpenMMLab's file names end with the first digits of their SHA-256.
BACKBONES: dict[str, str] = {
    **{n: f"{_TENSORPACK}{n}.npz" for n in (
        "R50-AlignPadding", "R101-AlignPadding", "R50-GroupNorm32-AlignPadding", "R101-GroupNorm32-AlignPadding"
    )},
    "detectron2-R-50": f"{_D2}MSRA/R-50.pkl", "detectron2-R-101": f"{_D2}MSRA/R-101.pkl",
    "torchvision-resnet18": f"{_TORCH}resnet18-f37072fd.pth", "torchvision-resnet34": f"{_TORCH}resnet34-b627a593.pth",
    "torchvision-resnet50": f"{_TORCH}resnet50-0676ba61.pth",
    "torchvision-resnet101": f"{_TORCH}resnet101-63fe2227.pth",
    "torchvision-resnet152": f"{_TORCH}resnet152-394f9c45.pth",
}  # fmt: skip
_D2_MODELS, _MM = "https://dl.fbaipublicfiles.com/detectron2", "https://download.openmmlab.com/mmdetection/v2.0"
# Detectors trained on COCO that tools/convert.py reads; docs/WEIGHTS.md has their scores and licences.
DETECTORS: dict[str, str] = {
    "torchvision-fasterrcnn": f"{_TORCH}fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
    "torchvision-fasterrcnn-v2": f"{_TORCH}fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth",
    "torchvision-maskrcnn": f"{_TORCH}maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
    "torchvision-maskrcnn-v2": f"{_TORCH}maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth",
    "torchvision-keypointrcnn": f"{_TORCH}keypointrcnn_resnet50_fpn_coco-fc266e95.pth",
    **{f"detectron2-{name}": f"{_D2_MODELS}/{path}.pkl" for name, path in {
        "faster-R50-3x": "COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758",
        "mask-R50-3x": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217",
        "mask-R101-3x": "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x/138205316/model_final_a3ec72",
        "cascade-R50-3x": "Misc/cascade_mask_rcnn_R_50_FPN_3x/144998488/model_final_480dd8",
        "keypoint-R50-3x": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x/137849621/model_final_a6e10b",
        "mask-R50-400ep": "new_baselines/mask_rcnn_R_50_FPN_400ep_LSJ/42019571/model_final_14d201",
        "mask-R101-400ep": "new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ/42073830/model_final_f96b26",
    }.items()},
    **{f"mmdetection-{name}": f"{_MM}/{path}.pth" for name, path in {
        "faster-R50-3x": "faster_rcnn/faster_rcnn_r50_fpn_mstrain_3x_coco/"
                         "faster_rcnn_r50_fpn_mstrain_3x_coco_20210524_110822-e10bd31c",
        "mask-R50-3x": "mask_rcnn/mask_rcnn_r50_fpn_mstrain-poly_3x_coco/"
                       "mask_rcnn_r50_fpn_mstrain-poly_3x_coco_20210524_201154-21b550bb",
        "mask-R101-caffe-3x": "mask_rcnn/mask_rcnn_r101_caffe_fpn_mstrain-poly_3x_coco/"
                              "mask_rcnn_r101_caffe_fpn_mstrain-poly_3x_coco_20210526_132339-3c33ce02",
        "cascade-R50-20e": "cascade_rcnn/cascade_rcnn_r50_fpn_20e_coco/"
                           "cascade_rcnn_r50_fpn_20e_coco_bbox_mAP-0.41_20200504_175131-e9872a90",
    }.items()},
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ unpacking
@contextmanager
def _members(path: Path) -> Iterator[list[tuple[str, int, Any]]]:
    """(name, size, open()) of the files in a zip or tar; links and devices are left out."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as z:
                files = [
                    i for i in z.infolist() if not i.filename.endswith("/") and not stat.S_ISLNK(i.external_attr >> 16)
                ]
                yield [(i.filename, i.file_size, lambda i=i: z.open(i)) for i in files]
        else:
            with tarfile.open(path) as t:
                files = [m for m in t.getmembers() if m.isreg()]
                yield [(m.name, m.size, lambda m=m: t.extractfile(m)) for m in files]
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{path} cannot be unpacked: {e}; remove it and start again") from None


def _safe(name: str, path: Path) -> Path:
    """The member's name as a relative path; UserError where it leads out of the folder."""
    parts = Path(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or "\0" in name or not parts.parts:
        raise UserError(f"{path}: its member {name!r} would be written outside of the folder; it is not unpacked")
    return parts


def unpack(path: Path, folder: Path, only_json: bool = False) -> list[Path]:
    """Unpacks a zip or tar into the folder; returns what is new there.

    Each top folder of the archive appears when all of it is unpacked, and one that exists is left alone. With only_json
    the archive's json files go to folder/annotations, whatever folder they are in.
    """
    new: list[Path] = []
    with _members(path) as members:
        plain = [(_safe(name, path), size, open_) for name, size, open_ in members]
        check_space(folder, sum(size for _, size, _ in plain), f"unpacking {path.name}")
        if only_json:
            for name, size, open_ in plain:
                target = folder / "annotations" / name.name
                if name.suffix == ".json" and not name.name.startswith(".") and not target.exists():
                    with open_() as source, atomic_write(target, "wb") as f:
                        _copy(source, f, size, path, name)
                    new.append(target)
            return new
        tops = sorted({name.parts[0] for name, *_ in plain} - {"__MACOSX"})
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{path.name}.") as scratch:
            todo = [(name, size, o) for name, size, o in plain if name.parts[0] in tops]
            todo = [(name, size, o) for name, size, o in todo if not (folder / name.parts[0]).exists()]
            every = 0.5 if sys.stderr.isatty() else 30
            for name, size, open_ in tqdm(todo, desc=f"unpack {path.name}", unit="file", mininterval=every):
                target = Path(scratch) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with open_() as source, open(target, "xb") as f:
                    _copy(source, f, size, path, name)
            for top in tops:
                if not (folder / top).exists():
                    os.rename(Path(scratch) / top, folder / top)
                    new.append(folder / top)
    return new


def _copy(source: IO[bytes], target: IO[bytes], size: int, path: Path, name: Path) -> None:
    done = 0
    while block := source.read(1 << 20):
        done += len(block)
        if done > size:
            raise UserError(f"{path}: its member {name} is longer than the archive says; remove it and start again")
        target.write(block)
    if done != size:
        raise UserError(f"{path}: its member {name} is cut off; remove it and start again")


# ------------------------------------------------------------------------------------------------ the sets
def _get_coco(which: str, args: argparse.Namespace) -> str:
    known = COCO[which]
    parts = args.parts or list(known)
    if unknown := [p for p in parts if p not in known]:
        raise UserError(f"--parts {unknown[0]}: {which} has {', '.join(known)}")
    folder, year = Path(args.output), which.removeprefix("coco")
    todo = []
    for part in parts:
        images = part in ("train", "val")
        last = f"annotations/instances_{'minival2014' if part == 'minival' else f'val{year}'}.json"
        there = (folder / (f"{part}{year}" if images else last)).exists()
        todo += [] if there else [(part, images, _mirrored(known[part], args.mirror))]
    wanted = sum(r.size * (1 if args.no_unpack or not images else 2) for _, images, r in todo
                 if not (folder / r.name).exists())  # fmt: skip
    check_space(folder, wanted, which)
    for _, images, remote in todo:
        path = download(remote, folder)
        if images and args.no_unpack:
            continue
        new = unpack(path, folder, only_json=not images)
        logger.info(f"{path.name}: {', '.join(p.name for p in new[:4]) or 'everything was there'}")
        if not args.keep:
            path.unlink()
    sets = ("coco_train2017", "coco_val2017") if year == "2017" else (
        '["coco_train2014","coco_valminusminival2014"]', "coco_minival2014")  # fmt: skip
    return f"./train.py --config DATA.BASEDIR={_quoted(folder)} DATA.TRAIN='{sets[0]}' DATA.VAL={sets[1]} MODE_FPN=True"


def _get_balloon(args: argparse.Namespace) -> str:
    folder = Path(args.output)
    if not (folder / "balloon").is_dir():
        path = download(_mirrored(BALLOON, args.mirror), folder)
        if not args.no_unpack:
            unpack(path, folder)
            if not args.keep:
                path.unlink()
    return (
        f"./train.py --config DATA.BASEDIR={_quoted(folder)} DATA.TRAIN=balloon_train DATA.VAL=balloon_val "
        "MODE_FPN=True TRAIN.EPOCHS=50 --load …"
    )


def _get_weights(args: argparse.Namespace) -> str:
    known = BACKBONES if args.what == "backbone" else DETECTORS
    if args.name not in known:
        raise UserError(f"--name: one of {', '.join(known)}")
    url = known[args.name]
    name = file_name_of(url)
    digest = name.removesuffix(".pth").rpartition("-")[2] if url.startswith((_TORCH, _MM)) else ""
    path = download(_mirrored(Remote(url, name, 0, digest), args.mirror), args.output)
    if path.suffix == ".npz":
        return f"./train.py --config BACKBONE.WEIGHTS={_quoted(path)} …"
    return f"python tools/convert.py {_quoted(path)} {_quoted(path.with_suffix('.npz'))}"


def _get_open_images(args: argparse.Namespace) -> str:
    folder, split = Path(args.output), args.split
    boxes = (
        f"{_OID}/v6/oidv6-train-annotations-bbox.csv" if split == "train" else f"{_OID}/v5/{split}-annotations-bbox.csv"
    )
    urls = [f"{_OID}/v7/oidv7-class-descriptions-boxable.csv", f"{_OID}/2018_04/bbox_labels_600_hierarchy.json", boxes,
            f"{_OID}/v5/{split}-annotations-human-imagelabels-boxable.csv"]  # fmt: skip
    if args.masks:
        urls.append(f"{_OID}/v5/{split}-annotations-object-segmentation.csv")
        urls += [f"{_OID}/v5/{split}-masks/{split}-masks-{digit}.zip" for digit in "0123456789abcdef"]
    files = {url: download(_mirrored(Remote(url, file_name_of(url)), args.mirror), folder) for url in urls}
    for path in files.values():
        if path.suffix == ".zip":
            _unpack_masks(path, folder / f"{split}-masks")
            if not args.keep:
                path.unlink()
                path.touch()  # an empty file says that it was there: the next call does not download it again
    labels, names = read_classes(files[urls[0]])
    if unknown := [c for c in args.classes if c not in names]:
        raise UserError(f"--classes {unknown[0]}: no class of Open Images; its names are in {files[urls[0]]}")
    wanted = {labels[names.index(c)] for c in args.classes} or set(labels)
    ids = images_with(files[boxes], wanted, args.limit)
    logger.info(f"{len(ids)} images of {split} have an object of {', '.join(args.classes) or 'any class'}")
    base = args.mirror.rstrip("/") if args.mirror else "https://s3.amazonaws.com"
    remotes = [Remote(f"{base}/open-images-dataset/{split}/{i}.jpg", f"{i}.jpg") for i in ids]
    todo = sum(not (folder / split / r.name).exists() for r in remotes)
    check_space(folder, todo * 320_000, f"{todo} images")  # Open Images' mean
    missing = download_many(remotes, folder / split, args.workers)
    if missing:
        logger.warning(f"{len(missing)} images are not there any more, e.g. {next(iter(missing))}")
    chosen = f" DATA.CLASS_NAMES='{list(args.classes)}'" if args.classes else ""
    spec = f"{{'oid': ['openimages', '{folder.absolute()}', '{split}']}}"
    return (
        f'./train.py --config DATA.DATASETS="{spec}" DATA.TRAIN=oid DATA.KEEP_MISSING_IMAGES=True{chosen} '
        f"MODE_FPN=True MODE_MASK={args.masks}"
    )


def images_with(boxes: Path, labels: set[str], limit: int | None) -> list[str]:
    """Ids of the images with a box of one of the labels, sorted; the first `limit` of them."""
    ids: set[str] = set()
    try:
        with open(boxes, newline="", encoding="utf-8") as f:
            rows = csv.DictReader(f)
            if not {"ImageID", "LabelName"} <= set(rows.fieldnames or ()):
                raise UserError(f"{boxes}: no columns ImageID and LabelName; remove it and start again")
            for row in rows:
                if row["LabelName"] in labels and (row["ImageID"] or "").isalnum():
                    ids.add(row["ImageID"])
    except (OSError, ValueError, csv.Error) as e:
        raise UserError(f"{boxes} cannot be read: {e}") from None
    return sorted(ids)[:limit]


def _unpack_masks(path: Path, folder: Path) -> None:
    """The png files of a zip of masks, flat in the folder; an empty file was unpacked earlier."""
    if path.stat().st_size == 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _members(path) as members:
        check_space(folder, sum(size for _, size, _ in members), f"unpacking {path.name}")
        for name, size, open_ in members:
            target = folder / _safe(name, path).name
            if target.suffix == ".png" and not target.exists():
                with open_() as source, atomic_write(target, "wb", durable=False) as f:
                    _copy(source, f, size, path, Path(name))


def _mirrored(remote: Remote, mirror: str | None) -> Remote:
    """The file at another server that has the same paths."""
    if not mirror:
        return remote
    return remote._replace(url=f"{mirror.rstrip('/')}/{remote.url.split('://', 1)[1].partition('/')[2]}")


def _quoted(path: str | os.PathLike) -> str:
    return shlex.quote(os.fspath(path))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*COCO, "openimages", "backbone", "detector", "balloon"])
    parser.add_argument("--output", type=path_argument, default="data", metavar="DIR", help="folder (default: data)")
    parser.add_argument("--parts", nargs="+", help="COCO: some of annotations, minival, train, val")
    parser.add_argument(
        "--no-unpack", action="store_true", help="COCO, balloon: leave the images in their zips and read them there"
    )
    parser.add_argument("--keep", action="store_true", help="keep archives that were unpacked")
    parser.add_argument("--split", choices=["train", "validation", "test"], default="validation", help="Open Images")
    parser.add_argument("--classes", nargs="+", default=[], metavar="NAME", help="Open Images: only images with these")
    parser.add_argument("--limit", type=int, metavar="N", help="Open Images: at most so many images")
    parser.add_argument("--masks", action="store_true", help="Open Images: masks too")
    parser.add_argument("--workers", type=int, default=32, help="Open Images: images at a time (default: %(default)s)")
    parser.add_argument(
        "--name", help=f"backbone: {', '.join(BACKBONES)}; detector (docs/WEIGHTS.md): {', '.join(DETECTORS)}"
    )
    parser.add_argument(
        "--mirror", metavar="URL", help="another server with the same paths, e.g. http://localhost:8000"
    )
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1 or not 1 <= args.workers <= 256:
        parser.error("--limit must be at least 1, --workers 1 to 256")
    if args.what in ("backbone", "detector") and not args.name:
        parser.error(f"{args.what} needs --name")
    again = shlex.join(["python", "tools/download.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        check_output_folder(args.output, "--output")
        if args.what in COCO:
            command = _get_coco(args.what, args)
        else:
            get = {"openimages": _get_open_images, "balloon": _get_balloon}.get(args.what, _get_weights)
            command = get(args)
    except UserError as e:
        logger.error(str(e))
        return 2
    except KeyboardInterrupt:
        logger.warning(f"stopped; this continues: {again}")
        return 130
    logger.info(f"to go on: {command}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
