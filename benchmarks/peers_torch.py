"""The side of torchvision and detectron2 in peers.py and same_budget.py, which start it. Needs torch, torchvision,
NumPy and pycocotools, of this project peers_side.py alone:

    python benchmarks/peers_torch.py JOB.json

JOB names the system, the precision and the work. "train": a whole training and its results file. Everything else is
prepared, announced by a line of JSON, and done once for each line that comes from standard input; the answer to a line
is the seconds it took, to the end of the input the peak memory of this process.
"""

import contextlib
import itertools
import json
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
from peers_side import peak_mib, say, serve
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models import resnet50
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FrozenBatchNorm2d


# ----------------------------------------------------------------------------------------------------------- detectors
def torchvision_detector(model: dict) -> torch.nn.Module:
    norm = {"GN": lambda channels: torch.nn.GroupNorm(32, channels), "FrozenBN": FrozenBatchNorm2d}[model["norm"]]
    backbone = _resnet_fpn_extractor(
        resnet50(norm_layer=norm), 5 - model["freeze_at"], norm_layer=norm if model["norm"] == "GN" else None
    )
    sizes = tuple((size,) for size in model["anchor_sizes"])
    return (MaskRCNN if model["masks"] else FasterRCNN)(
        backbone, model["classes"] + 1, min_size=model["short_edge"], max_size=model["max_size"],
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        rpn_pre_nms_top_n_train=2000, rpn_pre_nms_top_n_test=1000,
        rpn_post_nms_top_n_train=model["proposals"], rpn_post_nms_top_n_test=1000,
        box_batch_size_per_image=model["rois"], box_score_thresh=0.05, box_detections_per_img=100,
    )  # fmt: skip


def import_detectron2() -> None:
    """detectron2 from its sources, which are on the path. Its extension in C++ is of no use to Mask R-CNN on a CPU:
    where it is not built, an empty module takes its place. Names that Pillow has dropped get their new meaning."""
    for old, new in (("LINEAR", "BILINEAR"), ("CUBIC", "BICUBIC"), ("ANTIALIAS", "LANCZOS")):
        if not hasattr(Image, old):
            setattr(Image, old, getattr(Image, new))
    import detectron2

    try:
        import detectron2._C
    except ImportError:
        detectron2._C = sys.modules["detectron2._C"] = types.ModuleType("detectron2._C")


def detectron2_detector(model: dict) -> torch.nn.Module:
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    levels = ["p2", "p3", "p4", "p5", "p6"]
    cfg.merge_from_list([
        "MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.MASK_ON", model["masks"],
        "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", model["freeze_at"],
        "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.RESNETS.NORM", model["norm"],
        "MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.NORM", "GN" if model["norm"] == "GN" else "",
        "MODEL.ANCHOR_GENERATOR.SIZES", [[size] for size in model["anchor_sizes"]],
        "MODEL.RPN.IN_FEATURES", levels, "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 2000, "MODEL.RPN.PRE_NMS_TOPK_TEST", 1000,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN", model["proposals"], "MODEL.RPN.POST_NMS_TOPK_TEST", 1000,
        "MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", levels[:4],
        "MODEL.ROI_HEADS.NUM_CLASSES", model["classes"], "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", model["rois"],
        "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 2,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7, "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 2,
        "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.NUM_CONV", 4,
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14, "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", 2,
    ])  # fmt: skip
    return build_model(cfg)


def detector(job: dict) -> torch.nn.Module:
    torch.manual_seed(job["seed"])
    return (detectron2_detector if job["system"] == "detectron2" else torchvision_detector)(job["model"])


def in_precision(job: dict):
    return torch.autocast("cpu", torch.bfloat16) if job["precision"] == "bfloat16" else contextlib.nullcontext()


# -------------------------------------------------------------------------------------------------------------- inputs
def as_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 [H,W,3] -> uint8 [3,H,W]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def model_input(job: dict, image: np.ndarray, target: dict | None = None) -> tuple:
    """uint8 BGR [H,W,3] and boxes, labels (from 1), polygons in its frame -> what the system's model takes."""
    if job["system"] == "torchvision":
        picture = as_tensor(image[..., ::-1]).float() / 255
        if target is None:
            return picture, None
        wanted = {"boxes": torch.from_numpy(target["boxes"]), "labels": torch.from_numpy(target["labels"])}
        if job["model"]["masks"]:
            size = image.shape[:2]
            masks = [coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(p, *size))) for p in target["polygons"]]
            wanted["masks"] = torch.from_numpy(np.stack(masks))
        return picture, wanted
    from detectron2.structures import Boxes, Instances, PolygonMasks

    entry = {"image": as_tensor(image), "height": image.shape[0], "width": image.shape[1]}
    if target is not None:
        entry["instances"] = Instances(image.shape[:2])
        entry["instances"].gt_boxes = Boxes(torch.from_numpy(target["boxes"]))
        entry["instances"].gt_classes = torch.from_numpy(target["labels"] - 1)
        if job["model"]["masks"]:
            entry["instances"].gt_masks = PolygonMasks(target["polygons"])
    return entry, None


def losses(job: dict, model: torch.nn.Module, batch: list[tuple]) -> torch.Tensor:
    with in_precision(job):
        if job["system"] == "torchvision":
            return sum(model(*map(list, zip(*batch))).values())
        from detectron2.utils.events import EventStorage

        with EventStorage():
            return sum(model([entry for entry, _ in batch]).values())


def predicted(job: dict, model: torch.nn.Module, images: list) -> list[dict]:
    """Of each image boxes, scores, labels (from 1) and, of a model of masks, bitmaps of the image's size."""
    with torch.no_grad(), in_precision(job):
        found = model(images)
    if job["system"] == "detectron2":
        found = [entry["instances"] for entry in found]
        return [
            {"boxes": f.pred_boxes.tensor, "scores": f.scores, "labels": f.pred_classes + 1}
            | ({"masks": f.pred_masks} if f.has("pred_masks") else {})
            for f in found
        ]
    return [f | ({"masks": f["masks"][:, 0] > 0.5} if "masks" in f else {}) for f in found]


# ------------------------------------------------------------------------------------- work that peers.py asks for
def prepare_step(job: dict):
    """A training step on the batch of job["batch"]."""
    with np.load(job["batch"]) as content:
        arrays = {key: content[key] for key in content.files}
    batch = []
    for image, boxes, labels, edges in zip(
        *(arrays[key] for key in ("image", "gt_boxes", "gt_labels", "gt_edges"))
    ):  # fmt: skip
        polygons = [[edge[:, :2].reshape(-1).astype(np.float64)] for edge in edges]
        batch.append(model_input(job, image, {"boxes": boxes, "labels": labels.astype(np.int64), "polygons": polygons}))
    model = detector(job).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 1e-9, 0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        losses(job, model, batch).backward()
        optimizer.step()

    return step, {"parameters": sum(p.numel() for p in parameters)}


def prepare_predict(job: dict):
    """A prediction of the images of job["batch"], to bitmaps of their size. Scores of random weights are alike: with
    larger weights of the classes there are 100 objects."""
    with np.load(job["batch"]) as content:
        images = [model_input(job, image)[0] for image in content["image"]]
    model = detector(job).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("cls_score.weight"):
                value.mul_(30)
    found = predicted(job, model, images)
    return lambda: predicted(job, model, images), {"objects": [len(f["scores"]) for f in found]}


class Photographs(torch.utils.data.Dataset):
    """The images of a COCO annotation file with objects, as the system's own training reads them: torchvision's
    detectors resize in the model, detectron2's in the reader."""

    def __init__(self, job: dict, annotations: str, training: bool):
        self.job, self.training, self.folder = job, training, Path(job["images"][annotations])
        with contextlib.redirect_stdout(sys.stderr):
            self.coco = COCO(annotations)
        self.labels = {k: i + 1 for i, k in enumerate(sorted(self.coco.getCatIds()))}
        self.categories = sorted(self.coco.getCatIds())
        ids = sorted(self.coco.getImgIds())
        self.ids = [i for i in ids if not training or self._objects(i)]

    def _objects(self, image_id: int) -> list[dict]:
        found = self.coco.loadAnns(self.coco.getAnnIds(image_id, iscrowd=0))
        return [a for a in found if a["bbox"][2] > 0 and a["bbox"][3] > 0]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple:
        entry = self.coco.loadImgs(self.ids[i])[0]
        path = self.folder / entry["file_name"]
        if self.job["system"] == "detectron2":
            return self._as_detectron2(entry, path)
        with Image.open(path) as opened:
            image = np.asarray(opened.convert("RGB"))[..., ::-1]
        if not self.training:
            return model_input(self.job, image)
        objects = self._objects(self.ids[i])
        boxes = np.array([a["bbox"] for a in objects], np.float32)
        boxes[:, 2:] += boxes[:, :2]
        polygons = [[np.array(p, np.float64) for p in a["segmentation"]] for a in objects]
        if torch.rand(()) < 0.5:
            image, width = image[:, ::-1], image.shape[1]
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
            for p in itertools.chain(*polygons):
                p[0::2] = width - p[0::2]
        labels = np.array([self.labels[a["category_id"]] for a in objects])
        polygons = [[p.tolist() for p in parts] for parts in polygons]
        return model_input(self.job, image, {"boxes": boxes, "labels": labels, "polygons": polygons})

    def _as_detectron2(self, entry: dict, path: Path) -> tuple:
        from detectron2.data import DatasetMapper
        from detectron2.data import transforms as T
        from detectron2.structures import BoxMode

        model = self.job["model"]
        augmentations = [T.ResizeShortestEdge(model["short_edge"], model["max_size"])]
        augmentations += [T.RandomFlip()] * self.training
        record = {"file_name": str(path), "height": entry["height"], "width": entry["width"]}
        if self.training:
            record["annotations"] = [
                {"bbox": a["bbox"], "bbox_mode": BoxMode.XYWH_ABS, "category_id": self.labels[a["category_id"]] - 1,
                 "iscrowd": 0} | ({"segmentation": a["segmentation"]} if model["masks"] else {})
                for a in self._objects(entry["id"])
            ]  # fmt: skip
        mapper = DatasetMapper(
            self.training, augmentations=augmentations, image_format="BGR", use_instance_mask=model["masks"]
        )
        return mapper(record), None


def prepare_data(job: dict):
    """Reads all images once, ready for the backbone: torchvision's transform resizes, normalises and pads them."""
    photographs = Photographs(job, job["annotations"], training=True)
    resize = torchvision_detector(job["model"]).transform if job["system"] == "torchvision" else None

    def read() -> None:
        for i in range(len(photographs)):
            picture, target = photographs[i]
            if resize is not None:
                resize([picture], [target])

    return read, {"images": len(photographs)}


def prepare_score(job: dict):
    """COCO's scores of a results file, as torchvision's reference scripts and, without its C++ extension, detectron2
    compute them: by pycocotools."""

    def score() -> None:
        with contextlib.redirect_stdout(sys.stderr):
            truth = COCO(job["annotations"])
            results = truth.loadRes(job["results"])
            for kind in ("bbox", "segm"):
                evaluation = COCOeval(truth, results, kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()

    return score, {}


WORKS = {"step": prepare_step, "predict": prepare_predict, "data": prepare_data, "score": prepare_score}


# ------------------------------------------------------------------------------------------------------ same_budget.py
def rate_at(step: int, job: dict) -> float:
    """The learning rate: a linear warm-up from its job["warmup"]-th part, and a tenth from each of job["drops"] on."""
    first = 1 / job["warmup"]
    warm = min(1.0, first + (1 - first) * step / job["warmup"])
    return job["rate"] * warm * 0.1 ** sum(step >= drop for drop in job["drops"])


def train(job: dict) -> None:
    """Trains on job["train"], writes what the model finds in the images of job["val"] to job["results"]."""
    model = detector(job).train()
    photographs = Photographs(job, job["train"], training=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0, 0.9, weight_decay=1e-4)
    order = torch.Generator().manual_seed(job["seed"])
    indices = itertools.chain.from_iterable(
        torch.randperm(len(photographs), generator=order).tolist() for _ in itertools.count()
    )
    start = time.perf_counter()
    for step in range(job["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, job)
        batch = [photographs[i] for i in itertools.islice(indices, job["images_per_step"])]
        optimizer.zero_grad()
        loss = losses(job, model, batch)
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            passed = time.perf_counter() - start
            print(
                f"step {step + 1}: loss {float(loss.detach()):.3f}, {passed / (step + 1):.2f} s a step", file=sys.stderr
            )
    seconds = time.perf_counter() - start
    model.eval()
    photographs = Photographs(job, job["val"], training=False)
    results = []
    for i, image_id in enumerate(photographs.ids):
        (found,) = predicted(job, model, [photographs[i][0]])
        boxes, scores, labels = (found[key].float().numpy() for key in ("boxes", "scores", "labels"))
        for (x1, y1, x2, y2), score, label in zip(boxes.tolist(), scores.tolist(), labels.astype(int).tolist()):
            results.append({
                "image_id": image_id, "category_id": photographs.categories[label - 1], "score": score,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
            })  # fmt: skip
    Path(job["results"]).write_text(json.dumps(results))
    say({"seconds": seconds, "peak_mib": peak_mib()})


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    if job["system"] == "detectron2":
        import_detectron2()
    train(job) if job["work"] == "train" else serve(*WORKS[job["work"]](job))


if __name__ == "__main__":
    main()
