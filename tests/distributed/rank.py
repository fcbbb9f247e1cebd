"""A rank of the jobs in test_training.py: train.py, after which the test can see what each rank held and read.

    rank.py FOLDER ARGUMENTS OF train.py…      "RANK" in an argument becomes the number of the rank

Writes to FOLDER: pid-R as soon as the rank runs; steps-R, a line for each step it made; with each checkpoint
state-R.npz, all variables of rank R, and images-R.json, the ids of the images in each batch that it has read (with
DATA.NUM_WORKERS=0); found-R-SET.json, what an evaluation on SET found as rank R sees it.

After the steps that FOLDER/hold lists, if it is there, rank 0 waits to be asked to stop.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

import data
import eval
import predict
import train
import training
from utils.tf_v1 import tf

folder, arguments = Path(sys.argv[1]), sys.argv[2:]
rank = os.environ.get("HOROVOD_RANK", "0")
held = (folder / "hold").read_text().split() if (folder / "hold").exists() else []
batches: list[list] = []
make_batch, evaluate_split = data.BatchMaker.make, predict.evaluate_split
save, trigger_step = training.Checkpoints.save, training.Checkpoints._trigger_step


def recorded_batch(self, batch, *args):
    batches.append([self.split.image_id(i) for i in self.members(batch)[0]])
    return make_batch(self, batch, *args)


def recorded_save(self):
    np.savez(folder / f"state-{rank}.npz", **self.trainer.sess.run({v.op.name: v for v in tf.global_variables()}))
    (folder / f"images-{rank}.json").write_text(json.dumps(batches))
    save(self)


def recorded_step(self):
    with open(folder / f"steps-{rank}", "a") as f:
        f.write(f"{self.global_step}\n")
    if rank == "0" and str(self.global_step) in held:
        while self.stop_signal is None:
            time.sleep(0.05)
    trigger_step(self)


def recorded_evaluation(predict, split, *args, **options):
    results = evaluate_split(predict, split, *args, **options)
    eval.write_results(folder / f"found-{rank}-{split.name}.json", results)
    return results


data.BatchMaker.make, training.Checkpoints.save = recorded_batch, recorded_save
training.Checkpoints._trigger_step = recorded_step
predict.evaluate_split = recorded_evaluation
(folder / f".pid-{rank}").write_text(str(os.getpid()))
(folder / f".pid-{rank}").rename(folder / f"pid-{rank}")
sys.exit(train.main([a.replace("RANK", rank) for a in arguments]))
