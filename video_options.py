"""The options of --predict that are about videos."""

import argparse
from typing import NamedTuple

__all__ = ["VIDEO_OPTIONS", "VideoOptions", "add_video_options", "idle_options", "video_options"]


VIDEO_OPTIONS = [
    "--frames", "--every", "--track", "--track-age", "--no-video", "--realtime", "--fps", "--page", "--show",
]  # fmt: skip


class VideoOptions(NamedTuple):
    """What the options of --predict say about videos."""

    every: int = 1  # predict every k-th frame
    frames: bool = False  # folders are videos: their images are the frames
    fps: float | None = None  # frame rate of the source, if it has none or is wrong
    track: bool = False  # give objects ids
    track_age: int = 30  # frames for which an object may be hidden and keeps its id
    realtime: bool = False  # play files as a camera would, and drop frames that come too fast
    video: bool = True  # an annotated video besides the json lines
    page: int | None = None  # port of a page with the newest picture
    show: bool = False  # a window with the newest picture


def add_video_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--predict with videos, cameras and streams (docs/VIDEO.md)")
    group.add_argument("--frames", action="store_true", help="a folder is a video: its images are the frames")
    group.add_argument("--every", type=_count, metavar="K", help="predict every K-th frame")
    group.add_argument("--track", action="store_true", help="give every object an id that it keeps over the frames")
    group.add_argument(
        "--track-age", type=_count, metavar="N", help="predicted frames for which a hidden object keeps its id (30)"
    )
    group.add_argument("--no-video", action="store_true", help="write the json lines alone, no annotated video")
    group.add_argument(
        "--realtime", action="store_true", help="play a file as a camera would: frames that come too fast are dropped"
    )
    group.add_argument("--fps", type=_rate, metavar="F", help="frames per second of a source that does not say it (25)")
    group.add_argument("--page", type=_port, metavar="PORT", help="show the newest picture at http://127.0.0.1:PORT/")
    group.add_argument("--show", action="store_true", help="show the newest picture in a window")


def video_options(args: argparse.Namespace) -> VideoOptions:
    return VideoOptions(
        args.every or 1, args.frames, args.fps, args.track or args.track_age is not None, args.track_age or 30,
        args.realtime, not args.no_video, args.page, args.show,
    )  # fmt: skip


def idle_options(options: VideoOptions) -> list[str]:
    """The given options, which have no effect where there is no video."""
    given = [getattr(options, k) != v for k, v in VideoOptions()._asdict().items()]
    flags = ["--every", "--frames", "--fps", "--track", "--track-age", "--realtime", "--no-video", "--page", "--show"]
    return [flag for flag, one in zip(flags, given) if one]


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10**6:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to 1000000")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port, 1 to 65535, or 0 for any that is free")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0.01 <= rate <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not a number of frames per second from 0.01 to 1000")
    return rate
