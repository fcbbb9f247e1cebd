"""Videos, cameras and streams frame by frame: json lines, an annotated video, ids of objects, a live view.

A thread decodes frames ahead, the main thread runs the graph, another thread draws and writes. What is written is
complete up to a frame at any moment: the same command again goes on behind it.
"""

import functools
import json
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from common import UserError, logger, read_json, write_json
from config import Config
from data import resize_for_test, stack_images
from detections import Detections, to_original_frame
from predict_devices import predict_in_turn
from predict_tiles import detect_tiled, in_tiles, open_parts
from utils.mjpeg_avi import AviWriter, count_frames
from utils.stopping import Stopped
from utils.tracker import Tracker
from video_options import VideoOptions
from video_source import Frame, Opened, Source, newest_only, open_source, paced, read_ahead
from video_views import LivePage, LiveWindow
from viz import Style, draw_detections, prediction_entry

__all__ = ["Views", "open_views", "predict_videos"]

QUALITY = 85  # of the pictures of an annotated video, JPEG's scale
_SECONDS_BETWEEN_REPORTS = 10
# Settings that change nothing about what is found.
_IDLE_SETTINGS = ("DATA.", "TRAIN.", "TRAINER", "TEST.BATCH_SIZE")


class Views(NamedTuple):
    """Where pictures are shown while they are made."""

    page: LivePage | None = None
    window: LiveWindow | None = None

    def close(self) -> None:
        for view in self:
            if view is not None:
                view.close()


def open_views(options: VideoOptions) -> Views:
    window = LiveWindow("PackRCNN") if options.show else None
    try:
        return Views(None if options.page is None else LivePage(options.page), window)
    except UserError:
        if window is not None:
            window.close()
        raise


class _Job(NamedTuple):
    """The files of one video, and how far they are."""

    opened: Opened
    about: Path  # description of source and settings, and whether all is done
    lines: Path
    video: Path
    description: dict[str, Any]
    done: list[dict[str, Any]]  # entries of the frames that are written
    complete: bool


# --------------------------------------------------------------------------------------------------------------- videos
def predict_videos(
    predictor: Any,
    sources: Sequence[Source],
    output: str,
    options: VideoOptions = VideoOptions(),  # noqa: B008
    style: Style = Style(smallest=320),  # noqa: B008
    views: Views = Views(),  # noqa: B008
    origin: str = "",
) -> int:
    """Predicts videos with a `LoadedPredictor` into the folder `output`, going on behind what is there already.

    Returns 0, or 128 + the number of a signal that stopped it. Incomplete sources are named in a UserError at the end.
    origin: the name of the model's weights.
    """
    problems = []
    for source in sources:
        opened = open_source(source, options.fps)
        job = _find_job(opened, Path(output), predictor, options, origin)
        if job.complete:
            logger.info(f"{source.name} is complete in {job.lines}; to predict it again, remove {job.about}")
            problems += [job.description["problem"]] if job.description.get("problem") else []
            continue
        try:
            problem = _predict_video(predictor, job, options, style, views)
        except Stopped as e:
            logger.warning(f"stopped by {e}; the same command goes on behind the last frame of {job.lines}")
            return 128 + e.number
        except KeyboardInterrupt:
            logger.warning(f"stopped; the same command goes on behind the last frame of {job.lines}")
            return 128 + signal.SIGINT
        if problem:
            problems.append(problem)
    if problems:
        raise UserError("; ".join(problems))
    return 0


def _predict_video(predictor: Any, job: _Job, options: VideoOptions, style: Style, views: Views) -> str:
    """Returns what was wrong with the source, "" if nothing."""
    cfg, opened, name = predictor.cfg, job.opened, job.opened.source.name
    # With batches that begin at the same frames, a continued run computes the same numbers as an uninterrupted one.
    size = 1 if opened.live or options.realtime else cfg.TEST.BATCH_SIZE
    done = job.done[: len(job.done) // size * size]
    start = done[-1]["frame"] + options.every if done else 0
    if done:
        logger.info(f"{name}: {len(done)} frames are in {job.lines}; going on with frame {start}")
    for number in sorted({*range(0, start, options.every)} - {e["frame"] for e in done}):
        opened.skipped(number)
    dropped = [job.description["dropped"], 0]  # in all, and since the last report

    def drop(_: Frame) -> None:
        dropped[0], dropped[1] = dropped[0] + 1, dropped[1] + 1

    frames: Iterator[Frame] = opened.frames(start, options.every)
    if options.realtime and not opened.live:
        frames = paced(frames, time.monotonic, time.sleep)
    live = opened.live or options.realtime
    stream = newest_only(frames, drop) if live else read_ahead(frames, 2 * size + 2)
    tracker = _replayed(done, options, predictor) if options.track else None
    report = _Report(name, opened, start, dropped)
    writer = _Writer(predictor, job, done, tracker, options, style, views)
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            for batch, found in _predicted(predictor, _batches(stream, size), live):
                waiting.append(pool.submit(writer.add, batch, found))
                while len(waiting) > 2:
                    waiting.popleft().result()
                report.say(batch)
        finally:
            stream.close()
            try:
                while waiting:
                    waiting.popleft().result()
            finally:
                writer.close()
                job.description["dropped"] = dropped[0]
                write_json(job.about, job.description, indent=1)
    return _finish(job, writer, opened, dropped[0])


def _finish(job: _Job, writer: "_Writer", opened: Opened, dropped: int) -> str:
    """Notes that the video is complete; returns what was wrong with its source."""
    name, files = opened.source.name, str(job.lines) + (f" and {job.video}" if writer.avi is not None else "")
    if dropped:
        share = dropped / (dropped + writer.count)
        logger.warning(
            f"{name}: {dropped} of {dropped + writer.count} frames were dropped ({share:.0%}): they came "
            "faster than the model works"
        )
    if not writer.count:
        return f"{name} delivered no frame"
    problem = ""
    if opened.unreadable:
        count = len(opened.unreadable)
        problem = f"{count} frames of {name} could not be read and were left out, e.g. {opened.unreadable[0]}"
    # The number of frames that a container states may be an estimate.
    elif opened.count and opened.read < 0.9 * opened.count:
        problem = (
            f"video {name} is truncated or damaged: {opened.read} of its {opened.count} frames could be read; what was "
            f"found in them is in {job.lines}"
        )
    # A camera has no last frame: the next command goes on with it.
    job.description.update(complete=not opened.live, frames=writer.count, problem=problem)
    write_json(job.about, job.description, indent=1)
    logger.info(f"{name}: {writer.count} frames in {files}")
    return problem


def _batches(stream: Iterator[Frame], size: int) -> Iterator[list[Frame]]:
    batch: list[Frame] = []
    for frame in stream:
        # Frames of one size make a batch; a stream may change its size.
        if batch and batch[0].pixels.shape != frame.pixels.shape:
            yield batch
            batch = []
        batch.append(frame)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _predicted(
    predictor: Any, batches: Iterator[list[Frame]], live: bool
) -> Iterator[tuple[list[Frame], list[Callable[[], Detections]]]]:
    """(batch, for each of its frames a function that gives its detections), in order; the graph has run by then.

    Batches are dealt to all devices, but not those of a live source, whose results would then wait for later frames.
    """
    cfg = predictor.cfg
    if in_tiles(cfg):
        for batch in batches:
            tiled = [detect_tiled(predictor.predictors, open_parts(f.pixels), cfg) for f in batch]
            yield batch, [_constant(found) for found in tiled]
        return

    def stacked() -> Iterator[dict[str, Any]]:
        for batch in batches:
            image, shapes = stack_images([resize_for_test(f.pixels, cfg) for f in batch], cfg)
            yield {"image": image, "image_shape": shapes, "frames": batch}

    # The writer has a thread of its own, so nothing waits for a single device in any case.
    for given, outputs in predict_in_turn(predictor.predictors[: 1 if live else None], stacked(), ahead=False):
        shapes, frames = given["image_shape"], given["frames"]
        each = [{k: v[n] for k, v in outputs.items()} for n in range(len(frames))]
        sizes = [f.pixels.shape[:2] for f in frames]
        yield frames, [functools.partial(to_original_frame, *one) for one in zip(each, shapes, sizes)]


def _constant(detections: Detections) -> Callable[[], Detections]:
    return lambda: detections


class _Report:
    """A line about the progress every few seconds."""

    def __init__(self, name: str, opened: Opened, start: int, dropped: list[int]):
        self.name, self.total, self.dropped = name, opened.count, dropped
        self.done, self.since, self.last = 0, time.monotonic(), time.monotonic()

    def say(self, batch: list[Frame]) -> None:
        self.done += len(batch)
        now = time.monotonic()
        if now - self.last < _SECONDS_BETWEEN_REPORTS:
            return
        self.last = now
        of = f" of {self.total}" if self.total else ""
        lost = f"; {self.dropped[1]} frames were dropped since the last report" if self.dropped[1] else ""
        self.dropped[1] = 0
        rate = self.done / (now - self.since)
        logger.info(f"{self.name}: frame {batch[-1].number + 1}{of}, {rate:.2f} predicted per second{lost}")


# ---------------------------------------------------------------------------------------------------------------- files
class _Writer:
    """Appends frames to the json lines and the annotated video, in order, from one thread."""

    def __init__(
        self, predictor: Any, job: _Job, done: list[dict], tracker: Tracker | None, options: VideoOptions,
        style: Style, views: Views,
    ):  # fmt: skip
        self.predictor, self.job, self.tracker, self.style, self.views = predictor, job, tracker, style, views
        self.threshold = predictor.cfg.TEST.RESULT_SCORE_THRESH_VIS
        self.options, self.count, self.avi = options, len(done), None
        self._failed = False
        self.began = None if not done else done[0].get("clock")
        self.rate = job.opened.fps / options.every
        _keep_lines(job.lines, len(done))
        self._lines = open(job.lines, "a", encoding="utf-8")  # noqa: SIM115
        if done and options.video:
            size = _size_of_pictures(job.description["size"], style)
            self.avi = AviWriter(job.video, *size, self.rate, len(done))

    def add(self, batch: list[Frame], found: list[Callable[[], Detections]]) -> None:
        if self._failed:  # frames after those that could not be written must not be either
            return
        self._failed = True
        try:
            for frame, one in zip(batch, found):
                self._add(frame, one())
            self._failed = False
        except OSError as e:
            raise UserError(
                f"{self.job.lines}: {e.strerror or e}; when that is put right, the same command goes on"
            ) from None

    def _add(self, frame: Frame, detections: Detections) -> None:
        names = self.predictor.class_names
        entry = _entry(frame, detections, names, self.predictor.category_ids, self._seconds(frame))
        ids = _add_ids(self.tracker, entry, names) if self.tracker is not None else None
        window = self.views.window is not None and self.views.window.open
        if self.options.video or self.views.page is not None or window:
            picture = draw_detections(frame.pixels, detections, names, self.threshold, self.style, ids)
            if window:
                self.views.window.show(cv2.imencode(".ppm", picture)[1].tobytes())
            if self.options.video or self.views.page is not None:
                self._show_and_keep(picture)
        self._lines.write(json.dumps(entry) + "\n")
        self._lines.flush()
        self.count += 1

    def _show_and_keep(self, picture: np.ndarray) -> None:
        if self.options.video:
            width, height = _size_of_pictures(self.job.description["size"], self.style)
            picture = _fitted(picture, width, height)
            if self.avi is None:
                self.avi = AviWriter(self.job.video, width, height, self.rate)
        jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
        if self.avi is not None:
            self.avi.add(jpeg)
        if self.views.page is not None:
            self.views.page.show(jpeg)

    def _seconds(self, frame: Frame) -> float:
        if frame.clock is None:
            return frame.seconds
        self.began = frame.clock if self.began is None else self.began
        return frame.clock - self.began

    def close(self) -> None:
        self._lines.close()
        if self.avi is not None:
            self.avi.close()


def _entry(
    frame: Frame, detections: Detections, names: Sequence[str], ids: Sequence[int | str] | None, seconds: float
) -> dict[str, Any]:
    """One line: {frame, time, height, width, detections}, of a live source also the clock."""
    entry = prediction_entry("", frame.pixels.shape[:2], detections, names, ids)
    del entry["file"]
    clock = {} if frame.clock is None else {"clock": round(frame.clock, 3)}
    return {"frame": frame.number, "time": round(seconds, 4), **clock, **entry}


def _add_ids(tracker: Tracker, entry: dict[str, Any], names: Sequence[str]) -> list[int | None]:
    """Adds "track" to each detection that belongs to an object. Uses the numbers as they are written, so that a
    continued run, which reads them, gives the same ids."""
    found = entry["detections"]
    labels = [d["class"] for d in found]
    numbers = {name: n for n, name in enumerate(names)}
    ids = tracker.update(
        entry["frame"], np.array([d["box"] for d in found]), [numbers.get(c, -1) for c in labels],
        [d["score"] for d in found],
    )  # fmt: skip
    for d, i in zip(found, ids):
        if i is not None:
            d["track"] = i
    return ids


def _replayed(done: list[dict], options: VideoOptions, predictor: Any) -> Tracker:
    """The tracker as it was behind the last of these entries."""
    tracker = Tracker(predictor.cfg.TEST.RESULT_SCORE_THRESH_VIS, options.track_age)
    for entry in done:
        _add_ids(tracker, entry, predictor.class_names)
    return tracker


def _size_of_pictures(height_width: Sequence[int], style: Style) -> tuple[int, int]:
    """Width and height of the annotated video; small pictures are enlarged as `draw_detections` does."""
    height, width = height_width
    times = max(1, -(-style.smallest // max(height, width)))
    return width * times, height * times


def _fitted(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """The picture in a video of another size: as large as fits, in the middle of black."""
    if picture.shape[:2] == (height, width):
        return picture
    scale = min(width / picture.shape[1], height / picture.shape[0])
    w, h = (max(1, min(round(v * scale), most)) for v, most in zip(picture.shape[1::-1], (width, height)))
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = (height - h) // 2, (width - w) // 2
    canvas[top : top + h, left : left + w] = cv2.resize(picture, (w, h), interpolation=cv2.INTER_AREA)
    return canvas


# ----------------------------------------------------------------------------------------------------------------- jobs
def _find_job(opened: Opened, output: Path, predictor: Any, options: VideoOptions, origin: str) -> _Job:
    """The files of a source in `output`: those of an earlier run of the same command, else free names."""
    source = opened.source
    output.mkdir(parents=True, exist_ok=True)
    wanted = _describe(opened, predictor, options, origin)
    folder = "" if source.kind in ("camera", "stream") else Path(os.path.realpath(source.address)).parent.name
    stems = [source.stem, *([f"{folder}_{source.stem}"] if folder else [])]
    for stem in [*stems, *(f"{source.stem}_{n}" for n in range(2, 1000))]:
        about = output / f"{stem}.video.json"
        lines, video = output / f"{stem}.jsonl", output / f"{stem}.avi"
        if not about.exists():
            if any(os.path.realpath(source.address) == os.path.realpath(p) for p in (lines, video)):
                continue  # the source itself lies in the output folder
            if lines.exists() or video.exists():
                continue  # files of somebody else
            write_json(about, wanted, indent=1)
            return _Job(opened, about, lines, video, wanted, [], False)
        known = read_json(about, "description")
        if not isinstance(known, dict) or known.get("source") != wanted["source"]:
            continue
        _refuse_changes(known, wanted, about)
        if known.get("complete") and lines.exists():
            return _Job(opened, about, lines, video, known, [], True)
        known = {**wanted, "size": known["size"], "dropped": known["dropped"]}
        done = _read_lines(lines)
        if options.video:
            done = done[: count_frames(video)]
        return _Job(opened, about, lines, video, known, done, False)
    raise UserError(f"no free name for the files of {source.name} in {output}: choose another --output")


def _describe(opened: Opened, predictor: Any, options: VideoOptions, origin: str) -> dict[str, Any]:
    """What the description file says: the source, and all that decides what is written about it."""
    source = opened.source
    kept = ("every", "track", "track_age", "realtime", "video")
    return {
        "source": {"kind": source.kind, "name": source.name, "bytes": _bytes_of(source)},
        "complete": False,
        "frames": 0,
        "dropped": 0,
        "fps": opened.fps,
        "size": [int(v) for v in opened.size],
        "options": {k: getattr(options, k) for k in kept},
        "weights": origin,
        "class_names": list(predictor.class_names),
        "settings": _settings(predictor.cfg),
    }


def _bytes_of(source: Source) -> int | None:
    return os.path.getsize(source.address) if source.kind == "video" else None


def _settings(cfg: Config) -> dict[str, Any]:
    return {k: v for k, v in cfg.to_dict().items() if not k.startswith(_IDLE_SETTINGS)}


def _refuse_changes(known: dict[str, Any], wanted: dict[str, Any], about: Path) -> None:
    """Frames of other settings must not be appended to those of an earlier command."""
    try:
        changed = [k for k in ("weights", "class_names", "fps") if known[k] != wanted[k]]
        for part in ("options", "settings"):
            # Settings that only one of two versions has are left out.
            changed += [k for k in known[part] if k in wanted[part] and known[part][k] != wanted[part][k]]
    except (KeyError, AttributeError, TypeError):
        raise UserError(f"{about} is damaged: remove it, or choose another --output") from None
    if changed:
        raise UserError(
            f"{about} is of a command with another {', '.join(changed[:5])}; remove it to begin again, or choose "
            "another --output"
        )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file whose writing may have been cut off anywhere."""
    entries: list[dict[str, Any]] = []
    if not path.exists():
        return entries
    with open(path, "rb") as f:
        for line in f:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                break
            if not isinstance(entry, dict) or not isinstance(entry.get("detections"), list):
                break
            # A long video's masks would fill the memory; the tracker needs boxes alone.
            for found in entry["detections"]:
                found.pop("mask", None)
                found.pop("keypoints", None)
            entries.append(entry)
    return entries


def _keep_lines(path: Path, count: int) -> None:
    """Cuts off what follows the first `count` lines."""
    path.touch()
    with open(path, "r+b") as f:
        for _ in range(count):
            f.readline()
        f.truncate(f.tell())
