"""PackRCNN's side of peers.py, which starts it: python benchmarks/peers_packrcnn.py JOB.json

Prepares the work that JOB names, announces it by a line of JSON, and does it once for each line of standard input; the
answer to a line is the seconds it took, to the end of the input the peak memory of this process.
"""

import import_path

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import detections
from benchmarks.peers_side import serve
from config import Config, default_config, finalize_config
from data import stack_images
from data_workers import training_dataflow
from dataset import load_training_split
from eval import evaluate_coco

Prepared = tuple[Callable[[], Any], dict[str, Any]]


def settings(job: dict[str, Any]) -> list[str]:
    model = job["model"]
    return [
        "MODE_FPN=True", f"MODE_MASK={model['masks']}", f"DATA.NUM_CATEGORY={model['classes']}",
        f"BACKBONE.FREEZE_AT={model['freeze_at']}", "BACKBONE.FREEZE_AFFINE=True", "TRAIN.WEIGHT_DECAY_BIAS=None",
        f"RPN.ANCHOR_SIZES={model['anchor_sizes']}", f"FRCNN.BATCH_PER_IM={model['rois']}",
        f"RPN.TRAIN_FPN_NMS_TOPK={model['proposals']}", f"PREPROC.SHORT_EDGE_SIZE={[model['short_edge']] * 2}",
        f"PREPROC.TEST_SHORT_EDGE_SIZE={model['short_edge']}", f"PREPROC.MAX_SIZE={model['max_size']}",
        f"TRAIN.PRECISION={job['precision']}", "TRAIN.SEED=1", "DATA.NUM_WORKERS=0",
    ]  # fmt: skip


def configuration(job: dict[str, Any], *more: str) -> Config:
    return finalize_config(default_config().update_args([*settings(job), *more]))


def prepare_step(job: dict[str, Any]) -> Prepared:
    """A training step on the batch of job["batch"]."""
    from benchmarks.train_speed import training_step
    from utils.tf_v1 import tf

    with np.load(job["batch"]) as content:
        batch = {key: content[key] for key in content.files}
    pairs, update, _ = training_step(settings(job), batch)
    session = tf.Session()
    session.run(tf.global_variables_initializer())
    return lambda: session.run(update), {"parameters": sum(v.shape.num_elements() for _, v in pairs)}


def prepare_predict(job: dict[str, Any]) -> Prepared:
    """A prediction of the images of job["batch"], with masks of the images' size. Scores of random weights are alike:
    with larger weights of the classes there are 100 objects."""
    from predict import build_predictor
    from utils.tf_v1 import tf

    with np.load(job["batch"]) as content:
        images = content["image"]
    cfg = configuration(job)

    def load(session: Any) -> None:
        with session.graph.as_default():
            session.run(tf.global_variables_initializer())
            for variable in tf.global_variables():
                if variable.op.name.endswith("class/W") and "rpn" not in variable.op.name:
                    variable.load(30 * session.run(variable), session)

    predict = build_predictor(cfg, load)

    def unit() -> list:
        batch, shapes = stack_images(list(images), cfg)
        found = predict(batch, shapes)
        each = [{key: value[i] for key, value in found.items()} for i in range(len(images))]
        return [detections.to_original_frame(one, s, s) for one, s in zip(each, shapes)]

    return unit, {"objects": [len(one.scores) for one in unit()]}


def prepare_data(job: dict[str, Any]) -> Prepared:
    """Reads all images once, each a batch ready for the graph."""
    annotations = Path(job["annotations"])
    folder = annotations.parent.parent
    images = Path(job["images"][job["annotations"]]).relative_to(folder)
    sets = {"train": [str(annotations.relative_to(folder)), str(images)]}
    cfg = configuration(job, f"DATA.BASEDIR={folder}", f"DATA.DATASETS={sets}", "DATA.TRAIN=train", "DATA.VAL=[]")
    flow = training_dataflow(load_training_split(cfg), cfg)
    flow.reset_state()
    batches: Iterator = iter(flow)
    return lambda: [next(batches) for _ in range(flow.images_per_epoch)], {"images": flow.images_per_epoch}


def prepare_score(job: dict[str, Any]) -> Prepared:
    """COCO's scores of a results file."""

    def score() -> None:
        results = json.loads(Path(job["results"]).read_text())
        evaluate_coco(job["annotations"], results, ["bbox", "segm"], verbose=False)

    return score, {}


WORKS = {"step": prepare_step, "predict": prepare_predict, "data": prepare_data, "score": prepare_score}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    serve(*WORKS[job["work"]](job))


if __name__ == "__main__":
    main()
