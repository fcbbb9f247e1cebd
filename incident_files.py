"""The folder of an incident, `LOGDIR/incident-STEP`: what a step that is not finite leaves behind (docs/INCIDENTS.md).

Numbers in incident.json that are not finite are the texts "nan", "inf" and "-inf".
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from batch_pictures import draw_batch
from common import UserError
from config import Config, default_config, finalize_config
from trust import check_trust
from utils.checkpoint import load_npz, read_description, save_npz
from utils.weight_files import read_npz

__all__ = ["DESCRIPTION_FILE", "Incident", "Part", "numbers", "read_incident", "with_pasted", "write_incident"]

DESCRIPTION_FILE, BATCH_FILE, STATE_FILE, PICTURES = "incident.json", "batch.npz", "state.npz", "pictures"
MOST_PICTURES = 32


@dataclasses.dataclass
class Part:
    """A batch of a step: that of one replica in one micro-batch."""

    micro: int  # 0 to accumulation - 1
    replica: int  # among those of all ranks
    rank: int
    images: list[dict[str, Any]]  # {id, file} of each image, and pasted: that of the one its objects come from
    batch: dict[str, np.ndarray] | None = None  # {key of data.training_keys: array}; None: not kept
    losses: dict[str, float] = dataclasses.field(default_factory=dict)
    norms: dict[str, float] = dataclasses.field(default_factory=dict)  # of its gradients, by variable

    @property
    def is_bad(self) -> bool:
        return not all(map(math.isfinite, [*self.losses.values(), *self.norms.values()]))


class Incident(NamedTuple):
    """An incident as its folder describes it."""

    folder: Path
    cfg: Config
    parts: list[Part]
    state: dict[str, np.ndarray]  # the variables before the step
    verdict: int  # see training_guard.py
    what: str
    step: int
    values: dict[str, Any]  # gradient_norm, gradient_norms {variable: norm}, losses: [{name: value} of each replica]
    rate: float
    limit: float  # of the gradient norm
    bounds: list[float]  # of absolute values of weights and momentum
    plan: dict[str, Any]  # the fields of a TrainingPlan


# ------------------------------------------------------------------------------------------------- writing
def write_incident(
    folder: Path, description: Mapping[str, Any], meta: Mapping[str, Any], parts: Sequence[Part],
    state: Mapping[str, np.ndarray], class_names: Sequence[str],
) -> None:  # fmt: skip
    """Writes the folder whole, in place of one of the same step from before the run went back to an earlier one.

    description: what stands in incident.json beside meta and parts; meta: as for the checkpoints of the run.
    """
    content = {
        **meta,
        **description,
        "parts": [
            {
                "micro_batch": p.micro, "replica": p.replica, "rank": p.rank, "images": p.images,
                "kept": p.batch is not None, "losses": numbers(p.losses), "gradient_norms": numbers(p.norms),
            }
            for p in parts
        ],
    }  # fmt: skip
    staging = folder.with_name(f".{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    (staging / PICTURES).mkdir(parents=True)
    try:
        (staging / DESCRIPTION_FILE).write_text(json.dumps(content, indent=1, allow_nan=False))
        batches = {_entry(p, k): v for p in parts if p.batch for k, v in p.batch.items()}
        save_npz(staging / BATCH_FILE, batches, None)
        save_npz(staging / STATE_FILE, state, meta)
        shown = [(p, n) for p in sorted(parts, key=lambda p: not p.is_bad) if p.batch for n in range(len(p.images))]
        for part, n in shown[:MOST_PICTURES]:
            picture = cv2.imencode(".png", draw_batch(part.batch or {}, n, class_names))[1]
            name = f"micro{part.micro}-replica{part.replica}-image{n}.png"
            (staging / PICTURES / name).write_bytes(picture.tobytes())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _entry(part: Part, key: str) -> str:
    """The name of an array in batch.npz."""
    return f"{part.micro}/{part.replica}/{key}"


def numbers(values: Mapping[str, float]) -> dict[str, float | str]:
    """Numbers for JSON, which does not know infinity and NaN."""
    return {k: v if math.isfinite(v) else str(v) for k, v in values.items()}


def with_pasted(images: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """The images, each followed by the one from which objects were pasted into it."""
    for image in images:
        yield image
        if "pasted" in image:
            yield image["pasted"]


# ------------------------------------------------------------------------------------------------- reading
def read_incident(folder: Path, arguments: Sequence[str] = (), trusted: Sequence[str] = ()) -> Incident:
    """The incident of a folder, with its settings changed by KEY=VAL arguments; trusted: modules that they may name.

    Nothing in the folder runs code, and it is read within the limits of docs/SAFETY.md.
    """
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not the folder of an incident: it has no {DESCRIPTION_FILE}")
    found = read_description(path)
    try:
        parts = [
            Part(
                int(p["micro_batch"]), int(p["replica"]), int(p["rank"]), [dict(i) for i in p["images"]], None,
                _floats(p["losses"]), _floats(p["gradient_norms"]),
            )
            for p in found["parts"]
        ]  # fmt: skip
        values = {
            "gradient_norm": float(found["values"]["gradient_norm"]),
            "gradient_norms": _floats(found["values"]["gradient_norms"]),
            "losses": [_floats(losses) for losses in found["values"]["losses"]],
        }
        incident = Incident(
            folder, _settings(found, path, arguments, trusted), parts, {}, int(found["verdict"]), str(found["what"]),
            int(found["step"]), values, float(found["learning_rate"]), float(found["limit"]),
            [float(b) for b in found["bounds"]][:2], dict(found["plan"]),
        )  # fmt: skip
        kept = [bool(p["kept"]) for p in found["parts"]]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise UserError(f"{path} is not as an incident writes it ({type(e).__name__}: {e}); copy it again") from None
    arrays = read_npz(folder / BATCH_FILE)[0]
    for part, is_kept in zip(parts, kept):
        prefix = _entry(part, "")
        batch = {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
        if is_kept and not batch:
            raise UserError(f"{folder / BATCH_FILE} has no batch {prefix[:-1]}; copy it again")
        part.batch = batch or None
    return incident._replace(state=load_npz(folder / STATE_FILE)[0])


def _settings(found: dict[str, Any], path: Path, arguments: Sequence[str], trusted: Sequence[str]) -> Config:
    cfg = default_config().update_from_dict(found["settings"], f"settings stored in {path}").update_args(arguments)
    check_trust(cfg, arguments, str(path), trusted, datasets=())
    return finalize_config(cfg)


def _floats(values: Mapping[str, float | str]) -> dict[str, float]:
    return {str(k): float(v) for k, v in values.items()}
