"""Reading, matching, restoring and writing weights: this project's .npz files and TensorFlow checkpoints.

A set of variables is a dict {name without ":0": array}; names are those of tensorpack's R-CNN models. Beside the
variables a file carries its `meta`: {settings: {dotted key: value}, class_names, step, versions, git_revision}.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate
from termcolor import colored

from common import UserError, atomic_write, git_revision, logger, project_version, read_json, write_json
from utils.weight_files import check_regular, file_kind, is_number_type, read_npz, read_tensor_index, refuse_url

__all__ = [
    "BEST", "best_score", "keep_best", "newest_step", "update_description",
    "load_weights", "load_npz", "is_tf_checkpoint", "native_names", "newest_checkpoint", "stored_step",
    "read_meta", "read_checkpoint_meta", "read_description", "make_meta", "write_checkpoint_meta", "save_npz",
    "without_averages", "start_averages", "AVERAGE_PREFIX",
    "checkpoint_writer", "save_tf_checkpoint", "assign_weights", "match_weights", "fit_weights", "LoadReport",
    "TENSORPACK_NORMS", "is_model_tensor", "is_training_state",
]  # fmt: skip

META_KEY = "__meta__"
BEST = "model-best"  # folder of a run's best checkpoint
AVERAGE_PREFIX = "EMA/"  # prefix of a variable's moving average, followed by the variable's name
_MAX_DESCRIPTION = 8 << 20  # bytes of the JSON that describes a model or run
_CONVERTED_SUFFIXES = (".pkl", ".pth", ".pt", ".h5", ".hdf5")

# Variables of a run, not of a model: steps, rates, optimizer slots, moving averages of summaries.
_TRAINING_STATE = re.compile(
    r"(^|/)(global_step|learning_rate|local_step|loss_scale\w*|good_steps)$"
    r"|/(Momentum|Adam|RMSProp|Adagrad|AccGrad|AccumGrad)(_\d+)?$"
    r"|^(EMA|AccumGrad\w*|beta[12]_power)(/|$)"
)
# Tensors whose shape depends on the number of classes or keypoints: `fit_weights` may re-initialise them.
_CLASS_TENSOR = re.compile(
    r"^(fastrcnn(/outputs)?/(class|box)|cascade_rcnn_stage\d+/outputs/(class|box)|maskrcnn/conv|keypointrcnn/deconv)/[Wb]$"
)
_BACKBONE = re.compile(r"^(conv0|group\d+|backbone)/")

# tensorpack's group-norm heads and pyramid name a norm beside its convolution; here it is inside the convolution's
# scope.
TENSORPACK_NORMS = [
    (re.compile(r"^fpn/gn_c(\d)/"), r"fpn/lateral_1x1_c\1/gn/"),
    (re.compile(r"^fpn/gn_p(\d)/"), r"fpn/posthoc_3x3_p\1/gn/"),
    (re.compile(r"^(fastrcnn|cascade_rcnn_stage\d+/head)/gn(\d)/"), r"\1/conv\2/gn/"),
    (re.compile(r"^maskrcnn/gn(\d)/"), r"maskrcnn/fcn\1/gn/"),
]


# ---------------------------------------------------------------------------------------------------------- reading
def load_weights(
    path: str | os.PathLike, wanted: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """The variables stored at `path`, and the meta stored with them (None if there is none).

    `path` is a native or tensorpack .npz, a TensorFlow checkpoint (its prefix `…/model-500`, .index or .data file), or
    a run directory: then its newest checkpoint, or, with a warning, the newest one before it that reads completely.
    RUN/best is the best checkpoint of a run.
    `wanted` decides by a variable's name whether it is read, e.g. `is_model_tensor` (default: read everything,
    including optimizer slots).
    """
    refuse_url(path)
    path = Path(path)
    if path.name == "checkpoint" and path.is_file():  # TensorFlow's state file of a run directory
        path = path.parent
    if path.name == "best" and not path.exists() and path.parent.is_dir():
        path = _best_of(path.parent)
    if path.is_dir():
        return _load_newest(path, wanted)
    if is_tf_checkpoint(path):
        return _load_tf(_checkpoint_prefix(path), wanted)
    if not path.exists():
        raise UserError(f"weights {path} do not exist{_what_is_there(path)}")
    kind = file_kind(path)
    if kind == "npz":
        return load_npz(path, wanted)
    if kind == "unknown" and path.suffix == ".npz":
        raise UserError(f"weights {path} cannot be read as an .npz: it is no zip archive; copy the file again")
    if kind == "unknown" and path.suffix.lower() not in _CONVERTED_SUFFIXES:
        raise UserError(f"{path} is neither an .npz, a TensorFlow checkpoint nor a run directory; see tools/convert.py")
    raise UserError(f"{path} is another system's file: run tools/convert.py {path} weights.npz, then load that .npz")


def read_meta(path: str | os.PathLike) -> dict[str, Any] | None:
    """The meta that `load_weights` would return, without reading any variable."""
    return load_weights(path, lambda name: False)[1]


def _best_of(run: Path) -> Path:
    if not (run / BEST / "checkpoint").is_file():
        raise UserError(f"{run} has no best checkpoint: no evaluation of it gave a score yet{_what_is_there(run)}")
    if score := best_score(run):
        logger.info(f"the best checkpoint of {run}: {score['metric']} {score['score']:.4f} at step {score['step']}")
    return run / BEST


def best_score(run: str | os.PathLike) -> dict[str, Any] | None:
    """{metric, score, step} of a run's best checkpoint; None if it has none."""
    with contextlib.suppress(UserError):
        score = read_json(Path(run) / BEST / "best.json", "score")
        wants: dict[str, Any] = {"metric": str, "score": (int, float), "step": int}
        if isinstance(score, dict) and all(isinstance(score.get(key), kind) for key, kind in wants.items()):
            return score
    return None


def is_tf_checkpoint(path: str | os.PathLike) -> bool:
    """Whether `path` is a TensorFlow checkpoint's prefix or one of its files."""
    return os.path.isfile(f"{_checkpoint_prefix(Path(path))}.index")


def newest_checkpoint(directory: str | os.PathLike) -> str | None:
    """Prefix of the checkpoint named in a run directory's state file, else of the highest step; None if there is
    none."""
    candidates = _candidates(Path(directory))
    return candidates[0] if candidates else None


def newest_step(directory: str | os.PathLike) -> int | None:
    """Step of the newest checkpoint of a run directory."""
    newest = newest_checkpoint(directory)
    return None if newest is None else _step_of(newest)


def _candidates(directory: Path) -> list[str]:
    """Prefixes with an .index: first the state file's, then lower steps in descending order, then higher steps."""
    found = [str(p)[: -len(".index")] for p in directory.glob("*.index") if p.is_file()]
    found.sort(key=lambda p: (_step_of(p), p), reverse=True)
    state_file = directory / "checkpoint"
    if state_file.is_file():
        with contextlib.suppress(OSError, UnicodeDecodeError):
            state = re.search(r'^model_checkpoint_path: "(.*)"', state_file.read_text(), re.M)
            # A moved run keeps absolute paths of its old place, so only the last part of the path is used.
            named = str(directory / Path(state.group(1)).name) if state else ""
            if named in found:
                at = found.index(named)
                found = found[at:] + found[:at]
    return found


def _load_newest(directory: Path, wanted: Callable[[str], bool]) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    candidates = _candidates(directory)
    if not candidates:
        if (directory / "saved_model.pb").exists():
            raise UserError(
                f"{directory} is a SavedModel, a graph for serving: load the checkpoint or .npz it was made from"
            )
        raise UserError(f"run directory {directory} holds no checkpoint (no *.index file){_what_is_there(directory)}")
    for prefix in candidates:
        try:
            return _load_tf(prefix, wanted)
        except UserError as e:
            logger.warning(f"{e}; trying the one before it")
    raise UserError(f"none of the {len(candidates)} checkpoints in {directory} can be read; start again or use a copy")


def _load_tf(prefix: str, wanted: Callable[[str], bool]) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    # Not at the top of the file: the converter and .npz files do not need TensorFlow.
    from utils.tf_v1 import tf

    try:
        entries = read_tensor_index(prefix)
        reader = tf.train.load_checkpoint(prefix)
        values = {}
        for name, entry in entries.items():
            dtype = tf.as_dtype(entry.dtype)
            # Texts and resources describe objects; they are never variables.
            if not is_number_type(np.dtype(dtype.as_numpy_dtype)) or not wanted(native_name(name)):
                continue
            if entry.size != math.prod(entry.shape) * dtype.size:
                raise UserError(f"{name} of shape {list(entry.shape)} takes {entry.size} bytes")
            # Reading verifies each tensor's checksum, so truncated or overwritten data files are detected here.
            values[name] = reader.get_tensor(name)
    except Exception as e:
        # TensorFlow's reader may raise many kinds of exceptions.
        reason = " ".join(str(getattr(e, "message", None) or e).split())
        raise UserError(f"checkpoint {prefix} is damaged or incomplete ({reason[:200]})") from None
    return native_names(values, prefix), read_checkpoint_meta(prefix)


def load_npz(
    path: Path, wanted: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """As `load_weights`, for a file that is known to be an .npz, whatever its suffix."""
    values, text = read_npz(path, lambda name: wanted(native_name(name)), META_KEY)
    if text is None:
        return native_names(values, path), None
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"weights {path}: the entry {META_KEY} is not JSON ({e}); save the file again") from None
    return native_names(values, path), _checked_meta(meta, f"weights {path}")


def native_name(name: str) -> str:
    """This project's name of a tensorpack variable: without ":0", group norms inside their convolution's scope."""
    name = name.removesuffix(":0")
    for pattern, replacement in TENSORPACK_NORMS:
        name = pattern.sub(replacement, name)
    return name


def native_names(values: dict[str, np.ndarray], origin: str | os.PathLike) -> dict[str, np.ndarray]:
    """The same arrays under this project's names."""
    named: dict[str, np.ndarray] = {}
    for old, value in values.items():
        name = native_name(old)
        if name in named:
            raise UserError(f"{origin} holds the variable {name} twice; remove one of them")
        named[name] = value
    return named


def stored_step(weights: Mapping[str, np.ndarray], origin: str | os.PathLike) -> int:
    """The step at which a run saved these weights."""
    step = weights.get("global_step")
    if step is None or step.shape != () or step.dtype.kind not in "iu" or not 0 <= step < 1 << 53:
        raise UserError(f"{origin} says no step of a training run (global_step); start from its weights with --load")
    return int(step)


def read_checkpoint_meta(prefix: str) -> dict[str, Any] | None:
    path = f"{prefix}.meta.json"
    return read_description(path) if os.path.exists(path) else None


def read_description(path: str | os.PathLike) -> dict[str, Any]:
    """The meta written by `write_checkpoint_meta`, or as settings.json of a run."""
    check_regular(path)
    if os.path.getsize(path) > _MAX_DESCRIPTION:
        raise UserError(f"description {path} has {os.path.getsize(path) >> 20} MB, which no run writes; copy it again")
    return _checked_meta(read_json(path, "description"), f"description {path}")


def _checked_meta(meta: Any, origin: str) -> dict[str, Any]:
    """The meta without null entries; UserError if an entry is not of the form that `make_meta` and a run write."""
    if not isinstance(meta, dict):
        raise UserError(f"{origin}: it must be a JSON object, not {type(meta).__name__}; copy it again")

    def is_list(value: Any, *types: type) -> bool:
        return isinstance(value, list) and all(type(v) in types for v in value)

    def is_pairing(value: Any) -> bool:
        return is_list(value, int) and all(0 <= v < len(value) and value[v] == i for i, v in enumerate(value))

    def is_scores(value: Any) -> bool:
        if (
            not isinstance(value, dict)
            or type(value.get("step")) is not int
            or not isinstance(value.get("metrics"), dict)
        ):
            return False
        return is_list([*value["metrics"].values()], int, float, type(None))

    meta = {key: value for key, value in meta.items() if value is not None}
    if isinstance(meta.get("smooth"), dict):  # a value that was not finite is stored as null
        meta["smooth"] = {key: value for key, value in meta["smooth"].items() if value is not None}

    def is_incidents(value: Any) -> bool:
        if not isinstance(value, dict) or not is_list(value.get("skipped", []), dict):
            return False
        steps = all(type(s.get("step")) is int and type(s.get("what")) is str for s in value.get("skipped", []))
        return steps and is_list(value.get("norms", []), int, float)

    wants = {
        "settings": ("an object of settings", lambda v: isinstance(v, dict)),
        "class_names": ("a list of texts", lambda v: is_list(v, str)),
        "category_ids": ("a list of numbers or texts", lambda v: is_list(v, int, str)),
        "keypoint_flip": ("a list of the keypoints' partners", is_pairing),
        "step": ("a number of steps", lambda v: type(v) is int and v >= 0),
        "total_batch": ("a number of images", lambda v: type(v) is int and v >= 1),
        "data": ("an object of digests", lambda v: isinstance(v, dict)),
        "smooth": ("an object of numbers", lambda v: isinstance(v, dict) and is_list([*v.values()], int, float)),
        "incidents": ("an object of the steps that were skipped", is_incidents),
        "versions": ("an object of versions", lambda v: isinstance(v, dict)),
        "evaluations": ("a list of steps with their metrics", lambda v: isinstance(v, list) and all(map(is_scores, v))),
        "pending_evaluations": ("a list of steps", lambda v: is_list(v, int)),
        "stopped": ("an object", lambda v: isinstance(v, dict)),
    }
    for key, (what, test) in wants.items():
        if key in meta and not test(meta[key]):
            shown = repr(meta[key]) if len(repr(meta[key])) < 60 else f"{repr(meta[key])[:57]}..."
            raise UserError(f"{origin}: {key} must be {what}, not {shown}; remove it or copy the file again")
    return meta


def _checkpoint_prefix(path: Path) -> str:
    return re.sub(r"\.(index|meta|meta\.json|data-\d{5}-of-\d{5})$", "", str(path))


def _step_of(prefix: str) -> int:
    match = re.search(r"-(\d+)$", prefix)
    return int(match.group(1)) if match else -1


def _what_is_there(path: Path) -> str:
    """'; found …' with checkpoints or .npz files near a path that does not exist, or ''."""
    directory = path if path.is_dir() else path.parent
    near = [Path(p).name for p in _candidates(directory)]
    near += ["best"] if (directory / BEST / "checkpoint").is_file() else []
    near += sorted(p.name for p in directory.glob("*.npz"))
    return f"; {directory} has {', '.join(near[:5])}{' …' if len(near) > 5 else ''}" if near else ""


# ---------------------------------------------------------------------------------------------------------- writing
def make_meta(settings: Mapping[str, Any], class_names: Iterable[str], step: int) -> dict[str, Any]:
    """The meta of a file written now: `settings` is the flat form of a Config (`cfg.to_dict()`)."""
    return {
        "settings": dict(settings),
        "class_names": list(class_names),
        "step": int(step),
        "versions": {
            "packrcnn": project_version(),
            "tensorflow": _package_version("tensorflow"),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "git_revision": git_revision(),
    }


def _package_version(*names: str) -> str:
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "unknown"


def save_npz(path: str | os.PathLike, variables: Mapping[str, np.ndarray], meta: Mapping[str, Any] | None) -> None:
    """Writes the native .npz: one array per variable, the meta as a JSON string under `__meta__`."""
    entries = {name: np.asarray(value) for name, value in variables.items()}
    if meta is not None:
        entries[META_KEY] = np.array(json.dumps(meta))
    with atomic_write(path, "wb") as f:
        np.savez(f, **entries)


def write_checkpoint_meta(prefix: str, meta: Mapping[str, Any]) -> None:
    write_json(f"{prefix}.meta.json", meta, indent=1)


def checkpoint_writer(variables: Iterable[Any]) -> Callable[[Any, str], None]:
    """Adds to the default graph what writes the variables; write(sess, prefix) writes them as a checkpoint of
    TensorFlow, at once and without parts.

    It is one operation. tf.train.Saver makes two for each variable, and one more for a restoration that nobody asks
    for."""
    from utils.tf_v1 import snapshot, tf

    values = {v.op.name: snapshot(v) for v in sorted(variables, key=lambda v: v.op.name)}
    with tf.device("/cpu:0"):
        prefix = tf.placeholder(tf.string, [], "checkpoint_prefix")
        save = tf.raw_ops.SaveV2(
            prefix=prefix, tensor_names=list(values), shape_and_slices=[""] * len(values), tensors=[*values.values()]
        )
    return lambda sess, path: sess.run(save, {prefix: path})


def save_tf_checkpoint(
    write: Callable[[Any, str], None],
    sess: Any,
    logdir: str | os.PathLike,
    step: int,
    meta: Mapping[str, Any],
    keep: int = 10,
    in_use: Iterable[int] = (),
) -> str:
    """Saves `logdir/model-<step>` with `write` (a checkpoint_writer), keeps the newest `keep` and those of the steps
    `in_use`, returns the prefix.

    A process killed at any moment leaves the previous checkpoint complete and named by the state file: TensorFlow
    writes into the hidden folder `.saving`, the finished files are flushed to disk and renamed (data before index, so
    that an index never precedes its data), then the state file `checkpoint` is replaced, and only then are old
    checkpoints deleted. A .saving folder of a killed process is removed by the next save.
    """
    logdir = Path(logdir)
    staging = logdir / ".saving"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    prefix = logdir / f"model-{int(step)}"
    try:
        write(sess, str(staging / prefix.name))
        _check_saved(str(staging / prefix.name), str(prefix))
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    write_checkpoint_meta(str(prefix), meta)
    # ".data-…" sorts before ".index".
    for staged in sorted(staging.iterdir()):
        with open(staged, "rb") as f:
            os.fsync(f.fileno())
        os.replace(staged, logdir / staged.name)
    staging.rmdir()

    own = sorted((str(p)[: -len(".index")] for p in logdir.glob("model-*.index")), key=_step_of)
    # Checkpoints of later steps are from before a run was continued at an earlier step; they are never deleted here.
    history = [p for p in own if _step_of(p) <= step]
    kept = [p for p in history[:-keep] if _step_of(p) in set(in_use)] + history[-keep:] if keep > 0 else history
    with atomic_write(logdir / "checkpoint") as f:
        f.write(f'model_checkpoint_path: "{prefix.name}"\n')
        f.writelines(f'all_model_checkpoint_paths: "{Path(p).name}"\n' for p in kept)
    for old in history:
        if old not in kept:
            _delete_checkpoint(old)
    return str(prefix)


def update_description(prefix: str | os.PathLike, entries: Mapping[str, Any]) -> None:
    """Changes entries of a checkpoint's description, if it has one; None removes an entry."""
    if os.path.exists(f"{prefix}.meta.json"):
        meta = {**read_description(f"{prefix}.meta.json"), **entries}
        write_checkpoint_meta(str(prefix), {key: value for key, value in meta.items() if value is not None})


def keep_best(
    logdir: str | os.PathLike, step: int | None, score: Mapping[str, Any], others: Iterable[int] = ()
) -> bool:
    """Makes the checkpoint of `step` the one that `logdir/model-best` gives, with its score in best.json; None: there
    is no best one. Returns whether the checkpoint is there.

    The folder holds hard links (copies on file systems without them), so it outlasts the run's own checkpoints. Its
    state file is replaced once all files are in place, so a kill at any moment leaves it naming a complete
    checkpoint. Checkpoints of the steps `others` stay in the folder too.
    """
    logdir, folder = Path(logdir), Path(logdir) / BEST
    if step is None:
        for name in ("checkpoint", "best.json"):
            (folder / name).unlink(missing_ok=True)
        return True
    folder.mkdir(exist_ok=True)
    source, target = logdir / f"model-{step}", folder / f"model-{step}"
    if os.path.exists(f"{source}.index") and not _same_file(f"{source}.index", f"{target}.index"):
        _delete_checkpoint(str(target))
        data = [str(p) for p in logdir.glob(f"{source.name}.data-*-of-*")]
        for path in [*data, f"{source}.index"]:
            _link(path, folder / Path(path).name)
    if not os.path.exists(f"{target}.index"):
        return False
    if os.path.exists(f"{source}.meta.json"):
        write_checkpoint_meta(str(target), read_description(f"{source}.meta.json"))
    write_json(folder / "best.json", {**score, "step": step}, indent=1)
    with atomic_write(folder / "checkpoint") as f:
        f.write(f'model_checkpoint_path: "{target.name}"\n')
    kept = {step, *others}
    for index in folder.glob("model-*.index"):
        if _step_of(str(index)[: -len(".index")]) not in kept:
            _delete_checkpoint(str(index)[: -len(".index")])
    return True


def _same_file(a: str, b: str) -> bool:
    return os.path.exists(b) and os.path.samefile(a, b)


def _link(source: str, target: Path) -> None:
    """A hard link, or a copy where there are none; a complete file in place of what is there."""
    temporary = target.with_name(f".{target.name}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
    os.replace(temporary, target)


def _check_saved(staged: str, prefix: str) -> None:
    """Reads a checkpoint back, with its checksums, before it becomes the newest one.

    FloatingPointError if a value in it is not finite, so that training can always continue from the newest
    checkpoint."""
    from utils.tf_v1 import tf

    reader = tf.train.load_checkpoint(staged)
    bad = []
    for name in sorted(reader.get_variable_to_shape_map()):
        value = reader.get_tensor(name)
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
            bad.append(name)
    if bad:
        more = f" and {len(bad) - 1} more variables" if len(bad) > 1 else ""
        raise FloatingPointError(
            f"{bad[0]}{more} became infinite or NaN before {Path(prefix).name}, which is not saved. Continue from the "
            "newest checkpoint with a lower TRAIN.BASE_LR, a longer TRAIN.WARMUP or TRAIN.GRADIENT_CLIP"
        )


def _delete_checkpoint(prefix: str) -> None:
    """Deletes the index first: without it, the other files are not recognised as a checkpoint."""
    directory, name = os.path.split(prefix)
    data = [str(p) for p in Path(directory or ".").glob(f"{name}.data-*-of-*")]
    for path in [f"{prefix}.index", *data, f"{prefix}.meta", f"{prefix}.meta.json"]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


# --------------------------------------------------------------------------------------------------------- matching
def is_training_state(name: str) -> bool:
    """True for variables of a run (step, rates, optimizer slots, averages), False for those of a model."""
    return _TRAINING_STATE.search(name) is not None


def is_model_tensor(name: str) -> bool:
    """True for a model's variables and their moving averages, which are needed to start training from it or to run
    it."""
    return name.startswith(AVERAGE_PREFIX) or not is_training_state(name)


def match_weights(
    variables: Mapping[str, tuple[int, ...]], weights: Mapping[str, Any], expect: str = "all", origin: str = "weights"
) -> "LoadReport":
    """Compares the graph's `variables` {name: shape} with `weights` {name: array or shape}.

    expect: "all" (a trained detector), or "backbone": only conv0, group* and backbone are looked for, everything else
    of the graph starts from its initialiser. `origin` names the file in messages.
    """
    if expect not in ("all", "backbone"):
        raise ValueError(f"expect={expect!r}")
    report = LoadReport(expect=expect, origin=str(origin))
    for name, shape in variables.items():
        want = tuple(int(d) for d in shape)
        if expect == "backbone" and not _BACKBONE.match(name):
            continue
        if name not in weights:
            (report.missing_state if is_training_state(name) else report.missing).append(name)
            continue
        got = tuple(np.shape(weights[name])) if not isinstance(weights[name], tuple) else weights[name]
        if got == want:
            report.loaded.append(name)
        elif is_training_state(name):
            report.missing_state.append(name)
        else:
            report.mismatched.append((name, want, got))
    used = {*report.loaded, *(name for name, _, _ in report.mismatched)}
    for name in weights:
        if name not in used:
            (report.unused_state if is_training_state(name) else report.unused).append(name)
    return report


def fit_weights(
    weights: Mapping[str, np.ndarray],
    variables: Mapping[str, tuple[int, ...]],
    trim: bool = True,
    expect: str = "all",
    origin: str = "weights",
) -> tuple[dict[str, np.ndarray], "LoadReport"]:
    """The weights that fit the graph, and the report, for fine-tuning on a data set with other classes.

    With `trim`, a tensor whose shape depends on the number of classes (or keypoints) and differs keeps the graph's
    initial value and is listed in `report.reinitialised`; its optimizer slots are left out too. Other mismatches are
    kept in the report.
    """
    report = match_weights(variables, weights, expect, origin)
    if trim:
        report.reinitialised = [entry for entry in report.mismatched if _CLASS_TENSOR.match(entry[0])]
        report.mismatched = [entry for entry in report.mismatched if not _CLASS_TENSOR.match(entry[0])]
    return {name: np.asarray(weights[name]) for name in report.loaded}, report


@dataclass
class LoadReport:
    """The result for each tensor. Shapes are (want: the graph's, got: the file's)."""

    expect: str = "all"
    origin: str = "weights"
    loaded: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple, tuple]] = field(default_factory=list)
    reinitialised: list[tuple[str, tuple, tuple]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # in the graph, not in the file
    unused: list[str] = field(default_factory=list)  # in the file, not in the graph
    missing_state: list[str] = field(default_factory=list)  # optimizer slots and the like: never a problem
    unused_state: list[str] = field(default_factory=list)

    def table(self) -> str:
        """A table of tensor groups by result, then one line per tensor with a different shape."""
        rows = []
        for label, color, names in (
            ("loaded", "green", self.loaded),
            ("re-initialised", "yellow", [n for n, _, _ in self.reinitialised]),
            ("shape differs", "red", [n for n, _, _ in self.mismatched]),
            ("missing from the file", "red", self.missing),
            ("unused", "yellow", self._notable_unused()),
        ):
            rows += [[colored(label, color), group, count] for group, count in _grouped(names)]
        state = len(self.unused_state)
        if state:
            rows.append(["not a model's", "steps, rates, optimizer slots, averages", state])
        text = tabulate(rows, headers=["", "tensors", "count"], tablefmt="simple")
        lines = [
            f"  {colored(verb, color)} {name}: the graph wants {list(want)}, the file has {list(got)}"
            for verb, color, entries in (
                ("re-initialised", "yellow", self.reinitialised), ("differs", "red", self.mismatched)
            )
            for name, want, got in entries
        ]  # fmt: skip
        return "\n".join([text, *lines])

    def check(self, allow_partial: bool = False) -> "LoadReport":
        """Raises UserError if a tensor is missing or has another shape, or if the model does not use a part of the
        file's backbone. With `allow_partial` it is an error only if no tensor fits. Returns the report.
        """
        if not self.loaded:
            raise UserError(
                f"{self.origin}: none of its {len(self.unused) + len(self.mismatched)} tensors fits this model; "
                "if another system wrote it, run tools/convert.py on it first"
            )
        if allow_partial:
            return self
        way_out = "or load what fits with --partial-load"
        if self.mismatched:
            name, want, got = self.mismatched[0]
            more = f" and {len(self.mismatched) - 1} more differ" if len(self.mismatched) > 1 else ""
            raise UserError(
                f"{self.origin}: {name} has shape {list(got)}, this model wants {list(want)}{more}; "
                f"{self._hint() or 'use the settings the weights were trained with'} {way_out}"
            )
        stray = [name for name in self.unused if _BACKBONE.match(name)]
        problem = ""
        if self.missing:
            problem = f"does not contain {_tensors(self.missing)} of this model, e.g. {self.missing[0]}"
        elif stray:
            problem = f"contains {_tensors(stray)} this model does not use, e.g. {stray[0]}"
        if problem:
            hint = self._hint() or "use the settings the weights were trained with"
            raise UserError(f"{self.origin} {problem}; {hint} {way_out}")
        return self

    def _notable_unused(self) -> list[str]:
        return self.unused if self.expect == "all" else [n for n in self.unused if _BACKBONE.match(n)]

    def _hint(self) -> str:
        """The setting that most likely explains the difference, or ''."""

        def any_of(names: Iterable[str], test: Callable[[str], Any]) -> bool:
            return any(test(n) for n in names)

        mismatched = [n for n, _, _ in self.mismatched]
        norms = {"/gn/": "GN", "/bn/": "FreezeBN"}
        for part, value in norms.items():
            with_part = [n for n in self.unused if _BACKBONE.match(n) and part in n]
            if with_part and any(_BACKBONE.match(n) and part not in n for n in self.missing):
                return f"set BACKBONE.NORM={value}"
        masks = [(want[-1], got[-1]) for name, want, got in self.mismatched if name.startswith("maskrcnn/conv/")]
        if len(masks) == len(mismatched) > 0 and any(1 in pair for pair in masks):
            return f"set MRCNN.CLASS_AGNOSTIC={masks[0][1] == 1}"
        if any_of(mismatched, _CLASS_TENSOR.match) and not any_of(mismatched, lambda n: not _CLASS_TENSOR.match(n)):
            return "the number of classes differs: --trim-heads re-initialises those tensors,"
        if mismatched and all(re.search(r"(^fastrcnn|/head)/fc6?/W$", n) for n in mismatched):
            return "set FRCNN.ROI_SIZE to the size of RoIs the weights were trained with (7 in most models)"
        if any_of(self.unused, re.compile(r"^group\d/block\d+/conv3/").match) and not any_of(
            [*self.loaded, *self.missing, *mismatched], re.compile(r"^group\d/block\d+/conv3/").match
        ):
            return "set BACKBONE.BLOCK=bottleneck"
        if any_of(self.missing, re.compile(r"^group0/block0/conv3/").match):
            return "set BACKBONE.BLOCK=basic"
        if any_of(self.missing + self.unused, re.compile(r"^group\d/block\d+/").match):
            blocks: dict[int, int] = {}
            for name in [*self.loaded, *self.unused, *mismatched]:
                match = re.match(r"group(\d)/block(\d+)/", name)
                if match:
                    group = int(match.group(1))
                    blocks[group] = max(blocks.get(group, 0), int(match.group(2)) + 1)
            if sorted(blocks) == [0, 1, 2, 3]:
                return f"set BACKBONE.RESNET_NUM_BLOCK={[blocks[g] for g in range(4)]}".replace(" ", "")
        for prefix, setting in (
            ("fpn/", "MODE_FPN"), ("maskrcnn/", "MODE_MASK"), ("cascade_", "FPN.CASCADE"), ("keypoint", "MODE_KEYPOINT")
        ):  # fmt: skip
            if any(n.startswith(prefix) for n in self.missing):
                return f"set {setting}=False"
            if any(n.startswith(prefix) for n in self.unused):
                return f"set {setting}=True"
        return ""


def _tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)}"


def _grouped(names: Iterable[str]) -> list[tuple[str, int]]:
    """[(group of names, count)] by the first part of the name (group0, fpn, rpn), in order of appearance."""
    counts: dict[str, list[str]] = {}
    for name in names:
        counts.setdefault(name.split("/", 1)[0], []).append(name)
    return [(g if len(members) > 3 else ", ".join(members), len(members)) for g, members in counts.items()]


# --------------------------------------------------------------------------------------------------------- averages
def without_averages(weights: Mapping[str, np.ndarray], use: bool) -> tuple[dict[str, np.ndarray], int]:
    """The weights without moving averages (TRAIN.EMA_DECAY), and the number of averages found. If `use`, the averages
    replace the weights.

    Other variables under `EMA/`, such as tensorpack's averages of summaries, stay unchanged.
    """
    averages = {n: weights[AVERAGE_PREFIX + n] for n in weights if AVERAGE_PREFIX + n in weights}
    kept = {n: v for n, v in weights.items() if n.removeprefix(AVERAGE_PREFIX) not in averages or n in averages}
    return kept | averages if use else kept, len(averages)


def start_averages(sess: Any, loaded: Iterable[str] = ()) -> None:
    """Sets moving averages in the session's graph that were not loaded to the current weights."""
    from utils.tf_v1 import tf

    with sess.graph.as_default():
        variables = {v.op.name: v for v in tf.global_variables()}
    pairs = {AVERAGE_PREFIX + n: v for n, v in variables.items() if AVERAGE_PREFIX + n in variables}
    assign_weights(sess, sess.run({n: v for n, v in pairs.items() if n not in set(loaded)}), variables.values())


# -------------------------------------------------------------------------------------------------------- restoring
def assign_weights(sess: Any, values: Mapping[str, np.ndarray], variables: Iterable[Any] | None = None) -> int:
    """Sets the variables named in `values` (default: among all of the session's graph); returns how many were set.

    It feeds values to the variables' initialisers, so it adds nothing to the graph (which may be finalized) and sets
    all variables in one run. Values are cast to the variable's dtype; another shape is an error.
    """
    from utils.tf_v1 import tf

    if variables is None:
        with sess.graph.as_default():
            variables = tf.global_variables()
    rounds: list[dict] = []  # each {tensor of an initial value: (initialiser, value)}
    count = 0
    for variable in variables:
        name = variable.op.name
        if name not in values:
            continue
        value = np.asarray(values[name])
        if value.shape != tuple(variable.shape.as_list()):
            raise UserError(f"{name} has shape {list(value.shape)}, the graph wants {variable.shape.as_list()}")
        value = value.astype(variable.dtype.base_dtype.as_numpy_dtype, copy=False)
        source = variable.initializer.inputs[1].ref()
        # Two variables may share the tensor of their initial value; then they need separate runs.
        free = next((r for r in rounds if source not in r), None)
        if free is None:
            free = {}
            rounds.append(free)
        free[source] = (variable.initializer, value)
        count += 1
    for entries in rounds:
        sess.run([op for op, _ in entries.values()], {source.deref(): value for source, (_, value) in entries.items()})
    return count
