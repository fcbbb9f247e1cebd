"""video_source.py: what --predict is given, bad sources in one line and in bounded time, frames that are dropped."""

import os
import shutil
import socket
import threading
import time

import cv2
import numpy as np
import pytest
from small_videos import frame, write_video

import video_source
from common import UserError
from video_source import Frame, Source, find_sources, newest_only, open_source, paced, read_ahead
from video_views import LivePage

pytestmark = pytest.mark.quick


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "frames"
    path.mkdir()
    for n in (0, 1, 2, 9, 10, 11):
        cv2.imwrite(str(path / f"f{n}.png"), frame(n))
    return path


def one(path, frames=False):
    images, (source,) = find_sources([str(path)], frames)
    assert not images
    return source


# ------------------------------------------------------------------------------------------ what is what
def test_videos_are_known_by_their_content_or_their_name(tmp_path, folder):
    mp4 = write_video(tmp_path / "a.mp4", 3, codec="mp4v")
    for name in ("clip.bin", "photo.jpg"):  # videos under other names
        shutil.copy(mp4, tmp_path / name)
    (tmp_path / "broken.mkv").write_bytes(b"no video at all")
    (tmp_path / "photo.avif").write_bytes(cv2.imencode(".avif", frame(0))[1].tobytes())
    paths = [str(tmp_path / n) for n in ("a.mp4", "clip.bin", "photo.jpg", "broken.mkv", "photo.avif")]
    images, sources = find_sources([*paths, str(folder), str(folder / "f0.png"), "missing.jpg"], False)
    assert [s.address for s in sources] == paths[:4] and {s.kind for s in sources} == {"video"}
    assert images == [paths[4], str(folder), str(folder / "f0.png"), "missing.jpg"]


def test_numbers_are_cameras_and_addresses_streams_whose_passwords_are_never_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, sources = find_sources(
        ["0", "camera:2", "camera:/dev/video7", "rtsp://me:secret@cam.local:554/a/b?key=x"], False
    )
    assert [(s.kind, s.address) for s in sources[:3]] == [("camera", "0"), ("camera", "2"), ("camera", "/dev/video7")]
    stream = sources[3]
    assert stream.name == "rtsp://cam.local:554/a/b" and stream.stem == "cam.local_b"
    assert stream.address.endswith("secret@cam.local:554/a/b?key=x")
    (tmp_path / "0").write_bytes(b"")
    assert find_sources(["0"], False) == (["0"], [])  # a file of that name
    with pytest.raises(UserError, match="file:// is not supported"):
        find_sources(["file:///etc/passwd"], False)


def test_a_folder_is_a_video_only_with_frames_in_the_order_of_its_numbers(folder):
    assert find_sources([str(folder)], False) == ([str(folder)], [])
    opened = open_source(one(folder, True), fps=5)
    assert (opened.count, opened.fps, opened.live, opened.size) == (6, 5, False, (96, 128))
    frames = list(opened.frames(1, 2))
    assert [(f.number, f.seconds) for f in frames] == [(1, 0.2), (3, 0.6), (5, 1.0)]
    for f, n in zip(frames, (1, 9, 11)):  # f9 before f10
        np.testing.assert_array_equal(f.pixels, frame(n))
    with pytest.raises(UserError, match="--frames: .*f0.png is not a folder"):
        find_sources([str(folder / "f0.png")], True)


def test_every_kth_frame_of_a_video_from_any_on_has_its_number_and_time_stamp(tmp_path):
    source = one(write_video(tmp_path / "a.avi", 20, fps=8))
    opened = open_source(source)
    assert (opened.count, opened.fps, opened.live) == (20, 8, False)
    for start, every in ((0, 1), (3, 1), (6, 5)):
        frames = list(open_source(source).frames(start, every))
        assert [f.number for f in frames] == list(range(start, 20, every))
        for f in frames:
            assert f.seconds == pytest.approx(f.number / 8) and f.clock is None
            assert np.abs(f.pixels.astype(int) - frame(f.number)).mean() < 4


def test_a_device_is_live_and_its_first_frame_has_the_number_that_is_next(tmp_path):
    write_video(tmp_path / "a.avi", 6)
    opened = open_source(one(f"camera:{tmp_path / 'a.avi'}"))
    assert opened.live and opened.count is None
    frames = list(opened.frames(40, 2))
    assert [f.number for f in frames] == [40, 42, 44] and all(abs(f.clock - time.time()) < 60 for f in frames)


# ------------------------------------------------------------------------------------------ bad sources
def bad_files(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", 12, codec="mp4v").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])  # its table of contents is at the end
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.avi").write_bytes(b"hello " * 100)
    write_video(tmp_path / "none.avi", 0)
    avi = write_video(tmp_path / "good.avi", 3).read_bytes()
    (tmp_path / "codec.avi").write_bytes(avi.replace(b"MJPG", b"ZZZZ"))
    return ["cut.mp4", "empty.mp4", "text.avi", "none.avi", "codec.avi"]


def test_a_video_that_cannot_be_read_is_one_line(tmp_path, capfd):
    for name in bad_files(tmp_path):
        with pytest.raises(UserError) as error:
            open_source(one(tmp_path / name))
        assert str(error.value).startswith(f"video {tmp_path / name} ") and "\n" not in str(error.value)
    captured = capfd.readouterr()
    assert captured.err == captured.out == ""  # nothing of OpenCV's and FFmpeg's own


def test_a_camera_or_stream_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match="camera 97 cannot be opened"):
        open_source(one("97"))
    with pytest.raises(UserError, match=r"stream rtsp://127.0.0.1:1/x cannot be opened: check"):
        open_source(one("rtsp://u:secret@127.0.0.1:1/x"))


def test_a_stream_that_answers_nothing_ends_after_its_time(monkeypatch):
    monkeypatch.setattr(video_source, "TIMEOUT", 0.3)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        for scheme in ("rtsp", "http"):
            with pytest.raises(UserError, match=r"cannot be opened within 0.3 s") as error:
                open_source(one(f"{scheme}://u:secret@127.0.0.1:{server.getsockname()[1]}/x"))
            assert "secret" not in str(error.value)


def test_a_stream_is_live_and_ends_after_its_time_when_it_falls_silent(monkeypatch):
    monkeypatch.setattr(video_source, "TIMEOUT", 1.0)
    page, jpegs = LivePage(0), [cv2.imencode(".jpg", frame(n))[1].tobytes() for n in range(4)]
    served = threading.Event()

    def serve():
        while not served.wait(0.02):
            page.show(jpegs[0])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        opened = open_source(one(page.address + "stream"))
        assert opened.live and opened.count is None and opened.size == (96, 128)
        frames = opened.frames(7, 1)
        first = next(frames)
        assert first.number == 7 and np.abs(first.pixels.astype(int) - frame(0)).mean() < 4
        served.set()  # nothing comes any more
        rest = [f.number for f in frames]  # what was on its way, then the end
        assert rest == list(range(8, 8 + len(rest)))
    finally:
        served.set()
        thread.join()
        page.close()


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="has no frame"):
        open_source(one(tmp_path, True))


# ------------------------------------------------------------------------------------------ threads
def numbered(count, after=lambda n: None):
    for n in range(count):
        yield Frame(n, n / 10, None, np.zeros((1, 1, 3), np.uint8))
        after(n)


def test_frames_read_ahead_come_whole_and_in_order_and_so_do_errors():
    assert [f.number for f in read_ahead(numbered(20), 3)] == list(range(20))

    def broken(n):
        if n == 4:
            raise UserError("gone")

    seen = []
    with pytest.raises(UserError, match="gone"):
        for f in read_ahead(numbered(20, broken), 3):
            seen.append(f.number)
    assert seen == [0, 1, 2, 3, 4]
    threads = threading.active_count()
    ahead = read_ahead(numbered(10**9), 3)
    next(ahead)
    ahead.close()  # the thread ends although its frames do not
    assert threading.active_count() == threads


def test_a_slow_model_gets_the_newest_frame_and_the_others_are_counted():
    held, delivered = threading.Semaphore(0), threading.Event()
    frames = [Frame(n, n / 10, None, np.zeros((1, 1, 3), np.uint8)) for n in range(6)]

    def source():
        yield frames[0]
        held.acquire()  # the model looks at frame 0
        yield from frames[1:5]
        delivered.set()  # frame 4 has been taken
        held.acquire()
        yield frames[5]

    lost = []
    stream = newest_only(source(), lambda f: lost.append(f.number))
    assert next(stream).number == 0
    held.release()
    assert delivered.wait(10)
    assert next(stream).number == 4 and lost == [1, 2, 3]
    held.release()
    assert [f.number for f in stream] == [5] and lost == [1, 2, 3]


def test_a_recording_is_played_at_its_own_speed():
    now, slept = [100.0], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    frames = []
    for f in paced(numbered(4), lambda: now[0], sleep):
        frames.append(f.number)
        now[0] += 0.25 if f.number == 0 else 0  # the reader was late once
    assert frames == [0, 1, 2, 3] and slept == [pytest.approx(0.05)]


def test_names_of_files_are_plain(tmp_path):
    path = tmp_path / "müde Füße (1).mp4"
    shutil.copy(write_video(tmp_path / "a.mp4", 2, codec="mp4v"), path)
    source = one(path)
    assert source == Source("video", str(path), str(path), "müde_Füße_1") and open_source(source).count == 2
    assert os.sep not in find_sources(["camera:/dev/v4l/by-id/x"], False)[1][0].stem
