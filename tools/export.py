#!/usr/bin/env python3
"""Writes a trained model as files that run without this project, and proves them (docs/EXPORT.md).

    tools/export.py --load train_log/mine --out exported --format savedmodel onnx

Every file is run on images and compared with the Python predictor. One that differs by more than the stated tolerances
is renamed ("unproven"), and the exit code is 3.
"""

import import_path

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from common import UserError, check_output_folder, errors_in_one_line, logger, path_argument, write_json
from config import Config, inference_precision
from config_files import settings_words
from data import list_images
from export_proof import LIMITS, Proof, pick_images, prove, table, verdict
from run_start import STRICT, Model, load_model, weight_loader

__all__ = ["export", "main", "report"]

FORMATS = ("savedmodel", "onnx", "tflite")
_NO_TFLITE = (
    "--format tflite: TensorFlow Lite has no operation for CombinedNonMaxSuppression and CropAndResize, and the "
    "interpreter of TensorFlow 2.21 runs no TensorFlow operations in their place (Flex), so no file could be proven; "
    "use --format onnx"
)
PRECISIONS = ("float32", "bfloat16", "float16", "int8")


def targets(out: Path, formats: list[str], version: int) -> dict[str, Path]:
    """{format: the file or folder that is written}."""
    names = {"savedmodel": str(version), "onnx": "model.onnx", "tflite": "model.tflite"}
    found = {name: out / names[name] for name in formats}
    for name, path in found.items():
        if path.exists():
            hint = "give another --version, " if name == "savedmodel" else ""
            raise UserError(f"--out {out}: {path} exists; {hint}move it away or choose another folder")
    return found


def with_export_settings(model: Model, precision: str | None) -> tuple[Model, Config]:
    """The model as the Python predictor runs it, and the settings of the exported graph."""
    cfg = model.cfg.copy()
    if cfg.TEST.AUG_SHORT_EDGES:
        logger.warning("test-time augmentation (TEST.AUG_SHORT_EDGES) is left out: an exported model looks once")
        cfg.TEST.AUG_SHORT_EDGES = []
    model = model._replace(cfg=cfg.copy().freeze())
    cfg = inference_precision(cfg).copy()
    if precision and precision != "int8":
        cfg.TRAIN.PRECISION = precision
    cfg.TEST.PRECISION = None  # the files are in one precision
    return model, cfg.freeze()


def size_of(path: Path) -> float:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sum(p.stat().st_size for p in files) / 1e6


def export(args: argparse.Namespace) -> int:
    out = Path(args.out)
    check_output_folder(out, "--out")
    if "tflite" in args.format:
        raise UserError(_NO_TFLITE)
    if args.precision == "int8" and "savedmodel" in args.format:
        raise UserError("--precision int8 is for --format onnx alone: TensorFlow has no int8 kernels for a SavedModel")
    paths = targets(out, list(dict.fromkeys(args.format)), args.version)
    given = list_images(args.images) if args.images else []
    model = load_model(args.load, settings_words(args.config, args.trust_code), args.trust_code, uses_data=not given)
    model, cfg = with_export_settings(model, args.precision)
    if cfg.TRAIN.PRECISION == "bfloat16" and "onnx" in args.format:
        what = "--precision bfloat16" if args.precision == "bfloat16" else "the model predicts in bfloat16"
        raise UserError(
            f"{what}: ONNX Runtime has no bfloat16 convolutions on the CPU; use --precision float32 or float16"
        )
    sample = pick_images(model.cfg, given, args.verify)

    from export_model import CLASSES_FILE, SETTINGS_FILE, freeze, saved_model_runner, write_assets, write_saved_model
    from export_onnx import onnx_module, onnx_runner, onnx_runtime, quantize, write_onnx, write_paste_masks
    from model_rcnn import mask_resolution
    from predict import LoadedPredictor

    if "onnx" in paths:
        onnx_module(), onnx_runtime()  # an error now, if they are missing

    reference = LoadedPredictor(model)
    cfg = cfg.copy()
    cfg.DATA.CLASS_NAMES, cfg.DATA.NUM_CATEGORY = reference.cfg.DATA.CLASS_NAMES, reference.cfg.DATA.NUM_CATEGORY
    cfg.freeze()
    write_assets(out, cfg, reference.category_ids)
    load = weight_loader(model.weights, model.origin, STRICT)
    inputs = ("images", "image_bytes") if "savedmodel" in paths else ("images",)
    frozen = freeze(cfg, load, inputs)
    runners: dict[str, Any] = {}
    if "savedmodel" in paths:
        write_saved_model(paths["savedmodel"], frozen, [out / SETTINGS_FILE, out / CLASSES_FILE])
        runners["savedmodel"] = saved_model_runner(paths["savedmodel"])
    if "onnx" in paths:
        paste = out / "paste_masks.onnx" if "box_masks" in frozen.outputs["images"] else None
        write_onnx(paths["onnx"], frozen, cfg)
        if args.precision == "int8":
            quantize(paths["onnx"])
        if paste:
            write_paste_masks(paste, mask_resolution(cfg))
        runners["onnx"] = onnx_runner(paths["onnx"], paste)

    threshold = 0.0 if cfg.MODE_RPN_ONLY else cfg.TEST.RESULT_SCORE_THRESH
    limit = cfg.TEST.RESULTS_PER_IM
    same = args.precision != "int8" and cfg.TRAIN.PRECISION == inference_precision(model.cfg).TRAIN.PRECISION
    rows = []
    for name, run in runners.items():
        proof = prove(reference, run, sample, threshold, limit, cfg.MODE_RPN_ONLY)
        rows.append((paths[name], proof, verdict(proof, same)))
    return report(out, rows, sample.origin)


def report(out: Path, rows: list[tuple[Path, Proof, list[str]]], origin: str) -> int:
    """Prints the proofs, writes proof.json, and renames what is not proven; returns the exit code."""
    tolerances = ", ".join(f"{name} {limit:g}" for name, limit in LIMITS.items())
    logger.info(f"compared with the Python predictor on {origin} (tolerances: {tolerances})")
    print(table([(path.name, size_of(path), proof, reasons) for path, proof, reasons in rows]))
    content = {
        path.name: {"images": origin, "proven": not reasons, "reasons": reasons, "megabytes": size_of(path),
                    **proof.differences._asdict(), "seconds": proof.seconds, "ap": proof.ap}
        for path, proof, reasons in rows
    }  # fmt: skip
    write_json(out / "proof.json", content, indent=1)
    code = 0
    for path, _, reasons in rows:
        if reasons:
            code = 3
            aside = path.with_name(f"{path.stem}.unproven{path.suffix}")
            os.replace(path, aside)
            logger.error(f"{aside} is not proven: {'; '.join(reasons)}")
        else:
            logger.info(f"{path} is proven")
    return code


@errors_in_one_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--load", type=path_argument, required=True, metavar="PATH", help="checkpoint, run directory or .npz"
    )
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["savedmodel"], help="default: savedmodel")
    parser.add_argument("--config", nargs="+", action="extend", default=[], metavar="KEY=VAL", help="settings that win")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="default: as the settings say. int8: weights of ONNX and TFLite"
    )
    parser.add_argument("--version", type=int, default=1, metavar="N", help="folder of the SavedModel in DIR (1)")
    parser.add_argument("--verify", type=int, default=8, metavar="N", help="images of DATA.VAL to compare on (8)")
    parser.add_argument(
        "--images",
        nargs="+",
        type=path_argument,
        default=[],
        metavar="IMAGE",
        help="compare on these images or folders",
    )
    parser.add_argument("--trust-code", action="append", default=[], metavar="MODULE", help="as for train.py")
    args = parser.parse_args(argv)
    if args.verify < 1 or args.version < 1:
        raise UserError("--verify and --version must be at least 1")
    return export(args)


if __name__ == "__main__":
    sys.exit(main())
