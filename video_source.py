"""Where frames come from: video files, folders of frames, cameras, and streams from the network (OpenCV's FFmpeg).

Every source is opened by `open_source`, which fails with one line within `TIMEOUT` seconds.
"""

import os
import queue
import re
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import cv2
import numpy as np

from common import UserError, logger
from data import read_image
from utils.archives import is_file, is_folder, list_folder
from utils.image_header import IMAGE_SUFFIXES

__all__ = ["TIMEOUT", "Frame", "Source", "find_sources", "newest_only", "open_source", "read_ahead"]

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".flv", ".ogv",
    ".3gp", ".mjpeg", ".mjpg", ".h264", ".h265", ".hevc",
)  # fmt: skip
_SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp")
_CAMERA = re.compile(r"camera:(.+)|(\d{1,3})")
_IMAGES_IN_BOXES = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # of the container that MP4 has too
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # FFmpeg reads it once; silent, see _quiet
TIMEOUT = 10.0  # seconds that a stream may take to open, and to deliver its next frame


class Frame(NamedTuple):
    number: int  # in its source, from 0
    seconds: float  # since the beginning
    clock: float | None  # Unix time at which a live source delivered it
    pixels: np.ndarray  # uint8 [H, W, 3] BGR


class Source(NamedTuple):
    """A video, a folder of frames, a camera or a stream; `open_source` reads it."""

    kind: str  # "video", "frames", "camera", "stream"
    address: str  # path, index or URL
    name: str  # for messages and files: without passwords
    stem: str  # of its files' names


def find_sources(paths: Sequence[str], frames: bool) -> tuple[list[str], list[Source]]:
    """Divides what --predict is given into images (files and folders) and videos.

    A number or camera:N is a camera (camera:PATH a device), rtsp:// and the like a stream, a file that begins like a
    video or is called like one is one. With `frames`, a folder's images are the frames of a video.
    """
    images, sources = [], []
    for path in paths:
        scheme = path.partition("://")[0].lower() if "://" in path else ""
        camera = None if os.path.exists(path) else _CAMERA.fullmatch(path)
        if scheme:
            if scheme not in _SCHEMES:
                raise UserError(f"--predict {path}: {scheme}:// is not supported; {', '.join(_SCHEMES)} are")
            sources.append(Source("stream", path, _without_password(path), _stem_of_url(path)))
        elif camera:
            address = camera[1] or camera[2]
            sources.append(Source("camera", address, f"camera {address}", f"camera_{_plain(address)}"))
        elif frames and is_folder(path):
            sources.append(Source("frames", path, path, _plain(Path(path).resolve().name)))
        elif os.path.isfile(path) and _is_video(path):
            sources.append(Source("video", path, path, _plain(Path(path).stem)))
        else:
            images.append(path)
    if frames and images:
        raise UserError(f"--frames: {images[0]} is not a folder, a video, a camera or a stream; leave --frames out")
    return images, sources


def _is_video(path: str) -> bool:
    try:
        with open(path, "rb") as f:
            start = f.read(400)
    except OSError:
        return False
    if start[4:8] == b"ftyp":
        return start[8:12] not in _IMAGES_IN_BOXES
    known = (b"\x1a\x45\xdf\xa3", b"FLV\x01", b"OggS", b"\x30\x26\xb2\x75", b"\0\0\1\xba", b"\0\0\1\xb3")
    if start.startswith(known) or start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        return True
    if start[:1] == b"G" and start[188:189] == b"G" and start[376:377] == b"G":  # packets of an MPEG transport stream
        return True
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def _plain(text: str) -> str:
    """The text as a part of a file name."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_.")[:80] or "video"


def _stem_of_url(url: str) -> str:
    parts = urlsplit(url)
    return _plain(f"{parts.hostname or ''}_{Path(parts.path).stem}")


def _without_password(url: str) -> str:
    """The URL without user, password and query, which may hold keys."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


# -------------------------------------------------------------------------------------------------------- opened
class Opened:
    """An open source: `frames` gives its frames once."""

    def __init__(self, source: Source, live: bool, fps: float, count: int | None, size: tuple[int, int]):
        self.source, self.live, self.fps, self.count, self.size = source, live, fps, count, size
        self.unreadable: list[str] = []
        self.read = 0  # frames that were passed, wanted or not

    def frames(self, start: int, every: int) -> Iterator[Frame]:
        """Frames `start`, start + every, …; of a live source, its next frame has the number `start`."""
        raise NotImplementedError

    def skipped(self, number: int) -> None:
        """Called for a frame that an earlier command wanted and could not read."""


class _Folder(Opened):
    def __init__(self, source: Source, fps: float | None):
        folder = Path(source.address)
        inside = [p for p in map(folder.joinpath, list_folder(folder)) if is_file(p) and not p.name.startswith(".")]
        files = sorted((p for p in inside if p.suffix.lower() in IMAGE_SUFFIXES), key=_natural)
        if not files:
            raise UserError(f"{source.name} has no frame, i.e. no image ({', '.join(IMAGE_SUFFIXES)})")
        self.files = files
        super().__init__(source, False, fps or 25.0, len(files), read_image(files[0]).shape[:2])

    def frames(self, start: int, every: int) -> Iterator[Frame]:
        for number in range(start, len(self.files), every):
            self.read = number + 1
            try:
                pixels = read_image(self.files[number])
            except UserError as e:
                logger.warning(f"{e}; this frame is left out")
                self.unreadable.append(str(self.files[number]))
                continue
            yield Frame(number, number / self.fps, None, pixels)
        self.read = len(self.files)

    def skipped(self, number: int) -> None:
        self.unreadable.append(str(self.files[number]))


def _natural(path: Path) -> list:
    """frame_9 before frame_10."""
    return [(0, int(t), "") if t.isdigit() else (1, 0, t) for t in re.split(r"(\d+)", path.name)]


class _Capture(Opened):
    def __init__(self, source: Source, fps: float | None):
        capture = _capture(source)
        try:
            good, first = capture.read()
            if not good:
                raise UserError(_no_frame(source))
            known = capture.get(cv2.CAP_PROP_FPS)
            count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
            finite = source.kind == "video" or source.kind == "stream" and 0 < count < 1e9
        finally:
            capture.release()
        self._stamps = fps is None  # of the container; a rate that was given sets its own
        rate = fps or (known if 0 < known < 1000 else 25.0)
        super().__init__(source, not finite, rate, int(count) if finite and count > 0 else None, first.shape[:2])

    def frames(self, start: int, every: int) -> Iterator[Frame]:
        capture = _capture(self.source)
        try:
            number = start if self.live else 0
            first_wanted = start
            while capture.grab():
                clock = time.time() if self.live else None
                self.read += 1
                if number >= first_wanted and (number - first_wanted) % every == 0:
                    good, pixels = capture.retrieve()
                    if not good:
                        break
                    stamp = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                    # Some containers have no time stamps: all are 0.
                    seconds = stamp if stamp > 0 and self._stamps and not self.live else number / self.fps
                    yield Frame(number, seconds, clock, _as_bgr(pixels))
                number += 1
        finally:
            capture.release()


def _as_bgr(pixels: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR) if pixels.ndim == 2 else np.ascontiguousarray(pixels[:, :, :3])


def _quiet() -> None:
    """OpenCV and FFmpeg write about broken files to stderr; the one line of the UserError says it."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def _capture(source: Source) -> Any:
    _quiet()
    limit = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, int(TIMEOUT * 1000), cv2.CAP_PROP_READ_TIMEOUT_MSEC, int(TIMEOUT * 1000)]
    started = time.monotonic()
    try:
        if source.kind == "camera" and source.address.isdigit():
            capture = cv2.VideoCapture(int(source.address), cv2.CAP_V4L2)
        elif source.kind == "camera" and source.address.startswith("/dev/"):
            capture = cv2.VideoCapture(source.address, cv2.CAP_V4L2)
        else:
            capture = cv2.VideoCapture(source.address, cv2.CAP_FFMPEG, limit)
        opened = capture.isOpened()
    except cv2.error:
        opened = False
    if opened:
        return capture
    if source.kind == "video":
        raise UserError(
            f"video {source.name} cannot be read: it is damaged, incomplete, or of a kind that this OpenCV has no "
            "codec for"
        )
    if source.kind == "camera":
        raise UserError(
            f"{source.name} cannot be opened: there is no such camera, another program uses it, or you may not; see "
            "ls /dev/video*"
        )
    waited = time.monotonic() - started
    late = f" within {TIMEOUT:g} s" if waited > 0.9 * TIMEOUT else ""
    raise UserError(f"stream {source.name} cannot be opened{late}: check the address, user and password")


def _no_frame(source: Source) -> str:
    if source.kind == "video":
        return f"video {source.name} has no frame that can be decoded: it is empty, damaged, or of an unknown codec"
    return f"{source.name} delivers no frame within {TIMEOUT:g} s"


def open_source(source: Source, fps: float | None = None) -> Opened:
    """Opens a source and decodes its first frame, so that errors come before expensive work. fps: the frame rate where
    the source has none, or another than it says."""
    return _Folder(source, fps) if source.kind == "frames" else _Capture(source, fps)


# -------------------------------------------------------------------------------------------------------- threads
_END = object()


def _reader(frames: Iterable[Frame], put: Callable[[Any], None], stop: threading.Event) -> threading.Thread:
    """A thread that gives each frame to put(), then _END or the error that ended them."""

    def run() -> None:
        last: Any = _END
        try:
            for frame in frames:
                if stop.is_set():
                    break
                put(frame)
        except BaseException as e:  # it is raised again in the thread that takes the frames
            last = e
        finally:
            if hasattr(frames, "close"):
                frames.close()
            put(last)

    thread = threading.Thread(target=run, name="frames", daemon=True)
    thread.start()
    return thread


def read_ahead(frames: Iterable[Frame], ahead: int) -> Generator[Frame, None, None]:
    """The frames, decoded by a thread that is at most `ahead` frames before."""
    waiting: queue.Queue = queue.Queue(ahead)
    stop = threading.Event()

    def put(item: Any) -> None:
        while not stop.is_set():
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                continue

    thread = _reader(frames, put, stop)
    try:
        while (item := waiting.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join(TIMEOUT)


def newest_only(frames: Iterable[Frame], dropped: Callable[[Frame], None]) -> Generator[Frame, None, None]:
    """The newest frame whenever one is asked for; frames that a newer one replaced are given to dropped()."""
    slot: list[Any] = []
    changed, stop = threading.Condition(), threading.Event()

    def put(item: Any) -> None:
        with changed:
            if slot and isinstance(item, Frame):
                dropped(slot.pop())
            slot.append(item)
            changed.notify()

    thread = _reader(frames, put, stop)
    try:
        while True:
            with changed:
                while not slot:
                    changed.wait()
                item = slot.pop(0)
            if item is _END:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join(TIMEOUT)


def paced(frames: Iterable[Frame], clock: Callable[[], float], sleep: Callable[[float], None]) -> Iterator[Frame]:
    """The frames of a recording when they are due, as a camera would deliver them."""
    begin = None
    for frame in frames:
        now = clock()
        begin = now - frame.seconds if begin is None else begin
        if frame.seconds + begin > now:
            sleep(frame.seconds + begin - now)
        yield frame
