"""./train.py --replay LOGDIR/incident-STEP: repeats a recorded step and says where its bad number comes from.

Nothing of the run is touched, and its data are not needed. docs/INCIDENTS.md.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import logger
from incident_files import Incident, Part, read_incident, with_pasted

__all__ = ["replay"]


def replay(folder: Path, arguments: Sequence[str] = (), trusted: Sequence[str] = ()) -> int:
    """Prints what happened in a recorded step; returns 0 if it happens again, else 1.

    arguments: KEY=VAL settings that replace recorded ones; trusted: modules that recorded settings may name.
    """
    # On the CPU, where every kernel is deterministic.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    incident = read_incident(folder, arguments, trusted)
    print(f"incident: {incident.what} at step {incident.step}")
    for part in [p for p in incident.parts if p.is_bad] or incident.parts:
        print(f"  {_whose(part)}: {', '.join(_named(i) for i in with_pasted(part.images))}")
    if any(":" in incident.cfg.get(key) for key in ("BACKBONE.NAME", "FPN.FRCNN_HEAD_FUNC", "FPN.MRCNN_HEAD_FUNC")):
        from model_rcnn import check_own_parts

        check_own_parts(incident.cfg)

    from replay_graph import repeat_step
    from training_guard import BAD_WEIGHT, GOOD, LARGE_GRADIENT

    logger.info("building the graph")
    again = repeat_step(incident)
    if again.verdict is None:
        kept = f"{len(again.parts)} of its {len(incident.parts)} batches"
        print(f"only {kept} were kept, so each of them is computed alone and not the whole step")
        happened = any(p.is_bad for p in again.parts)
    else:
        happened = again.verdict != GOOD
        _compare("the step", _flat(incident.values), _flat(again.values))
    before = {(p.micro, p.replica): p for p in incident.parts}
    for part in again.parts:
        recorded = before[part.micro, part.replica]
        _compare(_whose(part), {**recorded.losses, **recorded.norms}, {**part.losses, **part.norms})
    if not happened:
        print("it does not happen again: every number is finite")
        return 1
    if again.finding is not None:
        _print_finding(incident, again.finding)
    elif again.weights:
        more = f" and {len(again.weights) - 1} more" if len(again.weights) > 1 else ""
        rate, norm = incident.rate, incident.values["gradient_norm"]
        print(
            f"the update would make {again.weights[0]}{more} infinite or NaN: learning rate {rate:.6g}, gradient norm "
            f"{norm:.6g}, its own {incident.values['gradient_norms'].get(again.weights[0], math.nan):.6g}"
        )
    elif incident.verdict == BAD_WEIGHT:
        print(
            "no weight becomes infinite or NaN, but bounds from norms do not exclude it. The update is far too large: "
            f"learning rate {incident.rate:.6g}, gradient norm {incident.values['gradient_norm']:.6g}"
        )
    elif incident.verdict == LARGE_GRADIENT:
        _print_shares(again.values["gradient_norms"] if again.values else {}, again.parts)
    else:
        print("every part of the step is finite by itself: it is the sum of their gradients that is not")
    return 0


def _whose(part: Part) -> str:
    return f"micro-batch {part.micro}, replica {part.replica} (rank {part.rank})"


def _named(image: dict[str, Any]) -> str:
    return f"image {image.get('id')!r} ({image.get('file')})"


def _flat(values: dict[str, Any]) -> dict[str, float]:
    losses = {f"{k} of replica {i}": v for i, own in enumerate(values["losses"]) for k, v in own.items()}
    norms = {f"norm of {k}": v for k, v in values["gradient_norms"].items()}
    return {"gradient_norm": values["gradient_norm"], **losses, **norms}


def _compare(what: str, recorded: dict[str, float], now: dict[str, float]) -> None:
    """Prints how the recorded numbers and those of now differ."""

    def same(a: float, b: float) -> bool:
        return a == b or (math.isnan(a) and math.isnan(b))

    both = [k for k in recorded if k in now]
    other = [k for k in both if not same(recorded[k], now[k])]
    if not other:
        print(f"{what}: all {len(both)} numbers are equal to the recorded ones to the bit")
        return
    finite = [k for k in other if math.isfinite(recorded[k]) and math.isfinite(now[k])]
    worst = max((abs(now[k] - recorded[k]) / max(abs(recorded[k]), 1e-30) for k in finite), default=0.0)
    first = other[0]
    print(
        f"{what}: {len(other)} of {len(both)} numbers differ from the recorded ones, by {worst:.2g} of their size at "
        f"most; {first} was {recorded[first]} and is {now[first]}"
    )


def _print_finding(incident: Incident, finding: Any) -> None:
    part, operation = finding.part, finding.operation
    more = f" and {len(finding.what) - 1} more" if len(finding.what) > 1 else ""
    print(f"not finite: {finding.what[0]}{more} of {_whose(part)}")
    if operation is None:
        print("  no operation before it made a value that is not finite; looking at them changes rounding")
    elif not operation.inputs and operation.kind in ("QueueDequeueV2", "FIFOQueueDequeue", "Placeholder"):
        print(f"  the batch itself is not finite: {operation.output}, first at {list(operation.place)}")
    else:
        print(f"first operation: {operation.name} ({operation.kind}) in {operation.layer}, {operation.source}")
        for given in operation.inputs:
            print(f"  input  {given}")
        print(f"  output {operation.output}")
        if operation.place:
            there = ", ".join(f"{v:.6g}" for v in operation.values_there)
            print(f"  first at {list(operation.place)}: {there}")
    _print_blame(incident, finding)


def _print_blame(incident: Incident, finding: Any) -> None:
    part = finding.part
    names = incident.cfg.DATA.CLASS_NAMES
    if finding.blame == "annotations":
        image = part.images[finding.image]
        batch = part.batch or {}
        print(f"it comes from {_named(image)}: without {_these(finding.annotations)} everything is finite")
        if len(finding.annotations) > 1:
            print("no single one of them is the cause, so it is probably the weights: the run may have diverged before")
        for k in finding.annotations[:5]:
            label = int(batch["gt_labels"][finding.image, k])
            name = names[label - 1] if 1 <= label <= len(names) else f"class {label}"
            box = ", ".join(f"{v:.6g}" for v in batch["gt_boxes"][finding.image, k].tolist())
            print(f"  number {k} of the batch, {name}: box {box}")
    elif finding.blame == "pixels":
        print("it comes from the pixels: it is so without any annotation, and not with a grey picture")
    elif finding.blame == "weights":
        print("it comes from the weights: it is so with a grey picture without annotations too")
    else:
        print("it comes from the annotations of several images together")


def _these(annotations: Sequence[int]) -> str:
    return "this annotation" if len(annotations) == 1 else f"these {len(annotations)} annotations"


def _print_shares(norms: dict[str, float], parts: Sequence[Part]) -> None:
    largest = sorted(norms.items(), key=lambda item: -item[1])[:5]
    print("the largest gradients: " + ", ".join(f"{name} {norm:.6g}" for name, norm in largest))
    for part in sorted(parts, key=lambda p: -_norm(p))[:3]:
        print(f"  {_whose(part)} has a gradient of {_norm(part):.6g}: {', '.join(_named(i) for i in part.images)}")


def _norm(part: Part) -> float:
    return math.sqrt(sum(v * v for v in part.norms.values()))
