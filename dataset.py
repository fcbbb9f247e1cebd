"""Loads the data sets that the settings name, for training and validation.

A set is registered by a list: ['annotations.json', 'image folder'] in COCO's format, else the first entry names the
format, e.g. DATA.DATASETS="{'oid_train': ['openimages', 'open_images', 'train']}", with options as 'key=value' at the
end:

| list | files | options |
|---|---|---|
| ['annotations.json', image folder] | COCO's format | normalised |
| ['openimages', dir, split] | the published csv and json files | group_of, expand, images |
| ['voc', dir, split] | Annotations/*.xml, ImageSets/Main/<split>.txt ('' = all), SegmentationObject/ | difficult |
| ['lvis', json, image folder] | LVIS v1 json | |
| ['cityscapes', dir, split] | gtFine/<split>/*/*_gtFine_(instanceIds.png or polygons.json), leftImg8bit/<split> | |
| ['csv', file, image folder] | one row per box, see `dataset_csv.read_csv_content` | classes, normalised |
| ['via', json, image folder] | VGG Image Annotator's json | attribute, one_class |
| ['module:function', …] | any, read by your own function, see `load_format` | its keyword arguments |

The function of each format documents its options: `load_openimages`, `read_voc_content`, ….
"""

import ast
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

import dataset_cityscapes
import dataset_coco
import dataset_csv
import dataset_lvis
import dataset_openimages
import dataset_via
import dataset_voc
from common import UserError, describe_error, import_function, logger
from config import Config
from dataset_build import CLASS_UNKNOWN, WITHOUT_OUTLINE, some_names
from dataset_split import DatasetSplit, concatenate_splits, own_path
from utils.archives import exists

__all__ = ["FORMATS", "class_count_table", "load_format", "load_split", "load_training_split", "load_validation_splits"]

# A format is a function load(name, path, split or folder, cfg=…, class_names=…, training=…, **options) -> DatasetSplit.
FORMATS: dict[str, Callable[..., DatasetSplit]] = {
    "cityscapes": dataset_cityscapes.load,
    "csv": dataset_csv.load,
    "lvis": dataset_lvis.load,
    "openimages": dataset_openimages.load,
    "via": dataset_via.load,
    "voc": dataset_voc.load,
}


def load_split(cfg: Config, name: str, class_names: Sequence[str] = (), training: bool = False) -> DatasetSplit:
    """Reads one registered set.

    Args:
        class_names: the classes in the order of their labels, matched to the file's categories by name; those of the
            file in the order of their ids if empty.
        training: with MODE_MASK, objects without an outline are left out, because the mask branch cannot be trained on
        them.
    """
    spec = cfg.DATA.DATASETS.get(name)
    if spec is None and name in dataset_via.BALLOON:
        spec = dataset_via.balloon_spec(cfg, name)
    if spec is None or spec[0].endswith(".json"):
        _, words, options = _parse_spec(spec or [name], name)
        if len(words) > 1:
            raise UserError(
                f"DATA.DATASETS: {name}: after the image folder only options 'key=value' may follow, not {words[1]}"
            )
        return _call(dataset_coco.load, f"DATA.DATASETS: {name}", name, cfg, class_names, training, **options)
    return load_format(spec, cfg, name, class_names, training)


def load_format(
    spec: Sequence[str], cfg: Config, name: str = "", class_names: Sequence[str] = (), training: bool = False
) -> DatasetSplit:
    """The set that a DATA.DATASETS entry with a format name describes.

    Args:
        spec: see the table above; paths are relative to DATA.BASEDIR or absolute.
        class_names, training: as for `dataset.load_split`.

    A 'module:function' is imported and called as function(name, *paths and words, cfg=cfg, class_names=class_names,
    training=training, **options); it returns a DatasetSplit, most simply by `split_from_coco`.
    """
    form, words, options = _parse_spec(spec, name)
    common = {"cfg": cfg, "class_names": class_names, "training": training}
    if ":" in form:
        loader = import_function(form, f"DATA.DATASETS={{{name!r}: {list(spec)}}}")
        return _call_own(loader, f"DATA.DATASETS: {name}: {form}", name, *words, **common, **options)
    if form not in FORMATS:
        raise UserError(f"DATA.DATASETS: {name}: unknown format '{form}'; known are {', '.join(sorted(FORMATS))}")
    if len(words) != 2:
        raise UserError(f"DATA.DATASETS: {name}: ['{form}', …] takes two more entries and options, not {len(words)}")
    path = own_path(Path(cfg.DATA.BASEDIR).expanduser(), words[0])
    if not exists(path):
        raise UserError(f"DATA.DATASETS: {name}: {path} does not exist")
    where = f"DATA.DATASETS: {name}: format '{form}'"
    return _call(FORMATS[form], where, name, path, words[1], **common, **options)


def _call(load: Callable[..., DatasetSplit], where: str, *args: Any, **options: Any) -> DatasetSplit:
    """load(*args, **options); a UserError of one line names an option that the function does not take."""
    try:
        inspect.signature(load).bind(*args, **options)
    except TypeError as e:
        unknown = str(e).rpartition("unexpected keyword argument ")[2]
        raise UserError(f"{where} has no option {unknown}" if unknown != str(e) else f"{where}: {e}") from None
    except ValueError:
        pass  # a function without a signature
    return load(*args, **options)


def _call_own(load: Callable[..., DatasetSplit], where: str, *args: Any, **options: Any) -> DatasetSplit:
    """As `_call`, for a user's function; its errors are reported with their source line."""
    try:
        split = _call(load, where, *args, **options)
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{where} raised {describe_error(e)}") from e
    if not isinstance(split, DatasetSplit):
        raise UserError(f"{where}: it returns {type(split).__name__}, not a DatasetSplit (see split_from_coco)")
    return split


def _parse_spec(spec: Sequence[str], name: str) -> tuple[str, list[str], dict[str, Any]]:
    if not spec or not all(isinstance(s, str) for s in spec):
        raise UserError(f"DATA.DATASETS: {name}: must be a list of strings that starts with a format name")
    options = {}
    words = list(spec[1:])
    while words and "=" in words[-1] and not os.path.exists(words[-1]):
        key, _, text = words.pop().partition("=")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text
    return spec[0], words, options


def load_training_split(cfg: Config) -> DatasetSplit:
    """All sets of DATA.TRAIN as one split. DATA.CLASS_NAMES, if set, selects and orders the classes."""
    if not cfg.DATA.TRAIN:
        raise UserError("DATA.TRAIN names no data set to train on, e.g. --config DATA.TRAIN=coco_train2017")
    wanted = list(cfg.DATA.CLASS_NAMES)
    splits: list[DatasetSplit] = []
    for name in cfg.DATA.TRAIN:
        split = load_split(cfg, name, training=True, class_names=wanted or (splits[0].class_names if splits else ()))
        if splits or wanted:
            _check_same_classes(cfg, split, strict=not wanted)
        splits.append(split)
    split = concatenate_splits(splits)
    if cfg.FRCNN.FEDERATED_LOSS and not split.is_federated():
        raise UserError(
            f"setting FRCNN.FEDERATED_LOSS=True: {', '.join(cfg.DATA.TRAIN)} does not say which classes people "
            "looked for in an image (Open Images' image labels, or neg_category_ids of a json's images)"
        )
    if len(split.nonempty_images()) == 0:
        outlines = split.dropped.get(WITHOUT_OUTLINE, 0)
        why = f"none of its {outlines} objects has an outline; set MODE_MASK=False" if outlines else "check its json"
        raise UserError(f"{', '.join(cfg.DATA.TRAIN)}: no image with an object to train on: {why}")
    return split


def _check_same_classes(cfg: Config, split: DatasetSplit, strict: bool) -> None:
    """Raises UserError unless the set has every class of the run and, if strict, no other."""
    missing = [n for n, c in zip(split.class_names, split.category_ids) if c is None]
    if missing:
        raise UserError(
            f"{split.name} has no category '{missing[0]}', which "
            f"{'DATA.CLASS_NAMES names' if not strict else f'{cfg.DATA.TRAIN[0]} has'}; sets that are trained together "
            "must have the same classes"
        )
    more = split.dropped.get(CLASS_UNKNOWN, 0)
    if strict and more:
        raise UserError(
            f"{split.name} has {more} annotations of categories that {cfg.DATA.TRAIN[0]} does not have; sets that are "
            "trained together must have the same classes (or choose some with DATA.CLASS_NAMES)"
        )


def load_validation_splits(cfg: Config) -> list[DatasetSplit]:
    """The sets of DATA.VAL, labels in the order of DATA.CLASS_NAMES if set, matched by name.

    With MODE_RPN_ONLY each set keeps the classes of its own annotations, since proposals are class-agnostic.
    """
    splits = []
    for name in cfg.DATA.VAL:
        split = load_split(cfg, name, [] if cfg.MODE_RPN_ONLY else cfg.DATA.CLASS_NAMES)
        missing = [n for n, c in zip(split.class_names, split.category_ids) if c is None]
        if missing:
            logger.warning(f"{name} has no category {some_names(missing)}: detections of it are not scored there")
        splits.append(split)
    return splits


def class_count_table(split: DatasetSplit) -> str:
    """A table of the objects and images of each class in label order, with enough columns to stay under 30 rows."""
    objects, images = split.class_counts()
    rows = [[n, int(o), int(i)] for n, o, i in zip(split.class_names, objects, images)]
    total = ["all", int(objects.sum()), len(split.nonempty_images())]
    groups = max(1, -(-len(rows) // 30))
    height = -(-len(rows) // groups)
    lines = [
        [cell for g in range(groups) for cell in (rows[r + g * height] if r + g * height < len(rows) else [""] * 3)]
        for r in range(height)
    ]
    lines.append(total + [""] * (3 * (groups - 1)))
    return tabulate(lines, ["class", "objects", "images"] * groups, tablefmt="pipe")
