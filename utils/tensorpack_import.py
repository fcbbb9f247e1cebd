"""The one place that imports tensorpack. Keras stays out: importing it takes long, and tensorpack wants it for one
function that nobody calls here."""

import logging

from utils.tf_v1 import keras_when_called

with keras_when_called("regularizers", "l1"):
    from tensorpack import HorovodTrainer, ModelDesc, QueueInput, SimpleTrainer, SyncMultiGPUTrainerReplicated
    from tensorpack.callbacks import Callback, Callbacks
    from tensorpack.callbacks.steps import MaintainStepCounter
    from tensorpack.dataflow import DataFlow, DataFromList
    from tensorpack.graph_builder.training import SyncMultiGPUReplicatedBuilder
    from tensorpack.graph_builder.utils import merge_grad_list, override_to_local_variable, split_grad_list
    from tensorpack.tfutils import common as graph_functions
    from tensorpack.tfutils import scope_utils, summary
    from tensorpack.tfutils.sessinit import SessionInit
    from tensorpack.tfutils.tower import TowerContext
    from tensorpack.train.base import StopTraining

__all__ = [
    "Callback", "Callbacks", "DataFlow", "DataFromList", "HorovodTrainer", "MaintainStepCounter", "ModelDesc",
    "QueueInput", "SessionInit", "SimpleTrainer", "StopTraining", "SyncMultiGPUReplicatedBuilder",
    "SyncMultiGPUTrainerReplicated", "TowerContext", "graph_functions", "merge_grad_list", "override_to_local_variable",
    "scope_utils", "split_grad_list", "summary",
]  # fmt: skip

# Errors are raised and reported once, by train.py; tensorpack's own report misuses the logging module.
logging.getLogger("tensorpack").setLevel("CRITICAL")
