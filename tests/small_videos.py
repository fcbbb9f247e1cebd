"""Small videos of a red square that moves, and a predictor without a network that finds it.

python -m tests.small_videos VIDEO OUTPUT KILL   predicts the video; at frame KILL the process kills itself
"""

import os
import signal
import sys
from pathlib import Path

import cv2
import numpy as np

from config import default_config, finalize_config
from predict_video import predict_videos
from tests.tiny import TINY_MODEL
from video_options import VideoOptions
from video_source import find_sources

SIZE, SIDE, STEP = (96, 128), 24, 3  # of a frame; of the square; pixels from frame to frame


def frame(number: int) -> np.ndarray:
    pixels = np.full((*SIZE, 3), 60, np.uint8)
    left = 4 + STEP * number
    pixels[30 : 30 + SIDE, left : left + SIDE] = 0, 0, 255
    return pixels


def write_video(path: Path, frames: int = 24, fps: float = 10, codec: str = "MJPG", jump: int = 0) -> Path:
    """jump: so many frames at the beginning show the square elsewhere, as if it was another one."""
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*codec), fps, SIZE[::-1])
    for n in range(frames):
        writer.write(frame(n + 20 if n < jump else n - jump))
    writer.release()
    return path


def read_video(path: Path) -> list[np.ndarray]:
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    frames = []
    while (got := capture.read())[0]:
        frames.append(got[1])
    return frames


class RedSquares:
    """Finds the red square, with a mask; `watch` is called with the number of frames seen before."""

    class_names, category_ids = ["cat", "dog", "owl"], [7, 8, 9]

    def __init__(self, watch=lambda seen: None, *settings: str):
        given = [*TINY_MODEL, "DATA.NUM_CATEGORY=3", "MODE_MASK=True", "TEST.BATCH_SIZE=4", *settings]
        self.cfg = finalize_config(default_config().update_args(given), training=False)
        self.seen, self.watch = 0, watch
        self.predictors = [self.predict_batch]

    def predict_batch(self, image, image_shape):
        self.watch(self.seen)
        self.seen += len(image)
        boxes = np.zeros((len(image), 1, 4), np.float32)
        count = np.zeros(len(image), np.int32)
        for n, pixels in enumerate(image):
            rows, columns = np.nonzero((pixels[..., 2] > 180) & (pixels[..., 0] < 90))
            if len(rows):
                boxes[n, 0], count[n] = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1), 1
        return {
            "boxes": boxes, "scores": np.full((len(image), 1), 0.9, np.float32), "count": count,
            "labels": np.full((len(image), 1), 2, np.int32), "masks": np.ones((len(image), 1, 28, 28), np.float32),
        }  # fmt: skip


def main(video: str, output: str, kill: str) -> int:
    def watch(seen: int) -> None:
        if seen >= int(kill) >= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    _, sources = find_sources([video], False)
    return predict_videos(RedSquares(watch), sources, output, VideoOptions(track=True))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
